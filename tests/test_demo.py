"""All stages of the demo at a size that learns nothing: every file of it is written, and a second call finds them."""

import dataclasses
import json
import shutil

import pytest
from miniature_support import config

from metacanvas_jax.cli.main import main
from metacanvas_jax.config.read import experiment
from metacanvas_jax.errors import UserError
from metacanvas_jax.miniature import demo
from metacanvas_jax.paint import runs
from metacanvas_jax.train.parameters import without_lost_start

pytestmark = pytest.mark.miniature


def test_the_demo_runs_from_scenes_to_report_and_continues_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUESTIONS", 4)
    teacher, base, painter = (config(tmp_path, variant, steps=2) for variant in ("mllm", "base", "canvas"))
    outcome = demo.demo(teacher, base, painter, tmp_path / "run", teach=True)
    assert outcome.missed, "two steps teach nothing: the bars must be missed"
    page = outcome.report.read_text()
    assert "MetaCanvas in miniature" in page and "a red" in page and "data:image/png" in page
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores.keys() == {"seen", "held_out"}
    assert (tmp_path / "run" / "pictures.png").exists() and (tmp_path / "run" / "film.gif").exists()
    assert "data:image/gif" in page and page.index("From noise to pictures") < page.index("Prompts with a layout")
    assert page.index("Prompts with a layout") < page.index("Scores") and "without canvas" in page
    assert "2 without and 2 with a canvas" in page and painter.start == str(tmp_path / "run" / "base")
    again = demo.demo(teacher, base, painter, tmp_path / "run")
    assert again.scored.table() == outcome.scored.table()
    assert "── drawing and judging" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "base")  # as where only the run itself is carried elsewhere
    assert runs.load(tmp_path / "run").draw(["a red cat"]).pixels.shape[0] == 1
    assert main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "export")]) == 0


def test_without_a_taught_mllm_nothing_begins(tmp_path):
    base, painter = config(tmp_path, "base", steps=2), config(tmp_path, "canvas", steps=2)
    with pytest.raises(UserError, match="no taught MLLM"):
        demo.demo(config(tmp_path, "mllm", steps=2), base, painter, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_that_began_with_its_canvas_is_not_taken_for_one_with_a_base(tmp_path):
    teacher, base, painter = (config(tmp_path, variant, steps=2) for variant in ("mllm", "base", "canvas"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="began with its canvas; a new demo needs another --workdir"):
        demo.demo(teacher, base, painter, tmp_path / "run", teach=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("recorded", "start"),
    [
        ({"mllm": "2:a:b:c"}, ""),
        ({"mllm": "2:a:b:c", "start": "2:d::"}, "gone"),
        ({"mllm": "0" * 64}, "gone"),
        ({}, "gone"),
    ],
    ids=["nothing of it is frozen", "a part of it is frozen", "an older record", "no record"],
)
def test_a_lost_start_is_left_out_only_where_the_checkpoint_says_that_nothing_of_it_is_needed(
    recorded, start, tmp_path
):
    setup = dataclasses.replace(experiment(config(tmp_path, "canvas")), start=str(tmp_path / "gone"))
    assert without_lost_start(setup, recorded).start == (start and str(tmp_path / start))
