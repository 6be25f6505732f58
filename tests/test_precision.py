"""Products of float32 operands are made in float32 on a TPU: by what is lowered for it, and by what it compiles."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax import registry
from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.linear_attention import relu_linear_attention
from metacanvas_jax.kernels.static_schedule import compiling_for
from metacanvas_jax.nn.convolution import convolve_doubled
from metacanvas_jax.nn.mix_ffn import _kernel_gradient, _kernel_gradient_by_row, depthwise_conv
from metacanvas_jax.nn.precision import exact

pytest.importorskip("libtpu")

RECORDS = {f"{network.family}-{network.name}": network for network in registry.NETWORKS}
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.* : \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)")


def in_dtype(config, dtype):
    """A config and those inside it, computing in ``dtype``."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "dtype":
            changes["dtype"] = dtype
        elif dataclasses.is_dataclass(value):
            changes[field.name] = in_dtype(value, dtype)
    return dataclasses.replace(config, **changes)


def lowered(f, *arguments):
    """The program of ``f`` and of its gradients for a TPU, with JAX's own default precision."""

    def total(*arguments):
        leaves = [x for x in jax.tree.leaves(f(*arguments)) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves)

    # jax's own attention mixes dtypes in its gradient
    with compiling_for("v5e") as sharding, jax.default_matmul_precision(None), jax.numpy_dtype_promotion("standard"):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return jax.jit(jax.grad(total)).lower(*jax.tree.map(place, arguments)).as_text()


def products(text):
    """(dtypes of the operands, whether it is made at the highest precision) of all products of a program."""
    found = []
    for line in text.splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            match = PRODUCT.search(line)
            assert match, line
            found.append((match.groups(), line.count("HIGHEST") == 2))
    return found


@pytest.mark.parametrize("name", RECORDS)
def test_float32_products_of_every_network_and_its_gradient_are_exact(name):
    network = RECORDS[name]
    config = in_dtype(network.config(**network.tiny), "float32")
    module, arguments = network.module(config), network.arguments(config)
    params = registry.abstract_params(config)
    found = products(lowered(lambda params: module.apply({"params": params}, *arguments), params))
    assert found and set(found) == {(("f32", "f32"), True)}


@pytest.mark.parametrize("shape", [(1, 16), (1, 2048)], ids=["all at once", "long"])
@pytest.mark.parametrize("implementation", ["xla", "chunked", "auto"])
def test_attention_in_float32_is_exact(shape, implementation):
    x = jax.ShapeDtypeStruct((*shape, 2, 128), jnp.float32)
    mask = MaskSpec(causal=True)
    f = lambda q, k, v: attention(q, k, v, mask=mask, implementation=implementation)  # noqa: E731
    text = lowered(f, x, x, x)
    found = products(text)
    assert found or "tpu_custom_call" in text
    assert all(highest for _, highest in found)


def test_linear_attention_in_float32_is_exact():
    x = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.float32)
    found = products(lowered(lambda q, k, v: relu_linear_attention(q, k, v, implementation="xla"), x, x, x))
    assert found and all(highest for _, highest in found)


def of_eight(x):
    return jnp.repeat(x, 8, axis=0)


def test_a_tpu_compiles_the_noise_levels_of_a_bfloat16_network_in_float32():
    network = RECORDS["dit-wan"]
    config = in_dtype(network.config(**network.tiny), "bfloat16")
    module = network.module(config)
    with compiling_for("v5e") as sharding, jax.default_matmul_precision(None):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        latents, _, states, given = network.arguments(config)
        # Several noise levels: the compiler makes a product of one row by other means.
        arguments = jnp.zeros((8, 4, *latents.shape[2:])), jnp.ones((8, 4)), jax.tree.map(of_eight, states), given
        params, arguments = jax.tree.map(place, (registry.abstract_params(config), arguments))
        text = jax.jit(lambda p, a: module.apply({"params": p}, *a)).lower(params, arguments).compile().as_text()
    convolutions = [line for line in text.splitlines() if re.search(r" (convolution|dot)\(", line)]
    exact_ones = [line for line in convolutions if "operand_precision={highest,highest}" in line]
    assert len(exact_ones) >= 3, "two layers of the noise level's embedding, and its chunks"
    assert len(exact_ones) < len(convolutions)


def test_operands_of_two_kinds_have_no_precision_of_their_own():
    wide, narrow = jnp.ones((1,), jnp.float32), jnp.ones((1,), jnp.bfloat16)
    assert exact(wide, wide) is jax.lax.Precision.HIGHEST
    assert exact(wide, narrow) is None and exact(narrow) is None


def rounding(found, expected):
    """The difference, relative to that of rounding the right values once."""
    best = np.abs(expected.astype(jnp.bfloat16).astype(np.float32) - expected).mean()
    return np.abs(np.asarray(found, np.float32) - expected).mean() / best


def test_sums_of_bfloat16_products_are_rounded_once():
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((2, 12, 12, 64)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 64)), jnp.bfloat16)
    wide = [np.asarray(z, np.float32) for z in (x, dy, kernel)]
    for f, *parts in ((depthwise_conv, 0, 2), (lambda x, k: jax.vjp(depthwise_conv, x, k)[1](x)[0], 0, 2)):
        expected = np.asarray(f(*(jnp.asarray(wide[i]) for i in parts)))
        assert rounding(f(*((x, dy, kernel)[i] for i in parts)), expected) < 1.01
    expected = np.asarray(_kernel_gradient(*map(jnp.asarray, wide[:2]), (3, 3)))
    for f in (_kernel_gradient, _kernel_gradient_by_row):
        np.testing.assert_allclose(f(x, dy, (3, 3)), expected, rtol=1e-4, atol=1e-4)


def test_entries_of_a_bfloat16_kernel_are_added_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 6, 6, 8)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 8, 8)), jnp.bfloat16)
    expected = convolve_doubled(x, kernel.astype(jnp.float32))
    np.testing.assert_array_equal(convolve_doubled(x, kernel), expected)
