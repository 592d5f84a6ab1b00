"""The scripts that measure on a GPU, without one: what counts as failed, what is stopped, what is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import gpu_times
import nms_cases
import numpy as np
import pytest

from odtrt_lib import engine
from odtrt_lib.engine import fallback
from odtrt_lib.engine.passport import Machine
from odtrt_lib.errors import BuildError
from odtrt_lib.evaluate import coco_results
from odtrt_lib.latency.timing import Timing
from odtrt_lib.spec import NmsSpec, Resizer

ROOT = Path(__file__).resolve().parent.parent
# Two calls as ncu printed them on an H200, without the columns that are not read and most stalls. The
# kernels have the names of today.
SAMPLE = ROOT / "tests" / "ncu_sample.csv"


@pytest.fixture
def backends_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import backends_gpu

    return backends_gpu


@pytest.fixture
def ncu_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import nms_ncu_gpu

    return nms_ncu_gpu


def is_gone(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        ({"arithmetic": "FP32", "detect_p50_us": 1.0}, False),  # ONNX Runtime's own row
        ({"arithmetic": "FP32", "agrees": True, "batch_agrees": True, "submit_agrees": True}, False),
        ({"arithmetic": "FP32", "agrees": False, "batch_agrees": True, "submit_agrees": True}, True),
        ({"arithmetic": "FP32", "agrees": True, "batch_agrees": False, "submit_agrees": True}, True),
        ({"arithmetic": "TF32", "agrees": False}, False),
        ({"arithmetic": "FP16", "agrees": False}, False),
        ({"arithmetic": "FP16", "error": "no memory"}, True),
    ],
)
def test_errors_and_another_answer_in_fp32_are_failures(backends_gpu, row, fails):
    assert backends_gpu.has_failed(row) is fails


def test_a_row_that_takes_too_long_is_stopped_with_all_that_it_started(backends_gpu, monkeypatch, tmp_path):
    """The limit begins when the row's process has said its word, so that a slow start does not matter."""
    monkeypatch.setattr(backends_gpu, "MAX_SECONDS", 0.1)
    pipe = tmp_path / "held"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code = (
        "import subprocess, sys\n"
        "held = open(sys.argv[1], 'w')\n"
        "child = subprocess.Popen(['tail', '-f', '/dev/null'], stdout=held)\n"
        "print('{\"a\": 1}', flush=True); held.write('x'); held.close(); child.wait()"
    )
    communicate = subprocess.Popen.communicate

    def when_it_has_printed(process, *arguments, timeout=None):
        if timeout is not None:
            assert select.select([reader], [], [], 300)[0] and os.read(reader, 1) == b"x"
        return communicate(process, *arguments, timeout=timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", when_it_has_printed)
    row = backends_gpu.in_a_process(["-c", code, str(pipe)], "TF32", tmp_path)
    assert row == {"a": 1, "error": "stopped after 0.1 s"}
    ended, _, _ = select.select([reader], [], [], 300)  # readable at its end: nobody holds the pipe any more
    assert ended and os.read(reader, 1) == b""


def test_ctrl_c_ends_the_row_too(backends_gpu, monkeypatch, tmp_path):
    started = []

    def interrupted(process, *_, **__):
        started.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backends_gpu.in_a_process(["-c", "import signal; signal.pause()"], "TF32", tmp_path)
    assert is_gone(*started)


def test_pictures_are_asked_for_unless_only_the_start_is_timed(backends_gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["backends_gpu.py", "folder", "--start", "FP16"])
    assert backends_gpu.parse().images is None
    monkeypatch.setattr(sys, "argv", ["backends_gpu.py", "folder"])
    with pytest.raises(SystemExit):
        backends_gpu.parse()
    assert "--images DIR is required" in capsys.readouterr().err


def test_each_plan_has_the_day_of_its_own_measurement(backends_gpu, monkeypatch, tmp_path):
    import engine_gpu

    old = {"model": "old", "arithmetic": "FP32", "date": "2026-01-02", "passed": True}
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "engine.example.json"
    path.write_text(json.dumps({"rows": [old]}))
    (tmp_path / "fp32" / "new").mkdir(parents=True)
    monkeypatch.setattr(engine_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(engine_gpu, "this_machine", lambda: Machine("Linux", "x86_64", gpu="NVIDIA Example"))
    monkeypatch.setattr(engine_gpu, "in_a_process", lambda *_: {"passed": True})
    assert engine_gpu.main([str(tmp_path), "new"]) == 0
    first, *others = json.loads(path.read_text())["rows"]
    assert first == old
    assert [row["arithmetic"] for row in others] == ["FP32", "TF32", "FP16"]
    assert all(0 <= (date.today() - date.fromisoformat(row["date"])).days <= 1 for row in others)


def test_the_second_call_is_read_from_what_ncu_prints(ncu_gpu):
    first, second = ncu_gpu.rows_of(SAMPLE.read_text(), [(49104, 0.05, 8)])
    assert (first["kernel"], first["blocks"]) == ("select_candidates", 660)
    assert (first["threads"], first["us"], first["dram_gb_per_second"]) == (256, 8.8, 399.56)
    assert second["kernel"] == "suppress_in_cluster" and second["objects"] == 8 and second["registers"] == 128


def test_other_calls_than_ours_are_refused(ncu_gpu):
    printed = SAMPLE.read_text()
    with pytest.raises(ValueError, match="watched 4 kernels, expected 28"):
        ncu_gpu.rows_of(printed)
    with pytest.raises(ValueError, match="not the order"):
        ncu_gpu.rows_of(printed.replace("select_candidates<", "other<"), [(49104, 0.05, 8)])


def test_the_version_of_ncu_is_read(ncu_gpu):
    said = "NVIDIA (R) Nsight Compute\nCopyright (c) 2018-2025\nVersion 2025.1.1.0 (build 1)\n"
    assert ncu_gpu.version_in(said) == "2025.1.1.0"
    assert ncu_gpu.version_in("?") == "unknown"


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """Imports a script as on an H200 whose results are in ``tmp_path``; returns the script."""

    def imported(name):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        script = __import__(name)
        monkeypatch.setattr(script, "ROOT", tmp_path)
        (tmp_path / "results").mkdir(exist_ok=True)
        monkeypatch.setattr(script, "this_machine", lambda: Machine("Linux", "x86_64", gpu="NVIDIA Example"))
        return script

    return imported


# ---- tensorrt_gpu ---------------------------------------------------------------------------------------


@pytest.fixture
def tensorrt_gpu(on_a_gpu, monkeypatch, tmp_path):
    script = on_a_gpu("tensorrt_gpu")
    here = SimpleNamespace(runtime_library="tensorrt", version="8.5.2.2")
    monkeypatch.setattr(script.portability, "this_environment", lambda: here)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").touch()
    return script


def results(folder, name):
    return json.loads((folder / "results" / f"{name}.example.json").read_text())["rows"]


def says(monkeypatch, script, *parts, ending="pass"):
    """Each row's process prints ``parts`` and then does ``ending``."""
    code = f"import json\nfor part in {list(parts)!r}: print(json.dumps(part), flush=True)\n{ending}"
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(
        script, "start_row", lambda *_: subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    )


def test_models_and_arithmetics_are_measured_in_the_order_of_their_names(tensorrt_gpu, tmp_path):
    three = [("two", "FP32"), ("two", "TF32"), ("two", "FP16")]
    assert tensorrt_gpu.wanted(tmp_path, ["two", "one:FP16"]) == [*three, ("one", "FP16")]
    for wrong in ("three", "one:INT8"):
        with pytest.raises(SystemExit, match=wrong):
            tensorrt_gpu.wanted(tmp_path, [wrong])


def test_a_row_that_died_keeps_its_figures_and_says_so(tensorrt_gpu, monkeypatch, tmp_path):
    split = ({"form": "split", "plan_mb": 1.5}, {"form": "split", "passed": True})
    says(monkeypatch, tensorrt_gpu, *split, {"form": "fused", "plan_mb": 2.5}, ending="raise SystemExit(9)")
    assert tensorrt_gpu.run("run", tmp_path, Path("plugin"), ["one:FP16"]) == 1
    first, second = results(tmp_path, "tensorrt85")
    assert (first["form"], first["plan_mb"], first["passed"]) == ("split", 1.5, True) and "error" not in first
    assert (second["form"], second["plan_mb"], second["passed"]) == ("fused", 2.5, False)
    assert second["error"].startswith("exit status 9")


def test_another_visit_replaces_a_row_only_when_it_has_a_whole_one(tensorrt_gpu, monkeypatch, tmp_path):
    whole = {"form": "split", "plan_mb": 1.5, "passed": True}
    says(monkeypatch, tensorrt_gpu, whole, {**whole, "form": "fused"})
    assert tensorrt_gpu.run("run", tmp_path, Path("plugin"), ["one:FP16", "two:FP32"]) == 0
    before = results(tmp_path, "tensorrt85")
    assert [(row["model"], row["form"]) for row in before] == [
        (model, form) for model in ("one", "two") for form in ("split", "fused")
    ]
    says(monkeypatch, tensorrt_gpu, {"form": "split", "plan_mb": 9.0})
    assert tensorrt_gpu.run("run", tmp_path, Path("plugin"), ["one:FP16"]) == 1
    assert results(tmp_path, "tensorrt85") == before
    says(monkeypatch, tensorrt_gpu, {**whole, "plan_mb": 9.0})
    tensorrt_gpu.run("run", tmp_path, Path("plugin"), ["one:FP16"])
    after = results(tmp_path, "tensorrt85")
    assert after[:-1] == before[1:] and after[-1] == {**before[0], "plan_mb": 9.0}


# ---- nms_peers_gpu --------------------------------------------------------------------------------------


def test_a_peer_that_failed_leaves_the_earlier_figures(on_a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(IOutputAllocator=object))
    monkeypatch.delitem(sys.modules, "nms_peers_gpu", raising=False)
    peers = on_a_gpu("nms_peers_gpu")
    monkeypatch.delitem(sys.modules, "nms_peers_gpu")
    key = {"source": "drawn", "heads": "8 objects", "anchors": 1917, "score_threshold": 0.3}
    ours, theirs = ({**key, "implementation": name, "p50_us": 8.0} for name in ("ours", "theirs"))
    failed, faster = {**key, "implementation": "ours", "error": "no"}, {**ours, "p50_us": 7.0}
    assert peers.with_row([ours, theirs], failed) == [ours, theirs]
    assert peers.with_row([ours, theirs], faster) == [theirs, faster]
    assert peers.with_row([failed], faster) == [faster] and peers.with_row([theirs], failed) == [
        theirs,
        failed,
    ]
    assert {name for group in peers.GROUPS for name in group} | {peers.FIVE_KERNELS} == set(
        peers.IMPLEMENTATIONS
    )


# ---- peers_gpu ------------------------------------------------------------------------------------------


@pytest.fixture
def peers_gpu(on_a_gpu, monkeypatch, tmp_path):
    """With a model "one" of 320 x 320 that keeps the aspect ratio and "two" that does not."""
    script = on_a_gpu("peers_gpu")
    spec = nms_cases.detector_spec(4, 2, NmsSpec(0.05, 0.5, 100, 100, False, True))
    resizers = {"one": Resizer("keep_aspect_ratio", 320, 320, True), "two": Resizer("fixed_shape")}
    for name, resizer in resizers.items():
        backbone = "ssd_efficientnet-b0_bifpn_keras" if name == "one" else "ssd_mobilenet_v2_fpn_keras"
        own = dataclasses.replace(
            spec,
            input=dataclasses.replace(spec.input, height=320, width=320, resizer=resizer),
            source=dataclasses.replace(spec.source, feature_extractor=backbone),
        )
        (tmp_path / name / "odtrt").mkdir(parents=True)
        (tmp_path / name / "odtrt" / "spec.json").write_text(own.to_json())
        (tmp_path / name / "nvidia.onnx").write_bytes(b"onnx")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv(engine.TF32_OVERRIDE, "")
    return script


class Builders:
    """As much of TensorRT 8.5 as a build asks for; remembers what was set."""

    __version__ = "8.5.2.2"
    ILogger = type("ILogger", (), {"Severity": SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)})
    IErrorRecorder = type("IErrorRecorder", (), {})
    NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    BuilderFlag = SimpleNamespace(FP16="fp16", STRICT_TYPES="strict types")
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self, batch, refusal=None):
        self.asked, self.batch, self.refusal = [], batch, refusal
        layer = {"LayerType": "Convolution", "Inputs": [{"Format/Datatype": "Half NHWC"}]}
        inspector = SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": [layer] * 3}))
        plan = SimpleNamespace(create_engine_inspector=lambda: inspector)
        self.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: plan)

    def init_libnvinfer_plugins(self, *_):
        self.asked.append("plugins")

    def OnnxParser(self, *_):
        error = SimpleNamespace(desc=lambda: self.refusal)
        return SimpleNamespace(parse=lambda data: self.refusal is None, get_error=lambda _: error)

    def Builder(self, _):
        cache = SimpleNamespace(serialize=lambda: b"timings")
        config = SimpleNamespace(
            set_memory_pool_limit=lambda pool, size: self.asked.append((pool, size)),
            set_flag=self.asked.append,
            create_timing_cache=lambda blob: self.asked.append(("cache", blob)) or cache,
            set_timing_cache=lambda *_: True,
            add_optimization_profile=lambda profile: None,
        )
        picture = SimpleNamespace(name="input", shape=(self.batch, 320, 320, 3))
        return SimpleNamespace(
            create_network=lambda _: SimpleNamespace(get_input=lambda _: picture),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda *shapes: self.asked.append(shapes)
            ),
            build_serialized_network=lambda *_: b"plan" * 500000,
        )


def test_the_sample_is_built_with_its_own_settings_first_cold_then_warm(peers_gpu, monkeypatch, tmp_path):
    shape = (1, 320, 320, 3)
    wanted = {
        "one": (-1, [("workspace", 8 << 30), "fp16", ("input", shape, shape, shape)]),
        "two:FP32": (1, [("workspace", 1 << 30), "strict types"]),
    }
    for model, (batch, settings) in wanted.items():
        builders = Builders(batch)
        monkeypatch.setitem(sys.modules, "tensorrt", builders)
        for _ in range(2):
            assert peers_gpu.main(["build", str(tmp_path), "plugin.so", model, "nvidia"]) == 0
        cold, warm = ([*settings, ("cache", blob)] for blob in (b"", b"timings"))
        assert builders.asked == ["plugins", *cold, "plugins", *warm]
    assert os.environ[engine.TF32_OVERRIDE] == "0"
    rows = results(tmp_path, "peers")
    assert [(row["model"], row["precision"], row["sample"]) for row in rows] == [
        ("one", "FP16", "efficientdet"),
        ("two", "FP32", "tensorflow_object_detection_api"),
    ]
    for row in rows:
        assert {"build_cold_seconds", "build_warm_seconds"} <= set(row)
        assert (row["plan_mb"], row["layers"], row["layers_fp16"]) == (2.0, 3, 3)


def test_a_refusal_is_kept_until_it_succeeds(peers_gpu, monkeypatch, tmp_path):
    call = ["build", str(tmp_path), "plugin.so", "one", "nvidia"]
    monkeypatch.setitem(sys.modules, "tensorrt", Builders(-1, "no importer\nfor it"))
    assert peers_gpu.main(call) == 1
    (row,) = results(tmp_path, "peers")
    assert row["error"] == "the parser refuses it: no importer for it" and "plan_mb" not in row
    monkeypatch.setitem(sys.modules, "tensorrt", Builders(-1))
    assert peers_gpu.main(call) == 0
    (row,) = results(tmp_path, "peers")
    assert "error" not in row and row["plan_mb"] == 2.0


def test_steps_of_the_road_are_rows_beside_the_detectors(peers_gpu, tmp_path):
    steps = [{"model": "one", "way": "nvidia", "step": step, "cpu_seconds": 9.0} for step in ("a", "b")]
    (tmp_path / "road.json").write_text(json.dumps(steps))
    peers_gpu.keep([{"kind": "detector", "model": "one", "way": "nvidia", "precision": "FP16", "layers": 3}])
    for _ in range(2):
        assert peers_gpu.main(["road", str(tmp_path)]) == 0
    assert [row["kind"] for row in results(tmp_path, "peers")] == ["detector", "road", "road"]


@pytest.mark.parametrize("words", [("three", "odtrt"), ("one:INT8", "odtrt"), ("one", "ours")])
def test_what_is_not_there_is_not_measured(peers_gpu, tmp_path, words):
    with pytest.raises(SystemExit, match=words[0] if words[1] == "odtrt" else words[1]):
        peers_gpu.main(["build", str(tmp_path), "plugin.so", *words])


@pytest.mark.parametrize("model, size, box", [
    ("one", (480, 640), (0.25, 0.25, 0.5, 1.0)),
    ("two", (480, 640), (1 / 3, 0.25, 2 / 3, 1.0)),
    ("one", (640, 320), (0.25, 0.0, 0.5, 0.5)),
])  # fmt: skip
def test_the_sample_prepares_a_picture_and_gives_boxes_in_its_pixels(
    peers_gpu, monkeypatch, tmp_path, model, size, box
):
    """A white rectangle is where the box of the plan says, in the network's input and in the picture."""
    height, width = size
    picture = np.zeros((height, width, 3), np.uint8)
    (ymin, ymax), (xmin, xmax) = (160, 320), (160, 640) if width == 640 else (0, 320)
    picture[ymin:ymax, xmin:xmax] = 255
    theirs = peers_gpu.Theirs.__new__(peers_gpu.Theirs)
    theirs.keeps_aspect, theirs.shape = model == "one", (1, 320, 320, 3)
    batch, _ = theirs.prepare(picture)
    white = np.argwhere((batch[0] > 200).all(axis=2))
    found = [*(white.min(axis=0) / 320), *((white.max(axis=0) + 1) / 320)]
    np.testing.assert_allclose(found, box, atol=1.5 / 320)
    outputs = {
        "num_detections": np.array([[1]], np.int32),
        "detection_boxes": np.array([[box, (0, 0, 1, 1)]], np.float32),
        "detection_scores": np.array([[0.75, 0.0]], np.float32),
        "detection_classes": np.array([[4, 0]], np.int32),
    }
    monkeypatch.setattr(theirs, "infer", lambda _: outputs)
    (one,) = theirs.detect(picture, 7)
    assert (one["image_id"], one["category_id"], one["score"]) == (7, 5, 0.75)
    np.testing.assert_allclose(one["bbox"], [xmin, ymin, xmax - xmin, ymax - ymin], atol=1e-3)


def test_agreement_tells_shifted_wrong_and_missing_boxes_apart(peers_gpu, tmp_path):
    def one(x, category, score=0.9, image=0):
        return {"image_id": image, "category_id": category, "bbox": [x, 0.0, 100.0, 100.0], "score": score}

    case = peers_gpu.case_of(str(tmp_path), "plugin.so", "one:FP16", "nvidia")
    references = [one(0, 1), one(200, 1), one(400, 2), one(600, 3, score=0.04), one(0, 1, image=1)]
    found = [one(0, 1), one(208, 1), one(400, 1), one(0, 1, image=1, score=0.8)]
    row = peers_gpu.compared(references, found, case)
    assert (row["pictures"], row["references"], row["matched"]) == (2, 4, 2)
    assert (row["missing"], row["extra"], row["agrees"]) == (2, 2, False)
    assert (row["found"], row["wrong_class"]) == (3, 1)
    assert row["shift_px"] == round(16 / 12, 4)  # x of two corners of one box, of three boxes
    assert row["max_score_difference"] == 0.1
    assert peers_gpu.compared(references, references, case)["agrees"]


def test_both_ways_have_the_same_figures(peers_gpu, monkeypatch, tmp_path):
    from odtrt_lib.detector import Detections, Detector
    from odtrt_lib.engine import pipeline

    pictures = np.zeros((2, 48, 64, 3), np.uint8)
    found = Detections(np.array([[0, 0, 20, 30]], np.float32), np.array([0.9], np.float32), np.array([2]), ())
    references = [one for i in (0, 1) for one in coco_results(i, found)]
    np.savez(
        tmp_path / "one" / "pictures.npz",
        pictures=pictures,
        detections=json.dumps(references),
        weights="trained",
        candidates=7,
    )

    def once(call, *_):
        call()
        return Timing(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1)

    def nothing(*_):
        return None

    stream = SimpleNamespace(synchronize=nothing)
    theirs = SimpleNamespace(
        prepare=lambda picture: (picture, (1.0, 1.0)),
        detect=lambda picture, i: coco_results(i, found),
        buffer=SimpleNamespace(write=nothing), input="", stream=stream, enqueue=nothing, infer=nothing,
    )  # fmt: skip
    plan = SimpleNamespace(
        run=nothing, enqueue_network=nothing, run_again=nothing, close=nothing, stream=stream
    )
    switches = []

    def opened(*_, **named):
        switches.append(named["switches"])
        return contextlib.nullcontext(SimpleNamespace(detect=lambda _: found))

    np.save(tmp_path / "one" / "odtrt" / "anchors.npy", np.full((4, 4), 0.5, np.float32))
    for name, value in {
        "graph_times": once, "time_calls": once, "free_device_mb": lambda: 5.0, "Theirs": lambda _: theirs,
        "passport_of": lambda _: SimpleNamespace(precision="fp16"),
    }.items():  # fmt: skip
        monkeypatch.setattr(peers_gpu, name, value)
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: plan)
    monkeypatch.setattr(Detector, "open", opened)
    for way in ("nvidia", "odtrt"):
        assert peers_gpu.main(["measure", str(tmp_path), "plugin.so", "one", way]) == 0
    sample, ours = results(tmp_path, "peers")
    for row in (sample, ours):
        assert row["agrees"] and row["found"] == row["references"] == 2 and row["shift_px"] == 0
        assert (row["weights"], row["candidates"]) == ("trained", 7)
        assert {"device_graph_p50_us", "eager_p50_us", "detect_p50_us", "load_seconds"} <= set(row)
    assert "infer_p50_us" in sample and "detect_best_p50_us" in ours
    assert switches == [None, pipeline.Switches("pinned", "gpu", "graph")]


# ---- version_matrix_gpu ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "loads", "agree", "safe"),
    [
        ("ok", True, True, True),
        ("ok", False, False, False),
        ("rebuild", False, True, True),
        ("refuse", True, False, True),  # a changed weight, which TensorRT does not notice
        ("apart", True, False, True),
        ("own", False, False, False),
        ("rebuild", None, True, True),  # the process died before it had an answer
    ],
)
def test_a_plan_is_never_called_ok_that_does_not_load(on_a_gpu, verdict, loads, agree, safe):
    row = {"kind": "plan", "verdict": verdict, **({} if loads is None else {"loads": loads})}
    found = on_a_gpu("version_matrix_gpu").judged(row)
    assert (found["agree"], found["safe"]) == (agree, safe)


def test_each_damage_changes_one_byte_or_the_length(on_a_gpu):
    matrix, data = on_a_gpu("version_matrix_gpu"), bytes(range(200))
    changed = {}
    for how in matrix.DAMAGE:
        found = matrix.damaged(data, how)
        changed[how] = [i for i in range(len(found)) if found[i] != data[i]] or len(found)
    assert list(changed.values()) == [100, [0], [50], [100], [150], [199]]


def test_the_matrix_asks_once_and_keeps_what_a_dead_process_left(on_a_gpu, monkeypatch, tmp_path):
    matrix = on_a_gpu("version_matrix_gpu")
    rows = [
        ({**dict(zip(matrix.KEY, ("plan", "8.5.2.2", "fp16", "split", "", into), strict=True))}, ["load"])
        for into in ("8.5.2.2", "8.5.3.1", "lean 10")
    ]
    monkeypatch.setattr(matrix, "plan_rows", lambda *_: rows)
    answers = {
        "8.5.2.2": {"verdict": "ok", "loads": True, "message": ""},
        "8.5.3.1": {"verdict": "rebuild", "message": "ended with status -11: it said nothing"},
        "lean 10": {"message": "ended with status 1: no module"},
    }
    asked = []

    def answer(own, *_):
        asked.append(own["python"])
        return answers[own["python"]]

    monkeypatch.setattr(matrix, "in_a_process", answer)
    environments = {name: {"python": name} for name in answers}
    assert matrix.load_everywhere(environments, tmp_path, tmp_path / "plugin.so") == 1
    found = {row["loaded_in"]: row for row in results(tmp_path, "version_matrix")}
    assert found["8.5.3.1"]["agree"] and not found["8.5.3.1"]["loads"]
    assert found["lean 10"]["error"] == "ended with status 1: no module"
    assert sorted(asked) == sorted(answers)
    answers["lean 10"] = {"verdict": "rebuild", "loads": False, "message": "another version"}
    assert matrix.load_everywhere(environments, tmp_path, tmp_path / "plugin.so") == 0
    assert asked[3:] == ["lean 10"]


def test_a_task_that_dies_tells_its_last_words(on_a_gpu, monkeypatch, tmp_path):
    matrix = on_a_gpu("version_matrix_gpu")
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho \'{"verdict": "ok"}\'; echo $WHO $2 >&2; kill -ABRT $$\n')
    program.chmod(0o755)
    found = matrix.in_a_process({"python": str(program), "WHO": "me"}, ["load"], 60)
    assert found == {"verdict": "ok", "message": "ended with status -6: me --do"}


# ---- fallback_gpu ---------------------------------------------------------------------------------------


@pytest.fixture
def fallback_gpu(on_a_gpu, monkeypatch, tmp_path):
    script = on_a_gpu("fallback_gpu")
    monkeypatch.setattr(script, "WORK", tmp_path / "work")
    monkeypatch.setattr(script, "MODELS", ("one",))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    (tmp_path / "one" / "plans").mkdir(parents=True)
    (tmp_path / "one" / "heads.onnx").touch()
    return script


def test_steps_of_a_build_that_failed_are_rows_too(fallback_gpu, monkeypatch, tmp_path):
    calls = []

    def build(folder, memory, force):
        assert sorted(path.name for path in Path(folder).iterdir()) == ["heads.onnx"] and force
        calls.append((memory, [step.name for step in fallback.FALLBACK]))
        for step in fallback.FALLBACK[:2]:
            ended = SimpleNamespace(
                outcome="out of memory: stopped" if memory else "built",
                seconds=1.0, peak_rss_mb=2000.0, peak_gpu_mb=None, samples=[],
            )  # fmt: skip
            fallback._described(step.name, {}, ended)
        if memory:
            raise BuildError("does not get by with the memory")

    whole = fallback.FALLBACK
    monkeypatch.setattr(engine, "build", build)
    first = fallback_gpu.rows_of(tmp_path / "one", ("one", "setting", "as asked"), [])
    assert [(row["step"], row["limit_mb"], row["built"]) for row in first] == [("as asked", None, True)]
    rows = fallback_gpu.rows_of(tmp_path / "one", ("one", "host", "60%"), first)
    assert [(row["number"], row["step"], row["limit_mb"], row["built"]) for row in rows] == [
        (1, "as asked", 1200, False),
        (2, "small workspace", 1200, False),
    ]
    assert calls == [(None, ["as asked"]), ("1200MiB", [step.name for step in whole])]
    assert whole == fallback.FALLBACK and not (tmp_path / "work" / "one").exists()


def test_what_is_there_is_not_built_again_and_nothing_begins_too_late(fallback_gpu, monkeypatch, tmp_path):
    made = []

    def rows_of(recorded, case, known):
        made.append(case)
        return [{**dict(zip(fallback_gpu.KEY, case, strict=True)), "number": 1, "outcome": "built"}]

    monkeypatch.setattr(fallback_gpu, "rows_of", rows_of)
    assert fallback_gpu.main([str(tmp_path), "--seconds", "-1"]) == 1 and made == []
    assert fallback_gpu.main([str(tmp_path)]) == 0
    assert made[:2] == [("one", "setting", "as asked"), ("one", "host", "90%")] and len(made) == 8
    assert fallback_gpu.main([str(tmp_path)]) == 0 and len(made) == 8
    assert len(results(tmp_path, "fallback")) == 8


# ---- gpu_times ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpu, name",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("Tesla T4", "tesla-t4"),
        (None, "none"),
    ],
)
def test_each_gpu_has_results_of_its_own(gpu, name):
    assert gpu_times.gpu_name(gpu) == name
