"""The belt as an endless camera, and a fault injector for any camera.

:func:`belt` shows pictures as a camera would, :class:`Camera` numbers and stamps the frames of any live
source, and injects what :class:`Faults` prescribes. What was injected stands in its ledger. The same seed
gives the same faults. Needs numpy only; pictures are decoded by Pillow.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np

from odtrt_lib import sources
from odtrt_lib.errors import InputError
from odtrt_lib.preprocess import load_image
from odtrt_lib.sources import Source

FPS = 30.0
MAX_PICTURES = 32

LATE_SECONDS, STALL_SECONDS, UNPLUGGED_SECONDS = 0.6, 3.0, 2.0
"""How late a late frame comes, how long a stalled camera is silent, and an unplugged one is away."""

KINDS = ("drop", "late", "corrupt", "resize", "disconnect", "stall")


@dataclasses.dataclass(frozen=True)
class Clock:
    """now: seconds that only grow. sleep: waits for some seconds. Tests replace both."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a camera delivers. number: its count of pictures, from 0. captured: seconds of the clock.

    image: uint8 [height, width, 3], RGB, unless the frame is corrupt.
    """

    number: int
    captured: float
    image: Any


@dataclasses.dataclass(frozen=True)
class Faults:
    """Which frames get a fault. one_in: kind -> one of so many frames, by chance. seed: of that chance.

    drop: the frame does not come. late: it comes LATE_SECONDS later. corrupt: it has another type, or is half
    a picture: half of the bytes, without a shape. resize: it is half as high and half as wide. disconnect:
    reading fails, and opening does for UNPLUGGED_SECONDS. stall: nothing comes for STALL_SECONDS.
    """

    one_in: Mapping[str, int]
    seed: int = 0

    def of(self, number: int) -> Optional[str]:
        """The fault of a frame; None if it has none. A frame has one fault at most."""
        chance = _chance(self.seed, number).random()
        for kind in KINDS:
            if kind in self.one_in:
                chance -= 1 / self.one_in[kind]
                if chance < 0:
                    return kind
        return None


STANDARD = {"drop": 100, "late": 400, "corrupt": 400, "resize": 400, "disconnect": 5000, "stall": 5000}


def parse_faults(text: str) -> Faults:
    """The faults of a text such as ``drop=100,stall=5000,seed=3``: one of 100 frames is dropped.

    ``standard`` means :data:`STANDARD`. The seed is 0 if it is not named. Raises InputError if a kind is not
    known, is named twice, or more than every second frame has a fault.
    """
    named: Dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)=(\d{1,9})\s*", part)
        if part.strip() == "standard" and not named.keys() & STANDARD.keys():
            named.update(STANDARD)
        elif match is not None and match.group(1) in (*KINDS, "seed") and match.group(1) not in named:
            named[match.group(1)] = int(match.group(2))
        else:
            raise InputError(
                f"--faults {text}: {part.strip()!r} is none; expected `standard`, or some of "
                f"{', '.join(f'{kind}={STANDARD[kind]}' for kind in KINDS)}, seed=0, each once"
            )
    seed = named.pop("seed", 0)
    one_in = named
    if not all(one_in.values()):
        raise InputError(f"--faults {text}: one of 0 frames is none; leave the kind out")
    if sum(1 / every for every in one_in.values()) > 0.5:
        raise InputError(f"--faults {text}: more than every second frame has a fault; use larger numbers")
    return Faults(one_in, seed)


def source_of(place: str) -> Callable[[Clock], Source]:
    """What opens a live source: a folder of pictures as a belt, ``rtsp://...``, or a camera as
    :func:`odtrt_lib.sources.open_camera` names it.

    It can be pickled. Raises InputError if the folder has no picture, or the place is a file.
    """
    if sources.is_stream(place):
        return functools.partial(_open_stream, place)
    path = Path(place)
    if path.is_dir():
        files = tuple(sources.pictures([path])[:MAX_PICTURES])
        _pictures(files)  # a picture that cannot be read is an error now, not in the worker
        return functools.partial(_open_belt, files)
    if path.is_file():
        raise InputError(f"{place}: a file; expected a folder of pictures, a camera such as 0, or rtsp://...")
    return functools.partial(_open_camera, place)


def belt(pictures: Sequence[np.ndarray], clock: Clock, fps: float = FPS) -> Source:
    """A camera that shows the pictures again and again, one each 1 / fps seconds.

    pictures: uint8 [height, width, 3], RGB. All frames have the size of the first one; others are cropped or
    get a black border. Nothing is stored for a reader that comes late: it gets the frame of that moment.
    """
    if not pictures:
        raise InputError("the belt has no picture; expected one at least")
    shown = itertools.cycle([_with_size(picture, pictures[0].shape) for picture in pictures])
    due = clock.now()

    def read() -> np.ndarray:
        nonlocal due
        wait = due - clock.now()
        if wait > 0:
            clock.sleep(wait)
        due = max(due, clock.now()) + 1 / fps
        return next(shown)

    return Source("belt", read, True)


class Camera:
    """A live source that can be opened again, whose frames have numbers and times, with faults if asked for.

    open_source: opens the source anew at each call; raises InputError while it is not there. ledger: how many
    faults of each kind were injected. next_number: of the next frame; numbers go on after a loss.
    """

    def __init__(
        self,
        open_source: Callable[[], Source],
        clock: Clock,
        faults: Optional[Faults] = None,
        next_number: int = 0,
        ledger: Optional[Mapping[str, int]] = None,
    ) -> None:
        self.ledger = {kind: (ledger or {}).get(kind, 0) for kind in KINDS}
        self.next_number = next_number
        self._open_source, self._clock, self._faults = open_source, clock, faults
        self._source: Optional[Source] = None
        self._back_at = 0.0

    @property
    def is_open(self) -> bool:
        return self._source is not None

    def open(self) -> None:
        """Opens the source. Raises InputError if it is not there."""
        if self._clock.now() < self._back_at:
            raise InputError("unplugged by the fault injector")
        self._source = self._open_source()

    def read(self) -> Frame:
        """Waits for the next frame. After an InputError the camera is closed and can be opened again."""
        try:
            while True:
                frame = self._read()
                if frame is not None:
                    return frame
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _read(self) -> Optional[Frame]:
        """The next frame, or None if it is dropped."""
        assert self._source is not None, "open the camera first"
        number = self.next_number
        fault = self._faults.of(number) if self._faults is not None else None
        if fault == "stall":
            self._clock.sleep(STALL_SECONDS)
        image = self._source.read()
        captured = self._clock.now()
        if image is None:
            raise InputError(f"{self._source.name}: it has come to its end")
        self.next_number = number + 1
        if fault is None:
            return Frame(number, captured, image)
        self.ledger[fault] += 1
        if fault == "disconnect":
            self._back_at = captured + UNPLUGGED_SECONDS
            raise InputError(f"{self._source.name}: unplugged by the fault injector")
        if fault == "late":
            self._clock.sleep(LATE_SECONDS)
        if fault == "corrupt":
            image = _corrupt(image, _chance(self._faults.seed if self._faults else 0, number, 1))
        if fault == "resize":
            image = np.ascontiguousarray(image[::2, ::2])
        return None if fault == "drop" else Frame(number, captured, image)


def is_picture(image: Any) -> bool:
    """Whether a frame's content can be a picture: uint8 [height, width, 3], and not empty."""
    return (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size > 0
    )


@functools.lru_cache(maxsize=1)
def _pictures(files: Tuple[Path, ...]) -> Tuple[np.ndarray, ...]:
    return tuple(map(load_image, files))


def _open_belt(files: Tuple[Path, ...], clock: Clock) -> Source:
    return belt(_pictures(files), clock)


def _open_stream(address: str, clock: Clock) -> Source:
    return sources.open_stream(address)


def _open_camera(camera: str, clock: Clock) -> Source:
    return sources.open_camera(camera)


def _chance(seed: int, *of: int) -> np.random.Generator:
    return np.random.default_rng((seed, *of))


def _corrupt(image: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    if chance.random() < 0.5:
        return image.astype(np.float32)
    content = np.ascontiguousarray(image).reshape(-1)
    return content[: len(content) // 2]


def _with_size(picture: np.ndarray, shape: Tuple[int, ...]) -> np.ndarray:
    if picture.shape == shape:
        return np.ascontiguousarray(picture)
    sized = np.zeros(shape, np.uint8)
    height, width = min(shape[0], picture.shape[0]), min(shape[1], picture.shape[1])
    sized[:height, :width] = picture[:height, :width]
    return sized
