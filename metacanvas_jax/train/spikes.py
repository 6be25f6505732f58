"""Losses far above the usual."""

import collections
import statistics
from collections.abc import Sequence

WINDOW = 128
"""Number of losses in the median."""
AT_LEAST = 32
"""Number of losses before the first comparison."""


class Spikes:
    """Compares each loss with the median of the ``WINDOW`` before it.

    ``limit`` is in standard deviations; 0 reports no loss. The standard deviation is estimated as 1.4826 times the
    median distance from the median, so that earlier spikes do not hide later ones. ``recent`` are the latest losses.
    """

    def __init__(self, limit: float, recent: Sequence[float] = ()):
        self._limit = limit
        self._recent = collections.deque(recent, maxlen=WINDOW)

    @property
    def recent(self) -> list[float]:
        """The latest losses, which a checkpoint keeps."""
        return list(self._recent)

    def usual(self, loss: float) -> float | None:
        """The median of the losses before, if this loss is a spike above it, else None."""
        spike = None
        if self._limit and len(self._recent) >= AT_LEAST:
            median = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self._recent)
            if loss - median > self._limit * max(spread, 1e-6 * abs(median)):
                spike = median
        self._recent.append(loss)
        return spike
