"""``metacanvas fetch``."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metacanvas_jax.cli import options
from metacanvas_jax.errors import UserError

if TYPE_CHECKING:
    from metacanvas_jax.launch.fetch import Found, Wanted

EXAMPLE = """metacanvas fetch --config configs/t2i_lora.py
         metacanvas fetch --config configs/t2i_scratch.py --out gs://my-bucket/weights
         metacanvas fetch --repository BLIP3o-60k --dry-run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE[:VARIANT]", help="config file; bring the weights that it names")
    what.add_argument(
        "--repository", metavar="NAME", action="append", help="bring this one (can be repeated; docs/fetch.md)"
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="FOLDER",
        help="folder of all repositories, local or gs:// (where the config looks)",
    )
    parser.add_argument("--data", action="store_true", help="with --config: its data sets too, where they are public")
    parser.add_argument(
        "--revision",
        metavar="NAME=COMMIT",
        action="append",
        default=[],
        help="commit, tag or branch of a repository, in place of the one that is pinned",
    )
    parser.add_argument("--dry-run", action="store_true", help="list files, sizes and places, and bring nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before bringing them")


def run(arguments: argparse.Namespace) -> int:
    """Lists what a config needs from the hub with its sizes, asks, and brings what is missing."""
    options.on_host()
    from metacanvas_jax.launch import fetch, hub

    wanted = _wanted(arguments)
    revisions = _revisions(arguments.revision, wanted)
    if not wanted:
        print("nothing to fetch: the config names no folder of a repository that is known here")
        return 0
    found: list[Found] = []
    try:
        for one in wanted:
            found.append(fetch.look(one, revisions.get(one.repository.folder, "")))
    except UserError as error:
        for one in wanted:
            print(_by_hand(one, revisions.get(one.repository.folder, "")))
        if hub.offline() and arguments.dry_run:
            return 0
        raise UserError(f"{error}; above is what to bring, and where to put it") from error
    for one in found:
        print(_listed(one))
    missing = [one for one in found if one.missing]
    count = sum(len(one.missing) for one in missing)
    what = f"{count} file{'s' * (count > 1)}, {fetch.size_text(sum(one.size for one in missing))}"
    if not missing:
        print("all files are there")
    if not missing or arguments.dry_run:
        return 0
    fetch.check_room(missing)
    if not arguments.yes:
        options.agreed(f"fetch {what}")
    for one in missing:
        fetch.bring(one)
    print(f"fetched {what}")
    return 0


def _wanted(arguments: argparse.Namespace) -> "list[Wanted]":
    from metacanvas_jax.config import read
    from metacanvas_jax.config.load import load_config
    from metacanvas_jax.launch import fetch

    if arguments.config is None:
        if arguments.data or arguments.overrides:
            raise UserError("--data and --config.KEY=VALUE go with --config")
        return fetch.of_names(arguments.repository, arguments.out or "weights")
    setup = read.experiment(load_config(arguments.config, arguments.overrides))
    wanted, unknown = fetch.of_config(setup, data=arguments.data, out=arguments.out)
    for place in unknown:
        print(f"not fetched, no repository is known for it: {place}")
    return wanted


def _revisions(given: Sequence[str], wanted: "Sequence[Wanted]") -> dict[str, str]:
    names = [one.repository.folder for one in wanted]
    found = {}
    for text in given:
        name, equals, revision = text.partition("=")
        if not equals or not revision or name not in names:
            raise UserError(f"--revision {text}: expected NAME=COMMIT, with a NAME of {', '.join(names)}")
        found[name] = revision
    return found


def _head(one: "Wanted", revision: str) -> str:
    serves = f" for {', '.join(one.serves)}" if one.serves else ""
    kind = "dataset " if one.repository.kind == "dataset" else ""
    return f"{kind}{one.repository.name} at {revision} ({one.repository.licence}) into {one.place}{serves}"


def _listed(one: "Found") -> str:
    from metacanvas_jax.launch.fetch import size_text

    width = max(len(file.name) for file in one.files)
    lines = [
        f"  {file.name:{width}}  {size_text(file.size)}{'' if file in one.missing else '  (there)'}"
        for file in one.files
    ]
    return "\n".join([_head(one.wanted, one.commit), *lines])


def _by_hand(one: "Wanted", revision: str) -> str:
    """The same without the hub: patterns in place of names, and the command of its own tool."""
    revision = revision or one.repository.revision or "main"
    patterns = " ".join(f"--include {pattern!r}" for pattern in one.patterns)
    place = one.place if "://" not in one.place else one.repository.folder
    kind = " --repo-type dataset" if one.repository.kind == "dataset" else ""
    command = f"hf download {one.repository.name}{kind} --revision {revision} {patterns} --exclude '*fp16*' "
    command += f"--local-dir {place}"
    copy = "" if place == one.place else f" && gcloud storage cp -r {place} {os.path.dirname(one.place)}/"
    return f"{_head(one, revision)}\n  {command}{copy}"
