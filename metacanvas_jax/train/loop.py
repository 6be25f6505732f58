"""The training loop: from the initial state, or the newest checkpoint, straight to the last step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax

from metacanvas_jax import files
from metacanvas_jax.errors import Preempted, UserError
from metacanvas_jax.parallel.distributed import barrier, client
from metacanvas_jax.parallel.mesh import batch_part, make_mesh, on_mesh, put_batch
from metacanvas_jax.parallel.rules import RULES, Rules
from metacanvas_jax.parallel.watch import Watch
from metacanvas_jax.train import start
from metacanvas_jax.train.boards import Boards
from metacanvas_jax.train.checkpoints import Checkpoints
from metacanvas_jax.train.hooks import Hook, Hooks
from metacanvas_jax.train.in_flight import InFlight, Started
from metacanvas_jax.train.job import FitConfig, Job
from metacanvas_jax.train.log import Log
from metacanvas_jax.train.metrics import peak_flops
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.preemption import Preemption
from metacanvas_jax.train.profiling import Profiler, Steps
from metacanvas_jax.train.programs import Programs
from metacanvas_jax.train.state import TrainState
from metacanvas_jax.train.step import make_step
from metacanvas_jax.train.tensorboard import TensorBoard
from metacanvas_jax.types import Params

# Steps the host may be ahead of the device: enough to hide the host's work, few enough to bound the batches in memory.
AHEAD = 2


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
    rules: Rules = RULES,
    profile: Steps | None = None,
    boards: Boards | None = None,
) -> tuple[TrainState, Params]:
    """Trains to ``config.steps`` and returns the final state and the frozen parameters.

    ``workdir`` (local, or ``gs://`` and the like) gets ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``. If it
    holds complete checkpoints, the run continues from the newest one and ends with the same bits as a run that was
    never stopped. ``peak`` is the FLOP/s of one device, for the MFU, where the table of chips does not have it;
    ``devices`` are those of the mesh, all by default. ``boards`` show the run, TensorBoard by default. A trace of the
    steps ``profile`` is written into ``profile/``.

    Raises:
        NonFiniteError: loss or gradient were not finite, and no more batches may be skipped. ``nonfinite/`` then holds
            the state before that step, its batch and the batch's position, so that a step from there repeats it.
        Preempted: the run was asked to stop, and everything is saved.
        UserError: a checkpoint of another config, rules or weights that do not fit the model, data that ended, a
            ``workdir`` that cannot be written, or processes that did not start.
    """
    with Watch(client(), config.stall_s) as watch, Preemption() as preemption:
        watch.at(0, "loads")
        workdir = files.folder(workdir)
        mesh = make_mesh(config.mesh, devices)
        init_key, key = jax.random.split(jax.random.key(config.seed))
        optimizer = make_optimizer(job.optimizer)
        shapes = start.shapes(job, config, optimizer, mesh, rules)
        batches = job.batches()
        checkpoints = Checkpoints(workdir, job, config, batches)
        state, frozen = start.begin(job, config, optimizer, init_key, shapes, checkpoints)
        done, skips, parts = int(state.step), int(state.skipped), batch_part(mesh, rules)[1]
        step = make_step(
            job.prepare,
            job.loss,
            optimizer,
            accumulate=config.accumulate,
            ema_decay=config.ema_decay,
            ema_warmup=config.ema_warmup,
            max_skips=config.max_skips,
            state_shardings=shapes.shardings,
        )
        boards = {"TensorBoard": TensorBoard} if boards is None else boards
        peak = peak_flops(mesh.devices.flat[0]) if peak is None else peak
        log = Log(workdir, done, config.steps, mesh.size, progress=progress, peak=peak, boards=boards)
        programs = Programs(step, mesh, rules, log, watch)
        if done:
            log.note(f"continues   from step {done:,} in {checkpoints.store.folder}")
        in_flight = InFlight(config, job.optimizer, checkpoints, log, watch, parts=parts, skips=skips)
        hooks = Hooks(evaluate, preview, config, log, watch, preemption)

        barrier("start of the training", config.barrier_s)
        with checkpoints, log, on_mesh(mesh, rules), Profiler(workdir, profile) as profiler:
            if job.shapes is not None and done < config.steps:
                programs.prepare(state, frozen, key, job.shapes(), done)
            if checkpoints.owed:
                hooks.run_owed(state, frozen, done, workdir)
            for now in range(done + 1, config.steps + 1):
                watch.at(now, "reads a batch")
                position = batches.get_state()
                with log.waiting():
                    batch = _next(batches, now, config.steps)
                    fed = batch if job.enrich is None else job.enrich(frozen, batch, mesh, rules)
                fed = put_batch(fed, mesh, rules)
                program = programs.at(state, frozen, fed, key, now)
                watch.at(now, "starts the step")
                with profiler.begin(now):
                    state, metrics = program.call(state, frozen, fed, key)
                in_flight.add(Started(now, metrics, position, batch, program.flops))
                preemption.begin()
                in_flight.settle(state, AHEAD)
                checkpoints.store.check()
                if profiler.ends(now):
                    in_flight.settle(state)
                    with log.paused():
                        profiler.end()

                leaving, due = preemption.reached(now), config.due(now)
                if not (leaving or due.hooks or due.save):
                    continue
                in_flight.settle(state)
                score, owed = (None, due.hooks) if leaving else hooks.run(state, frozen, now, due)
                leaving = leaving or owed
                if due.save or leaving:
                    watch.at(now, "saves a checkpoint")
                    with log.paused():
                        log.flush()  # first, so that a checkpoint is never ahead of its metrics
                        checkpoints.save(state, owed=owed, score=score)
                if leaving:
                    checkpoints.store.wait()
                    raise Preempted(
                        f"asked to stop; the checkpoint of step {now} is complete in {checkpoints.store.folder}"
                    )
            watch.at(config.steps, "waits for the last checkpoint")
            checkpoints.store.wait()
        barrier("end of the training", config.barrier_s)
    return state, frozen


def _next(batches: grain.DatasetIterator, now: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise UserError(f"the data ended before step {now} of {steps}; repeat it or train for fewer steps") from None
