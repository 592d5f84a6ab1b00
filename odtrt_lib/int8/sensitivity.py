"""Which convolutions lose most in INT8: the noise that each adds to the heads when it alone is quantised.

The noise powers of single convolutions add up to about that of all of them together, so their order tells
which to leave in floating point, without an evaluation of mAP for each choice. :mod:`odtrt_lib.int8.sweep`
measures them for a model folder; this module reads what it wrote.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Collection, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from odtrt_lib import folder as folders
from odtrt_lib import onnx_model
from odtrt_lib.errors import InputError
from odtrt_lib.int8 import qdq

if TYPE_CHECKING:
    import onnx

REPORT = "int8/sensitivity.json"
_LARGEST_REPORT = 1 << 24


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """conv: the convolution's name. box_noise, class_noise: the power of the difference from the float32
    heads, divided by the heads' own power."""

    conv: str
    box_noise: float
    class_noise: float


@dataclasses.dataclass(frozen=True)
class Noise:
    """Of boxes and of classes: the power of the difference from the float32 heads, divided by the heads'."""

    box: float
    classes: float


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A convolution in both sweeps. block: :mod:`odtrt_lib.int8.blocks`'. alone: it in INT8, all others in
    float32. all_but: all others in INT8, it in float32."""

    conv: str
    block: str
    alone: Noise
    all_but: Noise


@dataclasses.dataclass(frozen=True)
class Report:
    """What a sweep found. heads_sha256: of the ``heads.onnx`` that it measured. rule: how ranges were chosen.
    calibrated_on, measured_on: numbers of pictures. every: all convolutions in INT8. ranking: the one with
    the largest noise alone first, boxes and classes added."""

    heads_sha256: str
    rule: str
    calibrated_on: int
    measured_on: int
    every: Noise
    ranking: Tuple[Ranked, ...]

    def predicted(self, in_float: Collection[str]) -> Noise:
        """The noise if all but ``in_float`` are in INT8: the sum of their noises alone."""
        left = [one.alone for one in self.ranking if one.conv not in in_float]
        return Noise(math.fsum(one.box for one in left), math.fsum(one.classes for one in left))

    def halving(self) -> List[str]:
        """The first of the ranking that together make half of the predicted noise or more."""
        kept: List[str] = []
        half = _sum(self.predicted(())) / 2
        for one in self.ranking:
            if _sum(self.predicted(kept)) <= half:
                break
            kept.append(one.conv)
        return kept

    def quiet_enough(self, box_sqnr_db: float, in_float: Collection[str] = ()) -> List[str]:
        """``in_float`` and the others that disturb the boxes most, until the boxes' predicted signal over
        noise is ``box_sqnr_db`` or more.

        Raises InputError if that is not finite, or if nothing in front of the boxes would be left in INT8.
        """
        if not math.isfinite(box_sqnr_db):
            raise InputError(f"signal over noise of {box_sqnr_db} dB: expected a number, such as 25")
        kept = list(in_float)
        for one in sorted(self.ranking, key=lambda one: one.alone.box, reverse=True):
            if sqnr_db(self.predicted(kept).box) >= box_sqnr_db:
                break
            if one.conv not in kept:
                kept.append(one.conv)
        if all(one.conv in kept for one in self.ranking if one.alone.box > 0):
            raise InputError(
                f"{box_sqnr_db:g} dB of signal over noise leaves no convolution in front of the boxes in "
                f"INT8; all of them in INT8 have {sqnr_db(self.every.box):.1f} dB: ask for less"
            )
        return kept


def _sum(noise: Noise) -> float:
    return noise.box + noise.classes


def read_report(folder: Path, heads_sha256: str) -> Report:
    """``int8/sensitivity.json`` of a model folder.

    Raises InputError if it is absent, damaged, or of another ``heads.onnx``.
    """
    path = folders.require(folder, REPORT, "sensitivity")
    again = "run `odtrt sensitivity` again"
    try:
        content = json.loads(folders.read_whole(path, _LARGEST_REPORT).decode("utf-8"))
        ranking = tuple(
            Ranked(str(one["conv"]), str(one["block"]), _noise_of(one["alone"]), _noise_of(one["all_but"]))
            for one in content.pop("ranking")
        )
        report = Report(**{**content, "every": _noise_of(content["every"]), "ranking": ranking})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not what `odtrt sensitivity` writes; {again}") from error
    if report.heads_sha256 != heads_sha256:
        raise InputError(f"{path}: measured on another heads.onnx than the one beside it; {again}")
    return report


def _noise_of(content: Any) -> Noise:
    noise = Noise(float(content["box"]), float(content["classes"]))
    if not (math.isfinite(noise.box) and math.isfinite(noise.classes)):
        raise ValueError("not finite")
    return noise


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


def heads_of(
    model: onnx.ModelProto, images: Sequence[np.ndarray], threads: Optional[int] = None
) -> List[Tuple[Any, Any]]:
    """Box encodings and class logits for each network input, by ONNX Runtime.

    threads: see :func:`odtrt_lib.onnx_model.session`.
    """
    # Above this level its kernels round in another way, by as much as INT8 does.
    session = onnx_model.session(model.SerializeToString(), "ORT_ENABLE_BASIC", threads=threads)
    (name,) = [value.name for value in session.get_inputs()]
    return [tuple(session.run(None, {name: image})) for image in images]


def noise(
    wanted: Sequence[Tuple[np.ndarray, np.ndarray]], found: Sequence[Tuple[np.ndarray, np.ndarray]]
) -> Tuple[float, float]:
    """Of boxes and classes: the power of the difference over all images, divided by that of ``wanted``."""
    total = relative(powers(wanted, found))
    return total.box, total.classes


def powers(
    wanted: Sequence[Tuple[np.ndarray, np.ndarray]], found: Sequence[Tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """float64 ``[images, 2, 2]``: of boxes and classes, the power of the difference and of ``wanted``."""
    return np.array(
        [
            [
                [np.square(x - y, dtype=np.float64).sum(), np.square(x, dtype=np.float64).sum()]
                for x, y in zip(*pair)
            ]
            for pair in zip(wanted, found)
        ]
    )


def relative(every: np.ndarray) -> Noise:
    """What :func:`powers` says, over all images, which are added one after the other."""
    (box, box_signal), (classes, class_signal) = np.add.accumulate(every)[-1].tolist()
    return Noise(box / box_signal, classes / class_signal)
