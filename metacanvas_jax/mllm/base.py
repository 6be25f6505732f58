"""The contract of a multimodal language model (MLLM): everything that the rest of the method knows about one.

Its inputs are made on the host: ``prompt.py`` makes the tokens, ``media.py`` the patches of images and videos, and
``positions.py`` the three numbers that are the position of a token.
"""

from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from metacanvas_jax.types import Context, KeyValues, MllmInputs


class Mllm(nn.Module):
    """A causal model whose adapters act on canvas tokens only.

    What it makes of a prompt therefore depends on no trained parameter: ``encode`` runs once and without gradient, and
    ``write`` runs the canvas tokens against the keys and values that ``encode`` kept.
    """

    frames_apart: ClassVar[bool] = False
    """Whether every temporal patch of a video, and so every keyframe of a canvas, is a block of its own."""

    config: Any

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        raise NotImplementedError

    def embed(self, inputs: MllmInputs) -> Float[Array, "b l d"]:
        """What the first layer reads: embeddings of tokens, with the features of media in their slots."""
        raise NotImplementedError

    def encode(self, inputs: MllmInputs, *, cache: bool = True) -> Context:
        """Reads text and media; ``cache`` keeps keys and values, which ``write`` needs.

        ``Context.hidden`` is after the final norm. While parameters are initialised it makes those of the language head
        too, which nothing here reads but which belong to the published weights.
        """
        raise NotImplementedError

    def write(
        self,
        canvas: Float[Array, "b n d"],
        positions: Int[Array, "3 b n"],
        context: Context,
        *,
        bidirectional: bool = False,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """Hidden states, after the final norm, of tokens that follow an encoded prompt. The adapters act here."""
        raise NotImplementedError

    def extend(
        self,
        tokens: Int[Array, "b n"],
        positions: Int[Array, "3 b n"],
        past: KeyValues,
        mask: Bool[Array, "b l"],
    ) -> tuple[Float[Array, "b n d"], KeyValues]:
        """Text that goes on after ``past``, of which ``mask`` says what is seen: its hidden states, keys and values.

        The keys and values that are returned are those of ``tokens`` alone, ``[layers b n g e]``; the caller puts them
        where it keeps the others. Hidden states are after the final norm. No adapter acts. See ``generation.py``.
        """
        raise NotImplementedError

    def logits(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Next-token logits, in float32, of hidden states after the final norm."""
        raise NotImplementedError
