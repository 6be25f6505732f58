"""Training on the latents that `metacanvas prepare --latents` stored, in place of the pixels.

The samples of a source with ``latents`` bring their latents. A training step then runs no autoencoder, and of a target
at most the first frame is decoded. Records name the autoencoder that made their latents; a run refuses those of another
one.
"""

import dataclasses
import json
from typing import Any

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.data.examples import frames_of_source, other_frames
from metacanvas_jax.data.formats.manifest import RECIPE, read_recipe
from metacanvas_jax.data.formats.records import first_frames_only
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.weights import identity

HOW = ("chunk",)  # keys of an autoencoder's config that change how it computes, but not the result
DTYPES = ("vae.dtype", "dtype of weights")  # latents that were made in float32 serve every run


def stored(experiment: Experiment, bucket: Bucket) -> bool:
    """Whether the samples of a bucket bring their latents. Raises UserError where only some of its sources do."""
    flags = {section.latents for section in experiment.sources if section.task == bucket.task}
    if len(flags) > 1:
        raise UserError(
            f"config: of the sources of {bucket.task} some have latents=True and some False; a batch needs one"
        )
    return flags == {True}


def made_by(experiment: Experiment) -> dict[str, Any]:
    """What latents of given pixels depend on, as JSON: the autoencoder's weights, their dtype, and its config.

    Raises UserError when the config names no weights of an autoencoder, or they are not there.
    """
    source = weight_folders(experiment).get("vae")
    if source is None:
        raise UserError("config: vae_weights is empty; latents need the weights of an autoencoder")
    config = {f"vae.{key}": value for key, value in dataclasses.asdict(experiment.vae).items() if key not in HOW}
    found = {"weights": source.identity(), "dtype of weights": experiment.train.frozen_dtype, **config}
    return json.loads(json.dumps(found))


def exact(experiment: Experiment) -> Experiment:
    """The same with an autoencoder that computes in float32 with float32 weights: stored latents are read for ever."""
    changes = {"dtype": "float32"} if hasattr(experiment.vae, "dtype") else {}
    vae, train = dataclasses.replace(experiment.vae, **changes), experiment.train
    return dataclasses.replace(experiment, vae=vae, train=dataclasses.replace(train, frozen_dtype="float32"))


def check(experiment: Experiment, section: SourceSection, clip: Clip) -> None:
    """Raises UserError unless a source holds the latents that this run would make of such clips, or more exact ones."""
    recipe = read_recipe(section.path)
    found = recipe.get("computed", {}).get("autoencoder")
    if not isinstance(found, dict):
        raise UserError(
            f"{section.path} holds no latents: write them with `metacanvas prepare --latents --config FILE`"
        )
    for key, here in made_by(experiment).items():
        there = found.get(key)
        same = identity.same(there, here) if key == "weights" and isinstance(there, str) else there == here
        if not same and not (key in DTYPES and there == "float32"):
            raise UserError(
                f"{section.path}: its latents were made with {key} {_short(found.get(key))}, "
                f"this run has {_short(here)}; prepare it with this config"
            )
    kept, read = recipe.get("source_frames"), frames_of_source(clip, experiment.mllm.video_fps)
    if kept is not None and experiment.uses_mllm and kept != read:
        raise UserError(f"{section.path}: {other_frames(kept, read)}")
    there = recipe.get("clip", {})
    if _clip(there.get("size"), there.get("frames"), there.get("fps")) != _clip(clip.size, clip.frames, clip.fps):
        raise UserError(f"{section.path}: its latents are those of {_said(there)}, the bucket has {_said(vars(clip))}")


def check_whole(section: SourceSection) -> None:
    """Raises UserError where a run needs every frame of the targets, and a source holds their first frame alone."""
    if (files.folder(section.path) / RECIPE).is_file() and first_frames_only(read_recipe(section.path)):
        raise UserError(
            f"{section.path} holds latents and the first frame of each target only: give this source latents=True, or "
            "prepare it with --every-frame"
        )


def _clip(size: Any, frames: int | None, fps: float | None) -> tuple[Any, ...]:
    """What must be equal: the size, and for videos the number of frames and their rate."""
    return (list(size or ()), 1) if frames in (None, 1) else (list(size or ()), frames, fps)


def _said(clip: Any) -> str:
    size = "x".join(map(str, clip.get("size") or ("any size",)))
    return f"{size}, {clip.get('frames') or 1} frames" + (f" at {clip['fps']:g}/s" if clip.get("fps") else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
