"""Names the calls of other libraries that copy a picture, wait for the GPU, or change a picture on the CPU.

Functions of Python are replaced by wrappers for as long as a ``with`` block lasts. A method of a C type, as
``cv2.UMat.get``, cannot be replaced: ``sys.setprofile`` tells of it, for the block's thread. Only modules
that are loaded are looked at. Calls that odtrt itself makes are left out. What C++ calls inside of another
library is not seen; NVIDIA's CUPTI would see its copies (a later step).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np

from odtrt_lib.latency.recorder import Recorder, is_of_odtrt, line_of

# (module, name in it, kind of Call)
_FUNCTIONS: Tuple[Tuple[str, str, str], ...] = (
    ("cv2", "resize", "resize"),
    ("cv2", "cvtColor", "colour"),
    ("PIL.Image", "Image.resize", "resize"),
    ("numpy", "ascontiguousarray", "colour"),
    ("cupy", "asnumpy", "copy"),
    ("torch", "Tensor.cpu", "copy"),
    ("torch.cuda", "synchronize", "wait"),
    ("pycuda.driver", "memcpy_dtoh", "copy"),
    ("pycuda.driver", "memcpy_htod", "copy"),
)
_C_METHODS = {"UMat.get": ("cv2.UMat.get", "copy")}


@dataclasses.dataclass(frozen=True)
class Change:
    """A picture before and after a function changed it on the CPU; both uint8 [height, width, 3].

    name, where: of the :class:`odtrt_lib.latency.recorder.Call`.
    """

    name: str
    kind: str
    where: str
    before: np.ndarray
    after: np.ndarray


@contextlib.contextmanager
def watched(recorder: Recorder) -> Iterator[Dict[Tuple[str, str], Change]]:
    """Tells ``recorder`` of these calls. Its value: (name, where) -> the last change of a picture there.

    The time of a call includes none of the watching; all other code takes longer meanwhile.
    """
    changes: Dict[Tuple[str, str], Change] = {}
    replaced: List[Tuple[Any, str, Any]] = []
    try:
        for module, path, kind in _FUNCTIONS:
            found = _find(module, path)
            if found is not None:
                owner, attribute, function = found
                name = f"{module}.{path}".replace("PIL.Image.Image", "PIL.Image")
                with contextlib.suppress(TypeError, AttributeError):
                    setattr(owner, attribute, _wrapped(function, name, kind, recorder, changes))
                    replaced.append((owner, attribute, function))
        before = sys.getprofile()
        sys.setprofile(_teller(recorder))
        try:
            yield changes
        finally:
            sys.setprofile(before)
    finally:
        for owner, attribute, function in reversed(replaced):
            setattr(owner, attribute, function)


def _find(module: str, path: str) -> Optional[Tuple[Any, str, Any]]:
    """The owner of a function, its name there, and the function itself, if the module is loaded."""
    owner: Any = sys.modules.get(module)
    *outer, attribute = path.split(".")
    for name in outer:
        owner = getattr(owner, name, None)
    function = getattr(owner, attribute, None)
    return None if function is None else (owner, attribute, function)


def _wrapped(
    function: Callable[..., Any],
    name: str,
    kind: str,
    recorder: Recorder,
    changes: Dict[Tuple[str, str], Change],
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        caller = sys._getframe(1)
        if is_of_odtrt(caller):
            return function(*arguments, **options)
        start = recorder.now()
        result = function(*arguments, **options)
        end = recorder.now()
        before, after = (_picture(one) for one in (arguments[0] if arguments else None, result))
        if kind != "colour" or (after is not None and before is not None):
            recorder.called(name, kind, start, end, size=_size(result))
        if kind in ("resize", "colour") and before is not None and after is not None:
            where = line_of(caller)
            changes[name, where] = Change(name, kind, where, before, after)
        return result

    return wrapper


def _picture(value: Any) -> Optional[np.ndarray]:
    """A picture as an array; None if it is none."""
    if type(value).__module__.startswith("PIL.") and getattr(value, "mode", "") == "RGB":
        value = np.asarray(value)
    is_picture = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3
    return value if is_picture and value.shape[2] == 3 and value.size else None


def _size(value: Any) -> int:
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0


def _teller(recorder: Recorder) -> Callable[[FrameType, str, Any], None]:
    started: List[float] = []

    def tell(frame: FrameType, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return", "c_exception"):
            return
        known = _C_METHODS.get(getattr(function, "__qualname__", ""))
        if known is None or is_of_odtrt(frame):
            return
        if event == "c_call":
            started.append(recorder.now())
        elif started:
            recorder.called(*known, started.pop(), recorder.now())

    return tell
