"""``metacanvas plan``."""

import argparse
import sys

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.config.load import load_config

EXAMPLE = "metacanvas plan --config configs/video_stage3.py --topology v5p:4x4x8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser)
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="TPU slice, as in v6e:16x16, or v6e:16x16*2 for two; or GPUs, as in h100:8 (the config's first)",
    )
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="sizes of data, fsdp, context, tensor (the config's)")
    parser.add_argument("--bucket", metavar="NAME", help="bucket to compile, or 'all' (the most expensive)")
    parser.add_argument(
        "--search", type=int, nargs="?", const=8, default=0, metavar="N", help="compare meshes, compiling at most N (8)"
    )
    parser.add_argument(
        "--pixels", action="store_true", help="encode pixels in the step (slow to compile) instead of reading latents"
    )
    parser.add_argument("--sampling", action="store_true", help="also compile sampling (of videos: slow)")
    parser.add_argument("--out", metavar="FOLDER", help="also write plan.json and plan.html there")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; the exit code is 1 when something does not fit."""
    from metacanvas_jax.plan.environment import prepare_environment

    prepare_environment()
    from metacanvas_jax.plan import planning

    config = load_config(arguments.config, arguments.overrides)
    reports = planning.plan(
        arguments.config,
        config,
        topology=arguments.topology,
        mesh=arguments.mesh,
        bucket=arguments.bucket,
        sampling=arguments.sampling,
        pixels=arguments.pixels,
        budget=arguments.search,
        out=None if arguments.out is None else files.folder(arguments.out),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return 0 if all(report.passed for report in reports) else 1
