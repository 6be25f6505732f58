"""What a run's parameters start from: the folders its config names, read by each host as far as its devices need."""

from collections.abc import Mapping
from typing import Any

import jax

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.types import Params


def load(experiment: Experiment, abstract: Params) -> Params:
    """The parameters that folders of the experiment hold, of the shapes and shardings of ``abstract``.

    What the experiment freezes comes in its frozen dtype, cast while it is read; what it trains comes in float32.
    """
    wanted = _dtypes(experiment, abstract)
    return {part: source.load(wanted[part]) for part, source in weight_folders(experiment).items() if part in wanted}


def load_frozen(experiment: Experiment, part: str, abstract: Mapping[str, Any]) -> Params:
    """The parameters of one part of the model that its folder holds, as a training holds what it freezes."""
    dtype = experiment.train.frozen_dtype
    return weight_folders(experiment)[part].load(jax.tree.map(lambda leaf: _as(leaf, dtype), abstract))


def _dtypes(experiment: Experiment, abstract: Mapping[str, Any]) -> Params:
    trainable, frozen = (flat(tree) for tree in partition(abstract, experiment.train.rules))
    leaves = {path: _as(leaf, "float32") for path, leaf in trainable.items()}
    leaves |= {path: _as(leaf, experiment.train.frozen_dtype) for path, leaf in frozen.items()}
    return nested(leaves)


def _as(leaf: Any, dtype: str) -> jax.ShapeDtypeStruct:
    floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
    return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype, sharding=getattr(leaf, "sharding", None))
