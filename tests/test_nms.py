"""nms.py against the OD API's own post-processing, and against exact arithmetic in plain Python."""

from __future__ import annotations

import dataclasses
import functools
import types
from fractions import Fraction
from pathlib import Path
from typing import Any, Callable, Iterator

import nms_cases
import numpy as np
import pytest
import spec_cases

from odtrt_lib import nms as reference
from odtrt_lib.errors import InputError
from odtrt_lib.spec import BoxCoder, DetectorSpec, NmsSpec, ScoreSpec

WINDOWS = np.array([[0, 0, 1, 1], [0, 0, 0.75, 1], [0.25, 0.125, 0.75, 0.5], [2, 2, 3, 3]], np.float32)
IMAGES_A_KIND = 9
BOX_KINDS = ("scattered", "sixteenths", "degenerate", "not finite")
EXTREME_BOX_KINDS = ("vast", "subnormal", "any bits", "edges", "slivers")
EDGES = np.array(
    [
        *(0, -0.0, 0.25, 1, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1.9e19, -1.9e19, 1e-19, 1.1e-19),
        *(1.2e-38, -1.2e-38, 1.1e-38, 2.4e-38, 1e-45),
    ],
    np.float32,
)
SCORE_KINDS = ("distinct", "tied", "not finite")


@dataclasses.dataclass(frozen=True)
class Family:
    """Random cases that share sizes and settings, so that TensorFlow traces one graph for them."""

    name: str
    num_anchors: int
    num_classes: int
    nms: NmsSpec


def nms_spec(
    score: float, iou: float, a_class: int, total: int, agnostic: bool = False, frame: bool = True
) -> NmsSpec:
    return NmsSpec(score, iou, a_class, total, agnostic, frame)


FAMILIES = (
    Family("the usual settings", 24, 3, nms_spec(1e-8, 0.5, 24, 24, frame=False)),
    Family("cap a class below the total", 24, 3, nms_spec(0.3, 0.5, 3, 7)),
    Family("cap of one a class", 20, 4, nms_spec(0.1, 0.5, 1, 10)),
    Family("total above the cap times classes", 16, 2, nms_spec(0.1, 0.25, 3, 20)),
    Family("total of one", 16, 3, nms_spec(0.1, 0.5, 1, 1)),
    Family("one class", 40, 1, nms_spec(0.5, 0.25, 10, 10)),
    Family("IoU threshold 0", 14, 4, nms_spec(0.125, 0.0, 12, 40)),
    Family("IoU threshold 1", 14, 4, nms_spec(0.125, 1.0, 12, 60)),
    Family("nothing passes", 16, 3, nms_spec(1.5, 0.5, 8, 8)),
    Family("class-agnostic", 30, 4, nms_spec(0.125, 0.5, 9, 9, agnostic=True)),
    Family("class-agnostic, whole image", 30, 9, nms_spec(0.5, 0.25, 5, 20, agnostic=True, frame=False)),
)


def extreme_boxes(rng: np.random.Generator, kind: str, images: int, anchors: int) -> np.ndarray:
    """Boxes about the limits of float32: areas overflow, areas and sides fall below 2^-126."""
    shape = (images, anchors, 2)
    if kind == "any bits":
        return rng.integers(0, 2**32, (images, anchors, 4), np.uint32).view(np.float32)
    if kind == "edges":
        return rng.choice(EDGES, (images, anchors, 4))
    if kind == "slivers":  # what two of them share is half as high as the least normal number, or higher
        corners = rng.integers(1, 8, (images, anchors, 1)) * [2.0**-127, 0]
        sides = rng.integers(2, 4, (images, anchors, 1)) * [2.0**-127, 2.0**99]
        return np.concatenate([corners, corners + sides], axis=2).astype(np.float32)
    if kind == "vast":
        near, far = rng.uniform(61, 67, shape), rng.uniform(-3, 128, shape)
        sides = 2.0 ** np.where(rng.random(shape) < 0.5, near, far)
        centres = rng.uniform(-1, 1, shape) * rng.choice([1, sides.max()], shape) * 0.5
    else:
        centres = rng.choice([0, 0, 1e-38, 1e-30, 1e-19, 0.5], shape)
        near, far = rng.uniform(-66, -62, shape), rng.uniform(-149, 60, shape)
        sides = 2.0 ** np.where(rng.random(shape) < 0.5, near, far)
    with np.errstate(over="ignore"):
        return np.concatenate([centres - sides / 2, centres + sides / 2], axis=2).astype(np.float32)


def random_boxes(rng: np.random.Generator, kind: str, images: int, anchors: int) -> np.ndarray:
    if kind in EXTREME_BOX_KINDS:
        return extreme_boxes(rng, kind, images, anchors)
    if kind == "sixteenths":
        corners = rng.integers(-2, 19, (images, anchors, 2, 2))
        return np.sort(corners, axis=2).reshape(images, anchors, 4).astype(np.float32) / 16
    corner = rng.uniform(-0.2, 1.0, (images, anchors, 2))
    sides = rng.uniform(0.0, 0.6, (images, anchors, 2))
    boxes = np.concatenate([corner, corner + sides], axis=2).astype(np.float32)
    if kind == "degenerate":
        for order in ([2, 3, 0, 1], [2, 1, 0, 3], [0, 3, 2, 1], [0, 1, 0, 3]):
            chosen = rng.random((images, anchors)) < 0.2
            boxes[chosen] = boxes[chosen][:, order]
    if kind == "not finite":
        chosen = rng.random(boxes.shape) < 0.05
        boxes[chosen] = rng.choice([np.nan, np.inf, -np.inf], np.count_nonzero(chosen))
    return boxes


def random_scores(rng: np.random.Generator, kind: str, images: int, anchors: int, classes: int) -> np.ndarray:
    scores = rng.random((images, anchors, classes)).astype(np.float32)
    if kind == "tied":
        scores = np.round(scores * 8) / 8
    if kind == "not finite":
        chosen = rng.random(scores.shape) < 0.1
        scores[chosen] = rng.choice([np.nan, np.inf, -np.inf], np.count_nonzero(chosen))
    return scores


@dataclasses.dataclass(frozen=True)
class Cases:
    """boxes [I, N, 4], scores [I, N, C], windows [I, 4], and what the OD API makes of each image."""

    nms: NmsSpec
    boxes: np.ndarray
    scores: np.ndarray
    windows: np.ndarray
    expected: tuple[reference.Selection, ...]


@functools.cache
def odapi_nms(num_anchors: int, num_classes: int, nms: NmsSpec) -> Callable[..., Any]:
    pytest.importorskip("tensorflow")
    from odtrt_lib.export import odapi

    odapi.prepare()
    import tensorflow as tf
    from object_detection.core import post_processing

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([None, num_anchors, 1, 4]),
            tf.TensorSpec([None, num_anchors, num_classes]),
            tf.TensorSpec([None, 4]),
        ],
    )
    def run(boxes: Any, scores: Any, windows: Any) -> Any:
        found = post_processing.batch_multiclass_non_max_suppression(
            boxes,
            scores,
            score_thresh=nms.score_threshold,
            iou_thresh=nms.iou_threshold,
            max_size_per_class=nms.max_detections_per_class,
            max_total_size=nms.max_total_detections,
            clip_window=windows,
            change_coordinate_frame=nms.change_coordinate_frame,
            use_class_agnostic_nms=nms.class_agnostic,
            additional_fields={
                "anchor": tf.tile(
                    tf.range(num_anchors, dtype=tf.float32)[tf.newaxis, :, tf.newaxis],
                    [tf.shape(boxes)[0], 1, 1],
                )
            },
        )
        return found[0], found[1], found[2], found[4]["anchor"], found[5]

    return run


def odapi_selections(
    nms: NmsSpec, boxes: np.ndarray, scores: np.ndarray, windows: np.ndarray
) -> tuple[reference.Selection, ...]:
    run = odapi_nms(scores.shape[1], scores.shape[2], nms)
    found_boxes, found_scores, classes, anchors, counts = (
        tensor.numpy() for tensor in run(boxes[:, :, np.newaxis], scores, windows)
    )
    return tuple(
        reference.Selection(
            boxes=found_boxes[i, :count],
            scores=found_scores[i, :count],
            classes=classes[i, :count].astype(np.int32),
            anchors=anchors[i, :count, 0].astype(np.int64),
        )
        for i, count in enumerate(counts)
    )


@functools.cache
def cases_of(family: Family) -> Cases:
    rng = np.random.default_rng(FAMILIES.index(family))
    kinds = [(b, s) for b in BOX_KINDS for s in SCORE_KINDS] + [(b, "tied") for b in EXTREME_BOX_KINDS]
    anchors, classes = family.num_anchors, family.num_classes
    boxes = np.concatenate([random_boxes(rng, kind, IMAGES_A_KIND, anchors) for kind, _ in kinds])
    scores = np.concatenate([random_scores(rng, kind, IMAGES_A_KIND, anchors, classes) for _, kind in kinds])
    windows = WINDOWS[rng.integers(0, len(WINDOWS), len(boxes))]
    expected = odapi_selections(family.nms, boxes, scores, windows)
    return Cases(family.nms, boxes, scores, windows, expected)


def is_same(one: reference.Selection, other: reference.Selection) -> bool:
    fields = ("anchors", "classes", "scores", "boxes")
    return all(
        getattr(one, name).dtype == getattr(other, name).dtype
        and np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "boxes")
        for name in fields
    )


def disagreements(cases: Cases, select: Callable[..., reference.Selection]) -> list[int]:
    """The images where ``select`` does not give what the OD API gives, bit for bit."""
    return [
        i
        for i, expected in enumerate(cases.expected)
        if not is_same(select(cases.boxes[i], cases.scores[i], cases.nms, cases.windows[i]), expected)
    ]


def test_there_are_a_thousand_cases_and_most_find_something() -> None:
    cases = [cases_of(family) for family in FAMILIES]
    counts = np.concatenate([[len(expected.scores) for expected in c.expected] for c in cases])
    assert len(counts) >= 1000
    assert np.mean(counts > 0) > 0.5
    assert np.any(counts == 0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("first_head", [2048, 3], ids=["one pass", "head widened"])
def test_selection_is_the_odapis_bit_for_bit(
    family: Family, first_head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_FIRST_HEAD", first_head)
    assert disagreements(cases_of(family), reference.multiclass_nms) == []


@pytest.mark.parametrize("agnostic", [False, True], ids=["per class", "class-agnostic"])
def test_a_crowd_of_thousands_is_the_odapis_bit_for_bit(agnostic: bool) -> None:
    rng = np.random.default_rng(7)
    images, anchors, classes = 2, 6000, 8
    centres = rng.uniform(0.1, 0.9, (images, 12, 4))
    crowd = np.take_along_axis(centres, rng.integers(0, 12, (images, anchors, 1)), axis=1)
    crowd = crowd + rng.normal(0, 0.02, crowd.shape)
    boxes = np.concatenate([crowd[..., :2], crowd[..., :2] + np.abs(crowd[..., 2:]) * 0.3], 2)
    boxes = boxes.astype(np.float32)
    scores = (rng.random((images, anchors, classes)) ** 4).astype(np.float16).astype(np.float32)
    windows = np.tile(WINDOWS[:1], (images, 1))
    settings = nms_spec(1e-8, 0.5, 100, 100, agnostic)
    cases = Cases(settings, boxes, scores, windows, odapi_selections(settings, boxes, scores, windows))
    assert all(len(expected.scores) > 50 for expected in cases.expected)
    assert disagreements(cases, reference.multiclass_nms) == []


@functools.cache
def floats() -> np.ndarray:
    """A million finite floats, spread evenly over all that there are."""
    values = np.arange(0, 2**32, 4093, dtype=np.uint32).view(np.float32)
    return values[np.isfinite(values)]


def ulps_off(found: np.ndarray, exact: np.ndarray, least: float) -> float:
    """The largest error against float64 in units of the float32 result's last place, where that is a
    finite number of at least ``least``."""
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float32)
    counts = np.isfinite(nearest) & (exact >= least)
    error = np.abs(found[counts].astype(np.float64) - exact[counts])
    return float((error / np.spacing(nearest[counts])).max())


def ulps_apart(one: np.ndarray, other: np.ndarray) -> int:
    """How many floats apart two arrays of positive floats are at most."""
    return int(np.abs(one.view(np.int32).astype(np.int64) - other.view(np.int32)).max())


SMALLEST_NORMAL = 2.0**-126


def test_exponential_is_within_one_ulp() -> None:
    tf = pytest.importorskip("tensorflow")
    x = floats()
    with np.errstate(over="ignore"):
        exact = np.exp(x.astype(np.float64))
    found = reference.exponential(x)
    assert ulps_off(found, exact, SMALLEST_NORMAL) < 1
    assert np.all(np.isinf(found[exact > 2.0**128])) and np.all(found[exact < 2.0**-151] == 0)
    is_normal = (exact >= SMALLEST_NORMAL) & (exact < 2.0**127)
    assert ulps_apart(found[is_normal], tf.exp(x[is_normal]).numpy()) <= 1
    special = reference.exponential(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32))
    np.testing.assert_array_equal(special, np.array([np.nan, np.inf, 0, 1, 1], np.float32))


def test_sigmoid_is_within_two_and_a_half_ulp_and_never_falls() -> None:
    """TensorFlow's own was 7 floats away at most where this was written; it depends on the processor."""
    tf = pytest.importorskip("tensorflow")
    x = np.sort(floats())
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    found = reference.convert_scores(x, ScoreSpec("sigmoid", 1.0))
    assert ulps_off(found, exact, SMALLEST_NORMAL) < 2.5
    assert np.all(np.diff(found) >= 0)
    is_normal = exact >= SMALLEST_NORMAL
    assert ulps_apart(found[is_normal], tf.sigmoid(x[is_normal]).numpy()) <= 10


@pytest.mark.parametrize("spread", [1, 5, 30])
def test_softmax_is_no_further_from_the_truth_than_tensorflows(spread: float) -> None:
    """Both round ``logit - greatest`` to float32 first, which is most of the error."""
    tf = pytest.importorskip("tensorflow")
    logits = np.random.default_rng(0).normal(0, spread, (5000, 91)).astype(np.float32)
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    found = reference.convert_scores(logits, ScoreSpec("softmax", 1.0))
    of_tensorflow = tf.nn.softmax(logits).numpy()
    assert ulps_off(found, exact, 1e-6) <= min(11, ulps_off(of_tensorflow, exact, 1e-6) + 1)


def test_another_polynomial_is_caught() -> None:
    module = mutant("4.1665795894e-2", "4.1666795894e-2")
    x = floats()
    with np.errstate(over="ignore"):
        exact = np.exp(x.astype(np.float64))
    assert ulps_off(module.exponential(x), exact, SMALLEST_NORMAL) > 1


def mutant(old: str, new: str) -> types.ModuleType:
    """nms.py with one piece of its text replaced."""
    path = Path(reference.__file__)
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in nms.py"
    module = types.ModuleType("mutant")
    module.__dict__["__name__"] = reference.__name__
    exec(compile(text.replace(old, new), str(path), "exec"), module.__dict__)
    return module


DEFECTS = {
    "suppresses at the IoU threshold itself": ("overlaps <= threshold", "overlaps < threshold"),
    "keeps a score equal to the threshold": ("strong > threshold", "strong >= threshold"),
    "last of equal classes (agnostic)": (
        "np.argmax(scores[anchors], axis=1)",
        "scores.shape[1] - 1 - np.argmax(scores[anchors][:, ::-1], axis=1)",
    ),
    "equal scores in reverse order": (
        'np.argsort(-own_scores, kind="stable")',
        'np.argsort(own_scores, kind="stable")[::-1]',
    ),
    "equal scores anchor-major": (
        'order = np.argsort(-own_scores, kind="stable")',
        "order = np.lexsort((groups, anchors, -own_scores))",
    ),
    "suppression across classes": (
        "_suppress(own_boxes, candidates.groups",
        "_suppress(own_boxes, 0 * candidates.groups",
    ),
    "suppression on clipped boxes": ("_suppress(own_boxes,", "_suppress(clipped,"),
    "no cap a class": ("stayed[group] >= max_per_group", "False"),
    "cap a class after the clipping": ("stayed[group] += 1", "stayed[group] += int(is_visible[position])"),
    "empty boxes are kept": ("(_signed_area(clipped) > 0)", "(_signed_area(clipped) > -1)"),
    "inverted boxes overlap nothing": (
        "corners = np.concatenate([_smaller(one, other), _larger(one, other)], axis=1)",
        "corners = boxes",
    ),
    "subnormal areas are areas": ("return _flushed(sides[:, 0] * sides[:, 1])", "return sides.prod(axis=1)"),
    "subnormal corners stay": ("boxes = _flushed(boxes)\n", "boxes = boxes\n"),
    "a subnormal side is shared": (
        "sides = _normal_or_zero(bottom_right - top_left)",
        "sides = np.maximum(bottom_right - top_left, 0)",
    ),
    "a subnormal overlap is above 0": (
        "overlaps = _normal_or_zero(intersection / (areas + area - intersection))",
        "overlaps = intersection / (areas + area - intersection)",
    ),
    "infinite areas share nothing": (
        "    overlaps[(areas <= 0) | (area <= 0)] = 0\n",
        "    overlaps[(areas <= 0) | (area <= 0) | np.isnan(overlaps)] = 0\n",
    ),
    "frame is not changed": ("if nms.change_coordinate_frame else found", "if False else found"),
    "a NaN takes its anchor along": ("(np.maximum if nms.class_agnostic else np.fmax)", "np.maximum"),
    "the head is taken for the whole": ("own_scores[order], is_complete)", "own_scores[order], True)"),
    "the head has gaps": ("strong >= _nth_best(passing, at_least)", "strong > np.median(passing)"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_caught(defect: str) -> None:
    module = mutant(*DEFECTS[defect])
    module.__dict__["_FIRST_HEAD"] = 3
    is_caught = any(disagreements(cases_of(family), module.multiclass_nms) for family in FAMILIES)
    assert is_caught, f"no case notices: {defect}"


def selection_of_the_article(
    boxes: np.ndarray, scores: np.ndarray, nms: NmsSpec, window: np.ndarray
) -> reference.Selection:
    """The common wrong rule: a box stays unless *any* better one overlaps it, suppressed or not."""
    found = []
    for column in range(scores.shape[1]):
        own = scores[:, column]
        for anchor in np.flatnonzero(own > np.float32(nms.score_threshold)):
            better = np.flatnonzero(
                (own > own[anchor]) | ((own == own[anchor]) & (np.arange(len(own)) < anchor))
            )
            if not any(exact_iou(boxes[anchor], boxes[b]) > Fraction(nms.iou_threshold) for b in better):
                found.append((-own[anchor], column, anchor))
    found.sort()
    anchors = np.array([anchor for _, _, anchor in found], np.int64)
    return reference.Selection(
        boxes=boxes[anchors],
        scores=np.array([-score for score, _, _ in found], np.float32),
        classes=np.array([column for _, column, _ in found], np.int32),
        anchors=anchors,
    )


def exact_iou(one: np.ndarray, other: np.ndarray) -> Fraction:
    a, b = [Fraction(float(v)) for v in one], [Fraction(float(v)) for v in other]
    height = max(min(a[2], b[2]) - max(a[0], b[0]), Fraction(0))
    width = max(min(a[3], b[3]) - max(a[1], b[1]), Fraction(0))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return height * width / (sum(areas) - height * width) if all(areas) else Fraction(0)


def exact_selection(
    boxes: np.ndarray, scores: np.ndarray, nms: NmsSpec, window: np.ndarray
) -> reference.Selection:
    """Greedy suppression as the textbook writes it, in rational numbers; no caps, window = whole image."""
    order = sorted(
        ((-scores[a, c], c, a) for a, c in np.argwhere(scores > np.float32(nms.score_threshold))),
    )
    kept: list[tuple[float, int, int]] = []
    for score, column, anchor in order:
        rivals = [other for _, c, other in kept if c == column]
        if all(exact_iou(boxes[anchor], boxes[o]) <= Fraction(nms.iou_threshold) for o in rivals):
            kept.append((score, column, anchor))
    return reference.Selection(
        boxes=boxes[[anchor for _, _, anchor in kept]],
        scores=np.array([-score for score, _, _ in kept], np.float32),
        classes=np.array([column for _, column, _ in kept], np.int32),
        anchors=np.array([anchor for _, _, anchor in kept], np.int64),
    )


@pytest.fixture(scope="module")
def exact_cases() -> Cases:
    """Boxes on a grid of 1/16 inside the image: their areas and the thresholds are exact in float32."""
    rng = np.random.default_rng(11)
    settings = nms_spec(0.125, 0.25, 1000, 1000, frame=False)
    first = rng.integers(0, 9, (40, 30, 2))
    boxes = np.concatenate([first, first + rng.integers(2, 8, first.shape)], axis=2).astype(np.float32) / 16
    scores = random_scores(rng, "tied", 40, 30, 2)
    windows = np.tile(WINDOWS[:1], (40, 1))
    expected = tuple(
        exact_selection(b, s, settings, w) for b, s, w in zip(boxes, scores, windows, strict=True)
    )
    return Cases(settings, boxes, scores, windows, expected)


def test_selection_is_the_textbooks_in_exact_arithmetic(exact_cases: Cases) -> None:
    assert disagreements(exact_cases, reference.multiclass_nms) == []


def test_the_rule_any_better_box_kills_me_is_caught(exact_cases: Cases) -> None:
    wrong = disagreements(exact_cases, selection_of_the_article)
    assert len(wrong) > len(exact_cases.boxes) // 2
    for i in wrong:
        lossy = selection_of_the_article(
            exact_cases.boxes[i], exact_cases.scores[i], exact_cases.nms, exact_cases.windows[i]
        )
        assert pairs_of(lossy) < pairs_of(exact_cases.expected[i]), "the rule only ever loses boxes"


def pairs_of(selection: reference.Selection) -> set[tuple[int, int]]:
    return set(zip(selection.anchors.tolist(), selection.classes.tolist(), strict=True))


def detector_spec(
    converter: str, background: bool, anchors: int, classes: int, nms: NmsSpec, logit_scale: float = 1.0
) -> DetectorSpec:
    scores = ScoreSpec(converter, logit_scale)
    return spec_cases.example(spec_cases.ssd(anchors, classes, background, scores=scores), nms)


@dataclasses.dataclass(frozen=True)
class Heads:
    box_encodings: np.ndarray
    class_logits: np.ndarray
    anchors: np.ndarray
    windows: np.ndarray


def random_heads(spec: DetectorSpec, batch: int, seed: int, with_nan: bool) -> Heads:
    rng = np.random.default_rng(seed)
    shape = (batch, spec.heads.num_anchors)
    encodings = rng.normal(0, 2, (*shape, 4)).astype(np.float32)
    logits = rng.normal(0, 3, (*shape, spec.heads.num_columns)).astype(np.float32)
    if with_nan:
        for array in (encodings, logits):
            chosen = rng.random(array.shape) < 0.03
            array[chosen] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30], np.count_nonzero(chosen))
    centres = rng.uniform(0, 1, (shape[1], 2))
    anchors = np.concatenate([centres, rng.uniform(0.05, 0.4, (shape[1], 2))], 1).astype(np.float32)
    return Heads(encodings, logits, anchors, WINDOWS[rng.integers(0, 3, batch)])


@pytest.fixture(params=["native", "numpy"])
def way(request: pytest.FixtureRequest) -> Callable[..., reference.Postprocessed]:
    """The post-processing in the native library and in numpy."""
    if request.param == "native":
        request.getfixturevalue("native_library")
        return reference.postprocess
    return reference.postprocess_reference


@pytest.mark.parametrize("with_nan", [False, True], ids=["finite", "with NaN and infinity"])
@pytest.mark.parametrize("logit_scale", [1.0, 2.5])
@pytest.mark.parametrize("background", [False, True], ids=["no background", "background column"])
@pytest.mark.parametrize("converter", ["sigmoid", "softmax", "identity"])
def test_postprocess_from_raw_heads_is_the_odapis(
    converter: str, background: bool, logit_scale: float, with_nan: bool, way: Callable[..., Any]
) -> None:
    settings = nms_spec(0.05, 0.5, 8, 20)
    spec = detector_spec(converter, background, 40, 3, settings, logit_scale)
    heads = random_heads(spec, batch=24, seed=3, with_nan=with_nan)
    boxes, scores = odapi_boxes_and_scores(heads, spec)
    our_boxes = reference.decode_boxes(heads.box_encodings, heads.anchors, spec.heads.box_coder)
    our_scores = reference.convert_scores(heads.class_logits, spec.heads.scores)
    np.testing.assert_allclose(our_boxes, boxes, rtol=2e-6, atol=2e-6)
    if converter == "softmax":  # beside a NaN TensorFlow's softmax gives 0 or NaN: neither is a detection
        our_scores, scores = np.nan_to_num(our_scores), np.nan_to_num(scores)
    np.testing.assert_allclose(our_scores, scores, rtol=2e-6, atol=1e-9)

    expected = odapi_selections(settings, our_boxes, our_scores[..., int(background) :], heads.windows)
    found = way(heads.box_encodings, heads.class_logits, heads.anchors, spec, heads.windows)
    assert found.num_detections.tolist() == [len(image.scores) for image in expected]
    assert found.num_detections.max() > 3
    for i, image in enumerate(expected):
        for name in ("boxes", "scores", "classes", "anchors"):
            values, count = getattr(found, name)[i], len(image.scores)
            np.testing.assert_array_equal(values[:count], getattr(image, name))
            assert not values[count:].any(), "padding is zeros"


@pytest.mark.parametrize("number", range(12))
def test_heads_about_the_limits_of_float32_are_the_odapis(number: int, way: Callable[..., Any]) -> None:
    """48 images a case: areas that overflow, sides, areas and scores below 2^-126, NaN and infinity."""
    kinds, converters = nms_cases.EXTREME_BOX_KINDS, ("sigmoid", "softmax", "identity", "sigmoid")
    settings = nms_spec(0.0, 0.1 * (number % 2), 8, 20, frame=False)
    spec = detector_spec(converters[number // 3], False, 40, 3, settings)
    rng = np.random.default_rng(number)
    case = nms_cases.make_case("", spec, 48, rng, kinds[number % 3], "vanishing" if number < 9 else "tied")
    heads = Heads(case.box_encodings, case.class_logits, case.anchors, case.clip_windows)
    boxes, scores = odapi_boxes_and_scores(heads, spec)
    our_boxes = reference.decode_boxes(heads.box_encodings, heads.anchors, spec.heads.box_coder)
    our_scores = reference.convert_scores(heads.class_logits, spec.heads.scores)
    assert np.array_equal(np.isfinite(our_boxes), np.isfinite(boxes))
    sizes = np.nan_to_num(np.abs(boxes).reshape(*boxes.shape[:2], 2, 2), posinf=0).max(axis=2)
    assert_near(our_boxes, boxes, np.tile(1 + sizes, 2))
    assert_near(our_scores, scores, scores)

    expected = odapi_selections(settings, our_boxes, our_scores, heads.windows)
    found = way(heads.box_encodings, heads.class_logits, heads.anchors, spec, heads.windows)
    assert found.num_detections.tolist() == [len(image.scores) for image in expected]
    assert found.num_detections.any()
    for i, image in enumerate(expected):
        for name in ("boxes", "scores", "classes", "anchors"):
            values = getattr(found, name)[i, : len(image.scores)]
            np.testing.assert_array_equal(values, getattr(image, name))


def assert_near(found: np.ndarray, expected: np.ndarray, sizes: np.ndarray) -> None:
    """Within 2e-6 of ``sizes``; infinities are the same. On some processors TensorFlow's softmax gives 0 for
    what is below 2^-125, a normal number still."""
    with np.errstate(invalid="ignore"):
        is_near = (found == expected) | (np.isnan(found) & np.isnan(expected))
        assert np.all(is_near | (np.abs(found - expected) <= np.maximum(2e-6 * sizes, 2.0**-125)))


def test_the_odapis_count_may_hang_on_the_last_bit_of_a_score() -> None:
    """TensorFlow has two sigmoids, for many numbers at a time and for the rest, and they differ in their last
    bits. Where many scores are near 1, that much changes the order, and with it who is within the cap a
    class: the number of detections. From equal scores there is one answer, so the tests above start there."""
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(5)
    anchors, settings = 600, nms_spec(1e-8, 0.5, 60, 60)
    boxes = random_boxes(rng, "scattered", 8, anchors)
    logits = rng.normal(14, 1.5, (8, anchors, 1)).astype(np.float32)
    windows = np.tile(np.array([[0, 0, 0.5, 1]], np.float32), (8, 1))
    some = np.linspace(-3, 3, 64, dtype=np.float32)
    one_at_a_time = np.array([tf.sigmoid(some[i : i + 1]).numpy()[0] for i in range(len(some))])
    assert np.any(tf.sigmoid(some).numpy() != one_at_a_time)
    answers = []
    ours = reference.convert_scores(logits, ScoreSpec("sigmoid", 1.0))
    for scores in (tf.sigmoid(logits).numpy(), ours):
        expected = odapi_selections(settings, boxes, scores, windows)
        cases = Cases(settings, boxes, scores, windows, expected)
        assert disagreements(cases, reference.multiclass_nms) == []
        answers.append([len(image.scores) for image in expected])
    assert answers[0] != answers[1]


def odapi_boxes_and_scores(heads: Heads, spec: DetectorSpec) -> tuple[np.ndarray, np.ndarray]:
    """The OD API's own box coder and score converter, on the same anchors."""
    pytest.importorskip("tensorflow")
    from odtrt_lib.export import odapi

    odapi.prepare()
    import tensorflow as tf
    from object_detection.box_coders.faster_rcnn_box_coder import FasterRcnnBoxCoder
    from object_detection.builders import post_processing_builder
    from object_detection.protos import post_processing_pb2

    class CentredAnchors:
        def get_center_coordinates_and_sizes(self) -> list[Any]:
            return tf.unstack(tf.constant(heads.anchors), axis=1)

    coder = spec.heads.box_coder
    box_coder = FasterRcnnBoxCoder([coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale])
    boxes = [box_coder.decode(tf.constant(e), CentredAnchors()).get().numpy() for e in heads.box_encodings]
    config = post_processing_pb2.PostProcessing()
    config.score_converter = config.ScoreConverter.Value(spec.heads.scores.converter.upper())
    config.logit_scale = spec.heads.scores.logit_scale
    _, convert = post_processing_builder.build(config)
    return np.stack(boxes), convert(tf.constant(heads.class_logits)).numpy()


def test_multiplying_by_the_scales_instead_of_dividing_is_caught() -> None:
    spec = detector_spec("sigmoid", False, 40, 3, nms_spec(0.05, 0.5, 8, 20))
    heads = random_heads(spec, batch=1, seed=3, with_nan=False)
    boxes, _ = odapi_boxes_and_scores(heads, spec)
    wrong = reference.decode_boxes(heads.box_encodings, heads.anchors, BoxCoder(0.1, 0.1, 0.2, 0.2))
    assert not np.allclose(wrong, boxes, rtol=2e-6, atol=2e-6)


def test_an_image_does_not_depend_on_its_batch(way: Callable[..., Any]) -> None:
    spec = detector_spec("sigmoid", True, 40, 3, nms_spec(0.05, 0.5, 8, 20))
    heads = random_heads(spec, batch=3, seed=5, with_nan=True)
    batch = way(heads.box_encodings, heads.class_logits, heads.anchors, spec, heads.windows)
    for i in range(3):
        alone = way(
            heads.box_encodings[i : i + 1],
            heads.class_logits[i : i + 1],
            heads.anchors,
            spec,
            heads.windows[i : i + 1],
        )
        for field in dataclasses.fields(alone):
            np.testing.assert_array_equal(getattr(alone, field.name)[0], getattr(batch, field.name)[i])


def wrong_shapes() -> Iterator[tuple[str, Heads, str]]:
    spec = detector_spec("sigmoid", True, 40, 3, nms_spec(0.05, 0.5, 8, 20))
    heads = random_heads(spec, batch=2, seed=5, with_nan=False)
    for name, value in (
        ("box_encodings", heads.box_encodings[:, :39]),
        ("class_logits", heads.class_logits[..., 1:]),
        ("anchors", heads.anchors[:39]),
    ):
        yield name, dataclasses.replace(heads, **{name: value}), str(list(value.shape)[-2:])[1:]


@pytest.mark.parametrize("name, heads, found", list(wrong_shapes()))
def test_a_wrong_shape_is_named_in_one_line(
    name: str, heads: Heads, found: str, way: Callable[..., Any]
) -> None:
    spec = detector_spec("sigmoid", True, 40, 3, nms_spec(0.05, 0.5, 8, 20))
    with pytest.raises(InputError) as raised:
        way(heads.box_encodings, heads.class_logits, heads.anchors, spec, heads.windows)
    message = str(raised.value)
    assert message.startswith(f"{name}: shape [") and found in message and "\n" not in message


def test_an_unknown_converter_is_an_error() -> None:
    with pytest.raises(InputError, match="'argmax' is unknown"):
        reference.convert_scores(np.zeros((2, 3), np.float32), ScoreSpec("argmax", 1.0))
