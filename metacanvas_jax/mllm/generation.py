"""Text written by an MLLM: greedy decoding of a batch, with keys and values kept.

The prompts of a batch may differ in length and in media; the batch has one static shape. A prompt is read once. Its
keys and values get room for ``most`` further tokens, which are written one after the other at the same place of every
sample. A sample whose prompt is shorter has a gap there, which its mask hides; its positions have none.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from metacanvas_jax.mllm.base import Mllm
from metacanvas_jax.parallel.activations import constrain, part
from metacanvas_jax.types import KeyValues, MllmInputs, Params


@struct.dataclass
class Written:
    """New tokens of every sample; ``lengths`` counts them up to the one that ends the text, which is none of them.

    A sample that does not end within ``most`` tokens has ``lengths`` ``most`` and ``ended`` False.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, " b"]
    ended: Bool[Array, " b"]


@struct.dataclass
class _State:
    step: Int[Array, ""]
    tokens: Int[Array, "b n"]
    ended: Bool[Array, " b"]
    past: KeyValues
    mask: Bool[Array, "b m"]


def generate(model: Mllm, params: Params, inputs: MllmInputs, *, most: int, stop: Sequence[int]) -> Written:
    """Greedy text after prompts, of at most ``most`` tokens; any token of ``stop`` ends it. To be traced by ``jit``.

    The loop ends when every sample has ended. After its end a sample holds the first token of ``stop``.
    Raises ValueError when ``most`` is not positive or nothing stops the text.
    """
    if most < 1 or not stop:
        raise ValueError(f"text needs room and an end: most is {most}, stop is {tuple(stop)}")
    variables = {"params": params}
    ends = jnp.asarray(tuple(stop), jnp.int32)
    context = model.apply(variables, inputs, method="encode")
    length = inputs.tokens.shape[1]

    def best(hidden: Float[Array, "b d"]) -> Int[Array, " b"]:
        logits = model.apply(variables, hidden[:, None], method="logits")
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

    def is_end(tokens: Int[Array, " b"]) -> Bool[Array, " b"]:
        return jnp.any(tokens[:, None] == ends[None], axis=1)

    last = jnp.max(jnp.where(context.mask, jnp.arange(length, dtype=jnp.int32)[None], 0), axis=1)
    first = best(jnp.take_along_axis(context.hidden, last[:, None, None], axis=1)[:, 0])
    tokens = jnp.full((len(first), most), ends[0], jnp.int32).at[:, 0].set(first)
    past = jax.tree.map(lambda x: _roomy(x, most), context.cache)
    mask = jnp.pad(context.mask, ((0, 0), (0, most)))

    def goes_on(state: _State) -> Bool[Array, ""]:
        return (state.step < most) & ~jnp.all(state.ended)

    def write(state: _State) -> _State:
        before = state.step - 1  # the token that is read in this step
        token = jax.lax.dynamic_slice_in_dim(state.tokens, before, 1, axis=1)
        position = jnp.broadcast_to((context.next_position + before)[None, :, None], (3, len(first), 1))
        hidden, own = model.apply(variables, token, position, state.past, state.mask, method="extend")
        chosen = jnp.where(state.ended, ends[0], best(hidden[:, 0]))
        at = length + before
        past = jax.tree.map(
            lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new.astype(all_.dtype), at, axis=2),
            state.past,
            own,
        )
        seen = jnp.ones((len(first), 1), bool)
        return _State(
            step=state.step + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.step, axis=1),
            ended=state.ended | is_end(chosen),
            past=past,
            mask=jax.lax.dynamic_update_slice_in_dim(state.mask, seen, at, axis=1),
        )

    done = jax.lax.while_loop(goes_on, write, _State(jnp.int32(1), tokens, is_end(first), past, mask))
    is_stop = jnp.any(done.tokens[:, :, None] == ends[None, None], axis=2)
    lengths = jnp.where(done.ended, jnp.argmax(is_stop, axis=1), most).astype(jnp.int32)
    return Written(done.tokens, lengths, done.ended)


def _roomy(x: Float[Array, "layers b l g e"], room: int) -> Float[Array, "layers b m g e"]:
    """Keys or values with empty places after them."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0)))
    with part("mllm"):
        return constrain(x, ("layers", "batch", None, "kv_heads", None))
