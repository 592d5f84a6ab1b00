"""Replaces a plan that may no longer be used, in a process of its own, while the caller goes on serving.

One process rebuilds at a time. It holds a lock on ``plans/.rebuild.lock``, which the system releases when the
process ends in any way. Only this lock tells whether a rebuild is running; clocks and process numbers do not.
``plans/.rebuild.json`` holds the progress, or how the last rebuild ended; ``plans/.rebuild.log`` holds what
it printed. If a rebuild has failed, it is tried again for the same inputs only on request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Union

from odtrt_lib import IMPORT_PATH
from odtrt_lib.engine import passport as passports
from odtrt_lib.engine.passport import Passport
from odtrt_lib.errors import BuildError, CheckError, InputError, OdtrtError, one_line
from odtrt_lib.folder import atomic_write, check_seal, sha256
from odtrt_lib.portability.policy import (
    Environment,
    PlanCheck,
    best_plan,
    check,
    this_environment,
    version_order,
)

LOCK, STATUS, OUTPUT = ".rebuild.lock", ".rebuild.json", ".rebuild.log"


@dataclasses.dataclass(frozen=True)
class RebuildStatus:
    """state: ``idle`` (never rebuilt), ``running``, ``failed`` or ``done``. since: its start, ISO 8601.

    progress: 0 to 1, None if unknown. message: what the rebuild is doing, or why it failed.
    """

    state: str
    pid: Optional[int] = None
    since: Optional[str] = None
    progress: Optional[float] = None
    message: str = ""


def start_rebuild(
    folder: Union[str, Path],
    passport: Passport,
    *,
    plugin: Union[str, Path, None] = None,
    command: Optional[Sequence[str]] = None,
    force: bool = False,
) -> Optional[int]:
    """Starts a process that builds the plan again for this machine and library; returns its number.

    plugin: the plugin library, for a plan that contains a plugin. command: what to run instead of
    :func:`odtrt_lib.engine.build`; exit status 0 means success. force: start even if it failed before.

    The process survives the caller and receives none of its signals. Returns None and starts nothing if
    another process rebuilds in this folder, if the folder cannot be written, if a rebuild of the same inputs
    failed before or was killed twice, or if the plan needs a plugin and none is given.
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
    """The state of a rebuild in this folder. The lock tells whether one is running, the record the rest."""
    folder = Path(folder)
    for _ in range(3):
        is_running, record = _is_locked(folder), _read_status(folder)
        if is_running or record["state"] != "running":
            break  # otherwise it died, or a rebuild began between the two reads
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
    """Waits until no process rebuilds in this folder; returns how the rebuild ended."""
    with contextlib.suppress(OSError), _opened_lock(Path(folder), os.O_RDONLY) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return rebuild_status(folder)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The rebuilding process: ``python -m odtrt_lib.portability JSON``. For the JSON see :func:`_spawn`."""
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


# If a rebuild ends once without a status, the cause may be a power cut. Twice counts as out of memory.
_MAX_DEATHS = 2
_MAX_FAILURES = 50
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


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _inputs(
    folder: Path, passport: Passport, plugin: Union[str, Path, None], command: Optional[Sequence[str]]
) -> str:
    """A hash of everything that the result of a rebuild depends on: 16 hexadecimal digits."""
    place = this_environment(plugin)
    identity = [
        [sha256(folder / name) for name in (passport.model, "spec.json")],
        _settings(folder, passport, place),
        dataclasses.asdict(place),
        list(command or ()),
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _settings(folder: Path, passport: Passport, here: Environment) -> Dict[str, Any]:
    """The arguments of :func:`odtrt_lib.engine.build` that make such a plan for this machine and library.

    The plan's compatibility modes are kept if this machine supports them.
    """
    settings: Dict[str, Any] = {"precision": passport.precision}
    capability = here.machine.compute_capability
    built = passport.settings
    is_same_spec = "spec.json" not in PlanCheck(folder, passport, here).changed
    if is_same_spec and built.get("batch_min_opt_max"):
        settings["batch"] = built["batch_min_opt_max"]
    if passport.machine.gpu == here.machine.gpu and built.get("memory_limit_mb"):
        settings["memory"] = f"{built['memory_limit_mb']}MiB"
    if here.runtime_library == "tensorrt":
        settings["version_compatible"] = passport.version_compatible
        if here.machine.l4t is None and (capability is None or version_order(capability) >= (8, 0)):
            settings["hardware_compatibility"] = passport.hardware_compatibility
    elif passport.runtime_library == "tensorrt_rtx" and passport.compute_capabilities != ("default",):
        is_target = capability is None or capability in passport.compute_capabilities
        settings["compute_capabilities"] = list(passport.compute_capabilities) if is_target else [capability]
    elif capability is not None and version_order(capability) < (8, 0):
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
    """Starts :func:`main` as a process that inherits the lock, so the caller may close its own descriptor."""
    request = {
        "folder": str(folder),
        "fingerprint": passport.fingerprint,
        "plugin": None if plugin is None else str(Path(plugin).resolve()),
        "command": None if command is None else list(command),
        "inputs": inputs,
        "force": force,
        "lock": lock,
    }
    paths = [IMPORT_PATH, *filter(None, [os.environ.get("PYTHONPATH")])]
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
    # A child stays in the process table until its parent has read its exit status.
    threading.Thread(target=process.wait, name="odtrt-rebuild-end", daemon=True).start()
    return process.pid


def _rebuild(request: Mapping[str, Any], report: Callable[..., None]) -> str:
    """Builds the plan in the rebuilding process; returns a message. Raises what the build raises."""
    folder, plugin = Path(request["folder"]), request["plugin"]
    stale = passports.read(folder / passports.PLANS / f"{request['fingerprint']}.json")
    place = this_environment(plugin)
    if not request["force"] and best_plan(folder, place, stale.model, stale.precision) is not None:
        return "another process has built a plan meanwhile"
    check_seal(folder, stale.model)
    if request["command"] is not None:
        keep = () if request["lock"] is None else (request["lock"],)
        # The command holds the lock too, even if this process is killed.
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
    """Holds the rebuild lock and yields its descriptor; yields None if another process holds the lock.

    A process that inherits the descriptor holds the lock too. Raises OSError if the folder cannot be written.
    """
    with _opened_lock(folder, os.O_RDWR | os.O_CREAT) as descriptor:
        yield descriptor if _take(descriptor) else None


def _take(descriptor: int) -> bool:
    """Takes the lock without waiting. Tries again while :func:`_is_locked`, in another process, holds it
    shared for a moment."""
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
    """The content of ``plans/.rebuild.json``; a damaged field counts as absent."""
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
    failures = dict(list(record["failures"].items())[-_MAX_FAILURES:])
    with atomic_write(folder / passports.PLANS / STATUS) as temporary:
        temporary.write_text(json.dumps({**record, "failures": failures}, indent=1) + "\n", encoding="utf-8")


def _settled(record: Dict[str, Any]) -> Dict[str, Any]:
    """The record if no process rebuilds: ``running`` becomes ``failed``, because that process died."""
    if record["state"] != "running":
        return record
    inputs = record["inputs"]
    earlier = record["failures"].get(inputs, {"deaths": 0, "is_final": False})
    deaths = earlier["deaths"] + 1
    is_final = earlier["is_final"] or deaths >= _MAX_DEATHS
    failure = {"message": _DIED, "time": record["since"], "deaths": deaths, "is_final": is_final}
    return {
        **record,
        "state": "failed",
        "message": _DIED,
        "failures": {**record["failures"], inputs or "": failure},
    }
