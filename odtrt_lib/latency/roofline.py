"""The least time that a network can take on a GPU: the roofline (Williams et al., 2009, CACM 52(4)).

Everything here is a bound, from below: no measurement and no estimate. A real plan takes longer, and a small
network many times as long. But what lies below a bound is impossible.

A network is divided into groups: a convolution, a matrix product or a pooling, and all that follows it
element by element. Data that is only moved (reshape, transpose, concatenate, slice, nearest resize) costs
nothing. So a group is a kernel of an ideal compiler. It does its operations at the GPU's dense peak. It reads
its weights once, from memory. It reads and writes activations once, and those that fit into the L2 cache
never leave it; nor does any if the cache's size is not known.

:attr:`Bound.us` adds up the groups, each as long as the slower of arithmetic and memory: kernels run one
after the other. :attr:`Bound.floor_us` does not even assume that: it is the slower of all the network's
operations and all its weights, inputs and outputs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from odtrt_lib import onnx_model
from odtrt_lib.boards import Gpu
from odtrt_lib.errors import CheckError, InputError, one_line

if TYPE_CHECKING:
    import onnx

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes of a weight and of an activation, by precision."""

WINOGRAD = 4
"""A dense 3x3 convolution with stride 1 needs so many times fewer multiplications by F(4x4, 3x3) (Lavin and
Gray, 2015, arXiv:1509.09308). A bound must allow for it, though half precision seldom uses it."""

_MOVES = frozenset(
    [
        "Cast",
        "Concat",
        "DequantizeLinear",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "QuantizeLinear",
        "Reshape",
        "Resize",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Upsample",
    ]
)
_POOLS = ("MaxPool", "AveragePool")
_STARTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", *_POOLS)


@dataclasses.dataclass(frozen=True)
class Group:
    """What one ideal kernel does.

    kind: of its first node, for tables. macs: multiplications with an addition in convolutions and matrix
    products, those on padding too. operations: additions, multiplications, comparisons and functions, those
    on padding too, as all counts of FLOPs have them. fewest_operations: without padding, and by the cheapest
    algorithm that is known. weights, reads, writes: numbers of values; reads and writes are the sizes of the
    tensors that come from and go to other groups. inputs, outputs: those of the network itself.
    """

    name: str
    kind: str
    macs: int
    operations: int
    fewest_operations: float
    weights: int
    reads: Tuple[int, ...] = ()
    writes: Tuple[int, ...] = ()
    inputs: int = 0
    outputs: int = 0

    def bytes(self, precision: str, l2_kib: Optional[int]) -> float:
        """The fewest bytes that this kernel gets from memory and puts there."""
        size = BYTES[precision]
        spilled = sum(
            values
            for values in (*self.reads, *self.writes)
            if l2_kib is not None and values * size > 1024 * l2_kib
        )
        return float(size * (self.weights + self.inputs + self.outputs + spilled))

    def ideal_bytes(self, precision: str) -> int:
        """The bytes of all that it reads and writes, once each, as if there were no cache."""
        values = self.weights + sum(self.reads) + sum(self.writes) + self.inputs + self.outputs
        return BYTES[precision] * values


@dataclasses.dataclass(frozen=True)
class Bound:
    """Microseconds that no plan can undercut.

    us: with kernels one after the other. floor_us: without that assumption. compute_us: of the operations
    alone. memory_us: of weights, inputs and outputs alone. memory_bound: the share of ``us`` in which memory
    is the slower part, 0 to 1.
    """

    us: float
    floor_us: float
    compute_us: float
    memory_us: float
    memory_bound: float

    @property
    def max_fps(self) -> float:
        return 1e6 / self.us


def bound(groups: Sequence[Group], gpu: Gpu, precision: str) -> Optional[Bound]:
    """The bound for a network on a GPU; None if the GPU has no arithmetic of that precision."""
    peak = gpu.peak(precision)
    if peak is None:
        return None
    bandwidth = gpu.bandwidth_gbs * 1e9
    total = memory_bound = 0.0
    for group in groups:
        compute = group.fewest_operations / peak
        memory = group.bytes(precision, gpu.l2_kib) / bandwidth
        total += max(compute, memory)
        memory_bound += memory if memory > compute else 0.0
    compute_us = 1e6 * sum(group.fewest_operations for group in groups) / peak
    memory_us = 1e6 * sum(group.bytes(precision, None) for group in groups) / bandwidth
    floor_us = max(compute_us, memory_us)
    share = memory_bound / total if total else 0.0
    return Bound(1e6 * total, floor_us, compute_us, memory_us, share)


def floor_us(operations: float, weights: float, gpu: Gpu, precision: str) -> Optional[float]:
    """The floor in microseconds for a network of which only these two are known; None as of :func:`bound`.

    All its convolutions might be dense 3x3, so :data:`WINOGRAD` applies to all of them.
    """
    peak = gpu.peak(precision)
    if peak is None:
        return None
    return 1e6 * max(operations / WINOGRAD / peak, weights * BYTES[precision] / (gpu.bandwidth_gbs * 1e9))


def read_groups(path: Path, content: Optional[bytes] = None) -> List[Group]:
    """The groups of ``heads.onnx`` or ``detector.onnx``, at batch 1. content: its bytes, if they were read.

    A node of another domain, as the plugin, is a group without operations: they depend on the picture.

    Raises InputError if it is no ONNX model, CheckError if the shape of a tensor cannot be told,
    MissingDependencyError without onnx.
    """
    model = onnx_model.load(path, path.read_bytes() if content is None else content, "count operations")
    return _Graph(path, model).groups()


class _Graph:
    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        self._path, self._graph = path, model.graph
        self._shapes = _shapes(path, model)
        self._nodes = {output: node for node in model.graph.node for output in node.output if output}
        self._constants = _constants(model.graph)
        self._consumers: Dict[str, List[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def groups(self) -> List[Group]:
        owner = self._owners()
        members: Dict[int, List[onnx.NodeProto]] = {}
        for node in self._graph.node:
            if node.output[0] in owner:
                members.setdefault(owner[node.output[0]], []).append(node)
        results = {source for one in self._graph.output for source in self._sources(one.name)}
        readers = self._readers(owner)
        return [self._group(number, nodes, readers, results) for number, nodes in sorted(members.items())]

    def _owners(self) -> Dict[str, int]:
        """Tensor -> the number of the group that computes it; none for what is moved or constant."""
        owner: Dict[str, int] = {}
        count = 0
        for node in self._graph.node:
            if self._is_moved(node) or node.output[0] in self._constants:
                continue
            before = [
                owner[source] for name in node.input for source in self._sources(name) if source in owner
            ]
            is_start = node.op_type in _STARTS or node.domain not in ("", "ai.onnx") or not before
            number = count if is_start else max(before)
            count += is_start
            for output in node.output:
                owner[output] = number
        return owner

    def _readers(self, owner: Mapping[str, int]) -> Dict[str, Set[int]]:
        """Tensor -> the groups that read it, however it is moved before."""
        readers: Dict[str, Set[int]] = {}
        for node in self._graph.node:
            if node.output[0] in owner:
                for source in (one for name in node.input for one in self._sources(name)):
                    readers.setdefault(source, set()).add(owner[node.output[0]])
        return readers

    def _group(
        self,
        number: int,
        nodes: Sequence[onnx.NodeProto],
        readers: Mapping[str, Set[int]],
        results: Set[str],
    ) -> Group:
        own = {output for node in nodes for output in node.output if output}
        read = {one for node in nodes for name in node.input for one in self._sources(name)} - own
        constants = {name for node in nodes for name in node.input if name in self._constants}
        graph_inputs = {one for one in read if one not in self._nodes}
        written = {one for one in own if readers.get(one, set()) - {number}}
        counted = [self._operations(node) for node in nodes]
        return Group(
            nodes[0].name or nodes[0].output[0],
            self._kind(nodes[0]),
            sum(self._macs(node) for node in nodes),
            sum(operations for operations, _ in counted),
            sum(fewest for _, fewest in counted),
            sum(self._size(name) for name in constants if self._shape(name)),
            tuple(self._size(name) for name in sorted(read - graph_inputs)),
            tuple(self._size(name) for name in sorted(written)),
            sum(self._size(name) for name in graph_inputs),
            sum(self._size(name) for name in own & results),
        )

    def _is_moved(self, node: onnx.NodeProto) -> bool:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _MOVES:
            return False
        return node.op_type != "Resize" or _attribute(node, "mode", b"nearest") == b"nearest"

    def _sources(self, name: str) -> List[str]:
        """The computed tensors and inputs of the graph from which a tensor's values come unchanged."""
        if not name or name in self._constants:
            return []
        node = self._nodes.get(name)
        if node is None or not self._is_moved(node):
            return [name]
        return [source for one in node.input for source in self._sources(one)]

    def _operations(self, node: onnx.NodeProto) -> Tuple[int, float]:
        """Operations of a node as it is written, and by the cheapest algorithm that is known."""
        if node.domain not in ("", "ai.onnx"):
            return 0, 0.0
        size = self._size(node.output[0])
        if node.op_type in ("Conv", "ConvTranspose"):
            return self._convolution(node)
        if node.op_type in ("Gemm", "MatMul"):
            added = size if node.op_type == "Gemm" and len(node.input) > 2 else 0
            return 2 * self._macs(node) + added, float(2 * self._macs(node) + added)
        if node.op_type in _POOLS:
            window = _product(_attribute(node, "kernel_shape", ()))
            return size * window, float(size * window)
        read = self._size(node.input[0]) if node.op_type.startswith(("Reduce", "Global")) else size
        return read, float(read)

    def _macs(self, node: onnx.NodeProto) -> int:
        if node.op_type in ("Gemm", "MatMul"):
            shape = self._shape(node.input[0])
            return self._size(node.output[0]) * (shape[0] if _attribute(node, "transA", 0) else shape[-1])
        if node.op_type in ("Conv", "ConvTranspose"):
            positions = node.output[0] if node.op_type == "Conv" else node.input[0]
            return self._size(positions) * _product(self._shape(node.input[1])[1:])
        return 0

    def _kind(self, node: onnx.NodeProto) -> str:
        if node.op_type != "Conv":
            return node.op_type
        kernel = self._shape(node.input[1])
        size = "x".join(map(str, kernel[2:]))
        return f"{size} {'depthwise ' if kernel[1] == 1 else ''}convolution"

    def _convolution(self, node: onnx.NodeProto) -> Tuple[int, float]:
        data, kernel = self._shape(node.input[0]), self._shape(node.input[1])
        multiplied = 2 * self._macs(node)
        bias = self._size(node.output[0]) if len(node.input) > 2 and node.input[2] else 0
        if node.op_type == "ConvTranspose":
            return multiplied + bias, float(multiplied + bias)
        output = self._shape(node.output[0])
        axes = _axes(node, data[2:], kernel[2:], output[2:])
        inside = 2 * _product((*output[:2], kernel[1], *(axis.taps_inside() for axis in axes)))
        can_winograd = (
            kernel[1] == data[1]
            and kernel[2:] == (3, 3)
            and all(axis.stride == axis.dilation == 1 for axis in axes)
        )
        return multiplied + bias, inside / (WINOGRAD if can_winograd else 1) + bias

    def _shape(self, name: str) -> Tuple[int, ...]:
        try:
            return self._shapes[name]
        except KeyError:
            raise CheckError(
                f"{self._path}: the shape of `{name}` cannot be told; expected a model as `odtrt convert` "
                "writes it"
            ) from None

    def _size(self, name: str) -> int:
        return _product(self._shape(name))


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One spatial axis of a convolution."""

    size: int
    kernel: int
    output: int
    stride: int
    dilation: int
    pad: int

    def taps_inside(self) -> int:
        """How many pairs of an output position and a kernel's element meet a value, not padding."""
        starts = (position * self.stride - self.pad for position in range(self.output))
        return sum(
            0 <= start + element * self.dilation < self.size
            for start in starts
            for element in range(self.kernel)
        )


def _axes(
    node: onnx.NodeProto, data: Sequence[int], kernel: Sequence[int], output: Sequence[int]
) -> List[_Axis]:
    strides, dilations, pads = (
        _attribute(node, name, (default,) * count)
        for name, default, count in (("strides", 1, 2), ("dilations", 1, 2), ("pads", 0, 4))
    )
    axes = []
    for i in range(len(data)):
        pad = pads[i]
        automatic = _attribute(node, "auto_pad", b"NOTSET")
        if automatic.startswith(b"SAME"):
            whole = (output[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - data[i]
            pad = (max(0, whole) + (automatic == b"SAME_LOWER")) // 2
        axes.append(_Axis(data[i], kernel[i], output[i], strides[i], dilations[i], pad))
    return axes


def _constants(graph: onnx.GraphProto) -> Set[str]:
    """Tensors that do not depend on the picture."""
    found = {one.name for one in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Constant", "Shape") or (
            node.input and all(name in found for name in node.input if name)
        ):
            found.update(node.output)
    return found


def _shapes(path: Path, model: onnx.ModelProto) -> Dict[str, Tuple[int, ...]]:
    """The shape of every tensor at batch 1, as far as ONNX can infer it."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if not dimension.HasField("dim_value"):
                dimension.dim_value = 1
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise InputError(
            f"{path}: its shapes cannot be told ({one_line(error)}); convert it again"
        ) from error
    shapes = {one.name: tuple(one.dims) for one in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape"):
            # Only the batch is ever unknown.
            shapes[value.name] = tuple(one.dim_value if one.HasField("dim_value") else 1 for one in sizes)
    return shapes


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    import onnx

    for one in node.attribute:
        if one.name == name:
            value = onnx.helper.get_attribute_value(one)
            return tuple(value) if isinstance(value, (list, tuple)) else value
    return default


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
