"""Shows what the gates of chapters 1 and 2 see: rounding, and defects seeded on purpose.

    python benchmarks/noise.py              writes results/noise.cpu.json
    python benchmarks/noise.py MODEL ...    only the rows of these models; the others stay

EfficientDet-D0 and D1 from the corpus (the folder that ODTRT_CORPUS names), and a D4 with random weights made
from D0's config. Each is exported and converted as it is, then both gates are run on graphs with one
defect: a kernel x 1.001 (the first, the middle and the last convolution over feature maps, and the middle
one of squeeze-and-excitation, which may touch the outputs less than rounding does), two channels of a kernel
swapped, every Resize with the wrong rule. What was made is kept in out/noise and used again.

The corpus's values are synthetic, and so are the weights of EfficientDet's fusion: many are zero, and then it
does not matter what a Resize computes. Where running the network shows nothing, the Resize audit does.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from odtrt_lib.convert import stage as chapter2
from odtrt_lib.convert.resizes import audit_resizes, require_agreement
from odtrt_lib.errors import CheckError
from odtrt_lib.export import noise, odapi
from odtrt_lib.export import stage as chapter1
from odtrt_lib.results import write_results
from odtrt_lib.spec import DetectorSpec, load_spec

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "out" / "noise"
D4 = "efficientdet_d4_random"
MODELS = ("zoo_efficientdet_d0", "ft_effd1_carparts18", D4)
Row = dict[str, object]


def main() -> None:
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    noise.measure = remember(noise.measure)
    path = ROOT / "results" / "noise.cpu.json"
    names = sys.argv[1:] or MODELS
    rows: list[Row] = []
    if path.is_file():
        rows = [row for row in json.loads(path.read_text())["rows"] if row["model"] not in names]
    for name in names:
        source = (
            corpus / name if name != D4 else random_d4(corpus / "zoo_efficientdet_d0" / "pipeline.config")
        )
        for row in measure(source, WORK / name):
            rows.append({"model": name, **row})
            print(rows[-1], flush=True)
        rows.sort(key=lambda row: MODELS.index(str(row["model"])))
        write_results(path, "noise", "python benchmarks/noise.py", rows)


def remember(function: Callable[..., Any]) -> Callable[..., Any]:
    """The truth about the same graph and pictures is computed once; defects in heads.onnx leave it alone."""
    last: dict[object, Any] = {}

    def remembered(graph: Any, pictures: np.ndarray, batch: int | None) -> Any:
        key = hash(graph.SerializeToString(deterministic=True)), pictures.tobytes()
        if key not in last:
            last.clear()
            last[key] = function(graph, pictures, batch)
        return last[key]

    return remembered


def random_d4(config: Path) -> Path:
    source = WORK / f"{D4}_source"
    if not (source / "checkpoint" / "ckpt-0.index").is_file():
        source.mkdir(parents=True, exist_ok=True)
        text = config.read_text()
        text = text.replace("efficientnet-b0", "efficientnet-b4")
        for setting, value in {
            "_dimension": 1024,
            "num_iterations": 7,
            "num_filters": 224,
            "[^_]depth": 224,
            "num_layers_before_predictor": 4,
        }.items():
            text = re.sub(rf"({setting}): \d+", rf"\1: {value}", text)
        (source / "pipeline.config").write_text(text)
        odapi.write_random_checkpoint(source / "pipeline.config", source / "checkpoint")
    return source


def measure(source: Path, folder: Path) -> Iterator[Row]:
    checks = chapter1.export(source, folder).record["checks"]
    yield {
        "gate": "export",
        "defect": "none",
        "times_noise": checks["frozen_vs_eager_times_noise"],
        "sees_kernel_change": checks["frozen_vs_eager_sees_kernel_change"],
        "verdict": "passed" if checks["frozen_vs_eager_is_decisive"] else "not decisive",
    }
    chapter2.convert(folder)
    spec, frozen = load_spec(folder / "spec.json"), chapter2.load_frozen(folder / "frozen.pb")
    broken = folder / "broken.onnx"
    for defect, break_it in ONNX_DEFECTS.items():
        model = onnx.load(folder / "heads.onnx")
        break_it(model)
        broken.write_bytes(model.SerializeToString())
        if defect in ("none", "Resize half_pixel"):
            yield {"gate": "Resize audit", "defect": defect, "verdict": audit(frozen, model)}
        yield {"gate": "convert", "defect": defect, **parity_row(frozen, broken, spec)}
    broken.unlink()
    yield from eager_rows(source, frozen, spec)


def audit(frozen: Any, model: Any) -> str:
    return verdict(lambda: require_agreement(Path("heads.onnx"), audit_resizes(frozen, model)), True)


def parity_row(frozen: Any, path: Path, spec: DetectorSpec) -> Row:
    parity = chapter2._compare(frozen, path, spec, images=4)
    worst = max((parity.box_encodings, parity.class_logits), key=lambda head: head.times_noise)
    return {
        "max_err_in_std": worst.max_relative_err,
        "rms_err_in_std": worst.rms_relative_err,
        "noise_max_in_std": worst.noise_max_relative,
        "noise_rms_in_std": worst.noise_rms_relative,
        "times_noise": worst.times_noise,
        "sees_kernel_change": parity.sees_kernel_change,
        "verdict": verdict(lambda: chapter2._require_parity(path, parity), parity.is_decisive),
    }


def eager_rows(source: Path, frozen: Any, spec: DetectorSpec) -> Iterator[Row]:
    import tensorflow as tf

    files = chapter1.find_model(source)
    model = odapi.load_model(files.pipeline, files.checkpoint)
    images = chapter1._probe_images(
        (spec.input.height, spec.input.width), spec.input.scale, spec.input.offset
    )[:1]
    predictions = [model.predict(tf.constant(images), None)]
    eager = {
        "box_encodings": predictions[0]["box_encodings"].numpy(),
        "class_logits": predictions[0]["class_predictions_with_background"].numpy(),
    }
    for defect, break_it in FROZEN_DEFECTS.items():
        graph = tf.compat.v1.GraphDef()
        graph.CopyFrom(frozen)
        kernels = [
            node.attr["value"].tensor
            for node in graph.node
            if node.op == "Const"
            and len(node.attr["value"].tensor.tensor_shape.dim) == 4
            and "/se_" not in node.name
        ]
        kernel = kernels[len(kernels) // 2]
        kernel.CopyFrom(tf.make_tensor_proto(break_it(tf.make_ndarray(kernel))))
        yardstick = noise.measure(graph, images, spec.input.batch)
        worst = max(noise.compare(yardstick, eager).values(), key=lambda distance: distance.times_noise)
        yield {
            "gate": "export",
            "defect": defect,
            "max_err_in_std": worst.max_relative,
            "rms_err_in_std": worst.rms_relative,
            "noise_max_in_std": worst.noise_max_relative,
            "noise_rms_in_std": worst.noise_rms_relative,
            "times_noise": worst.times_noise,
            "sees_kernel_change": yardstick.sees_kernel_change,
            "verdict": verdict(
                lambda graph=graph: chapter1._compare_with_eager(
                    graph, images, predictions, spec.input.batch
                ),
                yardstick.is_decisive,
            ),
        }


def verdict(gate: Callable[[], object], is_decisive: bool) -> str:
    try:
        gate()
    except CheckError:
        return "refused"
    return "passed" if is_decisive else "not decisive"


def scaled(kernel: np.ndarray) -> np.ndarray:
    return kernel * np.float32(1.001)


def swapped(kernel: np.ndarray) -> np.ndarray:
    """The first two output channels (of a depthwise kernel, input channels) exchanged, in HWIO layout."""
    axis = 3 if kernel.shape[3] > 1 else 2
    order = [1, 0, *range(2, kernel.shape[axis])]
    return np.ascontiguousarray(np.take(kernel, order, axis=axis))


def edit_kernel(
    part: float, edit: Callable[[np.ndarray], np.ndarray], of_excitation: bool = False
) -> Callable[[Any], None]:
    """Changes the kernel of the convolution that comes after ``part`` of all convolutions of its sort."""

    def apply(model: Any) -> None:
        names = list(
            dict.fromkeys(
                node.input[1]
                for node in model.graph.node
                if node.op_type == "Conv" and ("/se_" in node.name) is of_excitation
            )
        )
        wanted = names[min(int(part * len(names)), len(names) - 1)]
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == wanted)
        values = np.ascontiguousarray(edit(onnx.numpy_helper.to_array(tensor)), np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    return apply


def wrong_resizes(model: Any) -> None:
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Resize" else ():
            if attribute.name == "coordinate_transformation_mode":
                attribute.s = b"half_pixel"


ONNX_DEFECTS: dict[str, Callable[[Any], None]] = {
    "none": lambda model: None,
    "Resize half_pixel": wrong_resizes,
    "two channels swapped": edit_kernel(0.5, lambda kernel: kernel[[1, 0, *range(2, len(kernel))]]),
    "kernel x 1.001, first": edit_kernel(0, scaled),
    "kernel x 1.001, middle": edit_kernel(0.5, scaled),
    "kernel x 1.001, last": edit_kernel(1, scaled),
    "kernel x 1.001, squeeze-and-excitation": edit_kernel(0.5, scaled, of_excitation=True),
}
FROZEN_DEFECTS = {"kernel x 1.001, middle": scaled, "two channels swapped": swapped}


if __name__ == "__main__":
    main()
