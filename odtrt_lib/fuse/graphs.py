"""What both forms of post-processing need to extend an ONNX graph (onnx-graphsurgeon)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List, Tuple, Union

import numpy as np

from odtrt_lib.spec import DetectorSpec
from odtrt_lib.tensors import CLIP_WINDOWS, DETECTIONS, detector_tensors

if TYPE_CHECKING:
    import onnx
    from onnx_graphsurgeon import Graph, Variable


def add(graph: Graph, operation: str, inputs: List[Any], dtype: Any = np.float32, **attributes: Any) -> Any:
    return add_many(graph, operation, inputs, (dtype,), **attributes)[0]


def add_many(
    graph: Graph, operation: str, inputs: List[Any], dtypes: Tuple[Any, ...], **attributes: Any
) -> List[Any]:
    import onnx_graphsurgeon as gs

    name = f"postprocess/{operation}_{len(graph.nodes)}"
    outputs = [gs.Variable(f"{name}:{i}", dtype=dtype) for i, dtype in enumerate(dtypes)]
    append(graph, operation, inputs, outputs, **attributes)
    return outputs


def append(graph: Graph, operation: str, inputs: List[Any], outputs: List[Any], **attributes: Any) -> None:
    import onnx_graphsurgeon as gs

    name = f"postprocess/{operation}_{len(graph.nodes)}"
    tensors = [
        gs.Constant(f"{name}/constant_{i}", value) if isinstance(value, np.ndarray) else value
        for i, value in enumerate(inputs)
    ]
    graph.nodes.append(gs.Node(op=operation, name=name, attrs=attributes, inputs=tensors, outputs=outputs))


def add_clip_windows(graph: Graph) -> Variable:
    import onnx_graphsurgeon as gs

    windows = gs.Variable(CLIP_WINDOWS, dtype=np.float32, shape=(graph.inputs[0].shape[0], 4))
    graph.inputs.append(windows)
    return windows


def output_variables(spec: DetectorSpec, batch: Union[int, str]) -> List[Any]:
    """The detector's outputs. batch: its size, or the name of a dynamic batch."""
    import onnx_graphsurgeon as gs

    return [
        gs.Variable(tensor.name, dtype=np.dtype(tensor.dtype), shape=(batch, *tensor.shape[1:]))
        for tensor in detector_tensors(spec).outputs
    ]


def import_heads(heads: onnx.ModelProto) -> Graph:
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(heads)
    graph.import_domains = None  # otherwise the plugin's domain would be written into `heads`
    for name in {"anchors", CLIP_WINDOWS, *DETECTIONS} & set(graph.tensors()):
        graph.tensors()[name].name = f"heads/{name}"
    return graph


def export_detector(graph: Graph, heads: onnx.ModelProto) -> onnx.ModelProto:
    """The ONNX model of ``graph``, with the IR version and producer of ``heads``. Drops unused nodes."""
    import onnx_graphsurgeon as gs

    graph.name = "detector"
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    fused = gs.export_onnx(graph, do_type_check=False, ir_version=heads.ir_version)
    fused.producer_name, fused.producer_version = heads.producer_name, heads.producer_version
    del fused.graph.value_info[:]
    return fused
