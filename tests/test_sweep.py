"""Sweeps: what their points are, in which order they run, and the table they end in."""

import csv
import json
import types
from pathlib import Path

import pytest

from metacanvas_jax import sweeps
from metacanvas_jax.build import experiment
from metacanvas_jax.cli.main import main
from metacanvas_jax.cli.options import ROOT, load_config
from metacanvas_jax.errors import UserError

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
    ],
)
def test_a_wrong_sweep_file_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        sweeps.read(write(tmp_path, text), "configs/t2i_scratch.py")
    with pytest.raises(UserError, match="no sweep file"):
        sweeps.read(tmp_path / "none.py", "configs/t2i_scratch.py")


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


def test_each_point_becomes_a_tpu_slice_of_its_own():
    jobs = sweeps.tpu_jobs(POINTS, "configs/sweeps/some.py", ["--config.seed=1"])
    variables, scripts = jobs[2]
    assert variables["NAME"] == "some-late" and variables["CONFIG"] == "c.py"
    assert variables["OVERRIDES"] == "--config.a.b=1.5 --config.seed=1"
    assert scripts == ["tpu_scripts/create.sh", "tpu_scripts/setup.sh", "tpu_scripts/launch.sh"]
    assert len({job[0]["NAME"] for job in jobs}) == 3
    assert "OVERRIDES='--config.a.b=1.5 --config.seed=1'" in sweeps.shell(variables, scripts)


def logs(folder: Path, name: str, losses: list[float], **last: float) -> None:
    (folder / name).mkdir()
    rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    rows.append({"step": len(losses), **last})
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_collecting_makes_a_table_and_a_page(tmp_path):
    logs(tmp_path, "good", [3.0] * 18 + [1.0, 2.0], score=0.25)
    logs(tmp_path, "late", [5.0])
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
