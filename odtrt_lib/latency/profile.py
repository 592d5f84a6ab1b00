"""Where the time of a frame goes, and what of it can be avoided.

:func:`breakdown` divides each moment of a frame among its steps: a step on the GPU comes first, then the
innermost step of the host, and what belongs to no step is ``unexplained``. So the parts add up to the frame.

A cost is avoidable if the frame is faster without it. :func:`profile` runs the alternative where it can and
times both in turns. Where it cannot, the cost is a bound, and every text says ``at most``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import statistics
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from odtrt_lib import native
from odtrt_lib.detector import Detector
from odtrt_lib.engine.pipeline import Switches
from odtrt_lib.errors import InputError, OdtrtError
from odtrt_lib.latency.calls import Change, watched
from odtrt_lib.latency.recorder import GPU, Call, Frame, Recorder, Span
from odtrt_lib.latency.timing import Histogram, Timing, wall_clock
from odtrt_lib.plots import draw_detections
from odtrt_lib.preprocess import network_size
from odtrt_lib.sources import Source
from odtrt_lib.spans import HOST_STEPS, STEPS, span
from odtrt_lib.spec import InputSpec

UNEXPLAINED = "unexplained"
WARM_UP, WATCHED_FRAMES = 5, 8
MIN_SHARE = 0.01
"""A cost below this share of the frame is not worth a sentence."""

_ROUNDS, _CALLS = 9, 3
_AGREEING_ROUNDS = 8  # of 9, if both were equally fast: 2 % of all cases
_ALTERNATIVES: Tuple[Tuple[str, str, str], ...] = (
    ("memory", "pinned", "CUDA copies pageable memory through a buffer of its own"),
    ("memory", "mapped", "pictures and detections are copied to and from the GPU"),
    ("preprocess", "gpu", "the CPU resizes and normalises the picture"),
    ("launch", "graph", "each kernel is launched by a call of its own"),
    ("postprocess", "gpu", "the CPU decodes the heads and suppresses boxes"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A step in all frames: its times in a frame, and its share of all of them, 0 to 1."""

    step: str
    timing: Timing
    share: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a frame spends without need.

    us: by how much a frame gets shorter, in microseconds. is_measured: whether that was measured; else it
    gets shorter by at most so much. what: the cost, as a clause. remedy: how to avoid it, as a clause.
    """

    us: float
    is_measured: bool
    what: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class CallRow:
    """The same call in a frame. count, us: how often, and how long all of them take, on average; call: one of
    them."""

    call: Call
    count: float
    us: float


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the network. us: its share of the engine's step, in microseconds."""

    name: str
    us: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What :func:`profile` found.

    frames: recorded ones. plain: the times of frames without the recorder. costs: avoidable ones, largest
    first. calls: of the :data:`WATCHED_FRAMES` frames after those. layers: of the engine, longest first;
    scaled, because a layer takes longer when it is timed. description: what ran.
    """

    frames: Tuple[Frame, ...]
    plain: Timing
    costs: Tuple[Cost, ...]
    calls: Tuple[Call, ...]
    layers: Tuple[Layer, ...]
    description: str = ""

    @property
    def frame(self) -> Timing:
        return _timing(one.us for one in self.frames)

    @property
    def jitter_us(self) -> float:
        """The mean difference between the times of two frames that follow each other."""
        times = [one.us for one in self.frames]
        steps = [abs(b - a) for a, b in zip(times, times[1:])]
        return sum(steps) / len(steps) if steps else 0.0


def breakdown(frame: Frame) -> Dict[str, float]:
    """Microseconds of each step, and of :data:`UNEXPLAINED`; their sum is the frame's time.

    Steps of other threads than the frame's are left out.
    """
    inside = [one for one in frame.spans if one.lane in (GPU, frame.lane)]
    edges = {frame.start_us, frame.end_us}
    edges |= {edge for one in inside for edge in (one.start_us, one.end_us)}
    times = sorted(edge for edge in edges if frame.start_us <= edge <= frame.end_us)
    parts: Dict[str, float] = {}
    for start, end in zip(times, times[1:]):
        running = [one for one in inside if one.start_us <= start and one.end_us >= end]
        name = max(running, key=_precedence).name if running else UNEXPLAINED
        parts[name] = parts.get(name, 0.0) + end - start
    return parts


def _precedence(one: Span) -> Tuple[bool, int, float]:
    return one.lane == GPU, one.depth, one.start_us


def table(frames: Sequence[Frame]) -> List[Row]:
    """A row for each step that occurs, in the order of a frame, and one for the unexplained rest."""
    parts = [breakdown(frame) for frame in frames]
    whole = sum(frame.us for frame in frames) or 1.0
    order = [*STEPS, *HOST_STEPS]
    names = sorted(
        {name for one in parts for name in one} - {UNEXPLAINED},
        key=lambda name: (order.index(name) if name in order else len(order), name),
    )
    rows = []
    for name in (*names, UNEXPLAINED):
        times = [one.get(name, 0.0) for one in parts]
        rows.append(Row(name, _timing(times), sum(times) / whole))
    return rows


def calls_of_a_frame(found: Profile) -> List[CallRow]:
    """Calls that copy, wait, allocate or change a picture: first those that odtrt does not make by design."""
    same: Dict[Tuple[str, ...], List[Call]] = {}
    for call in found.calls:
        same.setdefault((call.name, call.side, call.step, call.where), []).append(call)
    rows = [
        CallRow(calls[0], len(calls) / WATCHED_FRAMES, sum(call.us for call in calls) / WATCHED_FRAMES)
        for calls in same.values()
    ]
    return sorted(rows, key=lambda row: (row.call.is_own, -row.us))


def sentence(found: Profile) -> str:
    """Names the largest avoidable cost and what removes it, or says that there is none."""
    frame_us = found.frame.p50_us
    costs = [cost for cost in found.costs if cost.us >= MIN_SHARE * frame_us]
    if not costs:
        largest = max(table(found.frames), key=lambda row: row.share)
        return (
            f"No avoidable cost of {MIN_SHARE:.0%} of the frame was found: of {duration(frame_us)} a frame, "
            f"{largest.step} takes {largest.share:.0%}."
        )
    cost = costs[0]
    saved = f"{duration(cost.us)} of {duration(frame_us)} a frame can be avoided"
    return f"{'' if cost.is_measured else 'At most '}{saved}: {cost.what}; {cost.remedy}."


def duration(us: float) -> str:
    """A time in the unit that suits it, with three digits."""
    rounded = float(f"{us:.3g}")
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if abs(rounded) >= size:
            return f"{rounded / size:.3g} {unit}"
    return f"{rounded:.3g} µs"


def profile(
    detector: Detector,
    open_source: Callable[[], Source],
    *,
    frames: int = 200,
    draws: bool = True,
    reopen: Optional[Callable[[Switches], Detector]] = None,
    switches: Optional[Switches] = None,
) -> Profile:
    """Runs a detector on a source, and says where the time goes.

    open_source: is called at the beginning, and again whenever the source has ended; its ``read`` may be any
    program that makes pictures, and its calls are watched. draws: whether boxes are drawn. switches: those in
    force, if the detector runs a plan; ``reopen`` opens another one with others, to time it.

    Raises InputError if the source gives no picture, and what ``read`` and ``detect`` raise.
    """
    with contextlib.closing(_Endless(open_source)) as source, contextlib.closing(Recorder()) as recorder:
        once = functools.partial(_run_frame, source, detector, draws)
        plain, image = _record(once, recorder, frames)
        recorded = tuple(recorder.frames)
        with watched(recorder) as changes:
            for _ in range(WATCHED_FRAMES):
                with recorder.frame():
                    once()
        seen = recorder.frames[len(recorded) :]
    costs = [
        *_drawing(recorded),
        *_calls_in_vain(seen, changes.values()),
        *_changes_in_vain(detector, seen, changes.values()),
        *_large_pictures(detector, image),
        *_no_native_library(recorded),
        *(_other_switches(detector, image, switches, reopen) if switches and reopen else ()),
    ]
    costs.sort(key=lambda cost: -cost.us)
    calls = tuple(call for one in seen for call in one.calls)
    said = "; ".join([detector.status.description, *detector.status.reasons])
    return Profile(recorded, plain, tuple(costs), calls, _layers(detector, recorded), said)


def _run_frame(source: _Endless, detector: Detector, draws: bool) -> np.ndarray:
    with span("capture"):
        image = source.read()
    found = detector.detect(image)
    if draws:
        draw_detections(image, found)
    return image


def _record(once: Callable[[], np.ndarray], recorder: Recorder, frames: int) -> Tuple[Timing, np.ndarray]:
    """Records frames, and times as many without the recorder. Returns these times, and the last picture.

    They run in turns, so that a busy machine is equally busy for both. Who is first is drawn by lot, so that
    a source that repeats itself gives both the same pictures.
    """
    for _ in range(WARM_UP):
        once()
        with recorder.frame():
            image = once()
    recorder.frames.clear()
    plain, timed, lot = Histogram(), wall_clock(once), random.Random(0)
    for _ in range(frames):
        plain_is_first = lot.random() < 0.5
        if plain_is_first:
            plain.add(timed())
        with recorder.frame():
            image = once()
        if not plain_is_first:
            plain.add(timed())
    return plain.timing(), image


class _Endless:
    """A source that begins again at its end."""

    def __init__(self, open_source: Callable[[], Source]) -> None:
        self._open, self._source = open_source, open_source()

    def read(self) -> np.ndarray:
        image = self._source.read()
        if image is None:
            self._source.close()
            self._source = self._open()
            image = self._source.read()
        if image is None:
            raise InputError(f"{self._source.name}: has no picture; expected at least one")
        return image

    def close(self) -> None:
        self._source.close()


# ---- What can be avoided ----------------------------------------------------------------------------------


def saving(now: Callable[[], object], instead: Callable[[], object]) -> float:
    """By how many microseconds ``instead`` is faster than ``now``; 0 if that is not certain.

    Both run in turns, in rounds. The saving is the median over the rounds, if nearly all rounds agree.
    """
    slow, fast = wall_clock(now), wall_clock(instead)
    now(), instead()
    differences = []
    for _ in range(_ROUNDS):
        times = [(slow(), fast()) for _ in range(_CALLS)]
        differences.append(statistics.median(a for a, _ in times) - statistics.median(b for _, b in times))
    agree = sum(difference > 0 for difference in differences)
    return statistics.median(differences) if agree >= _AGREEING_ROUNDS else 0.0


def _drawing(frames: Sequence[Frame]) -> Iterator[Cost]:
    times = [breakdown(frame).get("draw", 0.0) for frame in frames]
    if any(times):
        yield Cost(
            statistics.median(times),
            True,
            "boxes are drawn into every frame",
            "draw only what somebody sees (--no-draw)",
        )


def _calls_in_vain(frames: Sequence[Frame], changes: Iterable[Change]) -> Iterator[Cost]:
    """Copies, waits and allocations outside of the steps that need them; changes of what is no array."""
    known = {(change.name, change.where) for change in changes}
    in_vain = {
        (call.name, call.kind, call.where, call.side)
        for frame in frames
        for call in frame.calls
        if not call.is_own and (call.name, call.where) not in known
    }
    for name, kind, where, side in sorted(in_vain):
        done, remedy = _IN_VAIN[kind]
        place = f" ({where})" if where else ""
        moved = f", {side}," if side else ""
        # Nothing else waits for what a copy in memory does: without it, its time is gone.
        is_measured = kind == "copy" and not name.startswith("cuda")
        yield Cost(_spent(frames, name, where, side), is_measured, f"{name}{moved} {done}{place}", remedy)


def _spent(frames: Sequence[Frame], name: str, where: str, side: str = "") -> float:
    """Microseconds of these calls in a frame: the median, or the mean if most frames have none."""
    times = [
        sum(call.us for call in frame.calls if (call.name, call.where, call.side) == (name, where, side))
        for frame in frames
    ]
    return statistics.median(times) or statistics.mean(times)


_IN_VAIN = {
    "copy": (
        "copies to or from the GPU, or OpenCV's UMat, outside of the detector",
        "leave the picture where it is, and give it to the detector as an array",
    ),
    "wait": (
        "waits for the GPU outside of the detector",
        "leave out the synchronisation: the detector waits once, at the end",
    ),
    "allocation": ("allocates memory in every frame", "allocate once, before the first frame"),
    "resize": ("resizes on the CPU what is no array", "give the detector the whole picture: it resizes"),
    "colour": ("copies the picture", "give the detector the picture as it is: it reads views"),
}


def _changes_in_vain(
    detector: Detector, frames: Sequence[Frame], changes: Iterable[Change]
) -> Iterator[Cost]:
    """Pictures that the program changes before the detector, which would do that itself."""
    for change in changes:
        saved = _spent(frames, change.name, change.where) - _longer_without(change, detector)
        size = f"{change.before.shape[1]}x{change.before.shape[0]}"
        done, remedy = _CHANGES[change.kind]
        if saved > 0:
            yield Cost(
                saved, True, f"{change.name} {done} {size} pictures on the CPU ({change.where})", remedy
            )


_CHANGES = {
    "resize": ("resizes", "give the detector the whole picture: it resizes while it normalises"),
    "colour": ("copies", "pass bgr[..., ::-1]: the detector reads it without a copy"),
}


def _longer_without(change: Change, detector: Detector) -> float:
    """By how many microseconds the detector is slower if the program leaves the picture as it is."""
    given = change.before[..., ::-1] if change.kind == "colour" else change.before
    return saving(lambda: detector.detect(given), lambda: detector.detect(change.after))


def _large_pictures(detector: Detector, image: np.ndarray) -> Iterator[Cost]:
    """What the detector takes longer for a picture than for one of the network's size."""
    smaller = _as_small_as_the_network(image, detector.spec.input)
    if smaller is not None:
        us = saving(lambda: detector.detect(image), lambda: detector.detect(smaller))
        sizes = [f"{one.shape[1]}x{one.shape[0]}" for one in (image, smaller)]
        if us > 0:
            yield Cost(
                us,
                True,
                f"the source gives {sizes[0]} pixels, and the network takes {sizes[1]}",
                "let the camera give smaller pictures (their pixels differ a little)",
            )


def _as_small_as_the_network(image: np.ndarray, network: InputSpec) -> Optional[np.ndarray]:
    height, width = network_size(network, *image.shape[:2])
    if height * width >= image.shape[0] * image.shape[1]:
        return None
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    return np.ascontiguousarray(image[rows][:, columns])


def _no_native_library(frames: Sequence[Frame]) -> Iterator[Cost]:
    if native.load() is None:
        parts = [breakdown(frame) for frame in frames]
        us = statistics.median(one.get("preprocess", 0.0) + one.get("postprocess", 0.0) for one in parts)
        yield Cost(
            us, False, "numpy does the pre- and post-processing", "build the native library: `make plugin`"
        )


def _other_switches(
    detector: Detector,
    image: np.ndarray,
    switches: Switches,
    reopen: Callable[[Switches], Detector],
) -> Iterator[Cost]:
    """What each switch alone would save, measured beside the detector as it is."""
    for name, value, what in _ALTERNATIVES:
        current = getattr(switches, name)
        if current == value or (value == "pinned" and current == "mapped"):
            continue
        try:
            other = reopen(dataclasses.replace(switches, **{name: value}))
        except OdtrtError:  # e.g. not enough memory for a second one
            continue
        with other:
            is_off = any(note.startswith(f"{name}:") for note in other.backend.notes())
            us = 0.0 if is_off else _faster(other, detector, image)
        if us > 0:
            yield Cost(us, True, what, f'set Switches({name}="{value}")')


def _faster(other: Detector, detector: Detector, image: np.ndarray) -> float:
    return saving(lambda: detector.detect(image), lambda: other.detect(image))


def _layers(detector: Detector, frames: Sequence[Frame]) -> Tuple[Layer, ...]:
    """The network's layers; their sum is the median of the engine's step."""
    times = detector.backend.layers()
    whole = sum(us for _, us in times)
    if not whole:
        return ()
    engine = statistics.median(breakdown(frame).get("engine", 0.0) for frame in frames)
    return tuple(Layer(name, us * engine / whole) for name, us in sorted(times, key=lambda one: -one[1]))


def _timing(times: Iterable[float]) -> Timing:
    histogram = Histogram()
    for us in times:
        histogram.add(us)
    return histogram.timing()
