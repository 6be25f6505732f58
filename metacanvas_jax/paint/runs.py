"""Loads what draws: a trained run, or the folders of weights that a config names."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from metacanvas_jax.config.load import read_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import folders, weight_folders
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.paint.painter import Drawn, Painter
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train import parameters, store
from metacanvas_jax.trees import flat, merge, nested, partition
from metacanvas_jax.types import Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A painter and all its parameters, of the moving average where a run has one; ``step`` is that of the run."""

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


def setup_of(run: Path) -> Experiment:
    """The experiment of a run that paints. Raises UserError for a folder that is none."""
    setup = experiment(read_config(run))
    if setup.objective != "paint":
        raise UserError(f"{run} trained an MLLM alone, which draws nothing")
    return setup


def load(run: Path, *, verify: bool = False) -> Trained:
    """The newest complete checkpoint of a run that paints; with ``verify``, its frozen weights are compared whole.

    Raises UserError for a folder that is no run, has no checkpoint, or misses its frozen weights or finds others.
    """
    setup = setup_of(run)
    with store.Store(run / "checkpoints", writable=False) as checkpoints:
        steps = checkpoints.steps()
        where = str(checkpoints.folder / str(steps[-1])) if steps else str(run)
        now = parameters.identities(setup, whole=verify)
        store.check_known(checkpoints.meta()["frozen"], now, folders(setup), where)
        trainable, frozen = partition(parameters.param_shapes(setup), setup.train.rules)
        trained = checkpoints.restore_params(trainable, ema=setup.train.ema is not None)
    given = flat(parameters.start_weights(setup, frozen))
    named = {name for name, source in weight_folders(setup).items() if source.place}
    missing = [path for path in flat(frozen) if path not in given and path.split("/")[0] not in named]
    # The training made these by its seed, and by the first of the two keys that it splits off.
    key = jax.random.split(jax.random.key(setup.seed))[0]
    made = parameters.some(partial(parameters.initial, setup), key, missing)
    params = merge(trained, parameters.chosen(nested(given | made), frozen, run))
    return Trained(Painter(setup), jax.tree.map(jnp.asarray, params), steps[-1])


def assembled(setup: Experiment, *, verify: bool = False) -> Trained:
    """The networks of a config with the weights of the folders it names; what no folder has is random, by the seed.

    With ``verify``, all bytes of saved folders are compared with their hashes; published folders bring no hash. Raises
    UserError for folders that are missing, damaged, or of other networks.
    """
    for source in weight_folders(setup).values():
        if not source.saved:
            source.network.check(source.place, source.config, source.key)
        elif verify:
            source.identity(whole=True)
    painter = Painter(setup)  # missing tokenizers are errors before any weight is read, too
    abstract = parameters.param_shapes(setup)
    parameters.check_memory(flat(abstract))
    have = flat(parameters.read_folders(setup, abstract))
    missing = [path for path in flat(abstract) if path not in have]
    if missing:
        known = {path.split("/")[0] for path in have}
        parts = {"/".join(path.split("/")[: 1 + (path.split("/")[0] in known)]) for path in missing}
        logger.warning("no folder has weights for %s: they start fresh", ", ".join(sorted(parts)))
    have |= parameters.some(partial(parameters.initial, setup), jax.random.key(setup.seed), missing)
    return Trained(painter, nested({path: jnp.asarray(have[path]) for path in flat(abstract)}), 0)
