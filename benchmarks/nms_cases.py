"""Random inputs of the post-processing and of plain suppression, and whether two answers are the same bits.

Needs numpy and odtrt_lib alone, so that a GPU machine without TensorFlow and pytest can run it:

    python benchmarks/nms_cases.py           the CPU library beside the numpy reference

or, from other code, ``disagreements(postprocess, all_cases())`` with any ``postprocess(case)`` that returns
a :class:`odtrt_lib.nms.Postprocessed`. A case depends on its number only, not on the machine.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import spec_cases

from odtrt_lib import native, nms
from odtrt_lib.spec import BoxCoder, DetectorSpec, NmsSpec, ScoreSpec

RANDOM_CASES, EXTREME_CASES = 2000, 500
WINDOWS = np.array(
    [[0, 0, 1, 1], [0, 0, 0.75, 1], [0, 0, 1, 0.5625], [0.25, 0.125, 0.75, 0.5], [2, 2, 3, 3]], np.float32
)
BOX_KINDS = ("scattered", "crowds", "sixteenths", "all the same", "no area", "not finite")
LOGIT_KINDS = ("distinct", "tied", "all equal", "saturated", "not finite", "signed zeros")
EXTREME_BOX_KINDS = ("vast", "subnormal", "slivers")
EXTREME_LOGIT_KINDS = ("tied", "not finite", "vanishing")
NOT_FINITE = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30], np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of :func:`odtrt_lib.nms.postprocess`."""

    name: str
    spec: DetectorSpec
    box_encodings: np.ndarray
    class_logits: np.ndarray
    anchors: np.ndarray
    clip_windows: np.ndarray


@dataclasses.dataclass(frozen=True)
class NmsCase:
    """The arguments of :func:`odtrt_lib.nms.nms`."""

    name: str
    boxes: np.ndarray
    scores: np.ndarray
    iou_threshold: float
    classes: np.ndarray | None
    score_threshold: float
    max_kept: int | None


def detector_spec(
    num_anchors: int,
    num_classes: int,
    nms_spec: NmsSpec,
    *,
    background: bool = False,
    scores: ScoreSpec = spec_cases.SIGMOID,
    coder: BoxCoder = spec_cases.SSD_CODER,
) -> DetectorSpec:
    heads = spec_cases.ssd(num_anchors, num_classes, background, coder=coder, scores=scores)
    return spec_cases.example(heads, nms_spec, name="random")


def make_case(
    name: str,
    spec: DetectorSpec,
    batch: int,
    rng: np.random.Generator,
    boxes: str = "crowds",
    logits: str = "distinct",
    dtype: type = np.float32,
) -> Case:
    """One call's inputs, for the two kinds that are named."""
    encodings, anchors = _boxes(rng, boxes, batch, spec)
    class_logits = _logits(rng, logits, (batch, spec.heads.num_anchors, spec.heads.num_columns))
    with np.errstate(over="ignore"):
        encodings, class_logits = encodings.astype(dtype), class_logits.astype(dtype)
    return Case(
        name=f"{name}: {batch} x {spec.heads.num_anchors} x {spec.heads.num_columns}, {boxes}, {logits}",
        spec=spec,
        box_encodings=encodings,
        class_logits=class_logits,
        anchors=anchors,
        clip_windows=WINDOWS[rng.choice(len(WINDOWS), batch, p=[0.5, 0.15, 0.15, 0.15, 0.05])],
    )


def _boxes(
    rng: np.random.Generator, kind: str, batch: int, spec: DetectorSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Encodings [batch, N, 4] and anchors [N, 4]."""
    count = spec.heads.num_anchors
    scales = np.array(dataclasses.astuple(spec.heads.box_coder), np.float32)
    sizes = rng.uniform(0.05, 0.4, (count, 2))
    anchors = np.concatenate([rng.uniform(0, 1, (count, 2)), sizes], 1).astype(np.float32)
    encodings = (rng.normal(0, 0.3, (batch, count, 4)) * scales).astype(np.float32)
    if kind == "crowds":
        anchors[:, :2] = rng.uniform(0.2, 0.8, (5, 2))[rng.integers(0, 5, count)]
        anchors[:, 2:] = 0.2
        encodings *= np.float32(0.4)
    if kind == "sixteenths":  # IoU meets the thresholds 0, 1/4, 1/2 and 1 exactly
        corners = np.sort(rng.integers(-2, 19, (count, 2, 2)), axis=1) / 16
        anchors[:] = np.concatenate([corners.mean(1), corners[:, 1] - corners[:, 0]], 1)
        encodings[:] = 0
    if kind == "all the same":
        anchors[:] = [0.5, 0.5, 0.25, 0.25]
        encodings[:] = 0
    if kind == "no area":
        encodings[..., 2:][rng.random((batch, count, 2)) < 0.4] = -1000
        anchors[rng.random(count) < 0.2, 2:] *= -1
        anchors[rng.random(count) < 0.1, 2:] = 0
    if kind == "not finite":
        chosen = rng.random(encodings.shape) < 0.05
        encodings[chosen] = rng.choice(NOT_FINITE, np.count_nonzero(chosen))
    if kind in EXTREME_BOX_KINDS:
        _make_extreme(rng, kind, encodings, anchors, scales)
    return encodings, anchors


def _make_extreme(
    rng: np.random.Generator, kind: str, encodings: np.ndarray, anchors: np.ndarray, scales: np.ndarray
) -> None:
    """Boxes about the limits of float32, in the arrays that are given.

    vast: areas, sides and corners overflow. subnormal: sides, areas and corners below 2^-126. slivers: a few
    times 2^-126 high and so wide that their areas are usual; what they share may be lower than 2^-126.
    """
    count, sizes = len(anchors), encodings[..., 2:]
    if kind == "vast":
        near_root = rng.random(sizes.shape) < 0.5
        exponents = np.where(near_root, rng.uniform(61, 67, sizes.shape), rng.uniform(-3, 129, sizes.shape))
        sizes[:] = exponents * np.log(2) * scales[2:]
        encodings[..., :2] *= 10 ** rng.choice([0, 0, 0, 19, 38], encodings[..., :2].shape)
    else:
        encodings[:] = 0
        anchors[:, :2] = rng.choice([0, 0, 1e-38, 1e-30, 0.5], (count, 2))
        anchors[:, 2:] = 2.0 ** rng.choice([*range(-70, -55), -120, -126, -130, 0, 40], (count, 2))
    if kind == "slivers":
        anchors[:, 0] = rng.integers(2, 9, count) * 2.0**-127
        anchors[:, 2] = rng.integers(2, 5, count) * 2.0**-126
        anchors[:, 1], anchors[:, 3] = 0, 10.0 ** rng.integers(28, 31, count)


def _logits(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    logits = rng.normal(-1, 3, shape).astype(np.float32)
    if kind == "tied":
        logits = np.round(logits)
    if kind == "all equal":
        logits[:] = 0.5
    if kind == "saturated":  # sigmoid gives 1, or less than the least float
        logits *= np.float32(30)
    if kind == "not finite":
        chosen = rng.random(shape) < 0.05
        logits[chosen] = rng.choice(NOT_FINITE, np.count_nonzero(chosen))
    if kind == "signed zeros":
        logits = rng.choice(np.array([0.0, -0.0, 1.0, -1.0], np.float32), shape)
    if kind == "vanishing":  # scores about 2^-126 and below: of sigmoid and softmax, or the logits themselves
        logits = rng.uniform(-110, -80, shape).astype(np.float32)
        tiny = rng.random(shape) < 0.3
        logits[tiny] = rng.choice([1.2e-38, 1.1e-38, -1.1e-38, 1e-45, 2.4e-38], np.count_nonzero(tiny))
    return logits


def random_case(number: int) -> Case:
    """One small call; sizes, settings and data are all drawn."""
    rng = np.random.default_rng([1, number])

    def one_of(*choices: Any) -> Any:
        return choices[rng.integers(0, len(choices))]

    converter = one_of("sigmoid", "sigmoid", "softmax", "identity")
    thresholds = (1e-8, 0.05, 0.3, 0.5, 0.999)
    score_threshold = one_of(*thresholds, -0.5, 0.0) if converter == "identity" else one_of(*thresholds)
    total = int(one_of(1, 3, 10, 40, 100, 300))
    settings = NmsSpec(
        score_threshold=score_threshold,
        iou_threshold=one_of(0.0, 0.25, 0.3, 0.5, 0.6, 1.0),
        max_detections_per_class=int(one_of(1, 2, 5, total, 2 * total, 100)),
        max_total_detections=total,
        class_agnostic=bool(rng.random() < 0.2),
        change_coordinate_frame=bool(rng.random() < 0.5),
    )
    spec = detector_spec(
        int(rng.integers(1, 257)),
        int(one_of(1, 2, 3, 6, 17)),
        settings,
        background=bool(rng.random() < 0.5),
        scores=ScoreSpec(converter, float(one_of(1.0, 1.0, 2.5, 0.7))),
        coder=one_of(spec_cases.SSD_CODER, spec_cases.EFFICIENTDET_CODER),
    )
    return make_case(
        f"random {number}",
        spec,
        int(one_of(1, 1, 2, 3)),
        rng,
        one_of(*BOX_KINDS),
        one_of(*LOGIT_KINDS),
        np.float16 if rng.random() < 0.3 else np.float32,
    )


def chosen_cases() -> Iterator[Case]:
    """Large and awkward calls, one by one."""
    rng = np.random.default_rng(2)
    usual = NmsSpec(1e-8, 0.5, 100, 100, False, True)
    softmax, identity = ScoreSpec("softmax", 1.0), ScoreSpec("identity", 1.0)

    def change(**settings: Any) -> NmsSpec:
        return dataclasses.replace(usual, **settings)

    for dtype in (np.float32, np.float16):
        for boxes in ("crowds", "all the same"):
            for logits in ("distinct", "all equal"):
                spec = detector_spec(1917, 11, usual)
                yield make_case("20,000 candidates", spec, 1, rng, boxes, logits, dtype)
        spec = detector_spec(12804, 3, change(score_threshold=0.05))
        yield make_case("many anchors", spec, 1, rng, "scattered", "distinct", dtype)
        yield make_case("one class", detector_spec(4099, 1, usual), 2, rng, "crowds", "tied", dtype)
        yield make_case("601 classes", detector_spec(211, 601, usual), 1, rng, "crowds", "tied", dtype)
        yield make_case("batch of 32", detector_spec(61, 7, usual), 32, rng, "crowds", "distinct", dtype)
        for background in (False, True):
            spec = detector_spec(1917, 20, usual, background=background, scores=softmax)
            yield make_case("softmax", spec, 2, rng, "crowds", "distinct", dtype)
            yield make_case("softmax", spec, 1, rng, "crowds", "not finite", dtype)
        spec = detector_spec(997, 5, change(score_threshold=-3.0), scores=identity)
        yield make_case("identity, negative scores", spec, 2, rng, "crowds", "signed zeros", dtype)
        spec = detector_spec(3001, 9, change(class_agnostic=True))
        yield make_case("class-agnostic", spec, 2, rng, "crowds", "tied", dtype)
        yield make_case("class-agnostic", spec, 1, rng, "crowds", "not finite", dtype)
    yield make_case("one anchor, one class", detector_spec(1, 1, usual), 1, rng, "scattered")
    for a_class in (1, 2, 37):
        spec = detector_spec(5003, 2, change(max_detections_per_class=a_class))
        yield make_case("small cap a class", spec, 1, rng, "scattered", "distinct")
    spec = detector_spec(
        5003, 2, change(max_detections_per_class=5000, max_total_detections=4096, iou_threshold=1.0)
    )
    yield make_case("4096 detections", spec, 1, rng, "scattered", "distinct")
    spec = detector_spec(9001, 2, change(iou_threshold=0.0, max_total_detections=1000))
    yield make_case("the head is too short", spec, 1, rng, "crowds", "saturated")
    spec = detector_spec(2003, 4, usual)
    for kind in BOX_KINDS:
        yield make_case("boxes", spec, 1, rng, kind, "distinct")
    for kind in LOGIT_KINDS:
        yield make_case("logits", spec, 1, rng, "crowds", kind)


def extreme_case(number: int) -> Case:
    """A small call with boxes and scores about the limits of float32."""
    rng = np.random.default_rng([4, number])
    kind = EXTREME_BOX_KINDS[number % 3]
    settings = NmsSpec(
        score_threshold=float(rng.choice([0.0, 1e-8])),
        iou_threshold=float(rng.choice([0.0, 0.1, 0.5, 1.0])),
        max_detections_per_class=int(rng.choice([3, 100])),
        max_total_detections=100,
        class_agnostic=bool(rng.random() < 0.2),
        change_coordinate_frame=bool(rng.random() < 0.5),
    )
    spec = detector_spec(
        int(rng.integers(2, 129)),
        int(rng.integers(1, 4)),
        settings,
        background=bool(rng.random() < 0.5),
        scores=ScoreSpec(str(rng.choice(["sigmoid", "softmax", "identity"])), 1.0),
        coder=spec_cases.EFFICIENTDET_CODER if number % 2 else spec_cases.SSD_CODER,
    )
    logits = EXTREME_LOGIT_KINDS[number // 3 % 3]
    return make_case(f"extreme {number}", spec, 1 + number % 2, rng, kind, logits)


def all_cases() -> Iterator[Case]:
    yield from chosen_cases()
    yield from map(random_case, range(RANDOM_CASES))
    yield from map(extreme_case, range(EXTREME_CASES))


def random_nms_case(number: int) -> NmsCase:
    rng = np.random.default_rng([3, number])
    count = int(rng.choice([0, 1, 2, 7, 60, 300, 2000 if number % 10 == 0 else 129]))
    kind = ("scattered", "sixteenths", "crowds", "not finite")[number % 4]
    if number % 7 == 6:
        kind = "extreme"
    if kind == "sixteenths":
        boxes = rng.integers(-2, 19, (count, 4)).astype(np.float32) / 16  # corners in any order
    else:
        corner = rng.uniform(0, 100, (8, 2))[rng.integers(0, 8, count)] if kind == "crowds" else 0
        corner = corner + rng.uniform(0, 20 if kind == "crowds" else 100, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(0, 40, (count, 2))], 1).astype(np.float32)
    if kind == "extreme":
        sides = 2.0 ** rng.integers(-70, 66, (count, 2)) * rng.choice([1, 1e-19, 1e19], (count, 2))
        corner = rng.choice([0, 1e-38, -1.2e-38, 1], (count, 2))
        with np.errstate(over="ignore"):
            boxes = np.concatenate([corner, corner + sides], 1).astype(np.float32)
    scores = rng.normal(0, 1, count).astype(np.float32)
    if number % 3 == 0:
        scores = np.round(scores * 2) / 2
    if kind == "not finite":
        boxes[rng.random(boxes.shape) < 0.05] = rng.choice(NOT_FINITE)
        chosen = rng.random(count) < 0.1
        scores[chosen] = rng.choice(NOT_FINITE, np.count_nonzero(chosen))
    return NmsCase(
        f"nms {number}: {count} boxes, {kind}",
        boxes,
        scores,
        float(rng.choice([0.0, 0.25, 0.5, 0.7, 1.0])),
        rng.integers(-2, 3, count).astype(np.int32) if rng.random() < 0.5 else None,
        float(rng.choice([-np.inf, -0.5, 0.0, 0.25])),
        None if rng.random() < 0.5 else int(rng.choice([1, 5, 100, 5000])),
    )


def arguments_of(case: Case) -> tuple[Any, ...]:
    return case.box_encodings, case.class_logits, case.anchors, case.spec, case.clip_windows


def nms_arguments_of(case: NmsCase) -> tuple[Any, ...]:
    return (
        case.boxes,
        case.scores,
        case.iou_threshold,
        case.classes,
        case.score_threshold,
        case.max_kept,
    )


def difference(expected: nms.Postprocessed, found: nms.Postprocessed) -> str:
    """Where two answers are not the same bits; empty where they are."""
    for field in ("num_detections", "anchors", "classes", "scores", "boxes"):
        own, other = getattr(expected, field), getattr(found, field)
        if own.dtype != other.dtype or own.shape != other.shape:
            return f"{field}: {other.dtype} {other.shape} instead of {own.dtype} {own.shape}"
        differs = own.view(np.int32) != other.view(np.int32)
        if differs.any():
            place = tuple(int(i) for i in np.argwhere(differs)[0])
            return f"{field}{list(place)}: {other[place]!r} instead of {own[place]!r}"
    return ""


def disagreements(postprocess: Callable[[Case], nms.Postprocessed], cases: Iterator[Case]) -> Iterator[str]:
    """A line for every case in which ``postprocess`` does not give the numpy reference's bits."""
    for case in cases:
        found = difference(nms.postprocess_reference(*arguments_of(case)), postprocess(case))
        if found:
            yield f"{case.name}: {found} ({case.spec.nms}, {case.spec.heads.scores})"


def nms_disagreements(select: Callable[[NmsCase], np.ndarray], cases: Iterator[NmsCase]) -> Iterator[str]:
    """A line for every case in which ``select`` does not return the numpy reference's indices."""
    for case in cases:
        expected, found = nms.nms_reference(*nms_arguments_of(case)), select(case)
        if not np.array_equal(expected, found):
            yield f"{case.name}: {found[:8]} instead of {expected[:8]}"


def by_library(library: native.Library) -> Callable[[Case], nms.Postprocessed]:
    """The CPU library's answer to a case."""

    def postprocess(case: Case) -> nms.Postprocessed:
        return nms.Postprocessed(*native.postprocess_cpu(library, *arguments_of(case)))

    return postprocess


def main() -> None:
    library = native.load()
    if library is None:
        sys.exit("the native library is not built: run `make plugin`")
    found = list(disagreements(by_library(library), all_cases()))
    print("\n".join(found[:20]))
    print(f"{library.path}: {len(found)} disagreements")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
