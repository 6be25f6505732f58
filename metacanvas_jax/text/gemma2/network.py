"""Gemma-2 as a text encoder: what SANA reads, and the rules by which SANA prompts it.

Source: transformers ``models/gemma2/modeling_gemma2.py`` (eager attention: the soft cap forbids a fused one) and
diffusers ``pipelines/sana/pipeline_sana.py`` for the prompts.
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from metacanvas_jax.nn.layers import Dense, Dtype, rms_norm, zeros_init
from metacanvas_jax.nn.rope import inverse_frequencies, rotate
from metacanvas_jax.parallel.activations import constrain, part
from metacanvas_jax.types import States, Text

# The instruction SANA's published networks were trained with (NVlabs/Sana, sana_config, "chi_prompt").
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for"
        " image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial"
        " relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without"
        " overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping"
        " peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing"
        " street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering"
        " glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional"
        " commentary or evaluations:",
        "User Prompt: ",
    )
)


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """Sizes of a Gemma-2 decoder; the defaults are Gemma-2-2b.

    Scores are multiplied by ``query_scalar ** -0.5`` and capped at ``softcap``; even layers see the last ``window``
    tokens only. Raises ValueError for heads that do not fit together.
    """

    vocab: int = 256000
    width: int = 2304
    layers: int = 26
    heads: int = 8
    kv_heads: int = 4
    head_width: int = 256
    mlp: int = 9216
    query_scalar: float = 256.0
    softcap: float = 50.0
    window: int = 4096
    theta: float = 10000.0
    eps: float = 1e-6
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Checks the heads."""
        if self.heads % self.kv_heads or self.head_width % 2:
            raise ValueError(
                f"Gemma2Config: {self.heads} heads must be a multiple of {self.kv_heads} kv_heads, "
                f"and head_width {self.head_width} even."
            )


def capped_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n g e"],
    v: Float[Array, "b n g e"],
    mask: Bool[Array, "b n n"],
    scale: float,
    cap: float,
) -> Float[Array, "b n h e"]:
    """Softmax attention whose scores pass through ``cap * tanh(score / cap)``; scores and softmax are float32.

    The mask is dense: prompts are a few hundred tokens.
    """
    q = rearrange(q, "b n (g r) e -> b n g r e", g=k.shape[2])
    scores = scale * jnp.einsum("bngre,bmge->bgrnm", q, k, preferred_element_type=jnp.float32)
    scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("bgrnm,bmge->bngre", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return rearrange(out, "b n g r e -> b n (g r) e")


class Norm(nn.Module):
    """RMS norm with gain ``1 + scale``, multiplied in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Keeps the dtype of the input."""
        scale = self.param("scale", nn.with_logical_partitioning(zeros_init, ("embed",)), (x.shape[-1],))
        y = rms_norm(x.astype(jnp.float32), 1.0 + scale.astype(jnp.float32), self.eps)
        return y.astype(x.dtype)


class Layer(nn.Module):
    """Attention and gated feed-forward, each with a norm before and after it."""

    config: Gemma2Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        sliding: Bool[Array, ""],
        cos: Float[Array, "b n f"],
        sin: Float[Array, "b n f"],
        mask: Bool[Array, "b n n"],
        window: Bool[Array, "b n n"],
    ) -> tuple[Float[Array, "b n d"], None]:
        """``sliding`` picks the window's mask."""
        c = self.config

        def heads(y: jax.Array, name: str, count: int, axis: str) -> jax.Array:
            y = Dense(count * c.head_width, ("embed", axis), c.dtype, use_bias=False, name=name)(y)
            y = rearrange(y, "b n (h e) -> b n h e", h=count)
            return constrain(y, ("batch", "seq", axis, None))

        y = Norm(c.eps, name="norm1")(x)
        q = rotate(heads(y, "q", c.heads, "heads"), cos, sin)
        k = rotate(heads(y, "k", c.kv_heads, "kv_heads"), cos, sin)
        v = heads(y, "v", c.kv_heads, "kv_heads")
        y = capped_attention(q, k, v, jnp.where(sliding, window, mask), c.query_scalar**-0.5, c.softcap)
        y = Dense(c.width, ("heads", "embed"), c.dtype, use_bias=False, name="o")(rearrange(y, "b n h e -> b n (h e)"))
        x = x + Norm(c.eps, name="norm2")(y)

        y = Norm(c.eps, name="norm3")(x)
        gate = Dense(c.mlp, ("embed", "mlp"), c.dtype, use_bias=False, name="gate")(y)
        up = Dense(c.mlp, ("embed", "mlp"), c.dtype, use_bias=False, name="up")(y)
        y = constrain(jax.nn.gelu(gate, approximate=True) * up, ("batch", "seq", "mlp"))
        x = x + Norm(c.eps, name="norm4")(Dense(c.width, ("mlp", "embed"), c.dtype, use_bias=False, name="down")(y))
        return constrain(x, ("batch", "seq", "embed")), None


class Gemma2(nn.Module):
    """Token ids to hidden states after the final norm: the first and the last ``length - 1``, or all of them (None)."""

    config: Gemma2Config
    length: int | None = None

    @nn.compact
    @part("mllm")
    def __call__(self, text: Text) -> States:
        """Padding stands on the right; its states mean nothing."""
        c, tokens, mask = self.config, text.tokens, text.mask
        n = tokens.shape[1]
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (c.vocab, c.width))
        x = table[tokens].astype(c.dtype) * jnp.asarray(c.width**0.5, c.dtype)

        frequencies = jnp.asarray(inverse_frequencies(c.head_width, c.theta), jnp.float32)
        angles = jnp.arange(n, dtype=jnp.float32)[:, None] * frequencies[None]
        angles = jnp.broadcast_to(angles, (tokens.shape[0], *angles.shape))
        distance = jnp.arange(n)[:, None] - jnp.arange(n)[None, :]
        seen = (distance >= 0)[None] & mask[:, None, :]
        window = seen & (distance < c.window)[None]

        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 4),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        sliding = jnp.arange(c.layers) % 2 == 0
        x, _ = layers(c, name="layers")(x, sliding, jnp.cos(angles), jnp.sin(angles), seen, window)
        states = States(Norm(c.eps, name="norm")(x), mask)
        return states if self.length is None else first_and_last(states, self.length)


def sana_tokens(
    tokenize: Callable[[str], Sequence[int]],
    prompts: Sequence[str],
    *,
    instruction: str = INSTRUCTION,
    length: int = 300,
    pad: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask ``[b n]`` of prompts (host side): instruction and prompt, lower case, cut or padded on the right.

    ``tokenize`` puts the beginning-of-sequence token first. With an instruction the sequence is ``length - 2`` longer
    than the instruction, so that ``first_and_last`` keeps ``length`` states; the unconditional prompt has none
    (``instruction=""``).
    """
    total = len(tokenize(instruction)) + length - 2 if instruction else length
    ids = np.full((len(prompts), total), pad, np.int32)
    mask = np.zeros((len(prompts), total), bool)
    for row, prompt in enumerate(prompts):
        tokens = tokenize(instruction + prompt.lower().strip())[:total]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def first_and_last(text: States, length: int) -> States:
    """The first state and the last ``length - 1``: without the instruction between them."""
    total = text.states.shape[1]
    keep = np.concatenate([[0], np.arange(total - length + 1, total)])
    return States(text.states[:, keep], text.mask[:, keep])
