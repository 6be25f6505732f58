"""Folders that version 0.1 wrote still load: runs draw the same picture and export the same tensors.

``golden/folders_0.1.tar.xz`` holds a tiny run of each backbone (random weights, one checkpoint), what
``metacanvas export`` made of it, and what ``metacanvas sample --prompt "a red cat" --seed 3`` drew with it.
"""

from pathlib import Path

import numpy as np
import pytest
from golden_support import BACKBONES, extracted
from PIL import Image
from safetensors.numpy import load_file

from metacanvas_jax.cli.main import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return extracted(tmp_path_factory.mktemp("older"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_older_run_draws_the_same_picture(folders, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    out = tmp_path / "drawn.png"
    assert main(["sample", "--run", f"{backbone}/run", "--prompt", "a red cat", "--seed", "3", "--out", str(out)]) == 0
    drawn, before = (np.asarray(Image.open(path)).astype(int) for path in (out, folders / backbone / "drawn.png"))
    assert drawn.shape == before.shape
    assert np.abs(drawn - before).max() <= 1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_older_run_exports_the_same_tensors(folders, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    assert main(["export", "--run", f"{backbone}/run", "--to", str(tmp_path / "export")]) == 0
    same_tensors(folders / backbone / "export", tmp_path / "export")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_older_export_comes_back_as_the_same_run(folders, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    assert main(["import", "--from", f"{backbone}/export", "--to", str(tmp_path / "run")]) == 0
    assert main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "export")]) == 0
    same_tensors(folders / backbone / "export", tmp_path / "export")


def same_tensors(before: Path, now: Path) -> None:
    """All that was exported is exported; what a run froze as its seed made it goes along since."""
    files, found = ({path.relative_to(top) for path in top.rglob("*.safetensors")} for top in (before, now))
    assert files <= found
    assert {file.parts[0] for file in found - files} <= {"transformer", "mllm", "text_encoder"}
    for file in sorted(files):
        old, new = load_file(before / file), load_file(now / file)
        assert old.keys() == new.keys()
        for name in old:
            np.testing.assert_array_equal(new[name], old[name], err_msg=f"{file}: {name}")
