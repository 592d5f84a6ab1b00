"""Where a frame's time goes: by a clock that is ours, on the stand-in for CUDA, and with OpenCV on the CPU.

Each cost that the profiler is for is planted once: it must be named, with the line that causes it. Without
one, nothing may be named.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import sys
import time
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import spec_cases
import test_runtime as stand_ins

from odtrt_lib import cuda, spans
from odtrt_lib.detector import Detector, host_backend
from odtrt_lib.engine.pipeline import Switches
from odtrt_lib.errors import InputError, OdtrtError
from odtrt_lib.latency import calls, profile, timeline
from odtrt_lib.latency.profile import breakdown, duration, sentence, table
from odtrt_lib.latency.recorder import GPU, Frame, Recorder, Span
from odtrt_lib.sources import Source
from odtrt_lib.spans import span
from odtrt_lib.spec import NmsSpec

host, kernels, folder, models = stand_ins.host, stand_ins.kernels, stand_ins.folder, stand_ins.models


class Clock:
    """Time passes only in :meth:`work`, in microseconds."""

    def __init__(self, monkeypatch) -> None:
        self.now = 50.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def work(self, us: float) -> None:
        self.now += 1e-6 * us


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def lasts(us: float, name: str = "engine", lane: str = "host", start: float = 0.0, depth: int = 0) -> Span:
    return Span(name, start, start + us, lane, depth)


# --- how a frame is divided


def test_steps_nest_and_the_rest_is_unexplained(clock):
    recorder = Recorder()
    with recorder.frame():
        clock.work(5)
        with span("capture"):
            clock.work(10)
            with span("decode"):
                clock.work(100)
            clock.work(20)
        clock.work(7)
        with span("engine"):
            clock.work(1000)
    (frame,) = recorder.frames
    parts = breakdown(frame)
    assert {name: round(us, 3) for name, us in parts.items()} == {
        "unexplained": 12,
        "capture": 30,
        "decode": 100,
        "engine": 1000,
    }
    assert sum(parts.values()) == pytest.approx(frame.us, abs=1e-6) and round(frame.us, 3) == 1142


def test_the_gpu_comes_before_the_host_and_other_threads_do_not_count():
    spans_of_frame = (
        lasts(50, "launch", start=10),
        lasts(60, "engine", GPU, start=40),
        lasts(60, "wait", start=60),
        lasts(500, "capture", "another thread", start=0),
    )
    frame = Frame(0, 200, spans_of_frame, (), "host")
    assert breakdown(frame) == {"unexplained": 90, "launch": 30, "engine": 60, "wait": 20}


def test_random_steps_add_up_to_the_frame():
    """Against a count of the nanoseconds, one by one."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        starts = rng.integers(-20, 200, 12)
        made = [
            Span(f"s{i}", float(a), float(a + rng.integers(0, 90)), GPU if i % 3 == 0 else "host", i)
            for i, a in enumerate(starts)
        ]
        expected: dict[str, float] = {}
        for moment in range(200):
            running = [one for one in made if one.start_us <= moment < one.end_us]
            best = max(running, key=lambda one: (one.lane == GPU, one.depth), default=None)
            name = best.name if best else "unexplained"
            expected[name] = expected.get(name, 0) + 1
        assert breakdown(Frame(0, 200, tuple(made), (), "host")) == expected


def test_the_table_has_numpys_percentiles_and_shares_of_one():
    rng = np.random.default_rng(5)
    times = rng.lognormal(6, 0.4, 1000)
    frames = [Frame(0, us + 10, (lasts(us),), (), "host") for us in times]
    engine, rest = table(frames)
    assert (engine.step, rest.step) == ("engine", "unexplained")
    for percent, found in ((50, engine.timing.p50_us), (99.9, engine.timing.p999_us)):
        exact = np.percentile(times, percent - 1e-9, method="inverted_cdf")
        assert found == pytest.approx(exact, rel=2e-3)
    assert engine.share + rest.share == pytest.approx(1)
    assert engine.share == pytest.approx(times.sum() / (times.sum() + 10_000))


def test_without_a_recorder_a_step_is_one_object_that_does_nothing():
    assert span("engine") is span("draw", object()) and spans.listener() is None


def test_a_frame_that_fails_is_not_kept_and_nobody_listens_afterwards(clock):
    recorder = Recorder()
    with pytest.raises(RuntimeError), recorder.frame(), span("engine"):
        raise RuntimeError
    assert recorder.frames == [] and spans.listener() is None
    with recorder.frame(), span("draw"):
        clock.work(1)
    assert [one.name for one in recorder.frames[0].spans] == ["draw"]


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0 µs"),
        (0.123, "0.123 µs"),
        (12.34, "12.3 µs"),
        (999.6, "1 ms"),
        (49_140, "49.1 ms"),
        (2e6, "2 s"),
    ],
)
def test_a_time_in_words(us, text):
    assert duration(us) == text


# --- a plan on the stand-in


@pytest.fixture
def plan(monkeypatch, host, kernels, folder):
    stand_ins.pretend_installed(monkeypatch, host, "tensorrt")
    stand_ins.install_plan(folder, "tensorrt")
    return functools.partial(Detector.open, folder)


GPU_STEPS = ["upload", "preprocess", "engine", "postprocess", "download"]


@pytest.mark.parametrize(
    ("switches", "steps"),
    [
        (Switches(), ["upload", "engine", "postprocess", "download"]),
        (Switches("pinned", "gpu", "eager"), GPU_STEPS),
        (Switches("pinned", "gpu", "graph"), GPU_STEPS),
        (Switches("pageable", "gpu", "graph", "cpu"), ["upload", "preprocess", "engine", "download"]),
    ],
    ids=str,
)
def test_each_step_has_its_time_on_the_gpu_and_no_bit_changes(plan, host, switches, steps):
    images = stand_ins.pictures(1) * 5
    with plan() as plain:
        expected = [plain.detect(image) for image in images]
    recorder = Recorder()
    with plan(switches=switches) as detector:
        found = []
        for image in images:
            with recorder.frame():
                found.append(detector.detect(image))
        assert stand_ins.differences(found, expected, 0) == []
        assert detector.backend.notes() == []
        # Without the recorder the same detector records a graph without events.
        host.calls.clear()
        assert stand_ins.differences([detector.detect(image) for image in images], expected, 0) == []
        assert not {name for name in host.calls if "Event" in name or "Pointer" in name}
        with recorder.frame():
            detector.detect(images[0])
    recording = recorder.frames.pop(1) if switches.launch == "graph" else recorder.frames[0]
    assert {one.name for one in recording.spans if one.lane == GPU} == set(steps)
    for frame in recorder.frames:
        on_gpu = [one for one in frame.spans if one.lane == GPU]
        assert [one.name for one in on_gpu] == steps
        assert all(one.end_us >= one.start_us >= frame.start_us for one in on_gpu)
        assert all(a.end_us <= b.start_us + 1 for a, b in itertools.pairwise(on_gpu))
        assert not [call for call in frame.calls if not call.is_own and call.kind != "allocation"]
    if switches.launch == "graph":
        assert "cudaGraphLaunch" in host.calls
    recorder.close()
    assert host.is_empty()


def endless(read):
    return lambda: Source("a program", read)


def test_a_planted_synchronisation_is_named(plan, host, clock, monkeypatch):
    stream = cuda.Stream()
    waits = host.cudaStreamSynchronize
    image = stand_ins.pictures(1)[0]

    def slow(handle):
        clock.work(400)
        return waits(handle)

    monkeypatch.setattr(type(host), "cudaStreamSynchronize", lambda self, handle: slow(handle))

    def read():
        stream.synchronize()  # planted
        return image

    with plan() as detector:
        found = profile.profile(detector, endless(read), frames=4, draws=False)
    assert "cudaStreamSynchronize waits for the GPU outside of the detector" in sentence(found)
    assert sentence(found).startswith("At most 400 µs of 800 µs")
    assert f"(test_profile.py:{line_of('# planted', read)})" in sentence(found)
    assert {call.step for call in found.calls if not call.is_own} == {"capture"}
    assert [(row.call.name, row.call.is_own, row.count) for row in profile.calls_of_a_frame(found)][:2] == [
        ("cudaStreamSynchronize", False, 1),
        ("cudaStreamSynchronize", True, 1),
    ]


def line_of(mark: str, function) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if mark in line)


def test_a_planted_copy_to_the_host_is_named_with_its_memory(plan, host, clock, monkeypatch):
    stream, memory = cuda.Stream(), cuda.Memory(64)
    image, to = stand_ins.pictures(1)[0], np.empty(64, np.uint8)
    copies = host.cudaMemcpyAsync

    def slow(self, target, source, size, kind, on):
        clock.work(300)
        return copies(target, source, size, kind, on)

    monkeypatch.setattr(type(host), "cudaMemcpyAsync", slow)

    def read():
        cuda.copy(to.ctypes.data, memory.address, 64, stream)
        return image

    with plan(switches=Switches("mapped", "gpu")) as detector:
        found = profile.profile(detector, endless(read), frames=4, draws=False)
    assert "cudaMemcpyAsync, device to pageable, copies to or from the GPU" in sentence(found)
    assert sentence(found).startswith("At most 300 µs of 300 µs") and "test_profile.py:" in sentence(found)


@pytest.mark.parametrize(
    ("slow_call", "start", "remedy"),
    [
        ("cudaMemcpyAsync", Switches(), 'Switches(memory="mapped")'),
        ("preprocess", Switches("pinned"), 'Switches(preprocess="gpu")'),
        ("execute", Switches("mapped", "gpu"), 'Switches(launch="graph")'),
        ("postprocess", Switches("mapped", "gpu", "graph", "cpu"), 'Switches(postprocess="gpu")'),
    ],
)
def test_the_switch_that_saves_most_is_named(plan, host, clock, monkeypatch, slow_call, start, remedy):
    """One thing costs time; every switch is tried, and the one that avoids it is named."""
    from odtrt_lib.engine import pipeline

    def costing(function):
        def slow(*arguments, **options):
            clock.work(500)
            return function(*arguments, **options)

        return slow

    if slow_call == "cudaMemcpyAsync":
        monkeypatch.setattr(type(host), slow_call, costing(type(host).cudaMemcpyAsync))
    elif slow_call == "execute":
        monkeypatch.setattr(pipeline.Network, "enqueue", costing(pipeline.Network.enqueue))
    else:
        monkeypatch.setattr(pipeline, slow_call, costing(getattr(pipeline, slow_call)))
    image = stand_ins.pictures(1)[0]

    def reopen(switches):
        return plan(switches=switches)

    with reopen(start) as detector:
        found = profile.profile(
            detector, endless(lambda: image), frames=3, draws=False, reopen=reopen, switches=start
        )
    assert remedy in sentence(found) and not sentence(found).startswith("At most")
    assert all(call.is_own for call in found.calls)
    sides = {row.call.side for row in profile.calls_of_a_frame(found) if row.call.kind == "copy"}
    host_side = start.memory
    copied = {f"{host_side} to device", f"device to {host_side}"}
    assert sides == (set() if start.memory == "mapped" else copied)


# --- a detector on the CPU, with OpenCV


SMALL = spec_cases.example(
    spec_cases.ssd(12, 3),
    NmsSpec(0.6, 0.4, 8, 20, class_agnostic=False, change_coordinate_frame=False),
    spec_cases.network_input(48, 48, spec_cases.STRETCHED, scale=1 / 127.5, offset=-1.0, batch=1),
    name="small",
    labels=spec_cases.named("bolt", "nut", "gear"),
)


@pytest.fixture(scope="module")
def detector():
    rng = np.random.default_rng(2)
    anchors = rng.uniform(0.2, 0.8, (12, 4)).astype(np.float32)
    heads = rng.normal(0, 2, (1, 12, 4)).astype(np.float32), rng.normal(0, 2, (1, 12, 3)).astype(np.float32)
    return Detector(SMALL, anchors, host_backend("none", lambda batch: heads, SMALL, anchors, "a constant"))


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def profiled(detector, read, **options):
    return profile.profile(detector, endless(read), frames=3, draws=False, **options)


def test_the_articles_umat_is_named(detector):
    cv2 = pytest.importorskip("cv2")
    large = cv2.UMat(picture(3000, 4000))

    def read():
        image = large.get()  # planted
        return image[:48, :48]

    found = profiled(detector, read)
    said = sentence(found)
    assert "cv2.UMat.get copies to or from the GPU, or OpenCV's UMat" in said and "At most" not in said
    assert f"(test_profile.py:{line_of('# planted', read)})" in said
    assert {call.name for call in found.calls} == {"cv2.UMat.get"}


def test_a_planted_resize_is_named_if_the_detector_is_faster_without(detector):
    cv2 = pytest.importorskip("cv2")
    large = picture(3000, 4000)

    def read():
        return cv2.resize(large, (48, 48), interpolation=cv2.INTER_AREA)  # planted

    found = profiled(detector, read)
    said = sentence(found)
    assert "cv2.resize resizes 4000x3000 pictures on the CPU" in said and "it resizes while" in said
    assert f"(test_profile.py:{line_of('# planted', read)})" in said


def test_a_planted_conversion_of_colours_is_named(detector):
    cv2 = pytest.importorskip("cv2")
    large = picture(2000, 3000)
    found = profiled(detector, lambda: cv2.cvtColor(large, cv2.COLOR_BGR2RGB))
    said = [cost for cost in found.costs if "cv2.cvtColor" in cost.what]
    assert len(said) == 1 and said[0].is_measured and "bgr[..., ::-1]" in said[0].remedy


def test_a_resize_that_saves_time_is_not_avoidable(detector, clock, monkeypatch):
    """The detector takes longer for the whole picture than the program for resizing it."""
    cv2 = pytest.importorskip("cv2")
    resizes, preprocesses = cv2.resize, profile.Detector.detect

    def resize(*arguments, **options):
        clock.work(10)
        return resizes(*arguments, **options)

    def detect(self, image):
        clock.work(image.size / 1000)
        return preprocesses(self, image)

    monkeypatch.setattr(cv2, "resize", resize)
    monkeypatch.setattr(profile.Detector, "detect", detect)
    large = picture(480, 640)
    found = profiled(detector, lambda: cv2.resize(large, (48, 48)))
    assert [call.name for call in found.calls] == ["cv2.resize"] * profile.WATCHED_FRAMES
    assert found.costs == () and sentence(found).startswith("No avoidable cost of 1% of the frame")


def test_a_program_without_planted_costs_has_none(detector, clock, monkeypatch):
    monkeypatch.setattr(profile, "_ALTERNATIVES", ())
    image = picture(48, 48)

    def read():
        clock.work(100)
        return image

    found = profiled(detector, read)
    assert found.calls == () and found.costs == () and found.jitter_us == pytest.approx(0, abs=1e-6)
    assert sentence(found) == (
        "No avoidable cost of 1% of the frame was found: of 100 µs a frame, capture takes 100%."
    )


def test_large_pictures_and_drawing_are_costs(detector, clock, monkeypatch):
    large, small = picture(480, 640), picture(48, 48)
    detects, draws = profile.Detector.detect, profile.draw_detections

    def detect(self, image):
        clock.work(200 if image.shape[0] > 48 else 50)
        return detects(self, image)

    def draw(*arguments):
        with span("draw"):
            clock.work(30)
        return draws(*arguments)

    monkeypatch.setattr(profile.Detector, "detect", detect)
    monkeypatch.setattr(profile, "draw_detections", draw)
    found = profile.profile(detector, endless(lambda: large), frames=3)
    assert [(round(cost.us, 3), cost.is_measured) for cost in found.costs] == [(150, True), (30, True)]
    assert sentence(found).startswith("150 µs of 230 µs a frame can be avoided: the source gives 640x480")
    found = profile.profile(detector, endless(lambda: small), frames=3)
    assert sentence(found).startswith("30 µs of 80 µs a frame can be avoided: boxes are drawn")


def test_numpy_in_place_of_the_native_library_is_a_bound(detector, clock, monkeypatch):
    monkeypatch.setattr(profile.native, "load", lambda: None)
    from odtrt_lib import detector as module

    def slow(*arguments):
        clock.work(70)
        return stand_ins.pipeline.postprocess(*arguments)

    monkeypatch.setattr(module, "postprocess", slow)
    found = profiled(detector, lambda: picture(48, 48))
    assert sentence(found).startswith("At most 70 µs of 70 µs") and "make plugin" in sentence(found)


def test_what_is_slower_in_most_rounds_only_is_no_saving(clock):
    """Two of nine rounds say the opposite: by chance that happens too often."""
    rounds = iter([20] * 7 * profile._CALLS + [-20] * 2 * profile._CALLS)
    assert profile.saving(lambda: clock.work(100), lambda: clock.work(100)) == 0
    assert profile.saving(lambda: clock.work(150), lambda: clock.work(100)) == pytest.approx(50)
    warm = [0]

    def unsteady():
        clock.work(100 + (next(rounds) if warm else 0))

    rounds = iter([0, *rounds])
    assert profile.saving(unsteady, lambda: clock.work(100)) == 0


def test_functions_of_cupy_and_torch_are_watched_and_put_back(monkeypatch, clock):
    def copy_to_host(array):
        clock.work(40)
        return np.zeros(3)

    cupy, torch = ModuleType("cupy"), ModuleType("torch")
    cupy.asnumpy = copy_to_host
    torch.Tensor = type("Tensor", (), {"cpu": lambda self: copy_to_host(self)})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    cpu, recorder = torch.Tensor.cpu, Recorder()
    with calls.watched(recorder):
        with recorder.frame(), span("capture"):
            cupy.asnumpy(None)
            torch.Tensor().cpu()
    assert [(one.name, one.kind, one.step, round(one.us)) for one in recorder.frames[0].calls] == [
        ("cupy.asnumpy", "copy", "capture", 40),
        ("torch.Tensor.cpu", "copy", "capture", 40),
    ]
    assert cupy.asnumpy is copy_to_host and torch.Tensor.cpu is cpu and sys.getprofile() is None


def test_a_source_without_a_picture_is_refused_and_one_that_ends_begins_again(detector):
    with pytest.raises(InputError, match="has no picture"):
        profiled(detector, lambda: None)
    opened = []

    def open_one():
        images = iter([picture(48, 48)])
        opened.append(1)
        return Source("one", lambda: next(images, None))

    assert len(profile.profile(detector, open_one, frames=2).frames) == 2 and len(opened) > 2


def test_layers_are_onnx_runtimes_and_add_up_to_the_engine(folder):
    with Detector.open(folder, "onnxruntime") as detector:
        found = profiled(detector, lambda: picture(48, 48))
    names = [layer.name for layer in found.layers]
    assert sum("(Conv)" in name for name in names) == 2 and sum("(Transpose)" in name for name in names) == 2
    engine = np.median([breakdown(frame)["engine"] for frame in found.frames])
    assert sum(layer.us for layer in found.layers) == pytest.approx(engine)


def test_layers_of_a_plan_are_tensorrts_and_a_context_of_its_own_tells_them(
    monkeypatch, host, kernels, folder
):
    trt = stand_ins.pretend_installed(monkeypatch, host, "tensorrt")
    stand_ins.install_plan(folder, "tensorrt")
    trt.IProfiler = type("IProfiler", (), {})
    trt.Context.profiler = None
    profiled_contexts, runs = set(), trt.Context.execute_async_v3

    def run(context, stream):
        if context.profiler is not None:
            profiled_contexts.add(context)
            for name, ms in (("conv", 0.3), ("reformat", 0.1)):
                context.profiler.report_layer_time(name, ms)
        return runs(context, stream)

    monkeypatch.setattr(trt.Context, "execute_async_v3", run)
    with Detector.open(folder) as detector:
        before = detector.detect(picture(40, 60))
        found = profiled(detector, lambda: picture(48, 48))
        assert stand_ins.differences([detector.detect(picture(40, 60))], [before], 0) == []
    assert len(profiled_contexts) == 1
    assert [layer.name for layer in found.layers] == ["conv", "reformat"]
    assert found.layers[0].us / found.layers[1].us == pytest.approx(3)
    engine = np.median([breakdown(frame)["engine"] for frame in found.frames])
    assert sum(layer.us for layer in found.layers) == pytest.approx(engine)


def test_a_stale_event_of_a_frame_that_failed_reaches_no_later_frame(plan, monkeypatch):
    """The frame ends between a step's two events, so that nobody waits for them."""
    from odtrt_lib.engine import pipeline

    recorder, image, enqueue = Recorder(), stand_ins.pictures(1)[0], pipeline.Network.enqueue

    def fail(network, stream):
        raise RuntimeError("planted")

    with plan(switches=Switches("pinned", "gpu")) as detector:
        monkeypatch.setattr(pipeline.Network, "enqueue", fail)
        with pytest.raises(OdtrtError, match="planted"), recorder.frame():
            detector.detect(image)
        monkeypatch.setattr(pipeline.Network, "enqueue", enqueue)
        with recorder.frame():
            detector.detect(image)
    assert [one.name for one in recorder.frames[0].spans if one.lane == GPU] == GPU_STEPS
    assert all(one.start_us >= recorder.frames[0].start_us for one in recorder.frames[0].spans)


# --- for people


@pytest.fixture
def found() -> profile.Profile:
    frames = []
    for number in range(20):
        start = 5000.0 * number
        made = (
            lasts(100, "capture", start=start),
            lasts(60, "decode", start=start + 20, depth=1),
            lasts(50, "launch", start=start + 120),
            lasts(900 + 10 * number, "engine", GPU, start=start + 140),
            lasts(3, "<odd & name>", start=start + 1150 + 10 * number),
        )
        frames.append(Frame(start, start + 1200 + 10 * number, made, (), "host"))
    cost = profile.Cost(90, False, "a <b> copy", "leave it")
    plain = profile._timing([1200.0])
    return profile.Profile(tuple(frames), plain, (cost,), (), (profile.Layer("conv <1>", 900),), "a plan")


def test_the_trace_nests_and_has_every_step(found):
    trace = json.loads(json.dumps(timeline.chrome_trace(found)))
    events = [one for one in trace["traceEvents"] if one["ph"] == "X"]
    names = {one["tid"]: one["args"]["name"] for one in trace["traceEvents"] if one["name"] == "thread_name"}
    assert set(names.values()) == {"host", GPU} and len(events) == 20 * 6
    assert min(one["ts"] for one in events) == 0
    for tid in names:
        own = sorted((one for one in events if one["tid"] == tid), key=lambda one: (one["ts"], -one["dur"]))
        open_ends: list[float] = []
        for one in own:
            while open_ends and open_ends[-1] <= one["ts"]:
                open_ends.pop()
            assert not open_ends or one["ts"] + one["dur"] <= open_ends[-1] + 1e-6, one
            open_ends.append(one["ts"] + one["dur"])
    assert trace["otherData"]["sentence"].startswith("At most 90 µs of 1.29 ms")


def test_the_picture_is_svg_with_a_text_and_both_colour_schemes(found):
    text = timeline.timeline_svg(found)
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img" and "engine 990 µs" in root.get("aria-label")
    assert "prefers-color-scheme:dark" in text
    bars = [one for one in root.iter("{http://www.w3.org/2000/svg}rect") if one.get("fill")]
    widths = [float(one.get("width")) for one in bars if one.get("fill") == timeline.COLOURS["engine"]]
    # The median frame's engine, the slowest one's, and the legend's square.
    assert widths[1] / widths[0] == pytest.approx(1090 / 990, rel=1e-3) and len(widths) == 3
    for one in bars:
        assert float(one.get("x")) + float(one.get("width")) <= timeline._WIDTH


def test_the_page_needs_no_other_file_and_hides_no_markup(found, tmp_path):
    path = timeline.write_page(tmp_path, "my <model>", "a <source>", found)
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "latency" / "profile.html"
    for escaped in (
        "my &lt;model&gt;",
        "a &lt;source&gt;",
        "conv &lt;1&gt;",
        "a &lt;b&gt; copy",
        "at most 90",
    ):
        assert escaped in page
    assert "<odd" not in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert sentence(found).replace("<b>", "&lt;b&gt;") in page


def test_the_command_prints_a_table_and_a_sentence(folder, odtrt_here, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for name in "ab":
        Image.fromarray(picture(60, 80)).save(tmp_path / "pictures" / f"{name}.png")
    status, out = odtrt_here(
        "profile", folder, tmp_path / "pictures", "--frames", 3, "--trace", tmp_path / "t"
    )
    assert status == 0, out
    for word in ("decode", "preprocess", "engine", "postprocess", "draw", "unexplained", "p99.9", "jitter"):
        assert word in out
    assert "can be avoided" in out or "No avoidable cost" in out
    assert (
        len([1 for one in json.loads((tmp_path / "t").read_text())["traceEvents"] if "frame" in one["name"]])
        == 3
    )
    assert (folder / "latency" / "profile.html").is_file()
    status, out = odtrt_here("profile", folder, "--switches", "mapped/gpu")
    assert status == 1 and "expected four of them" in out
    status, out = odtrt_here("profile", folder, "--trace", folder / "heads.onnx")
    assert status == 1 and "is read by this command" in out


@pytest.fixture
def odtrt_here(capsys):
    from odtrt_lib.app import cli

    def run(*arguments):
        status = 0
        try:
            cli.main([str(one) for one in arguments])
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        return status, said.out + said.err

    return run
