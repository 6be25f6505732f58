"""What `metacanvas sample` and `metacanvas edit` share: options, and the way from a request to a file."""

import argparse
import math
from pathlib import Path

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.errors import UserError

NAME_BYTES = 160  # of a file that is named after its prompt; file systems count bytes, not letters


def add_arguments(parser: argparse.ArgumentParser, count: int) -> None:
    """Where the networks come from, the shape of the result, and how it is drawn."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="folder of a trained run, local or gs://")
    source.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="config that names folders of weights; what has none starts fresh (--config.KEY=VALUE changes it)",
    )
    parser.add_argument("--out", help="PNG, or MP4 for videos (samples/PROMPT beside the run)")
    parser.add_argument("--count", type=int, default=count, help=f"results to draw, side by side (default: {count})")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result (default: 0)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the config's)")
    parser.add_argument("--size", metavar="ROWSxCOLUMNS", help="pixels of the result (default: the config's)")
    parser.add_argument("--frames", type=int, help="frames of the result (default: the config's)")
    parser.add_argument("--fps", type=float, help="frames a second of a video (default: the config's)")
    parser.add_argument("--no-canvas", action="store_true", help="leave the canvas out")
    options.add_verify(parser)
    options.add_mesh(parser)
    parser.add_argument("--tile", type=int, default=0, help="decode in tiles of so many latents a side (0: at once)")


def draw(arguments: argparse.Namespace, **media: object) -> Path:
    """Draws what the arguments ask for; returns the file. ``media`` are fields of ``requests.Request``."""
    check(arguments)
    from metacanvas_jax.config import read
    from metacanvas_jax.config.load import load_config
    from metacanvas_jax.paint import placing, requests, runs
    from metacanvas_jax.paint.painter import Painter

    if arguments.config is None and arguments.overrides:
        raise UserError("--config.KEY=VALUE changes a --config; the config of a --run is that of its training")
    config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    setup = runs.setup_of(arguments.run) if config is None else read.experiment(config)
    request = requests.Request(
        arguments.prompt, size=options.size(arguments.size), frames=arguments.frames, fps=arguments.fps, **media
    )
    sample, shape = requests.sample_of(setup, request)
    out = place(arguments, shape.frames > 1)
    files.check_writable(out)
    how = {
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "canvas": not arguments.no_canvas,
        "tile": arguments.tile,
    }
    options.keep_compiled()
    with options.connected(arguments) as writes:
        painter = Painter(setup)
        needs = painter.needs([shape], **how)
        mesh = placing.mesh_for(setup, needs, results=arguments.count, chosen=options.mesh(arguments.mesh))
        where = {"verify": arguments.verify, "mesh": mesh, "needs": needs, "painter": painter}
        trained = runs.load(arguments.run, **where) if config is None else runs.assembled(setup, **where)
        drawn = trained.paint([sample] * arguments.count, shape, seed=arguments.seed, **how)
        if writes:
            requests.save(drawn.pixels, shape.fps, out)
    return out


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers that make no sense."""
    for name, least in (("count", 1), ("steps", 1), ("frames", 1), ("tile", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}, expected at least {least}")
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise UserError(f"--guidance is {arguments.guidance}, expected a finite number")
    if not 0 <= arguments.seed < 1 << 64:
        raise UserError(f"--seed is {arguments.seed}, expected a number from 0 to {(1 << 64) - 1}")
    if arguments.fps is not None and not 0 < arguments.fps <= 1000:
        raise UserError(f"--fps is {arguments.fps}, expected a number above 0 and up to 1000")


def place(arguments: argparse.Namespace, video: bool) -> Path:
    """The file to write. Raises UserError for a name of another kind of file."""
    suffix = ".mp4" if video else ".png"
    if video:
        options.require("av", "media")
    if arguments.out is None:
        words = "_".join("".join(c if c.isalnum() else " " for c in arguments.prompt).split())[:80]
        words = words.encode()[:NAME_BYTES].decode(errors="ignore") or "empty"
        return files.folder(arguments.run or "") / "samples" / (words + suffix)
    out = files.folder(arguments.out)
    if out.suffix.lower() != suffix:
        raise UserError(f"--out is {arguments.out}, expected a {suffix} file")
    return out
