"""From an experiment to a training: what is made, loaded, frozen, read and minimised."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from metacanvas_jax import build, tasks
from metacanvas_jax.build import Experiment, autoencoder, network
from metacanvas_jax.cli.options import read_config
from metacanvas_jax.data.examples import PaintExamples, TextRows, UnderstandExamples, media_layout
from metacanvas_jax.data.formats.records import Records
from metacanvas_jax.data.mixture import Mixture, Source, Stream
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.samples import LATENTS
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.tokenizer import load_tokenizer
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.context_cache import ContextCache
from metacanvas_jax.mllm.qwen2_5_vl.media import MediaConfig
from metacanvas_jax.mllm.qwen2_5_vl.prompt import PromptConfig, Prompter
from metacanvas_jax.parallel.mesh import batch_part, make_mesh
from metacanvas_jax.tasks import Bucket, Given
from metacanvas_jax.text.gemma2.network import INSTRUCTION
from metacanvas_jax.train import contexts, latents, objectives, store, weights
from metacanvas_jax.train.loop import FitConfig, Job
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.types import Context, Grid, Media, MllmInputs, Params, Text

INSTRUCTION_TOKENS = 240  # of SANA's instruction, about


def make_job(experiment: Experiment) -> Job:
    """The job of an experiment. Raises UserError when its data, tokenizer or frozen weights are not there."""
    model = network(experiment)
    frozen = {}
    if experiment.objective == "understand":
        prepare, loss = objectives.understanding(model, experiment.recall, experiment.recall_within)
    else:
        prepare, loss = objectives.painting(
            model,
            autoencoder(experiment),
            experiment.time,
            channels=experiment.given_channels,
            guidance=experiment.dit_guidance,
        )
        frozen = weights.identities(experiment)
    return Job(
        init=lambda key: initial(experiment, key),
        prepare=prepare,
        loss=loss,
        rules=experiment.train.rules,
        batches=lambda: batches(experiment),
        optimizer=experiment.optimizer,
        config=identity(experiment),
        enrich=context_reader(experiment),
        load=lambda abstract: start_weights(experiment, abstract),
        frozen=frozen,
    )


def context_reader(experiment: Experiment) -> contexts.Enrich | None:
    """Batches with contexts from the folder ``mllm.context_cache``, None where the config names none.

    Raises UserError when the networks that contexts come from train, or have no weights.
    """
    section, model = experiment.mllm, network(experiment)
    if not section.context_cache or experiment.objective != "paint":
        return None
    sources = {part: source for part, source in weights.sources(experiment).items() if part in ("mllm", "text")}
    names = {part: source.identity() for part, source in sources.items()}
    contexts.check_frozen(lambda key: initial(experiment, key), experiment.train.rules, names)
    networks = {part: source.config for part, source in sources.items()}
    identity = contexts.identity(networks, names, experiment.train.frozen_dtype)
    writes = experiment.canvas is not None or experiment.queries is not None
    cache = ContextCache(section.context_cache, identity, keys_values=writes)

    def read(frozen: Params, inputs: MllmInputs) -> Context:
        return model.apply({"params": {name: frozen[name] for name in names}}, inputs, method="read")

    return contexts.stored_contexts(cache, objectives.mllm_inputs, read)


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


def latent_grid(experiment: Experiment, bucket: Bucket | None = None) -> Grid:
    """Frames, rows and columns of the latents of a bucket, the experiment's first unless given."""
    vae = autoencoder(experiment)
    bucket = experiment.shapes[0] if bucket is None else bucket
    rows, columns = bucket.size
    if rows % vae.spatial or columns % vae.spatial:
        raise UserError(
            f"config: pictures of {rows} x {columns} px do not divide by the autoencoder's factor {vae.spatial}"
        )
    return ((bucket.frames - 1) // vae.temporal + 1, rows // vae.spatial, columns // vae.spatial)


def initial(experiment: Experiment, key: Key[Array, ""]) -> Params:
    """All parameters with their logical axes: the model's and, beside them under ``vae``, the autoencoder's."""
    model = network(experiment)
    inputs = smallest_inputs(experiment)
    if experiment.objective == "understand":
        width = experiment.mllm.language.width
        written = jnp.zeros((1, 1, width)), jnp.zeros((3, 1, 1), jnp.int32)
        return model.init(key, inputs, *written)["params"]
    vae = autoencoder(experiment)
    size = experiment.shapes[0].size
    latents = jnp.zeros((1, 1, *latent_grid(experiment)[1:], vae.channels), jnp.float32)
    condition = tasks.condition(
        Given(),
        jnp.zeros((1, 1, 1), jnp.float32),
        latents,
        channels=experiment.given_channels,
        guidance=experiment.dit_guidance,
    )
    keys = {"params": key, "dropout": key}
    params = model.init(keys, inputs, latents, jnp.ones((1,), jnp.float32), condition)["params"]
    vae_params = vae.init(key, jnp.zeros((1, 1, *size, 3), jnp.float32))["params"]
    return params | {"vae": vae_params}


def smallest_inputs(experiment: Experiment) -> MllmInputs:
    """One sample of two tokens, the first of them an image if the MLLM can see: enough to make all parameters."""
    media: tuple[Media, ...] = ()
    vision = experiment.mllm.vision
    if vision is not None:
        grid = (1, vision.merge, vision.merge)
        patches = jnp.zeros((1, 1, vision.merge**2, vision.patch_values), jnp.float32)
        media = (Media(patches, jnp.zeros((1, 1, 1), jnp.int32), grid),)
    zeros = jnp.zeros((1, 2), jnp.int32)
    text = None
    if experiment.text is not None:
        blank = jnp.zeros((1, experiment.text.length), jnp.int32)
        text = Text(blank, blank == 0)
    return MllmInputs(zeros, jnp.broadcast_to(zeros, (3, 1, 2)), zeros == 0, media, text)


def frozen_weights(experiment: Experiment, abstract: Params) -> Params:
    """The weights of the folders that the config names, by the part of the model they are for."""
    return weights.load(experiment, abstract)


def start_weights(experiment: Experiment, abstract: Params) -> Params:
    """What a new run begins with: the weights that the config names and, over them, what the run ``start`` trained.

    Raises UserError when something is not there, or that run has none of this one's parameters or one of another shape.
    """
    loaded = frozen_weights(experiment, abstract)
    if not experiment.start:
        return loaded
    run = Path(experiment.start)
    before = build.experiment(read_config(run))
    known, shapes = flat(abstract), jax.eval_shape(lambda key: unboxed(initial(before, key)), jax.random.key(0))
    trained = flat(partition(shapes, before.train.rules)[0])
    here = trained.keys() & known.keys()
    for path in sorted(here):
        if trained[path].shape != known[path].shape:
            both = f"{trained[path].shape} there and {known[path].shape} here"
            raise UserError(f"{run}, the config's 'start': {path} has shape {both}")
    if not here:
        raise UserError(f"{run} trained nothing that this run has; it is the config's 'start'")
    wanted = nested({path: known[path] if path in here else leaf for path, leaf in trained.items()})
    with store.Store(run / "checkpoints", writable=False) as checkpoints:
        restored = flat(checkpoints.restore_params(wanted, ema=before.train.ema is not None))
    return nested(flat(loaded) | {path: restored[path] for path in here})


def unboxed(params: Params) -> Params:
    """Parameters without their logical axes."""
    return nn.meta.unbox(params)


def chosen(weights: Params, wanted: Params, where: object) -> Params:
    """The leaves of ``weights`` that ``wanted`` has. Raises UserError for one that is missing."""
    have = flat(weights)
    if missing := [path for path in flat(wanted) if path not in have]:
        raise UserError(f"{where}: no weights for the frozen parameter {missing[0]} ({len(missing)} are missing)")
    return nested({path: have[path] for path in flat(wanted)})


def prompter(experiment: Experiment) -> Prompter:
    """Makes the experiment's prompts. Raises UserError when the tokenizer is missing or larger than the vocabulary."""
    section = experiment.mllm
    tokenizer = load_tokenizer(section.tokenizer)
    if len(tokenizer) > section.language.vocab:
        raise UserError(
            f"config: mllm.language.vocab is {section.language.vocab}, "
            f"but the tokenizer in {section.tokenizer} has {len(tokenizer)} tokens"
        )
    assistant = experiment.objective == "understand"
    config = PromptConfig(
        buckets=section.buckets, system=section.system, assistant=assistant, media=media_config(experiment)
    )
    return Prompter(tokenizer, config)


def media_config(experiment: Experiment) -> MediaConfig:
    """How images and videos become patches of the MLLM; the published way where it cannot see."""
    section = experiment.mllm
    if section.vision is None:
        return MediaConfig()
    return MediaConfig(
        patch=section.vision.patch,
        merge=section.vision.merge,
        tokens=section.image_tokens,
        image_pixels=section.image_pixels or MediaConfig.image_pixels,
    )


def text_rows(experiment: Experiment) -> TextRows | None:
    """Prompts for the DiT's own text encoder; None where there is none. Raises UserError for a missing tokenizer."""
    section = experiment.text
    if section is None:
        return None
    instruction = INSTRUCTION if section.instruction else ""
    tokenizer = load_tokenizer(section.tokenizer)
    return TextRows(tokenizer, section.length, instruction=instruction, reads_prompt=section.reads_prompt)


def paint_examples(experiment: Experiment, bucket: Bucket, *, stored: bool = False) -> PaintExamples:
    """Samples of a bucket, which bring their latents if ``stored``, to arrays. Raises UserError for no tokenizer."""
    prompts = prompter(experiment) if experiment.uses_mllm else None
    shape = (*latent_grid(experiment, bucket), autoencoder(experiment).channels) if stored else None
    rate = experiment.mllm.video_fps
    return PaintExamples(prompts, bucket, text=text_rows(experiment), video_fps=rate, latents=shape)


def batch_shapes(experiment: Experiment, bucket: Bucket) -> dict[str, Any]:
    """The arrays of a whole batch of a bucket as shapes, for a painter; needs no file.

    The length of SANA's instruction depends on the tokenizer, which may not be there: ``INSTRUCTION_TOKENS`` stands in.
    """
    array, b, (rows, columns) = jax.ShapeDtypeStruct, bucket.batch, bucket.size
    length = bucket.length if experiment.uses_mllm else 1
    task = tasks.TASKS[bucket.task]
    batch: dict[str, Any] = {
        "pixels": array((b, bucket.frames, rows, columns, 3), np.uint8),
        "tokens": array((b, length), np.int32),
        "positions": array((b, 3, length), np.int32),
        "mask": array((b, length), np.bool_),
        "task": tasks.TaskName(bucket.task),
    }
    if task.vae == "source":
        batch["source"] = batch["pixels"]
    if task.vae == "references":
        batch["references"] = array((b, bucket.references, rows, columns, 3), np.uint8)
    if latents.stored(experiment, bucket):
        grid, channels = latent_grid(experiment, bucket), autoencoder(experiment).channels
        for part in LATENTS.keys() & batch.keys():
            frames = bucket.references if part == "references" else grid[0]
            batch.pop(part)
            batch[LATENTS[part]] = array((b, frames, *grid[1:], channels), np.float32)
    if experiment.text is not None:
        text = experiment.text
        instructed = text.instruction and text.reads_prompt
        width = text.length + (INSTRUCTION_TOKENS - 2 if instructed else 0)
        batch |= {"text_tokens": array((b, width), np.int32), "text_mask": array((b, width), np.bool_)}
    media = media_config(experiment)
    layout = media_layout(bucket, media, experiment.mllm.video_fps) if experiment.uses_mllm else ()
    groups = []
    for grid, count in layout:
        merged = int(np.prod(grid)) // media.merge**2
        patches = array((b, count, int(np.prod(grid)), media.values), np.float32)
        groups.append(Media(patches, array((b, count, merged), np.int32), grid))
    return batch | ({"media": tuple(groups)} if groups else {})


def batches(experiment: Experiment) -> grain.DatasetIterator:
    """The stream of this process's batches, from its beginning: its part of every batch on the experiment's mesh."""
    if experiment.objective == "understand":
        examples = UnderstandExamples(prompter(experiment), experiment.world, max(experiment.mllm.buckets))
        return iter(_stream(experiment, _world_records(experiment)[:1], examples, experiment.train.batch))
    streams = []
    for number, bucket in enumerate(experiment.shapes):
        stored = latents.stored(experiment, bucket)
        examples = paint_examples(experiment, bucket, stored=stored)
        sources = sources_of(experiment, bucket, stored=stored)
        batches = _stream(experiment, sources, examples, bucket.batch, seed=number)
        rows, columns = bucket.size
        streams.append(Stream(f"{bucket.task} {bucket.frames}x{rows}x{columns}", batches, bucket.weight))
    return iter(streams[0].batches) if len(streams) == 1 else Mixture(streams, experiment.seed)


def sources_of(experiment: Experiment, bucket: Bucket, *, stored: bool = False) -> list[Source]:
    """The sources of a bucket's task, in its shape; their pixels, unless the samples' latents are wanted (``stored``).

    Raises UserError when there is none, one is not there, or its latents are not those of this experiment.
    """
    if not experiment.sources:
        return _world_records(experiment)
    clip = Clip(bucket.size, bucket.frames, bucket.fps if bucket.frames > 1 else None)
    sections = [section for section in experiment.sources if section.task == bucket.task]
    if stored:
        for section in sections:
            latents.check(experiment, section, clip)
    else:
        sections = [dataclasses.replace(section, latents=False) for section in sections]
    opened = [Source(open_source(section, clip, experiment.world), section.weight) for section in sections]
    if not opened:
        raise UserError(f"config: no source has the task {bucket.task!r}, which a bucket draws")
    return opened


def _world_records(experiment: Experiment) -> list[Source]:
    data = experiment.data
    sources = [Source(Records(data.path, data.max_skips, data.in_memory), 1.0 - data.picture_weight)]
    if data.picture_weight and experiment.objective == "paint":
        sources.append(Source(Records(data.pictures_path, data.max_skips, data.in_memory), data.picture_weight))
    return sources


def _stream(
    experiment: Experiment,
    sources: list[Source],
    examples: PaintExamples | UnderstandExamples,
    batch: int,
    seed: int = 0,
) -> grain.IterDataset:
    part, parts = (0, 1) if jax.process_count() == 1 else batch_part(make_mesh(experiment.mesh))
    config = PipelineConfig(
        batch=batch,
        seed=experiment.seed + 1000 * seed,  # far from the numbers of the sources, which are added to it
        caption_dropout=experiment.data.caption_dropout if experiment.objective == "paint" else 0.0,
        threads=experiment.data.threads,
    )
    return pipeline(sources, config, examples.collate, format=examples, process_index=part, process_count=parts)


def empty_prompts(prompts: Prompter, count: int, length: int) -> MllmInputs:
    """The empty prompt, ``count`` times: the other half of guidance."""
    return jax.tree.map(jnp.asarray, prompts.batch(prompts.texts([""] * count), length=length))


def encode_prompts(prompts: Prompter, texts: list[str], length: int) -> MllmInputs:
    """Prompts of text only, padded to ``length``. Raises UserError for one that is too long."""
    return jax.tree.map(jnp.asarray, prompts.batch(prompts.texts(texts), length=length))


def identity(experiment: Experiment) -> dict[str, Any]:
    """What a resumed run must agree on: everything but how often it writes and where its files lie."""
    tree = dataclasses.asdict(experiment)
    for name in ("optimizer", "eval", "sampler", "name", "mesh"):
        tree.pop(name)
    train = tree.pop("train")
    tree["batch"] = train["batch"]
    for section, name in (
        ("data", "path"),
        ("data", "pictures_path"),
        ("mllm", "weights"),
        ("mllm", "tokenizer"),
        ("mllm", "context_cache"),
    ):
        tree[section].pop(name)
    for name in ("vae_weights", "dit_weights", "start"):
        tree.pop(name)
    for name in ("weights", "tokenizer"):
        (tree["text"] or {}).pop(name, None)
    for source in tree["sources"]:
        for name in ("path", "cache", "in_memory", "latents"):
            source.pop(name)
    # Checkpoints of before these keys existed were made with what is their default.
    defaults = {"mllm": {"image_tokens": None, "video_fps": 2.0}, "dit": {"lora": None}}
    for section, values in defaults.items():
        for name, value in values.items():
            if tree[section] is not None and name in tree[section] and tree[section][name] == value:
                tree[section].pop(name)
    for name in ("text", "dit_guidance", "buckets", "sources"):
        if not tree[name]:
            tree.pop(name)
    return tree


def to_bytes(pixels: Array) -> np.ndarray:
    """Pixels in [-1, 1] to uint8 on the host."""
    return np.asarray(jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)).astype(np.uint8)
