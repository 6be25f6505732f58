"""Qwen3: names of transformers ``Qwen3ForCausalLM`` and where they go in ``text/qwen3/network.py``."""

from metacanvas_jax.mllm.tables import language_table
from metacanvas_jax.text.qwen3.network import Qwen3Config
from metacanvas_jax.weights.table import Entry

PREFIXES = ("model.", "")


def table(config: Qwen3Config) -> list[Entry]:
    """Every tensor that is read; files of the model without a head have no ``model.`` in front."""
    return language_table(config.language, PREFIXES)


def ignore(config: Qwen3Config) -> tuple[str, ...]:
    """Patterns of tensors that are not read: the head, and layers after the last one whose states are."""
    rest = range(config.language.layers, config.layers)
    return ("lm_head.*", *(f"{prefix}layers.{layer}.*" for prefix in PREFIXES for layer in rest))
