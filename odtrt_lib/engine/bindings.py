"""The door to TensorRT's Python bindings: which are here, their plugins, and what they say.

Two libraries are served: ``tensorrt``, the full one, and ``tensorrt_rtx``. What a library can do is asked of
the library itself (``hasattr``); version numbers are never compared.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Deque, List, MutableSequence, Tuple

from odtrt_lib.errors import MissingDependencyError, one_line
from odtrt_lib.tensors import DOMAIN, PLUGIN, PLUGIN_VERSION
from odtrt_lib.variants import RUNTIME_LIBRARIES

# Overrides the builder's TF32 setting; a plan loads only if it has the value that it had at the build.
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"

_MAX_MESSAGES = 20
# What must stay for as long as the process lives.
_KEPT: List[Any] = []
_RTX_FOLDERS: List[Any] = []


def import_library(runtime_library: str) -> ModuleType:
    """The module ``tensorrt`` or ``tensorrt_rtx``; MissingDependencyError if it cannot be imported."""
    if runtime_library == "tensorrt_rtx" and runtime_library not in sys.modules:
        with contextlib.suppress(OSError):
            let_rtx_find_itself()
    try:
        return importlib.import_module(runtime_library)
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{RUNTIME_LIBRARIES[runtime_library]} cannot be imported ({one_line(error)}): install "
            f"`{runtime_library}`, or choose another backend"
        ) from error


def available_runtimes() -> List[Tuple[str, str]]:
    """The libraries that can be imported here, as (module, version), the preferred one first.

    ``tensorrt`` is the full library, ``tensorrt_rtx`` TensorRT-RTX, which also builds without a GPU.
    """
    found = []
    for runtime_library in RUNTIME_LIBRARIES:
        with contextlib.suppress(MissingDependencyError):
            found.append((runtime_library, import_library(runtime_library).__version__))
    return found


def load_plugin(registry: Any, library: Path) -> bool:
    """Loads ``libodtrt_tensorrt.so`` unless the registry has it. Returns whether it has it now.

    registry: an ``IPluginRegistry``. Raises OSError if TensorRT 8.5's way, the dynamic loader, fails.
    """
    creator = (PLUGIN, PLUGIN_VERSION, DOMAIN)
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    if find(*creator) is None:  # a registry refuses a library that it has
        if hasattr(registry, "load_library"):
            registry.load_library(str(library.resolve()))
        else:  # TensorRT 8.5: the library registers itself
            _KEPT.append(ctypes.CDLL(str(library.resolve()), ctypes.RTLD_GLOBAL))
    return find(*creator) is not None


def let_rtx_find_itself() -> None:
    """Makes TensorRT-RTX 1.7 able to parse a plugin's node; call it before ``tensorrt_rtx`` is imported.

    Its parser loads ``libtensorrt_rtx.so``, a name that its wheel does not have, and ends the process if
    that fails. The libraries are loaded here through links in a temporary folder, which has that name too.

    Raises MissingDependencyError if it is too late.
    """
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    if _RTX_FOLDERS or package is None or package.origin is None:
        return
    if "tensorrt_rtx" in sys.modules:
        raise MissingDependencyError(
            "tensorrt_rtx is imported already and cannot load plugins: "
            "call odtrt_lib.engine.bindings.let_rtx_find_itself() before the import"
        )
    folder = tempfile.TemporaryDirectory(prefix="odtrt-rtx-")
    _RTX_FOLDERS.append(folder)
    for library in Path(package.origin).parent.glob("lib*.so.*"):
        linked = Path(folder.name) / library.name
        linked.symlink_to(library)
        if library.name.startswith("libtensorrt_rtx.so"):
            (Path(folder.name) / "libtensorrt_rtx.so").symlink_to(library)
    for name in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
        _KEPT.extend(ctypes.CDLL(str(path)) for path in Path(folder.name).glob(name))


# ---- What TensorRT says ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrtMessages:
    """The errors of one TensorRT. With a recorder set, its logger does not get them, so both are here."""

    logger: Any
    recorder: Any
    messages: Deque[str]

    def reasons(self) -> str:
        return one_line("; ".join(dict.fromkeys(self.messages)) or "it gives no reason")


@functools.lru_cache(maxsize=None)
def trt_messages(trt: Any) -> TrtMessages:
    """The logger and recorder of the module ``trt``, made once and kept until the process ends: TensorRT
    still uses them while its objects are destroyed, and crashes if Python freed them first."""
    messages: Deque[str] = collections.deque(maxlen=_MAX_MESSAGES)
    serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                messages.append(message)

    return TrtMessages(Logger(), error_recorder(trt, messages), messages)


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
            self.errors[:] = [*self.errors[1 - _MAX_MESSAGES :], (code, message)]
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
