"""Judges a soak: what may grow by how much, and what must be exactly right.

Growing figures are judged by :mod:`odtrt_lib.latency.slopes` against declared tolerances; counts are exact.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from odtrt_lib.latency.board import accounted
from odtrt_lib.latency.slopes import GROWING, MIN_BLOCKS, STEADY, UNDECIDED, Trend, judge, trend
from odtrt_lib.latency.soak import Record

UNSTEADY = "not steady"

MEMORY_TOLERANCES = ((600.0, 20.0), (1200.0, 10.0), (3600.0, 5.0), (259_200.0, 0.1))
"""Seconds of a run, and the growth of memory in MB an hour that it allows: about the least that it can tell
from none. Between them the logarithms are interpolated; a shorter run may grow by as many MB in all."""

LATENCY_TOLERANCE = 0.10
"""The growth of the median service time over the whole run, as a share of it."""

MAX_CPU_ELSEWHERE = 0.2
"""A block in which other programs took a larger share of the CPU says nothing about the service time."""

COUNT_TOLERANCE = 2.0
"""The growth of open files and of threads over the whole run."""

OBJECTS_TOLERANCE = 0.02
"""The growth of Python's objects over the whole run, as a share of them."""

_WARM_UP_SHARE, _LONGEST_WARM_UP = 0.1, 600.0


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was judged.

    verdict: ``steady``, ``growing`` or ``undecided`` for a slope; ``steady`` or ``not steady`` for a count.
    text: the figures in words. unit, tolerance, trend: of a slope, an hour.
    """

    name: str
    verdict: str
    text: str
    figure: str = ""
    unit: str = ""
    tolerance: float = 0.0
    trend: Optional[Trend] = None


def overall(checks: Sequence[Check]) -> str:
    """``steady`` if every check is; ``not steady`` if one fails; else ``undecided``."""
    verdicts = {check.verdict for check in checks}
    if verdicts & {GROWING, UNSTEADY}:
        return UNSTEADY
    return UNDECIDED if UNDECIDED in verdicts else STEADY


def checks_of(record: Record) -> List[Check]:
    """Everything that is judged, slopes first."""
    return [*_slopes(record), *_counts(record)]


def memory_tolerance(seconds: float) -> float:
    """MB an hour; see :data:`MEMORY_TOLERANCES`."""
    times, limits = zip(*MEMORY_TOLERANCES)
    if seconds < times[0]:
        return limits[0] * times[0] / max(seconds, 1.0)
    return float(math.exp(np.interp(math.log(seconds), np.log(times), np.log(limits))))


def warmed_up(record: Record) -> List[Dict[str, float]]:
    """The rows without the first tenth of the time, ten minutes at most, of each worker process."""
    warm_up = min(_WARM_UP_SHARE * record.seconds, _LONGEST_WARM_UP)
    first: Dict[float, float] = {}
    for row in record.rows:
        first.setdefault(row["segment"], row["at"] - row["seconds"] / 2)
    return [row for row in record.rows if row["at"] - row["seconds"] / 2 - first[row["segment"]] >= warm_up]


def trend_of(record: Record, figure: str) -> Optional[Trend]:
    """The slope of a figure of the rows, an hour; None if it is not there often enough.

    That of a latency is taken from the blocks that :data:`MAX_CPU_ELSEWHERE` allows.
    """
    rows = [row for row in warmed_up(record) if figure in row]
    if figure.endswith("_us"):
        rows = [row for row in rows if row.get("cpu_elsewhere", 0.0) <= MAX_CPU_ELSEWHERE]
    return trend(
        [row["at"] / 3600 for row in rows],
        [row[figure] for row in rows],
        [int(row["segment"]) for row in rows],
    )


def _slopes(record: Record) -> List[Check]:
    hours = max(record.elapsed, 1.0) / 3600
    memory = memory_tolerance(record.elapsed)
    host = "own_mb" if any("own_mb" in row for row in record.rows) else "rss_mb"
    judged: List[Tuple[str, str, str, float]] = [
        ("host memory", host, "MB", memory),
        ("open files", "open_files", "", COUNT_TOLERANCE / hours),
        ("threads", "threads", "", COUNT_TOLERANCE / hours),
    ]
    for name, figure in (("GPU memory", "device_memory_mb"), ("system memory", "system_memory_mb")):
        if any(figure in row for row in record.rows):
            judged.insert(1, (name, figure, "MB", memory))
    for name, figure, unit, share in (
        ("Python objects", "gc_objects", "", OBJECTS_TOLERANCE),
        ("service time, p50", "service_p50_us", "ms", LATENCY_TOLERANCE),
    ):
        values = [row[figure] for row in warmed_up(record) if figure in row]
        middle = float(np.median(values)) if values else 0.0
        judged.append((name, figure, unit, share * middle / hours))
    return [_slope_check(record, *one) for one in judged]


def _slope_check(record: Record, name: str, figure: str, unit: str, tolerance: float) -> Check:
    found = trend_of(record, figure)
    verdict = judge(found, tolerance)
    per_hour = f"{unit} an hour".strip()
    if found is None:
        busy = sum(row.get("cpu_elsewhere", 0.0) > MAX_CPU_ELSEWHERE for row in warmed_up(record))
        text = f"fewer than {MIN_BLOCKS} blocks after the warm-up"
        if figure.endswith("_us") and busy:
            text += (
                f" without much else on the machine; in {busy} other programs took a fifth of the CPU or more"
            )
    else:
        scale = 1e-3 if unit == "ms" else 1.0
        slope, low, high, most = (
            signed(scale * one) for one in (found.slope, found.low, found.high, tolerance)
        )
        text = f"{slope} {per_hour}, 95 % interval {low} to {high}; allowed: {most.lstrip('+')}"
    return Check(name, verdict, text, figure, unit, tolerance, found)


def signed(value: float) -> str:
    """A number with its sign, in three digits."""
    if not value:
        return "0"
    return f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.3g}"


def _counts(record: Record) -> List[Check]:
    counts = record.counts
    grabbed, known = counts["grabbed"], accounted(counts)
    fates = ", ".join(
        f"{counts[name]:,} {words}"
        for name, words in (
            ("processed", "processed"),
            ("dropped", "replaced by a newer one"),
            ("corrupt", "corrupt"),
            ("lost", "in hand when a worker ended"),
        )
        if counts[name] or name == "processed"
    )
    waiting = counts["in_slot"] + counts["in_detector"]
    unexpected = counts["losses"] - counts["injected_disconnect"]
    is_whole = not record.end and record.elapsed >= record.seconds
    learned = len(record.hashes)
    return [
        _exact(
            "frames",
            grabbed == known and counts["processed"] > 0,
            f"{grabbed:,} = {fates}, {waiting} in hand",
        ),
        _faults(record),
        _exact(
            "results of the canary",
            record.drifted == 0 and counts["canaries"] > 0,
            f"{counts['canaries']:,} runs, {learned} different result{'s' * (learned != 1)} at first, "
            f"{record.drifted:,} new ones later; {record.canary_detections} detections in it",
        ),
        _exact("stalls", counts["stalls"] == 0, f"{counts['stalls']}, and {counts['slow']:,} slow frames"),
        _exact("restarts", record.restarts == 0, f"{record.restarts}"),
        _exact(
            "lost cameras",
            unexpected == 0,
            f"{unexpected} besides injected ones, {counts['reopened']} reopened",
        ),
        _exact("the whole time", is_whole, record.end or f"{record.elapsed:.0f} of {record.seconds:.0f} s"),
    ]


def _exact(name: str, is_right: bool, text: str) -> Check:
    return Check(name, STEADY if is_right else UNSTEADY, text)


def observed(counts: Dict[str, int]) -> List[Tuple[str, int, int, bool]]:
    """For each kind of fault: kind, injected, observed, and whether the two agree.

    A frame that is being transferred at a disconnect is missing too. A busy machine makes frames late, and a
    camera silent, by itself; so of these at least as many as were injected must be observed.
    """
    seen = {
        "drop": counts["missing"] - counts["injected_disconnect"],
        "late": counts["late"],
        "corrupt": counts["corrupt"],
        "resize": counts["resized"],
        "disconnect": counts["losses"],
        "stall": counts["gaps"],
    }
    found = []
    for kind, count in seen.items():
        injected = counts[f"injected_{kind}"]
        at_least = kind in ("late", "stall", "disconnect")
        found.append((kind, injected, count, count >= injected if at_least else count == injected))
    return found


def _faults(record: Record) -> Check:
    if not record.settings.get("faults"):
        return _exact("injected faults", True, "none were asked for")
    kinds = observed(record.counts)
    text = ", ".join(f"{kind} {count:,} of {injected:,}" for kind, injected, count, _ in kinds)
    return _exact("injected faults", all(right for *_, right in kinds), f"observed of injected: {text}")


def figures(record: Record) -> Dict[str, Any]:
    """The figures of a soak in one flat row; a figure that is not available is None."""
    checks = checks_of(record)
    counts = record.counts
    row: Dict[str, Any] = {
        "verdict": overall(checks),
        "reasons": "; ".join(f"{one.name}: {one.verdict}" for one in checks if one.verdict != STEADY),
        "minutes": round(record.elapsed / 60, 2),
        "parts": len(record.parts),
        "grabbed": counts["grabbed"],
        "accounted": accounted(counts),
    }
    names = (
        "processed",
        "dropped",
        "corrupt",
        "lost",
        "missing",
        "resized",
        "late",
        "losses",
        "reopened",
        "gaps",
    )
    row.update({name: counts[name] for name in names})
    row.update({f"injected_{kind}": injected for kind, injected, _, _ in observed(counts)})
    row.update(all_faults_accounted=all(right for *_, right in observed(counts)))
    for name in ("service", "response"):
        histogram = record.histogram(name)
        if histogram.count:
            row.update(
                {f"{name}_{key}": value for key, value in histogram.timing().row().items() if key[0] == "p"}
            )
            row[f"{name}_max_us"] = round(histogram.max_us, 1)
    for check in checks:
        if check.figure and check.trend is not None:
            row.update(_trend_row(check))
    for key in ("canaries", "slow", "stalls"):
        row[key] = counts[key]
    row.update(canary_results=len(record.hashes), canary_drifted=record.drifted, restarts=record.restarts)
    return row


def _trend_row(check: Check) -> Dict[str, Any]:
    """A slope, its two intervals, its tolerance and its verdict; all an hour."""
    assert check.trend is not None
    unit = {"own_mb": "host_memory_mb", "rss_mb": "host_memory_mb"}.get(check.figure, check.figure)
    values = {
        "slope": check.trend.slope,
        "low": check.trend.low,
        "high": check.trend.high,
        "wide_low": check.trend.wide_low,
        "wide_high": check.trend.wide_high,
        "tolerance": check.tolerance,
    }
    row: Dict[str, Any] = {f"{unit}_per_hour_{name}": float(f"{value:.4g}") for name, value in values.items()}
    return {**row, f"{unit}_verdict": check.verdict}
