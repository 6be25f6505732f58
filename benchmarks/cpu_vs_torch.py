"""One block forward + backward of each diffusion transformer and one decode of each autoencoder, against diffusers.

    python benchmarks/cpu_vs_torch.py [--threads 2] [--rounds 9] [--clock wall] [--only wan,flux] [--no-compile]

Both frameworks get the same cores (the process is pinned before they start), float32, the same weights and inputs;
outputs and input gradients are compared first. Ours runs under ``jax.jit``, diffusers eagerly and under
``torch.compile``. The three take turns. A time is the best of all rounds, because other load on the machine can only
add to it. A ratio is the median of the ratios of the rounds, whose runs see the same load; above 1 ours is faster. On a
machine with other load, ``--threads 1 --clock cpu`` counts the CPU seconds of the process, as on an idle machine. Needs
the [torch] extra and a C++ compiler.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from cpu_cases import CASES, Case

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="time that passed, or that the process ran")
    parser.add_argument("--only", default="", help="cases whose name holds one of these words, by comma")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: its compilation is slow")
    parser.add_argument("--json", help="also write the table here")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ.update(OMP_NUM_THREADS=str(args.threads), JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")

    import jax
    import torch

    torch.set_num_threads(args.threads)
    words = [word for word in args.only.split(",") if word]
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, threads: {args.threads}, {args.clock} time, "
        f"best of {args.rounds} rounds"
    )
    titles = ("ours ms", "eager ms", "compile ms", "eager/ours", "compile/ours", "differ")
    print(f"{'case':26}", *(f"{title:>12}" for title in titles))
    rows = []
    for name, build in CASES.items():
        if words and not any(word in name for word in words):
            continue
        row = measure(name, build(), args.rounds, CLOCKS[args.clock], not args.no_compile)
        rows.append(row)
        shown = [row[key] for key in ("ours", "eager", "compiled", "eager_ratio", "compiled_ratio")]
        cells = ["-" if value is None else f"{value:.2f}" for value in shown]
        print(f"{name:26}", *(f"{cell:>12}" for cell in (*cells, f"{row['differ']:.1e}")), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


def measure(name: str, case: Case, rounds: int, clock: Callable[[], float], compiled: bool) -> dict[str, Any]:
    import torch

    runs = {"ours": case.run_ours, "eager": lambda: case.run_torch(case.torch_module)}
    if compiled:
        module = torch.compile(case.torch_module)
        runs["compiled"] = lambda: case.run_torch(module)
    ours, eager = (runs[key]() for key in ("ours", "eager"))  # also compiles
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for key, run in runs.items():
            start = clock()
            run()
            seconds[key].append(clock() - start)
    best = {key: 1e3 * min(values) for key, values in seconds.items()}
    return {
        "case": name,
        "ours": best["ours"],
        "eager": best["eager"],
        "compiled": best.get("compiled"),
        "eager_ratio": ratio(seconds["eager"], seconds["ours"]),
        "compiled_ratio": ratio(seconds["compiled"], seconds["ours"]) if compiled else None,
        "differ": max(relative(a, b) for a, b in zip(ours, eager, strict=True)),
    }


def ratio(other: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(other, ours, strict=True))


def relative(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected value."""
    import numpy as np

    actual, expected = np.asarray(actual), np.asarray(expected)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    main()
