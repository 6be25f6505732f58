"""The flash attention kernels against float64, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import SMALL, assert_exact, errors, exact_and_gradients, flash_and_gradients, inputs, masks

from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.flash_fixed_max import fixed_max_holds
from metacanvas_jax.kernels.tiles import Tiles

DEEP = Tiles(block_q=512, block_k=256, tile_q=128, tile_k=128, depth=3)


FIXED = [("none", True), ("causal", True), ("all", True), ("none", False), ("left_padding", False), ("all", False)]
MORE = [("keys", True), ("left_padding", True), ("segments", True)]
MORE += [("causal", False), ("keys", False), ("segments", False)]


@pytest.mark.parametrize(("name", "fixed"), [*FIXED, *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE)])
def test_values_and_gradients_are_those_of_float64(name, fixed):
    b, n, m, h, g, e = 2, 200, 391, 2, 1, 32
    bounded = jnp.full((b, h), int(fixed), jnp.int32)
    assert_exact(*inputs(b, n, m, h, g, e), masks(b, n, m)[name], bounded=bounded)


def test_gradients_of_queries_may_be_summed_in_chunks():
    assert_exact(*inputs(1, 600, 300, 2, 2, 128), MaskSpec(), chunk=256)


def test_deeper_pipelines_and_unequal_blocks_change_nothing():
    assert_exact(*inputs(1, 700, 520, 1, 1, 64), MaskSpec(causal=True), forward=DEEP, backward=DEEP)


SHAPES = {
    "n": st.integers(1, 400),
    "m": st.integers(1, 400),
    "groups": st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    "e": st.sampled_from([8, 72, 128]),
    "size": st.sampled_from([1e-4, 1.0, 30.0, 300.0]),
    "mask": st.sampled_from(["none", "causal", "keys", "segments", "all"]),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(**SHAPES)
def test_any_shape_mask_and_size_of_logits(n, m, groups, e, size, mask, seed):
    assert_exact(*inputs(1, n, m, *groups, e, seed=seed, size=size), masks(1, n, m)[mask])


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(**SHAPES)
def test_any_of_many_shapes_masks_and_sizes_of_logits(n, m, groups, e, size, mask, seed):
    assert_exact(*inputs(1, n, m, *groups, e, seed=seed, size=size), masks(1, n, m)[mask])


def test_the_bound_decides_head_by_head():
    q, k = (x.reshape(1, 40, 256) for x in inputs(1, 40, 40, 2, 2, 128)[:2])
    q = q.at[:, :, 128:].multiply(100.0)
    # One outlier among the keys is enough.
    for keys, expected in ((k, [[1, 0]]), (k * jnp.nan, [[0, 0]]), (k.at[0, 3].multiply(100.0), [[0, 0]])):
        assert fixed_max_holds(q, keys, (2, 2), 128**-0.5, True).tolist() == expected


def test_logits_beyond_the_bound_would_fail_without_the_running_maximum():
    q, k, v, dout = inputs(1, 140, 140, 1, 1, 64, size=60.0)
    assert_exact(q, k, v, dout, MaskSpec())
    forced = flash_and_gradients(q, k, v, dout, MaskSpec(), bounded=jnp.ones((1, 1), jnp.int32))
    assert not all(np.all(np.isfinite(x)) for x in forced)


def test_a_query_that_sees_no_key_gets_zeros_and_gives_no_gradient():
    q, k, v, dout = inputs(1, 150, 150, 1, 1, 32)
    mask = MaskSpec(keys=jnp.zeros((1, 150), bool))
    for fixed in (0, 1):
        for x in flash_and_gradients(q, k, v, dout, mask, bounded=jnp.full((1, 1), fixed, jnp.int32)):
            assert not np.any(x)


def test_bfloat16_is_no_worse_than_xla():
    q, k, v, dout = inputs(1, 384, 300, 2, 2, 128, dtype=jnp.bfloat16)
    exact = exact_and_gradients(q, k, v, dout, MaskSpec())
    out, pull = jax.vjp(lambda *x: attention(*x), q, k, v)
    rounded = [np.asarray(x, np.float64) for x in (out, *pull(dout))]
    found = flash_and_gradients(q, k, v, dout, MaskSpec())
    kernel = [np.asarray(x, np.float64) for x in found]
    for ours, theirs, truth in zip(kernel, rounded, exact, strict=True):
        assert np.sqrt(np.mean((ours - truth) ** 2)) <= 1.2 * np.sqrt(np.mean((theirs - truth) ** 2))
    assert errors(kernel, exact)[0] < 2e-2 and found[0].dtype == jnp.bfloat16


def test_blocks_shrink_to_short_sequences():
    tiles = Tiles(1024, 2048, 256, 512, 2)
    assert tiles.fit(100, 700) == Tiles(128, 1024, 128, 512, 2)
    assert tiles.fit(100_000, 100_000) == tiles
    assert SMALL.fit(1, 1) == SMALL
