"""The log file of a run: its lines, its warnings, and the error it ends with."""

import logging
import re
import sys

import pytest

from metacanvas_jax import files
from metacanvas_jax.cli import lines
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch.run_log import FILE, RUN, logged
from metacanvas_jax.train.log import Log

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def test_notes_and_warnings_are_kept_and_what_is_only_kept_is_not_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])  # as libraries set it
    with logged(tmp_path), Log(tmp_path, 0, 1, 1, progress=False, boards={}) as log:
        log.note("compiled in 2 s")
        logging.getLogger("metacanvas_jax.data").warning("record %d is damaged", 7)
        RUN.info("trained to step 1")
        logging.getLogger("metacanvas_jax.weights").info("read 1 GB")
    lines = (tmp_path / FILE).read_text().splitlines()
    expected = ["compiled in 2 s", "record 7 is damaged", "trained to step 1"]
    assert [re.sub(f"^{STAMP}", "", line) for line in lines] == expected
    assert all(re.match(STAMP, line) for line in lines)
    shown = capsys.readouterr().err
    assert shown.count("compiled in 2 s") == 1 and "trained to step 1" not in shown
    logging.getLogger("metacanvas_jax.data").warning("after the run")
    assert "after the run" not in (tmp_path / FILE).read_text()


def test_warnings_on_the_terminal_are_lines_of_their_own(tmp_path, capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    with lines.shown(), Log(tmp_path, 0, 9, 1, progress=True, boards={}) as log:
        logging.basicConfig()  # as libraries do
        log.doing("draws previews")
        logging.getLogger("metacanvas_jax.data").warning("record %d is damaged", 7)
    shown = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert "warning: record 7 is damaged" in [line.strip() for line in shown], "not behind the bar"
    assert any(line.startswith("draws previews:") for line in shown)
    assert root.handlers == []


def test_a_run_that_continues_appends(tmp_path):
    for text in ("first", "second"):
        with logged(tmp_path):
            logging.getLogger("metacanvas_jax.x").warning(text)
    assert [line.split()[-1] for line in (tmp_path / FILE).read_text().splitlines()] == ["first", "second"]


def test_an_unexpected_error_comes_with_its_traceback_and_a_mistake_as_one_line(tmp_path):
    def wrong():
        raise ZeroDivisionError("one by nothing")

    with pytest.raises(ZeroDivisionError), logged(tmp_path):
        wrong()
    text = (tmp_path / FILE).read_text()
    assert "ended by ZeroDivisionError\nTraceback" in text and "in wrong" in text and "one by nothing" in text
    with pytest.raises(UserError), logged(tmp_path):
        raise UserError("train.steps is 0")
    (line,) = (tmp_path / FILE).read_text().removeprefix(text).splitlines()
    assert re.fullmatch(f"{STAMP}train.steps is 0", line)


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / FILE).mkdir()
    with logged(tmp_path):
        logging.getLogger("metacanvas_jax.x").warning("a warning")
    assert (tmp_path / FILE).is_dir()


@pytest.mark.faults
def test_a_log_in_a_bucket_is_whole_after_every_line(bucket):
    folder = files.folder(f"{bucket.url}/run")
    for text in ("one", "two"):
        with logged(folder):
            logging.getLogger("metacanvas_jax.x").warning(text)
            assert (folder / FILE).read_text().splitlines()[-1].endswith(text)
    assert len((folder / FILE).read_text().splitlines()) == 2
