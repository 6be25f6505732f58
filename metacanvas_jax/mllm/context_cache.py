"""Contexts on disk, so that a frozen MLLM reads every prompt once and not once per step.

One safetensors file per prompt holds the hidden states of its real tokens and, where a canvas will be written, their
keys and values. The name of the file is a hash of everything the context depends on: tokens, positions, media, and an
identity of weights and configuration that the caller supplies. Files are written whole or not at all, so several
processes may share a folder.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.prompt import Prompt, Prompter
from metacanvas_jax.types import Context, KeyValues, MllmInputs

VERSION = "1"  # of what is stored; another one is another key


def context_key(prompt: Prompt, identity: str) -> str:
    """SHA-256 of all that the context of a prompt depends on, in hexadecimal."""
    digest = hashlib.sha256(f"{VERSION}\n{identity}\n".encode())
    for patches, place in prompt.media:
        digest.update(f"{patches.grid} {place} {patches.values.dtype} {patches.values.shape}\n".encode())
        digest.update(np.ascontiguousarray(patches.values).data)
    for array in (prompt.tokens, prompt.positions):
        digest.update(f"{array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array, np.int32).data)
    return digest.hexdigest()


class ContextCache:
    """A folder of contexts of one model.

    ``identity`` names weights and configuration (their hash). With ``keys_values=False`` only hidden states are kept,
    about ``2 * layers * kv_heads * head_width / width`` times smaller: enough without a canvas, while a canvas run
    computes keys and values again.
    """

    def __init__(self, folder: str | Path, identity: str, *, keys_values: bool = True):
        self.folder, self.identity, self.keys_values = Path(folder), identity, keys_values

    def path(self, prompt: Prompt) -> Path:
        """Where the context of a prompt lies, or would."""
        key = context_key(prompt, self.identity)
        return self.folder / key[:2] / f"{key}.{'kv' if self.keys_values else 'hidden'}.safetensors"

    def missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that have no context here yet, each once."""
        paths = {self.path(prompt): prompt for prompt in prompts}
        return [prompt for path, prompt in paths.items() if not path.exists()]

    def store(self, prompts: Sequence[Prompt], context: Context) -> None:
        """Writes the contexts of a batch of prompts, without padding.

        Raises ValueError if keys and values are to be kept and the context has none.
        """
        if self.keys_values and context.cache is None:
            raise ValueError("the context holds no keys and values to store: encode it with cache=True")
        context = jax.device_get(context if self.keys_values else context.replace(cache=None))
        for i, prompt in enumerate(prompts):
            real = context.mask[i]
            tensors = {"hidden": context.hidden[i, real], "next_position": context.next_position[i : i + 1]}
            if context.cache is not None:
                tensors |= {"keys": context.cache.keys[:, i, real], "values": context.cache.values[:, i, real]}
            _write_whole(self.path(prompt), {name: np.ascontiguousarray(x) for name, x in tensors.items()})

    def load(self, prompts: Sequence[Prompt], length: int, *, pad_left: bool = False) -> Context:
        """The contexts of prompts as one batch padded to ``length``, in numpy and in the dtype they were computed in.

        Raises UserError naming the file if one is missing, damaged or longer than ``length``.
        """
        rows = [_read(self.path(prompt)) for prompt in prompts]
        longest = max(len(row["hidden"]) for row in rows)
        if longest > length:
            raise UserError(f"{self.folder}: a stored context of {longest} tokens does not fit length {length}")
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            real = len(row["hidden"])
            mask[i, slice(length - real, length) if pad_left else slice(0, real)] = True

        def gather(name: str, axis: int) -> np.ndarray:
            first = rows[0][name]
            out = np.zeros((*first.shape[:axis], len(rows), length, *first.shape[axis + 1 :]), first.dtype)
            for i, row in enumerate(rows):
                out[(slice(None),) * axis + (i, mask[i])] = row[name]
            return out

        cache = KeyValues(gather("keys", 1), gather("values", 1)) if self.keys_values else None
        start = np.concatenate([row["next_position"] for row in rows])
        return Context(hidden=gather("hidden", 0), mask=mask, cache=cache, next_position=start)

    def fill(
        self,
        prompts: Sequence[Prompt],
        prompter: Prompter,
        encode: Callable[[MllmInputs], Context],
        *,
        batch: int = 8,
    ) -> int:
        """Encodes and stores what is missing, in batches of prompts of similar length; returns how many it was."""
        missing = sorted(self.missing(prompts), key=lambda prompt: len(prompt.tokens))
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            padded = some + some[-1:] * (batch - len(some))  # one shape, one compilation
            self.store(some, encode(prompter.batch(padded)))
        return len(missing)


def _write_whole(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no stored context; fill the cache first") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged stored context ({error}); delete it and fill the cache again") from None
