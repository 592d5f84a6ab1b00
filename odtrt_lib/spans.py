"""The steps of a frame, and the seam at which a recorder hears of them.

The library says in one place for each step that it begins and ends: ``with span("preprocess"): ...``. Nobody
listens by default, and then this does nothing. :class:`odtrt_lib.latency.recorder.Recorder` listens.

A step has a host side, and with ``stream`` a side on the GPU, from when the stream gets there to when it is
done. Work that is recorded in a CUDA graph has that side each time the graph is launched; see
:func:`capture`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ContextManager, Iterator, List, Optional

if TYPE_CHECKING:
    from odtrt_lib.latency.recorder import Recorder

STEPS = ("capture", "decode", "preprocess", "upload", "engine", "postprocess", "download", "draw")
"""The steps of a frame. ``launch`` and ``wait``: the host enqueues work for the GPU, and waits for it."""

HOST_STEPS = ("launch", "wait")


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


_NOTHING = _Nothing()
_listener: Optional[Recorder] = None


def listener() -> Optional[Recorder]:
    """The recorder that listens, if one does."""
    return _listener


def span(name: str, stream: Any = None) -> ContextManager[None]:
    """A step, for a ``with`` block. stream: the :class:`odtrt_lib.cuda.Stream` on which it is enqueued."""
    return _NOTHING if _listener is None else _listener.span(name, stream)


def capture() -> ContextManager[List[Any]]:
    """For a ``with`` block in which a graph is recorded. Its value is for :func:`launching`."""
    return contextlib.nullcontext([]) if _listener is None else _listener.capture()


def launching(captured: List[Any], stream: Any) -> None:
    """Says that a graph is launched now. captured: the value of :func:`capture` when it was recorded."""
    if _listener is not None:
        _listener.launching(captured, stream)


@contextlib.contextmanager
def heard_by(recorder: Recorder) -> Iterator[None]:
    """Lets ``recorder`` listen in a ``with`` block, instead of whoever listened before."""
    global _listener
    before, _listener = _listener, recorder
    try:
        yield
    finally:
        _listener = before
