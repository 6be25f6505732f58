"""``metacanvas maps``."""

import argparse

from metacanvas_jax import files
from metacanvas_jax.cli import drawing, options
from metacanvas_jax.errors import UserError

FILM_FPS = 8.0
EXAMPLE = """metacanvas maps --run runs/demo --prompt "two red cats left of a blue car" --out maps.png
         metacanvas maps --run runs/video --prompt "a red kite rises" --frames 81 --out maps.gif"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--run", required=True, help="folder of a trained run with a canvas")
    parser.add_argument("--prompt", required=True, action="append", help="what to draw (repeatable: one row each)")
    parser.add_argument("--image", help="picture that a video begins with, or that --edit changes")
    parser.add_argument("--edit", action="store_true", help="change the --image")
    parser.add_argument("--reference", action="append", default=[], help="picture to show (repeatable)")
    parser.add_argument(
        "--out",
        help="PNG to write (RUN/maps.png, never an old file): a map per keyframe; of a video also GIF",
    )
    parser.add_argument("--moments", type=int, default=0, help="of pictures: a GIF of so many moments of the sampling")
    drawing.add_result(parser)
    options.add_checkpoint(parser)
    options.add_verify(parser)
    options.add_mesh(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draws prompts, and beside each result what the canvas adds, as colours: one map per keyframe."""
    from metacanvas_jax.paint import placing, requests, runs
    from metacanvas_jax.paint.painter import Painter
    from metacanvas_jax.report import canvas_maps, pictures

    drawing.check(arguments)
    setup = runs.setup_of(arguments.run)
    if setup.canvas is None:
        raise UserError(f"{arguments.run} has no canvas, of which maps could be made")
    media = {"image": arguments.image, "edit": arguments.edit, "references": tuple(arguments.reference)}
    media |= drawing.shape(arguments)
    made = [requests.sample_of(setup, requests.Request(prompt, **media)) for prompt in arguments.prompt]
    shape = made[0][1]
    if arguments.out is None:
        name, suffix = ("film", ".gif") if arguments.moments else ("maps", ".png")
        out = drawing.unused(files.folder(arguments.run), name, suffix)
    else:
        out = files.folder(arguments.out)
    if arguments.moments and (arguments.moments < 2 or shape.frames > 1):
        raise UserError(
            f"--moments is {arguments.moments}, expected 2 or more of a picture's sampling, not of a video's"
        )
    endings = (".gif",) if arguments.moments else (".png", ".gif") if shape.frames > 1 else (".png",)
    if out.suffix.lower() not in endings:
        raise UserError(f"--out is {arguments.out}, expected a {' or '.join(endings)} file")
    files.check_writable(out)
    how = {"steps": arguments.steps, "guidance": arguments.guidance, "maps": True, "moments": arguments.moments}
    options.keep_compiled()
    with options.connected(arguments) as writes:
        painter = Painter(setup)
        needs = painter.needs([shape], **how)
        mesh = placing.mesh_for(setup, needs, results=len(made), chosen=options.mesh(arguments.mesh))
        where = {"step": arguments.checkpoint, "mesh": mesh, "needs": needs, "painter": painter}
        trained = runs.load(arguments.run, verify=arguments.verify, **where)
        drawn = trained.paint([sample for sample, _ in made], shape, seed=arguments.seed, **how)
        if writes and out.suffix.lower() == ".gif":
            videos = zip(*canvas_maps.moving(drawn.pixels, drawn.canvas), strict=True)
            sheets = [pictures.grid(frames, arguments.prompt, columns=1) for frames in videos]
            files.write(out, pictures.gif(sheets, FILM_FPS if arguments.moments else shape.fps))
        elif writes:
            shown = canvas_maps.rows(drawn.pixels, drawn.canvas, setup.canvas.keyframes)
            files.write(out, pictures.png(pictures.grid(shown, arguments.prompt, columns=1)))
    print(out)
