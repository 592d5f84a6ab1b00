"""Plans on a GPU, without a GPU: real preprocessing and kernels, stand-ins below them.

The stand-in for the CUDA runtime is tests/cuda_stand_in.py. The one for TensorRT reads and writes that
memory at the addresses that it was given, and computes with ONNX Runtime; a plan is an ONNX model behind a
header. What the Detector finds through them is compared with what it finds through ONNX Runtime directly.
Each kind of mistake that this must catch is planted once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import gc
import hashlib
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import spec_cases
from conftest import ROOT, pretend_machine
from cuda_stand_in import Host

from odtrt_lib import cuda, fuse, native, portability, tensors
from odtrt_lib import detector as detector_module
from odtrt_lib.detector import Detections, Detector
from odtrt_lib.engine import passport, pipeline, runtime
from odtrt_lib.engine.passport import Machine, Passport
from odtrt_lib.engine.pipeline import Switches
from odtrt_lib.errors import CheckError, InputError, MissingDependencyError, OdtrtError, UnsupportedError
from odtrt_lib.folder import seal, sha256
from odtrt_lib.machine import this_machine
from odtrt_lib.portability import Environment
from odtrt_lib.spec import DetectorSpec, NmsSpec, load_spec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_graphsurgeon")

LIBRARY = cuda.library
BOARD = Machine("Linux", "aarch64", "Test Orin", "8.7", 16, 15000, "540.4.0", "12.6", "R36.4.3")
VERSIONS = {"tensorrt": "10.3.0", "tensorrt_rtx": "1.7.1"}
TAGS = {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}
SIDE, GRID, PER_CELL, CLASSES = 48, 6, 3, 3
PROFILE = (1, 2, 4)


# --- the model: two convolutions, one cell of anchors for each 8 x 8 pixels


def small_spec(*, batch: int | None, padded: bool) -> DetectorSpec:
    resizer = spec_cases.padded(SIDE) if padded else spec_cases.STRETCHED
    return spec_cases.example(
        spec_cases.ssd(GRID * GRID * PER_CELL, CLASSES),
        NmsSpec(0.6, 0.4, 8, 20, class_agnostic=False, change_coordinate_frame=padded),
        spec_cases.network_input(SIDE, SIDE, resizer, scale=1 / 127.5, offset=-1.0, batch=batch),
        name="small",
        labels=spec_cases.named("bolt", "nut", "gear"),
    )


def write_model(folder: Path, *, batch: int | None = None, padded: bool = True, seed: int = 7) -> Path:
    """A folder as stages 1, 2 and 4 leave it; as fused the stand-in runs ``detector_onnxnms.onnx``."""
    rng = np.random.default_rng(seed)
    spec = small_spec(batch=batch, padded=padded)
    nodes, weights, outputs = [], [], []
    for name, columns, scale in ((spec.heads.box_encodings, 4, 0.4), (spec.heads.class_logits, CLASSES, 0.6)):
        kernel = rng.normal(0, scale, (PER_CELL * columns, 3, 8, 8)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(kernel, f"{name}/kernel"))
        weights.append(onnx.numpy_helper.from_array(np.array([0, -1, columns], np.int64), f"{name}/shape"))
        nodes += [
            onnx.helper.make_node(
                "Conv", ["image", f"{name}/kernel"], [f"{name}/conv"], strides=[8, 8], kernel_shape=[8, 8]
            ),
            onnx.helper.make_node("Transpose", [f"{name}/conv"], [f"{name}/nhwc"], perm=[0, 2, 3, 1]),
            onnx.helper.make_node("Reshape", [f"{name}/nhwc", f"{name}/shape"], [name]),
        ]
        shape = ["batch" if batch is None else batch, spec.heads.num_anchors, columns]
        outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    image_shape = ["batch" if batch is None else batch, 3, SIDE, SIDE]
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, image_shape)
    graph = onnx.helper.make_graph(nodes, "heads", [image], outputs, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    centres = (np.arange(GRID) + 0.5) / GRID
    y, x = np.meshgrid(centres, centres, indexing="ij")
    anchors = np.stack([y, x, np.full_like(y, 0.3), np.full_like(x, 0.25)], -1).reshape(-1, 1, 4)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(spec.to_json())
    np.save(folder / "anchors.npy", np.repeat(anchors, PER_CELL, 1).reshape(-1, 4).astype(np.float32))
    onnx.save(model, folder / "heads.onnx")
    seal(folder)
    fuse.fuse(folder, form="onnx_nms")
    fuse.fuse(folder)
    return folder


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    sizes = rng.integers(20, 90, (count, 2))
    return [rng.integers(0, 256, (int(h), int(w), 3), dtype=np.uint8) for h, w in sizes]


# --- the stand-ins


def make_plan(
    runtime_library: str,
    model: bytes,
    profile: tuple[int, ...] = PROFILE,
    remark: str = "",
    version: str = "",
) -> bytes:
    numbers = [int(part) for part in (version or VERSIONS[runtime_library]).split(".")]
    header = struct.pack("<4sI16s4B", TAGS[runtime_library], 0, b"", *numbers, 0)
    return header + json.dumps({"profile": profile, "remark": remark}).encode() + b"\n" + model


def stand_in_tensorrt(runtime_library: str, host: Host) -> ModuleType:
    """A module with the calls that runtime.py makes; ``trt.seen`` says what it was given."""
    trt = ModuleType(runtime_library)
    trt.__version__ = VERSIONS[runtime_library]
    trt.seen = SimpleNamespace(plans=[], kernels=[], compiled=0, libraries=[], refuses_to_run=False)
    trt.float32, trt.int32 = "FLOAT", "INT32"
    trt.TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    creators: set[tuple[str, ...]] = set()

    class ILogger:
        Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO")

    class IErrorRecorder:
        pass

    class Registry:
        def get_creator(self, *key: str):
            return key if key in creators else None

        def load_library(self, path: str) -> None:
            trt.seen.libraries.append(path)
            if Path(path).read_bytes() == b"plugin":
                creators.add((tensors.PLUGIN, tensors.PLUGIN_VERSION, tensors.DOMAIN))

    registry = Registry()

    class Runtime:
        error_recorder = None

        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes):
            trt.seen.plans.append(data)
            self.logger.log(ILogger.Severity.INFO, "Loaded engine size: 0 MiB")
            if data[:4] != TAGS[runtime_library]:
                self.error_recorder.report_error(1, "Serialization assertion\nmagicTag failed")
                return None
            return Engine(data)

    class KernelCache:
        def __init__(self) -> None:
            self.content: set[str] = set()

        def deserialize(self, blob: bytes) -> bool:
            trt.seen.kernels.append(blob)
            self.content = set(json.loads(blob))
            return True

        def serialize(self) -> bytes:
            return json.dumps(sorted(self.content)).encode()

        def reset(self) -> bool:
            self.content.clear()
            return True

    class RuntimeConfig:
        cache = None

        def create_runtime_cache(self) -> KernelCache:
            return KernelCache()

        def set_runtime_cache(self, cache: KernelCache) -> bool:
            self.cache = cache
            return True

    class Engine:
        def __init__(self, data: bytes) -> None:
            header, model = data[28:].split(b"\n", 1)
            self.profile = json.loads(header)["profile"]
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
            self.outputs = {tensor.name: tensor for tensor in self.session.get_outputs()}
            self.tensors = {**self.outputs, **self.inputs}
            self.num_io_tensors = len(self.tensors)

        def get_tensor_name(self, index: int) -> str:
            return list(self.tensors)[index]

        def get_tensor_mode(self, name: str):
            return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> str:
            return {"tensor(float)": "FLOAT", "tensor(int32)": "INT32"}[self.tensors[name].type]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(-1 if isinstance(size, str) else size for size in self.tensors[name].shape)

        def get_tensor_profile_shape(self, name: str, profile: int):
            assert name in self.inputs and profile == 0
            return [(batch, *self.get_tensor_shape(name)[1:]) for batch in self.profile]

        def create_execution_context(self, config: RuntimeConfig | None = None):
            wanted = set(self.outputs)
            cached = config.cache.content if config is not None else set()
            trt.seen.compiled += len(wanted - cached)
            cached |= wanted
            return Context(self)

    if runtime_library == "tensorrt_rtx":
        Engine.create_runtime_config = lambda self: RuntimeConfig()

    class Context:
        error_recorder = None

        def __init__(self, engine: Engine) -> None:
            self.engine = engine
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            expected = self.engine.get_tensor_shape(name)
            lowest, highest = self.engine.profile[0], self.engine.profile[2]
            fits = all(
                lowest <= one <= highest if e == -1 else one == e
                for one, e in zip(shape, expected, strict=True)
            )
            if not fits:
                self.error_recorder.report_error(3, f"{shape} is outside the profile")
            self.shapes[name] = tuple(shape)
            return fits

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            batch = self.shapes["image"][0]
            return tuple(batch if size == -1 else size for size in self.engine.get_tensor_shape(name))

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return name in self.engine.tensors

        def execute_async_v3(self, stream: int) -> bool:
            if trt.seen.refuses_to_run or set(self.addresses) != set(self.engine.tensors):
                self.error_recorder.report_error(9, "Error Code 9:\nskipped")
                return False
            addresses, shapes = (
                dict(self.addresses),
                {n: self.get_tensor_shape(n) for n in self.engine.tensors},
            )
            dtypes = {"FLOAT": np.float32, "INT32": np.int32}

            def work() -> None:
                def view(name: str) -> np.ndarray:
                    dtype = dtypes[self.engine.get_tensor_dtype(name)]
                    return host.view(addresses[name], dtype, shapes[name])

                found = self.engine.session.run(
                    list(self.engine.outputs), {name: view(name).copy() for name in self.engine.inputs}
                )
                for name, array in zip(self.engine.outputs, found, strict=True):
                    np.copyto(view(name), array)

            host.enqueue(stream, work)
            return True

    trt.ILogger, trt.IErrorRecorder, trt.Runtime, trt.Context = ILogger, IErrorRecorder, Runtime, Context
    trt.get_plugin_registry = lambda: registry
    return trt


class KernelsOnStream:
    """The native library as if with CUDA: its own CPU code, when the stream gets there."""

    def __init__(self, handle: ctypes.CDLL, host: Host) -> None:
        self.handle, self.host = handle, host

    def __getattr__(self, name: str):
        return getattr(self.handle, name)

    def odtrt_postprocess_workspace(self, params, batch: int) -> int:
        return 1000 * batch

    def odtrt_postprocess_cuda(self, params, batch, heads, out, workspace, workspace_size, stream) -> int:
        copies = [type(one._obj).from_buffer_copy(one._obj) for one in (params, heads, out)]
        assert workspace_size >= 1000 * batch

        def at(pointer: int | None, size: int) -> int | None:
            """The memory of ``size`` values a picture, where the CPU reaches it."""
            return pointer and self.host.view(pointer, np.float32, (size,)).ctypes.data

        def work() -> None:
            params, heads, out = (type(one).from_buffer_copy(one) for one in copies)
            self.host.view(workspace, np.uint8, (workspace_size,))
            count, most = batch * params.num_anchors, batch * params.max_total_detections
            heads.box_encodings = at(heads.box_encodings, 4 * count)
            heads.class_logits = at(heads.class_logits, params.num_columns * count)
            heads.anchors = at(heads.anchors, 4 * params.num_anchors)
            heads.clip_windows = at(heads.clip_windows, 4 * batch)
            out.num_detections, out.boxes = at(out.num_detections, batch), at(out.boxes, 4 * most)
            for name in ("scores", "classes", "anchors"):
                setattr(out, name, at(getattr(out, name), most))
            status = self.handle.odtrt_postprocess_cpu(
                ctypes.byref(params), batch, ctypes.byref(heads), ctypes.byref(out), 1
            )
            assert status == 0

        self.host.enqueue(stream, work)
        return 0

    def odtrt_preprocess_cuda(self, params, image, output, stream) -> int:
        params = type(params._obj).from_buffer_copy(params._obj)

        def work() -> None:
            pixels = self.host.view(image, np.uint8, (params.image_height * params.image_pitch,))
            to = self.host.view(output, np.float32, (3 * params.output_height * params.output_width,))
            status = self.handle.odtrt_preprocess_cpu(
                ctypes.byref(params), pixels.ctypes.data, to.ctypes.data, 1
            )
            assert status == 0

        self.host.enqueue(stream, work)
        return 0


@pytest.fixture
def host(monkeypatch) -> Host:
    host = Host()
    monkeypatch.setattr(cuda, "library", lambda: host)
    return host


@pytest.fixture
def kernels(monkeypatch, host, native_library) -> native.Library:
    library = dataclasses.replace(
        native_library, handle=KernelsOnStream(native_library.handle, host), cuda_architectures="87"
    )
    monkeypatch.setattr(native, "load", lambda: library)
    return library


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def runtime_library(request) -> str:
    return request.param


@pytest.fixture
def trt(monkeypatch, host, runtime_library) -> ModuleType:
    return pretend_installed(monkeypatch, host, runtime_library)


def pretend_installed(monkeypatch, host: Host, runtime_library: str) -> ModuleType:
    """This machine is BOARD, and the stand-in its only TensorRT."""
    module = stand_in_tensorrt(runtime_library, host)
    for name in VERSIONS:
        monkeypatch.setitem(sys.modules, name, module if name == runtime_library else None)
    pretend_machine(monkeypatch, BOARD)
    monkeypatch.setattr(runtime, "this_machine", lambda: BOARD)

    def here(plugin=None) -> Environment:
        identity = None if plugin is None else passport.plugin_identity(plugin)
        return Environment(BOARD, runtime_library, VERSIONS[runtime_library], identity)

    monkeypatch.setattr(portability, "this_environment", here)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(batch, padded) -> a folder with that model and no plans. Do not write into it; copy it."""
    made: dict[tuple, Path] = {}

    def folder_of(batch: int | None = None, padded: bool = True) -> Path:
        key = (batch, padded)
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp("model") / "small", batch=batch, padded=padded)
        return made[key]

    return folder_of


@pytest.fixture
def folder(models, tmp_path) -> Path:
    return copy(models(), tmp_path / "small")


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.fixture
def plugin(tmp_path) -> Path:
    path = tmp_path / "libodtrt_tensorrt.so"
    path.write_bytes(b"plugin")
    return path


def no_plan(runtime_library: str) -> bytes:
    """Starts as a plan does, and cannot be loaded."""
    return TAGS[runtime_library] + b"no plan" * 9


def install_plan(
    folder: Path,
    runtime_library: str,
    *,
    model: str = "heads.onnx",
    precision: str = "fp32",
    plugin: Path | None = None,
    profile: tuple[int, ...] = PROFILE,
    machine: Machine = BOARD,
    content: bytes | None = None,
    built: str = "2026-01-01T00:00:00+00:00",
    version: str = "",
) -> Passport:
    """Puts a plan for the stand-in into the folder, with its passport."""
    runs = "detector_onnxnms.onnx" if model == "detector.onnx" else model
    data = content or make_plan(runtime_library, (folder / runs).read_bytes(), profile, built, version)
    identity = [runtime_library, model, precision, machine.gpu, built, version]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    digest = hashlib.sha256(data).hexdigest()
    one = Passport(
        fingerprint=fingerprint,
        plan=passport.plan_name(fingerprint, digest),
        plan_sha256=digest,
        plan_bytes=len(data),
        model=model,
        onnx_sha256=sha256(folder / model),
        spec_sha256=sha256(folder / "spec.json"),
        runtime_library=runtime_library,
        version=version or VERSIONS[runtime_library],
        precision=precision,
        version_compatible=False,
        hardware_compatibility="none",
        compute_capabilities=("default",) if runtime_library == "tensorrt_rtx" else (),
        plugin=None if plugin is None else passport.plugin_identity(plugin),
        machine=machine,
        settings={},
        layers={},
        attempts=(),
        trtexec="",
        seconds=1.0,
        built=built,
    )
    staged = folder / "staged.plan"
    staged.write_bytes(data)
    passport.install(folder, staged, one)
    return one


def load(folder: Path, one: Passport, **options) -> pipeline.Pipeline:
    return pipeline.load(
        folder, one, load_spec(folder / "spec.json"), np.load(folder / "anchors.npy"), **options
    )


def differences(found: list[Detections], expected: list[Detections], tolerance: float = 1e-5) -> list[str]:
    """Which images have other detections, in words."""
    lines = [] if len(found) == len(expected) else [f"{len(found)} answers for {len(expected)} images"]
    for i, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one.names != other.names or not np.array_equal(one.class_ids, other.class_ids):
            lines.append(f"image {i}: {one.names} instead of {other.names}")
        elif not np.allclose(one.scores, other.scores, rtol=0, atol=tolerance):
            lines.append(f"image {i}: other scores")
        elif not np.allclose(one.boxes, other.boxes, rtol=0, atol=300 * tolerance):
            lines.append(f"image {i}: other boxes")
    return lines


def by_onnxruntime(folder: Path, images: list[np.ndarray]) -> list[Detections]:
    """One image after the other, where the batch allows it: the oracle."""
    return [Detector.open(folder, "onnxruntime").detect(image) for image in images]


# --- the same answers


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_a_split_plan_finds_what_onnx_runtime_finds(
    models, tmp_path, trt, runtime_library, kernels, batch, padded
):
    folder = copy(models(batch, padded), tmp_path / "small")
    install_plan(folder, runtime_library)
    images = pictures(11)
    expected = by_onnxruntime(folder, images)
    assert sum(len(one.scores) for one in expected) > 60
    with Detector.open(folder) as detector:
        assert detector.status.backend == runtime_library and "on the GPU" in detector.status.description
        assert detector.status.reasons == () and detector.status.rebuild == "none"
        for count in (1, 2, 4, 5, 11):
            assert differences(detector.detect_batch(images[:count]), expected[:count]) == []


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("batch", [None, 3])
def test_a_fused_plan_finds_what_onnx_runtime_finds(
    models, tmp_path, trt, runtime_library, kernels, batch, padded, plugin
):
    folder = copy(models(batch, padded), tmp_path / "small")
    install_plan(folder, runtime_library, model="detector.onnx", plugin=plugin)
    images = pictures(11)
    expected = by_onnxruntime(folder, images)
    for _ in range(2):
        with Detector.open(folder, plugin=plugin) as detector:
            assert detector.status.description.endswith("post-processing inside the plan")
            for count in (1, 4, 11):
                assert differences(detector.detect_batch(images[:count]), expected[:count]) == []
    assert trt.seen.libraries == [str(plugin.resolve())], "a registry refuses a library that it has"


@pytest.mark.parametrize("library", ["none", "without CUDA", "for other GPUs"])
def test_heads_are_post_processed_on_the_cpu_where_the_kernels_cannot(
    folder, monkeypatch, host, native_library, library
):
    pretend_installed(monkeypatch, host, "tensorrt_rtx")
    install_plan(folder, "tensorrt_rtx")
    expected = by_onnxruntime(folder, pictures(5))
    if library == "none":
        monkeypatch.setattr(native, "load", lambda: None)
    elif library == "for other GPUs":
        handle = KernelsOnStream(native_library.handle, host)
        handle.odtrt_postprocess_cuda = lambda *arguments: 209  # cudaErrorNoKernelImageForDevice
        wrong = dataclasses.replace(native_library, handle=handle, cuda_architectures="75")
        monkeypatch.setattr(native, "load", lambda: wrong)
    with Detector.open(folder) as detector:
        assert "on the CPU, because" in detector.status.description
        assert differences(detector.detect_batch(pictures(5)), expected) == []


def test_loading_does_not_wait_for_post_processing_on_the_cpu(folder, trt, runtime_library, monkeypatch):
    """With thousands of detections an image it takes seconds, and warms nothing up."""
    one = install_plan(folder, runtime_library)
    monkeypatch.setattr(native, "load", lambda: None)
    calls = []
    monkeypatch.setattr(pipeline, "postprocess", lambda *arguments: calls.append(arguments))
    plan = load(folder, one)
    assert calls == [] and trt.seen.plans
    plan.infer(np.zeros((1, 3, SIDE, SIDE), np.float32))
    plan.close()


def test_raw_heads_are_onnx_runtimes(folder, trt, runtime_library, kernels, plugin):
    one = install_plan(folder, runtime_library)
    images = np.random.default_rng(1).normal(0, 1, (7, 3, SIDE, SIDE)).astype(np.float32)
    expected = Detector.open(folder, "onnxruntime").backend.infer(images)
    plan = load(folder, one)
    for found, right in zip(plan.infer(images), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)
    fused = load(
        folder, install_plan(folder, runtime_library, model="detector.onnx", plugin=plugin), plugin=plugin
    )
    with pytest.raises(UnsupportedError, match="no raw heads"):
        fused.infer(images)


def test_a_batch_below_the_profiles_smallest_is_filled_up(folder, trt, runtime_library, kernels):
    install_plan(folder, runtime_library, profile=(3, 3, 4))
    images = pictures(5)
    expected = by_onnxruntime(folder, images)
    with Detector.open(folder) as detector:
        for count in (1, 2, 3, 5):
            assert differences(detector.detect_batch(images[:count]), expected[:count]) == []


def test_running_again_is_the_network_on_the_same_inputs(folder, trt, runtime_library, kernels, host):
    plan = load(folder, install_plan(folder, runtime_library))
    images = np.ones((2, 3, SIDE, SIDE), np.float32)
    plan.infer(images)
    before = {pointer: block.content.copy() for pointer, block in host.memory.items()}
    plan.run_again()
    assert host.pending == []
    assert all(np.array_equal(block.content, before[pointer]) for pointer, block in host.memory.items())


# --- switches

SWITCHES = [
    Switches(*choice)
    for choice in itertools.product(
        ("pageable", "pinned", "mapped"), ("cpu", "gpu"), ("eager", "graph"), ("gpu", "cpu")
    )
]


def bits(found: list[Detections]) -> list[tuple[bytes, ...]]:
    return [(one.boxes.tobytes(), one.scores.tobytes(), one.class_ids.tobytes()) for one in found]


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("batch", [None, 3])
def test_switches_change_no_bit(models, tmp_path, monkeypatch, host, kernels, plugin, batch, is_fused):
    """Each batch three times: the first is eager, the second is recorded, the third is a graph's."""
    pretend_installed(monkeypatch, host, "tensorrt")
    folder = copy(models(batch), tmp_path / "small")
    install_plan(folder, "tensorrt", **({"model": "detector.onnx", "plugin": plugin} if is_fused else {}))
    images = pictures(7)
    batches = [images[:count] for count in (1, 1, 1, 7, 7, 7, 2, 1)] + [images[1:2], images[1:2], images[1:2]]
    by_itself = by_onnxruntime(folder, images)
    expected = None
    for switches in SWITCHES:
        with Detector.open(folder, plugin=plugin if is_fused else None, switches=switches) as detector:
            found = [bits(detector.detect_batch(batch)) for batch in batches]
            launches = host.calls.count("cudaGraphLaunch")
            assert differences(detector.detect_batch(images), by_itself) == []
            has_graph = host.calls.count("cudaGraphLaunch") > launches if batch is None else launches > 0
            assert (switches.launch == "graph") == (launches > 0), (switches, has_graph)
        host.calls.clear()
        expected = expected or found
        assert found == expected, switches
        assert nothing_is_left(host)


def test_a_frame_costs_one_launch_and_no_copy(folder, monkeypatch, host, kernels):
    pretend_installed(monkeypatch, host, "tensorrt")
    install_plan(folder, "tensorrt")
    image = pictures(1)[0]
    with Detector.open(folder, switches=Switches("mapped", "gpu", "graph")) as detector:
        for _ in range(3):
            detector.detect(image)
        host.calls.clear()
        detector.detect(image)
    assert host.calls[:2] == ["cudaGraphLaunch", "cudaStreamSynchronize"]
    assert "cudaMemcpyAsync" not in host.calls


@pytest.mark.parametrize(
    "refuses", ["cudaStreamBeginCapture", "cudaGraphInstantiateWithFlags", "the network"]
)
def test_a_step_that_cannot_be_recorded(folder, monkeypatch, host, kernels, refuses):
    """TensorRT may start nothing while a stream is captured, and say nothing: the graph shows old results."""
    trt = pretend_installed(monkeypatch, host, "tensorrt")
    install_plan(folder, "tensorrt")
    images = pictures(3)
    expected = by_onnxruntime(folder, images)
    execute = trt.Context.execute_async_v3
    if refuses == "the network":
        monkeypatch.setattr(
            trt.Context, "execute_async_v3", lambda self, at: host.capture is not None or execute(self, at)
        )
    else:
        host.refuses[refuses] = 900
    with Detector.open(folder, switches=Switches("pinned", "gpu", "graph")) as detector:
        for _ in range(3):
            assert differences([detector.detect(image) for image in images], expected) == []
        assert host.calls.count("cudaGraphLaunch") == int(refuses == "the network")
        assert "launch: eager, because" in detector.status.description
        detector.close()
    assert nothing_is_left(host)


def test_graphs_of_many_sizes_are_let_go(folder, monkeypatch, host, kernels):
    pretend_installed(monkeypatch, host, "tensorrt")
    install_plan(folder, "tensorrt")
    with Detector.open(folder, switches=Switches("mapped", "gpu", "graph")) as detector:
        for side in range(30, 30 + 3 * pipeline.MAX_GRAPHS):
            for _ in range(2):
                detector.detect(np.zeros((side, 40, 3), np.uint8))
        assert len(host.graphs) == pipeline.MAX_GRAPHS
    assert nothing_is_left(host)


@pytest.mark.parametrize("memory", ["pageable", "pinned", "mapped"])
def test_a_graph_does_not_outlive_the_memory_that_it_knows(folder, monkeypatch, host, kernels, memory):
    """A larger picture needs a larger buffer; the GPU's side of that may lie where the smaller one's lay."""
    pretend_installed(monkeypatch, host, "tensorrt")
    install_plan(folder, "tensorrt")
    rng = np.random.default_rng(4)
    sizes = [(40, 50)] * 3 + [(300, 400)] + [(40, 50)] * 2 + [(500, 600), (300, 400), (40, 50)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    with Detector.open(folder, switches=Switches(memory, "gpu", "graph")) as detector:
        found = [detector.detect(image) for image in images]
    assert differences(found, by_onnxruntime(folder, images)) == []


@pytest.mark.parametrize("memory", ["pageable", "pinned", "mapped"])
def test_a_call_keeps_its_own_detections(folder, monkeypatch, host, kernels, memory):
    """Another thread's call runs as soon as the first one's is over, before its caller has them."""
    pretend_installed(monkeypatch, host, "tensorrt")
    one = install_plan(folder, "tensorrt")
    plan = load(folder, one, switches=Switches(memory))
    own, other = pictures(2)
    expected, foreign = (plan.run([image]).scores.copy() for image in (own, other))
    assert not np.array_equal(expected, foreign)
    put, is_first = pipeline._put, [True]

    def later(found, rows, part):
        if is_first:
            is_first.clear()
            plan.run([other])
        put(found, rows, part)

    monkeypatch.setattr(pipeline, "_put", later)
    assert np.array_equal(plan.run([own]).scores, expected)
    plan.close()


@pytest.mark.parametrize(
    "fails",
    ["the network is bound", "memory is allocated", "Ctrl-C before it is bound", "Ctrl-C after it grew"],
)
def test_the_call_after_a_failed_one_is_right(folder, monkeypatch, host, kernels, fails):
    """What the failed call left half done is done again: no step works on memory that was given back."""
    trt = pretend_installed(monkeypatch, host, "tensorrt")
    plan = load(folder, install_plan(folder, "tensorrt"), switches=Switches("pinned", "gpu", "graph"))
    images = pictures(4)
    expected = [plan.run(images[:count]).scores for count in (1, 3) for _ in range(3)]
    for _ in range(3):
        plan.run(images[:1])
    with monkeypatch.context() as failing:
        if fails in ("memory is allocated", "Ctrl-C after it grew"):
            images[3] = np.zeros((600, 700, 3), np.uint8)
            failed = images[3:]
        if fails == "memory is allocated":
            host.refuses["cudaHostAlloc"] = 2
        elif fails == "the network is bound":
            failing.setattr(trt.Context, "set_input_shape", lambda self, name, shape: False)
            failed = images[:3]
        else:

            def interrupted(*_):
                raise KeyboardInterrupt

            if fails == "Ctrl-C after it grew":
                failing.setattr(pipeline._Buffers, "forget_graphs", interrupted)
            else:
                failing.setattr(runtime.Network, "bind", interrupted)
                failed = images[:3]
        with pytest.raises((OdtrtError, KeyboardInterrupt)):
            plan.run(failed)
    host.refuses.clear()
    assert np.array_equal(plan.run(images[1:2]).scores[0], expected[3][1])
    assert np.array_equal(plan.run(images[:1]).scores, expected[0])
    for _ in range(3):
        assert np.array_equal(plan.run(images[:3]).scores, expected[3])
    plan.run(images[3:])
    plan.close()
    assert nothing_is_left(host)


def test_more_sizes_in_turn_than_graphs_are_not_recorded_at_every_call(folder, monkeypatch, host, kernels):
    pretend_installed(monkeypatch, host, "tensorrt")
    install_plan(folder, "tensorrt")
    sizes = range(30, 31 + pipeline.MAX_GRAPHS)
    with Detector.open(folder, switches=Switches("mapped", "gpu", "graph")) as detector:
        for _ in range(6):
            for side in sizes:
                detector.detect(np.zeros((side, 40, 3), np.uint8))
    assert host.calls.count("cudaStreamBeginCapture") <= 3 * len(sizes)


def test_a_child_after_fork_gives_nothing_of_its_parents_back(folder, monkeypatch, host, kernels):
    """As at a child's normal end, when what is left of the parent's objects goes."""
    pretend_installed(monkeypatch, host, "tensorrt")
    plan = load(folder, install_plan(folder, "tensorrt"))
    host.calls.clear()
    child = os.fork()
    if child == 0:
        plan.close()
        os._exit(len(host.calls))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    plan.close()
    assert nothing_is_left(host)


@pytest.mark.parametrize("wrong", [{"memory": "managed"}, {"preprocess": "GPU"}, {"launch": ""}])
def test_a_switch_that_is_unknown(wrong):
    with pytest.raises(InputError, match="expected one of"):
        Switches(**wrong)


# --- mistakes that the comparison must catch


def wrong_tensor(monkeypatch, trt) -> None:
    other = {"boxes": "boxes", "scores": "classes", "classes": "scores"}
    bind = trt.Context.set_tensor_address
    monkeypatch.setattr(
        trt.Context, "set_tensor_address", lambda self, name, at: bind(self, other.get(name, name), at)
    )


def stale_buffer(monkeypatch, trt) -> None:
    """Only what is copied first gets to the device."""
    memcpy, seen = Host.cudaMemcpyAsync, []

    def few(self, target: int, source: int, size: int, kind: int, stream: int) -> int:
        is_upload = target in self.memory
        seen.extend([size] * is_upload)
        return memcpy(self, target, source, size, kind, stream) if not is_upload or len(seen) < 5 else 0

    monkeypatch.setattr(Host, "cudaMemcpyAsync", few)


def chunk_off_by_one(monkeypatch, trt) -> None:
    def chunks(self, batch: int):
        most = self._network.max_batch
        for start in range(0, batch, most):
            rows = slice(min(start + (start > 0), batch - 1), min(batch, start + most))
            yield rows, max(rows.stop - rows.start, 1)

    monkeypatch.setattr(pipeline.Pipeline, "_chunks", chunks)


def nobody_waits(monkeypatch, trt) -> None:
    monkeypatch.setattr(cuda.Stream, "synchronize", lambda self: None)


def windows_forgotten(monkeypatch, trt) -> None:
    monkeypatch.setattr(
        pipeline._Batch, "clip_windows", lambda self: np.tile(np.float32([0, 0, 1, 1]), (self.size, 1))
    )


DEFECTS = [stale_buffer, chunk_off_by_one, nobody_waits, windows_forgotten]


@pytest.mark.parametrize(
    "defect, is_fused",
    [(wrong_tensor, True), *((defect, is_fused) for defect in DEFECTS for is_fused in (True, False))],
    ids=lambda value: value.__name__ if callable(value) else ("fused" if value else "split"),
)
def test_a_mistake_is_caught(folder, monkeypatch, host, kernels, plugin, defect, is_fused):
    trt = pretend_installed(monkeypatch, host, "tensorrt")
    install_plan(folder, "tensorrt", **({"model": "detector.onnx", "plugin": plugin} if is_fused else {}))
    images = pictures(11)
    expected = by_onnxruntime(folder, images)
    defect(monkeypatch, trt)
    detector = Detector.open(folder, "tensorrt", plugin=plugin if is_fused else None)
    try:
        found = detector.detect_batch(images)
    except (IndexError, OdtrtError):
        return  # class numbers out of what was never written
    assert differences(found, expected) != []


def test_the_stand_in_guards_its_memory(host):
    memory, stream = cuda.Memory(16), cuda.Stream()
    with pytest.raises(AssertionError, match="20 bytes"):
        host.view(memory.address, np.float32, (5,))
    with pytest.raises(AssertionError, match="no memory"):
        host.view(memory.address - 4, np.float32, (1,))
    pinned = cuda.Memory(16, "pinned")
    with pytest.raises(AssertionError, match="no memory that a kernel reaches"):
        host.view(pinned.address, np.uint8, (16,))
    with pytest.raises(AssertionError, match="past the end"):
        cuda.copy(memory.address, pinned.address, 17, stream)


# --- memory and errors


def one_line_of(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def nothing_is_left(host: Host) -> bool:
    gc.collect()
    return host.is_empty()


def test_memory_goes_back(folder, trt, runtime_library, kernels, host):
    one = install_plan(folder, runtime_library)
    plan = load(folder, one)
    plan.infer(np.zeros((4, 3, SIDE, SIDE), np.float32))
    plan.close()
    plan.close()
    assert nothing_is_left(host)
    with pytest.raises(runtime.RunError, match="closed") as caught:
        plan.infer(np.zeros((1, 3, SIDE, SIDE), np.float32))
    one_line_of(caught)
    plan = load(folder, one)
    del plan
    assert nothing_is_left(host)


def test_out_of_memory_is_one_line_and_no_end(folder, trt, runtime_library, kernels, host):
    plan = load(folder, install_plan(folder, runtime_library))
    images = np.zeros((4, 3, SIDE, SIDE), np.float32)
    host.free_bytes = images.nbytes - 1
    with pytest.raises(runtime.RunError) as caught:
        plan.infer(images)
    assert "CUDA error 2: out of memory" in one_line_of(caught)
    assert len(plan.infer(images[:1])[0]) == 1
    host.free_bytes = None
    assert len(plan.infer(images)[0]) == 4


def test_no_memory_to_load(folder, trt, runtime_library, kernels, host):
    host.free_bytes = 1000
    with pytest.raises(runtime.RunError) as caught:
        load(folder, install_plan(folder, runtime_library))
    assert "out of memory" in one_line_of(caught)
    assert nothing_is_left(host)


def test_tensorrts_reasons_arrive_on_one_line(folder, trt, runtime_library, kernels, host):
    one = install_plan(folder, runtime_library, content=b"not a plan")
    with pytest.raises(runtime.RunError) as caught:
        load(folder, one)
    message = one_line_of(caught)
    assert one.plan in message and "Serialization assertion magicTag failed" in message
    assert "Loaded engine" not in message and nothing_is_left(host)

    plan = load(folder, install_plan(folder, runtime_library))
    trt.seen.refuses_to_run = True
    with pytest.raises(runtime.RunError) as caught:
        plan.infer(np.zeros((1, 3, SIDE, SIDE), np.float32))
    assert "Error Code 9: skipped" in one_line_of(caught)
    trt.seen.refuses_to_run = False
    plan.infer(np.zeros((1, 3, SIDE, SIDE), np.float32))


def test_a_plan_that_is_not_the_passports_is_never_deserialised(folder, trt, runtime_library, kernels, host):
    one = install_plan(folder, runtime_library)
    path = folder / "plans" / one.plan
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError):
        load(folder, one)
    assert trt.seen.plans == [] and nothing_is_left(host)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": {"class_logits": "scores"}}, "expected image, box_encodings, scores"),
        ({"heads": {"num_anchors": 7}}, "`box_encodings` is [2, 108, 4], expected [2, 7, 4]"),
    ],
)
def test_a_plan_that_does_not_fit_the_spec(folder, trt, runtime_library, kernels, host, change, message):
    one = install_plan(folder, runtime_library)
    spec = load_spec(folder / "spec.json")
    for part, fields in change.items():
        spec = dataclasses.replace(spec, **{part: dataclasses.replace(getattr(spec, part), **fields)})
    with pytest.raises(CheckError) as caught:
        pipeline.load(folder, one, spec, np.load(folder / "anchors.npy"))
    assert message in one_line_of(caught) and nothing_is_left(host)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((1, 3, SIDE, SIDE)), "network_input: float64"),
        (np.zeros((1, SIDE, SIDE, 3), np.float32), "[batch, 3, 48, 48]"),
    ],
)
def test_arrays_of_another_form(folder, trt, runtime_library, kernels, array, message):
    plan = load(folder, install_plan(folder, runtime_library))
    with pytest.raises(InputError) as caught:
        plan.infer(array)
    assert message in one_line_of(caught)
    with pytest.raises(InputError, match="uint8"):
        plan.run([np.zeros((SIDE, SIDE, 3), np.float32)])


def test_what_is_absent_is_named(folder, trt, runtime_library, kernels, monkeypatch, tmp_path, plugin):
    fused = install_plan(folder, runtime_library, model="detector.onnx", plugin=plugin)
    with pytest.raises(InputError, match="needs the plugin"):
        load(folder, fused)
    with pytest.raises(InputError, match="make plugin"):
        load(folder, fused, plugin=tmp_path / "nowhere.so")
    other = tmp_path / "other.so"
    other.write_bytes(b"no plugin")
    with pytest.raises(runtime.RunError, match="the plugin"):
        load(folder, fused, plugin=other)
    one = install_plan(folder, runtime_library)
    with monkeypatch.context() as without:
        without.setattr(cuda, "library", LIBRARY)
        without.setattr(cuda, "FILE_NAMES", ("libcudart.so.none",))
        without.setattr(cuda, "_files", lambda: [])
        LIBRARY.cache_clear()
        with pytest.raises(MissingDependencyError, match=r"libcudart\.so cannot be loaded"):
            load(folder, one)
    LIBRARY.cache_clear()
    monkeypatch.setitem(sys.modules, runtime_library, None)
    with pytest.raises(MissingDependencyError, match=f"install `{runtime_library}`"):
        load(folder, one)


# --- kernels that TensorRT-RTX compiles when a plan is loaded


@pytest.fixture
def rtx(monkeypatch, host, kernels) -> ModuleType:
    return pretend_installed(monkeypatch, host, "tensorrt_rtx")


def kept_kernels(folder: Path) -> list[Path]:
    return sorted((folder / "plans").glob("*.kernels"))


def test_the_second_start_compiles_nothing(folder, rtx):
    one = install_plan(folder, "tensorrt_rtx")
    load(folder, one)
    assert rtx.seen.compiled == 2 and rtx.seen.kernels == []
    load(folder, one)
    assert rtx.seen.compiled == 2 and len(rtx.seen.kernels) == 1
    assert len(kept_kernels(folder)) == 1


def test_tensorrt_itself_keeps_no_kernels(folder, monkeypatch, host, kernels):
    pretend_installed(monkeypatch, host, "tensorrt")
    load(folder, install_plan(folder, "tensorrt"))
    assert kept_kernels(folder) == []


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "empty", "not a file"])
def test_damaged_kernels_are_ignored_and_written_anew(folder, rtx, damage):
    one = install_plan(folder, "tensorrt_rtx")
    load(folder, one)
    path = kept_kernels(folder)[0]
    whole = path.read_bytes()
    if damage == "flipped bit":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    elif damage == "not a file":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(whole[: 40 if damage == "cut off" else 0])
    load(folder, one)
    assert rtx.seen.compiled == 4 and rtx.seen.kernels == [], "TensorRT must not see damaged kernels"
    if damage != "not a file":
        assert path.read_bytes() == whole


def test_kernels_are_for_one_plan_one_version_and_one_gpu(folder, rtx, monkeypatch):
    one = install_plan(folder, "tensorrt_rtx")
    load(folder, one)
    rtx.__version__ = "1.8.0"
    load(folder, one)
    monkeypatch.setattr(runtime, "this_machine", lambda: dataclasses.replace(BOARD, gpu="Another"))
    load(folder, one)
    assert rtx.seen.compiled == 6 and rtx.seen.kernels == [] and len(kept_kernels(folder)) == 3
    other = make_plan("tensorrt_rtx", (folder / "heads.onnx").read_bytes(), remark="built again")
    again = install_plan(folder, "tensorrt_rtx", content=other)
    assert again.fingerprint == one.fingerprint and again.plan != one.plan
    load(folder, again)
    assert len(kept_kernels(folder)) == 1, "kernels of a plan that is gone go too"


def test_a_folder_that_cannot_be_written_is_no_obstacle(folder, rtx, monkeypatch):
    one = install_plan(folder, "tensorrt_rtx")

    def refuse(path):
        raise InputError(f"{path}: cannot be written")

    monkeypatch.setattr(runtime, "atomic_write", refuse)
    load(folder, one)
    assert kept_kernels(folder) == []


# --- which backend serves


def no_stand_in(monkeypatch) -> None:
    """There is no GPU, and whoever asks for TensorRT or a rebuild without one fails."""
    pretend_machine(monkeypatch, Machine("Linux", "x86_64"))
    for name in VERSIONS:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("this_environment", "start_rebuild", "check"):
        monkeypatch.setattr(portability, name, lambda *arguments, **options: pytest.fail("asked"))


def test_without_a_gpu_everything_is_as_it_was(folder, monkeypatch):
    install_plan(folder, "tensorrt")
    no_stand_in(monkeypatch)
    images = pictures(3)
    detector = Detector.open(folder)
    assert detector.backend.name == "onnxruntime"
    assert detector.status.reasons == ("no NVIDIA GPU here: no plan runs, ONNX Runtime does",)
    assert differences(detector.detect_batch(images), by_onnxruntime(folder, images), 1e-5) == []
    for wrong, words in (
        ({"plugin": "nope.so"}, "nope.so: not found"),
        ({"precision": "int4"}, "'int4': exp"),
    ):
        with pytest.raises(InputError, match=words):
            Detector.open(folder, **wrong)
    for name in VERSIONS:
        with pytest.raises(MissingDependencyError, match="needs an NVIDIA GPU") as caught:
            Detector.open(folder, name)
        one_line_of(caught)


def test_a_gpu_without_tensorrt_is_said(folder, monkeypatch, host):
    pretend_installed(monkeypatch, host, "tensorrt")
    monkeypatch.setattr(portability, "this_environment", lambda plugin=None: Environment(BOARD, None, None))
    detector = Detector.open(folder)
    assert detector.backend.name == "onnxruntime"
    assert "neither tensorrt nor tensorrt_rtx" in detector.status.reasons[0]


def test_a_gpu_without_plans_is_said(folder, trt, kernels):
    detector = Detector.open(folder)
    assert detector.backend.name == "onnxruntime" and "run `odtrt build`" in detector.status.reasons[0]
    assert detector.status.rebuild == "none"


def test_the_newest_plan_of_a_precision(folder, trt, runtime_library, kernels, plugin):
    fp32 = install_plan(folder, runtime_library, built="2026-01-01T00:00:00+00:00")
    fp16 = install_plan(folder, runtime_library, precision="fp16", built="2026-01-02T00:00:00+00:00")
    fused = install_plan(
        folder, runtime_library, model="detector.onnx", plugin=plugin, built="2025-01-01T00:00:00+00:00"
    )
    assert Detector.open(folder).status.plan == fp16.fingerprint
    assert Detector.open(folder, runtime_library).status.plan == fp16.fingerprint
    assert Detector.open(folder, precision="fp32").status.plan == fp32.fingerprint
    assert Detector.open(folder, plugin=plugin).status.plan == fused.fingerprint
    assert Detector.open(folder, plugin=plugin, precision="fp16").status.plan == fp16.fingerprint


def test_tensorrt_asked_for_and_no_plan_left(folder, trt, runtime_library, kernels, monkeypatch):
    monkeypatch.setattr(portability, "start_rebuild", lambda *arguments, **options: pytest.fail("asked"))
    with pytest.raises(InputError, match="run `odtrt build`"):
        Detector.open(folder, runtime_library)
    stale = install_plan(folder, runtime_library, version=older(runtime_library))
    damaged = install_plan(folder, runtime_library, precision="fp16")
    (folder / "plans" / damaged.plan).write_bytes(b"")
    (folder / "plans" / "0123456789abcdef.json").write_text("{")
    with pytest.raises(InputError) as caught:
        Detector.open(folder, runtime_library)
    message = str(caught.value)
    assert "\n" not in message and trt.seen.plans == []
    for part in (
        stale.fingerprint,
        older(runtime_library),
        damaged.fingerprint,
        "has 0 bytes",
        "0123456789abcdef.json",
    ):
        assert part in message


def older(runtime_library: str) -> str:
    """A version whose plans are to be built again."""
    return {"tensorrt": "10.2.0", "tensorrt_rtx": "1.6.1"}[runtime_library]


def test_a_plan_that_may_not_be_loaded_never_is(folder, trt, runtime_library, kernels, monkeypatch):
    asked = []
    monkeypatch.setattr(portability, "start_rebuild", lambda *arguments, **options: asked.append(arguments))
    monkeypatch.setattr(detector_module, "_POLL_SECONDS", 0.001)
    one = install_plan(folder, runtime_library)
    path = folder / "plans" / one.plan
    path.write_bytes(path.read_bytes()[:-3] + b"\0\0\0")
    images = pictures(2)
    with pytest.warns(RuntimeWarning, match="was not rebuilt"):
        detector = Detector.open(folder)
        detector.wait_for_rebuild()
    assert trt.seen.plans == [] and "is damaged" in detector.status.reasons[0]
    assert differences(detector.detect_batch(images), by_onnxruntime(folder, images)) == []


def test_a_plan_that_cannot_be_loaded_leaves_the_next_one(folder, trt, runtime_library, kernels, host):
    good = install_plan(folder, runtime_library, built="2026-01-01T00:00:00+00:00")
    install_plan(folder, runtime_library, built="2026-01-02T00:00:00+00:00", content=no_plan(runtime_library))
    with pytest.warns(RuntimeWarning, match="cannot be"):
        detector = Detector.open(folder)
    assert detector.status.plan == good.fingerprint
    (folder / "plans" / f"{good.fingerprint}.json").unlink()
    with pytest.warns(RuntimeWarning):
        detector = Detector.open(folder)
    assert detector.backend.name == "onnxruntime" and "cannot load it" in detector.status.reasons[0]
    del detector
    assert nothing_is_left(host)


def test_a_plan_that_is_replaced_while_it_is_looked_at(folder, trt, runtime_library, kernels, monkeypatch):
    """Another process installs a new plan between reading the passports and the plan: nothing to rebuild."""
    monkeypatch.setattr(portability, "start_rebuild", lambda *arguments, **options: pytest.fail("asked"))
    one = install_plan(folder, runtime_library)
    again = make_plan(runtime_library, (folder / "heads.onnx").read_bytes(), remark="built again")
    check, calls = portability.check, []

    def replaced_meanwhile(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            assert install_plan(folder, runtime_library, content=again).fingerprint == one.fingerprint
        return check(*arguments)

    monkeypatch.setattr(portability, "check", replaced_meanwhile)
    detector = Detector.open(folder)
    assert detector.status.plan == one.fingerprint and trt.seen.plans == [again]


def test_no_rebuild_for_a_plan_that_is_valid_and_cannot_be_loaded(
    folder, trt, runtime_library, kernels, monkeypatch
):
    """Each start would rebuild it once more."""
    monkeypatch.setattr(portability, "start_rebuild", lambda *arguments, **options: pytest.fail("asked"))
    install_plan(folder, runtime_library, version=older(runtime_library))
    install_plan(folder, runtime_library, built="2026-01-02T00:00:00+00:00", content=no_plan(runtime_library))
    with pytest.warns(RuntimeWarning, match="cannot be"):
        status = Detector.open(folder).status
    assert (status.backend, status.rebuild) == ("onnxruntime", "none")
    assert "cannot load it" in status.reasons[0] and older(runtime_library) in status.reasons[1]


def test_plans_of_other_machines_are_no_reason_to_rebuild(folder, trt, runtime_library, kernels, monkeypatch):
    monkeypatch.setattr(portability, "start_rebuild", lambda *arguments, **options: pytest.fail("asked"))
    own = install_plan(folder, runtime_library, built="2026-01-01T00:00:00+00:00")
    pc = Machine("Linux", "x86_64", "Test PC", "8.9", 100, 24000, "580.1", "13.0")
    install_plan(folder, runtime_library, built="2026-01-02T00:00:00+00:00", machine=pc)
    assert Detector.open(folder).status == dataclasses.replace(
        Detector.open(folder).status, plan=own.fingerprint, reasons=(), rebuild="none"
    )


# --- a plan is rebuilt while the detector serves


@dataclasses.dataclass
class Rebuild:
    """Stands for the build: it waits for ``finish``, and then installs a plan or fails."""

    folder: Path
    gate: Path
    result: Passport | None

    def finish(self) -> None:
        self.gate.write_text("go")


INSTALL = """
import sys
from pathlib import Path
from odtrt_lib.engine import passport
gate, source, folder = map(Path, sys.argv[1:])
assert gate.read_text() == "go"
if source.name == "none":
    sys.exit("no memory")
one = passport.read(next(source.glob("plans/*.json")))
staged = folder / "rebuilt.plan"
staged.write_bytes((source / "plans" / one.plan).read_bytes())
passport.install(folder, staged, one)
"""


@pytest.fixture
def rebuild(folder, tmp_path, monkeypatch, models, runtime_library):
    """succeeds -> Rebuild: what a stale plan in ``folder`` is rebuilt by."""
    monkeypatch.setattr(detector_module, "_POLL_SECONDS", 0.001)
    original = portability.start_rebuild

    def prepare(succeeds: bool = True, **options) -> Rebuild:
        gate = tmp_path / "gate"
        os.mkfifo(gate)
        source = tmp_path / ("other" if succeeds else "none")
        result = None
        if succeeds:
            copy(models(), source)
            result = install_plan(source, runtime_library, built="2026-02-01T00:00:00+00:00", **options)
        command = [sys.executable, "-c", INSTALL, *map(str, (gate, source, folder))]
        monkeypatch.setattr(portability, "start_rebuild", functools.partial(original, command=command))
        return Rebuild(folder, gate, result)

    return prepare


@pytest.mark.parametrize("fallback", ["onnxruntime", "an older plan of another precision"])
def test_a_stale_plan_is_rebuilt_while_another_serves(
    folder, trt, runtime_library, kernels, host, rebuild, fallback
):
    install_plan(folder, runtime_library, version=older(runtime_library))
    if fallback != "onnxruntime":
        valid = install_plan(folder, runtime_library, precision="fp16", built="2025-01-01T00:00:00+00:00")
    rebuilt = rebuild()
    images = pictures(5)
    expected = by_onnxruntime(folder, images)
    with Detector.open(folder) as detector:
        before = detector.status
        assert before.backend == ("onnxruntime" if fallback == "onnxruntime" else runtime_library)
        assert before.plan == (None if fallback == "onnxruntime" else valid.fingerprint)
        assert before.rebuild == "running" and older(runtime_library) in before.reasons[0]
        assert differences(detector.detect_batch(images), expected) == []
        assert detector.wait_for_rebuild(timeout=0).rebuild == "running"
        rebuilt.finish()
        after = detector.wait_for_rebuild()
        assert (after.rebuild, after.plan, after.reasons) == ("done", rebuilt.result.fingerprint, ())
        ran = len(trt.seen.plans)
        assert differences(detector.detect_batch(images), expected) == []
        assert len(trt.seen.plans) == ran == (1 if fallback == "onnxruntime" else 2)
        gc.collect()
        assert len(host.streams) == 1, "the older plan's memory is given back"
    assert nothing_is_left(host)
    assert Detector.open(folder).status == dataclasses.replace(after, rebuild="none", message="")


def test_a_rebuild_that_fails_is_said_and_not_repeated(folder, trt, runtime_library, kernels, rebuild):
    install_plan(folder, runtime_library, version=older(runtime_library))
    rebuilt = rebuild(succeeds=False)
    images = pictures(2)
    expected = by_onnxruntime(folder, images)
    with pytest.warns(RuntimeWarning, match="was not rebuilt") as told:
        detector = Detector.open(folder)
        rebuilt.finish()
        status = detector.wait_for_rebuild()
    assert len(told) == 1
    assert (status.rebuild, status.backend) == ("failed", "onnxruntime")
    assert "ended with status 1" in status.message and older(runtime_library) in status.message
    assert differences(detector.detect_batch(images), expected) == []
    with pytest.warns(RuntimeWarning, match="was not rebuilt"):
        assert Detector.open(folder).wait_for_rebuild().rebuild == "failed"


def test_a_plan_of_a_model_that_was_replaced_meanwhile_does_not_take_over(
    folder, trt, runtime_library, kernels, rebuild
):
    """Its boxes would be decoded with the anchors that this detector was opened with."""
    install_plan(folder, runtime_library, version=older(runtime_library))
    rebuilt = rebuild()
    with pytest.warns(RuntimeWarning, match=r"another model .*open it again"):
        detector = Detector.open(folder)
        np.save(folder / "anchors.npy", np.load(folder / "anchors.npy") + np.float32(0.125))
        seal(folder)
        rebuilt.finish()
        status = detector.wait_for_rebuild()
    assert (status.rebuild, status.backend) == ("failed", "onnxruntime")
    assert Detector.open(folder).status.plan == rebuilt.result.fingerprint


def test_a_rebuild_that_leaves_an_unusable_plan_behind(folder, trt, runtime_library, kernels, rebuild):
    install_plan(folder, runtime_library, version=older(runtime_library))
    rebuilt = rebuild(content=no_plan(runtime_library))
    with pytest.warns(RuntimeWarning):
        detector = Detector.open(folder)
        rebuilt.finish()
        status = detector.wait_for_rebuild()
    assert (status.rebuild, status.backend) == ("failed", "onnxruntime")
    assert "cannot load it" in status.message


def test_two_detectors_one_rebuild(folder, trt, runtime_library, kernels, rebuild):
    install_plan(folder, runtime_library, version=older(runtime_library))
    rebuilt = rebuild()
    one, other = Detector.open(folder), Detector.open(folder)
    rebuilt.finish()  # a second build would wait at the gate for ever
    for detector in (one, other):
        assert detector.wait_for_rebuild().plan == rebuilt.result.fingerprint


def test_who_waited_for_another_plans_rebuild_starts_its_own(folder, trt, runtime_library, kernels, rebuild):
    install_plan(
        folder,
        runtime_library,
        version=older(runtime_library),
        precision="fp16",
        built="2026-01-02T00:00:00+00:00",
    )
    install_plan(folder, runtime_library, version=older(runtime_library), precision="fp32")
    rebuilt = rebuild(precision="fp32")
    fp16 = Detector.open(folder, precision="fp16")  # holds the lock; what it builds is fp32
    fp32 = Detector.open(folder, precision="fp32")
    assert fp32.status.rebuild == fp16.status.rebuild == "running"
    with pytest.warns(RuntimeWarning):
        rebuilt.finish()
        assert fp32.wait_for_rebuild().plan == rebuilt.result.fingerprint
        assert fp16.wait_for_rebuild().rebuild == "failed"


def test_a_closed_detector_is_not_brought_back(folder, trt, runtime_library, kernels, host, rebuild):
    install_plan(folder, runtime_library, version=older(runtime_library))
    rebuilt = rebuild()
    detector, dropped = Detector.open(folder), Detector.open(folder)
    detector.close()
    watcher = dropped._serving.watcher
    del dropped
    gc.collect()
    watcher.join()
    rebuilt.finish()
    assert portability.wait_for_rebuild(folder).state == "done"
    assert detector.status.backend == "closed" and trt.seen.plans == [] and nothing_is_left(host)


def swap_under_a_call(
    folder: Path, runtime_library: str, host: Host, monkeypatch, rebuilt: Rebuild
) -> list[str]:
    """One call is on the old plan while the new one takes over; how the answers differ, or an error."""
    install_plan(folder, runtime_library, version=older(runtime_library))
    old = install_plan(
        folder, runtime_library, precision="fp16", built="2025-01-01T00:00:00+00:00"
    ).fingerprint
    images = pictures(9)
    expected = by_onnxruntime(folder, images)
    detector = Detector.open(folder)
    inside, go_on = threading.Event(), threading.Event()
    in_turn = pipeline.Pipeline._in_turn

    def slow(self, function, *arguments):
        if self._network.passport.fingerprint == old:
            inside.set()
            assert go_on.wait(300)
        return in_turn(self, function, *arguments)

    monkeypatch.setattr(pipeline.Pipeline, "_in_turn", slow)
    future = detector.submit_batch(images)
    assert inside.wait(300) and detector.status.plan == old
    rebuilt.finish()
    assert detector.wait_for_rebuild().plan == rebuilt.result.fingerprint
    found = differences(detector.detect_batch(images), expected)
    go_on.set()
    try:
        found += differences(future.result(), expected)
    except OdtrtError as error:
        found.append(str(error))
    del future
    gc.collect()
    assert len(host.streams) == 1, "the old plan's memory goes back when its last call has ended"
    detector.close()
    return found


def test_a_swap_under_a_call(folder, trt, runtime_library, kernels, host, monkeypatch, rebuild):
    assert swap_under_a_call(folder, runtime_library, host, monkeypatch, rebuild()) == []


def test_a_swap_that_closes_the_old_plan_at_once_is_caught(
    folder, trt, runtime_library, kernels, host, monkeypatch, rebuild
):
    take_over = detector_module._take_over

    def and_close(detector, wanted):
        old = detector.backend
        problem = take_over(detector, wanted)
        old.close()
        return problem

    monkeypatch.setattr(detector_module, "_take_over", and_close)
    (found,) = swap_under_a_call(folder, runtime_library, host, monkeypatch, rebuild())
    assert "closed" in found


def test_many_threads_share_one_plan(folder, trt, runtime_library, kernels):
    install_plan(folder, runtime_library)
    images = pictures(12)
    expected = by_onnxruntime(folder, images)
    detector = Detector.open(folder)
    answers: dict[int, list[Detections]] = {}

    def detect(start: int) -> None:
        answers[start] = detector.detect_batch(images[start : start + 3])

    threads = [threading.Thread(target=detect, args=(start,)) for start in range(0, 12, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differences([one for start in sorted(answers) for one in answers[start]], expected) == []


# --- the real library, which is here without a GPU

REAL = """
import sys
from pathlib import Path
import numpy as np
from odtrt_lib import fuse
from odtrt_lib.engine import passport, pipeline
from odtrt_lib.errors import OdtrtError
from odtrt_lib.spec import load_spec
folder = Path(sys.argv[1])
one = passport.passports(folder)[0]
try:
    pipeline.load(folder, one, load_spec(folder / "spec.json"), np.load(folder / "anchors.npy"))
except OdtrtError as error:
    print(type(error).__name__, error)
"""

BUILD = """
import sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse(open(sys.argv[1], "rb").read())
plan = builder.build_serialized_network(network, builder.create_builder_config())
open(sys.argv[2], "wb").write(bytes(plan))
print(trt.__version__)
"""


def test_the_real_library_says_on_one_line_that_there_is_no_gpu(models, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if this_machine().gpu is not None:
        pytest.skip("there is a GPU here")
    folder, plan = copy(models(1), tmp_path / "small"), tmp_path / "real.plan"
    built = subprocess.run(
        [sys.executable, "-c", BUILD, folder / "heads.onnx", plan], capture_output=True, text=True, check=True
    )
    version = ".".join(built.stdout.strip().split(".")[:3])
    one = install_plan(folder, "tensorrt_rtx", content=plan.read_bytes(), version=version)
    run = subprocess.run([sys.executable, "-c", REAL, folder], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("RunError ") and run.stdout.count("\n") == 1
    assert one.plan in run.stdout and "cudaError 35" in run.stdout
    assert run.stderr == ""
