"""Image in, detections out: preprocessing, network and post-processing behind one class.

The network is run by a backend, a function from a batch of inputs to the two raw heads; what comes before
and after it is the same for all of them, and runs in the native library where that was built, else in
numpy. ``onnxruntime`` runs ``heads.onnx`` on the CPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.folder import require
from odtrt_lib.nms import postprocess
from odtrt_lib.preprocess import boxes_to_pixels, preprocess
from odtrt_lib.spec import DetectorSpec, load_spec

Heads = Tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one image, best score first: K rows.

    boxes: float32 [K, 4], ``[ymin, xmin, ymax, xmax]`` in pixels of the original image.
    scores: float32 [K]. class_ids: int64 [K], ids of the label map. names: K class names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    names: Tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Backend:
    """Something that runs the network.

    infer: float32 [B, 3, height, width] -> (box_encodings float32 [B, N, 4], class_logits float32
    [B, N, columns]), see :class:`odtrt_lib.spec.HeadsSpec`. B is ``InputSpec.batch`` where that is fixed.
    """

    name: str
    infer: Callable[[np.ndarray], Heads]


@dataclasses.dataclass(frozen=True)
class Detector:
    """One detector, ready to run. anchors: float32 [N, 4], ``(ycenter, xcenter, height, width)``."""

    spec: DetectorSpec
    anchors: np.ndarray
    backend: Backend

    @classmethod
    def open(cls, folder: Union[str, Path], backend: str = "onnxruntime") -> Detector:
        """Opens a model folder.

        backend: a name in :data:`BACKENDS`.

        Raises InputError where a file is missing, damaged or does not agree with ``spec.json``, and
        MissingDependencyError where the backend is not installed.
        """
        folder = Path(folder)
        if backend not in BACKENDS:
            raise InputError(f"backend {backend!r} is unknown; expected one of: {', '.join(BACKENDS)}")
        spec = load_spec(require(folder, "spec.json", "export"))
        anchors = load_anchors(require(folder, "anchors.npy", "export"), spec)
        return cls(spec, anchors, BACKENDS[backend](folder, spec))

    def detect(self, image: np.ndarray) -> Detections:
        """The detections in an RGB image, uint8 [height, width, 3]."""
        return self.detect_batch([image])[0]

    def detect_batch(self, images: Sequence[np.ndarray]) -> List[Detections]:
        """The detections in each of several RGB images, uint8 [height, width, 3], of any sizes.

        They go through the network together; where its batch size is fixed, that many at a time.
        """
        at_a_time = self.spec.input.batch or len(images)
        found: List[Detections] = []
        while len(found) < len(images):
            found += self._detect_at_once(images[len(found) : len(found) + at_a_time])
        return found

    def _detect_at_once(self, images: Sequence[np.ndarray]) -> List[Detections]:
        network = self.spec.input
        batch = np.zeros((network.batch or len(images), 3, network.height, network.width), np.float32)
        frames = [preprocess(image, network, out=batch[i])[1] for i, image in enumerate(images)]
        box_encodings, class_logits = self.backend.infer(batch)
        windows = np.array([frame.clip_window for frame in frames], np.float32)
        found = postprocess(
            box_encodings[: len(images)], class_logits[: len(images)], self.anchors, self.spec, windows
        )
        detections = []
        for i, frame in enumerate(frames):
            count = found.num_detections[i]
            labels = [self.spec.labels[column] for column in found.classes[i, :count]]
            detections.append(
                Detections(
                    boxes=boxes_to_pixels(found.boxes[i, :count], frame, self.spec.nms),
                    scores=found.scores[i, :count],
                    class_ids=np.array([label.id for label in labels], np.int64),
                    names=tuple(label.name for label in labels),
                )
            )
        return detections


def load_anchors(path: Path, spec: DetectorSpec) -> np.ndarray:
    """The anchors of a model folder, float32 [N, 4], ``(ycenter, xcenter, height, width)``.

    Raises InputError where the file is damaged or not what ``spec`` describes.
    """
    try:
        anchors = np.load(str(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: not a numpy array ({_first_line(error)}); run `odtrt export` again"
        ) from error
    expected = (spec.heads.num_anchors, 4)
    if anchors.shape != expected or anchors.dtype != np.float32:
        raise InputError(
            f"{path}: {anchors.dtype} {list(anchors.shape)}, expected float32 {list(expected)} "
            "as spec.json says; run `odtrt export` again"
        )
    return anchors


def _open_onnxruntime(folder: Path, spec: DetectorSpec) -> Backend:
    path = require(folder, "heads.onnx", "convert")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({_first_line(error)}): run `pip install onnxruntime`, "
            "or choose another backend"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # One level more, its blocked NCHWc kernels make rounding errors 20 times TensorFlow's on EfficientDet.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base but Exception
        raise InputError(
            f"{path}: ONNX Runtime cannot read it ({_first_line(error)}); run `odtrt convert` again"
        ) from error
    outputs = [spec.heads.box_encodings, spec.heads.class_logits]
    batch, num_anchors = spec.input.batch, spec.heads.num_anchors
    image_shape = [batch, 3, spec.input.height, spec.input.width]
    _check_tensors(path, "inputs", session.get_inputs(), {spec.input.name: image_shape})
    _check_tensors(
        path,
        "outputs",
        session.get_outputs(),
        {outputs[0]: [batch, num_anchors, 4], outputs[1]: [batch, num_anchors, spec.heads.num_columns]},
    )

    def infer(images: np.ndarray) -> Heads:
        box_encodings, class_logits = session.run(outputs, {spec.input.name: images})
        return box_encodings, class_logits

    return Backend("onnxruntime", infer)


def _check_tensors(
    path: Path, kind: str, found: Sequence[Any], expected: Dict[str, List[Optional[int]]]
) -> None:
    """``found`` are ONNX Runtime's: a dimension that is not fixed is a name or None."""
    again = "as spec.json says; run `odtrt convert` again"
    names = [tensor.name for tensor in found]
    if sorted(names) != sorted(expected):
        raise InputError(f"{path}: {kind} {', '.join(names)}, expected {', '.join(expected)} {again}")
    for tensor in found:
        shape = expected[tensor.name]
        fixed = [size if isinstance(size, int) else None for size in tensor.shape]
        agrees = len(fixed) == len(shape) and all(
            one == other or (one is None and kind == "outputs") for one, other in zip(fixed, shape)
        )
        if tensor.type != "tensor(float)" or not agrees:
            raise InputError(
                f"{path}: {tensor.name} is {tensor.type} {_shape_text(fixed)}, "
                f"expected tensor(float) {_shape_text(shape)} {again}"
            )


def _shape_text(shape: Sequence[Optional[int]]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


BACKENDS: Dict[str, Callable[[Path, DetectorSpec], Backend]] = {"onnxruntime": _open_onnxruntime}
"""What can run the network: name -> function that opens a model folder's network."""
