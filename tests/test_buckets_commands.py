"""Every command that writes what people look at, with all of its folders in a bucket."""

import io
import json
from pathlib import Path

import bucket_support
import miniature_support
import numpy as np
import pytest
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.cli.main import main
from metacanvas_jax.evaluate import geneval, scenes
from metacanvas_jax.evaluate.benchmarks.runner import BENCHMARKS, official
from metacanvas_jax.miniature import demo, teaching


@pytest.fixture(scope="module")
def stored(bucket_address, tmp_path_factory):
    golden = bucket_support.golden(tmp_path_factory.mktemp("golden"))
    return bucket_support.stored(bucket_address, golden, "sana", "flux")


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
    here = official("gedit", tmp_path / "tree", "GEdit-Bench")
    assert here == made(tmp_path / "tree", str(tmp_path / "GEdit-Bench"), tmp_path / "tree.scores")
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


@pytest.mark.slow
def test_a_picture_of_a_bucket_is_edited_into_it(stored, bucket):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(data, "PNG")
    files.write(files.folder(f"{bucket.url}/cat.png"), data.getvalue())
    words = ["edit", "--run", f"{stored.url}/flux/run", "--image", f"{bucket.url}/cat.png", "--steps", "1"]
    assert main([*words, "--prompt", "a blue cat", "--out", f"{bucket.url}/blue.png"]) == 0
    columns, rows = size(f"{bucket.url}/blue.png")
    assert columns > rows


@pytest.mark.slow
def test_maps_of_the_canvas_are_drawn_into_a_bucket(stored, bucket, capsys):
    words = ["maps", "--run", f"{stored.url}/sana/run", "--prompt", "a red cat", "--steps", "2"]
    assert main([*words, "--out", f"{bucket.url}/maps.png"]) == 0
    assert capsys.readouterr().out.strip() == f"{bucket.url}/maps.png" and size(f"{bucket.url}/maps.png")[0] > 100


@pytest.mark.slow
def test_prompts_and_benchmarks_of_a_bucket_are_drawn_and_collected_there(stored, bucket, capsys):
    files.write(files.folder(f"{bucket.url}/prompts.txt"), "a red cat\ntwo blue cars\n")
    run = ["evaluate", "--run", f"{stored.url}/sana/run"]
    words = ["--evaluator", "prompts", "--data", f"{bucket.url}/prompts.txt", "--out", f"{bucket.url}/drawn"]
    assert main([*run, *words]) == 0
    drawn = files.listing(f"{bucket.url}/drawn")
    assert {"recipe.json", "prompts.jsonl", "sheet.png"} < drawn.keys() and len(drawn) == 5
    capsys.readouterr()
    assert main([*run, *words]) == 0 and "0 of them drawn now" in capsys.readouterr().out
    words = ["--benchmark", "geneval", "--limit", "1", "--out", f"{bucket.url}/results/geneval"]
    assert main([*run, *words]) == 0
    tree = files.listing(f"{bucket.url}/results/geneval", deep=True)
    assert len(tree) == 5 and "00000/samples/00003.png" in tree
    capsys.readouterr()
    assert main(["evaluate", "--collect", f"{bucket.url}/results", "--out", f"{bucket.url}/table.md"]) == 0
    assert files.read_text(f"{bucket.url}/table.md") == capsys.readouterr().out
    assert "| GenEval | geneval |" in files.read_text(f"{bucket.url}/table.md")


@pytest.mark.slow
@pytest.mark.miniature
def test_an_mllm_is_taught_in_a_bucket_in_place_of_an_older_one(bucket, capsys):
    name, options = miniature_support.arguments(f"{bucket.url}/small", "mllm", 2)
    files.write(files.folder(f"{bucket.url}/taught/tokenizer/tokenizer.json"), "older")
    words = ["teach", "--config", name, *options, "--workdir", f"{bucket.url}/small/mllm", "--questions", "4"]
    assert main([*words, "--out", f"{bucket.url}/taught"]) == 2
    assert "taught, but missed its bars" in capsys.readouterr().err
    assert teaching.shipped_exam(files.folder(f"{bucket.url}/taught")).questions == 4
    taught, used = (f"{bucket.url}/{place}/tokenizer.json" for place in ("taught/tokenizer", "small/tokenizer"))
    assert json.loads(files.read_text(taught))["model"] == json.loads(files.read_text(used))["model"]


@pytest.mark.slow
@pytest.mark.miniature
def test_the_demo_runs_in_a_bucket_and_its_run_is_reported_there(bucket, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUESTIONS", 4)
    teacher, painter = (miniature_support.config(f"{bucket.url}/small", name, 2) for name in ("mllm", "canvas"))
    outcome = demo.demo(teacher, painter, files.folder(f"{bucket.url}/run"), teach=True)
    there = files.listing(f"{bucket.url}/run")
    assert {"report.html", "scores.json", "pictures.png", "timings.json", "metrics.jsonl"} <= there.keys()
    assert outcome.missed and "MetaCanvas in miniature" in files.read_text(outcome.report)
    capsys.readouterr()
    assert main(["report", "--run", f"{bucket.url}/run", "--draw", "--out", f"{bucket.url}/page.html"]) == 0
    assert capsys.readouterr().out.strip() == f"{bucket.url}/page.html"
    assert "without canvas" in files.read_text(f"{bucket.url}/page.html")
