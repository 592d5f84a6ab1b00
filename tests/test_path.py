"""The whole path through the real command line: a stranger's first minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from odtrt_lib.datasets import TEST_SEEDS, render_scene
from odtrt_lib.detector import Detector
from odtrt_lib.evaluate import agreement, coco_metrics, coco_results, load_detections
from odtrt_lib.export import find_model
from odtrt_lib.folder import read_log

CORPUS_MODELS = (
    "coco_ssd_mnv1",
    "ft_fpnlite320_tfjs1",
    "zoo_efficientdet_d0",
    "zoo_ssd_mobilenet_v2_fpnlite_320",
)


def odtrt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "odtrt_lib.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def parts_folder(parts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("path") / "parts"
    done = odtrt("run", parts, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return folder


def test_run_leaves_boxes_and_a_report(parts_folder):
    page = (parts_folder / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    found = json.loads((parts_folder / "detections.json").read_text())
    assert len(found) > 10
    assert {row["name"] for row in found} <= {"bolt", "nut", "washer", "gear", "spring", "bearing"}


def test_every_stage_left_its_proof(parts_folder):
    records = {record["stage"]: record for record in read_log(parts_folder)}
    assert list(records) == ["export", "convert", "engine", "detect"]
    assert records["export"]["checks"]["anchors_from_config_max_abs_err"] < 1e-6
    assert records["convert"]["checks"]["resizes_agree"]
    assert records["convert"]["checks"]["transposes"] <= 2
    assert records["engine"]["checks"]["inputs_and_outputs_match_spec"]
    assert (parts_folder / "plans").is_dir()
    assert not list(parts_folder.glob(".*"))


def test_a_second_run_has_nothing_to_convert(parts, parts_folder):
    done = odtrt("run", parts, "--output", parts_folder)
    assert done.returncode == 0
    for stage in ("export", "convert", "engine"):
        assert f"{stage}: up to date" in done.stdout


def test_boxes_and_map_are_those_of_the_odapi(parts, parts_folder):
    """On unseen scenes, with the ground truth as pycocotools sees it."""
    from odtrt_lib import odapi

    detector = Detector.open(parts_folder)
    scenes = {seed: render_scene(seed) for seed in TEST_SEEDS[:24]}
    truth = {
        "images": [{"id": seed, "height": 480, "width": 640} for seed in scenes],
        "categories": [{"id": label.id, "name": label.name} for label in detector.spec.labels],
        "annotations": [
            {
                "id": 1000 * seed + i,
                "image_id": seed,
                "category_id": int(scene.class_ids[i]),
                "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
                "area": (xmax - xmin) * (ymax - ymin),
                "iscrowd": 0,
            }
            for seed, scene in scenes.items()
            for i, (ymin, xmin, ymax, xmax) in enumerate(scene.boxes.tolist())
        ],
    }
    files = find_model(parts)
    model = odapi.load_model(files.pipeline, files.checkpoint)
    reference = [row for seed, scene in scenes.items() for row in odapi.detect(model, scene.image, seed)]
    own = [row for seed, scene in scenes.items() for row in coco_results(seed, detector.detect(scene.image))]
    compared = agreement(reference, own, max_detections=detector.spec.nms.max_total_detections)
    assert compared.agrees, compared
    expected, found = coco_metrics(truth, reference).map, coco_metrics(truth, own).map
    assert found > 0.5
    assert found == pytest.approx(expected, abs=1e-3)


def test_bad_input_is_one_line(tmp_path):
    done = odtrt("run", tmp_path / "nothing", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "not found" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.corpus
@pytest.mark.parametrize("name", CORPUS_MODELS)
def test_a_strangers_checkpoint_goes_all_the_way(corpus, name, tmp_path):
    image = sorted((corpus / "coco128" / "images" / "val2017").glob("*.jpg"))[0]
    done = odtrt("run", corpus / name, "--output", tmp_path / "out", "--image", image)
    assert done.returncode == 0, done.stdout + done.stderr
    done = odtrt("build", tmp_path / "out", "--precision", "fp16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "out" / "plans").glob("*.plan"))) == 2
    assert (tmp_path / "out" / "report.html").is_file()
    if name == "coco_ssd_mnv1":
        assert_coco_map_is_tensorflows(corpus, tmp_path / "out")


def assert_coco_map_is_tensorflows(corpus: Path, folder: Path) -> None:
    """Within a tenth of a point of the detections that the OD API itself made on the same images."""
    annotations = corpus / "coco128" / "instances_val128.json"
    figures = folder / "metrics.json"
    images = corpus / "coco128" / "images" / "val2017"
    done = odtrt("eval", folder, "--annotations", annotations, "--images", images, "--json", figures)
    assert done.returncode == 0, done.stderr
    reference = load_detections(corpus / "coco_ssd_mnv1" / "ref_detections_odapi.json")
    expected = coco_metrics(annotations, reference).map
    assert json.loads(figures.read_text())["map"] == pytest.approx(expected, abs=1e-3)
