"""Computes the results of frozen networks once, to be stored: latents of pictures and contexts of prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from metacanvas_jax.config.networks import autoencoder
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.data import latents
from metacanvas_jax.data.batch import encode as encode_pixels
from metacanvas_jax.data.formats.shards import Compute
from metacanvas_jax.data.inputs import Inputs, sources_of
from metacanvas_jax.data.samples import LATENTS, Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, on_mesh, replicated
from metacanvas_jax.parallel.rules import RULES, placed, shardings
from metacanvas_jax.train import parameters
from metacanvas_jax.train.contexts import context_reader
from metacanvas_jax.trees import partition

Stored = Literal["float32", "float16"]


def make_latents(
    setup: Experiment, batch: int, dtype: Stored = "float32", *, exact: bool = True
) -> tuple[Compute, dict[str, Any]]:
    """A function of some samples of one shape, and what identifies its results.

    It gives ``latents`` [t h w c], and ``source_latents`` [t h w c] and ``reference_latents`` [r h w c] where a sample
    has them, rounded to ``dtype``. With ``exact`` the autoencoder computes in float32 with float32 weights, else in the
    dtypes of the config. Samples are encoded ``batch`` at a time (or the next multiple of the devices), over
    all devices of this process, by one program for each shape. Raises UserError when the config names no weights of an
    autoencoder, or they are not there.
    """
    setup = latents.exact(setup) if exact else setup
    identity = latents.made_by(setup)
    vae, size = autoencoder(setup), setup.shapes[0].size
    abstract = jax.eval_shape(lambda key: vae.init(key, jnp.zeros((1, 1, *size, 3), jnp.float32)), jax.random.key(0))
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    batch += -batch % mesh.size
    shapes = nn.meta.unbox(abstract["params"])
    copies = jax.tree.map(lambda _: replicated(mesh), shapes)
    params = parameters.read_folders(setup, {"vae": placed(shapes, copies)})["vae"]
    spread = NamedSharding(mesh, PartitionSpec("data"))
    encode = jax.jit(lambda params, pixels: encode_pixels(vae, params, pixels))

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


def fill_contexts(
    setup: Experiment, batch: int, *, process_index: int = 0, process_count: int = 1, progress: bool = True
) -> int:
    """Stores the context of every prompt of a config's sources, in the folder ``mllm.context_cache``.

    Prompts are read ``batch`` at a time on the config's mesh of this process's devices, and without words as well where
    captions are dropped in training. Of ``process_count`` processes each takes its share of the samples; what is stored
    is not computed again. Returns the number of samples. Raises UserError when the config names no such folder.
    """
    enrich = context_reader(setup)
    if enrich is None or not setup.mllm.context_cache:
        raise UserError("config: mllm.context_cache is empty; name the folder that contexts are to be kept in")
    mesh = make_mesh(setup.mesh, jax.local_devices())
    batch += -batch % (mesh.shape["data"] * mesh.shape["fsdp"])
    boxed = parameters.boxed(setup)
    frozen = partition(placed(boxed, shardings(boxed, mesh, whole=setup.mesh.whole)), setup.train.rules)[1]
    parts = [part for part in ("mllm", "text") if part in weight_folders(setup)]
    params = parameters.read_folders(setup, {part: frozen[part] for part in parts})
    inputs, done = Inputs(setup), 0
    for bucket in setup.shapes:
        stored = latents.stored(setup, bucket)
        examples = inputs.examples(bucket, stored=stored)
        for source in sources_of(setup, bucket, stored=stored):
            numbers = range(process_index, len(source.records), process_count)
            with (
                tqdm(total=len(numbers), desc=bucket.task, unit=" samples", disable=not progress) as bar,
                on_mesh(mesh),
            ):
                for start in range(0, len(numbers), batch):
                    samples = [source.records[i] for i in numbers[start : start + batch]]
                    full = samples + samples[-1:] * (batch - len(samples))
                    enrich(params, examples.batch(full), mesh, RULES)
                    if setup.data.caption_dropout and (examples.layout or not start):  # without media all are one
                        enrich(params, examples.batch(full, words=False), mesh, RULES)
                    bar.update(len(samples))
            done += len(numbers)
    return done
