"""Half precision in the ONNX model itself: float16 weights and arithmetic, for strongly typed networks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from odtrt_lib.errors import BuildError, MissingDependencyError, UnsupportedError, one_line
from odtrt_lib.tensors import CLIP_WINDOWS, PLUGIN

_INSTALL = "run `pip install -e '.[engine]'`"


def half_precision(model: Any) -> Any:
    """The ONNX model with float16 weights and arithmetic; its inputs and outputs stay float32.

    model: an ``onnx.ModelProto``; it is changed in place. A plugin's node reads the float16 heads without
    casts, and TensorRT inserts none; its anchors, clip windows and detections stay float32. Operators that
    onnxconverter-common considers unsafe in half precision (Resize, TopK, ...) stay float32 between casts.

    Raises UnsupportedError if a weight exceeds 65504, the largest half number, because the converter would
    clip it silently; MissingDependencyError without onnxconverter-common; BuildError if ``onnx.checker``
    refuses the result.
    """
    try:
        import onnxconverter_common  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"half precision needs onnx and onnxconverter-common ({error}): {_INSTALL}"
        ) from error
    has_plugin = any(node.op_type == PLUGIN for node in model.graph.node)
    return _half_before_plugin(model) if has_plugin else _half(model)


def _half(model: Any) -> Any:
    import onnx
    from onnx import numpy_helper
    from onnxconverter_common.float16 import convert_float_to_float16

    limit = float(np.finfo(np.float16).max)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
            if not largest <= limit:
                raise UnsupportedError(
                    f"weight `{tensor.name}` reaches {largest:g}, beyond half precision's {limit:g}; "
                    "build with fp32"
                )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the float32 number .* will be truncated")
        _infer_shapes(model)
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            disable_shape_infer=True,
            min_positive_val=2.0**-24,
            max_finite_val=limit,
        )
    _require_valid(half)
    return half


def _half_before_plugin(detector: Any) -> Any:
    """Converts the network without the plugin's node, then puts the node back behind it without casts."""
    import onnx

    heads = onnx.ModelProto()
    heads.CopyFrom(detector)
    graph = heads.graph
    plugin = next(node for node in graph.node if node.op_type == PLUGIN)
    graph.node.remove(plugin)
    anchors = next(tensor for tensor in graph.initializer if tensor.name == plugin.input[2])
    graph.initializer.remove(anchors)
    for windows in [value for value in graph.input if value.name == CLIP_WINDOWS]:
        graph.input.remove(windows)
    del graph.output[:]
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in plugin.input[:2]
    )
    half = _half(heads)
    casts = {node.output[0]: node for node in half.graph.node if node.output[0] in plugin.input[:2]}
    for i in range(2):
        cast = casts[plugin.input[i]]
        plugin.input[i] = cast.input[0]
        half.graph.node.remove(cast)
    half.graph.node.append(plugin)
    half.graph.initializer.append(anchors)
    del half.graph.input[:], half.graph.output[:], half.graph.value_info[:]
    half.graph.input.extend(detector.graph.input)
    half.graph.output.extend(detector.graph.output)
    _require_valid(half)
    return half


def _require_valid(model: Any) -> None:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"the half-precision model is not valid ONNX ({one_line(error)})") from error


def _infer_shapes(model: Any) -> None:
    """Adds the types of all tensors to ``model``; onnx alone would copy all weights several times."""
    import onnx

    outline = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    graph = outline.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    weights = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in weights)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > 1024:
            kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(kind)
        else:  # a shape can depend on its values
            graph.initializer.append(tensor)
    found = onnx.shape_inference.infer_shapes(outline)
    del model.graph.value_info[:], model.graph.output[:]
    model.graph.value_info.extend(found.graph.value_info)
    model.graph.output.extend(found.graph.output)
