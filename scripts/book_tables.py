"""Writes the tables and figures of the book, book/_generated/*, from the measurements in results/*.json.

The README's table of times is written too, between its two marks.

    python scripts/book_tables.py            write them
    python scripts/book_tables.py check      exit 1, naming each table that is not current

A page includes a table by ``{include}``. Where its text repeats a measured figure, such as a small count,
that was written by hand and is not checked here. A table whose measurement is absent says so.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import book_gpu_tables as gpu
import book_plots
import nbformat
from book_grid import NO_BREAK_HYPHEN, NONE, Column, Row, cell, grid, model_name, not_measured, part_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from odtrt_lib import boards, portability  # noqa: E402

README_MARKS = ("<!-- scripts/book_tables.py writes from here -->", "<!-- to here -->")
RTX, TRT = "TensorRT-RTX", "TensorRT"


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
            Column("export / convert, s", "export_seconds", ".0f", beside="convert_seconds"),
            Column("peak, MiB", "peak_rss_mb", ",.0f"),
            Column("boxes, std", "onnx_boxes_max_err_in_std", ".1e"),
            Column("classes, std", "onnx_logits_max_err_in_std", ".1e"),
        ),
    ),
    "noise": Table(
        "noise.cpu.json",
        (
            Column("model", "model"),
            Column("gate", "gate"),
            Column("defect", "defect"),
            Column("times the noise", "times_noise", ",.1f", is_optional=True),
            Column("smallest change seen", "sees_kernel_change", ".0e", is_optional=True),
            Column("verdict", "verdict"),
        ),
    ),
    "int8_cpu": Table(
        "int8.cpu.json",
        (
            Column("in INT8", "strategy"),
            Column("calibrator", "calibrator"),
            Column("mAP", "map", ".3f"),
            Column("drop", "map_drop_points", ".2f"),
            Column("from / to", "drop_low", ".2f", beside="drop_high"),
        ),
        only={
            "model": ("parts",),
            "strategy": (
                "single precision",
                "every convolution",
                "without the worst 4",
                "trained",
                "naive: batch normalisation apart",
                "naive: a black picture",
            ),
        },
    ),
    "int8_cpu_all": Table(
        "int8.cpu.json",
        (
            Column("model", "model"),
            Column("in INT8", "strategy"),
            Column("calibrator", "calibrator"),
            Column("pictures", "scenes"),
            Column("convolutions", "int8_convolutions"),
            Column("boxes / classes, dB", "box_sqnr_db", ".1f", is_optional=True, beside="class_sqnr_db"),
            Column("mAP", "map", ".3f"),
            Column("drop", "map_drop_points", ".2f"),
            Column("from / to", "drop_low", ".2f", beside="drop_high"),
        ),
    ),
    "latency_cpu": Table(
        "latency.cpu.json",
        (
            Column("model", "model"),
            Column("frame p50 / p99, ms", "detect_p50_us", ".1f", 1000, beside="detect_p99_us"),
            Column("before and after the network", "around_share", ".1%"),
        ),
    ),
    "roofline_published": Table(
        "roofline.cpu.json",
        (
            Column("network", "network"),
            Column("precision", "precision"),
            Column("measured, ms", "published_ms", ".1f"),
            Column("bound, ms", "bound_ms", ".2f"),
            Column("times", "times_bound", ".1f"),
            Column("measured by", "source"),
        ),
        only={"row": ("published",), "board": ("Nano",)},
        made="Computed",
        names_packages=False,
    ),
    "agreement": Table(
        "agreement.cpu.json",
        (
            Column("model", "model"),
            Column("detections of", "reference"),
            Column("looked for in those of", "compared"),
            Column("found again", "matched", ",", beside="references"),
            Column("IoU above 0.5", "matched_at_iou_half", ","),
            Column("extra / cut off", "extra", ",", beside="at_threshold_or_end_of_list"),
            Column("scores differ by", "max_score_difference", ".0e"),
        ),
    ),
    "preprocess": Table(
        "preprocess.cpu.json",
        (
            Column("image", "source"),
            Column("input", "input"),
            Column("normalisation", "normalisation"),
            Column("compiled", "native_p50_us", ".2f", 1000),
            Column("NumPy", "preprocess_p50_us", ".2f", 1000),
            Column("OpenCV", "cv2_p50_us", ".2f", 1000),
            Column("error", "max_abs_err_vs_tf", ".0e"),
            Column("OpenCV's", "cv2_max_abs_err_vs_tf", ".2f"),
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

_NCU = (
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
)


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
            Column("images changed", "images_changed", beside="images"),
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
            Column("found", "found_greedy", ",", beside="found_rule"),
            Column("mAP", "map_greedy", ".3f", beside="map_rule"),
            Column("AR", "ar100_greedy", ".3f", beside="ar100_rule"),
        ),
        only={"score_threshold": (0.3, 1e-8)},
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
    "nms_ncu_select": Table(
        "nms_ncu.h200.json", _NCU, only={"kernel": ("select_candidates", "find")}, names_packages=False
    ),
    "nms_ncu_suppress": Table(
        "nms_ncu.h200.json", _NCU, only={"kernel": ("suppress_in_cluster", "settle")}, names_packages=False
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
            Column("plan built", "builds"),
            Column("plugin in it", "plugin_in_plan"),
        ),
        only={"check": ("build",), "built_with": ("10.0",)},
        made="Built",
    ),
    "engine_cpu": Table(
        "engine.cpu.json",
        (
            Column("model", "model"),
            Column("in", "precision"),
            Column("build, s", "seconds", ".1f"),
            Column("peak, MiB", "peak_rss_mb", ",.0f"),
            Column("making FP16, MiB", "conversion_peak_rss_mb", ",.0f", is_optional=True),
            Column("ONNX / plan, MB", "onnx_mb", ".1f", beside="plan_mb"),
            Column("layers in FP16 / all", "layers_fp16", beside="layers"),
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
            Column("peak, MiB", "peak_rss_mb", ",.0f"),
        ),
        only={"kind": ("fallback",)},
        made="Built",
    ),
    "backends_gpu_start": Table(
        "backends.h200.json",
        (
            Column("model", "model"),
            Column("in", "arithmetic"),
            Column("opened first, s", "first_start_open_seconds", ".2f", is_optional=True),
            Column("opened again, s", "second_start_open_seconds", ".2f", is_optional=True),
            Column("first detections, ms", "second_start_first_detect_seconds", ".1f", 1e-3, True),
            Column("GPU memory, MiB", "device_memory_mb", ",.0f", is_optional=True),
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
            Column("wrong plans", "wrong_loads"),
            Column("plans lost", "lost_valid_plans"),
            Column("half-written", "half_written"),
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


# Name -> the results file, the library whose version its rows have, and what makes the table of them.
GPU_TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "nms_gpu": ("nms.h200.json", "", gpu.gpu_times),
    "nms_goals": ("nms.h200.json", "", gpu.goals),
    "nms_checks": ("nms_checks.h200.json", "", gpu.checks),
    "nms_peers": ("nms_peers.h200.json", TRT, gpu.peers_drawn),
    "nms_peers_recorded": ("nms_peers.h200.json", TRT, gpu.peers_recorded),
    "nms_peers_layer": ("nms_peers.h200.json", TRT, gpu.peers_layer),
    "nms_peers_five": ("nms_peers.h200.json", TRT, gpu.peers_five),
    "nms_peers_summary": ("nms_peers.h200.json", TRT, gpu.peers_summary),
    "pipeline": ("pipeline.h200.json", TRT, gpu.pipelines),
    "engine_gpu": ("engine.h200.json", RTX, gpu.plan_agreement),
    "engine_gpu_half": ("engine.h200.json", RTX, gpu.cpu_half),
    "engine_gpu_latency": ("engine.h200.json", RTX, gpu.rtx_latency),
    "engine_gpu_memory": ("engine.h200.json", RTX, gpu.rtx_memory),
    "engine_gpu_times": ("engine.h200.json", RTX, gpu.rtx_times),
    "tensorrt85_summary": ("tensorrt85.h200.json", TRT, gpu.trt_summary),
    "tensorrt85_speed": ("tensorrt85.h200.json", TRT, gpu.trt_speed),
    "tensorrt85_cache": ("tensorrt85.h200.json", TRT, gpu.trt_cache),
    "tensorrt85_plugin_memory": ("tensorrt85.h200.json", TRT, gpu.trt_plugin_memory),
    "tensorrt85": ("tensorrt85.h200.json", TRT, gpu.plan_agreement),
    "tensorrt85_builds": ("tensorrt85.h200.json", TRT, gpu.trt_builds),
    "tensorrt85_latency": ("tensorrt85.h200.json", TRT, gpu.trt_latency),
    "tensorrt85_half": ("tensorrt85.h200.json", TRT, gpu.trt_half),
    "tensorrt85_memory": ("tensorrt85.h200.json", TRT, gpu.trt_memory),
    "side_summary": ("peers.h200.json", TRT, gpu.side_summary),
    "side_times": ("peers.h200.json", TRT, gpu.side_times),
    "side_found": ("peers.h200.json", TRT, gpu.side_found),
    "road": ("peers.h200.json", "", gpu.road),
    "road_failures": ("peers.h200.json", "", gpu.road_failures),
    "device_memory": ("device_memory.h200.json", RTX, gpu.device_memory),
    "backends_gpu": ("backends.h200.json", RTX, gpu.backends),
    "backends_gpu_agreement": ("backends.h200.json", RTX, gpu.backends_agreement),
    "version_summary": ("version_matrix.h200.json", TRT, gpu.version_summary),
    "version_matrix": ("version_matrix.h200.json", TRT, gpu.version_matrix),
    "version_messages": ("version_matrix.h200.json", TRT, gpu.version_messages),
    "version_damage": ("version_matrix.h200.json", TRT, gpu.version_damage),
    "version_caches": ("version_matrix.h200.json", TRT, gpu.version_caches),
    "fallback_summary": ("fallback.h200.json", TRT, gpu.fallback_summary),
    "fallback_settings": ("fallback.h200.json", TRT, gpu.fallback_settings),
    "fallback_limits": ("fallback.h200.json", TRT, gpu.fallback_limits),
}
KERNEL_RESULTS = "nms_resources.json"
KERNELS = (
    Column("source", "source"),
    Column("kernel", "kernel"),
    Column("for", "variant"),
    Column("compiled for", "architecture"),
    Column("registers", "registers"),
    Column("static shared memory, bytes", "shared_bytes", ","),
    Column("stack, bytes", "stack_bytes"),
    Column("spilled, bytes", "spill_store_bytes"),
    Column("compiler", "compiler"),
)


def kernels(results: Path) -> str:
    """What the compiler said about each kernel, as CSV: a page links to it."""
    path = results / KERNEL_RESULTS
    if not path.is_file():
        return not_measured(path)
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow([column.heading for column in KERNELS])
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row["what"] == "kernel":
            lines.writerow([cell(row, column) for column in KERNELS])
    return file.getvalue()


def generated(root: Path) -> dict[str, str]:
    """Every generated page part, file name -> text."""
    parts = {f"{name}.md": markdown(table, root / "results") for name, table in TABLES.items()}
    parts["notebooks.md"] = stamps(root)
    parts["jetpack.md"] = jetpacks()
    parts["tensorrt_lines.md"] = tensorrt_lines()
    parts["arm64.md"] = part_of(root / "results" / ARM64, arm64)
    parts["arm64_libraries.md"] = part_of(root / "results" / ARM64, arm64_libraries)
    parts["tensorrt_names.md"] = part_of(root / "results" / "tensorrt_names.json", tensorrt_names)
    parts["portability_policy.md"] = policy()
    parts["faults_total.md"] = part_of(root / "results" / "faults.json", faults)
    parts |= {
        f"{name}.md": part_of(root / "results" / results, part, library)
        for name, (results, library, part) in GPU_TABLES.items()
    }
    parts["nms_boxes.md"] = gpu.boxes_2000(root / "results")
    parts["nms_kernels.csv"] = kernels(root / "results")
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


def jetpacks() -> str:
    """Which JetPack has which TensorRT, and whether that has what odtrt needs."""
    rows = []
    for one in boards.JETPACKS:
        line = boards.tensorrt_line(one.tensorrt)
        stated = "" if one.is_vendor_stated else " ¹"
        rows.append(
            [
                f"**{one.release}**: {', '.join(one.l4t)}",
                one.boards,
                f"{one.tensorrt}{stated}",
                one.cuda,
                one.python,
                "yes" if line.is_supported else "no",
            ]
        )
    headings = ["**JetPack**: Jetson Linux", "boards", "TensorRT", "CUDA", "Python", "enough for odtrt"]
    needs = "odtrt needs TensorRT 8.5 and Python 3.8"
    others = "; ".join(f"{one.release}: {one.source}" for one in boards.JETPACKS if not one.is_vendor_stated)
    source = (
        f"*{needs}. ¹ Not stated by NVIDIA ({others}). `odtrt_lib/boards.py`; none of it was run on a board.*"
    )
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
        ]
        for line in boards.TENSORRT
        if line.is_supported
    ]
    headings = [
        *("TensorRT", "plugin interface", "half precision", "INT8"),
        *("version-compatible", "hardware-compatible"),
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


ARM64 = "aarch64.cpu.json"


def arm64(measured: dict[str, Any]) -> str:
    """What an emulated arm64 system computes, beside this machine."""
    lines = []
    for row in measured["rows"]:
        if row["check"] in ("bits", "heads"):
            error = f"{row['max_abs_err']:.0e}, of {row['max_abs']:.1f}" if "max_abs_err" in row else NONE
            error = error.replace("e-", f"e{NO_BREAK_HYPHEN}")
            lines.append([row["compared"], f"{row['values']:,}", f"{row['different_values']:,}", error])
    same = next(row for row in measured["rows"] if row["check"] == "agreement")
    words = (
        f"Of {same['references']} detections in {same['pictures']} pictures {same['matched']} are the same, "
        f"{same['missing']} missing, {same['extra']} extra. "
    )
    table = grid(["compared", "values", "that differ", "largest difference"], lines)
    return f"{table}\n\n*{words}{arm64_source(measured)}*\n"


def arm64_libraries(measured: dict[str, Any]) -> str:
    """The libraries that were compiled here for a board."""
    lines = [
        [
            f"`{row['library']}`",
            f"{row['target']}, {row['gpu']}",
            f"CUDA {row['cuda']}, headers of TensorRT {row['tensorrt_headers']}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['needs_glibc']} / {row['needs_glibcxx']}",
        ]
        for row in measured["rows"]
        if row["check"] == "cross-compiled"
    ]
    registry = next(row for row in measured["rows"] if row["check"] == "registry")
    did = {
        "loads": "loads the plugin",
        "creator_found": "finds its creator",
        "plugin_made": "makes a plugin",
        "refused_without_an_attribute": "is refused one where an attribute is missing",
    }
    said = ", ".join(words if registry[key] else f"does not: {words}" for key, words in did.items())
    words = f"The registry of {registry['runtime']} {registry['version']} for arm64 {said}. "
    headings = ["library", "for", "compiled with", "MB", "needs glibc / GLIBCXX"]
    return f"{grid(headings, lines)}\n\n*{words}{arm64_source(measured)}*\n"


def arm64_source(measured: dict[str, Any]) -> str:
    system = next(row for row in measured["rows"] if row["check"] == "system")
    return (
        f"Run on {measured['date'][:10]} in {system['system']} for {system['machine']}, Python "
        f"{system['python']}, ONNX Runtime {system['onnxruntime']}, under {system['emulator']} on a "
        f"processor with {measured['device']['cores']} cores; `results/{measured['file']}`, written by "
        f"`{measured['command']}`."
    )


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
        gaps += [f"{model_name(model)}{where}"] if lacks else []
    if not gaps:
        return "*Every model that was built without a GPU was measured.*\n"
    return f"*Of the models that were built without a GPU, not measured in this way: {', '.join(gaps)}.*\n"


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
