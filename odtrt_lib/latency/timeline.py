"""A profile for people: a picture, a page, and a file for Perfetto.

The picture is SVG with its own colours for light and dark. The trace has the form that Perfetto
(https://ui.perfetto.dev) and chrome://tracing read (Google, Trace Event Format); times are microseconds.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

from odtrt_lib import report
from odtrt_lib.errors import printable
from odtrt_lib.folder import atomic_write
from odtrt_lib.latency.profile import UNEXPLAINED, Profile, calls_of_a_frame, duration, sentence, table
from odtrt_lib.latency.recorder import Call, Frame, Span

PAGE = "latency/profile.html"

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), and two greys for the host's own steps.
COLOURS = {
    "capture": "#56b4e9",
    "decode": "#0072b2",
    "preprocess": "#e69f00",
    "upload": "#cc79a7",
    "engine": "#009e73",
    "postprocess": "#f0e442",
    "download": "#d55e00",
    "draw": "#9467bd",
    "launch": "#8c8c8c",
    "wait": "#bdbdbd",
}
_OTHER = "#b5a27a"
_WHITE_INK = ("decode",)
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP = 960, 60, 20, 26, 4
_SHOWN_LAYERS = 12


def chrome_trace(found: Profile) -> Dict[str, Any]:
    """All recorded frames as an object for a JSON file."""
    zero = min(frame.start_us for frame in found.frames)
    lanes: List[str] = []
    events: List[Dict[str, Any]] = []

    def add(name: str, lane: str, start_us: float, us: float, **more: Any) -> None:
        if lane not in lanes:
            lanes.append(lane)
        place = {"pid": 1, "tid": lanes.index(lane) + 1}
        events.append({"name": name, "ph": "X", "ts": start_us - zero, "dur": us, **place, **more})

    for number, frame in enumerate(found.frames):
        add(f"frame {number}", frame.lane, frame.start_us, frame.us, cat="frame")
        for one in frame.spans:
            add(one.name, one.lane, one.start_us, one.us, cat="step")
        for call in frame.calls:
            told = {"where": call.where, "memory": call.side, "bytes": call.size}
            add(call.name, frame.lane, call.start_us, call.us, cat=call.kind, args=told)
    about: List[Dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "odtrt"}}]
    for number, lane in enumerate(lanes, 1):
        place = {"ph": "M", "pid": 1, "tid": number}
        about.append({"name": "thread_name", **place, "args": {"name": lane}})
        about.append({"name": "thread_sort_index", **place, "args": {"sort_index": number}})
    said = {"description": found.description, "sentence": sentence(found)}
    return {"traceEvents": about + events, "displayTimeUnit": "ms", "otherData": said}


def timeline_svg(found: Profile) -> str:
    """A picture of the frame whose time is the median, and of the slowest, on one scale of time."""
    ordered = sorted(found.frames, key=lambda frame: frame.us)
    shown = [("median frame", ordered[(len(ordered) - 1) // 2]), ("slowest frame", ordered[-1])]
    longest = ordered[-1].us or 1.0
    per_us = (_WIDTH - _LEFT - _RIGHT) / longest
    parts, y = [], 12
    for title, frame in shown:
        drawn, y = _frame_svg(f"{title}: {duration(frame.us)}", frame, per_us, y)
        parts += drawn
    parts.append(_axis(longest, per_us, y))
    legend, y = _legend(found, y + 44)
    alt = html.escape(_alt(found, shown))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tl" viewBox="0 0 {_WIDTH} {y}" role="img" '
        f'aria-label="{alt}"><title>{alt}</title><style>{_STYLE}</style>'
        f"{''.join(parts)}{legend}</svg>"
    )


def _frame_svg(title: str, frame: Frame, per_us: float, y: int) -> Tuple[List[str], int]:
    """The bars of a frame from ``y`` down, a row for each lane and depth; and where they end."""
    parts = [_text_svg(_LEFT, y + 14, title, "tl-head")]
    y += 24
    lanes = [frame.lane, *sorted({one.lane for one in frame.spans} - {frame.lane})]
    for lane in lanes:
        own = [one for one in frame.spans if one.lane == lane]
        depths = max((one.depth for one in own), default=0) + 1
        name = "CPU" if lane == frame.lane else lane
        parts.append(_text_svg(14, y + 18, name if len(name) < 8 else name[:7] + "…"))
        if lane == frame.lane:
            width = frame.us * per_us
            parts.append(f'<rect class="tl-rest" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}"/>')
        for one in own:
            at = y + one.depth * (_BAR + 2)
            parts.append(_bar(one, _LEFT + (one.start_us - frame.start_us) * per_us, one.us * per_us, at))
        y += depths * (_BAR + 2) + _GAP
    return parts, y + 10


def _bar(one: Span, x: float, width: float, y: int) -> str:
    label = f"{one.name} {duration(one.us)}"
    said = f"<title>{html.escape(label)}</title>"
    bar = (
        f'<g>{said}<rect x="{x:.1f}" y="{y}" width="{max(width, 0.8):.1f}" height="{_BAR}" rx="2" '
        f'fill="{COLOURS.get(one.name, _OTHER)}"/>'
    )
    for text in (label, one.name):
        if width > 7.2 * len(text) + 6:
            ink = "#fff" if one.name in _WHITE_INK else "#111"
            return (
                f'{bar}<text x="{x + 5:.1f}" y="{y + 17}" style="fill:{ink}">{html.escape(text)}</text></g>'
            )
    return f"{bar}</g>"


def _axis(longest: float, per_us: float, y: int) -> str:
    step = _tick(longest)
    parts = [f'<line class="tl-line" x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>']
    for i in range(int(longest / step) + 1):
        x = _LEFT + i * step * per_us
        parts.append(f'<line class="tl-line" x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}"/>')
        anchor = "end" if x > _WIDTH - 40 else "middle"
        text = duration(i * step) if i else "0"
        parts.append(f'<text x="{x:.1f}" y="{y + 20}" text-anchor="{anchor}">{text}</text>')
    return "".join(parts)


def _tick(longest: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that divides the axis into at most eight."""
    step = 1e-3
    while True:
        for factor in (1, 2, 5):
            if longest / (step * factor) <= 8:
                return step * factor
        step *= 10


def _legend(found: Profile, y: int) -> Tuple[str, int]:
    parts, x = [], _LEFT
    for row in table(found.frames):
        text = f"{row.step} {duration(row.timing.p50_us)}, {row.share:.1%}"
        width = 7.0 * len(text) + 34
        if x + width > _WIDTH:
            x, y = _LEFT, y + 22
        style = 'class="tl-rest"' if row.step == UNEXPLAINED else f'fill="{COLOURS.get(row.step, _OTHER)}"'
        parts.append(f'<rect x="{x}" y="{y - 11}" width="13" height="13" rx="2" {style}/>')
        parts.append(_text_svg(x + 19, y, text))
        x += int(width)
    return "".join(parts), y + 14


def _alt(found: Profile, shown: Sequence[Tuple[str, Frame]]) -> str:
    steps = ", ".join(f"{row.step} {duration(row.timing.p50_us)}" for row in table(found.frames))
    times = ", ".join(f"{title} {duration(frame.us)}" for title, frame in shown)
    return f"Timeline of a frame. {times}. Median of each step: {steps}."


def _text_svg(x: float, y: float, text: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x}" y="{y}"{kind}>{html.escape(text)}</text>'


def write_page(folder: Union[str, Path], title: str, source: str, found: Profile) -> Path:
    """Writes :data:`PAGE` into a model folder, and returns its path. source: of the frames, in words."""
    path = Path(folder) / PAGE
    with atomic_write(path) as temporary:
        temporary.write_text(report.page(title, _body(title, source, found)), encoding="utf-8")
    return path


def _body(title: str, source: str, found: Profile) -> str:
    frame = found.frame
    facts = {
        "Frames": f"{frame.runs:,}",
        "p50": duration(frame.p50_us),
        "p99": duration(frame.p99_us),
        "p99 / p50": f"{frame.p99_us / frame.p50_us:.2f}" if frame.p50_us else "–",
        "Jitter": duration(found.jitter_us),
        "p50, not recorded": duration(found.plain.p50_us),
    }
    cells = "".join(
        f"<div><dt>{_html(name)}</dt><dd>{_html(value)}</dd></div>" for name, value in facts.items()
    )
    badges = "".join(f'<span class="badge muted">{_html(one)}</span>' for one in (found.description, source))
    parts = [
        f'<header><p class="brand">odtrt profile</p><h1>{_html(title)}</h1>'
        f'<p class="badges">{badges}</p>'
        f'<dl class="facts">{cells}</dl></header>',
        f"<section><h2>{_html(sentence(found))}</h2>"
        f'<figure style="overflow-x:auto">{timeline_svg(found)}</figure></section>',
        _section("Steps", ("", "p50", "p95", "p99", "p99.9", "share"), _step_rows(found)),
    ]
    if found.costs:
        rows = [(f"{one.what}; {one.remedy}", cost_figure(one.us, one.is_measured)) for one in found.costs]
        parts.append(_section("What can be avoided", ("", "a frame"), rows))
    if found.calls:
        calls = [
            (f"{row.call.name} {row.call.side}", _who(row.call), f"{row.count:g}", duration(row.us))
            for row in calls_of_a_frame(found)
        ]
        parts.append(_section("Copies, waits and allocations of a frame", ("", "by", "times", "time"), calls))
    if found.layers:
        parts.append(_section("The engine, layer by layer", ("", "time", "share"), _layer_rows(found)))
    parts.append(f"<footer><p>{_html(_FOOTER)}</p></footer>")
    return "\n".join(parts)


def _who(call: Call) -> str:
    """The step that makes a call by design, else the line that makes it."""
    return call.step if call.is_own else call.where or f"odtrt, in {call.step or 'no step'}"


def cost_figure(us: float, is_measured: bool) -> str:
    return duration(us) if is_measured else f"at most {duration(us)}"


def _step_rows(found: Profile) -> List[Tuple[str, ...]]:
    return [
        (
            row.step,
            *(
                duration(us)
                for us in (row.timing.p50_us, row.timing.p95_us, row.timing.p99_us, row.timing.p999_us)
            ),
            f"{row.share:.1%}",
        )
        for row in table(found.frames)
    ]


def _layer_rows(found: Profile) -> List[Tuple[str, ...]]:
    whole = sum(layer.us for layer in found.layers)
    shown, rest = found.layers[:_SHOWN_LAYERS], found.layers[_SHOWN_LAYERS:]
    rows = [(layer.name, layer.us) for layer in shown]
    if rest:
        rows.append((f"{len(rest)} more", sum(layer.us for layer in rest)))
    return [(name, duration(us), f"{us / whole:.1%}") for name, us in rows]


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<td>{_html(name)}</td>" if name else '<th scope="col"></th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{_html(first)}</th>{"".join(f"<td>{_html(cell)}</td>" for cell in others)}</tr>'
        for first, *others in rows
    )
    return f'<section class="stage"><h3>{_html(title)}</h3><table><tr>{heads}</tr>{lines}</table></section>'


def _html(value: object) -> str:
    return html.escape(printable(value))


_FOOTER = (
    "At each moment of a frame the step on the GPU counts, then the innermost step on the host; the rest is "
    "unexplained. So the shares add up to the frame. The recorder itself takes time: compare with the frames "
    "that were not recorded. A layer takes longer when it is timed alone, so the layers are scaled to the "
    'engine\'s step. What can be avoided was measured with and without, in turns; "at most" is a bound. The '
    "costs do not add up."
)
_STYLE = (
    ".tl{display:block;width:100%;min-width:640px;height:auto;background:#fff;"
    "font:12px system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif}"
    ".tl text{fill:#16202c}.tl .tl-head{font-weight:600;font-size:13px}.tl .tl-line{stroke:#8a94a0}"
    ".tl .tl-rest{fill:#e4e8ed}"
    "@media (prefers-color-scheme:dark){.tl{background:#161c24}.tl text{fill:#e7ecf2}"
    ".tl .tl-rest{fill:#303a47}}"
)
