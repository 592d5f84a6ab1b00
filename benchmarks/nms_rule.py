"""What the rule "a box is kept unless a better box overlaps it" does to real detections.

    python benchmarks/nms_rule.py          writes results/nms_rule.cpu.json; some minutes on two cores

Greedy suppression keeps a box unless a better box *that was itself kept* overlaps it. The other rule asks
all better boxes, kept or not, so that every box can be decided at once; Fast NMS and several GPU kernels
use it. Both run here on the same heads, with the same thresholds, order, caps and clipping; the greedy
result is compared with :func:`odtrt_lib.nms.postprocess` on every image, anchor by anchor.

``parts``: the shipped detector on rendered scenes. ``coco_ssd_mnv1``: an SSD with trained weights on
photographs, from the corpus, the folder that ODTRT_CORPUS names; left out where that is absent.

kept: detections of the greedy rule in all images; lost: those of them that the other rule drops. found:
labelled objects that a detection of their class above the score threshold overlaps by at least 0.5, each
detection used once. map and ar100 are COCO's. ``crowded``: the images with at least CROWD labelled
objects of one class.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from claims import ground_truth

from odtrt_lib import evaluate, nms
from odtrt_lib.coco import load_coco
from odtrt_lib.convert import convert
from odtrt_lib.detector import Detections, Detector
from odtrt_lib.export import export
from odtrt_lib.preprocess import Frame, boxes_to_pixels, load_image, preprocess
from odtrt_lib.results import write_results
from odtrt_lib.scenes import TEST_SEEDS, render_scene

ROOT = Path(__file__).resolve().parents[1]
PARTS, TRAINED = "parts", "coco_ssd_mnv1"
SCENES = 100
THRESHOLDS = (0.3, 0.05, 1e-8)
IOU_THRESHOLDS = (0.6, 0.4)
FIRST_HEAD = 2048
CROWD = 8


@dataclasses.dataclass(frozen=True)
class Picture:
    """The raw heads of one image, decoded. boxes: [N, 4], not clipped; scores: [N, C], no background."""

    image_id: int
    frame: Frame
    encodings: np.ndarray
    logits: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def greedy(suppresses: np.ndarray) -> np.ndarray:
    """bool [n]: who stays. suppresses[j, i]: i is better than j, of its class, and overlaps it too much."""
    kept = np.zeros(len(suppresses), bool)
    for j, row in enumerate(suppresses):
        kept[j] = not (row & kept).any()
    return kept


def unless_any_better(suppresses: np.ndarray) -> np.ndarray:
    return ~suppresses.any(axis=1)


def detect(picture: Picture, detector: Detector, rule: Callable[[np.ndarray], np.ndarray]) -> nms.Selection:
    """The detections of one image by a rule, in all else as the OD API has it."""
    settings, (num_anchors, _) = detector.spec.nms, picture.scores.shape
    flat = picture.scores.T.ravel()  # class by class: the order of equal scores
    order = np.argsort(-flat, kind="stable")
    order = order[: int((flat > np.float32(settings.score_threshold)).sum())]
    window = np.array(picture.frame.clip_window, np.float32)
    head = FIRST_HEAD
    while True:
        pairs = order[:head]
        anchors, classes = pairs % num_anchors, pairs // num_anchors
        stays = np.zeros(len(pairs), bool)
        for label in np.unique(classes):
            members = np.flatnonzero(classes == label)
            marked = overlaps(picture.boxes[anchors[members]]) > np.float32(settings.iou_threshold)
            stays[members[rule(np.tril(marked, -1))][: settings.max_detections_per_class]] = True
        clipped = nms._clip(picture.boxes[anchors], window)
        kept = np.flatnonzero(stays & (nms._signed_area(clipped) > 0))
        if len(kept) >= settings.max_total_detections or len(pairs) == len(order):
            break
        head *= 4
    kept = kept[: settings.max_total_detections]
    found = nms._in_frame_of(window, clipped[kept]) if settings.change_coordinate_frame else clipped[kept]
    return nms.Selection(found, flat[pairs[kept]], classes[kept].astype(np.int32), anchors[kept])


def overlaps(boxes: np.ndarray) -> np.ndarray:
    """IoU of all pairs, float32 [n, n], in TensorFlow's order of operations."""
    corners, areas = nms._ordered_corners(boxes)
    return np.stack([nms._iou(corners[i], areas[i], corners, areas) for i in range(len(boxes))], axis=1)


def pictures(detector: Detector, images: Iterable[tuple[int, np.ndarray]]) -> Iterator[Picture]:
    spec = detector.spec
    for image_id, image in images:
        network_input, frame = preprocess(image, spec.input)
        encodings, logits = detector.backend.infer(network_input[np.newaxis])
        scores = nms.convert_scores(logits[0], spec.heads.scores)[:, int(spec.heads.background_column) :]
        boxes = nms.decode_boxes(encodings[0], detector.anchors, spec.heads.box_coder)
        yield Picture(image_id, frame, encodings, logits, boxes, scores)


def coco_rows(picture: Picture, detector: Detector, found: nms.Selection) -> list[dict[str, Any]]:
    labels = [detector.spec.labels[column] for column in found.classes]
    return evaluate.coco_results(
        picture.image_id,
        Detections(
            boxes_to_pixels(found.boxes, picture.frame, detector.spec.nms),
            found.scores,
            np.array([label.id for label in labels], np.int64),
            tuple(label.name for label in labels),
        ),
    )


def measure(
    name: str, detector: Detector, seen: list[Picture], truth: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    subsets = {"all": {picture.image_id for picture in seen}, "crowded": crowded(truth)}
    for iou_threshold in IOU_THRESHOLDS:
        for score_threshold in THRESHOLDS:
            settings = dataclasses.replace(
                detector.spec.nms, score_threshold=score_threshold, iou_threshold=iou_threshold
            )
            own = dataclasses.replace(detector, spec=dataclasses.replace(detector.spec, nms=settings))
            exact = {picture.image_id: detect(picture, own, greedy) for picture in seen}
            other = {picture.image_id: detect(picture, own, unless_any_better) for picture in seen}
            for picture in seen:
                require_same(picture, own, exact[picture.image_id])
            for images, members in subsets.items():
                shown = [picture for picture in seen if picture.image_id in members]
                if shown:
                    yield {
                        "model": name,
                        "images_of": images,
                        "iou_threshold": iou_threshold,
                        "score_threshold": score_threshold,
                        **compare(shown, own, exact, other, truth),
                    }


def compare(
    shown: list[Picture],
    detector: Detector,
    exact: dict[int, nms.Selection],
    other: dict[int, nms.Selection],
    truth: dict[str, Any],
) -> dict[str, Any]:
    ids = [picture.image_id for picture in shown]
    kept = [len(exact[i].scores) for i in ids]
    lost = [len(pairs_of(exact[i]) - pairs_of(other[i])) for i in ids]
    objects = {
        i: [a for a in truth["annotations"] if a["image_id"] == i and not a.get("iscrowd")] for i in ids
    }
    row = {
        "images": len(ids),
        "kept": sum(kept),
        "kept_by_rule": sum(len(other[i].scores) for i in ids),
        "lost": sum(lost),
        "lost_percent": round(100 * sum(lost) / max(1, sum(kept)), 2),
        "images_changed": sum(count > 0 for count in lost),
        "most_lost_in_an_image": max(lost),
        "objects": sum(map(len, objects.values())),
    }
    for rule, found in (("greedy", exact), ("rule", other)):
        results = {p.image_id: coco_rows(p, detector, found[p.image_id]) for p in shown}
        figures = evaluate.coco_metrics(truth, [one for rows in results.values() for one in rows], ids)
        row[f"found_{rule}"] = sum(objects_found(objects[i], results[i]) for i in ids)
        row[f"map_{rule}"] = round(figures.map, 4)
        row[f"ar100_{rule}"] = round(figures.ar100, 4)
    return row


def crowded(truth: dict[str, Any]) -> set[int]:
    labelled = Counter(
        (a["image_id"], a["category_id"]) for a in truth["annotations"] if not a.get("iscrowd")
    )
    return {image for (image, _), count in labelled.items() if count >= CROWD}


def objects_found(objects: list[dict[str, Any]], results: list[dict[str, Any]]) -> int:
    """How many objects a detection finds, best detection first, each taking the object that fits it best."""
    left = list(objects)
    for one in results:
        fits = [iou(one["bbox"], a["bbox"]) if a["category_id"] == one["category_id"] else 0 for a in left]
        if fits and max(fits) >= 0.5:
            left.pop(int(np.argmax(fits)))
    return len(objects) - len(left)


def iou(one: list[float], other: list[float]) -> float:
    """Of two boxes [x, y, width, height]."""
    sides = [
        max(0.0, min(one[k] + one[k + 2], other[k] + other[k + 2]) - max(one[k], other[k])) for k in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def require_same(picture: Picture, detector: Detector, found: nms.Selection) -> None:
    windows = np.array([picture.frame.clip_window], np.float32)
    expected = nms.postprocess(picture.encodings, picture.logits, detector.anchors, detector.spec, windows)
    count = expected.num_detections[0]
    assert np.array_equal(expected.anchors[0, :count], found.anchors), picture.image_id
    assert np.array_equal(expected.classes[0, :count], found.classes), picture.image_id


def pairs_of(found: nms.Selection) -> set[tuple[int, int]]:
    return set(zip(found.anchors.tolist(), found.classes.tolist(), strict=True))


def opened(source: Path) -> Detector:
    with tempfile.TemporaryDirectory() as folder:
        export(source, folder)
        convert(folder)
        return Detector.open(folder)


def main() -> None:
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    detector = opened(ROOT / "models" / PARTS)
    scenes = {seed: render_scene(seed) for seed in TEST_SEEDS[:SCENES]}
    seen = list(pictures(detector, ((seed, scene.image) for seed, scene in scenes.items())))
    rows = list(measure(PARTS, detector, seen, ground_truth(scenes)))
    if corpus.is_dir():
        detector = opened(corpus / TRAINED)
        coco = load_coco(
            corpus / "coco128" / "instances_val128.json", corpus / "coco128" / "images" / "val2017"
        )
        files = zip(coco.image_ids, coco.paths, strict=True)
        seen = list(pictures(detector, ((number, load_image(path)) for number, path in files)))
        rows += measure(TRAINED, detector, seen, json.loads(coco.annotations.read_text()))
    else:
        print(f"no corpus at {corpus}: no photographs")
    write_results(ROOT / "results" / "nms_rule.cpu.json", "nms_rule", "python benchmarks/nms_rule.py", rows)


if __name__ == "__main__":
    main()
