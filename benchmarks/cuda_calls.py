"""Calls of the library's CUDA functions: by torch_calls.py on a GPU, by test_kernels_emulated.py emulated.

Needs no pytest and no PyTorch. ``to_device(array)`` is a copy where kernels reach it, aligned to 16 bytes: a
tensor of PyTorch, or anything else that has ``data_ptr()`` and ``cpu().numpy()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nms_cases
import numpy as np

from odtrt_lib import native, nms
from odtrt_lib.spec import InputSpec

ToDevice = Callable[[np.ndarray], Any]


class Postprocess:
    """One case's buffers; ``enqueue_on`` a stream runs it, ``result`` fetches what it wrote."""

    def __init__(self, library: native.Library, case: nms_cases.Case, to_device: ToDevice) -> None:
        self.library = library
        self.params = native.postprocess_params(case.spec)
        self.batch, most = len(case.box_encodings), case.spec.nms.max_total_detections
        self.inputs = [
            to_device(array)
            for array in (case.box_encodings, case.class_logits, case.anchors, case.clip_windows)
        ]
        # What is there before must not matter: fill everything with a pattern.
        self.outputs = [
            to_device(np.full((self.batch, *shape), -7, dtype))
            for shape, dtype in (
                ((), np.int32),
                ((most, 4), np.float32),
                ((most,), np.float32),
                ((most,), np.int32),
                ((most,), np.int32),
            )
        ]
        self.workspace_size = native.postprocess_workspace(library, self.params, self.batch)
        self.workspace = to_device(np.full(self.workspace_size, 0xAB, np.uint8))
        dtype = native.FLOAT16 if case.class_logits.dtype == np.float16 else native.FLOAT32
        boxes, logits, anchors, windows = (tensor.data_ptr() for tensor in self.inputs)
        self.heads = native.HeadPointers(boxes, logits, dtype, anchors, windows)
        self.out = native.DetectionPointers(*(tensor.data_ptr() for tensor in self.outputs))

    def enqueue_on(self, stream: int) -> None:
        native.postprocess_cuda(
            self.library,
            self.params,
            self.batch,
            self.heads,
            self.out,
            self.workspace.data_ptr(),
            self.workspace_size,
            stream,
        )

    def result(self) -> nms.Postprocessed:
        return nms.Postprocessed(*(tensor.cpu().numpy() for tensor in self.outputs))


def select(library: native.Library, case: nms_cases.NmsCase, to_device: ToDevice, stream: int) -> np.ndarray:
    """The indices that ``odtrt_nms_cuda`` keeps."""
    count = len(case.boxes)
    most = max(1, count if case.max_kept is None else case.max_kept)
    params = native.NmsParams(count, most, case.score_threshold, case.iou_threshold)
    boxes, scores = to_device(case.boxes), to_device(case.scores)
    classes = None if case.classes is None else to_device(case.classes)
    kept, num_kept = to_device(np.full(most, -7, np.int32)), to_device(np.full(1, -7, np.int32))
    size = native.nms_workspace(library, params)
    workspace = to_device(np.full(size, 0xAB, np.uint8))
    native.nms_cuda(
        library,
        params,
        boxes.data_ptr(),
        scores.data_ptr(),
        None if classes is None else classes.data_ptr(),
        kept.data_ptr(),
        num_kept.data_ptr(),
        workspace.data_ptr(),
        size,
        stream,
    )
    indices, number = kept.cpu().numpy(), int(num_kept.cpu().numpy()[0])
    assert (indices[number:] == -1).all(), case.name
    return indices[:number]


def preprocess_difference(
    library: native.Library,
    image: np.ndarray,
    spec: InputSpec,
    true_size: tuple[int, int],
    to_device: ToDevice,
    stream: int,
    dtype: type = np.float32,
) -> str:
    """Where ``odtrt_preprocess_cuda`` does not give the CPU library's bits; empty where it does."""
    expected = np.empty((3, spec.height, spec.width), dtype)
    native.preprocess_cpu(library, image, spec, true_size, expected)
    on_device, output = to_device(image), to_device(np.full(expected.shape, -7, dtype))
    number = native.FLOAT16 if dtype == np.float16 else native.FLOAT32
    params = native.preprocess_params(spec, image.shape[:2], true_size, dtype=number)
    native.preprocess_cuda(library, params, on_device.data_ptr(), output.data_ptr(), stream)
    found = output.cpu().numpy()
    if expected.tobytes() == found.tobytes():
        return ""
    return f"{image.shape} -> {true_size}: {np.abs(expected - found).max()}"
