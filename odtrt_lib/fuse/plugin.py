"""The detector with one ``OdtrtDetect`` node behind the heads: ``detector.onnx``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict

import numpy as np

from odtrt_lib.errors import InputError
from odtrt_lib.fuse.graphs import add_clip_windows, export_detector, import_heads, output_variables
from odtrt_lib.native import MAX_DETECTIONS, SCORE_CONVERTERS
from odtrt_lib.spec import DetectorSpec
from odtrt_lib.tensors import DOMAIN, PLUGIN, PLUGIN_VERSION, has_clip_windows

if TYPE_CHECKING:
    import onnx


def plugin_attributes(spec: DetectorSpec) -> Dict[str, Any]:
    """The attributes of ``OdtrtDetect``: those fields of ``odtrt_postprocess_params`` that no shape tells.

    Raises InputError if ``spec`` asks for something that the plugin cannot do.
    """
    nms, coder, scores = spec.nms, spec.heads.box_coder, spec.heads.scores
    if scores.converter not in SCORE_CONVERTERS:
        raise InputError(
            f"score converter {scores.converter!r} is unknown; expected one of "
            f"{', '.join(SCORE_CONVERTERS)}: run `odtrt export` again"
        )
    if not 1 <= nms.max_total_detections <= MAX_DETECTIONS:
        raise InputError(
            f"max_total_detections is {nms.max_total_detections}, the plugin gives 1 to {MAX_DETECTIONS}; "
            "lower it in the pipeline.config and run `odtrt export` again"
        )
    return {
        "background_column": int(spec.heads.background_column),
        "score_converter": SCORE_CONVERTERS[scores.converter],
        "logit_factor": float(np.float32(1.0 / scores.logit_scale)),
        "box_scales": [coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale],
        "score_threshold": nms.score_threshold,
        "iou_threshold": nms.iou_threshold,
        "max_detections_per_class": nms.max_detections_per_class,
        "max_total_detections": nms.max_total_detections,
        "class_agnostic": int(nms.class_agnostic),
        "change_coordinate_frame": int(nms.change_coordinate_frame),
    }


def with_plugin(heads: onnx.ModelProto, spec: DetectorSpec, anchors: np.ndarray) -> onnx.ModelProto:
    """A new ONNX model: ``heads`` followed by one ``OdtrtDetect`` node.

    anchors: float32 [num_anchors, 4].
    """
    import onnx_graphsurgeon as gs

    attributes = plugin_attributes(spec)
    graph = import_heads(heads)
    inputs = [*graph.outputs, gs.Constant("anchors", np.ascontiguousarray(anchors, np.float32))]
    if has_clip_windows(spec):
        inputs.append(add_clip_windows(graph))
    outputs = output_variables(spec, graph.outputs[0].shape[0])
    graph.nodes.append(
        gs.Node(
            op=PLUGIN,
            name=PLUGIN,
            domain=DOMAIN,
            # The parsers before TensorRT 10.10 find a plugin by these two attributes, not by the domain.
            attrs={"plugin_version": PLUGIN_VERSION, "plugin_namespace": DOMAIN, **attributes},
            inputs=inputs,
            outputs=outputs,
        )
    )
    graph.outputs = outputs
    return export_detector(graph, heads)
