"""Plans of one TensorRT in another: what it says, beside what the passport says beforehand.

    python benchmarks/version_matrix_gpu.py ENVIRONMENTS WORK RECORDED PLUGIN plans    builds the plans
    python benchmarks/version_matrix_gpu.py ENVIRONMENTS WORK RECORDED PLUGIN load     loads them everywhere

``load`` writes results/version_matrix.<gpu>.json, each row as soon as it is known; what is there already is
not asked again. Both run on the GPU machine with any Python from 3.8 on. ENVIRONMENTS: a JSON file, name ->
{"python": PROGRAM, and the environment variables with which it finds its TensorRT}. WORK: a folder for plans
and timing caches. RECORDED: what ``tensorrt_gpu.py record`` wrote. PLUGIN: libodtrt_tensorrt.so.

Each plan and each row is a process of its own, which TensorRT may take down. Rows by ``kind``:

* ``plan``: a plan of ``built_by`` handed to ``loaded_in``. ``verdict`` and ``says``: what
  :func:`odtrt_lib.portability.check` says there, before TensorRT is asked, and its first reason. ``loads``:
  whether TensorRT makes an engine and an execution context of it; ``message``: the first line that it calls
  an error, or how the process ended. ``agree``: the verdict is ``ok`` exactly where the plan loads. ``safe``:
  no plan is called ``ok`` that does not load.
* ``damage``: the same of plans that were cut off or have one byte changed; TensorRT is given bytes here that
  :func:`odtrt_lib.engine.runtime.load` would not give it. Where ``agree`` is false it does not notice.
* ``hidden``: the same with CUDA_VISIBLE_DEVICES empty.
* ``timing cache``: the cache of ``built_by`` given to the builder of ``loaded_in``. odtrt keeps one for each
  version and GPU, so the verdict on another's is ``apart``, and they agree where the builder refuses it.

The exit status is 1 if a row is not safe.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # odtrt is not installed where it runs

from gpu_times import gpu_name

from odtrt_lib import engine, portability
from odtrt_lib.engine import builder, passport
from odtrt_lib.engine.bindings import import_library, load_plugin
from odtrt_lib.errors import one_line
from odtrt_lib.machine import this_machine
from odtrt_lib.results import write_results
from odtrt_lib.variants import form_of

PARTS = "ssd_mobilenet_v2_fpnlite_320_parts"
# Of each environment that can build: precision and form. The later ones of an environment have its cache.
PLANS = (("fp32", "split"), ("fp32", "fused"))
PLANS_OF_RTX = (("fp32", "split"),)
CANNOT_BUILD = "lean"  # in an environment's name
DAMAGE = ("cut in half", "first byte", "byte at 25%", "byte at 50%", "byte at 75%", "last byte")
SECONDS_OF_PLAN, SECONDS_OF_ROW, AT_ONCE = 400, 60, 4
KEY = ("kind", "built_by", "precision", "form", "case", "loaded_in")
COMMAND = "python benchmarks/version_matrix_gpu.py ENVIRONMENTS WORK RECORDED PLUGIN"

Row = Dict[str, Any]
Environments = Mapping[str, Mapping[str, str]]


def main(arguments: Sequence[str]) -> int:
    """What the module says."""
    if arguments[:1] == ["--do"]:
        task, *values = arguments[1:]
        TASKS[task](*values)
        return 0
    if len(arguments) != 5 or arguments[4] not in ("plans", "load"):
        print(__doc__)
        return 2
    work, recorded, plugin = (Path(one).resolve() for one in arguments[1:4])
    environments: Environments = json.loads(Path(arguments[0]).read_text())
    if arguments[4] == "plans":
        return make_plans(environments, work, recorded, plugin)
    return load_everywhere(environments, work, plugin)


# ---- Plans ----------------------------------------------------------------------------------------------


def make_plans(environments: Environments, work: Path, recorded: Path, plugin: Path) -> int:
    """Fills WORK/<environment> for each environment that builds, all of them at once."""

    def one(name: str) -> bool:
        folder = work / name / PARTS
        if not folder.is_dir():
            shutil.copytree(recorded / PARTS, folder)
        done = True
        for precision, form in PLANS_OF_RTX if "rtx" in name else PLANS:
            library = str(plugin) if form == "fused" else ""
            own = {**environments[name], "XDG_CACHE_HOME": str(work / name)}
            said = in_a_process(own, ["build", str(folder), precision, library], SECONDS_OF_PLAN)
            print(json.dumps({"environment": name, "precision": precision, "form": form, **said}), flush=True)
            done = done and "error" not in said
        return done

    builders = [name for name in environments if CANNOT_BUILD not in name]
    with ThreadPoolExecutor(len(builders)) as pool:
        return int(not all(list(pool.map(one, builders))))


def build(folder: str, precision: str, plugin: str) -> None:
    made = engine.build(folder, precision=precision, plugin=plugin or None)
    tell({"seconds": made.record["seconds"], "was_there": made.is_up_to_date})


# ---- Rows -----------------------------------------------------------------------------------------------


def load_everywhere(environments: Environments, work: Path, plugin: Path) -> int:
    gpu = gpu_name(this_machine().gpu)
    path = ROOT / "results" / f"version_matrix.{gpu}.json"
    rows: List[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    known = {tuple(row[key] for key in KEY) for row in rows if "error" not in row}
    planned = [one for one in plan_rows(environments, work) if tuple(one[0][key] for key in KEY) not in known]

    def one(planned_row: Tuple[Row, List[str]]) -> Row:
        row, task = planned_row
        own = dict(environments[row["loaded_in"]])
        if row["kind"] == "hidden":
            own["CUDA_VISIBLE_DEVICES"] = ""
        said = in_a_process(own, [*task, str(plugin)], SECONDS_OF_ROW)
        return judged({**row, "date": datetime.now(timezone.utc).date().isoformat(), **said})

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in as_completed([pool.submit(one, planned_row) for planned_row in planned]):
            row = done.result()
            key = tuple(row[name] for name in KEY)
            rows = [other for other in rows if tuple(other[name] for name in KEY) != key] + [row]
            print(json.dumps(row), flush=True)
            write_results(path, "version_matrix", COMMAND, sorted(rows, key=order))
    return int(not rows or not all(row.get("safe") for row in rows))


def plan_rows(environments: Environments, work: Path) -> List[Tuple[Row, List[str]]]:
    """Every row that the plans and caches in ``work`` allow, and the task that gives its figures."""
    found: List[Tuple[Row, List[str]]] = []

    def add(kind: str, by: str, plan: Tuple[str, str], case: str, into: str, task: List[str]) -> None:
        row = dict(zip(KEY, (kind, by, *plan, case, into)))
        found.append((row, task))

    for by in environments:
        folder = work / by / PARTS
        for one in passport.passports(folder):
            plan = (one.precision, "fused" if form_of(one.model) == "plugin" else "split")
            load = ["load", str(folder), one.fingerprint]
            for into in environments:
                add("plan", by, plan, "", into, [*load, ""])
            add("hidden", by, plan, "no GPU to see", by, [*load, ""])
            if plan == PLANS[0] or "rtx" in by:
                for case in DAMAGE:
                    add("damage", by, plan, case, by, [*load, case])
        for cache in sorted((work / by).glob("odtrt/timing/*.cache")):
            for into in environments:
                if CANNOT_BUILD not in into and "rtx" not in into:
                    add("timing cache", by, ("", ""), "", into, ["timing_cache", str(cache)])
    return found


def judged(row: Row) -> Row:
    """``row`` with ``agree`` and ``safe``. A process that ended without a word did not load the plan."""
    if "verdict" not in row:
        return {**row, "error": row.pop("message", "no verdict")}
    row.setdefault("loads", False)
    allowed = row["verdict"] in ("ok", "own")
    return {**row, "agree": allowed == row["loads"], "safe": row["loads"] or not allowed}


def order(row: Row) -> Tuple[str, ...]:
    return tuple(str(row[key]) for key in KEY)


def in_a_process(own: Mapping[str, str], task: Sequence[str], seconds: float) -> Row:
    """What the task told, and ``message`` or ``error`` with its last words where it did not end well."""
    environment = {**os.environ, **{name: value for name, value in own.items() if name != "python"}}
    command = [own["python"], __file__, "--do", *task]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=seconds
        )
        lines, problem = answer.stdout, None
        if answer.returncode != 0:
            last = answer.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            problem = f"ended with status {answer.returncode}: {one_line(last[0])[:300]}"
    except subprocess.TimeoutExpired as late:
        lines = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        problem = f"stopped after {seconds} s"
    found: Row = {}
    for line in lines.splitlines():
        if line.startswith("{"):
            found.update(json.loads(line))
    if problem is not None:
        words = "; ".join(filter(None, [found.get("message"), problem]))
        found["error" if task[0] == "build" else "message"] = words
    return found


def tell(part: Row) -> None:
    print(json.dumps(part), flush=True)


def load(folder: str, fingerprint: str, damage: str, plugin: str) -> None:
    """Tells the verdict, then what TensorRT makes of the plan's bytes."""
    paper = passport.read(Path(folder) / passport.PLANS / f"{fingerprint}.json")
    data = (Path(folder) / passport.PLANS / paper.plan).read_bytes()
    if damage:
        data = damaged(data, damage)
    here = portability.this_environment(plugin if paper.plugin is not None else None)
    verdict = verdict_on(Path(folder), paper, data, here)
    tell({"verdict": verdict.word, "says": verdict.reasons[0] if verdict.reasons else ""})
    if here.runtime_library is None:
        tell({"loads": False, "message": "no TensorRT can be imported"})
        return
    trt: Any = import_library(here.runtime_library)
    logger, errors, warnings = said_by(trt)
    is_same_interface = trt.__version__.startswith("8.5") and hasattr(trt, "get_plugin_registry")
    if paper.plugin is not None and is_same_interface:
        load_plugin(trt.get_plugin_registry(), Path(plugin))
    kept: List[Any] = []

    def context() -> Any:
        kept.append(trt.Runtime(logger))
        kept.append(kept[-1].deserialize_cuda_engine(data))
        return None if kept[-1] is None else kept[-1].create_execution_context()

    tell(outcome(context, errors, warnings)[1])
    end()


def verdict_on(
    folder: Path, paper: passport.Passport, data: bytes, here: portability.Environment
) -> portability.Verdict:
    """Of the plan whose bytes are ``data``, in a copy of the folder: other rows read the folder meanwhile."""
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / passport.PLANS).mkdir()
        (Path(copy) / passport.PLANS / paper.plan).write_bytes(data)
        for name in (paper.model, "spec.json", "log.jsonl"):
            shutil.copy(str(folder / name), copy)
        return portability.check(copy, paper, here)


def damaged(data: bytes, how: str) -> bytes:
    """``data`` cut off, or with one byte of it changed; how: one of :data:`DAMAGE`."""
    if how == "cut in half":
        return data[: len(data) // 2]
    at = {"first byte": 0, "last byte": len(data) - 1}.get(how)
    if at is None:
        at = len(data) * int(how.rstrip("%").rpartition(" ")[2]) // 100
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def said_by(trt: Any) -> Tuple[Any, List[str], List[str]]:
    """A logger, and the errors and warnings that it hears; the first error is told before it can crash."""
    errors: List[str] = []
    warnings: List[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.Severity.WARNING:
                warnings.append(message)
            elif severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                errors.append(message)
                if len(errors) == 1:
                    tell({"message": one_line(message)[:300]})

    return Logger(), errors, warnings


def outcome(make: Callable[[], Any], errors: List[str], warnings: List[str]) -> Tuple[Optional[Any], Row]:
    """What ``make`` gives, and ``loads`` and ``message``."""
    made = None
    try:
        made = make()
    except Exception as error:
        errors.append("; ".join([*warnings[-1:], f"{type(error).__name__}: {one_line(error)}"]))
    message = "" if made is not None else one_line((errors or ["it gives no reason"])[0])[:300]
    return made, {"loads": made is not None, "message": message}


def timing_cache(cache: str, _: str) -> None:
    """Whether this environment's builder takes the cache of another."""
    name, version = engine.available_runtimes()[0]
    trt: Any = import_library(name)
    identity = {"runtime_library": name, "version": version}
    own = engine.timing_cache_file(identity, this_machine()).name
    verdict = "own" if Path(cache).name == own else "apart"
    tell({"verdict": verdict, "says": f"here it is {own}"})
    logger, errors, warnings = said_by(trt)
    blob, _note = builder.read_cache_file(Path(cache))
    kept: List[Any] = []

    def taken() -> Any:
        kept.append(trt.Builder(logger))
        kept.append(kept[-1].create_builder_config())
        kept.append(kept[-1].create_timing_cache(blob))
        return True if kept[-1] is not None and kept[-2].set_timing_cache(kept[-1], False) else None

    tell(outcome(taken, errors, warnings)[1])
    end()


def end() -> None:
    """Without TensorRT's own clean-up, which can crash when Python has freed its objects in another order."""
    sys.stdout.flush()
    os._exit(0)


TASKS: Dict[str, Callable[..., None]] = {"build": build, "load": load, "timing_cache": timing_cache}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
