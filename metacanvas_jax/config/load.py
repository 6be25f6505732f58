"""Config files and the resolved configs of runs, as ConfigDicts. Imports no JAX: commands set its flags first."""

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from metacanvas_jax import files, seals
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.files import ROOT

MODULE = "module 'config_config'"  # what the library calls a config file
KEY = re.compile(r"[^.\[\]]+|\[[^\]]*\]")  # parts of a key: names, and numbers in brackets
PLACES = frozenset(
    {"weights", "tokenizer", "path", "pictures_path", "context_cache", "cache", "vae_weights", "dit_weights", "start"}
    | {"paths"}
)
"""Keys, at any depth, of folders and files. They may be changed by hand in a run's config: files may move."""


def load_config(spec: str, overrides: list[str]) -> ConfigDict:
    """Runs a config file and applies the overrides.

    Raises UserError for a missing file, an unknown variant, an unknown key or a value of another type.
    """
    name, _, variant = spec.partition(":")
    path = Path(name) if Path(name).exists() else ROOT / name
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], 1)
        hint = f"; did you mean {Path(name).parent / near[0]}?" if near else ""
        raise UserError(f"no config file {name}{hint}")
    # Config files import each other as `configs`: those beside the file and those beside the package, which need not be
    # the same.
    beside = [folder for folder in path.resolve().parents if (folder / "configs").is_dir()][:1]
    sys.path[:0] = [str(folder) for folder in (*beside, ROOT) if str(folder) not in sys.path]
    values = flags.FlagValues()
    where = f"{path}:{variant}" if variant else str(path)
    argv = ["metacanvas", f"--config={where}", *overrides]
    sys.modules.pop("config_config", None)  # the library would run the file inside the module of the last one
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        config = values.config
        if isinstance(config, ConfigDict):
            return config.unlock()
        getattr(config, "unlock", None)  # where reading failed, the library puts an object that raises here
    except (Exception, SystemExit) as error:  # a config file is a program, which may raise anything
        if text := blame(path, error) or wrong_key(spec, overrides):
            raise UserError(text) from error
        lines = str(error.args[0] if error.args else error).strip().splitlines() or [type(error).__name__]
        # Some errors come as a whole traceback, whose last line says what is wrong.
        text = lines[-1].partition(": ")[2] if "Traceback (most recent call last):" in lines else lines[0]
        raise UserError(f"config {spec}: {text.replace(MODULE, 'the file')}") from error
    raise UserError(f"{path}: get_config() returns {type(config).__name__}, expected a ConfigDict")


def write_config(config: ConfigDict, folder: Path) -> None:
    """The resolved config, as JSON with a checksum, into a run's folder.

    Its ``PLACES`` are written from the root, so that the run is read from any folder; with values of ``paths``, which
    move relative ones, they stay as they are.
    """
    values = json.loads(config.to_json_best_effort())
    moved = any((values.get("paths") or {}).values())
    values = seals.sealed(values if moved else _placed(values, files.absolute), _decides)
    files.write(folder / "config.json", json.dumps(values, indent=2) + "\n")


def read_config(run: str | os.PathLike) -> ConfigDict:
    """The resolved config of a run.

    Raises UserError for a folder that is no run, and for a config that is damaged or was changed by hand in more than
    its ``PLACES`` (without its line "checksum" and the one before it, a changed config is read).
    """
    run = files.folder(run)
    path = run / "config.json"
    if not path.exists():
        raise UserError(f"{run} is no run: it has no config.json (a run is the --workdir of `metacanvas train`)")
    return config_of(path)


def config_of(path: Path) -> ConfigDict:
    """A resolved config from its JSON file. Raises UserError for a file that is none."""
    values = files.read_json(path)
    try:
        return ConfigDict(seals.opened(values, path, _decides))
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: no config ({first_line(error)})") from error


def shared(config: ConfigDict) -> dict[str, Any]:
    """A resolved config for others: its ``PLACES`` below the current folder are named from there."""

    def from_here(place: str) -> str:
        whole, here = Path(files.absolute(place)), Path.cwd()
        below = files.is_local(place) and whole.is_relative_to(here) and whole != here
        return str(whole.relative_to(here)) if below else place

    return _placed(json.loads(config.to_json_best_effort()), from_here)


def _placed(tree: Any, change: Callable[[str], str], *keys: str) -> Any:
    """A config, or the part of one below ``keys``, whose places of files are changed."""
    if isinstance(tree, Mapping):
        return {name: _placed(value, change, *keys, name) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_placed(value, change, *keys, "") for value in tree]
    place = bool(keys) and keys[-1] in PLACES and keys != ("canvas", "start")  # the latter are words
    return change(tree) if place and isinstance(tree, str) and tree else tree


def _decides(tree: Any) -> Any:
    """A config, or a part of one, without the places of files."""
    if isinstance(tree, Mapping):
        return {key: _decides(value) for key, value in tree.items() if key not in PLACES}
    return [_decides(value) for value in tree] if isinstance(tree, list | tuple) else tree


def wrong_key(spec: str, overrides: list[str]) -> str | None:
    """The first override whose key the config does not have, in one line. None: they all are keys of it."""
    config = load_config(spec, []) if overrides else None
    for override in overrides:
        node, done = config, ""
        for part in KEY.findall(override.removeprefix("--config.").partition("=")[0]):
            if (found := wrong_part(node, part, f"{done}." if done else "")) is not None:
                return f"config {spec}: {found}"
            number = part.startswith("[")
            node = node[int(part[1:-1])] if number else node[part]
            done = f"{done}{part}" if number or not done else f"{done}.{part}"
    return None


def wrong_part(node: Any, part: str, prefix: str) -> str | None:
    """What is wrong with a name, or a number in brackets, below a part of a config; ``prefix`` leads there."""
    if part.startswith("["):
        count = len(node) if isinstance(node, list | tuple) else 0
        inside = part[1:-1].isdigit() and int(part[1:-1]) < count
        return None if inside else f"no {prefix.rstrip('.')}{part}: there are {count}, numbered from 0"
    known = list(node.keys()) if isinstance(node, ConfigDict | Mapping) else []
    if part in known:
        return None
    near = difflib.get_close_matches(part, known, 1)
    return f"unknown key {prefix}{part}; " + (
        f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known) or 'none'}"
    )


def blame(path: Path, error: BaseException) -> str | None:
    """An error of a program that the user wrote, in one line: file, line and error. None: it arose elsewhere."""
    inside: BaseException | None = error
    while inside is not None:  # libraries wrap the errors of the programs that they run
        if isinstance(inside, UserError) and "\n" not in str(inside):
            return str(inside)
        if isinstance(inside, SyntaxError):
            return f"{inside.filename or path}, line {inside.lineno}: {inside.msg}"
        frames = traceback.extract_tb(inside.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
        if lines:
            return f"{path}, line {lines[-1]}: {type(inside).__name__}: {first_line(inside)}"
        inside = inside.__cause__ or inside.__context__
    return None
