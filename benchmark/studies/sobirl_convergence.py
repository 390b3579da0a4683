"""The convergence exponents of SoBiRL's theorems, measured on the random instances of sobirl_tabular.py.

    python -m benchmark.studies.sobirl_convergence --results-dir benchmark/results/sobirl_convergence

The theorems bound the mean of |grad Phi(x_k)|^2 over k < K:
  7.4  M-SoBiRL, constant step sizes and N    O(1/K)
  7.6  SoBiRL                                 O(1/K) + O(epsilon)
  7.7  Stoc-SoBiRL    O~(K^(-2/3)); O~(samples^(-2/7)) with K^(4/3) tuples an iteration
What is fitted is the slope of the logarithm of that mean against the logarithm of K, by least squares over
the last two doublings of one run; for Theorem 7.7 with growing tuples over runs of K = 64 to 512. Each
instance has a slope; the interval is Student's 95 % interval of the mean over instances. A theorem is an
upper bound: a steeper slope does not contradict it. But a running mean cannot fall faster than 1/K for long,
which is what it does once the gradient is 0. Step sizes are the problems' own. Seven minutes on one core.

Writes curves.csv (what was fitted), exponents.csv and convergence.png.
"""

import io
import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import AfterValidator, Field
from scipy import stats

import sobirl_tabular as sobirl
from benchmark.studies import study

COLUMNS = ("setting", "problem", "seed", "iterations", "samples", "average_squared_norm")
SETTINGS = {  # the theorem's exponents
    "7.4 M-SoBiRL": {"iterations": -1},
    "7.6 SoBiRL": {"iterations": -1},
    "7.7 Stoc-SoBiRL, 16 tuples": {"iterations": -2 / 3, "samples": -2 / 3},
    "7.7 Stoc-SoBiRL, growing tuples": {"iterations": -2 / 3, "samples": -2 / 7},
}
Rung = Annotated[int, Field(ge=2, le=10**6)]
Iterations = Annotated[int, Field(ge=4, le=10**6)]  # fewer have no two doublings


def ascending(ladder: tuple[int, ...]) -> tuple[int, ...]:
    """The ladder; raises ValueError unless each rung is above the one before."""
    if list(ladder) != sorted(set(ladder)) or len(ladder) < 2:
        raise ValueError("it must be two numbers or more, each above the one before")
    return ladder


class Args(study.Args):
    """How long the runs are."""

    tracking_iterations: Iterations = 8192
    """K of M-SoBiRL"""
    iterations: Iterations = 2048
    """K of SoBiRL"""
    stochastic_iterations: Iterations = 1024
    """K of Stoc-SoBiRL with 16 tuples"""
    ladder: Annotated[tuple[Rung, ...], AfterValidator(ascending)] = (64, 128, 256, 512)
    """K of the runs with growing tuples; the first one has 4 tuples"""
    instances: Annotated[int, Field(ge=2, le=1000)] = 10
    """instances of each problem"""
    seed: study.Seed = 1
    """seed of the first instance"""


def run(
    setting: str, problem: str, method: str, args: Args, iterations: int, tuples: int = 0
) -> list[study.Row]:
    """Rows of curves.csv: a run of K iterations, its rollouts so long that gamma^T is below 1/K."""
    length = math.ceil(math.log(iterations) / -math.log(sobirl.PROBLEMS[problem].gamma))
    sizes = {"tuples": tuples, "rollout_length": length} if tuples else {}
    given = sobirl.Args(seed=args.seed, instances=args.instances, iterations=iterations, **sizes)
    *_, state = sobirl.follow(problem, method, given, None)
    rows = [row | {"setting": setting, "iterations": row["iteration"] + 1} for row in state["rows"]]
    return [{column: row.get(column, row["iterations"] * tuples) for column in COLUMNS} for row in rows]


def curves(args: Args) -> list[study.Row]:
    """Rows of curves.csv for all settings and problems."""
    rows, (m_sobirl, exact, fixed, growing) = [], SETTINGS
    for problem in sobirl.PROBLEMS:
        rows += run(m_sobirl, problem, "m-sobirl", args, args.tracking_iterations)
        rows += run(exact, problem, "sobirl", args, args.iterations)
        if sobirl.applies("stoc-sobirl", problem):
            rows += run(fixed, problem, "stoc-sobirl", args, args.stochastic_iterations, 16)
            for iterations in args.ladder:
                tuples = round(4 * (iterations / args.ladder[0]) ** (4 / 3))
                found = run(growing, problem, "stoc-sobirl", args, iterations, tuples)
                rows += [row for row in found if row["iterations"] == iterations]
    return rows


def exponents(rows: list[study.Row]) -> list[study.Row]:
    """Rows of exponents.csv: the slope of each setting, problem and column, beside the theorem's exponent."""
    found, norm = [], "average_squared_norm"
    for (setting, problem), mine in pd.DataFrame(rows).groupby(["setting", "problem"], sort=False):
        first = 0 if "growing" in setting else mine["iterations"].max() / 4
        fitted = mine[(mine["iterations"] >= first) & (mine[norm] > 0)]
        for against, theorem in SETTINGS[setting].items():
            runs = [run for _, run in fitted.groupby("seed")]
            slopes = [float(stats.linregress(np.log(run[against]), np.log(run[norm])).slope) for run in runs]
            low, high = stats.ttest_1samp(slopes, 0).confidence_interval()
            row = {"setting": setting, "problem": problem, "against": against, "theorem": theorem}
            row |= {"slope": float(np.mean(slopes)), "low": float(low), "high": float(high)}
            row |= {"median": float(np.median(slopes)), "smallest": min(slopes), "largest": max(slopes)}
            found.append(row | {"instances": len(slopes)})
    return found


def picture(rows: list[study.Row]) -> bytes:
    """One panel for each setting: the median over instances for each problem, and the theorem's slope."""
    figure, frame = Figure(figsize=(12, 3.4), layout="constrained"), pd.DataFrame(rows)
    for panel, (setting, theorem) in zip(figure.subplots(1, len(SETTINGS)), SETTINGS.items()):
        for i, problem in enumerate(sobirl.PROBLEMS):
            mine = frame[(frame["setting"] == setting) & (frame["problem"] == problem)]
            if len(mine):
                median = mine.groupby("iterations")["average_squared_norm"].median()
                panel.plot(median.index, median, color=f"C{i}", label=problem)
        line = (median.index / median.index[0]) ** theorem["iterations"]
        panel.plot(median.index, line, color="black", linestyle=":", label="the theorem's slope")
        panel.set(title=setting, xlabel="outer iterations K", xscale="log", yscale="log")
        panel.title.set_size(9)
        panel.tick_params(axis="x", which="minor", labelbottom=False)
    figure.axes[0].set_ylabel("mean of $|\\nabla\\Phi(x_k)|^2$, k < K")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=7, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    return png.getvalue()


def measure(args: Args) -> Iterator[tuple[str, list[study.Row] | bytes]]:
    """What was fitted, the slopes and the figure."""
    torch.set_num_threads(1)
    rows = curves(args)
    yield "curves", rows
    yield "exponents", exponents(rows)
    yield "convergence.png", picture(rows)


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
