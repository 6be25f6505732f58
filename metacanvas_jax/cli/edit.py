"""``metacanvas edit``."""

import argparse

from metacanvas_jax.cli import drawing

EXAMPLE = 'metacanvas edit --run runs/image_editing --image cat.png --prompt "make the cat blue" --out blue.png'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--prompt", required=True, help="what to change")
    parser.add_argument("--image", help="picture to change")
    parser.add_argument("--video", help="video to change (MP4 or WebM)")
    drawing.add_arguments(parser, count="1")


def run(arguments: argparse.Namespace) -> None:
    """Changes a picture or a video as the prompt says."""
    arguments.count = 1 if arguments.count is None else arguments.count
    print(drawing.draw(arguments, arguments.prompt, image=arguments.image, video=arguments.video, edit=True))
