"""sobirl_tabular.py against recordings of commit 8e19e7e, before it was rewritten: three outer iterations of every method on
every problem, the table of the implicit term's forms, and the rows of two comparisons. All in float64, with the same random
numbers: agreement to rounding (seen: bit for bit)."""

import json
import math

import pytest
import torch
from conftest import REPO

import sobirl_tabular as sobirl

RECORDED = json.loads((REPO / "tests/data/recorded_sobirl_tabular.json").read_text())
SEEDS = [1, 2]


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What was recorded of x, direction and policy: sum, norm and last entry of each instance."""
    entries = tensor.flatten(1)
    return torch.stack([entries.sum(1), entries.norm(dim=1), entries[:, -1]])


@pytest.mark.parametrize("key", RECORDED["iterates"])
def test_iterates(key):
    name, method = key.split()
    args, problem = sobirl.Args(**RECORDED["args"]), sobirl.PROBLEMS[name](SEEDS)
    state = sobirl.first_state(problem, SEEDS)
    for row in RECORDED["iterates"][key]:
        direction, policy, after = sobirl.run_method(method, problem, args, state)
        for quantity, found in (("x", state["x"]), ("direction", direction), ("policy", policy)):
            then = torch.tensor(row[quantity], dtype=torch.float64)
            assert ((numbers(found) - then).abs() <= 1e-12 * then[1]).all(), quantity
        state = after


def assert_same_rows(found: list[dict], recorded: list[dict]) -> None:
    """None in the recording is nan. An error relative to 1 that was rounding then is rounding now: which one, the processor says."""
    for row, then in zip(found, recorded, strict=True):
        for name, value in then.items():
            if name.startswith("relative_error") and value < 1e-12:
                assert row[name] < 1e-12, name
                continue
            value = math.nan if value is None else value
            assert row[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9, abs=1e-15, nan_ok=True)), name


def test_bias():
    assert_same_rows(sobirl.measure_bias(sobirl.PreferenceLearning(SEEDS), SEEDS), RECORDED["bias"])


@pytest.mark.parametrize("name", RECORDED["curves"])
def test_rows_of_a_comparison(name):
    *_, state = sobirl.follow(name, "sobirl", sobirl.Args(**RECORDED["args"], iterations=3), None)
    assert_same_rows(state["rows"], RECORDED["curves"][name])
