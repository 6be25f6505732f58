"""Export of weights: the inverse of import, read by other libraries, and never half a folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from weights_support import BFLOAT16, TABLE, abstract, assert_params, expected, published

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.weights import hf_export
from metacanvas_jax.weights.hf_export import new_folder, save_params
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.safetensors_io import read_header
from metacanvas_jax.weights.table import CONV2D, CONV3D, LINEAR, SAME, Entry, half_split, then


def params_of(tensors):
    return unflatten_dict(expected(tensors), sep="/")


def test_export_writes_the_published_tensors(tmp_path):
    files = save_params(params_of(published()), TABLE, tmp_path / "out", metadata={"run": "demo"})
    assert files == [tmp_path / "out" / "model.safetensors"]
    written = load_file(files[0])
    assert written.keys() == published().keys()
    for name, tensor in published().items():
        assert written[name].dtype == tensor.dtype
        np.testing.assert_array_equal(written[name], tensor)
    with safe_open(files[0], "numpy") as opened:
        assert opened.metadata() == {"format": "pt", "run": "demo"}


@pytest.mark.parametrize("sharded", [False, True])
def test_export_of_arrays_on_devices_comes_back_bit_for_bit(tmp_path, sharded):
    spec = (lambda path, shape: (*(None for _ in shape[2:]), "a", "b") if "kernel" in path else ()) if sharded else None
    save_params(params_of(published()), TABLE, tmp_path / "first")
    params = load_params(tmp_path / "first", TABLE, abstract(spec))
    save_params(params, TABLE, tmp_path / "second", max_shard_bytes=2000)
    assert_params(load_params(tmp_path / "second", TABLE, abstract()), published())


def test_shards_hold_the_limit_and_the_index_names_every_tensor(tmp_path):
    files = save_params(
        params_of(published()), TABLE, tmp_path / "out", max_shard_bytes=3000, stem="diffusion_pytorch_model"
    )
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert held.keys() == published().keys()
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    largest = max(tensor.nbytes for tensor in published().values())
    assert max(sizes) <= max(3000, largest)
    assert len(files) > 3


def test_another_dtype_is_for_floats_only(tmp_path):
    save_params(params_of(published()), TABLE, tmp_path / "out", dtype="bfloat16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.pop("steps").dtype == np.int32
    assert {tensor.dtype for tensor in written.values()} == {BFLOAT16}
    offsets = {name: tensor.offset for name, tensor in read_header(tmp_path / "out" / "model.safetensors").items()}
    assert offsets["steps"] % 4 == 0, "a tensor of four-byte numbers is not aligned"
    assert_params(load_params(tmp_path / "out", TABLE, abstract(dtype=BFLOAT16)), published())
    with pytest.raises(UserError, match=r"embed/table: safetensors cannot hold float8_e4m3fn"):
        save_params(params_of(published()), TABLE, tmp_path / "other", dtype="float8_e4m3fn")


TRANSFORMS = {
    "same": (SAME, 2),
    "linear": (LINEAR, 2),
    "half_split": (half_split(4), 1),
    "linear, half_split": (then(LINEAR, half_split(8)), 2),
    "conv2d": (CONV2D, 4),
    "conv3d": (CONV3D, 5),
}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_import_of_an_export_is_the_same_for_random_tables(tmp_path_factory, data):
    table, params = [], {}
    for i, name in enumerate(data.draw(st.lists(st.sampled_from(sorted(TRANSFORMS)), min_size=1, max_size=5))):
        transform, rank = TRANSFORMS[name]
        layers = data.draw(st.none() | st.integers(1, 3))
        shape = tuple(8 * data.draw(st.integers(1, 2)) for _ in range(rank))
        shape = shape if layers is None else (layers, *shape)
        number = "" if layers is None else ".{i}"
        table.append(Entry(f"p{i}{number}.weight", f"p{i}/kernel", transform, layers))
        bits = np.random.default_rng(i).integers(0, 2**32, shape, dtype=np.uint32)
        params[f"p{i}/kernel"] = bits.view(np.float32)
    structs = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in params.items()}
    folder = tmp_path_factory.mktemp("random") / "out"
    limit = data.draw(st.sampled_from([100, 5000, 1e9]))
    save_params(unflatten_dict(params, sep="/"), table, folder, max_shard_bytes=limit)
    # All bit patterns are drawn, NaN too, so nothing may be refused.
    back = load_params(folder, table, unflatten_dict(structs, sep="/"), check_finite=False)
    for path, value in flatten_dict(back, sep="/").items():
        assert np.asarray(value).tobytes() == params[path].tobytes(), path


def test_a_folder_with_contents_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder; nothing was written"):
        save_params(params_of(published()), TABLE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"notes\.txt: exists and is not an empty folder"):
        save_params(params_of(published()), TABLE, tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    save_params(params_of(published()), TABLE, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


@pytest.mark.parametrize("there", ["on this machine", "in a bucket"])
def test_of_two_writers_of_one_new_folder_the_slower_is_refused(there, tmp_path, request):
    place = str(tmp_path) if there == "on this machine" else request.getfixturevalue("bucket").url
    with (
        pytest.raises(UserError, match=r"out: .*[Nn]ot.* empty.*; nothing was written"),
        new_folder(f"{place}/out") as slow,
    ):
        (slow / "slow.json").write_text("{}")
        with new_folder(f"{place}/out") as fast:
            (fast / "fast.json").write_text("{}")
    assert list(files.listing(place, deep=True)) == ["out/fast.json"]


class Leaf:
    """A lazy leaf that does something when it is read."""

    def __init__(self, value, action):
        self.value, self.action = value, action
        self.shape, self.dtype = value.shape, value.dtype

    def __getitem__(self, index):
        self.action()
        return self.value[index]


def interrupt():
    raise KeyboardInterrupt


def full_disk():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [(interrupt, KeyboardInterrupt, "^$"), (full_disk, UserError, "No space left on device; nothing was written")],
)
def test_an_interrupted_export_leaves_nothing(tmp_path, action, error, message):
    params = params_of(published())
    params["norm"]["scale"] = Leaf(params["norm"]["scale"], action)
    with pytest.raises(error, match=message):
        save_params(params, TABLE, tmp_path / "out", max_shard_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"out: needs .* GB and the disk has 1e-08 GB left"):
        save_params(params_of(published()), TABLE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import conftest
from test_export_weights import Leaf, params_of, published, save_params, TABLE
params = params_of(published())
params["steps"] = Leaf(params["steps"], lambda: (print("writing", flush=True), time.sleep(600)))
save_params(params, TABLE, sys.argv[2], max_shard_bytes=1000)
"""


def test_a_killed_export_leaves_no_folder_of_that_name(tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"writing\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    (draft,) = tmp_path.iterdir()
    assert draft.name.startswith(".out.")
    with pytest.raises(UserError):
        load_params(draft, TABLE, abstract())


def test_several_parts_appear_together(tmp_path):
    written = []
    with pytest.raises(RuntimeError, match="stopped"), new_folder(tmp_path / "out") as draft:
        save_params(params_of(published()), TABLE, draft / "transformer")
        written += [path.name for path in (draft / "transformer").iterdir()]
        raise RuntimeError("stopped")
    assert written
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as draft:
        save_params(params_of(published()), TABLE, draft / "transformer")
        (draft / "model_index.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model_index.json", "transformer"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
