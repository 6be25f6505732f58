"""One training step: frozen work, loss and gradient, update; written once for every training of the project."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from metacanvas_jax.errors import UserError
from metacanvas_jax.train.optimizer import global_norm
from metacanvas_jax.train.state import TrainState, step_key, update_ema
from metacanvas_jax.types import Params

Batch = PyTree
"""Arrays with the samples along their first axis."""
Metrics = dict[str, Float[Array, ""]]
Prepare = Callable[[Params, Batch, Key[Array, ""]], Any]
"""``prepare(frozen, batch, key) -> prepared``: the part without gradient (frozen MLLM prefix, autoencoder)."""
Loss = Callable[[Params, Params, Any, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]
"""``loss(trainable, frozen, prepared, key) -> (mean, further means to log)``.

Where the means are over something that microbatches have different numbers of, such as tokens, the metrics hold that
number as ``weight``, which is not logged."""
Step = Callable[[TrainState, Params, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]


def make_step(
    prepare: Prepare,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    ema_warmup: bool = True,
    max_skips: int = 0,
    state_shardings: TrainState | None = None,
) -> Step:
    """A jitted ``step(state, frozen, batch, key) -> (state, metrics)``; the state is donated.

    ``key`` is the seed's key, the same at every step: the step folds its own number in. With ``accumulate``
    microbatches the batch is taken apart by stride (samples ``i::accumulate``), so that a batch sharded along its first
    axis stays where it is, and losses and gradients are averaged by their ``weight`` (equally without one): the step is
    that of the whole batch. Frozen work is done per microbatch to bound its memory.

    The metrics are those of ``loss`` and besides ``loss``, ``grad_norm`` (before clipping), ``param_norm`` (after the
    update), ``finite`` (1 or 0) and ``skipped``. If loss or gradient norm is not finite, the batch is skipped: nothing
    but ``step`` and ``skipped`` changes. After ``max_skips`` of them the old state is returned with ``finite`` False
    instead, and it never changes again.

    Raises:
        UserError: (when traced) the batch does not divide into ``accumulate`` parts.
    """
    if accumulate < 1:
        raise UserError(f"accumulate is {accumulate}, expected at least 1 microbatch per step")

    def forward(params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Params, Metrics]:
        prepare_key, loss_key = jax.random.split(key)
        prepared = prepare(frozen, batch, prepare_key)  # outside of the differentiated function
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, prepared, loss_key)
        return grads, metrics | {"loss": value}

    def averaged(params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Params, Metrics]:
        if accumulate == 1:
            grads, metrics = forward(params, frozen, batch, key)
            return grads, {name: value for name, value in metrics.items() if name != "weight"}

        def add(total: Params, part: tuple[Array, Batch]) -> tuple[Params, Metrics]:
            index, batch = part
            grads, metrics = forward(params, frozen, batch, jax.random.fold_in(key, index))
            if "weight" in metrics:
                grads = jax.tree.map(lambda x: x * metrics["weight"], grads)
            return jax.tree.map(jnp.add, total, grads), metrics

        parts = jax.tree.map(lambda x: _microbatches(x, accumulate), batch)
        zeros = jax.tree.map(jnp.zeros_like, params)
        total, metrics = jax.lax.scan(add, zeros, (jnp.arange(accumulate, dtype=jnp.int32), parts))
        if "weight" not in metrics:
            return jax.tree.map(lambda x: x / accumulate, total), jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
        weights = metrics.pop("weight")
        whole = jnp.maximum(jnp.sum(weights), 1.0)
        means = jax.tree.map(lambda x: jnp.sum(x * weights) / whole, metrics)
        return jax.tree.map(lambda x: x / whole, total), means

    def step(state: TrainState, frozen: Params, batch: Batch, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        grads, metrics = averaged(state.params, frozen, batch, step_key(key, state.step))
        with jax.named_scope("optimizer"):
            norm = global_norm(grads)
        healthy = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        finite = state.finite & (healthy | (state.skipped < max_skips))

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("ema"):
            ema = None if ema_decay is None else update_ema(state.ema, params, state.step, ema_decay, ema_warmup)
        new = TrainState(state.step + 1, params, opt_state, ema, finite, state.skipped)

        with jax.named_scope("optimizer"):
            skipping = state.replace(step=state.step + 1, skipped=state.skipped + 1)
            new = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, skipping)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state).replace(finite=finite)
        metrics = metrics | {
            "grad_norm": norm,
            "param_norm": global_norm(new.params),
            "finite": finite.astype(jnp.float32),
            "skipped": new.skipped.astype(jnp.float32),
        }
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if state_shardings is None else (state_shardings, None))


def _microbatches(x: Array, parts: int) -> Array:
    if x.shape[0] % parts:
        raise UserError(f"a batch of {x.shape[0]} samples does not divide into {parts} microbatches")
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
