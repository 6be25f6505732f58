"""The estimated cost of a compiled step on one GPU: a roofline, with the shares of the peaks that one H200 reached.

- *products* (Triton's fusions, cuBLAS, cuDNN's convolutions) and everything else: the longer of two times. One is that
  of the FLOPs at ``PRODUCT_SHARE`` of peak FLOP/s. The other is that of the bytes at ``COPY_SHARE`` of the bandwidth.
- *attention*: without a GPU the compiler cannot ask cuDNN, so the program has the attention of ``chunked_attention``,
  which does the same products. Its products are timed at cuDNN's share of peak FLOP/s. The scores that chunks write do
  not count, because cuDNN keeps them on the chip.
- *collectives*: bytes on the wire over all NVLinks of a GPU, one way. Only the time that is not hidden counts.

The shares were measured on one H200 (docs/kernels.md) and are assumed for other GPUs. Starting a kernel takes no time
here.
"""

import dataclasses
import math
import re

from metacanvas_jax.hardware import Chip
from metacanvas_jax.plan import hlo
from metacanvas_jax.plan.gpu import MEMORY_SHARE
from metacanvas_jax.plan.hlo import Computation, Module, Op
from metacanvas_jax.plan.hlo_cost import Item, Machine, Walk, product_flops

PRODUCT_SHARE = 0.69  # 681 of 989 TFLOP/s: a bfloat16 product of 8192^3
COPY_SHARE = 0.69  # 3,301 of 4,800 GB/s: a copy
ATTENTION_SHARE = 0.53  # 528 of 989 TFLOP/s: cuDNN's attention of 27,280 tokens, forward and backward
TF32_SHARE = 0.5  # of the peak of bfloat16: products of float32, by the data sheets of GPUs from compute capability 8.0
ASSUMPTIONS = (
    "Times are estimates, not measurements: every operation takes the longer time of its FLOPs at "
    f"{PRODUCT_SHARE:.0%} of the data sheet's peak and of its bytes at {COPY_SHARE:.0%} of the data sheet's bandwidth. "
    "One H200 reached these shares in a large product and in a copy; for other GPUs they are assumed. The start of a "
    "kernel takes no time",
    "Attention is compiled as XLA's chunks, because cuDNN cannot be asked without a GPU. Long sequences are timed as "
    f"cuDNN's attention, at {ATTENTION_SHARE:.0%} of peak FLOP/s (measured on one H200), and their scores are not "
    "written to memory",
    "Memory is the sum of parameters, optimizer, batch and the program's temporaries. "
    f"{MEMORY_SHARE:.0%} of the GPU's memory is taken as available: set XLA_PYTHON_CLIENT_MEM_FRACTION={MEMORY_SHARE} "
    "(JAX takes 75 % without it)",
)
CHUNKS = re.compile(r"\battend\b.*\bwhile\b")  # scopes of chunked_attention's loops
ATTENTION = "cuDNN attention"
CONVOLUTION = re.compile(r"__cudnn\$conv(\w*)")


def items(module: Module, machine: Machine) -> list[Item]:
    """All operations of a step with a cost above zero."""
    walk = GpuWalk(module, machine)
    walk.run(module.entry, 1)
    return walk.items


class GpuWalk(Walk):
    """The walk through a program for GPUs."""

    def plain(self, op: Op, computation: Computation, times: int) -> float:
        """Seconds of one run of an operation that is no loop, call or collective."""
        moved = hlo.traffic(self.module, computation, op)
        return self.reckoned(op, computation, times, product_flops(self.module, op, computation), moved)

    def called(self, op: Op, computation: Computation, times: int) -> float:
        """Seconds of one call of a library."""
        moved = hlo.hbm_bytes(first(op.type)) + hlo.operand_bytes(computation, op)
        return self.reckoned(op, computation, times, library_flops(op, computation), moved)

    def reckoned(self, op: Op, computation: Computation, times: int, flops: float, moved: float) -> float:
        """Keeps an operation of so many FLOPs and bytes; returns the seconds of one run."""
        chip = self.machine.chip
        item = self.item(op, "product" if flops else "memory", times, flops, moved, 0.0)
        if CHUNKS.search(item.scope):
            item = self.item(op, "kernel", times, flops, 0.0, flops / (ATTENTION_SHARE * chip.flops))
            return self.add(dataclasses.replace(item, name=ATTENTION)) if flops else 0.0
        seconds = roofline(chip, flops, moved, narrow=not wide(self.module, computation, op))
        return self.add(self.item(op, item.sort, times, flops, moved, seconds)) if flops or moved else 0.0


def roofline(chip: Chip, flops: float, moved: float, *, narrow: bool = True) -> float:
    """Seconds of an operation. ``narrow`` says that its products multiply 16-bit numbers."""
    peak = PRODUCT_SHARE * chip.flops * (1.0 if narrow else TF32_SHARE)
    return max(flops / peak, moved / (COPY_SHARE * chip.hbm_bandwidth))


def wide(module: Module, computation: Computation, op: Op) -> bool:
    """Whether the products of an operation multiply numbers of 32 bits."""
    if op.kind == "fusion":
        inner = module.callee(op)
        return any(wide(module, inner, x) for x in inner.values() if x.kind in ("dot", "fusion"))
    factors = [computation[name].type for name in op.operands[:2] if name in computation]
    return op.kind in ("dot", "custom-call") and any(kind.startswith("f32") for kind in factors)


def library_flops(op: Op, computation: Computation) -> float:
    """FLOPs of a call of cuBLAS, or of a convolution of cuDNN; 0 for other calls."""
    shapes = [hlo.sizes(computation[name].type) for name in op.operands[:2] if name in computation]
    if len(shapes) < 2:
        return 0.0
    if "__cublas$" in op.attributes:
        inner = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)
        summed = [shapes[0][int(x.strip('"'))] for x in inner.group(1).split(",") if x] if inner else []
        return 2.0 * math.prod(hlo.sizes(op.type)) * math.prod(summed)
    kind, labels = CONVOLUTION.search(op.attributes), re.search(r"dim_labels=\w+_(\w+)->", op.attributes)
    if kind is None or labels is None:
        return 0.0
    # Every element of the result of the forward pass is a sum over the kernel's taps and its input channels.
    left, right, made = *shapes, hlo.sizes(op.type)
    result, taps = {"BackwardInput": (left, right), "BackwardFilter": (right, made)}.get(kind.group(1), (made, right))
    return 2.0 * math.prod(result) * math.prod(taps) / taps[labels.group(1).index("o")]


def first(kind: str) -> str:
    """The first array of a type: the result of a call, without the library's workspace."""
    match = hlo.ARRAY.search(kind)
    return match.group(0) if match else ""
