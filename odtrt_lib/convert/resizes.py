"""Chapter 2's Resize audit: compares which source pixels each Resize reads in TensorFlow and in ONNX.

The same name means different pixels in different libraries. A wrong rule shifts every box, and nothing
crashes. :func:`audit_resizes` compares the two graphs Resize by Resize, in exact arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from odtrt_lib.convert.rewrite import bypass_identities, match_upsampling
from odtrt_lib.errors import CheckError, UnsupportedError
from odtrt_lib.export import odapi

if TYPE_CHECKING:
    import onnx

_UNCONVERTIBLE = {
    "ResizeArea": "tf2onnx writes it as nearest-neighbour, which is wrong",
    "ResizeBicubic": "tf2onnx writes it in NHWC order, which no runtime accepts",
    "ScaleAndTranslate": "antialiased resizing has no ONNX form that TensorRT reads",
    "CropAndResize": "tf2onnx writes it as a Loop, which TensorRT does not fuse",
}


@dataclasses.dataclass(frozen=True)
class ResizeFinding:
    """One Resize of the network, as TensorFlow computes it and as the ONNX graph does.

    name: the TensorFlow operation, which is also the ONNX node's name; for a stack-and-reshape upsampling
        the last of its four operations.
    tensorflow, onnx: the rule in words, e.g. ``ResizeNearestNeighbor`` and
        ``nearest asymmetric floor``; empty if that side has no such operation.
    input_size, output_size: ``(height, width)`` in TensorFlow.
    agrees: whether both read the same source coordinate for every output row and column.
    problem: why they do not agree, or why TensorRT's parser would refuse the Resize; empty if neither.
    """

    name: str
    tensorflow: str
    onnx: str
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    agrees: bool
    tensorrt_reads_it: bool
    problem: str


def audit_resizes(graph_def: Any, onnx_model: onnx.ModelProto) -> list[ResizeFinding]:
    """Compares every Resize of a frozen ``GraphDef`` with its counterpart in the ONNX graph.

    In TensorFlow's graph these are looked for: ResizeBilinear, ResizeNearestNeighbor, the operations that
    odtrt refuses to convert, and nearest-neighbour upsampling written as stacks and reshapes. Counterparts
    are matched by name, and the remaining ones by order. Two rules agree if, for the sizes in this graph,
    every output row and column reads the same source coordinate (bilinear) or the same source pixel
    (nearest). The coordinates are those of TensorFlow's CPU kernels (``image_resizer_state.h``) and of the
    ONNX operator's definition, in rational numbers. An ONNX Resize without a counterpart in TensorFlow
    disagrees.
    """
    expected = _tensorflow_resizes(graph_def)
    found = {node.name: node for node in onnx_model.graph.node if node.op_type == "Resize"}
    constants = {tensor.name: tensor for tensor in onnx_model.graph.initializer}
    unnamed = [name for name in found if name not in {resize.name for resize in expected}]
    findings = []
    for resize in expected:
        node = found.pop(resize.name, None)
        if node is None and unnamed:
            node = found.pop(unnamed.pop(0))
        findings.append(_compare_resize(resize, node, constants))
    for name, node in found.items():
        problem = "TensorFlow's graph has no such operation"
        rule = " ".join(_onnx_rule(node))
        findings.append(ResizeFinding(name, "", rule, (0, 0), (0, 0), False, True, problem))
    return findings


@dataclasses.dataclass(frozen=True)
class _TensorflowResize:
    name: str
    operation: str
    align_corners: bool
    half_pixel_centers: bool
    input_size: tuple[int, int]
    output_size: tuple[int, int]

    @property
    def rule(self) -> str:
        flags = [flag for flag in ("align_corners", "half_pixel_centers") if getattr(self, flag)]
        return " ".join([self.operation, *flags])


_STACKED_UPSAMPLING = "stack-and-reshape upsampling"


def _tensorflow_resizes(graph_def: Any) -> list[_TensorflowResize]:
    tf = odapi.tensorflow()
    plain = tf.compat.v1.GraphDef()
    plain.CopyFrom(graph_def)
    bypass_identities(plain)
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(plain, name="")
    resizes = []
    for operation in graph.get_operations():
        upsampling = match_upsampling(operation)
        if upsampling is not None:
            resizes.append(
                _TensorflowResize(
                    name=operation.name,
                    operation=_STACKED_UPSAMPLING,
                    align_corners=False,
                    half_pixel_centers=False,
                    input_size=upsampling.input_size,
                    output_size=upsampling.output_size,
                )
            )
        elif operation.type in ("ResizeBilinear", "ResizeNearestNeighbor", *_UNCONVERTIBLE):
            attributes = operation.node_def.attr
            resizes.append(
                _TensorflowResize(
                    name=operation.name,
                    operation=operation.type,
                    align_corners=attributes["align_corners"].b,
                    half_pixel_centers=attributes["half_pixel_centers"].b,
                    input_size=_image_size(operation.inputs[0]),
                    output_size=_image_size(operation.outputs[0]),
                )
            )
    return resizes


def _image_size(tensor: Any) -> tuple[int, int]:
    """Height and width of an NHWC tensor, 0 if they are not fixed."""
    if tensor.shape.rank != 4:
        return 0, 0
    return tensor.shape[1] or 0, tensor.shape[2] or 0


def _onnx_rule(node: onnx.NodeProto) -> list[str]:
    """``[mode, coordinate_transformation_mode]`` and, for nearest, ``nearest_mode``; defaults filled in."""
    attributes = {attribute.name: attribute for attribute in node.attribute}

    def text(name: str, default: str) -> str:
        return attributes[name].s.decode() if name in attributes else default

    rule = [text("mode", "nearest"), text("coordinate_transformation_mode", "half_pixel")]
    if rule[0] == "nearest":
        rule.append(text("nearest_mode", "round_prefer_floor"))
    if "antialias" in attributes and attributes["antialias"].i:
        rule.append("antialias")
    return rule


def _compare_resize(
    resize: _TensorflowResize, node: onnx.NodeProto | None, constants: dict[str, onnx.TensorProto]
) -> ResizeFinding:
    def finding(rule: str, agrees: bool, reads: bool, problem: str) -> ResizeFinding:
        sizes = resize.input_size, resize.output_size
        return ResizeFinding(resize.name, resize.rule, rule, *sizes, agrees, reads, problem)

    if node is None:
        return finding("", False, False, "the ONNX graph has no counterpart")
    rule = _onnx_rule(node)
    written = " ".join(rule)
    refusal = _tensorrt_refusal(rule)
    reads = not refusal
    if resize.operation in _UNCONVERTIBLE:
        return finding(written, False, reads, _UNCONVERTIBLE[resize.operation])
    is_nearest = resize.operation != "ResizeBilinear"
    if rule[0] != ("nearest" if is_nearest else "linear") or "antialias" in rule:
        return finding(written, False, reads, f"expected mode {'nearest' if is_nearest else 'linear'}")
    if 0 in resize.input_size + resize.output_size:
        return finding(written, False, reads, "the image size is not fixed in TensorFlow's graph")
    for axis, (size, target) in enumerate(zip(resize.input_size, resize.output_size, strict=True), 2):
        factor = _onnx_factor(node, constants, axis, size, target)
        if factor is None:
            return finding(written, False, reads, f"axis {axis} is not enlarged from {size} to {target}")
        wanted = [_tensorflow_source(resize, i, size, target) for i in range(target)]
        given = [_onnx_source(rule, i, size, target, factor) for i in range(target)]
        wrong = next((i for i in range(target) if wanted[i] != given[i]), None)
        if wrong is not None:
            what = f"output {wrong} of axis {axis} reads source {float(given[wrong]):g}"
            return finding(written, False, reads, f"{what}, TensorFlow {float(wanted[wrong]):g}")
    return finding(written, True, reads, refusal)


def _tensorflow_source(resize: _TensorflowResize, i: int, size: int, target: int) -> Fraction | int:
    half = Fraction(1, 2)
    is_nearest = resize.operation != "ResizeBilinear"
    if resize.align_corners and target > 1:
        position = Fraction(i * (size - 1), target - 1)
        return min(math.floor(position + half), size - 1) if is_nearest else position
    position = (
        Fraction((2 * i + 1) * size, 2 * target) if resize.half_pixel_centers else Fraction(i * size, target)
    )
    if is_nearest:
        return min(math.floor(position), size - 1)
    return _clamp(position - half if resize.half_pixel_centers else position, size)


def _onnx_source(rule: list[str], i: int, size: int, target: int, factor: Fraction) -> Fraction | int:
    half = Fraction(1, 2)
    centre = (i + half) / factor
    position = {
        "half_pixel": centre - half,
        "pytorch_half_pixel": centre - half if target > 1 else Fraction(0),
        "asymmetric": i / factor,
        "align_corners": Fraction(i * (size - 1), target - 1) if target > 1 else Fraction(0),
        "tf_half_pixel_for_nn": centre,
    }.get(rule[1])
    if position is None:
        return -1
    if rule[0] == "linear":
        return _clamp(position, size)
    index = {
        "floor": math.floor(position),
        "ceil": math.ceil(position),
        "round_prefer_floor": math.ceil(position - half),
        "round_prefer_ceil": math.floor(position + half),
    }[rule[2]]
    return int(_clamp(Fraction(index), size))


def _clamp(position: Fraction, size: int) -> Fraction:
    return min(max(position, Fraction(0)), Fraction(size - 1))


def _onnx_factor(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], axis: int, size: int, target: int
) -> Fraction | None:
    """The exact enlargement along ``axis``; None if the ONNX Resize gives another size than ``target``."""
    from onnx import numpy_helper

    scales = constants.get(node.input[2]) if len(node.input) > 2 else None
    sizes = constants.get(node.input[3]) if len(node.input) > 3 else None
    if sizes is not None:
        return Fraction(target, size) if int(numpy_helper.to_array(sizes)[axis]) == target else None
    if scales is not None:
        scale = float(numpy_helper.to_array(scales)[axis])
        return Fraction(target, size) if abs(scale * size - target) < 1e-3 else None
    return Fraction(target, size)


def _tensorrt_refusal(rule: list[str]) -> str:
    """Why TensorRT's ONNX parser refuses a Resize with this rule; empty if it does not.

    From ``onnxOpImporters.cpp`` (checkResize), and confirmed with the parser of TensorRT-RTX 1.7.
    """
    if "antialias" in rule:
        return "TensorRT has no antialiased Resize"
    if rule[1] == "tf_half_pixel_for_nn" and rule[2:] != ["round_prefer_floor"]:
        return "TensorRT takes tf_half_pixel_for_nn with round_prefer_floor only"
    known = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "tf_half_pixel_for_nn")
    return "" if rule[1] in known else f"TensorRT does not know {rule[1]}"


def require_agreement(path: Path, findings: list[ResizeFinding]) -> None:
    for finding in findings:
        if not (finding.agrees and finding.tensorrt_reads_it):
            raise CheckError(
                f"{path}: Resize `{finding.name}` is `{finding.onnx or 'absent'}` in ONNX, "
                f"`{finding.tensorflow or 'absent'}` in TensorFlow: {finding.problem}; nothing was written"
            )


def refuse_unconvertible(path: Path, graph_def: Any) -> None:
    for node in _all_nodes(graph_def):
        if node.op in _UNCONVERTIBLE:
            raise UnsupportedError(
                f"{path}: {node.op} `{node.name}` cannot be converted: {_UNCONVERTIBLE[node.op]}; "
                "replace it in the model by ResizeBilinear or ResizeNearestNeighbor and train again"
            )


def _all_nodes(graph_def: Any) -> Iterator[Any]:
    yield from graph_def.node
    for function in graph_def.library.function:
        yield from function.node_def
