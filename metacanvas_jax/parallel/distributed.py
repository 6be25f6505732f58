"""Runs of several processes: all of them take part, or all fail with one clear message.

Messages go through JAX's coordination service.
"""

import contextlib
import itertools
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed as service  # the service's store of keys has no public name
from jax._src.clusters import ClusterEnv
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from metacanvas_jax.errors import RESTART, Lost, Preempted, UserError
from metacanvas_jax.parallel import roll_call, watch

TPU_CLUSTERS = (GkeTpuCluster, GceTpuCluster)  # as JAX looks for them; the second asks a server for what it knows
_barriers: dict[str, Iterator[int]] = {}


@contextlib.contextmanager
def together(
    processes: int | None = None, coordinator: str | None = None, process: int | None = None, timeout_s: int = 300
) -> Iterator[None]:
    """Calls `initialize`. While open, an error of one process ends all of them with one message (see `watch`)."""
    initialize(processes, coordinator, process, timeout_s)
    try:
        yield
    except Preempted:
        raise  # in all processes, at the same step
    except (Exception, KeyboardInterrupt) as error:
        if client() is not None:
            watch.end_all(client(), error)
        raise


def initialize(
    processes: int | None = None,
    coordinator: str | None = None,
    process: int | None = None,
    timeout_s: int = 300,
) -> None:
    """Connects this process to the others; must run before any device is used.

    On Cloud TPU, Slurm and similar clusters everything is detected; pass only ``processes``, the number expected.
    Elsewhere pass ``coordinator`` (host:port of process 0) and ``process`` too. A single process without a coordinator
    is not connected to anything.

    Raises:
        UserError: their number is not ``processes``, nothing is known about the others, or this is one of the hosts of
            a TPU slice and nothing was said of them.
        Lost: some processes did not start within ``timeout_s`` (the message names them).
    """
    if processes in (1, None) and coordinator is None and process is None:
        check_alone()
        return
    count = processes
    if None in (coordinator, process, count):
        detected = ClusterEnv.auto_detect_unset_distributed_params(coordinator, None, process, None, None, timeout_s)
        coordinator, found, process, _ = detected
        if found not in (count, None) and count is not None:
            raise UserError(f"expected {count} processes, the cluster has {found}")
        count = count or found
    if coordinator is None or count is None or process is None:
        raise UserError(f"no cluster found that tells of {processes} processes: pass --coordinator and --process too")
    if not 0 <= process < count or ":" not in coordinator:
        raise UserError(f"process {process} of {count} at {coordinator!r}: expected 0 to {count - 1}, and host:port")
    roll_call.answer(coordinator, count, process, timeout_s)
    # All processes answered a moment ago. If one is lost now, JAX's client aborts this process at its time limit with a
    # stack trace. The timer ends the process with a message before that.
    timer = threading.Timer(timeout_s, _give_up, (count, coordinator, process, timeout_s))
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        coordinator, count, process, initialization_timeout=timeout_s + 60, shutdown_timeout_seconds=60
    )
    timer.cancel()
    if jax.process_count() != count:
        raise UserError(f"expected {count} processes, {jax.process_count()} came up")


def check_alone(option: str = "--processes {hosts}") -> None:
    """Raises UserError on one of several hosts of a TPU slice, where the first use of a chip would wait for the others.

    ``option`` is what tells a command about them. Nothing is raised where the environment keeps JAX off the TPU, or
    gives this host chips of its own (TPU_PROCESS_BOUNDS=1,1,1).
    """
    platforms = jax.config.jax_platforms
    if (platforms is not None and "tpu" not in platforms) or os.environ.get("TPU_PROCESS_BOUNDS") == "1,1,1":
        return
    if (hosts := slice_hosts()) > 1:
        raise UserError(
            f"this is one of {hosts} hosts of a TPU slice, whose chips start only together: run the same command on "
            f"all of them with {option.format(hosts=hosts)}, or here alone on the CPU with JAX_PLATFORMS=cpu"
        )


def slice_hosts() -> int:
    """How many hosts share the TPU slices of this one; 1 where that cannot be known, as outside of Google Cloud."""
    for kind in TPU_CLUSTERS:
        with contextlib.suppress(
            Exception
        ):  # JAX asks a server, which need not be there, and knows no error of its own
            if kind is GceTpuCluster:
                socket.gethostbyname("metadata.google.internal")  # else JAX asks for minutes
            if kind.is_env_present():
                return kind.get_process_count()
    return 1


def chief() -> bool:
    """Whether this process writes what all of them have computed."""
    return jax.process_index() == 0


def client() -> Any:
    """This process's connection to the coordination service; None in a run of one process."""
    return service.global_state.client


def barrier(name: str, timeout_s: int = 300) -> None:
    """Waits for all processes to come to the same call.

    Raises:
        Lost: naming those that had not come after ``timeout_s``.
    """
    if client() is None:
        return
    key = f"{name}-{next(_barriers.setdefault(name, itertools.count()))}"
    client().key_value_set(f"metacanvas/barrier/{key}/{jax.process_index()}", socket.gethostname())
    try:
        client().wait_at_barrier(f"metacanvas/{key}", timeout_s * 1000)
    except jax.errors.JaxRuntimeError as error:
        came = {int(path.rsplit("/", 1)[1]) for path, _ in client().key_value_dir_get(f"metacanvas/barrier/{key}/")}
        missing = roll_call.listed(sorted(set(range(jax.process_count())) - came))
        raise Lost(
            f"{missing} of {jax.process_count()} did not come to the barrier {name!r} within {timeout_s} s"
        ) from error


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order, on every process."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(np.max(lengths)), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(np.asarray(rows), lengths, strict=True)]


def whole(tree: PyTree) -> PyTree:
    """Numpy copies of arrays that may be spread over the processes, on every process; all of them must call this."""

    def copy(x: Any) -> np.ndarray:
        spread = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if spread else np.asarray(x)

    return jax.tree.map(copy, tree)


def _give_up(count: int, coordinator: str, process: int, timeout_s: int) -> None:
    print(
        f"error: process {process} of {count} waited {timeout_s} s for JAX's coordination service at {coordinator}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RESTART)
