"""Which samples of a source are kept out of the training, to validate it on them."""

import hashlib
from collections.abc import Sequence

from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.mixture import RandomAccess
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError


class Part:
    """Some records of a source, in their order. A bad one is replaced by the next good one of the same part."""

    def __init__(self, source: Guarded, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return repr(self.source)

    def __getitem__(self, index: int) -> Sample:
        count = len(self.indices)
        if not -count <= index < count:
            raise IndexError(f"{self} has {count} such samples, not {index}")
        return self.source.first_good(self.indices[(index + step) % count] for step in range(count))


def split(source: Guarded, share: float, validation: bool) -> RandomAccess:
    """The records of a source to train on, or those for ``validation``, of which there are about ``share``.

    Raises UserError when one of the two has no record.
    """
    if not share:
        return source
    chosen = validated(source, share)
    held = set(chosen)
    kept = chosen if validation else [index for index in range(len(source)) if index not in held]
    if not kept:
        raise UserError(f"{source}: of {len(source)} samples, a validation share of {share:g} leaves none to train on")
    return Part(source, kept)


def validated(source: Guarded, share: float) -> list[int]:
    """The numbers of the records for validation: those whose hash lies in the lowest ``share`` of all hashes.

    More records, or another order, move none from one part to the other. Where no hash is so low, it is the record with
    the lowest.
    """
    places = [place(source.key(index)) for index in range(len(source))]
    return [i for i, at in enumerate(places) if at < share] or [min(range(len(places)), key=places.__getitem__)]


def place(key: str) -> float:
    """Where a name falls in [0, 1)."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / (1 << 48)
