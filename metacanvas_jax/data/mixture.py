"""Mixing, twice: sources of one bucket sample by sample, and buckets of several shapes step by step.

A bucket is what a training step is compiled for: a task with its resolution, frames, context length and batch size. The
bucket of a step is a function of the seed and the step alone, so that all hosts agree on it without talking.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np

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
    """An endless stream of all sources by weight; each source is shuffled in every one of its epochs.

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


@dataclasses.dataclass(frozen=True)
class Stream:
    """The endless batches of one bucket, and its share of the steps; shares need not sum to one."""

    name: str
    batches: grain.IterDataset
    weight: float = 1.0


def bucket_of_step(weights: Sequence[float], seed: int, step: int) -> int:
    """Which bucket a step takes: drawn independently for every step, each by its weight."""
    ends = np.cumsum(np.asarray(weights, np.float64))
    point = np.random.default_rng((seed, step)).random() * ends[-1]
    return int(np.searchsorted(ends, point, side="right"))


class Mixture(grain.DatasetIterator):
    """Batches of several buckets, one bucket a step; resumes exactly, every bucket where it stood.

    Only the buckets that were asked prefetch. Raises UserError for no weight, or two buckets of one name.
    """

    def __init__(self, streams: Sequence[Stream], seed: int) -> None:
        self._closed = True  # what Grain's destructor looks at, should a check fail
        if any(stream.weight < 0 for stream in streams):
            raise UserError(f"bucket weights must not be negative: {[stream.weight for stream in streams]}")
        used = [stream for stream in streams if stream.weight > 0]
        if not used:
            raise UserError("no bucket has a weight above zero")
        self.names = tuple(stream.name for stream in used)
        if len(set(self.names)) < len(self.names):
            raise UserError(f"two buckets have the same name: {', '.join(sorted(self.names))}")
        self._weights = tuple(stream.weight for stream in used)
        self._seed, self._step = seed, 0
        super().__init__([iter(stream.batches) for stream in used])

    def bucket(self, step: int) -> str:
        """The name of the bucket that a step takes."""
        return self.names[bucket_of_step(self._weights, self._seed, step)]

    def __next__(self) -> Any:
        self._assert_not_closed()
        batch = next(self._parents[bucket_of_step(self._weights, self._seed, self._step)])
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The step, and the state of every bucket, as JSON-able values."""
        buckets = {name: parent.get_state() for name, parent in zip(self.names, self._parents, strict=True)}
        return {"step": self._step, "buckets": buckets}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state. Raises UserError when it is not one of these buckets."""
        found = state.get("buckets")
        if not isinstance(found, dict) or set(found) != set(self.names):
            names = ", ".join(sorted(found)) if isinstance(found, dict) else "no buckets"
            raise UserError(f"the data's position is that of {names}, expected the buckets {', '.join(self.names)}")
        self._step = int(state["step"])
        for name, parent in zip(self.names, self._parents, strict=True):
            parent.set_state(found[name])
