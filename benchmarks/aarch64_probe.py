"""What one machine computes for some pictures, for benchmarks/aarch64.py, which compares two machines.

    python aarch64_probe.py MODEL PICTURES HEADS OUTPUT

MODEL is a model folder, PICTURES a folder of PNG files. HEADS is a file of raw heads, which is written if
it is absent: so the first machine's heads are those that the second one post-processes too. OUTPUT gets, for
each picture: the network's input, the heads by ONNX Runtime, the post-processed HEADS by libodtrt.so and by
numpy, and the detections.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from odtrt_lib import native
from odtrt_lib.detector import Detector
from odtrt_lib.nms import postprocess_reference
from odtrt_lib.preprocess import load_image, preprocess

RESULTS = ("num_detections", "boxes", "scores", "classes", "anchors")


def main() -> None:
    model, pictures, recorded, output = map(Path, sys.argv[1:])
    library = native.load()
    if library is None:
        raise SystemExit("error: libodtrt.so is not there, so there is nothing to compare")
    paths = sorted(pictures.glob("*.png"))
    with Detector.open(model, "onnxruntime") as detector:
        images = [load_image(path) for path in paths]
        inputs = [preprocess(image, detector.spec.input) for image in images]
        heads = [detector.backend.infer(network_input[None]) for network_input, _ in inputs]
        found = [detector.detect(image) for image in images]
        spec, anchors = detector.spec, detector.anchors
    own = {
        "box_encodings": np.concatenate([boxes for boxes, _ in heads]),
        "class_logits": np.concatenate([logits for _, logits in heads]),
        "clip_windows": np.array([frame.clip_window for _, frame in inputs], np.float32),
    }
    if not recorded.exists():
        np.savez(recorded, **own)
    shared = dict(np.load(recorded))
    arguments = (shared["box_encodings"], shared["class_logits"], anchors, spec, shared["clip_windows"])
    by_library = native.postprocess_cpu(library, *arguments)
    by_numpy = postprocess_reference(*arguments)
    np.savez(
        output,
        images=np.stack(images),
        inputs=np.stack([network_input for network_input, _ in inputs]),
        **own,
        **{f"library_{name}": array for name, array in zip(RESULTS, by_library, strict=True)},
        **{f"numpy_{name}": getattr(by_numpy, name) for name in RESULTS},
        counts=np.array([len(one.scores) for one in found]),
        found_boxes=np.concatenate([one.boxes for one in found]),
        found_scores=np.concatenate([one.scores for one in found]),
        found_classes=np.concatenate([one.class_ids for one in found]),
    )


if __name__ == "__main__":
    main()
