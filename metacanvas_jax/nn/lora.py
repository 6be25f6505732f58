"""Low-rank adaptation: a second, small path beside a linear layer (Hu et al., arXiv 2106.09685).

The linear layer does not change. The caller adds the adapter's output, and can restrict an adapter to some tokens by
passing only these. The parameters of an adapter are siblings of its layer, named ``<layer>_lora``.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from metacanvas_jax.nn.layers import Dense, Dtype, linear, zeros_init

down_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # the uniform initialisation of PEFT


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of one network. ``targets`` names the layers that get one; ``alpha / rank`` scales its output.

    Raises ValueError for a rank below 1, a dropout outside ``[0, 1)`` or no targets.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must lie in [0, 1), not {self.dropout}")
        if not self.targets:
            raise ValueError("LoRA needs at least one target layer")


def low_rank(
    x: Float[Array, "*n i"], a: Float[Array, "i r"], b: Float[Array, "r o"], scale: float
) -> Float[Array, "*n o"]:
    """``scale * x @ a @ b``."""
    return linear(linear(x, a), b) * scale


class Lora(nn.Module):
    """The adapter of one linear layer, with output zero at initialisation. ``axes`` are those of the layer's kernel."""

    config: LoraConfig
    features: int
    axes: tuple[str | None, str | None]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"], *, deterministic: bool = True) -> Float[Array, "*n o"]:
        """Computes in ``dtype``. Unless ``deterministic``, dropout (rng ``dropout``) acts on the input, as in PEFT."""
        rank = self.config.rank
        a = self.param("a", nn.with_logical_partitioning(down_init, (self.axes[0], "rank")), (x.shape[-1], rank))
        b = self.param("b", nn.with_logical_partitioning(zeros_init, ("rank", self.axes[1])), (rank, self.features))
        x = nn.Dropout(self.config.dropout)(x.astype(self.dtype), deterministic=deterministic)
        return low_rank(x, a.astype(self.dtype), b.astype(self.dtype), self.config.alpha / rank)


def adapted(layer: Dense, x: Float[Array, "*n i"], config: LoraConfig | None) -> Float[Array, "*n o"]:
    """``layer(x)``, plus its adapter if the config targets a layer of this name. For use inside a compact method."""
    y = layer(x)
    if config is None or layer.name not in config.targets:
        return y
    return y + Lora(config, layer.features, layer.axes, layer.dtype, name=f"{layer.name}_lora")(x)


def adapter(name: str, layer: Dense, config: LoraConfig | None) -> Lora | None:
    """The adapter of a layer if the config targets its ``name``, for use in ``setup`` as the field ``<name>_lora``."""
    if config is None or name not in config.targets:
        return None
    return Lora(config, layer.features, layer.axes, layer.dtype)


def plus(layer: Dense, adapter: Lora | None, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """``layer(x)``, plus the adapter's output where there is one."""
    return layer(x) if adapter is None else layer(x) + adapter(x)
