"""Measures how good a detector is (COCO mAP), what another one loses, and whether two agree, box by box.

Detections are in COCO's results form, one ``dict`` each: ``image_id``, ``category_id``, ``bbox`` =
``[x, y, width, height]`` in pixels of the original image, and ``score``.

Evaluation can be divided into shards. :func:`detect_shard` takes a :class:`Recipe` and some pictures, both
picklable, so it can run in any process on any machine that has the folder and the pictures. :func:`merge`
joins the results. On one machine: ``merge(detect_shard(recipe, shard) for shard in shards(coco, 3))``; on a
cluster by :func:`odtrt_lib.distribute.mapped`.

A loss of mAP is measured on a sample of images, so it has an error of its own. :func:`map_drop` gives it with
its 95 % interval, and :func:`check_limit` says whether it is shown to be within a limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np

from odtrt_lib.coco import CocoFolder, Identity, Instances, identity, number, read_instances, read_json
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.preprocess import load_image

if TYPE_CHECKING:
    from odtrt_lib.detector import Detections, Detector

# The fields of CocoMetrics, in the order of pycocotools' summary.
_SUMMARY = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)

RESAMPLES = 1000
# With fewer images the interval of a drop is too narrow: check_limit passes nothing.
MIN_IMAGES = 30
_INTERVAL = (2.5, 97.5)
_RESAMPLES_AT_ONCE = 50


@dataclasses.dataclass(frozen=True)
class CocoMetrics:
    """COCO's twelve figures for boxes, 0 to 1; -1 if there is nothing to find, as in pycocotools.

    map: mean average precision at IoU 0.50:0.05:0.95; map50, map75: at that IoU; map_small, map_medium,
    map_large: of objects below 32² pixels, up to 96², and above. ar1, ar10, ar100: average recall with at
    most that many detections an image. ap_per_class: category id -> its average precision. images: how many
    were evaluated.
    """

    map: float
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    ap_per_class: Dict[int, float]
    images: int


Picture = Tuple[Identity, Path]  # the picture's id in the annotations, and its file


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The arguments of ``Detector.open``, with which any process can open the same detector.

    With one thread ONNX Runtime finds the same bits on machines with other numbers of cores, if their
    processors are of one kind.
    """

    folder: Path
    backend: str = "auto"
    plugin: Optional[Path] = None
    precision: Optional[str] = None
    threads: Optional[int] = None

    def open(self) -> Detector:
        """Opens the detector. Raises what ``Detector.open`` raises."""
        from odtrt_lib.detector import Detector

        return Detector.open(
            self.folder,
            self.backend,
            plugin=self.plugin,
            precision=self.precision,
            threads=self.threads,
        )


@dataclasses.dataclass(frozen=True)
class PictureResult:
    """What was found in one picture.

    detections: in COCO's results form. problem: one line that names the file and says why it could not be
    used; None if it could.
    """

    image_id: Identity
    path: Path
    detections: Tuple[Dict[str, Any], ...] = ()
    problem: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Merged:
    """The results of all shards, in their order.

    image_ids: those of the pictures that could be used. unreadable: the files of the others, each with the
    reason.
    """

    detections: List[Dict[str, Any]]
    image_ids: List[Identity]
    unreadable: Dict[Path, str]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How two lists of detections of the same images compare; see :func:`agreement`.

    references: reference detections that count. matched: those of them that have a counterpart. missing:
    those that have none. extra: candidate detections without a counterpart. at_threshold: detections of
    either list without a counterpart that are excused, because their score is within the tolerance of the
    point where the other list was cut. max_score_difference, min_iou: over all matches; 0 and 1 if there is
    none.
    """

    images: int
    references: int
    matched: int
    missing: Tuple[Dict[str, Any], ...]
    extra: Tuple[Dict[str, Any], ...]
    at_threshold: int
    max_score_difference: float
    min_iou: float
    score_tolerance: float

    @property
    def agrees(self) -> bool:
        """Nothing is missing, nothing is extra, and no score differs by more than the tolerance."""
        return not self.missing and not self.extra and self.max_score_difference <= self.score_tolerance


@dataclasses.dataclass(frozen=True)
class ClassMatches:
    """The detections of one class in all images, as pycocotools matches them with the objects.

    objects: int64 [images], the objects that count. image: int64 [D], the place of each detection's image,
    best score first. is_hit, is_ignored: bool [IoU thresholds, D]; a detection that is neither is a false
    one.
    """

    objects: np.ndarray
    image: np.ndarray
    is_hit: np.ndarray
    is_ignored: np.ndarray


@dataclasses.dataclass(frozen=True)
class MapDrop:
    """What a detector loses against a reference on the same images; see :func:`map_drop`.

    reference_map, candidate_map: mAP, 0 to 1. points: the drop, in points of mAP (hundredths); negative if
    the candidate is better. low, high: its 95 % interval, in points.
    """

    reference_map: float
    candidate_map: float
    points: float
    low: float
    high: float
    images: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a drop is within a limit; see :func:`check_limit`.

    name: ``passed``, ``failed`` or ``not shown``. images_needed: if it is not shown, with how many images it
    would be, were drop and spread to stay; None if no number suffices, and for the other verdicts.
    """

    name: str
    limit: float
    images_needed: Optional[int] = None


def load_detections(path: Union[str, Path]) -> List[Dict[str, Any]]:
    """Reads a COCO results file. Raises InputError if it is absent, damaged or of another form."""
    detections = read_json(path, "a COCO results file, a list of detections")
    if not isinstance(detections, list):
        raise InputError(f"{path}: {type(detections).__name__}, expected a list of detections")
    _check_detections(detections, str(path))
    return detections


def detect_folder(detector: Detector, coco: CocoFolder) -> List[Dict[str, Any]]:
    """The detections of ``detector`` in every image of ``coco``, in COCO's results form.

    Raises InputError at the first picture that cannot be used.
    """
    found: List[Dict[str, Any]] = []
    for image_id, path in zip(coco.image_ids, coco.paths):
        found += coco_results(image_id, detect_file(detector, path)[1])
    return found


def shards(coco: CocoFolder, count: int, limit: Optional[int] = None) -> List[Tuple[Picture, ...]]:
    """Divides the pictures of ``coco``, or the first ``limit``, into ``count`` parts of nearly the same size.

    Their order is kept. No part is empty, so there are fewer parts if there are fewer pictures than
    ``count``. Raises ValueError if ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"{count} shards: expected one at least")
    pictures = list(zip(coco.image_ids, coco.paths))[:limit]
    limits = [len(pictures) * i // count for i in range(count + 1)]
    return [tuple(pictures[i:j]) for i, j in zip(limits, limits[1:]) if i < j]


def detect_shard(recipe: Recipe, pictures: Sequence[Picture]) -> List[PictureResult]:
    """Opens the detector of ``recipe``, runs it on the pictures, closes it.

    If a picture cannot be used, its result says why, and the next ones are still run. Raises what
    ``Detector.open`` raises.
    """
    with recipe.open() as detector:
        return list(detect_pictures(detector, pictures))


def detect_item(item: Tuple[Recipe, Sequence[Picture]]) -> List[PictureResult]:
    """:func:`detect_shard` of a pair, for :func:`odtrt_lib.distribute.mapped`."""
    return detect_shard(*item)


def detect_pictures(
    detector: Detector, pictures: Iterable[Picture], advance: Callable[[], None] = lambda: None
) -> Iterator[PictureResult]:
    """Yields one result for each picture as soon as it is known, and calls ``advance`` after each."""
    for image_id, path in pictures:
        try:
            _, found = detect_file(detector, path)
            result = PictureResult(image_id, path, tuple(coco_results(image_id, found)))
        except InputError as error:
            result = PictureResult(image_id, path, problem=str(error))
        yield result
        advance()


def detect_file(detector: Detector, path: Path) -> Tuple[np.ndarray, Detections]:
    """A picture, uint8 [height, width, 3], and its detections. Raises InputError, naming the file."""
    try:
        image = load_image(path)
        return image, detector.detect(image)
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path}: {error}") from error


def merge(parts: Iterable[Iterable[PictureResult]]) -> Merged:
    """Joins the results of several shards. Pass them in the order of :func:`shards`."""
    merged = Merged([], [], {})
    for result in (result for part in parts for result in part):
        merged.detections.extend(result.detections)
        if result.problem is None:
            merged.image_ids.append(result.image_id)
        else:
            merged.unreadable[result.path] = result.problem
    return merged


def coco_results(image_id: Identity, detections: Detections) -> List[Dict[str, Any]]:
    """The detections of one image in COCO's results form."""
    ymin, xmin, ymax, xmax = detections.boxes.astype(np.float64).T
    boxes = np.stack([xmin, ymin, xmax - xmin, ymax - ymin], axis=1)
    return [
        {"image_id": image_id, "category_id": int(class_id), "bbox": box.tolist(), "score": float(score)}
        for class_id, box, score in zip(detections.class_ids, boxes, detections.scores)
    ]


def coco_metrics(
    annotations: Union[str, Path, Dict[str, Any], Instances],
    detections: Sequence[Dict[str, Any]],
    image_ids: Optional[Iterable[Identity]] = None,
) -> CocoMetrics:
    """COCO's box metrics, computed by pycocotools.

    annotations: a COCO instances file, its content, or the result of :func:`odtrt_lib.coco.read_instances`.
        An annotation without ``area`` gets that of its box, and one without ``iscrowd`` is no crowd.
        Annotation ids are not used: pycocotools takes id 0 for "no match", and an id twice for one object.
    image_ids: the images to evaluate; by default all of ``annotations``.

    Raises InputError if ``annotations`` cannot be read, or if a detection is malformed or of an image that
    they do not have; MissingDependencyError without pycocotools.
    """
    truth = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    evaluation = _evaluation(truth, detections, image_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision: [IoU thresholds, recall thresholds, classes, areas, caps]; area 0 is all, cap -1 is 100.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = {
        int(class_id): float(own[own > -1].mean())
        for class_id, own in zip(evaluation.params.catIds, np.moveaxis(precision, 2, 0))
        if (own > -1).any()
    }
    figures = {name: float(figure) for name, figure in zip(_SUMMARY, evaluation.stats)}
    return CocoMetrics(ap_per_class=per_class, images=len(evaluation.params.imgIds), **figures)


def map_drop(
    annotations: Union[str, Path, Dict[str, Any], Instances],
    reference: Sequence[Dict[str, Any]],
    candidate: Sequence[Dict[str, Any]],
    image_ids: Optional[Iterable[Identity]] = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MapDrop:
    """The mAP that ``candidate`` loses against ``reference``, with its 95 % interval.

    The interval is the percentile interval of a paired bootstrap over images (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapters 6 and 13): as many images as there are, drawn with
    replacement, the same for both lists, ``resamples`` times. An image drawn twice counts twice. The
    matching is done once. Equal arguments give equal bits. The interval is a little too narrow: for simulated
    detectors it covered the true drop in 91 to 94 % of samples of 20 to 200 images, in 89 % of 10 images.

    annotations, image_ids: as of :func:`coco_metrics`. Raises what that raises, and InputError if no object
    counts.
    """
    truth = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    ids = list(truth.files if image_ids is None else image_ids)
    require_objects(truth, ids)
    sides = [match(truth, detections, ids) for detections in (reference, candidate)]
    images = len(sides[0][0].objects)
    rng = np.random.default_rng(seed)
    drops: List[float] = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        drawn = rng.integers(0, images, (min(_RESAMPLES_AT_ONCE, resamples - start), images))
        counts = np.stack([np.bincount(row, minlength=images) for row in drawn])
        drops += (resampled_map(sides[0], counts) - resampled_map(sides[1], counts)).tolist()
    # Where none of the drawn images has an object there is no mAP.
    low, high = np.percentile([100 * drop for drop in drops if not math.isnan(drop)], _INTERVAL).tolist()
    once = np.ones((1, images), np.int64)
    maps = [float(resampled_map(side, once)[0]) for side in sides]
    return MapDrop(maps[0], maps[1], 100 * (maps[0] - maps[1]), low, high, images)


def check_limit(drop: MapDrop, limit: float) -> Verdict:
    """Whether the drop is at most ``limit`` points, and is shown to be.

    ``failed``: it is above. ``not shown``: it is not above, but its interval reaches above, or there are
    fewer than :data:`MIN_IMAGES` images. An interval narrows with the square root of the number of images.

    Raises InputError if ``limit`` is not from 0 to 100.
    """
    require_limit(limit)
    if drop.points > limit:
        return Verdict("failed", limit)
    if drop.high <= limit:
        is_shown = drop.images >= MIN_IMAGES
        return Verdict("passed", limit) if is_shown else Verdict("not shown", limit, MIN_IMAGES)
    room = limit - drop.points
    if room == 0:
        return Verdict("not shown", limit)
    needed = math.ceil(drop.images * ((drop.high - drop.points) / room) ** 2)
    return Verdict("not shown", limit, max(MIN_IMAGES, needed))


def require_limit(limit: float) -> None:
    """Raises InputError unless ``limit`` is from 0 to 100."""
    if not 0 <= limit <= 100:
        raise InputError(f"gate {limit:g}: expected the points of mAP that may be lost, from 0 to 100")


def require_objects(truth: Instances, image_ids: Iterable[Identity]) -> None:
    """Raises InputError if no image has an object that counts, which a crowd does not."""
    ids = {identity(one) for one in image_ids}
    if not any(one.image_id in ids and not one.is_crowd for one in truth.objects):
        raise InputError(
            f"{truth.source}: no object that counts in {len(ids)} images, so there is no mAP to compare; "
            "expected annotations of these images"
        )


def match(
    truth: Instances, detections: Sequence[Dict[str, Any]], image_ids: Optional[Iterable[Identity]] = None
) -> Tuple[ClassMatches, ...]:
    """The matches of each class of ``truth``, by pycocotools, for objects of all sizes and with 100
    detections an image and class at most.

    Raises what :func:`coco_metrics` raises.
    """
    evaluation = _evaluation(truth, detections, image_ids)
    evaluation.params.areaRng = evaluation.params.areaRng[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    images = len(evaluation.params.imgIds)
    every = evaluation.evalImgs
    thresholds = len(evaluation.params.iouThrs)
    return tuple(_class_matches(every[i : i + images], thresholds) for i in range(0, len(every), images))


def resampled_map(matches: Sequence[ClassMatches], counts: np.ndarray) -> np.ndarray:
    """float64 [R]: the mAP of each of R resamples; NaN where no object counts.

    counts: int64 [R, images], how often each image is in the resample. Of detections with equal scores, those
    of the first image come first, and of one image all copies of the first. A class without an object in the
    resample is left out of its mean, as pycocotools leaves it out.
    """
    every = np.stack([_average_precision(own, counts) for own in matches])
    has_objects = ~np.isnan(every)
    total = np.where(has_objects, every, 0.0).sum(axis=0)
    number = has_objects.sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def agreement(
    reference: Sequence[Dict[str, Any]],
    candidate: Sequence[Dict[str, Any]],
    score_threshold: float = 0.05,
    iou: float = 0.99,
    score_tolerance: float = 1e-3,
    max_detections: Optional[int] = None,
) -> Agreement:
    """Compares two lists of detections of the same images, each box with its counterpart.

    Within an image and a class, boxes with an IoU of at least ``iou`` are paired one to one, best IoU first.
    A detection of either list with a score of at least ``score_threshold`` must have a counterpart with a
    score of at least ``score_threshold - score_tolerance``. It is excused if its score is within
    ``score_tolerance`` of the point where the other list was cut. That is ``score_threshold``; but in an
    image for which the other list has ``max_detections`` entries, it is the lowest of their scores.

    Raises InputError if a detection is malformed.
    """
    _check_detections(reference, "reference")
    _check_detections(candidate, "candidate")
    references, candidates = _by_image(reference), _by_image(candidate)
    count = matched = at_threshold = 0
    unmatched: Tuple[List[Dict[str, Any]], List[Dict[str, Any]]] = ([], [])
    score_differences, overlaps = [0.0], [1.0]
    for image_id in sorted({*references, *candidates}, key=_order):
        sides = (references.get(image_id, []), candidates.get(image_id, []))
        cuts = [_cut(side, score_threshold, max_detections) for side in sides]
        near = tuple([d for d in side if d["score"] >= score_threshold - score_tolerance] for side in sides)
        pairs = _pairs(near[0], near[1], iou)
        for one, other, overlap in pairs:
            scores = near[0][one]["score"], near[1][other]["score"]
            if max(scores) >= score_threshold:
                score_differences.append(abs(scores[0] - scores[1]))
                overlaps.append(overlap)
                matched += scores[0] >= score_threshold
        count += sum(d["score"] >= score_threshold for d in near[0])
        for side in (0, 1):
            paired = {pair[side] for pair in pairs}
            for i, detection in enumerate(near[side]):
                if i in paired or detection["score"] < score_threshold:
                    continue
                if detection["score"] <= cuts[1 - side] + score_tolerance:
                    at_threshold += 1
                else:
                    unmatched[side].append(detection)
    return Agreement(
        images=len({*references, *candidates}),
        references=count,
        matched=matched,
        missing=tuple(unmatched[0]),
        extra=tuple(unmatched[1]),
        at_threshold=at_threshold,
        max_score_difference=max(score_differences),
        min_iou=min(overlaps),
        score_tolerance=score_tolerance,
    )


def _evaluation(
    truth: Instances, detections: Sequence[Dict[str, Any]], image_ids: Optional[Iterable[Identity]]
) -> Any:
    """A COCOeval that knows objects, detections and images, and has evaluated nothing yet."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingDependencyError(
            f"pycocotools cannot be imported ({error}): run `pip install pycocotools`"
        ) from error
    _check_detections(detections, "detections")
    seen = [identity(detection["image_id"]) for detection in detections]
    ids = set(truth.files) if image_ids is None else {identity(one) for one in image_ids}
    unknown = sorted({*ids, *seen} - set(truth.files), key=_order)
    if unknown:
        raise InputError(
            f"image {unknown[0]} is not among the {len(truth.files)} images of {truth.source}; "
            "evaluate detections with the annotations of the same images"
        )
    numbers = _numbered(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _indexed(COCO(), truth, _truth_rows(truth, numbers)),
            _indexed(COCO(), truth, _detection_rows(detections, numbers)),
            "bbox",
        )
    evaluation.params.imgIds = sorted(numbers[one] for one in ids)
    return evaluation


def _class_matches(images: Sequence[Optional[Dict[str, Any]]], thresholds: int) -> ClassMatches:
    """images: of each, what COCOeval says of the class; None if it has neither object nor detection."""
    found = [(i, one) for i, one in enumerate(images) if one is not None]
    objects = np.zeros(len(images), np.int64)
    for i, one in found:
        objects[i] = np.count_nonzero(one["gtIgnore"] == 0)
    scores = np.concatenate([np.zeros(0), *(one["dtScores"] for _, one in found)])
    order = np.argsort(-scores, kind="stable")
    none = np.zeros((thresholds, 0), np.bool_)
    is_matched = np.concatenate([none, *(one["dtMatches"] != 0 for _, one in found)], axis=1)[:, order]
    is_ignored = np.concatenate([none, *(one["dtIgnore"] for _, one in found)], axis=1)[:, order]
    places = np.repeat([i for i, _ in found], [len(one["dtScores"]) for _, one in found])
    return ClassMatches(objects, places.astype(np.int64)[order], is_matched & ~is_ignored, is_ignored)


def _average_precision(own: ClassMatches, counts: np.ndarray) -> np.ndarray:
    """float64 [R]: the class's average precision in each resample; NaN where it has no object.

    COCOeval takes at each of 101 recalls the best precision at that recall or a higher one. That is always
    the precision at a hit, so only the hits are visited.
    """
    recalls = np.linspace(0.0, 1.0, 101)
    objects = (counts * own.objects).sum(axis=1)
    times = counts[:, own.image]
    seen = np.cumsum(times, axis=1)
    total = np.zeros(len(counts))
    for is_hit, is_ignored in zip(own.is_hit, own.is_ignored):
        hits, ignored = np.flatnonzero(is_hit), np.flatnonzero(is_ignored)
        true = np.cumsum(times[:, hits], axis=1)
        counted = seen[:, hits]
        if ignored.size:
            left_out = np.cumsum(times[:, ignored], axis=1)
            left_out = np.concatenate([np.zeros((len(counts), 1), np.int64), left_out], axis=1)
            counted = counted - left_out[:, np.searchsorted(ignored, hits)]
        precision = true / (counted + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = true / np.maximum(objects, 1)[:, np.newaxis]
        reached = np.searchsorted(recalls, recall, side="right")
        total += (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
    return np.where(objects > 0, total / (len(own.is_hit) * len(recalls)), np.nan)


def _by_image(detections: Sequence[Dict[str, Any]]) -> Dict[int, List[Dict[str, Any]]]:
    images: Dict[int, List[Dict[str, Any]]] = {}
    for detection in detections:
        images.setdefault(detection["image_id"], []).append(detection)
    return images


def _cut(detections: List[Dict[str, Any]], threshold: float, max_detections: Optional[int]) -> float:
    if max_detections is None or len(detections) < max_detections:
        return threshold
    return max(threshold, min(detection["score"] for detection in detections))


def _pairs(
    ones: List[Dict[str, Any]], others: List[Dict[str, Any]], iou: float
) -> List[Tuple[int, int, float]]:
    """Pairs (index, index, IoU) of detections of the same class, best IoU first. Each is in one pair at
    most."""
    if not ones or not others:
        return []
    overlaps = iou_matrix([d["bbox"] for d in ones], [d["bbox"] for d in others])
    classes = [np.array([d["category_id"] for d in side]) for side in (ones, others)]
    overlaps[classes[0][:, np.newaxis] != classes[1]] = -1.0
    rows, columns = np.nonzero(overlaps >= iou)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    pairs: List[Tuple[int, int, float]] = []
    used: Tuple[set, set] = (set(), set())
    for row, column in zip(rows[order].tolist(), columns[order].tolist()):
        if row not in used[0] and column not in used[1]:
            used[0].add(row)
            used[1].add(column)
            pairs.append((row, column, float(overlaps[row, column])))
    return pairs


def iou_matrix(boxes: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> np.ndarray:
    """float64 [len(boxes), len(others)]: intersection over union of boxes ``[x, y, width, height]``."""
    one, other = np.array(boxes, np.float64)[:, np.newaxis], np.array(others, np.float64)
    upper = np.minimum(one[..., :2] + one[..., 2:], other[..., :2] + other[..., 2:])
    sides = np.maximum(upper - np.maximum(one[..., :2], other[..., :2]), 0.0)
    intersection = sides.prod(axis=-1)
    union = one[..., 2:].prod(axis=-1) + other[..., 2:].prod(axis=-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _check_detections(detections: Sequence[Dict[str, Any]], where: str) -> None:
    for i, detection in enumerate(detections):
        try:
            numbers = [detection["score"], *detection["bbox"]]
            is_right = len(numbers) == 5 and bool(np.isfinite(numbers).all())
            identity(detection["image_id"])
            is_right = is_right and isinstance(identity(detection["category_id"]), int)
        except (KeyError, TypeError, ValueError, OverflowError):
            is_right = False
        if not is_right:
            raise InputError(
                f"{where}[{i}]: {json.dumps(detection, default=str)[:120]}; expected image_id, category_id, "
                "bbox = [x, y, width, height] and score, as in COCO's results format"
            )


def _numbered(truth: Instances) -> Dict[Identity, int]:
    """Image id -> a number from 1 up, in the order in which pycocotools would sort the ids."""
    return {image_id: i for i, image_id in enumerate(sorted(truth.files, key=_order), 1)}


def _order(image_id: Identity) -> Tuple[bool, Identity]:
    return isinstance(image_id, str), image_id


def _truth_rows(truth: Instances, numbers: Dict[Identity, int]) -> List[Dict[str, Any]]:
    return [
        {
            "id": i,
            "image_id": numbers[one.image_id],
            "category_id": one.category_id,
            "bbox": list(one.bbox),
            "area": one.area,
            "iscrowd": int(one.is_crowd),
        }
        for i, one in enumerate(truth.objects, 1)
    ]


def _detection_rows(
    detections: Sequence[Dict[str, Any]], numbers: Dict[Identity, int]
) -> List[Dict[str, Any]]:
    """The detections as annotations, as pycocotools' ``loadRes`` makes them."""
    rows = []
    for i, one in enumerate(detections, 1):
        bbox = [number(side) for side in one["bbox"]]
        rows.append(
            {
                "id": i,
                "image_id": numbers[identity(one["image_id"])],
                "category_id": int(identity(one["category_id"])),
                "bbox": bbox,
                "score": number(one["score"]),
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
            }
        )
    return rows


def _indexed(coco: Any, truth: Instances, rows: List[Dict[str, Any]]) -> Any:
    coco.dataset = {
        "images": [{"id": i} for i in range(1, len(truth.files) + 1)],
        "categories": [{"id": i, "name": name} for i, name in truth.class_names.items()],
        "annotations": rows,
    }
    coco.createIndex()
    return coco
