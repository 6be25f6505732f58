"""Kernel calls for the search and the benchmark to compile: each is a function to jit and its abstract inputs."""

import functools
import importlib
import importlib.util
import math
import sys
import types
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


def splash(
    sharding: Any,
    *,
    tokens: int,
    heads: int = 2,
    backward: bool = False,
    tiles: list[int],
    layouts: str = "hhh",
    segments: bool = False,
) -> Case:
    """JAX's splash attention, on a length that is a multiple of its blocks (q, kv, kv in a step).

    ``layouts`` says for q, k and v whether the kernel takes the channels (h) or the tokens (s) as the minor axis.
    ``segments`` masks padding by segment numbers in every block; without it the length is taken as it is.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    blocks = kernel.BlockSizes(**_blocks(tiles), **_layouts(kernel, layouts), use_fused_bwd_kernel=True)
    tokens = _whole_blocks(tokens, tiles)
    mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads)
    run = kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)
    return _library(sharding, run, kernel.SegmentIds if segments else None, tokens, heads, backward)


def tokamax(
    sharding: Any,
    *,
    tokens: int,
    heads: int = 2,
    backward: bool = False,
    tiles: list[int],
    layouts: str = "hhh",
    segments: bool = False,
    maximum: str = "constant",
    prescaled: bool = True,
    scheduler: bool = False,
) -> Case:
    """Tokamax's splash attention (0.0.17, a private module), on a length that is a multiple of its blocks.

    ``maximum`` of the logits is "online", a "constant" (0, so that nothing is left to subtract, which is sound under
    the same bound as ours) or an array with one value per "head". ``prescaled`` queries come multiplied by log2(e), as
    ours do. ``scheduler`` asks for the compiler's other scheduler, in the forward kernel. The rest is as in `splash`.

    Raises ValueError for another ``maximum``.
    """
    if maximum not in ("online", "constant", "head"):
        raise ValueError(f"maximum={maximum!r}: expected online, constant or head")
    kernel, masks = _tokamax_modules()
    config = kernel.SplashConfig(
        **_blocks(tiles),
        **_layouts(kernel, layouts),
        max_logit_const=0.0 if maximum == "constant" else None,
        q_prescaled_log2e=prescaled,
        use_experimental_scheduler=scheduler,
        dq_reduction_steps=3,
    )
    tokens = _whole_blocks(tokens, tiles)
    run = kernel.make_splash_mha(masks.FullMask((tokens, tokens)), config=config, q_seq_shards=1)
    if maximum == "head":
        run = functools.partial(run, max_logit_value=jnp.zeros((heads,), jnp.float32))
    return _library(sharding, run, kernel.SegmentIds if segments else None, tokens, heads, backward)


def _tokamax_modules() -> tuple[Any, Any]:
    """Tokamax's kernel and its masks, without the rest of the package.

    The package needs Python 3.12 and JAX 0.11. These two files do not; of the package's ``base`` they use three names
    in annotations and the value of a masked logit.
    """
    name = "tokamax._src.ops.experimental.tpu.splash_attention"
    if "tokamax" not in sys.modules:
        found = importlib.util.find_spec("tokamax")
        if found is None:
            raise ModuleNotFoundError("tokamax is not installed (see benchmarks/kernels_static.py)")
        package, base = types.ModuleType("tokamax"), types.ModuleType(f"{name}.base")
        package.__path__ = list(found.submodule_search_locations or ())
        base.__dict__.update(SegmentIds=Any, SplashCustomReturnType=Any, SplashResidualsType=Any)
        base.__dict__.update(DEFAULT_MASK_VALUE=-0.7 * float(jnp.finfo(jnp.float32).max))
        sys.modules |= {"tokamax": package, f"{name}.base": base}
    return tuple(importlib.import_module(f"{name}.splash_attention_{part}") for part in ("kernel", "mask"))


def _blocks(tiles: list[int]) -> dict[str, int]:
    q, kv, inner = tiles
    blocks = {"block_q": q, "block_kv": kv, "block_kv_compute": inner}
    return blocks | {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": inner}


def _layouts(kernel: Any, letters: str) -> dict[str, Any]:
    by_letter = {"h": kernel.QKVLayout.HEAD_DIM_MINOR, "s": kernel.QKVLayout.SEQ_MINOR}
    return {f"{x}_layout": by_letter[letter] for x, letter in zip("qkv", letters, strict=True)}


def _whole_blocks(tokens: int, tiles: list[int]) -> int:
    step = math.lcm(*tiles)
    return -(-tokens // step) * step


def _library(sharding: Any, run: Any, segments: Any, tokens: int, heads: int, backward: bool) -> Case:
    x = jax.ShapeDtypeStruct((heads, tokens, 128), jnp.bfloat16, sharding=sharding)
    ids = jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=sharding)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return run(q, k, v, segment_ids=segments and segments(ids, ids))

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
