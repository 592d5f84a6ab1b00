"""The whole path, image in and detections out, against the OD API's own, and what a user can do wrong."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from odtrt_lib import detector as detector_room
from odtrt_lib import preprocess as preprocess_room
from odtrt_lib.bundle.archive import WORKSTATION
from odtrt_lib.detector import Detections, Detector, host_backend
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.evaluate import agreement, coco_results, load_detections
from odtrt_lib.export import odapi
from odtrt_lib.folder import seal
from odtrt_lib.spec import load_spec

PATIENCE = 300  # seconds until another thread counts as stuck; a busy machine needs many of them


@pytest.fixture(scope="module")
def tiny(tiny_converted) -> Path:
    """The tiny model's folder after stages 1 and 2. Do not write into it; copy it."""
    return tiny_converted


def pictures(count: int) -> list[np.ndarray]:
    """Smooth random pictures of different sizes: uint8 [height, width, 3]."""
    from PIL import Image

    rng = np.random.default_rng(5)
    sizes = [(int(w), int(h)) for w, h in rng.integers(90, 260, (count, 2))]
    coarse = rng.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [
        np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC))
        for c, size in zip(coarse, sizes, strict=True)
    ]


def odapi_results(pipeline: Path, checkpoint: Path, images: dict[int, np.ndarray]) -> list[dict]:
    """What the OD API finds, from pixels to boxes, in COCO's results form."""
    model = odapi.load_model(pipeline, checkpoint)
    return [row for image_id, image in images.items() for row in odapi.detect(model, image, image_id)]


def own_results(detector: Detector, images: dict[int, np.ndarray]) -> list[dict]:
    found = detector.detect_batch(list(images.values()))
    return [r for image_id, d in zip(images, found, strict=True) for r in coco_results(image_id, d)]


def assert_agrees(detector: Detector, reference: list[dict], candidate: list[dict]) -> None:
    compared = compare(detector, reference, candidate)
    assert compared.agrees, compared
    assert compared.references > 20
    assert compared.at_threshold <= 0.01 * compared.references


def compare(detector: Detector, reference: list[dict], candidate: list[dict]):
    return agreement(reference, candidate, max_detections=detector.spec.nms.max_total_detections)


def test_detections_are_the_odapis(tiny_model, tiny):
    images = dict(enumerate(pictures(6)))
    reference = odapi_results(tiny_model / "pipeline.config", tiny_model / "checkpoint" / "ckpt-0", images)
    detector = Detector.open(tiny)
    assert_agrees(detector, reference, own_results(detector, images))


def test_what_a_detection_holds(tiny):
    image = pictures(1)[0]
    found = Detector.open(tiny).detect(image)
    assert len(found.scores) > 3
    assert found.boxes.dtype == np.float32 and found.boxes.shape == (len(found.scores), 4)
    assert found.scores.dtype == np.float32 and np.all(np.diff(found.scores) <= 0)
    assert found.class_ids.dtype == np.int64 and set(found.class_ids) <= {1, 2, 3}
    assert list(found.names) == [("bolt", "nut", "gear")[i - 1] for i in found.class_ids]
    height, width = image.shape[:2]
    assert np.all(found.boxes >= 0) and np.all(found.boxes <= [height, width, height, width])


def assert_same(one: Detections, other: Detections, tolerance: float) -> None:
    assert one.names == other.names
    np.testing.assert_array_equal(one.class_ids, other.class_ids)
    np.testing.assert_allclose(one.scores, other.scores, atol=tolerance)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=300 * tolerance)


def test_a_batch_is_its_images(tiny, tiny_with_any_batch):
    images = pictures(5)
    alone = [Detector.open(tiny).detect(image) for image in images]
    for folder, tolerance in ((tiny, 0.0), (tiny_with_any_batch, 1e-5)):
        together = Detector.open(folder).detect_batch(images)
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other, tolerance)
    assert Detector.open(tiny).detect_batch([]) == []
    assert Detector.open(tiny_with_any_batch).detect_batch([]) == []


@pytest.mark.parametrize("batch, expected", [(2, [2, 2, 2]), (None, [5]), (8, [8])])
def test_the_network_sees_the_batch_it_was_made_for(tiny, batch, expected):
    single = Detector.open(tiny)
    sizes = []

    def infer(images: np.ndarray):
        sizes.append(len(images))
        heads = [single.backend.infer(images[i : i + 1]) for i in range(len(images))]
        return np.concatenate([h[0] for h in heads]), np.concatenate([h[1] for h in heads])

    network = dataclasses.replace(single.spec.input, batch=batch)
    spec = dataclasses.replace(single.spec, input=network)
    batched = Detector(spec, single.anchors, host_backend("recorder", infer, spec, single.anchors))
    images = pictures(5)
    for one, other in zip(batched.detect_batch(images), single.detect_batch(images), strict=True):
        assert_same(one, other, 0.0)
    assert sizes == expected


def open_error(folder: Path, kind: type = InputError, **options) -> str:
    with pytest.raises(kind) as caught:
        Detector.open(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_backend_is_named_with_the_choice(tiny):
    assert open_error(tiny, backend="tensorrtt").startswith("backend 'tensorrtt' is unknown")
    assert "onnxruntime" in open_error(tiny, backend="tensorrtt")


def test_onnxruntime_absent(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in open_error(tiny, MissingDependencyError)


@pytest.mark.parametrize(
    "name, command", [("spec.json", "export"), ("anchors.npy", "export"), ("heads.onnx", "convert")]
)
def test_a_missing_file_names_the_command_that_writes_it(tiny, tmp_path, name, command):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / name).unlink()
    message = open_error(folder)
    assert str(folder / name) in message and f"odtrt {command}" in message


@pytest.mark.parametrize("name", ["anchors.npy", "heads.onnx"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_file_is_named(tiny, tmp_path, name, content):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / name).write_bytes(content)
    assert f"{folder / name}: damaged or changed" in open_error(folder)
    seal(folder)
    assert str(folder / name) in open_error(folder)


@pytest.mark.parametrize("command", ["detect", "eval"])
def test_one_flipped_bit_ends_the_commands_in_one_line(tiny, tmp_path, capsys, command):
    from PIL import Image

    from odtrt_lib.app import cli

    folder = shutil.copytree(tiny, tmp_path / "copy")
    content = bytearray((folder / "heads.onnx").read_bytes())
    content[len(content) // 2] ^= 64
    (folder / "heads.onnx").write_bytes(content)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    images = [{"id": 1, "file_name": "a.png", "height": 30, "width": 40}]
    coco = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "bolt"}]}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    given = [tmp_path / "a.png"] if command == "detect" else ["--annotations", tmp_path / "a.json"]
    with pytest.raises(SystemExit) as caught:
        cli.main([command, str(folder), *map(str, given)])
    said = capsys.readouterr().err
    assert caught.value.code == 1 and said.count("\n") == 1
    assert f"{folder / 'heads.onnx'}: damaged or changed" in said and "run `odtrt convert` again" in said


def test_a_truncated_network_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    path = folder / "heads.onnx"
    path.write_bytes(path.read_bytes()[:5000])
    assert str(path) in open_error(folder)


def test_a_folder_whose_name_is_not_utf8_opens(tiny, tmp_path):
    image = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
    folder = shutil.copytree(tiny, tmp_path / os.fsdecode(b"mod\xe8le"))
    expected, found = (Detector.open(one, "onnxruntime").detect(image) for one in (tiny, folder))
    np.testing.assert_array_equal(found.boxes, expected.boxes)


def with_spec(tiny: Path, tmp_path: Path, part: str, **changes) -> Path:
    folder = shutil.copytree(tiny, tmp_path / "copy")
    document = json.loads((folder / "spec.json").read_text())
    document[part].update(changes)
    (folder / "spec.json").write_text(json.dumps(document))
    seal(folder)
    return folder


@pytest.mark.parametrize(
    "part, changes, found, expected",
    [
        ("input", {"width": 160}, "[1, 3, 96, 128]", "[1, 3, 96, 160]"),
        ("input", {"batch": 4}, "[1, 3, 96, 128]", "[4, 3, 96, 128]"),
        ("input", {"batch": None}, "[1, 3, 96, 128]", "[any, 3, 96, 128]"),
        ("input", {"name": "pixels"}, "inputs image", "expected pixels"),
        ("heads", {"class_logits": "scores"}, "class_logits", "expected box_encodings, scores"),
        ("heads", {"background_column": False}, "class_logits is tensor(float)", "3]"),
        ("heads", {"num_anchors": 5}, "anchors.npy: float32", "float32 [5, 4]"),
    ],
)
def test_a_network_that_does_not_fit_the_spec(tiny, tmp_path, part, changes, found, expected):
    message = open_error(with_spec(tiny, tmp_path, part, **changes))
    assert found in message and expected in message and "spec.json" in message


# --- in the background


def background_detector(tiny: Path, infer) -> Detector:
    """The tiny model, its network run by ``infer(images, run)``; ``run`` is ONNX Runtime's."""
    detector = Detector.open(tiny)
    run = detector.backend.infer
    wrapped = host_backend("wrapped", lambda images: infer(images, run), detector.spec, detector.anchors)
    return dataclasses.replace(detector, backend=wrapped)


def test_what_is_submitted_comes_back_in_order(tiny):
    images = pictures(6)
    threads = []

    def infer(images: np.ndarray, run):
        threads.append(threading.current_thread().name)
        return run(images)

    alone = Detector.open(tiny).detect_batch(images)
    with background_detector(tiny, infer) as detector:
        futures = [detector.submit(image) for image in images]
        batch = detector.submit_batch(images[:2])
        for future, expected in zip(futures, alone, strict=True):
            assert_same(future.result(), expected, 0.0)
        for one, expected in zip(batch.result(), alone, strict=False):
            assert_same(one, expected, 0.0)
    assert len(set(threads)) == 1 and threads[0].startswith("odtrt-detect")


def test_an_error_arrives_in_the_result_and_the_next_call_goes_on(tiny):
    image = pictures(1)[0]
    with Detector.open(tiny) as detector:
        wrong, right = detector.submit(image.astype(np.float32)), detector.submit(image)
        with pytest.raises(InputError):
            wrong.result()
        assert_same(right.result(), detector.detect(image), 0.0)


def test_submit_waits_while_too_many_are_unfinished(tiny):
    """The camera's thread stops at the first frame too many, and goes on when the network is free again."""
    go_on, submitted, all_in = threading.Event(), [], threading.Event()
    image = pictures(1)[0]

    def infer(images: np.ndarray, run):
        assert go_on.wait(PATIENCE)
        return run(images)

    detector = background_detector(tiny, infer)
    for _ in range(detector_room.MOST_WAITING):
        submitted.append(detector.submit(image))
    assert not detector._serving.free_places.acquire(blocking=False)

    def camera() -> None:
        submitted.append(detector.submit(image))
        all_in.set()

    thread = threading.Thread(target=camera)
    thread.start()
    assert not all_in.is_set()
    go_on.set()
    assert all_in.wait(PATIENCE)
    thread.join()
    assert len({tuple(future.result().scores) for future in submitted}) == 1
    later = [detector.submit(image) for _ in range(2 * detector_room.MOST_WAITING)]
    assert all(future.result() for future in later), "places come back"
    detector.close()


def test_a_callback_submits_while_other_threads_fill_every_place(tiny):
    """The place that a result frees goes to a thread that waits, before the callback asks for it."""
    image, in_callback, heads = pictures(1)[0], [], []
    enough = threading.Event()

    def infer(images: np.ndarray, run):
        if not heads:
            heads.append(run(images))
        return heads[0]

    def submit_again(done) -> None:
        if len(in_callback) < 60:
            in_callback.append(detector.submit(image))
            in_callback[-1].add_done_callback(submit_again)
        else:
            enough.set()

    def camera() -> None:
        while not enough.is_set():
            detector.submit(image)

    detector = background_detector(tiny, infer)
    cameras = [threading.Thread(target=camera, daemon=True) for _ in range(2)]
    for thread in cameras:
        thread.start()
    detector.submit(image).add_done_callback(submit_again)
    assert enough.wait(PATIENCE), f"stopped after {len(in_callback)} calls"
    for thread in cameras:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    detector.close()
    assert all(future.done() for future in in_callback)


def test_what_callbacks_submit_is_bounded_and_they_cannot_close(tiny):
    image, most, raised = pictures(1)[0], detector_room.MOST_WAITING, []
    registered, all_in, places = threading.Event(), threading.Event(), []

    def infer(images: np.ndarray, run):
        assert registered.wait(PATIENCE), "else the callback runs at once, in this thread"
        return run(images)

    def flood(done) -> None:
        with pytest.raises(InputError, match=r"cannot wait for them in a callback") as caught:
            for _ in range(3 * most):
                places.append(detector.submit(image))
        raised.append(caught.value)
        with pytest.raises(InputError, match=r"close\(\) was called in a callback"):
            detector.close()
        all_in.set()

    detector = background_detector(tiny, infer)
    detector.submit(image).add_done_callback(flood)
    registered.set()
    assert all_in.wait(PATIENCE)
    assert len(places) == 2 * most and "\n" not in str(raised[0])
    assert all(len(future.result().scores) > 3 for future in places), "close() in the callback did nothing"
    later = [detector.submit(image) for _ in range(2 * most)]
    detector.close()
    assert all(future.done() for future in later), "every place came back"


AFTER_A_FORK = """
import os, signal, sys
from pathlib import Path
import numpy as np
from odtrt_lib.detector import Detector
from odtrt_lib.errors import InputError

folder, work = sys.argv[1:]
image = np.zeros((60, 80, 3), np.uint8)
detector = Detector.open(folder)
found = detector.submit(image).result()
threads = [task / "stat" for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
while any(thread.read_text().rpartition(") ")[2][0] != "S" for thread in threads):
    pass  # ONNX Runtime's spin for a while before they sleep
child = os.fork()
if child == 0:
    signal.alarm(300)
    for use in (detector.detect, detector.submit):
        try:
            future = use(image)
            future.result()
            sys.exit("no error")
        except InputError as error:
            assert str(os.getppid()) in str(error) and "fork" in str(error) and "\\n" not in str(error)
    if work == "close":
        detector.close()
    if work == "open again":
        with Detector.open(folder) as own:
            assert own.detect(image).scores.tobytes() == found.scores.tobytes()
    sys.exit(7)
status = os.waitpid(child, 0)[1]
assert detector.detect(image).scores.tobytes() == found.scores.tobytes()
detector.close()
sys.exit(0 if status == 7 << 8 else f"the child ended with {status}")
"""


@pytest.mark.parametrize("work", ["nothing", "close", "open again"])
def test_after_a_fork_the_child_is_told_and_ends(tiny, work):
    """It used to hang at its end, as ONNX Runtime waits for threads that a fork leaves behind."""
    command = [sys.executable, "-c", AFTER_A_FORK, tiny, work]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_finishes_what_was_submitted_and_closes_the_backend(tiny):
    closed = []
    image = pictures(1)[0]
    detector = Detector.open(tiny)
    detector.backend = dataclasses.replace(detector.backend, close=lambda: closed.append(True))
    futures = [detector.submit(image) for _ in range(3)]
    detector.close()
    detector.close()
    assert closed == [True]
    for future in futures:
        assert len(future.result().scores) > 3
    for use in (detector.detect, detector.submit):
        with pytest.raises(InputError, match="closed"):
            use(image)
    assert detector.status.backend == "closed"


def test_a_backend_gets_the_pictures_themselves(tiny):
    single = Detector.open(tiny)
    images = pictures(3)
    seen = []

    def run(given):
        seen.extend(given)
        return single.backend.run(given)

    backend = dataclasses.replace(single.backend, run=run)
    for one, other in zip(
        dataclasses.replace(single, backend=backend).detect_batch(images),
        single.detect_batch(images),
        strict=True,
    ):
        assert_same(one, other, 0.0)
    assert [id(image) for image in seen] == [id(image) for image in images]


def test_what_serves_is_named(tiny):
    status = Detector.open(tiny).status
    assert (status.backend, status.plan, status.rebuild, status.reasons) == ("onnxruntime", None, "none", ())
    assert status.description.startswith("ONNX Runtime ")


# --- the checkpoints of strangers


@pytest.mark.corpus
def test_a_trained_coco_detector_finds_what_the_odapi_found(corpus, corpus_folder, photographs):
    detector = Detector.open(corpus_folder("coco_ssd_mnv1"))
    reference = load_detections(corpus / "coco_ssd_mnv1" / "ref_detections_odapi.json")
    candidate = own_results(detector, photographs())
    compared = compare(detector, reference, candidate)
    assert (compared.images, compared.references) == (128, 12800)
    assert_agrees(detector, reference, candidate)


def half_pixel_preprocess(image, input_spec, out):
    """What one gets from OpenCV or Pillow: the same network input, sampled at pixel centres."""
    import cv2

    shape = (input_spec.width, input_spec.height)
    resized = cv2.resize(image.astype(np.float32), shape, interpolation=cv2.INTER_LINEAR)
    out[:] = (resized * input_spec.scale + input_spec.offset).transpose(2, 0, 1)
    return out, preprocess_room.preprocess(image, input_spec)[1]


@pytest.mark.corpus
@pytest.mark.parametrize("defect", ["half-pixel resizing", "BGR", "one more class", "multiplied scales"])
def test_a_wrong_stage_is_caught(corpus, corpus_folder, photographs, monkeypatch, defect):
    detector = Detector.open(corpus_folder("coco_ssd_mnv1"))
    images = photographs(4)
    everything = load_detections(corpus / "coco_ssd_mnv1" / "ref_detections_odapi.json")
    reference = [r for r in everything if r["image_id"] in images]
    spec = detector.spec
    if defect == "half-pixel resizing":
        monkeypatch.setattr(detector_room, "preprocess", half_pixel_preprocess)
    elif defect == "BGR":
        images = {i: np.ascontiguousarray(image[:, :, ::-1]) for i, image in images.items()}
    elif defect == "one more class":
        spec = dataclasses.replace(
            spec, labels=tuple(dataclasses.replace(label, id=label.id + 1) for label in spec.labels)
        )
    else:
        coder = dataclasses.replace(spec.heads.box_coder, y_scale=0.1, x_scale=0.1)
        spec = dataclasses.replace(spec, heads=dataclasses.replace(spec.heads, box_coder=coder))
    backend = host_backend("wrong", detector.backend.infer, spec, detector.anchors)
    wrong = dataclasses.replace(detector, spec=spec, backend=backend)
    compared = compare(wrong, reference, own_results(wrong, images))
    assert not compared.agrees
    assert len(compared.missing) > 20, compared


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["zoo_ssd_mobilenet_v2_fpnlite_320", "ft_fpnlite320_tfjs1"])
def test_a_checkpoint_from_elsewhere_finds_what_the_odapi_finds(
    corpus_folder, corpus_answers, photographs, name
):
    detector = Detector.open(corpus_folder(name))
    assert detector.spec.nms.change_coordinate_frame, "else the OD API's boxes are not of the image"
    reference = json.loads((corpus_answers(name) / "detections.json").read_text())
    assert_agrees(detector, reference, own_results(detector, photographs(8)))


@pytest.mark.corpus
def test_efficientdet_finds_what_the_odapi_finds_but_for_rounded_means(
    corpus_folder, corpus_answers, photographs, tmp_path
):
    """Squeeze-and-excitation averages 65,536 pixels in float32, many of them equal where an image is padded.

    TensorFlow's sum loses four digits there, and this checkpoint's synthetic weights magnify that: boxes
    a pixel thin move. With the means computed accurately on both sides everything agrees; as they are,
    TensorFlow differs from itself about as much as from us.
    """
    images, answers = photographs(8), corpus_answers("zoo_efficientdet_d0")
    odapi_own, odapi_exact = (
        json.loads((answers / name).read_text())
        for name in ("detections.json", "detections_with_exact_means.json")
    )
    detector = Detector.open(corpus_folder("zoo_efficientdet_d0"))
    own = own_results(detector, images)
    exact = Detector.open(with_means_in_two_steps(corpus_folder("zoo_efficientdet_d0"), tmp_path / "exact"))
    assert_agrees(exact, odapi_exact, own_results(exact, images))
    most = detector.spec.nms.max_total_detections
    as_it_is = agreement(odapi_own, own, max_detections=most)
    of_itself = agreement(odapi_own, odapi_exact, max_detections=most)
    assert of_itself.matched < of_itself.references
    assert len(as_it_is.missing) <= 2 * len(of_itself.missing)
    assert agreement(odapi_own, own, iou=0.5, max_detections=most).agrees


def with_means_in_two_steps(folder: Path, copy: Path) -> Path:
    import onnx

    from odtrt_lib.convert.rewrite import means_in_two_steps

    shutil.copytree(folder, copy)
    onnx.save(means_in_two_steps(onnx.load(copy / "heads.onnx")), copy / "heads.onnx")
    seal(copy)
    return copy


# --- the rooms that run on a Jetson


def device_side() -> list[Path]:
    """What a bundle carries of odtrt_lib: all that needs neither TensorFlow nor OpenCV."""
    package = ROOT / "odtrt_lib"
    found = [path.relative_to(package) for path in sorted(package.rglob("*.py"))]
    return [path for path in found if path.parts[0] not in WORKSTATION]


@pytest.mark.parametrize("module", device_side(), ids=str)
def test_a_module_of_the_device_side_is_python_38(module):
    path = ROOT / "odtrt_lib" / module
    ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 8))


def test_newer_syntax_is_caught():
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass\n", feature_version=(3, 8))


def import_the_device_side() -> str:
    """Those that need numpy alone: all but the command line's, made with typer and rich."""
    modules = [path.with_suffix("").as_posix().replace("/", ".") for path in device_side()]
    command_line = ("app.cli", "app.terminal")
    names = [name for name in modules if not name.endswith("__main__") and name not in command_line]
    return "import " + ", ".join(f"odtrt_lib.{name.removesuffix('.__init__')}" for name in names)


def test_the_device_side_loads_nothing_heavy():
    heavy = ["tensorflow", "tf_keras", "onnx", "onnxruntime", "cv2", "PIL", "pycocotools", "tensorrt"]
    heavy += ["tensorrt_rtx"]
    script = f"{import_the_device_side()}; import sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.fixture(scope="session")
def python38(pytestconfig) -> Path:
    """A Python 3.8 that has numpy and nothing else; made once, kept in pytest's cache folder."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which("python3.8"), *sorted(versions.glob("3.8.*/bin/python3.8"))]
    environment = pytestconfig.cache.mkdir("python38")
    python = environment / "bin" / "python"
    for interpreter in filter(None, found):
        make = [[interpreter, "-m", "venv", environment], [python, "-m", "pip", "install", "-q", "numpy"]]
        if has_numpy(python) or (
            all(subprocess.run(step, capture_output=True).returncode == 0 for step in make)
            and has_numpy(python)
        ):
            return python
    pytest.skip(
        "no python3.8 here" if not any(found) else "python3.8 is not usable, or numpy not installable"
    )


def has_numpy(python: Path) -> bool:
    check = "import sys, numpy; assert sys.version_info[:2] == (3, 8)"
    return python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0


DETECT_ON_38 = """
import dataclasses, pathlib, sys
import numpy as np
{imports}
from odtrt_lib.detector import Detector, host_backend
from odtrt_lib.spec import load_spec

spec_path, arrays_path, found_path = sys.argv[1:]
arrays = np.load(arrays_path)
seen = []

def infer(images):
    seen.append(images)
    return arrays["box_encodings"], arrays["class_logits"]

spec, anchors = load_spec(spec_path), arrays["anchors"]
detector = Detector(spec, anchors, host_backend("recorded", infer, spec, anchors))
found = detector.detect(arrays["image"])
np.savez(found_path, input=seen[0], names=found.names,
         boxes=found.boxes, scores=found.scores, class_ids=found.class_ids)
absent = ("tensorflow", "onnx", "onnxruntime", "cv2", "PIL", "pycocotools")
assert not any(name in sys.modules for name in absent)
"""


def test_python_38_with_numpy_alone_detects_the_same(python38, tiny, tmp_path):
    detector = Detector.open(tiny)
    image = pictures(1)[0]
    recorded = []

    def infer(images: np.ndarray):
        recorded.extend([images, *detector.backend.infer(images)])
        return recorded[1], recorded[2]

    recorder = host_backend("recorder", infer, detector.spec, detector.anchors)
    expected = dataclasses.replace(detector, backend=recorder).detect(image)
    np.savez(
        tmp_path / "in.npz",
        image=image,
        anchors=detector.anchors,
        box_encodings=recorded[1],
        class_logits=recorded[2],
    )
    script = DETECT_ON_38.format(imports=import_the_device_side())
    paths = [tiny / "spec.json", tmp_path / "in.npz", tmp_path / "out.npz"]
    run = subprocess.run([python38, "-c", script, *paths], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = np.load(tmp_path / "out.npz")
    spec = load_spec(tiny / "spec.json")
    assert len(expected.scores) > 3
    np.testing.assert_allclose(found["input"], recorded[0], atol=255e-4 * max(map(abs, spec.input.scale)))
    np.testing.assert_array_equal(found["class_ids"], expected.class_ids)
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-6)
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=1e-3)
    assert tuple(found["names"]) == expected.names
