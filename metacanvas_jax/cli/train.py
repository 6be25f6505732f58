"""``metacanvas train``."""

import argparse
from pathlib import Path

from metacanvas_jax.cli import options

EXAMPLE = "metacanvas train --config configs/miniature.py:canvas --workdir runs/canvas --config.train.steps=500"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser)
    parser.add_argument("--workdir", type=Path, help="folder of the run, continued if it holds one (runs/NAME)")


def run(arguments: argparse.Namespace) -> None:
    """Trains; an understanding MLLM is also saved as ``weights``, ready to be frozen."""
    from metacanvas_jax import runs

    config = options.load_config(arguments.config, arguments.overrides)
    workdir = arguments.workdir or Path("runs") / config.name
    runs.train(config, workdir)
    print(workdir)
