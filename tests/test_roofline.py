"""The counts against loops that count one by one, the bounds against what others have measured on boards."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import roofline as benchmark
from conftest import ROOT

from odtrt_lib import boards
from odtrt_lib.errors import CheckError, InputError
from odtrt_lib.latency import roofline
from odtrt_lib.latency.roofline import Group, bound

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

NANO = boards.gpu("Nano")


def model_of(nodes, image, outputs, weights, opset=17, path=None):
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def floats(*shape):
    return np.ones(shape, np.float32)


CONVOLUTIONS = {
    "dense 3x3": {"kernel": (8, 4, 3, 3), "group": 1, "pads": [1, 1, 1, 1], "strides": [1, 1]},
    "stride 2": {"kernel": (8, 4, 3, 3), "group": 1, "pads": [0, 0, 1, 1], "strides": [2, 2]},
    "depthwise": {"kernel": (4, 1, 5, 3), "group": 4, "pads": [2, 1, 2, 1], "strides": [1, 1]},
    "pointwise": {"kernel": (6, 4, 1, 1), "group": 1, "pads": [0, 0, 0, 0], "strides": [1, 1]},
    "dilated": {
        "kernel": (2, 4, 3, 3),
        "group": 1,
        "pads": [2, 2, 2, 2],
        "strides": [1, 1],
        "dilations": [2, 2],
    },
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_counted_multiplication_by_multiplication(name, tmp_path):
    how = dict(CONVOLUTIONS[name])
    kernel = how.pop("kernel")
    node = helper.make_node("Conv", ["image", "w", "b"], ["y"], "conv", **how)
    path = model_of(
        [node], [1, 4, 7, 9], ["y"], {"w": floats(*kernel), "b": floats(kernel[0])}, path=tmp_path / "m"
    )
    (group,) = roofline.read_groups(path)
    dilation = how.get("dilations", [1, 1])
    sizes = [
        (size + how["pads"][i] + how["pads"][i + 2] - (kernel[2 + i] - 1) * dilation[i] - 1)
        // how["strides"][i]
        + 1
        for i, size in enumerate((7, 9))
    ]
    products = useful = 0
    for _, y, x in itertools.product(range(kernel[0]), *map(range, sizes)):
        for _, i, j in itertools.product(*map(range, kernel[1:])):
            products += 1
            row = y * how["strides"][0] - how["pads"][0] + i * dilation[0]
            column = x * how["strides"][1] - how["pads"][1] + j * dilation[1]
            useful += 0 <= row < 7 and 0 <= column < 9
    outputs = kernel[0] * sizes[0] * sizes[1]
    assert (group.macs, group.operations) == (products, 2 * products + outputs)
    cheaper = roofline.WINOGRAD if name == "dense 3x3" else 1
    assert group.fewest_operations == 2 * useful / cheaper + outputs
    assert group.weights == np.prod(kernel) + kernel[0]
    assert (group.inputs, group.outputs) == (4 * 7 * 9, outputs)
    assert (group.reads, group.writes) == ((), ())


def test_automatic_padding_is_the_padding_that_it_becomes(tmp_path):
    counts = []
    for how in ({"auto_pad": "SAME_UPPER"}, {"pads": [0, 0, 1, 1]}):
        node = helper.make_node("Conv", ["image", "w"], ["y"], "c", strides=[2, 2], **how)
        path = model_of([node], [1, 3, 8, 8], ["y"], {"w": floats(5, 3, 3, 3)}, path=tmp_path / "m")
        counts.append(roofline.read_groups(path)[0].fewest_operations)
    assert counts[0] == counts[1] == 2 * 5 * 3 * (3 * 4 - 1) ** 2


def test_what_follows_a_convolution_is_fused_and_what_is_moved_is_free(tmp_path):
    """image -> conv a -> relu -> +, which reads conv b of a: two kernels, and a's result is read by both."""
    nodes = [
        helper.make_node("Conv", ["image", "wa"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["ra"], "relu"),
        helper.make_node("Conv", ["ra", "wb"], ["b"], "b"),
        helper.make_node("Add", ["ra", "b"], ["sum"], "add"),
        helper.make_node("Transpose", ["sum"], ["t"], "t", perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["t", "shape"], ["flat"], "r"),
        helper.make_node("Concat", ["flat", "flat"], ["y"], "c", axis=1),
    ]
    weights = {"wa": floats(4, 3, 1, 1), "wb": floats(4, 4, 1, 1), "shape": np.array([1, -1], np.int64)}
    first, second = roofline.read_groups(
        model_of(nodes, ["batch", 3, 5, 6], ["y"], weights, path=tmp_path / "m")
    )
    assert first == Group(
        "a", "1x1 convolution", 3 * 120, 2 * 3 * 120 + 120, 2 * 3 * 120 + 120, 12, (), (120,), 90, 0
    )
    assert second == Group("b", "1x1 convolution", 480, 960 + 120, 960 + 120, 16, (120,), (), 0, 120)
    assert first.ideal_bytes("fp16") == 2 * (12 + 120 + 90)
    assert first.bytes("fp16", None) == 2 * (12 + 90)
    assert first.bytes("fp16", 1) == 2 * (12 + 90), "240 bytes stay in a cache of 1 KiB"
    large = dataclasses.replace(first, writes=(600,))
    assert large.bytes("fp32", 1) - large.bytes("fp32", 3) == 4 * 600


def test_matrix_products_and_pools(tmp_path):
    nodes = [
        helper.make_node("MaxPool", ["image"], ["p"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "w", "b"], ["g"], "g", transB=1),
        helper.make_node("Sigmoid", ["g"], ["y"], "s"),
    ]
    path = model_of(nodes, [1, 2, 4, 4], ["y"], {"w": floats(5, 8), "b": floats(5)}, path=tmp_path / "m")
    pool, product = roofline.read_groups(path)
    assert (pool.operations, pool.macs, pool.writes) == (8 * 4, 0, (8,))
    assert (product.macs, product.operations, product.reads) == (40, 80 + 5 + 5, (8,))
    assert product.weights == 45 and product.outputs == 5


def test_a_node_of_another_domain_is_a_group_without_operations(tmp_path):
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], "a"),
        helper.make_node("OdtrtDetect", ["a"], ["y"], "detect", domain="odtrt"),
    ]
    graph = helper.make_graph(
        nodes,
        "fused",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 7])],
        [numpy_helper.from_array(floats(2, 3, 1, 1), "w")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("odtrt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    (tmp_path / "m").write_bytes(model.SerializeToString())
    _, detect = roofline.read_groups(tmp_path / "m")
    assert (detect.operations, detect.reads, detect.outputs) == (0, (32,), 7)


def test_bad_models_are_refused_in_one_line(tmp_path):
    (tmp_path / "m").write_bytes(b"\xff\xff no model")
    with pytest.raises(InputError, match="not an ONNX model"):
        roofline.read_groups(tmp_path / "m")
    nodes = [
        helper.make_node("Other", ["image"], ["a"], "o", domain="other"),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    path = model_of(nodes, [1, 3, 4, 4], ["y"], {}, path=tmp_path / "m")
    with pytest.raises(InputError, match="No opset import for domain other"):
        roofline.read_groups(path)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("other", 1))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckError, match=r"shape of `[ay]` cannot be told"):
        roofline.read_groups(path)


def test_a_bound_is_the_slower_of_arithmetic_and_memory():
    """By hand: a Nano does 471.8 GFLOP a second in half precision, and moves 25.6 GB."""
    assert NANO.peak("fp16") == pytest.approx(471.86e9, rel=1e-4) and NANO.peak("int8") is None
    arithmetic = Group("a", "Conv", 0, 10**9, 1e9, weights=1000)
    memory = Group("m", "Conv", 0, 10**6, 1e6, weights=64_000_000)
    found = bound([arithmetic, memory], NANO, "fp16")
    compute_us, memory_us = 1e9 / 471.8592e9 * 1e6, 128e6 / 25.6e9 * 1e6
    assert found.us == pytest.approx(compute_us + memory_us)
    assert found.compute_us == pytest.approx(compute_us * 1.001)
    assert found.memory_us == pytest.approx(memory_us + 2000 / 25.6e3)
    assert found.floor_us == found.memory_us and found.memory_bound == pytest.approx(memory_us / found.us)
    assert found.max_fps == pytest.approx(1e6 / found.us)
    assert bound([arithmetic], NANO, "int8") is None


def test_no_published_measurement_is_below_its_bound():
    """The networks that odtrt converts are in the results file; the others are computed here again."""
    rows = json.loads((ROOT / "results" / "roofline.cpu.json").read_text())["rows"]
    held = {
        (row["board"], row["network"], row["precision"]): row for row in rows if row["row"] == "published"
    }
    assert len(held) == len(benchmark.PUBLISHED)
    for one in benchmark.PUBLISHED:
        row = held[one.module, one.network, one.precision]
        assert row["bound_ms"] < one.ms == row["published_ms"]
        if one.gflop is not None:
            known = 1e9 * one.gflop, 1e6 * one.million_weights
            us = roofline.floor_us(*known, boards.gpu(one.module), one.precision)
            assert us / 1e3 == pytest.approx(row["bound_ms"], rel=1e-3)


def test_tensorflows_profiler_counts_the_same():
    rows = json.loads((ROOT / "results" / "roofline.cpu.json").read_text())["rows"]
    networks = [row for row in rows if row["row"] == "network"]
    assert {row["model"] for row in networks} >= {"parts", "coco_ssd_mnv1"}
    assert all(row["gmac"] == row["tensorflow_gmac"] > 0.1 for row in networks)


def test_a_bound_that_a_measurement_refutes_is_seen():
    """As if NVIDIA's 40 "TOPS" of an Orin Nano were dense FP16 of a tenth of that: YOLO26x would break it."""
    slow = dataclasses.replace(boards.gpu("Orin Nano 8 GB Super"), max_mhz=60)
    assert roofline.floor_us(193.9e9, 55.7e6, slow, "fp16") / 1e3 > 32.60


def test_the_articles_42_fps_of_an_efficientdet_d1_on_a_nano_are_below_the_bound():
    """With 18 classes, where the article's has 90. Arithmetic alone would not exclude it; memory does."""
    rows = json.loads((ROOT / "results" / "roofline.cpu.json").read_text())["rows"]
    wanted = {"row": "bound", "model": "ft_effd1_carparts18", "board": "Nano", "precision": "fp16"}
    (row,) = (one for one in rows if wanted.items() <= one.items())
    assert row["bound_fps"] < 42 < 1e6 / row["bound_floor_us"]
    assert row["bound_compute_us"] == pytest.approx(1e6 * 10.314463e9 / NANO.peak("fp16"), rel=1e-3)


@pytest.mark.parametrize(
    ("module", "tera"),
    [("Xavier NX", 6.8), ("AGX Orin 64 GB", 42.6), ("Orin NX 16 GB", 15.0), ("AGX Thor T5000", 258.7)],
)
def test_peaks_are_nvidias_without_sparsity_and_dlas(module, tera):
    """NVIDIA: 2,070 sparse FP4 TFLOPS of the T5000 are eight times its dense FP16."""
    gpu = boards.gpu(module)
    assert gpu.peak("fp16") / 1e12 == pytest.approx(tera, rel=0.01)
    assert gpu.peak("int8") == 2 * gpu.peak("fp16")
    assert gpu.board in {name for one in boards.JETPACKS for name in one.boards.split(", ")}


def test_an_unknown_board():
    with pytest.raises(ValueError, match="expected one of Nano, TX2"):
        boards.gpu("TX1")
