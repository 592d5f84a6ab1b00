"""Files for serving programs: a Triton model repository, nvinfer's configuration and parser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import (
    Iterator,
    Tuple,
    Union,
)

from odtrt_lib import IMPORT_PATH, __version__
from odtrt_lib.errors import (
    InputError,
    UnsupportedError,
    one_line,
)
from odtrt_lib.folder import (
    require,
)
from odtrt_lib.spec import DetectorSpec
from odtrt_lib.tensors import heads_tensors


def triton_config(spec: DetectorSpec, name: str, platform: str) -> str:
    """The ``config.pbtxt`` of one Triton model of ``heads.onnx``: a text-format ``inference.ModelConfig``.

    name: that of the model's folder. platform: ``onnxruntime_onnx`` or ``tensorrt_plan``. If the batch size
    is fixed, the batch is an ordinary dimension, and Triton does no batching.

    Both platforms return raw heads, so a client sees no difference and Triton needs no plugin.
    :func:`odtrt_lib.nms.postprocess` makes detections from them.
    """
    from odtrt_lib.engine import DYNAMIC_BATCH

    network, tensors = spec.input, heads_tensors(spec)
    lines = [
        f"# {comment(spec.name)}: written by odtrt {__version__} from spec.json.",
        f"# `{comment(network.name)}` is what odtrt_lib.preprocess.preprocess makes of an image;",
        "# the outputs are raw heads, and odtrt_lib.nms.postprocess makes detections of them.",
    ]
    if platform == "tensorrt_plan":
        lines.append("# build_here.py puts the plan at 1/model.plan; until then Triton refuses this model.")
    lines += [
        f'name: "{name}"',
        f'platform: "{platform}"',
        f"max_batch_size: {DYNAMIC_BATCH[-1] if network.batch is None else 0}",
    ]
    for kind, members in (("input", tensors.inputs), ("output", tensors.outputs)):
        for tensor in members:
            dims = ", ".join(str(size) for size in tensor.shape if size is not None)
            lines += [f"{kind} {{", f"  name: {_quoted(tensor.name)}"]
            lines += ["  data_type: TYPE_FP32", f"  dims: [ {dims} ]", "}"]
    return "\n".join(lines) + "\n"


def nvinfer_config(spec: DetectorSpec) -> str:
    """The configuration file of DeepStream's nvinfer for ``detector.onnx``.

    Raises UnsupportedError, naming the field of ``spec.json``, for what nvinfer cannot express. It normalises
    by ``net-scale-factor * (pixel - offset)``, with one factor for all channels. It pads the image before it
    normalises, and does not tell the network where the padding begins.
    """
    scale, offset = spec.input.scale, spec.input.offset
    if spec.input.resizer.kind != "fixed_shape":
        raise UnsupportedError(
            f"spec.json: input.resizer.kind is {spec.input.resizer.kind}, but nvinfer pads before it "
            "normalises and gives the network no clip_windows; expected fixed_shape: use odtrt's own Detector"
        )
    if len(set(scale)) != 1:
        raise UnsupportedError(
            f"spec.json: input.scale is {list(scale)}, but nvinfer has one net-scale-factor for all "
            "channels; use odtrt's own Detector"
        )
    means = ";".join(_number(-one / scale[0]) for one in offset)
    return f"""\
# {comment(spec.name)}: DeepStream nvinfer, written by odtrt {__version__} from spec.json.
#
# Not as in training: nvinfer resizes with NvBufSurfTransform, which samples at pixel centres; the OD API's
# output pixel i samples the input at i * in / out. Where images are shrunk, boxes shift by up to half a
# network pixel, and scores change: measure it with your own images, or preprocess with odtrt's kernels.
# Detections come out of the plugin in the network: nvinfer must not cluster them again (cluster-mode 4).
#
# The parser is compiled on the device, once, in this folder; it also loads odtrt's plugin into TensorRT:
#   g++ -std=c++17 -O2 -shared -fPIC nvdsinfer_odtrt.cpp -o libnvdsinfer_odtrt.so \\
#     -I/opt/nvidia/deepstream/deepstream/sources/includes -I/usr/local/cuda/include -ldl
# build_here.py puts the plan at detector.plan.

[property]
gpu-id=0
gie-unique-id=1
process-mode=1
onnx-file=../model/detector.onnx
model-engine-file=detector.plan
labelfile-path=labels.txt
batch-size={spec.input.batch or 1}
infer-dims=3;{spec.input.height};{spec.input.width}
network-type=0
network-mode=0
model-color-format=0
net-scale-factor={_number(scale[0])}
offsets={means}
maintain-aspect-ratio=0
symmetric-padding=0
num-detected-classes={spec.heads.num_classes}
cluster-mode=4
output-blob-names=num_detections;boxes;scores;classes
parse-bbox-func-name=NvDsInferParseOdtrt
custom-lib-path=libnvdsinfer_odtrt.so

[class-attrs-all]
pre-cluster-threshold={_number(spec.nms.score_threshold)}
"""


def triton_repository(folder: Path, spec: DetectorSpec) -> Iterator[Tuple[str, Union[Path, bytes]]]:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", spec.name).strip(".") or "detector"
    yield f"triton/{name}/config.pbtxt", triton_config(spec, name, "tensorrt_plan").encode()
    onnx_name = f"{name}_onnx"
    yield f"triton/{onnx_name}/config.pbtxt", triton_config(spec, onnx_name, "onnxruntime_onnx").encode()
    yield f"triton/{onnx_name}/1/model.onnx", folder / "heads.onnx"


def deepstream_files(folder: Path, spec: DetectorSpec) -> Iterator[Tuple[str, Union[Path, bytes]]]:
    configuration = nvinfer_config(spec)
    require(folder, "detector.onnx", "fuse")
    labels = [re.sub(r"[\s;]+", " ", label.name).strip() for label in spec.labels]
    yield "deepstream/nvinfer.txt", configuration.encode()
    yield "deepstream/labels.txt", ("\n".join(labels) + "\n").encode()
    parser = Path(IMPORT_PATH, "plugins") / "deepstream" / "nvdsinfer_odtrt.cpp"
    yield "deepstream/nvdsinfer_odtrt.cpp", require_source(parser)


def require_source(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: not found; a bundle carries odtrt's source: pack from a checkout of odtrt")
    return path


def comment(text: str) -> str:
    return one_line(text) if text.strip() else "a detector"


def _quoted(text: str) -> str:
    """The text as a quoted string of protobuf's text format."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\0": "\\000"}
    return '"' + "".join(escapes.get(letter, letter) for letter in text) + '"'


def _number(value: float) -> str:
    return repr(float(value) + 0.0)
