"""What is trained: ``prepare`` (no gradient) and ``loss`` for painting with MetaCanvas and for teaching an MLLM."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from metacanvas_jax import tasks
from metacanvas_jax.data.batch import Batch, given_latents, latents_of, mllm_inputs
from metacanvas_jax.diffusion.flow import TimeConfig, flow_loss, sample_time
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.tasks import TASKS, GivenLatents, TaskName
from metacanvas_jax.train.contexts import samples_first
from metacanvas_jax.train.step import Loss, Metrics, Prepare
from metacanvas_jax.trees import merge
from metacanvas_jax.types import Context, Params


@struct.dataclass
class Prepared:
    """The result of the frozen networks on a batch: all that the loss of painting needs."""

    context: Context
    latents: Float[Array, "b t h w c"]
    given: GivenLatents = dataclasses.field(default_factory=GivenLatents)
    task: TaskName = dataclasses.field(default_factory=TaskName)


def painting(
    model: MetaCanvas,
    vae: nn.Module,
    time: TimeConfig,
    *,
    channels: bool = False,
    guidance: float | None = None,
    canvas_dropout: float = 0.0,
) -> tuple[Prepare, Loss]:
    """Rectified flow of the DiT under the MLLM's plan (paper A.2). The frozen tree holds ``vae`` beside the model.

    ``channels`` and ``guidance`` are those of ``tasks.for_dit``. A share ``canvas_dropout`` of the samples is drawn
    without a canvas.
    """

    def prepare(frozen: Params, batch: Batch, key: Key[Array, ""]) -> Prepared:
        del key
        task = batch.get("task", TaskName())
        if "context" in batch:
            context = samples_first(batch["context"])
        else:
            context = model.apply({"params": _model(frozen)}, mllm_inputs(batch), method="read")
        latents = latents_of(vae, frozen["vae"], batch, "pixels")
        return Prepared(context, latents, given_latents(vae, frozen["vae"], task, batch), task)

    def loss(
        trainable: Params, frozen: Params, prepared: Prepared, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        variables = {"params": merge(trainable, _model(frozen))}
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        shape = None
        if model.canvas is not None:
            shape = model.canvas.config.shape_for(prepared.latents.shape[1:4])
        plan = model.apply(
            variables, prepared.context, shape, method="plan", deterministic=False, rngs={"dropout": dropout_key}
        )
        noise = jax.random.normal(noise_key, prepared.latents.shape, prepared.latents.dtype)
        task, (samples, frames) = TASKS[prepared.task.name], noise.shape[:2]
        level = tasks.frame_levels(task, sample_time(time_key, (samples,), time), frames)
        given = tasks.for_dit(prepared.given, noise, channels=channels, guidance=guidance)
        if canvas_dropout:
            canvas_key = jax.random.fold_in(key, 3)  # of its own: with a share of 0 no random number changes
            plan = plan.replace(kept=~jax.random.bernoulli(canvas_key, canvas_dropout, (samples,)))
        velocity = lambda latents, t: model.apply(variables, latents, t, plan, given, method="velocity")  # noqa: E731
        return flow_loss(velocity, prepared.latents, noise, level, tasks.loss_mask(task, samples, frames)), {}

    return prepare, loss


def understanding(model: Mllm, recall: int = 0, within: int | None = None, facts: float = 0.0) -> tuple[Prepare, Loss]:
    """Next-token prediction on the tokens whose ``weights`` are positive; logs the accuracy on them.

    With ``recall``, the states of the first ``within`` positions must also predict the last ``recall`` tokens, their
    own included (``recall_loss``). States of a large model say what its words are and which words belong together;
    those of a small model say little more than the next word. A DiT that reads such states learns neither what to draw
    nor which of two drawings is the red one.

    With ``facts``, this times ``fact_loss`` is added: the first channels of states that a DiT will read must tell what
    is known there, and the others nothing. A state then binds object, colour, count and place of a group.
    """

    def prepare(frozen: Params, batch: Batch, key: Key[Array, ""]) -> Batch:
        del frozen, key
        return batch

    def loss(trainable: Params, frozen: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        del key
        variables = {"params": merge(trainable, frozen)}
        context = model.apply(variables, mllm_inputs(batch), cache=False, method="encode")
        logits = model.apply(variables, context.hidden[:, :-1], method="logits")
        targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        right = (jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets).astype(jnp.float32)
        total = jnp.maximum(jnp.sum(weights), 1.0)
        answers = -jnp.sum(picked * weights) / total
        metrics = {"accuracy": jnp.sum(right * weights) / total, "weight": jnp.sum(weights)}
        if facts:
            told = fact_loss(context.hidden, batch["facts"], batch["telling"])
            answers, metrics = answers + facts * told, metrics | {"facts": told}
        if not recall:
            return answers, metrics
        logits = lambda hidden: model.apply(variables, hidden, method="logits")  # noqa: E731
        first = slice(within)
        hidden, tokens, mask = context.hidden[:, first], batch["tokens"][:, first], batch["mask"][:, first]
        recalled = recall_loss(logits, hidden, tokens, mask, recall)
        return answers + recalled, metrics | {"recall": recalled}

    return prepare, loss


def fact_loss(
    hidden: Float[Array, "b l d"], facts: Float[Array, "b l f"], telling: Bool[Array, "b l"]
) -> Float[Array, ""]:
    """Mean squared error of the states that are ``telling``, summed over their channels.

    The first f channels should tell the facts, the others nothing. Where a fact is random, the best state tells its
    mean: the chance of it. The other channels would otherwise say which prompt this is, and a DiT that reads them
    learns prompts by heart. Nor may they be large and constant: a connector's norm would then make the facts small.
    """
    expected = jnp.pad(facts, ((0, 0), (0, 0), (0, hidden.shape[-1] - facts.shape[-1])))
    squares = jnp.sum((hidden.astype(jnp.float32) - expected) ** 2, axis=-1)
    counts = telling.astype(jnp.float32)
    return jnp.sum(squares * counts) / jnp.maximum(jnp.sum(counts), 1.0)


def recall_loss(
    logits: Callable[[Float[Array, "b l d"]], Float[Array, "b l v"]],
    hidden: Float[Array, "b l d"],
    tokens: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    count: int,
) -> Float[Array, ""]:
    """Mean cross-entropy of each token and the ``count - 1`` tokens before it, predicted from its state.

    The language head predicts the token ``k`` places back from the state whose channels are rolled by ``k + 1`` of
    ``count + 1`` parts of the width. The task therefore needs no parameters of its own.
    """
    length, width, losses = *hidden.shape[1:], []
    for back in range(count):
        turned = jnp.roll(hidden[:, back:], -((back + 1) * width // (count + 1)), axis=-1)
        telling = jax.nn.log_softmax(logits(turned))
        picked = jnp.take_along_axis(telling, tokens[:, : length - back, None], axis=-1)[..., 0]
        both = (mask[:, back:] & mask[:, : length - back]).astype(jnp.float32)
        losses.append(-jnp.sum(picked * both) / jnp.maximum(jnp.sum(both), 1.0))
    return jnp.mean(jnp.stack(losses))


def _model(frozen: Params) -> Params:
    return {name: tree for name, tree in frozen.items() if name != "vae"}
