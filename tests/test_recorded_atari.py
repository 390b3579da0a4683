"""ppo_atari.py against runs of commit 8e19e7e, before it was rewritten: two iterations agree to the rounding of float32.

tests/data/recorded_atari.json holds for each run its command, the losses of both iterations, and of each tensor of the final
weights its sum, its norm and up to twelve of its numbers. The networks have few channels; the games are real ones.
"""

import csv
import json
import math
import shlex

import pytest
import torch
from conftest import REPO, load
from torch import nn

RUNS = json.loads((REPO / "tests/data/recorded_atari.json").read_text())["runs"]
QUICK = ("ppo shared",)


def in_the_old_order() -> nn.Sequential:
    """A trunk that draws its initial weights as they were drawn then: first PyTorch's own of all layers, which are overwritten,
    and then the orthogonal ones. Each layer now draws both where it is made."""
    network = nn.Sequential(
        nn.Conv2d(4, 3, 8, stride=4), nn.ReLU(), nn.Conv2d(3, 4, 4, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 7 * 7, 6), nn.ReLU(),
    )  # fmt: skip
    for layer in network:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return network


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in RUNS])
def test_a_recorded_run(name, tmp_path, monkeypatch):
    recorded, module = RUNS[name], load(RUNS[name]["script"])
    monkeypatch.setattr(module, "nature_cnn", in_the_old_order)
    folder = module.train(module.parse_args([*shlex.split(recorded["command"]), "--run-dir", str(tmp_path)]))
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for row, then in zip(rows, recorded["metrics"], strict=True):
        for metric, value in then.items():
            assert float(row[metric]) == pytest.approx(value, rel=3e-3, abs=2e-5), metric
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    assert weights.keys() == recorded["weights"].keys()
    for key, (total, norm, *numbers) in recorded["weights"].items():
        found = weights[key].flatten()
        kept = torch.linspace(0, len(found) - 1, len(numbers)).long()
        assert torch.allclose(found[kept], torch.tensor(numbers), rtol=0, atol=2e-5), key
        assert float(found.double().norm()) == pytest.approx(norm, abs=2e-5), key
        assert float(found.double().sum()) == pytest.approx(total, abs=1e-3), key
