"""Builds plans by TensorRT-RTX on the CPU and records what each took.

    python benchmarks/engine.py                 writes results/engine.cpu.json; about six minutes, and ten
                                                more the first time, for the models
    python benchmarks/engine.py record FOLDER   writes what benchmarks/engine_gpu.py needs into FOLDER

The models are those of the corpus (the folder that ODTRT_CORPUS names) and others derived from their
configs: weights that were not trained mean nothing for the outputs, but the sizes and times are real. For a
GPU the repository's own detector is there too, at two sizes: its weights were trained at 320 x 320, and as
the network has convolutions only, they find the same parts at 640 x 640. The models are kept in out/engine/.
Rows by ``kind``:

* ``build``: a plan without a limit. ``seconds`` is the median of three builds, ``peak_rss_mb`` the largest
  peak of the building process; for fp16 ``conversion_peak_rss_mb`` is that of the process that writes half
  precision into the ONNX.
* ``setting``: the same with one setting of the fallback alone: what lowers the peak, and what does not.
* ``sample``: resident memory over the attempts of the first fallback.
* ``fallback``: one row a step, under a limit that the first steps exceed. ``limit_mb`` is the peak without
  a limit less the share that the row's ``case`` names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from corpus import D1_FROM_D0

from odtrt_lib import engine
from odtrt_lib.engine import fallback, passport
from odtrt_lib.errors import BuildError
from odtrt_lib.folder import seal
from odtrt_lib.preprocess import preprocess
from odtrt_lib.results import write_results
from odtrt_lib.scenes import TEST_SEEDS, render_scene
from odtrt_lib.spec import DetectorSpec

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "out" / "engine"
RESULTS = ROOT / "results" / "engine.cpu.json"
REPEATS = 3
SAMPLES = 60
RECORDED_ANCHORS = 4096
TO_640 = (("height: 320", "height: 640"), ("width: 320", "width: 640"))
TO_1024 = ((r"(min|max)_dimension: 640", r"\1_dimension: 1024"),)
SSD, D0 = "zoo_ssd_mobilenet_v2_fpnlite_320", "zoo_efficientdet_d0"
# name: where the weights come from. "synthetic" ones satisfy the zoo checkpoint's layout.
WEIGHTS = {
    "ssd_mobilenet_v2_fpnlite_320": "synthetic",
    "ssd_mobilenet_v2_fpnlite_640": "synthetic",
    "ssd_mobilenet_v1_300": "trained",
    "efficientdet_d0_512": "synthetic",
    "efficientdet_d1_640": "random",
    "efficientdet_d1_1024": "random",
    "ssd_resnet50_fpn_640": "random",
}
# Recorded for a GPU: the repository's own detector too. At 640 both are there, because the contrast is the
# lesson: the synthetic weights enlarge rounding so much that TF32 and FP16 fail, and so does ONNX Runtime in
# half precision; with trained weights an SSD MobileNet of the same kind passes.
PARTS, PARTS_640 = (f"ssd_mobilenet_v2_fpnlite_{side}_parts" for side in (320, 640))
CARPARTS = "efficientdet_d1_640_carparts"  # somebody's fine-tuned D1: its layout, synthetic values
RECORDED = {**WEIGHTS, PARTS: "trained", PARTS_640: "trained", CARPARTS: "synthetic"}
# What the limit takes off the peak without one, and what a build may change.
LADDERS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("efficientdet_d0_512", 0.04, ()),
    ("efficientdet_d1_1024", 0.06, ()),
    ("ssd_resnet50_fpn_640", 0.25, ("fp32",)),
)


def main(arguments: list[str]) -> None:
    """What the module says."""
    corpus = Path(os.environ.get("ODTRT_CORPUS", ROOT.parent / "shared" / "corpus"))
    if arguments[:1] == ["record"]:
        prepare(corpus, RECORDED)
        record(Path(arguments[1]))
        return
    prepare(corpus, WEIGHTS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for name in WEIGHTS:
            for precision in engine.PRECISIONS:
                rows.append(build_row(name, precision, Path(work)))
                print(rows[-1], flush=True)
        for name in dict.fromkeys(name for name, _, _ in LADDERS):
            rows += setting_rows(name, Path(work))
        for name, share, allow in LADDERS:
            has_samples = not any(row["kind"] == "sample" for row in rows)
            rows += fallback_rows(name, share, allow, Path(work), rows, has_samples)
    write_results(RESULTS, "engine", "python benchmarks/engine.py", rows)


def prepare(corpus: Path, names: Iterable[str]) -> None:
    """Exports and converts every model that is not there yet."""
    for name in names:
        folder = MODELS / name
        if (folder / "heads.onnx").is_file():
            continue
        with tempfile.TemporaryDirectory() as work:
            source, pipeline = sources(corpus, name, Path(work))
            chosen = [] if pipeline is None else ["--pipeline", str(pipeline)]
            odtrt = [sys.executable, "-m", "odtrt_lib"]
            subprocess.run([*odtrt, "export", str(source), "--output", str(folder), *chosen], check=True)
            subprocess.run([*odtrt, "convert", str(folder)], check=True)
        (folder / "frozen.pb").unlink()


def sources(corpus: Path, name: str, work: Path) -> tuple[Path, Path | None]:
    """A checkpoint's folder, and the pipeline.config to use instead of its own."""
    ssd, d0 = (corpus / folder for folder in (SSD, D0))
    d1 = edited((d0 / "pipeline.config").read_text(), D1_FROM_D0)
    as_they_are = {
        "ssd_mobilenet_v2_fpnlite_320": ssd,
        "ssd_mobilenet_v1_300": corpus / "coco_ssd_mnv1",
        "efficientdet_d0_512": d0,
        PARTS: ROOT / "models" / "parts",
        CARPARTS: corpus / "ft_effd1_carparts18",
    }
    if name in as_they_are:
        return as_they_are[name], None
    at_640 = {"ssd_mobilenet_v2_fpnlite_640": ssd, PARTS_640: ROOT / "models" / "parts"}
    if name in at_640:
        text = edited((at_640[name] / "pipeline.config").read_text(), TO_640)
        (work / "pipeline.config").write_text(text)
        return at_640[name], work / "pipeline.config"
    (r50,) = (corpus / "configs").glob("*ssd_resnet50*640x640*.config")
    text = {
        "efficientdet_d1_640": d1,
        "efficientdet_d1_1024": edited(d1, TO_1024),
        "ssd_resnet50_fpn_640": r50.read_text(),
    }[name]
    (work / "pipeline.config").write_text(text)
    make = "import sys; from odtrt_lib.export.odapi import write_random_checkpoint as w; w(*sys.argv[1:])"
    command = [sys.executable, "-c", make, work / "pipeline.config", work / "checkpoint"]
    subprocess.run(command, check=True, capture_output=True)
    return work, None


def edited(text: str, changes: tuple[tuple[str, str], ...]) -> str:
    """``text`` after the changes, each of which must apply."""
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text)
        assert count, pattern
    return text


@contextlib.contextmanager
def model_folder(name: str, work: Path) -> Iterator[Path]:
    """A copy of a model folder without plans."""
    folder = work / name
    folder.mkdir(parents=True)
    for file in ("heads.onnx", "spec.json", "anchors.npy"):
        shutil.copy(MODELS / name / file, folder / file)
    seal(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def build_row(name: str, precision: str, work: Path) -> dict[str, Any]:
    """A plan without a limit."""
    with model_folder(name, work) as folder:
        records = [engine.build(folder, precision=precision, force=True).record for _ in range(REPEATS)]
        (found,) = passport.passports(folder)
        sizes = {passport.plan_version(folder / "plans" / found.plan): found.plan_bytes}
        checks = records[-1]["checks"]
        return {
            "kind": "build",
            "model": name,
            "weights": WEIGHTS[name],
            "precision": precision,
            "seconds": round(statistics.median(one["seconds"] for one in records), 2),
            "peak_rss_mb": found.attempts[-1]["peak_rss_mb"],
            "conversion_peak_rss_mb": found.attempts[0]["peak_rss_mb"] if len(found.attempts) > 1 else None,
            "onnx_mb": round((folder / "heads.onnx").stat().st_size / 1e6, 2),
            "plan_mb": round(found.plan_bytes / 1e6, 2),
            "plan_version": next(iter(sizes)),
            "layers": checks["layers"],
            "layers_fp32": found.layers.get("fp32", 0),
            "layers_fp16": found.layers.get("fp16", 0),
            "layers_counted_in": checks["layers_counted_in"],
            "timing_cache": found.settings["timing_cache"].partition(":")[0],
        }


def setting_rows(name: str, work: Path) -> list[dict[str, Any]]:
    """Each setting of the fallback alone."""
    rows = []
    whole = fallback.FALLBACK
    for step in (one for one in whole if one.allowance is None):
        with model_folder(name, work) as folder:
            fallback.FALLBACK = (step,)
            try:
                engine.build(folder)
            finally:
                fallback.FALLBACK = whole
            (found,) = passport.passports(folder)
        rows.append(
            {
                "kind": "setting",
                "model": name,
                "precision": "fp32",
                "setting": step.name,
                "seconds": found.attempts[-1]["seconds"],
                "peak_rss_mb": found.attempts[-1]["peak_rss_mb"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def fallback_rows(
    name: str,
    share: float,
    allow: tuple[str, ...],
    work: Path,
    rows: list[dict[str, Any]],
    has_samples: bool,
) -> list[dict[str, Any]]:
    """The fallback under a limit of the peak without a limit less ``share`` of it."""
    free = next(row for row in rows if (row["kind"], row["model"]) == ("build", name))
    limit = int(free["peak_rss_mb"] * (1 - share))
    attempts: list[dict[str, Any]] = []
    with model_folder(name, work) as folder:
        try:
            engine.build(folder, memory=f"{limit}MiB", allow=allow)
            attempts += passport.passports(folder)[0].attempts
        except BuildError as error:
            pattern = r"([a-z][a-zA-Z ]+): ([^;]*?) \(peak (\d+) MiB\)"
            for step, outcome, peak in re.findall(pattern, str(error)):
                attempts.append(
                    {"name": step, "outcome": outcome, "seconds": None, "peak_rss_mb": float(peak)}
                )
    made = [
        {
            "kind": "fallback",
            "case": f"{name} less {share:.0%}" + ", allowed: ".join(["", *allow]),
            "model": name,
            "precision": "fp16" if "half precision" in attempt["name"] else "fp32",
            "allow": " ".join(allow),
            "limit_mb": limit,
            "number": number,
            "step": attempt["name"],
            "outcome": "built" if attempt["outcome"] == "built" else "out of memory",
            "how": attempt["outcome"].replace("out of memory: ", ""),
            "seconds": attempt["seconds"],
            "peak_rss_mb": attempt["peak_rss_mb"],
        }
        for number, attempt in enumerate(attempts, 1)
    ]
    for row in made:
        print(row, flush=True)
    if has_samples:
        for row, attempt in zip(list(made), attempts, strict=True):
            made += sample_rows(row, attempt.get("samples", []))
    return made


def sample_rows(row: dict[str, Any], samples: list[list[float]]) -> list[dict[str, Any]]:
    """The resident memory over one attempt; the first and the last sample are among those kept."""
    kept = {round(i) for i in np.linspace(0, len(samples) - 1, min(len(samples), SAMPLES))}
    chosen = [samples[i] for i in sorted(kept)]
    same = {key: row[key] for key in ("case", "model", "number", "step")}
    return [{"kind": "sample", **same, "seconds": seconds, "rss_mb": rss} for seconds, rss, _ in chosen]


def record(target: Path) -> None:
    """Every model folder in single and half precision, with an image and what ONNX Runtime makes of it.

    The image is noise in patches, for the parts at 640 x 640 a scene that the training has not seen. The
    heads are recorded for :data:`RECORDED_ANCHORS` anchors of each model, evenly spread; the detections
    are those of all heads. ``half_*``: how far ONNX Runtime's heads in half precision differ, as a share of
    the largest value.
    """
    import onnx

    from odtrt_lib.detector import Detector
    from odtrt_lib.nms import postprocess

    for name, weights in RECORDED.items():
        for precision in engine.PRECISIONS:
            folder = target / precision / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in ("spec.json", "anchors.npy"):
                shutil.copy(MODELS / name / file, folder / file)
            model = onnx.load(str(MODELS / name / "heads.onnx"))
            half = engine.half_precision(model) if precision == "fp16" else model
            onnx.save(half, str(folder / "heads.onnx"))
            seal(folder)
        single, half = (
            Detector.open(target / precision / name, "onnxruntime") for precision in engine.PRECISIONS
        )
        spec = single.spec
        image = scene(spec) if name == PARTS_640 else noise(spec)
        heads = single.backend.infer(image)
        errors = [
            np.abs(rounded - exact).max() / np.abs(exact).max()
            for rounded, exact in zip(half.backend.infer(image), heads, strict=True)
        ]
        found = postprocess(*heads, single.anchors, spec, np.array([[0, 0, 1, 1]], np.float32))
        count = found.num_detections[0]
        anchors = np.unique(np.linspace(0, spec.heads.num_anchors - 1, RECORDED_ANCHORS).astype(np.int64))
        for precision in engine.PRECISIONS:
            np.savez_compressed(
                target / precision / name / "reference.npz",
                weights=weights,
                image=image,
                anchors=anchors,
                box_encodings=heads[0][:, anchors],
                class_logits=heads[1][:, anchors],
                half_boxes_relative_err=errors[0],
                half_logits_relative_err=errors[1],
                boxes=found.boxes[0, :count],
                scores=found.scores[0, :count],
                classes=found.classes[0, :count],
            )
        print(f"{name}: recorded", flush=True)


def noise(spec: DetectorSpec) -> np.ndarray:
    """Patches of random colours, as the network takes them."""
    height, width = spec.input.height, spec.input.width
    coarse = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    cells = np.ones((1, 1, -(-height // 16), -(-width // 16)), np.float32)
    return np.ascontiguousarray(np.kron(coarse, cells)[:, :, :height, :width])


def scene(spec: DetectorSpec) -> np.ndarray:
    """The first test scene, rendered at the network's size, as the network takes it."""
    picture = render_scene(TEST_SEEDS[0], spec.input.height, spec.input.width).image
    return preprocess(picture, spec.input)[0][np.newaxis]


if __name__ == "__main__":
    main(sys.argv[1:])
