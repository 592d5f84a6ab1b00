"""The C++ detector, ``libodtrt_detector.so``, from Python: what a C or C++ program does, in the same library.

``make plugin`` builds it. This module is ``plugins/detector/odtrt_detector.h`` in Python; that header says
what each function does. :class:`odtrt_lib.detector.Detector` is what most Python programs want: it rebuilds
plans and falls back to ONNX Runtime. This one is for measuring and testing the C ABI.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib import native
from odtrt_lib.detector import Detections, Heads
from odtrt_lib.errors import InputError, MissingDependencyError, one_line, printable
from odtrt_lib.preprocess import check_image

ABI_VERSION = 1
FILE_NAME = "libodtrt_detector.so"

_OK, _NO_CUDA, _TIMEOUT, _BUSY = 0, -3, -5, -6
_OF_THE_CALLER = (-1, -6, -7, -8, -9)  # invalid argument, busy, unknown ticket, bad model, no plan
_ERROR_BYTES = 1024
_RGB8, _BGR8 = 0, 1

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
_FLOATS = ctypes.POINTER(ctypes.c_float)
_NETWORK = ctypes.CFUNCTYPE(_INT, _POINTER, _FLOATS, _FLOATS, _FLOATS, _POINTER, _SIZE)


class _Struct(ctypes.Structure):
    """A structure of the C ABI, which begins with its size."""

    def __init__(self, **values: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(self), **values)


class Options(_Struct):
    """``odtrt_detector_options``."""

    _fields_ = (
        ("struct_size", _SIZE),
        ("folder", ctypes.c_char_p),
        ("network", _NETWORK),
        ("network_context", _POINTER),
        ("plugin", ctypes.c_char_p),
        ("plan", ctypes.c_char_p),
        ("num_slots", _INT),
    )


class Image(_Struct):
    """``odtrt_image``."""

    _fields_ = (
        ("struct_size", _SIZE),
        ("data", _POINTER),
        ("height", _INT),
        ("width", _INT),
        ("pitch", ctypes.c_int64),
        ("format", _INT),
    )


class Result(_Struct):
    """``odtrt_result``."""

    _fields_ = (
        ("struct_size", _SIZE),
        ("detections", _POINTER),
        ("capacity", _INT),
        ("num_detections", _INT),
        ("ticket", ctypes.c_uint64),
    )


class Shape(_Struct):
    """``odtrt_detector_shape``."""

    _fields_ = (
        ("struct_size", _SIZE),
        ("batch", _INT),
        ("height", _INT),
        ("width", _INT),
        ("num_anchors", _INT),
        ("num_columns", _INT),
        ("num_classes", _INT),
        ("max_detections", _INT),
    )


DETECTION = np.dtype([("box", np.float32, 4), ("score", np.float32), ("class_id", np.int32)])
"""``odtrt_detection``."""

_ERROR = (ctypes.c_char_p, _SIZE)
_TICKET = ctypes.POINTER(ctypes.c_uint64)
_SIGNATURES: Dict[str, Tuple[Any, Sequence[Any]]] = {
    "odtrt_detector_open": (_INT, (ctypes.POINTER(Options), ctypes.POINTER(_POINTER), *_ERROR)),
    "odtrt_detector_infer": (_INT, (_POINTER, ctypes.POINTER(Image), ctypes.POINTER(Result), *_ERROR)),
    "odtrt_detector_infer_async": (_INT, (_POINTER, ctypes.POINTER(Image), _TICKET, *_ERROR)),
    "odtrt_detector_result": (
        _INT,
        (_POINTER, ctypes.c_uint64, ctypes.c_int64, ctypes.POINTER(Result), *_ERROR),
    ),
    "odtrt_detector_slot": (_INT, (_POINTER, _INT, _INT, ctypes.POINTER(Image), *_ERROR)),
    "odtrt_detector_release": (_INT, (_POINTER, ctypes.POINTER(Image), *_ERROR)),
    "odtrt_detector_get_shape": (_INT, (_POINTER, ctypes.POINTER(Shape))),
    "odtrt_detector_class_name": (ctypes.c_char_p, (_POINTER, _INT)),
    "odtrt_detector_describe": (None, (_POINTER, ctypes.c_char_p, _SIZE)),
    "odtrt_detector_close": (None, (_POINTER,)),
}


def load_library(path: Union[str, Path, None] = None) -> ctypes.CDLL:
    """``libodtrt_detector.so``; path: None for the one beside ``libodtrt.so``, see
    :func:`odtrt_lib.native.load`.

    Raises MissingDependencyError if there is none, or if it has another ABI version than this module.
    """
    if path is None:
        kernels = native.load()
        if kernels is None:
            raise MissingDependencyError(f"{FILE_NAME}: not found; run `make plugin`")
        path = kernels.path.with_name(FILE_NAME)
    return _loaded(Path(path).resolve())


@functools.lru_cache(maxsize=8)
def _loaded(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.odtrt_detector_abi_version())
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"{path}: the detector's library cannot be loaded ({one_line(error)}); run `make plugin`"
        ) from error
    if found != ABI_VERSION:
        raise MissingDependencyError(
            f"{path}: ABI version {found}, expected {ABI_VERSION}; run `make plugin`"
        )
    return library


@dataclasses.dataclass(eq=False)
class NativeDetector:
    """A detector of the C++ library, for any number of threads.

    shape: what the network takes and gives. Close it, or use it in a ``with`` block.
    """

    shape: Shape
    _library: ctypes.CDLL = dataclasses.field(repr=False)
    _detector: int = dataclasses.field(repr=False)
    _close: Any = dataclasses.field(repr=False)

    @classmethod
    def open(
        cls,
        folder: Union[str, Path],
        *,
        infer: Optional[Callable[[np.ndarray], Heads]] = None,
        plugin: Union[str, Path, None] = None,
        plan: Optional[str] = None,
        num_slots: int = 0,
        library: Union[str, Path, None] = None,
    ) -> NativeDetector:
        """Opens a model folder.

        infer: None: a plan, on the GPU. Otherwise a network on the CPU, float32 [B, 3, height, width] ->
        raw heads, as :attr:`odtrt_lib.detector.Backend.infer`; ONNX Runtime's is
        ``Detector.open(folder, "onnxruntime").backend.infer``. plugin, plan, num_slots: see
        ``odtrt_detector_options``. library: see :func:`load_library`.

        Raises InputError if the folder or its plans cannot be used; MissingDependencyError without the
        library, and without a GPU for a plan; NativeError if CUDA fails.
        """
        loaded, shape = load_library(library), Shape()
        network = _NETWORK() if infer is None else _NETWORK(functools.partial(_run, infer, shape))
        options = Options(
            folder=_path(folder), network=network, plugin=_path(plugin), plan=_path(plan), num_slots=num_slots
        )
        opened, error = _POINTER(), ctypes.create_string_buffer(_ERROR_BYTES)
        _check(
            loaded.odtrt_detector_open(ctypes.byref(options), ctypes.byref(opened), error, len(error)), error
        )
        assert opened.value is not None
        loaded.odtrt_detector_get_shape(opened, ctypes.byref(shape))
        detector = cls(shape, loaded, opened.value, None)
        detector._close = weakref.finalize(detector, _close, loaded, opened.value, network)
        return detector

    def detect(self, image: np.ndarray) -> Detections:
        """The detections in an RGB image, uint8 [height, width, 3]."""
        result, found = self._room()
        self._call("odtrt_detector_infer", ctypes.byref(_image(image)), ctypes.byref(result))
        return self._detections(found[: result.num_detections])

    def submit(self, image: np.ndarray) -> Optional[int]:
        """Begins to detect and returns a ticket; None if all slots are in use, so that this image may be
        dropped."""
        ticket = ctypes.c_uint64()
        given = ctypes.byref(_image(image)), ctypes.byref(ticket)
        return None if self._call("odtrt_detector_infer_async", *given, allowed=_BUSY) else ticket.value

    def result(self, ticket: int, timeout: Optional[float] = None) -> Optional[Detections]:
        """The detections of a ticket; None if they are not there after ``timeout`` seconds."""
        microseconds = -1 if timeout is None else int(timeout * 1e6)
        result, found = self._room()
        if self._call("odtrt_detector_result", ticket, microseconds, ctypes.byref(result), allowed=_TIMEOUT):
            return None
        return self._detections(found[: result.num_detections])

    def slot(self, height: int, width: int) -> Optional[np.ndarray]:
        """Memory to write an image into, uint8 [height, width, 3], that is not copied when it is submitted;
        None if all slots are in use."""
        image = Image()
        if self._call("odtrt_detector_slot", height, width, ctypes.byref(image), allowed=_BUSY):
            return None
        memory = (ctypes.c_uint8 * (3 * height * width)).from_address(image.data)
        return np.ctypeslib.as_array(memory).reshape(height, width, 3)

    def release(self, slot: np.ndarray) -> None:
        """Gives a slot back that was not submitted."""
        self._call("odtrt_detector_release", ctypes.byref(_image(slot)))

    @property
    def description(self) -> str:
        """What runs the network, in words."""
        text = ctypes.create_string_buffer(_ERROR_BYTES)
        self._library.odtrt_detector_describe(self._open(), text, len(text))
        return text.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Waits for running work and frees everything. Later calls raise InputError."""
        self._close()

    def __enter__(self) -> NativeDetector:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> int:
        if not self._close.alive:
            raise InputError("this detector is closed; open the folder again")
        return self._detector

    def _call(self, name: str, *arguments: Any, allowed: int = _OK) -> int:
        """The status: 0, or ``allowed``. Raises an error for others."""
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        status: int = getattr(self._library, name)(self._open(), *arguments, error, len(error))
        return status if status == allowed else _check(status, error)

    def _room(self) -> Tuple[Result, np.ndarray]:
        """An empty result, and the memory for its detections."""
        found = np.zeros(self.shape.max_detections, DETECTION)
        return Result(detections=found.ctypes.data, capacity=len(found)), found

    def _detections(self, found: np.ndarray) -> Detections:
        ids = found["class_id"].astype(np.int64)
        names = (self._library.odtrt_detector_class_name(self._open(), int(one)) for one in ids)
        return Detections(
            boxes=np.ascontiguousarray(found["box"]),
            scores=np.ascontiguousarray(found["score"]),
            class_ids=ids,
            names=tuple(name.decode() for name in names),
        )


def _close(library: ctypes.CDLL, detector: int, network: Any) -> None:
    """network: the callback, which must live until the detector has stopped."""
    library.odtrt_detector_close(detector)


def _path(path: Union[str, Path, None]) -> Optional[bytes]:
    return None if path is None else str(path).encode("utf-8", "surrogateescape")


def _check(status: int, error: Any) -> int:
    if status == _OK:
        return status
    text = printable(error.value.decode("utf-8", "replace"))
    if status == _NO_CUDA:
        raise MissingDependencyError(text)
    raise (InputError if status in _OF_THE_CALLER else native.NativeError)(text)


def _image(image: np.ndarray) -> Image:
    """The image where it lies, if the library can read it there."""
    check_image(image)
    if not native._is_readable_where_it_lies(image):
        image = np.array(image, order="C")
    is_bgr = image.strides[2] < 0
    made = Image(
        data=image.ctypes.data - (2 if is_bgr else 0),
        height=image.shape[0],
        width=image.shape[1],
        pitch=image.strides[0],
        format=_BGR8 if is_bgr else _RGB8,
    )
    made.keeps = image  # as long as the structure, which the call needs
    return made


def _run(
    infer: Callable[[np.ndarray], Heads],
    shape: Shape,
    context: Any,
    network_input: Any,
    box_encodings: Any,
    class_logits: Any,
    error: Any,
    error_size: int,
) -> int:
    """``odtrt_network``: runs ``infer`` on one image. An exception becomes the line of an error."""
    try:
        batch = np.zeros((shape.batch or 1, 3, shape.height, shape.width), np.float32)
        batch[0] = np.ctypeslib.as_array(network_input, batch.shape[1:])
        for to, heads, columns in zip((box_encodings, class_logits), infer(batch), (4, shape.num_columns)):
            np.ctypeslib.as_array(to, (shape.num_anchors, columns))[:] = heads[0]
        return 0
    except BaseException as failure:
        said = one_line(failure).encode("utf-8", "replace")[: error_size - 1]
        ctypes.memmove(error, said + b"\0", len(said) + 1)
        return 1
