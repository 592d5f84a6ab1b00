"""Draws detections into images."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from odtrt_lib import fonts
from odtrt_lib.detector import Detections
from odtrt_lib.spans import span

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/) without black. They can be told apart with any
# kind of colour vision.
_CLASS_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
MIN_SCORE = 0.3


def confident(detections: Detections, min_score: float) -> Detections:
    """The detections with a score of at least ``min_score``, best first."""
    count = int((detections.scores >= min_score).sum())
    return dataclasses.replace(
        detections,
        boxes=detections.boxes[:count],
        scores=detections.scores[:count],
        class_ids=detections.class_ids[:count],
        names=detections.names[:count],
    )


def draw_detections(image: np.ndarray, detections: Detections, min_score: float = MIN_SCORE) -> np.ndarray:
    """A copy of ``image`` with a box, the class and the score of each detection from ``min_score`` up.

    image: uint8 [height, width, 3], RGB; the result has the same form. A box that extends beyond the picture
    is drawn along its edge. Labels stay inside the picture. Lines and letters grow with the picture. If no
    font of this machine has a name's letters, another spelling is drawn, see
    :func:`odtrt_lib.fonts.spelling`.
    """
    with span("draw"):
        return _drawn(image, detections, min_score)


def _drawn(image: np.ndarray, detections: Detections, min_score: float) -> np.ndarray:
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    line = max(1, round(max(height, width) / 320))
    letters = max(9, round(max(height, width) / 42))
    shown = [i for i, score in enumerate(detections.scores) if score >= min_score]
    for i in reversed(shown):
        _draw_box(draw, _inside(detections.boxes[i], image), _colour_of(detections.class_ids[i]), line)
    for i in reversed(shown):
        text = f"{detections.names[i]} {detections.scores[i]:.2f}"
        left, top, _, _ = _inside(detections.boxes[i], image)
        _draw_label(draw, text, (left, top), (width, height), letters, _colour_of(detections.class_ids[i]))
    return np.asarray(picture)


def _inside(box: np.ndarray, image: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the pixels that the part of ``box`` inside ``image`` covers."""
    height, width = image.shape[:2]
    ymin, xmin, ymax, xmax = np.clip(box, 0, [height - 1, width - 1, height - 1, width - 1])
    return float(min(xmin, xmax)), float(min(ymin, ymax)), float(max(xmin, xmax)), float(max(ymin, ymax))


def _draw_box(
    draw: Any,
    edges: tuple[float, float, float, float],
    colour: tuple[int, int, int],
    line: int,
) -> None:
    """Draws a frame of ``colour`` between two thin lines of a contrasting colour."""
    left, top, right, bottom = edges
    draw.rectangle(edges, outline=_contrast(colour), width=line + 2)
    inset = 1 if min(right - left, bottom - top) > 2 else 0
    draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=colour, width=line)


def _draw_label(
    draw: Any,
    text: str,
    corner: tuple[float, float],
    size: tuple[int, int],
    letters: int,
    colour: tuple[int, int, int],
) -> None:
    """Draws the text on a rectangle of ``colour`` above ``corner``, or below it if there is no room above.

    size: the picture's (width, height); letters shrink if the text is wider than that.
    """
    pad = max(2, letters // 6)
    text, file = fonts.spelling(text)
    while letters > 6 and draw.textlength(text, fonts.font(file, letters)) + 2 * pad > size[0]:
        letters -= 1
    font = fonts.font(file, letters)
    _, ink_top, _, ink_bottom = draw.textbbox((0, 0), "Xg" + text, font)
    text_width = draw.textlength(text, font)
    plate = (text_width + 2 * pad, ink_bottom - ink_top + 2 * pad)
    left = max(0.0, min(corner[0], size[0] - plate[0]))
    above = corner[1] - plate[1]
    top = max(0.0, min(above if above >= 0 else corner[1], size[1] - plate[1]))
    draw.rectangle((left, top, left + plate[0] - 1, top + plate[1] - 1), fill=colour)
    draw.text((left + pad, top + pad - ink_top), text, font=font, fill=_contrast(colour))


def _colour_of(class_id: int) -> tuple[int, int, int]:
    return _CLASS_COLOURS[(int(class_id) - 1) % len(_CLASS_COLOURS)]


def _contrast(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast ratio with ``colour`` (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return _BLACK if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else _WHITE
