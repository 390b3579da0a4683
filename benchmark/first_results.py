"""The first results: PPO's published levels, and BLPO beside PPO and the nested control.

    python -m benchmark.first_results run        launch what is missing, two single-threaded runs at a time (hours)
    python -m benchmark.first_results collect    run folders -> benchmark/results/first/*.csv
    python -m benchmark.first_results report     those csv files -> tables and figure

Two suites. `levels`: PPO at its defaults, 1M steps, seeds 6-10, against the level that CleanRL publishes for its
`ppo_continuous_action`. `confirm`: BLPO, the nested control (`--ihvp none`) and PPO, each at its defaults, 300k steps,
seeds 11-13. Neither's seeds were used for any choice.

The rule of `confirm`, written before its runs: BLPO's default stays unless its mean final return is below the nested
control's on two of the three tasks with an interval of the difference that excludes 0.
A final return is the mean over the episodes that end in the last 10 % of the steps; intervals are Welch's, 95 %.
"""

import csv
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import scipy.stats
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "first"
TASKS = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4")
PUBLISHED = {"Hopper-v4": (2383, 272), "HalfCheetah-v4": (1443, 46), "Walker2d-v4": (2288, 572)}  # CleanRL, 3 seeds
COLOURS = {"ppo": "#0072B2", "nested": "#E69F00", "blpo": "#009E73"}  # Okabe and Ito, safe for colour-blind readers
LABELS = {"ppo": "PPO", "nested": "nested control", "blpo": "BLPO"}
GRID = 10_000  # steps between two points of a curve


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["run", "collect", "report"]]
    """what to do"""
    run_dir: Path = ROOT / "runs" / "first"
    """where the run folders are"""
    workers: int = 2
    """runs at a time, in [1, inf)"""


def jobs() -> list[tuple[str, str, str, int, list[str]]]:
    """(suite, method, task, seed, command line) of every run."""
    listed = []
    for task in TASKS:
        for seed in range(6, 11):
            listed.append(("levels", "ppo", task, seed, ["ppo_continuous.py"]))
        for seed in range(11, 14):
            steps = ["--total-timesteps", "300000"]
            listed.append(("confirm", "blpo", task, seed, ["blpo_continuous.py", *steps]))
            listed.append(("confirm", "nested", task, seed, ["blpo_continuous.py", *steps, "--ihvp", "none"]))
            listed.append(("confirm", "ppo", task, seed, ["ppo_continuous.py", *steps]))
    return [
        (suite, method, task, seed, [*words, "--env-id", task, "--seed", str(seed), "--exp-name", method])
        for suite, method, task, seed, words in listed
    ]


def finished_folder(run_dir: Path, suite: str, method: str, task: str, seed: int) -> Path | None:
    """The folder of a finished run, if there is one."""
    for folder in sorted((run_dir / suite).glob(f"{task}__{method}__{seed}__*")):
        result = folder / "result.json"
        if result.exists() and json.loads(result.read_text())["status"] == "finished":
            return folder
    return None


def run(args: Args) -> None:
    """Launch every run that has not finished, one core each."""

    def launch(job):
        suite, method, task, seed, words = job
        if finished_folder(args.run_dir, suite, method, task, seed) is None:
            print("start", suite, method, task, seed, flush=True)
            more = ["--env-threads", "1", "--run-dir", str(args.run_dir / suite)]
            subprocess.run([sys.executable, *words, *more], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(launch, jobs()))


def collect(args: Args) -> None:
    """One csv a suite: the mean return of the episodes that ended in each 10,000 steps; and where the runs came from."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows, provenance, missing = {"levels": [], "confirm": []}, [], []
    for suite, method, task, seed, words in jobs():
        folder = finished_folder(args.run_dir, suite, method, task, seed)
        if folder is None:
            missing.append(f"{suite} {method} {task} {seed}")
            continue
        made, result = (json.loads((folder / name).read_text()) for name in ("args.json", "result.json"))
        provenance.append({
            "suite": suite, "method": method, "task": task, "seed": seed, "command": " ".join(["python", *words]),
            "commit": made["commit"], "dirty": made["dirty"], "versions": made["versions"], "cpu": made["cpu"],
            "final_return": result["final_return"], "wall_time_s": result["wall_time_s"],
        })  # fmt: skip
        with open(folder / "episodes.csv") as file:
            episodes = [(int(e["global_step"]), float(e["episodic_return"])) for e in csv.DictReader(file)]
        for start in range(0, made["args"]["total_timesteps"], GRID):
            returns = [value for step, value in episodes if start < step <= start + GRID]
            if returns:
                rows[suite].append((method, task, seed, start + GRID, round(float(np.mean(returns)), 2), len(returns)))
    for suite, lines in rows.items():
        with open(RESULTS / f"{suite}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("method", "task", "seed", "global_step", "return", "episodes"), *lines])
    (RESULTS / "runs.json").write_text(json.dumps({"runs": provenance, "missing": missing}, indent=1) + "\n")
    print(f"{len(provenance)} runs collected; missing: {', '.join(missing) or 'none'}")


def difference(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Mean difference a - b and Welch's 95 % interval."""
    interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return float(np.mean(a) - np.mean(b)), float(interval.low), float(interval.high)


def report(args: Args) -> None:
    """Tables in Markdown and the figure of both suites, from the committed files alone."""
    saved = json.loads((RESULTS / "runs.json").read_text())
    finals: dict[tuple, list[float]] = {}
    times: dict[tuple, list[float]] = {}
    for made in saved["runs"]:
        key = made["suite"], made["method"], made["task"]
        finals.setdefault(key, []).append(made["final_return"])
        times.setdefault(key, []).append(made["wall_time_s"])
    lines = ["PPO at its defaults, 1M steps, mean ± standard deviation of the final return over seeds", ""]
    lines += ["| task | ours | n | published (CleanRL, n = 3) | published mean - 1 sd | reached |", "|---|---|---|---|---|---|"]
    for task in TASKS:
        values, (mean, deviation) = finals.get(("levels", "ppo", task), []), PUBLISHED[task]
        if len(values) > 1:
            reached = "yes" if np.mean(values) >= mean - deviation else "no"
            ours = f"{np.mean(values):.0f} ± {np.std(values, ddof=1):.0f}"
            lines.append(f"| {task} | {ours} | {len(values)} | {mean} ± {deviation} | {mean - deviation} | {reached} |")
    lines += ["", "300k steps, seeds 11-13: final return, mean ± standard deviation (n), and differences with Welch's 95 % interval", ""]
    lines += ["| task | PPO | nested control | BLPO | BLPO - nested | BLPO - PPO |", "|---|---|---|---|---|---|"]
    for task in TASKS:
        values = {method: finals.get(("confirm", method, task), []) for method in LABELS}
        if min(map(len, values.values())) < 2:
            continue
        cells = [f"{np.mean(v):.0f} ± {np.std(v, ddof=1):.0f} ({len(v)})" for v in values.values()]
        for other in ("nested", "ppo"):
            mean, low, high = difference(values["blpo"], values[other])
            cells.append(f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    lines += ["", "Median wall-clock seconds of the same runs (one core each, two at a time, other work on the machine)", ""]
    lines += ["| task | PPO | nested control | BLPO |", "|---|---|---|---|"]
    for task in TASKS:
        cells = [times.get(("confirm", method, task), [math.nan]) for method in LABELS]
        lines.append(f"| {task} | " + " | ".join(f"{np.median(cell):.0f}" for cell in cells) + " |")
    commits = sorted({made["commit"][:10] + ("+" if made["dirty"] else "") for made in saved["runs"]})
    cpus = sorted({made["cpu"] for made in saved["runs"]})
    lines += ["", f"Commits {', '.join(commits)}; {', '.join(cpus)}, 2 cores. Missing runs: {', '.join(saved['missing']) or 'none'}."]
    (RESULTS / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6))
    for row, suite in enumerate(("confirm", "levels")):
        with open(RESULTS / f"{suite}.csv") as file:
            points = list(csv.DictReader(file))
        for axis, task in zip(axes[row], TASKS):
            for method in LABELS:
                curves: dict[int, list[float]] = {}
                for point in points:
                    if (point["method"], point["task"]) == (method, task):
                        curves.setdefault(int(point["global_step"]), []).append(float(point["return"]))
                if not curves:
                    continue
                steps = sorted(curves)
                n = max(len(curves[step]) for step in steps)
                mean = np.array([np.mean(curves[step]) for step in steps])
                low, high = (np.array([pick(curves[step]) for step in steps]) for pick in (min, max))
                axis.plot(steps, mean, color=COLOURS[method], label=f"{LABELS[method]} (n={n})", linewidth=1.3)
                axis.fill_between(steps, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
            if suite == "levels":
                mean, deviation = PUBLISHED[task]
                axis.axhspan(mean - deviation, mean + deviation, color="0.85", label="CleanRL, published", zorder=0)
            axis.set_title(task, fontsize=10)
            axis.set_xlabel("environment steps")
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M")
        axes[row][0].set_ylabel("episodic return")
        axes[row][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "first_results.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    {"run": run, "collect": collect, "report": report}[arguments.command](arguments)
