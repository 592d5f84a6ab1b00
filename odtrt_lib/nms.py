"""From raw heads to detections: the OD API's SSD post-processing, exactly, in numpy.

This is the reference that every other implementation (CUDA, TensorRT plugin, C++) is measured against,
and the post-processing of :class:`odtrt_lib.detector.Detector` where no native one is there. It follows
``SSDMetaArch.postprocess`` and ``post_processing.batch_multiclass_non_max_suppression`` of the OD API
(dynamic path) step by step:

1. decode the boxes (``faster_rcnn_box_coder``) and convert logits to scores, background included;
2. drop the background column; a pair (anchor, class) is a candidate if ``score > score_threshold``;
3. greedy suppression within each class on *unclipped* boxes: from the best score down, a candidate stays
   unless its IoU with one that stayed is ``> iou_threshold``. Equal scores: lower class first, then
   lower anchor. At most ``max_detections_per_class`` stay, counted before the next step;
4. clip to the window, drop what has no area left, cut to ``max_total_detections``, change the frame.

Class-agnostic suppression is the same with one candidate an anchor, its best class (the first of equals).

TensorFlow runs one full suppression a class and merges. Here one pass walks the candidates of all classes
in their final order and stops when ``max_total_detections`` are found, so only the head of that order is
ever sorted; if the head was too short the pass is repeated on a longer one. Nothing is ever truncated.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Tuple

import numpy as np

from odtrt_lib.errors import InputError
from odtrt_lib.spec import BoxCoder, DetectorSpec, NmsSpec, ScoreSpec

_FIRST_HEAD = 2048
_HEAD_GROWTH = 4


@dataclasses.dataclass(frozen=True)
class Postprocessed:
    """The detections of a batch, best score first, padded with zeros to ``max_total_detections`` = M.

    num_detections: int32 [B]. boxes: float32 [B, M, 4], ``[ymin, xmin, ymax, xmax]``, normalised to the
    network input, or to the clip window with ``NmsSpec.change_coordinate_frame``. scores: float32 [B, M].
    classes: int32 [B, M], 0-based columns without the background.
    """

    num_detections: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Selection:
    """The detections of one image, best score first: K rows, nothing padded.

    boxes: float32 [K, 4] as in :class:`Postprocessed`. scores: float32 [K]. classes: int32 [K].
    anchors: int64 [K], the row of the heads that each detection comes from.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    anchors: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """The head of the final order. groups: who competes with whom. is_complete: nothing is left behind."""

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

    box_encodings: float32 [B, N, 4]. class_logits: float32 [B, N, C], or [B, N, C + 1] with the background
    in column 0. anchors: float32 [N, 4], ``(ycenter, xcenter, height, width)``, normalised.
    clip_windows: float32 [B, 4], the part of each input that shows the image, ``[ymin, xmin, ymax, xmax]``,
    normalised. A score that is NaN is never a detection.

    Raises InputError where a shape does not agree with ``spec``.
    """
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
    most = spec.nms.max_total_detections
    result = Postprocessed(
        num_detections=np.zeros(batch, np.int32),
        boxes=np.zeros((batch, most, 4), np.float32),
        scores=np.zeros((batch, most), np.float32),
        classes=np.zeros((batch, most), np.int32),
    )
    boxes = decode_boxes(box_encodings, anchors, spec.box_coder)
    for i in range(batch):
        scores = convert_scores(class_logits[i], spec.scores)[:, int(heads.background_column) :]
        found = multiclass_nms(boxes[i], scores, spec.nms, clip_windows[i])
        count = len(found.scores)
        result.num_detections[i] = count
        result.boxes[i, :count] = found.boxes
        result.scores[i, :count] = found.scores
        result.classes[i, :count] = found.classes
    return result


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
        half_height = np.exp(th) * anchor_height / np.float32(2)
        half_width = np.exp(tw) * anchor_width / np.float32(2)
        y = ty * anchor_height + anchor_y
        x = tx * anchor_width + anchor_x
        return np.stack([y - half_height, x - half_width, y + half_height, x + half_width], axis=-1)


def convert_scores(class_logits: np.ndarray, scores: ScoreSpec) -> np.ndarray:
    """Scores float32 [..., columns] from logits of that shape; softmax runs over the last axis.

    Logits are multiplied by ``1 / logit_scale`` first, as the OD API does.
    """
    values = np.asarray(class_logits, np.float32) * np.float32(1.0 / scores.logit_scale)
    if scores.converter == "identity":
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        if scores.converter == "sigmoid":
            np.negative(values, out=values)
            np.exp(values, out=values)
            values += np.float32(1)
            return np.divide(np.float32(1), values, out=values)
        if scores.converter == "softmax":
            values -= values.max(axis=-1, keepdims=True)
            np.exp(values, out=values)
            values /= values.sum(axis=-1, keepdims=True)
            return values
    raise InputError(
        f"score converter {scores.converter!r} is unknown; expected sigmoid, softmax or identity: "
        "run `odtrt export` again"
    )


def multiclass_nms(boxes: np.ndarray, scores: np.ndarray, nms: NmsSpec, clip_window: np.ndarray) -> Selection:
    """The detections of one image.

    boxes: float32 [N, 4], decoded, not clipped. scores: float32 [N, C], without the background.
    clip_window: float32 [4], ``[ymin, xmin, ymax, xmax]``.
    """
    window = np.asarray(clip_window, np.float32)
    num_groups = 1 if nms.class_agnostic else scores.shape[1]
    most_of_a_group = nms.max_total_detections if nms.class_agnostic else nms.max_detections_per_class
    head = _FIRST_HEAD
    while True:
        candidates = _strongest(scores, nms, at_least=head)
        own_boxes = boxes[candidates.anchors]
        clipped = _clip(own_boxes, window)
        is_visible = (_signed_area(clipped) > 0) & (candidates.scores >= 0)
        stayed = _suppress(own_boxes, candidates.groups, is_visible, nms, most_of_a_group)
        kept = stayed[is_visible[stayed]]
        groups_are_full = np.bincount(candidates.groups[stayed], minlength=num_groups) >= most_of_a_group
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


def _strongest(scores: np.ndarray, nms: NmsSpec, at_least: int) -> _Candidates:
    """At least so many candidates from the head of the final order, or all that there are.

    With NaN among the scores of an anchor, the others still count, but class-agnostic the anchor does not.
    """
    threshold = np.float32(nms.score_threshold)
    best = (np.maximum if nms.class_agnostic else np.fmax).reduce(scores, axis=1)
    rows = np.flatnonzero(best > threshold)
    rows_in_all = len(rows)
    if len(rows) > at_least:  # then the best of their pairs are in the best rows
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
    boxes: np.ndarray, groups: np.ndarray, is_visible: np.ndarray, nms: NmsSpec, most_of_a_group: int
) -> np.ndarray:
    """Greedy suppression within each group; the positions that stay, ascending.

    boxes [P, 4], groups [P] and is_visible [P] are in the final order. Ends early once
    ``max_total_detections`` visible boxes stay.
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
        if stayed[group] >= most_of_a_group:
            continue
        weaker = rivals[group][1:]
        overlaps = _iou(corners[position], areas[position], corners[weaker], areas[weaker])
        rivals[group] = weaker[overlaps <= threshold]
        if len(rivals[group]):
            heapq.heappush(first_of_groups, (int(rivals[group][0]), group))
    return np.array(kept, np.int64)


def _ordered_corners(boxes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    one, other = boxes[:, :2], boxes[:, 2:]
    corners = np.concatenate([_smaller(one, other), _larger(one, other)], axis=1)
    return corners, _signed_area(corners)


def _iou(corner: np.ndarray, area: np.ndarray, corners: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """IoU of one box with many, in TensorFlow's order of float32 operations; 0 where an area is 0."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        top_left = _larger(corners[:, :2], corner[:2])
        bottom_right = _smaller(corners[:, 2:], corner[2:])
        sides = _larger(bottom_right - top_left, np.zeros(2, np.float32))
        intersection = sides[:, 0] * sides[:, 1]
        overlaps = intersection / (areas + area - intersection)
    overlaps[(areas <= 0) | (area <= 0)] = 0
    return overlaps


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C++'s ``std::min``, which TensorFlow's kernel uses: ``a`` where either is NaN."""
    return np.where(b < a, b, a)


def _larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C++'s ``std::max``: ``a`` where either is NaN."""
    return np.where(a < b, b, a)


def _clip(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    lower, upper = np.tile(window[:2], 2), np.tile(window[2:], 2)
    return np.maximum(np.minimum(boxes, upper), lower)


def _signed_area(boxes: np.ndarray) -> np.ndarray:
    """Height times width; positive too where a box is upside down in both directions, as in the OD API."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _in_frame_of(window: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    sides = np.float32(1) / (window[2:] - window[:2])
    return (boxes - np.tile(window[:2], 2)) * np.tile(sides, 2)
