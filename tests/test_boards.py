"""Where a training is shown: TensorBoard, Weights & Biases, and what happens when one of them fails."""

import struct
import sys
import time
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from metacanvas_jax.data.samples import Sample
from metacanvas_jax.paint.previews import LINE, side_by_side
from metacanvas_jax.report import pictures
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train.boards import Guarded, grouped
from metacanvas_jax.train.log import Log
from metacanvas_jax.train.metrics import read_metrics
from metacanvas_jax.train.tensorboard import TensorBoard
from metacanvas_jax.train.weights_and_biases import WeightsAndBiases

ROW = {"loss": 0.5, "finite": 1.0, "mfu": 0.3, "flow_loss/text_to_image": 0.2}
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def events(folder):
    """What TensorBoard reads: records of a length, its checksum, the event, its checksum."""
    for path in sorted((folder / "tensorboard").iterdir()):
        blob, at = path.read_bytes(), 0
        while at < len(blob):
            (size,) = struct.unpack_from("<Q", blob, at)
            yield Event.FromString(blob[at + 12 : at + 12 + size])
            at += 16 + size


def values(folder):
    return [(event.step, value) for event in events(folder) for value in event.summary.value]


def log(folder, boards, done=0):
    return Log(folder, done, 9, 1, progress=False, boards=boards)


def test_tensorboard_shows_groups_pictures_and_texts(tmp_path):
    def board(folder, done):
        return TensorBoard(folder, done, texts={"config": "a: 1"})

    with log(tmp_path, {"TensorBoard": board}) as running:
        running.write(1, ROW | {"previews/edit": PICTURE})
    found = {value.tag: (step, value) for step, value in values(tmp_path)}
    assert list(found) == ["config/text_summary", "loss/loss", "speed/mfu", "flow_loss/text_to_image", "previews/edit"]
    assert found["loss/loss"][0] == 1 and found["loss/loss"][1].simple_value == 0.5
    assert "a: 1" in found["config/text_summary"][1].tensor.string_val[0].decode()
    assert (found["previews/edit"][1].image.height, found["previews/edit"][1].image.width) == (4, 6)
    assert found["previews/edit"][1].image.encoded_image_string == pictures.png(PICTURE)
    assert read_metrics(tmp_path) == [{"step": 1, **ROW}], "metrics.jsonl keeps its names, and has no pictures"


def test_tensorboard_hides_what_came_after_the_step_of_a_new_start(tmp_path):
    for done in (0, 3):
        board = TensorBoard(tmp_path, done)
        board.write(done + 1, {"loss": 1.0}, {})
        board.close()
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 4]


def broken(*, at):
    """A board that fails at one call, and counts those that come after it."""

    def make(*_):
        calls = []

        def call(name):
            def method(*_):
                calls.append(name)
                assert calls.count(at) < 2, "a board that failed is asked again"
                if name == at:
                    raise OSError(28, "No space left on device")

            return method

        if at == "make":
            raise RuntimeError("no network\nand more lines")
        return types.SimpleNamespace(**{name: call(name) for name in ("write", "flush", "close")})

    return make


@pytest.mark.parametrize("at", ["make", "write", "flush", "close"])
def test_a_board_that_fails_is_one_warning_and_the_training_goes_on(at, tmp_path, capsys):
    with log(tmp_path, {"Broken": broken(at=at), "TensorBoard": TensorBoard}) as running:
        for step in (1, 2):
            running.write(step, ROW)
            running.flush()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: Broken shows nothing more of this run: ")
    assert line.endswith("no network" if at == "make" else "No space left on device")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert [step for step, value in values(tmp_path) if value.tag == "loss/loss"] == [1, 2]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("learning_rate", "optimizer/learning_rate"),
        ("memory_gib", "memory/memory_gib"),
        ("mse_loss", "loss/mse_loss"),
        ("val_loss_no_canvas", "loss/val_loss_no_canvas"),
        ("scenes_score", "score/scenes_score"),
        ("error", "other/error"),
        ("score/seen", "score/seen"),
    ],
)
def test_every_metric_has_a_group(name, shown):
    assert grouped(name) == shown


def test_boards_show_no_curve_of_what_never_changes(tmp_path):
    board = Guarded("TensorBoard", lambda: TensorBoard(tmp_path), print)
    for step, skipped in ((1, 0.0), (2, 0.0), (3, 1.0)):
        board.write(step, {"loss": 1.0, "finite": 1.0, "skipped": skipped}, {})
    board.close()
    tags = [(step, value.tag) for step, value in values(tmp_path) if value.tag != "loss/loss"]
    assert tags == [(3, "optimizer/skipped")]


def fake_wandb(runs):
    """The part of wandb that is used, which keeps what it gets."""

    def init(**given):
        run = types.SimpleNamespace(id=given["id"], given=given, rows=[], finished=False)
        run.define_metric = lambda name, step_metric: setattr(run, "axis", step_metric)
        run.log = run.rows.append
        run.finish = lambda: setattr(run, "finished", True)
        runs.append(run)
        return run

    return types.SimpleNamespace(init=init, Image=lambda picture: ("image", picture.shape), Settings=dict)


def test_weights_and_biases_gets_the_run_and_continues_it(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(runs))

    def board(folder, done):
        return WeightsAndBiases(folder, done, project="mine", name="tiny", config={"a": 1})

    for done in (0, 1):
        with log(tmp_path, {"Weights & Biases": board}, done) as running:
            running.write(done + 1, ROW | {"previews/edit": PICTURE})
    first, second = runs
    assert first.given["project"] == "mine" and first.given["config"] == {"a": 1} and first.given["dir"] == tmp_path
    assert first.id == second.id and second.given["resume"] == "allow"
    assert first.axis == "step" and first.finished and second.finished
    expected = {"loss/loss": 0.5, "speed/mfu": 0.3, "flow_loss/text_to_image": 0.2}
    assert first.rows == [expected | {"previews/edit": ("image", (4, 6, 3)), "step": 1}]


def test_weights_and_biases_offline_writes_into_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the [wandb] extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = WeightsAndBiases(tmp_path, project="mine", name="tiny", config={"a": 1})
    board.write(1, ROW, {"previews/edit": PICTURE})
    board.close()
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    (stored,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    for _ in range(100):  # a process of its own writes the file, on a busy machine a little after `finish`
        blob = stored.read_bytes()
        if b"mine" in blob and b"previews/edit" in blob:
            break
        time.sleep(0.2)
    assert b"flow_loss/text_to_image" in blob and b"previews/edit" in blob and b"mine" in blob
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/**/*.png"))


def test_previews_name_their_columns():
    video = np.zeros((3, 4, 6, 3), np.uint8)
    sample = Sample("a cat", target=video + 10, source=video)
    strips, headings = side_by_side([sample], video[None] + 20, Bucket("video_editing", (16, 16), 5))
    assert headings == [("source", 19), ("target", 19), ("drawn", 18)]
    shades = [int(strips[0][0, x, 0]) for x in (0, 18, 19, 37, 38)]
    assert strips[0].shape == (4, 56, 3) and shades == [0, LINE, 10, LINE, 20], "a line between the parts"
    plain, named = (pictures.grid(strips, ["a cat"], 1, headings=given) for given in ([], headings))
    band = named.shape[0] - plain.shape[0]
    assert band > 0 and (named[band + 8 :] == plain[8:]).all(), "the pictures only move down"
    thirds = np.array_split(named[8 : band + 8, 11:-11], 3, axis=1)
    assert all((third < 128).any() for third in thirds), "a name stands above each part"
