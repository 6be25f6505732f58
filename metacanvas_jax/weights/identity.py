"""What tells the weights of a folder from others: a hash of some bytes of every tensor, and one of all bytes.

A checkpoint records an identity for each part of the model, ``2:SAMPLED:WHOLE:BEFORE``. SAMPLED is always there. WHOLE
is empty until somebody has read the whole weights (``--verify``); a folder of `weights/saved.py` brings it in its
params.json. BEFORE is what version 0.1 recorded, which is compared with its records only. Neither depends on names of
folders and files.
"""

import hashlib
import re
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.weights.hashes import Distant
from metacanvas_jax.weights.safetensors_io import DTYPES, Checkpoint

FORM = "2:"
_HASH = re.compile("[0-9a-f]{64}")
BEFORE_TENSORS, BEFORE_BYTES = 64, 256


def record(sampled: str, whole: str, before: str) -> str:
    """The identity as checkpoints record it."""
    return f"{FORM}{sampled}:{whole}:{before}"


def differing(recorded: Mapping[str, str], now: Mapping[str, str], folders: Mapping[str, str]) -> list[str]:
    """The parts of ``now`` whose weights are not the recorded ones; ``folders`` are those they are in now.

    Records of version 0.1 have a key for each folder in place of each part, so that parts in one folder shared a key,
    and none for tokenizers.
    """
    if all(value.startswith(FORM) for value in recorded.values()):
        return [part for part, value in now.items() if not same(recorded.get(part, ""), value)]
    old = {part: _fields(value)[2] for part, value in now.items() if _fields(value)[2]}
    by_folder = {folders.get(part, part): value for part, value in old.items()}
    found = set(by_folder.values()) - set(recorded.values())
    return [part for part in old if by_folder[folders.get(part, part)] in found]


def missing(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is recorded and has no weights now."""
    if all(value.startswith(FORM) for value in recorded.values()):
        return [part for part in recorded if part not in now]
    there = {_fields(value)[2] for value in now.values()}
    return [folder for folder, value in recorded.items() if value not in there]


def same(recorded: str, now: str) -> bool:
    """Whether two identities are of the same weights; the first may be one of version 0.1."""
    if not recorded.startswith(FORM):
        return recorded == _fields(now)[2]
    (sampled, whole, _), (sampled_now, whole_now, _) = _fields(recorded), _fields(now)
    return sampled == sampled_now and (not whole or not whole_now or whole == whole_now)


def known(recorded: Mapping[str, str]) -> dict[str, str]:
    """The records that are hashes; an imported or a handmade checkpoint may have others, which say nothing."""
    return {part: value for part, value in recorded.items() if value.startswith(FORM) or _HASH.fullmatch(value)}


def kept(recorded: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """``now``, with the hashes of whole weights that were recorded of the same weights."""
    return {
        part: recorded[part]
        if not _fields(value)[1] and recorded.get(part, "").startswith(FORM) and same(recorded[part], value)
        else value
        for part, value in now.items()
    }


def stored(weights: Checkpoint, only: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray | Distant]]:
    """The tensors, or some of them, in the order in which they are hashed; of each, only what is looked at is read."""
    for name in sorted(name for name in weights.tensors if only is None or name in only):
        tensor = weights.tensors[name]
        if weights.local:
            yield name, weights.read(name)
        else:
            yield name, Distant(DTYPES[tensor.dtype], tensor.shape, partial(weights.part, name))


def before(weights: Checkpoint) -> str:
    """The identity of published weights in version 0.1: headers, and some bytes of up to 64 tensors."""
    digest = hashlib.sha256()
    names = sorted(weights.tensors)
    for name in names:
        tensor = weights.tensors[name]
        digest.update(f"{name} {tensor.file.name} {tensor.dtype} {tensor.shape} {tensor.offset}\n".encode())

    def some(i: int) -> bytes:
        tensor = weights.tensors[names[i]]
        start = tensor.nbytes // 2 // BEFORE_BYTES * BEFORE_BYTES
        # Of a small tensor at the end of a file, bytes behind it were taken as well, and fewer at the very end.
        return files.read_range(tensor.file, tensor.offset + start, min(BEFORE_BYTES, tensor.nbytes))

    places = np.unique(np.linspace(0, len(names) - 1, min(BEFORE_TENSORS, len(names))).astype(int))
    with ThreadPoolExecutor(16) as pool:
        for part in pool.map(some, places):
            digest.update(part)
    return digest.hexdigest()


def _fields(value: str) -> tuple[str, str, str]:
    """SAMPLED, WHOLE and BEFORE of an identity, of version 0.1 too."""
    if not value.startswith(FORM):
        return "", "", value
    sampled, whole, old = [*value.removeprefix(FORM).split(":"), "", ""][:3]
    return sampled, whole, old
