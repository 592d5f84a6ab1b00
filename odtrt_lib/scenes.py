"""Images with ground truth: the rendered "parts on a belt" set, also as a folder in COCO's format.

:func:`render_scene` draws what a camera above a conveyor belt sees: bolts, nuts, washers, gears,
springs and bearings among swarf, cable scraps and labels. The same seed gives the same picture bit for bit
(with the same versions of numpy and OpenCV). So the set needs no download, and its splits are disjoint ranges
of seeds:

==================== ================== ==============================================
``TRAIN_SEEDS``      0 .. 99 999        training, and calibration of INT8
``VALIDATION_SEEDS`` 100 000 .. 109 999 choices made during training
``TEST_SEEDS``       110 000 .. 119 999 reported figures, demonstration scenes
==================== ================== ==============================================

Boxes are ``[ymin, xmin, ymax, xmax]`` in pixels, measured at pixel edges: the pixel in row r and column c
covers ``[r, c, r + 1, c + 1]``. As in COCO, a box encloses the visible part of its object. An object of which
less than ``MINIMUM_VISIBLE`` is visible is not in the ground truth.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import cv2
import numpy as np

from odtrt_lib.coco import CocoFolder as CocoFolder
from odtrt_lib.coco import load_coco as load_coco
from odtrt_lib.errors import InputError

PARTS_CLASSES = ("bolt", "nut", "washer", "gear", "spring", "bearing")
TRAIN_SEEDS = range(0, 100_000)
VALIDATION_SEEDS = range(100_000, 110_000)
TEST_SEEDS = range(110_000, 120_000)
MINIMUM_VISIBLE = 0.35
_JPEG_QUALITY = 92

_SMALLEST_RADIUS, _LARGEST_RADIUS = 10.0, 82.0


@dataclass(frozen=True)
class Scene:
    """One picture with its ground truth.

    image: uint8 [height, width, 3], RGB.
    boxes: float32 [K, 4], ``[ymin, xmin, ymax, xmax]`` in pixels, round the visible part of each object.
    class_ids: int64 [K], 1-based label-map ids; ``PARTS_CLASSES[class_id - 1]`` is the name.
    """

    image: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray


@dataclass(frozen=True)
class _Frame:
    """The pixels of one patch in the part's own coordinates (unit = the part's half extent).

    u, v, radius, angle: float32 [h, w]. scale: patch pixels for one unit. to_patch: 2x3, (u, v, 1) -> (x, y).
    """

    u: np.ndarray
    v: np.ndarray
    scale: float
    to_patch: np.ndarray

    @property
    def radius(self) -> np.ndarray:
        return np.sqrt(self.u * self.u + self.v * self.v)

    @property
    def angle(self) -> np.ndarray:
        return np.arctan2(self.v, self.u)


@dataclass(frozen=True)
class _Surface:
    """A part before it is lit: the area that it covers and its height, in its own units.

    coverage: float32 [h, w], 0 to 1. height: float32 [h, w], in units. thickness: that of the wall under the
    top face (0: the part is round below). cavity: darkening, 0 to 1. paint, painted: the colour of what is
    not bare metal, and its place. turned: the face was made on a lathe.
    """

    coverage: np.ndarray
    height: np.ndarray
    thickness: float
    shadow_height: float
    cavity: np.ndarray | None = None
    paint: tuple[float, float, float] | None = None
    painted: np.ndarray | None = None
    turned: bool = False


@dataclass(frozen=True)
class _Sprite:
    """A lit patch at image resolution. alpha float32 [h, w]; rgb float32 [h, w, 3]; corner in pixels."""

    alpha: np.ndarray
    rgb: np.ndarray
    top: int
    left: int
    shadow_pixels: float
    class_id: int


@dataclass(frozen=True)
class _Light:
    """direction: unit vector to the lamp. All fields are chosen once for each scene."""

    direction: np.ndarray
    ambient: float
    coaxial: float
    shadow_strength: float
    shadow_softness: float


@dataclass(frozen=True)
class _Camera:
    tilt: float
    light: _Light


@dataclass(frozen=True)
class _Layout:
    """Everything on the belt, lowest first, and the belt itself."""

    belt: np.ndarray
    sprites: tuple[_Sprite, ...]
    camera: _Camera


def render_scene(seed: int, height: int = 480, width: int = 640) -> Scene:
    """Renders scene number ``seed``. For shapes see :class:`Scene`, for boxes the module's docstring."""
    layout = _lay_out(seed, height, width)
    owner = _owners(layout, height, width)
    boxes, class_ids = [], []
    for number, sprite in enumerate(layout.sprites):
        if sprite.class_id == 0:
            continue
        rows, columns = _window(sprite, height, width)
        mine = owner[rows, columns] == number
        ys, xs = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
        boxes.append(
            (rows.start + ys[0], columns.start + xs[0], rows.start + ys[-1] + 1, columns.start + xs[-1] + 1)
        )
        class_ids.append(sprite.class_id)
    return Scene(
        image=_photograph(_paint(layout), np.random.default_rng([seed, 3])),
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        class_ids=np.asarray(class_ids, np.int64),
    )


# ---------------------------------------------------------------------------------------- layout


def _lay_out(seed: int, height: int, width: int) -> _Layout:
    rng = np.random.default_rng([seed, 1])
    camera = _Camera(tilt=math.radians(rng.uniform(0.0, 34.0)), light=_random_light(rng))
    belt = _belt(np.random.default_rng([seed, 2]), height, width)
    unit = min(height / 480, width / 640)
    typical = unit * math.exp(rng.uniform(math.log(22.0), math.log(52.0)))
    count = int(rng.integers(3, 8)) if typical > 42 * unit else int(rng.integers(4, 14))
    crowding = rng.choice((0.0, 0.25, 0.6), p=(0.35, 0.45, 0.2))
    lower = [_clutter(rng, camera, height, width, unit) for _ in range(int(rng.poisson(3.0)))]
    parts = _place_parts(rng, camera, height, width, typical, unit, count, crowding)
    upper = [_clutter(rng, camera, height, width, unit) for _ in range(int(rng.poisson(0.6)))]
    layout = _Layout(belt, tuple(lower + parts + upper), camera)
    owner = _owners(layout, height, width)
    shown = tuple(
        sprite
        for number, sprite in enumerate(layout.sprites)
        if sprite.class_id == 0 or _visible_fraction(sprite, number, owner) >= MINIMUM_VISIBLE
    )
    return _Layout(belt, shown, camera)


def _place_parts(
    rng: np.random.Generator,
    camera: _Camera,
    height: int,
    width: int,
    typical: float,
    unit: float,
    count: int,
    crowding: float,
) -> list[_Sprite]:
    """Parts at random places. A part may overlap others only with probability ``crowding``."""
    sprites: list[_Sprite] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(count):
        class_id = int(rng.integers(1, len(PARTS_CLASSES) + 1))
        slim = PARTS_CLASSES[class_id - 1] in ("bolt", "spring")
        smallest = (1.6 if slim else 1.0) * _SMALLEST_RADIUS * unit
        radius = typical * math.exp(rng.normal(0.0, 0.38)) * (1.15 if slim else 1.0)
        radius = float(np.clip(radius, smallest, _LARGEST_RADIUS * unit))
        for _attempt in range(12):
            x = rng.uniform(-0.02, 1.02) * width
            y = rng.uniform(-0.02, 1.02) * height
            gap = 0.55 if rng.random() < crowding else 1.0
            if all(math.hypot(x - a, y - b) > gap * 0.9 * (radius + r) for a, b, r in taken):
                break
        else:
            continue
        nearness = 1.0 + 0.35 * math.sin(camera.tilt) * (y / height - 0.5)
        taken.append((x, y, radius * nearness))
        sprites.append(_part(rng, camera, class_id, x, y, radius * nearness))
    return sprites


def _random_light(rng: np.random.Generator) -> _Light:
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(32, 68))
    direction = (
        math.cos(azimuth) * math.cos(elevation),
        math.sin(azimuth) * math.cos(elevation),
        math.sin(elevation),
    )
    return _Light(
        direction=np.asarray(direction, np.float32),
        ambient=float(rng.uniform(0.22, 0.45)),
        coaxial=float(rng.uniform(0.05, 0.55)),
        shadow_strength=float(rng.uniform(0.35, 0.75)),
        shadow_softness=float(rng.uniform(0.25, 0.8)),
    )


def _window(sprite: _Sprite, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of the image that the sprite's patch covers; they can be empty."""
    patch_height, patch_width = sprite.alpha.shape
    top, left = max(sprite.top, 0), max(sprite.left, 0)
    return (
        slice(top, max(top, min(sprite.top + patch_height, height))),
        slice(left, max(left, min(sprite.left + patch_width, width))),
    )


def _inside(sprite: _Sprite, rows: slice, columns: slice) -> tuple[slice, slice]:
    return (
        slice(rows.start - sprite.top, rows.stop - sprite.top),
        slice(columns.start - sprite.left, columns.stop - sprite.left),
    )


def _owners(layout: _Layout, height: int, width: int) -> np.ndarray:
    """int16 [height, width]: the number of the topmost sprite in each pixel; -1: the belt is visible."""
    owner = np.full((height, width), -1, np.int16)
    for number, sprite in enumerate(layout.sprites):
        rows, columns = _window(sprite, height, width)
        covered = sprite.alpha[_inside(sprite, rows, columns)] >= 0.5
        owner[rows, columns][covered] = number
    return owner


def _visible_fraction(sprite: _Sprite, number: int, owner: np.ndarray) -> float:
    rows, columns = _window(sprite, *owner.shape)
    whole = int(np.count_nonzero(sprite.alpha >= 0.5))
    return int(np.count_nonzero(owner[rows, columns] == number)) / max(whole, 1)


# ---------------------------------------------------------------------------------------- painting


def _paint(layout: _Layout, shadows: bool = True) -> np.ndarray:
    """The belt with everything on it, without the camera's faults; float32 [height, width, 3], 0 to 1."""
    canvas = layout.belt.copy()
    height, width = canvas.shape[:2]
    for sprite in layout.sprites:
        if shadows:
            _cast_shadow(canvas, sprite, layout.camera.light)
        rows, columns = _window(sprite, height, width)
        part = _inside(sprite, rows, columns)
        alpha = sprite.alpha[part][..., None]
        canvas[rows, columns] += alpha * (sprite.rgb[part] - canvas[rows, columns])
    return canvas


def _cast_shadow(canvas: np.ndarray, sprite: _Sprite, light: _Light) -> None:
    height, width = canvas.shape[:2]
    reach = sprite.shadow_pixels / max(float(light.direction[2]), 0.3)
    dx, dy = (-float(light.direction[0]) * reach, -float(light.direction[1]) * reach)
    blur = 0.6 + light.shadow_softness * sprite.shadow_pixels * 0.45
    margin = math.ceil(abs(dx) + abs(dy) + 3 * blur) + 1
    mask = cv2.copyMakeBorder(sprite.alpha, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0)
    shift = np.asarray([[1, 0, dx], [0, 1, dy]], np.float32)
    thrown = cv2.GaussianBlur(cv2.warpAffine(mask, shift, mask.shape[::-1]), (0, 0), blur)
    contact = cv2.GaussianBlur(mask, (0, 0), 0.8 + 0.25 * sprite.shadow_pixels)
    shade = np.maximum(thrown * light.shadow_strength, contact * light.shadow_strength * 0.6)
    shadow = _Sprite(shade, sprite.rgb, sprite.top - margin, sprite.left - margin, 0.0, 0)
    rows, columns = _window(shadow, height, width)
    canvas[rows, columns] *= 1.0 - shade[_inside(shadow, rows, columns)][..., None]


def _smoothstep(low: float, high: float, value: np.ndarray) -> np.ndarray:
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise, float32 [height, width], about -1 to 1, with features ``cell`` pixels wide."""
    rows, columns = max(2, int(height / cell) + 2), max(2, int(width / cell) + 2)
    coarse = np.clip(rng.standard_normal((rows, columns), np.float32) * 0.6, -1.5, 1.5)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


_METALS = (
    ((0.66, 0.68, 0.70), 0.30),  # zinc plated
    ((0.56, 0.57, 0.58), 0.30),  # steel
    ((0.62, 0.61, 0.58), 0.12),  # stainless, warm light
    ((0.66, 0.60, 0.42), 0.09),  # yellow chromate
    ((0.68, 0.54, 0.30), 0.06),  # brass
    ((0.17, 0.17, 0.18), 0.13),  # black oxide
)


def _light_surface(
    rng: np.random.Generator, frame: _Frame, surface: _Surface, light: _Light
) -> tuple[np.ndarray, np.ndarray]:
    """Lights the top of a surface. Returns (rgb float32 [h, w, 3], the metal's colour float32 [3])."""
    relief = cv2.GaussianBlur(surface.height.astype(np.float32) * frame.scale, (0, 0), 0.9)
    height, width = relief.shape
    grain = rng.standard_normal((height, width), np.float32) * 0.05
    slope_x = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=0.125) + grain
    slope_y = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=0.125) + _noise(rng, height, width, 9.0) * 0.05
    inverse = 1.0 / np.sqrt(slope_x * slope_x + slope_y * slope_y + 1.0)
    nx, ny, nz = -slope_x * inverse, -slope_y * inverse, inverse
    lx, ly, lz = (float(value) for value in light.direction)
    diffuse = np.clip(nx * lx + ny * ly + nz * lz, 0.0, 1.0)
    bend = float(rng.uniform(0.05, 0.3))
    rx, ry, rz = 2 * nz * nx + bend * frame.u, 2 * nz * ny + bend * frame.v, 2 * nz * nz - 1.0
    toward_lamp = rx * lx + ry * ly + rz * lz
    reflected = light.ambient * (0.35 + 0.65 * _smoothstep(-0.5, 0.9, rz))
    reflected += 0.75 * _smoothstep(0.55, 0.98, toward_lamp) + light.coaxial * _smoothstep(0.8, 1.0, rz)
    strip = rx * ly - ry * lx
    reflected += 0.30 * np.exp(-np.square((strip - 0.45) / 0.13)) * (rz > -0.2)
    highlight = _smoothstep(0.955, 0.995, toward_lamp) * 0.85
    if surface.turned:
        radius, angle = frame.radius, frame.angle
        rings = _noise(rng, 1, 128, 1.5)[0]
        groove = np.interp(radius.ravel(), np.linspace(0, 1.2, 128), rings).reshape(radius.shape)
        fan = np.cos(2.0 * (angle - math.atan2(ly, lx))) * 0.5 + 0.5
        flat = _smoothstep(0.90, 0.99, nz)
        reflected *= 1.0 + flat * (0.10 * groove.astype(np.float32) + 0.55 * fan**3 - 0.15)
    shares = np.asarray([share for _, share in _METALS])
    colour = np.asarray(_METALS[int(rng.choice(len(_METALS), p=shares / shares.sum()))][0], np.float32)
    colour = colour * float(rng.uniform(0.85, 1.12))
    blotches = 1.0 + 0.10 * _noise(rng, height, width, max(6.0, frame.scale * 0.5))
    metal = (0.35 * diffuse + reflected) * blotches
    rgb = metal[..., None] * colour + (highlight * float(colour.mean() + 0.25))[..., None]
    if rng.random() < 0.14:
        rust = _smoothstep(0.15, 0.7, _noise(rng, height, width, max(5.0, frame.scale * 0.35)))[..., None]
        rgb += rust * 0.75 * (np.asarray((0.30, 0.17, 0.09), np.float32) * (0.4 + diffuse)[..., None] - rgb)
    if surface.painted is not None:
        paint = np.asarray(surface.paint, np.float32) * (0.25 + 0.75 * diffuse)[..., None]
        paint += 0.18 * highlight[..., None]
        rgb += surface.painted[..., None] * (paint - rgb)
    if surface.cavity is not None:
        rgb *= (1.0 - surface.cavity)[..., None]
    return rgb, colour


def _part(
    rng: np.random.Generator, camera: _Camera, class_id: int, x: float, y: float, radius: float
) -> _Sprite:
    """One part of the class, centred near (x, y), ``radius`` pixels from centre to its far end."""
    return _sprite(rng, camera, _SHAPES[class_id - 1], class_id, x, y, radius)


def _sprite(
    rng: np.random.Generator,
    camera: _Camera,
    shape: Callable[[np.random.Generator, _Frame], _Surface],
    class_id: int,
    x: float,
    y: float,
    radius: float,
) -> _Sprite:
    oversampling = 2 if radius > 26 else 3 if radius > 14 else 4
    scale = radius * oversampling
    angle = rng.uniform(0, 2 * math.pi)
    squeeze = math.cos(camera.tilt)
    half = math.ceil(radius * 1.12) + 2
    left, top = round(x) - half, round(y) - half
    size = 2 * half * oversampling
    centre_x, centre_y = (x - left) * oversampling - 0.5, (y - top) * oversampling - 0.5
    cos, sin = math.cos(angle), math.sin(angle)
    grid_x = (np.arange(size, dtype=np.float32) - centre_x) / scale
    grid_y = (np.arange(size, dtype=np.float32) - centre_y) / (scale * squeeze)
    frame = _Frame(
        u=grid_x[None, :] * cos + grid_y[:, None] * sin,
        v=grid_y[:, None] * cos - grid_x[None, :] * sin,
        scale=scale,
        to_patch=np.asarray(
            [
                [scale * cos, -scale * sin, centre_x],
                [scale * squeeze * sin, scale * squeeze * cos, centre_y],
            ]
        ),
    )
    surface = shape(rng, frame)
    rgb, colour = _light_surface(rng, frame, surface, camera.light)
    alpha = np.clip(surface.coverage, 0.0, 1.0).astype(np.float32)
    rgb *= alpha[..., None]
    wall = round(surface.thickness * math.sin(camera.tilt) * scale)
    if wall > 0:
        alpha, rgb = _add_wall(alpha, rgb, wall, colour, camera.light)
    size_out = (2 * half, alpha.shape[0] // oversampling)
    small_alpha = cv2.resize(alpha, size_out, interpolation=cv2.INTER_AREA)
    small_rgb = cv2.resize(rgb, size_out, interpolation=cv2.INTER_AREA)
    small_rgb = small_rgb / np.maximum(small_alpha, 1e-3)[..., None]
    return _Sprite(small_alpha, small_rgb, top, left, surface.shadow_height * radius, class_id)


def _add_wall(
    alpha: np.ndarray, rgb: np.ndarray, wall: int, colour: np.ndarray, light: _Light
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the side of a part, which a tilted camera sees below the top face. rgb is premultiplied."""
    padding = wall + (-(alpha.shape[0] + wall)) % 12
    alpha = np.pad(alpha, ((0, padding), (0, 0)))
    rgb = np.pad(rgb, ((0, padding), (0, 0), (0, 0)))
    kernel = np.ones((wall + 1, 1), np.uint8)
    side = cv2.dilate(alpha, kernel, anchor=(0, wall), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    facing = cv2.Sobel(cv2.GaussianBlur(side, (0, 0), 3.0), cv2.CV_32F, 1, 0, ksize=3)
    lamp = float(light.direction[0])
    shade = np.clip(0.30 + 0.25 * light.ambient - 0.9 * facing * lamp, 0.08, 0.9)
    shade = shade * (0.75 if light.direction[1] < 0 else 1.1)
    under = np.clip(side - alpha, 0.0, 1.0)
    return np.maximum(side, alpha), rgb + (under * shade)[..., None] * colour


# ---------------------------------------------------------------------------------------- parts


def _cover(frame: _Frame, distance: np.ndarray) -> np.ndarray:
    """The coverage of each pixel. distance: the signed distance to the outline (inside > 0), in units."""
    return np.clip(distance * frame.scale + 0.5, 0.0, 1.0)


def _round_bar(radius: np.ndarray | float, v: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(radius * radius - v * v, 0.0))


def _bolt(rng: np.random.Generator, frame: _Frame) -> _Surface:
    u, v = frame.u, frame.v
    shank = rng.uniform(0.11, 0.23)
    head = shank * rng.uniform(1.55, 1.9)
    neck = -1.0 + head * rng.uniform(0.75, 1.15)
    pitch = shank * rng.uniform(0.30, 0.46)
    thread_start = neck + (1.0 - neck) * float(rng.choice((0.06, rng.uniform(0.2, 0.6))))
    phase = u / pitch + v / (4.0 * shank)
    ridge = np.abs(phase - np.floor(phase) - 0.5) * 2.0
    threaded = (u > thread_start) * (u < 0.985)
    bar = shank * (1.0 - 0.17 * threaded * ridge) * np.clip((1.06 - u) / 0.10, 0.5, 1.0)
    height = _round_bar(bar, v) * (u > neck) * (u < 1.0)
    cover = _cover(frame, np.minimum(np.minimum(bar - np.abs(v), 1.0 - u), u - neck + 0.02))
    kind = rng.choice(4, p=(0.5, 0.25, 0.15, 0.10))
    along = (u - neck) / (-1.0 - neck)
    cap = np.minimum(u + 1.0, neck - u)
    if kind == 0:
        turn = rng.uniform(-math.pi / 6, math.pi / 6)
        angles = turn + np.arange(6) * math.pi / 3
        flat = head * math.cos(math.pi / 6)
        planes = [(flat - v * math.sin(a)) / math.cos(a) for a in angles.tolist() if math.cos(a) > 0.05]
        top = np.minimum.reduce(planes) - 0.35 * head * np.maximum(along - 0.8, 0.0)
        half_width = head * float(np.abs(np.sin(angles + math.pi / 6)).max())
        head_cover = _cover(frame, np.minimum(cap, half_width - np.abs(v)))
        if rng.random() < 0.3:
            collar = np.minimum(np.minimum(u - (neck - 0.07), neck - u), head * 1.22 - np.abs(v))
            height = np.maximum(height, _round_bar(head * 1.22, v) * (collar > 0))
            cover = np.maximum(cover, _cover(frame, collar))
    elif kind == 1:
        knurl = 1.0 + 0.02 * np.cos(np.arcsin(np.clip(v / head, -1, 1)) * 26.0)
        top = _round_bar(head * knurl, v)
        head_cover = _cover(frame, np.minimum(cap, head - np.abs(v)))
    elif kind == 2:
        dome = head * np.sqrt(np.clip(1.0 - along * along, 0.0, 1.0))
        top = _round_bar(dome, v)
        head_cover = _cover(frame, np.minimum(cap, dome - np.abs(v)))
    else:
        cone = shank + (head - shank) * np.clip(along * 1.15, 0.0, 1.0)
        top = _round_bar(cone, v)
        head_cover = _cover(frame, np.minimum(cap, cone - np.abs(v)))
    height = np.where(head_cover > 0.5, np.maximum(height, top), height)
    return _Surface(np.maximum(cover, head_cover), height, 0.0, shadow_height=1.3 * head)


def _nut(rng: np.random.Generator, frame: _Frame) -> _Surface:
    u, v, radius = frame.u, frame.v, frame.radius
    flanged = rng.random() < 0.2
    corner = 0.80 if flanged else 1.0
    flat = corner * math.cos(math.pi / 6)
    hexagon = flat - np.maximum.reduce(
        [np.abs(u * math.cos(a) + v * math.sin(a)) for a in (0.0, math.pi / 3, 2 * math.pi / 3)]
    )
    bore = corner * rng.uniform(0.42, 0.56)
    chamfer = flat * rng.uniform(0.93, 1.0)
    height = -0.55 * np.maximum(radius - chamfer, 0.0) - 0.9 * np.maximum(bore + 0.09 - radius, 0.0)
    height -= 0.25 * np.maximum(0.04 - hexagon, 0.0)
    outline = hexagon
    if flanged:
        brim = -0.28 - 0.5 * np.maximum(radius - 0.9, 0.0)
        height = np.where(hexagon > 0, height, brim)
        outline = np.maximum(hexagon, 1.0 - radius)
    painted = paint = None
    if rng.random() < 0.22:
        collar = np.abs(radius - (bore + 0.10)) / 0.09
        painted = np.clip(1.2 - collar**4, 0.0, 1.0)
        height = height + 0.10 * np.sqrt(np.clip(1.0 - collar * collar, 0.0, 1.0))
        paint = ((0.16, 0.27, 0.52), (0.75, 0.74, 0.70), (0.14, 0.36, 0.25))[int(rng.integers(3))]
    return _Surface(
        _cover(frame, np.minimum(outline, radius - bore)),
        height,
        thickness=rng.uniform(0.55, 0.9),
        shadow_height=0.6,
        paint=paint,
        painted=painted,
        turned=rng.random() < 0.5,
    )


def _washer(rng: np.random.Generator, frame: _Frame) -> _Surface:
    radius = frame.radius
    kind = rng.choice(3, p=(0.62, 0.18, 0.20))
    bore = rng.uniform(0.28, 0.42) if kind == 1 else rng.uniform(0.46, 0.64)
    edge = np.minimum(1.0 - radius, radius - bore)
    rim = 0.14 if kind == 2 else 0.05
    height = -0.7 * np.maximum(rim - edge, 0.0) - rng.uniform(0.0, 0.12) * radius
    if kind == 2:
        turn = rng.uniform(0.3, 0.6)
        slit = np.abs(frame.v * math.cos(turn) - (frame.u - 0.75) * math.sin(turn)) - 0.035
        edge = np.where(frame.u > 0, np.minimum(edge, slit), edge)
    return _Surface(
        _cover(frame, edge),
        height,
        thickness=rng.uniform(0.08, 0.18) if kind != 2 else 0.25,
        shadow_height=0.16,
        turned=kind != 2,
    )


def _gear(rng: np.random.Generator, frame: _Frame) -> _Surface:
    u, v, radius, angle = frame.u, frame.v, frame.radius, frame.angle
    teeth = int(rng.integers(10, 31))
    module = 2.0 / (teeth + 2)
    root = 1.0 - 2.25 * module
    tooth = np.clip(0.5 + rng.uniform(0.85, 1.4) * np.cos(teeth * angle), 0.0, 1.0)
    outline = root + (1.0 - root) * tooth - radius
    bore = rng.uniform(0.13, 0.28)
    hub = bore + rng.uniform(0.10, 0.2)
    web = root - rng.uniform(0.10, 0.18)
    inside = radius - bore
    if rng.random() < 0.6:
        key = np.minimum(bore * 0.28 - np.abs(v), bore * 1.35 - u)
        inside = np.minimum(inside, -np.minimum(key, u))
    edge = np.minimum(outline, inside)
    height = -0.5 * np.maximum(0.035 - edge, 0.0)
    if rng.random() < 0.7:
        recess = np.minimum(radius - hub, web - radius)
        height = height - rng.uniform(0.05, 0.14) * _smoothstep(0.0, 0.06, recess)
    if web - hub > 0.22 and rng.random() < 0.5:
        holes = int(rng.integers(3, 7))
        middle, size = 0.5 * (hub + web), min(0.32 * (web - hub), 0.2)
        sector = np.mod(angle, 2 * math.pi / holes) - math.pi / holes
        hole = np.hypot(radius * np.cos(sector) - middle, radius * np.sin(sector)) - size
        edge = np.minimum(edge, hole)
        height = height - 0.6 * np.maximum(0.04 - hole, 0.0)
    return _Surface(
        _cover(frame, edge),
        height,
        thickness=rng.uniform(0.18, 0.5),
        shadow_height=0.35,
        turned=rng.random() < 0.8,
    )


def _spring(rng: np.random.Generator, frame: _Frame) -> _Surface:
    wire = rng.uniform(0.045, 0.085)
    coil = rng.uniform(0.22, 0.42)
    hooked = rng.random() < 0.3
    end = 0.78 if hooked else 1.0 - wire
    turns = min(int(rng.integers(5, 13)), int(2 * end / (2.05 * wire if hooked else 2.3 * wire)))
    taper = rng.uniform(0.0, 0.4) if rng.random() < 0.25 and not hooked else 0.0
    t = np.linspace(0.0, 2 * math.pi * turns, 24 * turns + 1)
    progress = t / t[-1]
    bunched = progress + 0.035 * np.sin(2 * math.pi * progress) * (not hooked)
    u = -end + 2 * end * bunched
    radius_along = coil * (1.0 - taper * progress)
    v, depth = radius_along * np.cos(t), radius_along * np.sin(t)
    strands = [(u, v, depth)]
    if hooked:
        a = np.linspace(0.0, 1.6 * math.pi, 28)
        loop = 0.5 * (1.0 - end)
        for side in (-1.0, 1.0):
            strands.append(
                (side * (end + loop - loop * np.cos(a)), 1.6 * loop * np.sin(a), np.full_like(a, 0.3 * coil))
            )
    height = np.full(frame.u.shape, -wire, np.float32)
    cover = np.zeros(frame.u.shape, np.float32)
    cavity = np.zeros(frame.u.shape, np.float32)
    full = max(1, round(2 * wire * frame.scale))
    for in_front, rise, shade in ((False, -wire, 0.5), (True, 0.02, 0.0)):
        for line in _visible_runs(frame, strands, in_front):
            _draw_wire(height, line, frame.scale, wire, rise, (1.0, 0.86, 0.68, 0.46, 0.2))
            cv2.polylines(cover, [line], False, 1.0, full, cv2.LINE_8, shift=4)
            cv2.polylines(cavity, [line], False, shade, full, cv2.LINE_8, shift=4)
    return _Surface(cover, height * 1.3, 0.0, shadow_height=1.1 * coil, cavity=cavity)


def _visible_runs(
    frame: _Frame, strands: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], in_front: bool
) -> list[np.ndarray]:
    """The parts of the strands (u, v, depth) on one side of the axis, for cv2.polylines with shift=4."""
    lines = []
    for u, v, depth in strands:
        kept = np.flatnonzero(depth > -0.02 if in_front else depth <= 0.02)
        lines += [
            _to_patch(frame, u[run], v[run])
            for run in np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)
            if len(run) > 1
        ]
    return lines


def _to_patch(frame: _Frame, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Points (u, v) as int32 [n, 2], in 1/16 patch pixels."""
    points = np.stack([u, v], axis=1) @ frame.to_patch[:, :2].T + frame.to_patch[:, 2]
    return np.round(points * 16).astype(np.int32)


def _draw_wire(
    height: np.ndarray, line: np.ndarray, scale: float, wire: float, rise: float, shares: Sequence[float]
) -> None:
    """Draws a round wire into a height map as strokes, each narrower and higher than the one before."""
    for share in shares:
        level = float(wire * math.sqrt(1.0 - share * share) + rise)
        cv2.polylines(
            height, [line], False, level, max(1, round(2 * wire * share * scale)), cv2.LINE_8, shift=4
        )


def _bearing(rng: np.random.Generator, frame: _Frame) -> _Surface:
    radius, angle = frame.radius, frame.angle
    bore = rng.uniform(0.34, 0.5)
    ring = (1.0 - bore) * rng.uniform(0.22, 0.3)
    inner, outer = bore + ring, 1.0 - ring
    edge = np.minimum(1.0 - radius, radius - bore)
    height = -0.7 * np.maximum(0.05 - edge, 0.0)
    gap = np.minimum(radius - inner, outer - radius)
    in_gap = _cover(frame, gap)
    cavity = painted = paint = None
    kind = rng.choice(3, p=(0.45, 0.25, 0.30))
    if kind == 0:
        balls = int(rng.integers(7, 12))
        middle, size = 0.5 * (inner + outer), 0.5 * (outer - inner) * 1.02
        size = min(size, middle * math.sin(math.pi / balls) * 0.97)
        sector = np.mod(angle, 2 * math.pi / balls) - math.pi / balls
        away = np.hypot(radius * np.cos(sector) - middle, radius * np.sin(sector))
        ball = np.sqrt(np.maximum(size * size - away * away, 0.0))
        height = np.where(gap > 0, ball - 0.12, height)
        cavity = (in_gap * np.where(away < size, 0.0, 0.75)).astype(np.float32)
    elif kind == 1:
        height = height - 0.06 * _smoothstep(0.0, 0.03, gap) - 0.05 * (np.abs(gap - 0.05) < 0.012)
        cavity = (0.35 * (np.abs(gap - 0.01) < 0.02)).astype(np.float32)
    else:
        height = height - 0.05 * _smoothstep(0.0, 0.03, gap)
        painted = in_gap
        seals = ((0.07, 0.07, 0.08), (0.34, 0.15, 0.10), (0.10, 0.14, 0.25))
        paint = seals[int(rng.choice(3, p=(0.6, 0.25, 0.15)))]
    return _Surface(
        _cover(frame, edge),
        height,
        thickness=rng.uniform(0.4, 0.7),
        shadow_height=0.5,
        cavity=cavity,
        paint=paint,
        painted=painted,
        turned=True,
    )


_SHAPES = (_bolt, _nut, _washer, _gear, _spring, _bearing)


# ---------------------------------------------------------------------------------------- clutter


def _clutter(rng: np.random.Generator, camera: _Camera, height: int, width: int, unit: float) -> _Sprite:
    """An object on the belt that is no part: swarf, chips, scraps of cable and sheet, pins, labels."""
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    shape, low, high = _CLUTTER[int(rng.choice(len(_CLUTTER), p=(0.26, 0.26, 0.16, 0.12, 0.10, 0.10)))]
    return _sprite(rng, camera, shape, 0, x, y, unit * rng.uniform(low, high))


def _swarf(rng: np.random.Generator, frame: _Frame) -> _Surface:
    t = np.linspace(0.0, 1.0, 60)
    swing, bend = rng.uniform(0.1, 0.35), rng.uniform(-0.5, 0.5)
    waves = rng.uniform(0.4, 2.5)
    u = (2 * t - 1) * 0.85
    v = bend * (u * u - 0.4) + swing * np.sin(2 * math.pi * waves * t) * (0.3 + t)
    return _tube(frame, u, v, rng.uniform(0.012, 0.035))


_CABLES = ((0.07, 0.07, 0.07), (0.45, 0.08, 0.06), (0.10, 0.16, 0.40), (0.50, 0.44, 0.10), (0.50, 0.50, 0.48))


def _cable(rng: np.random.Generator, frame: _Frame) -> _Surface:
    t = np.linspace(0.0, 1.0, 40)
    a, b = rng.uniform(-1.2, 1.2, 2)
    u = (2 * t - 1) * 0.88
    v = np.clip(a * (t - 0.5) * t + b * (t - 0.3) * (t - 0.9), -0.9, 0.9)
    tube = _tube(frame, u, v, rng.uniform(0.03, 0.06))
    return _Surface(
        tube.coverage,
        tube.height,
        0.0,
        shadow_height=0.08,
        paint=_CABLES[int(rng.integers(len(_CABLES)))],
        painted=np.ones_like(tube.coverage),
    )


def _tube(frame: _Frame, u: np.ndarray, v: np.ndarray, wire: float) -> _Surface:
    line = _to_patch(frame, u, v)
    height = np.full(frame.u.shape, -wire, np.float32)
    cover = np.zeros(frame.u.shape, np.float32)
    _draw_wire(height, line, frame.scale, wire, 0.0, (1.0, 0.8, 0.55, 0.25))
    cv2.polylines(cover, [line], False, 1.0, max(1, round(2 * wire * frame.scale)), cv2.LINE_8, shift=4)
    return _Surface(cover, height, 0.0, shadow_height=2.0 * wire)


def _polygon(rng: np.random.Generator, frame: _Frame, corners: int, roughness: float) -> np.ndarray:
    steps = np.sort(rng.uniform(0, 2 * math.pi, corners))
    reach = rng.uniform(1.0 - roughness, 0.98, corners)
    points = np.stack([reach * np.cos(steps), reach * np.sin(steps) * rng.uniform(0.4, 1.0)], axis=1)
    cover = np.zeros(frame.u.shape, np.float32)
    cv2.fillPoly(cover, [_to_patch(frame, points[:, 0], points[:, 1])], 1.0, cv2.LINE_8, shift=4)
    return cover


def _chip(rng: np.random.Generator, frame: _Frame) -> _Surface:
    cover = _polygon(rng, frame, 6, 0.6)
    tilt = rng.uniform(-0.6, 0.6, 2)
    return _Surface(cover, tilt[0] * frame.u + tilt[1] * frame.v, 0.0, shadow_height=0.4)


def _sheet(rng: np.random.Generator, frame: _Frame) -> _Surface:
    cover = _polygon(rng, frame, int(rng.integers(4, 8)), 0.35)
    curl = rng.uniform(-0.25, 0.25) * frame.u * frame.u
    return _Surface(cover, curl + 0.1 * frame.v, rng.uniform(0.02, 0.05), shadow_height=0.12)


def _pin(rng: np.random.Generator, frame: _Frame) -> _Surface:
    thick = rng.uniform(0.06, 0.16)
    reach = np.abs(frame.u)
    bar = thick * np.clip((1.03 - reach) / 0.08, 0.3, 1.0)
    distance = np.minimum(bar - np.abs(frame.v), 1.0 - reach)
    return _Surface(_cover(frame, distance), _round_bar(bar, frame.v), 0.0, shadow_height=1.5 * thick)


def _label(rng: np.random.Generator, frame: _Frame) -> _Surface:
    tall = rng.uniform(0.35, 0.7)
    u, v = frame.u / 0.82, frame.v / (0.82 * tall)
    inside = np.minimum(1.0 - np.abs(u), (1.0 - np.abs(v)) * tall)
    bars = rng.random(48) < 0.5
    lines = rng.random((3, 40)) < 0.7
    column = np.clip(((u + 0.85) / 1.7 * 48).astype(np.int32), 0, 47)
    letter = np.clip(((u + 0.85) / 1.7 * 40).astype(np.int32), 0, 39)
    ink = (np.abs(u) < 0.85) & (v > -0.8) & (v < 0.05) & bars[column]
    for number in range(3):
        centre = 0.25 + 0.22 * number
        ink |= (np.abs(u) < 0.85) & (np.abs(v - centre) < 0.06) & lines[number][letter]
    crease = 0.02 * np.sin(3 * u + rng.uniform(0, 6))
    tone = rng.uniform(0.62, 0.85)
    return _Surface(
        _cover(frame, inside * 0.82),
        crease,
        0.0,
        shadow_height=0.02,
        cavity=(0.82 * ink).astype(np.float32),
        paint=(tone, tone, tone * rng.uniform(0.82, 1.0)),
        painted=np.ones_like(u),
    )


_CLUTTER = (
    (_swarf, 10.0, 40.0),
    (_chip, 2.0, 7.0),
    (_cable, 22.0, 64.0),
    (_sheet, 8.0, 26.0),
    (_pin, 12.0, 36.0),
    (_label, 22.0, 48.0),
)


# ---------------------------------------------------------------------------------------- belt, camera


def _wave(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """cos(rows[:, None] + columns[None, :]), with one cosine and one sine for each row and each column."""
    return np.outer(np.cos(rows), np.cos(columns)) - np.outer(np.sin(rows), np.sin(columns))


_BELTS = (
    (0.13, 0.14, 0.14),
    (0.20, 0.21, 0.22),
    (0.15, 0.20, 0.175),
    (0.15, 0.18, 0.22),
    (0.27, 0.28, 0.28),
    (0.36, 0.36, 0.34),
    (0.44, 0.41, 0.35),
    (0.24, 0.22, 0.20),
)


def _belt(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """The empty belt under uneven light; float32 [height, width, 3], 0 to 1."""
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    slant = rng.uniform(-0.08, 0.08)
    period = rng.uniform(5.0, 14.0)
    strength = rng.uniform(0.05, 0.22)
    turn = 2 * math.pi / period
    kind = int(rng.integers(5))
    if kind == 0:
        pattern = _wave(rows * turn, rows[:1] * 0 + columns * turn * slant)
        pattern = pattern * _wave(-rows * turn * slant, columns * turn)
    elif kind == 1:
        pattern = np.abs(_wave(rows * turn * 0.6, columns * turn * 0.4))
        pattern += np.abs(_wave(-rows * turn * 0.6, columns * turn * 0.4)) - 1.2
    elif kind == 2:
        pattern = _wave(rows * turn, columns * turn * slant)
    elif kind == 3:
        pattern = np.zeros((height, width), np.float32)
    else:
        pattern = np.minimum(_wave(rows * turn * 0.18, columns * 0.0) + 0.93, 0.0) * 5.0
        pattern += np.minimum(_wave(rows * 0.0, columns * turn * 0.12) + 0.96, 0.0) * 5.0
    tone = 1.0 + strength * pattern
    tone += rng.standard_normal((height, width), np.float32) * rng.uniform(0.02, 0.08)
    tone += 0.10 * _noise(rng, height, width, 60.0) + 0.06 * _noise(rng, height, width, 12.0)
    tone *= _stains(rng, height, width)
    if rng.random() < 0.3:
        seam = rng.uniform(0.1, 0.9) * width + slant * rows
        distance = np.abs(columns[None, :] - seam[:, None])
        tone *= 1.0 - 0.55 * np.exp(-np.square(distance / rng.uniform(1.2, 3.0)))
    if rng.random() < 0.25:
        edge = int(rng.uniform(0.03, 0.12) * height)
        rail = slice(0, edge) if rng.random() < 0.5 else slice(height - edge, height)
        tone[rail] = tone[rail] * 0.2 + rng.uniform(0.4, 2.2) + 0.15 * np.cos(rows[:edge, None] * 0.5)
    tone = _scratched(rng, tone.astype(np.float32))
    colour = np.asarray(_BELTS[int(rng.integers(len(_BELTS)))], np.float32) * rng.uniform(0.75, 1.25)
    centre_y, centre_x = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width
    falloff = ((rows[:, None] - centre_y) / height) ** 2 + ((columns[None, :] - centre_x) / width) ** 2
    tone *= 1.12 - rng.uniform(0.2, 0.75) * falloff
    return np.clip(tone[..., None] * colour, 0.0, 1.0).astype(np.float32)


def _stains(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    tone = np.ones((height, width), np.float32)
    if rng.random() < 0.45:
        blobs = _noise(rng, height, width, rng.uniform(60, 140)) + 0.25 * _noise(rng, height, width, 18.0)
        oil = _smoothstep(0.6, 0.6 + rng.uniform(0.15, 0.5), blobs)
        tone -= rng.uniform(0.15, 0.45) * oil
        tone += rng.uniform(0.0, 0.5) * np.clip(0.25 - np.abs(oil - 0.5), 0, 1) * oil
    if rng.random() < 0.5:
        dust = _smoothstep(0.5, 1.1, _noise(rng, height, width, 25.0))
        tone += rng.uniform(0.05, 0.25) * dust
    return tone


def _scratched(rng: np.random.Generator, tone: np.ndarray) -> np.ndarray:
    height, width = tone.shape
    scratches = np.zeros_like(tone)
    for _ in range(int(rng.poisson(7))):
        x, y, length = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(10, 160)
        angle = rng.normal(0.0, 0.25)
        ends = np.round(
            np.asarray([[x, y], [x + length * math.cos(angle), y + length * math.sin(angle)]]) * 16
        ).astype(np.int32)
        depth = float(rng.uniform(-0.25, 0.3))
        cv2.polylines(scratches, [ends], False, depth, 1, cv2.LINE_8, shift=4)
    return tone * (1.0 + cv2.GaussianBlur(scratches, (0, 0), 0.7))


def _photograph(scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The camera's picture of the scene, with blur, exposure, colour cast, noise and JPEG; uint8 RGB."""
    height, width = scene.shape[:2]
    image: np.ndarray = scene
    travel = int(rng.choice((1, 2, 3, 5, 7), p=(0.4, 0.2, 0.2, 0.13, 0.07)))
    if travel > 1:
        image = cv2.blur(image, (travel, 1))
    image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.35, 1.1)), np.float32)
    columns, rows = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    corner = (rows * rows)[:, None] + (columns * columns)[None, :]
    lean = rng.uniform(-0.18, 0.18, 2)
    gain = rng.uniform(0.75, 1.45) * (1.0 - rng.uniform(0.05, 0.2) * corner)
    gain *= 1.0 + lean[0] * rows[:, None] + lean[1] * columns[None, :]
    cast = (1.0 + rng.normal(0.0, 0.03, 3)).astype(np.float32)
    image *= gain.astype(np.float32)[..., None] * cast
    if rng.random() < 0.3:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        image += (grey - image) * np.float32(rng.uniform(0.7, 1.0))
    over = np.maximum(image - np.float32(0.75), 0.0)
    image -= over * over / (over + np.float32(0.2))
    image = cv2.pow(np.maximum(image, 0.0, out=image), 1.0 / rng.uniform(1.25, 1.7))
    grain = rng.standard_normal((height, width), np.float32) * rng.uniform(0.004, 0.022)
    tint = rng.standard_normal((height // 3, width // 3, 3), np.float32) * rng.uniform(0.002, 0.012)
    image += cv2.resize(tint, (width, height)) + grain[..., None]
    pixels = np.clip(image * np.float32(255.0) + np.float32(0.5), 0, 255).astype(np.uint8)
    quality = int(rng.integers(55, 97))
    encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.ascontiguousarray(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))[..., ::-1])


# ---------------------------------------------------------------------------------------- COCO folders


def write_coco(folder: str | os.PathLike[str], count: int) -> Path:
    """Renders the first ``count`` scenes of :data:`TEST_SEEDS` into a COCO folder; returns its path.

    The folder gets ``images/<seed, 6 digits>.jpg`` and ``instances.json`` (image id = seed, category ids
    1-based, bbox ``[x, y, width, height]`` in pixels). It appears whole or not at all. The JPEG files
    differ from :func:`render_scene`'s pixels by one more compression. Raises InputError if the folder
    exists and is not empty, or if ``count`` is not positive.
    """
    target = Path(folder)
    if count < 1:
        raise InputError(f"{target}: {count} scenes asked for: give a count of at least 1")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists and is not empty: name a new folder or delete this one first")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (partial / "images").mkdir()
        seeds = range(TEST_SEEDS.start, TEST_SEEDS.start + count)
        document = _coco_document(((seed, render_scene(seed)) for seed in seeds), partial / "images")
        (partial / "instances.json").write_text(json.dumps(document, separators=(",", ":")) + "\n")
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _coco_document(scenes: Iterable[tuple[int, Scene]], images: Path) -> dict[str, Any]:
    """Writes each scene's picture into ``images``; returns the content of instances.json."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for seed, scene in scenes:
        name = f"{seed:06d}.jpg"
        cv2.imwrite(
            str(images / name),
            np.ascontiguousarray(scene.image[..., ::-1]),
            [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY],
        )
        height, width = scene.image.shape[:2]
        entries.append({"id": seed, "file_name": name, "height": height, "width": width})
        for number, (ymin, xmin, ymax, xmax) in enumerate(scene.boxes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": seed,
                    "category_id": int(scene.class_ids[number]),
                    "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
                    "area": (xmax - xmin) * (ymax - ymin),
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": "part"} for number, name in enumerate(PARTS_CLASSES, 1)
    ]
    info = {"description": "odtrt: rendered parts on a belt", "version": "1"}
    return {"info": info, "images": entries, "annotations": annotations, "categories": categories}
