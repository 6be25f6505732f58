"""Sections of an experiment that contradict each other. They are refused before anything is built or read."""

import math
import re
from collections.abc import Iterator

from metacanvas_jax import registry
from metacanvas_jax.config.ignored import refuse_ignored
from metacanvas_jax.config.networks import autoencoder, mllm_config, transformer
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import DRAWN, EMOJI, LIMITS
from metacanvas_jax.connectors import published as connector_weights
from metacanvas_jax.errors import UserError
from metacanvas_jax.limits import CANVAS_TOKENS
from metacanvas_jax.sizes import latent_grid
from metacanvas_jax.tasks import TASKS, Bucket, overlapping
from metacanvas_jax.worlds.facts import Facts


def check(experiment: Experiment) -> None:
    """Raises UserError that names the key which is missing, contradicts another one or has no effect."""
    if not experiment.mllm.buckets:
        raise UserError("config: mllm.buckets is empty, expected the lengths that prompts are padded to")
    vision, language = experiment.mllm.vision, experiment.mllm.language
    if vision is not None:
        _same("mllm.vision.out_width", vision.out_width, "mllm.language.width", language.width)
    for name, of in (("image_pixels", "an image"), ("video_pixels", "a video")):
        pixels = getattr(experiment.mllm, name)
        if pixels is not None and pixels[0] > pixels[1]:
            raise UserError(f"config: mllm.{name} is {pixels}, expected the least and the most pixels of {of}")
    patterns = {f"train.rules[{i}]": regex for i, (regex, _) in enumerate(experiment.train.rules)}
    for key, regex in (patterns | {"optimizer.decay_rule": experiment.optimizer.decay_rule}).items():
        try:
            re.compile(regex)
        except re.error as error:
            raise UserError(f"config: {key}: {regex!r} is not a regular expression: {error}") from error
    if experiment.objective == "paint":
        _check_painter(experiment)
    for name in ("recall", "facts"):
        if getattr(experiment, name) and experiment.train.accumulate > 1:
            raise UserError(
                f"config: train.accumulate is {experiment.train.accumulate}, expected 1 with {name} "
                f"{getattr(experiment, name)}: this loss is a mean over other tokens than the loss of the answers, "
                "which weights the microbatches"
            )
    if experiment.facts and Facts(experiment.world).count > language.width:
        raise UserError(
            f"config: mllm.language.width is {language.width}, expected at least {Facts(experiment.world).count}: "
            "with 'facts' each state tells that many facts of this world"
        )
    for bucket in experiment.shapes:
        if bucket.batch % experiment.train.accumulate:
            raise UserError(
                f"config: train.accumulate {experiment.train.accumulate} does not divide the batch of {bucket.batch} "
                f"samples ({bucket.task})"
            )
    refuse_ignored(experiment)


def _check_painter(experiment: Experiment) -> None:
    missing = [name for name in ("dit", "vae") if getattr(experiment, name) is None]
    if experiment.context_connector is None and experiment.text is None:
        missing.append("context_connector")
    if missing:
        raise UserError(f"config: objective 'paint' needs the section {missing[0]!r}")
    if (experiment.canvas is None) != (experiment.canvas_connector is None):
        raise UserError("config: 'canvas' and 'canvas_connector' come together; one of them is None")
    if experiment.canvas is not None and experiment.canvas.start and not experiment.mllm.weights:
        raise UserError("config: canvas.start are embeddings of the MLLM's tokens, which needs mllm.weights")
    if experiment.queries is not None and experiment.context_connector is None:
        raise UserError("config: 'queries' reach the DiT through the 'context_connector', which is None")
    _check_widths(experiment)
    _check_guidance(experiment)
    for i, bucket in enumerate(experiment.shapes):
        check_bucket(experiment, bucket, f"config: buckets[{i}] ({bucket.task})")
        if experiment.sources and bucket.task not in {source.task for source in experiment.sources}:
            raise UserError(f"config: no source has the task {bucket.task!r}, which a bucket draws")
        if bucket.by_length:
            _check_length(experiment, bucket, f"config: buckets[{i}].by_length is True")
    for task in sorted({source.task for source in experiment.sources if source.by_size}):
        _check_sizes(experiment, task)
    if not any(bucket.weight for bucket in experiment.shapes):
        raise UserError("config: no bucket has a weight above zero")
    for path in _frozen_paths(experiment):
        rule = next(((regex, action) for regex, action in experiment.train.rules if re.fullmatch(regex, path)), None)
        if rule is not None and rule[1] == "train":
            raise UserError(
                f"config: train.rules: {rule[0]!r} trains {path}; the MLLM and the text encoder are frozen, only "
                "adapters of the MLLM can train"
            )


def _check_sizes(experiment: Experiment, task: str) -> None:
    """A task whose sources are sorted: all of them are, and every bucket has a size, or a length of it, of its own."""
    if not all(source.by_size for source in experiment.sources if source.task == task):
        raise UserError(
            f"config: of the sources of {task} some have by_size=True and some False; sort them all by "
            "`metacanvas prepare --by-bucket`"
        )
    if len({(bucket.frames, bucket.fps) for bucket in experiment.shapes if bucket.task == task}) > 1:
        raise UserError(
            f"config: the buckets of {task} must have the same frames and fps, as their sources have by_size"
        )
    if (again := overlapping(bucket for bucket in experiment.shapes if bucket.task == task)) is not None:
        raise UserError(
            f"config: two buckets of {task} have {again.key.words}; with by_size each needs a size of its own or, with "
            "by_length=True, a length of its own"
        )


def _check_length(experiment: Experiment, bucket: Bucket, where: str) -> None:
    """Samples of a source that is not sorted go to any bucket; only drawings have prompts that fit into all."""
    for source in experiment.sources:
        if source.task == bucket.task and not source.by_size and source.kind not in DRAWN | EMOJI:
            raise UserError(
                f"{where}, but prompts of {source.path} are not sorted by length, and long ones would lose words; sort "
                "them by `metacanvas prepare --by-bucket` and give the source by_size=True"
            )


def _check_widths(experiment: Experiment) -> None:
    dit, vae, context = experiment.dit, autoencoder(experiment), experiment.context_connector
    _same("dit.latent_channels", dit.latent_channels, "the channels of the autoencoder (vae)", vae.channels)
    if experiment.text is not None:
        _same("dit.context_width", dit.context_width, "text.encoder.width", experiment.text.encoder.width)
    if context is not None and context.in_width is not None:
        language = experiment.mllm.language
        _same("context_connector.in_width", context.in_width, "mllm.language.width", language.width)
    if context is not None and context.weights and context.kind == "mlp":
        for name, expected in connector_weights.FIXED.items():
            if (found := getattr(context, name)) != expected:
                key = f"context_connector.{name}"
                raise UserError(f"config: {key} is {found!r}, expected {expected!r}, as {connector_weights.KEY} has it")
    if context is not None and context.kind == "identity":
        width = experiment.mllm.language.width
        _same("dit.context_width", dit.context_width, "mllm.language.width (context_connector.kind is identity)", width)
    if experiment.given_channels and dit.extra_channels != vae.channels + 1:
        raise UserError(
            f"config: dit.extra_channels is {dit.extra_channels}, expected {vae.channels + 1}: the latent's "
            f"{vae.channels} channels and a mask"
        )


def _same(key: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        raise UserError(f"config: {key} is {value}, expected {expected}, like {other}")


def _check_guidance(experiment: Experiment) -> None:
    reads, given = getattr(experiment.dit, "guidance", False), experiment.dit_guidance
    if reads and given is None:
        raise UserError("config: dit_guidance is None, but this DiT reads a guidance scale (dit.guidance is True)")
    if not reads and given is not None:
        raise UserError(f"config: dit_guidance is {given}, but this DiT reads no guidance scale")
    if getattr(experiment.dit, "pooled", None) == "given":
        raise UserError("config: dit.pooled is 'given', but no run computes a pooled text vector: 'zeros' or 'learned'")


def _frozen_paths(experiment: Experiment) -> Iterator[str]:
    """Paths of the parameters of the MLLM and of the text encoder, without adapters."""
    parts = {}
    if experiment.uses_mllm:
        parts["mllm"] = mllm_config(experiment)
    if experiment.text is not None:
        parts["text"] = experiment.text.encoder
    for part, config in parts.items():
        table = registry.of(config).table
        yield from (f"{part}/{entry.path}" for entry in (table(config) if table else ()))


def check_bucket(experiment: Experiment, bucket: Bucket, where: str) -> None:
    """Raises UserError, beginning with ``where``, for a shape or a task that the networks cannot have."""
    vae, dit, task = autoencoder(experiment), transformer(experiment), TASKS[bucket.task]
    rows, columns = vae.spatial * dit.patch[1], vae.spatial * dit.patch[2]
    if bucket.size[0] % rows or bucket.size[1] % columns:
        raise UserError(f"{where}: {bucket.size} pixels are no multiples of {rows} x {columns} (latent and patch)")
    if (pixels := math.prod(bucket.size) * bucket.frames) > LIMITS.decoded_pixels:
        raise UserError(f"{where}: {pixels} pixels in all frames, at most {LIMITS.decoded_pixels} are allowed")
    if (bucket.frames - 1) % vae.temporal:
        raise UserError(f"{where}: expected 1 + {vae.temporal} k frames, found {bucket.frames}")
    if experiment.canvas is not None:
        grid = latent_grid(bucket.size, bucket.frames, spatial=vae.spatial, temporal=vae.temporal)
        if (tokens := math.prod(experiment.canvas.shape_for(grid))) > CANVAS_TOKENS:
            raise UserError(
                f"{where}: a canvas of {tokens} tokens for {bucket.size} pixels (canvas.latents_per_cell is "
                f"{experiment.canvas.latents_per_cell}), at most {CANVAS_TOKENS} are allowed"
            )
    if bucket.frames > 1 and not dit.videos:
        raise UserError(f"{where}: this DiT makes images only")
    if task.vae == "source" and not dit.given_channels and (dit.videos or not dit.references):
        raise UserError(f"{where}: the DiT cannot read a source; a DiT of videos reads it through dit.extra_channels")
    if task.mllm != "nothing" and experiment.uses_mllm and experiment.mllm.vision is None:
        raise UserError(f"{where}: the MLLM reads images or videos in this task, but mllm.vision is None")
