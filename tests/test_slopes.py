"""Slopes against scipy's Theil-Sen and brute force; intervals and verdicts on simulated memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from odtrt_lib.latency import slopes
from odtrt_lib.latency.slopes import GROWING, STEADY, UNDECIDED, judge, theil_sen, trend

SERIES = 60
BLOCK = 10
TWENTY_MINUTES, TOLERANCE = 1200, 10.0  # seconds; MB an hour


def simulated(leak: float = 0.0, correlation_seconds: float = 60.0) -> np.ndarray:
    """MB of memory, a sample a second, SERIES runs of 20 minutes: [SERIES, 1200].

    White noise of 0.25 MB, and AR(1) of 1 MB. leak: MB an hour.
    """
    rng = np.random.default_rng(7)
    keep = math.exp(-1 / correlation_seconds)
    noise = rng.normal(0, math.sqrt(1 - keep * keep), (TWENTY_MINUTES, SERIES))
    slow = np.empty_like(noise)
    slow[0] = rng.normal(0, 1, SERIES)
    for second in range(1, TWENTY_MINUTES):
        slow[second] = keep * slow[second - 1] + noise[second]
    white = rng.normal(0, 0.25, noise.shape)
    return (100 + slow + white + leak / 3600 * np.arange(TWENTY_MINUTES)[:, None]).T


def medians(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hours and medians of blocks."""
    blocks = np.median(samples.reshape(-1, BLOCK), axis=1)
    return (np.arange(len(blocks)) + 0.5) * BLOCK / 3600, blocks


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("digits", [0, 9], ids=["with equal values", "without"])
def test_slope_and_interval_are_scipys(seed, digits):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 60))
    times = np.cumsum(rng.random(count))
    values = np.round(rng.normal(0, 2, count) + times * rng.normal(), digits)
    expected = stats.theilslopes(values, times, 0.95)
    found = theil_sen(times, values)
    assert found == pytest.approx(
        (expected.slope, expected.low_slope, expected.high_slope), rel=1e-12, abs=1e-12
    )


def test_only_pairs_of_one_process_count():
    times = np.arange(20.0)
    values = np.where(times < 10, times * 2, 1000 + times * 2)
    groups = [0] * 10 + [1] * 10
    pairs = [
        (values[j] - values[i]) / (times[j] - times[i])
        for i, j in itertools.combinations(range(20), 2)
        if groups[i] == groups[j]
    ]
    assert theil_sen(times, values, groups)[0] == pytest.approx(np.median(pairs)) == 2
    assert theil_sen(times, values)[0] > 10


def test_the_variances_of_processes_add_up():
    """Two copies of a series at different levels: the same median, and limits of twice the variance."""
    rng = np.random.default_rng(3)
    times, values = np.arange(12.0), rng.normal(0, 1, 12)
    both = theil_sen([*times, *(times + 50)], [*values, *(values + 9)], [0] * 12 + [1] * 12)
    pairs = sorted((values[j] - values[i]) / (j - i) for i, j in itertools.combinations(range(12), 2))
    doubled = sorted(pairs * 2)
    half = 1.959964 * math.sqrt(2 * 12 * 11 * 29 / 18)
    limits = doubled[round((132 - half) / 2) - 1], doubled[round((132 + half) / 2)]
    assert both == pytest.approx((np.median(pairs), *limits))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Nominal 95 %; that for independent values covers it far too rarely. The truth is 5 MB an hour."""
    found = [medians(samples) for samples in simulated(leak=5)]
    trends = [trend(*one) for one in found]
    plain = [theil_sen(*one) for one in found]
    assert np.mean([one.low <= 5 <= one.high for one in trends]) >= 0.9
    assert np.mean([one.wide_low <= 5 <= one.wide_high for one in trends]) >= 0.93
    assert np.mean([low <= 5 <= high for _, low, high in plain]) < 0.75


def test_a_megabyte_a_minute_is_found_in_twenty_minutes():
    assert [judge(trend(*medians(one)), TOLERANCE) for one in simulated(leak=60)] == [GROWING] * SERIES


def test_sound_memory_is_never_said_to_grow():
    verdicts = [judge(trend(*medians(one)), TOLERANCE) for one in simulated()]
    assert GROWING not in verdicts
    assert verdicts.count(STEADY) > SERIES / 2


def test_memory_with_white_noise_only_is_steady():
    rng = np.random.default_rng(1)
    found = trend(*medians(100 + rng.normal(0, 0.25, TWENTY_MINUTES)))
    assert judge(found, TOLERANCE) == STEADY
    assert found.correlation < 0.2


def test_the_correlation_is_the_series_own():
    """AR(1) with a known coefficient, long enough to know it within a few hundredths."""
    rng = np.random.default_rng(5)
    values = [0.0]
    for noise in rng.normal(0, 1, 700):
        values.append(0.6 * values[-1] + noise)
    assert trend(np.arange(701.0), values).correlation == pytest.approx(0.6, abs=0.06)


def test_what_never_changes_is_steady_and_what_always_grows_is_not():
    times = np.arange(20.0)
    assert judge(trend(times, [7.0] * 20), 0.1) == STEADY
    assert judge(trend(times, times), 0.1) == GROWING
    assert judge(trend(times, -times), 0.1) == STEADY


def test_too_few_blocks_decide_nothing():
    few = slopes.MIN_BLOCKS - 1
    assert trend(range(few), range(few)) is None
    assert judge(None, 1.0) == UNDECIDED
    holes = [1.0, math.nan] * few
    assert trend(range(len(holes)), holes) is None


def test_an_interval_across_the_tolerance_decides_nothing():
    found = trend(*medians(simulated(leak=10)[0]))
    assert found.low < 10 < found.high
    assert judge(found, 10.0) == UNDECIDED
