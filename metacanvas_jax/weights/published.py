"""Published folders of transformers and diffusers, whatever network they hold: the description and the weights.

``config.json`` is read before any weight, so that a folder of another model costs nothing and is named as what it is.
A pipeline folder of diffusers (one with ``model_index.json``) stands for the subfolder that is asked for.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from metacanvas_jax.errors import UserError
from metacanvas_jax.types import Params
from metacanvas_jax.weights import hf_import
from metacanvas_jax.weights.table import Entry

DIFFUSERS_VERSION = "0.42.1"  # whose form the written files have
_REQUIRED = object()


class Fields:
    """The values of a ``config.json``, asked for by name."""

    def __init__(self, file: Path, values: Mapping[str, Any]):
        self.file, self.values = file, values

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value. Raises UserError for one that is missing and has no default."""
        if default is _REQUIRED and name not in self.values:
            raise UserError(f"{self.file}: {name} is missing")
        return self.values.get(name, default)

    def inside(self, name: str) -> "Fields":
        """The values of a nested object. Raises UserError if there is none."""
        value = self(name)
        if not isinstance(value, Mapping):
            raise UserError(f"{self.file}: {name} is {value!r}, expected an object")
        return Fields(self.file, value)

    def each(self, name: str, count: int) -> list[Any]:
        """A value for every stage, given once or as a list."""
        value = self(name)
        return list(value) if isinstance(value, list | tuple) else [value] * count

    def only(self, **expected: Any) -> None:
        """Raises UserError where the file asks for something this project does not build; absent values pass."""
        for name, value in expected.items():
            found = self.values.get(name, value)
            if found != value:
                raise UserError(f"{self.file}: {name} is {found!r}; only {value!r} is built here")


def subfolder(folder: str | Path, name: str) -> Path:
    """``folder/name`` for a pipeline folder of diffusers, else the folder itself. Raises UserError if it is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / "model_index.json").is_file():
        return folder
    if not (folder / name).is_dir():
        have = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise UserError(f"{folder}: a pipeline without the subfolder {name}; it has {have}")
    return folder / name


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises UserError for a file that is missing or something else."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected a model folder of transformers or diffusers") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values


def rope_fields(f: Fields) -> Fields:
    """Where the rotary parameters lie: of their own in transformers 5, spread over two places before."""
    if f("rope_parameters", None):
        return f.inside("rope_parameters")
    return Fields(f.file, {**f.values, **(f("rope_scaling", None) or {})})


def model_name(values: Mapping[str, Any]) -> Any:
    """The class of diffusers, or the model type of transformers, that a ``config.json`` names."""
    return values.get("_class_name") or values.get("model_type")


def sizes_of(config: Any, free: Sequence[str]) -> dict[str, Any]:
    """The fields of a config by dotted name, without those that a config may choose (``free``)."""
    sizes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in free:
            continue
        if dataclasses.is_dataclass(value):
            sizes |= {f"{field.name}.{name}": size for name, size in sizes_of(value, free).items()}
        else:
            sizes[field.name] = value
    return sizes


def load(
    folder: str | Path, table: Sequence[Entry], abstract: Mapping[str, Any], ignore: Sequence[str], **options: Any
) -> Params:
    """The parameters that a folder has, by the weight table of its network.

    ``abstract`` are the shapes of the parameters of the network, or of a part of them; nothing else is read (see
    ``hf_import.load_params``, which takes ``options``). Parameters that no published file has, such as adapters, are
    left out of the result.
    """
    targets, known = flatten_dict(dict(abstract), sep="/"), {entry.path for entry in table}
    held = unflatten_dict({path: leaf for path, leaf in targets.items() if path in known}, sep="/")
    unread = [name for e in table if e.path not in targets for layer in e.tensors for name in e.names(layer)]
    table = [entry for entry in table if entry.path in targets]
    return hf_import.load_params(folder, table, held, ignore=(*ignore, *unread), **options)
