"""INT8: where the pairs are, which ranges are chosen, what they do to the heads, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from test_convert import assert_tensorrt_builds  # noqa: E402
from tiny_model import heads_model, model_folder  # noqa: E402

from odtrt_lib import bundle, fuse, int8  # noqa: E402
from odtrt_lib.errors import InputError  # noqa: E402
from odtrt_lib.folder import seal  # noqa: E402
from odtrt_lib.int8 import calibrate, qdq  # noqa: E402
from odtrt_lib.int8.stage import read_table, write_table  # noqa: E402
from odtrt_lib.variants import CALIBRATORS  # noqa: E402


def residual_network() -> onnx.ModelProto:
    """Conv a, ReLU6, Conv b added to what ReLU6 gave, Conv c behind the sum."""
    random = np.random.default_rng(1)
    weights = {
        name: random.normal(0, 0.2, (8, channels, 3, 3))
        for name, channels in zip("abc", (3, 8, 8), strict=True)
    }
    weights["b"][5] = 0  # a dead channel
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    constants += [
        numpy_helper.from_array(np.float32(value), name) for name, value in (("zero", 0), ("six", 6))
    ]
    nodes = [
        helper.make_node("Conv", ["image", "a"], ["a_out"], "conv_a", pads=[1] * 4),
        helper.make_node("Clip", ["a_out", "zero", "six"], ["relu"], "relu6"),
        helper.make_node("Conv", ["relu", "b"], ["b_out"], "conv_b", pads=[1] * 4),
        helper.make_node("Add", ["b_out", "relu"], ["sum"], "residual"),
        helper.make_node("Conv", ["sum", "c"], ["out"], "conv_c", pads=[1] * 4),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 12, 12])
        for n, c in (("image", 3), ("out", 8))
    ]
    graph = helper.make_graph(nodes, "residual", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model, image, outputs=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(outputs, {session.get_inputs()[0].name: image})


def images(count=3, shape=(1, 3, 12, 12)):
    random = np.random.default_rng(2)
    return [random.normal(0, 1, shape).astype(np.float32) for _ in range(count)]


def test_pairs_are_where_tensorrt_fuses_them():
    where = qdq.placement(residual_network())
    assert where.convs == ("conv_a", "conv_b", "conv_c")
    # One side of the sum is a Conv, which TensorRT adds to in the same kernel: the pair is on the other.
    assert {(edge.node, edge.tensor) for edge in where.edges} == {
        ("conv_a", "image"),
        ("conv_b", "relu"),
        ("conv_c", "sum"),
        ("residual", "relu"),
    }
    assert where.tensors == ("image", "relu", "sum")
    left = qdq.placement(residual_network(), ["conv_b"])
    assert left.convs == ("conv_a", "conv_c") and left.tensors == ("image", "sum")


def float64_reference(image: np.ndarray, scales: dict) -> np.ndarray:
    """residual_network with rounded inputs and kernels, in float64 by numpy."""
    weights = {
        one.name: numpy_helper.to_array(one).astype(np.float64)
        for one in residual_network().graph.initializer
    }

    def rounded(values, scale):
        return np.clip(np.round(values / scale), -128, 127) * scale

    def conv(values, name):
        kernel = weights[name]
        largest = np.abs(kernel).reshape(8, -1).max(axis=1)
        scale = np.float32(np.maximum(largest / 127, 1e-8)).astype(np.float64)[:, None, None, None]
        padded = np.pad(values[0], ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        return np.einsum("chwij,ocij->ohw", windows, rounded(kernel, scale))[None]

    relu = np.clip(conv(rounded(image.astype(np.float64), scales["image"]), "a"), 0, 6)
    skip = rounded(relu, scales["relu"])
    total = conv(skip, "b") + skip
    return conv(rounded(total, scales["sum"]), "c")


def test_the_quantised_network_computes_what_its_codes_say():
    model, where = residual_network(), qdq.placement(residual_network())
    ranges = {"image": 3.1, "relu": 5.7, "sum": 7.9}
    quantised = qdq.quantised(model, where, ranges)
    onnx.checker.check_model(quantised, full_check=True)
    scales = {name: float(np.float32(amax / 127)) for name, amax in ranges.items()}
    for image in images():
        expected = float64_reference(image, scales)
        (found,) = run(quantised, image)
        # A value at the middle between two codes can fall either way: a step of one code in few places.
        far = np.abs(found - expected) > 1e-4
        assert far.mean() < 0.02 and np.abs(found - expected).max() < 0.2
    kinds = [node.op_type for node in quantised.graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 3 + 3
    assert all(len(node.input) == 3 for node in quantised.graph.node if node.op_type in qdq.QUANTISERS)
    assert model.SerializeToString() == residual_network().SerializeToString()


def test_a_batch_norm_that_was_not_folded_keeps_its_parameters():
    """Chapter 2 calls them by the node's name and ``/scale``, and the node's output has that name too."""
    random = np.random.default_rng(8)
    shapes = {"kernel": (4, 3, 3, 3), "last": (4, 4, 1, 1)}
    shapes.update(dict.fromkeys(("norm/scale", "norm/bias", "norm/mean", "norm/variance"), (4,)))
    constants = [
        numpy_helper.from_array(random.uniform(0.5, 1, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["first"], "first", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["first", *list(shapes)[2:]], ["norm"], "norm"),
        helper.make_node("Conv", ["norm", "last"], ["out"], "out"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 12, 12])
        for name, channels in (("image", 3), ("out", 4))
    ]
    graph = helper.make_graph(nodes, "norm", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (image,) = images(1)
    (wanted,) = run(model, image)
    quantised = qdq.quantised(
        model, qdq.placement(model), {"image": 4.0, "norm": float(np.abs(wanted).max())}
    )
    onnx.checker.check_model(quantised, full_check=True)
    (found,) = run(quantised, image)
    assert np.square(found - wanted).sum() < 1e-3 * np.square(wanted).sum()


def test_tensorrt_takes_it(tmp_path):
    model = heads_model()
    where = qdq.placement(model)
    found = calibrate.histograms(model, where.tensors, lambda: images(3, (1, 3, 16, 16)))
    ranges = {tensor: calibrate.amax(histogram, "mse") for tensor, histogram in found.items()}
    onnx.save(qdq.quantised(model, where, ranges), tmp_path / "quantised.onnx")
    assert_tensorrt_builds(tmp_path / "quantised.onnx")


def test_histograms_hold_every_value():
    model, where = residual_network(), qdq.placement(residual_network())
    found = calibrate.histograms(model, where.tensors, images)
    for tensor in ("relu", "sum"):
        shown = residual_network()
        shown.graph.output.append(onnx.ValueInfoProto(name=tensor))
        values = np.abs(np.concatenate([run(shown, image, [tensor])[0].ravel() for image in images()]))
        assert found[tensor].largest == values.max() and found[tensor].counts.sum() == values.size
        assert (
            abs(calibrate.percentile(found[tensor], 90.0) - np.percentile(values, 90.0)) < 0.02 * values.max()
        )
    assert found["image"].largest == max(np.abs(image).max() for image in images())


@pytest.fixture(scope="module")
def long_tail() -> tuple:
    """200,000 absolute values of a Laplace distribution and their histogram."""
    values = np.abs(np.random.default_rng(3).laplace(0, 1, 200_000))
    counts = np.histogram(values, calibrate.BINS, (0, values.max()))[0]
    return values, calibrate.Histogram(float(values.max()), counts)


def test_mse_finds_the_range_with_the_least_error(long_tail):
    values, histogram = long_tail

    def error(amax):
        step = amax / 127
        return ((values - np.minimum(np.round(values / step), 127) * step) ** 2).mean()

    tried = np.linspace(0.1, 1.0, 181) * histogram.largest
    best = min(error(amax) for amax in tried)
    assert error(calibrate.mse(histogram)) < 1.02 * best
    assert error(calibrate.minmax(histogram)) > 1.2 * best


def test_entropy_cuts_a_long_tail_and_keeps_an_even_range(long_tail):
    values, histogram = long_tail
    assert np.percentile(values, 98) < calibrate.entropy(histogram) < 0.9 * histogram.largest
    even = calibrate.Histogram(1.0, np.full(calibrate.BINS, 100))
    assert calibrate.entropy(even) > 0.98
    # Behind a ReLU most values are 0; that must not decide the range.
    zeros = histogram.counts.copy()
    zeros[0] += 5 * values.size
    with_zeros = calibrate.entropy(calibrate.Histogram(histogram.largest, zeros))
    assert with_zeros == calibrate.entropy(histogram)
    assert calibrate.percentile(histogram) < histogram.largest == calibrate.minmax(histogram)
    assert tuple(calibrate.RULES) == CALIBRATORS


def test_the_table_is_tensorrts():
    """Big-endian float32: 1.0 is 3f800000. A name may hold a colon."""
    where = qdq.placement(residual_network())
    text = write_table({"image": 127.0, "relu": 63.5, "sum": 1.0, "x:0": 254.0}, (8, 5, 2))
    assert text.splitlines()[:3] == ["TRT-8502-EntropyCalibration2", "image: 3f800000", "relu: 3f000000"]
    assert text.splitlines()[4] == "x:0: 40000000"
    assert write_table({}, (10, 3, 0)) == "TRT-100300-EntropyCalibration2\n"
    read = read_table(text, where)
    assert list(read) == ["image", "relu", "sum"] and read["sum"] == pytest.approx(1.0, rel=1e-7)
    for wrong, reason in (
        ("image: 3f800000\n", "not TensorRT's calibration table"),
        ("TRT-8502-EntropyCalibration2\nother: 3f800000\n", "3 of 3 tensors are not in it"),
        ("TRT-8502-EntropyCalibration2\nimage: 3f8\n", "line 2"),
    ):
        with pytest.raises(InputError, match=reason):
            read_table(wrong, where)


@pytest.fixture
def tiny(tmp_path):
    return model_folder(tmp_path / "tiny")


def pictures(count=8):
    random = np.random.default_rng(4)
    return [random.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(count)]


def test_the_stage_writes_and_knows_what_it_wrote(tiny):
    first = int8.quantise(tiny, pictures())
    content = (tiny / "heads_int8.onnx").read_bytes()
    assert first.record["checks"]["int8_convolutions"] == 4 and not first.is_up_to_date
    assert int8.quantise(tiny, pictures()).is_up_to_date
    stem = int8.quantise(tiny, pictures(), in_float=["stem_conv"])
    assert not stem.is_up_to_date and stem.record["checks"]["int8_convolutions"] == 3
    int8.quantise(tiny, pictures())
    assert (tiny / "heads_int8.onnx").read_bytes() == content
    calibration = json.loads((tiny / "int8" / "calibration.json").read_text())
    assert calibration["rule"] == "mse" and calibration["images"] == 8 and len(calibration["ranges"]) == 3


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"images": pictures(3)}, "3 calibration pictures; at least 8"),
        ({"images": [*pictures(7), np.zeros((20, 24, 3), np.uint8)]}, "picture 8: one colour only"),
        ({"rule": "best"}, "calibrator 'best': expected one of mse"),
        ({"in_float": ["nothing"]}, "'nothing' is not a convolution"),
    ],
)
def test_bad_input_is_one_line(tiny, wrong, reason):
    before = sorted(path.name for path in tiny.iterdir())
    with pytest.raises(InputError, match=reason) as caught:
        int8.quantise(tiny, **{"images": pictures(), **wrong})
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tiny.iterdir()) == before


def test_a_picture_that_cannot_be_read_is_named(tiny, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        int8.quantise(tiny, [*pictures(), tmp_path / "broken.jpg"])
    with pytest.raises(InputError, match="no pictures in it"):
        (tmp_path / "empty").mkdir()
        int8.pictures_in(tmp_path / "empty", 8)


def test_ranges_that_exist_already(tiny, tmp_path):
    """Of another calibration.json or of TensorRT's table: the same file comes out, without pictures."""
    int8.quantise(tiny, pictures())
    content = (tiny / "heads_int8.onnx").read_bytes()
    mine = shutil.copy(tiny / "int8" / "calibration.json", tmp_path / "mine.json")
    ranges = json.loads(mine.read_text())["ranges"]
    (tmp_path / "table").write_text(write_table(ranges, (8, 5, 2)))
    for source in (mine, tmp_path / "table"):
        found = int8.quantise(tiny, ranges=source, force=True)
        assert found.record["checks"]["images"] == 0
        new = onnx.load(tiny / "heads_int8.onnx")
        if source is mine:
            assert (tiny / "heads_int8.onnx").read_bytes() == content
        scales = {
            one.name: numpy_helper.to_array(one) for one in new.graph.initializer if "/scale" in one.name
        }
        for tensor, amax in ranges.items():
            assert scales[f"{tensor}/quantized/scale"] == pytest.approx(amax / 127, rel=1e-6)
    wrong = {
        "other.json": (json.dumps({"ranges": {"elsewhere": 1.0}}), "it is another model's"),
        "other.table": (write_table({"elsewhere": 1.0}, (8, 5, 2)), "it is another model's"),
        "none.json": ("[1, 2]", "neither int8/calibration.json"),
        "text.json": (json.dumps({"ranges": dict.fromkeys(ranges, "wide")}), "neither int8/calibration.json"),
        "zero.json": (json.dumps({"ranges": dict.fromkeys(ranges, 0.0)}), "expected a positive number"),
    }
    for name, (text, reason) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=reason) as caught:
            int8.quantise(tiny, ranges=tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        int8.quantise(tiny, ranges=tmp_path / "absent.json")


def test_a_model_that_is_quantised_already_is_refused(tiny):
    int8.quantise(tiny, pictures())
    shutil.copy(tiny / "heads_int8.onnx", tiny / "heads.onnx")
    seal(tiny)
    with pytest.raises(InputError, match="already quantised"):
        int8.quantise(tiny, pictures(), force=True)


def test_values_that_no_range_can_hold_are_refused(tiny):
    model = heads_model()
    middle = next(one for one in model.graph.initializer if one.name == "middle")
    middle.CopyFrom(numpy_helper.from_array(np.full((256, 64, 3, 3), np.inf, np.float32), "middle"))
    onnx.save(model, tiny / "heads.onnx")
    seal(tiny)
    with pytest.raises(InputError, match="'x2' holds NaN or an infinity"):
        int8.quantise(tiny, pictures())


def test_the_shipped_detector_in_int8(parts_folder, tmp_path):
    """Its heads keep 15 dB of signal over noise, and NVIDIA's parser takes it."""
    from odtrt_lib.detector import Detector
    from odtrt_lib.scenes import TEST_SEEDS, TRAIN_SEEDS, render_scene

    folder = tmp_path / "parts"
    shutil.copytree(parts_folder, folder, ignore=shutil.ignore_patterns("plans", "frozen.pb", "pictures"))
    result = int8.quantise(folder, [render_scene(seed).image for seed in TRAIN_SEEDS[:8]])
    assert result.note == "" and result.record["checks"]["int8_convolutions"] == 113
    assert_tensorrt_builds(folder / "heads_int8.onnx", build=False)
    scene = render_scene(TEST_SEEDS[0]).image
    with (
        Detector.open(folder, "onnxruntime") as exact,
        Detector.open(folder, "onnxruntime", precision="int8") as coarse,
    ):
        from odtrt_lib.preprocess import preprocess

        image = preprocess(scene, exact.spec.input)[0][None]
        for wanted, found in zip(exact.backend.infer(image), coarse.backend.infer(image), strict=True):
            assert 10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()) > 15
    fuse.fuse(folder, precision="int8")
    packed = bundle.pack(folder, tmp_path / "parts.odtrt.zip")
    members = {member.path for member in packed.manifest.members}
    brought = {"model/heads_int8.onnx", "model/detector_int8.onnx", "model/int8/calibration.json"}
    assert brought <= members and "odtrt_lib/int8/qdq.py" in members


def bright(picture, share):
    return (picture * share).astype(np.uint8)


def test_pictures_of_another_domain_give_a_warning(parts_folder, tmp_path):
    """Textures and the dark; the detector's own scenes, others than it was trained on too, give none."""
    from odtrt_lib.scenes import TEST_SEEDS, TRAIN_SEEDS, render_scene

    folder = tmp_path / "parts"
    shutil.copytree(parts_folder, folder, ignore=shutil.ignore_patterns("plans", "pictures"))
    for seeds in (TRAIN_SEEDS[:8], TEST_SEEDS[:8]):
        scenes = [render_scene(seed).image for seed in seeds]
        own = int8.quantise(folder, scenes, force=True)
        assert own.note == "" and own.record["checks"]["drift_from_training"] < 0.1
    random = np.random.default_rng(5)
    textures = [random.integers(0, 256, scene.shape, dtype=np.uint8) for scene in scenes]
    for foreign in (textures, [bright(scene, 0.05) for scene in scenes]):
        assert "standard deviation from their means in training" in int8.quantise(folder, foreign).note


def test_the_drift_is_that_of_numpy():
    """The median of eight channels, one of them dead; statistics of another network count for nothing."""
    from odtrt_lib.int8 import drift

    model = residual_network()
    image = images(2)
    shown = residual_network()
    shown.graph.output.append(onnx.ValueInfoProto(name="a_out"))
    means = np.mean([run(shown, one, ["a_out"])[0] for one in image], axis=(0, 1, 3, 4))
    beta, gamma = means + np.array([0.3, -0.1, 0.2, 0.5, 9.0, 0.4, -0.3, 0.0]), np.full(8, 2.0)
    gamma[4] = 0  # a dead channel, which has no distance
    found = drift.measured(model, {"a_out": (beta, gamma), "elsewhere": (beta, gamma)}, image)
    assert found == pytest.approx(0.15, abs=1e-6)
    assert drift.measured(model, {"elsewhere": (beta, gamma)}, image) is None
