"""Streaming import: values, shardings, bytes read, and one clear error for every broken folder."""

import gc
import json
import math
import os
import re
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from weights_support import BFLOAT16, TABLE, abstract, assert_params, mesh, published

from metacanvas_jax.errors import UserError
from metacanvas_jax.weights import hf_import, saved
from metacanvas_jax.weights import published as published_folder
from metacanvas_jax.weights.hashes import content_hash
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.safetensors_io import Checkpoint, read_header
from metacanvas_jax.weights.table import (
    CONV2D,
    CONV3D,
    DEPTHWISE,
    LINEAR,
    POINTWISE,
    SAME,
    Entry,
    check_table,
    folded,
    half_split,
    pointwise,
    published_shapes,
    then,
    under,
)

TRANSFORMS = {  # and the shape of a published tensor
    "same": (SAME, (6, 5)),
    "linear": (LINEAR, (6, 5)),
    "conv2d": (CONV2D, (4, 3, 2, 3)),
    "conv3d": (CONV3D, (4, 3, 2, 1, 3)),
    "pointwise": (POINTWISE, (6, 5, 1, 1)),
    "pointwise3d": (pointwise(3), (6, 5, 1, 1, 1)),
    "depthwise": (DEPTHWISE, (6, 1, 2, 3)),
    "folded vector": (folded(0, 3, 4), (12,)),
    "linear, folded out": (then(LINEAR, folded(1, 3, 4)), (12, 5)),
    "linear, folded in": (then(LINEAR, folded(0, 3, 4)), (5, 12)),
    "half_split": (half_split(4), (12,)),
    "linear, half_split": (then(LINEAR, half_split(4)), (12, 5)),
    "half_split, linear": (then(half_split(4), LINEAR), (5, 12)),
    "linear, half_split, folded out": (then(then(LINEAR, half_split(4)), folded(1, 3, 8)), (24, 5)),
    "half_split, linear, folded in": (then(half_split(4), then(LINEAR, folded(0, 3, 8))), (5, 24)),
    "half_split twice": (then(half_split(4), half_split(8)), (3, 16)),
}

SPECS = {
    "replicated": lambda path, shape: (),
    "first axis": lambda path, shape: ("a",) if shape and shape[0] % 4 == 0 else (),
    "last axis": lambda path, shape: (*(None for _ in shape[1:]), ("a", "b")) if shape and shape[-1] % 8 == 0 else (),
    "kernels both ways": lambda path, shape: (*(None for _ in shape[2:]), "b", "a") if "kernel" in path else (),
}


@pytest.fixture
def file(tmp_path):
    save_file(published(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def small_blocks(monkeypatch):
    """Forces the tiny tensors through the code that cuts large ones."""
    monkeypatch.setattr(hf_import, "BLOCK_BYTES", 128)


@pytest.mark.parametrize("name", TRANSFORMS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_block_of_a_parameter_comes_from_the_window_of_its_transform(name, data):
    transform, shape = TRANSFORMS[name]
    x = np.arange(math.prod(shape)).reshape(shape)
    y = transform.forward(x)
    np.testing.assert_array_equal(transform.backward(y), x)
    starts = [data.draw(st.integers(0, size - 1)) for size in y.shape]
    box = tuple((start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, y.shape, strict=True))
    window = transform.window(box)
    if window is None:
        assert "half_split, " in name, "only this composition may give up"
        return
    source, covered = (tuple(slice(*span) for span in part) for part in window)
    assert all(c.start <= start and stop <= c.stop for c, (start, stop) in zip(covered, box, strict=True))
    np.testing.assert_array_equal(transform.forward(x[source]), y[covered])


@pytest.mark.parametrize(
    "spec, on_host",
    [(spec, True) for spec in (None, *SPECS)] + [(spec, False) for spec in (None, "first axis", "kernels both ways")],
)
def test_streamed_import_places_every_tensor_on_its_sharding(file, small_blocks, monkeypatch, spec, on_host):
    monkeypatch.setattr(hf_import, "_in_host_memory", lambda sharding: on_host)
    structs = abstract(SPECS.get(spec))
    params = load_params(file, TABLE, structs)
    assert_params(params, published())
    for path, value in flatten_dict(params, sep="/").items():
        wanted = flatten_dict(structs, sep="/")[path].sharding
        assert wanted is None or value.sharding.is_equivalent_to(wanted, value.ndim), path


def test_streaming_reads_each_byte_once_when_shards_are_disjoint_or_copies(file, small_blocks):
    total = sum(tensor.nbytes for tensor in read_header(file).values())
    for spec in (None, SPECS["replicated"], SPECS["first axis"], SPECS["kernels both ways"]):
        checkpoint = Checkpoint(file)
        load_params(checkpoint, TABLE, abstract(spec))
        assert checkpoint.bytes_read == total


def test_a_shard_inside_a_half_split_head_reads_the_whole_head_and_no_more(tmp_path):
    save_file({"q": np.zeros((32, 16), np.float32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    sharding = NamedSharding(mesh(), PartitionSpec(None, "a"))
    struct = jax.ShapeDtypeStruct((16, 32), np.float32, sharding=sharding)
    load_params(checkpoint, [Entry("q", "q", then(LINEAR, half_split(16)))], {"q": struct})
    assert checkpoint.bytes_read == 2 * 32 * 16 * 4  # four shards of 8 channels, each inside a head of 16


PROCESS = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import conftest, jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from weights_support import TABLE, abstract, expected, published
import numpy as np
from metacanvas_jax.weights import hf_import
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.safetensors_io import Checkpoint
from flax.traverse_util import flatten_dict
spec = lambda path, shape: (*(None for _ in shape[2:]), "a", "b") if "kernel" in path and "odd" not in path else ()
for on_host in (True, False):
    hf_import._in_host_memory = lambda sharding: on_host
    checkpoint = Checkpoint(sys.argv[4])
    params = load_params(checkpoint, TABLE, abstract(spec))
    for path, value in flatten_dict(params, sep="/").items():
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected(published())[path][shard.index])
    print("read", checkpoint.bytes_read)
"""


def test_streaming_in_two_processes_reads_only_the_part_of_each(file):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), address]
    processes = [
        subprocess.Popen([*command, str(i), str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    read = [[int(n) for n in re.findall(rb"read (\d+)", out)] or err.decode() for out, err in outputs]
    tensors = read_header(file)
    total = sum(t.nbytes for t in tensors.values())
    sharded = [n for n in tensors if n.endswith(".weight") and n not in ("embed.weight", "norm.weight", "odd.weight")]
    half = sum(tensors[n].nbytes for n in sharded) // 2
    assert read == [[total - half] * 2] * 2  # in host buffers, and stacked on the devices


@pytest.mark.parametrize("stored", [np.float32, np.float16, BFLOAT16, np.float64], ids=str)
@pytest.mark.parametrize("wanted", [np.float32, BFLOAT16], ids=str)
def test_the_dtype_of_the_parameters_wins(tmp_path, stored, wanted):
    tensors = published(dtype=stored)
    save_file(tensors, tmp_path / "model.safetensors")
    params = load_params(tmp_path, TABLE, abstract(dtype=wanted))
    assert params["norm"]["scale"].dtype == wanted
    assert_params(params, tensors)


def test_shards_of_both_libraries_and_other_names_are_found(tmp_path):
    tensors = published()
    for i, stem in enumerate(("model", "diffusion_pytorch_model", "connector")):
        folder = tmp_path / stem
        folder.mkdir()
        names = list(tensors)
        parts = {f"{stem}-{j}.safetensors": names[j::2] for j in range(2)}
        for shard, part in parts.items():
            save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map = {name: shard for shard, part in parts.items() for name in part}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        if i == 0:  # a second precision lies beside: the plain name is read
            (folder / "model.fp16.safetensors.index.json").write_text("{}")
        assert_params(load_params(folder, TABLE, abstract()), tensors)


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_a_folder_with_one_sharded_variant_is_read(tmp_path, variant):
    tensors, names = published(), [f"model.{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = dict(zip(names, (list(tensors)[::2], list(tensors)[1::2]), strict=True))
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    (tmp_path / f"model.safetensors.index.{variant}.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_params(load_params(tmp_path, TABLE, abstract()), tensors)
    (tmp_path / "model.safetensors.index.other.json").write_text("{}")
    with pytest.raises(UserError, match=r"among .*index\.\w+\.json, .*index\.other\.json; leave one set"):
        load_params(tmp_path, TABLE, abstract())


def test_both_key_layouts_and_ignored_towers(tmp_path):
    tensors = published()
    renamed = {re.sub(r"^(embed|blocks\.\d\.q)\.weight", r"model.\1.weight", name): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed | {"visual.0.weight": tensors["embed.weight"]}, tmp_path / "model.safetensors")
    assert_params(load_params(tmp_path, TABLE, abstract(), ignore=["visual.*"]), tensors)


def test_a_tied_copy_must_equal_its_original(tmp_path, small_blocks):
    tensors = published()
    copy = tensors["embed.weight"].copy()
    save_file(tensors | {"head.weight": copy}, tmp_path / "model.safetensors")
    assert_params(load_params(tmp_path, TABLE, abstract()), tensors)
    copy[-1, -1] += 1
    save_file(tensors | {"head.weight": copy}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"head\.weight differs from embed\.weight"):
        load_params(tmp_path, TABLE, abstract())


class Passing:
    """A leaf that makes its values when asked, and sees that nobody keeps those of the leaf before."""

    alive = lambda: None  # noqa: E731

    def __init__(self, value):
        self.value, self.shape, self.dtype = value, value.shape, value.dtype

    def __array__(self, dtype=None, copy=None):
        gc.collect()
        assert Passing.alive() is None, "more than one parameter is held"
        made = self.value.copy()
        Passing.alive = weakref.ref(made)
        return made


def test_parameters_are_saved_one_at_a_time_and_aligned(tmp_path):
    rng = np.random.default_rng(0)
    leaves = {"b/x": rng.standard_normal((3, 5), np.float32), "a": np.arange(7, dtype=np.int32)}
    leaves |= {"c": np.array(3.0, np.float32), "b/half": rng.standard_normal(3).astype(np.float16)}
    digest = saved.save(tmp_path, unflatten_dict({path: Passing(x) for path, x in leaves.items()}, sep="/"))
    assert digest == content_hash(unflatten_dict(leaves, sep="/"))
    read, info = saved.load(tmp_path)
    assert info["hash"] == digest
    for path, value in flatten_dict(read, sep="/").items():
        assert value.dtype == leaves[path].dtype and np.array_equal(value, leaves[path])
    header = read_header(tmp_path / "params.safetensors")
    assert header.keys() == leaves.keys()
    assert all(tensor.offset % leaves[path].dtype.itemsize == 0 for path, tensor in header.items())


def test_a_published_folder_is_checked_whole_and_read_by_parameter(tmp_path):
    tensors = published()
    save_file(tensors, tmp_path / "model.safetensors")
    lazy = published_folder.lazy(tmp_path, TABLE, abstract(), ())
    first = next(iter(lazy.values()))
    before = first.checkpoint.bytes_read
    assert_params(unflatten_dict({path: np.asarray(leaf) for path, leaf in lazy.items()}, sep="/"), tensors)
    assert before < first.checkpoint.bytes_read
    save_file({name: x for name, x in tensors.items() if name != "norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight is missing"):
        published_folder.lazy(tmp_path, TABLE, abstract(), ())


def test_check_table_names_every_disagreement():
    structs = {"a": jax.ShapeDtypeStruct((2, 3), np.float32), "b": jax.ShapeDtypeStruct((3,), np.float32)}
    table = [Entry("x", "a", SAME), Entry("x", "a", SAME), Entry("y.{i}", "c", SAME, 2)]
    with pytest.raises(ValueError, match="parameter b has no entry; entry c has no") as raised:
        check_table(table, structs)
    assert "parameter a has 2 entries" in str(raised.value)
    assert "published name x is used 2 times" in str(raised.value)
    with pytest.raises(ValueError, match=r"entry a stacks 3 layers on shape \[2, 3\]"):
        check_table([Entry("x.{i}", "a", SAME, 3), Entry("z", "b", SAME)], structs)
    with pytest.raises(ValueError, match=r"a name holds \{i\} exactly when layers is given"):
        Entry("x.{i}", "a", SAME)


def test_published_shapes_are_those_of_the_file():
    assert published_shapes(TABLE, abstract()) == {name: tensor.shape for name, tensor in published().items()}


def test_a_table_under_a_prefix(tmp_path):
    save_file({f"text.{name}": tensor for name, tensor in published().items()}, tmp_path / "model.safetensors")
    params = load_params(tmp_path, under(TABLE, path="language/", name="text."), {"language": abstract()})
    assert_params(params["language"], published())


@pytest.mark.slow
def test_streaming_memory_stays_near_the_size_of_the_model(tmp_path):
    """At 1 GB; the tables of the documentation come from the same script at 3 GB."""
    script = Path(__file__).parent.parent / "benchmarks" / "import_memory.py"
    command = [sys.executable, script, "--gigabytes", "1", "--json", "--folder", tmp_path]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=600).stdout)
    model, largest = results["model"], results["largest"]
    assert results["import"]["peak"] < model + 1.6 * largest
    assert results["import, 8 devices"]["peak"] < 1.1 * model
    assert results["export"]["peak"] < 2 * largest
    assert results["import"]["read"] == model
    assert list(tmp_path.iterdir()) == []
