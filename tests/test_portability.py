"""Which plan may be used here, and how a stale one is replaced, whatever happens in between."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from odtrt_lib import engine, portability
from odtrt_lib.engine import passport
from odtrt_lib.folder import seal, write_record
from odtrt_lib.portability import Action, Environment, policy, rebuild
from odtrt_lib.variants import HARDWARE_COMPATIBILITIES

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
assert SPEC is not None and SPEC.loader is not None
faults = importlib.util.module_from_spec(SPEC)
sys.modules["faults"] = faults
SPEC.loader.exec_module(faults)

HERE = Environment(faults.A100, "tensorrt", "10.3.0")
needs_tensorrt_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="no TensorRT-RTX: run `pip install -e '.[engine]'`",
)


def plan_bytes(number=0):
    """The header of a plan of TensorRT 10.3.0.26, and something behind it."""
    return b"ftrt" + bytes(20) + bytes((10, 3, 0, 26)) + bytes([number]) * 5000


def install(folder, number=0, **changes):
    """A plan of TensorRT 10.3.0 built on an A100; the number makes its bytes and its fingerprint."""
    made = {
        "runtime_library": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": (),
        "machine": faults.A100,
    }
    one = faults.describe(plan_bytes(number), f"{number:016x}", folder, **{**made, **changes})
    faults.install(folder, plan_bytes(number), one)
    return one


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "heads.onnx").write_bytes(b"model")
    (made / "spec.json").write_text("{}")
    seal(made)
    return made


# ---- the policy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mismatch", faults.MISMATCHES, ids=lambda one: one.rule)
def test_each_row_of_the_policy(mismatch, tmp_path):
    verdict, applying = faults.look_at(mismatch, tmp_path)
    assert mismatch.rule in applying
    assert (verdict.action.value, verdict.rebuild_helps) == (mismatch.action, mismatch.helps)
    assert verdict.reasons and all(reason and "\n" not in reason for reason in verdict.reasons)


def test_no_row_is_without_a_test_and_no_name_is_twice():
    names = [rule.name for rule in portability.POLICY]
    assert len(names) == len(set(names))
    assert set(names) == {mismatch.rule for mismatch in faults.MISMATCHES}


@pytest.mark.parametrize("name", [rule.name for rule in portability.POLICY if rule.action is not Action.OK])
def test_without_its_row_a_mismatch_passes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "POLICY", tuple(r for r in portability.POLICY if r.name != name))
    mismatch = next(one for one in faults.MISMATCHES if one.rule == name)
    assert faults.look_at(mismatch, tmp_path)[0].action is Action.OK


def test_every_place_meets_one_row_about_the_library_and_one_about_the_gpu(folder):
    groups = {"library": [], "gpu": []}
    start, group = {"no library": "library", "no GPU": "gpu", "older driver": ""}, ""
    for rule in portability.POLICY:
        group = start.get(rule.name, group)
        if group:
            groups[group].append(rule)
    machines = [
        faults.A100,
        faults.A30,
        faults.RTX_4090,
        faults.T4,
        faults.ORIN,
        faults.ORIN_NX,
        faults.NO_GPU,
    ]
    libraries = [(None, None), ("tensorrt_rtx", "1.7.1.116"), ("tensorrt_rtx", "1.6.1.120")]
    libraries += [
        ("tensorrt", text) for text in ("8.6.1", "10.0.1", "10.3.0", "10.3.0.30", "10.13.3", "11.4.1")
    ]
    one = install(folder)
    levels = [*HARDWARE_COMPATIBILITIES]
    for (runtime_library, version), built, place, level, is_compatible in itertools.product(
        libraries[1:], machines, machines, levels, (False, True)
    ):
        changes = {
            "runtime_library": runtime_library,
            "version": version,
            "machine": built,
            "hardware_compatibility": level,
            "version_compatible": is_compatible,
            "compute_capabilities": ("default",) if runtime_library == "tensorrt_rtx" else (),
        }
        plan = dataclasses.replace(one, **changes)
        for library in libraries:
            case = policy.PlanCheck(folder, plan, Environment(place, *library))
            for group, rules in groups.items():
                names = [rule.name for rule in rules if rule.applies(case)]
                assert len(names) == 1, (group, names, changes, place, library)


def test_what_the_environment_says_about_tf32_belongs_to_the_place(monkeypatch):
    monkeypatch.setenv(engine.TF32_OVERRIDE, "0")
    assert portability.this_environment().tf32_override == "0"
    monkeypatch.delenv(engine.TF32_OVERRIDE)
    assert portability.this_environment().tf32_override is None


def test_the_reasons_name_what_was_found_and_the_gravest_comes_first(folder):
    one = install(folder)
    place = Environment(faults.RTX_4090, "tensorrt", "10.13.3")
    assert portability.check(folder, one, place).reasons == (
        "built by TensorRT 10.3.0, here is TensorRT 10.13.3: not version-compatible, so only the same "
        "version loads it",
        "built on NVIDIA A100-SXM4-40GB (compute capability 8.0), this is NVIDIA GeForce RTX 4090 (compute "
        "capability 8.9): TensorRT does not load it",
    )
    (folder / "plans" / one.plan).write_bytes(b"")
    reasons = portability.check(folder, one, place).reasons
    assert re.match(rf"{one.plan} has 0 bytes, .* 5028", reasons[0]) and len(reasons) == 3


def test_memory_that_the_driver_reserves_is_no_other_gpu(folder):
    one = install(folder)
    a_little_less = dataclasses.replace(faults.A100, gpu_memory_mb=faults.A100.gpu_memory_mb - 500)
    unknown = dataclasses.replace(faults.A100, gpu_memory_mb=None, sm_count=None)
    for machine in (a_little_less, unknown):
        assert portability.check(folder, one, Environment(machine, "tensorrt", "10.3.0")).action is Action.OK


def test_a_plan_before_8_6_has_no_header_that_could_disagree(folder):
    one = install(folder, version="8.5.2")
    assert portability.check(folder, one, Environment(faults.A100, "tensorrt", "8.5.2")).action is Action.OK


# ---- the best plan -------------------------------------------------------------------------------------


def test_the_best_plan_is_the_newest_that_may_be_used(folder):
    old = install(folder, 1, built="2026-01-01T00:00:00+00:00")
    newer = install(folder, 2, built="2026-01-02T00:00:00+00:00")
    half = install(folder, 3, built="2026-01-03T00:00:00+00:00", precision="fp16")
    install(folder, 4, built="2026-01-04T00:00:00+00:00", machine=faults.T4)
    assert portability.best_plan(folder, HERE) == half
    assert portability.best_plan(folder, HERE, precision="fp32") == newer
    assert portability.best_plan(folder, HERE, model="detector.onnx") is None
    (folder / "plans" / newer.plan).write_bytes(plan_bytes(9))
    assert portability.best_plan(folder, HERE, model="heads.onnx", precision="fp32") == old
    (folder / "plans" / f"{old.fingerprint}.json").write_text("{")
    assert portability.best_plan(folder, HERE, precision="fp32") is None
    assert portability.best_plan(folder / "nowhere", HERE) is None


def test_a_plan_that_was_away_while_it_was_looked_at_is_found(folder, monkeypatch):
    """Replaced and put back, so that the folder looks as if nothing had happened."""
    one, aside = install(folder, 1), folder / "aside"
    real, calls = policy._verdict, []

    def away_meanwhile(case, rules):
        calls.append(1)
        if len(calls) > 1:
            return real(case, rules)
        plan = folder / "plans" / one.plan
        plan.rename(aside)
        verdict = real(case, policy.POLICY)
        aside.rename(plan)
        return verdict

    monkeypatch.setattr(policy, "_verdict", away_meanwhile)
    assert portability.best_plan(folder, HERE) == one


def test_a_plan_that_is_replaced_while_it_is_looked_at_is_looked_at_again(folder, monkeypatch):
    install(folder, 1)
    real, calls = policy._verdict, []

    def replaced_meanwhile(case, rules):
        if not calls:
            calls.append(1)
            changed = plan_bytes(7)
            faults.install(folder, changed, faults.describe(changed, f"{1:016x}", folder, **made))
        return real(case, rules)

    made = {
        "runtime_library": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": (),
        "machine": faults.A100,
    }
    monkeypatch.setattr(policy, "_verdict", replaced_meanwhile)
    found = portability.best_plan(folder, HERE)
    assert found is not None and passport.read_plan(folder, found) == plan_bytes(7)


# ---- rebuilding ----------------------------------------------------------------------------------------


@pytest.fixture
def gate(folder, monkeypatch):
    """A rebuild that goes on until it is told to end: its command, and how to tell it."""
    monkeypatch.setattr(rebuild, "this_environment", lambda plugin=None: HERE)
    path = folder / "gate"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)  # before anybody reads, so that nothing said is lost
    yield (
        ["sh", "-c", 'read line < "$0"; exit "$line"', str(path)],
        lambda code: os.write(descriptor, f"{code}\n".encode()),
    )
    with contextlib.suppress(OSError):
        os.write(descriptor, b"0\n")
    portability.wait_for_rebuild(folder)
    os.close(descriptor)


def test_one_rebuilds_the_others_are_told_so(folder, gate):
    command, end = gate
    one = install(folder)
    assert portability.rebuild_status(folder).state == "idle"
    process = portability.start_rebuild(folder, one, command=command)
    assert process is not None
    assert portability.rebuild_status(folder).state == "running"
    assert portability.start_rebuild(folder, one, command=command) is None
    assert portability.start_rebuild(folder, one, command=command, force=True) is None
    assert portability.best_plan(folder, HERE) == one, "the old plan serves meanwhile"
    end(0)
    status = portability.wait_for_rebuild(folder)
    assert (status.state, status.pid, status.progress) == ("done", process, 1.0)
    assert not any(path.name.endswith(".tmp") for path in folder.rglob("*"))


def test_a_rebuild_that_failed_is_not_tried_again_unless_asked_or_something_changed(folder, gate):
    one = install(folder)
    before = (folder / "plans" / one.plan).read_bytes()
    assert portability.start_rebuild(folder, one, command=["false"]) is not None
    status = portability.wait_for_rebuild(folder)
    assert status.state == "failed" and "`false` ended with status 1" in status.message
    assert portability.start_rebuild(folder, one, command=["false"]) is None
    assert portability.rebuild_status(folder).state == "failed"
    assert portability.start_rebuild(folder, one, command=["false"], force=True) is not None
    portability.wait_for_rebuild(folder)
    (folder / "heads.onnx").write_bytes(b"another model")
    seal(folder)
    assert portability.start_rebuild(folder, one, command=["false"]) is not None
    portability.wait_for_rebuild(folder)
    assert (folder / "plans" / one.plan).read_bytes() == before and passport.verify(folder, one) is None
    record = json.loads((folder / "plans" / ".rebuild.json").read_text())
    assert [failure["is_final"] for failure in record["failures"].values()] == [True, True]


def test_a_damaged_model_makes_no_plan_stale_and_is_not_built_from(folder, gate):
    one = install(folder)
    (folder / "heads.onnx").write_bytes(b"rotten")
    verdict = portability.check(folder, one, HERE)
    assert verdict.action is Action.OK and any("heads.onnx is damaged" in each for each in verdict.reasons)
    assert portability.start_rebuild(folder, one, command=["true"], force=True) is not None
    status = portability.wait_for_rebuild(folder)
    assert status.state == "failed" and "heads.onnx: damaged or changed" in status.message
    assert passport.verify(folder, one) is None
    seal(folder)  # somebody trained again
    assert policy.PlanCheck(folder, one, HERE).changed == ("heads.onnx",)


def test_a_plan_of_an_earlier_export_is_stale_before_its_model_is_converted_again(folder):
    one = install(folder)
    about = {"settings": {}, "versions": {}, "seconds": 0.0, "peak_rss_mb": 0.0, "checks": {}}
    for weights in (b"first", b"second"):
        (folder / "frozen.pb").write_bytes(weights)
        write_record(
            folder, "export", inputs={"checkpoint": "1"}, outputs=["frozen.pb", "spec.json"], **about
        )
        if weights == b"first":
            inputs = {"frozen.pb": hashlib.sha256(weights).hexdigest()}
            write_record(folder, "convert", inputs=inputs, outputs=["heads.onnx"], **about)
            assert portability.check(folder, one, HERE).action is Action.OK
    assert policy.PlanCheck(folder, one, HERE).changed == ("heads.onnx",)
    assert portability.check(folder, one, HERE).action is Action.REBUILD


def test_two_deaths_of_the_same_rebuild_are_enough(folder, gate):
    command, _ = gate
    one = install(folder)
    for _ in range(2):
        process = portability.start_rebuild(folder, one, command=command)
        assert process is not None
        os.killpg(process, signal.SIGKILL)
        assert "killed" in portability.wait_for_rebuild(folder).message
    assert portability.start_rebuild(folder, one, command=command) is None
    assert portability.rebuild_status(folder).state == "failed"
    assert passport.verify(folder, one) is None


def test_the_record_is_believed_only_where_the_lock_agrees(folder):
    """Process numbers are used again and clocks go back; a record may be damaged or from another machine."""
    install(folder)
    record = {
        **rebuild._IDLE,
        "state": "running",
        "pid": os.getpid(),
        "since": "2999-01-01T00:00:00+00:00",
    }
    path = folder / "plans" / ".rebuild.json"
    path.write_text(json.dumps(record))
    assert portability.rebuild_status(folder).state == "failed"
    for damaged in ("", "{", "[]", '{"state": 3}', '{"state": "done", "failures": [1]}', "null"):
        path.write_text(damaged)
        assert portability.rebuild_status(folder).state in ("idle", "done")
    assert portability.rebuild_status(folder / "nowhere").state == "idle"


def test_a_clock_that_went_back_changes_nothing(folder, gate, monkeypatch):
    command, end = gate
    one = install(folder, 1, built="2999-01-01T00:00:00+00:00")
    assert portability.start_rebuild(folder, one, command=["true"]) is not None
    assert portability.wait_for_rebuild(folder).state == "done"
    monkeypatch.setattr(rebuild, "_now", lambda: "1970-01-01T00:00:00+00:00")
    assert portability.start_rebuild(folder, one, command=command) is not None
    assert portability.rebuild_status(folder).state == "running"
    end(3)
    assert portability.wait_for_rebuild(folder).state == "failed"
    assert portability.best_plan(folder, HERE) == one


def test_a_rebuild_that_cannot_be_is_not_started(folder, gate):
    one = install(folder)
    with_plugin = dataclasses.replace(one, plugin=faults.PLUGIN, model="detector.onnx")
    assert portability.start_rebuild(folder, with_plugin, command=["true"]) is None, "no plugin was given"
    (folder / "heads.onnx").unlink()
    assert portability.start_rebuild(folder, one, command=["true"]) is None, "nothing to build from"
    shutil.rmtree(folder / "plans")
    (folder / "plans").write_text("no folder")
    (folder / "heads.onnx").write_bytes(b"model")
    assert portability.start_rebuild(folder, one, command=["true"]) is None, "no place for the lock"


def test_a_folder_that_was_removed_meanwhile_does_not_come_back(folder, gate, tmp_path):
    command, end = gate
    one = install(folder)
    lock = folder / "plans" / rebuild.LOCK
    assert portability.start_rebuild(folder, one, command=command) is not None
    held = os.open(lock, os.O_RDONLY)
    shutil.rmtree(folder)
    end(0)
    fcntl.flock(held, fcntl.LOCK_SH)  # given when the rebuilding process has ended
    os.close(held)
    assert list(tmp_path.iterdir()) == []


def test_the_rebuild_outlives_its_caller(folder, gate):
    command, end = gate
    one = install(folder)
    code = (
        "import json, os, signal, sys\n"
        "from odtrt_lib import portability; from odtrt_lib.engine import passport\n"
        "one = passport.passports(sys.argv[1])[0]\n"
        "assert portability.start_rebuild(sys.argv[1], one, command=json.loads(sys.argv[2]))\n"
        "os.kill(0, signal.SIGINT)\n"
    )
    caller = [sys.executable, "-c", code, str(folder), json.dumps(command)]
    done = subprocess.run(caller, check=False, start_new_session=True, capture_output=True)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert portability.rebuild_status(folder).state == "running"
    end(0)
    assert portability.wait_for_rebuild(folder).state == "done"
    assert passport.verify(folder, one) is None


def test_a_rebuild_whose_plan_cannot_be_used_either_counts_as_failed(folder, monkeypatch):
    """Or every start of the program would rebuild once more."""
    one = install(folder, machine=faults.T4)
    monkeypatch.setattr(rebuild, "this_environment", lambda plugin=None: HERE)
    monkeypatch.setattr(engine, "build", lambda *_, **__: None)
    request = {"folder": str(folder), "fingerprint": one.fingerprint, "plugin": None, "command": None}
    rest = {"inputs": "x", "force": False, "lock": None}
    assert rebuild.main([json.dumps({**request, **rest})]) == 1
    status = portability.rebuild_status(folder)
    assert status.state == "failed" and "built on Tesla T4" in status.message


def test_what_the_rebuild_asks_the_builder_for(folder):
    def settings(built, place):
        one = install(folder, **built)
        return rebuild._settings(folder, one, place)

    assert settings({"version_compatible": True, "hardware_compatibility": "ampere_plus"}, HERE) == {
        "precision": "fp32",
        "version_compatible": True,
        "hardware_compatibility": "ampere_plus",
    }
    on_orin = settings(
        {"hardware_compatibility": "ampere_plus"}, Environment(faults.ORIN, "tensorrt", "10.3.0")
    )
    assert "hardware_compatibility" not in on_orin, "JetPack has no such mode"
    rtx = {"runtime_library": "tensorrt_rtx", "version": "1.7.1.116", "compute_capabilities": ("8.6",)}
    ada = Environment(faults.RTX_4090, "tensorrt_rtx", "1.7.1.116")
    assert settings(rtx, ada)["compute_capabilities"] == ["8.9"], "the same targets would not help"
    assert settings({**rtx, "compute_capabilities": ("8.6", "8.9")}, ada)["compute_capabilities"] == [
        "8.6",
        "8.9",
    ]
    kept = {"batch_min_opt_max": [1, 4, 8], "memory_limit_mb": 900.5}
    assert settings({"settings": kept}, HERE)["batch"] == [1, 4, 8]
    assert settings({"settings": kept}, HERE)["memory"] == "900.5MiB"
    assert "memory" not in settings({"settings": kept}, Environment(faults.A30, "tensorrt", "10.3.0"))


@needs_tensorrt_rtx
def test_tensorrt_rtx_rebuilds_in_the_background(tmp_path):
    folder = faults.folder_to_build(tmp_path / "model")
    half, single = passport.passports(folder)
    (folder / "plans" / half.plan).write_bytes(b"damaged")
    assert portability.start_rebuild(folder, half) is not None
    status = portability.wait_for_rebuild(folder)
    assert status.state == "done"
    found = {one.precision: one for one in passport.passports(folder)}
    assert found["fp32"] == single and found["fp16"].fingerprint == half.fingerprint
    assert passport.verify(folder, found["fp16"]) is None and passport.verify(folder, single) is None
    (folder / "heads.onnx").write_bytes(b"no model")
    assert portability.start_rebuild(folder, half) is not None
    status = portability.wait_for_rebuild(folder)
    assert status.state == "failed" and "heads.onnx" in status.message and "\n" not in status.message
    assert passport.verify(folder, found["fp16"]) is None, "a failed rebuild leaves the old state"


# ---- the campaign --------------------------------------------------------------------------------------


def campaign(tmp_path, *arguments):
    out = tmp_path / "faults.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--out", str(out), *arguments]
    memory = Path("/dev/shm")  # where nothing waits for a disk
    environment = {**os.environ, **({"TMPDIR": str(memory)} if os.access(memory, os.W_OK) else {})}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(out.read_text())["rows"]
    total = {column: sum(row[column] for row in rows) for column in faults.COLUMNS}
    assert (done.returncode == 1) == any(total.values())
    return rows, total


@needs_tensorrt_rtx
def test_a_small_fault_campaign(tmp_path):
    numbers = ["--corruptions", "28", "--kills", "6", "--builds", "1", "--models", "40"]
    rows, total = campaign(tmp_path, *numbers)
    assert total == dict.fromkeys(faults.COLUMNS, 0), [
        row for row in rows if any(map(row.get, faults.COLUMNS))
    ]
    assert {row["seed"] for row in rows} == {20261122}
    kills = [row for row in rows if "at a line" in row["kind"]]
    assert len(kills) >= 3 and all(row["killed"] == row["trials"] == 6 for row in kills)
    assert all(row["left_over"] == 0 for row in rows if "left_over" in row)


@needs_tensorrt_rtx
@pytest.mark.parametrize(
    ("defect", "group", "columns"),
    [
        ("passport-first", "installs", ["lost_valid_plans"]),
        ("in-place", "installs", ["half_written"]),
        ("no-hash", "corruptions", ["wrong_loads"]),
        ("no-checksum", "corruptions", ["wrong_loads"]),
        ("no-lock", "company", ["lost_records"]),
        ("any-lock", "company", ["crashes"]),
        ("no-seal", "models", ["wrong_loads"]),
    ],
)
def test_the_campaign_finds_a_known_defect(tmp_path, defect, group, columns):
    numbers = (
        ["--kills", "16", "--corruptions", "28"] if group != "models" else ["--kills", "1", "--models", "80"]
    )
    _, total = campaign(tmp_path, "--defect", defect, "--only", group, *numbers)
    assert all(total[column] > 0 for column in columns)
