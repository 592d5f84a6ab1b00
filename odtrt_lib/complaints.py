"""What TensorRT complains about: it tells a recorder, not its caller, why it refuses."""

from __future__ import annotations

from typing import Any, List, MutableSequence, Tuple

_MOST_KEPT = 20


def error_recorder(trt: Any, messages: MutableSequence[str]) -> Any:
    """An ``IErrorRecorder`` of the module ``trt`` that adds each message to ``messages``.

    Keep it as long as any of TensorRT's objects: it still uses the recorder while it takes them down, and
    crashes if Python has freed it by then.
    """

    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.errors: List[Tuple[Any, str]] = []

        def report_error(self, code: Any, message: str) -> bool:
            messages.append(message)
            self.errors[:] = [*self.errors[1 - _MOST_KEPT :], (code, message)]
            return True

        def num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, index: int) -> Any:
            return self.errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.errors.clear()

    return Recorder()
