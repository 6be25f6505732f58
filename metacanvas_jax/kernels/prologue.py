"""The operations on q and k between their projections and attention: RMS norm, rotary embedding, scale."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.kernels.prologue_tpu import Prologue, prologue
from metacanvas_jax.kernels.tiles import LANES
from metacanvas_jax.nn.layers import rms_norm
from metacanvas_jax.nn.rope import rotate
from metacanvas_jax.parallel.activations import current_mesh, spec_of

LN2 = math.log(2.0)
"""The ``scale`` for ``attention`` on the outputs of ``prepare``: their products are already exponents of two."""


def prepare(
    q: Float[Array, "b n d"],
    k: Float[Array, "b n d"],
    q_gain: Float[Array, " g"],
    k_gain: Float[Array, " g"],
    cos: Float[Array, "s n f"],
    sin: Float[Array, "s n f"],
    eps: float,
    kernel: bool | None = None,
) -> tuple[Float[Array, "b n h e"], Float[Array, "b n h e"]]:
    """Heads of q and k, normalised, rotated by the angles of ``cos`` and ``sin`` (``f = e / 2``), and q scaled.

    If the gains have the width of a head (``g == e``), every head is normalised alone. If they have the width of all
    heads (``g == d``), the heads are normalised together. q is multiplied by ``log2(e) / sqrt(e)``, so that
    ``2 ** (q . k)`` is the weight before the division of softmax; call ``attention`` with ``scale=LN2``. On TPU one
    kernel computes this, unless a norm across heads is split over devices. ``kernel`` overrides the choice.
    """
    width = 2 * cos.shape[-1]
    per_head = q_gain.shape[0] == width
    scale = width**-0.5 / LN2

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, width)

    def plain(q: jax.Array, k: jax.Array, q_gain: jax.Array, k_gain: jax.Array, cos: jax.Array, sin: jax.Array):
        if per_head:
            q, k = rms_norm(heads(q), q_gain, eps), rms_norm(heads(k), k_gain, eps)
        else:
            q, k = heads(rms_norm(q, q_gain, eps)), heads(rms_norm(k, k_gain, eps))
        return rotate(q, cos * scale, sin * scale), rotate(k, cos, sin)

    def fused(q: jax.Array, k: jax.Array, q_gain: jax.Array, k_gain: jax.Array, cos: jax.Array, sin: jax.Array):
        times = q.shape[-1] // q_gain.shape[0]
        gains = [jnp.tile(gain.astype(jnp.float32), times)[None] for gain in (q_gain, k_gain)]
        angles = (cos.astype(jnp.float32), sin.astype(jnp.float32))
        problem = Prologue(per_head=per_head, eps=eps, scale=scale)
        prepared: list[jax.Array] = list(prologue(problem, q, k, *gains, *angles))
        return heads(prepared[0]), heads(prepared[1])

    inputs = (q, k, q_gain, k_gain, cos, sin)
    if kernel is not None:
        return (fused if kernel else plain)(*inputs)
    spec = spec_of(("batch", "seq", "heads"), (*q.shape[:2], q.shape[2] // width))
    if width != LANES or (spec[2] is not None and not per_head):
        return plain(*inputs)

    def on_device(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.platform_dependent(*inputs, tpu=fused, default=plain)

    if current_mesh() is None:
        return on_device(*inputs)
    tokens = jax.sharding.PartitionSpec(spec[0] if cos.shape[0] > 1 else None, spec[1], None)
    whole = jax.sharding.PartitionSpec()
    split = jax.shard_map(
        on_device,
        in_specs=(spec, spec, whole, whole, tokens, tokens),
        out_specs=(jax.sharding.PartitionSpec(*spec, None),) * 2,
        check_vma=False,
    )
    return split(*inputs)
