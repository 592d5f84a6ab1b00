"""Preprocessing: how fast, and how close to TensorFlow, beside the OpenCV call that it replaces.

    python benchmarks/preprocess.py          writes results/preprocess.cpu.json; about a minute

A row is one resizer and one image size. ``cv2_p50_us`` is ``cv2.resize``, ``* scale + offset`` in float32
(plain numbers where all channels have the same), padding, and the copy to channels first;
``native_p50_us`` is ``odtrt_lib.preprocess.preprocess`` with the native library, ``preprocess_p50_us`` the
same without it (NumPy, and OpenCV picks the pixels), ``numpy_p50_us`` without OpenCV either. ``_into`` is
with ``out=``. They take turns, so that a busy machine is equally busy for all. A ratio is over
``cv2_p50_us``: the new memory for a large result, which the system clears page by page, can cost more than
the work itself. Errors are in units of the value range.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np

from odtrt_lib import native
from odtrt_lib import preprocess as preprocessing
from odtrt_lib.export import odapi
from odtrt_lib.latency.timing import Histogram, Sampling, sample, wall_clock
from odtrt_lib.results import write_results
from odtrt_lib.spec import InputSpec, Resizer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "preprocess.cpu.json"
ROUNDS, WARM_UP, CALLS = 12, 5, 20

MOBILENET = ((2 / 255,) * 3, (-1.0,) * 3)
EFFICIENTNET = (
    (1 / 255 / 0.229, 1 / 255 / 0.224, 1 / 255 / 0.225),
    (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
)
FIXED = Resizer("fixed_shape")
PADDED = Resizer("keep_aspect_ratio", 512, 512, True)
CASES = (
    (480, 640, InputSpec(320, 320, FIXED, *MOBILENET)),
    (1080, 1920, InputSpec(512, 512, PADDED, *EFFICIENTNET)),
    (1080, 1920, InputSpec(512, 512, PADDED, *MOBILENET)),
    (640, 640, InputSpec(640, 640, FIXED, *MOBILENET)),
    (720, 1280, InputSpec(300, 300, FIXED, *MOBILENET)),
)


def main() -> None:
    """Measures every case and writes the file."""
    if native.load() is None:
        sys.exit("the native library is not built: run `make plugin`")
    rows = [measure(*case) for case in CASES]
    write_results(RESULTS, "preprocess", "python benchmarks/preprocess.py", rows)
    for row in rows:
        print(row)


def measure(height: int, width: int, spec: InputSpec) -> dict[str, Any]:
    """One row."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    batch = np.empty((3, spec.height, spec.width), np.float32)

    def natively(out: np.ndarray | None = None) -> np.ndarray:
        return preprocessing.preprocess(image, spec, out)[0]

    def without_native(out: np.ndarray | None = None) -> np.ndarray:
        with mock.patch.object(native, "load", lambda: None):
            return preprocessing.preprocess(image, spec, out)[0]

    def with_numpy_alone() -> np.ndarray:
        with mock.patch.object(preprocessing, "_opencv_strays", lambda *_: None):
            return without_native()

    by_opencv, by_native, native_into, by_odtrt, into, by_numpy = medians_us(
        lambda: opencv_way(image, spec),
        natively,
        lambda: natively(batch),
        without_native,
        lambda: without_native(batch),
        with_numpy_alone,
    )
    expected = tensorflow_way(image, spec)
    return {
        "resizer": spec.resizer.kind + (" padded" if spec.resizer.pad_to_max_dimension else ""),
        "normalisation": "one scale" if len(set(spec.scale)) == 1 else "a scale a channel",
        "source": f"{height}x{width}",
        "input": f"{spec.height}x{spec.width}",
        "native_p50_us": round(by_native, 1),
        "native_into_p50_us": round(native_into, 1),
        "preprocess_p50_us": round(by_odtrt, 1),
        "preprocess_into_p50_us": round(into, 1),
        "numpy_p50_us": round(by_numpy, 1),
        "cv2_p50_us": round(by_opencv, 1),
        "native_ratio": round(by_native / by_opencv, 2),
        "native_ratio_into": round(native_into / by_opencv, 2),
        "ratio": round(by_odtrt / by_opencv, 2),
        "ratio_into": round(into / by_opencv, 2),
        "native_max_abs_err_vs_tf": max_error(natively(), expected, spec),
        "max_abs_err_vs_tf": max_error(without_native(), expected, spec),
        "numpy_max_abs_err_vs_tf": max_error(with_numpy_alone(), expected, spec),
        "cv2_max_abs_err_vs_tf": max_error(opencv_way(image, spec), expected, spec),
        "cv2_box_shift_y_px": round(preprocessing.half_pixel_shift(height, true_size(image, spec)[0]), 3),
        "cv2_box_shift_x_px": round(preprocessing.half_pixel_shift(width, true_size(image, spec)[1]), 3),
        "runs": ROUNDS * CALLS,
    }


def true_size(image: np.ndarray, spec: InputSpec) -> tuple[int, int]:
    """The size after resizing, before padding."""
    return preprocessing.network_size(spec, *image.shape[:2])


def opencv_way(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """What is usually written: half-pixel centres, 8-bit result."""
    height, width = true_size(image, spec)
    resized = cv2.resize(image, (width, height)).astype(np.float32)
    if len(set(spec.scale)) == 1 and len(set(spec.offset)) == 1:
        normalised = resized * np.float32(spec.scale[0]) + np.float32(spec.offset[0])
    else:
        normalised = resized * np.array(spec.scale, np.float32) + np.array(spec.offset, np.float32)
    if (height, width) == (spec.height, spec.width):
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))
    planes = np.zeros((3, spec.height, spec.width), np.float32)
    planes[:, :height, :width] = normalised.transpose(2, 0, 1)
    return planes


def tensorflow_way(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """The OD API's own resizer on the normalised image, as [3, H, W]."""
    odapi.prepare()
    import tensorflow as tf
    from object_detection.core import preprocessor

    scale, offset = np.array(spec.scale, np.float32), np.array(spec.offset, np.float32)
    normalised = tf.constant(image.astype(np.float32) * scale + offset)
    resizer = spec.resizer
    if resizer.kind == "fixed_shape":
        resized, _ = preprocessor.resize_image(normalised, new_height=spec.height, new_width=spec.width)
    else:
        resized, _ = preprocessor.resize_to_range(
            normalised,
            min_dimension=resizer.min_dimension,
            max_dimension=resizer.max_dimension,
            pad_to_max_dimension=resizer.pad_to_max_dimension,
            per_channel_pad_value=resizer.pad_value,
        )
    return resized.numpy().transpose(2, 0, 1)


def max_error(found: np.ndarray, expected: np.ndarray, spec: InputSpec) -> float:
    """The largest difference, in units of the value range ``255 * scale``, to two significant digits."""
    difference = np.abs(found.astype(np.float64) - expected) / (255 * np.reshape(spec.scale, (3, 1, 1)))
    return float(f"{difference.max():.1e}")


def medians_us(*functions: Callable[[], Any]) -> list[float]:
    """The median wall-clock time of each, in microseconds.

    They take turns of some calls each, so that each finds the memory as its own last call left it.
    """
    turn = Sampling(WARM_UP, CALLS, CALLS)
    histograms = [Histogram() for _ in functions]
    for _ in range(ROUNDS):
        for function, histogram in zip(functions, histograms, strict=True):
            histogram.merge(sample(wall_clock(function), turn))
    return [histogram.percentile(50) for histogram in histograms]


if __name__ == "__main__":
    main()
