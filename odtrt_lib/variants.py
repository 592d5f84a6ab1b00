"""From which ONNX model a plan is built, which stage makes that model, and how the plan's layers are checked.

A variant is a precision and a form. Chapters 3 to 6, the seal, the bundle and the command line use the two
tables here. A new precision with ONNX models of its own, as int8, needs a new row only. One that is made from
the fp32 model, as fp16 is, also needs changes in ``engine/fallback.py`` and ``engine/builder.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Mapping, Optional, Tuple

_NETWORK = "spec.json: heads, input"
_DETECTOR = "spec.json: box_coder, heads, input, nms, scores"


@dataclasses.dataclass(frozen=True)
class Form:
    """A network, with or without post-processing.

    file: its ONNX model in the model folder. stage: the stage that writes it, as named in ``log.jsonl``.
    command: the command that does so. spec_part: the part of ``spec.json`` that goes into it, as records name
    it; labels never do.
    """

    file: str
    stage: str
    command: str
    spec_part: str


@dataclasses.dataclass(frozen=True)
class Precision:
    """layers: the layer precisions that count as this one when a plan is inspected; empty: any will do.
    own_models: form -> its ONNX model, if this precision is built from models of its own."""

    layers: Tuple[str, ...]
    own_models: Mapping[str, Form] = dataclasses.field(default_factory=dict)


FORMS: Dict[str, Form] = {
    "heads": Form("heads.onnx", "convert", "convert", _NETWORK),
    "plugin": Form("detector.onnx", "fuse", "fuse", _DETECTOR),
    "onnx_nms": Form("detector_onnxnms.onnx", "fuse_onnx", "fuse --form onnx_nms", _DETECTOR),
}
_INT8 = {
    "heads": Form("heads_int8.onnx", "quantise", "quantise", _NETWORK),
    "plugin": Form("detector_int8.onnx", "fuse_int8", "fuse --precision int8", _DETECTOR),
    "onnx_nms": Form(
        "detector_onnxnms_int8.onnx",
        "fuse_onnx_int8",
        "fuse --precision int8 --form onnx_nms",
        _DETECTOR,
    ),
}
PRECISIONS: Dict[str, Precision] = {
    "fp32": Precision(()),
    "fp16": Precision(("fp16", "int8")),
    "int8": Precision(("int8",), _INT8),
}
# The Python modules of the runtime libraries, the preferred one first -> the libraries' names.
RUNTIME_LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
HARDWARE_COMPATIBILITIES = ("none", "ampere_plus", "same_compute_capability")
CALIBRATORS = ("mse", "minmax", "percentile", "entropy")
"""How INT8's ranges are chosen, see :mod:`odtrt_lib.int8.calibrate`; the default first."""
# Changes to the plan that a caller may allow a build to make if memory does not suffice otherwise.
ALLOWABLE = ("dynamic_batch", "fp32")


@dataclasses.dataclass(frozen=True)
class Variant:
    """The kind of a plan: a key of :data:`PRECISIONS`, and a key of :data:`FORMS`."""

    precision: str
    form: str

    @property
    def model(self) -> Form:
        """The ONNX model that it is built from."""
        return PRECISIONS[self.precision].own_models.get(self.form, FORMS[self.form])

    @property
    def file(self) -> str:
        """The ONNX model's name in the model folder."""
        return self.model.file

    @property
    def command(self) -> str:
        """The command of ``odtrt`` that makes the model."""
        return self.model.command

    @property
    def layers(self) -> Tuple[str, ...]:
        """The precisions that at least half of a plan's layers must have; empty if any will do."""
        return PRECISIONS[self.precision].layers


def models() -> Dict[str, Form]:
    """Every ONNX model that a model folder can contain: file name -> what it is."""
    return {one.file: one for one in (Variant(p, form).model for p in PRECISIONS for form in FORMS)}


def form_of(model: str) -> Optional[str]:
    """The form of an ONNX model, by its file name in the model folder; None if no form has this name."""
    variants = (Variant(precision, form) for precision in PRECISIONS for form in FORMS)
    return next((one.form for one in variants if one.file == model), None)
