"""Trains and scores every variant of configs/evidence*.py with three seeds, and writes docs/results.md.

    python benchmarks/evidence.py             what is missing, a run on each processor core; the same command goes on
    python benchmarks/evidence.py --pace      how long a step of each way of Fig. 4 takes, with nothing else running
    python benchmarks/evidence.py --collect   only docs/results.md and its plots, from the rows that are there

A finished run leaves one row, ``benchmarks/results/evidence/VARIANT_SEED.json``. What a run prints is in
``runs/evidence/VARIANT_SEED.log``. A run takes four to six minutes on one core and 3 GB of memory, one of edits or
videos three to twelve. With JAX for a GPU, the runs share the GPU: ``--jobs 8`` packs eight onto it (not tried yet).
"""

import argparse
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import evidence_page
import evidence_rows
import jax
import numpy as np
from evidence_plan import EXPERIMENTS, SEEDS, VARIANTS, Variant

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # configs/ of this checkout

from configs import evidence, evidence_tasks  # noqa: E402
from metacanvas_jax.task_table import TASKS  # noqa: E402

ROWS = ROOT / "benchmarks/results/evidence"
PACE = ROOT / "benchmarks/results/evidence_pace.json"
WORK = Path("runs/evidence")
PREPARING = threading.Lock()  # runs of one seed share their data


def planned() -> list[tuple[Variant, int]]:
    """Every run once: experiment by experiment, all variants of a seed before the next seed."""
    runs = [(VARIANTS[name], seed) for one in EXPERIMENTS for seed in SEEDS for name in one.variants]
    return list(dict.fromkeys(runs))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "metacanvas_jax.cli.main", *words]


def flags(variant: Variant, seed: int) -> list[str]:
    """The values of a run that differ from its config: those of the variant, the seed, and places of this seed."""
    changes = [*(f"--config.{key}={value}" for key, value in variant.changes), f"--config.seed={seed}"]
    if variant.file == "evidence":
        return [*changes, f"--config.data.path={WORK / f'data_{seed}'}", f"--config.vae_weights={WORK / f'vae_{seed}'}"]
    setup = evidence_tasks.get_config(variant.config)
    changes.append(f"--config.vae_weights={setup.vae_weights}_{seed}")
    return changes + [f"--config.sources[{number}].seed={seed}" for number in range(len(setup.sources))]


def one(variant: Variant, seed: int) -> None:
    """Trains and scores one run, or goes on with it, and writes its row. Raises CalledProcessError where it fails."""
    folder, row = WORK / f"{variant.name}_{seed}", ROWS / f"{variant.name}_{seed}.json"
    changes = flags(variant, seed)
    config = f"configs/{variant.file}.py:{variant.config}"
    # On a GPU a run takes the memory that it needs, and leaves the rest to the others.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with (WORK / f"{folder.name}.log").open("a") as log:
        with PREPARING:
            subprocess.run(command("prepare", "--config", config, *changes), stdout=log, stderr=log, check=True)
        for words in (
            ("train", "--config", config, "--workdir", str(folder), *changes),
            ("evaluate", "--run", str(folder)),
        ):
            subprocess.run(command(*words), env=environment, stdout=log, stderr=log, check=True)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True)
    result = {
        "variant": variant.name,
        "seed": seed,
        "steps": max(line["step"] for line in logged),
        "seconds_per_step": step_seconds(folder),
        "curve": [[line["step"], line["score"]] for line in logged if "score" in line],
        "scores": compact(json.loads((folder / "scores.json").read_text())),
        "commit": commit.stdout.strip(),
        "machine": machine(),
    }
    row.write_text(json.dumps(result, indent=1) + "\n")


def measure_pace() -> None:
    """Seconds of a step of each variant of Fig. 4: a whole training each, without scores, and nothing beside it.

    The MLLM reads a prompt when it comes for the first time. A short training would measure mostly this.
    """
    seconds: dict[str, list[float]] = {}
    for name in EXPERIMENTS[0].variants:
        folder = WORK / f"pace_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        places = {"data.path": WORK / "data_0", "vae_weights": WORK / "vae_0", "train.evaluate_every": 0}
        words = [f"--config.{key}={value}" for key, value in places.items()]
        config = f"configs/evidence.py:{VARIANTS[name].config}"
        with (WORK / "pace.log").open("a") as log:
            run = command("train", "--config", config, "--workdir", str(folder), *words)
            subprocess.run(run, stdout=log, stderr=log, check=True)
        seconds[name] = [step_seconds(folder, np.mean)]
        print(name, f"{1000 * seconds[name][0]:.0f} ms a step", flush=True)
    PACE.write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=1) + "\n")


def step_seconds(folder: Path, average: Callable = np.median) -> float:
    """The seconds of a step of a run."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float(average([1 / line["steps_per_second"] for line in logged if "steps_per_second" in line]))


def machine() -> str:
    """What the runs are made on."""
    python = platform.python_version()
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {python}, jax {jax.__version__}"


def compact(scores: dict) -> dict:
    """Scores of scenes as they are; of tasks the share of right results by task and kind, without each result.

    Of videos also the share of frames without a fault. A motion that no frame shows by itself does not count there.
    """
    if "results" not in scores:
        return scores
    tasks, kinds, frames = {}, {}, {}
    for task, results in scores["results"].items():
        right = {}
        for one in results:
            right.setdefault(one["kind"], []).append(not one["reasons"])
        tasks[task] = float(np.mean([value for group in right.values() for value in group]))
        prefix = "" if len(scores["results"]) == 1 else f"{task.replace('_', ' ')}: "
        kinds |= {f"{prefix}{kind}": float(np.mean(group)) for kind, group in sorted(right.items())}
        if TASKS[task].makes == "video":
            faulty = [
                {reason.split(":")[0] for reason in one["reasons"] if reason.startswith("frame ")} for one in results
            ]
            frames[task] = 1 - float(np.mean([len(numbers) for numbers in faulty])) / evidence_tasks.FRAMES
    counts = {task: len(results) for task, results in scores["results"].items()}
    return {"tasks": tasks, "kinds": kinds, "counts": counts} | ({"frames": frames} if frames else {})


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
    parser.add_argument("--pace", action="store_true", help="measure the pace of Fig. 4, then write the page")
    parser.add_argument("--only", default="", help="run only what has this in its name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one per core)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: at least one run at a time")
    failed: list[str] = []
    if arguments.pace:
        measure_pace()
    elif not arguments.collect:
        ROWS.mkdir(parents=True, exist_ok=True)
        WORK.mkdir(parents=True, exist_ok=True)
        for folder, words in ((evidence.TEXT, ()), (evidence_tasks.TEXT, ("--tasks",))):
            if not any(Path(folder).glob("*")):
                subprocess.run([sys.executable, str(ROOT / "benchmarks/evidence_text.py"), *words], check=True)
        named = [(run, f"{run[0].name}_{run[1]}") for run in planned()]
        failed = several(
            [run for run, name in named if arguments.only in name and not (ROWS / f"{name}.json").exists()],
            arguments.jobs,
        )
    evidence_page.write(ROOT / "docs", evidence_rows.read(ROOT / "benchmarks/results"))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}. The same command tries again")


if __name__ == "__main__":
    main()
