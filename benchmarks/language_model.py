"""Training steps of dense language models of published sizes, as shapes: to compare estimates with measured steps.

A decoder as MaxText trains it: scanned layers of RMS norm, grouped causal attention with rotary embedding and a
(gated) feed-forward, float32 parameters and AdamW moments, bfloat16 compute. GPT-3's biases and learned positions
are left out, and its norms are RMS norms: their cost is small.

Attention is a stand-in: a kernel with the arguments, results and FLOPs of splash attention that computes nothing. It
compiles in no time, and the time of the kernel that a measured job ran is a figure of ``jobs.json`` anyway.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.nn.stack import ATTENTION
from metacanvas_jax.parallel.activations import constrain, current_mesh, spec_of
from metacanvas_jax.parallel.mesh import placed_batch
from metacanvas_jax.parallel.rules import RULES, resolve
from metacanvas_jax.plan.programs import Program, abstract_key, device_bytes
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import abstract_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.types import Params

HEAD_CHUNK = 2048  # tokens of a sample whose logits exist at one time; they are computed again in the backward pass
ROTATION_BASE = 500_000.0


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Sizes of a dense decoder. A model that is not ``gated`` has two matrices in its feed-forward instead of three."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    head_width: int = 128
    gated: bool = True

    @property
    def shapes(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """(logical axis, size) of every axis of every parameter."""
        layers, embed = ("layers", self.layers), ("embed", self.width)
        heads, kv = (("heads", n * self.head_width) for n in (self.heads, self.kv_heads))
        mlp, vocab = ("mlp", self.mlp), ("vocab", self.vocab)
        found = {
            "layers/attention_norm": (layers, ("norm", self.width)),
            "layers/mlp_norm": (layers, ("norm", self.width)),
            "layers/query": (layers, embed, heads),
            "layers/key": (layers, embed, kv),
            "layers/value": (layers, embed, kv),
            "layers/out": (layers, heads, embed),
            "layers/up": (layers, embed, mlp),
            "layers/down": (layers, mlp, embed),
            "embedding": (vocab, embed),
            "norm": (("norm", self.width),),
            "head": (embed, vocab),
        }
        return found | {"layers/gate": (layers, embed, mlp)} if self.gated else found

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with."""
        return sum(math.prod(n for _, n in axes) for name, axes in self.shapes.items() if name != "embedding")

    def model_flops(self, tokens: float, length: int, *, causal: bool = True) -> float:
        """FLOPs of a step: 6 per parameter and token, and three passes of attention, half of it where causal."""
        scores = 12 * self.layers * self.heads * self.head_width * length * tokens
        return 6 * self.multiplied * tokens + scores * (0.5 if causal else 1.0)


# Published sizes; those of MaxText's scaled models follow from max_utils.get_individual_scales and configs/base.yml.
DECODERS = {
    "llama3-8b": Decoder(32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": Decoder(80, 8192, 64, 8, 28672, 128256),
    "llama3-405b": Decoder(126, 16384, 128, 8, 53248, 128256),
    "llama2-70b": Decoder(80, 8192, 64, 8, 28672, 32000),
    "mistral-7b": Decoder(32, 4096, 32, 8, 14336, 32000),
    "qwen3-8b": Decoder(36, 4096, 32, 8, 12288, 151936),
    "gpt3-175b": Decoder(96, 12288, 96, 96, 49152, 50304, gated=False),
    "maxtext-16b": Decoder(32, 4096, 64, 64, 28672, 32000),
    "maxtext-32b": Decoder(32, 8192, 64, 64, 28672, 32000),
    "maxtext-64b": Decoder(64, 8192, 64, 64, 28672, 32000),
    "maxtext-128b": Decoder(64, 8192, 128, 128, 57344, 32000),
}

_policies = jax.checkpoint_policies


def _to_host(*names: str) -> Any:
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


REMAT = {
    "full": None,
    "dots": _policies.dots_with_no_batch_dims_saveable,  # MaxText's "minimal" of its configs for v5p
    "save_attention": _policies.save_only_these_names(*ATTENTION),
    "save_qkv_attention": _policies.save_only_these_names("layer_input", "query", "key", "value", *ATTENTION),
    "offload_qkv": _to_host("layer_input", "query", "key", "value"),
    "offload_qkv_out": _to_host("layer_input", "query", "key", "value", "out"),
}


def program(
    model: Decoder, mesh: Mesh, *, batch: int, length: int, remat: str = "full", weights: str = "float32"
) -> Program:
    """The train step of a global batch of ``batch`` sequences of ``length`` tokens."""
    params = abstract_params(model, mesh, weights)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5))
    state = abstract_state(params, optimizer, mesh)
    if weights != "float32":
        half = lambda x: jax.ShapeDtypeStruct(x.shape, weights, sharding=x.sharding)  # noqa: E731
        wide = lambda x: x.dtype == jnp.float32 and x.ndim > 0  # noqa: E731
        state = jax.tree.map(lambda x: half(x) if wide(x) else x, state)
    tokens = placed_batch({"tokens": jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)}, mesh)

    def loss(trainable: Params, frozen: Params, batch: dict[str, Array], key: Array) -> tuple[Array, dict]:
        return next_token_loss(model, trainable, batch["tokens"], remat), {}

    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(lambda frozen, batch, key: batch, loss, optimizer, state_shardings=shardings)
    held = {
        "trainable": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "batch": device_bytes(tokens),
    }
    return Program("train a decoder", step, (state, {}, tokens, abstract_key(mesh)), held, batch, mesh, RULES)


def abstract_params(model: Decoder, mesh: Mesh, dtype: str) -> Params:
    """Shapes of the parameters, the width split over fsdp as that of the project's networks."""
    found: dict[str, Any] = {"layers": {}}
    for path, axes in model.shapes.items():
        names, shape = tuple(name for name, _ in axes), tuple(size for _, size in axes)
        sharding = NamedSharding(mesh, resolve(names, shape, mesh, RULES))
        group, _, name = path.rpartition("/")
        (found[group] if group else found)[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return found


def next_token_loss(model: Decoder, params: Params, tokens: Int[Array, "b n_1"], remat: str) -> Float[Array, ""]:
    """The mean cross-entropy of every next token."""
    x = constrain(params["embedding"].astype(jnp.bfloat16)[tokens[:, :-1]], ("batch", "seq", None))

    def layer(x: Array, weights: Params) -> tuple[Array, None]:
        return block(model, x, jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)), None

    layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])
    x, _ = jax.lax.scan(layer, x, params["layers"])
    x = rms_norm(x, params["norm"])
    head = params["head"].astype(jnp.bfloat16)
    chunks = max(1, x.shape[1] // HEAD_CHUNK)
    cut = lambda y: jnp.moveaxis(y.reshape(y.shape[0], chunks, -1, *y.shape[2:]), 1, 0)  # noqa: E731

    @jax.checkpoint
    def chunk(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        hidden, targets = part
        logits = jnp.einsum("bnd,dv->bnv", hidden, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, ("batch", None, "vocab"))
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return total + jnp.sum(jax.nn.logsumexp(logits, axis=-1) - right), None

    total, _ = jax.lax.scan(chunk, jnp.zeros((), jnp.float32), (cut(x), cut(tokens[:, 1:])))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def block(model: Decoder, x: Float[Array, "b n d"], w: Params) -> Float[Array, "b n d"]:
    """One layer."""
    x = checkpoint_name(x, "layer_input")
    normed = rms_norm(x, w["attention_norm"])
    q, k, v = (heads(model, normed @ w[name]) for name in ("query", "key", "value"))
    q, k = rotated(q), rotated(k)
    q, k, v = (checkpoint_name(y, name) for y, name in ((q, "query"), (k, "key"), (v, "value")))
    attended = attention(q, k, v).reshape(*x.shape[:2], -1)
    out = checkpoint_name(attended @ w["out"], "out")
    x = constrain(x + out, ("batch", "seq", None))
    normed = rms_norm(x, w["mlp_norm"])
    hidden = constrain(normed @ w["up"], ("batch", None, "mlp"))
    if model.gated:
        hidden = jax.nn.silu(constrain(normed @ w["gate"], ("batch", None, "mlp"))) * hidden
    else:
        hidden = jax.nn.gelu(hidden)
    return constrain(x + hidden @ w["down"], ("batch", "seq", None))


def attention(q: Float[Array, "b n h e"], k: Float[Array, "b n g e"], v: Float[Array, "b n g e"]) -> Array:
    """The stand-in on every device's own samples and heads."""
    if current_mesh() is None:
        return attend(q, k, v)
    specs = [spec_of(("batch", None, name, None), x.shape) for name, x in (("heads", q), ("kv_heads", k))]
    split = jax.shard_map(attend, in_specs=(specs[0], specs[1], specs[1]), out_specs=specs[0], check_vma=False)
    return split(q, k, v)


@jax.custom_vjp
def attend(q: Float[Array, "b n h e"], k: Float[Array, "b n g e"], v: Float[Array, "b n g e"]) -> Array:
    """A kernel that claims causal attention and leaves its result as it finds it."""
    return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    sums = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], 1, q.shape[1]), jnp.float32)
    out, lse = _stand_in("splash_forward", 2, (q, k, v), (q, sums))
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), ATTENTION, strict=True))
    return out, (q, k, v, out, lse)


def _backward(kept: tuple[Array, ...], given: Array) -> tuple[Array, ...]:
    return tuple(_stand_in("splash_backward", 5, (*kept, given), kept[:3]))


attend.defvjp(_forward, _backward)


def _stand_in(name: str, products: int, inputs: Sequence[Array], like: Sequence[Any]) -> list[Array]:
    samples, length, many, width = inputs[0].shape
    pairs = samples * many * length * (length + 1) // 2  # causal
    places = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda *refs: None,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        in_specs=[places] * len(inputs),
        out_specs=[places] * len(like),
        cost_estimate=pl.CostEstimate(flops=2 * products * pairs * width, bytes_accessed=0, transcendentals=pairs),
        name=name,
    )(*inputs)


def heads(model: Decoder, x: Float[Array, "b n he"]) -> Float[Array, "b n h e"]:
    """Channels apart as heads."""
    x = x.reshape(*x.shape[:2], -1, model.head_width)
    return constrain(x, ("batch", None, "heads", None))


def rms_norm(x: Float[Array, "b n d"], gain: Float[Array, " d"]) -> Float[Array, "b n d"]:
    """RMS norm in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return (wide * scale * gain.astype(jnp.float32)[None, None]).astype(x.dtype)


def rotated(x: Float[Array, "b n h e"]) -> Float[Array, "b n h e"]:
    """Rotary embedding, halves of a head as pairs."""
    half = x.shape[-1] // 2
    rates = ROTATION_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = (part.astype(jnp.float32) for part in jnp.split(x, 2, axis=-1))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
