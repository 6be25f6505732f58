import os
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from metacanvas_jax.errors import UserError
from metacanvas_jax.nn.layers import Dense, RMSNorm
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, on_mesh, put_batch
from metacanvas_jax.parallel.rules import placed, resolve, shardings, whole
from metacanvas_jax.train.optimizer import OptimizerConfig, make_optimizer
from metacanvas_jax.train.partition import flat, partition
from metacanvas_jax.train.state import new_state
from metacanvas_jax.train.step import make_step


class Block(nn.Module):
    """Norm and feed-forward, with a residual."""

    @nn.compact
    def __call__(self, x):
        y = Dense(32, ("embed", "mlp"), "float32", name="up")(RMSNorm(1e-6, name="norm")(x))
        y = nn.with_logical_constraint(jax.nn.gelu(y), ("batch", "seq", "mlp"))
        return nn.with_logical_constraint(
            x + Dense(x.shape[-1], ("mlp", "embed"), "float32", name="down")(y), ("batch", "seq", "embed")
        )


class Tiny(nn.Module):
    """Two scanned blocks and a frozen input projection."""

    @nn.compact
    def __call__(self, x):
        x = Dense(16, (None, "embed"), "float32", name="frozen")(x)
        stack = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(Block(name="blocks"), x, None)[0]


RULES = (("blocks/.*", "train"), ("frozen/.*", "freeze"))
OPTIMIZER = make_optimizer(OptimizerConfig(1e-2, weight_decay=0.1))


def loss(trainable, frozen, prepared, key):
    x, y = prepared
    error = Tiny().apply({"params": trainable | frozen}, x) - y
    return jnp.mean(error**2), {}


def two_steps(mesh):
    """Losses and parameters after two steps of two microbatches on a mesh (None: one device, plain jit)."""
    keys = jax.random.split(jax.random.key(0), 3)
    batch = tuple(np.asarray(jax.random.normal(key, (16, 4, 8 * (i + 1)))) for i, key in enumerate(keys[:2]))

    def init(key):
        return Tiny().init(key, jnp.zeros((1, 4, 8)))["params"]

    def start(key):
        trainable, frozen = partition(nn.meta.unbox(init(key)), RULES)
        return new_state(trainable, OPTIMIZER), frozen

    step = make_step(lambda frozen, batch, key: batch, loss, OPTIMIZER, accumulate=2)
    if mesh is None:
        state, frozen = jax.jit(start)(keys[2])
    else:
        layout = shardings(jax.eval_shape(init, keys[2]), mesh)
        params = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=layout)(keys[2])
        trainable, frozen = partition(params, RULES)
        state = jax.jit(lambda params: new_state(params, OPTIMIZER))(trainable)
        batch = put_batch(batch, mesh)
    losses = []
    for _ in range(2):
        if mesh is None:
            state, metrics = step(state, frozen, batch, jax.random.key(1))
        else:
            with on_mesh(mesh):
                state, metrics = step(state, frozen, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def alone():
    return two_steps(None)


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [
        (MeshConfig(data=2, fsdp=4), P(None, "fsdp", None)),
        (MeshConfig(data=1, fsdp=2, context=2, tensor=2), P(None, "fsdp", "tensor")),
    ],
)
def test_mesh_changes_nothing_but_the_layout(alone, sizes, kernel):
    losses, expected = alone
    sharded_losses, state = two_steps(make_mesh(sizes))
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-6)
    for path, value in flat(state.params).items():
        np.testing.assert_allclose(value, flat(expected.params)[path], rtol=1e-5, atol=1e-6, err_msg=path)
    moments = state.opt_state[1].mu
    for tree in (state.params, moments):
        leaf = tree["blocks"]["up"]["kernel"]
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(leaf.sharding.mesh, kernel), 3)


def test_rules_choose_by_priority_and_skip_what_does_not_divide():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert resolve(("batch", "seq", "embed"), (8, 6, 6), mesh) == P(("data", "fsdp"), None, None)  # fsdp is taken
    assert resolve(("embed", "mlp"), (6, 6), mesh) == P("fsdp", "tensor")
    assert resolve(("embed", "kv_heads"), (6, 3), mesh) == P("fsdp", None)
    assert resolve(("embed", "embed"), (3, 6), mesh) == P(None, None)  # the first of the name is asked only
    assert resolve((None, "unheard"), (8, 8), mesh) == P(None, None)


def test_large_parameters_left_whole_are_listed():
    mesh = make_mesh(MeshConfig(fsdp=8, data=1))
    names = {"a": ("embed", None), "b": ("embed",), "c": (None, None)}
    shapes = {"a": (16, 4), "b": (12,), "c": (3, 4)}
    abstract = {
        key: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shapes[key], jnp.float32), names[key]) for key in names
    }
    abstract["plain"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    tree = placed(abstract, shardings(abstract, mesh))
    assert whole(tree, 12) == {"b": (12,), "c": (3, 4)}
    assert tree["a"].sharding.spec == P("fsdp", None)


def test_bad_meshes_and_batches_are_named():
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(data=-1, fsdp=3))
    with pytest.raises(UserError, match="at most one is -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(UserError, match="a batch of 12 samples does not divide"):
        put_batch({"x": np.zeros((12, 2))}, make_mesh(MeshConfig()))


def test_missing_processes_end_the_run_with_one_line():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        where = f"localhost:{probe.getsockname()[1]}"
    code = f"from metacanvas_jax.parallel import distributed; distributed.initialize(2, {where!r}, 0, timeout_s=1)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": "."}
    )
    assert result.returncode == 2
    assert f"waited 1 s for all of 2 processes to come up at {where}" in result.stderr
