"""The libraries that a workstation compiled for a board: what `make plugin TARGET=jetson-orin` leaves in
``plugins/build-jetson-orin``, what ``pack`` takes from there, and whether they fit the device.

``target.json`` says for which board, CUDA and TensorRT they are, and from which sources. In a bundle they are
in ``prebuilt/``, and ``manifest.json`` has their hashes, as those of all other files.

This module needs the standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

from odtrt_lib import IMPORT_PATH
from odtrt_lib.boards import TARGETS
from odtrt_lib.errors import InputError, one_line
from odtrt_lib.folder import atomic_write, sha256
from odtrt_lib.machine import Machine

PREBUILT = "prebuilt"
DESCRIPTION = "target.json"
LIBRARIES = ("libodtrt.so", "libodtrt_tensorrt.so")
COMPILED_SOURCES = ("CMakeLists.txt", "kernels/*", "tensorrt/*.cpp", "tensorrt/*.map", "detector/*")

# The plugin's interface since this version serves all newer ones; that before serves one minor version.
_FIRST_WITH_LASTING_INTERFACE = 10
_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Prebuilt:
    """What was compiled for a board.

    target: a name in :data:`odtrt_lib.boards.TARGETS`. architecture: as ``platform.machine()`` says. gpu: its
    compute capability without the point. cuda, tensorrt: ``major.minor`` of nvcc and of TensorRT's headers;
    tensorrt is None if there were none, and then there is no plugin. sources_sha256: see
    :func:`sources_sha256`. libraries: file name -> SHA-256.
    """

    target: str
    architecture: str
    gpu: str
    cuda: str
    tensorrt: Optional[str]
    sources_sha256: str
    libraries: Mapping[str, str]

    def to_json(self) -> str:
        """The text of ``target.json``."""
        return json.dumps({"schema": _SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n"


def sources_sha256(plugins: Path) -> str:
    """SHA-256 of the names and contents of all sources in ``plugins`` that the libraries are made from."""
    digest = hashlib.sha256()
    for pattern in COMPILED_SOURCES:
        for path in sorted(path for path in plugins.glob(pattern) if path.is_file()):
            digest.update(f"{path.relative_to(plugins).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def read_description(path: Path) -> Prebuilt:
    """Reads ``target.json``. Raises InputError if it is absent or not as :class:`Prebuilt` says."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("schema", None) != _SCHEMA:
            raise ValueError(f"expected schema {_SCHEMA}")
        found = Prebuilt(**data)
        texts = [found.target, found.architecture, found.gpu, found.cuda, found.sources_sha256]
        texts += [] if found.tensorrt is None else [found.tensorrt]
        if not all(isinstance(text, str) for text in [*texts, *found.libraries, *found.libraries.values()]):
            raise ValueError("expected texts")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not what `make plugin TARGET=...` wrote ({one_line(error)})") from error
    return found


def prebuilt_files(plugins: Path, target: str, needs_plugin: bool) -> Dict[str, Path]:
    """Name in the bundle -> the file that `make plugin TARGET=target` made.

    plugins: the folder of the sources. needs_plugin: the model is fused, so the plugin is wanted too. Raises
    InputError if nothing was compiled for ``target``, a file is not the one that was compiled, the sources
    have changed since, or the plugin is wanted and absent.
    """
    if target not in TARGETS:
        raise InputError(f"target {target!r}: expected {', '.join(TARGETS)}")
    build = plugins / f"build-{target}"
    again = f"run `make plugin TARGET={target} TENSORRT_INCLUDE_DIR=...`"
    if not (build / DESCRIPTION).is_file():
        raise InputError(f"{build}: nothing is compiled for {target}; {again} first")
    found = read_description(build / DESCRIPTION)
    if found.sources_sha256 != sources_sha256(plugins):
        raise InputError(f"{build}: compiled from other sources than those in {plugins}; {again} again")
    for name, digest in found.libraries.items():
        if name not in LIBRARIES or not (build / name).is_file() or sha256(build / name) != digest:
            raise InputError(f"{build / name}: not the file that was compiled; {again} again")
    if needs_plugin and LIBRARIES[1] not in found.libraries:
        raise InputError(f"{build}: compiled without TensorRT's headers, so without the plugin; {again}")
    return {f"{PREBUILT}/{name}": build / name for name in (DESCRIPTION, *found.libraries)}


def use_prebuilt(
    folder: Path, machine: Machine, tensorrt: Optional[Tuple[str, str]]
) -> Tuple[Optional[Dict[str, Path]], Optional[str]]:
    """Puts a bundle's compiled libraries where the compiler would put them, if they fit this device.

    folder: the unpacked bundle, already compared with its manifest. tensorrt: module and version of the
    TensorRT here, or None. Returns ``(file name -> path, None)``, or None and why they are not used; both are
    None if the bundle has none.
    """
    source = folder / PREBUILT
    if not (source / DESCRIPTION).is_file():
        return None, None
    found = read_description(source / DESCRIPTION)
    paths = {name: source / name for name in LIBRARIES if name in found.libraries}
    for reason in _misfits(found, paths, machine, tensorrt):
        return None, reason
    build = folder / "plugins" / "build"
    build.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        if name in paths:
            with atomic_write(build / name) as temporary:
                shutil.copyfile(str(paths[name]), str(temporary))
        else:
            with contextlib.suppress(FileNotFoundError):
                (build / name).unlink()
    return {name: build / name for name in paths}, None


def _misfits(
    found: Prebuilt, paths: Mapping[str, Path], machine: Machine, tensorrt: Optional[Tuple[str, str]]
) -> Iterator[str]:
    """Why the libraries cannot be used here, the cheapest question first."""
    if machine.architecture != found.architecture:
        yield f"compiled for {found.architecture}, and this machine is {machine.architecture}"
    if machine.compute_capability is None:
        yield f"compiled for the GPU of {found.target}, and no NVIDIA GPU is found here"
    elif machine.compute_capability.replace(".", "") != found.gpu:
        yield f"compiled for sm_{found.gpu}, and this GPU is sm_{machine.compute_capability.replace('.', '')}"
    if machine.cuda is not None and _major(machine.cuda) < _major(found.cuda):
        yield f"compiled with CUDA {found.cuda}, and this driver supports CUDA {machine.cuda}"
    if found.tensorrt is not None and tensorrt is not None:
        library, version = tensorrt
        if not _serves(found.tensorrt, library, version):
            yield f"the plugin is compiled for TensorRT {found.tensorrt}, and here is {library} {version}"
    for name, path in paths.items():
        problem = _load_error(path)
        if problem:
            yield f"{name} cannot be loaded here: {problem}"


def _serves(headers: str, library: str, version: str) -> bool:
    if library == "tensorrt_rtx" or _major(version) >= _FIRST_WITH_LASTING_INTERFACE:
        return _major(headers) >= _FIRST_WITH_LASTING_INTERFACE
    return headers == ".".join(version.split(".")[:2])


def _major(version: str) -> int:
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]) if numbers else 0


def _load_error(library: Path) -> str:
    """What the dynamic loader says against a library, asked in a process of its own; empty if it loads."""
    command = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    answer = subprocess.run(
        [sys.executable, "-I", "-c", command, str(library.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=IMPORT_PATH,
    )
    if answer.returncode == 0:
        return ""
    lines = answer.stderr.decode(errors="replace").strip().splitlines()
    return one_line(lines[-1]) if lines else f"the process ended with status {answer.returncode}"
