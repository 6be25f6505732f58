"""Inputs, masks and comparisons for the tests of the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from vae_support import FAST_COMPILE

from metacanvas_jax.kernels import reference
from metacanvas_jax.kernels.flash_fixed_max import flash_attention
from metacanvas_jax.kernels.masks import MaskSpec
from metacanvas_jax.kernels.tiles import Tiles

SMALL = Tiles(block_q=128, block_k=128, tile_q=128, tile_k=128, depth=0)


def draw(*shape, seed, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale), dtype)


def inputs(b, n, m, h, g, e, *, seed=0, size=1.0, dtype=jnp.float32):
    """q, k, v and the cotangent of the output; ``size`` scales q."""
    return (
        draw(b, n, h, e, seed=seed, scale=size, dtype=dtype),
        draw(b, m, g, e, seed=seed + 1, dtype=dtype),
        draw(b, m, g, e, seed=seed + 2, dtype=dtype),
        draw(b, n, h, e, seed=seed + 3, dtype=dtype),
    )


def masks(b, n, m):
    """One mask of every structure there is."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, m + 1, (b, 1))
    keys = jnp.asarray(np.arange(m)[None] < lengths)
    cuts = np.sort(rng.integers(0, 3, (b, n)), axis=1), np.sort(rng.integers(0, 3, (b, m)), axis=1)
    segments = {"query_segments": jnp.asarray(cuts[0]), "key_segments": jnp.asarray(cuts[1])}
    return {
        "none": MaskSpec(),
        "causal": MaskSpec(causal=True, offset=max(0, m - n)),
        "keys": MaskSpec(keys=keys),
        "left_padding": MaskSpec(keys=keys[:, ::-1]),
        "segments": MaskSpec(**segments),
        "all": MaskSpec(causal=True, offset=m // 2, keys=keys, **segments),
    }


def flash_and_gradients(q, k, v, dout, mask, scale=None, **options):
    """Output, then the gradients of q, k and v, by the kernels in interpret mode."""
    options = {"interpret": True, "forward": SMALL, "backward": SMALL} | options

    def flash(q, k, v):
        return flash_attention(q, k, v, mask=mask, scale=scale, **options)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(q, k, v, dout):
        out, pull = jax.vjp(flash, q, k, v)
        return out, *pull(dout)

    return both(q, k, v, dout)


def exact_and_gradients(q, k, v, dout, mask, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    out = reference.attention(q, k, v, mask, scale)
    return out, *reference.attention_gradients(q, k, v, dout, mask, scale)


def errors(actual, expected):
    """Largest error of each array, relative to the largest entry of what is expected."""
    return [
        float(np.max(np.abs(np.asarray(a, np.float64) - b)) / max(np.max(np.abs(b)), 1e-30))
        for a, b in zip(actual, expected, strict=True)
    ]


def assert_exact(q, k, v, dout, mask, scale=None, **options):
    """2e-6 forward and 1e-5 backward, relative; logits beyond 16 round in float32 by as much more.

    Gradients of q and k are sums of differences that may cancel (a query that sees one key has none at all): they are
    allowed two units in the last place of the terms as well.
    """
    actual = flash_and_gradients(q, k, v, dout, mask, scale, **options)
    expected = exact_and_gradients(q, k, v, dout, mask, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    slack = max(1.0, reference.largest_logit(q, k, scale) / 16)
    terms = reference.largest_logit(dout, v, scale) * 2**-22
    cancelled = (0.0, terms * np.max(np.abs(k)), terms * np.max(np.abs(q)), 0.0)
    for name, a, b, relative, absolute in zip(
        ("out", "dq", "dk", "dv"), actual, expected, (2e-6, 1e-5, 1e-5, 1e-5), cancelled, strict=True
    ):
        error, allowed = np.max(np.abs(np.asarray(a, np.float64) - b)), relative * np.max(np.abs(b)) + absolute
        assert error <= slack * allowed, (name, error, allowed)
