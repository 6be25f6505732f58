import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.kernels.attention import MaskSpec, attention
from metacanvas_jax.nn.layers import Dense, RMSNorm
from metacanvas_jax.nn.lora import Lora, LoraConfig
from metacanvas_jax.parallel import mesh as mesh_module
from metacanvas_jax.parallel.activations import check_notes, constrain, noting, part
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, mesh_array, mesh_sizes, on_mesh, put_batch
from metacanvas_jax.parallel.rules import check_whole, placed, resolve, rules_of, shardings, whole
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import new_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.trees import flat, partition


class Block(nn.Module):
    """Norm and feed-forward, with a residual."""

    @nn.compact
    def __call__(self, x):
        y = Dense(32, ("embed", "mlp"), "float32", name="up")(RMSNorm(1e-6, name="norm")(x))
        y = constrain(jax.nn.gelu(y), ("batch", "seq", "mlp"))
        return constrain(x + Dense(x.shape[-1], ("mlp", "embed"), "float32", name="down")(y), ("batch", "seq", "embed"))


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
        (MeshConfig(data=1, fsdp=2, context=2, tensor=2), P(None, ("fsdp", "context"), "tensor")),
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
    assert resolve(("batch", "seq", "embed"), (8, 6, 6), mesh) == P(("data", "fsdp"), "tensor", None)  # fsdp is taken
    assert resolve(("batch", "seq", "mlp"), (8, 6, 6), mesh) == P(("data", "fsdp"), None, "tensor")
    assert resolve(("embed", "mlp"), (6, 6), mesh) == P("fsdp", "tensor")
    assert resolve(("embed", "kv_heads"), (6, 3), mesh) == P("fsdp", None)
    assert resolve(("embed", "embed"), (3, 6), mesh) == P(None, None)  # the first of the name is asked only
    assert resolve((None, "unheard"), (8, 8), mesh) == P(None, None)


def test_later_rows_of_a_name_are_what_to_fall_back_on():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    assert resolve(("batch", "seq", "embed"), (2, 8, 8), mesh) == P("fsdp", ("context", "tensor"), None)
    assert resolve(("batch", "seq", "embed"), (2, 6, 8), mesh) == P("fsdp", "context", None)
    assert resolve(("batch", "seq", "heads", None), (2, 8, 8, 4), mesh) == P("fsdp", "context", "tensor", None)
    exchanged = ("batch", "whole_seq", "exchanged_heads", None)
    assert resolve(exchanged, (2, 8, 8, 4), mesh) == P("fsdp", None, ("tensor", "context"), None)
    # A size of 1 does not free an axis: which axes an array uses is the same on every mesh.
    alone = make_mesh(MeshConfig(data=1, fsdp=1, context=4, tensor=2))
    assert resolve(("batch", "whole_seq", "embed"), (4, 8, 8), alone) == P(None, None, None)


def test_parts_of_the_model_have_rules_of_their_own():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    names = ("batch", "seq", "embed")
    assert resolve(names, (4, 8, 8), mesh, rules_of("mllm")) == P(("fsdp", "context"), "tensor", None)
    assert resolve(names, (2, 8, 8), mesh, rules_of("mllm")) == P("fsdp", "tensor", None)
    for axis in ("heads", "kv_heads", "mlp"):  # what the context axis splits where it has no samples to split
        hidden = ("batch", "seq", axis)
        assert resolve(hidden, (4, 8, 8), mesh, rules_of("mllm")) == P(("fsdp", "context"), None, "tensor")
        assert resolve(hidden, (2, 8, 8), mesh, rules_of("mllm")) == P("fsdp", None, ("tensor", "context"))
        assert resolve(hidden, (2, 8, 2), mesh, rules_of("mllm")) == P("fsdp", None, "tensor")
    rows = ("batch", "rows", None, None)
    assert resolve(rows, (8, 8, 8, 3), mesh, rules_of("vae")) == P(("fsdp", "context", "tensor"), None, None, None)
    assert resolve(rows, (2, 8, 8, 3), mesh, rules_of("vae")) == P("fsdp", ("context", "tensor"), None, None)
    tree = {part: {"kernel": nn.LogicallyPartitioned(jnp.zeros((8, 8)), ("embed", "mlp"))} for part in ("dit", "vae")}
    tree["dit"]["bias"] = nn.LogicallyPartitioned(jnp.zeros((8,)), ("embed",))
    layout = shardings(tree, mesh)
    assert layout["dit"]["kernel"].spec == P(("fsdp", "context"), "tensor")
    assert layout["dit"]["bias"].spec == P(None)  # too small to be gathered in every layer
    assert layout["vae"]["kernel"].spec == P(("fsdp", "context"), None)


def test_constraints_follow_mesh_rules_and_part_and_are_noted():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))

    def traced(x):
        x = constrain(x, ("batch", "seq", "embed"))
        with part("mllm"):
            return constrain(x, ("batch", "seq", "embed"))

    x = jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)
    with noting() as notes:
        jax.eval_shape(traced, x)  # no mesh: nothing to constrain
        assert not notes
        with on_mesh(mesh):
            jax.eval_shape(traced, x)
            jax.eval_shape(traced, x)
    assert [(note.part, note.spec) for note in notes] == [
        ("", P("fsdp", ("context", "tensor"), None)),
        ("mllm", P(("fsdp", "context"), "tensor", None)),
    ]
    check_notes(notes, 1)
    with noting() as notes, on_mesh(mesh):
        jax.eval_shape(lambda x: constrain(x, ("batch", None)), jax.ShapeDtypeStruct((3, 2**19), jnp.float32))
    with pytest.raises(UserError, match=r"shape \[3, 524288\] \(6 MiB\) in the model lies whole"):
        check_notes(notes, 2**20)
    check_notes(notes, 2**24)


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["", "mllm", "vae"])
def test_attention_of_every_part_is_the_same_on_a_mesh(name, kv_heads, causal):
    """Whichever axis a part's rules split over the devices of the tensor axis: tokens or heads."""
    rng = np.random.default_rng(0)
    heads = {"q": 4, "k": kv_heads, "v": kv_heads}
    arrays = {x: rng.standard_normal((4, 8, count, 8), np.float32) for x, count in heads.items()}

    def run(batch):
        with part(name):
            return attention(batch["q"], batch["k"], batch["v"], mask=MaskSpec(causal=causal))

    alone = jax.jit(run)(arrays)
    for sizes in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, context=2, tensor=2)):
        mesh = make_mesh(sizes)
        with on_mesh(mesh):
            spread = jax.jit(run)(put_batch(arrays, mesh))
        np.testing.assert_allclose(spread, alone, atol=1e-5)


def test_processes_that_hold_the_same_samples_read_the_same_part():
    def laid(sizes, per_process):
        mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True))))
        owner = {device: i // per_process for i, device in enumerate(mesh.devices.flat)}
        devices = np.vectorize(lambda device: SimpleNamespace(process_index=owner[device]))(mesh.devices)
        return SimpleNamespace(devices=devices, shape=mesh.shape)

    def parts(sizes, per_process):
        mesh = laid(sizes, per_process)
        return [mesh_module._batch_part.__wrapped__(mesh, mesh_module.RULES, p) for p in range(8 // per_process)]

    assert parts((2, 4, 1, 1), 2) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert parts((1, 4, 1, 2), 4) == [(0, 2), (1, 2)]
    assert parts((1, 2, 1, 4), 2) == [(0, 2), (0, 2), (1, 2), (1, 2)]  # a tensor axis over two processes
    assert parts((1, 1, 4, 2), 2) == [(0, 1)] * 4
    with pytest.raises(UserError, match="hold batch slices"):
        parts((1, 4, 1, 2), 3)


@pytest.mark.parametrize("slices", [1, 2])
def test_only_the_named_axis_reaches_across_slices(slices):
    def device(i):
        return SimpleNamespace(
            id=i, process_index=i // 4, slice_index=i // (8 // slices), platform="cpu", device_kind="cpu"
        )

    devices = [device(i) for i in range(8)]
    config = MeshConfig(data=1, fsdp=-1, tensor=2, across_slices="fsdp")
    assert mesh_sizes(config, 8, slices) == (1, 4, 1, 2)
    array = mesh_array(config, devices)
    assert array.shape == (1, 4, 1, 2)
    crossing = [
        axis
        for axis in range(4)
        if any(
            len({x.slice_index for x in line}) > 1
            for line in np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
        )
    ]
    assert crossing == ([] if slices == 1 else [1])
    with pytest.raises(UserError, match="must be a multiple of 3"):
        mesh_sizes(config, 8, 3)


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
    check_whole(tree, 13)
    check_whole(placed(abstract, shardings(abstract, make_mesh(MeshConfig()))), 12)  # copies are what it is for
    with pytest.raises(UserError, match=r"'fsdp': 8.* parameter b of shape \[12\] .* lies whole on every device"):
        check_whole(tree, 12)


def test_adapters_are_split_along_their_long_axis():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))

    def layout(width, *axes):
        adapter = Lora(LoraConfig(8, 8.0), 16, axes, "float32")
        found = shardings(jax.eval_shape(adapter.init, jax.random.key(0), jnp.zeros((1, width)))["params"], mesh)
        return found["a"].spec, found["b"].spec

    assert layout(32, "mlp", "embed") == (P(("tensor", "fsdp"), None), P(None, "fsdp"))
    assert layout(32, "embed", "heads") == (P("fsdp", None), P(None, ("tensor", "fsdp")))
    assert layout(6, "mlp", "embed") == (P("tensor", "fsdp"), P(None, "fsdp"))  # no long axis to cut: the rank


def test_parts_meant_to_be_whole_are_copied_but_for_their_adapters():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, whole=("mllm",)))
    kernel = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((16, 8), jnp.float32), ("embed", "mlp"))
    adapter = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((16, 8), jnp.float32), ("embed", "rank"))
    tree = {"mllm": {"up": kernel, "up_lora": adapter}, "dit": {"up": kernel}}
    layout = shardings(tree, mesh, whole=("mllm",))
    assert layout["mllm"]["up"].is_fully_replicated
    assert layout["mllm"]["up_lora"].spec == layout["dit"]["up"].spec == P("fsdp", None)
    sharing = shardings(tree, make_mesh(MeshConfig(data=1, fsdp=2, context=4)), whole=("mllm",))
    assert sharing["mllm"]["up"].spec == P(None, "context")  # each holds what it computes
    assert sharing["dit"]["up"].spec == P(("fsdp", "context"), None)
    check_whole(placed(tree, layout), 128, meant=("mllm",))
    with pytest.raises(UserError, match=r"parameter mllm/up of shape \[16, 8\]"):
        check_whole(placed(tree, layout), 128)


def test_bad_meshes_and_batches_are_named():
    with pytest.raises(UserError, match="mesh fsdp 3 does not divide 8 devices"):
        make_mesh(MeshConfig(data=-1, fsdp=3))
    with pytest.raises(UserError, match="data 2 x fsdp 3 x context 1 x tensor 1 = 6 does not fit 8 devices"):
        make_mesh(MeshConfig(data=2, fsdp=3))
    with pytest.raises(UserError, match="at most one is -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(UserError, match="a batch of 12 samples does not divide"):
        put_batch({"x": np.zeros((12, 2))}, make_mesh(MeshConfig()))


def test_missing_processes_are_named():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        where = f"localhost:{probe.getsockname()[1]}"
    code = f"from metacanvas_jax.parallel import distributed; distributed.initialize(2, {where!r}, 0, timeout_s=1)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": "."}
    )
    assert result.stderr.strip().endswith("Lost: process 1 of 2 did not come up within 1 s")


@pytest.mark.parametrize("context", [2, 4])
@pytest.mark.parametrize("heads", [4, 3], ids=["heads divide", "heads do not divide"])
def test_tokens_of_one_sequence_are_exchanged_for_heads_or_keys_are_gathered(heads, context):
    """Values, gradients, and which collectives of the context axis each way needs."""
    rng = np.random.default_rng(0)
    arrays = {x: rng.standard_normal((2, 16, heads, 8), np.float32) for x in "qkv"}
    keys = np.arange(16)[None] < np.array([[16], [11]])
    dy = rng.standard_normal((2, 16, heads, 8), np.float32)

    def run(q, k, v):
        return attention(q, k, v, mask=MaskSpec(keys=jnp.asarray(keys)), exchange="any")

    def gradients(arrays):
        return jax.grad(lambda arrays: jnp.vdot(run(**arrays), dy))(arrays)

    given = jax.tree.map(jnp.asarray, arrays)
    alone, expected = run(**given), gradients(given)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=context, tensor=4 // context))
    with on_mesh(mesh):
        placed = {x: jax.device_put(a, jax.NamedSharding(mesh, P("data", "context"))) for x, a in arrays.items()}
        value, both = jax.jit(lambda a: run(**a)), jax.jit(gradients)
        text = value.lower(placed).compile().as_text()
        np.testing.assert_allclose(value(placed), alone, atol=1e-5)
        spread = both(placed)
    for name, wanted in expected.items():
        np.testing.assert_allclose(spread[name], wanted, atol=1e-5)
    divide = heads % 4 == 0
    assert ("all-to-all" in text) == (context == 4 and divide)
    assert ("all-gather" in text) == (context == 2 or not divide)
