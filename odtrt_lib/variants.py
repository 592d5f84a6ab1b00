"""Which ONNX model a plan is built from, who makes that model, and how the plan's layers are judged.

A variant is a precision and a form. Chapters 3 to 6, the seal, the bundle and the command line all ask the
two tables here. A precision with an ONNX model of its own is a new row; one that is made out of the fp32
model, as fp16 is, also concerns ``engine/fallback.py`` and ``engine/builder.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Mapping, Optional, Tuple

_NETWORK = "spec.json: heads, input"
_DETECTOR = "spec.json: box_coder, heads, input, nms, scores"


@dataclasses.dataclass(frozen=True)
class Form:
    """A network, with or without its post-processing.

    file: its ONNX model in the model folder. stage: who writes it, as ``log.jsonl`` names it; command: the
    command that does. spec_part: what of ``spec.json`` goes into it, as records name it; labels are in none.
    """

    file: str
    stage: str
    command: str
    spec_part: str


@dataclasses.dataclass(frozen=True)
class Precision:
    """layers: the layer precisions that count as this one where a plan is inspected; empty: none is asked
    for. own_models: form -> ONNX model, if this precision is built from a model of its own."""

    layers: Tuple[str, ...]
    own_models: Mapping[str, str] = dataclasses.field(default_factory=dict)


FORMS: Dict[str, Form] = {
    "heads": Form("heads.onnx", "convert", "convert", _NETWORK),
    "plugin": Form("detector.onnx", "fuse", "fuse", _DETECTOR),
    "onnx_nms": Form("detector_onnxnms.onnx", "fuse_onnx", "fuse --form onnx_nms", _DETECTOR),
}
PRECISIONS: Dict[str, Precision] = {"fp32": Precision(()), "fp16": Precision(("fp16", "int8"))}
# The runtime libraries by their Python modules, the preferred one first, and what they are called.
RUNTIME_LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
HARDWARE_COMPATIBILITIES = ("none", "ampere_plus", "same_compute_capability")
# What a build may be allowed to change about the plan if nothing else makes it fit.
ALLOWABLE = ("dynamic_batch", "fp32")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A plan's kind: a key of :data:`PRECISIONS` and one of :data:`FORMS`."""

    precision: str
    form: str

    @property
    def file(self) -> str:
        """The ONNX model's name in the model folder."""
        return PRECISIONS[self.precision].own_models.get(self.form, FORMS[self.form].file)

    @property
    def command(self) -> str:
        """The command of ``odtrt`` that makes the model."""
        return FORMS[self.form].command

    @property
    def layers(self) -> Tuple[str, ...]:
        """The layer precisions of which a plan must have at least half; empty if any will do."""
        return PRECISIONS[self.precision].layers


def models() -> Dict[str, Form]:
    """Every ONNX model that a model folder can hold: file name -> its form."""
    return {name: FORMS[form] for name, form in _forms_of_models().items()}


def form_of(model: str) -> Optional[str]:
    """The form of an ONNX model, by its name in the model folder; None if it is no such name."""
    return _forms_of_models().get(model)


def _forms_of_models() -> Dict[str, str]:
    return {Variant(one, form).file: form for one in PRECISIONS for form in FORMS}
