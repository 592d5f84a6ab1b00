"""What the benchmarks on a GPU share: device time of enqueued work, free memory, a picture's frame."""

from __future__ import annotations

from typing import Callable, Optional

from odtrt_lib import cuda
from odtrt_lib.latency.timing import Sampling, Timing, sample
from odtrt_lib.preprocess import Frame
from odtrt_lib.spec import DetectorSpec

CALLS_IN_GRAPH = 20


def graph_times(enqueue: Callable[[], None], stream: cuda.Stream, sampling: Sampling) -> Timing:
    """Device time of one call of ``enqueue``, by events around a CUDA graph of CALLS_IN_GRAPH of them."""

    def enqueue_all() -> None:
        for _ in range(CALLS_IN_GRAPH):
            enqueue()

    enqueue()
    stream.synchronize()
    graph, start, end = cuda.Graph(stream, enqueue_all), cuda.Event(), cuda.Event()

    def once() -> float:
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return end.microseconds_since(start) / CALLS_IN_GRAPH

    try:
        return sample(once, sampling).timing()
    finally:
        for one in (graph, start, end):
            one.free()


def gpu_name(gpu: Optional[str]) -> str:
    """The GPU's part of a results file's name: ``h200`` for "NVIDIA H200"; ``none`` if there is none."""
    return "-".join(word for word in (gpu or "none").lower().split() if word != "nvidia")


def free_device_mb() -> float:
    """MiB of the GPU's memory that nobody has."""
    return cuda.memory_info()[0] / 2**20


def whole_frame(spec: DetectorSpec) -> Frame:
    """Of a picture that fills the network input."""
    height, width = spec.input.height, spec.input.width
    return Frame(height, width, height, width, height, width)
