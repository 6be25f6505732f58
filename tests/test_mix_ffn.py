import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.nn.mix_ffn import _kernel_gradient, _kernel_gradient_by_row, depthwise_conv


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def grouped_convolution(x, kernel, bias):
    return bias[None, None, None] + jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize("size", [(3, 3), (5, 1)], ids=["3x3", "5x1"])
def test_depthwise_conv_and_its_gradients_equal_a_grouped_convolution(size):
    inputs = draw(2, 4, 6, 3, seed=0), draw(*size, 3, seed=1), draw(3, seed=2)
    weights = draw(2, 4, 6, 3, seed=3)
    ours, expected = (
        jax.jit(jax.value_and_grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x)) * weights), argnums=(0, 1, 2)))(*inputs)
        for f in (depthwise_conv, grouped_convolution)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_kernel_gradient_is_the_same_at_once_and_row_by_row():
    x, dy = draw(5, 4, 6, 3, seed=0), draw(5, 4, 6, 3, seed=1)
    at_once, by_row = _kernel_gradient(x, dy, (3, 3)), _kernel_gradient_by_row(x, dy, (3, 3))
    np.testing.assert_allclose(by_row, at_once, rtol=1e-5, atol=1e-5)


def test_bfloat16_kernel_gradient_is_summed_in_float32():
    x = jnp.ones((64, 8, 8, 1), jnp.bfloat16)
    gradient = jax.grad(lambda k: jnp.sum(depthwise_conv(x, k), dtype=jnp.float32))(jnp.zeros((1, 1, 1), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    assert gradient[0, 0, 0] == 64 * 8 * 8  # a bfloat16 sum of ones stalls at 256
