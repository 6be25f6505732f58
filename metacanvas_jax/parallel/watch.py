"""Says where a run stands when it stands still, and ends all processes when one of them fails or is lost.

Every process tells JAX's coordination service every few seconds that it lives and what it is doing. Process 0 reads
that and, if one has failed or has not been heard of, publishes a verdict; every process then prints it and ends. It
ends from a thread, because the main thread may be inside a collective operation that will never return.
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

from metacanvas_jax.errors import RESTART, Preempted, UserError

_KEYS = "metacanvas/watch"
_BEAT_S = 2.0
_LOST_S = 40.0
"""Seconds without a beat after which a process counts as lost; JAX's own limit is longer, and it aborts."""
_ending = threading.Lock()


class Watch:
    """Watches while it is open as a context; an error that is still to be told to others (`end_all`) keeps it open.

    ``client`` is the connection to the coordination service, None in a run of one process. ``stall_s`` is how long one
    and the same activity may take before a line on stderr names the process (0: never).
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
        """What this process does from now on, as "process 3 <doing>, step 12"."""
        self._at = (step, doing, self._clock())

    def _run(self) -> None:
        while not self._closed.wait(_BEAT_S):
            try:
                beats = self._exchange()
            except jax.errors.JaxRuntimeError as error:
                if not self._closed.is_set():
                    _end(self._client, f"process 0 cannot be reached any more ({_first_line(error)})", RESTART)
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
        # Who has not begun to watch may be loading still; until then JAX watches, less closely.
        silent = [p for p, (number, heard) in self._heard.items() if number >= 0 and now - heard > self._lost_s]
        if not silent:
            return None
        names = ", ".join(_name(process, beats.get(process)) for process in silent)
        message = (
            f"lost {names}: not heard of for {self._lost_s:g} s; the same command goes on from the last checkpoint"
        )
        return {"message": message, "code": RESTART}

    def _stalled(self, beats: dict[int, dict[str, Any]]) -> str:
        """Who keeps the others waiting: those that are not waiting for the devices, if there are any."""
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

    An error that is not the user's may be the consequence of a lost process, so the verdict on that is waited for
    first.
    """
    if not isinstance(error, UserError | KeyboardInterrupt):
        time.sleep(_LOST_S + 3 * _BEAT_S)  # the watch may end the process meanwhile
        traceback.print_exception(error)
    code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    text = _first_line(error) if str(error) else type(error).__name__
    name = f"process {jax.process_index()} ({socket.gethostname()})"
    verdict = {"message": f"{name}: {text}", "code": code}
    try:
        if jax.process_index() == 0:
            _publish(client, verdict)
        else:
            client.key_value_set(f"{_KEYS}/failed/{jax.process_index()}", json.dumps(verdict), allow_overwrite=True)
            verdict = json.loads(client.blocking_key_value_get(f"{_KEYS}/verdict/0", 15_000))
    except jax.errors.JaxRuntimeError:
        pass  # process 0 is gone, or has no watch yet: then this process's own error is what there is to say
    _end(client, verdict["message"], verdict["code"])


def _publish(client: Any, verdict: dict[str, Any]) -> None:
    if not client.key_value_dir_get(f"{_KEYS}/verdict/"):
        client.key_value_set(f"{_KEYS}/verdict/0", json.dumps(verdict))


def _end(client: Any, message: str, code: int) -> NoReturn:
    """Prints and ends. Process 0 stays until the others have read the verdict, as it is they who read it from it."""
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
