"""The contract of a text encoder that a DiT keeps for itself."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from metacanvas_jax.types import States, Text


class TextEncoder(nn.Module):
    """Maps tokens to the states that the DiT reads. Which of its states these are is the encoder's own choice.

    ``length`` is the number of states that the DiT reads; None: all of them.
    """

    config: Any
    length: int | None = None

    def __call__(self, text: Text) -> States:
        """States and their mask; the mask is False on padding."""
        raise NotImplementedError


def smallest_arguments(config: Any) -> tuple[Text]:
    """The smallest text that an encoder of any config can be initialised with: one token."""
    del config
    tokens = jnp.zeros((1, 1), jnp.int32)
    return (Text(tokens, tokens == 0),)
