"""Corrupt images are skipped, named and counted, without making a batch depend on anything but the files."""

import logging
import threading

from jaxdiff.data.images import CorruptImage
from jaxdiff.data.sources import Example, Source

logger = logging.getLogger("jaxdiff.data")


class SkipCorrupt:
    """A source in which a corrupt example gives way to the next good one (index + 1, + 2, ... around the end).

    Which examples are corrupt is a fact of the files, so source[i] stays a function of i alone. Each is logged once,
    as a warning; `bad` maps its index to the reason. When more than `max_bad_fraction` of all examples have turned
    out bad (one is always forgiven, unless the fraction is 0), reading raises ValueError.
    """

    def __init__(self, source: Source, max_bad_fraction: float = 0.01):
        if not 0 <= max_bad_fraction < 1:
            raise ValueError(f"max_bad_fraction must be at least 0 and below 1, not {max_bad_fraction}")
        self._source, self._max_bad_fraction = source, max_bad_fraction
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()  # the loader's threads read at the same time

    @property
    def max_bad(self) -> int:
        """How many examples may be bad."""
        return max(int(self._max_bad_fraction * len(self)), 1 if self._max_bad_fraction > 0 else 0)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label; empty without labels."""
        return self._source.class_names

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 without labels."""
        return self._source.num_classes

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self._source.channels

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width if all images have the same, else None."""
        return self._source.image_shape

    @property
    def has_text(self) -> bool:
        """Whether examples carry a caption."""
        return self._source.has_text

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if candidate not in self.bad:
                try:
                    return self._source[candidate]
                except CorruptImage as error:
                    self._report(candidate, str(error))
        raise ValueError(f"{self.describe()}: every image is corrupt")

    def describe(self) -> str:
        """One line: what, how many, how large, from where."""
        return self._source.describe()

    def _report(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self.bad:
                return
            self.bad[index] = reason
            count = len(self.bad)
            logger.warning("skipping a corrupt image: %s (skipped so far: %d of %d)", reason, count, len(self))
            if count > self.max_bad:
                allowed = f"at most {self.max_bad} of {len(self):,} may be"
                raise ValueError(f"too many corrupt images: {count} already, {allowed}; the last: {reason}")
