"""boards.py's table of TensorRT releases against the names that NVIDIA's own Python bindings have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tensorrt_names as names

from odtrt_lib import boards

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def inventory():
    return names.read_inventory()


def releases(inventory):
    return [version for runtime_library, version in inventory.versions if runtime_library == "tensorrt"]


def wrong_statements(line: boards.TensorRTLine, version: str, inventory) -> list[str]:
    """What ``line`` says that the bindings of ``version`` deny."""

    def has(owner: str, name: str) -> bool:
        return ("tensorrt", version) in inventory.of(owner, name)

    statements = {
        "plugin": (line.plugin == "IPluginV3", has("(module)", "IPluginV3")),
        "half_precision by flag": ("builder flag" in line.half_precision, has("BuilderFlag", "FP16")),
        "half_precision in the ONNX": (
            "ONNX" in line.half_precision,
            has("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ),
        "int8 by calibrator": ("calibrator" in line.int8, has("(module)", "IInt8EntropyCalibrator2")),
        "version compatible": (line.has_version_compatible, has("BuilderFlag", "VERSION_COMPATIBLE")),
        "hardware compatible": (line.has_hardware_compatible, has("(module)", "HardwareCompatibilityLevel")),
        "progress": (line.has_progress, has("(module)", "IProgressMonitor")),
    }
    return [name for name, (said, found) in statements.items() if said != found]


def test_the_table_says_what_the_bindings_have(inventory):
    seen = set()
    for version in releases(inventory):
        line = boards.tensorrt_line(version)
        assert line.is_supported
        assert not wrong_statements(line, version, inventory), version
        seen.add(line.name)
    assert seen == {line.name for line in boards.TENSORRT if line.is_supported}, "each line was compared"


@pytest.mark.parametrize(
    ("version", "change"),
    [
        ("8.5.2.2", {"has_progress": True}),
        ("8.6.1", {"has_version_compatible": False}),
        ("10.3.0", {"half_precision": "ONNX"}),
        ("11.0.0.114", {"int8": "calibrator or Q/DQ"}),
        ("10.3.0", {"plugin": "IPluginV2DynamicExt"}),
    ],
)
def test_a_wrong_statement_is_caught(inventory, version, change):
    line = dataclasses.replace(boards.tensorrt_line(version), **change)
    assert wrong_statements(line, version, inventory)


def test_a_jetson_is_known_by_its_linux():
    assert boards.jetpack("R36.4.3").tensorrt == "10.3"
    assert boards.jetpack("R35.4.1").release == "5.1 to 5.1.5"
    assert boards.jetpack("R36.4.0").release == "6.1"
    assert boards.jetpack("R36.4.7").release == "6.2, 6.2.1", "an update that the table does not list"
    assert boards.jetpack("R36.2.0") is None, "older than all that is listed"
    assert boards.jetpack("R99.0.0") is None
    assert boards.jetpack("") is None
    seen = [l4t for one in boards.JETPACKS for l4t in one.l4t]
    assert len(seen) == len(set(seen)), "a release of Jetson Linux belongs to one JetPack"


@pytest.mark.parametrize("one", boards.JETPACKS, ids=lambda one: one.release)
def test_each_jetpack_has_a_line(one):
    line = boards.tensorrt_line(one.tensorrt)
    python = tuple(int(part) for part in one.python.split("."))
    assert not (line.is_supported and python < (3, 8)), "odtrt needs Python 3.8"


@pytest.mark.parametrize("version", ["", "ten", "7.2.1"])
def test_no_line(version):
    with pytest.raises(ValueError, match="expected a TensorRT version from 8"):
        boards.tensorrt_line(version)
