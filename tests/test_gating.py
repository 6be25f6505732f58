"""Gated SiLU: the gradients of automatic differentiation, from the inputs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.nn.gating import silu, silu_gated

PAIRS = {
    "gated": (silu_gated, lambda gate, value: jax.nn.silu(gate) * value),
    "alone": (lambda gate, value: silu(gate) * value, lambda gate, value: jax.nn.silu(gate) * value),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_automatic_differentiation(name, dtype):
    gate, value, dy = (3 * jax.random.normal(key, (64, 48)) for key in jax.random.split(jax.random.key(0), 3))
    gate, value = gate.astype(dtype), value.astype(dtype)
    ours, theirs = PAIRS[name]
    np.testing.assert_array_equal(ours(gate, value), theirs(gate, value))

    def gradients(f, *inputs):
        return jax.jit(jax.grad(lambda g, v: jnp.vdot(f(g, v).astype(jnp.float32), dy), (0, 1)))(*inputs)

    exact = gradients(theirs, gate.astype(jnp.float32), value.astype(jnp.float32))
    for found, wanted in zip(gradients(ours, gate, value), exact, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, **TOLERANCE[dtype])


TOLERANCE = {"float32": {"rtol": 1e-6, "atol": 1e-6}, "bfloat16": {"rtol": 1e-2, "atol": 2e-2}}


def test_only_the_inputs_are_kept():
    gate, value = jnp.ones((8, 16)), jnp.zeros((8, 16))
    for kept in (jax.vjp(silu_gated, gate, value)[1], jax.vjp(silu, gate)[1]):
        leaves = jax.tree.leaves(kept)
        assert leaves and all(any(leaf is x for x in (gate, value)) for leaf in leaves)
