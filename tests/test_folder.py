"""The model folder: whole or not at all, whatever happens in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from odtrt_lib import folder as folders
from odtrt_lib.errors import InputError
from odtrt_lib.folder import (
    atomic_write,
    exclusive,
    last_record,
    read_log,
    require,
    sha256,
    staging,
    up_to_date,
    write_record,
)


def record(folder, **changes):
    given = {
        "inputs": {"a": "1"},
        "settings": {"opset": 17},
        "outputs": ["x.bin"],
        "versions": {},
        "seconds": 1.0,
        "peak_rss_mb": 2.0,
        "checks": {"ok": True},
    }
    return write_record(folder, "convert", **{**given, **changes})


def test_files_appear_together_when_the_block_ends(tmp_path):
    folder = tmp_path / "model"
    with staging(folder) as out:
        (out / "one").write_text("1")
        (out / "plans").mkdir()
        (out / "plans" / "two").write_text("2")
        assert not (folder / "one").exists()
    assert (folder / "one").read_text() == "1" and (folder / "plans" / "two").read_text() == "2"
    assert sorted(path.name for path in folder.iterdir()) == ["one", "plans"]


@pytest.mark.parametrize("fault", [ValueError("bug"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_fault_leaves_the_old_files_and_no_new_ones(tmp_path, fault):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "one").write_text("old")
    with pytest.raises((type(fault), InputError)):
        with staging(folder) as out:
            (out / "one").write_text("new")
            raise fault
    assert [path.name for path in folder.iterdir()] == ["one"]
    assert (folder / "one").read_text() == "old"


def test_a_fault_removes_folders_that_were_made(tmp_path):
    with pytest.raises(ValueError, match="bug"):
        with staging(tmp_path / "a" / "b"):
            raise ValueError("bug")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, signal, sys; from odtrt_lib.folder import staging\n"
        "with staging(sys.argv[1]) as out:\n"
        "    (out / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any((tmp_path / "model").glob(".staging-*"))
    with staging(tmp_path / "model") as out:
        (out / "whole").write_text("y")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]


def test_staging_of_a_living_process_is_left_alone(tmp_path):
    other = tmp_path / f".staging-{os.getpid()}-other"
    other.mkdir()
    with staging(tmp_path):
        pass
    assert other.exists()


def test_atomic_write_keeps_the_old_file_on_a_fault(tmp_path):
    path = tmp_path / "log"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["log"]


def test_full_disk_says_so(tmp_path):
    with pytest.raises(InputError, match="disk is full"):
        with atomic_write(tmp_path / "x"):
            raise OSError(28, "No space left on device")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        with pytest.raises(InputError, match="disk is full"):
            with staging(disk / "model") as out:
                (out / "big").write_bytes(bytes(1 << 20))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, signal, sys; from odtrt_lib.folder import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "log [1].jsonl"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"
    living = tmp_path / f".log [1].jsonl.{os.getppid()}.tmp"
    living.write_text("of a process that lives")
    assert len(list(tmp_path.iterdir())) == 3
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and sorted(tmp_path.iterdir()) == sorted([path, living])


def test_staging_that_somebody_holds_is_left_alone_even_if_its_process_is_not_to_be_seen(tmp_path):
    """As that of a process in another container on the same folder."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    other = tmp_path / f".staging-{gone.pid}-elsewhere"
    other.mkdir()
    with exclusive(other), staging(tmp_path):
        pass
    assert other.exists()
    with staging(tmp_path):
        pass
    assert not other.exists()


WRITERS = """
import sys
from odtrt_lib import folder
if sys.argv[2] == "unlocked":
    import contextlib
    folder.exclusive = lambda _: contextlib.nullcontext()
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    folder.write_record(
        sys.argv[1], "engine", inputs={}, settings={}, outputs=[], versions={}, seconds=0.0, peak_rss_mb=0.0,
        checks={"number": number},
    )
"""


@pytest.mark.parametrize("lock", ["locked", "unlocked"])
def test_processes_that_write_records_at_once_lose_none(tmp_path, lock):
    record(tmp_path, outputs=[])
    program = [sys.executable, "-c", WRITERS, str(tmp_path), lock]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [subprocess.Popen(program, **pipes) for _ in range(4)]
    assert [writer.stdout.readline() for writer in writers] == [b"ready\n"] * 4
    for writer in writers:
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0] * 4
    numbers = sorted(one["checks"].get("number", -1) for one in read_log(tmp_path))
    if lock == "locked":
        assert numbers == sorted([-1, *list(range(40)) * 4])
    else:
        assert len(numbers) < 161, "without the lock this test would find records lost"


def test_a_folder_that_cannot_be_locked_can_still_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    record(tmp_path, outputs=[])
    with staging(tmp_path) as out:
        (out / "one").write_text("1")
    assert len(read_log(tmp_path)) == 1 and (tmp_path / "one").exists()


def test_bytes_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    steps = []
    real_sync, real_replace = folders.os.fsync, folders.os.replace

    def fsync(descriptor):
        steps.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        real_sync(descriptor)

    def replace(source, target):
        steps.append(("name", Path(target).name))
        real_replace(source, target)

    monkeypatch.setattr(folders.os, "fsync", fsync)
    monkeypatch.setattr(folders.os, "replace", replace)
    with staging(tmp_path / "model") as out:
        (out / "one").write_text("1")
    with atomic_write(tmp_path / "model" / "two") as temporary:
        temporary.write_text("2")
    hidden = "a temporary name"
    assert [(step, hidden if name.startswith((".commit-", ".two.")) else name) for step, name in steps] == [
        ("sync", "one"),
        ("name", "a temporary name"),  # all of them are decided
        ("sync", "model"),
        ("name", "one"),
        ("sync", "model"),
        ("sync", "a temporary name"),
        ("name", "two"),
        ("sync", "model"),
    ]


def test_a_disk_that_is_full_only_when_the_bytes_are_stored_says_so(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    for write in (lambda: atomic_write(tmp_path / "x"), lambda: staging(tmp_path)):
        with pytest.raises(InputError, match="disk is full"):
            with write() as place:
                (place / "x" if place.is_dir() else place).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_up_to_date_needs_same_inputs_settings_and_intact_outputs(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"data")
    written = record(tmp_path)
    assert written["outputs"] == {"x.bin": sha256(tmp_path / "x.bin")}
    assert up_to_date(tmp_path, "convert", {"a": "1"}, {"opset": 17}) == written
    assert up_to_date(tmp_path, "convert", {"a": "2"}, {"opset": 17}) is None
    assert up_to_date(tmp_path, "convert", {"a": "1"}, {"opset": 18}) is None
    assert up_to_date(tmp_path, "export", {"a": "1"}, {"opset": 17}) is None
    (tmp_path / "x.bin").write_bytes(b"dat!")
    assert up_to_date(tmp_path, "convert", {"a": "1"}, {"opset": 17}) is None
    (tmp_path / "x.bin").unlink()
    assert up_to_date(tmp_path, "convert", {"a": "1"}, {"opset": 17}) is None


def test_the_log_keeps_every_record_and_a_damaged_one_is_named(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"data")
    record(tmp_path)
    record(tmp_path, checks={"ok": False})
    assert len(read_log(tmp_path)) == 2
    newest = last_record(tmp_path, "convert")
    assert newest is not None and newest["checks"] == {"ok": False}
    (tmp_path / "log.jsonl").write_text("{not json\n")
    with pytest.raises(InputError, match=r"log\.jsonl"):
        read_log(tmp_path)


def test_a_missing_file_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(InputError, match=r"heads\.onnx: not found; run `odtrt convert`"):
        require(tmp_path, "heads.onnx", "convert")
