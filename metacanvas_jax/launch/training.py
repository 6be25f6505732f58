"""Trains a config in a folder, with previews and scores on the way."""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from metacanvas_jax import files
from metacanvas_jax.config.load import write_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.inputs import batches, opened
from metacanvas_jax.errors import Preempted, UserError, first_line
from metacanvas_jax.evaluate import evaluators
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.launch import run_report, sweeps
from metacanvas_jax.launch.prepare import make_missing
from metacanvas_jax.launch.run_log import RUN, logged
from metacanvas_jax.launch.summary import Summary, summary
from metacanvas_jax.locks import locked
from metacanvas_jax.paint import previews
from metacanvas_jax.paint.painter import NonFinitePixels, Painter
from metacanvas_jax.parallel import distributed, kept
from metacanvas_jax.report.pictures import Picture
from metacanvas_jax.train.boards import Boards
from metacanvas_jax.train.checkpoints import check_workdir
from metacanvas_jax.train.job import fit_config, make_job
from metacanvas_jax.train.loop import fit
from metacanvas_jax.train.profiling import Steps
from metacanvas_jax.train.state import TrainState
from metacanvas_jax.train.tensorboard import TensorBoard
from metacanvas_jax.train.weights_and_biases import WeightsAndBiases
from metacanvas_jax.trees import merge
from metacanvas_jax.types import Params
from metacanvas_jax.weights import saved

logger = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    progress: bool = True,
    profile: Steps | None = None,
    verify: bool = False,
    compiled: Path | None = None,
    wandb: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> Experiment:
    """Trains a config in a folder and continues what is there. A taught MLLM is then saved in ``workdir/weights``.

    The resolved config lies in ``workdir/config.json``, previews in ``workdir/previews``, a trace of the steps
    ``profile`` in ``workdir/profile``, a page about all of it in ``workdir/report.html``, and the error that the run
    ended with in ``workdir/error.txt`` and, with all it said, in ``workdir/log.txt``. With ``verify``, all bytes of the
    frozen weights are compared. ``compiled`` is the folder where this process keeps what it compiles from now on
    (`parallel/kept.py`). The run is shown in TensorBoard and, with ``wandb``, in that project of Weights & Biases.
    ``notes`` are lines of the block that the run starts with.

    Raises UserError when another process trains in the folder.
    """
    with kept_error(workdir, mine=False):
        setup = experiment(config)
        make_missing(setup)
        job = make_job(setup, verify=verify)
        if setup.objective == "paint" and setup.train.evaluate_every:
            evaluators.check(setup, evaluators.names_of(setup), asked_at(setup, workdir, 0))
    check_workdir(job, fit_config(setup), workdir)
    if compiled is not None:
        kept.keep(compiled)
    chief = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if chief:
            stack.enter_context(locked(workdir))
        stack.enter_context(kept_error(workdir, mine=True))
        if chief:
            stack.enter_context(logged(workdir))
        data = opened(setup)
        job = dataclasses.replace(job, batches=lambda: batches(setup, data))
        block = summary(setup, data, notes)
        if block.trained == 0:
            raise UserError("config: train.rules freeze every parameter, so that there is nothing to train")
        if chief:
            write_config(config, workdir)
            block.save(workdir)
            RUN.info("training in %s\n%s", workdir, block.text())
            if progress:
                print(block.text(), file=sys.stderr)
        hooks = hooks_of(setup, workdir) if setup.objective == "paint" else {}
        boards = boards_of(config, block, wandb)
        how = {"progress": progress, "profile": profile, "boards": boards}
        state, frozen = fit(job, fit_config(setup), workdir, **hooks, **how)
        if setup.objective == "understand":
            params = distributed.whole(params_of(state, frozen))
            if chief:
                saved.save(workdir / "weights", params, {"name": setup.name, "step": int(state.step)})
        if chief:
            page = run_report.write(workdir)
            RUN.info("trained to step %d; %s", int(state.step), page)
            if progress:
                print(f"report      {page}", file=sys.stderr)
    return setup


@contextlib.contextmanager
def kept_error(workdir: Path, *, mine: bool) -> Iterator[None]:
    """Writes the error of a run into its folder, for those who do not see its output; an earlier one is removed.

    The first process writes. With ``mine`` False the folder may be that of another run, whose lock is then respected,
    and no folder is made on this machine.
    """
    path = workdir / sweeps.ERROR
    if mine and jax.process_index() == 0 and path.exists():
        path.unlink()
    try:
        yield
    except Exception as error:
        there = mine or not files.is_local(workdir) or workdir.exists()
        if not isinstance(error, Preempted) and there and jax.process_index() == 0:
            with contextlib.suppress(UserError, OSError), contextlib.nullcontext() if mine else locked(workdir):
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
                files.write(path, f"{text}\n")
        raise


def boards_of(config: ConfigDict, block: Summary, wandb: str | None) -> Boards:
    """TensorBoard with the texts of the run and, with the name of a project, Weights & Biases with its values."""
    values = config.to_json_best_effort(indent=1)
    boards: Boards = {"TensorBoard": partial(TensorBoard, texts={"config": values, "run": block.text()})}
    if wandb is None:
        return boards
    about = {"project": wandb, "name": block.name, "config": json.loads(values)}
    return {**boards, "Weights & Biases": partial(WeightsAndBiases, **about)}


def hooks_of(setup: Experiment, workdir: Path) -> dict:
    """What a training that paints does beside its steps, as arguments of ``fit``."""
    painter, names = Painter(setup), evaluators.names_of(setup)

    def preview(state: TrainState, frozen: Params, step: int) -> dict[str, Picture]:
        with warned("the preview", step):
            return previews.write(painter, params_of(state, frozen), workdir / "previews", step)
        return {}

    def evaluate(state: TrainState, frozen: Params, step: int) -> dict[str, float]:
        with warned("the evaluation", step):
            results = evaluators.run(painter, params_of(state, frozen), names, asked_at(setup, workdir, step))
            return evaluators.metrics_of(results)
        return {}

    return {"preview": preview, "evaluate": evaluate}


def asked_at(setup: Experiment, workdir: Path, step: int) -> Asked:
    """How a training is evaluated after a step; what benchmarks draw lies in ``workdir/evaluations``."""
    section, out = setup.eval, workdir / "evaluations" / f"{step:08d}"
    return Asked(training=True, data=section.data, limit=section.limit, out=out, step=step)


@contextlib.contextmanager
def warned(what: str, step: int) -> Iterator[None]:
    """Turns pictures that are not finite into a warning: a training whose loss is finite goes on."""
    try:
        yield
    except NonFinitePixels as error:
        logger.warning("step %d: %s was left out: %s", step, what, error)


def params_of(state: TrainState, frozen: Params) -> Params:
    """All parameters: the moving average of what trains, where there is one, and what is frozen."""
    return merge(state.params if state.ema is None else state.ema, frozen)
