"""The MLLM that ships with the package: its files, and what it knows, on a small sample."""

import json

import jax
import numpy as np
import pytest

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.miniature.teaching import FOLDER, LARGEST, examine, shipped_exam
from metacanvas_jax.train.parameters import param_shapes, start_weights
from metacanvas_jax.weights import saved

pytestmark = pytest.mark.miniature


def test_it_is_small_described_and_of_the_networks_that_the_demo_freezes():
    assert (FOLDER / "params.safetensors").stat().st_size <= LARGEST
    assert "Apache-2.0" in (FOLDER / "README.md").read_text()
    taught = json.loads((FOLDER / "config.json").read_text())["mllm"]
    painter = json.loads(load_config("configs/miniature.py:canvas", []).to_json_best_effort())["mllm"]
    assert taught["language"] == painter["language"]
    assert taught["vision"] == painter["vision"]


def test_it_knows_on_a_small_sample_what_its_examination_says():
    setup = experiment(load_config("configs/miniature.py:mllm", [f"--config.mllm.tokenizer={FOLDER / 'tokenizer'}"]))
    params, _ = saved.load(FOLDER)
    told, now = shipped_exam(), examine(setup, jax.tree.map(lambda leaf: leaf.astype(np.float32), params), 128, seed=5)
    assert told.questions >= 1000
    told_by_states = [name for name in told.subjects if name.startswith("facts")]
    assert len(told_by_states) == 4, "of prompts; and object, colour and place of pictures"
    assert all(told.subjects[name] >= 0.99 and now.subjects[name] >= 0.99 for name in told_by_states)
    assert max(told.chances.values()) <= 0.05 and max(now.chances.values()) <= 0.08
    assert now.subjects["words"] >= told.subjects["words"] - 0.2


def test_the_canvas_of_the_demo_begins_as_the_cells_of_a_sheet():
    setup = experiment(load_config("configs/miniature.py:canvas", []))
    shapes = param_shapes(setup)
    start = start_weights(setup, {name: shapes[name] for name in ("mllm", "canvas")})
    table = np.asarray(start["mllm"]["language"]["embedding"]["table"], np.float32)
    canvas = np.asarray(start["canvas"]["tokens"]).reshape(16, -1)
    nearest = np.argmin(((canvas[:, None] - table[None]) ** 2).sum(-1), axis=1)
    assert len(set(nearest)) == 16
    np.testing.assert_array_equal(canvas, table[nearest])
