"""Names in any script on a picture: with a font that has the letters, else spelt so that they differ."""

from pathlib import Path

import numpy as np
import pytest

from odtrt_lib import fonts
from odtrt_lib.detector import Detections
from odtrt_lib.plots import draw_detections


@pytest.fixture
def no_fonts(monkeypatch):
    """A machine without any font, whatever this one has."""
    monkeypatch.setattr(fonts, "_font_files", lambda: ())
    clear()
    yield
    clear()


def clear():
    fonts.spelling.cache_clear()
    fonts._system_font.cache_clear()


@pytest.fixture
def chinese_font(monkeypatch, tmp_path):
    """A machine whose only font has the two letters of 螺母, as a square and a bar, and digits."""
    builder = pytest.importorskip("fontTools.fontBuilder")
    pen = pytest.importorskip("fontTools.pens.ttGlyphPen")

    def box(width, height):
        drawn = pen.TTGlyphPen(None)
        drawn.moveTo((50, 0))
        for point in ((50, height), (width, height), (width, 0)):
            drawn.lineTo(point)
        drawn.closePath()
        return drawn.glyph()

    letters = {ord(one): f"letter{ord(one)}" for one in "螺母0123456789. "}
    glyphs = {".notdef": box(300, 300)}
    glyphs.update({name: box(900 - 20 * i, 800 - 30 * i) for i, name in enumerate(letters.values())})
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap(letters)
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 50)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Two Letters", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path = tmp_path / "fonts" / "two.ttf"
    path.parent.mkdir()
    font.save(path)
    (path.parent / "broken.ttf").write_bytes(b"no font")
    for name in ("XDG_DATA_HOME", "XDG_DATA_DIRS"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(fonts.importlib.util, "find_spec", lambda name: None)
    fonts._font_files.cache_clear()
    clear()
    yield path
    fonts._font_files.cache_clear()
    clear()


def drawn(name):
    boxes = np.array([[30, 10, 70, 200]], np.float32)
    found = Detections(boxes, np.array([0.9], np.float32), np.array([1]), (name,))
    return draw_detections(np.full((80, 300, 3), 128, np.uint8), found)


def test_a_font_of_the_machine_is_found(chinese_font):
    assert fonts.spelling("螺母 0.90") == ("螺母 0.90", chinese_font)
    assert not (drawn("螺母") == drawn("母螺")).all()
    assert fonts.undrawable(["螺母", "齿轮", "bolt", "齿轮"]) == ["齿轮"]


def test_a_font_of_last_resort_has_no_letters(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "LastResortHE-Regular.ttf"
    if not font.is_file():
        pytest.skip("this matplotlib has no font of last resort")
    monkeypatch.setattr(fonts, "_font_files", lambda: (font,))
    clear()
    assert fonts.spelling("螺母") == (r"\u87ba\u6bcd", None)
    clear()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("bolt", "bolt"),
        ("螺母", r"\u87ba\u6bcd"),
        ("ترس", r"\u062a\u0631\u0633"),
        ("tornillo rápido", "tornillo rapido"),
        ("śrubḁ", "sruba"),
        ("two\nlines", r"two\nlines"),
        ("\x1b[2J\u202e", r"\x1b[2J\u202e"),
        ("\ud800", r"\ud800"),
    ],
)
def test_without_a_font_names_are_spelt_so_that_they_differ(no_fonts, name, shown):
    assert fonts.spelling(name) == (shown, None)
    assert drawn(name).shape == (80, 300, 3)


def test_two_names_never_give_the_same_picture(no_fonts):
    names = ("螺母", "齿轮", "ترس", "برج", "болт", "гайка", "two\nlines")
    assert len({drawn(name).tobytes() for name in names}) == len(names)
