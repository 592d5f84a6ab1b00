"""Checks the CUDA kernels on a GPU, and writes down what was checked.

    python plugins/bench/check_gpu.py [DRIVE PLUGIN CASES]    writes results/nms_checks.<gpu>.json

tests/test_gpu.py: the numpy reference and the CPU library, bit for bit. NVIDIA's compute-sanitizer around a
choice of its cases. With DRIVE (built from plugins/tensorrt/drive), PLUGIN (libodtrt_tensorrt.so) and CASES
(the folder that scripts/plugin_cases.py writes): the plugin through its own interface, in a stream and in a
captured CUDA graph, alone and under every tool of compute-sanitizer.

Several checks run at the same time, each in a process of its own, on one GPU: that finds more, not less, but
no time here says anything about the kernels. Under racecheck a call takes ten seconds, so it gets the short
cases. Each result is written as it comes; what was not finished has no answer.
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # not installed where it runs

import nms_cases
import test_gpu
import torch

from odtrt_lib.results import write_results

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROBLEMS = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
AT_ONCE = 12
# Logits of the largest case, drawn cases, cases of plain suppression.
CHOICES = {"memcheck": (25_000, 25, 12), "racecheck": (8_500, 2, 2)}
PASSED = ("calls agree", "all checks passed")


def few(largest: int, drawn: int, drawn_nms: int) -> None:
    """A choice of cases that the sanitizer's slowness allows: short heads, ties, softmax, NaN."""
    chosen = [
        case
        for case in nms_cases.chosen_cases()
        if case.class_logits.size <= largest and case.spec.nms.max_total_detections <= 1000
    ]
    sizes = map(nms_cases.random_case, range(1000))
    short = itertools.islice((case for case in sizes if case.class_logits.size <= largest), drawn)
    lines, calls = [], 5
    for case in [*chosen[: 2 * drawn], *short]:
        found = nms_cases.difference(test_gpu.by_cpu_library(case), test_gpu.by_gpu(case))
        lines += [f"{case.name}: {found}"] if found else []
        calls += 1
    lines += list(
        nms_cases.nms_disagreements(test_gpu.nms_by_gpu, map(nms_cases.random_nms_case, range(drawn_nms)))
    )
    test_gpu.test_preprocess_is_the_cpu_librarys_bit_for_bit()
    test_gpu.fail_on(lines)
    print(f"{calls + drawn_nms} calls agree")


def one_test(name: str) -> None:
    """One function of tests/test_gpu.py."""
    getattr(test_gpu, name)()
    print("calls agree")


def row_of(row: dict[str, Any], command: list[str]) -> dict[str, Any]:
    """``row`` and what the command says: whether all agrees, and what compute-sanitizer counted."""
    started = time.perf_counter()
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    found = PROBLEMS.search(answer.stdout)
    row |= {"agrees": answer.returncode == 0 and any(words in answer.stdout for words in PASSED)}
    if row["check"].startswith("compute-sanitizer"):
        row["problems"] = int(found.group(1) or found.group(2)) if found else None
    if "interface" in row["check"]:
        row["checks"] = answer.stdout.count("ok  ")
    row["seconds"] = round(time.perf_counter() - started, 1)
    if row.get("problems") or not row["agrees"]:
        row["failure"] = (answer.stderr.strip() or answer.stdout.strip())[-500:]
        print(answer.stdout[-3000:], answer.stderr[-1000:])
    return row


def jobs(arguments: list[str]) -> list[tuple[dict[str, Any], list[str]]]:
    """Every check: a row to be, and a command. The longest come first."""
    own = [sys.executable, __file__]
    tests = [name for name in vars(test_gpu) if name.startswith("test_")]
    found: list[tuple[dict[str, Any], list[str]]] = []
    for name in tests:
        row: dict[str, Any] = {
            "check": "tests/test_gpu.py",
            "case": name.removeprefix("test_").replace("_", " "),
        }
        if name == "test_postprocess_is_the_references_bit_for_bit":
            row["calls"] = sum(1 for _ in nms_cases.all_cases())
        found.append((row, [*own, "test", name]))
    plugins: list[tuple[dict[str, Any], list[str]]] = []
    if len(arguments) == 3:
        drive, plugin, folder = arguments
        for case in sorted(Path(folder).glob("*.case")):
            row = {
                "check": "the plugin through its interface, in a stream and in a CUDA graph",
                "case": case.stem,
            }
            plugins.append((row, [drive, plugin, str(case)]))
            for tool in TOOLS:
                read = case.parent / "short" / case.name if tool == "racecheck" else case
                row = {"check": f"compute-sanitizer {tool}", "case": f"plugin, {case.stem}"}
                plugins.append((row, [*sanitizer(tool), drive, plugin, str(read)]))
    for tool, sizes in CHOICES.items():
        row = {"check": f"compute-sanitizer {tool}", "case": "a choice of the cases above"}
        plugins.append((row, [*sanitizer(tool), *own, "few", *map(str, sizes)]))
    return [*found, *plugins]


def sanitizer(tool: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool]


def main() -> None:
    if sys.argv[1:2] == ["few"]:
        return few(*map(int, sys.argv[2:]))
    if sys.argv[1:2] == ["test"]:
        return one_test(sys.argv[2])
    gpu = torch.cuda.get_device_name().lower().replace("nvidia", "").split()[0]
    planned = jobs(sys.argv[1:])
    rows = [{**row, "agrees": None, "failure": "not finished"} for row, _ in planned]
    slowest = sorted(range(len(planned)), key=lambda i: "racecheck" not in planned[i][0]["check"])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(row_of, *planned[i]): i for i in slowest}
        for done in as_completed(running):
            rows[running[done]] = done.result()
            print(json.dumps(done.result()), flush=True)
            write_results(
                ROOT / "results" / f"nms_checks.{gpu}.json",
                "nms_checks",
                "python plugins/bench/check_gpu.py DRIVE PLUGIN CASES",
                rows,
            )
    sys.exit(not all(row["agrees"] and not row.get("problems") for row in rows))


if __name__ == "__main__":
    main()
