"""The contract of a text encoder that a DiT keeps for itself."""

from typing import Protocol, runtime_checkable

from metacanvas_jax.types import States, Text


@runtime_checkable
class TextEncoder(Protocol):
    """Maps tokens to the states that the DiT reads. Which of its states these are is the encoder's own choice."""

    def __call__(self, text: Text) -> States:
        """States and their mask; the mask is False on padding."""
        ...
