"""How a training begins: the shapes of its parameters, where they lie, and their first values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.rules import Rules, check_whole, placed, shardings
from metacanvas_jax.train.checkpoints import Checkpoints
from metacanvas_jax.train.job import FitConfig, Job
from metacanvas_jax.train.parameters import check_memory, some
from metacanvas_jax.train.state import TrainState, abstract_state, cast, new_state
from metacanvas_jax.trees import flat, held_dtype, nested, partition, without
from metacanvas_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes and shardings of what a training holds on its mesh."""

    trainable: Params
    frozen: Params
    state: TrainState

    @property
    def shardings(self) -> TrainState:
        """Where the state lies."""
        return jax.tree.map(lambda x: x.sharding, self.state)


def shapes(job: Job, config: FitConfig, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules) -> Shapes:
    """Computes nothing. Raises UserError for a large parameter that every device would hold whole."""
    boxed = jax.eval_shape(job.init, jax.random.key(0))
    abstract = placed(boxed, shardings(boxed, mesh, rules, config.mesh.whole))
    check_whole(abstract, meant=config.mesh.whole)
    trainable, frozen = partition(abstract, job.rules)
    frozen = without(frozen, job.unread)
    return Shapes(trainable, frozen, abstract_state(trainable, optimizer, mesh, ema=config.ema_decay is not None))


def begin(
    job: Job,
    config: FitConfig,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    shapes: Shapes,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Params]:
    """The state to continue from and the frozen parameters.

    Where there is a checkpoint, the state comes from it, and weights are read for the frozen parameters only.
    Parameters that have no weights get the values of ``job.init(key)``.
    """
    resumes, known = checkpoints.saved is not None, flat(shapes.trainable) | flat(shapes.frozen)
    needed = flat(shapes.frozen) if resumes else known
    check_memory(known)
    loaded = {} if job.load is None else _loaded(job.load(nested(needed)), known, needed)
    frozen = _cast(_filled(job, key, shapes.frozen, loaded), config.frozen_dtype, job.keep_float32)
    if resumes:
        return checkpoints.restore(shapes.state), frozen
    trainable = _filled(job, key, shapes.trainable, loaded)
    ema = config.ema_decay is not None
    make = jax.jit(lambda params: new_state(params, optimizer, ema=ema), out_shardings=shapes.shardings)
    return make(trainable), frozen


def _loaded(params: Params, known: Mapping[str, Any], needed: Mapping[str, Any]) -> dict[str, Any]:
    """Checked leaves by path, on the mesh; those that are not needed are left out."""
    leaves = flat(params)
    for path, leaf in leaves.items():
        if path not in known:
            raise UserError(f"loaded parameter {path} is not one of the model's")
        if tuple(leaf.shape) != known[path].shape:
            raise UserError(
                f"loaded parameter {path} has shape {tuple(leaf.shape)}, the model's is {known[path].shape}"
            )
    return {path: jax.device_put(leaf, known[path].sharding) for path, leaf in leaves.items() if path in needed}


def _filled(job: Job, key: Key[Array, ""], abstract: Params, loaded: Mapping[str, Any]) -> Params:
    """Loaded parameters, and the others from ``init``, which computes these only, where they are to lie."""
    wanted = flat(abstract)
    missing = {path: leaf.sharding for path, leaf in wanted.items() if path not in loaded}
    made = some(job.init, key, missing, missing)
    return nested({path: loaded[path] if path in loaded else made[path] for path in wanted})


def _cast(frozen: Params, dtype: str, keep_float32: Sequence[str]) -> Params:
    # Leaf by leaf, so that never two copies of everything are held.
    leaves = flat(frozen)
    for path in leaves:
        leaves[path] = cast(leaves[path], held_dtype(path, dtype, keep_float32))
    return nested(leaves)
