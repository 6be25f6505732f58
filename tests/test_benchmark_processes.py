"""Real processes that write one tree together, are killed and go on: the files of one process with one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import export_support as support
import pytest
from evaluate_support import read_tree

from metacanvas_jax.tasks import Bucket

pytestmark = [pytest.mark.faults, pytest.mark.slow]
TESTS = Path(__file__).parent
PROMPTS = 12
KILLED = """
import sys
from pathlib import Path
import kill_support
from metacanvas_jax.cli.main import main
seen = kill_support.kill_at_event(Path(sys.argv[1]), int(sys.argv[2]))
code = main(sys.argv[3:])
print("events", seen[0])
sys.exit(code)
"""
"""The command, in a process that kills itself at one of its openings, makings and renamings of files below a folder."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run and a file of prompts."""
    folder = tmp_path_factory.mktemp("place")
    support.save_drawing_run(folder, "sana", Bucket("text_to_image", (24, 36), length=64))
    rows = ({"tag": "counting", "prompt": f"a photo of {number} cats"} for number in range(PROMPTS))
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(place, out, *options, devices=1, kill_at=0):
    """A process that draws the prompts into ``out``."""
    asked = ("--run", place / "run", "--benchmark", "geneval", "--data", place, "--batch", 3, "--out", out)
    command = [sys.executable, "-c", KILLED, out, kill_at, "evaluate", *asked, *options]
    env = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(*processes):
    """Their exit codes and what they said."""
    said = [process.communicate(timeout=600)[0] for process in processes]
    return [process.returncode for process in processes], said


def together(place, out, *kill_at):
    """Two processes of one device each."""
    with socket.create_server(("", 0)) as server:
        group = ("--processes", 2, "--coordinator", f"localhost:{server.getsockname()[1]}", "--process")
    return ended(*(start(place, out, *group, i, kill_at=event) for i, event in enumerate(kill_at)))


def finished(tree):
    """Without what a kill left of a file that was being written."""
    return {path: content for path, content in tree.items() if not path.endswith(".tmp")}


@pytest.fixture(scope="module")
def alone(place):
    """The tree of one process with one device."""
    codes, said = ended(start(place, place / "alone"))
    assert codes == [0], said[0][-3000:]
    tree = read_tree(place / "alone")
    assert len(tree) == 5 * PROMPTS and len(set(tree.values())) == 5 * PROMPTS
    return tree


def test_eight_devices_of_a_process_write_the_same_bytes(place, alone):
    codes, said = ended(start(place, place / "eight", "--mesh", "data=8", devices=8))
    assert codes == [0], said[0][-3000:]
    assert read_tree(place / "eight") == alone


def test_two_processes_that_are_killed_twice_write_the_same_bytes(place, alone, faults):
    out, there = place / "two", 0
    for kill_at in ((40, 17), (36, 50)):  # up to eight files at once are begun before the first is whole
        codes, said = together(place, out, *kill_at)
        assert -9 in codes and 0 not in codes, "\n----\n".join(said)
        tree = finished(read_tree(out))
        assert there < len(tree) < len(alone), "nothing was stopped"
        assert all(alone[path] == content for path, content in tree.items())
        there = len(tree)
        faults("kill -9 of both processes that draw a tree")
    codes, said = together(place, out, 0, 0)
    assert codes == [0, 0], "\n----\n".join(said)
    counts = [int(text.rpartition("events")[2]) for text in said]
    assert min(counts) > 0, "one process wrote everything"
    assert read_tree(out) == alone
