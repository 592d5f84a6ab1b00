"""Compares detections with the Object Detection API's own, image by image and box by box.

    python benchmarks/agreement.py         writes results/agreement.cpu.json

For every checkpoint of the corpus (the folder that ODTRT_CORPUS names): odtrt's detections by ONNX
Runtime, the OD API's by TensorFlow, from the same decoded pixels. A reference detection with a score of
at least 0.05 is matched by one of the same class with IoU >= 0.99 and a score within 1e-3.

EfficientDet takes means over up to 65,536 pixels in float32. For it three more comparisons tell rounding from
error: the OD API with itself, its means in float64; that with odtrt; and that with odtrt when it, too,
takes the means accurately.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from odtrt_lib.convert import convert
from odtrt_lib.convert.rewrite import means_in_two_steps
from odtrt_lib.detector import Detector
from odtrt_lib.evaluate import agreement, coco_metrics, coco_results
from odtrt_lib.export import export, find_model, odapi
from odtrt_lib.folder import seal
from odtrt_lib.preprocess import load_image
from odtrt_lib.results import write_results
from odtrt_lib.scenes import load_coco

ROOT = Path(__file__).resolve().parent.parent
IMAGES = {"coco_ssd_mnv1": 128}
FEW_IMAGES = 16
ODAPI, ODTRT, EXACT = "OD API", "odtrt", "{}, accurate means"
Images = dict[int, np.ndarray]
Results = list[dict[str, Any]]


def main() -> None:
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    annotations = corpus / "coco128" / "instances_val128.json"
    coco = load_coco(annotations, corpus / "coco128" / "images" / "val2017")
    rows = []
    for source in sorted(path.parent for path in corpus.glob("*/pipeline.config")):
        count = IMAGES.get(source.name, FEW_IMAGES)
        images = dict(zip(coco.image_ids[:count], map(load_image, coco.paths[:count]), strict=True))
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            export(source, folder)
            convert(folder)
            detector = Detector.open(folder, "onnxruntime")
            own = detections_of(detector, images)
            reference = odapi_detections(source, images)
            most = detector.spec.nms.max_total_detections
            row = compare(reference, own, most)
            if source.name == "coco_ssd_mnv1":
                row["map_odapi"] = round(coco_metrics(annotations, reference, images).map, 6)
                row["map_odtrt"] = round(coco_metrics(annotations, own, images).map, 6)
            rows.append({"model": source.name, "reference": ODAPI, "compared": ODTRT, **row})
            if "bifpn" in detector.spec.source.feature_extractor:  # EfficientDet's
                with odapi.exact_means():
                    exact = odapi_detections(source, images)
                heads = folder / "heads.onnx"
                onnx.save(means_in_two_steps(onnx.load(heads)), heads)
                seal(folder)
                own_exact = detections_of(Detector.open(folder, "onnxruntime"), images)
                for names, pair in {
                    (ODAPI, EXACT.format(ODAPI)): (reference, exact),
                    (EXACT.format(ODAPI), ODTRT): (exact, own),
                    (EXACT.format(ODAPI), EXACT.format(ODTRT)): (exact, own_exact),
                }.items():
                    one, other = names
                    rows.append(
                        {"model": source.name, "reference": one, "compared": other, **compare(*pair, most)}
                    )
        print(*rows, sep="\n")
    write_results(
        ROOT / "results" / "agreement.cpu.json", "agreement", "python benchmarks/agreement.py", rows
    )


def detections_of(detector: Detector, images: Images) -> Results:
    return [row for i, image in images.items() for row in coco_results(i, detector.detect(image))]


def odapi_detections(source: Path, images: Images) -> Results:
    files = find_model(source)
    model = odapi.load_model(files.pipeline, files.checkpoint)
    return [row for i, image in images.items() for row in odapi.detect(model, image, i)]


def compare(reference: Results, candidate: Results, most: int) -> dict[str, object]:
    found = agreement(reference, candidate, max_detections=most)
    return {
        "images": found.images,
        "references": found.references,
        "matched": found.matched,
        "missing": len(found.missing),
        "extra": len(found.extra),
        "at_threshold_or_end_of_list": found.at_threshold,
        "matched_at_iou_half": agreement(reference, candidate, iou=0.5, max_detections=most).matched,
        "max_score_difference": found.max_score_difference,
        "min_iou": found.min_iou,
    }


if __name__ == "__main__":
    main()
