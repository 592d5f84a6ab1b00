"""The model folder: whole or not at all, whatever happens in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odtrt_lib import folder as folders
from odtrt_lib.errors import InputError, OdtrtError
from odtrt_lib.folder import (
    atomic_write,
    check_seal,
    exclusive,
    last_record,
    read_log,
    require,
    seal,
    sealed,
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
    atomic_write = folder.atomic_write

    def write_after_all_have_read(path):
        folder.atomic_write = atomic_write
        print("read", flush=True)
        sys.stdin.readline()
        return atomic_write(path)

    folder.atomic_write = write_after_all_have_read
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
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    writers = [subprocess.Popen(program, **pipes) for _ in range(4)]
    for said in (b"ready\n", b"read\n") if lock == "unlocked" else (b"ready\n",):
        assert [writer.stdout.readline() for writer in writers] == [said] * 4
        for writer in writers:
            writer.stdin.write(b"\n")
    assert [writer.wait() for writer in writers] == [0] * 4
    numbers = sorted(one["checks"].get("number", -1) for one in read_log(tmp_path))
    if lock == "locked":
        assert numbers == sorted([-1, *list(range(40)) * 4])
    else:
        assert len(numbers) < 161, "of four that read before any of them wrote, three records are lost"


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


# ---- The seal -------------------------------------------------------------------------------------------

SPEC = {
    "name": "a",
    "labels": [{"id": 1, "name": "nut"}],
    "heads": {"num_anchors": 3},
    "input": {"height": 4},
}
SPEC.update(
    {"box_coder": {"y_scale": 10.0}, "nms": {"iou_threshold": 0.5}, "scores": {"converter": "sigmoid"}}
)


def model_folder(path, **changes):
    """As export, convert and fuse leave it: what the files are does not matter to the seal."""
    path.mkdir(exist_ok=True)
    export(path, **changes)
    about = {"settings": {}, "versions": {}, "seconds": 1.0, "peak_rss_mb": 1.0, "checks": {}}
    for stage, name, names in (
        ("convert", "heads.onnx", ("frozen.pb", "spec.json")),
        ("fuse", "detector.onnx", ("heads.onnx", "anchors.npy", "spec.json")),
    ):
        inputs = folders.made_from(name, sealed(path, *names))
        with staging(path) as out:
            (out / name).write_bytes(b"made from " + json.dumps(inputs).encode())
            write_record(path, stage, staged=out, inputs=inputs, outputs=[name], **about)
    return path


def export(path, spec=SPEC, weights=b"weights", anchors=b"anchors"):
    about = {"settings": {}, "versions": {}, "seconds": 1.0, "peak_rss_mb": 1.0, "checks": {}}
    with staging(path) as out:
        (out / "spec.json").write_text(json.dumps(spec))
        (out / "anchors.npy").write_bytes(anchors)
        (out / "frozen.pb").write_bytes(weights)
        names = ["frozen.pb", "anchors.npy", "spec.json"]
        write_record(path, "export", staged=out, inputs={"checkpoint": "1"}, outputs=names, **about)


ALL = ("spec.json", "anchors.npy", "frozen.pb", "heads.onnx", "detector.onnx")


def refusal(work):
    with pytest.raises(InputError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_stages_wrote_is_handed_out_with_the_bytes_that_were_compared(tmp_path):
    folder = model_folder(tmp_path / "m")
    assert sealed(folder, *ALL) == {name: (folder / name).read_bytes() for name in ALL}
    assert check_seal(folder, *ALL) == {name: sha256(folder / name) for name in ALL}


@pytest.mark.parametrize(
    "name, stage", zip(ALL, ("export", "export", "export", "convert", "fuse"), strict=True)
)
def test_one_bit_of_any_file_is_named_with_both_hashes_and_the_cure(tmp_path, name, stage):
    folder = model_folder(tmp_path / "m")
    right = sha256(folder / name)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    for check in (sealed, check_seal):
        message = refusal(lambda check=check: check(folder, name))
        assert message.startswith(
            f"{folder / name}: damaged or changed: its SHA-256 is {sha256(folder / name)[:12]}"
        )
        assert right[:12] in message and message.endswith(f"run `odtrt {stage}` again")


def test_a_damaged_spec_is_found_whatever_is_asked_for(tmp_path):
    folder = model_folder(tmp_path / "m")
    (folder / "spec.json").write_text(json.dumps({**SPEC, "name": "b"}))
    assert "spec.json: damaged or changed" in refusal(lambda: sealed(folder, "heads.onnx"))


def test_a_file_that_no_record_names_is_refused_until_somebody_vouches_for_it(tmp_path):
    folder = model_folder(tmp_path / "m")
    (folder / "log.jsonl").unlink()
    assert "not sealed, log.jsonl" in refusal(lambda: sealed(folder, "heads.onnx"))
    seal(folder)
    assert sealed(folder, *ALL)
    (folder / "heads.onnx").write_bytes(b"retrained")
    assert "seal the folder" in refusal(lambda: sealed(folder, "heads.onnx"))
    seal(folder)
    assert sealed(folder, "heads.onnx") == {"heads.onnx": b"retrained"}


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, {}),
        ({"weights": b"trained on"}, {"heads.onnx": "frozen.pb", "detector.onnx": None}),
        ({"anchors": b"others"}, {"detector.onnx": "anchors.npy"}),
        ({"spec": {**SPEC, "labels": [], "name": "b"}}, {}),
        ({"spec": {**SPEC, "nms": {"iou_threshold": 0.6}}}, {"detector.onnx": "spec.json"}),
        (
            {"spec": {**SPEC, "input": {"height": 8}}},
            {"heads.onnx": "spec.json", "detector.onnx": "spec.json"},
        ),
    ],
)
def test_another_export_makes_stale_what_it_changed_and_nothing_else(tmp_path, changes, stale):
    folder = model_folder(tmp_path / "m")
    export(folder, **changes)
    for name in ("heads.onnx", "detector.onnx"):
        if stale.get(name) is None:
            continue
        message = refusal(lambda name=name: sealed(folder, name))
        assert f"{name}: made from another {stale[name]} " in message and "; run `odtrt " in message
    for name in {"heads.onnx", "detector.onnx"} - set(stale):
        assert sealed(folder, name)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "too large"])
@pytest.mark.parametrize("name", ["spec.json", "log.jsonl"])
def test_what_is_no_file_of_ours_is_refused_at_once(tmp_path, kind, name):
    folder = model_folder(tmp_path / "m")
    (folder / name).unlink()
    if kind == "a pipe":
        os.mkfifo(folder / name)
    elif kind == "a folder":
        (folder / name).mkdir()
    else:
        with (folder / name).open("wb") as file:
            file.truncate(1 << 33)
    assert name in refusal(lambda: sealed(folder, "heads.onnx"))


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.pop("outputs"),
        lambda one: one.update(outputs=["heads.onnx"]),
        lambda one: one.update(outputs={"../../x": "0" * 64}),
        lambda one: one.update(outputs={"/etc/shadow": "0" * 64}),
        lambda one: one.update(outputs={"x": "no hash"}),
        lambda one: one.update(inputs={"x": 3}),
        lambda one: one.update(stage=None),
        lambda one: one.update(seconds="long"),
        lambda one: one.update(seconds=10**400),
        lambda one: one.update(seconds=float("nan")),
        lambda one: one.update(peak_rss_mb=True),
        lambda one: one.update(checks={"x": "\ud800"}),
        lambda one: one.update(checks=[]),
        lambda one: one.update(seconds=one["seconds"] + 1),
    ],
)
def test_a_record_of_another_form_or_an_altered_one_is_named_by_its_line(tmp_path, change):
    folder = model_folder(tmp_path / "m")
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines()
    one = json.loads(lines[1])
    change(one)
    path.write_text("\n".join([lines[0], json.dumps(one), lines[2]]) + "\n")
    message = refusal(lambda: read_log(folder))
    assert f"{path}: line 2 is damaged" in message and "run the stages" in message
    path.write_text("[" * 100_000 + "\n")
    assert "line 1 is damaged" in refusal(lambda: read_log(folder))


def test_records_of_odtrt_0_1_have_no_checksum(tmp_path):
    folder = model_folder(tmp_path / "m")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for one in records:
        del one["check"]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    assert read_log(folder) == records and sealed(folder, *ALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("whole") / "m")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_bit_of_any_file_leads_to_an_error_or_to_the_same_bytes(whole, data):
    expected = sealed(whole, *ALL)
    path = whole / data.draw(st.sampled_from((*ALL, "log.jsonl")))
    intact = path.read_bytes()
    content = bytearray(intact)
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    try:
        with contextlib.suppress(OdtrtError):
            assert sealed(whole, *ALL) == expected
    finally:
        path.write_bytes(intact)


def test_a_hash_is_remembered_only_for_a_file_that_has_settled(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert folders.known_sha256(path) == sha256(path)
    path.write_bytes(b"two")  # maybe within the same tick of the clock
    assert folders.known_sha256(path) == sha256(path)
    later = folders.time.time_ns() + folders._SETTLED_NS
    monkeypatch.setattr(folders.time, "time_ns", lambda: later)
    first = folders.known_sha256(path)
    monkeypatch.setattr(folders, "sha256", lambda _: pytest.fail("read again"))
    assert folders.known_sha256(path) == first


# ---- One step -------------------------------------------------------------------------------------------


def upgrade(folder, kill_before):
    """A process that exports again, killed before its n-th rename. Whether it came to its end."""
    process = os.fork()
    if process == 0:
        status, real, count = 3, folders.os.replace, [0]

        def replace(source, target):
            count[0] += 1
            if count[0] == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        try:
            folders.os.replace = replace
            export(folder, weights=b"new", anchors=b"new", spec={**SPEC, "name": "new"})
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def test_a_kill_before_any_rename_leaves_the_old_generation_or_the_new_one(tmp_path):
    folder, found = tmp_path / "m", []
    for number in range(1, 8):
        shutil.rmtree(folder, ignore_errors=True)
        model_folder(folder)
        is_done = upgrade(folder, number)
        files = sealed(folder, "spec.json", "anchors.npy", "frozen.pb")
        assert not any(path.name.startswith(".commit-") for path in folder.iterdir())
        found.append({b"new" in content for content in files.values()})
        assert len(read_log(folder)) == 3 + found[-1].issuperset({True})
        if is_done:
            break
    assert all(len(one) == 1 for one in found), "a mixed generation"
    assert found[0] == {False} and found[1:] == [{True}] * (len(found) - 1) and len(found) > 4


def test_a_reader_that_may_not_write_says_that_a_change_was_interrupted(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "m")
    assert not upgrade(folder, 3)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", refuse)
        assert "cannot be completed (Permission denied)" in refusal(lambda: sealed(folder, "spec.json"))
    assert b"new" in sealed(folder, "spec.json")["spec.json"]


def test_a_record_written_while_a_change_waits_for_its_end_is_kept(tmp_path):
    """The change of a bundle was decided, then its process died; meanwhile another wrote into model/."""
    root, staged = tmp_path / "bundle", tmp_path / "staged"
    model = root / "model"
    root.mkdir()
    model_folder(model)
    staged.joinpath("model").mkdir(parents=True)
    (staged / "manifest.json").write_text("new")
    (staged / "model" / "spec.json").write_text("new")
    changed = {**read_log(model)[0], "stage": "unpack"}
    folders.append_record(model, changed, staged / "model")
    staged.rename(root / ".commit-0")
    record(model, outputs=[])
    with folders.undisturbed(root):
        stages = [one["stage"] for one in read_log(model)]
    assert stages == ["export", "convert", "fuse", "convert", "unpack"]
    assert (model / "spec.json").read_text() == (root / "manifest.json").read_text() == "new"
    assert sorted(path.name for path in root.iterdir()) == ["manifest.json", "model"]


@pytest.mark.parametrize("obstacle", ["a folder", "a file", "a link"])
def test_what_is_in_the_way_is_found_before_anything_changes(tmp_path, obstacle):
    folder = model_folder(tmp_path / "m")
    outside = tmp_path / "outside"
    outside.mkdir()
    if obstacle == "a folder":
        (folder / "zzz").mkdir()
    elif obstacle == "a file":
        (folder / "int8").write_text("mine")
    else:
        (folder / "int8").symlink_to(outside)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def change():
        with staging(folder) as out:
            (out / "anchors.npy").write_text("new")
            (out / "int8").mkdir()
            (out / ("zzz" if obstacle == "a folder" else "int8/table")).write_text("new")

    assert "nothing was changed: move it away" in refusal(change)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert list(outside.iterdir()) == []


def test_temporary_files_cannot_be_guessed_and_are_created_exclusively(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    target = tmp_path / "log"
    (tmp_path / f".log.{os.getpid()}.tmp").symlink_to(victim)
    names = set()
    for _ in range(2):
        with atomic_write(target) as temporary:
            names.add(temporary.name)
            temporary.write_text("new")
    assert len(names) == 2 and victim.read_text() == "mine" and target.read_text() == "new"


def test_two_containers_whose_processes_have_the_same_number_do_not_collide(tmp_path, monkeypatch):
    """Neither sees the other's process; what the other holds is left alone all the same."""
    monkeypatch.setattr(folders.os, "getpid", lambda: 1)
    monkeypatch.setattr(folders, "_is_alive", lambda _: False)
    with atomic_write(tmp_path / "log") as mine:
        mine.write_text("mine")
        with atomic_write(tmp_path / "log") as other:
            other.write_text("other")
        assert mine.exists() and (tmp_path / "log").read_text() == "other"
    assert (tmp_path / "log").read_text() == "mine"
    with staging(tmp_path) as mine:
        (mine / "a").write_text("1")
        with staging(tmp_path) as other:
            (other / "b").write_text("2")
        assert (mine / "a").exists()
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()
