"""Short training runs: the method learns, and with the sign of its correction reversed it does not.

They take minutes: `pytest -m slow`.
"""

import csv

import numpy as np
import pytest
from conftest import load

pytestmark = pytest.mark.slow


def last_returns(script: str, tmp_path, *words: str) -> float:
    """Mean return of the episodes that end in the last 10 % of 120k steps of Hopper-v4."""
    module = load(script)
    argv = ["--env-id", "Hopper-v4", "--total-timesteps", "120000", "--run-dir", str(tmp_path), *words]
    folder = module.train(module.parse_args(module.Args, argv))
    with open(folder / "episodes.csv") as file:
        rows = [row for row in csv.DictReader(file) if int(row["global_step"]) > 108_000]
    return float(np.mean([float(row["episodic_return"]) for row in rows]))


@pytest.mark.parametrize("script", ["ppo_continuous.py", "blpo_continuous.py"])
def test_hopper_is_learned_in_120k_steps(script, tmp_path):
    assert last_returns(script, tmp_path) > 250


def test_hopper_is_not_learned_with_the_sign_reversed(tmp_path):
    """The one-step leader leans on its correction most: with the trajectory mixed term the right sign learns, the
    reversed one must not."""
    words = ["--leader-lambda", "0", "--mixed-term", "trajectory"]
    right = last_returns("blpo_continuous_ablations.py", tmp_path / "right", *words)
    reversed_sign = last_returns(
        "blpo_continuous_ablations.py", tmp_path / "reversed", *words, "--correction-control", "reversed"
    )
    assert right > 250
    assert reversed_sign < 100
