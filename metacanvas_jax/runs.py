"""Runs: prepare what a config needs, train it, and load what was trained to draw with it and to score it."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from metacanvas_jax.build import Experiment, autoencoder, experiment, network
from metacanvas_jax.ckpt import store
from metacanvas_jax.cli.options import read_config, write_config
from metacanvas_jax.data import dataset
from metacanvas_jax.data.questions import sample_texts
from metacanvas_jax.data.requests import GENEVAL_CATEGORIES
from metacanvas_jax.data.scenes import eval_prompts
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.eval import geneval, pictures
from metacanvas_jax.eval.geneval import Evaluation
from metacanvas_jax.eval.judge import Judge
from metacanvas_jax.sampling import make_painter
from metacanvas_jax.train import jobs
from metacanvas_jax.train.loop import check_workdir, fit
from metacanvas_jax.train.partition import merge, partition
from metacanvas_jax.train.state import TrainState
from metacanvas_jax.types import Params
from metacanvas_jax.vae import patch_pca

SPLITS = ("seen", "held_out")
JUDGED = (*GENEVAL_CATEGORIES, "place")
PREVIEW_PROMPTS = 16


def prepare(setup: Experiment) -> list[Path]:
    """Writes what the config needs and is not there yet: scenes, tokenizer, autoencoder. Returns their places."""
    places = [dataset.prepare(setup.data.path, setup.world, setup.data.count, setup.seed)]
    if setup.data.picture_weight:
        places.append(dataset.prepare_pictures(setup.data.pictures_path, setup.world.size))
    tokenizer = Path(setup.mllm.tokenizer)
    if not tokenizer.exists():
        save_tokenizer(train_tokenizer(sample_texts(setup.world)), tokenizer)
    places.append(tokenizer)
    if isinstance(setup.vae, patch_pca.PatchPcaConfig) and setup.vae_weights:
        folder = Path(setup.vae_weights)
        if not (folder / "params.json").exists():
            records = dataset.Records(setup.data.path)
            images = np.stack([records[i].image for i in range(min(2000, len(records)))])
            params, psnr = patch_pca.fit(images, setup.vae)
            store.save_params(folder, params, {"psnr": psnr})
        places.append(folder)
    return places


def train(config: ConfigDict, workdir: Path, *, progress: bool = True) -> Experiment:
    """Trains a config in a folder, continuing what is there; an MLLM's weights are then saved in ``workdir/weights``.

    The resolved config lies in ``workdir/config.json``, previews in ``workdir/previews``.
    """
    setup = experiment(config)
    job = jobs.make_job(setup)
    check_workdir(job, jobs.fit_config(setup), workdir)
    write_config(config, workdir)
    preview = evaluate = None
    if setup.objective == "paint":
        canvas = Canvas(setup)
        preview = functools.partial(_preview, canvas, workdir)
        evaluate = functools.partial(_evaluate, canvas)
    state, frozen = fit(job, jobs.fit_config(setup), workdir, preview=preview, evaluate=evaluate, progress=progress)
    if setup.objective == "understand":
        params = merge(state.params if state.ema is None else state.ema, frozen)
        store.save_params(workdir / "weights", params, {"name": setup.name, "step": int(state.step)})
    return setup


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures, and the canvas features of each (None unless asked for, or without a canvas)."""

    pixels: UInt8[np.ndarray, "n h w 3"]
    canvas: Float[np.ndarray, "n t y x d"] | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """Evaluations and pictures of the splits."""

    evaluations: Mapping[str, Evaluation]
    pictures: Mapping[str, Drawn]

    def table(self) -> str:
        """Scores per category, one column per split."""
        return geneval.table({name: evaluation.scores for name, evaluation in self.evaluations.items()})

    def save(self, path: Path) -> None:
        """All scores as JSON."""
        tree = {name: evaluation.scores.to_dict() for name, evaluation in self.evaluations.items()}
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(json.dumps(tree, indent=1) + "\n")
        os.replace(draft, path)


class Canvas:
    """What an experiment draws with: networks, prompts and compiled painters; parameters are arguments."""

    def __init__(self, setup: Experiment):
        self.setup = setup
        self.prompter = jobs.prompter(setup)
        self.length = max(setup.mllm.buckets)
        self._model, self._vae = network(setup), autoencoder(setup)
        self._grid = jobs.latent_grid(setup)
        self._painter = functools.lru_cache(maxsize=8)(self._make_painter)

    def _make_painter(self, steps: int, guidance: float, maps: bool):
        sampler = dataclasses.replace(self.setup.sampler, steps=steps, guidance=guidance)
        schedule = sampler.make(int(np.prod(self._grid)))
        return make_painter(self._model, self._vae, schedule, sampler.method, guidance, self._grid, maps=maps)

    def draw(
        self,
        params: Params,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        maps: bool = False,
        progress: bool = False,
    ) -> Drawn:
        """One picture per prompt; the noise of a picture depends on the seed and its place in the list."""
        sampler = self.setup.sampler
        paint = self._painter(
            sampler.steps if steps is None else steps, sampler.guidance if guidance is None else guidance, maps
        )
        size = min(self.setup.eval.batch, max(8, len(prompts)))
        empty = jobs.empty_prompts(self.prompter, size, self.length)
        pixels, features = [], []
        for number, start in enumerate(
            tqdm(range(0, len(prompts), size), "drawing", disable=not progress, leave=False)
        ):
            part = list(prompts[start : start + size])
            inputs = jobs.encode_prompts(self.prompter, part + [""] * (size - len(part)), self.length)
            painted = paint(params, inputs, empty, jax.random.fold_in(jax.random.key(seed), number))
            pixels.append(jobs.to_bytes(painted.pixels[: len(part), 0]))
            if painted.canvas is not None:
                features.append(np.asarray(painted.canvas[: len(part)]))
        return Drawn(np.concatenate(pixels), np.concatenate(features) if features else None)

    def evaluate(
        self, params: Params, per_category: Mapping[str, int], *, guidance: float | None = None, progress: bool = False
    ) -> Scored:
        """Draws and judges the evaluation prompts of the splits."""
        judge, evaluations, drawings = Judge(self.setup.world), {}, {}
        for split, count in per_category.items():
            scenes = eval_prompts(self.setup.world, split, count, JUDGED)
            drawn = self.draw(
                params,
                [scene.prompt for scene in scenes],
                seed=self.setup.eval.seed,
                guidance=guidance,
                maps=True,
                progress=progress,
            )
            evaluations[split] = geneval.evaluate(judge, drawn.pixels, scenes)
            drawings[split] = drawn
        return Scored(evaluations, drawings)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run: its experiment, its networks and all their parameters (the moving average where there is one)."""

    setup: Experiment
    canvas: Canvas
    params: Params
    step: int

    def draw(self, prompts: Sequence[str], **options: Any) -> Drawn:
        """See ``Canvas.draw``."""
        return self.canvas.draw(self.params, prompts, **options)

    def evaluate(self, *, guidance: float | None = None, progress: bool = True) -> Scored:
        """Scores of both splits, with the numbers of prompts that the config says."""
        counts = self.setup.eval
        per_category = dict(zip(SPLITS, (counts.per_category, counts.per_category_held_out), strict=True))
        return self.canvas.evaluate(self.params, per_category, guidance=guidance, progress=progress)


def load(run: Path) -> Trained:
    """The newest complete checkpoint of a run that paints.

    Raises UserError for a folder that is no run, has no checkpoint, or misses its frozen weights.
    """
    setup = experiment(read_config(run))
    if setup.objective != "paint":
        raise UserError(f"{run} trained an MLLM alone, which draws nothing")
    with store.Store(run / "checkpoints", writable=False) as checkpoints:
        steps = checkpoints.steps()
        abstract = jax.eval_shape(lambda key: jobs.unboxed(jobs.initial(setup, key)), jax.random.key(0))
        trainable, frozen = partition(abstract, setup.train.rules)
        trained = checkpoints.restore_params(trainable, ema=setup.train.ema is not None)
    weights = jobs.frozen_weights(setup, abstract)
    params = merge(trained, jobs.chosen(weights, frozen, run))
    return Trained(setup, Canvas(setup), jax.tree.map(jnp.asarray, params), steps[-1])


def _params(state: TrainState, frozen: Params) -> Params:
    return merge(state.params if state.ema is None else state.ema, frozen)


def _preview(canvas: Canvas, workdir: Path, state: TrainState, frozen: Params, step: int) -> None:
    scenes = eval_prompts(canvas.setup.world, "seen", -(-PREVIEW_PROMPTS // len(JUDGED)), JUDGED)[:PREVIEW_PROMPTS]
    drawn = canvas.draw(_params(state, frozen), [scene.prompt for scene in scenes])
    folder = workdir / "previews"
    folder.mkdir(exist_ok=True)
    captions = [scene.prompt for scene in scenes]
    pictures.save_png(pictures.grid(list(drawn.pixels), captions, columns=4), folder / f"{step:08d}.png")


def _evaluate(canvas: Canvas, state: TrainState, frozen: Params, step: int) -> dict[str, float]:
    scored = canvas.evaluate(_params(state, frozen), {"seen": canvas.setup.eval.during_training})
    scores = scored.evaluations["seen"].scores
    return {"score": scores.overall, **{f"score_{name}": value for name, value in scores.categories.items()}}
