"""Ranges of activations: what a network's tensors hold on calibration images, and how much of it INT8 keeps.

Two passes over the images by ONNX Runtime: the largest absolute value of each tensor, then a histogram of
absolute values up to it. A rule turns the histogram into ``amax``, the value that becomes code 127:

* ``minmax``: the largest value.
* ``percentile``: below it are 99.99 % of the values.
* ``mse``: the least mean squared error of rounding and clipping together.
* ``entropy``: the least Kullback-Leibler divergence between the values and their codes, as TensorRT's
  calibrator has it (S. Migacz, "8-bit Inference with TensorRT", GTC 2017).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Callable, Dict, Iterable, List, Mapping, Sequence

import numpy as np

from odtrt_lib import onnx_model
from odtrt_lib.errors import InputError
from odtrt_lib.int8.qdq import LEVELS
from odtrt_lib.variants import CALIBRATORS

if TYPE_CHECKING:
    import onnx

BINS = 2048
PERCENTILE = 99.99
_ENTROPY_STEP = 16  # bins between two tried ranges; a finer search moves amax by less than one part in 128


@dataclasses.dataclass(frozen=True)
class Histogram:
    """counts: int64 ``[BINS]`` of absolute values in equal bins from 0 to ``largest``."""

    largest: float
    counts: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """float64 ``[BINS]``: the upper edge of each bin."""
        return np.arange(1, BINS + 1) * (self.largest / BINS)

    @property
    def centres(self) -> np.ndarray:
        return self.edges - self.largest / (2 * BINS)


def histograms(
    model: onnx.ModelProto, tensors: Sequence[str], inputs: Callable[[], Iterable[np.ndarray]]
) -> Dict[str, Histogram]:
    """A histogram of each tensor over all inputs.

    inputs: called twice; gives network inputs, float32 ``[batch, height, width, 3]`` or as the model has it.

    Raises InputError if there is no input, and if a tensor holds NaN or an infinity, or nothing but zeros.
    """
    run = reader_of(model, tensors)
    largest = np.zeros(len(tensors))
    count = 0
    for count, image in enumerate(inputs(), 1):
        values = [np.abs(one).max() for one in run(image)]
        bad = [tensor for tensor, value in zip(tensors, values) if not np.isfinite(value)]
        if bad:
            raise InputError(f"calibration image {count}: tensor {bad[0]!r} holds NaN or an infinity")
        largest = np.maximum(largest, values)
    if count == 0:
        raise InputError("no calibration image")
    dead = [tensor for tensor, value in zip(tensors, largest) if value == 0]
    if dead:
        raise InputError(
            f"tensor {dead[0]!r} is 0 on all {count} calibration images: they do not show what the detector "
            "will see; take images of its own domain"
        )
    counts = [np.zeros(BINS, np.int64) for _ in tensors]
    for image in inputs():
        for i, value in enumerate(run(image)):
            counts[i] += np.histogram(np.abs(value), BINS, (0.0, float(largest[i])))[0]
    return {tensor: Histogram(float(top), found) for tensor, top, found in zip(tensors, largest, counts)}


def reader_of(model: onnx.ModelProto, tensors: Sequence[str]) -> Callable[[np.ndarray], List[np.ndarray]]:
    """A function from the network's input to the values of tensors inside the network.

    ONNX Runtime does not optimise the network, so that each of them exists.
    """
    import onnx

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    (given,) = [value.name for value in shown.graph.input]
    computed = [name for name in tensors if name != given]
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    session = onnx_model.session(shown.SerializeToString(), "ORT_DISABLE_ALL")

    def run(image: np.ndarray) -> List[np.ndarray]:
        found = {**dict(zip(computed, session.run(computed, {given: image}))), given: image}
        return [found[name] for name in tensors]

    return run


def amax(histogram: Histogram, rule: str) -> float:
    """The range that ``rule``, a key of :data:`RULES`, finds. Raises InputError for another rule."""
    if rule not in RULES:
        raise InputError(f"calibrator {rule!r}: expected one of {', '.join(RULES)}")
    return float(RULES[rule](histogram))


def minmax(histogram: Histogram) -> float:
    return histogram.largest


def percentile(histogram: Histogram, share: float = PERCENTILE) -> float:
    below = np.cumsum(histogram.counts)
    return float(histogram.edges[np.searchsorted(below, share / 100.0 * below[-1])])


def mse(histogram: Histogram) -> float:
    """The edge with the least error; a bin's values are taken to lie at its centre."""
    best, least = histogram.largest, np.inf
    for edge in histogram.edges[BINS // 16 :: 4]:
        step = edge / LEVELS
        codes = np.minimum(np.round(histogram.centres / step), LEVELS)
        error = float((histogram.counts * (histogram.centres - codes * step) ** 2).sum())
        if error < least:
            best, least = float(edge), error
    return best


def entropy(histogram: Histogram) -> float:
    best, least = histogram.largest, np.inf
    for kept in range(LEVELS + 1, BINS + 1, _ENTROPY_STEP):
        divergence = _divergence(histogram.counts, kept)
        if divergence < least:
            best, least = float(histogram.edges[kept - 1]), divergence
    return best


def _divergence(counts: np.ndarray, kept: int) -> float:
    """Of the first ``kept`` bins, the rest added to the last of them, from themselves in LEVELS + 1 codes.

    The first bin counts as the second: behind a ReLU it holds the zeros, which every range keeps, and they
    would outweigh all else."""
    values = counts[:kept].astype(np.float64)
    values[0] = values[1]
    occupied = values > 0
    reference = values.copy()
    reference[-1] += counts[kept:].sum()
    code = np.arange(kept) * (LEVELS + 1) // kept
    sums = np.bincount(code, values, LEVELS + 1)
    members = np.bincount(code, occupied, LEVELS + 1)
    spread = np.where(occupied, (sums / np.maximum(members, 1))[code], 0.0)
    if spread.sum() == 0 or reference.sum() == 0:
        return float("inf")
    p, q = reference / reference.sum(), spread / spread.sum()
    shared = (p > 0) & (q > 0)
    missing = p[(p > 0) & (q == 0)].sum()  # no code stands for these
    return float((p[shared] * np.log(p[shared] / q[shared])).sum() + missing * np.log(1e9))


RULES: Mapping[str, Callable[[Histogram], float]] = dict(zip(CALIBRATORS, (mse, minmax, percentile, entropy)))
