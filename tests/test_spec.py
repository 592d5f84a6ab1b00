"""pipeline.config and spec.json: what is read, and what a reader is told about a damaged or foreign one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import ClassVar

import numpy as np
import pytest
from conftest import TINY_CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spec_cases import SPEC

from odtrt_lib import tensors
from odtrt_lib.bundle.serving import triton_config
from odtrt_lib.errors import InputError, OdtrtError
from odtrt_lib.export.pipeline import read_pipeline
from odtrt_lib.folder import SPEC_PARTS, part_sha256
from odtrt_lib.nms import postprocess
from odtrt_lib.preprocess import preprocess
from odtrt_lib.spec import FAMILIES, MAX_SPEC_BYTES, Resizer, load_spec, problems

FUZZ = settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

VALUES = [
    None,
    True,
    0,
    1,
    2,
    3,
    8,
    64,
    4097,
    2**31,
    10**30,
    0.0,
    0.5,
    1.0,
    -1.0,
    1e-45,
    1e39,
    math.inf,
    math.nan,
]
VALUES += [
    "",
    "a\nb",
    "\ud800",
    "sigmoid",
    "softmax",
    "identity",
    "ssd",
    "bilinear",
    "fixed_shape",
    [],
    {},
    [0.5, 1, 2],
]
SCHEMA_1 = """\
{
  "schema": 1,
  "name": "small",
  "source": {
    "pipeline_sha256": "0000000000000000000000000000000000000000000000000000000000000000",
    "checkpoint": "ckpt-0",
    "checkpoint_sha256": "1111111111111111111111111111111111111111111111111111111111111111",
    "feature_extractor": "ssd_mobilenet_v2_keras",
    "odapi_version": "2.8.0",
    "tensorflow_version": "2.20.0"
  },
  "input": {
    "height": 8,
    "width": 8,
    "resizer": {
      "kind": "keep_aspect_ratio",
      "min_dimension": 8,
      "max_dimension": 8,
      "pad_to_max_dimension": true,
      "pad_value": [0.0, 0.0, 0.0],
      "method": "bilinear"
    },
    "scale": [0.0078125, 0.0078125, 0.0078125],
    "offset": [-1.0, -1.0, -1.0],
    "batch": 1,
    "name": "image"
  },
  "heads": {
    "num_anchors": 5,
    "num_classes": 2,
    "background_column": true,
    "box_encodings": "box_encodings",
    "class_logits": "class_logits"
  },
  "box_coder": {"y_scale": 10.0, "x_scale": 10.0, "height_scale": 5.0, "width_scale": 5.0},
  "scores": {"converter": "sigmoid", "logit_scale": 1.0},
  "nms": {
    "score_threshold": 0.25,
    "iou_threshold": 0.6000000238418579,
    "max_detections_per_class": 4,
    "max_total_detections": 8,
    "class_agnostic": false,
    "change_coordinate_frame": true
  },
  "labels": [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
}
"""
OF_SCHEMA_1 = json.loads(SCHEMA_1)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def as_json(spec=SPEC):
    return json.loads(spec.to_json())


def places(data, path=()):
    """The path of every value in a JSON document."""
    yield path
    if isinstance(data, (dict, list)):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from places(data[key], (*path, key))


def changed(data, path, value):
    if not path:
        return value
    copy = data.copy()
    copy[path[0]] = changed(data[path[0]], path[1:], value) if len(path) > 1 else value
    return copy


def in_floats(data):
    return json.loads(json.dumps(data), parse_int=float)


def set_to(path, value):
    """``spec.json`` with another value at ``path``, e.g. ``nms.iou_threshold``."""
    keys = [int(key) if key.isdigit() else key for key in path.split(".")]
    return changed(as_json(), keys, value)


def refused(path, data):
    """The one-line message for a ``spec.json`` of that content."""
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    with pytest.raises(InputError) as caught:
        load_spec(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400
    return message


def assert_serves(spec):
    """The later stages take a spec that was read: nothing but an OdtrtError comes out of them."""
    network, heads = spec.input, spec.heads
    if network.height * network.width <= 64**2:
        image = np.zeros((8, 8, 3), np.uint8)
        try:
            assert np.isfinite(preprocess(image, network)[0]).all()
        except OdtrtError:
            assert network.resizer.kind == "keep_aspect_ratio"
    if heads.num_anchors * heads.num_columns <= 10**4 and spec.nms.max_total_detections <= 10**4:
        encodings = np.zeros((1, heads.num_anchors, 4), np.float32)
        logits = np.ones((1, heads.num_anchors, heads.num_columns), np.float32)
        anchors, windows = (
            np.full((heads.num_anchors, 4), 0.5, np.float32),
            np.array([[0, 0, 1, 1]], np.float32),
        )
        found = postprocess(encodings, logits, anchors, spec, windows)
        for column in found.classes[0, : found.num_detections[0]]:
            assert spec.labels[column].id == column + 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spec.json"


class TestReader:
    def test_what_was_written_is_read(self, path):
        path.write_text(SPEC.to_json())
        assert load_spec(path) == SPEC

    @pytest.mark.parametrize(
        ("field", "value", "expected"),
        [
            ("schema", 99, "schema 99, expected 2 (or 1, of older versions)"),
            ("schema", True, "schema True"),
            ("schema", 1.0, "schema 1.0"),
            ("input", None, "spec.input: None, expected an object"),
            ("input.height", "320", "spec.input.height: '320', expected a whole"),
            ("input.height", 320.0, "input.height: 320.0"),
            ("input.height", True, "input.height: True"),
            ("input.height", 0, "input.height: 0, expected 1 to 16777215"),
            ("input.height", 9, "resizer.max_dimension, 8"),
            ("input.width", 10**30, "input.width: 1000"),
            ("input.batch", 0, "input.batch: 0, expected 1 to"),
            ("input.scale", [1, 2], "input.scale: a list of 2, expected 3 numbers"),
            ("input.scale", [1, 2, "x"], "input.scale[2]: 'x', expected a number"),
            ("input.scale", [1, 0, 1], "expected a positive, finite float32"),
            ("input.scale", [1, 1, -1], "expected a positive, finite float32"),
            ("input.scale", [1, 1, 10**400], "input.scale[2]: 1000"),
            ("input.scale", [1, 1, 1e39], "expected a positive, finite float32"),
            ("input.offset", [0, math.nan, 0], "expected a finite float32"),
            ("input.resizer.kind", "stretch", "'stretch', expected fixed_shape or keep_aspect_ratio"),
            ("input.resizer.kind", "fixed_shape", "expected no min_dimension"),
            ("input.resizer.method", "nearest", "input.resizer.method: 'nearest', expected bilinear"),
            ("input.resizer.min_dimension", 9, "expected 1 <= min_dimension <= max_dimension"),
            ("input.resizer.max_dimension", None, "expected 1 <= min_dimension <= max_dimension"),
            ("input.resizer.pad_value", [0, 0, math.inf], "expected a finite float32"),
            ("heads", None, "spec.heads: None, expected an object"),
            ("heads.family", "yolo", "spec.heads.family: 'yolo' is unknown"),
            ("heads.family", None, "spec.heads.family: None is unknown"),
            ("heads.family", ["ssd"], "spec.heads.family: a list of 1 is unknown"),
            ("heads.num_anchors", 2**30, "heads.num_anchors: 1073741824, expected less than 2^31 scores"),
            ("heads.num_anchors", -1, "expected 1 to"),
            ("heads.num_classes", 3, "labels: 2, "),
            ("heads.background_column", 1, "true or false"),
            ("heads.box_coder", 1, "spec.heads.box_coder: 1, expected an object"),
            ("heads.box_coder.y_scale", 1e-45, "expected a positive, finite float32"),
            ("heads.box_coder.y_scale", 10**400, "heads.box_coder.y_scale: 1000"),
            ("heads.scores.logit_scale", 0, "heads.scores.logit_scale: 0.0, expected a positive"),
            ("heads.scores.converter", "tanh", "sigmoid or softmax or identity"),
            ("nms.score_threshold", math.inf, "expected a finite float32"),
            ("nms.iou_threshold", 2, "nms.iou_threshold: 2.0, expected 0 to 1"),
            ("nms.iou_threshold", -1, "nms.iou_threshold: -1.0, expected 0 to 1"),
            ("nms.iou_threshold", math.nan, "nms.iou_threshold: nan, expected 0 to 1"),
            ("nms.max_detections_per_class", 0, "expected 1 to"),
            ("nms.max_total_detections", 0, "expected 1 to 1048576"),
            ("nms.max_total_detections", 10**9, "expected 1 to 1048576"),
            ("labels", [], "labels: 0, "),
            ("labels", {}, "labels: an object, expected a list"),
            ("labels.0.id", 2, "labels[0].id: 2, expected 1"),
            ("labels.1.id", 10**30, "labels[1].id: 1000"),
            ("labels.0.id", "x", "labels[0].id: 'x', expected a whole"),
            ("labels.0.name", "\ud800", "labels[0].name"),
            ("labels.0.name", None, "labels[0].name: None, expected text"),
        ],
    )
    def test_a_value_is_named_with_its_field(self, path, field, value, expected):
        assert expected in refused(path, set_to(field, value))

    def test_fields_that_are_missing_or_unknown(self, path):
        data = as_json()
        del data["nms"]["iou_threshold"]
        assert "spec.nms.iou_threshold: missing field" in refused(path, data)
        assert "spec.nms.soft_nms_sigma: unknown field" in refused(path, set_to("nms.soft_nms_sigma", 0.1))
        assert "spec.nms: '\\x1b[31m': unknown field" in refused(path, set_to("nms.\x1b[31m", 0))
        assert "spec.box_coder: unknown field" in refused(path, set_to("box_coder", {}))
        for name in ("family", "box_coder", "num_anchors"):
            data = as_json()
            del data["heads"][name]
            assert f"spec.heads.{name}: missing field" in refused(path, data)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "not JSON"),
            (b"{", "not JSON"),
            (b"[]", "schema 'list'"),
            (b"\x00\xff", "not JSON"),
            (b'{"schema": 1, "schema": 1}', "not JSON (a name"),
            (b'{"a":' * 100_000, "not JSON (maximum recursion depth"),
            (b"[" * 100_000, "not JSON (maximum recursion depth"),
            (b" " * (MAX_SPEC_BYTES + 1), "larger than 16 MiB"),
        ],
    )
    def test_not_a_spec(self, path, content, expected):
        assert expected in refused(path, content)

    def test_missing_spec(self, path):
        with pytest.raises(InputError, match="odtrt export"):
            load_spec(path)

    def test_a_flipped_bit_in_any_byte_is_refused_or_read_as_it_stands(self, path):
        content = json.dumps(as_json(), separators=(",", ":")).encode()
        for bit in range(0, 8 * len(content), 5):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                spec = load_spec(path)
            except InputError:
                continue
            assert as_json(spec) == json.loads(flipped)

    def test_a_cut_is_refused(self, path):
        content = json.dumps(as_json()).encode()
        for size in range(0, len(content), 5):
            refused(path, content[:size])

    def test_a_cut_of_schema_1_is_refused(self, path):
        content = SCHEMA_1.encode()
        for size in range(0, len(content) - 3, 5):
            refused(path, content[:size])

    @FUZZ
    @given(content=st.binary(max_size=60))
    def test_any_bytes_are_refused(self, path, content):
        refused(path, content)

    @FUZZ
    @given(place=st.sampled_from(list(places(as_json()))), value=st.sampled_from(VALUES) | ANY_JSON)
    def test_any_value_in_any_place_is_refused_or_serves(self, path, place, value):
        data = changed(as_json(), place, value)
        path.write_text(json.dumps(data))
        try:
            spec = load_spec(path)
        except InputError as error:
            assert "\n" not in str(error)
            return
        assert in_floats(as_json(spec)) == in_floats(data)
        assert_serves(spec)

    @FUZZ
    @given(place=st.sampled_from(list(places(OF_SCHEMA_1))), value=st.sampled_from(VALUES) | ANY_JSON)
    def test_any_value_in_any_place_of_schema_1_is_refused_or_serves(self, path, place, value):
        path.write_text(json.dumps(changed(OF_SCHEMA_1, place, value)))
        try:
            spec = load_spec(path)
        except InputError as error:
            assert "\n" not in str(error)
            return
        assert_serves(spec)


class TestSchema1:
    """Written by odtrt until the heads got a family."""

    def test_it_is_read_as_an_ssd(self, path):
        path.write_text(SCHEMA_1)
        assert load_spec(path) == SPEC
        assert load_spec(path).heads.family == "ssd"

    @pytest.mark.parametrize("name", ["family", "box_coder", "scores"])
    def test_it_takes_no_field_of_todays(self, path, name):
        data = changed(OF_SCHEMA_1, ["heads"], {**OF_SCHEMA_1["heads"], name: as_json()["heads"][name]})
        assert f"spec.heads.{name}: unknown field" in refused(path, data)

    @pytest.mark.parametrize("name", ["heads", "box_coder", "scores", "nms"])
    def test_a_missing_part_is_named(self, path, name):
        message = refused(path, {key: value for key, value in OF_SCHEMA_1.items() if key != name})
        assert "spec." in message and "missing field" in message

    @pytest.mark.parametrize("part", sorted(set(SPEC_PARTS.values())))
    def test_records_keep_the_same_hash_over_either(self, part):
        sections = {name: OF_SCHEMA_1[name] for name in part.partition(": ")[2].split(", ")}
        expected = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()
        assert part_sha256(SCHEMA_1.encode(), part) == expected
        assert part_sha256(SPEC.to_json().encode(), part) == expected

    def test_another_setting_is_another_hash(self):
        def hashes(path, value):
            content = json.dumps(set_to(path, value)).encode()
            return [part_sha256(content, SPEC_PARTS[model]) for model in ("heads.onnx", "detector.onnx")]

        of_heads, of_detector = hashes("name", "other")
        for path, value, changes_heads in (
            ("heads.num_anchors", 6, True),
            ("heads.family", "other", True),
            ("heads.box_coder.y_scale", 9.0, False),
            ("heads.scores.converter", "softmax", False),
            ("nms.iou_threshold", 0.5, False),
        ):
            found = hashes(path, value)
            assert (found[0] != of_heads) == changes_heads and found[1] != of_detector

    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"schema": 2}', b'{"schema": 2, "heads": {}}'])
    def test_of_no_spec_there_is_no_hash(self, content):
        assert part_sha256(content, SPEC_PARTS["heads.onnx"]) is None


@dataclasses.dataclass(frozen=True)
class PointHeads:
    """A family of its own: no anchors, one output, nothing of SSD's."""

    family: ClassVar[str] = "points"
    num_anchors: ClassVar[int] = 0

    num_classes: int
    stride: int
    heatmap: str = "heatmap"

    def in_words(self):
        return {"Stride": str(self.stride)}

    def problems(self):
        if self.stride != 4:
            yield f"stride: {self.stride}, expected 4"


def test_another_family_is_an_entry_in_two_tables(path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "points", PointHeads)
    monkeypatch.setitem(
        tensors._OUTPUTS,
        "points",
        lambda heads, batch: (tensors.Tensor(heads.heatmap, (batch, 2, 2, heads.num_classes)),),
    )
    spec = dataclasses.replace(SPEC, heads=PointHeads(2, 4))
    path.write_text(spec.to_json())
    assert load_spec(path) == spec
    assert as_json(spec)["heads"] == {"family": "points", "num_classes": 2, "stride": 4, "heatmap": "heatmap"}
    assert tensors.heads_tensors(spec).shapes == {"image": (1, 3, 8, 8), "heatmap": (1, 2, 2, 2)}
    assert tensors.detector_tensors(spec) == tensors.detector_tensors(SPEC)
    assert 'name: "heatmap"' in triton_config(spec, "heads", "onnxruntime_onnx")
    assert all(part_sha256(path.read_bytes(), part) for part in SPEC_PARTS.values())
    assert "spec.heads.stride: 5, expected 4" in refused(path, changed(as_json(spec), ("heads", "stride"), 5))
    assert "missing field" in refused(path, changed(as_json(spec), ("heads", "family"), "ssd"))
    assert "ssd or points" in refused(path, set_to("heads.family", "boxes"))


def test_a_spec_and_its_parts_say_what_is_wrong_with_them():
    assert not list(problems(SPEC))
    wrong = dataclasses.replace(
        SPEC, nms=dataclasses.replace(SPEC.nms, iou_threshold=2.0), labels=SPEC.labels[:1]
    )
    assert list(problems(wrong)) == [
        "nms.iou_threshold: 2.0, expected 0 to 1",
        "labels: 1, expected one for each of heads.num_classes, 2",
    ]
    assert list(problems(Resizer("fixed_shape"))) == []


class TestPipeline:
    def test_background_column_follows_the_config(self, tmp_path):
        config = tmp_path / "pipeline.config"
        config.write_text(
            TINY_CONFIG.replace("num_classes: 3", "num_classes: 3 add_background_class: false", 1)
        )
        found = read_pipeline(config)
        assert found.num_classes == 3 and not found.background_column
        explicit = "num_classes: 4 add_background_class: false explicit_background_class: true"
        config.write_text(TINY_CONFIG.replace("num_classes: 3", explicit, 1))
        found = read_pipeline(config)
        assert found.num_classes == 3 and found.background_column

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("num_classes: 3", "num_classes: 90 num_classes: 3"),
            ("iou_threshold: 0.6", "iou_threshold: 0.9 iou_threshold: 0.5"),
            ("score_converter: SIGMOID", "score_converter: SIGMOID score_converter: SOFTMAX"),
            ("height: 96 width: 128", "height: 96 width: 128 height: 64"),
            ("eval_config { }", "eval_config { } model { ssd { num_classes: 2 } }"),
            ("eval_config { }", "eval_config { } model { faster_rcnn { } }"),
            ("fixed_shape_resizer {", "keep_aspect_ratio_resizer { } fixed_shape_resizer {"),
        ],
    )
    def test_of_a_setting_that_is_written_twice_the_last_one_counts(self, odapi_modules, tmp_path, old, new):
        config = tmp_path / "pipeline.config"
        assert old in TINY_CONFIG
        config.write_text(TINY_CONFIG.replace(old, new, 1))
        model = odapi_modules("utils.config_util").get_configs_from_pipeline_file(str(config))["model"]
        if model.WhichOneof("model") != "ssd":
            with pytest.raises(OdtrtError, match=rf"model\.{model.WhichOneof('model')} is not supported"):
                read_pipeline(config)
            return
        found = read_pipeline(config)
        assert found.message.model == model
        assert found.num_classes == model.ssd.num_classes
        assert found.nms.iou_threshold == model.ssd.post_processing.batch_non_max_suppression.iou_threshold
        assert found.input_size == (
            model.ssd.image_resizer.fixed_shape_resizer.height,
            model.ssd.image_resizer.fixed_shape_resizer.width,
        )

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            (
                "iou_threshold: 0.6",
                "iou_threshold: 2",
                "batch_non_max_suppression.iou_threshold: 2.0, expected 0 to 1",
            ),
            ("iou_threshold: 0.6", "iou_threshold: nan", "iou_threshold: nan, expected 0 to 1"),
            ("score_threshold: 0.01", "score_threshold: -inf", "score_threshold: -inf, "),
            ("max_detections_per_class: 20", "max_detections_per_class: 0", "max_detections_per_class: 0"),
            ("max_total_detections: 40", "max_total_detections: 1000000000", "expected 1 to 1048576"),
            ("y_scale: 10", "y_scale: 0", "faster_rcnn_box_coder.y_scale: 0.0, expected a positive"),
            ("num_classes: 3", "num_classes: 2000000000", "num_classes is 2000000000, expected 1 to 65536"),
            ("height: 96", "height: 2000000000", "fixed_shape_resizer: 2000000000x128, expected"),
        ],
    )
    def test_a_setting_out_of_its_range_is_named(self, tmp_path, old, new, expected):
        config = tmp_path / "pipeline.config"
        assert old in TINY_CONFIG
        config.write_text(TINY_CONFIG.replace(old, new, 1))
        with pytest.raises(InputError) as caught:
            read_pipeline(config)
        assert str(config) in str(caught.value) and expected in str(caught.value)

    @FUZZ
    @given(
        st.floats(0, 1, width=32),
        st.floats(-(2.0**127), 2.0**127, width=32),
        st.floats(2.0**-126, 2.0**127, width=32),
        st.integers(1, 2**20),
    )
    def test_what_the_od_api_takes_is_read_again(self, path, iou, score, scale, most):
        """Any settings that protobuf holds in these ranges go through spec.json to the same bits."""
        spec = dataclasses.replace(
            SPEC,
            nms=dataclasses.replace(
                SPEC.nms, iou_threshold=iou, score_threshold=score, max_total_detections=most
            ),
            heads=dataclasses.replace(
                SPEC.heads, scores=dataclasses.replace(SPEC.heads.scores, logit_scale=scale)
            ),
        )
        path.write_text(spec.to_json())
        assert load_spec(path) == spec
