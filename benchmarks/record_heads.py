"""Records raw heads of real detectors on real images, for benchmarks on a machine without TensorFlow.

    python benchmarks/record_heads.py OUT [IMAGES]    writes OUT/<model>.npz for each model of the corpus

The corpus is the folder that ODTRT_CORPUS names. Each file holds ``box_encodings`` [images, N, 4] and
``class_logits`` [images, N, columns] (float32), ``anchors`` [N, 4], ``clip_windows`` [images, 4] and the
detector's ``spec``, as JSON text.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from odtrt_lib.convert import convert
from odtrt_lib.detector import Detector
from odtrt_lib.export import export
from odtrt_lib.preprocess import load_image, preprocess
from odtrt_lib.scenes import load_coco

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    coco = load_coco(corpus / "coco128" / "instances_val128.json", corpus / "coco128" / "images" / "val2017")
    images = [load_image(path) for path in coco.paths[:count]]
    for source in sorted(path.parent for path in corpus.glob("*/pipeline.config")):
        with tempfile.TemporaryDirectory() as work:
            export(source, work)
            convert(work)
            spec_text = (Path(work) / "spec.json").read_text()
            detector = Detector.open(work)
        inputs = [preprocess(image, detector.spec.input) for image in images]
        heads = [detector.backend.infer(network_input[None]) for network_input, _ in inputs]
        np.savez(
            folder / f"{source.name}.npz",
            box_encodings=np.concatenate([boxes for boxes, _ in heads]),
            class_logits=np.concatenate([logits for _, logits in heads]),
            anchors=detector.anchors,
            clip_windows=np.array([frame.clip_window for _, frame in inputs], np.float32),
            spec=spec_text,
        )
        print(f"{folder / source.name}.npz: {len(heads)} images, {heads[0][1].shape[1:]} logits")


if __name__ == "__main__":
    main()
