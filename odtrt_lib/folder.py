"""The model folder: what each stage leaves behind for the next, written whole or not at all.

``<name>/`` holds ``spec.json``, ``anchors.npy``, ``frozen.pb`` (stage 1), ``heads.onnx`` (stage 2),
``plans/`` (stage 3) and ``log.jsonl``: one record a finished stage.
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
import shutil
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Union

from odtrt_lib.errors import InputError, OdtrtError

LOG = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage function returns: its record in ``log.jsonl``, and whether it had nothing to do.

    ``note`` is a line that the user should read in either case, or nothing.
    """

    record: Dict[str, Any]
    is_up_to_date: bool
    note: str = ""


def sha256(path: Union[str, Path]) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def staging(folder: Union[str, Path]) -> Iterator[Path]:
    """A temporary folder inside ``folder``; its files move into ``folder`` when the block ends well.

    Each file is on the disk before it gets its name; the files appear one after the other. Any exception,
    Ctrl-C included, removes what was written, and ``folder`` itself if this call made it. What an earlier
    process that was killed left behind is removed at the start. Raises InputError where ``folder`` cannot be
    written or the disk is full.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_orphans(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f".staging-{os.getpid()}-", dir=str(folder)))
        with exclusive(temporary):
            yield temporary
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            for source in files:
                sync(source)
            targets = [folder / source.relative_to(temporary) for source in files]
            for source, target in zip(files, targets):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
            for parent in {target.parent for target in targets}:
                sync(parent)
        made = []
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends well, else vanishes.

    The bytes are on the disk before they get their name, so that a power cut leaves the old file or the new
    one. What an earlier process that was killed left behind is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for orphan in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if not _is_alive(orphan.name.split(".")[-2]):
                orphan.unlink()
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def exclusive(folder: Union[str, Path]) -> Iterator[None]:
    """Holds the lock of an existing folder while the block runs; other processes and threads wait for it.

    The lock is flock(2)'s on the folder itself: it leaves no file behind and ends with the process, however
    that ends. Not reentrant. Where the folder cannot be locked (some network file systems), the block runs
    without.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def sync(path: Union[str, Path]) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk.

    Raises OSError where a file could not be stored: a full disk can show as late as here.
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
        return InputError(f"{path}: the disk is full; nothing was written: free some space and run again")
    if isinstance(error, FileNotFoundError) and error.filename and not Path(error.filename).exists():
        return InputError(f"{error.filename}: not found; expected a file that this stage reads or writes")
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); nothing was written: "
        "choose a folder that you can write to"
    )


def write_record(
    folder: Union[str, Path],
    stage: str,
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    outputs: List[str],
    versions: Mapping[str, str],
    seconds: float,
    peak_rss_mb: float,
    checks: Mapping[str, Any],
) -> Dict[str, Any]:
    """Appends the record of a finished stage to ``log.jsonl`` and returns it.

    Stages that finish at the same time wait for one another, so that no record is lost.

    inputs: what the stage read, name -> SHA-256. outputs: names of files in ``folder``, hashed here.
    checks: what was verified, with its figures.
    """
    folder = Path(folder)
    record = {
        "stage": stage,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": dict(inputs),
        "settings": dict(settings),
        "outputs": {name: sha256(folder / name) for name in outputs},
        "versions": dict(versions),
        "seconds": round(seconds, 3),
        "peak_rss_mb": round(peak_rss_mb, 1),
        "checks": dict(checks),
    }
    with exclusive(folder):
        previous = (folder / LOG).read_text() if (folder / LOG).exists() else ""
        with atomic_write(folder / LOG) as temporary:
            temporary.write_text(previous + json.dumps(record) + "\n")
    return record


def read_log(folder: Union[str, Path]) -> List[Dict[str, Any]]:
    """The records of ``log.jsonl``, oldest first; an empty list where there is none."""
    path = Path(folder) / LOG
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run the stages again") from error


def last_record(folder: Union[str, Path], stage: str) -> Optional[Dict[str, Any]]:
    """The newest record of ``stage``, or None."""
    return next((r for r in reversed(read_log(folder)) if r["stage"] == stage), None)


def up_to_date(
    folder: Union[str, Path], stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]
) -> Optional[Dict[str, Any]]:
    """The last record of ``stage`` if it had these inputs and settings and its outputs are intact."""
    record = last_record(folder, stage)
    if record is None or record["inputs"] != dict(inputs) or record["settings"] != _plain(settings):
        return None
    for name, digest in record["outputs"].items():
        path = Path(folder) / name
        if not path.is_file() or sha256(path) != digest:
            return None
    return record


def require_folder(folder: Union[str, Path]) -> None:
    """Raises InputError where there is no such folder."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; expected a model folder, as `odtrt export` writes it")


def require(folder: Union[str, Path], name: str, made_by: str) -> Path:
    """The path of a file that an earlier stage wrote.

    Raises InputError where it is absent, naming that stage's command, or where there is no such folder.
    """
    require_folder(folder)
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{path}: not found; run `odtrt {made_by}` first, which writes it")
    return path


def _plain(settings: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(settings)))


def _remove_orphans(folder: Path) -> None:
    """Removes staging folders whose process is dead and that nobody holds.

    The process alone does not tell: in another container it is alive and not to be seen from here.
    """
    for path in folder.glob(".staging-*"):
        if not _is_alive(path.name.split("-")[1]) and not _is_held(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: str) -> bool:
    return process.isdigit() and Path(f"/proc/{process}").exists()


def _is_held(folder: Path) -> bool:
    try:
        descriptor = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
