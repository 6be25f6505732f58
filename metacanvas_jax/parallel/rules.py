"""Which mesh axes split which logical axes of parameters and activations, and the shardings that follow.

====================  ==========================================================================================
logical axis          what it is
====================  ==========================================================================================
batch                 samples of an activation
seq                   tokens of an activation, between the blocks and in everything that acts on tokens one by one
whole_seq             tokens of an activation inside an exchange over heads, where each device has all of them
rows                  rows of pictures in an autoencoder
heads, kv_heads       attention heads, of activations and of the kernels that make or read them
exchanged_heads       heads inside an exchange over heads (``parallel/context.py``)
mlp                   hidden units of a feed-forward, of activations and of kernels
vocab                 rows of the embedding table and columns of the output head
embed                 the model width; split on parameters only, because on activations "batch" already uses the axis
rank                  the short axis of a low-rank adapter
long                  its other axis, where that is not "embed"
layers                the axis that ``nn.scan`` runs along
====================  ==========================================================================================
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from metacanvas_jax.errors import UserError
from metacanvas_jax.trees import flat
from metacanvas_jax.types import Params

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
"""Ordered pairs (logical axis, mesh axes). Earlier rows choose first, and an array uses every mesh axis once at most.
If the size of an axis does not divide by the mesh axes of a row, the next row of the same logical axis is tried."""

RULES: Rules = (
    # Samples over both kinds of data parallelism. First, so that no activation is also split along "embed".
    ("batch", ("data", "fsdp")),
    # As in Megatron, the axis inside a block is split, so a block needs one exchange before it and one after it.
    ("mlp", "tensor"),
    ("exchanged_heads", ("tensor", "context")),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    # Between these exchanges nothing else uses the tensor axis, so it splits the tokens. Norms and residuals are then
    # computed once instead of on every device, and an all-reduce becomes a reduce-scatter and an all-gather.
    ("seq", ("context", "tensor")),
    ("seq", "context"),
    # Images in an autoencoder are split into bands of rows; neighbours exchange a row per convolution.
    ("rows", "context"),
    # Fully sharded parameters: the model width is stored in slices, also along the context axis, which has no other use
    # for parameters.
    ("embed", ("fsdp", "context")),
    ("embed", "fsdp"),
    # The model width is no axis of an adapter on heads or hidden units. Its long axis is stored in slices instead: a
    # rank of 32 or 64 does not divide by a wide fsdp axis.
    ("long", ("tensor", "context", "fsdp")),
    ("long", ("tensor", "fsdp")),
    ("long", "tensor"),
    ("rank", "fsdp"),
    # The scan axis stays whole: each device runs every layer.
    ("layers", None),
)

LONG = frozenset({"mlp", "heads", "kv_heads"})
LARGE = 2**26
"""A parameter of so many elements (256 MiB) must be split on a mesh that splits parameters."""

PART_RULES: dict[str, Rules] = {
    # The devices of the context axis share a video. Its prompt is short and causal, and its few key/value heads do not
    # divide for an exchange. These devices therefore take different samples of it where there are enough samples; else
    # they split heads and hidden widths like those of the tensor axis, and nothing is computed twice. The weights lie
    # as the second case needs them.
    "mllm": (
        ("batch", ("data", "fsdp", "context")),
        ("batch", ("data", "fsdp")),
        *((name, axes) for name in ("mlp", "heads", "kv_heads", "vocab") for axes in (("tensor", "context"), "tensor")),
        ("seq", "tensor"),
        ("seq", None),
    ),
    # An autoencoder has no heads or feed-forwards that are worth splitting: samples first, then bands of rows.
    "vae": (
        ("batch", ("data", "fsdp", "context", "tensor")),
        ("batch", ("data", "fsdp", "context")),
        ("batch", ("data", "fsdp")),
        ("rows", ("context", "tensor")),
        ("mlp", None),
        ("heads", None),
    ),
}
"""Rows that come before the common ones in these parts of a model; a row with None leaves the axis unsplit."""


def rules_of(part: str, rules: Rules = RULES) -> Rules:
    """The rules of one part of a model; parts are named by the first component of a parameter's path."""
    return PART_RULES.get(part, ()) + rules


def resolve(
    names: Sequence[str | None],
    shape: Sequence[int] | None,
    mesh: Mesh | AbstractMesh,
    rules: Rules = RULES,
) -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names.

    If a size does not divide by the mesh axes of a row, the next row of that name is tried; after the last one the axis
    stays unsplit, as unnamed and unknown axes do. Mesh axes of size 1 are left out. ``shape`` None means that every
    size divides.
    """
    chosen: dict[int, tuple[str, ...]] = {}
    used: set[str] = set()
    for name, target in rules:
        place = next((i for i, x in enumerate(names) if x == name and i not in chosen), None)
        if place is None:
            continue
        wanted = (target,) if isinstance(target, str) else target or ()
        if used & set(wanted):
            continue
        axes = tuple(axis for axis in wanted if mesh.shape[axis] > 1)
        if target is None or shape is None or shape[place] % math.prod(mesh.shape[axis] for axis in axes) == 0:
            chosen[place] = axes
            used |= set(wanted)  # those of size 1 too: which axes an array uses must not depend on the sizes
    parts = [chosen.get(i, ()) for i in range(len(names))]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in parts))


def shardings(abstract: Params, mesh: Mesh | AbstractMesh, rules: Rules = RULES, whole: Sequence[str] = ()) -> Params:
    """A NamedSharding for every parameter of a tree that Linen's ``init`` returned, abstract or not.

    Each part of the model has its own rules. Parameters without logical names are copied to every device. Parameters
    whose only axis is the model width (gains, biases of the residual stream) are copied as well, because their slices
    would be too small to be worth a gather per layer. The parts in ``whole`` (see ``MeshConfig``) are not split along
    the model width either, except their adapters, which have the axis "rank". The result is a tree without Linen's
    boxes.
    """
    leaves = flat(abstract)
    out = {}
    for path, leaf in leaves.items():
        names = leaf.get_partition_spec() if isinstance(leaf, nn.Partitioned) else ()
        shape = nn.meta.unbox(leaf).shape
        part = path.partition("/")[0]
        if "rank" in names:
            names = names if "embed" in names else tuple("long" if name in LONG else name for name in names)
        elif part in whole or [name for name in names if name != "layers"] == ["embed"]:
            names = tuple(None if name == "embed" else name for name in names)
        own = rules_of(part, rules)
        out[path] = NamedSharding(mesh, resolve(names, shape[: len(names)], mesh, own))
    return _like(abstract, out)


def placed(abstract: Params, shardings: Params) -> Params:
    """Abstract parameters with their shardings and without Linen's boxes: the targets that weights are loaded into."""
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


def check_whole(placed: Params, at_least: int = LARGE, meant: Sequence[str] = ()) -> None:
    """Refuses parameters of ``at_least`` elements of which every device would hold a full copy.

    A mesh that only splits samples may copy everything; so may the parts ``meant`` to be whole.

    Raises:
        UserError: naming the largest of them, its shape and its size.
    """
    leaves = [leaf for leaf in flat(placed).values() if isinstance(leaf.sharding, NamedSharding)]
    shape = dict(leaves[0].sharding.mesh.shape) if leaves else {}
    large = whole(placed, at_least) if any(shape.get(axis, 1) > 1 for axis in ("fsdp", "context", "tensor")) else {}
    large = {path: size for path, size in large.items() if path.partition("/")[0] not in meant}
    if large:
        path = max(large, key=lambda path: math.prod(large[path]))
        size = math.prod(large[path])
        raise UserError(
            f"mesh {shape}: parameter {path} of shape {list(large[path])} ({size / 1e6:.0f} million) lies whole on "
            f"every device; expected an axis with a name in parallel/rules.py that the mesh divides (parameters from "
            f"{at_least / 1e6:.0f} million elements on must be split)"
        )


def _like(tree: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = "") -> Params:
    return {
        key: _like(value, leaves, f"{prefix}{key}/") if isinstance(value, Mapping) else leaves[prefix + key]
        for key, value in tree.items()
    }
