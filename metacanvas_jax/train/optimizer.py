"""AdamW with global-norm clipping and the learning-rate schedules of the paper (sections 3.1 to 3.3)."""

import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params


def learning_rate(config: OptimizerConfig, step: int | Int[Array, ""]) -> Float[Array, ""]:
    """Learning rate of the update that takes ``step`` (counted from 0) to ``step + 1``."""
    step = jnp.asarray(step, jnp.float32)
    peak, low = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule == "constant":
        rate = jnp.full((), peak, jnp.float32)
    else:
        span = (config.total_steps or 0) - config.warmup_steps  # positive, as the config checks
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
        UserError: (when the state is made) the config has weight decay, but ``decay_rule`` matches no parameter.
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
