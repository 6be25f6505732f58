"""Attention, linear attention and the prologue on one GPU: right first, then timed.

    PYTHONPATH=$PWD python benchmarks/kernels_gpu.py --out gpu.json [--part linear] [--seconds 150]

Needs jax with CUDA, flax, einops and jaxtyping. First every implementation is compared with float64 on small inputs;
then each timed case with float32 of "highest" precision on its own inputs (relative error of the norm, of the output
and of each gradient; the largest is printed). Times are medians of host clocks around asynchronous calls that rotate
among input sets larger than the cache, after warm-up; "both" is the forward and the backward pass in one program.
Ceilings are measured: a bf16 matrix product of 8192^3 and a copy of 1 GiB. Operations of attention are those of the
formula (4 n m e per head, half if causal, 3.5 times for both passes, padding not subtracted); bytes are the least
possible (every input once, every output once). Exit code 1: an error beyond its tolerance, or a row that failed.
``--tiny`` tries the script on small shapes where there is no GPU, without what needs one.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from gpu_cases import (
    Job,
    Row,
    attention_exact,
    attention_jobs,
    ceiling_jobs,
    highest,
    linear_jobs,
    pairs,
    prologue_jobs,
)

START = time.perf_counter()
SETS = 3  # inputs to rotate among
THREADS = 12  # that compile
BATCH = 16  # programs that are compiled before they are timed


def relative_error(actual: Any, expected: Any) -> float:
    errors = []
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        errors.append(float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30)))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def seconds_per_call(f: Callable, sets: list[tuple]) -> tuple[float, float]:
    """Median of the time of a call, and the spread (largest minus least, over the median)."""
    for inputs in sets:
        jax.block_until_ready(f(*inputs))
    start = time.perf_counter()
    jax.block_until_ready(f(*sets[0]))
    once = time.perf_counter() - start
    calls = max(1, round(0.02 / once))
    samples, turn = [], 0
    for _ in range(min(11, max(3, int(0.5 / (once * calls))))):
        start = time.perf_counter()
        for _ in range(calls):
            result = f(*sets[turn % len(sets)])
            turn += 1
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - start) / calls)
    middle = statistics.median(samples)
    return middle, (max(samples) - min(samples)) / middle


def built(job: Job) -> Any:
    """The compiled program, or what went wrong."""
    try:
        inputs = jax.eval_shape(job.draw, jax.random.key(0))
        compiled = jax.jit(job.f).lower(*inputs).compile()
        costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        job.row.counted = costs.get("bytes accessed")
        job.row.temporary = getattr(memory, "temp_size_in_bytes", None)
        return compiled
    except Exception as error:  # one row must not take the others with it
        return error


def reference_of(job: Job) -> Any:
    """The compiled float32 reference, the float64 one as it is, or what went wrong."""
    if job.expected in (None, pairs, attention_exact):
        return job.expected
    try:
        return jax.jit(highest(job.expected)).lower(*jax.eval_shape(job.draw, jax.random.key(0))).compile()
    except Exception as error:  # likewise
        return error


def drawing(draw: Callable) -> Any:
    """The compiled program that draws inputs, or what went wrong."""
    try:
        return jax.jit(draw).lower(jax.random.key(0)).compile()
    except Exception as error:  # likewise
        return error


def measure(job: Job, program: Any, draw: Any, expected: Any, known: dict) -> None:
    """``known`` holds the inputs and the expected values of the jobs before: one group at a time, they are large."""
    row = job.row
    try:
        for result in (program, draw, expected):
            if isinstance(result, Exception):
                raise result
        if job.draw not in known:
            known.clear()
            known[job.draw] = [draw(jax.random.key(seed)) for seed in range(SETS if job.timed else 1)]
        sets = known[job.draw]
        if job.expected is not None:
            if job.group not in known:
                known[job.group] = expected(*sets[0])
            row.error = relative_error(program(*sets[0]), known[job.group])
        if job.timed:
            seconds, row.spread = seconds_per_call(program, sets)
            row.ms = 1e3 * seconds
    except Exception as error:  # likewise
        row.failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def run(jobs: list[Job], pool: concurrent.futures.ThreadPoolExecutor, limit: float) -> None:
    """Compiles all of them at once, then compares and times one after the other, unless ``limit`` (s) has passed."""
    programs, draws, expected = [], {}, {}
    if not (late := time.perf_counter() - START > limit):
        references = {job.group: pool.submit(reference_of, job) for job in jobs if job.expected is not None}
        draws = {job.draw: pool.submit(drawing, job.draw) for job in jobs}
        programs = list(pool.map(built, jobs))
        draws = {draw: future.result() for draw, future in draws.items()}
        expected = {group: future.result() for group, future in references.items()}
    known: dict[Any, Any] = {}
    for i, job in enumerate(jobs):
        if late or time.perf_counter() - START > limit:
            job.row.failed = f"not begun within {limit:.0f} s"
        else:
            measure(job, programs[i], draws[job.draw], expected.get(job.group), known)


def table(rows: list[Row]) -> str:
    tops = {row.case.split()[0]: row for row in rows if row.part == "ceiling" and row.ms}
    peak = tops["bf16"].flops / tops["bf16"].ms / 1e9 if "bf16" in tops else None
    bandwidth = tops["copy"].size / tops["copy"].ms / 1e6 if "copy" in tops else None

    def share(value: float, top: float | None) -> str:
        return f" ({value / top:.0%})" if top else ""

    lines = [
        "| | implementation | passes | ms | spread | TFLOP/s (of product) | GB/s (of copy) | bytes counted / least "
        "| temporary MiB | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row.part}: {row.case}", row.implementation, row.passes]
        if row.failed:
            cells += [f"FAILED {row.failed}", *[""] * 6]
        else:
            rate = row.flops / row.ms / 1e9 if row.ms and row.flops else None
            speed = row.size / row.ms / 1e6 if row.ms and row.size else None
            cells += [f"{row.ms:.3f}" if row.ms else "", f"{row.spread:.0%}" if row.spread is not None else ""]
            cells += [f"{rate:.1f}{share(rate, peak)}" if rate else ""]
            cells += [f"{speed:.0f}{share(speed, bandwidth)}" if speed else ""]
            whole = row.part != "attention"  # of a loop XLA counts one turn
            cells += [f"{row.counted / row.size:.2f}" if whole and row.counted and row.size else ""]
            cells += [f"{row.temporary / 2**20:.0f}" if row.temporary is not None else ""]
            beyond = "" if row.passed else f" BEYOND {row.allowed:.0e}"
            cells += [f"{row.error:.1e}{beyond}" if row.error is not None else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"linear": linear_jobs, "attention": attention_jobs, "prologue": prologue_jobs}
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--part", choices=tuple(parts), action="append")
    parser.add_argument("--seconds", type=float, default=150.0, help="rows not begun by then are left out")
    parser.add_argument("--only", default="", help="cases that have this in their name")
    parser.add_argument("--tiny", action="store_true", help="small shapes, without cuDNN")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.tiny:
        raise SystemExit(f"kernels_gpu: found {device.device_kind} ({device.platform}), expected a GPU; or give --tiny")
    jobs = ceiling_jobs(options.tiny)
    for part in options.part or parts:
        jobs += parts[part](options.tiny)
    jobs = [job for job in jobs if options.only in job.row.case or job.row.part == "ceiling"]
    about = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "runtime": device.client.platform_version,
        "tiny": options.tiny,
    }
    print(about, f"{len(jobs)} programs", flush=True)
    done: list[Row] = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(jobs), BATCH):  # nothing compiles while something is timed
            run(jobs[start : start + BATCH], pool, options.seconds)
            done += [job.row for job in jobs[start : start + BATCH]]
            if options.out:
                options.out.write_text(
                    json.dumps(about | {"rows": [dataclasses.asdict(row) for row in done]}, indent=1)
                )
            print(f"{len(done)} rows at {time.perf_counter() - START:.0f} s", flush=True)
    print(table(done))
    bad = [row for row in done if not row.passed]
    print(f"{len(done) - len(bad)} of {len(done)} rows passed, {time.perf_counter() - START:.0f} s")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
