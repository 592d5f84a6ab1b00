"""The TensorFlow 2 detection zoo: its SSD and EfficientDet models, for machines with internet.

The list is the one in tensorflow/models, research/object_detection/g3doc/tf2_detection_zoo.md; ``coco_map``
is the figure published there. The zoo is served over plain HTTP and publishes no checksums. So the first
download of an archive is taken on trust and its SHA-256 written to ``zoo.json`` beside the models; every
later download of it must have the same one. Where a checksum is known beforehand (``ZooModel.sha256``),
the first download is checked as well.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Dict, List, Optional, Union

from odtrt_lib.errors import CheckError, InputError
from odtrt_lib.folder import atomic_write, staging

BASE_URL = "https://download.tensorflow.org/models/object_detection/tf2"
CHECKSUMS = "zoo.json"

_TIMEOUT_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """One model of the zoo. ``sha256`` is that of its archive, or None where nobody published it."""

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

    path: the model's folder. sha256: that of its archive. is_first: nothing was known to compare it with.
    is_up_to_date: the folder was there already and nothing was downloaded.
    """

    path: Path
    sha256: str
    is_first: bool
    is_up_to_date: bool


def find(name: str) -> ZooModel:
    """The model called ``name``; InputError with the closest names if there is none."""
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

    Raises InputError where the server cannot be reached or breaks off, CheckError where the archive's
    SHA-256 is not the expected one, or where it holds something else than the files of one model.
    """
    folder = Path(folder)
    target = folder / model.name
    known = _read_checksums(folder)
    if target.is_dir():
        return Download(target, known.get(model.name, {}).get("sha256", ""), False, True)
    url = f"{base_url}/{model.date}/{model.name}.tar.gz"
    expected = model.sha256 or known.get(model.name, {}).get("sha256")
    with staging(folder) as temporary:
        archive = temporary / "archive"
        digest = _download(url, archive, folder, progress)
        if expected and digest != expected:
            raise CheckError(
                f"{url}: SHA-256 {digest}, expected {expected}; the file changed on its way or on the "
                "server: nothing was unpacked"
            )
        unpacked = temporary / "unpacked"
        unpacked.mkdir()
        _unpack(archive, url, model.name, unpacked)
        archive.unlink()
        known[model.name] = {"url": url, "sha256": digest}
        with atomic_write(folder / CHECKSUMS) as checksums:
            checksums.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        os.replace(unpacked / model.name, target)
    return Download(target, digest, expected is None, False)


def _read_checksums(folder: Path) -> Dict[str, Any]:
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); expected the checksums of earlier downloads: delete it to "
            "trust the next ones anew"
        ) from error


def _download(url: str, path: Path, folder: Path, progress: Callable[[int, int], None]) -> str:
    """Writes ``url`` to ``path`` and returns its SHA-256."""
    digest = hashlib.sha256()
    received = 0
    advice = f"check the connection, or download it elsewhere and unpack it in {folder}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            total = int(response.headers.get("Content-Length") or 0)
            with path.open("wb") as file:
                while True:
                    block = response.read(1 << 18)
                    if not block:
                        break
                    file.write(block)
                    digest.update(block)
                    received += len(block)
                    progress(received, total)
    except urllib.error.HTTPError as error:
        raise InputError(f"{url}: the server answers {error.code} {error.reason}; {advice}") from error
    except urllib.error.URLError as error:
        raise InputError(f"{url}: cannot be downloaded ({error.reason}); {advice}") from error
    except (HTTPException, ConnectionError, TimeoutError) as error:
        raise InputError(f"{url}: the download broke off ({error}); {advice}") from error
    if total and received != total:
        raise InputError(f"{url}: the download broke off after {received} of {total} bytes; {advice}")
    return digest.hexdigest()


def _unpack(archive: Path, url: str, name: str, target: Path) -> None:
    try:
        with gzip.open(
            archive
        ) as stream:  # to its end, where gzip's own checksum is; tarfile stops before it
            while stream.read(1 << 20):
                pass
        with tarfile.open(archive, "r:gz") as tar:
            members = _checked_members(tar, url, name)
            if hasattr(tarfile, "data_filter"):
                tar.extractall(target, members, filter="data")
            else:
                tar.extractall(target, members)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CheckError(f"{url}: not a whole .tar.gz archive ({error}); nothing was unpacked") from error
    if not (target / name / "pipeline.config").is_file():
        raise CheckError(f"{url}: holds no {name}/pipeline.config; expected a model of the zoo")


def _checked_members(tar: tarfile.TarFile, url: str, name: str) -> List[tarfile.TarInfo]:
    """The archive's members, all of them plain files and folders inside ``name/``."""
    members = tar.getmembers()
    for member in members:
        parts = PurePosixPath(member.name).parts
        is_inside = parts[:1] == (name,) and ".." not in parts
        if not is_inside or not (member.isfile() or member.isdir()):
            raise CheckError(
                f"{url}: holds {member.name!r}, expected only files inside {name}/; nothing was unpacked"
            )
    return members
