"""Plans of the full TensorRT on a GPU: builds, memory, latency, and agreement with ONNX Runtime.

    python benchmarks/tensorrt_gpu.py record FOLDER [NAME ...]           on a machine with the corpus, first
    python benchmarks/tensorrt_gpu.py build FOLDER PLUGIN [NAME[:ARITHMETIC] ...]    on the GPU machine
    python benchmarks/tensorrt_gpu.py run FOLDER PLUGIN [NAME[:ARITHMETIC] ...]      the plans that were built
    python benchmarks/tensorrt_gpu.py merge FILE ...                                 rows of other runs

write results/tensorrt<version>.<gpu>.json, each figure as soon as it is measured. What was measured before
stays until the same row gives a new figure; without an arithmetic NAME means all of them. A row that was
stopped keeps the figures that it has, and says so in ``error``. PLUGIN: libodtrt_tensorrt.so. Needs numpy,
tensorrt and odtrt_lib there, on Python 3.8 or newer. ``build`` leaves the plans in out/tensorrt, so that
builds, which take minutes and may share a GPU, are apart from ``run``, which needs it alone. Each model and
arithmetic is a process of its own with an empty timing cache, and gives two rows, ``form`` split and fused:

* ``arithmetic``: FP32 is measured with NVIDIA_TF32_OVERRIDE=0, TF32 without; FP16 sets the builder's flag.
* ``build_cold_seconds``: the first build; ``build_warm_seconds``: the same again with the timing cache of the
  first. The fused plan is built once, with the timing cache of the split one. ``builds_at_once``: how many
  shared the GPU, from the environment's BUILDS_AT_ONCE. ``peak_rss_mb``, ``peak_gpu_mb`` (only if one): of
  the first build of that form.
* ``load_seconds``: from the plan's bytes to the end of a first run. ``device_memory_mb``: what the loaded
  plan takes besides CUDA's own context; ``device_memory_left_mb``: what is gone after it was closed.
* ``boxes_relative_err``, ``logits_relative_err``: the largest difference from ONNX Runtime's single
  precision, divided by the largest value there. Split only: a fused plan shows no heads.
* ``postprocessing_is_exact``: the kernels find, bit for bit, what the post-processing on the CPU finds in the
  same heads. Split only.
* ``detections`` and what follows: ONNX Runtime's detections beside the plan's, by
  :func:`odtrt_lib.evaluate.agreement`. ``at_threshold``: pairs whose score is as close to the threshold as
  the tolerance. They say something only where the weights were trained.
* ``network_graph_*``: device time of one run of the plan, a CUDA graph of 20 runs timed by events and divided
  by 20. ``device_graph_*``: the same of plan and post-processing. ``network_eager_*``: wall clock of one run
  that is enqueued and waited for. ``detect_*``: wall clock of ``Detector.detect``, from the decoded image to
  boxes.

A row passes if FP32 differs by at most 1e-3 and TF32 and FP16 by at most 2e-2, the post-processing is exact,
and trained weights find the same. The exit status is 1 if a row does not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from gpu_times import free_device_mb, gpu_name, graph_times, whole_frame
from recorded_heads import (
    ARITHMETIC,
    LARGEST_RELATIVE_ERROR,
    WHOLE_IMAGE,
    differences,
    is_exact,
    same_detections,
)

from odtrt_lib import engine, portability
from odtrt_lib.detector import Detector, load_anchors
from odtrt_lib.engine import passport
from odtrt_lib.errors import OdtrtError, one_line
from odtrt_lib.latency.timing import Sampling, time_calls
from odtrt_lib.machine import this_machine
from odtrt_lib.nms import postprocess
from odtrt_lib.results import write_results
from odtrt_lib.spec import DetectorSpec, load_spec

ROOT = Path(__file__).resolve().parents[1]
FORMS = ("split", "fused")
WORK = ROOT / "out" / "tensorrt"
BUILDS_AT_ONCE = "BUILDS_AT_ONCE"
SAMPLING = Sampling(warmup=30, min_count=20, max_count=300, seconds=4.0)
TIMEOUT_SECONDS = {"build": 1700, "run": 300}
NOT_FINISHED = {"build": "built, and not run", "run": "not finished"}
COMMAND = "python benchmarks/tensorrt_gpu.py run FOLDER PLUGIN"


def main(arguments: List[str]) -> int:
    """What the module says."""
    if len(arguments) >= 2 and arguments[0] == "record":
        record(Path(arguments[1]), arguments[2:])
        return 0
    if len(arguments) == 5 and arguments[0] == "--row":
        measure(arguments[1], Path(arguments[2]), Path(arguments[3]), arguments[4])
        return 0
    if len(arguments) >= 3 and arguments[0] in TIMEOUT_SECONDS:
        return run(arguments[0], Path(arguments[1]), Path(arguments[2]), arguments[3:])
    if len(arguments) >= 2 and arguments[0] == "merge":
        return merge([Path(one) for one in arguments[1:]])
    print(__doc__)
    return 2


# ---- On a machine with the corpus -----------------------------------------------------------------------


def record(target: Path, names: Sequence[str]) -> None:
    """Model folders with both forms, an image, and what ONNX Runtime makes of it (``reference.npz``)."""
    from engine import MODELS, PARTS, PARTS_640, RECORDED, noise, prepare, scene

    from odtrt_lib.fuse import fuse

    chosen = list(names or RECORDED)
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    prepare(corpus, chosen)
    for name in chosen:
        folder = target / name
        shutil.copytree(MODELS / name, folder, ignore=shutil.ignore_patterns("frozen.pb", "plans"))
        fuse(folder)
        detector = Detector.open(folder, "onnxruntime")
        spec = detector.spec
        image = scene(spec) if name in (PARTS, PARTS_640) else noise(spec)
        heads = detector.backend.infer(image)
        found = postprocess(*heads, detector.anchors, spec, WHOLE_IMAGE)
        count = found.num_detections[0]
        anchors = np.unique(np.linspace(0, spec.heads.num_anchors - 1, 4096).astype(np.int64))
        np.savez_compressed(
            folder / "reference.npz",
            weights=RECORDED[name],
            image=image,
            anchors=anchors,
            box_encodings=heads[0][:, anchors],
            class_logits=heads[1][:, anchors],
            boxes=found.boxes[0, :count],
            scores=found.scores[0, :count],
            classes=found.classes[0, :count],
        )
        print(f"{name}: recorded", flush=True)


# ---- On the GPU machine ---------------------------------------------------------------------------------


def run(task: str, recorded: Path, plugin: Path, names: Sequence[str]) -> int:
    """``build`` or ``run`` of the models that ``names`` chooses; the exit status."""
    path = results_path()
    if path is None:
        print("no GPU, or no tensorrt here: this script measures both")
        return 2
    rows = rows_in(path)
    failed = False

    def keep(row: Dict[str, Any]) -> None:
        merge_row(rows, row)
        write_results(path, "tensorrt", COMMAND, rows)

    for name, arithmetic in wanted(recorded, names):
        for row in rows_of(task, recorded / name, plugin, arithmetic, keep):
            print(json.dumps(row), flush=True)
            failed = failed or row.get("error", NOT_FINISHED["build"]) != NOT_FINISHED["build"]
            failed = failed or (task == "run" and not row["passed"])
    return int(failed or not rows)


def merge(files: Sequence[Path]) -> int:
    """Adds the rows of other results files, as of runs in other folders at the same time."""
    path = results_path()
    if path is None:
        print("no GPU, or no tensorrt here: the results file is named after both")
        return 2
    rows = rows_in(path)
    for file in files:
        for row in rows_in(file):
            merge_row(rows, row)
    write_results(path, "tensorrt", COMMAND, rows)
    return 0


def results_path() -> Optional[Path]:
    gpu, here = this_machine().gpu, portability.this_environment()
    if gpu is None or here.runtime_library != "tensorrt":
        return None
    release = "".join(str(here.version).split(".")[:2])
    return ROOT / "results" / f"tensorrt{release}.{gpu_name(gpu)}.json"


def rows_in(path: Path) -> List[Dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def merge_row(rows: List[Dict[str, Any]], row: Dict[str, Any]) -> None:
    """Puts ``row`` in the place of an earlier one, unless that one is whole and this one is not."""
    earlier = next((one for one in rows if identity(one) == identity(row)), None)
    if earlier is None or not earlier["passed"] or row.get("error") not in NOT_FINISHED.values():
        rows[:] = [one for one in rows if one is not earlier] + [row]


def wanted(recorded: Path, names: Sequence[str]) -> List[Tuple[str, str]]:
    """Models and arithmetic values, in the order of ``names``, all of ``recorded`` if there are none.

    Raises SystemExit for a name that was not recorded.
    """
    found = []
    for word in names or sorted(one.name for one in recorded.iterdir() if one.is_dir()):
        name, _, arithmetic = word.partition(":")
        if not (recorded / name / "spec.json").is_file() or arithmetic not in ("", *ARITHMETIC):
            raise SystemExit(f"{word}: not a model in {recorded}, or not one of {', '.join(ARITHMETIC)}")
        found += [(name, one) for one in ([arithmetic] if arithmetic else ARITHMETIC)]
    return found


def identity(row: Dict[str, Any]) -> Tuple[str, str, str]:
    return row["model"], row["arithmetic"], row["form"]


def rows_of(
    task: str, recorded: Path, plugin: Path, arithmetic: str, keep: Callable[[Dict[str, Any]], None]
) -> List[Dict[str, Any]]:
    """Both forms, measured by a process of their own; ``error`` says why one is missing.

    keep: is given a row whenever it has new figures, and at the end each that lacks some.
    """
    about = {
        "model": recorded.name,
        "arithmetic": arithmetic,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    unfinished = NOT_FINISHED[task]
    rows: Dict[str, Dict[str, Any]] = {
        form: {"form": form, **about, "passed": False, "error": unfinished} for form in FORMS
    }
    told = set()
    problem = None
    process = start_row(task, recorded, plugin, arithmetic)
    late = threading.Timer(TIMEOUT_SECONDS[task], process.kill)
    late.start()
    try:
        for line in process.stdout or ():
            if line.startswith("{"):
                part = json.loads(line)
                row = rows[part["form"]]
                if "passed" in part and row["error"] == unfinished:
                    del row["error"]
                row.update(part)
                told.add(part["form"])
                keep(row)
        if process.wait() != 0:
            problem = f"exit status {process.returncode}, or stopped after {TIMEOUT_SECONDS[task]} s"
    finally:
        late.cancel()
        if process.poll() is None:
            process.kill()
        process.wait()
    for form, row in rows.items():
        if row.get("error") == unfinished and problem is not None:
            row["error"] = problem
            if form in told:
                keep(row)
    return list(rows.values())


def start_row(task: str, recorded: Path, plugin: Path, arithmetic: str) -> subprocess.Popen[str]:
    """The process that builds or runs, which starts a build with an empty timing cache."""
    work = WORK / recorded.name / arithmetic
    if task == "build":
        shutil.rmtree(work, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if name != engine.TF32_OVERRIDE}
    if arithmetic == "FP32":
        environment[engine.TF32_OVERRIDE] = "0"
    environment["XDG_CACHE_HOME"] = str(work / "cache")
    command = [sys.executable, __file__, "--row", task, str(recorded), str(plugin), arithmetic]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def measure(task: str, recorded: Path, plugin: Path, arithmetic: str) -> None:
    """Prints the figures of both rows as they are measured, each as JSON, and the reason if one fails."""
    work = WORK / recorded.name / arithmetic
    for form in FORMS:
        folder = work / form / recorded.name
        figures = work / f"{form}.json"
        chosen = plugin if form == "fused" else None
        try:
            if task == "build":
                shutil.copytree(recorded, folder)
                for part in build(folder, ARITHMETIC[arithmetic][0], chosen):
                    figures.write_text(json.dumps(part))
                    tell(form, part)
            else:
                if not figures.is_file():
                    raise OdtrtError(f"{folder}: holds no plan; `build` makes it")
                tell(form, {**json.loads(figures.read_text()), **load_and_run(folder, arithmetic, chosen)})
        except Exception as error:
            traceback.print_exc()
            tell(form, {"error": one_line(error).replace(str(work), "")})


def tell(form: str, part: Dict[str, Any]) -> None:
    print(json.dumps({"form": form, **part}), flush=True)


def build(folder: Path, precision: str, plugin: Optional[Path]) -> Iterator[Dict[str, Any]]:
    """A split plan is built twice, the second time with the timing cache of the first, a fused one once.

    The figures after each build.
    """
    at_once = int(os.environ.get(BUILDS_AT_ONCE, "1"))
    seconds, attempts = [], []
    for _ in range(2 if plugin is None else 1):
        started = time.perf_counter()
        engine.build(folder, precision=precision, plugin=plugin, force=True)
        seconds.append(time.perf_counter() - started)
        (found,) = passport.passports(folder)
        attempts.append(found.attempts[-1])
        yield {
            "weights": str(np.load(str(folder / "reference.npz"))["weights"]),
            "version": found.version,
            "build_cold_seconds": round(seconds[0], 2) if plugin is None else None,
            "build_warm_seconds": round(seconds[-1], 2) if plugin is not None or len(seconds) > 1 else None,
            "peak_rss_mb": attempts[0]["peak_rss_mb"],
            "peak_gpu_mb": attempts[0]["peak_gpu_mb"] if at_once == 1 else None,
            "builds_at_once": at_once,
            "plan_mb": round(found.plan_bytes / 1e6, 2),
            "layers_fp32": found.layers.get("fp32", 0),
            "layers_fp16": found.layers.get("fp16", 0),
            "layers_other": sum(found.layers.values())
            - sum(found.layers.get(k, 0) for k in ("fp32", "fp16")),
            "layers_counted_in": found.settings["layers_counted_in"],
            "tf32_flag": found.settings["tf32"],
            "plugin_interface": None if found.plugin is None else found.plugin.abi,
        }


def load_and_run(folder: Path, arithmetic: str, plugin: Optional[Path]) -> Dict[str, Any]:
    """Loading, agreement and latency of the one plan in ``folder``."""
    from odtrt_lib.engine import pipeline

    spec = load_spec(folder / "spec.json")
    anchors = load_anchors(folder / "anchors.npy", spec)
    (found,) = passport.passports(folder)
    reference = np.load(str(folder / "reference.npz"))
    before = free_device_mb()
    started = time.perf_counter()
    plan = pipeline.load(folder, found, spec, anchors, plugin=plugin)
    row: Dict[str, Any] = {
        "load_seconds": round(time.perf_counter() - started, 2),
        "device_memory_mb": round(before - free_device_mb(), 1),
        "postprocessing": plan.postprocessing,
    }
    try:
        detections = plan.run_prepared(reference["image"], [whole_frame(spec)])
        if plugin is None:
            row.update(heads_against(reference, plan, detections, anchors, spec))
        agrees, counts = same_detections(reference, detections, spec, arithmetic)
        row.update(counts)
        row.update(device_times(plan))
        row.update(time_calls(plan.run_again, SAMPLING).row("network_eager_"))
    finally:
        plan.close()
    row["device_memory_left_mb"] = round(before - free_device_mb(), 1)
    row.update(detect_times(folder, found, plugin))
    errors = [row[name] for name in ("boxes_relative_err", "logits_relative_err") if name in row]
    row["passed"] = (
        max(errors, default=0.0) <= LARGEST_RELATIVE_ERROR[arithmetic]
        and row.get("postprocessing_is_exact") is not False
        and (agrees or str(reference["weights"]) != "trained")
    )
    return row


def heads_against(
    reference: Any, plan: Any, detections: Any, anchors: np.ndarray, spec: DetectorSpec
) -> Dict[str, Any]:
    heads = plan.infer(reference["image"])
    on_cpu = postprocess(*heads, anchors, spec, WHOLE_IMAGE)
    row: Dict[str, Any] = dict(differences(heads, reference))
    row["postprocessing_is_exact"] = is_exact(detections, on_cpu)
    return row


def detect_times(folder: Path, found: passport.Passport, plugin: Optional[Path]) -> Dict[str, float]:
    rng = np.random.default_rng(0)
    with Detector.open(folder, "tensorrt", plugin=plugin, precision=found.precision) as detector:
        network = detector.spec.input
        image = rng.integers(0, 256, (network.height, network.width, 3), dtype=np.uint8)
        return time_calls(lambda: detector.detect(image), SAMPLING).row("detect_")


# ---- Times on the device ---------------------------------------------------------------------------------


def device_times(plan: Any) -> Dict[str, float]:
    """Device time of the plan alone and with its post-processing, in CUDA graphs."""

    def with_postprocessing() -> None:
        plan.enqueue_network()
        plan.enqueue_postprocess()

    network = graph_times(plan.enqueue_network, plan.stream, SAMPLING)
    rows = network.row("network_graph_")
    if plan.is_fused:
        rows.update(network.row("device_graph_"))
    elif plan.switches.postprocess == "gpu":
        rows.update(graph_times(with_postprocessing, plan.stream, SAMPLING).row("device_graph_"))
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
