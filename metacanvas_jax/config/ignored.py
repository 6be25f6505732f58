"""Values of a config that would have no effect. They are refused, as whoever sets one expects an effect.

A value that equals its default is always accepted: config files and saved runs state all defaults.
"""

import dataclasses
from collections.abc import Iterator

from metacanvas_jax import registry
from metacanvas_jax.config.networks import transformer
from metacanvas_jax.config.schema import DataSection, Experiment, SamplerSection
from metacanvas_jax.connectors.context import ContextConnectorConfig
from metacanvas_jax.diffusion.schedules import DynamicShift
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.canvas import CanvasConfig


def refuse_ignored(experiment: Experiment) -> None:
    """Raises UserError for the first value that no part of the run would read; it names the key."""
    of_objective = _by_a_painter(experiment) if experiment.objective == "paint" else _by_a_reader(experiment)
    for key, ignored, why in (*of_objective, *_by_any(experiment)):
        if ignored:
            raise UserError(f"config: {key} has no effect: {why}")


Row = tuple[str, bool, str]
"""Key, whether it is set although nothing reads it, and why nothing does."""


def _by_a_reader(experiment: Experiment) -> Iterator[Row]:
    """What a run does not read that trains the MLLM alone."""
    why = "objective 'understand' trains the MLLM alone, from fresh weights, on its world"
    sections = ("dit", "vae", "text", "canvas", "canvas_connector", "context_connector", "queries")
    for name in (*sections, "vae_weights", "dit_weights", "dit_guidance", "buckets", "sources"):
        yield name, bool(getattr(experiment, name)), why
    for name in ("weights", "context_cache", "context_memory", "assistant", "image_label"):
        yield f"mllm.{name}", bool(getattr(experiment.mllm, name)), why
    yield "data.canvas_dropout", experiment.data.canvas_dropout != 0, why
    yield "recall_within", experiment.recall_within is not None and not experiment.recall, "recall is 0"


def _by_a_painter(experiment: Experiment) -> Iterator[Row]:
    """What a run does not read that trains a DiT."""
    mllm, canvas, sampler = experiment.mllm, experiment.canvas, experiment.sampler
    connector, context = experiment.canvas_connector, experiment.context_connector
    yield "recall", experiment.recall != 0, "it belongs to objective 'understand'"
    yield "recall_within", experiment.recall_within is not None, "it belongs to objective 'understand'"
    yield "facts", experiment.facts != 0, "it belongs to objective 'understand'"
    unused = "no canvas, queries or context connector reads the MLLM"
    for name in ("context_cache", "context_memory"):
        yield f"mllm.{name}", bool(getattr(mllm, name)) and not experiment.uses_mllm, unused
    writes = canvas is not None or experiment.queries is not None
    for name in ("assistant", "image_label"):
        yield f"mllm.{name}", bool(getattr(mllm, name)) and not experiment.uses_mllm, unused
    for number, bucket in enumerate(experiment.buckets):
        yield f"buckets[{number}].by_length", bucket.by_length and not experiment.uses_mllm, unused
    adapters = getattr(mllm.language, "lora", None) is not None and not writes
    yield "mllm.language.lora", adapters, "adapters act on the tokens of a canvas or of queries, and there are none"
    yield "data.canvas_dropout", canvas is None and experiment.data.canvas_dropout != 0, "there is no canvas"
    if canvas is not None:
        images = canvas.keyframes > 1 and not transformer(experiment).videos
        yield "canvas.keyframes", images, "this DiT makes images only"
        apart = registry.family("mllm")[mllm.kind].module.frames_apart
        why = "each keyframe is a block of its own for this MLLM, right after the one before"
        yield "canvas.spacing", apart and canvas.spacing != CanvasConfig.spacing, why
        yield "canvas.dims", canvas.dims != 3 and not canvas.rope, "canvas.rope is False"
    if connector is not None and connector.fuse == "after_patchify":
        given = connector.latent_channels is not None
        yield "canvas_connector.latent_channels", given, "canvas_connector.fuse is 'after_patchify'"
    if context is not None and context.kind == "identity":
        for name in ("expansion", "hidden", "activation", "dropout", "out_norm", "weights"):
            set_ = getattr(context, name) != getattr(ContextConnectorConfig, name)
            yield f"context_connector.{name}", set_, "context_connector.kind is 'identity'"
    elif context is not None and context.hidden is not None:
        yield "context_connector.expansion", context.expansion != 4, "context_connector.hidden is the size"
    shifted = sampler.shift not in (SamplerSection.shift, 1.0)
    derived = dataclasses.replace(sampler, shift=1.0).make(256) == dataclasses.replace(sampler, shift=2.0).make(256)
    yield "sampler.shift", shifted and derived, "this schedule derives its shift from the number of tokens"
    grows = sampler.dynamic != DynamicShift()
    yield "sampler.dynamic", grows and sampler.schedule != "dynamic", "sampler.schedule is not 'dynamic'"
    time = experiment.time
    for name in ("mean", "std"):
        set_ = getattr(time, name) != getattr(type(time), name)
        yield f"time.{name}", set_ and time.kind == "uniform", "time.kind is 'uniform'"


def _by_any(experiment: Experiment) -> Iterator[Row]:
    """What no run reads beside the values that this one has."""
    data, optimizer, train = experiment.data, experiment.optimizer, experiment.train
    for name in ("picture_weight", "pictures_path"):
        set_ = getattr(data, name) != getattr(DataSection, name)
        yield f"data.{name}", set_ and bool(experiment.sources), "samples come from the sources"
    yield "data.pictures_path", bool(data.pictures_path) and not data.picture_weight, "data.picture_weight is 0"
    constant = optimizer.schedule == "constant"
    yield "optimizer.total_steps", constant and optimizer.total_steps is not None, "optimizer.schedule is 'constant'"
    yield "optimizer.final_fraction", constant and optimizer.final_fraction != 0, "optimizer.schedule is 'constant'"
    yield "optimizer.warmup_from", optimizer.warmup_from != 0 and not optimizer.warmup_steps, "there is no warm-up"
    yield "train.keep_best", train.keep_best > 0 and not train.evaluate_every, "train.evaluate_every is 0"
    yield "mllm.image_tokens", experiment.mllm.image_tokens is not None and not experiment.mllm.vision, "no mllm.vision"
