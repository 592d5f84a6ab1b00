"""Finds what is installed here, which parts of odtrt work, and which command installs the rest.

Every package is imported in a process of its own. If one is broken or crashes, this is one line of the
result, and the others are still tried.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from odtrt_lib.boards import jetpack, tensorrt_line
from odtrt_lib.errors import OdtrtError
from odtrt_lib.machine import meminfo, this_machine
from odtrt_lib.requirements import NEEDS, PACKAGES, RUN_A_PLAN, Package
from odtrt_lib.results import device_info

_SECONDS_PER_IMPORT = 300


@dataclasses.dataclass(frozen=True)
class Finding:
    """One package: its version if it works, else None and the problem."""

    package: Package
    version: Optional[str]
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Chapter:
    """Whether a part of odtrt works here. missing: the packages that it lacks. install: how to get them."""

    title: str
    missing: Tuple[str, ...]
    install: Tuple[str, ...]
    note: str = ""


# Importing tf2onnx would import TensorFlow a second time, so it is only looked for.
_FOUND_NOT_IMPORTED = ("tf2onnx",)


def packages() -> List[Finding]:
    """Tries every one of :data:`PACKAGES`. This takes seconds, because each is really imported."""
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(_examine, PACKAGES))


def chapters(findings: List[Finding]) -> List[Chapter]:
    """Each part of odtrt in :data:`NEEDS`, with the packages that it lacks according to the findings."""
    works = {finding.package.name: finding.version is not None for finding in findings}
    install = {finding.package.name: finding.package.install for finding in findings}
    info = device_info()
    has_gpu = "gpu" in info or "l4t" in info
    result = []
    for title, needs in NEEDS.items():
        missing = [name for name in needs if not works[name]]
        if title.startswith("3") and not (works["TensorRT"] or works["TensorRT-RTX"]):
            missing.append("TensorRT-RTX")
        commands = tuple(dict.fromkeys(install[name] for name in missing))
        note = ""
        if title == RUN_A_PLAN and not has_gpu:
            missing.append("an NVIDIA GPU with its driver")
            note = "building a plan needs no GPU with TensorRT-RTX"
        result.append(Chapter(title, tuple(missing), commands, note))
    return result


def native_library() -> str:
    """The native library in words: its place and whether it has CUDA, or how to get it."""
    try:
        from odtrt_lib import native

        library = native.load()
    except ImportError:
        return "cannot be looked for without NumPy"
    except OdtrtError as error:
        return str(error)
    if library is None:
        return "none (numpy does the same, slower): run `make plugin`"
    architectures = library.cuda_architectures
    cuda = f"with CUDA for sm_{', sm_'.join(architectures.split())}" if architectures else "without CUDA"
    return f"{library.path}, {cuda}"


def cuda_runtime() -> str:
    """The CUDA runtime library that would run a plan, or the reason why there is none, in words."""
    try:
        from odtrt_lib import cuda

        return str(cuda.library()._name)
    except ImportError:
        return "cannot be looked for without NumPy"
    except OdtrtError as error:
        return str(error)


def machine() -> Dict[str, str]:
    """The parts of this machine: name -> a description."""
    info = device_info()
    found = {
        "Python": f"{platform.python_version()} ({sys.executable})",
        "System": f"{_os_name()}, {info['machine']}",
        "Processor": f"{info['cpu'] or 'unknown'}, {info['cores']} cores",
        "Memory": _memory(),
        "Disk": _disk(),
    }
    if "gpu" in info:
        count = f"{info['gpu_count']} × " if info["gpu_count"] > 1 else ""
        found["GPU"] = f"{count}{info['gpu']}, {info.get('gpu_memory_mb', '?')} MB, driver {info['driver']}"
    elif "l4t" in info:
        found["GPU"] = "the Jetson's own"
    else:
        found["GPU"] = "none (nvidia-smi finds no NVIDIA GPU)"
    if "gpu" in info or "l4t" in info:
        found["CUDA runtime"] = cuda_runtime()
    found["Native library"] = native_library()
    if "l4t" in info:
        found["Jetson"] = f"{info.get('board', 'board unknown')}, L4T {info['l4t']}"
        found["JetPack"] = _jetpack(this_machine().l4t)
    return found


def _jetpack(l4t: Optional[str]) -> str:
    known = jetpack(l4t) if l4t else None
    if known is None:
        return "not in odtrt's table; `apt show nvidia-jetpack` says which"
    line = tensorrt_line(known.tensorrt)
    works = "" if line.is_supported else ", too old for odtrt"
    return f"{known.release}, which has TensorRT {known.tensorrt} and Python {known.python}{works}"


def _examine(package: Package) -> Finding:
    try:
        if importlib.util.find_spec(package.module.split(".")[0]) is None:
            return Finding(package, None, "not installed")
    except (ImportError, ValueError):
        return Finding(package, None, "not installed")
    if package.module not in _FOUND_NOT_IMPORTED:
        problem = _problem(package.statement or f"import {package.module}")
        if problem:
            return Finding(package, None, problem)
    return Finding(package, _version(package))


def _problem(statement: str) -> str:
    """Why ``statement`` fails in a new Python process, on one line; empty if it does not."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", statement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS_PER_IMPORT, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"installed, but importing it took more than {_SECONDS_PER_IMPORT} s"
    except OSError as error:
        return f"Python cannot be started ({error})"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"installed, but importing it crashes (signal {-done.returncode})"
    lines = done.stderr.strip().splitlines()
    return f"installed, but not importable: {lines[-1] if lines else f'exit status {done.returncode}'}"


def _version(package: Package) -> str:
    for distribution in (package.distribution, f"{package.distribution}-cpu", package.module):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "installed"


def _os_name() -> str:
    for line in _lines(Path("/etc/os-release")):
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    return platform.system()


def _memory() -> str:
    known = meminfo()
    if "MemTotal" not in known:
        return "unknown"
    free = known.get("MemAvailable", known.get("MemFree", 0))
    return f"{known['MemTotal'] / 2**30:.1f} GB, {free / 2**30:.1f} GB of it available"


def _disk() -> str:
    try:
        usage = shutil.disk_usage(".")
    except OSError as error:
        return f"unknown ({error.strerror})"
    return f"{usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f} GB in this folder"


def _lines(path: Path) -> List[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
