"""Tables of the book whose cells come from several rows of a results file, most of them of a GPU.

Each function takes a measurement as its file has it, with the file's name under ``file`` and that of the
library whose versions the rows have under ``library``. It returns Markdown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from book_grid import (
    NO_BREAK_HYPHEN,
    NONE,
    SLASH,
    Column,
    Row,
    cell,
    grid,
    model_name,
    not_measured,
    source_of,
    written,
)
from book_plots import ARITHMETIC

Measured = dict[str, Any]

GOALS = (
    ("EfficientDet-D0, 49,104 anchors", 49104, 0.05, 20),
    ("EfficientDet-D0, 49,104 anchors", 49104, 1e-8, 30),
    ("1024 pixels, 196,416 anchors", 196416, 0.3, 45),
    ("1024 pixels, 196,416 anchors", 196416, 0.05, 45),
    ("1024 pixels, 196,416 anchors", 196416, 1e-8, 45),
)
GOAL_OF_2000_BOXES = 15


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
            name = row["implementation"]
            found["PyTorch" if name.startswith("PyTorch") else name, row["score_threshold"]] = row
    lines = []
    for (model, anchors, _), found in heads.items():
        own = [found["odtrt", threshold] for threshold in thresholds]
        peers = [found.get(("PyTorch", threshold)) for threshold in thresholds[1:]]
        lines.append(
            [
                model_name(model),
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


# ---- Plans: a row a model, one arithmetic beside the other ----


def models_of(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """model -> arithmetic -> its row, of those that did not fail."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        own = found.setdefault(row["model"], {})
        if "error" not in row:
            own[row["arithmetic"]] = row
    return found


def by_model(measured: Measured, columns: Sequence[Column], note: str) -> str:
    """A row for each model; a cell has FP32 / TF32 / FP16."""
    lines = [
        [
            model_name(model),
            *(" / ".join(cell(own.get(name, {}), column) for name in ARITHMETIC) for column in columns),
        ]
        for model, own in models_of(measured["rows"]).items()
    ]
    table = grid(["model", *(column.heading for column in columns)], lines)
    return f"{table}\n\n*FP32 / TF32 / FP16. {note}{source_of(measured)}*\n"


def by_arithmetic(measured: Measured, column: Column, note: str) -> str:
    """A row for each model; a column for each arithmetic, with the one figure."""
    lines = [
        [model_name(model), *(cell(own.get(name, {}), column) for name in ARITHMETIC)]
        for model, own in models_of(measured["rows"]).items()
    ]
    table = grid(["model", *ARITHMETIC], lines)
    return f"{table}\n\n*{note}{source_of(measured)}*\n"


def optional(heading: str, key: str, form: str, divisor: float = 1, beside: str = "") -> Column:
    return Column(heading, key, form, divisor, is_optional=True, beside=beside)


def rtx_latency(measured: Measured) -> str:
    note = "Milliseconds of the network for one image, median / 99th percentile. "
    return by_arithmetic(measured, optional("", "p50_us", ".2f", 1000, "p99_us"), note)


def rtx_memory(measured: Measured) -> str:
    columns = (
        optional("building, GPU", "peak_gpu_mb", ",.0f"),
        optional("loading, host", "load_peak_rss_mb", ",.0f"),
        optional("loaded, GPU", "device_memory_mb", ",.0f"),
        optional("left after closing, GPU", "device_memory_left_mb", ",.0f"),
    )
    return by_model(measured, columns, "MiB. ")


def rtx_times(measured: Measured) -> str:
    columns = (
        optional("build", "build_cold_seconds", ".1f"),
        optional("built again", "build_warm_seconds", ".1f"),
        optional("first load", "load_cold_seconds", ".1f"),
        optional("loaded again", "load_warm_seconds", ".1f"),
    )
    return by_model(measured, columns, "Seconds. ")


# ---- Plans of TensorRT 8.5 ----


def of_form(measured: Measured, form: str) -> Measured:
    return {**measured, "rows": [row for row in measured["rows"] if row["form"] == form]}


def said(measured: Measured, words: str) -> str:
    """A sentence for a decision page; the tables behind it have the date and the command."""
    versions = ", ".join(sorted({row["version"] for row in measured["rows"] if "version" in row}))
    library = f"{measured['library']} {versions}".strip() or "it"
    gpu = measured["device"]["gpu"].removeprefix("NVIDIA ")
    return f"*{words} ({library} on one {gpu}; `results/{measured['file']}`.)*\n"


def times_as(measured: Measured, key: str, other: str, one: str) -> str:
    """Over all split plans, how the figure ``key`` of arithmetic ``other`` compares with that of ``one``."""
    ratios = [
        own[other][key] / own[one][key]
        for own in models_of(of_form(measured, "split")["rows"]).values()
        if other in own and one in own
    ]
    return f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else NONE


def trt_summary(measured: Measured) -> str:
    """How many plans were measured, how many pass, and what they find."""
    rows = [row for row in measured["rows"] if "error" not in row]
    trained = [row for row in rows if row["weights"] == "trained"]
    found = sum(row["missing"] == row["extra"] == 0 for row in trained)
    words = (
        f"{len(rows)} plans of {len({row['model'] for row in rows})} detectors were built and run, "
        f"{sum(row['form'] == 'fused' for row in rows)} with the plugin inside; "
        f"{sum(row['passed'] for row in rows)} pass. {found} of {len(trained)} with trained weights find "
        "what ONNX Runtime finds."
    )
    failed = len(measured["rows"]) - len(rows)
    return said(measured, words + (f" {failed} could not be measured." if failed else ""))


def trt_speed(measured: Measured) -> str:
    slower = times_as(measured, "network_graph_p50_us", "FP32", "TF32")
    faster = times_as(measured, "network_graph_p50_us", "FP16", "TF32")
    words = f"FP32 takes {slower} times as long as TF32, FP16 {faster} times."
    return said(measured, words)


def trt_cache(measured: Measured) -> str:
    return said(measured, f"With the timing cache a build is {speedup(measured)} times as fast.")


def trt_plugin_memory(measured: Measured) -> str:
    """What a loaded plan takes on the GPU without and with the plugin inside."""
    ranges = [
        f"{min(sizes):,.0f} to {max(sizes):,.0f} MiB of GPU memory {where} the plugin inside"
        for form, where in (("split", "without"), ("fused", "with"))
        if (sizes := [r["device_memory_mb"] for r in of_form(measured, form)["rows"] if "error" not in r])
    ]
    return said(measured, f"A loaded plan takes {', '.join(ranges)}.")


def speedup(measured: Measured) -> str:
    """How many times as fast the builds with a timing cache are, from the least to the most."""
    ratios = [
        row["build_cold_seconds"] / row["build_warm_seconds"]
        for row in of_form(measured, "split")["rows"]
        if row.get("build_cold_seconds") and row.get("build_warm_seconds")
    ]
    return f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else NONE


def trt_builds(measured: Measured) -> str:
    split = of_form(measured, "split")
    columns = optional("", "build_cold_seconds", ".0f", 1, "build_warm_seconds")
    note = (
        "Seconds, without / with the timing cache of the first build. With it a build is "
        f"{speedup(measured)} times as fast. "
    )
    loads = [row["load_seconds"] for row in measured["rows"] if row.get("load_seconds") is not None]
    if loads:
        note += f"Loading a plan, first run included, takes {min(loads)} to {max(loads)}. "
    return by_arithmetic(split, columns, note)


def trt_latency(measured: Measured) -> str:
    forms = [models_of(of_form(measured, form)["rows"]) for form in ("split", "fused")]
    column = optional("", "device_graph_p50_us", ".2f", 1000)
    lines = [
        [
            model_name(model),
            *(
                SLASH.join(cell(own.get(model, {}).get(name, {}), column) for own in forms)
                for name in ARITHMETIC
            ),
        ]
        for model in forms[0]
    ]
    note = (
        "Milliseconds of network and post-processing for one image in a CUDA graph, median, split / fused. "
    )
    return f"{grid(['model', *ARITHMETIC], lines)}\n\n*{note}{source_of(measured)}*\n"


def trt_half(measured: Measured) -> str:
    """The plans that FP16 was asked for: what became of the layers, and how large the plan is."""
    lines = []
    for model, own in models_of(of_form(measured, "split")["rows"]).items():
        if "FP16" not in own:
            continue
        half = own["FP16"]
        layers = sum(half[f"layers_{kind}"] for kind in ("fp16", "fp32", "other"))
        sizes = " / ".join(
            f"{own[name]['plan_mb']:.1f}" if name in own else NONE for name in ("FP32", "FP16")
        )
        lines.append([model_name(model), f"{half['layers_fp16']} of {layers}", sizes])
    table = grid(["model", "layers in FP16", "plan in FP32 / FP16, MB"], lines)
    return f"{table}\n\n*{source_of(measured)}*\n"


def trt_memory(measured: Measured) -> str:
    figures = (
        ("building, host", "split", "peak_rss_mb"),
        ("building, GPU", "split", "peak_gpu_mb"),
        ("loaded, split", "split", "device_memory_mb"),
        ("loaded, fused", "fused", "device_memory_mb"),
        ("left after closing", "split", "device_memory_left_mb"),
    )
    lines = []
    for model in models_of(measured["rows"]):
        line = [model_name(model)]
        for _, form, key in figures:
            own = [
                row[key]
                for row in of_form(measured, form)["rows"]
                if row["model"] == model and row.get(key) is not None
            ]
            line.append(f"{max(own):,.0f}" if own else NONE)
        lines.append(line)
    note = "MiB, the most of FP32, TF32 and FP16; what is loaded and left is the GPU's. "
    table = grid(["model", *(heading for heading, _, _ in figures)], lines)
    return f"{table}\n\n*{note}{source_of(measured)}*\n"


PLAN_AGREEMENT = (
    Column("model", "model"),
    Column("in", "arithmetic"),
    optional("boxes", "boxes_relative_err", ".1e"),
    optional("classes", "logits_relative_err", ".1e"),
    optional("missing / extra", "missing", "d", 1, "extra"),
    Column("passes", "passed", is_optional=True),
)


def plan_agreement(measured: Measured) -> str:
    """What each split plan computes, beside ONNX Runtime's single precision."""
    rows = [row for row in measured["rows"] if row.get("form", "split") == "split"]
    lines = [[cell(row, column) for column in PLAN_AGREEMENT] for row in rows]
    trained = dict.fromkeys(model_name(row["model"]) for row in rows if row.get("weights") == "trained")
    exact = [row["postprocessing_is_exact"] for row in rows if row.get("postprocessing_is_exact") is not None]
    note = (
        f"Trained weights: {', '.join(trained) or 'none'}. Post-processing on the GPU gives the CPU's bits "
        f"in {sum(exact)} of {len(exact)}. "
    )
    table = grid([column.heading for column in PLAN_AGREEMENT], lines)
    return f"{table}\n\n*{note}{source_of(measured)}*\n"


def cpu_half(measured: Measured) -> str:
    """ONNX Runtime's own FP16 on a processor, beside the plan's."""
    lines = [
        [
            model_name(row["model"]),
            *(
                SLASH.join(written(row, f"{who}{key}", Column("", "", ".1e")) for who in ("half_", ""))
                for key in ("boxes_relative_err", "logits_relative_err")
            ),
        ]
        for row in measured["rows"]
        if row.get("half_boxes_relative_err") is not None
    ]
    table = grid(["model, FP16", "boxes: CPU / GPU", "classes: CPU / GPU"], lines)
    return f"{table}\n\n*{source_of(measured)}*\n"


# ---- Other programs' NMS in engines ----

OURS, EFFICIENT, BATCHED = "OdtrtDetect", "EfficientNMS_TRT", "BatchedNMSDynamic_TRT"
FIVE, LAYER = "OdtrtDetect, five kernels", "NMS layer"
ALL_PEERS = {OURS: "odtrt", EFFICIENT: "EfficientNMS", BATCHED: "BatchedNMS"}
WITH_LAYER = {**ALL_PEERS, LAYER: "NMS layer"}


def peers(measured: Measured, sources: Sequence[str], names: dict[str, str]) -> str:
    """A row for each head and threshold, a column for each implementation of ``names``: name -> heading."""
    rows, is_drawn = (
        [row for row in measured["rows"] if row["source"] in sources],
        tuple(sources) == ("drawn",),
    )
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        case = (row["heads"], row["anchors"], row["classes"], row["score_threshold"])
        cases.setdefault(case, {})[row["implementation"]] = row

    def shown(row: Row | None) -> str:
        if row is None or "error" in row:
            return NONE
        time = f"{row['p50_us']:,.1f}" if row["p50_us"] < 100 else f"{row['p50_us']:,.0f}"
        raised = "*" if row["threshold_used"] != row["score_threshold"] else ""
        return f"{time}{raised}" + (f" ({row['missing']})" if row["missing"] else "")

    lines = []
    for (heads, anchors, classes, threshold), found in cases.items():
        what = model_name(heads)
        if classes == 1:
            what = f"{anchors:,} boxes"
        elif heads == "8 objects":
            what = f"{anchors:,}" if is_drawn else f"{anchors:,} anchors"
        above = NONE if classes == 1 else f"{threshold:g}".replace("e-", f"e{NO_BREAK_HYPHEN}")
        lines.append([what, above, *(shown(found.get(name)) for name in names)])
    heading = "anchors" if is_drawn else "heads"
    note = "Microseconds, median, in an engine in a CUDA graph. "
    if BATCHED in names:
        note += f"The peers are TensorRT's {EFFICIENT} and {BATCHED}. "
    if LAYER in names:
        note += "The NMS layer, which no CUDA graph can hold: the wall clock of one call. "
    if any(row.get("missing") for row in rows if row["implementation"] in names):
        note += "In brackets: how many of the Object Detection API's detections are missing. "
    if any("*" in text for line in lines for text in line):
        note += "\\*: above 0.01, because its documentation warns of less. "
    table = grid(
        [heading, "above", *names.values()], [[text.replace("*", "\\*") for text in line] for line in lines]
    )
    return f"{table}\n\n*{note}{source_of(measured)}*\n"


def peers_drawn(measured: Measured) -> str:
    return peers(measured, ("drawn",), ALL_PEERS)


def peers_recorded(measured: Measured) -> str:
    return peers(measured, ("recorded",), WITH_LAYER)


def peers_five(measured: Measured) -> str:
    names = {OURS: "two kernels, clusters", FIVE: "five kernels, no clusters"}
    return peers(measured, ("drawn", "recorded"), names)


def peers_summary(measured: Measured) -> str:
    """Where ours is faster, by how much, and who loses detections."""
    rows = [row for row in measured["rows"] if "error" not in row]
    times = {(row["implementation"], case_of(row)): row["p50_us"] for row in rows}
    ratios = sorted(
        times[EFFICIENT, case] / time
        for (name, case), time in times.items()
        if name == OURS and (EFFICIENT, case) in times
    )
    losses = [
        f"{name} in {sum(row['missing'] > 0 for row in own)} of {len(own)}"
        for name in WITH_LAYER
        if (own := [row for row in rows if row["implementation"] == name])
    ]
    words = (
        f"`{EFFICIENT}` takes {ratios[0]:.1f} to {ratios[-1]:.0f} times as long as odtrt's plugin. "
        f"Cases with missing detections: {', '.join(losses)}."
    )
    return said(measured, words)


def peers_layer(measured: Measured) -> str:
    """The NMS layer on the drawn heads, which a decision page shows without it."""
    return peers(measured, ("drawn",), {OURS: "odtrt", LAYER: "NMS layer"})


def case_of(row: Row) -> tuple[Any, ...]:
    return row["heads"], row["anchors"], row["score_threshold"]


def boxes_2000(results: Path) -> str:
    """The article's case by each program that was timed: from three files, as far as they are there."""

    def rows_of(name: str, **wanted: Any) -> list[Row]:
        path = results / name
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        return [row for row in rows if wanted.items() <= row.items()]

    on_gpu = rows_of("nms.h200.json", what="nms", boxes=2000)
    in_engine = rows_of("nms_peers.h200.json", heads="boxes of one class")
    on_cpu = rows_of("nms.cpu.json", work="nms")
    own = {
        "odtrt": "odtrt, one call in a CUDA graph",
        "native": "odtrt",
        "numpy": "odtrt's reference in NumPy",
    }
    cpu = {**own, "tensorflow": "TensorFlow", "onnxruntime": "ONNX Runtime"}
    lines = [
        [own.get(row["implementation"], row["implementation"]), "H200", f"{row['kept']:,}", time]
        for row in on_gpu
        for time in [f"{row.get('graph_p50_us', row['p50_us']):,.0f}"]
    ]
    lines += [
        [f"{row['implementation']} in an engine{clock}", "H200", f"{row['found']:,}", f"{row['p50_us']:,.0f}"]
        for row in in_engine
        for clock in [", by the wall clock" if row.get("timed_by") == "wall clock" else ""]
        if "error" not in row
    ]
    lines += [[cpu[row["implementation"]], "2 cores", NONE, f"{row['p50_us']:,.0f}"] for row in on_cpu]
    if not lines:
        return not_measured(results / "nms_peers.h200.json")
    table = grid(["program", "on", "boxes kept", "median, µs"], lines)
    files = "`results/nms.h200.json`, `results/nms_peers.h200.json` and `results/nms.cpu.json`"
    return f"{table}\n\n*Boxes of one class, IoU 0.5; not every file has the same boxes. {files}.*\n"


# ---- NVIDIA's sample, beside ours ----

WAYS = {"nvidia": "NVIDIA's sample", "odtrt": "odtrt"}
STEPS = {"nvidia": ("exporter_main_v2", "create_onnx"), "odtrt": ("export", "convert", "fuse")}


def side_by_side(measured: Measured, columns: Sequence[Column], note: str) -> str:
    """A row for each detector and each way to make its plan."""
    rows = [row for row in measured["rows"] if row["kind"] == "detector" and "error" not in row]
    if not rows:
        return f"*Not measured yet: `results/{measured['file']}` has no such row.*\n"
    lines = [
        [
            detector_name(row["model"]),
            row["precision"],
            WAYS[row["way"]],
            *(cell(row, one) for one in columns),
        ]
        for row in rows
    ]
    table = grid(["model", "in", "made by", *(column.heading for column in columns)], lines)
    return f"{table}\n\n*{note}{source_of({**measured, 'rows': rows})}*\n"


def detector_name(name: str) -> str:
    """The model's short name, and the score threshold that benchmarks/peers.py gave it, if any."""
    base, _, threshold = name.partition("_at_")
    return f"{model_name(base)} above {threshold}" if threshold else model_name(base)


def side_times(measured: Measured) -> str:
    columns = (
        optional("plan on the GPU, ms", "device_graph_p50_us", ".2f", 1000),
        optional("picture to boxes, ms", "detect_p50_us", ".2f", 1000),
        optional("with all switches, ms", "detect_best_p50_us", ".2f", 1000),
        optional("layers in FP16", "layers_fp16", "d", 1, "layers"),
        optional("plan, MB", "plan_mb", ".1f"),
        optional("loaded, MiB", "device_memory_mb", ",.0f"),
    )
    note = (
        "Medians. *All switches*: pinned memory, preprocessing on the GPU, a CUDA graph; the sample has none "
        "of them. Layers: in FP16 / all. "
    )
    return side_by_side(measured, columns, note)


def side_found(measured: Measured) -> str:
    trained = [row for row in measured["rows"] if row.get("weights") == "trained"]
    columns = (
        optional("of", "references", ","),
        optional("matched", "matched", ","),
        optional("missing / extra", "missing", ",", 1, "extra"),
        optional("same object", "found", ","),
        optional("wrong class", "wrong_class", ","),
        optional("scores differ by", "max_score_difference", ".3f"),
        optional("corners differ by, px", "shift_px", ".2f"),
    )
    pictures = " / ".join(dict.fromkeys(str(row["pictures"]) for row in trained if "pictures" in row))
    note = f"Detections of the Object Detection API in {pictures} pictures. "
    return side_by_side({**measured, "rows": trained}, columns, note)


def road(measured: Measured) -> str:
    """What the way from the checkpoint to the ONNX file for TensorRT takes."""
    steps = {
        (row["model"], row["way"], row["step"]): row
        for row in measured["rows"]
        if row["kind"] == "road" and "error" not in row
    }
    lines = []
    for model in dict.fromkeys(model for model, _, _ in steps):
        line = [model_name(model)]
        for way, names in STEPS.items():
            own = [steps[model, way, name] for name in names if (model, way, name) in steps]
            if len(own) < len(names):
                line += [NONE, NONE]
                continue
            seconds = [row["cpu_seconds"] for row in own]
            line.append(f"{' + '.join(f'{one:.0f}' for one in seconds)} = {sum(seconds):.0f}")
            line.append(f"{max(row['peak_rss_mb'] for row in own):,}")
        lines.append(line)
    headings = ["model", "the sample's two steps, s", "peak, MiB", "odtrt's three steps, s", "peak, MiB"]
    return f"{grid(headings, lines)}\n\n*Processor time. {road_source(measured, steps.values())}*\n"


def road_failures(measured: Measured) -> str:
    """The steps of that way that fail, and what they say."""
    failed = [row for row in measured["rows"] if row["kind"] == "road" and "error" in row]
    lines = [
        [model_name(row["model"]), row["step"], row["error"].replace("|", "\\|"), row.get("changes", NONE)]
        for row in failed
    ]
    table = grid(["model", "step of the sample", "what it says", "changed for it"], lines)
    return f"{table}\n\n*{road_source(measured, failed)}*\n"


def road_source(measured: Measured, rows: Iterable[Row]) -> str:
    environments = "; ".join(dict.fromkeys(row["environment"] for row in rows))
    return (
        f"On a workstation, without a GPU. {environments}. `results/{measured['file']}`; "
        "`benchmarks/peers.py` says how."
    )


def side_summary(measured: Measured) -> str:
    """One sentence on each pair: the time of the plan, and what is found."""
    pairs = tally(
        (row for row in measured["rows"] if row["kind"] == "detector" and row.get("weights") == "trained"),
        lambda row: (row["model"], row["precision"]),
    )
    words = []
    for (model, precision), rows in pairs.items():
        own = {row["way"]: row for row in rows if "error" not in row}
        if set(own) != set(WAYS):
            continue
        finds = [
            f"the plan of {WAYS[way]} takes {row['device_graph_p50_us'] / 1000:.2f} ms and gives "
            f"{row['matched']} of {row['references']} detections as the Object Detection API does"
            for way, row in own.items()
        ]
        words.append(f"{detector_name(model)} in {precision}: {', '.join(finds)}.")
    return said(measured, " ".join(words) or "No pair was measured.")


# ---- The memory that stays ----


def device_memory(measured: Measured) -> str:
    """What a closed plan leaves on the GPU, and what the threads' stacks have of it."""
    lines = []
    for row in measured["rows"]:
        if "error" in row:
            continue
        grown = (row["stack_bytes_after"] - row["stack_bytes"]) * row["threads"] / 2**20
        lines.append(
            [
                model_name(row["model"]),
                row["arithmetic"],
                *(f"{row[key]:,.0f}" for key in ("device_memory_mb", "left_mb")),
                f"{row['stack_bytes']:,}{SLASH}{row['stack_bytes_after']:,}",
                f"{grown:,.0f}",
                f"{row['left_after_stack_reset_mb']:,.0f}",
            ]
        )
    headings = ["model", "in", "loaded", "left after closing", "stack, bytes: before / after"]
    threads = ", ".join(dict.fromkeys(f"{row['threads']:,}" for row in measured["rows"] if "threads" in row))
    table = grid([*headings, "all stacks grew by", "left with the old limit"], lines)
    return f"{table}\n\n*MiB, but for the stack of one thread. {threads} threads. {source_of(measured)}*\n"


# ---- The pipeline, whole detectors ----


def pipelines(measured: Measured) -> str:
    """A row for each setting of memory, preprocessing and launch; a column for each way to post-process."""
    ways = {("split", "gpu"): "split, GPU", ("fused", "gpu"): "fused", ("split", "cpu"): "split, CPU"}
    cases: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in measured["rows"]:
        case = (row["memory"], row["preprocess"], row["launch"])
        if len({other["model"] for other in measured["rows"]}) > 1:
            case = (model_name(row["model"]), *case)
        cases.setdefault(case, {})[row["form"], row["postprocess"]] = row
    column = optional("", "detect_p50_us", ".2f", 1000, "detect_p99_us")
    lines = [
        [", ".join(case), *(cell(found.get(way, {}), column) for way in ways)]
        for case, found in cases.items()
    ]
    table = grid(["memory, preprocessing, launch", *ways.values()], lines)
    same = sum(row["same_bits"] for row in measured["rows"])
    models = ", ".join(dict.fromkeys(model_name(row["model"]) for row in measured["rows"]))
    note = (
        f"Milliseconds from a decoded image in NumPy's memory to detections there, median / 99th percentile; "
        f"{models}, FP16. {same} of {len(measured['rows'])} settings give the same bits. "
    )
    return f"{table}\n\n*{note}{source_of(measured)}*\n"


def served_by(row: Row) -> str:
    """What a detector was opened with, short: the program, and what it multiplies in."""
    program = row.get("description", "TensorRT-RTX").partition(" 1.")[0]
    return f"{program}, {row['arithmetic']}"


def backends(measured: Measured) -> str:
    columns = (
        optional("p50 / p99, ms", "detect_p50_us", ".2f", 1000, "detect_p99_us"),
        optional("of eight together, ms", "detect8_p50_us", ".2f", 1000),
        optional("network alone, ms", "network_p50_us", ".2f", 1000),
    )
    lines = [
        [row["model"], served_by(row), *(cell(row, column) for column in columns)] for row in measured["rows"]
    ]
    table = grid(["model", "served by", *(column.heading for column in columns)], lines)
    return f"{table}\n\n*{source_of(measured)}*\n"


def backends_agreement(measured: Measured) -> str:
    """Which of ONNX Runtime's boxes each plan finds again: all, and those with a score of 0.3 and more."""
    lines = []
    for row in measured["rows"]:
        if not row.get("references") or row["backend"] not in ("tensorrt", "tensorrt_rtx"):
            continue
        lines.append(
            [
                row["model"],
                row["arithmetic"],
                f"{row['matched']:,} of {row['references']:,}",
                f"{row['missing']} / {row['extra']}",
                f"{row['sure_missing']} / {row['sure_extra']} of {row['sure_references']:,}",
                f"{row['max_score_difference']:.3f}",
                f"{row['min_iou']:.2f}",
            ]
        )
    headings = ["model", "in", "found again", "missing / extra", "the same, scores from 0.3"]
    return f"{grid([*headings, 'scores differ by', 'least IoU'], lines)}\n\n*{source_of(measured)}*\n"


# ---- Which TensorRT loads whose plan ----


def tally(rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> dict[tuple[str, ...], list[Row]]:
    """The rows by ``key``, in the order in which each first comes."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def share(rows: Sequence[Row], key: str) -> str:
    """Of how many rows ``key`` is true: yes, no, or a count."""
    count = sum(bool(row[key]) for row in rows)
    return "yes" if count == len(rows) else "no" if count == 0 else f"{count} of {len(rows)}"


def asked(measured: Measured, *kinds: str) -> list[Row]:
    """The rows of these kinds that have an answer."""
    return [row for row in measured["rows"] if row["kind"] in kinds and "error" not in row]


def version_matrix(measured: Measured) -> str:
    """Plans by the TensorRT that built them and the one that they were given to."""
    lines = []
    for (by, into), rows in tally(
        asked(measured, "plan"), lambda row: (row["built_by"], row["loaded_in"])
    ).items():
        verdicts = " / ".join(dict.fromkeys(row["verdict"] for row in rows))
        lines.append([by, into, str(len(rows)), verdicts, share(rows, "loads"), share(rows, "agree")])
    table = grid(["built by", "given to", "plans", "odtrt says", "loads", "they agree"], lines)
    return f"{table}\n\n*{source_of(measured)}*\n"


def version_messages(measured: Measured) -> str:
    """What TensorRT says where it does not load a plan, a row for each message."""
    refused = [row for row in asked(measured, "plan", "hidden", "damage") if not row["loads"]]
    lines = [
        [
            message.replace("|", "\\|") or NONE,
            ", ".join(dict.fromkeys(row["loaded_in"] for row in rows)),
            str(len(rows)),
        ]
        for (message,), rows in tally(refused, lambda row: (row.get("message", ""),)).items()
    ]
    return f"{grid(['message', 'of', 'rows'], lines)}\n\n*{source_of(measured)}*\n"


def version_damage(measured: Measured) -> str:
    """Plans that were damaged or have no GPU, by what was done to them."""
    lines = [
        [
            case,
            str(len(rows)),
            " / ".join(dict.fromkeys(row["verdict"] for row in rows)),
            share(rows, "loads"),
        ]
        for (case,), rows in tally(asked(measured, "damage", "hidden"), lambda row: (row["case"],)).items()
    ]
    table = grid(["what was done", "plans", "odtrt says", "TensorRT loads it"], lines)
    return f"{table}\n\n*{source_of(measured)}*\n"


def version_caches(measured: Measured) -> str:
    """Timing caches by the TensorRT that wrote them and the builder that was given them."""
    lines = [
        [by, into, " / ".join(dict.fromkeys(row["verdict"] for row in rows)), share(rows, "loads")]
        for (by, into), rows in tally(
            asked(measured, "timing cache"), lambda row: (row["built_by"], row["loaded_in"])
        ).items()
    ]
    table = grid(["cache of", "given to", "odtrt keeps them", "builder takes it"], lines)
    return f"{table}\n\n*{source_of(measured)}*\n"


def version_summary(measured: Measured) -> str:
    rows = asked(measured, "plan", "hidden", "damage", "timing cache")
    plans = asked(measured, "plan")
    words = (
        f"{len(plans)} times a plan was given to a TensorRT; {sum(row['loads'] for row in plans)} times it "
        f"loaded, and {sum(row['agree'] for row in plans)} times odtrt had said so. Damaged plans and timing "
        f"caches included, odtrt allowed what TensorRT refuses in {sum(not row['safe'] for row in rows)} of "
        f"{len(rows)} cases."
    )
    return said(measured, words)


# ---- The fallback with a real builder ----


def fallback_settings(measured: Measured) -> str:
    """What each step of the fallback lowers, alone and without a limit."""
    columns = (
        Column("model", "model"),
        Column("step", "step"),
        optional("seconds", "seconds", ".0f"),
        optional("host, MiB", "peak_rss_mb", ",.0f"),
        optional("GPU, MiB", "peak_gpu_mb", ",.0f"),
    )
    rows = [row for row in measured["rows"] if row["kind"] == "setting"]
    lines = [[cell(row, column) for column in columns] for row in rows]
    return f"{grid([column.heading for column in columns], lines)}\n\n*{source_of(measured)}*\n"


def fallback_limits(measured: Measured) -> str:
    """The steps that were tried under a limit, in order."""
    lines = [
        [
            model_name(row["model"]),
            f"{row['limit_mb']:,} MiB, {row['kind']}",
            row["step"] or NONE,
            row["outcome"].replace("|", "\\|"),
            cell(row, optional("", "peak_rss_mb", ",.0f", 1, "peak_gpu_mb")),
        ]
        for row in measured["rows"]
        if row["kind"] in ("host", "device")
    ]
    table = grid(["model", "limit", "step", "outcome", "host / GPU, MiB"], lines)
    return f"{table}\n\n*{source_of(measured)}*\n"


def fallback_summary(measured: Measured) -> str:
    rows = measured["rows"]
    cases = tally((row for row in rows if row["kind"] in ("host", "device")), case_of_fallback)
    built = sum(any(row["built"] for row in own) for own in cases.values())
    words = f"{built} of {len(cases)} builds under a limit of the host's or the GPU's memory gave a plan."
    return said(measured, words)


def case_of_fallback(row: Row) -> tuple[str, ...]:
    return row["model"], row["kind"], row["case"]
