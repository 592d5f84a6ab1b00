"""The builder on TensorRT 8.5, 8.6, 10.3 and 11: which calls it makes where no such library can be installed.

The stand-ins below have the names that those versions have, as far as the builder may need them, and nothing
else: any other name raises AttributeError. They build nothing. That the real bindings have these names is
checked by ``test_tensorrt_names.py``.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import pretend_machine

from odtrt_lib import engine
from odtrt_lib.engine import builder, fallback, passport, stage, watch
from odtrt_lib.errors import BuildError, CheckError, InputError, UnsupportedError
from odtrt_lib.folder import exclusive, seal, write_record

onnx = pytest.importorskip("onnx")
from test_engine import SPEC, files_in, heads_model, model_folder  # noqa: E402

STAND_IN = '''
import ctypes, json, os, signal, time

__version__ = "@VERSION@"
HAS = set("@HAS@".split())
KNOBS = json.loads(os.environ.get("STAND_IN", "{}"))


def log(*call):
    with open(os.environ["STAND_IN_LOG"], "a") as file:
        file.write(json.dumps(call) + "\\n")


def names(title, text):
    """An enumeration: a class with these members, which are numbered strings."""
    return type(title, (), {name: Member(f"{title}.{name}", i) for i, name in enumerate(text.split())})


class Member(str):
    def __new__(cls, text, number):
        member = super().__new__(cls, text)
        member.number = number
        return member

    def __int__(self):
        return self.number


DataType = names("DataType", "FLOAT HALF INT8 INT32")
float32, int32 = DataType.FLOAT, DataType.INT32
LayerType = names("LayerType", "CONVOLUTION MATRIX_MULTIPLY QUANTIZE SHUFFLE")
MemoryPoolType = names("MemoryPoolType", "WORKSPACE")
ProfilingVerbosity = names("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED")
LayerInformationFormat = names("LayerInformationFormat", "JSON")
BuilderFlag = names("BuilderFlag", "@FLAGS@")
NetworkDefinitionCreationFlag = names("NetworkDefinitionCreationFlag", "@NETWORK@")
TacticSource = names("TacticSource", "@TACTICS@")
if "@LEVELS@":
    HardwareCompatibilityLevel = names("HardwareCompatibilityLevel", "@LEVELS@")


class ILogger:
    Severity = names("Severity", "INTERNAL_ERROR ERROR WARNING")
class Logger(ILogger):
    ERROR = "ERROR"
    def __init__(self, severity): pass


class IErrorRecorder:
    def __init__(self): pass


if "monitor" in HAS:
    class IProgressMonitor:
        def __init__(self): pass


class Registry:
    def __init__(self):
        self.known = False
    if "load_library" in HAS:
        def load_library(self, path):
            log("load_library", os.path.basename(path))
            self.known = True
    if "get_creator" in HAS:
        def get_creator(self, name, version, namespace):
            return (name, version, namespace) if self.known else None
    if "get_plugin_creator" in HAS:
        def get_plugin_creator(self, name, version, namespace):
            with open(os.environ["STAND_IN_LOG"], "a+") as file:
                file.seek(0)
                has_registered_itself = "static registration" in file.read()
            return (name, version, namespace) if self.known or has_registered_itself else None


REGISTRY = Registry()
def get_plugin_registry(): return REGISTRY


class Tensor:
    def __init__(self, name, shape, dtype):
        self.name, self.shape, self.dtype = name, shape, dtype


class Layer:
    def __init__(self, type, dtype):
        self.type, self.num_outputs, self.num_inputs, self.dtype = type, 1, 0, dtype
    def get_output(self, i): return Tensor("", (), self.dtype)


class Network:
    def __init__(self, flags): self.flags = flags
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))
    def get_input(self, i): return self.inputs[i]
    def get_output(self, i): return self.outputs[i]
    def get_layer(self, i): return self.layers[i]


class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger): self.network = network
    def parse_from_file(self, path):
        import onnx
        log("parse_from_file", os.path.basename(path))
        graph = onnx.load(path).graph
        def tensor(value):
            kind = value.type.tensor_type
            types = {1: DataType.FLOAT, 6: DataType.INT32, 10: DataType.HALF}
            shape = tuple(size.dim_value or -1 for size in kind.shape.dim)
            return Tensor(value.name, shape, types[kind.elem_type])
        self.network.inputs = [tensor(value) for value in graph.input]
        self.network.outputs = [tensor(value) for value in graph.output]
        halves = {tensor.name for tensor in graph.initializer if tensor.data_type == 10}
        types = {"Conv": LayerType.CONVOLUTION, "QuantizeLinear": LayerType.QUANTIZE}
        self.network.layers = [
            Layer(types.get(node.op_type, LayerType.SHUFFLE),
                  DataType.HALF if halves & set(node.input) else DataType.FLOAT)
            for node in graph.node
        ]
        return True


class Profile:
    def set_shape(self, name, least, best, most):
        log("set_shape", name, least, best, most)
        KNOBS["mb"] = KNOBS.get("mb", 0) + (200 if least != most else 0)


class Cache:
    def __init__(self, blob): self.blob = blob
    def serialize(self): return b"timings of " + __version__.encode()
    def combine(self, other, ignore_mismatch):
        log("combine", other.blob.decode())
        return True


class Config:
    profiling_verbosity = None
    if "level" in HAS:
        hardware_compatibility_level = plugins_to_serialize = None
    def __init__(self):
        self.flags_set, self.settings = set(), {}
        if "level" in HAS:
            self.builder_optimization_level = 3
        if "monitor" in HAS:
            self.progress_monitor = None
    def __setattr__(self, name, value):
        if name in ("flags_set", "settings"):
            return object.__setattr__(self, name, value)
        allowed = {"profiling_verbosity"}
        if "level" in HAS: allowed |= {"builder_optimization_level", "hardware_compatibility_level",
                                       "plugins_to_serialize"}
        if "monitor" in HAS: allowed |= {"progress_monitor"}
        if name not in allowed:
            raise AttributeError(name)
        log(name, value if isinstance(value, (int, str, list)) else type(value).__name__)
        object.__setattr__(self, name, value)
    def set_flag(self, flag):
        log("set_flag", flag)
        self.flags_set.add(flag)
    def get_flag(self, flag): return flag in self.flags_set
    def set_memory_pool_limit(self, pool, size):
        log("set_memory_pool_limit", pool, size)
        self.settings["workspace"] = size
    def set_tactic_sources(self, sources):
        log("set_tactic_sources", sources)
        self.settings["tactics"] = sources
    def add_optimization_profile(self, profile): return 0
    def create_timing_cache(self, blob):
        log("create_timing_cache", blob.decode())
        return Cache(blob)
    def set_timing_cache(self, cache, ignore_mismatch): return True


class Builder:
    def __init__(self, logger):
        self.error_recorder = None
        if "cuda" in KNOBS:  # as TensorRT 8.5.2.2 does on a GPU whose memory another process holds
            failure = f"CUDA initialization failure with error: {KNOBS['cuda']}. Please check it"
            logger.log(ILogger.Severity.WARNING, failure)
            raise TypeError("pybind11::init(): factory function returned nullptr")
    def create_builder_config(self): return Config()
    def create_network(self, flags):
        log("create_network", flags)
        return Network(flags)
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        if "monitor" in HAS:
            config.progress_monitor.phase_start("Building engine", None, 2)
            config.progress_monitor.step_complete("Building engine", 0)
            config.progress_monitor.phase_finish("Building engine")
        if KNOBS.get("dies"):
            os.kill(os.getpid(), KNOBS["dies"])
        while KNOBS.get("hangs"):
            time.sleep(60)
        need = KNOBS.get("mb", 0)
        need -= 120 if config.settings.get("workspace", 1 << 62) <= 256 << 20 else 0
        need -= 120 if config.settings.get("tactics") == 0 else 0
        need -= 120 if getattr(config, "builder_optimization_level", 3) == 0 else 0
        try:
            held = bytearray(max(0, need) << 20)
        except MemoryError:
            self.error_recorder.report_error(0, "Unexpected exception std::bad_alloc")
            return None
        half = BuilderFlag.FP16 in config.flags_set if hasattr(BuilderFlag, "FP16") else False
        global PLAN_TYPES
        PLAN_TYPES = ["Half" if (half or layer.dtype == DataType.HALF) and not KNOBS.get("ignores_fp16")
                      else "FP32" for layer in network.layers if layer.type == LayerType.CONVOLUTION]
        return b"plan of " + __version__.encode()


class EngineInspector:
    def get_engine_information(self, format):
        return json.dumps({"Layers": [
            {"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": f"Row major {kind} format"}]}
            for kind in PLAN_TYPES]})


class Engine:
    def create_engine_inspector(self): return EngineInspector()


class Runtime:
    def __init__(self, logger): pass
    def deserialize_cuda_engine(self, plan): return Engine()
'''

OLD_FLAGS = "FP16 INT8 TF32 OBEY_PRECISION_CONSTRAINTS"
OLD_TACTICS = "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS"
# As in the Python API of each version; 8.5 from its source, the others from their bindings.
VERSIONS = {
    "8.5.2.2": {
        "HAS": "get_plugin_creator",
        "FLAGS": OLD_FLAGS,
        "NETWORK": "EXPLICIT_BATCH EXPLICIT_PRECISION",
        "TACTICS": OLD_TACTICS,
        "LEVELS": "",
    },
    "8.6.1": {
        "HAS": "get_plugin_creator load_library level",
        "FLAGS": OLD_FLAGS + " VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME",
        "NETWORK": "EXPLICIT_BATCH EXPLICIT_PRECISION",
        "TACTICS": OLD_TACTICS,
        "LEVELS": "NONE AMPERE_PLUS",
    },
    "10.3.0": {
        "HAS": "get_plugin_creator get_creator load_library level monitor",
        "FLAGS": OLD_FLAGS + " VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME STRIP_PLAN",
        "NETWORK": "EXPLICIT_BATCH STRONGLY_TYPED",
        "TACTICS": OLD_TACTICS,
        "LEVELS": "NONE AMPERE_PLUS",
    },
    "11.4.0": {
        "HAS": "get_creator load_library level monitor",
        "FLAGS": "TF32 VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME STRIP_PLAN",
        "NETWORK": "STRONGLY_TYPED",
        "TACTICS": "EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
        "LEVELS": "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY",
    },
}
OLD, NEW = ("8.5.2.2", "8.6.1"), ("10.3.0", "11.4.0")
ORIN = passport.Machine("Linux", "aarch64", "Orin", "8.7", 16, 62000, "540.4.0", "12.6", "R36.4.3")
DYNAMIC = dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, batch=None))


@dataclasses.dataclass
class StandIn:
    """One installed stand-in. knobs: how its builder behaves."""

    monkeypatch: pytest.MonkeyPatch
    log: object

    def knobs(self, **knobs):
        self.monkeypatch.setenv("STAND_IN", json.dumps(knobs))

    def calls(self, name=None):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        calls = [json.loads(line) for line in lines]
        return [call[1:] for call in calls if call[0] == name] if name else calls


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a stand-in as the module ``tensorrt``, for this process and those that it starts."""

    def put(version, machine=None):
        source = STAND_IN.replace("@VERSION@", version)
        for key, value in VERSIONS[version].items():
            source = source.replace(f"@{key}@", value)
        place = tmp_path / "site"
        place.mkdir()
        (place / "tensorrt.py").write_text(source)
        monkeypatch.syspath_prepend(str(place))
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "calls"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        if machine is not None:
            pretend_machine(monkeypatch, machine)
        return StandIn(monkeypatch, tmp_path / "calls")

    yield put
    sys.modules.pop("tensorrt", None)


def passport_of(folder):
    (found,) = passport.passports(folder)
    assert passport.verify(folder, found) is None
    return found


@pytest.mark.parametrize("version", [*OLD, *NEW])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_version_by_the_names_it_has(install, tmp_path, version, precision):
    tensorrt = install(version, ORIN)
    folder = model_folder(tmp_path / "tiny")
    told = []
    engine.build(folder, precision=precision, progress=lambda phase, fraction: told.append(fraction))
    found = passport_of(folder)
    assert (found.runtime_library, found.version, found.precision) == ("tensorrt", version, precision)
    is_old = version in OLD
    is_half = precision == "fp16"
    assert tensorrt.calls("set_flag") == ([["BuilderFlag.FP16"]] if is_old and is_half else [])
    explicit_batch, strongly_typed = (
        1 << 0,
        1 << VERSIONS[version]["NETWORK"].split().index("EXPLICIT_BATCH" if is_old else "STRONGLY_TYPED"),
    )
    assert tensorrt.calls("create_network") == [[explicit_batch if is_old else strongly_typed]]
    read = builder.HALF_PRECISION_MODEL if is_half and not is_old else "heads.onnx"
    assert tensorrt.calls("parse_from_file") == [[read]]
    assert found.layers == {"fp16" if is_half else "fp32": 4}
    assert found.settings["layers_counted_in"] == "engine"
    assert found.settings["strongly_typed"] is not is_old
    assert told[0] == 0 and told[-1] == 1
    assert (0.5 in told) is not is_old, "8.x has no progress monitor"
    assert ("--fp16" in found.trtexec) is (is_old and is_half)
    assert ("--stronglyTyped" in found.trtexec) is (version == "10.3.0")
    assert ("--buildOnly" in found.trtexec) is (version == "8.5.2.2")


@pytest.mark.parametrize("version", VERSIONS)
def test_dynamic_batch_is_a_profile(install, tmp_path, version):
    tensorrt = install(version)
    folder = model_folder(tmp_path / "tiny", DYNAMIC, batch=None)
    engine.build(folder, batch=(1, 2, 4))
    assert tensorrt.calls("set_shape") == [["image", [1, 3, 16, 16], [2, 3, 16, 16], [4, 3, 16, 16]]]
    shapes = "--minShapes=image:1x3x16x16 --optShapes=image:2x3x16x16 --maxShapes=image:4x3x16x16"
    assert shapes in passport_of(folder).trtexec


@pytest.mark.parametrize(
    ("version", "precision", "machine"), [("8.6.1", "fp16", ORIN), ("10.3.0", "fp16", ORIN)]
)
def test_a_builder_that_ignores_half_precision_is_caught(install, tmp_path, version, precision, machine):
    tensorrt = install(version, machine)
    tensorrt.knobs(ignores_fp16=True)
    folder = model_folder(tmp_path / "tiny")
    with pytest.raises(CheckError, match=r"fp16 .* of 4 .*4 are not .*engine"):
        engine.build(folder, precision=precision)
    assert files_in(folder) == ["heads.onnx", "log.jsonl", "spec.json"]
    engine.build(folder, precision="fp32")


def test_the_record_is_written_before_another_build_of_the_model_may_begin(install, tmp_path, monkeypatch):
    """Else that one finds the plan without a record, and writes a second one."""
    install("10.3.0")
    folder = model_folder(tmp_path / "tiny")
    locked = []

    def record(*arguments, **options):
        with (folder / "heads.onnx").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)
        return write_record(*arguments, **options)

    monkeypatch.setattr(stage, "write_record", record)
    engine.build(folder)
    assert locked == [True]


def test_half_precision_that_never_reached_the_network_is_caught(tmp_path, install, monkeypatch):
    """Without a GPU the network is what can be counted."""
    install("11.4.0")
    folder = model_folder(tmp_path / "tiny")
    place = tmp_path / "broken"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import odtrt_lib.engine.half\nodtrt_lib.engine.half.half_precision = lambda model: model\n"
    )
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(CheckError, match=r"of 4 .*4 are not .*network .*\(4 fp32"):
        engine.build(folder, precision="fp16")


def fake_plugin(tmp_path):
    plugin = tmp_path / "libplugin.so"
    plugin.write_bytes(b"\0getCreators\0")
    return plugin


def detector_folder(path):
    """A folder whose detector.onnx has a detector's inputs and outputs, which is all a stand-in looks at."""
    from onnx import TensorProto, helper

    folder = model_folder(path)
    most = SPEC.nms.max_total_detections
    outputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("num_detections", TensorProto.INT32, [1]),
            ("boxes", TensorProto.FLOAT, [1, most, 4]),
            ("scores", TensorProto.FLOAT, [1, most]),
            ("classes", TensorProto.INT32, [1, most]),
        )
    ]
    model = heads_model()
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, folder / "detector.onnx")
    seal(folder)
    return folder


@pytest.mark.parametrize("version", ["8.6.1", *NEW])
def test_the_registry_loads_the_plugin(install, tmp_path, version):
    tensorrt = install(version)
    folder = detector_folder(tmp_path / "tiny")
    engine.build(folder, plugin=fake_plugin(tmp_path), version_compatible=True)
    found = passport_of(folder)
    assert tensorrt.calls("load_library") == [["libplugin.so"]]
    assert tensorrt.calls("plugins_to_serialize") == [[[str(tmp_path / "libplugin.so")]]]
    assert tensorrt.calls("set_flag") == [["BuilderFlag.VERSION_COMPATIBLE"]]
    assert found.plugin is not None and found.plugin.file == "libplugin.so"
    assert "--dynamicPlugins=libplugin.so --versionCompatible --setPluginsToSerialize" in found.trtexec


def test_before_8_6_the_plugin_registers_itself_when_it_is_loaded(install, tmp_path, compiler):
    import subprocess

    install("8.5.2.2")
    folder = detector_folder(tmp_path / "tiny")
    source = tmp_path / "plugin.cpp"
    source.write_text(
        "#include <cstdio>\n#include <cstdlib>\nstruct Registers { Registers() {"
        'std::FILE* file = std::fopen(std::getenv("STAND_IN_LOG"), "a");'
        'std::fputs("[\\"static registration\\"]\\n", file); std::fclose(file); } } registers;\n'
    )
    plugin = tmp_path / "libplugin.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", plugin, source], check=True)
    engine.build(folder, plugin=plugin)
    calls = [json.loads(line)[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls.index("static registration") < calls.index("parse_from_file")
    assert "--plugins=libplugin.so" in passport_of(folder).trtexec


@pytest.mark.parametrize(
    ("version", "asked", "words"),
    [
        ("8.5.2.2", {"version_compatible": True}, "8.5.2.2 makes no version-compatible plans"),
        ("8.5.2.2", {"hardware_compatibility": "ampere_plus"}, "level ampere_plus"),
        ("10.3.0", {"hardware_compatibility": "same_compute_capability"}, "level same_compute_capability"),
        ("11.4.0", {"compute_capabilities": ["8.6"]}, "this machine only"),
    ],
)
def test_what_a_version_cannot_do_is_said(install, tmp_path, version, asked, words):
    install(version)
    folder = model_folder(tmp_path / "tiny")
    with pytest.raises(UnsupportedError, match=words) as caught:
        engine.build(folder, **asked)
    assert "\n" not in str(caught.value)
    assert files_in(folder) == ["heads.onnx", "log.jsonl", "spec.json"]


def test_hardware_compatibility_where_it_is_known(install, tmp_path):
    tensorrt = install("11.4.0")
    folder = model_folder(tmp_path / "tiny")
    engine.build(folder, hardware_compatibility="same_compute_capability")
    level = "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"
    assert tensorrt.calls("hardware_compatibility_level") == [[level]]
    assert "--hardwareCompatibilityLevel=sameComputeCapability" in passport_of(folder).trtexec


@pytest.mark.parametrize("version", VERSIONS)
def test_an_onnx_with_q_and_dq_builds_as_it_is(install, tmp_path, version):
    tensorrt = install(version)
    folder = model_folder(tmp_path / "tiny")
    model = onnx.load(folder / "heads.onnx")
    model.graph.node.add(op_type="QuantizeLinear", input=["x1"], output=["q"])
    onnx.save(model, folder / "heads.onnx")
    seal(folder)
    engine.build(folder)
    assert tensorrt.calls("set_flag") == ([["BuilderFlag.INT8"]] if version in OLD else [])
    (folder / "heads.onnx").rename(folder / "heads_int8.onnx")
    seal(folder)
    with contextlib.suppress(CheckError):  # the stand-in's layers have no INT8
        engine.build(folder, precision="int8")
    both = [["BuilderFlag.FP16"], ["BuilderFlag.INT8"]]  # else what has no pair would run in single precision
    assert tensorrt.calls("set_flag")[1:] == (both if version in OLD else [])


NAMES = Path(__file__).resolve().parent.parent / "results" / "tensorrt_names.json"
FEATURES = {
    "load_library": ("IPluginRegistry", "load_library"),
    "get_creator": ("IPluginRegistry", "get_creator"),
    "get_plugin_creator": ("IPluginRegistry", "get_plugin_creator"),
    "level": ("IBuilderConfig", "builder_optimization_level"),
    "monitor": ("IBuilderConfig", "progress_monitor"),
}
ENUMERATIONS = {
    "FLAGS": "BuilderFlag",
    "NETWORK": "NetworkDefinitionCreationFlag",
    "TACTICS": "TacticSource",
    "LEVELS": "HardwareCompatibilityLevel",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_ins_have_the_names_of_the_real_bindings(version):
    rows = [row for row in json.loads(NAMES.read_text())["rows"] if row.get("runtime_library") == "tensorrt"]
    order = [row["version"] for row in rows if "version" in row]
    at = next(i for i, real in enumerate(order) if real.startswith(version))

    def real_names(kind):
        return {
            name
            for row in rows
            if row.get("class") == kind and order.index(row["since"]) <= at <= order.index(row["until"])
            for name in row["members"].split()
        }

    for key, kind in ENUMERATIONS.items():
        assert set(VERSIONS[version][key].split()) <= real_names(kind), kind
    for feature, (kind, name) in FEATURES.items():
        assert (feature in VERSIONS[version]["HAS"].split()) is (name in real_names(kind)), feature
    for flag in ("FP16", "VERSION_COMPATIBLE"):
        has = flag in VERSIONS[version]["FLAGS"].split()
        assert has is (flag in real_names("BuilderFlag")), flag
    typed = "STRONGLY_TYPED" in VERSIONS[version]["NETWORK"].split()
    assert typed is ("STRONGLY_TYPED" in real_names("NetworkDefinitionCreationFlag"))


# ---- The fallback, under real limits ----------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_the_ladder_is_climbed_until_the_build_fits(install, tmp_path, version):
    """The stand-in really takes the memory: 500 MiB, and 120 less for each setting that this version has."""
    tensorrt = install(version)
    folder = model_folder(tmp_path / "tiny")
    tensorrt.knobs(mb=500)
    limit = 400 if version == "8.5.2.2" else 300
    engine.build(folder, memory=f"{limit}MiB")
    found = passport_of(folder)
    names = [attempt["name"] for attempt in found.attempts]
    expected = ["as asked", "small workspace", "no library tactics", "lowest optimisation level"]
    assert names == expected[: 3 if version == "8.5.2.2" else 4]
    *failed, last = found.attempts
    assert all(attempt["outcome"].startswith("out of memory: ") for attempt in failed)
    assert last["outcome"] == "built" and last["peak_rss_mb"] <= limit
    assert found.settings["fallback_step"] == names[-1]
    assert tensorrt.calls("set_tactic_sources")[-1] == [0]
    assert all(len(attempt["samples"]) <= 200 for attempt in found.attempts)
    assert engine.build(folder).is_up_to_date, "these steps leave the plan's meaning as it was"


def test_a_kill_is_reported_as_one_and_does_not_end_this_process(install, tmp_path):
    tensorrt = install("8.5.2.2")
    tensorrt.knobs(dies=signal.SIGKILL)
    folder = model_folder(tmp_path / "tiny")
    with pytest.raises(BuildError) as caught:
        engine.build(folder)
    message = str(caught.value)
    assert "\n" not in message
    reason = "killed by signal 9: the kernel's out-of-memory killer or the memory limit"
    for step in ("as asked", "small workspace", "no library tactics", "frugal heap"):
        assert f"{step}: {reason} (peak " in message
    assert "lowest optimisation level" not in message, "8.5 has none"
    assert "--allow fp32" in message
    assert len(tensorrt.calls("create_network")) == 4
    assert files_in(folder) == ["heads.onnx", "log.jsonl", "spec.json"]


def test_a_crash_is_not_taken_for_a_lack_of_memory(install, tmp_path):
    tensorrt = install("10.3.0")
    tensorrt.knobs(dies=signal.SIGSEGV)
    folder = model_folder(tmp_path / "tiny")
    with pytest.raises(BuildError, match=r"signal 11 \(SIGSEGV\)"):
        engine.build(folder)
    assert len(tensorrt.calls("create_network")) == 1


@pytest.mark.parametrize(
    ("number", "reason"), [(2, "CUDA error 2: out of memory"), (100, "CUDA error 100: no GPU")]
)
def test_a_gpu_that_cannot_be_used_is_said(install, tmp_path, number, reason):
    install("8.5.2.2").knobs(cuda=number)
    folder = model_folder(tmp_path / "tiny")
    with pytest.raises(BuildError, match=reason) as caught:
        engine.build(folder)
    assert "\n" not in str(caught.value) and "TypeError" not in str(caught.value)
    assert str(caught.value).count(reason) == 1
    assert files_in(folder) == ["heads.onnx", "log.jsonl", "spec.json"]


def test_a_build_that_hangs_at_its_limit_is_ended(install, tmp_path, monkeypatch):
    tensorrt = install("8.5.2.2")
    tensorrt.knobs(hangs=True)
    monkeypatch.setattr(watch, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(fallback, "FALLBACK", engine.FALLBACK[:1])
    with pytest.raises(BuildError, match=r"as asked: hung"):
        engine.build(model_folder(tmp_path / "tiny"), memory="1GiB")


def test_ctrl_c_while_the_builder_starts_ends_it_too(install, tmp_path, interrupted_starts):
    install("10.3.0").knobs(hangs=True)
    with pytest.raises(KeyboardInterrupt):
        engine.build(model_folder(tmp_path / "tiny"))
    assert [process.returncode for process in interrupted_starts] == [-signal.SIGKILL]


def test_nothing_is_given_up_unasked(install, tmp_path):
    tensorrt = install("10.3.0")
    tensorrt.knobs(dies=signal.SIGKILL)
    folder = model_folder(tmp_path / "tiny", DYNAMIC, batch=None)
    with pytest.raises(BuildError, match="memory") as caught:
        engine.build(folder)
    assert "static batch:" not in str(caught.value) and "half precision:" not in str(caught.value)
    with pytest.raises(BuildError, match=r"static batch: .*half precision: "):
        engine.build(folder, allow=("dynamic_batch", "fp32"))
    assert [call[1] for call in tensorrt.calls("set_shape")][-1] == [1, 3, 16, 16]


def test_what_may_be_given_up_is_given_up_last_and_said(install, tmp_path):
    """The stand-in takes 200 MiB more for a dynamic batch."""
    tensorrt = install("11.4.0")
    tensorrt.knobs(mb=560)
    folder = model_folder(tmp_path / "tiny", DYNAMIC, batch=None)
    asked = {"memory": "300MiB", "allow": ("fp32", "dynamic_batch"), "batch": (1, 4, 8)}
    record = engine.build(folder, **asked).record
    found = passport_of(folder)
    assert [attempt["name"] for attempt in found.attempts][-1] == "static batch"
    assert found.precision == "fp32", "no more was given up than had to be"
    assert record["settings"]["batch_min_opt_max"] == [4, 4, 4]
    assert found.settings["asked"] != found.fingerprint, "it is another plan than the one asked for"
    assert engine.build(folder, **asked).is_up_to_date
    tensorrt.knobs()
    assert not engine.build(folder, batch=(1, 4, 8)).is_up_to_date, "and not taken for that"


# ---- The timing cache -------------------------------------------------------------------------------------


def test_the_timing_cache_is_kept_for_the_next_build(install, tmp_path):
    tensorrt = install("10.3.0", ORIN)
    folder = model_folder(tmp_path / "tiny")
    notes = [
        engine.build(folder, force=True).record["settings"]["timing_cache"].split(",")[0] for _ in range(2)
    ]
    assert notes == ["new", "used"]
    assert tensorrt.calls("create_timing_cache") == [[""], ["timings of 10.3.0"]]
    (file,) = (tmp_path / "cache").rglob("*.cache")
    assert file.name == "tensorrt-10.3.0-Orin.cache"


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_timing_cache_is_ignored_and_said(install, tmp_path, damage):
    tensorrt = install("10.3.0", ORIN)
    folder = model_folder(tmp_path / "tiny")
    engine.build(folder)
    (file,) = (tmp_path / "cache").rglob("*.cache")
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + b"?" if damage is None else damage)
    record = engine.build(folder, force=True).record
    assert "damaged" in record["settings"]["timing_cache"]
    assert tensorrt.calls("create_timing_cache") == [[""], [""]], "TensorRT never saw it"
    assert file.read_bytes() == intact


def test_two_builds_at_once_keep_each_others_timings(install, tmp_path):
    """What another build stores while this one runs is combined with its own, not overwritten."""
    tensorrt = install("10.3.0", ORIN)
    file = engine.timing_cache_file({"runtime_library": "tensorrt", "version": "10.3.0"}, ORIN)
    file.parent.mkdir(parents=True)
    with contextlib.ExitStack() as other_build:
        other_build.enter_context(exclusive(file.parent))  # this build has to wait with its own

        def other_build_ends(phase, fraction):
            if phase == "Building engine" and not file.exists():
                builder.write_cache_file(file, b"timings of another build")
                other_build.close()

        engine.build(model_folder(tmp_path / "tiny"), progress=other_build_ends)
    assert tensorrt.calls("combine") == [["timings of another build"]]
    assert file.read_bytes().endswith(b"timings of 10.3.0")


def test_a_cache_folder_that_cannot_be_written_is_said(install, tmp_path, monkeypatch):
    install("10.3.0", ORIN)
    (tmp_path / "cache").write_text("a file, not a folder")
    record = engine.build(model_folder(tmp_path / "tiny")).record
    assert "not stored (" in record["settings"]["timing_cache"]


# ---- What needs no TensorRT -------------------------------------------------------------------------------


def test_weights_are_counted_as_onnx_counts_them(tmp_path):
    model = heads_model()
    onnx.save(model, tmp_path / "model.onnx")
    expected = {}
    for tensor in model.graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        expected[name] = expected.get(name, 0) + int(np.prod(tensor.dims))
    assert builder.weights_by_type(tmp_path / "model.onnx") == expected


def test_no_cut_of_a_model_confuses_the_counting(tmp_path):
    data = heads_model().SerializeToString()
    path = tmp_path / "model.onnx"
    for length in [*range(0, 200), *range(200, len(data) - 1, 40_001), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="not an ONNX model"):
            builder.weights_by_type(path)


@pytest.mark.parametrize(
    ("text", "expected"), [("1500MiB", 1500 << 20), ("2GiB", 2 << 30), (" 1.5 GiB ", 3 << 29)]
)
def test_memory_limits(text, expected):
    assert engine.parse_memory(text) == expected


def test_a_share_of_what_is_free():
    half, whole = engine.parse_memory("50%"), engine.parse_memory("100%")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < half < whole <= total
    assert half == pytest.approx(whole / 2, rel=0.2)


@pytest.mark.parametrize("text", ["", "2", "2TB", "-1GiB", "0%", "101%", "lots", "10MiB", "1e3MiB"])
def test_other_limits_are_refused(tmp_path, text):
    with pytest.raises(InputError, match="memory ") as caught:
        engine.build(model_folder(tmp_path / "tiny"), memory=text)
    assert "\n" not in str(caught.value)


def test_the_peak_of_a_child_is_its_own():
    """getrusage would give a small child of this process this process's memory."""
    import subprocess

    held = np.ones(400 << 17)  # 400 MiB
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"x")
    process.stdin.flush()
    process.stdout.read(1)
    peak = builder.peak_rss_mb(process.pid)
    process.communicate()
    assert 0 < peak < 50 < held.nbytes >> 20


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Half NC/8HW8", "fp16"),
        ("Float", "fp32"),
        ("Channel major INT8 format where channel % 32 == 0", "int8"),
        ("N/A due to dynamic shapes", "other"),
    ],
)
def test_the_inspectors_words_for_a_type(kind, expected):
    layer = {"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": kind}]}
    assert builder.count_inspected(json.dumps({"Layers": [layer]})) == ({expected: 1}, {expected: 1})


def test_an_inspector_that_gives_names_only_proves_nothing():
    assert builder.count_inspected(json.dumps({"Layers": ["conv1", "conv2"]})) == ({}, {})
