"""`metacanvas evaluate --judge` from the command line: an MLLM of this machine, and a server."""

import functools
import json
import re
from typing import ClassVar

import export_support as support
import numpy as np
import pytest
from PIL import Image
from qwen_support import tokenizer
from test_vie import said, serving

from metacanvas_jax import retries
from metacanvas_jax.cli.main import main
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.evaluate.judging import local, questions, vie
from metacanvas_jax.tasks import Bucket

pytestmark = pytest.mark.torch
QUICK = True
EDITS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run that edits, a file of edits, and a tiny Qwen2.5-VL as transformers writes it."""
    qwen = pytest.importorskip("qwen_torch_support")
    folder = tmp_path_factory.mktemp("judged")
    support.save_drawing_run(folder, "flux", Bucket("image_editing", (24, 24), length=64))
    rows = []
    for number in range(EDITS):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"given_{number}.png")
        rows.append({"prompt": f"a red cat {number}", "image": f"given_{number}.png", "edit": True})
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qwen.reference_model().save_pretrained(folder / "judge")
    tokenizer().save_pretrained(folder / "judge")
    return folder


def call(place, judge, *options):
    asked = ("--run", place / "run", "--evaluator", "prompts", "--data", place / "edits.jsonl", "--out", place / "out")
    return main([str(word) for word in ("evaluate", *asked, "--judge", judge, *options)])


def fails(capsys, *asked):
    """The only line that a call says that ends with exit code 2."""
    capsys.readouterr()
    assert call(*asked) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


class Watched(local.LocalJudge):
    """A judge of few tokens that remembers how many results it was asked about, and may be interrupted."""

    asked: ClassVar[list[int]] = []
    patience: ClassVar[int | None] = None

    def __init__(self, folder):
        super().__init__(folder, each=2, most=6, tokens=4)

    def answers(self, asked):
        if len(self.asked) == self.patience:
            raise KeyboardInterrupt
        self.asked.append(len(asked) // 2)
        return super().answers(asked)


def test_a_folder_judges_what_was_drawn_and_goes_on_where_it_was_stopped(place, monkeypatch, capsys):
    judge, path = place / "judge", place / "out.scores" / "vie.json"
    monkeypatch.setattr(local, "LocalJudge", Watched)
    monkeypatch.setattr(vie, "TOGETHER", 1)
    monkeypatch.setattr(Watched, "patience", 1)
    assert call(place, judge) == 130
    drawn = {name: (place / "out" / name).read_bytes() for name in ("00001.png", "00002.png", "00003.png")}
    first = json.loads(path.read_text())
    assert [row["file"] for row in first["results"]] == ["00001.png"] and Watched.asked == [1]

    monkeypatch.setattr(Watched, "patience", None)
    capsys.readouterr()
    assert call(place, judge) == 0
    printed = capsys.readouterr().out
    assert f"judged by {judge}, {questions.VERSION}" in printed and str(path) in printed
    assert {name: (place / "out" / name).read_bytes() for name in drawn} == drawn, "nothing is drawn again"
    kept = json.loads(path.read_text())
    assert (kept["judge"], kept["version"]) == (str(judge), questions.VERSION)
    assert [row["file"] for row in kept["results"]] == sorted(drawn) and kept["results"][:1] == first["results"]
    assert Watched.asked == [1, 1, 1], "what was judged is not asked again"
    assert call(place, judge) == 0 and len(Watched.asked) == 3

    own = Watched(str(judge))  # the raw answers are those of the judge to these pictures
    row = kept["results"][1]
    frames = [np.asarray(Image.open(place / name))[None] for name in ("given_1.png", "out/00002.png")]
    sample = Sample(row["prompt"], frames[0], task="image_editing", source=frames[0])
    asked = questions.questions(sample, frames[1], 1.0)
    assert [row["answers"][name] for name in ("consistency", "quality")] == own.answers(asked)
    assert all(isinstance(text, str) for one in kept["results"] for text in one["answers"].values())
    assert kept["counts"] == {"judged": EDITS, "unread": EDITS, "missing": 0}, "random weights write no scores"
    assert f"without a score: {EDITS} whose answers could not be read" in printed


def test_a_folder_that_is_no_judge_is_one_line_and_nothing_is_drawn(place, tmp_path, capsys):
    folder = tmp_path / "judge"
    call = functools.partial(fails, capsys, place, folder, "--out", tmp_path / "out")
    assert "config.json" in call() and str(folder) in call()
    folder.mkdir()
    assert "config.json" in call()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert re.search(r"config\.json: the model is bert, expected .*qwen2_5_vl", call())
    (folder / "config.json").write_bytes((place / "judge" / "config.json").read_bytes())
    assert "no tokenizer.json" in call()
    tokenizer().save_pretrained(folder)
    assert str(folder) in call() and "safetensors" in call()
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert "model.safetensors" in call()
    assert not (tmp_path / "out").exists()
    assert "names a model of a server" in call("--judge-model", "qwen")


def test_a_server_judges_and_is_asked_again_while_it_is_busy(place, monkeypatch, capsys):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    bodies, busy = [], [500, 503]

    def reply(body):
        if busy:
            return busy.pop(), {"error": "busy"}
        bodies.append(body)
        return (
            said(6, 9)
            if sum(part["type"] == "image_url" for part in body["messages"][0]["content"]) == 2
            else said(4, 4)
        )

    out = place / "served"
    with serving(["qwen"], reply) as url:
        assert call(place, url, "--out", out) == 0
        assert not busy and len(bodies) == 2 * EDITS
        assert call(place, url, "--out", out) == 0 and len(bodies) == 2 * EDITS
    assert re.search(r"image_editing +6\.00 +4\.00 +4\.90 +3", capsys.readouterr().out)
    for body in bodies:
        assert body.keys() == {"model", "messages", "temperature", "max_tokens"}
        assert (body["model"], body["temperature"]) == ("qwen", 0)
        (message,) = body["messages"]
        assert message["role"] == "user" and message["content"][-1]["type"] == "text"
        for part in message["content"]:
            assert part.keys() == {"type", part["type"]}
            if part["type"] == "image_url":
                assert part["image_url"]["url"].startswith("data:image/png;base64,")
    kept = json.loads((place / "served.scores" / "vie.json").read_text())
    assert kept["counts"] == {"judged": EDITS, "unread": 0, "missing": 0}
    assert {row["answers"]["consistency"] for row in kept["results"]} == {said(6, 9)}


def test_a_server_that_stays_busy_or_is_not_there_is_one_line(place, monkeypatch, capsys):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    with serving(["a", "b"], lambda body: (500, {"error": "out of memory"})) as url:
        assert "has the models a, b: name one with --judge-model" in fails(capsys, place, url)
        assert call(place, url, "--judge-model", "a", "--out", place / "busy") == 75
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(
            r"no answer in 6 tries \(the server answers 500, .*out of memory.*start the same command", last
        )
    assert "/v1/models: no answer of a server" in fails(capsys, place, url)
