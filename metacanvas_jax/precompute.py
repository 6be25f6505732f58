"""What the frozen networks of a config make of samples, computed once and stored: latents, and contexts."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metacanvas_jax.build import Experiment, autoencoder
from metacanvas_jax.data.samples import LATENTS, Sample
from metacanvas_jax.data.shards import Compute
from metacanvas_jax.errors import UserError
from metacanvas_jax.train import jobs, latents, objectives, weights

Stored = Literal["float32", "float16"]


def make_latents(setup: Experiment, batch: int, dtype: Stored = "float32") -> tuple[Compute, dict[str, Any]]:
    """A function of some samples of one shape, and what identifies its results.

    It gives ``latents`` [t h w c], and ``source_latents`` [t h w c] and ``reference_latents`` [r h w c] where a sample
    has them, rounded to ``dtype``. Samples are encoded ``batch`` at a time (or the next multiple of the devices), over
    all devices of this process, by one program for each shape. Raises UserError when the config names no weights of an
    autoencoder, or they are not there.
    """
    identity = latents.made_by(setup)
    vae, size = autoencoder(setup), setup.shapes[0].size
    abstract = jax.eval_shape(lambda key: vae.init(key, jnp.zeros((1, 1, *size, 3), jnp.float32)), jax.random.key(0))
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
    batch += -batch % mesh.size
    everywhere = NamedSharding(mesh, PartitionSpec())

    def as_in_training(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, setup.train.frozen_dtype, sharding=everywhere)

    params = weights.sources(setup)["vae"].load(jax.tree.map(as_in_training, jobs.unboxed(abstract["params"])))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    encode = jax.jit(lambda params, pixels: objectives.encode(vae, params, pixels))

    def encoded(videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        done: list[np.ndarray] = []
        for start in range(0, len(videos), batch):
            part = list(videos[start : start + batch])
            if len({video.shape for video in part}) > 1:
                raise UserError("latents need samples of one shape: name --size (and --frames for videos)")
            full = jax.device_put(np.stack(part + part[-1:] * (batch - len(part))), spread)
            done += list(np.asarray(encode(params, full), dtype)[: len(part)])
        return done

    def compute(samples: Sequence[Sample]) -> Sequence[Mapping[str, np.ndarray]]:
        found: list[dict[str, np.ndarray]] = [{LATENTS["pixels"]: x} for x in encoded([s.target for s in samples])]
        sourced = [i for i, sample in enumerate(samples) if sample.source is not None]
        for i, x in zip(sourced, encoded([samples[i].source for i in sourced]), strict=True):
            found[i][LATENTS["source"]] = x
        owners = [i for i, sample in enumerate(samples) for _ in sample.references]
        pictures = encoded([picture[None] for sample in samples for picture in sample.references])
        for i in sorted(set(owners)):
            mine = [x for owner, x in zip(owners, pictures, strict=True) if owner == i]
            found[i][LATENTS["references"]] = np.concatenate(mine)
        return found

    return compute, {"autoencoder": identity, "dtype": dtype}
