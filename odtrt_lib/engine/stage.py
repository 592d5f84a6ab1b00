"""Chapter 3: ``heads.onnx`` -> a TensorRT plan in ``plans/``, with its passport beside it.

With the plugin (``plugins/tensorrt``), ``detector.onnx`` is built, and the plan does the post-processing too.

A plan belongs to one library version, one precision and one kind of GPU. Its fingerprint covers all of them.
So plans for several targets lie side by side, and none is taken for another; see
:mod:`odtrt_lib.engine.passport`.

**Precision.** Strongly typed networks are used if the library has them (TensorRT 9 and newer, TensorRT-RTX).
TensorRT then computes in the types of the ONNX model, so half precision is written into the model
(:mod:`odtrt_lib.engine.half`). TensorRT 8.5 and 8.6 have only a builder flag. TensorRT 10 has the flag too,
but it is not used there: it only permits half precision and leaves the choice to timings, so two builds can
differ. TensorRT 11 has dropped it. After the build, layers are counted by precision: by the engine's
inspector if a GPU can load the engine, otherwise in the network. If half precision was asked for and is not
there, this is an error. An ONNX model that has QuantizeLinear and DequantizeLinear nodes (chapter 6) is built
as it is, in either precision; nothing is calibrated here.

**Memory.** Each attempt is a process of its own (:mod:`odtrt_lib.engine.builder`), so the kernel can kill it
without harm to the caller. If an attempt runs out of memory, the next step of
:mod:`odtrt_lib.engine.fallback` is tried. A watchdog enforces the limit: it reads the attempt's resident
memory fifty times a second and ends the attempt beyond the limit. Without a GPU, RLIMIT_DATA is set too, a
little above the limit. With a GPU it is not, because CUDA reserves far more address space than it uses; for
the same reason RLIMIT_AS is never set. An rlimit alone is not enough: TensorRT-RTX 1.7.1 can wait for ever
for a thread that the rlimit stopped. So an attempt that sleeps without using the processor is ended too. On a
Jetson, where the GPU has no memory of its own, the GPU's share counts as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from odtrt_lib.engine import builder, passport
from odtrt_lib.engine.bindings import TF32_OVERRIDE, available_runtimes
from odtrt_lib.engine.fallback import BuildJob, Outcome, build_with_fallback, reduced
from odtrt_lib.engine.watch import Progress
from odtrt_lib.errors import CheckError, InputError, MissingDependencyError
from odtrt_lib.folder import (
    StageResult,
    check_seal,
    part_sha256,
    read_log,
    require,
    sealed,
    sha256,
    staging,
    write_record,
)
from odtrt_lib.machine import MIB, free_memory, this_machine
from odtrt_lib.spec import DetectorSpec, load_spec
from odtrt_lib.variants import (
    ALLOWABLE,
    HARDWARE_COMPATIBILITIES,
    PRECISIONS,
    RUNTIME_LIBRARIES,
    Variant,
    models,
)

# The smallest, best-tuned and largest batch that a model with a dynamic batch gets by default.
DYNAMIC_BATCH = (1, 1, 8)

_INSTALL_TENSORRT = (
    "run `pip install -e '.[engine]'` on a PC (TensorRT-RTX; no GPU is needed to build); on a Jetson "
    "TensorRT comes with JetPack: `sudo apt install nvidia-jetpack`"
)
_NO_TIMING_CACHE = (
    "none: TensorRT-RTX's does nothing since 1.2; it compiles kernels when a plan is loaded, and keeps those"
)
_IN_WORDS = {"fp16": "half precision"}


def fingerprint(identity: Mapping[str, Any]) -> str:
    """The name of a plan: 16 hexadecimal digits of the SHA-256 over everything that distinguishes plans.

    identity: JSON values: model, runtime_library, version, precision, onnx_sha256, plugin, batch, the
    compatibility modes, the compute capabilities, for TensorRT the GPU's name and compute capability, and
    if it is set :data:`TF32_OVERRIDE`.
    """
    text = json.dumps(passport.with_json_keys(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_memory(text: str) -> int:
    """A memory limit in bytes, from ``1500MiB``, ``2GiB``, ``1500MB``, or ``60%`` of the memory that is free
    now.

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
    if limit < 64 * MIB:
        raise InputError(f"memory {text!r}: expected at least 64MiB; TensorRT's libraries alone take that")
    return limit


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
    allow: Sequence[str] = (),
    force: bool = False,
    progress: Optional[Progress] = None,
) -> StageResult:
    """Writes a plan and its passport into ``plans/`` for the installed TensorRT.

    precision: ``fp32``, or ``fp16``: weights and arithmetic in half precision, inputs and outputs float32. An
    ONNX model whose weights are half precision already is built as it is, as ``fp16`` only. plugin:
    ``libodtrt_tensorrt.so``; with it ``detector.onnx`` is built, not ``heads.onnx``. The plugin must be
    loaded before the plan. batch: smallest, best-tuned and largest batch of a model with a dynamic batch;
    :data:`DYNAMIC_BATCH`. memory: the most host memory that the build may have, see :func:`parse_memory`; on
    a Jetson, whose GPU has none of its own, the GPU's share included. None: no limit but the machine's.
    version_compatible: newer TensorRT versions can load the plan too. hardware_compatibility: ``none``,
    ``ampere_plus`` (any GPU from Ampere on) or ``same_compute_capability``. compute_capabilities: the GPUs
    that TensorRT-RTX builds for, e.g. ``("8.6", "8.9")``; None or ``("default",)`` is its own choice. allow:
    names of :data:`odtrt_lib.variants.ALLOWABLE`: changes to the plan that are made if memory does not
    suffice otherwise. ``dynamic_batch``: a plan for the best-tuned batch only; ``fp32``: one in half
    precision. progress: is called with the phase and the fraction of the attempt that is done, 0 to 1. force:
    build even if an intact plan of an earlier call with the same arguments is there.

    The inputs and outputs of the network are compared with ``spec.json``. If there is a GPU, the plan is
    loaded on it to inspect it; a build with TensorRT-RTX needs no GPU. If several calls build from one model
    at the same time, one builds and the others wait. ``result.record["outputs"]`` names the files::

        result = engine.build("out/parts", precision="fp16", memory="60%")

    Raises InputError if a file is absent or not ONNX, or an argument is malformed; MissingDependencyError if
    TensorRT is absent, or onnx, which fp16 needs; UnsupportedError for what the library cannot do, for
    weights that do not fit into half precision, and for a network with a dynamic height or width; BuildError
    if TensorRT refuses the model or the plugin (it names the node), or if memory does not suffice (it names
    every step with its peak); CheckError if the network is not the one that ``spec.json`` describes, or if
    half precision was asked for and the layers run in single precision.

    Long because its options and errors are described here.
    """
    started = time.perf_counter()
    _check_arguments(precision, hardware_compatibility, allow)
    limit = None if memory is None else parse_memory(memory)
    tell: Progress = progress or (lambda phase, fraction: None)
    job = _job(Path(folder), precision, plugin, limit, tell)
    options = {
        "batch": _batch_profile(job.spec, batch),
        "version_compatible": version_compatible,
        "hardware_compatibility": hardware_compatibility,
        "compute_capabilities": _targets(job.identity["runtime_library"], compute_capabilities),
    }
    job = dataclasses.replace(job, identity={**job.identity, **options})
    with _one_build_at_a_time(job.model_file, tell):
        finished = None if force else _finished(job, allow)
        if finished is not None:
            return StageResult(finished, True)
        return StageResult(_build(job, allow, started), False)


def _job(
    folder: Path, precision: str, plugin: Union[str, Path, None], limit: Optional[int], progress: Progress
) -> BuildJob:
    """Reads and checks the model folder, the plugin and the installed library.

    The job's identity does not have the options yet: batch, compatibility, compute capabilities.
    """
    variant = Variant(precision, "heads" if plugin is None else "plugin")
    library_file = None if plugin is None else Path(plugin).resolve()
    if library_file is not None and not library_file.is_file():
        raise InputError(f"{library_file}: not found; {passport.BUILD_PLUGIN}")
    model_file = require(folder, variant.file, variant.command)
    hashes = check_seal(folder, variant.file, "spec.json")
    spec_content = sealed(folder, "spec.json")["spec.json"]
    if hashlib.sha256(spec_content).hexdigest() != hashes["spec.json"]:
        raise InputError(f"{folder}: the model was replaced meanwhile; build again")
    part = models()[variant.file].spec_part
    runtime_library, version = _preferred_runtime()
    machine = this_machine()
    library = None if library_file is None else passport.plugin_identity(library_file)
    tf32_override = {"tf32_override": os.environ[TF32_OVERRIDE]} if TF32_OVERRIDE in os.environ else {}
    job = BuildJob(
        folder=folder,
        model_file=model_file,
        variant=variant,
        spec=load_spec(folder / "spec.json", spec_content),
        spec_sha256=hashes["spec.json"],
        of_spec={part: part_sha256(spec_content, part)},
        weights=builder.weights_by_type(model_file),
        machine=machine,
        plugin=library_file,
        library=library,
        identity={
            "model": variant.file,
            "runtime_library": runtime_library,
            "version": version,
            "precision": precision,
            "onnx_sha256": hashes[variant.file],
            "plugin": None if library is None else dataclasses.asdict(library),
            "gpu": [machine.gpu, machine.compute_capability] if runtime_library == "tensorrt" else None,
            **tf32_override,
        },
        limit=limit,
        progress=progress,
    )
    if job.is_half and precision != "fp16":
        raise InputError(f"{model_file}: its weights are half precision already; build it with fp16")
    return job


def _build(job: BuildJob, allow: Sequence[str], started: float) -> Dict[str, Any]:
    """Builds and installs the plan; returns its record."""
    with staging(job.folder) as out:
        outcome = build_with_fallback(job, out, allow)
        _require_precision(job.model_file, outcome)
        if sha256(job.model_file) != job.identity["onnx_sha256"]:
            raise InputError(f"{job.model_file}: changed during the build; nothing was written: build again")
        described = _described(job, outcome, out, started)
        weights = _weights_of_half(outcome) or job.weights
        passport.install(job.folder, out / outcome.place / builder.PLAN, described)
        for place in out.iterdir():
            shutil.rmtree(place)
    return _record(job.folder, described, _checks(outcome.answer, weights))


def _described(job: BuildJob, outcome: Outcome, out: Path, started: float) -> passport.Passport:
    """The passport of the plan that was built."""
    identity, answer = outcome.identity, outcome.answer
    plan = out / outcome.place / builder.PLAN
    name, digest = fingerprint(identity), sha256(plan)
    tf32_override = {key: identity[key] for key in ("tf32_override",) if key in identity}
    return passport.Passport(
        fingerprint=name,
        plan=passport.plan_name(name, digest),
        plan_sha256=digest,
        plan_bytes=plan.stat().st_size,
        model=job.variant.file,
        onnx_sha256=identity["onnx_sha256"],
        spec_sha256=job.spec_sha256,
        runtime_library=identity["runtime_library"],
        version=identity["version"],
        precision=identity["precision"],
        version_compatible=identity["version_compatible"],
        hardware_compatibility=identity["hardware_compatibility"],
        compute_capabilities=tuple(identity["compute_capabilities"]),
        plugin=job.library,
        machine=job.machine,
        settings={
            "batch_min_opt_max": list(identity["batch"] or (job.spec.input.batch,) * 3),
            "fallback_step": outcome.step,
            "asked": fingerprint(job.identity),
            "memory_limit_mb": None if job.limit is None else round(job.limit / MIB, 1),
            **answer["builder"],
            **tf32_override,
            **job.of_spec,
            **outcome.settings,
            "timing_cache": answer["timing_cache"] or _NO_TIMING_CACHE,
            "layers_counted_in": answer["layers_counted_in"],
        },
        layers=answer["layers_by_precision"],
        attempts=tuple(outcome.attempts),
        trtexec=answer["trtexec"],
        seconds=round(time.perf_counter() - started, 3),
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _checks(answer: Mapping[str, Any], weights: Mapping[str, int]) -> Dict[str, Any]:
    return {
        "inputs_and_outputs_match_spec": True,
        "layers": answer["layers"],
        "layers_by_precision": answer["layers_by_precision"],
        "layers_counted_in": answer["layers_counted_in"],
        "half_precision_weights": weights.get("FLOAT16", 0),
        "single_precision_weights": weights.get("FLOAT", 0),
        "loaded_on_a_gpu": True if answer["layers_counted_in"] == "engine" else None,
    }


def _weights_of_half(outcome: Outcome) -> Dict[str, int]:
    """Weights by type in the half-precision model that was written for this plan; empty if none was."""
    if outcome.identity["precision"] != "fp16" or outcome.half_model is None:
        return {}
    return builder.weights_by_type(outcome.half_model)


@contextlib.contextmanager
def _one_build_at_a_time(model_file: Path, tell: Progress) -> Iterator[None]:
    """Holds a lock while the block runs, so that no two processes build from this file at the same time."""
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


def _check_arguments(precision: str, hardware_compatibility: str, allow: Sequence[str]) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if hardware_compatibility not in HARDWARE_COMPATIBILITIES:
        raise InputError(
            f"hardware_compatibility {hardware_compatibility!r}: expected one of "
            + ", ".join(HARDWARE_COMPATIBILITIES)
        )
    for one in allow:
        if one not in ALLOWABLE:
            raise InputError(f"allow {one!r}: expected one of {', '.join(ALLOWABLE)}")


def _batch_profile(spec: DetectorSpec, batch: Optional[Sequence[int]]) -> Optional[List[int]]:
    """Checks ``batch``; returns the smallest, best-tuned and largest batch, None if the model's is fixed."""
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


def _targets(runtime_library: str, compute_capabilities: Optional[Sequence[str]]) -> List[str]:
    wanted = list(compute_capabilities or ())
    if runtime_library == "tensorrt_rtx":
        wanted = wanted or ["default"]
    elif wanted == ["default"]:
        wanted = []
    for text in wanted:
        if text != "default" and not re.fullmatch(r"\d{1,2}\.\d", text):
            raise InputError(f"compute capability {text!r}: expected a form such as 8.6")
    return sorted(
        set(wanted), key=lambda text: [int(part) for part in text.split(".")] if "." in text else []
    )


def _preferred_runtime() -> Tuple[str, str]:
    found = available_runtimes()
    if not found:
        raise MissingDependencyError(
            f"no TensorRT can be imported (looked for {' and '.join(RUNTIME_LIBRARIES)}): {_INSTALL_TENSORRT}"
        )
    return found[0]


# ---- Plans that exist already ------------------------------------------------------------------------------


def _finished(job: BuildJob, allow: Sequence[str]) -> Optional[Dict[str, Any]]:
    """The record of an intact plan for this job, also of one with changes that ``allow`` names; or None."""
    asked = fingerprint(job.identity)
    for count in range(len(ALLOWABLE) + 1):
        used = [name for name in ALLOWABLE[:count] if name in allow]
        found = _intact(job, fingerprint(reduced(job.identity, used)), asked)
        if found is not None:
            return found
    return None


def _intact(job: BuildJob, name: str, asked: str) -> Optional[Dict[str, Any]]:
    """The record of the plan ``name`` if it is intact, was built for the fingerprint ``asked``, and was
    compared with this spec; otherwise None."""
    folder = job.folder
    try:
        known = passport.read(folder / passport.PLANS / f"{name}.json")
    except InputError:
        return None
    if asked not in (name, known.settings.get("asked")):
        return None
    is_of_spec = job.of_spec.items() <= known.settings.items()
    if known.spec_sha256 != job.spec_sha256 and not is_of_spec:
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
            "runtime_library": described.runtime_library,
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
        versions={described.runtime_library: described.version},
        seconds=described.seconds,
        peak_rss_mb=max(peaks, default=0.0),
        checks=checks,
    )


def _require_precision(model_file: Path, outcome: Outcome) -> None:
    """Raises CheckError unless half of the convolutions and matrix products have the precision asked for."""
    precision, answer = outcome.identity["precision"], outcome.answer
    layers = PRECISIONS[precision].layers
    if not layers:
        return
    computing = answer["computing_by_precision"]
    total, there = sum(computing.values()), sum(computing.get(name, 0) for name in layers)
    if answer["layers_counted_in"] == "network" and not answer["builder"]["strongly_typed"]:
        if answer["builder"]["fp16_flag"]:
            return  # only an engine shows the flag's effect
        there = 0
    if total and there < 0.5 * total:
        raise CheckError(
            f"{model_file}: {precision} was asked for, but of {total} convolutions and matrix products "
            f"{total - there} are not in {_IN_WORDS.get(precision, precision)}, as the "
            f"{answer['layers_counted_in']} says "
            f"({', '.join(f'{count} {name}' for name, count in sorted(computing.items()))}); nothing was "
            "installed: check the model for weights that are float32 between casts, or build with fp32"
        )
