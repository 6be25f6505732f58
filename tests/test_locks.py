import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults_support import fill_disk

from metacanvas_jax import files, locks
from metacanvas_jax.errors import UserError
from metacanvas_jax.locks import NAME, locked

HOLD = """
import sys, time
from metacanvas_jax.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout.readline() == "held\n"
    return process


def elsewhere(folder, **changes):
    """The lock of a process on another machine."""
    owner = dataclasses.replace(locks._this("t"), host="another", **changes)
    (folder / NAME).write_text(json.dumps(dataclasses.asdict(owner)))


def test_a_second_process_is_refused_and_a_killed_one_followed_at_once(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid} on "), locked(tmp_path):
        pytest.fail("two processes hold one lock")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < 5
        assert (tmp_path / NAME).exists()
    assert not (tmp_path / NAME).exists()


def test_a_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    with locked(tmp_path / "new"):
        pass


def test_a_silent_lock_of_another_machine_is_taken_over(tmp_path):
    elsewhere(tmp_path)
    with locked(tmp_path, patience_s=1.0):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_beating_lock_of_another_machine_is_respected(tmp_path, monkeypatch):
    elsewhere(tmp_path)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: elsewhere(tmp_path, beat=1))
    with pytest.raises(UserError, match=r"in use by process .* on another"), locked(tmp_path, patience_s=5.0):
        pytest.fail("two processes hold one lock")


def test_a_lock_in_a_bucket_is_respected_and_released(bucket):
    run = f"{bucket.url}/run"
    with locked(run), pytest.raises(UserError, match="/run is in use by process"), locked(run):
        pytest.fail("two hold one lock")
    assert NAME not in files.listing(run)
    owner = dataclasses.replace(locks._this("t"), host="another")
    files.write(files.folder(f"{run}/{NAME}"), json.dumps(dataclasses.asdict(owner)))
    with locked(run, patience_s=1.0):  # a silent one
        assert json.loads(files.read_text(f"{run}/{NAME}"))["pid"] == os.getpid()


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
    owner = dataclasses.replace(locks._this("t"), started="1")
    (tmp_path / NAME).write_text(json.dumps(dataclasses.asdict(owner)))
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["token"] != owner.token


@pytest.mark.parametrize("text", ["", "[]", '{"host": 1}'])
def test_a_damaged_lock_is_taken_over(text, tmp_path):
    (tmp_path / NAME).write_text(text)
    with locked(tmp_path, patience_s=0.1):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_heart_beats(tmp_path):
    with locked(tmp_path, beat_s=0.05):
        first = json.loads((tmp_path / NAME).read_text())["beat"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / NAME).read_text())["beat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "file" / "run"):
        pytest.fail("no folder can be there")


def test_a_lock_on_a_full_disk_is_one_line_and_leaves_none(tmp_path):
    try:
        fill_disk(True)
        with pytest.raises(UserError, match="cannot write "), locked(tmp_path):
            pytest.fail("a lock without an owner")
    finally:
        fill_disk(False)
    assert not list(tmp_path.iterdir())


def test_two_trainings_of_one_folder_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    from metacanvas_jax.config.load import load_config
    from metacanvas_jax.launch import training

    for name in ("make_missing", "make_job", "check_workdir", "hooks_of"):
        monkeypatch.setattr(training, name, lambda *_, **__: {})
    monkeypatch.setattr(training.evaluators, "check", lambda *_, **__: None)  # which reads folders of the config
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("the second training has begun"))
    process = holder(tmp_path)
    try:
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid}"):
            training.train(load_config("configs/miniature.py:text", []), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    finally:
        process.kill()
        process.communicate()


def test_two_sweeps_of_one_folder_are_refused(tmp_path):
    from metacanvas_jax.launch import sweeps

    process = holder(tmp_path)
    with pytest.raises(UserError, match="is in use by process"):
        sweeps.run([sweeps.Point("a", "configs/nowhere.py", ())], tmp_path)
    process.kill()
    process.communicate()


def test_two_writers_of_the_same_shards_are_refused(tmp_path):
    from metacanvas_jax.config.sources import SourceSection
    from metacanvas_jax.data.sources import prepare
    from metacanvas_jax.worlds.scenes import SceneWorld

    (tmp_path / ".data.0.lock").write_text(json.dumps(dataclasses.asdict(locks._this("t"))))
    with pytest.raises(UserError, match="is in use by process"):
        prepare(SourceSection("scenes", count=2), tmp_path / "data", world=SceneWorld())
    assert not (tmp_path / "data").exists()
