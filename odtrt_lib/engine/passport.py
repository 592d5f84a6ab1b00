"""A plan's passport, that is, its manifest: its inputs, the library that built it, the machine it is for.

``plans/<fingerprint>.json`` describes ``plans/<fingerprint>-<first 8 digits of its SHA-256>.plan``. It lies
beside the plan, never in it: ``trtexec``, DeepStream and Triton need a plan that starts with its own header.

A plan is executable code. Deserialising it runs kernels and native code from the file, and a
version-compatible plan contains a whole runtime library. So odtrt gives a plan to TensorRT only if a readable
passport in ``plans/`` names it and its SHA-256 agrees (:func:`read_plan`). This finds damage and mix-ups. It
is integrity, not authenticity: whoever can write to the folder can write both files. Carry plans over
channels that you trust, or build them where they run.

Readers accept a passport of :data:`SCHEMA_VERSION` only, whole and unaltered. They ignore fields that they do
not know, so a newer odtrt may add remarks. A field that decides whether a plan can be loaded needs a new
schema number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from odtrt_lib.errors import CheckError, InputError, one_line
from odtrt_lib.folder import atomic_write, cannot_write, exclusive, sha256, sync
from odtrt_lib.machine import Machine
from odtrt_lib.variants import HARDWARE_COMPATIBILITIES, RUNTIME_LIBRARIES

PLANS = "plans"
SCHEMA_VERSION = 2
JSON_KEYS = {"runtime_library": "flavour"}
"""Fields that have an older name in passports and in what fingerprints hash: field -> key there."""

BUILD_PLUGIN = (
    "run `make plugin`, or `make plugin ARCH=all` where there is no GPU, with nvcc and TensorRT's headers"
)
"""What to do where the plugin library is absent: without a GPU, plain `make plugin` leaves it out."""

_LARGEST_PASSPORT = 8 << 20
_FINGERPRINT = re.compile(r"[0-9a-f]{16}\Z")
_MODEL = re.compile(r"(\w+/)?[\w.-]+\Z")
_PLAN = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}\.plan\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_NUMBERS = re.compile(r"\d{1,5}(\.\d{1,5}){1,4}\Z")
_VERSION = re.compile(r"\d{1,5}(\.\d{1,5}){1,4}([.+-]?[a-z0-9]{1,12}){0,3}\Z")  # 10.0.0b6 too
# TensorRT's plans start with "ftrt" (trtexec's printPlanVersion), TensorRT-RTX's with "vtrt".
_PLAN_TAGS = (b"ftrt", b"vtrt")


@dataclasses.dataclass(frozen=True)
class PluginIdentity:
    """A plugin library. abi: the TensorRT interface it implements, e.g. ``IPluginV3``."""

    file: str
    sha256: str
    abi: str


@dataclasses.dataclass(frozen=True)
class Passport:
    """What is known about one plan.

    model: the ONNX file in the folder from which it was built. runtime_library: a key of
    :data:`odtrt_lib.variants.RUNTIME_LIBRARIES`; version: that library's, e.g. ``10.3.0``.
    compute_capabilities: TensorRT-RTX's targets, ``("default",)`` or e.g. ``("8.6", "8.9")``; ``()`` for
    TensorRT. settings: the builder's in the attempt that succeeded. layers: how many run in each precision.
    attempts: each step that was tried, with name, settings, outcome, seconds and memory. trtexec: the
    equivalent command line, "" if there is none. built: the time, ISO 8601, UTC.
    """

    fingerprint: str
    plan: str
    plan_sha256: str
    plan_bytes: int
    model: str
    onnx_sha256: str
    spec_sha256: str
    runtime_library: str
    version: str
    precision: str
    version_compatible: bool
    hardware_compatibility: str
    compute_capabilities: Tuple[str, ...]
    plugin: Optional[PluginIdentity]
    machine: Machine
    settings: Mapping[str, Any]
    layers: Mapping[str, int]
    attempts: Tuple[Mapping[str, Any], ...]
    trtexec: str
    seconds: float
    built: str
    schema: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of ``plans/<fingerprint>.json``; :func:`read` is its inverse.

        It also has the key ``check``, the SHA-256 of all fields, which reveals damage.
        """
        fields = with_json_keys(dataclasses.asdict(self))
        return json.dumps({**fields, "check": _checksum(fields)}, indent=1, allow_nan=False) + "\n"


def with_json_keys(fields: Mapping[str, Any]) -> Dict[str, Any]:
    """The fields, renamed to their keys in JSON by :data:`JSON_KEYS`."""
    return {JSON_KEYS.get(name, name): value for name, value in fields.items()}


def plan_name(fingerprint: str, plan_sha256: str) -> str:
    """The name of a plan's file in ``plans/``."""
    return f"{fingerprint}-{plan_sha256[:8]}.plan"


def install(folder: Union[str, Path], plan: Union[str, Path], passport: Passport) -> Path:
    """Moves a finished plan and its passport into ``plans/`` of a model folder; returns the plan's path.

    plan: the file, best inside ``folder`` (see :func:`odtrt_lib.folder.staging`). The plan is moved first, to
    a new name. Then its passport replaces the old one in one step. If the process is killed, the old pair or
    the new pair is valid. Last, older plans of the same fingerprint are removed.

    Raises CheckError if ``plan`` is not the file that the passport describes, or if :func:`read` would refuse
    the passport; InputError if the folder cannot be written or the disk is full. Nothing has changed then.
    """
    folder, plan = Path(folder), Path(plan)
    try:
        text = passport.to_json()
        _parse(json.loads(text), passport.fingerprint)
    except (TypeError, ValueError) as error:
        raise CheckError(f"{plan}: its passport is not valid: {error}") from error
    target = folder / PLANS / passport.plan
    try:
        problem = _difference(plan, passport)
        if problem is not None:
            raise CheckError(f"{plan}: {problem}; nothing was installed")
        target.parent.mkdir(parents=True, exist_ok=True)
        paper = target.parent / f"{passport.fingerprint}.json"
        with exclusive(target.parent):
            is_new = not target.exists()
            try:
                _move(plan, target)
                with atomic_write(paper) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            except BaseException:
                if is_new and not _is_named_in(paper, target):
                    with contextlib.suppress(OSError):
                        target.unlink()
                raise
            for path in target.parent.glob(f"{passport.fingerprint}*.plan"):
                if path.name != target.name:
                    path.unlink()
    except OSError as error:
        raise cannot_write(target, error) from error
    return target


def read(path: Union[str, Path]) -> Passport:
    """Reads one ``<fingerprint>.json``.

    Raises InputError, on one line, if the file is missing, not a regular file, not JSON or of another schema,
    if a field is missing or of another type, or if the file is not named for its fingerprint.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST_PASSPORT:
                raise ValueError(f"{size} bytes, more than any passport has")
            data = json.loads(file.read().decode("utf-8"))
        return _parse(data, path.stem)
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
    except RecursionError:
        reason = "not a plan's passport (nested too deep)"
    except ValueError as error:
        reason = f"not a plan's passport ({error})"
    raise InputError(_printable(f"{path}: {reason}; {_BUILD_AGAIN}"))


def survey(folder: Union[str, Path]) -> Tuple[List[Passport], Dict[str, str]]:
    """The readable passports of a model folder, newest first; unreadable ones as file name -> reason."""
    found: List[Passport] = []
    damaged: Dict[str, str] = {}
    plans = Path(folder) / PLANS
    try:
        names = sorted(path.name for path in plans.iterdir())
    except OSError:
        return [], {}
    for name in names:
        if name.endswith(".json") and not name.startswith("."):
            try:
                found.append(read(plans / name))
            except InputError as error:
                damaged[_printable(name)] = str(error)
    return sorted(found, key=lambda one: (one.built, one.fingerprint), reverse=True), damaged


def passports(folder: Union[str, Path]) -> List[Passport]:
    """The readable passports of a model folder, newest first; :func:`survey` also lists unreadable ones."""
    return survey(folder)[0]


def verify(folder: Union[str, Path], passport: Passport) -> Optional[str]:
    """Why the plan in ``folder`` is not the one that ``passport`` describes; None if it is."""
    if not _PLAN.match(passport.plan):
        return f"{passport.plan!r} is not the name of a plan"
    return _difference(Path(folder) / PLANS / passport.plan, passport)


def read_plan(folder: Union[str, Path], passport: Passport) -> bytes:
    """The bytes of a plan, for TensorRT's runtime. These same bytes were compared with the passport.

    Raises InputError if the file is missing or has another size or SHA-256.
    """
    if not _PLAN.match(passport.plan):
        raise InputError(f"{passport.plan!r}: not the name of a plan; {_BUILD_AGAIN}")
    path = Path(folder) / PLANS / passport.plan
    try:
        with _opened(path) as file:
            data = file.read(passport.plan_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {_BUILD_AGAIN}") from error
    if len(data) != passport.plan_bytes or hashlib.sha256(data).hexdigest() != passport.plan_sha256:
        raise InputError(f"{path}: damaged, or not the plan that its passport describes; {_BUILD_AGAIN}")
    return data


def plan_version(path: Union[str, Path]) -> Optional[str]:
    """The version of the library that built a plan, read from the plan's header without deserialising it.

    ``major.minor.patch.build``, or None if the header is not understood. TensorRT 8.6 and newer: as ``trtexec
    --getPlanVersionOnly`` reads it (NVIDIA/TensorRT, ``samples/common/sampleEngines.cpp``,
    ``printPlanVersion``: tag ``ftrt``, serialisation version 0, four bytes at offset 24). TensorRT-RTX: the
    same layout with the tag ``vtrt``, as seen in plans of 1.4.0, 1.5.0, 1.6.1 and 1.7.1.
    """
    try:
        with _opened(Path(path)) as file:
            header = file.read(28)
    except OSError:
        return None
    if len(header) < 28 or header[:4] not in _PLAN_TAGS or struct.unpack_from("<I", header, 4) != (0,):
        return None
    return ".".join(str(number) for number in header[24:28])


def plugin_identity(path: Union[str, Path]) -> PluginIdentity:
    """What a plan's passport records about a plugin library.

    The entry point that it exports for TensorRT's registry tells its ABI: ``getCreators`` means IPluginV3
    (one ABI from TensorRT 10.0 to 11); ``getPluginCreators`` or none means IPluginV2DynamicExt.

    Raises InputError if the library cannot be read.
    """
    path = Path(path)
    try:
        is_v3 = b"\0getCreators\0" in path.read_bytes()
        return PluginIdentity(path.name, sha256(path), "IPluginV3" if is_v3 else "IPluginV2DynamicExt")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {BUILD_PLUGIN}") from error


_BUILD_AGAIN = "run `odtrt build` again"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A regular file, open for reading. Raises OSError for others: a named pipe would wait for ever."""
    descriptor = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield file


def _difference(path: Path, passport: Passport) -> Optional[str]:
    """Why the file at ``path`` is not the plan that the passport describes; None if it is."""
    digest, size = hashlib.sha256(), 0
    try:
        with _opened(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found != passport.plan_bytes:
                return f"{path.name} has {found} bytes, its passport says {passport.plan_bytes}"
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error})"
    if size != passport.plan_bytes or digest.hexdigest() != passport.plan_sha256:
        return f"{path.name} is damaged or another file: its SHA-256 is not the one in its passport"
    return None


def _is_named_in(paper: Path, plan: Path) -> bool:
    try:
        return read(paper).plan == plan.name
    except InputError:
        return False


def _move(source: Path, target: Path) -> None:
    sync(source)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic_write(target) as temporary:
            shutil.copyfile(str(source), str(temporary))
    sync(target.parent)


def _parse(data: Any, name: str) -> Passport:
    """The passport in parsed JSON. Raises ValueError, naming the field, if one is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f"a {type(data).__name__}, expected an object")
    schema = data.get("schema")
    if schema != SCHEMA_VERSION or isinstance(schema, bool):
        raise ValueError(f"schema {schema!r:.40}, this odtrt reads {SCHEMA_VERSION}")
    if data.get("check") != _checksum(data):
        raise ValueError("altered or damaged: its fields do not go with their checksum `check`")
    values = _fields(data, _PASSPORT_FIELDS, "")
    values.update({name: values.pop(key) for name, key in JSON_KEYS.items()})
    values["machine"] = Machine(**_fields(values["machine"], _MACHINE_FIELDS, "machine."))
    if values["plugin"] is not None:
        values["plugin"] = PluginIdentity(**_fields(values["plugin"], _PLUGIN_FIELDS, "plugin."))
    for field in ("compute_capabilities", "attempts"):
        values[field] = tuple(values[field])
    passport = Passport(**values)
    if passport.fingerprint != name:
        raise ValueError(f"of the plan {passport.fingerprint}, not of {name:.60}")
    if passport.plan != plan_name(passport.fingerprint, passport.plan_sha256):
        raise ValueError(f"plan {passport.plan} does not go with its fingerprint and SHA-256")
    return passport


def _checksum(fields: Mapping[str, Any]) -> str:
    others = {name: value for name, value in fields.items() if name != "check"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode("utf-8")).hexdigest()


_Check = Tuple[str, Callable[[Any], bool]]


def _fields(data: Mapping[str, Any], checks: Mapping[str, _Check], where: str) -> Dict[str, Any]:
    for name, (expected, is_right) in checks.items():
        if name not in data:
            raise ValueError(f"{where}{name} is missing")
        if not is_right(data[name]):
            raise ValueError(f"{where}{name} is {data[name]!r:.40}, expected {expected}")
    return {name: data[name] for name in checks}


def _is_text(value: Any) -> bool:
    """Whether this is text that UTF-8 can encode: JSON can carry one half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _matches(pattern: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.match(value) is not None


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_TEXT: _Check = ("text", _is_text)
_TEXT_OR_NONE: _Check = ("text or null", _or_none(_is_text))
_COUNT_OR_NONE: _Check = ("a count or null", _or_none(_is_count))
_DIGEST: _Check = ("64 hexadecimal digits", _matches(_SHA256))
_OBJECT: _Check = ("an object", lambda value: isinstance(value, dict))
_NUMBERS_OR_NONE: _Check = ("a version like 8.7, or null", _or_none(_matches(_NUMBERS)))

_MACHINE_FIELDS: Dict[str, _Check] = {
    "system": _TEXT,
    "architecture": _TEXT,
    "gpu": _TEXT_OR_NONE,
    "compute_capability": _NUMBERS_OR_NONE,
    "sm_count": _COUNT_OR_NONE,
    "gpu_memory_mb": _COUNT_OR_NONE,
    "driver": _TEXT_OR_NONE,
    "cuda": _NUMBERS_OR_NONE,
    "l4t": _TEXT_OR_NONE,
}
_PLUGIN_FIELDS: Dict[str, _Check] = {"file": _TEXT, "sha256": _DIGEST, "abi": _TEXT}
_PASSPORT_FIELDS: Dict[str, _Check] = {
    "fingerprint": ("16 hexadecimal digits", _matches(_FINGERPRINT)),
    "plan": ("<fingerprint>-<8 digits>.plan", _matches(_PLAN)),
    "plan_sha256": _DIGEST,
    "plan_bytes": ("a count", _is_count),
    "model": ("a file name", lambda value: _is_text(value) and _MODEL.match(value) is not None),
    "onnx_sha256": _DIGEST,
    "spec_sha256": _DIGEST,
    JSON_KEYS["runtime_library"]: (
        f"one of {', '.join(RUNTIME_LIBRARIES)}",
        lambda value: isinstance(value, str) and value in RUNTIME_LIBRARIES,
    ),
    "version": ("a version like 10.3.0", _matches(_VERSION)),
    "precision": _TEXT,
    "version_compatible": ("true or false", lambda value: isinstance(value, bool)),
    "hardware_compatibility": (
        f"one of {', '.join(HARDWARE_COMPATIBILITIES)}",
        lambda value: isinstance(value, str) and value in HARDWARE_COMPATIBILITIES,
    ),
    "compute_capabilities": (
        "a list of texts",
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
    ),
    "plugin": ("an object or null", lambda value: value is None or isinstance(value, dict)),
    "machine": _OBJECT,
    "settings": _OBJECT,
    "layers": (
        "an object of counts",
        lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    ),
    "attempts": (
        "a list of objects",
        lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
    ),
    "trtexec": _TEXT,
    "seconds": ("a number", _is_seconds),
    "built": _TEXT,
    "schema": ("a count", _is_count),
}


def _printable(text: str) -> str:
    """The text on one line, with escapes for what is not UTF-8, as in some file names."""
    return one_line(text.encode("utf-8", "backslashreplace").decode("utf-8"))
