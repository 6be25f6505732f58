"""Kernel calls for the search and the benchmark to compile: each is a function to jit and its abstract inputs."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metacanvas_jax.kernels.flash_fixed_max import flash_attention
from metacanvas_jax.kernels.tiles import Tiles

Case = tuple[Callable, tuple]


def flash(
    sharding: Any,
    *,
    tokens: int,
    heads: int = 2,
    width: int = 128,
    backward: bool = False,
    tiles: dict[str, int] | None = None,
    scale: float | None = None,
) -> Case:
    """Self-attention of bfloat16 inputs, or its gradient. ``tiles`` are those of the chosen pass.

    Inputs are ``[1 n (h e)]``, as a projection writes them.
    """
    options = {} if tiles is None else {"backward" if backward else "forward": Tiles(**tiles)}

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (y.reshape(1, tokens, heads, width) for y in (q, k, v))
        return flash_attention(q, k, v, scale=scale, **options).reshape(x.shape)

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple:
        return jax.vjp(run, q, k, v)[1](dout)

    x = jax.ShapeDtypeStruct((1, tokens, heads * width), jnp.bfloat16, sharding=sharding)
    return (gradient, (x, x, x, x)) if backward else (run, (x, x, x))


def splash(sharding: Any, *, tokens: int, heads: int = 2, backward: bool = False, tiles: list[int]) -> Case:
    """JAX's splash attention, on a length that is a multiple of its blocks (q, kv, kv in a step)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, kv, inner = tiles
    blocks = kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=inner,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=inner,
        use_fused_bwd_kernel=True,
    )
    tokens = -(-tokens // max(q, kv)) * max(q, kv)
    mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads)
    run = kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)
    return _library(sharding, run, kernel.SegmentIds, tokens, heads, backward)


def tokamax(sharding: Any, *, tokens: int, heads: int = 2, backward: bool = False, tiles: list[int]) -> Case:
    """Tokamax's splash attention (a private module; ``pip install --no-deps tokamax==0.0.12``)."""
    package = "tokamax._src.ops.experimental.tpu.splash_attention"
    kernel = importlib.import_module(f"{package}.splash_attention_kernel")
    masks = importlib.import_module(f"{package}.splash_attention_mask")

    q, kv, inner = tiles
    config = kernel.SplashConfig(
        block_q=q,
        block_kv=kv,
        block_kv_compute=inner,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=inner,
        dq_reduction_steps=3,
    )
    tokens = -(-tokens // max(q, kv)) * max(q, kv)
    run = kernel.make_splash_mha(masks.FullMask((tokens, tokens)), config=config, q_seq_shards=1)
    return _library(sharding, run, kernel.SegmentIds, tokens, heads, backward)


def _library(sharding: Any, run: Any, segments: Any, tokens: int, heads: int, backward: bool) -> Case:
    x = jax.ShapeDtypeStruct((heads, tokens, 128), jnp.bfloat16, sharding=sharding)
    ids = jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=sharding)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return run(q, k, v, segment_ids=segments(ids, ids))  # padding to a multiple of the blocks is a segment

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, dout: jax.Array) -> tuple:
        return jax.vjp(lambda *x: forward(*x, ids), q, k, v)[1](dout)

    return (gradient, (x, x, x, ids, x)) if backward else (forward, (x, x, x, ids))


def linear(
    sharding: Any, *, kernel: bool, backward: bool, frames: int = 31, tokens: int = 880, heads: int = 96
) -> tuple:
    """Linear attention of the canvas connector's block over all frames of a video, by the kernels or by XLA."""
    from metacanvas_jax.kernels.linear_attention import plain_linear_attention
    from metacanvas_jax.kernels.linear_attention_tpu import linear_attention

    f = linear_attention if kernel else plain_linear_attention
    x = jax.ShapeDtypeStruct((frames, tokens, heads * 32), jnp.bfloat16, sharding=sharding)

    def run(*inputs: jax.Array) -> jax.Array:
        return f(*(y.reshape(frames, tokens, heads, 32) for y in inputs)).reshape(x.shape)

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple:
        return jax.vjp(run, q, k, v)[1](dout)

    return (gradient, (x,) * 4) if backward else (run, (x,) * 3)


def prologue(sharding: Any, *, kernel: bool, backward: bool, tokens: int = 27280, heads: int = 24) -> Case:
    """Norm across heads, rotation and scale of q and k, by the kernel or by XLA."""
    from metacanvas_jax.kernels.prologue import prepare

    x = jax.ShapeDtypeStruct((1, tokens, heads * 128), jnp.bfloat16, sharding=sharding)
    gain = jax.ShapeDtypeStruct((heads * 128,), jnp.float32, sharding=sharding)
    angles = jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32, sharding=sharding)

    def run(q, k, q_gain, k_gain, cos, sin):
        prepared = prepare(q, k, q_gain, k_gain, cos, sin, 1e-6, kernel=kernel)
        return tuple(y.reshape(x.shape) for y in prepared)

    def gradient(q, k, q_gain, k_gain, cos, sin, dq, dk):
        return jax.vjp(lambda *y: run(*y, cos, sin), q, k, q_gain, k_gain)[1]((dq, dk))

    inputs = (x, x, gain, gain, angles, angles)
    return (gradient, (*inputs, x, x)) if backward else (run, inputs)
