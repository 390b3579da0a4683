"""Short training runs: the method learns, and with the sign of its correction reversed it does not.

They take minutes: `pytest -m slow`.
"""

import csv

import numpy as np
import pytest
from conftest import load, parse

pytestmark = pytest.mark.slow


def last_returns(script: str, tmp_path, *words: str, env_id: str = "Hopper-v4", steps: int = 120_000) -> float:
    """Mean return of the episodes that end in the last 10 % of the steps."""
    argv = ["--env-id", env_id, "--total-timesteps", str(steps), "--run-dir", str(tmp_path), *words]
    folder = load(script).train(parse(script, argv))
    with open(folder / "episodes.csv") as file:
        rows = [row for row in csv.DictReader(file) if int(row["global_step"]) > 0.9 * steps]
    return float(np.mean([float(row["episodic_return"]) for row in rows]))


@pytest.mark.parametrize("script", ["ppo_continuous.py", "blpo_continuous.py"])
def test_hopper_is_learned_in_120k_steps(script, tmp_path):
    assert last_returns(script, tmp_path) > 250


@pytest.mark.parametrize("script", ["ppo_discrete.py", "blpo_discrete.py"])
def test_cartpole_is_learned_in_100k_steps(script, tmp_path):
    """500 is the most that an episode can return, about 20 what a policy that knows nothing gets."""
    assert last_returns(script, tmp_path, "--seed", "101", env_id="CartPole-v1", steps=100_000) > 400


def test_hopper_is_not_learned_with_the_sign_reversed(tmp_path):
    """The one-step leader leans on its correction most: the right sign learns, the reversed one must not."""
    words = ["--leader-lambda", "0"]
    right = last_returns("blpo_continuous_ablations.py", tmp_path / "right", *words)
    reversed_sign = last_returns(
        "blpo_continuous_ablations.py", tmp_path / "reversed", *words, "--correction-control", "reversed"
    )
    assert right > 250
    assert reversed_sign < 100
