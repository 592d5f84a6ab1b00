"""The terminal: one console for all output, streams that accept any text, and Ctrl-C.

All output passes :func:`printable` here, once. So no command has to escape text from outside (labels, file
names, names in manifests and annotations).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import IO, Any, Iterable, Iterator, Optional

from rich.console import Console
from rich.text import Text

from odtrt_lib.errors import InputError, printable

_WIDTH_OF_A_FILE = 110


class SafeConsole(Console):
    """A console that shows control characters instead of sending them."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escapes control characters. rich calls this method for every text, in tables too."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as rich does. Raises InputError if the stream cannot be written, e.g. if the disk is
        full."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            _abandon(self.file)
            raise InputError(
                f"standard {'error' if self.stderr else 'output'}: cannot be written "
                f"({error.strerror or error}); redirect it elsewhere"
            ) from error


def out() -> SafeConsole:
    """The console of standard output."""
    is_wide_enough = sys.stdout.isatty() or "COLUMNS" in os.environ
    return SafeConsole(width=None if is_wide_enough else _WIDTH_OF_A_FILE)


def lines(texts: Iterable[str]) -> Text:
    """Several lines for one cell of a table. A line break within a line is shown as an escape."""
    return Text("\n".join(map(printable, texts)))


def say_error(message: str) -> None:
    """Prints one red line to standard error. Never raises, so that the exit status is not lost."""
    with contextlib.suppress(InputError):
        console = SafeConsole(stderr=True)
        line = " ".join(message.split())
        console.print(line, style="red", soft_wrap=True, markup=False, highlight=False)


def prepare_streams() -> None:
    """Makes the standard streams accept any text: they write an escape for what the encoding lacks.

    Replaces a closed stream by one that discards everything.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Flushes the streams. If one can no longer be written, ignores it without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _abandon(stream)


class Interruption:
    """Whether Ctrl-C was pressed; see :func:`heeding_ctrl_c`."""

    def __init__(self) -> None:
        self.was_asked = False


@contextlib.contextmanager
def heeding_ctrl_c() -> Iterator[Interruption]:
    """Makes Ctrl-C end the block by KeyboardInterrupt at any moment.

    Python drops an exception that is raised in a destructor or in the callback of a weak reference, so it is
    raised again. An extension module can turn it into another exception. In both cases the caller can see in
    :class:`Interruption` that Ctrl-C was pressed. Does nothing if Ctrl-C is ignored or has another handler,
    or outside the main thread.
    """
    interruption = Interruption()
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interruption
        return
    show_unraisable = sys.unraisablehook

    def interrupt(number: int, frame: Any) -> None:
        interruption.was_asked = True
        raise KeyboardInterrupt

    def raise_again(dropped: Any) -> None:
        if dropped.exc_type is not None and issubclass(dropped.exc_type, KeyboardInterrupt):
            # Another thread raises it, because here it would be raised inside this hook.
            threading.Timer(0.01, _thread.interrupt_main).start()
        else:
            show_unraisable(dropped)

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = raise_again
    try:
        yield interruption
    finally:
        sys.unraisablehook = show_unraisable
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _abandon(stream: Optional[IO[str]]) -> None:
    """Points the stream's descriptor to /dev/null, so that Python's flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        assert stream is not None
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
