"""Detectors with a seeded defect, to see that a soak finds it. They wrap what a recipe opens.

``leaking(recipe, 1.0)`` is itself a recipe: it opens a detector that keeps 1 MB a minute. Recipes can be
pickled, because a soak's worker is another process.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import time
from typing import Any, Callable, List

import numpy as np

Recipe = Callable[[], Any]
CHUNK = 1 << 16


class Defective:
    """A detector whose answers go through ``change(number of the call, answer)``."""

    def __init__(self, detector: Any, change: Callable[[int, Any], Any]) -> None:
        self.status = getattr(detector, "status", None)
        self._detector, self._change, self._calls = detector, change, 0

    def detect(self, image: np.ndarray) -> Any:
        self._calls += 1
        return self._change(self._calls, self._detector.detect(image))

    def close(self) -> None:
        self._detector.close()


def leaking(recipe: Recipe, mb_a_minute: float) -> Recipe:
    """Keeps memory that nobody needs, written so that it is really there."""
    return functools.partial(_open_leaking, recipe, mb_a_minute)


def drifting(recipe: Recipe, after_calls: int) -> Recipe:
    """From a call on, the last bit of each score is another."""
    return functools.partial(_open_drifting, recipe, after_calls)


def stalling(recipe: Recipe, at_call: int, seconds: float) -> Recipe:
    """One call takes some seconds longer."""
    return functools.partial(_open_stalling, recipe, at_call, seconds)


def hanging(recipe: Recipe, at_call: int) -> Recipe:
    """One call never returns."""
    return functools.partial(_open_hanging, recipe, at_call)


def _open_leaking(recipe: Recipe, mb_a_minute: float) -> Defective:
    kept: List[np.ndarray] = []
    begun = time.monotonic()

    def leak(_: int, found: Any) -> Any:
        owed = (time.monotonic() - begun) / 60 * mb_a_minute * (1 << 20)
        while len(kept) * CHUNK < owed:
            kept.append(np.ones(CHUNK, np.uint8))
        return found

    return Defective(recipe(), leak)


def _open_drifting(recipe: Recipe, after_calls: int) -> Defective:
    def drift(call: int, found: Any) -> Any:
        if call <= after_calls or not len(found.scores):
            return found
        return dataclasses.replace(found, scores=np.nextafter(found.scores, np.float32(0)))

    return Defective(recipe(), drift)


def _open_stalling(recipe: Recipe, at_call: int, seconds: float) -> Defective:
    def stall(call: int, found: Any) -> Any:
        if call == at_call:
            time.sleep(seconds)
        return found

    return Defective(recipe(), stall)


def _open_hanging(recipe: Recipe, at_call: int) -> Defective:
    def hang(call: int, found: Any) -> Any:
        while call == at_call:
            signal.pause()
        return found

    return Defective(recipe(), hang)
