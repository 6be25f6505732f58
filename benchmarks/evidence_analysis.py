"""Why the comparisons come out as they do: what goes wrong in pictures, and what a canvas says.

    python benchmarks/evidence_analysis.py     15 minutes on two CPU cores; goes on if stopped

It draws the evaluation prompts of finished runs again and writes ``benchmarks/results/evidence_analysis.json`` and
``docs/results/maps.png``. ``benchmarks/evidence.py --collect`` puts both on the page.

*Faults*: of the pictures of seen prompts, the share in which something is missing, there is something else, a colour or
a place is wrong. *Probe*: a ridge regression from what the canvas adds to a patch, to how likely a drawing of the
prompt's first group lies there (``worlds/facts.py``). It is fitted on every second prompt; R² is that of the others.
"""

import json
from pathlib import Path

import evidence
import matplotlib
import numpy as np
from evidence_plan import SEEDS
from jaxtyping import Float

from metacanvas_jax.evaluate import scenes
from metacanvas_jax.paint.runs import load
from metacanvas_jax.report.canvas_maps import canvas_maps, laid_over
from metacanvas_jax.worlds.facts import Facts
from metacanvas_jax.worlds.judge import Judge

matplotlib.use("Agg")
from matplotlib import pyplot

OUT = evidence.ROOT / "benchmarks/results/evidence_analysis.json"
FAULTS = ("missing", "something else", "colour", "place")
DRAWN = ("canvas", "canvas_only", "text")
PROBED = ("canvas", "canvas_only", "no_time", "no_dit_block", "no_vanilla_block", "one_row", "like_text", "mllm_lora")
RIDGE = 1e-3  # of the mean square of the features
SHOWN = 6  # right pictures, and as many wrong ones


def fault(reason: str) -> str:
    """The kind of one of the judge's reasons (``worlds/judge.py``)."""
    if reason.startswith("found"):
        return "something else"
    if reason.startswith("expected") and ", found " in reason:
        return "missing" if reason.split()[1].isdigit() else "colour"
    return "place"


def explained(features: Float[np.ndarray, "n d"], wanted: Float[np.ndarray, " n"], known: np.ndarray) -> float:
    """R² of a ridge regression on the rows that are not ``known`` to it."""
    mean, middle = features[known].mean(0), wanted[known].mean()
    x, y = features[known] - mean, wanted[known] - middle
    penalty = RIDGE * np.mean(np.square(x)) * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + penalty, x.T @ y)
    left = wanted[~known] - middle - (features[~known] - mean) @ weights
    return float(1 - np.mean(np.square(left)) / np.var(wanted[~known]))


def picture(drawn, made, reasons: list[tuple[str, ...]], path: Path) -> None:
    """Right pictures above wrong ones, each beside its canvas map."""
    layouts = [i for i, scene in enumerate(made) if len(scene.request.groups) > 1 or scene.request.groups[0].place]
    spread = [layouts[i] for i in np.random.default_rng(0).permutation(len(layouts))]
    rows = [[i for i in spread if bool(reasons[i]) == wrong][:SHOWN] for wrong in (False, True)]
    maps = canvas_maps(drawn.canvas[:, :1], shared=True)
    figure, axes = pyplot.subplots(4, SHOWN, figsize=(2.2 * SHOWN, 10), dpi=110)
    for row, chosen in enumerate(rows):
        for column, i in enumerate(chosen):
            shown = drawn.pixels[i, 0]
            words = made[i].prompt.replace(" and ", " and\n").replace(" in the ", "\nin the ")
            title = words if not row else f"{words}\n{reasons[i][0]}"
            axes[2 * row, column].imshow(shown)
            axes[2 * row, column].set_title(title, fontsize=7)
            axes[2 * row + 1, column].imshow(laid_over(maps[i, 0], shown))
    for one in axes.flat:
        one.axis("off")
    figure.tight_layout(h_pad=2.5)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def looked_at(name: str, seed: int) -> dict[str, object]:
    """What is found of one run: the shares of its faults, and what its canvas explains."""
    trained, found = load(evidence.WORK / f"{name}_{seed}"), {}
    made = scenes.prompts(trained.setup, "seen")
    steps = None if name in DRAWN else 1  # what the canvas adds does not depend on the sampling
    has_canvas = trained.setup.canvas is not None
    drawn = trained.draw([scene.prompt for scene in made], seed=trained.setup.eval.seed, steps=steps, maps=has_canvas)
    if name in DRAWN:
        judge = Judge(trained.setup.world)
        reasons = [judge.verdict(x, y.metadata).reasons for x, y in zip(drawn.pixels[:, 0], made, strict=True)]
        kinds = [{fault(reason) for reason in one} for one in reasons]
        found["faults"] = {kind: float(np.mean([kind in one for one in kinds])) for kind in FAULTS}
        if (name, seed) == ("canvas", SEEDS[0]):
            picture(drawn, made, reasons, evidence.ROOT / "docs/results/maps.png")
    if name in PROBED:
        facts = Facts(trained.setup.world)
        wanted = np.stack([facts.chances(scene.request)[:, 0].sum(-1) for scene in made]).astype(np.float64)
        features = drawn.canvas[:, 0].reshape(wanted.size, -1).astype(np.float64)
        known = np.repeat(np.arange(len(made)) % 2 == 0, wanted.shape[1])
        found["probe"] = explained(features, wanted.reshape(-1), known)
    return found


def main() -> None:
    rows = json.loads(OUT.read_text()) if OUT.exists() else {"faults": {}, "probe": {}}
    (evidence.ROOT / "docs/results").mkdir(exist_ok=True)
    for name in dict.fromkeys((*DRAWN, *PROBED)):
        for seed in SEEDS:
            if any(str(seed) in of.get(name, {}) for of in rows.values()):
                continue
            if not (evidence.ROWS / f"{name}_{seed}.json").exists():
                print(f"{name}_{seed} was not run", flush=True)
                continue
            found = looked_at(name, seed)
            for part, value in found.items():
                rows[part].setdefault(name, {})[str(seed)] = value
            OUT.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{name}_{seed}", found, flush=True)


if __name__ == "__main__":
    main()
