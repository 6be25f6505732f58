"""Trains and scores every variant of configs/evidence.py with three seeds, and writes docs/results.md.

    python benchmarks/evidence.py             what is missing, one run after another; the same command goes on
    python benchmarks/evidence.py --collect   only docs/results.md and its plots, from the rows that are there

A finished run leaves one row, ``benchmarks/results/evidence/VARIANT_SEED.json``. A run takes three to five minutes on
two CPU cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import evidence_page
import jax
import numpy as np
from evidence_plan import EXPERIMENTS, SEEDS, VARIANTS, Variant

from configs import evidence

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks/results/evidence"
WORK = Path("runs/evidence")


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
    for words in (
        ("prepare", "--config", config, *changes),
        ("train", "--config", config, "--workdir", str(folder), *changes),
        ("evaluate", "--run", str(folder)),
    ):
        subprocess.run(command(*words), env=environment, check=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", action="store_true", help="write the page from the rows and run nothing")
    parser.add_argument("--only", default="", help="run only what has this in its name")
    arguments = parser.parse_args()
    ROWS.mkdir(parents=True, exist_ok=True)
    if not arguments.collect and not (Path(evidence.TEXT) / "params.json").exists():
        subprocess.run([sys.executable, str(ROOT / "benchmarks/evidence_text.py")], check=True)
    for variant, seed in planned():
        name = f"{variant.name}_{seed}"
        if not arguments.collect and arguments.only in name and not (ROWS / f"{name}.json").exists():
            print(f"── {name}", flush=True)
            one(variant, seed)
    evidence_page.write(ROOT / "docs", evidence_page.read(ROWS))


if __name__ == "__main__":
    main()
