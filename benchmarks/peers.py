"""What benchmarks/peers_gpu.py needs from a workstation: pictures, and what the OD API itself finds in them.

    python benchmarks/peers.py FOLDER [NAME ...]

writes FOLDER/<name>/pictures.npz and FOLDER/<name>/odtrt, for the models of ``NAMES`` or those named. The
corpus is the folder that ODTRT_CORPUS names. NVIDIA's ONNX file is not made here, and nothing of its samples
is in this repository. To make it, take samples/python/efficientdet or tensorflow_object_detection_api of
NVIDIA's TensorRT repository, branch release/8.5, and follow its README: exporter_main_v2 of the OD API, then
create_onnx.py; put the file into FOLDER/<name>/nvidia.onnx. What the steps took and where they failed are
rows of FOLDER/road.json, a list; a row has ``model``, ``way``, ``step``, ``environment``, ``cpu_seconds``
(user and system, of the step's process and all that it started), ``peak_rss_mb``, and ``error`` if it failed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from engine import MODELS, PARTS, RECORDED, prepare, sources

from odtrt_lib.export import odapi
from odtrt_lib.export.stage import find_model
from odtrt_lib.fuse import fuse
from odtrt_lib.preprocess import load_image
from odtrt_lib.scenes import TEST_SEEDS, load_coco, render_scene

ROOT = Path(__file__).resolve().parents[1]
NAMES = (PARTS, "ssd_mobilenet_v2_fpnlite_320", "efficientdet_d0_512")
COUNT = 8
SIZE = (480, 640)


def main(arguments: list[str]) -> None:
    """What the module says."""
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    for name in arguments[1:] or NAMES:
        folder = Path(arguments[0]) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_pictures(corpus, name, folder / "pictures.npz")
        if not (folder / "odtrt").exists():
            prepare(corpus, [name])
            left_out = shutil.ignore_patterns("frozen.pb", "plans")
            shutil.copytree(MODELS / name, folder / "odtrt", ignore=left_out)
            fuse(folder / "odtrt")
        print(f"{name}: written", flush=True)


def write_pictures(corpus: Path, name: str, file: Path) -> None:
    """COUNT pictures of one size: scenes of parts for the repository's own detector, else COCO's."""
    if name == PARTS:
        pictures = [render_scene(seed, *SIZE).image for seed in TEST_SEEDS[:COUNT]]
    else:
        coco = load_coco(
            corpus / "coco128" / "instances_val128.json", corpus / "coco128" / "images" / "val2017"
        )
        read = (load_image(path) for path in coco.paths)
        pictures = [one for one in read if one.shape[:2] == SIZE][:COUNT]
    with tempfile.TemporaryDirectory() as work:
        source, pipeline = sources(corpus, name, Path(work))
        files = find_model(source, pipeline)
        odapi.prepare()
        model = odapi.load_model(files.pipeline, files.checkpoint)
        found = [one for i, picture in enumerate(pictures) for one in odapi.detect(model, picture, i)]
    np.savez_compressed(
        file, pictures=np.array(pictures), detections=json.dumps(found), weights=RECORDED[name]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
