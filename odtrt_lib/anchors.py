"""Reads ``anchors.npy`` of a model folder, strictly."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Optional

import numpy as np

from odtrt_lib.errors import InputError
from odtrt_lib.spec import DetectorSpec

_MAGIC = b"\x93NUMPY\x01\x00"
_AGAIN = "run `odtrt export` again"
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[A-Za-z]\d{0,3})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)


def load_anchors(path: Path, spec: DetectorSpec, content: Optional[bytes] = None) -> np.ndarray:
    """The anchors of a model folder, float32 [N, 4], ``(ycenter, xcenter, height, width)``.

    content: the bytes of the file, if they have been read already. Accepts only what ``numpy.save`` writes
    for such an array: it compares the header without evaluating it, and reads no more bytes than N anchors
    need.

    Raises InputError if the file is absent, damaged, not what ``spec`` describes, or contains values that are
    no anchors (see :func:`anchor_problem`).
    """
    shape = (spec.heads.num_anchors, 4)
    num_bytes = 4 * shape[0] * shape[1]
    data = b""
    try:
        with Path(path).open("rb") if content is None else io.BytesIO(content) as file:
            start = file.read(len(_MAGIC) + 2)
            header = file.read(int.from_bytes(start[-2:], "little"))
            found, expected = _array_of(start, header), f"float32 {list(shape)}"
            if found != expected:
                raise InputError(f"{path}: {found}, expected {expected} as spec.json says; {_AGAIN}")
            size = file.seek(0, os.SEEK_END) - len(start) - len(header)
            if size == num_bytes:
                file.seek(len(start) + len(header))
                data = file.read(num_bytes)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_AGAIN}") from error
    if len(data) != num_bytes:
        raise InputError(f"{path}: {size} bytes of anchors, expected {num_bytes} for {expected}; {_AGAIN}")
    anchors = np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)
    problem = anchor_problem(anchors)
    if problem:
        raise InputError(f"{path}: {problem}; {_AGAIN}")
    return anchors


def anchor_problem(anchors: np.ndarray) -> str:
    """Why float32 [N, 4] are no anchors: values that are not finite, or no height or width; empty if they
    are."""
    is_good = np.isfinite(anchors).all(axis=1) & (anchors[:, 2:] > 0).all(axis=1)
    if is_good.all():
        return ""
    row = int(np.argmin(is_good))
    return (
        f"anchor {row} is {anchors[row].tolist()}, expected finite ycenter, xcenter, height and width, "
        "the last two positive"
    )


def _array_of(start: bytes, header: bytes) -> str:
    """The type and shape in the header of an .npy file, such as ``float32 [1917, 4]``."""
    match = _HEADER.fullmatch(header) if start[:-2] == _MAGIC else None
    if match is None:
        return "an npz archive" if start.startswith(b"PK") else "not a numpy array"
    descr, is_fortran, sizes = (group.decode() for group in match.groups())
    try:
        dtype = np.dtype(descr).name
    except (TypeError, ValueError):
        dtype = descr
    if dtype == "float32" and descr != "<f4":
        dtype = repr(descr)  # of another byte order, or of the native one (``=f4``)
    order = " in Fortran order" if is_fortran == "True" else ""
    return f"{dtype} [{sizes.rstrip(',')}]{order}"
