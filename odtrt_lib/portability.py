"""Chapter 5: may this plan be used here and now, and how is it replaced when it may not.

:func:`check` compares a plan's passport (:mod:`odtrt_lib.passport`) with the machine and the library that
would run it, row by row of :data:`POLICY`. :func:`best_plan` picks the newest plan of a folder that passes.
:func:`start_rebuild` replaces one that does not, in a process of its own, while the caller serves on.

One process rebuilds at a time. It holds a lock on ``plans/.rebuild.lock`` that the system takes away when it
ends, however it ends; that lock alone says whether a rebuild runs, never a clock or a process number.
``plans/.rebuild.json`` says how far it is and how the last one ended, ``plans/.rebuild.log`` what it printed.
A rebuild that failed is not tried again for the same inputs unless it is asked for.

Sources of the rules, as the rows name them:

* EC11: docs.nvidia.com, TensorRT 11.1, "Engine Compatibility".
* SM114: docs.nvidia.com, TensorRT 11.4.1, "Support Matrix", "Engine Portability".
* DG86: TensorRT 8.6 Developer Guide, "Hardware Compatibility" and FAQ ("build the engine on one GPU and run
  it on another").
* NI: NvInfer.h of TensorRT 11, HardwareCompatibilityLevel.
* RTX: docs.nvidia.com, TensorRT-RTX, "Engine Compatibility" and "CPU-Only AOT and TensorRT-RTX Engines".
* H200: seen with TensorRT-RTX 1.4.0.76 on an H200 (benchmarks/engine_gpu.py).
* odtrt: our own caution.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from odtrt_lib import passport as passports
from odtrt_lib.errors import BuildError, CheckError, InputError, OdtrtError, one_line
from odtrt_lib.folder import (
    SPEC_PARTS,
    atomic_write,
    check_seal,
    is_outdated,
    known_sha256,
    part_sha256,
    recorded,
    sha256,
)
from odtrt_lib.passport import FLAVOURS, Machine, Passport, PluginIdentity

LOCK, STATUS, OUTPUT = ".rebuild.lock", ".rebuild.json", ".rebuild.log"

# Of best_plan at a folder in which plans are being replaced; three were once not enough.
_MOST_LOOKS = 20


class Action(str, enum.Enum):
    """What to do with a plan.

    OK: load it. REBUILD: intact, but not for this machine, library or model. REFUSE: never hand these bytes
    to the runtime here.
    """

    OK = "ok"
    REBUILD = "rebuild"
    REFUSE = "refuse"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of :func:`check`.

    reasons: one sentence for each row of :data:`POLICY` that applies, the gravest first. rebuild_helps: the
    plan is not OK, and a build on this machine would make one that is.
    """

    action: Action
    reasons: Tuple[str, ...]
    rebuild_helps: bool = False

    @property
    def word(self) -> str:
        """The action for people; ``not here`` for a rebuild that could not help on this machine."""
        is_of_elsewhere = self.action is Action.REBUILD and not self.rebuild_helps
        return "not here" if is_of_elsewhere else self.action.value


@dataclasses.dataclass(frozen=True)
class Here:
    """Where a plan is to run.

    flavour, version: of the installed TensorRT, None where there is none. tf32_override: what the environment
    variable NVIDIA_TF32_OVERRIDE is, None where it is not set.
    """

    machine: Machine
    flavour: Optional[str]
    version: Optional[str]
    plugin: Optional[PluginIdentity] = None
    tf32_override: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class RebuildStatus:
    """state: ``idle`` (never rebuilt), ``running``, ``failed`` or ``done``. since: when it began, ISO 8601.

    progress: 0 to 1, None where unknown. message: what it does, or why it failed.
    """

    state: str
    pid: Optional[int] = None
    since: Optional[str] = None
    progress: Optional[float] = None
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan, looked at from one place; what the conditions of :data:`POLICY` ask about."""

    folder: Path
    passport: Passport
    here: Here

    @cached_property
    def plan_bytes(self) -> Optional[int]:
        """The size of the plan's file, None where there is none."""
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
        """The version in the plan's header; None where it is not understood, as before TensorRT 8.6."""
        is_known = self.passport.flavour == "tensorrt_rtx" or self.built >= (8, 6)
        return passports.plan_version(self._plan) if is_known else None

    @cached_property
    def changed(self) -> Tuple[str, ...]:
        """The files that the plan was built from and that are others now.

        A damaged file counts as what its stage wrote. In ``spec.json`` only what goes into the plan counts. A
        model that belongs to an earlier export counts as changed.
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
        """The files that are there and are not what their stages recorded."""
        found = {name: self._sha256(name) for name in (self.passport.model, "spec.json")}
        return tuple(name for name in found if found[name] not in (None, self._sealed.get(name, found[name])))

    @cached_property
    def absent(self) -> Tuple[str, ...]:
        """The files that a build needs and that are not there or cannot be read."""
        return tuple(name for name in (self.passport.model, "spec.json") if self._sha256(name) is None)

    @property
    def built(self) -> Tuple[int, ...]:
        """The version of the library that built the plan."""
        return _numbers(self.passport.version)

    @property
    def installed(self) -> Tuple[int, ...]:
        """The version of the library here, () where there is none."""
        return _numbers(self.here.version or "")

    @property
    def is_same_flavour(self) -> bool:
        return self.here.version is not None and self.here.flavour == self.passport.flavour

    @property
    def is_tensorrt(self) -> bool:
        """Whether TensorRT built the plan and is installed: its version rules apply."""
        return self.is_same_flavour and self.passport.flavour == "tensorrt"

    @property
    def is_rtx(self) -> bool:
        return self.is_same_flavour and self.passport.flavour == "tensorrt_rtx"

    @property
    def step(self) -> int:
        """-1: the library here is older than the plan's, 0: the same, as far as both are known, 1: newer."""
        pairs = list(zip(self.installed, self.built))
        return next((1 if one > other else -1 for one, other in pairs if one != other), 0)

    @property
    def is_same_major(self) -> bool:
        return self.installed[:1] == self.built[:1]

    @property
    def gpu_is_compared(self) -> bool:
        """Whether TensorRT built the plan on a known GPU and there is one here."""
        return self.passport.flavour == "tensorrt" and self.has_gpu and self.built_on_known_gpu

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
        """Whether SMs and memory agree; memory within a tenth, because drivers reserve more or less of it."""
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
        """Whether TensorRT-RTX's targets have the GPU here among them."""
        capability = self.here.machine.compute_capability or ""
        targets = self.passport.compute_capabilities
        return capability in targets or ("default" in targets and _numbers(capability) >= (8, 0))

    @property
    def tf32_override(self) -> Optional[str]:
        """What NVIDIA_TF32_OVERRIDE was at the build."""
        return self.passport.settings.get("tf32_override")

    @property
    def driver_is_older(self) -> bool:
        built, here = self.passport.machine.cuda, self.here.machine.cuda
        return built is not None and here is not None and _numbers(here) < _numbers(built)

    def words(self) -> Dict[str, Any]:
        """What the sentences of :data:`POLICY` name."""
        built, here, plan = self.passport.machine, self.here.machine, self.passport
        library = FLAVOURS[plan.flavour]
        library_here = FLAVOURS.get(self.here.flavour or "", "no TensorRT")
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
        """What ``log.jsonl`` says of the files; nothing where it cannot be read."""
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

    sentence: the reason, with the names of :meth:`Case.words` in braces. source: see the module.
    reads_plan: whether it opens the plan's file. blocks_rebuild: a build here cannot succeed or would not
    help.
    """

    name: str
    condition: str
    action: Action
    sentence: str
    source: str
    applies: Callable[[Case], bool] = dataclasses.field(repr=False)
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
            case.header_version is not None and not _agree(_numbers(case.header_version), case.built)
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
        lambda case: case.passport.flavour == "tensorrt" and not _is_same_system(case),
    ),
    Rule(
        "other architecture, RTX",
        "another processor architecture (TensorRT-RTX)",
        _REBUILD,
        "built on {built_system}, this is {system}: NVIDIA promises Windows and Linux, not other processors",
        "RTX",
        lambda case: (
            case.passport.flavour == "tensorrt_rtx"
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
        "other flavour",
        "TensorRT instead of TensorRT-RTX, or the reverse",
        _REBUILD,
        "built by {built_by}, here is {installed}: neither reads the other's plans",
        "odtrt",
        lambda case: case.here.version is not None and not case.is_same_flavour,
    ),
    Rule(
        "same version",
        "exactly the version that built the plan",
        _OK,
        "built by {built_by}, which is installed here: it loads",
        "EC11",
        lambda case: case.is_same_flavour and case.step == 0,
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
        lambda case: case.passport.flavour == "tensorrt" and case.has_gpu and not case.built_on_known_gpu,
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
        lambda case: case.passport.flavour == "tensorrt_rtx" and case.has_gpu and case.rtx_covers,
    ),
    Rule(
        "GPU not among the targets, RTX",
        "the GPU's compute capability is no target of the plan",
        _REBUILD,
        "built for compute capability {targets}, this is {gpu}: TensorRT-RTX does not load it",
        "RTX",
        lambda case: case.passport.flavour == "tensorrt_rtx" and case.has_gpu and not case.rtx_covers,
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


def here(plugin: Union[str, Path, None] = None) -> Here:
    """This machine, the TensorRT that can be imported (the preferred one), and the plugin library.

    Raises InputError where ``plugin`` cannot be read.
    """
    from odtrt_lib import engine

    flavour, version = next(iter(engine.available_runtimes()), (None, None))
    identity = None if plugin is None else passports.plugin_identity(plugin)
    override = os.environ.get(engine.TF32_OVERRIDE)
    return Here(passports.this_machine(), flavour, version, identity, override)


def check(folder: Union[str, Path], passport: Passport, here: Here) -> Verdict:
    """Whether the plan may be loaded here and now, with the reasons in words.

    The plan is not deserialised; its bytes are compared with the passport, which reads the whole file.
    """
    return _verdict(Case(Path(folder), passport, here), POLICY)


def best_plan(
    folder: Union[str, Path], here: Here, model: Optional[str] = None, precision: Optional[str] = None
) -> Optional[Passport]:
    """The newest plan of the folder whose verdict is OK, None where there is none.

    model: ``heads.onnx`` or ``detector.onnx``; precision: ``fp32``, ...; None takes any.
    """
    folder = Path(folder)
    quick = tuple(rule for rule in POLICY if not rule.reads_plan)
    for _ in range(_MOST_LOOKS):
        found = passports.passports(folder)
        for one in found:
            case = Case(folder, one, here)
            is_wanted = model in (None, one.model) and precision in (None, one.precision)
            if (
                is_wanted
                and _verdict(case, quick).action is Action.OK
                and _verdict(case, POLICY).action is Action.OK
            ):
                return one
        if passports.passports(folder) == found:  # else a plan was replaced meanwhile
            break
    return None


def start_rebuild(
    folder: Union[str, Path],
    passport: Passport,
    *,
    plugin: Union[str, Path, None] = None,
    command: Optional[Sequence[str]] = None,
    force: bool = False,
) -> Optional[int]:
    """Starts a process that builds the plan again for this machine and library; returns its number.

    plugin: the plugin library, for a plan that has a plugin inside. command: what to run instead of
    :func:`odtrt_lib.engine.build`; it succeeds with exit status 0. force: also where it failed before.

    The process survives the caller and hears none of its signals. None, and nothing is started, where another
    process rebuilds in this folder, where the folder cannot be written, where a rebuild of the same inputs
    failed before or was killed twice, and where the plan needs a plugin and none is given.
    """
    folder = Path(folder).resolve()
    if passport.plugin is None:
        plugin = None
    elif plugin is None:
        return None
    try:
        inputs = _inputs(folder, passport, plugin, command)
        with _locked(folder) as lock:
            if lock is None:
                return None
            record = _settled(_read_status(folder))
            failure = record["failures"].get(inputs)
            if failure is not None and failure["is_final"] and not force:
                _write_status(folder, record)
                return None
            running = {
                "state": "running",
                "pid": None,
                "since": _now(),
                "progress": None,
                "message": "starting",
            }
            _write_status(folder, {**record, **running, "inputs": inputs})
            return _spawn(folder, passport, plugin, command, inputs, force, lock)
    except (OSError, InputError):
        return None


def rebuild_status(folder: Union[str, Path]) -> RebuildStatus:
    """How a rebuild in this folder stands. The lock says whether one runs; the record says the rest."""
    folder = Path(folder)
    for _ in range(3):
        is_running, record = _is_locked(folder), _read_status(folder)
        if is_running or record["state"] != "running":
            break  # else it died, or one has begun between the two questions
    if is_running:
        known = record if record["state"] == "running" else {}
        return RebuildStatus(
            "running",
            known.get("pid"),
            known.get("since"),
            known.get("progress"),
            known.get("message", "starting"),
        )
    record = _settled(record)
    return RebuildStatus(
        record["state"], record["pid"], record["since"], record["progress"], record["message"]
    )


def wait_for_rebuild(folder: Union[str, Path]) -> RebuildStatus:
    """Waits until no process rebuilds in this folder; returns how it ended."""
    with contextlib.suppress(OSError), _opened_lock(Path(folder), os.O_RDONLY) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return rebuild_status(folder)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The rebuilding process: ``python -m odtrt_lib.portability`` with a JSON object, see :func:`_spawn`."""
    request = json.loads((sys.argv[1:] if arguments is None else arguments)[0])
    folder, lock = Path(request["folder"]), request["lock"]
    if lock is not None:
        os.set_inheritable(lock, False)
    record = {**_read_status(folder), "pid": os.getpid(), "message": "building"}
    _write_status(folder, record)
    reported = [-1]

    def report(phase: str, fraction: float) -> None:
        percent = int(100 * fraction)
        if percent != reported[0]:
            reported[0] = percent
            with contextlib.suppress(OSError, InputError):
                _write_status(folder, {**record, "progress": percent / 100, "message": phase})

    try:
        message = _rebuild(request, report)
        failure = None
    except (Exception, KeyboardInterrupt) as error:
        failure = (
            one_line(error) if isinstance(error, OdtrtError) else f"{type(error).__name__}: {one_line(error)}"
        )
        message = failure
    failures = {key: value for key, value in record["failures"].items() if key != request["inputs"]}
    if failure is not None:
        failures[request["inputs"]] = {"message": failure, "time": _now(), "deaths": 0, "is_final": True}
    ending = {"state": "done", "progress": 1.0} if failure is None else {"state": "failed"}
    _write_status(folder, {**record, **ending, "message": message, "failures": failures})
    print(message)
    return 0 if failure is None else 1


# A rebuild that ended without a word may have met a power cut; one that does so twice meets its own weight.
_MOST_DEATHS = 2
_MOST_FAILURES = 50
_DIED = "the rebuilding process ended without a word: killed (out of memory?), or the power was cut"
_IDLE: Dict[str, Any] = {
    "state": "idle",
    "pid": None,
    "since": None,
    "progress": None,
    "message": "",
    "inputs": None,
    "failures": {},
}


def _verdict(case: Case, rules: Sequence[Rule]) -> Verdict:
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


def _numbers(version: str) -> Tuple[int, ...]:
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


def _is_same_system(case: Case) -> bool:
    built, here = case.passport.machine, case.here.machine
    return (built.system, built.architecture) == (here.system, here.architecture)


def _crosses_majors(case: Case) -> bool:
    step = (case.built[0], case.installed[0])
    return case.passport.version_compatible and case.built >= (8, 6) and step in ((8, 10), (10, 11))


def _on_other_gpu(case: Case, level: str) -> bool:
    """Whether a hardware-compatible plan of this level meets another GPU, and none of a Jetson."""
    return case.gpu_is_compared and case.level == level and not case.is_jetson and not case.is_same_gpu


def _is_ampere_or_newer(case: Case) -> bool:
    machines = (case.passport.machine, case.here.machine)
    return all(_numbers(machine.compute_capability or "") >= (8, 0) for machine in machines)


def _plugins(case: Case) -> Optional[str]:
    """``same`` or ``other``: the plugin library here, None where one of the two has none."""
    built, here = case.passport.plugin, case.here.plugin
    if built is None or here is None:
        return None
    return "same" if built.sha256 == here.sha256 else "other"


def _is_same_abi(case: Case) -> bool:
    built, here = case.passport.plugin, case.here.plugin
    return built is not None and here is not None and built.abi == here.abi


def _gpu_text(machine: Machine) -> str:
    return f"{machine.gpu} (compute capability {machine.compute_capability})"


def _size_text(machine: Machine) -> str:
    return f"{machine.sm_count} SMs and {machine.gpu_memory_mb} MiB"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _inputs(
    folder: Path, passport: Passport, plugin: Union[str, Path, None], command: Optional[Sequence[str]]
) -> str:
    """What the outcome of a rebuild depends on, as 16 hexadecimal digits."""
    place = here(plugin)
    identity = [
        [sha256(folder / name) for name in (passport.model, "spec.json")],
        _settings(folder, passport, place),
        dataclasses.asdict(place),
        list(command or ()),
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _settings(folder: Path, passport: Passport, here: Here) -> Dict[str, Any]:
    """The arguments of :func:`odtrt_lib.engine.build` that make such a plan for this machine and library.

    What the plan was compatible with stays, where this machine takes it.
    """
    settings: Dict[str, Any] = {"precision": passport.precision}
    capability = here.machine.compute_capability
    built = passport.settings
    is_same_spec = "spec.json" not in Case(folder, passport, here).changed
    if is_same_spec and built.get("batch_min_opt_max"):
        settings["batch"] = built["batch_min_opt_max"]
    if passport.machine.gpu == here.machine.gpu and built.get("memory_limit_mb"):
        settings["memory"] = f"{built['memory_limit_mb']}MiB"
    if here.flavour == "tensorrt":
        settings["version_compatible"] = passport.version_compatible
        if here.machine.l4t is None and (capability is None or _numbers(capability) >= (8, 0)):
            settings["hardware_compatibility"] = passport.hardware_compatibility
    elif passport.flavour == "tensorrt_rtx" and passport.compute_capabilities != ("default",):
        is_target = capability is None or capability in passport.compute_capabilities
        settings["compute_capabilities"] = list(passport.compute_capabilities) if is_target else [capability]
    elif capability is not None and _numbers(capability) < (8, 0):
        settings["compute_capabilities"] = [capability]
    return settings


def _spawn(
    folder: Path,
    passport: Passport,
    plugin: Union[str, Path, None],
    command: Optional[Sequence[str]],
    inputs: str,
    force: bool,
    lock: int,
) -> int:
    """Starts :func:`main` with the lock in its hands; the caller's copy of it may be closed then."""
    request = {
        "folder": str(folder),
        "fingerprint": passport.fingerprint,
        "plugin": None if plugin is None else str(Path(plugin).resolve()),
        "command": None if command is None else list(command),
        "inputs": inputs,
        "force": force,
        "lock": lock,
    }
    package = str(Path(__file__).resolve().parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / passports.PLANS / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "odtrt_lib.portability", json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=(lock,),
            start_new_session=True,
        )
    # Somebody has to ask for a child's exit status, or it stays in the process table.
    threading.Thread(target=process.wait, name="odtrt-rebuild-end", daemon=True).start()
    return process.pid


def _rebuild(request: Mapping[str, Any], report: Callable[..., None]) -> str:
    """Does the work of the rebuilding process; returns what to say. Raises what the build raises."""
    folder, plugin = Path(request["folder"]), request["plugin"]
    stale = passports.read(folder / passports.PLANS / f"{request['fingerprint']}.json")
    place = here(plugin)
    if not request["force"] and best_plan(folder, place, stale.model, stale.precision) is not None:
        return "another process has built a plan meanwhile"
    check_seal(folder, stale.model)
    if request["command"] is not None:
        keep = () if request["lock"] is None else (request["lock"],)
        # The lock lives as long as the command, even if this process is killed.
        done = subprocess.run(request["command"], check=False, stdin=subprocess.DEVNULL, pass_fds=keep)
        if done.returncode:
            raise BuildError(
                f"`{' '.join(request['command'])}` ended with status {done.returncode}; "
                f"see {folder / passports.PLANS / OUTPUT}"
            )
    else:
        from odtrt_lib import engine

        engine.build(folder, plugin=plugin, force=True, progress=report, **_settings(folder, stale, place))
    if place.machine.gpu is not None and best_plan(folder, place, stale.model, stale.precision) is None:
        reasons = [
            reason
            for one in passports.passports(folder)
            if (one.model, one.precision) == (stale.model, stale.precision)
            for reason in check(folder, one, place).reasons
        ]
        raise CheckError(f"the build succeeded, but no plan may be used here: {'; '.join(reasons)}")
    return "a new plan is installed"


@contextlib.contextmanager
def _opened_lock(folder: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(str(folder / passports.PLANS / LOCK), flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Optional[int]]:
    """The descriptor of the rebuild lock, held; None where another process holds it.

    It belongs to whoever inherits the descriptor, too. Raises OSError where the folder cannot be written.
    """
    with _opened_lock(folder, os.O_RDWR | os.O_CREAT) as descriptor:
        yield descriptor if _take(descriptor) else None


def _take(descriptor: int) -> bool:
    """Takes the lock at once or not at all. Who only asks (:func:`_is_locked`) holds it for a moment, too."""
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(0.001)
    return False


def _is_locked(folder: Path) -> bool:
    try:
        with _opened_lock(folder, os.O_RDONLY) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _read_status(folder: Path) -> Dict[str, Any]:
    """``plans/.rebuild.json``; what is damaged there counts as not written."""
    try:
        data = json.loads((folder / passports.PLANS / STATUS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return dict(_IDLE)
    if not isinstance(data, dict) or data.get("state") not in ("idle", "running", "failed", "done"):
        return dict(_IDLE)
    kinds = {
        "pid": int,
        "since": str,
        "progress": (int, float),
        "message": str,
        "inputs": str,
        "failures": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind):  # type: ignore[arg-type]
            data[name] = _IDLE[name]
    data["failures"] = {
        inputs: failure
        for inputs, failure in data["failures"].items()
        if isinstance(failure, dict)
        and isinstance(failure.get("deaths"), int)
        and isinstance(failure.get("is_final"), bool)
    }
    return {name: data[name] for name in _IDLE}


def _write_status(folder: Path, record: Mapping[str, Any]) -> None:
    if not (folder / passports.PLANS).is_dir():
        raise InputError(f"{folder / passports.PLANS}: not found; the folder was removed or moved meanwhile")
    failures = dict(list(record["failures"].items())[-_MOST_FAILURES:])
    with atomic_write(folder / passports.PLANS / STATUS) as temporary:
        temporary.write_text(json.dumps({**record, "failures": failures}, indent=1) + "\n", encoding="utf-8")


def _settled(record: Dict[str, Any]) -> Dict[str, Any]:
    """The record, given that nobody rebuilds: one that says ``running`` tells of a process that died."""
    if record["state"] != "running":
        return record
    inputs = record["inputs"]
    earlier = record["failures"].get(inputs, {"deaths": 0, "is_final": False})
    deaths = earlier["deaths"] + 1
    is_final = earlier["is_final"] or deaths >= _MOST_DEATHS
    failure = {"message": _DIED, "time": record["since"], "deaths": deaths, "is_final": is_final}
    return {
        **record,
        "state": "failed",
        "message": _DIED,
        "failures": {**record["failures"], inputs or "": failure},
    }


if __name__ == "__main__":
    os.nice(10)
    sys.exit(main())
