"""`make plugin TARGET=jetson-orin`: compiles plugins/ for a board, on a workstation.

The libraries are written to plugins/build-jetson-orin, with target.json, which says what they are for.

It needs nvcc (in PATH, in /usr/local/cuda/bin, or named by CUDACXX), aarch64-linux-gnu-g++, and the arm64
CUDA runtime's static library. This one is nvcc's own, from NVIDIA's packages cuda-cross-aarch64 or
cuda-cross-sbsa, or else the wheel of requirements/cross.lock, which is installed in .cache/. The environment
variable TENSORRT_INCLUDE_DIR names the headers of the board's TensorRT; without it there is no plugin.

The CUDA runtime is linked statically. So the board needs no CUDA toolkit, but a driver of nvcc's major
version or newer; and a C library as new as the one that the runtime asks for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from odtrt_lib.boards import JETPACKS, TARGETS, tensorrt_line  # noqa: E402
from odtrt_lib.bundle import prebuilt  # noqa: E402
from odtrt_lib.folder import atomic_write, sha256  # noqa: E402

PLUGINS = ROOT / "plugins"
COMPILER = "aarch64-linux-gnu-g++"
WHEELS = ROOT / ".cache" / "cuda-aarch64"
# The CUDA whose runtime requirements/cross.lock has.
LOCKED_CUDA = "13.0"


def find_nvcc() -> str:
    """The path of nvcc. Raises SystemExit if there is none."""
    places = (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    for place in places:
        if place and shutil.which(place):
            return str(shutil.which(place))
    raise SystemExit("error: nvcc is needed: install the CUDA Toolkit, or name it with CUDACXX=/path/to/nvcc")


def cuda_version(nvcc: str) -> str:
    """``major.minor`` of nvcc."""
    found = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if found is None:
        raise SystemExit(f"error: {nvcc} --version names no release; expected NVIDIA's nvcc")
    return found[1]


def boards_cuda(target: str) -> dict[str, list[str]]:
    """CUDA of the board's JetPacks, as far as odtrt supports their TensorRT -> these releases."""
    found: dict[str, list[str]] = {}
    for jetpack in JETPACKS:
        if TARGETS[target].board in jetpack.boards and tensorrt_line(jetpack.tensorrt).is_supported:
            found.setdefault(jetpack.cuda, []).append(jetpack.release)
    return found


def missing_architecture(target: str, version: str, known: str) -> str | None:
    """Why nvcc cannot compile for the board's GPU, in one line; None if it can.

    version: nvcc's. known: what `nvcc --list-gpu-code` prints.
    """
    gpu = f"sm_{TARGETS[target].gpu}"
    if gpu in known.split():
        return None
    fitting = ", ".join(f"{cuda} (JetPack {', '.join(names)})" for cuda, names in boards_cuda(target).items())
    return (
        f"nvcc of CUDA {version} does not know {gpu}, the GPU of {target}: name an nvcc of that board's "
        f"CUDA, {fitting}, with CUDACXX=/path/to/nvcc"
    )


def usable_on(target: str, version: str) -> str:
    """A sentence: on which JetPacks of the board the driver is new enough for this CUDA, and on which not."""
    new, old = [], []
    for cuda, releases in boards_cuda(target).items():
        is_new = int(cuda.split(".")[0]) >= int(version.split(".")[0])
        (new if is_new else old).extend(f"{release} (CUDA {cuda})" for release in releases)
    text = f"compiled with CUDA {version}; it needs a driver of that major version: "
    text += f"JetPack {', '.join(new)}" if new else "no JetPack that odtrt knows has one for this board"
    return text + (f"; too old: JetPack {', '.join(old)}" if old else "")


def runtime_folders(nvcc: str, version: str) -> tuple[Path, Path]:
    """The include folder of the CUDA runtime, and the folder of its libcudart_static.a for arm64."""
    toolkit = Path(re.search(r"(?m)^#\$ TOP=(.*)$", _output(nvcc, "--dryrun", "-c", "x.cu"))[1]).resolve()  # type: ignore[index]
    for name in ("aarch64-linux", "sbsa-linux"):
        place = toolkit / "targets" / name
        if (place / "lib" / "libcudart_static.a").is_file():
            return place / "include", place / "lib"
    if version != LOCKED_CUDA:
        package = version.replace(".", "-")
        raise SystemExit(
            f"error: the arm64 CUDA runtime is needed: install NVIDIA's package cuda-cross-aarch64-{package} "
            f"(or cuda-cross-sbsa-{package}); odtrt fetches only that of CUDA {LOCKED_CUDA}"
        )
    library = WHEELS / "nvidia" / "cu13" / "lib"
    if not (library / "libcudart_static.a").is_file():
        install_wheels("cross", WHEELS)
    own = [toolkit / "include", toolkit / "targets" / "x86_64-linux" / "include"]
    return next(path for path in own if (path / "cuda_runtime.h").is_file()), library


def install_wheels(lock: str, folder: Path) -> None:
    """Installs the arm64 wheels of ``requirements/<lock>.lock`` in ``folder``, by hash; runs none of them."""
    command = [
        *(str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-deps"),
        *("--require-hashes", "--only-binary", ":all:", "--python-platform", "aarch64-manylinux_2_36"),
        *("--python-version", "3.11", "--target", str(folder)),
        *("-r", str(ROOT / "requirements" / f"{lock}.lock")),
    ]
    subprocess.run(command, check=True)


def header_version(headers: Path) -> str:
    """``major.minor`` of TensorRT's headers."""
    text = (headers / "NvInferVersion.h").read_text(encoding="utf-8")
    parts = [
        re.search(rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)", text)
        for part in ("MAJOR", "MINOR")
    ]
    if not all(parts):
        raise SystemExit(f"error: {headers / 'NvInferVersion.h'} names no version of TensorRT")
    return ".".join(part[1] for part in parts if part)


def compile_for(target: str, headers: Path | None, build: Path) -> prebuilt.Prebuilt:
    """Compiles plugins/ for the board in the folder ``build``, and describes it there in ``target.json``."""
    nvcc = find_nvcc()
    version = cuda_version(nvcc)
    problem = missing_architecture(target, version, _output(nvcc, "--list-gpu-code"))
    if problem:
        raise SystemExit(f"error: {problem}")
    if shutil.which(COMPILER) is None:
        subprocess.run([str(ROOT / "scripts" / "install_packages.sh"), "g++-aarch64-linux-gnu"], check=True)
    include, library = runtime_folders(nvcc, version)
    shutil.rmtree(build, ignore_errors=True)
    # CMake tries nvcc before it reads options of ours, so nvcc's come by CMake's own environment variables.
    environment = {
        **os.environ,
        "CUDACXX": nvcc,
        "CUDAHOSTCXX": COMPILER,
        "CUDAFLAGS": f"-I{include} -L{library}",
        "CXXFLAGS": f"-isystem {include}",
    }
    environment.pop("TENSORRT_INCLUDE_DIR", None)
    options = [
        f"-DCMAKE_TOOLCHAIN_FILE={PLUGINS / 'cmake' / 'aarch64.cmake'}",
        f"-DCMAKE_CUDA_ARCHITECTURES={TARGETS[target].gpu}",
        f"-DTENSORRT_INCLUDE_DIR={headers or ''}",
    ]
    build.mkdir(parents=True)
    commands = (
        ["cmake", "-S", str(PLUGINS), "-B", str(build), "--log-level=NOTICE", *options],
        ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)],
    )
    with (build / "log").open("w") as log:
        for command in commands:
            if subprocess.run(command, env=environment, stdout=log, stderr=log).returncode != 0:
                raise SystemExit(f"{(build / 'log').read_text()}error: {' '.join(command[:2])} failed")
    made = [name for name in prebuilt.LIBRARIES if (build / name).is_file()]
    described = prebuilt.Prebuilt(
        target=target,
        architecture=TARGETS[target].architecture,
        gpu=TARGETS[target].gpu,
        cuda=version,
        tensorrt=None if headers is None else header_version(headers),
        sources_sha256=prebuilt.sources_sha256(PLUGINS),
        libraries={name: sha256(build / name) for name in made},
    )
    with atomic_write(build / prebuilt.DESCRIPTION) as temporary:
        temporary.write_text(described.to_json(), encoding="utf-8")
    return described


def newest_glibc(library: Path) -> str:
    """The newest version of the C library that a shared library asks for."""
    listed = re.findall(r"GLIBC_(\d+)\.(\d+)", _output("aarch64-linux-gnu-readelf", "-V", str(library)))
    return "{}.{}".format(*max((int(major), int(minor)) for major, minor in listed))


def _output(*command: str) -> str:
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return answer.stdout


def main() -> None:
    target = sys.argv[1] if len(sys.argv) == 2 else ""
    if target not in TARGETS:
        raise SystemExit(f"error: TARGET={target}: expected {', '.join(TARGETS)}")
    named = os.environ.get("TENSORRT_INCLUDE_DIR", "")
    if named and not (Path(named) / "NvInferRuntime.h").is_file():
        raise SystemExit(
            f"error: {named}: no NvInferRuntime.h; TENSORRT_INCLUDE_DIR names TensorRT's headers"
        )
    build = PLUGINS / f"build-{target}"
    made = compile_for(target, Path(named).resolve() if named else None, build)
    if made.tensorrt is None:
        print("no libodtrt_tensorrt.so: name the headers of the board's TensorRT with TENSORRT_INCLUDE_DIR=")
    print(usable_on(target, made.cuda))
    print(f"needs glibc {newest_glibc(build / prebuilt.LIBRARIES[0])} or newer; not tried on a board")
    print("\n".join(f"plugins/build-{target}/{name}" for name in made.libraries))


if __name__ == "__main__":
    main()
