"""Libraries compiled on a workstation for a board: packed, looked at on the device, used or not."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import aarch64
import numpy as np
import pytest

from odtrt_lib.boards import JETPACKS, TARGETS, tensorrt_line
from odtrt_lib.bundle import install, prebuilt
from odtrt_lib.errors import InputError
from odtrt_lib.folder import sha256
from odtrt_lib.machine import Machine, this_machine

ROOT = Path(__file__).resolve().parent.parent
TENSORRT = ("tensorrt", "10.3.0")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "cross_compile.py"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A shared library of this machine."""
    path = tmp_path_factory.mktemp("library") / "a.so"
    source = path.with_suffix(".cpp")
    source.write_text("int one() { return 1; }\n")
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return path


ORIN = Machine("Linux", this_machine().architecture, "Orin", "8.7", 16, 61368, "580.0", "13.2", "R39.2.0")


def compiled(plugins, library, **changes):
    """plugins/ with sources, and with stand-ins of this machine for what was compiled for an Orin."""
    (plugins / "kernels").mkdir(parents=True)
    (plugins / "CMakeLists.txt").write_text("project(x)\n")
    (plugins / "kernels" / "nms.cu").write_text("kernel\n")
    build = plugins / "build-jetson-orin"
    build.mkdir()
    for name in prebuilt.LIBRARIES:
        shutil.copyfile(library, build / name)
    described = prebuilt.Prebuilt(
        target="jetson-orin",
        architecture=this_machine().architecture,
        gpu="87",
        cuda="13.0",
        tensorrt="10.3",
        sources_sha256=prebuilt.sources_sha256(plugins),
        libraries={name: sha256(library) for name in prebuilt.LIBRARIES},
    )
    described = dataclasses.replace(described, **changes)
    (build / prebuilt.DESCRIPTION).write_text(described.to_json())
    return plugins


def carried(tmp_path, library, **changes):
    """An unpacked bundle, as far as these libraries go."""
    files = prebuilt.prebuilt_files(
        compiled(tmp_path / "plugins", library, **changes), "jetson-orin", needs_plugin=False
    )
    for name, source in files.items():
        target = tmp_path / "unpacked" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return tmp_path / "unpacked"


def test_what_fits_is_put_where_the_compiler_would_put_it(tmp_path, library):
    folder = carried(tmp_path, library)
    taken, reason = prebuilt.use_prebuilt(folder, ORIN, TENSORRT)
    assert reason is None
    assert taken == {name: folder / "plugins" / "build" / name for name in prebuilt.LIBRARIES}
    assert all(path.read_bytes() == library.read_bytes() for path in taken.values())


def test_a_plugin_that_was_compiled_here_before_does_not_stay_beside_another_library(tmp_path, library):
    folder = carried(tmp_path, library, tensorrt=None, libraries={"libodtrt.so": sha256(library)})
    (folder / "plugins" / "build").mkdir(parents=True)
    (folder / "plugins" / "build" / "libodtrt_tensorrt.so").write_bytes(b"of the compiler")
    taken, _ = prebuilt.use_prebuilt(folder, ORIN, TENSORRT)
    assert list(taken) == ["libodtrt.so"]
    assert [path.name for path in (folder / "plugins" / "build").iterdir()] == ["libodtrt.so"]


MISFITS = {
    "another processor": ({"architecture": "s390x"}, {}, TENSORRT, "compiled for s390x, and this machine is"),
    "no GPU": ({}, {"gpu": None, "compute_capability": None}, TENSORRT, "no NVIDIA GPU is found here"),
    "another GPU": ({}, {"compute_capability": "7.2"}, TENSORRT, "compiled for sm_87, and this GPU is sm_72"),
    "an older driver": ({}, {"cuda": "12.6"}, TENSORRT, "with CUDA 13.0, and this driver supports CUDA 12.6"),
    "an older TensorRT": ({}, {}, ("tensorrt", "8.5.2.2"), "TensorRT 10.3, and here is tensorrt 8.5.2.2"),
    "another 8": ({"tensorrt": "8.6"}, {}, ("tensorrt", "8.5.2.2"), "TensorRT 8.6, and here is tensorrt 8.5"),
    "a newer TensorRT": ({"tensorrt": "8.6"}, {}, TENSORRT, "TensorRT 8.6, and here is tensorrt 10.3.0"),
    "RTX": (
        {"tensorrt": "8.6"},
        {},
        ("tensorrt_rtx", "1.7.1"),
        "TensorRT 8.6, and here is tensorrt_rtx 1.7.1",
    ),
}


@pytest.mark.parametrize(("described", "machine", "tensorrt", "reason"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_not_used_and_the_reason_is_said(
    tmp_path, library, described, machine, tensorrt, reason
):
    folder = carried(tmp_path, library, **described)
    taken, said = prebuilt.use_prebuilt(folder, dataclasses.replace(ORIN, **machine), tensorrt)
    assert taken is None and reason in said
    assert not (folder / "plugins").exists()


@pytest.mark.parametrize("tensorrt", [("tensorrt", "11.4.0"), ("tensorrt_rtx", "1.7.1.116"), None])
def test_a_plugin_of_tensorrt_10_serves_what_came_later(tmp_path, library, tensorrt):
    taken, reason = prebuilt.use_prebuilt(carried(tmp_path, library), ORIN, tensorrt)
    assert taken and reason is None


def test_a_library_that_the_loader_refuses_is_not_used(tmp_path, library):
    broken = tmp_path / "broken.so"
    broken.write_bytes(library.read_bytes()[:100])
    taken, reason = prebuilt.use_prebuilt(carried(tmp_path, broken), ORIN, TENSORRT)
    assert taken is None and reason.startswith("libodtrt.so cannot be loaded here: ") and "\n" not in reason


def test_build_here_compiles_where_they_do_not_fit_and_only_there(tmp_path, library, monkeypatch):
    folder, said = carried(tmp_path, library), []
    monkeypatch.setattr(install, "_compile", lambda folder, say: ("compiled", None))
    monkeypatch.setattr(install, "_tensorrt_version", lambda: TENSORRT)
    monkeypatch.setattr(install, "this_machine", lambda: ORIN)
    build = folder / "plugins" / "build"
    assert install._libraries(folder, said.append) == tuple(build / name for name in prebuilt.LIBRARIES)
    monkeypatch.setattr(install, "this_machine", lambda: dataclasses.replace(ORIN, cuda="11.4"))
    assert install._libraries(folder, said.append) == ("compiled", None)
    assert said == [
        "prebuilt/: libodtrt.so and libodtrt_tensorrt.so fit this device; nothing is compiled",
        "prebuilt/ is not used: compiled with CUDA 13.0, and this driver supports CUDA 11.4",
    ]
    shutil.rmtree(folder / "prebuilt")
    assert install._libraries(folder, said.append) == ("compiled", None) and len(said) == 2


def test_the_tensorrt_that_a_build_takes_is_asked_in_another_process():
    pytest.importorskip("tensorrt_rtx")
    import tensorrt_rtx

    module, version = install._tensorrt_version()
    assert module in ("tensorrt", "tensorrt_rtx")
    assert module == "tensorrt" or version == tensorrt_rtx.__version__


def test_what_is_packed_is_what_was_compiled_from_these_sources(tmp_path, library):
    plugins = compiled(tmp_path / "plugins", library)
    build = plugins / "build-jetson-orin"
    files = prebuilt.prebuilt_files(plugins, "jetson-orin", needs_plugin=True)
    assert files == {
        f"prebuilt/{name}": build / name for name in ("target.json", "libodtrt.so", "libodtrt_tensorrt.so")
    }

    def refused(target="jetson-orin", needs_plugin=True):
        with pytest.raises(InputError) as caught:
            prebuilt.prebuilt_files(plugins, target, needs_plugin)
        return str(caught.value)

    assert "target 'jetson-nano': expected jetson-xavier, jetson-orin, jetson-thor" in refused("jetson-nano")
    assert "nothing is compiled for jetson-thor; run `make plugin TARGET=jetson-thor" in refused(
        "jetson-thor"
    )
    (build / "libodtrt.so").write_bytes(b"another")
    assert "libodtrt.so: not the file that was compiled" in refused()
    shutil.copyfile(library, build / "libodtrt.so")
    (plugins / "kernels" / "nms.cu").write_text("changed\n")
    assert "compiled from other sources" in refused()
    (build / prebuilt.DESCRIPTION).write_text("{}")
    assert "not what `make plugin TARGET=...` wrote" in refused()


def test_a_fused_model_wants_the_plugin_too(tmp_path, library):
    one = {"libodtrt.so": sha256(library)}
    plugins = compiled(tmp_path / "plugins", library, tensorrt=None, libraries=one)
    assert len(prebuilt.prebuilt_files(plugins, "jetson-orin", needs_plugin=False)) == 2
    with pytest.raises(InputError, match="compiled without TensorRT's headers, so without the plugin"):
        prebuilt.prebuilt_files(plugins, "jetson-orin", needs_plugin=True)


def test_every_board_is_that_of_a_jetpack():
    for target in TARGETS.values():
        assert any(target.board in one.boards for one in JETPACKS if tensorrt_line(one.tensorrt).is_supported)


def test_an_nvcc_without_the_gpu_is_told_which_cuda_is_needed(script):
    known = "sm_75\nsm_87\nsm_110\n"
    assert script["missing_architecture"]("jetson-orin", "13.0", known) is None
    message = script["missing_architecture"]("jetson-xavier", "13.0", known)
    assert message.startswith("nvcc of CUDA 13.0 does not know sm_72, the GPU of jetson-xavier")
    assert "11.4 (JetPack 5.1 to 5.1.5)" in message and "10.2" not in message and "\n" not in message


def test_the_jetpacks_whose_driver_is_too_old_are_named(script):
    assert "CUDA 13.2); too old: JetPack 5.1 to 5.1.5 (CUDA 11.4), 6.0" in script["usable_on"](
        "jetson-orin", "13.0"
    )
    assert "no JetPack that odtrt knows has one" in script["usable_on"]("jetson-xavier", "13.0")
    assert "too old" not in script["usable_on"]("jetson-xavier", "11.4")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("#define NV_TENSORRT_MAJOR 8 //!< x\n#define NV_TENSORRT_MINOR 5\n", "8.5"),
        ("#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 13\n", "10.13"),
    ],
)
def test_the_version_of_the_headers_is_read(script, tmp_path, text, version):
    (tmp_path / "NvInferVersion.h").write_text(text)
    assert script["header_version"](tmp_path) == version


def test_another_board_is_refused_in_one_line():
    command = [sys.executable, str(ROOT / "scripts" / "cross_compile.py"), "jetson-nano"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr == "error: TARGET=jetson-nano: expected jetson-xavier, jetson-orin, jetson-thor\n"


def outputs(**changes):
    """What aarch64_probe.py writes for one picture with one detection."""
    results = ("num_detections", "boxes", "scores", "classes", "anchors")
    found = {f"{by}_{name}": np.zeros((1, 2), np.float32) for by in ("library", "numpy") for name in results}
    found.update(images=np.zeros((1, 2, 2, 3), np.uint8), inputs=np.zeros((1, 3, 2, 2), np.float32))
    found.update(box_encodings=np.ones((1, 2, 4), np.float32), class_logits=np.ones((1, 2, 3), np.float32))
    found.update(counts=np.array([1]), found_classes=np.array([3]))
    found.update(found_boxes=np.array([[1, 2, 30, 40]], np.float32), found_scores=np.array([0.9], np.float32))
    return {**found, **changes}


def test_equal_machines_pass_and_other_rounding_of_the_heads_is_only_measured():
    other = outputs(class_logits=np.full((1, 2, 3), 1 + 2**-23, np.float32))
    rows = aarch64.compare(outputs(), other)
    assert aarch64.failures(rows) == []
    (logits,) = [row for row in rows if row["compared"] == "class_logits by ONNX Runtime"]
    assert (logits["different_values"], logits["max_abs_err"]) == (6, 2.0**-23)
    assert json.dumps(rows)


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"inputs": np.full((1, 3, 2, 2), -0.0, np.float32)}, "network input (libodtrt.so)"),
        ({"images": np.ones((1, 2, 2, 3), np.uint8)}, "decoded pictures"),
        ({"found_scores": np.array([0.8], np.float32)}, "detections by ONNX Runtime, x86 and arm64"),
        ({"found_classes": np.array([4])}, "detections by ONNX Runtime, x86 and arm64"),
    ],
)
def test_a_difference_between_the_machines_is_a_failure(changes, failed):
    assert aarch64.failures(aarch64.compare(outputs(), outputs(**changes))) == [failed]
    one_bit = outputs(library_scores=np.array([[0, 1e-45]], np.float32))
    assert len(aarch64.failures(aarch64.compare(outputs(), one_bit))) == 2


def test_a_plugin_that_the_registry_refuses_is_a_failure():
    assert aarch64.failures([{"check": "registry", "loads": True, "plugin_made": True}]) == []
    assert aarch64.failures([{"check": "registry", "loads": False}]) == ["the plugin in the registry"]
