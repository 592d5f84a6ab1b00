"""Line charts as SVG, for pages that need no other file. Their colours are the page's, light or dark.

Needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import html
import math
from typing import List, Sequence, Tuple

WIDTH, HEIGHT = 680, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 34
_MAX_TICKS = 5

STYLE = """
.chart svg{display:block;width:100%;height:auto;padding:14px 10px 2px}
.chart text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.chart .grid{stroke:var(--line);stroke-width:1}
.chart .pause{fill:var(--code)}
.chart .mark{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:2 3}
.chart polyline{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.chart circle{stroke:none}
.chart .s0{stroke:var(--h0);fill:var(--h0)}.chart .s1{stroke:var(--h2);fill:var(--h2)}
.chart polyline.s0,.chart polyline.s1{fill:none}
.chart .fit{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:6 4;fill:none}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:6px}
.key span{display:inline-flex;align-items:center;gap:7px}
.key i{width:16px;height:3px;border-radius:2px;display:inline-block}
.key .k0{background:var(--h0)}.key .k1{background:var(--h2)}
"""

Point = Tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Line:
    """name: for the key. runs: points (x, y); between two runs the line is interrupted."""

    name: str
    runs: Sequence[Sequence[Point]]


@dataclasses.dataclass(frozen=True)
class Ticks:
    """An axis: its limits, where it has ticks, and what stands there."""

    low: float
    high: float
    at: Sequence[float]
    texts: Sequence[str]


def figure(
    title: str,
    text: str,
    lines: Sequence[Line],
    *,
    x: Ticks,
    y: Ticks,
    fits: Sequence[Tuple[Point, Point]] = (),
    pauses: Sequence[Tuple[float, float]] = (),
    marks: Sequence[float] = (),
) -> str:
    """A figure with a caption: ``title`` and ``text``. At most two lines.

    fits: the ends of dashed lines. pauses:
    spans of x that are shaded. marks: values of x with a vertical line.
    """
    area = _Area(x.low, x.high, y.low, y.high)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(f"{title}: {text}")}">',
        *(area.pause(*span) for span in pauses),
        *area.grid(x, y),
        *(area.mark(at) for at in marks),
    ]
    for number, line in enumerate(lines):
        parts += [area.run(points, number) for points in line.runs if points]
    parts += [area.path(fit, "fit") for fit in fits]
    names = [f'<span><i class="k{i}"></i>{_text(line.name)}</span>' for i, line in enumerate(lines)]
    key = f'<p class="key">{"".join(names)}</p>' if len(lines) > 1 else ""
    return (
        f'<figure class="chart">{"".join(parts)}</svg>'
        f"<figcaption><b>{_text(title)}</b>{_text(text)}{key}</figcaption></figure>"
    )


def ticks(low: float, high: float, whole: bool = False) -> Ticks:
    """Round numbers from below ``low`` to above ``high``. whole: integers only."""
    if high - low < 1e-9 * max(abs(high), 1e-9):
        margin = max(abs(high) * 0.05, 1.0 if whole or not high else abs(high) * 0.05)
        low, high = low - margin, high + margin
    raw = (high - low) / (_MAX_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    step = max(math.ceil(step), 1) if whole else step
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + int(not _is_power(step, 2.5)))
    at = [number * step for number in range(first, last + 1)]
    return Ticks(at[0], at[-1], at, [f"{value:,.{digits}f}" for value in at])


def _is_power(step: float, factor: float) -> bool:
    """Whether ``step`` needs no further digit than its power of ten: all but ``factor`` times a power."""
    return abs(math.log10(step / factor) - round(math.log10(step / factor))) > 1e-9


@dataclasses.dataclass(frozen=True)
class _Area:
    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - _TOP - _BOTTOM)

    def grid(self, x: Ticks, y: Ticks) -> List[str]:
        parts = []
        for value, text in zip(y.at, y.texts):
            at = self.y(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            )
            parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_text(text)}</text>')
        for value, text in zip(x.at, x.texts):
            at = self.x(value)
            anchor = "end" if at > WIDTH - 2 * _RIGHT else "middle"
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">{_text(text)}</text>')
        return parts

    def pause(self, begin: float, end: float) -> str:
        left, right = self.x(max(begin, self.left)), self.x(min(end, self.right))
        return (
            f'<rect class="pause" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 1):.1f}" '
            f'height="{HEIGHT - _TOP - _BOTTOM}"/>'
        )

    def mark(self, at: float) -> str:
        x = self.x(at)
        return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'

    def run(self, points: Sequence[Point], number: int) -> str:
        if len(points) == 1:
            x, y = points[0]
            return f'<circle class="s{number}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="2"/>'
        return self.path(points, f"s{number}")

    def path(self, points: Sequence[Point], name: str) -> str:
        text = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{name}" points="{text}"/>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
