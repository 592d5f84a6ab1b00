"""What benchmarks/peers_gpu.py needs from a workstation: models, pictures, and what the OD API finds in them.

    python benchmarks/peers.py FOLDER [NAME ...]

writes FOLDER/<name>/pictures.npz and FOLDER/<name>/odtrt, for the models of ``NAMES`` or those named, and the
same for FOLDER/<name>_at_0.3, with that score threshold. The corpus is the folder that ODTRT_CORPUS names.

NVIDIA's ONNX files are not made here, and nothing of its samples is in this repository. To make one, take
samples/python/efficientdet or tensorflow_object_detection_api of NVIDIA's TensorRT repository, branch
release/8.5, and follow its README: exporter_main_v2 of the OD API, then create_onnx.py; put the file into
FOLDER/<name>/nvidia.onnx. create_onnx.py has an option for the score threshold. What the steps took and
where they failed are rows of FOLDER/road.json, a list; a row has ``model``, ``way``, ``step``,
``environment``, ``cpu_seconds`` (user and system, of the step's process and all that it started),
``peak_rss_mb``, and ``error`` if it failed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from engine import MODELS, PARTS, RECORDED, prepare, sources
from peers_gpu import LEAST_THEIRS, Detected

from odtrt_lib.detector import Detector
from odtrt_lib.export import odapi
from odtrt_lib.export.stage import find_model
from odtrt_lib.folder import seal
from odtrt_lib.fuse import fuse
from odtrt_lib.preprocess import load_image, preprocess
from odtrt_lib.scenes import TEST_SEEDS, load_coco, render_scene
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
NAMES = (PARTS, "ssd_mobilenet_v2_fpnlite_320", "efficientdet_d0_512")
COUNT = 8
SIZE = (480, 640)
HIGHER = 0.3


def main(arguments: list[str]) -> None:
    """What the module says."""
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    for name in arguments[1:] or NAMES:
        prepare(corpus, [name])
        pictures = pictures_for(corpus, name)
        found = found_by_odapi(corpus, name, pictures)
        for threshold in (None, HIGHER):
            ending = "" if threshold is None else f"_at_{threshold}"
            folder = Path(arguments[0]) / f"{name}{ending}"
            write_model(MODELS / name, folder / "odtrt", threshold)
            least = threshold or 0.0
            np.savez_compressed(
                folder / "pictures.npz",
                pictures=pictures,
                detections=json.dumps([one for one in found if one["score"] >= least]),
                weights=RECORDED[name],
                candidates=count_candidates(folder / "odtrt", pictures[0], max(LEAST_THEIRS, least)),
            )
            print(f"{folder.name}: written", flush=True)


def pictures_for(corpus: Path, name: str) -> np.ndarray:
    """COUNT pictures of one size: scenes of parts for the repository's own detector, else COCO's."""
    if name == PARTS:
        return np.array([render_scene(seed, *SIZE).image for seed in TEST_SEEDS[:COUNT]])
    folder = corpus / "coco128"
    coco = load_coco(folder / "instances_val128.json", folder / "images" / "val2017")
    return np.array([one for one in map(load_image, coco.paths) if one.shape[:2] == SIZE][:COUNT])


def found_by_odapi(corpus: Path, name: str, pictures: np.ndarray) -> Detected:
    with tempfile.TemporaryDirectory() as work:
        files = find_model(*sources(corpus, name, Path(work)))
        odapi.prepare()
        model = odapi.load_model(files.pipeline, files.checkpoint)
        return [one for i, picture in enumerate(pictures) for one in odapi.detect(model, picture, i)]


def write_model(source: Path, folder: Path, threshold: float | None) -> None:
    """A model folder with detector.onnx, and that score threshold instead of its own."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("frozen.pb", "plans"), dirs_exist_ok=True)
    if threshold is not None:
        spec = load_spec(folder / "spec.json")
        nms = dataclasses.replace(spec.nms, score_threshold=threshold)
        (folder / "spec.json").write_text(dataclasses.replace(spec, nms=nms).to_json())
        seal(folder)
    fuse(folder)


def count_candidates(folder: Path, picture: np.ndarray, threshold: float) -> int:
    """How many scores, of all anchors and classes, are above the threshold. They are sigmoids."""
    with Detector.open(folder, "onnxruntime") as detector:
        network_input, _ = preprocess(picture, detector.spec.input)
        _, logits = detector.backend.infer(network_input[None])
        background = int(detector.spec.heads.background_column)
        return int((logits[..., background:] > np.log(threshold / (1 - threshold))).sum())


if __name__ == "__main__":
    main(sys.argv[1:])
