"""The claims of a suite, judged by one rule from its committed results, for `docs/results.md`."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from benchmark import statistics
from benchmark.markdown import bracketed, jobs_in_words, listed, number, table
from benchmark.reference import load_reference, normalise
from benchmark.scores import Results, count, evaluation_returns, final_returns, time_pairs, time_ratio, training_returns
from benchmark.suites import Claim, Suite

MARGIN = 0.05  # normalised return that a method may lack and still be at least as good
LEAST = 5  # seeds below which nothing is said of returns

RULE = f"""A claim compares two methods, `better` and `than`, and is judged by one rule, the same in all suites:

- **return**: d is the mean over the environments of the difference in mean normalised final return, `better` minus `than`,
  with its 95 % stratified bootstrap interval [low, high] over seeds. The claim **holds** (at least as good, to a margin of
  {MARGIN:g}) if low >= -{MARGIN:g}, **does not hold** if high < -{MARGIN:g}, and is **undecided** otherwise, and always with fewer
  than {LEAST} seeds.
- **above**: the same d. An environment is *for* the claim if the 95 % interval of its own difference lies above 0, *against* it if
  below. The claim **holds** if low > 0 and no environment is against it, **does not hold** if high < 0 and none is for it, and is
  **undecided** otherwise, and always with fewer than {LEAST} seeds.
- **time**: the ratio of wall-clock time, `better` over `than`, geometric mean over the pairs of runs of the same environment
  and seed, with its 95 % bootstrap interval. The claim **holds** if high < 1, **does not hold** if low > 1, and is
  **undecided** otherwise.
- A claim "over training" takes the mean return over all steps, the height of the learning curve, in place of the final one; a claim
  "in evaluation" that of the evaluations in the last 10 % of the steps, with the policy's most probable actions.
- The environments are all those on which the suite runs both methods. With fewer than 2 seeds (for time: pairs) on one of them
  there is no interval, and the claim is undecided. Planned runs that are missing are named beside the verdict; if some of them
  failed, the claim is undecided, whatever the others say.
- A suite may have gates: bounds of what a method does, such as how many of its updates are the baseline's own. Beyond them nothing is
  claimed of it: its claims leave that environment out, which is said, and one that is left without any reads "nothing is claimed".
- A run that diverged (parameters not finite at its end) counts with the random policy's return, and is named.

Percentile bootstrap intervals of few seeds are too short: of two methods with normal scores they hold the true difference in
about 70 to 80 % of the cases at 2 seeds, 80 to 90 % at 3, 90 % at 5, instead of 95 %. Read verdicts at few seeds so. An interval
without width, such as a probability of 0.00 [0.00, 0.00], means that resampling these few runs changes nothing; it is no certainty."""


class Verdict(NamedTuple):
    """What the rule says of a claim, and on what grounds."""

    said: str
    evidence: str
    n: str
    missing: list[str]
    failed: list[str]  # of the missing


def shared_environments(suite: Suite, claim: Claim) -> list[str]:
    """The environments on which the suite runs both methods of a claim."""
    pair = suite.methods[claim.better], suite.methods[claim.than]
    return [each for each in suite.environments if all(each in method.environments for method in pair)]


def closed_gates(suite: Suite, results: Results, claim: Claim, environment: str) -> list[str]:
    """Why nothing is claimed of one of the claim's methods on an environment, in words; empty if something is."""
    words = []
    for gate in suite.gates:
        if gate.method not in (claim.better, claim.than):
            continue
        curves = [results.curves[run["job"]] for run in results.runs.get((gate.method, environment), [])]
        values = [mean_of(curve, gate.column) / (mean_of(curve, gate.over) if gate.over else 1.0) for curve in curves]
        value = sum(values) / len(values) if values else math.nan
        if value > gate.most or value < gate.least:
            name = f"`{gate.column}`" + (f" / `{gate.over}`" if gate.over else "")
            bound = f"more than {gate.most:g}" if value > gate.most else f"less than {gate.least:g}"
            words.append(f"{name} of {suite.methods[gate.method].label} {number(value)}, {bound}")
    return words


def mean_of(curve: dict[str, np.ndarray], column: str) -> float:
    """The mean of a column's finite values; nan if it has none."""
    values = curve.get(column, np.empty(0))
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def measured(
    results: Results, claim: Claim, environments: list[str], levels: dict
) -> tuple[list[int], statistics.Interval | None]:
    """How many seeds (time: pairs) there are on these environments, and d (time: the ratio) over them, None if one has none.

    Raises ValueError for returns on an environment without levels to normalise with.
    """
    pair = claim.better, claim.than
    if claim.measure == "time":
        ratios = [time_pairs(results, *pair, each) for each in environments]
        numbers = [len(each) for each in ratios]
        return numbers, time_ratio(ratios) if min(numbers, default=0) else None
    returns = {"end": final_returns, "training": training_returns, "evaluation": evaluation_returns}[claim.over]
    scores = [[normalise(each, returns(results, name, each), levels) for each in environments] for name in pair]
    numbers = [len(each) for each in (*scores[0], *scores[1])]
    enough = min(numbers, default=0) > 0
    return numbers, statistics.stratified_bootstrap(statistics.difference_of_means, *scores) if enough else None


def in_words(claim: Claim, numbers: list[int], interval: statistics.Interval | None) -> tuple[str, str]:
    """The evidence of `measured`, and its n."""
    symbol, unit, sign = ("ratio", "pairs", False) if claim.measure == "time" else ("d", "seeds", True)
    if interval is None:
        evidence = "-"
    elif min(numbers) < 2:
        evidence = f"{symbol} = {number(interval.estimate, sign)}, no interval"
    else:
        evidence = f"{symbol} = {bracketed(interval, sign)}"
    return evidence, f"{count(numbers).removeprefix('n=')} {unit}" if numbers else f"0 {unit}"


def verdict(suite: Suite, results: Results, claim: Claim, levels: dict) -> Verdict:
    """The claim judged by RULE. Raises ValueError if an environment has no levels to normalise with."""
    gates = {each: closed_gates(suite, results, claim, each) for each in shared_environments(suite, claim)}
    environments, left_out = ([each for each in gates if bool(gates[each]) == closed] for closed in (False, True))
    planned = [job for job in suite.shown() if job.method in (claim.better, claim.than) and job.environment in environments]
    missing, failed = ([job.name for job in planned if job.name in names] for names in (results.missing, results.failed))
    numbers, interval = measured(results, claim, environments, levels)
    evidence, n = in_words(claim, numbers, interval)
    least, enough = min(numbers, default=0), 2 if claim.measure == "time" else LEAST
    holds = fails = False
    if claim.measure == "time" and least > 1:
        holds, fails = interval.high < 1, interval.low > 1
    elif claim.measure == "return" and least > 1:
        holds, fails = interval.low >= -MARGIN, interval.high < -MARGIN
    elif least > 1:
        alone = {each: measured(results, claim, [each], levels)[1] for each in environments}
        against = [each for each, own in alone.items() if own.high < 0]
        favour = [each for each, own in alone.items() if own.low > 0]
        holds, fails = interval.low > 0 and not against, interval.high < 0 and not favour
        if len(environments) > 1:
            evidence += f"; for it: {listed(favour)}; against it: {listed(against)}"
    for each in left_out:
        evidence += f"; without {each} ({'; '.join(gates[each])})"
    where = ", ".join(environments) if len(environments) <= 3 else f"{len(environments)} environments"
    said = "holds" if holds else "does not hold" if fails else ""
    if failed:
        said = f"undecided: {len(failed)} of its runs failed"
    elif not said or least < enough:
        said = f"undecided at n = {least} {n.split()[1]}"
    if left_out and not environments:
        said = "nothing is claimed"
    return Verdict(said, evidence, f"{n}, {where}" if environments else "no environment", missing, failed)


# ---- Tables ----------------------------------------------------------------------------------------------------
def compared(suite: Suite, claim: Claim) -> str:
    """BLPO / PPO, return"""
    over = {"end": "", "training": " over training", "evaluation": " in evaluation"}[claim.over]
    return f"{suite.methods[claim.better].label} / {suite.methods[claim.than].label}, {claim.measure}{over}"


def summary_lines(judged: Iterable[tuple[Suite, Results]]) -> list[str]:
    """The verdicts of all suites: a row a suite and claim."""
    rows, levels, without = [], load_reference(), []
    for suite, results in judged:
        link = f"[{suite.name}](#{suite.name})"
        without += [] if suite.claims else [link]
        for claim in suite.claims:
            said = verdict(suite, results, claim, levels)
            rows.append([link, claim.text, f"**{said.said}**", said.evidence, said.n])
    if not rows:
        return []
    lines = ["## Verdicts", *table(["suite", "claim", "verdict", "evidence", "n"], rows)]
    return lines + ([f"Suites without a claim: {', '.join(without)}.", ""] if without else [])


def claims_lines(suite: Suite, results: Results) -> list[str]:
    """A row a claim: its text, the verdict and the grounds; then a row a comparison and environment, if there are several."""
    if not suite.claims:
        return []
    levels, rows, alone = load_reference(), [], {}
    for claim in suite.claims:
        judged = verdict(suite, results, claim, levels)
        missing = jobs_in_words(name for name in judged.missing if name not in judged.failed)
        missing += f"; failed: {jobs_in_words(judged.failed)}" if judged.failed else ""
        rows.append([claim.text, compared(suite, claim), f"**{judged.said}**", judged.evidence, judged.n, missing])
        for each in shared_environments(suite, claim):
            # "return" and "above" judge the same difference
            key = claim.better, claim.than, claim.measure == "time", claim.over, each
            cells = in_words(claim, *measured(results, claim, [each], levels))
            alone.setdefault(key, [compared(suite, claim).replace(", above", ", return"), each, *cells])
    lines = ["### Claims", *table(["claim", "better / than, measure", "verdict", "evidence", "n", "missing runs"], rows)]
    if len(suite.environments) > 1 and results.runs:
        lines += ["### Claims, each environment alone"]
        lines += table(["better / than, measure", "environment", "evidence", "n"], alone.values())
    if results.dead:
        lines += [f"### Claims, without the runs with a {suite.dead.words}"]
        living, rows = results.without(results.dead), []
        for claim in suite.claims:
            judged = verdict(suite, living, claim, levels)
            rows.append([claim.text, f"**{judged.said}**", judged.evidence, judged.n])
        lines += table(["claim", "verdict", "evidence", "n"], rows)
    return lines
