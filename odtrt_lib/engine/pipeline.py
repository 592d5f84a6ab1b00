"""From pictures to detections on a GPU: upload, preprocessing, network, post-processing, download.

All steps are enqueued on one stream, and the host waits once, at the end. :class:`Switches` say how each step
is done. The kernels give the same bits on the CPU and on the GPU, so the switches change no detection.

A plan has one of two forms. In a fused plan the plugin does the post-processing. After a split plan the
kernels of :mod:`odtrt_lib.native` do it on the stream. If the native library has no kernels for this GPU, the
heads are copied back and post-processed on the CPU.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import numpy as np

from odtrt_lib import cuda, native
from odtrt_lib.engine import runtime
from odtrt_lib.engine.passport import Passport
from odtrt_lib.engine.runtime import Network
from odtrt_lib.errors import InputError, UnsupportedError, one_line
from odtrt_lib.nms import Postprocessed, postprocess
from odtrt_lib.preprocess import Frame, check_image, frame_of, preprocess
from odtrt_lib.spans import listener, span
from odtrt_lib.spec import DetectorSpec
from odtrt_lib.tensors import CLIP_WINDOWS, DETECTIONS, Tensor, detector_tensors, has_clip_windows

MAX_GRAPHS = 8
"""CUDA graphs that a pipeline keeps, one for each combination of image sizes, the most recently used."""

_CHOICES = {
    "memory": ("pageable", "pinned", "mapped"),
    "preprocess": ("cpu", "gpu"),
    "launch": ("eager", "graph"),
    "postprocess": ("gpu", "cpu"),
}
_FIELDS = (*DETECTIONS, "anchors")  # the fields of Postprocessed that the kernels write


@dataclasses.dataclass(frozen=True)
class Switches:
    """How a pipeline does each step. The defaults are the simplest way.

    memory: how pictures and detections move between host and GPU. ``pageable``: CUDA copies to and from
    numpy's memory through a buffer of its own. ``pinned``: the GPU copies to and from page-locked memory of
    the pipeline. ``mapped``: kernels read and write page-locked memory directly, without a copy. preprocess:
    on the ``cpu`` or the ``gpu``. launch: ``eager``, one call for each kernel; or ``graph``, one call for
    all, which is recorded at the second call with the same image sizes. postprocess: of raw heads, on the
    ``gpu`` or the ``cpu``; a fused plan does it itself.

    Raises InputError for any other value.
    """

    memory: str = "pageable"
    preprocess: str = "cpu"
    launch: str = "eager"
    postprocess: str = "gpu"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name}: {value!r}, expected one of {', '.join(allowed)}")


def load(
    folder: Union[str, Path],
    passport: Passport,
    spec: DetectorSpec,
    anchors: np.ndarray,
    *,
    plugin: Union[str, Path, None] = None,
    switches: Optional[Switches] = None,
) -> Pipeline:
    """Loads the plan of ``passport`` from ``folder``, and runs every step on the GPU once.

    anchors: float32 [N, 4]. plugin: ``libodtrt_tensorrt.so``, for a plan of ``detector.onnx``. Call
    :func:`odtrt_lib.portability.check` first.

    Raises InputError if the plan is not the one that the passport describes, MissingDependencyError if the
    library or the CUDA runtime is absent, CheckError if the plan's tensors are not those that ``spec``
    describes, and RunError, with TensorRT's or CUDA's reasons, if the plan cannot be loaded or run. All
    device memory is free again then.
    """
    network = runtime.load(folder, passport, spec, plugin=plugin)
    pipeline = Pipeline(network, spec, anchors, switches or Switches())
    network.keep_kernels()
    return pipeline


class Pipeline:
    """A plan with preprocessing and post-processing, on a stream and in memory of its own.

    Calls from several threads take turns. Memory grows with the largest batch and the largest pictures that
    were run. :meth:`close` frees it, and so does the end of the last reference to the pipeline.

    switches: those in force; a switch that this GPU or the native library cannot obey is turned off. reasons:
    why, for each of these: its name -> the reason. postprocessing: in words, what does it.
    """

    def __init__(self, network: Network, spec: DetectorSpec, anchors: np.ndarray, switches: Switches) -> None:
        """network: :meth:`close` closes it too. anchors, errors: see :func:`load`."""
        self.switches = switches
        self.reasons: Dict[str, str] = {}
        self.is_fused = network.is_fused
        self._network, self._spec = network, spec
        self._anchors = np.ascontiguousarray(anchors, np.float32)
        self._takes_windows = has_clip_windows(spec)
        self._lock = threading.Lock()
        self._buffers = _Buffers()
        self._release = weakref.finalize(self, _release, os.getpid(), self._lock, self._buffers, network)
        try:
            with network.errors("cannot load it"):
                self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def postprocessing(self) -> str:
        if self.is_fused:
            return "inside the plan"
        if self.switches.postprocess == "gpu":
            return "on the GPU"
        reason = self.reasons.get("postprocess")
        return "on the CPU" + (f", because {reason}" if reason else "")

    @property
    def notes(self) -> List[str]:
        """A line for each switch that was turned off, but for the post-processing's."""
        return [
            f"{name}: {getattr(self.switches, name)}, because {reason}"
            for name, reason in self.reasons.items()
            if name != "postprocess"
        ]

    def run(self, images: Sequence[np.ndarray]) -> Postprocessed:
        """The detections in RGB pictures, uint8 [height, width, 3], of any sizes: one row for each picture.

        A fused plan's ``anchors`` are -1, because the plugin does not return them.

        Raises InputError for arrays of another form, RunError if TensorRT or CUDA fails.
        """
        for image in images:
            check_image(image)
        found = _no_detections(self._spec, len(images))
        for rows, size in self._chunks(len(images)):
            _put(found, rows, self._in_turn(self._detect, images[rows], size))
        return found

    def run_prepared(self, network_input: np.ndarray, frames: Sequence[Frame]) -> Postprocessed:
        """The detections in pictures that are preprocessed already, see :meth:`run`.

        network_input: float32 [B, 3, height, width]. frames: how each of the B pictures lies in it.
        """
        self._check_input(network_input)
        if len(frames) != len(network_input):
            raise InputError(f"{len(frames)} frames for {len(network_input)} pictures; expected one for each")
        found = _no_detections(self._spec, len(network_input))
        for rows, size in self._chunks(len(network_input)):
            _put(found, rows, self._in_turn(self._detect_in, network_input[rows], frames[rows], size))
        return found

    def infer(self, network_input: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """The raw heads, float32 [B, N, 4] and [B, N, columns]. network_input: float32 [B, 3, height, width].

        Raises UnsupportedError for a fused plan, and what :meth:`run` raises.
        """
        if self.is_fused:
            raise UnsupportedError(
                f"{self._network.who}: the plan gives detections, no raw heads; open the folder without the "
                'plugin, or with backend="onnxruntime"'
            )
        self._check_input(network_input)
        count = len(network_input)
        heads = [np.zeros(tensor.with_batch(count), np.float32) for tensor in self._network.tensors.outputs]
        for rows, size in self._chunks(count):
            for whole, part in zip(heads, self._in_turn(self._heads, network_input[rows], size)):
                whole[rows] = part[: rows.stop - rows.start]
        return heads[0], heads[1]

    def enqueue_network(self) -> None:
        """Enqueues the network alone, on what its input buffers hold."""
        self._network.enqueue(self.stream)

    def enqueue_postprocess(self) -> None:
        """Enqueues the post-processing of the last batch's heads, if odtrt's kernels do it."""
        if self._postprocesses_on_gpu:
            self._enqueue_postprocess(self._buffers.bound)

    @property
    def stream(self) -> cuda.Stream:
        return self._buffers.stream

    def run_again(self) -> None:
        """Runs the network on what its input buffers hold, and waits for it. For benchmarks."""
        self._in_turn(self._again)

    def layer_times(self) -> List[Tuple[str, float]]:
        """Each layer's name and median time in microseconds, see :meth:`Network.layer_times`."""
        return self._in_turn(self._network.layer_times, self.stream)

    def close(self) -> None:
        """Frees all memory as soon as the running call has ended. Later calls raise RunError."""
        self._release()

    def _check_input(self, network_input: np.ndarray) -> None:
        sizes = (3, self._spec.input.height, self._spec.input.width)
        if network_input.dtype != np.float32 or network_input.shape[1:] != sizes or network_input.ndim != 4:
            raise InputError(
                f"network_input: {network_input.dtype} {list(network_input.shape)}, expected float32 "
                f"[batch, {', '.join(map(str, sizes))}]"
            )

    def _chunks(self, count: int) -> Iterator[Tuple[slice, int]]:
        """Divides ``count`` pictures into batches: the pictures of each, and the size of the batch."""
        network = self._network
        for start in range(0, count, network.max_batch):
            rows = slice(start, min(count, start + network.max_batch))
            yield rows, max(rows.stop - rows.start, network.min_batch)

    def _in_turn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            if not self._release.alive:
                raise self._network.closed_error()
            with self._network.errors("cannot run it"):
                return function(*arguments)

    # ---- which steps run on the GPU -----------------------------------------------------------------------

    @property
    def _postprocesses_on_gpu(self) -> bool:
        return not self.is_fused and self.switches.postprocess == "gpu"

    @property
    def _results(self) -> cuda.Buffer:
        """The buffer that is copied back to the host."""
        is_done = self.is_fused or self._postprocesses_on_gpu
        return self._buffers.detections if is_done else self._buffers.heads

    def _prepare(self) -> None:
        """Allocates memory and runs every step once, so that the first call takes no longer than others."""
        reason = _why_no_kernels()
        if reason:
            self._do_without_kernels(reason)
        elif self._postprocesses_on_gpu and not native.can_postprocess(self._spec):
            self._turn_off("postprocess", "cpu", "the kernels do not take this detector")
        self._buffers.stream = cuda.Stream()
        size = self._network.usual_batch
        black = np.zeros((self._spec.input.height, self._spec.input.width, 3), np.uint8)
        try:
            self._buffers.set_kinds(self.switches, self.is_fused)
            self._launch(self._arrange([black], size))
        except native.NativeError as error:  # e.g. compiled for other GPUs
            self._buffers.stream.synchronize()  # the network is still running
            self._do_without_kernels(one_line(error))
            self._buffers.set_kinds(self.switches, self.is_fused)
            self._launch(self._arrange([black], size))

    def _do_without_kernels(self, reason: str) -> None:
        if self.switches.preprocess == "gpu":
            self._turn_off("preprocess", "cpu", reason)
        if self._postprocesses_on_gpu:
            self._turn_off("postprocess", "cpu", reason)

    def _turn_off(self, name: str, value: str, reason: str) -> None:
        self.switches = dataclasses.replace(self.switches, **{name: value})
        self.reasons[name] = reason

    # ---- one batch ----------------------------------------------------------------------------------------

    def _detect(self, images: Sequence[np.ndarray], size: int) -> Dict[str, np.ndarray]:
        """The fields of ``Postprocessed`` for one batch."""
        batch = self._arrange(images, size)
        self._launch(batch)
        return self._found(batch)

    def _found(self, batch: _Batch) -> Dict[str, np.ndarray]:
        if self.is_fused or self._postprocesses_on_gpu:
            fields = DETECTIONS if self.is_fused else _FIELDS
            with span("download"):
                return {name: self._results.array(name).copy() for name in fields}
        heads = self._spec.heads
        encodings, logits = (self._results.array(name) for name in (heads.box_encodings, heads.class_logits))
        with span("postprocess"):
            found = postprocess(encodings, logits, self._anchors, self._spec, batch.clip_windows())
        return {name: getattr(found, name) for name in _FIELDS}

    def _arrange(self, images: Sequence[np.ndarray], size: int) -> _Batch:
        """Makes room for a batch, and writes its pictures, or its network input, into the host's side."""
        buffers, spec = self._buffers, self._spec
        batch = _Batch(size, tuple(frame_of(image, spec.input) for image in images))
        self._make_room(batch)
        if self.switches.preprocess == "cpu":
            network_input = buffers.input.array(spec.input.name)
            with span("preprocess"):
                for image, out in zip(images, network_input):
                    preprocess(image, spec.input, out=out)
                network_input[len(images) :] = network_input[len(images) - 1]
        else:
            with span("upload"):
                for i, image in enumerate(images):
                    np.copyto(buffers.frames.array(str(i)), image)
        if self._takes_windows:
            buffers.windows.array(CLIP_WINDOWS)[:] = batch.clip_windows()
        return batch

    def _make_room(self, batch: _Batch) -> None:
        """Lays out the buffers of a batch. If an address changes, drops all graphs and binds the network."""
        buffers, network, size = self._buffers, self._network, batch.size
        moved = buffers.bound != size
        buffers.bound = 0  # until all is bound, so that after an error or Ctrl-C all is done again
        moved |= buffers.input.arrange([_field(network.tensors.inputs[0], size)])
        if self._takes_windows:
            moved |= buffers.windows.arrange([(CLIP_WINDOWS, np.float32, (size, 4))])
        outputs = buffers.detections if self.is_fused else buffers.heads
        moved |= outputs.arrange([_field(tensor, size) for tensor in network.tensors.outputs])
        if self._postprocesses_on_gpu:
            moved |= buffers.detections.arrange(_detection_fields(self._spec, size))
            needed = native.postprocess_workspace(_library(), native.postprocess_params(self._spec), size)
            moved |= buffers.workspace.arrange([("workspace", np.uint8, (needed,))])
            if buffers.anchors.arrange([("anchors", np.float32, self._anchors.shape)]):
                buffers.anchors.write("anchors", self._anchors, buffers.stream)
        if self.switches.preprocess == "gpu":
            generation = buffers.frames.generation
            buffers.frames.arrange([(str(i), np.uint8, (*one, 3)) for i, one in enumerate(batch.image_sizes)])
            moved |= buffers.frames.generation != generation
        if moved:
            buffers.forget_graphs()
            network.bind(size, {**buffers.addresses(), **outputs.addresses()})
        buffers.bound = size

    def _launch(self, batch: _Batch) -> None:
        """Runs all steps of a batch, and waits until they are done."""
        buffers, is_pageable = self._buffers, self.switches.memory == "pageable"
        graph = buffers.graphs.get(batch.key)
        with span("launch"):
            if is_pageable:
                self._upload()
            if graph is None:
                self._enqueue(batch)
            else:
                buffers.graphs.move_to_end(batch.key)
                graph.launch(buffers.stream)
            if is_pageable:
                self._download()
        with span("wait"):
            buffers.stream.synchronize()
        if graph is None and self.switches.launch == "graph" and buffers.is_again(batch.key):
            self._record(batch)

    def _enqueue(self, batch: _Batch) -> None:
        """Enqueues what a graph records: all steps but copies of pageable memory, which no graph can hold."""
        stream, is_pageable = self._buffers.stream, self.switches.memory == "pageable"
        if not is_pageable:
            self._upload()
        if self.switches.preprocess == "gpu":
            with span("preprocess", stream):
                self._enqueue_preprocess(batch)
        with span("engine", stream):
            self._network.enqueue(stream)
        if self._postprocesses_on_gpu:
            with span("postprocess", stream):
                self._enqueue_postprocess(batch.size)
        if not is_pageable:
            self._download()

    def _upload(self) -> None:
        buffers = self._buffers
        with span("upload", buffers.stream):
            (buffers.input if self.switches.preprocess == "cpu" else buffers.frames).upload(buffers.stream)
            if self._takes_windows:
                buffers.windows.upload(buffers.stream)

    def _download(self) -> None:
        with span("download", self._buffers.stream):
            self._results.download(self._buffers.stream)

    def _enqueue_preprocess(self, batch: _Batch) -> None:
        buffers, network_input = self._buffers, self._spec.input
        first, image_bytes = (
            buffers.input.address(network_input.name),
            12 * network_input.height * network_input.width,
        )
        for i in range(batch.size):
            row = min(i, len(batch.frames) - 1)
            frame = batch.frames[row]
            params = native.preprocess_params(
                network_input, (frame.image_height, frame.image_width), (frame.true_height, frame.true_width)
            )
            source, target = buffers.frames.address(str(row)), first + i * image_bytes
            native.preprocess_cuda(_library(), params, source, target, buffers.stream.handle)

    def _enqueue_postprocess(self, size: int) -> None:
        buffers, heads = self._buffers, self._spec.heads
        native.postprocess_cuda(
            _library(),
            native.postprocess_params(self._spec),
            size,
            native.HeadPointers(
                buffers.heads.address(heads.box_encodings),
                buffers.heads.address(heads.class_logits),
                native.FLOAT32,
                buffers.anchors.address("anchors"),
                buffers.windows.address(CLIP_WINDOWS) if self._takes_windows else None,
            ),
            native.DetectionPointers(*(buffers.detections.address(name) for name in _FIELDS)),
            buffers.workspace.address("workspace"),
            buffers.workspace.size,
            buffers.stream.handle,
        )

    def _record(self, batch: _Batch) -> None:
        """Records a graph of the batch that has just run, and keeps it if a launch gives the same bits again.

        If a step refuses to be recorded, the graph lacks it and would return an earlier run's results for
        ever. So everything that the steps write is overwritten before this launch.
        """
        buffers = self._buffers
        expected, graph = self._results.content(), None
        try:
            graph = cuda.Graph(buffers.stream, lambda: self._enqueue(batch))
            buffers.overwrite(self.switches)
            graph.launch(buffers.stream)
            if self.switches.memory == "pageable":
                self._download()
            with span("wait"):
                buffers.stream.synchronize()
            if self._results.content() != expected:
                raise self._network.error("finds something else in a CUDA graph than without one")
        except Exception as error:  # TensorRT's Python raises what it likes
            if graph is not None:
                graph.free()
            self._turn_off("launch", "eager", one_line(error))
            self._launch(batch)
            return
        buffers.graphs[batch.key] = graph
        if len(buffers.graphs) > MAX_GRAPHS:
            buffers.graphs.popitem(last=False)[1].free()

    def _detect_in(
        self, network_input: np.ndarray, frames: Sequence[Frame], size: int
    ) -> Dict[str, np.ndarray]:
        batch, buffers = _Batch(size, tuple(frames)), self._buffers
        self._write_input(batch, network_input)
        if self._takes_windows:
            buffers.windows.array(CLIP_WINDOWS)[:] = batch.clip_windows()
            buffers.windows.upload(buffers.stream)
        self.enqueue_network()
        self.enqueue_postprocess()
        self._results.download(buffers.stream)
        buffers.stream.synchronize()
        return self._found(batch)

    def _heads(self, network_input: np.ndarray, size: int) -> List[np.ndarray]:
        height, width = self._spec.input.height, self._spec.input.width
        self._write_input(_Batch(size, (Frame(height, width, height, width, height, width),)), network_input)
        self.enqueue_network()
        return [
            self._buffers.heads.read(tensor.name, self.stream) for tensor in self._network.tensors.outputs
        ]

    def _write_input(self, batch: _Batch, network_input: np.ndarray) -> None:
        self._make_room(batch)
        filled = [network_input, np.repeat(network_input[-1:], batch.size - len(network_input), axis=0)]
        self._buffers.input.write(self._spec.input.name, np.concatenate(filled), self.stream)

    def _again(self) -> None:
        self.enqueue_network()
        self.stream.synchronize()


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch for the network: ``size`` pictures. If ``frames`` are fewer, the last one is repeated."""

    size: int
    frames: Tuple[Frame, ...]

    @property
    def image_sizes(self) -> List[Tuple[int, int]]:
        return [(frame.image_height, frame.image_width) for frame in self.frames]

    @property
    def key(self) -> Any:
        """Batches with the same key can use the same graph. One that a recorder hears has its events."""
        return self.size, listener() is not None, *self.image_sizes

    def clip_windows(self) -> np.ndarray:
        """The clip windows of all pictures, float32 [size, 4]."""
        rows = [frame.clip_window for frame in self.frames]
        return np.array(rows + rows[-1:] * (self.size - len(rows)), np.float32)


class _Buffers:
    """What a pipeline has on the GPU besides its network: stream, buffers and graphs."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.bound = 0
        self.graphs: collections.OrderedDict[Any, cuda.Graph] = collections.OrderedDict()
        self.once: Set[Any] = set()
        self.set_kinds(Switches(), is_fused=False)

    def set_kinds(self, switches: Switches, is_fused: bool) -> None:
        """Makes new, empty buffers in the memory that the switches need. No old one may be in use."""
        memory = switches.memory
        is_back = is_fused or switches.postprocess == "gpu"
        self.frames, self.windows, self.detections = (cuda.Buffer(memory) for _ in range(3))
        self.input = cuda.Buffer(memory if switches.preprocess == "cpu" else "device")
        self.heads = cuda.Buffer("device" if is_back else memory)
        self.anchors, self.workspace = cuda.Buffer("device"), cuda.Buffer("device")

    @property
    def all(self) -> List[cuda.Buffer]:
        return [
            self.frames,
            self.windows,
            self.detections,
            self.input,
            self.heads,
            self.anchors,
            self.workspace,
        ]

    def addresses(self) -> Dict[str, int]:
        """The addresses of the network's inputs."""
        return {**self.input.addresses(), **self.windows.addresses()}

    def overwrite(self, switches: Switches) -> None:
        """Overwrites every buffer that the steps of a graph write."""
        for buffer in (self.heads, self.detections, *([self.input] if switches.preprocess == "gpu" else [])):
            buffer.overwrite(self.stream)

    def is_again(self, key: Any) -> bool:
        """Whether a batch of this key ran since the network was bound. A graph is recorded only then."""
        if key in self.once:
            self.once.remove(key)
            return True
        if len(self.once) > MAX_GRAPHS:
            self.once.clear()
        self.once.add(key)
        return False

    def forget_graphs(self) -> None:
        self.once.clear()
        while self.graphs:
            self.graphs.popitem()[1].free()


def _release(process: int, lock: threading.Lock, buffers: _Buffers, network: Network) -> None:
    """Frees the graphs, then the network, then the memory that both use. Does nothing in a child after
    ``fork``."""
    if process == os.getpid():
        with lock:
            _free(buffers, network)


def _free(buffers: _Buffers, network: Network) -> None:
    for free in (
        buffers.stream.synchronize if buffers.stream is not None else None,
        buffers.forget_graphs,
        network.close,
        *(buffer.free for buffer in buffers.all),
        buffers.stream.free if buffers.stream is not None else None,
    ):
        if free is not None:
            cuda.quietly(free)


def _no_detections(spec: DetectorSpec, count: int) -> Postprocessed:
    most = spec.nms.max_total_detections
    return Postprocessed(
        num_detections=np.zeros(count, np.int32),
        boxes=np.zeros((count, most, 4), np.float32),
        scores=np.zeros((count, most), np.float32),
        classes=np.zeros((count, most), np.int32),
        anchors=np.full((count, most), -1, np.int32),
    )


def _put(found: Postprocessed, rows: slice, part: Dict[str, np.ndarray]) -> None:
    """Copies a batch's detections to these rows, without those of repeated pictures."""
    for name, array in part.items():
        getattr(found, name)[rows] = array[: rows.stop - rows.start]


def _field(tensor: Tensor, batch: int) -> cuda.Field:
    return tensor.name, np.dtype(tensor.dtype), tensor.with_batch(batch)


def _detection_fields(spec: DetectorSpec, batch: int) -> List[cuda.Field]:
    """The fields of ``Postprocessed``: those that a fused plan has too, and the anchors."""
    fields = [_field(tensor, batch) for tensor in detector_tensors(spec).outputs]
    return [*fields, ("anchors", np.int32, (batch, spec.nms.max_total_detections))]


def _library() -> native.Library:
    library = native.load()
    assert library is not None
    return library


def _why_no_kernels() -> str:
    """The reason why the native library cannot work on the GPU; empty if it can."""
    library = native.load()
    if library is None:
        return "the native library is not built: run `make plugin`"
    return "" if library.cuda_architectures else "the native library was built without CUDA"
