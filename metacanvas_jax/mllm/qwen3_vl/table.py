"""Published tensors of Qwen3-VL as parameters of ``Qwen3VL``."""

from metacanvas_jax.mllm.qwen3_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen3_vl.network import MllmConfig
from metacanvas_jax.mllm.qwen3_vl.vision import VisionConfig
from metacanvas_jax.mllm.tables import fused_by_head, halves, language_table, patch_kernel
from metacanvas_jax.weights.table import LINEAR, SAME, Entry, Transform, then

LANGUAGE, VISION = ("model.language_model.", "model."), ("model.visual.", "visual.")


def decoder_table(config: LanguageConfig) -> list[Entry]:
    """Entries of the decoder."""
    return language_table(config, LANGUAGE)


def adapted_table(config: LanguageConfig) -> list[Entry]:
    """Entries of the decoder with the names of its modules in memory as their first aliases (``weights/lora.py``)."""
    in_memory, other = LANGUAGE
    return language_table(config, (other, in_memory))


def vision_table(config: VisionConfig) -> list[Entry]:
    """Entries of the vision tower."""

    def entry(name: str, path: str, transform: Transform, layers: int | None = None) -> Entry:
        return halves(name, f"vision/{path}", transform, layers, VISION)

    def layer(name: str, path: str, layers: int | None, kernel: Transform = LINEAR) -> list[Entry]:
        own = "scale" if kernel is SAME else "kernel"
        weight = entry(f"{name}.weight", f"{path}/{own}", kernel, layers)
        return [weight, entry(f"{name}.bias", f"{path}/bias", SAME, layers)]

    by_head = fused_by_head(config.heads, config.width)
    kernel = patch_kernel(config.in_channels, config.temporal_patch, config.patch)
    entries = [
        entry("pos_embed.weight", "positions/table", SAME),
        *layer("patch_embed.proj", "patch", None, kernel),
        entry("blocks.{i}.attn.qkv.weight", "layers/qkv/kernel", then(LINEAR, by_head), config.depth),
        entry("blocks.{i}.attn.qkv.bias", "layers/qkv/bias", by_head, config.depth),
    ]
    blocks = {"norm1": "attention_norm", "norm2": "mlp_norm", "attn.proj": "o"}
    blocks |= {"mlp.linear_fc1": "up", "mlp.linear_fc2": "down"}
    for name, path in blocks.items():
        transform = SAME if path.endswith("norm") else LINEAR
        entries += layer(f"blocks.{{i}}.{name}", f"layers/{path}", config.depth, transform)
    for name, path in {"norm": "norm", "linear_fc1": "up", "linear_fc2": "down"}.items():
        transform, count = SAME if path == "norm" else LINEAR, len(config.deepstack_layers)
        entries += layer(f"merger.{name}", f"merger/{path}", None, transform)
        entries += layer(f"deepstack_merger_list.{{i}}.{name}", f"deepstack/merger/{path}", count, transform)
    return entries


def table(config: MllmConfig) -> list[Entry]:
    """Every published tensor of the model."""
    return decoder_table(config.language) + ([] if config.vision is None else vision_table(config.vision))
