"""Measures a parts detector's checkpoint on scenes that its training did not see.

    python benchmarks/parts.py                                   models/parts; writes results/parts.json
    python benchmarks/parts.py --model models/parts_d0           writes results/parts_d0.json
    python benchmarks/parts.py --split validation --scenes 60    a quick look while it trains; writes nothing

The Object Detection API's own model and post-processing make the detections, pycocotools scores them on
``TEST_SEEDS``. ``steps``, ``seconds`` and ``train_scenes`` are those of the model's training.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib.app.demonstration import truth_of
from odtrt_lib.evaluate import coco_metrics
from odtrt_lib.export import odapi
from odtrt_lib.results import write_results
from odtrt_lib.scenes import PARTS_CLASSES, TEST_SEEDS, VALIDATION_SEEDS, render_scene

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "models" / "parts"
SPLITS = {"test": TEST_SEEDS, "validation": VALIDATION_SEEDS}
SCENES = 500
# The row's keys, and the figures of CocoMetrics that they are.
FIGURES = {
    "map": "map",
    "ap50": "map50",
    "ap75": "map75",
    **{name: name for name in ("map_small", "map_medium", "map_large", "ar100")},
}


def measure(folder: Path, split: str, count: int) -> dict[str, Any]:
    """One row: how the folder's checkpoint scores on the first ``count`` scenes of a split."""
    tf = odapi.tensorflow()
    checkpoint = folder / "checkpoint"
    model = odapi.load_model(folder / "pipeline.config", checkpoint / "ckpt-0")

    @tf.function(input_signature=[tf.TensorSpec([1, 480, 640, 3], tf.float32)])
    def detect(image: Any) -> Any:
        inputs, shapes = model.preprocess(image)
        return model.postprocess(model.predict(inputs, shapes), shapes)

    seeds = SPLITS[split][:count]
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for seed in seeds:
        scene = render_scene(seed)
        truth += truth_of(scene, seed)
        found += in_coco_form(detect(tf.constant(scene.image[None], tf.float32)), scene.image, seed)
    instances = {
        "images": [{"id": seed, "height": 480, "width": 640} for seed in seeds],
        "categories": [{"id": i, "name": name} for i, name in enumerate(PARTS_CLASSES, 1)],
        "annotations": truth,
    }
    metrics = coco_metrics(instances, found)
    training = json.loads((folder / "training.json").read_text())
    per_class = {f"ap_{name}": metrics.ap_per_class[i] for i, name in enumerate(PARTS_CLASSES, 1)}
    figures = {key: getattr(metrics, name) for key, name in FIGURES.items()}
    return {
        "split": split,
        "first_seed": seeds[0],
        "images": len(seeds),
        "objects": len(truth),
        **{key: round(value, 4) for key, value in {**figures, **per_class}.items()},
        **{key: training[key] for key in ("steps", "seconds", "train_scenes")},
        "params": parameters(tf, checkpoint),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.iterdir()),
    }


def in_coco_form(detections: Any, image: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """What the OD API's post-processing found in one image, in COCO's results form."""
    height, width = image.shape[:2]
    boxes = detections["detection_boxes"][0].numpy() * [height, width, height, width]
    classes = detections["detection_classes"][0].numpy().astype(int) + 1
    scores = detections["detection_scores"][0].numpy()
    return [
        {
            "image_id": seed,
            "category_id": int(classes[number]),
            "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
            "score": float(scores[number]),
        }
        for number, (ymin, xmin, ymax, xmax) in enumerate(boxes.tolist())
        if number < int(detections["num_detections"][0])
    ]


def parameters(tf: Any, checkpoint: Path) -> int:
    """The number of weights in the checkpoint."""
    shapes = dict(tf.train.list_variables(str(checkpoint / "ckpt-0")))
    return sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith("model/"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=PARTS)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--scenes", type=int, default=SCENES, help="scenes to measure on")
    arguments = parser.parse_args()
    row = measure(arguments.model, arguments.split, arguments.scenes)
    print(json.dumps(row, indent=2))
    if (arguments.split, arguments.scenes) == ("test", SCENES):
        name = arguments.model.resolve().name
        command = "python benchmarks/parts.py" + ("" if name == PARTS.name else f" --model models/{name}")
        write_results(ROOT / "results" / f"{name}.json", "parts", command, [row])


if __name__ == "__main__":
    main()
