"""The training loop: one straight line from an initial state, or the newest checkpoint, to the last step."""

import collections
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from safetensors.numpy import save as safetensors_bytes
from tqdm import tqdm

from metacanvas_jax import files
from metacanvas_jax.errors import Preempted, UserError
from metacanvas_jax.parallel.distributed import barrier, client
from metacanvas_jax.parallel.mesh import MeshConfig, batch_part, make_mesh, on_mesh, put_batch
from metacanvas_jax.parallel.rules import RULES, check_whole, placed, shardings
from metacanvas_jax.parallel.rules import Rules as ShardingRules
from metacanvas_jax.parallel.watch import WAITS, Watch
from metacanvas_jax.train.contexts import Enrich
from metacanvas_jax.train.metrics import Meter, Writer, model_flops_utilisation, peak_flops, read_metrics
from metacanvas_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from metacanvas_jax.train.preemption import Interrupted, Preemption
from metacanvas_jax.train.profiling import Profiler, Steps
from metacanvas_jax.train.spikes import Spikes
from metacanvas_jax.train.state import TrainState, abstract_state, cast, new_state
from metacanvas_jax.train.step import Loss, Prepare, make_step
from metacanvas_jax.train.store import Store, check_same, describe
from metacanvas_jax.trees import Rules, flat, nested, partition
from metacanvas_jax.types import Params
from metacanvas_jax.weights.hashes import paths

Hook = Callable[[TrainState, Params, int], Mapping[str, float] | None]
"""``hook(state, frozen, step)``; what it returns is logged. It must not keep the state, which the next step donates."""

# Steps the host may be ahead of the device: enough to hide the host's work, few enough to bound the batches in memory.
AHEAD = 2


class NonFiniteError(UserError):
    """Loss or gradient were not finite; the message names the step and where the state before it lies."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What one training differs in from another: plain functions and plain data.

    ``init(key)`` makes all parameters as Linen does (with their logical axes) and is traced, never run as it stands.
    ``load(abstract)`` gets all parameters as shapes with shardings and returns those it has weights for, instead of
    their random start; ``frozen`` says where frozen weights came from and their hash. ``batches()`` opens the stream of
    batches from its beginning; arrays have the samples of this process along the first axis. Where the iterator's state
    is the same in all processes, a run may be continued by another number of them. ``config`` is everything else that a
    resumed run must agree on (nested, JSON-able). ``enrich`` adds to a batch on the host, and may read the frozen
    parameters. ``flops_per_step`` counts the model's operations.
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
    enrich: Enrich | None = None
    flops_per_step: float | None = None


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long, how often, and on which mesh; 0 turns a period off. A checkpoint is always made at the end.

    Kept are the ``keep_last`` newest checkpoints, those at multiples of ``keep_every`` and, of those made when the
    training is scored, the ``keep_best`` with the highest ``best``. ``max_skips`` batches of a run may be skipped
    because their loss or gradient is not finite; losses from ``spike`` standard deviations (`Spikes`) and activities of
    more than ``stall_s`` seconds are reported. Processes wait ``barrier_s`` seconds for each other at start and end.
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
                raise UserError(f"fit.{name} is {getattr(self, name)}, expected 0 or more")
        if self.steps < 1 or self.accumulate < 1:
            raise UserError(f"fit.steps is {self.steps} and fit.accumulate {self.accumulate}, expected at least 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"fit.ema_decay is {self.ema_decay}, expected a number in [0, 1) or None")


def fit(
    job: Job,
    config: FitConfig,
    workdir: str | Path,
    *,
    preview: Hook | None = None,
    evaluate: Hook | None = None,
    progress: bool = True,
    peak: float | None = None,
    devices: Sequence[Any] | None = None,
    rules: ShardingRules = RULES,
    profile: Steps | None = None,
) -> tuple[TrainState, Params]:
    """Trains to ``config.steps`` and returns the final state and the frozen parameters.

    ``workdir`` (local, or ``gs://`` and the like) gets ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``. If it
    holds complete checkpoints the newest one is continued, bit for bit as if nothing had happened. ``peak`` is the
    FLOP/s of one device for MFU, where the table does not know it; ``devices`` are those of the mesh, all by default.
    Of the steps ``profile`` a trace is written into ``profile/``.

    Raises:
        NonFiniteError: loss or gradient were not finite, and no more batches may be skipped; ``nonfinite/`` then holds
            the state before that step, its batch and the batch's position, so that a step from there repeats it.
        Preempted: the run was asked to stop, and everything is saved.
        UserError: a checkpoint of another config, rules or weights that do not fit the model, data that ended, a
            ``workdir`` that cannot be written, or processes that did not come.
    """
    with Watch(client(), config.stall_s) as watch, Preemption() as preemption:
        workdir = files.folder(workdir)
        mesh = make_mesh(config.mesh, devices)
        optimizer = make_optimizer(job.optimizer)
        init_key, key = jax.random.split(jax.random.key(config.seed))
        meta = describe(fingerprint(job, config), job.frozen)

        # What there is to train, where it lives, and from where it goes on
        watch.at(0, "loads")
        boxed = jax.eval_shape(job.init, init_key)
        abstract = placed(boxed, shardings(boxed, mesh, rules, config.mesh.whole))
        check_whole(abstract, meant=config.mesh.whole)
        abstract_trainable, abstract_frozen = partition(abstract, job.rules)
        target = abstract_state(abstract_trainable, optimizer, mesh, ema=config.ema_decay is not None)
        layout = jax.tree.map(lambda x: x.sharding, target)
        batches = job.batches()
        at = workdir / "checkpoints"
        store = Store(at, keep_last=config.keep_last, keep_every=config.keep_every, keep_best=config.keep_best)
        saved = store.meta() if store.steps() else None
        if saved is not None:
            check_same(saved, meta, str(store.folder))  # before any weights are read
        loaded = {} if job.load is None else _loaded(job.load(abstract), abstract)
        frozen = _cast(_start(job, init_key, abstract_frozen, loaded), config.frozen_dtype)
        if saved is not None:
            state = store.restore(target, batches, meta)
        else:
            trainable = _start(job, init_key, abstract_trainable, loaded)
            ema = config.ema_decay is not None
            state = jax.jit(lambda params: new_state(params, optimizer, ema=ema), out_shardings=layout)(trainable)
            del trainable
        del loaded
        done, skips = int(state.step), int(state.skipped)
        spikes = Spikes(config.spike, () if saved is None else saved["recent_losses"])

        step = make_step(
            job.prepare,
            job.loss,
            optimizer,
            accumulate=config.accumulate,
            ema_decay=config.ema_decay,
            ema_warmup=config.ema_warmup,
            max_skips=config.max_skips,
            state_shardings=layout,
        )
        rate_of = jax.jit(lambda n: learning_rate(job.optimizer, n))
        peak = peak_flops(mesh.devices.flat[0]) if peak is None else peak
        meter, parts = Meter(), batch_part(mesh, rules)[1]
        in_flight: collections.deque[tuple[int, dict[str, Array], dict[str, Any], Any]] = collections.deque()

        def settle(ahead: int) -> None:
            """Waits until the device is at most ``ahead`` steps behind; logs what has come in, stops if not finite."""
            nonlocal skips
            while len(in_flight) > ahead:
                now, metrics, position, batch = in_flight.popleft()
                watch.at(now, WAITS)
                loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
                if float(metrics["finite"]) == 0.0:
                    raise NonFiniteError(
                        f"step {now}: loss {loss}, gradient norm {norm}, after {skips} batches skipped "
                        f"(max_skips {config.max_skips}); {keep(now - 1, position, batch)}"
                    )
                if float(metrics["skipped"]) > skips:
                    skips += 1
                    note(f"step {now}: loss {loss}, gradient norm {norm}: batch skipped, {skips} of {config.max_skips}")
                    log(now, {"loss": loss, "grad_norm": norm, "skipped": skips})
                elif (usual := spikes.usual(loss)) is not None:
                    note(f"step {now}: loss {loss:.4g}, far above the usual {usual:.4g}; gradient norm {norm:.4g}")
                    log(now, {"spike": loss, "spike_above": usual, "spike_grad_norm": norm})
                meter.tick(jax.tree.leaves(batch)[0].shape[0] * parts)
                bar.set_description("training", refresh=False)
                bar.update()
                if _due(now, config.log_every, config.steps):
                    scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
                    rates = meter.read()
                    if rates is not None:
                        speed = rates[0]
                        scalars |= {"steps_per_second": speed, "samples_per_second": rates[1]}
                        if job.flops_per_step is not None and peak is not None:
                            scalars["mfu"] = model_flops_utilisation(job.flops_per_step, 1 / speed, peak, mesh.size)
                    log(now, scalars | {"learning_rate": float(rate_of(now - 1 - skips))})
                    bar.set_postfix({name: f"{scalars[name]:.4g}" for name in SHOWN if name in scalars}, refresh=False)

        def keep(before: int, position: dict[str, Any], batch: Any) -> str:
            """Saves the state before a failure and the batch of this process; says where."""
            folder = workdir / "nonfinite"
            batches.set_state(position)
            with Store(folder, keep_last=1) as inspect:
                healthy = state.replace(finite=jnp.ones_like(state.finite))
                inspect.save(healthy, batches, meta | {"recent_losses": spikes.recent, "owed": False})
            arrays = dict(zip(paths(batch), map(np.ascontiguousarray, jax.tree.leaves(batch)), strict=True))
            name = f"batch_of_step_{before + 1}_process_{jax.process_index()}.safetensors"
            files.write(folder / name, safetensors_bytes(arrays))
            return f"the state before it and its batch's position are in {folder / str(before)}, the batch in {name}"

        def note(text: str) -> None:
            if chief:
                tqdm.write(text, file=sys.stderr)

        def log(now: int, scalars: Mapping[str, float] | None) -> None:
            if writer is not None and scalars:
                writer.write(now, dict(scalars))

        def show(now: int, evaluating: bool, previewing: bool) -> float | None:
            """Runs the hooks, logs what they say all at once, and returns the score."""
            rows = []
            with meter.paused():
                if evaluating and evaluate is not None:
                    watch.at(now, "evaluates")
                    rows.append(evaluate(state, frozen, now))
                if previewing and preview is not None:
                    watch.at(now, "draws previews")
                    rows.append(preview(state, frozen, now))
            for row in rows:
                log(now, row)
            return next((row[config.best] for row in rows if row and config.best in row), None)

        def save(owed: bool = False, score: float | None = None) -> None:
            """First the records, then the checkpoint: a checkpoint is never ahead of its metrics."""
            watch.at(int(state.step), "saves a checkpoint")
            if writer is not None:
                writer.flush()
            store.save(state, batches, meta | {"recent_losses": spikes.recent, "owed": owed}, score=score)

        chief = jax.process_index() == 0
        writer = Writer(workdir, done) if chief else None
        bar = tqdm(total=config.steps, initial=done, unit="step", file=sys.stderr, disable=not (progress and chief))
        bar.set_description("compiling")
        barrier("start of the training", config.barrier_s)
        with _closing(store, bar, writer), on_mesh(mesh, rules), Profiler(workdir, profile) as profiler:
            if saved is not None and saved["owed"]:  # stopped before the hooks of its last step were done
                scored = any(row["step"] == done and config.best in row for row in read_metrics(workdir))
                evaluating = _due(done, config.evaluate_every, config.steps) and not scored
                show(done, evaluating, _due(done, config.preview_every, config.steps))
            for now in range(done + 1, config.steps + 1):
                watch.at(now, "reads a batch")
                position = batches.get_state()
                batch = _next(batches, now, config.steps)
                fed = batch if job.enrich is None else job.enrich(frozen, batch, mesh, rules)
                watch.at(now, "starts the step")
                with profiler.begin(now):
                    state, metrics = step(state, frozen, put_batch(fed, mesh, rules), key)
                in_flight.append((now, metrics, position, batch))
                preemption.begin()
                settle(AHEAD)
                store.check()
                if profiler.ends(now):
                    settle(0)
                    with meter.paused():
                        profiler.end()

                leaving = preemption.reached(now)
                evaluating = _due(now, config.evaluate_every, config.steps)
                previewing = _due(now, config.preview_every, config.steps)
                saving = now == config.steps or _due(now, config.checkpoint_every)
                saving |= evaluating and config.keep_best > 0
                if not (leaving or evaluating or previewing or saving):
                    continue
                settle(0)
                score, owed = None, leaving and (evaluating or previewing)
                if not leaving and (evaluating or previewing):
                    try:
                        with preemption.interrupting():
                            score = show(now, evaluating, previewing)
                    except Interrupted:
                        leaving = owed = True
                if saving or leaving:
                    with meter.paused():
                        save(owed, score)
                if leaving:
                    store.wait()
                    raise Preempted(f"asked to stop; the checkpoint of step {now} is complete in {store.folder}")
            watch.at(config.steps, "waits for the last checkpoint")
            store.wait()
        barrier("end of the training", config.barrier_s)
    return state, frozen


@contextlib.contextmanager
def _closing(store: Store, bar: tqdm, writer: Writer | None) -> Iterator[None]:
    """Closes all three. After an error, another error of the closing would only hide it."""
    try:
        yield
    except BaseException as error:
        bar.close()
        with contextlib.suppress(UserError):
            if writer is not None:
                writer.close()
        with contextlib.suppress(UserError):
            if client() is None or isinstance(error, Preempted):  # else it may wait for a process that is gone
                store.close()
        raise
    bar.close()
    if writer is not None:
        writer.close()
    store.close()


def check_workdir(job: Job, config: FitConfig, workdir: str | Path) -> None:
    """Raises UserError if ``workdir`` holds checkpoints of another config, before anything is written there."""
    folder = files.folder(workdir) / "checkpoints"
    if folder.exists():
        with Store(folder, writable=False) as store:
            if store.steps():
                check_same(store.meta(), describe(fingerprint(job, config), job.frozen), str(folder))


SHOWN = ("loss", "samples_per_second", "mfu")


def _due(step: int, every: int, last: int | None = None) -> bool:
    """Every so many steps and, where ``last`` is given, at the last one too."""
    return every > 0 and (step % every == 0 or step == last)


def _next(batches: grain.DatasetIterator, now: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise UserError(f"the data ended before step {now} of {steps}; repeat it or train for fewer steps") from None


def fingerprint(job: Job, config: FitConfig) -> dict[str, Any]:
    """What a run must agree on with the checkpoint it continues."""
    optimizer = dataclasses.asdict(job.optimizer)
    if job.optimizer.schedule == "constant":  # then it does not matter, and a run may be prolonged
        del optimizer["total_steps"], optimizer["final_fraction"]
    names = ("seed", "accumulate", "ema_decay", "ema_warmup", "frozen_dtype")
    return {
        **job.config,
        "optimizer": optimizer,
        "partition": [list(rule) for rule in job.rules],
        "fit": {name: getattr(config, name) for name in names},
    }


def _loaded(params: Params, abstract: Params) -> dict[str, Any]:
    """Checked leaves by path, on the mesh."""
    known, leaves = flat(abstract), flat(params)
    for path, leaf in leaves.items():
        if path not in known:
            raise UserError(f"loaded parameter {path} is not one of the model's")
        if tuple(leaf.shape) != known[path].shape:
            raise UserError(
                f"loaded parameter {path} has shape {tuple(leaf.shape)}, the model's is {known[path].shape}"
            )
    return {path: jax.device_put(leaf, known[path].sharding) for path, leaf in leaves.items()}


def _start(job: Job, key: Key[Array, ""], abstract: Params, loaded: Mapping[str, Any]) -> Params:
    """Loaded parameters as they are, the others from ``init``, of which only these are computed, in place."""
    wanted = flat(abstract)
    missing = {path: leaf.sharding for path, leaf in wanted.items() if path not in loaded}

    def init(key):
        leaves = flat(nn.meta.unbox(job.init(key)))
        return {path: leaves[path] for path in missing}

    made = jax.jit(init, out_shardings=missing)(key) if missing else {}
    return nested({path: loaded[path] if path in loaded else made[path] for path in wanted})


def _cast(frozen: Params, dtype: str) -> Params:
    # Leaf by leaf, so that never two copies of everything are held.
    leaves = flat(frozen)
    for path in leaves:
        leaves[path] = cast(leaves[path], dtype)
    return nested(leaves)
