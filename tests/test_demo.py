"""All stages of the demo at a size that learns nothing: every file of it is written, and a second call finds them."""

import json

import pytest
from miniature_support import config

from metacanvas_jax.errors import UserError
from metacanvas_jax.miniature import demo

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


def test_without_a_taught_mllm_nothing_begins(tmp_path):
    base, painter = config(tmp_path, "base", steps=2), config(tmp_path, "canvas", steps=2)
    with pytest.raises(UserError, match="no taught MLLM"):
        demo.demo(config(tmp_path, "mllm", steps=2), base, painter, tmp_path / "run")
    assert not list(tmp_path.iterdir())
