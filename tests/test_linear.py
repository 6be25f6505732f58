"""The linear layer's derivative: that of the product, and what it keeps until then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import SymbolicZero

from metacanvas_jax.nn import layers

KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (3, 4, 8))
KERNEL = jax.random.normal(KEYS[1], (8, 5))
BIAS = jax.random.normal(KEYS[2], (5,))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("gradients", ["_gradients", "_flat_gradients"])
def test_gradients_are_those_of_the_product(which, gradients, monkeypatch):
    monkeypatch.setattr(layers, "_flat_gradients", getattr(layers, gradients))
    ours = jax.grad(lambda x, w, b: jnp.sum(jnp.sin(layers.linear(x, w, b))), which)(X, KERNEL, BIAS)
    plain = jax.grad(lambda x, w, b: jnp.sum(jnp.sin(jnp.einsum("...i,io->...o", x, w) + b[None, None])), which)
    for found, wanted in zip(ours, plain(X, KERNEL, BIAS), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", ["_gradients", "_flat_gradients"])
@pytest.mark.parametrize(("axes", "formula"), [(1, "bni,iro->bnro"), (2, "bnio,ior->bnr"), (2, "bnir,irop->bnop")])
def test_a_product_over_folded_axes_has_the_gradients_of_einsum(axes, formula, gradients, monkeypatch):
    monkeypatch.setattr(layers, "_flat_gradients", getattr(layers, gradients))
    sizes = {"b": 2, "n": 3, "i": 4, "r": 5, "o": 6, "p": 7}
    first, second = formula.partition("->")[0].split(",")
    x, w = (
        jax.random.normal(key, [sizes[c] for c in name]) for key, name in zip(KEYS[:2], (first, second), strict=True)
    )
    ours = jax.grad(lambda x, w: jnp.sum(jnp.sin(layers.contract(x, w, axes))), (0, 1))(x, w)
    plain = jax.grad(lambda x, w: jnp.sum(jnp.sin(jnp.einsum(formula, x, w))), (0, 1))(x, w)
    for found, wanted in zip(ours, plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sums", ["_sums", "_column_sums"])
def test_values_along_the_last_axis_gather_the_gradient_of_every_position(sums, monkeypatch):
    monkeypatch.setattr(layers, "_column_sums", getattr(layers, sums))
    out, pull = jax.vjp(lambda bias: X[..., :5] * layers.along_last(bias, X[..., :5]), BIAS)
    np.testing.assert_array_equal(out, X[..., :5] * BIAS[None, None])
    np.testing.assert_allclose(pull(jnp.ones_like(out))[0], jnp.sum(X[..., :5], axis=(0, 1)), rtol=1e-5)


def test_what_has_no_gradient_has_nothing_to_do():
    def gradient(stop):
        return jax.grad(lambda w: jnp.sum(jnp.sin(stop(layers.linear(X, w)))) + jnp.sum(w * w))

    stopped, whole = gradient(jax.lax.stop_gradient), gradient(lambda x: x)
    np.testing.assert_array_equal(stopped(KERNEL), 2 * KERNEL)
    assert jnp.abs(whole(KERNEL) - 2 * KERNEL).max() > 0.1
    products = [str(jax.make_jaxpr(f)(KERNEL)).count("dot_general[") for f in (stopped, whole)]
    assert products[0] == 1 < products[1], "the forward product alone"
    zero = SymbolicZero(jax.core.ShapedArray((3, 4, 5), jnp.float32))
    assert layers._contract_backward(1, (X, KERNEL), zero) == (None, None)


@pytest.mark.parametrize(
    ("of", "kept"),
    [
        (lambda: jax.vjp(lambda x: layers.linear(x, KERNEL), X), [KERNEL.shape]),
        (lambda: jax.vjp(lambda w: layers.linear(X, w), KERNEL), [X.shape]),
        (lambda: jax.vjp(layers.linear, X, KERNEL), [X.shape, KERNEL.shape]),
    ],
    ids=["frozen kernel", "no gradient beyond", "both"],
)
def test_only_what_the_gradient_needs_is_kept(of, kept):
    _, pull = of()
    assert sorted(leaf.shape for leaf in jax.tree.leaves(pull)) == sorted(kept)


def test_a_stack_of_frozen_layers_keeps_no_copy_of_its_kernels():
    kernels = jax.random.normal(KEYS[1], (6, 8, 8))

    def run(x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(layers.linear(x, w)), None), x, kernels)[0]

    made = [out.aval.shape for eqn in jax.make_jaxpr(lambda x: jax.vjp(run, x)[0])(X).eqns for out in eqn.outvars]
    assert kernels.shape not in made
