"""`docs/results.md` from the committed results alone: tables, figures, provenance and a verdict for every claim of a suite
(`benchmark/claims.py`).

The same results give the same bytes. All intervals are 95 % stratified bootstraps (`benchmark/statistics.py`).
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmark import statistics
from benchmark.claims import RULE, claims_lines, summary_lines
from benchmark.markdown import bracketed, jobs_in_words, listed, number, table
from benchmark.reference import load_reference
from benchmark.scores import (
    Results, compared_environments, count, final_returns, is_aggregated, load_results, normalised_scores, pooled_methods,
    time_pairs, time_ratio,
)  # fmt: skip
from benchmark.suites import Suite

PAPER = Path(__file__).parent / "paper.json"
LEAST_FOR_INTERVAL = 3  # runs: the interval of one method's mean from fewer says less than the runs themselves
LEAST_FOR_IQM = 4  # runs: with fewer, nothing is cut
FIGURES = (
    ("returns_steps", "Episodic return against environment steps; mean and 95 % interval over seeds"),
    ("returns_minutes", "The same against wall-clock time, up to the shortest run of each method"),
    ("returns_labels", "The same against the number of labels; a method's return at so many is that of the last episodes before it asked for more"),
    ("aggregate", "Interquartile mean of the normalised return"),
    ("profile", "Fraction of runs above a normalised final return"),
    ("improvement", "Probability of improvement"),
    ("runtime", "Wall-clock time over the first baseline's, same environment and seed"),
)


# ---- Tables ----------------------------------------------------------------------------------------------------
def summary(returns: np.ndarray) -> str:
    """mean ± standard deviation (n); below it the mean's interval of three or more, the interquartile mean of four or more."""
    if len(returns) == 0:
        return "-"
    if len(returns) == 1:
        return f"{number(returns[0])} (1)"
    text = f"{number(returns.mean())} ± {number(returns.std(ddof=1))} ({len(returns)})"
    if len(returns) >= LEAST_FOR_INTERVAL:
        text += f"<br>{bracketed(statistics.stratified_bootstrap(statistics.mean, [returns])).split(' ', 1)[1]}"
    return text + (f", IQM {number(float(statistics.iqm([returns])))}" if len(returns) >= LEAST_FOR_IQM else "")


def returns_table(suite: Suite, results: Results) -> list[str]:
    """Final returns: a row a method, a column an environment."""
    rows = []
    for name, method in suite.methods.items():
        rows.append([method.label, *(summary(final_returns(results, name, each)) for each in suite.environments)])
    words = (
        "Mean over the last 10 % of training: mean ± standard deviation over seeds (n); in brackets the 95 % interval of the mean, "
        f"from {LEAST_FOR_INTERVAL} runs on; IQM: interquartile mean, from {LEAST_FOR_IQM} runs on."
    )
    head = ["### Final return", "", words]
    return [*head, *table(["method", *suite.environments], rows)]


def difference(mine: list[np.ndarray], base: list[np.ndarray]) -> str:
    """Difference of means, one array (runs,) an environment, with its interval; without it where one has a single run."""
    least = min(map(len, (*mine, *base)))
    if least == 0:
        return "-"
    interval = statistics.stratified_bootstrap(statistics.difference_of_means, mine, base)
    if least == 1:
        return f"{number(interval.estimate, sign=True)} (no interval)"
    return bracketed(interval, sign=True)


def differences_tables(suite: Suite, results: Results) -> list[str]:
    """One table a baseline: every other method's mean final return minus the baseline's."""
    lines = []
    for baseline in suite.baselines:
        base = {each: final_returns(results, baseline, each) for each in suite.environments}
        rows = [
            [method.label, *(difference([final_returns(results, name, each)], [base[each]]) for each in suite.environments)]
            for name, method in suite.methods.items()
            if name != baseline
        ]
        if rows:
            label = suite.methods[baseline].label
            lines += [f"### Difference to {label}", "", f"Mean final return minus that of {label}, with 95 % interval."]
            lines += table(["method", *suite.environments], rows)
    return lines


def aggregate_table(suite: Suite, results: Results) -> list[str]:
    """Normalised scores over all environments; probability of improvement over each baseline, and difference to it."""
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
    lines += table(["method", "n", "IQM", "mean", *chances], rows)
    if not baselines or len(pooled) < 2:
        return lines
    rows = [
        [suite.methods[name].label, *("-" if name == each else difference(scores[name], scores[each]) for each in baselines)]
        for name in pooled
    ]
    lines += ["Differences of that mean normalised return, with 95 % interval."]
    return [*lines, *table(["method", *(f"minus {suite.methods[each].label}" for each in baselines)], rows)]


def time_table(suite: Suite, results: Results) -> list[str]:
    """Median wall-clock seconds, and the ratio to the first baseline."""
    reasons = {method.untimed for method in suite.methods.values()}
    if "" not in reasons:
        return ["### Wall-clock time", "", f"Not shown: {'; '.join(sorted(reasons))}.", ""]
    rows = []
    for name, method in suite.methods.items():
        cells = [method.label]
        for each in suite.environments:
            seconds = [run["wall_time_s"] for run in results.runs.get((name, each), []) if run["wall_time_s"] is not None]
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


def diagnostics_table(suite: Suite, results: Results) -> list[str]:
    """What the suite collected besides the returns: a row a method and environment, the columns that there are."""
    rows, kept = [], {}
    for environment in suite.environments:
        for name, method in suite.methods.items():
            curves = [results.curves[run["job"]] for run in results.runs.get((name, environment), [])]
            means = {}
            for column in suite.diagnostics:
                found = [curve[column] for curve in curves if column in curve and np.isfinite(curve[column]).any()]
                if found and not (method.untimed and column.startswith("time/")):
                    means[column] = float(np.mean([each[np.isfinite(each)].mean() for each in found]))
            if means:
                rows.append((environment, method.label, means))
                kept |= means
    columns = [column for column in suite.diagnostics if column in kept]
    if not columns:
        return []
    cells = [
        [environment, label, *(f"{means[column]:.3g}" if column in means else "-" for column in columns)]
        for environment, label, means in rows
    ]
    words = "Mean over the runs of the mean over all of training; `time/` in seconds a row of `metrics.csv`."
    return ["### Diagnostics", "", words, *table(["environment", "method", *(f"`{column}`" for column in columns)], cells)]


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
    return ["### Beside the paper", *table(head, rows)]


def paper_note() -> list[str]:
    """How to read those tables, once for all suites."""
    paper = json.loads(PAPER.read_text())
    words = (
        "The paper's returns stand beside ours on classic control, whose tasks are the same but for the time limit, which "
        "there counts as a termination. On Brax, which it used in place of MuJoCo, they are not comparable, and its times are "
        "of another machine: of these only the ratios to PPO are shown, and those of returns only where both are positive. "
        "On Brax the number of steps differs too."
    )
    source = f"{paper['paper']}. Returns: {paper['return_source']}. Times: {paper['time_source']}."
    return ["## The tables beside the paper", "", words, "", source, ""]


# ---- The page --------------------------------------------------------------------------------------------------
def figure_lines(suite: Suite, results_root: Path, out: Path) -> list[str]:
    """The figures that were drawn, linked relative to the page, each with its PDF."""
    lines = []
    for name, caption in FIGURES:
        png, pdf = (results_root / suite.name / f"{name}.{suffix}" for suffix in ("png", "pdf"))
        if png.exists():
            here, vector = (Path(os.path.relpath(path, out.parent)).as_posix() for path in (png, pdf))
            lines += [f"![{caption}]({here})", "", f"*{caption} ([PDF]({vector})).*", ""]
    if lines and suite.figures:
        shown = "; ".join(suite.methods[name].label for name in suite.figures)
        lines = [f"The figures show: {shown}. The tables have every method.", "", *lines]
    return ["### Figures", "", *lines] if lines else []


def short(run: dict) -> str:
    """The commits of a run's attempts, with + if one had uncommitted changes."""
    commits = [commit[:10] if commit else "unknown (no git)" for commit in run.get("commits", [run["commit"]])]
    return " and ".join(commits) + ("+" if run["dirty"] else "")


def provenance(suite: Suite, results: Results) -> list[str]:
    """Where the suite's runs came from, and what was out of the ordinary."""
    runs = [run for group in results.runs.values() for run in group]
    versions: dict[str, set[str]] = {}
    for run in runs:
        for package, version in run["versions"].items():
            versions.setdefault(package, set()).add(str(version))
    packages = [f"{package} {' / '.join(sorted(found))}" for package, found in sorted(versions.items())]
    seeds, steps = (sorted({run[key] for run in runs}) for key in ("seed", "steps"))
    machines = sorted({f"{run['cpu']}{', ' + run['gpu'] if run['gpu'] else ''}" for run in runs})
    by_commit: dict[str, dict[str, None]] = {}
    for run in sorted(runs, key=lambda run: list(suite.methods).index(run["method"])):
        by_commit.setdefault(short(run), {})[suite.methods[run["method"]].label] = None
    changed = " (+: with uncommitted changes)" if any(run["dirty"] for run in runs) else ""
    loads = [run["load"] for run in runs if run.get("load") is not None]
    load = f"load average at their starts and ends at most {max(loads):.1f}; " if loads else ""
    lines = [
        f"{len(runs)} runs; seeds {listed(map(str, seeds))}; steps {listed(map(str, steps))}; commits {', '.join(sorted(by_commit))}"
        f"{changed}; machines: {'; '.join(machines)}; {load}{listed(packages)}."
    ]
    if len(by_commit) > 1:
        lines += [f"Commit {commit}: {'; '.join(by_commit[commit])}." for commit in sorted(by_commit)]
    lines += mixed_term_lines(suite, runs)
    if suite.restated:
        names = listed(f"`{name}`" for name in suite.restated)
        lines += [f"The suite has these arguments as the runs had them, by default or under another name of then: {names}."]
    taken = [method for name, method in suite.methods.items() if method.runs_of and any(key[0] == name for key in results.runs)]
    if taken:
        words = "; ".join(f"{method.label}, of {method.runs_of[0]}" for method in taken)
        lines += [f"Runs that another suite launched, by equal commands: {words}."]
    if results.mixed:
        lines += [f"**Mixed** (`--allow-mixed`): {'; '.join(results.mixed)}."]
    again = [run["job"] for run in runs if run.get("attempts", 1) > 1]
    if again:
        lines += [
            f"In more than one attempt: {len(again)} of the runs. Each was interrupted or failed and went on in new episodes from its "
            "last checkpoint, without one anew; its wall-clock time is that of the steps that count, without those that were lost: "
            f"{jobs_in_words(again)}."
        ]
    returned = {run["job"] for run in runs if run["final_return"] is not None and math.isfinite(run["final_return"])}
    silent = [run["job"] for run in runs if run["job"] not in returned and run["job"] not in results.diverged]
    for words, names in (
        ("Diverged (parameters not finite at the end)", results.diverged),
        (dead_words(suite), results.dead),
        ("Without a final return, since no episode ended in the last 10 % of training", silent),
        ("Left out, since the suite does not have them any more", results.ignored),
    ):
        lines += [f"{words}: {', '.join(names)}."] if names else []
    return lines


def mixed_term(arguments: dict) -> tuple[str, bool]:
    """How a BLPO run read the mixed term (docs/blpo.md), and whether that was before the method had the exact one.

    Then the advantages were refreshed and each state was its own start; `mixed_discount` was an argument of the laboratory
    alone, for its trajectory term.
    """
    earlier = "mixed_discount" not in arguments or "mixed_term" in arguments
    own_start = earlier and arguments.get("mixed_term") != "trajectory"
    reach = {0: "each state its own start", None: "κ = γλ"}
    discount = 0 if own_start else arguments["mixed_discount"]
    refreshed = earlier or arguments.get("mixed_advantages") == "refreshed"
    whose = "refreshed advantages" if refreshed else "the advantages of the targets"
    words = f"{reach.get(discount, f'κ = {discount}')}, with {whose}"
    return "as in the released code" if arguments.get("leader") == "released" else words, earlier


def mixed_term_lines(suite: Suite, runs: list[dict]) -> list[str]:
    """A sentence for each reading of the mixed term among the suite's BLPO runs; it names their methods if there are several."""
    found: dict[tuple[str, bool], list[dict]] = {}
    for run in sorted(runs, key=lambda run: list(suite.methods).index(run["method"])):
        if run["script"].startswith("blpo") and run.get("arguments", {}).get("ihvp", "none") != "none":
            found.setdefault(mixed_term(run["arguments"]), []).append(run)
    lines = []
    for (reading, earlier), group in found.items():
        commits = sorted({short(run) for run in group})
        made = f"commit{'s' * (len(commits) > 1)} {listed(commits)}{', before the exact one' * earlier}"
        labels = dict.fromkeys(suite.methods[run["method"]].label for run in group)
        who = f": {'; '.join(labels)}" if len(found) > 1 else ""
        lines.append(f"Mixed term of the hypergradient: {reading} ({made}){who}.")
    return lines


def dead_words(suite: Suite) -> str:
    """What a suite's runs that stopped learning are called, and by what measure; they count as they are."""
    if suite.dead is None:
        return ""
    return f"With a {suite.dead.words} (`{suite.dead.column}` below {suite.dead.below:g} over the last tenth)"


def suite_lines(suite: Suite, results: Results, results_root: Path, out: Path) -> list[str]:
    """The section of one suite."""
    lines = [f"## {suite.name}", "", suite.description.strip(), "", *claims_lines(suite, results)]
    said = ["No run of this suite has been collected."]
    if results.runs:
        lines += [*returns_table(suite, results), *differences_tables(suite, results), *aggregate_table(suite, results)]
        lines += [*time_table(suite, results), *diagnostics_table(suite, results), *paper_table(suite, results)]
        lines += [*figure_lines(suite, results_root, out), "### Where it comes from", ""]
        said = provenance(suite, results)
    said += [f"Missing runs, with their seeds: {jobs_in_words(results.missing)}."]
    said += [f"Of these have failed: {jobs_in_words(results.failed)}."] if results.failed else []
    return [*lines, *(line for each in said for line in (each, ""))]


def report(suites: Iterable[Suite], results_root: Path, out: Path) -> None:
    """Write the page of these suites, the headline first, to `out`.

    Raises ValueError if an environment has no levels to normalise with.
    """
    judged = [(suite, load_results(suite, results_root)) for suite in sorted(suites, key=lambda suite: not suite.headline)]
    sections = [suite_lines(suite, results, results_root, out) for suite, results in judged]
    lines = ["# Results", "", "Written by `python -m benchmark report` from `benchmark/results/`; do not edit.", ""]
    lines += [*summary_lines(judged), "## The rule", "", RULE, ""]
    if any("### Beside the paper" in section for section in sections):
        lines += paper_note()
    for section in sections:
        lines += section
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines).rstrip() + "\n")
