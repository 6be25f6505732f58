"""The language model that the MLLMs share: a pre-norm decoder with grouped heads and multimodal RoPE.

It is a Llama decoder (transformers ``models/llama/modeling_llama.py``) with multimodal RoPE (arXiv 2409.12191, section
2.1) and, where an MLLM has them, features of media that are added between its first layers (DeepStack, arXiv
2406.04334). One stack of layers serves four uses: reading a context once, writing a canvas against the keys and values
that were kept, both in one pass, and going on with text. LoRA adapters exist on the canvas tokens only (paper, section
3.2).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.attention_after import attention_after
from metacanvas_jax.nn.gating import silu_gated
from metacanvas_jax.nn.layers import Dense, Dtype, RMSNorm
from metacanvas_jax.nn.lora import Lora, LoraConfig
from metacanvas_jax.nn.precision import exact
from metacanvas_jax.nn.rope import inverse_frequencies, rotate
from metacanvas_jax.nn.stack import Remat, entering, hidden_units, stack
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.types import KeyValues

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")

# Many tokens are filled up to a multiple of WHOLE, with tokens that no other sees: devices that share them then hold
# whole tiles. libtpu 0.0.42 fails on the halves of a canvas of 660. It is done on every mesh, so that dropout does not
# depend on it.
FEW, WHOLE = 128, 32

embedding_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder. ``rope_sections`` are the numbers of frequencies that turn with time, height and width.

    Each MLLM has a subclass, in which ``qk_norm`` says whether every head of the queries and keys is normalised.

    Raises ValueError for sizes that do not fit together.
    """

    qk_norm = False  # of the class, no field: a published network has it or not

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    rope_sections: tuple[int, int, int]
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = False
    qkv_bias: bool = True
    head_width: int | None = None  # width // heads unless given
    lora: LoraConfig | None = None
    remat: Remat = "none"
    unroll: int = 1  # layers that are compiled apart from each other, see ``nn/stack.py``
    dtype: Dtype = "float32"

    def __post_init__(self):
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: give head_width")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if 2 * sum(self.rope_sections) != self.head_channels:
            raise ValueError(
                f"rope_sections {self.rope_sections} must sum to {self.head_channels // 2}, half the head width"
            )
        if self.lora is not None and (unknown := set(self.lora.targets) - set(PROJECTIONS)):
            raise ValueError(f"unknown LoRA targets {sorted(unknown)}: choose from {PROJECTIONS}")

    @property
    def head_channels(self) -> int:
        """Width of one head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    def rope_axes(self) -> Int[np.ndarray, " f"]:
        """Which axis (time 0, height 1, width 2) each frequency of a head turns with: one section after the other."""
        return np.repeat(np.arange(3), self.rope_sections)


@struct.dataclass
class Pass:
    """How the layers are run: angles, mask, and from which token on the adapters act (None: nowhere).

    ``added[i]`` is added to the output of layer ``i``; the layers after the last of them get nothing. ``keep`` is what
    every layer hands out: "cache" (its keys and values, those of the tokens before among them), "own" (those of these
    tokens alone; ``mask.keys`` then says which of the tokens before are seen), "hidden" (its output) or "nothing".
    """

    cos: jax.Array
    sin: jax.Array
    mask: MaskSpec
    added: Float[Array, "s b n d"] | None = None
    lora_from: int | None = struct.field(pytree_node=False, default=None)
    keep: str = struct.field(pytree_node=False, default="nothing")
    deterministic: bool = struct.field(pytree_node=False, default=True)


@struct.dataclass
class Own:
    """What a layer does not share with the others: keys and values of the tokens before, and its number.

    Each is None where the pass has none or needs none.
    """

    past: KeyValues | None = None
    number: Int[Array, "*layers"] | None = None


def rope_angles(positions: Int[Array, "3 b n"], config: DecoderConfig) -> Float[Array, "b n f"]:
    """Multimodal RoPE: every frequency turns with time, height or width (``DecoderConfig.rope_axes``)."""
    frequencies = jnp.asarray(inverse_frequencies(config.head_channels, config.rope_theta), jnp.float32)
    turned = positions[config.rope_axes()].astype(jnp.float32)
    return rearrange(turned, "f b n -> b n f") * frequencies[None, None]


def addend(added: Float[Array, "s b n d"], number: Int[Array, ""]) -> Float[Array, "b n d"]:
    """What is added after layer ``number``. All layers run one program, so the last ones add zeros."""
    last = added.shape[0] - 1
    own = jax.lax.dynamic_index_in_dim(added, jnp.minimum(number, last), keepdims=False)
    return jnp.where(number <= last, own, jnp.zeros_like(own))


class Layer(nn.Module):
    """One decoder layer."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], own: Own, run: Pass):
        """Maps ``[b n d]`` to ``[b n d]``."""
        c, past = self.config, own.past

        def project(y: jax.Array, name: str, features: int, axes: tuple[str, str], bias: bool = False) -> jax.Array:
            out = Dense(features, axes, c.dtype, use_bias=bias, name=name)(y)
            if run.lora_from is None or c.lora is None or name not in c.lora.targets:
                return out
            adapter = Lora(c.lora, features, axes, c.dtype, name=f"{name}_lora")
            delta = adapter(y[:, run.lora_from :], deterministic=run.deterministic)
            return jnp.concatenate([out[:, : run.lora_from], out[:, run.lora_from :] + delta], axis=1)

        def heads(y: jax.Array, name: str, count: int, axis: str) -> jax.Array:
            y = project(y, name, count * c.head_channels, ("embed", axis), c.qkv_bias)
            y = rearrange(y, "b n (h e) -> b n h e", h=count)
            return constrain(y, ("batch", "seq", axis, None))

        x = constrain(entering(x), ("batch", "seq", "embed"))
        y = RMSNorm(c.norm_eps, name="attention_norm")(x)
        q, k = heads(y, "q", c.heads, "heads"), heads(y, "k", c.kv_heads, "kv_heads")
        v = heads(y, "v", c.kv_heads, "kv_heads")
        if c.qk_norm:
            q, k = RMSNorm(c.norm_eps, None, name="q_norm")(q), RMSNorm(c.norm_eps, None, name="k_norm")(k)
        q, k = rotate(q, run.cos, run.sin), rotate(k, run.cos, run.sin)
        if run.keep == "own":
            y = attention_after(q, k, v, past.keys, past.values, run.mask.keys)
        else:
            if past is not None:
                k = jnp.concatenate([past.keys.astype(k.dtype), k], axis=1)
                v = jnp.concatenate([past.values.astype(v.dtype), v], axis=1)
            y = attention(q, k, v, mask=run.mask)
        y = rearrange(y, "b n h e -> b n (h e)")
        x = constrain(x + project(y, "o", c.width, ("heads", "embed")), ("batch", "seq", "embed"))
        y = RMSNorm(c.norm_eps, name="mlp_norm")(x)
        y = silu_gated(*(hidden_units(project(y, name, c.mlp, ("embed", "mlp"))) for name in ("gate", "up")))
        y = constrain(y, ("batch", "seq", "mlp"))
        x = x + project(y, "down", c.width, ("mlp", "embed"))
        kept = {"cache": (k, v), "own": (k, v), "hidden": x, "nothing": None}[run.keep]
        if run.added is not None:
            x = x + addend(run.added, own.number).astype(x.dtype)
        return constrain(x, ("batch", "seq", "embed")), kept


class Embedding(nn.Module):
    """Token embeddings ``[vocab, d]``."""

    vocab: int
    width: int
    dtype: Dtype

    def setup(self):
        """Parameters."""
        init = nn.with_logical_partitioning(embedding_init, ("vocab", "embed"))
        self.table = self.param("table", init, (self.vocab, self.width))

    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Looks tokens up."""
        return self.table[tokens].astype(self.dtype)

    def attend(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Logits of a head tied to the embeddings, in float32."""
        hidden, table = hidden.astype(self.dtype), self.table.astype(self.dtype)
        precision = exact(hidden, table)
        return jnp.einsum("bnd,vd->bnv", hidden, table, precision=precision, preferred_element_type=jnp.float32)


class Decoder(nn.Module):
    """The decoder, from token embeddings to hidden states after the final norm.

    ``added`` are features of media ``[s b n d]``, of which ``added[i]`` is added to the output of layer ``i``.
    """

    config: DecoderConfig

    def setup(self):
        """Parameters."""
        c = self.config
        self.embedding = Embedding(c.vocab, c.width, c.dtype)
        self.layers = stack(Layer, c.layers, remat=c.remat, inputs=2, scanned=1, unroll=c.unroll)(c)
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied:
            self.head = Dense(c.vocab, ("embed", "vocab"), c.dtype, use_bias=False)

    def embed(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Token embeddings."""
        return self.embedding(tokens)

    def read(
        self,
        x: Float[Array, "b l d"],
        positions: Int[Array, "3 b l"],
        mask: Bool[Array, "b l"],
        *,
        added: Float[Array, "s b l d"] | None = None,
        cache: bool = True,
    ) -> tuple[Float[Array, "b l d"], KeyValues | None]:
        """Hidden states of a context, and the keys and values to write against if ``cache``. No adapter acts here."""
        keep = "cache" if cache else "nothing"
        hidden, kept = self._run(x, positions, MaskSpec(causal=True, keys=mask), added=added, keep=keep)
        return hidden, KeyValues(*kept) if cache else None

    def write(
        self,
        x: Float[Array, "b n d"],
        positions: Int[Array, "3 b n"],
        past: KeyValues,
        mask: Bool[Array, "b l"],
        *,
        bidirectional: bool = False,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """Hidden states of tokens that come after a context already read, with the adapters acting on all of them."""
        count = x.shape[1]
        spare = -count % WHOLE if count >= FEW else 0
        x = jnp.pad(x, ((0, 0), (0, spare), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, 0), (0, spare)))
        keys = jnp.concatenate([mask, jnp.broadcast_to(jnp.arange(x.shape[1]) < count, x.shape[:2])], axis=1)
        spec = MaskSpec(causal=not bidirectional, offset=0 if bidirectional else mask.shape[1], keys=keys)
        return self._run(x, positions, spec, past=past, lora_from=0, deterministic=deterministic)[0][:, :count]

    def extend(
        self, x: Float[Array, "b n d"], positions: Int[Array, "3 b n"], past: KeyValues, mask: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b n d"], KeyValues]:
        """Hidden states of text that goes on after ``past``, and its own keys and values. No adapter acts here."""
        hidden, kept = self._run(x, positions, MaskSpec(causal=True, keys=mask), past=past, keep="own")
        return hidden, KeyValues(*kept)

    def read_and_write(
        self,
        x: Float[Array, "b n d"],
        positions: Int[Array, "3 b n"],
        mask: Bool[Array, "b n"],
        *,
        lora_from: int,
        added: Float[Array, "s b n d"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """``read`` and causal ``write`` in one pass: the adapters act from token ``lora_from`` on."""
        spec = MaskSpec(causal=True, keys=mask)
        return self._run(x, positions, spec, added=added, lora_from=lora_from, deterministic=deterministic)[0]

    def every_layer(
        self,
        x: Float[Array, "b l d"],
        positions: Int[Array, "3 b l"],
        mask: Bool[Array, "b l"],
        *,
        added: Float[Array, "s b l d"] | None = None,
    ) -> Float[Array, "layers b l d"]:
        """Output of every layer, before anything is added to it and before the final norm, without adapters."""
        return self._run(x, positions, MaskSpec(causal=True, keys=mask), added=added, keep="hidden")[1]

    def logits(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Next-token logits in float32, of hidden states after the final norm."""
        if self.config.tied:
            return constrain(self.embedding.attend(hidden), ("batch", "whole_seq", "vocab"))
        return constrain(self.head(hidden), ("batch", "whole_seq", "vocab")).astype(jnp.float32)

    def _run(self, x, positions, mask, *, past=None, added=None, lora_from=None, keep="nothing", deterministic=True):
        angles = rope_angles(positions, self.config)
        numbers = None
        if added is not None:
            added = constrain(added, (None, "batch", "seq", "embed"))
            numbers = jnp.arange(self.config.layers, dtype=jnp.int32)
        run = Pass(jnp.cos(angles), jnp.sin(angles), mask, added, lora_from, keep, deterministic)
        x, kept = self.layers(x.astype(self.config.dtype), Own(past, numbers), run)
        return self.norm(x), kept
