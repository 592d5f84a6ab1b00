"""The detector in ONNX's own operators around NonMaxSuppression: ``detector_onnxnms.onnx``.

Limits:

* From equal scores and boxes, ONNX Runtime selects what the OD API selects, ties included. But exp, sigmoid
  and softmax are ONNX Runtime's own, and differ from odtrt's by a few units in the last place. So two scores
  that are as close can change their order, and a box whose IoU is as close to the threshold can be kept or
  dropped.
* TensorRT's NonMaxSuppression (``INMSLayer``) is another algorithm. It considers at most 5000 pairs of box
  and class of an image, and does not define the order of equal scores. TensorRT-RTX 1.7.1 cannot build it.
* It writes a second array of all scores: 4 * num_anchors * num_classes bytes an image.
* A score that is NaN is never a detection. But class-agnostic, if an anchor has NaN among its scores, the
  runtime decides which class is its best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, Optional, Tuple

import numpy as np

from odtrt_lib.fuse.graphs import (
    add,
    add_clip_windows,
    add_many,
    append,
    export_detector,
    import_heads,
    output_variables,
)
from odtrt_lib.spec import DetectorSpec
from odtrt_lib.tensors import has_clip_windows

if TYPE_CHECKING:
    import onnx
    from onnx_graphsurgeon import Graph, Variable

_NOT_SELECTED = float(np.finfo(np.float32).min)


def with_onnx_nms(heads: onnx.ModelProto, spec: DetectorSpec, anchors: np.ndarray) -> onnx.ModelProto:
    """A new ONNX model: ``heads``, float32, followed by the post-processing in ONNX operators.

    anchors: float32 [num_anchors, 4]. The scores that NonMaxSuppression selects are scattered into an array
    over classes and anchors, in this order. TopK then takes the best; of equal scores it takes the lower
    index. This is the OD API's order.
    """
    graph = import_heads(heads)
    encodings, logits = graph.outputs
    nms, num_anchors, most = spec.nms, spec.heads.num_anchors, spec.nms.max_total_detections
    windows = add_clip_windows(graph) if has_clip_windows(spec) else None
    boxes = _decode(graph, encodings, spec, anchors)
    clipped = _clip(graph, boxes, windows)
    scores = _scores_by_class(graph, logits, spec)  # [B, C, N]
    rivals = add(graph, "ReduceMax", [scores], axes=[1], keepdims=1) if nms.class_agnostic else scores
    num_rows = 1 if nms.class_agnostic else spec.heads.num_classes

    selected = _selected(graph, boxes, rivals, spec)
    nothing = add(graph, "Expand", [_constant(_NOT_SELECTED), add(graph, "Shape", [rivals], np.int64)])
    left = add(graph, "ScatterND", [nothing, selected, add(graph, "GatherND", [rivals, selected])])
    left = add(graph, "Where", [_has_area(graph, clipped), left, _constant(_NOT_SELECTED)])
    flat = add(graph, "Reshape", [left, np.array([-1, num_rows * num_anchors], np.int64)])

    count = min(most, num_rows * num_anchors)
    best, places = add_many(
        graph, "TopK", [flat, np.array([count], np.int64)], (np.float32, np.int64), axis=1
    )
    is_real = add(graph, "Greater", [best, _constant(_NOT_SELECTED)], np.bool_)
    own_anchors = add(graph, "Mod", [places, np.array(num_anchors, np.int64)], np.int64)
    where = add(graph, "Unsqueeze", [own_anchors, np.array([2], np.int64)], np.int64)
    own_boxes = add(graph, "GatherND", [_in_frame(graph, clipped, windows, spec), where], batch_dims=1)
    if nms.class_agnostic:
        of_all = add(graph, "ArgMax", [scores], np.int64, axis=1, keepdims=0)  # [B, N]
        own_classes = add(graph, "GatherND", [of_all, where], np.int64, batch_dims=1)
    else:
        own_classes = add(graph, "Div", [places, np.array(num_anchors, np.int64)], np.int64)
    one_box = add(graph, "Unsqueeze", [is_real, np.array([2], np.int64)], np.bool_)
    found = {
        "boxes": add(graph, "Where", [one_box, own_boxes, _constant(0.0)]),
        "scores": add(graph, "Where", [is_real, best, _constant(0.0)]),
        "classes": add(graph, "Where", [is_real, own_classes, np.array(0, np.int64)], np.int64),
    }
    if count < most:
        found = _padded(graph, found, most - count)
    ones = add(graph, "Cast", [is_real], np.int32, to=6)
    graph.outputs = output_variables(spec, encodings.shape[0])
    for output in graph.outputs:
        if output.name == "num_detections":
            append(graph, "ReduceSum", [ones, np.array([1], np.int64)], [output], keepdims=0)
        elif output.dtype == np.int32:
            append(graph, "Cast", [found[output.name]], [output], to=6)
        else:
            append(graph, "Identity", [found[output.name]], [output])
    return export_detector(graph, heads)


def _selected(graph: Graph, boxes: Variable, scores: Variable, spec: DetectorSpec) -> Variable:
    """NonMaxSuppression's selection, int64 [selected, 3]: image, row of ``scores``, anchor."""
    nms = spec.nms
    most = nms.max_total_detections if nms.class_agnostic else nms.max_detections_per_class
    return add(
        graph,
        "NonMaxSuppression",
        [
            boxes,
            scores,
            np.array([most], np.int64),
            np.array([nms.iou_threshold], np.float32),
            np.array([nms.score_threshold], np.float32),
        ],
        dtype=np.int64,
    )


def _padded(graph: Graph, found: Dict[str, Variable], more: int) -> Dict[str, Variable]:
    """The tensors ``boxes``, ``scores`` and ``classes`` with ``more`` rows of zeros at the end."""
    padded = {}
    for name, tensor in found.items():
        zero = np.array(0, np.int64 if name == "classes" else np.float32)
        rank = 3 if name == "boxes" else 2
        padding = np.zeros((2, rank), np.int64)
        padding[1, 1] = more
        padded[name] = add(graph, "Pad", [tensor, padding.ravel(), zero], zero.dtype)
    return padded


def _decode(graph: Graph, encodings: Variable, spec: DetectorSpec, anchors: np.ndarray) -> Variable:
    """``odtrt_lib.nms.decode_boxes`` in ONNX: float32 [B, N, 4]."""
    coder = spec.heads.box_coder
    centre, size = anchors[:, :2].astype(np.float32), anchors[:, 2:].astype(np.float32)
    halves = [
        add(
            graph,
            "Slice",
            [encodings, *(np.array([number], np.int64) for number in (start, start + 2, 2))],
        )
        for start in (0, 2)
    ]
    shift = add(graph, "Div", [halves[0], np.array([coder.y_scale, coder.x_scale], np.float32)])
    growth = add(graph, "Div", [halves[1], np.array([coder.height_scale, coder.width_scale], np.float32)])
    half = add(
        graph,
        "Mul",
        [add(graph, "Mul", [add(graph, "Exp", [growth]), size]), np.array(0.5, np.float32)],
    )
    middle = add(graph, "Add", [add(graph, "Mul", [shift, size]), centre])
    corners = [add(graph, operation, [middle, half]) for operation in ("Sub", "Add")]
    return add(graph, "Concat", corners, axis=2)


def _scores_by_class(graph: Graph, logits: Variable, spec: DetectorSpec) -> Variable:
    """``odtrt_lib.nms.convert_scores`` without the background, as float32 [B, C, N]."""
    scores = logits
    if spec.heads.scores.logit_scale != 1:
        scores = add(graph, "Mul", [scores, np.array(1.0 / spec.heads.scores.logit_scale, np.float32)])
    if spec.heads.scores.converter == "sigmoid":
        scores = add(graph, "Sigmoid", [scores])
    elif spec.heads.scores.converter == "softmax":
        scores = add(graph, "Softmax", [scores], axis=2)
    if spec.heads.background_column:
        limits = (1, spec.heads.num_columns, 2)
        scores = add(graph, "Slice", [scores, *(np.array([number], np.int64) for number in limits)])
    return add(graph, "Transpose", [scores], perm=[0, 2, 1])


def _clip(graph: Graph, boxes: Variable, windows: Optional[Variable]) -> Variable:
    if windows is None:
        return add(graph, "Clip", [boxes, _constant(0.0), _constant(1.0)])
    lower, upper = _corners_of(graph, windows)
    return add(graph, "Max", [add(graph, "Min", [boxes, upper]), lower])


def _has_area(graph: Graph, boxes: Variable) -> Variable:
    """Whether each box has an area: bool [B, 1, N]."""
    lower, upper = (
        add(graph, "Slice", [boxes, *(np.array([number], np.int64) for number in (start, start + 2, 2))])
        for start in (0, 2)
    )
    area = add(graph, "ReduceProd", [add(graph, "Sub", [upper, lower])], axes=[2], keepdims=0)
    is_visible = add(graph, "Greater", [area, _constant(0.0)], np.bool_)
    return add(graph, "Unsqueeze", [is_visible, np.array([1], np.int64)], np.bool_)


def _in_frame(graph: Graph, boxes: Variable, windows: Optional[Variable], spec: DetectorSpec) -> Variable:
    if windows is None or not spec.nms.change_coordinate_frame:
        return boxes
    lower, upper = _corners_of(graph, windows)
    factor = add(graph, "Div", [_constant(1.0), add(graph, "Sub", [upper, lower])])
    return add(graph, "Mul", [add(graph, "Sub", [boxes, lower]), factor])


def _corners_of(graph: Graph, windows: Variable) -> Tuple[Variable, Variable]:
    """The windows' first corners, and their second corners, each corner twice: float32 [B, 1, 4]."""
    first, second = (
        add(graph, "Gather", [windows, np.array([columns], np.int64)], axis=1)
        for columns in ([0, 1, 0, 1], [2, 3, 2, 3])
    )
    return first, second


def _constant(value: float) -> np.ndarray:
    return np.array(value, np.float32)
