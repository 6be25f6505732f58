"""The contract of a multimodal language model (MLLM): everything that the rest of the method knows about one."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from metacanvas_jax.types import Context, MllmInputs


@runtime_checkable
class Mllm(Protocol):
    """A causal model whose adapters act on canvas tokens only.

    What it makes of a prompt therefore depends on no trained parameter: ``encode`` runs once and without gradient, and
    ``write`` runs the canvas tokens against the keys and values that ``encode`` kept.
    """

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        ...

    def encode(self, inputs: MllmInputs, *, cache: bool = True) -> Context:
        """Reads text and media; ``cache`` keeps keys and values, which ``write`` needs.

        ``Context.hidden`` is after the final norm. While parameters are initialised it makes those of the language head
        too, which nothing here reads but which belong to the published weights.
        """
        ...

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
        ...
