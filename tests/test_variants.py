"""A new precision is one row: files, seal, passport and judgement follow from it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402
from tiny_model import model_folder  # noqa: E402

from odtrt_lib.variants import FORMS, PRECISIONS, Variant, form_of, models  # noqa: E402

BUILD_INT8 = """
import json, sys
from odtrt_lib import engine
from odtrt_lib.engine import passport
from odtrt_lib.errors import OdtrtError
from odtrt_lib.folder import seal
folder = sys.argv[1]
seal(folder)
said = []
for precision in ("fp32", "int8"):
    try:
        engine.build(folder, precision=precision)
    except OdtrtError as error:
        said.append(str(error))
found = [[one.model, one.precision] for one in passport.passports(folder)]
print(json.dumps({"found": sorted(found), "said": said}))
"""


def test_the_files_of_all_variants():
    assert Variant("fp16", "plugin").file == "detector.onnx"
    assert Variant("fp32", "heads").layers == () and "fp16" in Variant("fp16", "heads").layers
    assert {form_of(name) for name in models()} == set(FORMS)
    assert form_of("another.onnx") is None
    assert list(PRECISIONS) == ["fp32", "fp16", "int8"]
    assert Variant("int8", "plugin").file == "detector_int8.onnx" and form_of("heads_int8.onnx") == "heads"
    assert Variant("int8", "heads").command == "quantise"


def quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with QuantizeLinear and DequantizeLinear before its convolutions and products."""
    graph = model.graph
    zero = numpy_helper.from_array(np.zeros((), np.int8), "zero")
    scale = numpy_helper.from_array(np.array(0.02, np.float32), "scale")
    graph.initializer.extend([zero, scale])
    nodes = []
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            for i in range(2):
                name = f"{node.name or node.output[0]}/{i}"
                nodes.append(
                    helper.make_node("QuantizeLinear", [node.input[i], "scale", "zero"], [f"{name}/q"])
                )
                nodes.append(
                    helper.make_node("DequantizeLinear", [f"{name}/q", "scale", "zero"], [f"{name}/dq"])
                )
                node.input[i] = f"{name}/dq"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="no TensorRT-RTX: run `pip install -e '.[engine]'`",
)
@pytest.mark.parametrize("is_quantised", [True, False])
def test_a_precision_with_a_model_of_its_own(tmp_path, is_quantised):
    """The int8 model is the one that is built, and judged by its layers; with NVIDIA's builder."""
    folder = model_folder(tmp_path / "tiny")
    if is_quantised:
        onnx.save(quantised(onnx.load(folder / "heads.onnx")), folder / "heads_int8.onnx")
    else:
        shutil.copy(folder / "heads.onnx", folder / "heads_int8.onnx")
    done = subprocess.run(
        [sys.executable, "-c", BUILD_INT8, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    if is_quantised:
        assert answer == {
            "found": [["heads.onnx", "fp32"], ["heads_int8.onnx", "int8"]],
            "said": [],
        }
    else:
        assert answer["found"] == [["heads.onnx", "fp32"]]
        assert "int8 was asked for" in answer["said"][0] and "are not in int8" in answer["said"][0]
