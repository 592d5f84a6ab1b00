"""Chapter 4: ``heads.onnx`` -> ``detector.onnx``, the network with its post-processing inside.

Two forms with the same inputs and outputs:

* ``plugin``: ``detector.onnx``, one node ``OdtrtDetect`` behind the heads. TensorRT runs it with odtrt's
  plugin (``plugins/tensorrt``), which computes what :func:`odtrt_lib.nms.postprocess` computes, bit for bit.
* ``onnx``: ``detector_onnxnms.onnx``, the same in ONNX's own operators around NonMaxSuppression, for those
  who cannot load a plugin.

Inputs: ``image`` as in ``heads.onnx``; where the resizer pads the image, also ``clip_windows``, float32
``[batch, 4]``, ``Frame.clip_window`` of each image (elsewhere it is 0, 0, 1, 1 and left out). Outputs:
``num_detections`` int32 ``[batch]``, ``boxes`` float32 ``[batch, M, 4]``, ``scores`` float32 ``[batch, M]``
and ``classes`` int32 ``[batch, M]``, as in :class:`odtrt_lib.nms.Postprocessed`.

Limits of the ``onnx`` form:

* In ONNX Runtime it selects what the OD API selects, ties included, given equal scores and boxes. Exp,
  sigmoid and softmax are ONNX Runtime's own, a few units in the last place away from odtrt's, so scores
  that differ by less can change places, and boxes whose IoU is as close to the threshold, their fate.
* TensorRT's NonMaxSuppression (``INMSLayer``) is another algorithm: it looks at 5000 pairs of box and class
  of an image at most and leaves the order of equal scores open. TensorRT-RTX 1.7.1 cannot build it at all.
* The scores of all anchors and classes are written out once more: 4 * num_anchors * num_classes bytes an
  image.
* A score that is NaN is left out, as ever, but class-agnostic the best class of an anchor with NaN among its
  scores is up to the runtime.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

import numpy as np

from odtrt_lib import folder as folders
from odtrt_lib.errors import CheckError, InputError, MissingDependencyError, one_line
from odtrt_lib.native import MOST_DETECTIONS, SCORE_CONVERTERS
from odtrt_lib.spec import DetectorSpec, load_spec
from odtrt_lib.tensors import load_anchors

if TYPE_CHECKING:
    import onnx
    from onnx_graphsurgeon import Graph, Variable

FORMS = {"plugin": "detector.onnx", "onnx": "detector_onnxnms.onnx"}
PLUGIN, DOMAIN, PLUGIN_VERSION = "OdtrtDetect", "odtrt", "1"
CLIP_WINDOWS = "clip_windows"
OUTPUTS = ("num_detections", "boxes", "scores", "classes")
INTEGER_OUTPUTS = ("num_detections", "classes")

_STAGES = {"plugin": "fuse", "onnx": "fuse_onnx"}
_RTX: List[Any] = []  # what must stay for as long as the process lives
_NOT_SELECTED = float(np.finfo(np.float32).min)


def fuse(folder: Union[str, Path], *, form: str = "plugin", force: bool = False) -> folders.StageResult:
    """Writes :data:`FORMS` ``[form]`` from ``heads.onnx``, ``anchors.npy`` and ``spec.json``.

    form: ``plugin`` or ``onnx``; see the module. force: write even if the file is up to date. The same inputs
    give the same bytes.

    Raises InputError for another form and where an input is missing, damaged or does not match
    ``spec.json``, MissingDependencyError without onnx or onnx-graphsurgeon, CheckError where the ONNX checker
    refuses the outcome; nothing is written then.
    """
    started = time.monotonic()
    folder = Path(folder)
    if form not in FORMS:
        raise InputError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    name = FORMS[form]
    files = folders.sealed(folder, "heads.onnx", "anchors.npy", "spec.json")
    spec = load_spec(folder / "spec.json", files["spec.json"])
    inputs = folders.made_from(name, files)
    settings = {"form": form}
    record = None if force else folders.up_to_date(folder, _STAGES[form], inputs, settings)
    if record is not None:
        return folders.StageResult(record, is_up_to_date=True)

    heads = _load_heads(folder / "heads.onnx", spec, files["heads.onnx"])
    anchors = load_anchors(folder / "anchors.npy", spec, files["anchors.npy"])
    with folders.staging(folder) as staged:
        fused = with_plugin(heads, spec, anchors) if form == "plugin" else with_onnx_nms(heads, spec, anchors)
        _require_valid(folder / name, fused)
        (staged / name).write_bytes(fused.SerializeToString(deterministic=True))
        record = folders.write_record(
            folder,
            _STAGES[form],
            staged=staged,
            inputs=inputs,
            settings=settings,
            outputs=[name],
            versions={each: importlib.metadata.version(each) for each in ("onnx", "onnx-graphsurgeon")},
            seconds=time.monotonic() - started,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            checks={
                "onnx_checker": "full check passed",
                "nodes": len(fused.graph.node),
                "nodes_of_heads": len(heads.graph.node),
                "inputs": [value.name for value in fused.graph.input],
                "attributes": plugin_attributes(spec) if form == "plugin" else None,
            },
        )
    return folders.StageResult(record, is_up_to_date=False)


def has_clip_windows(spec: DetectorSpec) -> bool:
    """Whether the image can cover less than the whole network input, so that its window must be given."""
    return spec.input.resizer.kind == "keep_aspect_ratio" and spec.input.resizer.pad_to_max_dimension


def plugin_attributes(spec: DetectorSpec) -> Dict[str, Any]:
    """The attributes of ``OdtrtDetect``: the fields of ``odtrt_postprocess_params`` that no shape gives.

    Raises InputError where ``spec`` asks for more than the plugin does.
    """
    nms, coder = spec.nms, spec.box_coder
    if spec.scores.converter not in SCORE_CONVERTERS:
        raise InputError(
            f"score converter {spec.scores.converter!r} is unknown; expected one of "
            f"{', '.join(SCORE_CONVERTERS)}: run `odtrt export` again"
        )
    if not 1 <= nms.max_total_detections <= MOST_DETECTIONS:
        raise InputError(
            f"max_total_detections is {nms.max_total_detections}, the plugin gives 1 to {MOST_DETECTIONS}; "
            "lower it in the pipeline.config and run `odtrt export` again"
        )
    return {
        "background_column": int(spec.heads.background_column),
        "score_converter": SCORE_CONVERTERS[spec.scores.converter],
        "logit_factor": float(np.float32(1.0 / spec.scores.logit_scale)),
        "box_scales": [coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale],
        "score_threshold": nms.score_threshold,
        "iou_threshold": nms.iou_threshold,
        "max_detections_per_class": nms.max_detections_per_class,
        "max_total_detections": nms.max_total_detections,
        "class_agnostic": int(nms.class_agnostic),
        "change_coordinate_frame": int(nms.change_coordinate_frame),
    }


def with_plugin(heads: onnx.ModelProto, spec: DetectorSpec, anchors: np.ndarray) -> onnx.ModelProto:
    """The ONNX model ``heads`` with one ``OdtrtDetect`` node behind it, as a new model.

    anchors: float32 [num_anchors, 4].
    """
    import onnx_graphsurgeon as gs

    attributes = plugin_attributes(spec)
    graph = _import(heads)
    inputs = [*graph.outputs, gs.Constant("anchors", np.ascontiguousarray(anchors, np.float32))]
    if has_clip_windows(spec):
        inputs.append(_add_clip_windows(graph))
    outputs = _output_variables(spec, graph.outputs[0].shape[0])
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
    return _export(graph, heads)


def half_precision(detector: onnx.ModelProto) -> onnx.ModelProto:
    """``detector.onnx`` with the network in half precision, as a new model.

    The plugin reads the network's float16 outputs as they are: TensorRT inserts no casts, and none is needed.
    Anchors, clip windows and detections stay float32. Raises what :func:`odtrt_lib.engine.half_precision`
    raises.
    """
    import onnx

    from odtrt_lib import engine

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
    half = engine.half_precision(heads)
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
    _require_valid(Path(FORMS["plugin"]), half)
    return half


def let_rtx_find_itself() -> None:
    """Makes TensorRT-RTX 1.7 able to parse a plugin's node; call it before ``tensorrt_rtx`` is imported.

    Its parser loads ``libtensorrt_rtx.so``, a name that its wheel does not have, and ends the process where
    that fails. The libraries are loaded here through links in a temporary folder, which has that name too.

    Raises MissingDependencyError where it is too late.
    """
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    if _RTX or package is None or package.origin is None:
        return
    if "tensorrt_rtx" in sys.modules:
        raise MissingDependencyError(
            "tensorrt_rtx is imported already and cannot load plugins: "
            "call odtrt_lib.fuse.let_rtx_find_itself() before the import"
        )
    folder = tempfile.TemporaryDirectory(prefix="odtrt-rtx-")
    _RTX.append(folder)
    for library in Path(package.origin).parent.glob("lib*.so.*"):
        linked = Path(folder.name) / library.name
        linked.symlink_to(library)
        if library.name.startswith("libtensorrt_rtx.so"):
            (Path(folder.name) / "libtensorrt_rtx.so").symlink_to(library)
    for name in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
        _RTX.extend(ctypes.CDLL(str(path)) for path in Path(folder.name).glob(name))


def with_onnx_nms(heads: onnx.ModelProto, spec: DetectorSpec, anchors: np.ndarray) -> onnx.ModelProto:
    """The ONNX model ``heads``, float32, with its post-processing in ONNX operators, as a new model.

    anchors: float32 [num_anchors, 4]. NonMaxSuppression's selection is scattered into an array of all classes
    and anchors in that order, and TopK, which takes the lower index of equal values, cuts it: the OD API's
    order of equal scores.
    """
    graph = _import(heads)
    encodings, logits = graph.outputs
    nms, num_anchors, most = spec.nms, spec.heads.num_anchors, spec.nms.max_total_detections
    windows = _add_clip_windows(graph) if has_clip_windows(spec) else None
    boxes = _decode(graph, encodings, spec, anchors)
    clipped = _clip(graph, boxes, windows)
    scores = _scores_by_class(graph, logits, spec)  # [B, C, N]
    rivals = _add(graph, "ReduceMax", [scores], axes=[1], keepdims=1) if nms.class_agnostic else scores
    num_rows = 1 if nms.class_agnostic else spec.heads.num_classes
    most_of_a_row = most if nms.class_agnostic else nms.max_detections_per_class

    selected = _add(
        graph,
        "NonMaxSuppression",
        [
            boxes,
            rivals,
            np.array([most_of_a_row], np.int64),
            np.array([nms.iou_threshold], np.float32),
            np.array([nms.score_threshold], np.float32),
        ],
        dtype=np.int64,
    )  # [selected, 3]: image, row, anchor
    nothing = _add(graph, "Expand", [_constant(_NOT_SELECTED), _add(graph, "Shape", [rivals], np.int64)])
    left = _add(graph, "ScatterND", [nothing, selected, _add(graph, "GatherND", [rivals, selected])])
    left = _add(graph, "Where", [_has_area(graph, clipped), left, _constant(_NOT_SELECTED)])
    flat = _add(graph, "Reshape", [left, np.array([-1, num_rows * num_anchors], np.int64)])

    count = min(most, num_rows * num_anchors)
    best, places = _add_many(
        graph, "TopK", [flat, np.array([count], np.int64)], (np.float32, np.int64), axis=1
    )
    is_real = _add(graph, "Greater", [best, _constant(_NOT_SELECTED)], np.bool_)
    own_anchors = _add(graph, "Mod", [places, np.array(num_anchors, np.int64)], np.int64)
    where = _add(graph, "Unsqueeze", [own_anchors, np.array([2], np.int64)], np.int64)
    own_boxes = _add(graph, "GatherND", [_in_frame(graph, clipped, windows, spec), where], batch_dims=1)
    if nms.class_agnostic:
        of_all = _add(graph, "ArgMax", [scores], np.int64, axis=1, keepdims=0)  # [B, N]
        own_classes = _add(graph, "GatherND", [of_all, where], np.int64, batch_dims=1)
    else:
        own_classes = _add(graph, "Div", [places, np.array(num_anchors, np.int64)], np.int64)
    one_box = _add(graph, "Unsqueeze", [is_real, np.array([2], np.int64)], np.bool_)
    found = {
        "boxes": _add(graph, "Where", [one_box, own_boxes, _constant(0.0)]),
        "scores": _add(graph, "Where", [is_real, best, _constant(0.0)]),
        "classes": _add(graph, "Where", [is_real, own_classes, np.array(0, np.int64)], np.int64),
    }
    if count < most:
        for name, tensor in found.items():
            zero = np.array(0, np.int64 if name == "classes" else np.float32)
            rank = 3 if name == "boxes" else 2
            padding = np.zeros((2, rank), np.int64)
            padding[1, 1] = most - count
            found[name] = _add(graph, "Pad", [tensor, padding.ravel(), zero], zero.dtype)
    ones = _add(graph, "Cast", [is_real], np.int32, to=6)
    outputs = _output_variables(spec, encodings.shape[0])
    sources = {"num_detections": (ones, "ReduceSum"), **{name: (found[name], "") for name in found}}
    for output in outputs:
        tensor, reduction = sources[output.name]
        if reduction:
            _append(graph, "ReduceSum", [tensor, np.array([1], np.int64)], [output], keepdims=0)
        elif output.dtype == np.int32:
            _append(graph, "Cast", [tensor], [output], to=6)
        else:
            _append(graph, "Identity", [tensor], [output])
    graph.outputs = outputs
    return _export(graph, heads)


def _decode(graph: Graph, encodings: Variable, spec: DetectorSpec, anchors: np.ndarray) -> Variable:
    """``odtrt_lib.nms.decode_boxes`` in ONNX: float32 [B, N, 4]."""
    coder = spec.box_coder
    centre, size = anchors[:, :2].astype(np.float32), anchors[:, 2:].astype(np.float32)
    halves = [
        _add(
            graph,
            "Slice",
            [encodings, *(np.array([number], np.int64) for number in (start, start + 2, 2))],
        )
        for start in (0, 2)
    ]
    shift = _add(graph, "Div", [halves[0], np.array([coder.y_scale, coder.x_scale], np.float32)])
    growth = _add(graph, "Div", [halves[1], np.array([coder.height_scale, coder.width_scale], np.float32)])
    half = _add(
        graph,
        "Mul",
        [_add(graph, "Mul", [_add(graph, "Exp", [growth]), size]), np.array(0.5, np.float32)],
    )
    middle = _add(graph, "Add", [_add(graph, "Mul", [shift, size]), centre])
    corners = [_add(graph, operation, [middle, half]) for operation in ("Sub", "Add")]
    return _add(graph, "Concat", corners, axis=2)


def _scores_by_class(graph: Graph, logits: Variable, spec: DetectorSpec) -> Variable:
    """``odtrt_lib.nms.convert_scores`` without the background, as float32 [B, C, N]."""
    scores = logits
    if spec.scores.logit_scale != 1:
        scores = _add(graph, "Mul", [scores, np.array(1.0 / spec.scores.logit_scale, np.float32)])
    if spec.scores.converter == "sigmoid":
        scores = _add(graph, "Sigmoid", [scores])
    elif spec.scores.converter == "softmax":
        scores = _add(graph, "Softmax", [scores], axis=2)
    if spec.heads.background_column:
        limits = (1, spec.heads.num_columns, 2)
        scores = _add(graph, "Slice", [scores, *(np.array([number], np.int64) for number in limits)])
    return _add(graph, "Transpose", [scores], perm=[0, 2, 1])


def _clip(graph: Graph, boxes: Variable, windows: Optional[Variable]) -> Variable:
    if windows is None:
        return _add(graph, "Clip", [boxes, _constant(0.0), _constant(1.0)])
    lower, upper = _corners_of(graph, windows)
    return _add(graph, "Max", [_add(graph, "Min", [boxes, upper]), lower])


def _has_area(graph: Graph, boxes: Variable) -> Variable:
    """bool [B, 1, N]."""
    lower, upper = (
        _add(graph, "Slice", [boxes, *(np.array([number], np.int64) for number in (start, start + 2, 2))])
        for start in (0, 2)
    )
    area = _add(graph, "ReduceProd", [_add(graph, "Sub", [upper, lower])], axes=[2], keepdims=0)
    is_visible = _add(graph, "Greater", [area, _constant(0.0)], np.bool_)
    return _add(graph, "Unsqueeze", [is_visible, np.array([1], np.int64)], np.bool_)


def _in_frame(graph: Graph, boxes: Variable, windows: Optional[Variable], spec: DetectorSpec) -> Variable:
    if windows is None or not spec.nms.change_coordinate_frame:
        return boxes
    lower, upper = _corners_of(graph, windows)
    factor = _add(graph, "Div", [_constant(1.0), _add(graph, "Sub", [upper, lower])])
    return _add(graph, "Mul", [_add(graph, "Sub", [boxes, lower]), factor])


def _corners_of(graph: Graph, windows: Variable) -> Tuple[Variable, Variable]:
    """The windows' first corners and their second ones, each twice: float32 [B, 1, 4]."""
    first, second = (
        _add(graph, "Gather", [windows, np.array([columns], np.int64)], axis=1)
        for columns in ([0, 1, 0, 1], [2, 3, 2, 3])
    )
    return first, second


# ---- Graphs -----------------------------------------------------------------------------------------------


def _constant(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _add(graph: Graph, operation: str, inputs: List[Any], dtype: Any = np.float32, **attributes: Any) -> Any:
    return _add_many(graph, operation, inputs, (dtype,), **attributes)[0]


def _add_many(
    graph: Graph, operation: str, inputs: List[Any], dtypes: Tuple[Any, ...], **attributes: Any
) -> List[Any]:
    import onnx_graphsurgeon as gs

    name = f"postprocess/{operation}_{len(graph.nodes)}"
    outputs = [gs.Variable(f"{name}:{i}", dtype=dtype) for i, dtype in enumerate(dtypes)]
    _append(graph, operation, inputs, outputs, **attributes)
    return outputs


def _append(graph: Graph, operation: str, inputs: List[Any], outputs: List[Any], **attributes: Any) -> None:
    import onnx_graphsurgeon as gs

    name = f"postprocess/{operation}_{len(graph.nodes)}"
    tensors = [
        gs.Constant(f"{name}/constant_{i}", value) if isinstance(value, np.ndarray) else value
        for i, value in enumerate(inputs)
    ]
    graph.nodes.append(gs.Node(op=operation, name=name, attrs=attributes, inputs=tensors, outputs=outputs))


def _add_clip_windows(graph: Graph) -> Variable:
    import onnx_graphsurgeon as gs

    windows = gs.Variable(CLIP_WINDOWS, dtype=np.float32, shape=(graph.inputs[0].shape[0], 4))
    graph.inputs.append(windows)
    return windows


def _output_variables(spec: DetectorSpec, batch: Union[int, str]) -> List[Any]:
    import onnx_graphsurgeon as gs

    most = spec.nms.max_total_detections
    shapes: Dict[str, Tuple[Any, ...]] = {
        "num_detections": (batch,),
        "boxes": (batch, most, 4),
        "scores": (batch, most),
        "classes": (batch, most),
    }
    return [
        gs.Variable(name, dtype=np.int32 if name in INTEGER_OUTPUTS else np.float32, shape=shapes[name])
        for name in OUTPUTS
    ]


def _import(heads: onnx.ModelProto) -> Graph:
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(heads)
    graph.import_domains = None  # else the node's domain would be written into `heads`
    for name in {"anchors", CLIP_WINDOWS, *OUTPUTS} & set(graph.tensors()):
        graph.tensors()[name].name = f"heads/{name}"
    return graph


def _export(graph: Graph, heads: onnx.ModelProto) -> onnx.ModelProto:
    """The model of ``graph``, described as ``heads`` is, without what no output needs."""
    import onnx_graphsurgeon as gs

    graph.name = "detector"
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    fused = gs.export_onnx(graph, do_type_check=False, ir_version=heads.ir_version)
    fused.producer_name, fused.producer_version = heads.producer_name, heads.producer_version
    del fused.graph.value_info[:]
    return fused


# ---- Files ------------------------------------------------------------------------------------------------


def _load_heads(path: Path, spec: DetectorSpec, content: bytes) -> onnx.ModelProto:
    try:
        import onnx
        import onnx_graphsurgeon  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"onnx and onnx-graphsurgeon are needed to fuse ({error}): run `make install`"
        ) from error
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX model; run `odtrt convert` again") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise InputError(f"{path}: has weights in another file, which is not sealed; save it as one file")
    batch = "batch" if spec.input.batch is None else spec.input.batch
    heads = spec.heads
    expected = {
        spec.input.name: [batch, 3, spec.input.height, spec.input.width],
        heads.box_encodings: [batch, heads.num_anchors, 4],
        heads.class_logits: [batch, heads.num_anchors, heads.num_columns],
    }
    found = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    if found != expected or [value.name for value in model.graph.output] != list(expected)[1:]:
        raise InputError(
            f"{path}: inputs and outputs {found}, but spec.json describes {expected}; "
            "run `odtrt convert` again"
        )
    return model


def _require_valid(name: Path, model: onnx.ModelProto) -> None:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckError(f"{name}: not a valid ONNX model: {one_line(error)}; nothing was written") from error
