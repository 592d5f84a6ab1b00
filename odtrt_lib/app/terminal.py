"""What goes to the terminal: one console for all output, and streams and Ctrl-C as they really are.

Text from outside (labels, file names, names in manifests and annotations) passes :func:`printable` here,
once, so that no command has to think of it.
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
        """Every text becomes visible through this method of rich's, in a table's cell as on a line."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Raises InputError if the stream cannot be written, such as on a full disk."""
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
    """Several lines for one cell of a table; a line break within one of them is shown."""
    return Text("\n".join(map(printable, texts)))


def say_error(message: str) -> None:
    """One red line on standard error. Never raises: the exit status must get through."""
    with contextlib.suppress(InputError):
        console = SafeConsole(stderr=True)
        line = " ".join(message.split())
        console.print(line, style="red", soft_wrap=True, markup=False, highlight=False)


def prepare_streams() -> None:
    """Gives this process streams that take any text: what the encoding lacks is written as an escape.

    A stream that is closed is replaced by one that forgets.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Sends what is left to the streams; if one takes nothing more, that is no news and no traceback."""
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
    """Ctrl-C ends the block by KeyboardInterrupt, wherever it falls.

    Python drops an exception that is raised in a destructor or in the callback of a weak reference, and an
    extension module can turn one into another; so the first is raised again, and the caller is told of both.
    Nothing changes if Ctrl-C is ignored or somebody else takes it, or outside the main thread.
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
            # From another thread: raised in this one, it would come up in this very hook.
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
    """Points the stream's descriptor at nothing, so that Python's own last flush does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        assert stream is not None
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
