"""The context connector: from hidden states of the MLLM to the text states of a DiT."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from metacanvas_jax.nn.layers import Dense, Dtype, RMSNorm
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.types import States

Activation = Literal["gelu", "gelu_tanh", "silu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class ContextConnectorConfig:
    """Two-layer MLP (paper D.1), or the identity, for a DiT that was trained on the states of this very MLLM.

    The DiT does not read the first ``skip`` states of a prompt: those of a system prompt that never changes. Of an MLP,
    the hidden layer has ``expansion`` times the width of the input, unless ``hidden`` gives its size. ``in_width``, if
    given, is checked. ``out_norm`` adds an RMS norm, for a DiT that does not normalise its text states itself.
    ``weights`` is a file or folder of published weights to start from (``connectors/published.py``; empty: random).
    """

    out_width: int
    in_width: int | None = None
    expansion: int = 4
    hidden: int | None = None
    activation: Activation = "gelu"
    dropout: float = 0.1
    out_norm: bool = False
    dtype: Dtype = "float32"
    kind: Literal["mlp", "identity"] = "mlp"
    skip: int = 0
    weights: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError on a dropout outside [0, 1)."""
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ContextConnectorConfig: dropout must be in [0, 1), not {self.dropout}.")


class ContextConnector(nn.Module):
    """Linear, activation, dropout, linear; or nothing at all."""

    config: ContextConnectorConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "b l i"], *, deterministic: bool = True) -> Float[Array, "b l o"]:
        """Maps every state by itself; uses the rng "dropout" unless ``deterministic``.

        Raises ValueError when the states have another width than the config says.
        """
        c = self.config
        width = hidden.shape[-1]
        if c.in_width not in (None, width):
            raise ValueError(f"The context connector expects states of width {c.in_width}, not {width}.")
        if c.kind == "identity":
            return hidden
        x = Dense(c.hidden or c.expansion * width, ("embed", "mlp"), c.dtype, name="fc1")(hidden)
        x = constrain(ACTIVATIONS[c.activation](x), ("batch", "seq", "mlp"))
        x = nn.Dropout(c.dropout)(x, deterministic=deterministic)
        x = Dense(c.out_width, ("mlp", "embed"), c.dtype, name="fc2")(x)
        return RMSNorm(1e-6, name="norm")(x) if c.out_norm else x


def without_first(mask: Bool[Array, "b l"], count: int) -> Bool[Array, "b l"]:
    """The mask without its first ``count`` real tokens, wherever padding stands."""
    return mask if count == 0 else mask & (jnp.cumsum(mask, axis=1, dtype=jnp.int32) > count)


def joined(*parts: States) -> States:
    """Texts one after the other, in the dtype of the first. All of them need a mask."""
    states = [part.states.astype(parts[0].states.dtype) for part in parts]
    return States(jnp.concatenate(states, axis=1), jnp.concatenate([part.mask for part in parts], axis=1))
