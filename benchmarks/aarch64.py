"""A bundle and the cross-compiled plugin in an emulated arm64 system -> results/aarch64.cpu.json.

python benchmarks/aarch64.py [--model out/parts] [--target jetson-orin] [--output FILE]

`make check-aarch64` runs it. The environment variable TENSORRT_INCLUDE_DIR names the headers of TensorRT 10
or 11, for the plugin. A root file system is made, once, in .cache/aarch64, from Debian's arm64 packages
(Python, g++, cmake) and the wheels of requirements/aarch64.lock. Programs in it run under qemu-user. There,
the bundle's own commands unpack it, compile the library, build a plan with TensorRT-RTX, detect, and draw;
and tensorrt-lean's plugin registry loads the plugin that `make plugin TARGET=...` compiled on this machine.

What is compared with this machine: pixels, the network's input, post-processing of the same heads: bit for
bit. ONNX Runtime rounds in another order on arm64, so heads have a largest difference, and detections are
compared by :func:`odtrt_lib.evaluate.agreement`. qemu-user runs no GPU and no Jetson's kernel or driver, and
its seconds say nothing about a board.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from odtrt_lib import bundle
from odtrt_lib.boards import TARGETS
from odtrt_lib.bundle import prebuilt
from odtrt_lib.errors import InputError
from odtrt_lib.evaluate import agreement
from odtrt_lib.results import write_results
from odtrt_lib.scenes import TEST_SEEDS, render_scene

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "aarch64.cpu.json"
COMMAND = "make check-aarch64 TENSORRT_INCLUDE_DIR=..."
PROGRAMS = {"qemu-aarch64-static": "qemu-user-static", "mmdebstrap": "mmdebstrap"}
PACKAGES = "python3,g++,cmake,make,dash,coreutils"
SUITE = "bookworm"
PICTURES = 4
MERGED_USR = "/usr/share/mmdebstrap/hooks/merged-usr"
Rows = list[dict[str, Any]]


def make_root(folder: Path) -> Path:
    """The arm64 root file system in ``folder``, made unless it is there."""
    root = folder / "root"
    if (root / "opt" / "site").is_dir():
        return root
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        subprocess.run([str(ROOT / "scripts" / "install_packages.sh"), *missing], check=True)
    shutil.rmtree(root, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # "extract" runs no package's script, so nothing is emulated; what scripts would link is linked here.
    _run(
        *("mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64", f"--hook-dir={MERGED_USR}"),
        *(f"--include={PACKAGES}", SUITE, str(root)),
    )
    for link, program in (("sh", "dash"), ("c++", "g++")):
        if not (root / "usr" / "bin" / link).exists():
            (root / "usr" / "bin" / link).symlink_to(program)
    for place in ("proc", "dev", "work", "formats"):
        (root / place).mkdir(exist_ok=True)
    site = root / "opt" / "new"
    _run(
        *(str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-deps"),
        *("--require-hashes", "--only-binary", ":all:", "--python-platform", "aarch64-manylinux_2_36"),
        *("--python-version", "3.11", "--target", str(site)),
        *("-r", str(ROOT / "requirements" / "aarch64.lock")),
    )
    # TensorRT-RTX's top package has no wheel; it is one line of Python, the same everywhere.
    import tensorrt_rtx

    shutil.copytree(Path(tensorrt_rtx.__file__).parent, site / "tensorrt_rtx")
    site.rename(root / "opt" / "site")
    return root


class Emulated:
    """Runs commands in the arm64 system, and keeps what they print as rows."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.work = root, work
        self.rows: Rows = []
        machine = self._start(["uname", "-m"])
        if machine.stdout.strip() != "aarch64":
            raise SystemExit(
                "error: arm64 programs do not start here ("
                + machine.stderr.strip()[-200:]
                + "); Linux 6.7 or "
                "newer with user namespaces is needed, or qemu-user-static registered in binfmt_misc"
            )

    def run(self, *command: str, environment: dict[str, str] | None = None, log: bool = True) -> str:
        """What the command prints; raises SystemExit if it fails."""
        start = time.perf_counter()
        answer = self._start([*(f"{name}={value}" for name, value in (environment or {}).items()), *command])
        seconds = round(time.perf_counter() - start, 1)
        if answer.returncode != 0:
            raise SystemExit(f"{answer.stdout}{answer.stderr}error: arm64: {' '.join(command)} failed")
        shown = " ".join(command)
        if log:
            print(f"arm64: {shown}: {seconds} s", flush=True)
            self.rows.append({"check": "command", "command": shown, "seconds": seconds})
            self.rows += [
                {"check": "log", "command": shown, "line": line} for line in answer.stdout.splitlines()
            ]
        return answer.stdout

    def _start(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "scripts" / "in_aarch64.sh")
        return subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", script, str(self.root), str(self.work), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


def system_row(emulated: Emulated) -> dict[str, Any]:
    """What the arm64 system is made of."""
    question = (
        "import json, platform, numpy, onnxruntime, PIL, tensorrt_rtx; print(json.dumps({"
        "'machine': platform.machine(), 'python': platform.python_version(), "
        "'glibc': platform.libc_ver()[1], "
        "'numpy': numpy.__version__, 'onnxruntime': onnxruntime.__version__, 'pillow': PIL.__version__, "
        "'tensorrt_rtx': tensorrt_rtx.__version__}))"
    )
    row = json.loads(emulated.run("python3", "-c", question, log=False))
    compilers = emulated.run("g++", "--version", log=False), emulated.run("cmake", "--version", log=False)
    names = ("gxx", "cmake")
    row |= {name: _first_version(text) for name, text in zip(names, compilers, strict=True)}
    qemu = _first_version(_run("qemu-aarch64-static", "--version"))
    return {
        "check": "system",
        "system": f"Debian {SUITE}",
        **row,
        "emulator": f"qemu-user {qemu}",
        "kernel_of_the_host": platform.release(),
    }


def plugin_files(target: str) -> prebuilt.Prebuilt:
    """What is compiled for the board; compiles it, for minutes, if it is absent or of other sources."""
    try:
        prebuilt.prebuilt_files(ROOT / "plugins", target, needs_plugin=True)
    except InputError as reason:
        print(f"compiling: {reason}")
        _run(sys.executable, str(ROOT / "scripts" / "cross_compile.py"), target)
        try:
            prebuilt.prebuilt_files(ROOT / "plugins", target, needs_plugin=True)
        except InputError as problem:
            raise SystemExit(f"error: {problem}") from problem
    return prebuilt.read_description(ROOT / "plugins" / f"build-{target}" / prebuilt.DESCRIPTION)


def plugin_rows(emulated: Emulated, target: str, described: prebuilt.Prebuilt) -> Rows:
    """The cross-compiled library and plugin in the arm64 system: loaded, and in the real plugin registry."""
    build = ROOT / "plugins" / f"build-{target}"
    for name in described.libraries:
        shutil.copyfile(build / name, emulated.work / name)
    shutil.copyfile(ROOT / "benchmarks" / "plugin_probe.py", emulated.work / "plugin_probe.py")
    made = {
        "target": target,
        "gpu": f"sm_{described.gpu}",
        "cuda": described.cuda,
        "tensorrt_headers": described.tensorrt,
    }
    rows: Rows = []
    for name in described.libraries:
        symbols = _run("aarch64-linux-gnu-readelf", "-V", str(build / name))
        needs = {
            key: max(re.findall(rf"{key}_([\d.]+)", symbols), key=lambda v: [int(n) for n in v.split(".")])
            for key in ("GLIBC", "GLIBCXX")
        }
        row = {"check": "cross-compiled", "library": name, **made, "bytes": (build / name).stat().st_size}
        rows.append(row | {"needs_glibc": needs["GLIBC"], "needs_glibcxx": needs["GLIBCXX"]})
    question = (
        "import ctypes; f = ctypes.CDLL('/work/libodtrt.so').odtrt_cuda_architectures; "
        "f.restype = ctypes.c_char_p; print(f().decode())"
    )
    architectures = emulated.run("python3", "-c", question, log=False).strip()
    rows.append({"check": "library", **made, "loads": True, "architectures": architectures})
    found = json.loads(
        emulated.run(
            *("python3", "plugin_probe.py", "registry", "tensorrt_lean_bindings"),
            "/work/libodtrt_tensorrt.so",
            environment={"PYTHONPATH": "/opt/site:/work/parts"},
            log=False,
        ).splitlines()[-1]
    )
    found["fields"] = len(found.get("fields", ()))
    rows.append({"check": "registry", **made, **found})
    return rows


def bundle_rows(emulated: Emulated, model: Path, target: str) -> Rows:
    """The bundle's own commands in the arm64 system; and detect.py on this machine, for the pictures."""
    work = emulated.work
    packed = bundle.pack(model, work / "parts.odtrt.zip", target=target)
    pictures = work / "pictures"
    pictures.mkdir()
    for seed in list(TEST_SEEDS)[:PICTURES]:
        Image.fromarray(render_scene(seed).image).save(pictures / f"scene_{seed}.png")
    first = sorted(pictures.iterdir())[0].name
    emulated.run("python3", "parts.odtrt.zip")
    emulated.run("python3", "parts/build_here.py", "--image", f"pictures/{first}")
    emulated.run("python3", "parts/detect.py", "pictures", "-o", "drawn")
    built = json.loads((work / "parts" / "built.json").read_text())
    here = work / "x86"
    bundle.unpack(packed.archive, here)
    isolated = {"PYTHONPATH": "", "ODTRT_LIBRARY": str(ROOT / "plugins" / "build" / "libodtrt.so")}
    command = [sys.executable, str(here / "detect.py"), str(pictures), "-o", str(work / "drawn_x86")]
    _run(*command, environment=isolated)
    plan = work / "parts" / next(iter(built["plans"].values()))
    rows: Rows = [
        {
            "check": "build_here",
            "library": built["library"],
            "plugin": built["plugin"],
            "plan_of": next(iter(built["plans"])),
            "plan_bytes": plan.stat().st_size,
            "backend": built["backend"],
            "detections": len(built["detections"]),
            "drawn": built["drawn"],
        }
    ]
    for path in sorted((work / "drawn").iterdir()):
        ours, theirs = (
            np.asarray(Image.open(place / path.name)) for place in (path.parent, work / "drawn_x86")
        )
        rows.append(
            {
                "check": "picture",
                "picture": path.name,
                "height": ours.shape[0],
                "width": ours.shape[1],
                "pixels_unlike_x86": int((ours != theirs).any(axis=-1).sum()),
            }
        )
    return rows


def comparison_rows(emulated: Emulated) -> Rows:
    """What both machines compute for the same pictures and the same heads."""
    work = emulated.work
    probe = ROOT / "benchmarks" / "aarch64_probe.py"
    shutil.copyfile(probe, work / "aarch64_probe.py")
    own = {
        "PYTHONPATH": str(ROOT),
        "ODTRT_LIBRARY": str(ROOT / "plugins" / "build" / "libodtrt.so"),
    }
    places = ("parts/model", "pictures", "heads.npz")
    _run(
        sys.executable,
        str(probe),
        *(str(work / place) for place in places),
        str(work / "x86.npz"),
        environment=own,
    )
    emulated.run(
        *("python3", "aarch64_probe.py", *places, "arm64.npz"),
        environment={"PYTHONPATH": "/opt/site:/work/parts"},
        log=False,
    )
    x86, arm64 = (dict(np.load(work / f"{name}.npz")) for name in ("x86", "arm64"))
    return compare(x86, arm64)


def compare(x86: dict[str, np.ndarray], arm64: dict[str, np.ndarray]) -> Rows:
    """Rows from two outputs of aarch64_probe.py."""
    results = ("num_detections", "boxes", "scores", "classes", "anchors")
    rows: Rows = []
    for what, pairs in {
        "decoded pictures": [("images", "images")],
        "network input (libodtrt.so)": [("inputs", "inputs")],
        "post-processing of x86's heads (libodtrt.so)": [(f"library_{name}",) * 2 for name in results],
        "post-processing of x86's heads (numpy)": [(f"numpy_{name}",) * 2 for name in results],
        "libodtrt.so and numpy, both arm64": [(f"library_{name}", f"numpy_{name}") for name in results],
    }.items():
        base = arm64 if what.startswith("libodtrt.so and") else x86
        values = sum(arm64[name].size for _, name in pairs)
        unlike = sum(different_bits(base[one], arm64[other]) for one, other in pairs)
        row = {"check": "bits", "compared": what, "pictures": len(x86["counts"])}
        rows.append(row | {"values": values, "different_values": unlike})
    for head in ("box_encodings", "class_logits"):
        error = np.abs(x86[head].astype(np.float64) - arm64[head])
        row = {"check": "heads", "compared": f"{head} by ONNX Runtime", "values": x86[head].size}
        row["different_values"] = different_bits(x86[head], arm64[head])
        rows.append(row | {"max_abs_err": float(error.max()), "max_abs": float(np.abs(x86[head]).max())})
    found = agreement(coco_rows(x86), coco_rows(arm64))
    rows.append(
        {
            "check": "agreement",
            "compared": "detections by ONNX Runtime, x86 and arm64",
            "pictures": found.images,
            "references": found.references,
            "matched": found.matched,
            "missing": len(found.missing),
            "extra": len(found.extra),
            "max_score_difference": found.max_score_difference,
            "min_iou": found.min_iou,
            "agrees": found.agrees,
        }
    )
    return rows


def different_bits(one: np.ndarray, other: np.ndarray) -> int:
    """How many values of two arrays differ in any bit; all of them if shape or type differ."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return max(one.size, other.size)
    integer = np.dtype(f"u{one.dtype.itemsize}")
    return int((np.ascontiguousarray(one).view(integer) != np.ascontiguousarray(other).view(integer)).sum())


def coco_rows(found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The detections of aarch64_probe.py in the form that ``agreement`` reads."""
    numbers = np.repeat(np.arange(len(found["counts"])), found["counts"])
    return [
        {
            "image_id": int(number),
            "category_id": int(label),
            "bbox": [float(box[1]), float(box[0]), float(box[3] - box[1]), float(box[2] - box[0])],
            "score": float(score),
        }
        for number, box, score, label in zip(
            numbers, found["found_boxes"], found["found_scores"], found["found_classes"], strict=True
        )
    ]


def failures(rows: Rows) -> list[str]:
    """What must be so and is not."""
    found = [row["compared"] for row in rows if row["check"] == "bits" and row["different_values"]]
    for row in rows:
        if row["check"] == "agreement" and not row["agrees"]:
            found.append(row["compared"])
        if row["check"] == "registry" and not (row["loads"] and row.get("plugin_made")):
            found.append("the plugin in the registry")
    return found


def _first_version(text: str) -> str:
    found = re.search(r"\d+\.\d+[\d.]*", text)
    return found[0] if found else ""


def _run(*command: str, environment: dict[str, str] | None = None) -> str:
    answer = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    if answer.returncode != 0:
        raise SystemExit(
            f"{answer.stdout[-2000:]}{answer.stderr[-4000:]}error: {' '.join(command[:3])} failed"
        )
    return answer.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "parts")
    parser.add_argument("--target", choices=list(TARGETS), default="jetson-orin")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not (arguments.model / "heads.onnx").is_file():
        raise SystemExit(f"error: {arguments.model}: no converted model; run `make run` first")
    if not (ROOT / "plugins" / "build" / "libodtrt.so").is_file():
        raise SystemExit("error: plugins/build/libodtrt.so is absent; run `make plugin` first")
    described = plugin_files(arguments.target)
    root = make_root(ROOT / ".cache" / "aarch64")
    with tempfile.TemporaryDirectory() as temporary:
        emulated = Emulated(root, Path(temporary))
        rows = [system_row(emulated)]
        rows += bundle_rows(emulated, arguments.model, arguments.target)
        rows += comparison_rows(emulated)
        rows += plugin_rows(emulated, arguments.target, described)
        rows += emulated.rows
    print(*rows, sep="\n")
    wrong = failures(rows)
    if wrong:
        raise SystemExit(f"error: not as it must be: {', '.join(wrong)}; nothing was written")
    write_results(arguments.output, "aarch64", COMMAND, rows)


if __name__ == "__main__":
    main()
