"""Linear attention of TPUs (in interpret mode) and of GPUs against float64 pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_support import draw, errors
from vae_support import FAST_COMPILE

from metacanvas_jax.errors import UserError
from metacanvas_jax.kernels import linear_attention_gpu, linear_attention_tpu
from metacanvas_jax.kernels.linear_attention import relu_linear_attention
from metacanvas_jax.parallel.mesh import AXES

KERNELS = {
    "tpu": functools.partial(linear_attention_tpu.linear_attention, interpret=True),
    "gpu": linear_attention_gpu.linear_attention,
}


def by_pairs(q, k, v, dout):
    """Output and gradients, pair by pair, in float64 numpy."""
    raw_q, raw_k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    q, k = np.maximum(raw_q, 0.0), np.maximum(raw_k, 0.0)
    scores = np.einsum("bnhe,bmhe->bhnm", q, k)
    norm = scores.sum(-1, keepdims=True) + 1e-15
    weights = scores / norm
    out = np.einsum("bhnm,bmhf->bnhf", weights, v)
    dweights = np.einsum("bnhf,bmhf->bhnm", dout, v)
    dscores = (dweights - np.sum(dweights * weights, axis=-1, keepdims=True)) / norm
    dq = np.einsum("bhnm,bmhe->bnhe", dscores, k) * (raw_q > 0)
    dk = np.einsum("bhnm,bnhe->bmhe", dscores, q) * (raw_k > 0)
    return out, dq, dk, np.einsum("bhnm,bnhf->bmhf", weights, dout)


def kernel(name, q, k, v, dout, block=None):
    options = {} if block is None else {"block": block}

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(q, k, v, dout):
        out, pull = jax.vjp(lambda *x: KERNELS[name](*x, **options), q, k, v)
        return out, *pull(dout)

    return both(q, k, v, dout)


# Frames of the connector in one launch; a number of channels that 128 does not divide; one head per group; cross
# lengths in several blocks with tails.
@pytest.mark.parametrize(
    ("name", "b", "n", "m", "h", "e", "block"),
    [
        ("tpu", 3, 20, 20, 4, 32, None),
        ("tpu", 2, 70, 70, 20, 32, None),
        ("tpu", 1, 40, 40, 1, 128, None),
        ("tpu", 1, 50, 75, 5, 64, 32),
        ("gpu", 3, 20, 20, 4, 32, None),
        ("gpu", 1, 50, 75, 5, 24, None),
    ],
)
def test_values_and_gradients_are_those_of_float64(name, b, n, m, h, e, block):
    q, k, v, dout = (draw(b, s, h, e, seed=i) for i, s in enumerate((n, m, m, n)))
    found = errors(kernel(name, q, k, v, dout, block), by_pairs(q, k, v, dout))
    assert found[0] <= 2e-6 and max(found[1:]) <= 1e-5, found


@pytest.mark.parametrize("name", KERNELS)
def test_queries_and_keys_that_are_all_negative_give_zeros(name):
    x = jnp.ones((1, 20, 1, 32))
    for q, k in ((x, -x), (-x, x)):
        for y in kernel(name, q, k, x, x):
            assert not np.any(y)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_is_no_worse_than_xla(name, monkeypatch):
    product = linear_attention_gpu._product

    def rounded(letters, a, b, dtype):
        """A GPU's default precision: float32 operands of the product keep the 10 explicit bits of TF32."""
        a, b = (jax.lax.reduce_precision(x, 8, 10) if x.dtype == jnp.float32 else x for x in (a, b))
        return product(letters, a, b, dtype)

    monkeypatch.setattr(linear_attention_gpu, "_product", rounded)
    q, k, v, dout = (draw(1, 200, 4, 32, seed=i, dtype=jnp.bfloat16) for i in range(4))
    exact = by_pairs(q, k, v, dout)
    out, pull = jax.vjp(relu_linear_attention, q, k, v)
    for ours, theirs, truth in zip(kernel(name, q, k, v, dout), (out, *pull(dout)), exact, strict=True):
        ours, theirs = (np.sqrt(np.mean((np.asarray(x, np.float64) - truth) ** 2)) for x in (ours, theirs))
        assert ours <= 1.2 * theirs


def test_a_gpu_keeps_nothing_in_float32_for_the_backward_pass():
    x = jnp.ones((2, 40, 3, 32), jnp.bfloat16)
    kept = jax.tree.leaves(jax.vjp(linear_attention_gpu.linear_attention, x, x, x)[1])
    assert {leaf.dtype for leaf in kept if leaf.size >= x.size} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("asked", ["gpu", "auto"])
def test_a_gpu_multiplies_16_bit_operands(asked):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=device)

    def both(implementation, q, k, v, dout):
        out, pull = jax.vjp(functools.partial(relu_linear_attention, implementation=implementation), q, k, v)
        return out, *pull(dout)

    def products(implementation, dtype):
        x = jax.ShapeDtypeStruct((31, 88, 7, 24), dtype)
        with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision("default"):
            traced = jax.jit(functools.partial(both, implementation)).trace(x, x, x, x)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return [line for line in text.splitlines() if "stablehlo.dot_general" in line]

    found = products(asked, jnp.bfloat16)
    assert len(found) == 6 and not any("HIGHEST" in line for line in found)
    assert sum(line.count("bf16>") for line in found) == 2  # of keys and values
    assert all("HIGHEST" in line for line in products(asked, jnp.float32) + products("xla", jnp.bfloat16))


def test_an_unknown_implementation_is_named():
    x = jnp.ones((1, 4, 1, 32))
    with pytest.raises(UserError, match="implementation is 'cuda', expected one of"):
        relu_linear_attention(x, x, x, implementation="cuda")
