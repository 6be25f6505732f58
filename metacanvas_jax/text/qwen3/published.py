"""Qwen3's ``config.json`` as transformers publishes it."""

from metacanvas_jax.text.qwen3.network import Qwen3Config
from metacanvas_jax.weights.published import Fields, rope_theta


def read(f: Fields) -> Qwen3Config:
    """The sizes in the ``config.json`` of ``Qwen3ForCausalLM``."""
    _, theta = rope_theta(f, 10000.0)
    layers = f("num_hidden_layers")
    f.among(layer_types=(["full_attention"] * layers, None), use_sliding_window=(False, None))
    f.only(hidden_act="silu", attention_bias=False)
    f.skip("max_position_embeddings", "sliding_window", "max_window_layers")  # positions have no end here
    f.skip("tie_word_embeddings")  # logits are not computed
    return Qwen3Config(
        vocab=f("vocab_size"),
        hidden=f("hidden_size"),
        layers=layers,
        heads=f("num_attention_heads"),
        kv_heads=f("num_key_value_heads"),
        head_width=f("head_dim", 128),
        mlp=f("intermediate_size"),
        theta=theta,
        eps=float(f("rms_norm_eps", 1e-6)),
        states=tuple(layers * quarter // 4 for quarter in (1, 2, 3)),  # of the 36 layers of 4B and 8B: 9, 18, 27
    )
