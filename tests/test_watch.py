"""Several processes: the roll call, and the watch over them (with the service's store of keys in memory)."""

import contextlib
import socket
import threading

import jax
import pytest

from metacanvas_jax.cli.main import main
from metacanvas_jax.errors import Lost, Preempted, Unreachable, UserError, exit_code
from metacanvas_jax.parallel import distributed, roll_call, watch
from metacanvas_jax.parallel.watch import WAITS, Watch


class Keys:
    """What `Watch` uses of JAX's client."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [item for item in self.values.items() if item[0].startswith(key)]


@pytest.fixture
def four(monkeypatch):
    """Watches of four processes over the same keys; their threads are not started. Ended ones raise Ended."""
    keys, watches, clock = Keys(), [], {"now": 100.0}
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        watches.append(Watch(keys, 10.0, lost_s=5.0, clock=lambda: clock["now"]))

    def end(client, message, code):
        raise Ended(message, code)

    monkeypatch.setattr(watch, "_end", end)
    return watches, clock


class Ended(Exception):
    pass


def test_process_that_keeps_the_others_waiting_is_named(four):
    watches, clock = four
    for process, each in enumerate(watches):
        each.at(41, "reads a batch" if process == 2 else WAITS)
    for each in watches[1:]:
        each._exchange()
    assert watches[0]._stalled(watches[0]._exchange()) == ""
    clock["now"] += 11
    for each in watches[1:]:
        each._exchange()
    host = socket.gethostname()
    said = watches[0]._stalled(watches[0]._exchange())
    assert said == f"no progress for 10 s: process 2 ({host}) reads a batch, step 41, for 11 s"
    assert watches[0]._stalled(watches[0]._exchange()) == "", "it was said already"
    assert watches[1]._stalled(watches[1]._exchange()) == "", "process 0 says it for all"
    watches[2].at(41, WAITS)
    watches[2]._exchange()
    assert watches[0]._stalled(watches[0]._exchange()) == ""
    clock["now"] += 11
    for each in watches[1:]:
        each._exchange()
    assert watches[0]._stalled(watches[0]._exchange()).count("waits for the devices") == 4, "nobody is to blame"


def test_process_that_is_not_heard_of_ends_all_with_one_message(four):
    watches, clock = four
    for each in reversed(watches):
        each._exchange()
    clock["now"] += 3
    for each in (watches[1], watches[3], watches[0]):
        each._exchange()
    clock["now"] += 3
    for each in (watches[1], watches[3]):
        each._exchange()
    said = set()
    for each in (watches[0], watches[1], watches[3]):
        with pytest.raises(Ended) as ended:
            each._exchange()
        said.add(ended.value.args)
    host = socket.gethostname()
    message = f"lost process 2 ({host}): not heard of for 5 s; the same command goes on from the last checkpoint"
    assert said == {(message, 75)}


def test_process_that_has_not_begun_to_watch_is_not_lost(four):
    watches, clock = four
    for seconds in (0, 3, 3):
        clock["now"] += seconds
        for each in (watches[1], watches[2], watches[0]):
            heard = each._exchange()
    assert set(heard) == {0, 1, 2}, "nobody was ended, and of process 3 nothing is known"


def test_error_of_one_process_ends_all_with_its_message(four, monkeypatch):
    watches, _ = four
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    keys = watches[3]._client
    keys.blocking_key_value_get = lambda *_: watches[0]._exchange()
    said = set()
    with pytest.raises(Ended):  # process 0 publishes, and reads its own verdict
        watch.end_all(keys, UserError("record 7 is corrupt\nand more"))
    for each in watches[:3]:
        with pytest.raises(Ended) as ended:
            each._exchange()
        said.add(ended.value.args)
    assert said == {(f"process 3 ({socket.gethostname()}): record 7 is corrupt", 2)}


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def call(port, count, processes, timeout_s, strangers=()):
    """What each of ``processes`` hears: "all here" or the error."""
    heard = {}

    def one(place, process, count):
        try:
            roll_call.answer(f"localhost:{port}", count, process, timeout_s)
            heard[place] = "all here"
        except UserError as error:
            heard[place] = str(error)

    threads = [threading.Thread(target=one, args=(i, *spec)) for i, spec in enumerate(processes)]
    for thread in threads:
        thread.start()
    for data in strangers:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port)) as connection:
            connection.sendall(data)
    for thread in threads:
        thread.join()
    return heard


def test_roll_call_ends_when_all_have_come():
    assert call(free_port(), 3, [(2, 3), (0, 3), (1, 3)], 30, [b"GET / HTTP/1.1\r\n\r\n"]) == dict.fromkeys(
        range(3), "all here"
    )


def test_those_who_are_missing_are_named_to_all():
    heard = call(free_port(), 5, [(0, 5), (2, 5)], 1.5)
    assert set(heard.values()) == {"processes 1, 3 and 4 of 5 did not come up within 1.5 s"}
    assert "process 0 did not come up at localhost:" in call(free_port(), 2, [(1, 2)], 0.5)[0]


def test_wrong_numbers_are_named():
    twice = call(free_port(), 3, [(0, 3), (1, 3), (1, 3)], 20)
    assert f"two processes say that they are process 1, one of them on {socket.gethostname()}" in twice.values()
    heard = call(free_port(), 2, [(0, 2), (1, 3)], 20)
    assert heard[0] == f"process 0 expects 2 processes, process 1 on {socket.gethostname()} expects 3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 4}, "no cluster found that tells of 4 processes: pass --coordinator and --process too"),
        ({"processes": 4, "coordinator": "host:1", "process": 4}, "process 4 of 4 at 'host:1': expected 0 to 3"),
        ({"processes": 4, "coordinator": "host", "process": 1}, "expected 0 to 3, and host:port"),
        ({"processes": 4, "coordinator": "host:p", "process": 1}, "coordinator 'host:p': expected host:port"),
    ],
)
def test_arguments_that_do_not_make_a_cluster_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(**arguments)


def test_one_process_needs_no_joining():
    distributed.initialize()
    distributed.initialize(1)
    distributed.barrier("alone")
    assert distributed.gather("here") == ["here"]
    assert distributed.client() is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a mistake"), 2),
        (Lost("a host"), 75),
        (Unreachable("a bucket"), 75),
        (Preempted("asked"), 75),
        (KeyboardInterrupt(), 130),
        (KeyError("a bug"), 1),
    ],
)
def test_losses_are_started_again_and_mistakes_are_not(error, code, monkeypatch):
    assert exit_code(error) == code
    monkeypatch.setattr(distributed.roll_call, "answer", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as found:
        distributed.initialize(2, "localhost:1", 0)
    assert exit_code(found.value) == code


def test_a_port_that_is_still_held_is_started_again_and_one_that_is_no_port_is_not():
    with socket.create_server(("", 0)) as server, pytest.raises(Lost, match="process 0 cannot listen on port"):
        roll_call.answer(f"localhost:{server.getsockname()[1]}", 2, 0, 1)
    with pytest.raises(UserError, match="expected host:port") as found:
        roll_call.answer("localhost:http", 2, 0, 1)
    assert exit_code(found.value) == 2


class Pod:
    """A TPU slice of several hosts, as JAX's detection of clusters sees it."""

    @staticmethod
    def is_env_present():
        return True

    @staticmethod
    def get_process_count():
        return 4


@pytest.mark.parametrize("command", ["sample", "evaluate", "train", "prepare"])
def test_one_host_of_a_slice_does_not_wait_for_the_others_without_a_word(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "TPU_CLUSTERS", (Pod,))
    monkeypatch.delenv("TPU_PROCESS_BOUNDS", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(type(jax.config), "jax_platforms", "tpu,cpu", raising=False)
    asked = {
        "sample": (
            "sample",
            "--config",
            "configs/miniature.py:canvas",
            "--prompt",
            "x",
            "--out",
            str(tmp_path / "x.png"),
        ),
        "evaluate": ("evaluate", "--run", str(tmp_path), "--out", str(tmp_path / "x.json")),
        "train": ("train", "--config", "configs/miniature.py:canvas", "--workdir", str(tmp_path / "run")),
        "prepare": ("prepare", "--config", "configs/miniature.py:canvas", "--contexts"),
    }
    assert main(list(asked[command])) == 2
    said = capsys.readouterr().err
    assert "one of 4 hosts of a TPU slice" in said
    assert ("--process I/4" if command == "prepare" else "--processes 4") in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TPU_PROCESS_BOUNDS", "1,1,1")
    distributed.check_alone()


@pytest.mark.parametrize("command", ["export", "import", "prepare", "fetch"])
def test_commands_that_compute_on_no_accelerator_take_none(command, tmp_path, monkeypatch):
    chosen, none, out = {}, str(tmp_path / "none"), str(tmp_path / "out")
    monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
    monkeypatch.setattr(type(jax.config), "jax_platforms", None, raising=False)
    words = {
        "export": ("--run", none, "--to", out),
        "import": ("--from", none, "--to", out),
        "prepare": ("--source", "files", "--path", none, "--out", out),
        "fetch": ("--repository", "none"),
    }
    assert main([command, *words[command]]) == 2
    assert chosen["jax_platforms"] == "cpu"


def test_a_tpu_outside_of_google_cloud_is_taken_to_be_one_host(monkeypatch):
    class Unreachable(Pod):
        @staticmethod
        def is_env_present():
            raise ConnectionError("no metadata server")

    monkeypatch.setattr(distributed, "TPU_CLUSTERS", (Unreachable, Pod))
    assert distributed.slice_hosts() == 4
    monkeypatch.setattr(distributed, "TPU_CLUSTERS", (Unreachable,))
    assert distributed.slice_hosts() == 1
