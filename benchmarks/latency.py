"""ONNX Runtime on this CPU: from a frame in memory to its detections, and what surrounds the network.

    python benchmarks/latency.py [FOLDER...]

writes results/latency.cpu.json. FOLDER: a model folder after `odtrt convert`; default: all in ``out/``. The
machine must be idle. A row is one detector; its frames are rendered scenes, 768 x 1024 pixels, uint8 in
memory.

* ``detect_*``: the whole frame, without a recorder. ``recorded_*``: the same with one, in turns.
* ``preprocess_*``, ``engine_*``, ``postprocess_*``, ``unexplained_*``: the steps of the recorded frames, and
  their shares of all of these frames. ``around_share``: of preprocessing and post-processing.
* ``avoidable``: what ``odtrt profile`` says of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from odtrt_lib import native
from odtrt_lib.detector import Detector
from odtrt_lib.latency.profile import profile, sentence, table
from odtrt_lib.results import write_results
from odtrt_lib.scenes import TEST_SEEDS, render_scene
from odtrt_lib.sources import Source

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH, SCENES = 768, 1024, 7
MAX_AROUND_SHARE = 0.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--frames", type=int, default=1000)
    arguments = parser.parse_args()
    folders = arguments.folders or sorted(one.parent for one in ROOT.glob("out/*/heads.onnx"))
    if not folders:
        sys.exit("no model folder in out/: run `odtrt run models/parts`")
    if native.load() is None:
        sys.exit("the native library is not built: run `make plugin`")
    images = [render_scene(seed, HEIGHT, WIDTH).image for seed in TEST_SEEDS[:SCENES]]

    def open_source() -> Source:
        remaining = iter(images)
        return Source("rendered scenes", lambda: next(remaining, None))

    rows = []
    for folder in folders:
        with Detector.open(folder, "onnxruntime") as detector:
            found = profile(detector, open_source, frames=arguments.frames, draws=False)
            rows.append(row_of(folder.name, detector, found))
        print(rows[-1], flush=True)
    write_results(
        ROOT / "results" / "latency.cpu.json", "latency", "python benchmarks/latency.py [FOLDER...]", rows
    )
    return 0 if all(row["around_share"] <= MAX_AROUND_SHARE for row in rows) else 1


def row_of(name: str, detector: Detector, found: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": name,
        "runtime": detector.status.description,
        "image_height": HEIGHT,
        "image_width": WIDTH,
        "input_height": detector.spec.input.height,
        "input_width": detector.spec.input.width,
        **found.plain.row("detect_"),
        **found.frame.row("recorded_"),
        "jitter_us": float(f"{found.jitter_us:.4g}"),
    }
    around = 0.0
    for one in table(found.frames):
        if one.step != "capture":
            row[f"{one.step}_p50_us"] = float(f"{one.timing.p50_us:.4g}")
            row[f"{one.step}_p99_us"] = float(f"{one.timing.p99_us:.4g}")
            row[f"{one.step}_share"] = round(one.share, 4)
        around += one.share if one.step in ("preprocess", "postprocess") else 0.0
    return {**row, "around_share": round(around, 4), "avoidable": sentence(found)}


if __name__ == "__main__":
    sys.exit(main())
