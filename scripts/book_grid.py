"""Cells and grids of the book's generated tables, for book_tables.py and book_gpu_tables.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NO_BREAK_HYPHEN = "\u2011"
NONE = "–"
SLASH = "\u00a0/\u00a0"  # between two figures of a cell, which a line does not break
# Short enough for a narrow table; what is not here keeps its name.
MODEL_NAMES = {
    "ssd_mobilenet_v1_300": "coco_ssd_mnv1",
    "ssd_mobilenet_v2_fpnlite_320_parts": "parts 320",
    "ssd_mobilenet_v2_fpnlite_640_parts": "parts 640",
    "ssd_mobilenet_v2_fpnlite_320": "SSD FPNLite 320",
    "ssd_mobilenet_v2_fpnlite_640": "SSD FPNLite 640",
    "ssd_resnet50_fpn_640": "SSD ResNet50 640",
    "efficientdet_d0_512": "EfficientDet-D0 512",
    "efficientdet_d1_640": "EfficientDet-D1 640",
    "efficientdet_d1_1024": "EfficientDet-D1 1024",
    "Kudos12th_mnv2_300_c2_apache": "Kudos12th MobileNet 300",
    "riceCV__ssd_resnet50_v1_fpn_640x640_coco17_tpu-8": "riceCV ResNet50 640",
    "whoisltd_passport_ssd_resnet50_320_c9": "whoisltd ResNet50 320",
    "efficientdet_d4_random": "EfficientDet-D4",
    "ft_effd1_carparts18": "carparts D1",
    "ft_fpnlite320_tfjs1": "tfjs FPNLite 320",
    "zoo_efficientdet_d0": "zoo D0",
    "zoo_ssd_mobilenet_v2_fpnlite_320": "zoo FPNLite 320",
}
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
    ends before these characters. beside: the key of a second figure, which follows after a slash.
    """

    heading: str
    key: str
    form: str = ""
    divisor: float = 1
    is_optional: bool = False
    until: str = ""
    beside: str = ""


def cell(row: Row, column: Column) -> str:
    """One figure as the table shows it. A key that the row lacks is an error, unless it is optional."""
    if column.is_optional and row.get(column.key) is None:
        return NONE
    first = written(row, column.key, column)
    return f"{first}{SLASH}{written(row, column.beside, column)}" if column.beside else first


def written(row: Row, key: str, column: Column) -> str:
    value = row[key]
    if key == "kernel":
        value = RENAMED_KERNELS.get(row.get("source", "postprocess.cu"), {}).get(value, value)
    if key == "model":
        value = model_name(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.form:
        text = format(value / column.divisor if column.divisor != 1 else value, column.form)
        return text.replace("e-", f"e{NO_BREAK_HYPHEN}")
    text = str(value).partition(column.until)[0] if column.until else str(value)
    return text.replace("|", "\\|")


def model_name(name: str) -> str:
    return MODEL_NAMES.get(name, name)


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source_of(measured: dict[str, Any]) -> str:
    """Where and when the figures of a GPU were measured, with which versions, and what wrote them down."""
    device, rows = measured["device"], measured["rows"]
    days = sorted({row["date"] for row in rows if "date" in row}) or [measured["date"][:10]]
    versions = sorted({row["version"] for row in rows if "version" in row})
    made_with = f", {measured['library']} {', '.join(versions)}" if versions else ""
    return (
        f"Measured on {', '.join(days)} on one {device['gpu']}, driver {device['driver']}{made_with}; "
        f"`results/{measured['file']}`, written by `{measured['command']}`."
    )


def part_of(path: Path, part: Callable[[dict[str, Any]], str], library: str = "") -> str:
    """What ``part`` makes of a results file, or that there is none.

    It finds the file's name under ``file`` and under ``library`` the one whose versions the rows have.
    """
    if not path.is_file():
        return not_measured(path)
    measured = json.loads(path.read_text(encoding="utf-8"))
    return part({**measured, "file": path.name, "library": library})


def not_measured(path: Path) -> str:
    return f"*Not measured yet: `results/{path.name}` does not exist.*\n"
