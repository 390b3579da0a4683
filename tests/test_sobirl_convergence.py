"""The command that measures the exponents of SoBiRL's theorems: its fit on known powers, and a tiny run."""

import math

import pytest
from conftest import read_csv

from benchmark import sobirl_convergence as convergence


def test_exponents_of_known_powers():
    """Two instances that fall as K^-1 and as K^-0.5, after a start that is not fitted; samples grow as K^(7/3)."""
    m_sobirl, _, _, growing = convergence.SETTINGS
    rows = [
        {"setting": setting, "problem": "p", "seed": seed, "iterations": k, "samples": k ** (7 / 3), "average_squared_norm": a}
        for setting in (m_sobirl, growing)
        for seed, power in ((1, -1.0), (2, -0.5))
        for k in (1, 2, 8, 16, 32)
        for a in [3.0 if k < 8 and setting == m_sobirl else 5 * k**power]
    ]  # fmt: skip
    first, iterations, samples = convergence.exponents(rows)
    assert (first["theorem"], iterations["theorem"]) == (-1, -2 / 3) and samples["theorem"] == pytest.approx(-2 / 3 * 3 / 7)
    for row, factor in ((first, 1), (iterations, 1), (samples, 3 / 7)):
        assert (row["smallest"], row["largest"]) == pytest.approx((-factor, -0.5 * factor))
        assert row["slope"] == pytest.approx(-0.75 * factor) and row["instances"] == 2
        half = 12.7062 * 0.25 * factor  # t with one degree of freedom; the standard error of -1 and -1/2 is 1/4
        assert (row["low"], row["high"]) == pytest.approx((-0.75 * factor - half, -0.75 * factor + half), rel=1e-4)


def test_a_tiny_run_writes_every_file(tmp_path, capsys):
    words = {"tracking_iterations": 4, "iterations": 4, "stochastic_iterations": 4, "ladder": (2, 4), "instances": 2}
    convergence.main(convergence.Args(results_dir=tmp_path, **words))
    assert {path.name for path in tmp_path.iterdir()} == {"curves.csv", "exponents.csv", "convergence.png", "provenance.json"}
    found = read_csv(tmp_path / "exponents.csv")
    assert len(found) == 2 * 6 + 2 * 2 * 4
    assert all(math.isfinite(float(row["slope"])) for row in found)
    growing = [row for row in read_csv(tmp_path / "curves.csv") if "growing" in row["setting"] and row["seed"] == "1"]
    assert [(row["iterations"], row["samples"]) for row in growing[:2]] == [("2", "8"), ("4", "40")]  # 4 and 10 tuples
    assert "goal-navigation" in capsys.readouterr().out
