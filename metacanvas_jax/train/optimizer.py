"""AdamW with global-norm clipping and the learning-rate schedules of the paper (sections 3.1 to 3.3)."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metacanvas_jax.errors import UserError
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Plain data; the defaults are AdamW's own and the paper's clipping.

    The warm-up is linear from ``warmup_from`` to ``learning_rate`` over ``warmup_steps``. "cosine" and "linear" then
    fall to ``final_fraction * learning_rate`` at ``total_steps`` and stay there. Decay acts on parameters whose path
    matches ``decay_rule`` as a whole; the number of axes cannot tell kernels from gains, as scanned gains have two.
    """

    learning_rate: float
    warmup_steps: int = 0
    warmup_from: float = 0.0
    schedule: str = "constant"
    total_steps: int | None = None
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_rule: str = "(.*/)?kernel"
    clip: float | None = 1.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"optimizer.schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.schedule != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise UserError(
                f"optimizer.schedule {self.schedule!r} needs total_steps > warmup_steps ({self.warmup_steps}), "
                f"got {self.total_steps}"
            )
        if self.learning_rate <= 0 or self.warmup_from < 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise UserError(
                "optimizer: learning_rate must be positive; warmup_from, warmup_steps and weight_decay not negative"
            )
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"optimizer.clip is {self.clip}, expected a positive norm or None")


def learning_rate(config: OptimizerConfig, step: int | Int[Array, ""]) -> Float[Array, ""]:
    """Learning rate of the update that takes ``step`` (counted from 0) to ``step + 1``."""
    step = jnp.asarray(step, jnp.float32)
    peak, low = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule == "constant":
        rate = jnp.full((), peak, jnp.float32)
    else:
        span = (config.total_steps or 0) - config.warmup_steps  # positive: the config has seen to it
        done = jnp.clip((step - config.warmup_steps) / span, 0.0, 1.0)
        left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        rate = low + (peak - low) * left
    if config.warmup_steps == 0:
        return rate
    rising = config.warmup_from + (peak - config.warmup_from) * step / config.warmup_steps
    return jnp.where(step < config.warmup_steps, rising, rate)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW with decoupled decay.

    Raises:
        UserError: (when the state is made) weight decay is asked for but ``decay_rule`` matches no parameter.
    """
    parts = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=lambda params: decayed(params, config)))
    parts.append(optax.scale_by_learning_rate(lambda count: learning_rate(config, count)))
    chain = optax.chain(*parts)

    def update(updates, state, params=None):
        # Optax multiplies float decays with integer counts, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def decayed(params: Params, config: OptimizerConfig) -> Params:
    """True on every parameter that decays."""
    paths = flat(params)
    mask = {path: re.fullmatch(config.decay_rule, path) is not None for path in paths}
    if not any(mask.values()):
        raise UserError(f"optimizer.decay_rule {config.decay_rule!r} matches none of {len(paths)} trainable parameters")
    return nested(mask)


def global_norm(tree: Params) -> Float[Array, ""]:
    """Euclidean norm over all leaves, in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))
