"""Sweeps: what their points are, in which order they run, and the table they end in."""

import csv
import json
import types
from pathlib import Path

import pytest

from metacanvas_jax import files
from metacanvas_jax.cli.main import main
from metacanvas_jax.config.load import ROOT, load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch import sweeps

CONFIGS = {
    "connector": "connector_ablation",
    "conditioning": "t2i_scratch",
    "adapters": "t2i_lora",
    "keyframes": "video_stage3",
    "positions": "t2i_lora",
    "learning_rate": "image_editing",
}


def test_every_shipped_sweep_is_tested_here():
    assert {path.stem for path in (ROOT / "configs" / "sweeps").glob("*.py")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_points_of_shipped_sweeps_are_different_experiments_large_and_small(name):
    for words in ("", ":miniature"):
        points = sweeps.read(ROOT / "configs" / "sweeps" / f"{name}.py", f"configs/{CONFIGS[name]}.py{words}")
        built = [experiment(load_config(point.config, point.overrides)) for point in points]
        assert all(a != b for i, a in enumerate(built) for b in built[:i])
        assert all(e.name.endswith("_miniature") == bool(words) for e in built)


def write(folder: Path, text: str) -> Path:
    path = folder / "some.py"
    path.write_text(text)
    return path


def test_points_carry_variant_and_values(tmp_path):
    path = write(tmp_path, "def sweep(add):\n    add('a', 'text')\n    add('b', **{'train.steps': 3})\n")
    a, b = sweeps.read(path, "configs/t2i_scratch.py:miniature")
    assert a == sweeps.Point("a", "configs/t2i_scratch.py:text.miniature")
    assert b == sweeps.Point("b", "configs/t2i_scratch.py:miniature", (("train.steps", 3),))
    expected = "metacanvas train --config configs/t2i_scratch.py:miniature --workdir w/b --config.train.steps=3 --x"
    assert sweeps.train_command(b, Path("w"), ["--x"]) == expected.split()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function sweep"),
        ("def sweep(add):\n    pass\n", "adds no point"),
        ("def sweep(add):\n    add('a')\n    add('a')\n", "two points are named 'a'"),
        ("def sweep(add):\n    add('../a')\n", "needs a name that can be a folder's"),
        ("def sweep(add):\n    add(3)\n", "the point 3 has the variant '', expected two strings"),
        ("sweep = 3\n", "has no function sweep"),
        ("def sweep(add):\n    add('a')\n    1 / 0\n", r"some\.py, line 3: ZeroDivisionError: division by zero"),
        ("def sweep(add):\n    add()\n", r"some\.py, line 2: TypeError: .*missing 1 required"),
        ("import nowhere\n", r"some\.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def sweep(:\n", r"some\.py, line 1: .*invalid syntax"),
        ("raise SystemExit(3)\n", r"some\.py, line 1: SystemExit: 3"),
    ],
)
def test_a_wrong_sweep_file_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        sweeps.read(write(tmp_path, text), "configs/t2i_scratch.py")
    with pytest.raises(UserError, match="no sweep file"):
        sweeps.read(tmp_path / "none.py", "configs/t2i_scratch.py")


def test_a_sweep_that_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(sweeps.read("configs/sweeps/connector.py", "configs/connector_ablation.py")) == 6


POINTS = [sweeps.Point("good", "c.py"), sweeps.Point("bad", "c.py:x"), sweeps.Point("late", "c.py", (("a.b", 1.5),))]


def test_a_failing_point_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    called = []

    def fake(command, check):
        called.append(command[command.index("train") :])
        return types.SimpleNamespace(returncode=2 if "c.py:x" in command else 0)

    monkeypatch.setattr(sweeps.subprocess, "run", fake)
    with pytest.raises(UserError, match="1 of 3 points failed: bad"):
        sweeps.run(POINTS, tmp_path)
    assert [call[2] for call in called] == ["c.py", "c.py:x", "c.py"]
    assert called[2][-1] == "--config.a.b=1.5"
    assert "[3/3] late" in capsys.readouterr().out


def logs(folder: Path, name: str, losses: list[float], **last: float) -> None:
    (folder / name).mkdir()
    rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    rows.append({"step": len(losses), **last})
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_collecting_makes_a_table_and_a_page(tmp_path):
    logs(tmp_path, "good", [3.0] * 18 + [1.0, 2.0], score=0.25)
    logs(tmp_path, "late", [None, 5.0])  # a loss that was not finite is null
    with (tmp_path / "late" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (tmp_path / "late" / "scores.json").write_text(json.dumps({"seen": {"overall": 0.5}}))
    written = sweeps.write("some", POINTS, tmp_path)
    assert [path.name for path in written] == ["sweep.csv", "sweep.md", "sweep.html"]
    rows = list(csv.DictReader(written[0].read_text().splitlines()))
    assert [row["name"] for row in rows] == ["good", "bad", "late"]
    assert (rows[0]["steps"], rows[0]["loss"], rows[0]["score"]) == ("20", "1.5", "0.25")
    assert (rows[1]["steps"], rows[1]["loss"]) == ("0", "")
    assert (rows[2]["a.b"], rows[2]["overall_seen"]) == ("1.5", "0.5")
    assert written[1].read_text().splitlines()[2].startswith("| good | c.py | 20 | 1.5 | 0.25 |")
    page = written[2].read_text()
    assert page.count("<svg") == 2 and "good" in page and "0.25" in page
    assert (
        "Training loss" in page and "2 of 3 points have begun" in page and ">a.b<" in page and ">overall seen<" in page
    )


def test_points_of_a_large_sweep_can_be_told_apart(tmp_path):
    points = [sweeps.Point(f"p{number}", "c.py") for number in range(8)]
    for number, point in enumerate(points):
        logs(tmp_path, point.name, [3.0, 2.0 + number], val_loss=1.0 + number)
    page = sweeps.as_page("some", points, sweeps.collect(points, tmp_path), tmp_path)
    assert page.count("<svg") == 4 and page.count(">Validation loss<") == 2, "six lines to a chart"
    assert [page.count(f">{point.name}</span>") for point in points] == [2] * 8, "each named in each legend"


def test_own_samples_are_those_of_every_point(capsys):
    call = ["sweep", "--config", "configs/t2i_scratch.py:miniature", "--sweep", "configs/sweeps/conditioning.py"]
    assert main([*call, "--data", "my pictures", "--print"]) == 0
    assert all(line.endswith("--data 'my pictures'") for line in capsys.readouterr().out.splitlines())
    assert main([*call, "--data", "my_pictures", "--launch", "--dry-run"]) == 2
    assert "--data goes with runs on this machine" in capsys.readouterr().err


def test_a_run_that_ended_with_an_error_is_listed_with_it(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / sweeps.ERROR).write_text("mllm.weights: no such folder\n")
    rows = sweeps.collect(POINTS, tmp_path)
    assert rows[1]["error"] == "mllm.weights: no such folder" and "error" not in rows[0]
    assert "no such folder" in sweeps.as_page("some", POINTS, rows, tmp_path)


def test_collecting_nothing_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no run of this sweep"):
        sweeps.collect(POINTS, tmp_path)


def test_the_command_prints_what_it_would_run(capsys, tmp_path):
    call = ["sweep", "--config", "configs/t2i_scratch.py:miniature", "--sweep", "configs/sweeps/conditioning.py"]
    assert main([*call, "--workdir", "w", "--print", "--config.train.steps=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    expected = "metacanvas train --config configs/t2i_scratch.py:text.miniature --workdir w/text --config.train.steps=2"
    assert lines[2] == expected
    assert main([*call, "--print", "--config.train.stepz=2"]) == 2
    assert "stepz" in capsys.readouterr().err


def test_runs_in_a_bucket_are_collected_there(bucket):
    folder = files.folder(f"{bucket.url}/run")
    files.write(folder / "late" / "metrics.jsonl", '{"step": 1, "loss": 5.0}\n')
    written = sweeps.write("some", POINTS, folder)
    assert str(written[0]) == f"{bucket.url}/run/sweep.csv" and "late,c.py,1,1.5,5.0" in written[0].read_text()
