"""Starts a soak's worker process, ends it when it hangs, and starts it again when it is dead.

A hung GPU call cannot be cancelled inside of its process; only the end of the process frees it. So this side
uses no GPU and no detector: it watches the heartbeat on the board.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from odtrt_lib.errors import InputError
from odtrt_lib.latency import worker
from odtrt_lib.latency.belt import Clock
from odtrt_lib.latency.board import STAGES, Board

# With fewer arenas glibc gives back more of what threads free, so that a leak is seen sooner.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """When the watchdog acts. Times are in seconds.

    hang, hang_times: the longest silence of a worker that detects, and how many times the p99 it may be, if
    that is longer. canary, opening: likewise of one that detects in the canary or opens its model.
    first_wait, longest_wait: before a restart; doubles from one to the next. restarts, within: so many
    restarts in that time end the soak. unkillable: after a SIGKILL. lost: the camera did not come back.
    """

    hang: float = 5.0
    hang_times: float = 20.0
    canary: float = 60.0
    opening: float = 300.0
    first_wait: float = 0.5
    longest_wait: float = 30.0
    restarts: int = 5
    within: float = 600.0
    unkillable: float = 10.0
    lost: float = 600.0


class Process:
    """A worker process. Its environment has :data:`ENVIRONMENT`."""

    def __init__(self, job: worker.Job, board: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share CUDA's state
        self._receiver, sender = context.Pipe(duplex=False)
        arguments = (job, board, sender, os.getpid())
        self._process = context.Process(target=worker.run, args=arguments, daemon=True)
        with _environment(ENVIRONMENT):
            self._process.start()
        sender.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def exit_code(self) -> Optional[int]:
        """As of multiprocessing: negative for a signal; None while it lives."""
        return self._process.exitcode

    def messages(self) -> List[worker.Message]:
        """What the worker has told since the last call."""
        found: List[worker.Message] = []
        with contextlib.suppress(EOFError, OSError):
            while self._receiver.poll():
                found.append(self._receiver.recv())
        return found

    def kill(self, seconds: float) -> bool:
        """Sends SIGKILL and waits for the end. Returns False if the process lives on after ``seconds``."""
        self._process.kill()
        self._process.join(seconds)
        return self._process.exitcode is not None


class Watchdog:
    """Keeps a worker alive.

    start: makes a new worker, see :class:`Process`. note: is told each event, as (kind, content).
    end: why the soak cannot go on, or None. restarts: how often a worker was started again.
    p99_seconds: of the service time; whoever knows it sets it.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        board: Board,
        clock: Clock,
        limits: Limits,
        note: Callable[[str, Any], None],
    ) -> None:
        self.end: Optional[str] = None
        self.restarts = 0
        self.p99_seconds = 0.0
        self.worker: Any = None
        self._start, self._board, self._clock, self._limits, self._note = start, board, clock, limits, note
        self._restarted: List[float] = []
        self._retry_at, self._wait, self._started_at = clock.now(), limits.first_wait, 0.0
        self._failure: Optional[Tuple[str, str]] = None
        self._lost_since: Optional[float] = None
        self._oom_kills = oom_kills()

    def poll(self) -> None:
        """Hears the worker, and acts if it is dead or hangs. Raises InputError if it could never work."""
        now = self._clock.now()
        if self.worker is None:
            if now >= self._retry_at and self.end is None:
                self._begin(now)
            return
        self._hear()
        code = self.worker.exit_code
        if code is not None:
            self._hear()
            self._bury(now, self._cause(code))
        elif now - self._board.counts["beat_ns"] / 1e9 > self._patience():
            self._end_hung(now)
        elif self._lost_since is not None and now - self._lost_since > self._limits.lost:
            self.end = f"the camera was lost and did not come back in {self._limits.lost:.0f} s"

    def stop(self) -> None:
        """Ends the worker."""
        if self.worker is not None:
            self._hear()
            self.worker.kill(self._limits.unkillable)
            self.worker = None

    def _begin(self, now: float) -> None:
        self._board.reload()
        self._board.change({}, beat_ns=int(1e9 * now), stage=STAGES.index("opening"))
        self._failure, self._started_at, self._lost_since = None, now, None
        self.worker = self._start()

    def _hear(self) -> None:
        for kind, content in self.worker.messages():
            if kind == "failed":
                self._failure = content
                continue
            if kind in ("lost", "waits") and self._lost_since is None:
                self._lost_since = self._clock.now()
            elif kind == "back":
                self._lost_since = None
            self._note(kind, content)

    def _patience(self) -> float:
        stage = STAGES[self._board.counts["stage"]]
        hang = max(self._limits.hang, self._limits.hang_times * self.p99_seconds)
        return {"opening": self._limits.opening, "canary": max(self._limits.canary, hang)}.get(stage, hang)

    def _end_hung(self, now: float) -> None:
        counts = self._board.counts
        silent = now - counts["beat_ns"] / 1e9
        reason = f"hung: silent for {silent:.1f} s while {STAGES[counts['stage']]}"
        if self.worker.kill(self._limits.unkillable):
            self._bury(now, reason)
        else:
            self.end = (
                f"the worker process {self.worker.pid} {reason} and cannot be ended: the driver hangs, see "
                "dmesg, and restart the machine"
            )
            self._note("unkillable", self.end)

    def _cause(self, code: int) -> str:
        if self._failure is not None:
            return self._failure[1]
        if code < 0:
            return f"ended by signal {-code}"
        return f"ended with status {code} and no word"

    def _bury(self, now: float, reason: str) -> None:
        """Counts what the dead worker had in hand as lost, and decides when the next one starts."""
        self._board.reload()
        counts = self._board.counts
        in_hand = {name: -counts[name] for name in ("in_slot", "in_detector")}
        self._board.change({"lost": -sum(in_hand.values()), **in_hand})
        code, self.worker = self.worker.exit_code, None
        kind = self._failure[0] if self._failure is not None else ""
        if kind == "input" and not counts["processed"]:
            raise InputError(re.sub(r"^\w+Error: ", "", reason))
        if kind == "memory" or (
            code == -9 and not reason.startswith("hung") and oom_kills() > self._oom_kills
        ):
            self.end = f"out of memory: {reason}"
            self._note("memory", self.end)
            return
        self.restarts += 1
        self._note("restart", reason)
        self._restarted = [at for at in self._restarted if now - at < self._limits.within] + [now]
        if len(self._restarted) >= self._limits.restarts:
            self.end = (
                f"the detector ended {len(self._restarted)} times in {self._limits.within / 60:g} minutes; "
                f"the last time: {reason}"
            )
            return
        is_healthy = now - self._started_at > 2 * self._limits.longest_wait
        self._wait = self._limits.first_wait if is_healthy else self._wait
        self._retry_at = now + self._wait
        self._wait = min(2 * self._wait, self._limits.longest_wait)


def oom_kills() -> int:
    """How many processes the kernel has ended for lack of memory since it started."""
    with contextlib.suppress(OSError):
        match = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(match.group(1)) if match else 0
    return 0


@contextlib.contextmanager
def _environment(values: Dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
