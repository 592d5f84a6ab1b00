"""``odtrt``, and ``python -m odtrt_lib``: handles Ctrl-C from the start.

Importing the command line takes a while. Ctrl-C in that time must not end in a traceback.
"""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Runs the command line; see :func:`odtrt_lib.app.cli.main`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        from odtrt_lib.app import cli

        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        from odtrt_lib.app import cli
    cli.main()


def _leave(number: int, frame: Any) -> None:
    sys.stderr.write("interrupted; nothing half-written is left\n")
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
