"""Noise-level embedding and adaptive layer norm: sinusoid, AdaLN-single, shift and scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from metacanvas_jax.nn.layers import Dense, Dtype

SINUSOID_WIDTH = 256


def sinusoid(time: Float[Array, "*n"], width: int = SINUSOID_WIDTH) -> Float[Array, "*n {width}"]:
    """Cosines, then sines, of ``time * 10000 ** (-i / (width / 2))``, in float32.

    ``time`` is in the units of the network (0 to 1000 for published ones). Source: diffusers
    ``models/embeddings.py::get_timestep_embedding`` with ``flip_sin_to_cos`` and no frequency shift.
    """
    half = width // 2
    # The exponents are float32 as in the reference. Their exponential is computed in float64 and rounded, because this
    # is nearer to the reference's result than numpy's float32 exponential.
    exponents = -np.log(np.float32(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    frequencies = jnp.expand_dims(jnp.asarray(frequencies), range(time.ndim))
    angles = time.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def per_sample(x: Float[Array, "b *m d"], ndim: int) -> Float[Array, "b *n d"]:
    """Puts singleton axes after the batch axis until there are ``ndim`` axes."""
    return jnp.expand_dims(x, range(1, 1 + ndim - x.ndim))


def modulate(
    x: Float[Array, "b *n d"], shift: Float[Array, "b *m d"], scale: Float[Array, "b *m d"]
) -> Float[Array, "b *n d"]:
    """``x * (1 + scale) + shift`` in float32, cast back. Shift and scale are per sample or have the rank of ``x``."""
    shift, scale = (per_sample(z.astype(jnp.float32), x.ndim) for z in (shift, scale))
    return (x.astype(jnp.float32) * (1.0 + scale) + shift).astype(x.dtype)


def gated(x: Float[Array, "b *n d"], y: Float[Array, "b *n d"], gate: Float[Array, "b *m d"]) -> Float[Array, "b *n d"]:
    """The residual ``x + gate * y``, with the product in float32. The gate is per sample or has the rank of ``x``."""
    return x + (per_sample(gate.astype(jnp.float32), x.ndim) * y.astype(jnp.float32)).astype(x.dtype)


class TimeEmbed(nn.Module):
    """Sinusoid, linear, SiLU, linear: ``[*n]`` in the network's units to ``[*n d]``."""

    width: int
    dtype: Dtype
    sinusoid_width: int = SINUSOID_WIDTH
    use_bias: bool = True

    @nn.compact
    def __call__(self, time: Float[Array, "*n"]) -> Float[Array, "*n d"]:
        """Embeds the timestep."""
        x = sinusoid(time, self.sinusoid_width)
        x = jax.nn.silu(Dense(self.width, (None, "mlp"), self.dtype, self.use_bias, name="fc1")(x))
        return Dense(self.width, ("mlp", "embed"), self.dtype, self.use_bias, name="fc2")(x)


class AdaLNSingle(nn.Module):
    """One time embedding and one projection to ``chunks`` vectors, shared by all blocks (PixArt-alpha, section 2.3)."""

    width: int
    dtype: Dtype
    chunks: int = 6

    @nn.compact
    def __call__(self, time: Float[Array, " b"]) -> tuple[Float[Array, "b d"], Float[Array, "b chunks d"]]:
        """The time embedding, for the output norm, and the vectors that blocks add to their modulation tables."""
        embedded = TimeEmbed(self.width, self.dtype, name="embed")(time)
        chunks = Dense(self.chunks * self.width, ("embed", None), self.dtype, name="project")(jax.nn.silu(embedded))
        return embedded, chunks.reshape(-1, self.chunks, self.width)


def table_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Normal with deviation ``d ** -0.5``: the initial values of a modulation table ``[chunks d]``."""
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5
