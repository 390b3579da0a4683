"""The scripts against runs of commit 8e19e7e, before they were rewritten: where the mathematics is the same, two iterations
agree to the rounding of float32.

tests/data/recorded_8e19e7e.json holds the command, the losses of both iterations and the final weights of each run. What
differs by intent is named beside the run that it concerns.
"""

import csv
import json
import math
import shlex

import pytest
import torch
import torch.nn as nn
from conftest import REPO, load

RECORDED = json.loads((REPO / "tests/data/recorded_8e19e7e.json").read_text())["runs"]


def in_the_old_order(agent_class):
    """An agent that draws its initial weights as they were drawn then: for each network first PyTorch's own of all layers,
    which are overwritten, and then the orthogonal ones. Each layer now draws both where it is made."""

    class Old(agent_class):
        def __init__(self, *sizes):
            state = torch.get_rng_state()
            super().__init__(*sizes)
            torch.set_rng_state(state)
            actor = self.actor_mean if hasattr(self, "actor_mean") else self.actor_logits
            for network, gain in ((self.critic, 1.0), (actor, 0.01)):
                layers = [layer for layer in network if isinstance(layer, nn.Linear)]
                for layer in layers:
                    nn.Linear(layer.in_features, layer.out_features)
                for layer in layers:
                    nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else math.sqrt(2))

    return Old


def run(name: str, tmp_path, monkeypatch, *words: str):
    """Run the recorded command, with more words, in the old order: the rows of metrics.csv and the weights, both ways."""
    script, *old = shlex.split(RECORDED[name]["command"])
    module = load(script)
    monkeypatch.setattr(module, "Agent", in_the_old_order(module.Agent))
    folder = module.train(module.parse_args([*old, "--run-dir", str(tmp_path), *words]))
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return rows, torch.load(folder / "model.pt", weights_only=True)["agent"]


def assert_same(name: str, rows, weights, but=()) -> None:
    """The run is the recorded one up to rounding, `but` for some metrics."""
    for row, then in zip(rows, RECORDED[name]["metrics"], strict=True):
        for metric, value in then.items():
            if metric not in but:
                assert float(row[metric]) == pytest.approx(value, rel=2e-3, abs=2e-5), metric
    for key, value in RECORDED[name]["weights"].items():
        assert torch.allclose(weights[key].flatten(), torch.tensor(value), rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("name", ["ppo_continuous", "ppo_discrete"])
def test_ppo(name, tmp_path, monkeypatch):
    assert_same(name, *run(name, tmp_path, monkeypatch))


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_nested_control(kind, tmp_path, monkeypatch):
    """The inner gradient's norms are now those of the whole rollout."""
    name = f"blpo_{kind}_none"
    assert_same(name, *run(name, tmp_path, monkeypatch))
