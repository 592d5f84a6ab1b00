"""Quantisation-aware training: an OD API checkpoint whose network in INT8 is nearer to that in float32.

The network of ``heads_int8.onnx`` is made again in TensorFlow: the pairs become fake quantisation with the
same ranges, at the same inputs. Rounding has no gradient; it counts as the identity, and as 0 where a range
clips (Bengio et al. 2013, arXiv:1308.3432; Krishnamoorthi 2018, arXiv:1806.08342). The float32 network is the
teacher, so pictures suffice and no labels are needed. Kernels, biases and the two parameters of each
BatchNorm are trained; BatchNorm's statistics stay.

The result is an OD API model again. Chapters 1 and 2 take it, and `odtrt quantise --ranges` gives it the
ranges that it was trained with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple, Union

import numpy as np

from odtrt_lib import folder as folders
from odtrt_lib import onnx_model
from odtrt_lib.errors import CheckError, InputError
from odtrt_lib.int8 import qdq, sensitivity
from odtrt_lib.int8.stage import CALIBRATION, MODEL, Picture, pixels, read_ranges
from odtrt_lib.preprocess import preprocess
from odtrt_lib.spec import DetectorSpec, load_spec

RANGES = "int8_ranges.json"
LARGEST_NOISE_RATIO = 2.0
"""Between the noise of the network in TensorFlow and that of ``heads_int8.onnx``: two runtimes round at other
places, and the differences grow to the size of the quantisation noise itself."""

_STATE, _SETTINGS = "training", "settings.json"
_TRAINED_INPUTS = {"Conv2D": (1,), "DepthwiseConv2dNative": (1,), "BiasAdd": (1,), "FusedBatchNormV3": (1, 2)}
_STEPS_BETWEEN_SAVES = 50
_WARM_STEPS = 20
_SEED = 1
_LAST_LEARNING_RATE = 0.01  # of the first

Heads = Tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Progress:
    """step: how many steps are made. made: those since the last report. losses: their means, for people."""

    step: int
    made: int
    losses: str = ""


@dataclasses.dataclass(frozen=True)
class Trained:
    """model: the folder of the new OD API model. first_loss, last_loss: means over the first and the last
    tenth of the steps that this call made; None if it found all of them done."""

    model: Path
    steps: int
    first_loss: Union[float, None]
    last_loss: Union[float, None]


def train(
    source: Union[str, Path],
    folder: Union[str, Path],
    images: Sequence[Picture],
    output: Union[str, Path],
    *,
    steps: int = 600,
    batch: int = 8,
    learning_rate: float = 1e-4,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Trains the OD API model ``source`` and writes the result as an OD API model into ``output``.

    source: as for :func:`odtrt_lib.export.export`. folder: its model folder, with ``heads_int8.onnx``; its
    ranges and its choice of convolutions are taken. images: as for :func:`odtrt_lib.int8.quantise`; some
    hundred or more. An interrupted call goes on where it was when it is made again with the same arguments.

    Raises InputError if the folder is another checkpoint's, if it is not quantised, for unreadable pictures,
    and if ``output`` has something else in it; CheckError if the network with fake quantisation is not that
    of ``heads_int8.onnx``.
    """
    from odtrt_lib.export.stage import trainable_network

    folder, output = Path(folder), Path(output)
    files = folders.sealed(folder, "heads.onnx", MODEL.file, "spec.json")
    spec = load_spec(folder / "spec.json", files["spec.json"])
    float_model = onnx_model.load(folder / "heads.onnx", files["heads.onnx"], "train")
    int8_model = onnx_model.load(folder / MODEL.file, files[MODEL.file], "train")
    where = qdq.placement(float_model, qdq.in_float(float_model, int8_model))
    ranges = read_ranges(folder / CALIBRATION, where)
    if not images:
        raise InputError("no pictures to train with")
    settings = {
        "checkpoint": spec.source.checkpoint_sha256,
        "ranges": hashlib.sha256(repr([*where.convs, *ranges.items()]).encode()).hexdigest(),
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
    }
    _require_usable(output, settings)
    network = trainable_network(source, spec)
    student, teacher, variables = _functions(network, where, ranges)
    _require_same_network(student, float_model, int8_model, inputs_of(images[:4], spec))
    losses = _Loop(student, teacher, variables, output, settings).run(images, spec, report)
    _write_model(network, output, folder / CALIBRATION)
    tenth = max(1, len(losses) // 10)
    first, last = (float(np.mean(part)) if losses else None for part in (losses[:tenth], losses[-tenth:]))
    return Trained(output, steps, first, last)


def inputs_of(images: Sequence[Picture], spec: DetectorSpec) -> np.ndarray:
    """Network inputs of pictures, float32 ``[images, height, width, 3]``."""
    chosen = [preprocess(pixels(one, number), spec.input)[0] for number, one in enumerate(images, 1)]
    return np.ascontiguousarray(np.stack(chosen).transpose(0, 2, 3, 1))


# ---- The network with fake quantisation -----------------------------------------------------------------


def _functions(network: Any, where: qdq.Placement, ranges: Mapping[str, float]) -> Tuple[Any, Any, List[Any]]:
    """The student, the teacher, and the variables that are trained.

    Both functions take network inputs, float32 ``[batch, height, width, 3]``, and return the two heads.
    """
    from odtrt_lib.convert.rewrite import OUTPUTS, plain_graph
    from odtrt_lib.export import odapi

    tf = odapi.tensorflow()
    plain = plain_graph(network.graph)
    edges = _edges(plain, where)
    rewritten = with_fake_quantisation(plain, [(node, i, ranges[tensor]) for node, i, tensor in edges])
    kernels = _kernels(plain, where)
    trained = {name: network.variables[name] for name in _trained(plain) if name in network.variables}

    def heads(graph: Any, image: Any, values: Mapping[str, Any]) -> Heads:
        given = {"image:0": image, **{f"{name}:0": value for name, value in values.items()}}
        names = [f"{name}:0" for name in OUTPUTS]
        found = tf.graph_util.import_graph_def(graph, input_map=given, return_elements=names, name="")
        return tuple(found)

    def student(image: Any) -> Heads:
        values = {
            name: _rounded(tf, variable, kernels[name]) if name in kernels else tf.identity(variable)
            for name, variable in trained.items()
        }
        return heads(rewritten, image, values)

    height, width = network.size
    signature = [tf.TensorSpec([None, height, width, 3], tf.float32)]
    teacher = tf.function(lambda image: heads(plain, image, {}), input_signature=signature, autograph=False)
    variables = list({id(variable): variable for variable in trained.values()}.values())
    return tf.function(student, input_signature=signature, autograph=False), teacher, variables


def _edges(graph: Any, where: qdq.Placement) -> List[Tuple[str, int, str]]:
    """The edges of the ONNX network in TensorFlow's: node, input, tensor of the ONNX network.

    A convolution of the ONNX network has the name of TensorFlow's, or of the BiasAdd behind it.
    """
    nodes = {node.name: node for node in graph.node}
    found = []
    for edge in where.edges:
        node = nodes.get(edge.node)
        if node is not None and node.op == "BiasAdd":
            node = nodes[node.input[0].partition(":")[0]]
        if node is None:
            raise CheckError(f"TensorFlow's graph has no node {edge.node!r}; run `odtrt convert` again")
        found.append((node.name, edge.index, edge.tensor))
    return found


def with_fake_quantisation(graph: Any, edges: Sequence[Tuple[str, int, float]]) -> Any:
    """A copy of the GraphDef in which inputs are rounded to 8 bits. edges: node, input, amax.

    FakeQuantWithMinMaxVars from -amax * 128 / 127 to amax has the codes of QuantizeLinear with scale
    amax / 127 and zero point 0.
    """
    from odtrt_lib.export import odapi

    tf = odapi.tensorflow()
    result = tf.compat.v1.GraphDef()
    result.CopyFrom(graph)
    nodes = {node.name: node for node in result.node}

    def add(name: str, operation: str, inputs: Sequence[str] = ()) -> Any:
        node = result.node.add(name=name, op=operation)
        node.input.extend(inputs)
        return node

    for name, index, amax in edges:
        source = nodes[name].input[index]
        new = f"{name}/input_{index}/rounded"
        limits = []
        for end, value in (("min", -amax * (qdq.LEVELS + 1) / qdq.LEVELS), ("max", amax)):
            constant = add(f"{new}/{end}", "Const")
            constant.attr["dtype"].type = tf.float32.as_datatype_enum
            constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, tf.float32, []))
            limits.append(constant.name)
        rounding = add(new, "FakeQuantWithMinMaxVars", [source, *limits])
        rounding.attr["num_bits"].i = 8
        rounding.attr["narrow_range"].b = False
        nodes[name].input[index] = new
    return result


def _kernels(graph: Any, where: qdq.Placement) -> Dict[str, Tuple[int, ...]]:
    """The constants that are kernels of INT8 convolutions, with the axes over which they share a scale."""
    nodes = {node.name: node for node in graph.node}
    axes = {"Conv2D": (0, 1, 2), "DepthwiseConv2dNative": (0, 1)}
    found = {}
    for name in where.convs:
        node = nodes[name]
        if node.op == "BiasAdd":
            node = nodes[node.input[0].partition(":")[0]]
        found[node.input[1].partition(":")[0]] = axes[node.op]
    return found


def _trained(graph: Any) -> Iterator[str]:
    for node in graph.node:
        for index in _TRAINED_INPUTS.get(node.op, ()):
            yield node.input[index].partition(":")[0]


def _rounded(tf: Any, kernel: Any, axes: Tuple[int, ...]) -> Any:
    """The kernel in codes, times its scales; the gradient is that of the kernel itself."""
    scale = tf.maximum(tf.reduce_max(tf.abs(kernel), axes, keepdims=True) / qdq.LEVELS, 1e-8)
    codes = tf.round(kernel / scale)
    return kernel + tf.stop_gradient(codes * scale - kernel)


def _require_same_network(student: Any, float_model: Any, int8_model: Any, images: np.ndarray) -> None:
    inputs = [np.ascontiguousarray(image.transpose(2, 0, 1))[None] for image in images]
    wanted = sensitivity.heads_of(float_model, inputs)
    own = [tuple(head.numpy() for head in student(image[None])) for image in images]
    expected = sensitivity.noise(wanted, sensitivity.heads_of(int8_model, inputs))
    for name, found, other in zip(("boxes", "classes"), sensitivity.noise(wanted, own), expected):
        if not 1 / LARGEST_NOISE_RATIO < found / other < LARGEST_NOISE_RATIO:
            raise CheckError(
                f"with fake quantisation TensorFlow's {name} have {sensitivity.sqnr_db(found):.1f} dB of "
                f"signal over noise, {MODEL.file} has {sensitivity.sqnr_db(other):.1f}: not the same network"
            )


# ---- Training ----------------------------------------------------------------------------------------------


class _Loop:
    """The training steps, and their state in a folder."""

    def __init__(
        self, student: Any, teacher: Any, variables: List[Any], output: Path, settings: Mapping[str, Any]
    ) -> None:
        from odtrt_lib.export import odapi

        self.tf = tf = odapi.tensorflow()
        self.student, self.teacher, self.variables = student, teacher, variables
        self.settings = settings
        self.optimizer = tf.keras.optimizers.Adam(settings["learning_rate"])
        self.optimizer.build(variables)
        self.step = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.checkpoint = tf.train.Checkpoint(
            optimizer=self.optimizer, step=self.step, **{f"v{i}": one for i, one in enumerate(variables)}
        )
        state = output / _STATE
        state.mkdir(parents=True, exist_ok=True)
        with folders.atomic_write(state / _SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings))
        self.manager = tf.train.CheckpointManager(self.checkpoint, str(state), max_to_keep=1)
        self.make_step = tf.function(self._make_step, autograph=False)

    def run(
        self, images: Sequence[Picture], spec: DetectorSpec, report: Callable[[Progress], None]
    ) -> List[float]:
        """Makes the steps that are left; returns the loss of each of them."""
        if self.manager.latest_checkpoint:
            self.checkpoint.restore(self.manager.latest_checkpoint).assert_existing_objects_matched()
            report(Progress(int(self.step), int(self.step)))
        losses: List[float] = []
        recent: List[Tuple[float, float]] = []
        for step in range(int(self.step.numpy()), self.settings["steps"]):
            self.optimizer.learning_rate.assign(self._learning_rate(step))
            random = np.random.default_rng([_SEED, step])
            count = min(self.settings["batch"], len(images))
            chosen = [images[i] for i in random.choice(len(images), count, replace=False)]
            found = self.make_step(self.tf.constant(inputs_of(chosen, spec)))
            recent.append((float(found[0]), float(found[1])))
            losses.append(sum(recent[-1]))
            if not math.isfinite(losses[-1]):
                raise CheckError(f"step {step}: the loss is {losses[-1]}; take a lower learning rate")
            self.step.assign(step + 1)
            if (step + 1) % _STEPS_BETWEEN_SAVES == 0 or step + 1 == self.settings["steps"]:
                self.manager.save()
                box, label = np.mean(recent, axis=0)
                report(Progress(step + 1, len(recent), f": box {box:.4f}, class {label:.4f}"))
                recent = []
        return losses

    def _learning_rate(self, step: int) -> float:
        """A short rise, then a cosine down to a hundredth (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
        share = step / self.settings["steps"]
        falling = _LAST_LEARNING_RATE + (1 - _LAST_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * share))
        return float(self.settings["learning_rate"]) * min(1.0, (step + 1) / _WARM_STEPS) * falling

    def _make_step(self, image: Any) -> Tuple[Any, Any]:
        """Boxes count where the teacher sees something. Classes: the cross-entropy against the teacher's
        scores, less its least value (Hinton et al. 2015, arXiv:1503.02531)."""
        tf = self.tf
        boxes, logits = (tf.stop_gradient(head) for head in self.teacher(image))
        scores = tf.sigmoid(logits)
        weight = tf.reduce_max(scores, -1)
        total = tf.reduce_sum(weight)
        least = tf.nn.sigmoid_cross_entropy_with_logits(labels=scores, logits=logits)
        with tf.GradientTape() as tape:
            own_boxes, own_logits = self.student(image)
            box_loss = tf.reduce_sum(weight[..., None] * tf.square(own_boxes - boxes)) / total
            cross = tf.nn.sigmoid_cross_entropy_with_logits(labels=scores, logits=own_logits)
            class_loss = tf.reduce_sum(cross - least) / total
            loss = box_loss + class_loss
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, self.variables), 1.0)
        self.optimizer.apply_gradients(zip(gradients, self.variables))
        return box_loss, class_loss


def _require_usable(output: Path, settings: Mapping[str, Any]) -> None:
    known = output / _STATE / _SETTINGS
    if not output.exists():
        return
    if not known.is_file():
        raise InputError(f"{output}: exists, and is no training of `odtrt qat`; choose another folder")
    if known.read_text() != json.dumps(settings):
        raise InputError(
            f"{output}: has a training with other settings, model or ranges in it; choose another folder, or "
            "delete it"
        )


def _write_model(network: Any, output: Path, calibration: Path) -> None:
    from odtrt_lib.export import odapi

    tf = odapi.tensorflow()
    target = output / "checkpoint"
    target.mkdir(exist_ok=True)
    checkpoint = tf.train.Checkpoint(model=network.model)
    checkpoint.save_counter.assign(1)
    checkpoint.write(str(target / "next"))
    for suffix in ("data-00000-of-00001", "index"):
        os.replace(target / f"next.{suffix}", target / f"ckpt-0.{suffix}")
    (target / "checkpoint").write_text('model_checkpoint_path: "ckpt-0"\n')
    shutil.copyfile(network.files.pipeline, output / "pipeline.config")
    if network.label_map is not None:
        shutil.copyfile(network.label_map, output / network.label_map.name)
    shutil.copyfile(calibration, output / RANGES)
