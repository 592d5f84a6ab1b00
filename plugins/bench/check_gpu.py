"""Checks the CUDA kernels on a GPU, and writes down what was checked.

    python plugins/bench/check_gpu.py [DRIVE PLUGIN CASES]    writes results/nms_checks.<gpu>.json

tests/test_gpu.py first: the numpy reference and the CPU library, bit for bit. Then NVIDIA's compute-sanitizer
around a choice of its cases. With DRIVE (built from plugins/tensorrt/drive), PLUGIN (libodtrt_tensorrt.so)
and CASES (the folder that scripts/plugin_cases.py writes): the plugin through its own interface, in a stream
and in a captured CUDA graph, alone and under every tool of compute-sanitizer. Each result is written as it
comes: a run that is cut off has what it did.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
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


def few(largest: int) -> None:
    """A choice of cases that the sanitizer's slowness allows: short heads, ties, softmax, NaN."""
    chosen = [
        case
        for case in nms_cases.chosen_cases()
        if case.class_logits.size <= largest and case.spec.nms.max_total_detections <= 1000
    ]
    lines = []
    for case in [*chosen, *map(nms_cases.random_case, range(25))]:
        found = nms_cases.difference(test_gpu.by_cpu_library(case), test_gpu.by_gpu(case))
        lines += [f"{case.name}: {found}"] if found else []
    cases = map(nms_cases.random_nms_case, range(12))
    lines += list(nms_cases.nms_disagreements(test_gpu.nms_by_gpu, cases))
    test_gpu.test_preprocess_is_the_cpu_librarys_bit_for_bit()
    test_gpu.fail_on(lines)
    print(f"{len(chosen) + 25 + 12 + 5} calls agree")


def sanitize(tool: str, name: str, command: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    answer = subprocess.run(["compute-sanitizer", "--tool", tool, *command], capture_output=True, text=True)
    found = PROBLEMS.search(answer.stdout)
    row = {
        "check": f"compute-sanitizer {tool}",
        "case": name,
        "problems": int(found.group(1) or found.group(2)) if found else None,
        "agrees": "calls agree" in answer.stdout or "all checks passed" in answer.stdout,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if row["problems"] or not row["agrees"]:
        print(answer.stdout[-3000:], answer.stderr[-1000:])
    return row


def main() -> None:
    if sys.argv[1:2] == ["few"]:
        return few(int(sys.argv[2]))
    rows: list[dict[str, Any]] = []
    gpu = torch.cuda.get_device_name().lower().replace("nvidia", "").split()[0]

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        write_results(
            ROOT / "results" / f"nms_checks.{gpu}.json",
            "nms_checks",
            "python plugins/bench/check_gpu.py DRIVE PLUGIN CASES",
            rows,
        )

    for name, check in vars(test_gpu).copy().items():
        if not name.startswith("test_"):
            continue
        started = time.perf_counter()
        try:
            check()
            failure = ""
        except AssertionError as error:
            failure = str(error)[:500]
        calls = {"calls": sum(1 for _ in nms_cases.all_cases())} if not rows else {}
        add(
            {
                "check": "tests/test_gpu.py",
                "case": name.removeprefix("test_").replace("_", " "),
                "agrees": not failure,
                "failure": failure,
                "seconds": round(time.perf_counter() - started, 1),
                **calls,
            }
        )
    if len(sys.argv) == 4:
        drive, plugin, cases = sys.argv[1:]
        for case in sorted(Path(cases).glob("*.case")):
            answer = subprocess.run([drive, plugin, str(case)], capture_output=True, text=True).stdout
            add(
                {
                    "check": "the plugin through its interface, in a stream and in a CUDA graph",
                    "case": case.stem,
                    "agrees": "all checks passed" in answer,
                    "checks": answer.count("ok  "),
                }
            )
            for tool in TOOLS:
                add(sanitize(tool, f"plugin, {case.stem}", [drive, plugin, str(case)]))
    for tool, largest in (("memcheck", 25_000), ("racecheck", 12_000)):
        add(sanitize(tool, "a choice of the cases above", [sys.executable, __file__, "few", str(largest)]))
    sys.exit(not all(row["agrees"] and not row.get("problems") for row in rows))


if __name__ == "__main__":
    main()
