"""The forms of the attention that XLA computes against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_support import FAST_COMPILE

from metacanvas_jax.errors import UserError
from metacanvas_jax.kernels.attention import (
    CHUNK,
    MaskSpec,
    attention,
    causal_padded_attention,
    chunked_attention,
    cudnn_attention,
    keys_first,
)
from metacanvas_jax.kernels.attention_cpu import head_by_head_attention

QUICK = True

B, N, M = 2, 10, 14


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


MASKS = {
    "none": MaskSpec(),
    "causal_after_a_prefix": MaskSpec(causal=True, offset=4),
    "padding": MaskSpec(keys=jnp.arange(M)[None] < jnp.array([[14], [9]])),
    "segments": MaskSpec(
        query_segments=jnp.arange(N)[None] // jnp.array([[4], [5]]),
        key_segments=jnp.arange(M)[None] // jnp.array([[5], [7]]),
    ),
    "causal_and_padding": MaskSpec(causal=True, offset=4, keys=jnp.arange(M)[None] >= jnp.array([[0], [3]])),
}


@pytest.mark.parametrize("form", [chunked_attention, head_by_head_attention])
@pytest.mark.parametrize("name", MASKS)
def test_chunks_give_the_values_and_gradients_of_the_whole(name, form):
    q, k, v, w = draw(B, N, 4, 8, seed=0), draw(B, M, 2, 8, seed=1), draw(B, M, 2, 8, seed=2), draw(B, N, 4, 8, seed=3)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(q, k, v):
        def forms(q, k, v):
            whole = attention(q, k, v, mask=MASKS[name], scale=0.5)
            return whole, form(q, k, v, mask=MASKS[name], scale=0.5, chunk=4)

        grads = [jax.grad(lambda *x, i=i: jnp.sum(forms(*x)[i] * w), argnums=(0, 1, 2))(q, k, v) for i in range(2)]
        return forms(q, k, v), grads

    (whole, chunked), (expected, actual) = both(q, k, v)
    np.testing.assert_allclose(chunked, whole, atol=2e-6)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


# What is handed to cuDNN, handed to XLA: lengths for padding, wherever it stands; a condition on where it stands for
# causal; a dense mask for the rest. A sample without any key is left out: its values have no meaning.
PADDINGS = {
    "right": jnp.arange(M)[None] < jnp.array([[14], [9]]),
    "left": jnp.arange(M)[None] >= jnp.array([[0], [3]]),
    "in_the_middle": (jnp.arange(M)[None] < 5) | (jnp.arange(M)[None] >= jnp.array([[5], [8]])),
    "of_one_for_all": jnp.arange(M)[None] != 2,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("place", PADDINGS)
def test_padding_given_as_lengths_hides_the_same_keys(place, causal):
    mask = MaskSpec(causal=causal, keys=PADDINGS[place])
    q, k, v, w = draw(B, M, 4, 8, seed=0), draw(B, M, 2, 8, seed=1), draw(B, M, 2, 8, seed=2), draw(B, M, 4, 8, seed=3)
    seen = np.broadcast_to(np.asarray(mask.keys)[:, None], (B, M, M)) & (np.tri(M, dtype=bool) | (not causal))
    w = w * jnp.asarray(np.any(seen, axis=-1)[..., None, None], w.dtype)  # no keys, no meaning
    by_lengths = causal_padded_attention if causal else cudnn_attention

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
    def both(f, q, k, v):
        out, pull = jax.vjp(lambda *x: f(*x, mask=mask, scale=0.5), q, k, v)
        return jnp.where(w == 0, 0.0, out), *pull(w)

    actual = both(functools.partial(by_lengths, library="xla"), q, k, v)
    for a, b in zip(actual, both(functools.partial(chunked_attention, chunk=4), q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_a_sample_without_any_key_is_given_one():
    k, v = draw(B, N, 2, 8, seed=1), draw(B, N, 2, 8, seed=2)
    keys = jnp.arange(N)[None] < jnp.array([[0], [7]])
    assert keys_first(k, v, keys)[2].tolist() == [1, 7]


def test_a_query_without_any_key_is_zero_and_moves_nothing_on_a_cpu():
    q, k, v = draw(B, N, 4, 8, seed=0), draw(B, M, 2, 8, seed=1), draw(B, M, 2, 8, seed=2)
    mask = MaskSpec(keys=jnp.arange(M)[None] < jnp.array([[0], [9]]))
    out, pull = jax.vjp(functools.partial(head_by_head_attention, mask=mask, chunk=4), q, k, v)
    for x in (out, *pull(jnp.ones_like(out))):
        assert not np.any(x[0])
        assert np.any(x[1])


def test_long_sequences_are_chunked_on_a_cpu_and_keep_their_dtype():
    q = jax.ShapeDtypeStruct((1, 4 * CHUNK, 2, 8), jnp.bfloat16)
    lowered = jax.jit(attention).lower(q, q, q)
    assert "while" in lowered.as_text() and "flash_attention" not in lowered.as_text()
    assert lowered.out_info.dtype == jnp.bfloat16


@pytest.mark.parametrize(("samples", "chunked"), [(48, False), (64, True)])
def test_short_sequences_of_many_samples_are_chunked_where_the_scores_would_not_fit(samples, chunked):
    q, k = (jax.ShapeDtypeStruct((samples, n, 40, 8), jnp.bfloat16) for n in (CHUNK, 4 * CHUNK))
    assert ("while" in jax.jit(attention).lower(q, k, k).as_text()) == chunked
    if chunked:
        with pytest.raises(UserError, match=r"would take 2\.5 GiB"):
            jax.eval_shape(functools.partial(attention, implementation="xla"), q, k, k)


def test_memory_of_the_square_of_a_long_sequence_is_refused():
    q = jax.ShapeDtypeStruct((1, 27280, 24, 128), jnp.bfloat16)
    with pytest.raises(UserError, match=r"scores of q \(1, 27280, 24, 128\) .* 66.5 GiB, expected at most 2"):
        jax.eval_shape(functools.partial(attention, implementation="xla"), q, q, q)
    with pytest.raises(UserError, match="expected one of"):
        jax.eval_shape(functools.partial(attention, implementation="splash"), q, q, q)
