"""The table from logical axes (of parameters and activations) to mesh axes, and the shardings that follow from it.

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
embed                 the model width; sharded on parameters only, because on activations "batch" has taken the axis
rank                  the short axis of a low-rank adapter
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
"""Ordered (logical axis, mesh axes). Earlier rows choose first; a mesh axis is used once per array; a later row of the
same logical axis is what to fall back on where an earlier one does not divide."""

RULES: Rules = (
    # Samples over both kinds of data parallelism. First, so that no activation is cut along "embed" as well.
    ("batch", ("data", "fsdp")),
    # Megatron pairs: the axis inside a block is split, so a block needs one exchange before and one after.
    ("mlp", "tensor"),
    ("exchanged_heads", ("tensor", "context")),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    # Between the Megatron pairs nothing else uses the tensor axis, so tokens do: norms and residuals are computed once
    # instead of on every device of the axis, and an all-reduce becomes a reduce-scatter and an all-gather.
    ("seq", ("context", "tensor")),
    ("seq", "context"),
    # The autoencoders' pictures are cut into bands of rows; neighbours exchange a row per convolution.
    ("rows", "context"),
    # Fully sharded parameters: the model width is stored in slices, also along the context axis, which has no other use
    # for parameters.
    ("embed", ("fsdp", "context")),
    ("embed", "fsdp"),
    # An adapter beside a feed-forward has no other axis to be cut along: the model width is not one of its.
    ("rank", "fsdp"),
    # The scan axis stays whole: each device runs every layer.
    ("layers", None),
)

LARGE = 2**26
"""Elements of a parameter that may not lie whole on every device of a mesh that splits parameters: 256 MiB."""

PART_RULES: dict[str, Rules] = {
    # The MLLM's prompts are short and causal: where there are enough samples, each device of the context axis takes
    # some of them, instead of tokens of all of them. Its few key/value heads would not divide for an exchange.
    "mllm": (("batch", ("data", "fsdp", "context")), ("batch", ("data", "fsdp")), ("seq", "tensor"), ("seq", None)),
    # An autoencoder has neither heads nor feed-forwards worth splitting: samples first, then bands of rows.
    "vae": (
        ("batch", ("data", "fsdp", "context", "tensor")),
        ("batch", ("data", "fsdp", "context")),
        ("batch", ("data", "fsdp")),
        ("rows", ("context", "tensor")),
        ("mlp", None),
        ("heads", None),
    ),
}
"""Rows put in front of the common ones for the parts of a model named so; a row with None ends an axis's choices."""


def rules_of(part: str, rules: Rules = RULES) -> Rules:
    """The rules of one part of a model, the first component of its parameters' paths."""
    return PART_RULES.get(part, ()) + rules


def resolve(
    names: Sequence[str | None],
    shape: Sequence[int] | None,
    mesh: Mesh | AbstractMesh,
    rules: Rules = RULES,
) -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names.

    An axis whose size does not divide by its mesh axes is left to a later row of its name, or stays whole, as do
    unnamed and unknown axes; mesh axes of size 1 are left out. ``shape`` None means that everything divides.
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
    """A NamedSharding for every parameter of a tree as Linen's ``init`` makes it, abstract or not.

    Each part of the model (first component of the path) has its own rules. Parameters without logical names are copied
    to every device, and so is what has only the model width for an axis (gains, biases of the residual stream): slices
    of it would be too small to be worth a gather per layer. Parts in ``whole`` (``MeshConfig``) are copied too, but for
    their adapters, which have the axis "rank". The result has no boxes.
    """
    leaves = flat(abstract)
    out = {}
    for path, leaf in leaves.items():
        names = leaf.get_partition_spec() if isinstance(leaf, nn.Partitioned) else ()
        shape = nn.meta.unbox(leaf).shape
        part = path.partition("/")[0]
        if [name for name in names if name != "layers"] == ["embed"] or (part in whole and "rank" not in names):
            names = (None,) * len(names)
        own = rules_of(part, rules)
        out[path] = NamedSharding(mesh, resolve(names, shape[: len(names)], mesh, own))
    return _like(abstract, out)


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


def check_whole(placed: Params, at_least: int = LARGE, meant: Sequence[str] = ()) -> None:
    """Refuses parameters of ``at_least`` elements of which every device would hold a full copy.

    A mesh that only splits samples copies everything, which is what it is for, and so are parts that are ``meant`` to
    be whole.

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
