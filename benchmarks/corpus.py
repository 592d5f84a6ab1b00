"""Converts every SSD and EfficientDet of the corpus with `odtrt run` and records what it took.

    python benchmarks/corpus.py            writes results/corpus.cpu.json

The corpus is the folder that ODTRT_CORPUS names. Its configs without weights, and an EfficientDet-D1 640
derived from its D0, get random weights (batch norm calibrated): sizes and times are the real ones, the
outputs mean nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from odtrt_lib.errors import UnsupportedError
from odtrt_lib.export import odapi
from odtrt_lib.export.pipeline import read_pipeline
from odtrt_lib.folder import last_record
from odtrt_lib.results import write_results
from odtrt_lib.spec import load_spec

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = {"coco_ssd_mnv1": "trained", "ft_fpnlite320_tfjs1": "trained"}
D1_FROM_D0 = (
    ("efficientnet-b0", "efficientnet-b1"),
    (r"(min|max)_dimension: 512", r"\1_dimension: 640"),
    ("num_iterations: 3", "num_iterations: 4"),
    ("num_filters: 64", "num_filters: 88"),
    (r"\bdepth: 64", "depth: 88"),
)


def main() -> None:
    odapi.regenerate_protos()
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    with tempfile.TemporaryDirectory() as work:
        sources = with_weights(corpus) | with_random_weights(corpus, Path(work))
        rows = [measure(name, source, weights, Path(work)) for name, (source, weights) in sources.items()]
    write_results(ROOT / "results" / "corpus.cpu.json", "corpus", "python benchmarks/corpus.py", rows)


def with_weights(corpus: Path) -> dict[str, tuple[Path, str]]:
    folders = sorted(path.parent for path in corpus.glob("*/pipeline.config"))
    return {folder.name: (folder, WEIGHTS.get(folder.name, "synthetic")) for folder in folders}


def with_random_weights(corpus: Path, work: Path) -> dict[str, tuple[Path, str]]:
    configs = {path.stem: path.read_text() for path in sorted((corpus / "configs").glob("*.config"))}
    d1 = (corpus / "zoo_efficientdet_d0" / "pipeline.config").read_text()
    for pattern, replacement in D1_FROM_D0:
        d1, count = re.subn(pattern, replacement, d1)
        assert count, pattern
    configs["efficientdet_d1_640"] = d1
    sources = {}
    for name, text in configs.items():
        folder = work / "models" / name
        folder.mkdir(parents=True)
        (folder / "pipeline.config").write_text(text)
        try:
            read_pipeline(folder / "pipeline.config")
        except UnsupportedError as error:
            print(f"{name}: left out: {error}")
            continue
        make = "import sys; from odtrt_lib.export.odapi import write_random_checkpoint as w; w(*sys.argv[1:])"
        subprocess.run(
            [sys.executable, "-c", make, folder / "pipeline.config", folder / "checkpoint"],
            check=True,
            capture_output=True,
        )
        sources[name] = (folder, "random")
    return sources


def measure(name: str, source: Path, weights: str, work: Path) -> dict[str, object]:
    folder = work / "out" / name
    odtrt = [sys.executable, "-m", "odtrt_lib"]
    started = time.perf_counter()
    subprocess.run([*odtrt, "run", source, "--output", folder], check=True)
    wall = time.perf_counter() - started
    fp32 = last_record(folder, "engine")
    subprocess.run([*odtrt, "build", folder, "--precision", "fp16"], check=True)
    fp16 = last_record(folder, "engine")
    export, convert = last_record(folder, "export"), last_record(folder, "convert")
    assert export and convert and fp32 and fp16
    spec = load_spec(folder / "spec.json")
    parity = convert["checks"]["parity"]
    row = {
        "model": name,
        "feature_extractor": spec.source.feature_extractor,
        "weights": weights,
        "height": spec.input.height,
        "width": spec.input.width,
        "classes": spec.heads.num_classes,
        "anchors": spec.heads.num_anchors,
        "run_wall_seconds": round(wall, 1),
        "export_seconds": export["seconds"],
        "convert_seconds": convert["seconds"],
        "build_fp32_seconds": fp32["seconds"],
        "build_fp16_seconds": fp16["seconds"],
        "peak_rss_mb": max(record["peak_rss_mb"] for record in (export, convert, fp32)),
        "frozen_mb": megabytes(folder / "frozen.pb"),
        "onnx_mb": megabytes(folder / "heads.onnx"),
        "plan_fp32_mb": plan_megabytes(folder, fp32),
        "plan_fp16_mb": plan_megabytes(folder, fp16),
        "onnx_nodes": convert["checks"]["nodes"],
        "transposes": convert["checks"]["transposes"],
        "resizes": len(convert["checks"]["resizes"]),
        "frozen_vs_eager_max_abs_err": export["checks"]["frozen_vs_eager_max_abs_err"],
        "onnx_boxes_max_abs_err": parity["box_encodings"]["max_abs_err"],
        "onnx_boxes_max_err_in_std": parity["box_encodings"]["max_relative_err"],
        "onnx_logits_max_abs_err": parity["class_logits"]["max_abs_err"],
        "onnx_logits_max_err_in_std": parity["class_logits"]["max_relative_err"],
    }
    shutil.rmtree(folder)
    return row


def plan_megabytes(folder: Path, record: dict[str, dict[str, str]]) -> float:
    return megabytes(folder / next(name for name in record["outputs"] if name.endswith(".plan")))


def megabytes(path: Path) -> float:
    return round(path.stat().st_size / 1e6, 2)


if __name__ == "__main__":
    main()
