"""Losses far above the usual."""

import collections
import statistics
from collections.abc import Sequence

WINDOW = 128
"""Losses that the usual is judged by."""
AT_LEAST = 32
"""Losses to have seen before one can be unusual."""


class Spikes:
    """Compares each loss with the median of the ``WINDOW`` before it.

    ``limit`` is in standard deviations, estimated as 1.4826 times the median distance from the median, so that earlier
    spikes do not hide later ones; 0 notices none. ``recent`` are the losses to go on from.
    """

    def __init__(self, limit: float, recent: Sequence[float] = ()):
        self._limit = limit
        self._recent = collections.deque(recent, maxlen=WINDOW)

    @property
    def recent(self) -> list[float]:
        """What a resumed run goes on from."""
        return list(self._recent)

    def usual(self, loss: float) -> float | None:
        """The median of those before, if this loss is a spike above it."""
        spike = None
        if self._limit and len(self._recent) >= AT_LEAST:
            median = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self._recent)
            if loss - median > self._limit * max(spread, 1e-6 * abs(median)):
                spike = median
        self._recent.append(loss)
        return spike
