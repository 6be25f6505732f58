"""The table from logical axes (of parameters and activations) to mesh axes, and the shardings that follow from it."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metacanvas_jax.train.partition import flat
from metacanvas_jax.types import Params

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
"""Ordered (logical axis, mesh axes). Earlier rules choose first; a mesh axis is used once per array."""

RULES: Rules = (
    # Activations: samples over both kinds of data parallelism, the token sequence over the context axis.
    ("batch", ("data", "fsdp")),
    ("seq", "context"),
    # The autoencoders' pictures are cut into bands of rows; neighbours exchange a row per convolution.
    ("rows", "context"),
    # Megatron pairs: the axis inside a block is split, so a block needs one all-reduce, at its end.
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    # Fully sharded parameters: the model width is stored in slices. On activations "batch" has taken fsdp already.
    ("embed", "fsdp"),
    # The scan axis stays whole: each device runs every layer.
    ("layers", None),
)


def resolve(
    names: Sequence[str | None], shape: Sequence[int] | None, mesh: Mesh, rules: Rules = RULES
) -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names.

    An axis whose size does not divide by its mesh axes stays whole, as do unnamed and unknown axes; mesh axes of size 1
    are left out. ``shape`` None means that everything divides.
    """
    chosen: dict[int, tuple[str, ...]] = {}
    used: set[str] = set()
    for name, target in rules:
        axes = (target,) if isinstance(target, str) else target or ()
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        place = next((i for i, x in enumerate(names) if x == name and i not in chosen), None)
        if place is None or not axes or used & set(axes):
            continue
        if shape is None or shape[place] % math.prod(mesh.shape[axis] for axis in axes) == 0:
            chosen[place] = axes
            used |= set(axes)
    parts = [chosen.get(i, ()) for i in range(len(names))]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in parts))


def shardings(abstract: Params, mesh: Mesh, rules: Rules = RULES) -> Params:
    """A NamedSharding for every parameter of a tree as Linen's ``init`` makes it, abstract or not.

    Parameters without logical names are copied to every device. The result has no boxes.
    """

    def sharding(leaf: Any) -> NamedSharding:
        names = leaf.get_partition_spec() if isinstance(leaf, nn.Partitioned) else ()
        shape = nn.meta.unbox(leaf).shape
        return NamedSharding(mesh, resolve(names, shape[: len(names)], mesh, rules))

    return jax.tree.map(sharding, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def placed(abstract: Params, shardings: Params) -> Params:
    """Unboxed abstract parameters that carry their shardings: what weights are loaded into."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.meta.unbox(abstract),
        shardings,
    )


def whole(placed: Params, at_least: int) -> dict[str, tuple[int, ...]]:
    """Parameters of ``at_least`` elements of which every device holds a full copy: path to shape."""
    return {
        path: leaf.shape
        for path, leaf in flat(placed).items()
        if math.prod(leaf.shape) >= at_least and leaf.sharding.is_fully_replicated
    }
