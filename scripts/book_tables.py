"""Writes the tables of the book, book/_generated/*.md, from the measurements in results/*.json.

    python scripts/book_tables.py            write them
    python scripts/book_tables.py check      exit 1, naming each table that is not current

A page includes a table by ``{include}``; no page states a measured figure of its own. A table whose
measurement is absent says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column: its heading, the row's key, and how a figure is written (a format such as ``.3f``)."""

    heading: str
    key: str
    form: str = ""
    divisor: float = 1


@dataclass(frozen=True)
class Table:
    """One generated file. ``claim`` picks the rows of one measurement out of a topic's file."""

    results: str
    columns: tuple[Column, ...]
    claim: str = ""


TABLES = {
    "setup": Table(
        "first_light.cpu.json",
        (
            Column("command, in an empty clone", "command"),
            Column("minutes, downloads included", "wall_seconds", ".1f", 60),
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
            Column("peak memory, MB", "peak_rss_mb", ",.0f"),
            Column("ONNX nodes", "onnx_nodes", ","),
            Column("Resize nodes", "resizes"),
            Column("largest box difference, std", "onnx_boxes_max_err_in_std", ".1e"),
            Column("largest class difference, std", "onnx_logits_max_err_in_std", ".1e"),
        ),
    ),
    "agreement": Table(
        "agreement.cpu.json",
        (
            Column("model", "model"),
            Column("compared with", "reference"),
            Column("images", "images"),
            Column("its detections", "references", ","),
            Column("found again", "matched", ","),
            Column("found again, IoU above 0.5", "matched_at_iou_half", ","),
            Column("extra", "extra"),
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
            Column("odtrt, ms", "preprocess_p50_ms", ".2f"),
            Column("OpenCV and NumPy, ms", "cv2_p50_ms", ".2f"),
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


def generated(root: Path) -> dict[str, str]:
    """Every generated page part, file name -> text."""
    parts = {f"{name}.md": markdown(table, root / "results") for name, table in TABLES.items()}
    parts["notebooks.md"] = stamps(root)
    return parts


def stale(root: Path) -> list[str]:
    """The generated files that are absent or not what the measurements say."""
    folder = root / "book" / "_generated"
    return [
        name
        for name, text in generated(root).items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def markdown(table: Table, results: Path) -> str:
    """The table with a line that says where, when and with what it was measured."""
    path = results / table.results
    if not path.is_file():
        return f"*Not measured yet: `results/{table.results}` does not exist.*\n"
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in measured["rows"] if row.get("claim", "") == table.claim]
    versions = measured["versions"]
    packages = ", ".join(
        f"{name} {versions[key]}"
        for key, name in (
            ("tensorflow-cpu", "TensorFlow"),
            ("tensorflow", "TensorFlow"),
            ("tf2onnx", "tf2onnx"),
            ("onnxruntime", "ONNX Runtime"),
            ("tensorrt-rtx-cu13", "TensorRT-RTX"),
        )
        if key in versions
    )
    source = (
        f"*Measured on {measured['date'][:10]} on a processor with {measured['device']['cores']} cores, "
        f"{packages}; `results/{table.results}`, written by `{measured['command']}`.*"
    )
    headings = [column.heading for column in table.columns]
    cells = [[cell(row, column) for column in table.columns] for row in rows]
    return f"{grid(headings, cells)}\n\n{source}\n"


def cell(row: Row, column: Column) -> str:
    """One figure as the table shows it. A key that the row lacks is an error, not an empty cell."""
    value = row[column.key]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.form:
        return format(value / column.divisor if column.divisor != 1 else value, column.form)
    return str(value).replace("|", "\\|")


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
