"""Records the steps of frames: on the host by its clock, on the GPU by CUDA events.

    recorder = Recorder()
    for image in images:
        with recorder.frame():
            detector.detect(image)

Any code may stand in the block, and :func:`odtrt_lib.spans.span` names steps of it. All times are
microseconds of one clock. The GPU's are placed on it by an event that is recorded while the stream is idle,
so they are late by no more than one launch takes. The ranges appear in Nsight Systems too, with the same
names, if NVIDIA's libnvToolsExt or libnvtx3interop is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from odtrt_lib import cuda, spans

GPU = "GPU"

_KINDS = {
    "cudaMemcpyAsync": "copy",
    "cudaStreamSynchronize": "wait",
    "cudaEventSynchronize": "wait",
    "cudaMalloc": "allocation",
    "cudaHostAlloc": "allocation",
}
# The steps in which the library itself makes calls of a kind.
_OWN_STEPS: Dict[str, Sequence[str]] = {"copy": ("upload", "download"), "wait": ("wait",)}
_NVTX = ("libnvToolsExt.so.1", "libnvToolsExt.so", "libnvtx3interop.so.1", "libnvtx3interop.so")


@dataclasses.dataclass(frozen=True)
class Span:
    """A step, in microseconds of the recorder's clock. lane: GPU, or the name of a thread. depth: how many
    steps of that lane enclose it."""

    name: str
    start_us: float
    end_us: float
    lane: str
    depth: int = 0

    @property
    def us(self) -> float:
        return self.end_us - self.start_us


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that copies, waits, allocates, or changes a picture.

    kind: ``copy``, ``wait``, ``allocation``, ``resize`` or ``colour``. step: the one that made it; empty
    outside of steps. where: the line of the caller's program, ``file.py:88``; empty for the library's own.
    is_own: whether the step makes it by design. side: of a CUDA copy, ``pageable to device``.
    """

    name: str
    kind: str
    step: str
    where: str
    start_us: float
    us: float
    is_own: bool = False
    side: str = ""
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame: its steps in order of their start, and its calls. lane: its thread's."""

    start_us: float
    end_us: float
    spans: Tuple[Span, ...]
    calls: Tuple[Call, ...]
    lane: str

    @property
    def us(self) -> float:
        return self.end_us - self.start_us


@dataclasses.dataclass(frozen=True)
class _DeviceStep:
    name: str
    start: cuda.Event
    end: cuda.Event


class Recorder:
    """Listens at :mod:`odtrt_lib.spans` while a frame runs, in all threads."""

    def __init__(self) -> None:
        self.frames: List[Frame] = []
        self._spans: List[Span] = []
        self._calls: List[Call] = []
        self._stacks: Dict[int, List[str]] = {}
        self._captured: Optional[List[_DeviceStep]] = None
        self._pending: List[Tuple[_DeviceStep, bool]] = []
        self._anchor: Optional[Tuple[cuda.Event, float]] = None
        self._free_events: List[cuda.Event] = []
        self._nvtx = _nvtx()

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """One frame, for a ``with`` block. If the block raises, the frame is not kept."""
        self._spans, self._calls, self._pending, self._anchor = [], [], [], None
        with spans.heard_by(self):
            start = self.now()
            yield
            end = self.now()
        ordered = tuple(sorted(self._spans, key=lambda one: (one.start_us, one.depth)))
        self.frames.append(Frame(start, end, ordered, tuple(self._calls), _lane()))

    def now(self) -> float:
        """Microseconds."""
        return 1e6 * time.perf_counter()

    # ---- what the library calls, through odtrt_lib.spans and odtrt_lib.cuda -------------------------------

    @contextlib.contextmanager
    def span(self, name: str, stream: Any = None) -> Iterator[None]:
        stack = self._stack()
        step = None if stream is None else self._begin(name, stream)
        if self._nvtx is not None:
            self._nvtx.nvtxRangePushA(name.encode())
        start, is_captured = self.now(), self._captured is not None
        stack.append(name)
        try:
            yield
        finally:
            stack.pop()
            if not is_captured:
                self._spans.append(Span(name, start, self.now(), _lane(), len(stack)))
            if self._nvtx is not None:
                self._nvtx.nvtxRangePop()
            if step is not None:
                self._record(step.end, stream)
        if name == "wait":
            self._collect()

    @contextlib.contextmanager
    def capture(self) -> Iterator[List[_DeviceStep]]:
        captured: List[_DeviceStep] = []
        self._captured = captured
        try:
            yield captured
        finally:
            self._captured = None

    def launching(self, captured: List[_DeviceStep], stream: Any) -> None:
        self._set_anchor(stream)
        self._pending += [(step, True) for step in captured]

    @contextlib.contextmanager
    def cuda_call(self, name: str, arguments: Sequence[Any]) -> Iterator[None]:
        kind = _KINDS.get(name)
        if kind is None or self._captured is not None:
            yield
            return
        side, size = "", 0
        if kind == "copy":
            to, of, size = arguments[:3]
            side = f"{cuda.side_of(of)} to {cuda.side_of(to)}"
        start = self.now()
        try:
            yield
        finally:
            self.called(name, kind, start, self.now(), side=side, size=size)

    def called(
        self, name: str, kind: str, start_us: float, end_us: float, *, side: str = "", size: int = 0
    ) -> None:
        """Notes a call that the current thread has made."""
        stack = self._stack()
        step = next((one for one in reversed(stack) if one not in ("launch",)), "")
        is_own = step in _OWN_STEPS.get(kind, ())
        where = "" if is_own else caller()
        self._calls.append(Call(name, kind, step, where, start_us, end_us - start_us, is_own, side, size))

    def close(self) -> None:
        """Frees the events. Graphs that were recorded meanwhile keep theirs."""
        while self._free_events:
            self._free_events.pop().free()
        if self._anchor is not None:
            self._anchor[0].free()
            self._anchor = None

    # ---- events -------------------------------------------------------------------------------------------

    def _begin(self, name: str, stream: Any) -> _DeviceStep:
        step = _DeviceStep(name, self._event(), self._event())
        if self._captured is None:
            self._set_anchor(stream)
            self._pending.append((step, False))
        else:
            self._captured.append(step)
        self._record(step.start, stream)
        return step

    def _set_anchor(self, stream: Any) -> None:
        """The first work after a wait: the stream is idle, so the event happens now."""
        if self._anchor is None:
            event = self._event()
            event.record(stream)
            self._anchor = event, self.now()

    def _record(self, event: cuda.Event, stream: Any) -> None:
        if self._captured is None:
            event.record(stream)
        else:
            event.record_in_graph(stream)

    def _event(self) -> cuda.Event:
        # A graph keeps its events for as long as it may be launched.
        is_for_graph = self._captured is not None
        return cuda.Event() if is_for_graph or not self._free_events else self._free_events.pop()

    def _collect(self) -> None:
        """Reads the events, after a wait: all have happened."""
        pending, self._pending = self._pending, []
        anchor, self._anchor = self._anchor, None
        if anchor is None:
            return
        event, at_us = anchor
        for step, is_of_graph in pending:
            with contextlib.suppress(cuda.CudaError):  # a graph that failed has not come to its events
                start, end = (at_us + one.microseconds_since(event) for one in (step.start, step.end))
                self._spans.append(Span(step.name, start, end, GPU))
            if not is_of_graph:
                self._free_events += (step.start, step.end)
        self._free_events.append(event)

    def _stack(self) -> List[str]:
        return self._stacks.setdefault(threading.get_ident(), [])


def caller() -> str:
    """``file.py:88``: the innermost line on this thread's stack that is neither odtrt's nor contextlib's."""
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None:
        if not is_of_odtrt(frame) and not frame.f_code.co_filename.endswith("/contextlib.py"):
            return line_of(frame)
        frame = frame.f_back
    return ""


def is_of_odtrt(frame: FrameType) -> bool:
    """Not by the file's name: a compiled module has that of where it was compiled."""
    return str(frame.f_globals.get("__package__")).partition(".")[0] == "odtrt_lib"


def line_of(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _lane() -> str:
    return threading.current_thread().name


def _nvtx() -> Any:
    for name in _NVTX:
        with contextlib.suppress(OSError, AttributeError):
            loaded = ctypes.CDLL(name)
            loaded.nvtxRangePushA.argtypes = [ctypes.c_char_p]
            loaded.nvtxRangePop.argtypes = []
            return loaded
    return None
