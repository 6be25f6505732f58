"""Reports which process keeps a run waiting, and ends all processes when one of them fails or is lost.

Every few seconds each process writes a beat, with its present activity, to JAX's coordination service. Process 0 reads
them. If a process has failed, or has sent nothing for a while, process 0 publishes a verdict, which every process
prints before it ends. A thread ends the process, because the main thread may wait in a collective operation forever.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from metacanvas_jax.errors import RESTART, Preempted, Unreachable, UserError, exit_code, first_line

_KEYS = "metacanvas/watch"
_BEAT_S = 2.0
_LOST_S = 40.0
"""Seconds without a beat after which a process counts as lost; JAX's own limit is longer, and it aborts."""
_ending = threading.Lock()


class Watch:
    """Watches while it is open as a context. After an error it stays open until `end_all` has sent the error to all.

    ``client`` is the connection to the coordination service, None in a run of one process. When an activity takes more
    than ``stall_s`` seconds, a line on stderr names the process (0: never).
    """

    def __init__(self, client: Any, stall_s: float, *, lost_s: float = _LOST_S, clock=time.monotonic):
        self._client, self._stall_s, self._lost_s, self._clock = client, stall_s, lost_s, clock
        self._process, self._count = jax.process_index(), jax.process_count()
        self._at: tuple[int, str, float] = (0, "starts", clock())
        self._reported: tuple[int, str] | None = None
        self._beats = 0
        self._heard: dict[int, tuple[int, float]] = dict.fromkeys(range(self._count), (-1, clock()))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._client is None or kind in (None, Preempted):
            self._closed.set()
            self._thread.join(timeout=10)

    def at(self, step: int, doing: str) -> None:
        """Records what this process does from now on; reported as "process 3 <doing>, step 12"."""
        self._at = (step, doing, self._clock())

    def _run(self) -> None:
        while not self._closed.wait(_BEAT_S):
            try:
                beats = self._exchange()
            except jax.errors.JaxRuntimeError as error:
                if not self._closed.is_set():
                    _end(self._client, f"process 0 cannot be reached any more ({first_line(error)})", RESTART)
                return
            if stalled := self._stalled(beats):
                print(f"watch: {stalled}", file=sys.stderr, flush=True)

    def _exchange(self) -> dict[int, dict[str, Any]]:
        """Sends this process's beat; returns the beats this process knows of: all on process 0, else its own."""
        step, doing, since = self._at
        self._beats += 1
        beat = {"n": self._beats, "step": step, "doing": doing, "s": self._clock() - since}
        beat["host"] = socket.gethostname()
        if self._client is None:
            return {0: beat}
        self._client.key_value_set(f"{_KEYS}/beat/{self._process}", json.dumps(beat), allow_overwrite=True)
        beats = {self._process: beat}
        if self._process == 0:
            beats = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in self._get("beat")}
            if verdict := self._failed() or self._lost(beats):
                _publish(self._client, verdict)
        for _, text in self._get("verdict"):
            verdict = json.loads(text)
            _end(self._client, verdict["message"], verdict["code"])
        return beats

    def _get(self, what: str) -> list[tuple[str, str]]:
        return self._client.key_value_dir_get(f"{_KEYS}/{what}/")

    def _failed(self) -> dict[str, Any] | None:
        failed = sorted(self._get("failed"))
        return json.loads(failed[0][1]) if failed else None

    def _lost(self, beats: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
        now = self._clock()
        for process, (number, _) in self._heard.items():
            latest = beats.get(process, {"n": -1})["n"]
            if latest != number:
                self._heard[process] = (latest, now)
        # A process that has not begun to watch may still be loading; until then JAX's own, slower check applies.
        silent = [p for p, (number, heard) in self._heard.items() if number >= 0 and now - heard > self._lost_s]
        if not silent:
            return None
        names = ", ".join(_name(process, beats.get(process)) for process in silent)
        message = (
            f"lost {names}: not heard of for {self._lost_s:g} s; the same command goes on from the last checkpoint"
        )
        return {"message": message, "code": RESTART}

    def _stalled(self, beats: dict[int, dict[str, Any]]) -> str:
        """A report on the processes that the others wait for: those that do not wait for the devices, or else all."""
        if not self._stall_s or not all(beat["s"] > self._stall_s for beat in beats.values()):
            self._reported = None
            return ""
        state = (min(beat["step"] for beat in beats.values()), beats[min(beats)]["doing"])
        if self._process != 0 or state == self._reported:
            return ""
        self._reported = state
        busy = {process: beat for process, beat in beats.items() if beat["doing"] != WAITS} or beats
        lines = [
            f"{_name(process, beat)} {beat['doing']}, step {beat['step']}, for {beat['s']:.0f} s"
            for process, beat in sorted(busy.items())[:8]
        ]
        more = f" (and {len(busy) - 8} more)" if len(busy) > 8 else ""
        return f"no progress for {self._stall_s:g} s: {'; '.join(lines)}{more}"


WAITS = "waits for the devices"


def end_all(client: Any, error: BaseException) -> NoReturn:
    """Ends this process and, through their watches, all others, with one message.

    An unexpected error may only be the consequence of a lost process. The verdict on that process is awaited first.
    """
    if not isinstance(error, UserError | Unreachable | KeyboardInterrupt):
        time.sleep(_LOST_S + 3 * _BEAT_S)  # the watch may end the process meanwhile
        traceback.print_exception(error)
    code = exit_code(error)
    text = first_line(error, 500)
    name = f"process {jax.process_index()} ({socket.gethostname()})"
    verdict = {"message": f"{name}: {text}", "code": code}
    try:
        if jax.process_index() == 0:
            _publish(client, verdict)
        else:
            client.key_value_set(f"{_KEYS}/failed/{jax.process_index()}", json.dumps(verdict), allow_overwrite=True)
            verdict = json.loads(client.blocking_key_value_get(f"{_KEYS}/verdict/0", 15_000))
    except jax.errors.JaxRuntimeError:
        pass  # process 0 is gone, or has no watch yet: this process reports its own error
    _end(client, verdict["message"], verdict["code"])


def _publish(client: Any, verdict: dict[str, Any]) -> None:
    if not client.key_value_dir_get(f"{_KEYS}/verdict/"):
        client.key_value_set(f"{_KEYS}/verdict/0", json.dumps(verdict))


def _end(client: Any, message: str, code: int) -> NoReturn:
    """Prints the message and ends. Process 0 first waits until the others have read the verdict from it."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # another thread of this process is at it
    print(f"metacanvas: {message}", file=sys.stderr, flush=True)
    try:
        client.key_value_set(f"{_KEYS}/read/{jax.process_index()}", "", allow_overwrite=True)
        end = time.monotonic() + 4 * _BEAT_S
        while jax.process_index() == 0 and time.monotonic() < end:
            if len(client.key_value_dir_get(f"{_KEYS}/read/")) == jax.process_count():
                break
            time.sleep(0.1)
    except jax.errors.JaxRuntimeError:
        pass
    # Not by an exception: the interpreter would wait for the others at its exit, and the main thread may be stuck.
    os._exit(code)


def _name(process: int, beat: dict[str, Any] | None) -> str:
    where = f" ({beat['host']})" if beat else ""
    return f"process {process}{where}"
