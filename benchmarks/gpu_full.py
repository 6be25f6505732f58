"""Trains the shipped configs at published sizes on one GPU, and the same jobs in PyTorch on the same GPU.

    python benchmarks/gpu_full.py --list                              # the stages, the most valuable first
    python benchmarks/gpu_full.py --run t2i_scratch.step --out OUT --place PLACE
    python benchmarks/gpu_full.py --table OUT                         # what was measured so far
    python benchmarks/gpu_full.py --plan t2i_lora --topology h200:1 --out OUT               # needs no GPU
    python benchmarks/gpu_full.py --run t2i_scratch.step --out OUT --place PLACE --tiny     # on a CPU, in seconds

``benchmarks/gpu_session.sh`` runs all of them, each in a process of its own: peak memory and time to the first step are
those of a process. Several stages after ``--run`` share one, which is enough to try them. A stage writes
``OUT/CASE.STAGE.json``. PLACE gets the published folders, with random weights (``CASE.folders`` writes them),
checkpoints and compiled programs; nothing is downloaded. Stages of a case:

    folders               writes published folders and an export; the other stages write what they miss of them
    step, torch_step      the step of `metacanvas plan` on latents: import, time to the first step, 20 steps, memory
    dit, torch_dit        forward pass, backward pass and update of the DiT alone
    training              20 steps of the training itself, with a checkpoint; the second half again, with equal losses
    drawing, export       of that run

``--plan`` writes what `metacanvas plan` says of the same step to ``OUT/CASE.plan.json``; the table then sets it beside
the measurement. docs/gpu.md says how the two sides correspond.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs/ of this checkout

CASES = ("t2i_scratch", "t2i_lora", "image_editing", "video_25", "video_25_cross", "image_editing_2", "video_121")
ORDER = (
    *("t2i_scratch.folders", "t2i_scratch.step", "t2i_scratch.torch_step", "t2i_scratch.dit", "t2i_scratch.torch_dit"),
    *("t2i_lora.folders", "t2i_lora.step", "t2i_lora.torch_step", "t2i_lora.training"),
    *("t2i_lora.drawing", "t2i_lora.export"),
    *("video_25.folders", "video_25.step", "video_25.torch_step", "video_25.dit", "video_25.torch_dit"),
    *("video_25_cross.folders", "video_25_cross.step", "video_25_cross.torch_step"),
    *("video_121.folders", "video_121.step", "video_121.torch_step", "video_121.dit", "video_121.torch_dit"),
    *("image_editing.folders", "image_editing.step", "image_editing.torch_step"),
    *("image_editing.dit", "image_editing.torch_dit"),
    *("image_editing_2.folders", "image_editing_2.step", "image_editing_2.torch_step"),
    *("t2i_lora.dit", "t2i_lora.torch_dit"),
    *("t2i_scratch.training", "t2i_scratch.drawing", "t2i_scratch.export"),
    *("image_editing.training", "image_editing.drawing", "image_editing.export"),
    *("video_25_cross.training", "video_25_cross.drawing", "video_25_cross.export"),
)
"""Every stage once, the most valuable first; a stage comes after those that it needs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the stages in their order")
    what.add_argument("--run", choices=ORDER, nargs="+", metavar="CASE.STAGE", help="run stages in this process")
    what.add_argument("--plan", choices=CASES, nargs="+", metavar="CASE", help="plan the step of cases, without a GPU")
    what.add_argument("--table", type=Path, metavar="OUT", help="print what the files of OUT say")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the results (gpu_results)")
    parser.add_argument("--place", type=Path, default=Path("gpu_work"), help="folder of weights and runs (gpu_work)")
    parser.add_argument("--topology", default="h200:1", help="what --plan plans for (h200:1)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    options = parser.parse_args()
    if options.list:
        print("\n".join(ORDER))
    elif options.plan:
        for case in options.plan:
            print(planned(case, options.topology, options.out, options.place.absolute(), options.tiny))
    elif options.table is not None:
        print(table(options.table))
    else:
        raise SystemExit(max([run(name, options.out, options.place.absolute(), options.tiny) for name in options.run]))


def run(name: str, out: Path, place: Path, tiny: bool) -> int:
    """Runs a stage and writes its file; a failure is written as well. Returns the exit code."""
    case_name, stage = name.split(".")
    on_torch = stage.startswith("torch_")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if on_torch or stage == "folders" or tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the GPU's memory belongs to PyTorch; here JAX only computes shapes
    if tiny:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # what is tried is not timed
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    start, result = time.time(), {"name": name, "tiny": tiny, "date": time.strftime("%Y-%m-%d")}
    try:
        result |= about(on_torch) | staged(case_name, stage, place, tiny)
    except Exception as error:  # whatever it is, the other stages go on
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result["failed"] = f"{type(error).__name__}: {lines[0][:300]}"
    result["wall_s"] = time.time() - start
    keep(out, name, result)
    print(json.dumps(result))
    return 1 if "failed" in result else 0


def planned(case_name: str, topology: str, out: Path, place: Path, tiny: bool) -> str:
    """Plans the step of a case, writes the file of the plan, and returns its report as text."""
    from metacanvas_jax.plan.environment import prepare_environment

    prepare_environment()  # before JAX is imported
    case = importlib.import_module("gpu_full_cases").CASES[case_name]
    report = importlib.import_module("gpu_full_plan").planned(case, topology, place, tiny)
    keep(out, f"{case_name}.plan", {"name": f"{case_name}.plan", "tiny": tiny} | report.to_dict())
    return importlib.import_module("metacanvas_jax.plan.report").table(report)


def keep(out: Path, name: str, result: dict[str, Any]) -> None:
    """Writes the file of a result, atomically."""
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f".{name}.json"
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(out / f"{name}.json")


def staged(case_name: str, stage: str, place: Path, tiny: bool) -> dict[str, Any]:
    """What a stage measures."""
    case = importlib.import_module("gpu_full_cases").CASES[case_name]
    written = importlib.import_module("gpu_full_folders").write_folders(case, place / "folders", tiny)
    if stage == "folders":
        return {"written_GB": written}
    module = importlib.import_module("gpu_full_torch" if stage.startswith("torch_") else "gpu_full_ours")
    return module.STAGES[stage](case, place, tiny)


def about(on_torch: bool) -> dict[str, Any]:
    """Device and versions."""
    if on_torch:
        import diffusers
        import torch
        import transformers

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        return {"device": device, "versions": versions | {"transformers": transformers.__version__}}
    import jax

    return {"device": jax.devices()[0].device_kind, "versions": {"jax": jax.__version__}}


def table(out: Path) -> str:
    """Everything in a folder of results, as Markdown."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    devices = sorted({row["device"] for row in found.values() if "step_s" in row and "device" in row})
    versions: dict[str, str] = {}
    for row in found.values():
        versions |= row.get("versions", {})
    lines = [f"{', '.join(devices)}; {', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}", ""]
    lines += ["| | step, ms | PyTorch, ms | ratio | MFU | GiB | PyTorch, GiB | first step, s | PyTorch, s |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [pair(found, case, stage) for case in CASES for stage in ("step", "dit") if f"{case}.{stage}" in found]
    plans = [case for case in CASES if f"{case}.plan" in found]
    if plans:
        lines += [
            "",
            "| | planned for | plan, ms | measured / plan | plan, GiB | measured / plan |",
            "|---|---|---|---|---|---|",
        ]
        lines += [beside_plan(case, found[f"{case}.plan"], found.get(f"{case}.step", {})) for case in plans]
    lines += ["", "| | result |", "|---|---|"]
    for name in ORDER:
        row = found.get(name)
        if row is not None and name.split(".")[1] not in ("step", "dit", "torch_step", "torch_dit"):
            lines.append(f"| {name} | {said(row)} |")
    return "\n".join(lines)


def pair(found: dict[str, Any], case: str, stage: str) -> str:
    """A line of the table: ours beside PyTorch. Above 1 the ratio says that ours is faster."""
    ours, theirs = found[f"{case}.{stage}"], found.get(f"{case}.torch_{stage}", {"failed": "not run"})
    trained = {row["trained"] for row in (ours, theirs) if "trained" in row}
    if len(trained) > 1:
        return f"| {case}, {stage} | NOT THE SAME JOB: {trained} parameters train | | | | | | | |"
    cells = [f"{case}, {'whole step' if stage == 'step' else 'DiT alone'}"]
    cells += [f"{1e3 * row['step_s']:.1f}" if "step_s" in row else said(row) for row in (ours, theirs)]
    both = "step_s" in ours and "step_s" in theirs
    cells.append(f"{theirs['step_s'] / ours['step_s']:.2f} x" if both else "")
    known = "step_s" in ours and ours.get("peak_flops")
    cells.append(f"{ours['flops'] / ours['step_s'] / ours['peak_flops']:.1%}" if known else "")
    for key, form in (("peak_GiB", ".1f"), ("first_step_s", ".0f")):
        cells += [f"{row[key]:{form}}" if row.get(key) is not None else "" for row in (ours, theirs)]
    return f"| {' | '.join(cells)} |"


def beside_plan(case: str, plan: dict[str, Any], measured: dict[str, Any]) -> str:
    """A line of the table: the plan of a step, and the measurement over it where both are of the same GPU and sizes."""
    from metacanvas_jax.hardware import chip_of

    chip = chip_of(measured.get("device", ""))
    same = chip is not None and chip.name == plan["chip"] and plan["devices"] == 1
    same = same and measured.get("tiny", False) == plan["tiny"]
    figures = ((1e3 * plan["seconds"], 1e3 * measured.get("step_s", 0.0), ".1f"),)
    figures += ((plan["needed"] / 2**30, measured.get("peak_GiB") or 0.0, ".1f"),)
    cells = [f"{case}, whole step", plan["topology"]]
    for planned, found, form in figures:
        cells.append(f"{planned:{form}}" if planned else plan["verdict"])
        cells.append(f"{found / planned:.2f} x" if same and planned and found else "")
    return f"| {' | '.join(cells)} |"


def said(row: dict[str, Any]) -> str:
    """What a stage that is no pair of steps found."""
    for key in ("failed", "left_out"):
        if key in row:
            return f"{key.replace('_', ' ')}: {row[key]}"
    dull = ("name", "tiny", "date", "device", "versions", "peak_flops", "wall_s")
    shown = {key: value for key, value in row.items() if key not in dull and value is not None}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


if __name__ == "__main__":
    main()
