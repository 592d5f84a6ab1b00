"""The scripts that measure on a GPU, without one: what counts as failed, what is stopped, what is read."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import gpu_times
import pytest

from odtrt_lib import engine
from odtrt_lib.engine import fallback
from odtrt_lib.engine.passport import Machine
from odtrt_lib.errors import BuildError

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


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """Imports a script as on an H200 whose results are in ``tmp_path``; returns the script."""

    def imported(name):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        script = __import__(name)
        monkeypatch.setattr(script, "ROOT", tmp_path)
        (tmp_path / "results").mkdir(exist_ok=True)
        monkeypatch.setattr(script, "this_machine", lambda: Machine("Linux", "x86_64", gpu="NVIDIA Example"))
        return script

    return imported


# ---- tensorrt_gpu ---------------------------------------------------------------------------------------


@pytest.fixture
def tensorrt_gpu(on_a_gpu, monkeypatch, tmp_path):
    script = on_a_gpu("tensorrt_gpu")
    here = SimpleNamespace(runtime_library="tensorrt", version="8.5.2.2")
    monkeypatch.setattr(script.portability, "this_environment", lambda: here)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").touch()
    return script


def results(folder, name):
    return json.loads((folder / "results" / f"{name}.example.json").read_text())["rows"]


def says(monkeypatch, script, *parts, ending="pass"):
    """Each row's process prints ``parts`` and then does ``ending``."""
    code = f"import json\nfor part in {list(parts)!r}: print(json.dumps(part), flush=True)\n{ending}"
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(
        script, "start_row", lambda *_: subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    )


def test_models_and_arithmetics_are_measured_in_the_order_of_their_names(tensorrt_gpu, tmp_path):
    three = [("two", "FP32"), ("two", "TF32"), ("two", "FP16")]
    assert tensorrt_gpu.wanted(tmp_path, ["two", "one:FP16"]) == [*three, ("one", "FP16")]
    for wrong in ("three", "one:INT8"):
        with pytest.raises(SystemExit, match=wrong):
            tensorrt_gpu.wanted(tmp_path, [wrong])


def test_a_row_that_died_keeps_its_figures_and_says_so(tensorrt_gpu, monkeypatch, tmp_path):
    split = ({"form": "split", "plan_mb": 1.5}, {"form": "split", "passed": True})
    says(monkeypatch, tensorrt_gpu, *split, {"form": "fused", "plan_mb": 2.5}, ending="raise SystemExit(9)")
    assert tensorrt_gpu.run("run", tmp_path, Path("plugin"), ["one:FP16"]) == 1
    first, second = results(tmp_path, "tensorrt85")
    assert (first["form"], first["plan_mb"], first["passed"]) == ("split", 1.5, True) and "error" not in first
    assert (second["form"], second["plan_mb"], second["passed"]) == ("fused", 2.5, False)
    assert second["error"].startswith("exit status 9")


def test_another_visit_replaces_a_row_only_when_it_has_a_whole_one(tensorrt_gpu, monkeypatch, tmp_path):
    whole = {"form": "split", "plan_mb": 1.5, "passed": True}
    says(monkeypatch, tensorrt_gpu, whole, {**whole, "form": "fused"})
    assert tensorrt_gpu.run("run", tmp_path, Path("plugin"), ["one:FP16", "two:FP32"]) == 0
    before = results(tmp_path, "tensorrt85")
    assert [(row["model"], row["form"]) for row in before] == [
        (model, form) for model in ("one", "two") for form in ("split", "fused")
    ]
    says(monkeypatch, tensorrt_gpu, {"form": "split", "plan_mb": 9.0})
    assert tensorrt_gpu.run("run", tmp_path, Path("plugin"), ["one:FP16"]) == 1
    assert results(tmp_path, "tensorrt85") == before
    says(monkeypatch, tensorrt_gpu, {**whole, "plan_mb": 9.0})
    tensorrt_gpu.run("run", tmp_path, Path("plugin"), ["one:FP16"])
    after = results(tmp_path, "tensorrt85")
    assert after[:-1] == before[1:] and after[-1] == {**before[0], "plan_mb": 9.0}


# ---- nms_peers_gpu --------------------------------------------------------------------------------------


def test_a_peer_that_failed_leaves_the_earlier_figures(on_a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(IOutputAllocator=object))
    monkeypatch.delitem(sys.modules, "nms_peers_gpu", raising=False)
    peers = on_a_gpu("nms_peers_gpu")
    monkeypatch.delitem(sys.modules, "nms_peers_gpu")
    key = {"source": "drawn", "heads": "8 objects", "anchors": 1917, "score_threshold": 0.3}
    ours, theirs = ({**key, "implementation": name, "p50_us": 8.0} for name in ("ours", "theirs"))
    failed, faster = {**key, "implementation": "ours", "error": "no"}, {**ours, "p50_us": 7.0}
    assert peers.with_row([ours, theirs], failed) == [ours, theirs]
    assert peers.with_row([ours, theirs], faster) == [theirs, faster]
    assert peers.with_row([failed], faster) == [faster] and peers.with_row([theirs], failed) == [
        theirs,
        failed,
    ]
    assert {name for group in peers.GROUPS for name in group} | {peers.FIVE_KERNELS} == set(
        peers.IMPLEMENTATIONS
    )


# ---- version_matrix_gpu ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "loads", "agree", "safe"),
    [
        ("ok", True, True, True),
        ("ok", False, False, False),
        ("rebuild", False, True, True),
        ("refuse", True, False, True),  # a changed weight, which TensorRT does not notice
        ("apart", True, False, True),
        ("own", False, False, False),
        ("rebuild", None, True, True),  # the process died before it had an answer
    ],
)
def test_a_plan_is_never_called_ok_that_does_not_load(on_a_gpu, verdict, loads, agree, safe):
    row = {"kind": "plan", "verdict": verdict, **({} if loads is None else {"loads": loads})}
    found = on_a_gpu("version_matrix_gpu").judged(row)
    assert (found["agree"], found["safe"]) == (agree, safe)


def test_each_damage_changes_one_byte_or_the_length(on_a_gpu):
    matrix, data = on_a_gpu("version_matrix_gpu"), bytes(range(200))
    changed = {}
    for how in matrix.DAMAGE:
        found = matrix.damaged(data, how)
        changed[how] = [i for i in range(len(found)) if found[i] != data[i]] or len(found)
    assert list(changed.values()) == [100, [0], [50], [100], [150], [199]]


def test_the_matrix_asks_once_and_keeps_what_a_dead_process_left(on_a_gpu, monkeypatch, tmp_path):
    matrix = on_a_gpu("version_matrix_gpu")
    rows = [
        ({**dict(zip(matrix.KEY, ("plan", "8.5.2.2", "fp16", "split", "", into), strict=True))}, ["load"])
        for into in ("8.5.2.2", "8.5.3.1", "lean 10")
    ]
    monkeypatch.setattr(matrix, "plan_rows", lambda *_: rows)
    answers = {
        "8.5.2.2": {"verdict": "ok", "loads": True, "message": ""},
        "8.5.3.1": {"verdict": "rebuild", "message": "ended with status -11: it said nothing"},
        "lean 10": {"message": "ended with status 1: no module"},
    }
    asked = []

    def answer(own, *_):
        asked.append(own["python"])
        return answers[own["python"]]

    monkeypatch.setattr(matrix, "in_a_process", answer)
    environments = {name: {"python": name} for name in answers}
    assert matrix.load_everywhere(environments, tmp_path, tmp_path / "plugin.so") == 1
    found = {row["loaded_in"]: row for row in results(tmp_path, "version_matrix")}
    assert found["8.5.3.1"]["agree"] and not found["8.5.3.1"]["loads"]
    assert found["lean 10"]["error"] == "ended with status 1: no module"
    assert sorted(asked) == sorted(answers)
    answers["lean 10"] = {"verdict": "rebuild", "loads": False, "message": "another version"}
    assert matrix.load_everywhere(environments, tmp_path, tmp_path / "plugin.so") == 0
    assert asked[3:] == ["lean 10"]


def test_a_task_that_dies_tells_its_last_words(on_a_gpu, monkeypatch, tmp_path):
    matrix = on_a_gpu("version_matrix_gpu")
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho \'{"verdict": "ok"}\'; echo $WHO $2 >&2; kill -ABRT $$\n')
    program.chmod(0o755)
    found = matrix.in_a_process({"python": str(program), "WHO": "me"}, ["load"], 60)
    assert found == {"verdict": "ok", "message": "ended with status -6: me --do"}


# ---- fallback_gpu ---------------------------------------------------------------------------------------


@pytest.fixture
def fallback_gpu(on_a_gpu, monkeypatch, tmp_path):
    script = on_a_gpu("fallback_gpu")
    monkeypatch.setattr(script, "WORK", tmp_path / "work")
    monkeypatch.setattr(script, "MODELS", ("one",))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    (tmp_path / "one" / "plans").mkdir(parents=True)
    (tmp_path / "one" / "heads.onnx").touch()
    return script


def test_steps_of_a_build_that_failed_are_rows_too(fallback_gpu, monkeypatch, tmp_path):
    calls = []

    def build(folder, memory, force):
        assert sorted(path.name for path in Path(folder).iterdir()) == ["heads.onnx"] and force
        calls.append((memory, [step.name for step in fallback.FALLBACK]))
        for step in fallback.FALLBACK[:2]:
            ended = SimpleNamespace(
                outcome="out of memory: stopped" if memory else "built",
                seconds=1.0, peak_rss_mb=2000.0, peak_gpu_mb=None, samples=[],
            )  # fmt: skip
            fallback._described(step.name, {}, ended)
        if memory:
            raise BuildError("does not get by with the memory")

    whole = fallback.FALLBACK
    monkeypatch.setattr(engine, "build", build)
    first = fallback_gpu.rows_of(tmp_path / "one", ("one", "setting", "as asked"), [])
    assert [(row["step"], row["limit_mb"], row["built"]) for row in first] == [("as asked", None, True)]
    rows = fallback_gpu.rows_of(tmp_path / "one", ("one", "host", "60%"), first)
    assert [(row["number"], row["step"], row["limit_mb"], row["built"]) for row in rows] == [
        (1, "as asked", 1200, False),
        (2, "small workspace", 1200, False),
    ]
    assert calls == [(None, ["as asked"]), ("1200MiB", [step.name for step in whole])]
    assert whole == fallback.FALLBACK and not (tmp_path / "work" / "one").exists()


def test_what_is_there_is_not_built_again_and_nothing_begins_too_late(fallback_gpu, monkeypatch, tmp_path):
    made = []

    def rows_of(recorded, case, known):
        made.append(case)
        return [{**dict(zip(fallback_gpu.KEY, case, strict=True)), "number": 1, "outcome": "built"}]

    monkeypatch.setattr(fallback_gpu, "rows_of", rows_of)
    assert fallback_gpu.main([str(tmp_path), "--seconds", "-1"]) == 1 and made == []
    assert fallback_gpu.main([str(tmp_path)]) == 0
    assert made[:2] == [("one", "setting", "as asked"), ("one", "host", "90%")] and len(made) == 8
    assert fallback_gpu.main([str(tmp_path)]) == 0 and len(made) == 8
    assert len(results(tmp_path, "fallback")) == 8


# ---- gpu_times ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpu, name",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("Tesla T4", "tesla-t4"),
        (None, "none"),
    ],
)
def test_each_gpu_has_results_of_its_own(gpu, name):
    assert gpu_times.gpu_name(gpu) == name
