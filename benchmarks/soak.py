"""Whether a detector runs for long without a surprise, and whether a soak finds a defect that is there.

    python benchmarks/soak.py FOLDER [--minutes 60] [--images DIR] [--only CASE...] [--resume]

writes results/soak.cpu.json, or results/soak.<gpu>.json for a plan, each row as soon as its run has ended;
rows of other cases stay. FOLDER: a model folder after `odtrt convert`. DIR: pictures for the belt; without it
scenes are rendered. The reports are kept in FOLDER/soak/CASE. It takes MINUTES for the first case, 20 minutes
for the second, and 3 for each other. Nothing else should run on the machine.

A row is one run:

* ``faults``: the camera has the standard faults; nothing may be wrong. ``leak``: the detector keeps 1 MB a
  minute. ``drift``: from a call on, the last bit of each score is another. ``stall``: one call takes 3
  seconds longer. ``hang``: one call never returns.
* ``is_found``: whether the run says so, and for ``faults``: that all is steady.
* ``service``: from a frame picked to its detections; ``response``: from its capture. ``slope``, ``low`` and
  ``high``, an hour: Theil and Sen, with the interval that is judged; ``wide_``: the more careful one.
* ``injected_``: faults of the camera; ``grabbed`` must equal ``accounted``. ``cpu_elsewhere``: the share of
  the CPU that other programs took, mean of the blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import numpy as np
import soak_defects
from gpu_times import gpu_name

from odtrt_lib.app import demonstration
from odtrt_lib.detector import Detector
from odtrt_lib.errors import InputError
from odtrt_lib.latency import belt
from odtrt_lib.latency import soak as soaking
from odtrt_lib.latency.soak_report import write_soak
from odtrt_lib.latency.verdict import figures
from odtrt_lib.latency.worker import Job
from odtrt_lib.machine import this_machine
from odtrt_lib.results import write_results

ROOT = Path(__file__).resolve().parents[1]
SCENES = 16
DEFECT_AT, CANARY_EVERY, STALL_SECONDS = 600, 25, 3.0


@dataclasses.dataclass(frozen=True)
class Case:
    """minutes: None as asked for. defect: recipe -> the recipe of a detector with the defect."""

    name: str
    minutes: Optional[float]
    faults: str
    defect: Optional[Callable[[Any], Any]]
    is_found: Callable[[Dict[str, Any]], bool]


CASES = (
    Case("faults", None, "standard", None, lambda row: row["verdict"] == "steady"),
    Case(
        "leak",
        20,
        "",
        functools.partial(soak_defects.leaking, mb_a_minute=1.0),
        lambda row: row["host_memory_mb_verdict"] == "growing",
    ),
    Case(
        "drift",
        3,
        "",
        functools.partial(soak_defects.drifting, after_calls=DEFECT_AT),
        lambda row: row["canary_drifted"] > 0,
    ),
    Case(
        "stall",
        3,
        "",
        functools.partial(soak_defects.stalling, at_call=DEFECT_AT, seconds=STALL_SECONDS),
        lambda row: row["stalls"] == 1,
    ),
    Case(
        "hang",
        3,
        "",
        functools.partial(soak_defects.hanging, at_call=DEFECT_AT),
        lambda row: row["restarts"] >= 1 and row["grabbed"] == row["accounted"],
    ),
)


def main() -> int:
    """Runs the cases and writes the file."""
    arguments = parse()
    with Detector.open(arguments.folder) as detector:
        is_plan = detector.status.plan is not None
    device = gpu_name(this_machine().gpu) if is_plan else "cpu"
    path = ROOT / "results" / f"soak.{device}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    pictures = arguments.images or rendered(arguments.folder)
    failed = 0
    for case in CASES:
        if case.name not in (arguments.only or [one.name for one in CASES]):
            continue
        row = run(case, arguments, pictures)
        print(json.dumps(row), flush=True)
        failed += not row["is_found"]
        rows = [one for one in rows if (one["model"], one["case"]) != (row["model"], row["case"])] + [row]
        write_results(path, "soak", "python benchmarks/soak.py FOLDER", rows)
    return 1 if failed else 0


def run(case: Case, arguments: argparse.Namespace, pictures: Path) -> Dict[str, Any]:
    """One soak, as a row."""
    folder = arguments.folder / "soak" / case.name
    recipe: Any = functools.partial(Detector.open, arguments.folder)
    job = Job(
        case.defect(recipe) if case.defect else recipe,
        belt.source_of(str(pictures)),
        folder / soaking.CANARY,
        CANARY_EVERY if case.defect else Job.canary_every,
        belt.parse_faults(case.faults) if case.faults else None,
    )
    model = arguments.folder.resolve().name
    settings = {"model": model, "source": "belt", "faults": case.faults, "case": case.name}
    seconds = 60 * (arguments.minutes if case.minutes is None else case.minutes)
    resume = arguments.resume and (folder / soaking.CHECKPOINT).is_file()
    record = soaking.soak(job, folder, seconds, settings, resume=resume, tools=soaking.Tools(say=say))
    write_soak(record, folder)
    row = figures(record)
    elsewhere = [one["cpu_elsewhere"] for one in record.rows if "cpu_elsewhere" in one]
    return {
        "model": model,
        "case": case.name,
        "is_found": case.is_found(row),
        "faults": case.faults or None,
        "backend": record.description,
        **row,
        "cpu_elsewhere": round(float(np.mean(elsewhere)), 3) if elsewhere else None,
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def rendered(folder: Path) -> Path:
    """A folder of scenes that the detector was not trained on."""
    scenes = demonstration.unseen_scenes(folder, SCENES)
    if not scenes:
        raise InputError(f"{folder}: not a model of the shipped parts; name pictures with --images")
    return demonstration.keep(folder / "soak", scenes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--resume", action="store_true", help="go on with runs that were interrupted")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
