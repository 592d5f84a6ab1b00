"""What is installed: the locks, the extras, environment.yml, and for which GPUs `make plugin` compiles."""

from __future__ import annotations

import ctypes
import re
import runpy
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
LOCKS = ("run", "dev", "odapi", "uv", "cross", "aarch64")

# What the project's card names, by the names of the packages.
CARD = (
    *("tensorflow-cpu", "tf-models-official", "tf2onnx", "onnx", "onnx-graphsurgeon", "tensorrt-rtx-cu13"),
    *("matplotlib", "jupyterlab", "jupyter-book"),
)


def locked(text: str) -> dict[tuple[str, str, str], int]:
    """(name, version, marker) of each package of a lock -> how many hashes it has."""
    found: dict[tuple[str, str, str], int] = {}
    for block in re.split(r"\n(?=\S)", text):
        head = re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)(?: ; ([^\\\n]+))?", block)
        if head is not None:
            name, version, marker = head[1].lower(), head[2], (head[3] or "").strip()
            found[name, version, marker] = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block))
    return found


def read_lock(name: str) -> dict[tuple[str, str, str], int]:
    return locked((REQUIREMENTS / f"{name}.lock").read_text())


def wanted(text: str) -> dict[str, str]:
    """The packages of an .in file or a list of requirements: name -> exact version, or empty."""
    lines = (re.match(r"([A-Za-z][A-Za-z0-9._-]*)(?:==([^\s#;]+))?", line) for line in text.splitlines())
    return {found[1].lower(): found[2] or "" for found in lines if found}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_a_hash(name: str):
    packages = read_lock(name)
    assert packages and all(count > 0 for count in packages.values())


def test_a_package_without_a_hash_is_caught():
    text = "a==1 \\\n    --hash=sha256:" + 64 * "0" + "\nb==2 ; python_full_version < '3.11'\n    # via a\n"
    assert locked(text) == {("a", "1", ""): 1, ("b", "2", "python_full_version < '3.11'"): 0}


def test_the_two_locks_agree():
    assert read_lock("run").keys() <= read_lock("dev").keys()


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_what_its_requirements_ask_for(name: str):
    versions: dict[str, set[str]] = {}
    for package, version, _ in read_lock(name):
        versions.setdefault(package, set()).add(version)
    for package, version in wanted((REQUIREMENTS / f"{name}.in").read_text()).items():
        assert package in versions
        assert not version or versions[package] == {version}


def test_the_extras_ask_for_the_locked_versions():
    asked = [one for extra in extras().values() for one in extra]
    pinned = [tuple(one.split("==")) for one in asked if "==" in one]
    versions = {(package, version) for package, version, _ in read_lock("dev")}
    assert len(pinned) > 10 and set(pinned) <= versions


def test_no_file_names_a_requirements_file_that_is_absent():
    named = set()
    for path in (ROOT / "pyproject.toml", ROOT / "environment.yml", ROOT / "Makefile", ROOT / "README.md"):
        named |= set(re.findall(r"requirements/([\w.-]+\.(?:in|lock))", path.read_text()))
    for path in REQUIREMENTS.iterdir():
        named |= set(re.findall(r"-[rc] ([\w.-]+\.(?:in|lock))", path.read_text()))
    assert len(named) >= 6 and [name for name in named if not (REQUIREMENTS / name).is_file()] == []


def test_environment_yml_names_what_the_card_names_after_the_locks_that_have_it():
    (listed,) = (
        one["pip"]
        for one in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if isinstance(one, dict)
    )
    locks = [line for line in listed if line.startswith("-r ")]
    names = [line for line in listed if not line.startswith("-r ")]
    assert listed == [*locks, *names], (
        "pip takes a name's hashes from the lock only where the lock comes first"
    )
    held = {package for line in locks for package, _, _ in locked((ROOT / line[3:].strip()).read_text())}
    assert set(CARD) <= set(names) <= held
    assert {"tensorrt", "pycuda"} <= wanted("\n".join(extras()["gpu"])).keys()


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


class Driver:
    """Stands for libcuda.so.1: one GPU for each (major, minor)."""

    def __init__(self, *capabilities: tuple[int, int], status: int = 0) -> None:
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: ctypes.c_void_p) -> int:
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device: ctypes.c_void_p, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetAttribute(self, value: ctypes.c_void_p, which: int, device: ctypes.c_int) -> int:
        value._obj.value = self.capabilities[device.value][which - 75]
        return 0


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver((8, 7)), [87]),
        (Driver((9, 0), (12, 0), (9, 0)), [90, 120]),
        (Driver(), []),
        (Driver((8, 7), status=100), []),  # CUDA_ERROR_NO_DEVICE
    ],
)
def test_the_kernels_are_compiled_for_the_gpus_that_the_driver_names(driver: Driver, expected: list[int]):
    script = runpy.run_path(str(ROOT / "scripts" / "gpu_architectures.py"))
    assert script["architectures"](driver) == expected
