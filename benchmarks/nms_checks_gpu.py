"""Checks the CUDA kernels on a GPU, and writes down what was checked.

    python benchmarks/nms_checks_gpu.py
        [--plugin DRIVE PLUGIN CASES] [--heads HEADS] [--also NAME=LIBRARY ...]

writes results/nms_checks.<gpu>.json. tests/test_gpu.py: the numpy reference and the CPU library, bit for bit.
NVIDIA's compute-sanitizer around a choice of its cases. --also: the same with another libodtrt.so. Built with
``-DCMAKE_CUDA_FLAGS=-DODTRT_FEW_PAIRS=100`` one sends the short cases, too, through the kernels of large
heads; with ``-DODTRT_OVERLAPS_FROM=99`` a new GPU goes the way of older ones, five kernels.

--heads (the folder that record_heads.py wrote): what real detectors said about photographs, beside the CPU
library. --plugin, with DRIVE (built from plugins/tensorrt/drive), PLUGIN (libodtrt_tensorrt.so) and CASES
(the folder that plugin_cases.py writes): the plugin through its own interface, in a stream and in a captured
CUDA graph, alone and under every tool of compute-sanitizer.

Several checks run at the same time on one GPU, each in a process of its own: no time here says anything about
the kernels. Under racecheck a call takes ten seconds, so it gets fewer and shorter cases. Each result is
written as it comes; what was not finished has no answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # odtrt is not installed where it runs

import nms_cases
import nms_gpu
import torch_calls
from gpu_times import gpu_name

from odtrt_lib import native
from odtrt_lib.machine import this_machine
from odtrt_lib.results import write_results

# Logits of the largest case, chosen cases, drawn cases, cases of plain suppression.
CHOICES = {
    "memcheck": (25_000, 50, 25, 12),
    "racecheck": (8_500, 4, 2, 2),
    "initcheck": (25_000, 50, 25, 12),
    "synccheck": (25_000, 50, 25, 12),
}
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
CALLS = re.compile(r"(\d+) calls agree")
AT_ONCE = 12
TESTS = ROOT / "tests" / "test_gpu.py"
COMMAND = "python benchmarks/nms_checks_gpu.py --plugin DRIVE PLUGIN CASES --heads HEADS --also NAME=LIBRARY"
Job = tuple[dict[str, Any], list[str], dict[str, str]]  # a row to be, a command, its environment


def few(largest: int, most_chosen: int, drawn: int, drawn_nms: int) -> None:
    """Cases that a sanitizer's slowness allows: short heads, ties, softmax, NaN; and preprocessing."""
    short = [case for case in nms_cases.chosen_cases() if case.class_logits.size <= largest]
    short = [case for case in short if case.spec.nms.max_total_detections <= 1000][:most_chosen]
    every = (
        case for case in map(nms_cases.random_case, itertools.count()) if case.class_logits.size <= largest
    )
    extreme = map(nms_cases.extreme_case, range(drawn // 2))
    cases = [*short, *itertools.islice(every, drawn), *extreme]
    lines = compare(cases)
    nms = map(nms_cases.random_nms_case, range(drawn_nms))
    lines += list(nms_cases.nms_disagreements(torch_calls.nms_by_gpu, nms))
    lines += torch_calls.preprocess_disagreements()
    torch_calls.fail_on(lines)
    print(f"{len(cases) + drawn_nms} calls agree, and preprocessing")


def recorded(folder: Path) -> None:
    """The heads of real detectors, at three thresholds, in both precisions."""
    cases = [
        nms_gpu.recorded_case(path, threshold, dtype)
        for path in sorted(folder.glob("*.npz"))
        for threshold in nms_gpu.THRESHOLDS
        for dtype in (np.float32, np.float16)
    ]
    torch_calls.fail_on(compare(cases))
    print(f"{len(cases)} calls agree")


def compare(cases: list[nms_cases.Case]) -> list[str]:
    found = (
        (case, nms_cases.difference(torch_calls.by_cpu_library(case), torch_calls.by_gpu(case)))
        for case in cases
    )
    return [f"{case.name}: {difference}" for case, difference in found if difference]


def row_of(row: dict[str, Any], command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """``row`` and what the command says: whether all agrees, and what compute-sanitizer counted."""
    started = time.perf_counter()
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = answer.stdout
    calls = CALLS.search(said)
    row["agrees"] = answer.returncode == 0 and (calls is not None or "all checks passed" in said)
    if calls:
        row["calls"] = int(calls.group(1))
    if "interface" in row["check"]:
        row["checks"] = said.count("ok  ")
    if row["check"].startswith("compute-sanitizer"):
        summary = SUMMARY.search(said)
        row["problems"] = int(summary.group(1) or summary.group(2)) if summary else None
    row["seconds"] = round(time.perf_counter() - started, 1)
    if not passed(row):
        row["failure"] = (answer.stderr.strip() or said.strip())[-500:]
        print(said[-3000:], answer.stderr[-1000:])
    return row


def passed(row: dict[str, Any]) -> bool:
    """Whether a check ended, agrees, and, under a sanitizer, has a summary that counts nothing."""
    return bool(row["agrees"]) and row.get("problems", 0) == 0


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every check."""
    here = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    own = [sys.executable, __file__, "--do"]
    found: list[Job] = []
    libraries = [("", here)]
    for also in options.also:
        name, _, library = also.partition("=")
        libraries.append((f", {name}", {**here, native.ENVIRONMENT_VARIABLE: library}))
    for name, environment in libraries:
        for test in re.findall(r"^def (test_\w+)", TESTS.read_text(encoding="utf-8"), re.MULTILINE):
            row: dict[str, Any] = {"check": f"tests/test_gpu.py{name}"}
            row["case"] = test.removeprefix("test_").replace("_", " ")
            if test == "test_postprocess_is_the_references_bit_for_bit":
                row["calls"] = sum(1 for _ in nms_cases.all_cases())
            found.append((row, [sys.executable, str(TESTS), test], environment))
        for tool, sizes in CHOICES.items():
            row = {"check": f"compute-sanitizer {tool}{name}", "case": "a choice of the cases above"}
            found.append((row, [*sanitizer(tool), *own, "few", *map(str, sizes)], environment))
        if options.heads:
            row = {"check": f"heads of real detectors{name}", "case": "beside the CPU library"}
            found.append((row, [*own, "heads", options.heads], environment))
    if options.plugin:
        drive, plugin, folder = options.plugin
        for case in sorted(Path(folder).glob("*.case")):
            row = {
                "check": "the plugin through its interface, in a stream and in a CUDA graph",
                "case": case.stem,
            }
            found.append((row, [drive, plugin, str(case)], here))
            for tool in CHOICES:
                read = case.parent / "short" / case.name if tool == "racecheck" else case
                row = {"check": f"compute-sanitizer {tool}", "case": f"plugin, {case.stem}"}
                found.append((row, [*sanitizer(tool), drive, plugin, str(read)], here))
    return found


def sanitizer(tool: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--plugin", nargs=3, metavar=("DRIVE", "PLUGIN", "CASES"))
    arguments.add_argument("--heads")
    arguments.add_argument("--also", action="append", default=[], metavar="NAME=LIBRARY")
    arguments.add_argument("--do", nargs="+", help=argparse.SUPPRESS)  # one job, in its process
    options = arguments.parse_args()
    if options.do:
        what, *values = options.do
        return few(*map(int, values)) if what == "few" else recorded(Path(values[0]))
    path = ROOT / "results" / f"nms_checks.{gpu_name(this_machine().gpu)}.json"
    planned = jobs(options)
    rows = [{**row, "agrees": None, "failure": "not finished"} for row, _, _ in planned]
    racecheck_first = sorted(range(len(planned)), key=lambda i: "racecheck" not in planned[i][0]["check"])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(row_of, *planned[i]): i for i in racecheck_first}
        for done in as_completed(running):
            rows[running[done]] = done.result()
            print(json.dumps(done.result()), flush=True)
            write_results(path, "nms_checks", COMMAND, rows)
    sys.exit(not all(map(passed, rows)))


if __name__ == "__main__":
    main()
