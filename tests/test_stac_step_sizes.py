"""benchmark/stac_step_sizes.py: the rule by which stac_mujoco's step sizes are chosen, on synthetic results."""

import json

import pytest
from test_figures import make_results, make_suite

from benchmark import stac_step_sizes
from benchmark.reference import load_reference
from benchmark.scores import load_results

SCORES = {  # normalised returns on Hopper-v4 and HalfCheetah-v4
    "ppo": (0.5, 0.2),  # ranks 1, 3
    "nested": (0.4, 0.9),  # ranks 2, 1
    "blpo": (0.1, 0.3),  # ranks 3, 2
}


def place(tmp_path, scores, diverged=()) -> list[stac_step_sizes.Place]:
    """The order of three methods with these normalised final returns, the same for each of two seeds but for a shift."""
    suite, levels = make_suite(seeds=2), load_reference()
    make_results(suite, tmp_path)
    path = tmp_path / suite.name / "runs.json"
    made = json.loads(path.read_text())
    for run in made["runs"]:
        zero, one = (levels[run["environment"]][key] for key in ("random", "reference"))
        score = scores[run["method"]][suite.environments.index(run["environment"])] + (0.01, -0.01)[run["seed"] - 1]
        run["final_return"], run["diverged"] = zero + (one - zero) * score, run["job"] in diverged
    path.write_text(json.dumps(made))
    return stac_step_sizes.places(suite, load_results(suite, tmp_path))


def test_the_best_mean_rank_comes_first(tmp_path):
    assert list(make_suite(seeds=2).methods) == list(SCORES)
    ordered = place(tmp_path, SCORES)
    assert [each.method for each in ordered] == ["nested", "ppo", "blpo"]
    assert [each.ranks for each in ordered] == [(2, 1), (1, 3), (3, 2)]
    assert [each.mean_rank for each in ordered] == [1.5, 2, 2.5]
    assert ordered[0].mean_score == pytest.approx(0.65)


def test_of_equal_mean_ranks_the_higher_return_comes_first(tmp_path):
    ordered = place(tmp_path, {"ppo": (0.5, 0.2), "nested": (0.4, 0.9), "blpo": (0.1, 0.1)})  # ranks (1, 2), (2, 1), (3, 3)
    assert [each.method for each in ordered] == ["nested", "ppo", "blpo"]
    assert ordered[0].mean_rank == ordered[1].mean_rank == 1.5


def test_a_run_that_diverged_counts_as_a_random_policy(tmp_path):
    names = [f"{task}__nested__{seed}" for task in make_suite().environments for seed in (1, 2)]
    ordered = place(tmp_path, SCORES, diverged=names)
    assert ordered[-1].method == "nested" and ordered[-1].mean_score == pytest.approx(0)


def test_nothing_is_chosen_while_runs_are_missing(tmp_path, capsys):
    assert stac_step_sizes.main(tmp_path) == 2
    assert "72 runs of stac_mujoco_tune are missing" in capsys.readouterr().err
