"""A plan's passport: whole, true, and written so that no interruption loses a plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from odtrt_lib import machine
from odtrt_lib.engine import passport
from odtrt_lib.engine.passport import Machine, Passport, PluginIdentity
from odtrt_lib.engine.stage import fingerprint
from odtrt_lib.errors import CheckError, InputError

FINGERPRINT = "0123456789abcdef"
KEYS = [passport.JSON_KEYS.get(field.name, field.name) for field in dataclasses.fields(Passport)]
# The layout that trtexec's printPlanVersion reads: tag, serialisation version 0, version bytes at 24.
PLAN = b"ftrt" + bytes(20) + bytes((10, 3, 0, 26)) + bytes(range(256)) * 40


def described(plan=PLAN, fingerprint=FINGERPRINT, **changes):
    digest = hashlib.sha256(plan).hexdigest()
    fields = {
        "fingerprint": fingerprint,
        "plan": f"{fingerprint}-{digest[:8]}.plan",
        "plan_sha256": digest,
        "plan_bytes": len(plan),
        "model": "detector.onnx",
        "onnx_sha256": "1" * 64,
        "spec_sha256": "2" * 64,
        "runtime_library": "tensorrt",
        "version": "10.3.0",
        "precision": "fp16",
        "version_compatible": False,
        "hardware_compatibility": "none",
        "compute_capabilities": (),
        "plugin": PluginIdentity("libodtrt_tensorrt.so", "3" * 64, "IPluginV3"),
        "machine": Machine("Linux", "aarch64", "Orin", "8.7", 16, 62841, "540.4.0", "12.6", "R36.4.3"),
        "settings": {"workspace_mb": 1024, "tactics": ["jit"]},
        "layers": {"FP16": 71, "FP32": 3},
        "attempts": ({"name": "as asked", "outcome": "ok", "samples": [[0.1, 900, None]]},),
        "trtexec": "trtexec --onnx=detector.onnx",
        "seconds": 41.25,
        "built": "2026-11-22T10:00:00+00:00",
    }
    return Passport(**{**fields, **changes})


def install(folder, plan=PLAN, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "staged").write_bytes(plan)
    one = described(plan, **changes)
    return passport.install(folder, folder / "staged", one), one


def sealed(data):
    """The JSON object with the checksum that its fields ask for, computed here."""
    fields = {name: value for name, value in data.items() if name != "check"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps({**fields, "check": digest})


def plans_of(folder):
    return sorted(path.name for path in (folder / "plans").iterdir())


def test_an_older_name_stays_in_the_files():
    """The SHA-256 of what the version before `runtime_library` wrote, and a fingerprint that it made."""
    text = described().to_json()
    assert '"flavour": "tensorrt"' in text and "runtime_library" not in text
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "bc5e6dc7db459fa32b76709364acbe01829c306c737232e15dd7d2126dd87d4e"
    )
    identity = {
        "model": "heads.onnx",
        "runtime_library": "tensorrt",
        "version": "10.3.0",
        "precision": "fp16",
        "onnx_sha256": "1" * 64,
        "plugin": None,
        "gpu": ["Orin", "8.7"],
        "batch": None,
        "version_compatible": False,
        "hardware_compatibility": "none",
        "compute_capabilities": [],
    }
    assert fingerprint(identity) == "77ed7d5d1dbdfab4"


def test_what_is_installed_is_read_back(tmp_path):
    path, one = install(tmp_path)
    assert path == tmp_path / "plans" / f"{FINGERPRINT}-{hashlib.sha256(PLAN).hexdigest()[:8]}.plan"
    assert path.read_bytes() == PLAN
    assert plans_of(tmp_path) == [path.name, f"{FINGERPRINT}.json"] and not (tmp_path / "staged").exists()
    assert passport.read(tmp_path / "plans" / f"{FINGERPRINT}.json") == one
    assert passport.survey(tmp_path) == ([one], {})
    assert passport.verify(tmp_path, one) is None
    assert passport.read_plan(tmp_path, one) == PLAN


def test_the_file_has_every_field_and_says_which_schema(tmp_path):
    install(tmp_path)
    data = json.loads((tmp_path / "plans" / f"{FINGERPRINT}.json").read_text())
    assert set(data) == {*KEYS, "check"}
    assert (
        data["schema"] == 2 and data["machine"]["l4t"] == "R36.4.3" and data["plugin"]["abi"] == "IPluginV3"
    )
    assert sealed(data) == json.dumps(data), "the checksum is the SHA-256 of the other fields"


def test_a_new_build_takes_the_place_of_the_old_one(tmp_path):
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / f"{FINGERPRINT}.plan").write_bytes(b"of an odtrt before passports")
    install(tmp_path)
    other, kept = install(tmp_path, fingerprint="f" * 16)
    path, one = install(tmp_path, PLAN + b"2", built="2026-11-23T10:00:00+00:00")
    assert plans_of(tmp_path) == sorted([path.name, f"{FINGERPRINT}.json", other.name, f"{'f' * 16}.json"])
    assert passport.passports(tmp_path) == [one, kept], "newest first"


def test_a_plan_that_is_not_the_described_one_is_not_installed(tmp_path):
    _, one = install(tmp_path)
    (tmp_path / "staged").write_bytes(PLAN[:-1] + b"x")
    with pytest.raises(CheckError, match="SHA-256"):
        passport.install(tmp_path, tmp_path / "staged", described())
    with pytest.raises(CheckError, match="precision"):
        passport.install(tmp_path, tmp_path / "staged", dataclasses.replace(one, precision=16))
    with pytest.raises(CheckError, match="not valid"):
        passport.install(tmp_path, tmp_path / "staged", dataclasses.replace(one, seconds=float("nan")))
    assert passport.passports(tmp_path) == [one] and passport.verify(tmp_path, one) is None


def test_where_the_passport_cannot_be_written_nothing_has_changed(tmp_path, monkeypatch):
    path, one = install(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="disk is full"):
        install(tmp_path, PLAN + b"2")
    assert plans_of(tmp_path) == [path.name, f"{FINGERPRINT}.json"]
    assert passport.passports(tmp_path) == [one] and passport.verify(tmp_path, one) is None


def test_a_plan_from_another_file_system_is_installed(tmp_path):
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to write to")
    staged = Path(f"/dev/shm/odtrt-test-{os.getpid()}")
    try:
        staged.write_bytes(PLAN)
        assert passport.install(tmp_path, staged, described()).read_bytes() == PLAN
    finally:
        staged.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: os.truncate(path, 0), "has 0 bytes, its passport says 10268"),
        (lambda path: os.truncate(path, 5000), "has 5000 bytes"),
        (lambda path: path.write_bytes(PLAN + b"\0"), "has 10269 bytes"),
        (lambda path: path.write_bytes(PLAN[:99] + b"\1" + PLAN[100:]), "SHA-256"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "regular file"),
    ],
)
def test_a_damaged_plan_is_never_handed_out(tmp_path, damage, reason):
    path, one = install(tmp_path)
    damage(path)
    assert reason in passport.verify(tmp_path, one)
    with pytest.raises(InputError):
        passport.read_plan(tmp_path, one)


def test_a_passport_cannot_point_out_of_its_folder(tmp_path):
    _, one = install(tmp_path)
    (tmp_path / "secret").write_bytes(PLAN)
    for name in ("../secret", str(tmp_path / "secret"), "x\0.plan", ""):
        forged = dataclasses.replace(one, plan=name)
        assert "name of a plan" in passport.verify(tmp_path, forged)
        with pytest.raises(InputError, match="name of a plan"):
            passport.read_plan(tmp_path, forged)
        path = tmp_path / "plans" / f"{FINGERPRINT}.json"
        path.write_text(sealed({**json.loads(one.to_json()), "plan": name}))
        with pytest.raises(InputError, match="plan is"):
            passport.read(path)


@pytest.mark.parametrize("name", [key for key in KEYS if key != "schema"])
def test_a_missing_field_or_one_of_another_type_is_named(tmp_path, name):
    _, one = install(tmp_path)
    path = tmp_path / "plans" / f"{FINGERPRINT}.json"
    data = json.loads(one.to_json())
    takes = {"seconds": (int, float), "plugin": (dict, type(None))}.get(name, (type(data[name]),))
    for wrong in (True, 3, 1e400, "text", [[]], {"a": []}, None):
        if type(wrong) not in takes or (name, wrong) in (("seconds", 1e400), ("layers", {"a": []})):
            path.write_text(sealed({**data, name: wrong}))
            with pytest.raises(InputError, match=rf"{FINGERPRINT}\.json: .*passport \({name} is"):
                passport.read(path)
    del data[name]
    path.write_text(sealed(data))
    with pytest.raises(InputError, match=f"{name} is missing"):
        passport.read(path)


def test_text_that_no_terminal_can_show_is_refused(tmp_path):
    _, one = install(tmp_path)
    path = tmp_path / "plans" / f"{FINGERPRINT}.json"
    path.write_text(sealed({**json.loads(one.to_json()), "precision": "\ud800"}))
    with pytest.raises(InputError, match=r"precision is '.*ud800', expected text"):
        passport.read(path)


def test_an_altered_passport_is_found_by_its_checksum(tmp_path):
    _, one = install(tmp_path)
    path = tmp_path / "plans" / f"{FINGERPRINT}.json"
    path.write_text(path.read_text().replace('"8.7"', '"8.6"'))
    with pytest.raises(InputError, match="altered or damaged"):
        passport.read(path)
    data = json.loads(one.to_json())
    del data["check"]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="altered or damaged"):
        passport.read(path)


def test_unknown_fields_are_ignored_and_other_schemas_refused_on_one_line(tmp_path):
    _, one = install(tmp_path)
    path = tmp_path / "plans" / f"{FINGERPRINT}.json"
    data = json.loads(one.to_json())
    path.write_text(sealed({**data, "remark": 1, "machine": {**data["machine"], "fan": "loud"}}))
    assert passport.read(path) == one
    for schema in (1, 3, "2", None, True, 2.5):
        path.write_text(sealed({**data, "schema": schema}))
        with pytest.raises(InputError, match=r"schema .*, this odtrt reads 2\); run `odtrt build` again$"):
            passport.read(path)
    path.write_text(json.dumps({"schema": 1, "fingerprint": FINGERPRINT, "bytes": 3}))
    with pytest.raises(InputError, match="schema 1, this odtrt reads 2"):
        passport.read(path)


def test_the_damaged_ones_are_left_out_with_their_reasons(tmp_path):
    _, one = install(tmp_path)
    plans = tmp_path / "plans"
    shutil.copy(plans / f"{FINGERPRINT}.json", plans / f"{'f' * 16}.json")
    (plans / f"{'e' * 16}.json").write_bytes(b"\xff\xfe")
    (plans / f"{'d' * 16}.json").write_text("[" * 100_000)
    (plans / f"{'c' * 16}.json").mkdir()
    os.mkfifo(plans / f"{'b' * 16}.json")
    with (plans / f"{'a' * 16}.json").open("wb") as file:
        file.truncate(1 << 33)
    Path(os.fsdecode(bytes(plans) + b"/a\n\xff.json")).write_text("")
    found, damaged = passport.survey(tmp_path)
    assert found == [one]
    assert len(damaged) == 7 and all("\n" not in text for text in damaged.values())
    "".join([*damaged, *damaged.values()]).encode("utf-8")
    assert f"of the plan {FINGERPRINT}, not of {'f' * 16}" in damaged[f"{'f' * 16}.json"]
    assert passport.survey(tmp_path / "nowhere") == ([], {})


def test_the_version_in_a_plan_header(tmp_path):
    path = tmp_path / "x.plan"
    path.write_bytes(PLAN)
    assert passport.plan_version(path) == "10.3.0.26"
    for unknown in (b"", PLAN[:27], b"ptrt" + PLAN[4:], PLAN[:4] + b"\1" + PLAN[5:], b"{}" + PLAN):
        path.write_bytes(unknown)
        assert passport.plan_version(path) is None
    assert passport.plan_version(tmp_path / "nowhere") is None


def test_the_header_of_a_plan_that_tensorrt_rtx_built(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: run `pip install -e '.[engine]'`")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    tensor = network.add_input("x", trt.float32, (1, 3, 8, 8))
    network.mark_output(network.add_activation(tensor, trt.ActivationType.RELU).get_output(0))
    plan = bytes(builder.build_serialized_network(network, builder.create_builder_config()))
    (tmp_path / "x.plan").write_bytes(plan)
    assert passport.plan_version(tmp_path / "x.plan") == trt.__version__


# A driver library with one GPU, or as the environment says; it has no function that makes a context.
LIBCUDA = r"""
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { (void)flags; return getenv("NO_DRIVER") ? 100 : 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = getenv("NO_DEVICE") ? 0 : 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = 7 + number; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, "Orin", size);
  return device == 7 ? 0 : 101;
}
int cuDeviceGetAttribute(int *value, int which, int device) {
  if (device != 7) return 101;
  switch (which) {
    case 16: *value = 8; return 0;
    case 75: *value = 8; return 0;
    case 76: *value = 7; return 0;
    default: return 1;
  }
}
#ifndef OLD
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = 16415457280ul; return 0; }
#endif
"""


@pytest.mark.parametrize("case", ["gpu", "NO_DRIVER", "NO_DEVICE", "OLD"])
def test_this_machine_asks_the_driver_library(tmp_path, case):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc, cc) on this machine")
    (tmp_path / "cuda.c").write_text(LIBCUDA)
    library = tmp_path / "libcuda.so.1"
    define = ["-DOLD"] if case == "OLD" else []
    build = [compiler, "-shared", "-fPIC", *define, "-o", str(library), str(tmp_path / "cuda.c")]
    subprocess.run(build, check=True)
    code = "import dataclasses, json; from odtrt_lib.machine import this_machine\n"
    code += "print(json.dumps(dataclasses.asdict(this_machine())))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), case: "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["system"] == "Linux" and found["architecture"] == os.uname().machine
    gpu = [found[name] for name in ("gpu", "compute_capability", "sm_count", "gpu_memory_mb", "cuda")]
    assert gpu == (["Orin", "8.7", 8, 15655, "12.6"] if case == "gpu" else [None] * 5)


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    found = machine.this_machine()
    assert (found.gpu, found.compute_capability, found.driver, found.cuda) == (None,) * 4


def test_the_jetson_release_and_the_driver_version(tmp_path, monkeypatch):
    release, driver = tmp_path / "nv_tegra_release", tmp_path / "version"
    monkeypatch.setattr(machine, "_L4T_FILE", str(release))
    monkeypatch.setattr(machine, "_DRIVER_FILES", (str(driver),))
    assert machine._l4t() is None
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert machine._l4t() == "R36.4.3"
    driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 22:23:56 UTC 2024\n"
    )
    assert machine._driver_version() == "550.54.15"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n")
    assert machine._driver_version() == "540.4.0"


@pytest.mark.parametrize(
    ("entry", "abi"), [("getCreators", "IPluginV3"), ("getPluginCreators", "IPluginV2DynamicExt")]
)
def test_a_plugin_is_known_by_its_bytes_and_its_entry_point(tmp_path, entry, abi):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc, cc) on this machine")
    (tmp_path / "p.c").write_text(
        f"void *{entry}(int *n) {{ *n = 0; return 0; }} void setLoggerFinder(void) {{}}"
    )
    library = tmp_path / "libp.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "p.c")], check=True)
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert passport.plugin_identity(library) == PluginIdentity("libp.so", digest, abi)
    with pytest.raises(InputError, match="make plugin"):
        passport.plugin_identity(tmp_path / "nowhere.so")
