"""Which convolutions cost most in INT8: measured against numpy, predicted, ranked, and kept in float."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from test_cli import odtrt  # noqa: E402
from tiny_model import SPEC, heads_model, model_folder  # noqa: E402

from odtrt_lib import int8  # noqa: E402
from odtrt_lib.errors import InputError  # noqa: E402
from odtrt_lib.folder import last_record, seal  # noqa: E402
from odtrt_lib.int8 import sensitivity, stage, sweep  # noqa: E402
from odtrt_lib.int8.blocks import blocks  # noqa: E402
from odtrt_lib.int8.sensitivity import Noise, Ranked, Report  # noqa: E402
from odtrt_lib.preprocess import load_image  # noqa: E402

CONVS = ("stem_conv", "middle_conv", "boxes_conv", "classes_conv")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with int8/sensitivity.json, and its eight pictures."""
    from PIL import Image

    path = tmp_path_factory.mktemp("measured")
    random = np.random.default_rng(4)
    for number in range(8):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path / f"{number}.png")
    pictures = int8.pictures_in(path, 8)
    folder = model_folder(path / "tiny")
    int8.measure_sensitivity(folder, pictures)
    return folder, pictures


@pytest.fixture
def own(measured, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(measured[0], tmp_path / "tiny")


def report_of(folder):
    return int8.read_report(folder, last_record(folder, "sensitivity")["inputs"]["heads.onnx"])


class Oracle:
    """heads_model in float64 by numpy, with the chosen convolutions in INT8."""

    def __init__(self, folder, pictures):
        calibration = json.loads((folder / "int8" / "calibration.json").read_text())
        self.scales = {name: float(np.float32(amax / 127)) for name, amax in calibration["ranges"].items()}
        self.kernels = {
            one.name: numpy_helper.to_array(one).astype(np.float64)
            for one in heads_model().graph.initializer
            if one.data_type == TensorProto.FLOAT
        }
        images = stage.network_inputs([load_image(one) for one in pictures], SPEC.input)
        self.images = [image[0].astype(np.float64) for image in images]
        self.exact = self.heads(())

    def conv(self, values, kernel, tensor, is_int8):
        weights = self.kernels[kernel]
        if is_int8:
            largest = np.abs(weights).reshape(len(weights), -1).max(axis=1)
            scale = np.float32(largest / 127).astype(np.float64)[:, None, None, None]
            weights = np.round(weights / scale) * scale
            values = np.clip(np.round(values / self.scales[tensor]), -128, 127) * self.scales[tensor]
        size = weights.shape[2]
        padded = np.pad(values, ((0, 0), (size // 2,) * 2, (size // 2,) * 2))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        return np.tensordot(weights, windows, ((1, 2, 3), (0, 3, 4)))

    def heads(self, in_int8):
        found = []
        for image in self.images:
            x1 = np.maximum(self.conv(image, "stem", "image", "stem_conv" in in_int8), 0)
            x2 = self.conv(x1, "middle", "x1", "middle_conv" in in_int8)
            found.append(
                [self.conv(x2, name, "x2", f"{name}_conv" in in_int8) for name in ("boxes", "classes")]
            )
        return found

    def noise(self, in_int8):
        """Of boxes and classes."""
        every = list(zip(self.exact, self.heads(in_int8), strict=True))
        return [
            sum(((a[head] - b[head]) ** 2).sum() for a, b in every)
            / sum((a[head] ** 2).sum() for a, _ in every)
            for head in range(2)
        ]


@pytest.fixture(scope="module")
def oracle(measured, tmp_path_factory):
    folder = shutil.copytree(measured[0], tmp_path_factory.mktemp("oracle") / "tiny")
    int8.quantise(folder, measured[1])
    return Oracle(folder, measured[1])


def as_list(noise):
    return [noise.box, noise.classes]


def test_both_sweeps_are_what_numpy_finds(measured, oracle):
    report = report_of(measured[0])
    assert (report.rule, report.calibrated_on, report.measured_on) == ("mse", 8, 8)
    assert as_list(report.every) == pytest.approx(oracle.noise(CONVS), rel=0.02)
    of = {one.conv: one for one in report.ranking}
    assert set(of) == set(CONVS)
    for conv in CONVS:
        others = [one for one in CONVS if one != conv]
        assert as_list(of[conv].alone) == pytest.approx(oracle.noise([conv]), rel=0.02), conv
        assert as_list(of[conv].all_but) == pytest.approx(oracle.noise(others), rel=0.02), conv
    sums = [one.alone.box + one.alone.classes for one in report.ranking]
    assert sums == sorted(sums, reverse=True)
    assert min(a / b for a, b in itertools.pairwise(sums)) > 1.05, "another order would be found"


@pytest.mark.parametrize("in_float", [(), ("middle_conv",), ("boxes_conv", "stem_conv"), CONVS[1:]])
def test_the_noises_of_single_convolutions_add_up(measured, oracle, in_float):
    """To what numpy measures with all of them at once, within a decibel."""
    predicted = report_of(measured[0]).predicted(in_float)
    found = oracle.noise([one for one in CONVS if one not in in_float])
    for one, other in zip(as_list(predicted), found, strict=True):
        assert abs(sensitivity.sqnr_db(one) - sensitivity.sqnr_db(other)) < 1.0


def test_a_target_keeps_the_worst_in_float(own, measured, oracle):
    before = int8.quantise(own, measured[1]).record["checks"]
    assert "box_sqnr_db" not in before
    record = int8.quantise(own, measured[1], min_box_sqnr_db=36).record
    assert record["settings"]["in_float"] == ["middle_conv"]
    left = [one for one in CONVS if one != "middle_conv"]
    expected = sensitivity.sqnr_db(oracle.noise(left)[0])
    assert record["checks"]["box_sqnr_db"] == pytest.approx(expected, abs=0.1)
    assert 36 <= record["checks"]["predicted_box_sqnr_db"] == pytest.approx(expected, abs=1.0)
    assert int8.quantise(own, measured[1], min_box_sqnr_db=36).is_up_to_date
    more = int8.quantise(own, measured[1], in_float=["stem_conv"], min_box_sqnr_db=36).record
    assert more["settings"]["in_float"] == ["middle_conv", "stem_conv"]


def hand_made():
    """Noises of boxes 4, 3, 2 and 1 thousandths; of classes 0, but for d, 20."""
    rows = [
        Ranked(conv, "backbone", Noise(box / 1000, classes / 1000), Noise(0, 0))
        for conv, box, classes in (("d", 1, 20), ("a", 4, 0), ("b", 3, 0), ("c", 2, 0))
    ]
    return Report("0", "mse", 8, 8, Noise(0.01, 0.02), tuple(rows))


def test_the_greedy_choice_by_hand():
    report = hand_made()
    assert report.predicted(()) == Noise(pytest.approx(0.010), pytest.approx(0.020))
    assert report.quiet_enough(19.9) == []  # 10 thousandths are 20 dB
    assert report.quiet_enough(22.2) == ["a"]  # 6
    assert report.quiet_enough(22.3) == ["a", "b"]  # 3
    assert report.quiet_enough(22.3, ["d"]) == ["d", "a"]  # 5
    assert report.quiet_enough(29.9) == ["a", "b", "c"]
    assert report.halving() == ["d"]  # 21 of 30
    for target, reason in (
        (30.1, "leaves no convolution in front of the boxes"),
        (float("nan"), "expected a"),
    ):
        with pytest.raises(InputError, match=reason):
            report.quiet_enough(target)


def test_the_size_of_the_shards_changes_no_bit(own, measured, monkeypatch):
    before = (own / "int8" / "sensitivity.json").read_bytes()
    assert int8.measure_sensitivity(own, measured[1]).is_up_to_date
    monkeypatch.setattr(sweep, "_SHARD", 3)
    done = []
    again = int8.measure_sensitivity(own, measured[1], force=True, progress=lambda *of: done.append(of))
    assert not again.is_up_to_date and (own / "int8" / "sensitivity.json").read_bytes() == before
    assert done == [(i, 27) for i in range(1, 28)]  # three shards, nine networks
    fewer = int8.measure_sensitivity(own, measured[1], measured=3).record["checks"]
    assert fewer == {"convolutions": 4, "calibrated_on": 8, "measured_on": 3}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "not found; run `odtrt sensitivity` first"),
        ("{", "damaged"),
        ("[]", "damaged"),
        (lambda report: report.pop("ranking"), "damaged"),
        (lambda report: report.update(more=1), "damaged"),
        (lambda report: report["every"].update(box="x"), "damaged"),
        (lambda report: report["ranking"][0]["alone"].update(box=float("inf")), "damaged"),
        (lambda report: report.update(heads_sha256="0"), "on another heads.onnx"),
    ],
)
def test_a_report_that_does_not_serve_is_one_line(own, measured, change, reason):
    path = own / "int8" / "sensitivity.json"
    content = json.loads(path.read_text())
    if callable(change):
        change(content)
    path.write_text(change if isinstance(change, str) else json.dumps(content))
    if change is None:
        path.unlink()
    with pytest.raises(InputError, match=reason) as caught:
        int8.quantise(own, measured[1], min_box_sqnr_db=20)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert not (own / "heads_int8.onnx").exists()


def test_bad_input_leaves_nothing(measured, tmp_path):
    folder = model_folder(tmp_path / "tiny")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for wrong, reason in (
        ({"images": measured[1][:3]}, "3 calibration pictures"),
        ({"images": [*measured[1], tmp_path / "broken.png"]}, "broken.png"),
        ({"rule": "best"}, "calibrator 'best'"),
        ({"measured": 0}, "on 0 pictures"),
        ({"ray_address": "nonsense"}, "HOST:PORT"),
    ):
        with pytest.raises(InputError, match=reason):
            int8.measure_sensitivity(folder, **{"images": measured[1], **wrong})
    assert not (folder / "int8").exists()


def test_a_process_with_another_model_measures_nothing(own, measured):
    digest = report_of(own).heads_sha256
    onnx.save(heads_model(channels=128), own / "heads.onnx")
    seal(own)
    unit = sweep.Unit("stem_conv", True, tuple(measured[1][:1]))
    with pytest.raises(InputError, match="another model"):
        sweep.unit_powers(sweep.Sweep(own, digest, ()), unit)


def test_the_command(own, measured, capsys):
    pictures = measured[1][0].parent
    status, out, _ = odtrt(capsys, "sensitivity", own, "--images", pictures, "--measured", 2)
    assert status == 0 and "4 convolutions" in out and "on 2 pictures" in out
    rows = [line for line in out.splitlines() if "_conv" in line and "dB" in line]
    assert len(rows) == 4 and "classes_conv" in rows[0] and "inf dB" in rows[0] and "heads" in rows[0]
    assert f"quantise {own} --images {pictures} --in-float classes_conv" in out
    status, out, _ = odtrt(capsys, "quantise", own, "--images", pictures, "--min-box-sqnr", "36")
    assert status == 0 and "1 convolution in floating point; signal over noise of the boxes: " in out
    for wrong in (["--min-box-sqnr", "90"], ["--min-box-sqnr", "nan"]):
        status, _, err = odtrt(capsys, "quantise", own, "--images", pictures, *wrong)
        assert (status, err.count("\n")) == (1, 1)


# --- backbone, neck and heads


def graph(*nodes, outputs=("boxes", "classes")):
    """A model whose nodes are ``(operation, inputs, output)``; every Conv has a kernel of its own."""
    made = []
    for operation, inputs, output in nodes:
        more = [f"{output}_kernel"] if operation == "Conv" else []
        made.append(helper.make_node(operation, [*inputs.split(), *more], [output], output))
    kernels = [
        numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), node.input[1])
        for node in made
        if node.op_type == "Conv"
    ]
    values = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in ("image", *outputs)]
    return helper.make_model(helper.make_graph(made, "g", values[:1], values[1:], kernels))


HEADS = (
    *(("Conv", "p4", "box4"), ("Conv", "p4", "class4"), ("Conv", "p3", "box3"), ("Conv", "p3", "class3")),
    *(("Concat", "box4 box3", "boxes"), ("Concat", "class4 class3", "classes")),
)


def test_a_pyramid_over_residual_blocks_and_gates():
    model = graph(
        ("Conv", "image", "stem"),
        ("Conv", "stem", "c3_main"),
        ("Add", "c3_main stem", "c3_sum"),  # a residual block joins no scales
        ("ReduceMean", "c3_sum", "mean"),
        ("Conv", "mean", "squeeze"),
        ("Sigmoid", "squeeze", "gate"),
        ("Mul", "c3_sum gate", "c3"),  # and neither does a gate, although it enlarges
        ("Conv", "c3", "c4"),
        ("Conv", "c4", "lateral4"),
        ("Resize", "lateral4", "up"),
        ("Conv", "c3", "lateral3"),
        ("Add", "lateral3 up", "sum3"),
        ("Conv", "sum3", "p3"),
        ("Conv", "lateral4", "p4"),
        *HEADS,
    )
    assert blocks(model) == {
        **dict.fromkeys(("stem", "c3_main", "squeeze", "c4"), "backbone"),
        **dict.fromkeys(("lateral4", "lateral3", "p3", "p4"), "neck"),
        **dict.fromkeys(("box4", "class4", "box3", "class3"), "heads"),
    }


def test_a_pyramid_with_weights_that_goes_down_and_up():
    """As EfficientDet's: every way from the backbone crosses a join."""
    model = graph(
        ("Conv", "image", "c3"),
        ("Conv", "c3", "c4"),
        ("Conv", "c3", "in3"),
        ("Conv", "c4", "in4"),
        ("MaxPool", "in4", "in5"),
        ("Resize", "in5", "up5"),
        ("Mul", "in4 weight", "weighted4"),
        ("Mul", "up5 weight", "weighted5"),
        ("Add", "weighted4 weighted5", "sum4"),
        ("Conv", "sum4", "mid4"),
        ("Resize", "mid4", "up4"),
        ("Add", "in3 up4", "sum3"),
        ("Conv", "sum3", "p3"),
        ("MaxPool", "p3", "down3"),
        ("Add", "mid4 down3", "out4"),
        ("Conv", "out4", "p4"),
        *HEADS,
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "weight"))
    found = blocks(model)
    assert [name for name in found if found[name] == "backbone"] == ["c3", "c4"]
    assert [name for name in found if found[name] == "neck"] == ["in3", "in4", "mid4", "p3", "p4"]


def test_without_a_pyramid_there_is_no_neck():
    assert list(blocks(heads_model()).values()) == ["backbone", "backbone", "heads", "heads"]


def test_the_shipped_detectors_blocks_are_those_of_its_names(parts_folder):
    """TensorFlow's names of the layers are the oracle; the tower that both heads share counts as neck."""
    found = blocks(onnx.load(parts_folder / "heads.onnx"))
    assert len(found) == 113
    for name, block in found.items():
        if "feature_extractor/model/" in name:
            assert block == "backbone", name
        elif "feature_extractor/" in name or "PredictionTower" in name:
            assert block == "neck", name
        else:
            assert block == "heads" and ("BoxHead" in name or "ClassHead" in name), name


def test_the_report_is_json_of_the_dataclass(measured):
    content = json.loads((measured[0] / "int8" / "sensitivity.json").read_text())
    assert content == json.loads(json.dumps(dataclasses.asdict(report_of(measured[0]))))
