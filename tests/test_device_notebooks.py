"""The notebooks of an unpacked bundle, without TensorFlow and OpenCV, on Python 3.8, 3.10 and 3.12."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from odtrt_lib import bundle, fuse, native, notebooks
from odtrt_lib.bundle.notebooks import WORKSTATION_CELL, files_to_bring
from odtrt_lib.errors import InputError
from odtrt_lib.folder import check_seal, sha256
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parent.parent
# Cells whose output depends neither on a library's version nor on the machine.
SAME_EVERYWHERE = {
    "00_tour": ("truth", "found1"),
    "03_engine": ("again", "versions", "defect"),
    "04_nms": ("mark2", "keep", "chain", "never_truncated", "gate_cases", "break_equal"),
    "05_portability": ("plugin", "new_model", "failing_rebuild", "same", "policy", "forged"),
}


@pytest.fixture(scope="session")
def parts_bundle(parts_folder, made_once) -> Path:
    """What ``odtrt pack --notebooks`` makes of the shipped detector."""

    def pack(folder: Path) -> None:
        model = shutil.copytree(parts_folder, folder / "parts", ignore=shutil.ignore_patterns("plans"))
        fuse.fuse(model)
        bundle.pack(model, folder / "parts.odtrt.zip", notebooks=True)

    return made_once("bundle_with_notebooks", pack) / "parts.odtrt.zip"


def device_of(version: str, folder: Path) -> Path:
    """The Python of a new environment with what ``notebooks/requirements.txt`` names and TensorRT-RTX alone.

    uv takes an installed Python or fetches one. Without one the test fails: nothing else tests this version.
    """
    uv = Path(sys.executable).parent / "uv"
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    pythons = sorted(versions.glob(f"{version}.*/bin/python{version}"))
    rtx = re.search(r"^tensorrt-rtx-\S+", (ROOT / "requirements" / "run.in").read_text(), re.M).group()
    python = folder / "bin" / "python"
    for command in (
        ["venv", "--python", pythons[-1] if pythons else version, folder],
        ["pip", "install", "--python", python, "-r", ROOT / "notebooks" / "requirements.txt", rtx],
    ):
        done = subprocess.run([uv, *command], capture_output=True, text=True)
        assert done.returncode == 0, f"Python {version} is needed: {done.stderr}"
    return python


def recorded(name: str) -> dict[str, str]:
    """Cell that a device has -> what it printed when the notebook was recorded, on a workstation."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in cells
        if cell.cell_type == "code" and WORKSTATION_CELL not in cell.metadata.get("tags", [])
    }


@pytest.mark.parametrize("version", ["3.8", "3.10", "3.12"])
def test_the_notebooks_run_from_an_unpacked_bundle(parts_bundle, tmp_path, version):
    library = native.load()
    assert library is not None, "run `make plugin`"
    python = device_of(version, tmp_path / "venv")
    environment = {
        "PATH": str(python.parent),  # no compiler: the kernels were compiled once, for the tests
        "ODTRT_LIBRARY": str(library.path),
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
    }
    absent = "import importlib.util as u; print(*filter(u.find_spec, ('tensorflow', 'cv2', 'odtrt_lib')))"
    found = subprocess.run(
        [python, "-c", absent], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout == "\n"
    script = ROOT / "benchmarks" / "device_notebooks_gpu.py"
    command = [python, script, parts_bundle, "--into", tmp_path / "parts", "--out", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "out" / "notebooks.h200.json").read_text())["rows"]
    printed = {(row["notebook"], row["cell"]): row["text"] for row in rows}
    said = "export and convert ran on the workstation: out/parts is a copy of the bundle's model/\n"
    for stage in ("export", "convert"):
        assert printed["00_tour", stage].startswith(f"{stage} ran on the workstation; this is its record:\n")
    for name, cells in SAME_EVERYWHERE.items():
        expected = recorded(name)
        assert {cell for notebook, cell in printed if notebook == name} == set(expected)
        assert name == "00_tour" or printed[name, "artefacts"].startswith(said)
        for cell in cells:
            assert printed[name, cell] == expected[cell], (name, cell)


def unpacked_here(monkeypatch, archive: Path, folder: Path) -> Path:
    """Unpacks the bundle, and lets :mod:`odtrt_lib.notebooks` take it for the place where it runs."""
    bundle.unpack(archive, folder)
    monkeypatch.setattr(notebooks, "IMPORT_PATH", str(folder))
    return folder


def test_the_scenes_of_a_bundle_are_those_of_the_workstation(parts_bundle, tmp_path, monkeypatch):
    rendered = [notebooks.unseen_scene(number) for number in (0, 39)]
    unpacked_here(monkeypatch, parts_bundle, tmp_path / "parts")
    for number, scene in zip((0, 39), rendered, strict=True):
        brought = notebooks.unseen_scene(number)
        assert brought.names == scene.names
        for field in ("image", "boxes", "class_ids"):
            one, other = getattr(brought, field), getattr(scene, field)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match=r"scene_40\.png: not found; the bundle brings the first 40"):
        notebooks.unseen_scene(40)


def test_a_device_begins_with_the_bundles_model(parts_bundle, tmp_path, monkeypatch, capsys):
    folder = unpacked_here(monkeypatch, parts_bundle, tmp_path / "parts")
    made = notebooks.prepare("models/parts", tmp_path / "mine")
    assert capsys.readouterr().out.count("\n") == 1
    assert sorted(path.name for path in made.iterdir()) == [
        "anchors.npy",
        "heads.onnx",
        "log.jsonl",
        "spec.json",
    ]
    assert check_seal(made, "spec.json", "anchors.npy", "heads.onnx")
    (made / "heads.onnx").write_bytes(b"edited by a reader")
    notebooks.prepare("models/parts", made, fused=True)
    for name in ("heads.onnx", "detector.onnx"):
        assert sha256(made / name) == sha256(folder / "model" / name)
    assert check_seal(made, "heads.onnx", "detector.onnx")


def test_a_bundle_packs_the_same_bundle_again(parts_bundle, tmp_path):
    """As chapter 5 does on a device, from the bundle's own copy of odtrt."""
    bundle.unpack(parts_bundle, tmp_path / "parts")
    script = "from odtrt_lib import bundle; bundle.pack('model', '../again.zip', notebooks=True)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "parts")}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "parts", env=environment, check=True)
    assert sha256(tmp_path / "again.zip") == sha256(parts_bundle)


def test_notebooks_want_the_shipped_detector_fused(parts_bundle, parts_folder, tmp_path):
    bundle.unpack(parts_bundle, tmp_path / "parts")
    model = tmp_path / "parts" / "model"
    spec = load_spec(model / "spec.json")
    others = tuple(dataclasses.replace(label, name=f"other {label.id}") for label in spec.labels)
    with pytest.raises(InputError, match=r"has no class \w+; the notebooks are of models/parts"):
        files_to_bring(parts_folder, dataclasses.replace(spec, labels=others))
    (model / "detector.onnx").unlink()
    with pytest.raises(InputError, match=r"detector\.onnx: not found; run `odtrt fuse`"):
        bundle.pack(model, tmp_path / "a.zip", notebooks=True)


def test_what_a_cell_printed_elsewhere_is_printed_with_the_machine(tmp_path, capsys):
    built = {
        "notebook": "build_here.py",
        "cell": "",
        "runtime_library": "tensorrt",
        "runtime_version": "8.5.2.2",
    }
    cell = {"notebook": "03_engine", "cell": "build", "text": "layers 197\n"}
    other = {"notebook": "05_portability", "cell": "build", "text": "another notebook's\n"}
    path = tmp_path / "notebooks.h200.json"
    record = {
        "device": {"gpu": "NVIDIA Example"},
        "versions": {"python": "3.8.18"},
        "date": "2026-11-30T22:40:00+00:00",
        "rows": [built, other, cell],
    }
    path.write_text(json.dumps(record))
    notebooks.print_recorded(path, "03_engine", "build")
    assert capsys.readouterr().out == (
        "NVIDIA Example, TensorRT 8.5.2.2, Python 3.8.18, 2026-11-30\n\n[build]\nlayers 197\n"
    )
