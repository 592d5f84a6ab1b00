"""What a loaded plan leaves on the GPU after it was closed, and whether the threads' stacks are its cause.

    python benchmarks/device_memory_gpu.py RECORDED [NAME ...]       on the GPU machine

writes results/device_memory.<gpu>.json. RECORDED: what ``tensorrt_gpu.py record`` wrote; NAME: models in it,
unasked all of :data:`MODELS`. Needs numpy, TensorRT or TensorRT-RTX and odtrt_lib, and a GPU that
nobody else uses. CUDA enlarges the stack
of every thread that the GPU can hold when a kernel needs more, and never makes it smaller ("This size isn't
reset back to the original value after each launch", cudaDeviceSetLimit). Each row is a process of its own:

* ``device_memory_mb``: what loading and one run took besides CUDA's own context, after the first kernel of
  odtrt; ``left_mb``: what of it is gone after ``close``.
* ``stack_bytes``, ``stack_bytes_after``: cudaLimitStackSize of a thread, before and after the run.
* ``left_after_stack_reset_mb``: what is gone when the limit was set to its first value again.
* ``threads``: as many as the GPU holds at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
from gpu_times import free_device_mb, gpu_name, whole_frame
from recorded_heads import ARITHMETIC

from odtrt_lib import cuda, engine
from odtrt_lib.detector import load_anchors
from odtrt_lib.engine import passport
from odtrt_lib.errors import one_line
from odtrt_lib.machine import this_machine
from odtrt_lib.results import write_results
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("ssd_mobilenet_v2_fpnlite_320_parts", "efficientdet_d0_512")
COMMAND = "python benchmarks/device_memory_gpu.py RECORDED"
STACK_SIZE, MULTIPROCESSORS, THREADS_OF_ONE = 0, 16, 39  # cudaLimit and cudaDeviceAttr
SECONDS_OF_ROW = 200


def main(arguments: Sequence[str]) -> int:
    """What the module says."""
    if arguments[:1] == ["--row"]:
        print(json.dumps(measure(Path(arguments[1]), arguments[2])), flush=True)
        return 0
    if not arguments:
        print(__doc__)
        return 2
    path = ROOT / "results" / f"device_memory.{gpu_name(this_machine().gpu)}.json"
    rows: List[Dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    failed = False
    for name in arguments[1:] or MODELS:
        for arithmetic in ("FP32", "TF32"):
            row = row_of(Path(arguments[0]) / name, arithmetic)
            failed = failed or "error" in row
            print(json.dumps(row), flush=True)
            rows = [one for one in rows if identity(one) != identity(row)] + [row]
            write_results(path, "device_memory", COMMAND, rows)
    return int(failed)


def identity(row: Dict[str, Any]) -> Sequence[Any]:
    return [row.get(key) for key in ("model", "arithmetic", "runtime_library")]


def row_of(recorded: Path, arithmetic: str) -> Dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != engine.TF32_OVERRIDE}
    if arithmetic == "FP32":
        environment[engine.TF32_OVERRIDE] = "0"
    about = {
        "model": recorded.name,
        "arithmetic": arithmetic,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    command = [sys.executable, __file__, "--row", str(recorded), arithmetic]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS_OF_ROW)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            return {**about, **json.loads(line)}
    return {**about, "error": one_line(done.stderr.strip().splitlines()[-1:] or "it said nothing")}


def measure(recorded: Path, arithmetic: str) -> Dict[str, Any]:
    from odtrt_lib.engine import pipeline

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / recorded.name
        shutil.copytree(recorded, folder)
        spec = load_spec(folder / "spec.json")
        anchors = load_anchors(folder / "anchors.npy", spec)
        image = np.load(str(folder / "reference.npz"))["image"]
        engine.build(folder, precision=ARITHMETIC[arithmetic][0], force=True)
        (found,) = passport.passports(folder)
        before, stack = free_device_mb(), limit()
        plan = pipeline.load(folder, found, spec, anchors)
        plan.run_prepared(image, [whole_frame(spec)])
        taken, stack_after = before - free_device_mb(), limit()
        plan.close()
        left = before - free_device_mb()
        set_limit(stack)
        return {
            "runtime_library": found.runtime_library,
            "version": found.version,
            "device_memory_mb": round(taken, 1),
            "left_mb": round(left, 1),
            "stack_bytes": stack,
            "stack_bytes_after": stack_after,
            "left_after_stack_reset_mb": round(before - free_device_mb(), 1),
            "threads": attribute(MULTIPROCESSORS) * attribute(THREADS_OF_ONE),
        }


def limit() -> int:
    """Bytes of a thread's stack."""
    found = ctypes.c_size_t()
    checked(cuda.library().cudaDeviceGetLimit(ctypes.byref(found), STACK_SIZE))
    return found.value


def set_limit(value: int) -> None:
    # One that is as it was leaves the memory where it is.
    for one in (value + 1024, value):
        checked(cuda.library().cudaDeviceSetLimit(STACK_SIZE, ctypes.c_size_t(one)))


def attribute(number: int) -> int:
    found = ctypes.c_int()
    checked(cuda.library().cudaDeviceGetAttribute(ctypes.byref(found), number, 0))
    return found.value


def checked(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"CUDA answers {status}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
