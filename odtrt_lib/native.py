"""The native library ``libodtrt.so``: post-processing, suppression and preprocessing in C++ and CUDA.

``make plugin`` builds it. This module is ``plugins/kernels/odtrt.h`` in Python; that header says what each
function does. :mod:`odtrt_lib.nms` and :mod:`odtrt_lib.preprocess` use the library if :func:`load` finds it,
and otherwise do the same in numpy. So most users need nothing from this module.

The functions that end in ``_cpu`` take numpy arrays. Those that end in ``_cuda`` take device memory: integer
addresses, or what PyCUDA, CuPy and PyTorch allocate. In structures, pass :func:`odtrt_lib.cuda.address_of` of
it. These functions enqueue their work on a stream and return at once. They allocate nothing, and a CUDA graph
can capture them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np

from odtrt_lib.cuda import address_of
from odtrt_lib.errors import InputError, MissingDependencyError, OdtrtError, one_line
from odtrt_lib.spec import DetectorSpec, InputSpec

ABI_VERSION = 1
MAX_DETECTIONS = 4096
FILE_NAME = "libodtrt.so"
ENVIRONMENT_VARIABLE = "ODTRT_LIBRARY"

_OK, _INVALID_ARGUMENT, _NO_CUDA = 0, -1, -3
_DTYPES: Dict[np.dtype, int] = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
SCORE_CONVERTERS = {"sigmoid": 0, "softmax": 1, "identity": 2}


class NativeError(OdtrtError):
    """The native library failed, e.g. because CUDA did; the message quotes the library's."""


class PostprocessParams(ctypes.Structure):
    """``odtrt_postprocess_params``; :func:`postprocess_params` makes one from a DetectorSpec."""

    _fields_ = (
        ("num_anchors", ctypes.c_int32),
        ("num_columns", ctypes.c_int32),
        ("background_column", ctypes.c_int32),
        ("score_converter", ctypes.c_int32),
        ("logit_factor", ctypes.c_float),
        ("box_scales", ctypes.c_float * 4),
        ("score_threshold", ctypes.c_float),
        ("iou_threshold", ctypes.c_float),
        ("max_detections_per_class", ctypes.c_int32),
        ("max_total_detections", ctypes.c_int32),
        ("class_agnostic", ctypes.c_int32),
        ("change_coordinate_frame", ctypes.c_int32),
    )


class HeadPointers(ctypes.Structure):
    """``odtrt_heads``: addresses; ``dtype`` is :data:`FLOAT32` or :data:`FLOAT16`."""

    _fields_ = (
        ("box_encodings", ctypes.c_void_p),
        ("class_logits", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("anchors", ctypes.c_void_p),
        ("clip_windows", ctypes.c_void_p),
    )


class DetectionPointers(ctypes.Structure):
    """``odtrt_detections``: the addresses to which results are written; ``anchors`` may be None."""

    _fields_ = (
        ("num_detections", ctypes.c_void_p),
        ("boxes", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("classes", ctypes.c_void_p),
        ("anchors", ctypes.c_void_p),
    )


class NmsParams(ctypes.Structure):
    """``odtrt_nms_params``."""

    _fields_ = (
        ("num_boxes", ctypes.c_int32),
        ("max_kept", ctypes.c_int32),
        ("score_threshold", ctypes.c_float),
        ("iou_threshold", ctypes.c_float),
    )


class PreprocessParams(ctypes.Structure):
    """``odtrt_preprocess_params``; :func:`preprocess_params` makes one from an InputSpec."""

    _fields_ = (
        ("image_height", ctypes.c_int32),
        ("image_width", ctypes.c_int32),
        ("image_pitch", ctypes.c_int64),
        ("bgr", ctypes.c_int32),
        ("true_height", ctypes.c_int32),
        ("true_width", ctypes.c_int32),
        ("output_height", ctypes.c_int32),
        ("output_width", ctypes.c_int32),
        ("scale", ctypes.c_float * 3),
        ("offset", ctypes.c_float * 3),
        ("pad_value", ctypes.c_float * 3),
        ("output_dtype", ctypes.c_int32),
        ("output_nhwc", ctypes.c_int32),
    )


FLOAT32, FLOAT16 = 0, 1

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_POSTPROCESS = (
    ctypes.POINTER(PostprocessParams),
    ctypes.c_int32,
    ctypes.POINTER(HeadPointers),
    ctypes.POINTER(DetectionPointers),
)
_NMS = (ctypes.POINTER(NmsParams), _POINTER, _POINTER, _POINTER, _POINTER, _POINTER)
_PREPROCESS = (ctypes.POINTER(PreprocessParams), _POINTER, _POINTER)
_SIGNATURES: Dict[str, Tuple[Any, Sequence[Any]]] = {
    "odtrt_postprocess_cpu": (ctypes.c_int32, (*_POSTPROCESS, ctypes.c_int32)),
    "odtrt_postprocess_workspace": (_SIZE, (ctypes.POINTER(PostprocessParams), ctypes.c_int32)),
    "odtrt_postprocess_cuda": (ctypes.c_int32, (*_POSTPROCESS, _POINTER, _SIZE, _POINTER)),
    "odtrt_nms_cpu": (ctypes.c_int32, _NMS),
    "odtrt_nms_workspace": (_SIZE, (ctypes.POINTER(NmsParams),)),
    "odtrt_nms_cuda": (ctypes.c_int32, (*_NMS, _POINTER, _SIZE, _POINTER)),
    "odtrt_preprocess_cpu": (ctypes.c_int32, (*_PREPROCESS, ctypes.c_int32)),
    "odtrt_preprocess_cuda": (ctypes.c_int32, (*_PREPROCESS, _POINTER)),
    "odtrt_error_string": (ctypes.c_char_p, (ctypes.c_int32,)),
    "odtrt_cuda_architectures": (ctypes.c_char_p, ()),
}


@dataclasses.dataclass(frozen=True)
class Library:
    """The loaded library. cuda_architectures: e.g. ``"87 90"``; empty if it was built without CUDA."""

    path: Path
    handle: ctypes.CDLL
    cuda_architectures: str


def load() -> Optional[Library]:
    """The native library, or None if there is none.

    It is looked for at the path in the environment variable ODTRT_LIBRARY; otherwise at
    ``plugins/build/libodtrt.so`` of this checkout, then beside this package's modules.

    Raises MissingDependencyError if the variable names no file, and if a file cannot be loaded or has another
    ABI version than this module.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return _open(Path(named))
    for path in _places():
        if path.is_file():
            return _open(path)
    return None


@functools.lru_cache(maxsize=1)
def _places() -> Tuple[Path, ...]:
    package = Path(__file__).resolve().parent
    return package.parent / "plugins" / "build" / FILE_NAME, package / FILE_NAME


@functools.lru_cache(maxsize=8)
def _open(path: Path) -> Library:
    try:
        handle = ctypes.CDLL(str(path.resolve()))
        found = int(handle.odtrt_abi_version())
        if found == ABI_VERSION:
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(handle, name)
                function.restype, function.argtypes = result, list(arguments)
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"{path}: the native library cannot be loaded ({one_line(error)}); run `make plugin`"
            + (f", or unset {ENVIRONMENT_VARIABLE}" if os.environ.get(ENVIRONMENT_VARIABLE) else "")
        ) from error
    if found != ABI_VERSION:
        raise MissingDependencyError(
            f"{path}: the native library has ABI version {found}, expected {ABI_VERSION}; run `make plugin`"
        )
    return Library(path, handle, handle.odtrt_cuda_architectures().decode())


def can_postprocess(spec: DetectorSpec) -> bool:
    """Whether the native library can post-process for this detector. Numpy can for every one."""
    heads, nms = spec.heads, spec.nms
    return (
        1 <= nms.max_total_detections <= MAX_DETECTIONS
        and nms.max_detections_per_class >= 1
        and 1 <= heads.num_anchors * heads.num_columns < 2**31
        and spec.heads.scores.converter in SCORE_CONVERTERS
    )


def postprocess_params(spec: DetectorSpec) -> PostprocessParams:
    """The post-processing settings of a detector, for the native library."""
    coder = spec.heads.box_coder
    return PostprocessParams(
        num_anchors=spec.heads.num_anchors,
        num_columns=spec.heads.num_columns,
        background_column=spec.heads.background_column,
        score_converter=SCORE_CONVERTERS[spec.heads.scores.converter],
        logit_factor=1.0 / spec.heads.scores.logit_scale,
        box_scales=(coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale),
        score_threshold=spec.nms.score_threshold,
        iou_threshold=spec.nms.iou_threshold,
        max_detections_per_class=spec.nms.max_detections_per_class,
        max_total_detections=spec.nms.max_total_detections,
        class_agnostic=spec.nms.class_agnostic,
        change_coordinate_frame=spec.nms.change_coordinate_frame,
    )


def preprocess_params(
    spec: InputSpec,
    image_size: Tuple[int, int],
    true_size: Tuple[int, int],
    *,
    pitch: Optional[int] = None,
    bgr: bool = False,
    dtype: int = FLOAT32,
    nhwc: bool = False,
) -> PreprocessParams:
    """The preprocessing settings for images of one size; sizes are ``(height, width)``.

    true_size: the size after resizing, :func:`odtrt_lib.preprocess.network_size`. pitch: bytes from one row
    of the image to the next; None: there is no gap between rows.
    """
    return PreprocessParams(
        image_height=image_size[0],
        image_width=image_size[1],
        image_pitch=3 * image_size[1] if pitch is None else pitch,
        bgr=bgr,
        true_height=true_size[0],
        true_width=true_size[1],
        output_height=spec.height,
        output_width=spec.width,
        scale=spec.scale,
        offset=spec.offset,
        pad_value=spec.resizer.pad_value,
        output_dtype=dtype,
        output_nhwc=nhwc,
    )


def postprocess_cpu(
    library: Library,
    box_encodings: np.ndarray,
    class_logits: np.ndarray,
    anchors: np.ndarray,
    spec: DetectorSpec,
    clip_windows: Optional[np.ndarray] = None,
    num_threads: int = 0,
) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``(num_detections, boxes, scores, classes, anchors)`` as in :class:`odtrt_lib.nms.Postprocessed`.

    box_encodings [B, N, 4] and class_logits [B, N, columns]: both float16; otherwise both are converted to
    float32. anchors: float32 [N, 4]. clip_windows: float32 [B, 4]; None: the whole input. num_threads: 0 for
    as many as the machine has.

    Raises InputError if a shape or a setting is not as ``odtrt.h`` says.
    """
    batch, most = len(box_encodings), spec.nms.max_total_detections
    are_half = box_encodings.dtype == np.float16 and class_logits.dtype == np.float16
    dtype = np.dtype(np.float16 if are_half else np.float32)
    shape = (batch, spec.heads.num_anchors)
    encodings = _dense("box_encodings", box_encodings, dtype, (*shape, 4))
    logits = _dense("class_logits", class_logits, dtype, (*shape, spec.heads.num_columns))
    anchors = _dense("anchors", anchors, np.dtype(np.float32), (shape[1], 4))
    windows = None
    if clip_windows is not None:
        windows = _dense("clip_windows", clip_windows, np.dtype(np.float32), (batch, 4))
    heads = HeadPointers(
        encodings.ctypes.data,
        logits.ctypes.data,
        _DTYPES[dtype],
        anchors.ctypes.data,
        None if windows is None else windows.ctypes.data,
    )
    results = (
        np.empty(batch, np.int32),
        np.empty((batch, most, 4), np.float32),
        np.empty((batch, most), np.float32),
        np.empty((batch, most), np.int32),
        np.empty((batch, most), np.int32),
    )
    out = DetectionPointers(*(array.ctypes.data for array in results))
    params = postprocess_params(spec)
    status = library.handle.odtrt_postprocess_cpu(
        ctypes.byref(params), batch, ctypes.byref(heads), ctypes.byref(out), num_threads
    )
    _check(library, "odtrt_postprocess_cpu", status)
    return results


def nms_cpu(
    library: Library,
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: Optional[np.ndarray],
    max_kept: int,
    iou_threshold: float,
    score_threshold: float,
) -> np.ndarray:
    """The indices that :func:`odtrt_lib.nms.nms` returns, int32 [K]."""
    count = len(boxes)
    boxes = _dense("boxes", boxes, np.dtype(np.float32), (count, 4))
    scores = _dense("scores", scores, np.dtype(np.float32), (count,))
    if classes is not None:
        classes = _dense("classes", classes, np.dtype(np.int32), (count,))
    kept, num_kept = np.empty(max_kept, np.int32), np.empty(1, np.int32)
    params = NmsParams(count, max_kept, score_threshold, iou_threshold)
    status = library.handle.odtrt_nms_cpu(
        ctypes.byref(params),
        boxes.ctypes.data,
        scores.ctypes.data,
        None if classes is None else classes.ctypes.data,
        kept.ctypes.data,
        num_kept.ctypes.data,
    )
    _check(library, "odtrt_nms_cpu", status)
    return kept[: num_kept[0]].copy()


def preprocess_cpu(
    library: Library,
    image: np.ndarray,
    spec: InputSpec,
    true_size: Tuple[int, int],
    out: np.ndarray,
) -> None:
    """Writes the network input for one image, with all threads that the machine has.

    image: uint8 [height, width, 3], RGB. There may be gaps between rows, as in a region of a larger image,
    and the channels may be reversed, as in ``bgr[..., ::-1]``; any other layout is copied first. true_size:
    see :func:`preprocess_params`. out: float32 or float16 [3, spec.height, spec.width], C-contiguous.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"image: {image.dtype} {list(image.shape)}, expected uint8 [height, width, 3]")
    expected = (3, spec.height, spec.width)
    if out.shape != expected or out.dtype not in _DTYPES or not out.flags.c_contiguous:
        raise InputError(
            f"out: {out.dtype} {list(out.shape)}, expected C-contiguous float32 or float16 {list(expected)}"
        )
    if not _is_readable_where_it_lies(image):
        image = np.array(image, order="C")
    is_bgr = image.strides[2] < 0
    params = preprocess_params(
        spec,
        (image.shape[0], image.shape[1]),
        true_size,
        pitch=image.strides[0],
        bgr=is_bgr,
        dtype=_DTYPES[out.dtype],
    )
    first_byte = image.ctypes.data - (2 if is_bgr else 0)
    status = library.handle.odtrt_preprocess_cpu(ctypes.byref(params), first_byte, out.ctypes.data, 0)
    _check(library, "odtrt_preprocess_cpu", status)


def postprocess_workspace(library: Library, params: PostprocessParams, batch: int) -> int:
    """Bytes of device memory that :func:`postprocess_cuda` needs."""
    return int(library.handle.odtrt_postprocess_workspace(ctypes.byref(params), batch))


def postprocess_cuda(
    library: Library,
    params: PostprocessParams,
    batch: int,
    heads: HeadPointers,
    out: DetectionPointers,
    workspace: Any,
    workspace_size: int,
    stream: int = 0,
) -> None:
    """Enqueues the post-processing of a batch. All addresses are in device memory, aligned to 16 bytes.

    workspace: see :func:`odtrt_lib.cuda.address_of`. stream: a ``cudaStream_t``.

    Raises MissingDependencyError if the library was built without CUDA, NativeError if CUDA fails,
    InputError if an argument is not as ``odtrt.h`` says.
    """
    status = library.handle.odtrt_postprocess_cuda(
        ctypes.byref(params),
        batch,
        ctypes.byref(heads),
        ctypes.byref(out),
        address_of(workspace),
        workspace_size,
        stream,
    )
    _check(library, "odtrt_postprocess_cuda", status)


def nms_workspace(library: Library, params: NmsParams) -> int:
    """Bytes of device memory that :func:`nms_cuda` needs."""
    return int(library.handle.odtrt_nms_workspace(ctypes.byref(params)))


def nms_cuda(
    library: Library,
    params: NmsParams,
    boxes: Any,
    scores: Any,
    classes: Optional[Any],
    kept: Any,
    num_kept: Any,
    workspace: Any,
    workspace_size: int,
    stream: int = 0,
) -> None:
    """Enqueues a suppression. In ``kept``, int32 [max_kept], the unused rest is -1.

    For the arrays see :func:`odtrt_lib.cuda.address_of`; for errors, :func:`postprocess_cuda`.
    """
    addresses = [
        None if memory is None else address_of(memory)
        for memory in (boxes, scores, classes, kept, num_kept, workspace)
    ]
    status = library.handle.odtrt_nms_cuda(ctypes.byref(params), *addresses, workspace_size, stream)
    _check(library, "odtrt_nms_cuda", status)


def preprocess_cuda(
    library: Library, params: PreprocessParams, image: Any, output: Any, stream: int = 0
) -> None:
    """Enqueues the preprocessing of one image.

    image, output: device memory, see :func:`odtrt_lib.cuda.address_of`. For errors see
    :func:`postprocess_cuda`.
    """
    status = library.handle.odtrt_preprocess_cuda(
        ctypes.byref(params), address_of(image), address_of(output), stream
    )
    _check(library, "odtrt_preprocess_cuda", status)


def _is_readable_where_it_lies(image: np.ndarray) -> bool:
    return image.strides[1:] in ((3, 1), (3, -1)) and image.strides[0] >= 3 * image.shape[1]


def _dense(name: str, array: np.ndarray, dtype: np.dtype, shape: Tuple[int, ...]) -> np.ndarray:
    if array.shape != shape:
        raise InputError(f"{name}: shape {list(array.shape)}, expected {list(shape)}")
    return np.require(array, dtype, ["C", "ALIGNED"])


def _check(library: Library, function: str, status: int) -> None:
    if status == _OK:
        return
    text = one_line(library.handle.odtrt_error_string(status).decode(errors="replace"))
    message = f"{library.path}: {function}: {text}"
    if status == _NO_CUDA:
        raise MissingDependencyError(f"{message}; run `make plugin` where nvcc is installed")
    if status == _INVALID_ARGUMENT:
        raise InputError(f"{message}; plugins/kernels/odtrt.h says what each argument may be")
    raise NativeError(f"{message} (status {status})")
