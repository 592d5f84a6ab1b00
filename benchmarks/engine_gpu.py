"""Plans on a GPU by TensorRT-RTX: build, load, latency, and agreement with ONNX Runtime.

    python benchmarks/engine.py record FOLDER        on a machine with the corpus, first
    python benchmarks/engine_gpu.py FOLDER           writes results/engine.<gpu>.json; on the GPU machine
    python benchmarks/engine_gpu.py FOLDER NAME ...  measures these models again; the other rows stay

Needs numpy, tensorrt_rtx, Polygraphy and odtrt_lib there; FOLDER holds the models in both precisions and
what ONNX Runtime makes of one image. Each model and arithmetic is a process of its own and one row, written
as soon as it is measured:

* ``date``: the day of this row's measurement, UTC. That of the whole file is its last row's.
* ``arithmetic``: what the network multiplies in. TensorRT-RTX runs an fp32 plan in TF32, whatever the
  builder's flag said (``tf32_flag``), unless NVIDIA_TF32_OVERRIDE=0 stands in the environment: ``FP32``.
* ``build_cold_seconds``, ``build_warm_seconds``: two builds one after the other. TensorRT-RTX has no timing
  cache, so the second can gain from the file system's cache only; ``timing_cache`` says so. ``peak_*``: host
  and device memory of the second.
* ``load_cold_seconds``, ``load_warm_seconds``: from the plan's bytes to a first run, without and with the
  runtime cache, in which TensorRT-RTX keeps the kernels that it compiled. ``load_peak_rss_mb``: the host
  memory that the whole process has had by then; ``device_memory_mb``: what the loaded plan takes besides
  CUDA's own context, ``device_memory_left_mb``: what is still gone after it was closed.
  ``kernels_mb``: the kept kernels.
* ``p50_us`` and so on: one run of the network on device memory, batch 1, no CUDA graph; ``runs`` of them
  were timed. Rows without ``runs`` come from the older form of this script, which always timed 500.
* ``boxes_relative_err``, ``logits_relative_err``: the largest difference from ONNX Runtime's single
  precision, divided by the largest value there. ``half_*``: the same of ONNX Runtime in half precision: what
  rounding does to these weights, whoever computes.
* ``postprocessing_is_exact``: the kernels find, bit for bit, what the post-processing on the CPU finds in
  the same heads; empty where there are no kernels for the detector.
* ``detections`` and what follows: ONNX Runtime's detections beside the plan's, by
  :func:`odtrt_lib.evaluate.agreement`. They say something only where the weights were trained: others give
  hundreds of scores that are equal but for rounding. Those are excused as ``at_threshold``.

A row fails where FP32 differs by more than 1e-3, TF32 or FP16 by more than 2e-2, where the post-processing
is not exact, and where trained weights do not find the same; the exit status is 1 then.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from backends_gpu import in_a_process
from gpu_times import free_device_mb, gpu_name, whole_frame
from recorded_heads import (
    ARITHMETIC,
    LARGEST_RELATIVE_ERROR,
    WHOLE_IMAGE,
    differences,
    is_exact,
    same_detections,
)

from odtrt_lib import engine
from odtrt_lib.anchors import load_anchors
from odtrt_lib.engine import builder, passport
from odtrt_lib.latency.timing import Sampling, time_calls
from odtrt_lib.machine import this_machine
from odtrt_lib.nms import postprocess
from odtrt_lib.results import write_results
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = Sampling(warmup=50, min_count=50, max_count=500, seconds=7.5)


def main(arguments: list[str]) -> int:
    """What the module says."""
    if not arguments:
        print(__doc__)
        return 2
    if arguments[0] == "--row":
        measure(Path(arguments[1]), arguments[2])
        return 0
    recorded, chosen = Path(arguments[0]), arguments[1:]
    gpu = this_machine().gpu
    if gpu is None:
        print("no GPU here: this script measures one")
        return 2
    path = ROOT / "results" / f"engine.{gpu_name(gpu)}.json"
    rows = json.loads(path.read_text())["rows"] if chosen and path.is_file() else []
    everything = sorted(path.name for path in (recorded / "fp32").iterdir() if path.is_dir())
    for name in chosen or everything:
        for arithmetic, (precision, _, _) in ARITHMETIC.items():
            row: dict[str, Any] = {"kind": "gpu", "model": name}
            today = datetime.now(timezone.utc).date().isoformat()
            row.update(precision=precision, arithmetic=arithmetic, date=today, passed=False)
            folder = recorded / precision / name
            row.update(in_a_process([__file__, "--row", str(folder), arithmetic], arithmetic, folder))
            if "error" in row:
                row["passed"] = False
            rows = [one for one in rows if identity(one) != identity(row)] + [row]
            print(row, flush=True)
            write_results(path, "engine", "python benchmarks/engine_gpu.py FOLDER", rows)
    return 0 if rows and all(row["passed"] for row in rows) else 1


def identity(row: dict[str, Any]) -> tuple[str, str]:
    return row["model"], row["arithmetic"]


def measure(recorded: Path, arithmetic: str) -> None:
    """Prints the parts of a row as they are measured, each as JSON, and the reason where one fails."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / recorded.name
        shutil.copytree(recorded, folder)
        try:
            print(json.dumps(build(folder, ARITHMETIC[arithmetic][0])), flush=True)
            print(json.dumps(run(folder, arithmetic)), flush=True)
        except Exception as error:
            traceback.print_exc()
            reason = str(error).replace(str(work), "") or type(error).__name__
            print(json.dumps({"error": reason}), flush=True)


def build(folder: Path, precision: str) -> dict[str, Any]:
    """Two builds; the recorded fp16 models are half precision already."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        engine.build(folder, precision=precision, force=True)
        seconds.append(time.perf_counter() - started)
    (found,) = passport.passports(folder)
    return {
        "weights": str(np.load(folder / "reference.npz")["weights"]),
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
        "tf32_flag": found.settings["tf32"],
    }


def run(folder: Path, arithmetic: str) -> dict[str, Any]:
    """Loading, latency and agreement of the one plan in ``folder``."""
    from odtrt_lib.engine import pipeline

    spec = load_spec(folder / "spec.json")
    anchors = load_anchors(folder / "anchors.npy", spec)
    (found,) = passport.passports(folder)
    reference = np.load(folder / "reference.npz")
    before = free_device_mb()
    row: dict[str, Any] = {}
    for name in ("load_cold_seconds", "load_warm_seconds"):
        started = time.perf_counter()
        plan = pipeline.load(folder, found, spec, anchors)
        row[name] = round(time.perf_counter() - started, 2)
        if name == "load_cold_seconds":
            row["load_peak_rss_mb"] = builder.peak_rss_mb("self")
            row["device_memory_mb"] = round(before - free_device_mb(), 1)
            plan.close()
            row["device_memory_left_mb"] = round(before - free_device_mb(), 1)
            kept = (folder / passport.PLANS).glob("*.kernels")
            row["kernels_mb"] = round(sum(path.stat().st_size for path in kept) / 1e6, 2)
    try:
        heads = plan.infer(reference["image"])
        row.update(differences(heads, reference))
        found_on_cpu = postprocess(*heads, anchors, spec, WHOLE_IMAGE)
        row["postprocessing"], row["postprocessing_is_exact"] = plan.postprocessing, None
        if plan.postprocessing == "on the GPU":
            found_on_gpu = plan.run_prepared(reference["image"], [whole_frame(spec)])
            row["postprocessing_is_exact"] = is_exact(found_on_gpu, found_on_cpu)
        agrees, counts = same_detections(reference, found_on_cpu, spec, arithmetic)
        row.update(counts)
        row.update(time_calls(plan.run_again, SAMPLING).row())
    finally:
        plan.close()
    is_trained = str(reference["weights"]) == "trained"
    if arithmetic == "FP16":
        row.update({name: float(reference[name]) for name in reference.files if name.startswith("half_")})
    row["passed"] = (
        max(row["boxes_relative_err"], row["logits_relative_err"]) <= LARGEST_RELATIVE_ERROR[arithmetic]
        and row["postprocessing_is_exact"] is not False
        and (agrees or not is_trained)
    )
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
