"""Gemma-2's ``config.json`` as transformers publishes it."""

from metacanvas_jax.text.gemma2.network import Gemma2Config
from metacanvas_jax.weights.published import Fields, rope_fields


def read(f: Fields) -> Gemma2Config:
    """The sizes in the ``config.json`` of ``Gemma2Model``."""
    return Gemma2Config(
        vocab=f("vocab_size"),
        width=f("hidden_size"),
        layers=f("num_hidden_layers"),
        heads=f("num_attention_heads"),
        kv_heads=f("num_key_value_heads"),
        head_width=f("head_dim"),
        mlp=f("intermediate_size"),
        query_scalar=float(f("query_pre_attn_scalar")),
        softcap=float(f("attn_logit_softcapping")),
        window=f("sliding_window"),
        theta=float(rope_fields(f)("rope_theta", 10000.0)),
        eps=float(f("rms_norm_eps", 1e-6)),
    )
