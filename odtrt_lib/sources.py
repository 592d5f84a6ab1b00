"""Sources of frames: pictures, video files, cameras and network streams, all as RGB arrays.

The reader of a file gets every frame. A camera does not wait for its reader: :class:`Latest` keeps the newest
frame and drops the others. Pictures need Pillow. All other sources need OpenCV, which is imported when one is
opened.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence
from urllib.parse import urlsplit

import numpy as np

from odtrt_lib.errors import InputError, MissingDependencyError, one_line
from odtrt_lib.preprocess import load_image
from odtrt_lib.spans import span

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

_CSI_WIDTH, _CSI_HEIGHT, _CSI_FPS = 1280, 720, 30
_STREAM_TIMEOUT_MS = 10_000
_JOIN_SECONDS = 2.0
_EXPECTED_CAMERA = "expected a number such as 0, a device such as /dev/video0, or csi:0"


def _nothing_to_close() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of frames.

    name: for people; without a password. read: returns the next frame, uint8 ``[height, width, 3]``, RGB, or
    None at the end; raises InputError, with the reason, if it fails. is_live: whether frames come even if
    nobody reads them. frame_count: the number in its header, which in some formats is an estimate; 0 if it is
    not known. close: closes the file or the camera.
    """

    name: str
    read: Callable[[], Optional[np.ndarray]]
    is_live: bool = False
    frame_count: int = 0
    close: Callable[[], None] = _nothing_to_close


class Latest:
    """The newest frame of a live source, for a reader that may be slower than the source.

    A thread reads the source and keeps only the newest frame. ``dropped`` counts the frames that a newer one
    replaced before they were read; ``received`` counts all frames.
    """

    def __init__(self, source: Source) -> None:
        self.received = 0
        self.dropped = 0
        self._source = source
        self._changed = threading.Condition()
        self._frame: Optional[np.ndarray] = None
        self._is_over = False
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._receive, name="odtrt-source", daemon=True)
        self._thread.start()

    def read(self) -> Optional[np.ndarray]:
        """Waits for a new frame and returns the newest. At the end, returns None or raises the source's
        error."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._is_over)
            frame, self._frame = self._frame, None
        if frame is None and self._error is not None:
            raise self._error
        return frame

    def close(self) -> None:
        """Ends the thread, which closes the source. Does not wait for a thread that waits for a dead
        camera."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join(_JOIN_SECONDS)

    def _receive(self) -> None:
        try:
            while not self._is_over:
                frame = self._source.read()
                if frame is None:
                    break
                with self._changed:
                    self.received += 1
                    self.dropped += self._frame is not None
                    self._frame = frame
                    self._changed.notify()
        except BaseException as error:  # `read` raises it
            self._error = error
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify()
            self._source.close()


def is_stream(place: str) -> bool:
    """Whether ``place`` is an address such as ``rtsp://host/path``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def is_picture(path: Path) -> bool:
    """Whether the file's name has one of :data:`PICTURE_SUFFIXES`."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def pictures(places: Sequence[Path]) -> List[Path]:
    """The files in ``places``, and for each folder its picture files, sorted by name.

    Raises InputError if one is missing, or a folder has none.
    """
    found: List[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(path for path in place.iterdir() if is_picture(path) and path.is_file())
            if not inside:
                raise InputError(f"{place}: no picture in this folder; expected {_suffixes()} files")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise InputError(f"{place}: not found; expected a picture, or a folder of pictures")
    return found


def open_source(place: str) -> Source:
    """Opens what ``place`` names: the address of a stream, a camera, a picture, a folder of pictures, or a
    video file. For errors see the other functions."""
    if is_stream(place):
        return open_stream(place)
    if re.fullmatch("[0-9]{1,3}|csi:.*|/dev/.+", place):
        return open_camera(place)
    path = Path(place)
    return open_pictures([path]) if path.is_dir() or is_picture(path) else open_video(path)


def open_pictures(places: Sequence[Path]) -> Source:
    """The pictures of :func:`pictures`, one after the other."""
    found = pictures(places)
    remaining = iter(found)

    def read() -> Optional[np.ndarray]:
        path = next(remaining, None)
        if path is None:
            return None
        with span("decode"):
            return load_image(path)

    return Source(", ".join(map(str, places)), read, False, len(found))


def open_video(path: Path) -> Source:
    """Opens a video file.

    Raises InputError if it is missing or cannot be read, MissingDependencyError without OpenCV.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'not found'}; expected a video file")
    cv2 = _opencv(str(path))
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise InputError(
            f"{path}: OpenCV cannot read it; expected a video file, or a picture with a name in {_suffixes()}"
        )
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return Source(str(path), lambda: _next_frame(capture), False, max(count, 0), capture.release)


def open_stream(address: str) -> Source:
    """Opens a network stream, e.g. ``rtsp://user:password@camera/stream``.

    Raises InputError if it cannot be opened, MissingDependencyError without OpenCV.
    """
    name = _without_password(address)
    cv2 = _opencv(name)
    backend, options = cv2.CAP_ANY, []
    timeouts = [getattr(cv2, f"CAP_PROP_{what}_TIMEOUT_MSEC", None) for what in ("OPEN", "READ")]
    if None not in timeouts and cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends():
        backend = cv2.CAP_FFMPEG
        options = [timeouts[0], _STREAM_TIMEOUT_MS, timeouts[1], _STREAM_TIMEOUT_MS]
    capture = cv2.VideoCapture(address, backend, options) if options else cv2.VideoCapture(address, backend)
    if not capture.isOpened():
        raise InputError(f"{name}: cannot be opened; is it on, reachable, and are name and password right?")
    return _live(name, capture)


def open_camera(camera: str) -> Source:
    """Opens a camera: ``0`` or ``/dev/video0`` by V4L2, ``csi:0`` by :func:`csi_pipeline`.

    Raises InputError if there is none or it cannot be opened, MissingDependencyError without OpenCV.
    """
    csi = re.fullmatch("csi:([0-9]{1,2})", camera)
    if csi:
        return _open_csi(camera, int(csi.group(1)))
    if not re.fullmatch("[0-9]{1,3}|/.+", camera):
        raise InputError(f"camera {camera!r}: {_EXPECTED_CAMERA}")
    device = Path(camera if camera.startswith("/") else f"/dev/video{int(camera)}")
    cv2 = _opencv(f"camera {camera}")
    if not device.exists():
        others = ", ".join(sorted(str(path) for path in Path("/dev").glob("video*"))) or "none"
        raise InputError(f"camera {camera}: no {device} here; cameras here: {others}")
    if not os.access(device, os.R_OK | os.W_OK):
        raise InputError(
            f"camera {camera}: {device} may not be used by this account; `sudo usermod -aG video $USER`, and "
            "log in again"
        )
    capture = cv2.VideoCapture(int(camera) if camera.isdigit() else camera, cv2.CAP_V4L2)
    if not capture.isOpened():
        raise InputError(f"camera {camera}: {device} gives no pictures; does another program use it?")
    return _live(f"camera {camera}", capture)


def csi_pipeline(sensor: int) -> str:
    """The GStreamer pipeline for a camera on a Jetson's CSI connector.

    The sensor must have a mode with at least 1280 x 720 pixels and 30 frames a second. ``appsink`` keeps one
    frame. ``videoconvert`` works on the CPU, because the Jetson's own converter cannot write BGR.
    """
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! video/x-raw(memory:NVMM), width={_CSI_WIDTH}, "
        f"height={_CSI_HEIGHT}, framerate={_CSI_FPS}/1, format=NV12 ! nvvidconv ! video/x-raw, format=BGRx ! "
        "videoconvert ! video/x-raw, format=BGR ! appsink drop=true max-buffers=1 sync=false"
    )


def _open_csi(camera: str, sensor: int) -> Source:
    cv2 = _opencv(f"camera {camera}")
    if not re.search("GStreamer: *YES", cv2.getBuildInformation()):
        raise MissingDependencyError(
            f"camera {camera}: this OpenCV ({cv2.__file__}) has no GStreamer, JetPack's own has; "
            "`python3 -m pip uninstall opencv-python` if pip's hides it"
        )
    capture = cv2.VideoCapture(csi_pipeline(sensor), cv2.CAP_GSTREAMER)
    if not capture.isOpened():
        raise InputError(
            f"camera {camera}: cannot be opened with the pipeline `{csi_pipeline(sensor)}`; try it with "
            "gst-launch-1.0, and `sudo systemctl restart nvargus-daemon`"
        )
    return _live(f"camera {camera}", capture)


def _live(name: str, capture: Any) -> Source:
    def read() -> np.ndarray:
        frame = _next_frame(capture)
        if frame is None:
            raise InputError(
                f"{name}: gives no more pictures; is it unplugged, off, or used by another program?"
            )
        return frame

    return Source(name, read, True, close=capture.release)


def _next_frame(capture: Any) -> Optional[np.ndarray]:
    with span("capture"):
        is_there = capture.grab()
    if not is_there:
        return None
    with span("decode"):
        is_there, frame = capture.retrieve()
    return frame[..., ::-1] if is_there else None


def _opencv(name: str) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            f"{name}: needs OpenCV ({one_line(error)}); on a Jetson `sudo apt install nvidia-jetpack` brings "
            "it, elsewhere `python3 -m pip install opencv-python`"
        ) from error
    return cv2


def _without_password(address: str) -> str:
    """An address without passwords, for messages. What follows ``?`` may contain one, and is left out."""
    try:
        parts = urlsplit(address)
        user, password = parts.username, parts.password
    except ValueError as error:
        raise InputError("the address of the stream is not one: expected rtsp://HOST/PATH") from error
    netloc = parts.netloc if password is None else f"{user}:...@{parts.netloc.rpartition('@')[2]}"
    return parts._replace(netloc=netloc, query="..." if "?" in address else "").geturl()


def _suffixes() -> str:
    return ", ".join(PICTURE_SUFFIXES)
