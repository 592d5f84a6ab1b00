"""Chapter 1 against TensorFlow and the OD API themselves."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_CONFIG
from spec_cases import SPEC

from odtrt_lib.convert import convert
from odtrt_lib.detector import Detector
from odtrt_lib.errors import CheckError, InputError, OdtrtError, UnsupportedError
from odtrt_lib.export import export, find_model, odapi, run_frozen
from odtrt_lib.export import stage as export_stage
from odtrt_lib.export.pipeline import read_pipeline
from odtrt_lib.folder import append_record, last_record, read_log, sealed
from odtrt_lib.spec import load_spec


@pytest.fixture(scope="module")
def tiny_traced(tiny_model):
    """The OD API's model of the tiny config, and its trace: most of what an export costs."""
    settings = read_pipeline(tiny_model / "pipeline.config")
    model = odapi.build_model(settings.path, settings.message)
    return model, export_stage._trace(model, 1, (96, 128))


@pytest.fixture
def built_before(tiny_traced, monkeypatch) -> None:
    """Whatever this test exports or loads is the tiny network, built and traced before and restored anew."""
    model, concrete = tiny_traced
    monkeypatch.setattr(odapi, "build_model", lambda *arguments, **options: model)
    monkeypatch.setattr(export_stage, "_trace", lambda *arguments: concrete)


def read_graph(folder: Path):
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString((folder / "frozen.pb").read_bytes())
    return graph


def odapi_heads(model_folder: Path, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the OD API computes, restored by TensorFlow alone."""
    import tensorflow as tf

    model = odapi.load_model(model_folder / "pipeline.config", model_folder / "checkpoint" / "ckpt-0")
    predictions = model.predict(tf.constant(image), None)
    return (
        predictions["box_encodings"].numpy(),
        predictions["class_predictions_with_background"].numpy(),
    )


def assert_one_line_error(call, kind, *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_frozen_graph_computes_what_the_odapi_computes(tiny_model, tiny_folder):
    image = np.random.default_rng(3).uniform(-1, 1, (1, 96, 128, 3)).astype(np.float32)
    heads = run_frozen(read_graph(tiny_folder), image)
    boxes, logits = odapi_heads(tiny_model, image)
    np.testing.assert_allclose(heads["box_encodings"], boxes, atol=1e-4)
    np.testing.assert_allclose(heads["class_logits"], logits, atol=1e-4)


def test_frozen_graph_has_one_input_two_outputs_and_no_postprocessing(tiny_folder):
    graph = read_graph(tiny_folder)
    ops = {node.op for node in graph.node}
    assert [node.name for node in graph.node if node.op == "Placeholder"] == ["image"]
    assert {"box_encodings", "class_logits"} <= {node.name for node in graph.node}
    assert not ops & {"NonMaxSuppressionV5", "CombinedNonMaxSuppression", "While", "StatelessWhile", "If"}
    assert not any("TensorArray" in op or "TensorList" in op for op in ops)
    assert not graph.library.function


@pytest.mark.usefixtures("built_before")
def test_postprocessing_left_in_the_graph_is_caught(tiny_model, tmp_path, monkeypatch):
    import tensorflow as tf

    def trace_with_nms(model, batch, size):
        @tf.function(input_signature=[tf.TensorSpec([1, *size, 3], tf.float32, name="image")])
        def heads(image):
            predictions = model.predict(image, None)
            boxes, logits = predictions["box_encodings"], predictions["class_predictions_with_background"]
            kept = tf.image.non_max_suppression(boxes[0], logits[0, :, 1], 10)
            return {"box_encodings": tf.gather(boxes, kept, axis=1), "class_logits": logits}

        return heads.get_concrete_function()

    monkeypatch.setattr(export_stage, "_trace", trace_with_nms)
    assert_one_line_error(lambda: export(tiny_model, tmp_path / "out"), CheckError, "NonMaxSuppression")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("built_before")
def test_a_frozen_graph_that_differs_from_the_model_is_caught(tiny_model, tmp_path, monkeypatch):
    freeze = export_stage._freeze

    def freeze_badly(concrete):
        graph = freeze(concrete)
        constants = [node.attr["value"].tensor for node in graph.node if node.op == "Const"]
        for tensor in constants:
            if len(tensor.tensor_shape.dim) == 4:
                tensor.tensor_content = bytes(len(tensor.tensor_content))
        return graph

    monkeypatch.setattr(export_stage, "_freeze", freeze_badly)
    assert_one_line_error(lambda: export(tiny_model, tmp_path / "out"), CheckError, "eager")


@pytest.mark.usefixtures("built_before")
def test_a_kernel_that_freezing_changes_by_a_thousandth_is_caught(tiny_model, tmp_path, monkeypatch):
    import tensorflow as tf

    freeze = export_stage._freeze

    def freeze_badly(concrete):
        graph = freeze(concrete)
        kernels = [n.attr["value"].tensor for n in graph.node if n.op == "Const"]
        kernel = next(tensor for tensor in kernels if len(tensor.tensor_shape.dim) == 4)
        kernel.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(kernel) * np.float32(1.001)))
        return graph

    monkeypatch.setattr(export_stage, "_freeze", freeze_badly)
    with pytest.raises(CheckError, match=r"times the noise of float32 .* the freezing changed the network"):
        export(tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_anchors_are_those_of_the_model_and_of_the_config(tiny_model, tiny_folder):
    import tensorflow as tf

    model = odapi.load_model(tiny_model / "pipeline.config", tiny_model / "checkpoint" / "ckpt-0")
    corners = np.asarray(model.predict(tf.zeros([1, 96, 128, 3]), None)["anchors"], np.float64)
    anchors = np.load(tiny_folder / "anchors.npy")
    assert anchors.dtype == np.float32
    centre, size = anchors[:, :2].astype(np.float64), anchors[:, 2:].astype(np.float64)
    np.testing.assert_allclose(np.hstack([centre - size / 2, centre + size / 2]), corners, atol=1e-6)


def predictions_with(corners: np.ndarray, maps=((12, 16), (6, 8), (3, 4), (2, 2))) -> dict:
    return {"anchors": corners, "feature_maps": [np.zeros((1, *each, 1), np.float32) for each in maps]}


def corners_of(anchors: np.ndarray) -> np.ndarray:
    centre, half = anchors[:, :2].astype(np.float64), anchors[:, 2:].astype(np.float64) / 2
    return np.hstack([centre - half, centre + half])


def test_anchors_of_another_generator_are_caught(tiny_model):
    settings = read_pipeline(tiny_model / "pipeline.config")
    few = predictions_with(np.array([[0.0, 0.0, 0.5, 0.5]] * 10, np.float32))
    assert_one_line_error(
        lambda: export_stage._checked_anchors(settings, (96, 128), few), CheckError, "anchor_generator"
    )
    moved = corners_of(export_stage.anchors_from_config(settings, (96, 128)))
    moved[5] += 1e-4
    assert_one_line_error(
        lambda: export_stage._checked_anchors(settings, (96, 128), predictions_with(moved)),
        CheckError,
        "differ",
    )


def grid(stride: int) -> str:
    sizes = ", ".join(str(4 * stride + i) for i in range(6))
    return (
        f"anchor_grid {{ base_sizes: [{sizes}] aspect_ratios: [1, 2, 0.5, 1, 2, 0.5] "
        f"height_stride: {stride} width_stride: {stride} }}"
    )


GRIDS = " ".join(map(grid, (8, 16, 32, 64)))
GENERATORS = {
    "flexible_grid": f"flexible_grid_anchor_generator {{ normalize_coordinates: true {GRIDS} }}",
    "ssd": "ssd_anchor_generator { num_layers: 4 min_scale: 0.1 max_scale: 0.9 "
    "reduce_boxes_in_lowest_layer: false aspect_ratios: [1, 2, 0.5, 3, 0.3333] }",
    "multiscale in pixels": "multiscale_anchor_generator { min_level: 3 max_level: 6 anchor_scale: 4 "
    "aspect_ratios: [1, 2, 0.5] scales_per_octave: 2 normalize_coordinates: false }",
}


def with_generator(generator: str) -> str:
    start, end = TINY_CONFIG.index("  anchor_generator {"), TINY_CONFIG.index("  post_processing {")
    return f"{TINY_CONFIG[:start]}  anchor_generator {{ {generator} }}\n{TINY_CONFIG[end:]}"


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS)
def test_anchors_of_every_generator_are_checked_on_any_feature_maps(tmp_path, generator):
    """Sizes that no rule gives: only the model knows them."""
    odapi.prepare()
    from object_detection.builders import anchor_generator_builder

    (tmp_path / "pipeline.config").write_text(with_generator(generator))
    settings = read_pipeline(tmp_path / "pipeline.config")
    maps = [(13, 17), (7, 9), (5, 4), (1, 3)]
    builder = anchor_generator_builder.build(settings.message.model.ssd.anchor_generator)
    corners = np.concatenate(
        [each.get().numpy() for each in builder.generate(maps, im_height=96, im_width=128)]
    )
    anchors, error = export_stage._checked_anchors(settings, (96, 128), predictions_with(corners, maps))
    assert error == 0 and len(anchors) == 6 * sum(height * width for height, width in maps)
    unknown = {"anchors": corners}
    taken, why = export_stage._checked_anchors(settings, (96, 128), unknown)
    np.testing.assert_array_equal(taken, anchors)
    assert "not compared" in why


def test_a_flexible_grid_model_gives_its_own_anchors(tmp_path):
    tf = odapi.tensorflow()
    (tmp_path / "pipeline.config").write_text(with_generator(GENERATORS["flexible_grid"]))
    settings = read_pipeline(tmp_path / "pipeline.config")
    model = odapi.build_model(settings.path, settings.message)
    predictions = model.predict(tf.zeros([1, 96, 128, 3]), None)
    anchors, error = export_stage._checked_anchors(settings, (96, 128), predictions)
    expected = []
    for stride, (rows, columns) in zip((8, 16, 32, 64), ((12, 16), (6, 8), (3, 4), (2, 2)), strict=True):
        for row, column, i in np.ndindex(rows, columns, 6):
            size, ratio = 4 * stride + i, (1, 2, 0.5)[i % 3]
            height, width = size / ratio**0.5, size * ratio**0.5
            expected.append((row * stride / 96, column * stride / 128, height / 96, width / 128))
    np.testing.assert_allclose(anchors, expected, atol=1e-6)
    assert error == 0
    np.testing.assert_array_equal(export_stage.anchors_from_config(settings, (96, 128)), anchors)


def test_an_input_size_that_the_pyramid_cannot_take_is_one_line(tiny_model, tmp_path):
    model = damaged_copy(tiny_model, tmp_path / "model")
    text = TINY_CONFIG.replace("height: 96 width: 128", "height: 300 width: 300")
    (model / "pipeline.config").write_text(text)
    words = ("pipeline.config", "300x300", "multiple of 32", "288x288 and 320x320")
    assert_one_line_error(lambda: export(model, tmp_path / "out"), InputError, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "generator", "size", "error", "words"),
    [
        ("ssd_mobilenet_v2_fpn_keras", "", (20, 128), "image size must be >= 33", ("20x128", "33", "64x128")),
        (
            "ssd_efficientnet-b0_bifpn_keras",
            "",
            (128, 256),
            "image size must be >= 129 in both",
            ("256x256",),
        ),
        (
            "ssd_efficientnet-b0_bifpn_keras",
            "",
            (200, 300),
            "Shapes must match",
            ("128", "256x256 and 256x384"),
        ),
        ("ssd_mobilenet_v2_keras", "", (20, 128), "image size must be >= 33 in both", ("33", "33x128")),
        (
            "ssd_mobilenet_v2_fpn_keras",
            "multiscale_anchor_generator { min_level: 3 max_level: 7 }",
            (96, 128),
            "Number of feature maps",
            ("for 5 feature maps", "has 4"),
        ),
        (
            "ssd_mobilenet_v2_fpn_keras",
            "grid_anchor_generator { scales: 1 aspect_ratios: 1 }",
            (96, 128),
            "unexpected keyword",
            ("for 1 feature maps", "has 4"),
        ),
        (
            "ssd_mobilenet_v2_fpn_keras",
            "",
            (96, 128),
            "in user code:\n  File x\n    ValueError: the cause {{node a}} is this\nCall arguments received:",
            ("the cause is this", "96x128"),
        ),
    ],
)
def test_what_the_odapi_refuses_when_called_is_one_line(
    tmp_path, monkeypatch, kind, generator, size, error, words
):
    """The networks' own rules, written out here: levels that halve, and the least side."""

    def feature_map_sizes(pipeline, message, size):
        multiple, least = {"b": (128, 129), "m": (32, 33), "k": (1, 33)}[
            "b" if "bifpn" in kind else "m" if "fpn" in kind else "k"
        ]
        fits = all(side % multiple == 0 and side >= least for side in size)
        return (
            [(-(-size[0] // 2**level), -(-size[1] // 2**level)) for level in (3, 4, 5, 6)] if fits else None
        )

    monkeypatch.setattr(odapi, "_feature_map_sizes", feature_map_sizes)
    text = TINY_CONFIG.replace("ssd_mobilenet_v2_fpn_keras", kind)
    (tmp_path / "pipeline.config").write_text(text)
    message = odapi._read_config(tmp_path / "pipeline.config")
    if generator:
        (tmp_path / "pipeline.config").write_text(with_generator(generator))
        message = odapi._read_config(tmp_path / "pipeline.config")

    def call():
        with odapi.call_errors(tmp_path / "pipeline.config", message, size):
            raise ValueError(error)

    assert_one_line_error(call, InputError, "pipeline.config", *words)


@pytest.mark.usefixtures("built_before")
def test_a_diverged_checkpoint_is_named_with_its_first_bad_variable(tiny_model, tmp_path):
    import tensorflow as tf

    model = odapi.load_model(tiny_model / "pipeline.config", tiny_model / "checkpoint" / "ckpt-0")
    variable = next(v for v in model._box_predictor.variables if "ClassPredictor/bias" in v.name)
    variable.assign(tf.tensor_scatter_nd_update(variable, [[2], [3]], [np.nan, np.inf]))
    tf.train.Checkpoint(model=model).write(str(tmp_path / "ckpt-0"))
    shutil.copy(tiny_model / "pipeline.config", tmp_path)
    assert_one_line_error(
        lambda: export(tmp_path, tmp_path / "out"),
        InputError,
        "ckpt-0",
        "1 of 326 variables",
        "ClassPredictor/bias",
        f"2 of {variable.shape[0]} values",
    )
    assert not (tmp_path / "out").exists()


def test_outputs_that_overflow_are_not_called_a_fault_of_freezing(tmp_path):
    import tensorflow as tf

    heads = {"box_encodings": tf.zeros([1, 5, 4]), "class_predictions_with_background": tf.zeros([1, 5, 3])}
    export_stage._require_finite_heads(tmp_path / "ckpt-0", heads)
    heads["class_predictions_with_background"] += [0.0, np.inf, np.nan]
    assert_one_line_error(
        lambda: export_stage._require_finite_heads(tmp_path / "ckpt-0", heads), InputError, "10 of 15 values"
    )


def test_the_frozen_graph_is_the_same_bytes_whatever_order_tensorflow_gives(
    tiny_model, tiny_folder, tmp_path
):
    graph = read_graph(tiny_folder)
    content = graph.SerializeToString(deterministic=True)
    nodes = [type(node).FromString(node.SerializeToString()) for node in graph.node]
    np.random.default_rng(0).shuffle(nodes)
    del graph.node[:]
    graph.node.extend(nodes)
    assert graph.SerializeToString(deterministic=True) != content
    export_stage._sort_nodes(graph)
    assert graph.SerializeToString(deterministic=True) == content
    known = set()
    for node in graph.node:
        assert {name.lstrip("^").split(":")[0] for name in node.input} <= known
        known.add(node.name)


def test_spec_holds_every_setting_and_survives_the_round_trip(tiny_folder, tmp_path):
    spec = load_spec(tiny_folder / "spec.json")
    assert (spec.input.height, spec.input.width, spec.input.batch) == (96, 128, 1)
    assert spec.input.scale == pytest.approx((2 / 255,) * 3) and spec.input.offset == (-1.0, -1.0, -1.0)
    assert spec.heads.num_classes == 3 and spec.heads.background_column and spec.heads.num_columns == 4
    assert spec.heads.num_anchors == len(np.load(tiny_folder / "anchors.npy"))
    assert dataclasses.astuple(spec.heads.box_coder) == (10, 10, 5, 5)
    assert spec.heads.scores.converter == "sigmoid" and spec.heads.scores.logit_scale == 1
    assert spec.nms.max_detections_per_class == 20 and spec.nms.max_total_detections == 40
    assert spec.nms.score_threshold == np.float32(0.01) and spec.nms.iou_threshold == np.float32(0.6)
    assert spec.label_names() == {1: "bolt", 2: "nut", 3: "gear"}
    copy = tmp_path / "copy.json"
    copy.write_text(spec.to_json())
    assert load_spec(copy) == spec


def test_log_records_hashes_versions_and_checks(tiny_folder):
    record = last_record(tiny_folder, "export")
    assert record is not None
    assert set(record["outputs"]) == {"frozen.pb", "anchors.npy", "spec.json"}
    assert record["checks"]["frozen_vs_eager_max_abs_err"] < 1e-3
    assert record["checks"]["frozen_vs_eager_is_decisive"] is True
    assert record["checks"]["frozen_vs_eager_times_noise"] < 3
    assert record["checks"]["variables_restored"] > 100
    assert record["checks"]["spec_vs_odapi_box_max_err"] < 1e-5
    assert record["checks"]["spec_vs_odapi_detections"] > 30
    assert record["settings"]["checkpoint"] == "ckpt-0"
    assert record["versions"]["tensorflow"].startswith("2.")


@pytest.mark.usefixtures("built_before")
def test_second_export_is_up_to_date_and_a_changed_output_is_not(tiny_model, tiny_folder, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(tiny_folder, folder)
    result = export(tiny_model, folder)
    assert result.is_up_to_date and str(tiny_model / "checkpoint" / "ckpt-0") in result.note
    (folder / "anchors.npy").write_bytes(b"damaged")
    assert not export(tiny_model, folder).is_up_to_date
    assert np.load(folder / "anchors.npy").shape[1] == 4
    assert (folder / "frozen.pb").read_bytes() == (tiny_folder / "frozen.pb").read_bytes()
    assert len(read_log(folder)) == 2


# ---- A change that is not the network's -------------------------------------------------------------------


def changed_copy(tiny_model: Path, folder: Path, *pairs: tuple[str, str]) -> Path:
    """The tiny model with other lines in its config, and its classes renamed."""
    shutil.copytree(tiny_model, folder)
    text = TINY_CONFIG
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    (folder / "pipeline.config").write_text(text)
    labels = (tiny_model / "label_map.pbtxt").read_text()
    (folder / "label_map.pbtxt").write_text(labels.replace("nut", "washer"))
    return folder


def identity(path: Path) -> tuple[int, int, bytes]:
    return path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()


THRESHOLD = ("score_threshold: 0.01 iou_threshold: 0.6", "score_threshold: 0.3 iou_threshold: 0.45")


def test_another_label_or_threshold_keeps_the_network_and_gives_the_odapis_detections(
    tiny_model, tiny_converted, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_converted, folder)
    before = {name: identity(folder / name) for name in ("frozen.pb", "anchors.npy")}
    source = changed_copy(tiny_model, tmp_path / "source", THRESHOLD)
    monkeypatch.setattr(export_stage, "_make_network", lambda *arguments: pytest.fail("made anew"))
    result = export(source, folder)
    assert "frozen.pb and anchors.npy kept" in result.note and not result.is_up_to_date
    assert {name: identity(folder / name) for name in before} == before
    first = read_log(folder)[0]
    assert result.record["checks"]["network_kept_from"] == first["time"]
    assert result.record["checks"]["variables_restored"] == first["checks"]["variables_restored"]
    assert result.record["outputs"]["frozen.pb"] == first["outputs"]["frozen.pb"]
    assert export(source, folder).is_up_to_date
    assert convert(folder).is_up_to_date

    picture = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    model = odapi.load_model(source / "pipeline.config", source / "checkpoint" / "ckpt-0")
    expected = odapi.detect(model, picture)
    found = Detector.open(folder, "onnxruntime").detect(picture)
    assert len(expected) > 3 and min(row["score"] for row in expected) > 0.3
    assert found.class_ids.tolist() == [row["category_id"] for row in expected]
    np.testing.assert_allclose(found.scores, [row["score"] for row in expected], atol=1e-4)
    assert {"bolt", "washer", "gear"} >= set(found.names) and "nut" not in found.names


@pytest.mark.parametrize(
    "change", ["anchors", "extractor", "checkpoint", "batch", "force", "damaged", "version", "record"]
)
def test_what_concerns_the_network_makes_it_anew(tiny_model, tiny_folder, tmp_path, monkeypatch, change):
    class MadeAnewError(Exception):
        pass

    def make(*arguments):
        raise MadeAnewError

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    pairs = {
        "anchors": [("anchor_scale: 4", "anchor_scale: 3")],
        "extractor": [("additional_layer_depth: 16", "additional_layer_depth: 24")],
    }
    source = changed_copy(tiny_model, tmp_path / "source", THRESHOLD, *pairs.get(change, ()))
    options = {"batch": {"batch": None}, "force": {"force": True}}.get(change, {})
    if change == "checkpoint":
        data = source / "checkpoint" / "ckpt-0.data-00000-of-00001"
        data.write_bytes(data.read_bytes()[:-1] + b"!")
    if change == "damaged":
        content = (folder / "frozen.pb").read_bytes()
        (folder / "frozen.pb").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if change == "version":
        monkeypatch.setattr(odapi, "version", lambda: "2.8.1")
    if change == "record":
        log = read_log(folder)[-1]
        del log["settings"]["network_sha256"]  # as odtrt wrote it before
        (folder / "log.jsonl").unlink()
        append_record(folder, log)
    monkeypatch.setattr(export_stage, "_make_network", make)
    with pytest.raises(MadeAnewError):
        export(source, folder, **options)


@pytest.mark.parametrize("fault", ["no links", "changed meanwhile"])
def test_the_files_that_are_kept_are_those_that_were_checked(
    tiny_model, tiny_folder, tmp_path, monkeypatch, fault
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    content = (folder / "frozen.pb").read_bytes()
    link = os.link

    def hard_link(old, new):
        if fault == "no links":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        other = folder / "other"
        other.write_bytes(b"of another export")
        os.replace(other, old)
        link(old, new)

    monkeypatch.setattr(os, "link", hard_link)
    export(changed_copy(tiny_model, tmp_path / "source", THRESHOLD), folder)
    assert (folder / "frozen.pb").read_bytes() == content
    assert set(sealed(folder, "frozen.pb", "anchors.npy", "spec.json")) == set(export_stage.OUTPUTS)


def test_dynamic_batch_runs_any_batch(tiny_with_any_batch):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 96, 128, 3)).astype(np.float32)
    graph = read_graph(tiny_with_any_batch)
    together = run_frozen(graph, images)["class_logits"]
    for i in range(3):
        np.testing.assert_allclose(
            together[i], run_frozen(graph, images[i : i + 1])["class_logits"][0], atol=1e-4
        )
    assert load_spec(tiny_with_any_batch / "spec.json").input.batch is None


@pytest.mark.usefixtures("built_before")
def test_training_directory_with_optimizer_slots_and_many_checkpoints(tiny_model, tmp_path):
    import tensorflow as tf

    training = tmp_path / "training"
    model = odapi.load_model(tiny_model / "pipeline.config", tiny_model / "checkpoint" / "ckpt-0")
    optimizer = tf.keras.optimizers.legacy.Adam()
    variables = model.feature_extractor.trainable_variables
    optimizer.apply_gradients([(tf.zeros_like(v), v) for v in variables])
    saver = tf.train.Checkpoint(model=model, optimizer=optimizer, step=tf.Variable(46))
    for number in (0, 6, 46, 301):
        saver.write(str(training / f"ckpt-{number}"))
    shutil.copy(tiny_model / "pipeline.config", training)
    assert find_model(training).checkpoint.name == "ckpt-301"
    (training / "checkpoint").write_text('model_checkpoint_path: "/gone/on/another/machine/ckpt-46"\n')
    assert find_model(training).checkpoint.name == "ckpt-46"
    assert find_model(training / "ckpt-6.index").checkpoint.name == "ckpt-6"
    assert export(training, tmp_path / "out").record["checks"]["variables_restored"] > 100


def test_exported_folder_with_saved_model_only(tiny_model, tiny_folder, tmp_path):
    from google.protobuf import text_format
    from object_detection import exporter_lib_v2
    from object_detection.protos import pipeline_pb2

    message = text_format.Parse(TINY_CONFIG, pipeline_pb2.TrainEvalPipelineConfig())
    exported = tmp_path / "exported"
    exporter_lib_v2.export_inference_graph(
        "image_tensor", message, str(tiny_model / "checkpoint"), str(exported)
    )
    shutil.rmtree(exported / "checkpoint")
    export(exported, tmp_path / "out")
    image = np.random.default_rng(4).uniform(-1, 1, (1, 96, 128, 3)).astype(np.float32)
    expected = run_frozen(read_graph(tiny_folder), image)
    found = run_frozen(read_graph(tmp_path / "out"), image)
    np.testing.assert_array_equal(found["class_logits"], expected["class_logits"])
    np.testing.assert_array_equal(found["box_encodings"], expected["box_encodings"])


def checkpoints(folder: Path, *names: str, state: str | None = None) -> Path:
    """Files that have the names of checkpoints, for those who only look for them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.index").write_bytes(b"0123")
        (folder / f"{name}.data-00000-of-00001").write_bytes(b"0123")
    (folder / "pipeline.config").write_text("")
    if state is not None:
        (folder / "checkpoint").write_text(state)
    return folder


@pytest.mark.parametrize(
    "named",
    ["ckpt-3", "/data/train/ckpt-3", "C:\\train\\ckpt-3", "train\\ckpt-3", "../elsewhere/ckpt-3", "./ckpt-3"],
)
def test_the_checkpoint_that_the_state_names_is_taken_from_where_it_is_now(tmp_path, named):
    import tensorflow as tf
    from google.protobuf import text_format
    from tensorflow.python.training import checkpoint_state_pb2

    message = checkpoint_state_pb2.CheckpointState(model_checkpoint_path=named)
    message.all_model_checkpoint_paths.extend([named, "ckpt-5"])
    message.all_model_checkpoint_timestamps.append(1.5)
    folder = checkpoints(tmp_path, "ckpt-3", "ckpt-5", state=text_format.MessageToString(message))
    files = find_model(folder)
    assert files.checkpoint == folder / "ckpt-3" and str(folder / "checkpoint") in files.choice
    theirs = tf.train.latest_checkpoint(str(folder))
    assert theirs is None or Path(theirs).name == "ckpt-3"


def test_a_state_with_a_path_below_its_folder_is_followed(tmp_path):
    folder = checkpoints(tmp_path, "ckpt-3", "best/ckpt-3", state='model_checkpoint_path: "best/ckpt-3"')
    assert find_model(folder).checkpoint == folder / "best" / "ckpt-3"


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ('model_checkpoint_path: "C:\\\\train\\\\ckpt-4"', "ckpt-4"),
        ('model_checkpoint_path: "/data/ckpt-30"', "ckpt-30"),
        ("", "no checkpoint"),
        ("model_checkpoint_path: ckpt-3", "CheckpointState"),
        ("<html></html>", "CheckpointState"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_state_that_cannot_be_followed_is_refused(tmp_path, state, word):
    folder = checkpoints(tmp_path, "ckpt-3", "ckpt-5", state=state)
    assert_one_line_error(lambda: find_model(folder), InputError, str(folder / "checkpoint"), word)


def test_without_a_state_the_highest_number_is_taken_and_said(tmp_path):
    folder = checkpoints(tmp_path, "ckpt-9", "ckpt-10", "ckpt-2", "other-99")
    files = find_model(folder)
    assert files.checkpoint.name == "ckpt-10" and "highest number of 3" in files.choice
    best = checkpoints(tmp_path / "named", "best")
    assert find_model(best).checkpoint.name == "best"
    two = checkpoints(tmp_path / "two", "best", "last")
    assert_one_line_error(lambda: find_model(two), InputError, "best, last", "name one")


SAVED = "saved_model/variables/variables"


@pytest.mark.parametrize(
    ("names", "pointed", "taken"),
    [
        ([SAVED], ".", SAVED),
        ([SAVED], "saved_model", SAVED),
        ([SAVED], "saved_model/variables", SAVED),
        ([SAVED], SAVED, SAVED),
        ([SAVED], "saved_model/saved_model.pb", SAVED),
        (["checkpoint/ckpt-0", SAVED], ".", "checkpoint/ckpt-0"),
        (["checkpoint/ckpt-0"], "checkpoint", "checkpoint/ckpt-0"),
        (["checkpoint/ckpt-0"], "pipeline.config", "checkpoint/ckpt-0"),
        (["ckpt-0 [best]"], "ckpt-0 [best]", "ckpt-0 [best]"),
        (["ckpt-0 [best]"], "ckpt-0 [best].data-00000-of-00001", "ckpt-0 [best]"),
        (["a [1]/ckpt-1"], "a [1]", "a [1]/ckpt-1"),
    ],
)
def test_what_users_point_at_is_understood(tmp_path, names, pointed, taken):
    folder = checkpoints(tmp_path, *names)
    if names == [SAVED]:
        (folder / "saved_model" / "saved_model.pb").write_bytes(b"graph")
    files = find_model(folder / pointed)
    assert files.checkpoint == folder / taken and files.pipeline == folder / "pipeline.config"
    assert files.root == ("_model" if taken == SAVED else "model")


@pytest.mark.parametrize(
    ("extra", "pointed", "kind", "words"),
    [
        (["model.ckpt.meta", "frozen_inference_graph.pb"], ".", UnsupportedError, ("TensorFlow 1",)),
        (["model.ckpt.meta"], "model.ckpt", UnsupportedError, ("TensorFlow 1",)),
        (["model.ckpt.meta"], "model.ckpt.meta", UnsupportedError, ("TensorFlow 1",)),
        (["x/frozen_inference_graph.pb"], "x", UnsupportedError, ("TensorFlow 1", "frozen_inference_graph")),
        (["x/frozen.pb", "x/spec.json"], "x", InputError, ("odtrt convert",)),
        (["m.tar.gz"], "m.tar.gz", InputError, ("archive", "unpack")),
        (["m.tflite"], "m.tflite", InputError, ("TensorFlow Lite", "expected")),
        (["m.pb"], "m.pb", InputError, ("frozen graph", "expected")),
        ([], "model.ckpt-7", InputError, ("not found", "model.ckpt")),
        (["up/down/ckpt-0.index"], "up", InputError, ("down",)),
    ],
)
def test_what_cannot_be_taken_is_named_for_what_it_is(tmp_path, extra, pointed, kind, words):
    folder = checkpoints(tmp_path, "model.ckpt")
    for name in extra:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"something")
    assert_one_line_error(lambda: find_model(folder / pointed), kind, *words)


def test_names_that_tensorflow_takes_for_patterns_are_read(tmp_path):
    import tensorflow as tf

    folder = tmp_path / "runs [3]" / "a*b?"
    folder.mkdir(parents=True)
    saved = tf.train.Checkpoint(v=tf.Variable([1.0, 2.0]))
    tf.train.Checkpoint(model=saved).write(str(tmp_path / "plain"))
    for file in tmp_path.glob("plain.*"):
        shutil.copy(file, folder / file.name.replace("plain", "ckpt-0 [best]"))
    model = tf.train.Checkpoint(v=tf.Variable([0.0, 0.0]))
    status = odapi.restore(model, folder / "ckpt-0 [best]", folder / "pipeline.config", None)
    status.assert_existing_objects_matched()
    np.testing.assert_array_equal(model.v.numpy(), [1, 2])


def test_a_tensorflow_1_checkpoint_without_its_meta_file_is_named(tmp_path):
    import tensorflow as tf

    prefix = tmp_path / "model.ckpt"
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=["a/weights"], shape_and_slices=[""], tensors=[tf.zeros([3])]
    )
    assert_one_line_error(
        lambda: odapi.restore(tf.train.Checkpoint(), prefix, tmp_path / "pipeline.config", None),
        UnsupportedError,
        "TensorFlow 1",
    )


def damaged_copy(tiny_model: Path, folder: Path) -> Path:
    shutil.copytree(tiny_model, folder)
    return folder


def test_missing_checkpoint(tiny_model, tmp_path):
    model = damaged_copy(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "checkpoint")
    assert_one_line_error(lambda: export(model, tmp_path / "out"), InputError, str(model), "no checkpoint")


def test_missing_source(tmp_path):
    assert_one_line_error(lambda: export(tmp_path / "none", tmp_path / "out"), InputError, "none", "expected")


@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
def test_empty_checkpoint_file(tiny_model, tmp_path, suffix):
    model = damaged_copy(tiny_model, tmp_path / "model")
    (model / "checkpoint" / f"ckpt-0{suffix}").write_bytes(b"")
    assert_one_line_error(lambda: export(model, tmp_path / "out"), InputError, suffix, "0 bytes")


@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
@pytest.mark.usefixtures("built_before")
def test_truncated_checkpoint_file(tiny_model, tmp_path, suffix):
    model = damaged_copy(tiny_model, tmp_path / "model")
    path = model / "checkpoint" / f"ckpt-0{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_one_line_error(lambda: export(model, tmp_path / "out"), InputError, "ckpt-0", "truncated")
    assert not (tmp_path / "out").exists()


def test_missing_data_shard(tiny_model, tmp_path):
    model = damaged_copy(tiny_model, tmp_path / "model")
    (model / "checkpoint" / "ckpt-0.data-00000-of-00001").unlink()
    assert_one_line_error(lambda: export(model, tmp_path / "out"), InputError, "0 of 1 files")


def test_config_of_another_model(tiny_model, tmp_path):
    model = damaged_copy(tiny_model, tmp_path / "model")
    other = TINY_CONFIG.replace("max_level: 6", "max_level: 7")
    (model / "pipeline.config").write_text(other)
    assert_one_line_error(lambda: export(model, tmp_path / "out"), InputError, "does not fit", "lacks")


def test_wrong_class_count(tiny_model, tmp_path):
    model = damaged_copy(tiny_model, tmp_path / "model")
    (model / "pipeline.config").write_text(TINY_CONFIG.replace("num_classes: 3", "num_classes: 7"))
    assert_one_line_error(
        lambda: export(model, tmp_path / "out"), InputError, "does not fit", "num_classes is 7"
    )


@pytest.mark.parametrize(
    "content", [b"hello, world\n", b"\x89PNG\r\n\x1a\n\xff\xfe", b"", b"train_config {}"]
)
def test_not_a_config(tiny_model, tmp_path, content):
    model = damaged_copy(tiny_model, tmp_path / "model")
    (model / "pipeline.config").write_bytes(content)
    assert_one_line_error(lambda: export(model, tmp_path / "out"), InputError, "pipeline.config", "expected")


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("model { ssd {", "model { center_net {", "center_net"),
        ('"ssd_mobilenet_v2_fpn_keras"', '"ssd_imaginary_keras"', "ssd_imaginary_keras"),
        ("score_converter: SIGMOID", "score_converter: SIGMOID calibration_config { }", "calibration_config"),
        ("score_threshold: 0.01", "score_threshold: 0.01 soft_nms_sigma: 0.5", "soft_nms_sigma"),
        ("score_threshold: 0.01", "score_threshold: 0.01 use_combined_nms: true", "use_combined_nms"),
        ("height: 96 width: 128", "height: 96 width: 128 resize_method: AREA", "AREA"),
        ("height: 96 width: 128", "height: 96 width: 128 convert_to_grayscale: true", "grayscale"),
        ("fixed_shape_resizer { height: 96 width: 128 }", "identity_resizer { }", "identity_resizer"),
        (
            "fixed_shape_resizer { height: 96 width: 128 }",
            "keep_aspect_ratio_resizer { min_dimension: 96 max_dimension: 128 }",
            "--input-size",
        ),
        (
            "faster_rcnn_box_coder { y_scale: 10 x_scale: 10 height_scale: 5 width_scale: 5 }",
            "square_box_coder { }",
            "square_box_coder",
        ),
    ],
)
def test_unsupported_settings_are_named(tiny_model, tmp_path, old, new, word):
    model = damaged_copy(tiny_model, tmp_path / "model")
    assert old in TINY_CONFIG
    text = TINY_CONFIG.replace(old, new)
    if "center_net" in new:
        text = "model { center_net { num_classes: 3 } }"
    (model / "pipeline.config").write_text(text)
    assert_one_line_error(lambda: export(model, tmp_path / "out"), UnsupportedError, word)
    assert not (tmp_path / "out").exists()


def test_input_size_that_contradicts_the_config(tiny_model, tmp_path):
    assert_one_line_error(
        lambda: export(tiny_model, tmp_path / "out", input_size=(64, 64)), InputError, "96x128", "64x64"
    )


@pytest.mark.corpus
def test_what_users_bring_by_mistake(corpus, odapi_modules, tmp_path):
    """Two settings of which one excludes the other are no mistake: the OD API takes the last."""
    from google.protobuf import text_format

    read_by_the_od_api = odapi_modules("utils.config_util").get_configs_from_pipeline_file
    negative = corpus / "negative"
    cases = sorted(path for path in negative.iterdir())
    assert cases
    for case in cases:
        if case.is_dir():
            assert_one_line_error(
                lambda c=case: export(c, tmp_path / "out"), InputError, "LFS", "git lfs pull"
            )
        elif "oneof" in case.name:
            assert read_pipeline(case).message.model == read_by_the_od_api(str(case))["model"]
        else:
            with pytest.raises(text_format.ParseError):
                read_by_the_od_api(str(case))
            assert_one_line_error(lambda c=case: read_pipeline(c), InputError, case.name)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("built_before")
def test_unwritable_folder(tiny_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_one_line_error(
        lambda: export(tiny_model, tmp_path / "file" / "out"), InputError, "cannot be written"
    )


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.usefixtures("built_before")
def test_full_disk_or_interrupt_leaves_nothing_half_written(tiny_model, tmp_path, monkeypatch, fault):
    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(export_stage.np, "save", fail)
    with pytest.raises((OdtrtError, KeyboardInterrupt)) as caught:
        export(tiny_model, tmp_path / "deep" / "out")
    if isinstance(fault, OSError):
        assert "disk is full" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_that_the_later_stages_refuse_to_read(tmp_path):
    (tmp_path / "pipeline.config").write_text(TINY_CONFIG)
    settings = read_pipeline(tmp_path / "pipeline.config")
    anchors = np.full((SPEC.heads.num_anchors, 4), 0.5, np.float32)
    export_stage._check_values(settings, SPEC, anchors)
    anchors[2, 3] = 0
    assert_one_line_error(
        lambda: export_stage._check_values(settings, SPEC, anchors),
        CheckError,
        "anchor_generator: anchor 2 is",
    )
    wrong = dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, scale=(1.0, 0.0, 1.0)))
    assert_one_line_error(
        lambda: export_stage._check_values(settings, wrong, anchors + 1), CheckError, "input.scale"
    )
