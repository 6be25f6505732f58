"""What a user does with a run whose folder lies in a bucket: train, edit, look at canvas maps, score, report; and the
demo and the teaching of its MLLM. Everything is read from the bucket and written into it, nothing beside it.
"""

import io
import json
import os

import bucket_support
import numpy as np
import pytest
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.cli.main import main
from metacanvas_jax.miniature import demo
from metacanvas_jax.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.miniature]
SHORT = ["--config.train.steps=2", "--config.train.batch=8", "--config.train.checkpoint_every=2"]
SCENES = [*SHORT, "--config.data.count=64", "--config.train.log_every=1"]
SCENES += ["--config.optimizer.total_steps=2", "--config.optimizer.warmup_steps=1"]
TWO_STEPS = ["--steps", "2", "--guidance", "1"]


def png(rng) -> bytes:
    """A picture of one colour with noise, from which the miniature's autoencoder can be made."""
    data = io.BytesIO()
    pixels = rng.integers(0, 200, 3) + rng.integers(0, 50, (48, 64, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def picture(place) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(files.read_bytes(place))))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder of this machine, which is empty after each test: nothing is written beside the bucket."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def place(bucket_address):
    return bucket_support.Bucket(bucket_address, f"gs://bucket/journeys-{os.getpid()}")


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """Two steps of own edits that lie in the bucket."""
    rng, lines = np.random.default_rng(0), []
    for number in range(10):
        for name in ("before", "after"):
            files.write(files.folder(f"{place.url}/edits/{name}{number}.png"), png(rng))
        lines.append({"source": f"before{number}.png", "target": f"after{number}.png", "prompt": "another colour"})
    table = "".join(json.dumps(line) + "\n" for line in lines)
    files.write(files.folder(f"{place.url}/edits/metadata.jsonl"), table)
    folder = f"{place.url}/run"
    train = ["train", "--config", "configs/image_editing.py:miniature", "--data", f"{place.url}/edits"]
    assert main([*train, "--workdir", folder, *SHORT, "--config.train.preview_every=2"]) == 0
    return folder


def test_own_edits_train_in_a_bucket(run):
    there = files.listing(run, deep=True)
    assert {"config.json", "metrics.jsonl", "report.html", "previews/00000002_image_editing.png"} < there.keys()
    assert [row["step"] for row in read_metrics(run) if "loss" in row][-1] == 2
    assert any(name.startswith("checkpoints/2/") for name in there)
    assert "prepared/vae/params.safetensors" in there and "prepared/tokenizer/tokenizer.json" in there


def test_a_picture_in_a_bucket_is_edited_beside_the_run(run, place, capsys):
    edit = ["edit", "--run", run, "--image", f"{place.url}/edits/before3.png", "--prompt", "another colour"]
    assert main([*edit, *TWO_STEPS]) == 0
    (name,) = capsys.readouterr().out.split()
    assert name == f"{run}/samples/another_colour.png"
    assert picture(name).shape == (48, 72, 3), "of about the shape of the source"
    assert main([*edit, *TWO_STEPS, "--seed", "1"]) == 0
    (other,) = capsys.readouterr().out.split()
    assert other == f"{run}/samples/another_colour-2.png" and (picture(other) != picture(name)).any()
    assert main([*edit[:4], f"{place.url}/edits/none.png", *edit[5:]]) == 2
    assert f"{place.url}/edits/none.png" in capsys.readouterr().err


def test_canvas_maps_of_an_edit_lie_in_the_run(run, place, capsys):
    show = ["maps", "--run", run, "--edit", "--image", f"{place.url}/edits/before3.png", "--prompt", "another colour"]
    assert main([*show, *TWO_STEPS]) == 0
    assert capsys.readouterr().out.strip() == f"{run}/maps.png"
    height, width, _ = picture(f"{run}/maps.png").shape
    assert width > 1.5 * height, "the picture and its map"


def test_scores_lie_in_the_run(run, capsys):
    assert main(["evaluate", "--run", run, "--evaluator", "flow_loss"]) == 0
    assert capsys.readouterr().out.split()[-2:] == [f"{run}/scores.json", f"{run}/scores_image_editing.png"]
    scores = files.read_json(f"{run}/scores.json")
    assert scores["samples"] == {"image_editing": 1} and scores["bare"] is not None
    height, width, _ = picture(f"{run}/scores_image_editing.png").shape
    assert width > 1.5 * height, "target, drawing and drawing without canvas beside each other"


def test_a_report_draws_with_the_weights_of_the_bucket(run, capsys):
    assert main(["report", "--run", run, "--draw"]) == 0
    assert capsys.readouterr().out.strip() == f"{run}/report.html"
    page = files.read_text(f"{run}/report.html")
    assert "without canvas: another colour" in page and "image editing, step 2" in page


def test_an_mllm_is_taught_in_a_bucket(bucket, capsys):
    taught, places = f"{bucket.url}/taught", [f"--config.data.path={bucket.url}/scenes"]
    places += [f"--config.mllm.tokenizer={bucket.url}/tokenizer"]
    teach = ["teach", "--workdir", f"{bucket.url}/run", "--out", taught, "--questions", "96"]
    assert main([*teach, *places, *SCENES]) == 2, "two steps teach nothing"
    shown = capsys.readouterr()
    assert "taught, but missed its bars" in shown.err and "words" in shown.out
    there = files.listing(taught, deep=True)
    assert {"params.json", "params.safetensors", "exam.json", "README.md", "tokenizer/tokenizer.json"} < there.keys()
    assert files.read_json(f"{taught}/exam.json")["questions"] == 96


def test_the_demo_runs_in_a_bucket(bucket, capsys, monkeypatch):
    monkeypatch.setattr(demo, "QUESTIONS", 4)
    places = [f"--config.data.path={bucket.url}/scenes", f"--config.vae_weights={bucket.url}/vae"]
    few = ["--config.eval.per_category=1", "--config.eval.per_category_held_out=1", "--config.eval.batch=8"]
    few += ["--config.sampler.steps=2", "--config.train.preview_every=0", "--config.train.evaluate_every=0"]
    assert main(["demo", "--workdir", f"{bucket.url}/demo", *places, *SCENES, *few]) == 2, "two steps teach nothing"
    shown = capsys.readouterr()
    assert "the demo ran, but missed its bars" in shown.err and f"report: {bucket.url}/demo/report.html" in shown.out
    there = files.listing(f"{bucket.url}/demo", deep=True)
    assert {"report.html", "scores.json", "timings.json", "pictures.png", "metrics.jsonl"} < there.keys()
    assert "MetaCanvas in miniature" in files.read_text(f"{bucket.url}/demo/report.html")
