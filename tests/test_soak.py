"""A soak with a clock that is ours: faults and their ledger, the watchdog, checkpoints, verdicts, the report.

Two tests run a real worker process; none waits for a time to pass.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import soak_defects
from PIL import Image

from odtrt_lib.app import cli
from odtrt_lib.detector import Detections
from odtrt_lib.errors import CudaError, InputError
from odtrt_lib.latency import belt, sensors, soak, verdict, worker
from odtrt_lib.latency.belt import KINDS, Camera, Clock, Faults, parse_faults
from odtrt_lib.latency.board import STAGES, Board, accounted
from odtrt_lib.latency.slopes import GROWING, STEADY, UNDECIDED
from odtrt_lib.latency.soak_report import write_soak
from odtrt_lib.latency.watchdog import Limits, Process, Watchdog
from odtrt_lib.sources import Source

GREY = np.full((48, 64, 3), 128, np.uint8)
FOUND = Detections(np.float32([[1, 2, 30, 40]]), np.float32([0.5]), np.array([1]), ("nut",))
SECOND = 10**9


class Time:
    """A clock that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.clock = Clock(lambda: self.at, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.at += seconds


class Fixed:
    """A detector whose answers take some seconds of a clock."""

    def __init__(self, time: Time | None = None, seconds: float = 0.02) -> None:
        self.time, self.seconds, self.found = time, seconds, FOUND

    def detect(self, image: np.ndarray) -> Detections:
        assert image.dtype == np.uint8 and image.ndim == 3
        if self.time is not None:
            self.time.sleep(self.seconds)
        return self.found

    def close(self) -> None:
        pass


def grey_belt(clock: Clock) -> Source:
    return belt.belt([GREY], clock)


@pytest.fixture
def board(tmp_path) -> Board:
    return Board(tmp_path / "board")


class TestBelt:
    def test_it_shows_its_pictures_in_turn_at_its_rate(self):
        now = Time()
        pictures = [np.full((4, 6, 3), number, np.uint8) for number in range(3)]
        source = belt.belt(pictures, now.clock, fps=10)
        begun = now.at
        assert [int(source.read()[0, 0, 0]) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
        assert now.at - begun == pytest.approx(0.6)
        assert source.is_live

    def test_a_late_reader_finds_no_queue(self):
        now = Time()
        source = belt.belt([GREY], now.clock, fps=10)
        source.read()
        now.sleep(5)
        begun = now.at
        source.read()
        source.read()
        assert now.at - begun == pytest.approx(0.1)

    def test_pictures_of_other_sizes_get_the_first_ones(self):
        source = belt.belt([GREY, GREY[:40], np.full((60, 80, 3), 128, np.uint8)], Time().clock)
        frames = [source.read() for _ in range(3)]
        assert {frame.shape for frame in frames} == {GREY.shape}
        assert (frames[1][:40] == 128).all() and (frames[1][40:] == 0).all()

    def test_a_folder_is_a_belt(self, tmp_path):
        Image.fromarray(GREY).save(tmp_path / "a.png")
        assert (belt.source_of(str(tmp_path))(Time().clock).read() == GREY).all()

    def test_a_file_is_none(self, tmp_path):
        Image.fromarray(GREY).save(tmp_path / "a.png")
        with pytest.raises(InputError, match="a file; expected a folder of pictures, a camera"):
            belt.source_of(str(tmp_path / "a.png"))


class TestFaults:
    def test_the_same_seed_gives_the_same_faults_as_often_as_it_says(self):
        faults = parse_faults("drop=10,late=40,seed=3")
        kinds = collections.Counter(map(faults.of, range(3000)))
        assert faults == Faults({"drop": 10, "late": 40}, 3)
        again, other = ([Faults(faults.one_in, seed).of(i) for i in range(300)] for seed in (3, 4))
        assert again == list(map(faults.of, range(300))) != other
        assert kinds["drop"] == pytest.approx(300, abs=50)
        assert kinds["late"] == pytest.approx(75, abs=30)

    @pytest.mark.parametrize(
        "text",
        ["", "drop", "drop=0", "drop=-1", "drop=5,drop=6", "rain=5", "standard,drop=5", "drop=1", "seed=x"],
    )
    def test_a_wrong_schedule(self, text):
        with pytest.raises(InputError, match="--faults"):
            parse_faults(text)

    def test_the_standard_has_them_all(self):
        assert set(parse_faults("standard,seed=7").one_in) == set(KINDS)

    def camera(self, fault: str, now: Time) -> Camera:
        """The third frame of this camera has the fault."""
        faults = dataclasses.make_dataclass("Third", [("seed", int, 0)])()
        faults.of = lambda number: fault if number == 2 else None
        camera = Camera(lambda: grey_belt(now.clock), now.clock, faults)
        camera.open()
        return camera

    @pytest.mark.parametrize("fault", KINDS)
    def test_each_kind(self, fault):
        now = Time()
        camera = self.camera(fault, now)
        before = [camera.read() for _ in range(2)]
        assert [frame.number for frame in before] == [0, 1]
        begun = now.at
        if fault == "disconnect":
            with pytest.raises(InputError, match="unplugged"):
                camera.read()
            with pytest.raises(InputError, match="unplugged"):
                camera.open()
            now.sleep(belt.UNPLUGGED_SECONDS)
            camera.open()
        frame = camera.read()
        assert frame.number == (3 if fault in ("drop", "disconnect") else 2)
        assert belt.is_picture(frame.image) == (fault != "corrupt")
        assert (now.at - frame.captured > worker.LATE_AFTER_SECONDS) == (fault == "late")
        assert (frame.captured - begun > 2.5) == (fault == "stall")
        assert (frame.image.shape == (24, 32, 3)) == (fault == "resize")
        assert camera.ledger == {kind: int(kind == fault) for kind in KINDS}
        assert camera.read().number == frame.number + 1

    def test_both_ways_of_corruption_occur(self):
        now = Time()
        camera = Camera(lambda: grey_belt(now.clock), now.clock, parse_faults("corrupt=2"))
        camera.open()
        images = [camera.read().image for _ in range(40)]
        assert {(one.dtype.name, one.ndim) for one in images} == {("uint8", 3), ("float32", 3), ("uint8", 1)}


class TestBoard:
    def test_another_process_sees_the_newest_counts(self, board, tmp_path):
        board.change({"grabbed": 2}, stage=1)
        other = Board(tmp_path / "board")
        board.change({"grabbed": 3})
        assert (other.counts["grabbed"], other.counts["stage"]) == (5, 1)

    def test_a_writer_that_is_killed_in_the_middle_leaves_the_state_before(self, board, tmp_path):
        board.change({"grabbed": 1, "in_slot": 1})
        before = board.counts
        board._copies[(int(board._words[0]) + 1) % 2, :4] = 77  # half of the next change, without its number
        assert board.counts == before
        after = Board(tmp_path / "board")
        after.change({"in_slot": -1, "in_detector": 1})
        assert board.counts == {**before, "in_slot": 0, "in_detector": 1}

    def test_times_are_shared(self, board, tmp_path):
        board.adding("service")(1000.0)
        Board(tmp_path / "board").adding("service")(3000.0)
        board.change({}, max_service_ns=3 * 10**6)
        assert board.histogram("service").count == 2
        assert board.histogram("service").percentile(50) == pytest.approx(1000, rel=2e-3)


class TestIntake:
    def test_every_frame_has_one_fate_whatever_happens(self, board, tmp_path):
        """Against what the schedule says, computed anew."""
        now, told = Time(), []
        faults = parse_faults("drop=9,late=11,corrupt=13,resize=15,disconnect=40,stall=50,seed=2")
        camera = Camera(lambda: grey_belt(now.clock), now.clock, faults)
        intake = worker.Intake(camera, board, now.clock, lambda *message: told.append(message))
        job = worker.Job(Fixed, grey_belt, tmp_path / "canary.npy")
        service = worker.Service(Fixed(now), job, board, now.clock, lambda *message: None)
        chance = np.random.default_rng(0)
        while camera.next_number < 600:
            intake.step()
            if chance.random() < 0.6 and board.counts["in_slot"]:
                frame = intake.take(0)
                assert accounted(board.counts) == board.counts["grabbed"]
                service.process(frame)
            counts = board.counts
            assert counts["grabbed"] == accounted(counts)
        kinds = collections.Counter(map(faults.of, range(camera.next_number)))
        assert {kind: counts[f"injected_{kind}"] for kind in KINDS} == {kind: kinds[kind] for kind in KINDS}
        assert counts["grabbed"] == camera.next_number - kinds["drop"] - kinds["disconnect"]
        assert counts["missing"] == kinds["drop"] + kinds["disconnect"]
        assert (counts["corrupt"], counts["resized"]) == (kinds["corrupt"], kinds["resize"])
        assert (counts["losses"], counts["late"], counts["gaps"]) == (
            kinds["disconnect"],
            kinds["late"],
            kinds["stall"],
        )
        assert all(right for *_, right in verdict.observed(counts))
        assert min(kinds[kind] for kind in KINDS) > 3 and counts["dropped"] > 50
        assert [kind for kind, _ in told].count("lost") == kinds["disconnect"]
        assert board.histogram("service").count == counts["processed"]

    def test_a_camera_that_was_never_there_is_an_error(self, board):
        def nothing() -> Source:
            raise InputError("no /dev/video7 here")

        intake = worker.Intake(Camera(nothing, Time().clock), board, Time().clock, print)
        with pytest.raises(InputError, match="video7"):
            intake.step()

    def test_a_lost_camera_is_opened_again_with_longer_and_longer_waits(self, board):
        now = Time()
        opened_at = []

        def opening() -> Source:
            opened_at.append(now.at)
            if 1 < len(opened_at) < 8:
                raise InputError("off")
            frames = iter([GREY, GREY])
            return Source("camera", lambda: next(frames, None), True)

        intake = worker.Intake(Camera(opening, now.clock), board, now.clock, lambda *message: None)
        while board.counts["grabbed"] < 4:
            intake.step()
        waits = np.diff(opened_at)
        assert waits.tolist() == pytest.approx([0.5, 0.5, 1, 2, 4, 8, 10])
        assert (board.counts["losses"], board.counts["reopened"]) == (1, 1)

    def test_a_camera_that_is_silent_without_an_error_ends_the_worker(self, board):
        now = Time()
        intake = worker.Intake(Camera(lambda: grey_belt(now.clock), now.clock), board, now.clock, print)
        assert intake.take(0) is None
        now.sleep(worker.SILENT_SECONDS + 1)
        with pytest.raises(InputError, match="neither a picture nor an error"):
            intake.take(0)


class TestService:
    def run(self, board, tmp_path, seconds, frames=200, change=None):
        """Processes frames; returns what was told."""
        now, told = Time(), []
        detector = Fixed(now)
        job = worker.Job(Fixed, grey_belt, tmp_path / "canary.npy", canary_every=50)
        service = worker.Service(detector, job, board, now.clock, lambda *message: told.append(message))
        board.change({"in_detector": frames})
        for number in range(frames):
            detector.seconds = seconds(number)
            if change is not None and number == change:
                detector.found = dataclasses.replace(FOUND, scores=np.nextafter(FOUND.scores, np.float32(0)))
            service.process(belt.Frame(number, now.at - 0.01, GREY))
        return told

    def test_service_and_response_times_are_the_clocks(self, board, tmp_path):
        self.run(board, tmp_path, lambda number: 0.02)
        assert board.histogram("service").percentile(99) == pytest.approx(20_000, rel=2e-3)
        assert board.histogram("response").percentile(50) == pytest.approx(30_000, rel=2e-3)

    def test_a_stall_is_seen_and_a_slow_frame_is_none(self, board, tmp_path):
        told = self.run(board, tmp_path, lambda number: {100: 0.2, 150: 3.0}.get(number, 0.02))
        assert (board.counts["slow"], board.counts["stalls"]) == (2, 1)
        assert [kind for kind, _ in told if kind != "canary"] == ["slow", "stall"]
        assert board.counts["max_service_ns"] == pytest.approx(3 * SECOND)

    def test_what_is_usual_for_a_slow_detector_is_no_stall(self, board, tmp_path):
        self.run(board, tmp_path, lambda number: {100: 3.0, 150: 1.5}.get(number, 0.4))
        assert (board.counts["slow"], board.counts["stalls"]) == (1, 1)

    def test_the_canary_is_the_first_frame_and_comes_every_n_frames(self, board, tmp_path):
        told = self.run(board, tmp_path, lambda number: 0.02)
        assert (np.load(tmp_path / "canary.npy") == GREY).all()
        hashes = [content for kind, content in told if kind == "canary"]
        assert hashes == [(worker.result_hash(FOUND), 1)] * 5  # before the first, and after each 50

    def test_one_bit_of_a_score_changes_the_hash(self, board, tmp_path):
        told = self.run(board, tmp_path, lambda number: 0.02, change=120)
        hashes = [content[0] for kind, content in told if kind == "canary"]
        assert len(set(hashes[:3])) == 1 and len(set(hashes[3:])) == 1 and hashes[0] != hashes[4]

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (MemoryError(), "memory"),
            (CudaError("cudaMalloc", 2, "out of memory"), "memory"),
            (RuntimeError("std::bad_alloc"), "memory"),
            (CudaError("cudaLaunchKernel", 700, "an illegal memory access"), "detector"),
            (InputError("no such file"), "input"),
            (ValueError("x"), "detector"),
        ],
    )
    def test_the_kind_of_an_error(self, error, kind):
        assert worker._kind_of(error) == kind


class Puppet:
    """A worker whose life the test decides."""

    def __init__(self) -> None:
        self.pid, self.exit_code, self.told, self.can_be_killed = 1, None, [], True

    def messages(self) -> list:
        told, self.told = self.told, []
        return told

    def kill(self, seconds: float) -> bool:
        if self.can_be_killed:
            self.exit_code = -9
        return self.can_be_killed


class TestWatchdog:
    @pytest.fixture
    def dog(self, board):
        self.now, self.board, self.workers, self.noted = Time(), board, [], []

        def start() -> Puppet:
            self.workers.append(Puppet())
            return self.workers[-1]

        return Watchdog(start, board, self.now.clock, Limits(), lambda *event: self.noted.append(event))

    def beat(self, stage: str = "detecting", **counts: int) -> None:
        self.board.reload()
        self.board.change(counts, stage=STAGES.index(stage), beat_ns=int(self.now.at * SECOND))

    def later(self, dog: Watchdog, seconds: float) -> None:
        """Polls as often as a soak does, until so many seconds have passed."""
        until = self.now.at + seconds
        while self.now.at < until - 1e-9 and dog.end is None:
            self.now.sleep(min(0.1, until - self.now.at))
            dog.poll()

    def test_a_worker_that_beats_lives(self, dog):
        dog.poll()
        for _ in range(10):
            self.beat()
            self.later(dog, 4.9)
        assert (len(self.workers), dog.restarts, dog.end) == (1, 0, None)

    def test_a_hung_call_is_killed_and_its_frame_is_lost(self, dog):
        dog.poll()
        self.beat(grabbed=7, processed=5, in_slot=1, in_detector=1)
        self.later(dog, 5.1)
        assert self.workers[0].exit_code == -9
        counts = self.board.counts
        assert (counts["lost"], counts["in_slot"], counts["in_detector"]) == (2, 0, 0)
        assert accounted(counts) == counts["grabbed"] == 7
        assert dog.restarts == 1 and "hung: silent for 5.0 s while detecting" in str(self.noted)
        self.later(dog, 0.5)
        assert len(self.workers) == 2

    def test_a_watchdog_that_was_stopped_itself_waits_before_it_judges(self, dog):
        dog.poll()
        self.beat()
        self.now.sleep(100)
        self.later(dog, 4.9)
        assert dog.restarts == 0
        self.later(dog, 0.5)
        assert dog.restarts == 1

    def test_opening_may_take_longer_and_slow_detectors_too(self, dog):
        dog.poll()
        self.later(dog, 299)
        dog.p99_seconds = 2.0
        self.beat()
        self.later(dog, 39)
        assert dog.restarts == 0
        self.later(dog, 2)
        assert dog.restarts == 1

    def test_dead_workers_are_started_again_with_longer_waits_and_then_given_up(self, dog):
        died = []
        while dog.end is None:
            dog.poll()
            if dog.worker is not None:
                self.beat(processed=1)
                dog.worker.exit_code = -11
                dog.poll()
                died.append(self.now.at)
            self.now.sleep(0.25)
        assert np.diff(died).tolist() == pytest.approx([0.5, 1, 2, 4])
        assert dog.end == "the detector ended 5 times in 10 minutes; the last time: ended by signal 11"

    def test_rare_deaths_never_end_it(self, dog):
        for _ in range(12):
            self.later(dog, 160)
            self.beat(processed=1)
            dog.worker.exit_code = 1
            dog.poll()
        assert (dog.restarts, dog.end) == (12, None)

    def test_out_of_memory_ends_it_with_the_reason(self, dog):
        dog.poll()
        self.beat(processed=1)
        self.workers[0].told = [("failed", ("memory", "CudaError: cudaMalloc: out of memory"))]
        self.workers[0].exit_code = 1
        dog.poll()
        assert dog.end == "out of memory: CudaError: cudaMalloc: out of memory"

    def test_the_kernels_oom_killer_is_known(self, dog, monkeypatch):
        dog.poll()
        self.beat(processed=1)
        self.workers[0].exit_code = -9
        monkeypatch.setattr("odtrt_lib.latency.watchdog.oom_kills", lambda: 10**9)
        dog.poll()
        assert dog.end == "out of memory: ended by signal 9"

    def test_a_process_that_cannot_be_killed_ends_it(self, dog):
        dog.poll()
        self.workers[0].can_be_killed = False
        self.beat()
        self.later(dog, 6)
        assert "the driver hangs" in dog.end

    def test_a_camera_that_stays_away_ends_it(self, dog):
        dog.poll()
        self.workers[0].told = [("lost", "unplugged"), ("waits", "off")]
        for _ in range(605):
            self.beat("waiting")
            self.later(dog, 1)
        assert dog.end == "the camera was lost and did not come back in 600 s"

    def test_a_camera_that_comes_back_does_not(self, dog):
        dog.poll()
        for _ in range(3):
            self.workers[0].told = [("lost", "unplugged"), ("waits", "off"), ("back", "")]
            for _ in range(400):
                self.beat("waiting")
                self.later(dog, 1)
        assert dog.end is None

    def test_a_model_that_cannot_be_opened_is_an_error(self, dog):
        dog.poll()
        self.workers[0].told = [("failed", ("input", "InputError: out/x: not found"))]
        self.workers[0].exit_code = 1
        with pytest.raises(InputError, match=r"^out/x: not found$"):
            dog.poll()


class Simulation:
    """A worker, a machine and their time. Each time that the soak waits, 0.5 s, a frame is processed."""

    def __init__(self, memory=lambda seconds: 100.0) -> None:
        self.now, self.wall, self.memory = Time(), 1.7e9, memory
        self.told, self.board, self.service_us = [], None, lambda seconds: 20_000.0
        self.hang_at: float = np.inf
        self.stop_at: float = np.inf
        self.chance = np.random.default_rng(0)
        clock = Clock(lambda: self.now.at, self.sleep)
        self.tools = soak.Tools(
            clock,
            lambda: self.wall + self.now.at,
            self.start,
            lambda pid: self.sample(),
            say=lambda line: None,
        )
        self.begun = self.now.at

    @property
    def seconds(self) -> float:
        return self.now.at - self.begun

    def start(self, job: worker.Job, path: Path) -> Puppet:
        self.board, self.puppet = Board(path), Puppet()
        self.add = {name: self.board.adding(name) for name in ("service", "response")}
        self.tell("opened", "a simulation")
        self.try_canary()
        return self.puppet

    def tell(self, kind: str, content: object) -> None:
        self.puppet.told.append((kind, content))

    def try_canary(self) -> None:
        self.board.change({"canaries": 1})
        self.tell("canary", ("good", 3))

    def sample(self) -> dict[str, float]:
        noise = self.chance.normal(0, 0.25)
        return {"own_mb": self.memory(self.seconds) + noise, "open_files": 9.0, "threads": 4.0}

    def sleep(self, seconds: float) -> None:
        self.now.sleep(seconds)
        if self.seconds >= self.stop_at:
            raise KeyboardInterrupt
        if self.board is None or self.puppet.exit_code is not None or self.seconds >= self.hang_at:
            return
        service = self.service_us(self.seconds) * self.chance.normal(1, 0.01)
        self.add["service"](service)
        self.add["response"](service + 5000)
        self.board.change(
            {"grabbed": 1, "processed": 1},
            beat_ns=int(self.now.at * SECOND),
            stage=1,
            gc_objects=30_000,
            max_service_ns=int(1e3 * service),
            max_response_ns=int(1e3 * service) + 5 * 10**6,
        )
        if self.seconds % 10 == 0:
            self.try_canary()

    def run(self, folder: Path, minutes: float, resume: bool = False) -> soak.Record:
        job = worker.Job(Fixed, grey_belt, folder / soak.CANARY)
        settings = {"model": "parts", "source": "belt", "faults": ""}
        return soak.soak(job, folder, 60 * minutes, settings, resume=resume, tools=self.tools)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    monkeypatch.setattr(soak, "_POLL_SECONDS", 0.5)


def verdicts(record: soak.Record) -> dict[str, str]:
    return {check.name: check.verdict for check in verdict.checks_of(record)}


class TestVerdict:
    def test_a_sound_run_is_steady(self, tmp_path):
        record = Simulation().run(tmp_path, 20)
        assert set(verdicts(record).values()) == {STEADY}
        assert verdict.overall(verdict.checks_of(record)) == STEADY
        row = verdict.figures(record)
        assert row["host_memory_mb_per_hour_low"] <= 0 <= row["host_memory_mb_per_hour_high"]
        assert row["service_p50_us"] == pytest.approx(20_000, rel=0.01)
        assert row["response_p99_us"] == pytest.approx(25_000 + 2.3 * 200, rel=0.01)
        assert row["canaries"] == 1 + 120
        assert row["host_memory_mb_per_hour_tolerance"] == pytest.approx(10, rel=1e-3)
        assert len(record.rows) == pytest.approx(120, abs=2)

    def test_a_leak_of_a_megabyte_a_minute_is_found_in_twenty(self, tmp_path):
        record = Simulation(lambda seconds: 100 + seconds / 60).run(tmp_path, 20)
        assert verdicts(record)["host memory"] == GROWING
        assert verdict.overall(verdict.checks_of(record)) == verdict.UNSTEADY
        row = verdict.figures(record)
        assert row["host_memory_mb_per_hour_slope"] == pytest.approx(60, abs=3)

    def test_a_detector_that_gets_slower_is_found(self, tmp_path):
        simulation = Simulation()
        simulation.service_us = lambda seconds: 20_000.0 * (1 + 0.4 * seconds / 240)
        assert verdicts(simulation.run(tmp_path, 4))["service time, p50"] == GROWING

    @pytest.mark.parametrize(
        ("busy", "expected"), [(lambda at: at > 110, STEADY), (lambda at: at > 30, UNDECIDED)]
    )
    def test_other_programs_are_not_the_detectors_fault(self, tmp_path, busy, expected):
        simulation = Simulation()
        simulation.service_us = lambda seconds: 20_000.0 * (3 if busy(seconds) else 1)
        honest = simulation.sample
        simulation.sample = lambda: {**honest(), "cpu_elsewhere": 0.9 * busy(simulation.seconds)}
        checks = {check.name: check for check in verdict.checks_of(simulation.run(tmp_path, 4))}
        assert checks["service time, p50"].verdict == expected
        is_undecided = "other programs took a fifth of the CPU" in checks["service time, p50"].text
        assert is_undecided == (expected == UNDECIDED)

    def test_a_result_that_drifts_is_found(self, tmp_path):
        simulation = Simulation()
        honest = simulation.tell
        simulation.tell = lambda kind, content: honest(
            kind, ("other", 3) if kind == "canary" and simulation.seconds > 150 else content
        )
        record = simulation.run(tmp_path, 4)
        assert {name for name, one in verdicts(record).items() if one != STEADY} == {"results of the canary"}
        assert record.events[0]["kind"] == "drift" and record.drifted > 3

    def test_several_results_from_the_start_are_no_drift(self, tmp_path):
        """As of a plan whose kernels add in an order that chance decides."""
        simulation = Simulation()
        honest = simulation.tell
        simulation.tell = lambda kind, content: honest(
            kind, (f"good {int(simulation.seconds // 10) % 2}", 3) if kind == "canary" else content
        )
        record = simulation.run(tmp_path, 4)
        assert (len(record.hashes), record.drifted) == (2, 0)

    def test_a_hung_call_is_found_and_the_run_goes_on(self, tmp_path):
        simulation = Simulation()
        simulation.hang_at = 100
        start = simulation.start

        def again(job: worker.Job, path: Path) -> Puppet:
            simulation.hang_at = np.inf if simulation.board is not None else simulation.hang_at
            return start(job, path)

        simulation.tools = dataclasses.replace(simulation.tools, start=again)
        record = simulation.run(tmp_path, 4)
        assert record.restarts == 1 and record.end == ""
        assert verdicts(record)["restarts"] == verdict.UNSTEADY
        assert {row["segment"] for row in record.rows} == {1, 2}

    def test_a_short_run_is_undecided(self, tmp_path):
        record = Simulation().run(tmp_path, 0.05)
        assert verdict.overall(verdict.checks_of(record)) == UNDECIDED

    @pytest.mark.parametrize(
        ("name", "amount", "check"),
        [
            ("grabbed", 1, "frames"),
            ("stalls", 1, "stalls"),
            ("losses", 1, "lost cameras"),
            ("canaries", -(10**6), "results of the canary"),
        ],
    )
    def test_each_count_is_judged(self, tmp_path, name, amount, check):
        record = Simulation().run(tmp_path, 0.2)
        assert verdicts(record)[check] == STEADY
        record.counts[name] += amount
        assert verdicts(record)[check] == verdict.UNSTEADY

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_fault_that_nobody_saw_is_found(self, tmp_path, kind):
        record = Simulation().run(tmp_path, 0.1)
        record.settings["faults"] = "standard"
        assert verdicts(record)["injected faults"] == STEADY
        record.counts[f"injected_{kind}"] += 1
        assert verdicts(record)["injected faults"] == verdict.UNSTEADY

    @pytest.mark.parametrize(
        ("seconds", "allowed"), [(300, 40), (600, 20), (1200, 10), (3600, 5), (72 * 3600, 0.1), (10**6, 0.1)]
    )
    def test_the_tolerance_of_memory(self, seconds, allowed):
        assert verdict.memory_tolerance(seconds) == pytest.approx(allowed)


class TestCheckpoint:
    def test_an_interrupted_soak_goes_on_and_shows_the_gap(self, tmp_path):
        first = Simulation()
        first.stop_at = 90
        with pytest.raises(KeyboardInterrupt):
            first.run(tmp_path, 4)
        assert first.puppet.exit_code == -9
        before = soak.load_record(tmp_path)
        second = Simulation()
        second.wall += 600  # ten minutes later
        record = second.run(tmp_path, 4, resume=True)
        assert record.elapsed == pytest.approx(240, abs=1)
        assert soak.gaps(record) == [(pytest.approx(90, abs=1), pytest.approx(600))]
        assert record.counts["processed"] == before.counts["processed"] + second.seconds * 2
        assert record.histogram("service").count == record.counts["processed"]
        assert {row["segment"] for row in record.rows} == {1, 2}
        assert record.hashes == {"good": record.counts["canaries"]}
        page = write_soak(record, tmp_path).read_text()
        assert page.count('class="pause"') >= 4 and "paused for 8 min" in page

    def test_frames_in_hand_at_the_interruption_are_lost(self, tmp_path):
        record = Simulation().run(tmp_path, 0.1)
        record.counts.update(grabbed=record.counts["grabbed"] + 2, in_slot=1, in_detector=1)
        board = Board(tmp_path / "board")
        soak._restore(board, record)
        assert board.counts["lost"] == 2 and accounted(board.counts) == board.counts["grabbed"]

    def test_a_checkpoint_is_written_each_minute(self, tmp_path):
        simulation = Simulation()
        seen = []
        honest = simulation.sample

        def sample() -> dict[str, float]:
            with contextlib.suppress(InputError):
                seen.append(round(soak.load_record(tmp_path).elapsed))
            return honest()

        simulation.sample = sample
        simulation.run(tmp_path, 3.5)
        assert sorted(set(seen)) == [60, 120, 180]

    def test_an_unfinished_soak_is_not_thrown_away(self, tmp_path):
        first = Simulation()
        first.stop_at = 5
        with pytest.raises(KeyboardInterrupt):
            first.run(tmp_path, 1)
        with pytest.raises(InputError, match="go on with --resume, or remove this file"):
            Simulation().run(tmp_path, 1)

    def test_a_finished_one_is_replaced_and_not_continued(self, tmp_path):
        Simulation().run(tmp_path, 0.1)
        with pytest.raises(InputError, match="has run for 6 s already"):
            Simulation().run(tmp_path, 0.1, resume=True)
        assert len(Simulation().run(tmp_path, 0.2).parts) == 1
        assert len(Simulation().run(tmp_path, 0.3, resume=True).parts) == 2

    def test_other_settings_do_not_continue_it(self, tmp_path):
        Simulation().run(tmp_path, 0.1)
        job = worker.Job(Fixed, grey_belt, tmp_path / soak.CANARY)
        settings = {"model": "other", "source": "belt", "faults": ""}
        with pytest.raises(InputError, match="model was 'parts' and is now 'other'"):
            soak.soak(job, tmp_path, 60, settings, resume=True, tools=Simulation().tools)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 9}', '{"schema": 1}'])
    def test_a_damaged_checkpoint(self, tmp_path, content):
        (tmp_path / soak.CHECKPOINT).write_text(content)
        with pytest.raises(InputError, match=r"checkpoint\.json: (damaged|of another version)"):
            soak.load_record(tmp_path)

    def test_nothing_to_continue(self, tmp_path):
        with pytest.raises(InputError, match="there is no soak to continue"):
            Simulation().run(tmp_path, 1, resume=True)

    def test_the_record_does_not_grow_with_the_hours(self, tmp_path):
        record = soak.Record({}, 72 * 3600.0)
        assert 72 * 3600 / record.block_seconds == 120
        record.seconds = 60.0
        assert record.block_seconds == 2.5


class TestReport:
    @pytest.fixture(scope="class")
    def written(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("soak")
        simulation = Simulation(lambda seconds: 100 + seconds / 2)
        record = simulation.run(folder, 4)
        record.settings.update(model="<parts>", faults="drop=10")
        write_soak(record, folder)
        return folder

    def test_it_needs_no_other_file_and_is_well_formed(self, written):
        page = (written / "report.html").read_text()
        assert not re.search(r"https?://(?!www\.w3\.org)", page) and "default-src 'none'" in page
        drawings = re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL)
        assert len(drawings) >= 7
        for drawing in drawings:
            root = ElementTree.fromstring(drawing)
            numbers = re.findall(r"[-\d.]+", " ".join(one.get("points", "") for one in root.iter("polyline")))
            assert root.get("role") == "img" and root.get("aria-label")
            assert all(-1 <= float(number) <= 681 for number in numbers)
        assert "prefers-color-scheme:dark" in page and "#" not in "".join(drawings)
        assert "&lt;parts&gt;" in page and "<parts>" not in page

    def test_it_says_what_grew_and_what_is_not_available(self, written):
        text = re.sub("<[^>]*>", " ", (written / "report.html").read_text())
        assert re.search(r"host memory\s+growing\s+\+1,[78]\d\d MB an hour, 95 % interval", text)
        assert re.search("Not available here: .*GPU memory in use on the device; ", text)
        assert re.search("Not available here: .*GPU temperature; ", text)

    def test_the_figures_are_in_a_file(self, written):
        content = json.loads((written / "soak.json").read_text())
        assert content["figures"]["verdict"] == "not steady"
        assert content["figures"]["reasons"] == "host memory: growing"
        assert all(isinstance(value, (str, int, float, bool)) for value in content["figures"].values())
        assert content["environment"] == {"MALLOC_ARENA_MAX": "2"}


TAKES_64_MIB = """
import json, os
import numpy as np
from odtrt_lib.latency import sensors
sensors.process_figures(os.getpid())
before = sensors.process_figures(os.getpid())
kept = np.ones(64 << 20, np.uint8)
with open(os.devnull):
    after = sensors.process_figures(os.getpid())
print(json.dumps([before, after]))
"""


class TestSensors:
    def write(self, root: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = root / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def test_a_jetsons(self, tmp_path):
        power = "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
        self.write(
            tmp_path,
            {
                "devices/virtual/thermal/thermal_zone0/type": "cpu-thermal\n",
                "devices/virtual/thermal/thermal_zone0/temp": "51500\n",
                "devices/virtual/thermal/thermal_zone1/type": "PMIC-Die\n",
                "devices/virtual/thermal/thermal_zone1/temp": "100000\n",
                "devices/virtual/thermal/thermal_zone2/type": "cv0-thermal\n",
                "devices/virtual/thermal/thermal_zone2/temp": "-256000\n",
                "class/devfreq/17000000.gpu/device/of_node/name": "gpu\0",
                "class/devfreq/17000000.gpu/cur_freq": "918000000\n",
                "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1000000\n",
                "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2000000\n",
                f"{power}/in1_label": "VDD_IN\n",
                f"{power}/in1_input": "5000\n",
                f"{power}/curr1_input": "1500\n",
                f"{power}/in2_label": "VDD_CPU_GPU_CV\n",
                f"{power}/in2_input": "5000\n",
                f"{power}/curr2_input": "700\n",
                f"{power}/curr1_crit_alarm": "0\n",
            },
        )
        found = sensors.Sensors(tmp_path).read()
        expected = {"temperature_c": 51.5, "gpu_clock_mhz": 918, "cpu_clock_mhz": 1500, "power_w": 7.5}
        assert {name: found[name] for name in expected} == pytest.approx(expected)
        assert found["throttled"] == 0
        self.write(tmp_path, {f"{power}/curr1_crit_alarm": "1\n"})
        assert sensors.Sensors(tmp_path).read()["throttled"] == 1

    def test_what_a_machine_does_not_tell_is_absent(self, tmp_path):
        found = sensors.Sensors(tmp_path).read()
        assert set(found) <= {"device_memory_mb", "system_memory_mb"}

    def test_a_process(self):
        """One of its own: the threads of a test's process take and give back memory meanwhile."""
        done = subprocess.run(
            [sys.executable, "-c", TAKES_64_MIB], capture_output=True, text=True, check=True
        )
        before, after = json.loads(done.stdout)
        assert after["open_files"] == before["open_files"] + 1
        for name in ("rss_mb", "pss_mb", "own_mb"):
            assert after[name] - before[name] == pytest.approx(64, abs=8)

    @pytest.mark.parametrize(("reasons", "throttled"), [(0x1, 0.0), (0x20, 1.0), (0x1 | 0x8, 1.0)])
    def test_nvml(self, monkeypatch, reasons, throttled):
        """Idle (1) is no throttling; a thermal or a hardware slowdown is. What is not supported is absent."""

        def gives(value: int, status: int = 0):
            def function(*arguments: object) -> int:
                arguments[-1]._obj.value = value
                return status

            return function

        library = SimpleNamespace(
            nvmlInit_v2=lambda: 0,
            nvmlDeviceGetHandleByIndex_v2=gives(1),
            nvmlDeviceGetTemperature=gives(51),
            nvmlDeviceGetClockInfo=gives(1980, 3),  # NVML_ERROR_NOT_SUPPORTED
            nvmlDeviceGetPowerUsage=gives(75_500),
            nvmlDeviceGetCurrentClocksThrottleReasons=gives(reasons),
        )
        monkeypatch.setattr(sensors.ctypes, "CDLL", lambda name: library)
        found = {name: read() for name, read in sensors._nvml().items()}
        assert found == {"gpu_temperature_c": 51, "power_w": 75.5, "throttled": throttled}

    def test_the_share_of_other_programs(self):
        """200 ticks pass: 60 idle, 20 stolen, 50 the worker's, 10 this process's; so 80 are elsewhere."""
        lines = iter(
            ["cpu  0 0 0 0 0 0 0 0 0 0", "cpu  100 0 20 50 10 0 0 20 0 0", "cpu  0 0 0 0 0 0 0 0", "?"]
        )
        ticks = {7: iter([1000, 1050, 0]), os.getpid(): iter([500, 510, 520, 530]), 8: iter([0])}
        elsewhere = sensors.Elsewhere(lambda: next(lines), lambda process: next(ticks[process]))
        assert elsewhere.share(7) is None
        assert elsewhere.share(7) == pytest.approx(80 / 200)
        assert elsewhere.share(8) is None  # another worker
        assert elsewhere.share(7) is None  # no such file

    def test_a_process_that_is_gone(self):
        assert sensors.process_figures(2**22 + 1) == {}

    def test_each_figure_has_a_name(self):
        assert set(sensors.process_figures(os.getpid())) <= set(sensors.FIGURES)


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--hours", "1", "--minutes", "1"], "--hours and --minutes: expected one of the two"),
            (["--minutes", "0"], "0 minutes: expected more"),
            (
                ["--faults", "rain=5"],
                "--faults rain=5: 'rain=5' is none; expected `standard`, or some of drop=",
            ),
            (["--resume"], "there is no soak to continue"),
        ],
    )
    def test_a_wrong_one(self, capsys, tmp_path, arguments, said):
        Image.fromarray(GREY).save(tmp_path / "a.png")
        with pytest.raises(SystemExit) as ended:
            cli.main(["soak", str(tmp_path), str(tmp_path), *arguments])
        assert ended.value.code == 1
        assert said in " ".join(capsys.readouterr().err.split())


class TestProcess:
    """A real worker, on a belt without waits."""

    @pytest.fixture
    def dog(self, board, tmp_path):
        def dog_of(recipe, limits):
            job = worker.Job(
                recipe, fast_belt, tmp_path / "canary.npy", faults=parse_faults("drop=9,corrupt=9")
            )
            start = functools.partial(Process, job, tmp_path / "board")
            made.append(Watchdog(start, board, Clock(), limits, lambda *event: noted.append(event)))
            return made[0], noted

        made, noted = [], []
        yield dog_of
        made[0].stop()

    def until(self, dog: Watchdog, is_there) -> None:
        """Polls until something has happened, or for a minute."""
        give_up = time.monotonic() + 60
        while not is_there():
            dog.poll()
            assert dog.end is None and time.monotonic() < give_up
            time.sleep(0.01)

    def test_a_killed_worker_is_replaced_and_no_frame_is_forgotten(self, dog, board):
        dog, noted = dog(Fixed, Limits())
        self.until(dog, lambda: board.counts["processed"] > 50)
        os.kill(dog.worker.pid, signal.SIGKILL)
        self.until(dog, lambda: dog.restarts == 1)
        counts = board.counts
        assert counts["grabbed"] == accounted(counts) and counts["in_slot"] == counts["in_detector"] == 0
        self.until(dog, lambda: board.counts["processed"] > counts["processed"] + 50)
        dog.stop()
        counts = board.counts
        faults = parse_faults("drop=9,corrupt=9")
        kinds = collections.Counter(map(faults.of, range(counts["next_number"])))
        assert (counts["injected_drop"], counts["corrupt"]) == (kinds["drop"], kinds["corrupt"])
        assert counts["missing"] == kinds["drop"] and counts["grabbed"] == accounted(counts)
        assert ("restart", "ended by signal 9") in noted

    def test_a_call_that_hangs_is_ended(self, dog, board):
        recipe = soak_defects.hanging(Fixed, 30)
        dog, noted = dog(recipe, Limits(hang=0.5, canary=0.5))
        self.until(dog, lambda: dog.restarts == 1)
        assert "hung" in str(noted) and board.counts["processed"] > 20
        assert board.counts["lost"] in (1, 2)

    def test_the_seeded_defects(self):
        """They do what they say, so that a soak that misses them is to blame."""
        drifting = soak_defects.drifting(Fixed, 2)()
        hashes = [worker.result_hash(drifting.detect(GREY)) for _ in range(4)]
        assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
        leaking = soak_defects.leaking(Fixed, 6e3)()
        before = sensors.process_figures(os.getpid())["own_mb"]
        while sensors.process_figures(os.getpid())["own_mb"] < before + 32:
            leaking.detect(GREY)


def fast_belt(clock: Clock) -> Source:
    return belt.belt([GREY], clock, fps=1000)
