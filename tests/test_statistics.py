"""benchmark/statistics.py against closed forms and against rliable.

`data/rliable.json` holds inputs and what rliable 1.2.0 made of them; where rliable is installed (it needs pandas < 3) it is
also asked directly. To write the file: `python tests/test_statistics.py` from the top of the repository (minutes).
"""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the last line, where no conftest does so
from benchmark import statistics  # noqa: E402

SAVED = Path(__file__).parent / "data" / "rliable.json"
TAUS = np.linspace(-0.5, 2.0, 11)
REPLICATIONS = 20_000
# The two bootstraps draw other random numbers. The end of a 95 % percentile interval from B replications of a normal statistic
# has the standard error sqrt(0.025 * 0.975 / B) / 0.0584 standard deviations, 0.0048 widths at B = 20,000; the difference of
# two such ends 0.0068. Five of those, so that none of the ends compared lies outside by chance:
TOLERANCE = 0.035
# A fraction of runs moves in steps of 1 / (runs x tasks), and a quantile may fall on either side of a step: assert_agree.


def per_task(matrix) -> list[np.ndarray]:
    """rliable's matrix (runs, tasks) as our list of arrays."""
    return list(np.asarray(matrix, dtype=float).T)


def rliable_answers(x: np.ndarray, y: np.ndarray, replications: int = REPLICATIONS) -> dict:
    """What rliable makes of two matrices (runs, tasks): points and 95 % intervals."""
    from rliable import library, metrics

    np.random.seed(0)  # rliable draws from numpy's global generator

    def interval(scores, function):
        points, ends = library.get_interval_estimates({"x": scores}, function, reps=replications)
        return {"point": np.ravel(points["x"]).tolist(), "low": ends["x"][0].tolist(), "high": ends["x"][1].tolist()}

    return {
        "iqm": interval(x, lambda scores: np.array([metrics.aggregate_iqm(scores)])),
        "mean": interval(x, lambda scores: np.array([metrics.aggregate_mean(scores)])),
        "profile": interval(x, lambda scores: library.score_distributions(scores, TAUS)),
        "improvement": interval((x, y), lambda x, y: np.array([metrics.probability_of_improvement(x, y)])),
    }


def our_answers(x: np.ndarray, y: np.ndarray, replications: int) -> dict[str, statistics.Interval]:
    """The same by benchmark/statistics.py."""
    x, y, options = per_task(x), per_task(y), {"replications": replications}
    return {
        "iqm": statistics.stratified_bootstrap(statistics.iqm, x, **options),
        "mean": statistics.stratified_bootstrap(statistics.mean, x, **options),
        "profile": statistics.performance_profile(x, TAUS, **options),
        "improvement": statistics.stratified_bootstrap(statistics.probability_of_improvement, x, y, **options),
    }


def assert_agree(x: np.ndarray, y: np.ndarray, theirs: dict, replications: int = REPLICATIONS) -> None:
    """Points to rounding, ends of intervals within TOLERANCE widths (a step, for the profile)."""
    for name, ours in our_answers(x, y, replications).items():
        low, high = np.array(theirs[name]["low"]), np.array(theirs[name]["high"])
        np.testing.assert_allclose(ours.estimate, np.squeeze(theirs[name]["point"]), rtol=1e-12, atol=1e-12, err_msg=name)
        step = 1 / x.size if name == "profile" else 0.0
        allowed = TOLERANCE * math.sqrt(REPLICATIONS / replications) * (high - low) + step + 1e-12
        assert (np.abs(ours.low - low) <= allowed).all(), (name, ours.low, low)
        assert (np.abs(ours.high - high) <= allowed).all(), (name, ours.high, high)


def matrices() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The inputs of the saved file: as in a suite, many runs of one task, heavy tails, and scores with ties."""
    draw = np.random.default_rng(7)
    return {
        "10 runs, 3 tasks": (draw.normal(1.0, 0.3, (10, 3)).round(3), draw.normal(0.8, 0.3, (10, 3)).round(3)),
        "20 and 12 runs, 1 task": (draw.normal(0.5, 1.0, (20, 1)).round(3), draw.normal(0.0, 1.0, (12, 1)).round(3)),
        "7 runs, 6 tasks, heavy tails": (draw.standard_cauchy((7, 6)).round(3), draw.standard_cauchy((7, 6)).round(3)),
        "9 runs, 4 tasks, ties": (draw.integers(0, 4, (9, 4)) / 2.0, draw.integers(0, 4, (9, 4)) / 2.0),
    }


@pytest.mark.parametrize("name", json.loads(SAVED.read_text())["cases"] if SAVED.exists() else [])
def test_agrees_with_saved_rliable(name):
    case = json.loads(SAVED.read_text())["cases"][name]
    assert_agree(np.array(case["x"]), np.array(case["y"]), case["rliable"])


def test_agrees_with_installed_rliable():
    pytest.importorskip("rliable")
    from rliable import library, metrics

    draw = np.random.default_rng()  # other matrices each time: the points must agree on any
    for runs, tasks in ((1, 1), (4, 2), (5, 7), (11, 3)):
        x, y = draw.normal(size=(2, runs, tasks))
        ours = our_answers(x, y, replications=2)
        points = {
            "iqm": metrics.aggregate_iqm(x),
            "mean": metrics.aggregate_mean(x),
            "profile": library.score_distributions(x, TAUS),
            "improvement": metrics.probability_of_improvement(x, y),
        }
        for name, point in points.items():
            np.testing.assert_allclose(ours[name].estimate, point, rtol=1e-12, atol=1e-12, err_msg=name)
    x, y = matrices()["10 runs, 3 tasks"]
    few = 500  # of rliable's replications, which take a millisecond or more each
    assert_agree(x, y, rliable_answers(x, y, few), few)


# ---- Closed forms ----------------------------------------------------------------------------------------------
def test_iqm_of_known_lists():
    assert statistics.iqm([[1, 2, 3, 4, 5, 6, 7, 80]]) == (3 + 4 + 5 + 6) / 4
    assert statistics.iqm([[5.0, 1.0, 3.0]]) == 3.0  # three runs: nothing to cut
    assert statistics.iqm([[4.0, 1.0, 3.0, 200.0]]) == 3.5
    assert statistics.iqm([[1, 2], [3, 400]]) == 2.5
    values = np.random.default_rng(0).normal(size=(11, 5))
    assert statistics.iqm(per_task(values)) == pytest.approx(scipy.stats.trim_mean(values, 0.25, axis=None), abs=1e-14)


def test_tasks_weigh_the_same_whatever_their_number_of_runs():
    few, many = [1.0, 2.0], [10.0, 20.0, 30.0, 40.0]
    assert statistics.iqm([few, many]) == statistics.iqm([few * 2, many])
    assert statistics.mean([few, many]) == (1.5 + 25.0) / 2
    assert statistics.iqm([few, [10.0, 20.0, 30.0]]) == pytest.approx(statistics.iqm([few * 3, [10.0, 20.0, 30.0] * 2]))
    profile = statistics.performance_profile([np.array(few), np.array(many)], np.array([15.0]))
    assert profile.estimate == pytest.approx((0 + 3 / 4) / 2)


def test_probability_of_improvement_of_disjoint_equal_and_tied_samples():
    improvement = statistics.probability_of_improvement
    assert improvement([[3, 4, 5]], [[0, 1]]) == 1.0
    assert improvement([[0, 1]], [[3, 4, 5]]) == 0.0
    assert improvement([[1, 2, 3]], [[1, 2, 3]]) == 0.5
    assert improvement([[1, 1]], [[1, 1, 1]]) == 0.5
    assert improvement([[1, 2]], [[1, 0]]) == (0.5 + 1 + 1 + 1) / 4  # one tie of four pairs
    assert improvement([[3, 4], [0]], [[1], [5, 6]]) == 0.5  # won on one task, lost on the other
    x, y = np.random.default_rng(0).integers(0, 5, (2, 8))
    assert improvement([x], [y]) == pytest.approx(scipy.stats.mannwhitneyu(x, y).statistic / 64)


def test_difference_of_means():
    assert statistics.difference_of_means([[1, 3], [10]], [[1], [4, 6]]) == (1 + 5) / 2


# ---- Bootstrap -------------------------------------------------------------------------------------------------
def test_same_seed_same_interval_and_another_seed_another():
    scores = per_task(np.random.default_rng(0).normal(size=(6, 3)))
    first, again = (statistics.stratified_bootstrap(statistics.iqm, scores) for _ in range(2))
    assert first == again
    assert statistics.stratified_bootstrap(statistics.iqm, scores, seed=1).low != first.low


def test_one_run_a_task_gives_an_interval_without_width():
    interval = statistics.stratified_bootstrap(statistics.iqm, [[2.0], [4.0]])
    assert interval == (3.0, 3.0, 3.0)
    both = statistics.stratified_bootstrap(statistics.probability_of_improvement, [[2.0]], [[1.0]])
    assert both == (1.0, 1.0, 1.0)
    flat = statistics.performance_profile([[2.0]], np.array([1.0, 3.0]))
    assert flat.low.tolist() == flat.high.tolist() == [1.0, 0.0]


def test_interval_of_the_mean_is_the_normal_one_for_many_runs():
    scores = np.random.default_rng(0).normal(size=400)
    interval = statistics.stratified_bootstrap(statistics.mean, [scores], replications=20_000)
    error = scores.std() / math.sqrt(400)
    assert interval.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.1 * error)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = statistics.stratified_bootstrap(statistics.mean, list(draw.normal(size=(2, 20))), replications=400)
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / 400 <= 0.97  # percentile intervals of 20 runs are somewhat too short: about 0.93


def test_intervals_of_three_runs_are_too_short_as_the_docstring_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        x, y = ([draw.normal(size=3)] for _ in range(2))
        interval = statistics.stratified_bootstrap(statistics.difference_of_means, x, y, replications=400)
        covered += interval.low <= 0 <= interval.high
    assert 0.75 <= covered / 400 <= 0.87


def test_runs_are_drawn_within_their_task():
    interval = statistics.stratified_bootstrap(statistics.mean, [[0.0, 0.0], [1.0, 1.0]])
    assert interval == (0.5, 0.5, 0.5)  # a bootstrap over the pooled runs would have a width


def test_curve_is_the_statistic_at_each_step():
    curves = [np.random.default_rng(seed).normal(size=(5, 4)) for seed in range(2)]  # runs, steps
    whole = statistics.curve(statistics.iqm, curves)
    for step in range(4):
        alone = statistics.stratified_bootstrap(statistics.iqm, [task[:, step] for task in curves])
        assert (whole.estimate[step], whole.low[step], whole.high[step]) == alone


@pytest.mark.parametrize("bad", [[], [[]], [[1.0], []], [[1.0, np.nan]], [[np.inf]]])
def test_scores_that_cannot_be_judged_are_refused(bad):
    for function in (statistics.iqm, statistics.mean, lambda scores: statistics.stratified_bootstrap(statistics.mean, scores)):
        with pytest.raises(ValueError, match="there is no task|has no runs|not finite"):
            function(bad)


def test_two_methods_need_the_same_tasks():
    for function in (statistics.probability_of_improvement, statistics.difference_of_means):
        with pytest.raises(ValueError):
            function([[1.0]], [[1.0], [2.0]])


if __name__ == "__main__":
    cases = {
        name: {"x": x.tolist(), "y": y.tolist(), "rliable": rliable_answers(x, y)} for name, (x, y) in matrices().items()
    }
    made = f"rliable {version('rliable')}, {REPLICATIONS} replications, thresholds of the profile {TAUS.tolist()}"
    SAVED.write_text(json.dumps({"made_by": made, "cases": cases}) + "\n")
