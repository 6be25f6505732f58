"""Cycles of a Pallas TPU kernel read from the compiler's own schedule, without a TPU.

A TPU core issues one bundle of instructions per cycle, in order. The number of bundles of a straight region of code is
therefore its number of cycles, without waits for memory. libtpu prints bundles after register allocation; ``regions``
reads them. A flag that libtpu reads only once turns the printing on, so every measurement needs a new process:
``measure`` starts ``python -m metacanvas_jax.kernels.static_schedule`` on a case of ``cases.py``.
"""

import contextlib
import dataclasses
import glob
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax

from metacanvas_jax.parallel.ahead import uncached

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment variables for libtpu on a machine without a TPU. They must be set before it is loaded."""


PASSES = ".*(packed-bundles-post-ra|pre-delay).*"
"""The compiler's passes of which ``regions`` reads the output. The output of all 66 passes is up to a gigabyte."""


@dataclasses.dataclass(frozen=True)
class Region:
    """The bundles between two labels: the share of every unit's slots in use, and the number of spilled registers."""

    kernel: str
    cycles: int
    units: dict[str, float]
    spills: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """One compiled case: regions of its kernels, peak memory, bytes moved; or the error of the compiler.

    Bytes are counted by XLA: operands and results of every fusion, and the bytes that kernels declare.
    """

    regions: tuple[Region, ...] = ()
    peak_bytes: int = 0
    moved_bytes: int = 0
    error: str = ""

    def main(self, kernel: str) -> Region:
        """The body of the main loop of the kernels whose name contains ``kernel``.

        It is the region with the highest use of the matrix units.
        """
        return max((r for r in self.regions if kernel in r.kernel), key=lambda region: region.units["MXU"])


def device(generation: str) -> Any:
    """A TPU of this generation as a target of compilation. It needs libtpu, but no TPU."""
    from jax.experimental import topologies

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation], **options)
    return topology.devices[0]


@contextlib.contextmanager
def compiling_for(generation: str):
    """A context in which code is traced for one TPU of a generation; its value is the sharding for abstract inputs."""
    mesh = jax.sharding.Mesh([device(generation)], ("one",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), uncached():
        yield jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def measure(case: str, generation: str, *, vmem: int | None = None, **options: Any) -> Measured:
    """Compiles ``case`` ("module:function") in a new process and reads the schedule of its kernels.

    The case is called as ``function(sharding, **options)``. It returns a function to jit and its abstract inputs.
    Kernels that ask for no amount of vector memory themselves may use ``vmem`` bytes of it (None: libtpu's default).
    """
    with tempfile.TemporaryDirectory(prefix="schedule_") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={PASSES}"
        if vmem is not None:
            flags += f" --xla_tpu_scoped_vmem_limit_kib={vmem // 1024}"
        environment = os.environ | QUIET | {"LIBTPU_INIT_ARGS": flags}
        request = json.dumps({"case": case, "generation": generation, "options": options})
        command = [sys.executable, "-m", "metacanvas_jax.kernels.static_schedule", request]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return Measured(error=reason(done.stderr)[:300])
        return Measured(regions=regions(folder), **json.loads(done.stdout.splitlines()[-1]))


def reason(trace: str) -> str:
    """The line of a traceback that names the error, without the compiler's output below it."""
    lines = trace.strip().splitlines()
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (named or lines or ["no reason given"])[-1]


def compile_case(case: str, generation: str, options: dict[str, Any]) -> dict[str, int]:
    """Compiles a case in this process; returns its peak memory and the bytes that it moves."""
    module, _, function = case.partition(":")
    with compiling_for(generation) as sharding:
        f, inputs = getattr(importlib.import_module(module), function)(sharding, **options)
        compiled = jax.jit(f).lower(*inputs).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {"peak_bytes": int(memory.peak_memory_in_bytes), "moved_bytes": int(cost["bytes accessed"])}


def regions(folder: str, at_least: int = 100) -> tuple[Region, ...]:
    """The regions with ``at_least`` this many bundles, of every kernel dumped to ``folder``."""
    found = []
    for path in sorted(glob.glob(f"{folder}/*-packed-bundles-post-ra.txt")):
        if "schedule-analysis" in path:
            continue
        stem = re.sub(r"-\d+-packed-bundles-post-ra\.txt$", "", path)
        use = glob.glob(glob.escape(stem) + "-*pre-delay_hlo-static-per-bundle-utilization.txt")
        if use:
            found += _regions(os.path.basename(stem), path, use[0], at_least)
    return tuple(found)


def _regions(kernel: str, bundles: str, utilization: str, at_least: int) -> list[Region]:
    with open(utilization) as file:
        lines = file.read().splitlines()
    units, slots = [x.strip() for x in lines[1].split(",")], [int(x) for x in lines[2].split()]
    rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    with open(bundles) as file:
        labels = [re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:LB|LE|LH|PB|PF|CT):", line) for line in file]
    cuts = sorted({0, len(rows)} | {int(label.group(1), 16) for label in labels if label})
    found = []
    for start, stop in itertools.pairwise(cuts):
        if stop - start < at_least:
            continue
        totals = [sum(row[i] for row in rows[start:stop] if len(row) == len(slots)) for i in range(len(slots))]
        use = {unit: total / (slot * (stop - start)) for unit, total, slot in zip(units, totals, slots, strict=True)}
        found.append(Region(kernel.partition("-")[2], stop - start, use, totals[units.index("VSTORE:SPILL")]))
    return found


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(compile_case(asked["case"], asked["generation"], asked["options"])))
