"""The model folder: the files that each stage writes for the next, whole or not at all.

``<name>/`` contains ``spec.json``, ``anchors.npy``, ``frozen.pb`` (stage 1), ``heads.onnx`` (stage 2),
``plans/`` (stage 3), ``detector.onnx`` (stage 4) and ``log.jsonl``, with one record for each finished stage.

**The seal.** The newest record that names a file holds the SHA-256 that the file must have, and the hashes of
the files from which it was made. :func:`sealed` returns the bytes that it compared, so what is used is what
was checked. A file without a record is refused. The seal finds damage and mix-ups. It is no signature:
whoever can write into the folder can write a record, too.

**One step.** A change of several files is prepared in a folder of its own. Renaming that folder to
``.commit-...`` decides the change; then the files move to their places. If a process is killed in between,
whoever opens the model folder next completes the move. Writers hold the folder's lock, and readers share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import time
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from odtrt_lib import __version__
from odtrt_lib.errors import InputError, OdtrtError, one_line
from odtrt_lib.machine import peak_rss_mb
from odtrt_lib.spec import sections_for_records
from odtrt_lib.variants import models

LOG = "log.jsonl"
SEALED = ("spec.json", "anchors.npy", "frozen.pb", *models())
"""The files that the seal covers. Plans have passports instead."""

SPEC_PARTS = {model: form.spec_part for model, form in models().items()}
"""Model -> the part of ``spec.json`` that goes into it, as records name it; labels and source are in none."""

_COMMIT, _STAGING, _REMOVED = ".commit-", ".staging-", ".removed.json"
_MAKE_AGAIN = {
    "fuse_onnx": "run `odtrt fuse --form onnx_nms` again",
    "unpack": "unpack the bundle again",
    "seal": "put the right file back, or seal the folder again if this is the right one",
}
_COMMANDS = {model: form.command for model, form in models().items()}
_LARGEST = {"spec.json": 1 << 24, "anchors.npy": 1 << 30, LOG: 1 << 26}
_LARGEST_MODEL = 1 << 31  # protobuf's own limit
_DEEPEST_JSON = 20
# A file that has just changed can change again without a new time stamp.
_SETTLED_NS = 2 * 10**9
_digests: Dict[Tuple[int, ...], str] = {}


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage function returns: its record in ``log.jsonl``, and whether it had nothing to do.

    ``note`` is a line that the user should read; it can be empty.
    """

    record: Dict[str, Any]
    is_up_to_date: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of a stage: its inputs and settings, and the record that it writes.

    inputs: what the stage reads, name -> SHA-256 of the content that matters. settings: JSON values. If
    :meth:`finished` returns a record, the stage has nothing to do. Otherwise it writes its files inside
    :func:`staging` and calls :meth:`record` there, so that files and record appear in one step.
    """

    folder: Path
    name: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def finished(self, force: bool = False) -> Optional[Dict[str, Any]]:
        """The record of an earlier run with the same inputs and settings, if its outputs are intact."""
        return None if force else up_to_date(self.folder, self.name, self.inputs, self.settings)

    def record(
        self,
        staged: Path,
        outputs: Sequence[str],
        versions: Mapping[str, str],
        checks: Mapping[str, Any],
    ) -> Dict[str, Any]:
        """Writes the record, with the seconds since this object was made and the process's peak memory."""
        return write_record(
            self.folder,
            self.name,
            staged=staged,
            inputs=self.inputs,
            settings=self.settings,
            outputs=outputs,
            versions=versions,
            seconds=time.perf_counter() - self.started,
            peak_rss_mb=peak_rss_mb("self") or 0.0,
            checks=checks,
        )


def sha256(path: Union[str, Path]) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def staging(folder: Union[str, Path]) -> Iterator[Path]:
    """A temporary folder inside ``folder``. On success, its files move into ``folder`` at the end of the
    block.

    They appear in one step (see the module's docstring), together with a record that :func:`write_record`
    staged. Each file is on the disk before it gets its name. After any exception, Ctrl-C included, what was
    written is removed, and so is ``folder`` if this call made it. Files that a killed process left are
    removed at the start. Raises InputError if ``folder`` cannot be written, if a file or folder is in the
    way, or if the disk is full.
    """
    folder = Path(folder)
    try:
        with made(folder), workplace(folder, _STAGING) as temporary:
            yield temporary
            commit(temporary, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents. If the block fails, removes those that this call made."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        absent = []
    finally:
        for path in absent:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def workplace(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``parent`` with a name that cannot be guessed. It is removed after the block.

    First removes folders with this prefix whose process is dead and whose lock nobody holds. The process
    number alone does not tell: a process of another container is alive, but not visible here.
    """
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_alive(path.name[len(prefix) :].split("-")[0]) and not _is_held(path):
            shutil.rmtree(path, ignore_errors=True)
    made = None
    try:
        with contextlib.ExitStack() as held:
            while made is None:
                made = parent / f"{prefix}{os.getpid()}-{secrets.token_hex(8)}"
                made.mkdir()
                held.enter_context(exclusive(made))
                if not made.exists():  # removed by another process before it was held
                    held.close()
                    made = None
            yield made
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """A temporary file beside ``path``. On success it replaces ``path`` after the block; otherwise it is
    removed.

    The bytes are on the disk before they get their name, so a power cut leaves the old file or the new one.
    The temporary file is created exclusively, with a name that cannot be guessed, and is locked. Files that a
    killed process left are not locked, and are removed.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for orphan in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if not _is_alive(orphan.name.split(".")[-2].split("-")[0]) and not _is_held(orphan):
                orphan.unlink()
        with contextlib.ExitStack() as held:
            while temporary is None:
                temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")
                created = os.open(str(temporary), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                held.callback(os.close, created)
                with contextlib.suppress(OSError):
                    fcntl.flock(created, fcntl.LOCK_EX)
                if not temporary.exists():  # removed by another process before it was held
                    temporary = None
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def commit(content: Path, folder: Path, removed: Sequence[str] = ()) -> None:
    """Moves all files below ``content`` into ``folder``, on the same disk, in one step for every reader.

    ``content`` does not exist afterwards. A staged ``log.jsonl`` in it continues the one in ``folder``.
    removed: files to remove, relative to ``folder``. If a folder, a file or a link is in the way, raises
    InputError and changes nothing.
    """
    names = sorted(path.relative_to(content) for path in content.rglob("*") if path.is_file())
    if not names:
        return
    _refuse_obstacles(folder, names, [Path(name) for name in removed])
    _list_removed(content, removed)
    for path in content.rglob("*"):
        sync(path)
    with exclusive(folder):
        finish(folder)
        os.replace(content, folder / f"{_COMMIT}{secrets.token_hex(8)}")
        sync(folder)
        try:
            finish(folder)
        except KeyboardInterrupt:  # the change is decided already
            finish(folder)
            raise


def finish(folder: Path) -> None:
    """Completes an unfinished change in ``folder``, if there is one. The caller must hold the lock.

    Raises InputError if the folder cannot be written.
    """
    for change in _under_way(folder):
        try:
            _move_all(change, folder)
        except OSError as error:
            raise InputError(
                f"{folder}: a change of several files was interrupted and cannot be completed "
                f"({error.strerror or error}); run any odtrt command as a user who may write there"
            ) from error


def _under_way(folder: Path) -> List[Path]:
    """The decided changes whose files are not all in their places yet: one if a process was killed, else
    none."""
    try:
        with os.scandir(str(folder)) as entries:
            found = [one.name for one in entries if one.name.startswith(_COMMIT)]
    except OSError:
        return []
    return [folder / name for name in found if (folder / name).is_dir() and not (folder / name).is_symlink()]


def _list_removed(content: Path, removed: Sequence[str]) -> None:
    """Writes the list of files to remove, for each model folder beside that folder's log."""
    places = [log.parent for log in content.rglob(LOG) if log.parent != content]
    lists: Dict[Path, List[str]] = {}
    for name in removed:
        place = next((one for one in places if one in (content / name).parents), content)
        lists.setdefault(place, []).append((content / name).relative_to(place).as_posix())
    for place, list_ in lists.items():
        (place / _REMOVED).write_text(json.dumps(list_), encoding="utf-8")


def _move_all(change: Path, folder: Path) -> None:
    """Moves the files of a decided change to their places.

    The process can be killed after any step; repeating all steps gives the same result. A folder inside that
    has a log of its own is another model folder, so its part becomes a change of that folder first.
    """
    for log in sorted(change.rglob(LOG)):
        if log.parent == change:
            continue
        inner = folder / log.parent.relative_to(change)
        inner.mkdir(parents=True, exist_ok=True)
        with exclusive(inner):
            finish(inner)
            os.replace(log.parent, inner / change.name)
            sync(inner)
            finish(inner)
    names = [path.relative_to(change) for path in sorted(change.rglob("*")) if path.is_file()]
    for name in names:
        if name.name == _REMOVED:
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(name) == LOG:
            _join_logs(change / name, target)
        os.replace(change / name, target)
    if (change / _REMOVED).exists():
        for old in json.loads((change / _REMOVED).read_text(encoding="utf-8")):
            if _is_inside(old):
                with contextlib.suppress(FileNotFoundError):
                    (folder / old).unlink()
    for parent in {folder, *((folder / name).parent for name in names)}:
        sync(parent)
    shutil.rmtree(change)


def _join_logs(staged: Path, present: Path) -> None:
    """Adds to the staged log the records that others wrote into the present log in the meantime."""
    if not present.exists():
        return
    old, new = (path.read_bytes().splitlines(keepends=True) for path in (present, staged))
    pairs = enumerate(zip(old, new))
    shared = next((i for i, (one, other) in pairs if one != other), min(len(old), len(new)))
    if shared < len(old):
        with atomic_write(staged) as temporary:
            temporary.write_bytes(b"".join(old + new[shared:]))


def _refuse_obstacles(folder: Path, names: Sequence[Path], removed: Sequence[Path]) -> None:
    for name in (*names, *removed):
        target = folder / name
        for parent in (folder / one for one in name.parents if str(one) != "."):
            if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
                raise InputError(
                    f"{parent}: a {'link' if parent.is_symlink() else 'file'}, expected a folder; "
                    "nothing was changed: move it away"
                )
        if target.is_dir() and not target.is_symlink():
            raise InputError(f"{target}: a folder, expected a file; nothing was changed: move it away")
        if name.name == _REMOVED or name.parts[0].startswith(_COMMIT):
            raise InputError(f"{target}: a name that odtrt keeps for itself; nothing was changed")


@contextlib.contextmanager
def exclusive(folder: Union[str, Path]) -> Iterator[None]:
    """Holds the lock of an existing folder while the block runs; other processes and threads wait for it.

    The lock is flock(2)'s, on the folder itself. It needs no file, and ends when the process ends in any way.
    It is not reentrant. If the folder cannot be locked (some network file systems), the block runs without a
    lock.
    """
    with _flocked(folder, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def undisturbed(folder: Union[str, Path]) -> Iterator[None]:
    """For readers: no file of ``folder`` changes while the block runs, and no change is half done.

    First completes a change that a killed process left. Several readers share the lock. Do not write a record
    in the block: it would wait for the block's end. Raises InputError if the change cannot be completed.
    """
    folder = Path(folder)
    while True:
        with _flocked(folder, fcntl.LOCK_SH):
            if not _under_way(folder):
                yield
                return
        with exclusive(folder):
            finish(folder)


@contextlib.contextmanager
def _flocked(folder: Union[str, Path], operation: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, operation)
            stack.callback(_unlock, descriptor)  # else a forked child would keep the lock
        yield


def _unlock(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block, e.g. until a process that was started has a handle.

    Does nothing if Ctrl-C is ignored, or outside the main thread, which alone receives it.
    """
    hears = signal.getsignal(signal.SIGINT)
    if not callable(hears) or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: List[Any] = []
    signal.signal(signal.SIGINT, lambda _, frame: heard.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, hears)
        if heard:
            hears(signal.SIGINT, heard[0])


def sync(path: Union[str, Path]) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk.

    Raises OSError if a file could not be stored; some file systems report a full disk only now.
    """
    descriptor = os.open(str(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:
        if not Path(path).is_dir():  # some file systems cannot do this for folders
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> OdtrtError:
    """The one-line error for a failed write to ``path``."""
    if error.errno == errno.ENOSPC:
        return InputError(f"{path}: the disk is full; free some space and run again")
    if isinstance(error, FileNotFoundError) and error.filename and not Path(error.filename).exists():
        return InputError(f"{error.filename}: not found; expected a file that this stage reads or writes")
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); choose a folder that you can write to"
    )


def write_record(
    folder: Union[str, Path],
    stage: str,
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    outputs: Sequence[str],
    versions: Mapping[str, str],
    seconds: float,
    peak_rss_mb: float,
    checks: Mapping[str, Any],
    staged: Optional[Path] = None,
) -> Dict[str, Any]:
    """Appends the record of a finished stage to ``log.jsonl`` and returns it.

    Stages that finish at the same time wait for one another, so that no record is lost.

    inputs: what the stage read, name -> SHA-256. outputs: names of files in ``folder``; this function hashes
    them. checks: what was verified, with its figures. staged: the folder of :func:`staging`, if the outputs
    are still in it; the record then appears together with them.
    """
    folder = Path(folder)
    place = folder if staged is None else staged
    record = {
        "stage": stage,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": dict(inputs),
        "settings": dict(settings),
        "outputs": {name: sha256(place / name) for name in outputs},
        "versions": dict(versions),
        "seconds": round(seconds, 3),
        "peak_rss_mb": round(peak_rss_mb, 1),
        "checks": dict(checks),
    }
    append_record(folder, record, staged)
    return record


def append_record(folder: Path, record: Mapping[str, Any], staged: Optional[Path] = None) -> None:
    """Appends a record as it is. For ``staged`` see :func:`write_record`."""
    record = _plain(record)
    line = (json.dumps({**record, "check": _checksum(record)}) + "\n").encode()
    if staged is not None:
        (staged / LOG).write_bytes(_log_bytes(folder / LOG) + line)
        return
    with exclusive(folder):
        finish(folder)
        previous = _log_bytes(folder / LOG)
        with atomic_write(folder / LOG) as temporary:
            temporary.write_bytes(previous + line)


def read_log(folder: Union[str, Path]) -> List[Dict[str, Any]]:
    """The records of ``log.jsonl``, oldest first; an empty list if there is none.

    Raises InputError, naming the line, if a record is damaged or is not what :func:`write_record` writes.
    """
    path = Path(folder) / LOG
    records = []
    for number, line in enumerate(_log_bytes(path).split(b"\n"), 1):
        if line.strip():
            try:
                records.append(_parse_record(line))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}: line {number} is damaged ({one_line(error)[:120]}); delete it and run the "
                    "stages, or unpack the bundle, again"
                ) from error
    return records


def _log_bytes(path: Path) -> bytes:
    try:
        return read_whole(path, _LARGEST[LOG])
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); expected the records of the stages"
        ) from error


def read_whole(path: Path, largest: int) -> bytes:
    """The bytes of a regular file of at most ``largest`` bytes. Raises OSError for anything else, such as a
    named pipe."""
    descriptor = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if found.st_size > largest:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, at most {largest} are expected")
        return file.read()


def _parse_record(line: bytes) -> Dict[str, Any]:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, expected an object")
    for name, is_right in _RECORD_FIELDS.items():
        if name not in record:
            raise ValueError(f"{name} is missing")
        if not is_right(record[name]):
            raise ValueError(f"{name} is {record[name]!r:.60}")
    if not _is_plain_json(record, _DEEPEST_JSON):
        raise ValueError("nested too deep, or text that is not Unicode")
    check = record.pop("check", None)  # odtrt 0.1 wrote none
    if check is not None and check != _checksum(record):
        raise ValueError("altered: its fields do not go with their checksum `check`")
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _are_outputs(value: Any) -> bool:
    return _is_text_map(value) and all(
        _is_inside(name) and re.fullmatch("[0-9a-f]{64}", digest) for name, digest in value.items()
    )


def _is_inside(name: str) -> bool:
    """Whether a name in a record, which a stranger may have written, is that of a file in the folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and name[0] != "/" and "\0" not in name and len(name) < 256


def _is_amount(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -1e15 < value < 1e15


def _is_plain_json(value: Any, depth: int) -> bool:
    if depth < 0:
        return False
    if isinstance(value, str):
        return not re.search("[\ud800-\udfff]", value)
    if isinstance(value, dict):
        return all(_is_plain_json(one, depth - 1) for pair in value.items() for one in pair)
    return not isinstance(value, list) or all(_is_plain_json(one, depth - 1) for one in value)


_RECORD_FIELDS = {
    "stage": lambda value: isinstance(value, str) and 0 < len(value) < 100,
    "time": lambda value: isinstance(value, str),
    "inputs": _is_text_map,
    "settings": lambda value: isinstance(value, dict),
    "outputs": _are_outputs,
    "versions": _is_text_map,
    "seconds": _is_amount,
    "peak_rss_mb": _is_amount,
    "checks": lambda value: isinstance(value, dict),
}


def last_record(folder: Union[str, Path], stage: str) -> Optional[Dict[str, Any]]:
    """The newest record of ``stage``, or None."""
    return next((r for r in reversed(read_log(folder)) if r["stage"] == stage), None)


def up_to_date(
    folder: Union[str, Path], stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]
) -> Optional[Dict[str, Any]]:
    """The last record of ``stage`` if its inputs and settings are these and its outputs are intact, or
    None."""
    folder = Path(folder)
    with undisturbed(folder):
        record = last_record(folder, stage)
        if record is None or record["inputs"] != dict(inputs) or record["settings"] != _plain(settings):
            return None
        newest = recorded(folder)
        for name, digest in record["outputs"].items():
            path = folder / name
            if not path.is_file() or sha256(path) != digest:
                return None
            if name in newest and newest[name].sha256 != digest:  # its user has sealed it since
                return None
    return record


# ---- The seal ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the newest record of a file says. origins: the files from which it was made -> their SHA-256."""

    sha256: str
    stage: str
    origins: Mapping[str, str]


def recorded(folder: Union[str, Path]) -> Dict[str, Recorded]:
    """The files of :data:`SEALED` that ``log.jsonl`` records: name -> what the newest record says."""
    found: Dict[str, Recorded] = {}
    for record in read_log(folder):
        for name in SEALED:
            if name in record["outputs"]:
                # The record of a bundle or a seal has no inputs; all its files belong together.
                together = {} if record["inputs"] else record["outputs"]
                origins = {one: digest for one, digest in together.items() if one in _origins(name)}
                found[name] = Recorded(
                    record["outputs"][name], record["stage"], {**origins, **record["inputs"]}
                )
    return found


def sealed(folder: Union[str, Path], *names: str) -> Dict[str, bytes]:
    """The bytes of files of a model folder, after a check that their stages wrote them and that they belong
    together.

    Returns name -> the bytes that were compared with the records. Raises InputError if a file is missing,
    damaged, without a record, or made from other files than those beside it. The message names the file, the
    two hashes and the command that makes the file again.
    """
    folder = Path(folder)
    require_folder(folder)
    with undisturbed(folder):
        known = recorded(folder)
        contents = {name: _content(folder, name) for name in dict.fromkeys(("spec.json", *names))}
        for name, content in contents.items():
            _compare(folder, name, known.get(name), hashlib.sha256(content).hexdigest())
        for name in names:
            _compare_origins(folder, name, known, contents["spec.json"])
    return {name: contents[name] for name in names}


def check_seal(folder: Union[str, Path], *names: str) -> Dict[str, str]:
    """Checks like :func:`sealed`, and returns name -> SHA-256. A file that was hashed before is not read
    again if its size, times and inode are the same."""
    folder = Path(folder)
    require_folder(folder)
    with undisturbed(folder):
        known = recorded(folder)
        spec = _content(folder, "spec.json")
        digests = {"spec.json": hashlib.sha256(spec).hexdigest()}
        for name in names:
            if name not in digests:
                digests[name] = known_sha256(_existing(folder, name))
        for name, digest in digests.items():
            _compare(folder, name, known.get(name), digest)
        for name in names:
            _compare_origins(folder, name, known, spec)
    return {name: digests[name] for name in names}


def is_outdated(folder: Union[str, Path], name: str) -> bool:
    """Whether a model was made from other files than those that the newest records name.

    The model's own file is not read, and may be absent: a plan that was built from it may be all that is
    left.
    """
    folder = Path(folder)
    with undisturbed(folder):
        known = recorded(folder)
        if name not in known:
            return False
        try:
            _compare_origins(folder, name, known, _content(folder, "spec.json"))
        except InputError:
            return True
    return False


def seal(folder: Union[str, Path]) -> Dict[str, Any]:
    """Records the files of :data:`SEALED` as they are now. Use it for your own files, which no stage wrote.

    The caller must know that they belong together. Returns the record.
    """
    folder = Path(folder)
    require_folder(folder)
    present = [name for name in SEALED if (folder / name).is_file()]
    return write_record(
        folder,
        "seal",
        inputs={},
        settings={},
        outputs=present,
        versions={"odtrt": __version__},
        seconds=0.0,
        peak_rss_mb=0.0,
        checks={},
    )


def made_from(model: str, files: Mapping[str, bytes]) -> Dict[str, str]:
    """The inputs for a model's record: name -> SHA-256 of the content that matters.

    model: a key of :data:`SPEC_PARTS`. files: what :func:`sealed` returned, with ``spec.json``.
    """
    inputs = {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != "spec.json"
    }
    part = SPEC_PARTS[model]
    return {**inputs, part: part_sha256(files["spec.json"], part) or ""}


def part_sha256(spec: bytes, part: str) -> Optional[str]:
    """The SHA-256 of one of :data:`SPEC_PARTS` in the text of a spec.json; None if it has no such part."""
    try:
        data = sections_for_records(spec)
        sections = {section: data[section] for section in part.partition(": ")[2].split(", ")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()


def known_sha256(path: Path) -> str:
    """:func:`sha256`, but a file is read again only if its size, times or inode have changed."""
    found = path.stat()
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if key not in _digests:
        digest = sha256(path)
        if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED_NS:
            return digest
        _digests[key] = digest
    return _digests[key]


def _existing(folder: Path, name: str) -> Path:
    return require(folder, name, _COMMANDS.get(name, "export"))


def _content(folder: Path, name: str) -> bytes:
    path = _existing(folder, name)
    try:
        return read_whole(path, _LARGEST.get(name, _LARGEST_MODEL))
    except OSError as error:
        again = f"run `odtrt {_COMMANDS.get(name, 'export')}` again"
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {again}") from error


def _make_again(stage: str) -> str:
    return _MAKE_AGAIN.get(stage, f"run `odtrt {stage}` again")


def _compare(folder: Path, name: str, known: Optional[Recorded], digest: str) -> None:
    path = folder / name
    if known is None:
        command = _COMMANDS.get(name, "export")
        raise InputError(
            f"{path}: not sealed, {LOG} has no record of it; run `odtrt {command}` again, or, if it is your "
            "own file, call odtrt_lib.folder.seal on the folder"
        )
    if digest != known.sha256:
        raise InputError(
            f"{path}: damaged or changed: its SHA-256 is {digest[:12]}..., the record of `{known.stage}` in "
            f"{LOG} says {known.sha256[:12]}...; {_make_again(known.stage)}"
        )


def _compare_origins(folder: Path, name: str, known: Mapping[str, Recorded], spec: bytes) -> None:
    for origin, digest in known[name].origins.items():
        file, _, sections = origin.partition(": ")
        if sections:
            found = part_sha256(spec, origin)
        else:
            found = known[file].sha256 if file in known and file in _origins(name) else None
        if found is not None and found != digest:
            raise InputError(
                f"{folder / name}: made from another {file} than the one beside it; "
                f"{_make_again(known[name].stage)}"
            )


def _origins(name: str) -> Tuple[str, ...]:
    """The sealed files from which a file is made, or with which it must agree."""
    if name == "heads.onnx":
        return ("frozen.pb", "anchors.npy", "spec.json")
    return ("heads.onnx", "anchors.npy", "spec.json") if name.startswith("detector") else ()


def require_folder(folder: Union[str, Path]) -> None:
    """Raises InputError if there is no such folder."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; expected a model folder, as `odtrt export` writes it")


def require(folder: Union[str, Path], name: str, made_by: str) -> Path:
    """The path of a file that an earlier stage wrote.

    Raises InputError if it is absent, naming that stage's command, or if there is no such folder.
    """
    require_folder(folder)
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{path}: not found; run `odtrt {made_by}` first, which writes it")
    return path


def _plain(settings: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(settings)))


def _is_alive(process: str) -> bool:
    return process.isdigit() and Path(f"/proc/{process}").exists()


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
