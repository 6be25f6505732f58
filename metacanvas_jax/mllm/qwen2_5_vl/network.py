"""Qwen2.5-VL: vision tower and language model, read once and then written on.

Attention is causal and the adapters act on canvas tokens only. The states of a context therefore depend on no trained
parameter: ``encode`` computes them once, and ``write`` runs the canvas tokens against the keys and values it kept.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.mllm.qwen2_5_vl.language import Language, LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import Vision, VisionConfig
from metacanvas_jax.nn.layers import Dtype
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.parallel.activations import constrain, part
from metacanvas_jax.types import Context, KeyValues, Media, MllmInputs


@dataclasses.dataclass(frozen=True)
class MllmConfig:
    """A language model and its vision tower; without ``vision`` it reads text only.

    Raises ValueError if the tower's tokens do not have the width of the language model.
    """

    language: LanguageConfig
    vision: VisionConfig | None = None

    def __post_init__(self):
        if self.vision is not None and self.vision.out_width != self.language.width:
            raise ValueError(
                f"vision out_width {self.vision.out_width} is not the language width {self.language.width}"
            )


_LANGUAGE_3B = LanguageConfig(
    vocab=151936,
    width=2048,
    layers=36,
    heads=16,
    kv_heads=2,
    mlp=11008,
    rope_sections=(16, 24, 24),
    tied=True,
)
_VISION_3B = VisionConfig(
    depth=32, width=1280, heads=16, mlp=3420, out_width=2048, full_attention_layers=(7, 15, 23, 31)
)


def qwen2_5_vl_3b(*, lora: LoraConfig | None = None, remat: str = "none", dtype: Dtype = "float32") -> MllmConfig:
    """Qwen2.5-VL-3B-Instruct."""
    language = dataclasses.replace(_LANGUAGE_3B, lora=lora, remat=remat, dtype=dtype)
    return MllmConfig(language, dataclasses.replace(_VISION_3B, remat=remat, dtype=dtype))


def qwen2_5_vl_7b(*, lora: LoraConfig | None = None, remat: str = "none", dtype: Dtype = "float32") -> MllmConfig:
    """Qwen2.5-VL-7B-Instruct: wider, shallower, and with a head of its own."""
    sizes = {"vocab": 152064, "width": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "mlp": 18944, "tied": False}
    language = dataclasses.replace(_LANGUAGE_3B, **sizes, lora=lora, remat=remat, dtype=dtype)
    return MllmConfig(language, dataclasses.replace(_VISION_3B, out_width=3584, remat=remat, dtype=dtype))


def place(
    embeddings: Float[Array, "b l d"], features: Float[Array, "b r d"], slots: Int[Array, "b r"]
) -> Float[Array, "b l d"]:
    """Puts features at their slots; a slot of ``l`` or more drops its feature."""
    put = jax.vmap(lambda row, slot, feature: row.at[slot].set(feature, mode="drop"))
    return put(embeddings, slots, features.astype(embeddings.dtype))


def next_position(positions: Int[Array, "3 b l"], mask: Bool[Array, "b l"]) -> Int[Array, " b"]:
    """One after the largest position of a real token on any axis."""
    return jnp.max(jnp.where(mask[None], positions, -1), axis=(0, 2)) + 1


def example(config: MllmConfig) -> tuple[MllmInputs, Float[Array, "1 1 d"], Int[Array, "3 1 1"]]:
    """The smallest arguments of ``Qwen25VL.__call__`` that touch every parameter, for ``init`` and ``eval_shape``."""
    media: tuple[Media, ...] = ()
    if config.vision is not None:
        side = config.vision.merge
        patches = jnp.zeros((1, 1, side**2, config.vision.patch_values))
        media = (Media(patches, jnp.zeros((1, 1, 1), jnp.int32), (1, side, side)),)
    positions = jnp.zeros((3, 1, 1), jnp.int32)
    inputs = MllmInputs(jnp.zeros((1, 1), jnp.int32), positions, jnp.ones((1, 1), bool), media)
    return inputs, jnp.zeros((1, 1, config.language.width)), positions


class Qwen25VL(Mllm):
    """The multimodal language model. Its parameters are ``language/...`` and ``vision/...``."""

    config: MllmConfig

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return self.config.language.width

    def setup(self):
        """Parameters."""
        self.language = Language(self.config.language)
        if self.config.vision is not None:
            self.vision = Vision(self.config.vision)

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
        hidden, past = self.language.read(self.embed(inputs), inputs.positions, inputs.mask, cache=cache)
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
        embeddings = self.embed(inputs)
        length = embeddings.shape[1]
        hidden = self.language.read_and_write(
            jnp.concatenate([embeddings, canvas.astype(embeddings.dtype)], axis=1),
            jnp.concatenate([inputs.positions, positions], axis=2),
            jnp.concatenate([inputs.mask, jnp.ones(canvas.shape[:2], bool)], axis=1),
            lora_from=length,
            deterministic=deterministic,
        )
        return hidden[:, :length], hidden[:, length:]

    @part("mllm")
    def every_layer(self, inputs: MllmInputs) -> Float[Array, "layers b l d"]:
        """Output of every decoder layer on a context, before the final norm."""
        return self.language.every_layer(self.embed(inputs), inputs.positions, inputs.mask)

    @part("mllm")
    def logits(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Next-token logits of hidden states after the final norm, in float32."""
        return self.language.logits(hidden)

    def embed(self, inputs: MllmInputs) -> Float[Array, "b l d"]:
        """Token embeddings with the features of media in their slots."""
        embeddings = self.language.embed(inputs.tokens)
        for media in inputs.media:
            slots = rearrange(media.slots, "b i r -> b (i r)")
            features = rearrange(self.see(media), "b i r d -> b (i r) d")
            embeddings = place(embeddings, features, slots)
        return constrain(embeddings, ("batch", "seq", "embed"))

    def see(self, media: Media) -> Float[Array, "b i r d"]:
        """Merged tokens of images or videos of one grid."""
        if self.config.vision is None:
            raise ValueError("this model has no vision tower: its inputs cannot hold media")
        count = media.patches.shape[1]
        patches = rearrange(media.patches, "b i p q -> (b i) p q")
        return rearrange(self.vision(patches, media.grid), "(b i) r d -> b i r d", i=count)
