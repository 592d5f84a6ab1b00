"""Writes a soak's files: ``report.html``, a page that needs no other file, and ``soak.json``, its figures."""

from __future__ import annotations

import html
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from odtrt_lib.errors import printable
from odtrt_lib.folder import atomic_write
from odtrt_lib.latency import charts
from odtrt_lib.latency.charts import Line, Ticks
from odtrt_lib.latency.sensors import FIGURES
from odtrt_lib.latency.slopes import STEADY, UNDECIDED
from odtrt_lib.latency.soak import Record, gaps
from odtrt_lib.latency.verdict import (
    Check,
    checks_of,
    figures,
    observed,
    overall,
    signed,
    trend_of,
    warmed_up,
)
from odtrt_lib.latency.watchdog import ENVIRONMENT
from odtrt_lib.report import REPORT, page
from odtrt_lib.results import device_info
from odtrt_lib.results import versions as versions_of
from odtrt_lib.written_files import write_json

FIGURES_FILE = "soak.json"

_VERSIONS = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13")
_COLOURS = {STEADY: "good", UNDECIDED: "muted"}
_SENTENCES = {
    STEADY: "Nothing grew beyond its tolerance, and every count is right.",
    UNDECIDED: "Nothing is wrong, but the run was too short or too noisy to say that nothing grows.",
}
_KINDS = {
    "drop": ("dropped", "numbers that are missing"),
    "late": ("late", "frames older than 0.3 s when they came"),
    "corrupt": ("corrupt", "frames that are no picture"),
    "resize": ("resized", "frames of another size"),
    "disconnect": ("disconnected", "reads that failed"),
    "stall": ("stalled", "silences of more than 2 s"),
}
_WHOLE = ("open_files", "threads", "gc_objects")
_CHARTS = (
    "own_mb",
    "pss_mb",
    "rss_mb",
    "device_memory_mb",
    "system_memory_mb",
    "gc_objects",
    "open_files",
    "threads",
)
_SENSORS = (
    "cpu_elsewhere",
    "temperature_c",
    "gpu_temperature_c",
    "cpu_clock_mhz",
    "gpu_clock_mhz",
    "power_w",
    "throttled",
)
_STYLE = """
.bad{background:var(--bad-bg);color:var(--bad)}
:root{--bad:#a3231f;--bad-bg:#fde8e6}
@media (prefers-color-scheme:dark){:root{--bad:#ff9d94;--bad-bg:#44201d}}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:18px}
.judged td{text-align:left;width:auto;white-space:normal;padding-left:14px;overflow-wrap:anywhere}
.judged th{white-space:nowrap}.judged .badge{white-space:nowrap}
.numbers td{width:auto;padding-left:20px}
.numbers thead th{color:var(--soft);font-size:.82rem;text-align:right}
.numbers thead th:first-child{text-align:left}
.scroll{overflow-x:auto}.lead{margin:0 0 14px;color:var(--soft);max-width:70ch}
"""


def write_soak(record: Record, folder: Path) -> Path:
    """Writes ``soak.json`` and ``report.html`` into ``folder``, and returns the report's path."""
    content = {
        "settings": record.settings,
        "detector": record.description,
        "environment": ENVIRONMENT,
        "device": device_info(),
        "versions": versions_of(*_VERSIONS),
        "figures": figures(record),
        "checks": [{"name": one.name, "verdict": one.verdict, "text": one.text} for one in checks_of(record)],
        "parts": record.parts,
        "events": record.events,
        "event_counts": record.event_counts,
        "rows": record.rows,
    }
    write_json(folder / FIGURES_FILE, content)
    with atomic_write(folder / REPORT) as temporary:
        temporary.write_text(report(record), encoding="utf-8")
    return folder / REPORT


def report(record: Record) -> str:
    """The page: verdict, charts, faults, events and what could not be measured."""
    checks = checks_of(record)
    sections = [
        _header(record, checks),
        _judged(checks),
        _latency(record),
        _section("Memory and objects", _CHARTS, record),
        _section("The machine", _SENSORS, record),
        _faults(record),
        _events(record),
        _footer(record),
    ]
    return page(
        f"Soak of {record.settings.get('model', 'a detector')}", "\n".join(sections), _STYLE + charts.STYLE
    )


def _header(record: Record, checks: Sequence[Check]) -> str:
    verdict = overall(checks)
    counts = record.counts
    facts = [
        ("Time", _duration(record.elapsed)),
        ("Frames", f"{counts['processed']:,}"),
        ("Frames a second", f"{counts['processed'] / max(record.elapsed, 1e-9):.1f}"),
    ]
    for name in ("service", "response"):
        histogram = record.histogram(name)
        if histogram.count:
            p50, p99 = (histogram.percentile(percent) / 1e3 for percent in (50, 99))
            facts.append((f"{name.capitalize()} p50, p99", f"{p50:.3g}, {p99:.3g} ms"))
    if len(record.parts) > 1:
        facts.append(("Parts", str(len(record.parts))))
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    sentence = _SENTENCES.get(verdict, "At least one figure grew beyond its tolerance, or a count is wrong.")
    if record.end:
        sentence = f"It ended before its time: {record.end}."
    return (
        f'<header><p class="brand">odtrt soak</p><h1>{_text(record.settings.get("model", "a detector"))}</h1>'
        f'<p class="badges">{_badge(verdict)}</p>'
        f'<p class="lead">{_text(sentence)} {_text(record.description)}; source: '
        f"{_text(record.settings.get('source', ''))}.</p>"
        f'<dl class="facts">{cells}</dl></header>'
    )


def _judged(checks: Sequence[Check]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(one.name)}</th><td>{_badge(one.verdict)}</td>'
        f"<td>{_text(one.text)}</td></tr>"
        for one in checks
    )
    table = f'<div class="stage scroll"><table class="judged">{rows}</table></div>'
    return f"<section><h2>Judged</h2>{table}</section>"


def _badge(verdict: str) -> str:
    return f'<span class="badge {_COLOURS.get(verdict, "bad")}">{_text(verdict)}</span>'


def _latency(record: Record) -> str:
    shown = [_percentile_chart(record)]
    for name, title in (
        ("service", "Service time of each block"),
        ("response", "Response time of each block"),
    ):
        lines = [
            Line(percentile, _runs(record, f"{name}_{percentile}_us", lambda value: value / 1e3))
            for percentile in ("p50", "p99")
        ]
        words = "from picked to detected" if name == "service" else "from captured to detected"
        shown.append(_chart(record, title, f"{words}, milliseconds", lines))
    shown.append(
        _chart(record, "Frames a second", "that the detector processed", [Line("fps", _runs(record, "fps"))])
    )
    return _gallery("Latency", shown)


def _section(title: str, names: Sequence[str], record: Record) -> str:
    shown: List[Optional[str]] = []
    absent = []
    for name in names:
        is_judged = name in _CHARTS
        runs = _runs(record, name, rows=warmed_up(record) if is_judged else None)
        if not any(runs):
            absent.append(FIGURES[name].rpartition(",")[0] or FIGURES[name])
            continue
        found = trend_of(record, name)
        heading = FIGURES[name]
        text = "median of each block"
        if found is not None and is_judged:
            text = (
                f"{signed(found.slope)} an hour, 95 % interval {signed(found.low)} to {signed(found.high)}; "
                f"widened by the correlation {signed(found.wide_low)} to {signed(found.wide_high)}"
            )
        slope = found.slope / 3600 if found is not None and is_judged else None
        shown.append(_chart(record, heading, text, [Line(name, runs)], slope, name in _WHOLE))
    note = f'<p class="lead">Not available here: {_text("; ".join(absent))}.</p>' if absent else ""
    return _gallery(title, shown, note)


def _gallery(title: str, shown: Sequence[Optional[str]], note: str = "") -> str:
    content = "".join(filter(None, shown))
    inside = f'<div class="charts">{content}</div>' if content else ""
    return f"<section><h2>{_text(title)}</h2>{note}{inside}</section>"


def _runs(
    record: Record,
    name: str,
    scale: Callable[[float], float] = lambda value: value,
    rows: Optional[Sequence[Dict[str, float]]] = None,
) -> List[List[Tuple[float, float]]]:
    """The points (seconds since the first start, value) of a figure, interrupted between two processes."""
    runs: Dict[float, List[Tuple[float, float]]] = {}
    for row in record.rows if rows is None else rows:
        if name in row:
            runs.setdefault(row["segment"], []).append((row["at"], scale(row[name])))
    return list(runs.values())


def _chart(
    record: Record,
    title: str,
    text: str,
    lines: Sequence[Line],
    slope: Optional[float] = None,
    whole: bool = False,
) -> Optional[str]:
    points = [point for line in lines for run in line.runs for point in run]
    if not points:
        return None
    values = [y for _, y in points]
    fits = [_fit(run, slope) for line in lines for run in line.runs] if slope is not None else []
    values += [y for fit in fits for _, y in fit]
    last = record.parts[-1]["offset"] + record.parts[-1]["seconds"]
    restarts = [event["at"] for event in record.events if event["kind"] == "restart"]
    return charts.figure(
        title,
        text,
        lines,
        x=_time_ticks(max(last, 1.0)),
        y=charts.ticks(min(values), max(values), whole),
        fits=fits,
        pauses=gaps(record),
        marks=restarts,
    )


def _fit(run: Sequence[Tuple[float, float]], slope: float) -> Tuple[Tuple[float, float], Tuple[float, float]]:
    """The slope through the middle of a run: its two ends."""
    begin, end = run[0][0], run[-1][0]
    middle = sorted(y for _, y in run)[len(run) // 2]
    return (begin, middle - slope * (end - begin) / 2), (end, middle + slope * (end - begin) / 2)


def _time_ticks(last: float) -> Ticks:
    name, unit = next(
        (name, unit)
        for name, unit in (("h", 3600.0), ("min", 60.0), ("s", 1.0))
        if last >= 2 * unit or unit == 1
    )
    found = charts.ticks(0.0, last / unit)
    at = [value * unit for value in found.at if value * unit <= last]
    texts = [*found.texts[: len(at) - 1], f"{found.texts[len(at) - 1]} {name}"]
    return Ticks(0.0, last, at, texts)


def _percentile_chart(record: Record) -> Optional[str]:
    """Times over percentiles; the axes are such that the slow few are as visible as the many."""
    lines, values = [], []
    count = record.histogram("service").count
    shares = [share for share in (0.5, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6) if share * count >= 1]
    if len(shares) < 2:
        return None
    for name in ("service", "response"):
        histogram = record.histogram(name)
        steps = [math.log10(shares[0]) * (1 - i / 60) + math.log10(shares[-1]) * i / 60 for i in range(61)]
        points = [(-step, max(histogram.percentile(100 * (1 - 10**step)) / 1e3, 1e-6)) for step in steps]
        values += [value for _, value in points]
        lines.append(Line(name, [[(x, math.log10(value)) for x, value in points]]))
    low, high = math.log10(min(values)), math.log10(max(values))
    exponents = range(math.floor(3 * low), math.ceil(3 * high) + 1)
    y = [math.log10(factor * 10.0 ** (i // 3)) for i in exponents for factor in [(1, 2, 5)[i % 3]]]
    at = [-math.log10(share) for share in shares]
    x = Ticks(at[0], at[-1], at, [f"p{100 * (1 - share):.8g}" for share in shares])
    return charts.figure(
        "All frames",
        "milliseconds, logarithmic, that a share of the frames does not exceed",
        lines,
        x=x,
        y=Ticks(y[0], y[-1], y, [f"{10**value:.3g}" for value in y]),
    )


def _faults(record: Record) -> str:
    if not record.settings.get("faults"):
        return ""
    rows = "".join(
        f'<tr><th scope="row">{_KINDS[kind][0]}</th><td>{injected:,}</td><td>{count:,}</td>'
        f'<td>{_KINDS[kind][1]}</td><td><span class="badge {"good" if right else "bad"}">'
        f"{'accounted for' if right else 'not accounted for'}</span></td></tr>"
        for kind, injected, count, right in observed(record.counts)
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("fault", "injected", "observed", "as", ""))
    return (
        f'<section><h2>Injected faults</h2><p class="lead">{_text(record.settings["faults"])}. '
        "A busy machine makes frames late, and the camera silent, "
        "by itself: of these more may be observed than were injected.</p>"
        f'<div class="stage scroll"><table class="numbers"><thead><tr>{heads}</tr></thead>{rows}</table>'
        "</div></section>"
    )


def _events(record: Record) -> str:
    if not record.events:
        return ""
    counted = ", ".join(f"{count:,} {kind}" for kind, count in sorted(record.event_counts.items()))
    rows = "".join(
        f'<tr><th scope="row">{_text(_duration(event["at"]))}</th><td>{_text(event["kind"])}</td>'
        f"<td>{_text(event['text'])}</td></tr>"
        for event in record.events
    )
    return (
        "<section><h2>Events</h2>"
        f"<details><summary>{_text(counted)}; the first {len(record.events)}</summary>"
        f'<div class="scroll"><table class="judged">{rows}</table></div></details></section>'
    )


def _footer(record: Record) -> str:
    started = [
        datetime.fromtimestamp(part["wall"], timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        for part in record.parts
    ]
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(*_VERSIONS).items())
    environment = ", ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    pauses = "; ".join(f"paused for {_duration(end - begin)}" for begin, end in gaps(record))
    return (
        f"<footer><p>Started {_text(', again '.join(started))}{_text(f'; {pauses}' if pauses else '')}. "
        f"{_text(device_info().get('cpu', ''))}; {_text(versions)}; {_text(environment)}. Slopes: Theil and "
        "Sen on prewhitened block medians, without the first tenth of each process's time. Dashed: the "
        "slope; shaded: a pause; dotted: a restart.</p></footer>"
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def _text(value: object) -> str:
    return html.escape(printable(value), quote=True)
