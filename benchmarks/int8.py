"""What INT8 costs in mAP, by strategy and calibrator, with ONNX Runtime on this CPU.

    python benchmarks/int8.py [--model parts] [--timed] [NUMBER ...]  writes results/int8.cpu.json by rows

Models: ``parts`` (models/parts) on 500 unseen scenes (TEST_SEEDS); ``coco_ssd_mnv1`` of the corpus (the
folder that ODTRT_CORPUS names) on its 128 pictures of val2017. NUMBER: rows of :data:`ROWS`, unasked all that
fit the model; rows that are there already stay. Calibration: the first 64 training pictures.

mAP: pycocotools. ``map_drop_points``: against single precision on the same pictures, from ``drop_low`` to
``drop_high`` with 95 % confidence (:func:`odtrt_lib.evaluate.map_drop`). ``box_sqnr_db``, ``class_sqnr_db``:
signal over noise of the raw heads on 24 other training pictures. ``int8_convolutions``: of ``convolutions``;
``in_float``: the names of the rest. ``p50_ms``: of ``Detector.detect`` while the pictures are measured, with
``--timed``, for which the machine must be idle. Strategies:

* ``every convolution``: as `odtrt quantise` has it. ``without the stem``: the first convolution stays in
  floating point; ``without the worst 4`` and so on: those that lose most when they alone are quantised
  (:mod:`odtrt_lib.int8.sensitivity`). ``backbone only``, ``neck and heads only``: only these are in INT8
  (:mod:`odtrt_lib.int8.blocks`). ``predicted_box_sqnr_db``: what the noises of single convolutions, on the
  4 scenes that rank them, add up to.
* ``one scale a kernel``: instead of one for each output channel.
* ``calibrated on 16 scenes`` and so on: as ``every convolution``, with ranges of so many scenes.
* ``corrected biases``: each bias makes up for the mean error that rounding leaves in its channel, from the
  first convolution to the last (Nagel et al. 2019, arXiv:1906.04721, section 4.2, measured, not derived).
* ``trained``: `odtrt qat` with 1,024 other training scenes; then as ``every convolution``, same ranges.
* ``naive: batch normalisation apart``: not folded into the convolutions, so that its input is rounded, too.
  With the calibrator ``minmax`` also one scale a kernel.
* ``naive: every operation``: ONNX Runtime's quantize_static as it comes, min-max, one scale a kernel.
* ``naive: a black picture``, ``naive: pixels from 0 to 255``: calibrated on the wrong thing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple
from unittest import mock

import numpy as np
import onnx

from odtrt_lib import int8
from odtrt_lib.app.demonstration import truth_of
from odtrt_lib.convert.rewrite import to_onnx
from odtrt_lib.convert.stage import load_frozen
from odtrt_lib.detector import Detector
from odtrt_lib.evaluate import coco_results, map_drop
from odtrt_lib.folder import seal
from odtrt_lib.int8 import calibrate, qat, qdq, sensitivity
from odtrt_lib.int8.blocks import BACKBONE, blocks
from odtrt_lib.int8.stage import network_inputs
from odtrt_lib.preprocess import load_image
from odtrt_lib.results import write_results
from odtrt_lib.scenes import PARTS_CLASSES, TEST_SEEDS, TRAIN_SEEDS, render_scene
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "int8.cpu.json"
EVERY, STEM, KERNEL = "every convolution", "without the stem", "one scale a kernel"
BACKBONE_ONLY, REST_ONLY = "backbone only", "neck and heads only"
APART = "naive: batch normalisation apart"
CORRECTED, TRAINED, SIZES = "corrected biases", "trained", (16, 256, 512)
ORT, BLACK, UNSCALED = "naive: every operation", "naive: a black picture", "naive: pixels from 0 to 255"
ROWS: Tuple[Tuple[str, str], ...] = (
    ("single precision", ""),
    *((EVERY, rule) for rule in calibrate.RULES),
    (STEM, "mse"),
    *((f"without the worst {count}", "mse") for count in (4, 12, 24, 48)),
    (BACKBONE_ONLY, "mse"),
    (REST_ONLY, "mse"),
    (KERNEL, "mse"),
    *((f"calibrated on {size} scenes", "mse") for size in SIZES),
    (CORRECTED, "mse"),
    (TRAINED, "mse"),
    (APART, "mse"),
    (APART, "minmax"),
    (ORT, "minmax"),
    (BLACK, "minmax"),
    (UNSCALED, "minmax"),
)
FOR_PARTS_ONLY = (
    CORRECTED,
    TRAINED,
    APART,
    BLACK,
    UNSCALED,
    *(f"calibrated on {size} scenes" for size in SIZES),
)
CALIBRATION, HELD_OUT, SENSITIVE = range(64), range(64, 88), range(88, 92)
QAT_SCENES, QAT_STEPS = range(92, 1116), 600
SCENES = 500

Row = Dict[str, Any]
Found = List[Dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its pictures.

    source: the OD API model. truth: COCO annotations. picture: image id -> uint8 ``[height, width, 3]``.
    training: numbers of training pictures -> these pictures.
    """

    name: str
    source: Path
    truth: Dict[str, Any]
    picture: Callable[[int], np.ndarray]
    training: Callable[[Iterable[int]], List[np.ndarray]]

    @property
    def ids(self) -> List[int]:
        return [image["id"] for image in self.truth["images"]]

    @property
    def folder(self) -> Path:
        return ROOT / "out" / "int8" / self.name


def parts() -> Subject:
    seeds = TEST_SEEDS[:SCENES]
    truth = {
        "images": [{"id": seed, "height": 480, "width": 640} for seed in seeds],
        "categories": [{"id": i, "name": name} for i, name in enumerate(PARTS_CLASSES, 1)],
        "annotations": [one for seed in seeds for one in truth_of(render_scene(seed), seed)],
    }
    return Subject(
        "parts",
        ROOT / "models" / "parts",
        truth,
        lambda seed: render_scene(seed).image,
        lambda numbers: [render_scene(TRAIN_SEEDS[number]).image for number in numbers],
    )


def coco_ssd_mnv1() -> Subject:
    corpus = Path(os.environ["ODTRT_CORPUS"])
    truth = json.loads((corpus / "coco128" / "instances_val128.json").read_text())
    files = {path.name: path for path in sorted((corpus / "coco128").rglob("*.jpg"))}
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    training = sorted(path for path in files.values() if path.parent.name == "train2017")
    return Subject(
        "coco_ssd_mnv1",
        corpus / "coco_ssd_mnv1",
        truth,
        lambda number: load_image(files[names[number]]),
        lambda numbers: [load_image(training[number]) for number in numbers],
    )


SUBJECTS = {"parts": parts, "coco_ssd_mnv1": coco_ssd_mnv1}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SUBJECTS, default="parts")
    parser.add_argument("--timed", action="store_true", help="p50_ms, on an idle machine")
    parser.add_argument("rows", nargs="*", type=int, metavar="NUMBER")
    options = parser.parse_args()
    subject = SUBJECTS[options.model]()
    if not (subject.folder / "heads.onnx").is_file():
        make_folder(subject.source, subject.folder)
    rows: List[Row] = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    fitting = [one for one in ROWS if subject.name == "parts" or one[0] not in FOR_PARTS_ONLY]
    wanted = [ROWS[number] for number in options.rows] or fitting
    known = {(row["model"], row["strategy"], row["calibrator"]) for row in rows}
    missing = [one for one in wanted if (subject.name, *one) not in known]
    for row in measured(subject, missing, options.timed):
        print(json.dumps(row), flush=True)
        rows = sorted([*rows, row], key=place_of)
        write_results(RESULTS, "int8", "python benchmarks/int8.py", rows)


def place_of(row: Row) -> Tuple[int, int]:
    return list(SUBJECTS).index(row["model"]), ROWS.index((row["strategy"], row["calibrator"]))


def make_folder(source: Path, folder: Path) -> None:
    odtrt = [sys.executable, "-m", "odtrt_lib"]
    subprocess.run([*odtrt, "export", str(source), "--output", str(folder)], check=True)
    subprocess.run([*odtrt, "convert", str(folder)], check=True)


def measured(subject: Subject, wanted: Sequence[Tuple[str, str]], is_timed: bool) -> Iterator[Row]:
    """The rows, in turn; single precision is measured first whether or not it is wanted."""
    heads = Networks(subject)
    exact, exact_ms = detections(subject.folder, "fp32", subject)
    for strategy, calibrator in wanted:
        found, p50, figures = exact, exact_ms, {"int8_convolutions": 0}
        if calibrator:
            model, figures = heads.made(strategy, calibrator)
            with tempfile.TemporaryDirectory() as work:
                folder = Path(work) / subject.name
                shutil.copytree(subject.folder, folder, ignore=shutil.ignore_patterns("frozen.pb", "plans"))
                onnx.save(model, folder / "heads_int8.onnx")
                seal(folder)
                found, p50 = detections(folder, "int8", subject)
        drop = map_drop(subject.truth, exact, found)
        yield {
            "model": subject.name,
            "strategy": strategy,
            "calibrator": calibrator,
            "scenes": len(subject.ids),
            "map": round(drop.candidate_map, 4),
            "map_drop_points": round(drop.points, 2),
            "drop_low": round(drop.low, 2),
            "drop_high": round(drop.high, 2),
            **figures,
            "convolutions": len(heads.convs),
            **({"p50_ms": round(p50, 2)} if is_timed else {}),
            "runtime": "ONNX Runtime",
            "date": datetime.now(timezone.utc).date().isoformat(),
        }


def detections(folder: Path, precision: str, subject: Subject) -> Tuple[Found, float]:
    """What is found, in COCO's form, and the median milliseconds of ``detect``."""
    found: Found = []
    seconds = []
    with Detector.open(folder, "onnxruntime", precision=precision) as detector:
        for number in subject.ids:
            image = subject.picture(number)
            started = time.perf_counter()
            seen = detector.detect(image)
            seconds.append(time.perf_counter() - started)
            found += coco_results(number, seen)
    return found, 1000 * float(np.median(seconds))


class Networks:
    """The quantised networks of one model folder; what several rows need is measured once."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.path = subject.folder / "heads.onnx"
        self.model = onnx.load(str(self.path))
        self.spec = load_spec(subject.folder / "spec.json")
        self.convs = qdq.placement(self.model).convs
        self.where = qdq.placement(self.model)
        self.images = self.inputs(HELD_OUT)
        self.wanted = sensitivity.heads_of(self.model, self.images)
        self._histograms: Dict[int, Any] = {}
        self._ranking: List[sensitivity.Sensitivity] = []

    def inputs(self, numbers: Iterable[int]) -> List[np.ndarray]:
        return list(network_inputs(self.subject.training(numbers), self.spec.input))

    def ranges(self, rule: str, size: int = len(CALIBRATION)) -> Dict[str, float]:
        if size not in self._histograms:
            images = self.inputs(range(size))
            found = calibrate.histograms(self.model, self.where.tensors, lambda: images)
            self._histograms[size] = found
        return {tensor: calibrate.amax(one, rule) for tensor, one in self._histograms[size].items()}

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
        elif strategy == APART:
            model = self.with_batch_norms_apart(rule)
        elif strategy == TRAINED:
            model = onnx.load(str(trained(self.subject) / "heads_int8.onnx"))
        elif strategy == CORRECTED:
            model = self.with_corrected_biases()
        elif strategy.startswith("calibrated on"):
            model = qdq.quantised(self.model, self.where, self.ranges(rule, int(strategy.split()[2])))
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

    def with_batch_norms_apart(self, rule: str) -> onnx.ModelProto:
        with mock.patch("odtrt_lib.convert.rewrite._fold_batch_norms"):
            model = to_onnx(load_frozen(self.path.with_name("frozen.pb")), 17)
        where = qdq.placement(model)
        norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
        more = tuple(qdq.Edge(node.name, 0, node.input[0]) for node in norms)
        where = qdq.Placement(where.convs, where.edges + more)
        images = self.inputs(CALIBRATION)
        found = calibrate.histograms(model, where.tensors, lambda: images)
        ranges = {tensor: calibrate.amax(one, rule) for tensor, one in found.items()}
        return qdq.quantised(model, where, ranges, per_channel=rule != "minmax")

    def with_corrected_biases(self) -> onnx.ModelProto:
        images = self.inputs(CALIBRATION[:8])
        exact = channel_means(self.model, self.convs, images)
        model = qdq.quantised(self.model, self.where, self.ranges("mse"))
        weights = {one.name: one for one in model.graph.initializer}
        for node in [node for node in model.graph.node if node.op_type == "Conv" and len(node.input) > 2]:
            (found,) = channel_means(model, [node.name], images).values()
            bias = onnx.numpy_helper.to_array(weights[node.input[2]])
            name = f"{node.name}/corrected"
            corrected = (bias + exact[node.name] - found).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(corrected, name))
            node.input[2] = name
        return model

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


def channel_means(
    model: onnx.ModelProto, convs: Sequence[str], images: Sequence[np.ndarray]
) -> Dict[str, np.ndarray]:
    """The mean of each output channel of the convolutions, float64 ``[channels]``."""
    outputs = {node.output[0]: node.name for node in model.graph.node if node.name in set(convs)}
    read = calibrate.reader_of(model, list(outputs))
    values_of_images = [read(image) for image in images]
    return {
        conv: np.mean([values.mean(axis=(0, 2, 3), dtype=np.float64) for values in column], axis=0)
        for conv, column in zip(outputs.values(), zip(*values_of_images, strict=True), strict=True)
    }


def trained(subject: Subject) -> Path:
    """The model folder of the trained detector; a training that was begun goes on."""
    int8.quantise(subject.folder, subject.training(CALIBRATION))
    model = subject.folder.with_name(f"{subject.name}_trained")
    qat.train(
        subject.source,
        subject.folder,
        subject.training(QAT_SCENES),
        model,
        steps=QAT_STEPS,
        report=lambda made: print(made, flush=True),
    )
    folder = subject.folder.with_name(f"{subject.name}_qat")
    make_folder(model, folder)
    int8.quantise(folder, ranges=model / qat.RANGES)
    return folder


if __name__ == "__main__":
    main()
