"""The errors a user can meet. Each message says what was found, where, what was expected, what to do."""

import shlex
import unicodedata

# Letters of many scripts are joined or kept apart by these two.
_JOINERS = "\u200c\u200d"


class OdtrtError(Exception):
    """Base of every error that odtrt raises on purpose; the CLI prints it on one line."""


class InputError(OdtrtError):
    """A file or an array handed in is missing, damaged or not of the expected form."""


class UnsupportedError(OdtrtError):
    """The input is valid, but asks for something that odtrt does not do. Names the setting."""


class MissingDependencyError(OdtrtError):
    """An optional package is not installed. Says which command installs it."""


class CheckError(OdtrtError):
    """A gate failed: two things that must agree do not."""


class BuildError(OdtrtError):
    """TensorRT refused or failed to build an engine."""


def one_line(message: object) -> str:
    """Another library's message or exception without line breaks, to quote in one of ours."""
    return " ".join(str(message).split()) or type(message).__name__


def printable(text: object, keep: str = "") -> str:
    """Text from outside for a terminal, a page or a picture: what acts instead of showing becomes an escape.

    Those are control characters (a terminal obeys ESC and U+009B), marks that change the direction of
    writing, line separators, and bytes of a file name that are no text. keep: characters that stay.
    """
    return "".join(one if one in keep or _shows(one) else _escape(one) for one in str(text))


def is_utf8(path: object) -> bool:
    """Whether a path's bytes are UTF-8; TensorFlow and ONNX Runtime open no other."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shell_word(text: object) -> str:
    """A file name as one word of a command to copy: quoted where a shell needs it, escaped where it acts."""
    plain = str(text)
    if printable(plain) == plain:
        return shlex.quote(plain)
    return "$'" + printable(plain.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def _shows(character: str) -> bool:
    if " " <= character <= "~":
        return True
    return character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # one byte that Python could not decode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
