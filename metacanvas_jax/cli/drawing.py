"""What `metacanvas sample` and `metacanvas edit` share: options, and the way from a request to a file."""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.errors import UserError

if TYPE_CHECKING:
    from metacanvas_jax.config.schema import Experiment
    from metacanvas_jax.evaluate.prompt_lines import Line
    from metacanvas_jax.paint.painter import Painter
    from metacanvas_jax.paint.runs import Trained

NAME_BYTES = 160  # of a file that is named after its prompt; file systems count bytes, not letters


def add_arguments(parser: argparse.ArgumentParser, count: str) -> None:
    """Where the networks come from, the shape of the result, and how it is drawn; ``count`` tells the default count."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="folder of a trained run, local or gs://")
    source.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="config that names folders of weights; what has none starts fresh (--config.KEY=VALUE changes it)",
    )
    parser.add_argument(
        "--out", help="PNG, or MP4 for videos (RUN/samples/PROMPT, never an old file); of several prompts a folder"
    )
    parser.add_argument("--count", type=int, help=f"results of a prompt, side by side in one file (default: {count})")
    add_result(parser)
    parser.add_argument("--no-canvas", action="store_true", help="leave the canvas out")
    options.add_checkpoint(parser)
    options.add_verify(parser)
    options.add_mesh(parser)
    parser.add_argument("--tile", type=int, default=0, help="decode in tiles of so many latents a side (0: at once)")


def add_result(parser: argparse.ArgumentParser) -> None:
    """The noise, the sampler and the shape of a result."""
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result (default: 0)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the config's)")
    size = "pixels of the result (default: the config's; of an edit as many, in the shape of what it changes)"
    parser.add_argument("--size", metavar="ROWSxCOLUMNS", help=size)
    parser.add_argument("--frames", type=int, help="frames of the result (default: the config's)")
    parser.add_argument("--fps", type=float, help="frames a second of a video (default: the config's)")


def draw(arguments: argparse.Namespace, prompt: str, **media: Any) -> Path:
    """Draws one prompt ``arguments.count`` times; returns the file. ``media`` are fields of ``requests.Request``."""
    check(arguments)
    from metacanvas_jax.paint import requests
    from metacanvas_jax.paint.painter import Painter

    setup = setup_of(arguments)
    sample, bucket = requests.sample_of(setup, requests.Request(prompt, **shape(arguments), **media))
    out = place(arguments, prompt, bucket.frames > 1)
    files.check_writable(out)
    how = how_of(arguments)
    options.keep_compiled()
    with options.connected(arguments) as writes:
        painter = Painter(setup)
        trained = load(arguments, painter, painter.needs([bucket], **how), arguments.count)
        drawn = trained.paint([sample] * arguments.count, bucket, seed=arguments.seed, **how)
        if writes:
            requests.save(drawn.pixels, bucket.fps, out)
    return out


def draw_lines(arguments: argparse.Namespace, lines: "Sequence[Line]") -> str:
    """Draws many prompts, ``arguments.count`` results each, into the folder ``arguments.out``; says what there is."""
    check(arguments)
    from metacanvas_jax.evaluate import prompts
    from metacanvas_jax.evaluate.contract import Asked
    from metacanvas_jax.paint.painter import Painter

    if arguments.out is None:
        raise UserError("several prompts need --out: the folder of their results")
    if not (arguments.batch or 1) >= 1:
        raise UserError(f"--batch is {arguments.batch}, expected at least 1")
    setup, out, how = setup_of(arguments), files.folder(arguments.out), how_of(arguments)
    made = prompts.prepare(setup, lines, out, arguments.count)
    if any(entry.bucket.frames > 1 for entry in made):
        options.require("av", "media")
    options.keep_compiled()
    with options.connected(arguments) as writes:
        painter = Painter(setup)
        trained = load(arguments, painter, painter.needs([entry.bucket for entry in made], **how), len(made))
        asked = Asked(
            guidance=how.pop("guidance"),
            canvas=how.pop("canvas"),
            seed=arguments.seed,
            out=out,
            each=arguments.batch,
            step=trained.step,
            progress=writes,
        )
        return prompts.draw(painter, trained.params, lines, asked, count=arguments.count, **how).table()


def setup_of(arguments: argparse.Namespace) -> "Experiment":
    """The experiment of the run or the config that the arguments name."""
    from metacanvas_jax.config import read
    from metacanvas_jax.config.load import load_config
    from metacanvas_jax.paint import runs

    if arguments.config is None and arguments.overrides:
        raise UserError("--config.KEY=VALUE changes a --config; the config of a --run is that of its training")
    if arguments.config is not None and arguments.checkpoint is not None:
        raise UserError("--checkpoint goes with --run; a --config has no checkpoints")
    if arguments.config is None:
        return runs.setup_of(arguments.run)
    return read.experiment(load_config(arguments.config, arguments.overrides))


def load(arguments: argparse.Namespace, painter: "Painter", needs: dict, results: int) -> "Trained":
    """The parameters of ``setup_of`` that a drawing of so many results needs."""
    from metacanvas_jax.paint import placing, runs

    mesh = placing.mesh_for(painter.setup, needs, results=results, chosen=options.mesh(arguments.mesh))
    where = {"verify": arguments.verify, "mesh": mesh, "needs": needs, "painter": painter}
    if arguments.config is not None:
        return runs.assembled(painter.setup, **where)
    return runs.load(arguments.run, step=arguments.checkpoint, **where)


def shape(arguments: argparse.Namespace) -> dict[str, Any]:
    """The shape of the result, as fields of ``requests.Request``."""
    return {"size": options.size(arguments.size), "frames": arguments.frames, "fps": arguments.fps}


def how_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """How results are drawn, as options of ``Painter.paint``."""
    return {
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "canvas": not arguments.no_canvas,
        "tile": arguments.tile,
    }


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers that make no sense."""
    for name, least in (("count", 1), ("steps", 1), ("frames", 1), ("tile", 0)):
        value = getattr(arguments, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}, expected at least {least}")
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise UserError(f"--guidance is {arguments.guidance}, expected a finite number")
    options.check_seed(arguments.seed)
    if arguments.fps is not None and not 0 < arguments.fps <= 1000:
        raise UserError(f"--fps is {arguments.fps}, expected a number above 0 and up to 1000")


def unused(folder: Path, name: str, suffix: str) -> Path:
    """The first of NAME, NAME-2, NAME-3, ... that is not in a folder."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(place for one in names if not (place := folder / (one + suffix)).exists())


def place(arguments: argparse.Namespace, prompt: str, video: bool) -> Path:
    """The file to write: one that is new, or the one that was asked for, with a word where it is replaced.

    Raises UserError for a name of another kind of file.
    """
    suffix = ".mp4" if video else ".png"
    if video:
        options.require("av", "media")
    if arguments.out is None:
        words = "_".join("".join(c if c.isalnum() else " " for c in prompt).split())[:80]
        words = words.encode()[:NAME_BYTES].decode(errors="ignore") or "empty"
        return unused(files.folder(arguments.run or "") / "samples", words, suffix)
    out = files.folder(arguments.out)
    if out.suffix.lower() != suffix:
        raise UserError(f"--out is {arguments.out}, expected a {suffix} file")
    if out.is_file():
        print(f"{out} is replaced", file=sys.stderr)
    return out
