"""Trains and scores every variant of configs/evidence.py with three seeds, and writes docs/results.md.

    python benchmarks/evidence.py             what is missing, a run on each processor core; the same command goes on
    python benchmarks/evidence.py --collect   only docs/results.md and its plots, from the rows that are there

A finished run leaves one row, ``benchmarks/results/evidence/VARIANT_SEED.json``. What a run prints is in
``runs/evidence/VARIANT_SEED.log``. A run takes four to six minutes on one core and 3 GB of memory.
"""

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import evidence_page
import jax
import numpy as np
from evidence_plan import EXPERIMENTS, SEEDS, VARIANTS, Variant

from configs import evidence

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks/results/evidence"
WORK = Path("runs/evidence")
PREPARING = threading.Lock()  # runs of one seed share their data


def planned() -> list[tuple[Variant, int]]:
    """Every run once: experiment by experiment, all variants of a seed before the next seed."""
    runs = [(VARIANTS[name], seed) for one in EXPERIMENTS for seed in SEEDS for name in one.variants]
    return list(dict.fromkeys(runs))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "metacanvas_jax.cli.main", *words]


def one(variant: Variant, seed: int) -> None:
    """Trains and scores one run, or goes on with it, and writes its row. Raises CalledProcessError where it fails."""
    folder, row = WORK / f"{variant.name}_{seed}", ROWS / f"{variant.name}_{seed}.json"
    changes = [f"--config.{key}={value}" for key, value in variant.changes]
    changes += [
        f"--config.seed={seed}",
        f"--config.data.path={WORK / f'data_{seed}'}",
        f"--config.vae_weights={WORK / f'vae_{seed}'}",
    ]
    config = f"configs/evidence.py:{variant.config}"
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    with (WORK / f"{folder.name}.log").open("a") as log:
        with PREPARING:
            subprocess.run(command("prepare", "--config", config, *changes), stdout=log, stderr=log, check=True)
        for words in (
            ("train", "--config", config, "--workdir", str(folder), *changes),
            ("evaluate", "--run", str(folder)),
        ):
            subprocess.run(command(*words), env=environment, stdout=log, stderr=log, check=True)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["steps_per_second"] for line in logged if "steps_per_second" in line]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True)
    result = {
        "variant": variant.name,
        "seed": seed,
        "steps": max(line["step"] for line in logged),
        "seconds_per_step": float(np.median(1 / np.asarray(rates))),
        "curve": [[line["step"], line["score"]] for line in logged if "score" in line],
        "scores": json.loads((folder / "scores.json").read_text()),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"jax {jax.__version__}",
    }
    row.write_text(json.dumps(result, indent=1) + "\n")


def several(runs: Sequence[tuple[Variant, int]], jobs: int) -> list[str]:
    """Makes ``runs``, ``jobs`` at a time, each on cores of its own. Returns the names of those that failed."""
    waiting: queue.SimpleQueue[tuple[Variant, int]] = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)
    failed: list[str] = []
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def worker(index: int) -> None:
        if mine := cores[index::jobs]:
            os.sched_setaffinity(0, mine)  # of this thread, and of the processes that it starts
        while True:
            try:
                variant, seed = waiting.get_nowait()
            except queue.Empty:
                return
            start, name = time.monotonic(), f"{variant.name}_{seed}"
            try:
                one(variant, seed)
                print(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes; {waiting.qsize()} runs wait", flush=True)
            except subprocess.CalledProcessError as error:
                failed.append(name)
                print(f"{name} failed with exit code {error.returncode}: see {WORK / name}.log", flush=True)

    workers = [threading.Thread(target=worker, args=(index,)) for index in range(jobs)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", action="store_true", help="write the page from the rows and run nothing")
    parser.add_argument("--only", default="", help="run only what has this in its name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one per core)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: at least one run at a time")
    failed: list[str] = []
    if not arguments.collect:
        ROWS.mkdir(parents=True, exist_ok=True)
        WORK.mkdir(parents=True, exist_ok=True)
        if not (Path(evidence.TEXT) / "params.json").exists():
            subprocess.run([sys.executable, str(ROOT / "benchmarks/evidence_text.py")], check=True)
        named = [(run, f"{run[0].name}_{run[1]}") for run in planned()]
        failed = several(
            [run for run, name in named if arguments.only in name and not (ROWS / f"{name}.json").exists()],
            arguments.jobs,
        )
    evidence_page.write(ROOT / "docs", evidence_page.read(ROWS))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}. The same command tries again")


if __name__ == "__main__":
    main()
