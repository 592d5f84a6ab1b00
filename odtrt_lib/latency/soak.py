"""Runs a detector on a camera for hours, and records what grows, drifts, stalls or gets lost.

The detector works in a worker process (:mod:`odtrt_lib.latency.worker`) under a watchdog. This process reads
its board once a second, and keeps the medians of at most a few hundred blocks: its memory does not grow with
the hours. A checkpoint is written every minute, whole or not at all, so a soak that was interrupted can go
on. :mod:`odtrt_lib.latency.verdict` judges the record, :mod:`odtrt_lib.latency.soak_report` shows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from odtrt_lib.errors import InputError
from odtrt_lib.folder import atomic_write
from odtrt_lib.latency.belt import Clock
from odtrt_lib.latency.board import FIELDS, HISTOGRAMS, Board
from odtrt_lib.latency.sensors import Elsewhere, Sensors, process_figures
from odtrt_lib.latency.timing import Histogram
from odtrt_lib.latency.watchdog import Limits, Process, Watchdog
from odtrt_lib.latency.worker import Job

CHECKPOINT = "checkpoint.json"
CANARY = "canary.npy"

SCHEMA = 1
SAMPLE_SECONDS = 1.0

_POLL_SECONDS = 0.1
_CHECKPOINT_SECONDS = 60.0
_MAX_BLOCKS, _MIN_BLOCKS, _SHORTEST_BLOCK = 120, 24, 10.0
_MAX_EVENTS = 200
_SHARES = ("throttled", "cpu_elsewhere")
_LEARNING = 10  # so many canaries may show different results; what comes later is drift


@dataclasses.dataclass
class Record:
    """What a soak has found so far, of all its parts. It is the checkpoint's content.

    settings: model, source, faults, seed; a part that goes on must have the same. seconds: how long it is to
    run. elapsed: how long it ran, without gaps. parts: of each the start (``wall``, seconds since 1970, and
    ``offset``, seconds since the first part's) and its ``seconds``. rows: one a block: ``at``, its middle in
    seconds since the first start, its ``seconds``, ``segment`` (the number of its worker process) and
    medians. counts: the board's. hashes: canary results that were learned -> how often they came. drifted:
    canary results that were not. events: the first _MAX_EVENTS, each with ``at``, ``kind`` and ``text``;
    event_counts: all of them. end: why it ended before its time; empty if it did not.
    """

    settings: Dict[str, Any]
    seconds: float
    elapsed: float = 0.0
    parts: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: List[Dict[str, float]] = dataclasses.field(default_factory=list)
    counts: Dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FIELDS, 0))
    histograms: Dict[str, Dict[str, int]] = dataclasses.field(default_factory=dict)
    hashes: Dict[str, int] = dataclasses.field(default_factory=dict)
    drifted: int = 0
    canary_detections: int = 0
    restarts: int = 0
    segment: int = 0
    events: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    event_counts: Dict[str, int] = dataclasses.field(default_factory=dict)
    description: str = ""
    end: str = ""
    schema: int = SCHEMA

    @property
    def block_seconds(self) -> float:
        """The length of a block: from 24 blocks in a short run to 120 in a long one."""
        return max(min(_SHORTEST_BLOCK, self.seconds / _MIN_BLOCKS), self.seconds / _MAX_BLOCKS)

    def histogram(self, name: str) -> Histogram:
        """The times of the whole run, ``service`` or ``response``; its maximum is exact."""
        found = Histogram()
        for bucket, count in self.histograms.get(name, {}).items():
            found.counts[int(bucket)] = count
        found.min_us, found.max_us = 0.0, self.counts[f"max_{name}_ns"] / 1e3
        return found


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a soak uses of the machine; tests replace it.

    wall: seconds since 1970. start: makes a worker. sample: the figures of a worker process, by its id, and
    of the machine. progress: is called with a text and the share that is done. say: is called with each event
    that concerns the user.
    """

    clock: Clock = dataclasses.field(default_factory=Clock)
    wall: Callable[[], float] = time.time
    start: Callable[[Job, Path], Any] = Process
    sample: Optional[Callable[[int], Dict[str, float]]] = None
    progress: Callable[[str, float], None] = lambda text, share: None
    say: Callable[[str], None] = lambda line: None
    limits: Limits = dataclasses.field(default_factory=Limits)


def soak(
    job: Job,
    folder: Path,
    seconds: float,
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    tools: Optional[Tools] = None,
) -> Record:
    """Runs a detector for so many seconds, and returns the record.

    folder: for the checkpoint and the canary. settings: what must not change when the soak goes on. resume:
    continue the one in ``folder`` up to ``seconds`` in all; else one that has ended is replaced. After an
    interruption, Ctrl-C too, the checkpoint is up to date and the worker has ended.

    Raises InputError if the detector or the camera cannot be opened, if there is nothing to continue, or
    without ``resume`` something that has not ended.
    """
    tools = tools or Tools()
    folder.mkdir(parents=True, exist_ok=True)
    record = _continued(folder, seconds, settings) if resume else Record(dict(settings), seconds)
    if not resume:
        _clear(folder)
    with _board_file() as path:
        board = Board(path)
        _restore(board, record)
        part = _Part(record, board, folder, tools)
        watchdog = Watchdog(lambda: tools.start(job, path), board, tools.clock, tools.limits, part.note)
        try:
            part.run(watchdog)
        finally:
            watchdog.stop()
            part.close(watchdog)
    return record


def load_record(folder: Path) -> Record:
    """The record of the last checkpoint. Raises InputError if there is none or it is damaged."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise InputError(f"{path}: not found; there is no soak to continue, start one without --resume")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA:
            raise InputError(f"{path}: of another version of odtrt; start a new soak without --resume")
        return Record(**content)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged; start a new soak without --resume") from error


class _Part:
    """One part of a soak, from a start to the next interruption."""

    def __init__(self, record: Record, board: Board, folder: Path, tools: Tools) -> None:
        self._record, self._board, self._folder, self._tools = record, board, folder, tools
        self._sample = tools.sample or _sampler()
        self._earlier = record.elapsed
        self._restarts_before = record.restarts
        wall = tools.wall()
        offset = 0.0
        if record.parts:
            offset = max(
                wall - record.parts[0]["wall"], record.parts[-1]["offset"] + record.parts[-1]["seconds"]
            )
        self._part: Dict[str, Any] = {"wall": wall, "offset": offset, "seconds": 0.0}
        record.parts.append(self._part)
        self._begun = tools.clock.now()
        self._newest: Dict[str, float] = {}
        self._worker_number = -1
        self._open_block(0.0)

    def run(self, watchdog: Watchdog) -> None:
        clock, record = self._tools.clock, self._record
        next_sample, next_checkpoint = clock.now(), clock.now() + _CHECKPOINT_SECONDS
        while record.elapsed < record.seconds and watchdog.end is None:
            watchdog.poll()
            now = clock.now()
            self._part["seconds"] = now - self._begun
            record.elapsed = self._earlier + self._part["seconds"]
            record.restarts = self._restarts_before + watchdog.restarts
            if now >= next_sample:
                next_sample = max(next_sample + SAMPLE_SECONDS, now)
                self._take_sample(watchdog)
            if now >= next_checkpoint:
                next_checkpoint = now + _CHECKPOINT_SECONDS
                self.checkpoint()
            clock.sleep(_POLL_SECONDS)
        record.end = watchdog.end or ""

    def close(self, watchdog: Watchdog) -> None:
        """Writes the last checkpoint."""
        self._record.restarts = self._restarts_before + watchdog.restarts
        if self._board.counts["grabbed"]:
            self._close_block()
            self.checkpoint()

    def checkpoint(self) -> None:
        """Writes the record, whole or not at all."""
        record = self._record
        record.counts = self._board.counts
        for name in HISTOGRAMS:
            counts = self._board.histograms[name]
            record.histograms[name] = {str(i): int(counts[i]) for i in np.flatnonzero(counts)}
        text = json.dumps(dataclasses.asdict(record), allow_nan=False)
        with atomic_write(self._folder / CHECKPOINT) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def note(self, kind: str, content: Any) -> None:
        """Takes an event of the worker or the watchdog into the record."""
        record = self._record
        if kind == "opened":
            record.description = str(content)
            return
        if kind == "canary":
            if not self._learn(*content):
                return
            kind, content = "drift", f"the canary's result is new: {content[0][:12]}, {content[1]} detections"
        record.event_counts[kind] = record.event_counts.get(kind, 0) + 1
        text = json.dumps({**content, **self._newest}) if isinstance(content, dict) else str(content)
        if len(record.events) < _MAX_EVENTS:
            at = self._part["offset"] + self._tools.clock.now() - self._begun
            record.events.append({"at": round(at, 3), "kind": kind, "text": text})
        if kind in ("restart", "drift", "stall", "memory", "unkillable"):
            self._tools.say(f"{kind}: {text}")

    def _learn(self, digest: str, detections: int) -> bool:
        """Whether a canary's result is drift: none of those that the first canaries showed."""
        record = self._record
        record.canary_detections = detections
        if digest in record.hashes or sum(record.hashes.values()) < _LEARNING:
            record.hashes[digest] = record.hashes.get(digest, 0) + 1
            return False
        record.drifted += 1
        return record.drifted == 1 or record.drifted % 1000 == 0

    def _take_sample(self, watchdog: Watchdog) -> None:
        at = self._part["seconds"]
        if watchdog.worker is not None and self._worker_number != watchdog.restarts:
            self._close_block()
            self._worker_number = watchdog.restarts
            self._record.segment += 1
            self._open_block(at)
        elif at - self._block_from >= self._record.block_seconds:
            self._close_block()
            self._open_block(at)
            watchdog.p99_seconds = self._p99_seconds()
        if watchdog.worker is None:
            return
        counts = self._board.counts
        self._newest = self._sample(watchdog.worker.pid)
        if counts["gc_objects"]:
            self._newest["gc_objects"] = float(counts["gc_objects"])
        for name, value in self._newest.items():
            self._samples.setdefault(name, []).append(value)
        share = self._record.elapsed / self._record.seconds
        self._tools.progress(f"{counts['processed']:,} frames", min(share, 1.0))

    def _p99_seconds(self) -> float:
        histogram = self._board.histogram("service")
        return histogram.percentile(99) / 1e6 if histogram.count else 0.0

    def _open_block(self, at: float) -> None:
        self._block_from = at
        self._samples: Dict[str, List[float]] = {}
        self._counts_before = self._board.counts
        self._times_before = {name: self._board.histograms[name].copy() for name in HISTOGRAMS}

    def _close_block(self) -> None:
        """Adds a row of medians, unless the block is too short to stand beside the others."""
        seconds = self._part["seconds"] - self._block_from
        if seconds < self._record.block_seconds / 2 or not self._samples:
            return
        counts = self._board.counts
        row: Dict[str, float] = {
            "at": self._part["offset"] + self._block_from + seconds / 2,
            "seconds": seconds,
            "segment": self._record.segment,
            "fps": (counts["processed"] - self._counts_before["processed"]) / seconds,
            "dropped": counts["dropped"] - self._counts_before["dropped"],
        }
        for name in HISTOGRAMS:
            row.update(_percentiles(name, self._board.histograms[name] - self._times_before[name]))
        for name, values in self._samples.items():
            row[name] = float(np.mean(values) if name in _SHARES else np.median(values))
        self._record.rows.append({name: float(f"{value:.9g}") for name, value in row.items()})


def _percentiles(name: str, counts: np.ndarray) -> Dict[str, float]:
    """p50 and p99 of the times of one block, in microseconds; empty if there are none."""
    histogram = Histogram()
    histogram.counts, histogram.min_us, histogram.max_us = np.maximum(counts, 0), 0.0, np.inf
    if not histogram.count:
        return {}
    return {f"{name}_p{percent}_us": histogram.percentile(percent) for percent in (50, 99)}


def _sampler() -> Callable[[int], Dict[str, float]]:
    sensors, elsewhere = Sensors(), Elsewhere()

    def sample(process: int) -> Dict[str, float]:
        share = elsewhere.share(process)
        found = {**process_figures(process), **sensors.read()}
        return found if share is None else {**found, "cpu_elsewhere": share}

    return sample


def _clear(folder: Path) -> None:
    """Removes an earlier soak that has ended."""
    earlier = None
    with contextlib.suppress(InputError):
        earlier = load_record(folder)
    if earlier is not None and earlier.elapsed < earlier.seconds and not earlier.end:
        raise InputError(
            f"{folder / CHECKPOINT}: a soak that was interrupted after {earlier.elapsed:.0f} of "
            f"{earlier.seconds:.0f} s; go on with --resume, or remove this file to start anew"
        )
    for name in (CHECKPOINT, CANARY):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()


def _continued(folder: Path, seconds: float, settings: Mapping[str, Any]) -> Record:
    record = load_record(folder)
    for name, value in record.settings.items():
        if settings.get(name) != value:
            raise InputError(
                f"{folder / CHECKPOINT}: {name} was {value!r} and is now {settings.get(name)!r}; go on with "
                "the same, or start a new soak without --resume"
            )
    if record.elapsed >= seconds:
        raise InputError(
            f"{folder / CHECKPOINT}: has run for {record.elapsed:.0f} s already, {seconds:.0f} s were asked "
            "for; ask for more"
        )
    record.seconds, record.end = seconds, ""
    return record


def _restore(board: Board, record: Record) -> None:
    """Puts the counts of earlier parts on the board. What was in hand when they ended is lost."""
    counts = dict(record.counts)
    counts["lost"] += counts["in_slot"] + counts["in_detector"]
    counts["in_slot"] = counts["in_detector"] = 0
    board.change({}, **counts)
    for name in HISTOGRAMS:
        board.histograms[name][:] = record.histogram(name).counts


@contextlib.contextmanager
def _board_file() -> Iterator[Path]:
    """A file without a name, in memory if possible, which goes with this process however it ends."""
    memory = "/dev/shm"
    with tempfile.TemporaryFile(dir=memory if os.access(memory, os.W_OK) else None) as file:
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def gaps(record: Record) -> List[Tuple[float, float]]:
    """The pauses between the parts, in seconds after the first start: (from, to)."""
    found = []
    for before, after in zip(record.parts, record.parts[1:]):
        found.append((before["offset"] + before["seconds"], after["offset"]))
    return found
