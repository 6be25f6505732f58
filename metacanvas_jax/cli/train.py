"""``metacanvas train``."""

import argparse

from metacanvas_jax.cli import options
from metacanvas_jax.config.load import load_config

EXAMPLE = """metacanvas train --config configs/miniature.py:canvas --workdir runs/canvas --config.train.steps=500
         metacanvas train --config configs/t2i_scratch.py:miniature --data my_pictures --workdir runs/mine"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser)
    parser.add_argument(
        "--data", metavar="FOLDER", help="your own samples in place of the config's sources (docs/your_data.md)"
    )
    parser.add_argument(
        "--workdir", help="folder of the run, or gs://BUCKET/PATH; continued if it holds one (runs/NAME)"
    )
    parser.add_argument(
        "--profile", metavar="START:STOP", help="trace these steps into WORKDIR/profile, for TensorBoard's profiler"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="show the run in this project of Weights & Biases as well")
    options.add_verify(parser)
    options.add_processes(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains; an understanding MLLM is also saved as ``weights``, ready to be frozen."""
    from metacanvas_jax.config import paths
    from metacanvas_jax.launch import own_data
    from metacanvas_jax.launch.training import train
    from metacanvas_jax.parallel.distributed import together
    from metacanvas_jax.train.profiling import parse_steps

    if arguments.wandb is not None:
        options.require("wandb", "wandb")
    profile = None if arguments.profile is None else parse_steps(arguments.profile)
    config = load_config(arguments.config, arguments.overrides)
    workdir = paths.workdir(config, arguments.workdir, config.name)
    with together(arguments.processes, arguments.coordinator, arguments.process, arguments.timeout):
        notes = None
        if arguments.data is not None:
            notes = own_data.use(config, arguments.data, workdir, arguments.overrides)
        how = {"profile": profile, "verify": arguments.verify, "wandb": arguments.wandb, "notes": notes}
        train(config, workdir, compiled=workdir / "compiled", **how)
    print(workdir)
