"""Choose arguments of methods: the search that a suite's table `tune` describes (docs/benchmark.md).

Every method of `tune.space` gets `trials` trials, points of its own space, and one at each point of `more`:
the same budget. A trial is run on `tune.seeds`, which no method of the suite has, and on the method's
environments, by the launcher and in a folder as any job has (`RUN_DIR/tune/SUITE/`): a search goes on where it
was stopped. With `halving`, seed after seed only the best 1/halving of a method's trials goes on. In the
results' folder `tune/SUITE/`:

    trials.csv              one row a trial, the winners first: what it changes, its seeds, its return on each
                            environment (mean over seeds), and what the rule compares
    curves.csv, runs.json   of all runs, as of a suite
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from benchmark.collect import collect
from benchmark.data import Results, load_results
from benchmark.machine import write_atomically
from benchmark.scores import returns, scores
from benchmark.suites import BadSuite, Range, Suite

Trials = dict[str, dict]  # METHOD-t1, the name of a trial -> the arguments that it changes


def trials_of(suite: Suite) -> Trials:
    """The trials of every tuned method, the same at every call. Raises BadSuite for a grid of too few points."""
    found, number = {}, suite.tune.trials
    for method, space in suite.tune.space.items():
        random = np.random.default_rng(0)
        if any(isinstance(values, Range) for values in space.values()):
            drawn = [{name: draw(values, random) for name, values in space.items()} for _ in range(number)]
        else:
            grid = [dict(zip(space, values)) for values in itertools.product(*space.values())]
            if len(grid) < number:
                few = f"tune.space.{method} has {len(grid)} points, fewer than tune.trials = {number}"
                raise BadSuite(f"{suite.path.name}: {few}; all methods get the same number of trials")
            drawn = [grid[index] for index in sorted(random.permutation(len(grid))[:number])]
        found |= {f"{method}-t{index}": point for index, point in enumerate([*drawn, *suite.tune.more], 1)}
    return found


def draw(values, random: np.random.Generator):
    """One of the values, or a number of the range, to four digits."""
    if not isinstance(values, Range):
        return values[random.integers(len(values))]
    ends = (math.log(values.low), math.log(values.high)) if values.log else (values.low, values.high)
    number = random.uniform(*ends)
    number = math.exp(number) if values.log else number
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    return round(number) if whole else float(f"{number:.4g}")


def method_of(trial: str) -> str:
    """The method that a trial is one of."""
    return trial.rpartition("-t")[0]


def as_suite(suite: Suite, trials: Trials, seeds: dict[str, tuple[int, ...]]) -> Suite:
    """The trials that have seeds, as the methods of a suite of the same name."""
    methods = {}
    for trial in seeds:
        method, point = suite.methods[method_of(trial)], trials[trial]
        own = {task: arguments | point for task, arguments in method.by_environment.items()}
        changed = {
            "name": trial,
            "label": trial,
            "arguments": method.arguments | point,
            "by_environment": own,
        }
        methods[trial] = method.model_copy(update=changed | {"seeds": seeds[trial], "runs_of": None})
    bare = {"claims": (), "baselines": (), "figures": (), "dead": None, "tune": None, "methods": methods}
    return suite.model_copy(update=bare)


def search(suite: Suite, run_dir: Path, results: Path, launch: Callable, allow_mixed: bool = False) -> int:
    """Run the search, by `launch(suite, run_dir)`, and tell the winners; its exit status if it is not 0."""
    trials, seeds, halving = trials_of(suite), suite.tune.seeds, suite.tune.halving
    made, alive = dict.fromkeys(trials, ()), list(trials)
    left = suite.tune.trials + len(suite.tune.more)  # of each method
    for rung in [(seed,) for seed in seeds] if halving else [seeds]:
        status = launch(as_suite(suite, trials, dict.fromkeys(alive, rung)), run_dir / "tune")
        if status:
            return status
        made |= {trial: (*made[trial], *rung) for trial in alive}
        searched = as_suite(suite, trials, made)
        collect(searched, run_dir / "tune", results / "tune" / suite.name, allow_mixed)
        table = judged(suite, searched, load_results(searched, results / "tune"))
        left = math.ceil(left / (halving or 1))
        best = set(table.groupby("method").head(left)["trial"])
        alive = [trial for trial in alive if trial in best]
    changes = pd.DataFrame.from_dict(trials, orient="index").loc[table["trial"]].reset_index(drop=True)
    path = results / "tune" / suite.name / "trials.csv"
    table = pd.concat([table[["method", "trial"]], changes, table.drop(columns=["method", "trial"])], axis=1)
    write_atomically(
        path, lambda new: table.to_csv(new, index=False, lineterminator="\n", float_format="%.6g")
    )
    print(f"{len(table)} trials in {path}")
    for _, row in table.groupby("method", sort=False).head(1).iterrows():
        words = ", ".join(f"{name} = {toml(value)}" for name, value in trials[row["trial"]].items())
        print(f"{row['method']}: {row['trial']} wins by {suite.tune.rule}: arguments = {{ {words} }}")
    return 0


def toml(value) -> str:
    """A value as a suite file has it."""
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f'"{value}"'
        if isinstance(value, str)
        else str(value)
    )


def judged(suite: Suite, searched: Suite, results: Results) -> pd.DataFrame:
    """A row a trial, method by method, best first by the suite's rule; those that had more seeds before others."""
    rows = []
    for trial, method in searched.methods.items():
        tasks, over = method.environments, suite.tune.over
        row = {"method": method_of(trial), "trial": trial, "seeds": len(method.seeds)}
        row |= {task: returns(results, trial, task, over).mean() for task in tasks}
        rows.append(
            row | {"score": np.mean([scores(searched, results, trial, task, over).mean() for task in tasks])}
        )
    table = pd.DataFrame(rows)
    tasks = [name for name in table if name in suite.environments]
    table["rank"] = table.groupby(["method", "seeds"])[tasks].rank(ascending=False).mean(axis=1)
    table["place"] = table["method"].map(list(suite.tune.space).index)
    rule, ascending = (
        (["score"], [False]) if suite.tune.rule == "score" else (["rank", "score"], [True, False])
    )
    table = table.sort_values(["place", "seeds", *rule], ascending=[True, False, *ascending], kind="stable")
    return table.drop(columns="place").reset_index(drop=True)
