"""Names, shapes and types of a detector's inputs and outputs, stated once.

The code for ONNX, TensorRT, the kernels, Triton and DeepStream uses them. :mod:`odtrt_lib.spec` describes
boxes and scores. The outputs of ``detector.onnx`` are those of :class:`odtrt_lib.nms.Postprocessed`.
"""

from __future__ import annotations

import dataclasses
from typing import Callable, Dict, Optional, Tuple

from odtrt_lib.spec import DetectorSpec, SsdHeads

# The name of the ONNX node of the post-processing and of the plugin; the domain of both; the version.
PLUGIN, DOMAIN, PLUGIN_VERSION = "OdtrtDetect", "odtrt", "1"
CLIP_WINDOWS = "clip_windows"
DETECTIONS = ("num_detections", "boxes", "scores", "classes")

Shape = Tuple[Optional[int], ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of a network. shape: the batch is first, None if it is dynamic.

    dtype: numpy's name, ``float32`` or ``int32``.
    """

    name: str
    shape: Shape
    dtype: str = "float32"

    def with_batch(self, batch: int) -> Tuple[int, ...]:
        """The shape of an array that holds ``batch`` images."""
        return (batch, *(size for size in self.shape[1:] if size is not None))


@dataclasses.dataclass(frozen=True)
class Tensors:
    """All inputs and all outputs of a network, in the network's order."""

    inputs: Tuple[Tensor, ...]
    outputs: Tuple[Tensor, ...]

    @property
    def all(self) -> Tuple[Tensor, ...]:
        return (*self.inputs, *self.outputs)

    @property
    def shapes(self) -> Dict[str, Shape]:
        return {tensor.name: tensor.shape for tensor in self.all}


def heads_tensors(spec: DetectorSpec) -> Tensors:
    """Those of ``heads.onnx``: from the normalised image to raw heads, float32."""
    return Tensors((_image(spec),), _OUTPUTS[spec.heads.family](spec.heads, spec.input.batch))


def detector_tensors(spec: DetectorSpec) -> Tensors:
    """Those of ``detector.onnx``: from the normalised image to detections. They are the same for every
    family. M is ``nms.max_total_detections``.

    If the image may cover less than the whole network input, its window is an input too.
    """
    batch, most = spec.input.batch, spec.nms.max_total_detections
    windows = (Tensor(CLIP_WINDOWS, (batch, 4)),) if has_clip_windows(spec) else ()
    return Tensors(
        (_image(spec), *windows),
        (
            Tensor("num_detections", (batch,), "int32"),
            Tensor("boxes", (batch, most, 4)),
            Tensor("scores", (batch, most)),
            Tensor("classes", (batch, most), "int32"),
        ),
    )


def has_clip_windows(spec: DetectorSpec) -> bool:
    """Whether the image may cover less than the whole network input, so that its window must be an input."""
    return spec.input.resizer.kind == "keep_aspect_ratio" and spec.input.resizer.pad_to_max_dimension


def _image(spec: DetectorSpec) -> Tensor:
    return Tensor(spec.input.name, (spec.input.batch, 3, spec.input.height, spec.input.width))


def _ssd_outputs(heads: SsdHeads, batch: Optional[int]) -> Tuple[Tensor, ...]:
    return (
        Tensor(heads.box_encodings, (batch, heads.num_anchors, 4)),
        Tensor(heads.class_logits, (batch, heads.num_anchors, heads.num_columns)),
    )


# Family of heads -> the outputs of heads.onnx.
_OUTPUTS: Dict[str, Callable[..., Tuple[Tensor, ...]]] = {SsdHeads.family: _ssd_outputs}
