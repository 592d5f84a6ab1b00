"""Compares a plan with ``reference.npz``, the heads and detections of ONNX Runtime; see record_heads.py."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from odtrt_lib.evaluate import agreement
from odtrt_lib.nms import Postprocessed
from odtrt_lib.spec import DetectorSpec

# Arithmetic: the plan's precision, and the IoU and the score tolerance that its detections are held to.
# TF32 rounds to 10 bits as FP16 does, but only the factors of a product.
ARITHMETIC = {"FP32": ("fp32", 0.99, 1e-3), "TF32": ("fp32", 0.95, 0.01), "FP16": ("fp16", 0.9, 0.05)}
LARGEST_RELATIVE_ERROR = {"FP32": 1e-3, "TF32": 2e-2, "FP16": 2e-2}
WHOLE_IMAGE = np.array([[0, 0, 1, 1]], np.float32)


def differences(heads: Sequence[np.ndarray], reference: Mapping[str, Any]) -> Dict[str, float]:
    """The largest differences from the recorded heads, as shares of the largest value there."""
    found = {}
    for name, array, key in zip(("boxes", "logits"), heads, ("box_encodings", "class_logits")):
        expected = reference[key].astype(np.float64)
        difference = np.abs(array[:, reference["anchors"]] - expected)
        worst = float(difference.max()) if np.isfinite(difference).all() else float("inf")
        found[f"{name}_relative_err"] = min(worst / float(np.abs(expected).max()), 1e9)
    return found


def same_detections(
    reference: Mapping[str, Any], found: Postprocessed, spec: DetectorSpec, arithmetic: str
) -> Tuple[bool, Dict[str, Any]]:
    """Whether the detections agree, and how many of ONNX Runtime's there are and were found."""
    _, iou, tolerance = ARITHMETIC[arithmetic]
    count = int(found.num_detections[0])
    compared = agreement(
        coco_form(reference["boxes"], reference["scores"], reference["classes"]),
        coco_form(found.boxes[0, :count], found.scores[0, :count], found.classes[0, :count]),
        score_threshold=spec.nms.score_threshold,
        iou=iou,
        score_tolerance=tolerance,
        max_detections=spec.nms.max_total_detections,
    )
    return compared.agrees, {
        "detections": compared.references,
        "matched": compared.matched,
        "at_threshold": compared.at_threshold,
        "missing": len(compared.missing),
        "extra": len(compared.extra),
        "max_score_difference": compared.max_score_difference,
    }


def coco_form(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> List[Dict[str, Any]]:
    """Detections of one image in COCO's results form, boxes in shares of it."""
    ymin, xmin, ymax, xmax = np.asarray(boxes, np.float64).T
    sides = np.stack([xmin, ymin, xmax - xmin, ymax - ymin], axis=1)
    return [
        {"image_id": 0, "category_id": int(column), "bbox": box.tolist(), "score": float(score)}
        for column, box, score in zip(classes, sides, scores)
    ]


def is_exact(one: Postprocessed, other: Postprocessed) -> bool:
    """Whether two post-processings gave the same bits."""
    fields = ("num_detections", "boxes", "scores", "classes", "anchors")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)
