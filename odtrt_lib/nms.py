"""From raw heads to detections: the OD API's SSD post-processing, exactly.

:func:`postprocess` and :func:`nms` run in the native library if it was built (see :mod:`odtrt_lib.native`),
otherwise in numpy. The numpy functions are the reference: every other implementation (C++, CUDA, TensorRT
plugin) must equal it bit for bit. So each of them uses the same single float32 operations as
``plugins/kernels/semantics.h``, for the exponential too. They follow
``SSDMetaArch.postprocess`` and ``post_processing.batch_multiclass_non_max_suppression`` of the OD API
(dynamic path) step by step:

1. decode the boxes (``faster_rcnn_box_coder``) and convert logits to scores, background included;
2. drop the background column; a pair (anchor, class) is a candidate if ``score > score_threshold``;
3. greedy suppression within each class on *unclipped* boxes: from the best score down, a candidate stays
   unless its IoU with one that stayed is ``> iou_threshold``. Equal scores: lower class first, then
   lower anchor. At most ``max_detections_per_class`` stay, counted before the next step;
4. clip to the window, drop what has no area left, cut to ``max_total_detections``, change the frame.

TensorFlow's threads flush subnormal numbers to zero. So coordinates, sides, areas, overlaps and scores whose
magnitude is below 2^-126 are 0 here. An overlap that is NaN (from infinite areas or from NaN) suppresses.
There is one difference: if the score threshold is below 0, TensorFlow returns a box that a NaN overlap
suppressed once more, with a score of 0.

From the same scores and boxes, the detections are the OD API's. ``exp`` and the sigmoid can differ from
TensorFlow's in the last bit, as TensorFlow's own do between versions, processors and places in an array. If
many scores are that close to each other, as near 1, their order can differ, and with it the number within a
cap.

Class-agnostic suppression has one candidate for each anchor, its best class (the first of equals). All else
is the same.

TensorFlow suppresses each class completely and then merges the results. Here one pass goes through the
candidates of all classes in their final order, and stops when ``max_total_detections`` are found. So only the
head of that order is sorted. If the head is too short, the pass is repeated with a longer one; nothing is
truncated.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Callable, Optional, Tuple

import numpy as np

from odtrt_lib import native
from odtrt_lib.errors import InputError
from odtrt_lib.spec import BoxCoder, DetectorSpec, NmsSpec, ScoreSpec

_FIRST_HEAD = 2048
_HEAD_GROWTH = 4
_BLOCK = 8192  # elements; intermediate values of a block stay in the processor's cache

_ROUND_TO_WHOLE = np.float32(1.5 * 2**23)  # a sum with it has no fraction bits
_LOG2_E = np.float32(1.44269504)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXPONENTIAL = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
_SOFTMAX_UNITS = np.float32(2**40)
_SMALLEST_NORMAL = np.float32(2.0**-126)


@dataclasses.dataclass(frozen=True)
class Postprocessed:
    """The detections of a batch, best score first, padded with zeros to ``max_total_detections`` = M.

    num_detections: int32 [B]. boxes: float32 [B, M, 4], ``[ymin, xmin, ymax, xmax]``, normalised to the
    network input, or to the clip window with ``NmsSpec.change_coordinate_frame``. scores: float32 [B, M].
    classes: int32 [B, M], 0-based columns without the background. anchors: int32 [B, M], the row of the heads
    from which each detection comes.
    """

    num_detections: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    anchors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Selection:
    """The detections of one image, best score first: K rows without padding.

    boxes: float32 [K, 4] as in :class:`Postprocessed`. scores: float32 [K]. classes: int32 [K].
    anchors: int64 [K], the row of the heads from which each detection comes.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    anchors: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """The head of the final order. groups: only candidates of the same group can suppress each other.
    is_complete: the head contains all candidates."""

    anchors: np.ndarray
    classes: np.ndarray
    groups: np.ndarray
    scores: np.ndarray
    is_complete: bool


def postprocess(
    box_encodings: np.ndarray,
    class_logits: np.ndarray,
    anchors: np.ndarray,
    spec: DetectorSpec,
    clip_windows: np.ndarray,
) -> Postprocessed:
    """The detections of a batch of raw head outputs.

    box_encodings: float32 or float16 [B, N, 4]. class_logits: float32 or float16 [B, N, C], or [B, N, C + 1]
    with the background in column 0. anchors: float32 [N, 4], ``(ycenter, xcenter, height, width)``,
    normalised. clip_windows: float32 [B, 4], the part of each input that shows the image,
    ``[ymin, xmin, ymax, xmax]``, normalised. A score that is NaN is never a detection.

    Raises InputError if a shape does not agree with ``spec``, and what :func:`odtrt_lib.native.load`
    raises.
    """
    library = native.load()
    if library is None or len(box_encodings) == 0 or not native.can_postprocess(spec):
        return postprocess_reference(box_encodings, class_logits, anchors, spec, clip_windows)
    _check_shapes(box_encodings, class_logits, anchors, spec, clip_windows)
    return Postprocessed(
        *native.postprocess_cpu(library, box_encodings, class_logits, anchors, spec, clip_windows)
    )


def postprocess_reference(
    box_encodings: np.ndarray,
    class_logits: np.ndarray,
    anchors: np.ndarray,
    spec: DetectorSpec,
    clip_windows: np.ndarray,
) -> Postprocessed:
    """:func:`postprocess` in numpy, even if the native library was built."""
    _check_shapes(box_encodings, class_logits, anchors, spec, clip_windows)
    batch, most = len(box_encodings), spec.nms.max_total_detections
    result = Postprocessed(
        num_detections=np.zeros(batch, np.int32),
        boxes=np.zeros((batch, most, 4), np.float32),
        scores=np.zeros((batch, most), np.float32),
        classes=np.zeros((batch, most), np.int32),
        anchors=np.zeros((batch, most), np.int32),
    )
    boxes = decode_boxes(box_encodings, anchors, spec.heads.box_coder)
    for i in range(batch):
        scores = convert_scores(class_logits[i], spec.heads.scores)[:, int(spec.heads.background_column) :]
        found = multiclass_nms(boxes[i], scores, spec.nms, clip_windows[i])
        count = len(found.scores)
        result.num_detections[i] = count
        result.boxes[i, :count] = found.boxes
        result.scores[i, :count] = found.scores
        result.classes[i, :count] = found.classes
        result.anchors[i, :count] = found.anchors
    return result


def nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    iou_threshold: float,
    classes: Optional[np.ndarray] = None,
    score_threshold: float = -np.inf,
    max_kept: Optional[int] = None,
) -> np.ndarray:
    """Greedy non-maximum suppression: the indices of the boxes that are kept, int32 [K], best first.

    From the best score down (the lower index first if scores are equal), a box is kept unless its IoU with a
    kept box of its class is greater than ``iou_threshold``.

    boxes: float32 [n, 4], ``[ymin, xmin, ymax, xmax]`` in any unit; opposite corners in any order. scores:
    float32 [n]; boxes with a score that is NaN, or not greater than ``score_threshold``, are left out.
    classes: int32 [n]; None: all boxes are of one class. max_kept: how many boxes may be kept; None: all.

    Raises InputError if a shape is wrong, and what :func:`odtrt_lib.native.load` raises.
    """
    prepared = _nms_arguments(boxes, scores, classes, max_kept)
    library = native.load()
    if library is None or len(boxes) == 0:
        return _nms_in_numpy(*prepared, iou_threshold=iou_threshold, score_threshold=score_threshold)
    return native.nms_cpu(library, *prepared, iou_threshold=iou_threshold, score_threshold=score_threshold)


def nms_reference(
    boxes: np.ndarray,
    scores: np.ndarray,
    iou_threshold: float,
    classes: Optional[np.ndarray] = None,
    score_threshold: float = -np.inf,
    max_kept: Optional[int] = None,
) -> np.ndarray:
    """:func:`nms` in numpy, even if the native library was built."""
    prepared = _nms_arguments(boxes, scores, classes, max_kept)
    return _nms_in_numpy(*prepared, iou_threshold=iou_threshold, score_threshold=score_threshold)


def decode_boxes(box_encodings: np.ndarray, anchors: np.ndarray, coder: BoxCoder) -> np.ndarray:
    """Boxes float32 [..., N, 4], ``[ymin, xmin, ymax, xmax]``, from encodings [..., N, 4] and anchors [N, 4].

    OD API ``faster_rcnn_box_coder``: encodings are divided by the coder's scales; sizes are
    ``exp(t) * anchor size`` and centres ``t * anchor size + anchor centre``.
    """
    anchor_y, anchor_x, anchor_height, anchor_width = np.moveaxis(np.asarray(anchors, np.float32), -1, 0)
    encodings = np.moveaxis(np.asarray(box_encodings, np.float32), -1, 0)
    scales = (coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale)
    with np.errstate(over="ignore", invalid="ignore"):
        ty, tx, th, tw = (encoding / np.float32(scale) for encoding, scale in zip(encodings, scales))
        half_height = exponential(th) * anchor_height * np.float32(0.5)
        half_width = exponential(tw) * anchor_width * np.float32(0.5)
        y = ty * anchor_height + anchor_y
        x = tx * anchor_width + anchor_x
        return np.stack([y - half_height, x - half_width, y + half_height, x + half_width], axis=-1)


def convert_scores(class_logits: np.ndarray, scores: ScoreSpec) -> np.ndarray:
    """Scores float32 [..., columns] from logits of that shape; softmax runs over the last axis.

    Logits are multiplied by ``1 / logit_scale`` first, as the OD API does.
    """
    logits, factor = np.asarray(class_logits), np.float32(1.0 / scores.logit_scale)
    if scores.converter == "identity":
        return _flushed(logits.astype(np.float32) * factor)
    if scores.converter == "sigmoid":
        return _by_blocks(lambda block: _sigmoid(block.astype(np.float32) * factor), logits)
    if scores.converter == "softmax":
        rows = logits.reshape(-1, logits.shape[-1])
        return _by_blocks(lambda block: _softmax(block.astype(np.float32) * factor), rows).reshape(
            logits.shape
        )
    raise InputError(
        f"score converter {scores.converter!r} is unknown; expected sigmoid, softmax or identity: "
        "run `odtrt export` again"
    )


def exponential(x: np.ndarray) -> np.ndarray:
    """e to the power of each float32 of ``x``, an array of any shape; within 1 ulp if the result is normal.

    The same bits as in ``semantics.h``, which uses Cephes' ``expf`` (S. Moshier): ``x = n ln 2 + r`` with ln
    2 in two parts, a polynomial of degree 7 in r, times ``2^n`` in two steps. NaN stays NaN.
    """
    return _by_blocks(_exponential, np.asarray(x, np.float32))


def multiclass_nms(boxes: np.ndarray, scores: np.ndarray, nms: NmsSpec, clip_window: np.ndarray) -> Selection:
    """The detections of one image.

    boxes: float32 [N, 4], decoded, not clipped. scores: float32 [N, C], without the background.
    clip_window: float32 [4], ``[ymin, xmin, ymax, xmax]``.
    """
    window = np.asarray(clip_window, np.float32)
    num_groups = 1 if nms.class_agnostic else scores.shape[1]
    max_per_group = nms.max_total_detections if nms.class_agnostic else nms.max_detections_per_class
    head = _FIRST_HEAD
    while True:
        candidates = _strongest(scores, nms, at_least=head)
        own_boxes = boxes[candidates.anchors]
        clipped = _clip(own_boxes, window)
        is_visible = (_signed_area(clipped) > 0) & (candidates.scores >= 0)
        stayed = _suppress(own_boxes, candidates.groups, is_visible, nms, max_per_group)
        kept = stayed[is_visible[stayed]]
        groups_are_full = np.bincount(candidates.groups[stayed], minlength=num_groups) >= max_per_group
        if candidates.is_complete or len(kept) >= nms.max_total_detections or groups_are_full.all():
            break
        head *= _HEAD_GROWTH
    found = clipped[kept]
    return Selection(
        boxes=_in_frame_of(window, found) if nms.change_coordinate_frame else found,
        scores=candidates.scores[kept],
        classes=candidates.classes[kept].astype(np.int32),
        anchors=candidates.anchors[kept],
    )


def _check_shapes(
    box_encodings: np.ndarray,
    class_logits: np.ndarray,
    anchors: np.ndarray,
    spec: DetectorSpec,
    clip_windows: np.ndarray,
) -> None:
    batch, heads = len(box_encodings), spec.heads
    for name, array, expected in (
        ("box_encodings", box_encodings, (batch, heads.num_anchors, 4)),
        ("class_logits", class_logits, (batch, heads.num_anchors, heads.num_columns)),
        ("anchors", anchors, (heads.num_anchors, 4)),
        ("clip_windows", clip_windows, (batch, 4)),
    ):
        if array.shape != expected:
            raise InputError(
                f"{name}: shape {list(array.shape)}, expected {list(expected)} for {spec.name}; "
                "hand in the outputs of this detector's own network"
            )


def _by_blocks(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """float32 ``function(values)``, computed block by block: a few rows of [R, C], or of another shape a few
    elements, at a time."""
    rows = values if values.ndim == 2 else np.ascontiguousarray(values).reshape(-1)
    result = np.empty(rows.shape, np.float32)
    step = max(1, _BLOCK // max(1, rows[:1].size))
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for start in range(0, len(rows), step):
            result[start : start + step] = function(rows[start : start + step])
    return result.reshape(values.shape)


def _exponential(x: np.ndarray) -> np.ndarray:
    x = np.minimum(np.maximum(x, np.float32(-105)), np.float32(90))
    shifted = x * _LOG2_E
    shifted += _ROUND_TO_WHOLE
    n = shifted - _ROUND_TO_WHOLE
    whole = shifted.view(np.int32) - _ROUND_TO_WHOLE.view(np.int32)
    r = x - n * _LN_2_HIGH
    r -= n * _LN_2_LOW
    p = r * _EXPONENTIAL[0]
    for coefficient in _EXPONENTIAL[1:-1]:
        p += coefficient
        p *= r
    p += _EXPONENTIAL[-1]
    p *= r * r
    p += r
    p += np.float32(1)
    half = whole >> 1
    p *= _power_of_two(half)
    p *= _power_of_two(whole - half)
    return p


def _flushed(values: np.ndarray) -> np.ndarray:
    """The values, with 0 for those that are subnormal, as in TensorFlow's threads, and for -0."""
    return np.where(np.abs(values) < _SMALLEST_NORMAL, np.float32(0), values)


def _normal_or_zero(values: np.ndarray) -> np.ndarray:
    """The values, with 0 for those that are subnormal or negative. NaN stays NaN. Changes ``values``."""
    values[values < _SMALLEST_NORMAL] = 0
    return values


def _power_of_two(exponents: np.ndarray) -> np.ndarray:
    return ((exponents + np.int32(127)) << 23).view(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    values = _exponential(-x)
    values += np.float32(1)
    return _normal_or_zero(np.divide(np.float32(1), values, out=values))


def _softmax(rows: np.ndarray) -> np.ndarray:
    """Softmax of each row. The sum counts whole units of 2^-40, so that its order does not matter.

    A row whose maximum is not finite becomes NaN.
    """
    greatest = rows.max(axis=1, keepdims=True)
    values = _exponential(rows - np.where(np.isfinite(greatest), greatest, np.float32(np.nan)))
    units = (values * _SOFTMAX_UNITS).astype(np.uint64).sum(axis=1, keepdims=True)
    return _normal_or_zero(values / (units.astype(np.float32) * (np.float32(1) / _SOFTMAX_UNITS)))


def _nms_arguments(
    boxes: np.ndarray, scores: np.ndarray, classes: Optional[np.ndarray], max_kept: Optional[int]
) -> Tuple[np.ndarray, np.ndarray, Optional[np.ndarray], int]:
    count = len(boxes)
    for name, array, expected in (
        ("boxes", boxes, (count, 4)),
        ("scores", scores, (count,)),
        ("classes", classes, (count,)),
    ):
        if array is not None and array.shape != expected:
            raise InputError(f"{name}: shape {list(array.shape)}, expected {list(expected)}")
    if max_kept is not None and max_kept < 1:
        raise InputError(f"max_kept: {max_kept}, expected at least 1, or None for all")
    return (
        np.ascontiguousarray(boxes, np.float32),
        np.ascontiguousarray(scores, np.float32),
        None if classes is None else np.ascontiguousarray(classes, np.int32),
        count if max_kept is None else min(count, max_kept),
    )


def _nms_in_numpy(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: Optional[np.ndarray],
    max_kept: int,
    iou_threshold: float,
    score_threshold: float,
) -> np.ndarray:
    candidates = np.flatnonzero(scores > np.float32(score_threshold))
    order = candidates[np.argsort(-scores[candidates], kind="stable")]
    groups = np.zeros(len(order), np.int32) if classes is None else classes[order]
    settings = NmsSpec(score_threshold, iou_threshold, max_kept, max_kept, False, False)
    kept = _suppress(boxes[order], groups, np.ones(len(order), bool), settings, max_kept)
    return order[kept].astype(np.int32)


def _strongest(scores: np.ndarray, nms: NmsSpec, at_least: int) -> _Candidates:
    """The ``at_least`` best candidates or some more, in the final order; all, if there are fewer.

    If an anchor has NaN among its scores, its other scores still count; class-agnostic, the anchor is left
    out.
    """
    threshold = np.float32(nms.score_threshold)
    best = (np.maximum if nms.class_agnostic else np.fmax).reduce(scores, axis=1)
    rows = np.flatnonzero(best > threshold)
    rows_in_all = len(rows)
    if len(rows) > at_least:  # the best rows contain the best pairs
        rows = rows[best[rows] >= _nth_best(best[rows], at_least)]
    strong = best[np.newaxis, rows] if nms.class_agnostic else scores[rows].T
    is_candidate = strong > threshold
    passing = strong[is_candidate]
    if len(passing) > at_least:
        is_candidate &= strong >= _nth_best(passing, at_least)
    is_complete = rows_in_all <= at_least and len(passing) <= at_least
    groups, row_numbers = np.nonzero(is_candidate)
    anchors, own_scores = rows[row_numbers], strong[groups, row_numbers]
    order = np.argsort(-own_scores, kind="stable")
    anchors, groups = anchors[order], groups[order]
    classes = np.argmax(scores[anchors], axis=1) if nms.class_agnostic else groups
    return _Candidates(anchors, classes, groups, own_scores[order], is_complete)


def _nth_best(values: np.ndarray, n: int) -> np.float32:
    return np.partition(values, len(values) - n)[len(values) - n]


def _suppress(
    boxes: np.ndarray, groups: np.ndarray, is_visible: np.ndarray, nms: NmsSpec, max_per_group: int
) -> np.ndarray:
    """Greedy suppression within each group; returns the positions of the kept boxes, ascending.

    boxes [P, 4], groups [P] and is_visible [P] are in the final order. Ends as soon as
    ``max_total_detections`` visible boxes are kept.
    """
    corners, areas = _ordered_corners(boxes)
    threshold = np.float32(nms.iou_threshold)
    by_group = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[by_group])) + 1
    rivals = np.split(by_group, starts) if len(by_group) else []
    stayed = [0] * len(rivals)
    first_of_groups = [(int(members[0]), group) for group, members in enumerate(rivals)]
    heapq.heapify(first_of_groups)
    kept = []
    visible = 0
    while first_of_groups and visible < nms.max_total_detections:
        position, group = heapq.heappop(first_of_groups)
        kept.append(position)
        visible += int(is_visible[position])
        stayed[group] += 1
        if stayed[group] >= max_per_group:
            continue
        weaker = rivals[group][1:]
        overlaps = _iou(corners[position], areas[position], corners[weaker], areas[weaker])
        rivals[group] = weaker[overlaps <= threshold]
        if len(rivals[group]):
            heapq.heappush(first_of_groups, (int(rivals[group][0]), group))
    return np.array(kept, np.int64)


def _ordered_corners(boxes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    boxes = _flushed(boxes)
    one, other = boxes[:, :2], boxes[:, 2:]
    corners = np.concatenate([_smaller(one, other), _larger(one, other)], axis=1)
    return corners, _signed_area(corners)


def _iou(corner: np.ndarray, area: np.ndarray, corners: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """IoU of one box with each of many, in TensorFlow's order of float32 operations; 0 if an area is 0."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        top_left = _larger(corners[:, :2], corner[:2])
        bottom_right = _smaller(corners[:, 2:], corner[2:])
        sides = _normal_or_zero(bottom_right - top_left)
        intersection = _normal_or_zero(sides[:, 0] * sides[:, 1])
        overlaps = _normal_or_zero(intersection / (areas + area - intersection))
    overlaps[(areas <= 0) | (area <= 0)] = 0
    return overlaps


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C++'s ``std::min``, which TensorFlow's kernel uses: ``a`` if either is NaN."""
    return np.where(b < a, b, a)


def _larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C++'s ``std::max``: ``a`` if either is NaN."""
    return np.where(a < b, b, a)


def _clip(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    boxes, lower, upper = _flushed(boxes), np.tile(window[:2], 2), np.tile(window[2:], 2)
    below = np.where(boxes > upper, upper, boxes)
    return np.where(below < lower, lower, below)


def _signed_area(boxes: np.ndarray) -> np.ndarray:
    """Height times width of flushed corners. It is positive, too, if both are negative."""
    with np.errstate(over="ignore", invalid="ignore"):
        sides = _flushed(boxes[:, 2:] - boxes[:, :2])
        return _flushed(sides[:, 0] * sides[:, 1])


def _in_frame_of(window: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    sides = np.float32(1) / (window[2:] - window[:2])
    return _flushed(_flushed(boxes - np.tile(window[:2], 2)) * np.tile(sides, 2))
