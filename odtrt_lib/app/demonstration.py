"""The last step of ``odtrt run``: runs the detector on pictures and records what it found.

The pictures are the user's. For a model of the shipped parts they can be rendered scenes that it was not
trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from odtrt_lib import folder as folders
from odtrt_lib.detector import Detections, Detector
from odtrt_lib.errors import InputError
from odtrt_lib.evaluate import coco_results, iou_matrix
from odtrt_lib.plots import MIN_SCORE, confident
from odtrt_lib.spec import load_spec

if TYPE_CHECKING:
    from odtrt_lib.scenes import Scene

_SCENES = 4


@dataclasses.dataclass(frozen=True)
class Picture:
    """image: RGB, uint8 [height, width, 3]. sha256: that of its file, or of its pixels if it was rendered.

    truth: the objects in it, in COCO's results form, if they are known.
    """

    title: str
    image: np.ndarray
    sha256: str
    truth: Optional[List[Dict[str, Any]]]


def read_pictures(paths: Sequence[Path]) -> List[Picture]:
    """The pictures in these files. Raises InputError if one is missing or damaged."""
    from odtrt_lib.preprocess import load_image

    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: not found; expected a picture")
    return [Picture(path.name, load_image(path), folders.sha256(path), None) for path in paths]


def unseen_scenes(folder: Path, count: int = _SCENES) -> List[Picture]:
    """Scenes that the shipped detector was not trained on; none if the model has other classes."""
    from odtrt_lib.scenes import PARTS_CLASSES, TEST_SEEDS, render_scene

    if tuple(label.name for label in load_spec(folder / "spec.json").labels) != PARTS_CLASSES:
        return []
    scenes = []
    for seed in TEST_SEEDS[:count]:
        scene = render_scene(seed)
        digest = hashlib.sha256(scene.image.tobytes()).hexdigest()
        scenes.append(Picture(f"scene {seed}", scene.image, digest, truth_of(scene, seed)))
    return scenes


def truth_of(scene: Scene, image_id: int = 0) -> List[Dict[str, Any]]:
    """The objects in a rendered scene, in COCO's results form."""
    return [
        {
            "image_id": image_id,
            "category_id": int(class_id),
            "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
            "score": 1.0,
        }
        for class_id, (ymin, xmin, ymax, xmax) in zip(scene.class_ids, scene.boxes.tolist())
    ]


def keep(folder: Path, scenes: Sequence[Picture]) -> Path:
    """Writes scenes to ``folder/scenes/*.png`` without loss, and returns that folder."""
    from PIL import Image

    for scene in scenes:
        with folders.atomic_write(folder / "scenes" / f"{scene.title.replace(' ', '_')}.png") as temporary:
            Image.fromarray(scene.image).save(temporary, "PNG")
    return folder / "scenes"


def look_at(folder: Path, pictures: Sequence[Picture]) -> Tuple[folders.StageResult, List[Detections]]:
    """Runs the detector on the pictures; writes ``detections.json`` and the record ``detect``.

    Detections below :data:`MIN_SCORE` are left out.
    """
    from odtrt_lib.results import versions

    detector = Detector.open(folder)
    inputs = {
        **folders.check_seal(folder, "heads.onnx", "anchors.npy", "spec.json"),
        **{picture.title: picture.sha256 for picture in pictures},
    }
    settings = {"backend": detector.backend.name, "min_score": MIN_SCORE}
    stage = folders.Stage(folder, "detect", inputs, settings)
    detections = [confident(detector.detect(picture.image), MIN_SCORE) for picture in pictures]
    rows = [row for i, picture in enumerate(pictures) for row in as_rows(picture.title, detections[i])]
    checks: Dict[str, Any] = {"pictures": len(pictures), "detections": len(rows)}
    if all(picture.truth is not None for picture in pictures):
        checks.update(count_found([picture.truth or [] for picture in pictures], detections))
    with folders.staging(folder) as staged:
        (staged / "detections.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        record = stage.record(staged, ["detections.json"], versions("numpy", "onnxruntime"), checks)
    return folders.StageResult(record, False), detections


def count_found(truth: Sequence[List[Dict[str, Any]]], detections: Sequence[Detections]) -> Dict[str, int]:
    """How many objects were found: class name -> number, by the best detection of each object.

    In a picture, best score first, each detection of any class belongs to the object with which it has the
    largest IoU, if this is at least 0.5. The first detection of an object gives its class, as for somebody
    who looks at the picture.
    """
    right = wrong = nothing = 0
    for own, found in zip(truth, detections):
        boxes, seen = [row["bbox"] for row in own], coco_results(0, found)
        first: Dict[int, int] = {}
        for row in sorted(seen, key=lambda one: -one["score"]):
            overlaps = iou_matrix([row["bbox"]], boxes)[0] if boxes else np.zeros(0)
            if overlaps.size == 0 or overlaps.max() < 0.5:
                nothing += 1
            else:
                first.setdefault(int(overlaps.argmax()), row["category_id"])
        matches = [own[i]["category_id"] == category_id for i, category_id in first.items()]
        right, wrong = right + sum(matches), wrong + len(matches) - sum(matches)
    count = sum(map(len, truth))
    return {
        "objects_in_the_pictures": count,
        "objects_found": right,
        "objects_taken_for_another_class": wrong,
        "objects_missed": count - right - wrong,
        "detections_where_no_object_is": nothing,
    }


def as_rows(picture: str, detections: Detections) -> List[Dict[str, Any]]:
    """The detections of a picture for a JSON file; boxes are [ymin, xmin, ymax, xmax] in its pixels."""
    return [
        {
            "image": picture,
            "class_id": int(detections.class_ids[i]),
            "name": name,
            "score": round(float(detections.scores[i]), 6),
            "box": [round(float(side), 3) for side in detections.boxes[i]],
        }
        for i, name in enumerate(detections.names)
    ]
