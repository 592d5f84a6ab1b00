"""Letters for pictures: finds a font of this machine that has them, or a spelling for the built-in font."""

from __future__ import annotations

import functools
import importlib.util
import os
import unicodedata
from pathlib import Path
from typing import Any, FrozenSet, Iterable, List, NamedTuple, Optional, Tuple

from odtrt_lib.errors import MissingDependencyError, one_line, printable

_TRIAL_SIZE = 20
# These are no characters, so a font shows its sign for a missing one. A font of last resort shows two signs.
_ABSENT, _ABSENT_TOO = "\U0010ffff", "\u0378"
_UNLIKE_TEXT = ("bold", "italic", "oblique", "mono", "serif", "light", "thin", "condensed", "black", "emoji")


class Spelling(NamedTuple):
    """text: the text to draw, on one line. font: the file of a font that has its letters; None: the built-in
    font."""

    text: str
    font: Optional[Path]


def font(path: Optional[Path], size: int) -> Any:
    """Pillow's font of ``size`` pixels, from the file; None: the built-in font."""
    from PIL import ImageFont

    return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)


def require_letters() -> None:
    """Raises MissingDependencyError if Pillow cannot draw letters: it is older than 10.1, or lacks
    FreeType."""
    import PIL

    try:
        font(None, _TRIAL_SIZE)
    except (TypeError, ImportError, OSError) as error:
        raise MissingDependencyError(
            f"Pillow {PIL.__version__} cannot draw letters ({one_line(error)}); expected 10.1 or newer: "
            "`python3 -m pip install --upgrade pillow`"
        ) from error


@functools.lru_cache(maxsize=1024)
def spelling(text: str) -> Spelling:
    """A spelling of ``text`` that can be drawn: as it is, without accents, or with escapes such as
    \\u87ba."""
    text = printable(text)
    letters = frozenset(text)
    builtin = font(None, _TRIAL_SIZE)
    if _has(builtin, letters) and not _needs_shaping(text):
        return Spelling(text, None)
    if _can_shape() or not _needs_shaping(text):
        path = _system_font(letters)
        if path is not None:
            return Spelling(text, path)
    return Spelling("".join(_respelt(one, builtin) for one in text), None)


def undrawable(names: Iterable[str]) -> List[str]:
    """The names that are drawn in another spelling, because no font has their letters."""
    return [name for name in dict.fromkeys(names) if spelling(name).text != printable(name)]


def _respelt(letter: str, builtin: Any) -> str:
    if _has(builtin, frozenset(letter)) and not _needs_shaping(letter):
        return letter
    plain = "".join(one for one in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(one))
    if plain and plain.isascii():
        return plain
    return letter.encode("unicode_escape").decode()


def _needs_shaping(text: str) -> bool:
    """Whether text is written from right to left, or has marks that join the letter before them."""
    return any(
        unicodedata.bidirectional(one) in ("R", "AL") or unicodedata.category(one) in ("Mn", "Mc")
        for one in text
    )


def _can_shape() -> bool:
    from PIL import features

    return bool(features.check("raqm") and features.check("fribidi"))


def _has(font: Any, letters: FrozenSet[str]) -> bool:
    absent = _drawn(font, _ABSENT)
    return absent == _drawn(font, _ABSENT_TOO) and all(
        one.isspace() or not one.isprintable() or _drawn(font, one) != absent for one in letters
    )


def _drawn(font: Any, letter: str) -> Tuple[Any, bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=256)
def _system_font(letters: FrozenSet[str]) -> Optional[Path]:
    for path in _font_files():
        try:
            if _has(font(path, _TRIAL_SIZE), letters):
                return path
        except (OSError, ValueError):  # no font, or a font of bitmaps in other sizes
            continue
    return None


@functools.lru_cache(maxsize=1)
def _font_files() -> Tuple[Path, ...]:
    """The font files in fontconfig's folders, and matplotlib's, the plainest first."""
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    home = os.environ.get("XDG_DATA_HOME") or str(Path("~/.local/share").expanduser())
    folders = [Path(one) / "fonts" for one in (home, *shared.split(":")) if one]
    folders.append(Path("~/.fonts").expanduser())
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin:
        folders.append(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf")
    files = {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    }
    return tuple(sorted(files, key=_plainness))


def _plainness(path: Path) -> Tuple[bool, bool, bool, str]:
    name = path.name.lower()
    is_odd = any(word in name for word in _UNLIKE_TEXT)
    return is_odd, not name.startswith("notosans"), not name.startswith("dejavusans"), str(path)
