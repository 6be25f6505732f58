"""Parses the text of an optimised TPU or GPU program (``compiled.as_text()``); computes costs of single operations.

The text is scheduled: the operations of a computation are in the order of their execution.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

from metacanvas_jax.train.flops import valid_positions

ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1.0),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2.0),
    **dict.fromkeys(("f32", "s32", "u32"), 4.0),
    **dict.fromkeys(("f64", "s64", "u64"), 8.0),
    **dict.fromkeys(("s4", "u4"), 0.5),
}
ARRAY = re.compile(r"\b(" + "|".join(ITEM_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ELSEWHERE = re.compile(r"S\([1-9]\)")  # on-chip memory, or the host's
ON_HOST = re.compile(r"S\(5\)")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
ASSIGNMENT = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.S)


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation. ``type`` is its result's, ``attributes`` the text behind its operands, ``scope`` its op_name."""

    name: str
    kind: str
    type: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def scope(self) -> str:
        """The scope of the Python program that it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate of cycles; 0 without one."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match.group(1)) if match else 0

    def named(self, attribute: str) -> str | None:
        """The computation that an attribute such as ``calls`` or ``body`` names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else None

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if match:
            return re.findall(r"%?([\w.\-]+)", match.group(1))
        return [name for key in ("true_computation", "false_computation") if (name := self.named(key))]


Computation = dict[str, Op]


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, operations in order."""

    computations: dict[str, Computation]
    entry: str

    def callee(self, op: Op) -> Computation:
        """The computation of a fusion or a call."""
        return self.computations[op.named("calls") or op.named("to_apply") or ""]


def parse(text: str) -> Module:
    """Reads the text of a compiled program. Raises ValueError when it has no entry."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    pending: list[str] = []

    def flush() -> None:
        if pending and (op := _parse_op("\n".join(pending))) is not None:
            current[op.name] = op
        pending.clear()

    for line in text.splitlines():
        if line[:1] not in (" ", "}", "") and (match := HEADER.match(line)):
            flush()
            current = computations[match.group(2)] = {}
            entry = match.group(2) if match.group(1) else entry
        elif line.rstrip() == "}":
            flush()
        elif ASSIGNMENT.match(line):
            flush()
            pending.append(line)
        elif pending:
            pending.append(line)
    flush()
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return Module(computations, entry)


def _parse_op(text: str) -> Op | None:
    match = ASSIGNMENT.match(text)
    root, name, rest = match.groups() if match else ("", "", "")
    if rest.startswith("("):
        end = _closing(rest, 0)
        kind_of, rest = rest[: end + 1], rest[end + 2 :]
    else:
        kind_of, _, rest = rest.partition(" ")
    kind = re.match(r"([a-z][\w\-]*)\(", rest)
    if kind is None:
        return None
    start = kind.end() - 1
    end = _closing(rest, start)
    arguments = rest[start + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Op(name, kind.group(1), kind_of, operands, arguments, rest[end + 1 :], bool(root))


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    return len(text) - 1


def sizes(type_text: str) -> list[int]:
    """Dimensions of the first array of a type."""
    match = ARRAY.search(type_text)
    return [int(x) for x in match.group(2).split(",") if x] if match else []


def _arrays(type_text: str) -> Iterator[tuple[float, str]]:
    for item, dims, layout in ARRAY.findall(type_text):
        yield ITEM_BYTES[item] * math.prod(int(x) for x in dims.split(",") if x), layout


def total_bytes(type_text: str) -> float:
    """Bytes of all arrays of a type."""
    return sum(size for size, _ in _arrays(type_text))


def copied_bytes(start: Op) -> float:
    """Bytes that an asynchronous copy moves: those of the first array of its type; of a slice or an update its own."""
    found = [size for size, _ in _arrays(start.type)]
    if start.kind == "dynamic-update-slice-start":  # type: ((whole, update, indices), whole, context)
        return found[1]
    if start.kind == "dynamic-slice-start":  # type: ((whole, indices), slice, context)
        return max(found[1:])
    return next(iter(found), 0.0)


def hbm_bytes(type_text: str) -> float:
    """Bytes of the arrays of a type that are in HBM: not in on-chip memory and not on the host."""
    return sum(size for size, layout in _arrays(type_text) if not ELSEWHERE.search(layout))


def host_bytes(type_text: str) -> float:
    """Bytes of the arrays of a type that are in the host's memory."""
    return sum(size for size, layout in _arrays(type_text) if ON_HOST.search(layout))


def trip_count(module: Module, loop: Op) -> int:
    """The number of iterations of a ``while``; 1 if it cannot be found.

    GPU programs state it, as known_trip_count. In TPU programs the bound is the constant in the condition's comparison.
    The step is the amount that the body adds to the counter (more than 1 if the compiler has unrolled the loop).
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known.group(1))
    condition = module.computations[loop.named("condition") or ""]
    body = module.computations[loop.named("body") or ""]
    compare = next(op for op in condition.values() if op.is_root)
    bound = index = None
    for name in compare.operands:
        op = condition.get(name)
        if op is None:
            continue
        if op.kind == "constant" and re.fullmatch(r"-?\d+", op.arguments):
            bound = int(op.arguments)
        if op.kind == "get-tuple-element" and (match := re.search(r"index=(\d+)", op.attributes)):
            index = int(match.group(1))
    if bound is None:
        return 1
    root = next(op for op in body.values() if op.is_root)
    step = 0
    if index is not None and root.kind == "tuple":
        step = _increment(body, root.operands[index])
    return -(-bound // (step or 1))


def _increment(body: Computation, name: str) -> int:
    step, op = 0, body.get(name)
    while op is not None:
        if op.kind == "add":
            terms = [body[x] for x in op.operands]
            step += sum(int(x.arguments) for x in terms if x.kind == "constant")
            op = next((x for x in terms if x.kind != "constant"), None)
        elif op.kind in ("copy", "bitcast", "convert"):
            op = body.get(op.operands[0])
        else:
            break
    return step


def product_flops(module: Module, computation: Computation) -> float:
    """FLOPs of the matrix products and convolutions of a computation, including those inside its fusions."""
    total = 0.0
    for op in computation.values():
        if op.kind == "convolution":
            total += _convolution_flops(computation, op)
        elif op.kind == "dot":
            left = sizes(computation[op.operands[0]].type)
            match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
            inner = [left[int(x)] for x in match.group(1).split(",") if x] if match else []
            total += 2.0 * math.prod(sizes(op.type)) * math.prod(inner)
        elif op.kind == "fusion":
            total += product_flops(module, module.callee(op))
    return total


def _convolution_flops(computation: Computation, op: Op) -> float:
    """FLOPs without the multiplications by padding and by the gaps of dilation.

    The compiler writes matrix products as convolutions, whose padding and dilation select the factors.
    """
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", op.attributes)
    if labels is None:
        return 0.0
    of_input, of_kernel, of_output = labels.groups()
    left, right, out = (sizes(t) for t in (computation[op.operands[0]].type, computation[op.operands[1]].type, op.type))
    if len(left) != len(of_input) or len(right) != len(of_kernel) or len(out) != len(of_output):
        return 0.0
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    spatial = [c for c in of_output if c.isdigit()]

    def per_axis(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    valid = 1
    for axis in spatial:
        i = int(axis)  # a window lists the spatial axes by number, whatever their order in the labels
        valid *= valid_positions(
            inputs=left[of_input.index(axis)],
            kernel=right[of_kernel.index(axis)],
            outputs=out[of_output.index(axis)],
            stride=int(per_axis("stride", "1")[i]),
            before=int(per_axis("pad", "0_0")[i].split("_")[0]),
            input_dilation=int(per_axis("lhs_dilate", "1")[i]),
            kernel_dilation=int(per_axis("rhs_dilate", "1")[i]),
        )
    batch_groups = re.search(r"batch_group_count=(\d+)", op.attributes)
    batch = left[of_input.index("b")] / (int(batch_groups.group(1)) if batch_groups else 1)
    return 2.0 * batch * out[of_output.index("f")] * right[of_kernel.index("i")] * valid


def traffic(module: Module, computation: Computation, op: Op) -> float:
    """HBM bytes that an operation reads and writes.

    A fused operand that is only sliced counts as the slice. One that is only updated in place counts as the update.
    Operands that a fusion passes to a running collective do not count; the collective counts its bytes on the wire.
    """
    written = hbm_bytes(op.type)
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * written if operand_bytes(computation, op) else written
    if op.kind == "dynamic-update-slice":
        return 2 * hbm_bytes(computation[op.operands[1]].type) if op.operands[1] in computation else 0.0
    if op.kind != "fusion":
        return written + operand_bytes(computation, op)
    inner = module.callee(op)
    parameters = {int(x.arguments): x for x in inner.values() if x.kind == "parameter"}
    in_flight = _in_flight(inner)
    if in_flight:
        root = next(x for x in inner.values() if x.is_root)
        results = root.operands if root.kind == "tuple" else (root.name,)
        written = sum(hbm_bytes(inner[name].type) for name in results if name not in in_flight)
    read = 0.0
    for number, name in enumerate(op.operands):
        if name not in computation or number not in parameters:
            continue
        whole = hbm_bytes(computation[name].type)
        parameter = parameters[number].name
        if not whole or parameter in in_flight:
            continue
        same = _in_place(inner, parameter)
        users = [x for x in inner.values() if same & set(x.operands) and x.name not in same]
        if users and all(x.kind == "dynamic-update-slice" and x.operands[0] in same for x in users):
            written -= whole
            read += sum(total_bytes(inner[x.operands[1]].type) for x in users if x.operands[1] in inner)
        else:
            read += _read(module, inner, parameter, whole)
    return read + max(written, 0.0)


def _in_place(fused: Computation, parameter: str) -> set[str]:
    """A parameter, and what is the same memory under another layout."""
    found = {parameter}
    for x in fused.values():  # in their order
        aliased = x.kind == "bitcast" or (
            x.kind == "fusion" and "output_to_operand_aliasing={{}: (0, {})}" in x.attributes
        )
        if aliased and x.operands[0] in found:
            found.add(x.name)
    return found


def _read(module: Module, fused: Computation, parameter: str, whole: float) -> float:
    """Bytes of a fusion's parameter that are read: all, unless every user slices it (nested fusions included)."""
    total = 0.0
    for user in (x for x in fused.values() if parameter in x.operands):
        if user.kind == "dynamic-slice" and parameter not in user.operands[1:]:
            total += total_bytes(user.type)
        elif user.kind == "fusion":
            inside = module.callee(user)
            at = user.operands.index(parameter)
            name = next(x.name for x in inside.values() if x.kind == "parameter" and int(x.arguments) == at)
            total += _read(module, inside, name, whole)
        else:
            return whole
    return min(total, whole) if total else whole


def _in_flight(fused: Computation) -> set[str]:
    """The collectives of a fusion, and the values that it only passes to them or through."""
    found = {x.name for x in fused.values() if x.kind.removesuffix("-start") in COLLECTIVES}
    if found:
        found |= {x.name for x in fused.values() if x.kind == "custom-call" and found & set(x.operands)}
        for parameter in (x.name for x in fused.values() if x.kind == "parameter"):
            users = [x for x in fused.values() if parameter in x.operands]
            if all(x.name in found or x.is_root for x in users):
                found.add(parameter)
    return found


def operand_bytes(computation: Computation, op: Op) -> float:
    """HBM bytes of the operands of an operation."""
    return sum(hbm_bytes(computation[name].type) for name in op.operands if name in computation)


def device_groups(op: Op) -> np.ndarray:
    """The groups of devices of a collective, as numbers in the order of the mesh: ``[groups, members]``.

    Raises ValueError for an unknown notation of groups.
    """
    text = op.attributes
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        axes = re.findall(r"'([\w.]+)'=(\d+)", match.group(1))
        names, lengths = [name for name, _ in axes], [int(size) for _, size in axes]
        parts = re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", match.group(2))
        return _mesh_groups(names, lengths, [(name, int(a or 0), int(b or 0)) for name, a, b in parts])
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = [int(x) for x in match.group(3).split(",")]
        numbers = np.arange(math.prod(shape)).reshape(shape)
        if match.group(4):
            numbers = numbers.transpose([int(x) for x in match.group(4).split(",")])
        return numbers.reshape(int(match.group(1)), int(match.group(2)))
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match.group(1))])
    if match := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        return np.array([[int(x) for x in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", match.group(1))])
    raise ValueError(f"unknown device groups: {text[:200]}")


def _mesh_groups(names: list[str], lengths: list[int], parts: list[tuple[str, int, int]]) -> np.ndarray:
    # 'x':(4)2 is a factor of axis x: of length 2, after a factor of length 4.
    shape: list[int] = []
    place: dict[tuple[str, int], int] = {}
    for name, length in zip(names, lengths, strict=True):
        inner = {x for n, before, size in parts if n == name and size for x in (before, before * size)}
        for low, high in itertools.pairwise(sorted({1, length} | inner)):
            place[name, low] = len(shape)
            shape.append(high // low)
    inside = []
    for name, before, size in parts:
        for (n, low), where in place.items():
            if n == name and (not size or before <= low < before * size):
                inside.append(where)
    outside = [i for i in range(len(shape)) if i not in inside]
    numbers = np.arange(math.prod(lengths)).reshape(shape or [1]).transpose((outside + inside) or [0])
    return numbers.reshape(-1, math.prod([shape[i] for i in inside]) if inside else 1)
