"""The programs of an experiment as the compiler sees them: shapes with shardings in place of arrays.

They are made of the very functions that train and sample. Nothing is computed and no weight is read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from metacanvas_jax.build import Experiment, autoencoder, network
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import on_mesh, replicated
from metacanvas_jax.parallel.rules import RULES, Rules, placed, resolve, shardings
from metacanvas_jax.sampling import make_painter
from metacanvas_jax.train import jobs, objectives
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.partition import flat, nested, partition
from metacanvas_jax.train.state import abstract_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.types import Grid, MllmInputs, Params


@dataclasses.dataclass(frozen=True)
class Load:
    """One bucket of a training: samples of all devices together, context tokens, and pixels (frames, height, width)."""

    name: str
    batch: int
    context: int
    pixels: Grid

    @property
    def size(self) -> int:
        """Pixels of a batch: what the DiT's work grows with."""
        return self.batch * math.prod(self.pixels)


def loads(experiment: Experiment) -> tuple[Load, ...]:
    """The buckets of a config."""
    size = experiment.world.size
    return (Load("text_to_image", experiment.train.batch, max(experiment.mllm.buckets), (1, size, size)),)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to be jitted and its abstract arguments; ``held`` are bytes per device that are there before it runs.

    ``donated`` are the numbers of the arguments whose memory the results take.
    """

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


def train_program(experiment: Experiment, mesh: Mesh, load: Load, rules: Rules = RULES) -> Program:
    """The whole step of ``train.loop.fit``: frozen work, loss, gradient, update and average.

    Raises:
        UserError: the batch does not divide among the devices that split it.
    """
    train = experiment.train
    optimizer = make_optimizer(experiment.optimizer)
    trainable, frozen = abstract_params(experiment, mesh, rules)
    state = abstract_state(trainable, optimizer, mesh, ema=train.ema is not None)
    if experiment.objective == "understand":
        prepare, loss = objectives.understanding(network(experiment))
    else:
        prepare, loss = objectives.painting(network(experiment), autoencoder(experiment), experiment.time)
    step = make_step(
        prepare,
        loss,
        optimizer,
        accumulate=train.accumulate,
        ema_decay=train.ema,
        state_shardings=jax.tree.map(lambda x: x.sharding, state),
    )
    batch = abstract_batch(load, mesh, rules)
    held = {
        "frozen": device_bytes(frozen),
        "trainable": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "ema": device_bytes(state.ema),
        "batch": device_bytes(batch),
    }
    return Program(
        f"train {load.name}", step, (state, frozen, batch, abstract_key(mesh)), held, load.batch, mesh, rules
    )


def sample_program(experiment: Experiment, mesh: Mesh, load: Load, rules: Rules = RULES) -> Program:
    """Sampling of ``load.batch`` prompts with the config's schedule and guidance, and decoding of what was drawn."""
    vae = autoencoder(experiment)
    grid = latent_grid(vae, load.pixels)
    model = network(experiment)
    tokens = math.prod(grid) // math.prod(model.dit.patch)
    sampler = experiment.sampler
    painter = make_painter(model, vae, sampler.make(tokens), sampler.method, sampler.guidance, grid)
    trainable, frozen = abstract_params(experiment, mesh, rules)
    dtype = experiment.train.frozen_dtype
    params = nested(flat(frozen) | {path: _like(x, dtype) for path, x in flat(trainable).items()})
    inputs = _prompts(load, mesh, rules)
    held = {"parameters": device_bytes(params), "batch": device_bytes(inputs)}
    arguments = (params, inputs, inputs, abstract_key(mesh))
    return Program(f"sample {load.name}", painter, arguments, held, load.batch, mesh, rules)


def abstract_params(experiment: Experiment, mesh: Mesh, rules: Rules = RULES) -> tuple[Params, Params]:
    """(trainable, frozen) with their shardings; what is frozen has the dtype it is kept in."""
    boxed = _boxed(experiment)
    trainable, frozen = partition(placed(boxed, shardings(boxed, mesh, rules)), experiment.train.rules)
    dtype = experiment.train.frozen_dtype
    return trainable, nested({path: _like(leaf, dtype) for path, leaf in flat(frozen).items()})


@functools.lru_cache(maxsize=4)
def _boxed(experiment: Experiment) -> Params:
    return jax.eval_shape(lambda key: jobs.initial(experiment, key), jax.random.key(0))


def abstract_batch(load: Load, mesh: Mesh, rules: Rules = RULES) -> dict[str, jax.ShapeDtypeStruct]:
    """What ``data.examples.PaintExamples`` makes of a bucket."""
    b, n = load.batch, load.context
    shapes = {
        "tokens": ((b, n), jnp.int32),
        "positions": ((b, 3, n), jnp.int32),
        "mask": ((b, n), jnp.bool_),
        "pixels": ((b, *load.pixels, 3), jnp.uint8),
    }
    return {name: spread(shape, dtype, mesh, rules) for name, (shape, dtype) in shapes.items()}


def latent_grid(vae: nn.Module, pixels: Grid) -> Grid:
    """Frames, rows and columns of the latents of a video."""
    frames, height, width = pixels
    return (1 + (frames - 1) // vae.temporal, height // vae.spatial, width // vae.spatial)


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on the device that holds most of them."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _prompts(load: Load, mesh: Mesh, rules: Rules) -> MllmInputs:
    b, n = load.batch, load.context
    tokens, mask = (spread((b, n), dtype, mesh, rules) for dtype in (jnp.int32, jnp.bool_))
    spec = jax.sharding.PartitionSpec(None, *tokens.sharding.spec)
    return MllmInputs(tokens, jax.ShapeDtypeStruct((3, b, n), jnp.int32, sharding=NamedSharding(mesh, spec)), mask)


def spread(shape: tuple[int, ...], dtype: Any, mesh: Mesh, rules: Rules = RULES) -> jax.ShapeDtypeStruct:
    """An abstract array whose samples (first axis) are spread over the mesh. Raises UserError if they do not divide."""
    spec = resolve(("batch",), shape[:1], mesh, rules)
    if spec != resolve(("batch",), None, mesh, rules):
        raise UserError(f"a batch of {shape[0]} samples does not divide among the devices of mesh {dict(mesh.shape)}")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _like(x: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(x.shape, dtype if floating else x.dtype, sharding=x.sharding)


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A random key on every device."""
    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))
