"""The post-processing on the CPU: the native library, the numpy reference, TensorFlow, ONNX Runtime.

    python benchmarks/nms.py               writes results/nms.cpu.json; about ten minutes
    python benchmarks/nms.py 12804         only that number of anchors, and writes nothing

A row is one call on the raw heads of ``batch`` images, in microseconds; ``bytes`` are those of the heads,
which every implementation must read at least once. ``source``: ``real`` heads are what the corpus models
say about photographs (skipped where the corpus, the folder that ODTRT_CORPUS names, is absent), with the
classes and score converter of the model; ``synthetic`` ones are crowds: some seven objects an image, the
boxes around each regressing to it, and low logits elsewhere. Implementations:

* ``native``: ``libodtrt.so`` on all cores, from heads to detections.
* ``numpy``: ``odtrt_lib.nms.postprocess_reference``, the same.
* ``tensorflow``: the OD API's own box coder, score converter and ``batch_multiclass_non_max_suppression``
  in one ``tf.function``, the same.
* ``onnxruntime``: decoding, sigmoid and the ONNX operator NonMaxSuppression, which leaves the detections of
  each class unmerged; only where there is no softmax and no background column.

The rows with ``work: nms`` are plain suppression of 2000 boxes of one class at IoU 0.5.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import spec_cases

from odtrt_lib import native, nms
from odtrt_lib.latency.timing import Sampling, time_calls
from odtrt_lib.results import write_results
from odtrt_lib.spec import BoxCoder, DetectorSpec, NmsSpec, ScoreSpec

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "nms.cpu.json"
THRESHOLDS = (0.3, 0.05, 1e-8)
SIZES = (1917, 12804, 51150, 49104, 76725, 196416)
SSD_SIZES = (1917, 12804, 51150)
D0_ANCHORS = 49104
CLASSES = 90
CORPUS_MODELS = ("coco_ssd_mnv1", "zoo_ssd_mobilenet_v2_fpnlite_320", "zoo_efficientdet_d0")
USUAL = NmsSpec(1e-8, 0.5, 100, 100, False, False)
PLAIN_BOXES = 2000
SAMPLING = Sampling(warmup=2, min_count=5, max_count=500, seconds=1.0)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The arguments of ``nms.postprocess`` for some images. source: ``real`` or ``synthetic``."""

    source: str
    box_encodings: np.ndarray
    class_logits: np.ndarray
    anchors: np.ndarray
    spec: DetectorSpec
    clip_windows: np.ndarray

    def of(self, batch: int, dtype: type, score_threshold: float) -> Heads:
        settings = dataclasses.replace(self.spec.nms, score_threshold=score_threshold)
        return dataclasses.replace(
            self,
            box_encodings=self.box_encodings[:batch].astype(dtype),
            class_logits=self.class_logits[:batch].astype(dtype),
            spec=dataclasses.replace(self.spec, nms=settings),
            clip_windows=self.clip_windows[:batch],
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.box_encodings, self.class_logits, self.anchors, self.spec, self.clip_windows


def crowd_heads(num_anchors: int, images: int) -> Heads:
    """Synthetic heads for :data:`CLASSES` classes; needs numpy alone."""
    rng = np.random.default_rng(0)
    anchors = np.concatenate(
        [rng.uniform(0, 1, (num_anchors, 2)), rng.uniform(0.03, 0.4, (num_anchors, 2))], 1
    ).astype(np.float32)
    coder = spec_cases.SSD_CODER if num_anchors in SSD_SIZES else spec_cases.EFFICIENTDET_CODER
    scales = np.array(dataclasses.astuple(coder), np.float32)
    encodings = rng.normal(0, 0.1, (images, num_anchors, 4)).astype(np.float32)
    logits = rng.normal(-7, 1, (images, num_anchors, CLASSES)).astype(np.float32)
    for i in range(images):
        for _ in range(rng.poisson(7)):
            centre, size = rng.uniform(0.15, 0.85, 2), rng.uniform(0.08, 0.3, 2)
            members = 1 + rng.poisson(2) if rng.random() < 0.35 else 1
            for member in range(members):
                place = centre + size * [0.0, 0.4] * member
                apart = np.abs(anchors[:, :2] - place) / size
                near = np.flatnonzero(
                    (apart < 0.5).all(1) & (np.abs(np.log(anchors[:, 2:] / size)) < 0.7).all(1)
                )
                towards = np.concatenate(
                    [(place - anchors[near, :2]) / anchors[near, 2:], np.log(size / anchors[near, 2:])], 1
                )
                encodings[i, near] = towards + rng.normal(0, 0.08, towards.shape)
                logits[i, near, rng.integers(0, CLASSES)] = (
                    2 - 8 * apart[near].max(1) + rng.normal(0, 1, len(near))
                )
    spec = spec_cases.example(
        spec_cases.ssd(num_anchors, CLASSES, coder=coder),
        USUAL,
        spec_cases.network_input(512, 512),
        name="crowds",
    )
    windows = np.tile(np.array([0, 0, 1, 1], np.float32), (images, 1))
    return Heads("synthetic", encodings * scales, logits, anchors, spec, windows)


def corpus_folder() -> Path:
    return Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))


def corpus_heads(name: str, images: int) -> Heads:
    """What one model of the corpus says about its first photographs; needs TensorFlow and the OD API."""
    from odtrt_lib.export import find_model, odapi
    from odtrt_lib.export.pipeline import read_pipeline
    from odtrt_lib.preprocess import load_image

    tf = odapi.tensorflow()
    photographs = sorted((corpus_folder() / "coco128" / "images" / "val2017").glob("*.jpg"))[:images]
    files = find_model(corpus_folder() / name)
    model = odapi.load_model(files.pipeline, files.checkpoint)
    inputs, shapes = zip(
        *(model.preprocess(tf.constant(load_image(path)[np.newaxis], tf.float32)) for path in photographs),
        strict=True,
    )
    inputs, shapes = tf.concat(inputs, 0), tf.concat(shapes, 0)
    predicted = model.predict(inputs, shapes)
    corners = model.anchors.get().numpy().astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    anchors = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, sizes], 1).astype(np.float32)
    settings = read_pipeline(files.pipeline)
    spec = spec_cases.example(
        spec_cases.ssd_of(settings, len(anchors)),
        settings.nms,
        spec_cases.network_input(*inputs.shape[1:3], settings.resizer),
        name=name,
        labels=settings.labels,
    )
    return Heads(
        "real",
        predicted["box_encodings"].numpy().reshape(images, -1, 4),
        predicted["class_predictions_with_background"].numpy(),
        anchors,
        spec,
        model._compute_clip_window(inputs, shapes).numpy(),
    )


def by_native(heads: Heads) -> Callable[[], Any] | None:
    library = native.load()
    return library and functools.partial(native.postprocess_cpu, library, *heads.arguments)


def by_numpy(heads: Heads) -> Callable[[], Any]:
    return functools.partial(nms.postprocess_reference, *heads.arguments)


def by_tensorflow(heads: Heads) -> Callable[[], Any] | None:
    """TensorFlow has no float16 here; its result is checked against the reference's counts."""
    if heads.class_logits.dtype != np.float32:
        return None
    from odtrt_lib.export import odapi

    tf = odapi.tensorflow()
    from object_detection.box_coders.faster_rcnn_box_coder import FasterRcnnBoxCoder
    from object_detection.builders import post_processing_builder
    from object_detection.core import box_list, post_processing
    from object_detection.protos import post_processing_pb2

    spec, batch = heads.spec, len(heads.box_encodings)
    coder = FasterRcnnBoxCoder(dataclasses.astuple(spec.heads.box_coder))
    centres, sizes = heads.anchors[:, :2], heads.anchors[:, 2:]
    corners = np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)
    anchors = box_list.BoxList(tf.constant(np.tile(corners, (batch, 1))))
    config = post_processing_pb2.PostProcessing()
    config.score_converter = config.ScoreConverter.Value(spec.heads.scores.converter.upper())
    config.logit_scale = spec.heads.scores.logit_scale
    _, convert = post_processing_builder.build(config)

    @tf.function(autograph=False)
    def postprocess(encodings: Any, logits: Any, windows: Any) -> Any:
        boxes = coder.decode(tf.reshape(encodings, [-1, 4]), anchors).get()
        return post_processing.batch_multiclass_non_max_suppression(
            tf.reshape(boxes, [batch, -1, 1, 4]),
            convert(logits)[:, :, int(spec.heads.background_column) :],
            score_thresh=spec.nms.score_threshold,
            iou_thresh=spec.nms.iou_threshold,
            max_size_per_class=spec.nms.max_detections_per_class,
            max_total_size=spec.nms.max_total_detections,
            clip_window=windows,
            change_coordinate_frame=spec.nms.change_coordinate_frame,
            use_class_agnostic_nms=spec.nms.class_agnostic,
        )

    inputs = [tf.constant(a) for a in (heads.box_encodings, heads.class_logits, heads.clip_windows)]
    counts = postprocess(*inputs)[5].numpy()
    expected = nms.postprocess_reference(*heads.arguments).num_detections
    assert counts.tolist() == expected.tolist(), f"TensorFlow finds {counts}, the reference {expected}"
    return lambda: postprocess(*inputs)[5].numpy()


def by_onnxruntime(heads: Heads) -> Callable[[], Any] | None:
    spec = heads.spec
    is_plain = spec.heads.scores == ScoreSpec("sigmoid", 1.0) and not spec.heads.background_column
    if heads.class_logits.dtype != np.float32 or not is_plain:
        return None
    session = _nms_session(
        _decoding(heads.anchors, spec.heads.box_coder), spec.nms, [None, spec.heads.num_anchors, CLASSES]
    )
    feeds = {"box_encodings": heads.box_encodings, "class_logits": heads.class_logits}
    return lambda: session.run(None, feeds)


def _decoding(anchors: np.ndarray, coder: BoxCoder) -> tuple[list[Any], list[Any]]:
    """ONNX nodes and constants from ``box_encodings`` and ``class_logits`` to ``boxes`` and ``scores``."""
    from onnx import helper, numpy_helper

    scales = np.array(dataclasses.astuple(coder), np.float32)
    constants = {
        "scales": scales,
        "centres": anchors[:, :2],
        "sizes": anchors[:, 2:],
        "halves": np.array(0.5, np.float32),
        "two_and_two": np.array([2, 2], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Div", ["box_encodings", "scales"], ["scaled"]),
        node("Split", ["scaled", "two_and_two"], ["offsets", "logs"], axis=-1),
        node("Mul", ["offsets", "sizes"], ["moved"]),
        node("Add", ["moved", "centres"], ["middles"]),
        node("Exp", ["logs"], ["ratios"]),
        node("Mul", ["ratios", "sizes"], ["own_sizes"]),
        node("Mul", ["own_sizes", "halves"], ["half_sizes"]),
        node("Sub", ["middles", "half_sizes"], ["low"]),
        node("Add", ["middles", "half_sizes"], ["high"]),
        node("Concat", ["low", "high"], ["boxes"], axis=-1),
        node("Transpose", ["class_logits"], ["by_class"], perm=[0, 2, 1]),
        node("Sigmoid", ["by_class"], ["scores"]),
    ]
    return nodes, [numpy_helper.from_array(value, name) for name, value in constants.items()]


def _nms_session(before: tuple[list[Any], list[Any]] | None, settings: NmsSpec, shape: list[Any]) -> Any:
    """An ONNX Runtime session whose last node is NonMaxSuppression; without ``before`` it is the only one."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = before or ([], [])
    numbers = {
        "most": np.array([settings.max_detections_per_class], np.int64),
        "iou": np.array([settings.iou_threshold], np.float32),
        "least": np.array([settings.score_threshold], np.float32),
    }
    last = helper.make_node("NonMaxSuppression", ["boxes", "scores", *numbers], ["selected"])
    of_boxes, of_scores = ("box_encodings", "class_logits") if before else ("boxes", "scores")
    graph = helper.make_graph(
        [*nodes, last],
        "nms",
        [
            helper.make_tensor_value_info(
                of_boxes, TensorProto.FLOAT, [None, shape[-2] if before else None, 4]
            ),
            helper.make_tensor_value_info(of_scores, TensorProto.FLOAT, shape),
        ],
        [helper.make_tensor_value_info("selected", TensorProto.INT64, [None, 3])],
        [*constants, *(numpy_helper.from_array(value, name) for name, value in numbers.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


IMPLEMENTATIONS: dict[str, Callable[[Heads], Callable[[], Any] | None]] = {
    "native": by_native,
    "numpy": by_numpy,
    "tensorflow": by_tensorflow,
    "onnxruntime": by_onnxruntime,
}


def postprocess_rows(heads: Heads) -> Iterator[dict[str, Any]]:
    batches = (1, 8) if heads.spec.heads.num_anchors == D0_ANCHORS else (1,)
    for batch in batches:
        for score_threshold in THRESHOLDS:
            for dtype in (np.float32, np.float16):
                own = heads.of(batch, dtype, score_threshold)
                for implementation, prepare in IMPLEMENTATIONS.items():
                    call = prepare(own)
                    if call is not None:
                        yield {
                            "work": "postprocess",
                            "model": own.spec.name,
                            "anchors": own.spec.heads.num_anchors,
                            "classes": own.spec.heads.num_classes,
                            "score_threshold": score_threshold,
                            "batch": batch,
                            "dtype": np.dtype(dtype).name,
                            "source": own.source,
                            "implementation": implementation,
                            **time_calls(call, SAMPLING).row(),
                            "bytes": own.box_encodings.nbytes + own.class_logits.nbytes,
                        }


def plain_rows() -> Iterator[dict[str, Any]]:
    """Boxes as in a crowd: many overlap, and a tenth or so is kept."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 1, (PLAIN_BOXES // 10, 2))[rng.integers(0, PLAIN_BOXES // 10, PLAIN_BOXES)]
    corners = centres + rng.normal(0, 0.01, centres.shape)
    boxes = np.concatenate([corners, corners + rng.uniform(0.05, 0.15, corners.shape)], 1).astype(np.float32)
    scores = rng.random(PLAIN_BOXES).astype(np.float32)
    from odtrt_lib.export import odapi

    tf = odapi.tensorflow()
    tensors = tf.constant(boxes), tf.constant(scores)
    settings = dataclasses.replace(USUAL, max_detections_per_class=PLAIN_BOXES, score_threshold=-1.0)
    session = _nms_session(None, settings, [1, 1, PLAIN_BOXES])
    feeds = {"boxes": boxes[np.newaxis], "scores": scores[np.newaxis, np.newaxis]}
    calls = {
        "native": lambda: nms.nms(boxes, scores, 0.5),
        "numpy": lambda: nms.nms_reference(boxes, scores, 0.5),
        "tensorflow": lambda: tf.image.non_max_suppression(*tensors, PLAIN_BOXES, 0.5).numpy(),
        "onnxruntime": lambda: session.run(None, feeds)[0][:, 2],
    }
    kept = calls["numpy"]()
    for implementation, call in calls.items():
        if implementation == "native" and native.load() is None:
            continue
        np.testing.assert_array_equal(call(), kept, err_msg=implementation)
        yield {
            "work": "nms",
            "model": "boxes",
            "anchors": PLAIN_BOXES,
            "classes": 1,
            "score_threshold": None,
            "batch": 1,
            "dtype": "float32",
            "source": "synthetic",
            "implementation": implementation,
            **time_calls(call, SAMPLING).row(),
            "bytes": boxes.nbytes + scores.nbytes,
        }


def all_heads(sizes: tuple[int, ...]) -> Iterator[Heads]:
    for num_anchors in sizes:
        yield crowd_heads(num_anchors, 8 if num_anchors == D0_ANCHORS else 1)
    if corpus_folder().is_dir():
        for name in CORPUS_MODELS:
            heads = corpus_heads(name, 8)
            if heads.spec.heads.num_anchors in sizes:
                yield heads
    else:
        print(f"no corpus at {corpus_folder()}: no real heads")


def main() -> None:
    chosen = tuple(map(int, sys.argv[1:]))
    rows = list(plain_rows())
    for heads in all_heads(chosen or SIZES):
        for row in postprocess_rows(heads):
            print(row, flush=True)
            rows.append(row)
    if not chosen:
        write_results(RESULTS, "nms", "python benchmarks/nms.py", rows)


if __name__ == "__main__":
    main()
