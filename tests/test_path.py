"""The whole path through the real command line: a stranger's first minutes, and what leaves the machine.

Each process runs where no network can be reached and the home folder is empty, see ``no_network.c``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Offline

from odtrt_lib.detector import Detector
from odtrt_lib.evaluate import agreement, coco_metrics, coco_results, load_detections
from odtrt_lib.folder import read_log
from odtrt_lib.scenes import TEST_SEEDS, render_scene
from odtrt_lib.spec import load_spec

SOURCES = ("benchmarks", "scripts", "odtrt_lib")
CORPUS_MODELS = (
    "coco_ssd_mnv1",
    "ft_fpnlite320_tfjs1",
    "zoo_efficientdet_d0",
    "zoo_ssd_mobilenet_v2_fpnlite_320",
)


EVERY_COMMAND = """
import contextlib, importlib, io, json, pkgutil, sys, threading
from pathlib import Path

import odtrt_lib
from odtrt_lib.app import cli, doctor

def import_here(statement):
    "In this process, one after the other; doctor makes a process for each."
    with one_at_a_time:
        exec(statement, {})
    return ""

commands, status, one_at_a_time = json.loads(sys.argv[1]), {}, threading.Lock()
doctor._problem = import_here
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            cli.main(command)
        except SystemExit as end:
            status[command[0]] = end.code or 0
for module in pkgutil.iter_modules(odtrt_lib.__path__):
    importlib.import_module(f"odtrt_lib.{module.name}")
print(json.dumps(status))
"""


@pytest.fixture(scope="module")
def odtrt(offline):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "odtrt_lib", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=offline.environment)

    return run


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


def test_a_second_run_has_nothing_to_convert(parts, parts_folder, odtrt, tmp_path):
    folder = shutil.copytree(parts_folder, tmp_path / "parts")
    done = odtrt("run", parts, "--output", folder)
    assert done.returncode == 0
    for stage in ("export", "convert", "engine"):
        assert f"{stage}: up to date" in done.stdout


def test_boxes_and_map_are_those_of_the_odapi(parts_folder, parts_answers):
    """On unseen scenes, with the ground truth as pycocotools sees it."""
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
    reference = json.loads((parts_answers / "detections.json").read_text())
    assert {row["image_id"] for row in reference} == set(scenes)
    own = [row for seed, scene in scenes.items() for row in coco_results(seed, detector.detect(scene.image))]
    compared = agreement(reference, own, max_detections=detector.spec.nms.max_total_detections)
    assert compared.agrees, compared
    expected, found = coco_metrics(truth, reference).map, coco_metrics(truth, own).map
    assert found > 0.5
    assert found == pytest.approx(expected, abs=1e-3)


def test_bad_input_is_one_line(tmp_path, odtrt):
    done = odtrt("run", tmp_path / "nothing", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "not found" in done.stderr
    assert not (tmp_path / "out").exists()


def coco_of_one_scene(folder: Path, names: dict[int, str]) -> Path:
    """A picture, and an instances file beside it."""
    from PIL import Image

    scene = render_scene(TEST_SEEDS[0])
    folder.mkdir()
    Image.fromarray(scene.image).save(folder / "scene.png")
    content = {
        "images": [{"id": 1, "file_name": "scene.png", "height": 480, "width": 640}],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": int(scene.class_ids[i - 1]),
                "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
                "area": (xmax - xmin) * (ymax - ymin),
                "iscrowd": 0,
            }
            for i, (ymin, xmin, ymax, xmax) in enumerate(scene.boxes.tolist(), 1)
        ],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def test_no_command_and_no_module_reaches_the_network(parts, parts_folder, offline, tmp_path):
    """`odtrt run` did its work in `run_folder`; here are the others. Only `zoo get` may try the network."""
    from tiny_model import model_folder

    from odtrt_lib.app import cli

    model, bundle = str(shutil.copytree(parts_folder, tmp_path / "parts")), str(tmp_path / "a.odtrt.zip")
    trained = str(tmp_path / "trained")
    labels = load_spec(parts_folder / "spec.json").labels
    annotations = coco_of_one_scene(tmp_path / "coco", {label.id: label.name for label in labels})
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        shutil.copy(tmp_path / "coco" / "scene.png", tmp_path / "pictures" / f"{number}.png")
    commands = [
        ["export", str(parts), "-o", model],
        ["convert", model],
        ["fuse", model],
        ["quantise", model, "--images", str(tmp_path / "pictures")],
        ["sensitivity", str(model_folder(tmp_path / "tiny")), "--images", str(tmp_path / "pictures")],
        ["qat", str(parts), model, "--images", str(tmp_path / "pictures"), "-o", trained, "--steps", "1"],
        ["build", model],
        ["plans", model],
        ["pack", model, "-o", bundle],
        ["unpack", bundle, "-o", str(tmp_path / "unpacked")],
        ["detect", model, str(tmp_path / "coco" / "scene.png")],
        ["eval", model, "--annotations", str(annotations)],
        ["profile", model, "--frames", "2"],
        ["doctor"],
        ["zoo", "list"],
        ["soak", model, str(tmp_path / "pictures"), "--minutes", "0.02"],
    ]
    known = {one.name or one.callback.__name__ for one in cli.app.registered_commands}
    assert {command[0] for command in commands} | {"run"} == known | {"zoo"}
    assert {one.name for one in cli.zoo_app.registered_commands} == {"list", "get"}
    command = [sys.executable, "-c", EVERY_COMMAND, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=offline.environment, check=False)
    assert done.returncode == 0, done.stderr
    undecided = {"soak": 1}  # as a run of a second must be
    expected = {command[0]: undecided.get(command[0], 0) for command in commands}
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert offline.network == []
    assert not [path for path in offline.home if "onnxruntime" in path]


def test_what_reaches_for_the_network_is_seen(no_network, tmp_path):
    seen = Offline(no_network, tmp_path)
    name = "efficientdet_d0_coco17_tpu-32"
    command = [sys.executable, "-m", "odtrt_lib", "zoo", "get", name, "-o", str(tmp_path / "zoo")]
    done = subprocess.run(command, capture_output=True, text=True, env=seen.environment, check=False)
    assert done.returncode == 1 and "cannot be downloaded" in done.stderr
    assert seen.network == ["getaddrinfo download.tensorflow.org"]


def test_telemetry_that_is_switched_on_is_seen(no_network, tmp_path):
    """ONNX Runtime writes its device id at once, and looks for its server some seconds later."""
    pytest.importorskip("onnxruntime", minversion="1.31")
    for choice, is_on in (({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)):
        seen = Offline(no_network, tmp_path / str(is_on))
        environment = {**seen.environment, **choice}
        subprocess.run([sys.executable, "-c", "import odtrt_lib, onnxruntime"], env=environment, check=True)
        assert any("onnxruntime" in path for path in seen.home) == is_on


def test_odtrt_is_imported_before_onnx_runtime():
    """Else telemetry is on already when odtrt turns it off. Tests import conftest.py first."""
    sources = {path: path.read_text() for place in SOURCES for path in (ROOT / place).rglob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        sources[path] = "\n".join("".join(cell["source"]) for cell in cells)
    users = 0
    for path, text in sources.items():
        first = re.search(r"^\s*(?:import|from) onnxruntime", text, re.MULTILINE)
        if first and path.parent.name != "odtrt_lib":
            users += 1
            before = re.search(r"^\s*(?:import|from) odtrt_lib", text[: first.start()], re.MULTILINE)
            assert before, f"{path}: imports onnxruntime before odtrt_lib"
    assert users >= 3


@pytest.mark.corpus
@pytest.mark.parametrize("name", CORPUS_MODELS)
def test_a_strangers_checkpoint_goes_all_the_way(corpus, corpus_folder, name, tmp_path, odtrt):
    folder = shutil.copytree(corpus_folder(name), tmp_path / "out")
    done = odtrt("build", folder, "--precision", "fp16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((folder / "plans").glob("*.plan"))) == 2
    assert (folder / "report.html").is_file()
    if name == "coco_ssd_mnv1":
        assert_coco_map_is_tensorflows(odtrt, corpus, folder)


def assert_coco_map_is_tensorflows(odtrt, corpus: Path, folder: Path) -> None:
    """Within a tenth of a point of the detections that the OD API itself made on the same images."""
    annotations = corpus / "coco128" / "instances_val128.json"
    figures = folder / "metrics.json"
    images = corpus / "coco128" / "images" / "val2017"
    done = odtrt("eval", folder, "--annotations", annotations, "--images", images, "--json", figures)
    assert done.returncode == 0, done.stderr
    reference = load_detections(corpus / "coco_ssd_mnv1" / "ref_detections_odapi.json")
    expected = coco_metrics(annotations, reference).map
    assert json.loads(figures.read_text())["map"] == pytest.approx(expected, abs=1e-3)
