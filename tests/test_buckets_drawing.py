"""Commands on runs in a bucket: they draw and report there as on this machine, and sweeps are gathered there."""

import io
import json

import bucket_support
import numpy as np
import pytest
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.cli.main import main
from metacanvas_jax.paint import requests


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return bucket_support.golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def stored(bucket_address, golden):
    return bucket_support.stored(bucket_address, golden)


def pixels(place) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(files.read_bytes(place)))).astype(int)


def test_a_run_in_a_bucket_draws_into_it_what_it_draws_here(stored, golden, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = f"{stored.url}/sana/run"
    command = ["sample", "--run", run, "--prompt", "a red cat", "--seed", "3"]
    assert main([*command, "--out", f"{bucket.url}/drawn.png"]) == 0
    assert capsys.readouterr().out.strip() == f"{bucket.url}/drawn.png"
    assert np.abs(pixels(f"{bucket.url}/drawn.png") - pixels(golden / "sana" / "drawn.png")).max() <= 1
    assert main([*command, "--out", f"{bucket.url}/drawn.jpg"]) == 2
    assert "expected a .png file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "no folder gs: of this machine"


def test_pictures_that_a_command_shows_are_read_from_a_bucket(golden, bucket):
    files.upload(golden / "sana" / "drawn.png", f"{bucket.url}/cat.png")
    np.testing.assert_array_equal(requests.read_image(f"{bucket.url}/cat.png"), pixels(golden / "sana" / "drawn.png"))


def test_the_default_place_of_a_drawing_is_beside_its_run_and_new(bucket):
    import argparse

    from metacanvas_jax.cli import drawing

    asked = argparse.Namespace(run=f"{bucket.url}/run", out=None)
    for name in ("a_red_cat.png", "a_red_cat-2.png", "a_red_cat-3.png"):
        place = drawing.place(asked, "a red cat!", video=False)
        assert str(place) == f"{bucket.url}/run/samples/{name}"
        files.write(place, b"a picture")
    asked.run = None
    assert str(drawing.place(asked, "a red cat!", video=False)) == "samples/a_red_cat.png"


def test_a_report_of_a_run_in_a_bucket_lies_beside_it(stored, bucket):
    run = f"{bucket.url}/run"
    files.write(files.folder(f"{run}/metrics.jsonl"), '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    files.write(files.folder(f"{run}/config.json"), '{"name": "from a bucket"}')
    data = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data, "PNG")
    files.write(files.folder(f"{run}/previews/00000002_text_to_image.png"), data.getvalue())
    assert main(["report", "--run", run]) == 0
    page = files.read_text(f"{run}/report.html")
    assert "from a bucket" in page and "text to image, step 2" in page


def test_a_sweep_in_a_bucket_is_gathered_into_it(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.py").write_text("def sweep(add):\n    add('a')\n    add('b', **{'train.steps': 3})\n")
    for name, loss in (("a", 2.0), ("b", 1.5)):
        rows = "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in (1, 2))
        files.write(files.folder(f"{bucket.url}/sweeps/some/{name}/metrics.jsonl"), rows)
    command = ["sweep", "--config", "configs/t2i_scratch.py:miniature", "--sweep", "some.py", "--collect"]
    assert main([*command, "--workdir", f"{bucket.url}/sweeps/some"]) == 0
    table = files.read_text(f"{bucket.url}/sweeps/some/sweep.csv")
    assert "b,configs/t2i_scratch.py:miniature" in table and "1.5" in table
    files.remove(f"{bucket.url}/sweeps/some/sweep.csv")
    assert main([*command, f"--config.paths.runs={bucket.url}"]) == 0, "as its runs are moved, so is the sweep"
    assert files.read_text(f"{bucket.url}/sweeps/some/sweep.csv") == table
    assert [path.name for path in tmp_path.iterdir()] == ["some.py"]
