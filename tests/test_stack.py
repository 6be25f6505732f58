"""What each remat policy keeps between the forward and the backward pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from metacanvas_jax.nn.layers import Dense
from metacanvas_jax.nn.stack import REMAT_CHOICES, entering, hidden_units, stack

WIDTH, LAYERS = 8, 3


class Block(nn.Module):
    """Something that is named like the result of a kernel, between two products."""

    @nn.compact
    def __call__(self, x):
        x = entering(x)
        y = jnp.tanh(Dense(WIDTH, ("embed", "heads"), "float32", name="one")(x))
        y = checkpoint_name(jnp.sin(y), "attention_out")
        return x + jnp.tanh(hidden_units(Dense(WIDTH, ("heads", "embed"), "float32", name="two")(y))), None


def gradient(remat, unroll=1):
    net = stack(Block, LAYERS, remat=remat, inputs=0, unroll=unroll)()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32))
    params = net.init(jax.random.key(0), x)

    def loss(params):
        return jnp.sum(net.apply(nn.meta.unbox(params), x)[0] ** 2)

    return loss, params


@pytest.fixture(scope="module")
def expected():
    loss, params = gradient("none")
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", [choice for choice in REMAT_CHOICES if choice != "none"])
def test_every_policy_has_the_same_gradients(expected, remat):
    loss, params = gradient(remat)
    for a, b in zip(jax.tree.leaves(jax.jit(jax.grad(loss))(params)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unroll", [2, LAYERS])
def test_unrolled_layers_are_the_same_layers(expected, unroll):
    loss, params = gradient("none", unroll)
    for a, b in zip(jax.tree.leaves(jax.jit(jax.grad(loss))(params)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def kept(remat):
    """(shape, place) of everything the forward scan stacks for the backward one, apart from parameters."""
    loss, params = gradient(remat)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    forward = next(eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "scan")
    return sorted(str(var.aval) for var in forward.outvars if var.aval.shape[:1] == (LAYERS,))


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and eqn.primitive.name != "scan":
                yield from equations(inner)


def test_policies_keep_what_they_say():
    one = f"float32[{LAYERS},2,{WIDTH}]"
    host = f"float32<host>[{LAYERS},2,{WIDTH}]"
    assert kept("full") == [one]
    assert kept("attention") == [one, one]
    assert kept("hidden") == [one, one, one]
    assert len(kept("dots")) == 4  # its input, two products, and what stands for attention
    assert kept("offload") == [host]
    assert kept("offload_attention") == sorted([one, host])
    assert len(kept("none")) > 3
