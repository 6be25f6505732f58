"""What the registry knows of Gemma-2."""

from metacanvas_jax.text.base import smallest_arguments
from metacanvas_jax.text.gemma2 import published
from metacanvas_jax.text.gemma2.network import Gemma2, Gemma2Config
from metacanvas_jax.text.gemma2.table import table
from metacanvas_jax.weights.record import Network

RECORD = Network(
    family="text",
    name="gemma2",
    config=Gemma2Config,
    module=Gemma2,
    arguments=smallest_arguments,
    tiny={
        "vocab": 1024,
        "width": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 32,
        "mlp": 128,
        "query_scalar": 32.0,
    },
    published="gemma2",
    read=published.read,
    write=published.write,
    table=table,
    ignore=lambda config: ("lm_head.*",),
    subfolder="text_encoder",
    free=("dtype",),
    licence=lambda config: ("Gemma-2", "Gemma Terms of Use"),
)
