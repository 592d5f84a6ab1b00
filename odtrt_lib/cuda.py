"""The CUDA runtime library through ctypes: memory of every kind, streams, events and graphs.

Memory is ``device`` (the GPU's own), ``pinned`` (page-locked host memory, which the GPU copies by itself) or
``mapped`` (pinned memory that kernels can access directly). Streams are non-blocking. An address is an
integer; :func:`address_of` returns the address of memory of PyCUDA, CuPy and PyTorch.

Every function raises CudaError if CUDA fails, and what :func:`library` raises. A CUDA call uses the current
GPU of its thread, which is 0 unless the program chose another.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import operator
import site
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from odtrt_lib import spans
from odtrt_lib.errors import CudaError as CudaError
from odtrt_lib.errors import InputError, MissingDependencyError, one_line

KINDS = ("device", "pinned", "mapped")
FILE_NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")

_ALIGNMENT = 256
_HOST_ALLOC_PORTABLE, _HOST_ALLOC_MAPPED = 1, 2
_COPY_DEFAULT = 4  # from the addresses CUDA sees which side each is on
_STREAM_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
_EVENT_RECORD_EXTERNAL = 1
_SIDES = ("pageable", "pinned", "device", "managed")  # cudaMemoryType

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_OUT = ctypes.POINTER(_POINTER)
_SIGNATURES: Dict[str, Sequence[Any]] = {
    "cudaMalloc": (_OUT, _SIZE),
    "cudaFree": (_POINTER,),
    "cudaHostAlloc": (_OUT, _SIZE, ctypes.c_uint),
    "cudaFreeHost": (_POINTER,),
    "cudaHostGetDevicePointer": (_OUT, _POINTER, ctypes.c_uint),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaMemsetAsync": (_POINTER, _INT, _SIZE, _POINTER),
    "cudaPointerGetAttributes": (_POINTER, _POINTER),
    "cudaMemGetInfo": (ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)),
    "cudaStreamCreateWithFlags": (_OUT, ctypes.c_uint),
    "cudaStreamDestroy": (_POINTER,),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamBeginCapture": (_POINTER, _INT),
    "cudaStreamEndCapture": (_POINTER, _OUT),
    "cudaEventCreate": (_OUT,),
    "cudaEventDestroy": (_POINTER,),
    "cudaEventRecord": (_POINTER, _POINTER),
    "cudaEventRecordWithFlags": (_POINTER, _POINTER, ctypes.c_uint),
    "cudaEventSynchronize": (_POINTER,),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _POINTER, _POINTER),
    "cudaGraphInstantiateWithFlags": (_OUT, _POINTER, ctypes.c_ulonglong),
    "cudaGraphUpload": (_POINTER, _POINTER),
    "cudaGraphLaunch": (_POINTER, _POINTER),
    "cudaGraphDestroy": (_POINTER,),
    "cudaGraphExecDestroy": (_POINTER,),
    "cudaGetLastError": (),
}


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """The CUDA runtime library, ``libcudart.so``.

    It is looked for as the dynamic loader does (LD_LIBRARY_PATH, ldconfig), in ``/usr/local/cuda/lib64``, and
    in NVIDIA's packages for Python. Raises MissingDependencyError if it is in none of these.
    """
    reasons: List[str] = []
    for name in (*FILE_NAMES, *_files()):
        try:
            found = ctypes.CDLL(name)
            for function, arguments in _SIGNATURES.items():
                getattr(found, function).argtypes = list(arguments)
            found.cudaGetErrorString.restype = ctypes.c_char_p
            return found
        except (OSError, AttributeError) as error:
            reasons.append(one_line(error))
    raise MissingDependencyError(
        f"the CUDA runtime library libcudart.so cannot be loaded ({reasons[0]}): install the CUDA toolkit, "
        "and put its lib64 into LD_LIBRARY_PATH"
    )


def _files() -> Iterator[str]:
    folders = [Path("/usr/local/cuda/lib64")]
    for place in (*site.getsitepackages(), site.getusersitepackages()):
        folders += Path(place, "nvidia").glob("c*/lib")  # nvidia/cuda_runtime, nvidia/cu13
    for folder in folders:
        yield from (str(path) for path in sorted(folder.glob("libcudart.so*")))


class Memory:
    """A block of memory, given back by :meth:`free` or when nobody refers to it any more.

    kind: one of :data:`KINDS`. address: where kernels find it; of pinned memory too, for copies. host: its
    bytes as a uint8 array [size], None if it is the GPU's own. What it holds at first is undefined.
    """

    def __init__(self, size: int, kind: str = "device") -> None:
        if kind not in KINDS:
            raise InputError(f"memory of kind {kind!r}: expected one of {', '.join(KINDS)}")
        self.size, self.kind, self._allocated = max(1, size), kind, 0
        self.host: Optional[np.ndarray] = None
        if kind == "device":
            self.address = self._allocated = _made("cudaMalloc", self.size)
            return
        flags = _HOST_ALLOC_PORTABLE | (_HOST_ALLOC_MAPPED if kind == "mapped" else 0)
        self.address = self._allocated = _made("cudaHostAlloc", self.size, flags)
        self.host = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self._allocated))
        if kind == "mapped":
            self.address = _made("cudaHostGetDevicePointer", self._allocated, 0)

    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def free(self) -> None:
        allocated, self._allocated, self.host = self._allocated, 0, None
        if allocated:
            _call("cudaFree" if self.kind == "device" else "cudaFreeHost", allocated)

    def __del__(self) -> None:
        quietly(self.free)


Field = Tuple[str, Any, Tuple[int, ...]]
"""One array of a :class:`Buffer`: its name, dtype and shape."""


class Buffer:
    """Named arrays, one after the other, in memory that the GPU can access; except ``device``, the host can
    too.

    kind: one of :data:`KINDS`, or ``pageable``: numpy's memory for the host and the GPU's own for the GPU.
    Where these are two, :meth:`upload` and :meth:`download` copy all of it. It grows, and never shrinks.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.size = kind, 0
        self._generation = 0
        self._fields: Dict[str, Tuple[int, Any, Tuple[int, ...]]] = {}
        self._device: Optional[Memory] = None
        self._pinned: Optional[Memory] = None
        self._host: Optional[np.ndarray] = None

    def arrange(self, fields: Sequence[Field]) -> bool:
        """Places the arrays, each at a multiple of 256 bytes. Returns whether an address has changed."""
        placed, offset = {}, 0
        for name, dtype, shape in fields:
            placed[name] = (offset, dtype, shape)
            offset += -(-_nbytes(dtype, shape) // _ALIGNMENT) * _ALIGNMENT
        if placed == self._fields:
            return False
        if self._device is None or offset > self._device.size:
            self.free()
            try:
                self._allocate(offset)
            except BaseException:
                self.free()
                raise
        self._fields, self.size = placed, offset
        return True

    def array(self, name: str) -> np.ndarray:
        """One array on the host's side, without a copy: valid until the buffer is arranged anew."""
        offset, dtype, shape = self._fields[name]
        assert self._host is not None, "device memory has no side of the host"
        return self._host[offset : offset + _nbytes(dtype, shape)].view(dtype).reshape(shape)

    def address(self, name: str) -> int:
        """The address of one array on the GPU's side."""
        assert self._device is not None
        return self._device.address + self._fields[name][0]

    def addresses(self) -> Dict[str, int]:
        return {name: self.address(name) for name in self._fields}

    @property
    def generation(self) -> int:
        """How often its memory was allocated: a graph of an earlier generation knows freed memory."""
        return self._generation

    def upload(self, stream: Stream) -> None:
        if self.kind != "mapped":
            host, device = self._sides
            copy(device, host, self.size, stream)

    def download(self, stream: Stream) -> None:
        if self.kind != "mapped":
            host, device = self._sides
            copy(host, device, self.size, stream)

    def write(self, name: str, array: np.ndarray, stream: Stream) -> None:
        """Copies ``array`` to the GPU's side; it has been read when this returns."""
        array = np.ascontiguousarray(array)
        copy(self.address(name), array.ctypes.data, array.nbytes, stream)
        stream.synchronize()

    def read(self, name: str, stream: Stream) -> np.ndarray:
        """A copy of the GPU's side, after all that the stream does before."""
        _, dtype, shape = self._fields[name]
        array = np.empty(shape, dtype)
        copy(array.ctypes.data, self.address(name), array.nbytes, stream)
        stream.synchronize()
        return array

    def content(self) -> bytes:
        """The arrays' bytes on the host's side."""
        return b"".join(self.array(name).tobytes() for name in self._fields)

    def overwrite(self, stream: Stream) -> None:
        """Enqueues a fill of the GPU's side: every float becomes NaN, and every integer -1."""
        if self._device is not None:
            fill(self._device.address, 0xFF, self.size, stream)

    def free(self) -> None:
        """Frees the memory. Never fails: after an error CUDA refuses to, but has freed everything."""
        for memory in (self._device, self._pinned):
            if memory is not None:
                quietly(memory.free)
        self._device = self._pinned = self._host = None
        self._fields = {}

    def _allocate(self, size: int) -> None:
        self._generation += 1
        if self.kind == "mapped":
            self._device = self._pinned = Memory(size, "mapped")
        else:
            self._device = Memory(size)
            self._pinned = Memory(size, "pinned") if self.kind == "pinned" else None
        if self._pinned is not None:
            self._host = self._pinned.host
        elif self.kind == "pageable":
            self._host = np.zeros(size, np.uint8)

    @property
    def _sides(self) -> Tuple[int, int]:
        """The addresses (host, device)."""
        assert self._host is not None and self._device is not None
        return self._host.ctypes.data, self._device.address


def _nbytes(dtype: Any, shape: Tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


class _Handle:
    """Something of CUDA's that :meth:`free` destroys, or the end of its last reference."""

    handle = 0
    _destroy = ""

    def free(self) -> None:
        handle, self.handle = self.handle, 0
        if handle:
            _call(self._destroy, handle)

    def __del__(self) -> None:
        quietly(self.free)


class Stream(_Handle):
    """A stream of its own, which does not wait for the default one. handle: its ``cudaStream_t``."""

    _destroy = "cudaStreamDestroy"

    def __init__(self) -> None:
        self.handle = _made("cudaStreamCreateWithFlags", _STREAM_NON_BLOCKING)

    def synchronize(self) -> None:
        """Waits until all that was enqueued is done."""
        _call("cudaStreamSynchronize", self.handle)


class Event(_Handle):
    """A moment on a stream."""

    _destroy = "cudaEventDestroy"

    def __init__(self) -> None:
        self.handle = _made("cudaEventCreate")

    def record(self, stream: Stream) -> None:
        _call("cudaEventRecord", self.handle, stream.handle)

    def record_in_graph(self, stream: Stream) -> None:
        """As :meth:`record`, while a graph is recorded: it happens anew whenever the graph is launched."""
        _call("cudaEventRecordWithFlags", self.handle, stream.handle, _EVENT_RECORD_EXTERNAL)

    def synchronize(self) -> None:
        """Waits until the stream has come to it."""
        _call("cudaEventSynchronize", self.handle)

    def microseconds_since(self, earlier: Event) -> float:
        """The GPU's time between two events that have both happened."""
        milliseconds = ctypes.c_float()
        _call("cudaEventElapsedTime", ctypes.byref(milliseconds), earlier.handle, self.handle)
        return 1e3 * milliseconds.value


class Graph(_Handle):
    """What a function enqueues on a stream, recorded once, to be launched by one call.

    The function is called by the constructor and runs nothing then. The recorded work uses the addresses and
    sizes of that moment for ever. Whatever the function raises comes through; the stream is usable after it.
    steps: those in it whose times a recorder wants, see :func:`odtrt_lib.spans.capture`.
    """

    _destroy = "cudaGraphExecDestroy"

    def __init__(self, stream: Stream, enqueue: Any) -> None:
        recorded = _POINTER()
        self.steps: List[Any] = []
        _call("cudaStreamBeginCapture", stream.handle, _CAPTURE_THREAD_LOCAL)
        try:
            with spans.capture() as self.steps:
                enqueue()
            _call("cudaStreamEndCapture", stream.handle, ctypes.byref(recorded))
        except BaseException:
            if not recorded.value:
                library().cudaStreamEndCapture(stream.handle, ctypes.byref(recorded))
            library().cudaGetLastError()
            if recorded.value:
                quietly(functools.partial(_call, "cudaGraphDestroy", recorded.value))
            raise
        try:
            self.handle = _made("cudaGraphInstantiateWithFlags", recorded.value, 0)
        except CudaError:
            library().cudaGetLastError()
            raise
        finally:
            if recorded.value:
                _call("cudaGraphDestroy", recorded.value)
        _call("cudaGraphUpload", self.handle, stream.handle)

    def launch(self, stream: Stream) -> None:
        spans.launching(self.steps, stream)
        _call("cudaGraphLaunch", self.handle, stream.handle)


def copy(destination: int, source: int, size: int, stream: Stream) -> None:
    """Enqueues a copy of ``size`` bytes between any two addresses, of host or device.

    Host memory that is not pinned has been read when this returns, or is written before it does.
    """
    _call("cudaMemcpyAsync", destination, source, size, _COPY_DEFAULT, stream.handle)


def fill(address: int, byte: int, size: int, stream: Stream) -> None:
    """Enqueues a fill: sets ``size`` bytes of memory that the GPU can access to ``byte``."""
    _call("cudaMemsetAsync", address, byte, size, stream.handle)


class _PointerAttributes(ctypes.Structure):
    _fields_ = (("type", _INT), ("device", _INT), ("device_pointer", _POINTER), ("host_pointer", _POINTER))


def side_of(address: int) -> str:
    """What memory lies at an address: ``pageable``, ``pinned`` (or mapped), ``device``, ``managed`` or
    ``unknown``. Never raises."""
    found, loaded = _PointerAttributes(), library()
    if loaded.cudaPointerGetAttributes(ctypes.byref(found), address):
        loaded.cudaGetLastError()
        return "unknown"
    return _SIDES[found.type] if 0 <= found.type < len(_SIDES) else "unknown"


def memory_info() -> Tuple[int, int]:
    """Bytes of the GPU's memory that are free, and all that it has."""
    free, total = _SIZE(), _SIZE()
    _call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def address_of(memory: Any) -> int:
    """The address of device memory that another library allocated.

    memory: an integer; PyCUDA's ``DeviceAllocation``; anything with ``__cuda_array_interface__``, as arrays
    of CuPy, PyTorch, Numba and PyCUDA have, and :class:`Memory`. Raises InputError for anything else.
    """
    interface = getattr(memory, "__cuda_array_interface__", None)
    if interface is not None:
        return int(interface["data"][0])
    for convert in (operator.index, int):
        with contextlib.suppress(TypeError, ValueError):
            return int(convert(memory))
    raise InputError(
        f"{type(memory).__name__}: expected device memory: an address, PyCUDA's allocation, or an array with "
        "__cuda_array_interface__"
    )


def _made(name: str, *arguments: Any) -> int:
    out = _POINTER()
    _call(name, ctypes.byref(out), *arguments)
    return out.value or 0


def _call(name: str, *arguments: Any) -> None:
    listener = spans.listener()
    if listener is None:
        _call_unheard(name, *arguments)
    else:
        with listener.cuda_call(name, arguments):
            _call_unheard(name, *arguments)


def _call_unheard(name: str, *arguments: Any) -> None:
    loaded = library()
    status = getattr(loaded, name)(*arguments)
    if status:
        text = loaded.cudaGetErrorString(status).decode(errors="replace")
        loaded.cudaGetLastError()  # else the next call of another library reports it once more
        raise CudaError(name, status, one_line(text))


def quietly(free: Any) -> None:
    """Calls ``free`` and ignores CUDA's errors: after an error CUDA refuses to free, but has freed
    everything."""
    if sys.is_finalizing():
        return
    with contextlib.suppress(Exception):
        free()
