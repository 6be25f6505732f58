"""The programs of an experiment as the compiler sees them: shapes with shardings in place of arrays.

They are made of the very functions that train and sample. Nothing is computed and no weight is read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from metacanvas_jax.config.networks import autoencoder, keep_float32, network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.data.shapes import batch_shapes, drawn_shapes
from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import chip_of
from metacanvas_jax.paint import placing
from metacanvas_jax.paint.program import how_to, program, reads
from metacanvas_jax.parallel.mesh import MeshConfig, batch_shards, make_mesh, on_mesh, placed_batch, replicated
from metacanvas_jax.parallel.rules import RULES, Rules, check_whole, placed, shardings
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train import objectives
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.parameters import boxed, sides
from metacanvas_jax.train.state import abstract_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.trees import flat, held_dtype, nested
from metacanvas_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and its abstract arguments; ``held`` are bytes per device that are there before it runs."""

    name: str
    jitted: Callable[..., Any]
    arguments: tuple[Any, ...]
    held: dict[str, float]
    samples: int
    mesh: Mesh
    rules: Rules

    @functools.cached_property
    def traced(self) -> Any:
        """The traced program, with logical constraints meaning this mesh."""
        with on_mesh(self.mesh, self.rules, abstract=True):
            return self.jitted.trace(*self.arguments)

    @functools.cached_property
    def lowered(self) -> Any:
        """The program as it goes to the compiler."""
        with on_mesh(self.mesh, self.rules, abstract=True):
            return self.traced.lower()


def with_latents(experiment: Experiment) -> Experiment:
    """The experiment on sources that bring stored latents; a drawn world's pictures are encoded as before."""
    sources = tuple(
        SourceSection("records", source.path or "records", source.task, source.weight, latents=True)
        for source in experiment.sources
    )
    return dataclasses.replace(experiment, sources=sources)


def train_program(experiment: Experiment, mesh: Mesh, bucket: Bucket, rules: Rules = RULES) -> Program:
    """The whole step of ``train.loop.fit`` on a bucket: frozen work, loss, gradient, update and average.

    Raises:
        UserError: the batch does not divide among the devices that split it, or the config does not paint.
    """
    if experiment.objective != "paint":
        raise UserError(f"config: plan looks at objective 'paint', not {experiment.objective!r}")
    train = experiment.train
    optimizer = make_optimizer(experiment.optimizer)
    trainable, frozen = abstract_params(experiment, mesh, rules)
    state = abstract_state(trainable, optimizer, mesh, ema=train.ema is not None)
    prepare, loss = objectives.painting(
        network(experiment),
        autoencoder(experiment),
        experiment.time,
        channels=experiment.given_channels,
        guidance=experiment.dit_guidance,
        canvas_dropout=experiment.data.canvas_dropout,
    )
    step = make_step(
        prepare,
        loss,
        optimizer,
        accumulate=train.accumulate,
        ema_decay=train.ema,
        state_shardings=jax.tree.map(lambda x: x.sharding, state),
    )
    batch = abstract_batch(experiment, bucket, mesh, rules)
    held = {
        "frozen": device_bytes(frozen),
        "trainable": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "ema": device_bytes(state.ema),
        "batch": device_bytes(batch),
    }
    arguments = (state, frozen, batch, abstract_key(mesh))
    return Program(f"train {bucket.name}", step, arguments, held, bucket.batch, mesh, rules)


def sample_program(
    experiment: Experiment, where: Sequence[Any], bucket: Bucket, mesh: MeshConfig | None = None
) -> Program:
    """Drawing of a bucket with the config's schedule and guidance, decoding included: one result per part of the batch.

    Parameters lie on the devices ``where`` as `metacanvas sample` places them (``paint/placing.py``), in the dtypes
    that sampling holds them in; ``mesh`` is one to use instead.
    """
    how = how_to(experiment, bucket)
    needs = reads(experiment, how)
    nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in flat(placing.abstract(experiment, needs)).values())
    slices = len({getattr(device, "slice_index", 0) for device in where})
    chip = chip_of(where[0].device_kind)
    devices = make_mesh(placing.config_for(nbytes, chip.hbm, slices) if mesh is None else mesh, where)
    samples = batch_shards(devices)
    shapes = drawn_shapes(experiment, bucket, samples)
    batch = placed_batch(shapes, devices)
    inputs = jax.eval_shape(mllm_inputs, shapes)
    along = NamedSharding(devices, PartitionSpec(None, *batch["tokens"].sharding.spec))
    positions = jax.ShapeDtypeStruct(inputs.positions.shape, inputs.positions.dtype, sharding=along)
    inputs = placed_batch(inputs.replace(positions=batch["tokens"]), devices).replace(positions=positions)
    params = placing.abstract(experiment, needs, devices)
    held = {"parameters": device_bytes(params), "batch": device_bytes((batch, inputs))}
    arguments = (params, batch, inputs, abstract_key(devices))
    return Program(f"sample {bucket.name}", program(experiment, how), arguments, held, samples, devices, RULES)


def abstract_params(experiment: Experiment, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> tuple[Params, Params]:
    """(trainable, frozen) as a training holds them, with their shardings; what is frozen has the dtype it is kept in.

    Raises:
        UserError: a large parameter would lie whole on every device.
    """
    params = boxed(experiment)
    params = placed(params, shardings(params, mesh, rules, experiment.mesh.whole))
    check_whole(params, meant=experiment.mesh.whole)
    trainable, frozen = sides(experiment, params)
    dtype, wide = experiment.train.frozen_dtype, keep_float32(experiment)
    return trainable, nested({path: _like(leaf, held_dtype(path, dtype, wide)) for path, leaf in flat(frozen).items()})


def abstract_batch(experiment: Experiment, bucket: Bucket, mesh: Mesh, rules: Rules = RULES) -> dict[str, Any]:
    """A batch of a bucket, as ``train/objectives.py`` describes it, with its shardings."""
    return placed_batch(batch_shapes(experiment, bucket), mesh, rules)


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on the device that holds most of them."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _like(x: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(x.shape, dtype if floating else x.dtype, sharding=x.sharding)


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A random key on every device."""
    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))
