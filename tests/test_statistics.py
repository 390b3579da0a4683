"""benchmark/statistics.py against closed forms, scipy and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from benchmark import statistics
from benchmark.statistics import compare

A, B = np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.5, 2.5])


def normal(*shape: int, seed: int = 0, by: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(by, size=shape)


# ---- Estimate and shape ------------------------------------------------------------------------------------
def test_tasks_weigh_the_same_whatever_their_number_of_runs():
    comparison = compare([(A, B), (np.array([10.0, 20.0, 30.0, 40.0, 0.0]), np.array([5.0, 5.0, 5.0]))])
    assert comparison.estimate == pytest.approx((1.0 + 15.0) / 2) and comparison.runs == (3, 5)


def test_the_other_direction_is_the_same_numbers_with_the_sign_turned():
    one = compare([(normal(5), normal(5, seed=1, by=1.0))])
    turned = -one
    assert (turned.estimate, turned.low, turned.high) == (-one.estimate, -one.high, -one.low)
    assert (turned.p, turned.outside, -turned) == (one.p, one.outside, one)
    assert turned.wide == (-one.wide[1], -one.wide[0]) and turned.narrow == (-one.narrow[1], -one.narrow[0])


def test_same_seed_same_numbers():
    tasks = [(normal(5), normal(5, seed=1))]
    assert compare(tasks) == compare(tasks) != compare(tasks, seed=1)


def test_fewer_than_three_runs_have_an_estimate_and_nothing_else():
    comparison = compare([(A, B[:2])])
    assert comparison.estimate == A.mean() - 0.75 and comparison.runs == (2, 3)
    assert all(
        math.isnan(value) for value in (comparison.low, comparison.high, comparison.p, comparison.outside)
    )
    assert compare([]) is None and compare([(A, B[:0])]) is None


def test_runs_without_variance_have_an_interval_without_width_and_their_p():
    comparison = compare([(np.full(5, 0.7), np.full(5, 0.5))])
    assert comparison.low == comparison.high == comparison.estimate
    assert comparison.p == pytest.approx(2 / 252)
    equal = compare([(np.full(5, 0.5), np.full(5, 0.5))])
    assert equal.p == 1.0 and equal.outside == pytest.approx(1 / 252)  # none of the 252 shows a loss of 0.1


def test_where_few_runs_cannot_bound_a_side_the_interval_has_no_end_there():
    comparison = compare(
        [(np.array([0.0, 1.0, 1.0, 1.0, 1.0]), np.ones(5))]
    )  # a third of the resamples lacks the one bad run
    assert comparison.low == -math.inf and comparison.high < math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        compare([(np.array([1.0, bad, 2.0]), B)])


# ---- The interval ------------------------------------------------------------------------------------------
def test_of_many_runs_the_interval_is_welchs():
    x, y = normal(100, by=0.3), 2 * normal(80, seed=1)
    (low, high), *_ = statistics.bootstrap([(x, y)], x.mean() - y.mean(), 0)
    welch = scipy.stats.ttest_ind(x, y, equal_var=False).confidence_interval()
    assert (low, high) == pytest.approx((welch.low, welch.high), abs=0.03 * (welch.high - welch.low))


def test_of_paired_differences_it_is_students():
    values = normal(60, by=0.2)
    comparison, student = compare([(values,)]), scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert (comparison.low, comparison.high) == pytest.approx(
        (student.low, student.high), abs=0.03 * (student.high - student.low)
    )


def test_runs_are_drawn_within_their_task():
    near = (0.01 * normal(8), 0.01 * normal(8, seed=1)), (np.full(3, 9.0), np.full(3, 9.0))
    comparison = compare(near)  # a bootstrap over the pooled runs would be as wide as the tasks are apart
    assert 0 < comparison.high - comparison.low < 0.1


def test_its_monte_carlo_error_is_inside_what_is_said_of_it():
    tasks = [(normal(5), normal(5, seed=1))]
    one, other = compare(tasks), compare(tasks, seed=1)
    assert one.wide[0] <= one.low <= one.narrow[0] < one.narrow[1] <= one.high <= one.wide[1]
    assert 2 * one.wide[0] - one.narrow[0] <= other.low <= 2 * one.narrow[0] - one.wide[0]


SCORES = {
    "normal": lambda draw, size: draw.normal(size=size),
    "skewed": lambda draw, size: draw.exponential(size=size),
    "two-valued": lambda draw, size: (draw.random(size) < 0.3) + 0.05 * draw.normal(size=size),
}


@pytest.mark.parametrize("runs, tasks", [(3, 3), (5, 1), (5, 3), (10, 1)])
@pytest.mark.parametrize("kind", SCORES)
def test_the_interval_holds_the_true_difference_as_often_as_the_docstring_says(
    monkeypatch, kind, runs, tasks
):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    draw, held, repeats = np.random.default_rng(0), 0, 300
    for _ in range(repeats):
        samples = [tuple(SCORES[kind](draw, runs) for _ in range(2)) for _ in range(tasks)]
        estimate = np.mean([x.mean() - y.mean() for x, y in samples])
        low, high = statistics.bootstrap(samples, estimate, 0)[0]
        held += low <= 0 <= high
    assert 0.92 - 0.032 <= held / repeats  # two standard errors of so many repeats


def test_the_mean_of_a_curve_has_students_interval_at_each_point():
    curves = normal(5, 4)
    low, high = statistics.mean_interval(curves)
    student = scipy.stats.ttest_1samp(curves, 0, axis=0).confidence_interval()
    np.testing.assert_allclose((low, high), (student.low, student.high))


# ---- p -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [(3, 3), (5, 5), (4, 7)])
def test_p_of_one_task_is_scipys_exact_one(sizes):
    x, y = normal(sizes[0], by=1.0), normal(sizes[1], seed=1)
    null = scipy.stats.permutation_test(
        (x, y), statistics.difference, n_resamples=np.inf, vectorized=True
    ).null_distribution
    assert compare([(x, y)]).p == pytest.approx(np.mean(np.abs(null) >= abs(x.mean() - y.mean()) - 1e-9))


def test_p_of_paired_differences_is_scipys_exact_one():
    values = normal(6, by=1.0)
    theirs = scipy.stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert compare([(values,)]).p == pytest.approx(theirs.pvalue)


def by_hand(tasks) -> float:
    """The two-sided p over every exchange within every task, one after another."""
    alone = []
    for x, y in tasks:
        pool, means = np.concatenate([x, y]), []
        for mine in itertools.combinations(range(len(pool)), len(x)):
            rest = [index for index in range(len(pool)) if index not in mine]
            means.append(pool[list(mine)].mean() - pool[rest].mean())
        alone.append(means)
    estimate = sum(x.mean() - y.mean() for x, y in tasks)
    sums = [abs(sum(chosen)) >= abs(estimate) - 1e-9 for chosen in itertools.product(*alone)]
    return sum(sums) / len(sums)


def test_p_of_several_tasks_exchanges_labels_within_each():
    tasks = [
        (normal(3, by=1.0), normal(3, seed=1)),
        (normal(3, seed=2, by=1.0), normal(4, seed=3)),
        (normal(2, seed=4), normal(2, seed=5)),
    ]
    estimate = float(np.mean([x.mean() - y.mean() for x, y in tasks]))
    assert statistics.permutation_p(tasks, estimate, "both", 0) == (pytest.approx(by_hand(tasks)), True)


def test_p_is_drawn_where_the_exchanges_are_too_many_to_count(monkeypatch):
    tasks = [(normal(8, by=0.5), normal(8, seed=1)), (normal(8, seed=2, by=0.5), normal(8, seed=3))]
    exact = compare(tasks)
    assert exact.counted
    for name, bound in (("PERMUTATIONS", 10_000), ("COUNTED", 1000)):
        with monkeypatch.context() as patch:
            patch.setattr(statistics, name, bound)
            statistics.exchanges.cache_clear()
            drawn = compare(tasks)
            assert not drawn.counted and drawn.p == pytest.approx(
                exact.p, abs=5 * math.sqrt(exact.p / 10_000)
            )
    statistics.exchanges.cache_clear()


def test_three_against_three_cannot_be_below_a_tenth():
    assert compare([(np.array([7.0, 8.0, 9.0]), B)]).p == pytest.approx(2 / 20)


def test_outside_is_small_only_for_a_difference_within_the_margin():
    x = np.linspace(0, 0.02, 6)
    near, far = compare([(x, x + 0.01)]), compare([(x, x + 0.2)])
    assert near.outside == pytest.approx(1 / math.comb(12, 6)) and far.outside > 0.9


def test_ties_count_as_the_estimate_itself():
    x, y = np.array([0.1, 0.3, 0.1, 0.3, 0.3]), np.array([0.1, 0.1, 0.3, 0.1, 0.1])
    assert compare([(x, y)]).p == pytest.approx(by_hand([(x, y)]))
