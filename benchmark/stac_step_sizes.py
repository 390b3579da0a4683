"""The step sizes of stac_mujoco, chosen by the rule that stac_mujoco_tune states in its description.

    python -m benchmark run stac_mujoco_tune && python -m benchmark collect stac_mujoco_tune
    python -m benchmark.stac_step_sizes          # prints the table; its first row is the choice

The rule: on each task the methods are ranked by their final return, mean over the seeds, a run that diverged counting with the
random policy's; the best mean rank over the tasks wins, and of equal mean ranks the higher mean normalised return.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from benchmark.markdown import table
from benchmark.reference import load_reference, normalise
from benchmark.scores import Results, final_returns, load_results
from benchmark.suites import RESULTS, Suite, load_suite


class Place(NamedTuple):
    """A method in the order of the rule."""

    method: str
    mean_rank: float
    mean_score: float
    """normalised final return, mean over the tasks"""
    ranks: tuple[float, ...]
    """on each task; methods of equal return share the mean of their places"""


def places(suite: Suite, results: Results) -> list[Place]:
    """All methods of the suite, the best first. Raises ValueError if a run is missing: a choice among some of them is none."""
    if results.missing:
        raise ValueError(f"{len(results.missing)} runs of {suite.name} are missing, such as {results.missing[0]}; run and collect them first")
    methods, levels = list(suite.methods), load_reference()
    returns = np.array([[final_returns(results, name, task).mean() for task in suite.environments] for name in methods])
    ranks = rankdata(-returns, axis=0)
    scores = np.stack([normalise(task, column, levels) for task, column in zip(suite.environments, returns.T)], 1)
    order = sorted(range(len(methods)), key=lambda i: (ranks[i].mean(), -scores[i].mean()))
    return [Place(methods[i], float(ranks[i].mean()), float(scores[i].mean()), tuple(ranks[i].tolist())) for i in order]


def main(results: Path = RESULTS) -> int:
    """Print the table; exit status 2 with one sentence where runs are missing."""
    suite = load_suite("stac_mujoco_tune", check=False)
    try:
        ordered = places(suite, load_results(suite, results))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [
        [suite.methods[each.method].label, f"{each.mean_rank:.2f}", f"{each.mean_score:.3f}", *(f"{rank:g}" for rank in each.ranks)]
        for each in ordered
    ]
    print("\n".join(table(["method", "mean rank", "mean normalised return", *suite.environments], rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
