"""``metacanvas import``."""

import argparse

from metacanvas_jax.cli import options
from metacanvas_jax.config.load import load_config

EXAMPLE = "metacanvas import --from exports/demo --to runs/continued"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--from", dest="source", required=True, help="exported folder, state dict or model")
    parser.add_argument("--to", required=True, help="new folder to write; appears when it is complete")
    parser.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="config of the run it becomes (default: the exported one's); change a value with --config.KEY=VALUE",
    )


def run(arguments: argparse.Namespace) -> None:
    """Makes a run to go on training, or, of a folder of transformers or diffusers, parameters of this project."""
    from metacanvas_jax.errors import UserError
    from metacanvas_jax.exchange import import_model, import_run

    options.on_host()
    config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    if config is None and arguments.overrides:
        raise UserError("values are set on a config: give --config FILE as well")
    if import_model.is_model(arguments.source):
        print(import_model.import_model(arguments.source, arguments.to))
    else:
        print(import_run.import_run(arguments.source, arguments.to, config))
