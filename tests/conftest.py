"""Fixtures that several rooms share: the corpus, and a tiny detector made with the OD API itself."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Dict, List

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
def no_network(compiler, tmp_path_factory) -> Path:
    """The library that keeps a process from the network, see its source."""
    library = tmp_path_factory.mktemp("no_network") / "no_network.so"
    source = ROOT / "tests" / "no_network.c"
    subprocess.run(
        [compiler, "-x", "c", "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True
    )
    return library


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
def tiny_model(tmp_path_factory) -> Path:
    """An exported model's folder (pipeline.config, label map, checkpoint/ckpt-0), 3 classes, 96x128."""
    folder = tmp_path_factory.mktemp("tiny_model")
    (folder / "pipeline.config").write_text(TINY_CONFIG)
    (folder / "label_map.pbtxt").write_text(
        "".join(f'item {{ id: {i} name: "{n}" }}\n' for i, n in enumerate(("bolt", "nut", "gear"), 1))
    )
    from odtrt_lib.export.odapi import write_random_checkpoint

    write_random_checkpoint(folder / "pipeline.config", folder / "checkpoint")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory) -> Path:
    """A model folder after stage 1, made from the tiny model. Do not write into it; copy it."""
    from odtrt_lib.export import export

    folder = tmp_path_factory.mktemp("tiny_folder") / "tiny"
    export(tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def odapi_modules():
    """Imports a module of the OD API, an oracle: ``odapi_modules("utils.label_map_util")``."""
    from odtrt_lib.export import odapi

    odapi.prepare()
    return lambda name: importlib.import_module(f"object_detection.{name}")
