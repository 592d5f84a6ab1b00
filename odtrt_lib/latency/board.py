"""What a worker process shows its supervisor: counters, a heartbeat and histograms in shared memory.

They outlive the worker, however it ends. The counters are written twice in turn, and a sequence number says
which copy is whole. So a process that is killed in the middle of a change leaves the state before it.
Needs numpy only.
"""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import Callable, Dict, List, Mapping

import numpy as np

from odtrt_lib.latency.belt import KINDS
from odtrt_lib.latency.timing import Histogram

STAGES = ("opening", "waiting", "detecting", "canary")

_OBSERVED = (
    "grabbed",
    "processed",
    "dropped",
    "corrupt",
    "lost",  # frames of a worker that was killed
    "in_slot",
    "in_detector",
    "missing",
    "resized",
    "late",
    "losses",
    "reopened",
    "gaps",
)
_MEASURED = ("slow", "stalls", "canaries", "gc_objects", "next_number", "height", "width")
_NANOSECONDS = ("max_service_ns", "max_response_ns", "beat_ns", "stage", "start")
INJECTED = tuple(f"injected_{kind}" for kind in KINDS)
FIELDS = (*_OBSERVED, *_MEASURED, *INJECTED, *_NANOSECONDS)
HISTOGRAMS = ("service", "response")

_READS = 10_000


class Board:
    """Counters and histograms in a file that several processes map.

    Only the worker writes while one is alive. counts: field -> its newest value; see :data:`FIELDS`.
    histograms: service and response times, int64 counts as of :class:`odtrt_lib.latency.timing.Histogram`.
    """

    def __init__(self, path: Path) -> None:
        """Maps the file, which is made if it is missing or empty."""
        buckets = Histogram().counts.size
        words = 1 + 2 * len(FIELDS) + len(HISTOGRAMS) * buckets
        with path.open("a+b") as file:
            file.truncate(8 * words)
            self._words = np.frombuffer(mmap.mmap(file.fileno(), 8 * words), np.int64)
        self._copies = self._words[1 : 1 + 2 * len(FIELDS)].reshape(2, len(FIELDS))
        counts = self._words[1 + 2 * len(FIELDS) :].reshape(len(HISTOGRAMS), buckets)
        self.histograms = dict(zip(HISTOGRAMS, counts))
        self._lock = threading.Lock()
        self._own: List[int] = self._newest()

    @property
    def counts(self) -> Dict[str, int]:
        return dict(zip(FIELDS, self._newest()))

    def change(self, added: Mapping[str, int], **new: int) -> None:
        """Adds to some fields and sets others, in one step for every reader, also after a SIGKILL."""
        with self._lock:
            for name, amount in added.items():
                self._own[_PLACE[name]] += amount
            for name, value in new.items():
                self._own[_PLACE[name]] = value
            sequence = int(self._words[0]) + 1
            self._copies[sequence % 2] = self._own
            self._words[0] = sequence

    def reload(self) -> None:
        """Takes over what another process wrote, before this one writes."""
        self._own = self._newest()

    def histogram(self, name: str) -> Histogram:
        """A copy of a histogram."""
        found = Histogram()
        found.counts[:] = self.histograms[name]
        found.max_us = self.counts[f"max_{name}_ns"] / 1e3
        found.min_us = 0.0
        return found

    def adding(self, name: str) -> Callable[[float], None]:
        """A function that counts a time, in microseconds, in a histogram."""
        histogram = Histogram()
        histogram.counts = self.histograms[name]
        return histogram.add

    def _newest(self) -> List[int]:
        for _ in range(_READS):
            sequence = int(self._words[0])
            copy = self._copies[sequence % 2].tolist()
            if int(self._words[0]) == sequence:
                return copy
        return copy


_PLACE = {name: number for number, name in enumerate(FIELDS)}


def accounted(counts: Mapping[str, int]) -> int:
    """The frames whose fate is known. It equals ``grabbed`` at every moment."""
    fates = ("processed", "dropped", "corrupt", "lost", "in_slot", "in_detector")
    return sum(counts[fate] for fate in fates)
