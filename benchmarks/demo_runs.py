"""Nine runs of the demo (three seeds on three kinds of processor), six runs without a canvas, and their table.

    python benchmarks/demo_runs.py --out benchmarks/results/demo          runs what is missing there, one after another
    python benchmarks/demo_runs.py --out benchmarks/results/demo --table  prints the table of what is there

Every finished run leaves one JSON file. A run that was stopped continues from its checkpoint; its ``seconds`` are those
of the last call. Text is trained alone twice: with as many steps as the demo has in all, without and with a canvas, and
with as many as fit into the seconds of these. The seed changes scenes and painter; the MLLM is the one that ships.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from peak_memory import measured

from metacanvas_jax.miniature import bars
from metacanvas_jax.miniature.demo import BASE

SEEDS = (0, 1, 2)
PROCESSORS = {
    "default": {},
    "avx2": {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"},
    "one_thread": {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"},
}
PROMPTS = 100  # per category and split
SPREADS = 3.0  # the last column of the table lies this many standard deviations of a single run below the mean


REQUIRED = bars.CATEGORIES | {"seen, all": bars.SEEN, "held out, all": bars.HELD_OUT, "shuffled": bars.SHUFFLED}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training with its scoring; ``steps`` None are the config's."""

    variant: str
    seed: int
    processor: str = "default"
    pace: str = ""  # of text only: "steps" or "seconds" are those of the canvas

    @property
    def name(self) -> str:
        parts = (self.variant, str(self.seed), self.processor, self.pace)
        return "_".join(part for part in parts if part)


def planned() -> list[Run]:
    """All runs: the nine of the demo, then those without a canvas."""
    nine = [Run("canvas", seed, processor) for processor in PROCESSORS for seed in SEEDS]
    return nine + [Run("text", seed, pace=pace) for pace in ("steps", "seconds") for seed in SEEDS]


def command(run: Run, work: Path, steps: int | None) -> list[str]:
    """The command of a run."""
    program = [sys.executable, "-m", "metacanvas_jax.cli.main"]
    words = ["demo", "--config", "configs/miniature.py:canvas"]
    if run.variant == "text":
        words = ["train", "--config", "configs/miniature.py:text"]
    changes = [
        f"--config.seed={run.seed}",
        f"--config.data.path={work / f'data_{run.seed}'}",
        f"--config.vae_weights={work / f'vae_{run.seed}'}",
        f"--config.eval.per_category={PROMPTS}",
        f"--config.eval.per_category_held_out={PROMPTS}",
    ]
    if steps is not None:
        changes += [f"--config.train.steps={steps}", f"--config.optimizer.total_steps={steps}"]
    return [*program, *words, "--workdir", str(work / run.name), *changes]


def one(run: Run, out: Path, work: Path) -> None:
    """Runs one training, or goes on with it, and writes its result."""
    steps = None
    if run.pace == "seconds":
        steps = equal_seconds(out, run.seed)
        if steps is None:
            print(f"{run.name}: waits for the runs it is compared with")
            return
    environment = os.environ | PROCESSORS[run.processor] | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    start = time.monotonic()
    code, peak = measured(command(run, work, steps), environment)
    folder = work / run.name
    if run.variant == "text" and code == 0:
        words = [sys.executable, "-m", "metacanvas_jax.cli.main", "evaluate", "--run", str(folder)]
        code, evaluated = measured(words, environment)
        peak = max(peak, evaluated)
    if not (folder / "scores.json").exists():
        print(f"{run.name}: ended with {code} and left no scores; the same command goes on")
        return
    parts = [pace(part) for part in (folder / BASE, folder) if part.exists()]
    steps = sum(count for count, _ in parts)
    result = {
        **dataclasses.asdict(run),
        "exit_code": code,
        "seconds": time.monotonic() - start,
        "peak_gib": peak,
        "steps": steps,
        "seconds_per_step": sum(count * seconds for count, seconds in parts) / steps,
        "parts": parts,
        "scores": json.loads((folder / "scores.json").read_text()),
    }
    (out / f"{run.name}.json").write_text(json.dumps(result, indent=1) + "\n")


def pace(folder: Path) -> tuple[int, float]:
    """The steps of a training, and the seconds of one of them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
    return max(row["step"] for row in rows), float(np.median(1 / np.asarray(rates)))


def results(out: Path) -> dict[str, dict]:
    """Finished runs by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def equal_seconds(out: Path, seed: int) -> int | None:
    """Steps of text only that take as long as those of the demo with this seed; None before both were measured.

    The demo's own steps without a canvas say nothing of it: the run beside them may have been another.
    """
    done = results(out)
    canvas, text = done.get(Run("canvas", seed).name), done.get(Run("text", seed, pace="steps").name)
    if canvas is None or text is None:
        return None
    return round(canvas["steps"] * canvas["seconds_per_step"] / text["seconds_per_step"])


def figures(result: dict) -> dict[str, float]:
    """The scores of a run by the rows of the table."""
    seen, held_out = result["scores"]["seen"], result["scores"]["held_out"]
    rows = dict(seen["categories"])
    rows |= {"seen, all": seen["pictures"], "held out, all": held_out["pictures"]}
    return rows | {"shuffled": max(seen["shuffled"] or 0.0, held_out["shuffled"] or 0.0)}


def missed(result: dict) -> list[str]:
    """The required scores that a run does not reach; the demo ends with exit code 0 where there are none."""
    reached = figures(result)
    short = [name for name, bar in REQUIRED.items() if name != "shuffled" and reached.get(name, 1.0) < bar]
    return short + ["shuffled"] * (reached["shuffled"] > bars.SHUFFLED)


def table(out: Path) -> str:
    """Mean, spread and lower end of every figure over the demo's runs, and the paired differences to text only."""
    done = results(out)
    demos = [figures(done[run.name]) for run in planned() if run.variant == "canvas" and run.name in done]
    lines = [f"{len(demos)} of 9 runs of the demo, {PROMPTS} prompts per category and split", ""]
    lines += ["| | mean | standard error | lowest | mean minus 3 deviations | required |", "|---|---|---|---|---|---|"]
    for name in demos[0] if demos else ():
        values = np.asarray([row[name] for row in demos])
        spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        cells = values.mean(), spread / np.sqrt(len(values)), values.min(), values.mean() - SPREADS * spread
        required = REQUIRED.get(name)
        shown = "" if required is None else f"{required:.2f}"
        lines.append(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} | {shown} |")
    lines += ["", "| canvas minus text only | seeds | seen | held out |", "|---|---|---|---|"]
    for pace in ("steps", "seconds"):
        pairs = [(Run("canvas", seed).name, Run("text", seed, pace=pace).name) for seed in SEEDS]
        pairs = [(figures(done[a]), figures(done[b])) for a, b in pairs if a in done and b in done]
        cells = [_difference(pairs, f"{split}, all") for split in ("seen", "held out")]
        lines.append(f"| equal {pace} | {len(pairs)} | {' | '.join(cells)} |")
    lines += [
        "",
        "| run | required scores missed | seconds | peak GiB | steps | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in done.items():
        cells = len(missed(row)), f"{row['seconds']:.0f}", f"{row['peak_gib']:.1f}", row["steps"]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {1000 * row['seconds_per_step']:.0f} |")
    return "\n".join(lines)


def _difference(pairs: list[tuple[dict, dict]], name: str) -> str:
    if len(pairs) < 2:
        return "-"
    values = np.asarray([a[name] - b[name] for a, b in pairs])
    return f"{values.mean():+.3f} +- {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo"), help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("runs/demo_runs"), help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--only", default="", help="run only what has this in its name")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for run in planned():
        if not arguments.table and arguments.only in run.name and not (arguments.out / f"{run.name}.json").exists():
            one(run, arguments.out, arguments.work)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
