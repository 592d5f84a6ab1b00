"""A model folder as after `odtrt convert`, with a network so small that TensorRT builds it in a second.

For benchmarks/faults.py and tests. Needs onnx.
"""

from __future__ import annotations

import numpy as np
import onnx
import spec_cases
from onnx import TensorProto, helper, numpy_helper

from odtrt_lib import spec
from odtrt_lib.folder import seal

SPEC = spec_cases.example(
    spec_cases.ssd(16 * 16, 2, True),
    spec.NmsSpec(0.5, 0.5, 10, 10, False, True),
    spec_cases.network_input(16, 16),
    name="tiny",
    labels=spec_cases.named("a", "b"),
)


def heads_model(
    batch=1, resize=None, nonzero=False, output_type=TensorProto.FLOAT, channels=256, size=16, bulk=0
):
    """Two convolutions and two heads over 16 x 16 anchors, as ONNX that TensorRT takes; or not."""
    random = np.random.default_rng(0)
    weights = {
        "stem": random.normal(size=(64, 3, 3, 3)),
        "middle": random.normal(size=(channels, 64, 3, 3)),
        "boxes": random.normal(size=(4, channels, 1, 1)),
        "classes": random.normal(size=(3, channels, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["image", "stem"], ["x0"], "stem_conv", pads=[1] * 4),
        helper.make_node("Relu", ["x0"], ["x1"], "stem_relu"),
        helper.make_node("Conv", ["x1", "middle"], ["x2"], "middle_conv", pads=[1] * 4),
    ]
    constants = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    features = "x2"
    for i in range(bulk):
        constants.append(numpy_helper.from_array(np.ones((1, channels, 16, 16), np.float32), f"bulk{i}"))
        nodes += [
            helper.make_node("Add", [features, f"bulk{i}"], [f"sum{i}"], f"add{i}"),
            helper.make_node("Sigmoid", [f"sum{i}"], [f"bulky{i}"], f"sigmoid{i}"),
        ]
        features = f"bulky{i}"
    if resize:
        constants.append(numpy_helper.from_array(np.array([1, 1, 1, 1], np.float32), "scales"))
        nodes.append(
            helper.make_node(
                "Resize", ["x2", "", "scales"], ["resized"], "bad_resize", mode="nearest", **resize
            )
        )
        features = "resized"
    if nonzero:
        nodes += [
            helper.make_node("NonZero", [features], ["where"], "find_nonzero"),
            helper.make_node("Cast", ["where"], ["where_float"], "cast", to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["where_float"], ["total"], "sum", keepdims=0),
            helper.make_node("Add", [features, "total"], ["shifted"], "add"),
        ]
        features = "shifted"
    outputs = []
    for head, output, columns in (("boxes", "box_encodings", 4), ("classes", "class_logits", 3)):
        constants.append(numpy_helper.from_array(np.array([0, -1, columns]), f"{head}_shape"))
        nodes += [
            helper.make_node("Conv", [features, head], [f"{head}_map"], f"{head}_conv"),
            helper.make_node("Transpose", [f"{head}_map"], [f"{head}_last"], f"{head}_t", perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [f"{head}_last", f"{head}_shape"], [f"{head}_flat"], f"{head}_r"),
        ]
        if output_type == TensorProto.FLOAT:
            nodes[-1].output[0] = output
        else:
            nodes.append(helper.make_node("Cast", [f"{head}_flat"], [output], f"{head}_cast", to=output_type))
        outputs.append(helper.make_tensor_value_info(output, output_type, [batch or "batch", 256, columns]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch or "batch", 3, 16, size])
    graph = helper.make_graph(nodes, "heads", [image], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def model_folder(path, detector=SPEC, **model):
    """Writes spec.json and heads.onnx, sealed, into the folder, and returns it; model: see heads_model."""
    path.mkdir(exist_ok=True)
    (path / "spec.json").write_text(detector.to_json())
    onnx.save(heads_model(**model), path / "heads.onnx")
    seal(path)
    return path
