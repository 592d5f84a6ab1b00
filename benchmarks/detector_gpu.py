"""The C++ detector beside the Python pipeline's best settings, on the same plan: the same bits, and the time.

    python benchmarks/detector_gpu.py FOLDER... [--precision fp16] [--plugin FILE] [--image HEIGHTxWIDTH]

writes results/detector.<gpu>.json. FOLDER: a model folder after `odtrt convert`, in which a plan is built
where there is none for this machine. FILE: libodtrt_tensorrt.so; with it fused plans are measured too. Needs
numpy, TensorRT 8.5 or newer, and the libraries of `make plugin TENSORRT_INCLUDE_DIR=...` with the headers of
that TensorRT, on Python 3.8 or newer.

A row is one way to detect in one picture, uint8 in the host's memory, to detections there; each plan is
measured in a process of its own:

* ``pinned`` and ``mapped``: :meth:`odtrt_lib.engine.pipeline.Pipeline.run` with that memory, preprocessing on
  the GPU and a CUDA graph. ``copied``: ``odtrt_detector_infer`` of a picture in numpy's memory, ``slot``: of
  one that was decoded into a slot. The call is made by ctypes, with arguments that were made before.
* ``call_*``: wall clock of that call, ``rounds`` times in turn with the other ways. ``same_bits``: boxes,
  scores and classes of five pictures of different sizes, three times each, beside those of ``pinned``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
from gpu_times import gpu_name

from odtrt_lib import engine, portability
from odtrt_lib.anchors import load_anchors
from odtrt_lib.detector import Backend, Detections, Detector
from odtrt_lib.engine import pipeline
from odtrt_lib.engine.pipeline import Switches
from odtrt_lib.latency.timing import Histogram, Sampling, sample, wall_clock
from odtrt_lib.machine import this_machine
from odtrt_lib.native_detector import Image, NativeDetector, _image
from odtrt_lib.results import write_results
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
SAMPLING = Sampling(warmup=50, min_count=100, max_count=2000, seconds=1.0)
SIZES = ((768, 1024), (480, 640), (333, 517), (64, 64), (1080, 1920))
COMMAND = "python benchmarks/detector_gpu.py FOLDER..."


def main() -> int:
    arguments = parse()
    if arguments.row:
        for row in rows_of(arguments.folders[0], arguments.precision, arguments.plugin, arguments.image):
            print(json.dumps(row), flush=True)
        return 0
    rows: List[Dict[str, Any]] = []
    for folder in arguments.folders:
        for plugin in (None, arguments.plugin) if arguments.plugin else (None,):
            command = [sys.executable, __file__, str(folder), "--row", "--precision", arguments.precision]
            command += [] if plugin is None else ["--plugin", str(plugin)]
            command += ["--image", "x".join(map(str, arguments.image))]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(answer.stdout, end="", flush=True)
            rows += [json.loads(line) for line in answer.stdout.splitlines()]
            gpu = gpu_name(this_machine().gpu)
            write_results(ROOT / "results" / f"detector.{gpu}.json", "detector", COMMAND, rows)
    return 0 if rows and all(row["same_bits"] for row in rows) else 1


def parse() -> argparse.Namespace:
    def size(text: str) -> Tuple[int, int]:
        height, width = text.split("x")
        return int(height), int(width)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp16")
    parser.add_argument("--plugin", type=Path)
    parser.add_argument("--image", type=size, default=SIZES[0], metavar="HEIGHTxWIDTH")
    parser.add_argument("--row", action="store_true", help="measure one FOLDER here, print the rows")
    return parser.parse_args()


def rows_of(
    folder: Path, precision: str, plugin: Optional[Path], size: Tuple[int, int]
) -> Iterator[Dict[str, Any]]:
    engine.build(folder, precision=precision, plugin=plugin)
    here = portability.this_environment(plugin)
    plan = portability.best_plan(folder, here, "heads.onnx" if plugin is None else "detector.onnx", precision)
    assert plan is not None, "the plan that was just built may not be used here"
    spec = load_spec(folder / "spec.json")
    anchors = load_anchors(folder / "anchors.npy", spec)
    loaded = {
        memory: pipeline.load(
            folder, plan, spec, anchors, plugin=plugin, switches=Switches(memory, "gpu", "graph")
        )
        for memory in ("pinned", "mapped")
    }
    native = NativeDetector.open(folder, plugin=plugin, plan=plan.fingerprint)
    detects: Dict[str, Callable[[np.ndarray], Detections]] = {
        name: Detector(spec, anchors, Backend(name, one.run, one.infer)).detect
        for name, one in loaded.items()
    }
    detects.update(copied=native.detect, slot=lambda image: in_slot(native, image))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*one, 3), dtype=np.uint8) for one in SIZES]
    found = {
        name: [bits(detect(image)) for image in images for _ in range(3)] for name, detect in detects.items()
    }
    timed = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    calls: Dict[str, Callable[[], Any]] = {
        name: lambda one=one: one.run([timed])  # type: ignore[misc]
        for name, one in loaded.items()
    }
    calls.update(copied=infer_call(native, timed), slot=slot_call(native, timed))
    histograms = {name: Histogram() for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            histograms[name].merge(sample(wall_clock(call), SAMPLING))
    for name, histogram in histograms.items():
        yield {
            "model": folder.name,
            "runtime": plan.runtime_library,
            "version": plan.version,
            "precision": precision,
            "form": "split" if plugin is None else "fused",
            "way": name,
            "image_height": size[0],
            "image_width": size[1],
            "same_bits": found[name] == found["pinned"],
            "in_force": "/".join(vars(loaded[name].switches).values())
            if name in loaded
            else native.description,
            "rounds": ROUNDS,
            **histogram.timing().row("call_"),
        }
    native.close()
    for one in loaded.values():
        one.close()


def bits(found: Detections) -> bytes:
    return b"".join(getattr(found, name).tobytes() for name in ("boxes", "scores", "class_ids"))


def in_slot(native: NativeDetector, image: np.ndarray) -> Detections:
    slot = native.slot(image.shape[0], image.shape[1])
    assert slot is not None
    slot[:] = image
    return native.detect(slot)


def infer_call(native: NativeDetector, image: np.ndarray) -> Callable[[], Any]:
    """The bare call of the C ABI. Fails if its status is not 0."""
    return bare_call(native, _image(image))


def slot_call(native: NativeDetector, image: np.ndarray) -> Callable[[], Any]:
    """Two bare calls: for a slot, and to detect what is in it. All slots hold the image already."""
    given = Image()
    slots = [native.slot(image.shape[0], image.shape[1]) for _ in range(2)]
    for slot in slots:
        assert slot is not None
        slot[:] = image
    for slot in slots:
        native.release(slot)
    infer = bare_call(native, given)
    lend, error = native._library.odtrt_detector_slot, ctypes.create_string_buffer(500)
    arguments = (native._open(), image.shape[0], image.shape[1], ctypes.byref(given), error, len(error))

    def call() -> None:
        if lend(*arguments) != 0:
            raise RuntimeError(error.value.decode("utf-8", "replace"))
        infer()

    return call


def bare_call(native: NativeDetector, image: Image) -> Callable[[], Any]:
    (result, found), error = native._room(), ctypes.create_string_buffer(500)
    function = native._library.odtrt_detector_infer
    arguments = (native._open(), ctypes.byref(image), ctypes.byref(result), error, len(error))

    def call() -> np.ndarray:
        if function(*arguments) != 0:
            raise RuntimeError(error.value.decode("utf-8", "replace"))
        return found

    return call


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    sys.exit(main())
