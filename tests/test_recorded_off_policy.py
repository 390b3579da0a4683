"""stddpg.py and stsac.py against runs of commit 8e19e7e, before they were rewritten: two iterations, of which the first
begins with random actions, agree to the rounding of float32.

tests/data/recorded_off_policy.json holds the command, the losses of both iterations and the final weights of each run (of
the targets their sums).
"""

import json
import shlex

import pytest
import torch
from conftest import REPO, load, read_csv

RECORDED = json.loads((REPO / "tests/data/recorded_off_policy.json").read_text())["runs"]


def in_the_old_order(module):
    """An agent that draws numbers as they were drawn then: initial weights of the targets, which are overwritten."""

    class Old(module.Agent):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            for critic in self.critics:
                module.mlp(critic[0].in_features, critic[0].out_features, 1)

    return Old


@pytest.mark.parametrize("name", RECORDED)
def test_two_iterations_are_those_of_the_old_script(name, tmp_path, monkeypatch):
    """The weights to 2e-5. What a solver leaves of its system is the rounding itself, and conjugate gradients on an
    indefinite Hessian carry it on."""
    script, *words = shlex.split(RECORDED[name]["command"])
    module = load(script)
    monkeypatch.setattr(module, "Agent", in_the_old_order(module))
    folder = module.train(module.parse_args([*words, "--run-dir", str(tmp_path)]))
    for row, then in zip(read_csv(folder / "metrics.csv"), RECORDED[name]["metrics"], strict=True):
        for metric, value in then.items():
            rounding = 5e-4 if metric == "bilevel/ihvp_residual" else 2e-5
            assert float(row[metric]) == pytest.approx(value, rel=1e-3, abs=rounding), metric
    agent = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    for key, value in RECORDED[name]["weights"].items():
        if key.startswith("targets"):
            assert agent[key].double().sum().item() == pytest.approx(value, abs=1e-4), key
        else:
            torch.testing.assert_close(agent[key].flatten(), torch.tensor(value), rtol=0, atol=2e-5)
