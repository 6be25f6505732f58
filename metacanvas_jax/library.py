"""What a program or a notebook uses of the project, under short names: ``import metacanvas_jax as mc``.

The names are those of ``NAMES`` in ``metacanvas_jax/__init__.py``. The package itself imports none of them before they
are used, so that importing it is quick and sets nothing up. `docs/library.md` walks through them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from jaxtyping import Array, Key

from metacanvas_jax import files
from metacanvas_jax.config import load, read
from metacanvas_jax.config.networks import autoencoder, network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.batch import Batch
from metacanvas_jax.data.inputs import Inputs
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch.prepare import prepare as prepare
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.paint.painter import Drawn as Drawn
from metacanvas_jax.paint.painter import Painter as Painter
from metacanvas_jax.paint.runs import Trained, assembled
from metacanvas_jax.paint.runs import load as load_run  # noqa: F401
from metacanvas_jax.report.canvas_maps import canvas_maps as canvas_maps
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train import objectives, parameters
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import TrainState, cast, new_state
from metacanvas_jax.train.step import Metrics, Step, make_step
from metacanvas_jax.trees import merge, partition
from metacanvas_jax.types import Given as Given
from metacanvas_jax.types import Params
from metacanvas_jax.types import States as States
from metacanvas_jax.types import Tokens as Tokens


def experiment(spec: str | Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """A config as validated dataclasses.

    Args:
        spec: a config file and its variant, such as ``configs/t2i_lora.py:miniature``, or the folder of a run.
        changes: values by key, such as ``{"train.steps": 10}``; they have the types of those in the config.

    Raises:
        UserError: no such file, variant or key, a value of another type, or values that contradict each other.
    """
    run = files.folder(spec)
    config = load.read_config(run) if (run / "config.json").exists() else load.load_config(str(spec), [])
    for key, value in (changes or {}).items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"config {spec}: {key}={value!r}: {error.args[0] if error.args else error}") from error
    return read.experiment(config)


def build(setup: Experiment) -> MetaCanvas:
    """The network of an experiment that paints. A part is replaced with ``build(setup).clone(dit=other)``."""
    if setup.objective != "paint":
        raise UserError(f"config: objective is {setup.objective!r}, expected 'paint'")
    return network(setup)


def init(setup: Experiment, model: MetaCanvas | None = None, *, seed: int | None = None) -> Params:
    """Random parameters of the whole network, and of the autoencoder under ``vae``, by the config's seed or another."""
    key = jax.random.key(setup.seed if seed is None else seed)
    return jax.jit(lambda key: nn.meta.unbox(parameters.initial(setup, key, model)))(key)


def assemble(setup: Experiment, *, verify: bool = False) -> Trained:
    """The network of an experiment with the weights of the folders that its config names; see ``runs.assembled``."""
    return assembled(setup, verify=verify)


def batch(setup: Experiment, samples: Sequence[Sample], bucket: Bucket | None = None) -> Batch:
    """Samples as network inputs (numpy arrays with the samples first), in a bucket's shape.

    All samples have the task and the size of ``bucket``, which is the config's first unless given. Raises UserError for
    a prompt that is too long, and where the tokenizer is missing.
    """
    return Inputs(setup).examples(setup.drawn[0] if bucket is None else bucket).batch(list(samples))


@struct.dataclass
class Training:
    """A training as plain values: ``state, metrics = t.step(t.state, t.frozen, batch, t.key)``.

    The step donates the state: keep the one that it returns. ``key`` stays the same; the step folds its number in.
    """

    state: TrainState
    frozen: Params
    key: Key[Array, ""]
    step: Step = struct.field(pytree_node=False)

    def __call__(self, batch: Batch) -> tuple["Training", Metrics]:
        """One step on a batch."""
        state, metrics = self.step(self.state, self.frozen, batch, self.key)
        return self.replace(state=state), metrics

    @property
    def params(self) -> Params:
        """All parameters: the moving average of what trains, where there is one, and what is frozen."""
        return merge(self.state.params if self.state.ema is None else self.state.ema, self.frozen)


def training(setup: Experiment, params: Params, model: MetaCanvas | None = None) -> Training:
    """A training of an experiment on one device from given parameters: its loss, rules, optimizer and average.

    `metacanvas train` is this and a loop with data, checkpoints, a mesh and logs. ``model`` is the network where it is
    not that of the config.
    """
    prepare, loss = objectives.painting(
        build(setup) if model is None else model,
        autoencoder(setup),
        setup.time,
        channels=setup.given_channels,
        guidance=setup.dit_guidance,
        canvas_dropout=setup.data.canvas_dropout,
    )
    optimizer = make_optimizer(setup.optimizer)
    trainable, frozen = partition(params, setup.train.rules)
    step = make_step(
        prepare, loss, optimizer, accumulate=setup.train.accumulate, ema_decay=setup.train.ema, max_skips=0
    )
    state = new_state(trainable, optimizer, ema=setup.train.ema is not None)
    return Training(state, cast(frozen, setup.train.frozen_dtype), jax.random.key(setup.seed), step)
