"""Chapter 4: ``heads.onnx`` -> ``detector.onnx``, a network that does its post-processing too.

There are two forms with the same inputs and outputs:

* ``plugin``: ``detector.onnx``, with one node ``OdtrtDetect`` behind the heads. TensorRT runs it with odtrt's
  plugin (``plugins/tensorrt``), which computes what :func:`odtrt_lib.nms.postprocess` computes, bit for bit.
* ``onnx_nms``: ``detector_onnxnms.onnx``, with ONNX's own operators around NonMaxSuppression, for runtimes
  that cannot load a plugin. :mod:`odtrt_lib.fuse.onnx_form` states its limits.

Inputs: ``image`` as in ``heads.onnx``; if the resizer pads the image, also ``clip_windows``, float32
``[batch, 4]``, the ``Frame.clip_window`` of each image (otherwise every window is 0, 0, 1, 1). Outputs:
``num_detections`` int32 ``[batch]``, ``boxes`` float32 ``[batch, M, 4]``, ``scores`` float32 ``[batch, M]``
and ``classes`` int32 ``[batch, M]``, as in :class:`odtrt_lib.nms.Postprocessed`.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Union

from odtrt_lib import folder as folders
from odtrt_lib import onnx_model
from odtrt_lib.anchors import load_anchors
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.fuse.onnx_form import with_onnx_nms
from odtrt_lib.fuse.plugin import plugin_attributes, with_plugin
from odtrt_lib.spec import DetectorSpec, load_spec
from odtrt_lib.tensors import heads_tensors
from odtrt_lib.variants import FORMS, PRECISIONS, Variant

if TYPE_CHECKING:
    import onnx

FUSED = tuple(name for name in FORMS if name != "heads")


def fuse(
    folder: Union[str, Path], *, form: str = "plugin", precision: str = "fp32", force: bool = False
) -> folders.StageResult:
    """Writes ``detector.onnx``, or the other form's file, from the heads, the anchors and ``spec.json``.

    form: one of :data:`FUSED`. precision: ``int8`` writes ``detector_int8.onnx`` from ``heads_int8.onnx``;
    the others take the heads in single precision. force: write even if the file is up to date. The same
    inputs give the same bytes.

    Raises InputError for another form or precision, and if an input is missing, damaged or does not match
    ``spec.json``; MissingDependencyError without onnx or onnx-graphsurgeon; CheckError if the ONNX checker
    refuses the result. Nothing is written then.
    """
    folder = Path(folder)
    if form not in FUSED:
        raise InputError(f"form {form!r}: expected one of {', '.join(FUSED)}")
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    source, target = Variant(precision, "heads").file, Variant(precision, form).model
    name = target.file
    files = folders.sealed(folder, source, "anchors.npy", "spec.json")
    spec = load_spec(folder / "spec.json", files["spec.json"])
    stage = folders.Stage(folder, target.stage, folders.made_from(name, files), {"form": form})
    record = stage.finished(force)
    if record is not None:
        return folders.StageResult(record, is_up_to_date=True)

    heads = _load_heads(folder / source, spec, files[source])
    anchors = load_anchors(folder / "anchors.npy", spec, files["anchors.npy"])
    with folders.staging(folder) as staged:
        fused = with_plugin(heads, spec, anchors) if form == "plugin" else with_onnx_nms(heads, spec, anchors)
        onnx_model.require_valid(folder / name, fused)
        (staged / name).write_bytes(fused.SerializeToString(deterministic=True))
        record = stage.record(
            staged,
            outputs=[name],
            versions={each: importlib.metadata.version(each) for each in ("onnx", "onnx-graphsurgeon")},
            checks={
                "onnx_checker": "full check passed",
                "nodes": len(fused.graph.node),
                "nodes_of_heads": len(heads.graph.node),
                "inputs": [value.name for value in fused.graph.input],
                "attributes": plugin_attributes(spec) if form == "plugin" else None,
            },
        )
    return folders.StageResult(record, is_up_to_date=False)


def _load_heads(path: Path, spec: DetectorSpec, content: bytes) -> onnx.ModelProto:
    try:
        import onnx_graphsurgeon  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"onnx-graphsurgeon is needed to fuse ({error}): run `make install`"
        ) from error
    model = onnx_model.load(path, content, "fuse")
    expected = {
        name: ["batch" if size is None else size for size in shape]
        for name, shape in heads_tensors(spec).shapes.items()
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
