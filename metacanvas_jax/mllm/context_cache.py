"""Contexts on disk or in memory, so that a frozen MLLM reads every prompt once and not once per step.

One safetensors file per prompt holds the hidden states of its real tokens and, where a canvas will be written, their
keys and values. The name of the file is a hash of everything the context depends on: tokens, positions, media, and an
identity of weights and configuration that the caller supplies. Files are written whole or not at all, so several
processes may share a folder, which may lie in a bucket.

A file also holds its key and a hash of its values, which are compared whenever it is read. A file that is damaged or
stands in the place of another, or that was written before there were hashes, is computed again and replaced, as if it
were missing; a damaged one is named in the log.
"""

import collections
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool
from safetensors import safe_open
from safetensors.numpy import load, save, save_file

from metacanvas_jax import files
from metacanvas_jax.errors import Unreachable, UserError
from metacanvas_jax.mllm.prompt import Prompt, Prompter
from metacanvas_jax.retries import retried
from metacanvas_jax.types import Context, Grid, KeyValues, MllmInputs, States
from metacanvas_jax.weights.hashes import whole_hash

logger = logging.getLogger(__name__)

_TOGETHER = 16  # contexts that are read at the same time: a bucket takes a while to answer
VERSION = "2"  # of what is stored; another one is another key


def context_key(prompt: Prompt, identity: str) -> str:
    """SHA-256 of all that the context of a prompt depends on, in hexadecimal."""
    media = [(patches.grid, patches.values, int(places[0])) for patches, places in prompt.media]
    return _key(identity, prompt.tokens, prompt.positions, media)


def context_keys(inputs: MllmInputs, identity: str) -> list[str]:
    """The keys of the prompts of a batch on the host, whatever its padding; the same as ``context_key`` of each."""
    keys = []
    for b, mask in enumerate(np.asarray(inputs.mask)):
        start, media = int(np.argmax(mask)), []
        for group in inputs.media:
            for values, slots in zip(np.asarray(group.patches[b]), np.asarray(group.slots[b]), strict=True):
                if slots[0] < len(mask):  # a slot beyond the end: this sample has no such medium
                    media.append((group.grid, values, int(slots[0]) - start))
        text = () if inputs.text is None else (np.asarray(inputs.text.tokens[b]), np.asarray(inputs.text.mask[b]))
        tokens, positions = np.asarray(inputs.tokens[b])[mask], np.asarray(inputs.positions[:, b])[:, mask]
        keys.append(_key(identity, tokens, positions, media, text))
    return keys


def _key(
    identity: str,
    tokens: np.ndarray,
    positions: np.ndarray,
    media: Sequence[tuple[Grid, np.ndarray, int]],
    text: Sequence[np.ndarray] = (),
) -> str:
    digest = hashlib.sha256(f"{VERSION}\n{identity}\n".encode())
    for grid, values, place in sorted(media, key=lambda medium: medium[2]):
        digest.update(f"{tuple(grid)} {place} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    for array in (tokens, positions, *text):
        digest.update(f"{array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array, np.int32).data)
    return digest.hexdigest()


class ContextCache:
    """A folder of contexts of one model, and up to ``memory`` bytes of those that were read last.

    With ``folder`` None contexts are kept in memory only. ``identity`` names weights and configuration (their hash).
    With ``keys_values=False`` only hidden states are kept, which are smaller by a factor of about
    ``2 * layers * kv_heads * head_width / width``. That is enough for a run without canvas and queries; a run with them
    needs a folder with keys and values.
    """

    def __init__(self, folder: str | os.PathLike | None, identity: str, *, keys_values: bool = True, memory: int = 0):
        self.folder = None if folder is None else files.folder(folder)
        self.identity, self.keys_values = identity, keys_values
        self._recent = Recent(memory)

    @property
    def held(self) -> int:
        """Bytes of the contexts in memory."""
        return self._recent.size

    def path(self, key: str) -> PurePath:
        """Where the context of a key lies, or would."""
        assert self.folder is not None, "contexts that are kept in memory only have no file"
        return self.folder / key[:2] / f"{key}.{'kv' if self.keys_values else 'hidden'}.safetensors"

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        """The keys of prompts."""
        return [context_key(prompt, self.identity) for prompt in prompts]

    def store(self, keys: Sequence[str], context: Context) -> None:
        """Writes the contexts of a batch, one for each key, without padding.

        Raises ValueError if keys and values are to be kept and the context has none.
        """
        rows = self._tensors(context, range(len(keys)))
        _each(lambda key, tensors: _write_whole(self.path(key), key, tensors), keys, rows)

    def _tensors(self, context: Context, rows: Iterable[int]) -> Iterator[dict[str, np.ndarray]]:
        """Some of the samples of a batch, without padding."""
        if self.keys_values and context.cache is None:
            raise ValueError("the context holds no keys and values to store: encode it with cache=True")
        context = jax.device_get(context if self.keys_values else context.replace(cache=None))
        for i in rows:
            real = context.mask[i]
            tensors = {"hidden": context.hidden[i, real], "next_position": context.next_position[i : i + 1]}
            if context.cache is not None:
                tensors |= {"keys": context.cache.keys[:, i, real], "values": context.cache.values[:, i, real]}
            if context.text is not None:
                tensors |= {"text": context.text.states[i], "text_mask": context.text.mask[i]}
            yield {name: np.array(x, order="C") for name, x in tensors.items()}

    def load(self, keys: Sequence[str], length: int, *, pad_left: bool = False) -> Context:
        """The contexts of keys as one batch padded to ``length``, in numpy and in the dtype they were computed in.

        Raises UserError naming the file if one is missing, damaged or longer than ``length``.
        """
        rows = _each(lambda key: _read(self.path(key), key), keys)
        longest = max(len(row["hidden"]) for row in rows)
        if longest > length:
            raise UserError(f"{self.folder}: a stored context of {longest} tokens does not fit length {length}")
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            real = len(row["hidden"])
            mask[i, slice(length - real, length) if pad_left else slice(0, real)] = True
        return _batched(rows, mask, self.keys_values)

    def fill(
        self,
        prompts: Sequence[Prompt],
        prompter: Prompter,
        encode: Callable[[MllmInputs], Context],
        *,
        batch: int = 8,
    ) -> int:
        """Encodes and stores the missing contexts, in batches of prompts of similar length; returns their number."""
        by_key = dict(zip(self.keys(prompts), prompts, strict=True))
        found = _each(lambda key: _usable(self.path(key), key) is not None, by_key)
        missing = [item for item, there in zip(by_key.items(), found, strict=True) if not there]
        missing.sort(key=lambda item: len(item[1].tokens))
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            padded = some + some[-1:] * (batch - len(some))  # one shape, one compilation
            self.store([key for key, _ in some], encode(prompter.batch([prompt for _, prompt in padded])))
        return len(missing)

    def read(self, inputs: MllmInputs, encode: Callable[[MllmInputs], Context], *, anyone: Callable = bool) -> Context:
        """The context of a batch, from disk or else computed and stored; padded as ``inputs`` are, in numpy.

        ``encode`` is a program on the whole mesh, so all processes must run it, or none. ``anyone`` therefore turns
        "this process misses a context" into "at least one process misses a context".
        """
        keys = context_keys(inputs, self.identity)
        rows = self._rows(keys)
        missing = [i for i, row in enumerate(rows) if row is None]
        if anyone(bool(missing)):
            context = jax.device_get(encode(inputs))
            made = dict(zip(missing, self._tensors(context, missing), strict=True))
            if self.folder is not None:
                _each(lambda i: _write_whole(self.path(keys[i]), keys[i], made[i]), missing)
            for i, tensors in made.items():
                rows[i] = self._recent.keep(keys[i], tensors)
        return _batched(rows, np.asarray(inputs.mask), self.keys_values)

    def _rows(self, keys: Sequence[str]) -> list[dict[str, np.ndarray] | None]:
        """The contexts of keys from memory, else from the folder; None where one is in neither."""
        held = {key: self._recent.get(key) for key in keys}
        if self.folder is not None:
            absent = [key for key, row in held.items() if row is None]
            for key, row in zip(absent, _each(lambda key: _usable(self.path(key), key), absent), strict=True):
                held[key] = None if row is None else self._recent.keep(key, row)
        return [held[key] for key in keys]


class Recent:
    """Contexts by key, up to ``limit`` bytes of them: those that were asked for last."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self._rows: collections.OrderedDict[str, dict[str, np.ndarray]] = collections.OrderedDict()

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The context of a key, or None."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def keep(self, key: str, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keeps a context, drops those that were not asked for longest, and returns it."""
        if key not in self._rows:
            self._rows[key] = row
            self.size += _bytes(row)
        while self.size > self.limit:
            self.size -= _bytes(self._rows.popitem(last=False)[1])
        return row


def _each(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """``map`` in several threads."""
    with ThreadPoolExecutor(_TOGETHER) as pool:
        return list(pool.map(function, *arguments))


def _bytes(row: dict[str, np.ndarray]) -> int:
    return sum(x.nbytes for x in row.values())


def _batched(rows: Sequence[dict[str, np.ndarray]], mask: Bool[np.ndarray, "b l"], keys_values: bool) -> Context:
    """Stored rows at the places of real tokens, zeros elsewhere."""

    def gather(name: str, axis: int) -> np.ndarray:
        first = rows[0][name]
        out = np.zeros((*first.shape[:axis], *mask.shape, *first.shape[axis + 1 :]), first.dtype)
        for i, row in enumerate(rows):
            out[(slice(None),) * axis + (i, mask[i])] = row[name]
        return out

    cache = KeyValues(gather("keys", 1), gather("values", 1)) if keys_values else None
    start = np.concatenate([row["next_position"] for row in rows])
    context = Context(hidden=gather("hidden", 0), mask=mask, cache=cache, next_position=start)
    if "text" not in rows[0]:
        return context
    return context.replace(text=States(*(np.stack([row[name] for row in rows]) for name in ("text", "text_mask"))))


def _write_whole(path: PurePath, key: str, tensors: dict[str, np.ndarray]) -> None:
    about = {"key": key, "hash": whole_hash(sorted(tensors.items()))}
    if not files.is_local(path):
        files.write(path, save(tensors, about))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, name, about)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _usable(path: PurePath, key: str) -> dict[str, np.ndarray] | None:
    """A stored context; None if there is none, or none that can be used."""
    if not retried(path.exists, path):
        return None
    try:
        return _read(path, key)
    except UserError as error:
        logger.warning("%s; it is computed again", error)
        return None


def _read(path: PurePath, key: str) -> dict[str, np.ndarray]:
    try:
        if files.is_local(path):
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            data = retried(path.read_bytes, path)
            about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            tensors = load(data)
    except Unreachable:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no stored context; fill the cache first") from None
    except Exception as error:  # safetensors raises its own type for a damaged header, numpy others for an odd dtype
        raise UserError(f"{path}: damaged stored context ({error}); delete it and fill the cache again") from None
    if (about.get("key"), about.get("hash")) != (key, whole_hash(sorted(tensors.items()))):
        why = "it is of another prompt or its values are not those that were stored"
        if "hash" not in about:
            why = "it has no hash, as those of version 0.1"
        raise UserError(f"{path}: damaged stored context ({why}); delete it and fill the cache again")
    return tensors
