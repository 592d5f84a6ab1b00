"""The histogram against numpy's percentiles and HdrHistogram's; the timing loop by a clock that is ours."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest

from odtrt_lib.latency import timing
from odtrt_lib.latency.timing import RELATIVE_ERROR, Histogram, Sampling, sample, time_calls, wall_clock

PERCENTS = (0, 1, 25, 50, 75, 90, 95, 99, 99.9, 99.99, 100)
TIMES = {
    "one": np.array([1234.5]),
    "two": np.array([1.0, 1e6]),
    "all the same": np.full(1000, 349.1),
    "lognormal": np.random.default_rng(1).lognormal(6, 0.3, 20_000),
    "a long tail": 100 + np.random.default_rng(2).pareto(1.2, 20_000) * 50,
    "two humps": np.concatenate([np.random.default_rng(3).normal(m, m / 50, 5_000) for m in (80, 3_000)]),
    "nine decades": 10 ** np.random.default_rng(4).uniform(-2, 7, 20_000),
    "whole microseconds": np.random.default_rng(5).integers(1, 40, 10_000).astype(float),
}


def histogram_of(times: np.ndarray) -> Histogram:
    histogram = Histogram()
    for microseconds in times.tolist():
        histogram.add(microseconds)
    return histogram


@pytest.mark.parametrize("name", TIMES)
def test_percentiles_are_numpys_within_the_stated_error(name):
    histogram = histogram_of(TIMES[name])
    for percent in PERCENTS:
        # Without the rounding error of 99.9 / 100, which would be the next rank.
        exact = np.percentile(TIMES[name], max(0, percent - 1e-9), method="inverted_cdf")
        assert histogram.percentile(percent) == pytest.approx(exact, rel=RELATIVE_ERROR * 1.000001), percent
    timing = histogram.timing()
    assert (timing.min_us, timing.max_us, timing.runs) == (
        TIMES[name].min(),
        TIMES[name].max(),
        len(TIMES[name]),
    )


@pytest.mark.parametrize("name", TIMES)
def test_percentiles_are_hdrhistograms(name):
    """It counts whole numbers, here nanoseconds, with three digits."""
    hdrh = pytest.importorskip("hdrh.histogram")
    peer = hdrh.HdrHistogram(1, 3_600_000_000_000, 3)
    nanoseconds = np.maximum(1, np.round(TIMES[name] * 1000)).astype(np.int64)
    for value in nanoseconds.tolist():
        peer.record_value(value)
    own = histogram_of(nanoseconds / 1000)
    for percent in (50, 95, 99, 99.9, 100):
        theirs = peer.get_value_at_percentile(percent) / 1000
        assert own.percentile(percent) == pytest.approx(theirs, rel=2 * RELATIVE_ERROR), percent


def test_memory_is_bounded_and_times_beyond_the_range_are_counted():
    histogram = histogram_of(np.array([0.0, 1e-9, 5e9, 1e300]))
    assert histogram.count == 4 and histogram.counts.nbytes == 115_656
    assert (histogram.min_us, histogram.max_us) == (0.0, 1e300)
    assert histogram.percentile(50) <= timing.MIN_US
    assert histogram.percentile(75) == pytest.approx(timing.MAX_US, rel=3 * RELATIVE_ERROR)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_what_is_no_time_is_refused(wrong):
    with pytest.raises(ValueError, match="finite time"):
        Histogram().add(wrong)


def test_of_nothing_there_is_no_figure():
    with pytest.raises(ValueError, match="no call"):
        Histogram().timing()


def test_parts_from_other_processes_merge_to_the_whole():
    times = TIMES["a long tail"]
    whole = histogram_of(times)
    merged = Histogram()
    for part in np.array_split(times, 7):
        merged.merge(pickle.loads(pickle.dumps(histogram_of(part))))
    assert np.array_equal(merged.counts, whole.counts)
    assert merged.timing() == whole.timing()


class Clock:
    """Time passes only in :meth:`work`."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.calls = 0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.calls += 1
        self.now += seconds


@pytest.mark.parametrize(
    ("sampling", "calls", "runs"),
    [
        (Sampling(warmup=3, min_count=5, max_count=40), 43, 40),
        (Sampling(warmup=3, min_count=5, max_count=40, seconds=1e9), 43, 40),
        (Sampling(warmup=3, min_count=5, max_count=40, seconds=10), 3 + 11, 11),  # 10 s and the one under way
        (Sampling(warmup=3, min_count=15, max_count=40, seconds=10), 3 + 15, 15),
        (Sampling(warmup=30, min_count=5, max_count=40, seconds=10), 11 + 11, 11),
    ],
)
def test_so_many_calls_are_timed(monkeypatch, sampling, calls, runs):
    clock = Clock(monkeypatch)
    timing = time_calls(lambda: clock.work(1.0), sampling)
    assert (clock.calls, timing.runs) == (calls, runs)
    assert timing.p50_us == pytest.approx(1e6, rel=RELATIVE_ERROR)


def test_warming_up_does_not_count_and_waiting_does(monkeypatch):
    clock = Clock(monkeypatch)
    seconds = itertools.chain([5.0, 5.0], itertools.repeat(0.25))
    timing = time_calls(lambda: clock.work(next(seconds)), Sampling(2, 9, 9), lambda: clock.work(0.5))
    assert (timing.min_us, timing.max_us) == (0.75e6, 0.75e6)
    assert wall_clock(lambda: clock.work(0.125))() == 0.125e6


def test_any_clock_in_microseconds_is_taken():
    events = iter([9.0, 9.0, 1.0, 2.0, 3.0])
    assert sample(lambda: next(events), Sampling(2, 3, 3)).timing().max_us == 3


def test_a_row_says_its_unit_and_no_more_digits_than_it_knows():
    row = histogram_of(np.array([1234.567, 1.23456, 0.5])).timing().row("detect_")
    assert list(row) == [
        f"detect_{name}" for name in ("p50_us", "p95_us", "p99_us", "p999_us", "min_us", "max_us", "runs")
    ]
    assert (row["detect_max_us"], row["detect_min_us"], row["detect_runs"]) == (1235, 0.5, 3)
    assert row["detect_p50_us"] == pytest.approx(1.2346, rel=2 * RELATIVE_ERROR)
