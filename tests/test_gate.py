"""Chapter 1's gate beside the OD API: right specs pass it, and one with any single wrong field does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import spec_cases
from conftest import TINY_CONFIG

from odtrt_lib.errors import CheckError
from odtrt_lib.export import odapi
from odtrt_lib.export.gate import compare_with_odapi, draw_heads, try_wrong_fields, wrong_fields
from odtrt_lib.export.pipeline import read_pipeline
from odtrt_lib.export.stage import _centre_size, _normalisation
from odtrt_lib.nms import decode_boxes
from odtrt_lib.spec import DetectorSpec, InputSpec, load_spec

# A resizer that pads, softmax, one suppression for all classes, odd scales, in place of the tiny config's.
OTHER_CONFIG = (
    (
        "fixed_shape_resizer { height: 96 width: 128 }",
        "keep_aspect_ratio_resizer { min_dimension: 96 max_dimension: 128 pad_to_max_dimension: true"
        " per_channel_pad_value: 0.5 per_channel_pad_value: 0.25 per_channel_pad_value: -1 }",
    ),
    ("y_scale: 10 x_scale: 10 height_scale: 5 width_scale: 5", "y_scale: 4 x_scale: 3 height_scale: 2"),
    ("score_converter: SIGMOID", "score_converter: SOFTMAX logit_scale: 2"),
    (
        "score_threshold: 0.01 iou_threshold: 0.6 max_detections_per_class: 20 max_total_detections: 40",
        "score_threshold: 0.2 iou_threshold: 0.45 max_detections_per_class: 9 max_total_detections: 9"
        " use_class_agnostic_nms: true change_coordinate_frame: true",
    ),
)


@dataclasses.dataclass(frozen=True)
class Subject:
    model: object
    predictions: dict
    spec: DetectorSpec
    anchors: np.ndarray
    graph: object

    def compare(self, spec=None, anchors=None, **options):
        return compare_with_odapi(
            self.model,
            self.predictions,
            self.spec if spec is None else spec,
            self.anchors if anchors is None else anchors,
            self.graph,
            **options,
        )


@pytest.fixture(scope="module")
def tiny(tiny_model, tiny_folder) -> Subject:
    tf = odapi.tensorflow()
    model = odapi.load_model(tiny_model / "pipeline.config", tiny_model / "checkpoint" / "ckpt-0")
    graph = tf.compat.v1.GraphDef.FromString((tiny_folder / "frozen.pb").read_bytes())
    return Subject(
        model,
        model.predict(tf.zeros([1, 96, 128, 3]), None),
        load_spec(tiny_folder / "spec.json"),
        np.load(tiny_folder / "anchors.npy"),
        graph,
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Subject:
    """The weights do not matter: the gate draws its heads."""
    tf = odapi.tensorflow()
    text = TINY_CONFIG
    for old, new in OTHER_CONFIG:
        assert old in text
        text = text.replace(old, new)
    config = tmp_path_factory.mktemp("other") / "pipeline.config"
    config.write_text(text)
    settings = read_pipeline(config)
    model = odapi.build_model(config, settings.message)
    predictions = model.predict(tf.zeros([1, 128, 128, 3]), None)
    anchors = _centre_size(predictions["anchors"].numpy())
    image = InputSpec(128, 128, settings.resizer, *_normalisation(model))
    heads = spec_cases.ssd_of(settings, len(anchors))
    spec = spec_cases.example(heads, settings.nms, image, labels=settings.labels)
    with tf.Graph().as_default() as graph:
        tf.compat.v1.placeholder(tf.float32, [1, 128, 128, 3], "image")
        tf.no_op("box_encodings")
        tf.no_op("class_logits")
    return Subject(model, predictions, spec, anchors, graph.as_graph_def())


@pytest.fixture(params=["tiny", "other"])
def subject(request) -> Subject:
    return request.getfixturevalue(request.param)


def test_the_right_spec_passes(subject):
    agreement = subject.compare()
    assert agreement.detections > 30 and agreement.pictures > 4
    assert agreement.box_max_err < 1e-5 and agreement.score_max_err < 1e-5 and agreement.input_max_err < 1e-4


def test_every_wrong_field_fails_or_says_why_it_has_no_effect(subject, tiny_model):
    label_map = tiny_model / "label_map.pbtxt" if subject.spec.name == "tiny" else None
    outcomes = try_wrong_fields(
        subject.model, subject.predictions, subject.spec, subject.anchors, subject.graph, label_map
    )
    passed = {field for field, outcome in outcomes if outcome == "passed"}
    unnamed = {f"labels.{i}.name" for i in range(3)} if label_map is None else set()
    assert passed == unnamed
    fails = {field for field, outcome in outcomes if outcome.startswith("fails")}
    assert {"nms.iou_threshold", "nms.score_threshold", "nms.max_total_detections"} <= fails


def test_every_field_of_the_spec_is_tried(subject):
    def leaves(value, path):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            here = f"{path}.{key}" if path else str(key)
            if isinstance(each, (dict, list, tuple)):
                yield from leaves(each, here)
            else:
                yield here

    tried = {field for field, _ in wrong_fields(subject.spec)}
    assert tried == set(leaves(dataclasses.asdict(subject.spec), ""))


def test_what_ten_boxes_did_not_show(tiny):
    for setting in (
        {"iou_threshold": 0.5},
        {"iou_threshold": 0.9},
        {"score_threshold": 0.3},
        {"max_total_detections": 20},
    ):
        nms = dataclasses.replace(tiny.spec.nms, **setting)
        with pytest.raises(CheckError, match="OD API's answer"):
            tiny.compare(dataclasses.replace(tiny.spec, nms=nms))


@pytest.mark.parametrize("row", [0, 700, -1])
def test_one_wrong_anchor_fails(subject, row):
    anchors = subject.anchors.copy()
    anchors[row % len(anchors), 1] += 1e-4
    with pytest.raises(CheckError, match=f"anchor {row % len(anchors)} "):
        subject.compare(anchors=anchors)


def test_columns_shifted_by_one_fail(other):
    heads = dataclasses.replace(other.spec.heads, num_classes=4, background_column=False)
    labels = (*other.spec.labels, dataclasses.replace(other.spec.labels[0], id=4))
    with pytest.raises(CheckError):
        other.compare(dataclasses.replace(other.spec, heads=heads, labels=labels))


def test_drawn_scores_and_overlaps_keep_their_distance(subject):
    """In float64, apart from the code under test: nothing lies where rounding decides."""
    spec = subject.spec
    for heads in draw_heads(spec, subject.anchors):
        logits = heads.class_logits[0].astype(np.float64) / spec.heads.scores.logit_scale
        if spec.heads.scores.converter == "softmax":
            scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        else:
            scores = 1 / (1 + np.exp(-logits))
        scores = scores[:, int(spec.heads.background_column) :]
        threshold = spec.nms.score_threshold
        assert (np.abs(scores / threshold - 1) > 5e-4).all()
        rows, columns = np.nonzero(scores > threshold)
        own = np.sort(scores[rows, columns])
        assert len(own) < 2 or np.diff(own).min() > 1e-5
        boxes = decode_boxes(heads.box_encodings[0], subject.anchors, spec.heads.box_coder)
        boxes = boxes[rows].astype(np.float64)
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        sides = np.minimum(high, boxes[None, :, 2:]) - np.maximum(low, boxes[None, :, :2])
        common = np.prod(np.maximum(sides, 0), axis=-1)
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
        ious = common / (areas[:, None] + areas - common)
        assert (np.abs(ious - spec.nms.iou_threshold) > 5e-4).all()
