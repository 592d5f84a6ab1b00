"""The errors for users. Each message says what was found, where, what was expected, and what to do."""

import shlex
import unicodedata

# Many scripts need these two, which join letters or keep them apart.
_JOINERS = "\u200c\u200d"


class OdtrtError(Exception):
    """Base of every error that odtrt raises on purpose; the CLI prints it on one line."""


class InputError(OdtrtError):
    """A file or an array from the caller is missing, damaged or not of the expected form."""


class UnsupportedError(OdtrtError):
    """The input is valid, but asks for something that odtrt does not do. The message names the setting."""


class MissingDependencyError(OdtrtError):
    """An optional package is not installed. The message says which command installs it."""


class CheckError(OdtrtError):
    """A check failed: two things that must agree do not."""


class CudaError(OdtrtError):
    """A CUDA call failed. number: its ``cudaError_t``."""

    def __init__(self, call: str, number: int, text: str) -> None:
        super().__init__(f"{call}: CUDA error {number}: {text}")
        self.number = number


class ClusterError(OdtrtError):
    """A Ray cluster cannot be reached, or lost a task more often than it is started again."""


class BuildError(OdtrtError):
    """TensorRT refused or failed to build an engine."""


def one_line(message: object) -> str:
    """Another library's message or exception without line breaks, for a quotation in one of odtrt's."""
    return " ".join(str(message).split()) or type(message).__name__


def printable(text: object, keep: str = "") -> str:
    """Makes text from outside safe to show in a terminal, a page or a picture.

    Escapes replace control characters (a terminal obeys ESC and U+009B), marks that change the direction of
    writing, line separators, and bytes of a file name that are no text. keep: characters that are not
    replaced.
    """
    return "".join(one if one in keep or _shows(one) else _escape(one) for one in str(text))


def is_utf8(path: object) -> bool:
    """Whether a path's bytes are UTF-8. TensorFlow and ONNX Runtime cannot open other paths."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shell_word(text: object) -> str:
    """A file name as one word of a shell command: quoted if a shell needs it, with escapes for control
    characters."""
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
