"""The convergence exponents of SoBiRL's theorems, measured on the random instances of sobirl_tabular.py.

    python -m benchmark.sobirl_convergence --results-dir benchmark/results/sobirl_convergence

The theorems bound the mean of |grad Phi(x_k)|^2 over k < K:
  7.4  M-SoBiRL, constant step sizes and N    O(1/K)
  7.6  SoBiRL                                 O(1/K) + O(epsilon)
  7.7  Stoc-SoBiRL                            O~(K^(-2/3)); O~(samples^(-2/7)) with K^(4/3) tuples an iteration
What is fitted is the slope of the logarithm of that mean against the logarithm of K, by least squares over the last two
doublings of one run; for Theorem 7.7 with growing tuples over runs of K = 64 to 512. Each instance has a slope; the
interval is Student's 95 % interval of the mean over instances. A theorem is an upper bound: a steeper slope does not
contradict it. But a running mean cannot fall faster than 1/K for long, which is what it does once the gradient is 0.
Step sizes are the problems' own. Seven minutes on one core.

Writes exponents.csv, curves.csv (what was fitted), convergence.png and provenance.json.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from pydantic import PositiveInt
from scipy import stats

import sobirl_tabular as sobirl

COLUMNS = ("setting", "problem", "seed", "iterations", "samples", "average_squared_norm")
SETTINGS = {  # the theorem's exponents, against iterations and against samples
    "7.4 M-SoBiRL": (-1, None),
    "7.6 SoBiRL": (-1, None),
    "7.7 Stoc-SoBiRL, 16 tuples": (-2 / 3, -2 / 3),
    "7.7 Stoc-SoBiRL, growing tuples": (-2 / 3, -2 / 7),
}


class Args(sobirl.CheckedArgs):
    results_dir: Path
    """folder for the csv, json and png files"""
    tracking_iterations: PositiveInt = 8192
    """K of M-SoBiRL"""
    iterations: PositiveInt = 2048
    """K of SoBiRL"""
    stochastic_iterations: PositiveInt = 1024
    """K of Stoc-SoBiRL with 16 tuples"""
    ladder: tuple[PositiveInt, ...] = (64, 128, 256, 512)
    """K of the runs with growing tuples; the first one has 4 tuples"""
    instances: PositiveInt = 10
    """instances of each problem"""
    seed: int = 1
    """seed of the first instance"""


def measure(setting: str, name: str, method: str, args: Args, iterations: int, tuples: int = 0) -> list[dict]:
    """Rows of curves.csv: a run of K iterations, its rollouts so long that gamma^T is below 1/K."""
    length = math.ceil(math.log(iterations) / -math.log(sobirl.PROBLEMS[name].gamma))
    sizes = {"tuples": tuples, "rollout_length": length} if tuples else {}
    run = sobirl.Args(seed=args.seed, instances=args.instances, iterations=iterations, **sizes)
    *_, state = sobirl.follow(name, method, run, None)
    rows = [row | {"setting": setting, "iterations": row["iteration"] + 1} for row in state["rows"]]
    return [{column: row.get(column, row["iterations"] * tuples) for column in COLUMNS} for row in rows]


def curves(args: Args) -> list[dict]:
    """Rows of curves.csv for all settings and problems."""
    rows, (m_sobirl, exact, fixed, growing) = [], SETTINGS
    for name in sobirl.PROBLEMS:
        rows += measure(m_sobirl, name, "m-sobirl", args, args.tracking_iterations)
        rows += measure(exact, name, "sobirl", args, args.iterations)
        if sobirl.applies("stoc-sobirl", name):
            rows += measure(fixed, name, "stoc-sobirl", args, args.stochastic_iterations, 16)
            for iterations in args.ladder:
                tuples = round(4 * (iterations / args.ladder[0]) ** (4 / 3))
                found = measure(growing, name, "stoc-sobirl", args, iterations, tuples)
                rows += [row for row in found if row["iterations"] == iterations]
        print(name, flush=True)
    return rows


def slope(points: list[dict], against: str) -> float:
    """Least-squares slope of the logarithm of average_squared_norm against that of a column."""
    x, y = ([math.log(row[name]) for row in points] for name in (against, "average_squared_norm"))
    return float(stats.linregress(x, y).slope)


def exponents(rows: list[dict]) -> list[dict]:
    """Rows of exponents.csv: the slope of each setting, problem and column, beside the theorem's exponent."""
    found = []
    for setting, problem in dict.fromkeys((row["setting"], row["problem"]) for row in rows):
        mine = [row for row in rows if (row["setting"], row["problem"]) == (setting, problem)]
        last = max(row["iterations"] for row in mine)
        first = 0 if "growing" in setting else last / 4
        fitted = [row for row in mine if row["iterations"] >= first and row["average_squared_norm"] > 0]
        for against, theorem in zip(("iterations", "samples"), SETTINGS[setting]):
            if theorem is None:
                continue
            seeds = dict.fromkeys(row["seed"] for row in fitted)
            slopes = [slope([row for row in fitted if row["seed"] == seed], against) for seed in seeds]
            mean, error = sum(slopes) / len(slopes), stats.sem(slopes)
            low, high = stats.t.interval(0.95, len(slopes) - 1, mean, error) if error > 0 else (mean, mean)
            limits = {
                "low": low,
                "high": high,
                "median": statistics.median(slopes),
                "smallest": min(slopes),
                "largest": max(slopes),
            }
            label = {"setting": setting, "problem": problem, "against": against, "theorem": theorem}
            found.append(label | {"slope": mean} | limits | {"instances": len(slopes)})
    return found


def draw(rows: list[dict], path: Path) -> None:
    """One panel for each setting: the median over instances for each problem, and the theorem's slope."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for panel, (setting, (theorem, _)) in zip(figure.subplots(1, len(SETTINGS)), SETTINGS.items()):
        for i, problem in enumerate(sobirl.PROBLEMS):
            mine = [row for row in rows if (row["setting"], row["problem"]) == (setting, problem)]
            steps = sorted({row["iterations"] for row in mine})
            groups = [[row["average_squared_norm"] for row in mine if row["iterations"] == k] for k in steps]
            if groups:
                panel.plot(steps, [statistics.median(group) for group in groups], color=f"C{i}", label=problem)
        line = [(k / steps[0]) ** theorem for k in steps]
        panel.plot(steps, line, color="black", linestyle=":", label="the theorem's slope")
        panel.set(title=setting, xlabel="outer iterations K", xscale="log", yscale="log")
        panel.title.set_size(9)
        panel.tick_params(axis="x", which="minor", labelbottom=False)
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel("mean of $|\\nabla\\Phi(x_k)|^2$, k < K")
            handles = panel.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Measure, fit, write and print."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    args.results_dir.mkdir(parents=True, exist_ok=True)
    rows = curves(args)
    found = exponents(rows)
    sobirl.write_csv(args.results_dir / "curves.csv", rows)
    sobirl.write_csv(args.results_dir / "exponents.csv", found)
    draw(rows, args.results_dir / "convergence.png")
    made = sobirl.provenance() | {"script": "benchmark.sobirl_convergence", "args": args.model_dump(mode="json")}
    sobirl.write_json(args.results_dir / "provenance.json", made | {"seconds": time.perf_counter() - begun})
    for row in found:
        numbers = "{theorem:6.2f}  {slope:6.2f} [{low:.2f}, {high:.2f}]  from {smallest:.2f} to {largest:.2f}"
        print(f"{row['setting']:32} {row['problem']:20} {row['against']:10} {numbers.format(**row)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except sobirl.BadInput as error:
        sys.exit(f"error: {error}")
