"""Reading the folders of weights that a config names; every host reads what its own devices need."""

from collections.abc import Mapping
from typing import Any

import jax

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.trees import flat, nested, trains
from metacanvas_jax.types import Params


def load(experiment: Experiment, abstract: Params) -> Params:
    """The parameters of ``abstract`` that the folders of the experiment hold, with its shapes and shardings.

    ``abstract`` may be any part of the experiment's parameters; nothing else is read. Frozen parameters are cast to
    the experiment's frozen dtype while they are read; trainable ones are float32.
    """
    wanted = _dtypes(experiment, abstract)
    return {part: source.load(wanted[part]) for part, source in weight_folders(experiment).items() if part in wanted}


def load_frozen(experiment: Experiment, part: str, abstract: Mapping[str, Any]) -> Params:
    """The parameters of one part of the model that its folder holds, as a training holds what it freezes."""
    dtype = experiment.train.frozen_dtype
    return weight_folders(experiment)[part].load(jax.tree.map(lambda leaf: _as(leaf, dtype), abstract))


def _dtypes(experiment: Experiment, abstract: Mapping[str, Any]) -> Params:
    train = experiment.train
    dtypes = {path: "float32" if trains(path, train.rules) else train.frozen_dtype for path in flat(abstract)}
    return nested({path: _as(leaf, dtypes[path]) for path, leaf in flat(abstract).items()})


def _as(leaf: Any, dtype: str) -> jax.ShapeDtypeStruct:
    floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
    return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype, sharding=getattr(leaf, "sharding", None))
