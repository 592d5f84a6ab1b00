"""Whether a figure grows over hours: a slope with its confidence interval, held against a tolerance.

Memory and times of a running program are correlated from one moment to the next, and steps and outliers are
normal. So the slope is Theil's and Sen's median of the slopes of all pairs (Theil 1950, "A rank-invariant
method of linear and polynomial regression analysis"; Sen 1968, doi:10.1080/01621459.1968.10480934). The
values are medians of blocks of samples, and their correlation is removed first (prewhitening: von Storch
1995, in "Analysis of Climate Variability", p. 11; in the form that keeps the slope: Wang and Swail 2001,
doi:10.1175/1520-0442(2001)014<2204:COEWHI>2.0.CO;2). Samples of several processes are groups: only pairs of
one group count, and the variances add up, as for the seasons of Hirsch, Slack and Smith 1982
(doi:10.1029/WR018i001p00107). Needs numpy only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import List, Optional, Sequence, Tuple

import numpy as np

GROWING, STEADY, UNDECIDED = "growing", "steady", "undecided"

MIN_BLOCKS = 8
"""With fewer block medians no slope is given."""

_Z = 1.959964  # two-sided 95 % of the normal distribution
_MAX_CORRELATION = 0.95

Interval = Tuple[float, float, float]
"""A slope, and the lower and the upper limit of its interval."""


@dataclasses.dataclass(frozen=True)
class Trend:
    """A slope per unit of time with two 95 % intervals.

    slope, low, high: of the prewhitened medians; :func:`judge` uses them. wide_low, wide_high: of the medians
    as they are, with an interval that is widened by their correlation; it is more careful in short runs.
    correlation: of two neighbouring medians. blocks: the number of medians.
    """

    slope: float
    low: float
    high: float
    wide_low: float
    wide_high: float
    correlation: float
    blocks: int


def trend(
    times: Sequence[float], values: Sequence[float], groups: Optional[Sequence[int]] = None
) -> Optional[Trend]:
    """The slope of block medians at equal distances in time; None if there are fewer than MIN_BLOCKS.

    groups: for each median the process that it belongs to, in order; None: one process. A median that is not
    a finite number is left out.
    """
    parts = _parts(times, values, groups)
    count = sum(len(part[0]) for part in parts)
    if count < MIN_BLOCKS:
        return None
    correlation = _correlation(parts, _theil_sen(parts)[0])
    white = [(t[1:], (y[1:] - correlation * y[:-1]) / (1 - correlation)) for t, y in parts if len(t) > 1]
    slope, low, high = _theil_sen(white)
    widening = math.sqrt((1 + correlation) / (1 - correlation))
    _, wide_low, wide_high = _theil_sen(parts, widening)
    return Trend(slope, low, high, wide_low, wide_high, correlation, count)


def judge(found: Optional[Trend], tolerance: float) -> str:
    """GROWING if the whole interval is above the tolerance, STEADY if all of it is below, else UNDECIDED."""
    if found is None:
        return UNDECIDED
    if found.low > tolerance:
        return GROWING
    return STEADY if found.high < tolerance else UNDECIDED


def theil_sen(
    times: Sequence[float], values: Sequence[float], groups: Optional[Sequence[int]] = None
) -> Interval:
    """The median of the slopes of all pairs, and Sen's 95 % interval for independent errors.

    Raises ValueError if no two values of a group have different times.
    """
    return _theil_sen(_parts(times, values, groups))


_Part = Tuple[np.ndarray, np.ndarray]


def _parts(times: Sequence[float], values: Sequence[float], groups: Optional[Sequence[int]]) -> List[_Part]:
    t, y = np.asarray(times, np.float64), np.asarray(values, np.float64)
    which = np.zeros(len(t), np.int64) if groups is None else np.asarray(groups)
    is_known = np.isfinite(y)
    return [(t[mine], y[mine]) for one in np.unique(which) for mine in [is_known & (which == one)]]


def _theil_sen(parts: Sequence[_Part], widening: float = 1.0) -> Interval:
    slopes = np.sort(np.concatenate([_pair_slopes(t, y) for t, y in parts]))
    if not len(slopes):
        raise ValueError("no two values with different times")
    half_width = _Z * widening * math.sqrt(sum(_kendall_variance(t, y) for t, y in parts))
    # Sen 1968, equation 2.6: the ranks of the limits among the sorted slopes.
    upper = min(round((len(slopes) + half_width) / 2), len(slopes) - 1)
    lower = max(round((len(slopes) - half_width) / 2) - 1, 0)
    return float(np.median(slopes)), float(slopes[lower]), float(slopes[upper])


def _pair_slopes(t: np.ndarray, y: np.ndarray) -> np.ndarray:
    earlier, later = np.triu_indices(len(t), 1)
    distance = t[later] - t[earlier]
    return (y[later] - y[earlier])[distance != 0] / distance[distance != 0]


def _kendall_variance(t: np.ndarray, y: np.ndarray) -> float:
    """The variance of Kendall's score, with the correction for equal values (Kendall 1970, chapter 4)."""

    def term(n: np.ndarray) -> float:
        return float((n * (n - 1) * (2 * n + 5)).sum())

    ties = [np.unique(one, return_counts=True)[1].astype(np.float64) for one in (t, y)]
    return max(0.0, (term(np.array([float(len(t))])) - sum(map(term, ties))) / 18)


def _correlation(parts: Sequence[_Part], slope: float) -> float:
    """Of neighbouring values without their trend; zero if negative.

    The sample's correlation is too small by about (1 + 4 rho) / n (Marriott and Pope 1954,
    doi:10.1093/biomet/41.3-4.390), which is added.
    """
    products = squares = 0.0
    count = 0
    for t, y in parts:
        rest = y - slope * t
        rest = rest - rest.mean() if len(rest) else rest
        products += float((rest[1:] * rest[:-1]).sum())
        squares += float((rest * rest).sum())
        count += len(rest)
    if squares <= 0:
        return 0.0
    raw = products / squares
    return min(max(raw + (1 + 4 * raw) / count, 0.0), _MAX_CORRELATION)
