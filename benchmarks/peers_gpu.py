"""The whole detector: NVIDIA's sample of TensorRT 8.5 and odtrt, from one checkpoint, on one TensorRT.

    python benchmarks/peers_gpu.py build FOLDER PLUGIN MODEL[:PRECISION] WAY [CACHE]
    python benchmarks/peers_gpu.py measure FOLDER PLUGIN MODEL[:PRECISION] WAY
    python benchmarks/peers_gpu.py road FOLDER

each writes its figures into results/peers.<gpu>.json; what was measured before stays until the same figures
come anew. PRECISION: FP16, the default, or FP32, with NVIDIA_TF32_OVERRIDE=0. WAY: ``nvidia`` or ``odtrt``.
CACHE: a folder for timing caches, of its own by default; the same one for both ways makes the second build
faster. PLUGIN: libodtrt_tensorrt.so. FOLDER, which benchmarks/peers.py writes, has for each MODEL:

* ``nvidia.onnx``, made by the sample's own create_onnx.py; ``odtrt``, a model folder with detector.onnx;
* ``pictures.npz``: ``pictures``, uint8 [P, height, width, 3], what the OD API finds in them, as JSON text in
  ``detections``, ``weights``, and ``candidates``, the scores above 0.01, or above the model's threshold, in
  the first. Agreement says something only where the weights are trained.

``nvidia`` builds and runs as the sample does: its workspace and flags, float32 pictures resized by Pillow,
copies of pageable memory, EfficientNMS_TRT inside the plan. ``odtrt`` is the fused plan. Rows:

* ``kind`` detector. ``build_cold_seconds``: from the ONNX file to the plan, without a timing cache;
  ``build_warm_seconds``: with the one that CACHE held.
* ``device_graph_*``: device time of the plan, post-processing included, in CUDA graphs. ``eager_*``: wall
  clock of one run of it that is waited for. ``detect_*``: from the decoded picture to boxes in its pixels;
  ``detect_best_*``: ours with pinned memory, preprocessing on the GPU and a CUDA graph. ``infer_*``: the part
  of theirs after the resizing, which is what the sample's own benchmark times.
* ``score_threshold``: the plan's; the sample takes 0.01 for less. ``candidates``: see above.
* ``references``: detections of the OD API from SCORE, or the model's threshold, on. ``matched``, ``missing``,
  ``extra``, ``at_threshold``, ``max_score_difference``: by :func:`odtrt_lib.evaluate.agreement`, with the
  tolerances of recorded_heads.ARITHMETIC. ``found``: those that have a detection of their class with an IoU
  of at least 0.5; ``wrong_class``: those that have only one of another class. ``shift_px``: by how much the
  corners of the found ones differ on average.
* ``kind`` road: one step from the checkpoint to the ONNX file; see benchmarks/peers.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
from gpu_times import free_device_mb, gpu_name, graph_times
from recorded_heads import ARITHMETIC
from tensorrt_gpu import SAMPLING

from odtrt_lib import cuda, engine
from odtrt_lib.engine import passport
from odtrt_lib.engine.bindings import trt_messages
from odtrt_lib.engine.builder import count_inspected, read_cache_file, write_cache_file
from odtrt_lib.errors import one_line
from odtrt_lib.evaluate import agreement, coco_results, iou_matrix
from odtrt_lib.folder import exclusive
from odtrt_lib.latency.timing import time_calls
from odtrt_lib.machine import this_machine
from odtrt_lib.results import write_results
from odtrt_lib.spec import DetectorSpec, load_spec

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python benchmarks/peers_gpu.py build|measure FOLDER PLUGIN MODEL WAY"
PRECISIONS = ("FP16", "FP32")
SCORE = 0.05
LEAST_THEIRS = 0.01  # create_onnx.py raises a lower threshold to it
BEST = {"memory": "pinned", "preprocess": "gpu", "launch": "graph"}
OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
Detected = List[Dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """What one call measures. ``folder`` is the model's."""

    folder: Path
    plugin: Path
    precision: str
    way: str

    @property
    def identity(self) -> Tuple[str, str, str]:
        return self.folder.name, self.way, self.precision

    @property
    def spec(self) -> DetectorSpec:
        return load_spec(self.folder / "odtrt" / "spec.json")

    @property
    def plan(self) -> Path:
        return self.folder / f"nvidia.{self.precision}.plan"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One of NVIDIA's samples, and what its build_engine.py sets: see release/8.5."""

    name: str
    workspace_gib: int
    has_strict_types: bool


EFFICIENTDET = Sample("efficientdet", 8, has_strict_types=False)
TFOD = Sample("tensorflow_object_detection_api", 1, has_strict_types=True)


def main(arguments: Sequence[str]) -> int:
    """What the module says."""
    if len(arguments) == 2 and arguments[0] == "road":
        rows = json.loads((Path(arguments[1]) / "road.json").read_text())
        keep([{"kind": "road", **row} for row in rows])
        return 0
    limits = {"build": (5, 6), "measure": (5, 5)}
    task = arguments[0] if arguments else ""
    if task not in limits or not limits[task][0] <= len(arguments) <= limits[task][1]:
        print(__doc__)
        return 2
    case = case_of(*arguments[1:5])
    if case.precision == "FP32":
        os.environ[engine.TF32_OVERRIDE] = "0"
    if task == "build":
        default = case.folder / f"{case.way}.{case.precision}.cache"
        os.environ["XDG_CACHE_HOME"] = str(arguments[5] if len(arguments) > 5 else default)
    return run(case, BUILDS[case.way] if task == "build" else MEASURES[case.way])


def case_of(folder: str, plugin: str, model: str, way: str) -> Case:
    """Raises SystemExit for a model, a precision or a way that is not there."""
    name, _, precision = model.partition(":")
    place = Path(folder) / name
    if not (place / "odtrt" / "spec.json").is_file() or precision not in ("", *PRECISIONS):
        raise SystemExit(f"{model}: not a model in {folder}, or not one of {', '.join(PRECISIONS)}")
    if way not in BUILDS:
        raise SystemExit(f"{way}: expected one of {', '.join(BUILDS)}")
    return Case(place, Path(plugin), precision or PRECISIONS[0], way)


def run(case: Case, parts: Callable[[Case], Iterator[Dict[str, Any]]]) -> int:
    """Keeps each part of a row as soon as it is measured, and the reason why the rest is missing."""
    row = {"kind": "detector", **dict(zip(KEYS["detector"], case.identity))}
    row["date"] = datetime.now(timezone.utc).date().isoformat()
    try:
        for part in parts(case):
            print(json.dumps(part), flush=True)
            keep([{**row, **part}])
    except Exception as error:
        traceback.print_exc()
        keep([{**row, "error": one_line(error)[:300]}])
        return 1
    return 0


KEYS = {"detector": ("model", "way", "precision"), "road": ("model", "way", "step")}


def identity(row: Dict[str, Any]) -> Tuple[Any, ...]:
    return (row["kind"], *(row[key] for key in KEYS[row["kind"]]))


def keep(parts: Sequence[Dict[str, Any]]) -> None:
    """Adds the figures to the rows that they belong to. A figure that comes anew ends an earlier error."""
    path = ROOT / "results" / f"peers.{gpu_name(this_machine().gpu)}.json"
    with exclusive(path.parent):  # another process may be building
        rows: List[Dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
        for part in parts:
            earlier = next((one for one in rows if identity(one) == identity(part)), None)
            if earlier is None:
                rows.append(dict(part))
            else:
                earlier.pop("error", None)
                earlier.update(part)
        write_results(path, "peers", COMMAND, rows)


# ---- Build ----------------------------------------------------------------------------------------------


def build_ours(case: Case) -> Iterator[Dict[str, Any]]:
    folder = case.folder / "odtrt"
    is_cold = not timing_cache().is_file()
    started = time.perf_counter()
    engine.build(folder, precision=case.precision.lower(), plugin=case.plugin, force=True)
    seconds = time.perf_counter() - started
    found = passport_of(case)
    yield {
        **built(is_cold, seconds, found.plan_bytes, found.layers),
        "version": found.version,
        "nms": "OdtrtDetect",
        "score_threshold": case.spec.nms.score_threshold,
        "input": "float32 NCHW",
    }


def passport_of(case: Case) -> passport.Passport:
    """Of our newest plan of that precision."""
    found = [
        one
        for one in passport.passports(case.folder / "odtrt")
        if one.precision == case.precision.lower() and one.plugin is not None
    ]
    if not found:
        raise RuntimeError("there is no fused plan of this precision yet: build it first")
    return found[0]


def build_theirs(case: Case) -> Iterator[Dict[str, Any]]:
    import tensorrt as trt

    sample, file = sample_of(case.spec), timing_cache()
    is_cold = not file.is_file()
    started = time.perf_counter()
    messages = trt_messages(trt)
    logger = messages.logger
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse((case.folder / "nvidia.onnx").read_bytes()):
        raise RuntimeError(f"the parser refuses it: {parser.get_error(0).desc()}")
    config = configured(trt, builder, network, sample, case.precision)
    cache = config.create_timing_cache(read_cache_file(file)[0] or b"")
    config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT does not build it: {messages.reasons()}")
    case.plan.write_bytes(plan)
    seconds = time.perf_counter() - started
    file.parent.mkdir(parents=True, exist_ok=True)
    write_cache_file(file, bytes(cache.serialize()))
    runtime = trt.Runtime(logger)
    engine_of_plan = runtime.deserialize_cuda_engine(plan)
    inspector = engine_of_plan.create_engine_inspector()
    layers, _ = count_inspected(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    yield {
        **built(is_cold, seconds, case.plan.stat().st_size, layers),
        "version": trt.__version__,
        "sample": sample.name,
        "nms": "EfficientNMS_TRT",
        "score_threshold": max(LEAST_THEIRS, case.spec.nms.score_threshold),
        "input": "float32 NHWC",
    }


def configured(trt: Any, builder: Any, network: Any, sample: Sample, precision: str) -> Any:
    """What the sample's build_engine.py sets, and the inspector's details, which change no layer."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, sample.workspace_gib << 30)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if sample.has_strict_types:
        config.set_flag(trt.BuilderFlag.STRICT_TYPES)
    if precision == "FP16":
        config.set_flag(trt.BuilderFlag.FP16)
    picture = network.get_input(0)
    if picture.shape[0] == -1:
        profile, shape = builder.create_optimization_profile(), (1, *tuple(picture.shape)[1:])
        profile.set_shape(picture.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    return config


def sample_of(spec: DetectorSpec) -> Sample:
    return EFFICIENTDET if "efficientnet" in spec.source.feature_extractor else TFOD


def timing_cache() -> Path:
    """The file that odtrt uses too."""
    import tensorrt as trt

    here = {"runtime_library": "tensorrt", "version": trt.__version__}
    return engine.timing_cache_file(here, this_machine())


def built(is_cold: bool, seconds: float, plan_bytes: int, layers: Dict[str, int]) -> Dict[str, Any]:
    return {
        f"build_{'cold' if is_cold else 'warm'}_seconds": round(seconds, 2),
        "plan_mb": round(plan_bytes / 1e6, 2),
        "layers": sum(layers.values()),
        "layers_fp16": layers.get("fp16", 0),
        "layers_fp32": layers.get("fp32", 0),
    }


# ---- Measure --------------------------------------------------------------------------------------------


def measure_ours(case: Case) -> Iterator[Dict[str, Any]]:
    from odtrt_lib.anchors import load_anchors
    from odtrt_lib.detector import Detector
    from odtrt_lib.engine import pipeline

    folder, spec, found = case.folder / "odtrt", case.spec, passport_of(case)
    pictures, references, about = pictures_of(case)
    before = free_device_mb()
    started = time.perf_counter()
    plan = pipeline.load(folder, found, spec, load_anchors(folder / "anchors.npy", spec), plugin=case.plugin)
    try:
        yield loaded(started, before)
        plan.run(pictures[:1])
        yield graph_times(plan.enqueue_network, plan.stream, SAMPLING).row("device_graph_")
        yield time_calls(plan.run_again, SAMPLING).row("eager_")
    finally:
        plan.close()
    for prefix, switches in (("detect_", None), ("detect_best_", pipeline.Switches(**BEST))):
        opened = Detector.open(
            folder, "tensorrt", plugin=case.plugin, precision=found.precision, switches=switches
        )
        with opened as detector:
            if switches is None:
                results = [
                    one
                    for i, picture in enumerate(pictures)
                    for one in coco_results(i, detector.detect(picture))
                ]
                yield {**about, **compared(references, results, case)}
            yield time_calls(lambda: detector.detect(pictures[0]), SAMPLING).row(prefix)


def measure_theirs(case: Case) -> Iterator[Dict[str, Any]]:
    pictures, references, about = pictures_of(case)
    before = free_device_mb()
    started = time.perf_counter()
    theirs = Theirs(case)
    network_input = theirs.prepare(pictures[0])[0]
    theirs.buffer.write(theirs.input, network_input, theirs.stream)
    theirs.enqueue()
    theirs.stream.synchronize()
    yield loaded(started, before)
    yield graph_times(theirs.enqueue, theirs.stream, SAMPLING).row("device_graph_")
    yield time_calls(theirs.enqueue, SAMPLING, theirs.stream.synchronize).row("eager_")
    found = [one for i, picture in enumerate(pictures) for one in theirs.detect(picture, i)]
    yield {**about, **compared(references, found, case)}
    yield time_calls(lambda: theirs.detect(pictures[0], 0), SAMPLING).row("detect_")
    yield time_calls(lambda: theirs.infer(network_input), SAMPLING).row("infer_")


def loaded(started: float, before: float) -> Dict[str, float]:
    return {
        "load_seconds": round(time.perf_counter() - started, 2),
        "device_memory_mb": round(before - free_device_mb(), 1),
    }


class Theirs:
    """The sample's plan, run as its infer.py and image_batcher.py do."""

    def __init__(self, case: Case) -> None:
        import tensorrt as trt

        if not case.plan.is_file():
            raise RuntimeError("there is no plan of this precision yet: build it first")
        self.keeps_aspect = case.spec.input.resizer.kind == "keep_aspect_ratio"
        self.messages = trt_messages(trt)
        trt.init_libnvinfer_plugins(self.messages.logger, "")
        self.runtime = trt.Runtime(self.messages.logger)
        self.engine = self.runtime.deserialize_cuda_engine(case.plan.read_bytes())
        self.context = self.engine.create_execution_context()
        self.stream, self.buffer = cuda.Stream(), cuda.Buffer("device")
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        (self.input,) = [name for name in self.names if name not in OUTPUTS]
        self.shape = (1, *tuple(self.engine.get_tensor_shape(self.input))[1:])
        index = {name: self.engine.get_binding_index(name) for name in self.names}
        if self.engine.get_tensor_shape(self.input)[0] == -1:
            self.context.set_binding_shape(index[self.input], self.shape)
            self.context.set_input_shape(self.input, self.shape)
        self.buffer.arrange(
            [
                (
                    name,
                    trt.nptype(self.engine.get_tensor_dtype(name)),
                    tuple(self.context.get_tensor_shape(name)),
                )
                for name in self.names
            ]
        )
        self.addresses = [self.buffer.address(name) for name in sorted(self.names, key=index.__getitem__)]
        for name, address in self.buffer.addresses().items():
            self.context.set_tensor_address(name, address)

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.handle):
            raise RuntimeError(f"TensorRT does not run it: {self.messages.reasons()}")

    def prepare(self, picture: np.ndarray) -> Tuple[np.ndarray, Tuple[float, float]]:
        """The network input, and how many of its pixels a pixel of the picture has, in y and in x."""
        from PIL import Image

        height, width = self.shape[1:3]
        rows, columns = picture.shape[:2]
        if self.keeps_aspect:
            scale = 1.0 / max(columns / width, rows / height)
            scales, size = (scale, scale), (round(columns * scale), round(rows * scale))
        else:
            scales, size = (height / rows, width / columns), (width, height)
        resized = Image.fromarray(picture).resize(size, resample=Image.BILINEAR)
        if self.keeps_aspect:
            padded = Image.new("RGB", (width, height), (124, 116, 104))
            padded.paste(resized)
            resized = padded
        batch = np.zeros(self.shape, np.float32)
        batch[0] = np.asarray(resized, dtype=np.float32)
        return batch, scales

    def infer(self, batch: np.ndarray) -> Dict[str, np.ndarray]:
        self.buffer.write(self.input, batch, self.stream)
        if not self.context.execute_v2(self.addresses):
            raise RuntimeError(f"TensorRT does not run it: {self.messages.reasons()}")
        return {name: self.buffer.read(name, self.stream) for name in OUTPUTS}

    def detect(self, picture: np.ndarray, image_id: int) -> Detected:
        """Detections in COCO's results form, class 0 of the plan as the label map's 1."""
        batch, (y_scale, x_scale) = self.prepare(picture)
        outputs = self.infer(batch)
        count, boxes, scores, classes = (outputs[name][0] for name in OUTPUTS)
        height, width = self.shape[1:3] if np.max(boxes) < 2.0 else (1, 1)
        y_scale, x_scale = height / y_scale, width / x_scale
        found = []
        for box, score, column in zip(boxes[: int(count[0])], scores, classes):
            ymin, xmin, ymax, xmax = box[0] * y_scale, box[1] * x_scale, box[2] * y_scale, box[3] * x_scale
            found.append(
                {
                    "image_id": image_id,
                    "category_id": int(column) + 1,
                    "bbox": [float(xmin), float(ymin), float(xmax - xmin), float(ymax - ymin)],
                    "score": float(score),
                }
            )
        return found


def pictures_of(case: Case) -> Tuple[List[np.ndarray], Detected, Dict[str, Any]]:
    """The pictures, what the OD API finds in them, and what a row says of them."""
    held = np.load(str(case.folder / "pictures.npz"))
    about = {"weights": str(held["weights"]), "candidates": int(held["candidates"])}
    return list(held["pictures"]), json.loads(str(held["detections"])), about


def compared(references: Detected, found: Detected, case: Case) -> Dict[str, Any]:
    """How the detections agree with those of the OD API; the module says what each figure is."""
    _, iou, tolerance = ARITHMETIC[case.precision]
    nms = case.spec.nms
    least = max(SCORE, nms.score_threshold)
    close = agreement(references, found, least, iou, tolerance, max_detections=nms.max_total_detections)
    of_class = of_any = 0
    shifts: List[float] = []
    for one in references:
        others = [other for other in found if other["image_id"] == one["image_id"]]
        if one["score"] < least or not others:
            continue
        overlaps = iou_matrix([one["bbox"]], [other["bbox"] for other in others])[0]
        is_own = np.array([other["category_id"] == one["category_id"] for other in others])
        of_any += bool((overlaps >= 0.5).any())
        if (overlaps[is_own] >= 0.5).any():
            of_class += 1
            best = others[int(np.argmax(np.where(is_own, overlaps, -1.0)))]
            shifts += np.abs(np.subtract(corners(one), corners(best))).tolist()
    return {
        "pictures": len({one["image_id"] for one in references}),
        "references": close.references,
        "agrees": close.agrees,
        "matched": close.matched,
        "at_threshold": close.at_threshold,
        "missing": len(close.missing),
        "extra": len(close.extra),
        "max_score_difference": round(close.max_score_difference, 6),
        "found": of_class,
        "wrong_class": of_any - of_class,
        "shift_px": round(float(np.mean(shifts)), 4) if shifts else None,
    }


def corners(detection: Dict[str, Any]) -> List[float]:
    x, y, width, height = detection["bbox"]
    return [x, y, x + width, y + height]


BUILDS = {"nvidia": build_theirs, "odtrt": build_ours}
MEASURES = {"nvidia": measure_theirs, "odtrt": measure_ours}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
