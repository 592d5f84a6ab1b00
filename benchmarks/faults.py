"""The fault campaign: plans and their passports are damaged, killed, mixed up and starved of disk.

    python benchmarks/faults.py                 writes results/faults.json; about fifteen minutes
    python benchmarks/faults.py --only models   writes the rows of this group anew and keeps the others
    python benchmarks/faults.py --seed 7 --kills 20 --only installs disks --out faults.json

The plans are real ones, of tiny models, built by TensorRT-RTX, which needs no GPU. Nothing is loaded here:
what is judged is whether the bytes would have been handed to the runtime. In the rows *model folder* ONNX
Runtime opens the folder, and what comes out of the network is compared to the bit. A trial goes wrong in one
of five ways, and a row counts each:

* ``crashes``: a reader ended by a signal, an exception or not at all.
* ``wrong_loads``: a verdict OK, a plan chosen or bytes handed out that are not those which were installed
  with the passport, or a passport that is not the one which was installed; a model folder that opens and
  answers otherwise (``silent_differences``), or with files of two generations (``mixed_generations``).
* ``lost_valid_plans``: a plan that nobody touched, or the old and the new of a pair, cannot be used any more.
* ``half_written``: a file under its final name that is not whole.
* ``lost_records``: a record that was in ``log.jsonl`` is not there any more.

Each corruption is read by a process of its own. A kill is SIGKILL: in the rows *at a line*, before the n-th
line that the child executes in the rooms that write, n going over the whole work; in the rows *at a moment*,
at a random time within the work's measured duration. ``--defect`` puts a known mistake into odtrt first, to
see that the campaign finds it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.synchronize
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import spec_cases

from odtrt_lib import bundle, portability, spec
from odtrt_lib import folder as folders
from odtrt_lib.bundle import archive as archives
from odtrt_lib.bundle import install as installs
from odtrt_lib.engine import passport as passports
from odtrt_lib.engine.passport import Machine, Passport, PluginIdentity
from odtrt_lib.errors import InputError, OdtrtError
from odtrt_lib.folder import atomic_write, read_log, sha256, staging, write_record
from odtrt_lib.portability import Action, Environment, policy, rebuild
from odtrt_lib.results import write_results

RESULTS = Path(__file__).resolve().parents[1] / "results" / "faults.json"
GROUPS = (
    "corruptions",
    "installs",
    "records",
    "rebuilds",
    "archives",
    "disks",
    "company",
    "mismatches",
    "builds",
    "models",
)
COLUMNS = ("crashes", "wrong_loads", "lost_valid_plans", "half_written", "lost_records")
Row = dict[str, Any]
VICTIM, OTHER = "1" * 16, "2" * 16
RTX = "1.7.1.116"
ARCHIVE, UNPACKED = "tiny.odtrt.zip", "unpacked"
SECONDS_A_READER = 120

# ---------------------------------------------------------------------------------------------- the folder

SPEC = spec_cases.example(
    spec_cases.ssd(256, 2, True),
    spec.NmsSpec(0.5, 0.5, 10, 10, False, True),
    spec_cases.network_input(16, 16),
    name="tiny",
    labels=spec_cases.named("a", "b"),
)


def onnx_model(seed: int) -> bytes:
    """A convolution, cut into the heads of :data:`SPEC`; the seed makes the weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(seed).normal(size=(7, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weights"], ["map"], pads=[1] * 4),
            helper.make_node("Reshape", ["map", "rows"], ["heads"]),
            helper.make_node("Split", ["heads", "columns"], ["box_encodings", "class_logits"], axis=2),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 16, 16])],
        [
            helper.make_tensor_value_info("box_encodings", TensorProto.FLOAT, [1, 256, 4]),
            helper.make_tensor_value_info("class_logits", TensorProto.FLOAT, [1, 256, 3]),
        ],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([1, 256, 7]), "rows"),
            numpy_helper.from_array(np.array([4, 3]), "columns"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def build_plans(count: int) -> list[bytes]:
    """Plans of as many tiny models, built by TensorRT-RTX; it must be :data:`RTX`.

    In a process of its own: this one forks, and must not have the builder's threads.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_build_plans, (count,))


def _build_plans(count: int) -> list[bytes]:
    import tensorrt_rtx as trt

    if trt.__version__ != RTX:
        sys.exit(f"TensorRT-RTX {trt.__version__} is installed, the campaign wants {RTX}")
    logger = trt.Logger(trt.Logger.ERROR)
    plans = []
    for seed in range(count):
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(onnx_model(seed)):
            sys.exit(f"TensorRT-RTX refuses the tiny model: {parser.get_error(0)}")
        plans.append(bytes(builder.build_serialized_network(network, builder.create_builder_config())))
    return plans


def describe(plan: bytes, fingerprint: str, folder: Path, **changes: Any) -> Passport:
    """The passport of a plan that TensorRT-RTX built without a GPU from the model in ``folder``."""
    digest = hashlib.sha256(plan).hexdigest()
    fields: dict[str, Any] = {
        "fingerprint": fingerprint,
        "plan": f"{fingerprint}-{digest[:8]}.plan",
        "plan_sha256": digest,
        "plan_bytes": len(plan),
        "model": "heads.onnx",
        "onnx_sha256": sha256(folder / "heads.onnx"),
        "spec_sha256": sha256(folder / "spec.json"),
        "runtime_library": "tensorrt_rtx",
        "version": RTX,
        "precision": "fp32",
        "version_compatible": False,
        "hardware_compatibility": "none",
        "compute_capabilities": ("default",),
        "plugin": None,
        "machine": Machine("Linux", "x86_64"),
        "settings": {"workspace_mb": 64},
        "layers": {"FP32": 2},
        "attempts": ({"name": "as asked", "outcome": "ok", "seconds": 0.5, "samples": [[0.0, 100, None]]},),
        "trtexec": "",
        "seconds": 0.5,
        "built": "2026-01-01T00:00:00+00:00",
    }
    return Passport(**{**fields, **changes})


HERE = Environment(
    Machine("Linux", "x86_64", "NVIDIA RTX 4090", "8.9", 128, 24564, "580.1", "13.0"), "tensorrt_rtx", RTX
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Three plans, a folder that holds the first two, and their passports by fingerprint."""

    plans: tuple[bytes, ...]
    folder: Path
    scratch: Path
    installed: Mapping[str, Passport]

    def copy(self) -> Path:
        """A fresh copy under a name of its own, as what an earlier trial started may still write into its."""
        for earlier in self.scratch.glob("trial-*"):
            remove(earlier)
        target = Path(tempfile.mkdtemp(prefix="trial-", dir=self.scratch))
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        return target


def remove(path: Path) -> None:
    """Removes a folder with whatever a trial has put into it."""
    shutil.rmtree(path, ignore_errors=True)
    if path.is_file() or path.is_symlink():
        path.unlink()


def make_bench(scratch: Path, plans: Sequence[bytes]) -> Bench:
    """Installs the first two plans in a new folder, as a build does."""
    folder = scratch / "model"
    folder.mkdir()
    (folder / "heads.onnx").write_bytes(onnx_model(0))
    (folder / "spec.json").write_text(SPEC.to_json())
    np.save(folder / "anchors.npy", np.full((SPEC.heads.num_anchors, 4), 0.5, np.float32))
    folders.seal(folder)
    installed = {}
    for fingerprint, plan in ((VICTIM, plans[0]), (OTHER, plans[1])):
        installed[fingerprint] = describe(plan, fingerprint, folder)
        install(folder, plan, installed[fingerprint])
        record(folder)
    return Bench(tuple(plans), folder, scratch, installed)


def install(folder: Path, plan: bytes, passport: Passport) -> None:
    """What a build does at its end."""
    with staging(folder) as out:
        (out / "plan").write_bytes(plan)
        passports.install(folder, out / "plan", passport)


def record(folder: Path) -> None:
    """What every stage does at its end."""
    write_record(
        folder,
        "engine",
        inputs={},
        settings={},
        outputs=[],
        versions={},
        seconds=0.0,
        peak_rss_mb=0.0,
        checks={},
    )


# --------------------------------------------------------------------------------------------- the readers


def read_everything(folder: Path) -> dict[str, Any]:
    """What the readers say of a folder, as JSON: the verdicts, the plan chosen, the bytes handed out."""
    found, damaged = passports.survey(folder)
    chosen = portability.best_plan(folder, HERE)
    said: dict[str, Any] = {
        "ok": {},
        "chosen": None if chosen is None else chosen.to_json(),
        "damaged": damaged,
        "reasons": {},
        "status": portability.rebuild_status(folder).state,
    }
    for one in found:
        verdict = portability.check(folder, one, HERE)
        said["reasons"][one.fingerprint] = list(verdict.reasons)
        problem = passports.verify(folder, one)
        try:
            handed_out = hashlib.sha256(passports.read_plan(folder, one)).hexdigest()
        except InputError as error:
            handed_out = None
            str(error).encode()
        passports.plan_version(folder / "plans" / one.plan)
        if verdict.action is Action.OK:
            said["ok"][one.fingerprint] = {"passport": one.to_json(), "handed_out": handed_out}
        elif problem is None and handed_out is None:
            raise AssertionError(f"{one.plan}: verify and read_plan disagree")
    for text in (*damaged.values(), *(reason for all_ in said["reasons"].values() for reason in all_)):
        if "\n" in text or not text:
            raise AssertionError(f"not one line: {text!r}")
        text.encode("utf-8")
    return said


def in_child(work: Callable[[], Any], *, at_line: int | None = None) -> tuple[int, Any]:
    """Runs ``work`` in a process of its own: its wait status, and what it returned, through JSON.

    at_line: kill it before so many lines of odtrt's writing rooms have run.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 3
        try:
            os.close(reading)
            signal.alarm(SECONDS_A_READER)
            counted = step(at_line)
            answer = work()
            sys.settrace(None)
            with os.fdopen(writing, "w") as pipe:
                json.dump({"answer": answer, "lines": counted[0]}, pipe)
            status = 0
        except OdtrtError as error:
            status = 2  # first: a trial that limits the size of files can limit this one
            print(f"(in a trial: {error})", file=sys.stderr)
        except BaseException as error:
            print(f"(in a trial: {type(error).__name__}: {error})", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, json.loads(text) if text else None


def step(at_line: int | None) -> list[int]:
    """Counts this process's lines in the rooms that write; SIGKILL before line ``at_line``."""
    counted = [0]
    if at_line is None:
        return counted
    modules = (folders, passports, policy, rebuild, archives, installs)
    watched = {module.__file__ for module in modules} | {__file__}

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            counted[0] += 1
            if counted[0] == at_line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    return counted


def judge(
    folder: Path, allowed: Mapping[str, Sequence[Passport]], untouched: Sequence[str] = ()
) -> tuple[dict[str, int], Any]:
    """Counts what is wrong with a folder after a trial, by what readers in a process of their own say.

    allowed: fingerprint -> what may be found under it. untouched: fingerprints of which one must be usable.
    """
    tally = dict.fromkeys(COLUMNS, 0)
    status, answer = in_child(lambda: read_everything(folder))
    if status != 0:
        tally["crashes"] = 1
        return tally, None
    said = answer["answer"]
    texts = {one: [passport.to_json() for passport in many] for one, many in allowed.items()}
    for fingerprint, ok in said["ok"].items():
        passport = json.loads(ok["passport"])
        path = folder / "plans" / passport["plan"]
        is_true = (
            ok["passport"] in texts.get(fingerprint, [])
            and ok["handed_out"] == passport["plan_sha256"]
            and hashlib.sha256(path.read_bytes()).hexdigest() == passport["plan_sha256"]
        )
        tally["wrong_loads"] += not is_true
    if said["chosen"] is not None:
        chosen = json.loads(said["chosen"])
        tally["wrong_loads"] += said["chosen"] not in texts.get(chosen["fingerprint"], [])
        tally["wrong_loads"] += chosen["fingerprint"] not in said["ok"]
    tally["lost_valid_plans"] = sum(fingerprint not in said["ok"] for fingerprint in untouched)
    if untouched and said["chosen"] is None:
        tally["lost_valid_plans"] += 1
    return tally, said


def half_written(folder: Path) -> int:
    """How many files have a final name and are not whole."""
    count = 0
    for path in (folder / "plans").glob("*.plan"):
        count += sha256(path)[:8] != path.stem.split("-")[-1]
    for path in [*(folder / "plans").glob("[!.]*.json"), folder / "plans" / rebuild.STATUS]:
        with contextlib.suppress(FileNotFoundError):
            try:
                json.loads(path.read_text())
            except ValueError:
                count += 1
    if not (folder / ARCHIVE).is_file():
        return count
    try:
        with zipfile.ZipFile(folder / ARCHIVE) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, EOFError):
        return count + 1
    found = {
        path.relative_to(folder / UNPACKED).as_posix(): path.read_bytes()
        for path in (folder / UNPACKED).rglob("*")
        if path.is_file() and path.name != folders.LOG  # unpack seals what it wrote
    }
    return count + ((folder / UNPACKED).exists() and found != members)


# ----------------------------------------------------------------------------------------- the corruptions


def rewrite(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def zero(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    size = min(chance.choice((16, 512, 4096)), len(data) - start)
    data[start : start + size] = bytes(size)


def edit(path: Path, change: Callable[[dict[str, Any]], None], is_sealed: bool = True) -> None:
    """Changes the JSON; sealed as an attacker or a buggy writer would, with a checksum that agrees."""
    data = json.loads(path.read_text())
    change(data)
    if is_sealed:
        data["check"] = passports._checksum(data)
    path.write_text(json.dumps(data))


def wrong_type(data: dict[str, Any], chance: random.Random) -> None:
    names = [name for name in data if name not in ("check", "settings")]
    name = chance.choice(names)
    values = [None, True, -1, 1e400, "x", [], {}, [[]], {"a": []}, "\ud800", 1 << 70, float("nan")]
    wrong = [value for value in values if type(value) is not type(data[name])]
    data[name] = chance.choice(wrong)


def forget(data: dict[str, Any], chance: random.Random) -> None:
    del data[chance.choice([name for name in data if name != "check"])]


def other_name(data: dict[str, Any], chance: random.Random) -> None:
    names = (
        "../../heads.onnx",
        "/etc/passwd",
        "a" * 5000 + ".plan",
        "",
        "x\0.plan",
        f"{OTHER}-00000000.plan",
    )
    data["plan"] = chance.choice(names)


def in_place_of(path: Path, make: Callable[[Path], None]) -> None:
    remove(path)
    make(path)


def sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 33)


def nested(path: Path) -> None:
    path.write_text('{"schema": 2, "settings": ' + "[" * 200_000)


def strange_names(plans: Path, chance: random.Random) -> None:
    """Files that nobody of ours wrote."""
    names = [
        b"x.json",
        b"\xff\xfe.json",
        b"a" * 250 + b".json",
        b"a\nb.json",
        b"3" * 16 + b".json",
        b".json",
        b"x.plan",
    ]
    for name in chance.sample(names, 4):
        Path(os.fsdecode(bytes(plans) + b"/" + name)).write_bytes(chance.choice((b"", b"{}", b"\xff")))


# Name -> what it does to the victim; it gets the plan's path, the passport's, and the rest.
CORRUPTIONS: dict[str, Callable[[Path, Path, Bench, random.Random], None]] = {
    "plan: cut off": lambda plan, _, __, chance: os.truncate(plan, chance.randrange(plan.stat().st_size)),
    "plan: bits flipped": lambda plan, _, __, chance: rewrite(plan, lambda data: flip(data, chance)),
    "plan: block of zeros": lambda plan, _, __, chance: rewrite(plan, lambda data: zero(data, chance)),
    "plan: empty": lambda plan, *_: os.truncate(plan, 0),
    "plan: bytes appended": lambda plan, _, __, chance: rewrite(
        plan, lambda data: data.extend(chance.randbytes(chance.choice((1, 7, 4096))))
    ),
    "plan: another valid plan": lambda plan, _, bench, chance: plan.write_bytes(
        chance.choice(bench.plans[1:])
    ),
    "plan: missing": lambda plan, *_: plan.unlink(),
    "plan: a folder": lambda plan, *_: in_place_of(plan, Path.mkdir),
    "plan: a named pipe": lambda plan, *_: in_place_of(plan, os.mkfifo),
    "plan: a link to itself": lambda plan, *_: in_place_of(plan, lambda path: path.symlink_to(path.name)),
    "passport: cut off": lambda _, paper, __, chance: os.truncate(
        paper, chance.randrange(paper.stat().st_size)
    ),
    "passport: bits flipped": lambda _, paper, __, chance: rewrite(paper, lambda data: flip(data, chance)),
    "passport: block of zeros": lambda _, paper, __, chance: rewrite(paper, lambda data: zero(data, chance)),
    "passport: empty": lambda _, paper, *__: os.truncate(paper, 0),
    "passport: random bytes": lambda _, paper, __, chance: paper.write_bytes(chance.randbytes(900)),
    "passport: of another plan": lambda plan, paper, *_: shutil.copy(plan.parent / f"{OTHER}.json", paper),
    "passport: missing": lambda _, paper, *__: paper.unlink(),
    "passport: wrong types": lambda _, paper, __, chance: edit(paper, lambda data: wrong_type(data, chance)),
    "passport: field missing": lambda _, paper, __, chance: edit(paper, lambda data: forget(data, chance)),
    "passport: field altered, old checksum": lambda _, paper, __, chance: edit(
        paper, lambda data: data.update(precision="fp16", seconds=chance.random()), is_sealed=False
    ),
    "passport: names another file": lambda _, paper, __, chance: edit(
        paper, lambda data: other_name(data, chance)
    ),
    "passport: other schema": lambda _, paper, __, chance: edit(
        paper, lambda data: data.update(schema=chance.choice((1, 3, "2", None, True, 2.5)))
    ),
    "passport: 8 GiB": lambda _, paper, *__: sparse(paper),
    "passport: nested 200 000 deep": lambda _, paper, *__: nested(paper),
    "passport: a folder": lambda _, paper, *__: in_place_of(paper, Path.mkdir),
    "passport: a named pipe": lambda _, paper, *__: in_place_of(paper, os.mkfifo),
    "folder: strange names": lambda plan, _, __, chance: strange_names(plan.parent, chance),
    "folder: rebuild record damaged": lambda plan, _, __, chance: (plan.parent / rebuild.STATUS).write_bytes(
        chance.choice((b"", b"{", b"[]", b'{"state": 1}', b'{"state": "done", "failures": 3}', b"\xff"))
    ),
}

HARMLESS = ("folder: strange names", "folder: rebuild record damaged")


def corrupt(bench: Bench, trials: int, chance: random.Random) -> list[Row]:
    """Each corruption so many times that there are at least ``trials`` of them together."""
    allowed = {one: [passport] for one, passport in bench.installed.items()}
    rows = []
    for kind, damage in CORRUPTIONS.items():
        row = new_row(kind, found=0)
        for _ in range(-(-trials // len(CORRUPTIONS))):
            plans = bench.copy() / "plans"
            damage(plans / bench.installed[VICTIM].plan, plans / f"{VICTIM}.json", bench, chance)
            tally, said = judge(plans.parent, allowed, [VICTIM, OTHER] if kind in HARMLESS else [OTHER])
            row["trials"] += 1
            row["found"] += said is not None and VICTIM not in said["ok"]
            count(row, tally)
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------- the kills


@dataclasses.dataclass(frozen=True)
class Work:
    """Something that is killed on its way through a folder."""

    group: str
    name: str
    run: Callable[[Path], Any]


def newer(bench: Bench) -> Passport:
    """The passport of the third plan, which takes the victim's place."""
    return describe(bench.plans[2], VICTIM, bench.folder, built="2026-01-02T00:00:00+00:00")


def works(bench: Bench) -> list[Work]:
    """What writes into the folder: a plan that replaces the victim, a record, a rebuild, an archive."""
    new = newer(bench)

    def replace(folder: Path) -> None:
        install(folder, bench.plans[2], new)

    def rebuild_once(folder: Path) -> None:
        """start_rebuild and the rebuilding process in one, so that both are stepped through."""
        from odtrt_lib import engine

        def main(
            folder: Path, passport: Passport, _: Any, __: Any, inputs: str, force: bool, ___: int
        ) -> int:
            request = {"folder": str(folder), "fingerprint": passport.fingerprint, "inputs": inputs}
            rest = {"plugin": None, "command": None, "force": True, "lock": None}
            return rebuild.main([json.dumps({**request, **rest})])

        rebuild._spawn = main
        rebuild.this_environment = lambda plugin=None: HERE
        engine.build = lambda folder, **_: replace(Path(folder))
        with contextlib.redirect_stdout(None):
            portability.start_rebuild(folder, bench.installed[VICTIM])

    def archive(folder: Path) -> None:
        bundle.pack(folder, folder / ARCHIVE)
        bundle.unpack(folder / ARCHIVE, folder / UNPACKED, force=True)

    return [
        Work("installs", "passport.install", replace),
        Work("records", "folder.write_record", record),
        Work("rebuilds", "rebuild", rebuild_once),
        Work("archives", "bundle.pack and unpack", archive),
    ]


def kill_everywhere(bench: Bench, work: Work, trials: int, chance: random.Random) -> list[Row]:
    """Kills the work at lines spread over all of it, then at random moments."""
    folder = bench.copy()
    status, answer = in_child(lambda: work.run(folder), at_line=1 << 40)
    if status != 0:
        sys.exit(f"{work.name} does not work undisturbed: status {status}")
    lines = answer["lines"]
    by_line = new_row(f"kill -9 at a line: {work.name}", killed=0, lines=lines, left_over=0)
    count = min(trials, lines)
    for number in range(count):
        folder = bench.copy()
        status, _ = in_child(functools.partial(work.run, folder), at_line=1 + number * lines // count)
        by_line["killed"] += status == -signal.SIGKILL
        after_kill(bench, folder, work, by_line)

    by_moment = new_row(f"kill -9 at a moment: {work.name}", killed=0, left_over=0)
    durations = []
    for _ in range(5):
        folder = bench.copy()
        start = time.perf_counter()
        killed_after(functools.partial(work.run, folder), SECONDS_A_READER)
        durations.append(time.perf_counter() - start)
    duration = min(durations)
    by_moment["work_ms"] = round(1e3 * duration, 1)
    for _ in range(trials):
        folder = bench.copy()
        status = killed_after(functools.partial(work.run, folder), chance.uniform(0, 1.2 * duration))
        by_moment["killed"] += status == -signal.SIGKILL
        after_kill(bench, folder, work, by_moment)
    return [by_line, by_moment]


def killed_after(work: Callable[[], Any], seconds: float) -> int:
    """Runs ``work`` in a process of its own and kills it after ``seconds``; its exit code."""
    process = os.fork()
    if process == 0:
        status = 3
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0002)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def after_kill(bench: Bench, folder: Path, work: Work, row: Row) -> None:
    """Judges the folder as the kill left it, and again after the same work was done in peace."""
    new = newer(bench)
    allowed = {VICTIM: [bench.installed[VICTIM], new], OTHER: [bench.installed[OTHER]]}

    def redo(folder: Path) -> None:
        install(folder, bench.plans[2], new)
        record(folder)
        if work.group == "archives":
            work.run(folder)

    row["trials"] += 1
    count(row, {"half_written": half_written(folder), "lost_records": lost_records(bench, folder)})
    count(row, judge(folder, allowed, [VICTIM, OTHER])[0])
    status, _ = in_child(lambda: redo(folder))
    tally, said = judge(folder, {**allowed, VICTIM: [new]}, [VICTIM, OTHER])
    is_stuck = said is not None and said["status"] == "running"
    count(row, {**tally, "crashes": tally["crashes"] + (status != 0 or is_stuck)})
    row["left_over"] += sum(
        path.name.startswith((".staging-", ".commit-"))
        or (path.suffix == ".tmp" and rebuild.STATUS not in path.name)
        for path in folder.rglob("*")
    )


def lost_records(bench: Bench, folder: Path) -> int:
    """How many records of the log are gone; all where it cannot be read."""
    before = len(read_log(bench.folder))
    try:
        return max(0, before - len(read_log(folder)))
    except OdtrtError:
        return before


def kill_real_rebuilds(bench: Bench, trials: int, chance: random.Random) -> list[Row]:
    """start_rebuild with TensorRT-RTX's builder in the background, killed while it works."""
    row = new_row("kill -9 at a moment: start_rebuild, TensorRT-RTX builds", killed=0)
    source = folder_to_build(bench.scratch / "real")
    before = passports.passports(source)
    start = time.perf_counter()
    if portability.start_rebuild(source, before[0]) is None:
        sys.exit("the rebuild could not be started")
    ended = portability.wait_for_rebuild(source)
    if ended.state != "done":
        sys.exit(f"the rebuild does not work undisturbed: {ended.message}")
    duration = time.perf_counter() - start
    row["work_ms"] = round(1e3 * duration, 1)
    for number in range(trials):
        folder = bench.scratch / f"real-{number}"
        shutil.copytree(source, folder)
        process = portability.start_rebuild(folder, before[0], force=True)
        time.sleep(chance.uniform(0, duration))
        is_running = portability.rebuild_status(folder).state == "running"
        if process is not None and is_running:
            os.kill(process, signal.SIGKILL)
            row["killed"] += 1
        ended = portability.wait_for_rebuild(folder)
        found = {passport.fingerprint: passport for passport in passports.passports(folder)}
        row["trials"] += 1
        usable = [one for one in found.values() if passports.verify(folder, one) is None]
        count(
            row,
            {
                "crashes": process is None or ended.state not in ("failed", "done"),
                "lost_valid_plans": len(before) - len(usable),
                "half_written": half_written(folder),
            },
        )
    return [row]


def folder_to_build(folder: Path) -> Path:
    """A model folder that :func:`odtrt_lib.engine.build` takes, with two plans that it built."""
    from tiny_model import model_folder

    from odtrt_lib import engine

    model_folder(folder)
    engine.build(folder)
    engine.build(folder, precision="fp16")
    return folder


# --------------------------------------------------------------------------------- full disks and company


@contextlib.contextmanager
def small_disk(path: Path, kib: int) -> Iterator[Path | None]:
    """A tmpfs of so many KiB at ``path``; None where this process may not mount one."""
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill_disks(bench: Bench, trials: int, chance: random.Random) -> list[Row]:
    """Installs and writes records where the space ends on the way; each must say so and change nothing."""
    kib = 4 + sum(-(-path.stat().st_size // 4096) * 4 for path in bench.folder.rglob("*"))
    size = len(bench.plans[2])
    tmpfs, limit = new_row("full disk: tmpfs", refused=0), new_row("full disk: RLIMIT_FSIZE", refused=0)
    read_only = new_row("read-only file system", refused=0)

    def write(folder: Path) -> None:
        install(folder, bench.plans[2], newer(bench))
        record(folder)

    def attempt(folder: Path, row: Row, work: Callable[[Path], None] = write) -> None:
        allowed = {VICTIM: [bench.installed[VICTIM], newer(bench)], OTHER: [bench.installed[OTHER]]}
        status, _ = in_child(lambda: work(folder))
        row["trials"] += 1
        row["refused"] += status == 2
        tally, _ = judge(folder, allowed, [VICTIM, OTHER])
        count(row, {**tally, "crashes": tally["crashes"] + (status not in (0, 2))})
        count(row, {"half_written": half_written(folder), "lost_records": lost_records(bench, folder)})

    for _ in range(trials):
        with small_disk(bench.scratch / "disk", kib + chance.randrange(0, 2 * size // 1024 + 40, 4)) as disk:
            if disk is not None:
                shutil.copytree(bench.folder, disk / "trial")
                attempt(disk / "trial", tmpfs)
        most = chance.randrange(0, int(1.5 * size))

        def limited(folder: Path, most: int = most) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            write(folder)

        attempt(bench.copy(), limit, limited)
    with small_disk(bench.scratch / "disk", kib + 400) as disk:
        if disk is not None:
            shutil.copytree(bench.folder, disk / "trial")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            for _ in range(-(-trials // 4)):
                attempt(disk / "trial", read_only)
                started = portability.start_rebuild(disk / "trial", bench.installed[VICTIM], command=["true"])
                read_only["crashes"] += started is not None
    return [row for row in (tmpfs, limit, read_only) if row["trials"]]


MEETING: multiprocessing.synchronize.Barrier | None = None  # of the processes of the latest `together`


def together(works: Sequence[Callable[[], Any]]) -> list[int]:
    """Runs each in a process of its own, all from the same moment on; their exit codes.

    0: it returned something false, 1: something true, 3: it failed.
    """
    global MEETING
    MEETING = multiprocessing.Barrier(len(works))
    waiting, gate = os.pipe()
    processes = []
    for work in works:
        process = os.fork()
        if process == 0:
            status = 3
            try:
                os.close(gate)
                signal.alarm(SECONDS_A_READER)
                os.read(waiting, 1)
                status = int(bool(work()))
            except BaseException as error:
                print(f"(in a trial: {type(error).__name__}: {error})", file=sys.stderr)
            finally:
                os._exit(status)
        processes.append(process)
    os.close(waiting)
    os.close(gate)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def crowd(bench: Bench, trials: int) -> list[Row]:
    """Several processes at once: rebuilders, of which one may begin; installers; writers; a reader."""
    others = [
        describe(bench.plans[2] + bytes([n]), VICTIM, bench.folder, built=f"2026-02-0{n + 1}T00:00:00+00:00")
        for n in range(4)
    ]
    return [
        crowd_of_rebuilders(bench, trials),
        crowd_of_installers(bench, others, trials),
        crowd_of_writers(bench, trials),
        crowd_with_a_reader(bench, others, trials),
    ]


def crowd_of_rebuilders(bench: Bench, trials: int) -> Row:
    row = new_row("four rebuilders at once", begun=0)
    unchanged = {one: [passport] for one, passport in bench.installed.items()}

    def start(folder: Path, command: Sequence[str]) -> bool:
        rebuild.this_environment = lambda plugin=None: HERE
        return portability.start_rebuild(folder, bench.installed[VICTIM], command=command) is not None

    for _ in range(trials):
        folder = bench.copy()
        end = folder / "end"
        os.mkfifo(end)
        descriptor = os.open(end, os.O_RDWR)
        command = ["sh", "-c", 'read line < "$0"', str(end)]
        codes = together([functools.partial(start, folder, command)] * 4)
        is_running = portability.rebuild_status(folder).state == "running"
        os.write(descriptor, b"\n")
        ended = portability.wait_for_rebuild(folder)
        os.close(descriptor)
        row["trials"] += 1
        row["begun"] += codes.count(1)
        is_right = sorted(codes) == [0, 0, 0, 1] and is_running and ended.state == "done"
        count(row, judge(folder, unchanged, [VICTIM, OTHER])[0])
        row["crashes"] += not is_right
    return row


def replace_plan(bench: Bench, folder: Path, others: Sequence[Passport], number: int) -> None:
    install(folder, bench.plans[2] + bytes([number]), others[number])


def crowd_of_installers(bench: Bench, others: Sequence[Passport], trials: int) -> Row:
    row = new_row("four installers at once")
    allowed = {**{one: [passport] for one, passport in bench.installed.items()}, VICTIM: others}
    for _ in range(trials):
        folder = bench.copy()
        codes = together(
            [functools.partial(replace_plan, bench, folder, others, number) for number in range(4)]
        )
        row["trials"] += 1
        count(row, judge(folder, allowed, [VICTIM, OTHER])[0])
        count(row, {"half_written": half_written(folder), "crashes": any(codes)})
    return row


def crowd_of_writers(bench: Bench, trials: int) -> Row:
    row = new_row("four writers of records at once")

    def write(folder: Path) -> None:
        for _ in range(10):
            record(folder)

    for _ in range(trials):
        folder = bench.copy()
        codes = together([functools.partial(write, folder)] * 4)
        row["trials"] += 1
        count(row, {"crashes": any(codes)})
        count(row, {"lost_records": len(read_log(bench.folder)) + 40 - len(read_log(folder))})
    return row


def crowd_with_a_reader(bench: Bench, others: Sequence[Passport], trials: int) -> Row:
    row = new_row("a reader beside an installer")

    def replace_often(folder: Path) -> None:
        for number in range(20):
            replace_plan(bench, folder, others, number % 4)

    def find_always(folder: Path) -> bool:
        return all(portability.best_plan(folder, HERE) is not None for _ in range(100))

    for _ in range(trials):
        folder = bench.copy()
        (folder / "plans" / f"{OTHER}.json").unlink()
        codes = together([functools.partial(replace_often, folder), functools.partial(find_always, folder)])
        row["trials"] += 1
        count(row, {"crashes": codes[0] != 0 or codes[1] not in (0, 1), "lost_valid_plans": codes[1] == 0})
    return row


# ------------------------------------------------------------------------------------- planted mismatches

A100 = Machine("Linux", "x86_64", "NVIDIA A100-SXM4-40GB", "8.0", 108, 40326, "550.54.15", "12.4")
A30 = Machine("Linux", "x86_64", "NVIDIA A30", "8.0", 56, 24062, "550.54.15", "12.4")
RTX_4090 = Machine("Linux", "x86_64", "NVIDIA GeForce RTX 4090", "8.9", 128, 24081, "550.54.15", "12.4")
T4 = Machine("Linux", "x86_64", "Tesla T4", "7.5", 40, 15095, "550.54.15", "12.4")
ORIN = Machine("Linux", "aarch64", "Orin", "8.7", 16, 62841, "540.4.0", "12.6", "R36.4.3")
ORIN_NX = dataclasses.replace(ORIN, sm_count=8, gpu_memory_mb=15655)
GB10 = Machine("Linux", "aarch64", "NVIDIA GB10", "12.1", 48, 122570, "580.95", "13.0")
NO_GPU = Machine("Linux", "x86_64")
PLUGIN = PluginIdentity("libodtrt_tensorrt.so", "a" * 64, "IPluginV3")


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A plan and a place that one row of the policy is about, and what must come out, written by hand.

    built, place: changes to the passport and to :class:`Environment`; the rest is a plan of TensorRT 10.3.0
    built on an A100, checked on the same machine. helps: whether a rebuild does. harm: done to the folder.
    """

    rule: str
    action: str
    helps: bool = False
    built: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    header: tuple[int, int, int, int] = (10, 3, 0, 26)
    harm: Callable[[Path, Path], Any] = lambda folder, plan: None


def _rot(folder: Path) -> None:
    folders.seal(folder)
    (folder / "heads.onnx").write_bytes(b"rotten")


def _flip(plan: Path) -> None:
    data = bytearray(plan.read_bytes())
    data[100] ^= 1
    plan.write_bytes(data)


_RTX_PLAN = {
    "runtime_library": "tensorrt_rtx",
    "version": RTX,
    "compute_capabilities": ("default",),
    "machine": NO_GPU,
}
_RTX_HERE = {"runtime_library": "tensorrt_rtx", "version": RTX}
_VC = {"version_compatible": True}
_AMPERE = {"hardware_compatibility": "ampere_plus"}
_SAME = {"hardware_compatibility": "same_compute_capability"}
_V86 = {"version": "8.6.1"}
_H86 = (8, 6, 1, 6)
_HRTX = (1, 7, 1, 116)

MISMATCHES = (
    Mismatch("plan missing", "refuse", True, harm=lambda _, plan: plan.unlink()),
    Mismatch("plan of another size", "refuse", True, harm=lambda _, plan: os.truncate(plan, 99)),
    Mismatch("plan damaged", "refuse", True, harm=lambda _, plan: _flip(plan)),
    Mismatch("header disagrees", "refuse", True, {"version": "10.4.0"}, {"version": "10.4.0"}),
    Mismatch(
        "model changed", "rebuild", True, harm=lambda folder, _: (folder / "heads.onnx").write_bytes(b"")
    ),
    Mismatch(
        "model changed", "rebuild", True, harm=lambda folder, _: (folder / "spec.json").write_bytes(b"")
    ),
    Mismatch("model damaged", "ok", harm=lambda folder, _: _rot(folder)),
    Mismatch("model absent", "ok", harm=lambda folder, _: (folder / "heads.onnx").unlink()),
    Mismatch("other system", "rebuild", True, place={"machine": dataclasses.replace(A100, system="Windows")}),
    Mismatch(
        "other system", "rebuild", True, place={"machine": dataclasses.replace(A100, architecture="aarch64")}
    ),
    Mismatch(
        "other architecture, RTX", "rebuild", True, _RTX_PLAN, {**_RTX_HERE, "machine": GB10}, header=_HRTX
    ),
    Mismatch("no library", "rebuild", place={"runtime_library": None, "version": None}),
    Mismatch("other library", "rebuild", True, place=_RTX_HERE),
    Mismatch("other library", "rebuild", True, _RTX_PLAN, header=_HRTX),
    Mismatch("same version", "ok"),
    Mismatch("other version, RTX", "rebuild", True, _RTX_PLAN, {**_RTX_HERE, "version": "1.7.2.3"}, _HRTX),
    Mismatch("older library", "rebuild", True, place={"version": "10.2.0"}),
    Mismatch("older library", "rebuild", True, _VC, {"version": "8.6.1"}),
    Mismatch("newer minor, version-compatible", "ok", built=_VC, place={"version": "10.13.3"}),
    Mismatch("newer minor", "rebuild", True, place={"version": "10.13.3"}),
    Mismatch("newer minor", "rebuild", True, place={"version": "10.3.1"}),
    Mismatch("newer major, version-compatible", "ok", False, {**_VC, **_V86}, header=_H86),
    Mismatch("newer major, version-compatible", "ok", False, _VC, {"version": "11.4.1"}),
    Mismatch("newer major", "rebuild", True, {**_VC, **_V86}, {"version": "11.1.0"}, _H86),
    Mismatch("newer major", "rebuild", True, _V86, header=_H86),
    Mismatch("newer major", "rebuild", True, place={"version": "11.0.0"}),
    Mismatch("no GPU", "rebuild", place={"machine": NO_GPU}),
    Mismatch("GPU of the build unknown", "rebuild", True, {"machine": NO_GPU}),
    Mismatch("same GPU", "ok"),
    Mismatch(
        "same GPU, other size", "rebuild", True, place={"machine": dataclasses.replace(A100, sm_count=42)}
    ),
    Mismatch(
        "same GPU, other size",
        "rebuild",
        True,
        place={"machine": dataclasses.replace(A100, gpu_memory_mb=9856)},
    ),
    Mismatch("same GPU, other size", "rebuild", True, {"machine": ORIN}, {"machine": ORIN_NX}),
    Mismatch("other GPU model", "rebuild", True, place={"machine": A30}),
    Mismatch("other compute capability", "rebuild", True, place={"machine": RTX_4090}),
    Mismatch(
        "hardware-compatible on a Jetson", "rebuild", True, {**_SAME, "machine": ORIN}, {"machine": ORIN_NX}
    ),
    Mismatch("hardware-compatible on a Jetson", "rebuild", True, _AMPERE, {"machine": ORIN}),
    Mismatch("ampere_plus", "ok", built=_AMPERE, place={"machine": RTX_4090}),
    Mismatch("ampere_plus, older GPU", "rebuild", True, _AMPERE, {"machine": T4}),
    Mismatch("same_compute_capability", "ok", built=_SAME, place={"machine": A30}),
    Mismatch("same_compute_capability, other one", "rebuild", True, _SAME, {"machine": RTX_4090}),
    Mismatch("GPU among the targets, RTX", "ok", False, _RTX_PLAN, {**_RTX_HERE, "machine": RTX_4090}, _HRTX),
    Mismatch(
        "GPU not among the targets, RTX", "rebuild", True, _RTX_PLAN, {**_RTX_HERE, "machine": T4}, _HRTX
    ),
    Mismatch(
        "GPU not among the targets, RTX",
        "rebuild",
        True,
        {**_RTX_PLAN, "compute_capabilities": ("8.6",)},
        {**_RTX_HERE, "machine": RTX_4090},
        _HRTX,
    ),
    Mismatch("older driver", "ok", False, {"machine": dataclasses.replace(A100, cuda="13.0")}),
    Mismatch("other TF32 override", "rebuild", True, _RTX_PLAN, {**_RTX_HERE, "tf32_override": "0"}, _HRTX),
    Mismatch("plugin missing", "refuse", False, {"plugin": PLUGIN}),
    Mismatch(
        "plugin of another ABI",
        "refuse",
        True,
        {"plugin": PLUGIN},
        {"plugin": PluginIdentity("libodtrt_tensorrt.so", "b" * 64, "IPluginV2DynamicExt")},
    ),
    Mismatch(
        "other plugin",
        "rebuild",
        True,
        {"plugin": PLUGIN},
        {"plugin": dataclasses.replace(PLUGIN, sha256="b" * 64)},
    ),
    Mismatch("same plugin", "ok", False, {"plugin": PLUGIN}, {"plugin": PLUGIN}),
)


def look_at(mismatch: Mismatch, folder: Path) -> tuple[portability.Verdict, list[str]]:
    """The verdict on a planted mismatch in the empty ``folder``, and the rows of the policy that apply."""
    (folder / "heads.onnx").write_bytes(b"model")
    (folder / "spec.json").write_bytes(b"spec")
    tag = b"vtrt" if mismatch.built.get("runtime_library") == "tensorrt_rtx" else b"ftrt"
    plan = tag + bytes(20) + bytes(mismatch.header) + bytes(range(256)) * 8
    machine = {
        "runtime_library": "tensorrt",
        "version": "10.3.0",
        "compute_capabilities": (),
        "machine": A100,
    }
    passport = describe(plan, VICTIM, folder, **{**machine, **mismatch.built})
    install(folder, plan, passport)
    mismatch.harm(folder, folder / "plans" / passport.plan)
    place = Environment(
        **{"machine": A100, "runtime_library": "tensorrt", "version": "10.3.0", **mismatch.place}
    )
    case = policy.PlanCheck(folder, passport, place)
    applying = [rule.name for rule in portability.POLICY if rule.applies(case)]
    return portability.check(folder, passport, place), applying


def plant(scratch: Path) -> list[Row]:
    """Every row of the policy, by at least one mismatch of its own."""
    row = new_row("mismatch planted for a row of the policy", found=0)
    for mismatch in MISMATCHES:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            verdict, applying = look_at(mismatch, Path(folder))
        row["trials"] += 1
        is_right = (verdict.action.value, verdict.rebuild_helps) == (mismatch.action, mismatch.helps)
        row["found"] += mismatch.rule in applying and is_right
        row["wrong_loads"] += verdict.action is Action.OK and mismatch.action != "ok"
        row["lost_valid_plans"] += verdict.action is not Action.OK and mismatch.action == "ok"
    without = {rule.name for rule in portability.POLICY} - {mismatch.rule for mismatch in MISMATCHES}
    if without:
        sys.exit(f"no mismatch is planted for {', '.join(sorted(without))}")
    return [row]


# ------------------------------------------------------------------------------------------ model folders

MODEL_FILES = ("spec.json", "anchors.npy", "heads.onnx", folders.LOG)
TRIALS_A_READER = 50


def model_folder(folder: Path, generation: int) -> Path:
    """A sealed model folder; no file of one generation is that of another."""
    folder.mkdir()
    named = dataclasses.replace(SPEC, labels=(spec.Label(1, f"a{generation}"), spec.Label(2, "b")))
    (folder / "spec.json").write_text(named.to_json())
    (folder / "heads.onnx").write_bytes(onnx_model(generation))
    anchors = np.random.default_rng(generation).uniform(0.2, 0.8, (SPEC.heads.num_anchors, 4))
    np.save(folder / "anchors.npy", anchors.astype(np.float32))
    folders.seal(folder)
    return folder


def answer(folder: Path) -> str:
    """What the folder says of itself and of one image, as a hash of all bits."""
    from odtrt_lib.detector import Detector

    with Detector.open(folder, "onnxruntime") as detector:
        image = np.random.default_rng(1).normal(size=(1, 3, 16, 16)).astype(np.float32)
        heads = detector.backend.infer(image)
        parts = [
            detector.spec.to_json().encode(),
            detector.anchors.tobytes(),
            *(one.tobytes() for one in heads),
        ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def damage_models(scratch: Path, trials: int, chance: random.Random) -> list[Row]:
    """Bits flipped in, and ends cut off, each of the files; then the folder is opened and reported on."""
    source = model_folder(scratch / "damaged", 0)
    intact = {name: (source / name).read_bytes() for name in MODEL_FILES}
    _, said = in_child(lambda: answer(source))
    rows = []
    for name in MODEL_FILES:
        for kind in ("a bit flipped", "cut off"):
            row = new_row(
                f"model folder: {name}, {kind}", found=0, silent_differences=0, foreign_exceptions=0
            )
            damages = [
                damaged(intact[name], kind, chance) for _ in range(-(-trials // (2 * len(MODEL_FILES))))
            ]
            for start in range(0, len(damages), TRIALS_A_READER):
                some = damages[start : start + TRIALS_A_READER]
                work = functools.partial(read_damaged, source, name, some, said["answer"])
                status, read = in_child(work)
                tally = read["answer"] if status == 0 else {"foreign_exceptions": len(some)}
                row["trials"] += len(some)
                count(row, tally)
            (source / name).write_bytes(intact[name])
            count(row, {"crashes": row["foreign_exceptions"], "wrong_loads": row["silent_differences"]})
            rows.append(row)
    return rows


def damaged(content: bytes, kind: str, chance: random.Random) -> bytes:
    """The content with one bit flipped, or cut off somewhere."""
    if kind == "cut off":
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def read_damaged(folder: Path, name: str, damages: Sequence[bytes], right: str) -> dict[str, int]:
    """Opens and reports on the folder with each of the contents; how often what came out of it."""
    from odtrt_lib.report import write_report

    tally = dict.fromkeys(("found", "silent_differences", "foreign_exceptions"), 0)
    signal.alarm(SECONDS_A_READER * 10)
    for content in damages:
        (folder / name).write_bytes(content)
        for read in (answer, write_report):
            try:
                said = read(folder)
                tally["silent_differences"] += read is answer and said != right
            except OdtrtError as error:
                tally["found"] += read is answer
                tally["foreign_exceptions"] += "\n" in str(error)
            except Exception as error:
                tally["foreign_exceptions"] += 1
                print(f"(in a trial: {type(error).__name__}: {error})", file=sys.stderr)
    return tally


def kill_upgrades(scratch: Path, trials: int, chance: random.Random) -> list[Row]:
    """``unpack --force`` from one generation to another and back, killed, with a reader beside it."""
    archives = []
    for generation in (1, 2):
        archives.append(scratch / f"{generation}.odtrt.zip")
        bundle.pack(model_folder(scratch / f"generation-{generation}", generation), archives[-1])
    target = scratch / "upgraded"
    bundle.unpack(archives[0], target)
    allowed = [generation_of(scratch / f"generation-{number}") for number in (1, 2)]
    number = [0]

    def upgrade() -> None:
        bundle.unpack(archives[number[0] % 2], target, force=True)

    number[0] += 1
    _, said = in_child(upgrade, at_line=1 << 40)
    start = time.perf_counter()
    number[0] += 1
    killed_after(upgrade, SECONDS_A_READER)
    duration = time.perf_counter() - start
    rows = []
    for way in ("at a line", "at a moment"):
        more = {"killed": 0, "reads": 0, "mixed_generations": 0, "foreign_exceptions": 0, "refused_reads": 0}
        row = new_row(f"model folder: kill -9 {way} of an upgrade, a reader beside it", **more)
        with reading_beside(target, allowed, row):
            while row["killed"] < trials:
                number[0] += 1
                if way == "at a line":
                    line = row["trials"] * said["lines"] // trials % said["lines"]
                    status, _ = in_child(upgrade, at_line=1 + line)
                else:
                    status = killed_after(upgrade, chance.uniform(0, duration))
                row["trials"] += 1
                row["killed"] += status == -signal.SIGKILL
                count(row, {"mixed_generations": generation_of(target / bundle.MODEL) not in allowed})
                bundle.verify(target)
        row["wrong_loads"] += row["mixed_generations"]
        row["crashes"] += row["foreign_exceptions"] + row["refused_reads"]
        rows.append(row)
    return rows


def generation_of(folder: Path) -> str:
    """Which files a reader gets, as a hash of them all."""
    files = folders.sealed(folder, "spec.json", "anchors.npy", "heads.onnx")
    return hashlib.sha256(b"".join(files.values())).hexdigest()


@contextlib.contextmanager
def reading_beside(target: Path, allowed: Sequence[str], row: Row) -> Iterator[None]:
    """Another process that reads the model again and again until the block ends; the row counts what it met.

    It reads the files as every command does, and takes its turn at completing what a kill left undone.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        tally = dict.fromkeys(("reads", "mixed_generations", "foreign_exceptions", "refused_reads"), 0)
        while not stopped:
            tally["reads"] += 1
            try:
                tally["mixed_generations"] += generation_of(target / bundle.MODEL) not in allowed
            except OdtrtError as error:
                tally["refused_reads"] += 1
                print(f"(a reader: {error})", file=sys.stderr)
            except Exception as error:
                tally["foreign_exceptions"] += 1
                print(f"(a reader: {type(error).__name__}: {error})", file=sys.stderr)
        os.write(writing, json.dumps(tally).encode())
        os._exit(0)
    os.close(writing)
    try:
        yield
    finally:
        os.kill(process, signal.SIGTERM)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        os.waitpid(process, 0)
    count(row, json.loads(text))


# ------------------------------------------------------------------------------------------- known defects


def passport_first(folder: Path, plan: Path, passport: Passport) -> None:
    """An installer that writes the passport before the plan."""
    target = folder / "plans" / passport.plan
    target.parent.mkdir(exist_ok=True)
    with atomic_write(target.parent / f"{passport.fingerprint}.json") as temporary:
        temporary.write_text(passport.to_json())
    for old in target.parent.glob(f"{passport.fingerprint}-*.plan"):
        old.unlink()
    plan.replace(target)


def in_place(folder: Path, plan: Path, passport: Passport) -> None:
    """An installer that writes under the final names."""
    target = folder / "plans" / passport.plan
    target.parent.mkdir(exist_ok=True)
    with target.open("wb") as file:
        for byte in range(0, passport.plan_bytes, 4096):
            file.write(plan.read_bytes()[byte : byte + 4096])
            file.flush()
    (target.parent / f"{passport.fingerprint}.json").write_text(passport.to_json())


def without_hash(path: Path, passport: Passport) -> str | None:
    """A comparison that looks at the size alone."""
    is_same = path.is_file() and path.stat().st_size == passport.plan_bytes
    return None if is_same else "another size"


def without_lock() -> None:
    """Folders that are never locked. Whoever writes a log first waits until its company has read it, so that
    the defect does not depend on luck."""
    for module in (folders, passports):
        module.exclusive = lambda _: contextlib.nullcontext()
    write = folders.atomic_write

    @contextlib.contextmanager
    def write_after_all_have_read(path: Path) -> Iterator[Path]:
        if path.name == folders.LOG and MEETING is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                MEETING.wait(timeout=SECONDS_A_READER / 3)
        with write(path) as temporary:
            yield temporary

    folders.atomic_write = write_after_all_have_read


def without_seal() -> None:
    """Records that nobody compares with the files."""
    for name in ("_compare", "_compare_origins"):
        setattr(folders, name, lambda *_: None)


DEFECTS: dict[str, Callable[[], None]] = {
    "no-seal": without_seal,
    "passport-first": lambda: setattr(passports, "install", passport_first),
    "in-place": lambda: setattr(passports, "install", in_place),
    "no-hash": lambda: setattr(passports, "_difference", without_hash),
    "no-checksum": lambda: setattr(passports, "_checksum", lambda fields: fields.get("check", "0" * 64)),
    "no-lock": without_lock,
    "any-lock": lambda: setattr(fcntl, "flock", lambda *_: None),
}


# -------------------------------------------------------------------------------------------------- rows


def new_row(kind: str, **more: int) -> Row:
    """A row without trials. more: figures of its own, e.g. how many were killed indeed."""
    return {"kind": kind, "trials": 0, **more, **dict.fromkeys(COLUMNS, 0)}


def count(row: Row, tally: Mapping[str, int]) -> None:
    """Adds a tally to a row."""
    for column, number in tally.items():
        row[column] += int(number)


def others(path: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows that are in the file already and that were not measured now."""
    if not path.is_file():
        return []
    kinds = {row["kind"] for row in rows}
    return [row for row in json.loads(path.read_text())["rows"] if row["kind"] not in kinds]


def main() -> None:
    """Runs the campaign and writes its tally; exit status 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--corruptions", type=int, default=1120)
    parser.add_argument("--kills", type=int, default=100, help="for each work and each way to kill it")
    parser.add_argument("--models", type=int, default=2400, help="damaged files of model folders")
    parser.add_argument("--builds", type=int, default=30, help="by TensorRT-RTX, each of them killed")
    parser.add_argument("--only", nargs="+", choices=GROUPS)
    parser.add_argument("--defect", choices=sorted(DEFECTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    wanted = parser.parse_args()
    chance = random.Random(wanted.seed)
    if wanted.defect:
        DEFECTS[wanted.defect]()
    # A builder can outlive the process that was killed, and still write here.
    with tempfile.TemporaryDirectory(prefix="odtrt-faults-", ignore_cleanup_errors=True) as scratch:
        os.environ["TMPDIR"] = scratch
        bench = make_bench(Path(scratch), build_plans(3))
        each = -(-wanted.kills // 4)
        groups: dict[str, Callable[[], list[Row]]] = {
            "corruptions": lambda: corrupt(bench, wanted.corruptions, chance),
            **{
                work.group: functools.partial(kill_everywhere, bench, work, wanted.kills, chance)
                for work in works(bench)
            },
            "disks": lambda: fill_disks(bench, each, chance),
            "company": lambda: crowd(bench, each),
            "mismatches": lambda: plant(bench.scratch),
            "builds": lambda: kill_real_rebuilds(bench, wanted.builds, chance),
            "models": lambda: [
                *damage_models(bench.scratch, wanted.models, chance),
                *kill_upgrades(bench.scratch, wanted.kills, chance),
            ],
        }
        rows = []
        for name in wanted.only or GROUPS:
            for row in groups[name]():
                row["seed"] = wanted.seed
                rows.append(row)
                print(row, flush=True)
    kept = others(wanted.out, rows) if wanted.only else []
    write_results(wanted.out, "faults", "python benchmarks/faults.py", [*kept, *rows])
    total = {column: sum(row[column] for row in rows) for column in COLUMNS}
    print(f"{sum(row['trials'] for row in rows)} trials: {total}")
    sys.exit(1 if any(total.values()) else 0)


if __name__ == "__main__":
    main()
