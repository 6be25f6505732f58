"""A batch: what its arrays are, and how the MLLM and the autoencoder read it.

Batches are dicts of arrays with the samples first:

- ``tokens`` [b l], ``positions`` [b 3 l], ``mask`` [b l] and, optionally, ``media``: the MLLM reads them;
- ``text_tokens`` [b n], ``text_mask`` [b n] (optional): for the text encoder that a DiT keeps for itself;
- ``pixels`` [b t h w 3], uint8: the target; ``source`` [b t h w 3] and ``references`` [b r h w 3] if the task has them;
- ``task``: a ``TaskName``;
- ``weights`` [b l]: on which tokens the loss of the MLLM counts, and how much.

A batch may hold stored results instead of what they were computed from: the ``context`` of a prompt
(``train/contexts.py``), and ``latents``, ``source_latents`` [b t h w c] and ``reference_latents`` [b r h w c] in place
of pixels (``data/latents.py``).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from metacanvas_jax.data.samples import LATENTS
from metacanvas_jax.tasks import TASKS, GivenLatents, TaskName
from metacanvas_jax.types import MllmInputs, Params, Text

Batch = Mapping[str, Any]


def mllm_inputs(batch: Batch) -> MllmInputs:
    """The part of a batch that the MLLM and the text encoder read; the axis of positions is moved to the front.

    Arrays of a batch on the host stay on the host.
    """
    positions = batch["positions"].swapaxes(0, 1)
    text = Text(batch["text_tokens"], batch["text_mask"]) if "text_tokens" in batch else None
    return MllmInputs(batch["tokens"], positions, batch["mask"], tuple(batch.get("media", ())), text)


def batch_of(inputs: MllmInputs) -> dict[str, Any]:
    """The reverse of ``mllm_inputs``."""
    batch = {"tokens": inputs.tokens, "positions": inputs.positions.swapaxes(0, 1), "mask": inputs.mask}
    if inputs.text is not None:
        batch |= {"text_tokens": inputs.text.tokens, "text_mask": inputs.text.mask}
    return batch | ({"media": inputs.media} if inputs.media else {})


def to_signed(pixels: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """Bytes to [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def encode(vae: nn.Module, params: Params, pixels: UInt8[Array, "b t h w 3"]) -> Float[Array, "b T H W c"]:
    """Latents of bytes."""
    return vae.apply({"params": params}, to_signed(pixels), method="encode")


def latents_of(vae: nn.Module, params: Params, batch: Batch, part: str) -> Float[Array, "b T H W c"]:
    """The latents of ``pixels``, ``source`` or ``references`` [b r h w 3] of a batch: stored ones if it has them."""
    if LATENTS[part] in batch:
        return jnp.asarray(batch[LATENTS[part]]).astype(jnp.float32)
    if part != "references":
        return encode(vae, params, batch[part])
    each = encode(vae, params, rearrange(batch[part], "b r h w c -> (b r) 1 h w c"))
    return rearrange(each, "(b r) 1 h w c -> b r h w c", r=batch[part].shape[1])


def given_latents(vae: nn.Module, params: Params, task: TaskName, batch: Batch) -> GivenLatents:
    """The latents of what a task gives to the DiT: its source, its references one by one, or its first frame.

    In a batch without target (sampling) ``source`` holds the first frame of image-to-video.
    """
    medium = TASKS[task.name].vae
    if medium == "source":
        return GivenLatents(source=latents_of(vae, params, batch, "source"))
    if medium == "references":
        return GivenLatents(references=latents_of(vae, params, batch, "references"))
    if medium == "first frame" and LATENTS["pixels"] in batch:  # of a causal autoencoder, which codes it on its own
        return GivenLatents(first=latents_of(vae, params, batch, "pixels")[:, :1])
    if medium == "first frame":
        return GivenLatents(first=encode(vae, params, (batch.get("source", batch.get("pixels")))[:, :1]))
    return GivenLatents()
