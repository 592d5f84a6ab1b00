"""What a real builder does with too little memory: the steps of the fallback, of the device and of the host.

    python benchmarks/fallback_gpu.py RECORDED [--seconds 180] [NAME ...]       on the GPU machine

writes results/fallback.<gpu>.json, each row as soon as it is known; cases that are there already are not made
again, and none is begun once the seconds are over. RECORDED: what ``tensorrt_gpu.py record`` wrote; NAME:
models in it, unasked all of :data:`MODELS`. Needs numpy, the full tensorrt and odtrt_lib, on Python 3.8 or
newer, and a GPU that nobody else uses. Every build but a model's first has the timing cache of that one, as a
second build on a device would. Rows, of the plan without the plugin, by ``kind``:

* ``setting``: one step of :data:`odtrt_lib.engine.FALLBACK` alone, without a limit: what it lowers.
* ``host``: a limit on the host's memory, in per cent of the peak without one, as ``odtrt build --memory`` has
  it. One row a step, in order.
* ``device``: another process holds all of the GPU's memory but ``limit_mb``. One row a step, in order.

``case`` and ``limit_mb`` say which; ``step`` what was tried, ``outcome`` how it ended, in words. ``built``:
whether the case gave a plan at last. ``peak_rss_mb``, ``peak_gpu_mb``: of the step's process; ``seconds``:
that it took.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # odtrt is not installed where it runs

from gpu_times import gpu_name

from odtrt_lib import engine
from odtrt_lib.engine import fallback, passport
from odtrt_lib.errors import OdtrtError, one_line
from odtrt_lib.machine import MIB, this_machine
from odtrt_lib.results import write_results

MODELS = ("ssd_mobilenet_v2_fpnlite_320_parts", "efficientdet_d0_512")
AS_ASKED = "as asked"
HOST_PER_CENT = (90, 60)
DEVICE_MB = (1300, 800)
WORK = ROOT / "out" / "fallback"
KEY = ("model", "kind", "case")
COMMAND = "python benchmarks/fallback_gpu.py RECORDED"

Row = Dict[str, Any]
Case = Tuple[str, str, str]


def main(arguments: Sequence[str]) -> int:
    """What the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recorded", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, default=180.0)
    options = parser.parse_args(arguments)
    end = time.perf_counter() + options.seconds
    gpu = gpu_name(this_machine().gpu)
    path = ROOT / "results" / f"fallback.{gpu}.json"
    rows: List[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for case in planned(options.names or MODELS):
        if has(rows, case):
            continue
        if time.perf_counter() > end:
            print("the seconds are over", flush=True)
            return 1
        made = rows_of(options.recorded / case[0], case, rows)
        for row in made:
            print(json.dumps(row), flush=True)
        rows += made
        write_results(path, "fallback", COMMAND, rows)
    return 0


def planned(names: Sequence[str]) -> List[Case]:
    """Model, kind and case of everything that is measured, what says most first."""
    found: List[Case] = []
    for name in names:
        found.append((name, "setting", AS_ASKED))
        found += [(name, "host", f"{per_cent}%") for per_cent in HOST_PER_CENT]
        found += [(name, "device", f"{limit} MiB") for limit in DEVICE_MB]
        steps = [step for step in fallback.FALLBACK if step.allowance is None and step.name != AS_ASKED]
        found += [(name, "setting", step.name) for step in steps if step.name != "lowest optimisation level"]
    return found


def has(rows: Sequence[Row], case: Case) -> bool:
    return any(tuple(row[key] for key in KEY) == case for row in rows)


def rows_of(recorded: Path, case: Case, known: Sequence[Row]) -> List[Row]:
    """Builds once, under what the case says; a row for each step that was tried."""
    name, kind, words = case
    limit, memory = None, None
    if kind == "host":
        limit = int(free_peak(known, name) * int(words.rstrip("%")) / 100)
        memory = f"{limit}MiB"
    elif kind == "device":
        limit = int(words.split()[0])
    os.environ["XDG_CACHE_HOME"] = str(WORK / "cache")  # of the building processes: the timing cache
    with model_folder(recorded) as folder, contextlib.ExitStack() as stack:
        if kind == "device":
            stack.enter_context(memory_held(limit))
        whole = fallback.FALLBACK
        if kind == "setting":
            fallback.FALLBACK = tuple(step for step in whole if step.name == words)
        try:
            attempts, outcome = attempts_of(folder, memory)
        finally:
            fallback.FALLBACK = whole
    date = datetime.now(timezone.utc).date().isoformat()
    about = {**dict(zip(KEY, case)), "limit_mb": limit, "built": outcome is None, "date": date}
    if not attempts:
        return [{**about, "number": 1, "step": "", "outcome": outcome}]
    return [
        {
            **about,
            "number": number,
            "step": attempt["name"],
            "outcome": attempt["outcome"][:300],
            "seconds": attempt["seconds"],
            "peak_rss_mb": attempt["peak_rss_mb"],
            "peak_gpu_mb": attempt["peak_gpu_mb"],
        }
        for number, attempt in enumerate(attempts, 1)
    ]


def attempts_of(folder: Path, memory: Optional[str]) -> Tuple[List[Dict[str, Any]], Optional[str]]:
    """What the build tried, and why it failed, or None. Overheard, as a failed build leaves no passport."""
    heard: List[Dict[str, Any]] = []
    describe = fallback._described

    def overhear(*arguments: Any) -> Dict[str, Any]:
        heard.append(describe(*arguments))
        return heard[-1]

    fallback._described = overhear
    try:
        engine.build(folder, memory=memory, force=True)
        return heard, None
    except OdtrtError as error:
        return heard, one_line(error)[:300]
    finally:
        fallback._described = describe


def free_peak(known: Sequence[Row], name: str) -> float:
    """The host's peak without a limit, with the timing cache: of any setting that changes nothing there."""
    return next(
        float(row["peak_rss_mb"])
        for row in known
        if (row["model"], row["kind"], row["case"]) == (name, "setting", AS_ASKED)
    )


@contextlib.contextmanager
def model_folder(recorded: Path) -> Iterator[Path]:
    """A copy of the model folder, without plans."""
    folder = WORK / recorded.name
    shutil.rmtree(str(folder), ignore_errors=True)
    shutil.copytree(str(recorded), str(folder), ignore=shutil.ignore_patterns(passport.PLANS))
    try:
        yield folder
    finally:
        shutil.rmtree(str(folder))


# ---- The process that holds the GPU's memory --------------------------------------------------------------

HOLD = "import sys; sys.path.insert(0, sys.argv[1]); from fallback_gpu import hold; hold(int(sys.argv[2]))"


@contextlib.contextmanager
def memory_held(left_mb: int) -> Iterator[None]:
    """Another process has all of the GPU's memory but ``left_mb`` MiB."""
    command = [sys.executable, "-c", HOLD, str(Path(__file__).resolve().parent), str(left_mb)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            said = process.stdout.readline()
            if not said.startswith("held"):
                raise SystemExit(f"the GPU's memory could not be held: {said.strip() or 'it said nothing'}")
            print(said.strip(), flush=True)
            yield
        finally:
            process.stdin.close()


def hold(left_mb: int) -> None:
    """Takes the memory, says so, and gives it back when its input ends."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, free, total, address = (
        ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_uint64(),
    )  # fmt: skip

    def call(function: str, *arguments: Any) -> None:
        status = getattr(cuda, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function}: CUDA error {status}")

    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    for block in (1024 * MIB, 64 * MIB, 2 * MIB):
        while True:
            call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            if free.value < left_mb * MIB + block:
                break
            if cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(block)) != 0:
                break
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    print(f"held: {free.value // MIB} of {total.value // MIB} MiB are free", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
