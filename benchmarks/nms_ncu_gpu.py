"""Asks NVIDIA Nsight Compute what the two post-processing kernels wait for.

    python benchmarks/nms_ncu_gpu.py    writes results/nms_ncu.<gpu>.json

Needs ncu with access to the GPU's counters, PyTorch, and libodtrt.so with CUDA. Each row is a kernel of one
call, the second of two, so that code and heads are in the caches; the clocks are the GPU's own:

* ``us``: the kernel alone. Both together take longer than a call in a CUDA graph, where the second is
  launched while the first still runs.
* ``dram_percent``, ``dram_gb_per_second``: of the memory's bandwidth, and what was moved.
* ``issue_percent``: cycles in which a scheduler with work issued an instruction.
* ``warps``: on a multiprocessor that works at all, on average. ``blocks``, ``threads``, ``registers``: as
  launched.
* ``cycles_per_instruction``: from one instruction of a warp to its next; ``stall_*``: how many of these
  cycles it waited for what. barrier: other warps of its block. long_scoreboard: memory. membar: its writes,
  before a barrier of the cluster. short_scoreboard: shared memory. wait: the instruction before.
  not_selected: another warp's instruction was issued.
* ``ncu_version``: Nsight Compute's; rows that lack it are older than this key.
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # odtrt is not installed where it runs

from gpu_times import gpu_name

from odtrt_lib.machine import this_machine
from odtrt_lib.results import write_results

# Anchors, score threshold, objects: a usual picture of 8, a crowd of 30.
CASES = (
    (49104, 0.05, 8),
    (49104, 0.05, 30),
    (49104, 1e-8, 8),
    (49104, 1e-8, 30),
    (196416, 0.3, 8),
    (196416, 0.05, 30),
    (196416, 1e-8, 8),
)
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
    "WarpStateStats",
    "SchedulerStats",
)
STALL = ("smsp__average_warps_issue_stalled_", "_per_issue_active.ratio")
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_gb_per_second": "dram__bytes.sum.per_second",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
    "cycles_per_instruction": "smsp__average_warp_latency_per_inst_issued.ratio",
}
# Of the units that ncu may choose by itself, how many make one of ours.
UNITS = {
    "ns": 1e-3,
    "us": 1.0,
    "byte/s": 1e-9,
    "Kbyte/s": 1e-6,
    "Mbyte/s": 1e-3,
    "Gbyte/s": 1.0,
    "Tbyte/s": 1e3,
}


def calls() -> None:
    """Two calls of each case, for ncu to watch."""
    import nms_gpu
    import torch
    import torch_calls

    for anchors, threshold, objects in CASES:
        call = torch_calls.GpuPostprocess(nms_gpu.drawn_case(anchors, threshold, 1, np.float32, objects))
        for _ in range(2):
            call.enqueue()
        torch.cuda.synchronize()


def watched() -> str:
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = [
        "--clock-control",
        "none",
        "--cache-control",
        "none",
        "--page",
        "raw",
        "--csv",
        "-k",
        "regex:^(select_candidates|suppress_in_cluster)",
    ]
    command = ["ncu", *options, *sections, sys.executable, __file__, "calls"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def version_in(printed: str) -> str:
    """The version in what `ncu --version` printed."""
    found = re.search(r"^Version (\S+)", printed, re.MULTILINE)
    return found[1] if found else "unknown"


def rows_of(printed: str, cases: Sequence[tuple[int, float, int]] = CASES) -> list[dict[str, Any]]:
    """ncu's table, the second of every two calls. Raises ValueError where it is not of these cases."""
    lines = list(csv.reader(io.StringIO(printed[printed.index('"ID"') :])))
    names, units, found = lines[0], lines[1], lines[2:]
    if len(found) != 4 * len(cases):
        raise ValueError(f"ncu watched {len(found)} kernels, expected {4 * len(cases)}")
    rows = []
    for number, values in enumerate(found):
        if number % 4 < 2:
            continue
        row = dict(zip(names, values, strict=True))
        anchors, threshold, objects = cases[number // 4]
        is_first = "select_candidates<" in row["Kernel Name"]
        if is_first == bool(number % 2):
            raise ValueError(f"kernel {number} is {row['Kernel Name']}: not the order of a call")
        kernel = "select_candidates" if is_first else "suppress_in_cluster"
        figures: dict[str, Any] = {"kernel": kernel, "anchors": anchors}
        figures |= {"score_threshold": threshold, "objects": objects}
        for key, name in METRICS.items():
            scale = UNITS.get(units[names.index(name)], 1.0)
            figures[key] = round(number_in(row[name]) * scale, 2)
        figures["blocks"] = int(row["Grid Size"].strip("()").split(",")[0])
        figures["threads"] = int(row["Block Size"].strip("()").split(",")[0])
        for name in names:
            if name.startswith(STALL[0]) and name.endswith(STALL[1]):
                figures[f"stall_{name.removeprefix(STALL[0]).removesuffix(STALL[1])}"] = number_in(row[name])
        rows.append(figures)
    return rows


def number_in(text: str) -> float:
    return float(text.replace(",", ""))


def main() -> None:
    if sys.argv[1:2] == ["calls"]:
        return calls()
    said = subprocess.run(["ncu", "--version"], capture_output=True, text=True, check=True).stdout
    rows = [{**row, "ncu_version": version_in(said)} for row in rows_of(watched())]

    path = ROOT / "results" / f"nms_ncu.{gpu_name(this_machine().gpu)}.json"
    write_results(path, "nms_ncu", "python benchmarks/nms_ncu_gpu.py", rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
