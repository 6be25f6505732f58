"""What commands write and say where their folders are in a bucket."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.cli.main import main
from metacanvas_jax.evaluate import geneval, scenes
from metacanvas_jax.evaluate.benchmarks.runner import BENCHMARKS, official
from metacanvas_jax.miniature import demo


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """No command makes a folder `gs:` of this machine."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def size(place) -> tuple[int, int]:
    """Columns and rows of a picture in the bucket."""
    return Image.open(io.BytesIO(files.read_bytes(place))).size


def test_results_of_geneval_are_written_into_a_bucket(bucket):
    result = {"filename": "00000/samples/0000.png", "metadata": '{"tag": "colors"}', "correct": True}
    scores = geneval.Scores({"colors": 1.0}, {"colors": 1}, 1.0, 1.0, None)
    picture = np.full((4, 6, 3), 0.5)
    geneval.write_results(f"{bucket.url}/results", [picture], geneval.Evaluation(scores, (result,)))
    names = ("00000/metadata.jsonl", "00000/samples/0000.png", "results.jsonl", "scores.json")
    assert set(files.listing(f"{bucket.url}/results", deep=True)) == set(names)
    assert size(f"{bucket.url}/results/{names[1]}") == (6, 4)
    assert files.read_json(f"{bucket.url}/results/scores.json")["overall"] == 1.0


def test_the_official_scripts_score_copies_of_what_lies_in_a_bucket(bucket, tmp_path):
    made = BENCHMARKS["gedit"].command
    here = official("gedit", tmp_path / "tree", f"{tmp_path}/GEdit-Bench")
    assert here == made(tmp_path / "tree", f"{tmp_path}/GEdit-Bench", tmp_path / "tree.scores")
    near = made(Path("tree"), "bench", Path("tree.scores"))
    copies = [f"gcloud storage cp -r {bucket.url}/{name} ." for name in ("results/tree", "bench")]
    back = f"gcloud storage cp -r tree.scores {bucket.url}/results/"
    words = official("gedit", files.folder(f"{bucket.url}/results/tree"), f"{bucket.url}/bench")
    assert words == " && ".join([*copies, "mkdir -p tree.scores", near, back])


def test_the_demo_says_where_its_report_is_in_a_bucket(bucket, monkeypatch, capsys):
    scored = scenes.Scored({}, {})
    monkeypatch.setattr(scenes.Scored, "table", lambda self: "")
    monkeypatch.setattr(demo, "demo", lambda *_, **__: demo.Outcome(files.folder(f"{bucket.url}/r.html"), scored, ()))
    assert main(["demo", "--workdir", bucket.url]) == 0
    assert capsys.readouterr().out.endswith(f"report: {bucket.url}/r.html\n")
