"""Which convolutions lose most in INT8: the noise that each adds to the heads when it alone is quantised.

The noise powers of single convolutions add up to about that of all of them together, so their order tells
which to leave in floating point, without an evaluation of mAP for each choice.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, Sequence, Tuple

import numpy as np

from odtrt_lib import onnx_model
from odtrt_lib.int8 import qdq

if TYPE_CHECKING:
    import onnx


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """conv: the convolution's name. box_noise, class_noise: the power of the difference from the float32
    heads, divided by the heads' own power."""

    conv: str
    box_noise: float
    class_noise: float


def sqnr_db(noise: float) -> float:
    """Signal over quantisation noise in decibels."""
    return float("inf") if noise == 0 else float(-10 * np.log10(noise))


def ranked(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    images: Sequence[np.ndarray],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> List[Sensitivity]:
    """Every convolution of ``model``, the one with the largest sum of both noises first.

    ranges: amax of each tensor that :func:`odtrt_lib.int8.qdq.placement` names. images: network inputs.
    """
    every = qdq.placement(model).convs
    wanted = heads_of(model, images)
    found = []
    for number, conv in enumerate(every, 1):
        alone = qdq.placement(model, [name for name in every if name != conv])
        found.append(Sensitivity(conv, *noise(wanted, heads_of(qdq.quantised(model, alone, ranges), images))))
        progress(number, len(every))
    return sorted(found, key=lambda one: one.box_noise + one.class_noise, reverse=True)


def heads_of(model: onnx.ModelProto, images: Sequence[np.ndarray]) -> List[Tuple[Any, Any]]:
    """Box encodings and class logits for each network input, by ONNX Runtime."""
    # Above this level its kernels round in another way, by as much as INT8 does.
    session = onnx_model.session(model.SerializeToString(), "ORT_ENABLE_BASIC")
    (name,) = [value.name for value in session.get_inputs()]
    return [tuple(session.run(None, {name: image})) for image in images]


def noise(
    wanted: Sequence[Tuple[np.ndarray, np.ndarray]], found: Sequence[Tuple[np.ndarray, np.ndarray]]
) -> Tuple[float, float]:
    """Of boxes and classes: the power of the difference over all images, divided by that of ``wanted``."""
    powers = np.zeros((2, 2))
    for a, b in zip(wanted, found):
        for head in range(2):
            powers[head] += [
                np.square(a[head] - b[head], dtype=np.float64).sum(),
                np.square(a[head], dtype=np.float64).sum(),
            ]
    return float(powers[0, 0] / powers[0, 1]), float(powers[1, 0] / powers[1, 1])
