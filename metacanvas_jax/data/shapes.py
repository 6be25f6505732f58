"""The shapes of network inputs, from the config alone: of a whole batch, and of the smallest input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax import registry, sizes, tasks
from metacanvas_jax.config.networks import autoencoder, mllm_config
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data import latents
from metacanvas_jax.data.examples import media_layout
from metacanvas_jax.data.samples import LATENTS
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.media import MediaConfig
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.types import Grid, Media, MllmInputs, Text

INSTRUCTION_TOKENS = 240  # an estimate: the exact number depends on the tokenizer


def latent_grid(experiment: Experiment, bucket: Bucket | None = None) -> Grid:
    """Frames, rows and columns of the latents of a bucket; without one, of the experiment's first bucket."""
    vae = autoencoder(experiment)
    bucket = experiment.shapes[0] if bucket is None else bucket
    rows, columns = bucket.size
    if rows % vae.spatial or columns % vae.spatial:
        raise UserError(
            f"config: pictures of {rows} x {columns} px do not divide by the autoencoder's factor {vae.spatial}"
        )
    return sizes.latent_grid(bucket.size, bucket.frames, spatial=vae.spatial, temporal=vae.temporal)


def media_config(experiment: Experiment) -> MediaConfig:
    """How images and videos are cut into patches for the MLLM."""
    section = experiment.mllm
    if section.vision is None:
        return MediaConfig()
    config = MediaConfig(**registry.of(mllm_config(experiment)).media)
    return dataclasses.replace(
        config,
        patch=section.vision.patch,
        merge=section.vision.merge,
        tokens=section.image_tokens,
        image_pixels=section.image_pixels or config.image_pixels,
        video_pixels=section.video_pixels or config.video_pixels,
    )


def batch_shapes(experiment: Experiment, bucket: Bucket) -> dict[str, Any]:
    """The arrays of a whole batch of a bucket as shapes. No file is read.

    The length of the text encoder's instruction depends on the tokenizer, which need not be there yet; it is estimated
    by ``INSTRUCTION_TOKENS``.
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
        instructed = text.instruction and text.reads_prompt and not registry.of(text.encoder).rows
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


def drawn_shapes(experiment: Experiment, bucket: Bucket, count: int = 1) -> dict[str, Any]:
    """What drawing some results of a bucket reads, as shapes: a batch with no more of a target than is given."""
    pixels = dataclasses.replace(experiment, sources=())  # nothing is stored of what a user brings
    batch = batch_shapes(pixels, dataclasses.replace(bucket, batch=count))
    target = batch.pop("pixels")
    if tasks.TASKS[bucket.task].vae == "first frame":
        batch["pixels"] = jax.ShapeDtypeStruct((count, 1, *target.shape[2:]), target.dtype)
    return batch


def smallest_inputs(experiment: Experiment) -> MllmInputs:
    """One sample of two tokens, the first of them an image if the MLLM has a vision tower, for ``init``."""
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
