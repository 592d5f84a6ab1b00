"""The C++ detector: its C ABI on the CPU, plans with stand-ins of CUDA and TensorRT, the examples."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import detector_cases
import numpy as np
import pytest
from detector_cases import assert_same, make_case, pictures, spec_of

from odtrt_lib import native
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.folder import seal
from odtrt_lib.native_detector import FILE_NAME, Image, NativeDetector, Options, Result, load_library
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parent.parent
DETECTOR, KERNELS, EXAMPLES = (ROOT / "plugins" / name for name in ("detector", "kernels", "examples"))
STAND_INS = Path(__file__).with_name("detector_stand_ins")
# major * 100 + minor of TensorRTs whose interfaces differ for engine_tensorrt.cpp; 10 is compiled elsewhere.
VERSIONS = (805, 806, 1101)


@pytest.fixture(scope="module")
def library(native_library) -> Path:
    """libodtrt_detector.so, which `make test` builds first."""
    path = native_library.path.with_name(FILE_NAME)
    if not path.is_file():
        pytest.fail(f"{path} is not built: run `make plugin`")
    return path


@pytest.fixture
def case(tmp_path, library) -> detector_cases.Case:
    return make_case(tmp_path / "made_up", spec_of("stretched"))


class Gate:
    """A network that waits until it is opened, and says when it has begun."""

    def __init__(self, infer) -> None:
        self.infer, self.begun, self.may_end = infer, threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, batch):
        self.begun.release()
        assert self.may_end.acquire(timeout=60)
        return self.infer(batch)


# ---- The same detections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resizer", detector_cases.RESIZERS)
@pytest.mark.parametrize("frame", [True, False], ids=["own frame", "network's frame"])
def test_the_same_bits_as_the_python_detector(tmp_path, library, resizer, frame):
    nms = dataclasses.replace(detector_cases.NMS, change_coordinate_frame=frame)
    case = make_case(tmp_path / "case", spec_of(resizer, nms=nms))
    counts = []
    with NativeDetector.open(case.folder, infer=case.infer) as detector:
        for image in pictures(resizer):
            expected = case.detect(image)
            assert_same(detector.detect(image), expected)
            counts.append(len(expected.names))
    assert min(counts) > 3


def small_onnx_folder(onnx, folder: Path) -> Path:
    """A model folder with a heads.onnx that ONNX Runtime runs."""
    import plugin_matrix

    spec = plugin_matrix.small_spec(is_padded=True)
    spec = dataclasses.replace(spec, input=dataclasses.replace(spec.input, scale=(0.005,) * 3))
    folder.mkdir()
    detector_cases.write_spec(folder, spec.to_json())
    np.save(folder / "anchors.npy", plugin_matrix.small_anchors(spec))
    onnx.save(plugin_matrix.small_heads(spec), folder / "heads.onnx")
    seal(folder)
    return folder


def test_the_same_bits_with_onnx_runtime(tmp_path, library):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from odtrt_lib.detector import Detector

    folder = small_onnx_folder(onnx, tmp_path / "small")
    with Detector.open(folder, "onnxruntime") as python:
        with NativeDetector.open(folder, infer=python.backend.infer) as detector:
            for image in pictures("padded"):
                expected = python.detect(image)
                assert len(expected.names) > 3
                assert_same(detector.detect(image), expected)


def test_another_threshold_is_seen(tmp_path, library):
    nms = dataclasses.replace(detector_cases.NMS, iou_threshold=0.4)
    case, other = (
        make_case(tmp_path / name, spec_of("stretched", nms=one))
        for name, one in (("a", detector_cases.NMS), ("b", nms))
    )
    with NativeDetector.open(other.folder, infer=other.infer) as detector, pytest.raises(AssertionError):
        assert_same(detector.detect(pictures("stretched")[0]), case.detect(pictures("stretched")[0]))


def test_a_batch_is_filled_for_a_network_of_fixed_batch(tmp_path, library):
    case = make_case(tmp_path / "case", spec_of("stretched", batch=3))
    shapes = []

    def infer(batch):
        shapes.append(batch.shape)
        return case.infer(batch)

    with NativeDetector.open(case.folder, infer=infer) as detector:
        assert_same(detector.detect(pictures("stretched")[0]), case.detect(pictures("stretched")[0]))
    assert shapes == [(3, 3, 24, 32)]


def test_several_threads(case):
    images = pictures("stretched") * 3
    with (
        NativeDetector.open(case.folder, infer=case.infer, num_slots=3) as detector,
        ThreadPoolExecutor(4) as pool,
    ):
        for found, image in zip(pool.map(detector.detect, images), images, strict=True):
            assert_same(found, case.detect(image))


# ---- Tickets and slots ------------------------------------------------------------------------------------


def test_tickets_time_out_and_stay_valid(case):
    gate, (first, second, third, *_) = Gate(case.infer), pictures("stretched")
    with NativeDetector.open(case.folder, infer=gate, num_slots=2) as detector:
        tickets = [detector.submit(first), detector.submit(second)]
        assert tickets == [1, 2]
        assert detector.submit(third) is None, "both slots are busy"
        assert detector.result(1, 0) is None and detector.result(2, 0.001) is None
        gate.may_end.release()
        assert_same(detector.result(1), case.detect(first))
        assert_same(detector.result(1, 0), case.detect(first))
        assert detector.result(2, 0) is None
        assert detector.submit(third) == 3, "the slot of the first"
        with pytest.raises(InputError, match="ticket 1: no such picture, or its slot was used again"):
            detector.result(1)
        for _ in range(2):
            gate.may_end.release()
        assert_same(detector.result(3), case.detect(third))
        assert_same(detector.result(2), case.detect(second))
        with pytest.raises(InputError, match="ticket 9"):
            detector.result(9)


def test_a_finished_picture_that_nobody_fetched_makes_room(case):
    images = pictures("stretched")
    gate = Gate(case.infer)
    with NativeDetector.open(case.folder, infer=gate, num_slots=1) as detector:
        assert detector.submit(images[0]) == 1
        gate.may_end.release()
        assert detector.result(1) is not None
        for ticket, image in enumerate(images[:3], 2):
            assert detector.submit(image) == ticket
            gate.may_end.release()
            assert_same(detector.result(ticket), case.detect(image))


def test_a_slot_is_used_where_it_is(case):
    image = pictures("stretched")[0]
    with NativeDetector.open(case.folder, infer=case.infer, num_slots=2) as detector:
        slot = detector.slot(*image.shape[:2])
        assert slot is not None and slot.shape == image.shape
        slot[:] = image
        ticket = detector.submit(slot)
        slot[:] = image[::-1]  # too early or too late: it is the detector's own memory now, and no copy
        found = detector.result(ticket)
        expected = [case.detect(image), case.detect(np.ascontiguousarray(image[::-1]))]
        assert any(found.boxes.tobytes() == one.boxes.tobytes() for one in expected)
        assert detector.slot(48, 64) is not None and detector.slot(48, 64) is not None
        assert detector.slot(48, 64) is None, "both are lent"
        with pytest.raises(InputError, match="all 2 slots are lent or busy"):
            detector.detect(image)


def test_a_slot_comes_back_unused(case):
    with NativeDetector.open(case.folder, infer=case.infer, num_slots=1) as detector:
        slot = detector.slot(48, 64)
        detector.release(slot)
        assert detector.slot(30, 30) is not None
        with pytest.raises(InputError, match="not in a slot that is lent"):
            detector.release(np.zeros((48, 64, 3), np.uint8))


def test_a_picture_that_is_larger_than_its_slot_is_refused(case):
    with NativeDetector.open(case.folder, infer=case.infer) as detector:
        slot = detector.slot(4, 4)
        image = Image(data=slot.ctypes.data, height=5, width=4, pitch=12)
        with pytest.raises(InputError, match="larger than the slot"):
            detector._call("odtrt_detector_infer", ctypes.byref(image), ctypes.byref(detector._room()[0]))


# ---- Errors -----------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        NativeDetector.open(folder, infer=lambda batch: batch).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("number", range(len(detector_cases.SPEC_CHANGES)))
def test_a_spec_is_refused_where_python_refuses_it(case, number):
    """A number of anchors that is not the file's is found when anchors.npy is read."""
    path = case.folder / "spec.json"
    path.write_text(detector_cases.SPEC_CHANGES[number](path.read_text()))
    seal(case.folder)
    try:
        spec = load_spec(path)
        is_right = spec.heads.num_anchors == detector_cases.NUM_ANCHORS
    except InputError:
        is_right = False
    if is_right:
        NativeDetector.open(case.folder, infer=case.infer).close()
    else:
        assert refusal(case.folder).startswith((f"{path}: ", f"{case.folder}/anchors.npy: "))


def test_errors_name_the_file_and_the_field(case):
    path = case.folder / "spec.json"
    original = path.read_text()
    for change, said in (
        (('"iou_threshold": 0.5', '"iou_threshold": 7'), "spec.nms.iou_threshold: 7, expected"),
        (('"id": 2', '"id": 4'), "spec.labels[1].id: 4, expected 2 to 2"),
        (('"y_scale": 10.0', '"x": 1'), "spec.heads.box_coder.x: unknown field"),
        (('"converter": "sigmoid", ', ""), "spec.heads.scores.converter: missing field"),
        (("{", "{{"), "not JSON (no name of a member at byte 1)"),
    ):
        path.write_text(json.dumps(json.loads(original)).replace(*change, 1))
        seal(case.folder)
        assert refusal(case.folder).startswith(f"{path}: {said}"), said


def test_what_is_not_sealed_is_refused(case, tmp_path):
    for name, spoil, said in (
        ("spec.json", lambda data: data + b" ", "damaged or changed: its SHA-256 is"),
        ("anchors.npy", lambda data: data[:-1] + b"\x00", "damaged or changed: its SHA-256 is"),
        (
            "log.jsonl",
            lambda data: data.replace(b'"seconds": 0.0', b'"seconds": 1.0'),
            "line 1 is damaged (altered",
        ),
        ("log.jsonl", lambda data: b"", "spec.json: not sealed"),
        ("log.jsonl", lambda data: data + b"{\n", "line 2 is damaged"),
    ):
        folder = shutil.copytree(case.folder, tmp_path / "copy")
        (folder / name).write_bytes(spoil((folder / name).read_bytes()))
        assert said in refusal(folder)
        shutil.rmtree(folder)
    (case.folder / "anchors.npy").unlink()
    assert "anchors.npy: cannot be read (No such file or directory)" in refusal(case.folder)
    assert "no such folder" in refusal(tmp_path / "nothing")
    (case.folder / ".commit-1").mkdir()
    assert "a change of several files was interrupted" in refusal(case.folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.astype(np.float64), lambda a: np.asfortranarray(a), lambda a: a[:-1],
        lambda a: a.astype(">f4"), lambda a: a.reshape(-1), lambda a: -a,
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 6, np.nan, a).astype(np.float32),
    ],
)  # fmt: skip
def test_anchors_of_another_kind_are_refused(case, spoil):
    np.save(case.folder / "anchors.npy", spoil(case.anchors))
    seal(case.folder)
    assert "anchors.npy: " in refusal(case.folder)


def test_a_network_that_fails_says_why(case):
    def infer(batch):
        raise ValueError("no\nmemory")

    with NativeDetector.open(case.folder, infer=infer) as detector:
        for _ in range(3):
            with pytest.raises(native.NativeError, match=r"the caller's network failed: no memory\Z"):
                detector.detect(pictures("stretched")[0])


def test_pictures_that_do_not_fit(tmp_path, library):
    case = make_case(tmp_path / "case", spec_of("keep_aspect_ratio"))
    with NativeDetector.open(case.folder, infer=case.infer) as detector:
        with pytest.raises(InputError, match="image: 50x50 becomes 24x24, which does not fit"):
            detector.detect(np.zeros((50, 50, 3), np.uint8))
        with pytest.raises(InputError, match="becomes"):
            detector.slot(50, 50)
        with pytest.raises(InputError, match="a side"):
            detector.slot(0, 5)


def test_a_closed_detector(case):
    detector = NativeDetector.open(case.folder, infer=case.infer)
    detector.close()
    detector.close()
    with pytest.raises(InputError, match="this detector is closed"):
        detector.detect(pictures("stretched")[0])


def test_the_c_abi_refuses_what_is_no_argument(case, library):
    functions, error, opened = load_library(), ctypes.create_string_buffer(200), ctypes.c_void_p()

    def status(name: str, *arguments: object) -> int:
        found = getattr(functions, name)(*arguments, error, len(error))
        assert (found == 0) == (error.value == b"")
        return found

    infer = NativeDetector.open(case.folder, infer=case.infer)
    options = Options(folder=str(case.folder).encode())
    for change in (
        {"struct_size": 8},
        {"struct_size": 1 << 40},
        {"folder": None},
        {"num_slots": 17},
        {"num_slots": -1},
    ):
        spoilt = Options.from_buffer_copy(options)
        for name, value in change.items():
            setattr(spoilt, name, value)
        assert status("odtrt_detector_open", ctypes.byref(spoilt), ctypes.byref(opened)) == -1, change
        assert opened.value is None
    assert status("odtrt_detector_open", None, ctypes.byref(opened)) == -1
    assert status("odtrt_detector_open", ctypes.byref(options), None) == -1
    memory = np.zeros((4, 4, 3), np.uint8)
    good = {"data": memory.ctypes.data, "height": 4, "width": 4, "pitch": 0, "format": 0}
    result, _ = infer._room()
    call = ("odtrt_detector_infer", infer._detector)
    assert status(*call, ctypes.byref(Image(**good)), ctypes.byref(result)) == 0
    for change in ({"data": None}, {"height": 0}, {"width": 1 << 24}, {"pitch": 11}, {"format": 2}):
        assert status(*call, ctypes.byref(Image(**{**good, **change})), ctypes.byref(result)) == -1, change
    assert status(*call, None, ctypes.byref(result)) == -1
    for change in ({"detections": None}, {"capacity": 19}, {"struct_size": 8}):
        spoilt = Result.from_buffer_copy(result)
        for name, value in change.items():
            setattr(spoilt, name, value)
        assert status(*call, ctypes.byref(Image(**good)), ctypes.byref(spoilt)) == -1, change
    assert status(*call, ctypes.byref(Image(**good)), None) == -1
    assert status("odtrt_detector_infer", None, ctypes.byref(Image(**good)), ctypes.byref(result)) == -1
    assert status("odtrt_detector_infer_async", infer._detector, ctypes.byref(Image(**good)), None) == -1
    infer.close()


def test_structs_of_a_newer_header(case):
    """Fields that this library does not know may be there, if they are 0."""

    class Newer(ctypes.Structure):
        _fields_ = (("own", Image), ("more", ctypes.c_int64))

    memory = np.zeros((4, 4, 3), np.uint8)
    with NativeDetector.open(case.folder, infer=case.infer) as detector:
        result, found = detector._room()
        assert len(found) == 20
        for more, expected in ((0, ""), (1, "only a newer library knows")):
            image = Newer(Image(data=memory.ctypes.data, height=4, width=4), more)
            image.own.struct_size = ctypes.sizeof(image)
            try:
                pointer = ctypes.cast(ctypes.byref(image), ctypes.POINTER(Image))
                assert detector._call("odtrt_detector_infer", pointer, ctypes.byref(result)) == 0
                said = ""
            except InputError as error:
                said = str(error)
            assert bool(said) == bool(expected) and expected in said


def test_a_short_error_buffer_is_not_overrun(case):
    options, error = Options(folder=b"/absent/folder"), ctypes.create_string_buffer(b"x" * 64)
    opened = ctypes.c_void_p()
    load_library().odtrt_detector_open(ctypes.byref(options), ctypes.byref(opened), error, 8)
    assert error.raw[:9] == b"/absent\0x"


def test_without_cuda_the_library_says_so(case):
    if native.load().cuda_architectures:
        pytest.skip("this library was built with CUDA")
    with pytest.raises(MissingDependencyError, match="built without CUDA, so it runs no plan"):
        NativeDetector.open(case.folder)


def test_another_file_is_no_library(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"no library")
    with pytest.raises(MissingDependencyError, match="cannot be loaded"):
        load_library(tmp_path / FILE_NAME)


# ---- The files --------------------------------------------------------------------------------------------


def test_the_headers_are_c11():
    flags = ["-std=c11", "-fsyntax-only", "-pedantic", "-Wall", "-Wextra", "-Werror", "-x", "c"]
    for name in ("odtrt_detector.h", "engine.h"):
        done = subprocess.run(["gcc", *flags, DETECTOR / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def exported(path: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in listed.stdout.splitlines()}


def test_only_the_c_abi_is_exported(library):
    declared = set(re.findall(r"\bodtrt_detector_\w+(?=\()", (DETECTOR / "odtrt_detector.h").read_text()))
    assert exported(library) == declared


def test_python_states_the_same_numbers_and_layouts(tmp_path, compiler):
    """The compiler is the oracle for sizes and offsets."""
    structs = {"odtrt_detector_options": Options, "odtrt_image": Image, "odtrt_result": Result}
    lines = [
        f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));'
        for name, kind in structs.items()
        for field, _ in kind._fields_
    ]
    lines += [f'printf("{name} %zu\\n", sizeof({name}));' for name in structs]
    lines.append('printf("status %d %d\\n", ODTRT_TIMEOUT, ODTRT_BUSY);')
    header = DETECTOR / "odtrt_detector.h"
    (tmp_path / "say.c").write_text(
        f'#include "{header}"\n#include <stdio.h>\nint main(void) {{ {" ".join(lines)} }}'
    )
    subprocess.run(["gcc", tmp_path / "say.c", "-o", tmp_path / "say"], check=True)
    said = subprocess.run([tmp_path / "say"], capture_output=True, text=True, check=True).stdout
    expected = [
        f"{name}.{f} {getattr(kind, f).offset}" for name, kind in structs.items() for f, _ in kind._fields_
    ]
    expected += [f"{name} {ctypes.sizeof(kind)}" for name, kind in structs.items()]
    assert said.splitlines() == [*expected, "status -5 -6"]


# ---- Plans, with stand-ins --------------------------------------------------------------------------------

SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
SCENARIOS = re.findall(
    r"(?m)^def (scenario_\w+)", Path(__file__).with_name("detector_scenarios.py").read_text()
)


def compile_all(compiler: str, kernels: Path, folder: Path) -> None:
    """The detector, under sanitizers, its face to TensorRT 10, and the stand-ins.

    kernels: libodtrt.so, which tests/test_kernels.py builds under sanitizers.
    """
    shared = (
        compiler,
        "-std=c++17",
        "-O0",
        "-g1",
        "-Wall",
        "-Wextra",
        "-fPIC",
        "-shared",
        "-pthread",
        *SANITIZERS,
    )
    usual = (
        *shared,
        f"-I{STAND_INS}",
        f"-I{KERNELS}",
        f"-L{folder}",
        "-Wl,-rpath,$ORIGIN",
        "-fvisibility=hidden",
    )
    names = sorted(path for path in DETECTOR.glob("*.cpp") if path.name != "engine_tensorrt.cpp")
    (folder / "detector.cpp").write_text("".join(f'#include "{path}"\n' for path in names))
    (folder / "libodtrt.so").symlink_to(kernels)
    version, engine = "-DSTAND_IN_TENSORRT=1003", DETECTOR / "engine_tensorrt.cpp"
    commands = (
        (*usual, "-fvisibility=default", STAND_INS / "cuda.cpp", "-l:libodtrt.so", "-o",
         folder / "libstand_in_cuda.so"),
        (*usual, "-DODTRT_WITH_CUDA", "-Wno-subobject-linkage", folder / "detector.cpp", "-lstand_in_cuda",
         f"-Wl,--version-script={DETECTOR / 'exports.map'}", "-o", folder / FILE_NAME),
        (*usual, version, engine, f"-Wl,--version-script={DETECTOR / 'engine_exports.map'}", "-o",
         folder / "libodtrt_engine10.so"),
        (*usual, version, STAND_INS / "nvinfer.cpp", "-lstand_in_cuda", "-Wl,-soname,libnvinfer.so.10", "-o",
         folder / "libnvinfer.so.10"),
    )  # fmt: skip

    def run(command: tuple[object, ...]) -> None:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr

    run(commands[0])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands[1:]))
    (folder / "plugin.so").write_bytes(b"\0getCreators\0")


def run_scenarios(folder: Path) -> dict[str, str]:
    preloaded = [  # the second for exceptions, which the first intercepts
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(str.strip, preloaded)),
        "LD_LIBRARY_PATH": str(folder),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]),
    }
    command = [sys.executable, Path(__file__).with_name("detector_scenarios.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def scenarios(native_library, compiler, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stand_ins")
    compile_all(compiler, native_library.path.resolve(), folder)
    return run_scenarios(folder)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(scenarios, name):
    assert scenarios[name] == "", scenarios[name]


# ---- The face to TensorRT, against headers ----------------------------------------------------------------


def header_folders() -> list[Path]:
    """TensorRT's own headers: ODTRT_TENSORRT_HEADERS is a folder with one for each version, as
    benchmarks/plugin_matrix.py takes it; TENSORRT_INCLUDE_DIR those of one."""
    many, one = (os.environ.get(name) for name in ("ODTRT_TENSORRT_HEADERS", "TENSORRT_INCLUDE_DIR"))
    found = sorted(path.parent for path in Path(many).glob("*/NvInferRuntime.h")) if many else []
    return found + ([Path(one)] if one else [])


def compile_engine(compiler: str, *includes: object) -> subprocess.CompletedProcess[str]:
    command = (compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *includes)
    source = DETECTOR / "engine_tensorrt.cpp"
    return subprocess.run([*map(str, command), str(source)], capture_output=True, text=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_engine_compiles_for_each_interface(compiler, version):
    """With the stand-in of each version's classes; the next test takes NVIDIA's own."""
    done = compile_engine(compiler, f"-DSTAND_IN_TENSORRT={version}", "-isystem", STAND_INS)
    assert done.returncode == 0, done.stderr


def test_the_engine_compiles_with_nvidias_headers(compiler):
    folders = header_folders()
    if not folders:
        pytest.skip("no TensorRT headers: set TENSORRT_INCLUDE_DIR, or ODTRT_TENSORRT_HEADERS for several")
    import plugin_matrix

    for folder in folders:
        done = compile_engine(
            compiler, "-isystem", folder, "-isystem", plugin_matrix.cuda_folder() / "include"
        )
        assert done.returncode == 0, f"{folder}: {done.stderr}"


def test_the_engine_is_not_linked_to_tensorrt(tmp_path, compiler):
    path = tmp_path / "libodtrt_engine10.so"
    command = [
        compiler, "-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-DSTAND_IN_TENSORRT=1000",
        "-isystem", STAND_INS, DETECTOR / "engine_tensorrt.cpp", "-o", path, "-ldl",
        f"-Wl,--version-script={DETECTOR / 'engine_exports.map'}", "-Wl,--no-undefined",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert exported(path) == {"odtrt_engine_functions"}


# ---- The examples -----------------------------------------------------------------------------------------

NETWORK = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
int32_t network(void *context, const float *input, float *boxes, float *logits, char *error, size_t size) {
  FILE *file = fopen(getenv("HEADS"), "rb");
  size_t read = fread(boxes, 4, BOXES, file) + fread(logits, 4, LOGITS, file);
  fclose(file);
  for (int i = 0; i < BOXES; ++i) boxes[i] += input[0];
  for (int i = 0; i < LOGITS; ++i) logits[i] += input[MIDDLE];
  return read == BOXES + LOGITS ? 0 : 1;
}
"""
OPENCV = """
namespace cv {
struct Mat { unsigned char *data; int rows, cols; struct { operator unsigned long() const; } step; };
struct VideoCapture { VideoCapture(const char *); VideoCapture(int); bool read(Mat &); };
}
"""


def lines_of(found) -> list[tuple[object, ...]]:
    return [
        (name, pytest.approx(score, rel=1e-5), *(pytest.approx(side, rel=1e-5, abs=1e-5) for side in box))
        for name, score, box in zip(found.names, found.scores, found.boxes, strict=True)
        if score > 0.5
    ]


def read_lines(said: str) -> list[tuple[object, ...]]:
    words = [line.rsplit(maxsplit=5) for line in said.splitlines()]
    return [(name, *map(float, numbers)) for name, *numbers in words]


def test_the_readme_shows_the_examples():
    text = (ROOT / "plugins" / "README.md").read_text()
    shown = dict(re.findall(r"<!-- examples/(\S+) -->\n```\w+\n(.*?)```\n", text, re.DOTALL))
    assert shown == {name: (EXAMPLES / name).read_text() for name in ("detect.cpp", "detect.py")}
    assert len(shown["detect.cpp"].splitlines()) <= 60


def test_the_c_example_finds_what_python_finds(case, library, compiler, tmp_path):
    program = tmp_path / "detect"
    subprocess.run(
        [
            compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", EXAMPLES / "detect.cpp", library,
            f"-Wl,-rpath,{library.parent}", "-ldl", "-o", program,
        ],
        check=True,
    )  # fmt: skip
    (tmp_path / "network.c").write_text(NETWORK)
    sizes = (
        f"-DBOXES={case.box_encodings.size}",
        f"-DLOGITS={case.class_logits.size}",
        f"-DMIDDLE={3 * 24 * 32 // 2}",
    )
    command = ["gcc", "-shared", "-fPIC", *sizes, tmp_path / "network.c", "-o", tmp_path / "network.so"]
    subprocess.run(command, check=True)
    (tmp_path / "heads").write_bytes(case.box_encodings.tobytes() + case.class_logits.tobytes())
    images = pictures("stretched")[:3]
    stream = b"".join(b"P6\n%d %d\n255\n" % image.shape[1::-1] + image.tobytes() for image in images)
    (tmp_path / "pictures.ppm").write_bytes(stream)
    words = [case.folder, tmp_path / "pictures.ppm", tmp_path / "network.so"]
    environment = {**os.environ, "HEADS": str(tmp_path / "heads")}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [str(word) for word in (program, *words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    expected = [line for image in images for line in lines_of(case.detect(image))]
    assert read_lines(done.stdout) == expected and len(expected) > 3
    assert run().stderr == "usage: detect FOLDER SOURCE [NETWORK]\n"
    done = run(tmp_path / "nothing", *words[1:])
    assert done.returncode == 1 and "no such folder" in done.stderr


def test_the_c_example_compiles_for_opencv(compiler, tmp_path):
    """OpenCV's headers are not needed: the names that the example uses are stated here."""
    (tmp_path / "opencv2").mkdir()
    (tmp_path / "opencv2" / "videoio.hpp").write_text(OPENCV)
    flags = (
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-DWITH_OPENCV",
        "-isystem",
        tmp_path,
    )
    subprocess.run([compiler, *flags, EXAMPLES / "detect.cpp"], check=True)


def test_the_python_example_finds_what_the_detector_finds(library, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from PIL import Image as PillowImage

    from odtrt_lib.detector import Detector

    folder = small_onnx_folder(onnx, tmp_path / "small")
    image = pictures("padded")[0]
    PillowImage.fromarray(image).save(tmp_path / "picture.png")
    command = [sys.executable, EXAMPLES / "detect.py", folder, tmp_path / "picture.png", "--onnxruntime"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    with Detector.open(folder, "onnxruntime") as detector:
        expected = lines_of(detector.detect(image))
    assert read_lines(done.stdout) == expected and expected
