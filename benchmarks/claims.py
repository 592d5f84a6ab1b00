"""Measures the claims that the book's ledger (book/claims.md) judges.

    python benchmarks/claims.py            writes results/claims.cpu.json; some minutes on two cores

Every row has a ``claim`` key, the name of the function below that measured it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib import evaluate
from odtrt_lib.convert import OPSETS, convert
from odtrt_lib.detector import Detections, Detector
from odtrt_lib.export import export, odapi
from odtrt_lib.results import write_results
from odtrt_lib.scenes import PARTS_CLASSES, TEST_SEEDS, Scene, render_scene

ROOT = Path(__file__).resolve().parent.parent
PARTS = ROOT / "models" / "parts"
SCENES = 100
Row = dict[str, Any]


def main() -> None:
    rows = [
        {"claim": measure.__name__, **row}
        for measure in (resize_rule, graph, opset, runtime, camera_resize)
        for row in measure()
    ]
    write_results(ROOT / "results" / "claims.cpu.json", "claims", "python benchmarks/claims.py", rows)


def resize_rule() -> Iterator[Row]:
    """Which ONNX coordinate mode is which of TensorFlow's bilinear functions; pixel values 0..255."""
    odapi.prepare()
    import tensorflow as tf

    image = np.random.default_rng(0).uniform(0, 255, (1, 480, 640, 3)).astype(np.float32)
    for name, function in (
        ("tf.image.resize", tf.image.resize),
        ("tf.compat.v1.image.resize_bilinear", tf.compat.v1.image.resize_bilinear),
    ):
        expected = function(image, (240, 320)).numpy()
        for mode in ("half_pixel", "asymmetric", "align_corners"):
            error = np.abs(onnx_resize(image, (240, 320), mode) - expected)
            yield {
                "tensorflow": name,
                "onnx_mode": mode,
                "max_abs_err": round(float(error.max()), 3),
                "mean_abs_err": round(float(error.mean()), 3),
            }


def graph() -> Iterator[Row]:
    """The operations in the OD API's own exported model and in odtrt's frozen graph, of the same detector."""
    odapi.prepare()
    import tensorflow as tf
    from object_detection import exporter_lib_v2
    from object_detection.builders import model_builder

    from odtrt_lib.export.pipeline import read_pipeline

    config = read_pipeline(PARTS / "pipeline.config").message
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = model_builder.build(config.model, is_training=False)
        checkpoint = tf.train.Checkpoint(model=model)
        checkpoint.restore(str(PARTS / "checkpoint" / "ckpt-0"))
        model.predict(tf.zeros([1, 320, 320, 3]), None)
        checkpoint.save(str(work / "checkpoint" / "ckpt"))
        exporter_lib_v2.export_inference_graph("image_tensor", config, str(work / "checkpoint"), str(work))
        served = tf.saved_model.load(str(work / "saved_model")).signatures["serving_default"]
        definition = served.graph.as_graph_def()
        whole = Counter(node.op for node in definition.node)
        whole.update(node.op for function in definition.library.function for node in function.node_def)
        export(PARTS, work / "heads")
        frozen = tf.compat.v1.GraphDef.FromString((work / "heads" / "frozen.pb").read_bytes())
    yield {"route": "exporter_main_v2", **operations(whole)}
    yield {"route": "odtrt export", **operations(Counter(node.op for node in frozen.node))}


def operations(counts: Counter[str]) -> Row:
    def number(*words: str) -> int:
        return sum(count for kind, count in counts.items() if any(word in kind for word in words))

    return {
        "operations": counts.total(),
        "suppressions": number("NonMaxSuppression"),
        "loops": number("While"),
        "tensor_lists": number("TensorList", "TensorArray"),
        "resizes": number("Resize"),
    }


def opset() -> Iterator[Row]:
    """The same network in every opset that odtrt offers."""
    with tempfile.TemporaryDirectory() as folder:
        export(PARTS, folder)
        for number in OPSETS:
            checks = convert(folder, opset=number, force=True).record["checks"]
            heads = [checks["parity"][name] for name in ("box_encodings", "class_logits")]
            yield {
                "opset": number,
                "nodes": checks["nodes"],
                "resizes_agree": checks["resizes_agree"],
                "max_err_in_std": max(head["max_relative_err"] for head in heads),
                "rms_err_in_std": max(head["rms_relative_err"] for head in heads),
            }


def runtime() -> Iterator[Row]:
    """Builder flags and plugins of the TensorRT-RTX that is installed."""
    import tensorrt_rtx

    tensorrt_rtx.init_libnvinfer_plugins(None, "")
    plugins = {creator.name for creator in tensorrt_rtx.get_plugin_registry().all_creators}
    names = [("plugin", name, plugins) for name in ("EfficientNMS_TRT", "BatchedNMSDynamic_TRT")]
    flags = set(tensorrt_rtx.BuilderFlag.__members__)
    names += [("builder flag", name, flags) for name in ("STRICT_TYPES", "FP16", "INT8", "TF32")]
    network_flags = set(tensorrt_rtx.NetworkDefinitionCreationFlag.__members__)
    names += [("network flag", name, network_flags) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED")]
    for kind, name, present in names:
        yield {"kind": kind, "name": name, "present": name in present}


def camera_resize() -> Iterator[Row]:
    """What another rule for resizing the camera image costs the shipped detector."""
    import cv2
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        export(PARTS, folder)
        convert(folder)
        detector = Detector.open(folder)
    height, width = detector.spec.input.height, detector.spec.input.width
    scenes = {seed: render_scene(seed) for seed in TEST_SEEDS[:SCENES]}
    truth = ground_truth(scenes)
    rules = {
        "as the Object Detection API": lambda image: image,
        "OpenCV, INTER_LINEAR": lambda image: cv2.resize(image, (width, height)),
        "Pillow, BILINEAR": lambda image: np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        ),
    }
    reference: dict[int, Detections] = {}
    for name, resized in rules.items():
        found = {
            seed: in_size_of(scene.image, detector.detect(resized(scene.image)), resized(scene.image))
            for seed, scene in scenes.items()
        }
        reference = reference or found
        rows = [row for seed, one in found.items() for row in evaluate.coco_results(seed, one)]
        metrics = evaluate.coco_metrics(truth, rows)
        shift = np.mean(np.concatenate([shifts(reference[seed], found[seed]) for seed in scenes]), axis=0)
        yield {
            "resized": name,
            "scenes": len(scenes),
            "image": "480x640",
            "network_input": f"{height}x{width}",
            "map": round(metrics.map, 4),
            "map75": round(metrics.map75, 4),
            "shift_down_px": round(float(shift[0]), 2),
            "shift_right_px": round(float(shift[1]), 2),
        }


def in_size_of(image: np.ndarray, detections: Detections, seen: np.ndarray) -> Detections:
    """Detections in pixels of ``image``, from those in the resized image that the detector has seen."""
    scale = np.tile(np.array(image.shape[:2]) / np.array(seen.shape[:2]), 2).astype(np.float32)
    return Detections(detections.boxes * scale, detections.scores, detections.class_ids, detections.names)


def shifts(reference: Detections, found: Detections) -> np.ndarray:
    """By how much box centres moved, [K, 2] (down, right) in pixels, where both found the same object."""

    def centres(one: Detections) -> np.ndarray:
        return (one.boxes[:, :2] + one.boxes[:, 2:]) / 2

    moved = []
    for i in np.flatnonzero(reference.scores >= 0.5):
        same = found.class_ids == reference.class_ids[i]
        if not same.any():
            continue
        difference = centres(found)[same] - centres(reference)[i]
        nearest = difference[np.abs(difference).sum(axis=1).argmin()]
        if np.abs(nearest).max() < 5:
            moved.append(nearest)
    return np.array(moved, np.float32).reshape(-1, 2)


def ground_truth(scenes: dict[int, Scene]) -> dict[str, Any]:
    """The scenes' boxes as the content of a COCO instances file."""
    return {
        "images": [{"id": seed, "height": 480, "width": 640} for seed in scenes],
        "categories": [{"id": i, "name": name} for i, name in enumerate(PARTS_CLASSES, 1)],
        "annotations": [
            {
                "image_id": seed,
                "category_id": int(class_id),
                "bbox": [float(x) for x in (box[1], box[0], box[3] - box[1], box[2] - box[0])],
            }
            for seed, scene in scenes.items()
            for class_id, box in zip(scene.class_ids, scene.boxes, strict=True)
        ],
    }


def onnx_resize(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """ONNX Runtime's linear Resize of [1, height, width, 3] to ``size`` in a coordinate mode."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    sizes = numpy_helper.from_array(np.array([1, 3, *size], np.int64), "sizes")
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode="linear", coordinate_transformation_mode=mode
    )
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "resize", tensors[:1], tensors[1:], [sizes]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": image.transpose(0, 3, 1, 2)})[0].transpose(0, 2, 3, 1)


if __name__ == "__main__":
    main()
