"""``metacanvas sample``."""

import argparse

from metacanvas_jax.cli import drawing

EXAMPLE = 'metacanvas sample --run runs/demo --prompt "two red cats left of a blue car"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--image", help="picture that a video begins with")
    parser.add_argument("--reference", action="append", default=[], help="picture to show (repeatable)")
    drawing.add_arguments(parser, count=4)


def run(arguments: argparse.Namespace) -> None:
    """Draws one prompt several times."""
    print(drawing.draw(arguments, image=arguments.image, references=tuple(arguments.reference)))
