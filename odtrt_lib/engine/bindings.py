"""Access to TensorRT's Python bindings: which are installed, how plugins are loaded, the messages.

There are two libraries: ``tensorrt``, the full one, and ``tensorrt_rtx``. ``hasattr`` tells what a library
can do; version numbers are never compared.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Deque, List, MutableSequence, Tuple

from odtrt_lib.errors import CudaError, MissingDependencyError, one_line
from odtrt_lib.tensors import DOMAIN, PLUGIN, PLUGIN_VERSION
from odtrt_lib.variants import RUNTIME_LIBRARIES

# Overrides the builder's TF32 setting. A plan loads only if this has the same value as at the build.
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"

_MAX_MESSAGES = 20
_CUDA_FAILURE = re.compile(r"CUDA initialization failure with error: (\d+)")
# cudaError_t -> what it means for TensorRT's first object.
_OF_CUDA = {
    2: "out of memory: another process holds the GPU's",
    35: "the driver is older than this CUDA",
    100: "no GPU is there",
}
# Objects that must live as long as the process.
_KEPT: List[Any] = []
_RTX_FOLDERS: List[Any] = []


def import_library(runtime_library: str) -> ModuleType:
    """The module ``tensorrt`` or ``tensorrt_rtx``. Raises MissingDependencyError if it cannot be imported."""
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
    """The libraries that can be imported, as (module, version), the preferred one first.

    ``tensorrt`` is the full library. ``tensorrt_rtx`` is TensorRT-RTX, which also builds without a GPU.
    """
    found = []
    for runtime_library in RUNTIME_LIBRARIES:
        with contextlib.suppress(MissingDependencyError):
            found.append((runtime_library, import_library(runtime_library).__version__))
    return found


def load_plugin(registry: Any, library: Path) -> bool:
    """Loads ``libodtrt_tensorrt.so`` if the registry lacks it. Returns whether the registry has it now.

    registry: an ``IPluginRegistry``. Raises OSError if the dynamic loader, which TensorRT 8.5 needs, fails.
    """
    creator = (PLUGIN, PLUGIN_VERSION, DOMAIN)
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    if find(*creator) is None:  # a registry refuses to load a library twice
        if hasattr(registry, "load_library"):
            registry.load_library(str(library.resolve()))
        else:  # TensorRT 8.5: the library registers itself
            _KEPT.append(ctypes.CDLL(str(library.resolve()), ctypes.RTLD_GLOBAL))
    return find(*creator) is not None


def let_rtx_find_itself() -> None:
    """Makes TensorRT-RTX 1.7 able to parse a plugin's node. Call it before ``tensorrt_rtx`` is imported.

    Its parser loads ``libtensorrt_rtx.so``, and ends the process if that fails. The wheel has no file of that
    name. So this function loads the libraries through links in a temporary folder, which adds the name.

    Raises MissingDependencyError if ``tensorrt_rtx`` is imported already.
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


# ---- TensorRT's messages -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrtMessages:
    """The newest errors of one TensorRT module. It logs no errors while it has a recorder, so logger and
    recorder both add to ``messages``."""

    logger: Any
    recorder: Any
    messages: Deque[str]

    def reasons(self) -> str:
        return one_line("; ".join(dict.fromkeys(self.messages)) or "it gives no reason")

    def make(self, kind: Any) -> Any:
        """A ``Builder`` or a ``Runtime`` of the module, with the logger.

        Raises CudaError if CUDA finds no GPU, or no memory for its context. TensorRT answers with a TypeError
        then ("factory function returned nullptr"), and has the number of CUDA's error in a warning.
        """
        try:
            return kind(self.logger)
        except TypeError as error:
            found = _CUDA_FAILURE.search(" ".join(reversed(self.messages)))
            if found is None:
                raise
            number = int(found.group(1))
            raise CudaError(kind.__name__, number, _OF_CUDA.get(number, "CUDA cannot be used")) from error


@functools.lru_cache(maxsize=None)
def trt_messages(trt: Any) -> TrtMessages:
    """The logger and the error recorder of the module ``trt``, made once and kept until the process ends.

    TensorRT uses them until its last object is destroyed, and crashes if Python freed them before."""
    messages: Deque[str] = collections.deque(maxlen=_MAX_MESSAGES)
    serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in serious or _CUDA_FAILURE.search(message):
                messages.append(message)

    return TrtMessages(Logger(), error_recorder(trt, messages), messages)


def error_recorder(trt: Any, messages: MutableSequence[str]) -> Any:
    """An ``IErrorRecorder`` of the module ``trt`` that adds each message to ``messages``.

    Keep it as long as any of TensorRT's objects: TensorRT uses it until the last one is destroyed, and
    crashes if Python freed it before.
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
