"""What a build tries if memory does not suffice: the steps of :data:`FALLBACK`, one after the other."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple

from odtrt_lib.engine import builder
from odtrt_lib.engine.passport import PluginIdentity
from odtrt_lib.engine.watch import NO_MEMORY, UNTOUCHED_RLIMIT_ALLOWANCE, Progress, RunResult, run
from odtrt_lib.errors import BuildError
from odtrt_lib.machine import MIB, Machine
from odtrt_lib.spec import DetectorSpec
from odtrt_lib.tensors import detector_tensors, heads_tensors
from odtrt_lib.variants import RUNTIME_LIBRARIES, Variant

_WRITE_HALF = "write half precision into the ONNX"


@dataclasses.dataclass(frozen=True)
class FallbackStep:
    """What is tried next if a build ran out of memory. It keeps the settings of the steps before it.

    setting: one of :func:`odtrt_lib.engine.builder.known_settings` and its value; the step is skipped if the
    library lacks it. allowance: one of :data:`odtrt_lib.variants.ALLOWABLE`, a change to the plan; the step
    is skipped if the caller did not allow it.
    """

    name: str
    setting: Optional[Tuple[str, Any]] = None
    allowance: Optional[str] = None


FALLBACK = (
    FallbackStep("as asked"),
    FallbackStep("small workspace", ("workspace_mib", 256)),
    FallbackStep("no library tactics", ("tactic_sources", "none")),
    FallbackStep("lowest optimisation level", ("optimization_level", 0)),
    FallbackStep("frugal heap", ("frugal_heap", True)),
    FallbackStep("static batch", allowance="dynamic_batch"),
    FallbackStep("half precision", allowance="fp32"),
)


# For glibc: it returns every block of 64 KiB or more as soon as it is free, and has one heap for all threads.
_FRUGAL_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


@dataclasses.dataclass(frozen=True)
class BuildJob:
    """One plan to build: its inputs, which are checked already, and what the caller asked for.

    of_spec: the part of ``spec.json`` that goes into the plan -> its SHA-256. weights: ONNX type -> how many
    elements the model's weights of that type have. library: the plugin's identity. identity: what the plan's
    fingerprint covers, see :func:`odtrt_lib.engine.stage.fingerprint`. limit: bytes of host memory, or None.
    progress: is called with the phase and the fraction of it that is done, 0 to 1.
    """

    folder: Path
    model_file: Path
    variant: Variant
    spec: DetectorSpec
    spec_sha256: str
    of_spec: Dict[str, Optional[str]]
    weights: Dict[str, int]
    machine: Machine
    plugin: Optional[Path]
    library: Optional[PluginIdentity]
    identity: Dict[str, Any]
    limit: Optional[int]
    progress: Progress

    @property
    def is_half(self) -> bool:
        """Whether the model's weights are half precision already."""
        return self.weights.get("FLOAT16", 0) > self.weights.get("FLOAT", 0)

    @property
    def who(self) -> str:
        """The library and its version, for messages."""
        return f"{RUNTIME_LIBRARIES[self.identity['runtime_library']]} {self.identity['version']}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A plan that was built. place: its folder in the staging folder. step: the name of the
    :class:`FallbackStep` that succeeded. identity: that of the plan, which can differ from the job's."""

    place: str
    step: str
    identity: Dict[str, Any]
    settings: Dict[str, Any]
    answer: Dict[str, Any]
    attempts: List[Dict[str, Any]]
    half_model: Optional[Path]


def reduced(identity: Mapping[str, Any], allowed: Sequence[str]) -> Dict[str, Any]:
    """The identity of the plan that is built if every change in ``allowed`` is made."""
    changed = dict(identity)
    if "dynamic_batch" in allowed and changed["batch"] is not None:
        changed["batch"] = [changed["batch"][1]] * 3
    if "fp32" in allowed and changed["precision"] == "fp32":
        changed["precision"] = "fp16"
    return changed


def build_with_fallback(job: BuildJob, out: Path, allow: Sequence[str]) -> Outcome:
    """Tries the steps of :data:`FALLBACK` in order until a plan is built.

    out: a folder for the attempts' files. Raises BuildError if the library refuses the model, or if memory
    suffices for no step; the message then lists each step with its peak.
    """
    attempts: List[Dict[str, Any]] = []
    knows: Optional[List[str]] = None
    settings: Dict[str, Any] = {}
    used: List[str] = []
    half_model: Optional[Path] = None
    for number, step in enumerate(FALLBACK):
        if not _applies(step, job, knows, allow):
            continue
        if step.setting is not None:
            settings[step.setting[0]] = step.setting[1]
        if step.allowance is not None:
            used.append(step.allowance)
        identity = reduced(job.identity, used)
        place = out / f"attempt-{number}"
        place.mkdir()
        if attempts:
            job.progress(f"out of memory; next: {step.name}", 0.0)
        if job.limit is not None:
            settings.setdefault("workspace_mib", job.limit // MIB)
        source = job.model_file
        if _needs_half_model(job, identity):
            if half_model is None:
                result = _run(job, _request(job, identity, place, "half_precision", source, {}))
                attempts.append(_described(_WRITE_HALF, {}, result))
                _raise_refusal(result)
                if result.out_of_memory:
                    break  # no step reduces the memory that this conversion needs
                _raise_without_answer(job, result)
                half_model = place / builder.HALF_PRECISION_MODEL
            source = half_model
        result = _run(job, _request(job, identity, place, "build", source, settings))
        knows = result.knows or knows
        attempts.append(_described(step.name, dict(settings), result))
        _raise_refusal(result)
        if result.answer is not None and not result.out_of_memory:
            answer = result.answer
            return Outcome(place.name, step.name, identity, dict(settings), answer, attempts, half_model)
        if not result.out_of_memory:
            _raise_without_answer(job, result)
        if builder.is_workspace_too_small(result.outcome, settings.get("workspace_mib")):
            del settings["workspace_mib"]  # smaller than any tactic needs
    _raise_out_of_memory(job, attempts, allow)


def _applies(step: FallbackStep, job: BuildJob, knows: Optional[Sequence[str]], allow: Sequence[str]) -> bool:
    """Whether the step would change this build. knows: the library's settings; None: unknown yet."""
    if step.setting is not None:
        name, value = step.setting
        if knows is not None and name not in knows:
            return False
        if name == "workspace_mib" and job.limit is not None and job.limit // MIB <= value:
            return False
    if step.allowance is not None:
        changes = reduced(job.identity, [step.allowance]) != job.identity
        return step.allowance in allow and changes
    return True


def _needs_half_model(job: BuildJob, identity: Mapping[str, Any]) -> bool:
    """Whether the model must be converted: strongly typed networks take half precision from the ONNX."""
    if identity["precision"] != "fp16" or job.is_half:
        return False
    return not builder.is_weakly_typed(importlib.import_module(identity["runtime_library"]))


def _run(job: BuildJob, request: builder.Request) -> RunResult:
    variables = _FRUGAL_HEAP if request.settings.get("frugal_heap") else {}
    return run(request, job.limit, job.progress, variables)


def _raise_refusal(result: RunResult) -> None:
    error = None if result.answer is None else builder.error_in(result.answer)
    if error is not None:
        raise error


def _raise_without_answer(job: BuildJob, result: RunResult) -> None:
    if result.answer is None:
        raise BuildError(f"{job.model_file}: {job.who} {result.outcome}")


def _raise_out_of_memory(
    job: BuildJob, attempts: Sequence[Mapping[str, Any]], allow: Sequence[str]
) -> NoReturn:
    tried = "; ".join(
        f"{one['name']}: {one['outcome'][len(NO_MEMORY) :]} (peak {one['peak_rss_mb'] or 0:.0f} MiB)"
        for one in attempts
        if one["outcome"].startswith(NO_MEMORY)
    )
    limit = "" if job.limit is None else f" of {job.limit / MIB:.0f} MiB"
    advice = ["raise the limit (--memory)" if job.limit is not None else "free memory or add swap"]
    if "fp32" not in allow and job.identity["precision"] == "fp32":
        advice.append("allow half precision (--allow fp32), which changes the numbers")
    if "dynamic_batch" not in allow and job.identity["batch"] is not None:
        advice.append("allow a fixed batch (--allow dynamic_batch)")
    raise BuildError(
        f"{job.model_file}: {job.who} does not get by with the memory{limit}; {tried}. "
        f"What helps: {', or '.join(advice)}"
    )


def _described(name: str, settings: Mapping[str, Any], result: RunResult) -> Dict[str, Any]:
    return {
        "name": name,
        "settings": dict(settings),
        "outcome": result.outcome,
        "seconds": round(result.seconds, 3),
        "peak_rss_mb": result.peak_rss_mb,
        "peak_gpu_mb": result.peak_gpu_mb,
        "samples": result.samples,
    }


def _request(
    job: BuildJob,
    identity: Mapping[str, Any],
    place: Path,
    task: str,
    source: Path,
    settings: Mapping[str, Any],
) -> builder.Request:
    is_rtx = identity["runtime_library"] == "tensorrt_rtx"
    targets = identity["compute_capabilities"]
    has_driver = job.machine.gpu is not None or job.machine.driver is not None
    has_data_limit = job.limit is not None and not has_driver
    data_limit = (job.limit or 0) + UNTOUCHED_RLIMIT_ALLOWANCE if has_data_limit else None
    return builder.Request(
        task=task,
        runtime_library=identity["runtime_library"],
        who=job.who,
        onnx=str(source.resolve()),
        name=str(job.model_file),
        folder=str(place.resolve()),
        precision=identity["precision"],
        image=job.spec.input.name,
        tensors=_expected_tensors(job.spec, job.variant),
        batch=identity["batch"],
        settings=dict(settings),
        plugin=None if job.plugin is None else str(job.plugin),
        version_compatible=identity["version_compatible"],
        hardware_compatibility=identity["hardware_compatibility"],
        compute_capabilities=[] if targets == ["default"] else list(targets),
        timing_cache=None if is_rtx else str(timing_cache_file(identity, job.machine)),
        can_load_plans=job.machine.gpu is not None,
        data_limit=data_limit,
        progress=None,
        again=f"run `odtrt {job.variant.command}` again",
    )


def timing_cache_file(identity: Mapping[str, Any], machine: Machine) -> Path:
    """The file with the timings of one library version on one GPU, for all models of this user."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    name = f"{identity['runtime_library']}-{identity['version']}-{machine.gpu or 'no-gpu'}"
    return Path(root) / "odtrt" / "timing" / (re.sub(r"[^A-Za-z0-9.-]+", "_", name) + ".cache")


def _expected_tensors(spec: DetectorSpec, variant: Variant) -> Dict[str, Any]:
    """Every input and output of the network: name -> [shape, type]; -1 is a dynamic batch."""
    tensors = heads_tensors(spec) if variant.form == "heads" else detector_tensors(spec)
    return {
        tensor.name: [[-1 if size is None else size for size in tensor.shape], tensor.dtype]
        for tensor in tensors.all
    }
