"""stac.py and stac_ablations.py against two iterations of commit 8e19e7e, before they were rewritten.

tests/data/recorded_stac.json holds the command, all metrics but times and the final weights of each run. Nothing differs by
intent, and the random numbers are drawn in the same order, so the runs agree to the rounding of float32; it was acted in
numpy then. The full Hessian's recordings have a lambda that keeps it definite, or few iterations without the guard:
conjugate gradients on an indefinite matrix carry rounding on.
"""

import csv
import json
import shlex

import pytest
import torch
from conftest import REPO, load

RECORDED = json.loads((REPO / "tests/data/recorded_stac.json").read_text())["runs"]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name, tmp_path):
    script, *words = shlex.split(RECORDED[name]["command"])
    module = load(script)
    folder = module.train(module.parse_args([*words, "--run-dir", str(tmp_path)]))
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for row, then in zip(rows, RECORDED[name]["metrics"], strict=True):
        for metric, value in then.items():
            assert float(row[metric]) == pytest.approx(value, rel=1e-3, abs=1e-6), metric
    weights = torch.load(folder / "model.pt", weights_only=True)["agent"]
    for key, value in RECORDED[name]["weights"].items():
        assert torch.allclose(weights[key].flatten(), torch.tensor(value), rtol=1e-5, atol=1e-6), key
