"""How far pictures are from those that a network was trained on, by its own BatchNorm parameters.

In training, BatchNorm gives each channel the mean beta and the standard deviation gamma over the pictures
(Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1). Pictures of the same domain give about the same
mean again. The convolutions of ``heads.onnx`` have taken BatchNorm in, so their outputs are these channels;
``frozen.pb`` still has beta and gamma.

The measure says nothing about weights whose BatchNorm parameters are not of a training, and it exceeds LIMIT
if BatchNorm was frozen while the detector was trained on another domain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Iterable, Mapping, Optional, Tuple

import numpy as np

from odtrt_lib.int8 import calibrate

if TYPE_CHECKING:
    import onnx

LIMIT = 0.25
"""``parts`` is at 0.05 on 8 training scenes, at 0.44 on scenes at 5 % of their brightness, and at 0.58 on 16
pictures of COCO."""

_BATCH_NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")

Channels = Tuple[np.ndarray, np.ndarray]


def training_statistics(frozen: Any) -> Dict[str, Channels]:
    """Mean and standard deviation of each channel in training, for the outputs of the graph's BatchNorms.

    frozen: the ``GraphDef`` of ``frozen.pb``. The keys are the names of a BatchNorm and of the node that it
    normalises: the convolution that takes the BatchNorm in keeps its own name.
    """
    nodes = {node.name: node for node in frozen.node}
    found: Dict[str, Channels] = {}
    for node in frozen.node:
        if node.op in _BATCH_NORMS:
            gamma, beta = (_constant(nodes, name) for name in node.input[1:3])
            if gamma is not None and beta is not None:
                found[node.name] = found[node.input[0].partition(":")[0]] = beta, np.abs(gamma)
    return found


def _constant(nodes: Dict[str, Any], name: str) -> Optional[np.ndarray]:
    from tensorflow.python.framework import tensor_util

    node = nodes[name.partition(":")[0]]
    while node.op == "Identity":
        node = nodes[node.input[0].partition(":")[0]]
    if node.op != "Const":
        return None
    return tensor_util.MakeNdarray(node.attr["value"].tensor).astype(np.float64)


def measured(
    model: onnx.ModelProto, statistics: Mapping[str, Channels], inputs: Iterable[np.ndarray]
) -> Optional[float]:
    """The median over all channels of |mean - mean in training| / standard deviation in training.

    model: ``heads.onnx``. inputs: network inputs ``[batch, 3, height, width]``. None if no convolution of the
    model has statistics.
    """
    # What a BatchNorm that is still a node of its own reads is not yet normalised.
    raw = {node.input[0] for node in model.graph.node if node.op_type == "BatchNormalization"}
    tensors = [
        node.output[0]
        for node in model.graph.node
        if node.op_type in ("Conv", "BatchNormalization")
        and node.output[0] in statistics
        and node.output[0] not in raw
    ]
    if not tensors:
        return None
    read = calibrate.reader_of(model, tensors)
    sums = [np.zeros(len(statistics[name][0])) for name in tensors]
    counts = np.zeros(len(tensors))
    for image in inputs:
        for number, values in enumerate(read(image)):
            sums[number] += values.sum(axis=(0, 2, 3), dtype=np.float64)
            counts[number] += values.size / values.shape[1]
    distances = []
    for name, total, count in zip(tensors, sums, counts):
        mean, deviation = statistics[name]
        alive = deviation > 0
        distances.append(np.abs(total / count - mean)[alive] / deviation[alive])
    return float(np.median(np.concatenate(distances)))
