"""The train step, compiled for every shape of batch before the first step."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from metacanvas_jax.hardware import GIB, chip_of
from metacanvas_jax.parallel import kept
from metacanvas_jax.parallel.mesh import placed_batch
from metacanvas_jax.parallel.rules import Rules
from metacanvas_jax.parallel.watch import Watch
from metacanvas_jax.train.flops import flops_of
from metacanvas_jax.train.log import Log
from metacanvas_jax.train.state import TrainState
from metacanvas_jax.train.step import Batch, Metrics, Step
from metacanvas_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program: how to call it, and the FLOPs that the model needs for it (see ``train/flops.py``)."""

    call: Callable[..., tuple[TrainState, Metrics]]
    flops: float


class Programs:
    """Calls the compiled step for the shape of each batch.

    ``prepare`` compiles what a run is known to need. Another shape is compiled when its first batch comes. Neither
    counts as training; each is reported with its time and the memory of a device that it needs.
    """

    def __init__(self, step: Step, mesh: Mesh, rules: Rules, log: Log, watch: Watch):
        self._step, self._mesh, self._rules, self._log, self._watch = step, mesh, rules, log, watch
        self._known: dict[Any, Compiled] = {}

    def prepare(
        self, state: TrainState, frozen: Params, key: Key[Array, ""], batches: Mapping[str, Batch], now: int
    ) -> None:
        """Compiles the step for whole batches of these shapes, by name; shapes that are the same are compiled once."""
        for name, batch in batches.items():
            if _shape(batch) not in self._known:
                self._compile(name, state, frozen, placed_batch(batch, self._mesh, self._rules), key, now)

    def at(self, state: TrainState, frozen: Params, batch: Batch, key: Key[Array, ""], now: int) -> Compiled:
        """The program for a batch on the mesh, in which step ``now`` runs."""
        known = self._known.get(_shape(batch))
        return self._compile("the batch", state, frozen, batch, key, now) if known is None else known

    def _compile(
        self, name: str, state: TrainState, frozen: Params, batch: Batch, key: Key[Array, ""], now: int
    ) -> Compiled:
        self._watch.at(now, f"compiles the step for {name}")
        with self._log.paused():
            start, before = time.perf_counter(), kept.counts()["found"]
            traced = self._step.trace(state, frozen, batch, key)
            call = traced.lower().compile()
            seconds = time.perf_counter() - start
        device = self._mesh.devices.flat[0]
        compiled = self._known[_shape(batch)] = Compiled(call, flops_of(traced))
        how = "read from the cache" if kept.counts()["found"] > before else "compiled"
        self._log.compiled(seconds)
        self._log.note(f"{how} in {seconds:.1f} s: the step for {name}{_memory(call, device)}")
        return compiled


def _shape(batch: Batch) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _memory(compiled: Any, device: Any) -> str:
    """The memory that a program needs on each device, where the compiler tells: arguments, results and temporaries."""
    found = compiled.memory_analysis()
    if found is None:
        return ""
    needed = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    needed += found.temp_size_in_bytes
    chip = chip_of(device.device_kind)
    return f", {needed / GIB:.2f} {f'of {chip.hbm / GIB:.2f} ' if chip else ''}GiB on each device"
