"""Decides whether a plan may be used on this machine now.

:func:`check` compares a plan's passport (:mod:`odtrt_lib.engine.passport`) with the machine and the library
that would run it, by the rows of :data:`POLICY`. :func:`best_plan` picks the newest plan of a folder that
passes.

Sources of the rules, as the rows name them:

* EC11: docs.nvidia.com, TensorRT 11.1, "Engine Compatibility".
* SM114: docs.nvidia.com, TensorRT 11.4.1, "Support Matrix", "Engine Portability".
* DG86: TensorRT 8.6 Developer Guide, "Hardware Compatibility" and FAQ ("build the engine on one GPU and run
  it on another").
* NI: NvInfer.h of TensorRT 11, HardwareCompatibilityLevel.
* RTX: docs.nvidia.com, TensorRT-RTX, "Engine Compatibility" and "CPU-Only AOT and TensorRT-RTX Engines".
* H200: observed with TensorRT-RTX 1.4.0.76 on an H200 (benchmarks/engine_gpu.py).
* odtrt: a precaution of this project.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from odtrt_lib.engine import passport as passports
from odtrt_lib.engine.bindings import TF32_OVERRIDE, available_runtimes
from odtrt_lib.engine.passport import PLANS, Passport, PluginIdentity
from odtrt_lib.errors import InputError
from odtrt_lib.folder import (
    SPEC_PARTS,
    is_outdated,
    known_sha256,
    part_sha256,
    recorded,
    undisturbed,
)
from odtrt_lib.machine import Machine, this_machine
from odtrt_lib.variants import RUNTIME_LIBRARIES


class Action(str, enum.Enum):
    """What to do with a plan.

    OK: load it. REBUILD: it is intact, but not for this machine, library or model. REFUSE: never give these
    bytes to the runtime here.
    """

    OK = "ok"
    REBUILD = "rebuild"
    REFUSE = "refuse"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of :func:`check`.

    reasons: one sentence for each row of :data:`POLICY` that decides, the gravest first. rebuild_helps: the
    plan is not OK, and a build on this machine would make one that is.
    """

    action: Action
    reasons: Tuple[str, ...]
    rebuild_helps: bool = False

    @property
    def word(self) -> str:
        """The action, for people; ``not here`` if a rebuild on this machine could not help."""
        is_of_elsewhere = self.action is Action.REBUILD and not self.rebuild_helps
        return "not here" if is_of_elsewhere else self.action.value


@dataclasses.dataclass(frozen=True)
class Environment:
    """The machine and the software that are to run a plan.

    runtime_library, version: those of the installed TensorRT, None if there is none. tf32_override: the value
    of the environment variable NVIDIA_TF32_OVERRIDE, None if it is not set.
    """

    machine: Machine
    runtime_library: Optional[str]
    version: Optional[str]
    plugin: Optional[PluginIdentity] = None
    tf32_override: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class PlanCheck:
    """One plan and one environment: the facts that the conditions of :data:`POLICY` need."""

    folder: Path
    passport: Passport
    here: Environment

    @cached_property
    def plan_bytes(self) -> Optional[int]:
        """The size of the plan's file, None if there is none."""
        try:
            return self._plan.stat().st_size if self._plan.is_file() else None
        except OSError:
            return None

    @cached_property
    def has_right_size(self) -> bool:
        return self.plan_bytes == self.passport.plan_bytes

    @cached_property
    def is_damaged(self) -> bool:
        return self.has_right_size and passports.verify(self.folder, self.passport) is not None

    @cached_property
    def header_version(self) -> Optional[str]:
        """The version in the plan's header; None if it is not understood, as before TensorRT 8.6."""
        is_known = self.passport.runtime_library == "tensorrt_rtx" or self.built >= (8, 6)
        return passports.plan_version(self._plan) if is_known else None

    @cached_property
    def changed(self) -> Tuple[str, ...]:
        """The files that have changed since the plan was built from them.

        A damaged file counts as the file that its stage wrote. Of ``spec.json`` only the part that goes into
        the plan counts. A model that belongs to an earlier export counts as changed.
        """
        expected = {self.passport.model: self.passport.onnx_sha256, "spec.json": self.passport.spec_sha256}
        found = {name: self._sealed.get(name) or self._sha256(name) for name in expected}
        changed = [name for name in expected if found[name] not in (None, expected[name])]
        if "spec.json" in changed and self._has_same_part:
            changed.remove("spec.json")
        if self.passport.model not in changed and self._is_outdated:
            changed.append(self.passport.model)
        return tuple(changed)

    @cached_property
    def damaged(self) -> Tuple[str, ...]:
        """The files whose content is not what their stages recorded."""
        found = {name: self._sha256(name) for name in (self.passport.model, "spec.json")}
        return tuple(name for name in found if found[name] not in (None, self._sealed.get(name, found[name])))

    @cached_property
    def absent(self) -> Tuple[str, ...]:
        """The files that a build needs and that are absent or cannot be read."""
        return tuple(name for name in (self.passport.model, "spec.json") if self._sha256(name) is None)

    @property
    def built(self) -> Tuple[int, ...]:
        """The version of the library that built the plan."""
        return version_order(self.passport.version)

    @property
    def installed(self) -> Tuple[int, ...]:
        """The version of the library here, () if there is none."""
        return version_order(self.here.version or "")

    @property
    def is_same_runtime_library(self) -> bool:
        return self.here.version is not None and self.here.runtime_library == self.passport.runtime_library

    @property
    def is_tensorrt(self) -> bool:
        """Whether TensorRT built the plan and is installed, so that TensorRT's version rules apply."""
        return self.is_same_runtime_library and self.passport.runtime_library == "tensorrt"

    @property
    def is_rtx(self) -> bool:
        return self.is_same_runtime_library and self.passport.runtime_library == "tensorrt_rtx"

    @property
    def step(self) -> int:
        """-1: the library here is older than the plan's. 0: they are the same, as far as is known. 1:
        newer."""
        pairs = list(zip(self.installed, self.built))
        return next((1 if one > other else -1 for one, other in pairs if one != other), 0)

    @property
    def is_same_major(self) -> bool:
        return self.installed[:1] == self.built[:1]

    @property
    def gpu_is_compared(self) -> bool:
        """Whether TensorRT built the plan on a known GPU, and this machine has a GPU."""
        return self.passport.runtime_library == "tensorrt" and self.has_gpu and self.built_on_known_gpu

    @property
    def has_gpu(self) -> bool:
        return self.here.machine.gpu is not None and self.here.machine.compute_capability is not None

    @property
    def built_on_known_gpu(self) -> bool:
        machine = self.passport.machine
        return machine.gpu is not None and machine.compute_capability is not None

    @property
    def is_same_capability(self) -> bool:
        return self.passport.machine.compute_capability == self.here.machine.compute_capability

    @property
    def is_same_model(self) -> bool:
        return self.is_same_capability and self.passport.machine.gpu == self.here.machine.gpu

    @property
    def is_same_size(self) -> bool:
        """Whether SM count and memory agree; memory within a tenth, because drivers reserve some of it."""
        built, here = self.passport.machine, self.here.machine
        if None not in (built.sm_count, here.sm_count) and built.sm_count != here.sm_count:
            return False
        if built.gpu_memory_mb is None or here.gpu_memory_mb is None:
            return True
        return abs(built.gpu_memory_mb - here.gpu_memory_mb) * 10 <= built.gpu_memory_mb

    @property
    def is_same_gpu(self) -> bool:
        return self.is_same_model and self.is_same_size

    @property
    def level(self) -> str:
        return self.passport.hardware_compatibility

    @property
    def is_jetson(self) -> bool:
        return self.here.machine.l4t is not None or self.passport.machine.l4t is not None

    @property
    def rtx_covers(self) -> bool:
        """Whether the GPU of this machine is among TensorRT-RTX's targets."""
        capability = self.here.machine.compute_capability or ""
        targets = self.passport.compute_capabilities
        return capability in targets or ("default" in targets and version_order(capability) >= (8, 0))

    @property
    def tf32_override(self) -> Optional[str]:
        """The value of NVIDIA_TF32_OVERRIDE at the build."""
        return self.passport.settings.get("tf32_override")

    @property
    def driver_is_older(self) -> bool:
        built, here = self.passport.machine.cuda, self.here.machine.cuda
        return built is not None and here is not None and version_order(here) < version_order(built)

    def words(self) -> Dict[str, Any]:
        """The values that are put into the sentences of :data:`POLICY`."""
        built, here, plan = self.passport.machine, self.here.machine, self.passport
        library = RUNTIME_LIBRARIES[plan.runtime_library]
        library_here = RUNTIME_LIBRARIES.get(self.here.runtime_library or "", "no TensorRT")
        return {
            "plan": plan.plan,
            "size": self.plan_bytes,
            "expected_size": plan.plan_bytes,
            "header": self.header_version,
            "built_by": f"{library} {plan.version}",
            "installed": f"{library_here} {self.here.version or ''}".strip(),
            "changed": " and ".join(self.changed),
            "absent": " and ".join(self.absent),
            "damaged": " and ".join(self.damaged),
            "built_system": f"{built.system} {built.architecture}",
            "system": f"{here.system} {here.architecture}",
            "built_gpu": _gpu_text(built),
            "gpu": _gpu_text(here),
            "built_size": _size_text(built),
            "gpu_size": _size_text(here),
            "level": self.level,
            "targets": ", ".join(plan.compute_capabilities).replace("default", "8.0 and newer"),
            "built_cuda": built.cuda,
            "cuda": here.cuda,
            "built_tf32": self.tf32_override or "not set",
            "tf32": self.here.tf32_override or "not set",
            "plugin": plan.plugin.file if plan.plugin else None,
            "built_abi": plan.plugin.abi if plan.plugin else None,
            "abi": self.here.plugin.abi if self.here.plugin else None,
        }

    @property
    def _plan(self) -> Path:
        return self.folder / passports.PLANS / self.passport.plan

    @cached_property
    def _sealed(self) -> Dict[str, str]:
        """Name -> SHA-256 of the files that ``log.jsonl`` records; empty if it cannot be read."""
        try:
            return {name: one.sha256 for name, one in recorded(self.folder).items()}
        except InputError:
            return {}

    @cached_property
    def _is_outdated(self) -> bool:
        try:
            return is_outdated(self.folder, self.passport.model)
        except InputError:
            return False

    @cached_property
    def _has_same_part(self) -> bool:
        part = SPEC_PARTS.get(self.passport.model, "")
        known = self.passport.settings.get(part)
        try:
            content = (self.folder / "spec.json").read_bytes()
        except OSError:
            return False
        return known is not None and known == part_sha256(content, part)

    def _sha256(self, name: str) -> Optional[str]:
        try:
            return known_sha256(self.folder / name)
        except OSError:
            return None


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of :data:`POLICY`.

    sentence: the reason, with the names of :meth:`PlanCheck.words` in braces. source: see the module's
    docstring. reads_plan: whether the condition opens the plan's file. blocks_rebuild: a build here cannot
    succeed or would not help.
    """

    name: str
    condition: str
    action: Action
    sentence: str
    source: str
    applies: Callable[[PlanCheck], bool] = dataclasses.field(repr=False)
    reads_plan: bool = False
    blocks_rebuild: bool = False


_OK, _REBUILD, _REFUSE = Action.OK, Action.REBUILD, Action.REFUSE

POLICY: Tuple[Rule, ...] = (
    # The file itself.
    Rule(
        "plan missing",
        "the plan's file is not there",
        _REFUSE,
        "{plan} is missing: there is nothing to load",
        "odtrt",
        lambda case: case.plan_bytes is None,
        reads_plan=True,
    ),
    Rule(
        "plan of another size",
        "the file is shorter or longer than its passport says",
        _REFUSE,
        "{plan} has {size} bytes, its passport says {expected_size}: cut off or another file, never load it",
        "odtrt",
        lambda case: case.plan_bytes is not None and not case.has_right_size,
        reads_plan=True,
    ),
    Rule(
        "plan damaged",
        "the file's SHA-256 is not the one in its passport",
        _REFUSE,
        "{plan} is damaged or another file (its SHA-256 differs from its passport's): never load it",
        "odtrt",
        lambda case: case.is_damaged,
        reads_plan=True,
    ),
    Rule(
        "header disagrees",
        "the plan's header names another version than its passport",
        _REFUSE,
        "the header of {plan} says {header}, its passport {built_by}: one of them is wrong, never load it",
        "odtrt",
        lambda case: (
            case.header_version is not None and not _agree(version_order(case.header_version), case.built)
        ),
        reads_plan=True,
    ),
    # What it was built from.
    Rule(
        "model changed",
        "the ONNX model or spec.json is another one than the plan was built from",
        _REBUILD,
        "{changed} changed since the plan was built: it computes an old model",
        "odtrt",
        lambda case: bool(case.changed),
    ),
    Rule(
        "model absent",
        "the ONNX model or spec.json is not in the folder",
        _OK,
        "{absent} cannot be read here: the plan loads without, but cannot be compared or built again",
        "odtrt",
        lambda case: bool(case.absent),
        blocks_rebuild=True,
    ),
    Rule(
        "model damaged",
        "the ONNX model or spec.json is not the file that its stage recorded",
        _OK,
        "{damaged} is damaged or was exchanged: the plan loads without, but cannot be built again from it",
        "odtrt",
        lambda case: bool(case.damaged),
        blocks_rebuild=True,
    ),
    # The system.
    Rule(
        "other system",
        "another operating system or processor architecture (TensorRT)",
        _REBUILD,
        "built on {built_system}, this is {system}: such a plan does not move between systems",
        "SM114",
        lambda case: case.passport.runtime_library == "tensorrt" and not _is_same_system(case),
    ),
    Rule(
        "other architecture, RTX",
        "another processor architecture (TensorRT-RTX)",
        _REBUILD,
        "built on {built_system}, this is {system}: NVIDIA promises Windows and Linux, not other processors",
        "RTX",
        lambda case: (
            case.passport.runtime_library == "tensorrt_rtx"
            and case.passport.machine.architecture != case.here.machine.architecture
        ),
    ),
    # The library.
    Rule(
        "no library",
        "no TensorRT is installed",
        _REBUILD,
        "no TensorRT can be imported here, the plan needs {built_by}: install it, or run on ONNX Runtime",
        "odtrt",
        lambda case: case.here.version is None,
        blocks_rebuild=True,
    ),
    Rule(
        "other library",
        "TensorRT instead of TensorRT-RTX, or the reverse",
        _REBUILD,
        "built by {built_by}, here is {installed}: neither reads the other's plans",
        "odtrt",
        lambda case: case.here.version is not None and not case.is_same_runtime_library,
    ),
    Rule(
        "same version",
        "exactly the version that built the plan",
        _OK,
        "built by {built_by}, which is installed here: it loads",
        "EC11",
        lambda case: case.is_same_runtime_library and case.step == 0,
    ),
    Rule(
        "other version, RTX",
        "another version of TensorRT-RTX",
        _REBUILD,
        "built by {built_by}, here is {installed}: TensorRT-RTX reads the plans of its own release only",
        "RTX",
        lambda case: case.is_rtx and case.step != 0,
    ),
    Rule(
        "older library",
        "the library is older than the plan",
        _REBUILD,
        "built by {built_by}, here is {installed}: an older library never reads a newer plan",
        "EC11",
        lambda case: case.is_tensorrt and case.step < 0,
    ),
    Rule(
        "newer minor, version-compatible",
        "same major version, newer library, plan built version-compatible",
        _OK,
        "built version-compatible by {built_by}, here is {installed}: it loads, maybe slower than a new plan",
        "EC11, SM114",
        lambda case: (
            case.is_tensorrt and case.step > 0 and case.is_same_major and case.passport.version_compatible
        ),
    ),
    Rule(
        "newer minor",
        "same major version, newer library, plan not built version-compatible",
        _REBUILD,
        "built by {built_by}, here is {installed}: not version-compatible, so only the same version loads it",
        "EC11",
        lambda case: (
            case.is_tensorrt and case.step > 0 and case.is_same_major and not case.passport.version_compatible
        ),
    ),
    Rule(
        "newer major, version-compatible",
        "8 to 10 or 10 to 11, plan built version-compatible",
        _OK,
        "built version-compatible by {built_by}, here is {installed}: it loads, maybe slower than a new plan",
        "SM114",
        lambda case: case.is_tensorrt and case.step > 0 and not case.is_same_major and _crosses_majors(case),
    ),
    Rule(
        "newer major",
        "any other newer major version, or plan not built version-compatible",
        _REBUILD,
        "built by {built_by}, here is {installed}: only version-compatible plans go on, 8 to 10 and 10 to 11",
        "SM114",
        lambda case: (
            case.is_tensorrt and case.step > 0 and not case.is_same_major and not _crosses_majors(case)
        ),
    ),
    # The GPU.
    Rule(
        "no GPU",
        "no NVIDIA GPU can be seen from this process",
        _REBUILD,
        "no GPU here: no plan runs, ONNX Runtime does; use the plan, or build one, where the GPU is",
        "odtrt",
        lambda case: not case.has_gpu,
        blocks_rebuild=True,
    ),
    Rule(
        "GPU of the build unknown",
        "the passport does not name the GPU (TensorRT)",
        _REBUILD,
        "the passport does not say on which GPU the plan was built: it may not fit {gpu}",
        "odtrt",
        lambda case: (
            case.passport.runtime_library == "tensorrt" and case.has_gpu and not case.built_on_known_gpu
        ),
    ),
    Rule(
        "same GPU",
        "same model, compute capability, SM count and memory",
        _OK,
        "built on {built_gpu}, as here: it was tuned for this GPU",
        "DG86",
        lambda case: case.gpu_is_compared and case.is_same_gpu,
    ),
    Rule(
        "same GPU, other size",
        "same model, other SM count or memory (power mode, MIG slice, other board)",
        _REBUILD,
        "built on {built_gpu} with {built_size}, here {gpu_size}: TensorRT warns of bad speed and errors",
        "DG86",
        lambda case: (
            case.gpu_is_compared and case.level == "none" and case.is_same_model and not case.is_same_size
        ),
    ),
    Rule(
        "other GPU model",
        "other model of the same compute capability",
        _REBUILD,
        "built on {built_gpu}, this is {gpu}: TensorRT warns of bad speed and errors",
        "DG86",
        lambda case: (
            case.gpu_is_compared
            and case.level == "none"
            and case.is_same_capability
            and not case.is_same_model
        ),
    ),
    Rule(
        "other compute capability",
        "other compute capability, plan not built hardware-compatible",
        _REBUILD,
        "built on {built_gpu}, this is {gpu}: TensorRT does not load it",
        "SM114",
        lambda case: case.gpu_is_compared and case.level == "none" and not case.is_same_capability,
    ),
    Rule(
        "hardware-compatible on a Jetson",
        "any hardware-compatible level with another GPU, a Jetson on either side",
        _REBUILD,
        "built {level} on {built_gpu}, this is {gpu}: hardware compatibility does not exist on JetPack",
        "DG86",
        lambda case: (
            case.gpu_is_compared and case.level != "none" and case.is_jetson and not case.is_same_gpu
        ),
    ),
    Rule(
        "ampere_plus",
        "another GPU from compute capability 8.0 up, plan built ampere_plus",
        _OK,
        "built ampere_plus on {built_gpu}, this is {gpu}: it loads, maybe slower than a new plan",
        "NI, EC11",
        lambda case: _on_other_gpu(case, "ampere_plus") and _is_ampere_or_newer(case),
    ),
    Rule(
        "ampere_plus, older GPU",
        "a GPU before compute capability 8.0, plan built ampere_plus",
        _REBUILD,
        "built ampere_plus on {built_gpu}, this is {gpu}: that mode begins with compute capability 8.0",
        "NI",
        lambda case: _on_other_gpu(case, "ampere_plus") and not _is_ampere_or_newer(case),
    ),
    Rule(
        "same_compute_capability",
        "another GPU of the same compute capability, plan built same_compute_capability",
        _OK,
        "built same_compute_capability on {built_gpu}, this is {gpu}: it loads, maybe slower than a new plan",
        "NI",
        lambda case: _on_other_gpu(case, "same_compute_capability") and case.is_same_capability,
    ),
    Rule(
        "same_compute_capability, other one",
        "another compute capability, plan built same_compute_capability",
        _REBUILD,
        "built same_compute_capability on {built_gpu}, this is {gpu}: TensorRT does not load it",
        "NI",
        lambda case: _on_other_gpu(case, "same_compute_capability") and not case.is_same_capability,
    ),
    Rule(
        "GPU among the targets, RTX",
        "the GPU's compute capability is a target of the plan; unasked, 8.0 and newer are",
        _OK,
        "built for compute capability {targets}, this is {gpu}: it loads and is finished for this GPU then",
        "RTX",
        lambda case: case.passport.runtime_library == "tensorrt_rtx" and case.has_gpu and case.rtx_covers,
    ),
    Rule(
        "GPU not among the targets, RTX",
        "the GPU's compute capability is no target of the plan",
        _REBUILD,
        "built for compute capability {targets}, this is {gpu}: TensorRT-RTX does not load it",
        "RTX",
        lambda case: case.passport.runtime_library == "tensorrt_rtx" and case.has_gpu and not case.rtx_covers,
    ),
    Rule(
        "older driver",
        "the driver supports an older CUDA than the one of the build's machine",
        _OK,
        "built under a driver for CUDA {built_cuda}, the one here is for {cuda}: if TensorRT needs more, "
        "it says so when it loads",
        "RTX",
        lambda case: case.driver_is_older,
    ),
    Rule(
        "other TF32 override",
        "the environment variable NVIDIA_TF32_OVERRIDE is not what it was at the build (TensorRT-RTX)",
        _REBUILD,
        "NVIDIA_TF32_OVERRIDE was {built_tf32} at the build and is {tf32} here: TensorRT-RTX refuses such a "
        "plan",
        "H200",
        lambda case: case.is_rtx and case.tf32_override != case.here.tf32_override,
    ),
    # The plugin.
    Rule(
        "plugin missing",
        "the plan has a plugin's layer inside, and no plugin library was given",
        _REFUSE,
        "the plan calls {plugin}, which is not there: TensorRT could not find its layers; give its path",
        "odtrt",
        lambda case: case.passport.plugin is not None and case.here.plugin is None,
        blocks_rebuild=True,
    ),
    Rule(
        "plugin of another ABI",
        "the plugin library implements another TensorRT interface",
        _REFUSE,
        "the plan calls {plugin} as {built_abi}, the library here is {abi}: calls would go astray",
        "odtrt",
        lambda case: _plugins(case) is not None and _plugins(case) != "same" and not _is_same_abi(case),
    ),
    Rule(
        "other plugin",
        "the plugin library is another build of the same interface",
        _REBUILD,
        "{plugin} is another build than the plan was made with: its fields and formats may differ",
        "odtrt",
        lambda case: _plugins(case) == "other" and _is_same_abi(case),
    ),
    Rule(
        "same plugin",
        "the very plugin library that the plan was built with",
        _OK,
        "{plugin} is the library that the plan was built with: load it first",
        "odtrt",
        lambda case: _plugins(case) == "same",
    ),
)
"""What decides about a plan; :func:`check` goes through all rows. The book shows it as a table."""


def this_environment(plugin: Union[str, Path, None] = None) -> Environment:
    """This machine, the preferred one of the TensorRTs that can be imported, and the plugin library.

    Raises InputError if ``plugin`` cannot be read.
    """
    runtime_library, version = next(iter(available_runtimes()), (None, None))
    identity = None if plugin is None else passports.plugin_identity(plugin)
    override = os.environ.get(TF32_OVERRIDE)
    return Environment(this_machine(), runtime_library, version, identity, override)


def check(folder: Union[str, Path], passport: Passport, here: Environment) -> Verdict:
    """Whether the plan may be loaded in this environment, with the reasons in words.

    Reads the whole file of the plan and compares it with the passport, but does not deserialise it.
    """
    return _verdict(PlanCheck(Path(folder), passport, here), POLICY)


def best_plan(
    folder: Union[str, Path], here: Environment, model: Optional[str] = None, precision: Optional[str] = None
) -> Optional[Passport]:
    """The newest plan of the folder whose verdict is OK, None if there is none.

    model: ``heads.onnx`` or ``detector.onnx``; precision: ``fp32``, ...; None takes any. Plans may be
    replaced meanwhile: only a second search, during which nobody can install one, says that there is none.
    """
    folder = Path(folder)
    found = _best_plan(folder, here, model, precision)
    if found is None:
        with undisturbed(folder / PLANS):
            found = _best_plan(folder, here, model, precision)
    return found


def _best_plan(
    folder: Path, here: Environment, model: Optional[str], precision: Optional[str]
) -> Optional[Passport]:
    quick = tuple(rule for rule in POLICY if not rule.reads_plan)
    for one in passports.passports(folder):
        case = PlanCheck(folder, one, here)
        is_wanted = model in (None, one.model) and precision in (None, one.precision)
        if (
            is_wanted
            and _verdict(case, quick).action is Action.OK
            and _verdict(case, POLICY).action is Action.OK
        ):
            return one
    return None


def _verdict(case: PlanCheck, rules: Sequence[Rule]) -> Verdict:
    applying = [rule for rule in rules if rule.applies(case)]
    gravity = list(Action)
    applying.sort(key=lambda rule: gravity.index(rule.action), reverse=True)
    action = applying[0].action if applying else Action.OK
    told = [
        rule
        for rule in applying
        if action is Action.OK or rule.action is not Action.OK or rule.blocks_rebuild
    ]
    words = case.words()
    return Verdict(
        action,
        tuple(rule.sentence.format(**words) for rule in told),
        action is not Action.OK and not any(rule.blocks_rebuild for rule in applying),
    )


def version_order(version: str) -> Tuple[int, ...]:
    """``10.0.0b6`` -> (10, 0, 0): the leading numbers of a version."""
    numbers: List[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def _agree(one: Tuple[int, ...], other: Tuple[int, ...]) -> bool:
    return all(a == b for a, b in zip(one, other))


def _is_same_system(case: PlanCheck) -> bool:
    built, here = case.passport.machine, case.here.machine
    return (built.system, built.architecture) == (here.system, here.architecture)


def _crosses_majors(case: PlanCheck) -> bool:
    step = (case.built[0], case.installed[0])
    return case.passport.version_compatible and case.built >= (8, 6) and step in ((8, 10), (10, 11))


def _on_other_gpu(case: PlanCheck, level: str) -> bool:
    """Whether a plan of this hardware compatibility level is for another GPU, and neither is a Jetson's."""
    return case.gpu_is_compared and case.level == level and not case.is_jetson and not case.is_same_gpu


def _is_ampere_or_newer(case: PlanCheck) -> bool:
    machines = (case.passport.machine, case.here.machine)
    return all(version_order(machine.compute_capability or "") >= (8, 0) for machine in machines)


def _plugins(case: PlanCheck) -> Optional[str]:
    """``same`` or ``other``: the plugin library here and that of the plan; None if one of them is missing."""
    built, here = case.passport.plugin, case.here.plugin
    if built is None or here is None:
        return None
    return "same" if built.sha256 == here.sha256 else "other"


def _is_same_abi(case: PlanCheck) -> bool:
    built, here = case.passport.plugin, case.here.plugin
    return built is not None and here is not None and built.abi == here.abi


def _gpu_text(machine: Machine) -> str:
    return f"{machine.gpu} (compute capability {machine.compute_capability})"


def _size_text(machine: Machine) -> str:
    return f"{machine.sm_count} SMs and {machine.gpu_memory_mb} MiB"
