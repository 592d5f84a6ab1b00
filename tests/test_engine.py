"""Chapter 3 against NVIDIA's own parser and builder: TensorRT-RTX builds without a GPU."""

import contextlib
import dataclasses
import fcntl
import importlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from odtrt_lib import engine, portability
from odtrt_lib.engine import passport
from odtrt_lib.errors import (
    BuildError,
    CheckError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
)
from odtrt_lib.folder import read_log, seal, sha256
from odtrt_lib.portability import policy

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from tiny_model import SPEC, heads_model, model_folder  # noqa: E402

needs_tensorrt = pytest.mark.skipif(
    not engine.available_runtimes(), reason="no TensorRT: run `pip install -e '.[engine]'`"
)
needs_tensorrt_rtx = pytest.mark.skipif(
    not engine.available_runtimes() or engine.available_runtimes()[0][0] != "tensorrt_rtx",
    reason="this is what TensorRT-RTX refuses",
)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if not engine.available_runtimes():
        pytest.skip("no TensorRT: run `pip install -e '.[engine]'`")
    folder = model_folder(tmp_path_factory.mktemp("built") / "tiny")
    return folder, {precision: engine.build(folder, precision=precision) for precision in ("fp32", "fp16")}


def plan_of(folder, result):
    return folder / next(name for name in result.record["outputs"] if name.endswith(".plan"))


def test_the_plan_and_its_passport(built):
    folder, results = built
    runtime_library, version = engine.available_runtimes()[0]
    assert {path.name for path in (folder / "plans").iterdir()} == {
        name.split("/")[1] for result in results.values() for name in result.record["outputs"]
    }
    for precision, result in results.items():
        plan = plan_of(folder, result)
        described = json.loads((plan.parent / f"{plan.stem.split('-')[0]}.json").read_text())
        assert described["plan"] == plan.name
        assert described["plan_sha256"] == sha256(plan)
        assert described["onnx_sha256"] == sha256(folder / "heads.onnx")
        assert described["spec_sha256"] == sha256(folder / "spec.json")
        assert described["plan_bytes"] == plan.stat().st_size
        assert (described["flavour"], described["version"], described["precision"]) == (
            runtime_library,
            version,
            precision,
        )
        assert plan.stem == f"{described['fingerprint']}-{sha256(plan)[:8]}"
        assert passport.plan_version(plan) == version, "as the plan's own header says"
        *conversion, attempt = described["attempts"]
        assert len(conversion) == (precision == "fp16"), "onnx writes half precision, in another process"
        assert (attempt["name"], attempt["outcome"]) == ("as asked", "built")
        assert 50 < attempt["peak_rss_mb"] <= result.record["peak_rss_mb"]
        assert max(rss for _, rss, _ in attempt["samples"]) <= attempt["peak_rss_mb"]
    assert len(files_in(folder)) == 3 + 2 * 2, "spec.json, heads.onnx, log.jsonl and two files a plan"


def test_the_layers_say_which_precision_runs(built):
    """TensorRT-RTX's network as parsed: the heads have 4 convolutions and nothing that must stay float32."""
    _, results = built
    layers = {
        precision: result.record["checks"]["layers_by_precision"] for precision, result in results.items()
    }
    assert set(layers["fp32"]) == {"fp32"}
    assert layers["fp16"]["fp16"] > layers["fp16"].get("fp32", 0)


@pytest.fixture(scope="module")
def bulky(tmp_path_factory):
    """A model of 60 MiB constants, whose build glibc's heap keeps 50 MiB too much of."""
    return model_folder(tmp_path_factory.mktemp("bulky") / "bulky", channels=1024, bulk=60)


@needs_tensorrt_rtx
def test_a_limit_that_the_first_steps_exceed(bulky, tmp_path):
    """The library's own settings do not lower what TensorRT-RTX takes without a GPU; the heap's do."""
    folder = tmp_path / "bulky"
    shutil.copytree(bulky, folder)
    free = engine.build(folder)
    limit = int(free.record["peak_rss_mb"]) - 20
    record = engine.build(folder, memory=f"{limit}MiB", force=True).record
    (found,) = passport.passports(folder)
    assert [(attempt["name"], attempt["outcome"].split(":")[0]) for attempt in found.attempts] == [
        ("as asked", "out of memory"),
        ("small workspace", "out of memory"),
        ("no library tactics", "out of memory"),
        ("lowest optimisation level", "out of memory"),
        ("frugal heap", "built"),
    ]
    assert found.attempts[-1]["peak_rss_mb"] <= limit < found.attempts[0]["peak_rss_mb"]
    assert record["settings"]["fallback_step"] == "frugal heap"
    assert passport.verify(folder, found) is None


def under_rlimit(folder, megabytes, arguments=""):
    """Builds in a process with RLIMIT_DATA, as a shell's `ulimit -d` would; returns what it printed."""
    script = (
        "import json, resource, sys\n"
        "from odtrt_lib import engine\n"
        "from odtrt_lib.errors import OdtrtError\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({megabytes} << 20,) * 2)\n"
        f"try: print(engine.build(sys.argv[1]{arguments}).record['settings']['fallback_step'])\n"
        "except OdtrtError as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200).stdout.strip()


@needs_tensorrt_rtx
def test_an_rlimit_that_the_first_steps_meet(bulky, tmp_path):
    folder = tmp_path / "bulky"
    shutil.copytree(bulky, folder)
    assert under_rlimit(folder, 250) == "frugal heap"
    (found,) = passport.passports(folder)
    assert [attempt["outcome"].split(":")[0] for attempt in found.attempts] == ["out of memory"] * 4 + [
        "built"
    ]


def build_in(folder, mebibytes):
    """The record of a build that may give up single precision, and its limit, at least that many MiB.

    Half precision takes 240 MiB, but now and then 270, in every try of a process. The least of the other
    steps takes 272. So the limit rises until the build gets by.
    """
    for extra in (0, 7, 14):
        with contextlib.suppress(BuildError):
            limit = f"{mebibytes + extra}MiB"
            return engine.build(folder, memory=limit, allow=("fp32",), force=True).record, limit
    limit = f"{mebibytes + 21}MiB"
    return engine.build(folder, memory=limit, allow=("fp32",), force=True).record, limit


@needs_tensorrt_rtx
def test_single_precision_is_given_up_only_where_that_is_allowed(bulky, tmp_path):
    """Half precision takes less, its writing into the ONNX included."""
    folder = tmp_path / "bulky"
    shutil.copytree(bulky, folder)
    engine.build(folder, precision="fp16")
    conversion = passport.passports(folder)[0].attempts[0]["peak_rss_mb"]
    least = int(conversion) + 10
    with pytest.raises(BuildError, match=f"memory of {least} MiB"):
        engine.build(folder, memory=f"{least}MiB", force=True)
    record, limit = build_in(folder, least)
    assert (
        record["settings"]["precision"] == "fp16" and record["settings"]["fallback_step"] == "half precision"
    )
    assert record["checks"]["half_precision_weights"] > 0 == record["checks"]["single_precision_weights"]
    assert engine.build(folder, memory=limit, allow=("fp32",)).is_up_to_date
    assert engine.build(folder, precision="fp16").is_up_to_date, "it is that plan, however it came about"
    assert not engine.build(folder, memory="1GiB").is_up_to_date


@needs_tensorrt_rtx
def test_a_limit_that_no_step_meets_names_every_peak(bulky):
    before = files_in(bulky)
    with pytest.raises(BuildError) as caught:
        engine.build(bulky, memory="150MiB")
    message = str(caught.value)
    assert "\n" not in message
    assert re.search("150 MiB; as asked: ", message)
    for name in ("as asked", "no library tactics", "lowest optimisation level", "frugal heap"):
        peak = re.search(rf"{name}: .*?\(peak (\d+) MiB\)", message)
        assert peak and int(peak[1]) >= 150, name
    assert "raise the limit (--memory)" in message and "--allow fp32" in message
    assert files_in(bulky) == before


@needs_tensorrt
def test_progress_never_leaves_0_to_1_and_arrives(tmp_path):
    told = []
    engine.build(
        model_folder(tmp_path / "tiny"), progress=lambda phase, fraction: told.append((phase, fraction))
    )
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0 and fractions[-1] == 1 and len(fractions) > 10
    assert all(phase for phase, _ in told)


def test_half_precision_makes_a_smaller_plan(built):
    folder, results = built
    sizes = {precision: plan_of(folder, result).stat().st_size for precision, result in results.items()}
    weights = sum(int(np.prod(t.dims)) for t in heads_model().graph.initializer if t.data_type == 1)
    assert sizes["fp32"] - sizes["fp16"] > 0.9 * 2 * weights, "two bytes a weight less"
    assert results["fp16"].record["checks"]["half_precision_weights"] == weights
    assert results["fp32"].record["checks"]["half_precision_weights"] == 0


@pytest.mark.parametrize(
    ("section", "field", "value", "is_built_again"),
    [
        ("labels", 0, {"id": 1, "name": "renamed"}, False),
        ("nms", "score_threshold", 0.25, False),
        ("input", "scale", [0.5, 0.5, 0.5], True),
    ],
)
def test_a_plan_is_built_again_where_what_goes_into_it_changed(
    built, tmp_path, section, field, value, is_built_again
):
    """The post-processing is not in a plan of heads.onnx; portability.check says the same of it."""
    folder, _ = built
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert engine.build(copy).is_up_to_date
    spec = json.loads((copy / "spec.json").read_text())
    spec[section][field] = value
    (copy / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"spec\.json: damaged or changed: .*seal the folder"):
        engine.build(copy)
    seal(copy)
    [stale] = [one for one in passport.passports(copy) if one.precision == "fp32"]
    place = portability.Environment(stale.machine, stale.runtime_library, stale.version)
    assert bool(policy.PlanCheck(copy, stale, place).changed) is is_built_again
    result = engine.build(copy)
    assert result.is_up_to_date is not is_built_again
    found = passport.read(copy / next(n for n in result.record["outputs"] if n.endswith(".json")))
    assert (found.spec_sha256 == sha256(copy / "spec.json")) is is_built_again
    assert engine.build(copy).is_up_to_date


def test_a_damaged_model_is_not_built(tmp_path):
    folder = model_folder(tmp_path / "tiny")
    path = folder / "heads.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"heads\.onnx: damaged or changed: its SHA-256 is [0-9a-f]{12}"):
        engine.build(folder)
    (folder / "log.jsonl").unlink()
    with pytest.raises(InputError, match=r"not sealed, log\.jsonl .*run `odtrt "):
        engine.build(folder)
    assert files_in(folder) == ["heads.onnx", "spec.json"]


def test_of_two_builds_at_once_one_waits_and_finds_the_plan(built, tmp_path):
    folder, _ = built
    copy = model_folder(tmp_path / "copy")
    phases = []
    with (copy / "heads.onnx").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def tell(phase, fraction):
            phases.append(phase)
            if phase.startswith("waiting for another build"):
                shutil.copytree(folder / "plans", copy / "plans")  # what the other build leaves
                fcntl.flock(held, fcntl.LOCK_UN)

        assert engine.build(copy, progress=tell).is_up_to_date
    assert phases == ["waiting for another build of this model"]


def test_a_model_that_is_half_precision_already_is_taken_as_it_is_and_never_called_fp32(built, tmp_path):
    folder, results = built
    ready = tmp_path / "ready"
    ready.mkdir()
    (ready / "spec.json").write_bytes((folder / "spec.json").read_bytes())
    onnx.save(engine.half_precision(onnx.load(folder / "heads.onnx")), ready / "heads.onnx")
    seal(ready)
    with pytest.raises(InputError, match=r"half precision already; .*fp16"):
        engine.build(ready)
    result = engine.build(ready, precision="fp16")
    assert sha256(plan_of(ready, result)) == sha256(plan_of(folder, results["fp16"]))


def test_half_precision_keeps_float32_outside_and_half_weights_inside():
    half = engine.half_precision(heads_model())
    weights = [t for t in half.graph.initializer if t.data_type != TensorProto.INT64]
    assert {tensor.data_type for tensor in weights} == {TensorProto.FLOAT16}
    original = {tensor.name: numpy_helper.to_array(tensor) for tensor in heads_model().graph.initializer}
    for tensor in weights:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), original[tensor.name].astype(np.float16))
    assert {v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)} == {
        TensorProto.FLOAT
    }


def test_half_precision_computes_what_single_precision_does():
    runtime = pytest.importorskip("onnxruntime")
    image = np.random.default_rng(1).normal(size=(1, 3, 16, 16)).astype(np.float32)
    single, half = (
        runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"image": image}
        )
        for model in (heads_model(), engine.half_precision(heads_model()))
    )
    for expected, found in zip(single, half, strict=True):
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
        assert np.abs(found - expected).max() > 0, "not half precision at all"


def test_a_weight_too_large_for_half_precision_is_named():
    model = heads_model()
    stem = np.zeros((64, 3, 3, 3), np.float32)
    stem[0, 0, 0, 0] = -70000
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(stem, "stem"))
    with pytest.raises(UnsupportedError, match=r"weight `stem` reaches 70000.*65504; build with fp32"):
        engine.half_precision(model)


@needs_tensorrt
def test_a_second_build_is_up_to_date_even_after_another_precision(built):
    folder, results = built
    for precision, first in results.items():
        again = engine.build(folder, precision=precision)
        assert again.is_up_to_date
        assert again.record == first.record


@needs_tensorrt
def test_a_damaged_plan_is_built_again(tmp_path):
    folder = model_folder(tmp_path / "tiny")
    plan = plan_of(folder, engine.build(folder))
    intact = plan.read_bytes()
    assert engine.build(folder).is_up_to_date
    plan.write_bytes(intact[:100])
    assert not engine.build(folder).is_up_to_date
    assert plan.read_bytes() == intact, "the build is deterministic"


@needs_tensorrt
def test_a_plan_for_another_tf32_override_is_another_plan(tmp_path, monkeypatch):
    """TensorRT-RTX refuses a plan where the variable is not what it was at the build."""
    monkeypatch.delenv(engine.TF32_OVERRIDE, raising=False)
    folder = model_folder(tmp_path / "tiny")
    plan = plan_of(folder, engine.build(folder))
    monkeypatch.setenv(engine.TF32_OVERRIDE, "0")
    result = engine.build(folder)
    assert not result.is_up_to_date
    assert result.record["settings"]["tf32_override"] == "0"
    assert plan.is_file() and plan_of(folder, result) != plan
    assert engine.build(folder).is_up_to_date
    monkeypatch.delenv(engine.TF32_OVERRIDE)
    assert plan_of(folder, engine.build(folder)) == plan


@needs_tensorrt
def test_another_model_gets_another_plan(built, tmp_path):
    folder = model_folder(tmp_path / "tiny", resize={"coordinate_transformation_mode": "asymmetric"})
    names = {plan_of(*pair).name for pair in ((folder, engine.build(folder)), (built[0], built[1]["fp32"]))}
    assert len(names) == 2


@needs_tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_dynamic_batch(tmp_path, precision):
    detector = dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, batch=None))
    folder = model_folder(tmp_path / "tiny", detector, batch=None)
    record = engine.build(folder, precision=precision).record
    assert record["settings"]["batch_min_opt_max"] == [1, 1, 8]


def parser_reason(model):
    """What NVIDIA's parser itself says about ``model``."""
    trt = importlib.import_module(engine.available_runtimes()[0][0])
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert not parser.parse(model.SerializeToString())
    return " ".join(parser.get_error(0).desc().split())


@needs_tensorrt_rtx
def test_a_refused_operator_is_named_on_one_line(tmp_path):
    folder = model_folder(tmp_path / "tiny", nonzero=True)
    before = files_in(folder)
    with pytest.raises(BuildError) as caught:
        engine.build(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder / "heads.onnx") in message
    assert "`find_nonzero` (op NonZero)" in message
    assert message.endswith(parser_reason(heads_model(nonzero=True)))
    assert files_in(folder) == before


@needs_tensorrt_rtx
def test_a_refused_attribute_is_named_with_nvidias_reason(tmp_path):
    resize = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
    with pytest.raises(BuildError, match=r"`bad_resize` \(op Resize\).*round_prefer_floor"):
        engine.build(model_folder(tmp_path / "tiny", resize=resize))


@needs_tensorrt
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"heads": dataclasses.replace(SPEC.heads, num_anchors=257)}, "257"),
        ({"heads": dataclasses.replace(SPEC.heads, background_column=False)}, "class_logits"),
        ({"heads": dataclasses.replace(SPEC.heads, box_encodings="boxes")}, "boxes"),
        ({"input": dataclasses.replace(SPEC.input, height=32)}, "32"),
        ({"input": dataclasses.replace(SPEC.input, batch=2)}, "2"),
    ],
)
def test_a_network_that_the_spec_does_not_describe_is_caught(tmp_path, wrong, named):
    folder = model_folder(tmp_path / "tiny", dataclasses.replace(SPEC, **wrong))
    with pytest.raises(CheckError, match=f"spec.json describes .*{named}"):
        engine.build(folder)


@needs_tensorrt
def test_half_precision_outputs_are_caught(tmp_path):
    folder = model_folder(tmp_path / "tiny", output_type=TensorProto.FLOAT16)
    with pytest.raises(CheckError, match=r"`box_encodings` is .*expected float32"):
        engine.build(folder)


@needs_tensorrt
def test_a_dynamic_height_or_width_is_refused(tmp_path):
    folder = model_folder(tmp_path / "tiny", size="width")
    with pytest.raises(UnsupportedError, match=r"`image` .*dynamic.*spec\.input: 16x16"):
        engine.build(folder)


@needs_tensorrt_rtx
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"version_compatible": True}, "makes no version-compatible plans"),
        ({"hardware_compatibility": "ampere_plus"}, "compatibility level.*--gpu"),
        ({"compute_capabilities": ["9.9"]}, r"compute capability 9\.9;.* 7\.5, 8\.0"),
    ],
)
def test_what_rtx_cannot_do_is_said(built, asked, words):
    with pytest.raises(UnsupportedError, match=words):
        engine.build(built[0], **asked)


@needs_tensorrt_rtx
def test_other_targets_make_another_plan(tmp_path):
    folder = model_folder(tmp_path / "tiny")
    for targets in (None, ["8.9"], ["8.9", "8.6"], ["8.6", "8.9"], ["default"]):
        engine.build(folder, compute_capabilities=targets)
    found = {one.compute_capabilities: one for one in passport.passports(folder)}
    assert sorted(found) == [("8.6", "8.9"), ("8.9",), ("default",)]
    assert len({one.fingerprint for one in found.values()}) == 3
    assert "--computeCapabilities=86,89" in found["8.6", "8.9"].trtexec


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"batch": (1, 2, 3)}, "fixed to 1"),
        ({"hardware_compatibility": "all"}, "none, ampere_plus"),
        ({"allow": ("accuracy",)}, "expected one of dynamic_batch, fp32"),
        ({"compute_capabilities": ["sm86"]}, "such as 8.6"),
    ],
)
@needs_tensorrt
def test_arguments_of_another_form(tmp_path, asked, words):
    with pytest.raises(InputError, match=words):
        engine.build(model_folder(tmp_path / "tiny"), **asked)


@needs_tensorrt
@pytest.mark.parametrize("batch", [(1, 2), (2, 1, 4), (0, 1, 1), (1, 1.5, 2)])
def test_other_batches_are_refused(tmp_path, batch):
    detector = dataclasses.replace(SPEC, input=dataclasses.replace(SPEC.input, batch=None))
    folder = model_folder(tmp_path / "tiny", detector, batch=None)
    with pytest.raises(InputError, match="smallest, best-tuned and largest"):
        engine.build(folder, batch=batch)


@needs_tensorrt
@pytest.mark.parametrize("content", [b"not an onnx model" * 100, b"version https://git-lfs", b"\x00" * 64])
def test_a_file_that_is_not_onnx(tmp_path, content):
    folder = model_folder(tmp_path / "tiny")
    (folder / "heads.onnx").write_bytes(content)
    seal(folder)
    with pytest.raises(InputError, match=r"heads\.onnx: not an ONNX model; run `odtrt convert` again"):
        engine.build(folder)


@needs_tensorrt
def test_an_empty_model_is_caught(tmp_path):
    folder = model_folder(tmp_path / "tiny")
    (folder / "heads.onnx").write_bytes(b"")
    seal(folder)
    with pytest.raises((InputError, CheckError), match=r"heads\.onnx"):
        engine.build(folder)


def test_heads_onnx_is_absent(tmp_path):
    folder = model_folder(tmp_path / "tiny")
    (folder / "heads.onnx").unlink()
    with pytest.raises(InputError, match=r"heads\.onnx: not found; run `odtrt convert` first"):
        engine.build(folder)


def test_tensorrt_is_absent(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "tiny")
    for runtime_library in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, runtime_library, None)
    assert engine.available_runtimes() == []
    with pytest.raises(MissingDependencyError, match=r"no TensorRT .*pip install -e '\.\[engine\]'"):
        engine.build(folder)


def break_import(monkeypatch, tmp_path, module):
    """Makes ``module`` fail to import in every process that this one starts."""
    place = tmp_path / "broken" / module
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(f"raise ImportError('No module named {module}')\n")
    monkeypatch.syspath_prepend(str(place.parent))


@needs_tensorrt
@pytest.mark.parametrize("module", ["onnx", "onnxconverter_common"])
def test_another_package_is_absent(tmp_path, monkeypatch, module):
    """Half precision needs them; single precision needs TensorRT alone."""
    folder = model_folder(tmp_path / "tiny")
    break_import(monkeypatch, tmp_path, module)
    with pytest.raises(MissingDependencyError, match=rf"needs onnx.*{module}.*pip install"):
        engine.build(folder, precision="fp16")
    assert not engine.build(folder, precision="fp32").is_up_to_date


def test_unknown_precision(tmp_path):
    with pytest.raises(InputError, match="precision 'int4': expected one of fp32, fp16"):
        engine.build(model_folder(tmp_path / "tiny"), precision="int4")


@needs_tensorrt
def test_an_interrupted_build_leaves_nothing(tmp_path):
    folder = model_folder(tmp_path / "tiny")
    before = files_in(folder)

    started = []

    def interrupt(phase, fraction):
        started.append(phase)
        if fraction > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.build(folder, progress=interrupt)
    assert started
    assert files_in(folder) == before
    assert [record["stage"] for record in read_log(folder)] == ["seal"]


@needs_tensorrt_rtx
def test_what_parses_but_does_not_build_comes_with_nvidias_reason(tmp_path):
    """NonMaxSuppression, which a naive export leaves in the graph, is such an operator."""
    model = heads_model()
    limits = [
        numpy_helper.from_array(np.array([10]), "most"),
        numpy_helper.from_array(np.float32([0.5]), "iou"),
    ]
    model.graph.initializer.extend(limits)
    scores = helper.make_node("Transpose", ["class_logits"], ["scores"], "t", perm=[0, 2, 1])
    select = helper.make_node(
        "NonMaxSuppression", ["box_encodings", "scores", "most", "iou", "iou"], ["chosen"], "select"
    )
    model.graph.node.extend([scores, select])
    used = [
        helper.make_node("Cast", ["chosen"], ["chosen_float"], "c", to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["chosen_float"], ["total"], "s", keepdims=0),
        helper.make_node("Add", ["box_encodings", "total"], ["moved"], "a"),
    ]
    model.graph.node.extend(used)
    model.graph.output[0].name = "moved"
    heads = dataclasses.replace(SPEC.heads, box_encodings="moved")
    folder = model_folder(tmp_path / "tiny", dataclasses.replace(SPEC, heads=heads))
    onnx.save(model, folder / "heads.onnx")
    seal(folder)
    with pytest.raises(BuildError, match=r"cannot build it: .*no runners") as caught:
        engine.build(folder)
    assert "\n" not in str(caught.value)
    assert files_in(folder) == ["heads.onnx", "log.jsonl", "spec.json"]
