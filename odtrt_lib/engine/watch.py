"""Runs one attempt as a process: starts it, samples it fifty times a second, ends it beyond its memory limit.

:mod:`odtrt_lib.engine.builder` is what runs in the process. The watchdog, the kernel or the user may kill it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from odtrt_lib import IMPORT_PATH
from odtrt_lib.engine import builder
from odtrt_lib.errors import one_line
from odtrt_lib.folder import ctrl_c_later
from odtrt_lib.machine import MIB, device_memory_meter, peak_rss_mb, rss_mb, state_and_ticks

Progress = Callable[[str, float], None]
NO_MEMORY = "out of memory: "
# Memory that a process reserves and never touches (threads' stacks, numpy's buffers) counts for RLIMIT_DATA,
# but is not resident.
UNTOUCHED_RLIMIT_ALLOWANCE = 128 * MIB

_MAX_SAMPLES = 200
_POLL_SECONDS = 0.02
_STALL_SECONDS = 8.0
_KILLED = "killed by signal 9: the kernel's out-of-memory killer or the memory limit"


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a process ended. outcome: in words. answer: the content of its ANSWER.json, or None. samples:
    [seconds, resident MiB, GPU MiB or None], at most 200."""

    outcome: str
    out_of_memory: bool
    answer: Optional[Dict[str, Any]]
    knows: Optional[List[str]]
    seconds: float
    peak_rss_mb: Optional[float]
    peak_gpu_mb: Optional[float]
    samples: List[List[Optional[float]]]


def run(
    request: builder.Request, limit: Optional[int], progress: Progress, variables: Mapping[str, str]
) -> RunResult:
    """Runs one request in a process of its own, and polls the process until it ends.

    limit: the bytes of memory that it may take, or None. variables: are added to its environment.
    """
    place = Path(request.folder)
    answer_file = place / builder.ANSWER
    with contextlib.suppress(FileNotFoundError):
        answer_file.unlink()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    request = dataclasses.replace(request, progress=writing)
    request_file = place / f"{request.task}.json"
    request_file.write_text(json.dumps(dataclasses.asdict(request)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_import_paths()), **variables}
    environment["TMPDIR"] = str(place)  # files that a killed process leaves go with this folder
    errors_file = place / f"{request.task}.stderr"
    process = None
    try:
        with errors_file.open("wb") as errors, ctrl_c_later():
            process = subprocess.Popen(
                [sys.executable, "-m", "odtrt_lib.engine.builder", str(request_file)],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=environment,
                pass_fds=(writing,),
                start_new_session=True,
            )
        os.close(writing)
        writing = -1
        watchdog = _Watchdog(process, limit, request.data_limit is not None or _has_rlimit())
        messages = _follow(watchdog, reading, progress)
    finally:
        if process is not None:
            if process.poll() is None:  # Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    answer = json.loads(answer_file.read_text()) if answer_file.is_file() else None
    said = errors_file.read_text(errors="replace")
    outcome, is_out_of_memory = _ending(watchdog, process.returncode, answer, said)
    peak = max([watchdog.peak_rss_mb, (answer or {}).get("peak_rss_mb") or 0.0])
    return RunResult(
        outcome,
        is_out_of_memory,
        answer,
        next((message["knows"] for message in messages if "knows" in message), None),
        time.perf_counter() - watchdog.started,
        round(peak, 1) or None,
        watchdog.peak_gpu_mb,
        watchdog.samples,
    )


def _ending(
    watchdog: _Watchdog, status: int, answer: Optional[Mapping[str, Any]], said: str
) -> Tuple[str, bool]:
    """How the process ended, in words, and whether memory was the reason."""
    watchdog.check_limit((answer or {}).get("peak_rss_mb") or 0.0)
    if watchdog.verdict is not None:
        return f"{NO_MEMORY}{watchdog.verdict}", True
    if answer is not None:
        if answer.get("error") == "MemoryError":
            return f"{NO_MEMORY}{one_line(answer['message'])}", True
        return ("built" if "error" not in answer else f"refused: {answer['message']}"), False
    last = one_line(said.strip().splitlines()[-1] if said.strip() else "it said nothing")
    if status == -signal.SIGKILL:
        return f"{NO_MEMORY}{_KILLED}", True
    if builder.is_out_of_memory(said):
        return f"{NO_MEMORY}{last}", True
    if status < 0:
        name = signal.Signals(-status).name
        under_limit = watchdog.is_under_rlimit and -status in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
        words = f"killed by signal {-status} ({name})"
        if under_limit:
            return f"{NO_MEMORY}{words} under the memory limit", True
        return f"ended without an answer, {words}: {last}", False
    return f"ended without an answer, exit status {status}: {last}", False


class _Watchdog:
    """Samples the memory of one process, and ends it if it exceeds the limit or hangs."""

    def __init__(self, process: Any, limit: Optional[int], is_under_rlimit: bool) -> None:
        self.process, self.limit, self.is_under_rlimit = process, limit, is_under_rlimit
        self.started = time.perf_counter()
        self.verdict: Optional[str] = None
        self.peak_rss_mb = 0.0
        self.peak_gpu_mb: Optional[float] = None
        self.samples: List[List[Optional[float]]] = []
        self._gpu, self._is_shared = device_memory_meter()
        self._gpu_before = self._gpu()
        self._every, self._next = _POLL_SECONDS, 0.0
        self._busy, self._busy_at = -1, self.started

    def poll(self) -> None:
        """Samples the process once. Is called about fifty times a second."""
        now = time.perf_counter() - self.started
        rss = rss_mb(self.process.pid)
        if not rss:  # it has ended
            return
        gpu = None
        if self._gpu_before is not None:
            used = self._gpu()
            gpu = None if used is None else round(max(0.0, used - self._gpu_before), 1)
        self.peak_rss_mb = max(self.peak_rss_mb, rss, peak_rss_mb(self.process.pid) or 0.0)
        if gpu is not None:
            self.peak_gpu_mb = max(self.peak_gpu_mb or 0.0, gpu)
        if now >= self._next:
            self.samples.append([round(now, 3), rss, gpu])
            self._next = now + self._every
            if len(self.samples) > _MAX_SAMPLES:
                del self.samples[1::2]
                self._every = max(2 * self._every, 2 * now / _MAX_SAMPLES)
        self.check_limit(self.peak_rss_mb)
        if self.verdict is None and self.is_under_rlimit:
            self._check_for_a_hang()
        if self.verdict is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def check_limit(self, peak_rss_mb: float) -> None:
        """Sets the verdict if the peak exceeds the limit. Is called once more after the process's end."""
        taken = max(peak_rss_mb, (self.peak_gpu_mb or 0.0) if self._is_shared else 0.0)
        if self.limit is not None and self.verdict is None and taken > self.limit / MIB:
            self.verdict = f"stopped at {taken:.0f} MiB, the limit is {self.limit / MIB:.0f} MiB"

    def _check_for_a_hang(self) -> None:
        state, busy = state_and_ticks(self.process.pid)
        now = time.perf_counter()
        if busy != self._busy or state not in "S":
            self._busy, self._busy_at = busy, now
        elif now - self._busy_at > _STALL_SECONDS:
            self.verdict = f"hung after it met the memory limit ({_STALL_SECONDS:.0f} s without any work)"


def _follow(watchdog: _Watchdog, reading: int, progress: Progress) -> List[Dict[str, Any]]:
    """Polls the process and passes on its progress until it ends; returns all messages from its pipe."""
    messages: List[Dict[str, Any]] = []
    rest, is_open = b"", True
    while True:
        has_ended = watchdog.process.poll() is not None
        ready = select.select([reading] if is_open else [], [], [], 0 if has_ended else _POLL_SECONDS)[0]
        if ready:
            data = os.read(reading, 65536)
            is_open = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                messages.append(message)
                if "phase" in message:
                    progress(message["phase"], message["fraction"])
        elif has_ended:
            return messages
        watchdog.poll()


def _import_paths() -> Iterator[str]:
    """The folders in which a child looks for modules: this process's, with those that a notebook added."""
    yield IMPORT_PATH
    for path in sys.path:
        if path and Path(path).is_dir() and Path(path).name != "odtrt_lib":
            yield str(Path(path).resolve())


def _has_rlimit() -> bool:
    kinds = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)
