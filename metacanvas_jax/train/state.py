"""The state of a training: everything that a step changes and a checkpoint holds."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Key

from metacanvas_jax.types import Params


@struct.dataclass
class TrainState:
    """Step, trainable parameters (float32), optimizer state and, optionally, their moving average.

    ``step`` counts the batches used. A step whose loss or gradient is not finite changes only ``step`` and ``skipped``.
    When more such steps come than may be skipped, ``finite`` becomes False. That step and all later ones then change
    nothing, so the host may notice late and still has the state in which it happened.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None
    finite: Bool[Array, ""]
    skipped: Int[Array, ""]


def new_state(params: Params, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """Step 0 with copies of the trainables as float32 masters (a step donates the state, never the caller's arrays)."""
    params = jax.tree.map(jnp.copy, cast(params, "float32"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        finite=jnp.ones((), jnp.bool_),
        skipped=jnp.zeros((), jnp.int32),
    )


def cast(params: Params, dtype: str) -> Params:
    """Floating leaves in ``dtype``; integers stay. Frozen weights are cast once with this, before training."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def step_key(key: Key[Array, ""], step: int | Int[Array, ""]) -> Key[Array, ""]:
    """The random key of a step: a function of seed and step alone, so resuming needs no saved generator."""
    return jax.random.fold_in(key, step)


def update_ema(ema: Params, params: Params, step: Int[Array, ""], decay: float, warmup: bool) -> Params:
    """``decay * ema + (1 - decay) * params``; with warm-up the decay is ``min(decay, (1 + n) / (10 + n))``.

    ``step`` is n, the number of updates made before this one.
    """
    rate = jnp.full((), decay, jnp.float32)
    if warmup:
        n = step.astype(jnp.float32)
        rate = jnp.minimum(rate, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda old, new: old + (1.0 - rate) * (new - old), ema, params)


def abstract_state(
    abstract: Params, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """Shapes and shardings of the state of abstract trainables, into which a checkpoint is restored.

    Moments and moving average have the shardings of their parameters; everything else is copied to all devices.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    masters = jax.tree.map(lambda x: _struct(x, x.sharding, jnp.float32), abstract)
    state = jax.eval_shape(lambda params: new_state(params, optimizer, ema=ema), masters)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda leaf, param: _struct(leaf, param.sharding),
        state.opt_state,
        masters,
        transform_non_params=lambda leaf: _struct(leaf, everywhere),
    )
    return TrainState(
        step=_struct(state.step, everywhere),
        params=masters,
        opt_state=opt_state,
        ema=masters if ema else None,
        finite=_struct(state.finite, everywhere),
        skipped=_struct(state.skipped, everywhere),
    )


def _struct(x: Any, sharding: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)
