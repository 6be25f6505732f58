"""Gemma-2's ``config.json`` as transformers publishes it."""

from typing import Any

from metacanvas_jax.text.gemma2.network import Gemma2Config
from metacanvas_jax.weights.published import Fields, rope_theta


def read(f: Fields) -> Gemma2Config:
    """The sizes in the ``config.json`` of ``Gemma2Model``."""
    _, theta = rope_theta(f, 10000.0)
    layers, window = f("num_hidden_layers"), f("sliding_window")
    alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    f.among(layer_types=(alternating, None), use_bidirectional_attention=(False, None))
    f.only(hidden_activation="gelu_pytorch_tanh", hidden_act="gelu_pytorch_tanh", attention_bias=False)
    f.only(sliding_window_size=window)
    for name in ("sliding_window", "attn_logit_softcapping"):
        if f(name) is None:
            f.refuse(name, "a number")
    # Logits are not computed, and positions have no end here.
    f.skip("final_logit_softcapping", "tie_word_embeddings", "max_position_embeddings")
    return Gemma2Config(
        vocab=f("vocab_size"),
        width=f("hidden_size"),
        layers=layers,
        heads=f("num_attention_heads"),
        kv_heads=f("num_key_value_heads"),
        head_width=f("head_dim"),
        mlp=f("intermediate_size"),
        query_scalar=float(f("query_pre_attn_scalar")),
        softcap=float(f("attn_logit_softcapping")),
        window=window,
        theta=theta,
        eps=float(f("rms_norm_eps", 1e-6)),
    )


def write(config: Gemma2Config) -> dict[str, Any]:
    """The ``config.json`` of ``Gemma2Model``. Raises ValueError for a scale that is no whole number."""
    if config.query_scalar != int(config.query_scalar):
        raise ValueError(f"query_scalar is {config.query_scalar}, transformers expects a whole number")
    return {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "query_pre_attn_scalar": int(config.query_scalar),
        "attn_logit_softcapping": config.softcap,
        "sliding_window": config.window,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "rms_norm_eps": config.eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }
