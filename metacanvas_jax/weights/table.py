"""Weight tables: how published tensors become parameters, and back.

A table is a list of ``Entry``. A name with ``{i}`` stands for a run of layers whose tensors are stacked along the first
axis of one parameter (``nn.scan``). The same table serves import, export and the full-size manifest tests, so every
transform can be undone.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

Box = tuple[tuple[int, int], ...]
"""A block of an array: (start, stop) for every axis."""


def _uncut(box: Box) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible rearrangement of one tensor (never of a stack).

    ``window`` tells which block of the published tensor makes a block of the parameter, so that a process reads only
    what its devices hold: ``window(box) -> (source, covered)`` with ``forward(x[source]) == forward(x)[covered]`` and
    ``covered`` at least ``box``. None means that the whole tensor is needed, which is always right.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]
    window: Callable[[Box], tuple[Box, Box] | None] = _uncut


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published tensor, or ``layers`` of them when ``name`` holds ``{i}``.

    ``path`` is the parameter's path joined by ``/``. ``aliases`` are other names under which files may hold the tensor.
    ``{i}`` counts from ``first``. ``adapter`` are the transforms of the two matrices of an adapter (LoRA) beside this
    kernel, torch ``[rank, in]`` and ``[out, rank]``, where they do not follow from ``transform`` (``weights/lora.py``).
    """

    name: str
    path: str
    transform: Transform
    layers: int | None = None
    aliases: tuple[str, ...] = ()
    first: int = 0
    adapter: tuple[Transform, Transform] | None = None

    def __post_init__(self):
        for name in (self.name, *self.aliases):
            if ("{i}" in name) != (self.layers is not None):
                raise ValueError(f"{name} for {self.path}: a name holds {{i}} exactly when layers is given")

    def names(self, layer: int | None) -> tuple[str, ...]:
        """The names a file may use for one tensor, the published one first; ``layer`` is None without a stack."""
        number = "" if layer is None else str(self.first + layer)
        return tuple(name.replace("{i}", number) for name in (self.name, *self.aliases))

    @property
    def tensors(self) -> tuple[int | None, ...]:
        """The layers, or one None without a stack."""
        return (None,) if self.layers is None else tuple(range(self.layers))


def _same(x: np.ndarray) -> np.ndarray:
    return x


def transposed(forward: tuple[int, ...]) -> Transform:
    """Axes in another order."""
    backward = tuple(int(i) for i in np.argsort(forward))

    def window(box: Box) -> tuple[Box, Box]:
        return tuple(box[i] for i in backward), box

    return Transform(lambda x: x.transpose(forward), lambda x: x.transpose(backward), window)


def then(first: Transform, second: Transform) -> Transform:
    """``first``, then ``second``."""

    def window(box: Box) -> tuple[Box, Box] | None:
        outer = second.window(box)
        inner = outer and first.window(outer[0])
        # A block that ``first`` can only make larger than asked has no place in the output of ``second``.
        return (inner[0], outer[1]) if inner and inner[1] == outer[0] else None

    return Transform(lambda x: second.forward(first.forward(x)), lambda x: first.backward(second.backward(x)), window)


SAME = Transform(_same, _same, lambda box: (box, box))
LINEAR = transposed((1, 0))  # torch [out, in] to [in, out]
CONV2D = transposed((2, 3, 1, 0))  # torch [out, in, h, w] to [h, w, in, out]
CONV3D = transposed((2, 3, 4, 1, 0))  # torch [out, in, t, h, w] to [t, h, w, in, out]

DEPTHWISE = Transform(  # torch [c, 1, h, w], one input channel per group, to [h, w, c]
    lambda x: x[:, 0].transpose(1, 2, 0),
    lambda x: x.transpose(2, 0, 1)[:, None],
    lambda box: ((box[2], (0, 1), box[0], box[1]), box),
)


def pointwise(axes: int) -> Transform:
    """A convolution of size one over ``axes`` axes, torch ``[out, in, 1, ...]``, as a matrix ``[in, out]``."""
    ones = (1,) * axes
    return Transform(
        lambda x: x.reshape(x.shape[:2]).T,
        lambda x: x.T.reshape(*x.shape[::-1], *ones),
        lambda box: ((box[1], box[0], *((0, 1) for _ in ones)), box),
    )


POINTWISE = pointwise(2)


def folded(axis: int, parts: int, size: int) -> Transform:
    """Cuts one axis into ``parts`` consecutive pieces of ``size``, which are an axis of their own in front of it."""

    def window(box: Box) -> tuple[Box, Box]:
        (start, stop), (first, last) = box[axis : axis + 2]
        if stop - start > 1:  # pieces lie apart: only whole ones are one block
            first, last = 0, size
        source = (*box[:axis], (start * size + first, (stop - 1) * size + last), *box[axis + 2 :])
        return source, (*box[: axis + 1], (first, last), *box[axis + 2 :])

    return Transform(
        lambda x: x.reshape(*x.shape[:axis], -1, min(size, x.shape[axis]), *x.shape[axis + 1 :]),
        lambda x: x.reshape(*x.shape[:axis], parts * size, *x.shape[axis + 2 :]),
        window,
    )


def half_split(head_width: int) -> Transform:
    """Output channels of a ``[in, out]`` kernel, or of a vector ``[out]``, from interleaved pairs to half-split heads.

    Inside each head channel ``2 i + s`` moves to ``s * e / 2 + i`` (see ``nn/rope.py``).
    """

    def forward(x: np.ndarray) -> np.ndarray:
        heads = x.reshape(*x.shape[:-1], -1, head_width // 2, 2)
        return np.ascontiguousarray(np.swapaxes(heads, -1, -2)).reshape(x.shape)

    def backward(x: np.ndarray) -> np.ndarray:
        heads = x.reshape(*x.shape[:-1], -1, 2, head_width // 2)
        return np.ascontiguousarray(np.swapaxes(heads, -1, -2)).reshape(x.shape)

    def window(box: Box) -> tuple[Box, Box]:
        start, stop = box[-1]
        whole = (*box[:-1], (start // head_width * head_width, -(-stop // head_width) * head_width))
        return whole, whole

    return Transform(forward, backward, window)


def linear(
    name: str, path: str, layers: int | None = None, kernel: Transform = LINEAR, bias: Transform | None = SAME
) -> list[Entry]:
    """Weight and bias of a linear layer or a convolution: ``kernel`` and ``bias`` (None: it has none)."""
    entries = [Entry(f"{name}.weight", f"{path}/kernel", kernel, layers)]
    return entries if bias is None else [*entries, Entry(f"{name}.bias", f"{path}/bias", bias, layers)]


def norm(name: str, path: str, layers: int | None = None) -> list[Entry]:
    """Gain and bias of a norm: ``scale`` and ``bias``."""
    return [Entry(f"{name}.weight", f"{path}/scale", SAME, layers), Entry(f"{name}.bias", f"{path}/bias", SAME, layers)]


def under(entries: Sequence[Entry], path: str = "", name: str = "") -> list[Entry]:
    """A part's table inside a larger network: ``path`` and ``name`` are put in front (``language/``, ``model.``)."""
    return [
        dataclasses.replace(e, path=path + e.path, name=name + e.name, aliases=tuple(name + a for a in e.aliases))
        for e in entries
    ]


def check_table(table: Sequence[Entry], abstract: Mapping[str, Any]) -> None:
    """Every parameter has exactly one entry, every entry a parameter, no published name serves two, stacks agree.

    Raises ValueError with all that is wrong: a table is code, so this is no error of a user.
    """
    targets = flatten_dict(abstract, sep="/")
    paths = Counter(entry.path for entry in table)
    names = Counter(name for entry in table for layer in entry.tensors for name in entry.names(layer))
    wrong = [f"parameter {path} has no entry" for path in targets if path not in paths]
    wrong += [f"entry {path} has no parameter" for path in paths if path not in targets]
    wrong += [f"parameter {path} has {count} entries" for path, count in paths.items() if count > 1]
    wrong += [f"published name {name} is used {count} times" for name, count in names.items() if count > 1]
    wrong += [
        f"entry {e.path} stacks {e.layers} layers on shape {list(targets[e.path].shape)}"
        for e in table
        if e.layers is not None and e.path in targets and targets[e.path].shape[:1] != (e.layers,)
    ]
    if wrong:
        raise ValueError("table and parameters disagree: " + "; ".join(wrong))


def published_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the published tensor (of one layer) that becomes a parameter of ``shape``."""
    own = shape if entry.layers is None else shape[1:]
    # One byte stands for the whole tensor: all strides are zero, so transposes and reshapes cost nothing.
    return entry.transform.backward(np.broadcast_to(np.zeros((), np.uint8), own)).shape


def published_shapes(table: Sequence[Entry], abstract: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every published name and its shape, to compare with a ``state_dict`` or the header of a file."""
    check_table(table, abstract)
    targets = flatten_dict(abstract, sep="/")
    return {
        entry.names(layer)[0]: published_shape(entry, targets[entry.path].shape)
        for entry in table
        for layer in entry.tensors
    }


def count(abstract: Mapping[str, Any]) -> int:
    """Number of parameters of a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in flatten_dict(abstract, sep="/").values())
