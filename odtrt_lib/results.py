"""Measurements: one JSON file for each topic under ``results/``. Only the command that it names writes it.

``{"schema": 1, "topic", "command", "date", "device": {...}, "versions": {...}, "rows": [...]}``. A row is
flat: each key has one figure, and its name contains the unit (``seconds``, ``p50_us``, ``max_abs_err``). Each
row is one line of the file, and so is each other key. Needs the standard library only.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence, Union

from odtrt_lib.folder import atomic_write

SCHEMA_VERSION = 1
RECORDED_DISTRIBUTIONS = (
    "numpy",
    "pillow",
    "opencv-python-headless",
    "opencv-python",
    "tensorflow",
    "tensorflow-cpu",
    "tf-models-research-object-detection",
    "tf2onnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "nvidia-modelopt",
    "pycuda",
    "torch",
    "torchvision",
    "pycocotools",
)


def write_results(
    path: Union[str, Path], topic: str, command: str, rows: Sequence[Mapping[str, Any]]
) -> Dict[str, Any]:
    """Writes one topic's measurements, whole or not at all, and returns what it wrote.

    command: the command that writes this file again. rows: flat mappings; a value is text, a finite number, a
    truth value or None. The device and the versions of :data:`RECORDED_DISTRIBUTIONS` are added.

    Raises ValueError if a row is not flat or a figure is not finite, InputError if ``path`` cannot
    be written.
    """
    for number, row in enumerate(rows):
        for key, value in row.items():
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise ValueError(
                    f"{path}: row {number}: {key} is a {type(value).__name__}, expected one figure"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{path}: row {number}: {key} is {value}, expected a finite figure")
    record = {
        "schema": SCHEMA_VERSION,
        "topic": topic,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_info(),
        "versions": versions(*RECORDED_DISTRIBUTIONS),
        "rows": [dict(row) for row in rows],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(as_text(record), encoding="utf-8")
    return record


def as_text(record: Mapping[str, Any]) -> str:
    """The text of a results file: one line for each key of ``record`` and for each of its ``rows``."""
    lines = []
    for key, value in record.items():
        text = json.dumps(value, allow_nan=False)
        if key == "rows" and value:
            rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in value)
            text = f"[\n{rows}\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def device_info() -> Dict[str, Any]:
    """The machine as flat figures: ``system``, ``machine``, ``cpu``, ``cores`` (that this process may use).

    With an NVIDIA GPU also ``gpu``, ``gpu_count``, ``gpu_memory_mb`` and ``driver``; on a Jetson ``board``
    and ``l4t``.
    """
    info: Dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    info.update(_gpu_info())
    board = _first_line("/proc/device-tree/model").strip("\0")
    if board:
        info["board"] = board
    l4t = _first_line("/etc/nv_tegra_release")
    if l4t:
        info["l4t"] = l4t.lstrip("# ")
    return info


def versions(*distributions: str) -> Dict[str, str]:
    """The versions of Python, of odtrt and of the named distributions.

    Use pip's names, e.g. ``versions("numpy", "opencv-python-headless")``. A distribution that is not
    installed is left out.
    """
    from odtrt_lib import __version__

    found = {"python": platform.python_version(), "odtrt": __version__}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu_info() -> Dict[str, Any]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    gpus = [
        [part.strip() for part in line.split(",")] for line in answer.splitlines() if line.count(",") == 2
    ]
    if not gpus:
        return {}
    name, memory, driver = gpus[0]
    info: Dict[str, Any] = {"gpu": name, "gpu_count": len(gpus), "driver": driver}
    if memory.isdigit():
        info["gpu_memory_mb"] = int(memory)
    return info


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return ""
