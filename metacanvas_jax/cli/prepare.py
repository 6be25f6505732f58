"""``metacanvas prepare``."""

import argparse

from metacanvas_jax.cli import options

EXAMPLE = "metacanvas prepare --config configs/miniature.py --config.data.path=/data/scenes --config.data.count=50000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    options.add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the scenes (and pictures, if the config mixes them in), the tokenizer and the fitted autoencoder."""
    from metacanvas_jax import build, runs

    setup = build.experiment(options.load_config(arguments.config, arguments.overrides))
    for path in runs.prepare(setup):
        print(path)
