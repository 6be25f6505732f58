"""The MetaQuery baseline: learnable 1D queries that the MLLM reads like a canvas and the DiT reads as text.

Source: MetaQuery (arXiv 2504.06256) as the paper uses it in section 3.1 (256 queries; alone or after the text).
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from metacanvas_jax.connectors.context import joined
from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.mllm.canvas import CanvasConfig, tokens_init, write_canvas
from metacanvas_jax.nn.layers import Dtype
from metacanvas_jax.types import Context, States


@dataclasses.dataclass(frozen=True)
class QueriesConfig:
    """``count`` queries. With ``bidirectional`` they attend to each other, otherwise causally.

    With ``after_context`` the DiT reads the MLLM's states of the prompt and then those of the queries; otherwise those
    of the queries alone (MetaQuery as published). Raises ValueError for less than one query.
    """

    count: int = 256
    bidirectional: bool = False
    after_context: bool = True

    def __post_init__(self) -> None:
        """Checks the count."""
        if self.count < 1:
            raise ValueError(f"QueriesConfig: count must be at least 1, not {self.count}.")

    @property
    def positions(self) -> CanvasConfig:
        """Positions of a canvas of one row whose tokens are numbered like text."""
        return CanvasConfig(rows=1, columns=self.count, dims=1, rope=False, bidirectional=self.bidirectional)


class Queries(nn.Module):
    """The learnable queries ``[1 1 n d]``, laid out as a canvas of one row."""

    config: QueriesConfig
    width: int
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self) -> Float[Array, "1 1 n d"]:
        """The queries in the MLLM's width."""
        init = nn.with_logical_partitioning(tokens_init, (None, "embed"))
        return self.param("tokens", init, (self.config.count, self.width)).astype(self.dtype)[None, None]

    def states(self, mllm: Mllm, context: Context, *, deterministic: bool = True) -> States:
        """What the context connector reads: the MLLM's states of the queries, alone or after those of the prompt."""
        written = write_canvas(mllm, self(), context, self.config.positions, deterministic=deterministic)
        written = rearrange(written, "b 1 1 n d -> b n d")
        queries = States(written, jnp.ones(written.shape[:2], bool))
        return joined(States(context.hidden, context.mask), queries) if self.config.after_context else queries
