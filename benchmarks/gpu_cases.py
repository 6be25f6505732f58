"""What ``benchmarks/kernels_gpu.py`` compares and times: programs, their inputs, and what they should return."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.kernels import cases, linear_attention_gpu, reference
from metacanvas_jax.kernels.attention import attention, chunked_attention
from metacanvas_jax.kernels.linear_attention import plain_linear_attention
from metacanvas_jax.kernels.masks import MaskSpec

TOLERANCE = 1e-2  # of bfloat16 results, relative to the norm
EXACT = 1e-5  # of float32 results
BF16 = jnp.bfloat16


@dataclasses.dataclass
class Row:
    """One line of the table; ``flops`` and ``size`` (bytes) are the least that the call must do."""

    part: str
    case: str
    implementation: str
    passes: str
    flops: float = 0.0
    size: float = 0.0
    ms: float | None = None
    spread: float | None = None
    error: float | None = None
    allowed: float = TOLERANCE
    counted: float | None = None  # bytes that XLA counts in the compiled program
    temporary: int | None = None  # bytes that the program allocates besides inputs and outputs
    failed: str = ""

    @property
    def passed(self) -> bool:
        return not self.failed and (self.error is None or self.error <= self.allowed)


@dataclasses.dataclass
class Job:
    """A program to compile, and how to draw its inputs and compute what it should return."""

    row: Row
    f: Callable
    draw: Callable[[jax.Array], tuple]  # key -> inputs
    expected: Callable | None = None  # of the same inputs, in high precision
    group: str = ""  # jobs of one group have the same inputs and expected values
    timed: bool = True


def highest(f: Callable) -> Callable:
    def run(*inputs):
        with jax.default_matmul_precision("highest"):
            return f(*inputs)

    return run


def passes_of(f: Callable, passes: str) -> Callable:
    """``f(q, k, v)`` as a function of q, k, v and dout: its output, and for "both" the gradients as well."""

    def run(q, k, v, dout):
        if passes == "forward":
            return f(q, k, v)
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(dout)

    return run


def normal(key: jax.Array, shapes: tuple[tuple[int, ...], ...], dtype: Any = BF16) -> tuple:
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True))


# Attention


def attention_mask(name: str, b: int, n: int, m: int) -> MaskSpec:
    keys = jnp.arange(m)[None] < jnp.linspace(m // 2, m - 1, b).astype(jnp.int32)[:, None]
    thirds = [jnp.tile(jnp.arange(length)[None] * 3 // length, (b, 1)) for length in (n, m)]
    return {
        "no mask": MaskSpec(),
        "padding": MaskSpec(keys=keys),
        "left padding": MaskSpec(keys=keys[:, ::-1]),
        "causal": MaskSpec(causal=True),
        "causal, padding": MaskSpec(causal=True, keys=keys),
        "segments": MaskSpec(query_segments=thirds[0], key_segments=thirds[1]),
    }[name]


def attention_inputs(key: jax.Array, mask: str, b: int, n: int, m: int, h: int, g: int, e: int) -> tuple:
    """Mask, q, k, v and the cotangent of the output; the mask is an input, so that the compiler cannot know it."""
    shapes = (b, n, h, e), (b, m, g, e), (b, m, g, e), (b, n, h, e)
    return attention_mask(mask, b, n, m), *normal(key, shapes)


def attend(implementation: str, passes: str) -> Callable:
    def run(mask, *inputs):
        return passes_of(functools.partial(attention, mask=mask, implementation=implementation), passes)(*inputs)

    return run


def attention_exact(mask, q, k, v, dout):
    """Float64 numpy, pair by pair."""
    inputs = [np.asarray(x, np.float64) for x in (q, k, v, dout)]
    scale = q.shape[-1] ** -0.5
    return reference.attention(*inputs[:3], mask, scale), *reference.attention_gradients(*inputs, mask, scale)


def attention_float32(mask, *inputs):
    f = functools.partial(chunked_attention, mask=mask)
    return passes_of(f, "both")(*(x.astype(jnp.float32) for x in inputs))


ATTENTION = {
    # name: samples, queries, keys, heads, key/value heads; mask; implementations
    "Wan, self": ((1, 27280, 27280, 24, 24), "no mask", ("cudnn", "chunked")),
    "Wan, text": ((1, 27280, 512, 24, 24), "no mask", ("cudnn", "chunked", "xla")),
    "Wan, padded text": ((1, 27280, 512, 24, 24), "padding", ("cudnn", "chunked", "xla")),
    "FLUX": ((1, 4608, 4608, 24, 24), "no mask", ("cudnn", "chunked", "xla")),
    "FLUX, padded": ((1, 4608, 4608, 24, 24), "padding", ("cudnn", "chunked", "xla")),
    "MLLM, causal": ((8, 1024, 1024, 16, 2), "causal", ("cudnn", "chunked", "xla")),
    "MLLM, causal, padded": ((8, 1024, 1024, 16, 2), "causal, padding", ("auto", "cudnn", "chunked", "xla")),
}
SMALL = {"b": 2, "n": 384, "m": 384, "h": 4, "g": 2, "e": 64}  # longer than what "auto" leaves to XLA


def attention_jobs(tiny: bool) -> list[Job]:
    jobs = []
    for mask in ("no mask", "padding", "left padding", "causal", "causal, padding", "segments"):
        draw = functools.partial(attention_inputs, mask=mask, **SMALL)
        for implementation in ("auto", "chunked", "xla") if tiny else ("auto", "cudnn", "chunked", "xla"):
            row = Row("attention", f"small, {mask}", implementation, "both")
            jobs.append(Job(row, attend(implementation, "both"), draw, attention_exact, f"small {mask}", timed=False))
    for case, ((b, n, m, h, g), mask, implementations) in ATTENTION.items():
        if tiny:
            m = max(m // 16, 64)
            n, h, g = (m if "causal" in mask else n // 16), h // 8, max(1, g // 8)
        draw = functools.partial(attention_inputs, mask=mask, b=b, n=n, m=m, h=h, g=g, e=128)
        flops = 4 * b * h * n * m * 128 * (0.5 if "causal" in mask else 1)
        size = 2 * b * 128 * (2 * n * h + 2 * m * g)
        auto = chosen(draw)
        for implementation in implementations:
            if tiny and implementation == "cudnn":
                continue
            label = (
                f"{implementation} (auto)"
                if "auto" not in implementations and implementation == auto
                else implementation
            )
            for passes in ("forward", "both"):
                row = Row("attention", f"{case} [{b} {n} {m} {h}/{g} 128]", label, passes)
                row.flops, row.size = (flops, size) if passes == "forward" else (3.5 * flops, 3.5 * size)
                exact = attention_float32 if passes == "both" else None
                jobs.append(Job(row, attend(implementation, passes), draw, exact, case))
    return jobs


def chosen(draw: Callable) -> str:
    """The implementation that "auto" is on this machine."""
    text = jax.jit(attend("auto", "forward")).lower(*jax.eval_shape(draw, jax.random.key(0))).as_text()
    return "cudnn" if "__cudnn$" in text else "chunked" if "while" in text else "xla"


# Linear attention


def pairs(q, k, v, dout):
    """ReLU linear attention and its gradients pair by pair, in float64."""
    raw_q, raw_k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    q, k = np.maximum(raw_q, 0.0), np.maximum(raw_k, 0.0)
    scores = np.einsum("bnhe,bmhe->bhnm", q, k)
    norm = scores.sum(-1, keepdims=True) + 1e-15
    weights = scores / norm
    dweights = np.einsum("bnhf,bmhf->bhnm", dout, v)
    dscores = (dweights - np.sum(dweights * weights, axis=-1, keepdims=True)) / norm
    dq = np.einsum("bhnm,bmhe->bnhe", dscores, k) * (raw_q > 0)
    dk = np.einsum("bhnm,bnhe->bmhe", dscores, q) * (raw_k > 0)
    return np.einsum("bhnm,bmhf->bnhf", weights, v), dq, dk, np.einsum("bhnm,bnhf->bmhf", weights, dout)


LINEAR = {
    # name: samples or frames, tokens, heads
    "SANA 1.6B, 1024 px": (16, 1024, 70),
    "connector, per frame": (31, 880, 96),
}
LINEAR_IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": plain_linear_attention,
    "gpu": linear_attention_gpu.linear_attention,
}


def linear_jobs(tiny: bool) -> list[Job]:
    jobs = []
    # A CPU has no product of 16-bit operands with a float32 sum.
    implementations = {"xla": plain_linear_attention} if tiny else LINEAR_IMPLEMENTATIONS
    for implementation, f in implementations.items():
        row = Row("linear", "small, float32", implementation, "both", allowed=EXACT)
        draw = functools.partial(normal, shapes=((2, 300, 5, 16),) * 4, dtype=jnp.float32)
        jobs.append(Job(row, highest(passes_of(f, "both")), draw, pairs, "small linear", timed=False))
    for case, (b, n, h) in LINEAR.items():
        b, h = (2, h // 8) if tiny else (b, h)
        draw = functools.partial(normal, shapes=((b, n, h * 32),) * 4)

        def exact(*inputs, h=h):
            inputs = (x.astype(jnp.float32) for x in inputs)
            return passes_of(on_channels(plain_linear_attention, h), "both")(*inputs)

        for implementation, f in implementations.items():
            for passes, arrays, products in (("forward", 4, 2), ("both", 11, 7)):
                row = Row("linear", f"{case} [{b} {n} {h} 32]", implementation, passes)
                row.flops, row.size = products * 2 * b * n * h * 32 * 32, arrays * 2 * b * n * h * 32
                expected = exact if passes == "both" else None
                jobs.append(Job(row, passes_of(on_channels(f, h), passes), draw, expected, case))
    return jobs


def on_channels(f: Callable, heads: int) -> Callable:
    """``f`` on arrays as projections write and read them, ``[b n (h e)]``."""

    def run(*inputs):
        return f(*(x.reshape(*x.shape[:2], heads, -1) for x in inputs)).reshape(inputs[0].shape)

    return run


# Norm, rotation and scale of q and k


def prologue_jobs(tiny: bool) -> list[Job]:
    jobs = []
    for passes, arrays in (("forward", 4), ("backward", 6)):
        tokens, heads = (256, 4) if tiny else (27280, 24)
        f, inputs = cases.prologue(None, kernel=False, backward=passes == "backward", tokens=tokens, heads=heads)
        row = Row("prologue", f"Wan [1 {tokens} {heads} 128]", "xla", passes)
        row.size = arrays * 2 * tokens * heads * 128

        def draw(key, inputs=inputs):
            keys = jax.random.split(key, len(inputs))
            return tuple(jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, inputs, strict=True))

        def exact(*x, f=f):
            return f(*(y.astype(jnp.float32) for y in x))

        jobs.append(Job(row, f, draw, exact, f"prologue {passes}"))
    return jobs


# Ceilings


def ceiling_jobs(tiny: bool) -> list[Job]:
    side, length = (512, 2**20) if tiny else (8192, 2**29)
    product = Row("ceiling", f"bf16 product of {side}^3", "xla", "forward", flops=2 * side**3)
    copy = Row("ceiling", f"copy of {2 * length / 2**30:.3g} GiB", "xla", "forward", size=4 * length)
    return [
        Job(product, lambda a, b: a @ b, functools.partial(normal, shapes=((side, side),) * 2)),
        Job(copy, lambda x: -x, functools.partial(normal, shapes=((length,),))),
    ]
