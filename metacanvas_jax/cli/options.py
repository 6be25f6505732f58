"""Options that commands share."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from metacanvas_jax.errors import UserError

if TYPE_CHECKING:
    from metacanvas_jax.parallel.mesh import MeshConfig


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """``--config FILE[:variant]``; values are changed with ``--config.KEY=VALUE``."""
    parser.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        default=default,
        required=default is None,
        help=f"config file, and its variant; change a value with --config.KEY=VALUE (default: {default})",
    )


def add_verify(parser: argparse.ArgumentParser) -> None:
    """``--verify``."""
    parser.add_argument(
        "--verify", action="store_true", help="read all bytes of the frozen weights and compare them with their hashes"
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``."""
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step of the --run (default: the newest)"
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """``--mesh``, and the options of several processes."""
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="sizes of data, fsdp, context, tensor on the devices here (default: copies of the parameters on every "
        "device if they take half of its memory, else shards)",
    )
    add_processes(parser)


def mesh(text: str | None) -> "MeshConfig | None":
    """The value of ``--mesh``. Raises UserError for text that is no mesh."""
    from metacanvas_jax.parallel.mesh import parse_mesh

    return None if text is None else parse_mesh(text)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """What a process knows of the others that run the same command."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--processes", type=int, help="how many processes must come up; the rest is known on clusters")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--process", type=int, help="number of this process, from 0")
    group.add_argument("--timeout", type=int, default=300, help="seconds to wait for all of them to come up (300)")


@contextlib.contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[bool]:
    """Connects the processes of a command while it is open; yields whether this one writes and prints.

    Raises UserError on a host of a TPU slice that several hosts share, unless they are said to take part.
    """
    from metacanvas_jax.parallel.distributed import chief, client, together
    from metacanvas_jax.parallel.watch import Watch

    group = (arguments.processes, arguments.coordinator, arguments.process, arguments.timeout)
    with together(*group), Watch(client(), 0.0) if client() is not None else contextlib.nullcontext():
        yield chief()


def keep_compiled() -> None:
    """Keeps what a command compiles for the next one, in the user's cache; says where when there is nothing yet."""
    from metacanvas_jax.parallel import kept

    new = not kept.user_cache().exists()
    if kept.keep() == str(kept.user_cache()) and new:
        print(
            f"compiled programs are kept in {kept.user_cache()}, at most {kept.LARGEST >> 30} GiB "
            "(another place: JAX_COMPILATION_CACHE_DIR)",
            file=sys.stderr,
        )


def on_host() -> None:
    """For commands that compute on no accelerator: none is taken from others, or waits for the rest of its slice."""
    import jax

    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")


def size(text: str | None) -> tuple[int, int] | None:
    """The value of ``--size``: "704x1280" is (704, 1280). Raises UserError for anything else."""
    if text is None:
        return None
    rows, cross, columns = text.lower().partition("x")
    if not (cross and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise UserError(f"--size {text}: expected ROWSxCOLUMNS, such as 512x768")
    return int(rows), int(columns)


def check_seed(seed: int) -> None:
    """Raises UserError for a ``--seed`` of which no noise is made."""
    if not 0 <= seed < 1 << 64:
        raise UserError(f"--seed is {seed}, expected a number from 0 to {(1 << 64) - 1}")


def require(package: str, extra: str) -> None:
    """Raises UserError when an optional package is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs the package {package}: pip install 'metacanvas_jax[{extra}]'")


def agreed(what: str) -> None:
    """Says what is about to happen and asks. Raises UserError when the user, or nobody, agrees to it."""
    print(what, file=sys.stderr, flush=True)
    if not sys.stdin.isatty():
        raise UserError("not done: nobody can be asked here; --yes agrees")
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if not sys.stdin.readline().strip().lower().startswith("y"):
        raise UserError("not done")
