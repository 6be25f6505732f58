"""Several processes: all of them, or a clear failure."""

import os
import sys
import threading

import jax

from metacanvas_jax.errors import UserError


def initialize(
    processes: int | None = None,
    coordinator: str | None = None,
    process: int | None = None,
    timeout_s: int = 300,
) -> None:
    """Joins this process to the others; must run before anything touches a device.

    On Cloud TPU, Slurm and the like all of it is detected: pass ``processes`` only, as the number to insist on.
    Elsewhere pass ``coordinator`` (host:port of process 0) and ``process`` too. One process without coordinator needs
    no joining.

    If the others do not come up within ``timeout_s``, one line on stderr says so and the process ends with exit code 2.

    Raises:
        UserError: another number of processes than ``processes`` came up.
    """
    if processes == 1 and coordinator is None:
        return
    # JAX's client does not raise when its own time is up, it aborts the process with a stack trace: so be there first.
    watchdog = threading.Timer(timeout_s, _give_up, (processes, coordinator, process, timeout_s))
    watchdog.daemon = True
    watchdog.start()
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout_s + 60)
    watchdog.cancel()
    if processes is not None and jax.process_count() != processes:
        raise UserError(f"expected {processes} processes, {jax.process_count()} came up")


def _give_up(processes: int | None, coordinator: str | None, process: int | None, timeout_s: int) -> None:
    who = "this process" if process is None else f"process {process}"
    where = "" if coordinator is None else f" at {coordinator}"
    print(
        f"error: {who} waited {timeout_s} s for all of {processes or 'the'} processes to come up{where}; giving up",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
