"""What one training is: a `Job` says what is trained, a `FitConfig` how long, how often and on which mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
from jaxtyping import Array, Key

from metacanvas_jax.config.identity import identity
from metacanvas_jax.config.networks import autoencoder, keep_float32, network
from metacanvas_jax.config.schema import Experiment, OptimizerConfig
from metacanvas_jax.config.weights import folders
from metacanvas_jax.data import by_size
from metacanvas_jax.data.inputs import batches, text_rows
from metacanvas_jax.data.shapes import batch_shapes
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.train import objectives
from metacanvas_jax.train.contexts import Enrich, context_reader, with_context
from metacanvas_jax.train.parameters import identities, initial, start_weights, unread
from metacanvas_jax.train.step import Loss, Prepare
from metacanvas_jax.trees import Rules
from metacanvas_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything in which one training differs from another, as plain functions and plain data.

    ``init(key)`` makes all parameters as Linen does, with their logical axes. It is only ever traced.
    ``load(abstract)`` gets parameters as shapes with shardings and returns those that it has weights for; the others
    start at random. A run that continues from a checkpoint asks for its frozen parameters only. ``frozen`` maps each
    part of the model that has weights to what identifies their content, ``folders`` to where they lie.
    ``batches()`` opens the stream of batches at its beginning. Arrays have the samples of this process along their
    first axis. If the iterator's state is the same in all processes, another number of processes may continue the run.
    ``config`` is everything else that must be the same when a run continues (nested, JSON-able).
    ``enrich`` adds to a batch on the host; it may read the frozen parameters. ``keep_float32`` are regular expressions
    of frozen parameters that stay float32 whatever ``FitConfig.frozen_dtype`` is.
    ``unread`` are those of frozen parameters that nothing reads: they are not loaded.
    ``shapes()`` are the whole batches of a run by name, as shapes, as they come from ``enrich``. The step is compiled
    for them before the first step.
    """

    init: Callable[[Key[Array, ""]], Params]
    prepare: Prepare
    loss: Loss
    rules: Rules
    batches: Callable[[], grain.DatasetIterator]
    optimizer: OptimizerConfig
    config: Mapping[str, Any]
    load: Callable[[Params], Params] | None = None
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    enrich: Enrich | None = None
    keep_float32: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    shapes: Callable[[], Mapping[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Due:
    """What happens after a step."""

    log: bool
    evaluate: bool
    preview: bool
    save: bool

    @property
    def hooks(self) -> bool:
        """Whether a hook runs."""
        return self.evaluate or self.preview


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long, how often, and on which mesh. A period of 0 means never; a checkpoint is always made at the end.

    These checkpoints are kept: the ``keep_last`` newest, those at multiples of ``keep_every`` and, of those made when
    the training is evaluated, the ``keep_best`` with the highest ``best``. Up to ``max_skips`` batches of a run are
    skipped because their loss or gradient is not finite. Losses ``spike`` standard deviations above the median
    (`Spikes`) are reported, and so are activities that take more than ``stall_s`` seconds. Processes wait ``barrier_s``
    seconds for each other at start and end.
    """

    steps: int
    seed: int = 0
    accumulate: int = 1
    ema_decay: float | None = None
    ema_warmup: bool = True
    frozen_dtype: str = "bfloat16"
    log_every: int = 10
    preview_every: int = 0
    evaluate_every: int = 0
    checkpoint_every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    keep_best: int = 0
    best: str = "score"
    max_skips: int = 0
    spike: float = 10.0
    stall_s: float = 300.0
    barrier_s: int = 1800
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        periods = ("log_every", "preview_every", "evaluate_every", "checkpoint_every")
        for name in (*periods, "keep_best", "max_skips", "spike", "stall_s"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}, expected 0 or more")
        if self.steps < 1 or self.accumulate < 1:
            raise UserError(f"train.steps is {self.steps} and train.accumulate {self.accumulate}, expected at least 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"train.ema is {self.ema_decay}, expected a number in [0, 1) or None")

    def due(self, step: int) -> Due:
        """What happens after ``step``. Everything that ever happens also happens after the last step."""
        last = step == self.steps

        def at(period: int) -> bool:
            return period > 0 and (last or step % period == 0)

        evaluate = at(self.evaluate_every)
        save = last or at(self.checkpoint_every) or (evaluate and self.keep_best > 0)
        return Due(at(self.log_every), evaluate, at(self.preview_every), save)


def fingerprint(job: Job, config: FitConfig) -> dict[str, Any]:
    """What must be the same in a run and in the checkpoint that it continues from."""
    optimizer = dataclasses.asdict(job.optimizer)
    if job.optimizer.schedule == "constant":  # these two then change nothing, and a run may be made longer
        del optimizer["total_steps"], optimizer["final_fraction"]
    names = ("seed", "accumulate", "ema_decay", "ema_warmup", "frozen_dtype")
    return {
        **job.config,
        "optimizer": optimizer,
        "partition": [list(rule) for rule in job.rules],
        "fit": {name: getattr(config, name) for name in names},
    }


def make_job(experiment: Experiment, *, verify: bool = False) -> Job:
    """The job of an experiment; with ``verify``, all bytes of its frozen weights are read and compared.

    Raises UserError when its data, tokenizer or frozen weights are not there, or these are damaged.
    """
    model = network(experiment)
    frozen = {}
    if experiment.objective == "understand":
        prepare, loss = objectives.understanding(model, experiment.recall, experiment.recall_within, experiment.facts)
    else:
        prepare, loss = objectives.painting(
            model,
            autoencoder(experiment),
            experiment.time,
            channels=experiment.given_channels,
            guidance=experiment.dit_guidance,
            canvas_dropout=experiment.data.canvas_dropout,
        )
        frozen = identities(experiment, whole=verify)
    return Job(
        init=lambda key: initial(experiment, key),
        prepare=prepare,
        loss=loss,
        rules=experiment.train.rules,
        batches=lambda: batches(experiment),
        optimizer=experiment.optimizer,
        config=identity(experiment) | by_size.identity(experiment),
        enrich=context_reader(experiment),
        keep_float32=keep_float32(experiment),
        unread=unread(experiment),
        load=lambda abstract: start_weights(experiment, abstract),
        frozen=frozen,
        folders=folders(experiment),
        shapes=None if experiment.objective == "understand" else lambda: fed_shapes(experiment),
    )


def fed_shapes(experiment: Experiment) -> dict[str, Any]:
    """The whole batches of every bucket of a run that paints, as shapes, by the bucket's name.

    Where contexts are stored, a batch has them in place of what they are computed from.
    """
    rows = text_rows(experiment)
    found = {}
    for bucket in by_size.buckets(experiment):
        if bucket.weight > 0 or len(experiment.shapes) == 1:
            batch = batch_shapes(experiment, bucket)
            if rows is not None:  # the instruction's length depends on the tokenizer
                width = rows("x")["text_tokens"].shape[0]
                texts = {name: batch[name] for name in ("text_tokens", "text_mask")}
                batch |= {name: jax.ShapeDtypeStruct((bucket.batch, width), x.dtype) for name, x in texts.items()}
            if experiment.mllm.context_cache:
                batch = with_context(experiment, batch)
            found[bucket.name] = batch
    return found


def fit_config(experiment: Experiment) -> FitConfig:
    """Length and rhythm of the training."""
    train = experiment.train
    return FitConfig(
        steps=train.steps,
        seed=experiment.seed,
        accumulate=train.accumulate,
        ema_decay=train.ema,
        frozen_dtype=train.frozen_dtype,
        log_every=train.log_every,
        preview_every=train.preview_every,
        evaluate_every=train.evaluate_every,
        checkpoint_every=train.checkpoint_every,
        keep_last=train.keep_last,
        keep_every=train.keep_every,
        keep_best=train.keep_best,
        max_skips=train.max_skips,
        stall_s=train.stall_s,
        mesh=experiment.mesh,
    )
