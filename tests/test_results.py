"""results.py: a measurement is written whole, flat and finite, or not at all."""

from __future__ import annotations

import ast
import json
import os
import stat
import sys
from importlib import metadata
from pathlib import Path

import pytest

from odtrt_lib.errors import InputError
from odtrt_lib.results import as_text, device_info, versions, write_results

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = sorted((ROOT / "results").glob("*.json"))


def imported_by(source: Path) -> set[str]:
    """The names that a Python file imports, wherever in it: modules, and what is taken from them."""
    nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return modules | {
        alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }


def test_what_writes_results_is_in_benchmarks_and_imports_no_tests():
    elsewhere = [
        path for folder in ("scripts", "plugins", "models") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(elsewhere) > 3
    assert not [path for path in elsewhere if "odtrt_lib.results" in imported_by(path)]
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert not imported_by(path) & tests, path
    assert imported_by(Path(__file__)) >= {"ast", "odtrt_lib.results", "write_results"}


def test_writes_the_form_that_pages_read(tmp_path):
    rows = [{"stage": "convert", "seconds": 1.5, "nodes": 3, "ok": True, "note": None}]
    write_results(tmp_path / "results" / "topic.json", "topic", "make topic", rows)
    record = json.loads((tmp_path / "results" / "topic.json").read_text())
    assert list(record) == ["schema", "topic", "command", "date", "device", "versions", "rows"]
    assert (record["schema"], record["topic"], record["command"]) == (1, "topic", "make topic")
    assert record["rows"] == rows
    assert record["versions"]["numpy"] == metadata.version("numpy")
    assert all(not isinstance(value, (dict, list)) for value in record["device"].values())


def test_each_row_is_a_line(tmp_path):
    rows = [{"model": "a", "note": "two\nlines"}, {"model": "é", "p50_us": 1.5}]
    write_results(tmp_path / "topic.json", "topic", "make topic", rows)
    lines = (tmp_path / "topic.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[8:-2]] == rows
    assert (lines[7], lines[-2:]) == (' "rows": [', [" ]", "}"])
    write_results(tmp_path / "empty.json", "topic", "make topic", [])
    assert json.loads((tmp_path / "empty.json").read_text())["rows"] == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_files_have_the_form(path):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert text == as_text(record)
    assert text.count("\n") == len(record["rows"]) + 10


@pytest.mark.parametrize(
    "wrong", [{"map": float("nan")}, {"p50_us": float("inf")}, {"sizes": [1, 2]}, {"a": {}}]
)
def test_refuses_rows_that_are_not_flat_and_finite(tmp_path, wrong):
    path = tmp_path / "topic.json"
    write_results(path, "topic", "make topic", [{"seconds": 1.0}])
    before = path.read_text()
    with pytest.raises(ValueError, match=f"row 1: {next(iter(wrong))}"):
        write_results(path, "topic", "make topic", [{"seconds": 1.0}, wrong])
    assert path.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["topic.json"]


def test_refuses_numpy_figures_before_writing(tmp_path):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ValueError, match="seconds is a float32"):
        write_results(tmp_path / "topic.json", "topic", "make topic", [{"seconds": numpy.float32(1)}])
    assert not list(tmp_path.iterdir())


def test_path_that_cannot_be_written(tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot be written"):
        write_results(tmp_path / "results" / "topic.json", "topic", "make topic", [])


def test_versions_leaves_out_what_is_not_installed():
    found = versions("numpy", "no-such-distribution")
    assert set(found) == {"python", "odtrt", "numpy"}
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])


def test_device_info_names_the_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 143771, 575.57.08'\necho 'NVIDIA H200, 143771, 575.57.08'\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    info = device_info()
    assert (info["gpu"], info["gpu_count"], info["gpu_memory_mb"]) == ("NVIDIA H200", 2, 143771)
    assert info["cores"] >= 1 and info["cpu"]


def test_device_info_without_a_working_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "gpu" not in device_info()
