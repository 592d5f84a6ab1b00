"""From an image of any size to the network input, exactly as in the OD API; and boxes back to pixels.

The OD API normalises the image, resizes it, and then pads it; ``preprocess`` does the same. The resizer is
TensorFlow 1's ``ResizeBilinear`` with ``align_corners=False`` and ``half_pixel_centers=False``: output pixel
``i`` samples the source at ``i * in / out``. OpenCV, Pillow and ``tf.image.resize`` sample it at
``(i + 0.5) * in / out - 0.5`` instead. An image that they resize shifts every box by :func:`half_pixel_shift`
pixels. OpenCV also rounds the result of an 8-bit image to whole grey levels.

The native library does this if it was built (see :mod:`odtrt_lib.native`); otherwise numpy does. If OpenCV is
installed, it picks and adds pixels for numpy, which is faster. The results of the three differ by a few
rounding errors of float32 (checked with OpenCV 4.5.5, 4.11 and 5.0).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import numpy as np

from odtrt_lib import native
from odtrt_lib.errors import InputError, MissingDependencyError, one_line
from odtrt_lib.spec import InputSpec, NmsSpec, Resizer

# The largest image that load_image reads: 8192 x 8192. Decoding it takes 0.7 GB, with transparency 0.9 GB.
MAX_PIXELS = 1 << 26

_IMAGE_FORMATS = "JPEG, PNG, GIF, BMP or WebP"
_BLOCK_ROWS = 96
_BYTE_UNIT = 128


@dataclasses.dataclass(frozen=True)
class Frame:
    """How one image lies in the network input; all in pixels.

    ``image_*`` is the size of the original image, ``true_*`` that of the resized image, ``input_*`` that of
    the network input. The resized image is at the top left; the rest, at the bottom and at the right, is
    padding.
    """

    image_height: int
    image_width: int
    true_height: int
    true_width: int
    input_height: int
    input_width: int

    @property
    def clip_window(self) -> Tuple[float, float, float, float]:
        """``(ymin, xmin, ymax, xmax)`` of the resized image, normalised to the network input.

        The OD API's ``SSDMetaArch._compute_clip_window``, from its ``true_image_shapes``.
        """
        return (0.0, 0.0, self.true_height / self.input_height, self.true_width / self.input_width)


def load_image(path: Union[str, Path]) -> np.ndarray:
    """Reads a JPEG, PNG, GIF, BMP or WebP file: uint8 ``[height, width, 3]``, RGB.

    The pixels are those of the OD API's decoder, ``tf.io.decode_image`` with ``channels=3``. Grey is copied
    to all three channels. Transparency is dropped (in a GIF it becomes black). Of 16 bits the upper 8 are
    kept, and of an animation the first frame. The EXIF orientation is ignored. Two things differ: JPEG pixels
    are those of ``tf.io.decode_jpeg`` with ``dct_method="INTEGER_ACCURATE"``, because TensorFlow's default is
    a coarser transform; and a BMP file's palette is used, whereas TensorFlow takes its indices for grey.

    Raises InputError if the file is absent, empty, a Git LFS pointer, damaged, of another format or larger
    than :data:`MAX_PIXELS`; MissingDependencyError without Pillow.
    """
    path = Path(path)
    header = _file_header(path)
    try:
        plugin = _image_plugin(header)
    except ImportError as error:
        raise MissingDependencyError("Pillow is not installed: run `pip install pillow`") from error
    try:
        if plugin is None:
            raise ValueError("unknown format")
        # Image.open would warn of a large image before its size is known.
        with plugin(str(path)) as image:
            _check_pixel_count(path, *image.size)
            return _rgb(image)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path}: not enough memory to decode it; scale the image down") from error
    except Exception as error:  # for damaged files, decoders raise errors of any kind
        raise InputError(
            f"{path}: damaged, or not an image ({one_line(error)}); expected a {_IMAGE_FORMATS} file"
        ) from error


def check_image(image: Any) -> None:
    """Raises InputError, saying what to do, unless ``image`` is a uint8 array ``[height, width, 3]``.

    It cannot check that the image is RGB, not OpenCV's BGR.
    """
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"image: found {type(image).__name__}, expected a numpy array, uint8 [height, width, 3], RGB; "
            "read a file with odtrt_lib.preprocess.load_image, or use numpy.asarray(image)"
        )
    found = f"image: found {image.dtype} {list(image.shape)}, expected uint8 [height, width, 3], RGB; "
    if image.size == 0:
        raise InputError(found + "the image is empty: check the camera or the crop that it comes from")
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(found + _shape_advice(image.shape))
    if image.dtype != np.uint8:
        raise InputError(found + _dtype_advice(image.dtype))


def network_size(input_spec: InputSpec, height: int, width: int) -> Tuple[int, int]:
    """The ``(height, width)`` of an image of ``height`` x ``width`` pixels after resizing, before padding.

    ``fixed_shape``: always that of the network input. ``keep_aspect_ratio``: the rule of TensorFlow 1's
    ``resize_images(preserve_aspect_ratio=True)``, in float32: one scale for both sides, the largest with
    which the image fits into ``min_dimension`` x ``max_dimension`` (with the longer sides parallel); each new
    side is rounded half to even.

    Raises InputError if a side would become 0, as in TensorFlow.
    """
    resizer = input_spec.resizer
    if resizer.kind == "fixed_shape":
        return input_spec.height, input_spec.width
    one = np.float32
    short, long = one(resizer.min_dimension or 0), one(resizer.max_dimension or 0)
    largest = (short, long) if height < width else (long, short)
    scale = min(largest[0] / one(height), largest[1] / one(width))
    size = int(np.rint(scale * one(height))), int(np.rint(scale * one(width)))
    if min(size) < 1:
        raise InputError(
            f"image: {height}x{width} becomes {size[0]}x{size[1]} in {_resizer_name(resizer)}; "
            "it is too long and narrow: crop it"
        )
    return size


def preprocess(
    image: np.ndarray, input_spec: InputSpec, out: Optional[np.ndarray] = None
) -> Tuple[np.ndarray, Frame]:
    """The network input for one image, and where the image lies in it.

    image: uint8 ``[height, width, 3]``, RGB, of any size; fastest if it is C-contiguous. The native
    library also reads a region of a larger image, and ``bgr[..., ::-1]``, without a copy.
    out: where to write, e.g. one image of a batch; float32 ``[3, height, width]``, C-contiguous.

    Returns float32 ``[3, input_spec.height, input_spec.width]``, normalised and C-contiguous (``out``, if
    given), and the Frame. The values differ from TensorFlow's by less than 1e-4 of the value range
    (``255 * scale``).

    Raises InputError if ``image`` is not such an array (see :func:`check_image`), and if its size after
    resizing is not the network input's, as happens with ``keep_aspect_ratio`` without padding; and what
    :func:`odtrt_lib.native.load` raises.
    """
    check_image(image)
    frame = frame_of(image, input_spec)
    shape = (3, input_spec.height, input_spec.width)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise InputError(
            f"out: found {out.dtype} {list(out.shape)}, expected C-contiguous float32 {list(shape)}"
        )
    library = native.load()
    if library is not None:
        native.preprocess_cpu(library, image, input_spec, (frame.true_height, frame.true_width), out)
        return out, frame
    out[:, frame.true_height :, :] = _per_channel(input_spec.resizer.pad_value)
    out[:, : frame.true_height, frame.true_width :] = _per_channel(input_spec.resizer.pad_value)
    _resize_and_normalise(
        np.ascontiguousarray(image),
        _per_channel(input_spec.scale),
        _per_channel(input_spec.offset),
        out[:, : frame.true_height, : frame.true_width],
    )
    return out, frame


def frame_of(image: np.ndarray, input_spec: InputSpec) -> Frame:
    """How ``image``, [height, width, 3], lies in the network input.

    Raises InputError if its size after resizing does not fit, see :func:`preprocess`.
    """
    height, width = image.shape[:2]
    true_height, true_width = network_size(input_spec, height, width)
    resizer = input_spec.resizer
    is_padded = resizer.kind == "keep_aspect_ratio" and resizer.pad_to_max_dimension
    fits = true_height <= input_spec.height and true_width <= input_spec.width
    fills = (true_height, true_width) == (input_spec.height, input_spec.width)
    if not (fits if is_padded else fills):
        raise InputError(
            f"image: {height}x{width} becomes {true_height}x{true_width} in {_resizer_name(resizer)}, but "
            f"the network input is fixed at {input_spec.height}x{input_spec.width}; pass images of one "
            "aspect ratio, or set pad_to_max_dimension: true in pipeline.config and export again"
        )
    return Frame(height, width, true_height, true_width, input_spec.height, input_spec.width)


def boxes_to_pixels(boxes: np.ndarray, frame: Frame, nms: NmsSpec) -> np.ndarray:
    """Converts boxes from the post-processing to pixels of the original image.

    boxes: ``[count, 4]``, ``(ymin, xmin, ymax, xmax)``. With ``nms.change_coordinate_frame`` they are
    normalised to the resized image (``frame.clip_window`` is their unit square), otherwise to the whole
    network input with its padding.

    Returns float32 ``[count, 4]``; the image's bottom right corner is ``(image_height, image_width)``.
    """
    height, width = float(frame.image_height), float(frame.image_width)
    if not nms.change_coordinate_frame:
        height *= frame.input_height / frame.true_height
        width *= frame.input_width / frame.true_width
    pixels = np.asarray(boxes, np.float64).reshape(-1, 4) * [height, width, height, width]
    return pixels.astype(np.float32)


def half_pixel_shift(in_size: int, out_size: int) -> float:
    """By how many pixels of the original a half-pixel resizer moves every box up, or to the left.

    The OD API samples the source at ``i * s`` with ``s = in_size / out_size``. OpenCV, Pillow and
    ``tf.image.resize`` sample it at ``(i + 0.5) * s - 0.5``. The difference is ``0.5 * (s - 1)`` everywhere
    in the image. If the image is enlarged, it is negative: boxes move down, or to the right.
    """
    return 0.5 * (in_size / out_size - 1)


def _file_header(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            header = file.read(64)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a {_IMAGE_FORMATS} file"
        ) from error
    if not header:
        raise InputError(f"{path}: the file is empty; expected a {_IMAGE_FORMATS} file")
    if header.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer instead of the image; run `git lfs pull` to fetch it")
    return header


def _image_plugin(header: bytes) -> Any:
    """Pillow's reader for a file that starts with ``header``; None if it is of no supported format."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    starts = (
        (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
        (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
        (b"GIF8", GifImagePlugin.GifImageFile),
        (b"BM", BmpImagePlugin.BmpImageFile),
    )
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    return next((plugin for start, plugin in starts if header.startswith(start)), None)


def _check_pixel_count(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{path}: {width} x {height} is {width * height:,} pixels, expected at most {MAX_PIXELS:,}; "
            "scale it down or cut it into tiles"
        )


def _rgb(image: Any) -> np.ndarray:
    if image.format == "GIF":
        return _first_frame(image)
    image.load()
    if image.mode.startswith("I"):
        upper = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(upper[..., np.newaxis], 3, axis=2)
    if image.mode == "CMYK":
        return _rgb_of_cmyk(image)
    image.info.pop("transparency", None)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _first_frame(image: Any) -> np.ndarray:
    """A GIF's first frame, uint8 [height, width, 3]; transparent pixels become black."""
    extent = tuple(image.tile[0][1])
    if extent != (0, 0, *image.size):
        raise ValueError(f"its first frame covers {extent} of {image.size}; TensorFlow would shift it")
    image.load()
    transparent = image.info.pop("transparency", None)
    pixels = np.array(image.convert("RGB"))
    if isinstance(transparent, int) and image.mode == "P":
        pixels[np.asarray(image) == transparent] = 0
    return pixels


def _rgb_of_cmyk(image: Any) -> np.ndarray:
    """RGB from CMYK as in TensorFlow: files of Adobe's programs store complements, others store ink. Pillow
    takes the complement of both; here this is undone for Adobe's."""
    ink = np.asarray(image).astype(np.uint16)
    stored = 255 - ink
    colours = stored if "adobe" in image.info else ink
    return (colours[..., :3] * colours[..., 3:] // 255).astype(np.uint8)


def _shape_advice(shape: Tuple[int, ...]) -> str:
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 1):
        return "a grey image: copy it to three channels with numpy.repeat(image.reshape(h, w, 1), 3, axis=2)"
    if len(shape) == 3 and shape[2] == 4:
        return "drop the fourth channel with image[:, :, :3] (and reverse a BGRA image's first three)"
    if len(shape) == 3 and shape[0] == 3:
        return "channels come last: numpy.moveaxis(image, 0, 2)"
    if len(shape) == 4:
        return "pass one image at a time, or a list to detect_batch"
    return "pass one RGB image"


def _dtype_advice(dtype: np.dtype) -> str:
    if dtype.kind == "f":
        return "pass the raw pixels 0..255 as uint8: they are normalised here, and only here"
    if dtype.kind in "iu" and dtype.itemsize == 2:
        return "reduce it to 8 bits, e.g. (image >> 8).astype(numpy.uint8) if all 16 bits are used"
    return "convert it with image.astype(numpy.uint8) if its values are 0..255"


def _resizer_name(resizer: Resizer) -> str:
    return f"{resizer.kind}_resizer (min {resizer.min_dimension}, max {resizer.max_dimension})"


def _per_channel(values: Tuple[float, float, float]) -> np.ndarray:
    return np.array(values, np.float32).reshape(3, 1, 1)


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """Output pixel i of one axis is ``source[lower[i]] * (1 - weight[i]) + source[upper[i]] * weight[i]``."""

    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray

    @property
    def interpolates(self) -> bool:
        return bool(self.weight.any())


@functools.lru_cache(maxsize=64)
def _sampling(in_size: int, out_size: int) -> _Sampling:
    """TensorFlow's ``compute_interpolation_weights`` with ``LegacyScaler``, in float32 as in TensorFlow.

    Near the end of a long axis, rounding to float32 moves a sample by 1e-4 of a pixel, which can change a
    value by more than 1e-4 of the value range. So the exact fraction ``i * in / out`` would not do.
    """
    position = np.arange(out_size, dtype=np.float32) * (np.float32(in_size) / np.float32(out_size))
    lower = np.minimum(np.floor(position).astype(np.intp), in_size - 1)
    upper = np.minimum(lower + 1, in_size - 1)
    weight = np.where(upper > lower, position - lower.astype(np.float32), np.float32(0))
    return _Sampling(lower, upper, weight)


def _resize_and_normalise(image: np.ndarray, scale: np.ndarray, offset: np.ndarray, out: np.ndarray) -> None:
    """Fills ``out`` [3, height, width] from ``image`` [any height, any width, 3].

    Works on a few output rows at a time, so that intermediate values stay in the processor's cache.
    """
    _, height, width = out.shape
    rows = _sampling(image.shape[0], height)
    for start in range(0, height, _BLOCK_ROWS):
        block = slice(start, min(start + _BLOCK_ROWS, height))
        count = block.stop - block.start
        needed = (rows.lower[block], rows.upper[block]) if rows.interpolates else (rows.lower[block],)
        lines, unit = _resized_lines(image, np.concatenate(needed), width)
        if rows.interpolates:
            top, bottom = lines[:count], lines[count:]
            bottom -= top
            bottom *= rows.weight[block, None]
            bottom += top
            lines = bottom
        planes = out[:, block]
        np.multiply(lines.reshape(count, width, 3).transpose(2, 0, 1), scale / np.float32(unit), out=planes)
        planes += offset


def _resized_lines(image: np.ndarray, rows: np.ndarray, width: int) -> Tuple[np.ndarray, float]:
    """These rows of ``image``, resized to ``width`` pixels and multiplied by a unit; and the unit.

    The lines, float32 ``[len(rows), width * 3]``, are scratch memory: the next call in this thread overwrites
    them.
    """
    count, in_width = len(rows), image.shape[1]
    flat = _scratch("source", (count * in_width + 1) * 3, np.uint8)
    source = flat[:-3].reshape(count, in_width, 3)
    np.take(image, rows, axis=0, out=source, mode="clip")
    lines = _scratch("lines", count * width * 3, np.float32).reshape(count, width * 3)
    columns = _sampling(in_width, width)
    left = source.reshape(lines.shape) if in_width == width else _pick_columns(source, width, "left")
    if not columns.interpolates:
        np.copyto(lines, left)
        return lines, 1
    one_pixel_on = flat[3:].reshape(source.shape)  # a pixel behind the end of a row has weight 0
    right = _pick_columns(one_pixel_on, width, "right")
    byte_weights = _byte_weights(in_width, width)
    if byte_weights is None or _opencv_strays(in_width, width) is None:
        difference = _scratch("difference", lines.size, np.int16).reshape(lines.shape)
        np.subtract(right, left, out=difference, dtype=np.int16)
        np.multiply(difference, np.repeat(columns.weight, 3), out=lines)
        lines += left
        return lines, 1
    import cv2

    lines.fill(0)
    cv2.accumulateProduct(left, byte_weights[0][:count], lines)
    cv2.accumulateProduct(right, byte_weights[1][:count], lines)
    return lines, _BYTE_UNIT


def _pick_columns(source: np.ndarray, width: int, name: str) -> np.ndarray:
    """``source[:, lower]`` as ``[rows, width * 3]``: the left neighbour of every output column."""
    count, in_width = source.shape[:2]
    lower = _sampling(in_width, width).lower
    strays = _opencv_strays(in_width, width)
    picked = _scratch(name, count * width * 3, np.uint8).reshape(count, width, 3)
    if strays is None:
        np.take(source, lower, axis=1, out=picked, mode="clip")
    else:
        import cv2

        cv2.resize(source, (width, count), dst=picked, interpolation=cv2.INTER_NEAREST)
        if len(strays):
            picked[:, strays] = source[:, lower[strays]]
    return picked.reshape(count, width * 3)


@functools.lru_cache(maxsize=64)
def _opencv_strays(in_width: int, width: int) -> Optional[np.ndarray]:
    """The output columns for which OpenCV's nearest-neighbour resize does not pick the left neighbour.

    OpenCV rounds some positions differently from TensorFlow. Which ones is not documented and may differ
    between versions, so this function tries it. None without OpenCV, or if most columns differ.
    """
    try:
        import cv2
    except ImportError:
        return None
    column = np.arange(in_width)
    ruler = np.stack([column & 255, column >> 8 & 255, column >> 16], axis=1).astype(np.uint8)
    rulers = np.ascontiguousarray(np.broadcast_to(ruler, (2 * _BLOCK_ROWS, in_width, 3)))
    found = cv2.resize(rulers, (width, 2 * _BLOCK_ROWS), interpolation=cv2.INTER_NEAREST).astype(np.intp)
    picked = found[:, :, 0] | found[:, :, 1] << 8 | found[:, :, 2] << 16
    strays = np.flatnonzero((picked != _sampling(in_width, width).lower).any(axis=0))
    return strays if len(strays) <= width // 4 else None


@functools.lru_cache(maxsize=8)
def _byte_weights(in_width: int, width: int) -> Optional[Tuple[np.ndarray, np.ndarray]]:
    """The weights of the left and the right neighbours in 128ths, uint8 ``[2 * _BLOCK_ROWS, width * 3]``.

    None if these weights are not whole numbers. OpenCV multiplies and adds bytes much faster than numpy.
    """
    parts = np.repeat(_sampling(in_width, width).weight * np.float32(_BYTE_UNIT), 3)
    if not np.array_equal(parts, np.rint(parts)):
        return None
    right_weight = np.tile(parts.astype(np.uint8), (2 * _BLOCK_ROWS, 1))
    return np.uint8(_BYTE_UNIT) - right_weight, right_weight


_scratch_of_thread = threading.local()


def _scratch(name: str, size: int, dtype: Any) -> np.ndarray:
    """An array of ``size`` elements with undefined content. All calls in one thread share its memory."""
    buffers: Dict[str, np.ndarray] = _scratch_of_thread.__dict__
    if name not in buffers or buffers[name].size < size:
        buffers[name] = np.empty(size, dtype)
    return buffers[name][:size]
