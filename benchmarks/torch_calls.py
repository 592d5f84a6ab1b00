"""The CUDA kernels on PyTorch's GPU memory and stream, and the CPU library beside them.

Needs an NVIDIA GPU, PyTorch, and libodtrt.so with CUDA; no pytest.
"""

from __future__ import annotations

from typing import Any

import cuda_calls
import nms_cases
import numpy as np
import torch

from odtrt_lib import native, nms
from odtrt_lib.spec import InputSpec, Resizer

library = native.load()


def to_gpu(array: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


class GpuPostprocess(cuda_calls.Postprocess):
    def __init__(self, case: nms_cases.Case) -> None:
        assert library is not None
        super().__init__(library, case, to_gpu)

    def enqueue(self) -> None:
        self.enqueue_on(stream())


def by_gpu(case: nms_cases.Case) -> nms.Postprocessed:
    call = GpuPostprocess(case)
    call.enqueue()
    try:
        return call.result()
    except RuntimeError as error:  # of a kernel, which has no name for what it was given
        raise AssertionError(f"{case.name}: {str(error).splitlines()[0]}") from None


def by_cpu_library(case: nms_cases.Case) -> nms.Postprocessed:
    assert library is not None
    return nms_cases.by_library(library)(case)


def nms_by_gpu(case: nms_cases.NmsCase) -> np.ndarray:
    assert library is not None
    return cuda_calls.select(library, case, to_gpu, stream())


def preprocess_disagreements() -> list[str]:
    """A line for every image size that the GPU does not preprocess to the CPU library's bits."""
    assert library is not None
    rng = np.random.default_rng(5)
    lines = []
    for height, width, size, padded in (
        (720, 1280, 300, False),
        (1080, 1920, 512, True),
        (333, 517, 320, False),
        (1, 1, 64, False),
        (64, 64, 64, False),
    ):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        true = (
            (size * height // max(height, width), size * width // max(height, width))
            if padded
            else (size, size)
        )
        spec = InputSpec(
            size,
            size,
            Resizer("fixed_shape", pad_value=(0.5, -1, 2)),
            (1 / 127.5, 1 / 60, 1 / 58),
            (-1, -2, 0.25),
        )
        found = cuda_calls.preprocess_difference(library, image, spec, true, to_gpu, stream())
        lines += [found] if found else []
    return lines


def fail_on(lines: list[str]) -> None:
    assert not lines, f"{len(lines)} disagreements:\n" + "\n".join(lines[:20])
