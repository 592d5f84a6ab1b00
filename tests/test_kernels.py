"""The CPU library as a piece of C++: sanitized, on another processor, its header, arguments and arithmetic.

That its results are the right ones is checked against TensorFlow and numpy in test_nms.py, test_preprocess.py
and test_native.py.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kernels_build import PLUGINS, build_driver, build_library, build_with_defect

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++"
)

POSTPROCESS, NMS, PREPROCESS, SEMANTICS = range(4)
INVALID_ARGUMENT, NO_CUDA = -1, -3
ODD_FLOATS = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3e38, -3e38, 100, -100], np.float32)


def postprocess_params(**changes) -> bytes:
    fields = {
        "num_anchors": 60, "num_columns": 4, "background_column": 1,
        "score_converter": 0, "logit_factor": 1.0, "y_scale": 10.0, "x_scale": 10.0,
        "height_scale": 5.0, "width_scale": 5.0, "score_threshold": 0.3, "iou_threshold": 0.6,
        "max_detections_per_class": 20, "max_total_detections": 30, "class_agnostic": 0,
        "change_coordinate_frame": 0,
    }  # fmt: skip
    assert not changes.keys() - fields.keys()
    return struct.pack("4i7f4i", *(fields | changes).values())


def nms_params(**changes) -> bytes:
    fields = {"num_boxes": 3, "max_kept": 3, "score_threshold": 0.1, "iou_threshold": 0.5}
    assert not changes.keys() - fields.keys()
    return struct.pack("2i2f", *(fields | changes).values())


def preprocess_params(**changes) -> bytes:
    fields = {
        "image_height": 4, "image_width": 5, "image_pitch": 15, "bgr": 0, "true_height": 2, "true_width": 3,
        "output_height": 3, "output_width": 3, "output_dtype": 0, "output_nhwc": 0,
        "scale": (0.01, 0.02, 0.03), "offset": (-1.0, 0.0, 1.0), "pad_value": (0.5, 0.25, 0.0),
    }  # fmt: skip
    assert not changes.keys() - fields.keys()
    fields |= changes
    last = fields.pop("output_dtype"), fields.pop("output_nhwc")
    colours = (*fields.pop("scale"), *fields.pop("offset"), *fields.pop("pad_value"))
    return struct.pack("2iq5i9f2i", *fields.values(), *colours, *last)


def postprocess_case(rng: np.random.Generator, rows: int, columns: int) -> bytes:
    batch, background = int(rng.integers(1, 4)), int(columns > 1 and rng.random() < 0.5)
    dtype = rng.choice([np.float32, np.float16])
    logits = rng.normal(-2, rng.choice([0.1, 2, 10]), (batch, rows, columns))
    encodings = rng.normal(0, 1, (batch, rows, 4))
    anchors = rng.random((rows, 4)) * rng.choice([1, 0.3, 0], p=[0.6, 0.3, 0.1])
    if rng.random() < 0.3:
        logits = np.round(logits)
        encodings, anchors = np.round(encodings), np.round(anchors * 8) / 8
    if rng.random() < 0.4:
        for array in (logits, encodings):
            odd = rng.random(array.shape) < 0.05
            array[odd] = rng.choice(ODD_FLOATS, odd.sum())
    windows = np.array([0, 0, 1, 1]) + rng.normal(0, 0.1, (batch, 4))
    has_windows, threads = int(rng.integers(2)), int(rng.integers(4))
    params = postprocess_params(
        num_anchors=rows,
        num_columns=columns,
        background_column=background,
        score_converter=int(rng.integers(3)),
        logit_factor=float(rng.choice([1, 0.37])),
        score_threshold=float(rng.choice([1e-8, 0.05, 0.5, -1])),
        iou_threshold=float(rng.choice([0.6, 0.5, 0, 1])),
        max_detections_per_class=int(rng.choice([1, 20, 100])),
        max_total_detections=int(rng.choice([1, 30, 300])),
        class_agnostic=int(rng.random() < 0.3),
        change_coordinate_frame=int(rng.integers(2)),
    )
    with np.errstate(over="ignore"):
        heads = [encodings.astype(dtype), logits.astype(dtype), anchors.astype(np.float32)]
    return b"".join(
        [
            struct.pack("i", POSTPROCESS),
            params,
            struct.pack("4i", batch, int(dtype == np.float16), has_windows, threads),
            *(array.tobytes() for array in heads),
            windows.astype(np.float32).tobytes() if has_windows else b"",
        ]
    )


def nms_case(rng: np.random.Generator) -> bytes:
    count = int(rng.choice([0, 1, 3, 65, 700, 4000]))
    boxes = np.repeat(rng.random((count, 2)), 2, axis=0).reshape(count, 4).astype(np.float32)
    boxes += rng.random((count, 4), np.float32) * 0.2
    scores = np.round(rng.random(count, np.float32), int(rng.choice([2, 7])))
    odd = rng.random(count) < 0.02
    scores[odd] = rng.choice(ODD_FLOATS, odd.sum())
    classes = rng.integers(-(2**31), 2**31, 5, np.int32)[rng.integers(0, 5, count)]
    has_classes = int(rng.integers(2))
    params = nms_params(
        num_boxes=count,
        max_kept=int(rng.choice([1, 10, 5000])),
        score_threshold=float(rng.choice([-np.inf, 0.1, 0.9])),
        iou_threshold=float(rng.choice([0.3, 0.5, 0.7])),
    )
    arrays = (boxes, scores, *([classes] if has_classes else []))
    return (
        struct.pack("i", NMS) + params + struct.pack("i", has_classes) + b"".join(a.tobytes() for a in arrays)
    )


def preprocess_case(rng: np.random.Generator) -> bytes:
    height, width, output_height, output_width = (int(side) for side in rng.integers(1, 60, 4))
    if rng.random() < 0.05:
        height, width, output_height, output_width = 301, 403, 500, 555
    true_height, true_width = int(rng.integers(1, output_height + 1)), int(rng.integers(1, output_width + 1))
    pitch = 3 * width + int(rng.choice([0, 1, 64]))
    params = preprocess_params(
        image_height=height,
        image_width=width,
        image_pitch=pitch,
        bgr=int(rng.integers(2)),
        true_height=true_height,
        true_width=true_width,
        output_height=output_height,
        output_width=output_width,
        output_dtype=int(rng.integers(2)),
        output_nhwc=int(rng.integers(2)),
        scale=tuple(rng.normal(0, rng.choice([1e-7, 0.02, 300]), 3)),
        offset=tuple(rng.normal(0, 1, 3)),
    )
    image = rng.integers(0, 256, pitch * (height - 1) + 3 * width, np.uint8)
    threads = struct.pack("i", int(rng.integers(4)))
    return struct.pack("i", PREPROCESS) + params + threads + image.tobytes()


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    parts = [
        postprocess_case(rng, int(rng.choice([1, 2, 63, 400])), columns) for columns in [1, 2, 4, 17, 91] * 24
    ]
    parts += [
        postprocess_case(rng, 37, 601),
        postprocess_case(rng, 3001, 91),
        postprocess_case(rng, 20_000, 2),
    ]
    parts += [nms_case(rng) for _ in range(40)]
    parts += [preprocess_case(rng) for _ in range(100)]
    floats = sampled_floats()
    parts.append(struct.pack("2i", SEMANTICS, len(floats)) + floats.tobytes())
    path = tmp_path_factory.mktemp("cases") / "cases"
    path.write_bytes(b"".join(parts))
    return path


def sampled_floats() -> np.ndarray:
    """Ascending: 2^18 over all floats, and all that are near 0, near +-17 or where exp takes the next 2^n."""
    every = np.arange(0, 2**32, 2**14, dtype=np.uint64).astype(np.uint32).view(np.float32)
    turns = ((np.arange(-150, 130) + 0.5) * np.log(2)).astype(np.float32)
    centres = np.concatenate([turns, np.array([0, 17, -17, 88.72, -87.33, -103.97], np.float32)])
    near = (centres.view(np.int32)[:, None] + np.arange(-200, 201)).astype(np.int32).view(np.float32).ravel()
    tiny = np.arange(5000, dtype=np.int32).view(np.float32)
    values = np.concatenate([every, near, tiny, -tiny])
    return np.unique(values[np.isfinite(values)])


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    library = build_library(tmp_path_factory.mktemp("native"))
    build_driver(library, "g++")
    return library


@pytest.fixture(scope="module")
def native_results(native, cases) -> bytes:
    return results_of(native, cases)


def results_of(library: Path, cases: Path, *emulator: str) -> bytes:
    results = library.with_name("results")
    options = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [*emulator, library.with_name("driver"), cases, results]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return results.read_bytes()


SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
SANITIZED = (f"-DCMAKE_CXX_FLAGS=-O1 -g1 {SANITIZERS}", "-DCMAKE_BUILD_TYPE=None")


def test_no_error_under_sanitizers_and_the_same_bits(native_results, cases, tmp_path):
    library = build_library(tmp_path, *SANITIZED)
    build_driver(library, "g++", *SANITIZERS.split())
    assert results_of(library, cases) == native_results


def test_a_read_past_the_end_of_a_row_is_caught(cases, tmp_path):
    defect = ("kernels/preprocess.cpp", "if (at.upper < params.image_width - 1)", "")
    library = build_with_defect(tmp_path, *defect, *SANITIZED)
    build_driver(library, "g++", *SANITIZERS.split())
    with pytest.raises(AssertionError, match=r"AddressSanitizer(.|\n)*resize_line"):
        results_of(library, cases)


def test_the_same_bits_on_a_64_bit_arm(native_results, cases, tmp_path):
    compiler, emulator = (
        "aarch64-linux-gnu-g++",
        shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64"),
    )
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip(f"needs {compiler} and qemu-aarch64: apt install g++-aarch64-linux-gnu qemu-user-static")
    library = build_library(tmp_path, f"-DCMAKE_TOOLCHAIN_FILE={PLUGINS / 'cmake' / 'aarch64.cmake'}")
    build_driver(library, compiler)
    assert results_of(library, cases, emulator, "-L", "/usr/aarch64-linux-gnu") == native_results


def test_a_fused_multiply_add_is_seen(native_results, cases, tmp_path):
    if platform.machine() == "x86_64" and " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused multiply-add")
    fused = "-ffp-contract=fast" + (" -mfma" if platform.machine() == "x86_64" else "")
    library = build_with_defect(tmp_path, "CMakeLists.txt", "-ffp-contract=off", fused)
    build_driver(library, "g++")
    assert results_of(library, cases) != native_results


def test_exponential_and_sigmoid_are_monotone_and_close_to_float64(native_results):
    values = sampled_floats()
    found = np.frombuffer(native_results[-8 * len(values) :], np.float32).reshape(2, -1)
    exact = values.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = np.exp(exact), 1 / (1 + np.exp(-exact))
    for own, reference, most_ulp, most_of_subnormals in zip(
        found, expected, (1, 3), (2e-45, 2.0**-126), strict=True
    ):
        assert np.all(own[1:] >= own[:-1])
        is_normal = (reference >= np.finfo(np.float32).tiny) & (reference <= np.finfo(np.float32).max)
        ulp = np.spacing(reference[is_normal].astype(np.float32)).astype(np.float64)
        assert np.max(np.abs(own[is_normal] - reference[is_normal]) / ulp) <= most_ulp
        too_small = reference < np.finfo(np.float32).tiny
        assert np.all(np.abs(own[too_small] - reference[too_small]) <= most_of_subnormals)
    assert np.all(np.isinf(found[0][exact > 88.73]))


def test_the_header_is_c11():
    flags = ["-std=c11", "-fsyntax-only", "-pedantic", "-Wall", "-Wextra", "-Werror", "-x", "c"]
    done = subprocess.run(["gcc", *flags, PLUGINS / "kernels" / "odtrt.h"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_c_abi_is_exported(native):
    names = subprocess.run(["nm", "-D", "--defined-only", native], capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in names.stdout.splitlines()} == {
        "odtrt_postprocess_cpu", "odtrt_postprocess_cuda", "odtrt_postprocess_workspace",
        "odtrt_nms_cpu", "odtrt_nms_cuda", "odtrt_nms_workspace",
        "odtrt_preprocess_cpu", "odtrt_preprocess_cuda",
        "odtrt_error_string", "odtrt_abi_version", "odtrt_cuda_architectures",
    }  # fmt: skip


@pytest.fixture(scope="module")
def functions(native) -> ctypes.CDLL:
    return ctypes.CDLL(str(native))


class PostprocessCall:
    """A call that is valid; its arguments can be replaced."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.call = library.odtrt_postprocess_cpu
        self.arrays = [np.zeros(60 * 30, np.float32) for _ in range(9)]
        self.heads = [array.ctypes.data for array in self.arrays[:4]]
        self.out = [array.ctypes.data for array in self.arrays[4:]]

    def status(self, params=None, batch=1, dtype=0, threads=1, heads=None, out=None) -> int:
        encodings, logits, anchors, windows = heads or self.heads
        packed_heads = struct.pack("PPiPP", encodings, logits, dtype, anchors, windows)
        packed_out = struct.pack("5P", *(out or self.out))
        return self.call(
            postprocess_params() if params is None else params, batch, packed_heads, packed_out, threads
        )


@pytest.mark.parametrize(
    "change",
    [
        {"num_anchors": 0}, {"num_columns": 1}, {"num_columns": 2**31 // 60 + 1}, {"background_column": 2},
        {"score_converter": 3}, {"score_converter": -1}, {"logit_factor": 0.0}, {"logit_factor": np.nan},
        {"logit_factor": np.inf}, {"y_scale": 0.0}, {"width_scale": np.nan}, {"score_threshold": np.nan},
        {"iou_threshold": np.nan}, {"max_detections_per_class": 0}, {"max_total_detections": 0},
        {"max_total_detections": 4097}, {"class_agnostic": 2}, {"change_coordinate_frame": -1},
    ],
    ids=str,
)  # fmt: skip
def test_postprocess_refuses_settings_out_of_range(functions, change):
    assert PostprocessCall(functions).status(postprocess_params(**change)) == INVALID_ARGUMENT


def test_postprocess_refuses_null_pointers_and_sizes(functions):
    call = PostprocessCall(functions)
    assert call.status() == 0
    assert call.status(heads=[*call.heads[:3], 0]) == 0, "no clip windows: the unit square"
    assert call.status(out=[*call.out[:4], 0]) == 0, "the anchors are not wanted"
    for i in range(3):
        assert call.status(heads=[0 if k == i else p for k, p in enumerate(call.heads)]) == INVALID_ARGUMENT
    for i in range(4):
        assert call.status(out=[0 if k == i else p for k, p in enumerate(call.out)]) == INVALID_ARGUMENT
    assert call.status(batch=0) == INVALID_ARGUMENT
    assert call.status(dtype=2) == INVALID_ARGUMENT
    assert call.status(threads=-1) == INVALID_ARGUMENT
    assert call.call(None, 1, None, None, 1) == INVALID_ARGUMENT


def test_nms_refuses_invalid_arguments(functions):
    array = np.zeros(12, np.float32).ctypes.data_as(ctypes.c_void_p)
    kept, count = (ctypes.c_int32 * 3)(), (ctypes.c_int32 * 1)()

    def status(params=None, boxes=array, scores=array, kept=kept, count=count):
        params = nms_params() if params is None else params
        return functions.odtrt_nms_cpu(params, boxes, scores, None, kept, count)

    assert status() == 0
    assert status(nms_params(num_boxes=0), None, None) == 0
    assert count[0] == 0
    assert list(kept) == [-1, -1, -1]
    changes = (
        {"num_boxes": -1}, {"num_boxes": 2**24}, {"max_kept": 0},
        {"score_threshold": np.nan}, {"iou_threshold": np.nan},
    )  # fmt: skip
    for change in changes:
        assert status(nms_params(**change)) == INVALID_ARGUMENT, change
    for missing in ("boxes", "scores", "kept", "count"):
        assert status(**{missing: None}) == INVALID_ARGUMENT, missing


def test_preprocess_refuses_invalid_arguments(functions):
    image, output = np.zeros(60, np.uint8).ctypes.data_as(ctypes.c_void_p), (ctypes.c_float * 27)()

    def status(params, image=image, output=output, threads=1):
        return functions.odtrt_preprocess_cpu(params, image, output, threads)

    assert status(preprocess_params()) == 0
    changes = (
        {"image_height": 0}, {"image_width": 0}, {"image_width": 2**24, "image_pitch": 2**26},
        {"image_pitch": 14}, {"bgr": 2}, {"true_height": 0}, {"true_height": 4}, {"true_width": 4},
        {"output_height": 0}, {"output_width": -1}, {"output_dtype": 2}, {"output_nhwc": 3},
    )  # fmt: skip
    for change in changes:
        assert status(preprocess_params(**change)) == INVALID_ARGUMENT, change
    assert status(preprocess_params(), image=None) == INVALID_ARGUMENT
    assert status(preprocess_params(), output=None) == INVALID_ARGUMENT
    assert status(preprocess_params(), threads=-1) == INVALID_ARGUMENT
    assert status(None) == INVALID_ARGUMENT


def test_without_cuda_the_library_says_so(functions):
    functions.odtrt_error_string.restype = ctypes.c_char_p
    functions.odtrt_cuda_architectures.restype = ctypes.c_char_p
    assert functions.odtrt_abi_version() == 1
    assert functions.odtrt_cuda_architectures() == b""
    assert functions.odtrt_postprocess_cuda(*[None] * 7) == NO_CUDA
    assert functions.odtrt_nms_cuda(*[None] * 9) == NO_CUDA
    assert functions.odtrt_preprocess_cuda(*[None] * 4) == NO_CUDA
    lines = [functions.odtrt_error_string(status).decode() for status in range(0, -5, -1)]
    assert len(set(lines)) == 5
    assert all(line and "\n" not in line for line in lines)
    assert "without CUDA" in lines[3]
