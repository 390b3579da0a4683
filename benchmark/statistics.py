"""Differences between two methods from a few runs on a few tasks: estimate, interval and p.

A comparison has one entry a task: two arrays, the scores of both methods' runs there, or one array of paired
differences. Every task weighs the same, however many runs it has. The estimate is the mean over the tasks of
the difference of means.

*Interval*, 95 %: studentised bootstrap, 100,000 resamples by `scipy.stats.bootstrap`, runs drawn with
replacement within each task and method. Of two methods with normal, skewed or two-valued scores it holds the
true difference in 92 to 99 % of the cases at 3 to 10 runs; the percentile and the BCa interval hold it in 78
to 94 % (`tests/test_statistics.py`). It can be much wider than they are where a method has a rare run far
from its others: how rare, a few runs cannot tell.

*p*: two-sided permutation test of the same estimate, labels exchanged within each task (signs, of paired
differences); over all exchanges where they can be counted, else over 200,000 random ones. Few runs bound it
from below: 2 / 20 for three runs against three on one task, 2 / 252 for five.

With fewer than 3 runs of a method on a task there is neither. Samples without any variance have an interval
without width.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

RESAMPLES = 100_000
PERMUTATIONS = 200_000
COUNTED = 4_000_000  # exchanges of some tasks together that are still counted
LEAST = 3  # runs of each method on each task for an interval and a p
TAIL = 0.025  # of the 95 % interval, on each side
MARGIN = 0.1  # of the reference level; differences within it are called equivalent
Tasks = Sequence[tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Comparison:
    """One method minus another; `-comparison` is the other way round, from the same numbers."""

    estimate: float
    runs: tuple[int, int]
    """fewest and most runs of a method on a task (pairs, of paired differences)"""
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    outside: float = math.nan
    """the larger of the one-sided p of a difference above the margin and of one below minus the margin"""
    narrow: tuple[float, float] = (math.nan, math.nan)
    """the interval with its tails larger by two standard errors of the Monte Carlo draw"""
    wide: tuple[float, float] = (math.nan, math.nan)
    """and with its tails smaller by as much"""
    counted: bool = True
    """whether p is over all exchanges"""

    def error(self, p: float) -> float:
        """Two standard errors of a p of this comparison; none where all exchanges were counted."""
        return 0.0 if self.counted else 2 * math.sqrt(p * (1 - p) / PERMUTATIONS)

    def __neg__(self) -> "Comparison":
        narrow, wide = ((-high, -low) for low, high in (self.narrow, self.wide))
        return replace(
            self, estimate=-self.estimate, low=-self.high, high=-self.low, narrow=narrow, wide=wide
        )


def compare(tasks: Tasks, margin: float = MARGIN, seed: int = 0) -> Comparison | None:
    """The comparison of these tasks; None without a task or with one without runs. Same seed, same numbers.

    Raises ValueError for a score that is not finite.
    """
    tasks = [tuple(np.asarray(sample, dtype=np.float64) for sample in task) for task in tasks]
    samples = [sample for task in tasks for sample in task]
    if not all(np.isfinite(sample).all() for sample in samples):
        raise ValueError("a score is not finite")
    numbers = [len(sample) for sample in samples]
    if min(numbers, default=0) == 0:
        return None
    estimate = float(np.mean([difference(*task) for task in tasks]))
    runs = min(numbers), max(numbers)
    if runs[0] < LEAST:
        return Comparison(estimate, runs)
    (low, high), narrow, wide = bootstrap(tasks, estimate, seed)
    p, counted = permutation_p(tasks, estimate, "both", seed)
    # A difference of the margin or more, up or down: shift the first method by it and ask for one side.
    sides = [
        permutation_p(shifted(tasks, -by), estimate - by, side, seed)[0]
        for by, side in ((margin, "below"), (-margin, "above"))
    ]
    return Comparison(estimate, runs, low, high, p, max(sides), narrow, wide, counted)


def difference(first: np.ndarray, second: np.ndarray | None = None, axis: int = -1) -> np.ndarray:
    """Of the means; the mean, of paired differences."""
    return first.mean(axis=axis) - (0 if second is None else second.mean(axis=axis))


def shifted(tasks: Tasks, by: float) -> Tasks:
    """The tasks with the first method's scores moved."""
    return [(task[0] + by, *task[1:]) for task in tasks]


# ---- The interval ------------------------------------------------------------------------------------------
def bootstrap(tasks: Tasks, estimate: float, seed: int) -> list[tuple[float, float]]:
    """The studentised interval, then with its tails larger and smaller by two standard errors of the
    resamples."""
    samples = [sample for task in tasks for sample in task]

    def standard_error(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.sqrt(sum(sample.var(axis=axis, ddof=1) / sample.shape[axis] for sample in drawn)) / len(
            tasks
        )

    def studentised(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        left = iter(drawn)
        means = [difference(*itertools.islice(left, len(task)), axis=axis) for task in tasks]
        away, scale = sum(means) / len(tasks) - estimate, standard_error(*drawn, axis=axis)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(np.abs(away) < 1e-12 * error, 0.0, away / scale)  # 0 / 0 is no distance

    error = standard_error(*samples)
    if error <= 1e-12 * max(1.0, *(np.abs(sample).max() for sample in samples)):
        return [(estimate, estimate)] * 3
    options = {
        "n_resamples": RESAMPLES,
        "batch": 10_000,
        "vectorized": True,
        "method": "percentile",
        "rng": seed,
    }
    with np.errstate(invalid="ignore"):  # scipy's own standard error, of resamples without any spread
        drawn = scipy.stats.bootstrap(samples, studentised, **options).bootstrap_distribution
    wobble = 2 * math.sqrt(TAIL * (1 - TAIL) / RESAMPLES)
    tails = np.array([TAIL, TAIL + wobble, TAIL - wobble])
    # inverted_cdf: a resample without any spread says infinity, and no end may lie between that and a number.
    low, high = (
        estimate - error * np.quantile(drawn, each, method="inverted_cdf") for each in (1 - tails, tails)
    )
    return list(zip(low.tolist(), high.tolist()))


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's 95 % interval of the mean over the first axis, at each point of a curve; (runs, points) ->
    two of (points,)."""
    runs = len(values)
    half = scipy.stats.t.ppf(1 - TAIL, runs - 1) * values.std(axis=0, ddof=1) / math.sqrt(runs)
    return values.mean(axis=0) - half, values.mean(axis=0) + half


# ---- p -----------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=8)  # of up to hundreds of megabytes with many runs
def exchanges(first: int, second: int, seed: int) -> tuple[np.ndarray, bool]:
    """The weight of each run in the difference of means, (exchanges, runs), and whether these are all.

    `second` is 0 for paired differences, whose signs are exchanged.
    """
    total = first + second
    number = math.comb(total, first) if second else 2**first
    draw = np.random.default_rng(seed)
    if number > PERMUTATIONS:
        mine = (
            draw.random((PERMUTATIONS, total)).argsort(axis=1) < first
            if second
            else draw.random((PERMUTATIONS, first)) < 0.5
        )
    elif second:
        mine = np.zeros((number, total), dtype=bool)
        np.put_along_axis(mine, np.array(list(itertools.combinations(range(total), first))), True, axis=1)
    else:
        mine = np.array(list(itertools.product((True, False), repeat=first)))
    return np.where(mine, 1 / first, -1 / (second or first)), number <= PERMUTATIONS


def permutation_p(tasks: Tasks, estimate: float, side: str, seed: int) -> tuple[float, bool]:
    """The share of exchanges whose estimate is as large as this one ("above"), as small ("below") or as far
    from 0 ("both"), and whether it is over all of them."""
    nulls, counted = [], True
    for index, task in enumerate(tasks):
        weights, complete = exchanges(len(task[0]), len(task[1]) if len(task) > 1 else 0, seed + index)
        nulls.append(weights @ np.concatenate(task) / len(tasks))
        counted = counted and complete
    # Two halves of the tasks, each with the sums of all its exchanges; the pairs of both are counted by
    # bisection.
    halves = [np.zeros(1), np.zeros(1)]
    for null in sorted(nulls, key=len, reverse=True):
        smaller = int(len(halves[1]) < len(halves[0]))
        counted = counted and len(halves[smaller]) * len(null) <= COUNTED
        if counted:
            halves[smaller] = np.add.outer(halves[smaller], null).ravel()
    if not counted:
        draw = np.random.default_rng(seed)
        halves = [
            sum(
                draw.permuted(null) if len(null) == PERMUTATIONS else draw.choice(null, PERMUTATIONS)
                for null in nulls
            ),
            np.zeros(1),
        ]
    bound = abs(estimate) if side == "both" else estimate
    slack = 1e-9 * max(1e-3, abs(bound))  # sums of the same numbers in another order
    one, other = halves[0], np.sort(halves[1])
    above = (
        (len(other) - np.searchsorted(other, bound - slack - one, side="left")).sum()
        if side != "below"
        else 0
    )
    below = (
        np.searchsorted(other, (-bound if side == "both" else bound) + slack - one, side="right").sum()
        if side != "above"
        else 0
    )
    extreme, total = int(above) + int(below), len(one) * len(other)
    return min(1.0, extreme / total if counted else (extreme + 1) / (total + 1)), counted
