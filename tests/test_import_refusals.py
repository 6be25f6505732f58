"""Published folders that are broken: one clear line for each, and nothing is kept."""

import gc
import json
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from weights_support import BFLOAT16, TABLE, abstract, published

from metacanvas_jax.cli.main import main
from metacanvas_jax.errors import UserError
from metacanvas_jax.weights import hf_import
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.table import (
    SAME,
    Entry,
)


@pytest.mark.parametrize(
    "spec", ['"shape": [1], "data_offsets": [0, 4, 8]', '"shape": [1e999], "data_offsets": [0, 4]']
)
def test_a_header_of_impossible_numbers_is_one_line(tmp_path, spec):
    header = '{"w": {"dtype": "F32", ' + spec + "}}"
    (tmp_path / "model.safetensors").write_bytes(_header(header.encode(), bytes(8)))
    with pytest.raises(UserError, match="its header cannot be read"):
        Checkpoint(tmp_path)


def _without(name):
    return lambda tensors: tensors.pop(name)


def _with(**changes):
    return lambda tensors: tensors.update({name.replace("__", "."): value for name, value in changes.items()})


NAN = np.full((16,), np.nan, np.float32)


INFINITY = np.where(np.arange(16) == 3, -np.inf, 0).astype(np.float32)


WRONG_TENSORS = {
    "missing": (_without("blocks.2.o.weight"), r"blocks\.2\.o\.weight is missing \(expected shape \[16, 32\]\)"),
    "missing with alias": (
        _without("blocks.0.q.weight"),
        r"blocks\.0\.q\.weight or model\.blocks\.0\.q\.weight is mis",
    ),
    "extra": (_with(visual=NAN), r"visual is not a tensor of this network"),
    "more layers": (_with(blocks__4__gate=NAN), r"blocks\.4\.gate is not a tensor of this network"),
    "shape": (_with(norm__weight=np.ones(17, np.float32)), r"norm\.weight has shape \[17\], expected \[16\]"),
    "transposed": (
        _with(odd__weight=np.ones((8, 16), np.float32)),
        r"odd\.weight has shape \[8, 16\], expected \[16, 8\]",
    ),
    "integers": (_with(norm__weight=np.ones(16, np.int32)), r"norm\.weight has dtype I32, expected .* float32"),
    "floats for integers": (_with(steps=np.ones(8, np.float32)), r"steps has dtype F32, expected .* int32"),
    "nan": (_with(norm__weight=NAN), r"norm\.weight holds NaN or infinity"),
    "infinity": (_with(norm__weight=INFINITY), r"norm\.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_one_clear_line_and_nothing_is_kept(tmp_path, case):
    change, message = WRONG_TENSORS[case]
    tensors = published()
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    live = len(jax.live_arrays())
    with pytest.raises(UserError, match=message) as raised:
        load_params(tmp_path, TABLE, abstract())
    line = str(raised.value)
    assert str(tmp_path) in line
    assert "\n" not in line
    del raised  # its traceback holds what was read so far
    gc.collect()
    assert len(jax.live_arrays()) <= live


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_names_of_a_single_file_checkpoint_are_told_what_to_do(tmp_path, prefix):
    save_file({f"{prefix}{name}": value for name, value in published().items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is a name of a single-file checkpoint .*`save_pretrained`") as raised:
        load_params(tmp_path, TABLE, abstract())
    assert prefix in str(raised.value) and "\n" not in str(raised.value)


def test_a_pipeline_that_is_imported_names_its_parts(tmp_path, capsys):
    for name in ("transformer", "vae"):
        (tmp_path / "pipeline" / name).mkdir(parents=True)
        (tmp_path / "pipeline" / name / "config.json").write_text("{}")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert main(["import", "--from", str(tmp_path / "pipeline"), "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "is a pipeline of diffusers; import one of its folders: transformer, vae" in said
    assert not (tmp_path / "out").exists()


def test_several_wrong_tensors_are_counted(tmp_path):
    tensors = published()
    del tensors["scale"], tensors["norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight is missing .* \(and 1 more such errors\)"):
        load_params(tmp_path, TABLE, abstract())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, BFLOAT16], ids=str)
def test_non_finite_numbers_are_found_by_their_bits(bad, dtype):
    finite = np.array([0.0, -0.0, 1.5, -3.0, np.finfo(np.float16).max, np.finfo(np.float16).min], dtype)
    assert hf_import._finite(finite)
    assert hf_import._finite(-np.abs(finite))
    assert not hf_import._finite(np.append(finite, np.array(bad, dtype)))
    assert not hf_import._finite(np.array(bad, dtype))


def test_overflow_by_the_cast_is_found_and_can_be_allowed(tmp_path):
    save_file({"w": np.array([1e6], np.float32)}, tmp_path / "model.safetensors")
    table, structs = [Entry("w", "w", SAME)], {"w": jax.ShapeDtypeStruct((1,), np.float16)}
    with pytest.raises(UserError, match="w holds NaN or infinity as float16"):
        load_params(tmp_path, table, structs)
    assert np.isinf(load_params(tmp_path, table, structs, check_finite=False)["w"])[0]


def _header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


SPAN = b'{"w": {"dtype": "%s", "shape": [%s], "data_offsets": [%s]}}'


BROKEN_FILES = {
    "empty": (b"", "not a safetensors file"),
    "text": (b"these are not weights at all", "not a safetensors file"),
    "pickle": (pickle.dumps({"w": 1}), "pickled weights .* never read; convert"),
    "zipped pickle": (b"PK\x03\x04" + b"\0" * 60, "pickled weights .* never read; convert"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "header cut": (_header(SPAN % (b"F32", b"1", b"0, 4"))[:30], "truncated, its header needs 69 bytes .* has 30"),
    "data cut": (_header(SPAN % (b"F32", b"4", b"0, 16"), bytes(15)), r"truncated, w ends at byte \d+ of \d+"),
    "span too short": (
        _header(SPAN % (b"F32", b"2", b"0, 4"), bytes(8)),
        r"w, F32 \[2\], takes 8 bytes but is given 4",
    ),
    "negative": (_header(SPAN % (b"F32", b"-1", b"4, 0"), bytes(8)), r"w, F32 \[-1\]"),
    "before the data": (_header(SPAN % (b"F32", b"1", b"-4, 0"), bytes(8)), r"w, F32 \[1\]"),
    "quantised": (_header(SPAN % (b"F8_E4M3", b"4", b"0, 4"), bytes(4)), "w has dtype F8_E4M3; expected one of F64"),
    "not json": (_header(b"{bad}", bytes(4)), "header cannot be read"),
    "a list": (_header(b"[1, 2]"), "not a safetensors file"),
    "no shape": (_header(b'{"w": {"dtype": "F32"}}'), "header cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_files_are_one_clear_line(tmp_path, case):
    data, message = BROKEN_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=message) as raised:
        Checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(raised.value)
    assert "\n" not in str(raised.value)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 99), st.integers(0, 255), st.integers(0, 140))
def test_a_damaged_header_never_fails_in_another_way(position, byte, length):
    data = bytearray(_header(SPAN % (b"F32", b"2, 3", b"0, 24"), bytes(24)))
    data[position % 78] = byte
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"metacanvas-{os.getpid()}.safetensors"
    folder.write_bytes(data[:length])
    try:
        tensors = Checkpoint(folder)
        for name, tensor in tensors.tensors.items():
            assert tensors.read(name).shape == tuple(tensor.shape)
    except UserError as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
    finally:
        folder.unlink()


def test_folders_without_readable_weights(tmp_path):
    with pytest.raises(UserError, match="absent: no such file or folder"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no safetensors here; expected model\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors here; pickled weights"):
        Checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: pickled weights"):
        Checkpoint(tmp_path / "pytorch_model.bin")
    for name in ("a", "b"):
        save_file({name: np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"cannot tell which .* among a\.safetensors, b\.safetensors"):
        Checkpoint(tmp_path)


INDICES = {
    "missing shard": ({"w": "a.safetensors", "v": "b.safetensors"}, r"names the shard b\.safetensors, which is not"),
    "wrong shard": ({"w": "a.safetensors", "v": "a.safetensors"}, r"puts v into a\.safetensors, which does not hold"),
    "outside the folder": ({"w": "../a.safetensors"}, r"names the shard \.\./a\.safetensors"),
    "no map": (None, r"model\.safetensors\.index\.json: not an index"),
}


@pytest.mark.parametrize("case", INDICES)
def test_broken_indices_are_one_clear_line(tmp_path, case):
    weight_map, message = INDICES[case]
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        save_file({"w": np.zeros(1, np.float32)}, place / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        Checkpoint(folder)
