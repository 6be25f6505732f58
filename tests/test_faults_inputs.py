"""Bad input of every kind, and the one line that each of them gets."""

import json
import re
import shutil
import struct

import bad_data_support  # noqa: F401 - adds its cases to the table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_inputs_support import CASES, case, table

from metacanvas_jax.config import read
from metacanvas_jax.config.load import load_config, read_config
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.data.tokenizer import load_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.train.job import FitConfig
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import abstract_state, new_state
from metacanvas_jax.train.store import Store, describe
from metacanvas_jax.trees import partition
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.saved import load, save

pytestmark = pytest.mark.faults
OPTIMIZER = make_optimizer(OptimizerConfig(1e-3))
PARAMS = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones((2,))}
META = describe({"width": 4}, {"mllm": "abc"})
MINIATURE = "configs/miniature.py"


# ---- Configs ----


def bad_config(change):
    config = load_config(MINIATURE, [])
    change(config)
    return read.experiment(config)


def untyped(config, key, value):
    with config.ignore_type():
        config[key] = value


def written_config(folder, text):
    (folder / "bad.py").write_text(text)
    return load_config(str(folder / "bad.py"), [])


table(
    {
        "config file is missing": (lambda _: load_config("nowhere.py", []), "no config file nowhere.py"),
        "config variant": (lambda _: load_config(f"{MINIATURE}:painting", []), "has the variants .*, not 'painting'"),
        "config file is no Python": (
            lambda f: written_config(f, "def get_config(:"),
            r"bad\.py, line 1: .*invalid syntax",
        ),
        "config file fails": (
            lambda f: written_config(f, "1 / 0"),
            r"bad\.py, line 1: ZeroDivisionError: division by zero",
        ),
        "override of no key": (lambda _: load_config(MINIATURE, ["--config.train.stepz=3"]), "stepz"),
        "override of another type": (lambda _: load_config(MINIATURE, ["--config.train.steps=many"]), "many"),
        "misspelt key": (
            lambda _: bad_config(lambda c: c.train.update({"keep_lats": 3})),
            r"unknown key train\.keep_lats; did you mean train\.keep_last\?",
        ),
        "missing key": (lambda _: bad_config(lambda c: c.train.__delattr__("batch")), r"missing key train\.batch"),
        "value of another type": (
            lambda _: bad_config(lambda c: untyped(c, "train", "32")),
            r"train is '32' \(str\), expected TrainSection",
        ),
        "unknown choice": (
            lambda _: bad_config(lambda c: c.__setitem__("objective", "sing")),
            "objective is 'sing', expected one of 'paint', 'understand'",
        ),
        "unknown network": (
            lambda _: bad_config(lambda c: c.dit.__setitem__("kind", "unet")),
            r"dit\.kind is 'unet', expected one of 'sana', 'flux', 'wan', 'qwen_image', 'flux2'",
        ),
        "canvas without connector": (
            lambda _: bad_config(lambda c: c.__setitem__("canvas_connector", None)),
            "'canvas' and 'canvas_connector' come together",
        ),
        "no steps": (lambda _: FitConfig(steps=0), "train.steps is 0"),
        "negative limit": (lambda _: FitConfig(steps=1, max_skips=-1), "train.max_skips is -1, expected 0 or more"),
        "unknown schedule": (
            lambda _: bad_config(lambda c: c.optimizer.__setitem__("schedule", "warm")),
            "optimizer.schedule is 'warm'",
        ),
        "rate of zero": (lambda _: OptimizerConfig(0.0), "learning_rate must be positive"),
        "two free axes": (lambda _: MeshConfig(data=-1, fsdp=-1), "sizes are positive, at most one is -1"),
        "mesh of other devices": (lambda _: make_mesh(MeshConfig(data=3)), "does not fit 8 devices"),
        "rule that is no regex": (
            lambda _: partition(PARAMS, (("(", "train"),)),
            "rule '\\(' is not a regular expression",
        ),
        "parameter without rule": (
            lambda _: partition(PARAMS, (("a", "train"),)),
            "no rule of the partition matches b",
        ),
        "rule without parameter": (
            lambda _: partition(PARAMS, ((".*", "train"), ("c", "freeze"))),
            "decide about no parameter: 'c'",
        ),
        "run without config": (lambda f: read_config(f), "is no run: it has no config.json"),
        "run with a broken config": (
            lambda f: (f.joinpath("config.json").write_text("{"), read_config(f)),
            r"config\.json: not valid JSON",
        ),
        "tokenizer is missing": (lambda f: load_tokenizer(f), r"no tokenizer\.json in it"),
    }
)


# ---- Checkpoints and weights ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Store(folder) as store:
        store.save(new_state(PARAMS, OPTIMIZER), None, META)
    save(folder.parent / "weights", {"a": np.arange(6, dtype=np.float32)})
    return folder.parent


def restore(folder, params=PARAMS, meta=META):
    mesh = make_mesh(MeshConfig())
    place = jax.NamedSharding(mesh, jax.P())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
    with Store(folder / "checkpoints", writable=False) as store:
        return store.restore(abstract_state(shapes, OPTIMIZER, mesh), None, meta)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@case("no complete checkpoint in")
def checkpoint_that_was_never_completed(folder):
    shutil.move(folder / "checkpoints" / "0", folder / "checkpoints" / "0.orbax-checkpoint-tmp-7")
    restore(folder)


@case("checkpoints/0 cannot be read: ")
def checkpoint_with_an_empty_file(folder):
    largest(folder / "checkpoints" / "0" / "params").write_bytes(b"")
    restore(folder)


@case("checkpoints/0 cannot be read: ")
def checkpoint_without_its_json(folder):
    shutil.rmtree(folder / "checkpoints" / "0" / "meta")
    restore(folder)


@case("checkpoints/0 cannot be read: ")
def checkpoint_with_a_broken_json(folder):
    largest(folder / "checkpoints" / "0" / "meta").write_text("{")
    restore(folder)


def broken_weights(folder, name, change):
    file = folder / "weights" / name
    file.write_bytes(change(file.read_bytes()))
    return load(folder / "weights")


table(
    {
        "no checkpoints": (lambda f: restore(f / "weights"), r"no checkpoint: folder .*/checkpoints does not exist"),
        "checkpoint of another config": (
            lambda f: restore(f, meta=describe({"width": 8}, {"mllm": "abc"})),
            "is of another config: width was 4, is 8",
        ),
        "checkpoint beside other weights": (
            lambda f: restore(f, meta=describe({"width": 4}, {"mllm": "abd"})),
            "was trained beside other frozen weights",
        ),
        "checkpoint of another shape": (
            lambda f: restore(f, PARAMS | {"b": jnp.ones((3,))}),
            r"parameter b has shape \(2,\) there, the model's is \(3,\)",
        ),
        "checkpoint of other parameters": (
            lambda f: restore(f, PARAMS | {"c": jnp.ones((3,))}),
            r"parameter c \(3,\) is not in the checkpoint",
        ),
        "weights are missing": (lambda f: load(f / "none"), "no saved parameters in .*none"),
        "weights with a broken json": (
            lambda f: broken_weights(f, "params.json", lambda data: data[:-4]),
            "saved parameters in .*weights cannot be read",
        ),
        "weights that are cut": (
            lambda f: broken_weights(f, "params.safetensors", lambda data: data[:-4]),
            "saved parameters in .*weights cannot be read",
        ),
        "weights with a flipped bit": (
            lambda f: broken_weights(f, "params.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
            "are damaged: their hash is not the one in params.json",
        ),
    }
)


def published(folder, data, name="model.safetensors"):
    (folder / name).write_bytes(data)
    return Checkpoint(folder)


def header(spec, values=b""):
    text = json.dumps(spec).encode()
    return struct.pack("<Q", len(text)) + text + values


def tensor(**changes):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


table(
    {
        "published weights are missing": (lambda f: Checkpoint(f / "none"), "none: no such file or folder"),
        "published weights that are empty": (lambda f: published(f, b""), "not a safetensors file"),
        "published weights are pickles": (
            lambda f: published(f, b"\x80\x04", "pytorch_model.bin"),
            "pickled weights can run code and are never read",
        ),
        "pickle under another name": (
            lambda f: published(f, b"PK\x03\x04" + bytes(60)),
            "pickled weights can run code",
        ),
        "pointer of Git LFS": (lambda f: published(f, b"version https://git-lfs"), "a Git LFS pointer"),
        "header that claims much": (
            lambda f: published(f, struct.pack("<Q", 1 << 60) + b"{}"),
            "not a safetensors file",
        ),
        "header beyond the file": (
            lambda f: published(f, struct.pack("<Q", 999) + b"{}"),
            "truncated, its header needs",
        ),
        "header that is no JSON": (lambda f: published(f, struct.pack("<Q", 2) + b"[]"), "its header cannot be read"),
        "tensor beyond the file": (lambda f: published(f, header(tensor(), b"1234")), "truncated, w ends at byte"),
        "tensor of an unknown type": (lambda f: published(f, header(tensor(dtype="F4"), bytes(8))), "w has dtype F4"),
        "tensor of another size": (
            lambda f: published(f, header(tensor(data_offsets=[0, 4]), bytes(8))),
            "takes 8 bytes but is given 4",
        ),
        "index of a missing shard": (
            lambda f: published(f, b'{"weight_map": {"w": "x.safetensors"}}', "model.safetensors.index.json"),
            "names the shard x.safetensors, which is not there",
        ),
        "index that leaves its folder": (
            lambda f: published(
                f, b'{"weight_map": {"w": "../weights/params.safetensors"}}', "model.safetensors.index.json"
            ),
            "which is not there",
        ),
    }
)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(name, saved, tmp_path, faults):
    function, message = CASES[name]
    if "table" in name:
        pytest.importorskip("pyarrow")
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    with pytest.raises(UserError) as caught:
        function(folder)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text, text
    assert len(text) < 500
    faults("bad input")


def test_the_table_is_long_enough():
    assert len(CASES) >= 40
