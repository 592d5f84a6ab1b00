"""Training with fake quantisation: the codes are ONNX's, the loss of INT8 falls, and a stop costs nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow")
onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from test_int8 import run  # noqa: E402

from odtrt_lib import int8  # noqa: E402
from odtrt_lib.convert import convert  # noqa: E402
from odtrt_lib.errors import CheckError, InputError  # noqa: E402
from odtrt_lib.export import export  # noqa: E402
from odtrt_lib.int8 import qat, sensitivity  # noqa: E402

STEPS, BATCH, RATE = 16, 8, 3e-4


def pictures(count: int = 8) -> list[np.ndarray]:
    """Soft blots, as random weights tell them apart."""
    random = np.random.default_rng(6)
    coarse = random.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    return list(coarse.repeat(16, axis=1).repeat(16, axis=2))


@pytest.fixture(scope="module")
def quantised(tiny_converted, tmp_path_factory) -> Path:
    folder = shutil.copytree(tiny_converted, tmp_path_factory.mktemp("qat") / "tiny")
    int8.quantise(folder, pictures())
    return folder


@pytest.fixture(scope="module")
def trained(tiny_model, quantised, tmp_path_factory) -> qat.Trained:
    output = tmp_path_factory.mktemp("trained") / "new"
    return qat.train(tiny_model, quantised, pictures(), output, steps=STEPS, batch=BATCH, learning_rate=RATE)


def weights(model: Path) -> dict[str, np.ndarray]:
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(model / "checkpoint" / "ckpt-0"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if "model/" in name}


def test_fake_quantisation_has_the_codes_of_onnx():
    import tensorflow as tf

    amax = 3.7
    values = np.random.default_rng(7).normal(0, 2, (1, 2, 40, 40)).astype(np.float32)  # some beyond the range
    graph = tf.Graph()
    with graph.as_default():
        tf.nn.conv2d(
            tf.compat.v1.placeholder(tf.float32, values.shape, "image"),
            np.eye(40)[None, None].astype("f"),
            1,
            "SAME",
            name="conv",
        )
    rounded = qat.with_fake_quantisation(graph.as_graph_def(), [("conv", 0, amax)])
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        tf.import_graph_def(rounded, name="")
        found = session.run("conv/input_0/rounded:0", {"image:0": values})
    parameters = [np.float32(amax / 127), np.zeros((), np.int8)]
    names = ["scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["image", *names], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", *names], ["out"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, values.shape) for n in ("image", "out")]
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in zip(names, parameters, strict=True)]
    model = helper.make_model(
        helper.make_graph(nodes, "pair", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    assert np.abs(found - run(model, values)[0]).max() < 1e-5
    assert found.min() == pytest.approx(-amax * 128 / 127, rel=1e-6) and found.max() == pytest.approx(amax)


def test_the_loss_falls_and_the_result_is_a_model(trained, tiny_model, quantised, tmp_path):
    """Chapters 1 and 2 take it; with the ranges of the training its heads in INT8 are nearer to the first
    float32 heads than those of before."""
    assert trained.last_loss < trained.first_loss
    before, after = weights(tiny_model), weights(trained.model)
    assert before.keys() == after.keys()
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed and not any("moving_" in name for name in changed)
    export(trained.model, tmp_path / "new")
    convert(tmp_path / "new")
    int8.quantise(tmp_path / "new", ranges=trained.model / qat.RANGES)
    ranges = [
        json.loads((f / "int8" / "calibration.json").read_text())["ranges"]
        for f in (tmp_path / "new", quantised)
    ]
    assert ranges[0] == ranges[1]
    spec_inputs = [
        np.ascontiguousarray(image.transpose(2, 0, 1))[None]
        for image in qat.inputs_of(pictures(), _spec(quantised))
    ]
    wanted = sensitivity.heads_of(onnx.load(quantised / "heads.onnx"), spec_inputs)
    noise = [
        sum(
            sensitivity.noise(
                wanted, sensitivity.heads_of(onnx.load(folder / "heads_int8.onnx"), spec_inputs)
            )
        )
        for folder in (quantised, tmp_path / "new")
    ]
    assert noise[1] < noise[0]


def _spec(folder: Path):
    from odtrt_lib.spec import load_spec

    return load_spec(folder / "spec.json")


def test_a_stop_costs_nothing(trained, tiny_model, quantised, tmp_path, monkeypatch):
    monkeypatch.setattr(qat, "_STEPS_BETWEEN_SAVES", 4)
    made = []

    def stop_once(progress: qat.Progress) -> None:
        made.append(progress.step)
        if made == [4, 8]:
            raise KeyboardInterrupt

    arguments = {"steps": STEPS, "batch": BATCH, "learning_rate": RATE, "report": stop_once}
    with pytest.raises(KeyboardInterrupt):
        qat.train(tiny_model, quantised, pictures(), tmp_path / "new", **arguments)
    assert not (tmp_path / "new" / "checkpoint").exists()
    qat.train(tiny_model, quantised, pictures(), tmp_path / "new", **arguments)
    assert made == [4, 8, 8, 12, 16]
    whole = weights(trained.model)
    for name, value in weights(tmp_path / "new").items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-3, atol=1e-5, err_msg=name)
    with pytest.raises(InputError, match="other settings"):
        qat.train(tiny_model, quantised, pictures(), tmp_path / "new", **{**arguments, "steps": 17})


def test_other_ranges_are_not_the_same_network(tiny_model, quantised, tmp_path):
    folder = shutil.copytree(quantised, tmp_path / "tiny")
    path = folder / "int8" / "calibration.json"
    calibration = json.loads(path.read_text())
    calibration["ranges"] = {name: 8 * amax for name, amax in calibration["ranges"].items()}
    path.write_text(json.dumps(calibration))
    with pytest.raises(CheckError, match="not the same network"):
        qat.train(tiny_model, folder, pictures(), tmp_path / "new", steps=1)


def test_bad_input_is_one_line(tiny_model, parts, quantised, tiny_converted, tmp_path):
    cases = [
        ({"source": parts}, "not the checkpoint of the model folder"),
        ({"folder": tiny_converted}, "heads_int8.onnx"),
        ({"images": []}, "no pictures"),
        ({"output": tmp_path}, "is no training"),
    ]
    for wrong, reason in cases:
        arguments = {
            "source": tiny_model,
            "folder": quantised,
            "images": pictures(),
            "output": tmp_path / "new",
        }
        with pytest.raises(InputError, match=reason) as caught:
            qat.train(**{**arguments, **wrong})
        assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
