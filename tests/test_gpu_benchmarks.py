"""The scripts that measure on a GPU, without one: what counts as failed, what is stopped, what is read."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from odtrt_lib.engine.passport import Machine

ROOT = Path(__file__).resolve().parent.parent
# Two calls as ncu printed them on an H200, without the columns that are not read and most stalls. The
# kernels have the names of today.
SAMPLE = ROOT / "tests" / "ncu_sample.csv"


@pytest.fixture
def backends_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import backends_gpu

    return backends_gpu


@pytest.fixture
def ncu_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import nms_ncu_gpu

    return nms_ncu_gpu


def is_gone(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        ({"arithmetic": "FP32", "detect_p50_us": 1.0}, False),  # ONNX Runtime's own row
        ({"arithmetic": "FP32", "agrees": True, "batch_agrees": True, "submit_agrees": True}, False),
        ({"arithmetic": "FP32", "agrees": False, "batch_agrees": True, "submit_agrees": True}, True),
        ({"arithmetic": "FP32", "agrees": True, "batch_agrees": False, "submit_agrees": True}, True),
        ({"arithmetic": "TF32", "agrees": False}, False),
        ({"arithmetic": "FP16", "agrees": False}, False),
        ({"arithmetic": "FP16", "error": "no memory"}, True),
    ],
)
def test_errors_and_another_answer_in_fp32_are_failures(backends_gpu, row, fails):
    assert backends_gpu.has_failed(row) is fails


def test_a_row_that_takes_too_long_is_stopped_with_all_that_it_started(backends_gpu, monkeypatch, tmp_path):
    """The limit begins when the row's process has said its word, so that a slow start does not matter."""
    monkeypatch.setattr(backends_gpu, "MAX_SECONDS", 0.1)
    pipe = tmp_path / "held"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code = (
        "import subprocess, sys\n"
        "held = open(sys.argv[1], 'w')\n"
        "child = subprocess.Popen(['tail', '-f', '/dev/null'], stdout=held)\n"
        "print('{\"a\": 1}', flush=True); held.write('x'); held.close(); child.wait()"
    )
    communicate = subprocess.Popen.communicate

    def when_it_has_printed(process, *arguments, timeout=None):
        if timeout is not None:
            assert select.select([reader], [], [], 300)[0] and os.read(reader, 1) == b"x"
        return communicate(process, *arguments, timeout=timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", when_it_has_printed)
    row = backends_gpu.in_a_process(["-c", code, str(pipe)], "TF32", tmp_path)
    assert row == {"a": 1, "error": "stopped after 0.1 s"}
    ended, _, _ = select.select([reader], [], [], 300)  # readable at its end: nobody holds the pipe any more
    assert ended and os.read(reader, 1) == b""


def test_ctrl_c_ends_the_row_too(backends_gpu, monkeypatch, tmp_path):
    started = []

    def interrupted(process, *_, **__):
        started.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backends_gpu.in_a_process(["-c", "import signal; signal.pause()"], "TF32", tmp_path)
    assert is_gone(*started)


def test_pictures_are_asked_for_unless_only_the_start_is_timed(backends_gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["backends_gpu.py", "folder", "--start", "FP16"])
    assert backends_gpu.parse().images is None
    monkeypatch.setattr(sys, "argv", ["backends_gpu.py", "folder"])
    with pytest.raises(SystemExit):
        backends_gpu.parse()
    assert "--images DIR is required" in capsys.readouterr().err


def test_each_plan_has_the_day_of_its_own_measurement(backends_gpu, monkeypatch, tmp_path):
    import engine_gpu

    old = {"model": "old", "arithmetic": "FP32", "date": "2026-01-02", "passed": True}
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "engine.example.json"
    path.write_text(json.dumps({"rows": [old]}))
    (tmp_path / "fp32" / "new").mkdir(parents=True)
    monkeypatch.setattr(engine_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(engine_gpu, "this_machine", lambda: Machine("Linux", "x86_64", gpu="NVIDIA Example"))
    monkeypatch.setattr(engine_gpu, "in_a_process", lambda *_: {"passed": True})
    assert engine_gpu.main([str(tmp_path), "new"]) == 0
    first, *others = json.loads(path.read_text())["rows"]
    assert first == old
    assert [row["arithmetic"] for row in others] == ["FP32", "TF32", "FP16"]
    assert all(0 <= (date.today() - date.fromisoformat(row["date"])).days <= 1 for row in others)


def test_the_second_call_is_read_from_what_ncu_prints(ncu_gpu):
    first, second = ncu_gpu.rows_of(SAMPLE.read_text(), [(49104, 0.05, 8)])
    assert (first["kernel"], first["blocks"]) == ("select_candidates", 660)
    assert (first["threads"], first["us"], first["dram_gb_per_second"]) == (256, 8.8, 399.56)
    assert second["kernel"] == "suppress_in_cluster" and second["objects"] == 8 and second["registers"] == 128


def test_other_calls_than_ours_are_refused(ncu_gpu):
    printed = SAMPLE.read_text()
    with pytest.raises(ValueError, match="watched 4 kernels, expected 28"):
        ncu_gpu.rows_of(printed)
    with pytest.raises(ValueError, match="not the order"):
        ncu_gpu.rows_of(printed.replace("select_candidates<", "other<"), [(49104, 0.05, 8)])


def test_the_version_of_ncu_is_read(ncu_gpu):
    said = "NVIDIA (R) Nsight Compute\nCopyright (c) 2018-2025\nVersion 2025.1.1.0 (build 1)\n"
    assert ncu_gpu.version_in(said) == "2025.1.1.0"
    assert ncu_gpu.version_in("?") == "unknown"
