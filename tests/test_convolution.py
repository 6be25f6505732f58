import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.nn.convolution import convolve, convolve_doubled


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def values_and_gradients(f, x, kernel):
    out, pull = jax.vjp(f, x, kernel)
    return out, *pull(draw(*out.shape, seed=2))


def library(x, kernel, strides, padding):
    spatial = "DHW"[-len(strides) :]
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    )


@pytest.mark.parametrize("frames", [2, 3, 6])
@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [
        ((3, 3, 3), (1, 1, 1), ((0, 0), (1, 1), (1, 1))),
        ((3, 1, 1), (2, 1, 1), ((0, 0), (0, 0), (0, 0))),
        ((3, 3, 3), (1, 2, 2), ((1, 1), (0, 1), (0, 1))),
    ],
)
def test_a_convolution_over_time_is_that_of_the_library(size, strides, padding, frames):
    x, kernel = draw(2, frames, 4, 6, 5, seed=0), draw(*size, 5, 7, seed=1)
    expected, actual = (
        values_and_gradients(functools.partial(f, strides=strides, padding=padding), x, kernel)
        for f in (library, convolve)
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_a_convolution_over_time_becomes_ones_over_space_on_a_cpu_alone():
    x, kernel = draw(1, 4, 4, 4, 5, seed=0), draw(3, 3, 3, 5, 7, seed=1)
    f = jax.jit(functools.partial(convolve, strides=(1, 1, 1), padding=((0, 0), (1, 1), (1, 1))))
    texts = [f.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")]
    assert ["[0, 1, 2, i, o]" in text for text in texts] == [False, True]
    assert ["[0, 1, i, o]" in text for text in texts] == [True, False]


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 4)])
def test_a_doubled_convolution_is_that_of_the_repeated_image(shape):
    def repeated(x, kernel):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return library(x, kernel, (1, 1), ((1, 1), (1, 1)))

    x, kernel = draw(*shape, seed=0), draw(3, 3, 4, 6, seed=1)
    expected, actual = (values_and_gradients(f, x, kernel) for f in (repeated, convolve_doubled))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
