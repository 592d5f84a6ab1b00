"""Boxes on moving pictures: the page as a browser gets it, the loop with our own clock and detector."""

from __future__ import annotations

import io
import itertools
import json
import sys
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from test_sources import Camera, number_of

from odtrt_lib import live
from odtrt_lib.detector import Detections
from odtrt_lib.errors import InputError
from odtrt_lib.live import Statistics
from odtrt_lib.sources import Source, open_stream

FOUND = Detections(np.float32([[80, 120, 360, 520]]), np.float32([0.9]), np.array([1]), ("nut",))
ORANGE = (230, 159, 0)  # of class 1
GREY = np.full((480, 640, 3), 128, np.uint8)


def finite(count, error=None, frame_count=0):
    """A source of ``count`` frames; closed: how often it was closed."""
    closed = []
    frames = iter(range(count))

    def read():
        number = next(frames, None)
        if number is None and error is not None:
            raise error
        return None if number is None else np.full((2, 2, 3), number, np.uint8)

    return Source("film", read, False, frame_count, lambda: closed.append(1)), closed


class Seen:
    """A detector and a display that remember; the display is closed by its viewer after so many pictures."""

    def __init__(self, viewed=None):
        self.detected, self.shown, self.viewed = [], [], viewed

    def detect(self, image):
        self.detected.append(number_of(image))
        return FOUND

    def show(self, image, found, statistics):
        assert found is FOUND
        self.shown.append((number_of(image), statistics))
        return len(self.shown) != self.viewed


@pytest.mark.parametrize(
    ("limits", "count"), [({}, 4), ({"frames": 3}, 3), ({"frames": 9}, 4)], ids=["end", "3", "9"]
)
def test_every_frame_of_a_file_is_detected_in_and_shown(limits, count):
    source, closed = finite(4)
    seen, said = Seen(), []
    statistics = live.watch(seen, source, seen, say=said.append, **limits)
    assert seen.detected == [number for number, _ in seen.shown] == list(range(count))
    assert statistics == seen.shown[-1][1]
    assert (statistics.frames, statistics.dropped) == (count, 0)
    assert said == [f"film: {statistics}"] and closed == [1]


def test_a_viewer_who_closes_the_window_ends_it():
    source, closed = finite(9)
    seen = Seen(viewed=2)
    assert live.watch(seen, source, seen, say=lambda line: None).frames == 2
    assert closed == [1]


@pytest.mark.parametrize("error", [InputError("film: lost"), KeyboardInterrupt()], ids=["lost", "Ctrl-C"])
def test_what_ends_it_midway_is_raised_after_the_figures(error):
    source, closed = finite(2, error)
    seen, said = Seen(), []
    with pytest.raises(type(error)):
        live.watch(seen, source, seen, say=said.append)
    assert len(said) == 1 and said[0].startswith("film: 2 frames; ") and closed == [1]


def test_a_film_that_is_shorter_than_its_header_says_is_told_of():
    for promised, told in ((3, False), (20, True)):
        said = []
        seen = Seen()
        live.watch(seen, finite(3, frame_count=promised)[0], seen, say=said.append)
        assert (said[-1] == "film: its header tells of 20 frames; it may be cut off or damaged") == told
    said = []
    live.watch(seen, finite(30, frame_count=20)[0], seen, frames=2, say=said.append)
    assert len(said) == 1


def test_the_figures_are_those_of_the_clock(monkeypatch):
    """The first detection takes 2 s, 98 take 10 ms, two take 40 ms; 10 ms pass between two."""
    times = [2.0] + [0.010] * 98 + [0.040, 0.040]
    ticks = itertools.chain([0.0], itertools.accumulate(x for t in times for x in (0.010, t)))
    monkeypatch.setattr(live.time, "perf_counter", lambda: next(ticks))
    said = []
    seen = Seen()
    statistics = live.watch(seen, finite(len(times))[0], seen, say=said.append)
    assert statistics.frames == 101
    assert statistics.fps == pytest.approx(100 / (100 * 0.010 + 98 * 0.010 + 2 * 0.040), rel=1e-9)
    assert statistics.p50_ms == pytest.approx(10, rel=2e-3)
    assert statistics.p99_ms == pytest.approx(40, rel=2e-3)
    shown = Statistics(101, 0, 48.54, 10.004, 40.0)
    assert str(shown) == "101 frames; 48.5 FPS; detection p50 10.00 ms, p99 40.00 ms"
    assert seen.shown[0][1] == Statistics(1) and str(Statistics(1, 3)) == "1 frame, 3 dropped"
    assert said == [f"film: {statistics}"], "five seconds have not passed"


def test_the_figures_are_told_every_five_seconds(monkeypatch):
    ticks = itertools.count(0.0, 1.0)
    monkeypatch.setattr(live.time, "perf_counter", lambda: next(ticks))
    said = []
    seen = Seen()
    live.watch(seen, finite(9)[0], seen, say=said.append)
    assert [line.split(";")[0] for line in said] == ["3 frames", "6 frames", "9 frames", "film: 9 frames"]


def test_a_detector_slower_than_the_camera_gets_its_newest_frame():
    camera = Camera(last=6)
    seen = Seen()

    def detect(image):
        seen.detected.append(number_of(image))
        if number_of(image) == 1:  # meanwhile come 2, 3, 4 and 5
            for _ in range(4):
                camera.until_asked()
                camera.give()
            camera.until_asked()
        elif number_of(image) == 5:
            camera.give()
        elif number_of(image) == 6:
            camera.until_asked()
            camera.give()
        return FOUND

    detector = SimpleNamespace(detect=detect)
    starter = threading.Thread(target=lambda: (camera.until_asked(), camera.give()))
    starter.start()
    statistics = live.watch(detector, camera.source, seen, say=lambda line: None)
    starter.join()
    assert seen.detected == [1, 5, 6]
    assert (statistics.frames, statistics.dropped) == (3, 3)
    assert camera.closed == 1


# --- the page


@pytest.fixture
def page():
    opened = live.Page("<parts> & film", 0.3)
    yield opened
    opened.close()


def fetch(url, **headers):
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)


def jpeg_parts(response):
    """The JPEG files of a multipart stream, decoded: uint8 [height, width, 3]."""
    from PIL import Image

    kind, _, boundary = response.headers["Content-Type"].partition("; boundary=")
    assert kind == "multipart/x-mixed-replace"
    while True:
        line = response.readline()
        if not line:
            return
        if line.strip() == f"--{boundary}".encode():
            headers = dict(iter(lambda: tuple(response.readline().decode().strip().split(": ")), ("",)))
            assert headers["Content-Type"] == "image/jpeg"
            content = response.read(int(headers["Content-Length"]))
            yield np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def box_edges(image, box):
    """The pixels on the middle of the four sides' lines: [n, 3]."""
    top, left, bottom, right = (round(float(side)) for side in box)
    rows, columns = range(top + 5, bottom - 5), range(left + 5, right - 5)
    return np.concatenate([image[rows, left + 1], image[rows, right - 1], image[bottom - 1, columns]])


def test_a_browser_sees_the_newest_picture_with_its_box(page):
    assert page.url.startswith("http://127.0.0.1:")
    page.show(np.zeros_like(GREY), FOUND, Statistics(1))
    page.show(GREY[..., ::-1], FOUND, Statistics(2, 1, 30.0, 7.5, 9.25))
    parts = jpeg_parts(fetch(f"{page.url}stream"))
    picture = next(parts)
    assert picture.shape == GREY.shape
    np.testing.assert_allclose(picture[100:, :20], 128, atol=4)
    edges = box_edges(picture, FOUND.boxes[0])
    assert np.abs(edges.astype(int) - ORANGE).mean() < 40 < np.abs(edges.astype(int) - 128).mean()
    page.show(np.full_like(GREY, 200), FOUND, Statistics(3))
    np.testing.assert_allclose(next(parts)[100:, :20], 200, atol=4)
    page.show(np.full_like(GREY, 20), FOUND, Statistics(4))
    page.close()
    np.testing.assert_allclose(next(parts)[100:, :20], 20, atol=4)
    assert list(parts) == [], "the stream ends"


def test_the_page_has_the_figures_and_its_title_is_text(page):
    page.show(GREY, FOUND, Statistics(2, 1, 30.0, 7.5, 9.25))
    with fetch(page.url) as answer:
        text = answer.read().decode()
    assert "&lt;parts&gt; &amp; film" in text and "<parts>" not in text
    assert '<img src="/stream"' in text and "/stats.json" in text
    with fetch(f"{page.url}stats.json") as answer:
        figures = json.load(answer)
    assert figures == {
        "frames": 2, "dropped": 1, "fps": 30.0, "p50_ms": 7.5, "p99_ms": 9.25,
        "text": "2 frames, 1 dropped; 30.0 FPS; detection p50 7.50 ms, p99 9.25 ms",
    }  # fmt: skip


def test_a_picture_is_drawn_once_for_all_viewers_and_never_for_none(page, monkeypatch):
    drawn, draw = [], live.draw_detections
    monkeypatch.setattr(live, "draw_detections", lambda *a: drawn.append(1) or draw(*a))
    for _ in range(5):
        page.show(GREY, FOUND, Statistics(1))
    assert drawn == []
    first, second = (next(jpeg_parts(fetch(f"{page.url}stream"))) for _ in range(2))
    assert drawn == [1] and np.array_equal(first, second)


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("", "attacker.example", 403),
        ("stream", "attacker.example:80", 403),
        ("", "", 403),
        ("etc", None, 404),
    ],
)
def test_other_names_and_paths_are_refused(page, path, host, status):
    headers = {} if host is None else {"Host": host}
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(f"{page.url}{path}", **headers)
    assert error.value.code == status
    with fetch(page.url, Host="localhost:8080") as answer:  # through `ssh -L 8080:...`
        assert answer.status == 200


def test_a_viewer_who_leaves_does_no_harm(page, capfd):
    page.show(GREY, FOUND, Statistics(1))
    response = fetch(f"{page.url}stream")
    next(jpeg_parts(response))
    response.close()
    for number in range(20):
        page.show(np.full((400, 400, 3), number, np.uint8), FOUND, Statistics(number))
    next(jpeg_parts(fetch(f"{page.url}stream")))
    page.close()
    assert capfd.readouterr().err == ""


def test_a_port_in_use_or_out_of_range_is_refused(page):
    port = int(page.url.rstrip("/").rpartition(":")[2])
    for wrong in (port, 99_999):
        with pytest.raises(InputError, match=f"127.0.0.1:{wrong}: no page can be served there"):
            live.Page("again", 0.3, port=wrong)


def test_a_network_camera_is_read_until_it_is_lost(page):
    """The page itself is one: Motion JPEG over HTTP."""
    pytest.importorskip("cv2")
    is_enough = threading.Event()

    def film():
        for number in itertools.count():
            if is_enough.is_set():
                page.close()
                return
            page.show(np.roll(GREY, number % 7), FOUND, Statistics(number))

    thread = threading.Thread(target=film)
    thread.start()
    try:
        seen, said = Seen(), []
        camera = open_stream(f"{page.url}stream")
        assert camera.is_live
        watched = live.watch(seen, camera, seen, frames=3, say=said.append)
        assert watched.frames == 3 and len(seen.shown) == 3

        detector = SimpleNamespace(detect=lambda image: is_enough.set() or seen.detect(image))
        with pytest.raises(InputError, match=r"stream: gives no more pictures; is it unplugged, off"):
            live.watch(detector, open_stream(f"{page.url}stream"), Seen(), say=said.append)
    finally:
        is_enough.set()
        thread.join()


# --- a window


def test_no_file_in_the_working_folder_stands_in_for_opencv(monkeypatch, tmp_path):
    (tmp_path / "cv2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef namedWindow(name): pass")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISPLAY", ":0")
    live._has_windows()
    assert not (tmp_path / "ran").exists()


class FakeWindows(SimpleNamespace):
    """An OpenCV with windows, whose viewer presses these keys."""

    def __init__(self, keys):
        keys = iter(keys)
        self.pictures, self.sizes, self.is_there = [], [], True
        super().__init__(
            WINDOW_NORMAL=0,
            WND_PROP_AUTOSIZE=1,
            namedWindow=lambda *a: None,
            setWindowTitle=lambda *a: None,
            resizeWindow=lambda title, *size: self.sizes.append(size),
            imshow=lambda title, picture: self.pictures.append(picture),
            waitKey=lambda milliseconds: next(keys),
            getWindowProperty=lambda *a: 0 if self.is_there else -1,
            destroyAllWindows=lambda: None,
        )


def test_a_window_shows_bgr_until_its_viewer_leaves(monkeypatch):
    windows = FakeWindows([-1, ord("a"), ord("q"), 27, -1])
    monkeypatch.setitem(sys.modules, "cv2", windows)
    monkeypatch.setattr(live, "_has_windows", lambda: True)
    window = live.open_display("film", 0.3)
    assert isinstance(window, live.Window)
    assert [window.show(GREY, FOUND, Statistics(1)) for _ in range(4)] == [True, True, False, False]
    windows.is_there = False
    assert not window.show(GREY, FOUND, Statistics(1))
    edges = box_edges(windows.pictures[0][..., ::-1], FOUND.boxes[0])
    assert {tuple(pixel) for pixel in edges.tolist()} == {ORANGE}
    assert windows.sizes == [(640, 480)]
    window.close()


TRIALS = {
    "works": "def namedWindow(name): pass",
    "no OpenCV": "raise ImportError",
    "no windows in it": "",
    "Qt without its screen": "import os; namedWindow = lambda name: os.abort()",
}


@pytest.mark.parametrize("why", [*TRIALS, "no screen", "asked for"])
def test_without_a_window_there_is_a_page(monkeypatch, tmp_path, why):
    (tmp_path / "cv2.py").write_text(TRIALS.get(why, TRIALS["works"]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("DISPLAY", "" if why == "no screen" else ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert live._has_windows() == (why in ("works", "asked for"))
    if why == "works":
        return
    page = live.open_display("film", 0.3, page_only=why == "asked for")
    assert isinstance(page, live.Page)
    page.close()
