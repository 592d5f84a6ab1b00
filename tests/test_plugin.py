"""The TensorRT plugin in NVIDIA's plugin registries, parser and builder, and driven through its interface.

The plugin can only be compiled with TensorRT's headers, which no package brings. Without them everything that
needs the library is skipped and says so; what was found with them is in results/plugin_matrix.json.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odtrt_lib import fuse
from odtrt_lib.tensors import has_clip_windows

ROOT = Path(__file__).resolve().parent.parent

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_graphsurgeon")
import plugin_cases  # noqa: E402
import plugin_matrix  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

BUILT = ROOT / "plugins" / "build" / "libodtrt_tensorrt.so"
MATRIX = ROOT / "results" / "plugin_matrix.json"
HEADERS = ("8.5", "8.6", "10.0", "10.3", "10.13", "10.16", "11.1")

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="no TensorRT-RTX: run `pip install -e '.[engine]'`",
)


@pytest.fixture(scope="session")
def plugin() -> Path:
    """libodtrt_tensorrt.so, for TensorRT 10 and newer."""
    path = Path(os.environ.get("ODTRT_TENSORRT_PLUGIN", BUILT))
    if not path.is_file():
        pytest.skip(
            f"no plugin at {path}: it needs nvcc and TensorRT's headers; run `make plugin ARCH=all` with "
            "TENSORRT_INCLUDE_DIR set"
        )
    return path


@pytest.fixture(scope="session")
def driver(plugin, tmp_path_factory) -> Path:
    """plugins/tensorrt/drive, compiled."""
    headers = os.environ.get("TENSORRT_INCLUDE_DIR")
    if headers is None:
        pytest.skip("the driver is compiled with TensorRT's headers: set TENSORRT_INCLUDE_DIR")
    path = tmp_path_factory.mktemp("drive") / "drive"
    cuda = plugin_matrix.cuda_folder()
    subprocess.run(
        [
            *(os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"),
            *("-isystem", headers, "-isystem", str(cuda / "include")),
            *(str(ROOT / "plugins" / "tensorrt" / "drive" / "drive.cpp"), "-o", str(path)),
            *(f"-L{cuda / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-pthread"),
        ],
        check=True,
    )
    return path


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cases")
    for seed, case in enumerate(plugin_cases.CASES):
        plugin_cases.write_case(folder / case.name, case, seed)
    return {case.name: folder / case.name for case in plugin_cases.CASES}


def drive(driver: Path, plugin: Path, case: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(driver), str(plugin), str(case), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


# ---- The library ------------------------------------------------------------------------------------------


def test_it_exports_what_a_registry_looks_for_and_nothing_else(plugin):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    assert plugin_matrix.exported_functions(plugin) == ["getCreators", "setLoggerFinder"]


def test_it_is_not_linked_to_tensorrt_or_cuda(plugin):
    """One file then serves every TensorRT since 10, and loads on a machine without a GPU."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    needed = plugin_matrix.needed_libraries(plugin)
    assert needed, "readelf found no library at all"
    assert not [name for name in needed if "nvinfer" in name or "cuda" in name]


@pytest.mark.parametrize("case", [case.name for case in plugin_cases.CASES])
def test_every_step_but_the_gpus(plugin, driver, cases, case):
    answer = drive(driver, plugin, cases[case], "--host")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "all checks passed" in answer.stdout
    complaints = [line for line in answer.stderr.splitlines() if line]
    assert len(complaints) == 20, "one line for each of the driver's 20 wrong requests"
    assert all(line.startswith("OdtrtDetect: ") for line in complaints)


def test_the_driver_finds_a_library_that_is_no_plugin(driver, cases):
    library = ROOT / "plugins" / "build" / "libodtrt.so"
    if not library.is_file():
        pytest.skip("libodtrt.so is not built: run `make plugin`")
    answer = drive(driver, library, cases["ssd"], "--host")
    assert answer.returncode == 1
    assert "FAIL  the library exports getCreators" in answer.stdout


FAKE_TENSORRT = r"""
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <string>
using namespace nvinfer1;
std::string said;
struct Log : ILogger {
  void log(Severity severity, AsciiChar const *message) noexcept override {
    said += std::to_string(static_cast<int>(severity)) + " " + message;
  }
} logger;
struct Finder : ILoggerFinder {
  ILogger *findLogger() override { return &logger; }
} finder;
extern "C" int32_t getInferLibVersion() noexcept {
  return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}
extern "C" const char *complaint(const char *path) {
  void *plugin = dlopen(path, RTLD_NOW);
  auto find = reinterpret_cast<void (*)(ILoggerFinder *)>(dlsym(plugin, "setLoggerFinder"));
  auto get = reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(dlsym(plugin, "getCreators"));
  find(&finder);
  int32_t count = 0;
  static_cast<IPluginCreatorV3One *>(get(count)[0])->createPlugin("detect", nullptr, TensorRTPhase::kBUILD);
  find(nullptr);
  return said.c_str();
}
"""


def test_messages_reach_the_logger_of_the_tensorrt_that_calls(plugin, tmp_path):
    """TensorRT 11 moved findLogger and log in their tables of virtual functions; one library serves all."""
    headers = os.environ.get("TENSORRT_INCLUDE_DIR")
    if headers is None:
        pytest.skip("a stand-in for TensorRT is compiled with its headers: set TENSORRT_INCLUDE_DIR")
    (tmp_path / "fake.cpp").write_text(FAKE_TENSORRT)
    include = ["-isystem", headers, "-isystem", str(plugin_matrix.cuda_folder() / "include")]
    library = tmp_path / "libnvinfer.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-shared", "-fPIC", *include]
    subprocess.run([*command, str(tmp_path / "fake.cpp"), "-o", str(library), "-ldl"], check=True)
    ask = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); "
        "library.complaint.restype = ctypes.c_char_p; "
        "print(library.complaint(sys.argv[2].encode()).decode())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", ask, str(library), str(plugin)], capture_output=True, text=True
    )
    assert answer.stdout.startswith("1 OdtrtDetect: attribute background_column is missing")
    assert answer.stderr == ""


# ---- On a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case.name for case in plugin_cases.CASES])
def test_enqueue_and_a_replayed_cuda_graph_give_the_references_bits(plugin, driver, cases, case):
    _require_gpu()
    answer = drive(driver, plugin, cases[case])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for way in ("enqueue", "CUDA graph"):
        assert answer.stdout.count(f"{way}, inputs") == plugin_cases.SETS


@pytest.mark.gpu
def test_one_wrong_bit_is_caught(plugin, driver, cases, tmp_path):
    _require_gpu()
    spoilt = bytearray(cases["agnostic"].read_bytes())
    spoilt[-1] ^= 1
    (tmp_path / "case").write_bytes(spoilt)
    answer = drive(driver, plugin, tmp_path / "case")
    assert answer.returncode == 1
    assert "different: classes (1 values)" in answer.stdout


def _require_gpu() -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no NVIDIA GPU on this machine")


# ---- Plugin registries ------------------------------------------------------------------------------------


def registries() -> list[tuple[str, ...]]:
    """The TensorRT modules of this machine, and where they are imported from."""
    found: list[tuple[str, ...]] = [
        (module,)
        for module in ("tensorrt", "tensorrt_rtx", "tensorrt_lean_bindings")
        if importlib.util.find_spec(module) is not None
    ]
    lean = os.environ.get("ODTRT_TENSORRT_LEAN")
    return found + [("tensorrt_lean_bindings", site) for site in (lean.split(os.pathsep) if lean else [])]


@pytest.mark.skipif(not registries(), reason="no TensorRT module, and ODTRT_TENSORRT_LEAN is not set")
@pytest.mark.parametrize("where", registries(), ids=lambda where: Path(where[-1]).name)
def test_a_real_registry_takes_it(plugin, where):
    found = plugin_matrix.probe("registry", where[0], str(plugin), *where[1:])
    assert found["loads"] and found["creator_found"] and found["plugin_made"]
    assert found["fields"] == sorted(fuse.plugin_attributes(plugin_matrix.small_spec()))
    assert found["refused_without_an_attribute"]
    assert found["taken_out"]


# ---- TensorRT-RTX's parser and builder --------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", ["1", "dynamic", "dynamic, clip_windows"])
def test_detector_onnx_becomes_a_plan(plugin, detectors, precision, batch):
    found = plugin_matrix.probe("build", str(plugin), str(detectors["small", precision, batch]))
    assert found["messages"] == []
    assert found["builds"] and found["plugin_in_plan"]
    heads = "FLOAT" if precision == "fp32" else "HALF"
    assert found["plugin_inputs"][:3] == [heads, heads, "FLOAT"]
    size = 1 if batch == "1" else -1
    assert found["outputs"] == {
        "num_detections": [size],
        "boxes": [size, 40, 4],
        "scores": [size, 40],
        "classes": [size, 40],
    }


@pytest.fixture(scope="session")
def detectors(tmp_path_factory) -> dict[tuple[str, str, str], Path]:
    return plugin_matrix.detectors(tmp_path_factory.mktemp("detectors"), [])


def drop_attribute(model: Any) -> None:
    node = model.graph.node[-1]
    kept = [attribute for attribute in node.attribute if attribute.name != "iou_threshold"]
    del node.attribute[:]
    node.attribute.extend(kept)


def too_many_detections(model: Any) -> None:
    for attribute in model.graph.node[-1].attribute:
        if attribute.name == "max_total_detections":
            attribute.i = 5000


def one_anchor_less(model: Any) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "anchors":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[1:], "anchors"))


def real_score_converter(model: Any) -> None:
    drop = next(a for a in model.graph.node[-1].attribute if a.name == "score_converter")
    drop.CopyFrom(helper.make_attribute("score_converter", 0.0))


def half_anchors(model: Any) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "anchors":
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, "anchors"))


@needs_rtx
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_attribute, "OdtrtDetect: attribute iou_threshold is missing"),
        (too_many_detections, "OdtrtDetect: attribute max_total_detections is 5000, expected 1 to 4096"),
        (
            real_score_converter,
            "OdtrtDetect: attribute score_converter has field type 1 and length 1, expected",
        ),
        (one_anchor_less, "OdtrtDetect: input anchors has shape [255, 4], expected [N, 4]"),
        (half_anchors, ""),  # refused before it is asked: no format that it supports
    ],
)
def test_a_wrong_model_is_refused_with_the_plugins_reason(plugin, detectors, tmp_path, spoil, message):
    """And the reason is in TensorRT's own log, not on stderr."""
    model = onnx.load(detectors["small", "fp32", "1"])
    spoil(model)
    onnx.save(model, tmp_path / "detector.onnx")
    found = plugin_matrix.probe("build", str(plugin), str(tmp_path / "detector.onnx"))
    assert "died" not in found
    assert not found["builds"]
    ours = [line for line in found["messages"] if line.startswith("OdtrtDetect: ")]
    assert bool(ours) == bool(message)
    assert all(line.startswith(message) and "\n" not in line for line in ours)


@needs_rtx
def test_too_late_to_let_tensorrt_rtx_find_itself():
    """TensorRT-RTX would end the process at the plugin's node; an error comes first."""
    code = "import tensorrt_rtx; from odtrt_lib.engine import bindings; bindings.let_rtx_find_itself()"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "MissingDependencyError: tensorrt_rtx is imported already" in answer.stderr


@needs_rtx
def test_the_form_without_a_plugin_is_refused_by_tensorrt_rtx(plugin, tmp_path):
    """The limit that odtrt_lib.fuse states."""
    spec = plugin_matrix.small_spec()
    anchors = plugin_matrix.small_anchors(spec)
    onnx.save(fuse.with_onnx_nms(plugin_matrix.small_heads(spec), spec, anchors), tmp_path / "detector.onnx")
    found = plugin_matrix.probe("build", str(plugin), str(tmp_path / "detector.onnx"))
    assert not found["builds"]


# ---- What was found with the headers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(MATRIX.read_text())["rows"]
    return rows


def test_every_version_compiles_and_links(matrix):
    rows = {row["headers"]: row for row in matrix if row["check"] == "compile"}
    assert set(HEADERS) <= set(rows)
    for name, row in rows.items():
        assert row["compiles"] and row["links"] and row["warnings"] == 0, name
        assert not row["links_to_libnvinfer"], name
        is_v3 = int(name.split(".")[0]) >= 10
        assert row["interface"] == ("IPluginV3" if is_v3 else "IPluginV2DynamicExt")
        expected = {True: "getCreators setLoggerFinder", False: "getPluginCreators setLoggerFinder"}[is_v3]
        assert row["exports"] == ("" if name == "8.5" else expected)


def test_one_library_serves_every_registry(matrix):
    rows = [row for row in matrix if row["check"] == "registry"]
    for built_with in ("10.0", "11.1"):
        served = {row["version"] for row in rows if row["built_with"] == built_with and row["plugin_made"]}
        for version in ("10.15", "10.16", "11.", "1.7.1"):
            assert any(name.startswith(version) for name in served), (built_with, version)
    assert all(row["loads"] and row["refused_without_an_attribute"] and row["taken_out"] for row in rows)


def test_plans_were_built(matrix):
    rows = [row for row in matrix if row["check"] == "build"]
    assert {(row["precision"], row["batch"]) for row in rows} >= {
        (precision, batch) for precision in ("fp32", "fp16") for batch in ("1", "dynamic")
    }
    shipped = [row for row in rows if row["network"] != "small"]
    for built_with in ("10.0", "11.1"):
        assert {(row["precision"], row["batch"]) for row in shipped if row["built_with"] == built_with} == {
            (precision, batch) for precision in ("fp32", "fp16") for batch in ("1", "dynamic")
        }
    assert all(row["builds"] and row["plugin_in_plan"] and row["messages"] == 0 for row in rows)


def test_the_readmes_tables_are_the_recorded_ones(matrix):
    readme = (ROOT / "plugins" / "README.md").read_text()
    assert plugin_matrix.tables(matrix) in readme
    spoilt = [dict(row) for row in matrix]
    spoilt[0]["warnings"] = 3
    assert plugin_matrix.tables(spoilt) not in readme, "a changed figure is noticed"


def test_the_cases_cover_what_the_plugin_takes():
    """Both types, both kinds of window, every score converter that has a case, batches of one and more."""
    specs = [case.spec for case in plugin_cases.CASES]
    assert {case.dtype for case in plugin_cases.CASES} == {np.float16, np.float32}
    assert {has_clip_windows(spec) for spec in specs} == {False, True}
    assert {spec.nms.class_agnostic for spec in specs} == {False, True}
    assert {spec.heads.background_column for spec in specs} == {False, True}
    assert {spec.heads.scores.converter for spec in specs} >= {"sigmoid", "softmax"}
    assert 1 in {spec.input.batch for spec in specs} and len({spec.input.batch for spec in specs}) > 2
    assert len({dataclasses.astuple(spec.heads.box_coder) for spec in specs}) > 1
