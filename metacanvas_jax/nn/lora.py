"""Low-rank adaptation: a second, small path beside a linear layer (Hu et al., arXiv 2106.09685).

The linear layer does not change. The caller adds the adapter's output, and can restrict an adapter to some tokens by
passing only these. The parameters of an adapter are siblings of its layer, named ``<layer>_lora``.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float

from metacanvas_jax.nn.layers import Dense, Dtype, contract, zeros_init

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


def check_targets(config: LoraConfig | None, known: Sequence[str], owner: str) -> None:
    """Raises ValueError, in the name of a DiT's config, for targets that its blocks do not have, and for dropout."""
    if config is None:
        return
    if unknown := set(config.targets) - set(known):
        raise ValueError(f"{owner}: unknown LoRA targets {sorted(unknown)}; choose from {tuple(known)}.")
    if config.dropout:
        raise ValueError(f"{owner}: adapters of a DiT have no dropout, found {config.dropout}.")


def low_rank(
    x: Float[Array, "*i"], a: Float[Array, "*j"], b: Float[Array, "*o"], scale: float, inputs: int = 1
) -> Float[Array, "*y"]:
    """``scale * x @ a @ b``; the first product is over the last ``inputs`` axes of ``x``."""
    return contract(contract(x, a, inputs), b) * scale


class Lora(nn.Module):
    """The adapter of one linear layer, with output zero at initialisation. ``axes`` are those of the layer's kernel.

    The first ``inputs`` axes of the kernel are those of its input; ``features`` is the size, or the sizes, of the rest.
    """

    config: LoraConfig
    features: int | tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Dtype
    inputs: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*i"], *, deterministic: bool = True) -> Float[Array, "*o"]:
        """Computes in ``dtype``. Unless ``deterministic``, dropout (rng ``dropout``) acts on the input, as in PEFT."""
        rank, n = self.config.rank, self.inputs
        features = self.features if isinstance(self.features, tuple) else (self.features,)
        a_init = nn.with_logical_partitioning(down_init, (*self.axes[:n], "rank"))
        b_init = nn.with_logical_partitioning(zeros_init, ("rank", *self.axes[n:]))
        a = self.param("a", a_init, (*x.shape[x.ndim - n :], rank))
        b = self.param("b", b_init, (rank, *features))
        x = nn.Dropout(self.config.dropout)(x.astype(self.dtype), deterministic=deterministic)
        return low_rank(x, a.astype(self.dtype), b.astype(self.dtype), self.config.alpha / rank, n)


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
