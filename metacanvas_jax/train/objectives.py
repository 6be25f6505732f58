"""What is trained: ``prepare`` (no gradient) and ``loss`` for painting with MetaCanvas and for teaching an MLLM.

Batches are dicts of arrays with the samples first:

``tokens`` [b l], ``positions`` [b 3 l] and ``mask`` [b l] are what the MLLM reads, ``media`` (optional) its images;
``pixels`` uint8 [b t h w 3] is what the autoencoder reads; ``weights`` [b l] say which tokens the MLLM must predict.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key, UInt8

from metacanvas_jax.diffusion.flow import TimeConfig, flow_loss, sample_time
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.qwen import Qwen25VL
from metacanvas_jax.train.partition import merge
from metacanvas_jax.train.step import Loss, Metrics, Prepare
from metacanvas_jax.types import Context, MllmInputs, Params

Batch = Mapping[str, Any]


@struct.dataclass
class Prepared:
    """What painting needs of a batch once the frozen networks have run."""

    context: Context
    latents: Float[Array, "b t h w c"]


def mllm_inputs(batch: Batch) -> MllmInputs:
    """The MLLM's part of a batch; positions get their axis in front."""
    positions = jnp.moveaxis(jnp.asarray(batch["positions"]), 1, 0)
    return MllmInputs(batch["tokens"], positions, batch["mask"], tuple(batch.get("media", ())))


def batch_of(inputs: MllmInputs) -> dict[str, Any]:
    """The reverse of ``mllm_inputs``."""
    batch = {"tokens": inputs.tokens, "positions": inputs.positions.swapaxes(0, 1), "mask": inputs.mask}
    return batch | ({"media": inputs.media} if inputs.media else {})


def to_signed(pixels: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """Bytes to [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def painting(model: MetaCanvas, vae: nn.Module, time: TimeConfig) -> tuple[Prepare, Loss]:
    """Rectified flow of the DiT under the MLLM's plan (paper A.2). The frozen tree holds ``vae`` beside the model."""

    def prepare(frozen: Params, batch: Batch, key: Key[Array, ""]) -> Prepared:
        del key
        context = model.apply({"params": _model(frozen)}, mllm_inputs(batch), method="read")
        latents = vae.apply({"params": frozen["vae"]}, to_signed(batch["pixels"]), method="encode")
        return Prepared(context, latents)

    def loss(
        trainable: Params, frozen: Params, prepared: Prepared, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        variables = {"params": merge(trainable, _model(frozen))}
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        plan = model.apply(
            variables, prepared.context, method="plan", deterministic=False, rngs={"dropout": dropout_key}
        )
        noise = jax.random.normal(noise_key, prepared.latents.shape, prepared.latents.dtype)
        level = sample_time(time_key, (noise.shape[0],), time)
        velocity = lambda latents, t: model.apply(variables, latents, t, plan, method="velocity")  # noqa: E731
        return flow_loss(velocity, prepared.latents, noise, level), {}

    return prepare, loss


def understanding(model: Qwen25VL) -> tuple[Prepare, Loss]:
    """Next-token prediction on the tokens whose ``weights`` are positive; logs how many of them are guessed right."""

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
        return -jnp.sum(picked * weights) / total, {"accuracy": jnp.sum(right * weights) / total}

    return prepare, loss


def _model(frozen: Params) -> Params:
    return {name: tree for name, tree in frozen.items() if name != "vae"}
