"""From an experiment and a bucket to examples and batches, for training, drawing and precomputation."""

import dataclasses

import grain
import jax

from metacanvas_jax.build import Experiment, autoencoder
from metacanvas_jax.data import latents
from metacanvas_jax.data.examples import PaintExamples, TextRows, UnderstandExamples
from metacanvas_jax.data.formats.records import Records
from metacanvas_jax.data.mixture import Mixture, Source, Stream
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.shapes import latent_grid, media_config
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.tokenizer import load_tokenizer
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.qwen2_5_vl.prompt import PromptConfig, Prompter
from metacanvas_jax.parallel.mesh import batch_part, make_mesh
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.text.gemma2.network import INSTRUCTION


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
