"""The numbers that page, figures and studies take from a suite's results."""

import math

import numpy as np
import pandas as pd

from benchmark.data import Results
from benchmark.reference import load_reference, normalise
from benchmark.statistics import Comparison, compare
from benchmark.suites import EVALUATION, Claim, Suite

COLLAPSED = 0.1  # of its peak: a run that ends below has collapsed
OVER = {"end": "", "training": ", training", "evaluation": ", evaluation"}  # what returns are of, in words


def returns(results: Results, method: str, environment: str, over: str = "end") -> pd.Series:
    """A method's returns on an environment by seed, of the runs that have one: over the last tenth of the
    steps; over "training" the mean of the curve; in "evaluation" of the most probable actions, over the last
    tenth of the grid."""
    runs = results.of(method, environment).set_index("seed")
    values = runs["final_return"]
    if over == "training":
        values = results.curves_of(method, environment).mean()
    elif over == "evaluation" and EVALUATION in results.curves:
        curves = results.curves_of(method, environment, EVALUATION)
        last = curves.tail(max(1, len(curves) // 10)).mean()
        values = last.reindex(runs.index).where(~runs["diverged"], values)  # as the random policy's
    elif over == "evaluation":
        values = values * math.nan
    return values.replace([math.inf, -math.inf], math.nan).dropna()


def levels(suite: Suite, environment: str) -> tuple[float, float] | None:
    """The returns of score 0 and 1, by the kind of the suite's algorithm: its first method's script."""
    if environment not in load_reference():
        return None
    entry = load_reference()[environment]
    script = next(iter(suite.methods.values())).script
    return entry["random"], entry.get("by_script", {}).get(script, entry)["reference"]


def scores(suite: Suite, results: Results, method: str, environment: str, over: str = "end") -> np.ndarray:
    """The returns as scores: 0 a random policy's or worse, 1 the reference level."""
    return normalise(returns(results, method, environment, over).to_numpy(), *levels(suite, environment))


def collapses(suite: Suite, results: Results, method: str, environment: str) -> tuple[int, int]:
    """How many runs end below a tenth of their peak, as scores, and of how many: of those whose peak is above
    a tenth of the reference level."""
    final = returns(results, method, environment)
    peaks = results.curves_of(method, environment)[final.index].max()
    final, peaks = (normalise(each.to_numpy(), *levels(suite, environment)) for each in (final, peaks))
    began = peaks > COLLAPSED
    return int(((final < COLLAPSED * peaks) & began).sum()), int(began.sum())


def log_times(results: Results, method: str, baseline: str, environment: str) -> np.ndarray:
    """Logarithms of the ratios of wall-clock time, method over baseline, of runs with the same seed."""
    mine, base = (
        results.of(name, environment).set_index("seed")["wall_time_s"] for name in (method, baseline)
    )
    return np.log((mine / base).dropna().to_numpy(dtype=float))


def shared_environments(suite: Suite, *methods: str) -> list[str]:
    """The environments on which the suite runs all of these methods."""
    return [
        each
        for each in suite.environments
        if all(each in suite.methods[name].environments for name in methods)
    ]


class Comparisons:
    """The comparisons of a suite's methods; each pair is computed once, the other direction has its sign
    turned."""

    def __init__(self, suite: Suite, results: Results) -> None:
        self.suite, self.results = suite, results
        self.known: dict[tuple, Comparison | None] = {}

    def environments(self, claim: Claim) -> list[str]:
        """Those of which both methods have runs; for returns, with levels to score with."""
        pair = claim.better, claim.than
        shared = [each for each in shared_environments(self.suite, *pair) if self.have_runs(each, *pair)]
        return [each for each in shared if claim.measure == "time" or levels(self.suite, each)]

    def have_runs(self, environment: str, *methods: str) -> bool:
        """Whether each of these methods has a run on the environment, so that a suite may grow task by task."""
        return all(len(self.results.of(name, environment)) for name in methods)

    def of(self, claim: Claim, environment: str | None = None) -> Comparison | None:
        """The claim's comparison over all its environments, or on one; None without runs to compare.

        Of returns the difference of scores, of times the logarithm of the ratio.
        """
        pair = sorted((claim.better, claim.than), key=list(self.suite.methods).index)
        environments = self.environments(claim) if environment is None else [environment]
        key = (*pair, claim.measure == "time", claim.over, *environments)
        if key not in self.known:
            if claim.measure == "time":
                tasks = [(log_times(self.results, *pair, each),) for each in environments]
            else:
                words = self.suite, self.results
                tasks = [
                    tuple(scores(*words, name, each, claim.over) for name in pair) for each in environments
                ]
            self.known[key] = compare(tasks)
        found = self.known[key]
        return found if found is None or pair[0] == claim.better else -found
