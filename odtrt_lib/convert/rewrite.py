"""Chapter 2's rewriting: what odtrt changes in a detector's graph before and after tf2onnx.

tf2onnx translates single operations and knows nothing about this kind of network. Every rule here is exact in
real arithmetic:

1. On the TensorFlow side, :func:`plain_graph` uses simpler operations. Upsampling made of stacks and reshapes
   becomes one ResizeNearestNeighbor. EfficientDet's weighted fusion (stack, matrix product, squeeze) becomes
   a sum of scaled feature maps. Shapes in which only the batch size is computed become constants.
2. On the ONNX side, :func:`tidy` changes TensorFlow's NHWC order to NCHW, folds batch normalisation into the
   convolution before it, and transposes each head once instead of once for each level.

No rule is trusted: :func:`odtrt_lib.convert.convert` compares the result with TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from odtrt_lib import __version__
from odtrt_lib.errors import UnsupportedError, one_line
from odtrt_lib.export import odapi

if TYPE_CHECKING:
    import onnx
    from onnx_graphsurgeon import Constant, Graph, Node, Tensor

INPUT, OUTPUTS = "image", ("box_encodings", "class_logits")

_TO_NCHW, _TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
_LARGEST_KERNEL_COPIED = 1 << 20


# ---- TensorFlow's side --------------------------------------------------------------------------------


def plain_graph(frozen: Any) -> Any:
    """A new ``GraphDef`` of the same network with fewer and simpler operations. Every rule is exact.

    * Identity and IdentityN are removed, and so are multiplications by the constant 1 (swish with beta = 1).
    * Upsampling written as stack, reshape, stack, reshape (OD API: ``ops.nearest_neighbor_upsampling``)
      becomes one ResizeNearestNeighbor, under the name of the last reshape.
    * ``squeeze(matmul(stack([x1, x2, ..], -1), weights))`` (OD API: ``BiFPNCombineLayer``) becomes
      ``weights[0] * x1 + weights[1] * x2 + ..``, under the name of the squeeze.
    * A reshape of which only the batch is unknown gets the constant target ``[-1, ...]``.
    """
    tf = odapi.tensorflow()
    graph_def = tf.compat.v1.GraphDef()
    graph_def.CopyFrom(frozen)
    bypass_identities(graph_def)
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(graph_def, name="")
    nodes = {node.name: node for node in graph_def.node}
    sums = {}
    for operation in graph.get_operations():
        node = nodes[operation.name]
        upsampling = match_upsampling(operation)
        weighted_sum = _match_weighted_sum(operation)
        if upsampling is not None:
            size = _add_constant(graph_def, f"{node.name}/size", np.array(upsampling.output_size, np.int32))
            _become(node, "ResizeNearestNeighbor", [upsampling.source, size])
        elif weighted_sum is not None:
            sums[node.name] = weighted_sum
        elif operation.type == "Reshape" and _is_known_but_for_batch(operation.outputs[0].shape):
            target = np.array([-1, *operation.outputs[0].shape[1:]], np.int32)
            node.input[1] = _add_constant(graph_def, f"{node.name}/target", target)
    with tf.compat.v1.Session(graph=graph) as session:
        weights = session.run({name: found.weights for name, found in sums.items()})
    for name, found in sums.items():
        _write_weighted_sum(graph_def, nodes[name], found.terms, weights[name].ravel())
    return tf.compat.v1.graph_util.extract_sub_graph(graph_def, [INPUT, *OUTPUTS])


@dataclasses.dataclass(frozen=True)
class _Upsampling:
    source: str
    input_size: tuple[int, int]
    output_size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _WeightedSum:
    terms: tuple[str, ...]
    weights: str


def bypass_identities(graph_def: Any) -> None:
    tf = odapi.tensorflow()
    nodes = {node.name: node for node in graph_def.node}

    def is_one(name: str) -> bool:
        node = nodes[name.partition(":")[0]]
        while node.op == "Identity":
            node = nodes[node.input[0].partition(":")[0]]
        return (
            node.op == "Const"
            and not node.attr["value"].tensor.tensor_shape.dim
            and tf.make_ndarray(node.attr["value"].tensor) == 1
        )

    def passed_through(name: str) -> str | None:
        producer, _, index = name.partition(":")
        node = nodes[producer]
        if producer in OUTPUTS:
            return None
        if node.op in ("Identity", "IdentityN"):
            return node.input[int(index or 0)]
        if node.op == "Mul":
            return next((node.input[1 - i] for i in (0, 1) if is_one(node.input[i])), None)
        return None

    for node in graph_def.node:
        inputs = [name for name in node.input if not name.startswith("^")]
        del node.input[:]
        for name in inputs:
            while (origin := passed_through(name)) is not None:
                name = origin
            node.input.append(name)


def match_upsampling(operation: Any) -> _Upsampling | None:
    """The nearest-neighbour upsampling that ends in ``operation``, if it is one."""
    columns_then_rows = []
    for axis in (2, 3):
        stack = operation.inputs[0].op if operation.type == "Reshape" else operation
        if (
            stack.type != "Pack"
            or stack.get_attr("axis") != axis
            or len({t.ref() for t in stack.inputs}) != 1
        ):
            return None
        columns_then_rows.append((operation.outputs[0], stack.inputs[0], len(stack.inputs)))
        operation = stack.inputs[0].op
    (result, _, vertical), (between, source, horizontal) = columns_then_rows
    if source.shape.rank != 4 or None in source.shape[1:]:
        return None
    _, height, width, channels = source.shape
    is_upsampling = (
        between.shape.rank == result.shape.rank == 4
        and between.shape[1:] == [height, width * horizontal, channels]
        and result.shape[1:] == [height * vertical, width * horizontal, channels]
    )
    output_size = (height * vertical, width * horizontal)
    return _Upsampling(source.name, (height, width), output_size) if is_upsampling else None


def _match_weighted_sum(operation: Any) -> _WeightedSum | None:
    """The weighted sum of feature maps that ends in ``operation``, if it is one."""
    if operation.type != "Squeeze" or operation.get_attr("squeeze_dims") not in ([-1], [4]):
        return None
    product = operation.inputs[0].op
    if product.type != "BatchMatMulV2" or product.get_attr("adj_x") or product.get_attr("adj_y"):
        return None
    stack, weights = product.inputs[0].op, product.inputs[1]
    if stack.type != "Pack" or stack.get_attr("axis") not in (-1, 4) or stack.inputs[0].shape.rank != 4:
        return None
    if weights.shape != (len(stack.inputs), 1) or not _is_constant(weights.op):
        return None
    return _WeightedSum(tuple(tensor.name for tensor in stack.inputs), weights.name)


def _is_constant(operation: Any) -> bool:
    return operation.type != "Placeholder" and all(_is_constant(tensor.op) for tensor in operation.inputs)


def _is_known_but_for_batch(shape: Any) -> bool:
    return bool(shape.rank) and None not in shape[1:]


def _write_weighted_sum(graph_def: Any, last: Any, terms: tuple[str, ...], weights: np.ndarray) -> None:
    scaled = []
    for i, (term, weight) in enumerate(zip(terms, weights, strict=True)):
        factor = _add_constant(graph_def, f"{last.name}/weight_{i}", weight)
        product = _become(graph_def.node.add(name=f"{last.name}/scaled_{i}"), "Mul", [term, factor])
        scaled.append(product.name)
    total = scaled[0]
    for i, term in enumerate(scaled[1:], 1):
        node = last if i == len(scaled) - 1 else graph_def.node.add(name=f"{last.name}/sum_{i}")
        total = _become(node, "AddV2", [total, term]).name


def _become(node: Any, operation: str, inputs: list[str]) -> Any:
    tf = odapi.tensorflow()
    node.op = operation
    del node.input[:]
    node.input.extend(inputs)
    node.attr.clear()
    node.attr["T"].type = tf.float32.as_datatype_enum
    return node


def _add_constant(graph_def: Any, name: str, value: np.ndarray) -> str:
    tf = odapi.tensorflow()
    node = graph_def.node.add(name=name, op="Const")
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    node.attr["dtype"].type = node.attr["value"].tensor.dtype
    return name


# ---- ONNX's side --------------------------------------------------------------------------------------


def to_onnx(frozen: Any, opset: int) -> onnx.ModelProto:
    """Converts a frozen ``GraphDef`` to ONNX and tidies the result, but does not compare the two.

    Of tf2onnx's own optimisers only constant folding runs. Their search for Transposes takes most of the
    conversion's time and stops at EfficientDet's fusion. They also fold batch normalisation into kernels that
    pyramid levels share, which makes a ResNet-50 FPN 1.6 times as large.
    """
    tf = odapi.tensorflow()
    import tf2onnx
    from tf2onnx import optimizer, tfonnx
    from tf2onnx.optimizer.const_fold_optimizer import ConstFoldOptimizer

    tf2onnx.logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    names = {f"{name}:0": name for name in (INPUT, *OUTPUTS)}
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(plain_graph(frozen), name="")
        try:
            translated = tfonnx.process_tf_graph(
                graph,
                opset=opset,
                input_names=[f"{INPUT}:0"],
                output_names=[f"{name}:0" for name in OUTPUTS],
                inputs_as_nchw=[f"{INPUT}:0"],
                tensors_to_rename=names,
            )
            folding = {"fold_constants": ConstFoldOptimizer}
            folded = optimizer.optimize_graph(translated, catch_errors=False, optimizers=folding)
        except (ValueError, AttributeError) as error:
            raise UnsupportedError(f"frozen.pb: tf2onnx cannot convert it: {one_line(error)}") from error
    return tidy(folded.make_model("heads"))


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in NCHW order, with fewer operations, and with names that are always the same.

    * Transposes are removed together with their inverses (:func:`_to_nchw`).
    * BatchNormalization is folded into the convolution before it, in float64, unless that means
      copying a kernel of more than 1 MiB for each of the pyramid levels that share it.
    * Levels of a head are joined first and transposed once (:func:`_join_levels`).
    * Of the rules that mean the same, every Resize gets the one that all TensorRT versions accept.
    * A node gets the name of the TensorFlow operation from which it came, and a tensor that of its node.
    """
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(model)
    _drop_identities(graph)
    _share_equal_constants(graph)
    _to_nchw(graph)
    graph.cleanup()
    _fold_batch_norms(graph)
    for output in graph.outputs:
        _join_levels(graph, output)
    graph.cleanup()
    for node in graph.nodes:
        if node.op == "Resize":
            _settle_resize(node)
    graph.cleanup()
    _share_equal_constants(graph)
    _order_and_name(graph)
    return _with_shapes(gs.export_onnx(graph), model.ir_version)


def _drop_identities(graph: Graph) -> None:
    for node in [node for node in graph.nodes if node.op == "Identity"]:
        source, result = node.inputs[0], node.outputs[0]
        is_output = any(result is output for output in graph.outputs)
        if not is_output:
            _redirect(result, source)
        elif source.inputs and len(source.outputs) == 1:
            producer = source.inputs[0]
            node.outputs.clear()
            producer.outputs[producer.outputs.index(source)] = result


def _redirect(old: Tensor, new: Tensor) -> None:
    """Makes every consumer of ``old`` read ``new``."""
    for consumer in list(old.outputs):
        for i, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[i] = new


_ELEMENTWISE = {
    *(
        "Abs",
        "Add",
        "Clip",
        "Div",
        "Elu",
        "Exp",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Max",
        "Min",
        "Mul",
    ),
    *("Neg", "Pow", "PRelu", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh"),
}


def means_in_two_steps(model: onnx.ModelProto) -> onnx.ModelProto:
    """Computes each spatial mean along rows, then along columns; changes the model in place.

    :func:`tidy` does not do this. Shorter sums round less. Together with
    :func:`odtrt_lib.export.odapi.exact_means` on TensorFlow's side, this separates errors of a conversion
    from rounding errors.
    """
    import onnx

    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "ReduceMean":
            rows = f"{node.output[0]}/rows"
            model.graph.node.append(
                onnx.helper.make_node("ReduceMean", [node.input[0]], [rows], axes=[3], keepdims=1)
            )
            node = onnx.helper.make_node("ReduceMean", [rows], node.output, axes=[2], keepdims=1)
        model.graph.node.append(node)
    return model


def _to_nchw(graph: Graph) -> None:
    """Changes the graph to NCHW order. Transposes remain only where an NHWC result is needed.

    tf2onnx puts every layer between two Transposes: to NCHW, and back to NHWC. This function goes through the
    graph in order, and keeps for each NHWC tensor its ``twin``, the same data in NCHW. It replaces a
    Transpose of a tensor to NCHW by the tensor's twin. It computes element-wise operations, concatenation,
    padding and the spatial mean on the twins, and adds a Transpose for their NHWC results. Only an operation
    that this function does not know reads such a result. The mean remains a ReduceMean, because ONNX
    Runtime's GlobalAveragePool adds values one by one and loses a decimal digit in EfficientDet.
    """
    import onnx_graphsurgeon as gs

    twins: dict[int, Tensor] = {}
    graph.toposort()

    def in_nchw(tensor: Tensor) -> Tensor | None:
        if isinstance(tensor, gs.Constant):
            return _constant_in_nchw(tensor, f"{node.name}/constant_{len(twins)}")
        return twins.get(id(tensor))

    def compute_in_nchw(node: Node, inputs: list[Tensor]) -> None:
        result = node.outputs[0]
        twin = gs.Variable(f"{result.name}/nchw", result.dtype)
        node.inputs, node.outputs = inputs, [twin]
        graph.layer(
            name=f"{node.name}/to_nhwc",
            op="Transpose",
            inputs=[twin],
            outputs=[result],
            attrs={"perm": _TO_NHWC},
        )
        twins[id(result)] = twin

    for node in list(graph.nodes):
        if node.op == "Transpose" and node.attrs["perm"] == _TO_NHWC:
            twins[id(node.outputs[0])] = node.inputs[0]
            producer = node.i() if node.inputs[0].inputs else None
            if producer is not None and _is_numbered(producer.name):
                producer.name = node.outputs[0].name.partition(":")[0]
        elif node.op == "Transpose" and node.attrs["perm"] == _TO_NCHW and id(node.inputs[0]) in twins:
            _redirect(node.outputs[0], twins[id(node.inputs[0])])
        elif node.op in _ELEMENTWISE and any(id(tensor) in twins for tensor in node.inputs):
            inputs = [in_nchw(tensor) for tensor in node.inputs]
            if all(tensor is not None for tensor in inputs):
                compute_in_nchw(node, inputs)
        elif node.op == "Concat" and all(id(tensor) in twins for tensor in node.inputs):
            node.attrs["axis"] = _TO_NCHW.index(node.attrs["axis"] % 4)
            compute_in_nchw(node, [twins[id(tensor)] for tensor in node.inputs])
        elif node.op == "Pad" and id(node.inputs[0]) in twins and isinstance(node.inputs[1], gs.Constant):
            pads = _pads_in_nchw(node.inputs[1], f"{node.name}/pads")
            compute_in_nchw(node, [twins[id(node.inputs[0])], pads, *node.inputs[2:]])
        elif _is_spatial_mean(node) and id(node.inputs[0]) in twins and _keep_dimensions(node):
            compute_in_nchw(node, [twins[id(node.inputs[0])], *_mean_axes_in_nchw(node)])


def _keep_dimensions(node: Node) -> bool:
    """Makes a mean over height and width return [B, 1, 1, C], and removes a reshape after it that did this.
    Returns False if this is not possible."""
    keeps = node.attrs.get("keepdims", 1)
    reshape = node if keeps else _only_consumer(node.outputs[0])
    if reshape is None or not (keeps or _puts_channels_last(reshape)):
        return False
    node.attrs["keepdims"] = 1
    result = reshape.outputs[0]
    reshape.outputs.clear()
    node.outputs = [result]
    return True


def _mean_axes_in_nchw(node: Node) -> list[Tensor]:
    """The inputs with a mean's axes in NCHW. Without inputs the axes are an attribute, which is changed
    here."""
    import onnx_graphsurgeon as gs

    if node.inputs[1:]:
        return [gs.Constant(f"{node.name}/axes", np.array([2, 3]))]
    node.attrs["axes"] = [2, 3]
    return []


def _pads_in_nchw(pads: Constant, name: str) -> Constant:
    import onnx_graphsurgeon as gs

    before, after = pads.values.reshape(2, 4)
    return gs.Constant(name, np.concatenate([before[_TO_NCHW], after[_TO_NCHW]]))


def _constant_in_nchw(constant: Constant, name: str) -> Constant | None:
    """The NCHW form of a constant that is broadcast to an NHWC tensor; None if it has none."""
    import onnx_graphsurgeon as gs

    values = constant.values
    if values.ndim == 0:
        return constant
    if values.size == 1:
        return gs.Constant(name, values.reshape(()))
    if values.ndim > 4:
        return None
    padded = values.reshape((1,) * (4 - values.ndim) + values.shape)
    return gs.Constant(name, np.ascontiguousarray(padded.transpose(_TO_NCHW)))


def _is_spatial_mean(node: Node) -> bool:
    if node.op != "ReduceMean":
        return False
    axes = node.attrs.get("axes", node.inputs[1].values if len(node.inputs) > 1 else [])
    return list(axes) == [1, 2]


def _only_consumer(tensor: Tensor) -> Node | None:
    return tensor.outputs[0] if len(tensor.outputs) == 1 else None


def _puts_channels_last(reshape: Node) -> bool:
    import onnx_graphsurgeon as gs

    if reshape.op != "Reshape" or not isinstance(reshape.inputs[1], gs.Constant):
        return False
    target = reshape.inputs[1].values
    return target.shape == (4,) and list(target[:3]) == [-1, 1, 1]


def _fold_batch_norms(graph: Graph) -> None:
    import onnx_graphsurgeon as gs

    for norm in [node for node in graph.nodes if node.op == "BatchNormalization"]:
        conv = norm.i() if norm.inputs[0].inputs else None
        if conv is None or conv.op != "Conv" or len(conv.outputs[0].outputs) != 1:
            continue
        if not all(isinstance(tensor, gs.Constant) for tensor in conv.inputs[1:] + norm.inputs[1:]):
            continue
        kernel = conv.inputs[1]
        if len(kernel.outputs) > 1 and kernel.values.nbytes > _LARGEST_KERNEL_COPIED:
            continue
        scale, offset, mean, variance = (tensor.values.astype(np.float64) for tensor in norm.inputs[1:5])
        bias = conv.inputs[2].values.astype(np.float64) if len(conv.inputs) > 2 else 0.0
        factor = scale / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
        folded_kernel = kernel.values * factor.reshape(-1, 1, 1, 1)
        folded_bias = (bias - mean) * factor + offset
        conv.inputs = [
            conv.inputs[0],
            gs.Constant(f"{norm.name}/kernel", folded_kernel.astype(np.float32)),
            gs.Constant(f"{norm.name}/bias", folded_bias.astype(np.float32)),
        ]
        result = norm.outputs[0]
        norm.outputs.clear()
        conv.outputs = [result]


_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity")


def _join_levels(graph: Graph, output: Tensor) -> None:
    """Transposes a head once for all neighbouring levels with equally many channels, not once for each level.

    A level is ``[B, A * K, H, W]`` (A anchors a cell, K columns an anchor). Anchors are counted level by
    level, and in a level by row, column and anchor of the cell. So the levels can be flattened to ``[B, A *
    K, H * W]``, joined along the last axis, transposed together to ``[B, cells, A * K]`` and reshaped to
    ``[B, cells * A, K]``. Levels with another A form a group of their own.
    """
    import onnx_graphsurgeon as gs

    join = _through_views(output).inputs
    if not join or join[0].op != "Concat" or join[0].attrs["axis"] != 1:
        return
    levels = []
    for tensor in join[0].inputs:
        last = _through_views(tensor).inputs
        if not last or last[0].op != "Transpose" or last[0].attrs["perm"] != _TO_NHWC:
            return
        conv = last[0].i()
        if conv.op != "Conv" or not isinstance(conv.inputs[1], gs.Constant):
            return
        levels.append((last[0].inputs[0], conv.inputs[1].shape[0]))
    columns = output.shape[-1]

    def layer(name: str, op: str, inputs: list[Any], **attrs: Any) -> Tensor:
        name = f"{output.name}/{name}"
        return graph.layer(name=name, op=op, inputs=inputs, outputs=[f"{name}:0"], attrs=attrs)[0]

    groups = []
    for g, (channels, group) in enumerate(itertools.groupby(levels, key=lambda level: level[1])):
        flat = [
            layer(f"group_{g}/level_{i}", "Reshape", [level, np.array([0, channels, -1])])
            for i, (level, _) in enumerate(group)
        ]
        cells = flat[0] if len(flat) == 1 else layer(f"group_{g}/join", "Concat", flat, axis=2)
        last_axis = layer(f"group_{g}/transpose", "Transpose", [cells], perm=[0, 2, 1])
        groups.append(layer(f"group_{g}/anchors", "Reshape", [last_axis, np.array([0, -1, columns])]))
    result = groups[0] if len(groups) == 1 else layer("join", "Concat", groups, axis=1)
    output.inputs[0].outputs.clear()
    result.inputs[0].outputs = [output]


def _through_views(tensor: Tensor) -> Tensor:
    while tensor.inputs and tensor.inputs[0].op in _VIEWS:
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def _settle_resize(node: Node) -> None:
    """Writes TensorFlow 2's nearest rule in ONNX attributes that all runtimes and TensorRT accept.

    ``tf_half_pixel_for_nn`` with ``floor`` reads pixel ``floor((i + 0.5) * in / out)``. So does
    ``half_pixel`` with ``round_prefer_ceil``; TensorRT's parser refuses the first. If the enlargement is an
    integer, both read pixel ``i // factor``, as ``asymmetric`` with ``floor`` does.
    """
    import onnx_graphsurgeon as gs

    node.attrs.pop("exclude_outside", None)
    if len(node.inputs) > 1:
        node.inputs[1] = gs.Variable.empty()
    if node.attrs.get("mode") != "nearest":
        node.attrs.pop("nearest_mode", None)
    elif node.attrs.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        scales = node.inputs[2].values if isinstance(node.inputs[2], gs.Constant) else np.array([0.5])
        is_enlargement = np.all(scales >= 1) and np.all(scales == np.round(scales))
        node.attrs["coordinate_transformation_mode"] = "asymmetric" if is_enlargement else "half_pixel"
        node.attrs["nearest_mode"] = "floor" if is_enlargement else "round_prefer_ceil"


def _share_equal_constants(graph: Graph) -> None:
    import onnx_graphsurgeon as gs

    first: dict[tuple[str, tuple[int, ...], bytes], Constant] = {}
    for node in graph.nodes:
        for i, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                key = (
                    str(tensor.dtype),
                    tuple(tensor.shape),
                    hashlib.sha256(tensor.values.tobytes()).digest(),
                )
                node.inputs[i] = first.setdefault(key, tensor)


_ROLES = {"Conv": ("", "kernel", "bias"), "BatchNormalization": ("", "scale", "bias", "mean", "variance")}


def _order_and_name(graph: Graph) -> None:
    """Sorts the nodes depth first from the outputs, and gives them names without tf2onnx's counters."""
    import onnx_graphsurgeon as gs

    ordered: dict[int, Node] = {}
    pending = [(tensor.inputs[0], False) for tensor in reversed(graph.outputs)]
    while pending:
        node, are_inputs_done = pending.pop()
        if are_inputs_done:
            ordered.setdefault(id(node), node)
        elif id(node) not in ordered:
            pending.append((node, True))
            pending += [(tensor.inputs[0], False) for tensor in reversed(node.inputs) if tensor.inputs]
    graph.nodes = list(ordered.values())
    fixed = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    taken: set[str] = {INPUT, *OUTPUTS}
    for i, node in enumerate(graph.nodes):
        name = f"{node.op}_{i}" if _is_numbered(node.name) or not node.name else node.name
        node.name = name if name not in taken else f"{name}_{i}"
        taken.add(node.name)
        node.attrs = dict(sorted(node.attrs.items()))
        for tensor in node.outputs:
            if id(tensor) not in fixed:
                tensor.name = node.name
        roles = _ROLES.get(node.op, ())
        for k, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and id(tensor) not in fixed:
                tensor.name = f"{node.name}/{roles[k] if k < len(roles) else f'constant_{k}'}"
                fixed.add(id(tensor))


def _with_shapes(model: onnx.ModelProto, ir_version: int) -> onnx.ModelProto:
    """Sets the shapes of input and outputs, the producer and the IR version."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for values, shapes in (
        (model.graph.input, inferred.graph.input),
        (model.graph.output, inferred.graph.output),
    ):
        for value, shape in zip(values, shapes, strict=True):
            value.CopyFrom(shape)
            batch = value.type.tensor_type.shape.dim[0]
            if not batch.HasField("dim_value"):
                batch.dim_param = "batch"
    del model.graph.value_info[:]
    for unused in [entry for entry in model.opset_import if entry.domain]:
        model.opset_import.remove(unused)
    model.graph.name = "heads"
    model.ir_version = ir_version
    model.producer_name, model.producer_version = "odtrt", __version__
    return model


def _is_numbered(name: str) -> bool:
    return re.search(r"__\d+$", name) is not None


def serialize(model: onnx.ModelProto) -> bytes:
    """The bytes of the model as an ONNX file. Equal models give equal bytes."""
    return model.SerializeToString(deterministic=True)
