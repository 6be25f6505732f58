import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.kernels.linear_attention import relu_linear_attention


def by_pairs(q, k, v):
    """The definition, pair by pair, in float64."""
    q, k = np.maximum(q, 0.0), np.maximum(k, 0.0)
    weights = np.einsum("bnhe,bmhe->bhnm", q, k)
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-15)
    return np.einsum("bhnm,bmhf->bnhf", weights, v)


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (1, 5), (40, 3)])
def test_equals_the_sum_over_pairs(n, m):
    q, k, v = draw(2, n, 3, 8, seed=0), draw(2, m, 3, 8, seed=1), draw(2, m, 3, 6, seed=2)
    out = relu_linear_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(out, by_pairs(q, k, v), rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_the_sum_over_pairs():
    q, k, v, weights = (jnp.asarray(draw(2, 6, 2, 4, seed=i), jnp.float32) for i in range(4))

    def pairs(q, k, v):
        scores = jnp.einsum("bnhe,bmhe->bhnm", jax.nn.relu(q), jax.nn.relu(k))
        return jnp.einsum("bhnm,bmhf->bnhf", scores / (scores.sum(-1, keepdims=True) + 1e-15), v)

    ours, expected = (
        jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weights), argnums=(0, 1, 2)))(q, k, v)
        for f in (relu_linear_attention, pairs)
    )
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_query_that_meets_only_zeros_gets_zeros():
    q, k, v = jnp.ones((1, 2, 1, 4)), -jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4))
    assert not np.any(relu_linear_attention(q, k, v))
    assert not np.any(relu_linear_attention(-q, -k, v))


def test_bfloat16_inputs_are_summed_in_float32():
    q, k, v = (jnp.asarray(draw(1, 4096, 1, 8, seed=i), jnp.bfloat16) for i in range(3))
    out = relu_linear_attention(q, k, v + 1)
    assert out.dtype == jnp.bfloat16
    expected = by_pairs(*(np.asarray(x, np.float64) for x in (q, k, v + 1)))
    # One rounding of the result; sums kept in bfloat16 would stall and be several percent off.
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= 2**-8 * np.abs(expected).max()
