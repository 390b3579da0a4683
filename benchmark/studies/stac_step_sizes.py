"""The step sizes of stac_mujoco, chosen by the rule that stac_mujoco_tune states in its description.

    python -m benchmark run stac_mujoco_tune && python -m benchmark collect stac_mujoco_tune
    python -m benchmark.studies.stac_step_sizes          # prints the table; its first row is the choice

The rule: on each task the methods are ranked by their final return, mean over the seeds, a run that diverged
counting with the random policy's; the best mean rank over the tasks wins, and of equal mean ranks the higher
mean normalised return.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from benchmark.data import Results, load_results
from benchmark.scores import returns, scores
from benchmark.studies import study
from benchmark.suites import RESULTS, Suite, load_suite


class Args(study.Args):
    """Where the runs are."""

    results: Path = RESULTS
    """folder of the suites' collected results"""


def ranking(suite: Suite, results: Results) -> list[study.Row]:
    """All methods of the suite with their ranks, the best first. Raises BadInput if a run is missing."""
    if results.missing:
        missing = f"{len(results.missing)} runs of {suite.name} are missing, such as {results.missing[0]}"
        raise study.BadInput(f"{missing}; run and collect them first")

    def means(values) -> pd.DataFrame:
        names = suite.methods
        return pd.DataFrame({task: [values(results, name, task).mean() for name in names] for task in tasks})

    tasks, order = suite.environments, ["mean rank", "mean normalised return"]
    ranks = means(returns).rank(ascending=False)
    first = {"method": [method.label for method in suite.methods.values()], "mean rank": ranks.mean(axis=1)}
    first["mean normalised return"] = means(partial(scores, suite)).mean(axis=1)
    table = pd.DataFrame(first).join(ranks).sort_values(order, ascending=[True, False])
    return table.to_dict("records")


def measure(args: Args) -> Iterator[tuple[str, list[study.Row]]]:
    """The ranking."""
    suite = load_suite("stac_mujoco_tune", check=False)
    yield suite.name, ranking(suite, load_results(suite, args.results))


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
