"""Several sources as one endless stream, in fixed proportions."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import grain

from metacanvas_jax.errors import UserError


class RandomAccess(Protocol):
    """What Grain reads from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A source and its share of the stream; shares need not sum to one."""

    records: RandomAccess
    weight: float = 1.0


def mixed(sources: Sequence[Source], seed: int, shuffle: bool = True) -> grain.MapDataset:
    """An endless stream of all sources by weight; every source is shuffled anew in every epoch of its own.

    The stream is a function of the seed alone. Raises UserError when no source has weight, or one of them is empty.
    """
    if any(source.weight < 0 for source in sources):
        raise UserError(f"source weights must not be negative: {[source.weight for source in sources]}")
    used = [(i, source) for i, source in enumerate(sources) if source.weight > 0]
    if not used:
        raise UserError("no data source has a weight above zero")
    streams = []
    for i, source in used:
        if len(source.records) == 0:
            raise UserError(f"data source {source.records} is empty")
        stream = grain.MapDataset.source(source.records).seed(seed + i)
        streams.append((stream.shuffle() if shuffle else stream).repeat())
    if len(streams) == 1:
        return streams[0]
    total = sum(source.weight for _, source in used)
    return grain.MapDataset.mix(streams, weights=[source.weight / total for _, source in used])
