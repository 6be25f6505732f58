"""An MLLM of two halves: a vision tower, and a decoder that reads once and is then written on.

Attention is causal and the adapters act on canvas tokens only. The states of a context therefore depend on no trained
parameter: ``encode`` computes them once, and ``write`` runs the canvas tokens against the keys and values it kept.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.mllm.decoder import Decoder, DecoderConfig
from metacanvas_jax.parallel.activations import constrain, part
from metacanvas_jax.types import Context, KeyValues, Media, MllmInputs


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
    """A language model and its vision tower; without ``vision`` it reads text only.

    Raises ValueError if the tower's tokens do not have the width of the language model.
    """

    language: DecoderConfig
    vision: Any = None

    def __post_init__(self):
        if self.vision is not None and self.vision.out_width != self.language.width:
            raise ValueError(
                f"vision out_width {self.vision.out_width} is not the language width {self.language.width}"
            )


def compared_sizes(config: VisionLanguageConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that are compared with a published folder, whose vision tower may be left out (``Network.sizes``)."""
    sizes = sizes | {"language.head_width": config.language.head_channels}
    if config.vision is None:
        return {name: size for name, size in sizes.items() if not name.startswith("vision")}
    return sizes


def place(
    embeddings: Float[Array, "b l d"], features: Float[Array, "b r d"], slots: Int[Array, "b r"]
) -> Float[Array, "b l d"]:
    """Puts features at their slots; a slot of ``l`` or more drops its feature."""
    put = jax.vmap(lambda row, slot, feature: row.at[slot].set(feature, mode="drop"))
    return put(embeddings, slots, features.astype(embeddings.dtype))


def next_position(positions: Int[Array, "3 b l"], mask: Bool[Array, "b l"]) -> Int[Array, " b"]:
    """One after the largest position of a real token on any axis."""
    return jnp.max(jnp.where(mask[None], positions, -1), axis=(0, 2)) + 1


def example(config: VisionLanguageConfig) -> tuple[MllmInputs, Float[Array, "1 1 d"], Int[Array, "3 1 1"]]:
    """The smallest arguments of ``VisionLanguage.__call__`` that make every parameter, for ``init`` and shapes."""
    media: tuple[Media, ...] = ()
    if config.vision is not None:
        side = config.vision.merge
        patches = jnp.zeros((1, 1, side**2, config.vision.patch_values))
        media = (Media(patches, jnp.zeros((1, 1, 1), jnp.int32), (1, side, side)),)
    positions = jnp.zeros((3, 1, 1), jnp.int32)
    inputs = MllmInputs(jnp.zeros((1, 1), jnp.int32), positions, jnp.ones((1, 1), bool), media)
    return inputs, jnp.zeros((1, 1, config.language.width)), positions


class VisionLanguage(Mllm):
    """The multimodal language model. Its parameters are ``language/...`` and ``vision/...``.

    ``tower`` is the module of its vision tower. It maps patches ``[b p q]`` of one grid to tokens ``[b r o]``, and to
    the features ``[s b r o]`` that are added to the output of the first ``s`` layers of the decoder (None: has none).
    """

    tower: ClassVar[type[nn.Module]]

    config: VisionLanguageConfig

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return self.config.language.width

    def setup(self):
        """Parameters."""
        self.language = Decoder(self.config.language)
        if self.config.vision is not None:
            self.vision = self.tower(self.config.vision)

    def __call__(
        self, inputs: MllmInputs, canvas: Float[Array, "b n d"], positions: Int[Array, "3 b n"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b n d"], Float[Array, "b l v"]]:
        """Hidden states of context and canvas, and logits; ``init`` makes every parameter with it."""
        context, written = self.joint(inputs, canvas, positions)
        return context, written, self.logits(context)

    @part("mllm")
    def encode(self, inputs: MllmInputs, *, cache: bool = True) -> Context:
        """Reads text and media. ``hidden`` is after the final norm; ``cache=False`` leaves the cache None.

        No adapter acts. Differentiable in all parameters; a frozen model stops the gradient outside.
        Raises ValueError for media without a vision tower.
        """
        embeddings, added = self._embed(inputs)
        hidden, past = self.language.read(embeddings, inputs.positions, inputs.mask, added=added, cache=cache)
        if self.is_initializing():
            self.logits(hidden)  # makes the head, which belongs to the published weights
        return Context(
            hidden=hidden, mask=inputs.mask, cache=past, next_position=next_position(inputs.positions, inputs.mask)
        )

    @part("mllm")
    def write(
        self,
        canvas: Float[Array, "b n d"],
        positions: Int[Array, "3 b n"],
        context: Context,
        *,
        bidirectional: bool = False,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """Hidden states (after the final norm) of canvas tokens that follow an encoded context; adapters act here.

        Raises ValueError if the context was encoded without its cache.
        """
        if context.cache is None:
            raise ValueError("the context holds no keys and values to write against: encode it with cache=True")
        return self.language.write(
            canvas, positions, context.cache, context.mask, bidirectional=bidirectional, deterministic=deterministic
        )

    @part("mllm")
    def extend(
        self,
        tokens: Int[Array, "b n"],
        positions: Int[Array, "3 b n"],
        past: KeyValues,
        mask: Bool[Array, "b l"],
    ) -> tuple[Float[Array, "b n d"], KeyValues]:
        """Hidden states of text that goes on after ``past``, and its own keys and values. No adapter acts."""
        return self.language.extend(self.language.embed(tokens), positions, past, mask)

    @part("mllm")
    def joint(
        self,
        inputs: MllmInputs,
        canvas: Float[Array, "b n d"],
        positions: Int[Array, "3 b n"],
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b n d"]]:
        """Context and canvas in one causal pass: the results of ``encode`` and ``write`` at a higher cost."""
        embeddings, added = self._embed(inputs)
        length, count = embeddings.shape[1], canvas.shape[1]
        hidden = self.language.read_and_write(
            jnp.concatenate([embeddings, canvas.astype(embeddings.dtype)], axis=1),
            jnp.concatenate([inputs.positions, positions], axis=2),
            jnp.concatenate([inputs.mask, jnp.ones(canvas.shape[:2], bool)], axis=1),
            lora_from=length,
            added=None if added is None else jnp.pad(added, ((0, 0), (0, 0), (0, count), (0, 0))),
            deterministic=deterministic,
        )
        return hidden[:, :length], hidden[:, length:]

    @part("mllm")
    def every_layer(self, inputs: MllmInputs) -> Float[Array, "layers b l d"]:
        """Output of every decoder layer on a context, before the final norm."""
        embeddings, added = self._embed(inputs)
        return self.language.every_layer(embeddings, inputs.positions, inputs.mask, added=added)

    @part("mllm")
    def logits(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Next-token logits of hidden states after the final norm, in float32."""
        return self.language.logits(hidden)

    def embed(self, inputs: MllmInputs) -> Float[Array, "b l d"]:
        """Token embeddings with the features of media in their slots."""
        return self._embed(inputs)[0]

    def see(self, media: Media) -> tuple[Float[Array, "b i r d"], Float[Array, "s b i r d"] | None]:
        """Merged tokens of images or videos of one grid, and what is added to the output of the first layers."""
        if self.config.vision is None:
            raise ValueError("this model has no vision tower: its inputs cannot hold media")
        count = media.patches.shape[1]
        tokens, added = self.vision(rearrange(media.patches, "b i p q -> (b i) p q"), media.grid)
        tokens = rearrange(tokens, "(b i) r d -> b i r d", i=count)
        return tokens, None if added is None else rearrange(added, "s (b i) r d -> s b i r d", i=count)

    def _embed(self, inputs: MllmInputs) -> tuple[Float[Array, "b l d"], Float[Array, "s b l d"] | None]:
        """What the first layer reads, and what is added to the output of the first layers (None: nothing)."""
        embeddings, sums = self.language.embed(inputs.tokens), None
        for media in inputs.media:
            slots = rearrange(media.slots, "b i r -> b (i r)")
            tokens, added = self.see(media)
            embeddings = place(embeddings, rearrange(tokens, "b i r d -> b (i r) d"), slots)
            if added is None:
                continue
            if sums is None:
                sums = jnp.zeros((added.shape[0], *embeddings.shape), embeddings.dtype)
            added = rearrange(added, "s b i r d -> s b (i r) d")
            sums = jax.vmap(place, in_axes=(0, 0, None))(sums, added, slots)
        return constrain(embeddings, ("batch", "seq", "embed")), sums
