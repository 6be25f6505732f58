"""Options that commands share."""

import argparse
import importlib.util

from metacanvas_jax.errors import UserError


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


def size(text: str | None) -> tuple[int, int] | None:
    """The value of ``--size``: "704x1280" is (704, 1280). Raises UserError for anything else."""
    if text is None:
        return None
    rows, cross, columns = text.lower().partition("x")
    if not (cross and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise UserError(f"--size {text}: expected ROWSxCOLUMNS, such as 512x768")
    return int(rows), int(columns)


def require(package: str, extra: str) -> None:
    """Raises UserError when an optional package is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs the package {package}: pip install 'metacanvas_jax[{extra}]'")
