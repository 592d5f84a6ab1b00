"""The CUDA kernels, bit for bit: the numpy reference, the CPU library, CUDA graphs.

Needs an NVIDIA GPU, PyTorch for its memory, and `make plugin` with nvcc: `make test-gpu`. Without pytest,
``python tests/test_gpu.py`` runs the same checks. The heads of real detectors: plugins/bench/check_gpu.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cuda_calls
import nms_cases

from odtrt_lib import native, nms
from odtrt_lib.spec import InputSpec, NmsSpec, Resizer, ScoreSpec

try:
    import pytest
    import torch

    library = native.load()
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available() or library is None or not library.cuda_architectures,
            reason="needs a GPU and libodtrt.so with CUDA: run `make plugin` where nvcc is",
        ),
    ]
except ImportError as error:
    if __name__ != "__main__":
        pytest.skip(f"needs PyTorch for its GPU memory ({error})", allow_module_level=True)
    import torch

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


def nms_by_gpu(case: nms_cases.NmsCase) -> np.ndarray:
    assert library is not None
    return cuda_calls.select(library, case, to_gpu, stream())


def fail_on(lines: list[str]) -> None:
    assert not lines, f"{len(lines)} disagreements:\n" + "\n".join(lines[:20])


def test_postprocess_is_the_references_bit_for_bit() -> None:
    fail_on(list(nms_cases.disagreements(by_gpu, nms_cases.all_cases())))


def test_nms_is_the_references() -> None:
    cases = map(nms_cases.random_nms_case, range(600))
    fail_on(list(nms_cases.nms_disagreements(nms_by_gpu, cases)))


def test_nms_of_more_boxes_than_one_segment_holds() -> None:
    rng = np.random.default_rng(7)
    cases = []
    for count, spread in ((4097, 1000.0), (9001, 300.0), (20000, 2000.0)):
        corner = rng.uniform(0, spread, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], 1).astype(np.float32)
        scores = rng.random(count).astype(np.float32)
        classes = rng.integers(0, 3, count).astype(np.int32)
        for own_classes, most in ((None, None), (classes, None), (classes, 3000)):
            cases.append(nms_cases.NmsCase(f"{count} boxes", boxes, scores, 0.3, own_classes, -np.inf, most))
    fail_on(list(nms_cases.nms_disagreements(nms_by_gpu, iter(cases))))


def whole_detector(seed: int, threshold: float, boxes: str, logits: str, dtype: type) -> nms_cases.Case:
    """EfficientDet-D0's 49,104 x 90, drawn at random."""
    settings = NmsSpec(threshold, 0.5, 100, 100, False, True)
    spec = nms_cases.detector_spec(49104, 90, settings, coder=nms_cases.EFFICIENTDET_CODER)
    return nms_cases.make_case("D0", spec, 1, np.random.default_rng(seed), boxes, logits, dtype)


def by_cpu_library(case: nms_cases.Case) -> nms.Postprocessed:
    assert library is not None
    return nms_cases.by_library(library)(case)


def test_whole_detectors_are_the_cpu_librarys_bit_for_bit() -> None:
    lines = []
    for seed, (threshold, boxes, logits) in enumerate(
        (threshold, boxes, logits)
        for threshold in (1e-8, 0.05, 0.3)
        for boxes in ("crowds", "scattered", "all the same")
        for logits in ("distinct", "tied", "saturated")
    ):
        for dtype in (np.float32, np.float16):
            case = whole_detector(seed, threshold, boxes, logits, dtype)
            found = nms_cases.difference(by_cpu_library(case), by_gpu(case))
            lines += [f"{case.name}, {threshold}, {dtype.__name__}: {found}"] if found else []
    fail_on(lines)


def test_a_captured_graph_gives_the_new_inputs_answers() -> None:
    cases = [whole_detector(seed, 0.05, "crowds", "distinct", np.float32) for seed in range(4)]
    call = GpuPostprocess(cases[0])
    call.enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.enqueue()
    lines = []
    for case in cases[1:] + cases[:1]:
        new = (case.box_encodings, case.class_logits, case.anchors, case.clip_windows)
        for tensor, array in zip(call.inputs, new, strict=True):
            tensor.copy_(torch.from_numpy(array))
        call.workspace.fill_(0xCD)
        graph.replay()
        found = nms_cases.difference(by_cpu_library(case), call.result())
        lines += [f"{case.name}: {found}"] if found else []
    fail_on(lines)


def test_softmax_and_many_classes_at_size() -> None:
    lines = []
    for columns, background, converter in (
        (91, True, "softmax"),
        (601, False, "sigmoid"),
        (2, True, "softmax"),
    ):
        settings = NmsSpec(1e-8, 0.6, 100, 100, False, True)
        spec = nms_cases.detector_spec(
            1917, columns - background, settings, background=background, scores=ScoreSpec(converter, 1.0)
        )
        case = nms_cases.make_case("SSD", spec, 3, np.random.default_rng(columns), "crowds", "distinct")
        found = nms_cases.difference(by_cpu_library(case), by_gpu(case))
        lines += [f"{case.name}: {found}"] if found else []
    fail_on(lines)


def test_preprocess_is_the_cpu_librarys_bit_for_bit() -> None:
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
    fail_on(lines)


def test_an_error_of_cuda_is_returned() -> None:
    assert library is not None
    params = native.NmsParams(4, 4, 0.0, 0.5)
    try:
        native.nms_cuda(library, params, 256, 256, None, 256, 256, 256, 16)
    except native.NativeError as error:
        assert "workspace" in str(error)
    else:
        raise AssertionError("a workspace of 16 bytes was taken")


def main() -> None:
    checks: dict[str, Callable[[], None]] = {
        name: check for name, check in globals().items() if name.startswith("test_")
    }
    failed = 0
    for name, check in checks.items():
        try:
            check()
            print(f"ok      {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {name}: {error}", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
