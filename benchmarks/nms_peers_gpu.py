"""What TensorRT itself offers for NMS, and our plugin, each alone in an engine of the full TensorRT.

    python benchmarks/nms_peers_gpu.py PLUGIN [HEADS] [--quick] [--five]

writes results/nms_peers.<gpu>.json, each row as soon as it is measured; what was measured before stays until
the same row is measured again. PLUGIN: libodtrt_tensorrt.so. HEADS: the folder that
benchmarks/record_heads.py wrote; without it only drawn scenes are measured. --five: PLUGIN was built with
``-DCMAKE_CUDA_FLAGS=-DODTRT_OVERLAPS_FROM=99`` and goes the way of GPUs before compute capability 9, five
kernels without clusters, as an Orin does; it alone is measured then. Needs numpy, tensorrt, Polygraphy and
odtrt_lib, on Python 3.8 or newer.

Rows, float32, batch 1, sizes and thresholds as they say:

* ``OdtrtDetect``: ours, from raw heads; ``OdtrtDetect, five kernels``: see --five. ``EfficientNMS_TRT``: from
  raw heads too, as NVIDIA's own samples for the OD API use it (sigmoid and box decoding inside).
  ``BatchedNMSDynamic_TRT``: from decoded boxes and scores, whose making is not in its time; it takes 4,096
  candidates of a class at most. ``NMS layer``: INetworkDefinition::addNMS, from decoded boxes and scores;
  what it gives has no size of its own, so no CUDA graph can hold it: its time is the wall clock of one call.
  A threshold below 0.01 is 0.01 for EfficientNMS_TRT and BatchedNMSDynamic_TRT, whose documentation warns of
  less.
* ``p50_us``, ``p99_us``: device time of one call in a CUDA graph of 20, by events (``timed_by`` says which).
* ``detections``: of the OD API's own semantics (:func:`odtrt_lib.nms.postprocess`). ``found``: what the row's
  implementation gives; ``missing``: reference detections without one of the same class, an IoU of at least
  0.99 and a score within 1e-3.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # odtrt is not installed where it runs

import drawn_heads
import nms_cases
import tensorrt as trt
from gpu_times import gpu_name, graph_times
from tensorrt_gpu import SAMPLING

from odtrt_lib import cuda
from odtrt_lib.engine.bindings import load_plugin, trt_messages
from odtrt_lib.fuse import plugin_attributes
from odtrt_lib.latency.timing import Timing, time_calls
from odtrt_lib.machine import this_machine
from odtrt_lib.nms import decode_boxes, postprocess
from odtrt_lib.results import write_results
from odtrt_lib.spec import BoxCoder, DetectorSpec, NmsSpec, load_spec
from odtrt_lib.tensors import DOMAIN, PLUGIN, PLUGIN_VERSION

SIZES = (1917, 12804, 49104)
THRESHOLDS = (0.3, 0.05, 1e-8)
CLASSES, OBJECTS, IOU = 90, 8, 0.5
PEER_THRESHOLD = 0.01
MAX_CANDIDATES = 4096
SAME_IOU, SAME_SCORE = 0.99, 1e-3
FIVE_KERNELS = "OdtrtDetect, five kernels"


@dataclasses.dataclass(frozen=True)
class Heads:
    """One image's heads, float32 with a batch of 1, and the detector that they come from."""

    source: str
    name: str
    spec: DetectorSpec
    box_encodings: np.ndarray
    class_logits: np.ndarray
    anchors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Found:
    """K detections: boxes [K, 4] normalised, scores [K], classes [K]."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


@functools.lru_cache(maxsize=1)
def builder() -> Any:
    """One for all networks: to make a builder is to load TensorRT's kernels, which takes seconds."""
    return trt.Builder(trt_messages(trt).logger)


class Peer:
    """A network of one node, its engine and its buffers."""

    def __init__(self, inputs: Dict[str, np.ndarray], add: Callable[[Any, Dict[str, Any]], Any]) -> None:
        messages = trt_messages(trt)
        messages.messages.clear()
        network = builder().create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        tensors = {name: network.add_input(name, trt.float32, array.shape) for name, array in inputs.items()}
        self.outputs = add(network, tensors)
        config = builder().create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 4 << 30)
        # A network whose output has as many rows as it finds needs a profile, though all inputs are fixed.
        config.add_optimization_profile(builder().create_optimization_profile())
        plan = builder().build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(f"TensorRT does not build it: {messages.reasons()}")
        self.runtime = trt.Runtime(messages.logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()
        self.stream = cuda.Stream()
        self.inputs, self.results = cuda.Buffer("device"), cuda.Buffer("device")
        self.inputs.arrange([(name, np.float32, array.shape) for name, array in inputs.items()])
        for name, array in inputs.items():
            self.inputs.write(name, array.astype(np.float32), self.stream)
            self.context.set_tensor_address(name, self.inputs.address(name))

    def fixed_outputs(self) -> None:
        """Gives each output memory of the size that the engine states."""
        shapes = {name: tuple(self.context.get_tensor_shape(name)) for name in self.outputs}
        kinds = {name: trt.nptype(self.engine.get_tensor_dtype(name)) for name in self.outputs}
        self.results.arrange([(name, kinds[name], shapes[name]) for name in self.outputs])
        for name in self.outputs:
            self.context.set_tensor_address(name, self.results.address(name))

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.handle):
            raise RuntimeError("TensorRT does not run it")

    def run(self) -> List[np.ndarray]:
        self.enqueue()
        self.stream.synchronize()
        return [self.results.read(name, self.stream) for name in self.outputs]


def main(arguments: Sequence[str]) -> int:
    """What the module says."""
    files = [one for one in arguments if not one.startswith("--")]
    if not files:
        print(__doc__)
        return 2
    plugin, recorded = Path(files[0]), Path(files[1]) if len(files) > 1 else None
    trt.init_libnvinfer_plugins(trt.Logger(trt.Logger.ERROR), "")
    load_plugin(trt.get_plugin_registry(), plugin)
    gpu = gpu_name(this_machine().gpu)
    path = ROOT / "results" / f"nms_peers.{gpu}.json"
    rows: List[Dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    planned = cases(recorded, quick="--quick" in arguments)
    for group in ((FIVE_KERNELS,),) if "--five" in arguments else GROUPS:
        for heads, threshold, name in (
            (heads, threshold, name)
            for heads, thresholds in planned
            for threshold in thresholds
            for name in group
        ):
            row = row_of(heads, threshold, name, IMPLEMENTATIONS[name])
            print(json.dumps(row), flush=True)
            rows = with_row(rows, row)
            write_results(path, "nms_peers", "python benchmarks/nms_peers_gpu.py PLUGIN HEADS", rows)
    return 0


def with_row(rows: Sequence[Dict[str, Any]], row: Dict[str, Any]) -> List[Dict[str, Any]]:
    """``rows`` with the new one instead of its predecessor; one without figures replaces none that has."""
    earlier = next((one for one in rows if identity(one) == identity(row)), None)
    if earlier is not None and "error" in row and "error" not in earlier:
        return list(rows)
    return [one for one in rows if one is not earlier] + [row]


def identity(row: Dict[str, Any]) -> Tuple[Any, ...]:
    return tuple(row[key] for key in ("implementation", "source", "heads", "anchors", "score_threshold"))


def cases(recorded: Optional[Path], quick: bool) -> List[Tuple[Heads, Sequence[float]]]:
    found = [(drawn(anchors), THRESHOLDS[: 2 if quick else 3]) for anchors in SIZES]
    found.append((one_class(2000), (0.0,)))
    for path in sorted(recorded.glob("*.npz")) if recorded is not None else []:
        heads = read_heads(path)
        if heads.spec.heads.scores.converter == "sigmoid":
            found.append((heads, THRESHOLDS[:2]))
    return found


def drawn(anchors: int) -> Heads:
    spec = nms_cases.detector_spec(
        anchors, CLASSES, NmsSpec(0.05, IOU, 100, 100, False, True), coder=BoxCoder(1.0, 1.0, 1.0, 1.0)
    )
    priors = drawn_heads.grid_anchors(anchors)
    boxes, logits = drawn_heads.draw(0, OBJECTS, priors, CLASSES, (1.0, 1.0, 1.0, 1.0))
    return Heads("drawn", f"{OBJECTS} objects", spec, boxes[None], logits[None], priors)


def one_class(count: int) -> Heads:
    """Overlapping boxes of one class, all of which take part in the suppression."""
    rng = np.random.default_rng(count)
    priors = np.concatenate([rng.uniform(0.2, 0.8, (count, 2)), rng.uniform(0.03, 0.2, (count, 2))], axis=1)
    spec = nms_cases.detector_spec(
        count, 1, NmsSpec(0.0, IOU, count, count, False, True), coder=BoxCoder(1.0, 1.0, 1.0, 1.0)
    )
    logits = rng.normal(0, 2, (1, count, 1)).astype(np.float32)
    zeros = np.zeros((1, count, 4), np.float32)
    return Heads("drawn", "boxes of one class", spec, zeros, logits, priors.astype(np.float32))


def read_heads(path: Path) -> Heads:
    """The first recorded image, in the peers' form: no background column, encodings without scales."""
    held = np.load(str(path))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spec.json").write_text(str(held["spec"]))
        spec = load_spec(Path(folder) / "spec.json")
    coder = spec.heads.box_coder
    scales = np.array([coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale], np.float32)
    boxes = (held["box_encodings"][:1] / scales).astype(np.float32)
    logits = held["class_logits"][:1, :, int(spec.heads.background_column) :]
    ones = BoxCoder(1.0, 1.0, 1.0, 1.0)
    plain = dataclasses.replace(
        spec, heads=dataclasses.replace(spec.heads, background_column=False, box_coder=ones)
    )
    return Heads("recorded", path.stem, plain, boxes, np.ascontiguousarray(logits), held["anchors"])


def row_of(heads: Heads, threshold: float, name: str, measure: Callable[..., Any]) -> Dict[str, Any]:
    nms = dataclasses.replace(heads.spec.nms, score_threshold=threshold, iou_threshold=IOU)
    one = dataclasses.replace(heads, spec=dataclasses.replace(heads.spec, nms=nms))
    whole = np.array([[0, 0, 1, 1]], np.float32)
    expected = postprocess(one.box_encodings, one.class_logits, one.anchors, one.spec, whole)
    count = int(expected.num_detections[0])
    reference = Found(*(getattr(expected, key)[0, :count] for key in ("boxes", "scores", "classes")))
    row: Dict[str, Any] = {
        "implementation": name,
        "source": heads.source,
        "heads": heads.name,
        "anchors": one.spec.heads.num_anchors,
        "classes": one.spec.heads.num_classes,
        "score_threshold": threshold,
        "max_detections": one.spec.nms.max_total_detections,
        "detections": count,
    }
    try:
        found, used, timed_by, times = measure(one)
        row.update(
            threshold_used=used,
            found=len(found.scores),
            missing=count_missing(reference, found),
            timed_by=timed_by,
            **times.row(),
        )
    except Exception as error:
        row["error"] = " ".join(str(error).split())[:300] or type(error).__name__
    return row


def count_missing(reference: Found, found: Found) -> int:
    """Reference detections without an equal, each of ``found`` used once."""
    left = list(range(len(found.scores)))
    missing = 0
    for box, score, column in zip(reference.boxes, reference.scores, reference.classes):
        fits = (
            i
            for i in left
            if found.classes[i] == column
            and abs(found.scores[i] - score) <= SAME_SCORE
            and iou(found.boxes[i], box) >= SAME_IOU
        )
        match = next(fits, None)
        missing += match is None
        if match is not None:
            left.remove(match)
    return missing


def iou(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    sides = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None)
    areas = np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])
    return float(np.prod(sides) / max(areas - np.prod(sides), 1e-12))


# ---- The implementations: detections, the threshold that was used, how it was timed, times ---------------


def ours(heads: Heads) -> Tuple[Found, float, str, Timing]:
    attributes = plugin_attributes(heads.spec)

    def add(network: Any, tensors: Dict[str, Any]) -> List[str]:
        creator = creator_of(PLUGIN, PLUGIN_VERSION, DOMAIN)
        anchors = constant(network, heads.anchors)
        return add_plugin(
            network,
            creator,
            attributes,
            [tensors["boxes"], tensors["scores"], anchors],
            ["num", "boxes_out", "scores_out", "classes_out"],
        )

    peer = Peer({"boxes": heads.box_encodings, "scores": heads.class_logits}, add)
    return timed(peer, heads.spec.nms.score_threshold)


def efficient(heads: Heads) -> Tuple[Found, float, str, Timing]:
    nms = heads.spec.nms
    used = max(nms.score_threshold, PEER_THRESHOLD if nms.score_threshold > 0 else 0.0)
    attributes = {
        "score_threshold": used,
        "iou_threshold": nms.iou_threshold,
        "max_output_boxes": nms.max_total_detections,
        "background_class": -1,
        "score_activation": 1,
        "class_agnostic": 0,
        "box_coding": 1,
    }

    def add(network: Any, tensors: Dict[str, Any]) -> List[str]:
        creator = creator_of("EfficientNMS_TRT", "1", "")
        anchors = constant(network, heads.anchors[None])
        return add_plugin(
            network,
            creator,
            attributes,
            [tensors["boxes"], tensors["scores"], anchors],
            ["num", "boxes_out", "scores_out", "classes_out"],
        )

    peer = Peer({"boxes": heads.box_encodings, "scores": heads.class_logits}, add)
    return timed(peer, used)


def batched(heads: Heads) -> Tuple[Found, float, str, Timing]:
    nms = heads.spec.nms
    used = max(nms.score_threshold, PEER_THRESHOLD if nms.score_threshold > 0 else 0.0)
    top = min(MAX_CANDIDATES, heads.spec.heads.num_anchors)
    attributes = {
        "shareLocation": 1,
        "backgroundLabelId": -1,
        "numClasses": heads.spec.heads.num_classes,
        "topK": top,
        "keepTopK": min(top, nms.max_total_detections),
        "scoreThreshold": used,
        "iouThreshold": nms.iou_threshold,
        "isNormalized": 1,
        "clipBoxes": 1,
        "scoreBits": 16,
        "caffeSemantics": 0,
    }
    boxes, scores = decoded(heads)

    def add(network: Any, tensors: Dict[str, Any]) -> List[str]:
        creator = creator_of("BatchedNMSDynamic_TRT", "1", "")
        names = ["num", "boxes_out", "scores_out", "classes_out"]
        return add_plugin(network, creator, attributes, [tensors["boxes"], tensors["scores"]], names)

    return timed(Peer({"boxes": boxes[:, :, None], "scores": scores}, add), used)


def layer(heads: Heads) -> Tuple[Found, float, str, Timing]:
    nms = heads.spec.nms
    boxes, scores = decoded(heads)

    def add(network: Any, tensors: Dict[str, Any]) -> List[str]:
        limit = constant(network, np.array(nms.max_detections_per_class, np.int32))
        node = network.add_nms(tensors["boxes"], tensors["scores"], limit)
        node.bounding_box_format = trt.BoundingBoxFormat.CORNER_PAIRS
        node.set_input(3, constant(network, np.array(nms.iou_threshold, np.float32)))
        node.set_input(4, constant(network, np.array(nms.score_threshold, np.float32)))
        names = ["selected", "num"]
        for i, name in enumerate(names):
            node.get_output(i).name = name
            network.mark_output(node.get_output(i))
        return names

    peer = Peer({"boxes": boxes, "scores": scores}, add)
    allocators = {name: Allocator() for name in peer.outputs}
    for name, allocator in allocators.items():
        peer.context.set_output_allocator(name, allocator)

    times = time_calls(peer.enqueue, SAMPLING, peer.stream.synchronize)
    selected = allocators["selected"].numpy(np.int32)[:, 1:]
    best = scores[0, selected[:, 1], selected[:, 0]]
    order = np.argsort(-best, kind="stable")[: nms.max_total_detections]
    kept = selected[order]
    found = Found(boxes[0, kept[:, 1]], best[order], kept[:, 0])
    return found, nms.score_threshold, "wall clock", times


class Allocator(trt.IOutputAllocator):
    """Memory for an output whose size TensorRT knows only when it has run."""

    def __init__(self) -> None:
        trt.IOutputAllocator.__init__(self)
        self.memory: Optional[cuda.Memory] = None
        self.shape: Tuple[int, ...] = ()

    def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
        if self.memory is None or self.memory.size < size:
            self.memory = cuda.Memory(size)
        return self.memory.address

    def notify_shape(self, name: str, shape: Any) -> None:
        self.shape = tuple(shape)

    def numpy(self, dtype: Any) -> np.ndarray:
        assert self.memory is not None
        array, stream = np.empty(self.shape, dtype), cuda.Stream()
        cuda.copy(array.ctypes.data, self.memory.address, array.nbytes, stream)
        stream.synchronize()
        return array


IMPLEMENTATIONS: Dict[str, Callable[[Heads], Tuple[Found, float, str, Timing]]] = {
    "OdtrtDetect": ours,
    FIVE_KERNELS: ours,
    "EfficientNMS_TRT": efficient,
    "BatchedNMSDynamic_TRT": batched,
    "NMS layer": layer,
}
GROUPS = (("OdtrtDetect", "EfficientNMS_TRT"), ("NMS layer",), ("BatchedNMSDynamic_TRT",))
"""What is measured, in turn: a visit to the GPU can end before the last row."""


def timed(peer: Peer, used: float) -> Tuple[Found, float, str, Timing]:
    peer.fixed_outputs()
    num, boxes, scores, classes = peer.run()
    count = int(np.asarray(num).reshape(-1)[0])
    boxes = np.asarray(boxes).reshape(-1, 4)[:count]
    found = Found(boxes, np.asarray(scores).reshape(-1)[:count], np.asarray(classes).reshape(-1)[:count])
    return found, used, "CUDA graph of 20", graph_times(peer.enqueue, peer.stream, SAMPLING)


def decoded(heads: Heads) -> Tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [1, N, 4] clipped to the image, scores float32 [1, N, C]."""
    boxes = decode_boxes(heads.box_encodings[0], heads.anchors, heads.spec.heads.box_coder)
    scores = 1 / (1 + np.exp(-heads.class_logits.astype(np.float64)))
    return np.clip(boxes, 0, 1)[None].astype(np.float32), scores.astype(np.float32)


def constant(network: Any, values: np.ndarray) -> Any:
    weights = trt.Weights(np.ascontiguousarray(values))  # which has one dimension at least, a scalar none
    return network.add_constant(values.shape, weights).get_output(0)


def creator_of(name: str, version: str, namespace: str) -> Any:
    creator = trt.get_plugin_registry().get_plugin_creator(name, version, namespace)
    if creator is None:
        raise RuntimeError(f"TensorRT's registry has no {name}")
    return creator


def add_plugin(
    network: Any, creator: Any, attributes: Dict[str, Any], inputs: List[Any], names: List[str]
) -> List[str]:
    fields, held = [], []
    for name, value in attributes.items():
        is_float = isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))
        array = np.atleast_1d(np.array(value, np.float32 if is_float else np.int32))
        kind = trt.PluginFieldType.FLOAT32 if is_float else trt.PluginFieldType.INT32
        held.append(array)
        fields.append(trt.PluginField(name, array, kind))
    plugin = creator.create_plugin(names[0], trt.PluginFieldCollection(fields))
    if plugin is None:
        raise RuntimeError(f"{creator.name} refuses its attributes")
    node = network.add_plugin_v2(inputs, plugin)
    for i, name in enumerate(names):
        node.get_output(i).name = name
        network.mark_output(node.get_output(i))
    return names


if __name__ == "__main__":
    cuda.memory_info()  # makes the context
    sys.exit(main(sys.argv[1:]))
