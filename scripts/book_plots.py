"""Draws the figures of the book that come from measurements, as SVG in the page's own colours.

scripts/book_tables.py writes them beside the tables; a page includes one by ``{raw} html``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

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
    rows = [row for row in measured["rows"] if all(row.get(key) == value for key, value in PLAIN.items())]
    if not rows:
        raise ValueError(f"{path}: no row with {PLAIN}")
    sizes = sorted({row["anchors"] for row in rows})
    times = [row["graph_p50_us"] for row in rows if "graph_p50_us" in row]
    times += [row["p50_us"] for row in rows] + [row["floor_us"] for row in rows if "floor_us" in row]
    scale = Scale(min(times), max(times))
    height = TOP + LINE * len(sizes) + 44
    text = (
        f"Microseconds for one image of 90 classes on {measured['device'].get('gpu', 'a GPU')}, "
        f"for {', '.join(f'{size:,}' for size in sizes)} anchors: the time to read the logits, odtrt's "
        "kernels at three score thresholds, and PyTorch. The table below has the figures."
    )
    parts = [
        '<div class="odtrt-plot-frame"><svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {WIDTH} {height}" class="odtrt-plot" role="img" '
        'aria-labelledby="nms-gpu-title nms-gpu-text">',
        '<title id="nms-gpu-title">Post-processing of one image on the GPU</title>',
        f'<desc id="nms-gpu-text">{escape(text)}</desc>',
        *legend(),
        *scale.grid(TOP - 14, height - 38),
        f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        "microseconds, logarithmic</text>",
    ]
    for number, size in enumerate(sizes):
        parts += line([row for row in rows if row["anchors"] == size], TOP + LINE * number, scale)
    return "\n".join([*parts, "</svg></div>"]) + "\n"


class Scale:
    """A logarithmic axis over whole decades."""

    def __init__(self, least: float, most: float) -> None:
        self.first, self.last = math.floor(math.log10(least)), math.ceil(math.log10(most))

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return round(LEFT + share * (WIDTH - RIGHT - LEFT), 1)

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
