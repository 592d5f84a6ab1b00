"""Where a network is quantised: QuantizeLinear and DequantizeLinear, in pairs, where TensorRT fuses them.

A pair on the data input and one on the kernel make a Conv INT8: TensorRT moves the pairs into the kernel that
follows, together with the bias and a ReLU6 behind it. So there is

* a pair on the data input of each chosen Conv; consumers of one tensor share it. The pair behind a Clip or a
  swish is the one in front of the next Conv, so nothing is between a Conv and its activation;
* a pair on its kernel, with a scale for each output channel (axis 0, also where the Conv is depthwise);
* where an Add has a Conv on one side only, a pair on the other side, and none on the Conv's: a pair there
  would part the Conv from the Add, which TensorRT computes in one kernel otherwise.

None is on a bias, at Concat, Reshape, Transpose, Sigmoid or the network's outputs. Everything without a pair
stays in floating point. Zero points are 0, all scales are positive float32, and every node has three inputs:
TensorRT 8.5's parser refuses the rest (onnx-tensorrt, release 8.5-GA, QuantDequantLinearHelper).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Dict, FrozenSet, Iterable, List, Mapping, Sequence, Tuple

import numpy as np

from odtrt_lib.errors import InputError

if TYPE_CHECKING:
    import onnx

LEVELS = 127
"""Symmetric INT8 uses -127 to 127: value = code * amax / 127."""
QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_SMALLEST_SCALE = 1e-8  # of a kernel's dead channel; TensorRT refuses a scale of 0


@dataclasses.dataclass(frozen=True)
class Edge:
    """Input ``index`` of the node called ``node``, which reads ``tensor``."""

    node: str
    index: int
    tensor: str


@dataclasses.dataclass(frozen=True)
class Placement:
    """convs: names of the Convs that become INT8. edges: the inputs that get a pair, kernels excluded."""

    convs: Tuple[str, ...]
    edges: Tuple[Edge, ...]

    @property
    def tensors(self) -> Tuple[str, ...]:
        """The activations that need a range, in the order of the network."""
        return tuple(dict.fromkeys(edge.tensor for edge in self.edges))


def placement(model: onnx.ModelProto, in_float: Iterable[str] = ()) -> Placement:
    """The pairs for every Conv of ``model`` but those named in ``in_float``.

    Raises InputError for a name in ``in_float`` that is no Conv, and for a model that has pairs already.
    """
    nodes = model.graph.node
    found = sorted({node.op_type for node in nodes} & set(QUANTISERS))
    if found:
        raise InputError(f"heads.onnx: already quantised, it has {found[0]} nodes; expected float32 heads")
    kernels = {one.name for one in model.graph.initializer}
    every = [node.name for node in nodes if node.op_type == "Conv" and node.input[1] in kernels]
    unknown = sorted(set(in_float) - set(every))
    if unknown:
        raise InputError(f"{unknown[0]!r} is not a convolution of heads.onnx")
    chosen = set(every) - set(in_float)
    edges = [Edge(node.name, 0, node.input[0]) for node in nodes if node.name in chosen]
    producer = {output: node for node in nodes for output in node.output}
    readers: Dict[str, int] = {}
    for node in nodes:
        for tensor in node.input:
            readers[tensor] = readers.get(tensor, 0) + 1
    for node in nodes:
        if node.op_type != "Add" or any(tensor in kernels for tensor in node.input):
            continue
        fused = [
            index
            for index, tensor in enumerate(node.input)
            if tensor in producer and producer[tensor].name in chosen and readers[tensor] == 1
        ]
        if fused:
            edges += [Edge(node.name, i, tensor) for i, tensor in enumerate(node.input) if i != fused[0]]
    return Placement(tuple(name for name in every if name in chosen), tuple(edges))


def in_float(model: onnx.ModelProto, quantised_model: onnx.ModelProto) -> List[str]:
    """The Convs of ``model`` that have no pair on their kernel in ``quantised_model``, made from it."""
    rounded = {node.output[0] for node in quantised_model.graph.node if node.op_type == QUANTISERS[1]}
    int8 = {
        node.name
        for node in quantised_model.graph.node
        if node.op_type == "Conv" and node.input[1] in rounded
    }
    return [name for name in placement(model).convs if name not in int8]


def quantised(
    model: onnx.ModelProto, where: Placement, ranges: Mapping[str, float], per_channel: bool = True
) -> onnx.ModelProto:
    """A copy of ``model`` with the pairs of ``where``.

    ranges: tensor -> amax, the absolute value that becomes code 127. per_channel: a scale for each output
    channel of a kernel; False: one for the whole kernel.

    Raises InputError if a range is missing, not finite or not positive.
    """
    import onnx

    for tensor in where.tensors:
        amax = ranges.get(tensor)
        if amax is None or not np.isfinite(amax) or amax <= 0:
            raise InputError(f"tensor {tensor!r}: range {amax}, expected a positive number; calibrate again")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    by_name = {node.name: node for node in result.graph.node}
    weights = {one.name: one for one in result.graph.initializer}
    before: Dict[str, List[onnx.NodeProto]] = {}
    constants: Dict[str, np.ndarray] = {}
    ready: Dict[str, str] = {}

    def pair(tensor: str, scale: np.ndarray, node: str, axis: Sequence[int] = ()) -> str:
        if tensor not in ready:
            parameters = [f"{tensor}/quantized/scale", f"{tensor}/quantized/zero_point"]
            constants[parameters[0]] = scale.astype(np.float32)
            constants[parameters[1]] = np.zeros(scale.shape, np.int8)
            attributes: Dict[str, Any] = {"axis": axis[0]} if axis else {}
            before.setdefault(node, []).extend(
                onnx.helper.make_node(kind, [source, *parameters], [target], name=target, **attributes)
                for kind, source, target in (
                    ("QuantizeLinear", tensor, f"{tensor}/quantized"),
                    ("DequantizeLinear", f"{tensor}/quantized", f"{tensor}/dequantized"),
                )
            )
            ready[tensor] = f"{tensor}/dequantized"
        return ready[tensor]

    first = _first_readers(result, where)
    for edge in where.edges:
        scale = np.asarray(ranges[edge.tensor] / LEVELS, np.float32)
        by_name[edge.node].input[edge.index] = pair(edge.tensor, scale, first[edge.tensor])
    for name in where.convs:
        kernel = by_name[name].input[1]
        values = onnx.numpy_helper.to_array(weights[kernel])
        scale = kernel_scales(values) if per_channel else kernel_scales(values.reshape(1, -1)).reshape(())
        by_name[name].input[1] = pair(kernel, scale, first[kernel], (0,) if per_channel else ())
    nodes = [one for node in result.graph.node for one in (*before.get(node.name, ()), node)]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    return result


def kernel_scales(kernel: np.ndarray) -> np.ndarray:
    """float32 ``[outputs]``: each output channel's largest absolute weight / 127.

    kernel: ``[outputs, ...]``. A channel of zeros gets a small scale, because TensorRT refuses one of 0.
    """
    largest = np.abs(kernel.reshape(len(kernel), -1)).max(axis=1)
    return np.maximum(largest / LEVELS, _SMALLEST_SCALE).astype(np.float32)


def _first_readers(model: onnx.ModelProto, where: Placement) -> Dict[str, str]:
    """Tensor -> the first node of the network that reads its pair, in front of which the pair stands."""
    chosen: Dict[str, FrozenSet[str]] = {}
    for edge in where.edges:
        chosen[edge.tensor] = chosen.get(edge.tensor, frozenset()) | {edge.node}
    convs = set(where.convs)
    found: Dict[str, str] = {}
    for node in model.graph.node:
        for tensor in node.input:
            if node.name in chosen.get(tensor, ()) or (node.name in convs and tensor == node.input[1]):
                found.setdefault(tensor, node.name)
    return found
