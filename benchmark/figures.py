"""The figure of a suite, from its committed results alone.

`results.png` has the learning curves, a panel an environment (of many methods a row for each group): every
run as a thin line, the mean, and Student's 95 % interval from five runs on; or, of a suite with `sweep`, the
final returns over that argument. Below are the suite's
comparisons, pooled and each task alone (`benchmark/statistics.py`), and wall-clock times over the first
baseline's, where they were taken. The same results and the same matplotlib give bitwise the same file.
"""

import json
import math
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from benchmark import claims
from benchmark.data import Results, load_results
from benchmark.machine import write_atomically
from benchmark.markdown import short, spread
from benchmark.scores import OVER, Comparisons, levels, log_times, shared_environments
from benchmark.statistics import LEAST, Comparison, compare, mean_interval
from benchmark.suites import BadSuite, Suite

PAPER = Path(__file__).parent / "paper.json"
# Okabe and Ito's colours, which colour-blind readers can tell apart; their yellow is too faint on white.
CODES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
COLOURS = dict(zip(("blue", "orange", "green", "red", "purple", "sky", "black"), CODES))
DASHES = {"": "-", "dashed": (0, (4, 1.5)), "dotted": (0, (1, 1.2)), "dash-dotted": (0, (5, 1.2, 1, 1.2))}
# A method, or the last word of its name, has one look in all suites: the baseline blue, its control without
# the leader's correction orange, the method itself green. Others get the next look that is free.
LOOKS = {
    "blue": "ppo ac-80 sequential ground-truth",
    "orange": "nested plain-80 simultaneous drlhf",
    "green": "blpo stac-80 actor sobirl",
    "red": "authors released-80 critic",
    "purple": "blpo-cg paper pbrl l0-trajectory-gamma",
    "sky": "blpo-exact ppo-separate hpgd l0-trajectory ac-80-twice",
    "black": "blpo-pcg stac-80-gauss-newton",
    "blue dashed": "ac-1 ppo95",
    "orange dashed": "one-step plain-1",
    "green dashed": "stac-1",
    "red dashed": "constant",
    "purple dashed": "permuted blpo-cg-50",
    "sky dashed": "ppo-critic-lr ac-1-twice",
    "black dashed": "frozen stac-1-gauss-newton",
    "blue dotted": "ac-settings-80 ppo0",
    "orange dotted": "plain-80-gauss-newton",
    "green dotted": "sobirl-rollouts",
    "red dotted": "released-settings-80",
    "green dash-dotted": "nested-entropy",
}
TOGETHER = 7  # methods in one panel; more are drawn in groups
SETTINGS = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 130,
}
WIDTH = 9.6  # inches: of a figure
PANEL, LINE = 2.1, 0.135  # of a panel of curves and of a line of a comparison, how high
Block = tuple[str, str, list[tuple[str, Comparison]], float]  # title, colour, labelled rows, a paper's number


def looks(suite: Suite) -> dict[str, tuple]:
    """Method -> colour and dash. The method that NAME-nested is the control of looks like BLPO."""
    known = {name: look for look, names in LOOKS.items() for name in names.split()}
    roles = {name: "blpo" if f"{name}-nested" in suite.methods else name for name in suite.methods}
    chosen = {name: known.get(role) or known.get(role.split("-")[-1]) for name, role in roles.items()}
    every = [f"{colour} {dash}".strip() for dash in DASHES for colour in COLOURS]
    free = iter([look for look in every if look not in chosen.values()] + every)
    parts = {name: (look or next(free)).partition(" ") for name, look in chosen.items()}
    return {name: (COLOURS[colour], DASHES[dash]) for name, (colour, _, dash) in parts.items()}


def groups(names: list[str]) -> list[list[str]]:
    """The methods that share panels: all if they are few, else those whose names begin with the same word,
    and the lone ones together."""
    if len(names) <= TOGETHER:
        return [names]
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split("-")[0], []).append(name)
    lone = [group[0] for group in found.values() if len(group) == 1]
    return [group for group in (lone, *found.values()) if len(group) > 1 or group is lone and group]


# ---- Curves ------------------------------------------------------------------------------------------------
def draw_curves(axes, curves: pd.DataFrame, colour: str, dash) -> None:
    """The runs of a method, one column each; their mean where all have a value."""
    axes.plot(curves.index, curves.to_numpy(), color=colour, linestyle=dash, linewidth=0.5, alpha=0.35)
    whole = curves.dropna()
    if whole.shape[1] > 1:
        axes.plot(whole.index, whole.mean(axis=1), color=colour, linestyle=dash, linewidth=1.5)
    if whole.shape[1] >= claims.LEAST:
        band = mean_interval(whole.to_numpy().T)
        axes.fill_between(whole.index, *band, color=colour, alpha=0.13, linewidth=0)


def is_early(drawn: list[pd.DataFrame]) -> bool:
    """Whether every method has made nine tenths of its way within the first eighth of the steps."""
    late, ways = [], []
    for curves in drawn:
        mean = curves.mean(axis=1).dropna()
        away = (mean - mean.iloc[-1]).abs()
        ways.append(mean.max() - mean.min())
        late.append(away[mean.index > mean.index[-1] / 8].max() > 0.1 * ways[-1])
    return max(ways, default=0) > 0 and not any(late)


def draw_environment(axes, suite: Suite, results: Results, environment: str, names: list[str]) -> bool:
    """One panel of curves; returns whether it has the reference level. The axis of steps is logarithmic where
    everything happens at its beginning."""
    drawn = [
        (name, results.curves_of(name, environment)) for name in names if len(results.of(name, environment))
    ]
    drawn = [(name, curves) for name, curves in drawn if curves.notna().to_numpy().any()]
    for name, curves in drawn:
        draw_curves(axes, curves, *looks(suite)[name])
    axes.set(title=environment.rpartition(":")[2], xlabel="environment steps")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if is_early([curves for _, curves in drawn]):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _, level = levels(suite, environment) or (0, math.nan)
    shown = axes.get_ylim()[0] < level < axes.get_ylim()[1] or len(suite.methods) == 1
    if shown:
        axes.axhline(level, color="0.35", linestyle=DASHES["dotted"], linewidth=1)
    return shown


def draw_group(part: SubFigure, suite: Suite, results: Results, names: list[str], width: float) -> None:
    """The panels of some methods, and their legend with the numbers of runs."""
    entries = {}
    for name in names:
        tasks = [each for each in environments_of(suite, results) if each in suite.methods[name].environments]
        counts = spread(len(results.of(name, each)) for each in tasks)
        entries[f"{suite.methods[name].label} (n={counts})"] = looks(suite)[name]
    draw_panels(part, suite, results, draw_environment, names, entries, width)


def draw_panels(
    part: SubFigure, suite: Suite, results: Results, draw: Callable, what, entries: dict, width: float
) -> None:
    """A panel an environment, three in a row, each by `draw`, which returns whether it has the reference
    level; and the legend, of labels with their colour and dash."""
    environments = environments_of(suite, results)
    rows, columns = math.ceil(len(environments) / 3), min(3, len(environments))
    axes = part.subplots(rows, columns, squeeze=False).ravel()
    drawn = [draw(panel, suite, results, each, what) for panel, each in zip(axes, environments)]
    for spare in axes[len(environments) :]:
        spare.remove()
    axes[0].set_ylabel("episodic return")
    if any(drawn):
        entries = entries | {"reference level": ("0.35", DASHES["dotted"])}
    lines = [Line2D([], [], color=colour, linestyle=dash) for colour, dash in entries.values()]
    columns = legend_columns(entries, width)
    part.legend(lines, entries, loc="outside lower center", ncols=columns, handlelength=2.4)


def environments_of(suite: Suite, results: Results) -> list[str]:
    """Those that have runs, in the suite's order."""
    return [each for each in suite.environments if (results.runs["environment"] == each).any()]


def legend_columns(labels: Iterable[str], width: float) -> int:
    """How many of these entries fit side by side into so many inches."""
    return max(1, min(5, int(width / (0.6 + 0.062 * max(map(len, labels))))))


# ---- A sweep -----------------------------------------------------------------------------------------------
def families(suite: Suite, results: Results) -> dict[str, dict[float, str]]:
    """The lines of a sweep: a label, and the method at each value of the argument; those of a line differ in
    that argument alone, and their label is the first one's up to its last comma, or the whole of it where a
    line has that already. Raises BadSuite."""
    found: dict[str, dict[float, str]] = {}
    for name, method in suite.methods.items():
        runs = results.runs[results.runs["method"] == name]
        if len(runs):
            arguments = dict(runs["arguments"].iloc[0])
            value = arguments.pop(suite.sweep.replace("-", "_"), None)
            if not isinstance(value, int | float):
                lacks = f"{suite.sweep!r}, which is no number among the arguments of the runs of {name}"
                raise BadSuite(f"{suite.name}: sweep is {lacks}")
            found.setdefault(json.dumps([method.script, arguments], sort_keys=True), {})[value] = name
    lines: dict[str, dict[float, str]] = {}
    for line in found.values():
        whole = suite.methods[next(iter(line.values()))].label
        label = whole.rsplit(",", 1)[0]
        lines[whole if label in lines else label] = dict(sorted(line.items()))
    return lines


def draw_values(axes, suite: Suite, results: Results, environment: str, lines: dict) -> bool:
    """One panel of a sweep: every run's final return as a dot, their mean, and Student's 95 % interval."""
    for methods in lines.values():
        colour, dash = looks(suite)[next(iter(methods.values()))]
        runs = {value: results.of(name, environment)["final_return"] for value, name in methods.items()}
        runs = {value: returns.to_numpy() for value, returns in runs.items() if len(returns)}
        for value, returns in runs.items():
            axes.plot([value] * len(returns), returns, ".", color=colour, alpha=0.35, markersize=3)
            if len(returns) >= claims.LEAST:
                axes.plot([value, value], mean_interval(returns[:, None]), color=colour, linewidth=1)
        means = [returns.mean() for returns in runs.values()]
        axes.plot(list(runs), means, marker="o", color=colour, linestyle=dash, linewidth=1.5, markersize=4)
    values = sorted({value for methods in lines.values() for value in methods})
    axes.set(title=environment.rpartition(":")[2], xlabel=suite.sweep)
    above = [value for value in values if value > 0]
    if values[0] >= 0 and above and 8 * above[0] < values[-1]:  # a 0 gets a place left of the logarithm's
        room = {} if values[0] else {"linthresh": above[0], "linscale": 0.5}
        axes.set_xscale("symlog" if room else "log", **room)
    axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    return False


def draw_sweep(part: SubFigure, suite: Suite, results: Results, lines: dict, width: float) -> None:
    """The panels of a sweep, and their legend."""
    entries = {label: looks(suite)[next(iter(methods.values()))] for label, methods in lines.items()}
    draw_panels(part, suite, results, draw_values, lines, entries, width)


# ---- Comparisons -------------------------------------------------------------------------------------------
def blocks_of_returns(suite: Suite, compared: Comparisons) -> list[Block]:
    """A block a comparison of returns: pooled, where the suite pools its tasks, then each task alone."""
    blocks = []
    for claim in claims.claims(suite):
        pooled = compared.of(claim)
        if claim.measure == "time" or pooled is None or pooled.runs[0] < LEAST:
            continue
        tasks = compared.environments(claim)
        rows = [(short(each), compared.of(claim, each)) for each in tasks]
        rows = [("all", pooled), *rows] if suite.aggregate else rows
        pair = (suite.methods[name].label for name in (claim.better, claim.than))
        title = f"{' − '.join(pair)}{OVER[claim.over]} (n={spread(pooled.runs)})"
        rows = rows if len(tasks) > 1 else [("", pooled)]
        blocks.append((title, looks(suite)[claim.better][0], rows, math.nan))
    return blocks


def blocks_of_times(suite: Suite, results: Results) -> list[Block]:
    """A block a method that was timed: logarithm of its time over the first baseline's; the paper's."""
    blocks, base = [], suite.baselines[0] if suite.baselines else None
    for name in suite.methods if base else ():
        tasks = {
            each: log_times(results, name, base, each) for each in shared_environments(suite, name, base)
        }
        tasks = {each: [(values,)] for each, values in tasks.items() if len(values)}
        if name != base and tasks:
            pooled = compare([task for each in tasks.values() for task in each])
            rows = [("all", pooled), *((short(each), compare(task)) for each, task in tasks.items())]
            title = f"{suite.methods[name].label} (n={spread(pooled.runs)})"
            blocks.append((title, looks(suite)[name][0], rows, paper_ratio(name, list(tasks))))
    return blocks


def paper_ratio(method: str, environments: list[str]) -> float:
    """The logarithm of the paper's time over its PPO's, mean over these environments; nan if one is not
    there."""
    paper = json.loads(PAPER.read_text())
    mine, base = (paper["columns"].get(name) for name in (method, "ppo"))
    times = [paper["wall_time_s"].get(each, {}) for each in environments]
    return float(np.mean([math.log(row[mine] / row[base]) if mine in row else math.nan for row in times]))


def draw_blocks(axes, blocks: list[Block], height: float, limit: float, ratios: bool) -> None:
    """Some blocks under one another; intervals end where the axis does."""
    y, ticks, value = 0.0, {}, np.exp if ratios else float
    for title, colour, rows, theirs in blocks:
        words = axes.text(0.01, y - 0.5, title, transform=axes.get_yaxis_transform(), fontsize=7, va="top")
        words.set(bbox={"color": "white", "alpha": 0.7, "pad": 0.3}, linespacing=1.0, in_layout=False)
        y += title.count("\n")
        axes.plot(value(theirs), y + 1, "D", color="black", markersize=4, markerfacecolor="none", zorder=3)
        for label, found in rows:
            y += 1
            ticks[y] = label
            ends = [value(end) for end in np.clip((found.low, found.high), -9, 9)]
            thick, dot = (2.2, 5) if label in ("all", "") else (1.0, 3)
            axes.plot(ends, [y, y], color=colour, linewidth=thick, solid_capstyle="butt")
            axes.plot(value(found.estimate), y, "o", color=colour, markersize=dot)
        y += 1.3
    axes.axvline(value(0), color="0.4", linewidth=0.8, zorder=1)
    if not ratios:
        axes.axvspan(-claims.MARGIN, claims.MARGIN, color="0.93", zorder=0)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0.95, limit) if ratios else (-limit, limit), ylim=(height - 0.6, -0.8))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)


def in_columns(blocks: list[Block]) -> list[list[Block]]:
    """The blocks in at most three columns, titles broken to fit."""
    columns = min(3, len(blocks))
    width = letters(columns, max(len(label) for _, _, rows, _ in blocks for label, _ in rows))
    broken = [(textwrap.fill(title, width, break_on_hyphens=False), *rest) for title, *rest in blocks]
    each = math.ceil(len(blocks) / columns)
    return [broken[start : start + each] for start in range(0, len(blocks), each)]


def letters(columns: int, ticks: int = 0) -> int:
    """How many of the small letters fit into one of so many columns, beside labels of so many."""
    return int((WIDTH / columns - max(0.6, 0.06 * ticks)) / 0.053)


def tallest(columns: list[list[Block]]) -> float:
    """How many lines the longest column has."""
    return max(sum(title.count("\n") + len(rows) + 1.3 for title, _, rows, _ in each) for each in columns)


def draw_comparisons(part: SubFigure, columns: list[list[Block]], label: str, ratios: bool) -> None:
    """Blocks beside one another, on one scale: every estimate is on it, and most of the pooled intervals."""
    blocks = [block for column in columns for block in column]
    dots = [found.estimate for _, _, rows, _ in blocks for _, found in rows] + [
        theirs for *_, theirs in blocks
    ]
    if ratios:
        limit = 1.1 * math.exp(np.nanmax(dots))
    else:
        ends = [abs(end) for _, _, rows, _ in blocks for end in (rows[0][1].low, rows[0][1].high)]
        limit = 1.15 * max(0.13, np.nanmax(np.abs(dots)), min(0.9, max(ends)))
    axes = part.subplots(1, len(columns), squeeze=False).ravel()
    for panel, column in zip(axes, columns):
        draw_blocks(panel, column, tallest(columns), limit, ratios)
        panel.set_xlabel(textwrap.fill(label, letters(len(columns)) * 2 // 3))


# ---- The figure --------------------------------------------------------------------------------------------
def results_figure(suite: Suite, results: Results) -> Figure:
    """Curves, comparisons and times under one another."""
    present = set(results.runs["method"])
    shown = [name for name in suite.methods if name in present and name in (suite.figures or present)]
    lines = families(suite, results) if suite.sweep else {}
    environments, some = len(environments_of(suite, results)), [[*lines]] if lines else groups(shown)
    beside = min(2, len(some)) if environments == 1 else 1  # groups in a row
    width = WIDTH / 2 if environments == len(shown) == 1 else WIDTH / beside
    rows: list[tuple[float, list]] = []  # inches high, and what draws each part: a function and its arguments
    for start in range(0, len(some), beside):
        here = some[start : start + beside]
        labels = lines or [suite.methods[name].label + " (n=10)" for name in shown]
        entries = math.ceil((1 + max(map(len, here))) / legend_columns(labels, width))
        height = math.ceil(environments / 3) * PANEL + 0.35 + 0.17 * entries
        draws = [(draw_group, suite, results, names, width) for names in here]
        rows.append((height, [(draw_sweep, suite, results, lines, width)] if lines else draws))
    baseline = suite.methods[suite.baselines[0]].label if suite.baselines else ""
    compared = Comparisons(suite, results)
    for blocks, label, ratios in (
        (blocks_of_returns(suite, compared), "score difference (grey: ±0.1)", False),
        (blocks_of_times(suite, results), f"time / {baseline} (diamond: the paper's)", True),
    ):
        if blocks:
            columns = in_columns(blocks)
            rows.append((LINE * tallest(columns) + 0.55, [(draw_comparisons, columns, label, ratios)]))
    heights = [height for height, _ in rows]
    figure = Figure(figsize=(beside * width, sum(heights)), layout="constrained")
    for part, (_, draws) in zip(
        figure.subfigures(len(rows), height_ratios=heights, squeeze=False).ravel(), rows
    ):
        inner = part.subfigures(1, beside, squeeze=False).ravel() if draws[0][0] is draw_group else [part]
        for each, (draw, *words) in zip(inner, draws):
            draw(each, *words)
    return figure


def plot(suite: Suite, results_folder: Path) -> list[Path]:
    """Draw the suite's figure into `results_folder/SUITE/`; returns the files. Raises BadSuite."""
    path = results_folder / suite.name / "results.png"
    results = load_results(suite, results_folder)
    if not len(results.runs):
        raise BadSuite(f"{path.parent} has no runs of the suite {suite.name}; collect it first")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # so that nobody's matplotlibrc changes a committed figure
        matplotlib.rcParams.update(SETTINGS)
        figure = results_figure(suite, results)
        try:
            write_atomically(path, lambda new: figure.savefig(new, format="png", metadata={"Software": None}))
        except OSError as error:
            raise BadSuite(f"{path} cannot be written: {error.strerror}") from None
    return [path]
