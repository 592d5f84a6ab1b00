"""Shows detections in moving pictures, in a window or on a page in the browser, with frame rate and latency.

The page needs the standard library and Pillow only. By default it listens on this machine only.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Callable, Optional, Tuple, Union

import numpy as np

from odtrt_lib.errors import InputError, printable
from odtrt_lib.latency.timing import Histogram
from odtrt_lib.plots import draw_detections
from odtrt_lib.sources import Latest, Source

if TYPE_CHECKING:
    from odtrt_lib.detector import Detections, Detector

LOCALHOST = "127.0.0.1"

_TELL_SECONDS = 5.0
_TRIAL_SECONDS = 30
# After this time without reading, a viewer's connection is closed.
_VIEWER_SECONDS = 30
_JPEG_QUALITY = 85
_ESCAPE_KEY = 27
_MAX_WINDOW_WIDTH = 1280


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The figures so far.

    frames: how many the detector processed. dropped: how many were skipped because the detector was busy.
    fps: frames a second. p50_ms, p99_ms: milliseconds from an image in memory to its boxes. These three leave
    out the first frame, which is slow; they are None before the second.
    """

    frames: int = 0
    dropped: int = 0
    fps: Optional[float] = None
    p50_ms: Optional[float] = None
    p99_ms: Optional[float] = None

    def __str__(self) -> str:
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        counts = f"{self.frames} frame{'s' * (self.frames != 1)}{dropped}"
        if self.fps is None:
            return counts
        return f"{counts}; {self.fps:.1f} FPS; detection p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms"


class _Meter:
    def __init__(self) -> None:
        self.frames = 0
        self._times = Histogram()
        self._first = self._last = 0.0

    def add(self, start: float, end: float) -> None:
        """Counts one frame, which took from ``start`` to ``end``, in seconds."""
        self.frames += 1
        self._last = end
        if self.frames == 1:
            self._first = end
        else:
            self._times.add(1e6 * (end - start))

    def statistics(self, dropped: int) -> Statistics:
        if self.frames < 2:
            return Statistics(self.frames, dropped)
        p50, p99 = (self._times.percentile(percent) / 1e3 for percent in (50, 99))
        fps = (self.frames - 1) / max(self._last - self._first, 1e-9)
        return Statistics(self.frames, dropped, fps, p50, p99)


class Window:
    """A window of OpenCV, as large as the first picture, but at most 1,280 pixels wide."""

    def __init__(self, title: str, min_score: float) -> None:
        import cv2

        self.description = "in a window, which q closes"
        self._cv2, self._title, self._min_score = cv2, printable(title), min_score
        cv2.namedWindow(self._title, cv2.WINDOW_NORMAL)
        self._has_size = False

    def show(self, image: np.ndarray, found: Detections, statistics: Statistics) -> bool:
        """Shows a picture. Returns False if somebody has closed the window, or pressed q or Escape."""
        drawn = draw_detections(image, found, self._min_score)
        if not self._has_size:
            shrink = min(1.0, _MAX_WINDOW_WIDTH / drawn.shape[1])
            self._cv2.resizeWindow(self._title, int(shrink * drawn.shape[1]), int(shrink * drawn.shape[0]))
            self._has_size = True
        self._cv2.setWindowTitle(self._title, f"{self._title}: {statistics}")
        self._cv2.imshow(self._title, np.ascontiguousarray(drawn[..., ::-1]))
        key = self._cv2.waitKey(1) & 0xFF
        # Negative if the window is closed. WND_PROP_VISIBLE fails with GTK, which JetPack's OpenCV uses.
        is_open = self._cv2.getWindowProperty(self._title, self._cv2.WND_PROP_AUTOSIZE) >= 0
        return is_open and key not in (_ESCAPE_KEY, ord("q"))

    def close(self) -> None:
        self._cv2.destroyAllWindows()


class Page:
    """A page in the browser with the newest picture, as a stream of JPEG files, and the figures.

    The threads that serve viewers draw and encode a picture, once for all viewers; without viewers nothing is
    drawn. host: the address to listen on. port: 0 for a free one; :attr:`url` contains it. Raises InputError
    if it cannot listen there.
    """

    def __init__(self, title: str, min_score: float, host: str = LOCALHOST, port: int = 0) -> None:
        try:
            self._server = _Server((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"{host}:{port}: no page can be served there ({error}); choose another --port or none"
            ) from error
        self.title, self.statistics = title, Statistics()
        self.url = f"http://{host}:{self._server.server_address[1]}/"
        self.description = f"see {self.url}"
        self._min_score = min_score
        self._changed, self._drawing = threading.Condition(), threading.Lock()
        self._shown: Optional[Tuple[int, np.ndarray, Detections]] = None
        self._drawn: Tuple[int, bytes] = (0, b"")
        self._is_closed = False
        self._server.page = self
        serve = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        serve.start()

    def show(self, image: np.ndarray, found: Detections, statistics: Statistics) -> bool:
        """Replaces the last picture by this one. It is not copied, so do not write into it. Returns True."""
        with self._changed:
            number = 1 if self._shown is None else self._shown[0] + 1
            self._shown, self.statistics = (number, image, found), statistics
            self._changed.notify_all()
        return True

    def newest(self, after: int) -> Optional[Tuple[int, bytes]]:
        """Waits for a picture newer than number ``after``; returns its number and JPEG file, None at the
        end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_newer(after))
            if self._shown is None or not self._is_newer(after):
                return None
            number, image, found = self._shown
        with self._drawing:
            if self._drawn[0] < number:
                drawn = draw_detections(image, found, self._min_score)
                self._drawn = (number, _jpeg(drawn))
            return self._drawn

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def _is_newer(self, after: int) -> bool:
        return self._shown is not None and self._shown[0] > after


def open_display(
    title: str, min_score: float, *, page_only: bool = False, host: str = LOCALHOST, port: int = 0
) -> Union[Window, Page]:
    """A window if there is a screen and OpenCV can open one, otherwise a page; see :class:`Page`."""
    if not page_only and _has_windows():
        return Window(title, min_score)
    return Page(title, min_score, host, port)


def _has_windows() -> bool:
    """Whether OpenCV can open a window. Tries it in another process, because Qt ends the process if it
    fails."""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    # Like this process, it must not import from the working folder.
    program = "import sys; sys.path[:] = filter(None, sys.path); import cv2; cv2.namedWindow('trial')"
    command = [sys.executable, "-c", program]
    try:
        tried = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:  # the screen cannot be reached
        return False
    return tried.returncode == 0


def watch(
    detector: Detector,
    source: Source,
    display: Union[Window, Page],
    *,
    frames: Optional[int] = None,
    say: Callable[[str], None] = print,
) -> Statistics:
    """Detects in one frame after the other and shows them, until the source ends or the window is closed.

    Another thread reads a live source, so that the detector gets the newest frame; see
    :class:`odtrt_lib.sources.Latest`. frames: end after this number. say: is called with the figures every
    five seconds and at the end, even after an error or Ctrl-C. Closes the source, but not the display.

    Raises what ``source.read`` and ``detector.detect`` raise.
    """
    meter, latest = _Meter(), Latest(source) if source.is_live else None
    reader: Any = latest or source
    statistics, told, is_at_end = Statistics(), time.perf_counter(), False
    try:
        while frames is None or meter.frames < frames:
            image = reader.read()
            if image is None:
                is_at_end = True
                break
            start = time.perf_counter()
            found = detector.detect(image)
            end = time.perf_counter()
            meter.add(start, end)
            statistics = meter.statistics(latest.dropped if latest else 0)
            if not display.show(image, found, statistics):
                break
            if end - told > _TELL_SECONDS:
                say(str(statistics))
                told = end
    finally:
        reader.close()
        say(f"{source.name}: {statistics}")
    if is_at_end and source.frame_count and source.frame_count != meter.frames:
        say(f"{source.name}: its header tells of {source.frame_count} frames; it may be cut off or damaged")
    return statistics


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    page: Page

    def server_bind(self) -> None:
        """Binds the address. HTTPServer's own method would also ask the network for a name of it."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a viewer may leave at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _VIEWER_SECONDS

    def do_GET(self) -> None:
        page = self.server.page
        if not self._is_for_us():
            # If another site's name resolved to this address, that site's scripts could read the pictures.
            self.send_error(403, "ask for it by the address that detect.py printed")
        elif self.path == "/":
            name = html.escape(printable(page.title))
            self._answer("text/html; charset=utf-8", _HTML.replace("{title}", name).encode())
        elif self.path == "/stats.json":
            figures = {**dataclasses.asdict(page.statistics), "text": str(page.statistics)}
            self._answer("application/json", json.dumps(figures).encode())
        elif self.path == "/stream":
            self._stream(page)
        else:
            self.send_error(404)

    def _is_for_us(self) -> bool:
        listening = self.server.server_name
        name = re.sub(":[0-9]*$", "", self.headers.get("Host", ""))
        return not listening.startswith("127.") or name in ("localhost", listening)

    def _answer(self, kind: str, content: bytes) -> None:
        self._start(kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _start(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")

    def _stream(self, page: Page) -> None:
        self._start("multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        shown = page.newest(0)
        while shown is not None:
            number, jpeg = shown
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg + b"\r\n")
            shown = page.newest(number)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Does nothing: the terminal is for the figures."""


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


_HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self'; connect-src 'self';
 script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
  body { margin: 0; background: #111; color: #eee; font: 16px/1.5 sans-serif; text-align: center }
  p { margin: .5em; font-variant-numeric: tabular-nums }
  img { max-width: 100%; max-height: calc(100vh - 4em) }
</style>
<p>{title}: <span id="figures">no frame yet</span></p>
<img src="/stream" alt="the newest picture, with a box around each object found in it">
<script>
  const figures = document.getElementById("figures");
  const timer = setInterval(async () => {
    try { figures.textContent = (await (await fetch("/stats.json")).json()).text; }
    catch { figures.textContent += " (ended)"; clearInterval(timer); }
  }, 500);
</script>
</html>
"""
