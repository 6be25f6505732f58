"""Random access over records that may be bad: counted, logged by name, passed over up to a limit, then a clear stop.

A record is bad when it cannot be decoded or is not there. Storage that does not answer says nothing about a record: it
is asked again (`retries.py`), and what still fails ends the run with ``Unreachable``.
"""

import abc
import logging
from collections.abc import Iterable

from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import Unreachable, UserError, first_line
from metacanvas_jax.retries import retried

logger = logging.getLogger(__name__)


class Guarded(abc.ABC):
    """A source for Grain. Subclasses read a record, and may raise whatever they like when it is bad.

    A bad record is replaced by the next good one, so that the length of a source and the order of its records do not
    depend on which of them are bad.

    Args:
      max_skips: how many bad records may be passed over before a UserError names one.
      in_memory: keep every sample once it has been read.
    """

    def __init__(self, max_skips: int = 0, in_memory: bool = False) -> None:
        if max_skips < 0:
            raise UserError(f"max_skips is {max_skips}, expected 0 or more")
        self.max_skips, self.in_memory = max_skips, in_memory
        self._kept: dict[int, Sample] = {}
        self._bad: set[int] = set()

    @abc.abstractmethod
    def __len__(self) -> int:
        """Records, bad ones included."""

    @abc.abstractmethod
    def read(self, index: int) -> Sample:
        """One record. Raises any exception when it is bad, UserError for what no other record can mend."""

    def name(self, index: int) -> str:
        """What a record is called in messages."""
        return f"record {index}"

    @property
    def skipped(self) -> int:
        """How many records were found bad."""
        return len(self._bad)

    def _counted(self) -> str:
        return f"{len(self._bad)} corrupt so far, {self.max_skips} allowed"

    def key(self, index: int) -> str:
        """What tells a record from the others wherever its folder lies: its hash decides about validation."""
        return self.name(index)

    def __getitem__(self, index: int) -> Sample:
        return self.first_good((index + step) % len(self) for step in range(len(self)))

    def first_good(self, indices: Iterable[int]) -> Sample:
        """The first of some records that is not bad. Raises UserError when too many are bad, or all of these."""
        for index in indices:
            sample = self.try_read(index)
            if sample is not None:
                return sample
        if len(self._bad) > self.max_skips:  # other threads found them, and stop at their own
            raise UserError(f"{self}: {self._counted()}")
        raise UserError(f"{self}: no readable record")

    def try_read(self, index: int) -> Sample | None:
        """A record, or None where it is bad and may be passed over.

        Raises UserError when it is bad and ``max_skips`` others were before, Unreachable when its storage is away.
        """
        if index in self._kept:
            return self._kept[index]
        if index in self._bad:
            return None
        try:
            sample = retried(lambda: self.read(index), f"{self}, {self.name(index)}")
        except (UserError, Unreachable):
            raise
        except Exception as error:  # decoders, containers, parsers and UTF-8 each have their own
            self._bad.add(index)
            message = f"{self}: {self.name(index)} is corrupt ({first_line(error)}); {self._counted()}"
            if len(self._bad) > self.max_skips:
                raise UserError(message) from error
            logger.warning("%s", message)
            return None
        if self.in_memory:
            self._kept[index] = sample
        return sample
