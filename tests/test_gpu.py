"""The CUDA kernels, bit for bit: the numpy reference, the CPU library, CUDA graphs.

Needs an NVIDIA GPU, PyTorch for its memory, and `make plugin` with nvcc: `make test-gpu`. Without pytest,
``python tests/test_gpu.py [NAME ...]`` runs the same checks. The heads of real detectors:
benchmarks/nms_checks_gpu.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "benchmarks")]

import nms_cases
import spec_cases

from odtrt_lib import cuda, native
from odtrt_lib.latency.recorder import GPU, Recorder
from odtrt_lib.spans import span
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

from torch_calls import (
    GpuPostprocess,
    by_cpu_library,
    by_gpu,
    fail_on,
    nms_by_gpu,
    preprocess_disagreements,
)


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
    spec = nms_cases.detector_spec(49104, 90, settings, coder=spec_cases.EFFICIENTDET_CODER)
    return nms_cases.make_case("D0", spec, 1, np.random.default_rng(seed), boxes, logits, dtype)


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
    fail_on(preprocess_disagreements())


def test_every_kind_of_memory_and_a_graph_give_the_cpu_librarys_bits() -> None:
    """The CUDA runtime by ctypes: an image up, preprocessed, and back, eagerly and in a graph."""
    assert library is not None
    rng = np.random.default_rng(11)
    network = InputSpec(96, 128, Resizer("fixed_shape"), (1 / 127.5,) * 3, (-1.0,) * 3)
    size, lines = (333, 517), []
    params = native.preprocess_params(network, size, (96, 128))
    for kind in ("pageable", "pinned", "mapped"):
        stream, frame, output = cuda.Stream(), cuda.Buffer(kind), cuda.Buffer(kind)
        frame.arrange([("image", np.uint8, (*size, 3))])
        output.arrange([("input", np.float32, (3, 96, 128))])
        graph = None
        for how in ("eager", "graph", "the graph again"):
            frame.array("image")[:] = rng.integers(0, 256, (*size, 3))
            frame.upload(stream)
            source, target = frame.address("image"), output.address("input")
            enqueue = functools.partial(
                native.preprocess_cuda, library, params, source, target, stream.handle
            )
            if how == "eager":
                enqueue()
            else:
                graph = graph or cuda.Graph(stream, enqueue)
                output.overwrite(stream)
                graph.launch(stream)
            output.download(stream)
            stream.synchronize()
            expected = np.empty((3, 96, 128), np.float32)
            native.preprocess_cpu(library, frame.array("image"), network, (96, 128), expected)
            if output.array("input").tobytes() != expected.tobytes():
                lines.append(f"{kind}, {how}")
    fail_on(lines)


def test_steps_have_times_of_the_gpu_eagerly_and_in_a_graph() -> None:
    """Four copies of 256 MB take at least 0.2 ms on any GPU, in turn; and a copy knows its two sides."""
    stream, one, other = cuda.Stream(), cuda.Memory(1 << 28), cuda.Memory(1 << 28)
    pinned, pageable, recorder = cuda.Memory(64, "pinned"), np.zeros(64, np.uint8), Recorder()
    assert pinned.host is not None

    def enqueue() -> None:
        for name in ("upload", "engine"):
            with span(name, stream):
                for _ in range(4):
                    cuda.copy(one.address, other.address, one.size, stream)

    with recorder.frame():
        graph = cuda.Graph(stream, enqueue)
    for run in (enqueue, lambda: graph.launch(stream), lambda: graph.launch(stream)):
        with recorder.frame():
            run()
            with span("wait"):
                stream.synchronize()
        steps = [step for step in recorder.frames[-1].spans if step.lane == GPU]
        assert [step.name for step in steps] == ["upload", "engine"]
        assert all(step.us > 200 for step in steps)
        assert recorder.frames[-1].start_us <= steps[0].start_us
        assert steps[0].end_us <= steps[1].start_us + 1
        assert steps[1].end_us <= recorder.frames[-1].end_us + 50  # the anchor is late by a launch at most
    with recorder.frame():
        for source in (pinned.address, pageable.ctypes.data):
            cuda.copy(one.address, source, 64, stream)
        stream.synchronize()
    assert [call.side for call in recorder.frames[-1].calls] == [
        "pinned to device",
        "pageable to device",
        "",
    ]
    recorder.close()


def test_memory_that_pytorch_allocated_is_taken() -> None:
    assert library is not None
    tensor = torch.arange(12, dtype=torch.float32, device="cuda")
    assert cuda.address_of(tensor) == tensor.data_ptr()
    memory, stream, array = cuda.Memory(48), cuda.Stream(), np.empty(12, np.float32)
    assert torch.as_tensor(memory, device="cuda").numel() == 48
    torch.cuda.synchronize()
    cuda.copy(memory.address, cuda.address_of(tensor), 48, stream)
    cuda.copy(array.ctypes.data, cuda.address_of(memory), 48, stream)
    stream.synchronize()
    assert np.array_equal(array, np.arange(12))


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
    for name in sys.argv[1:] or checks:
        try:
            checks[name]()
            print(f"ok      {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {name}: {error}", flush=True)
    if failed:
        sys.exit(1)
    print("all checks passed")


if __name__ == "__main__":
    main()
