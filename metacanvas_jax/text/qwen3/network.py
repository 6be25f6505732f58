"""Qwen3 as a text encoder: the states after several of its layers lie side by side.

The layers are those of the MLLMs' decoder (``mllm/decoder.py``), with a norm per head on queries and keys and without
biases; layers after the last one that is read are left out. Sources: transformers
``models/qwen3/modeling_qwen3.py``; the diffusers pipeline that uses it for which layers.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from einops import rearrange

from metacanvas_jax.mllm.decoder import Decoder, DecoderConfig
from metacanvas_jax.nn.layers import Dtype
from metacanvas_jax.parallel.activations import part
from metacanvas_jax.text.base import TextEncoder
from metacanvas_jax.types import States, Text


@dataclasses.dataclass(frozen=True)
class LanguageConfig(DecoderConfig):
    """Sizes of the decoder, see ``DecoderConfig``. Every frequency turns with the place in the text."""

    qk_norm = True

    qkv_bias: bool = False


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3 decoder; the defaults are Qwen3-4B's. ``states`` are the layers whose states are read, from 1.

    Raises ValueError for sizes that do not fit together.
    """

    vocab: int = 151936
    hidden: int = 2560
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    mlp: int = 9728
    theta: float = 1e6
    eps: float = 1e-6
    states: tuple[int, ...] = (9, 18, 27)
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Checks heads and layers."""
        if self.heads % self.kv_heads or self.head_width % 2:
            raise ValueError(
                f"Qwen3Config: {self.heads} heads must be a multiple of {self.kv_heads} kv_heads, "
                f"and head_width {self.head_width} even."
            )
        if not self.states or not 0 < min(self.states) <= max(self.states) < self.layers:
            raise ValueError(f"Qwen3Config: states {self.states} must be layers from 1 to {self.layers - 1}.")

    @property
    def width(self) -> int:
        """Width of the states that the DiT reads."""
        return len(self.states) * self.hidden

    @property
    def language(self) -> LanguageConfig:
        """The layers that are run."""
        return LanguageConfig(
            vocab=self.vocab,
            width=self.hidden,
            layers=max(self.states),
            heads=self.heads,
            kv_heads=self.kv_heads,
            mlp=self.mlp,
            rope_sections=(self.head_width // 2, 0, 0),
            rope_theta=self.theta,
            norm_eps=self.eps,
            tied=True,
            head_width=self.head_width,
            dtype=self.dtype,
        )


def qwen3_4b(**changes: Any) -> Qwen3Config:
    """Qwen3-4B; of its 36 layers 27 are run."""
    return dataclasses.replace(Qwen3Config(), **changes)


class Qwen3(TextEncoder):
    """Hidden states of several layers ``[b l k d]`` as ``[b l (k d)]``, before any final norm.

    The DiT was trained to attend to the states of padding too, which stands on the right: the mask is True everywhere.
    """

    config: Qwen3Config

    def setup(self) -> None:
        """The decoder."""
        self.language = Decoder(self.config.language)

    @part("mllm")
    def __call__(self, text: Text) -> States:
        """No token sees padding, not even padding itself."""
        batch, length = text.tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, None], (3, batch, length))
        layers = self.language.every_layer(self.language.embed(text.tokens), positions, text.mask)
        read = jnp.stack([layers[number - 1] for number in self.config.states])
        states = rearrange(read, "k b l d -> b l (k d)")
        return States(states, jnp.ones(states.shape[:2], bool))
