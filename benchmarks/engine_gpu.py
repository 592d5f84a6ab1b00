"""Plans on a GPU by TensorRT-RTX: build, load, latency, and agreement with ONNX Runtime.

    python benchmarks/engine.py record FOLDER        on a machine with the corpus, first
    python benchmarks/engine_gpu.py FOLDER           writes results/engine.<gpu>.json; on the GPU machine
    python benchmarks/engine_gpu.py FOLDER NAME ...  these models only, and writes nothing

Needs numpy, tensorrt_rtx, Polygraphy and odtrt_lib there; FOLDER holds the models in both precisions and
ONNX Runtime's heads for one image. One row a model and precision:

* ``build_cold_seconds``, ``build_warm_seconds``: two builds one after the other. TensorRT-RTX has no timing
  cache, so the second can gain from the file system's cache only; ``timing_cache`` says so.
* ``load_cold_seconds``, ``load_warm_seconds``: from the plan's bytes to a first run, without and with the
  runtime cache, in which TensorRT-RTX keeps the kernels that it compiled.
* ``p50_ms`` and so on: one run of the network on device memory, batch 1, no CUDA graph.
* ``boxes_relative_err``, ``logits_relative_err``: the largest difference from ONNX Runtime's single
  precision, divided by the largest value there.

A row fails where FP32 differs by more than 1e-3 or FP16 by more than 2e-2; the exit status is 1 then.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib import engine, passport
from odtrt_lib.detector import load_anchors
from odtrt_lib.errors import OdtrtError
from odtrt_lib.results import write_results
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
LARGEST_RELATIVE_ERROR = {"fp32": 1e-3, "fp16": 2e-2}
WARM_UP, RUNS = 50, 500


def main(arguments: list[str]) -> int:
    """What the module says."""
    if not arguments:
        print(__doc__)
        return 2
    recorded, chosen = Path(arguments[0]), set(arguments[1:])
    gpu = passport.this_machine().gpu
    if gpu is None:
        print("no GPU here: this script measures one")
        return 2
    rows = []
    for precision in engine.PRECISIONS:
        for folder in sorted(path for path in (recorded / precision).iterdir() if path.is_dir()):
            if not chosen or folder.name in chosen:
                rows.append(measured(folder, precision))
                print(rows[-1], flush=True)
    if not chosen:
        short = gpu.lower().replace("nvidia", "").split()[0]
        path = ROOT / "results" / f"engine.{short}.json"
        write_results(path, "engine", "python benchmarks/engine_gpu.py FOLDER", rows)
    return 0 if rows and all(row["passed"] for row in rows) else 1


def measured(recorded: Path, precision: str) -> dict[str, Any]:
    """One row. A model that fails is a row too, with the reason."""
    row: dict[str, Any] = {"kind": "gpu", "model": recorded.name, "precision": precision, "passed": False}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / recorded.name
        shutil.copytree(recorded, folder)
        try:
            row.update(build(folder, precision))
            row.update(run(folder, precision))
            row["passed"] = is_within(row, precision)
        except OdtrtError as error:
            row["error"] = str(error).replace(str(work), "")
    return row


def build(folder: Path, precision: str) -> dict[str, Any]:
    """Two builds; the recorded fp16 models are half precision already."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        engine.build(folder, precision=precision, force=True)
        seconds.append(time.perf_counter() - started)
    (found,) = passport.passports(folder)
    return {
        "version": found.version,
        "build_cold_seconds": round(seconds[0], 2),
        "build_warm_seconds": round(seconds[1], 2),
        "timing_cache": str(found.settings["timing_cache"]).partition(":")[0],
        "peak_rss_mb": found.attempts[-1]["peak_rss_mb"],
        "peak_gpu_mb": found.attempts[-1]["peak_gpu_mb"],
        "plan_mb": round(found.plan_bytes / 1e6, 2),
        "layers_fp32": found.layers.get("fp32", 0),
        "layers_fp16": found.layers.get("fp16", 0),
        "layers_counted_in": found.settings["layers_counted_in"],
    }


def run(folder: Path, precision: str) -> dict[str, Any]:
    """Loading, latency and agreement of the one plan in ``folder``."""
    from odtrt_lib import runtime

    spec = load_spec(folder / "spec.json")
    anchors = load_anchors(folder / "anchors.npy", spec)
    (found,) = passport.passports(folder)
    reference = np.load(folder / "reference.npz")
    loads, plan = [], None
    for _ in range(2):
        started = time.perf_counter()
        plan = runtime.load(folder, found, spec, anchors)
        loads.append(time.perf_counter() - started)
        if len(loads) == 1:
            plan.close()
    assert plan is not None
    try:
        heads = plan.infer(reference["image"])
        row = {
            "load_cold_seconds": round(loads[0], 2),
            "load_warm_seconds": round(loads[1], 2),
            **differences(heads, reference),
            **latency(plan.run_again),
        }
    finally:
        plan.close()
    return row


def differences(heads: tuple[np.ndarray, np.ndarray], reference: Any) -> dict[str, float]:
    """The largest differences from the recorded heads, as shares of the largest value there."""
    found = {}
    for name, array, key in zip(("boxes", "logits"), heads, ("box_encodings", "class_logits"), strict=True):
        expected = reference[key].astype(np.float64)
        difference = np.abs(array[:, reference["anchors"]] - expected)
        worst = float(difference.max()) if np.isfinite(difference).all() else float("inf")
        found[f"{name}_relative_err"] = min(worst / float(np.abs(expected).max()), 1e9)
    return found


def latency(once: Callable[[], None]) -> dict[str, float]:
    """Percentiles of one run, milliseconds."""
    times = []
    for number in range(WARM_UP + RUNS):
        started = time.perf_counter()
        once()
        if number >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - started))
    return {
        name: round(float(np.percentile(times, share)), 4)
        for name, share in (("p50_ms", 50), ("p95_ms", 95), ("p99_ms", 99))
    }


def is_within(row: dict[str, Any], precision: str) -> bool:
    """Whether the heads agree as far as the precision allows."""
    errors = (row["boxes_relative_err"], row["logits_relative_err"])
    return max(errors) <= LARGEST_RELATIVE_ERROR[precision]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
