"""Chapter 2: the ONNX graph computes what the frozen TensorFlow graph computes, or nothing is written.

The oracles are TensorFlow's session, ONNX Runtime, the ONNX checker and NVIDIA's own parser.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from odtrt_lib import folder as folders
from odtrt_lib import spec as spec_module
from odtrt_lib.convert import stage as convert_module
from odtrt_lib.errors import CheckError, InputError, UnsupportedError
from odtrt_lib.folder import seal

tf = pytest.importorskip("tensorflow")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("tf2onnx")

HEADS = ["box_encodings", "class_logits"]
HEIGHT, WIDTH, CLASSES = 48, 80, 5


# ---- Networks made in TensorFlow, small enough to convert in a second ---------------------------------


def upsample_by_stacking(features, size):
    """The OD API's ``ops.nearest_neighbor_upsampling``, by 2."""
    from odtrt_lib.export import odapi

    odapi.prepare()
    from object_detection.utils import ops

    return ops.nearest_neighbor_upsampling(features, scale=2)


def resize_with(operation, **flags):
    return lambda features, size: getattr(tf.raw_ops, operation)(images=features, size=size, **flags)


def frozen_network(
    batch=1, upsample=upsample_by_stacking, anchors=(2, 2), width=8, seed=0, distort=None
) -> bytes:
    """Two feature levels with everything that the rewriting rules touch; anchors a cell of each level.

    distort: what happens to the features that both levels are made from.
    """
    v1, random = tf.compat.v1, np.random.default_rng(seed)

    def weights(*shape):
        return tf.constant(random.normal(0, 0.5 / np.sqrt(np.prod(shape[:-1])) * 4, shape).astype(np.float32))

    def batch_norm(x):
        c = x.shape[-1]
        positive = [random.uniform(0.5, 2, c).astype(np.float32) for _ in range(2)]
        moved = [random.normal(0, 0.3, c).astype(np.float32) for _ in range(2)]
        return v1.nn.fused_batch_norm(
            x, positive[0], moved[0], moved[1], positive[1], epsilon=1e-3, is_training=False
        )[0]

    def conv(x, kernel, stride=1, padding="SAME"):
        return tf.nn.conv2d(x, kernel, stride, padding)

    with tf.Graph().as_default() as graph:
        image = v1.placeholder(tf.float32, [batch, HEIGHT, WIDTH, 3], name="image")
        x = tf.nn.relu6(batch_norm(conv(image, weights(3, 3, 3, width), 2)))
        x = tf.nn.depthwise_conv2d(x, weights(3, 3, width, 1), [1, 1, 1, 1], "SAME")
        x = tf.nn.bias_add(
            conv(x, weights(1, 1, width, width)), random.normal(0, 0.3, width).astype(np.float32)
        )
        x = x * tf.sigmoid(tf.identity(tf.constant(1.0)) * x)
        squeezed = tf.reshape(tf.reduce_mean(x, [1, 2]), [-1, 1, 1, width])
        x = x * tf.sigmoid(conv(squeezed, weights(1, 1, width, width)))
        fine = conv(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), weights(3, 3, width, width), 2, "VALID")
        fine = fine if distort is None else distort(fine)
        coarse = tf.nn.max_pool2d(fine, 3, 2, "SAME")
        up = upsample(coarse, fine.shape[1:3].as_list())
        rates = tf.nn.relu(tf.constant([[0.7], [1.9]]))
        rates = rates / (tf.reduce_sum(rates) + 1e-4)
        fused = tf.squeeze(tf.linalg.matmul(tf.stack([fine, up], axis=-1), rates), axis=[-1])
        joined = conv(tf.concat([fused, fine], axis=-1), weights(1, 1, 2 * width, width))
        shared = weights(3, 3, width, width)
        levels = [tf.nn.relu(batch_norm(conv(level, shared))) for level in (joined, coarse)]
        for name, columns in zip(HEADS, (4, CLASSES), strict=True):
            parts = []
            for level, count in zip(levels, anchors, strict=True):
                flat = conv(level, weights(3, 3, width, count * columns))
                rows = batch if batch is not None else tf.shape(flat)[0]
                parts.append(tf.reshape(flat, [rows, -1, columns]))
            tf.identity(tf.concat(parts, axis=1), name=name)
        return graph.as_graph_def().SerializeToString()


def write_folder(folder: Path, frozen: bytes) -> Path:
    """A model folder after stage 1, for a network of :func:`frozen_network`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "frozen.pb").write_bytes(frozen)
    graph = load_graph(frozen)
    batch = graph.get_tensor_by_name("image:0").shape[0]
    heads = run_tensorflow(folder, np.zeros((batch or 1, HEIGHT, WIDTH, 3), np.float32))
    spec = spec_module.DetectorSpec(
        name="small",
        source=spec_module.Source("", "", "", "", "", ""),
        input=spec_module.InputSpec(
            HEIGHT, WIDTH, spec_module.Resizer("fixed_shape"), (2 / 255,) * 3, (-1.0,) * 3, batch
        ),
        heads=spec_module.SsdHeads(
            heads[0].shape[1],
            CLASSES - 1,
            background_column=True,
            box_coder=spec_module.BoxCoder(10, 10, 5, 5),
            scores=spec_module.ScoreSpec("sigmoid", 1.0),
        ),
        nms=spec_module.NmsSpec(0.1, 0.5, 10, 10, False, False),
        labels=tuple(spec_module.Label(i, str(i)) for i in range(1, CLASSES)),
    )
    (folder / "spec.json").write_text(spec.to_json())
    seal(folder)
    return folder


def load_graph(frozen: bytes):
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(tf.compat.v1.GraphDef.FromString(frozen), name="")
    return graph


def run_tensorflow(folder: Path, images: np.ndarray) -> list[np.ndarray]:
    with tf.compat.v1.Session(graph=load_graph((folder / "frozen.pb").read_bytes())) as session:
        return session.run([f"{name}:0" for name in HEADS], {"image:0": images})


def run_onnx(folder: Path, images: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(folder / "heads.onnx", providers=["CPUExecutionProvider"])
    return session.run(HEADS, {"image": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})


def assert_computes_the_same(folder: Path, batch: int = 1, tolerance: float = 1e-4) -> None:
    spec = spec_module.load_spec(folder / "spec.json").input
    images = np.random.default_rng(99).normal(0, 0.7, (batch, spec.height, spec.width, 3)).astype(np.float32)
    for expected, found in zip(run_tensorflow(folder, images), run_onnx(folder, images), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * expected.std())


def operations(folder: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(folder / "heads.onnx").graph.node)


def assert_tensorrt_builds(model: Path, shape=None, build=True) -> None:
    """NVIDIA's parser takes it and, if asked for, the builder finds an implementation for all of it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.read_bytes()), parser.get_error(0).desc()
    assert [network.get_output(i).name for i in range(network.num_outputs)] == HEADS
    if not build:
        return
    settings = builder.create_builder_config()
    if shape is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape("image", (1, *shape), (2, *shape), (4, *shape))
        settings.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, settings) is not None


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A converted model folder. Do not write into it; copy it."""
    folder = write_folder(tmp_path_factory.mktemp("small") / "small", frozen_network())
    convert_module.convert(folder)
    return folder


@pytest.fixture
def copy_of_small(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def edit_onnx(folder: Path, edit) -> None:
    model = onnx.load(folder / "heads.onnx")
    edit(model)
    onnx.save(model, folder / "heads.onnx")


def find_resize(model):
    return next(node for node in model.graph.node if node.op_type == "Resize")


def set_text(node, **values) -> None:
    for name, value in values.items():
        for attribute in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(attribute)
        node.attribute.append(onnx.helper.make_attribute(name, value))


# ---- What comes out ------------------------------------------------------------------------------------


def test_the_interface_is_nchw_float32_with_fixed_names_and_shapes(small):
    graph = onnx.load(small / "heads.onnx").graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    cells = (HEIGHT // 4) * (WIDTH // 4) + (HEIGHT // 8) * (WIDTH // 8)
    assert shapes == {
        "image": [1, 3, HEIGHT, WIDTH],
        "box_encodings": [1, 2 * cells, 4],
        "class_logits": [1, 2 * cells, CLASSES],
    }
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types == {onnx.TensorProto.FLOAT}


def test_one_transpose_a_head_is_left_and_no_trace_of_nhwc(small):
    found = operations(small)
    assert found["Transpose"] == 2
    assert found["Resize"] == 1
    assert not {"MatMul", "BatchNormalization", "Unsqueeze", "Squeeze", "Identity"} & set(found)


@pytest.mark.parametrize("opset", convert_module.OPSETS)
def test_every_offered_opset_computes_what_tensorflow_computes(small, tmp_path, opset):
    folder = write_folder(tmp_path / "model", (small / "frozen.pb").read_bytes())
    record = convert_module.convert(folder, opset=opset).record
    model = onnx.load(folder / "heads.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert record["checks"]["opset"] == opset
    assert_computes_the_same(folder)
    assert_tensorrt_builds(folder / "heads.onnx", build=opset == 17)


@pytest.mark.parametrize("opset", [13, 19])
def test_another_opset_is_refused_with_those_that_are_offered(small, opset):
    with pytest.raises(UnsupportedError, match="15, 16, 17, 18"):
        convert_module.convert(small, opset=opset)


def test_a_dynamic_batch_stays_dynamic(tmp_path):
    folder = write_folder(tmp_path / "model", frozen_network(batch=None))
    convert_module.convert(folder)
    graph = onnx.load(folder / "heads.onnx").graph
    batches = [value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)]
    assert batches == ["batch"] * 3
    assert not {"Shape", "Gather", "Slice"} & set(operations(folder))
    for batch in (1, 3):
        assert_computes_the_same(folder, batch)
    assert_tensorrt_builds(folder / "heads.onnx", (3, HEIGHT, WIDTH))


def test_a_fixed_batch_of_several_images(tmp_path):
    folder = write_folder(tmp_path / "model", frozen_network(batch=3))
    convert_module.convert(folder)
    assert_computes_the_same(folder, 3)


def test_levels_with_other_anchor_counts_are_transposed_apart(tmp_path):
    folder = write_folder(tmp_path / "model", frozen_network(anchors=(3, 6)))
    convert_module.convert(folder)
    assert operations(folder)["Transpose"] == 4
    assert_computes_the_same(folder)


def test_a_large_kernel_that_levels_share_is_not_copied_for_their_batch_norms(tmp_path):
    width = 192
    folder = write_folder(tmp_path / "model", frozen_network(width=width))
    convert_module.convert(folder)
    shared_kernel = 3 * 3 * width * width * 4
    kernels = [
        tensor.name
        for tensor in onnx.load(folder / "heads.onnx").graph.initializer
        if list(tensor.dims) == [width, width, 3, 3]
    ]
    assert shared_kernel > 1 << 20
    assert len(kernels) == 2  # the strided convolution's and the shared one
    assert operations(folder)["BatchNormalization"] == 2
    assert_computes_the_same(folder, tolerance=1e-3)


def test_the_same_graph_gives_the_same_bytes(small, copy_of_small):
    before = (small / "heads.onnx").read_bytes()
    convert_module.convert(copy_of_small, force=True)
    assert (copy_of_small / "heads.onnx").read_bytes() == before


# ---- Resize --------------------------------------------------------------------------------------------

RESIZES = {
    "bilinear": resize_with("ResizeBilinear"),
    "bilinear, half pixel": resize_with("ResizeBilinear", half_pixel_centers=True),
    "bilinear, corners": resize_with("ResizeBilinear", align_corners=True),
    "nearest": resize_with("ResizeNearestNeighbor"),
    "nearest, half pixel": resize_with("ResizeNearestNeighbor", half_pixel_centers=True),
    "nearest, corners": resize_with("ResizeNearestNeighbor", align_corners=True),
    "keras UpSampling2D": lambda features, size: tf.image.resize(features, size, "nearest"),
}


def shrunk_first(resize):
    """Makes the enlargement a fraction: 5 rows and 9 columns to 12 and 20."""
    return lambda features, size: resize(features[:, :5, :9], size)


@pytest.mark.parametrize("is_whole", [True, False], ids=["by 2", "by a fraction"])
@pytest.mark.parametrize("name", RESIZES)
def test_every_resize_rule_of_tensorflow_is_kept(tmp_path, name, is_whole):
    resize = RESIZES[name] if is_whole else shrunk_first(RESIZES[name])
    folder = write_folder(tmp_path / "model", frozen_network(upsample=resize))
    record = convert_module.convert(folder).record
    [finding] = record["checks"]["resizes"]
    assert finding["agrees"] and finding["tensorrt_reads_it"]
    assert list(finding["output_size"]) == [HEIGHT // 4, WIDTH // 4]
    assert "tf_half_pixel_for_nn" not in finding["onnx"]
    assert_computes_the_same(folder)
    assert_tensorrt_builds(folder / "heads.onnx", build=False)


def test_a_stacked_upsampling_is_reported_as_what_it_is(small):
    [finding] = convert_module.audit_resizes(
        convert_module.load_frozen(small / "frozen.pb"), onnx.load(small / "heads.onnx")
    )
    assert finding.tensorflow == "stack-and-reshape upsampling"
    assert finding.onnx == "nearest asymmetric floor"
    assert finding.agrees
    assert (finding.input_size, finding.output_size) == ((6, 10), (12, 20))


WRONG_RULES = {
    "rounding": {"nearest_mode": "ceil"},
    "coordinates": {"coordinate_transformation_mode": "half_pixel"},
    "interpolation": {"mode": "linear"},
}


@pytest.mark.parametrize("wrong", WRONG_RULES.values(), ids=WRONG_RULES)
def test_a_wrong_resize_rule_fails_the_audit_and_the_parity_gate(copy_of_small, wrong):
    frozen = convert_module.load_frozen(copy_of_small / "frozen.pb")
    edit_onnx(copy_of_small, lambda model: set_text(find_resize(model), **wrong))
    [finding] = convert_module.audit_resizes(frozen, onnx.load(copy_of_small / "heads.onnx"))
    assert not finding.agrees and finding.problem
    with pytest.raises(CheckError, match="of its scale"):
        convert_module.check_parity(copy_of_small)


def test_a_rule_that_tensorrt_refuses_is_found_though_it_is_right(copy_of_small):
    rule = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
    edit_onnx(copy_of_small, lambda model: set_text(find_resize(model), **rule))
    frozen = convert_module.load_frozen(copy_of_small / "frozen.pb")
    [finding] = convert_module.audit_resizes(frozen, onnx.load(copy_of_small / "heads.onnx"))
    assert finding.agrees and not finding.tensorrt_reads_it
    convert_module.check_parity(copy_of_small)


def test_a_resize_without_counterpart_disagrees_on_either_side(small):
    frozen = convert_module.load_frozen(small / "frozen.pb")
    without = onnx.load(small / "heads.onnx")
    without.graph.node.remove(find_resize(without))
    [missing] = convert_module.audit_resizes(frozen, without)
    assert not missing.agrees and missing.onnx == ""
    doubled = onnx.load(small / "heads.onnx")
    doubled.graph.node.add().CopyFrom(find_resize(doubled))
    doubled.graph.node[-1].name = "stranger"
    findings = convert_module.audit_resizes(frozen, doubled)
    assert [finding.agrees for finding in findings] == [True, False]


UNCONVERTIBLE = {
    "ResizeArea": resize_with("ResizeArea"),
    "ResizeBicubic": resize_with("ResizeBicubic"),
    "ScaleAndTranslate": lambda features, size: tf.image.resize(features, size, antialias=True),
}


@pytest.mark.parametrize("operation", UNCONVERTIBLE)
def test_a_resize_that_cannot_be_converted_faithfully_is_refused_by_name(tmp_path, operation):
    folder = write_folder(tmp_path / "model", frozen_network(upsample=UNCONVERTIBLE[operation]))
    with pytest.raises(UnsupportedError, match=f"{operation} `.+` cannot be converted") as caught:
        convert_module.convert(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "heads.onnx").exists()


# ---- The gate ------------------------------------------------------------------------------------------


def edit_first_kernel(model, edit) -> None:
    kernel = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = edit(onnx.numpy_helper.to_array(kernel)).astype(np.float32)
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))


def scale_a_kernel(model) -> None:
    edit_first_kernel(model, lambda values: values * 1.001)


def swap_two_channels(model) -> None:
    edit_first_kernel(model, lambda values: values[[1, 0, *range(2, len(values))]])


def swap_levels(model) -> None:
    join = next(node for node in model.graph.node if node.name == "class_logits/group_0/join")
    swapped = list(reversed(join.input))
    del join.input[:]
    join.input.extend(swapped)


def use_wrong_rule(model) -> None:
    set_text(find_resize(model), coordinate_transformation_mode="half_pixel")


def break_a_type(model) -> None:
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "Convolution"


DEFECTS = {
    "kernel x 1.001": (scale_a_kernel, r"times the noise of float32 .* the two graphs differ"),
    "two channels": (swap_two_channels, "of its scale"),
    "order of the levels": (swap_levels, "of its scale"),
    "Resize": (use_wrong_rule, "TensorFlow"),
    "invalid model": (break_a_type, "not a valid ONNX model"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_the_conversion_is_caught_and_the_old_file_stays(copy_of_small, monkeypatch, defect):
    break_it, message = DEFECTS[defect]
    before = (copy_of_small / "heads.onnx").read_bytes()
    faithful = convert_module.to_onnx

    def defective(frozen, opset):
        model = faithful(frozen, opset)
        break_it(model)
        return model

    monkeypatch.setattr(convert_module, "to_onnx", defective)
    with pytest.raises(CheckError, match=message) as caught:
        convert_module.convert(copy_of_small, force=True)
    assert "\n" not in str(caught.value)
    assert (copy_of_small / "heads.onnx").read_bytes() == before
    assert [one["stage"] for one in folders.read_log(copy_of_small)] == ["seal", "convert"]
    assert not list(copy_of_small.glob(".*"))


def test_the_record_says_what_was_checked(small):
    record = folders.last_record(small, "convert")
    checks = record["checks"]
    found = operations(small)
    assert checks["nodes"] == sum(found.values())
    assert checks["transposes"] == found["Transpose"]
    assert checks["resizes_agree"] is True and len(checks["resizes"]) == 1
    parity = checks["parity"]
    head = parity["class_logits"]
    assert 0 < head["times_noise"] < parity["max_times_noise"] == 5
    assert 0 < head["rms_relative_err"] < head["max_relative_err"] < 1e-4
    assert 0 < head["noise_rms_relative"] < head["noise_max_relative"] < 1e-4
    assert parity["is_decisive"] is True and 0 < parity["sees_kernel_change"] < 1e-3
    assert set(record["versions"]) == {"tensorflow", "tf2onnx", "onnx", "onnxruntime"}
    assert "unknown" not in record["versions"].values()


def test_with_chaotic_weights_the_record_says_that_nothing_was_seen(tmp_path):
    """Chaos by a long chain of steep sines, each of which multiplies rounding by up to 30."""

    def chaos(features):
        for _ in range(12):
            features = tf.sin(features * 30.0)
        return features

    folder = write_folder(tmp_path / "model", frozen_network(distort=chaos))
    parity = convert_module.convert(folder).record["checks"]["parity"]
    assert parity["is_decisive"] is False and parity["sees_kernel_change"] > 1e-3
    assert (folder / "heads.onnx").is_file()


def test_nothing_is_done_twice_unless_something_changed(copy_of_small):
    assert convert_module.convert(copy_of_small).is_up_to_date
    assert not convert_module.convert(copy_of_small, opset=16).is_up_to_date
    (copy_of_small / "frozen.pb").write_bytes(frozen_network(seed=1))
    with pytest.raises(InputError, match=r"frozen\.pb: damaged or changed"):
        convert_module.convert(copy_of_small)
    seal(copy_of_small)
    assert not convert_module.convert(copy_of_small, opset=16).is_up_to_date


# ---- What people bring by mistake ----------------------------------------------------------------------


def test_a_missing_frozen_graph_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(InputError, match="run `odtrt export` first"):
        convert_module.convert(tmp_path)


def test_a_damaged_frozen_graph_is_an_input_error(copy_of_small):
    (copy_of_small / "frozen.pb").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    seal(copy_of_small)
    with pytest.raises(InputError, match=r"frozen\.pb: not a TensorFlow GraphDef"):
        convert_module.convert(copy_of_small)


def test_a_graph_without_the_heads_is_an_input_error(copy_of_small):
    graph_def = tf.compat.v1.GraphDef()
    graph_def.node.add(name="image", op="Placeholder")
    (copy_of_small / "frozen.pb").write_bytes(graph_def.SerializeToString())
    seal(copy_of_small)
    with pytest.raises(InputError, match="no node box_encodings, class_logits"):
        convert_module.convert(copy_of_small)


def test_a_spec_of_another_detector_is_an_input_error(copy_of_small):
    path = copy_of_small / "spec.json"
    path.write_text(path.read_text().replace('"num_anchors": 600', '"num_anchors": 601'))
    seal(copy_of_small)
    with pytest.raises(InputError, match=r"spec\.json says \[batch, 601, "):
        convert_module.convert(copy_of_small)


# ---- Real detectors ------------------------------------------------------------------------------------


def test_a_detector_of_the_odapi(tiny_converted):
    checks = folders.last_record(tiny_converted, "convert")["checks"]
    assert checks["transposes"] == 2
    assert checks["batch_norms"] == 0
    assert_computes_the_same(tiny_converted, tolerance=1e-3)
    assert_tensorrt_builds(tiny_converted / "heads.onnx")


CORPUS = {
    "coco_ssd_mnv1": {"batch": None, "transposes": 4, "resizes": 0, "nodes": 110},
    "zoo_efficientdet_d0": {"batch": 1, "transposes": 2, "resizes": 12, "nodes": 610},
}


@pytest.mark.corpus
@pytest.mark.parametrize("name", CORPUS)
def test_detectors_found_in_the_wild(corpus, corpus_folder, tmp_path, name):
    if CORPUS[name]["batch"] == 1:
        folder = corpus_folder(name)
    else:
        from odtrt_lib.export import export

        folder = tmp_path / name
        export(corpus / name, folder, batch=CORPUS[name]["batch"])
        convert_module.convert(folder)
    checks = folders.last_record(folder, "convert")["checks"]
    assert checks["transposes"] <= CORPUS[name]["transposes"]
    assert checks["nodes"] <= CORPUS[name]["nodes"]
    assert len(checks["resizes"]) == CORPUS[name]["resizes"] and checks["resizes_agree"]
    parity = checks["parity"]
    assert parity["is_decisive"] and parity["sees_kernel_change"] < 1e-3
    assert_computes_the_same(folder, tolerance=2e-2)
    assert_tensorrt_builds(folder / "heads.onnx", build=False)
