"""Runs: prepare what a config needs, train it, and load what was trained to draw with it and to score it."""

import dataclasses
import functools
import json
import logging
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

from metacanvas_jax import files
from metacanvas_jax.config.load import read_config, write_config
from metacanvas_jax.config.networks import autoencoder, network
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import EMOJI
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.data.formats import records as dataset
from metacanvas_jax.data.inputs import Inputs, sources_of
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.shapes import latent_grid
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import geneval
from metacanvas_jax.evaluate.geneval import Evaluation
from metacanvas_jax.paint import previews
from metacanvas_jax.paint.sampling import Recipe, Target, make_painter
from metacanvas_jax.parallel import distributed
from metacanvas_jax.report import pictures
from metacanvas_jax.tasks import TASKS, Bucket
from metacanvas_jax.train import jobs, store, weights
from metacanvas_jax.train.checkpoints import check_workdir
from metacanvas_jax.train.loop import fit
from metacanvas_jax.train.objectives import mllm_inputs
from metacanvas_jax.train.profiling import Steps
from metacanvas_jax.train.state import TrainState
from metacanvas_jax.trees import flat, merge, nested, partition
from metacanvas_jax.types import Params
from metacanvas_jax.vae.patch_pca import network as patch_pca
from metacanvas_jax.weights import published
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.questions import sample_texts
from metacanvas_jax.worlds.requests import GENEVAL_CATEGORIES
from metacanvas_jax.worlds.scenes import eval_prompts

logger = logging.getLogger(__name__)

SPLITS = ("seen", "held_out")
JUDGED = (*GENEVAL_CATEGORIES, "place")
PREVIEW_PROMPTS = 16


def prepare(setup: Experiment) -> list[Path]:
    """Writes what the config needs and is not there yet: scenes, tokenizer, autoencoder. Returns their places."""
    places = []
    if not setup.sources:
        places.append(dataset.prepare(setup.data.path, setup.world, setup.data.count, setup.seed))
        if setup.data.picture_weight:
            places.append(dataset.prepare_pictures(setup.data.pictures_path, setup.world.size))
    tokenizer = Path(setup.mllm.tokenizer)
    if not tokenizer.exists():
        save_tokenizer(train_tokenizer(sample_texts(setup.world)), tokenizer)
    places.append(tokenizer)
    if isinstance(setup.vae, patch_pca.PatchPcaConfig) and setup.vae_weights:
        folder = Path(setup.vae_weights)
        if not (folder / "params.json").exists():
            records = sources_of(setup, setup.shapes[0])[0].records
            images = np.stack([records[i].image for i in range(min(2000, len(records)))])
            params, psnr = patch_pca.fit(images, setup.vae)
            store.save_params(folder, params, {"psnr": psnr})
        places.append(folder)
    return places


def train(config: ConfigDict, workdir: Path, *, progress: bool = True, profile: Steps | None = None) -> Experiment:
    """Trains a config in a folder, continuing what is there; an MLLM's weights are then saved in ``workdir/weights``.

    The resolved config lies in ``workdir/config.json``, previews in ``workdir/previews``, a trace of the steps
    ``profile`` in ``workdir/profile``.
    """
    setup = experiment(config)
    if setup.sources and all(source.kind in EMOJI or not source.path for source in setup.sources):
        prepare(setup)  # a miniature: tokenizer and autoencoder are all that is missing, and made in seconds
    job = jobs.make_job(setup)
    check_workdir(job, jobs.fit_config(setup), workdir)
    chief = jax.process_index() == 0
    if chief:
        write_config(config, workdir)
    preview = evaluate = None
    if setup.objective == "paint":
        canvas = Canvas(setup)
        preview = functools.partial(_preview, canvas, workdir)
        evaluate = functools.partial(_evaluate, canvas)
    hooks = {"preview": preview, "evaluate": evaluate}
    state, frozen = fit(job, jobs.fit_config(setup), workdir, **hooks, progress=progress, profile=profile)
    if setup.objective == "understand":
        params = distributed.whole(_params(state, frozen))
        if chief:
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
        self._model, self._vae = network(setup), autoencoder(setup)
        self._painter = functools.lru_cache(maxsize=8)(self._make_painter)
        self.inputs = Inputs(setup)

    def _make_painter(self, bucket: Bucket, steps: int, guidance: float, maps: bool, canvas: bool, tile: int):
        setup, grid = self.setup, latent_grid(self.setup, bucket)
        tokens = int(np.prod(grid)) // int(np.prod(self._model.dit.patch))
        sampler = dataclasses.replace(setup.sampler, steps=steps, guidance=guidance)
        target = Target(grid, bucket.task, setup.given_channels, setup.dit_guidance, canvas, tile)
        recipe = Recipe(sampler.make(tokens), sampler.method, guidance)
        return make_painter(self._model, self._vae, recipe, target, maps=maps)

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
        bucket = from_words(self.setup.shapes[0])
        blank = np.zeros((bucket.frames, *bucket.size, 3), np.uint8)
        samples = [Sample(prompt, blank, task=bucket.task) for prompt in prompts]
        drawn = self.paint(
            params, samples, bucket, seed=seed, steps=steps, guidance=guidance, maps=maps, progress=progress
        )
        return Drawn(drawn.pixels[:, 0], drawn.canvas)

    def paint(
        self,
        params: Params,
        samples: Sequence[Sample],
        bucket: Bucket,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        maps: bool = False,
        canvas: bool = True,
        tile: int = 0,
        progress: bool = False,
    ) -> Drawn:
        """Every sample of a task in the shape of a bucket, of whose targets a first frame alone is looked at.

        ``canvas`` False leaves the canvas out; ``tile`` is that of ``sampling.Target``. ``pixels`` are [n t h w 3].
        """
        sampler = self.setup.sampler
        steps = sampler.steps if steps is None else steps
        guidance = sampler.guidance if guidance is None else guidance
        paint = self._painter(bucket, steps, guidance, maps, canvas, tile)
        examples = self.inputs.examples(bucket, target=False)
        # Few sizes of batches, few compilations; but no large picture is drawn for nothing.
        least = 1 if self.setup.buckets else 8
        size = min(self.setup.eval.batch, max(least, len(samples)))
        pixels, features = [], []
        for number, start in enumerate(
            tqdm(range(0, len(samples), size), "drawing", disable=not progress, leave=False)
        ):
            part = list(samples[start : start + size])
            padded = part + part[-1:] * (size - len(part))
            key = jax.random.fold_in(jax.random.key(seed), number)
            empty = mllm_inputs(examples.batch(padded, words=False))
            painted = paint(params, examples.batch(padded), empty, key)
            pixels.append(jobs.to_bytes(distributed.whole(painted.pixels)[: len(part)]))
            if painted.canvas is not None:
                features.append(distributed.whole(painted.canvas)[: len(part)])
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


def from_words(bucket: Bucket) -> Bucket:
    """The bucket itself where its task needs nothing but a prompt, else one of that shape whose task does."""
    if TASKS[bucket.task].vae == TASKS[bucket.task].mllm == "nothing":
        return bucket
    task = "text_to_image" if bucket.frames == 1 else "text_to_video"
    return dataclasses.replace(bucket, task=task, references=0)


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

    def paint(self, samples: Sequence[Sample], bucket: Bucket, **options: Any) -> Drawn:
        """See ``Canvas.paint``."""
        return self.canvas.paint(self.params, samples, bucket, **options)

    def evaluate(self, *, guidance: float | None = None, progress: bool = True) -> Scored:
        """Scores of both splits, with the numbers of prompts that the config says."""
        counts = self.setup.eval
        per_category = dict(zip(SPLITS, (counts.per_category, counts.per_category_held_out), strict=True))
        return self.canvas.evaluate(self.params, per_category, guidance=guidance, progress=progress)


def setup_of(run: Path) -> Experiment:
    """The experiment of a run that paints. Raises UserError for a folder that is none."""
    setup = experiment(read_config(run))
    if setup.objective != "paint":
        raise UserError(f"{run} trained an MLLM alone, which draws nothing")
    return setup


def load(run: Path) -> Trained:
    """The newest complete checkpoint of a run that paints.

    Raises UserError for a folder that is no run, has no checkpoint, or misses its frozen weights.
    """
    setup = setup_of(run)
    with store.Store(run / "checkpoints", writable=False) as checkpoints:
        steps = checkpoints.steps()
        abstract = _abstract(setup)
        trainable, frozen = partition(abstract, setup.train.rules)
        trained = checkpoints.restore_params(trainable, ema=setup.train.ema is not None)
    given = flat(jobs.start_weights(setup, abstract))
    named = {name for name, source in weight_folders(setup).items() if source.place}
    # What no folder holds was made by the seed, in training as here.
    made = _fresh(setup, [path for path in flat(frozen) if path not in given and path.split("/")[0] not in named])
    params = merge(trained, jobs.chosen(nested(given | made), frozen, run))
    return Trained(setup, Canvas(setup), jax.tree.map(jnp.asarray, params), steps[-1])


def _fresh(setup: Experiment, paths: Sequence[str]) -> dict[str, jax.Array]:
    """Parameters as a training of this seed starts with them."""

    def made(key):
        leaves = flat(jobs.unboxed(jobs.initial(setup, key)))
        return {path: leaves[path] for path in paths}

    return jax.jit(made)(jax.random.split(jax.random.key(setup.seed))[0]) if paths else {}


def assembled(setup: Experiment) -> Trained:
    """The networks of a config with the weights of the folders it names; what no folder has starts fresh, by the seed.

    Raises UserError for folders that are missing, damaged, or of other networks.
    """
    for source in weight_folders(setup).values():
        if not source.saved:
            published.check_folder(source.place, source.config, source.key)
    canvas = Canvas(setup)  # its tokenizers are looked for before any weight is read, too
    abstract = _abstract(setup)
    have = flat(weights.load(setup, abstract))
    missing = [path for path in flat(abstract) if path not in have]
    if missing:
        known = {path.split("/")[0] for path in have}
        parts = {"/".join(path.split("/")[: 1 + (path.split("/")[0] in known)]) for path in missing}
        logger.warning("no folder has weights for %s: they start fresh", ", ".join(sorted(parts)))

    def fresh(key):
        leaves = flat(jobs.unboxed(jobs.initial(setup, key)))
        return {path: leaves[path] for path in missing}

    made = jax.jit(fresh)(jax.random.key(setup.seed)) if missing else {}
    params = nested({path: jnp.asarray(have[path] if path in have else made[path]) for path in flat(abstract)})
    return Trained(setup, canvas, params, 0)


def _abstract(setup: Experiment) -> Params:
    return jax.eval_shape(lambda key: jobs.unboxed(jobs.initial(setup, key)), jax.random.key(0))


def _params(state: TrainState, frozen: Params) -> Params:
    return merge(state.params if state.ema is None else state.ema, frozen)


def _preview_tasks(canvas: Canvas, workdir: Path, state: TrainState, frozen: Params, step: int) -> None:
    for bucket in canvas.setup.shapes:
        samples = previews.samples_of(canvas.inputs, bucket)
        drawn = canvas.paint(_params(state, frozen), samples, bucket)
        if jax.process_index() == 0:
            strips = previews.strips(samples, drawn.pixels, bucket)
            page = pictures.grid(strips, [sample.prompt for sample in samples], columns=1)
            files.write(workdir / "previews" / f"{step:08d}_{bucket.task}.png", pictures.png(page))


def _preview(canvas: Canvas, workdir: Path, state: TrainState, frozen: Params, step: int) -> None:
    if canvas.setup.sources:
        return _preview_tasks(canvas, workdir, state, frozen, step)
    scenes = eval_prompts(canvas.setup.world, "seen", -(-PREVIEW_PROMPTS // len(JUDGED)), JUDGED)[:PREVIEW_PROMPTS]
    drawn = canvas.draw(_params(state, frozen), [scene.prompt for scene in scenes])
    if jax.process_index() == 0:
        page = pictures.grid(list(drawn.pixels), [scene.prompt for scene in scenes], columns=4)
        files.write(workdir / "previews" / f"{step:08d}.png", pictures.png(page))


def _evaluate(canvas: Canvas, state: TrainState, frozen: Params, step: int) -> dict[str, float]:
    scored = canvas.evaluate(_params(state, frozen), {"seen": canvas.setup.eval.during_training})
    scores = scored.evaluations["seen"].scores
    return {"score": scores.overall, **{f"score_{name}": value for name, value in scores.categories.items()}}
