"""The validation loss of a run: of samples that training does not read, at fixed noise levels and with fixed noise.

The loss of a training step has noise levels of its own, so that it is noisy and its mean says little about large
models. This one is the same function of the parameters at every step: curves and runs can be compared. It is computed
with and without the canvas. It needs one forward pass per noise level, and draws nothing.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from metacanvas_jax import files
from metacanvas_jax.config.networks import autoencoder, network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.diffusion import flow
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.evaluate.held_out import held_out, of_tasks
from metacanvas_jax.paint.painter import Painter, noise_key
from metacanvas_jax.paint.spread import Spread
from metacanvas_jax.tasks import TASKS, Bucket, for_dit, frame_levels, loss_mask
from metacanvas_jax.train import objectives
from metacanvas_jax.types import Params

WIDTH = 46  # letters of a row's name in the table
Losses = Mapping[float, float]
"""The mean loss at each noise level."""


@dataclasses.dataclass(frozen=True)
class FlowLoss:
    """Losses of each task, with the canvas and (None: the model has none) without; ``samples`` are those of a task."""

    canvas: Mapping[str, Losses]
    bare: Mapping[str, Losses] | None
    samples: Mapping[str, int]

    def metrics(self) -> dict[str, float]:
        """``val_loss``, the mean over levels and then over tasks, of each task, and without canvas."""
        means = {task: mean(losses) for task, losses in self.canvas.items()}
        whole = float(np.mean(list(means.values())))
        values = {"score": -whole, "val_loss": whole, **{f"val_loss_{task}": value for task, value in means.items()}}
        if self.bare is not None:
            values["val_loss_no_canvas"] = float(np.mean([mean(losses) for losses in self.bare.values()]))
        return values

    def table(self) -> str:
        """One row per task and one column per noise level."""
        levels = list(next(iter(self.canvas.values())))
        lines = ["".join(["loss at noise level".ljust(WIDTH), *(f"{level:9.2f}" for level in levels), "     mean"])]
        for name, rows in (("", self.canvas), (", no canvas", self.bare or {})):
            for task, losses in rows.items():
                values = [*losses.values(), mean(losses)]
                count = self.samples[task]
                label = f"{task}{name} ({count} sample{'s' * (count > 1)})"
                lines.append("".join([label.ljust(WIDTH), *(f"{value:9.4f}" for value in values)]))
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """All losses as JSON."""
        files.write(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def mean(losses: Losses) -> float:
    """The mean over all noise levels."""
    return float(np.mean(list(losses.values())))


def evaluate(painter: Painter, params: Params, asked: Asked) -> FlowLoss:
    """The losses of every task that the run trains. Raises UserError where no samples are held out."""
    setup = painter.setup
    count = setup.eval.samples if asked.limit is None else min(asked.limit, setup.eval.samples)
    both = [True, False] if setup.canvas is not None and asked.canvas else [False]
    found: dict[bool, dict[str, Losses]] = {canvas: {} for canvas in both}
    samples = {}
    for task, bucket in of_tasks(setup).items():
        records = held_out(setup, bucket, as_trained=True)
        samples[task] = min(count, len(records))
        losses = _of_bucket(painter, params, bucket, records, samples[task], both, asked)
        for canvas in both:
            found[canvas][task] = losses[canvas]
    return FlowLoss(found[both[0]], found[False] if len(both) > 1 else None, samples)


def _of_bucket(
    painter: Painter, params: Params, bucket: Bucket, records: Any, count: int, both: list[bool], asked: Asked
) -> dict[bool, Losses]:
    """The mean losses of a bucket's first ``count`` records, with and without canvas as ``both`` says."""
    setup, spread = painter.setup, Spread.of(params)
    examples = painter.inputs.examples(bucket, stored=records.stored)
    prepare, level_loss = _programs(setup, bucket)
    size = spread.batch(min(count, max(1, bucket.batch // setup.train.accumulate)))
    key = noise_key(setup.eval.seed if asked.seed is None else asked.seed)
    sums = {canvas: dict.fromkeys(setup.eval.levels, 0.0) for canvas in both}
    with spread.open():
        for start in range(0, count, size):
            mine = range(size)[spread.share(size)]
            rows = [records[min(start + i, count - 1)] for i in mine]
            batch = spread.put(examples.collate([examples(row) for row in rows]))
            places = np.arange(start, start + size, dtype=np.int32)
            real = places < count
            prepared = prepare(params, batch)
            for number, level in enumerate(setup.eval.levels):
                for canvas in both:
                    keys = jax.random.fold_in(key, number)
                    loss = level_loss(params, prepared, places, keys, np.float32(level), real, canvas)
                    sums[canvas][level] += float(loss) * int(real.sum())
    return {canvas: {level: total / count for level, total in losses.items()} for canvas, losses in sums.items()}


@functools.lru_cache(maxsize=16)
def _programs(setup: Experiment, bucket: Bucket) -> tuple[Callable, Callable]:
    """``prepare(params, batch)`` runs the frozen networks; ``loss(params, prepared, places, key, level, real, canvas)``
    is the mean over the samples that are ``real``, whose noise depends on ``key`` and on their ``places``."""
    model, task = network(setup), TASKS[bucket.task]
    ready, _ = objectives.painting(model, autoencoder(setup), setup.time)

    @jax.jit
    def prepare(params: Params, batch: Any) -> objectives.Prepared:
        return ready(params, batch, jax.random.key(0))

    @functools.partial(jax.jit, static_argnames="canvas")
    def loss(
        params: Params,
        prepared: objectives.Prepared,
        places: Int[Array, " b"],
        key: Array,
        level: Float[Array, ""],
        real: Bool[Array, " b"],
        canvas: bool,
    ) -> Float[Array, ""]:
        variables = {"params": {name: tree for name, tree in params.items() if name != "vae"}}
        latents = prepared.latents
        count, frames = latents.shape[:2]
        shape = None if model.canvas is None else model.canvas.config.shape_for(latents.shape[1:4])
        plan = model.apply(variables, prepared.context, shape, method="plan")
        plan = plan if canvas else plan.replace(canvas=None)
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), latents.shape[1:], latents.dtype))
        given = for_dit(prepared.given, latents, channels=setup.given_channels, guidance=setup.dit_guidance)
        counted = real[:, None, None, None]
        if (some := loss_mask(task, count, frames)) is not None:
            counted = counted & some
        return flow.flow_loss(
            lambda z, t: model.apply(variables, z, t, plan, given, method="velocity"),
            latents,
            noise(places),
            frame_levels(task, jnp.full((count,), level, jnp.float32), frames),
            counted,
        )

    return prepare, loss
