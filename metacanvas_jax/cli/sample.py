"""``metacanvas sample``."""

import argparse

from metacanvas_jax import files
from metacanvas_jax.cli import drawing
from metacanvas_jax.errors import UserError

EXAMPLE = """metacanvas sample --run runs/demo --prompt "two red cats left of a blue car"
         metacanvas sample --run runs/demo --prompt "a red cat" --prompt "a blue car" --out pictures
         metacanvas sample --run runs/t2i --prompts prompts.jsonl --out pictures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--prompt", action="append", default=[], help="what to draw (repeatable, with a folder --out)")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line, or JSONL (docs/evaluation.md)")
    parser.add_argument("--image", help="picture that a video begins with")
    parser.add_argument("--reference", action="append", default=[], help="picture to show (repeatable)")
    parser.add_argument("--batch", type=int, help="of several prompts: results that each device draws at once")
    drawing.add_arguments(parser, count="4 of one prompt, 1 of several")


def run(arguments: argparse.Namespace) -> None:
    """Draws one prompt several times into one file, or many prompts into a folder."""
    media = {"image": arguments.image, "references": tuple(arguments.reference)}
    if bool(arguments.prompt) == bool(arguments.prompts):
        raise UserError("give --prompt, once or several times, or a file of --prompts")
    if arguments.prompts is None and len(arguments.prompt) == 1:
        if arguments.batch is not None:
            raise UserError("--batch has no effect: there is one prompt, of which --count results are drawn at once")
        arguments.count = 4 if arguments.count is None else arguments.count
        print(drawing.draw(arguments, arguments.prompt[0], **media))
        return
    from metacanvas_jax.evaluate import prompt_lines
    from metacanvas_jax.paint.requests import Request

    arguments.count = 1 if arguments.count is None else arguments.count
    shared = Request("", **drawing.shape(arguments))
    if arguments.prompts is not None:
        if any(media.values()):
            raise UserError("--image and --reference go with --prompt: the lines of --prompts name their media")
        lines = prompt_lines.read(files.folder(arguments.prompts), shared)
    else:
        lines = prompt_lines.given(arguments.prompt, shared, **media)
    print(drawing.draw_lines(arguments, lines))
