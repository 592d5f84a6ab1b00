"""Chapter 5's bundle: what travels, what is refused, what strangers' tools read in it, and a fresh device."""

from __future__ import annotations

import configparser
import dataclasses
import errno
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import spec_cases
from conftest import pretend_machine

from odtrt_lib import __version__, bundle, cuda, fuse, spec
from odtrt_lib.bundle import archive as archives
from odtrt_lib.bundle import install
from odtrt_lib.errors import BuildError, CheckError, InputError, MissingDependencyError, UnsupportedError
from odtrt_lib.folder import made_from, read_log, seal, sealed, write_record
from odtrt_lib.machine import this_machine

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

SPEC = spec_cases.example(
    spec_cases.ssd(16 * 24, 2, True),
    spec.NmsSpec(0.25, 0.5, 10, 10, False, True),
    spec.InputSpec(16, 24, spec_cases.STRETCHED, (2 / 255,) * 3, (-1.0, -0.5, -1.0)),
    name="tiny one",
    labels=spec_cases.named("a nut", "bolt; hex\nhead"),
)


def heads_model(batch):
    """Two heads over the pixels of a 16 x 24 image; batch: a size, or None for any."""
    nodes, constants, outputs = [], [], []
    for name, columns in (("box_encodings", 4), ("class_logits", 3)):
        weights = np.random.default_rng(columns).normal(size=(columns, 3, 1, 1)).astype(np.float32)
        constants.append(numpy_helper.from_array(weights, f"{name}_weights"))
        constants.append(numpy_helper.from_array(np.array([0, -1, columns]), f"{name}_shape"))
        nodes += [
            helper.make_node("Conv", ["image", f"{name}_weights"], [f"{name}_map"]),
            helper.make_node("Transpose", [f"{name}_map"], [f"{name}_last"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [f"{name}_last", f"{name}_shape"], [name]),
        ]
        shape = [batch or "batch", 16 * 24, columns]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch or "batch", 3, 16, 24])
    graph = helper.make_graph(nodes, "heads", [image], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def model_folder(path, detector=SPEC, fused=True):
    """A model folder as the stages before leave it, with a plan and a log that must not travel."""
    (path / "plans").mkdir(parents=True)
    (path / "int8").mkdir()
    (path / "spec.json").write_text(detector.to_json())
    onnx.save(heads_model(detector.input.batch), path / "heads.onnx")
    anchors = np.random.default_rng(1).uniform(0.1, 0.9, (16 * 24, 4)).astype(np.float32)
    np.save(path / "anchors.npy", anchors)
    seal(path)
    if fused:
        pytest.importorskip("onnx_graphsurgeon")
        fuse.fuse(path)
    (path / "plans" / "0123456789abcdef-01234567.plan").write_bytes(b"of this machine")
    (path / "int8" / "calibration.json").write_text("{}")
    (path / "frozen.pb").write_bytes(b"TensorFlow's")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def archive(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "tiny.odtrt.zip"
    bundle.pack(folder, path, triton=True, deepstream=True)
    return path


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory):
    path = tmp_path_factory.mktemp("unpacked") / "tiny"
    bundle.unpack(archive, path)
    return path


def contents(path):
    """All files but the log, which tells when the bundle was unpacked."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "log.jsonl"]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def one_line_error(work, *kinds):
    with pytest.raises(kinds or InputError) as caught:
        work()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- what travels


def test_the_same_folder_gives_the_same_bytes(folder, archive, tmp_path):
    copy = tmp_path / "elsewhere" / "another name"
    shutil.copytree(folder, copy)
    for path in copy.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o777)
    again = bundle.pack(copy, tmp_path / "b.zip", triton=True, deepstream=True)
    assert (tmp_path / "b.zip").read_bytes() == archive.read_bytes()
    assert again.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert again.bytes == archive.stat().st_size
    with zipfile.ZipFile(archive) as zipped:
        assert zipped.namelist() == sorted(zipped.namelist())
        assert {info.date_time for info in zipped.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert not again.is_up_to_date
    assert bundle.pack(copy, tmp_path / "b.zip", triton=True, deepstream=True).is_up_to_date
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.zip", "elsewhere"]


def test_another_weight_gives_other_bytes(folder, archive, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    anchors = np.load(copy / "anchors.npy")
    anchors[0, 0] += 1e-3
    np.save(copy / "anchors.npy", anchors)
    (copy / "detector.onnx").unlink()
    seal(copy)
    changed = bundle.pack(copy, tmp_path / "b.zip")
    member = next(m for m in changed.manifest.members if m.path == "model/anchors.npy")
    assert member.sha256 == hashlib.sha256((copy / "anchors.npy").read_bytes()).hexdigest()


def test_the_manifest_describes_every_member(folder, archive):
    with zipfile.ZipFile(archive) as zipped:
        assert zipped.testzip() is None
        manifest = json.loads(zipped.read("manifest.json"))
        listed = {item["path"]: item for item in manifest["members"]}
        assert sorted(zipped.namelist()) == sorted([*listed, "manifest.json"])
        for path, item in listed.items():
            content = zipped.read(path)
            assert (item["size"], item["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest["schema"] == 1
    assert manifest["name"] == SPEC.name
    assert manifest["spec_sha256"] == hashlib.sha256((folder / "spec.json").read_bytes()).hexdigest()
    assert manifest["odtrt"] == __version__


def test_what_travels_and_what_stays(folder, unpacked):
    found = contents(unpacked)
    model = {path: content for path, content in found.items() if path.startswith("model/")}
    expected = {"spec.json", "anchors.npy", "heads.onnx", "detector.onnx", "int8/calibration.json"}
    assert model == {f"model/{name}": (folder / name).read_bytes() for name in expected}
    for path, content in found.items():
        if path.startswith(("odtrt_lib/", "plugins/")) or path == "LICENSE":
            assert content == (ROOT / path).read_bytes()
    sources = {path for path in found if path.startswith("plugins/")}
    for kind in ("kernels/*", "tensorrt/*.*", "detector/*", "deepstream/*.*"):
        assert sources >= {
            p.relative_to(ROOT).as_posix() for p in (ROOT / "plugins").glob(kind) if p.is_file()
        }
    assert not [path for path in found if path.endswith((".plan", ".pb", ".so", ".pyc", "log.jsonl"))]


def test_a_name_in_the_manifest_does_not_act_on_the_terminal(monkeypatch, capsys):
    manifest = SimpleNamespace(name="\x1b]0;evil\x07\ud800", members=())
    monkeypatch.setattr(archives, "unpack", lambda *_, **__: manifest)
    assert bundle.run_archive(["a.odtrt.zip", "a; touch PWN"]) == 0
    out = capsys.readouterr().out
    assert r"\x1b]0;evil\x07\ud800" in out and "\x1b" not in out
    assert "next: cd 'a; touch PWN' && python3 build_here.py" in out


def test_a_bundle_never_replaces_a_file_that_it_packs(tmp_path):
    model_folder(tmp_path / "tiny")
    before = (tmp_path / "tiny" / "heads.onnx").read_bytes()
    with pytest.raises(InputError, match=r"heads\.onnx: is read"):
        bundle.pack(tmp_path / "tiny", tmp_path / "tiny" / "heads.onnx", force=True)
    assert (tmp_path / "tiny" / "heads.onnx").read_bytes() == before


COMMANDS_ON_A_DEVICE = """
import contextlib, importlib, io, json, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent = set(sys.argv[1].split(","))
checkout = [finder for finder in sys.meta_path if "editable" in repr(finder).lower()]
sys.meta_path[:] = [Absent(), *(finder for finder in sys.meta_path if finder not in checkout)]
import odtrt_lib
from odtrt_lib.app import cli

for module in pkgutil.walk_packages(odtrt_lib.__path__, "odtrt_lib."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
results = [odtrt_lib.__file__]
for command in json.loads(sys.argv[2]):
    if command[0] == "with":
        absent -= set(command[1:])
        continue
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = cli.main(command) or 0
        except SystemExit as end:
            status = end.code or 0
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def test_every_command_of_an_unpacked_bundle(tmp_path):
    """With what a device has: numpy, Pillow, ONNX Runtime, typer and rich. Each works, or says why not."""
    from PIL import Image

    from odtrt_lib.app import cli

    device, archive = tmp_path / "device", tmp_path / "a.odtrt.zip"
    detector = dataclasses.replace(SPEC, labels=(spec.Label(1, "a nut"), spec.Label(2, "bolt")))
    bundle.pack(model_folder(tmp_path / "model", detector, fused=False), archive)
    bundle.unpack(archive, device)
    Image.fromarray(install._pattern(SPEC)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 16, "width": 24}],
        "categories": [{"id": label.id, "name": label.name} for label in detector.labels],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 8, 9], "area": 72, "iscrowd": 0}
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    picture, annotations = str(tmp_path / "a.png"), str(tmp_path / "instances.json")
    evaluation = ["eval", "model", "--annotations", annotations]
    expected = [
        (["run", "x", "--image", picture], 1, "device side"),
        (["export", "x"], 1, "device side"),
        (["convert", "model"], 1, "device side"),
        (["fuse", "model"], 1, "onnx"),
        (["quantise", "model", "--images", str(tmp_path)], 1, "onnx"),
        (["sensitivity", "model", "--images", str(tmp_path)], 1, "onnx"),
        (["qat", "x", "model", "--images", str(tmp_path), "-o", str(tmp_path / "new")], 1, "device side"),
        (["build", "model"], 1, "TensorRT"),
        (["plans", "model"], 1, "no plan there"),
        (["pack", "model", "-o", str(tmp_path / "again.zip")], 0, "SHA-256"),
        (["unpack", str(archive), "-o", str(tmp_path / "out")], 0, "all as the manifest says"),
        (["detect", "model", picture, "-o", str(tmp_path / "drawn")], 0, "a.png"),
        (["profile", "model", "--frames", "2"], 0, "noise"),
        (["doctor"], 0, "ONNX Runtime"),
        (["zoo", "list"], 0, "efficientdet_d0"),
        (["soak", "model", "--minutes", "0.01"], 1, "no source; name a folder of pictures"),
        (evaluation, 1, "pycocotools"),
        (["with", "pycocotools", "matplotlib"], None, ""),
        (evaluation, 0, "mAP"),
    ]
    known = {one.name or one.callback.__name__ for one in cli.app.registered_commands} | {"zoo", "with"}
    assert {command[0] for command, _, _ in expected} == known
    absent = (
        "cv2,tensorflow,tf_keras,keras,onnx,onnx_graphsurgeon,onnxconverter_common,tf2onnx,matplotlib,"
        "pycocotools,object_detection,tensorrt,tensorrt_rtx,scipy"
    )
    command = [
        sys.executable,
        "-c",
        COMMANDS_ON_A_DEVICE,
        absent,
        json.dumps([one for one, _, _ in expected]),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=device, env=environment)
    assert done.returncode == 0, done.stderr
    where, *results = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).parent == device / "odtrt_lib"
    expected = [one for one in expected if one[1] is not None]
    for (arguments, status, said), (found, out, err) in zip(expected, results, strict=True):
        assert found == status, (arguments, out, err)
        assert said in (err if status else out), (arguments, out, err)
        assert err.count("\n") == (1 if status else 0), (arguments, err)
    assert (tmp_path / "drawn" / "a.jpg").is_file()


def test_a_detector_without_its_fused_form_travels_too(tmp_path):
    model_folder(tmp_path / "tiny", fused=False)
    bundle.pack(tmp_path / "tiny", tmp_path / "a.zip", triton=True)
    bundle.unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out" / "model" / "detector.onnx").exists()
    assert not (tmp_path / "out" / "deepstream").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "heads.onnx").unlink(), r"heads\.onnx: not found; run `odtrt convert`"),
        (lambda f: (f / "spec.json").write_text("{"), r"spec\.json: not JSON"),
        (lambda f: (f / "anchors.npy").write_bytes(b"no"), r"anchors\.npy: .*numpy"),
        (
            lambda f: np.save(f / "anchors.npy", np.zeros((3, 4), np.float32)),
            r"anchors\.npy: float32 \[3, 4\]",
        ),
        (
            lambda f: onnx.save(heads_model(None), f / "heads.onnx"),
            r"heads\.onnx: inputs image .*expected image .*run `odtrt convert` again",
        ),
    ],
)
def test_a_folder_that_cannot_be_packed(folder, tmp_path, damage, named):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    damage(copy)
    seal(copy)
    message = one_line_error(lambda: bundle.pack(copy, tmp_path / "a.zip"))
    assert re.search(named, message)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def nothing(folder):
    pass


def recorded_folder(path):
    """A model folder whose log tells what export, convert and fuse wrote."""
    model_folder(path)
    export_again(path, "frozen.pb", b"TensorFlow's")
    files = {name: (path / name).read_bytes() for name in ("frozen.pb", "spec.json")}
    inputs = made_from("heads.onnx", files)
    write_record(path, "convert", inputs=inputs, outputs=["heads.onnx"], **ABOUT)
    fuse.fuse(path, force=True)
    return path


ABOUT = {"settings": {}, "versions": {}, "seconds": 1.0, "peak_rss_mb": 1.0, "checks": {}}


def export_again(path, name, content):
    (path / name).write_bytes(content)
    outputs = ["frozen.pb", "anchors.npy", "spec.json"]
    write_record(path, "export", inputs={"checkpoint": "0" * 64}, outputs=outputs, **ABOUT)


def anchors_file():
    file = io.BytesIO()
    np.save(file, np.full((16 * 24, 4), 0.5, np.float32))
    return file.getvalue()


def other_threshold():
    return (
        dataclasses.replace(SPEC, nms=dataclasses.replace(SPEC.nms, score_threshold=0.125)).to_json().encode()
    )


def renamed():
    labels = tuple(dataclasses.replace(label, name=f"new {label.name}") for label in SPEC.labels)
    return dataclasses.replace(SPEC, labels=labels).to_json().encode()


def other_spec(folder):
    (folder / "spec.json").write_text(dataclasses.replace(SPEC, name="another").to_json())


def other_anchors(folder):
    anchors = np.load(folder / "anchors.npy")
    anchors[0, 0] += 1e-3
    np.save(folder / "anchors.npy", anchors)


def other_weights(folder):
    model = onnx.load(folder / "heads.onnx")
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    onnx.save(model, folder / "heads.onnx")


def other_detector(folder):
    model = onnx.load(folder / "detector.onnx")
    model.producer_name = "another"
    onnx.save(model, folder / "detector.onnx")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (nothing, None),
        (other_spec, r"spec\.json: damaged or changed.* `export` .*; run `odtrt export` again"),
        (other_anchors, r"anchors\.npy: damaged or changed.* `export` .*; run `odtrt export` again"),
        (other_weights, r"heads\.onnx: damaged or changed.* `convert` .*; run `odtrt convert` again"),
        (other_detector, r"detector\.onnx: damaged or changed.* `fuse` .*; run `odtrt fuse` again"),
        (lambda f: (f / "frozen.pb").write_bytes(b"no file of a bundle"), None),
        (
            lambda f: export_again(f, "frozen.pb", b"newer"),
            r"heads\.onnx: made from another frozen\.pb .*`odtrt convert`",
        ),
        (
            lambda f: export_again(f, "anchors.npy", anchors_file()),
            r"detector\.onnx: made from another anchors\.npy .*`odtrt fuse`",
        ),
        (
            lambda f: export_again(f, "spec.json", other_threshold()),
            r"detector\.onnx: made from another spec\.json .*`odtrt fuse`",
        ),
        (lambda f: export_again(f, "spec.json", renamed()), None),
    ],
)
def test_a_file_that_its_stage_did_not_write_is_not_packed(tmp_path, change, named):
    recorded_folder(tmp_path / "tiny")
    change(tmp_path / "tiny")
    pack = lambda: bundle.pack(tmp_path / "tiny", tmp_path / "a.zip")  # noqa: E731
    if named is None:
        assert pack().has_postprocessing
        return
    assert re.search(named, one_line_error(pack))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_without_the_log_nothing_is_packed_until_somebody_vouches_for_the_files(tmp_path):
    """So it is the record that the refusals above come from."""
    recorded_folder(tmp_path / "tiny")
    (tmp_path / "tiny" / "log.jsonl").unlink()
    (tmp_path / "tiny" / "detector.onnx").unlink()
    other_weights(tmp_path / "tiny")
    assert "not sealed" in one_line_error(lambda: bundle.pack(tmp_path / "tiny", tmp_path / "a.zip"))
    seal(tmp_path / "tiny")
    assert not bundle.pack(tmp_path / "tiny", tmp_path / "a.zip").has_postprocessing


def one_column_less(model):
    model.graph.output[1].type.tensor_type.shape.dim[2].dim_value -= 1


def other_name(model):
    model.graph.input[0].name = "picture"


def other_type(model):
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (None, r"heads\.onnx: not an ONNX model"),
        (other_name, r"heads\.onnx: inputs picture \[1, 3, 16, 24\], expected image \[1, 3, 16, 24\]"),
        (one_column_less, r"class_logits \[1, 384, 2\], expected .*class_logits \[1, 384, 3\] as spec\.json"),
        (other_type, r"heads\.onnx: box_encodings is not float32"),
    ],
)
def test_heads_without_a_record_are_compared_with_the_specification(tmp_path, monkeypatch, change, named):
    tiny = model_folder(tmp_path / "tiny", fused=False)
    if change is None:
        (tiny / "heads.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        model = onnx.load(tiny / "heads.onnx")
        change(model)
        onnx.save(model, tiny / "heads.onnx")
    seal(tiny)
    for is_without_onnx in (False, True):
        if is_without_onnx:
            monkeypatch.setitem(sys.modules, "onnx", None)
            if change is not None:
                bundle.pack(tiny, tmp_path / "a.zip")
                return
        message = one_line_error(lambda: bundle.pack(tiny, tmp_path / "a.zip"))
        assert re.search(named, message) and message.endswith("run `odtrt convert` again")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_what_was_compiled_for_a_board_travels_with_a_hash(folder, tmp_path, monkeypatch):
    asked = []

    def compiled(plugins, target, needs_plugin):
        asked.append((plugins, target, needs_plugin))
        (tmp_path / "libodtrt.so").write_bytes(b"arm64")
        return {"prebuilt/libodtrt.so": tmp_path / "libodtrt.so"}

    monkeypatch.setattr(archives, "prebuilt_files", compiled)
    plain = bundle.pack(folder, tmp_path / "plain.zip")
    packed = bundle.pack(folder, tmp_path / "a.zip", target="jetson-orin")
    assert asked == [(ROOT / "plugins", "jetson-orin", True)]
    assert set(packed.manifest.members) - set(plain.manifest.members) >= {
        archives.Member("prebuilt/libodtrt.so", 5, hashlib.sha256(b"arm64").hexdigest())
    }
    out = tmp_path / "out"
    bundle.unpack(tmp_path / "a.zip", out)
    readme = (out / "README.txt").read_text()
    assert "prebuilt/ has libraries" in readme and max(map(len, readme.splitlines())) <= 110
    assert archives.strangers(out, bundle.verify(out)) == []
    (out / "prebuilt" / "libodtrt.so").write_bytes(b"x86-6")
    assert "libodtrt.so: not the file that was packed" in one_line_error(lambda: bundle.verify(out))
    bundle.unpack(tmp_path / "plain.zip", out, force=True)
    assert "prebuilt" not in (out / "README.txt").read_text()


def test_the_readme_is_about_what_is_in_the_bundle(unpacked, tmp_path):
    fused = (unpacked / "README.txt").read_text()
    model_folder(tmp_path / "tiny", fused=False)
    bundle.pack(tmp_path / "tiny", tmp_path / "a.zip")
    bundle.unpack(tmp_path / "a.zip", tmp_path / "out")
    split = (tmp_path / "out" / "README.txt").read_text()
    opening = r"detector = (Detector\.open\(.*\))\n"
    assert re.findall(opening, split) == ['Detector.open("model")']
    assert re.findall(opening, fused) == [
        'Detector.open("model", plugin="plugins/build/libodtrt_tensorrt.so")'
    ]
    assert "model/detector.onnx" in fused and "detector.onnx" not in split and "plugin=" not in split
    for text, there in ((fused, True), (split, False)):
        assert ("triton/" in text, "deepstream/" in text) == (there, there)
        assert max(map(len, text.splitlines())) <= 110
        for need in ("Python 3.8", "numpy", "TensorRT", "libcudart.so", "onnxruntime", "onnxconverter-common",
                     "cmake", "C++ compiler", "nvcc", "Pillow", "built.json", "sha256sum"):  # fmt: skip
            assert need in text, need


def test_a_cut_off_archive_ends_in_a_syntax_error_as_the_readme_says(archive, unpacked, tmp_path):
    cut = tmp_path / "tiny.odtrt.zip"
    cut.write_bytes(archive.read_bytes()[:-100])
    done = subprocess.run([sys.executable, cut], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "SyntaxError" in done.stderr
    assert "SyntaxError" in (unpacked / "README.txt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == [cut.name]


def test_a_file_that_is_no_bundle_is_not_written_over(folder, archive, tmp_path):
    mine = tmp_path / "holiday.zip"
    mine.write_bytes(b"pictures")
    message = one_line_error(lambda: bundle.pack(folder, mine))
    assert "no bundle" in message and message.endswith("or use --force")
    assert mine.read_bytes() == b"pictures"
    assert "a folder" in one_line_error(lambda: bundle.pack(folder, tmp_path))
    bundle.pack(folder, mine, triton=True, deepstream=True, force=True)
    assert mine.read_bytes() == archive.read_bytes()


# --- unpacking, and what is refused


def test_unpacking_over_an_earlier_bundle(folder, archive, tmp_path):
    target = tmp_path / "device"
    bundle.unpack(archive, target)
    (target / "model" / "plans").mkdir()
    (target / "model" / "plans" / "mine.plan").write_bytes(b"47 minutes")
    (target / "model" / "heads.onnx").write_bytes(b"half of it")
    message = one_line_error(lambda: bundle.unpack(archive, target))
    assert "was unpacked here" in message and message.endswith("or use --force")
    bundle.pack(folder, tmp_path / "plain.zip")
    bundle.unpack(tmp_path / "plain.zip", target, force=True)
    found = contents(target)
    assert found.pop("model/plans/mine.plan") == b"47 minutes"
    with zipfile.ZipFile(tmp_path / "plain.zip") as zipped:
        assert found == {name: zipped.read(name) for name in zipped.namelist()}
    assert not [path for path in found if path.startswith(("triton/", "deepstream/"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "plain.zip"]


def test_an_unpacked_model_is_sealed_and_an_upgrade_seals_the_new_one(folder, archive, tmp_path):
    target = tmp_path / "device"
    bundle.unpack(archive, target)
    names = ("spec.json", "anchors.npy", "heads.onnx", "detector.onnx")
    assert sealed(target / "model", *names) == {name: (folder / name).read_bytes() for name in names}
    heads = target / "model" / "heads.onnx"
    heads.write_bytes(heads.read_bytes()[:-1] + b"!")
    message = one_line_error(lambda: sealed(target / "model", "heads.onnx"))
    assert "heads.onnx: damaged or changed" in message and "unpack" in message
    other = shutil.copytree(folder, tmp_path / "other")
    other_weights(other)
    (other / "detector.onnx").unlink()
    seal(other)
    bundle.pack(other, tmp_path / "b.zip")
    bundle.unpack(tmp_path / "b.zip", target, force=True)
    assert sealed(target / "model", "heads.onnx")["heads.onnx"] == (other / "heads.onnx").read_bytes()
    assert [one["stage"] for one in read_log(target / "model")] == ["unpack", "unpack"]
    assert not (target / "model" / "detector.onnx").exists()


def test_an_upgrade_through_a_link_or_over_a_folder_changes_nothing(archive, tmp_path):
    target, outside = tmp_path / "device", tmp_path / "outside"
    bundle.unpack(archive, target)
    (target / "model").rename(outside)
    (target / "model").symlink_to(outside)
    before = contents(outside)
    message = one_line_error(lambda: bundle.unpack(archive, target, force=True))
    assert f"{target / 'model'}: a link" in message
    assert contents(outside) == before
    (target / "model").unlink()
    outside.rename(target / "model")
    (target / "README.txt").unlink()
    (target / "README.txt").mkdir()
    before = contents(target)
    message = one_line_error(lambda: bundle.unpack(archive, target, force=True))
    assert "README.txt: a folder" in message
    assert contents(target) == before


def test_a_folder_with_other_things_is_not_written_over(archive, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    for force in (False, True):
        message = one_line_error(lambda force=force: bundle.unpack(archive, tmp_path / "home", force=force))
        assert "not unpacked" in message
    assert contents(tmp_path / "home") == {"thesis.tex": b"mine"}


def other_bundle(folder, tmp_path):
    """Of the same model, with other int8 scales and without the files for Triton and DeepStream."""
    copy = shutil.copytree(folder, tmp_path / "other")
    (copy / "int8" / "calibration.json").write_text("changed")
    bundle.pack(copy, tmp_path / "other.zip")
    return tmp_path / "other.zip"


def linked_folder(out, outside):
    (out / "model").rename(outside / "model")
    (out / "model").symlink_to(outside / "model")


def linked_far_below(out, outside):
    (out / "plugins" / "kernels").rename(outside / "kernels")
    (out / "plugins" / "kernels").symlink_to(outside / "kernels")


def file_for_folder(out, outside):
    shutil.rmtree(out / "odtrt_lib")
    (out / "odtrt_lib").write_text("in the way")


def folder_for_file(out, outside):
    (out / "odtrt_lib" / "zoo.py").unlink()
    (out / "odtrt_lib" / "zoo.py").mkdir()


def forged_list_of_old_files(out, outside):
    """As if an earlier bundle had brought a file that lies, through a link, outside."""
    (outside / "precious").write_text("not yours")
    (out / "old").symlink_to(outside)
    manifest = json.loads((out / "manifest.json").read_text())
    digest = hashlib.sha256(b"not yours").hexdigest()
    manifest["members"].append({"path": "old/precious", "size": 9, "sha256": digest})
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("obstacle", "named"),
    [
        (linked_folder, "model: a link"),
        (linked_far_below, "kernels: a link"),
        (file_for_folder, "odtrt_lib: a file"),
        (folder_for_file, "zoo.py: a folder"),
        (forged_list_of_old_files, "old: a link"),
    ],
)
def test_what_is_in_the_way_is_found_before_anything_changes(folder, archive, tmp_path, obstacle, named):
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    bundle.unpack(archive, out)
    obstacle(out, outside)
    other = other_bundle(folder, tmp_path)
    before = contents(tmp_path)
    message = one_line_error(lambda: bundle.unpack(other, out, force=True))
    assert named in message and "nothing was changed" in message
    assert contents(tmp_path) == before


def test_an_old_file_that_somebody_changed_stays(folder, archive, tmp_path):
    out = tmp_path / "out"
    bundle.unpack(archive, out)
    labels = out / "deepstream" / "labels.txt"
    labels.write_text("mine")
    bundle.unpack(other_bundle(folder, tmp_path), out, force=True)
    assert labels.read_text() == "mine"
    assert not (out / "deepstream" / "nvinfer.txt").exists()


def test_only_the_expected_archive_is_unpacked(archive, tmp_path):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    wrong = "0" * 64
    refuse = lambda sha: lambda: bundle.unpack(archive, tmp_path / "out", expected_sha256=sha)  # noqa: E731
    assert f"SHA-256 {digest}, expected {wrong}" in one_line_error(refuse(wrong), CheckError)
    assert "expected 64 hexadecimal digits" in one_line_error(refuse("abc"))
    assert list(tmp_path.iterdir()) == []
    bundle.unpack(archive, tmp_path / "out", expected_sha256=digest.upper())
    assert bundle.verify(tmp_path / "out")


def test_weights_outside_of_the_model_are_not_left_behind(folder, tmp_path):
    """onnx's own way to save them apart."""
    copy = shutil.copytree(folder, tmp_path / "tiny")
    for name in ("log.jsonl", "detector.onnx"):
        (copy / name).unlink(missing_ok=True)
    model = onnx.load(copy / "heads.onnx")
    onnx.save(model, copy / "heads.onnx", save_as_external_data=True, size_threshold=0, location="weights")
    seal(copy)
    message = one_line_error(lambda: bundle.pack(copy, tmp_path / "a.zip"))
    assert "heads.onnx: its weights" in message and not (tmp_path / "a.zip").exists()


def test_an_empty_folder_may_be_there(archive, unpacked, tmp_path):
    (tmp_path / "empty").mkdir()
    bundle.unpack(archive, tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(unpacked)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o777 & ~mask


def test_a_plain_unzip_is_verified_too(archive, tmp_path):
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(tmp_path / "out")
    assert bundle.verify(tmp_path / "out").name == SPEC.name
    anchors = tmp_path / "out" / "model" / "anchors.npy"
    content = bytearray(anchors.read_bytes())
    content[200] ^= 1
    anchors.write_bytes(content)
    message = one_line_error(lambda: bundle.build_here(tmp_path / "out"))
    assert f"{anchors}: not the file" in message
    anchors.unlink()
    assert f"{anchors}: not found" in one_line_error(lambda: bundle.verify(tmp_path / "out"))


def entry(name, mode=stat.S_IFREG | 0o644):
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, mode << 16
    return info


class Forgery:
    """A bundle's members, to be changed before they are zipped again; listed: the manifest agrees with it."""

    def __init__(self, archive):
        with zipfile.ZipFile(archive) as zipped:
            self.members = [(entry(i.filename), zipped.read(i)) for i in zipped.infolist()]
        self.manifest = json.loads({i.filename: c for i, c in self.members}["manifest.json"])
        self.members = [(i, c) for i, c in self.members if i.filename != "manifest.json"]
        self.compression = {}

    def add(self, name, content=b"evil", listed=True, **how):
        self.members.append((entry(name, **how), content))
        if listed:
            digest = hashlib.sha256(content).hexdigest()
            self.manifest["members"].append({"path": name, "size": len(content), "sha256": digest})

    def item(self, name):
        return next(item for item in self.manifest["members"] if item["path"] == name)

    def write(self, path, manifest=None):
        text = json.dumps(self.manifest) if manifest is None else manifest
        with zipfile.ZipFile(path, "w") as zipped:
            for info, content in [*self.members, (entry("manifest.json"), text)]:
                zipped.writestr(info, content, self.compression.get(info.filename, zipfile.ZIP_STORED))


def traversal(name):
    return lambda forgery: forgery.add(name)


def drop(forgery):
    forgery.members = [pair for pair in forgery.members if pair[0].filename != "model/anchors.npy"]


def twice(forgery):
    forgery.members += [pair for pair in forgery.members if pair[0].filename == "model/anchors.npy"]


def wrong_hash(forgery):
    forgery.item("model/anchors.npy")["sha256"] = "0" * 64


def other_content(forgery):
    forgery.members = [
        (i, c[:-1] + b"!" if i.filename == "model/heads.onnx" else c) for i, c in forgery.members
    ]


def larger_than_it_says(forgery):
    forgery.item("model/heads.onnx")["size"] -= 1


def smaller_than_it_says(forgery):
    forgery.item("model/heads.onnx")["size"] = 10**12


def bomb(forgery):
    forgery.add("model/zeros", bytes(20_000_000))
    forgery.compression["model/zeros"] = zipfile.ZIP_DEFLATED


def bomb_that_lies(forgery):
    bomb(forgery)
    forgery.item("model/zeros")["size"] = 100


def listed_twice(forgery):
    forgery.manifest["members"].append(forgery.item("model/anchors.npy"))


def negative_size(forgery):
    forgery.item("model/anchors.npy")["size"] = -1


def file_and_folder(forgery):
    forgery.add("model/anchors.npy/inside")


FORGERIES = {
    "parent": (traversal("../evil"), "'../evil' is not a plain relative path"),
    "parent inside": (traversal("model/../../evil"), "is not a plain relative path"),
    "absolute": (traversal("/tmp/odtrt-evil"), "'/tmp/odtrt-evil' is not a plain relative path"),
    "drive": (traversal("C:evil"), "is not a plain relative path"),
    "backslash": (traversal("..\\evil"), "is not a plain relative path"),
    "dot": (traversal("model/./evil"), "is not a plain relative path"),
    "double slash": (traversal("model//evil"), "is not a plain relative path"),
    "line break": (traversal("model/e\nvil"), "is not a plain relative path"),
    "terminal escape": (traversal("model/e\x9b2Jvil"), "is not a plain relative path"),
    "right to left": (traversal("model/e\u202egnp.vil"), "is not a plain relative path"),
    "half a character": (lambda f: f.manifest.update(name="\ud800"), "has half a character"),
    "folder": (traversal("model/evil/"), "is not a plain relative path"),
    "symlink": (
        lambda f: f.add("model/plans", b"/etc", mode=stat.S_IFLNK | 0o777),
        "'model/plans' is a link, folder or device",
    ),
    "device": (lambda f: f.add("model/null", b"", mode=stat.S_IFCHR | 0o666), "is a link, folder or device"),
    "twice": (twice, "'model/anchors.npy' is there twice"),
    "listed twice": (listed_twice, "names a member twice"),
    "file and folder": (file_and_folder, "'model/anchors.npy' is both a file and a folder"),
    "missing": (drop, "'model/anchors.npy' is missing from the archive"),
    "extra": (lambda f: f.add("model/extra", listed=False), "'model/extra' is not in manifest.json"),
    "wrong hash": (wrong_hash, "'model/anchors.npy' has SHA-256"),
    "other content": (other_content, "'model/heads.onnx' has SHA-256"),
    "larger": (larger_than_it_says, "'model/heads.onnx' has"),
    "smaller": (smaller_than_it_says, "manifest.json says 1000000000000"),
    "bomb": (bomb, "'model/zeros' is compressed"),
    "bomb that lies": (bomb_that_lies, "'model/zeros' is compressed"),
    "negative size": (negative_size, "is no member with path, size and sha256"),
    "other schema": (lambda f: f.manifest.update(schema=2), "schema 2, expected 1"),
    "another spec": (lambda f: f.manifest.update(spec_sha256="0" * 64), "is not that of model/spec.json"),
    "no members": (lambda f: f.manifest.pop("members"), "members is missing"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_archive_is_refused_and_nothing_appears(archive, tmp_path, kind):
    forge, said = FORGERIES[kind]
    forgery = Forgery(archive)
    forge(forgery)
    place = tmp_path / "in" / "here"
    place.mkdir(parents=True)
    forged = tmp_path / "forged.zip"
    if kind == "twice":
        with pytest.warns(UserWarning, match="Duplicate name"):
            forgery.write(forged)
    else:
        forgery.write(forged)
    message = one_line_error(lambda: bundle.unpack(forged, place / "out"))
    assert said in message and str(forged) in message
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["forged.zip", "here", "in"]
    assert not Path("/tmp/odtrt-evil").exists()


def test_an_archive_forged_without_a_change_is_taken(archive, unpacked, tmp_path):
    """What the forgeries are refused for is what is forged in them."""
    Forgery(archive).write(tmp_path / "same.zip")
    bundle.unpack(tmp_path / "same.zip", tmp_path / "out")
    assert bundle.verify(tmp_path / "out") == bundle.verify(unpacked)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "schema 'list', expected 1"),
        ('{"schema": 1, "odtrt": "", "name": "", "spec_sha256": "", "members": [7]}', "'7' is no member"),
        (" " * (1 << 23), "too large"),
    ],
)
def test_a_manifest_that_is_none(archive, tmp_path, manifest, said):
    Forgery(archive).write(tmp_path / "forged.zip", manifest)
    assert said in one_line_error(lambda: bundle.unpack(tmp_path / "forged.zip", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["forged.zip"]


def test_members_that_share_their_bytes_are_refused(tmp_path, archive):
    """Many directory entries that point to one place make a small file large: Fifield's zip bomb."""
    forgery = Forgery(archive)
    forgery.add("model/a", b"x" * 1000)
    forgery.add("model/b", b"x" * 1000)
    forgery.write(tmp_path / "forged.zip")
    content = bytearray((tmp_path / "forged.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "forged.zip") as zipped:
        offset = zipped.getinfo("model/a").header_offset
    at = content.rindex(b"model/b") - 46
    assert content[at : at + 4] == b"PK\1\2"
    struct.pack_into("<L", content, at + 42, offset)
    (tmp_path / "forged.zip").write_bytes(content)
    message = one_line_error(lambda: bundle.unpack(tmp_path / "forged.zip", tmp_path / "out"))
    assert "overlaps another one" in message


def test_an_encrypted_member_is_refused(tmp_path, archive):
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"model/anchors.npy") - 46
    content[at + 8] |= 1
    (tmp_path / "forged.zip").write_bytes(content)
    message = one_line_error(lambda: bundle.unpack(tmp_path / "forged.zip", tmp_path / "out"))
    assert "is encrypted" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such"),
        (b"", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "damaged"),
        (b"PK\5\6" + bytes(18), "has no manifest.json"),
    ],
)
def test_a_file_that_is_no_archive(tmp_path, content, said):
    path = tmp_path / "a.zip"
    if content is not None:
        path.write_bytes(content)
    assert said in one_line_error(lambda: bundle.unpack(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_archive_that_is_a_folder(tmp_path):
    assert "Is a directory" in one_line_error(lambda: bundle.unpack(tmp_path, tmp_path / "out"))


def test_random_damage_is_found_or_harmless(archive, unpacked, tmp_path):
    """Flipped bits, cuts, and stretches of other bytes: an error on one line, or exactly what was packed."""
    intact, generator, refused = archive.read_bytes(), random.Random(20261122), 0
    directory = intact.rindex(b"PK\5\6") - 46 * 60
    expected = bundle.verify(unpacked)
    for number in range(300):
        content = bytearray(intact)
        where = generator.randrange(directory if number % 2 else 0, len(intact))
        kind = generator.choice(("bits", "bits", "cut", "stretch"))
        if kind == "bits":
            content[where] ^= 1 << generator.randrange(8)
        elif kind == "cut":
            del content[where:]
        else:
            length = generator.randrange(1, 200)
            content[where : where + length] = generator.randbytes(length)
        damaged = tmp_path / "damaged.zip"
        damaged.write_bytes(content)
        try:
            found = bundle.unpack(damaged, tmp_path / "out")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(damaged) in str(error)
            assert not (tmp_path / "out").exists()
        else:
            assert found == expected == bundle.verify(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
    assert refused > 250
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.zip"]


# --- killed, or out of space

DIE_AFTER = """
import os, signal, sys
from odtrt_lib import bundle, detector
events, last = 0, int(sys.argv[1])

def count(*_):
    global events
    events += 1
    if events == last:
        os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(count)
{work}
sys.setprofile(None)
print(events)
"""


def run_python(script, *arguments, **how):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **how)


def killed_at(script, times):
    """Runs the script and kills it after a part of its function calls, ``times`` times; yields after each."""
    whole = run_python(script, 0)
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout)
    for number in range(times):
        yield run_python(script, 1 + number * (calls - 1) // times).returncode


@pytest.mark.parametrize("is_there_before", [False, True])
def test_killed_while_packing_leaves_the_old_archive_or_the_new(folder, archive, tmp_path, is_there_before):
    target = tmp_path / "a.zip"
    work = f"bundle.pack({str(folder)!r}, {str(target)!r}, triton=True, deepstream=True)"
    old = None
    if is_there_before:
        bundle.pack(folder, target)
        old = target.read_bytes()
    states = set()
    for number, status in enumerate(killed_at(DIE_AFTER.format(work=work), 10)):
        if number:
            assert status == -9
        now = target.read_bytes() if target.exists() else None
        assert now in (old, archive.read_bytes())
        states.add(now == old)
        if old is None:
            target.unlink(missing_ok=True)
        else:
            target.write_bytes(old)
    assert True in states
    bundle.pack(folder, target, triton=True, deepstream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"], "what the dead left is removed"


def test_killed_while_unpacking_leaves_nothing_or_all(archive, unpacked, tmp_path):
    target = tmp_path / "out"
    work = f"bundle.unpack({str(archive)!r}, {str(target)!r})"
    for number, status in enumerate(killed_at(DIE_AFTER.format(work=work), 15)):
        if number:
            assert status == -9
            assert not target.exists() or bundle.verify(target) == bundle.verify(unpacked)
        shutil.rmtree(target, ignore_errors=True)
    bundle.unpack(archive, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the dead left is removed"


WITH_LITTLE_SPACE = """
import resource, signal, sys
from odtrt_lib import bundle, detector
from odtrt_lib.errors import OdtrtError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    {work}
except OdtrtError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing(folder, archive, tmp_path):
    for work in (
        f"bundle.pack({str(folder)!r}, {str(tmp_path / 'a.zip')!r})",
        f"bundle.unpack({str(archive)!r}, {str(tmp_path / 'new' / 'out')!r})",
    ):
        done = run_python(WITH_LITTLE_SPACE.format(work=work))
        assert done.returncode == 0, done.stderr
        assert "cannot be written (File too large)" in done.stdout
        assert not list(tmp_path.iterdir())


# --- what Triton reads


def triton_message():
    """An empty ModelConfig: Triton's own where tritonclient is installed, else its fields as published.

    https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
    """
    try:
        from tritonclient.grpc import model_config_pb2

        return model_config_pb2.ModelConfig()
    except ImportError:
        pass
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="inference", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16",
                                   "INT32", "INT64", "FP16", "FP32", "FP64", "STRING", "BF16")):  # fmt: skip
        types.value.add(name=f"TYPE_{name}", number=number)
    field = descriptor_pb2.FieldDescriptorProto
    for name, dims in (("ModelInput", 4), ("ModelOutput", 3)):
        tensor = file.message_type.add(name=name)
        tensor.field.add(name="name", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
        tensor.field.add(name="data_type", number=2, type=field.TYPE_ENUM, type_name=".inference.DataType",
                         label=field.LABEL_OPTIONAL)  # fmt: skip
        tensor.field.add(name="dims", number=dims, type=field.TYPE_INT64, label=field.LABEL_REPEATED)
    config = file.message_type.add(name="ModelConfig")
    for name, number in (("name", 1), ("platform", 2)):
        config.field.add(name=name, number=number, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    config.field.add(name="max_batch_size", number=4, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    for name, number, kind in (("input", 5, "ModelInput"), ("output", 6, "ModelOutput")):
        config.field.add(name=name, number=number, type=field.TYPE_MESSAGE, type_name=f".inference.{kind}",
                         label=field.LABEL_REPEATED)  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


def compare_with_onnx(text, model):
    """Triton's rule: max_batch_size 0: dims are the shape; else they are it without the first dimension."""
    from google.protobuf import text_format

    config = text_format.Parse(text, triton_message())
    types = {11: TensorProto.FLOAT, 8: TensorProto.INT32}
    for described, values in ((config.input, model.graph.input), (config.output, model.graph.output)):
        found, expected = {}, {}
        for tensor in described:
            batch = [None] if config.max_batch_size else []
            found[tensor.name] = (types[tensor.data_type], [*batch, *tensor.dims])
        for value in values:
            kind = value.type.tensor_type
            shape = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
            expected[value.name] = (kind.elem_type, shape)
        assert found == expected
    return config


@pytest.mark.parametrize("batch", [1, 3, None])
def test_triton_reads_the_inputs_and_outputs_of_the_model(tmp_path, batch):
    detector = dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, batch=batch))
    model_folder(tmp_path / "tiny", detector, fused=False)
    bundle.pack(tmp_path / "tiny", tmp_path / "a.zip", triton=True)
    bundle.unpack(tmp_path / "a.zip", tmp_path / "out")
    repository = tmp_path / "out" / "triton"
    platforms = {}
    for model in repository.iterdir():
        text = (model / "config.pbtxt").read_text()
        config = compare_with_onnx(text, onnx.load(tmp_path / "tiny" / "heads.onnx"))
        assert config.name == model.name and re.fullmatch(r"[\w.-]+", model.name)
        assert (config.max_batch_size > 1) == (batch is None)
        platforms[config.platform] = model
    assert sorted(platforms) == ["onnxruntime_onnx", "tensorrt_plan"]
    served = platforms["onnxruntime_onnx"] / "1" / "model.onnx"
    assert served.read_bytes() == (tmp_path / "tiny" / "heads.onnx").read_bytes()


def test_a_tensor_cannot_write_into_tritons_configuration():
    from google.protobuf import text_format

    evil = 'a"\\ } parameters { key: "x\n# \0é'
    detector = dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, name=evil))
    config = text_format.Parse(bundle.triton_config(detector, "tiny", "tensorrt_plan"), triton_message())
    assert [tensor.name for tensor in config.input] == [evil]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name: "image"', 'name: "images"'),
        ("dims: [ 1, 3, 16, 24 ]", "dims: [ 1, 3, 24, 16 ]"),
        ("max_batch_size: 0", "max_batch_size: 8"),
        ("TYPE_FP32", "TYPE_INT32"),
        ("output {\n", "input {\n"),
    ],
)
def test_a_wrong_triton_configuration_is_caught(unpacked, folder, old, new):
    text = (unpacked / "triton" / "tiny_one" / "config.pbtxt").read_text()
    assert old in text
    compare_with_onnx(text, onnx.load(folder / "heads.onnx"))
    with pytest.raises(AssertionError):
        compare_with_onnx(text.replace(old, new, 1), onnx.load(folder / "heads.onnx"))


# --- what DeepStream reads

# Of those in DeepStream's gstnvinfer_property_parser.h; nvinfer only warns of a key that it does not know.
NVINFER_KEYS = {
    "property": {
        "gie-unique-id", "process-mode", "interval", "labelfile-path", "gpu-id", "output-tensor-meta",
        "batch-size", "network-mode", "model-engine-file", "int8-calib-file", "workspace-size",
        "output-blob-names", "network-type", "infer-dims", "model-color-format", "net-scale-factor",
        "offsets", "mean-file", "maintain-aspect-ratio", "symmetric-padding", "scaling-filter",
        "scaling-compute-hw", "network-input-order", "custom-lib-path", "parse-bbox-func-name",
        "engine-create-func-name", "onnx-file", "num-detected-classes", "cluster-mode",
    },
    "class-attrs-all": {
        "threshold", "pre-cluster-threshold", "post-cluster-threshold", "nms-iou-threshold", "topk",
    },
}  # fmt: skip


def nvinfer_settings(path):
    """A GLib key file, as nvinfer reads it: its lines are groups, key=value, comments that start with #."""
    lines = path.read_text().splitlines()
    assert all(re.fullmatch(r"#.*|\[[a-z-]+\]|[a-z-]+=\S.*|", line) for line in lines)
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=True)
    parser.optionxform = str
    parser.read_string("\n".join(lines))
    assert set(parser.sections()) == set(NVINFER_KEYS)
    for section, keys in NVINFER_KEYS.items():
        assert set(parser[section]) <= keys
    return parser


def test_nvinfer_normalises_as_the_specification_says(unpacked):
    settings = nvinfer_settings(unpacked / "deepstream" / "nvinfer.txt")["property"]
    pixels = np.arange(256)[:, None]
    means = np.array([float(number) for number in settings["offsets"].split(";")])
    nvinfer = float(settings["net-scale-factor"]) * (pixels - means)
    odapi = pixels * np.array(SPEC.input.scale) + np.array(SPEC.input.offset)
    np.testing.assert_allclose(nvinfer, odapi, rtol=0, atol=1e-12)
    assert settings["model-color-format"] == "0", "RGB, and the means are in that order"


def test_a_misspelt_nvinfer_key_is_caught(unpacked, tmp_path):
    text = (unpacked / "deepstream" / "nvinfer.txt").read_text()
    (tmp_path / "nvinfer.txt").write_text(text.replace("net-scale-factor=", "net-scale-factors="))
    with pytest.raises(AssertionError):
        nvinfer_settings(tmp_path / "nvinfer.txt")


def test_nvinfer_finds_what_it_is_told(unpacked, folder):
    place = unpacked / "deepstream"
    settings = nvinfer_settings(place / "nvinfer.txt")["property"]
    assert (place / settings["onnx-file"]).read_bytes() == (folder / "detector.onnx").read_bytes()
    labels = (place / settings["labelfile-path"]).read_text().splitlines()
    assert labels == ["a nut", "bolt hex head"]
    assert len(labels) == int(settings["num-detected-classes"]) == SPEC.heads.num_classes
    model = onnx.load(folder / "detector.onnx")
    assert settings["output-blob-names"].split(";") == [value.name for value in model.graph.output]
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert [int(settings["batch-size"]), *map(int, settings["infer-dims"].split(";"))] == shape
    assert (
        f'extern "C" bool {settings["parse-bbox-func-name"]}(' in (place / "nvdsinfer_odtrt.cpp").read_text()
    )
    assert settings["custom-lib-path"] in (place / "nvinfer.txt").read_text().split("[property]")[0]
    chosen = {"network-type": "0", "cluster-mode": "4", "maintain-aspect-ratio": "0", "process-mode": "1"}
    assert {key: settings[key] for key in chosen} == chosen
    thresholds = nvinfer_settings(place / "nvinfer.txt")["class-attrs-all"]
    assert float(thresholds["pre-cluster-threshold"]) == SPEC.nms.score_threshold


NOT_STRETCHED = spec.Resizer("keep_aspect_ratio", 16, 24)


@pytest.mark.parametrize(
    ("network", "field"),
    [
        ({"scale": (0.017, 0.0175, 0.0174)}, "input.scale is [0.017, 0.0175, 0.0174]"),
        ({"resizer": NOT_STRETCHED}, "input.resizer.kind is keep_aspect_ratio"),
    ],
)
def test_what_nvinfer_cannot_do_is_refused_by_its_field(folder, tmp_path, network, field):
    copy = shutil.copytree(folder, tmp_path / "tiny")
    detector = dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, **network))
    (copy / "spec.json").write_text(detector.to_json())
    (copy / "detector.onnx").unlink()
    seal(copy)
    message = one_line_error(lambda: bundle.pack(copy, tmp_path / "a.zip", deepstream=True), UnsupportedError)
    assert field in message
    bundle.pack(copy, tmp_path / "a.zip", triton=True)


def test_nvinfer_needs_the_plugin_in_the_model(tmp_path):
    model_folder(tmp_path / "tiny", fused=False)
    message = one_line_error(lambda: bundle.pack(tmp_path / "tiny", tmp_path / "a.zip", deepstream=True))
    assert "detector.onnx: not found; run `odtrt fuse` first" in message


NVINFER_HEADER = """
#pragma once
#include <type_traits>
#include <vector>
// What a parser of boxes uses of DeepStream's nvdsinfer.h and nvdsinfer_custom_impl.h, as documented.
struct NvDsInferDims { unsigned int numDims; unsigned int d[8]; unsigned int numElements; };
enum NvDsInferDataType { FLOAT = 0, HALF = 1, INT8 = 2, INT32 = 3 };
struct NvDsInferLayerInfo { NvDsInferDataType dataType; NvDsInferDims inferDims; int bindingIndex;
                            const char* layerName; void* buffer; int isInput; };
struct NvDsInferNetworkInfo { unsigned int width, height, channels; };
struct NvDsInferParseDetectionParams { unsigned int numClassesConfigured;
                                       std::vector<float> perClassPreclusterThreshold;
                                       std::vector<float> perClassPostclusterThreshold; };
struct NvDsInferObjectDetectionInfo { unsigned int classId; float left, top, width, height;
                                      float detectionConfidence; };
typedef bool (*NvDsInferParseCustomFunc)(std::vector<NvDsInferLayerInfo> const&, NvDsInferNetworkInfo const&,
    NvDsInferParseDetectionParams const&, std::vector<NvDsInferObjectDetectionInfo>&);
#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(function) \\
  static_assert(std::is_same<decltype(&function), NvDsInferParseCustomFunc>::value, "another signature")
"""
TENSORRT_HEADER = """
#pragma once
#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 3
#include <cstdio>
struct Registry {
  void* loadLibrary(const char* path) { std::printf("%s\\n", path); return this; }
};
inline Registry* getPluginRegistry() { static Registry registry; return &registry; }
"""
NVINFER_DRIVER = """
#include <cstdio>
#include "nvdsinfer_custom_impl.h"
extern "C" bool NvDsInferParseOdtrt(const std::vector<NvDsInferLayerInfo>&, const NvDsInferNetworkInfo&,
    const NvDsInferParseDetectionParams&, std::vector<NvDsInferObjectDetectionInfo>&);
int main(int argc, char**) {
  int count = 3, classes[] = {1, 0, 1};
  float boxes[] = {0.25f, 0.5f, 0.75f, 1.f, 0.f, 0.f, 0.5f, 0.125f, 0.f, 0.f, 1.f, 1.f};
  float scores[] = {0.9f, 0.5f, 0.2f};
  std::vector<NvDsInferLayerInfo> layers(4);
  layers[0].layerName = "scores", layers[0].buffer = scores;
  layers[1].layerName = argc > 1 ? "another" : "boxes", layers[1].buffer = boxes;
  layers[2].layerName = "classes", layers[2].buffer = classes;
  layers[3].layerName = "num_detections", layers[3].buffer = &count;
  std::vector<NvDsInferObjectDetectionInfo> found;
  if (!NvDsInferParseOdtrt(layers, {320, 160, 3}, {2, {0.25f, 0.25f}, {}}, found)) return 1;
  for (const auto& o : found)
    std::printf("%u %g %g %g %g %g\\n", o.classId, o.detectionConfidence, o.left, o.top, o.width, o.height);
}
"""


def test_the_nvinfer_parser_gives_pixels_of_the_network_input(unpacked, tmp_path, compiler):
    (tmp_path / "nvdsinfer_custom_impl.h").write_text(NVINFER_HEADER)
    (tmp_path / "NvInferRuntime.h").write_text(TENSORRT_HEADER)
    (tmp_path / "driver.cpp").write_text(NVINFER_DRIVER)
    source = unpacked / "deepstream" / "nvdsinfer_odtrt.cpp"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}"]
    library = tmp_path / "libnvdsinfer_odtrt.so"
    steps = (
        [compiler, *options, "-shared", "-fPIC", source, "-o", library, "-ldl"],
        [compiler, *options, "-Wno-missing-field-initializers", tmp_path / "driver.cpp", library,
         f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "driver"],
    )  # fmt: skip
    for step in steps:
        done = subprocess.run([str(part) for part in step], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"{tmp_path}/../plugins/build/libodtrt_tensorrt.so",
        "1 0.9 160 40 160 80",
        "0 0.5 0 0 40 80",
    ]
    done = subprocess.run([tmp_path / "driver", "x"], capture_output=True, text=True)
    assert done.returncode == 1 and "no output `boxes`" in done.stderr


# --- a device


def python_of(version):
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*versions.glob(f"{version}.*/bin/python{version}"), shutil.which(f"python{version}")]
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return str(python)
    pytest.skip(f"no Python {version} here")


def test_an_archive_unpacks_itself_with_python_38_and_nothing_else(archive, unpacked, tmp_path):
    python = python_of("3.8")
    shutil.copy(archive, tmp_path)
    command = [python, "-I", archive.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "tiny") == contents(unpacked)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1 and "was unpacked here" in again.stderr
    start = [python, "-E", "-S", "tiny/build_here.py"]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, "one line"
    assert (
        done.stderr.startswith("error: ") and "install first: numpy, TensorRT's Python module" in done.stderr
    )
    for name in ("numpy (`sudo apt install python3-numpy`", "TensorRT's Python module (on a Jetson"):
        assert sum(line.startswith(f"missing: {name}") for line in done.stdout.splitlines()) == 1


def test_no_file_in_the_folder_stands_in_for_one_of_pythons_modules(archive, tmp_path):
    """build_here.py used to import a planted argparse.py before it compared anything."""
    out = tmp_path / "out"
    bundle.unpack(archive, out)
    for name in ("argparse.py", "typing.py", "numpy.py", "zipfile/__init__.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    (out / "odtrt_lib" / "mine.py").write_text("")
    done = subprocess.run([sys.executable, out / "build_here.py"], capture_output=True, text=True)
    assert not (tmp_path / "ran").exists()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "argparse.py: not from this bundle" in done.stderr
    assert "bundle: 'argparse.py', 'numpy.py', 'odtrt_lib/mine.py', 'typing.py'" in done.stdout


def test_a_folder_that_was_used_has_no_strangers_but_the_users(archive, tmp_path):
    bundle.unpack(archive, tmp_path / "out")
    for name in (
        "built.json",
        "plugins/build/libodtrt.so",
        "odtrt_lib/__pycache__/a.pyc",
        "model/plans/a.plan",
    ):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("")
    manifest = bundle.verify(tmp_path / "out")
    assert archives.strangers(tmp_path / "out", manifest) == []
    (tmp_path / "out" / "camera_app.py").write_text("")
    assert archives.strangers(tmp_path / "out", manifest) == ["camera_app.py"]
    archives.refuse_impostors(tmp_path / "out", ["camera_app.py"])


def test_a_python_that_is_too_old_is_told_so(archive, unpacked):
    python = python_of("3.6")
    for script in (archive, unpacked / "build_here.py", unpacked / "detect.py"):
        done = subprocess.run([python, script], capture_output=True, text=True)
        assert done.returncode == 1
        assert re.fullmatch(r"error: Python 3\.6 .*3\.8.*\n", done.stderr)


@pytest.mark.parametrize("module", ["numpy", "onnxruntime", "onnx", "onnxconverter_common"])
def test_a_missing_module_is_named_with_what_installs_it(monkeypatch, module):
    pretend_machine(monkeypatch, dataclasses.replace(this_machine(), gpu=None))
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("what fp16 needs depends on the TensorRT that is installed")
    before = bundle.missing_modules("fp16")
    monkeypatch.setitem(sys.modules, module, None)
    package = module.replace("_", "-")
    after = bundle.missing_modules("fp16")
    assert set(after) - set(before) == {package}
    assert f"`python3 -m pip install {package}`" in after[package]
    is_for_half_precision_only = module in ("onnx", "onnxconverter_common")
    assert (package in bundle.missing_modules("fp32")) != is_for_half_precision_only


def test_a_missing_cuda_runtime_is_named(monkeypatch):
    pretend_machine(monkeypatch, dataclasses.replace(this_machine(), gpu="Orin"))

    def absent():
        raise MissingDependencyError("no libcudart.so")

    monkeypatch.setattr(cuda, "library", absent)
    (named,) = [name for name in bundle.missing_modules("fp32") if "libcudart.so" in name]
    assert "nvidia-jetpack" in bundle.missing_modules("fp32")[named]
    monkeypatch.setattr(cuda, "library", lambda: None)
    assert named not in bundle.missing_modules("fp32")


def test_a_missing_tensorrt_is_named(monkeypatch, unpacked):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    said = []
    message = one_line_error(lambda: bundle.build_here(unpacked, say=said.append), MissingDependencyError)
    assert "install first: TensorRT's Python module" in message
    assert [line for line in said if "sudo apt install nvidia-jetpack" in line]
    assert not (unpacked / "built.json").exists()


def test_a_picture_that_is_not_there_is_noticed_before_the_work(unpacked):
    pytest.importorskip("tensorrt_rtx")
    said = []
    work = lambda: bundle.build_here(unpacked, image=unpacked / "no.png", say=said.append)  # noqa: E731
    assert "no.png: cannot be read" in one_line_error(work)
    assert len(said) == 1 and not (unpacked / "plugins" / "build").exists()


BAD_ARGUMENTS = [
    (["--precision", "fp8"], "precision 'fp8': expected fp32 or fp16"),
    (["--memory", "much"], "memory 'much': expected a limit such as 1500MiB"),
    (["--batches", "one"], "batches 'one': expected smallest, best-tuned and largest"),
    (["--batches", "1,8"], "batches 1,8: expected smallest, best-tuned and largest"),
    (["--batches", "8,4,1"], "batches 8,4,1: expected smallest, best-tuned and largest"),
    (["--batches", "0,1,2"], "batches 0,1,2: expected smallest, best-tuned and largest"),
    (["--batches", "1,4,8"], "this model's batch is fixed to 1"),
    (
        ["--allow", "fp32", "--allow", "sleep"],
        "allow 'sleep': expected dynamic_batch or fp32",
    ),
    (["--image", "/no/such.png"], "/no/such.png: cannot be read"),
    (["--needs", "--precision", "fp8"], "precision 'fp8': expected fp32 or fp16"),
]


@pytest.fixture
def without_a_gpu(monkeypatch):

    pytest.importorskip("tensorrt_rtx")
    machine = dataclasses.replace(this_machine(), gpu=None, compute_capability=None)
    pretend_machine(monkeypatch, machine)


@pytest.mark.parametrize(
    ("arguments", "said"), BAD_ARGUMENTS, ids=[" ".join(one) for one, _ in BAD_ARGUMENTS]
)
def test_arguments_are_looked_at_before_anything_is_compiled(
    unpacked, without_a_gpu, monkeypatch, capsys, arguments, said
):
    monkeypatch.setattr(install, "_compile", lambda *_: pytest.fail("compiled"))
    assert bundle.run_build_here([str(unpacked / "build_here.py"), *arguments]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors


def test_the_options_of_the_build_reach_it(unpacked, without_a_gpu, monkeypatch, capsys):
    from odtrt_lib import engine

    asked = []

    def build(folder, **options):
        asked.append({key: value for key, value in options.items() if key != "progress"})
        raise BuildError("far enough")

    monkeypatch.setattr(install, "_compile", lambda *_: (None, None))
    monkeypatch.setattr(engine, "build", build)
    command = "--force --batches 1,1,1 --allow fp32 --allow dynamic_batch --version-compatible"
    script = str(unpacked / "build_here.py")
    assert bundle.run_build_here([script, *command.split(), "--memory", "2GiB"]) == 1
    assert bundle.run_build_here([script]) == 1
    assert capsys.readouterr().err == "error: far enough\n" * 2
    assert asked == [
        {"precision": "fp32", "plugin": None, "memory": "2GiB", "batch": (1, 1, 1), "force": True,
         "allow": ["fp32", "dynamic_batch"], "version_compatible": True},
        {"precision": "fp32", "plugin": None, "memory": None, "batch": None, "force": False,
         "allow": [], "version_compatible": False},
    ]  # fmt: skip


def test_needs_says_what_is_missing_and_builds_nothing(unpacked, without_a_gpu, monkeypatch, capsys):
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("what fp16 needs depends on the TensorRT that is installed")
    before = contents(unpacked)

    def needs(*arguments):
        status = bundle.run_build_here([str(unpacked / "build_here.py"), "--needs", *arguments])
        return status, capsys.readouterr().out.splitlines()

    assert needs() == (0, ["nothing that fp32 needs is missing"])
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        patched.delenv("CXX", raising=False)
        status, lines = needs()
        assert status == 0, "numpy does the compiled kernels' work"
        assert [line.split(" (")[0] for line in lines[:-1]] == [
            "missing, but not needed: cmake",
            "missing, but not needed: a C++ compiler",
        ]
    monkeypatch.setitem(sys.modules, "onnxconverter_common", None)
    assert needs()[0] == 0
    status, lines = needs("--precision", "fp16")
    assert status == 1 and len(lines) == 1 and lines[0].startswith("missing: onnxconverter-common (for fp16")
    assert contents(unpacked) == before


def test_plans_says_of_each_whether_it_may_be_used(archive, tmp_path, monkeypatch, capsys):
    from odtrt_lib import portability

    location = importlib.util.spec_from_file_location("faults_of_plans", ROOT / "benchmarks" / "faults.py")
    faults = importlib.util.module_from_spec(location)
    monkeypatch.setitem(sys.modules, "faults_of_plans", faults)
    location.loader.exec_module(faults)
    bundle.unpack(archive, tmp_path / "out")
    model, script = tmp_path / "out" / "model", str(tmp_path / "out" / "build_here.py")
    assert bundle.run_build_here([script, "--plans"]) == 1
    assert "run build_here.py" in capsys.readouterr().err

    content = b"ftrt" + bytes(20) + bytes((10, 3, 0, 26)) + bytes(5000)
    made = faults.describe(
        content, "1" * 16, model, runtime_library="tensorrt", version="10.3.0", compute_capabilities=(),
        machine=faults.A100,
    )  # fmt: skip
    faults.install(model, content, made)

    def verdicts(machine, version="10.3.0"):
        place = portability.Environment(machine, "tensorrt", version)
        monkeypatch.setattr(portability, "this_environment", lambda plugin: place)
        before = contents(tmp_path / "out")
        assert bundle.run_build_here([script, "--plans"]) == 0
        assert contents(tmp_path / "out") == before
        lines = capsys.readouterr().out.splitlines()
        assert all(line.startswith("    ") for line in lines[1:2]), "a reason follows"
        return [line for line in lines if not line.startswith("    ")], lines

    name = f"{made.plan} (heads.onnx, fp32)"
    assert verdicts(faults.A100)[0] == [f"{name}: ok"]
    heads, lines = verdicts(faults.A100, "10.13.3")
    assert heads == [f"{name}: rebuild"]
    assert any("built by TensorRT 10.3.0, here is TensorRT 10.13.3" in line for line in lines)
    assert verdicts(faults.NO_GPU)[0] == [f"{name}: not here"]
    plan = model / "plans" / made.plan
    plan.write_bytes(content[:-1] + b"!")
    assert verdicts(faults.A100)[0] == [f"{name}: refuse"]
    (model / "plans" / f"{'2' * 16}.json").write_text("{")
    (model / "plans" / "stray.plan").write_bytes(b"?")
    assert verdicts(faults.A100)[0][1:] == [f"{'2' * 16}.json: refuse", "stray.plan: refuse"]


def test_ctrl_c_ends_the_compiler_and_leaves_nothing_half_written(archive, tmp_path):
    """A compiler that never ends stands for one that takes minutes; the pipe's end tells that it is gone."""
    pytest.importorskip("tensorrt_rtx")
    bundle.unpack(archive, tmp_path / "out")
    before = contents(tmp_path / "out")
    pipe, programs = tmp_path / "pipe", tmp_path / "programs"
    os.mkfifo(pipe)
    programs.mkdir()
    for name in ("cmake", "c++"):
        (programs / name).write_text(
            f'#!/bin/sh\nexec 9>"{pipe}"\ntouch "$4/half.o"\nsleep 600 &\necho started >&9\nwait\n'
        )
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    running = subprocess.Popen(
        [sys.executable, tmp_path / "out" / "build_here.py"], env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with pipe.open() as reading:
            assert reading.readline() == "started\n"
            assert (tmp_path / "out" / "plugins" / "build" / "half.o").exists()
            running.send_signal(signal.SIGINT)
            output, errors = running.communicate(timeout=300)
            assert select.select([reading], [], [], 300)[0] and reading.read() == "", "its children are gone"
    finally:
        running.kill()
    assert running.returncode == 130
    assert errors == "interrupted; nothing half-written is left\n"
    assert output.splitlines()[-1].startswith("compiling")
    after = {name: content for name, content in contents(tmp_path / "out").items() if ".pyc" not in name}
    assert after == before


def test_ctrl_c_while_the_compiler_starts_ends_it_too(interrupted_starts, tmp_path):
    with (tmp_path / "log").open("wb") as log, pytest.raises(KeyboardInterrupt):
        install._run_to_its_end(["sleep", "600"], log)
    assert [process.returncode for process in interrupted_starts] == [-signal.SIGKILL]


def test_what_the_system_refuses_is_one_line(archive, tmp_path, monkeypatch, capsys, without_a_gpu):
    bundle.unpack(archive, tmp_path / "out")
    script = str(tmp_path / "out" / "build_here.py")
    (tmp_path / "out" / "plugins" / "build").write_text("in the way")
    assert bundle.run_build_here([script]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {tmp_path / 'out' / 'plugins' / 'build'}: cannot be written")
    assert errors.count("\n") == 1

    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(install, "build_here", refused)
    assert bundle.run_build_here([script]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {tmp_path / 'out'}: cannot be written (Read-only file system)")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("has_plugin", [True, False])
def test_the_line_that_opens_the_detector_is_the_one_that_was_tried(
    folder, tmp_path, monkeypatch, has_plugin
):
    """As on a device with a GPU, which is only pretended, and where fp32 had to be given up."""
    from odtrt_lib import detector, engine
    from odtrt_lib.folder import StageResult

    out = tmp_path / "out"
    bundle.pack(folder, tmp_path / "a.zip")
    bundle.unpack(tmp_path / "a.zip", out)
    machine = dataclasses.replace(this_machine(), gpu="Orin", compute_capability="8.7")
    plugin = out / "plugins" / "build" / "libodtrt_tensorrt.so"
    opened, asked = [], []

    class Opened:
        spec = SPEC

        @classmethod
        def open(cls, folder, backend="auto", *, plugin=None, precision=None):
            opened.append((Path(folder).resolve(), plugin and Path(plugin).resolve(), precision))
            return cls()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def detect(self, image):
            empty = np.zeros((0, 4), np.float32)
            return detector.Detections(empty, np.zeros(0, np.float32), np.zeros(0, np.int64), ())

    class Paper:
        plan, runtime_library, precision = "a.plan", "tensorrt", "fp16"

    def build(folder, **options):
        asked.append(options["plugin"])
        return StageResult({"outputs": {"plans/a.plan": "", "plans/a.json": ""}}, False)

    monkeypatch.setattr(install, "missing_modules", lambda precision: {})
    monkeypatch.setattr(install, "_place_plans", lambda *_: [])
    monkeypatch.setattr(install, "_compile", lambda *_: (None, plugin if has_plugin else None))
    pretend_machine(monkeypatch, machine)
    monkeypatch.setattr("odtrt_lib.engine.passport.passports", lambda folder: [Paper])
    monkeypatch.setattr(engine, "build", build)
    monkeypatch.setattr(detector, "Detector", Opened)
    said = []
    built = bundle.build_here(out, say=said.append, allow=("fp32",))
    assert asked == [plugin if has_plugin else None]
    assert said[-2] == "from odtrt_lib.detector import Detector"
    monkeypatch.chdir(out)
    assert said[-1] == f"detector = {built['open']}"
    eval(built["open"], {"Detector": Opened})
    assert opened[1] == opened[0] == ((out / "model").resolve(), plugin if has_plugin else None, "fp16")
    assert any("memory" in line and "fp32" in line for line in said)
    assert any(line.startswith("the pattern") for line in said)
    assert not any("no NVIDIA GPU" in line for line in said)


def test_a_compiler_that_fails_is_quoted_on_one_line(archive, tmp_path):
    bundle.unpack(archive, tmp_path / "out")
    source = tmp_path / "out" / "plugins" / "kernels" / "status.cpp"
    source.write_text("#error the disk ate this file\n")
    message = one_line_error(lambda: install._compile(tmp_path / "out", lambda line: None), BuildError)
    assert (
        "the disk ate this file" in message and str(tmp_path / "out" / "plugins" / "build" / "log") in message
    )


def test_plans_of_tensorrt_go_where_triton_and_nvinfer_look(archive, tmp_path):
    bundle.unpack(archive, tmp_path / "out")
    plans = {name: tmp_path / f"{name}.plan" for name in ("heads.onnx", "detector.onnx")}
    for name, path in plans.items():
        path.write_text(f"plan of {name}")
    said = []
    placed = install._place_plans(tmp_path / "out", plans, "tensorrt", said.append)
    assert {path.relative_to(tmp_path / "out").as_posix(): path.read_text() for path in placed} == {
        "triton/tiny_one/1/model.plan": "plan of heads.onnx",
        "deepstream/detector.plan": "plan of detector.onnx",
    }
    assert said == []
    del plans["detector.onnx"]
    placed = install._place_plans(tmp_path / "out", plans, "tensorrt", said.append)
    assert [path.name for path in placed] == ["model.plan"]
    assert len(said) == 1 and "a plan of detector.onnx" in said[0]


@pytest.mark.parametrize(("largest", "is_told"), [(8, False), (4, True)])
def test_a_plan_for_smaller_batches_than_triton_is_told_of_is_said(tmp_path, largest, is_told):
    detector = dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, batch=None))
    path, said = tmp_path / "config.pbtxt", []
    path.write_text(bundle.triton_config(detector, "tiny", "tensorrt_plan"))
    install._compare_batch(path, largest, said.append)
    assert bool(said) == is_told
    assert not is_told or re.search("max_batch_size is 8,.* 4 ", said[0])


@pytest.mark.parametrize(
    "broken",
    [
        {"boxes": [[0, 0, np.nan, 8]]},
        {"boxes": [[0, 0, 99, 8]]},
        {"boxes": [[8, 0, 4, 8]]},
        {"scores": [0.1]},
        {"scores": [np.inf]},
    ],
)
def test_detections_that_cannot_be_right_are_caught(broken):
    from odtrt_lib.detector import Detections

    def detections(boxes=((0, 0, 4, 8),), scores=(0.5,)):
        return Detections(np.float32(boxes), np.float32(scores), np.array([1]), ("a nut",))

    install._check_detections(detections(), (16, 24), SPEC)
    with pytest.raises(CheckError, match=r"1 detections .*cannot"):
        install._check_detections(detections(**broken), (16, 24), SPEC)


def test_the_plugin_is_compiled_and_its_plan_built(archive, tmp_path, monkeypatch):
    """As on a device with a GPU, which is only pretended: nothing of it runs here."""
    headers = os.environ.get("TENSORRT_INCLUDE_DIR")
    if headers is None or shutil.which("nvcc") is None:
        pytest.skip("the plugin is compiled with nvcc and TensorRT's headers: set TENSORRT_INCLUDE_DIR")

    machine, compile_here = (
        dataclasses.replace(this_machine(), compute_capability="8.7"),
        install._compile,
    )

    def compile_for_a_gpu(*arguments):
        with monkeypatch.context() as pretended:
            pretend_machine(pretended, machine)
            return compile_here(*arguments)

    monkeypatch.setattr(install, "_compile", compile_for_a_gpu)
    bundle.unpack(archive, tmp_path / "out")
    said = []
    built = bundle.build_here(tmp_path / "out", say=said.append)
    assert built["plugin"] == "plugins/build/libodtrt_tensorrt.so"
    assert [line for line in said if line.endswith("architectures 87")]
    assert sorted(built["plans"]) == ["detector.onnx", "heads.onnx"], "the second is for Triton"
    sizes = {name: (tmp_path / "out" / plan).stat().st_size for name, plan in built["plans"].items()}
    assert sizes["detector.onnx"] > sizes["heads.onnx"]


TO_DETECT = ("numpy", "onnxruntime", "pillow")
TO_BUILD = (
    *TO_DETECT, "onnx", "onnxconverter-common", "protobuf",
    "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs",
)  # fmt: skip


def device_environment(path, packages=TO_BUILD):
    """A virtual environment with these and what they need, linked from this one: no TensorFlow or odtrt."""
    venv.create(path, with_pip=False, symlinks=True)
    site = next(path.glob("lib/python3*/site-packages"))
    wanted = list(packages)
    linked = set()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in linked:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: run `pip install -e '.[convert,engine]'`")
        linked.add(name)
        for file in {Path(file.parts[0]) for file in distribution.files if file.parts[0] != ".."}:
            source = Path(distribution.locate_file(file))
            if source.exists() and not (site / file).exists():
                (site / file).symlink_to(source)
        requires = [text for text in distribution.requires or [] if "extra ==" not in text]
        wanted += [re.match(r"[\w.-]+", text).group() for text in requires]
    return path / "bin" / "python"


def told_rows(lines):
    """(name, score, box) of each row of a table that a command printed."""
    row = re.compile(r"\s+(\S.*?) +(\d\.\d{3})  \[ *(\d+), +(\d+), +(\d+), +(\d+)\]")
    matches = [match for match in map(row.fullmatch, lines) if match]
    return [(match[1], match[2], tuple(map(int, match.groups()[2:]))) for match in matches]


def expected_rows(found, min_score=0.3):
    """The same rows by Python's own rounding, from a Detector's answer."""
    return [
        (
            name.replace("\n", r"\n"),
            format(float(score), ".3f"),
            tuple(int(format(float(side), ".0f")) for side in box),
        )
        for name, score, box in zip(found.names, found.scores, found.boxes, strict=True)
        if score >= min_score
    ]


def assert_same_rows(found, expected):
    """To the last digits that are shown, in which processors may differ."""
    assert [name for name, _, _ in found] == [name for name, _, _ in expected]
    for (_, score, box), (_, expected_score, expected_box) in zip(found, expected, strict=True):
        assert float(score) == pytest.approx(float(expected_score), abs=0.0011)
        assert box == pytest.approx(expected_box, abs=1)


def check_drawn(path, image, found, min_score=0.3):
    """The picture in ``path`` is ``image`` but for lines along every box, and labels."""
    from PIL import Image

    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert drawn.shape == image.shape
    change = np.abs(drawn - image).max(2)
    height, width = change.shape
    assert np.median(change) < 8, "most pixels are the picture's"
    boxes = found.boxes[found.scores >= min_score]
    for top, left, bottom, right in np.clip(boxes, 0, [height - 1, width - 1] * 2).round().astype(int):
        rows, columns = slice(top, bottom + 1), slice(left, right + 1)
        for side in (
            *(change[max(y - 1, 0) : y + 2, columns].max(0) for y in (top, bottom)),
            *(change[rows, max(x - 1, 0) : x + 2].max(1) for x in (left, right)),
        ):
            assert np.mean(side > 32) > 0.9, (top, left, bottom, right)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A smooth picture in a folder, twice."""
    from PIL import Image

    y, x = np.mgrid[:240, :400]
    image = np.stack([x / 2, y, (x + y) / 3], -1).astype(np.uint8)
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(image[:, ::-1]).save(folder / "b.png")
    return folder, image


@pytest.fixture(scope="module")
def detect_on_device(archive, tmp_path_factory):
    """Runs detect.py of a fresh bundle where there are only these packages."""
    place = tmp_path_factory.mktemp("device")
    bundle.unpack(archive, place / "tiny")
    pythons = {}

    def run(*arguments, packages=TO_DETECT):
        if packages not in pythons:
            pythons[packages] = device_environment(place / f"environment{len(pythons)}", packages)
        quiet = {"PATH": os.environ["PATH"], "HOME": str(place), "LANG": "C.UTF-8"}
        command = [pythons[packages], "tiny/detect.py", *map(str, arguments)]
        return subprocess.run(command, cwd=place, env=quiet, capture_output=True, text=True, check=False)

    return run, place


def test_detect_py_tells_and_draws_what_the_detector_finds(detect_on_device, pictures, tmp_path):
    from odtrt_lib.detector import Detector

    (run, place), (folder, image) = detect_on_device, pictures
    before = contents(folder)
    found = Detector.open(place / "tiny" / "model", "onnxruntime").detect(image)
    assert len(expected_rows(found)) > 3
    done = run(folder / "a.png")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"tiny one: ONNX Runtime [\d.]+ on the CPU", lines[0])
    assert lines[1] == f"{folder / 'a.png'}: drawn in {place / 'tiny' / 'detections' / 'a.jpg'}"
    assert told_rows(lines) == expected_rows(found)
    check_drawn(place / "tiny" / "detections" / "a.jpg", image, found)
    assert lines[-1] == f"{len(expected_rows(found))} detections with a score of at least 0.3; pictures: 1"

    done = run(folder, "--min-score", "0.95", "-o", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr
    strong = expected_rows(found, 0.95)
    assert 0 < len(strong) < len(expected_rows(found))
    assert told_rows(done.stdout.splitlines())[: len(strong)] == strong
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.jpg", "b.jpg"]
    check_drawn(tmp_path / "drawn" / "a.jpg", image, found, 0.95)
    assert contents(folder) == before


def test_detect_py_never_draws_over_a_picture_that_it_was_given(detect_on_device, pictures, tmp_path):
    from PIL import Image

    (run, _), (_, image) = detect_on_device, pictures
    Image.fromarray(image).save(tmp_path / "a.jpg")
    before = (tmp_path / "a.jpg").read_bytes()
    for _ in range(2):
        done = run(tmp_path / "a.jpg", "-o", tmp_path)
        assert done.returncode == 0 and f"drawn in {tmp_path / 'a-2.jpg'}" in done.stdout, done.stderr
    assert (tmp_path / "a.jpg").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.jpg", "a.jpg"]


def test_detect_py_names_what_it_cannot_use_and_goes_on(detect_on_device, pictures, tmp_path):
    (run, _), (folder, _) = detect_on_device, pictures
    shutil.copy(folder / "a.png", tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((folder / "a.png").read_bytes()[:100])
    done = run(tmp_path, "-o", tmp_path / "drawn")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and f"error: {tmp_path / 'bad.png'}: damaged" in done.stderr
    assert told_rows(done.stdout.splitlines()) and (tmp_path / "drawn" / "good.jpg").is_file()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--camera", "0"], 1, "error: camera 0: needs OpenCV"),
        (["--camera", "csi:0"], 1, "error: camera csi:0: needs OpenCV"),
        (["rtsp://127.0.0.1/x"], 1, "error: rtsp://127.0.0.1/x: needs OpenCV"),
        (["tiny/README.txt"], 1, "error: tiny/README.txt: needs OpenCV"),
        (["nowhere.png"], 1, "error: nowhere.png: not found"),
        (["tiny/model"], 1, "error: tiny/model: no picture in this folder"),
        (["tiny/README.txt", "tiny/model"], 1, "error: tiny/README.txt: a video; expected only pictures"),
        ([], 2, "error: name what to detect in"),
        (["a.png", "--camera", "0"], 2, "error: name what to detect in"),
        (["a.mp4", "--frames", "0"], 2, "--frames: '0': expected a number of at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_detect_py_refuses_in_one_line(detect_on_device, arguments, status, said):
    done = detect_on_device[0](*arguments)
    assert done.returncode == status and said in done.stderr.splitlines()[-1]
    assert status == 2 or done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_detect_py_goes_through_a_video(detect_on_device, pictures, tmp_path):
    from test_sources import write_video

    (run, _), (_, image) = detect_on_device, pictures
    video = write_video(tmp_path / "v.avi", [image] * 5)
    with_opencv = (*TO_DETECT, "opencv-python-headless")
    done = run(video, packages=with_opencv)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    name, page, end = done.stdout.splitlines()
    assert name.startswith("tiny one: ONNX Runtime")
    assert re.fullmatch(rf"{video}: see http://127\.0\.0\.1:\d+/; Ctrl-C ends this", page)
    figures = r"\d+\.\d FPS; detection p50 \d+\.\d\d ms, p99 \d+\.\d\d ms"
    assert re.fullmatch(rf"{video}: 5 frames; {figures}", end)
    done = run(video, "--frames", 2, packages=with_opencv)
    assert done.returncode == 0 and re.search(rf"\n{video}: 2 frames; {figures}\n$", done.stdout)
    video.write_text("cut off")
    done = run(video, packages=with_opencv)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {video}: OpenCV cannot read it")


@pytest.mark.parametrize(
    ("built", "asked"),
    [
        (None, {}),
        ({"backend": "onnxruntime", "plans": {"heads.onnx": "p"}}, {}),
        ({"backend": "tensorrt", "plans": {"heads.onnx": "p"}}, {"plugin": None, "precision": "fp16"}),
        ({"backend": "tensorrt", "plans": {"detector.onnx": "p"}}, {"plugin": "x/l.so", "precision": "fp16"}),
    ],
    ids=["not built", "no GPU", "split", "fused"],
)
def test_detect_py_opens_the_detector_that_was_built(tmp_path, monkeypatch, built, asked):
    from odtrt_lib.detector import Detector

    opened = []
    monkeypatch.setattr(Detector, "open", lambda *where, **how: opened.append((where, how)))
    if built is not None:
        built = {"precision": "fp16", "plugin": "x/l.so", **built}
        (tmp_path / "built.json").write_text(json.dumps(built))
    bundle.open_here(tmp_path)
    if asked.get("plugin"):
        asked = {**asked, "plugin": tmp_path / asked["plugin"]}
    assert opened == [((tmp_path / "model",), asked)]
    (tmp_path / "built.json").write_text('{"plans": 1}')
    assert "built.json: damaged; run build_here.py again" in one_line_error(
        lambda: bundle.open_here(tmp_path)
    )


def test_letters_need_a_newer_pillow_and_it_is_said_before_the_work(unpacked, monkeypatch, without_a_gpu):
    from PIL import ImageFont

    def load_default():
        """Pillow 10.0's, which takes no size."""

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    monkeypatch.setattr(install, "_compile", lambda *_: pytest.fail("compiled"))
    picture = Path(unpacked) / "pattern.png"
    from PIL import Image

    Image.fromarray(install._pattern(SPEC)).save(picture)
    work = lambda: bundle.build_here(unpacked, image=picture, say=lambda line: None)  # noqa: E731
    message = one_line_error(work, MissingDependencyError)
    picture.unlink()
    assert "cannot draw letters" in message and "`python3 -m pip install --upgrade pillow`" in message


@pytest.fixture(scope="module")
def fused_parts(parts_folder, tmp_path_factory):
    """The shipped detector after export, convert and fuse."""
    path = shutil.copytree(parts_folder, tmp_path_factory.mktemp("model") / "parts")
    shutil.rmtree(path / "plans")
    fuse.fuse(path)
    return path


def test_pack_here_unpack_build_and_detect_on_a_fresh_machine(fused_parts, native_library, offline, tmp_path):
    """Elsewhere: another environment without TensorFlow and odtrt, another folder, only the one file."""
    from PIL import Image

    from odtrt_lib.detector import Detector
    from odtrt_lib.scenes import TEST_SEEDS, render_scene

    image = render_scene(TEST_SEEDS[0]).image
    device = tmp_path / "device"
    device.mkdir()
    Image.fromarray(image).save(device / "scene.png")
    bundle.pack(fused_parts, device / "parts.odtrt.zip", triton=True, deepstream=True)
    expected = Detector.open(fused_parts).detect(image)

    python = device_environment(tmp_path / "environment")
    quiet = {**offline.environment, "PYTHONPATH": "", "LANG": "C.UTF-8"}

    def on_device(*command, **how):
        return subprocess.run(
            [python, *command], cwd=device, env={**quiet, **how}, capture_output=True, text=True, check=False
        )

    for module in ("tensorflow", "odtrt_lib", "typer", "rich", "cv2"):
        assert f"No module named '{module}'" in on_device("-c", f"import {module}").stderr
    assert on_device("parts.odtrt.zip").returncode == 0

    # First without cmake and compiler: said in a line each, and numpy does their work.
    (tmp_path / "nothing").mkdir()
    done = on_device("parts/build_here.py", "--image", "scene.png", PATH=str(tmp_path / "nothing"))
    assert done.returncode == 0, done.stdout + done.stderr
    for missing in ("cmake (`sudo apt install cmake`)", "a C++ compiler (`sudo apt install g++`)"):
        assert sum(line.startswith(f"missing: {missing}") for line in done.stdout.splitlines()) == 1
    built = json.loads((device / "parts" / "built.json").read_text())
    assert built["library"] is None and built["backend"] == "onnxruntime"
    assert told_rows(done.stdout.splitlines()) == expected_rows(expected)
    page = told_rows((ROOT / "book" / "setup_device.md").read_text().splitlines())
    assert_same_rows(page, expected_rows(expected, 0.5))
    assert built["drawn"] == str(device.resolve() / "parts" / "detections" / "scene.jpg")
    check_drawn(built["drawn"], image, expected)
    found = built["detections"]
    np.testing.assert_allclose([row["box"] for row in found[:5]], expected.boxes[:5], atol=0.05)
    np.testing.assert_allclose([row["score"] for row in found[:5]], expected.scores[:5], atol=1e-4)

    done = on_device("parts/build_here.py", "--image", "scene.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing" not in done.stdout
    table = told_rows(done.stdout.splitlines())
    assert table == expected_rows(expected)
    done_again = on_device("parts/detect.py", "scene.png", "-o", "drawn")
    assert done_again.returncode == 0 and told_rows(done_again.stdout.splitlines()) == table
    check_drawn(device / "drawn" / "scene.jpg", image, expected)
    built = json.loads((device / "parts" / "built.json").read_text())
    assert built["library"] == "plugins/build/libodtrt.so"
    plan = device / "parts" / built["plans"]["heads.onnx"]
    described = [
        json.loads(path.read_text())
        for path in plan.parent.glob("*.json")
        if "fingerprint" in path.read_text()
    ]
    assert hashlib.sha256(plan.read_bytes()).hexdigest() in {entry["plan_sha256"] for entry in described}
    assert built["serving"] == [], "Triton and nvinfer do not load TensorRT-RTX's plans"
    assert done.stdout.count("not written; ") == 2
    rows = [
        {"class_id": int(c), "name": n, "score": float(s), "box": [float(x) for x in b]}
        for c, n, s, b in zip(
            expected.class_ids, expected.names, expected.scores, expected.boxes, strict=True
        )
    ]
    assert built["detections"] == rows, "to the last bit"
    assert rows[0]["score"] > 0.5

    # And the unpacked folder can be moved, and used from Python as its README says.
    (device / "parts").rename(device / "moved")
    done = on_device("moved/build_here.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\.plan: up to date .*heads\.onnx", done.stdout)
    lines = done.stdout.splitlines()
    assert any(line.startswith("no NVIDIA GPU here") and "heads.onnx" in line for line in lines)
    assert any(re.match(r"check: \d+ detections .*ONNX Runtime", line) for line in lines)
    assert lines[-3] == f"next, in Python, in {device / 'moved'}:"
    program = "; ".join([*lines[-2:], "print(detector.status.backend)"])
    done = subprocess.run(
        [python, "-c", program], cwd=device / "moved", env=quiet, capture_output=True, text=True, check=False
    )
    assert done.stdout == "onnxruntime\n", done.stderr
    assert offline.network == []
    assert not [path for path in offline.home if "onnxruntime" in path]
