"""What is wrong with an experiment as a whole. All of it is found before anything is built or read."""

from metacanvas_jax.config.networks import autoencoder, transformer
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.tasks import TASKS, Bucket


def check(experiment: Experiment) -> None:
    """Raises UserError that names the key which is missing, or which contradicts another."""
    if experiment.objective == "paint":
        _check_painter(experiment)


def _check_painter(experiment: Experiment) -> None:
    missing = [name for name in ("dit", "vae") if getattr(experiment, name) is None]
    if experiment.context_connector is None and experiment.text is None:
        missing.append("context_connector")
    if missing:
        raise UserError(f"config: objective 'paint' needs the section {missing[0]!r}")
    if (experiment.canvas is None) != (experiment.canvas_connector is None):
        raise UserError("config: 'canvas' and 'canvas_connector' come together; one of them is None")
    if experiment.queries is not None and experiment.context_connector is None:
        raise UserError("config: 'queries' reach the DiT through the 'context_connector', which is None")
    vae = autoencoder(experiment)
    if experiment.given_channels and experiment.dit.extra_channels != vae.channels + 1:
        raise UserError(
            f"config: dit.extra_channels is {experiment.dit.extra_channels}, expected {vae.channels + 1}: the latent's "
            f"{vae.channels} channels and a mask"
        )
    for i, bucket in enumerate(experiment.shapes):
        check_bucket(experiment, bucket, f"config: buckets[{i}] ({bucket.task})")


def check_bucket(experiment: Experiment, bucket: Bucket, where: str) -> None:
    """Raises UserError, beginning with ``where``, for a shape or a task that the networks cannot have."""
    vae, patch, task = autoencoder(experiment), transformer(experiment).patch, TASKS[bucket.task]
    rows, columns = vae.spatial * patch[1], vae.spatial * patch[2]
    if bucket.size[0] % rows or bucket.size[1] % columns:
        raise UserError(f"{where}: {bucket.size} pixels are no multiples of {rows} x {columns} (latent and patch)")
    if (bucket.frames - 1) % vae.temporal:
        raise UserError(f"{where}: expected 1 + {vae.temporal} k frames, found {bucket.frames}")
    if bucket.frames > 1 and not isinstance(experiment.dit, WanConfig):
        raise UserError(f"{where}: this DiT makes images only")
    if task.vae == "source" and not experiment.given_channels and not isinstance(experiment.dit, FluxConfig):
        raise UserError(f"{where}: the DiT has no way to read a source; Wan needs dit.extra_channels")
    if task.mllm != "nothing" and experiment.uses_mllm and experiment.mllm.vision is None:
        raise UserError(f"{where}: the MLLM must see, but mllm.vision is None")
