"""`docs/results.md` from the committed results alone: the claims that matter, what was computed exactly, then
a table and a figure a suite.

The same results give the same bytes. How comparisons are judged: `benchmark/claims.py`; the intervals:
`benchmark/statistics.py`. `top_claims.json` chooses the claims on top and has their words; every number
beside them comes from the results.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from benchmark import claims
from benchmark.data import Results, load_results
from benchmark.machine import write_atomically
from benchmark.markdown import number, probability, short, spread, table
from benchmark.scores import OVER, Comparisons, collapses, levels, returns, scores
from benchmark.statistics import LEAST, Comparison, compare
from benchmark.suites import ROOT, BadSuite, Claim, Suite

TOP = Path(__file__).parent / "top_claims.json"


# ---- Comparisons in words ----------------------------------------------------------------------------------
def judged(compared: Comparisons, claim: Claim, task: str | None = None) -> tuple[str, str]:
    """A claim's verdict and the evidence for it, over all tasks or on one."""
    found, pair = compared.of(claim, task), (claim.better, claim.than)
    failed = sum(job.method in pair and job.name in compared.results.failed for job in compared.suite.shown())
    if claim.measure == "time":  # less is better
        turned = None if found is None else -found
        return claims.verdict(turned, LEAST, failed, math.log(1.1)), in_words(found, time=True)
    evidence, tasks = in_words(found), [task] if task else compared.environments(claim)
    if len(tasks) > 1 and found is not None:
        alone = {short(each): compared.of(claim, each) for each in tasks}
        words = [f"{task} {number(each.estimate, sign=True)}{star(each)}" for task, each in alone.items()]
        evidence += f"; {', '.join(words)}"
    return claims.verdict(found, failed=failed), evidence


def star(alone: Comparison) -> str:
    """* where interval and p of one task say that there is a difference."""
    return "\\*" if claims.sign(alone.low, alone.high, alone.p) else ""


def in_words(found: Comparison | None, time: bool = False) -> str:
    """+0.30 [+0.24, +0.39], p = 0.008, excludes gains above 0.39; of times × 0.69 [0.66, 0.72], p < 0.001"""
    if found is None:
        return "-"
    values = (found.estimate, found.low, found.high)
    estimate, low, high = (
        number(math.exp(min(each, 99)) if time else each, sign=not time) for each in values
    )
    text = f"time × {estimate}" if time else estimate
    if math.isnan(found.low):
        return f"{text}, no interval"
    text += f" [{low}, {high}], {probability(found.p)}"
    if time:
        return text
    return text + (
        f", excludes gains above {number(found.high)}" if found.high > 0 else ", excludes any gain"
    )


def top_lines(judges: dict[str, Comparisons], exact: dict[str, pd.DataFrame]) -> list[str]:
    """The claims of `top_claims.json` whose results are here."""
    rows = []
    for entry in json.loads(TOP.read_text()):
        words, name = entry.pop("words"), entry.pop("suite")
        if name in exact:
            both = exact[name].loc[entry["row"]][[entry["better"], entry["than"]]]
            found = paired(exact[name], entry["row"], entry["better"], entry["than"])
            centres = " against ".join(f"{each:.3f}" for each in both.agg(CENTRE[name]))
            where = f"{entry['row']}: " if isinstance(entry["row"], str) else ""
            evidence = f"{where}{centres}, {CENTRE[name]}, {BETTER[name]} is better, {probability(found.p)}"
            side = claims.sign(found.low, found.high, found.p) * (-1 if BETTER[name] == "lower" else 1)
            verdict = {1: "**better**", 0: "**inconclusive**", -1: "**worse**"}[side]
            rows.append([words, verdict, evidence, f"{len(both)}, [{name}](#where-everything-is-exact)"])
        elif name in judges:
            task = entry.pop("environment", None)
            claim = Claim(text=words, **entry)
            found = judges[name].of(claim, task)
            runs = "0" if found is None else spread(found.runs)
            rows.append([words, *judged(judges[name], claim, task), f"{runs}, [{name}](#{name})"])
    return table(["", "verdict", "difference", "n, suite"], rows) if rows else []


# ---- Where everything is exact -----------------------------------------------------------------------------
CENTRE = {"sobirl_tabular": "median", "blpo_tabular": "mean"}
BETTER = {"sobirl_tabular": "lower", "blpo_tabular": "higher"}


def exact_results(results_folder: Path) -> dict[str, pd.DataFrame]:
    """What the tabular scripts computed: rows (problem, seed) or (features, seed), a column a method.

    Raises BadSuite for a file that cannot be read or lacks a column.
    """
    found = {}
    for name, file in (("sobirl_tabular", "curves.csv"), ("blpo_tabular", "table.csv")):
        path = results_folder / name / file
        if not path.exists():
            continue
        try:
            rows = pd.read_csv(path)
            if name == "sobirl_tabular":
                rows = rows.loc[rows.groupby(["problem", "method", "seed"])["iteration"].idxmax()]
                found[name] = rows.pivot(index=["problem", "seed"], columns="method", values="objective")
            else:
                rows = rows[(rows["figure"] == "critics") & (rows["panel"] == "garnet")].astype({"x": int})
                found[name] = rows.pivot(index=["x", "seed"], columns="series", values="value")
        except (OSError, ValueError, KeyError) as error:
            raise BadSuite(f"{path} cannot be read: {error}; run {name}.py again") from None
    return found


def paired(exact: pd.DataFrame, row: object, better: str, than: str) -> Comparison:
    """Two methods on one problem, by instance."""
    return compare([((exact.loc[row][better] - exact.loc[row][than]).to_numpy(),)])


def exact_lines(exact: dict[str, pd.DataFrame]) -> list[str]:
    """The tables of the exact results."""
    lines = ["## Where everything is exact", ""] if exact else []
    if "sobirl_tabular" in exact:
        objectives = exact["sobirl_tabular"]
        names = {
            "sobirl": "SoBiRL",
            "m-sobirl": "M-SoBiRL",
            "one-step": "one step",
            "x-only": "x-only control",
        }
        rows = []
        for problem, medians in objectives.groupby(level=0).median()[list(names)].iterrows():
            p = paired(objectives, problem, "sobirl", "x-only").p
            rows.append([problem, *(f"{value:.3f}" for value in medians), probability(p)])
        lines += [
            "**SoBiRL** ([docs](sobirl.md#what-came-out)): the objective at the end, median over instances,"
            " **lower is better**; the x-only control leaves out how the lower level's policy answers the"
            " reward. p: SoBiRL against it, by instance.",
            "",
            *table(["problem", *names.values(), "p"], rows),
        ]
    if "blpo_tabular" in exact:
        means = exact["blpo_tabular"].groupby(level=0).mean()
        names = {"nested": "partial gradient (nested)", "BLPO": "total derivative (BLPO)"}
        names |= {"constant": "constant weights", "permuted": "permuted weights"}
        rows = [[label, *(f"{value:.3f}" for value in means[name])] for name, label in names.items()]
        lines += [
            "**BLPO** ([docs](blpo.md#where-the-hypergradient-matters)): fraction of the optimal return, mean"
            " over Garnet MDPs, by the number of the critic's features; the leader looks one step ahead.",
            "",
            *table(["features", *map(str, means.index)], rows),
        ]
    return lines


# ---- A suite -----------------------------------------------------------------------------------------------
def returns_cell(suite: Suite, results: Results, name: str, environment: str) -> str:
    """mean ± standard deviation, and how many of the runs collapsed."""
    values = returns(results, name, environment)
    if not len(values):
        return "-"
    text = number(values.mean()) + (f" ± {number(values.std())}" if len(values) > 1 else "")
    fell, began = collapses(suite, results, name, environment) if levels(suite, environment) else (0, 0)
    return f"{text}; {fell}/{began} collapsed" if fell else text


def suite_table(suite: Suite, results: Results, compared: Comparisons) -> list[str]:
    """A row a method: its returns, its score over the tasks, and the comparisons that are made of it. Methods
    and tasks without runs wait for them; failed runs count as runs."""
    begun = {(job.method, job.environment) for job in suite.shown() if job.name in results.failed}
    begun |= set(zip(results.runs["method"], results.runs["environment"]))
    methods = [name for name in suite.methods if any((name, each) in begun for each in suite.environments)]
    tasks = [each for each in suite.environments if any((name, each) in begun for name in methods)]
    ends = {each: levels(suite, each) for each in tasks}
    scored = [each for each in ends if ends[each]]
    pooled, against, rows = suite.aggregate and len(scored) > 1, {}, []
    for claim in claims.claims(suite):
        if claim.better not in methods or claim.than not in methods:
            continue
        time = claim.measure == "time"
        label = suite.methods[claim.than].label + ("" if time else OVER[claim.over])
        for task in [None] if suite.aggregate or time else compared.environments(claim):
            verdict, evidence = judged(compared, claim, task)
            where = f" on {short(task)}" if task and len(tasks) > 1 else ""
            against.setdefault(claim.better, []).append(f"{verdict}, against {label}{where}: {evidence}")
    for name in methods:
        method = suite.methods[name]
        runs = spread(len(results.of(name, each)) for each in method.environments if each in tasks)
        cells = [
            method.label,
            runs,
            *(returns_cell(suite, results, name, each) for each in tasks),
        ]
        if pooled:
            means = [scores(suite, results, name, each) for each in scored]
            cells.append(f"{np.mean([each.mean() for each in means]):.2f}" if all(map(len, means)) else "-")
        rows.append(cells + ["<br>".join(against.get(name, []))] * bool(against))
    scale = [" / ".join(map(number, ends[each])) if ends[each] else "-" for each in tasks]
    rows.append(["*score 0 / 1*", "", *scale, *[""] * (pooled + bool(against))])
    head = ["final return", "n", *map(short, tasks)]
    return table(head + ["score"] * pooled + ["comparisons"] * bool(against), rows)


def first_sentence(suite: Suite) -> str:
    """Of the description; the rest is in the suite's file."""
    return re.split(r"(?<=[.?]) (?=[A-Z])", " ".join(suite.description.split()))[0]


def provenance(suite: Suite, results: Results) -> str:
    """Where the runs came from, and what was out of the ordinary."""
    runs = results.runs
    commits = zip(runs["commits"], runs["dirty"])
    commits = {
        f"{(commit or 'unknown')[:10]}{'+' * bool(dirty)}" for each, dirty in commits for commit in each
    }
    machines = {", ".join(filter(None, each)) for each in runs[["cpu", "gpu"]].fillna("").to_numpy()}
    seeds = " ".join(map(str, sorted(runs["seed"].unique())))
    words = [f"{len(runs)} runs", f"seeds {seeds}", f"{spread(runs['steps'])} steps"]
    words += [f"commits {', '.join(sorted(commits))}", *sorted(machines), *mixed_terms(suite, runs)]
    untimed = {method.untimed for method in suite.methods.values() if method.untimed}
    words += [f"no times: {'; '.join(sorted(untimed))}"] if untimed else []
    taken = [f"{method.label} ({method.runs_of[0]})" for method in suite.methods.values() if method.runs_of]
    words += [f"runs of other suites: {', '.join(taken)}"] if taken else []
    for what, jobs in (
        ("in more than one attempt", runs[runs["attempts"] > 1]["job"]),
        ("diverged", runs[runs["diverged"]]["job"]),
        ("stopped learning", runs[runs["dead"]]["job"]),
        ("without the end of an episode in the last tenth", runs[runs["final_return"].isna()]["job"]),
        ("missing", results.missing),
        ("of these failed", results.failed),
        ("left out, not of the suite any more", results.ignored),
    ):
        names = f": {', '.join(jobs)}" if len(jobs) <= 3 else ""
        words += [f"{len(jobs)} {what}{names}"] if len(jobs) else []
    return "; ".join(words + ([f"**mixed**: {'; '.join(results.mixed)}"] if results.mixed else []))


def mixed_terms(suite: Suite, runs: pd.DataFrame) -> list[str]:
    """How the BLPO runs read the mixed term of the hypergradient (docs/blpo.md), and whose if they differ.

    Before `mixed_discount` was an argument of all scripts the term was the former one.
    """
    found: dict[str, dict[str, None]] = {}
    for run in runs.itertuples():
        own = run.arguments
        if not run.script.startswith("blpo") or own.get("ihvp", "none") == "none":
            continue
        reading = "exact" if own.get("mixed_discount") is None else f"κ = {own['mixed_discount']:g}"
        if own.get("leader") == "released":
            reading = "as released"
        elif "mixed_discount" not in own or "mixed_term" in own:
            reading = "along the trajectory" if own.get("mixed_term") == "trajectory" else "the former one"
        found.setdefault(reading, {})[suite.methods[run.method].label] = None
    readings = {reading: f" ({', '.join(who)})" if len(found) > 1 else "" for reading, who in found.items()}
    return [f"mixed term: {reading}{who}" for reading, who in readings.items()]


def without_dead(suite: Suite, results: Results) -> list[str]:
    """The comparisons again without the runs that had stopped learning."""
    dead, words = results.runs[results.runs["dead"]], []
    living = Comparisons(suite, results.without(dead["job"]))
    for claim in claims.claims(suite) if len(dead) else ():
        pair = " against ".join(suite.methods[name].label for name in (claim.better, claim.than))
        if {claim.better, claim.than} & set(dead["method"]) and living.of(claim) is not None:
            words.append(
                f"{pair}{OVER[claim.over]}: {', '.join(judged(living, claim)).split(', excludes')[0]}"
            )
    return [f"Without the runs with a {suite.dead.words}: {'; '.join(words)}.", ""] if words else []


def suite_lines(suite: Suite, results: Results, compared: Comparisons, folder: Path, out: Path) -> list[str]:
    """The section of one suite. A line where nothing is compared and no single method held to a level, and
    where the suite's results are told on another page."""

    def linked(path: Path) -> str:
        return Path(os.path.relpath(path, out.parent)).as_posix()

    about = f"{first_sentence(suite)} [Rule and settings]({linked(suite.path)}), [data]({linked(folder)})."
    found = [compared.of(claim) for claim in claims.claims(suite)]
    compares = len(suite.methods) == 1 or any(each is not None and each.runs[0] >= LEAST for each in found)
    if suite.told or not compares:
        own = sum(suite.methods[method].runs_of is None for method in results.runs["method"])
        told = f" [What came out]({linked(ROOT / suite.told)})." if suite.told else ""
        return [f'- <a id="{suite.name}"></a>**{suite.name}**, {own} runs: {about}{told}']
    picture = folder / "results.png"
    lines = [f"## {suite.name}", "", about, "", *suite_table(suite, results, compared)]
    lines += [f"![{suite.name}]({linked(picture)})", ""] if picture.exists() else []
    return [*lines, *without_dead(suite, results), f"*{provenance(suite, results)}.*", ""]


# ---- The page ----------------------------------------------------------------------------------------------
def report(suites: Iterable[Suite], results_folder: Path, out: Path) -> None:
    """Write the page of these suites, the headline first, to `out`. Raises BadSuite, before anything is
    written."""
    if not out.parent.is_dir() or out.is_dir():
        what = "that is a folder, not a file" if out.is_dir() else f"there is no folder {out.parent}"
        raise BadSuite(f"--output is {out}, but {what}")
    judges, sections, exact = {}, [], exact_results(results_folder)
    for suite in sorted(suites, key=lambda suite: not suite.headline):
        folder = results_folder / suite.name
        if suite.scratch or not (folder / "runs.json").exists():
            continue
        results = load_results(suite, results_folder)
        if len(results.runs):
            judges[suite.name] = Comparisons(suite, results)
            sections.append(suite_lines(suite, results, judges[suite.name], folder, out))
    if not judges:
        raise BadSuite(f"--results is {results_folder}, which has no results of any suite; collect one first")
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmark report` from `benchmark/results/`; do not edit.",
        "",
    ]
    lines += [*top_lines(judges, exact), "## The rule", "", claims.RULE, "", *exact_lines(exact)]
    quiet = [line for section in sections if len(section) == 1 for line in section]
    lines += [line for section in sections if len(section) > 1 for line in section]
    lines += ["## Suites that compare nothing, or are told on another page", "", *quiet] if quiet else []
    try:
        write_atomically(out, lambda new: new.write_text("\n".join(lines).rstrip() + "\n"))
    except OSError as error:
        raise BadSuite(f"{out} cannot be written: {error.strerror}") from None
