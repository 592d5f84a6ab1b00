"""The OD API's own answers to some pictures, kept in a folder: an oracle that several files of tests read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib.export import find_model, odapi


class Recorder:
    """The OD API's model; keeps what each step of :func:`odapi.detect` returned last."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.steps: dict[str, Any] = {}

    def preprocess(self, image: Any) -> Any:
        inputs, shapes = self.model.preprocess(image)
        self.steps["clip_windows"] = self.model._compute_clip_window(inputs, shapes)
        return inputs, shapes

    def predict(self, inputs: Any, shapes: Any) -> Any:
        predicted = self.model.predict(inputs, shapes)
        self.steps["box_encodings"] = predicted["box_encodings"]
        self.steps["class_logits"] = predicted["class_predictions_with_background"]
        return predicted

    def postprocess(self, predicted: Any, shapes: Any) -> Any:
        found = self.model.postprocess(predicted, shapes)
        self.steps.update(found)
        return found


def write_answers(
    folder: Path, source: Path, images: Mapping[int, np.ndarray], *, exact_means: bool = False
) -> None:
    """Fills ``folder`` with the answers of the model that ``source`` holds.

    tensors.npz: the raw heads and all that ``postprocess`` returned, one row an image; the model's anchors,
    as corners. detections.json: the same detections as rows of COCO's results.
    detections_with_exact_means.json: once more with the means computed in float64, where asked for.

    images: id -> uint8 ``[height, width, 3]``, RGB.
    """
    files = find_model(source)
    model = odapi.load_model(files.pipeline, files.checkpoint)
    recorder, rows, steps = Recorder(model), [], []
    for image_id, image in images.items():
        rows += odapi.detect(recorder, image, image_id)
        steps.append({name: tensor.numpy() for name, tensor in recorder.steps.items()})
    tensors = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
    tensors["box_encodings"] = tensors["box_encodings"].reshape(len(images), -1, 4)
    np.savez(folder / "tensors.npz", anchors=model.anchors.get().numpy(), **tensors)
    (folder / "detections.json").write_text(json.dumps(rows))
    if exact_means:
        with odapi.exact_means():
            rows = [row for image_id, image in images.items() for row in odapi.detect(model, image, image_id)]
        (folder / "detections_with_exact_means.json").write_text(json.dumps(rows))
