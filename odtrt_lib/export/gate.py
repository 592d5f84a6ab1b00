"""Chapter 1's gate: checks that raw heads, ``spec.json`` and ``anchors.npy`` give the OD API's own
detections.

The Object Detection API's model is the oracle. Both sides preprocess the same pictures and post-process the
same raw heads. These heads are constructed, because a network's own heads hardly ever reveal a wrong field:
ten strong boxes are the same with an IoU threshold of 0.5, 0.6 or 0.9. They are constructed around the values
in the spec: scores a thousandth above and below the score threshold, pairs of boxes whose IoU is just above
and below the IoU threshold, more boxes than the caps allow. If the model has another value, the two sides
disagree.

Scores and IoUs differ from one another by far more than float32's rounding, so the two sides can be compared
box by box.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib.errors import CheckError, InputError, one_line
from odtrt_lib.export import odapi
from odtrt_lib.nms import convert_scores, decode_boxes, postprocess_reference
from odtrt_lib.preprocess import Frame, preprocess
from odtrt_lib.spec import DetectorSpec

LIMIT = 1e-5
"""The largest difference of a box (in units of the network input) or a score between the two sides."""

INPUT_LIMIT = 1e-4
"""The largest difference of a network input's value, in units of the value range ``255 * scale``."""

_MARGIN = 1e-3  # the distance of scores (relative) and IoUs (absolute) from a threshold
_TOP = 0.9471
_NEVER = -200.0  # a logit whose score is 0 in float32


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was compared, and the largest differences; see :data:`LIMIT` and :data:`INPUT_LIMIT`."""

    pictures: int
    detections: int
    input_max_err: float
    box_max_err: float
    score_max_err: float


@dataclasses.dataclass(frozen=True)
class Heads:
    """Raw heads of one image.

    box_encodings: float32 [1, N, 4]. class_logits: float32 [1, N, columns]. fill: the part of the network
    input, height and width, that the image covers.
    """

    box_encodings: np.ndarray
    class_logits: np.ndarray
    fill: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Box:
    corners: tuple[float, float, float, float]
    column: int
    score: float


def compare_with_odapi(
    model: Any,
    predictions: Mapping[str, Any],
    spec: DetectorSpec,
    anchors: np.ndarray,
    graph: Any,
    label_map: str | Path | None = None,
) -> Agreement:
    """Compares chapter 1's files with the OD API's model from which they were made.

    model: the OD API's, restored. predictions: what ``model.predict`` returned for a network input. anchors:
    ``anchors.npy``. graph: the frozen GraphDef. label_map: the label map from which the names come; it is
    ignored if the OD API cannot read it, as in the case of a list of names.

    Raises CheckError, saying what differs: the tensors in the spec and in the graph, the labels and the label
    map, a picture's network input and the OD API's, or the boxes, scores or detections of constructed heads
    and those of ``model.postprocess``.
    """
    _compare_tensors(predictions, spec, anchors, graph)
    _compare_labels(spec, label_map)
    count, box_errors, score_errors = 0, [], []
    with np.errstate(all="ignore"):
        pictures, input_error = _compare_inputs(model, spec)
        for heads in draw_heads(spec, anchors):
            theirs = _odapi_postprocess(model, predictions, heads)
            box_errors.append(_compare_decoded(theirs, heads, spec, anchors))
            score_errors.append(_compare_scores(theirs, heads, spec))
            detections, box_error, score_error = _compare_detections(theirs, heads, spec, anchors)
            count += detections
            box_errors.append(box_error)
            score_errors.append(score_error)
    return Agreement(pictures, count, input_error, max(box_errors), max(score_errors))


def wrong_fields(spec: DetectorSpec) -> Iterator[tuple[str, DetectorSpec | str]]:
    """Each field of ``spec.json``, with a spec in which only this field is wrong, or with the reason why it
    changes no result."""
    for field, value in _leaves("", spec):
        reason = _why_without_effect(field, spec)
        if reason:
            yield field, reason
            continue
        for other in _other_values(field, value):
            yield field, _with(spec, field, other)


def try_wrong_fields(
    model: Any,
    predictions: Mapping[str, Any],
    spec: DetectorSpec,
    anchors: np.ndarray,
    graph: Any,
    label_map: str | Path | None = None,
) -> list[tuple[str, str]]:
    """The outcome of :func:`compare_with_odapi` for each wrong field: (field, outcome). ``passed`` means that
    it did not notice the wrong value."""
    tf = odapi.tensorflow()
    preprocessed: dict[bytes, Any] = {}

    def preprocess_once(images: Any) -> Any:
        key = images.numpy().tobytes()
        if key not in preprocessed:
            preprocessed[key] = model.preprocess(images)
        return preprocessed[key]

    fast = types.SimpleNamespace(
        preprocess=preprocess_once, postprocess=tf.function(model.postprocess, autograph=False)
    )
    outcomes = []
    for field, wrong in wrong_fields(spec):
        if isinstance(wrong, str):
            outcomes.append((field, f"no effect: {wrong}"))
            continue
        try:
            compare_with_odapi(fast, predictions, wrong, anchors, graph, label_map)
            outcomes.append((field, "passed"))
        except CheckError as error:
            outcomes.append((field, f"fails: {error}"))
    return outcomes


def draw_heads(spec: DetectorSpec, anchors: np.ndarray) -> Iterator[Heads]:
    """Raw heads whose detections depend on every setting of the post-processing; the same for the same spec.

    There are five images: pairs of boxes with many IoUs, scores around the threshold, a class with too many
    boxes, an image with too many boxes, and boxes across and beyond the edge of an image that does not fill
    the input. All remaining anchors have random encodings and scores below the threshold.
    """
    generator = np.random.default_rng(12)
    carriers = np.flatnonzero((anchors[:, 2:] > 0).all(axis=1))
    most = len(carriers)
    part = (0.6, 0.75)
    scales = np.array(dataclasses.astuple(spec.heads.box_coder), np.float32)
    for fill, boxes in (
        ((1.0, 1.0), _overlapping(spec)),
        ((1.0, 1.0), _around_the_threshold(spec)),
        ((1.0, 1.0), _too_many_of_a_class(spec, most)),
        ((1.0, 1.0), _too_many(spec, most)),
        (part, _across_the_edge(spec, part)),
    ):
        boxes = boxes[:most]
        encodings = generator.standard_normal((len(anchors), 4), np.float32) * scales / 2
        logits = _quiet_logits(generator, spec, (len(anchors), spec.heads.num_columns))
        rows = generator.permutation(carriers)[: len(boxes)]
        corners = np.array([box.corners for box in boxes], np.float64).reshape(-1, 4)
        encodings[rows] = _encode(corners, anchors[rows].astype(np.float64)) * scales
        for row, box in zip(rows, boxes, strict=True):
            logits[row] = _logits_of(spec, box)
        logits *= np.float32(spec.heads.scores.logit_scale)
        yield Heads(encodings[np.newaxis], logits[np.newaxis], fill)


def _fail(what: str) -> CheckError:
    return CheckError(
        f"spec.json and anchors.npy do not give the OD API's answer: {what}; run `odtrt export` again"
    )


def _compare_tensors(
    predictions: Mapping[str, Any], spec: DetectorSpec, anchors: np.ndarray, graph: Any
) -> None:
    heads = spec.heads
    for name, key, columns in (
        (heads.box_encodings, "box_encodings", 4),
        (heads.class_logits, "class_predictions_with_background", heads.num_columns),
    ):
        found, expected = tuple(predictions[key].shape)[1:], (heads.num_anchors, columns)
        if found != expected:
            raise _fail(f"the model's {key} is {list(found)} an image, the spec says {list(expected)}")
        if name not in {node.name for node in graph.node}:
            raise _fail(f"the frozen graph has no node {name}")
    if anchors.shape != (heads.num_anchors, 4):
        raise _fail(f"anchors.npy is {list(anchors.shape)}, the spec says [{heads.num_anchors}, 4]")
    inputs = {
        node.name: [dim.size for dim in node.attr["shape"].shape.dim]
        for node in graph.node
        if node.op == "Placeholder"
    }
    batch = -1 if spec.input.batch is None else spec.input.batch
    expected_inputs = {spec.input.name: [batch, spec.input.height, spec.input.width, 3]}
    if inputs != expected_inputs:
        raise _fail(f"the frozen graph's input is {inputs}, the spec says {expected_inputs}")


def _compare_labels(spec: DetectorSpec, label_map: str | Path | None) -> None:
    ids = [label.id for label in spec.labels]
    if ids != list(range(1, spec.heads.num_classes + 1)):
        raise _fail(f"the labels' ids are {ids[:10]}, expected one for each class, from 1 on")
    if label_map is None:
        return
    odapi.prepare()
    from google.protobuf import message, text_format
    from object_detection.utils import label_map_util

    try:
        theirs = label_map_util.create_category_index_from_labelmap(str(label_map))
    except (message.DecodeError, text_format.ParseError, TypeError, ValueError):
        return
    for label in spec.labels:
        name = theirs.get(label.id, {}).get("name", label.name)
        if label.name != name:
            raise _fail(f"class {label.id} is {label.name!r}, in {label_map} {name!r}")


def _compare_inputs(model: Any, spec: DetectorSpec) -> tuple[int, float]:
    tf = odapi.tensorflow()
    if spec.input.resizer.method != "bilinear":
        raise _fail(f"resizer.method is {spec.input.resizer.method!r}, odtrt resizes bilinear")
    generator = np.random.default_rng(3)
    worst = 0.0
    sizes = _picture_sizes(spec)
    for height, width in sizes:
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        theirs, shapes = model.preprocess(tf.constant(picture[np.newaxis], tf.float32))
        expected, true_shape = theirs.numpy()[0], tuple(shapes.numpy()[0, :2].tolist())
        name = f"a picture of {height}x{width}"
        try:
            found, frame = preprocess(picture, spec.input)
        except InputError as error:
            raise _fail(f"{name} is refused ({one_line(error)})") from error
        found = found.transpose(1, 2, 0)
        if found.shape != expected.shape or (frame.true_height, frame.true_width) != true_shape:
            raise _fail(
                f"{name} becomes {frame.true_height}x{frame.true_width} in {list(found.shape[:2])}, "
                f"with the OD API {true_shape[0]}x{true_shape[1]} in {list(expected.shape[:2])}"
            )
        difference = float((np.abs(found - expected) / (255 * np.abs(spec.input.scale))).max())
        if not difference <= INPUT_LIMIT:
            raise _fail(f"the network input of {name} differs by {difference:.2g} of the value range")
        worst = max(worst, difference)
    return len(sizes), worst


def _picture_sizes(spec: DetectorSpec) -> list[tuple[int, int]]:
    height, width = spec.input.height, spec.input.width
    resizer = spec.input.resizer
    if resizer.kind == "keep_aspect_ratio" and not resizer.pad_to_max_dimension:
        return [(height, width), (2 * height, 2 * width)]
    return [(height, width), (61, 97), (97, 61), (240, 37), (37, 240), (80, 80), (height + 9, width // 2 + 5)]


def _odapi_postprocess(model: Any, predictions: Mapping[str, Any], heads: Heads) -> dict[str, np.ndarray]:
    tf = odapi.tensorflow()
    height, width = tuple(predictions["preprocessed_inputs"].shape)[1:3]
    answer = model.postprocess(
        {
            "preprocessed_inputs": tf.zeros([1, height, width, 3], tf.uint8),
            "box_encodings": tf.constant(heads.box_encodings),
            "class_predictions_with_background": tf.constant(heads.class_logits),
            "anchors": predictions["anchors"],
        },
        tf.constant([[*_true_size(heads.fill, height, width), 3]], tf.int32),
    )
    return {name: value.numpy() for name, value in answer.items()}


def _true_size(fill: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    return max(1, int(fill[0] * height)), max(1, int(fill[1] * width))


def _compare_decoded(
    theirs: Mapping[str, np.ndarray], heads: Heads, spec: DetectorSpec, anchors: np.ndarray
) -> float:
    expected = theirs["raw_detection_boxes"]
    found = decode_boxes(heads.box_encodings, anchors, spec.heads.box_coder)
    errors = np.abs(found - expected) / np.maximum(1, np.abs(expected))
    worst = float(errors.max())
    if not worst <= LIMIT:
        row = int(np.argmax(np.nan_to_num(errors, nan=np.inf).max(axis=(0, 2))))
        raise _fail(f"the decoded boxes of anchor {row} differ by {worst:.2g} (box_coder, anchors.npy)")
    return worst


def _compare_scores(theirs: Mapping[str, np.ndarray], heads: Heads, spec: DetectorSpec) -> float:
    worst = float(
        np.abs(convert_scores(heads.class_logits, spec.heads.scores) - theirs["raw_detection_scores"]).max()
    )
    if not worst <= LIMIT:
        raise _fail(f"the scores of the same logits differ by {worst:.2g} (scores)")
    return worst


def _compare_detections(
    theirs: Mapping[str, np.ndarray], heads: Heads, spec: DetectorSpec, anchors: np.ndarray
) -> tuple[int, float, float]:
    height, width = spec.input.height, spec.input.width
    frame = Frame(height, width, *_true_size(heads.fill, height, width), height, width)
    window = np.array([frame.clip_window], np.float32)
    found = postprocess_reference(heads.box_encodings, heads.class_logits, anchors, spec, window)
    for name, ours, expected in (
        ("numbers of detections", found.num_detections, theirs["num_detections"].astype(np.int64)),
        ("shapes of the detections", found.boxes.shape, theirs["detection_boxes"].shape),
        ("classes", found.classes, theirs["detection_classes"].astype(np.int64)),
    ):
        if not np.array_equal(ours, expected):
            raise _fail(f"the {name} differ (nms, heads): {_first_difference(ours, expected)}")
    errors = []
    for name, ours, expected in (
        ("boxes", found.boxes, theirs["detection_boxes"]),
        ("scores", found.scores, theirs["detection_scores"]),
    ):
        error = float(np.abs(ours - expected).max())
        if not error <= LIMIT:
            raise _fail(f"the {name} of the detections differ by up to {error:.2g} (nms)")
        errors.append(error)
    return int(found.num_detections[0]), errors[0], errors[1]


def _first_difference(ours: Any, expected: Any) -> str:
    ours, expected = np.asarray(ours), np.asarray(expected)
    if ours.shape != expected.shape:
        return f"{list(ours.shape)}, expected {list(expected.shape)}"
    place = tuple(np.argwhere(ours != expected)[0])
    return f"{ours[place]}, expected {expected[place]}"


def _overlapping(spec: DetectorSpec) -> list[_Box]:
    """Two equal boxes of two classes, and pairs of boxes of one class with many IoUs, two of them close to
    the threshold."""
    classes, threshold = spec.heads.num_classes, spec.nms.iou_threshold
    wanted = [threshold + _MARGIN, threshold - _MARGIN, *np.linspace(0.05, 0.95, 19)]
    ious = [iou for iou in wanted[:2] if 0 < iou < 1]
    ious += [iou for iou in wanted[2:] if abs(iou - threshold) > _MARGIN]
    places = [(0, 0.0), (classes - 1, 0.0)] if classes > 1 else []
    for i, iou in enumerate(ious):
        places += [(i % classes, 0.0), (i % classes, (1 - iou) / (1 + iou))]
    boxes = []
    for i, (column, shift) in enumerate(places):
        cell = i // 2
        y, x = 0.16 * (cell // 6) + 0.02, 0.16 * (cell % 6) + 0.01
        boxes.append(((y, x + 0.07 * shift, y + 0.12, x + 0.07 * (1 + shift)), column))
    return _ranked(spec, boxes)


def _around_the_threshold(spec: DetectorSpec) -> list[_Box]:
    threshold = spec.nms.score_threshold
    scores = [threshold * (1 + _MARGIN), threshold * (1 - _MARGIN)]
    if threshold == 0:
        scores = [1e-6]
    scores += [score for score in np.linspace(0.03, 0.93, 7) if abs(score - threshold) > 0.01]
    if spec.heads.scores.converter != "identity":
        scores = [min(score, 1 - 1e-6) for score in scores if score > 0]
    return [
        _Box(corners, i % spec.heads.num_classes, score)
        for i, (corners, score) in enumerate(zip(_grid(len(scores), 0.0), scores, strict=True))
    ]


def _too_many_of_a_class(spec: DetectorSpec, most: int) -> list[_Box]:
    """So many boxes of one class outside of the image that, of six boxes inside, the cap leaves three. Boxes
    outside count for the cap before they are dropped."""
    nms = spec.nms
    places = nms.max_total_detections if nms.class_agnostic else nms.max_detections_per_class
    outside = max(0, min(places, most - 3) - 3)
    corners = [*_grid(outside, 2.0), *_grid(6, 0.0)]
    return _ranked(spec, [(each, spec.heads.num_classes - 1) for each in corners])


def _too_many(spec: DetectorSpec, most: int) -> list[_Box]:
    corners = _grid(min(spec.nms.max_total_detections + 5, most), 0.0)
    return _ranked(spec, [(each, i % spec.heads.num_classes) for i, each in enumerate(corners)])


def _across_the_edge(spec: DetectorSpec, fill: tuple[float, float]) -> list[_Box]:
    in_window = (
        (0.1, 0.1, 0.3, 0.3),
        (0.4, 0.8, 0.6, 1.3),
        (0.8, 0.1, 1.2, 0.3),
        (-0.2, 0.5, 0.2, 0.7),
        (0.5, -0.3, 0.7, 0.2),
        (1.1, 0.2, 1.3, 0.4),
        (0.2, 1.05, 0.4, 1.2),
    )
    corners = [(a * fill[0], b * fill[1], c * fill[0], d * fill[1]) for a, b, c, d in in_window]
    return _ranked(spec, [(each, i % spec.heads.num_classes) for i, each in enumerate(corners)])


def _grid(count: int, top: float) -> list[tuple[float, float, float, float]]:
    """``count`` boxes that do not touch, in a unit square whose upper edge is at ``top``."""
    side = 1 / max(1, math.isqrt(max(0, count - 1)) + 1)
    per_row = round(1 / side)
    places = ((top + (i // per_row) * side, (i % per_row) * side) for i in range(count))
    return [(y + 0.1 * side, x + 0.1 * side, y + 0.9 * side, x + 0.9 * side) for y, x in places]


def _ranked(spec: DetectorSpec, boxes: list[tuple[tuple[float, float, float, float], int]]) -> list[_Box]:
    """The boxes with scores above the threshold, which fall from box to box in equal steps."""
    low = max(0.0, spec.nms.score_threshold)
    top = low + 1 if spec.heads.scores.converter == "identity" else max(_TOP, (1 + low) / 2)
    steps = np.linspace(top, low + 0.05 * (top - low), max(2, len(boxes)))
    return [
        _Box(corners, column, score) for (corners, column), score in zip(boxes, steps.tolist(), strict=False)
    ]


def _encode(corners: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """The encodings of boxes, for a box coder with scales of 1; float64."""
    sizes = corners[:, 2:] - corners[:, :2]
    centres = (corners[:, 2:] + corners[:, :2]) / 2
    return np.concatenate(
        [(centres - anchors[:, :2]) / anchors[:, 2:], np.log(sizes / anchors[:, 2:])], axis=1
    )


def _quiet_logits(generator: np.random.Generator, spec: DetectorSpec, shape: tuple[int, int]) -> np.ndarray:
    """Random logits whose scores are below the threshold, float32; ``logit_scale`` is not applied yet."""
    threshold, converter = spec.nms.score_threshold, spec.heads.scores.converter
    if converter == "identity":
        return np.float32(threshold - 1) - generator.random(shape, np.float32)
    if converter == "sigmoid" and threshold > 1e-20:
        loudest = min(-20.0, math.log(threshold) - 5)
        return np.float32(loudest) - 40 * generator.random(shape, np.float32)
    logits = np.full(shape, _NEVER, np.float32)
    if converter == "softmax":
        logits[:, 0] = 0
    return logits


def _logits_of(spec: DetectorSpec, box: _Box) -> np.ndarray:
    """A row of logits that gives the box's class its score and the other classes nearly 0; ``logit_scale`` is
    not applied yet."""
    columns, background = spec.heads.num_columns, int(spec.heads.background_column)
    own = box.column + background
    if spec.heads.scores.converter == "identity":
        row = np.full(columns, spec.nms.score_threshold - 1.5)
        row[own] = box.score
        return row
    row = np.full(columns, _NEVER)
    score = min(max(box.score, 1e-30), 1 - 1e-7)
    if spec.heads.scores.converter == "sigmoid":
        row[own] = math.log(score) - math.log1p(-score)
        return row
    rest = 0 if background else (own + 1) % columns
    row[rest] = math.log1p(-score)
    row[own] = math.log(score)
    return row


def _leaves(path: str, part: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(part):
        name = f"{path}.{field.name}" if path else field.name
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(name, value)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from _leaves(f"{name}.{i}", item)
                else:
                    yield f"{name}.{i}", item
        else:
            yield name, value


def _with(part: Any, path: str, value: Any) -> Any:
    first, _, rest = path.partition(".")
    if isinstance(part, tuple):
        changed = _with(part[int(first)], rest, value) if rest else value
        return (*part[: int(first)], changed, *part[int(first) + 1 :])
    inner = _with(getattr(part, first), rest, value) if rest else value
    return dataclasses.replace(part, **{first: inner})


def _why_without_effect(field: str, spec: DetectorSpec) -> str:
    resizer, nms, heads = spec.input.resizer, spec.nms, spec.heads
    is_padded = resizer.kind == "keep_aspect_ratio" and resizer.pad_to_max_dimension
    if field == "name" or field.startswith("source."):
        return "says where the model comes from; no computation reads it"
    of_other_resizer = ("min_dimension", "max_dimension", "pad_to_max_dimension", "pad_value")
    if resizer.kind == "fixed_shape" and field.split(".")[2:3] and field.split(".")[2] in of_other_resizer:
        return "a fixed_shape resizer has no such setting"
    if field.startswith("input.resizer.pad_value") and not is_padded:
        return "nothing is padded"
    if field == "nms.max_detections_per_class" and nms.class_agnostic:
        return "class-agnostic suppression counts all classes together"
    if field == "nms.max_detections_per_class" and nms.max_detections_per_class > heads.num_anchors:
        return "there are fewer anchors"
    same_caps = min(nms.max_detections_per_class, heads.num_anchors) == nms.max_total_detections
    if field == "nms.class_agnostic" and heads.num_classes == 1 and same_caps:
        return "there is one class, and both caps are the same"
    return ""


def _other_values(field: str, value: Any) -> list[Any]:
    """Wrong values of a field, close to the right one if they are numbers."""
    parts = field.split(".")
    name = parts[-2] if parts[-1].isdigit() else parts[-1]
    if name == "kind":
        return ["keep_aspect_ratio" if value == "fixed_shape" else "fixed_shape"]
    if name == "method":
        return ["nearest"]
    if name == "converter":
        return [other for other in ("sigmoid", "softmax", "identity") if other != value]
    if name == "batch":
        return [1, 2] if value is None else [value + 1, None]
    if name == "min_dimension":
        return [value // 2]
    if name in ("offset", "pad_value"):
        return [value + 1.0]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [other for other in (value - 1, value + 1) if other >= 1]
    if isinstance(value, float):
        return [value * 0.99, value * 1.01] if value else [0.01]
    return [f"{value}_"]
