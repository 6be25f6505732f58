"""What the registry knows of Qwen3 as a text encoder."""

from metacanvas_jax.text.base import smallest_arguments
from metacanvas_jax.text.qwen3 import published
from metacanvas_jax.text.qwen3.network import Qwen3, Qwen3Config
from metacanvas_jax.text.qwen3.prompts import rows
from metacanvas_jax.text.qwen3.table import ignore, table
from metacanvas_jax.weights.record import Network

RECORD = Network(
    family="text",
    name="qwen3",
    config=Qwen3Config,
    module=Qwen3,
    arguments=smallest_arguments,
    tiny={
        "vocab": 1024,
        "hidden": 32,
        "layers": 4,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 16,
        "mlp": 64,
        "states": (1, 3),
    },
    published="qwen3",
    read=published.read,
    table=table,
    ignore=ignore,
    rows=rows,
    subfolder="text_encoder",
    free=("dtype", "states"),
    licence=lambda config: ("Qwen3", "the Apache License 2.0"),
)
