"""Times calls: one timing loop, and a histogram of bounded memory. All times are in microseconds.

A figure of a :class:`Histogram` differs from the recorded time by at most :data:`RELATIVE_ERROR`. Histograms
of several processes or machines can be merged. Needs numpy only.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Callable, Dict, Optional

import numpy as np

RELATIVE_ERROR = 1e-3
# The range in which RELATIVE_ERROR holds: a nanosecond to an hour.
MIN_US, MAX_US = 1e-3, 3.6e9
_LOG_RATIO = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
_BUCKETS = math.ceil(math.log(MAX_US / MIN_US) / _LOG_RATIO) + 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """The number of calls, and the percentiles, minimum and maximum of their times, in microseconds."""

    p50_us: float
    p95_us: float
    p99_us: float
    p999_us: float
    min_us: float
    max_us: float
    runs: int

    def row(self, prefix: str = "") -> Dict[str, float]:
        """The figures for a row of a results file: four digits, each name with ``prefix`` before it."""
        figures = dataclasses.asdict(self)
        rounded = {name: float(f"{figures[name]:.4g}") for name in figures if name != "runs"}
        return {f"{prefix}{name}": figure for name, figure in {**rounded, "runs": self.runs}.items()}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How many calls are timed.

    First come ``warmup`` calls that are not timed; none begins after ``seconds``. Then ``max_count`` calls
    are timed. After ``seconds`` no further call begins, unless fewer than ``min_count`` were timed.
    """

    warmup: int
    min_count: int
    max_count: int
    seconds: float = math.inf


class Histogram:
    """Counts times in buckets whose limits grow by a constant ratio. Takes 116 kB for any number of times.

    A bucket stands for the value from which both of its limits differ by RELATIVE_ERROR (as in DDSketch,
    Masson et al. 2019, arXiv:1908.10693). Times below MIN_US and above MAX_US are counted in the first and
    the last bucket. ``min_us`` and ``max_us`` are exact.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_BUCKETS, np.int64)
        self.min_us = math.inf
        self.max_us = 0.0

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def add(self, microseconds: float) -> None:
        """Counts one time. Raises ValueError if it is negative or not finite."""
        if not 0 <= microseconds < math.inf:
            raise ValueError(f"{microseconds} microseconds: expected a finite time that is not negative")
        bucket = math.ceil(math.log(max(microseconds, MIN_US) / MIN_US) / _LOG_RATIO)
        self.counts[min(bucket, _BUCKETS - 1)] += 1
        self.min_us = min(self.min_us, microseconds)
        self.max_us = max(self.max_us, microseconds)

    def merge(self, other: Histogram) -> None:
        """Adds the counts of ``other``."""
        self.counts += other.counts
        self.min_us = min(self.min_us, other.min_us)
        self.max_us = max(self.max_us, other.max_us)

    def percentile(self, percent: float) -> float:
        """The shortest time that at least ``percent`` % of all times do not exceed, in microseconds.

        Raises ValueError if nothing was counted.
        """
        count = self.count
        if not count:
            raise ValueError("no call was timed")
        rank = max(1, math.ceil(round(percent * count / 100, 6)))  # round: ceil must not see float errors
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        middle = MIN_US * math.exp(bucket * _LOG_RATIO) * (1 - RELATIVE_ERROR)
        return min(max(middle, self.min_us), self.max_us)

    def timing(self) -> Timing:
        """The percentiles, minimum and maximum. Raises ValueError if nothing was counted."""
        p50, p95, p99, p999 = (self.percentile(percent) for percent in (50, 95, 99, 99.9))
        return Timing(p50, p95, p99, p999, self.min_us, self.max_us, self.count)


def time_calls(
    call: Callable[[], Any], sampling: Sampling, synchronize: Optional[Callable[[], Any]] = None
) -> Timing:
    """The wall-clock times of ``call``; each includes ``synchronize``, if it is given."""
    return sample(wall_clock(call, synchronize), sampling).timing()


def wall_clock(
    call: Callable[[], Any], synchronize: Optional[Callable[[], Any]] = None
) -> Callable[[], float]:
    """A function that calls ``call``, then ``synchronize``, and returns how many microseconds that took."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if synchronize is not None:
            synchronize()
        return 1e6 * (time.perf_counter() - start)

    return once


def sample(once: Callable[[], float], sampling: Sampling) -> Histogram:
    """A histogram of the times that ``once`` returns, in microseconds, from any clock, e.g. CUDA events."""
    begun = time.perf_counter()
    for _ in range(sampling.warmup):
        once()
        if time.perf_counter() - begun > sampling.seconds:
            break
    histogram = Histogram()
    begun = time.perf_counter()
    for number in range(sampling.max_count):
        if number >= sampling.min_count and time.perf_counter() - begun > sampling.seconds:
            break
        histogram.add(once())
    return histogram
