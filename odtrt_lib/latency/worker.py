"""The process in which a soak's detector and camera run; :mod:`odtrt_lib.latency.soak` supervises it.

A thread reads the camera and keeps the newest frame; the main thread detects in it. Whatever happens to a
frame is counted on the board. What is rare (a lost camera, a slow frame, the canary's hash) is also told to
the supervisor, as ``(kind, content)``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import hashlib
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any, Callable, Optional, Tuple

import numpy as np

from odtrt_lib.errors import InputError, OdtrtError, one_line
from odtrt_lib.folder import atomic_write
from odtrt_lib.latency.belt import KINDS, Camera, Clock, Faults, Frame, is_picture
from odtrt_lib.latency.board import STAGES, Board
from odtrt_lib.sources import Source

LATE_AFTER_SECONDS, GAP_SECONDS, SILENT_SECONDS = 0.3, 2.0, 30.0
"""A frame that is older than this when it arrives is late; a camera that is silent for so long has stalled,
or is dead."""

SLOW_SECONDS, SLOW_TIMES = 0.05, 5.0
STALL_TIMES, STALL_AFTER_SECONDS = 20.0, 1.0
"""A frame is slow if its service time exceeds both limits, in seconds and in medians; likewise a stall."""

_TAKE_SECONDS = 0.5
_COLLECT_SECONDS = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0
_MEDIAN_EVERY = 64
_PR_SET_PDEATHSIG = 1

Tell = Callable[[str, Any], None]
Message = Tuple[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker does. It must be picklable.

    open_detector: returns something with ``detect(image)``, which returns Detections, and ``close()``.
    open_source: opens the camera, a live source. canary: the file of the canary frame, .npy; if it is
    missing, it is made of the first good frame. canary_every: detect in the canary after so many frames.
    """

    open_detector: Callable[[], Any]
    open_source: Callable[[Clock], Source]
    canary: Path
    canary_every: int = 100
    faults: Optional[Faults] = None


class Intake:
    """The camera's side of a worker: the newest frame, and what became of the others."""

    def __init__(self, camera: Camera, board: Board, clock: Clock, tell: Tell) -> None:
        self._camera, self._board, self._clock, self._tell = camera, board, clock, tell
        self._changed = threading.Condition()
        self._frame: Optional[Frame] = None
        self._last_captured: Optional[float] = None
        self._reading_since = clock.now()
        self._retry_at, self._wait = 0.0, _FIRST_WAIT
        self._was_open = False
        self._error: Optional[BaseException] = None
        self._is_over = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="odtrt-camera", daemon=True).start()

    def stop(self) -> None:
        self._is_over = True

    def step(self) -> None:
        """Reads one frame, or opens the camera if it is time to. Raises InputError if it was never there."""
        self._reading_since = self._clock.now()
        if not self._camera.is_open and not self._open():
            return
        try:
            frame = self._camera.read()
        except InputError as error:
            self._lose(str(error))
            return
        self._offer(frame)

    def take(self, seconds: float = _TAKE_SECONDS) -> Optional[Frame]:
        """The newest frame, which is then in the detector; None if none comes within ``seconds``.

        Raises what ended the thread, and InputError if the camera is silent for SILENT_SECONDS.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._error is not None, seconds)
            frame, self._frame = self._frame, None
            if frame is not None:
                self._beat("detecting", {"in_slot": -1, "in_detector": 1})
                return frame
        if self._error is not None:
            raise self._error
        if self._clock.now() - self._reading_since > SILENT_SECONDS:
            raise InputError(f"the camera gives neither a picture nor an error for {SILENT_SECONDS:.0f} s")
        self._beat("waiting", {})
        return None

    def _beat(self, stage: str, added: Any) -> None:
        self._board.change(added, stage=STAGES.index(stage), beat_ns=int(1e9 * self._clock.now()))

    def _run(self) -> None:
        try:
            while not self._is_over:
                self.step()
        except BaseException as error:  # `take` raises it
            with self._changed:
                self._error = error
                self._changed.notify()
        finally:
            self._camera.close()

    def _open(self) -> bool:
        now = self._clock.now()
        if now < self._retry_at:
            self._clock.sleep(self._retry_at - now)
        try:
            self._camera.open()
        except InputError as error:
            if not self._was_open and not self._board.counts["grabbed"]:
                raise
            self._retry_at = self._clock.now() + self._wait
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
            self._tell("waits", str(error))
            return False
        if self._was_open:
            self._board.change({"reopened": 1})
            self._tell("back", "")
        self._was_open, self._wait, self._last_captured = True, _FIRST_WAIT, None
        return True

    def _lose(self, reason: str) -> None:
        counts = self._board.counts
        missing = self._camera.next_number - counts["next_number"]
        self._board.change({"losses": 1, "missing": missing}, **self._injected())
        self._retry_at = self._clock.now() + self._wait
        self._tell("lost", reason)

    def _offer(self, frame: Frame) -> None:
        now, counts = self._clock.now(), self._board.counts
        is_good = is_picture(frame.image)
        added = {"grabbed": 1, "missing": frame.number - counts["next_number"]}
        added["late"] = int(now - frame.captured > LATE_AFTER_SECONDS)
        if self._last_captured is not None:
            added["gaps"] = int(frame.captured - self._last_captured > GAP_SECONDS)
        self._last_captured = frame.captured
        new = self._injected()
        if is_good:
            height, width = frame.image.shape[:2]
            if not counts["height"]:
                new.update(height=height, width=width)
            else:
                added["resized"] = int((height, width) != (counts["height"], counts["width"]))
        with self._changed:
            if not is_good:
                added["corrupt"] = 1
            elif self._frame is not None:
                added["dropped"] = 1  # the older one, which this one replaces
            else:
                added["in_slot"] = 1
            self._board.change(added, **new)
            if is_good:
                self._frame = frame
                self._changed.notify()

    def _injected(self) -> Any:
        ledger = {f"injected_{kind}": self._camera.ledger[kind] for kind in KINDS}
        return {**ledger, "next_number": self._camera.next_number}


class Service:
    """The detector's side of a worker."""

    def __init__(self, detector: Any, job: Job, board: Board, clock: Clock, tell: Tell) -> None:
        self._detector, self._job, self._board = detector, job, board
        self._clock, self._tell = clock, tell
        self._canary: Optional[np.ndarray] = None
        self._add = {name: board.adding(name) for name in ("service", "response")}
        self._median_us = 0.0
        self._collected = -_COLLECT_SECONDS
        self._count = 0
        if job.canary.is_file():
            self._canary = np.load(str(job.canary))
            self._try_canary()

    def process(self, frame: Frame) -> None:
        """Detects in one frame and counts it."""
        if self._canary is None:
            self._keep_canary(frame.image)
        begin = self._clock.now()
        self._detector.detect(frame.image)
        end = self._clock.now()
        service, response = 1e6 * (end - begin), 1e6 * (end - frame.captured)
        self._add["service"](service)
        self._add["response"](response)
        counts = self._board.counts
        self._board.change(
            {"processed": 1, "in_detector": -1, **self._exceeded(service)},
            stage=STAGES.index("waiting"),
            beat_ns=int(1e9 * end),
            max_service_ns=max(counts["max_service_ns"], int(1e3 * service)),
            max_response_ns=max(counts["max_response_ns"], int(1e3 * response)),
        )
        self._count += 1
        if self._count % self._job.canary_every == 0:
            self._try_canary()
        if end - self._collected > _COLLECT_SECONDS:
            self._collected = end
            self._board.change({}, gc_objects=len(gc.get_objects()))

    def _exceeded(self, service: float) -> Any:
        if self._count % _MEDIAN_EVERY == 0 or not self._median_us:
            self._median_us = self._board.histogram("service").percentile(50)
        is_slow = service > max(1e6 * SLOW_SECONDS, SLOW_TIMES * self._median_us)
        is_stall = service > max(1e6 * STALL_AFTER_SECONDS, STALL_TIMES * self._median_us)
        if is_slow:
            used = resource.getrusage(resource.RUSAGE_SELF)
            collections = sum(one["collections"] for one in gc.get_stats())
            context = {"major_faults": used.ru_majflt, "switches": used.ru_nivcsw, "collections": collections}
            self._tell("stall" if is_stall else "slow", {"service_ms": round(service / 1e3, 1), **context})
        return {"slow": int(is_slow), "stalls": int(is_stall)}

    def _try_canary(self) -> None:
        """Detects in the canary, and tells the hash of what was found."""
        now = int(1e9 * self._clock.now())
        self._board.change({}, stage=STAGES.index("canary"), beat_ns=now)
        found = self._detector.detect(self._canary)
        self._board.change(
            {"canaries": 1}, stage=STAGES.index("waiting"), beat_ns=int(1e9 * self._clock.now())
        )
        self._tell("canary", (result_hash(found), len(found.scores)))

    def _keep_canary(self, image: np.ndarray) -> None:
        self._canary = np.array(image)
        with atomic_write(self._job.canary) as temporary, temporary.open("wb") as file:
            np.save(file, self._canary)
        self._try_canary()


def result_hash(found: Any) -> str:
    """The SHA-256 of the bits of Detections, shapes and types included."""
    digest = hashlib.sha256()
    for array in (found.boxes, found.scores, found.class_ids):
        content = np.ascontiguousarray(array)
        digest.update(f"{content.dtype.str}{content.shape}".encode())
        digest.update(content.tobytes())
    return digest.hexdigest()


def serve(job: Job, board: Board, clock: Clock, tell: Tell) -> None:
    """Opens detector and camera, and detects until an error ends it, which it raises."""
    board.change({"start": 1}, stage=STAGES.index("opening"), beat_ns=int(1e9 * clock.now()))
    detector = job.open_detector()
    tell("opened", getattr(getattr(detector, "status", None), "description", type(detector).__name__))
    service = Service(detector, job, board, clock, tell)
    counts = board.counts
    ledger = {kind: counts[f"injected_{kind}"] for kind in KINDS}
    camera = Camera(lambda: job.open_source(clock), clock, job.faults, counts["next_number"], ledger)
    intake = Intake(camera, board, clock, tell)
    intake.start()
    while True:
        frame = intake.take()
        if frame is not None:
            service.process(frame)


def run(job: Job, board: Path, connection: Any, parent: int) -> None:
    """The worker process. Tells ``failed`` with (kind, reason) before it ends with an error.

    The kind is ``memory``, ``input`` for a wrong model or camera, or ``detector``. It ends with its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
    _end_with(parent)
    lock = threading.Lock()

    def tell(kind: str, content: Any) -> None:
        with lock:
            connection.send((kind, content))

    try:
        serve(job, Board(board), Clock(), tell)
    except BaseException as error:
        tell("failed", (_kind_of(error), f"{type(error).__name__}: {one_line(error)}"))
        connection.close()
        os._exit(1)  # the camera's thread, and CUDA after an error, may never end


def _kind_of(error: BaseException) -> str:
    is_cuda_memory = getattr(error, "number", None) == 2
    text = str(error).lower()
    if isinstance(error, MemoryError) or is_cuda_memory or "out of memory" in text or "bad_alloc" in text:
        return "memory"
    is_ours = isinstance(error, OdtrtError) and not hasattr(error, "number")
    return "input" if is_ours else "detector"


def _end_with(parent: int) -> None:
    """Asks Linux to end this process, also in the middle of a hung call, when its parent ends."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)
