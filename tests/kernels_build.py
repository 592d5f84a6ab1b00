"""Builds of the library for tests: sanitized, for another processor, emulating a GPU, or with defects."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"


def build_library(folder: Path, *cmake_options: str, sources: Path = PLUGINS) -> Path:
    """libodtrt.so, without CUDA, built in ``folder``."""
    _run("cmake", "-S", sources, "-B", folder, "--log-level=ERROR", "-DODTRT_CUDA=OFF", *cmake_options)
    _run("cmake", "--build", folder, "--target", "odtrt", "--parallel", "2")
    return folder / "libodtrt.so"


def build_with_defect(folder: Path, file: str, old: str, new: str, *cmake_options: str) -> Path:
    """libodtrt.so from a copy of plugins/ in which ``old`` is ``new``, once, in ``file``.

    For example ``("kernels/semantics.h", "b < a ? b : a", "b > a ? b : a")``, or ``("CMakeLists.txt",
    "-ffp-contract=off", "-ffp-contract=fast -mfma")``.
    """
    return build_library(folder / "build", *cmake_options, sources=_changed(folder, [(file, old, new)]))


def build_emulated(folder: Path, *cmake_options: str, changes: Iterable[tuple[str, str, str]] = ()) -> Path:
    """libodtrt.so whose kernels run in plugins/emulator, after ``changes``: ``(file, old, new)`` each."""
    sources = _changed(folder, changes) if changes else PLUGINS
    return build_library(folder / "build", *cmake_options, sources=sources / "emulator")


def _changed(folder: Path, changes: Iterable[tuple[str, str, str]]) -> Path:
    copy = folder / "plugins"
    shutil.copytree(PLUGINS, copy, ignore=shutil.ignore_patterns("build*"))
    for file, old, new in changes:
        text = (copy / file).read_text()
        assert old in text, f"{file} has no {old!r} to seed a defect in"
        (copy / file).write_text(text.replace(old, new, 1))
    return copy


def build_driver(library: Path, compiler: str, *options: str) -> Path:
    """tests/kernels_driver.cpp beside ``library`` and linked to it."""
    driver = library.with_name("driver")
    source = Path(__file__).with_name("kernels_driver.cpp")
    warnings = ("-Wall", "-Wextra", "-Werror")
    _run(
        compiler, "-std=c++17", "-O1", "-ffp-contract=off", *warnings, *options, f"-I{PLUGINS / 'kernels'}",
        source, library, "-Wl,-rpath,$ORIGIN", "-o", driver,
    )  # fmt: skip
    return driver


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
