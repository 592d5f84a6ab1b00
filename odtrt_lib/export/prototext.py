"""Reads text files that people write for the OD API, and parses them as its protobuf messages."""

from __future__ import annotations

import codecs
import importlib
from pathlib import Path
from typing import Any

from odtrt_lib.errors import InputError, MissingDependencyError, one_line

MAX_BYTES = 1 << 22

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_TEXT_CONTROLS = b"\t\n\v\f\r\x1a"
_SNIFFED = 64


def read_text(path: Path, expected: str) -> str:
    """The text of a UTF-8 file, without its byte order mark. expected: the kind of file, for messages.

    Raises InputError if it cannot be read, is empty, larger than :data:`MAX_BYTES`, a Git LFS pointer,
    binary, or in another encoding. The message then names the encoding and the command that converts the
    file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{path}: cannot be read ({reason}); expected {expected}") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB; expected {expected}")
    if content.startswith(b"version https://git-lfs.github.com/spec/"):
        raise InputError(
            f"{path}: a Git LFS pointer, not the file itself; expected {expected}: run `git lfs pull` "
            "where it was cloned"
        )
    encoding = _foreign_encoding(content)
    if encoding:
        raise InputError(f"{path}: {encoding}; expected {expected}, in UTF-8")
    text = content.decode("utf-8-sig")
    if not text.strip():
        raise InputError(f"{path}: an empty file; expected {expected}")
    return text


def merge(text: str, message: Any) -> str:
    """Parses text format into ``message``; returns the error on one line, or an empty text.

    Uses ``text_format.Merge``, as the OD API does: if a setting is written twice, the last one counts.
    """
    from google.protobuf import text_format

    try:
        text_format.Merge(text, message)
    except (text_format.ParseError, ValueError, RecursionError) as error:
        return one_line(error)[:200]
    return ""


def messages(module: str) -> Any:
    """The OD API's protobuf module of that name. Raises MissingDependencyError without the OD API."""
    try:
        return importlib.import_module(f"object_detection.protos.{module}")
    except (ImportError, TypeError) as error:
        raise MissingDependencyError(
            f"the OD API's protobuf modules cannot be imported ({one_line(error)}): run `make install`"
        ) from error


def _foreign_encoding(content: bytes) -> str:
    """The encoding of a file that is not UTF-8, in words and with the cure; empty if none is recognised."""
    name = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "")
    first, second = content[:_SNIFFED:2], content[1:_SNIFFED:2]
    for order, halves in (("LE", second), ("BE", first)):
        if not name and halves.count(0) > len(halves) // 2:
            name = f"UTF-16{order}"
    if name:
        return f"{name} text ({_conversion_from(name)})"
    if any(control in content for control in range(32) if control not in _TEXT_CONTROLS):
        return "a binary file"
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return (
            f"byte 0x{content[error.start]:02x} in line {line} is not UTF-8, perhaps of a Windows code page "
            f"({_conversion_from('CP1252')})"
        )
    return ""


def _conversion_from(encoding: str) -> str:
    return f"`iconv -f {encoding} -t UTF-8 OLD > NEW` converts it"
