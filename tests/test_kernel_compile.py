"""Every kernel goes through the TPU compiler, for every generation; needs libtpu, no TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from kernel_support import SMALL

from metacanvas_jax.hardware import TPUS
from metacanvas_jax.kernels import tiles as tiling
from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.kernels.flash_fixed_max import flash_attention
from metacanvas_jax.kernels.linear_attention import relu_linear_attention
from metacanvas_jax.kernels.prologue import LN2, prepare
from metacanvas_jax.kernels.static_schedule import compiling_for, device, reason
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, on_mesh

pytest.importorskip("libtpu")

GATE = [x if x in ("v5e", "tpu7x") else pytest.param(x, marks=pytest.mark.slow) for x in TPUS]


def compile_gradient(f, generation, *shapes):
    """Text of the compiled forward and backward pass of ``f`` on bfloat16 inputs."""
    with compiling_for(generation) as sharding, jax.default_matmul_precision("default"):
        inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        out = jax.eval_shape(f, *inputs)
        grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), out)

        def both(*x):
            value, pull = jax.vjp(f, *x[:-1])
            return value, pull(x[-1])

        return jax.jit(both).lower(*inputs, grads).compile().as_text()


def lowered(f, sharding, *shapes):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return jax.jit(f).lower(*inputs).as_text()


def test_the_kernel_is_chosen_for_the_tpu_that_a_cpu_host_lowers_for():
    shape = (1, 1024, 2, 128)
    with compiling_for("v5e") as sharding, jax.default_matmul_precision("default"):
        text = lowered(attention, sharding, shape, shape, shape)
    assert "flash_attention_forward" in text and "while" not in text


def test_on_a_mesh_the_kernel_runs_on_the_samples_and_heads_of_each_device():
    device("v5e")  # sets up libtpu
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2), list(topology.devices))
    shape = (2, 1024, 4, 128)
    with on_mesh(mesh, abstract=True), jax.default_matmul_precision("default"):
        sharding = NamedSharding(mesh, PartitionSpec("data", "context"))
        text = lowered(functools.partial(attention, exchange="heads"), sharding, shape, shape, shape)
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    named = [line for line in kernels if "flash_attention_forward" in line]
    assert named
    assert all("tensor<1x1024x128xbf16>" in line and "tensor<2x1024x512xbf16>" not in line for line in named)


@pytest.mark.parametrize("generation", TPUS)
def test_attention_compiles(generation):
    segments = jnp.zeros((1, 300), jnp.int32)
    mask = MaskSpec(causal=True, keys=jnp.ones((1, 300), bool), query_segments=segments, key_segments=segments)

    def f(q, k, v):
        return flash_attention(q, k, v, mask=mask, forward=SMALL, backward=SMALL)

    text = compile_gradient(f, generation, (1, 300, 4, 128), (1, 300, 2, 128), (1, 300, 2, 128))
    assert "flash_attention_forward" in text and "flash_attention_backward" in text


def test_the_entry_uses_the_tiles_of_the_generation_it_is_lowered_for(monkeypatch):
    asked = []
    monkeypatch.setattr(tiling, "tiles_for", lambda *key: asked.append(key) or SMALL)
    text = compile_gradient(attention, "v6e", (1, 1100, 1, 72), (1, 130, 1, 72), (1, 130, 1, 72))
    assert "flash_attention_backward" in text
    assert {key[1:] for key in asked} == {("v6e", 128)}


@pytest.mark.parametrize("generation", GATE)
def test_linear_attention_compiles(generation):
    shape = (2, 100, 20, 32)
    text = compile_gradient(relu_linear_attention, generation, shape, shape, shape)
    assert "linear_attention_forward" in text and "linear_attention_backward" in text


@pytest.mark.parametrize("generation", GATE)
def test_the_prologue_compiles(generation):
    angles = jnp.ones((1, 100, 64))

    def f(q, k, gain):
        return attention_logits(*prepare(q, k, gain, gain, angles, angles, 1e-6))

    def attention_logits(q, k):
        return q * jnp.asarray(LN2, q.dtype), k

    text = compile_gradient(f, generation, (2, 100, 384), (2, 100, 384), (384,))
    assert "prologue_forward" in text and "prologue_backward" in text


def test_of_a_failed_compilation_the_error_is_kept_and_not_the_advice_below_it():
    trace = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.

See https://openxla.org/xla/errors/error_1001 for more details."""
    assert reason(trace) == "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."
    assert reason("killed") == "killed"
    assert reason("") == "no reason given"
