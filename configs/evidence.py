"""The paper's comparisons in miniature: OpenMoji scenes, a taught MLLM and a taught text encoder, both frozen.

Command:   python benchmarks/evidence.py           (what is missing of all runs, one after another; hours on a CPU)
           metacanvas train --config configs/evidence.py:canvas --workdir runs/evidence/canvas
Variants:  canvas            text and canvas (the method)                            Fig. 4 (1), Table 3 row 1
           canvas_only       canvas; the text encoder gets the empty prompt          Fig. 4 (2)
           text              the DiT's own text encoder, no MLLM                     Fig. 4 (3)
           metaquery         16 learnable queries in place of the text               Fig. 4 (4)
           text_metaquery    the text, followed by the 16 queries                    Fig. 4 (5)
           no_time, no_dit_block, no_vanilla_block, before_patchify                  Table 3 rows 2 to 5
           mllm_lora         as canvas, with adapters of rank 8 in the MLLM          B.5
           four_cells, one_cell    as canvas, with 2 x 2 cells or one, not 4 x 4     not in the paper
Hardware:  2 CPU cores
"""

from ml_collections import ConfigDict

from configs import base, connector_ablation, miniature
from metacanvas_jax.config import schema
from metacanvas_jax.connectors.queries import QueriesConfig
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.text.gemma2.network import Gemma2Config

FIGURE_4 = ("canvas", "canvas_only", "text", "metaquery", "text_metaquery")
TABLE_3 = ("no_time", "no_dit_block", "no_vanilla_block", "before_patchify")
SIZES = {"four_cells": (2, " A C I K"), "one_cell": (1, " A")}  # cells along a side, and their first names
VARIANTS = (*FIGURE_4, *TABLE_3, "mllm_lora", *SIZES)
TEXT = f"{miniature.CACHE}/text"
STEPS = 1500


def get_config(variant: str = "canvas") -> ConfigDict:
    """A way in which the prompt reaches the DiT, or a row of the connector's ablation."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/evidence.py has the variants {', '.join(VARIANTS)}, not {variant!r}")
    config = miniature.get_config("text" if variant in ("text", "metaquery", "text_metaquery") else "canvas")
    config.name = f"evidence_{variant}"
    queries = config.context_connector
    config.context_connector = None
    if variant != "metaquery":
        config.text = text_encoder(TEXT, length=24, reads_prompt=variant != "canvas_only")
    if variant in ("metaquery", "text_metaquery"):
        config.queries = base.section(QueriesConfig(16, after_context=False))
        config.context_connector = queries
    if variant == "text":
        config.mllm.context_memory = 0.0  # nothing reads the MLLM
    connector_ablation.leave_out(config, variant)
    if variant in SIZES:
        side, config.canvas.start = SIZES[variant]
        config.canvas.rows = config.canvas.columns = side
    adapters: tuple[tuple[str, str], ...] = ()
    if variant == "mllm_lora":
        with config.ignore_type():
            config.mllm.language.lora = base.section(LoraConfig(rank=8, alpha=8.0))
        adapters = (("mllm/.*_lora/.*", "train"),)
    config.train.rules = (*adapters, ("(mllm|text|vae)/.*", "freeze"), (".*", "train"))
    config.train.steps = config.optimizer.total_steps = STEPS
    config.train.preview_every = 0
    config.train.evaluate_every = STEPS // 6
    config.eval.during_training = 20
    config.eval.per_category = config.eval.per_category_held_out = 100
    return config


def text_encoder(weights: str, length: int, **changes: bool) -> ConfigDict:
    """The section of a taught text encoder, of which the DiT reads so many states."""
    encoder = Gemma2Config(
        vocab=527, width=128, layers=3, heads=4, kv_heads=2, head_width=32, mlp=256, query_scalar=32.0
    )
    section = schema.TextSection(encoder, weights, str(miniature.SHIPPED / "tokenizer"), length, instruction=False)
    return base.section(section, **changes)
