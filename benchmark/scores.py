"""What is committed of a suite's runs (`benchmark/results/SUITE/runs.json` and one csv a run), and the numbers that tables, verdicts
and figures take from it: final returns, returns over training, normalised scores, ratios of time.
"""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmark import statistics
from benchmark.reference import load_reference, normalise
from benchmark.suites import EVALUATION, Job, Suite, same_run


@dataclass(frozen=True)
class Results:
    """What is committed of a suite's runs."""

    runs: dict[tuple[str, str], list[dict]]
    """(method, environment) -> its entries of runs.json, by seed; those of jobs the suite has; wall_time_s None if untimed"""
    curves: dict[str, dict[str, np.ndarray]]
    """job -> columns global_step, wall_time_s, episodic_return and diagnostics, each (grid points,); nan where there is no value"""
    missing: list[str]
    """jobs of the suite without a run, in the suite's order"""
    failed: list[str]
    """those of the missing jobs that ended with an error"""
    mixed: list[str]
    """what keeps the runs from one table, though they were collected together; each a phrase"""
    ignored: list[str]
    """runs whose job the suite does not have any more"""
    diverged: list[str]
    """jobs whose parameters were not finite at the end; they count with the random policy's return, where that is known"""
    dead: list[str] = field(default_factory=list)
    """jobs that had stopped learning by the suite's own measure (Suite.dead); they count as they are"""

    def without(self, names: Iterable[str]) -> "Results":
        """The same with the runs of these jobs left out."""
        left = set(names)
        runs = {key: [run for run in group if run["job"] not in left] for key, group in self.runs.items()}
        return replace(self, runs=runs, dead=[name for name in self.dead if name not in left])


# ---- Reading ---------------------------------------------------------------------------------------------------
def load_results(suite: Suite, results: Path) -> Results:
    """Read `results/SUITE/`; without that folder every job is missing."""
    content = read_runs(results / suite.name)
    made = {run["job"]: run for run in content["runs"]}
    runs: dict[tuple[str, str], list[dict]] = {}
    curves, missing, diverged, levels = {}, [], [], load_reference()
    for job in suite.shown():  # by seed
        run, path = made.pop(job.name, None), results / suite.name / f"{job.name}.csv"
        if suite.methods[job.method].runs_of is not None:
            run, path = from_another_suite(suite, job, results)
        if run is not None:
            if run.get("diverged"):
                diverged.append(job.name)
                run["final_return"] = levels.get(job.environment, {}).get("random")
            if suite.methods[job.method].untimed:
                run["wall_time_s"] = None
            runs.setdefault((job.method, job.environment), []).append(run)
            curves[job.name] = load_curve(path, run["final_return"] if run.get("diverged") else None)
        else:
            missing.append(job.name)
    failed = [name for name in missing if name in content.get("failed", [])]
    dead = [name for name in curves if is_dead(suite, curves[name])]
    return Results(runs, curves, missing, failed, content.get("mixed", []), sorted(made), diverged, dead)


def read_runs(folder: Path) -> dict:
    """The content of a suite's runs.json; without that file one of no runs."""
    path = folder / "runs.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def from_another_suite(suite: Suite, job: Job, results: Path) -> tuple[dict | None, Path]:
    """The entry, under the job's own name, and the csv file of the run of another suite's method that is this job's; None if
    it has not been collected, or was made by another command."""
    source, method = suite.methods[job.method].runs_of
    name = replace(job, suite=source, method=method).name
    path = results / source / f"{name}.csv"
    for run in read_runs(path.parent)["runs"]:
        if run["job"] == name and same_run(job.command, run["command"].split()[1:], suite.restated):
            return run | {"job": job.name, "method": job.method}, path
    return None, path


def is_dead(suite: Suite, curve: dict[str, np.ndarray]) -> bool:
    """Whether a run had stopped learning, by the suite's measure; without one, or without a finite value of it, it had not."""
    if suite.dead is None or suite.dead.column not in curve:
        return False
    values = curve[suite.dead.column]
    values = values[-max(1, len(values) // 10) :]
    values = values[np.isfinite(values)]
    return len(values) > 0 and float(values.mean()) < suite.dead.below


def load_curve(path: Path, diverged_to: float | None = None) -> dict[str, np.ndarray]:
    """The columns of one run, its curve with bins without the end of an episode filled with the value before them.

    With `diverged_to` the bins after the last finite return have that value.
    """
    with open(path) as file:
        rows = list(csv.DictReader(file))
    columns = {}
    for name in rows[0]:
        columns[name] = np.array([float(row[name]) if row[name] else math.nan for row in rows])
    values = columns["episodic_return"]
    last = np.maximum.accumulate(np.where(np.isnan(values), -1, np.arange(len(values))))
    columns["episodic_return"] = np.where(last < 0, math.nan, values[last])
    if diverged_to is not None:
        columns["episodic_return"][last.max(initial=0) + 1 :] = diverged_to
    return columns


# ---- Numbers ---------------------------------------------------------------------------------------------------
def final_returns(results: Results, method: str, environment: str) -> np.ndarray:
    """Final returns (n,) of the runs that have one: no episode may have ended in the last tenth of a run."""
    values = [run["final_return"] for run in results.runs.get((method, environment), [])]
    return np.array([value for value in values if value is not None and math.isfinite(value)])


def training_returns(results: Results, method: str, environment: str) -> np.ndarray:
    """Returns (n,), each the mean of a run's curve over all its steps, from its first episode's end on: how fast it learned."""
    curves = [results.curves[run["job"]]["episodic_return"] for run in results.runs.get((method, environment), [])]
    return np.array([np.nanmean(curve) for curve in curves if not np.isnan(curve).all()])


def evaluation_returns(results: Results, method: str, environment: str) -> np.ndarray:
    """Returns (n,) of the most probable actions: the mean of `charts/eval_return` over the last tenth of the grid, for runs that
    have a value there. A run that diverged counts with the random policy's return, as in `final_returns`."""
    values = []
    for run in results.runs.get((method, environment), []):
        curve = results.curves[run["job"]].get(EVALUATION, np.full(1, math.nan))
        last = curve[-max(1, len(curve) // 10) :]
        last = last[np.isfinite(last)]
        value = float(last.mean()) if len(last) else math.nan
        values.append(run["final_return"] if run.get("diverged") else value)
    return np.array([value for value in values if value is not None and math.isfinite(value)])


def compared_environments(suite: Suite) -> list[str]:
    """The environments of at least two methods (of the only one, if the suite has one): only those can be pooled."""
    least = min(2, len(suite.methods))
    methods = suite.methods.values()
    return [each for each in suite.environments if sum(each in method.environments for method in methods) >= least]


def pooled_methods(suite: Suite, results: Results) -> list[str]:
    """The methods with a final return on every compared environment: an aggregate over fewer would be of other tasks."""
    environments = compared_environments(suite)
    return [name for name in suite.methods if all(len(final_returns(results, name, each)) for each in environments)]


def is_aggregated(suite: Suite) -> bool:
    """Whether tables and figures pool the environments; for that each of them needs levels in reference.json."""
    pooled = compared_environments(suite)
    return suite.aggregate and len(pooled) > 1 and set(pooled) <= load_reference().keys()


def normalised_scores(results: Results, method: str, environments: list[str], levels: dict) -> list[np.ndarray]:
    """Normalised final returns, one array (runs,) an environment."""
    return [normalise(each, final_returns(results, method, each), levels) for each in environments]


def time_pairs(results: Results, method: str, baseline: str, environment: str) -> np.ndarray:
    """Ratios (pairs,) of wall-clock time, method over baseline, of the runs with the same environment and seed."""
    base, mine = (
        {run["seed"]: run["wall_time_s"] for run in results.runs.get((each, environment), []) if run["wall_time_s"] is not None}
        for each in (baseline, method)
    )
    return np.array([mine[seed] / base[seed] for seed in mine if seed in base])


def time_ratio(ratios: list[np.ndarray]) -> statistics.Interval:
    """Geometric mean with interval of ratios, one array (pairs,) an environment; every environment weighs the same."""
    interval = statistics.stratified_bootstrap(statistics.mean, [np.log(each) for each in ratios])
    return statistics.Interval(*(math.exp(value) for value in interval))


def count(numbers: list[int]) -> str:
    """n=5, or n=3-5 where it differs."""
    return f"n={min(numbers)}" if min(numbers) == max(numbers) else f"n={min(numbers)}-{max(numbers)}"
