"""Every shipped config's miniature leaves a folder that the lines of its README, and of docs/export.md, draw with."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import qwen_support
from experiments_support import FILES, variants
from export_support import QUIET, save_run, trained_leaves
from PIL import Image
from safetensors.numpy import load_file

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.data.tokenizer import save_tokenizer
from metacanvas_jax.exchange.export_run import export_run
from metacanvas_jax.paint import runs
from metacanvas_jax.trees import flat
from metacanvas_jax.weights import saved

pytestmark = pytest.mark.torch
pytest.importorskip("torch", reason="needs the [torch] extra")

DOCS = Path(__file__).parents[1] / "docs" / "export.md"
GATE = {"t2i_scratch:text_metaquery", "image_editing:canvas"}
CASES = [
    pytest.param(file, variant, marks=() if f"{file}:{variant}" in GATE else pytest.mark.slow)
    for file in FILES
    for variant in variants(file)
]


def lines(text: str, folder: Path) -> str:
    """The first block of Python of a page, for an export that lies in ``folder``."""
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len([line for line in block.splitlines() if line]) <= 5
    return block.replace("exports/demo", str(folder)).replace("THIS-FOLDER", str(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(file, variant)``: the folder of a run of a miniature as a training leaves it, with random parameters."""

    def make(file: str, variant: str) -> Path:
        folder = tmp_path_factory.mktemp(variant)
        save_tokenizer(qwen_support.tokenizer(), folder / "tokenizer")
        config = load_config(f"configs/{file}.py:{variant}.miniature", [])
        with config.ignore_type():
            config.mllm.tokenizer = str(folder / "tokenizer")
            config.vae_weights = str(folder / "vae")
            config.sampler.steps = 2
            if config.get("text") is not None:
                config.text.tokenizer = str(folder / "tokenizer")
        size, channels = 3 * config.vae.patch**2, config.vae.channels
        basis = np.linalg.qr(np.random.default_rng(0).standard_normal((size, channels)))[0].astype(np.float32)
        scale, mean = np.full(channels, 0.3, np.float32), np.zeros(size, np.float32)
        saved.save(folder / "vae", {"mean": mean, "basis": basis, "scale": scale})
        save_run(folder / "run", config, trained_leaves(config))
        return folder / "run"

    return make


@pytest.mark.parametrize(("file", "variant"), CASES)
def test_the_lines_of_the_readme_draw_with_an_export_of_every_miniature(file, variant, run, tmp_path, monkeypatch):
    folder = export_run(run(file, variant), tmp_path / "export", QUIET)
    monkeypatch.chdir(tmp_path)
    setup = experiment(load_config(f"configs/{file}.py:{variant}.miniature", []))
    pages = [(folder / "README.md").read_text(), *([] if setup.shapes[0].frames > 1 else [DOCS.read_text()])]
    for page in pages:
        exec(lines(page, folder), {})
        (drawn,) = tmp_path.glob("*.[pg][ni][gf]")
        assert np.asarray(Image.open(drawn).convert("RGB")).std() > 1, "a picture, not one colour"
        os.remove(drawn)
    index = json.loads((folder / "metacanvas.json").read_text())
    needed = [index[name] for name in ("mllm", "text", "transformer", "vae") if index[name] is not None]
    assert [part["folder"] is not None for part in needed] == [True] * len(needed)
    card = pages[0]
    assert "OpenMoji drawings: CC BY-SA 4.0" in card and "as published for" not in card, "a miniature has no bases"
    assert "None were computed" in card and f"{setup.sources[0].task}: {setup.sources[0].kind}" in card


def test_what_goes_along_is_what_the_run_paints_with(run, tmp_path):
    """Frozen networks that no folder has are made again from the seed, by `sample` and by `export` alike."""
    folder = run("t2i_scratch", "text_metaquery")
    export_run(folder, tmp_path / "export", QUIET)
    params = flat(runs.load(folder).params)
    for part, name, path in (
        ("text_encoder", "embed_tokens.weight", "text/embedding"),
        ("mllm", "model.embed_tokens.weight", "mllm/language/embedding/table"),
    ):
        tensors = load_file(tmp_path / "export" / part / "model.safetensors")
        np.testing.assert_array_equal(tensors[name], np.asarray(params[path]))
