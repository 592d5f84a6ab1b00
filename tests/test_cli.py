"""The command line as a user meets it: what is printed, where, and the exit status.

The stages themselves are replaced here by small functions that write what the real ones write; each has
its own tests, and the whole path is run for real in the end-to-end test.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import spec_cases
from PIL import Image

from odtrt_lib import bundle, convert, detector, engine, export, scenes, spec, zoo
from odtrt_lib.app import cli, doctor
from odtrt_lib.detector import Detections
from odtrt_lib.engine import passport
from odtrt_lib.engine.passport import Machine
from odtrt_lib.errors import BuildError, CheckError, InputError, MissingDependencyError, UnsupportedError
from odtrt_lib.folder import StageResult, last_record, sha256, write_record
from odtrt_lib.preprocess import load_image

SPEC = spec_cases.example(
    spec_cases.ssd(256, 2, True),
    spec.NmsSpec(0.5, 0.5, 10, 10, False, True),
    spec_cases.network_input(16, 16),
    name="parts",
    labels=spec_cases.named("cat", "dog"),
)
PARTS = dataclasses.replace(
    SPEC,
    heads=dataclasses.replace(SPEC.heads, num_classes=len(scenes.PARTS_CLASSES)),
    labels=tuple(spec.Label(i, name) for i, name in enumerate(scenes.PARTS_CLASSES, 1)),
)


def is_line(text, *facts):
    """Whether a message is one line that has the facts, in this order."""
    return text.count("\n") == 1 and re.search(".*".join(map(re.escape, facts)), text) is not None


def odtrt(capsys, *arguments):
    """Runs the command line in this process: (exit status, stdout, stderr)."""
    try:
        cli.main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def finish(folder, stage, outputs, up_to_date=False, note="", **checks):
    record = last_record(folder, stage) if up_to_date else None
    if record is None:
        record = write_record(
            folder,
            stage,
            inputs={},
            settings={},
            outputs=outputs,
            versions={},
            seconds=1.25,
            peak_rss_mb=10.0,
            checks=checks,
        )
    return StageResult(record, up_to_date, note)


class Stages:
    """Stand-ins for the stages. ``calls`` says with what each was called."""

    def __init__(self):
        self.calls, self.detector_spec, self.up_to_date = {}, SPEC, False

    def export(self, source, folder, **options):
        self.calls["export"] = {"source": source, "folder": folder, **options}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "frozen.pb").write_bytes(b"graph" * 1000)
        (folder / "anchors.npy").write_bytes(b"anchors")
        (folder / "spec.json").write_text(self.detector_spec.to_json())
        note = "checkpoint: train/ckpt-3 (the one that train/checkpoint names)"
        names = ["frozen.pb", "anchors.npy", "spec.json"]
        return finish(folder, "export", names, self.up_to_date, note, variables_restored=412)

    def convert(self, folder, **options):
        self.calls["convert"] = options
        (folder / "heads.onnx").write_bytes(b"onnx" * 1000)
        return finish(folder, "convert", ["heads.onnx"], self.up_to_date, resizes_agree=True)

    def build(self, folder, **options):
        self.calls["build"] = options
        (folder / "plans").mkdir(exist_ok=True)
        (folder / "plans" / "abc.plan").write_bytes(b"plan" * 1000)
        return finish(folder, "engine", ["plans/abc.plan"], self.up_to_date, layers=9)

    def open(self, folder, backend="auto", **options):
        self.calls["open"] = {"backend": backend, **options}

        def detect(image):
            height, width = image.shape[:2]
            return Detections(
                boxes=np.array([[1, 2, height - 1, width - 2], [3, 3, 9, 9], [0, 0, 5, 5]], np.float32),
                scores=np.array([0.9, 0.45, 0.1], np.float32),
                class_ids=np.array([1, 2, 2]),
                names=("cat", "dog", "dog"),
            )

        return SimpleNamespace(
            spec=self.detector_spec,
            backend=SimpleNamespace(name="onnxruntime"),
            detect=detect,
            status=detector.Status(
                "onnxruntime", "ONNX Runtime on the CPU", None, reasons=("0123456789abcdef: no GPU here",)
            ),
        )


@pytest.fixture
def stages(monkeypatch, tmp_path):
    stages = Stages()
    monkeypatch.setattr(export, "export", stages.export)
    monkeypatch.setattr(convert, "convert", stages.convert)
    monkeypatch.setattr(engine, "build", stages.build)
    monkeypatch.setattr(detector.Detector, "open", stages.open)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    return stages


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    """The shell finds ``odtrt``, so that the advice about the next command names it so."""
    monkeypatch.setattr(cli.shutil, "which", lambda name: f"/usr/bin/{name}")


def picture(path, height=40, width=60):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return path


class TestRun:
    def test_a_damaged_picture_is_said_before_the_stages(self, capsys, stages, tmp_path):
        (tmp_path / "street.png").write_bytes(b"no picture")
        status, _, err = odtrt(capsys, "run", "my_model", "--image", tmp_path / "street.png")
        assert status == 1
        assert "street.png: damaged" in err
        assert not stages.calls

    def test_all_stages_and_the_report(self, capsys, stages, tmp_path):
        image = picture(tmp_path / "street.png")
        status, out, err = odtrt(capsys, "run", "my_model", "--image", image, "--precision", "fp16")
        assert (status, err) == (0, "")
        folder = Path("out/my_model")
        assert stages.calls["export"]["folder"] == folder
        assert stages.calls["build"] == {"precision": "fp16", "force": False}
        for stage in ("export", "convert", "engine", "detect"):
            assert f"✓ {stage}: " in out
        assert "frozen.pb 5.0 kB" in out
        assert "variables restored: 412" in out
        assert out.splitlines()[-1] == "report: out/my_model/report.html"
        page = (folder / "report.html").read_text()
        assert "street.png: cat 0.90, dog 0.45" in page
        found = json.loads((folder / "detections.json").read_text())
        assert [(row["name"], row["box"]) for row in found] == [
            ("cat", [1, 2, 39, 58]),
            ("dog", [3, 3, 9, 9]),
        ]

    def test_options_reach_the_stages(self, capsys, stages, tmp_path):
        arguments = ["--pipeline", "p.config", "--label-map", "l.txt", "--input-size", "512x640", "--force"]
        assert odtrt(capsys, "run", "ckpt/ckpt-7", "-o", tmp_path / "there", *arguments)[0] == 0
        assert stages.calls["export"] == {
            "source": Path("ckpt/ckpt-7"),
            "folder": tmp_path / "there",
            "pipeline": Path("p.config"),
            "label_map": Path("l.txt"),
            "input_size": (512, 640),
            "force": True,
        }
        assert stages.calls["convert"] == {"force": True}
        assert stages.calls["build"]["force"]

    def test_a_second_run_says_that_everything_is_up_to_date(self, capsys, stages):
        odtrt(capsys, "run", "my_model")
        stages.up_to_date = True
        status, out, _ = odtrt(capsys, "run", "my_model")
        assert status == 0
        for stage in ("export", "convert", "engine"):
            assert f"✓ {stage}: up to date" in out

    def test_without_tensorrt_the_rest_goes_on(self, capsys, stages, monkeypatch, tmp_path):
        for runtime_library in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, runtime_library, None)
        monkeypatch.setattr(engine, "build", real_build)
        status, out, _ = odtrt(capsys, "run", "my_model", "--image", picture(tmp_path / "a.png"))
        assert status == 0
        assert "– engine: skipped: no TensorRT can be imported" in out
        assert "✓ detect" in out
        assert "no TensorRT can be imported" in Path("out/my_model/report.html").read_text()

    def test_without_a_picture_detection_is_left_out(self, capsys, stages):
        status, out, _ = odtrt(capsys, "run", "my_model")
        assert status == 0
        assert re.search("– detect: skipped: .*`--image FILE`", out)
        assert not Path("out/my_model/detections.json").exists()

    def test_a_model_of_the_shipped_parts_looks_at_unseen_scenes(self, capsys, stages, monkeypatch):
        stages.detector_spec = PARTS
        rendered = []
        scene = scenes.Scene(
            np.zeros((40, 60, 3), np.uint8),
            np.array([[1, 2, 39, 58], [20, 20, 30, 30]], np.float32),
            np.array([1, 3]),
        )
        monkeypatch.setattr(scenes, "render_scene", lambda seed: rendered.append(seed) or scene)
        assert odtrt(capsys, "run", "parts")[0] == 0
        assert len(rendered) == 4
        assert set(rendered) <= set(scenes.TEST_SEEDS)
        checks = last_record("out/parts", "detect")["checks"]
        assert checks["objects_in_the_pictures"] == 8
        assert checks["objects_found"] == 4, "the second object is missed each time"
        assert checks["objects_missed"] == 4
        kept = sorted(Path("out/parts/scenes").glob("*.png"))
        assert len(kept) == 4, "pictures to try `odtrt detect` on"
        assert all((load_image(path) == scene.image).all() for path in kept)

    def test_a_missing_picture_is_noticed_before_the_work(self, capsys, stages):
        status, _, err = odtrt(capsys, "run", "my_model", "--image", "nowhere.jpg")
        assert status == 1 and is_line(err, "error: nowhere.jpg: not found", "picture")
        assert stages.calls == {}

    @pytest.mark.parametrize("size", ["512", "axb", "512x", "-1x5"])
    def test_a_malformed_size(self, capsys, stages, size):
        status, _, err = odtrt(capsys, "run", "my_model", "--input-size", size)
        assert status == 1 and is_line(err, f"error: --input-size {size}: ", "height x width")

    @pytest.mark.parametrize(
        ("model", "name"),
        [
            ("models/parts", "parts"),
            ("exported/checkpoint/ckpt-0", "exported"),
            ("exported/saved_model", "exported"),
            ("train/ckpt-12", "train"),
            ("train/ckpt-12.index", "train"),
        ],
    )
    def test_the_default_folder_has_the_models_name(self, capsys, stages, model, name):
        for folder in ("models/parts", "exported/saved_model", "exported/checkpoint", "train"):
            Path(folder).mkdir(parents=True, exist_ok=True)
        Path("exported/checkpoint/ckpt-0.index").touch()
        Path("train/ckpt-12.index").touch()
        assert odtrt(capsys, "run", model)[0] == 0
        assert stages.calls["export"]["folder"] == Path("out") / name


real_build = engine.build


class TestSingleStages:
    def test_export(self, capsys, stages):
        status, out, _ = odtrt(capsys, "export", "my_model", "--batch", "dynamic")
        assert status == 0
        assert stages.calls["export"]["batch"] is None
        assert re.search(r"checkpoint: train/ckpt-3 \(.*train/checkpoint", out)
        assert "next: odtrt convert out/my_model" in out

    @pytest.mark.parametrize("batch", ["0", "-1", "many", "1.5"])
    def test_a_malformed_batch(self, capsys, stages, batch):
        status, _, err = odtrt(capsys, "export", "my_model", f"--batch={batch}")
        assert (status, stages.calls) == (1, {})
        assert is_line(err, f"error: --batch {batch}: ", "`dynamic`")

    @pytest.mark.parametrize("is_decisive", [True, False])
    def test_a_gate_that_rounding_made_blind_is_named(self, capsys, stages, monkeypatch, is_decisive):
        parity = {"is_decisive": is_decisive, "sees_kernel_change": 0.25}

        def convert_blindly(folder, **options):
            (folder / "heads.onnx").write_bytes(b"heads")
            return finish(folder, "convert", ["heads.onnx"], parity=parity)

        odtrt(capsys, "export", "my_model")
        monkeypatch.setattr(convert, "convert", convert_blindly)
        status, out, _ = odtrt(capsys, "convert", "out/my_model")
        assert status == 0
        assert ("convert: parity is not decisive" in " ".join(out.split())) is not is_decisive

    def test_convert_and_build(self, capsys, stages):
        odtrt(capsys, "export", "my_model")
        status, out, _ = odtrt(capsys, "convert", "out/my_model", "--opset", "15")
        assert (status, stages.calls["convert"]) == (0, {"opset": 15, "force": False})
        assert "next: odtrt build out/my_model" in out
        status, out, _ = odtrt(capsys, "build", "out/my_model")
        asked = stages.calls["build"]
        assert callable(asked.pop("progress"))
        assert (status, asked) == (
            0,
            {
                "precision": "fp32",
                "plugin": None,
                "batch": None,
                "memory": None,
                "version_compatible": False,
                "hardware_compatibility": "none",
                "compute_capabilities": None,
                "allow": [],
                "force": False,
            },
        )
        assert "plans/abc.plan 4.0 kB" in out

    def test_the_options_of_a_build(self, capsys, stages, tmp_path):
        limits = ["--memory", "60%", "--allow", "fp32", "--allow", "dynamic_batch"]
        carried = [
            "--version-compatible",
            "--hardware-compatible",
            "ampere_plus",
            "--gpu",
            "8.6",
            "--gpu",
            "8.9",
        ]
        arguments = ["--batches", "1,4,8", *limits, *carried, "--force"]
        assert odtrt(capsys, "build", tmp_path, *arguments)[0] == 0
        asked = stages.calls["build"]
        assert (asked["batch"], asked["memory"], asked["force"]) == ((1, 4, 8), "60%", True)
        assert asked["allow"] == ["fp32", "dynamic_batch"]
        assert (asked["version_compatible"], asked["hardware_compatibility"]) == (True, "ampere_plus")
        assert asked["compute_capabilities"] == ["8.6", "8.9"]

    @pytest.mark.parametrize("sizes", ["8", "1,2", "0,1,2", "1,2,x"])
    def test_malformed_batches(self, capsys, stages, tmp_path, sizes):
        status, _, err = odtrt(capsys, "build", tmp_path, "--batches", sizes)
        assert (status, stages.calls) == (1, {})
        assert is_line(err, f"error: --batches {sizes}: ", "smallest", "largest", "1,4,8")

    def test_an_earlier_stage_is_named(self, capsys, tmp_path):
        status, _, err = odtrt(capsys, "build", tmp_path)
        assert status == 1
        assert is_line(err, f"error: {tmp_path}/heads.onnx: not found", "`odtrt convert`")

    @pytest.mark.parametrize("command", ["run", "export", "convert"])
    def test_an_old_python_is_told_to_go_elsewhere(self, capsys, stages, monkeypatch, command):
        monkeypatch.setattr(cli, "_PYTHON_OF_TENSORFLOW", (9, 0))
        status, _, err = odtrt(capsys, command, "my_model")
        assert (status, stages.calls) == (1, {})
        assert is_line(err, "export and convert", "9.0")

    @pytest.mark.parametrize("command", [("export",), ("run",), ("convert",), ("export", "model", "-o")])
    def test_a_path_that_tensorflow_cannot_open_is_called_that(self, capsys, stages, command):
        status, _, err = odtrt(capsys, *command, os.fsdecode(b"mod\xe8le"))
        assert (status, stages.calls) == (1, {})
        assert is_line(err, r"error: mod\xe8le: ", "UTF-8")


class TestPlansAndBundles:
    def test_no_plan(self, capsys, tmp_path):
        status, _, err = odtrt(capsys, "plans", tmp_path)
        assert status == 1
        assert is_line(err, f"error: {tmp_path}/plans: no plan", f"`odtrt build {tmp_path}`")

    def test_every_plan_gets_a_verdict_and_a_damaged_passport_is_listed(self, capsys, tmp_path, monkeypatch):
        folder = plan_of_elsewhere(tmp_path, "10.3.0")
        (folder / "plans" / "fedcba9876543210.json").write_text("{")
        monkeypatch.setenv("COLUMNS", "400")
        status, out, _ = odtrt(capsys, "plans", folder)
        assert status == 0
        rows = [line for line in out.splitlines() if "│" in line]
        assert any("TensorRT 10.3.0" in row and "not here" in row for row in rows), out
        assert any("fedcba9876543210.json" in row and "refuse" in row for row in rows), out

    def test_a_plan_without_a_passport_is_listed_as_never_loaded(self, capsys, tmp_path, monkeypatch):
        folder = plan_of_elsewhere(tmp_path, "10.3.0")
        (folder / "plans" / "0123456789abcdef.json").unlink()
        monkeypatch.setenv("COLUMNS", "400")
        status, out, _ = odtrt(capsys, "plans", folder)
        assert (status, "no passport names it" in out) == (0, True)

    @pytest.mark.parametrize(
        "command", [["plans"], ["pack"], ["build"], ["detect", "a.png"], ["eval", "--annotations", "a.json"]]
    )
    def test_a_mistyped_folder_is_called_that(self, capsys, tmp_path, command):
        name, *rest = command
        (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
        rest = [str(tmp_path / one) if one == "a.json" else one for one in rest]
        status, _, err = odtrt(capsys, name, tmp_path / "partz", *rest)
        assert status == 1
        assert is_line(err, f"error: {tmp_path}/partz: no such folder", "model folder"), err

    def test_a_plan_of_other_bytes_is_refused(self, capsys, tmp_path, monkeypatch):
        folder = plan_of_elsewhere(tmp_path, "10.3.0")
        next((folder / "plans").glob("*.plan")).write_bytes(b"ftrt, but not what was built")
        monkeypatch.setenv("COLUMNS", "400")
        assert "refuse" in odtrt(capsys, "plans", folder)[1]

    def test_pack_and_unpack(self, capsys, tmp_path, monkeypatch):
        asked = {}
        manifest = SimpleNamespace(name="parts", members=(1, 2, 3))

        def stand_in_pack(folder, archive, **options):
            asked["pack"] = {"folder": folder, "archive": archive, **options}
            archive.write_bytes(b"zip" * 100)
            return SimpleNamespace(
                manifest=manifest, sha256="ab" * 32, is_up_to_date=False, has_postprocessing=False
            )

        def stand_in_unpack(archive, folder, **options):
            asked["unpack"] = {"archive": archive, "folder": folder, **options}
            return manifest

        monkeypatch.setattr(bundle, "pack", stand_in_pack)
        monkeypatch.setattr(bundle, "unpack", stand_in_unpack)
        monkeypatch.chdir(tmp_path)
        status, out, _ = odtrt(capsys, "pack", "out/parts", "--triton", "--target", "jetson-orin")
        assert status == 0
        assert asked["pack"] == {
            "folder": Path("out/parts"),
            "archive": Path("parts.odtrt.zip"),
            "triton": True,
            "deepstream": False,
            "notebooks": False,
            "target": "jetson-orin",
            "force": False,
        }
        assert "parts.odtrt.zip: 3 files, 300 bytes" in out
        assert "no detector.onnx in it: run `odtrt fuse out/parts` first" in out
        status, out, _ = odtrt(capsys, "unpack", "parts.odtrt.zip")
        assert (status, asked["unpack"]["folder"]) == (0, Path("parts"))
        assert "next: cd parts && python3 build_here.py" in out
        _, out, _ = odtrt(capsys, "unpack", "parts.odtrt.zip", "-o", "a; touch PWN")
        assert "next: cd 'a; touch PWN' && python3 build_here.py" in out
        assert asked["unpack"]["expected_sha256"] is None
        assert odtrt(capsys, "unpack", "parts.odtrt.zip", "--sha256", "ab" * 32)[0] == 0
        assert asked["unpack"]["expected_sha256"] == "ab" * 32
        status, _, err = odtrt(capsys, "unpack", "nowhere.zip")
        assert status == 1 and is_line(err, "error: nowhere.zip: not found", "`odtrt pack`")

    def test_the_next_command_is_one_that_this_shell_finds(self, capsys, stages, monkeypatch):
        monkeypatch.setattr(cli.shutil, "which", lambda name: None)
        monkeypatch.setattr(cli.sys, "argv", [".venv/bin/odtrt"])
        assert "next: .venv/bin/odtrt convert out/parts" in odtrt(capsys, "export", "parts")[1]


def plan_of_elsewhere(tmp_path: Path, version: str) -> Path:
    """A model folder with a plan that TensorRT ``version`` built on another machine."""
    folder = tmp_path / "model"
    (folder / "plans").mkdir(parents=True)
    (folder / "spec.json").write_text(SPEC.to_json())
    (folder / "heads.onnx").write_bytes(b"onnx")
    plan = folder / "staged"
    plan.write_bytes(b"ftrt" + bytes(20) + bytes(int(part) for part in f"{version}.1".split(".")) + bytes(64))
    digest = sha256(plan)
    fingerprint = "0123456789abcdef"
    passport.install(
        folder,
        plan,
        passport.Passport(
            fingerprint=fingerprint,
            plan=passport.plan_name(fingerprint, digest),
            plan_sha256=digest,
            plan_bytes=plan.stat().st_size,
            model="heads.onnx",
            onnx_sha256=sha256(folder / "heads.onnx"),
            spec_sha256=sha256(folder / "spec.json"),
            runtime_library="tensorrt",
            version=version,
            precision="fp32",
            version_compatible=False,
            hardware_compatibility="none",
            compute_capabilities=(),
            plugin=None,
            machine=Machine("Linux", "aarch64", "Orin", "8.7", 16, 61368, "540.4", "12.6", "R36.4.3"),
            settings={},
            layers={"FP32": 9},
            attempts=(),
            trtexec="",
            seconds=1.0,
            built="2026-11-22T00:00:00+00:00",
        ),
    )
    return folder


class TestDetect:
    def test_pictures_table_and_json(self, capsys, stages, tmp_path):
        first, second = picture(tmp_path / "one" / "a.png"), picture(tmp_path / "two" / "a.jpg", 80, 50)
        arguments = ["-o", "drawn", "--min-score", "0.4", "--json", "found.json"]
        status, out, _ = odtrt(capsys, "detect", "parts", first, second, *arguments)
        assert status == 0
        assert re.search("4 detections .* 0.4 in 2 pictures, .* drawn", out)
        assert "ONNX Runtime on the CPU" in out
        assert "no GPU here" in out, "why no plan is used"
        assert stages.calls["open"] == {"backend": "auto", "plugin": None}
        assert "0.900" in out
        assert "[1, 2, 39, 58]" in out
        assert sorted(path.name for path in Path("drawn").iterdir()) == ["a-2.jpg", "a.jpg"]
        drawn = np.array(Image.open("drawn/a.jpg"))
        assert drawn.shape == (40, 60, 3)
        assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 10, "something was drawn"
        found = json.loads(Path("found.json").read_text())
        assert [row["image"] for row in found] == [str(first)] * 2 + [str(second)] * 2
        assert found[0]["score"] == pytest.approx(0.9)
        assert found[1]["class_id"] == 2

    def test_nothing_found(self, capsys, stages, tmp_path):
        status, out, _ = odtrt(capsys, "detect", "parts", picture(tmp_path / "a.png"), "--min-score", "0.95")
        assert status == 0
        assert "nothing found" in out
        assert "0 detections" in out
        assert Path("parts/detections/a.jpg").is_file()

    def test_no_input_and_no_other_file_is_replaced(self, capsys, stages, tmp_path):
        photo, beside = picture(tmp_path / "p" / "a.jpg"), picture(tmp_path / "p" / "b.jpg")
        drawn = picture(tmp_path / "b.png")
        before = photo.read_bytes(), beside.read_bytes()
        for _ in range(2):  # the same names again
            status, out, _ = odtrt(capsys, "detect", "parts", photo, drawn, "-o", tmp_path / "p")
            assert status == 0
            assert (photo.read_bytes(), beside.read_bytes()) == before
            assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
                "a-2.jpg",
                "a.jpg",
                "b-2.jpg",
                "b.jpg",
            ]
            assert f"{photo} is drawn in a-2.jpg" in out

    def test_outputs_do_not_replace_one_another(self, capsys, stages, tmp_path):
        names = ("a.png", "q/a.png", "a-2.png", "A.png")
        images = [picture(tmp_path / name, 40 + i) for i, name in enumerate(names)]
        assert odtrt(capsys, "detect", "parts", *images, "-o", "drawn")[0] == 0
        heights = {path.name: Image.open(path).height for path in Path("drawn").iterdir()}
        assert heights == {"a.jpg": 40, "a-2.jpg": 41, "a-2-2.jpg": 42, "A-3.jpg": 43}

    @pytest.mark.parametrize("name", ["p/a.png", "parts/spec.json", "parts/log.jsonl", "drawn/a.jpg"])
    def test_found_json_replaces_no_input(self, capsys, stages, tmp_path, name):
        image = picture(tmp_path / "p" / "a.png")
        for file in ("spec.json", "log.jsonl"):
            Path("parts", file).write_text("")
        odtrt(capsys, "detect", "parts", image, "-o", "drawn")
        before = Path(name).read_bytes()
        status, _, err = odtrt(capsys, "detect", "parts", image, "-o", "drawn", "--json", name)
        assert (status, Path(name).read_bytes()) == (1, before)
        assert err.startswith(f"error: {name}: is read")

    def test_an_unreadable_picture_among_others_is_named_at_the_end(self, capsys, stages, tmp_path):
        images = [picture(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
        images[1].write_bytes(images[1].read_bytes()[:60])
        status, out, err = odtrt(capsys, "detect", "parts", *images, "-o", "drawn", "--json", "found.json")
        assert status == 1
        assert "in 2 pictures" in out
        assert err.startswith("error: 1 of 3 pictures ")
        assert f"{images[1]}: damaged" in err
        assert sorted(path.name for path in Path("drawn").iterdir()) == ["a.jpg", "c.jpg"]
        assert {row["image"] for row in json.loads(Path("found.json").read_text())} == {
            str(images[0]),
            str(images[2]),
        }

    def test_names_from_outside_do_not_act_on_the_terminal(self, capsys, stages, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "400")
        image = picture(tmp_path / "a\x1b]0;evil\x07\u202e\n.png")
        status, out, _ = odtrt(capsys, "detect", "parts", image, "-o", tmp_path / "d\x9b")
        assert status == 0
        assert r"a\x1b]0;evil\x07\u202e\n.png" in out
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(out)

    def test_a_file_that_is_no_picture(self, capsys, stages, tmp_path):
        (tmp_path / "a.png").write_text("text")
        status, _, err = odtrt(capsys, "detect", "parts", tmp_path / "a.png")
        assert status == 1
        assert err.startswith(f"error: {tmp_path}/a.png: damaged")
        assert err.count("\n") == 1
        assert not list(Path("parts").iterdir())


class TestEval:
    @pytest.fixture
    def coco(self, tmp_path):
        images = []
        for i in range(3):
            picture(tmp_path / "images" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 60})
        truth = {"id": 1, "category_id": 1, "bbox": [2, 1, 56, 38], "area": 2128, "iscrowd": 0}
        content = {
            "images": images,
            "annotations": [{**truth, "id": i + 1, "image_id": i} for i in range(3)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return path

    def test_the_figures(self, capsys, stages, coco):
        arguments = ["--annotations", coco, "--images", coco.parent / "images", "--json", "figures.json"]
        status, out, _ = odtrt(capsys, "eval", "parts", *arguments)
        assert status == 0
        assert "mAP (IoU 0.50:0.95)" in out
        figures = json.loads(Path("figures.json").read_text())
        assert figures["map"] == pytest.approx(1.0), "the stand-in finds every cat exactly"
        assert figures["images"] == 3
        assert figures["ap_per_class"]["cat"] == pytest.approx(1.0)

    def test_an_unreadable_picture_is_left_out_and_named(self, capsys, stages, coco):
        bad = coco.parent / "images" / "1.png"
        bad.write_bytes(b"no picture")
        arguments = ["--annotations", coco, "--json", "figures.json"]
        status, out, err = odtrt(capsys, "eval", "parts", *arguments)
        assert (status, "mAP (IoU 0.50:0.95)" in out) == (1, True)
        assert err.startswith("error: 1 of 3 pictures ") and f"{bad}: damaged" in err
        figures = json.loads(Path("figures.json").read_text())
        assert (figures["images"], figures["unreadable"]) == (2, [str(bad)])
        assert figures["map"] == pytest.approx(1.0), "the picture left out does not count as missed"

    def test_no_readable_picture_is_an_error(self, capsys, stages, coco):
        for path in (coco.parent / "images").iterdir():
            path.write_bytes(b"no picture")
        status, out, err = odtrt(capsys, "eval", "parts", "--annotations", coco)
        assert (status, err.count("\n"), "mAP" in out) == (1, 1, False)
        assert "the other 2 " in err

    def test_the_figures_do_not_replace_the_annotations(self, capsys, stages, coco):
        before = coco.read_bytes()
        status, _, err = odtrt(capsys, "eval", "parts", "--annotations", coco, "--json", coco)
        assert (status, coco.read_bytes()) == (1, before)
        assert f"{coco}: is read" in err

    def test_classes_of_one_name_are_kept_apart(self, capsys, stages, coco):
        labels = (spec.Label(1, "cat"), spec.Label(2, "cat"))
        stages.detector_spec = dataclasses.replace(SPEC, labels=labels)
        content = json.loads(coco.read_text())
        content["annotations"][0]["category_id"] = 2
        coco.write_text(json.dumps(content))
        odtrt(capsys, "eval", "parts", "--annotations", coco, "--json", "figures.json")
        assert set(json.loads(Path("figures.json").read_text())["ap_per_class"]) == {"cat (1)", "cat (2)"}

    def test_only_the_first_images(self, capsys, stages, coco):
        arguments = ["--annotations", coco, "--limit", "2", "--json", "figures.json"]
        assert odtrt(capsys, "eval", "parts", *arguments)[0] == 0
        assert json.loads(Path("figures.json").read_text())["images"] == 2

    def test_annotations_of_other_classes_are_refused_not_scored_zero(self, capsys, stages, coco):
        content = json.loads(coco.read_text())
        for item in content["annotations"]:
            item["category_id"] = 77
        content["categories"] = [{"id": 77, "name": "cell phone"}]
        coco.write_text(json.dumps(content))
        status, out, err = odtrt(capsys, "eval", "parts", "--annotations", coco)
        assert (status, out) == (1, "")
        assert "category ids 77, none" in err

    def test_a_class_of_another_name_is_said(self, capsys, stages, coco):
        coco.write_text(coco.read_text().replace('"dog"', '"horse"'))
        status, out, _ = odtrt(capsys, "eval", "parts", "--annotations", coco)
        assert status == 0
        assert re.search("class 2 is dog .*horse in instances.json", out)

    def test_no_images(self, capsys, stages, tmp_path):
        (tmp_path / "empty.json").write_text('{"images": [], "annotations": [], "categories": []}')
        status, _, err = odtrt(capsys, "eval", "parts", "--annotations", tmp_path / "empty.json")
        assert status == 1
        assert err.count("\n") == 1


class TestGate:
    """``parts`` misses what is in every ``worse_every``-th picture; ``other`` and the reference do not."""

    @pytest.fixture
    def coco(self, tmp_path):
        for i in range(40):
            picture(tmp_path / "images" / f"{i}.png", 40, 60 + i)  # the width is the picture's number
        content = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in range(40)],
            "annotations": [{"image_id": i, "category_id": 1, "bbox": [2, 1, 30, 38]} for i in range(40)],
            "categories": [{"id": 1, "name": "cat"}],
        }
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return path

    @pytest.fixture
    def models(self, stages, monkeypatch, tmp_path):
        models = SimpleNamespace(worse_every=1000, opened=[], plan="0123")
        (tmp_path / "other").mkdir()

        def open_model(folder, backend="auto", *, plugin=None, precision=None, threads=None):
            is_plan = backend == "tensorrt"
            models.opened.append((str(folder), backend, precision))

            def detect(image):
                number = image.shape[1] - 60
                is_missed = folder == Path("parts") and is_plan and (number + 1) % models.worse_every == 0
                count = 0 if is_missed else 1
                return Detections(
                    boxes=np.array([[1, 2, 39, 32]], np.float32)[:count],
                    scores=np.array([0.9], np.float32)[:count],
                    class_ids=np.array([1])[:count],
                    names=("cat",)[:count],
                )

            plan = f"{models.plan}{precision}" if is_plan else None
            status = detector.Status(backend, f"{backend} runs {folder}", plan)
            return SimpleNamespace(spec=SPEC, detect=detect, status=status)

        monkeypatch.setattr(detector.Detector, "open", open_model)
        return models

    def gate(self, capsys, coco, *arguments):
        status, out, err = odtrt(
            capsys, "eval", "parts", "--annotations", coco, "--backend", "tensorrt", *arguments
        )
        return status, [line for line in out.splitlines() if line.startswith("mAP ") and "[" in line], err

    def test_the_reference_is_onnx_runtime_in_fp32(self, capsys, models, coco):
        status, lines, _ = self.gate(capsys, coco, "--precision", "fp16", "--gate", 0, "--json", "f.json")
        assert status == 0
        assert lines == [
            "mAP 1.0000, reference 1.0000; drop 0.00 points [0.00, 0.00] in 40 images; gate 0: passed"
        ]
        assert models.opened == [("parts", "tensorrt", "fp16"), ("parts", "onnxruntime", "fp32")]
        figures = json.loads(Path("f.json").read_text())["against"]
        assert figures == {
            **{"reference_map": 1.0, "candidate_map": 1.0, "points": 0.0, "low": 0.0, "high": 0.0},
            "images": 40,
            "gate": {"name": "passed", "limit": 0.0, "images_needed": None},
        }

    def test_a_loss_above_the_gate_fails(self, capsys, models, coco):
        models.worse_every = 4
        status, (line,), err = self.gate(capsys, coco, "--gate", 0.5, "--json", "f.json")
        assert (status, err) == (1, "")
        assert "reference 1.0000; drop 24.75 points [" in line and line.endswith("gate 0.5: failed")
        assert json.loads(Path("f.json").read_text())["against"]["gate"]["name"] == "failed"

    def test_a_loss_that_may_be_above_it_is_not_shown_to_pass(self, capsys, models, coco):
        models.worse_every = 40
        status, (line,), _ = self.gate(capsys, coco, "--gate", 5)
        assert status == 1
        found = re.search(
            r"drop (\S+) points \[\S+, (\S+)\] in .*gate 5: not shown: .* about (\d+) are", line
        )
        drop, high, needed = map(float, found.groups())
        assert drop < 5 < high
        assert needed == pytest.approx(40 * ((high - drop) / (5 - drop)) ** 2, rel=0.02)

    def test_too_few_images_pass_nothing(self, capsys, models, coco):
        status, (line,), _ = self.gate(capsys, coco, "--gate", 5, "--limit", 3)
        assert status == 1
        assert line.endswith("in 3 images; gate 5: not shown: too few images, about 30 are needed")

    def test_without_a_gate_the_loss_is_said(self, capsys, models, coco):
        models.worse_every = 4
        status, (line,), _ = self.gate(capsys, coco, "--against", "other", "--against-backend", "tensorrt")
        assert (status, models.opened[1]) == (0, ("other", "tensorrt", "fp32"))
        assert "drop 24.75 points" in line and line.endswith("in 40 images")

    def test_pictures_that_one_cannot_use_count_for_neither(self, capsys, models, coco):
        (coco.parent / "images" / "7.png").write_bytes(b"no picture")
        status, (line,), err = self.gate(capsys, coco, "--gate", 5)
        assert (status, "in 39 images; gate 5: passed" in line) == (1, True)
        assert err.startswith("error: 1 of 40 pictures ")

    @pytest.mark.parametrize(
        "arguments, facts",
        [
            (["--gate", "-1"], ["gate -1", "0 to 100"]),
            (["--gate", "nan"], ["gate nan", "0 to 100"]),
            (["--gate", "1", "--against", "nowhere"], ["nowhere"]),
            (["--gate", "1", "--backend", "onnxruntime"], ["compared with itself"]),
            (["--precision", "fp16", "--backend", "onnxruntime"], ["fp32, not in fp16"]),
            (["--gate", "1", "--against", "other", "--against-precision", "fp16"], ["other", "not in fp16"]),
            (
                ["--against-precision", "fp32", "--against-backend", "tensorrt", "--precision", "fp32"],
                ["itself"],
            ),
        ],
    )
    def test_what_cannot_be_compared(self, capsys, models, coco, arguments, facts):
        status, lines, err = self.gate(capsys, coco, *arguments)
        assert (status, lines) == (1, [])
        assert is_line(err, *facts)

    def test_without_annotated_objects(self, capsys, models, coco):
        coco.write_text(json.dumps({**json.loads(coco.read_text()), "annotations": []}))
        status, lines, err = self.gate(capsys, coco, "--gate", 1)
        assert (status, lines, models.opened) == (1, [], [])
        assert is_line(err, "instances.json", "no object that counts in 40 images")

    def test_another_image_set(self, capsys, models, coco):
        coco.write_text(coco.read_text().replace('"3.png"', '"000003.jpg"'))
        status, _, err = self.gate(capsys, coco, "--gate", 1)
        assert (status, models.opened) == (1, [])
        assert is_line(err, "000003.jpg")


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (InputError, 1),
            (UnsupportedError, 1),
            (MissingDependencyError, 1),
            (BuildError, 1),
            (CheckError, 2),
        ],
    )
    def test_one_line_on_stderr(self, capsys, stages, monkeypatch, error, status):
        def fail(*_, **__):
            raise error("model.config: [bold]bad[/bold]\n  " + "very long " * 40 + "end")

        monkeypatch.setattr(export, "export", fail)
        found, _, err = odtrt(capsys, "export", "my_model")
        assert found == status
        assert err == "error: model.config: [bold]bad[/bold] " + "very long " * 40 + "end\n"

    def test_a_defect_says_how_to_see_more(self, capsys, stages, monkeypatch):
        monkeypatch.setattr(export, "export", lambda *_, **__: {}["missing"])
        monkeypatch.delenv("ODTRT_TRACEBACK", raising=False)
        status, _, err = odtrt(capsys, "export", "my_model")
        assert status == 70
        assert err.count("\n") == 1
        assert err.startswith("error: unexpected KeyError: 'missing': ")
        assert "ODTRT_TRACEBACK=1" in err

    @pytest.mark.parametrize("error", [InputError, ZeroDivisionError])
    def test_the_traceback_on_demand(self, capsys, stages, monkeypatch, error):
        def fail(*_, **__):
            raise error("no")

        monkeypatch.setattr(export, "export", fail)
        monkeypatch.setenv("ODTRT_TRACEBACK", "1")
        status, _, err = odtrt(capsys, "export", "my_model")
        assert "Traceback (most recent call last)" in err
        assert status == (1 if error is InputError else 70)

    def test_interrupted(self, capsys, stages, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(convert, "convert", interrupt)
        status, _, err = odtrt(capsys, "run", "my_model")
        assert (status, err) == (130, "interrupted; nothing half-written is left\n")

    @pytest.mark.parametrize("arguments", [("run",), ("build", "x", "--precision", "int4"), ("nonsense",)])
    def test_a_wrong_command_line(self, capsys, arguments):
        status, _, err = odtrt(capsys, *arguments)
        assert status == 2
        assert "Usage: odtrt" in err
        assert "Traceback" not in err


class TestSurroundings:
    @pytest.mark.parametrize(
        "command",
        [
            *("run", "export", "convert", "fuse", "build", "sensitivity", "detect", "eval", "soak", "doctor"),
            "zoo get",
        ],
    )
    def test_help_says_what_is_read_and_written_with_an_example(self, capsys, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "200")
        status, out, _ = odtrt(capsys, *command.split(), "--help")
        assert status == 0
        for word in ("Reads", "Writes", f"odtrt {command}"):
            assert word in out

    def test_the_overview_names_all_commands(self, capsys):
        status, out, _ = odtrt(capsys, "--help")
        assert status == 0
        for command in ("run", "export", "convert", "build", "detect", "eval", "soak", "doctor", "zoo"):
            assert command in out

    def test_heavy_packages_wait_for_the_command_that_needs_them(self):
        code = (
            "import sys; import odtrt_lib.app.cli; "
            "print(sorted({'tensorflow', 'numpy', 'onnx', 'cv2', 'PIL', 'tensorrt_rtx'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"

    def test_zoo_list(self, capsys):
        status, out, _ = odtrt(capsys, "zoo", "list")
        assert status == 0
        assert all(model.name in out for model in zoo.MODELS)

    def test_zoo_get(self, capsys, monkeypatch, tmp_path):
        name = zoo.MODELS[0].name
        download = zoo.Download(tmp_path / name, "ab" * 32, True, False)
        monkeypatch.setattr(zoo, "get", lambda model, folder, progress: progress(5, 10) or download)
        status, out, _ = odtrt(capsys, "zoo", "get", name, "-o", tmp_path)
        assert status == 0
        assert re.search(f"SHA-256 {'ab' * 32}, .*{tmp_path}/zoo.json", out)
        assert f"next: odtrt run {tmp_path}/{name}" in out

    def test_doctor_names_what_is_missing_and_how_to_get_it(self, capsys, monkeypatch):
        problems = {
            "ONNX Runtime": "crashes (signal 11)",
            "TensorFlow": "not installed",
        }
        found = [
            doctor.Finding(
                package, None if package.name in problems else "1.0", problems.get(package.name, "")
            )
            for package in doctor.PACKAGES
        ]
        monkeypatch.setattr(doctor, "packages", lambda: found)
        monkeypatch.setenv("COLUMNS", "220")
        status, out, _ = odtrt(capsys, "doctor")
        assert status == 0
        assert "crashes (signal 11)" in out
        chapters = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") == 4}
        assert "no: needs TensorFlow" in chapters["1 export"]
        assert "pip install -e '.[convert]'" in chapters["1 export"]
        assert "no: needs ONNX Runtime" in chapters["detect"]
        assert "yes" in chapters["3 engine (build)"]


class TestDoctor:
    def examine(self, tmp_path, monkeypatch, content):
        (tmp_path / "odtrt_probe.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        package = doctor.Package("probe", "odtrt_probe", "odtrt-probe", "pip install probe")
        monkeypatch.setattr(doctor, "PACKAGES", (package,))
        return doctor.packages()[0]

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("import os; os.kill(os.getpid(), 11)", "crashes (signal 11)"),
            (
                "import no_such_library",
                "not importable: ModuleNotFoundError: No module named 'no_such_library'",
            ),
            ("raise SystemExit(3)", "not importable: exit status 3"),
        ],
    )
    def test_a_broken_package_is_a_line_and_not_the_end(self, tmp_path, monkeypatch, content, problem):
        finding = self.examine(tmp_path, monkeypatch, content)
        assert finding.version is None
        assert finding.problem.endswith(problem)

    def test_a_sound_package(self, tmp_path, monkeypatch):
        assert self.examine(tmp_path, monkeypatch, "").version == "installed"

    def test_an_absent_package(self, monkeypatch):
        package = doctor.Package("none", "odtrt_no_such_module", "odtrt-none", "pip install none")
        monkeypatch.setattr(doctor, "PACKAGES", (package,))
        assert doctor.packages()[0].problem == "not installed"

    def test_without_any_tensorrt_no_engine(self):
        findings = [
            doctor.Finding(p, None if p.name.startswith("TensorRT") else "1.0") for p in doctor.PACKAGES
        ]
        chapters = {chapter.title: chapter for chapter in doctor.chapters(findings)}
        assert chapters["3 engine (build)"].missing == ("TensorRT-RTX",)
        assert chapters["3 engine (build)"].install == ("pip install -e '.[engine]'",)
        assert chapters["detect"].missing == ()

    @pytest.mark.parametrize(
        ("absent", "lame"),
        [
            ("onnx", {"2 convert", "3 engine (fp16)", "4 fuse"}),
            ("onnxconverter-common", {"3 engine (fp16)"}),
            ("ONNX Runtime", {"2 convert", "detect", "eval"}),
            ("Pillow", {"detect", "eval"}),
        ],
    )
    def test_which_part_needs_what(self, monkeypatch, absent, lame):
        monkeypatch.setattr(doctor, "device_info", lambda: {"gpu": "one"})
        findings = [doctor.Finding(p, None if p.name == absent else "1.0") for p in doctor.PACKAGES]
        assert {one.title for one in doctor.chapters(findings) if one.missing} == lame

    def test_every_machine_has_something_to_say(self, monkeypatch):
        monkeypatch.setattr(
            doctor, "device_info", lambda: {"machine": "aarch64", "cpu": "", "cores": 12, "l4t": "R36"}
        )
        monkeypatch.setattr(doctor, "_lines", lambda path: [])
        monkeypatch.setattr(doctor, "meminfo", dict)
        machine = doctor.machine()
        assert machine["Jetson"] == "board unknown, L4T R36"
        assert "`apt show nvidia-jetpack`" in machine["JetPack"]
        assert machine["Memory"] == "unknown"

    @pytest.mark.parametrize(
        ("l4t", "said"),
        [
            ("R36.4.3", "6.2, 6.2.1, which has TensorRT 10.3 and Python 3.10"),
            ("R32.7.1", "4.6.1 to 4.6.6, which has TensorRT 8.2.1 and Python 3.6, too old for odtrt"),
        ],
    )
    def test_the_jetpack_of_a_jetson(self, monkeypatch, l4t, said):
        raw = {"machine": "aarch64", "cpu": "", "cores": 6, "l4t": "R.. (release)"}
        monkeypatch.setattr(doctor, "device_info", lambda: raw)
        monkeypatch.setattr(doctor, "this_machine", lambda: Machine("Linux", "aarch64", l4t=l4t))
        assert doctor.machine()["JetPack"] == said


def heed_ctrl_c() -> None:
    """A shell starts its background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_during_a_real_stage_leaves_nothing(tmp_path):
    """The process gets SIGINT in the middle of its work, as from a terminal."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from odtrt_lib import export, folder; from odtrt_lib.app import cli\n"
        "def slow(source, target, **options):\n"
        "    with folder.staging(target) as out:\n"
        "        (out / 'frozen.pb').write_bytes(b'half')\n"
        "        print('working', flush=True)\n"
        "        time.sleep(600)\n"
        "export.export = slow\n"
        "cli.main(['export', 'model', '-o', sys.argv[1]])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=heed_ctrl_c,
    )
    while "working" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == "interrupted; nothing half-written is left\n"
    assert not (tmp_path / "out").exists()


def test_tensorflows_log_is_kept_from_the_terminal_and_nothing_else(tmp_path):
    """Written to file descriptor 2, past Python, as TensorFlow does; a crash's last words come through."""
    script = tmp_path / "noisy.py"
    script.write_text(
        "import os\n"
        "from odtrt_lib import export; from odtrt_lib.app import cli\n"
        "def noisy(*_, **__):\n"
        "    os.write(2, b'WARNING: All log messages before absl::InitializeLog() is called ...\\n')\n"
        "    os.write(2, b'I0000 00:00:1795338323.198219   17020 devices.cc:76] Number of GPUs\\n')\n"
        "    os.write(2, b'F0000 00:00:1795338323.198219   17020 loader.cc:7] Check failed\\n')\n"
        "    os.abort()\n"
        "export.export = noisy\n"
        "cli.main(['export', 'model'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == -signal.SIGABRT
    assert [line for line in done.stderr.splitlines() if "Python" not in line and line] == [
        "F0000 00:00:1795338323.198219   17020 loader.cc:7] Check failed"
    ]
