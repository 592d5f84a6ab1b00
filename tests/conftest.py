"""Fixtures that several rooms share: the corpus, and a tiny detector made with the OD API itself."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional

import numpy as np
import pytest

from odtrt_lib import native
from odtrt_lib.machine import Machine

ROOT = Path(__file__).resolve().parent.parent

TINY_CONFIG = """
model { ssd {
  num_classes: 3
  image_resizer { fixed_shape_resizer { height: 96 width: 128 } }
  feature_extractor {
    type: "ssd_mobilenet_v2_fpn_keras" depth_multiplier: 0.35 min_depth: 8 use_depthwise: true
    conv_hyperparams {
      regularizer { l2_regularizer { weight: 0.00004 } }
      initializer { random_normal_initializer { stddev: 0.05 } }
      activation: RELU_6
      batch_norm { decay: 0.97 scale: true epsilon: 0.001 }
    }
    override_base_feature_extractor_hyperparams: true
    fpn { min_level: 3 max_level: 6 additional_layer_depth: 16 }
  }
  box_coder { faster_rcnn_box_coder { y_scale: 10 x_scale: 10 height_scale: 5 width_scale: 5 } }
  matcher { argmax_matcher { matched_threshold: 0.5 unmatched_threshold: 0.5 } }
  similarity_calculator { iou_similarity { } }
  box_predictor { weight_shared_convolutional_box_predictor {
    depth: 16 num_layers_before_predictor: 1 kernel_size: 3 use_depthwise: true
    class_prediction_bias_init: -2
    conv_hyperparams {
      regularizer { l2_regularizer { weight: 0.00004 } }
      initializer { random_normal_initializer { stddev: 0.2 } }
      activation: RELU_6
      batch_norm { decay: 0.97 scale: true epsilon: 0.001 }
    }
  } }
  anchor_generator { multiscale_anchor_generator {
    min_level: 3 max_level: 6 anchor_scale: 4 aspect_ratios: 1 aspect_ratios: 2 aspect_ratios: 0.5
    scales_per_octave: 2
  } }
  post_processing {
    batch_non_max_suppression {
      score_threshold: 0.01 iou_threshold: 0.6 max_detections_per_class: 20 max_total_detections: 40
    }
    score_converter: SIGMOID
  }
  loss {
    localization_loss { weighted_smooth_l1 { } }
    classification_loss { weighted_sigmoid_focal { gamma: 2 alpha: 0.25 } }
    classification_weight: 1 localization_weight: 1
  }
  encode_background_as_zeros: true
} }
train_config { batch_size: 1 optimizer { adam_optimizer { } } }
train_input_reader { label_map_path: "label_map.pbtxt" tf_record_input_reader { input_path: "none" } }
eval_config { }
eval_input_reader { label_map_path: "label_map.pbtxt" tf_record_input_reader { input_path: "none" } }
"""


def pytest_configure() -> None:
    """A shell starts its background jobs with SIGINT ignored, and what tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> MadeOnce:
    """``made_once(name, make)``: a folder that ``make(folder)`` filled, once for all workers of this run.

    Whoever asks first makes it, the others wait; after an error the next one tries again. Do not write into
    it; copy it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made_once"
    shared.mkdir(exist_ok=True)

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, is_made = shared / name, shared / f"{name}.is_made"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                is_made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of checkpoints and images that strangers made; skips where it is absent."""
    folder = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    if not folder.is_dir():
        pytest.skip(f"no corpus at {folder}; set ODTRT_CORPUS to run this test")
    return folder


@pytest.fixture(scope="session")
def compiler() -> str:
    """A C++ compiler; skips where there is none."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler (c++, g++ or clang++) on this machine")
    return found


# ONNX Runtime sends nothing if one of these is set, whatever its own switch says.
CI_VARIABLES = [
    "CI",
    "TF_BUILD",
    "GITHUB_ACTIONS",
    "GITLAB_CI",
    "CIRCLECI",
    "TRAVIS",
    "JENKINS_URL",
    "CODEBUILD_BUILD_ID",
    "BUILDKITE",
    "TEAMCITY_VERSION",
    "APPVEYOR",
    "BITBUCKET_BUILD_NUMBER",
]


def pretend_machine(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Lets all of odtrt take this machine for another."""
    for name in (
        "app.doctor",
        "bundle.install",
        "detector",
        "engine.runtime",
        "engine.stage",
        "portability.policy",
    ):
        module = importlib.import_module(f"odtrt_lib.{name}")
        monkeypatch.setattr(module, "this_machine", lambda: machine)


class Offline:
    """Processes with ``environment`` reach no network and have a home folder of their own.

    network: what they tried, e.g. ``getaddrinfo example.org``. home: the files that they left there.
    """

    def __init__(self, library: Path, folder: Path) -> None:
        self._attempts, self._home = folder / "attempts", folder / "home"
        self._home.mkdir(parents=True)
        self.environment: Dict[str, str] = {
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("ORT_DISABLE_TELEMETRY", *CI_VARIABLES) and not name.startswith("XDG_")
            },
            "LD_PRELOAD": str(library),
            "ODTRT_ATTEMPTS": str(self._attempts),
            "HOME": str(self._home),
            "PYTHONPATH": str(ROOT),
        }

    @property
    def network(self) -> List[str]:
        return self._attempts.read_text().splitlines() if self._attempts.exists() else []

    @property
    def home(self) -> List[str]:
        return sorted(str(path.relative_to(self._home)) for path in self._home.rglob("*"))


@pytest.fixture(scope="session")
def no_network(compiler, made_once) -> Path:
    """The library that keeps a process from the network, see its source."""
    source = ROOT / "tests" / "no_network.c"

    def compile_it(folder: Path) -> None:
        library = folder / "no_network.so"
        command = [compiler, "-x", "c", "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"]
        subprocess.run(command, check=True)

    return made_once("no_network", compile_it) / "no_network.so"


@pytest.fixture(scope="module")
def offline(no_network, tmp_path_factory) -> Offline:
    return Offline(no_network, tmp_path_factory.mktemp("offline"))


@pytest.fixture
def interrupted_starts(monkeypatch) -> List[subprocess.Popen]:
    """Ctrl-C falls into every start of a process: it runs, and its starter has no handle of it yet."""
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    return started


@pytest.fixture(scope="session")
def native_library(compiler) -> native.Library:
    """The native library, which `make test` builds first."""
    library = native.load()
    if library is None:
        pytest.fail("the native library is not built: run `make plugin`")
    return library


@pytest.fixture(scope="session")
def parts() -> Path:
    """The shipped detector."""
    return ROOT / "models" / "parts"


@pytest.fixture(scope="session")
def run_folder(made_once, no_network) -> Callable[[Path], Path]:
    """``run_folder(source, *options)``: the folder that ``odtrt run`` left; do not write into it, copy it.

    It ran where no network can be reached. A run that fails or tries the network fails every test that asks
    for its folder.
    """
    pytest.importorskip("tensorflow")

    def folder_of(source: Path, *options: object) -> Path:
        def run(folder: Path) -> None:
            offline = Offline(no_network, folder)
            command = [sys.executable, "-m", "odtrt_lib", "run", source, "--output", folder / source.name]
            done = subprocess.run(
                [*map(str, command), *map(str, options)],
                capture_output=True, text=True, check=False, env=offline.environment,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Traceback" not in done.stderr
            assert offline.network == []
            assert not [path for path in offline.home if "onnxruntime" in path]

        return made_once(f"run_{source.name}", run) / source.name

    return folder_of


@pytest.fixture(scope="session")
def parts_folder(parts, run_folder) -> Path:
    """The folder that ``odtrt run`` left of the shipped detector. Do not write into it; copy it."""
    return run_folder(parts)


@pytest.fixture(scope="session")
def corpus_folder(corpus, run_folder) -> Callable[[str], Path]:
    """Name of a checkpoint in the corpus -> its folder after ``odtrt run``. Do not write into it; copy it."""
    image = sorted((corpus / "coco128" / "images" / "val2017").glob("*.jpg"))[0]
    return lambda name: run_folder(corpus / name, "--image", image)


@pytest.fixture(scope="session")
def photographs(corpus) -> Callable[..., Dict[int, np.ndarray]]:
    """``photographs(count)``: image id -> RGB pixels of the validation images, read by Pillow."""
    from PIL import Image

    def read(count: Optional[int] = None) -> Dict[int, np.ndarray]:
        entries = json.loads((corpus / "coco128" / "instances_val128.json").read_text())["images"][:count]
        files = {path.name: path for path in (corpus / "coco128").rglob("*.jpg")}
        return {e["id"]: np.asarray(Image.open(files[e["file_name"]]).convert("RGB")) for e in entries}

    return read


@pytest.fixture(scope="session")
def corpus_answers(corpus, photographs, made_once) -> Callable[[str], Path]:
    """Name of a checkpoint in the corpus -> the OD API's answers to 8 photographs, see odapi_answers.py."""
    from odapi_answers import write_answers

    def folder_of(name: str) -> Path:
        def make(folder: Path) -> None:
            write_answers(folder, corpus / name, photographs(8), exact_means="efficientdet" in name)

        return made_once(f"answers_{name}", make)

    return folder_of


@pytest.fixture(scope="session")
def parts_answers(parts, made_once) -> Path:
    """The OD API's answers of the shipped detector to 24 unseen scenes, ids their seeds."""
    from odapi_answers import write_answers

    from odtrt_lib.scenes import TEST_SEEDS, render_scene

    images = {seed: render_scene(seed).image for seed in TEST_SEEDS[:24]}
    return made_once("answers_parts", lambda folder: write_answers(folder, parts, images))


@pytest.fixture(scope="session")
def tiny_model(made_once) -> Path:
    """An exported model's folder (pipeline.config, label map, checkpoint/ckpt-0), 3 classes, 96x128."""

    def make(folder: Path) -> None:
        from odtrt_lib.export.odapi import write_random_checkpoint

        (folder / "pipeline.config").write_text(TINY_CONFIG)
        (folder / "label_map.pbtxt").write_text(
            "".join(f'item {{ id: {i} name: "{n}" }}\n' for i, n in enumerate(("bolt", "nut", "gear"), 1))
        )
        write_random_checkpoint(folder / "pipeline.config", folder / "checkpoint")

    return made_once("tiny_model", make)


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, made_once) -> Path:
    """A model folder after stage 1, made from the tiny model. Do not write into it; copy it."""

    def make(folder: Path) -> None:
        from odtrt_lib.export import export

        export(tiny_model, folder / "tiny")

    return made_once("tiny_folder", make) / "tiny"


@pytest.fixture(scope="session")
def tiny_converted(tiny_folder, made_once) -> Path:
    """The tiny model's folder after stages 1 and 2. Do not write into it; copy it."""
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")

    def make(folder: Path) -> None:
        from odtrt_lib.convert import convert

        convert(shutil.copytree(tiny_folder, folder / "tiny"))

    return made_once("tiny_converted", make) / "tiny"


@pytest.fixture(scope="session")
def tiny_with_any_batch(tiny_model, made_once) -> Path:
    """As tiny_converted, for batches of any size. Do not write into it; copy it."""
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")

    def make(folder: Path) -> None:
        from odtrt_lib.convert import convert
        from odtrt_lib.export import export

        export(tiny_model, folder / "any_batch", batch=None)
        convert(folder / "any_batch")

    return made_once("tiny_with_any_batch", make) / "any_batch"


@pytest.fixture(scope="session")
def odapi_modules():
    """Imports a module of the OD API, an oracle: ``odapi_modules("utils.label_map_util")``."""
    from odtrt_lib.export import odapi

    odapi.prepare()
    return lambda name: importlib.import_module(f"object_detection.{name}")
