"""Draws the figures of the book that come from measurements, as SVG in the page's own colours.

scripts/book_tables.py writes them beside the tables; a page includes one by ``{raw} html``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from book_grid import model_name

Row = dict[str, Any]

WIDTH, LEFT, RIGHT, TOP, LINE = 720, 130, 24, 66, 34
MARKS = {0.3: "a", 0.05: "b", 1e-8: "c"}  # score threshold -> CSS class of its dot
PLAIN = {"source": "drawn", "model": "8 objects", "dtype": "float32", "batch": 1, "what": "postprocess"}


def nms_gpu(results: Path) -> str:
    """Time of the post-processing against the number of anchors: floor, odtrt's kernels, PyTorch."""
    path = results / "nms.h200.json"
    if not path.is_file():
        return f"<p><em>Not measured yet: <code>results/{path.name}</code> does not exist.</em></p>\n"
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        row
        for row in measured["rows"]
        if all(row.get(key) == value for key, value in PLAIN.items())
        and (row["implementation"] == "odtrt" or row["implementation"].startswith("PyTorch"))
    ]
    if not rows:
        raise ValueError(f"{path}: no row with {PLAIN}")
    sizes = sorted({row["anchors"] for row in rows})
    times = [row["graph_p50_us"] for row in rows if "graph_p50_us" in row]
    times += [row["p50_us"] for row in rows] + [row["floor_us"] for row in rows if "floor_us" in row]
    scale = Scale(times)
    height = TOP + LINE * len(sizes) + 44
    text = (
        f"Microseconds for one image of 90 classes on {measured['device'].get('gpu', 'a GPU')}, "
        f"for {', '.join(f'{size:,}' for size in sizes)} anchors: the time to read the logits, odtrt's "
        "kernels at three score thresholds, and PyTorch. The evidence page has the figures."
    )
    parts = [
        *figure("nms-gpu", height, "Post-processing of one image on the GPU", text),
        *legend(),
        *scale.grid(TOP - 14, height - 38),
        f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        "microseconds, logarithmic</text>",
    ]
    for number, size in enumerate(sizes):
        parts += line([row for row in rows if row["anchors"] == size], TOP + LINE * number, scale)
    return "\n".join([*parts, "</svg></div>"]) + "\n"


def engine_memory(results: Path) -> str:
    """Host memory over the time of a build, attempt by attempt, under the limit that it had."""
    path = results / "engine.cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    samples = [row for row in rows if row["kind"] == "sample"]
    if not samples:
        return f"<p><em>Not measured yet: <code>results/{path.name}</code> has no samples.</em></p>\n"
    case = samples[0]["case"]
    steps = [row for row in rows if row["kind"] == "fallback" and row["case"] == case]
    limit, model = steps[0]["limit_mb"], steps[0]["model"]
    most = max(limit, *(row["rss_mb"] for row in samples), *(step["peak_rss_mb"] for step in steps)) * 1.12
    starts, end = {}, 0.0
    for step in steps:
        starts[step["number"]] = end
        end += max(row["seconds"] for row in samples if row["number"] == step["number"]) * 1.06
    area = MemoryArea(end, most)
    parts = [
        *figure(
            "engine-memory",
            area.bottom + 44 + 21 * len(steps),
            "Memory of a build under a limit, attempt by attempt",
            f"Host memory in MiB over time while {model} is built under a limit of {limit} MiB: "
            + "; ".join(f"{step['step']}: {step['outcome']}" for step in steps)
            + ". A dot marks the peak of each attempt. The table has the peaks.",
        ),
        *area.grid(limit),
    ]
    for row, step in enumerate(steps):
        own = [sample for sample in samples if sample["number"] == step["number"]]
        parts += area.attempt(step, own, starts[step["number"]], area.bottom + 44 + 21 * row)
    return "\n".join([*parts, "</svg></div>"]) + "\n"


@dataclasses.dataclass(frozen=True)
class MemoryArea:
    """Where :func:`engine_memory` draws: x is time, ``seconds`` in all, y is memory, at most ``most`` MiB."""

    seconds: float
    most: float
    left: int = 70
    right: int = WIDTH - 16
    top: int = 30
    bottom: int = 290

    def x(self, seconds: float) -> float:
        return round(self.left + seconds / self.seconds * (self.right - self.left), 1)

    def y(self, megabytes: float) -> float:
        return round(self.bottom - megabytes / self.most * (self.bottom - self.top), 1)

    def grid(self, limit: float) -> list[str]:
        left, right = self.left, self.right
        parts = [
            f'<text class="soft" x="{left}" y="16">MiB of the building process. '
            "Line: samples. Dot: the peak that the kernel recorded</text>"
        ]
        for megabytes in range(0, int(self.most), 100 if self.most > 250 else 50):
            y = self.y(megabytes)
            parts.append(f'<path class="grid" d="M{left} {y} H{right}"/>')
            parts.append(
                f'<text class="soft" x="{left - 8}" y="{y + 4}" text-anchor="end">{megabytes}</text>'
            )
        parts.append(f'<path class="limit" d="M{left} {self.y(limit)} H{right}"/>')
        parts.append(
            f'<text class="soft" x="{left + 6}" y="{self.y(limit) - 6}">limit, {limit} MiB</text>'
            f'<text class="soft" x="{(left + right) / 2:.0f}" y="{self.bottom + 20}" text-anchor="middle">'
            f"one attempt after the other, {self.seconds:.0f} seconds together</text>"
        )
        return parts

    def attempt(self, step: Row, samples: Sequence[Row], start: float, line: int) -> list[str]:
        """The curve of one attempt, its peak, and what became of it in words at y = ``line``."""
        number, left = step["number"], self.left
        points = " ".join(f"{self.x(start + row['seconds'])},{self.y(row['rss_mb'])}" for row in samples)
        kind, mark = ("good", "✓") if step["outcome"] == "built" else ("bad", "✗")
        peak = f"peak {step['peak_rss_mb']:.0f} MiB"
        middle = self.x(start + samples[-1]["seconds"] / 2)
        highest = max(samples, key=lambda row: row["rss_mb"])
        return [
            f'<polyline class="trace {kind}" points="{points}"><title>'
            f"{escape(step['step'])}: {escape(step['outcome'])}, {peak}</title></polyline>",
            f'<circle class="peak {kind}" cx="{self.x(start + highest["seconds"])}" '
            f'cy="{self.y(step["peak_rss_mb"])}" r="5"/>',
            f'<text class="{kind} mark" x="{middle}" y="{self.bottom - 10}" text-anchor="middle">'
            f"{number} {mark}</text>"
            f'<text class="{kind} mark" x="{left}" y="{line}">{number} {mark}</text>'
            f'<text class="ink" x="{left + 42}" y="{line}">{escape(step["step"])}: '
            f"{escape(step['outcome'])}, {peak}</text>",
        ]


ARITHMETIC = {"FP32": "c", "TF32": "b", "FP16": "a"}  # arithmetic -> CSS class of its dot


def engine_gpu(results: Path) -> str:
    """Latency of one image, and the load without and with kept kernels, by model and arithmetic."""
    path = results / "engine.h200.json"
    if not path.is_file():
        return f"<p><em>Not measured yet: <code>results/{path.name}</code> does not exist.</em></p>\n"
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows = {(row["model"], row["arithmetic"]): row for row in measured["rows"] if "error" not in row}
    models = list(dict.fromkeys(model for model, _ in rows))
    left, gap, top, step, block = 84, 84, 100, 18, 88
    middle = (left + WIDTH - RIGHT) // 2
    latency = Scale([row["p50_us"] / 1000 for row in rows.values()], left, middle - gap // 2)
    loads = [row[f"load_{name}_seconds"] for row in rows.values() for name in ("warm", "cold")]
    load = Scale(loads, middle + gap // 2, WIDTH - RIGHT)
    bottom = top + block * len(models) - 24
    text = (
        f"{', '.join(map(model_name, models))} on {measured['device'].get('gpu', 'a GPU')}, each in "
        f"{', '.join(ARITHMETIC)} as far as measured: milliseconds of the network for one image, and seconds "
        "to load the plan the first time and again. The tables have the figures."
    )
    parts = [
        *figure("engine-gpu", bottom + 40, "Plans on a GPU by model and arithmetic", text),
        *arithmetic_legend(),
        f'<text class="ink" x="{latency.left}" y="{top - 42}">one image, ms</text>',
        f'<text class="ink" x="{load.left}" y="{top - 42}">load, s: again (ring), first (dot)</text>',
        *latency.grid(top - 32, bottom),
        *load.grid(top - 32, bottom),
        f'<text class="soft" x="{middle}" y="{bottom + 36}" text-anchor="middle">'
        "both axes logarithmic</text>",
    ]
    for number, model in enumerate(models):
        y = top + block * number
        parts.append(f'<text class="ink halo" x="24" y="{y - 14}">{escape(model_name(model))}</text>')
        for place, (name, mark) in enumerate(ARITHMETIC.items()):
            found = rows.get((model, name))
            parts += plan_line(found, name, mark, y + step * place, latency, load)
    return "\n".join([*parts, "</svg></div>"]) + "\n"


def plan_line(row: Row | None, name: str, mark: str, y: float, latency: Scale, load: Scale) -> list[str]:
    """One model in one arithmetic: a dot at its latency; a ring and a dot at the loads, again and first."""
    parts = [f'<text class="soft" x="{latency.left - 12}" y="{y + 4}" text-anchor="end">{name}</text>']
    if row is None:
        return [*parts, f'<text class="soft halo" x="{latency.left + 6}" y="{y + 4}">not measured</text>']
    milliseconds = row["p50_us"] / 1000
    x, again, first = (
        latency.at(milliseconds),
        *(load.at(row[f"load_{name}_seconds"]) for name in ("warm", "cold")),
    )
    what = f"{escape(model_name(row['model']))}, {name}"
    return [
        *parts,
        f'<circle class="dot {mark}" cx="{x}" cy="{y}" r="6">'
        f"<title>{what}: {milliseconds:.2f} ms</title></circle>",
        f'<text class="soft halo" x="{x + 11}" y="{y + 4}">{milliseconds:.2f}</text>',
        f'<path class="span" d="M{again} {y} H{first}"/>',
        f'<circle class="dot ring {mark}" cx="{again}" cy="{y}" r="5"/>',
        f'<circle class="dot {mark}" cx="{first}" cy="{y}" r="6"><title>{what}: loaded first in '
        f"{row['load_cold_seconds']:.1f} s, again in {row['load_warm_seconds']:.1f} s</title></circle>",
        f'<text class="soft halo" x="{again - 10}" y="{y + 4}" text-anchor="end">'
        f"{row['load_warm_seconds']:.1f}</text>",
        f'<text class="soft halo" x="{first + 11}" y="{y + 4}">{row["load_cold_seconds"]:.1f}</text>',
    ]


def arithmetic_legend() -> list[str]:
    parts, x = [], 30
    for name, mark in ARITHMETIC.items():
        parts.append(f'<circle class="dot {mark}" cx="{x}" cy="18" r="6"/>')
        parts.append(f'<text class="ink" x="{x + 14}" y="23">{name}</text>')
        x += 80
    return parts


# What check() asks, in order, and the rules of odtrt_lib.portability.POLICY that say no.
QUESTIONS = (
    (
        ("Is it the file that its passport describes?", "size, SHA-256, version in the header"),
        ("plan missing", "plan of another size", "plan damaged", "header disagrees"),
    ),
    (
        ("Is the plugin there, with the interface it was built for?", "only for a plan with a plugin inside"),
        ("plugin missing", "plugin of another ABI"),
    ),
    (
        ("Same ONNX model, spec.json and plugin?", "by their SHA-256"),
        ("model changed", "other plugin"),
    ),
    (
        ("Same operating system and processor architecture?", "TensorRT-RTX: same architecture"),
        ("other system", "other architecture, RTX"),
    ),
    (
        ("Same library version, or a newer one and version-compatible?", "8 to 10, 10 to 11, within a major"),
        (
            *("no library", "other library", "other version, RTX", "older library"),
            *("newer minor", "newer major", "other TF32 override"),
        ),
    ),
    (
        ("Same GPU, or one that it was built for?", "model, compute capability, SM count, memory"),
        (
            *("no GPU", "GPU of the build unknown", "same GPU, other size", "other GPU model"),
            *("other compute capability", "hardware-compatible on a Jetson", "ampere_plus, older GPU"),
            *("same_compute_capability, other one", "GPU not among the targets, RTX"),
        ),
    ),
)


def passport_tree(verdicts: dict[str, str]) -> str:
    """The decisions about a plan from top to bottom. verdicts: rule -> ``refuse``, ``rebuild`` or ``ok``."""
    width, left, box_width, line_height, gap = 460, 4, 318, 18, 24
    middle, out = left + box_width / 2, left + box_width
    parts, y = [], 8
    for (question, detail), rules in QUESTIONS:
        asked, details = textwrap.wrap(question, 42), textwrap.wrap(detail, 44)
        height = 14 + line_height * len(asked + details)
        word, centre = answer(rules, verdicts), y + height / 2
        parts.append(f'<rect class="frame" x="{left}" y="{y}" width="{box_width}" height="{height}" rx="6"/>')
        for number, text in enumerate(asked + details):
            kind = "ink" if number < len(asked) else "soft"
            parts.append(
                f'<text class="{kind}" x="{middle}" y="{y + 20 + line_height * number}" '
                f'text-anchor="middle">{escape(text)}</text>'
            )
        parts += [
            f'<path class="arrow" d="M{out} {centre} h30 m-7 -5 l7 5 l-7 5"/>',
            f'<text class="soft" x="{out + 13}" y="{centre - 7}" text-anchor="middle">no</text>',
            f'<rect class="{word}" x="{out + 34}" y="{centre - 17}" width="98" height="34" rx="17"/>',
            f'<text class="verdict" x="{out + 83}" y="{centre + 5}" text-anchor="middle">{word}</text>',
            f'<path class="arrow" d="M{middle} {y + height} v{gap} m-5 -7 l5 7 l5 -7"/>',
            f'<text class="soft" x="{middle + 10}" y="{y + height + 15}">yes</text>',
        ]
        y += height + gap
    parts += [
        f'<rect class="ok" x="{middle - 49}" y="{y}" width="98" height="34" rx="17"/>',
        f'<text class="verdict" x="{middle}" y="{y + 22}" text-anchor="middle">ok</text>',
    ]
    words = " ".join(f"{question} If not: {answer(rules, verdicts)}." for (question, _), rules in QUESTIONS)
    title = "What is asked about a plan before it is loaded"
    head = figure("passport-tree", y + 42, title, f"{words} Otherwise: ok, load it.", width, " narrow")
    return "\n".join([*head, *parts, "</svg></div>"]) + "\n"


def answer(rules: Sequence[str], verdicts: dict[str, str]) -> str:
    """The one verdict that these rules share."""
    (word,) = {verdicts[rule] for rule in rules}
    return word


def figure(name: str, height: int, title: str, text: str, width: int = WIDTH, kind: str = "") -> list[str]:
    """The opening of an SVG that screen readers can name and describe."""
    return [
        '<div class="odtrt-plot-frame"><svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {width} {height}" class="odtrt-plot{kind}" role="img" '
        f'aria-labelledby="{name}-title {name}-text">',
        f'<title id="{name}-title">{escape(title)}</title>',
        f'<desc id="{name}-text">{escape(text)}</desc>',
    ]


class Scale:
    """A logarithmic axis over whole decades."""

    def __init__(self, values: Sequence[float], left: float = LEFT, right: float = WIDTH - RIGHT) -> None:
        self.first, self.last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.left, self.right = left, right

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return round(self.left + share * (self.right - self.left), 1)

    def grid(self, top: float, bottom: float) -> list[str]:
        parts = []
        for power in range(self.first, self.last + 1):
            x = self.at(10.0**power)
            parts.append(f'<path class="grid" d="M{x} {top} V{bottom}"/>')
            parts.append(
                f'<text class="soft" x="{x}" y="{bottom + 16}" text-anchor="middle">{10.0**power:g}</text>'
            )
        return parts


def line(rows: Sequence[Row], y: float, scale: Scale) -> list[str]:
    """One size: a stroke at the floor, a dot for each threshold, a diamond for PyTorch."""
    size = rows[0]["anchors"]
    parts = [f'<text class="ink" x="{LEFT - 12}" y="{y + 5}" text-anchor="end">{size:,} anchors</text>']
    floors = [row["floor_us"] for row in rows if "floor_us" in row]
    if floors:
        parts.append(
            f'<rect class="floor" x="{scale.at(floors[0]) - 2.5}" y="{y - 10}" width="5" height="20">'
            f"<title>floor: {floors[0]:g} us</title></rect>"
        )
    for row in rows:
        if row["implementation"] == "odtrt":
            mark = MARKS[row["score_threshold"]]
            parts.append(
                f'<circle class="dot {mark}" cx="{scale.at(row["graph_p50_us"])}" cy="{y}" r="6">'
                f"<title>above {row['score_threshold']:g}: {row['graph_p50_us']:g} us</title></circle>"
            )
        else:
            x = scale.at(row["p50_us"])
            parts.append(
                f'<path class="peer" d="M{x} {y - 7} L{x + 7} {y} L{x} {y + 7} L{x - 7} {y} Z">'
                f"<title>{escape(row['implementation'])}, above {row['score_threshold']:g}: "
                f"{row['p50_us']:g} us</title></path>"
            )
    return parts


def legend() -> list[str]:
    entries = [
        ('<rect class="floor" x="{x}" y="8" width="5" height="20"/>', "floor"),
        *(
            (f'<circle class="dot {mark}" cx="{{x}}" cy="18" r="6"/>', f"odtrt, above {threshold:g}")
            for threshold, mark in MARKS.items()
        ),
        ('<path class="peer" d="M{x} 18 l7 -7 l7 7 l-7 7 Z"/>', "PyTorch"),
    ]
    parts, x = [], 24
    for shape, label in entries:
        parts.append(shape.format(x=x))
        parts.append(f'<text class="ink" x="{x + 20}" y="23">{label}</text>')
        x += 46 + 7 * len(label)
    return parts
