"""Downloads SSD and EfficientDet models of the TensorFlow 2 detection zoo.

The list is that of tensorflow/models, research/object_detection/g3doc/tf2_detection_zoo.md; ``coco_map`` is
the figure published there. Nobody publishes checksums of the archives. So the first download of an archive is
trusted, and its SHA-256 is written to ``zoo.json`` beside the models. Every later download must have the same
SHA-256. If it is known beforehand (``ZooModel.sha256``), the first download is checked, too.

This is the only module of odtrt that uses the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Dict, Iterator, List, Optional, Union
from urllib.parse import urlsplit

from odtrt_lib.errors import CheckError, InputError, one_line
from odtrt_lib.folder import atomic_write, exclusive, staging

BASE_URL = "https://download.tensorflow.org/models/object_detection/tf2"
CHECKSUMS = "zoo.json"

# The largest archive in the zoo has about half a GiB.
_MAX_ARCHIVE_BYTES = 1 << 30
_MAX_UNPACKED_BYTES = 2 << 30
_MAX_MEMBERS = 10_000
_MAX_CHECKSUMS_BYTES = 1 << 20
_SECONDS_TO_ANSWER = 60
_SECONDS_BETWEEN_BYTES = 30
_MAX_SECONDS = 4 * 3600
# The least number of bytes a minute. A server that sends single bytes would keep odtrt waiting for hours.
_MIN_BYTES_A_MINUTE = 1 << 20
_HOSTS = ("download.tensorflow.org", "storage.googleapis.com")


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """One model of the zoo. ``sha256`` is that of its archive, or None if nobody published it."""

    name: str
    coco_map: float
    date: str = "20200711"
    sha256: Optional[str] = None


MODELS = (
    ZooModel("ssd_mobilenet_v2_320x320_coco17_tpu-8", 20.2),
    ZooModel("ssd_mobilenet_v2_fpnlite_320x320_coco17_tpu-8", 22.2),
    ZooModel("ssd_mobilenet_v2_fpnlite_640x640_coco17_tpu-8", 28.2),
    ZooModel("ssd_mobilenet_v1_fpn_640x640_coco17_tpu-8", 29.1),
    ZooModel("ssd_resnet50_v1_fpn_640x640_coco17_tpu-8", 34.3),
    ZooModel("ssd_resnet50_v1_fpn_1024x1024_coco17_tpu-8", 38.3),
    ZooModel("ssd_resnet101_v1_fpn_640x640_coco17_tpu-8", 35.6),
    ZooModel("ssd_resnet101_v1_fpn_1024x1024_coco17_tpu-8", 39.5),
    ZooModel("ssd_resnet152_v1_fpn_640x640_coco17_tpu-8", 35.4),
    ZooModel("ssd_resnet152_v1_fpn_1024x1024_coco17_tpu-8", 39.6),
    ZooModel("efficientdet_d0_coco17_tpu-32", 33.6),
    ZooModel("efficientdet_d1_coco17_tpu-32", 38.4),
    ZooModel("efficientdet_d2_coco17_tpu-32", 41.8),
    ZooModel("efficientdet_d3_coco17_tpu-32", 45.4),
    ZooModel("efficientdet_d4_coco17_tpu-32", 48.5),
    ZooModel("efficientdet_d5_coco17_tpu-32", 49.7),
    ZooModel("efficientdet_d6_coco17_tpu-32", 50.5),
    ZooModel("efficientdet_d7_coco17_tpu-32", 51.2),
)


@dataclasses.dataclass(frozen=True)
class Download:
    """What :func:`get` did.

    path: the model's folder. sha256: that of its archive. is_first: there was no SHA-256 to compare it with.
    is_up_to_date: the folder existed already, and nothing was downloaded.
    """

    path: Path
    sha256: str
    is_first: bool
    is_up_to_date: bool


def find(name: str) -> ZooModel:
    """The model called ``name``. Raises InputError with the closest names if there is none."""
    for model in MODELS:
        if model.name == name:
            return model
    import difflib

    names = [model.name for model in MODELS]
    close = [other for other in names if name and name in other] or difflib.get_close_matches(name, names)
    hint = f"did you mean {', '.join(close[:3])}?" if close else "see `odtrt zoo list`"
    raise InputError(f"{name}: no such model in the zoo; {hint}")


def get(
    model: ZooModel,
    folder: Union[str, Path],
    *,
    base_url: str = BASE_URL,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Download:
    """Downloads and unpacks ``model`` to ``folder / model.name``, whole or not at all.

    progress: called with the bytes received and the bytes expected (0 if the server does not say).

    Raises InputError if the server cannot be reached, breaks off, is too slow, sends too much or redirects to
    another host, and if ``zoo.json`` is damaged; CheckError if the archive's SHA-256 is not the expected one,
    or if the archive contains anything but the files of one model.
    """
    folder = Path(folder)
    target = folder / model.name
    known = _read_checksums(folder)
    if target.is_dir():
        return Download(target, known.get(model.name, {}).get("sha256", ""), False, True)
    url = f"{base_url}/{model.date}/{model.name}.tar.gz"
    with staging(folder) as temporary:
        archive = temporary / "archive"
        digest = _download(url, archive, folder, progress)
        _compare(url, digest, model.sha256 or known.get(model.name, {}).get("sha256"))
        unpacked = temporary / "unpacked"
        unpacked.mkdir()
        _unpack(archive, url, model.name, unpacked)
        archive.unlink()
        with exclusive(folder):  # another process may have downloaded it in the meantime
            known = _read_checksums(folder)
            expected = model.sha256 or known.get(model.name, {}).get("sha256")
            _compare(url, digest, expected)
            known[model.name] = {"url": url, "sha256": digest}
            with atomic_write(folder / CHECKSUMS) as checksums:
                checksums.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
            if target.is_dir():
                shutil.rmtree(unpacked)
                return Download(target, digest, False, True)
            os.replace(unpacked / model.name, target)
    return Download(target, digest, expected is None, False)


def _compare(url: str, digest: str, expected: Optional[str]) -> None:
    if expected and digest != expected:
        raise CheckError(
            f"{url}: SHA-256 {digest}, expected {expected}; the file changed on its way or on the server: "
            "nothing was unpacked"
        )


def _read_checksums(folder: Path) -> Dict[str, Dict[str, str]]:
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CHECKSUMS_BYTES:
            raise ValueError("not a file of its size")
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or not all(map(_is_checksum, known.values())):
            raise ValueError('expected {name: {"url": text, "sha256": 64 digits}}')
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}); expected the checksums of earlier downloads: "
            "delete it to trust the next ones anew"
        ) from error
    return known


def _is_checksum(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("url"), str)
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
    )


def _download(url: str, path: Path, folder: Path, progress: Callable[[int, int], None]) -> str:
    """Downloads ``url`` to ``path`` and returns its SHA-256."""
    digest = hashlib.sha256()
    received = 0
    advice = f"check the connection, or download it elsewhere and unpack it in {folder}"
    started = time.monotonic()
    with _answer(url, advice) as response, path.open("wb") as file:
        total = _content_length(url, response)
        while True:
            try:
                block = response.read1(1 << 18)
            except (http.client.HTTPException, OSError, ValueError) as error:
                raise InputError(f"{url}: the download broke off ({one_line(error)}); {advice}") from error
            if not block:
                break
            received += len(block)
            if received > _MAX_ARCHIVE_BYTES:
                raise InputError(
                    f"{url}: sends more than {_MAX_ARCHIVE_BYTES >> 20} MiB; no model has so many"
                )
            _refuse_when_slow(url, received, time.monotonic() - started, advice)
            file.write(block)
            digest.update(block)
            progress(received, total)
    if total and received != total:
        raise InputError(f"{url}: the download broke off after {received} of {total} bytes; {advice}")
    return digest.hexdigest()


def _content_length(url: str, response: http.client.HTTPResponse) -> int:
    """The number of bytes that the server announces; 0 if it announces none."""
    text = response.headers.get("Content-Length")
    if text is None:
        return 0
    if not re.fullmatch("[0-9]{1,18}", text.strip()):
        raise InputError(f"{url}: the server's Content-Length is {one_line(text)[:40]!r}, expected a number")
    if int(text) > _MAX_ARCHIVE_BYTES:
        raise InputError(
            f"{url}: has {int(text)} bytes, more than {_MAX_ARCHIVE_BYTES >> 20} MiB; no model has"
        )
    return int(text)


def _refuse_when_slow(url: str, received: int, seconds: float, advice: str) -> None:
    if seconds > _MAX_SECONDS or received < (seconds // 60) * _MIN_BYTES_A_MINUTE:
        raise InputError(f"{url}: too slow, {received} bytes in {seconds:.0f} seconds; {advice}")


class _SameHosts(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to the zoo's hosts or within a host, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        is_known = new.hostname is not None and new.hostname in (*_HOSTS, old.hostname)
        if not is_known or new.scheme not in ("https", old.scheme):
            raise InputError(
                f"{req.full_url}: the server leads to {newurl[:200]!r}; expected https on "
                f"{' or '.join(_HOSTS)}"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _connection(kind: Any, sockets: List[socket.socket], *arguments: Any, **options: Any) -> Any:
    """A connection of http.client that adds its socket to ``sockets``, so that another thread can close
    it."""
    made = kind(*arguments, **options)
    connect = made.connect

    def connect_and_tell() -> None:
        connect()
        sockets.append(made.sock)

    made.connect = connect_and_tell
    return made


class _Http(urllib.request.HTTPHandler):
    def __init__(self, sockets: List[socket.socket]) -> None:
        super().__init__()
        self._kind = functools.partial(_connection, http.client.HTTPConnection, sockets)

    def http_open(self, req: Any) -> Any:
        return self.do_open(self._kind, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, sockets: List[socket.socket]) -> None:
        super().__init__()
        self._kind = functools.partial(_connection, http.client.HTTPSConnection, sockets)

    def https_open(self, req: Any) -> Any:
        return self.do_open(self._kind, req)


@contextlib.contextmanager
def _answer(url: str, advice: str) -> Iterator[http.client.HTTPResponse]:
    """The server's answer, with the body still to be read. Raises InputError if none begins within a
    minute."""
    sockets: List[socket.socket] = []

    def give_up() -> None:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    opener = urllib.request.build_opener(_SameHosts, _Http(sockets), _Https(sockets))
    timer = threading.Timer(_SECONDS_TO_ANSWER, give_up)
    timer.daemon = True
    timer.start()
    try:
        response = opener.open(url, timeout=_SECONDS_BETWEEN_BYTES)
    except urllib.error.HTTPError as error:
        raise InputError(
            f"{url}: the server answers {error.code} {one_line(error.reason)}; {advice}"
        ) from error
    except urllib.error.URLError as error:
        raise InputError(f"{url}: cannot be downloaded ({one_line(error.reason)}); {advice}") from error
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise InputError(f"{url}: the download broke off ({one_line(error)}); {advice}") from error
    finally:
        timer.cancel()
    with response:
        if response.status != 200:
            raise InputError(f"{url}: the server answers {response.status}, expected 200; {advice}")
        yield response


def _unpack(archive: Path, url: str, name: str, target: Path) -> None:
    try:
        _refuse_bomb(archive, url)
        with tarfile.open(archive, "r:gz") as tar:
            members = _checked_members(tar, url, name)
            if hasattr(tarfile, "data_filter"):
                tar.extractall(target, members, filter="data")
            else:
                tar.extractall(target, members)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise CheckError(
            f"{url}: not a whole .tar.gz archive ({one_line(error)}); nothing was unpacked"
        ) from error
    if not (target / name / "pipeline.config").is_file():
        raise CheckError(f"{url}: holds no {name}/pipeline.config; expected a model of the zoo")


def _refuse_bomb(archive: Path, url: str) -> None:
    """Raises CheckError if the archive unpacks to too many bytes. Reads it to gzip's checksum at its end,
    before which tarfile stops."""
    unpacked = 0
    with gzip.open(archive) as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            unpacked += len(block)
            if unpacked > _MAX_UNPACKED_BYTES:
                raise CheckError(
                    f"{url}: holds more than {_MAX_UNPACKED_BYTES >> 20} MiB; no model has so many: nothing "
                    "was unpacked"
                )


def _checked_members(tar: tarfile.TarFile, url: str, name: str) -> List[tarfile.TarInfo]:
    """The archive's members, with ordinary permissions. Raises CheckError unless all are plain files and
    folders inside ``name/``."""
    members = []
    for member in tar:
        parts = PurePosixPath(member.name).parts
        is_inside = parts[:1] == (name,) and ".." not in parts
        if not is_inside or not (member.isfile() or member.isdir()) or member.issparse():
            raise CheckError(
                f"{url}: holds {member.name[:200]!r}, expected only files inside {name}/; "
                "nothing was unpacked"
            )
        member.mode = 0o755 if member.isdir() else 0o644
        members.append(member)
        if len(members) > _MAX_MEMBERS:
            raise CheckError(f"{url}: holds more than {_MAX_MEMBERS} files; nothing was unpacked")
    return members
