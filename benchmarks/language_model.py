"""Training steps of dense language models of published sizes, as shapes: to compare estimates with measured steps.

A decoder as MaxText trains it: scanned layers of RMS norm, grouped causal attention with rotary embedding and a
(gated) feed-forward, float32 parameters and AdamW moments, bfloat16 compute. GPT-3's biases and learned positions
are left out, and its norms are RMS norms: their cost is small.

Attention is a stand-in: a kernel with the arguments, results and FLOPs of splash attention that computes nothing. It
compiles in no time, and the time of the kernel that a measured job ran is a figure of ``jobs.json`` anyway. Layers with
a local window and layers without one therefore differ in FLOPs only, and every layer declares their mean.

A context axis of the mesh splits the tokens of a sequence, in one of two ways (``EXCHANGES``). Each device counts the
same share of the causal scores: with gathered keys it owns a piece of the start of a sequence and one of its end.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.errors import UserError
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

Exchange = Literal["gather", "ulysses"]
"""How devices of the context axis attend to tokens of others: they gather all keys and values and keep their own
queries, or they exchange tokens for heads before attention and back behind it (arXiv 2309.14509)."""
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Sizes of a dense decoder. A model that is not ``gated`` has two matrices in its feed-forward instead of three.

    Where there is a ``window``, a query sees that many keys, its own included, in all but every ``period``-th layer.
    ``head_norms`` normalises q and k per head, ``norms_behind`` normalises what attention and feed-forward add. A
    ``tied`` head is the embedding table.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    head_width: int = 128
    gated: bool = True
    gelu: bool = False
    window: int | None = None
    period: int = 1
    head_norms: bool = False
    norms_behind: bool = False
    tied: bool = False

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
        }
        if self.gated:
            found["layers/gate"] = (layers, embed, mlp)
        if self.head_norms:
            found |= {f"layers/{name}_norm": (layers, ("norm", self.head_width)) for name in ("query", "key")}
        if self.norms_behind:
            found |= {f"layers/{name}_norm_behind": (layers, ("norm", self.width)) for name in ("attention", "mlp")}
        return found if self.tied else found | {"head": (embed, vocab)}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(n for _, n in axes) for axes in self.shapes.values())

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with."""
        return self.parameters - (0 if self.tied else self.vocab * self.width)

    def pairs(self, length: int) -> int:
        """Pairs of a query and a key that it sees, of one head over ``length`` tokens: the mean over the layers."""
        whole = visible_pairs(length, length)
        local = whole if self.window is None else visible_pairs(length, self.window)
        return (whole + (self.period - 1) * local) // self.period

    def model_flops(self, tokens: float, length: int, *, causal: bool = True) -> float:
        """FLOPs of a step: 6 per parameter and token, and three passes of attention over the pairs that are seen.

        Without ``causal`` every query counts with every key, as MaxText's older configs have it.
        """
        scores = 12 * self.layers * self.heads * self.head_width * tokens
        return 6 * self.multiplied * tokens + scores * (self.pairs(length) / length if causal else length)


def visible_pairs(length: int, window: int) -> int:
    """Pairs under a causal mask of ``length`` tokens, each of which sees ``window`` tokens, its own included."""
    window = min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


# Published sizes; those of MaxText's scaled models follow from max_utils.get_individual_scales and configs/base.yml.
DECODERS = {
    "llama3-8b": Decoder(32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": Decoder(80, 8192, 64, 8, 28672, 128256),
    "llama3-405b": Decoder(126, 16384, 128, 8, 53248, 128256),
    "llama2-7b": Decoder(32, 4096, 32, 32, 11008, 32000),
    "llama2-70b": Decoder(80, 8192, 64, 8, 28672, 32000),
    "mistral-7b": Decoder(32, 4096, 32, 8, 14336, 32000),
    "qwen3-8b": Decoder(36, 4096, 32, 8, 12288, 151936),
    "gpt3-175b": Decoder(96, 12288, 96, 96, 49152, 50304, gated=False, gelu=True),
    "gemma3-12b": Decoder(
        *(48, 3840, 16, 8, 15360, 262144, 256),
        gelu=True,
        window=1024,
        period=6,
        head_norms=True,
        norms_behind=True,
        tied=True,
    ),
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
    model: Decoder,
    mesh: Mesh,
    *,
    batch: int,
    length: int,
    remat: str = "full",
    weights: str = "float32",
    exchange: Exchange = "gather",
) -> Program:
    """The train step of a global batch of ``batch`` sequences of ``length`` tokens.

    Raises:
        UserError: ``exchange`` is unknown, or the context axis does not divide the tokens or the heads to exchange.
    """
    check(model, mesh.shape["context"], length, exchange)
    params = abstract_params(model, mesh, weights)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5))
    state = abstract_state(params, optimizer, mesh)
    if weights != "float32":
        half = lambda x: jax.ShapeDtypeStruct(x.shape, weights, sharding=x.sharding)  # noqa: E731
        wide = lambda x: x.dtype == jnp.float32 and x.ndim > 0  # noqa: E731
        state = jax.tree.map(lambda x: half(x) if wide(x) else x, state)
    tokens = placed_batch({"tokens": jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)}, mesh)

    def loss(trainable: Params, frozen: Params, batch: dict[str, Array], key: Array) -> tuple[Array, dict]:
        return next_token_loss(model, trainable, batch["tokens"], remat, exchange), {}

    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(lambda frozen, batch, key: batch, loss, optimizer, state_shardings=shardings)
    held = {
        "trainable": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "batch": device_bytes(tokens),
    }
    return Program("train a decoder", step, (state, {}, tokens, abstract_key(mesh)), held, batch, mesh, RULES)


def check(model: Decoder, context: int, length: int, exchange: str) -> None:
    """Refuses a job that the context axis cannot split; see ``program``."""
    if exchange not in EXCHANGES:
        raise UserError(f"exchange {exchange!r}: expected one of {', '.join(EXCHANGES)}")
    if length % context:
        raise UserError(f"context {context} does not divide {length} tokens")
    if exchange == "ulysses" and model.kv_heads % context:
        raise UserError(f"exchange ulysses: context {context} does not divide {model.kv_heads} key/value heads")


def abstract_params(model: Decoder, mesh: Mesh, dtype: str) -> Params:
    """Shapes of the parameters, the width split over fsdp as that of the project's networks."""
    found: dict[str, Any] = {"layers": {}}
    for path, axes in model.shapes.items():
        names, shape = tuple(name for name, _ in axes), tuple(size for _, size in axes)
        sharding = NamedSharding(mesh, resolve(names, shape, mesh, RULES))
        group, _, name = path.rpartition("/")
        (found[group] if group else found)[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return found


def next_token_loss(
    model: Decoder, params: Params, tokens: Int[Array, "b n_1"], remat: str, exchange: Exchange = "gather"
) -> Float[Array, ""]:
    """The mean cross-entropy of every next token."""
    x = constrain(params["embedding"].astype(jnp.bfloat16)[tokens[:, :-1]], ("batch", "seq", None))

    def layer(x: Array, weights: Params) -> tuple[Array, None]:
        return block(model, x, jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights), exchange), None

    layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])
    x, _ = jax.lax.scan(layer, x, params["layers"])
    x = rms_norm(x, params["norm"])
    head = (params["embedding"].T if model.tied else params["head"]).astype(jnp.bfloat16)
    mesh = current_mesh()
    split = 1 if mesh is None else mesh.shape["context"]
    chunks = max(1, x.shape[1] // split // HEAD_CHUNK)

    def cut(y: Array) -> Array:  # a chunk has tokens of every device of the context axis
        y = jnp.moveaxis(y.reshape(y.shape[0], split, chunks, -1, *y.shape[2:]), 2, 0)
        return y.reshape(chunks, y.shape[1], -1, *y.shape[4:])

    @jax.checkpoint
    def chunk(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        hidden, targets = part
        logits = jnp.einsum("bnd,dv->bnv", hidden, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, ("batch", "seq", "vocab"))
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return total + jnp.sum(jax.nn.logsumexp(logits, axis=-1) - right), None

    total, _ = jax.lax.scan(chunk, jnp.zeros((), jnp.float32), (cut(x), cut(tokens[:, 1:])))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def block(model: Decoder, x: Float[Array, "b n d"], w: Params, exchange: Exchange = "gather") -> Float[Array, "b n d"]:
    """One layer."""
    x = checkpoint_name(x, "layer_input")
    normed = rms_norm(x, w["attention_norm"])
    q, k, v = (heads(model, normed @ w[name]) for name in ("query", "key", "value"))
    if model.head_norms:
        q, k = rms_norm(q, w["query_norm"]), rms_norm(k, w["key_norm"])
    q, k = rotated(q), rotated(k)
    q, k, v = (checkpoint_name(y, name) for y, name in ((q, "query"), (k, "key"), (v, "value")))
    attended = attention(model, q, k, v, exchange).reshape(*x.shape[:2], -1)
    out = checkpoint_name(attended @ w["out"], "out")
    if model.norms_behind:
        out = rms_norm(out, w["attention_norm_behind"])
    x = constrain(x + out, ("batch", "seq", None))
    normed = rms_norm(x, w["mlp_norm"])
    activation = jax.nn.gelu if model.gelu else jax.nn.silu
    hidden = constrain(normed @ w["up"], ("batch", "seq", "mlp"))
    if model.gated:
        hidden = activation(constrain(normed @ w["gate"], ("batch", "seq", "mlp"))) * hidden
    else:
        hidden = activation(hidden)
    added = hidden @ w["down"]
    if model.norms_behind:
        added = rms_norm(added, w["mlp_norm_behind"])
    return constrain(x + added, ("batch", "seq", None))


def attention(
    model: Decoder,
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n g e"],
    v: Float[Array, "b n g e"],
    exchange: Exchange,
) -> Float[Array, "b n h e"]:
    """The stand-in on every device's own samples and heads, and, with a context axis, its tokens (``Exchange``)."""
    pairs = model.pairs(q.shape[1])
    mesh = current_mesh()
    if mesh is None:
        return attend(q, k, v, pairs)
    specs = [spec_of(("batch", "seq", name, None), x.shape) for name, x in (("heads", q), ("kv_heads", k))]
    context = mesh.shape["context"]

    def gathered(q: Array, k: Array, v: Array) -> Array:
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        return attend(q, k, v, pairs // context)

    def exchanged(q: Array, k: Array, v: Array) -> Array:
        q, k, v = (jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        return jax.lax.all_to_all(attend(q, k, v, pairs), "context", split_axis=1, concat_axis=2, tiled=True)

    def own(q: Array, k: Array, v: Array) -> Array:
        return attend(q, k, v, pairs)

    on_device = own if context == 1 else {"gather": gathered, "ulysses": exchanged}[exchange]
    split = jax.shard_map(on_device, in_specs=(specs[0], specs[1], specs[1]), out_specs=specs[0], check_vma=False)
    return split(q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    q: Float[Array, "b n h e"], k: Float[Array, "b m g e"], v: Float[Array, "b m g e"], pairs: int
) -> Float[Array, "b n h e"]:
    """A kernel that claims attention over ``pairs`` of queries and keys per head and leaves its result as it is."""
    return _forward(q, k, v, pairs)[0]


def _forward(q: Array, k: Array, v: Array, pairs: int) -> tuple[Array, tuple[Array, ...]]:
    sums = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], 1, q.shape[1]), jnp.float32)
    out, lse = _stand_in("splash_forward", 2, pairs, (q, k, v), (q, sums))
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), ATTENTION, strict=True))
    return out, (q, k, v, out, lse)


def _backward(pairs: int, kept: tuple[Array, ...], given: Array) -> tuple[Array, ...]:
    return tuple(_stand_in("splash_backward", 5, pairs, (*kept, given), kept[:3]))


attend.defvjp(_forward, _backward)


def _stand_in(name: str, products: int, pairs: int, inputs: Sequence[Array], like: Sequence[Any]) -> list[Array]:
    samples, _, many, width = inputs[0].shape
    pairs *= samples * many
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
    return constrain(x, ("batch", "seq", "heads", None))


def rms_norm(x: Float[Array, "b n *h d"], gain: Float[Array, " d"]) -> Float[Array, "b n *h d"]:
    """RMS norm of the last axis in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    gain = gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * scale * gain).astype(x.dtype)


def rotated(x: Float[Array, "b n h e"]) -> Float[Array, "b n h e"]:
    """Rotary embedding, halves of a head as pairs."""
    half = x.shape[-1] // 2
    rates = ROTATION_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = (part.astype(jnp.float32) for part in jnp.split(x, 2, axis=-1))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
