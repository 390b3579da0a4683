"""`docs/results.md` from the committed results alone: tables, figures, provenance and a verdict for every claim of a suite.

The same results give the same bytes. All intervals are 95 % stratified bootstraps (`benchmark/statistics.py`).
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmark import statistics
from benchmark.figures import (
    Results, compared_environments, count, final_returns, is_aggregated, load_results, normalised_scores, pooled_methods,
    time_pairs, time_ratio, training_returns,
)  # fmt: skip
from benchmark.reference import load_reference, normalise
from benchmark.suites import Claim, Suite

PAPER = Path(__file__).parent / "paper.json"
MARGIN = 0.05  # normalised return that a method may lack and still be at least as good
LEAST_FOR_ABOVE = 5  # seeds below which nothing is said to be above anything
LEAST_FOR_IQM = 4  # runs: with fewer, nothing is cut
FIGURES = (
    ("returns_steps", "Episodic return against environment steps; mean and 95 % interval over seeds"),
    ("returns_minutes", "The same against wall-clock time, up to the shortest run of each method"),
    ("aggregate", "Interquartile mean of the normalised return"),
    ("profile", "Fraction of runs above a normalised final return"),
    ("improvement", "Probability of improvement"),
    ("runtime", "Wall-clock time over the first baseline's, same environment and seed"),
)


# ---- Words and numbers -----------------------------------------------------------------------------------------
def number(value: float, sign: bool = False) -> str:
    """Three digits or all before the point: 2383, 41.5, -0.12; with `sign` also +0.12."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "") if float(text) == 0 else text


def bracketed(interval: statistics.Interval, sign: bool = False) -> str:
    """estimate [low, high]"""
    estimate, low, high = (number(float(value), sign) for value in interval)
    return f"{estimate} [{low}, {high}]"


def table(head: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table, an empty line before and after it."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return ["", lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def listed(words: Iterable[str]) -> str:
    """Words with commas, or none."""
    return ", ".join(words) or "none"


def jobs_in_words(names: Iterable[str]) -> str:
    """Jobs by environment and method: "Hopper-v4: ppo (1 2), blpo (1)" for Hopper-v4__ppo__1 and so on, or none."""
    seeds: dict[str, dict[str, list[str]]] = {}
    for name in names:
        environment, method, seed = name.rsplit("__", 2)
        seeds.setdefault(environment, {}).setdefault(method, []).append(seed)
    return "; ".join(
        f"{environment}: " + ", ".join(f"{method} ({' '.join(each)})" for method, each in methods.items())
        for environment, methods in seeds.items()
    ) or "none"  # fmt: skip


# ---- Verdicts --------------------------------------------------------------------------------------------------
RULE = f"""A claim compares two methods, `better` and `than`, and is judged by one rule, the same in all suites:

- **return**: d is the mean over the environments of the difference in mean normalised final return, `better` minus `than`,
  with its 95 % stratified bootstrap interval [low, high] over seeds. The claim **holds** (at least as good, to a margin of
  {MARGIN:g}) if low >= -{MARGIN:g}, **does not hold** if high < -{MARGIN:g}, and is **undecided** otherwise.
- **above**: the same d. An environment is *for* the claim if the 95 % interval of its own difference lies above 0, *against* it if
  below. The claim **holds** if low > 0 and no environment is against it, **does not hold** if high < 0 and none is for it, and is
  **undecided** otherwise, and always with fewer than {LEAST_FOR_ABOVE} seeds.
- **time**: the ratio of wall-clock time, `better` over `than`, geometric mean over the pairs of runs of the same environment
  and seed, with its 95 % bootstrap interval. The claim **holds** if high < 1, **does not hold** if low > 1, and is
  **undecided** otherwise.
- A claim "over training" takes the mean return over all steps, the height of the learning curve, in place of the final one.
- The environments are all those on which the suite runs both methods. With fewer than 2 seeds (for time: pairs) on one of them
  there is no interval, and the claim is undecided. Planned runs that are missing are named beside the verdict.
- A run that diverged (parameters not finite at its end) counts with the random policy's return, and is named.

Percentile bootstrap intervals of few seeds are too short: of two methods with normal scores they hold the true difference in
about 70 to 80 % of the cases at 2 seeds, 80 to 90 % at 3, 90 % at 5, instead of 95 %. Read verdicts at few seeds so."""


class Verdict(NamedTuple):
    """What the rule says of a claim, and on what grounds."""

    said: str
    evidence: str
    n: str
    missing: list[str]


def verdict(suite: Suite, results: Results, claim: Claim, levels: dict) -> Verdict:
    """The claim judged by RULE. Raises ValueError if an environment has no levels to normalise with."""
    pair = claim.better, claim.than
    environments = [each for each in suite.environments if all(each in suite.methods[name].environments for name in pair)]
    planned = [job for job in suite.jobs() if job.method in pair and job.environment in environments]
    missing = [job.name for job in planned if job.name in results.missing]
    if claim.measure == "time":
        unit, symbol, sign = "pairs", "ratio", False
        numbers = [len(time_pairs(results, *pair, each)) for each in environments]
    else:
        unit, symbol, sign = "seeds", "d", True
        returns = training_returns if claim.over == "training" else final_returns
        scores = [[normalise(each, returns(results, name, each), levels) for each in environments] for name in pair]
        numbers = [len(each) for each in (*scores[0], *scores[1])]
    least, enough, grounds = min(numbers, default=0), LEAST_FOR_ABOVE if claim.measure == "above" else 2, ""
    where = listed(environments) if len(environments) <= 3 else f"{len(environments)} environments"
    n = f"{count(numbers).removeprefix('n=')} {unit}, {where}" if numbers else "no common environment"
    if least == 0:
        return Verdict(f"undecided at n = 0 {unit}", "-", n, missing)
    if claim.measure == "time":
        interval = time_ratio([time_pairs(results, *pair, each) for each in environments])
        holds, fails = interval.high < 1, interval.low > 1
    else:
        interval = statistics.stratified_bootstrap(statistics.difference_of_means, *scores)
        holds, fails = interval.low >= -MARGIN, interval.high < -MARGIN
        if claim.measure == "above" and least > 1:
            alone = [statistics.stratified_bootstrap(statistics.difference_of_means, [mine], [base]) for mine, base in zip(*scores)]
            against = [name for name, each in zip(environments, alone) if each.high < 0]
            favour = [name for name, each in zip(environments, alone) if each.low > 0]
            holds, fails = interval.low > 0 and not against, interval.high < 0 and not favour
            if len(environments) > 1:
                grounds = f"; for it: {listed(favour)}; against it: {listed(against)}"
    if least < 2:
        evidence = f"{symbol} = {number(interval.estimate, sign)}, no interval"
        return Verdict(f"undecided at n = {least} {unit}", evidence, n, missing)
    decided = "holds" if holds else "does not hold" if fails else ""
    said = decided if decided and least >= enough else f"undecided at n = {least} {unit}"
    return Verdict(said, f"{symbol} = {bracketed(interval, sign)}{grounds}", n, missing)


def claims_table(suite: Suite, results: Results) -> list[str]:
    """A row a claim: its text, the verdict and the grounds."""
    if not suite.claims:
        return []
    levels, rows = load_reference(), []
    for claim in suite.claims:
        judged = verdict(suite, results, claim, levels)
        compared = f"{suite.methods[claim.better].label} / {suite.methods[claim.than].label}, {claim.measure}"
        compared += " over training" if claim.over == "training" else ""
        rows.append([claim.text, compared, f"**{judged.said}**", judged.evidence, judged.n, jobs_in_words(judged.missing)])
    return ["### Claims", *table(["claim", "better / than, measure", "verdict", "evidence", "n", "missing runs"], rows)]


# ---- Tables ----------------------------------------------------------------------------------------------------
def summary(returns: np.ndarray) -> str:
    """mean ± standard deviation (n), and the interquartile mean of four or more."""
    if len(returns) == 0:
        return "-"
    if len(returns) == 1:
        return f"{number(returns[0])} (1)"
    text = f"{number(returns.mean())} ± {number(returns.std(ddof=1))} ({len(returns)})"
    return text + (f", IQM {number(float(statistics.iqm([returns])))}" if len(returns) >= LEAST_FOR_IQM else "")


def returns_table(suite: Suite, results: Results) -> list[str]:
    """Final returns: a row a method, a column an environment."""
    rows = []
    for name, method in suite.methods.items():
        rows.append([method.label, *(summary(final_returns(results, name, each)) for each in suite.environments)])
    iqm = f"; IQM: interquartile mean, from {LEAST_FOR_IQM} runs on"
    head = ["### Final return", "", f"Mean over the last 10 % of training, mean ± standard deviation over seeds (n){iqm}."]
    return [*head, *table(["method", *suite.environments], rows)]


def difference(mine: np.ndarray, base: np.ndarray) -> str:
    """Difference of means with its interval; without interval if one of the two has a single run."""
    if min(len(mine), len(base)) == 0:
        return "-"
    interval = statistics.stratified_bootstrap(statistics.difference_of_means, [mine], [base])
    if min(len(mine), len(base)) == 1:
        return f"{number(interval.estimate, sign=True)} (no interval)"
    return bracketed(interval, sign=True)


def differences_tables(suite: Suite, results: Results) -> list[str]:
    """One table a baseline: every other method's mean final return minus the baseline's."""
    lines = []
    for baseline in suite.baselines:
        base = {each: final_returns(results, baseline, each) for each in suite.environments}
        rows = [
            [method.label, *(difference(final_returns(results, name, each), base[each]) for each in suite.environments)]
            for name, method in suite.methods.items()
            if name != baseline
        ]
        if rows:
            label = suite.methods[baseline].label
            lines += [f"### Difference to {label}", "", f"Mean final return minus that of {label}, with 95 % interval."]
            lines += table(["method", *suite.environments], rows)
    return lines


def aggregate_table(suite: Suite, results: Results) -> list[str]:
    """Normalised scores over all environments, and the probability of improvement over each baseline."""
    pooled = pooled_methods(suite, results)
    if not is_aggregated(suite) or not pooled:
        return []
    environments, levels = compared_environments(suite), load_reference()
    scores = {name: normalised_scores(results, name, environments, levels) for name in pooled}
    baselines = [name for name in suite.baselines if name in pooled]
    rows = []
    for name in pooled:
        numbers = [len(task) for task in scores[name]]
        enough = min(numbers) > 1
        cells = [suite.methods[name].label, count(numbers).removeprefix("n=")]
        for statistic in (statistics.iqm, statistics.mean):
            interval = statistics.stratified_bootstrap(statistic, scores[name])
            cells.append(bracketed(interval) if enough else number(interval.estimate))
        for baseline in baselines:
            if baseline == name:
                cells.append("-")
                continue
            interval = statistics.stratified_bootstrap(statistics.probability_of_improvement, scores[name], scores[baseline])
            cells.append(bracketed(interval) if enough else number(interval.estimate))
        rows.append(cells)
    chances = [f"P(above {suite.methods[baseline].label})" for baseline in baselines]
    left_out = [method.label for name, method in suite.methods.items() if name not in pooled]
    lines = ["### All environments together", ""]
    lines += [
        "Normalised final return (0: random policy, 1: the reference level in `benchmark/reference.json`) over "
        f"{', '.join(environments)}, with 95 % interval; probability that a run ends above one of the baseline's.",
    ]
    if left_out:
        lines.append(f"Not pooled, for want of runs on one of these: {', '.join(left_out)}.")
    return [*lines, *table(["method", "n", "IQM", "mean", *chances], rows)]


def time_table(suite: Suite, results: Results) -> list[str]:
    """Median wall-clock seconds, and the ratio to the first baseline."""
    rows = []
    for name, method in suite.methods.items():
        cells = [method.label]
        for each in suite.environments:
            seconds = [run["wall_time_s"] for run in results.runs.get((name, each), []) if not method.untimed]
            cell = number(float(np.median(seconds))) if seconds else "-"
            if suite.baselines and name != suite.baselines[0]:
                cell += time_cell(results, name, suite.baselines[0], each)
            cells.append(cell)
        rows.append(cells)
    words = "Median seconds of a run"
    if suite.baselines:
        label = suite.methods[suite.baselines[0]].label
        words += f"; in brackets the ratio to {label}, geometric mean over equal seeds, from 2 pairs on with 95 % interval"
    left_out = [f"{method.label}, {method.untimed}" for method in suite.methods.values() if method.untimed]
    words = ". ".join([words, *(["Left out: " + "; ".join(left_out)] if left_out else [])])
    return ["### Wall-clock time", "", f"{words}.", *table(["method", *suite.environments], rows)]


def time_cell(results: Results, method: str, baseline: str, environment: str) -> str:
    """The ratio to the baseline in brackets; nothing without a pair."""
    pairs = time_pairs(results, method, baseline, environment)
    if len(pairs) == 0:
        return ""
    interval = time_ratio([pairs])
    return f" ({bracketed(interval) if len(pairs) > 1 else number(interval.estimate)})"


def ratio(value: float | None, base: float | None) -> str:
    """value / base where both are positive: a ratio of costs, or of a return and a cost, would say nothing."""
    if value is None or base is None or not value > 0 or not base > 0:
        return "-"
    return f"{value / base:.2f}"


def paper_table(suite: Suite, results: Results) -> list[str]:
    """The paper's ratios to its PPO beside ours, for the methods and environments that both have; its returns beside
    ours where the task is the same."""
    paper, rows = json.loads(PAPER.read_text()), []
    if "ppo" not in suite.methods:
        return []
    for each in suite.environments:
        base = final_returns(results, "ppo", each)
        for name, method in suite.methods.items():
            mine = final_returns(results, name, each)
            if name not in paper["columns"] or not len(base) or not len(mine):
                continue
            if name == "ppo" and each not in paper["same_task"]:  # a ratio to itself says nothing
                continue
            theirs = []
            for measure in ("final_return", "wall_time_s"):
                values = paper[measure].get(each, {})
                theirs.append(ratio(values.get(paper["columns"][name]), values.get(paper["columns"]["ppo"])))
            if theirs == ["-", "-"]:
                continue
            absolute = ["-", "-"]
            if each in paper["same_task"]:
                absolute = [number(paper["final_return"][each][paper["columns"][name]]), number(mine.mean())]
            pairs = time_pairs(results, name, "ppo", each)
            time = f"{time_ratio([pairs]).estimate:.2f}" if len(pairs) else "-"
            returns = ratio(mine.mean(), base.mean())
            rows.append([each, method.label, paper["columns"][name], *absolute, theirs[0], returns, theirs[1], time])
    if not rows:
        return []
    head = ["environment", "method", "paper's name"]
    head += [f"{quantity}{who}" for quantity in ("return, ", "return / PPO, ", "time / PPO, ") for who in ("paper", "ours")]
    lines = ["### Beside the paper", ""]
    lines += [
        "The paper's returns stand beside ours on classic control, whose tasks are the same but for the time limit, which "
        "there counts as a termination. On Brax, which it used in place of MuJoCo, they are not comparable, and its times are "
        "of another machine: of these only the ratios to PPO are shown, and those of returns only where both are positive. "
        "On Brax the number of steps differs too.",
        "",
        f"{paper['paper']}. Returns: {paper['return_source']}. Times: {paper['time_source']}.",
    ]
    return [*lines, *table(head, rows)]


# ---- The page --------------------------------------------------------------------------------------------------
def figure_lines(suite: Suite, results_root: Path, out: Path) -> list[str]:
    """The figures that were drawn, linked relative to the page, each with its PDF."""
    lines = []
    for name, caption in FIGURES:
        png, pdf = (results_root / suite.name / f"{name}.{suffix}" for suffix in ("png", "pdf"))
        if png.exists():
            here, vector = (Path(os.path.relpath(path, out.parent)).as_posix() for path in (png, pdf))
            lines += [f"![{caption}]({here})", "", f"*{caption} ([PDF]({vector})).*", ""]
    return ["### Figures", "", *lines] if lines else []


def provenance(results: Results) -> str:
    """Where the suite's runs came from, in one line."""
    runs = [run for group in results.runs.values() for run in group]
    commits = sorted({run["commit"][:10] + ("+" if run["dirty"] else "") for run in runs})
    versions: dict[str, set[str]] = {}
    for run in runs:
        for package, version in run["versions"].items():
            versions.setdefault(package, set()).add(version)
    packages = [f"{package} {' / '.join(sorted(found))}" for package, found in sorted(versions.items())]
    seeds, steps = (sorted({run[key] for run in runs}) for key in ("seed", "steps"))
    machines = sorted({f"{run['cpu']}{', ' + run['gpu'] if run['gpu'] else ''}" for run in runs})
    changed = " (+: with uncommitted changes)" if any(commit.endswith("+") for commit in commits) else ""
    return (
        f"{len(runs)} runs; seeds {listed(map(str, seeds))}; steps {listed(map(str, steps))}; commits {listed(commits)}"
        f"{changed}; machines: {'; '.join(machines)}; {listed(packages)}."
    )


def suite_lines(suite: Suite, results_root: Path, out: Path) -> list[str]:
    """The section of one suite."""
    results = load_results(suite, results_root)
    lines = [f"## {suite.name}", "", suite.description.strip(), ""]
    if not results.runs:
        lines += ["No run of this suite has been collected.", "", *claims_table(suite, results)]
    else:
        lines += [*claims_table(suite, results), *returns_table(suite, results), *differences_tables(suite, results)]
        lines += [*aggregate_table(suite, results), *time_table(suite, results), *paper_table(suite, results)]
        lines += [*figure_lines(suite, results_root, out), "### Where it comes from", "", provenance(results), ""]
    silent = [
        run["job"]
        for group in results.runs.values()
        for run in group
        if (run["final_return"] is None or not math.isfinite(run["final_return"])) and run["job"] not in results.diverged
    ]
    if results.diverged:
        lines += [f"Diverged (parameters not finite at the end): {', '.join(results.diverged)}.", ""]
    if silent:
        lines += [f"Without a final return, since no episode ended in the last 10 % of training: {', '.join(silent)}.", ""]
    if results.ignored:
        lines += [f"Left out, since the suite does not have them any more: {', '.join(results.ignored)}.", ""]
    return [*lines, f"Missing runs, with their seeds: {jobs_in_words(results.missing)}.", ""]


def report(suites: Iterable[Suite], results_root: Path, out: Path) -> None:
    """Write the page of these suites to `out`. Raises ValueError if an environment has no levels to normalise with."""
    lines = ["# Results", "", "Written by `python -m benchmark report` from `benchmark/results/`; do not edit.", "", RULE, ""]
    for suite in suites:
        lines += suite_lines(suite, results_root, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines).rstrip() + "\n")
