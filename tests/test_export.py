"""Chapter 1 against TensorFlow and the OD API themselves."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_CONFIG

from odtrt_lib import export as export_room
from odtrt_lib import odapi
from odtrt_lib.errors import CheckError, InputError, OdtrtError, UnsupportedError
from odtrt_lib.export import export, find_model, run_frozen
from odtrt_lib.folder import last_record, read_log
from odtrt_lib.spec import load_spec, read_pipeline


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

    monkeypatch.setattr(export_room, "_trace", trace_with_nms)
    assert_one_line_error(lambda: export(tiny_model, tmp_path / "out"), CheckError, "NonMaxSuppression")
    assert not (tmp_path / "out").exists()


def test_a_frozen_graph_that_differs_from_the_model_is_caught(tiny_model, tmp_path, monkeypatch):
    freeze = export_room._freeze

    def freeze_badly(concrete):
        graph = freeze(concrete)
        constants = [node.attr["value"].tensor for node in graph.node if node.op == "Const"]
        for tensor in constants:
            if len(tensor.tensor_shape.dim) == 4:
                tensor.tensor_content = bytes(len(tensor.tensor_content))
        return graph

    monkeypatch.setattr(export_room, "_freeze", freeze_badly)
    assert_one_line_error(lambda: export(tiny_model, tmp_path / "out"), CheckError, "eager")


def test_a_kernel_that_freezing_changes_by_a_thousandth_is_caught(tiny_model, tmp_path, monkeypatch):
    import tensorflow as tf

    freeze = export_room._freeze

    def freeze_badly(concrete):
        graph = freeze(concrete)
        kernels = [n.attr["value"].tensor for n in graph.node if n.op == "Const"]
        kernel = next(tensor for tensor in kernels if len(tensor.tensor_shape.dim) == 4)
        kernel.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(kernel) * np.float32(1.001)))
        return graph

    monkeypatch.setattr(export_room, "_freeze", freeze_badly)
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


def test_anchors_of_another_generator_are_caught(tiny_model, tmp_path):
    settings = read_pipeline(tiny_model / "pipeline.config")
    corners = np.array([[0.0, 0.0, 0.5, 0.5]] * 10, np.float32)
    assert_one_line_error(
        lambda: export_room._checked_anchors(settings, (96, 128), corners), CheckError, "anchor_generator"
    )
    own = export_room.anchors_from_config(settings, (96, 128)).astype(np.float64)
    moved = np.hstack([own[:, :2] - own[:, 2:] / 2, own[:, :2] + own[:, 2:] / 2])
    moved[5] += 1e-4
    assert_one_line_error(
        lambda: export_room._checked_anchors(settings, (96, 128), moved), CheckError, "differ"
    )


def test_spec_holds_every_setting_and_survives_the_round_trip(tiny_folder):
    spec = load_spec(tiny_folder / "spec.json")
    assert (spec.input.height, spec.input.width, spec.input.batch) == (96, 128, 1)
    assert spec.input.scale == pytest.approx((2 / 255,) * 3) and spec.input.offset == (-1.0, -1.0, -1.0)
    assert spec.heads.num_classes == 3 and spec.heads.background_column and spec.heads.num_columns == 4
    assert spec.heads.num_anchors == len(np.load(tiny_folder / "anchors.npy"))
    assert dataclasses.astuple(spec.box_coder) == (10, 10, 5, 5)
    assert spec.scores.converter == "sigmoid" and spec.scores.logit_scale == 1
    assert spec.nms.max_detections_per_class == 20 and spec.nms.max_total_detections == 40
    assert spec.nms.score_threshold == np.float32(0.01) and spec.nms.iou_threshold == np.float32(0.6)
    assert spec.label_names() == {1: "bolt", 2: "nut", 3: "gear"}
    copy = tiny_folder.parent / "copy.json"
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
    assert record["versions"]["tensorflow"].startswith("2.")


def test_second_export_is_up_to_date_and_a_changed_output_is_not(tiny_model, tiny_folder, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(tiny_folder, folder)
    assert export(tiny_model, folder).is_up_to_date
    (folder / "anchors.npy").write_bytes(b"damaged")
    assert not export(tiny_model, folder).is_up_to_date
    assert np.load(folder / "anchors.npy").shape[1] == 4
    assert len(read_log(folder)) == 2


def test_dynamic_batch_runs_any_batch(tiny_model, tmp_path):
    export(tiny_model, tmp_path / "dynamic", batch=None)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 96, 128, 3)).astype(np.float32)
    graph = read_graph(tmp_path / "dynamic")
    together = run_frozen(graph, images)["class_logits"]
    for i in range(3):
        np.testing.assert_allclose(
            together[i], run_frozen(graph, images[i : i + 1])["class_logits"][0], atol=1e-4
        )
    assert load_spec(tmp_path / "dynamic" / "spec.json").input.batch is None


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
def test_what_users_bring_by_mistake(corpus, tmp_path):
    negative = corpus / "negative"
    cases = sorted(path for path in negative.iterdir())
    assert cases
    for case in cases:
        if case.is_dir():
            assert_one_line_error(
                lambda c=case: export(c, tmp_path / "out"), InputError, "LFS", "git lfs pull"
            )
        else:
            assert_one_line_error(lambda c=case: read_pipeline(c), InputError, case.name)
    assert not (tmp_path / "out").exists()


def test_unwritable_folder(tiny_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_one_line_error(
        lambda: export(tiny_model, tmp_path / "file" / "out"), InputError, "cannot be written"
    )


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_full_disk_or_interrupt_leaves_nothing_half_written(tiny_model, tmp_path, monkeypatch, fault):
    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(export_room.np, "save", fail)
    with pytest.raises((OdtrtError, KeyboardInterrupt)) as caught:
        export(tiny_model, tmp_path / "deep" / "out")
    if isinstance(fault, OSError):
        assert "disk is full" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
