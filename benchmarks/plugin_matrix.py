"""Which TensorRT the plugin compiles with, loads into and builds with -> results/plugin_matrix.json.

python benchmarks/plugin_matrix.py [--headers DIR] [--lean DIR] [--model FOLDER...] [--output FILE]

--headers: a folder with one folder for each version of TensorRT, named as the version, that holds its public
    headers (NvInferRuntime.h, ...). Each is compiled with and linked to the kernels.
--lean: a folder with one folder for each version, holding the unpacked wheels tensorrt-lean-cu13-libs and
    tensorrt-lean-cu13-bindings: TensorRT's own plugin registry, which needs no GPU.

--model: model folders after `odtrt convert`, to build besides a small made-up network. Recorded with
    out/parts, and with out/parts_dynamic, from `odtrt export models/parts --batch dynamic` and convert.

Where TensorRT-RTX is installed, plans are built with the plugin too (no GPU is needed). What is not there is
named and left out; without --headers nothing can be compiled, and nothing is written. Not installed and not
committed: the headers and the lean runtimes. They are NVIDIA's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import spec_cases
from onnx import TensorProto, helper, numpy_helper

from odtrt_lib import engine, fuse
from odtrt_lib.anchors import load_anchors
from odtrt_lib.engine.half import half_precision
from odtrt_lib.results import write_results
from odtrt_lib.spec import DetectorSpec, NmsSpec, load_spec

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "plugins" / "tensorrt"
RESULTS = ROOT / "results" / "plugin_matrix.json"
MARKS = ("<!-- benchmarks/plugin_matrix.py writes from here -->", "<!-- to here -->")
COMMAND = "python benchmarks/plugin_matrix.py --headers DIR --lean DIR --model out/parts out/parts_dynamic"
# The oldest and the newest headers of the IPluginV3 face: what they make must serve every TensorRT since 10.
_V3 = 10


def compile_kernels(folder: Path) -> list[Path]:
    """Builds the kernels as CMake does, for one GPU architecture; their object files."""
    settings = ["-DCMAKE_CUDA_ARCHITECTURES=87", "-DTENSORRT_INCLUDE_DIR="]
    _run(["cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), *settings])
    _run(["cmake", "--build", str(folder), "--target", "odtrt_kernels"])
    return sorted(folder.rglob("odtrt_kernels.dir/**/*.o"))


def compile_plugin(headers: Path, kernels: list[Path], library: Path) -> dict[str, Any]:
    """One row: the plugin compiled with these headers and linked to the kernels, as ``library``."""
    object_file = library.with_suffix(".o")
    compiled = subprocess.run(
        [
            *(os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC"),
            *("-fvisibility=hidden", "-isystem", str(headers), "-isystem", str(cuda_folder() / "include")),
            *("-c", str(PLUGIN / "odtrt_detect.cpp"), "-o", str(object_file)),
        ],
        capture_output=True,
        text=True,
    )
    row: dict[str, Any] = {
        "check": "compile",
        "headers": headers.name,
        "headers_version": ".".join(map(str, header_version(headers))),
        "interface": "IPluginV3" if header_version(headers)[0] >= _V3 else "IPluginV2DynamicExt",
        "compiles": compiled.returncode == 0,
        "warnings": len(re.findall(r"warning:", compiled.stderr)),
        "links": False,
    }
    if compiled.returncode != 0:
        print(compiled.stderr, file=sys.stderr)
        return row
    linked = subprocess.run(
        [
            *(
                os.environ.get("CXX", "c++"),
                "-shared",
                str(object_file),
                *map(str, kernels),
                "-o",
                str(library),
            ),
            *(f"-Wl,--version-script={PLUGIN / 'exports.map'}", "-Wl,--no-undefined"),
            *(f"-L{cuda_folder() / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-pthread"),
        ],
        capture_output=True,
        text=True,
    )
    row["links"] = linked.returncode == 0
    if linked.returncode != 0:
        print(linked.stderr, file=sys.stderr)
        return row
    row["exports"] = " ".join(exported_functions(library))
    row["links_to_libnvinfer"] = any("nvinfer" in name for name in needed_libraries(library))
    return row


def exported_functions(library: Path) -> list[str]:
    """The functions that a shared library offers."""
    listed = _run(["nm", "-D", "--defined-only", str(library)])
    return sorted(line.split()[-1] for line in listed.splitlines() if line.split()[-2:-1] == ["T"])


def needed_libraries(library: Path) -> list[str]:
    """The shared libraries that a shared library is linked to."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", _run(["readelf", "-d", str(library)]))


def header_version(headers: Path) -> tuple[int, ...]:
    """(major, minor, patch) in NvInferVersion.h."""
    text = (headers / "NvInferVersion.h").read_text(encoding="utf-8")
    return tuple(
        int(re.search(rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)", text).group(1))  # type: ignore[union-attr]
        for part in ("MAJOR", "MINOR", "PATCH")
    )


def probe(*arguments: str) -> dict[str, Any]:
    """What benchmarks/plugin_probe.py finds, or ``{"died": its exit status}``."""
    answer = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "plugin_probe.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if answer.returncode != 0:
        print(answer.stderr, file=sys.stderr)
        return {"died": answer.returncode}
    return json.loads(answer.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def registry_row(built_with: str, found: dict[str, Any]) -> dict[str, Any]:
    """One row of what a plugin registry did with a library."""
    row = {"check": "registry", "built_with": built_with, **found}
    row["fields"] = len(found.get("fields", ()))
    return row


def small_spec(batch: int | None = 1, is_padded: bool = False) -> DetectorSpec:
    """A detector with 256 anchors on 16 x 16 pixels."""
    resizer = spec_cases.padded(16) if is_padded else spec_cases.STRETCHED
    return spec_cases.example(
        spec_cases.ssd(256, 2, True),
        NmsSpec(0.3, 0.6, 20, 40, False, True),
        spec_cases.network_input(16, 16, resizer, batch=batch),
        name="small",
        labels=spec_cases.named("a", "b"),
    )


def small_anchors(spec: DetectorSpec) -> np.ndarray:
    """float32 [num_anchors, 4]."""
    return np.random.default_rng(0).uniform(0.1, 0.9, (spec.heads.num_anchors, 4)).astype(np.float32)


def small_heads(spec: DetectorSpec) -> onnx.ModelProto:
    """What ``heads.onnx`` is for :func:`small_spec`: three convolutions with random weights."""
    rng = np.random.default_rng(0)
    batch = "batch" if spec.input.batch is None else spec.input.batch
    sizes = {"stem": (64, 3, 3, 3), "box_encodings": (4, 64, 1, 1), "class_logits": (3, 64, 1, 1)}
    constants = [
        numpy_helper.from_array(rng.normal(0, 0.1, size).astype(np.float32), f"{name}/kernel")
        for name, size in sizes.items()
    ]
    nodes = [helper.make_node("Conv", ["image", "stem/kernel"], ["stem"], "stem", pads=[1] * 4)]
    outputs = []
    for head in ("box_encodings", "class_logits"):
        columns = sizes[head][0]
        shape = [batch, spec.heads.num_anchors, columns]
        constants.append(numpy_helper.from_array(np.array([0, -1, columns]), f"{head}/shape"))
        steps = [f"{head}/{step}" for step in ("conv", "last")] + [head]
        nodes += [
            helper.make_node("Conv", ["stem", f"{head}/kernel"], steps[:1], steps[0]),
            helper.make_node("Transpose", steps[:1], steps[1:2], steps[1], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [steps[1], f"{head}/shape"], [head], head),
        ]
        outputs.append(helper.make_tensor_value_info(head, TensorProto.FLOAT, shape))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 16, 16])
    graph = helper.make_graph(nodes, "heads", [image], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def detectors(folder: Path, converted: Sequence[Path]) -> dict[tuple[str, str, str], Path]:
    """``detector.onnx`` of the small network and of those ``converted``, by network, precision and batch."""
    specs = {
        "1": small_spec(),
        "dynamic": small_spec(batch=None),
        "dynamic, clip_windows": small_spec(batch=None, is_padded=True),
    }
    networks = [
        ("small", batch, small_heads(spec), spec, small_anchors(spec)) for batch, spec in specs.items()
    ]
    for model in converted:
        spec = load_spec(model / "spec.json")
        batch = "dynamic" if spec.input.batch is None else str(spec.input.batch)
        anchors = load_anchors(model / "anchors.npy", spec)
        networks.append((spec.name, batch, onnx.load(model / "heads.onnx"), spec, anchors))
    models = {}
    for name, batch, heads, spec, anchors in networks:
        for precision in engine.PRECISIONS:
            detector = fuse.with_plugin(heads, spec, anchors)
            path = folder / f"{len(models)}.onnx"
            onnx.save(half_precision(detector) if precision == "fp16" else detector, path)
            models[name, precision, batch] = path
    return models


def build_row(built_with: str, model: tuple[str, str, str], found: dict[str, Any]) -> dict[str, Any]:
    """One row of what TensorRT-RTX made of ``detector.onnx``; model: network, precision and batch."""
    settings = dict(zip(("network", "precision", "batch"), model, strict=True))
    row = {"check": "build", "built_with": built_with, **settings, **found}
    row["plugin_inputs"] = " ".join(found.get("plugin_inputs", ()))
    row["outputs"] = " ".join(found.get("outputs", ()))
    row["messages"] = len(found.get("messages", ()))
    return row


def tables(rows: list[dict[str, Any]]) -> str:
    """The recorded rows as Markdown, for plugins/README.md."""
    yes = {True: "yes", False: "no"}
    lines = ["| headers | interface | compiles, warnings | links | exports |", "|---|---|---|---|---|"]
    for row in rows:
        if row["check"] == "compile":
            compiles = f"{yes[row['compiles']]}, {row['warnings']}"
            exports = row.get("exports") or "registers itself"
            cells = (row["headers_version"], row["interface"], compiles, yes[row["links"]], exports)
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| registry | built with | loads | plugin made | taken out |", "|---|---|---|---|---|"]
    for row in rows:
        if row["check"] == "registry":
            answers = (yes[row.get(key, False)] for key in ("loads", "plugin_made", "taken_out"))
            runtime = f"{row.get('runtime', 'died')} {row.get('version', '')}"
            lines.append(f"| {runtime} | {row['built_with']} | {' | '.join(answers)} |")
    lines += ["", "| network | precision | batch | built with | plan | bytes |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["check"] == "build":
            settings = " | ".join(row[key] for key in ("network", "precision", "batch", "built_with"))
            lines.append(f"| {settings} | {yes[row.get('builds', False)]} | {row.get('plan_bytes', 0)} |")
    return "\n".join(lines) + "\n"


def write_tables(readme: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces what is between the two marks of ``readme``."""
    text = readme.read_text(encoding="utf-8")
    head, tail = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    readme.write_text(f"{head}{MARKS[0]}\n{tables(rows)}{MARKS[1]}{tail}", encoding="utf-8")


def cuda_folder() -> Path:
    """Where nvcc's toolkit is: its headers and libcudart_static."""
    compiler = shutil.which("nvcc")
    default = Path("/usr/local/cuda")
    if (default / "include" / "cuda_runtime_api.h").is_file() or compiler is None:
        return default
    return Path(compiler).resolve().parent.parent


def _run(command: list[str]) -> str:
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise SystemExit(
            f"error: {' '.join(command)} failed:\n{answer.stdout[-2000:]}{answer.stderr[-4000:]}"
        )
    return answer.stdout


def _versions(folder: Path | None, what: str, option: str) -> list[Path]:
    if folder is None or not folder.is_dir():
        print(f"left out: {what} (name their folder with {option})")
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and path.name[:1].isdigit()]
    return sorted(found, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--headers", type=Path)
    parser.add_argument("--lean", type=Path)
    parser.add_argument("--model", type=Path, nargs="+", default=[])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    versions = _versions(arguments.headers, "compiling with TensorRT's headers", "--headers")
    if not versions:
        raise SystemExit("error: no TensorRT headers, so there is no plugin to check: nothing was written")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kernels = compile_kernels(folder / "kernels")
        libraries = {}
        for headers in versions:
            library = folder / headers.name / "libodtrt_tensorrt.so"
            library.parent.mkdir()
            rows.append(compile_plugin(headers, kernels, library))
            print(rows[-1])
            if rows[-1]["links"] and header_version(headers)[0] >= _V3:
                libraries[headers.name] = library
        ends = {name: libraries[name] for name in (list(libraries)[:1] + list(libraries)[-1:])}
        runtimes = [
            ("tensorrt_lean_bindings", [str(path)])
            for path in _versions(arguments.lean, "the registries of tensorrt-lean", "--lean")
        ]
        has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
        if has_rtx:
            runtimes.append(("tensorrt_rtx", []))
        else:
            print("left out: TensorRT-RTX (pip install -e '.[engine]')")
        for name, library in ends.items():
            for module, site in runtimes:
                rows.append(registry_row(name, probe("registry", module, str(library), *site)))
                print(rows[-1])
        models = detectors(folder, arguments.model) if has_rtx else {}
        for name, library in ends.items():
            for settings, model in models.items():
                rows.append(build_row(name, settings, probe("build", str(library), str(model))))
                print(rows[-1])
    write_results(arguments.output, "plugin_matrix", COMMAND, rows)
    if arguments.output == RESULTS:
        write_tables(ROOT / "plugins" / "README.md", rows)


if __name__ == "__main__":
    main()
