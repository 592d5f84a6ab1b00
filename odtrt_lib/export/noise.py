"""Measures the numerical noise of a frozen graph, that is, how much two correct programs may differ.

float32 rounds, and every layer multiplies the rounding errors of the layers before it. The error of the
outputs depends on the weights: 1e-6 of the outputs' scale for one detector, 1e-2 for another. No fixed
tolerance suits both. So the frozen graph is computed in float64 (:func:`in_float64`), which counts as the
truth here, and in float32. The noise is the distance of TensorFlow's float32 from the truth. Another program
that should compute the same (the eager model of chapter 1, the ONNX graph of chapter 2) may be :data:`FACTOR`
times as far from the truth. If it is farther, it computes something else.

Large noise can hide errors. So the yardstick also says how small an error it would reveal
(:attr:`Yardstick.sees_kernel_change`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from odtrt_lib.export import odapi

INPUT, OUTPUTS = "image", ("box_encodings", "class_logits")

FACTOR = 5.0
"""How many times as far from the truth as TensorFlow's float32 a correct program may be.

Measured: the eager model is 1 to 1.4 times as far, ONNX Runtime 0.1 to 2; 3.5 times where a picture repeats
one value and long sums drift, for which the gates' pictures have grain. A kernel x 1.001 is 100 to 4,000
times as far (EfficientDet-D0 and D1, see results/noise.cpu.json).
"""

KERNEL_CHANGE = 1e-3
"""A yardstick that sees this relative change of a kernel is decisive."""

# The least noise, even if TensorFlow happens to be exact: a few roundings of the result.
_UNAVOIDABLE = 2.0**-21
_CONVOLUTIONS = ("Conv2D", "DepthwiseConv2dNative")
_BATCH_NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")

Heads = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """The true heads of some pictures, and the noise of float32.

    exact: a head's name -> float64 ``[images, anchors, columns]``, the graph computed in float64.
    rounded: the same, computed by TensorFlow in float32.
    noise: a head's name -> float64 ``[images, groups, 2]``: the distance of ``rounded`` from ``exact``, as
        root mean square and as maximum, in each group of anchors (:func:`groups_of`). It is the larger one of
        two runs, whose inputs differ by one unit in the last place, and at least a few roundings of the
        result.
    sees_kernel_change: the smallest relative change of a kernel that moves some group by more than FACTOR
        times the noise on the first picture, whether it is the kernel of the first, the middle or the last
        convolution over feature maps. 1 means that no change is revealed.
    """

    exact: Heads
    rounded: Heads
    noise: Heads
    sees_kernel_change: float

    @property
    def is_decisive(self) -> bool:
        """Whether a kernel that is wrong by :data:`KERNEL_CHANGE` would be revealed."""
        return self.sees_kernel_change <= KERNEL_CHANGE


@dataclasses.dataclass(frozen=True)
class Distance:
    """The distance of a candidate's head from the truth.

    times_noise: the largest quotient of distance and noise; NaN if the candidate is not finite.
    image, anchors: the place of this quotient.
    max_relative, rms_relative: the candidate's distance; noise_max_relative, noise_rms_relative:
        TensorFlow's. Each is taken over all anchors of the worst image, in units of the head's scale for that
        image: its standard deviation, or a thousandth of its largest magnitude if that is more (as for a head
        that is constant except for its bias).
    """

    times_noise: float
    image: int
    anchors: tuple[int, int]
    max_relative: float
    rms_relative: float
    noise_max_relative: float
    noise_rms_relative: float

    @property
    def is_noise(self) -> bool:
        return self.times_noise <= FACTOR


def measure(frozen: Any, pictures: np.ndarray, batch: int | None) -> Yardstick:
    """The yardstick of a frozen ``GraphDef`` of raw heads.

    pictures: network inputs, float32 ``[images, height, width, 3]``. The noise depends on them, so pass
        several kinds, and as the first one a picture like a photograph. batch: the graph's fixed batch, or
        None.
    """
    direction = np.random.default_rng(1).choice(np.array([-np.inf, np.inf], np.float32), pictures.shape)
    with _Session(frozen) as session:
        rounded = session.run(pictures, batch)
        moved = session.run(np.nextafter(pictures, direction), batch)
    with _Session(in_float64(frozen), is_optimized=False) as session:
        exact = session.run(pictures.astype(np.float64), batch)
        noise = {}
        for name in OUTPUTS:
            floor = _UNAVOIDABLE * _spread(exact[name])
            own = (_spread(found[name] - exact[name]) for found in (rounded, moved))
            noise[name] = np.maximum.reduce([*own, np.maximum(floor, np.finfo(np.float32).tiny)])
        return Yardstick(
            exact, rounded, noise, _kernel_change_seen(session, pictures[:1], batch, exact, noise)
        )


def compare(yardstick: Yardstick, candidate: Heads) -> dict[str, Distance]:
    """The distance of ``candidate`` from the truth, for each head.

    candidate: a head's name -> ``[images, anchors, columns]``, from a program that should compute the same
    network on the same pictures.
    """
    return {name: _distance(yardstick, name, candidate[name]) for name in OUTPUTS}


def batches(pictures: np.ndarray, batch: int | None) -> list[np.ndarray]:
    """The pictures in batches of a fixed size, of which the last is filled up with copies of its first
    picture; if ``batch`` is None, the first picture and the rest."""
    if batch is None:
        return [piece for piece in (pictures[:1], pictures[1:]) if len(piece)]
    filled = np.concatenate([pictures, np.repeat(pictures[:1], -len(pictures) % batch, axis=0)])
    return list(filled.reshape(-1, batch, *pictures.shape[1:]))


def groups_of(anchors: int) -> list[tuple[int, int]]:
    """First and last anchor (exclusive) of each group that is judged on its own: 3/4 of all, 3/16, 3/64, ...

    In a pyramid whose sides halve, the groups are the levels. A mean over all anchors would hide an error in
    the smallest level, which has one anchor in three hundred.
    """
    cuts = [0]
    while anchors - cuts[-1] >= 32:
        cuts.append(anchors - (anchors - cuts[-1]) // 4)
    return list(zip(cuts, [*cuts[1:], anchors], strict=True))


def _spread(values: np.ndarray) -> np.ndarray:
    """Root mean square and maximum in each group of anchors: ``[images, groups, 2]``."""
    magnitude = np.abs(values)
    parts = [magnitude[:, first:last] for first, last in groups_of(values.shape[1])]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.stack(
            [
                np.stack([np.sqrt(np.mean(part**2, axis=(1, 2))), part.max(axis=(1, 2))], axis=-1)
                for part in parts
            ],
            axis=1,
        )


def _scale(exact: np.ndarray) -> np.ndarray:
    inside = tuple(range(1, exact.ndim))
    scale = np.maximum(exact.std(axis=inside), np.abs(exact).max(axis=inside) / 1000)
    return np.maximum(scale, np.finfo(np.float32).tiny)


def _relative(exact: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Maximum and root mean square of the distance in units of the scale, for the worst image."""
    error = np.abs(values.astype(np.float64) - exact)
    scale = _scale(exact)
    with np.errstate(over="ignore", invalid="ignore"):
        rms = np.sqrt(np.mean(error**2, axis=(1, 2)))
    return float(np.max(error.max(axis=(1, 2)) / scale)), float(np.max(rms / scale))


def _distance(yardstick: Yardstick, name: str, candidate: np.ndarray) -> Distance:
    exact = yardstick.exact[name]
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = (_spread(candidate - exact) / yardstick.noise[name]).max(axis=-1)
    image, group = (int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
    return Distance(
        float(ratio[image, group]),
        image,
        groups_of(exact.shape[1])[group],
        *_relative(exact, candidate),
        *_relative(exact, yardstick.rounded[name]),
    )


def _kernel_change_seen(
    session: _Session, picture: np.ndarray, batch: int | None, exact: Heads, noise: Heads
) -> float:
    kernels = session.kernels()
    if not kernels:
        return 1.0
    seen = []
    for kernel in dict.fromkeys((kernels[0], kernels[len(kernels) // 2], kernels[-1])):
        changed = session.value(kernel) * (1 + KERNEL_CHANGE)
        moved = session.run(picture.astype(np.float64), batch, {kernel: changed})
        times = max(
            float((_spread(moved[name] - exact[name][:1]) / noise[name][:1]).max()) for name in OUTPUTS
        )
        seen.append(KERNEL_CHANGE * FACTOR / times if times > 0 else 1.0)
    return min(max(seen), 1.0)


class _Session:
    """A frozen graph of raw heads, ready to run.

    is_optimized: whether TensorFlow optimises it first, as it usually does; this takes longer than one run.
    """

    def __init__(self, graph_def: Any, is_optimized: bool = True) -> None:
        tf = odapi.tensorflow()
        self._graph = tf.Graph()
        with self._graph.as_default():
            tf.import_graph_def(graph_def, name="")
        settings = tf.compat.v1.ConfigProto()
        settings.graph_options.rewrite_options.disable_meta_optimizer = not is_optimized
        self._session = tf.compat.v1.Session(graph=self._graph, config=settings)

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def run(
        self, pictures: np.ndarray, batch: int | None, changes: dict[str, np.ndarray] | None = None
    ) -> Heads:
        """The heads of ``pictures``. changes: a tensor's name -> the value that it gets in this run."""
        fetches = [f"{name}:0" for name in OUTPUTS]
        results = [
            self._session.run(fetches, {f"{INPUT}:0": piece, **(changes or {})})
            for piece in batches(pictures, batch)
        ]
        return {
            name: np.concatenate(parts)[: len(pictures)]
            for name, parts in zip(OUTPUTS, zip(*results, strict=True), strict=True)
        }

    def value(self, tensor: str) -> np.ndarray:
        return self._session.run(tensor)

    def kernels(self) -> list[str]:
        """The constants that are kernels of convolutions over feature maps, in the order of the graph.

        Kernels of squeeze-and-excitation, whose input is one value a channel, are left out: a sigmoid follows
        them, so many of them hardly affect the outputs.
        """
        found: dict[str, None] = {}
        for operation in self._graph.get_operations():
            if operation.type in _CONVOLUTIONS and operation.inputs[0].shape[1:3] != [1, 1]:
                source = operation.inputs[1].op
                while source.type == "Identity":
                    source = source.inputs[0].op
                if source.type == "Const":
                    found[source.outputs[0].name] = None
        return list(found)


def in_float64(frozen: Any) -> Any:
    """A new ``GraphDef`` that computes the same network in float64; its input and outputs are float64, too.

    TensorFlow has no batch normalisation in float64, so this is written in simpler operations. Any other
    operation without float64 is computed in float32, between two casts.
    """
    tf = odapi.tensorflow()
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(frozen, name="")
    wide = tf.compat.v1.GraphDef()
    wide.versions.CopyFrom(frozen.versions)
    kept_narrow: set[str] = set()
    for node in frozen.node:
        operation = graph.get_operation_by_name(node.name)
        if node.op in _BATCH_NORMS and not node.attr["is_training"].b:
            _write_batch_norm(wide, node)
            continue
        new = wide.node.add()
        new.CopyFrom(node)
        if not any(t.dtype == tf.float32 for t in (*operation.inputs, *operation.outputs)):
            continue
        _widen(new)
        if not _is_known_in_float64(new, operation):
            new.CopyFrom(node)
            kept_narrow.add(node.name)
            _cast_inputs(wide, new, operation)
    _cast_outputs(wide, kept_narrow, graph)
    return wide


def _widen(node: Any) -> None:
    tf = odapi.tensorflow()
    narrow, wide = tf.float32.as_datatype_enum, tf.float64.as_datatype_enum
    for value in node.attr.values():
        if value.type == narrow:
            value.type = wide
        if value.HasField("list"):
            value.list.type[:] = [wide if kind == narrow else kind for kind in value.list.type]
    if node.op == "Const":
        tensor = node.attr["value"].tensor
        tensor.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(tensor).astype(np.float64)))


def _is_known_in_float64(node: Any, operation: Any) -> bool:
    """Whether TensorFlow has the operation with all its float32 inputs and outputs in float64."""
    tf = odapi.tensorflow()
    definition = operation.op_def
    if any(
        arg.type == tf.float32.as_datatype_enum for arg in (*definition.input_arg, *definition.output_arg)
    ):
        return False
    return any(
        kernel.device_type in ("CPU", "DEFAULT")
        and all(
            node.attr[limit.name].type in limit.allowed_values.list.type
            for limit in kernel.constraint
            if limit.allowed_values.list.type and node.attr[limit.name].type
        )
        for kernel in _registered_kernels(node.op)
    )


@functools.cache
def _registered_kernels(operation: str) -> tuple[Any, ...]:
    from tensorflow.python.framework import kernels

    return tuple(kernels.get_registered_kernels_for_op(operation).kernel)


def _cast(graph_def: Any, name: str, source: str, to_float64: bool) -> str:
    tf = odapi.tensorflow()
    kinds = [tf.float32.as_datatype_enum, tf.float64.as_datatype_enum]
    node = graph_def.node.add(name=name, op="Cast", input=[source])
    node.attr["SrcT"].type, node.attr["DstT"].type = kinds if to_float64 else kinds[::-1]
    return name


def _cast_inputs(graph_def: Any, node: Any, operation: Any) -> None:
    tf = odapi.tensorflow()
    for i, tensor in enumerate(operation.inputs):
        if tensor.dtype == tf.float32:
            node.input[i] = _cast(graph_def, f"{node.name}/narrow_{i}", node.input[i], to_float64=False)


def _cast_outputs(graph_def: Any, kept_narrow: set[str], graph: Any) -> None:
    """Casts the results of the operations that stayed in float32 to float64, for every consumer."""
    tf = odapi.tensorflow()
    widened = {}
    for name in kept_narrow:
        for i, tensor in enumerate(graph.get_operation_by_name(name).outputs):
            if tensor.dtype == tf.float32:
                widened[tensor.name] = f"{name}/wide_{i}"
    for node in list(graph_def.node):
        is_cast_of_one = node.op == "Cast" and node.name in widened.values()
        for i, source in enumerate(node.input):
            full = source if ":" in source else f"{source}:0"
            if full in widened and not is_cast_of_one:
                node.input[i] = widened[full]
    for tensor_name, name in widened.items():
        _cast(graph_def, name, tensor_name, to_float64=True)


def _write_batch_norm(graph_def: Any, node: Any) -> None:
    """Replaces the node by ``(x - mean) * (scale * rsqrt(variance + epsilon)) + offset``. The sum gets the
    node's name."""
    tf = odapi.tensorflow()
    wide = tf.float64.as_datatype_enum
    values, scale, offset, mean, variance = node.input[:5]

    def add(name: str, operation: str, *inputs: str) -> str:
        graph_def.node.add(name=name, op=operation, input=inputs).attr["T"].type = wide
        return name

    epsilon = graph_def.node.add(name=f"{node.name}/epsilon", op="Const")
    epsilon.attr["dtype"].type = wide
    epsilon.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.float64(node.attr["epsilon"].f)))
    deviation = add(f"{node.name}/rsqrt", "Rsqrt", add(f"{node.name}/sum", "AddV2", variance, epsilon.name))
    factor = add(f"{node.name}/factor", "Mul", scale, deviation)
    centred = add(f"{node.name}/centred", "Sub", values, mean)
    add(node.name, "AddV2", add(f"{node.name}/product", "Mul", centred, factor), offset)
