"""What INT8 costs in mAP, by strategy and calibrator, with ONNX Runtime on this CPU.

    python benchmarks/int8.py [--scenes 500] [NUMBER ...]      writes results/int8.cpu.json, row by row

Model: models/parts. NUMBER: rows of :data:`ROWS`, unasked all; rows of as many scenes that are there already
stay. Calibration: the first 64 training scenes. mAP: pycocotools, on unseen scenes (TEST_SEEDS).
``map_drop_points``: against single precision on the same scenes, from ``drop_low`` to ``drop_high`` with 95 %
confidence (:func:`odtrt_lib.evaluate.map_drop`). ``box_sqnr_db``, ``class_sqnr_db``: signal over noise of the
raw heads on 24 other training scenes. ``int8_convolutions``: of ``convolutions``; ``in_float``: the names of
the rest. ``p50_ms``: of ``Detector.detect`` while the scenes are measured; it counts on an idle machine only.
Strategies:

* ``every convolution``: as `odtrt quantise` has it. ``without the stem``: the first convolution stays in
  floating point; ``without the worst 4``, ``12``: those that lose most when they alone are quantised
  (:mod:`odtrt_lib.int8.sensitivity`). ``backbone only``, ``neck and heads only``: only these are in INT8
  (:mod:`odtrt_lib.int8.blocks`). ``predicted_box_sqnr_db``: what the noises of single convolutions, on the
  4 scenes that rank them, add up to.
* ``one scale a kernel``: instead of one for each output channel.
* ``naive: every operation``: ONNX Runtime's quantize_static as it comes, min-max, one scale a kernel.
* ``naive: a black picture``, ``naive: pixels from 0 to 255``: calibrated on the wrong thing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import onnx

from odtrt_lib.app.demonstration import truth_of
from odtrt_lib.detector import Detector
from odtrt_lib.evaluate import coco_results, map_drop
from odtrt_lib.folder import seal
from odtrt_lib.int8 import calibrate, qdq, sensitivity
from odtrt_lib.int8.blocks import BACKBONE, blocks
from odtrt_lib.int8.stage import network_inputs
from odtrt_lib.results import write_results
from odtrt_lib.scenes import PARTS_CLASSES, TEST_SEEDS, TRAIN_SEEDS, render_scene
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "int8.cpu.json"
FOLDER = ROOT / "out" / "int8" / "parts"
EVERY, STEM, KERNEL = "every convolution", "without the stem", "one scale a kernel"
BACKBONE_ONLY, REST_ONLY = "backbone only", "neck and heads only"
ORT, BLACK, UNSCALED = "naive: every operation", "naive: a black picture", "naive: pixels from 0 to 255"
ROWS: Tuple[Tuple[str, str], ...] = (
    ("single precision", ""),
    *((EVERY, rule) for rule in calibrate.RULES),
    (STEM, "mse"),
    ("without the worst 4", "mse"),
    ("without the worst 12", "mse"),
    (BACKBONE_ONLY, "mse"),
    (REST_ONLY, "mse"),
    (KERNEL, "mse"),
    (ORT, "minmax"),
    (BLACK, "minmax"),
    (UNSCALED, "minmax"),
)
CALIBRATION, HELD_OUT, SENSITIVE = TRAIN_SEEDS[:64], TRAIN_SEEDS[64:88], TRAIN_SEEDS[88:92]

Row = Dict[str, Any]
Found = List[Dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("rows", nargs="*", type=int, metavar="NUMBER")
    options = parser.parse_args()
    if not (FOLDER / "heads.onnx").is_file():
        odtrt = [sys.executable, "-m", "odtrt_lib"]
        subprocess.run(
            [*odtrt, "export", str(ROOT / "models" / "parts"), "--output", str(FOLDER)], check=True
        )
        subprocess.run([*odtrt, "convert", str(FOLDER)], check=True)
    rows: List[Row] = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    chosen = [ROWS[number] for number in options.rows] or list(ROWS)
    known = {(row["strategy"], row["calibrator"]) for row in rows if row["scenes"] == options.scenes}
    for row in measured([one for one in chosen if one not in known], options.scenes):
        print(json.dumps(row), flush=True)
        key = (row["strategy"], row["calibrator"])
        rows = [one for one in rows if (one["strategy"], one["calibrator"]) != key] + [row]
        rows.sort(key=lambda one: ROWS.index((one["strategy"], one["calibrator"])))
        write_results(RESULTS, "int8", "python benchmarks/int8.py", rows)


def measured(wanted: Sequence[Tuple[str, str]], count: int) -> Iterator[Row]:
    """The rows, in turn; single precision is measured first whether or not it is wanted."""
    seeds = TEST_SEEDS[:count]
    truth = {
        "images": [{"id": seed, "height": 480, "width": 640} for seed in seeds],
        "categories": [{"id": i, "name": name} for i, name in enumerate(PARTS_CLASSES, 1)],
        "annotations": [one for seed in seeds for one in truth_of(render_scene(seed), seed)],
    }
    heads = Networks(FOLDER)
    exact, exact_ms = detections(FOLDER, "fp32", seeds)
    for strategy, calibrator in wanted:
        about = {"model": "parts", "strategy": strategy, "calibrator": calibrator, "scenes": count}
        found, p50, figures = exact, exact_ms, {"int8_convolutions": 0}
        if calibrator:
            model, figures = heads.made(strategy, calibrator)
            with tempfile.TemporaryDirectory() as work:
                folder = Path(work) / "parts"
                shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("frozen.pb", "plans"))
                onnx.save(model, folder / "heads_int8.onnx")
                seal(folder)
                found, p50 = detections(folder, "int8", seeds)
        drop = map_drop(truth, exact, found)
        yield {
            **about,
            "map": round(drop.candidate_map, 4),
            "map_drop_points": round(drop.points, 2),
            "drop_low": round(drop.low, 2),
            "drop_high": round(drop.high, 2),
            **figures,
            "convolutions": len(heads.convs),
            "p50_ms": round(p50, 2),
            "runtime": "ONNX Runtime",
            "date": datetime.now(timezone.utc).date().isoformat(),
        }


def detections(folder: Path, precision: str, seeds: Sequence[int]) -> Tuple[Found, float]:
    """What is found, in COCO's form, and the median milliseconds of ``detect``."""
    found: Found = []
    seconds = []
    with Detector.open(folder, "onnxruntime", precision=precision) as detector:
        for seed in seeds:
            image = render_scene(seed).image
            started = time.perf_counter()
            seen = detector.detect(image)
            seconds.append(time.perf_counter() - started)
            found += coco_results(seed, seen)
    return found, 1000 * float(np.median(seconds))


class Networks:
    """The quantised networks of one model folder; what several rows need is measured once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "heads.onnx"
        self.model = onnx.load(str(self.path))
        self.spec = load_spec(folder / "spec.json")
        self.convs = qdq.placement(self.model).convs
        self.where = qdq.placement(self.model)
        self.images = self.inputs(HELD_OUT)
        self.wanted = sensitivity.heads_of(self.model, self.images)
        self._histograms: Any = None
        self._ranking: List[sensitivity.Sensitivity] = []

    def inputs(self, seeds: Sequence[int]) -> List[np.ndarray]:
        return list(network_inputs([render_scene(seed).image for seed in seeds], self.spec.input))

    def ranges(self, rule: str) -> Dict[str, float]:
        if self._histograms is None:
            images = self.inputs(CALIBRATION)
            self._histograms = calibrate.histograms(self.model, self.where.tensors, lambda: images)
        return {tensor: calibrate.amax(found, rule) for tensor, found in self._histograms.items()}

    def ranking(self) -> List[sensitivity.Sensitivity]:
        if not self._ranking:
            self._ranking = sensitivity.ranked(self.model, self.ranges("mse"), self.inputs(SENSITIVE))
        return self._ranking

    def left_in_float(self, strategy: str) -> List[str]:
        if strategy == STEM:
            return [self.convs[0]]
        if strategy in (BACKBONE_ONLY, REST_ONLY):
            of = blocks(self.model)
            return [conv for conv in self.convs if (of[conv] == BACKBONE) == (strategy == REST_ONLY)]
        if strategy.startswith("without the worst"):
            return [one.conv for one in self.ranking()[: int(strategy.split()[-1])]]
        return []

    def made(self, strategy: str, rule: str) -> Tuple[onnx.ModelProto, Row]:
        """The network, and the figures that need no detections."""
        in_float = self.left_in_float(strategy)
        if strategy == ORT:
            model = self.by_onnxruntime()
        elif strategy in (BLACK, UNSCALED):
            model = qdq.quantised(self.model, self.where, self.wrong_ranges(strategy))
        else:
            where = qdq.placement(self.model, in_float)
            model = qdq.quantised(self.model, where, self.ranges(rule), per_channel=strategy != KERNEL)
        boxes, classes = sensitivity.noise(self.wanted, sensitivity.heads_of(model, self.images))
        predicted = {}
        if in_float:
            left = sum(one.box_noise for one in self.ranking() if one.conv not in in_float)
            predicted = {"predicted_box_sqnr_db": round(sensitivity.sqnr_db(left), 2)}
        return model, {
            "int8_convolutions": len(self.convs) - len(in_float),
            "in_float": "; ".join(in_float),
            "box_sqnr_db": round(sensitivity.sqnr_db(boxes), 2),
            **predicted,
            "class_sqnr_db": round(sensitivity.sqnr_db(classes), 2),
            "model_mb": round(model.ByteSize() / 1e6, 2),
        }

    def wrong_ranges(self, strategy: str) -> Dict[str, float]:
        image = self.inputs(CALIBRATION[:1])[0]
        if strategy == BLACK:
            black = np.zeros((480, 640, 3), np.uint8)
            images = list(network_inputs([black], self.spec.input))
        else:
            low, high = float(image.min()), float(image.max())
            images = [255 * (one - low) / (high - low) for one in self.inputs(CALIBRATION[:8])]
        found = calibrate.histograms(self.model, self.where.tensors, lambda: images)
        return {tensor: calibrate.amax(one, "minmax") for tensor, one in found.items()}

    def by_onnxruntime(self) -> onnx.ModelProto:
        """quantize_static as it comes, but signed and symmetric, as TensorRT needs it."""
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):
            def __init__(self, name: str, images: Sequence[np.ndarray]) -> None:
                self.left = iter([{name: image} for image in images])

            def get_next(self) -> Any:
                return next(self.left, None)

        with tempfile.TemporaryDirectory() as work:
            target = Path(work) / "quantised.onnx"
            quantization.quantize_static(
                self.path,
                target,
                Reader(self.spec.input.name, self.inputs(CALIBRATION)),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            )
            return onnx.load(str(target))


if __name__ == "__main__":
    main()
