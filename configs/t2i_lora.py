"""Text-to-image by adapters: the published SANA 1.6B with LoRA of rank 32, planned by Qwen2.5-VL-7B (paper B.5).

Command:   metacanvas train --config configs/t2i_lora.py --workdir runs/t2i_lora/dit_lora
Variants:  dit_lora     adapters in the DiT; the MLLM is frozen            Table 8
           no_rope      canvas tokens numbered like text (no M-RoPE)       Table 10
           mllm_lora    adapters of rank 32 in the MLLM as well            B.5
           qwen3_vl_4b  as dit_lora, planned by Qwen3-VL-4B                not in the paper
           mllm_3b      as dit_lora, planned by Qwen2.5-VL-3B, for one GPU docs/quickstart_gpu.md
           lengths      as dit_lora, prompts of up to 96, 160 and 256 tokens in buckets of their own
Data:      BLIP3o-60k at 512 x 512; for lengths sorted as in t2i_scratch.py
Hardware:  16 TPU v6e chips (4x4), 20 images per chip
Time:      about 4.0 h for 20,000 steps from stored latents (expected: 0.72 s a step, docs/performance.md)
Score:     GenEval 0.86, 0.85, 0.87 in the order of the first three (MetaQuery-XL 0.80, BLIP3o-8B 0.84)
Chosen here, as the paper does not say: adapters on every projection of the blocks, alpha = rank, the length, batch and
learning rate of t2i_scratch.py.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base, t2i_scratch, tiny
from configs.t2i_scratch import SMALL
from metacanvas_jax.config import schema
from metacanvas_jax.dit.sana.network import PROJECTIONS, sana_1600m
from metacanvas_jax.nn.lora import LoraConfig

VARIANTS = ("dit_lora", "no_rope", "mllm_lora", "qwen3_vl_4b", "mllm_3b", "lengths")


def get_config(variant: str = "") -> ConfigDict:
    """The adapters of the DiT, alone or with one thing changed."""
    name, miniature = base.choose("configs/t2i_lora.py", VARIANTS, variant)
    config = t2i_scratch.get_config("lengths" if name == "lengths" else "canvas")
    config.name = f"t2i_{name}"
    adapters = LoraConfig(rank=32, alpha=32.0, targets=PROJECTIONS)
    config.dit = base.section(sana_1600m(lora=adapters, **base.LARGE), kind="sana")
    config.dit_weights = f"{base.WEIGHTS}/Sana_1600M_512px_diffusers/transformer"
    size = "3B" if name == "mllm_3b" else "7B"
    config.mllm = base.qwen(size, LoraConfig(rank=32, alpha=32.0) if name == "mllm_lora" else None)
    if name == "qwen3_vl_4b":
        config.mllm = base.qwen3("4B")
    config.canvas.rope = name != "no_rope"
    trained = "(dit|mllm)/.*_lora/.*" if name == "mllm_lora" else "dit/.*_lora/.*"
    rules = ((trained, "train"), ("(mllm|text|vae|dit)/.*", "freeze"), (".*", "train"))
    config.train = base.training(20_000, 320, rules)
    # On v5e the hidden units of the MLLM are kept: it lies in slices there, and ten samples at a time have few of them.
    # v6e multiplies so fast beside its memory that it takes longer to write and read them than to compute them again.
    hidden = "--config.mllm.language.remat=hidden"
    rows = [schema.Hardware("v6e:4x4"), schema.Hardware("v5e:4x4", overrides=(*SMALL, hidden))]
    if name == "qwen3_vl_4b":
        # With five pictures per chip a v5p chip has room for everything.
        everything = ("--config.mllm.language.remat=none", "--config.dit.remat=none")
        rows = [dataclasses.replace(row, kept=False) for row in rows]
        rows.append(schema.Hardware("v5p:4x4x4", "data=16,fsdp=4", overrides=everything))
        rows.append(schema.Hardware("v6e:8x8", "data=16,fsdp=4"))
    config.hardware = base.hardware(*rows)
    return tiny.shrink(config, miniature) if miniature else config
