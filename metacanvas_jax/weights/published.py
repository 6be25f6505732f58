"""Published folders of transformers and diffusers, whatever network they hold: the description and the weights.

``config.json`` is read before any weight, so that a folder of another model costs nothing and is named as what it is.
A pipeline folder of diffusers (one with ``model_index.json``) stands for the subfolder that is asked for.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from metacanvas_jax import files
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.limits import PUBLISHED
from metacanvas_jax.types import Params
from metacanvas_jax.weights import hf_import, repositories
from metacanvas_jax.weights.table import Entry

DIFFUSERS_VERSION = "0.42.1"  # whose form the written files have
_REQUIRED = object()

_HARMLESS = (
    # Names, versions, the dtype of the file, and token ids: the tokenizer says which token is which.
    *("_*", "architectures", "auto_map", "model_type", "name_or_path", "tokenizer_class", "transformers_version"),
    *("dtype", "torch_dtype", "*_token_id"),
    # What acts in training only, or at its start.
    *("dropout", "*_dropout", "initializer_range", "gradient_checkpointing"),
    # What a call returns and keeps, and how text is generated.
    *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_cache", "cache_implementation"),
    *("begin_suppress_tokens", "bad_words_ids", "diversity_penalty", "do_sample", "early_stopping", "length_penalty"),
    *("exponential_decay_length_penalty", "encoder_no_repeat_ngram_size", "max_length", "min_length", "num_beams"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_return_sequences", "output_scores", "prefix"),
    *("remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature"),
    *("top_k", "top_p", "typical_p"),
    # Heads for other tasks.
    *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
)
"""Patterns of keys that change nothing of what a network computes here, in any file."""

_OFF = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
}
"""Keys that older files of transformers spell out, and the value with which they change nothing."""


class Fields:
    """The values of a ``config.json``, asked for by name.

    It keeps which keys were asked for: ``finish`` refuses the rest, so that no value is accepted without being read.
    """

    def __init__(self, file: Path, values: Mapping[str, Any], within: str = ""):
        self.file, self.values, self.within = file, values, within
        self._asked: set[str] = set()
        self._skipped: set[str] = set()
        self._inside: dict[str, Fields] = {}

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value. Raises UserError for one that is missing and has no default."""
        self._asked.add(name)
        if default is _REQUIRED and name not in self.values:
            raise UserError(f"{self.file}: {self.within}{name} is missing")
        value = self.values.get(name, default)
        if isinstance(value, int) and abs(value) > PUBLISHED:
            raise UserError(f"{self.file}: {self.within}{name} is {value}, at most {PUBLISHED} is allowed")
        return value

    def inside(self, name: str) -> "Fields":
        """The values of a nested object. Raises UserError if there is none."""
        value = self(name)
        if not isinstance(value, Mapping):
            raise UserError(f"{self.file}: {self.within}{name} is {value!r}, expected an object")
        if name not in self._inside:
            self._inside[name] = Fields(self.file, value, f"{self.within}{name}.")
        return self._inside[name]

    def each(self, name: str, count: int) -> list[Any]:
        """A value for every stage, given once or as a list."""
        value = self(name)
        return list(value) if isinstance(value, list | tuple) else [value] * count

    def only(self, **expected: Any) -> None:
        """Raises UserError where the file asks for something this project does not build; absent values pass."""
        for name, value in expected.items():
            self.among(**{name: (value,)})

    def among(self, **allowed: Sequence[Any]) -> None:
        """As ``only``, with several values that are built."""
        for name, values in allowed.items():
            found = self(name, values[0])
            if found not in values:
                self.refuse(name, " or ".join(_short(value) for value in values))

    def must(self, **expected: Any) -> None:
        """As ``only``, but absent values do not pass: the reference's default is another value."""
        for name, value in expected.items():
            if name not in self.values:
                raise UserError(f"{self.file}: {self.within}{name} is missing; only {value!r} is built here")
            self.only(**{name: value})

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raises UserError that names a key, its value, and what is built instead."""
        found = _short(self(name, None))
        raise UserError(f"{self.file}: {self.within}{name} is {found}; only {expected} is built here")

    def skip(self, *names: str) -> None:
        """Names keys whose value changes nothing of what the network computes here."""
        self._skipped.update(names)

    def repeat(self, inner: "Fields") -> None:
        """Raises UserError unless values that stand here and in a nested object, and matter there, are the same."""
        for name in self.values.keys() & inner.values.keys() - self._asked:
            if inner.matters(name):
                self.among(**{name: (inner.values[name], None)})
            self.skip(name)

    def matters(self, name: str) -> bool:
        """Whether a key may change what the network computes."""
        return name not in self._skipped and not any(fnmatchcase(name, pattern) for pattern in _HARMLESS)

    def finish(self) -> None:
        """Raises UserError for the first key that nobody asked for, unless it can change nothing."""
        for inner in self._inside.values():
            inner.finish()
        self.only(**_OFF)
        for name, value in self.values.items():
            if name not in self._asked and self.matters(name):
                raise UserError(f"{self.file}: {self.within}{name} is {_short(value)}; this key is not known here")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def subfolder(folder: str | Path, name: str) -> Path:
    """``folder/name`` for a pipeline folder of diffusers, else the folder itself. Raises UserError if it is missing."""
    folder = files.folder(folder)
    if not folder.is_dir():
        how = repositories.how_to_fetch(folder) or "`metacanvas fetch` brings published ones"
        raise UserError(f"{folder}: no such folder; {how}")
    if not (folder / "model_index.json").is_file():
        return folder
    if not (folder / name).is_dir():
        have = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        how = repositories.how_to_fetch(folder)
        raise UserError(f"{folder}: a pipeline without the subfolder {name}; it has {have}" + (how and f"; {how}"))
    return folder / name


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file of a model folder. Raises UserError as ``files.read_json`` does."""
    hint = repositories.how_to_fetch(file) or "expected a model folder of transformers or diffusers"
    return files.read_json(file, hint=hint)


def read_all(file: Path, values: Mapping[str, Any], name: str, read: Callable[[Fields], Any]) -> Any:
    """What ``read`` makes of the values of a file that describes a ``name``.

    Raises UserError for a value that does not fit, and for a key that ``read`` leaves unread (see ``Fields.finish``).
    """
    f = Fields(file, values)
    try:
        found = read(f)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise UserError(f"{file}: not a {name} that can be built ({first_line(error)})") from error
    f.finish()
    return found


def rope_theta(f: Fields, default: float, *types: str) -> tuple[Fields, float]:
    """The rotary parameters, and their base: in an object of their own in transformers 5, in two places before.

    Raises UserError for a kind of rotary embedding that is not among ``types``; "default" always is.
    """
    name = next((name for name in ("rope_parameters", "rope_scaling") if f(name, None)), None)
    rope = f.inside(name) if name else Fields(f.file, {})
    kinds = ("default", *types)
    rope.among(rope_type=kinds, type=kinds)
    rope.among(partial_rotary_factor=(1.0, None))
    f.among(partial_rotary_factor=(1.0, None))
    if name == "rope_parameters":
        f.among(rope_scaling=(None, rope.values))
    theta = rope("rope_theta", f("rope_theta", default))
    f.only(rope_theta=theta)
    return rope, float(theta)


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


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A parameter of a published folder that is read when ``np.asarray`` asks for it."""

    checkpoint: hf_import.Checkpoint
    entry: Entry
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        target = {self.entry.path: jax.ShapeDtypeStruct(self.shape, self.dtype)}
        read = hf_import.load_params(self.checkpoint, [self.entry], target, ignore=("*",), progress=False)
        return np.asarray(flatten_dict(read, sep="/")[self.entry.path], dtype)


def lazy(
    folder: str | Path, table: Sequence[Entry], abstract: Mapping[str, Any], ignore: Sequence[str]
) -> dict[str, Lazy]:
    """The parameters of ``load`` by path, none of which is read yet; names, shapes and dtypes are checked at once.

    Raises UserError as ``load`` does, but for numbers that are not finite: these are found when they are read.
    """
    checkpoint, targets = hf_import.Checkpoint(folder), flatten_dict(dict(abstract), sep="/")
    table = [entry for entry in table if entry.path in targets]
    hf_import.match(checkpoint, table, targets, ignore)
    leaves = {entry.path: targets[entry.path] for entry in table}
    return {e.path: Lazy(checkpoint, e, leaves[e.path].shape, np.dtype(leaves[e.path].dtype)) for e in table}


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
