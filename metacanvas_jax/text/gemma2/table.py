"""Gemma-2: names of transformers ``Gemma2Model`` and where they go in ``text/gemma2/network.py``."""

from metacanvas_jax.text.gemma2.network import Gemma2Config
from metacanvas_jax.weights.table import LINEAR, SAME, Entry

NORMS = {
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "pre_feedforward_layernorm": "norm3",
    "post_feedforward_layernorm": "norm4",
}
LINEARS = {f"self_attn.{z}_proj": z for z in "qkvo"} | {f"mlp.{z}_proj": z for z in ("gate", "up", "down")}


def table(config: Gemma2Config) -> list[Entry]:
    """Every tensor of the encoder; files of the causal model put ``model.`` in front."""
    found = [("embed_tokens", "embedding", SAME, None), ("norm", "norm/scale", SAME, None)]
    found += [(f"layers.{{i}}.{a}", f"layers/{b}/scale", SAME, config.layers) for a, b in NORMS.items()]
    found += [(f"layers.{{i}}.{a}", f"layers/{b}/kernel", LINEAR, config.layers) for a, b in LINEARS.items()]
    return [Entry(f"{name}.weight", path, how, n, (f"model.{name}.weight",)) for name, path, how, n in found]
