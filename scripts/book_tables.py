"""Writes the tables and figures of the book, book/_generated/*, from the measurements in results/*.json.

The README's table of times is written too, between its two marks.

    python scripts/book_tables.py            write them
    python scripts/book_tables.py check      exit 1, naming each table that is not current

A page includes a table by ``{include}``. Where its text repeats a measured figure, such as a small count,
that was written by hand and is not checked here. A table whose measurement is absent says so.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import book_plots
import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from odtrt_lib import boards, portability  # noqa: E402

Row = dict[str, Any]

README_MARKS = ("<!-- scripts/book_tables.py writes from here -->", "<!-- to here -->")
NO_BREAK_HYPHEN = "\u2011"
# Kernels' names today, for measurements that were made under older names.
RENAMED_KERNELS = {
    "postprocess.cu": {
        "find": "select_candidates",
        "settle": "suppress_in_cluster",
        "grade": "anchor_best_score",
        "gather": "compact_above",
        "mark": "build_iou_mask",
        "keep": "suppress",
    },
    "nms.cu": {"mark": "build_segment_mask", "mark_dead": "suppress_by_earlier", "keep": "suppress_segment"},
}


@dataclass(frozen=True)
class Column:
    """A column: its heading, the row's key, and how a figure is written (a format such as ``.3f``).

    is_optional: rows that lack the key show a dash; where all lack it, there is no such column. until: text
    ends before these characters.
    """

    heading: str
    key: str
    form: str = ""
    divisor: float = 1
    is_optional: bool = False
    until: str = ""


@dataclass(frozen=True)
class Table:
    """One generated file.

    claim: the measurement whose rows are shown, where a topic's file has several. only: key -> the values
    that a shown row has there. made: how the figures came about. names_packages: do these matter? library:
    the one whose version the rows have under ``version``.
    """

    results: str
    columns: tuple[Column, ...]
    claim: str = ""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    made: str = "Measured"
    names_packages: bool = True
    library: str = ""


TABLES = {
    "setup": Table(
        "first_light.cpu.json",
        (
            Column("command, in an empty clone", "command"),
            Column("minutes, downloads included", "wall_seconds", ".1f", 60),
            Column("processor, minutes", "cpu_seconds", ".1f", 60, is_optional=True),
            Column("disk afterwards, GB", "disk_mb", ".1f", 1000),
        ),
    ),
    "parts": Table(
        "parts.json",
        (
            Column("test scenes", "images", ","),
            Column("parts in them", "objects", ","),
            Column("mAP", "map", ".3f"),
            Column("AP at IoU 0.50", "ap50", ".3f"),
            Column("AP at IoU 0.75", "ap75", ".3f"),
        ),
    ),
    "corpus": Table(
        "corpus.cpu.json",
        (
            Column("model", "model"),
            Column("weights", "weights"),
            Column("anchors", "anchors", ","),
            Column("export, s", "export_seconds", ".0f"),
            Column("convert, s", "convert_seconds", ".0f"),
            Column("peak memory, MiB", "peak_rss_mb", ",.0f"),
            Column("ONNX nodes", "onnx_nodes", ","),
            Column("Resize nodes", "resizes"),
            Column("largest box difference, std", "onnx_boxes_max_err_in_std", ".1e"),
            Column("largest class difference, std", "onnx_logits_max_err_in_std", ".1e"),
        ),
    ),
    "noise": Table(
        "noise.cpu.json",
        (
            Column("model", "model"),
            Column("gate", "gate"),
            Column("defect", "defect"),
            Column("times the noise, at most 5", "times_noise", ",.1f", is_optional=True),
            Column("smallest change of a kernel that is seen", "sees_kernel_change", ".0e", is_optional=True),
            Column("verdict", "verdict"),
        ),
    ),
    "agreement": Table(
        "agreement.cpu.json",
        (
            Column("model", "model"),
            Column("detections of", "reference"),
            Column("looked for in those of", "compared"),
            Column("images", "images"),
            Column("how many", "references", ","),
            Column("found again", "matched", ","),
            Column("found again, IoU above 0.5", "matched_at_iou_half", ","),
            Column("extra", "extra"),
            Column("at the threshold or the list's end", "at_threshold_or_end_of_list", ","),
            Column("largest score difference", "max_score_difference", ".0e"),
        ),
    ),
    "preprocess": Table(
        "preprocess.cpu.json",
        (
            Column("image", "source"),
            Column("network input", "input"),
            Column("resizer", "resizer"),
            Column("normalisation", "normalisation"),
            Column("odtrt, compiled, ms", "native_p50_us", ".2f", 1000),
            Column("odtrt, NumPy and OpenCV, ms", "preprocess_p50_us", ".2f", 1000),
            Column("OpenCV and NumPy, ms", "cv2_p50_us", ".2f", 1000),
            Column("largest error, of the value range", "max_abs_err_vs_tf", ".0e"),
            Column("OpenCV's, on noise", "cv2_max_abs_err_vs_tf", ".2f"),
        ),
    ),
    "resize_rule": Table(
        "claims.cpu.json",
        (
            Column("TensorFlow function", "tensorflow"),
            Column("ONNX mode", "onnx_mode"),
            Column("largest error, of 255", "max_abs_err", ".1f"),
            Column("mean error, of 255", "mean_abs_err", ".2f"),
        ),
        claim="resize_rule",
    ),
    "graph": Table(
        "claims.cpu.json",
        (
            Column("made by", "route"),
            Column("operations", "operations", ","),
            Column("suppressions", "suppressions"),
            Column("loops", "loops"),
            Column("list operations", "tensor_lists"),
            Column("resizes", "resizes"),
        ),
        claim="graph",
    ),
    "opset": Table(
        "claims.cpu.json",
        (
            Column("opset", "opset"),
            Column("nodes", "nodes"),
            Column("every Resize agrees", "resizes_agree"),
            Column("largest difference from TensorFlow, std", "max_err_in_std", ".1e"),
            Column("root mean square, std", "rms_err_in_std", ".1e"),
        ),
        claim="opset",
    ),
    "runtime": Table(
        "claims.cpu.json",
        (Column("kind", "kind"), Column("name", "name"), Column("in this TensorRT-RTX", "present")),
        claim="runtime",
    ),
    "camera_resize": Table(
        "claims.cpu.json",
        (
            Column("camera image resized", "resized"),
            Column("mAP", "map", ".3f"),
            Column("AP at IoU 0.75", "map75", ".3f"),
            Column("boxes move right, px", "shift_right_px", "+.2f"),
            Column("boxes move down, px", "shift_down_px", "+.2f"),
        ),
        claim="camera_resize",
    ),
}

_DEVICE_TIMES = (
    Column("in a CUDA graph, µs", "graph_p50_us", ".1f", is_optional=True),
    Column("from a stream, µs", "p50_us", ".1f"),
    Column("99th percentile, µs", "p99_us", ".1f"),
)
_MODEL_AND_ARITHMETIC = (Column("model", "model"), Column("multiplies in", "arithmetic"))
_PLAN = (
    Column("form", "form", is_optional=True),
    Column("precision", "precision", is_optional=True),
    Column("multiplies in", "arithmetic", is_optional=True),
)
_ONE_IMAGE = {"what": ("postprocess",), "batch": (1,), "dtype": ("float32",)}

TABLES |= {
    "nms_rule": Table(
        "nms_rule.cpu.json",
        (
            Column("model", "model"),
            Column("of", "images_of"),
            Column("IoU", "iou_threshold"),
            Column("score above", "score_threshold", "g"),
            Column("kept, greedy", "kept", ","),
            Column("lost", "lost", ","),
            Column("lost, %", "lost_percent", ".1f"),
            Column("images", "images"),
            Column("changed", "images_changed"),
        ),
        only={"score_threshold": (0.3, 0.05)},
    ),
    "nms_rule_accuracy": Table(
        "nms_rule.cpu.json",
        (
            Column("model", "model"),
            Column("of", "images_of"),
            Column("IoU", "iou_threshold"),
            Column("score above", "score_threshold", "g"),
            Column("objects", "objects", ","),
            Column("found, greedy", "found_greedy", ","),
            Column("found, other", "found_rule", ","),
            Column("mAP, greedy", "map_greedy", ".4f"),
            Column("mAP, other", "map_rule", ".4f"),
            Column("AR, greedy", "ar100_greedy", ".4f"),
            Column("AR, other", "ar100_rule", ".4f"),
        ),
        only={"score_threshold": (0.3, 1e-8)},
    ),
    "nms_cpu_boxes": Table(
        "nms.cpu.json",
        (
            Column("implementation", "implementation"),
            Column("median, ms", "p50_us", ".2f", 1000),
            Column("99th percentile, ms", "p99_us", ".2f", 1000),
        ),
        only={"work": ("nms",)},
    ),
    "nms_cpu": Table(
        "nms.cpu.json",
        (
            Column("heads", "model"),
            Column("anchors", "anchors", ","),
            Column("classes", "classes"),
            Column("implementation", "implementation"),
            Column("median, ms", "p50_us", ".2f", 1000),
            Column("99th percentile, ms", "p99_us", ".2f", 1000),
        ),
        only={"work": ("postprocess",), "batch": (1,), "dtype": ("float32",), "score_threshold": (1e-8,)},
    ),
    "nms_gpu_boxes": Table(
        "nms.h200.json",
        (
            Column("boxes", "boxes", ","),
            Column("kept", "kept", ","),
            Column("implementation", "implementation"),
            *_DEVICE_TIMES,
        ),
        only={"what": ("nms",)},
    ),
    "nms_gpu_forms": Table(
        "nms.h200.json",
        (
            Column("anchors", "anchors", ","),
            Column("images", "batch"),
            Column("type", "dtype"),
            Column("floor, µs", "floor_us", ".1f"),
            *_DEVICE_TIMES,
        ),
        only={
            "what": ("postprocess",),
            "source": ("drawn",),
            "implementation": ("odtrt",),
            "model": ("8 objects",),
            "score_threshold": (0.05,),
        },
    ),
    "nms_ncu": Table(
        "nms_ncu.h200.json",
        (
            Column("kernel", "kernel"),
            Column("anchors", "anchors", ","),
            Column("above", "score_threshold", "g"),
            Column("objects", "objects"),
            Column("µs", "us", ".1f"),
            Column("DRAM, %", "dram_percent", ".1f"),
            Column("issue, %", "issue_percent", ".0f"),
            Column("cycles", "cycles_per_instruction", ".1f"),
            Column("sync", "stall_barrier", ".1f"),
            Column("load", "stall_long_scoreboard", ".1f"),
            Column("result", "stall_wait", ".1f"),
        ),
        names_packages=False,
    ),
    "preprocess_gpu": Table(
        "nms.h200.json",
        (
            Column("image", "image"),
            Column("network input", "network_input"),
            *_DEVICE_TIMES,
        ),
        only={"what": ("preprocess",)},
    ),
    "plugin_headers": Table(
        "plugin_matrix.json",
        (
            Column("headers of TensorRT", "headers_version"),
            Column("interface", "interface"),
            Column("compiles", "compiles"),
            Column("warnings", "warnings"),
            Column("links", "links"),
            Column("needs libnvinfer", "links_to_libnvinfer"),
        ),
        only={"check": ("compile",)},
        made="Compiled",
        names_packages=False,
    ),
    "plugin_runtimes": Table(
        "plugin_matrix.json",
        (
            Column("runtime", "runtime"),
            Column("version", "version"),
            Column("plugin compiled for", "built_with"),
            Column("loads", "loads"),
            Column("plugin made", "plugin_made"),
            Column("refused where an attribute is missing", "refused_without_an_attribute"),
        ),
        only={"check": ("registry",)},
        made="Loaded",
    ),
    "plugin_plans": Table(
        "plugin_matrix.json",
        (
            Column("network", "network"),
            Column("precision", "precision"),
            Column("batch", "batch"),
            Column("TensorRT-RTX", "version"),
            Column("plan built", "builds"),
            Column("plugin in it", "plugin_in_plan"),
            Column("plan, bytes", "plan_bytes", ","),
        ),
        only={"check": ("build",), "built_with": ("10.0",)},
        made="Built",
    ),
    "nms_kernels": Table(
        "nms_resources.json",
        (
            Column("source", "source"),
            Column("kernel", "kernel"),
            Column("for", "variant"),
            Column("compiled for", "architecture"),
            Column("registers", "registers"),
            Column("static shared memory, bytes", "shared_bytes", ","),
            Column("stack, bytes", "stack_bytes"),
            Column("spilled, bytes", "spill_store_bytes"),
            Column("compiler", "compiler"),
        ),
        only={"what": ("kernel",)},
        made="Compiled",
        names_packages=False,
    ),
    "engine_cpu": Table(
        "engine.cpu.json",
        (
            Column("model", "model"),
            Column("weights", "weights"),
            Column("precision", "precision"),
            Column("build, s", "seconds", ".1f"),
            Column("peak memory of the build, MiB", "peak_rss_mb", ",.0f"),
            Column("of making half precision, MiB", "conversion_peak_rss_mb", ",.0f", is_optional=True),
            Column("ONNX, MB", "onnx_mb", ".1f"),
            Column("plan, MB", "plan_mb", ".1f"),
            Column("layers", "layers"),
            Column("of them FP16", "layers_fp16"),
        ),
        only={"kind": ("build",)},
        made="Built",
    ),
    "engine_settings": Table(
        "engine.cpu.json",
        (
            Column("model", "model"),
            Column("setting", "setting"),
            Column("build, s", "seconds", ".1f"),
            Column("peak memory, MiB", "peak_rss_mb", ",.0f"),
        ),
        only={"kind": ("setting",)},
        made="Built",
    ),
    "engine_fallback": Table(
        "engine.cpu.json",
        (
            Column("model", "model"),
            Column("limit, MiB", "limit_mb", ","),
            Column("step", "step"),
            Column("outcome", "outcome"),
            Column("noticed by", "how"),
            Column("peak memory, MiB", "peak_rss_mb", ",.0f"),
        ),
        only={"kind": ("fallback",)},
        made="Built",
    ),
    "engine_gpu_latency": Table(
        "engine.h200.json",
        (
            *_MODEL_AND_ARITHMETIC,
            Column("median, ms", "p50_us", ".2f", 1000, is_optional=True),
            Column("95th percentile, ms", "p95_us", ".2f", 1000, is_optional=True),
            Column("99th percentile, ms", "p99_us", ".2f", 1000, is_optional=True),
        ),
        names_packages=False,
        library="TensorRT-RTX",
    ),
    "engine_gpu": Table(
        "engine.h200.json",
        (
            Column("model", "model"),
            Column("in", "arithmetic"),
            Column("weights", "weights", is_optional=True),
            Column("boxes", "boxes_relative_err", ".1e", is_optional=True),
            Column("classes", "logits_relative_err", ".1e", is_optional=True),
            Column("CPU, FP16: boxes", "half_boxes_relative_err", ".1e", is_optional=True),
            Column("classes", "half_logits_relative_err", ".1e", is_optional=True),
            Column("passes", "passed"),
        ),
        names_packages=False,
        library="TensorRT-RTX",
    ),
    "engine_gpu_memory": Table(
        "engine.h200.json",
        (
            *_MODEL_AND_ARITHMETIC,
            Column("host memory of the build", "peak_rss_mb", ",.0f", is_optional=True),
            Column("GPU memory of the build", "peak_gpu_mb", ",.0f", is_optional=True),
            Column("host memory of loading", "load_peak_rss_mb", ",.0f", is_optional=True),
            Column("GPU memory of the loaded plan", "device_memory_mb", ",.0f", is_optional=True),
            Column("not given back by closing it", "device_memory_left_mb", ",.0f", is_optional=True),
        ),
        names_packages=False,
        library="TensorRT-RTX",
    ),
    "engine_gpu_times": Table(
        "engine.h200.json",
        (
            *_MODEL_AND_ARITHMETIC,
            Column("build, s", "build_cold_seconds", ".1f", is_optional=True),
            Column("built again, s", "build_warm_seconds", ".1f", is_optional=True),
            Column("first load, s", "load_cold_seconds", ".1f", is_optional=True),
            Column("loaded again, s", "load_warm_seconds", ".1f", is_optional=True),
            Column("kept kernels, MB", "kernels_mb", ".1f", is_optional=True),
        ),
        names_packages=False,
        library="TensorRT-RTX",
    ),
    "engine_gpu_detections": Table(
        "engine.h200.json",
        (
            *_MODEL_AND_ARITHMETIC,
            Column("weights", "weights", is_optional=True),
            Column("post-processing", "postprocessing", is_optional=True, until=","),
            Column("same bits as the CPU's", "postprocessing_is_exact", is_optional=True),
            Column("ONNX Runtime's detections", "detections", ",", is_optional=True),
            Column("found again", "matched", ",", is_optional=True),
            Column("cut off", "at_threshold", ",", is_optional=True),
            Column("missing", "missing", is_optional=True),
            Column("extra", "extra", is_optional=True),
            Column("largest score difference", "max_score_difference", ".0e", is_optional=True),
        ),
        names_packages=False,
        library="TensorRT-RTX",
    ),
    "backends_gpu": Table(
        "backends.h200.json",
        (
            Column("model", "model"),
            Column("batch", "batch", is_optional=True),
            Column("backend", "description", is_optional=True, until=", plan"),
            *_PLAN,
            Column("median, ms", "detect_p50_us", ".2f", 1000, is_optional=True),
            Column("99th percentile, ms", "detect_p99_us", ".2f", 1000, is_optional=True),
            Column("of eight together, ms", "detect8_p50_us", ".2f", 1000, is_optional=True),
            Column("network alone, ms", "network_p50_us", ".2f", 1000, is_optional=True),
        ),
        names_packages=False,
    ),
    "backends_gpu_start": Table(
        "backends.h200.json",
        (
            Column("model", "model"),
            *_PLAN,
            Column("plan, MB", "plan_mb", ".1f", is_optional=True),
            Column("opened first, s", "first_start_open_seconds", ".2f", is_optional=True),
            Column("opened again, s", "second_start_open_seconds", ".2f", is_optional=True),
            Column("first detections then, ms", "second_start_first_detect_seconds", ".1f", 1e-3, True),
            Column("GPU memory, MiB", "device_memory_mb", ",.0f", is_optional=True),
        ),
        only={"backend": ("tensorrt", "tensorrt_rtx")},
        names_packages=False,
    ),
    "backends_gpu_agreement": Table(
        "backends.h200.json",
        (
            Column("model", "model"),
            *_PLAN,
            Column("images", "images", is_optional=True),
            Column("boxes", "references", ",", is_optional=True),
            Column("found again", "matched", ",", is_optional=True),
            Column("missing", "missing", is_optional=True),
            Column("extra", "extra", is_optional=True),
            Column("score 0.3 and more", "sure_references", ",", is_optional=True),
            Column("of these missing", "sure_missing", is_optional=True),
            Column("extra of that score", "sure_extra", is_optional=True),
            Column("scores differ by", "max_score_difference", ".3f", is_optional=True),
            Column("limit", "score_tolerance", "g", is_optional=True),
            Column("IoU", "min_iou", ".2f", is_optional=True),
            Column("limit", "iou", "g", is_optional=True),
        ),
        only={"backend": ("tensorrt", "tensorrt_rtx")},
        names_packages=False,
    ),
    "faults": Table(
        "faults.json",
        (
            Column("fault", "kind"),
            Column("trials", "trials", ","),
            Column("crashes", "crashes"),
            Column("wrong plans let through", "wrong_loads"),
            Column("valid plans lost", "lost_valid_plans"),
            Column("half-written files", "half_written"),
            Column("records lost", "lost_records"),
        ),
        made="Run",
        names_packages=False,
    ),
    "nms_roofline": Table(
        "nms_resources.json",
        (
            Column("network", "network"),
            Column("type", "dtype"),
            Column("logits, MB", "bytes", ".1f", 1e6),
            Column("Orin AGX, estimate, µs", "orin_agx_floor_us", ".0f"),
            Column("Orin NX, estimate, µs", "orin_nx_floor_us", ".0f"),
            Column("Orin Nano 8GB, estimate, µs", "orin_nano_8gb_floor_us", ".0f"),
        ),
        only={"what": ("roofline",)},
        made="ESTIMATED, not measured,",
        names_packages=False,
    ),
}


GOALS = (
    ("EfficientDet-D0, 49,104 anchors", 49104, 0.05, 20),
    ("EfficientDet-D0, 49,104 anchors", 49104, 1e-8, 30),
    ("1024 pixels, 196,416 anchors", 196416, 0.3, 45),
    ("1024 pixels, 196,416 anchors", 196416, 0.05, 45),
    ("1024 pixels, 196,416 anchors", 196416, 1e-8, 45),
)
GOAL_OF_2000_BOXES = 15


def generated(root: Path) -> dict[str, str]:
    """Every generated page part, file name -> text."""
    parts = {f"{name}.md": markdown(table, root / "results") for name, table in TABLES.items()}
    parts["notebooks.md"] = stamps(root)
    parts["jetpack.md"] = jetpacks()
    parts["tensorrt_lines.md"] = tensorrt_lines()
    parts["tensorrt_names.md"] = part_of(root / "results" / "tensorrt_names.json", tensorrt_names)
    parts["portability_policy.md"] = policy()
    parts["faults_total.md"] = part_of(root / "results" / "faults.json", faults)
    parts["nms_gpu.md"] = part_of(root / "results" / "nms.h200.json", gpu_times)
    parts["nms_goals.md"] = part_of(root / "results" / "nms.h200.json", goals)
    parts["nms_checks.md"] = part_of(root / "results" / "nms_checks.h200.json", checks)
    parts["engine_gpu_gaps.md"] = engine_gaps(root / "results")
    parts["engine_gpu.svg"] = book_plots.engine_gpu(root / "results")
    parts["engine_memory.svg"] = book_plots.engine_memory(root / "results")
    parts["passport_tree.svg"] = book_plots.passport_tree(
        {rule.name: rule.action.value for rule in portability.POLICY}
    )
    parts["nms_gpu.svg"] = book_plots.nms_gpu(root / "results")
    return parts


def stale(root: Path) -> list[str]:
    """The generated files that are absent or not what the measurements say."""
    folder = root / "book" / "_generated"
    found = [
        name
        for name, text in generated(root).items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
    path = root / "README.md"
    is_current = not path.is_file() or path.read_text(encoding="utf-8") == readme(root)
    return found if is_current else [*found, path.name]


def readme(root: Path) -> str:
    """The README with the table of what its commands cost between its two marks."""
    text = (root / "README.md").read_text(encoding="utf-8")
    before, first, rest = text.partition(README_MARKS[0])
    _, second, after = rest.partition(README_MARKS[1])
    if not (first and second):
        raise ValueError(f"README.md: expected the two lines {' and '.join(README_MARKS)}")
    table = markdown(TABLES["setup"], root / "results")
    return f"{before}{README_MARKS[0]}\n{table}{README_MARKS[1]}{after}"


def markdown(table: Table, results: Path) -> str:
    """The table with a line that says where, when and with what it was measured."""
    path = results / table.results
    if not path.is_file():
        return not_measured(path)
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        row
        for row in measured["rows"]
        if row.get("claim", "") == table.claim
        and all(row.get(key) in values for key, values in table.only.items())
    ]
    if not rows:
        return f"*Not measured yet: `results/{table.results}` has no such row.*\n"
    versions = measured["versions"]
    packages = ", ".join(
        f"{name} {versions[key]}"
        for key, name in (
            ("tensorflow-cpu", "TensorFlow"),
            ("tensorflow", "TensorFlow"),
            ("tf2onnx", "tf2onnx"),
            ("onnxruntime", "ONNX Runtime"),
            ("tensorrt-rtx-cu13", "TensorRT-RTX"),
            ("cuda", "CUDA"),
            ("torch", "PyTorch"),
            ("torchvision", "torchvision"),
        )
        if key in versions
    )
    device = measured["device"]
    machine = f"a processor with {device['cores']} cores"
    if "gpu" in device:
        machine = f"one {device['gpu']}, driver {device['driver']}"
    made_with = f"{machine}, {packages}" if packages and table.names_packages else machine
    if table.library:
        found = {row["version"] for row in rows if "version" in row}
        made_with += f", {table.library} {', '.join(sorted(found))}"
    days = sorted({row["date"] for row in rows if "date" in row}) or [measured["date"][:10]]
    source = (
        f"*{table.made} on {', '.join(days)} on {made_with}; "
        f"`results/{table.results}`, written by `{measured['command']}`.*"
    )
    columns = [
        column
        for column in table.columns
        if not column.is_optional or any(row.get(column.key) is not None for row in rows)
    ]
    headings = [column.heading for column in columns]
    cells = [[cell(row, column) for column in columns] for row in rows]
    return f"{grid(headings, cells)}\n\n{source}\n"


def goals(measured: dict[str, Any]) -> str:
    """What the kernels were meant to take on this GPU, and take: one image, FP32, in a CUDA graph."""
    rows = [row for row in measured["rows"] if row.get("implementation") == "odtrt"]
    singles = [row for row in rows if row.get("batch") == 1 and row.get("dtype") == "float32"]

    def within(limit: float, *times: float) -> str:
        return " / ".join(f"**{time:.1f}**" if time <= limit else f"{time:.1f}" for time in times)

    lines = []
    for name, anchors, threshold, goal in GOALS:
        wanted = {"anchors": anchors, "score_threshold": threshold}
        cases = {row["model"]: row for row in singles if wanted.items() <= row.items()}
        times = [
            within(goal, cases[model]["warm_graph_p50_us"], cases[model]["graph_p50_us"])
            if model in cases
            else "–"
            for model in ("8 objects", "30 objects", "zoo_efficientdet_d0")
        ]
        floor = cases["8 objects"]["floor_us"]
        lines.append([name, f"{threshold:g}", str(goal), *times, f"{floor:.1f}", f"{3 * floor + 10:.1f}"])
    (boxes,) = (row["graph_p50_us"] for row in rows if row.get("boxes") == 2000)
    goal = GOAL_OF_2000_BOXES
    lines.append(["suppression of 2,000 boxes", "–", str(goal), within(goal, boxes), *4 * "–"])
    headings = ["work", "score above", "goal, µs", "8 objects, µs", "a crowd of 30, µs", "recorded, µs"]
    all_rows = [row for row in singles if row["what"] == "postprocess"]
    met = [
        sum(row[key] <= 3 * row["floor_us"] + 10 for row in all_rows)
        for key in ("warm_graph_p50_us", "graph_p50_us")
    ]
    source = (
        f"*Logits in the cache / from memory; bold is within the goal. Of all {len(all_rows)} heads timed in "
        f"single precision, one image, {met[0]} / {met[1]} take no more than three floors and 10 µs. "
        f"{source_of(measured)}*"
    )
    return f"{grid([*headings, 'floor, µs', '3 floors and 10 µs'], lines)}\n\n{source}\n"


def gpu_times(measured: dict[str, Any]) -> str:
    """What a call takes by heads and threshold, one image, FP32, in a CUDA graph, and PyTorch beside it."""
    thresholds = (0.3, 0.05, 1e-8)
    heads: dict[tuple[str, int, int], dict[tuple[str, float], Row]] = {}
    for row in measured["rows"]:
        if row["what"] == "postprocess" and (row["batch"], row["dtype"]) == (1, "float32"):
            found = heads.setdefault((row["model"], row["anchors"], row["classes"]), {})
            found[row["implementation"].partition(",")[0], row["score_threshold"]] = row
    lines = []
    for (model, anchors, _), found in heads.items():
        own = [found["odtrt", threshold] for threshold in thresholds]
        peers = [found.get(("PyTorch", threshold)) for threshold in thresholds[1:]]
        lines.append(
            [
                model,
                f"{anchors:,}",
                *(f"{row['warm_graph_p50_us']:.1f} / {row['graph_p50_us']:.1f}" for row in own),
                f"{own[0]['floor_us']:.1f}",
                " / ".join(f"{peer['p50_us']:,.0f}" for peer in peers if peer) or "–",
            ]
        )
    headings = ["heads", "anchors", *(f"above {threshold:g}" for threshold in thresholds)]
    usual = statistics.mode(classes for _, _, classes in heads)
    others = "".join(f", {model} {classes}" for model, _, classes in heads if classes != usual)
    source = (
        "*Microseconds, medians in a CUDA graph, logits in the cache / from memory. PyTorch: a call with "
        "torchvision as a program sees it, above 0.05 / above 1e-08, of the best 4,096 pairs. "
        f"{usual} classes{others}. PyTorch {measured['versions']['torch']}. {source_of(measured)}*"
    )
    return f"{grid([*headings, 'floor', 'PyTorch'], lines)}\n\n{source}\n"


def checks(measured: dict[str, Any]) -> str:
    """What was checked on the GPU, the cases of each check together."""
    groups: dict[str, list[Row]] = {}
    for row in measured["rows"]:
        groups.setdefault(row["check"], []).append(row)
    lines = [
        [
            name,
            str(len(rows)),
            str(sum(row["agrees"] is True and row.get("problems", 0) == 0 for row in rows)),
            str(sum(row["problems"] or 0 for row in rows)) if "problems" in rows[0] else "–",
        ]
        for name, rows in groups.items()
    ]
    table = grid(["check", "cases", "that pass", "errors and hazards"], lines)
    return f"{table}\n\n*{source_of(measured)}*\n"


def source_of(measured: dict[str, Any]) -> str:
    """Where and when the figures of a GPU were measured, and what wrote them down."""
    device = measured["device"]
    return (
        f"Measured on {measured['date'][:10]} on one {device['gpu']}, driver {device['driver']}; "
        f"`results/{measured['file']}`, written by `{measured['command']}`."
    )


def part_of(path: Path, part: Callable[[dict[str, Any]], str]) -> str:
    """What ``part`` makes of a results file, whose name it finds under ``file``; or that there is none."""
    if not path.is_file():
        return not_measured(path)
    return part({**json.loads(path.read_text(encoding="utf-8")), "file": path.name})


def not_measured(path: Path) -> str:
    return f"*Not measured yet: `results/{path.name}` does not exist.*\n"


def jetpacks() -> str:
    """Which JetPack has which TensorRT, and whether that has what odtrt needs."""
    rows = []
    for one in boards.JETPACKS:
        line = boards.tensorrt_line(one.tensorrt)
        rows.append(
            [
                one.release,
                ", ".join(one.l4t),
                one.boards,
                one.tensorrt,
                one.cuda,
                one.python,
                "has it" if line.is_supported else "lacks it",
                f"{'NVIDIA' if one.is_vendor_stated else 'third parties'}: {one.source}",
            ]
        )
    headings = [
        "JetPack",
        "Jetson Linux",
        "boards",
        "TensorRT",
        "CUDA",
        "Python",
        "what odtrt needs",
        "TensorRT stated by",
    ]
    needs = "What odtrt needs is TensorRT 8.5 and Python 3.8"
    source = f"*{needs}. `odtrt_lib/boards.py`; we have run none of it on a board.*"
    return f"{grid(headings, rows)}\n\n{source}\n"


def tensorrt_lines() -> str:
    """What odtrt does on each line of TensorRT releases."""

    def words(has: bool) -> str:
        return "yes" if has else "no"

    rows = [
        [
            line.name,
            line.plugin,
            line.half_precision,
            line.int8,
            words(line.has_version_compatible),
            words(line.has_hardware_compatible),
            words(line.has_progress),
        ]
        for line in boards.TENSORRT
        if line.is_supported
    ]
    headings = [
        *("TensorRT", "plugin interface", "half precision", "INT8"),
        *("version-compatible plans", "hardware-compatible plans", "progress"),
    ]
    source = "*`odtrt_lib/boards.py`; `tests/test_boards.py` compares it with NVIDIA's own Python bindings.*"
    return f"{grid(headings, rows)}\n\n{source}\n"


def tensorrt_names(measured: dict[str, Any]) -> str:
    """Which releases' bindings were looked into, and what the scan of odtrt's sources found."""
    rows = measured["rows"]
    lines = []
    for runtime_library, name in (("tensorrt", "TensorRT"), ("tensorrt_rtx", "TensorRT-RTX")):
        found = [
            row["version"]
            for row in rows
            if row.get("runtime_library") == runtime_library and "version" in row
        ]
        lines.append([name, str(len(found)), ", ".join(found)])
    files = [row for row in rows if "violations" in row]
    source = (
        f"*{sum(row['names'] for row in files)} names in {len(files)} files, "
        f"{sum(row['violations'] for row in files)} used where a release lacks them. Looked into on "
        f"{measured['date'][:10]}; `results/{measured['file']}`, written by `{measured['command']}`.*"
    )
    return f"{grid(['library', 'releases', 'versions'], lines)}\n\n{source}\n"


def policy() -> str:
    """The rules of :data:`odtrt_lib.portability.POLICY`."""
    rows = [
        [rule.name, rule.condition, f"**{rule.action.value}**", rule.source] for rule in portability.POLICY
    ]
    table = grid(["rule", "when", "verdict", "source"], rows)
    return f"{table}\n\n*`POLICY` in `odtrt_lib/portability/policy.py`.*\n"


def engine_gaps(results: Path) -> str:
    """Which of the models that were built on a CPU were not measured on the GPU, and in which arithmetic."""
    paths = [results / name for name in ("engine.cpu.json", "engine.h200.json")]
    for path in paths:
        if not path.is_file():
            return not_measured(path)
    built, measured = (json.loads(path.read_text(encoding="utf-8"))["rows"] for path in paths)
    done = {(row["model"], row["arithmetic"]) for row in measured if "error" not in row}
    gaps = []
    for model in dict.fromkeys(row["model"] for row in built if row["kind"] == "build"):
        lacks = [name for name in book_plots.ARITHMETIC if (model, name) not in done]
        where = "" if len(lacks) == len(book_plots.ARITHMETIC) else f" in {' and '.join(lacks)}"
        gaps += [f"{model}{where}"] if lacks else []
    if not gaps:
        return "*Every model of the table in decision 2 was measured.*\n"
    return f"*Of the models in decision 2, not measured in this way: {', '.join(gaps)}.*\n"


FAULTS = {
    "a plan, a passport or a folder damaged": ("plan: ", "passport: ", "folder: "),
    "kill -9 during install, rebuild, record, pack": ("kill -9 ",),
    "disk full or read-only": ("full disk", "read-only"),
    "several processes at once": ("four ", "a reader "),
    "another machine, library or plugin than the plan's": ("mismatch ",),
    "a model folder: bits, cut ends, upgrades killed beside a reader": ("model folder: ",),
}


def faults(measured: dict[str, Any]) -> str:
    """The campaign's rows by group. A row of no group, or of two, is an error."""
    rows = measured["rows"]
    groups: dict[str, list[Row]] = {name: [] for name in FAULTS}
    for row in rows:
        (name,) = [name for name, starts in FAULTS.items() if row["kind"].startswith(starts)]
        groups[name].append(row)
    tallies = ("crashes", "wrong_loads", "lost_valid_plans", "half_written", "lost_records")
    lines = [
        [name, *(f"{sum(row[key] for row in found):,}" for key in ("trials", *tallies))]
        for name, found in groups.items()
    ]
    lines.append(["together", *(f"{sum(row[key] for row in rows):,}" for key in ("trials", *tallies))])
    headings = ["fault", "trials", "crashes", "wrong plans let through", "valid plans lost"]
    return f"{grid([*headings, 'half-written files', 'records lost'], lines)}\n"


def cell(row: Row, column: Column) -> str:
    """One figure as the table shows it. A key that the row lacks is an error, unless it is optional."""
    if column.is_optional and row.get(column.key) is None:
        return "–"
    value = row[column.key]
    if column.key == "kernel":
        value = RENAMED_KERNELS.get(row.get("source", "postprocess.cu"), {}).get(value, value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.form:
        text = format(value / column.divisor if column.divisor != 1 else value, column.form)
        return text.replace("e-", f"e{NO_BREAK_HYPHEN}")
    text = str(value).partition(column.until)[0] if column.until else str(value)
    return text.replace("|", "\\|")


def stamps(root: Path) -> str:
    """The table of the notebooks' recordings, and with what they were made, from the stamps in them."""
    rows = []
    versions: dict[str, list[str]] = {}
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        stamp = notebook.metadata.get("odtrt")
        title = notebook.cells[0].source.removeprefix("# ").split(":")[0]
        link = f"[{path.stem[:2]} {title}](../notebooks/{path.name})"
        if stamp is None:
            rows.append([link, *["not recorded"] * 3])
            continue
        rows.append([link, stamp["date"], str(stamp["seconds"]), stamp["device"]])
        packages = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
        versions.setdefault(packages, []).append(path.stem[:2])
    made_with = [f"Recorded with {packages} ({', '.join(names)})." for packages, names in versions.items()]
    return "\n\n".join([grid(["notebook", "recorded", "seconds", "on"], rows), *made_with]) + "\n"


def grid(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(root: Path) -> None:
    """Writes every generated file."""
    folder = root / "book" / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in generated(root).items():
        (folder / name).write_text(text, encoding="utf-8")
    if (root / "README.md").is_file():
        (root / "README.md").write_text(readme(root), encoding="utf-8")


def check(root: Path) -> int:
    """Prints what is not current; the exit status."""
    found = stale(root)
    for name in found:
        print(f"book/_generated/{name}: not current; run: python scripts/book_tables.py")
    return 1 if found else 0


def main(arguments: list[str]) -> int:
    commands: dict[tuple[str, ...], Callable[[Path], int | None]] = {(): write, ("check",): check}
    if tuple(arguments) not in commands:
        print(__doc__)
        return 2
    return commands[tuple(arguments)](ROOT) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
