"""Files of a run: whole or absent, in a bucket as in a folder, and one line when they cannot be written."""

import dataclasses
import json
import os
import re
from pathlib import Path

import faults_support as processes
import jax
import pytest
import train_support as support

from metacanvas_jax import files
from metacanvas_jax.config.load import read_config, write_config
from metacanvas_jax.errors import UserError
from metacanvas_jax.train.job import FitConfig
from metacanvas_jax.train.loop import fit
from metacanvas_jax.train.metrics import Writer, read_metrics, read_scores
from metacanvas_jax.train.store import Store
from metacanvas_jax.train.tensorboard import TensorBoard

pytestmark = pytest.mark.faults


@pytest.fixture
def run(bucket):
    """The folder of a run in a bucket."""
    return files.folder(f"{bucket.url}/run")


def test_files_in_a_bucket(run, bucket):
    assert not files.is_local(run)
    assert str(run / "config.json") == f"{bucket.url}/run/config.json"
    files.write(run / "deep" / "file", b"one")
    files.write(run / "deep" / "file", "two")
    assert (run / "deep" / "file").read_text() == "two"


def test_config_and_records_of_a_run_in_a_bucket(run):
    from ml_collections import ConfigDict

    write_config(ConfigDict({"a": {"b": 1}}), run)
    assert read_config(run).a.b == 1
    writer = Writer(run)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1 / step})
        writer.flush()
    writer.write(4, {"loss": 0.25})  # never flushed, as by a process that was killed
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    again = Writer(run, resume=2)
    again.write(3, {"loss": 7.0})
    again.close()
    assert read_metrics(run) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 7.0}]
    board = TensorBoard(run)
    board.write(1, {"loss": 1.0}, {})
    board.close()
    assert [len(path.read_bytes()) > 100 for path in (run / "tensorboard").iterdir()] == [True]
    writer.close()


def test_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    files.write(tmp_path / "new" / "file", "old")

    def fail(source, target):
        assert Path(source).read_text() == "new" and Path(target).read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot write .*new/file: No space left on device"):
        files.write(tmp_path / "new" / "file", "new")
    assert (tmp_path / "new" / "file").read_text() == "old"


def test_places_that_nothing_writes_to_are_named():
    with pytest.raises(UserError, match="ftpx://host/run: expected a folder, or one of gs://"):
        files.folder("ftpx://host/run")


def test_local_paths_stay_those_of_this_machine(tmp_path):
    assert type(files.folder("runs/x")) is type(Path("runs/x"))
    assert files.is_local(tmp_path)


def test_checkpoint_on_a_full_disk_is_one_line_and_leaves_the_older_ones(tmp_path, faults):
    """The next step notices, not the next checkpoint."""
    run = tmp_path / "run"
    full = {"full_disk": 5, "after": str(run / "checkpoints" / "3"), "log_every": 0}
    code, output = processes.run(run, **full, steps=4000, kill=3999, delay=0)
    assert code == 2, f"it went on to the end: {output}"
    assert re.search(rf"checkpoint cannot be written to {run}/checkpoints: [^\\\n]*File too large$", output, re.M), (
        output
    )
    with Store(run / "checkpoints", writable=False) as store:
        assert store.steps() == [3]
    faults("full disk")


@pytest.fixture
def full_disk():
    yield processes.fill_disk
    processes.fill_disk(False)


def test_records_on_a_full_disk_are_one_line(tmp_path, full_disk, faults):
    writer = Writer(tmp_path)
    full_disk(True)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/metrics.jsonl: File too large"):
        for step in range(1000):
            writer.write(step, {"loss": 1.0})
    full_disk(False)
    writer.close()
    faults("full disk")


def test_place_that_cannot_be_written_is_one_line_before_anything_is_trained(tmp_path, faults):
    (tmp_path / "file").write_text("")
    job = dataclasses.replace(support.job(), loss=lambda *_: pytest.fail("training began"))
    for place, reason in ((tmp_path / "file" / "run", "Not a directory"), (Path("/proc/run"), "No such file")):
        with pytest.raises(UserError, match=rf"checkpoint cannot be written to {place}/checkpoints: .*{reason}"):
            fit(job, FitConfig(steps=2), place, progress=False, devices=jax.devices()[:1])
        faults("place that cannot be written")


BAD_JSON = {
    "missing": (lambda path: None, "no such file; write one"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file; write one"),
    "loop": (lambda path: path.symlink_to(path), "symbolic links"),
    "folder": (lambda path: path.mkdir(), "a folder, expected a file"),
    "pipe": (lambda path: os.mkfifo(path), "no regular file, expected a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "no regular file, expected a file"),
    "large": (lambda path: path.write_text("[" + "1," * 600 + "1]"), "1203 bytes, at most 1000 are allowed"),
    "Latin-1": (lambda path: path.write_bytes('{"é": 1}'.encode("latin-1")), r"not UTF-8 text \(byte 2\)"),
    "no JSON": (lambda path: path.write_text("{"), "not valid JSON"),
    "empty": (lambda path: path.write_text(""), "not valid JSON"),
    "digits": (lambda path: path.write_text("9" * 900 + "9" * 99 + "e"), "not valid JSON"),
    "array": (lambda path: path.write_text("[1]"), "expected a JSON object, found list"),
    "null": (lambda path: path.write_text("null"), "expected a JSON object, found NoneType"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_json_file_that_is_none_is_one_line(name, tmp_path):
    make, message = BAD_JSON[name]
    path = tmp_path / "some.json"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        files.read_json(path, limit=1000, hint="write one")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_json_that_is_nested_too_deep_is_one_line(tmp_path):
    (tmp_path / "deep.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match="nested too deep"):
        files.read_json(tmp_path / "deep.json")


def test_json_is_read_with_a_byte_order_mark_and_from_a_bucket(tmp_path, run):
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert files.read_json(tmp_path / "marked.json", list) == [1]
    files.write(files.folder(run) / "there.json", '{"a": 1}')
    assert files.read_json(f"{run}/there.json") == {"a": 1}
    with pytest.raises(UserError, match="no such file"):
        files.read_json(f"{run}/none.json")


@pytest.mark.parametrize("place", ["foo://bar/x", "http2://x/y", "a b://c"])
def test_an_unknown_kind_of_address_is_one_line(place):
    with pytest.raises(UserError, match=place) as caught:
        files.read_bytes(place)
    assert "\n" not in str(caught.value)


def test_damaged_metrics_and_scores_are_named_and_a_torn_last_line_is_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    log.write_text('{"step": 1}\n{"step": "x"}\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(tmp_path)
    assert read_scores(tmp_path) is None
    for text in ('{"seen": 3}', '{"seen": {"overall": null}}', '{"seen": {"overall": 1, "categories": {"a": "x"}}}'):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(UserError, match="seen holds no scores"):
            read_scores(tmp_path)
    good = {"seen": {"overall": 0.5, "categories": {"a": 1.0, "b": None}}}
    (tmp_path / "scores.json").write_text(json.dumps(good))
    assert read_scores(tmp_path) == good
