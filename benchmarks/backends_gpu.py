"""Serving on a GPU: start, time and memory of each backend, and whether it finds what ONNX Runtime finds.

    python benchmarks/backends_gpu.py FOLDER... --images DIR [--arithmetic FP32 TF32 FP16] [--plugin FILE]

writes results/backends.<gpu>.json, and prints each row as JSON; where odtrt is not installed, from its
checkout with PYTHONPATH=. in front. FOLDER: a model folder after `odtrt convert`; plans
are built into it where it has none. DIR: pictures (JPEG, PNG, or uint8 [height, width, 3] in .npy); a folder
that has some of its own, in scenes/, is measured on those. FILE: libodtrt_tensorrt.so; with it fused plans
are built and served too. Needs no TensorFlow. Build times and the raw heads are benchmarks/engine_gpu.py's
subject.

A row is one model on one backend, in a process of its own, written as soon as it is measured:

* ``arithmetic``: what the network multiplies in. TensorRT-RTX runs an fp32 plan in TF32, whatever the
  builder's flag said, unless NVIDIA_TF32_OVERRIDE=0 stands in the environment: ``FP32``.
* ``agrees`` and what follows: its detections beside ONNX Runtime's, by :func:`odtrt_lib.evaluate.agreement`,
  at the IoU and the score tolerance that the row says; ``sure_*``: those with a score of at least 0.3.
  ``batch_agrees``: those of :meth:`detect_batch` over all pictures; ``submit_agrees``: those of
  :meth:`Detector.submit`, whose results are taken at the end.
* ``detect_*``: :meth:`Detector.detect` from decoded pixels to boxes; ``network_*``: the network alone, its
  inputs already on the GPU, from the call until the stream is idle; wall clock, microseconds.
  ``detect8_*``: one of eight images that go through together, where the batch is dynamic. ``submit8_*``:
  one of eight images that are submitted and then waited for.
* ``first_start_*``, ``second_start_*``: a fresh process, seconds from opening the folder to the first
  detections, without and with the kernels that TensorRT-RTX kept from the first; the driver's own cache of
  compiled code is empty both times.
* ``device_memory_mb``: what the loaded detector takes after its first detections, besides CUDA's own context,
  in MiB. ``plan_mb``: the plan, in MB of 10^6 bytes.
* ``error``: why there is no measurement, in one line.

The exit status is 1 where a row has an ``error``, and where FP32 finds anything else than ONNX Runtime. That
TF32 or FP16 does is a finding about rounding, no failure: the rows say it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_times import free_device_mb, gpu_name
from recorded_heads import ARITHMETIC

from odtrt_lib import engine, portability
from odtrt_lib.anchors import load_anchors
from odtrt_lib.detector import Detections, Detector
from odtrt_lib.engine import passport, pipeline
from odtrt_lib.errors import OdtrtError
from odtrt_lib.evaluate import agreement, coco_results
from odtrt_lib.latency.timing import Sampling, sample, time_calls, wall_clock
from odtrt_lib.machine import this_machine
from odtrt_lib.preprocess import load_image
from odtrt_lib.results import write_results
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
SURE = 0.3
SAMPLING = Sampling(warmup=20, min_count=30, max_count=1000, seconds=2.5)
BATCH = 8
MAX_SECONDS = 180


def main() -> int:
    arguments = parse()
    if arguments.start is not None:
        print(json.dumps(start(arguments)))
        return 0
    if arguments.row is not None:
        print(json.dumps(serve(arguments.folders[0], arguments)))
        return 0
    gpu = gpu_name(this_machine().gpu)
    path = ROOT / "results" / f"backends.{gpu}.json"
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_results(path, "backends", "python benchmarks/backends_gpu.py FOLDER... --images DIR", rows)

    for folder in arguments.folders:
        reference = Detector.open(folder, "onnxruntime")
        images = read_images(folder, arguments.images)
        add({**about(folder, reference, "FP32"), **timed_detect(reference, images)})
        for arithmetic in arguments.arithmetic:
            for plugin in (None, arguments.plugin) if arguments.plugin else (None,):
                command = [__file__, str(folder), "--images", str(arguments.images), "--row", arithmetic]
                command += [] if plugin is None else ["--plugin", str(plugin)]
                form = "split" if plugin is None else "fused"
                row = {"model": folder.name, "arithmetic": arithmetic, "form": form}
                add({**row, **in_a_process(command, arithmetic, folder)})
    return 1 if any(map(has_failed, rows)) else 0


def has_failed(row: dict[str, Any]) -> bool:
    """Whether there is no measurement, or FP32, by one of the three ways of asking, does not agree."""
    answers = (row.get(name, True) for name in ("agrees", "batch_agrees", "submit_agrees"))
    return "error" in row or (row["arithmetic"] == "FP32" and not all(answers))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--arithmetic", nargs="+", choices=list(ARITHMETIC), default=list(ARITHMETIC))
    parser.add_argument("--plugin", type=Path)
    parser.add_argument("--row", choices=list(ARITHMETIC), help="measure FOLDER in it, print the row")
    parser.add_argument("--start", choices=list(ARITHMETIC), help="open FOLDER once, print the times")
    arguments = parser.parse_args()
    if arguments.images is None and arguments.start is None:
        parser.error("--images DIR is required")
    return arguments


def in_a_process(command: list[str], arithmetic: str, folder: Path) -> dict[str, Any]:
    """The JSON that a Python process prints, its lines put together; ``error`` where it fails on FOLDER.

    After MAX_SECONDS it is killed, and with it all that it started, which would go on using the GPU.
    """
    environment = {name: value for name, value in os.environ.items() if name != engine.TF32_OVERRIDE}
    if arithmetic == "FP32":
        environment[engine.TF32_OVERRIDE] = "0"
    row: dict[str, Any] = {}
    is_late = False
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            said, complaints = process.communicate(timeout=MAX_SECONDS)
        except subprocess.TimeoutExpired:
            is_late = True
            os.killpg(process.pid, signal.SIGKILL)
            said, complaints = process.communicate()
        except BaseException:  # a session of its own does not hear Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            raise
    sys.stderr.write(complaints)
    for line in said.splitlines():
        if line.startswith("{"):
            row.update(json.loads(line))
    if is_late:
        row["error"] = f"stopped after {MAX_SECONDS} s"
    elif process.returncode != 0:
        row["error"] = reason(process.returncode, complaints, folder)
    return row


def reason(status: int, complaints: str, folder: Path) -> str:
    """Why a Python process failed, in one line: an exception's message, without the path of FOLDER."""
    last = (complaints.strip().splitlines() or [""])[-1]
    raised = re.fullmatch(r"[\w.]+: (.+)", last) if status == 1 else None
    said = raised[1] if raised else f"exit status {status}: {last}"
    return said.replace(f"{folder}: ", "").replace(f"{folder}/", "")


def read_images(model: Path, folder: Path) -> list[np.ndarray]:
    folder = model / "scenes" if (model / "scenes").is_dir() else folder
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".npy", ".jpg", ".jpeg", ".png"))
    if not paths:
        sys.exit(f"{folder}: no .npy, .jpg, .jpeg or .png in it")
    return [np.load(path) if path.suffix == ".npy" else load_image(path) for path in paths]


def serve(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: a plan of the TensorRT that is installed here."""
    arithmetic, plugin = arguments.row, arguments.plugin
    precision, iou, tolerance = ARITHMETIC[arithmetic]
    images = read_images(folder, arguments.images)
    expected = detections(Detector.open(folder, "onnxruntime"), images)
    engine.build(folder, precision=precision, plugin=plugin)
    here = portability.this_environment(plugin)
    model = "heads.onnx" if plugin is None else "detector.onnx"
    plan = portability.best_plan(folder, here, model, precision)
    if plan is None or here.runtime_library is None:
        raise OdtrtError(f"{folder}: the plan that was just built may not be used here")
    row: dict[str, Any] = timed_starts(folder, plan.plan, arithmetic, plugin)
    before = free_device_mb()
    with Detector.open(folder, here.runtime_library, plugin=plugin, precision=precision) as detector:
        detector.detect(images[0])
        row["device_memory_mb"] = round(before - free_device_mb(), 1)
        row["plan_mb"] = round(plan.plan_bytes / 1e6, 1)
        compare = functools.partial(
            agreement,
            expected,
            iou=iou,
            score_tolerance=tolerance,
            max_detections=detector.spec.nms.max_total_detections,
        )
        found = detections(detector, images)
        compared = compare(found)
        row.update(
            agrees=compared.agrees,
            batch_agrees=compare(in_coco_form(detector.detect_batch(images))).agrees,
            submit_agrees=compare(in_coco_form(submitted(detector, images))).agrees,
            iou=iou,
            score_tolerance=tolerance,
            images=compared.images,
            references=compared.references,
            matched=compared.matched,
            missing=len(compared.missing),
            extra=len(compared.extra),
            max_score_difference=compared.max_score_difference,
            min_iou=compared.min_iou,
        )
        compared = compare(found, score_threshold=SURE)
        row.update(
            sure_references=compared.references,
            sure_matched=compared.matched,
            sure_missing=len(compared.missing),
            sure_extra=len(compared.extra),
        )
        row = {**about(folder, detector, arithmetic), **row, **timed_detect(detector, images)}
    spec = load_spec(folder / "spec.json")
    anchors = load_anchors(folder / "anchors.npy", spec)
    loaded = pipeline.load(folder, plan, spec, anchors, plugin=plugin)
    row.update(time_calls(loaded.run_again, SAMPLING).row("network_"))
    loaded.close()
    return row


def timed_starts(folder: Path, plan: str, arithmetic: str, plugin: Path | None) -> dict[str, Any]:
    """Seconds of a first start, without kept kernels, and of a second."""
    for kept in (folder / passport.PLANS).glob(f"{Path(plan).stem}.*.kernels"):
        kept.unlink()
    return {
        f"{name}_{key}": seconds
        for name in ("first_start", "second_start")
        for key, seconds in in_a_fresh_process(folder, arithmetic, plugin).items()
    }


def about(folder: Path, detector: Detector, arithmetic: str) -> dict[str, Any]:
    status, network = detector.status, detector.spec.input
    return {
        "model": folder.name,
        "backend": status.backend,
        "description": status.description,
        "precision": ARITHMETIC[arithmetic][0],
        "arithmetic": arithmetic,
        "height": network.height,
        "width": network.width,
        "batch": "dynamic" if network.batch is None else str(network.batch),
        "num_anchors": detector.spec.heads.num_anchors,
        "num_classes": detector.spec.heads.num_classes,
    }


def detections(detector: Detector, images: list[np.ndarray]) -> list[dict[str, Any]]:
    return in_coco_form([detector.detect(image) for image in images])


def submitted(detector: Detector, images: list[np.ndarray]) -> list[Detections]:
    return [future.result() for future in [detector.submit(image) for image in images]]


def in_coco_form(found: list[Detections]) -> list[dict[str, Any]]:
    return [row for i, one in enumerate(found) for row in coco_results(i, one)]


def timed_detect(detector: Detector, images: list[np.ndarray]) -> dict[str, float]:
    turn = iter(range(10**9))
    detect = time_calls(lambda: detector.detect(images[next(turn) % len(images)]), SAMPLING)
    row = detect.row("detect_")
    batch = [images[i % len(images)] for i in range(BATCH)]
    calls: dict[str, Callable[[], Any]] = {"submit": lambda: submitted(detector, batch)}
    if detector.spec.input.batch is None:
        calls["detect"] = lambda: detector.detect_batch(batch)
    for what, call in calls.items():
        once = wall_clock(call)
        of_one = sample(lambda once=once: once() / BATCH, SAMPLING)
        row.update(of_one.timing().row(f"{what}{BATCH}_"))
    return row


def in_a_fresh_process(folder: Path, arithmetic: str, plugin: Path | None) -> dict[str, float]:
    command = [sys.executable, __file__, str(folder), "--start", arithmetic]
    command += [] if plugin is None else ["--plugin", str(plugin)]
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "CUDA_CACHE_PATH": empty}
        answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if answer.returncode:
        sys.stderr.write(answer.stderr)
        raise OdtrtError(reason(answer.returncode, answer.stderr, folder))
    return json.loads(answer.stdout.splitlines()[-1])


def start(arguments: argparse.Namespace) -> dict[str, float]:
    """What a service does when it comes up; the library's import is part of it."""
    image = np.zeros((480, 640, 3), np.uint8)
    started = time.perf_counter()
    runtime_library = portability.this_environment(arguments.plugin).runtime_library
    imported = time.perf_counter()
    precision, _, _ = ARITHMETIC[arguments.start]
    detector = Detector.open(
        arguments.folders[0], runtime_library or "auto", plugin=arguments.plugin, precision=precision
    )
    opened = time.perf_counter()
    detector.detect(image)
    ended = time.perf_counter()
    return {
        "import_seconds": round(imported - started, 3),
        "open_seconds": round(opened - imported, 3),
        "first_detect_seconds": round(ended - opened, 4),
    }


if __name__ == "__main__":
    sys.exit(main())
