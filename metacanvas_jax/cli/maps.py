"""``metacanvas maps``."""

import argparse

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.errors import UserError

EXAMPLE = 'metacanvas maps --run runs/demo --prompt "two red cats left of a blue car" --out maps.png'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--run", required=True, help="folder of a trained run with a canvas")
    parser.add_argument("--prompt", required=True, action="append", help="what to draw (repeatable: one row each)")
    parser.add_argument("--image", help="picture that a video begins with, or that --edit changes")
    parser.add_argument("--edit", action="store_true", help="change the --image")
    parser.add_argument("--reference", action="append", default=[], help="picture to show (repeatable)")
    parser.add_argument("--out", help="PNG to write (RUN/maps.png)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result (default: 0)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the config's)")
    options.add_verify(parser)
    options.add_mesh(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draws prompts, and beside each result what the canvas adds, as colours: one map per latent frame."""
    from metacanvas_jax.paint import placing, requests, runs
    from metacanvas_jax.paint.painter import Painter
    from metacanvas_jax.report import pictures
    from metacanvas_jax.report.canvas_maps import rows

    if arguments.steps is not None and arguments.steps < 1:
        raise UserError(f"--steps is {arguments.steps}, expected at least 1")
    setup = runs.setup_of(arguments.run)
    if setup.canvas is None:
        raise UserError(f"{arguments.run} has no canvas, of which maps could be made")
    media = {"image": arguments.image, "edit": arguments.edit, "references": tuple(arguments.reference)}
    made = [requests.sample_of(setup, requests.Request(prompt, **media)) for prompt in arguments.prompt]
    shape = made[0][1]
    out = files.folder(arguments.out or files.join(arguments.run, "maps.png"))
    files.check_writable(out)
    how = {"steps": arguments.steps, "guidance": arguments.guidance, "maps": True}
    options.keep_compiled()
    with options.connected(arguments) as writes:
        painter = Painter(setup)
        needs = painter.needs([shape], **how)
        mesh = placing.mesh_for(setup, needs, results=len(made), chosen=options.mesh(arguments.mesh))
        trained = runs.load(arguments.run, verify=arguments.verify, mesh=mesh, needs=needs, painter=painter)
        drawn = trained.paint([sample for sample, _ in made], shape, seed=arguments.seed, **how)
        if writes:
            files.write(out, pictures.png(pictures.grid(rows(drawn.pixels, drawn.canvas), arguments.prompt, columns=1)))
    print(out)
