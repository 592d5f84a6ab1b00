"""Times the CUDA kernels, and PyTorch's way of doing the same beside them.

    python benchmarks/nms_gpu.py [HEADS] [--quick] [--five LIBRARY]    writes results/nms.<gpu>.json

HEADS: the folder that record_heads.py wrote; without it only drawn scenes are timed. Needs PyTorch and
torchvision, and libodtrt.so with CUDA. --five: a libodtrt.so that was built with
``-DCMAKE_CUDA_FLAGS=-DODTRT_OVERLAPS_FROM=99`` and so goes the way of GPUs before compute capability 9, five
kernels without clusters; one image in float32 is timed with it too.

Every figure is device time of one call. graph_*: 20 calls in one CUDA graph, by events around its replay,
divided by 20, over 200 replays or, with at least 20, what 0.4 seconds hold. p50_us and so on: the same 20
calls enqueued one by one on a stream that is held up until all are queued. `warm`: always the same heads, as
when the network has just written them; all others are cold: 20 calls go through copies of the heads that
together exceed the level 2 cache twice, so that logits come from memory. bytes: the heads' logits, read once;
floor_us: these at the copy bandwidth measured in the same run (bytes read and written of a 2 GiB copy).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # odtrt is not installed where it runs

import cuda_calls
import drawn_heads
import nms_cases
import torch
import torch_calls
import torchvision
from gpu_times import gpu_name

from odtrt_lib import native
from odtrt_lib.latency.timing import Sampling, sample
from odtrt_lib.results import write_results
from odtrt_lib.spec import BoxCoder, NmsSpec, load_spec

CALLS, WARM_UP, REPLAYS, SECONDS = 20, 3, 200, 0.4
SIZES = (1917, 12804, 51150, 49104, 76725, 196416)
SIZES_OF_PEER = (1917, 49104, 196416)
THRESHOLDS = (0.3, 0.05, 1e-8)
OBJECTS = (8, 30)  # a usual picture, and a crowd
KEYS_OF_CASE = (
    "what",
    "source",
    "model",
    "anchors",
    "classes",
    "score_threshold",
    "batch",
    "dtype",
)


@functools.lru_cache(maxsize=1)
def drawn_images(
    anchors: int, batch: int, objects: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    priors = drawn_heads.grid_anchors(anchors)
    return priors, [drawn_heads.draw(i, objects, priors, 90, (1.0, 1.0, 1.0, 1.0)) for i in range(batch)]


def drawn_case(anchors: int, threshold: float, batch: int, dtype: type, objects: int) -> nms_cases.Case:
    spec = nms_cases.detector_spec(
        anchors, 90, NmsSpec(threshold, 0.5, 100, 100, False, True), coder=BoxCoder(1.0, 1.0, 1.0, 1.0)
    )
    priors, images = drawn_images(anchors, batch, objects)
    return nms_cases.Case(
        name=f"{objects} objects",
        spec=spec,
        box_encodings=np.stack([boxes for boxes, _ in images]).astype(dtype),
        class_logits=np.stack([logits for _, logits in images]).astype(dtype),
        anchors=priors,
        clip_windows=np.tile(np.array([0, 0, 1, 1], np.float32), (batch, 1)),
    )


def recorded_case(path: Path, threshold: float, dtype: type) -> nms_cases.Case:
    heads = np.load(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spec.json").write_text(str(heads["spec"]))
        spec = load_spec(Path(folder) / "spec.json")
    spec = dataclasses.replace(spec, nms=dataclasses.replace(spec.nms, score_threshold=threshold))
    return nms_cases.Case(
        path.stem,
        spec,
        heads["box_encodings"][:1].astype(dtype),
        heads["class_logits"][:1].astype(dtype),
        heads["anchors"],
        heads["clip_windows"][:1],
    )


def device_times(calls: list[Callable[[], None]], replays: int = REPLAYS) -> dict[str, float]:
    """Microseconds of one of CALLS calls, taken in turn from ``calls``: in a graph, and from a stream."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()

    def from_stream() -> None:
        for i in range(CALLS):
            calls[i % len(calls)]()

    def held_up() -> float:
        torch.cuda._sleep(2_000_000)
        return _microseconds(from_stream) / CALLS

    sampling = Sampling(WARM_UP, 20, replays, SECONDS)
    in_graph = sample(lambda: _microseconds(graph.replay) / CALLS, sampling)
    return {**in_graph.timing().row("graph_"), **sample(held_up, sampling).timing().row()}


def _microseconds(run: Callable[[], Any]) -> float:
    """Between two events on the stream, one before and one after what ``run`` enqueues."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000


def _round(value: float) -> float:
    return round(float(value), 2)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB on the device."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [_microseconds(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.numel() / (float(np.median(times[2:])) / 1e6)


def torch_postprocess(case: nms_cases.Case) -> Callable[[], Any]:
    """What a PyTorch user writes: sigmoid, threshold or top 4096 pairs, decode, batched_nms, first 100."""
    boxes, logits, anchors = (
        torch_calls.to_gpu(a) for a in (case.box_encodings[0], case.class_logits[0], case.anchors)
    )
    classes, settings = logits.shape[1], case.spec.nms

    def run() -> Any:
        scores = logits.float().sigmoid().flatten()
        best, index = scores.topk(min(4096, scores.numel()))
        best, index = best[best > settings.score_threshold], index[best > settings.score_threshold]
        anchor, label = index // classes, index % classes
        code, prior = boxes[anchor].float(), anchors[anchor]
        middle = code[:, :2] * prior[:, 2:] + prior[:, :2]
        half = code[:, 2:].exp() * prior[:, 2:] / 2
        found = torch.cat([middle - half, middle + half], 1)
        return torchvision.ops.batched_nms(found, best, label, settings.iou_threshold)[:100]

    return run


def wall_times(run: Callable[[], Any], repeats: int = 50) -> dict[str, float]:
    """Microseconds of one call at a time, its waiting included: for code that itself waits for the device."""

    def once() -> float:
        torch.cuda.synchronize()
        return _microseconds(run)

    return sample(once, Sampling(5, repeats, repeats)).timing().row()


class Timed(cuda_calls.Postprocess):
    def enqueue(self) -> None:
        self.enqueue_on(torch_calls.stream())


def postprocess_row(
    case: nms_cases.Case, source: str, bandwidth: float, replays: int, library: Any, implementation: str
) -> dict[str, Any]:
    logits_bytes = case.class_logits.nbytes
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(1, min(CALLS, -(-2 * cache // logits_bytes)))
    warm = [Timed(library, case, torch_calls.to_gpu)]
    warm[0].enqueue()
    cold = warm + [Timed(library, case, torch_calls.to_gpu) for _ in range(copies - 1)]
    row = {
        "what": "postprocess",
        "source": source,
        "model": case.name,
        "anchors": case.spec.heads.num_anchors,
        "classes": case.spec.heads.num_classes,
        "score_threshold": case.spec.nms.score_threshold,
        "batch": len(case.class_logits),
        "dtype": case.class_logits.dtype.name,
        "detections": int(warm[0].result().num_detections[0]),
        "implementation": implementation,
        **{f"warm_{key}": value for key, value in device_times([c.enqueue for c in warm], replays).items()},
        **device_times([c.enqueue for c in cold], replays),
        "bytes": logits_bytes,
        "floor_us": _round(logits_bytes / bandwidth * 1e6),
    }
    print(row, flush=True)
    return row


def has_peer(case: nms_cases.Case) -> bool:
    """Whether :func:`torch_postprocess` can do this case and it is one of those that are worth the time."""
    heads = case.spec.heads
    is_plain = case.spec.heads.scores.converter == "sigmoid" and not heads.background_column
    is_one_image = case.class_logits.dtype == np.float32 and len(case.class_logits) == 1
    is_chosen = heads.num_anchors in SIZES_OF_PEER and case.spec.nms.score_threshold != 0.3
    return is_plain and is_one_image and is_chosen


def nms_row(count: int, replays: int) -> list[dict[str, Any]]:
    """Plain suppression of boxes of one class, beside torchvision's."""
    rng = np.random.default_rng(count)
    corner = rng.uniform(0, 600, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 120, (count, 2))], 1).astype(np.float32)
    scores = rng.random(count).astype(np.float32)
    on_gpu, scores_on_gpu = torch_calls.to_gpu(boxes), torch_calls.to_gpu(scores)
    params = native.NmsParams(count, count, float("-inf"), 0.5)
    kept = torch.empty(count, dtype=torch.int32, device="cuda")
    num_kept = torch.empty(1, dtype=torch.int32, device="cuda")
    size = native.nms_workspace(torch_calls.library, params)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def call() -> None:
        native.nms_cuda(
            torch_calls.library, params, on_gpu.data_ptr(), scores_on_gpu.data_ptr(), None, kept.data_ptr(),
            num_kept.data_ptr(), workspace.data_ptr(), size, torch_calls.stream(),
        )  # fmt: skip

    times = device_times([call], replays)
    number = int(num_kept.cpu())
    theirs = torchvision.ops.nms(on_gpu, scores_on_gpu, 0.5)
    row = {"what": "nms", "source": "drawn", "boxes": count, "kept": number}
    rows = [
        {**row, "implementation": "odtrt", **times},
        {
            **row,
            "implementation": "torchvision.ops.nms",
            "kept": len(theirs),
            **wall_times(lambda: torchvision.ops.nms(on_gpu, scores_on_gpu, 0.5)),
        },
    ]
    print(*rows, sep="\n", flush=True)
    assert np.array_equal(kept.cpu().numpy()[:number], theirs.cpu().numpy()), "not torchvision's boxes"
    return rows


def preprocess_rows(replays: int) -> list[dict[str, Any]]:
    from odtrt_lib.spec import InputSpec, Resizer

    rows = []
    for height, width, size in ((480, 640, 320), (720, 1280, 300), (1080, 1920, 512), (2160, 3840, 640)):
        spec = InputSpec(size, size, Resizer("fixed_shape"), (1 / 127.5,) * 3, (-1.0,) * 3)
        params = native.preprocess_params(spec, (height, width), (size, size))
        image = torch.zeros(height * width * 3, dtype=torch.uint8, device="cuda")
        output = torch.empty(3 * size * size, device="cuda")

        def call(params=params, image=image, output=output) -> None:
            native.preprocess_cuda(
                torch_calls.library, params, image.data_ptr(), output.data_ptr(), torch_calls.stream()
            )

        rows.append(
            {
                "what": "preprocess",
                "source": "drawn",
                "image": f"{width}x{height}",
                "network_input": f"{size}x{size}",
                "implementation": "odtrt",
                **device_times([call], replays),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("heads", nargs="?")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--output")
    arguments.add_argument("--five", metavar="LIBRARY")
    options = arguments.parse_args()
    five = native._open(Path(options.five)) if options.five else None
    replays = 30 if options.quick else REPLAYS
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.3f} TB/s", flush=True)
    rows: list[dict[str, Any]] = [
        {
            "what": "copy",
            "bytes_per_second": round(bandwidth),
            "l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size,
        }
    ]
    for count in (500, 1000, 2000, 4000, 8000):
        rows += nms_row(count, replays)
    cases: list[tuple[Callable[..., nms_cases.Case], tuple[Any, ...], str]] = []
    for anchors in SIZES:
        for batch in (1, 8) if anchors < 80_000 else (1,):
            for objects in OBJECTS:
                for threshold in THRESHOLDS:
                    for dtype in (np.float32, np.float16)[: 2 if batch == 1 and not options.quick else 1]:
                        cases.append((drawn_case, (anchors, threshold, batch, dtype, objects), "drawn"))
    if options.heads:
        for path in sorted(Path(options.heads).glob("*.npz")):
            cases += [
                (recorded_case, (path, threshold, dtype), "recorded")
                for threshold in THRESHOLDS
                for dtype in (np.float32, np.float16)[: 1 if options.quick else 2]
            ]
    output = options.output or str(ROOT / "results" / f"nms.{gpu_name(torch.cuda.get_device_name())}.json")
    try:
        rows += preprocess_rows(replays)
        for make, arguments_of_case, source in cases:
            case = make(*arguments_of_case)
            if five is not None and case.class_logits.dtype == np.float32 and len(case.class_logits) == 1:
                rows.append(postprocess_row(case, source, bandwidth, replays, five, "odtrt, five kernels"))
            rows.append(postprocess_row(case, source, bandwidth, replays, torch_calls.library, "odtrt"))
            if has_peer(case) and not options.quick:
                rows.append(
                    {
                        **{key: rows[-1][key] for key in KEYS_OF_CASE},
                        "implementation": "PyTorch, torchvision.ops.batched_nms",
                        **wall_times(torch_postprocess(case)),
                    }
                )
                print(rows[-1], flush=True)
    finally:  # a visit to the GPU can end before the last row
        write_results(output, "nms", "python benchmarks/nms_gpu.py HEADS --five LIBRARY", rows)
        print(json.dumps({"rows": len(rows), "written": output}))


if __name__ == "__main__":
    main()
