"""Compiles one program for one slice and makes its report."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator

from metacanvas_jax.plan import gpu_cost, hlo, hlo_cost
from metacanvas_jax.plan.compile import DoesNotFit, compile_program
from metacanvas_jax.plan.hlo_cost import Machine
from metacanvas_jax.plan.programs import Program
from metacanvas_jax.plan.report import Report, failed_report
from metacanvas_jax.plan.summary import make_report
from metacanvas_jax.plan.topology import Slice
from metacanvas_jax.train import flops

EVERY_S = 30.0  # between two lines that say how long a compilation has gone on
# Share of peak FLOP/s that the attention kernels reach by their static schedules, (forward, backward), heads of 128.
# The figures are those of docs/kernels.md, less 1.5 % because 27,280 tokens do not fill the last blocks. The matrix
# units of v6e and tpu7x are 256 wide, so heads of 128 fill half of them.
ATTENTION_SHARES = {
    "v4": (0.94, 0.94),
    "v5e": (0.97, 0.97),
    "v5p": (0.97, 0.97),
    "v6e": (0.61, 0.67),
    "tpu7x": (0.62, 0.62),
}


def study(config: str, program: Program, where: Slice, say: Callable[[str], None] = lambda line: None) -> Report:
    """Traces and compiles a program and estimates its cost. If it does not fit, the report's ``passed`` is False."""
    try:
        with told(say, f"{program.name} on {where.name}: compiling"):
            compiled = compile_program(program, where)
    except DoesNotFit as error:
        return failed_report(config, program, where, str(error), error.needed)
    say(f"{program.name} on {where.name}: compiled in {compiled.seconds:.0f} s")
    machine = Machine(where.chip, where.size // where.slices, functools.partial(kernel_share, where.chip.name))
    items = hlo_cost.items if where.chip.gpu is None else gpu_cost.items
    costs = items(hlo.parse(compiled.text), machine)
    return make_report(config, program, where, compiled, costs, flops.count(program.traced.jaxpr))


@contextlib.contextmanager
def told(say: Callable[[str], None], what: str, every_s: float = EVERY_S) -> Iterator[None]:
    """Says what begins and, every so many seconds while the context is open, for how long it has gone on."""
    say(what)
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every_s):
            say(f"{what} for {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=tell, daemon=True, name="told")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def kernel_share(generation: str, kernel: str) -> float:
    """Share of peak FLOP/s that a Pallas kernel reaches, by its name."""
    forward, backward = ATTENTION_SHARES[generation]
    return backward if any(mark in kernel for mark in ("bwd", "backward", "dkv", "dq")) else forward
