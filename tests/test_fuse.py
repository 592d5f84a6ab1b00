"""fuse.py: the plugin's node as onnx reads it, and the form in ONNX operators as ONNX Runtime computes it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spec_cases
from spec_cases import STRETCHED, padded

from odtrt_lib import fuse, native, nms
from odtrt_lib.engine.half import half_precision
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.folder import read_log, seal
from odtrt_lib.spec import BoxCoder, DetectorSpec, NmsSpec, Resizer, ScoreSpec
from odtrt_lib.tensors import DETECTIONS, has_clip_windows
from odtrt_lib.variants import FORMS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_graphsurgeon")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

PADDED = padded(32)
NMS = NmsSpec(0.3, 0.6, 20, 30, False, True)
ATTRIBUTES = {
    "plugin_version": "1",
    "plugin_namespace": "odtrt",
    "background_column": 1,
    "score_converter": 1,
    "logit_factor": 0.5,
    "box_scales": [10.0, 10.0, 5.0, 5.0],
    "score_threshold": float(np.float32(0.3)),
    "iou_threshold": float(np.float32(0.6)),
    "max_detections_per_class": 20,
    "max_total_detections": 30,
    "class_agnostic": 0,
    "change_coordinate_frame": 1,
}


def detector(
    nms_spec: NmsSpec = NMS,
    *,
    classes: int = 3,
    background: bool = False,
    scores: ScoreSpec = spec_cases.SIGMOID,
    resizer: Resizer = STRETCHED,
    batch: int | None = 1,
    anchors: int = 60,
) -> DetectorSpec:
    """A detector whose "image" carries its heads: one row of 3 x width values; see :func:`carrier`."""
    heads = spec_cases.ssd(anchors, classes, background, scores=scores)
    width = anchors * (4 + heads.num_columns) // 3
    image = spec_cases.network_input(1, width, resizer, batch=batch)
    return spec_cases.example(heads, nms_spec, image, name="carrier")


def carrier(spec: DetectorSpec) -> onnx.ModelProto:
    """``heads.onnx`` that only cuts its input into box_encodings and class_logits."""
    heads = spec.heads
    batch = "batch" if spec.input.batch is None else spec.input.batch
    cut = 4 * heads.num_anchors
    constants = {
        "flat": [0, -1],
        "start": [0],
        "cut": [cut],
        "end": [3 * spec.input.width],
        "axis": [1],
        "boxes/shape": [0, heads.num_anchors, 4],
        "classes/shape": [0, heads.num_anchors, heads.num_columns],
    }
    nodes = [
        helper.make_node("Reshape", ["image", "flat"], ["values"], "values"),
        helper.make_node("Slice", ["values", "start", "cut", "axis"], ["boxes"], "boxes"),
        helper.make_node("Slice", ["values", "cut", "end", "axis"], ["anchors"], "logits"),
        helper.make_node("Reshape", ["boxes", "boxes/shape"], ["box_encodings"], "box_encodings"),
        helper.make_node("Reshape", ["anchors", "classes/shape"], ["class_logits"], "class_logits"),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, heads.num_anchors, columns])
        for name, columns in (("box_encodings", 4), ("class_logits", heads.num_columns))
    ]
    shape = [batch, 3, spec.input.height, spec.input.width]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    initializers = [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "heads", [image], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def convolutions() -> onnx.ModelProto:
    """Heads of :func:`detector` with weights, to be made half precision."""
    spec = detector(anchors=63)
    width = spec.input.width
    kernels = {"box_encodings": 4 * 63, "class_logits": 3 * 63}
    rng = np.random.default_rng(0)
    nodes, constants, outputs = [], [], []
    for head, channels in kernels.items():
        kernel = rng.normal(size=(channels, 3, 1, width)).astype(np.float32)
        shape = [1, 63, channels // 63]
        constants += [numpy_helper.from_array(kernel, f"{head}/kernel")]
        constants += [numpy_helper.from_array(np.array(shape), f"{head}/shape")]
        nodes += [
            helper.make_node("Conv", ["image", f"{head}/kernel"], [f"{head}/conv"], f"{head}/conv"),
            helper.make_node("Reshape", [f"{head}/conv", f"{head}/shape"], [head], head),
        ]
        outputs.append(helper.make_tensor_value_info(head, TensorProto.FLOAT, shape))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 1, width])
    graph = helper.make_graph(nodes, "heads", [image], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def random_anchors(spec: DetectorSpec, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 1, (spec.heads.num_anchors, 2))
    sides = rng.uniform(0.1, 0.5, (spec.heads.num_anchors, 2))
    return np.concatenate([centres, sides], axis=1).astype(np.float32)


def model_folder(path: Path, spec: DetectorSpec) -> Path:
    path.mkdir(exist_ok=True)
    (path / "spec.json").write_text(spec.to_json())
    np.save(path / "anchors.npy", random_anchors(spec))
    onnx.save(carrier(spec), path / "heads.onnx")
    seal(path)
    return path


def attribute_values(node: Any) -> dict[str, Any]:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: v.decode() if isinstance(v, bytes) else v for name, v in values.items()}


def shapes(values: Any) -> dict[str, tuple[int, list[Any]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


# ---- The plugin's form --------------------------------------------------------------------------------


@pytest.mark.parametrize("resizer", [STRETCHED, PADDED])
@pytest.mark.parametrize("batch", [1, None])
def test_one_node_with_the_attributes_of_the_spec(tmp_path, resizer, batch):
    spec = detector(background=True, scores=ScoreSpec("softmax", 2.0), resizer=resizer, batch=batch)
    if resizer is PADDED:
        side = spec.input.width
        square = dataclasses.replace(PADDED, min_dimension=side, max_dimension=side)
        spec = dataclasses.replace(spec, input=dataclasses.replace(spec.input, height=side, resizer=square))
    folder = model_folder(tmp_path / "m", spec)
    record = fuse.fuse(folder).record
    heads, fused = onnx.load(folder / "heads.onnx"), onnx.load(folder / "detector.onnx")
    assert [node.op_type for node in fused.graph.node] == [n.op_type for n in heads.graph.node] + [
        "OdtrtDetect"
    ]
    node = fused.graph.node[-1]
    assert node.domain == "odtrt"
    assert attribute_values(node) == ATTRIBUTES
    kinds = {attribute.name: attribute.type for attribute in node.attribute}
    assert kinds["plugin_version"] == kinds["plugin_namespace"] == onnx.AttributeProto.STRING, (
        "an integer plugin_version is read as an empty one by TensorRT's parser"
    )
    assert {(entry.domain, entry.version) for entry in fused.opset_import} == {("", 17), ("odtrt", 1)}
    size = "batch" if batch is None else batch
    windows = {"clip_windows": (TensorProto.FLOAT, [size, 4])} if resizer is PADDED else {}
    assert shapes(fused.graph.input) == {**shapes(heads.graph.input), **windows}
    assert shapes(fused.graph.output) == {
        "num_detections": (TensorProto.INT32, [size]),
        "boxes": (TensorProto.FLOAT, [size, 30, 4]),
        "scores": (TensorProto.FLOAT, [size, 30]),
        "classes": (TensorProto.INT32, [size, 30]),
    }
    constants = {t.name: numpy_helper.to_array(t) for t in fused.graph.initializer}
    assert list(node.input)[2:] == ["anchors", *windows]
    np.testing.assert_array_equal(constants["anchors"], np.load(folder / "anchors.npy"))
    assert constants["anchors"].dtype == np.float32
    assert record["checks"]["attributes"]["max_total_detections"] == 30


def test_the_attributes_are_the_c_structs_fields():
    """The native library's parameters, which other tests hold against the header, have the same values."""
    spec = detector(background=True, scores=ScoreSpec("identity", 3.0))
    params = native.postprocess_params(spec)
    for name, value in fuse.plugin_attributes(spec).items():
        field = getattr(params, name)
        field = list(field) if isinstance(value, list) else field
        assert np.float32(field) == pytest.approx(np.float32(value), rel=0), name


def test_heads_are_left_as_they_were(tmp_path):
    folder = model_folder(tmp_path / "m", detector())
    before = (folder / "heads.onnx").read_bytes()
    model = onnx.load(folder / "heads.onnx")
    fuse.with_plugin(model, detector(), random_anchors(detector()))
    fuse.fuse(folder)
    assert (folder / "heads.onnx").read_bytes() == before
    assert model.SerializeToString(deterministic=True) == onnx.load(folder / "heads.onnx").SerializeToString(
        deterministic=True
    )


def test_half_precision_reaches_the_plugin_without_a_cast():
    """TensorRT inserts no casts: the plugin must be given float16 heads and float32 anchors."""
    spec = detector(anchors=63)
    single = fuse.with_plugin(convolutions(), spec, random_anchors(spec))
    before = single.SerializeToString()
    fused = half_precision(single)
    assert single.SerializeToString() == before
    onnx.checker.check_model(fused, full_check=True)
    node = fused.graph.node[-1]
    inferred = shapes(onnx.shape_inference.infer_shapes(fused).graph.value_info)
    assert [inferred[name][0] for name in node.input[:2]] == [TensorProto.FLOAT16] * 2
    constants = {t.name: t.data_type for t in fused.graph.initializer}
    assert constants["anchors"] == TensorProto.FLOAT
    assert {constants[f"{head}/kernel"] for head in ("box_encodings", "class_logits")} == {
        TensorProto.FLOAT16
    }
    casts = [n for n in fused.graph.node if n.op_type == "Cast"]
    assert {name for n in casts for name in n.input} == {"image"}, "only the image is cast"
    assert {kind for kind, _ in shapes(fused.graph.output).values()} == {TensorProto.FLOAT, TensorProto.INT32}


# ---- The stage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", fuse.FUSED)
def test_the_same_inputs_give_the_same_bytes_and_no_work(tmp_path, form):
    folder = model_folder(tmp_path / "m", detector())
    path = folder / FORMS[form].file
    assert not fuse.fuse(folder, form=form).is_up_to_date
    first = path.read_bytes()
    assert fuse.fuse(folder, form=form).is_up_to_date
    assert not fuse.fuse(folder, form=form, force=True).is_up_to_date
    assert path.read_bytes() == first
    path.write_bytes(first[:-1])
    assert not fuse.fuse(folder, form=form).is_up_to_date
    assert path.read_bytes() == first
    anchors = np.load(folder / "anchors.npy")
    np.save(folder / "anchors.npy", anchors + np.float32(0.5))
    with pytest.raises(InputError, match=r"anchors\.npy: damaged or changed"):
        fuse.fuse(folder, form=form)
    seal(folder)
    assert not fuse.fuse(folder, form=form).is_up_to_date
    assert path.read_bytes() != first


def test_both_forms_lie_side_by_side(tmp_path):
    folder = model_folder(tmp_path / "m", detector())
    for form in fuse.FUSED:
        fuse.fuse(folder, form=form)
    assert all(fuse.fuse(folder, form=form).is_up_to_date for form in fuse.FUSED)
    assert [record["stage"] for record in read_log(folder)] == ["seal", "fuse", "fuse_onnx"]


def damage_anchors(folder: Path) -> None:
    np.save(folder / "anchors.npy", np.zeros((61, 4), np.float32))


def widen_anchors(folder: Path) -> None:
    np.save(folder / "anchors.npy", np.load(folder / "anchors.npy").astype(np.float64))


def cut_anchors(folder: Path) -> None:
    (folder / "anchors.npy").write_bytes(b"\x93NUMPY")


def other_spec(folder: Path) -> None:
    (folder / "spec.json").write_text(detector(classes=4).to_json())


def not_onnx(folder: Path) -> None:
    (folder / "heads.onnx").write_bytes(b"not an onnx model" * 9)


def too_many(folder: Path) -> None:
    spec = detector(dataclasses.replace(NMS, max_total_detections=5000))
    (folder / "spec.json").write_text(spec.to_json())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            damage_anchors,
            r"anchors\.npy: float32 \[61, 4\], expected float32 \[60, 4\] as spec\.json says; run",
        ),
        (widen_anchors, r"anchors\.npy: float64 \[60, 4\], expected float32"),
        (cut_anchors, r"anchors\.npy: .*numpy"),
        (other_spec, r"heads\.onnx: inputs and outputs .*spec\.json describes .*run `odtrt convert` again"),
        (not_onnx, r"heads\.onnx: not an ONNX model; run `odtrt convert` again"),
        (too_many, "max_total_detections is 5000, the plugin gives 1 to 4096"),
        (
            lambda folder: (folder / "heads.onnx").unlink(),
            r"heads\.onnx: not found; run `odtrt convert` first",
        ),
        (
            lambda folder: (folder / "anchors.npy").unlink(),
            r"anchors\.npy: not found; run `odtrt export` first",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, spoil, message):
    folder = model_folder(tmp_path / "m", detector())
    spoil(folder)
    seal(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        fuse.fuse(folder)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before


def test_unknown_form(tmp_path):
    with pytest.raises(InputError, match=r"form 'tflite': .*plugin, onnx"):
        fuse.fuse(tmp_path, form="tflite")


def test_graphsurgeon_is_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(MissingDependencyError, match="onnx-graphsurgeon"):
        fuse.fuse(model_folder(tmp_path / "m", detector()))


# ---- ONNX's own operators -----------------------------------------------------------------------------

FAMILIES = {
    "the usual settings": detector(NmsSpec(0.3, 0.6, 100, 100, False, True)),
    "threshold 1e-8": detector(NmsSpec(1e-8, 0.5, 100, 100, False, False), batch=None),
    "softmax with background": detector(background=True, scores=ScoreSpec("softmax", 2.0), classes=2),
    "cap a class": detector(NmsSpec(0.05, 0.5, 3, 7, False, True), classes=4),
    "one class, more asked for than there are": detector(
        NmsSpec(0.01, 1.0, 200, 100, False, True), classes=1
    ),
    "class-agnostic": detector(NmsSpec(0.1, 0.4, 5, 9, True, True), classes=5),
    "padded": detector(NmsSpec(0.1, 0.5, 20, 50, False, True), resizer=PADDED, batch=None),
    "padded, class-agnostic": detector(NmsSpec(0.1, 0.5, 20, 50, True, False), resizer=PADDED),
    "identity": detector(NmsSpec(-0.5, 0.5, 20, 30, False, True), scores=ScoreSpec("identity", 2.0)),
}


@dataclasses.dataclass(frozen=True)
class Heads:
    """Inputs of the post-processing."""

    box_encodings: np.ndarray
    class_logits: np.ndarray
    clip_windows: np.ndarray


def random_heads(spec: DetectorSpec, seed: int, images: int, tied: bool = False) -> Heads:
    rng = np.random.default_rng(seed)
    rows, columns = spec.heads.num_anchors, spec.heads.num_columns
    encodings = rng.normal(0, 2, (images, rows, 4))
    logits = rng.normal(-1, 2, (images, rows, columns))
    if tied:
        encodings, logits = np.zeros_like(encodings), np.round(logits / 2) * 2
    windows = np.tile(np.float32([0, 0, 1, 1]), (images, 1))
    if has_clip_windows(spec):
        windows[:, 2:] = rng.uniform(0.5, 1, (images, 2))
    return Heads(encodings.astype(np.float32), logits.astype(np.float32), windows)


def session(spec: DetectorSpec, anchors: np.ndarray) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    model = fuse.with_onnx_nms(carrier(spec), spec, anchors)
    onnx.checker.check_model(model, full_check=True)
    return runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_onnx(running: Any, spec: DetectorSpec, heads: Heads) -> dict[str, np.ndarray]:
    images = len(heads.box_encodings)
    values = [heads.box_encodings.reshape(images, -1), heads.class_logits.reshape(images, -1)]
    feeds = {"image": np.concatenate(values, axis=1).reshape(images, 3, 1, spec.input.width)}
    if has_clip_windows(spec):
        feeds["clip_windows"] = heads.clip_windows
    return dict(zip(DETECTIONS, running.run(list(DETECTIONS), feeds), strict=True))


def run_reference(spec: DetectorSpec, heads: Heads, anchors: np.ndarray) -> dict[str, np.ndarray]:
    found = nms.postprocess_reference(
        heads.box_encodings, heads.class_logits, anchors, spec, heads.clip_windows
    )
    return {name: getattr(found, name) for name in DETECTIONS}


def is_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """The same boxes of the same classes in the same order, up to the rounding of exp and sigmoid."""
    return (
        all(found[name].dtype == expected[name].dtype for name in DETECTIONS)
        and all(np.array_equal(found[name], expected[name]) for name in ("num_detections", "classes"))
        and np.allclose(found["scores"], expected["scores"], rtol=1e-5, atol=1e-7)
        and np.allclose(found["boxes"], expected["boxes"], rtol=1e-5, atol=1e-6)
    )


# Softmax of equal logits in another order has another last bit in ONNX Runtime: no ties there.
WITH_TIES = [
    (family, tied) for family in FAMILIES for tied in (False, True) if not (tied and "softmax" in family)
]


@pytest.mark.parametrize(("family", "tied"), WITH_TIES)
def test_onnx_runtime_selects_what_the_reference_selects(family, tied):
    spec = FAMILIES[family]
    anchors = random_anchors(spec)
    running = session(spec, anchors)
    images = 1 if spec.input.batch else 3
    kept = 0
    for seed in range(12):
        heads = random_heads(spec, seed, images, tied)
        expected = run_reference(spec, heads, anchors)
        assert is_same(run_onnx(running, spec, heads), expected), f"{family}, seed {seed}"
        kept += int(expected["num_detections"].sum())
    assert kept > 12 * images, "too few detections to show anything"


@pytest.mark.parametrize(
    "wrong",
    [
        {"nms": dataclasses.replace(NMS, iou_threshold=0.5)},
        {"nms": dataclasses.replace(NMS, score_threshold=0.7)},
        {"nms": dataclasses.replace(NMS, max_detections_per_class=2)},
        {"nms": dataclasses.replace(NMS, class_agnostic=True)},
        {"heads": dataclasses.replace(detector().heads, box_coder=BoxCoder(1.0, 1.0, 1.0, 1.0))},
        {"heads": dataclasses.replace(detector().heads, scores=ScoreSpec("sigmoid", 2.0))},
    ],
)
def test_a_wrong_setting_is_caught(wrong):
    spec = detector()
    anchors = random_anchors(spec)
    running = session(dataclasses.replace(spec, **wrong), anchors)
    heads = [random_heads(spec, seed, 1) for seed in range(12)]
    assert not all(is_same(run_onnx(running, spec, h), run_reference(spec, h, anchors)) for h in heads)


def test_wrong_anchors_are_caught():
    spec = detector()
    anchors = random_anchors(spec)
    heads = random_heads(spec, 0, 1)
    found = run_onnx(session(spec, np.roll(anchors, 1, axis=0)), spec, heads)
    assert not is_same(found, run_reference(spec, heads, anchors))


def test_a_box_outside_the_window_uses_up_a_slot_and_is_no_detection():
    """The OD API counts before it clips: of two classes with a cap of one, one finds nothing."""
    spec = detector(NmsSpec(0.1, 0.5, 1, 10, False, True), classes=2, anchors=3)
    anchors = np.float32([[0.5, 0.5, 0.2, 0.2], [2.5, 2.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]])
    logits = np.full((1, 3, 2), -9, np.float32)
    logits[0, :, 0] = 1, 3, 2
    logits[0, 2, 1] = 0
    heads = Heads(np.zeros((1, 3, 4), np.float32), logits, np.float32([[0, 0, 1, 1]]))
    found = run_onnx(session(spec, anchors), spec, heads)
    assert found["num_detections"].tolist() == [1]
    assert found["classes"][0, 0] == 1
    assert is_same(found, run_reference(spec, heads, anchors))


def test_rounding_differs_from_the_plugins():
    """The limit that the module states: ONNX Runtime's sigmoid is not odtrt's, bit for bit."""
    spec = FAMILIES["threshold 1e-8"]
    anchors = random_anchors(spec)
    heads = random_heads(spec, 0, 8)
    found, expected = run_onnx(session(spec, anchors), spec, heads), run_reference(spec, heads, anchors)
    assert not np.array_equal(found["scores"], expected["scores"])


def test_a_real_network_with_its_post_processing(tiny_converted, tmp_path):
    """The OD API's own detector, converted: images through ONNX Runtime, against heads and reference."""
    runtime = pytest.importorskip("onnxruntime")
    from odtrt_lib.spec import load_spec

    folder = tmp_path / "tiny"
    shutil.copytree(tiny_converted, folder)
    fuse.fuse(folder)
    fuse.fuse(folder, form="onnx_nms")
    spec = load_spec(folder / "spec.json")
    heads_session, whole = (
        runtime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        for name in ("heads.onnx", "detector_onnxnms.onnx")
    )
    rng = np.random.default_rng(0)
    for _ in range(3):
        image = rng.uniform(-1, 1, (1, 3, spec.input.height, spec.input.width)).astype(np.float32)
        encodings, logits = heads_session.run(["box_encodings", "class_logits"], {"image": image})
        heads = Heads(encodings, logits, np.float32([[0, 0, 1, 1]]))
        expected = run_reference(spec, heads, np.load(folder / "anchors.npy"))
        found = dict(zip(DETECTIONS, whole.run(list(DETECTIONS), {"image": image}), strict=True))
        assert expected["num_detections"][0] > 0
        assert is_same(found, expected)
