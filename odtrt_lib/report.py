"""Writes ``report.html``: the inputs and outputs of each stage, its checks, and its time.

The file needs no other: it contains styles and pictures, and its content security policy forbids the browser
to load anything. Its content comes from the folder's ``log.jsonl`` and ``spec.json``, and from the caller's
pictures.
"""

from __future__ import annotations

import base64
import html
import io
import re
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib.errors import InputError, printable
from odtrt_lib.folder import atomic_write, part_sha256, read_log, sha256
from odtrt_lib.spec import DetectorSpec, load_spec

REPORT = "report.html"

# Figures that can make a stage fail get a tick in the report; others are only shown.
_GATE = re.compile("err|worst|restored|control_flow|agree|match|checker|(?<!max_)times_noise")

# A picture's longer side in the report, in pixels; larger ones are scaled down.
LARGEST_SIDE = 1280

_STAGES = {
    "export": (
        "Export",
        "The checkpoint became a frozen graph of the raw heads: box encodings and class logits, without "
        "TensorFlow's pre- and post-processing.",
    ),
    "convert": ("Convert", "The frozen graph became ONNX, and ONNX Runtime was held against TensorFlow."),
    "engine": ("Engine", "TensorRT compiled the ONNX model into a plan for this version of its runtime."),
    "fuse": ("Fuse", "The post-processing became a node of the ONNX model: the TensorRT plugin OdtrtDetect."),
    "fuse_onnx": ("Fuse", "The post-processing became ONNX operators, for runtimes that load no plugin."),
    "detect": ("Detect", "The model looked at pictures, with exactly the OD API's pre- and post-processing."),
}

# Stage -> its chapter. A stage without a chapter gets a dot.
_CHAPTERS = {"export": "1", "convert": "2", "engine": "3", "fuse": "4", "fuse_onnx": "4"}

Picture = Tuple[str, Union[bytes, np.ndarray]]


def write_report(
    folder: Union[str, Path],
    pictures: Sequence[Picture] = (),
    *,
    detections: Sequence[Any] = (),
    skipped: Optional[Mapping[str, str]] = None,
) -> Path:
    """Writes ``report.html`` into ``folder`` and returns its path.

    pictures: (title, picture); a picture is a JPEG or PNG file's bytes, or uint8 ``[height, width, 3]``, RGB.
    detections: for each picture its :class:`odtrt_lib.detector.Detections`, for the text beside it; empty: no
        text.
    skipped: stage -> why it was not run.

    Raises InputError if the folder has no finished stage, or a picture is of another form.
    """
    folder = Path(folder)
    records = _current_records(read_log(folder))
    if not records:
        raise InputError(f"{folder}: no finished stage to report on; run `odtrt run` or `odtrt export` first")
    if detections and len(detections) != len(pictures):
        raise InputError(f"{len(pictures)} pictures, but detections for {len(detections)}")
    spec = load_spec(folder / "spec.json") if (folder / "spec.json").is_file() else None
    done = {record["stage"] for record in records}
    skipped = {stage: reason for stage, reason in (skipped or {}).items() if stage not in done}
    order = [*_STAGES, *sorted({*done, *skipped} - set(_STAGES))]
    records.sort(key=lambda record: order.index(record["stage"]))
    title = spec.name if spec else folder.resolve().name
    cards = [(record["stage"], partial(_stage, folder, record)) for record in records]
    cards += [(stage, partial(_skipped_stage, stage, reason)) for stage, reason in skipped.items()]
    cards.sort(key=lambda card: order.index(card[0]))
    sections = [_header(title, spec, records, skipped), _timeline(records)]
    sections += [card(_CHAPTERS.get(stage, "•")) for stage, card in cards]
    sections.append(_gallery(pictures, detections))
    if spec:
        sections.append(_contract(spec))
    sections.append(_footer(records))
    with atomic_write(folder / REPORT) as temporary:
        temporary.write_text(page(title, "\n".join(filter(None, sections))), encoding="utf-8")
    return folder / REPORT


def page(title: str, body: str, style: str = "") -> str:
    """A page in this module's style that needs no other file. The browser may load nothing for it.

    title: text. body: HTML. style: CSS after the common one.
    """
    return _PAGE.format(
        title=_text(f"{title} · odtrt"),
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        style=_STYLE + style,
        body=body,
    )


def figures(checks: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """A record's checks in words, as pairs: what was checked, and its figure."""
    return [(_words(name), _figure(value)) for name, value in _flat(checks)]


def undecided(checks: Mapping[str, Any]) -> Optional[Tuple[str, str]]:
    """The first check of a record that was not decisive: the start of its figures' names, and a sentence.

    None if all were decisive. The figure ``sees_kernel_change`` is the smallest relative change of a kernel
    that the check would reveal; see :mod:`odtrt_lib.export.noise`.
    """
    flat = dict(_flat(checks))
    for name, value in flat.items():
        if name.endswith("is_decisive") and value is False:
            start = name[: -len("is_decisive")]
            seen = flat.get(f"{start}sees_kernel_change", 1.0)
            hidden = (
                "a wrong kernel" if seen >= 1 else f"a kernel wrong by less than {seen:.2g} of its values"
            )
            return start, (
                f"{_words(start).strip(' :')} is not decisive: these weights magnify rounding so much that "
                f"{hidden} would not be seen; use trained weights"
            )
    return None


def _current_records(log: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The newest record for each set of files that a stage wrote. A folder can contain several plans."""
    newest: Dict[Tuple[str, Tuple[str, ...]], Dict[str, Any]] = {}
    for record in log:
        key = (record["stage"], tuple(sorted(record["outputs"])))
        newest.pop(key, None)
        newest[key] = record
    return list(newest.values())


def _header(
    title: str, spec: Optional[DetectorSpec], records: List[Dict[str, Any]], skipped: Mapping[str, str]
) -> str:
    seconds = sum(record["seconds"] for record in records)
    open_ones = [_name(record["stage"]) for record in records if undecided(record["checks"])]
    verdict = f"not decisive: {', '.join(open_ones)}" if open_ones else "every check held"
    done = f"{len(records)} stage{'s' * (len(records) != 1)} finished, {verdict}"
    colour, tick = ("muted", "") if open_ones else ("good", _TICK)
    missing = "".join(f'<span class="badge muted">{_text(_name(stage))} skipped</span>' for stage in skipped)
    facts = [("Time", _seconds(seconds))]
    if spec:
        facts = [
            ("Network", spec.source.feature_extractor.replace("_", " ")),
            ("Input", f"{spec.input.height} × {spec.input.width}, batch {spec.input.batch or 'dynamic'}"),
            ("Classes", f"{spec.heads.num_classes:,}"),
            ("Anchors", f"{spec.heads.num_anchors:,}"),
            *facts,
        ]
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    return (
        f'<header><p class="brand">odtrt</p><h1>{_text(title)}</h1>'
        f'<p class="badges"><span class="badge {colour}">{tick}{_text(done)}</span>{missing}</p>'
        f'<dl class="facts">{cells}</dl></header>'
    )


def _timeline(records: List[Dict[str, Any]]) -> str:
    total = sum(record["seconds"] for record in records) or 1.0
    bars = "".join(
        f'<i class="hue{i % 5}" style="flex-grow:{max(record["seconds"] / total, 0.006):.4f}"></i>'
        for i, record in enumerate(records)
    )
    legend = "".join(
        f'<li><i class="hue{i % 5}"></i>{_text(_name(record["stage"]))}{_text(_variant(record))} '
        f"<b>{_seconds(record['seconds'])}</b></li>"
        for i, record in enumerate(records)
    )
    return (
        '<section aria-label="Where the time went" class="timeline">'
        f'<div class="bar" aria-hidden="true">{bars}</div><ul>{legend}</ul></section>'
    )


def _stage(folder: Path, record: Dict[str, Any], number: str) -> str:
    _, purpose = _STAGES.get(record["stage"], ("", ""))
    outdated = [
        name for name, digest in record["inputs"].items() if _digest_now(folder, name) not in (None, digest)
    ]
    warning = (
        f'<p class="warning">Outdated: {_text(", ".join(outdated))} changed after this stage ran.</p>'
        if outdated
        else ""
    )
    unseen = undecided(record["checks"])
    if unseen:
        warning += f'<p class="warning">{_text(unseen[1][:1].upper() + unseen[1][1:])}.</p>'
    inputs = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_hash(digest)}</td></tr>'
        for name, digest in record["inputs"].items()
    )
    outputs = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_size(folder / name, digest)}</td>'
        f"<td>{_hash(digest)}</td></tr>"
        for name, digest in record["outputs"].items()
    )
    flat = sorted(_flat(record["checks"]), key=lambda check: not _is_gate(*check))
    unseen_start = unseen[0] if unseen else None
    checks = "".join(
        f"<li>{_mark(name, value, unseen_start)}<span>{_text(_words(name))}</span>"
        f"<b>{_text(_figure(value))}</b></li>"
        for name, value in flat
    )
    settings = "".join(
        f"<div><dt>{_text(_words(name))}</dt><dd>{_text(_figure(value))}</dd></div>"
        for name, value in _flat(record["settings"])
    )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""<section class="stage">
<div class="stage-head"><span class="number" aria-hidden="true">{number}</span>
<div><h2>{_text(_name(record["stage"]))}<small>{_text(_variant(record))}</small></h2>
<p>{_text(purpose)}</p></div>
<p class="cost"><b>{_seconds(record["seconds"])}</b><span>{_memory(record["peak_rss_mb"])}</span></p></div>
{warning}
<div class="columns">
<div><h3>Went in</h3><table>{inputs}</table></div>
<div><h3>Came out</h3><table>{outputs}</table></div>
</div>
<h3>Checked</h3><ul class="checks">{checks}</ul>
<details><summary>Settings and versions</summary><dl class="settings">{settings}
<div><dt>versions</dt><dd>{_text(versions)}</dd></div>
<div><dt>finished</dt><dd>{_text(record["time"])}</dd></div></dl></details>
</section>"""


def _digest_now(folder: Path, name: str) -> Optional[str]:
    """The present SHA-256 of a stage's input, a file or a part of ``spec.json``; None if there is no such
    file."""
    file, _, sections = name.partition(": ")
    if Path(file).name != file or len(file) > 200 or not (folder / file).is_file():
        return None
    return part_sha256((folder / file).read_bytes(), name) if sections else sha256(folder / file)


def _is_gate(name: str, value: Any) -> bool:
    return value is not None and _GATE.search(name) is not None


def _mark(name: str, value: Any, undecided_start: Optional[str]) -> str:
    if _is_gate(name, value) and not (undecided_start and name.startswith(undecided_start)):
        return _TICK
    return _DOT.format("–" if value is None else "·")


def _skipped_stage(stage: str, reason: str, number: str) -> str:
    return (
        f'<section class="stage skipped"><div class="stage-head">'
        f'<span class="number" aria-hidden="true">{number}</span>'
        f"<div><h2>{_text(_name(stage))}<small>skipped</small></h2><p>{_text(reason)}</p></div></div></section>"
    )


def _gallery(pictures: Sequence[Picture], detections: Sequence[Any]) -> str:
    if not pictures:
        return ""
    figures = []
    for i, (title, picture) in enumerate(pictures):
        found = _found(detections[i]) if detections else ""
        alt = f"{title}: {found}" if found else title
        figures.append(
            f'<figure><img src="{_data_uri(title, picture)}" alt="{_text(alt)}">'
            f"<figcaption><b>{_text(title)}</b>{_text(found)}</figcaption></figure>"
        )
    return (
        f'<section><h2>What it sees</h2><div class="gallery{" single" * (len(figures) == 1)}">'
        f"{''.join(figures)}</div></section>"
    )


def _found(detections: Any) -> str:
    if len(detections.scores) == 0:
        return "nothing found"
    names = [f"{name} {detections.scores[i]:.2f}" for i, name in enumerate(detections.names)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _contract(spec: DetectorSpec) -> str:
    nms = spec.nms
    channels = [(spec.input.scale[i], spec.input.offset[i]) for i in range(3)]
    rows = {
        "Resize": f"{spec.input.resizer.kind.replace('_', ' ')}, {spec.input.resizer.method}",
        "Pixel values": "; ".join(dict.fromkeys(f"p × {s:.6g} + {o:.6g}" for s, o in channels)),
        **spec.heads.in_words(),
        "Non-maximum suppression": f"score > {nms.score_threshold:g}, IoU > {nms.iou_threshold:g}, at most "
        f"{nms.max_detections_per_class} a class and {nms.max_total_detections} in all, "
        f"{'across classes' if nms.class_agnostic else 'class by class'}",
        "Labels": ", ".join(f"{label.id} {label.name}" for label in spec.labels),
        "Source": f"{spec.source.checkpoint}, TensorFlow {spec.source.tensorflow_version}, "
        f"OD API {spec.source.odapi_version}",
    }
    cells = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in rows.items()
    )
    return (
        "<section><details><summary>The contract: <code>spec.json</code>, which every stage obeys</summary>"
        f'<dl class="settings">{cells}</dl></details></section>'
    )


def _footer(records: List[Dict[str, Any]]) -> str:
    newest = max(record["time"] for record in records)
    return (
        f"<footer><p>From log.jsonl, newest record {_text(newest)}. Memory is the peak of the whole "
        "process up to the end of the stage. A stage whose check fails leaves no record and no file."
        "</p></footer>"
    )


def _data_uri(title: str, picture: Union[bytes, np.ndarray]) -> str:
    from PIL import Image

    if isinstance(picture, (bytes, bytearray)):
        try:
            image = Image.open(io.BytesIO(picture)).convert("RGB")
        except OSError as error:
            raise InputError(f"picture {title!r}: neither a JPEG nor a PNG ({error})") from error
    else:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(
                f"picture {title!r}: {picture.dtype} {list(picture.shape)}, expected uint8 [height, width, 3]"
            )
        image = Image.fromarray(picture)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=88, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _name(stage: str) -> str:
    return _STAGES[stage][0] if stage in _STAGES else stage.capitalize()


def _variant(record: Dict[str, Any]) -> str:
    precision = record["settings"].get("precision")
    return f" {precision}" if precision else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> List[Tuple[str, Any]]:
    flat: List[Tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}: ")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


_SPELLED_OUT = {
    "err": "error",
    "abs": "absolute",
    "rel": "relative",
    "max": "largest",
    "mb": "(MB)",
    "gpu": "GPU",
    "tf": "TF",
    "iou": "IoU",
    "onnx": "ONNX",
}


def _words(name: str) -> str:
    return " ".join(_SPELLED_OUT.get(word, word) for word in name.split("_"))


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not tried"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _scientific(f"{value:.3g}")
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, Mapping) for item in value):
            return f"{len(value)}, listed in log.jsonl"
        shown = ", ".join(_figure(item) for item in value[:12])
        return f"{shown}, … ({len(value)} in all)" if len(value) > 12 else shown or "none"
    return str(value)


def _scientific(number: str) -> str:
    mantissa, _, exponent = number.partition("e")
    superscript = (
        str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if exponent else ""
    )
    return f"{mantissa} × 10{superscript}" if exponent else number


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _memory(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def _size(path: Path, digest: str) -> str:
    if not path.is_file():
        return "<em>removed since</em>"
    if sha256(path) != digest:
        return "<em>changed since</em>"
    size = float(path.stat().st_size)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _hash(digest: str) -> str:
    return f'<code title="SHA-256 {_text(digest)}">{_text(digest[:12])}</code>'


def _text(value: object) -> str:
    return html.escape(printable(value, keep="\n"), quote=True)


_TICK = (
    '<svg class="tick" viewBox="0 0 16 16" width="14" height="14" aria-hidden="true">'
    '<path d="M3 8.5 6.5 12 13 4.5" fill="none" stroke="currentColor" stroke-width="2.2" '
    'stroke-linecap="round" stroke-linejoin="round"/></svg>'
)
_DOT = '<span class="dot" aria-hidden="true">{}</span>'

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#5b6876;--line:#e2e6eb;
--good:#0f7a4a;--good-bg:#e3f5ec;--warn:#8a5a00;--warn-bg:#fdf2d8;--code:#eef1f5;
--h0:#2f6fde;--h1:#0d9488;--h2:#c2620c;--h3:#8b46c9;--h4:#b8336a}
@media (prefers-color-scheme:dark){:root{--page:#0e1217;--card:#161c24;--ink:#e7ecf2;--soft:#96a3b2;
--line:#28313d;--good:#5fd39b;--good-bg:#123224;--warn:#f0c261;--warn-bg:#3a2c0c;--code:#202935;
--h0:#6aa0ff;--h1:#3cc7b8;--h2:#f0954a;--h3:#bd8af0;--h4:#ef7ba6}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:clamp(1.7rem,4.5vw,2.5rem);line-height:1.15;margin:0;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0;letter-spacing:-.01em}
h2 small{font-size:.8rem;font-weight:600;color:var(--soft);margin-left:.4em}
h3{font-size:.75rem;text-transform:uppercase;letter-spacing:.08em;color:var(--soft);margin:0 0 6px}
p{margin:0}
code{font:.82em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--code);
padding:.15em .45em;border-radius:5px}
.brand{font-weight:700;letter-spacing:.02em;color:var(--h0);margin-bottom:4px}
.badges{display:flex;flex-wrap:wrap;gap:8px;margin:14px 0 24px}
.badge{display:inline-flex;align-items:center;gap:6px;border-radius:99px;padding:4px 12px;font-size:.875rem;
font-weight:600}
.good{background:var(--good-bg);color:var(--good)}
.muted{background:var(--code);color:var(--soft)}
.tick{flex:none;color:var(--good)}
dl{margin:0}dd{margin:0}dt{color:var(--soft)}
.facts{display:flex;flex-wrap:wrap;gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:12px;overflow:hidden}
.facts div{flex:1 1 132px;background:var(--card);padding:12px 16px}
.facts dt{font-size:.8rem}.facts dd{font-weight:650;overflow-wrap:anywhere}
.timeline{margin:28px 0}
.bar{display:flex;gap:2px;height:12px;border-radius:6px;overflow:hidden}
.bar i{flex-basis:0}
.timeline ul{list-style:none;display:flex;flex-wrap:wrap;gap:6px 20px;padding:0;margin:10px 0 0;
font-size:.875rem;color:var(--soft)}
.timeline li{display:flex;align-items:center;gap:7px}.timeline b{color:var(--ink);font-weight:600}
.timeline li i{width:10px;height:10px;border-radius:3px}
.hue0{background:var(--h0)}.hue1{background:var(--h1)}.hue2{background:var(--h2)}.hue3{background:var(--h3)}
.hue4{background:var(--h4)}
.stage{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:22px 24px;margin:16px 0}
.stage-head{display:grid;grid-template-columns:auto 1fr auto;gap:4px 16px;
align-items:start;margin-bottom:18px}
.stage-head p{color:var(--soft);max-width:62ch}
.number{display:grid;place-items:center;width:34px;height:34px;border-radius:10px;background:var(--code);
font-weight:700;color:var(--soft)}
.cost{text-align:right;white-space:nowrap;font-size:.875rem}
.cost b{display:block;font-size:1.05rem;color:var(--ink)}
.columns{display:grid;grid-template-columns:1fr 1.25fr;gap:24px;margin-bottom:18px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:6px 0;border-top:1px solid var(--line);text-align:right;vertical-align:baseline;
white-space:nowrap}
th{text-align:left;font-weight:500;white-space:normal;overflow-wrap:anywhere;padding-right:12px}
td{width:1%}td+td{padding-left:14px}
td em{color:var(--warn)}
.checks{list-style:none;margin:0;padding:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));
gap:0 32px;font-size:.92rem}
.checks li{display:grid;grid-template-columns:auto 1fr auto;gap:9px;align-items:baseline;padding:6px 0;
border-top:1px solid var(--line)}
.checks .tick{align-self:start;margin-top:5px}
.dot{width:14px;text-align:center;color:var(--soft)}
.checks b{font-variant-numeric:tabular-nums;text-align:right;overflow-wrap:anywhere}
.warning{background:var(--warn-bg);color:var(--warn);border-radius:8px;padding:8px 12px;margin-bottom:16px}
.skipped{border-style:dashed;background:none}.skipped .stage-head{margin:0}
details{margin-top:16px;font-size:.92rem}
summary{cursor:pointer;color:var(--soft)}
summary:focus-visible{outline:2px solid var(--h0);outline-offset:3px;border-radius:4px}
.settings{margin-top:10px;display:grid;gap:2px}
.settings div{display:grid;grid-template-columns:minmax(120px,220px) 1fr;gap:16px;padding:4px 0}
.settings dd{overflow-wrap:anywhere}
section>h2{margin:36px 0 14px}
.gallery{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:20px}
.gallery.single{max-width:760px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:14px;overflow:hidden}
img{display:block;width:100%;height:auto}
figcaption{padding:12px 16px;font-size:.875rem;color:var(--soft);overflow-wrap:anywhere}
figcaption b{display:block;color:var(--ink)}
footer{margin-top:40px;font-size:.82rem;color:var(--soft)}
@media (max-width:640px){main{padding:24px 16px 48px}.stage{padding:18px 16px}
.columns{grid-template-columns:1fr;gap:18px}.stage-head{grid-template-columns:auto 1fr}
.cost{grid-column:2;text-align:left;display:flex;gap:12px;align-items:baseline}.cost b{display:inline}
.settings div{grid-template-columns:1fr;gap:0}}
@media print{body{background:#fff}.stage,figure{break-inside:avoid}}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
