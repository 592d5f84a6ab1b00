"""Writes files to places that the user chooses, but never over an input, and never two to one file."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, List, Sequence, Set, Tuple, Union

from odtrt_lib.errors import InputError
from odtrt_lib.folder import LOG, atomic_write, read_log

if TYPE_CHECKING:
    import numpy as np

_JPEG_QUALITY = 92
# Every JPEG file that this module writes has this in a comment. Only such a file may be replaced.
_MARK = b"drawn by odtrt detect"
_END_OF_FIRST_SEGMENT = 20  # the two bytes that start a JPEG file, and JFIF's segment


def drawing_targets(images: Sequence[Path], folder: Path) -> List[Path]:
    """A file in ``folder`` for each image: ``<its name>.jpg``, or ``<its name>-2.jpg`` and so on.

    A name is not used if it is that of another image's file, of one of the images, or of a file that
    :func:`write_drawing` did not write. So the same call returns the same names again.
    """
    inputs = {identity for path in images for identity in _identity(path)}
    taken: Set[str] = set()
    targets = []
    for path in images:
        names = (f"{path.stem}{'' if i == 1 else f'-{i}'}.jpg" for i in itertools.count(1))
        name = next(one for one in names if _key(one) not in taken and _may_replace(folder / one, inputs))
        taken.add(_key(name))
        targets.append(folder / name)
    return targets


def write_drawing(path: Path, image: np.ndarray) -> None:
    """Writes uint8 ``[height, width, 3]``, RGB, as a JPEG file, whole or not at all."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=_JPEG_QUALITY)
    content = encoded.getvalue()
    comment = b"\xff\xfe" + (len(_MARK) + 2).to_bytes(2, "big") + _MARK
    with atomic_write(path) as temporary:
        temporary.write_bytes(content[:_END_OF_FIRST_SEGMENT] + comment + content[_END_OF_FIRST_SEGMENT:])


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as a JSON file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def model_files(folder: Path) -> List[Path]:
    """The files of a model folder that its stages wrote, according to its log."""
    names = {LOG, "spec.json", "anchors.npy", "heads.onnx", "detector.onnx"}
    with contextlib.suppress(InputError):
        for record in read_log(folder):
            names.update(record.get("outputs", ()))
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def require_no_input(path: Path, inputs: Iterable[Path]) -> None:
    """Raises InputError if writing ``path`` would replace one of the files that the command reads."""
    own = set(_identity(path))
    if any(not own.isdisjoint(_identity(one)) for one in inputs):
        raise InputError(f"{path}: is read by this command and cannot be written by it; name another file")


def _may_replace(path: Path, inputs: Set[Tuple[int, int]]) -> bool:
    if not os.path.lexists(path):
        return True
    return inputs.isdisjoint(_identity(path)) and _is_drawing(path)


def _is_drawing(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _MARK in file.read(_END_OF_FIRST_SEGMENT + len(_MARK) + 4)
    except OSError:
        return False


def _identity(path: Union[str, Path]) -> List[Tuple[int, int]]:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return []
    return [(status.st_dev, status.st_ino)]


def _key(name: str) -> str:
    """A key that is equal for names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", name).casefold()
