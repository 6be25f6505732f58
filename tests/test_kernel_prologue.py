"""The norm-and-rotate kernel against the same by plain functions, in interpret mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_support import draw, errors
from vae_support import FAST_COMPILE

from metacanvas_jax.kernels.prologue import LN2, prepare
from metacanvas_jax.kernels.prologue_tpu import Prologue, prologue

EPS = 1e-6


def tables(samples, n, seed):
    angles = np.random.default_rng(seed).uniform(-3, 3, (samples, n, 64)).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def plainly(q, k, q_gain, k_gain, cos, sin, per_head):
    """By the definition, in float64 numpy."""

    def one(x, gain, scale):
        x = np.asarray(x, np.float64).reshape(*x.shape[:2], -1, 128)
        axes = (3,) if per_head else (2, 3)
        x = x / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + EPS) * np.asarray(gain, np.float64).reshape(-1, 128)
        c, s = (np.asarray(y, np.float64)[:, :, None] for y in (cos, sin))
        a, b = x[..., :64], x[..., 64:]
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1) * scale

    return one(q, q_gain, 128**-0.5 / LN2), one(k, k_gain, 1.0)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("samples", [1, 2])
def test_values_and_gradients_are_those_of_the_plain_functions(per_head, samples):
    b, n, d = 2, 41, 256
    q, k, dq, dk = (draw(b, n, d, seed=i) for i in range(4))
    q_gain, k_gain = (draw(128 if per_head else d, seed=i) for i in (5, 6))
    cos, sin = tables(samples, n, 7)

    def kernel(q, k, q_gain, k_gain):
        times = d // q_gain.shape[0]
        problem = Prologue(per_head, EPS, 128**-0.5 / LN2, True)
        gains = (jnp.tile(q_gain, times)[None], jnp.tile(k_gain, times)[None])
        return prologue(problem, q, k, *gains, cos, sin)

    def plain(q, k, q_gain, k_gain):
        return tuple(x.reshape(b, n, d) for x in prepare(q, k, q_gain, k_gain, cos, sin, EPS))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(inputs, grads):
        results = []
        for form in (kernel, plain):
            out, pull = jax.vjp(form, *inputs)
            results.append((*out, *pull(grads)))
        return results

    ours, theirs = both((q, k, q_gain, k_gain), (dq, dk))
    exact = plainly(q, k, q_gain, k_gain, cos, sin, per_head)
    assert max(errors([x.reshape(y.shape) for x, y in zip(ours, exact, strict=False)], exact)) <= 2e-6
    assert max(errors(ours, [np.asarray(x, np.float64) for x in theirs])) <= 1e-5
