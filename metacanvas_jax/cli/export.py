"""``metacanvas export``."""

import argparse

from metacanvas_jax.cli import options

EXAMPLE = "metacanvas export --run runs/demo --to exports/demo --dtype bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--run", required=True, help="folder of a trained run")
    parser.add_argument("--to", required=True, help="new folder to write; appears when it is complete")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    parser.add_argument("--raw", action="store_true", help="the raw parameters, not their moving average")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    options.add_verify(parser)
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file, in GB (default: 5)")


def run(arguments: argparse.Namespace) -> None:
    """Writes what a run trained in the formats of PyTorch, PEFT and diffusers."""
    from metacanvas_jax.exchange.export_run import Options, export_run

    options.on_host()
    ema = False if arguments.raw else None
    how = Options(arguments.dtype, ema, arguments.step, arguments.shard_gb * 1e9, verify=arguments.verify)
    print(export_run(arguments.run, arguments.to, how))
