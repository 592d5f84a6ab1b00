"""Plans in the C++ detector, on stand-ins of CUDA and TensorRT. Prints JSON: scenario -> what went wrong.

``python detector_scenarios.py FOLDER``: the folder of the libraries that test_native_detector.py compiled,
with LD_LIBRARY_PATH naming it. The environment variables STAND_IN_... choose what the stand-ins do.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from detector_cases import NMS, Case, assert_same, make_case, pictures, spec_of, write_spec

from odtrt_lib import native, portability
from odtrt_lib.engine import passport
from odtrt_lib.engine.passport import Passport, PluginIdentity
from odtrt_lib.errors import InputError, OdtrtError
from odtrt_lib.folder import seal, sha256
from odtrt_lib.machine import Machine
from odtrt_lib.native_detector import FILE_NAME, NativeDetector
from odtrt_lib.spec import load_spec
from odtrt_lib.tensors import has_clip_windows

LIBRARIES = Path(sys.argv[1])
LIBRARY = LIBRARIES / FILE_NAME
STAND_IN = ctypes.CDLL(str(LIBRARIES / "libstand_in_cuda.so"))
MACHINE = Machine(platform.system(), platform.machine(), "Stand-in", "8.7", 16, 8192)
PLUGIN = LIBRARIES / "plugin.so"
VERSION = "10.3.0"


def environment(plugin: Path | None = None) -> portability.Environment:
    identity = None if plugin is None else passport.plugin_identity(plugin)
    return portability.Environment(MACHINE, "tensorrt", VERSION, identity)


def plan_bytes(case: Case, *, is_fused: bool, min_batch: int = 1) -> bytes:
    """A plan for nvinfer.cpp."""
    spec, batch = case.spec, case.spec.input.batch or 0
    header = b"ftrt" + bytes(20) + bytes(map(int, VERSION.split("."))) + b"\0"
    numbers = (is_fused, has_clip_windows(spec), batch, min_batch, spec.input.height, spec.input.width)
    return b"".join(
        [
            header,
            struct.pack("6i", *numbers),
            bytes(native.postprocess_params(spec)),
            *(array.tobytes() for array in (case.anchors, case.box_encodings, case.class_logits)),
        ]
    )


def add_plan(case: Case, *, is_fused: bool = False, min_batch: int = 1, **changes: object) -> Passport:
    """Installs a plan in the case's folder. changes: fields of its passport."""
    data = plan_bytes(case, is_fused=is_fused, min_batch=min_batch)
    digest = hashlib.sha256(data).hexdigest()
    fingerprint = f"{random.Random(repr(changes)).getrandbits(64):016x}"
    fields = {
        "fingerprint": fingerprint,
        "plan": passport.plan_name(fingerprint, digest),
        "plan_sha256": digest,
        "plan_bytes": len(data),
        "model": "detector.onnx" if is_fused else "heads.onnx",
        "onnx_sha256": "0" * 64,
        "spec_sha256": sha256(case.folder / "spec.json"),
        "runtime_library": "tensorrt",
        "version": VERSION,
        "precision": "fp16",
        "version_compatible": False,
        "hardware_compatibility": "none",
        "compute_capabilities": (),
        "plugin": passport.plugin_identity(PLUGIN) if is_fused else None,
        "machine": MACHINE,
        "settings": {"workspace": 1.5e-7, "größe": ["ö", 1e22]},
        "layers": {},
        "attempts": ({"seconds": 0.1 + 0.2},),
        "trtexec": "",
        "seconds": 1.0,
        "built": "2026-01-01T00:00:00+00:00",
    }
    made = Passport(**{**fields, **changes})  # type: ignore[arg-type]
    (case.folder / "new.plan").write_bytes(data)
    passport.install(case.folder, case.folder / "new.plan", made)
    return made


@contextlib.contextmanager
def set_to(**settings: str) -> Iterator[None]:
    names = {f"STAND_IN_{name.upper()}": value for name, value in settings.items()}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def opened(case: Case, **options: object) -> NativeDetector:
    return NativeDetector.open(case.folder, library=LIBRARY, **options)  # type: ignore[arg-type]


def refusal(call: Callable[[], object], part: str) -> None:
    try:
        call()
    except OdtrtError as error:
        assert part in str(error) and "\n" not in str(error), str(error)
    else:
        raise AssertionError(f"no error with {part!r}")


def check_detections(case: Case, detector: NativeDetector, resizer: str, rounds: int = 3) -> int:
    """Compares all pictures ``rounds`` times; returns how many graphs were launched."""
    before = STAND_IN.stand_in_graph_launches()
    for _ in range(rounds):
        for image in pictures(resizer):
            assert_same(detector.detect(image), case.detect(image))
    return STAND_IN.stand_in_graph_launches() - before


# ---- The same bits ----------------------------------------------------------------------------------------


def forms(folder: Path, **settings: str) -> None:
    for resizer in ("stretched", "padded"):
        for batch, min_batch in ((1, 1), (2, 2), (None, 3)):
            for is_fused in (False, True):
                name = f"{resizer}-{batch}-{is_fused}"
                nms = dataclasses.replace(NMS, change_coordinate_frame=batch != 2)
                case = make_case(folder / name, spec_of(resizer, batch=batch, nms=nms))
                made = add_plan(case, is_fused=is_fused, min_batch=min_batch)
                with (
                    set_to(**settings),
                    opened(case, plugin=PLUGIN if is_fused else None, num_slots=2) as one,
                ):
                    launches = check_detections(case, one, resizer, 2 if batch == 1 else 1)
                    said = one.description
                assert f"TensorRT 10.3.0, plan {made.fingerprint}, fp16, post-processing " in said
                assert "a CUDA graph for each size" in said, said
                assert launches >= len(pictures(resizer)), "every picture is launched as a graph in the end"


def scenario_every_form(folder: Path) -> None:
    forms(folder)


def scenario_every_form_on_a_jetson(folder: Path) -> None:
    forms(folder, integrated="1")


def scenario_a_wrong_bit_is_seen(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    add_plan(dataclasses.replace(case, class_logits=np.nextafter(case.class_logits, np.float32(9))))
    with opened(case) as detector:
        try:
            check_detections(case, detector, "stretched")
        except AssertionError:
            return
    raise AssertionError("other heads gave the same bits")


def scenario_tickets_overlap(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    add_plan(case)
    images = pictures("stretched")
    with opened(case, num_slots=4) as detector:
        for _ in range(3):
            tickets = [detector.submit(image) for image in images[:4]]
            assert None not in tickets
            for ticket, image in sorted(zip(tickets, images[:4], strict=True), key=lambda pair: -pair[0]):
                assert_same(detector.result(ticket), case.detect(image))
        slot = detector.slot(48, 64)
        slot[:] = images[0]
        assert_same(detector.result(detector.submit(slot)), case.detect(images[0]))


def scenario_a_graph_is_of_one_size_pitch_and_order_of_channels(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    add_plan(case)
    image = pictures("stretched")[0]
    with opened(case, num_slots=1) as detector:
        for _ in range(3):
            for width in (64, 60):
                slot = detector.slot(48, 64)
                slot[:] = image
                assert_same(detector.detect(slot[:, :width]), case.detect(image[:, :width]))
            slot = detector.slot(48, 60)
            slot[:] = image[:, :60]
            assert_same(detector.detect(slot), case.detect(image[:, :60]))
            for one in (image, image[..., ::-1]):
                assert_same(detector.detect(one), case.detect(one))
            for height in range(20, 30):  # more sizes than graphs are kept
                assert_same(detector.detect(image[:height]), case.detect(image[:height]))


# ---- CUDA graphs that cannot be had -----------------------------------------------------------------------


def graph_is_refused(folder: Path, setting: str, reason: str) -> None:
    for is_fused in (False, True):
        case = make_case(folder / f"case{is_fused}", spec_of("padded"))
        add_plan(case, is_fused=is_fused)
        with set_to(**{setting: "1"}), opened(case, plugin=PLUGIN if is_fused else None) as detector:
            check_detections(case, detector, "padded")
            assert f"without a CUDA graph, because {reason}" in detector.description, detector.description


def scenario_capture_cannot_begin(folder: Path) -> None:
    graph_is_refused(folder, "no_capture", "cudaStreamBeginCapture: CUDA error 900, an error")


def scenario_the_network_refuses_capture(folder: Path) -> None:
    graph_is_refused(folder, "refuses_capture", str(folder))


def scenario_the_network_is_missing_in_the_graph(folder: Path) -> None:
    graph_is_refused(folder, "records_nothing", "a CUDA graph finds something else than its steps")


# ---- Failures ---------------------------------------------------------------------------------------------


def scenario_failures_name_their_reason(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    image = pictures("stretched")[0]
    refusal(
        lambda: opened(case), "no plan that TensorRT 10.3.0 can use here: there is none; run `odtrt build`"
    )
    made = add_plan(case)
    with set_to(no_gpu="1"):
        refusal(lambda: opened(case), "no GPU that CUDA can use (no device)")
    with set_to(half_heads="1"):
        refusal(lambda: opened(case), "has `class_logits` as another kind of tensor than spec.json says")
    with set_to(run_fails="1"):
        refusal(lambda: opened(case), "cannot run it: CUDA initialization failure")
    refusal(lambda: opened(case, plan="0" * 16), f"there is no plan {'0' * 16}")
    with opened(case, plan=made.fingerprint) as detector:
        with set_to(run_fails="1"):
            refusal(lambda: detector.detect(image), "cannot run it: CUDA initialization failure")
        assert_same(detector.detect(image), case.detect(image))
        with set_to(gpu_fails="1"):
            refusal(lambda: detector.detect(image), "CUDA error 719")
        assert_same(detector.detect(image), case.detect(image))


def scenario_the_engine_of_this_tensorrt_is_missing(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    add_plan(case)
    opened(case).close()
    alone = Path(shutil.copy(LIBRARY, folder))
    refusal(
        lambda: NativeDetector.open(case.folder, library=alone),
        f"libnvinfer.so.10 is loaded in this process, and there is no libodtrt_engine10.so in {folder}: run",
    )


def scenario_a_hanging_gpu_times_out(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    add_plan(case)
    image = pictures("stretched")[0]
    with opened(case, num_slots=1) as detector:
        detector.detect(image)
        with set_to(gpu_hangs="1"):
            ticket = detector.submit(image)
            assert detector.result(ticket, 0) is None and detector.result(ticket, 0.001) is None
            assert detector.submit(image) is None
        assert_same(detector.result(ticket), case.detect(image))


def scenario_a_fused_plan_without_its_plugin(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    add_plan(case, is_fused=True)
    refusal(lambda: opened(case), "it calls plugin.so, and no plugin was named")
    refusal(lambda: opened(case, plugin=folder / "absent.so"), "absent.so: cannot be read")
    split = add_plan(case, built="2027-01-01T00:00:00+00:00")
    with opened(case) as detector:
        assert split.fingerprint in detector.description
    with opened(case, plugin=PLUGIN) as detector:
        assert "inside the plan" in detector.description, "a fused plan is preferred"


def scenario_an_older_plan_serves_if_the_newest_does_not_load(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    old = add_plan(case)
    other = dataclasses.replace(
        case, spec=spec_of("stretched", nms=dataclasses.replace(NMS, max_total_detections=3))
    )
    new = add_plan(other, is_fused=True, built="2027-01-01T00:00:00+00:00")
    with opened(case, plugin=PLUGIN) as detector:
        assert old.fingerprint in detector.description
    refusal(lambda: opened(case, plugin=PLUGIN, plan=new.fingerprint), "in another shape than spec.json says")


# ---- Which plan may be used: the Python side's policy is the oracle ---------------------------------------

PASSPORT_CHANGES: tuple[dict[str, object], ...] = (
    {},
    {"runtime_library": "tensorrt_rtx", "compute_capabilities": ("default",)},
    {"spec_sha256": "1" * 64},
    {"version": "10.2.0"},
    {"version": "10.2.0", "version_compatible": True},
    {"version": "10.4.0"},
    {"version": "8.6.1", "version_compatible": True},
    {"version": "8.5.2", "version_compatible": True},
    {"version": "11.0.0", "version_compatible": True},
    {"version": "10.3"},
    {"version": "10.3.0.26"},
    {"machine": dataclasses.replace(MACHINE, gpu=None)},
    {"machine": dataclasses.replace(MACHINE, gpu="Another")},
    {"machine": dataclasses.replace(MACHINE, gpu="Another"), "hardware_compatibility": "ampere_plus"},
    {"machine": dataclasses.replace(MACHINE, compute_capability="7.5")},
    *(
        {"machine": dataclasses.replace(MACHINE, compute_capability=one), "hardware_compatibility": level}
        for one in ("7.5", "8.6", "9.0")
        for level in ("ampere_plus", "same_compute_capability")
    ),
    {
        "machine": dataclasses.replace(MACHINE, gpu="Another"),
        "hardware_compatibility": "same_compute_capability",
    },
    {
        "machine": dataclasses.replace(MACHINE, gpu="Orin", l4t="R36.4"),
        "hardware_compatibility": "ampere_plus",
    },
    {"machine": dataclasses.replace(MACHINE, sm_count=8)},
    {"machine": dataclasses.replace(MACHINE, sm_count=None)},
    {"machine": dataclasses.replace(MACHINE, gpu_memory_mb=8000)},
    {"machine": dataclasses.replace(MACHINE, gpu_memory_mb=4000)},
    {"machine": dataclasses.replace(MACHINE, gpu_memory_mb=None)},
    {"machine": dataclasses.replace(MACHINE, architecture="riscv64")},
    {"machine": dataclasses.replace(MACHINE, system="Windows")},
    {"plugin": PluginIdentity("plugin.so", "2" * 64, "IPluginV3"), "is_fused": True},
    {"plugin": PluginIdentity("plugin.so", "2" * 64, "IPluginV2DynamicExt"), "is_fused": True},
    {"is_fused": True},
)


def scenario_the_policy_is_pythons(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    verdicts = set()
    for changes in PASSPORT_CHANGES:
        made = add_plan(case, **changes)  # type: ignore[arg-type]
        for plugin in (None, PLUGIN):
            expected = portability.check(case.folder, made, environment(plugin)).action.value == "ok"
            verdicts.add(expected)
            try:
                opened(case, plan=made.fingerprint, plugin=plugin).close()
                found = True
            except InputError as error:
                found = False
                assert made.fingerprint in str(error), str(error)
            assert found == expected, f"{changes}, plugin {plugin}: found {found}"
    assert verdicts == {True, False}


def scenario_models_that_changed_since_the_build(folder: Path) -> None:
    """heads.onnx recorded by `convert`, with other hashes for what it was made from."""
    from odtrt_lib.folder import part_sha256, write_record

    def record(inputs: dict[str, str]) -> None:
        nothing = {"settings": {}, "versions": {}, "checks": {}, "seconds": 0.0, "peak_rss_mb": 0.0}
        write_record(case.folder, "convert", inputs=inputs, outputs=["heads.onnx"], **nothing)

    case = make_case(folder / "case", spec_of("stretched"))
    (case.folder / "heads.onnx").write_bytes(b"a model")
    part = "spec.json: heads, input"
    own = part_sha256((case.folder / "spec.json").read_bytes(), part)
    settings = {part: own}
    digest = sha256(case.folder / "heads.onnx")
    for inputs, changes in (
        ({}, {}),
        ({}, {"onnx_sha256": digest}),
        ({part: own}, {"onnx_sha256": digest}),
        ({part: "3" * 64}, {"onnx_sha256": digest}),
        ({"frozen.pb": "3" * 64}, {"onnx_sha256": digest}),
        ({"anchors.npy": "3" * 64}, {"onnx_sha256": digest}),
        ({part: own}, {"onnx_sha256": digest, "spec_sha256": "4" * 64}),
        ({part: own}, {"onnx_sha256": digest, "spec_sha256": "4" * 64, "settings": settings}),
        ({part: own}, {"onnx_sha256": digest, "spec_sha256": "4" * 64, "settings": {part: "5" * 64}}),
    ):
        record(inputs)
        made = add_plan(case, **changes)
        expected = portability.check(case.folder, made, environment()).action.value == "ok"
        try:
            opened(case, plan=made.fingerprint).close()
            found = True
        except InputError as error:
            found = False
            assert "the model changed since it was built" in str(error)
        assert found == expected, (inputs, changes)


def scenario_damaged_plans_never_reach_tensorrt(folder: Path) -> None:
    case = make_case(folder / "case", spec_of("stretched"))
    made = add_plan(case)
    plan = case.folder / "plans" / made.plan
    paper = plan.with_name(f"{made.fingerprint}.json")
    for path, spoil in (
        (plan, lambda data: data[:-1]),
        (plan, lambda data: data + b"\0"),
        (plan, lambda data: data[:-1] + b"\x77"),
        (paper, lambda data: data.replace(b'"fp16"', b'"fp32"')),
        (paper, lambda data: data[:-3]),
        (paper, lambda data: data.replace(b'"schema": 2', b'"schema": 1')),
        (paper, lambda data: b""),
    ):
        original = path.read_bytes()
        path.write_bytes(spoil(original))
        refusal(lambda: opened(case), str(path))
        path.write_bytes(original)
    plan.rename(plan.with_suffix(".away"))
    refusal(lambda: opened(case), f"{plan}: cannot be read (No such file or directory)")
    plan.with_suffix(".away").rename(plan)
    opened(case).close()
    wrong = dataclasses.replace(made, version="10.3.1")
    paper.write_text(wrong.to_json())
    refusal(lambda: opened(case), made.fingerprint)


ALPHABET = b'"{}[],:0123456789.eE-+ntf\\u\xc3\xb6 '


def scenario_what_python_refuses_is_refused(folder: Path) -> None:
    """Random damage to spec.json, sealed: nothing that Python refuses may be accepted."""
    case = make_case(folder / "case", spec_of("padded"))
    original = (case.folder / "spec.json").read_bytes()
    rng = random.Random(0)
    accepted = 0
    for _ in range(150):
        text = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = bytes(rng.choices(ALPHABET, k=rng.randint(0, 3)))
        write_spec(case.folder, bytes(text))
        (case.folder / "log.jsonl").unlink()
        seal(case.folder)
        try:
            load_spec(case.folder / "spec.json")
            is_right = True
        except InputError:
            is_right = False
        try:
            opened(case, infer=case.infer).close()
            accepted += 1
            assert is_right, bytes(text)
        except InputError as error:
            assert "\n" not in str(error)
    assert accepted > 5


def main() -> None:
    found = {}
    scenarios = {name: one for name, one in globals().items() if name.startswith("scenario_")}
    for name, run in scenarios.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                run(Path(folder))
                left = STAND_IN.stand_in_objects()
                assert left == 0, f"{left} of CUDA's objects are left"
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
