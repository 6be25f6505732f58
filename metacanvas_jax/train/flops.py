"""FLOPs of a program as written, before compilation: counted in its trace, by scope.

Work that the partitioner duplicates, or that the compiler recomputes, is not counted. The ratio of the compiled
program's FLOPs to these shows it. Matrix products and convolutions are counted (a multiplication and an addition are 2
FLOPs), and the FLOPs that Pallas kernels declare. Tests compare the counts with formulas of the published networks.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Count:
    """FLOPs of one traced operation, summed over devices and repetitions. ``kernel`` is the name of a Pallas kernel."""

    scope: str
    flops: float
    kernel: str = ""

    @property
    def is_backward(self) -> bool:
        """Whether it belongs to the backward pass, and not to a recomputed forward pass."""
        return "transpose(" in self.scope and "rematted_computation" not in self.scope

    @property
    def is_recomputed(self) -> bool:
        """Whether it belongs to a forward pass that is recomputed to save memory."""
        return "rematted_computation" in self.scope


def flops_of(traced: Any) -> float:
    """FLOPs that one call of a traced program needs: those of ``metacanvas plan``, whatever the devices are."""
    return model_flops(count(traced.jaxpr))


def count(jaxpr: Any, platform: str = "tpu") -> list[Count]:
    """Every product of a closed jaxpr, with the branches that are chosen on ``platform``."""
    return list(_walk(jaxpr.jaxpr, "", 1.0, platform))


def model_flops(counts: list[Count]) -> float:
    """FLOPs that a step needs: one forward pass, the backward pass where gradients are needed, no recomputation.

    A kernel that is differentiated counts three times its forward pass, even if its backward pass recomputes more.
    """
    total = 0.0
    for item in counts:
        if item.is_recomputed or (item.kernel and item.is_backward):
            continue
        total += item.flops * (3 if item.kernel and "jvp(" in item.scope else 1)
    return total


def _walk(jaxpr: Any, scope: str, times: float, platform: str) -> Iterator[Count]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        here = f"{scope}/{equation.source_info.name_stack}"
        params = equation.params
        if name == "dot_general":
            yield Count(f"{here}/{name}", times * _dot_flops(equation))
        elif name == "conv_general_dilated":
            yield Count(f"{here}/{name}", times * _convolution_flops(equation))
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            kernel = _kernel_name(params)
            yield Count(f"{here}/{kernel}", times * (0.0 if estimate is None else float(estimate.flops)), kernel)
        elif name == "scan":
            yield from _walk(params["jaxpr"].jaxpr, here, times * params["length"], platform)
        elif name == "cond":
            yield from _branch(params, here, times, platform)
        elif name == "shard_map":
            shape = dict(params["mesh"].shape)
            manual = params.get("manual_axes", shape)
            yield from _walk(params["jaxpr"], here, times * math.prod(shape[axis] for axis in manual), platform)
        else:
            for inner in _inner(params):
                yield from _walk(inner, here, times, platform)


def _branch(params: dict, scope: str, times: float, platform: str) -> Iterator[Count]:
    branches = [branch.jaxpr for branch in params["branches"]]
    platforms = params.get("branches_platforms")
    if platforms is not None:
        chosen = next(i for i, names in enumerate(platforms) if names is None or platform in names)
        yield from _walk(branches[chosen], scope, times, platform)
    else:  # which branch runs is unknown: the most expensive one is counted
        yield from max(
            (list(_walk(branch, scope, times, platform)) for branch in branches),
            key=lambda counts: sum(item.flops for item in counts),
        )


def _inner(params: dict) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _dot_flops(equation: Any) -> float:
    (contracting, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[i] for i in contracting)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * inner


def _convolution_flops(equation: Any) -> float:
    params = equation.params
    left, right = (x.aval.shape for x in equation.invars)
    out = equation.outvars[0].aval.shape
    numbers = params["dimension_numbers"]
    valid = 1
    for i in range(len(params["window_strides"])):
        valid *= valid_positions(
            inputs=left[numbers.lhs_spec[2 + i]],
            kernel=right[numbers.rhs_spec[2 + i]],
            outputs=out[numbers.out_spec[2 + i]],
            stride=params["window_strides"][i],
            before=params["padding"][i][0],
            input_dilation=params["lhs_dilation"][i],
            kernel_dilation=params["rhs_dilation"][i],
        )
    batch = left[numbers.lhs_spec[0]] / params["batch_group_count"]
    return 2.0 * batch * out[numbers.out_spec[1]] * right[numbers.rhs_spec[1]] * valid


def valid_positions(
    *, inputs: int, kernel: int, outputs: int, stride: int, before: int, input_dilation: int, kernel_dilation: int
) -> int:
    """The number of pairs (output, kernel position) along one axis that read an input: no padding, no dilation gap."""
    at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - before
    inside = (at >= 0) & (at <= (inputs - 1) * input_dilation) & (at % input_dilation == 0)
    return int(inside.sum())


def _kernel_name(params: dict) -> str:
    given = params.get("name") or getattr(params.get("name_and_src_info"), "name", None)
    return str(given or "kernel")
