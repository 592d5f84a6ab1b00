"""The native library against the numpy reference (bit for bit) and TensorFlow, and how it is found."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nms_cases
import numpy as np
import pytest
import spec_cases

from odtrt_lib import native, nms, preprocess
from odtrt_lib.app import doctor
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.export.pipeline import read_pipeline
from odtrt_lib.spec import InputSpec, NmsSpec, Resizer

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "plugins" / "kernels"
SOURCES = tuple(sorted(path.name for path in KERNELS.glob("*.cpp")))
COMPILE = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-c")
USUAL = NmsSpec(1e-8, 0.5, 100, 100, False, True)

Build = Callable[..., native.Library]


@functools.cache
def some_cases() -> tuple[nms_cases.Case, ...]:
    extreme = map(nms_cases.extreme_case, (*range(150), 265, 343))
    return (*map(nms_cases.random_case, range(400)), *extreme, *nms_cases.chosen_cases())


@functools.cache
def answers(number: int) -> nms.Postprocessed:
    return nms.postprocess_reference(*nms_cases.arguments_of(some_cases()[number]))


def is_caught(library: native.Library) -> bool:
    """Whether one of the cases gets another answer than the reference's."""
    postprocess = nms_cases.by_library(library)
    return any(
        nms_cases.difference(answers(number), postprocess(case)) for number, case in enumerate(some_cases())
    )


def select_by(library: native.Library) -> Callable[[nms_cases.NmsCase], np.ndarray]:
    def select(case: nms_cases.NmsCase) -> np.ndarray:
        most = len(case.boxes) if case.max_kept is None else case.max_kept
        if not len(case.boxes):
            return np.zeros(0, np.int32)
        return native.nms_cpu(
            library,
            case.boxes,
            case.scores,
            case.classes,
            most,
            iou_threshold=case.iou_threshold,
            score_threshold=case.score_threshold,
        )

    return select


class TestSameBitsAsTheReference:
    def test_two_thousand_random_cases(self, native_library):
        cases = map(nms_cases.random_case, range(nms_cases.RANDOM_CASES))
        assert list(nms_cases.disagreements(nms_cases.by_library(native_library), cases)) == []

    def test_boxes_and_scores_about_the_limits_of_float32(self, native_library):
        cases = map(nms_cases.extreme_case, range(nms_cases.EXTREME_CASES))
        assert list(nms_cases.disagreements(nms_cases.by_library(native_library), cases)) == []

    def test_large_and_awkward_cases(self, native_library):
        cases = nms_cases.chosen_cases()
        assert list(nms_cases.disagreements(nms_cases.by_library(native_library), cases)) == []

    def test_the_cases_are_not_empty(self):
        """Else the two tests above would say nothing."""
        found = [
            (case, nms.postprocess_reference(*nms_cases.arguments_of(case)).num_detections)
            for case in map(nms_cases.random_case, range(300))
        ]
        counts = np.concatenate([numbers for _, numbers in found])
        assert np.mean(counts > 0) > 0.6 and np.any(counts == 0)
        assert {case.box_encodings.dtype.name for case, _ in found} == {"float32", "float16"}
        assert {case.spec.heads.scores.converter for case, _ in found} == {"sigmoid", "softmax", "identity"}

    def test_plain_suppression(self, native_library):
        cases = map(nms_cases.random_nms_case, range(1000))
        assert list(nms_cases.nms_disagreements(select_by(native_library), cases)) == []

    def test_threads_change_nothing(self, native_library):
        spec = nms_cases.detector_spec(30011, 20, USUAL)
        case = nms_cases.make_case("threads", spec, 2, np.random.default_rng(0))
        arguments = nms_cases.arguments_of(case)
        alone = native.postprocess_cpu(native_library, *arguments, num_threads=1)
        with ThreadPoolExecutor(4) as pool:
            jobs = [
                pool.submit(native.postprocess_cpu, native_library, *arguments, num_threads=count)
                for count in (0, 2, 3, 8, 1, 0)
            ]
            for job in jobs:
                for one, other in zip(alone, job.result(), strict=True):
                    np.testing.assert_array_equal(one, other)

    def test_without_clip_windows_the_whole_input_counts(self, native_library):
        case = nms_cases.random_case(5)
        *arguments, windows = nms_cases.arguments_of(case)
        whole = np.tile(np.array([0, 0, 1, 1], np.float32), (len(windows), 1))
        given = native.postprocess_cpu(native_library, *arguments, whole)
        for one, other in zip(given, native.postprocess_cpu(native_library, *arguments, None), strict=True):
            np.testing.assert_array_equal(one, other)


class TestMisalignedPointers:
    """A host pointer that is not aligned as its type is an invalid argument, not undefined behaviour."""

    def test_of_postprocess(self, native_library):
        case = nms_cases.random_case(7)
        fields = [array for array in nms_cases.arguments_of(case) if isinstance(array, np.ndarray)]
        heads = [room_for(array.nbytes, array) for array in fields]
        out = [room_for(4 * 4 * 300 * len(case.class_logits)) for _ in range(5)]
        params = native.postprocess_params(case.spec)
        half = int(case.class_logits.dtype == np.float16)

        def status(shift: int, place: int) -> int:
            at = [array.ctypes.data + shift * (i == place) for i, array in enumerate(heads + out)]
            pointers = native.HeadPointers(at[0], at[1], half, at[2], at[3])
            found = native.DetectionPointers(*at[4:])
            return native_library.handle.odtrt_postprocess_cpu(
                ctypes.byref(params), len(case.class_logits), ctypes.byref(pointers), ctypes.byref(found), 1
            )

        assert status(0, 0) == 0
        assert [status(1, place) for place in range(9)] == [-1] * 9

    def test_of_nms_and_preprocess(self, native_library):
        params = native.NmsParams(3, 3, 0.0, 0.5)
        memory = [room_for(64) for _ in range(5)]

        def nms_status(place: int) -> int:
            at = [array.ctypes.data + (i == place) for i, array in enumerate(memory)]
            return native_library.handle.odtrt_nms_cpu(ctypes.byref(params), *at)

        assert [nms_status(place) for place in range(-1, 5)] == [0] + [-1] * 5
        spec = InputSpec(2, 2, Resizer("fixed_shape"), (1.0,) * 3, (0.0,) * 3)
        image, output = memory[0].ctypes.data, memory[1].ctypes.data
        for dtype, shift, expected in ((0, 0, 0), (0, 2, -1), (1, 2, 0), (1, 1, -1)):
            settings = native.preprocess_params(spec, (2, 2), (2, 2), dtype=dtype)
            found = native_library.handle.odtrt_preprocess_cpu(
                ctypes.byref(settings), image + 1, output + shift, 1
            )
            assert found == expected, "an image of bytes may lie anywhere"

    def test_arrays_of_python_are_copied_where_they_are_not(self, native_library):
        case = nms_cases.random_case(7)
        arguments = [misaligned(a) if isinstance(a, np.ndarray) else a for a in nms_cases.arguments_of(case)]
        assert not arguments[1].flags.aligned
        expected = nms.postprocess_reference(*nms_cases.arguments_of(case))
        assert nms_cases.difference(expected, nms.postprocess(*arguments)) == ""


def room_for(size: int, content: np.ndarray | None = None) -> np.ndarray:
    """So many bytes and 64 more, at an address that is a multiple of 64."""
    memory = np.zeros(size + 128, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]
    if content is not None:
        memory[:size] = np.frombuffer(content.tobytes(), np.uint8)
    return memory


def misaligned(array: np.ndarray) -> np.ndarray:
    memory = room_for(array.nbytes)
    memory[1 : array.nbytes + 1] = np.frombuffer(array.tobytes(), np.uint8)
    return np.frombuffer(memory, array.dtype, array.size, offset=1).reshape(array.shape)


class TestRooms:
    """nms.py and preprocess.py use the library where there is one, and answer the same without it."""

    def answers(self) -> list[Any]:
        case = nms_cases.random_case(7)
        one = nms_cases.random_nms_case(13)
        found = nms.postprocess(*nms_cases.arguments_of(case))
        return [*dataclasses.astuple(found), nms.nms(*nms_cases.nms_arguments_of(one))]

    def test_with_and_without(self, native_library, monkeypatch):
        calls = []
        own = native.postprocess_cpu
        monkeypatch.setattr(native, "postprocess_cpu", lambda *a: calls.append("native") or own(*a))
        with_library = self.answers()
        assert calls == ["native"]
        monkeypatch.setattr(native, "load", lambda: None)
        for one, other in zip(with_library, self.answers(), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        assert calls == ["native"]

    @pytest.mark.parametrize("change", [{"max_total_detections": 5000}, {"max_detections_per_class": 0}])
    def test_settings_that_the_library_does_not_take_go_to_numpy(self, native_library, change):
        case = nms_cases.random_case(7)
        spec = dataclasses.replace(case.spec, nms=dataclasses.replace(case.spec.nms, **change))
        case = dataclasses.replace(case, spec=spec)
        arguments = nms_cases.arguments_of(case)
        with pytest.raises(InputError, match=r"odtrt_postprocess_cpu: invalid argument"):
            native.postprocess_cpu(native_library, *arguments)
        expected = nms.postprocess_reference(*arguments)
        assert nms_cases.difference(expected, nms.postprocess(*arguments)) == ""

    def test_any_layout_and_mixed_types(self, native_library):
        case = nms_cases.random_case(7)
        expected = nms.postprocess_reference(*nms_cases.arguments_of(case))
        strided = np.repeat(case.class_logits, 2, axis=2)[:, :, ::2]
        found = nms.postprocess(
            case.box_encodings.astype(np.float64), strided, case.anchors, case.spec, case.clip_windows
        )
        assert nms_cases.difference(expected, found) == ""

    def test_no_images_and_no_boxes(self):
        case = nms_cases.random_case(7)
        spec = case.spec
        found = nms.postprocess(
            case.box_encodings[:0], case.class_logits[:0], case.anchors, spec, case.clip_windows[:0]
        )
        assert found.boxes.shape == (0, spec.nms.max_total_detections, 4)
        assert nms.nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), 0.5).shape == (0,)

    @pytest.mark.parametrize(
        "boxes, scores, classes, most, message",
        [
            ((5, 3), 5, None, None, r"boxes: shape \[5, 3\], expected \[5, 4\]"),
            ((5, 4), 4, None, None, r"scores: shape \[4\], expected \[5\]"),
            ((5, 4), 5, 6, None, r"classes: shape \[6\], expected \[5\]"),
            ((5, 4), 5, None, 0, "max_kept: 0"),
        ],
    )
    def test_wrong_arguments_of_nms_are_named(self, boxes, scores, classes, most, message):
        with pytest.raises(InputError, match=message):
            nms.nms(
                np.zeros(boxes, np.float32),
                np.zeros(scores, np.float32),
                0.5,
                None if classes is None else np.zeros(classes, np.int32),
                max_kept=most,
            )


def test_preprocess_reads_regions_and_bgr_where_they_lie(native_library):
    """The same bits as from a copy."""
    frame = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    spec = InputSpec(64, 96, Resizer("fixed_shape"), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    views = {
        "region": frame[10:60, 20:99],
        "region with BGR": frame[10:60, 20:99, ::-1],
        "BGR": frame[..., ::-1],
        "last row and column": frame[89:, 129:, ::-1],
        "upside down": frame[::-1],
        "mirrored": frame[:, ::-1],
        "transposed": frame.transpose(1, 0, 2),
        "every other": frame[::2, ::2],
        "one row for all": np.broadcast_to(frame[:1], frame.shape),
    }
    for name, view in views.items():
        found, _ = preprocess.preprocess(view, spec)
        expected, _ = preprocess.preprocess(view.copy(order="C"), spec)
        np.testing.assert_array_equal(found, expected, err_msg=name)
        is_in_place = native._is_readable_where_it_lies(view)
        assert is_in_place == (name in ("region", "region with BGR", "BGR", "last row and column")), name


def test_preprocess_to_half_precision_is_rounded_once(native_library):
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    spec = InputSpec(64, 96, Resizer("fixed_shape"), (2 / 255,) * 3, (-1.0,) * 3)
    half = np.empty((3, 64, 96), np.float16)
    native.preprocess_cpu(native_library, image, spec, (64, 96), half)
    expected, _ = preprocess.preprocess(image, spec)
    np.testing.assert_array_equal(half, expected.astype(np.float16))


@pytest.fixture(scope="module")
def build(compiler, tmp_path_factory) -> Build:
    """Compiles the CPU library with pieces of its text replaced, or with other flags, and loads it."""
    objects = tmp_path_factory.mktemp("objects")

    def compile_one(source: Path, target: Path, flags: tuple[str, ...]) -> None:
        command = [compiler, *COMPILE, *flags, f"-I{source.parent}", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compile_one, KERNELS / name, objects / f"{name}.o", ("-ffp-contract=off",))
            for name in SOURCES
        ]
        for job in jobs:
            job.result()
    numbers = itertools.count()

    def build(
        *replacements: tuple[str, str, str],
        compiled: tuple[str, ...] = ("postprocess.cpp",),
        flags: tuple[str, ...] = ("-ffp-contract=off",),
    ) -> native.Library:
        folder = tmp_path_factory.mktemp(f"variant{next(numbers)}")
        for path in KERNELS.glob("*.[hc]*"):
            shutil.copy(path, folder)
        for name, old, new in replacements:
            text = (folder / name).read_text()
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
            (folder / name).write_text(text.replace(old, new))
        own = [str(objects / f"{name}.o") for name in SOURCES if name not in compiled]
        for name in compiled:
            compile_one(folder / name, folder / f"{name}.o", flags)
            own.append(str(folder / f"{name}.o"))
        target = folder / native.FILE_NAME
        subprocess.run([compiler, "-shared", "-pthread", "-o", str(target), *own], check=True)
        return native._open(target)

    return build


@pytest.fixture(scope="module")
def unchanged(build) -> native.Library:
    """The CPU library, compiled as the defects below are."""
    return build()


def test_an_unchanged_build_agrees(unchanged):
    assert not is_caught(unchanged)


DEFECTS = {
    "suppresses at the IoU threshold itself": (
        ("semantics.h", "return !(iou <= iou_threshold);", "return !(iou < iou_threshold);"),
    ),
    "keeps a score equal to the threshold": (
        ("postprocess.cpp", "score_of_logit(params, logit) > params.score_threshold",
         "score_of_logit(params, logit) >= params.score_threshold"),
    ),
    "higher class first where scores are equal": (
        ("postprocess.cpp", "order_key(score, static_cast<uint32_t>(c * num_anchors + anchor))",
         "order_key(score, static_cast<uint32_t>((groups_.size() - 1 - c) * num_anchors + anchor))"),
        ("postprocess.cpp", "group = place / batch_.num_anchors;",
         "group = groups_.size() - 1 - place / batch_.num_anchors;"),
    ),
    "no cap a class": (
        ("postprocess.cpp", "if (rivals.size() >= max_per_group_) return true;", ""),
        ("postprocess.cpp", "full_groups_ < groups_.size()", "true"),
    ),
    "the background is a class": (
        ("postprocess.cpp", "static_cast<size_t>(params.background_column),", "size_t{0},"),
    ),
    "upside-down boxes overlap nothing": (
        ("postprocess.cpp", "corners = with_ordered_corners(box);", "corners = box;"),
    ),
    "the head is taken for the whole": (
        ("postprocess.cpp", "if (!wants_more || !(range.lower > min_measure)) break;", "break;"),
    ),
    "equal scores at the end of the head are lost": (
        ("postprocess.cpp",
         "return min_logit_where([&](float logit) { return score_of_logit(params_, logit) >= score; });",
         "return *nth;"),
    ),
    "a NaN among an anchor's logits is overlooked (agnostic)": (
        ("postprocess.cpp", "if (batch.params.class_agnostic && has_nan(logits, count))", "if (false)"),
    ),
    "-0 is less than 0": (("postprocess.cpp", "flushed(value);", "value;"),),
    "the C library's exp": (
        ("semantics.h", "if (x != x) return x;", "return __builtin_expf(x);"),
    ),
    "softmax summed in float": (
        ("postprocess.cpp", "batch.row_sum[row] = softmax_sum(units);",
         "batch.row_sum[row] = 0; for (const float e : exps) batch.row_sum[row] += e;"),
    ),
    "subnormal areas are areas": (
        ("semantics.h", "return flushed(mul(flushed_sub(box.ymax, box.ymin)",
         "return (mul(flushed_sub(box.ymax, box.ymin)"),
    ),
    "a subnormal side is shared": (
        ("semantics.h", "const float height = flush(sub(bottom, top))",
         "const float height = larger(sub(bottom, top), 0.0f)"),
    ),
    "every box is a usual one": (("semantics.h", "value <= -min_magnitude || value == 0.0f;", "true;"),),
    "an overlap with less area than a float has": (
        ("semantics.h", "if (flushed(iou_threshold) == 0.0f) iou_threshold = kGreatestSubnormal;", ""),
    ),
    "a subnormal score is above 0": (
        ("semantics.h", "return normal_or_zero(divide(1.0f, add(1.0f, exponential(-x))));",
         "return divide(1.0f, add(1.0f, exponential(-x)));"),
    ),
    "the caller's padding stays": (
        ("postprocess.cpp", "std::fill(batch_.out.classes + first, batch_.out.classes + last, 0);", ""),
    ),
    "boxes are multiplied by the scales": (
        ("semantics.h", "divide(encoding[0], scales[0])", "mul(encoding[0], 1.0f / scales[0])"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_caught(defect, build):
    assert is_caught(build(*DEFECTS[defect])), f"no case notices: {defect}"


def test_fused_multiply_add_is_caught(build):
    """Why the library is compiled with -ffp-contract=off."""
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused multiply-add")
    assert is_caught(build(flags=("-O2", "-ffp-contract=fast", "-mfma")))


NMS_DEFECTS = {
    "suppresses at the IoU threshold itself": DEFECTS["suppresses at the IoU threshold itself"][0],
    "-0 is less than 0": ("nms.cpp", "add(scores[i], 0.0f);", "scores[i];"),
    "keeps a score equal to the threshold": (
        "nms.cpp", "score > params.score_threshold", "score >= params.score_threshold"),
    "all classes compete": ("nms.cpp", "classes == nullptr ? 0 : classes[i]", "0"),
    "corners in one order only": (
        "nms.cpp", "with_ordered_corners({own[0], own[1], own[2], own[3]})",
        "Box{own[0], own[1], own[2], own[3]}"),
}  # fmt: skip


@pytest.mark.parametrize("defect", NMS_DEFECTS)
def test_a_defect_of_plain_suppression_is_caught(defect, build):
    library = build(NMS_DEFECTS[defect], compiled=("nms.cpp",))
    cases = map(nms_cases.random_nms_case, range(1000))
    assert next(nms_cases.nms_disagreements(select_by(library), cases), ""), f"no case notices: {defect}"


PREPROCESS_DEFECTS = {
    "rounds positions down": (
        "semantics.h", "upper > lower ? sub(position, static_cast<float>(lower)) : 0.0f", "0.0f"),
    "samples half a pixel on": (
        "semantics.h", "mul(static_cast<float>(i), in_over_out);",
        "larger(0.0f, mul(static_cast<float>(i) + 0.5f, in_over_out) - 0.5f);"),
}  # fmt: skip


@pytest.mark.parametrize("defect", PREPROCESS_DEFECTS)
def test_a_defect_of_preprocess_is_caught(defect, build, unchanged):
    """By the tolerance that test_preprocess.py holds it to, beside TensorFlow."""
    tf = pytest.importorskip("tensorflow")
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    spec = InputSpec(64, 96, Resizer("fixed_shape"), (1.0,) * 3, (0.0,) * 3)
    expected = tf.compat.v1.image.resize_bilinear(image[None], (64, 96)).numpy()[0].transpose(2, 0, 1)
    errors = []
    for library in (unchanged, build(PREPROCESS_DEFECTS[defect], compiled=("preprocess.cpp",))):
        out = np.empty((3, 64, 96), np.float32)
        native.preprocess_cpu(library, image, spec, (64, 96), out)
        errors.append(np.abs(out - expected).max() / 255)
    assert errors[0] <= 1e-4 < errors[1]


class TestLoading:
    @pytest.fixture(autouse=True)
    def no_library_elsewhere(self, monkeypatch):
        monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)

    def test_absence_is_not_an_error(self, monkeypatch):
        monkeypatch.setattr(native, "_places", lambda: ())
        assert native.load() is None
        assert "make plugin" in doctor.native_library()

    def test_the_environment_variable_comes_first(self, unchanged, monkeypatch):
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, str(unchanged.path))
        found = native.load()
        assert found is not None and found.path == unchanged.path
        assert doctor.native_library() == f"{unchanged.path}, without CUDA"

    def test_then_the_checkout_then_the_package(self, unchanged, monkeypatch, tmp_path):
        checkout, package = unchanged.path, tmp_path / native.FILE_NAME
        shutil.copy(checkout, package)
        monkeypatch.setattr(native, "_places", lambda: (checkout, package))
        assert native.load().path == checkout
        monkeypatch.setattr(native, "_places", lambda: (tmp_path / "absent", package))
        assert native.load().path == package

    @pytest.mark.parametrize("content", [None, b"", b"not a library"])
    def test_a_library_that_cannot_be_loaded_is_an_error(self, content, monkeypatch, tmp_path):
        path = tmp_path / native.FILE_NAME
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, str(path))
        with pytest.raises(MissingDependencyError) as raised:
            native.load()
        message = str(raised.value)
        assert message.startswith(f"{path}: ") and "make plugin" in message and "\n" not in message
        assert "ODTRT_LIBRARY" in message
        assert doctor.native_library() == message

    def test_another_abi_version_is_an_error(self, build, monkeypatch):
        replacement = ("odtrt.h", "#define ODTRT_ABI_VERSION 1", "#define ODTRT_ABI_VERSION 2")
        with pytest.raises(MissingDependencyError) as raised:
            build(replacement, compiled=("status.cpp",))
        message = str(raised.value)
        assert "ABI version 2, expected 1; run `make plugin`" in message and "\n" not in message

    def test_a_build_without_cuda_says_so(self, unchanged):
        library = unchanged
        params = native.postprocess_params(nms_cases.detector_spec(10, 2, USUAL))
        assert library.cuda_architectures == ""
        assert native.postprocess_workspace(library, params, 1) == 0
        heads, out = native.HeadPointers(), native.DetectionPointers()
        with pytest.raises(MissingDependencyError, match=r"without CUDA.*make plugin"):
            native.postprocess_cuda(library, params, 1, heads, out, 0, 0)
        with pytest.raises(MissingDependencyError, match="without CUDA"):
            native.nms_cuda(library, native.NmsParams(1, 1, 0.0, 0.5), 0, 0, None, 0, 0, 0, 0)
        with pytest.raises(MissingDependencyError, match="without CUDA"):
            native.preprocess_cuda(library, native.PreprocessParams(), 0, 0)

    def test_structures_are_the_headers(self, compiler, tmp_path):
        """Sizes and offsets of every field, as the C compiler lays them out."""
        structures = {
            "odtrt_postprocess_params": native.PostprocessParams,
            "odtrt_heads": native.HeadPointers,
            "odtrt_detections": native.DetectionPointers,
            "odtrt_nms_params": native.NmsParams,
            "odtrt_preprocess_params": native.PreprocessParams,
        }
        lines = []
        for name, structure in structures.items():
            lines += [f'printf("%zu\\n", offsetof({name}, {field}));' for field, _ in structure._fields_] + [
                f'printf("%zu\\n", sizeof({name}));'
            ]
        (tmp_path / "layout.cpp").write_text(
            '#include <cstdio>\n#include "odtrt.h"\nint main() {' + "\n".join(lines) + "}\n"
        )
        program = tmp_path / "layout"
        command = [compiler, f"-I{KERNELS}", str(tmp_path / "layout.cpp"), "-o", str(program)]
        subprocess.run(command, check=True)
        found = list(map(int, subprocess.run([program], capture_output=True, check=True).stdout.split()))
        expected = []
        for structure in structures.values():
            expected += [getattr(structure, field).offset for field, _ in structure._fields_]
            expected += [ctypes.sizeof(structure)]
        assert found == expected

    def test_needs_numpy_only(self, unchanged):
        script = (
            "import sys\n"
            "for absent in ('cv2', 'PIL', 'tensorflow', 'scipy', 'rich', 'typer', 'pytest'):\n"
            "    sys.modules[absent] = None\n"
            "sys.path.insert(0, 'benchmarks')\n"
            "import nms_cases\n"
            "nms_cases.RANDOM_CASES = 20\n"
            "nms_cases.chosen_cases = lambda: []\n"
            "nms_cases.main()\n"
        )
        environment = {**os.environ, native.ENVIRONMENT_VARIABLE: str(unchanged.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and "0 disagreements" in done.stdout, done.stderr


@dataclasses.dataclass(frozen=True)
class RealHeads:
    """What a trained model says about real images, and the OD API's own detections from it."""

    case: nms_cases.Case
    detections: dict[str, np.ndarray]


def real_heads(source: Path, answers: Path, count: int) -> RealHeads:
    """The OD API's own answers, from preprocess to postprocess, to the first ``count`` of its pictures."""
    pytest.importorskip("tensorflow")
    from odtrt_lib.export import find_model
    from odtrt_lib.export.stage import _centre_size

    with np.load(answers / "tensors.npz") as tensors:
        anchors = _centre_size(tensors["anchors"])
        found = {name: tensors[name][:count] for name in tensors.files if name != "anchors"}
    settings = read_pipeline(find_model(source).pipeline)
    image = spec_cases.network_input(1, 1, settings.resizer)
    heads = spec_cases.ssd_of(settings, len(anchors))
    spec = spec_cases.example(heads, settings.nms, image, labels=settings.labels)
    raw = (found[name] for name in ("box_encodings", "class_logits"))
    case = nms_cases.Case(source.name, spec, *raw, anchors, found["clip_windows"])
    assert len(case.class_logits) == count
    return RealHeads(case, found)


def check_real_heads(library: native.Library, heads: RealHeads, *, at_least: int) -> None:
    """Our own answers agree bit for bit; TensorFlow's selection and order are the same.

    Compared with TensorFlow, for every detection: its anchor and class, in the same order; the score to
    10 floats (TensorFlow's sigmoid and softmax round otherwise); the box to 1e-6 of the input.
    """
    expected = nms.postprocess_reference(*nms_cases.arguments_of(heads.case))
    found = nms_cases.by_library(library)(heads.case)
    assert nms_cases.difference(expected, found) == ""
    tensors = heads.detections
    counts = tensors["num_detections"].astype(np.int32)
    assert counts.sum() >= at_least
    np.testing.assert_array_equal(found.num_detections, counts)
    for i, count in enumerate(counts):
        np.testing.assert_array_equal(
            found.anchors[i, :count], tensors["detection_anchor_indices"][i, :count]
        )
        np.testing.assert_array_equal(found.classes[i, :count], tensors["detection_classes"][i, :count])
        scores = tensors["detection_scores"][i, :count]
        apart = np.abs(found.scores[i, :count].view(np.int32).astype(np.int64) - scores.view(np.int32))
        assert apart.max(initial=0) <= 10
        boxes = tensors["detection_boxes"][i, :count]
        np.testing.assert_allclose(found.boxes[i, :count], boxes, rtol=0, atol=1e-6)


def test_the_shipped_model_on_its_scenes_is_tensorflows(native_library, parts, parts_answers):
    check_real_heads(native_library, real_heads(parts, parts_answers, 8), at_least=40)


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["coco_ssd_mnv1", "zoo_ssd_mobilenet_v2_fpnlite_320", "zoo_efficientdet_d0"])
def test_a_strangers_model_on_photographs_is_tensorflows(native_library, corpus, corpus_answers, name):
    heads = real_heads(corpus / name, corpus_answers(name), 8)
    check_real_heads(native_library, heads, at_least=400)
