"""The pipeline with each switch on and off: whether the detections are the same bits, and what a call takes.

    python benchmarks/pipeline_gpu.py FOLDER... [--precision fp32 fp16] [--plugin FILE] [--image HEIGHTxWIDTH]

writes results/pipeline.<gpu>.json, each row as soon as it is measured; rows of other models and libraries
stay. FOLDER: a model folder after `odtrt convert`, in which a plan is built where there is none for this
machine. FILE: libodtrt_tensorrt.so; with it fused plans are measured too. Needs numpy and the TensorRT that
is measured, on Python 3.8 or newer.

A row is one plan with one setting of :class:`odtrt_lib.engine.pipeline.Switches`, in a process of its own for
each plan:

* ``same_bits``: boxes, scores and classes of five pictures of different sizes, three times each so that
graphs
  are recorded and launched, beside those of the plain setting. ``in_force``: the setting after what cannot be
  done here was turned off, ``notes``: why.
* ``detect_*``: wall clock of :meth:`Pipeline.run` of one picture of that size, uint8 in numpy's memory, to
  detections in numpy's memory. ``network_graph_*``: device time of the network alone in a CUDA graph of 20.
* ``launches``, ``copies``, ``waits``: CUDA calls of one such run that was made before.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
from gpu_times import gpu_name, graph_times

from odtrt_lib import cuda, engine, portability
from odtrt_lib.anchors import load_anchors
from odtrt_lib.engine import pipeline
from odtrt_lib.engine.pipeline import Pipeline, Switches
from odtrt_lib.latency.timing import Sampling, time_calls
from odtrt_lib.machine import this_machine
from odtrt_lib.nms import Postprocessed
from odtrt_lib.results import write_results
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = Sampling(warmup=50, min_count=100, max_count=2000, seconds=1.2)
GRAPH_SAMPLING = Sampling(warmup=5, min_count=30, max_count=100, seconds=0.5)
SIZES = ((768, 1024), (480, 640), (333, 517), (64, 64), (1080, 1920))
COUNTED = {
    "launches": ("cudaGraphLaunch",),
    "copies": ("cudaMemcpyAsync",),
    "waits": ("cudaStreamSynchronize",),
}


def main() -> int:
    arguments = parse()
    if arguments.row is not None:
        for row in rows_of(arguments.folders[0], arguments.row, arguments.plugin, arguments.image):
            print(json.dumps(row), flush=True)
        return 0
    gpu = gpu_name(this_machine().gpu)
    path = ROOT / "results" / f"pipeline.{gpu}.json"
    rows: List[Dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for folder, precision in itertools.product(arguments.folders, arguments.precision):
        for plugin in (None, arguments.plugin) if arguments.plugin else (None,):
            command = [sys.executable, __file__, str(folder), "--row", precision]
            command += [] if plugin is None else ["--plugin", str(plugin)]
            command += ["--image", "x".join(map(str, arguments.image))]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    row = json.loads(line)
                    print(line, end="", flush=True)
                    rows = [one for one in rows if identity(one) != identity(row)] + [row]
                    command_line = "python benchmarks/pipeline_gpu.py FOLDER..."
                    write_results(path, "pipeline", command_line, rows)
    return 0 if rows and all(row["same_bits"] for row in rows) else 1


def parse() -> argparse.Namespace:
    def size(text: str) -> Tuple[int, int]:
        height, width = text.split("x")
        return int(height), int(width)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "fp16"), default=["fp32", "fp16"])
    parser.add_argument("--plugin", type=Path)
    parser.add_argument("--image", type=size, default=SIZES[0], metavar="HEIGHTxWIDTH")
    parser.add_argument("--row", choices=("fp32", "fp16"), help="measure FOLDER in it, print the rows")
    return parser.parse_args()


def identity(row: Dict[str, Any]) -> Tuple[Any, ...]:
    keys = ("model", "runtime", "version", "precision", "form", *switch_names())
    return tuple(row[key] for key in keys)


def switch_names() -> List[str]:
    return [field.name for field in dataclasses.fields(Switches)]


def settings(is_fused: bool) -> Iterator[Switches]:
    choices = (("pageable", "pinned", "mapped"), ("cpu", "gpu"), ("eager", "graph"), ("gpu", "cpu"))
    for choice in itertools.product(*(choices[:3] if is_fused else choices)):
        yield Switches(*choice)


def rows_of(
    folder: Path, precision: str, plugin: Optional[Path], size: Tuple[int, int]
) -> Iterator[Dict[str, Any]]:
    """One plan, each setting, the plain one first."""
    engine.build(folder, precision=precision, plugin=plugin)
    here = portability.this_environment(plugin)
    plan = portability.best_plan(folder, here, "heads.onnx" if plugin is None else "detector.onnx", precision)
    assert plan is not None, "the plan that was just built may not be used here"
    spec = load_spec(folder / "spec.json")
    anchors = load_anchors(folder / "anchors.npy", spec)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*one, 3), dtype=np.uint8) for one in SIZES]
    timed = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    expected: Optional[List[bytes]] = None
    for switches in settings(plugin is not None):
        loaded = pipeline.load(folder, plan, spec, anchors, plugin=plugin, switches=switches)
        try:
            found = [bits(loaded.run([image])) for image in images for _ in range(3)]
            expected = expected or found
            row = {
                "model": folder.name,
                "runtime": plan.runtime_library,
                "version": plan.version,
                "precision": precision,
                "form": "split" if plugin is None else "fused",
                **dataclasses.asdict(switches),
                "image_height": size[0],
                "image_width": size[1],
                "same_bits": found == expected,
                "detections": int(loaded.run([images[0]]).num_detections[0]),
                "in_force": "/".join(dataclasses.astuple(loaded.switches)),
                "notes": "; ".join(f"{name}: {reason}" for name, reason in loaded.reasons.items()),
            }
            row.update(counted(loaded, timed))
            row.update(time_calls(lambda loaded=loaded: loaded.run([timed]), SAMPLING).row("detect_"))
            network = graph_times(loaded.enqueue_network, loaded.stream, GRAPH_SAMPLING)
            row.update(network.row("network_graph_"))
        finally:
            loaded.close()
        yield row


def bits(found: Postprocessed) -> bytes:
    return b"".join(
        getattr(found, name).tobytes() for name in ("num_detections", "boxes", "scores", "classes")
    )


def counted(loaded: Pipeline, image: np.ndarray) -> Dict[str, int]:
    """CUDA calls of one run, after those that record graphs."""
    for _ in range(3):
        loaded.run([image])
    calls: collections.Counter[str] = collections.Counter()
    call = cuda._call

    def count(name: str, *arguments: Any) -> None:
        calls[name] += 1
        call(name, *arguments)

    cuda._call = count
    try:
        loaded.run([image])
    finally:
        cuda._call = call
    return {kind: sum(calls[name] for name in names) for kind, names in COUNTED.items()}


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    sys.exit(main())
