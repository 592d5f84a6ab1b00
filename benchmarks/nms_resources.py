"""What the CUDA kernels ask of a Jetson Orin (sm_87), and what its memory alone makes them cost at least.

    python benchmarks/nms_resources.py      writes results/nms_resources.json; needs nvcc, no GPU

``what: kernel``: registers, static shared memory, stack and spills of each kernel, as ptxas reports them
for sm_87, and for sm_90 of those that need clusters of blocks; shared memory that a launch asks for comes on
top. A kernel that exists for several types has one row for each: input type, score converter, and for
select_candidates whether it looks at an anchor's pairs one by one.

``what: roofline``: logits bytes of one image over the board's memory bandwidth. An ESTIMATE and a lower
bound: no kernel was run on a Jetson. Bandwidths are NVIDIA's data sheet figures, which no program
reaches.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from odtrt_lib.results import write_results

ROOT = Path(__file__).resolve().parents[1]

KERNELS = ROOT / "plugins" / "kernels"
SOURCES = ("postprocess.cu", "nms.cu", "preprocess.cu")
ARCHITECTURE, WITH_CLUSTERS = "sm_87", "sm_90"
NEED_CLUSTERS = ("select_candidates", "suppress_in_cluster")
CONVERTERS = ("sigmoid", "softmax", "identity")  # odtrt_score_converter
BOARDS = {"Orin AGX": 204.8, "Orin NX": 102.4, "Orin Nano 8GB": 68.0}  # GB/s, memory
NETWORKS = {
    "shipped detector 320": (12804, 7),
    "SSD 300": (1917, 91),
    "SSD FPNLite 320": (12804, 91),
    "SSD FPNLite 640": (51150, 91),
    "EfficientDet-D0 512": (49104, 90),
    "EfficientDet-D1 640": (76725, 90),
    "EfficientDet-D4 1024": (196416, 90),
}
DTYPES = {"float32": 4, "float16": 2}
DTYPE_NAMES = {"float": "float32", "__half": "float16"}


def main() -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        sys.exit("nvcc not found: install the CUDA toolkit, or add its bin folder to PATH")
    rows = [
        *(row for source in SOURCES for row in kernels(nvcc, source, ARCHITECTURE)),
        *kernels(nvcc, "postprocess.cu", WITH_CLUSTERS),
        *roofline(),
    ]
    write_results(
        ROOT / "results" / "nms_resources.json",
        "nms_resources",
        "python benchmarks/nms_resources.py",
        rows,
    )


def kernels(nvcc: str, source: str, architecture: str) -> Iterator[dict[str, Any]]:
    release = re.search(r"release (\S+),", answer(nvcc, "--version"))
    compiler = f"nvcc {release.group(1)}" if release else "nvcc"
    with tempfile.TemporaryDirectory() as folder:
        report = answer(
            nvcc, f"-arch={architecture}", "-std=c++17", "-O3", "-Xptxas", "-v", "-c", str(KERNELS / source),
            "-o", f"{folder}/kernels.o",
        )  # fmt: skip
    entries = re.split(r"Compiling entry function '", report)[1:]
    if not entries:
        sys.exit(f"{source}: ptxas names no kernel:\n{report}")
    for entry in sorted(entries):
        found = figures(entry)
        if (found["kernel"] in NEED_CLUSTERS) == (architecture == WITH_CLUSTERS):
            yield {
                "what": "kernel",
                "source": source,
                **found,
                "architecture": architecture,
                "compiler": compiler,
            }


def figures(entry: str) -> dict[str, Any]:
    """The figures of one kernel: ptxas' lines, from its mangled name on."""

    def number(pattern: str) -> int:
        found = re.search(pattern, entry)
        return int(found.group(1)) if found else 0

    name, variant = readable(entry.split("'", 1)[0])
    return {
        "kernel": name,
        "variant": variant,
        "registers": number(r"Used (\d+) registers"),
        "shared_bytes": number(r"(\d+) bytes smem"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "spill_store_bytes": number(r"(\d+) bytes spill stores"),
        "spill_load_bytes": number(r"(\d+) bytes spill loads"),
    }


def readable(mangled: str) -> tuple[str, str]:
    """A kernel's name and its template arguments in words."""
    text = answer("c++filt", mangled).strip()
    found = re.search(r"(\w+)(?:<(.*?)>)?\(", text.replace("(anonymous namespace)::", ""))
    if found is None:
        return text, ""
    arguments = [argument.strip() for argument in (found.group(2) or "").split(",") if argument.strip()]
    words = [DTYPE_NAMES.get(argument, argument) for argument in arguments]
    if len(words) > 1 and words[1].strip("(int)").isdigit():  # <type, converter, ...>
        words[1] = CONVERTERS[int(words[1].strip("(int)"))]
    words = [
        {"true": "pair by pair", "false": "by anchors"}.get(word.removeprefix("(bool)"), word)
        for word in words
    ]
    return found.group(1), ", ".join(words)


def answer(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def roofline() -> Iterator[dict[str, Any]]:
    for network, (anchors, columns) in NETWORKS.items():
        for dtype, size in DTYPES.items():
            logits = anchors * columns * size
            yield {
                "what": "roofline",
                "is_estimate": True,
                "network": network,
                "anchors": anchors,
                "columns": columns,
                "dtype": dtype,
                "bytes": logits,
                **{
                    f"{board.lower().replace(' ', '_')}_floor_us": round(logits / bandwidth / 1e3, 1)
                    for board, bandwidth in BOARDS.items()
                },
            }


if __name__ == "__main__":
    main()
