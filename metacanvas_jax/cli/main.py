"""``metacanvas COMMAND``: one thin file per command; bad input is one line and exit code 2."""

import argparse
import errno
import importlib
import keyword
import os
import sys
import types

import shtab

import metacanvas_jax
from metacanvas_jax.cli import lines
from metacanvas_jax.errors import Lost, Preempted, Unreachable, UserError, exit_code
from metacanvas_jax.hardware import platforms

COMMANDS = {
    "demo": "train, draw, score and report the miniature with one command",
    "teach": "teach the miniature's MLLM from nothing, examine it and write it to a folder",
    "fetch": "bring the public weights, and data sets, that a config names",
    "prepare": "write the data set of a config, or turn any source into array_record shards",
    "train": "train what a config describes",
    "sweep": "train the points of a sweep and gather their results",
    "sample": "draw a prompt: a picture, or a video, from a run or from published weights",
    "edit": "change a picture or a video as a prompt says",
    "evaluate": "score a trained run",
    "report": "write one HTML page about a run: curves, previews, data, devices; with --draw canvas maps",
    "maps": "draw a prompt and what the canvas adds to it, as colours",
    "plan": "tell whether a config fits a TPU slice and how fast it goes, without the TPU",
    "export": "write a trained run for PyTorch, PEFT and diffusers",
    "import": "make a run of an exported folder, or parameters of a published one",
}

PLACES = (
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENOENT, errno.EEXIST),
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
)
"""Errors of the operating system that say what is wrong with a place which the user named."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code (`errors.exit_code`; 1 is also a plan that fails)."""
    if (known_platforms := platforms()) is not None:
        os.environ.setdefault("JAX_PLATFORMS", known_platforms)
    # Prompts are read one at a time, by several threads of the input pipeline: more threads in each only wait.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = make_parser()
    known, rest = parser.parse_known_args(arguments)
    if known.command != "fetch":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing else is fetched behind the user's back
    if known.command is None and not rest:
        parser.print_help()
        return 0
    if known.command is None:
        parser.error(f"unknown argument {rest[0]!r}; a command comes first: {', '.join(COMMANDS)}")
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown argument {unknown[0]!r}; config values are set with --config.KEY=VALUE")
    if overrides and not hasattr(known, "config"):
        parser.error(f"{known.command} takes no --config.KEY=VALUE")
    known.overrides = overrides
    try:
        with lines.shown():
            return _module(known.command).run(known) or 0
    except OSError as error:  # what no module below expected: a name that is too long, a full disk, no permission
        if error.errno not in PLACES:
            raise
        where = "" if error.filename is None else f"{str(error.filename)[:200]}: "
        print(f"metacanvas {known.command}: {where}{error.strerror}", file=sys.stderr)
        return 2
    except (UserError, Unreachable, Preempted, KeyboardInterrupt) as error:
        print(f"metacanvas {known.command}: {_said(error)}", file=sys.stderr)
        return exit_code(error)


def _said(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Preempted):
        return f"{error}; the same command goes on from there"
    return f"{error}; start the same command again" if isinstance(error, Lost | Unreachable) else str(error)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="metacanvas",
        allow_abbrev=False,
        description="MetaCanvas: a frozen MLLM plans on canvas tokens, a diffusion transformer paints the plan.",
        epilog="example: metacanvas demo",
    )
    parser.add_argument("--version", action="version", version=f"metacanvas_jax {metacanvas_jax.__version__}")
    shtab.add_argument_to(parser, "--print-completion", help="print a script that completes commands in this shell")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = _module(name)
        command = commands.add_parser(
            name,
            allow_abbrev=False,  # part of a word is a typo
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def _module(command: str) -> types.ModuleType:
    name = f"{command}_" if keyword.iskeyword(command) else command
    return importlib.import_module(f"metacanvas_jax.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
