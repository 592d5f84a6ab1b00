"""spec.json: what a reader must be told about a damaged or foreign one."""

from __future__ import annotations

import json

import pytest

from odtrt_lib.errors import InputError
from odtrt_lib.spec import load_spec, read_pipeline


def edited(tiny_folder, tmp_path, edit):
    data = json.loads((tiny_folder / "spec.json").read_text())
    edit(data)
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.update(schema=99), ["schema 99", "expected 1"]),
        (lambda d: d["nms"].pop("iou_threshold"), ["nms.iou_threshold", "missing"]),
        (lambda d: d["nms"].update(soft_nms_sigma=0.1), ["nms.soft_nms_sigma", "unknown"]),
        (lambda d: d["input"].update(height="320"), ["input.height", "'320'", "int"]),
        (lambda d: d["input"].update(scale=[1, 2]), ["input.scale", "3 numbers"]),
        (lambda d: d.update(labels=[{"id": "x", "name": "y"}]), ["labels[0].id"]),
        (lambda d: d.update(scores=None), ["scores", "expected an object"]),
    ],
)
def test_damaged_spec_is_named_field_by_field(tiny_folder, tmp_path, edit, words):
    with pytest.raises(InputError) as caught:
        load_spec(edited(tiny_folder, tmp_path, edit))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x00\xff"])
def test_not_a_spec(tmp_path, content):
    path = tmp_path / "spec.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"spec\.json"):
        load_spec(path)


def test_missing_spec(tmp_path):
    with pytest.raises(InputError, match="odtrt export"):
        load_spec(tmp_path / "spec.json")


def test_background_column_follows_the_config(tiny_model, tmp_path):
    text = (tiny_model / "pipeline.config").read_text()
    without = tmp_path / "without.config"
    without.write_text(text.replace("num_classes: 3", "num_classes: 3 add_background_class: false", 1))
    settings = read_pipeline(without)
    assert settings.num_classes == 3 and not settings.background_column
    explicit = tmp_path / "explicit.config"
    explicit.write_text(
        text.replace(
            "num_classes: 3",
            "num_classes: 4 add_background_class: false explicit_background_class: true",
            1,
        )
    )
    settings = read_pipeline(explicit)
    assert settings.num_classes == 3 and settings.background_column


def test_label_map_of_more_classes_is_refused_when_named(tiny_model, tmp_path):
    labels = tmp_path / "labels.pbtxt"
    labels.write_text('item { id: 9 name: "cat" }')
    with pytest.raises(InputError, match="id 9"):
        read_pipeline(tiny_model / "pipeline.config", labels)


def test_text_label_map_one_name_a_line(tiny_model, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("???\none\ntwo\nthree\n")
    settings = read_pipeline(tiny_model / "pipeline.config", labels)
    assert [label.name for label in settings.labels] == ["one", "two", "three"]
