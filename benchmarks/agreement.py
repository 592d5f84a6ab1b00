"""Compares detections with the Object Detection API's own, image by image and box by box.

    python benchmarks/agreement.py         writes results/agreement.cpu.json

For every checkpoint of the corpus (the folder that ODTRT_CORPUS names): odtrt's detections by ONNX
Runtime, the OD API's by TensorFlow, from the same decoded pixels. A reference detection with a score of
at least 0.05 is matched by one of the same class with IoU >= 0.99 and a score within 1e-3.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from odtrt_lib import odapi
from odtrt_lib.convert import convert
from odtrt_lib.datasets import load_coco
from odtrt_lib.detector import Detector
from odtrt_lib.evaluate import agreement, coco_metrics, coco_results
from odtrt_lib.export import export, find_model
from odtrt_lib.preprocess import load_image
from odtrt_lib.results import write_results

ROOT = Path(__file__).resolve().parent.parent
IMAGES = {"coco_ssd_mnv1": 128}
FEW_IMAGES = 16


def main() -> None:
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    annotations = corpus / "coco128" / "instances_val128.json"
    coco = load_coco(annotations, corpus / "coco128" / "images" / "val2017")
    rows = []
    for source in sorted(path.parent for path in corpus.glob("*/pipeline.config")):
        count = IMAGES.get(source.name, FEW_IMAGES)
        images = dict(zip(coco.image_ids[:count], map(load_image, coco.paths[:count]), strict=True))
        with tempfile.TemporaryDirectory() as work:
            export(source, work)
            convert(work)
            detector = Detector.open(work)
        own = [row for i, image in images.items() for row in coco_results(i, detector.detect(image))]
        for exact_means in (False, True) if "efficientdet" in source.name else (False,):
            with odapi.exact_means() if exact_means else contextlib.nullcontext():
                files = find_model(source)
                model = odapi.load_model(files.pipeline, files.checkpoint)
                reference = [row for i, image in images.items() for row in odapi.detect(model, image, i)]
            rows.append(compare(source.name, exact_means, reference, own, detector, annotations, images))
            print(rows[-1])
    write_results(
        ROOT / "results" / "agreement.cpu.json", "agreement", "python benchmarks/agreement.py", rows
    )


def compare(name, exact_means, reference, own, detector, annotations, images) -> dict[str, object]:
    most = detector.spec.nms.max_total_detections
    found = agreement(reference, own, max_detections=most)
    loosely = agreement(reference, own, iou=0.5, max_detections=most)
    row: dict[str, object] = {
        "model": name,
        "reference": "OD API, spatial means in float64" if exact_means else "OD API",
        "images": found.images,
        "references": found.references,
        "matched": found.matched,
        "missing": len(found.missing),
        "extra": len(found.extra),
        "at_threshold_or_end_of_list": found.at_threshold,
        "matched_at_iou_half": loosely.matched,
        "max_score_difference": found.max_score_difference,
        "min_iou": found.min_iou,
    }
    if name == "coco_ssd_mnv1":
        row["map_odapi"] = round(coco_metrics(annotations, reference, images).map, 6)
        row["map_odtrt"] = round(coco_metrics(annotations, own, images).map, 6)
    return row


if __name__ == "__main__":
    main()
