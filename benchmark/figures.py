"""Figures of a suite, from its committed results alone (`benchmark/results/SUITE/runs.json` and one csv a run).

Every band and bar is a 95 % interval, stratified bootstrap over seeds (`benchmark/statistics.py`). The same results and the
same matplotlib give bitwise the same files. A method has one colour, dash and hatch in all figures of all suites: STYLES.
"""

import math
import zlib
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmark import statistics
from benchmark.reference import load_reference, normalise
from benchmark.scores import (
    Results, compared_environments, count, is_aggregated, load_results, normalised_scores, pooled_methods, time_pairs, time_ratio,
)  # fmt: skip
from benchmark.suites import Suite

# Okabe and Ito's colours, which colour-blind readers can tell apart; their yellow is too faint for a line on white.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
SOLID, DASHED, DOTTED, DASHDOT = "-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))
HATCHES = {SOLID: None, DASHED: "////", DOTTED: "....", DASHDOT: "xxxx"}
# method -> colour, dash. A new method gets a line here as soon as its figures are shown to anybody. In all suites the baseline is
# blue, its control without the leader's correction orange, the method itself green; no two methods of one suite look the same.
STYLES = {
    "ppo": (BLUE, SOLID),
    "nested": (ORANGE, SOLID),
    "blpo": (GREEN, SOLID),
    "authors": (VERMILION, SOLID),
    "blpo-cg": (PURPLE, SOLID),
    "blpo-exact": (SKY, SOLID),
    "blpo-pcg": (BLACK, SOLID),
    "ppo-critic-lr": (SKY, DASHED),
    "ppo-equal-steps": (BLACK, DASHED),
    "permuted": (PURPLE, DASHED),
    "constant": (VERMILION, DASHED),
    "one-step": (ORANGE, DASHED),
    "trajectory": (GREEN, DASHED),
    "reversed": (BLUE, DASHED),
    "nested-entropy": (GREEN, DASHDOT),
    "ppo-separate": (SKY, SOLID),
    "blpo-cg-50": (PURPLE, DASHED),
    "l0-trajectory": (BLUE, DOTTED),
    "l0-constant": (BLUE, DASHDOT),
    "l095-constant": (GREEN, DASHDOT),
    # Stackelberg actor-critic
    "ac-80": (BLUE, SOLID),
    "ac-1": (BLUE, DASHED),
    "ac-settings-80": (BLUE, DOTTED),
    "plain-80": (ORANGE, SOLID),
    "plain-1": (ORANGE, DASHED),
    "stac-80": (GREEN, SOLID),
    "stac-1": (GREEN, DASHED),
    "stac-80-gauss-newton": (BLACK, SOLID),
    "stac-1-gauss-newton": (BLACK, DASHED),
    "plain-80-gauss-newton": (ORANGE, DOTTED),
    "released-80": (VERMILION, SOLID),
    "released-settings-80": (VERMILION, DOTTED),
    "sequential": (BLUE, SOLID),
    "simultaneous": (ORANGE, SOLID),
    "actor": (GREEN, SOLID),
    "critic": (VERMILION, SOLID),
    "paper": (PURPLE, SOLID),
    # SoBiRL
    "ground-truth": (BLUE, SOLID),
    "drlhf": (ORANGE, SOLID),
    "sobirl": (GREEN, SOLID),
    "pbrl": (PURPLE, SOLID),
    "hpgd": (SKY, SOLID),
    "sobirl-permuted": (PURPLE, DASHED),
    "frozen": (BLACK, DASHED),
    "ground-truth-endless": (BLUE, DOTTED),
    "drlhf-endless": (ORANGE, DOTTED),
    "sobirl-endless": (GREEN, DOTTED),
}
for name, colour in {"0": BLUE, "05": SKY, "09": ORANGE, "095": GREEN, "1": VERMILION}.items():  # lambda, with the correction and without
    STYLES |= {f"{arm}{name}": (colour, SOLID) for arm in ("l", "both")}
    STYLES |= {f"{arm}{name}-nested": (colour, DASHED) for arm in ("l", "both")}
LABELS = "bilevel/labels"  # the column that says how many labels a run has asked for so far
FALLBACKS = [(colour, dash) for dash in (DOTTED, DASHDOT) for colour in COLOURS]

SETTINGS = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
    "legend.frameon": False, "hatch.linewidth": 0.6, "pdf.fonttype": 42, "pdf.compression": 6, "savefig.dpi": 130,
}  # fmt: skip
PNG_METADATA = {"Software": None}
PDF_METADATA = {"Creator": None, "Producer": None, "CreationDate": None}
TIME_POINTS = 200  # of a curve against time


# ---- Looks -----------------------------------------------------------------------------------------------------
def styles(suite: Suite) -> dict[str, tuple]:
    """Method -> (colour, dash): from STYLES, else one that its name decides, or the next one that is free in this suite."""
    taken = {STYLES[name] for name in suite.methods if name in STYLES}
    chosen = {}
    for name in suite.methods:
        if name in STYLES:
            chosen[name] = STYLES[name]
            continue
        first = zlib.crc32(name.encode())
        slots = [FALLBACKS[(first + offset) % len(FALLBACKS)] for offset in range(len(FALLBACKS))]
        chosen[name] = next((slot for slot in slots if slot not in taken), slots[0])
        taken.add(chosen[name])
    return chosen


def panels(number: int, width: float, height: float) -> tuple[Figure, list]:
    """A figure with so many axes, at most four in a row; `width` and `height` of one, in inches."""
    columns = number if number <= 3 else min(4, math.ceil(number / 2))
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(max(width * columns, 4.6), height * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in axes[number:]:
        spare.remove()
    return figure, list(axes[:number])


def add_legend(figure: Figure, handles: dict[str, object]) -> None:
    """One legend for all axes, under them, with as many columns as fit; label -> what it names. The figure grows by it."""
    width, height = figure.get_size_inches()
    size = FontProperties(size=matplotlib.rcParams["legend.fontsize"]).get_size_in_points()
    # of each entry: its line (2.6 of the font's size), its text, and what matplotlib leaves free around them (0.8 and 2)
    inches = [(5.4 * size + TextPath((0, 0), label, size=size).get_extents().x1) / 72 for label in handles]
    widths = {number: sum(max(column) for column in np.array_split(inches, number)) for number in range(1, len(inches) + 1)}
    columns = max(number for number in widths if number == 1 or widths[number] <= width)
    figure.set_size_inches(width, height + 0.2 + 0.19 * math.ceil(len(handles) / columns))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, handlelength=2.6)


def short_steps(value: float, _=None) -> str:
    """1500000 -> 1.5M."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def step_axis(axes) -> None:
    """Label and ticks of an axis of environment steps."""
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(short_steps))


def draw_band(axes, x: np.ndarray, interval: statistics.Interval, style: tuple):
    """A line with its band; returns the line."""
    colour, dash = style
    axes.fill_between(x, interval.low, interval.high, color=colour, alpha=0.15, linewidth=0)
    return axes.plot(x, interval.estimate, color=colour, linestyle=dash, linewidth=1.4)[0]


# ---- Curves on a common grid -----------------------------------------------------------------------------------
def on_steps(curves: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (points,) and returns (runs, points) from the first to the last step that every run has a value for.

    A run that has no row at another one's step has there the value before it.
    """
    known = [(each["global_step"], each["episodic_return"]) for each in curves]
    known = [(steps[~np.isnan(values)], values[~np.isnan(values)]) for steps, values in known]
    if any(len(steps) == 0 for steps, _ in known):
        return np.zeros(0), np.zeros((len(curves), 0))
    grid = np.unique(np.concatenate([steps for steps, _ in known]))
    grid = grid[(grid >= max(steps[0] for steps, _ in known)) & (grid <= min(steps[-1] for steps, _ in known))]
    return grid, np.array([values[np.searchsorted(steps, grid, side="right") - 1] for steps, values in known])


def on_labels(curves: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (points,) and returns (runs, points): a run's return at so many labels is that of its last row before it asked
    for more."""
    counted = [dict(each, global_step=np.where(np.isnan(each[LABELS]), 0.0, each[LABELS])) for each in curves]
    return on_steps(counted)


def on_minutes(curves: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Minutes (points,) and returns (runs, points), linear between the rows, while every run has values."""
    known = [(each["wall_time_s"] / 60, each["episodic_return"]) for each in curves]
    known = [(minutes[~np.isnan(values)], values[~np.isnan(values)]) for minutes, values in known]
    if any(len(minutes) == 0 for minutes, _ in known):
        return np.zeros(0), np.zeros((len(curves), 0))
    grid = np.linspace(max(minutes[0] for minutes, _ in known), min(minutes[-1] for minutes, _ in known), TIME_POINTS)
    return grid, np.array([np.interp(grid, minutes, values) for minutes, values in known])


def uses_labels(curve: dict[str, np.ndarray]) -> bool:
    """Whether a run was told any preferences."""
    return LABELS in curve and bool((curve[LABELS] > 0).any())


# ---- The figures -----------------------------------------------------------------------------------------------
def return_curves(suite: Suite, results: Results, against: str = "steps") -> Figure:
    """Mean episodic return with interval, one panel an environment, against "steps", wall-clock "minutes" or "labels".

    Against minutes a method's curve ends where its shortest run does; against labels there are those methods that use some.
    """
    environments = [each for each in suite.environments if any((name, each) in results.runs for name in suite.methods)]
    figure, axes = panels(len(environments), 3.3, 2.6)
    looks, lines, numbers = styles(suite), {}, {}
    for panel, environment in zip(axes, environments):
        for name in suite.methods:
            runs = results.runs.get((name, environment), [])
            if not runs or (against == "minutes" and suite.methods[name].untimed):
                continue
            curves = [results.curves[run["job"]] for run in runs]
            if against == "labels" and not all(uses_labels(each) for each in curves):
                continue
            x, returns = {"steps": on_steps, "minutes": on_minutes, "labels": on_labels}[against](curves)
            lines[name] = draw_band(panel, x, statistics.curve(statistics.mean, [returns]), looks[name])
            numbers.setdefault(name, []).append(len(runs))
        panel.set_title(environment)
        if against == "steps":
            step_axis(panel)
        else:
            panel.set_xlabel({"minutes": "wall-clock minutes", "labels": "labels asked for"}[against])
    for panel in axes:
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel("episodic return")
    shown = [name for name in suite.methods if name in lines]
    add_legend(figure, {f"{suite.methods[name].label} ({count(numbers[name])})": lines[name] for name in shown})
    return figure


def aggregate_curves(suite: Suite, results: Results) -> Figure:
    """Interquartile mean of normalised returns over environments and seeds, with interval, against steps.

    This and the next two figures need a method with runs on every compared environment.
    """
    figure, (axes,) = panels(1, 7.2, 3.4)
    looks, lines, levels = styles(suite), {}, load_reference()
    environments = compared_environments(suite)
    for name in pooled_methods(suite, results):
        tasks, numbers = [], []
        for environment in environments:
            runs = results.runs[name, environment]
            steps, returns = on_steps([results.curves[run["job"]] for run in runs])
            tasks.append([
                {"global_step": steps, "episodic_return": row} for row in normalise(environment, returns, levels)
            ])  # fmt: skip
            numbers.append(len(runs))
        steps, returns = on_steps([curve for task in tasks for curve in task])
        per_task = np.split(returns, np.cumsum(numbers)[:-1])
        line = draw_band(axes, steps, statistics.curve(statistics.iqm, per_task), looks[name])
        lines[f"{suite.methods[name].label} ({count(numbers)})"] = line
    step_axis(axes)
    axes.set_ylabel("normalised return, IQM")
    axes.set_title(f"{len(environments)} environments")
    add_legend(figure, lines)
    return figure


def performance_profiles(suite: Suite, results: Results) -> Figure:
    """Fraction of runs with a normalised final return above tau, with interval."""
    figure, (axes,) = panels(1, 7.2, 3.4)
    looks, lines, levels = styles(suite), {}, load_reference()
    environments = compared_environments(suite)
    scores = {name: normalised_scores(results, name, environments, levels) for name in pooled_methods(suite, results)}
    everything = np.concatenate([task for tasks in scores.values() for task in tasks])
    margin = 0.03 * max(np.ptp(everything), 0.1)
    taus = np.linspace(min(0.0, everything.min() - margin), everything.max() + margin, 201)
    for name, tasks in scores.items():
        line = draw_band(axes, taus, statistics.performance_profile(tasks, taus), looks[name])
        lines[f"{suite.methods[name].label} ({count([len(task) for task in tasks])})"] = line
    axes.set_xlabel("normalised final return τ")
    axes.set_ylabel("fraction of runs above τ")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(f"{len(environments)} environments")
    add_legend(figure, lines)
    return figure


def improvement(suite: Suite, results: Results) -> Figure:
    """Probability that a run of a method ends above a run of the baseline, with interval; one panel a baseline.

    The rows' names carry n, so this figure has no legend.
    """
    pooled = pooled_methods(suite, results)
    baselines = [name for name in suite.baselines if name in pooled]
    figure, axes = panels(len(baselines), 4.6, 0.9 + 0.28 * len(pooled))
    looks, levels = styles(suite), load_reference()
    environments = compared_environments(suite)
    scores = {name: normalised_scores(results, name, environments, levels) for name in pooled}
    numbers = {name: count([len(task) for task in scores[name]]) for name in pooled}
    for panel, baseline in zip(axes, baselines):
        others = [name for name in pooled if name != baseline]
        for row, name in enumerate(others):
            interval = statistics.stratified_bootstrap(statistics.probability_of_improvement, scores[name], scores[baseline])
            colour, dash = looks[name]
            # A dashed bar would hide where the interval ends: the dot tells two methods of one colour apart instead.
            panel.plot(interval[1:], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
            inside = colour if dash == SOLID else "white"
            panel.plot(interval.estimate, row, "o", color=colour, markersize=6, markerfacecolor=inside)
        panel.axvline(0.5, color="0.5", linewidth=0.8, zorder=1)
        panel.set_yticks(range(len(others)), [f"{suite.methods[name].label} ({numbers[name]})" for name in others])
        panel.set_ylim(len(others) - 0.4, -0.6)
        panel.set_xlim(-0.02, 1.02)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel(f"P(above {suite.methods[baseline].label}, {numbers[baseline]})")
    return figure


def runtime(suite: Suite, results: Results) -> Figure:
    """Wall-clock time over that of the first baseline, geometric mean over the pairs of equal environment and seed."""
    baseline, looks = suite.baselines[0], styles(suite)
    others = [name for name in suite.methods if name != baseline]
    pairs = {}
    for name in others:
        by_environment = {each: time_pairs(results, name, baseline, each) for each in suite.environments}
        pairs[name] = {each: ratios for each, ratios in by_environment.items() if len(ratios)}
    others = [name for name in others if pairs[name]]
    environments = [each for each in suite.environments if any(each in pairs[name] for name in others)]
    groups = [*environments, "all"] if len(environments) > 1 else environments
    width = min(0.8 / len(others), 0.3)
    figure, (axes,) = panels(1, min(max(4.6, 1.2 + 0.16 * len(others) * len(groups) + 0.75 * len(groups)), 13.0), 3.0)
    bars = {}
    for index, name in enumerate(others):
        colour, dash = looks[name]
        shared = [environment for environment in environments if environment in pairs[name]]
        places = {each: [pairs[name][each]] for each in shared}
        if len(environments) > 1 and shared == environments:  # a mean over fewer environments would not compare
            places["all"] = [pairs[name][each] for each in environments]
        intervals = [time_ratio(ratios) for ratios in places.values()]
        heights = np.array([interval.estimate for interval in intervals])
        ends = np.abs(np.array([interval[1:] for interval in intervals]).T - heights)
        x = [groups.index(group) + (index - (len(others) - 1) / 2) * width for group in places]
        drawn = axes.bar(
            x, heights, 0.92 * width, yerr=ends, color=colour, hatch=HATCHES[dash], edgecolor="white", linewidth=0,
            error_kw={"elinewidth": 0.9, "ecolor": "0.25", "capsize": min(2.5, 20 * width)},
        )  # fmt: skip
        bars[f"{suite.methods[name].label} ({count([len(pairs[name][each]) for each in shared])})"] = drawn
    line = axes.axhline(1, color=looks[baseline][0], linestyle=looks[baseline][1], linewidth=1.2)
    numbers = [len(results.runs[baseline, each]) for each in environments]
    bars = {f"{suite.methods[baseline].label} = 1 ({count(numbers)})": line} | bars
    crowded = len(groups) > 3
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xticks(range(len(groups)), groups, rotation=20 if crowded else 0, ha="right" if crowded else "center")
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(f"time / {suite.methods[baseline].label}")
    add_legend(figure, bars)
    return figure


def figures(suite: Suite, results: Results) -> dict[str, Figure]:
    """File name without suffix -> figure: those that the suite's kind and the runs it has allow, of the methods it shows."""
    methods = {name: method for name, method in suite.methods.items() if not suite.figures or name in suite.figures}
    suite = replace(suite, methods=methods, baselines=tuple(name for name in suite.baselines if name in methods))
    results = replace(results, runs={key: runs for key, runs in results.runs.items() if key[0] in methods})
    if not results.runs:
        return {}
    made = {"returns_steps": return_curves(suite, results)}
    if any(not suite.methods[method].untimed for method, _ in results.runs):
        made["returns_minutes"] = return_curves(suite, results, "minutes")
    if any(uses_labels(results.curves[run["job"]]) for runs in results.runs.values() for run in runs):
        made["returns_labels"] = return_curves(suite, results, "labels")
    pooled = pooled_methods(suite, results)
    if is_aggregated(suite) and pooled:
        made["aggregate"] = aggregate_curves(suite, results)
        made["profile"] = performance_profiles(suite, results)
        if len(pooled) > 1 and any(name in pooled for name in suite.baselines):
            made["improvement"] = improvement(suite, results)
    if suite.baselines and any(
        len(time_pairs(results, name, suite.baselines[0], each))
        for name in suite.methods
        if name != suite.baselines[0]
        for each in suite.environments
    ):
        made["runtime"] = runtime(suite, results)
    return made


def plot(suite: Suite, results: Path) -> list[Path]:
    """Write every figure of the suite as PNG and PDF into `results/SUITE/`, remove those of earlier; returns the files."""
    written = []
    # matplotlib's defaults first, so that nobody's matplotlibrc changes a committed figure.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        for name, figure in figures(suite, load_results(suite, results)).items():
            for suffix, metadata in (("png", PNG_METADATA), ("pdf", PDF_METADATA)):
                written.append(results / suite.name / f"{name}.{suffix}")
                figure.savefig(written[-1], metadata=metadata)
    for path in {*(results / suite.name).glob("*.png"), *(results / suite.name).glob("*.pdf")} - {*written}:
        path.unlink()
    return written
