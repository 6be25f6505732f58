"""The stages of ``gpu_full.py`` that run this project: a step, its DiT alone, a training, a drawing, an export."""

import functools
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_full_cases import STEPS, Case, config_of, setup_of

from metacanvas_jax import tasks
from metacanvas_jax.config.networks import network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.inputs import sources_of
from metacanvas_jax.data.shapes import batch_shapes
from metacanvas_jax.diffusion.flow import flow_loss, sample_time
from metacanvas_jax.exchange.export_run import Options, export_run
from metacanvas_jax.launch.training import train
from metacanvas_jax.paint import runs
from metacanvas_jax.parallel import kept
from metacanvas_jax.parallel.mesh import make_mesh, on_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.plan.programs import train_program, with_latents
from metacanvas_jax.train import flops
from metacanvas_jax.train.metrics import peak_flops, read_metrics
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.parameters import as_held, param_shapes, sides
from metacanvas_jax.train.state import new_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.trees import flat, merge, nested, partition, trains
from metacanvas_jax.types import Plan, States

TIMED, SECONDS = 20, 25.0  # at most so many steps are timed, for so long
TRIED = 2  # of a tiny network
DRAWN_STEPS = 4  # of the sampler, in the drawing

Result = dict[str, Any]


def step(case: Case, place: Path, small: bool) -> Result:
    """The train step that `metacanvas plan` compiles, on imported weights; it reads latents."""
    start = time.perf_counter()
    kept.keep(place / "compiled")
    setup = setup_of(case, place / "folders", small)
    params = runs.assembled(setup).params
    jax.block_until_ready(params)
    imported = time.perf_counter()
    reads, mesh = with_latents(setup), make_mesh(setup.mesh, jax.devices()[:1])
    program = train_program(reads, mesh, reads.shapes[0])
    trainable, frozen = sides(setup, params)
    del params
    count = counted(trainable)
    with on_mesh(mesh, RULES):
        compiled = program.lowered.compile()
        state = jax.jit(functools.partial(new_state, optimizer=make_optimizer(setup.optimizer), ema=False))(trainable)
    del trainable
    batch = jax.device_put(random_batch(program.arguments[2], vocabulary(setup)), jax.devices()[0])
    ready = time.perf_counter()
    found = timed(compiled, state, frozen, batch, TRIED if small else TIMED)
    return found | {
        "import_s": imported - start,
        "compile_s": ready - imported,
        "first_step_s": ready - start + found["warmup_s"],
        "flops": flops.flops_of(program.traced),
        "trained": count,
        "samples": case.batch if not small else reads.shapes[0].batch,
        **memory(),
    }


def dit(case: Case, place: Path, small: bool) -> Result:
    """Forward pass, backward pass and update of the DiT alone, of what the case trains of it."""
    kept.keep(place / "compiled")
    setup = with_latents(setup_of(case, place / "folders", small))
    rules, model = setup.train.rules, network(setup)
    shapes = program_batch(setup)
    known = {path: leaf for path, leaf in flat(param_shapes(setup)).items() if path.startswith("dit/")}
    whole = setup_of(case, place / "folders", small)
    params = runs.assembled(whole, needs={path: held_dtype(setup, path) for path in known}).params
    leaves = flat(params)
    trainable = nested({path: leaf for path, leaf in leaves.items() if trains(path, rules)})
    frozen = nested({path: leaf for path, leaf in leaves.items() if not trains(path, rules)})
    del params, leaves
    text = jax.ShapeDtypeStruct((shapes["latents"].shape[0], text_length(setup), setup.dit.context_width), jnp.bfloat16)
    batch = random_batch({"latents": shapes["latents"], "text": text}, 2)
    if "source_latents" in shapes:
        batch |= random_batch({"source": shapes["source_latents"]}, 2)

    def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        noise_key, time_key = jax.random.split(key)
        latents, variables = batch["latents"], {"params": merge(trainable, frozen)}
        noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
        level = sample_time(time_key, latents.shape[:1], setup.time)
        given = tasks.GivenLatents(source=batch.get("source"))
        given = tasks.for_dit(given, noise, channels=setup.given_channels, guidance=setup.dit_guidance)
        plan = Plan(States(batch["text"], jnp.ones(batch["text"].shape[:2], bool)))
        velocity = lambda z, t: model.apply(variables, z, t, plan, given, method="velocity")  # noqa: E731
        return flow_loss(velocity, latents, noise, level), {}

    optimizer = make_optimizer(setup.optimizer)
    run = make_step(lambda frozen, batch, key: batch, loss, optimizer)
    state, count = new_state(trainable, optimizer, ema=False), counted(trainable)
    lowered = run.trace(state, frozen, batch, jax.random.key(0))
    found = timed(lowered.lower().compile(), state, frozen, batch, TRIED if small else TIMED)
    return found | {"flops": flops.flops_of(lowered), "trained": count, "samples": text.shape[0], **memory()}


def timed(run: Callable, state: Any, frozen: Any, batch: Any, steps: int) -> Result:
    """Seconds of a step (median), of the first, the last loss and the number of steps; the state is used up."""
    key, seconds, begun = jax.random.key(0), [], time.perf_counter()
    for i in range(steps + 1):
        start = time.perf_counter()
        state, metrics = run(state, frozen, batch, key)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
        if i >= 3 and time.perf_counter() - begun > SECONDS:
            break
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of step {len(seconds)} is {loss}")
    return {
        "step_s": statistics.median(seconds[1:]),
        "warmup_s": seconds[0],
        "steps": len(seconds) - 1,
        "loss": loss,
    }


def training(case: Case, place: Path, small: bool) -> Result:
    """The training itself, on drawn pixels, with checkpoints; then the second half of it again from the first."""
    whole, again = place / "runs" / case.name, place / "runs" / f"{case.name}_resumed"
    for folder in (whole, again):
        shutil.rmtree(folder, ignore_errors=True)
    config = config_of(case, place / "folders", small)
    trained = flat(partition(param_shapes(setup_of(case, place / "folders", small)), config.train.rules)[0])
    # Two checkpoints of parameters and two moments in float32 lie there at a time.
    needed = 24 * sum(math.prod(leaf.shape) for leaf in trained.values())
    place.mkdir(parents=True, exist_ok=True)
    if needed > 0.9 * (free := shutil.disk_usage(place).free):
        return {"left_out": f"two checkpoints take {needed / 1e9:.0f} GB, {place} has {free / 1e9:.0f} GB left"}
    start = time.perf_counter()
    train(config, whole, progress=False, compiled=place / "compiled")
    seconds, half = time.perf_counter() - start, STEPS // 2
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "config.json", again / "config.json")
    shutil.move(whole / "checkpoints" / str(half), again / "checkpoints" / str(half))
    first = steps_of(whole)
    shutil.rmtree(whole)
    start = time.perf_counter()
    train(config, again, progress=False, compiled=place / "compiled")
    resumed = steps_of(again)
    differ = [i for i in range(half + 1, STEPS + 1) if first[i]["loss"] != resumed[i]["loss"]]
    if differ:
        i = differ[0]
        raise ArithmeticError(f"step {i}: loss {first[i]['loss']}, after the resume {resumed[i]['loss']}")
    speeds = [row["steps_per_second"] for i, row in first.items() if i > 3 and "steps_per_second" in row]
    waits = [row["data_wait"] for i, row in first.items() if i > 3 and "data_wait" in row]
    return {
        "step_s": 1 / statistics.median(speeds),
        "data_wait": statistics.median(waits),
        "steps": STEPS,
        "loss": first[STEPS]["loss"],
        "whole_s": seconds,
        "resumed_s": time.perf_counter() - start,
        "resumed_equal": True,
        **memory(),
    }


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of every step of a run; those of evaluations stand in rows of their own."""
    return {int(row["step"]): row for row in read_metrics(run) if "loss" in row}


def drawing(case: Case, place: Path, small: bool) -> Result:
    """One result of the trained run; where there is none, of the imported weights."""
    kept.keep(place / "compiled")
    run, start = place / "runs" / f"{case.name}_resumed", time.perf_counter()
    trained = runs.load(run) if run.exists() else runs.assembled(setup_of(case, place / "folders", small))
    loaded = time.perf_counter()
    setup, painter = trained.setup, trained.painter
    bucket = setup.shapes[0]
    sample = painter.inputs.examples(bucket).fitted(sources_of(setup, bucket)[0].records[0])
    seconds = []
    for _ in range(2):  # the first compiles
        begun = time.perf_counter()
        pixels = trained.paint([sample], bucket, steps=DRAWN_STEPS).pixels
        seconds.append(time.perf_counter() - begun)
    assert pixels.shape[2:4] == bucket.size
    return {
        "load_s": loaded - start,
        "first_drawing_s": seconds[0],
        "drawing_s": seconds[1],
        "sampler_steps": DRAWN_STEPS,
        "from": "run" if run.exists() else "imported weights",
        **memory(),
    }


def exporting(case: Case, place: Path, small: bool) -> Result:
    """The trained run as a folder for PyTorch."""
    run, to, start = place / "runs" / f"{case.name}_resumed", place / "exported", time.perf_counter()
    if not run.exists():
        return {"left_out": f"there is no {run}: its training was left out, failed or has not run"}
    shutil.rmtree(to, ignore_errors=True)
    export_run(run, to, Options("bfloat16", progress=False))
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    shutil.rmtree(to)
    return {"export_s": time.perf_counter() - start, "export_GB": size / 1e9}


def memory() -> Result:
    """Largest GiB of the device so far; nothing on a CPU, which does not count."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {"peak_GiB": None if peak is None else peak / 2**30, "peak_flops": peak_flops(jax.devices()[0])}


def counted(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def held_dtype(setup: Experiment, path: str) -> np.dtype:
    """The dtype in which a training holds a parameter."""
    return np.dtype(flat(as_held(setup, nested({path: flat(param_shapes(setup))[path]})))[path].dtype)


def program_batch(setup: Experiment) -> dict[str, Any]:
    """The batch of the case's bucket, as shapes."""
    return batch_shapes(setup, setup.shapes[0])


def text_length(setup: Experiment) -> int:
    """How many text states the DiT reads."""
    if setup.text is not None:
        return setup.text.length
    queries = 0 if setup.queries is None else setup.queries.count
    return setup.shapes[0].length + queries


def vocabulary(setup: Experiment) -> int:
    sizes = [setup.mllm.language.vocab]
    return min(sizes if setup.text is None else [*sizes, setup.text.encoder.vocab])


def random_batch(shapes: Any, tokens: int) -> Any:
    """Random values for a batch of network inputs: every token is a real one, media lie at the beginning."""
    rng = np.random.default_rng(0)

    def fill(path: tuple, x: Any) -> np.ndarray:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if name == "positions":
            return np.broadcast_to(np.arange(x.shape[-1], dtype=x.dtype), x.shape)
        if name == "slots":
            places = np.arange(math.prod(x.shape[1:]), dtype=x.dtype).reshape(x.shape[1:])
            return np.broadcast_to(places, x.shape)
        if np.issubdtype(x.dtype, np.integer):
            return rng.integers(0, tokens, x.shape).astype(x.dtype)
        return rng.standard_normal(x.shape, np.float32).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


STAGES = {"step": step, "dit": dit, "training": training, "drawing": drawing, "export": exporting}
