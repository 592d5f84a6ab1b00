"""``odtrt``, and ``python -m odtrt_lib``: answers Ctrl-C from the first moment on.

The command line takes a while to be imported; an interruption in that time is no traceback.
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
