"""``python3 detect.py``: shows what the detector of an unpacked bundle finds in pictures, videos and
cameras."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence, Union

from odtrt_lib.bundle.archive import MODEL, exit_status
from odtrt_lib.errors import InputError, MissingDependencyError, printable

if TYPE_CHECKING:
    from odtrt_lib.detector import Detections, Detector
    from odtrt_lib.sources import Source

BUILT = "built.json"
DRAWN = "detections"

_HEADINGS = ("object", "score", "box: ymin, xmin, ymax, xmax")
_EXAMPLES = """\
python3 detect.py street.jpg         picture(s), or a folder: a table, and pictures with boxes in detections/
python3 detect.py video.mp4          a window, or a page in the browser where there is no screen
python3 detect.py --camera 0         a USB camera; csi:0 for one on a Jetson's CSI connector
python3 detect.py rtsp://host/path   a network camera
"""


def open_here(folder: Union[str, Path]) -> Detector:
    """Opens the detector of an unpacked bundle as ``build_here.py`` last opened it.

    If ``build_here.py`` has not run yet, ONNX Runtime detects on the CPU. Raises InputError if ``built.json``
    is damaged, and what ``Detector.open`` raises.
    """
    from odtrt_lib.detector import Detector

    folder = Path(folder)
    model, path = folder / MODEL, folder / BUILT
    if not path.is_file():
        return Detector.open(model)
    try:
        built = json.loads(path.read_text(encoding="utf-8"))
        is_fused = "detector.onnx" in built["plans"]
        backend, precision, plugin = built["backend"], built["precision"], built["plugin"]
        library = folder / plugin if is_fused else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged; run build_here.py again") from error
    if backend == "onnxruntime":
        return Detector.open(model)
    return Detector.open(model, plugin=library, precision=precision)


def detection_table(found: Detections) -> List[str]:
    """The detections as lines of text in columns; boxes are in pixels of the picture."""
    if not found.names:
        return ["nothing found"]
    boxes = [[f"{side:.0f}" for side in box] for box in found.boxes]
    widths = [max(map(len, column)) for column in zip(*boxes)]
    rows = [_HEADINGS] + [
        (
            printable(name),
            f"{score:.3f}",
            "[" + ", ".join(side.rjust(width) for side, width in zip(box, widths)) + "]",
        )
        for name, score, box in zip(found.names, found.scores, boxes)
    ]
    longest = max(len(row[0]) for row in rows)
    return [f"{name:{longest}}  {score}  {box}" for name, score, box in rows]


def run_detect(arguments: Sequence[str]) -> int:
    """Runs ``python3 detect.py`` for the bundle that contains the script; returns the exit status."""
    folder = Path(arguments[0]).resolve().parent
    parser = argparse.ArgumentParser(
        prog="python3 detect.py",
        description="Shows what the detector of this bundle finds.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", nargs="*", metavar="SOURCE", help="pictures, folders of them, a video file, or rtsp://..."
    )
    parser.add_argument("--camera", help="0 or /dev/video0; csi:0 on a Jetson's CSI connector")
    parser.add_argument("--min-score", type=float, default=0.3, help="show from this score up (default 0.3)")
    parser.add_argument("-o", "--output", metavar="DIR", help=f"where pictures go (default {folder / DRAWN})")
    parser.add_argument("--frames", type=_count, metavar="N", help="end a video or camera after N frames")
    parser.add_argument(
        "--page", action="store_true", help="a page in the browser, even if there is a screen"
    )
    parser.add_argument("--port", type=int, default=0, help="the page's port (default: a free one)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the page's address; 0.0.0.0 shows it to the whole network"
    )
    options = parser.parse_args(arguments[1:])
    if bool(options.source) == (options.camera is not None):
        parser.error("name what to detect in: pictures, a folder, a video, an address, or --camera")

    def say(line: str) -> None:
        print(printable(line), flush=True)

    def work() -> int:
        _require_modules()
        source = _moving(options)
        if source is not None:
            _watch(folder, source, options, say)
            return 0
        output = folder / DRAWN if options.output is None else Path(options.output)
        return _detect_in_pictures(folder, options, output, say)

    return exit_status(work, folder)


def _count(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 1")
    return int(text)


def _require_modules() -> None:
    for module, package in (("numpy", "numpy"), ("PIL", "pillow")):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(f"{package} is missing: `python3 -m pip install {package}`")
    from odtrt_lib.fonts import require_letters

    require_letters()


def _moving(options: argparse.Namespace) -> Optional[Source]:
    """Opens the video, stream or camera that was asked for; None if pictures were asked for."""
    from odtrt_lib import sources

    if options.camera is not None:
        return sources.open_camera(options.camera)
    moving = [
        place
        for place in options.source
        if sources.is_stream(place) or (Path(place).is_file() and not sources.is_picture(Path(place)))
    ]
    if not moving:
        return None
    if len(options.source) > 1:
        raise InputError(f"{moving[0]}: a video; expected only pictures, or one video alone")
    return (
        sources.open_stream(moving[0])
        if sources.is_stream(moving[0])
        else sources.open_video(Path(moving[0]))
    )


def _open(folder: Path, say: Callable[[str], None]) -> Detector:
    detector = open_here(folder)
    say(f"{detector.spec.name}: {detector.status.description}")
    for reason in detector.status.reasons:
        say(reason)
    return detector


def _watch(folder: Path, source: Source, options: argparse.Namespace, say: Callable[[str], None]) -> None:
    from odtrt_lib import live

    with _open(folder, say) as detector:
        title = f"{detector.spec.name}, {source.name}"
        display = live.open_display(
            title, options.min_score, page_only=options.page, host=options.host, port=options.port
        )
        say(f"{source.name}: {display.description}; Ctrl-C ends this")
        try:
            live.watch(detector, source, display, frames=options.frames, say=say)
        finally:
            display.close()


def _detect_in_pictures(
    folder: Path, options: argparse.Namespace, output: Path, say: Callable[[str], None]
) -> int:
    from odtrt_lib import sources
    from odtrt_lib.evaluate import detect_file
    from odtrt_lib.plots import confident, draw_detections
    from odtrt_lib.written_files import drawing_targets, write_drawing

    images = sources.pictures([Path(place) for place in options.source])
    targets = drawing_targets(images, output)
    unreadable: Dict[Path, str] = {}
    count = 0
    with _open(folder, say) as detector:
        for path, target in zip(images, targets):
            try:
                image, everything = detect_file(detector, path)
            except InputError as error:
                unreadable[path] = str(error)
                continue
            found = confident(everything, options.min_score)
            write_drawing(target, draw_detections(image, found, options.min_score))
            say(f"{path}: drawn in {target}")
            for line in detection_table(found):
                say(f"    {line}")
            count += len(found.names)
    seen = len(images) - len(unreadable)
    say(f"{count} detections with a score of at least {options.min_score:g}; pictures: {seen}")
    for reason in unreadable.values():
        print(f"error: {printable(reason)}", file=sys.stderr)
    return 1 if unreadable else 0
