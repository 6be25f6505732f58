"""From an experiment and a bucket to network inputs and their sources, for training, drawing and precomputation."""

import dataclasses
import logging
from collections.abc import Sequence

import grain
import jax

from metacanvas_jax import registry
from metacanvas_jax.config.networks import autoencoder
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data import by_size, latents, lengths
from metacanvas_jax.data.conversations import UnderstandExamples
from metacanvas_jax.data.examples import PaintExamples, TextRows
from metacanvas_jax.data.formats.records import Records
from metacanvas_jax.data.mixture import Mixture, RandomAccess, Source, Stream
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.shapes import latent_grid, media_config
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.split import Part, split
from metacanvas_jax.data.tokenizer import load_tokenizer
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.parallel.mesh import batch_part, make_mesh
from metacanvas_jax.tasks import RECONSTRUCT, Bucket
from metacanvas_jax.text.prompts import INSTRUCTION

logger = logging.getLogger(__name__)


def prompter(experiment: Experiment) -> Prompter:
    """The maker of an experiment's prompts.

    Raises UserError for a tokenizer that is missing, or has more tokens than the vocabulary of the MLLM.
    """
    section = experiment.mllm
    tokenizer = load_tokenizer(section.tokenizer)
    if len(tokenizer) > section.language.vocab:
        raise UserError(
            f"config: mllm.language.vocab is {section.language.vocab}, "
            f"but the tokenizer in {section.tokenizer} has {len(tokenizer)} tokens"
        )
    config = PromptConfig(
        buckets=section.buckets,
        system=section.system,
        assistant=section.assistant or experiment.objective == "understand",
        image_label=section.image_label,
        media=media_config(experiment),
    )
    return Prompter(tokenizer, config)


def text_rows(experiment: Experiment) -> TextRows | None:
    """Makes the input of the DiT's own text encoder; None where it has none. Raises UserError without a tokenizer."""
    section = experiment.text
    if section is None:
        return None
    instruction = INSTRUCTION if section.instruction else ""
    tokenizer = load_tokenizer(section.tokenizer)
    make = registry.of(section.encoder).rows
    return TextRows(
        tokenizer,
        section.length,
        instruction=instruction,
        reads_prompt=section.reads_prompt,
        worded=None if make is None else make(tokenizer, section.length),
    )


class Inputs:
    """Makes the network inputs of an experiment that paints; reads its tokenizers once.

    Raises UserError for a tokenizer that is missing.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.prompter = prompter(experiment) if experiment.uses_mllm else None
        self.text = text_rows(experiment)

    def examples(self, bucket: Bucket, *, stored: bool = False, target: bool = True) -> PaintExamples:
        """Samples of a bucket as network inputs.

        With ``stored`` samples bring their latents; ``target`` False is for drawing, where there is no target.
        """
        shape = None
        if stored:
            shape = (*latent_grid(self.experiment, bucket), autoencoder(self.experiment).channels)
        return PaintExamples(
            self.prompter,
            bucket,
            text=self.text,
            video_fps=self.experiment.mllm.video_fps,
            latents=shape,
            target=target,
        )


@dataclasses.dataclass(frozen=True)
class Reworded:
    """Records whose samples all have the same prompt, in place of their captions."""

    records: RandomAccess
    prompt: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return dataclasses.replace(self.records[index], prompt=self.prompt)


@dataclasses.dataclass(frozen=True)
class Opened:
    """The sources that one bucket's batches are made of (None: the conversations that teach an MLLM)."""

    bucket: Bucket | None
    sources: list[Source]
    stored: bool = False

    @property
    def name(self) -> str:
        """Task and shape of the bucket."""
        return "conversations" if self.bucket is None else self.bucket.name

    @property
    def count(self) -> int:
        """Samples of all sources that have a weight."""
        return sum(len(source.records) for source in self.sources if source.weight > 0)

    @property
    def held_out(self) -> int:
        """Samples that these sources keep for validation."""
        records = [source.records for source in self.sources]
        parts = [one.records if isinstance(one, Reworded) else one for one in records]
        return sum(len(part.source) - len(part) for part in parts if isinstance(part, Part))


def opened(experiment: Experiment) -> list[Opened]:
    """All that the training reads, by bucket. Raises UserError for a source that is not there or does not suit.

    Of sources that are sorted, buckets without samples are left out, and a warning names them.
    """
    if experiment.objective == "understand":
        return [Opened(None, _world_records(experiment)[:1])]
    for line in by_size.said(experiment):
        logger.warning("%s", line)
    if any(bucket.by_length for bucket in experiment.shapes):
        lengths.check(experiment, prompter(experiment))
    found = []
    for bucket in by_size.buckets(experiment):
        stored = latents.stored(experiment, bucket)
        if not stored:
            for section in by_size.at(experiment, bucket):
                if section.path:
                    latents.check_whole(section)
        if sources := sources_of(experiment, bucket, stored=stored):
            found.append(Opened(bucket, sources, stored))
    return found


def batches(experiment: Experiment, data: Sequence[Opened] | None = None) -> grain.DatasetIterator:
    """This process's part of every batch of the training, from the first batch on; opens what is not given."""
    data = opened(experiment) if data is None else data
    if experiment.objective == "understand":
        examples = UnderstandExamples(prompter(experiment), experiment.world, max(experiment.mllm.buckets))
        return iter(_stream(experiment, data[0].sources, examples, experiment.train.batch))
    inputs, streams = Inputs(experiment), []
    for number, one in enumerate(data):
        examples = inputs.examples(one.bucket, stored=one.stored)
        batches = _stream(experiment, one.sources, examples, one.bucket.batch, seed=number)
        streams.append(Stream(one.name, batches, one.bucket.weight))
    return iter(streams[0].batches) if len(streams) == 1 else Mixture(streams, experiment.seed)


def sources_of(
    experiment: Experiment, bucket: Bucket, *, stored: bool = False, validation: bool = False
) -> list[Source]:
    """The sources of a bucket's task, in its shape.

    Their samples have pixels, or with ``stored`` the latents of those. A reconstruction has its own prompt. The samples
    are those to train on, or with ``validation`` those that a source keeps out of the training: sources that keep none
    are then left out. So are sorted sources that have no samples for this bucket: there may be none at all.

    Raises UserError when there is no source, one is not there, or its latents are not those of this experiment.
    """
    if experiment.sources:
        opened = _opened(experiment, bucket, stored, validation)
    else:
        opened = [] if validation else _world_records(experiment)
    if bucket.task != "reconstruction":
        return opened
    return [dataclasses.replace(source, records=Reworded(source.records, RECONSTRUCT)) for source in opened]


def _opened(experiment: Experiment, bucket: Bucket, stored: bool, validation: bool) -> list[Source]:
    clip = Clip(bucket.size, bucket.frames, bucket.fps if bucket.frames > 1 else None)
    if bucket.task not in {section.task for section in experiment.sources}:
        raise UserError(f"config: no source has the task {bucket.task!r}, which a bucket draws")
    sections = by_size.at(experiment, bucket)
    if stored:
        for section in sections:
            latents.check(experiment, section, clip)
    else:
        sections = [dataclasses.replace(section, latents=False) for section in sections]
    found = []
    for section in sections:
        if section.validation or not validation:
            source, share = open_source(section, clip, experiment.world), section.validation
            if len(source) == 1 and experiment.sizes_of(bucket.task):  # the only sample of a size is trained on
                if validation:
                    continue
                share = 0.0
            found.append(Source(split(source, share, validation), section.weight))
    return found


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
        prefetch=experiment.data.prefetch,
    )
    return pipeline(sources, config, examples.collate, format=examples, process_index=part, process_count=parts)
