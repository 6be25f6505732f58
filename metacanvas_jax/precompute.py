"""What a frozen network of a config makes of a sample, computed once and stored beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.build import Experiment, autoencoder
from metacanvas_jax.ckpt import store
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.shards import Compute
from metacanvas_jax.errors import UserError
from metacanvas_jax.train.objectives import to_signed


def make_latents(setup: Experiment, batch: int) -> tuple[Compute, dict[str, Any]]:
    """A function of some samples of one shape, and what identifies its results.

    It gives ``latents`` [t h w c], and ``source_latents`` [t h w c] and ``reference_latents`` [r h w c] where a sample
    has them, in float32. Samples are encoded ``batch`` at a time on whatever device JAX has, so that one program serves
    for each shape. Raises UserError when the config names no weights of an autoencoder, or they are not there.
    """
    if not setup.vae_weights:
        raise UserError("config: vae_weights is empty; latents need the weights of an autoencoder")
    vae = autoencoder(setup)
    weights, info = store.load_params(setup.vae_weights)
    params = jax.tree.map(jnp.asarray, weights)
    encode = jax.jit(lambda params, pixels: vae.apply({"params": params}, to_signed(pixels), method="encode"))

    def latents(videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        done: list[np.ndarray] = []
        for start in range(0, len(videos), batch):
            part = list(videos[start : start + batch])
            if len({video.shape for video in part}) > 1:
                raise UserError("latents need samples of one shape: name --size (and --frames for videos)")
            full = np.stack(part + part[-1:] * (batch - len(part)))
            done += list(np.asarray(encode(params, full), np.float32)[: len(part)])
        return done

    def compute(samples: Sequence[Sample]) -> Sequence[Mapping[str, np.ndarray]]:
        found: list[dict[str, np.ndarray]] = [{"latents": x} for x in latents([s.target for s in samples])]
        sourced = [i for i, sample in enumerate(samples) if sample.source is not None]
        for i, x in zip(sourced, latents([samples[i].source for i in sourced]), strict=True):
            found[i]["source_latents"] = x
        owners = [i for i, sample in enumerate(samples) for _ in sample.references]
        pictures = latents([picture[None] for sample in samples for picture in sample.references])
        for i in sorted(set(owners)):
            mine = [x for owner, x in zip(owners, pictures, strict=True) if owner == i]
            found[i]["reference_latents"] = np.concatenate(mine)
        return found

    return compute, {"autoencoder": info["hash"]}
