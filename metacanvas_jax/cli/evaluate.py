"""``metacanvas evaluate``."""

import argparse
from pathlib import Path

EXAMPLE = "metacanvas evaluate --run runs/demo --guidance 1.5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the config's)")
    parser.add_argument("--out", type=Path, help="JSON to write (RUN/scores.json)")


def run(arguments: argparse.Namespace) -> None:
    """Draws the evaluation prompts, judges the pictures and prints the score of every category."""
    from metacanvas_jax import runs

    trained = runs.load(arguments.run)
    scored = trained.evaluate(guidance=arguments.guidance)
    out = arguments.out or arguments.run / "scores.json"
    scored.save(out)
    print(scored.table())
    print(out)
