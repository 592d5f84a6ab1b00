"""The OD API's old generated protobuf modules, made loadable."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import TINY_CONFIG
from google.protobuf import descriptor_pb2

from odtrt_lib.errors import MissingDependencyError
from odtrt_lib.export import odapi


def old_style_module(name: str, dependency: str | None = None) -> str:
    """What protoc 3.8 wrote: a FileDescriptor with the serialized file inside."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"object_detection/protos/{name}.proto", package="oldstyle", syntax="proto2"
    )
    message = file.message_type.add(name=name.capitalize())
    message.field.add(name="size", number=1, type=5, label=1)
    if dependency:
        file.dependency.append(f"object_detection/protos/{dependency}.proto")
        message.field.add(
            name="inner", number=2, type=11, label=1, type_name=f".oldstyle.{dependency.capitalize()}"
        )
    serialized = file.SerializeToString()
    return f"DESCRIPTOR = _descriptor.FileDescriptor(name='x', serialized_pb={serialized!r})\n"


@pytest.fixture
def old_package(tmp_path, monkeypatch):
    protos = tmp_path / "object_detection" / "protos"
    protos.mkdir(parents=True)
    (protos.parent / "__init__.py").touch()
    (protos / "__init__.py").touch()
    (protos / "inner_pb2.py").write_text(old_style_module("inner"))
    (protos / "outer_pb2.py").write_text(old_style_module("outer", "inner"))
    monkeypatch.setattr(odapi, "_proto_modules", lambda: sorted(protos.glob("*_pb2.py")))
    return tmp_path


def test_rewritten_modules_load_and_parse(old_package):
    assert odapi.regenerate_protos() == 2
    assert odapi.regenerate_protos() == 0
    code = (
        "from google.protobuf import text_format\n"
        "from object_detection.protos import outer_pb2\n"
        "message = text_format.Parse('size: 3 inner { size: 4 }', outer_pb2.Outer())\n"
        "assert (message.size, message.inner.size) == (3, 4)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=old_package, check=True)


def test_the_installed_odapi_is_current():
    assert odapi.regenerate_protos() == 0


def test_a_module_without_a_descriptor_is_named(old_package):
    broken = old_package / "object_detection" / "protos" / "inner_pb2.py"
    broken.write_text("x = _descriptor.FileDescriptor(name='x')\n")
    with pytest.raises(MissingDependencyError, match="inner_pb2"):
        odapi.regenerate_protos()


def test_links_planted_at_names_that_can_be_guessed_are_not_followed(old_package, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = old_package / "object_detection" / "protos"
    modules = odapi._proto_modules()
    planted = [module.with_suffix(f".{os.getpid()}.tmp") for module in modules]
    for link in planted:
        link.symlink_to(outside)
    present = sorted(folder.iterdir())
    odapi.regenerate_protos()
    assert outside.read_text() == "mine" and all(link.is_symlink() for link in planted)
    assert sorted(folder.iterdir()) == present


def test_a_module_that_cannot_be_replaced_names_the_cure(old_package, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        MissingDependencyError, match=r"\(Permission denied\): run `python -m odtrt_lib.export.odapi`"
    ):
        odapi.regenerate_protos()


def test_absent_packages_are_named_with_their_command(monkeypatch):
    monkeypatch.setattr(odapi.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="make install"):
        odapi.prepare()
    with pytest.raises(MissingDependencyError, match="make install"):
        odapi.regenerate_protos()


def test_a_random_resnet_is_calm(tmp_path):
    text = TINY_CONFIG
    for old, new in (
        ("ssd_mobilenet_v2_fpn_keras", "ssd_resnet50_v1_fpn_keras"),
        ("depth_multiplier: 0.35", "depth_multiplier: 1"),
        ("height: 96 width: 128", "height: 160 width: 160"),
        ("max_level: 6", "max_level: 7"),
    ):
        assert old in text
        text = text.replace(old, new)
    config = tmp_path / "pipeline.config"
    config.write_text(text)
    checkpoint = odapi.write_random_checkpoint(config, tmp_path / "checkpoint")
    model, images = odapi._build_and_call(config, is_training=False)
    odapi.restore(model, checkpoint, config, None).expect_partial()
    smooth_and_patches = images[1:3]
    exact = model.predict(smooth_and_patches, None)
    for variable in (*model.feature_extractor.variables, *model._box_predictor.variables):
        if variable.shape.rank == 4:
            variable.assign(variable.numpy().astype(np.float16).astype(np.float32))
    rounded = model.predict(smooth_and_patches, None)
    for name in ("box_encodings", "class_predictions_with_background"):
        largest = np.abs(exact[name]).max()
        assert np.abs(exact[name][1] - exact[name][0]).max() > 0.1 * largest, name
        assert np.abs(rounded[name] - exact[name]).max() < 0.01 * largest, name
