"""Chapter 3: ``heads.onnx`` -> a TensorRT plan in ``plans/``, with its passport beside it.

With the plugin (``plugins/tensorrt``) ``detector.onnx`` is built, the post-processing inside the plan.

A plan belongs to one library version, one precision and one kind of GPU; all of them are in its fingerprint,
so plans for several targets lie side by side and none is ever taken for another (:mod:`odtrt_lib.passport`).

**Precision.** Wherever strongly typed networks exist (TensorRT 9 and newer, TensorRT-RTX) they are used:
TensorRT then computes in the types that the ONNX model carries, and half precision is made in the ONNX
(:func:`half_precision`). TensorRT 10 also has the older builder flag; it is not used there, because a flag
only permits half precision and leaves the choice to timings, so that two builds can differ, and because 11
has dropped it: one route, one result. TensorRT 8.5 and 8.6 have nothing but the flag. After the build the
layers are counted by precision, in the engine by its inspector where a GPU can load it, else in the network;
half precision that was asked for and is not there is an error. An ONNX model that already has QuantizeLinear
and DequantizeLinear nodes (chapter 6) builds as it is, in either precision; there is no calibrator here.

**Memory.** Every attempt is a process of its own (:mod:`odtrt_lib.builder`), which the kernel may kill
without harm to the caller. Where it runs out of memory the next rung of :data:`RUNGS` is tried. A limit is
enforced by a watchdog, which looks at the attempt's resident memory fifty times a second and ends it. Where
no GPU is, RLIMIT_DATA stands behind it, a little wider; elsewhere it does not, and RLIMIT_AS nowhere: CUDA
reserves far more address space than it uses. Nor is an rlimit enough alone: TensorRT-RTX 1.7.1 can wait for
ever on a thread of its own that met it; such an attempt, asleep without using any processor time, is ended
too. On a Jetson, where the GPU has no memory of its own, what the GPU takes counts as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, Mapping, NoReturn, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib import builder, fuse, passport, runtime
from odtrt_lib.errors import (
    BuildError,
    CheckError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
    one_line,
)
from odtrt_lib.folder import (
    SPEC_PARTS,
    StageResult,
    check_seal,
    ctrl_c_later,
    part_sha256,
    read_log,
    require,
    sealed,
    sha256,
    staging,
    write_record,
)
from odtrt_lib.spec import DetectorSpec, load_spec

PRECISIONS = passport.PRECISIONS
# Smallest, best-tuned and largest batch of a model that was exported with a dynamic batch.
DYNAMIC_BATCH = (1, 1, 8)
# What the ladder may give up, once everything that leaves the plan as asked has failed.
CONCESSIONS = ("dynamic_batch", "fp32")

# Allows or forbids TF32 over the builder's head; a plan loads only where it is what it was at the build.
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"

_INSTALL = "run `pip install -e '.[engine]'`"
_INSTALL_TENSORRT = (
    f"{_INSTALL} on a PC (TensorRT-RTX; no GPU is needed to build); on a Jetson TensorRT comes with "
    "JetPack: `sudo apt install nvidia-jetpack`"
)
_NO_TIMING_CACHE = (
    "none: TensorRT-RTX's does nothing since 1.2; it compiles kernels when a plan is loaded, and keeps those"
)
_WRITE_HALF = "write half precision into the ONNX"
_MOST_SAMPLES = 200
_LOOK_SECONDS = 0.02
# What a process asks for and never touches (threads' stacks, numpy's buffers) counts for RLIMIT_DATA, but
# takes no memory.
_UNTOUCHED = 128 * builder.MIB
_STALL_SECONDS = 8.0
_NO_MEMORY = "out of memory: "
_KILLED = "killed by signal 9: the kernel's out-of-memory killer or the memory limit"

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Rung:
    """One step of the ladder. It keeps the settings of those before it.

    setting: one of :data:`odtrt_lib.builder.SETTINGS` and its value; a library without it skips the rung.
    concession: one of :data:`CONCESSIONS`, which changes the plan.
    """

    name: str
    setting: Optional[Tuple[str, Any]] = None
    concession: Optional[str] = None


RUNGS = (
    Rung("as asked"),
    Rung("small workspace", ("workspace_mib", 256)),
    Rung("no library tactics", ("tactic_sources", "none")),
    Rung("lowest optimisation level", ("optimization_level", 0)),
    Rung("frugal heap", ("frugal_heap", True)),
    Rung("static batch", concession="dynamic_batch"),
    Rung("half precision", concession="fp32"),
)
# glibc: give back every block from 64 KiB up as soon as it is free, and keep one heap for all threads.
_FRUGAL_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def available_runtimes() -> List[Tuple[str, str]]:
    """The TensorRT flavours that can be imported here, as (module, version), the preferred one first.

    ``tensorrt`` is the full library, ``tensorrt_rtx`` TensorRT-RTX, which also builds without a GPU.
    """
    modules = ((flavour, _import(flavour)) for flavour in passport.FLAVOURS)
    return [(flavour, module.__version__) for flavour, module in modules if module is not None]


def fingerprint(identity: Mapping[str, Any]) -> str:
    """The name of a plan: 16 hexadecimal digits of the SHA-256 over all that its meaning depends on.

    identity: JSON values: model, flavour, version, precision, onnx_sha256, plugin, batch, the compatibility
    modes, the compute capabilities, for TensorRT the GPU's name and compute capability, and where it is set
    :data:`TF32_OVERRIDE`.
    """
    text = json.dumps(dict(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_memory(text: str) -> int:
    """A memory limit in bytes: ``1500MiB``, ``2GiB``, ``1500MB``, or ``60%`` of what is free here now.

    Raises InputError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MiB|GiB|MB|GB|%)\s*", str(text))
    if match is None:
        raise InputError(
            f"memory {text!r}: expected a limit such as 1500MiB, 2GiB, or 60% of what is free now"
        )
    number, unit = float(match.group(1)), match.group(2)
    if unit == "%":
        if not 0 < number <= 100:
            raise InputError(f"memory {text!r}: expected more than 0% and at most 100% of what is free now")
        return int(free_memory() * number / 100)
    limit = int(number * {"MiB": 1 << 20, "GiB": 1 << 30, "MB": 10**6, "GB": 10**9}[unit])
    if limit < 64 * builder.MIB:
        raise InputError(f"memory {text!r}: expected at least 64MiB; TensorRT's libraries alone take that")
    return limit


def free_memory() -> int:
    """Bytes of host memory that a new process can have: what is available, or what its cgroup leaves it."""
    known = _meminfo()
    free = [known["MemAvailable"]] if "MemAvailable" in known else []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names = ("memory.max", "memory.current")
                root = Path("/sys/fs/cgroup")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                root = Path("/sys/fs/cgroup/memory")
            else:
                continue
            for place in (root / path.lstrip("/"), root):
                with contextlib.suppress(OSError, ValueError):
                    limit, used = (int((place / name).read_text()) for name in names)
                    free.append(max(0, limit - used))
    return min(free) if free else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def build(
    folder: Union[str, Path],
    *,
    precision: str = "fp32",
    plugin: Union[str, Path, None] = None,
    batch: Optional[Sequence[int]] = None,
    memory: Optional[str] = None,
    version_compatible: bool = False,
    hardware_compatibility: str = "none",
    compute_capabilities: Optional[Sequence[str]] = None,
    may_give_up: Sequence[str] = (),
    force: bool = False,
    progress: Optional[Progress] = None,
) -> StageResult:
    """Writes a plan and its passport into ``plans/`` for the TensorRT that is installed here.

    precision: ``fp32``, or ``fp16``: weights and arithmetic in half precision, inputs and outputs float32. An
    ONNX model whose weights are half precision already is taken as it is, as ``fp16`` only.
    plugin: ``libodtrt_tensorrt.so``; with it ``detector.onnx`` is built, not ``heads.onnx``. Whoever loads
    the plan loads the plugin first.
    batch: smallest, best-tuned and largest batch of a model with a dynamic batch; :data:`DYNAMIC_BATCH`.
    memory: the most host memory that the build may have, see :func:`parse_memory`; on a Jetson, whose GPU
    has none of its own, the GPU's share included. None: no limit but the machine's.
    version_compatible: newer TensorRT versions can load the plan too. hardware_compatibility: ``none``,
    ``ampere_plus`` (any GPU from Ampere on) or ``same_compute_capability``. compute_capabilities: the GPUs
    that TensorRT-RTX builds for, e.g. ``("8.6", "8.9")``; None or ``("default",)`` is its own choice.
    may_give_up: names of :data:`CONCESSIONS` that the ladder may make where memory does not suffice
    otherwise. ``dynamic_batch``: a plan for the best-tuned batch only; ``fp32``: half precision.
    progress: is told the phase and how much of the attempt is done, 0 to 1.

    Inputs and outputs of the network are compared with ``spec.json``. The plan is loaded only to inspect it,
    and only where there is a GPU; a build with TensorRT-RTX needs none. Where an intact plan answers the same
    call already, nothing is built unless ``force`` says so. Of several calls for one model at a time, one
    builds and the others wait. The files are named in ``result.record["outputs"]``::

        result = engine.build("out/parts", precision="fp16", memory="60%")

    Raises InputError where a file is absent or not ONNX or an argument has another form,
    MissingDependencyError where TensorRT, or for fp16 onnx, is absent, UnsupportedError for what the library
    cannot do, weights that do not fit into half precision, or a network with a dynamic height or width,
    BuildError, naming the node, where TensorRT refuses the model or the plugin, and naming every rung with
    its peak where memory does not suffice, CheckError where the network is not the one that ``spec.json``
    describes, or half precision was asked for and the layers run in single precision.
    """
    started = time.perf_counter()
    folder = Path(folder)
    _check_arguments(precision, hardware_compatibility, may_give_up)
    limit = None if memory is None else parse_memory(memory)
    if plugin is None:
        model_file = require(folder, "heads.onnx", "convert")
    else:
        plugin = Path(plugin).resolve()
        if not plugin.is_file():
            raise InputError(f"{plugin}: not found; {passport.BUILD_PLUGIN}")
        model_file = require(folder, "detector.onnx", "fuse")
    hashes = check_seal(folder, model_file.name, "spec.json")
    onnx_sha256, spec_sha256 = hashes[model_file.name], hashes["spec.json"]
    spec_content = sealed(folder, "spec.json")["spec.json"]
    if hashlib.sha256(spec_content).hexdigest() != spec_sha256:
        raise InputError(f"{folder}: the model was replaced meanwhile; build again")
    spec = load_spec(folder / "spec.json", spec_content)
    part = SPEC_PARTS[model_file.name]
    of_spec = {part: part_sha256(spec_content, part)}
    profile = _batch_profile(spec, batch)
    flavour, version = _preferred_runtime()
    weights = builder.weights_by_type(model_file)
    is_half = weights.get("FLOAT16", 0) > weights.get("FLOAT", 0)
    if is_half and precision != "fp16":
        raise InputError(f"{model_file}: its weights are half precision already; build it with fp16")
    machine = passport.this_machine()
    library = None if plugin is None else passport.plugin_identity(plugin)
    identity: Dict[str, Any] = {
        "model": model_file.name,
        "flavour": flavour,
        "version": version,
        "precision": precision,
        "onnx_sha256": onnx_sha256,
        "plugin": None if library is None else dataclasses.asdict(library),
        "batch": profile,
        "version_compatible": version_compatible,
        "hardware_compatibility": hardware_compatibility,
        "compute_capabilities": _targets(flavour, compute_capabilities),
        "gpu": [machine.gpu, machine.compute_capability] if flavour == "tensorrt" else None,
    }
    tf32_override = {"tf32_override": os.environ[TF32_OVERRIDE]} if TF32_OVERRIDE in os.environ else {}
    identity.update(tf32_override)
    asked = fingerprint(identity)
    tell: Progress = progress or (lambda phase, fraction: None)
    with _one_build_at_a_time(model_file, tell):
        if not force:
            for count in range(len(CONCESSIONS) + 1):
                given_up = [name for name in CONCESSIONS[:count] if name in may_give_up]
                finished = _finished(folder, _conceded(identity, given_up), asked, spec_sha256, of_spec)
                if finished is not None:
                    return StageResult(finished, True)

        attempt = _Attempt(
            folder,
            model_file,
            spec,
            identity,
            machine,
            plugin,
            limit,
            is_half,
            tell,
        )
        with staging(folder) as out:
            outcome = _climb(attempt, out, may_give_up)
            identity = outcome.identity
            answer = outcome.answer
            _judge_precision(model_file, identity["precision"], answer)
            if sha256(model_file) != onnx_sha256:
                raise InputError(f"{model_file}: changed during the build; nothing was written: build again")
            plan = out / outcome.place / builder.PLAN
            name, digest = fingerprint(identity), sha256(plan)
            settings = {
                "batch_min_opt_max": list(identity["batch"] or (spec.input.batch,) * 3),
                "rung": outcome.rung,
                "asked": asked,
                "memory_limit_mb": None if limit is None else round(limit / builder.MIB, 1),
                **answer["builder"],
                **tf32_override,
                **of_spec,
                **outcome.settings,
                "timing_cache": answer["timing_cache"] or _NO_TIMING_CACHE,
                "layers_counted_in": answer["layers_counted_in"],
            }
            described = passport.Passport(
                fingerprint=name,
                plan=passport.plan_name(name, digest),
                plan_sha256=digest,
                plan_bytes=plan.stat().st_size,
                model=model_file.name,
                onnx_sha256=identity["onnx_sha256"],
                spec_sha256=spec_sha256,
                flavour=flavour,
                version=version,
                precision=identity["precision"],
                version_compatible=version_compatible,
                hardware_compatibility=hardware_compatibility,
                compute_capabilities=tuple(identity["compute_capabilities"]),
                plugin=library,
                machine=machine,
                settings=settings,
                layers=answer["layers_by_precision"],
                attempts=tuple(outcome.attempts),
                trtexec=answer["trtexec"],
                seconds=round(time.perf_counter() - started, 3),
                built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            if identity["precision"] == "fp16" and outcome.half_model is not None:
                weights = builder.weights_by_type(outcome.half_model)
            passport.install(folder, plan, described)
            for place in out.iterdir():
                shutil.rmtree(place)
        checks = {
            "inputs_and_outputs_match_spec": True,
            "layers": answer["layers"],
            "layers_by_precision": answer["layers_by_precision"],
            "layers_counted_in": answer["layers_counted_in"],
            "half_precision_weights": weights.get("FLOAT16", 0),
            "single_precision_weights": weights.get("FLOAT", 0),
            "loaded_on_a_gpu": True if answer["layers_counted_in"] == "engine" else None,
        }
        return StageResult(_record(folder, described, checks), False)


def half_precision(model: Any) -> Any:
    """The ONNX model with float16 weights and arithmetic; its inputs and outputs stay float32.

    model: an ``onnx.ModelProto``; it is changed in place. Operators that onnxconverter-common holds
    unsafe in half precision (Resize, TopK, ...) stay float32 between casts.

    Raises UnsupportedError where a weight exceeds 65504, the largest half number (it would be clipped
    silently otherwise), MissingDependencyError without onnxconverter-common, and BuildError where
    ``onnx.checker`` refuses the outcome.
    """
    try:
        import onnx
        from onnx import numpy_helper
        from onnxconverter_common.float16 import convert_float_to_float16
    except ImportError as error:
        raise MissingDependencyError(
            f"half precision needs onnx and onnxconverter-common ({error}): {_INSTALL}"
        ) from error
    limit = float(np.finfo(np.float16).max)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
            if not largest <= limit:
                raise UnsupportedError(
                    f"weight `{tensor.name}` reaches {largest:g}, beyond half precision's {limit:g}; "
                    "build with fp32"
                )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the float32 number .* will be truncated")
        _infer_shapes(model)
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            disable_shape_infer=True,
            min_positive_val=2.0**-24,
            max_finite_val=limit,
        )
    try:
        onnx.checker.check_model(half, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"the half-precision model is not valid ONNX ({one_line(error)})") from error
    return half


def _infer_shapes(model: Any) -> None:
    """Adds the types of all tensors to ``model``; onnx alone would copy all weights several times for it."""
    import onnx

    outline = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    graph = outline.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    weights = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in weights)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > 1024:
            kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(kind)
        else:  # shapes can depend on its values
            graph.initializer.append(tensor)
    found = onnx.shape_inference.infer_shapes(outline)
    del model.graph.value_info[:], model.graph.output[:]
    model.graph.value_info.extend(found.graph.value_info)
    model.graph.output.extend(found.graph.output)


@contextlib.contextmanager
def _one_build_at_a_time(model_file: Path, tell: Progress) -> Iterator[None]:
    """Waits while another process builds from this file: two builds need twice the memory for one plan."""
    with model_file.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another build of this model", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems cannot lock
            pass
        yield


# ---- Arguments --------------------------------------------------------------------------------------------


def _check_arguments(precision: str, hardware_compatibility: str, may_give_up: Sequence[str]) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if hardware_compatibility not in passport.HARDWARE_COMPATIBILITIES:
        raise InputError(
            f"hardware_compatibility {hardware_compatibility!r}: expected one of "
            + ", ".join(passport.HARDWARE_COMPATIBILITIES)
        )
    for concession in may_give_up:
        if concession not in CONCESSIONS:
            raise InputError(f"may_give_up {concession!r}: expected one of {', '.join(CONCESSIONS)}")


def _batch_profile(spec: DetectorSpec, batch: Optional[Sequence[int]]) -> Optional[List[int]]:
    """Smallest, best-tuned and largest batch of a dynamic one; None where the batch is fixed."""
    if spec.input.batch is not None:
        if batch is not None and tuple(batch) != (spec.input.batch,) * 3:
            raise InputError(
                f"batch {','.join(map(str, batch))}: this model's batch is fixed to {spec.input.batch}; "
                "run `odtrt export` with a dynamic batch first"
            )
        return None
    profile = list(DYNAMIC_BATCH if batch is None else batch)
    if (
        len(profile) != 3
        or not all(isinstance(n, int) and n > 0 for n in profile)
        or sorted(profile) != profile
    ):
        raise InputError(
            f"batch {','.join(map(str, profile))}: expected smallest, best-tuned and largest, e.g. 1,1,8"
        )
    return profile


def _targets(flavour: str, compute_capabilities: Optional[Sequence[str]]) -> List[str]:
    wanted = list(compute_capabilities or ())
    if flavour == "tensorrt_rtx":
        wanted = wanted or ["default"]
    elif wanted == ["default"]:
        wanted = []
    for text in wanted:
        if text != "default" and not re.fullmatch(r"\d{1,2}\.\d", text):
            raise InputError(f"compute capability {text!r}: expected a form such as 8.6")
    return sorted(
        set(wanted), key=lambda text: [int(part) for part in text.split(".")] if "." in text else []
    )


def _import(flavour: str) -> Optional[ModuleType]:
    try:
        return runtime.import_library(flavour)
    except MissingDependencyError:
        return None


def _preferred_runtime() -> Tuple[str, str]:
    found = available_runtimes()
    if not found:
        raise MissingDependencyError(
            f"no TensorRT can be imported (looked for {' and '.join(passport.FLAVOURS)}): {_INSTALL_TENSORRT}"
        )
    return found[0]


# ---- What is there already ---------------------------------------------------------------------------------


def _finished(
    folder: Path, identity: Mapping[str, Any], asked: str, spec_sha256: str, of_spec: Mapping[str, Any]
) -> Optional[Dict[str, Any]]:
    """The record of an intact plan that answers the fingerprint ``asked`` and was compared with this spec.

    of_spec: the part of it that goes into the plan, where the passport names it; labels are not.
    """
    name = fingerprint(identity)
    try:
        known = passport.read(folder / passport.PLANS / f"{name}.json")
    except InputError:
        return None
    if asked not in (name, known.settings.get("asked")):
        return None
    if known.spec_sha256 != spec_sha256 and not of_spec.items() <= known.settings.items():
        return None
    if passport.verify(folder, known) is not None:
        return None
    plan = f"{passport.PLANS}/{known.plan}"
    for record in reversed(read_log(folder)):
        if record["stage"] == "engine" and plan in record["outputs"]:
            return record
    checks = {
        "layers_by_precision": dict(known.layers),
        "layers_counted_in": known.settings.get("layers_counted_in"),
    }
    return _record(folder, known, checks)


def _record(folder: Path, described: passport.Passport, checks: Mapping[str, Any]) -> Dict[str, Any]:
    peaks = [attempt.get("peak_rss_mb") or 0.0 for attempt in described.attempts]
    return write_record(
        folder,
        "engine",
        inputs={described.model: described.onnx_sha256},
        settings={
            "model": described.model,
            "flavour": described.flavour,
            "version": described.version,
            "precision": described.precision,
            "compute_capabilities": list(described.compute_capabilities),
            "version_compatible": described.version_compatible,
            "hardware_compatibility": described.hardware_compatibility,
            **described.settings,
        },
        outputs=[
            f"{passport.PLANS}/{described.plan}",
            f"{passport.PLANS}/{described.fingerprint}.json",
        ],
        versions={described.flavour: described.version},
        seconds=described.seconds,
        peak_rss_mb=max(peaks, default=0.0),
        checks=checks,
    )


# ---- The ladder -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """What all attempts at one plan share."""

    folder: Path
    model_file: Path
    spec: DetectorSpec
    identity: Dict[str, Any]
    machine: passport.Machine
    plugin: Optional[Path]
    limit: Optional[int]
    is_half: bool
    progress: Progress

    @property
    def who(self) -> str:
        return f"{passport.FLAVOURS[self.identity['flavour']]} {self.identity['version']}"


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """A plan that was built. place: its folder in the staging folder. identity: of what was built."""

    place: str
    rung: str
    identity: Dict[str, Any]
    settings: Dict[str, Any]
    answer: Dict[str, Any]
    attempts: List[Dict[str, Any]]
    half_model: Optional[Path]


def _conceded(identity: Mapping[str, Any], given_up: Sequence[str]) -> Dict[str, Any]:
    """The identity of the plan that is left after the concessions ``given_up``."""
    changed = dict(identity)
    if "dynamic_batch" in given_up and changed["batch"] is not None:
        changed["batch"] = [changed["batch"][1]] * 3
    if "fp32" in given_up:
        changed["precision"] = "fp16"
    return changed


def _climb(attempt: _Attempt, out: Path, may_give_up: Sequence[str]) -> _Outcome:
    """Tries one rung after the other until a plan is built; raises what no rung can mend."""
    attempts: List[Dict[str, Any]] = []
    knows: Optional[List[str]] = None
    settings: Dict[str, Any] = {}
    given_up: List[str] = []
    half_model: Optional[Path] = None
    for number, rung in enumerate(RUNGS):
        if rung.setting is not None:
            if knows is not None and rung.setting[0] not in knows:
                continue
            if rung.setting[0] == "workspace_mib" and _is_no_smaller(rung.setting[1], attempt.limit):
                continue
            settings[rung.setting[0]] = rung.setting[1]
        if rung.concession is not None:
            if rung.concession not in may_give_up or _conceded(attempt.identity, [rung.concession]) == dict(
                attempt.identity
            ):
                continue
            given_up.append(rung.concession)
        identity = _conceded(attempt.identity, given_up)
        place = out / f"attempt-{number}"
        place.mkdir()
        if attempts:
            attempt.progress(f"out of memory; next: {rung.name}", 0.0)
        if attempt.limit is not None:
            settings.setdefault("workspace_mib", attempt.limit // builder.MIB)
        source = attempt.model_file
        is_typed = not builder.is_weakly_typed(importlib.import_module(identity["flavour"]))
        watched: Optional[_Watched] = None
        if identity["precision"] == "fp16" and is_typed and not attempt.is_half:
            if half_model is None:
                watched = _run(attempt, _request(attempt, identity, place, "half_precision", source, {}), {})
                attempts.append(_described(_WRITE_HALF, {}, watched))
                _raise_refusal(watched)
                if watched.out_of_memory:
                    break  # it knows no rungs
                _raise_without_answer(attempt, watched)
                half_model = place / builder.HALF_PRECISION_MODEL
            source = half_model
        watched = _run(attempt, _request(attempt, identity, place, "build", source, settings), settings)
        knows = watched.knows or knows
        attempts.append(_described(rung.name, dict(settings), watched))
        _raise_refusal(watched)
        if watched.answer is not None and not watched.out_of_memory:
            return _Outcome(
                place.name, rung.name, identity, dict(settings), watched.answer, attempts, half_model
            )
        if not watched.out_of_memory:
            _raise_without_answer(attempt, watched)
        if builder.is_workspace_too_small(watched.outcome, settings.get("workspace_mib")):
            del settings["workspace_mib"]  # that rung was one too many
    _raise_out_of_memory(attempt, attempts, may_give_up)


def _is_no_smaller(workspace_mib: int, limit: Optional[int]) -> bool:
    return limit is not None and limit // builder.MIB <= workspace_mib


def _raise_refusal(watched: _Watched) -> None:
    error = None if watched.answer is None else builder.error_in(watched.answer)
    if error is not None:
        raise error


def _raise_without_answer(attempt: _Attempt, watched: _Watched) -> None:
    if watched.answer is None:
        raise BuildError(f"{attempt.model_file}: {attempt.who} {watched.outcome}")


def _raise_out_of_memory(
    attempt: _Attempt, attempts: Sequence[Mapping[str, Any]], may_give_up: Sequence[str]
) -> NoReturn:
    tried = "; ".join(
        f"{one['name']}: {one['outcome'][len(_NO_MEMORY) :]} (peak {one['peak_rss_mb'] or 0:.0f} MiB)"
        for one in attempts
        if one["outcome"].startswith(_NO_MEMORY)
    )
    limit = "" if attempt.limit is None else f" of {attempt.limit / builder.MIB:.0f} MiB"
    advice = ["raise the limit (--memory)" if attempt.limit is not None else "free memory or add swap"]
    if "fp32" not in may_give_up and attempt.identity["precision"] == "fp32":
        advice.append("allow half precision (--may-give-up fp32), which changes the numbers")
    if "dynamic_batch" not in may_give_up and attempt.identity["batch"] is not None:
        advice.append("allow a fixed batch (--may-give-up dynamic_batch)")
    raise BuildError(
        f"{attempt.model_file}: {attempt.who} does not get by with the memory{limit}; {tried}. "
        f"What helps: {', or '.join(advice)}"
    )


def _described(name: str, settings: Mapping[str, Any], watched: _Watched) -> Dict[str, Any]:
    return {
        "name": name,
        "settings": dict(settings),
        "outcome": watched.outcome,
        "seconds": round(watched.seconds, 3),
        "peak_rss_mb": watched.peak_rss_mb,
        "peak_gpu_mb": watched.peak_gpu_mb,
        "samples": watched.samples,
    }


def _request(
    attempt: _Attempt,
    identity: Mapping[str, Any],
    place: Path,
    task: str,
    source: Path,
    settings: Mapping[str, Any],
) -> builder.Request:
    is_rtx = identity["flavour"] == "tensorrt_rtx"
    targets = identity["compute_capabilities"]
    has_driver = attempt.machine.gpu is not None or attempt.machine.driver is not None
    return builder.Request(
        task=task,
        flavour=identity["flavour"],
        who=attempt.who,
        onnx=str(source.resolve()),
        name=str(attempt.model_file),
        folder=str(place.resolve()),
        precision=identity["precision"],
        image=attempt.spec.input.name,
        tensors=_expected_tensors(attempt.spec, is_detector=attempt.plugin is not None),
        batch=identity["batch"],
        settings=dict(settings),
        plugin=None if attempt.plugin is None else str(attempt.plugin),
        plugin_creator=[fuse.PLUGIN, fuse.PLUGIN_VERSION, fuse.DOMAIN],
        version_compatible=identity["version_compatible"],
        hardware_compatibility=identity["hardware_compatibility"],
        compute_capabilities=[] if targets == ["default"] else list(targets),
        timing_cache=None if is_rtx else str(timing_cache_file(identity, attempt.machine)),
        can_load_plans=attempt.machine.gpu is not None,
        data_limit=None if has_driver or attempt.limit is None else attempt.limit + _UNTOUCHED,
        progress=None,
        again=f"run `odtrt {'fuse' if attempt.plugin is not None else 'convert'}` again",
    )


def timing_cache_file(identity: Mapping[str, Any], machine: passport.Machine) -> Path:
    """Where the timings of one library version on one GPU are kept, for all models of this user."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    name = f"{identity['flavour']}-{identity['version']}-{machine.gpu or 'no-gpu'}"
    return Path(root) / "odtrt" / "timing" / (re.sub(r"[^A-Za-z0-9.-]+", "_", name) + ".cache")


def _expected_tensors(spec: DetectorSpec, *, is_detector: bool) -> Dict[str, Any]:
    """Every input and output of the network: name -> [shape, type]; -1 is a dynamic batch."""
    batch = -1 if spec.input.batch is None else spec.input.batch
    heads, most = spec.heads, spec.nms.max_total_detections
    shapes: Dict[str, List[int]] = {spec.input.name: [batch, 3, spec.input.height, spec.input.width]}
    if is_detector:
        if fuse.has_clip_windows(spec):
            shapes[fuse.CLIP_WINDOWS] = [batch, 4]
        shapes["num_detections"], shapes["boxes"] = [batch], [batch, most, 4]
        shapes["scores"] = shapes["classes"] = [batch, most]
    else:
        shapes[heads.box_encodings] = [batch, heads.num_anchors, 4]
        shapes[heads.class_logits] = [batch, heads.num_anchors, heads.num_columns]
    return {
        name: [shape, "int32" if is_detector and name in fuse.INTEGER_OUTPUTS else "float32"]
        for name, shape in shapes.items()
    }


def _judge_precision(model_file: Path, precision: str, answer: Mapping[str, Any]) -> None:
    """Half precision that was asked for must be there, in the layers that do the work."""
    if precision != "fp16":
        return
    computing = answer["computing_by_precision"]
    total, half = sum(computing.values()), computing.get("fp16", 0) + computing.get("int8", 0)
    if answer["layers_counted_in"] == "network" and not answer["builder"]["strongly_typed"]:
        if answer["builder"]["fp16_flag"]:
            return  # the flag's effect shows in an engine only
        half = 0
    if total and half < 0.5 * total:
        raise CheckError(
            f"{model_file}: fp16 was asked for, but of {total} convolutions and matrix products "
            f"{total - half} are not in half precision, as the {answer['layers_counted_in']} says "
            f"({', '.join(f'{count} {name}' for name, count in sorted(computing.items()))}); nothing was "
            "installed: check the model for weights that are float32 between casts, or build with fp32"
        )


# ---- One process ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Watched:
    """How a process went. samples: [seconds, resident MiB, GPU MiB or None], at most 200."""

    outcome: str
    out_of_memory: bool
    answer: Optional[Dict[str, Any]]
    knows: Optional[List[str]]
    seconds: float
    peak_rss_mb: Optional[float]
    peak_gpu_mb: Optional[float]
    samples: List[List[Optional[float]]]


def _run(attempt: _Attempt, request: builder.Request, settings: Mapping[str, Any]) -> _Watched:
    """Runs one request in a process and watches it."""
    place = Path(request.folder)
    answer_file = place / builder.ANSWER
    with contextlib.suppress(FileNotFoundError):
        answer_file.unlink()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    request = dataclasses.replace(request, progress=writing)
    request_file = place / f"{request.task}.json"
    request_file.write_text(json.dumps(dataclasses.asdict(request)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_import_paths())}
    environment["TMPDIR"] = str(place)  # what a killed process leaves goes with the attempt
    if settings.get("frugal_heap"):
        environment.update(_FRUGAL_HEAP)
    errors_file = place / f"{request.task}.stderr"
    process = None
    try:
        with errors_file.open("wb") as errors, ctrl_c_later():
            process = subprocess.Popen(
                [sys.executable, "-m", "odtrt_lib.builder", str(request_file)],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=environment,
                pass_fds=(writing,),
                start_new_session=True,
            )
        os.close(writing)
        writing = -1
        watch = _Watch(process, attempt.limit, request.data_limit is not None or _has_rlimit())
        messages = _follow(watch, reading, attempt.progress)
    finally:
        if process is not None:
            if process.poll() is None:  # Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    answer = json.loads(answer_file.read_text()) if answer_file.is_file() else None
    said = errors_file.read_text(errors="replace")
    outcome, is_out_of_memory = _judge_ending(watch, process.returncode, answer, said)
    peak = max([watch.peak_rss_mb, (answer or {}).get("peak_rss_mb") or 0.0])
    return _Watched(
        outcome,
        is_out_of_memory,
        answer,
        next((message["knows"] for message in messages if "knows" in message), None),
        time.perf_counter() - watch.started,
        round(peak, 1) or None,
        watch.peak_gpu_mb,
        watch.samples,
    )


def _judge_ending(
    watch: _Watch, status: int, answer: Optional[Mapping[str, Any]], said: str
) -> Tuple[str, bool]:
    """How the process ended, in words, and whether memory was the reason."""
    watch.judge((answer or {}).get("peak_rss_mb") or 0.0)
    if watch.verdict is not None:
        return f"{_NO_MEMORY}{watch.verdict}", True
    if answer is not None:
        if answer.get("error") == "MemoryError":
            return f"{_NO_MEMORY}{one_line(answer['message'])}", True
        return ("built" if "error" not in answer else f"refused: {answer['message']}"), False
    last = one_line(said.strip().splitlines()[-1] if said.strip() else "it said nothing")
    if status == -signal.SIGKILL:
        return f"{_NO_MEMORY}{_KILLED}", True
    if builder.is_out_of_memory(said):
        return f"{_NO_MEMORY}{last}", True
    if status < 0:
        name = signal.Signals(-status).name
        under_limit = watch.is_under_rlimit and -status in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
        words = f"killed by signal {-status} ({name})"
        return (
            (f"{_NO_MEMORY}{words} under the memory limit", True)
            if under_limit
            else (
                f"ended without an answer, {words}: {last}",
                False,
            )
        )
    return f"ended without an answer, exit status {status}: {last}", False


class _Watch:
    """The watchdog over one process: samples its memory, ends it beyond the limit or when it hangs."""

    def __init__(self, process: Any, limit: Optional[int], is_under_rlimit: bool) -> None:
        self.process, self.limit, self.is_under_rlimit = process, limit, is_under_rlimit
        self.started = time.perf_counter()
        self.verdict: Optional[str] = None
        self.peak_rss_mb = 0.0
        self.peak_gpu_mb: Optional[float] = None
        self.samples: List[List[Optional[float]]] = []
        self._gpu, self._is_shared = _device_memory_meter()
        self._gpu_before = self._gpu()
        self._every, self._next = _LOOK_SECONDS, 0.0
        self._busy, self._busy_at = -1, self.started

    def look(self) -> None:
        """One look, some fifty a second."""
        now = time.perf_counter() - self.started
        rss = _rss_mb(self.process.pid)
        if not rss:  # it has ended
            return
        gpu = None
        if self._gpu_before is not None:
            used = self._gpu()
            gpu = None if used is None else round(max(0.0, used - self._gpu_before), 1)
        self.peak_rss_mb = max(self.peak_rss_mb, rss, builder.peak_rss_mb(self.process.pid) or 0.0)
        if gpu is not None:
            self.peak_gpu_mb = max(self.peak_gpu_mb or 0.0, gpu)
        if now >= self._next:
            self.samples.append([round(now, 3), rss, gpu])
            self._next = now + self._every
            if len(self.samples) > _MOST_SAMPLES:
                del self.samples[1::2]
                self._every = max(2 * self._every, 2 * now / _MOST_SAMPLES)
        self.judge(self.peak_rss_mb)
        if self.verdict is None and self.is_under_rlimit:
            self._look_for_a_hang()
        if self.verdict is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def judge(self, peak_rss_mb: float) -> None:
        """Holds the peak against the limit. The process's own account of it may come after its end."""
        taken = max(peak_rss_mb, (self.peak_gpu_mb or 0.0) if self._is_shared else 0.0)
        if self.limit is not None and self.verdict is None and taken > self.limit / builder.MIB:
            self.verdict = f"stopped at {taken:.0f} MiB, the limit is {self.limit / builder.MIB:.0f} MiB"

    def _look_for_a_hang(self) -> None:
        state, busy = _state_and_ticks(self.process.pid)
        now = time.perf_counter()
        if busy != self._busy or state not in "S":
            self._busy, self._busy_at = busy, now
        elif now - self._busy_at > _STALL_SECONDS:
            self.verdict = f"hung after it met the memory limit ({_STALL_SECONDS:.0f} s without any work)"


def _follow(watch: _Watch, reading: int, progress: Progress) -> List[Dict[str, Any]]:
    """Looks at the process and passes on its progress until it ends; returns what it said."""
    messages: List[Dict[str, Any]] = []
    rest, is_open = b"", True
    while True:
        has_ended = watch.process.poll() is not None
        ready = select.select([reading] if is_open else [], [], [], 0 if has_ended else _LOOK_SECONDS)[0]
        if ready:
            data = os.read(reading, 65536)
            is_open = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                messages.append(message)
                if "phase" in message:
                    progress(message["phase"], message["fraction"])
        elif has_ended:
            return messages
        watch.look()


def _import_paths() -> Iterator[str]:
    """Where a child looks for modules: where this process does, a notebook's additions included."""
    yield str(Path(__file__).resolve().parent.parent)
    for path in sys.path:
        if path and Path(path).is_dir() and Path(path).name != "odtrt_lib":
            yield str(Path(path).resolve())


def _has_rlimit() -> bool:
    kinds = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)


def _rss_mb(process: int) -> Optional[float]:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / builder.MIB, 1)


def _state_and_ticks(process: int) -> Tuple[str, int]:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return "?", -1


def _meminfo() -> Dict[str, int]:
    """/proc/meminfo in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _device_memory_meter() -> Tuple[Callable[[], Optional[float]], bool]:
    """A function for the MiB in use on the first visible GPU, and whether that is the host's memory.

    A Jetson's is; there it is what is gone from MemAvailable. Elsewhere NVML tells, without a CUDA context.
    The function gives None where there is no GPU.
    """
    if Path("/etc/nv_tegra_release").exists():
        return _used_host_mb, True
    try:
        nvml: Any = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return lambda: None, False

    class Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    device, memory = ctypes.c_void_p(), Memory()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    index = int(first) if first.isdigit() else 0
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return lambda: None, False

    def used_mb() -> Optional[float]:
        if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
            return None
        return float(memory.used) / builder.MIB

    return used_mb, False


def _used_host_mb() -> Optional[float]:
    known = _meminfo()
    if "MemAvailable" not in known:
        return None
    return (known["MemTotal"] - known["MemAvailable"]) / builder.MIB
