"""From sources to batches: mix, drop captions, format, take this host's share, batch.

The stream is endless and a function of the seed alone. The hosts' batches of a step, one after the other, are the same
global batch for any number of hosts. An iterator resumes exactly (``get_state``, ``set_state``); its state counts
batches and so means the same place on any host.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8

from metacanvas_jax.data.mixture import Source, mixed
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError

Format = Callable[[Sample, np.random.Generator], Any]
"""A sample to what is batched; the generator is seeded by the sample's place in the stream."""

Collate = Callable[[Sequence[Any]], Any]
"""Formatted samples of one batch to a batch."""


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How a stream is read. ``batch`` is that of all hosts together.

    ``threads`` samples are read at the same time (0: when a batch is asked for), up to ``prefetch`` batches ahead.
    """

    batch: int
    seed: int = 0
    shuffle: bool = True
    caption_dropout: float = 0.0
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"the batch must be at least 1, got {self.batch}")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout is a probability, got {self.caption_dropout}")
        if self.threads < 0 or self.prefetch < 0:
            raise UserError(f"threads and prefetch must not be negative, got {self.threads} and {self.prefetch}")


def pipeline(
    sources: Sequence[Source],
    config: PipelineConfig,
    collate: Collate,
    *,
    format: Format | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """The batches of one host, endless; ``iter`` of it is the iterator to train from and to checkpoint.

    Raises UserError when the batch does not divide over the hosts.
    """
    if config.batch % process_count or not 0 <= process_index < process_count:
        raise UserError(
            f"a batch of {config.batch} does not divide over {process_count} hosts (this is {process_index})"
        )
    # Randomness comes before the hosts' shares are cut, so that it belongs to the sample and not to the host.
    stream = mixed(sources, config.seed, config.shuffle).seed(config.seed)
    if config.caption_dropout:
        stream = stream.random_map(lambda sample, rng: drop_caption(sample, rng, config.caption_dropout))
    if format is not None:
        stream = stream.random_map(format)
    share = config.batch // process_count
    batches = _Batches(
        stream, collate, config.batch, range(process_index * share, (process_index + 1) * share), config.threads
    )
    # Two batches at a time, so that the samples of the next one are read while one is put together.
    ahead = min(2, config.threads, config.prefetch)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=config.prefetch))


class _Batches(grain.MapDataset):
    """Of every ``batch`` elements the ``share`` that belongs to one host, in their order, as one batch.

    The elements of a batch are read by ``threads`` threads at the same time. Element and order depend on neither.
    """

    def __init__(self, stream: grain.MapDataset, collate: Collate, batch: int, share: range, threads: int) -> None:
        super().__init__(stream)
        self._collate, self._batch, self._share = collate, batch, share
        self._map = map if threads < 2 else ThreadPoolExecutor(threads, "read samples").map

    def __len__(self) -> int:
        return len(self.parents[0]) // self._batch

    def __getitem__(self, index: int) -> Any:
        return self._collate(
            list(self._map(self.parents[0].__getitem__, (index * self._batch + i for i in self._share)))
        )


def drop_caption(sample: Sample, rng: np.random.Generator, probability: float) -> Sample:
    """The sample with an empty prompt, with this probability: what classifier-free guidance learns from."""
    return dataclasses.replace(sample, prompt="") if rng.random() < probability else sample


def stack_pixels(samples: Sequence[Sample]) -> UInt8[np.ndarray, "b 1 h w 3"]:
    """The pictures of a batch as videos of one frame. Raises ValueError when their sizes differ."""
    if len({sample.image.shape for sample in samples}) > 1:
        raise ValueError(f"pictures of one batch differ in size: {sorted({s.image.shape for s in samples})}")
    return np.stack([sample.image for sample in samples])[:, None]
