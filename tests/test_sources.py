"""Where frames come from: OpenCV's own files as oracle, cameras by an OpenCV that is ours, no sleeps."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from odtrt_lib import sources
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.sources import Latest, Source

COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 230))  # RGB


def write_video(path: Path, images, fps=10) -> Path:
    """Motion JPEG in AVI, which every OpenCV writes and reads. images: RGB."""
    cv2 = pytest.importorskip("cv2")
    height, width = images[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (width, height))
    assert writer.isOpened()
    for image in images:
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()
    return path


def coloured(count):
    return [np.full((48, 64, 3), COLOURS[i % 3], np.uint8) for i in range(count)]


class Camera:
    """Gives the frame with the next number when the test says so, and then waits to be asked again."""

    def __init__(self, last=None, error=None):
        self.meeting = threading.Barrier(2, timeout=60)
        self.number, self.last, self.error, self.closed = 0, last, error, 0
        self.source = Source("camera", self.read, True, close=self.close)

    def read(self):
        self.meeting.wait()  # asked: the frame before is in its place
        self.meeting.wait()  # the test wants one
        self.number += 1
        if self.last is not None and self.number > self.last:
            if self.error is not None:
                raise self.error
            return None
        return np.full((2, 2, 3), self.number, np.uint8)

    def close(self):
        self.closed += 1

    def until_asked(self):
        self.meeting.wait()

    def give(self):
        self.meeting.wait()


def number_of(frame):
    return int(frame[0, 0, 0])


def test_a_slow_reader_gets_the_newest_frame_and_the_others_are_counted():
    camera = Camera(last=4)
    latest = Latest(camera.source)
    for _ in range(3):
        camera.until_asked()
        camera.give()
    camera.until_asked()
    assert number_of(latest.read()) == 3
    assert (latest.received, latest.dropped) == (3, 2)
    camera.give()
    assert number_of(latest.read()) == 4, "it waits for one that is new"
    camera.until_asked()
    camera.give()
    assert latest.read() is None and latest.read() is None
    assert (latest.received, latest.dropped) == (4, 2)
    latest.close()
    assert camera.closed == 1


def test_the_last_frame_comes_before_what_ended_the_camera():
    camera = Camera(last=1, error=InputError("camera: gone"))
    latest = Latest(camera.source)
    for _ in range(2):
        camera.until_asked()
        camera.give()
    latest._thread.join()
    assert number_of(latest.read()) == 1
    with pytest.raises(InputError, match="camera: gone"):
        latest.read()
    latest.close()
    assert camera.closed == 1


def test_a_camera_that_is_closed_is_given_back_by_its_own_thread():
    camera = Camera()
    latest = Latest(camera.source)
    camera.until_asked()
    with latest._changed:
        latest._is_over = True
    camera.give()
    latest.close()
    assert not latest._thread.is_alive() and camera.closed == 1


def test_a_video_gives_every_frame_as_rgb_and_ends(tmp_path):
    video = sources.open_video(write_video(tmp_path / "v.avi", coloured(7)))
    assert (video.frame_count, video.is_live, video.name) == (7, False, str(tmp_path / "v.avi"))
    for i in range(7):
        frame = video.read()
        assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8
        np.testing.assert_allclose(frame.mean((0, 1)), COLOURS[i % 3], atol=6)
    assert video.read() is None
    video.close()


def test_a_video_that_is_cut_off_ends_before_the_count_in_its_header(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(20)]
    path = write_video(tmp_path / "v.avi", noise)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    video = sources.open_video(path)
    frames = 0
    while video.read() is not None:
        frames += 1
    assert 0 < frames < 20 == video.frame_count


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "not found; expected a video file"),
        (lambda path: path.mkdir(), "a folder; expected a video file"),
        (lambda path: path.write_text("no video"), "OpenCV cannot read it"),
    ],
    ids=["absent", "folder", "text"],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, make, said):
    pytest.importorskip("cv2")
    path = tmp_path / "v.mp4"
    make(path)
    with pytest.raises(InputError, match=said) as error:
        sources.open_video(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


# --- cameras and streams, by an OpenCV that is ours


class FakeOpenCV(SimpleNamespace):
    """opened: the arguments of every VideoCapture. frames: what it gives, BGR; with none it does not open."""

    def __init__(self, frames=(), gstreamer="YES (1.20.3)", **names):
        self.opened, frames = [], list(frames)

        class VideoCapture:
            def __init__(capture, *arguments):
                self.opened.append(arguments)
                capture.left = list(frames)

            def isOpened(capture):
                return bool(frames)

            def grab(capture):
                return bool(capture.left)

            def retrieve(capture):
                return True, capture.left.pop(0)

            def get(capture, what):
                return 0.0

            def release(capture):
                capture.left = []

        super().__init__(
            VideoCapture=VideoCapture,
            CAP_ANY=0,
            CAP_V4L2=200,
            CAP_GSTREAMER=1800,
            CAP_FFMPEG=1900,
            CAP_PROP_FRAME_COUNT=7,
            __file__="/usr/lib/cv2.so",
            getBuildInformation=lambda: f"  Video I/O:\n    GStreamer:                   {gstreamer}\n",
            videoio_registry=SimpleNamespace(getStreamBackends=lambda: [1900, 1800]),
            **names,
        )


BLUE = np.full((4, 6, 3), (255, 0, 0), np.uint8)  # BGR


@pytest.fixture
def opencv(monkeypatch):
    def install(**how):
        fake = FakeOpenCV(**how)
        monkeypatch.setitem(sys.modules, "cv2", fake)
        return fake

    return install


def test_a_camera_gives_frames_until_it_is_lost_and_says_so(opencv, tmp_path):
    device = tmp_path / "video7"
    device.touch()
    fake = opencv(frames=[BLUE, BLUE])
    camera = sources.open_camera(str(device))
    assert camera.is_live and fake.opened == [(str(device), fake.CAP_V4L2)]
    for _ in range(2):
        assert camera.read()[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(InputError, match=rf"camera {device}: gives no more pictures; is it unplugged"):
        camera.read()


def test_a_camera_that_is_not_there_or_in_use_is_refused(opencv, tmp_path):
    opencv()
    with pytest.raises(InputError, match=r"camera 987: no /dev/video987 here; cameras here: "):
        sources.open_camera("987")
    (tmp_path / "video7").touch()
    with pytest.raises(InputError, match="gives no pictures; does another program use it"):
        sources.open_camera(str(tmp_path / "video7"))
    for name in ("", "video0", "csi", "csi:x", "-1", "0 ! fakesink"):
        with pytest.raises(InputError, match="expected a number such as 0"):
            sources.open_camera(name)


def test_a_csi_camera_is_opened_by_this_pipeline(opencv):
    assert sources.csi_pipeline(1) == (
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM), width=1280, height=720, framerate=30/1, "
        "format=NV12 ! nvvidconv ! video/x-raw, format=BGRx ! videoconvert ! video/x-raw, format=BGR ! "
        "appsink drop=true max-buffers=1 sync=false"
    )
    fake = opencv(frames=[BLUE])
    assert sources.open_camera("csi:1").is_live
    assert fake.opened == [(sources.csi_pipeline(1), fake.CAP_GSTREAMER)]
    opencv()
    with pytest.raises(InputError, match="csi:0: cannot be opened with the pipeline"):
        sources.open_camera("csi:0")
    opencv(frames=[BLUE], gstreamer="NO")
    with pytest.raises(MissingDependencyError, match=r"\(/usr/lib/cv2.so\) has no GStreamer"):
        sources.open_camera("csi:0")


def test_a_stream_has_time_limits_and_its_password_stays_private(opencv):
    address = "rtsp://guard:secret@192.0.2.7:554/door"
    fake = opencv(frames=[BLUE], CAP_PROP_OPEN_TIMEOUT_MSEC=53, CAP_PROP_READ_TIMEOUT_MSEC=54)
    stream = sources.open_stream(address)
    assert fake.opened == [(address, fake.CAP_FFMPEG, [53, 10_000, 54, 10_000])]
    assert stream.is_live and stream.name == "rtsp://guard:...@192.0.2.7:554/door"
    fake = opencv(frames=[BLUE])
    sources.open_stream(address)
    assert fake.opened == [(address, fake.CAP_ANY)], "OpenCV 4.5.1 and older"
    opencv()
    with pytest.raises(InputError, match="cannot be opened") as error:
        sources.open_stream(address)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("place", ["camera 0", "camera csi:0", "rtsp://host/x", "v.mp4"])
def test_without_opencv_it_is_said_what_to_install(monkeypatch, tmp_path, place):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.chdir(tmp_path)
    Path("v.mp4").write_bytes(b"")
    if place.startswith("camera "):
        work = lambda: sources.open_camera(place[len("camera ") :])  # noqa: E731
    else:
        work = lambda: (sources.open_stream if "://" in place else sources.open_video)(  # noqa: E731
            place if "://" in place else Path(place)
        )
    with pytest.raises(MissingDependencyError, match="needs OpenCV") as error:
        work()
    message = str(error.value)
    assert message.startswith(place) and "`sudo apt install nvidia-jetpack`" in message
    assert "`python3 -m pip install opencv-python`" in message and "\n" not in message


# --- pictures


def test_pictures_of_folders_come_by_name_and_others_are_left_out(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    other = tmp_path / "scan"
    other.touch()
    found = sources.pictures([other, tmp_path])
    assert [path.name for path in found] == ["scan", "a.jpg", "b.PNG", "c.webp"]
    with pytest.raises(InputError, match=r"folder.jpg: no picture in this folder; expected .jpg, .jpeg"):
        sources.pictures([tmp_path / "folder.jpg"])
    with pytest.raises(InputError, match="nowhere: not found"):
        sources.pictures([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("place", "is_stream"),
    [("rtsp://h/x", True), ("http://h/x", True), ("a.mp4", False), ("C:/a.mp4", False), ("a/b://c", False)],
)
def test_addresses_are_told_from_files(place, is_stream):
    assert sources.is_stream(place) == is_stream
