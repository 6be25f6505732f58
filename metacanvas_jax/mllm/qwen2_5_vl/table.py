"""Published tensors of Qwen2.5-VL (and of text decoders of the same family) as parameters of ``Qwen25VL``."""

from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.mllm.tables import fused_by_head, halves, language_table, patch_kernel
from metacanvas_jax.weights.table import LINEAR, SAME, Entry, Transform, then

LANGUAGE, VISION = ("model.", "model.language_model."), ("visual.", "model.visual.")


def decoder_table(config: LanguageConfig) -> list[Entry]:
    """Entries of the decoder."""
    return language_table(config, LANGUAGE)


def vision_table(config: VisionConfig) -> list[Entry]:
    """Entries of the vision tower."""

    def entry(name: str, path: str, transform: Transform, layers: int | None = None) -> Entry:
        return halves(name, f"vision/{path}", transform, layers, VISION)

    by_head = fused_by_head(config.heads, config.width)
    entries = [
        entry(
            "patch_embed.proj.weight",
            "patch/kernel",
            patch_kernel(config.in_channels, config.temporal_patch, config.patch),
        ),
        entry("blocks.{i}.norm1.weight", "layers/attention_norm/scale", SAME, config.depth),
        entry("blocks.{i}.norm2.weight", "layers/mlp_norm/scale", SAME, config.depth),
        entry("blocks.{i}.attn.qkv.weight", "layers/qkv/kernel", then(LINEAR, by_head), config.depth),
        entry("blocks.{i}.attn.qkv.bias", "layers/qkv/bias", by_head, config.depth),
        entry("merger.ln_q.weight", "merger/norm/scale", SAME),
    ]
    linears = {"attn.proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
    for published, path in linears.items():
        entries.append(entry(f"blocks.{{i}}.{published}.weight", f"layers/{path}/kernel", LINEAR, config.depth))
        entries.append(entry(f"blocks.{{i}}.{published}.bias", f"layers/{path}/bias", SAME, config.depth))
    for published, path in {"mlp.0": "up", "mlp.2": "down"}.items():
        entries.append(entry(f"merger.{published}.weight", f"merger/{path}/kernel", LINEAR))
        entries.append(entry(f"merger.{published}.bias", f"merger/{path}/bias", SAME))
    return entries


def table(config: MllmConfig) -> list[Entry]:
    """Every published tensor of the model."""
    return decoder_table(config.language) + ([] if config.vision is None else vision_table(config.vision))
