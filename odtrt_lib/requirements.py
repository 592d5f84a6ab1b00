"""Which part of odtrt needs which Python package, for ``odtrt doctor`` and ``build_here.py``."""

from __future__ import annotations

import dataclasses
import sys
from typing import Tuple

_INSTALL = "pip install -e '.[{}]'"


@dataclasses.dataclass(frozen=True)
class Package:
    """A Python package that a chapter needs.

    module: the module that must exist. statement: the test whether it works, if importing the module is not
    enough. distribution: pip's name for it, for its version. install: the command that installs it.
    """

    name: str
    module: str
    distribution: str
    install: str
    statement: str = ""


def _package(name: str, module: str, distribution: str, extra: str) -> Package:
    return Package(name, module, distribution, _INSTALL.format(extra))


PACKAGES = (
    Package("NumPy", "numpy", "numpy", "pip install -e ."),
    Package("Pillow", "PIL.Image", "pillow", "pip install -e ."),
    _package("TensorFlow", "tensorflow", "tensorflow", "convert"),
    Package(
        "OD API",
        "object_detection",
        "tf-models-research-object-detection",
        "make install",
        # Imports all that the OD API's models need, but repairs nothing: a check must not change anything.
        "from odtrt_lib.export import odapi; odapi.regenerate_protos = lambda: 0; odapi.prepare(); "
        "import object_detection.builders.model_builder",
    ),
    Package(
        "OD API protobuf modules",
        "object_detection.protos.pipeline_pb2",
        "tf-models-research-object-detection",
        f"{sys.executable} -m odtrt_lib.export.odapi",
    ),
    Package("onnx", "onnx", "onnx", "pip install onnx"),
    _package("tf2onnx", "tf2onnx", "tf2onnx", "convert"),
    _package("onnx-graphsurgeon", "onnx_graphsurgeon", "onnx-graphsurgeon", "convert"),
    Package("ONNX Runtime", "onnxruntime", "onnxruntime", "pip install onnxruntime"),
    Package("OpenCV", "cv2", "opencv-python-headless", "pip install opencv-python-headless"),
    Package("pycocotools", "pycocotools.mask", "pycocotools", "pip install pycocotools"),
    Package("TensorRT", "tensorrt", "tensorrt", "on a Jetson: sudo apt install nvidia-jetpack"),
    _package("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx-cu13", "engine"),
    _package("onnxconverter-common", "onnxconverter_common", "onnxconverter-common", "engine"),
)


BUILD, HALF_PRECISION, RUN_A_PLAN = "3 engine (build)", "3 engine (fp16)", "3 engine (run a plan)"
DETECT = "detect"


# Part of odtrt -> the packages that it needs. TensorRT is not in this table: chapter 3 needs one of the two
# runtime libraries.
NEEDS = {
    "1 export": ("NumPy", "TensorFlow", "OD API", "OD API protobuf modules"),
    "2 convert": ("NumPy", "TensorFlow", "onnx", "tf2onnx", "onnx-graphsurgeon", "ONNX Runtime"),
    BUILD: ("NumPy",),
    HALF_PRECISION: ("NumPy", "onnx", "onnxconverter-common"),
    RUN_A_PLAN: ("NumPy",),
    "4 fuse": ("NumPy", "onnx", "onnx-graphsurgeon"),
    DETECT: ("NumPy", "ONNX Runtime", "Pillow"),
    "eval": ("NumPy", "Pillow", "ONNX Runtime", "pycocotools"),
}


def modules(part: str) -> Tuple[str, ...]:
    """The Python modules that a part of odtrt, e.g. :data:`BUILD`, needs besides TensorRT's."""
    of = {package.name: package.module.split(".")[0] for package in PACKAGES}
    return tuple(of[name] for name in NEEDS[part])
