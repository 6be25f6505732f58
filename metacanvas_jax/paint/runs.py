"""Loads what draws: a trained run, or the folders of weights that a config names."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from metacanvas_jax import files
from metacanvas_jax.config.load import read_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import folders, weight_folders
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.paint import placing
from metacanvas_jax.paint.painter import Drawn, Painter
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train import agreement, parameters, store
from metacanvas_jax.trees import flat, merge, nested, partition
from metacanvas_jax.types import Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A painter and its parameters, of the moving average where a run has one; ``step`` is that of the run."""

    painter: Painter
    params: Params
    step: int

    @property
    def setup(self) -> Experiment:
        """The experiment."""
        return self.painter.setup

    def draw(self, prompts: Sequence[str], **options) -> Drawn:
        """See ``Painter.draw``."""
        return self.painter.draw(self.params, prompts, **options)

    def paint(self, samples: Sequence[Sample], bucket: Bucket, **options) -> Drawn:
        """See ``Painter.paint``."""
        return self.painter.paint(self.params, samples, bucket, **options)


def setup_of(run: str | os.PathLike) -> Experiment:
    """The experiment of a run that paints. Raises UserError for a folder that is none."""
    setup = experiment(read_config(run))
    if setup.objective != "paint":
        raise UserError(f"{run} trained an MLLM alone, which draws nothing")
    return setup


def load(
    run: str | os.PathLike,
    *,
    verify: bool = False,
    mesh: Mesh | None = None,
    needs: Mapping[str, np.dtype] | None = None,
    painter: Painter | None = None,
    step: int | None = None,
) -> Trained:
    """The newest complete checkpoint of a run that paints, or that of a ``step``.

    With ``verify``, its frozen weights are compared whole.

    It lies on ``mesh`` (None: the first device of this process), whatever the mesh of its training was. With ``needs``
    (`Painter.needs`) no other parameters are read, and these are held in the dtypes named there. ``painter`` is one of
    the same run, if there is one already.

    Raises UserError for a folder that is no run, has no such checkpoint, or misses its frozen weights or finds others.
    """
    run = files.folder(run)
    painter = Painter(setup_of(run)) if painter is None else painter
    setup, mesh = painter.setup, _one_device() if mesh is None else mesh
    held = flat(placing.abstract(setup, needs, mesh))
    trainable, frozen = (flat(side) for side in partition(placing.abstract(setup, mesh=mesh), setup.train.rules))
    parameters.check_memory(held)
    with store.Store(run / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.step_of(step)
        where = str(checkpoints.folder / str(step))
        recorded = checkpoints.meta(step)["frozen"]
        setup = parameters.without_lost_start(setup, recorded)
        agreement.check_known(recorded, parameters.identities(setup, whole=verify), folders(setup), where)
        wanted = {path: held.get(path, leaf) for path, leaf in trainable.items()}
        trained = checkpoints.restore_params(
            nested(wanted), ema=setup.train.ema is not None, step=step, only=held.keys()
        )
    frozen = {path: held[path] for path in frozen if path in held}
    return Trained(painter, merge(trained, nested(frozen_params(setup, frozen, run))), step)


def frozen_params(setup: Experiment, held: Mapping[str, Any], run: str | os.PathLike) -> dict[str, jax.Array]:
    """Frozen parameters of a run by path: those of the folders that it names, others as its training made them.

    ``held`` are their shapes, with dtypes and shardings. Raises UserError for a folder that has not all of its part.
    """
    given = flat(parameters.start_weights(setup, nested(held)))
    named = {name for name, source in weight_folders(setup).items() if source.place}
    missing = [path for path in held if path not in given and path.split("/")[0] not in named]
    # The training made these by its seed, and by the first of the two keys that it splits off.
    key = jax.random.split(jax.random.key(setup.seed))[0]
    given |= _made(setup, key, {path: held[path] for path in missing})
    return flat(parameters.chosen(nested(given), nested(held), run))


def assembled(
    setup: Experiment,
    *,
    verify: bool = False,
    mesh: Mesh | None = None,
    needs: Mapping[str, np.dtype] | None = None,
    painter: Painter | None = None,
) -> Trained:
    """The networks of a config with the weights of the folders it names; what no folder has is random, by the seed.

    With ``verify``, all bytes of saved folders are compared with their hashes; published folders bring no hash.
    ``mesh``, ``needs`` and ``painter`` are those of ``load``. Raises UserError for folders that are missing, damaged,
    or of other networks.
    """
    for source in weight_folders(setup).values():
        if not source.saved:
            source.network.check(source.place, source.config, source.key)
        elif verify:
            source.identity(whole=True)
    painter = Painter(setup) if painter is None else painter  # missing tokenizers are errors before any weight is read
    held = flat(placing.abstract(setup, needs, _one_device() if mesh is None else mesh))
    parameters.check_memory(held)
    have = flat(parameters.read_folders(setup, nested(held)))
    missing = [path for path in held if path not in have]
    if missing:
        known = {path.split("/")[0] for path in have}
        parts = {"/".join(path.split("/")[: 1 + (path.split("/")[0] in known)]) for path in missing}
        logger.warning("no folder has weights for %s: they start fresh", ", ".join(sorted(parts)))
    have |= _made(setup, jax.random.key(setup.seed), {path: held[path] for path in missing})
    return Trained(painter, nested({path: have[path] for path in held}), 0)


def _made(setup: Experiment, key: Key[Array, ""], held: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Random parameters as a training makes them, in their places and dtypes."""
    places = {path: leaf.sharding for path, leaf in held.items()}
    made = parameters.some(partial(parameters.initial, setup), key, held, places)
    return {path: leaf.astype(held[path].dtype) for path, leaf in made.items()}


def _one_device() -> Mesh:
    return make_mesh(MeshConfig(), jax.local_devices()[:1])
