"""The motivating example of Stackelberg actor-critic (Zheng et al. 2022, arXiv:2109.12286, section 3.2 and appendix A).

One step, one actor parameter theta, one critic parameter w. The reward is R = -a theta^2 with a = 1/5, the critic is
Q = w theta; the actor maximises J = w theta, the critic minimises L = (w theta + a theta^2)^2:

    w      <-  w - s d_w L,                        d_w L = 2 theta^2 (w + a theta)                -> follower_direction
    theta  <-  theta + s (d_theta J - (d_theta d_w L) (d_w^2 L + damping)^-1 d_w J)               -> leader_direction
             = theta + s ((damping - 2 theta^2) w - 6 a theta^3) / (2 theta^2 + damping)

The damping is the regularisation of the paper's Proposition 2: infinite, the individual gradient; 0, the Stackelberg
gradient; in between, the regularised one. Both players move at once. Along the critic's best response w = -a theta the
actor's objective is R; the equilibrium is (0, 0), where d_w^2 L = 2 theta^2 vanishes: it fulfils the conditions of a
differential Stackelberg equilibrium (definition 1) in the limit only, which the report at the end shows, and every run
converges algebraically, like t^(-1/2), or slower.

The SAC variant squashes a Gaussian action, adds an entropy bonus and learns from samples (`sac_directions`). One seed
cannot order its two dynamics, so it is run over many.

Draws the paper's Figures 1, 2, 4, 5, 6 and 7, prints the tables and writes them as csv:

    python stackelberg_toy.py --output-dir runs/stackelberg_toy
"""

# ---- Imports ---------------------------------------------------------------------------------------------------
import ast
import csv
import importlib.metadata
import inspect
import json
import math
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor


# ---- Arguments -------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """Every number must lie in the interval that its line states. The defaults are the paper's."""

    output_dir: Path = Path("runs/stackelberg_toy")
    """figures and tables are written here; files of an earlier run are replaced"""
    updates: int = 49999
    """updates of the example without noise, in [1, 10000000]"""
    step_size: float = 0.01
    """step size s of both players, in (0, 1]"""
    damping: float = 0.04
    """damping of the regularised run, in (0, inf)"""
    sac_updates: int = 2000
    """updates of the SAC variant, in [1, 1000000]"""
    sac_seeds: int = 64
    """independent runs of the SAC variant, in [1, 10000]"""
    sac_samples: int = 3
    """actions sampled for one update, in [1, 10000]"""
    ent_coef: float = 0.2
    """weight of the entropy bonus, in [0, inf)"""
    seed: int = 1
    """seed of the first run of the SAC variant; the others follow it, in [0, 2147483647]"""


# ---- The game --------------------------------------------------------------------------------------------------
A = 1 / 5  # curvature of the reward; the text prints R = -15 theta^2 for the fraction 1/5
START = (-1.0, 1.0)  # theta, w
DAMPINGS = (0.0, 0.001, 0.01, 0.04, 0.1, 0.5, 1.0, 10.0, math.inf)  # of the sweep


def reward(theta):
    """R = -a theta^2 (section 3.2), of a number or an array."""
    return -A * theta * theta


def leader_direction(theta, w, damping: float):
    """The actor's ascent direction (Algorithm 2 with the actor as leader), of numbers or arrays theta and w.

    damping >= 0 is lambda of Proposition 2. At 0 the factor theta^2 of the mixed derivative and of the Hessian cancels:
    -(w + 3 a theta), finite at theta = 0 too. At infinity it is d_theta J = w, the individual gradient.
    """
    if damping == math.inf:
        return w
    if damping == 0:
        return -(w + 3 * A * theta)
    square = 2 * theta * theta
    return ((damping - square) * w - 3 * A * theta * square) / (square + damping)


def follower_direction(theta, w):
    """The critic's descent direction -d_w L = -2 theta^2 (w + a theta), of numbers or arrays."""
    return -2 * theta * theta * (w + A * theta)


def simulate(damping: float, updates: int, step_size: float, start: tuple[float, float] = START) -> np.ndarray:
    """The path of (theta, w) under simultaneous updates in float64: (updates + 1, 2), first row `start`.

    Like the authors' notebook it does not project onto the box [-1, 1]^2. Raises BadInput if it diverges.
    """
    path = np.empty((updates + 1, 2))
    theta, w = start
    path[0] = start
    for k in range(1, updates + 1):
        leader, follower = leader_direction(theta, w, damping), follower_direction(theta, w)
        theta, w = theta + step_size * leader, w + step_size * follower
        path[k] = theta, w
    if not np.isfinite(path).all():
        raise BadInput(f"--step-size {step_size} makes the run with damping {damping:g} diverge; ask for a smaller one")
    return path


# ---- The SAC variant -------------------------------------------------------------------------------------------
SAC_START = (-1.0, 1.0, 1.0)  # mean and standard deviation of the actor, weight of the critic


def sac_directions(mean, std, w, noise, ent_coef: float, stackelberg: bool) -> tuple:
    """Descent directions of (mean, std, w) in the SAC variant (appendix A, figures 2, 6 and 7).

    The action is y = tanh(mean + std noise), the reward -y^2 and Q = w y. Over the samples, the last axis of noise
    (..., n), the critic minimises L = mean (w y + y^2)^2 and the actor f = mean(ent_coef log pi(y) - w y), both through
    the sampled actions; mean, std and w are (...). With `stackelberg` the actor follows its total derivative
    d f - (d d_w L) (d_w^2 L)^-1 d_w f, all terms from the same samples.
    """
    y = np.tanh(mean[..., None] + std[..., None] * noise)
    slope = 1 - y * y  # dy/dmean; dy/dstd is slope * noise
    partial = ent_coef * 2 * y - w[..., None] * slope  # log pi = -noise^2/2 - log std - log(1 - y^2) + constant
    d_mean, d_std = partial.mean(-1), (partial * noise).mean(-1) - ent_coef / std
    square = (y * y).mean(-1)
    if stackelberg:
        mixed = (4 * w[..., None] * y + 6 * y * y) * slope
        inverse_hessian_b = -y.mean(-1) / (2 * square)
        d_mean = d_mean - mixed.mean(-1) * inverse_hessian_b
        d_std = d_std - (mixed * noise).mean(-1) * inverse_hessian_b
    return -d_mean, -d_std, -2 * (w * square + (y * y * y).mean(-1))


def simulate_sac(stackelberg: bool, args: Args) -> np.ndarray:
    """The paths of (mean, std, w) of all seeds: (sac_updates + 1, sac_seeds, 3). A seed's noise is the same for both
    dynamics, so that they can be compared in pairs. Raises BadInput if a path diverges."""
    shape = (args.sac_updates, args.sac_samples)
    noise = np.stack([np.random.default_rng(args.seed + i).normal(size=shape) for i in range(args.sac_seeds)], 1)
    path = np.empty((args.sac_updates + 1, args.sac_seeds, 3))
    path[0] = SAC_START
    with np.errstate(all="ignore"):  # what overflows is reported below
        for k, drawn in enumerate(noise):
            directions = sac_directions(*path[k].T, drawn, args.ent_coef, stackelberg)
            path[k + 1] = path[k] + args.step_size * np.stack(directions, -1)
    if not np.isfinite(path).all():
        raise BadInput(f"--step-size {args.step_size} makes the SAC variant diverge; ask for a smaller one")
    return path


# ---- What a path tells -----------------------------------------------------------------------------------------
def distance(path: np.ndarray) -> np.ndarray:
    """Euclidean distance of (theta, w), the first and the last column of path (..., 2 or 3), to the equilibrium (0, 0)."""
    return np.hypot(path[..., 0], path[..., -1])


def first_below(error: np.ndarray, level: float) -> int | None:
    """The first update with error < level (n,), None if there is none. It favours what oscillates: judge by `settles_below`."""
    below = error < level
    return int(below.argmax()) if below.any() else None


def settles_below(error: np.ndarray, level: float) -> int | None:
    """The update from which on error (n,) stays < level up to its end, None if its last entry is not."""
    above = np.flatnonzero(~(error < level))
    if len(above) == 0:
        return 0
    return int(above[-1]) + 1 if above[-1] + 1 < len(error) else None


def summary(path: np.ndarray) -> dict[str, float | int | None]:
    """One row of the table, for a path (n, 2) of (theta, w)."""
    theta, error = path[:, 0], distance(path)
    angle = np.unwrap(np.arctan2(path[:, 1], path[:, 0]))
    late = reward(theta[1000:])
    return {
        "first 1e-1": first_below(error, 1e-1),
        "settle 1e-1": settles_below(error, 1e-1),
        "first 1e-2": first_below(error, 1e-2),
        "settle 1e-2": settles_below(error, 1e-2),
        "final error": float(error[-1]),
        "sign changes of theta": int((np.sign(theta[1:]) != np.sign(theta[:-1])).sum()),
        "revolutions": float(abs(angle[-1] - angle[0]) / (2 * math.pi)),
        "path length": float(distance(np.diff(path, axis=0)).sum()),
        "lowest return after 1000": float(late.min()) if len(late) else None,
    }


def sac_summary(path: np.ndarray) -> dict[str, float | int | None]:
    """One row of the table of the SAC variant, for paths (n, seeds, 3): medians over the seeds that get there."""
    errors = distance(path).T
    row = {}
    for name, measure in (("first", first_below), ("settle", settles_below)):
        for level, label in ((1e-1, "1e-1"), (1e-2, "1e-2")):
            reached = [update for update in (measure(error, level) for error in errors) if update is not None]
            row[f"{name} {label}"] = float(np.median(reached)) if reached else None
            row[f"seeds with {name} {label}"] = len(reached)
    row["median error of the second half"] = float(np.median(errors[:, errors.shape[1] // 2 :]))
    row["median final error"] = float(np.median(errors[:, -1]))
    row["median final std"] = float(np.median(path[-1, :, 1]))
    return row


# ---- Differential Stackelberg equilibrium ----------------------------------------------------------------------
def total_gradient(leader: Callable, follower: Callable, x1: Tensor, x2: Tensor, damping: float = 0.0) -> Tensor:
    """The leader's total derivative d_1 f1 - (d_1 d_2 f2) (d_2^2 f2 + damping I)^-1 d_2 f1 (section 3.1), dense.

    leader and follower map (x1, x2), of shapes (n,) and (m,), to the costs f1 and f2, scalars that they minimise.
    Returns (n,). Raises torch.linalg.LinAlgError if the matrix to invert is singular.
    """
    hessian = torch.func.hessian(follower, 1)(x1, x2) + damping * torch.eye(len(x2), dtype=x2.dtype)
    mixed = torch.func.jacrev(torch.func.grad(follower, 1), 0)(x1, x2)  # (m, n)
    first, second = torch.func.grad(leader, (0, 1))(x1, x2)
    return first - mixed.T @ torch.linalg.solve(hessian, second)


def equilibrium_conditions(leader: Callable, follower: Callable, x1: Tensor, x2: Tensor) -> dict[str, float]:
    """The four quantities of definition 1 at (x1, x2); leader and follower as in `total_gradient`.

    Norms of the total gradient of f1 and of d_2 f2, smallest eigenvalues of the total Hessian of f1 and of d_2^2 f2. The
    total Hessian is the derivative of the total gradient along the follower's response dx2/dx1 = -(d_2^2 f2)^-1
    d_2 d_1 f2; on the best response it is the Hessian of f1(x1, x2*(x1)). Where d_2^2 f2 is singular, nothing total
    exists: nan.
    """
    hessian = torch.func.hessian(follower, 1)(x1, x2)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    conditions = {
        "total gradient": math.nan,
        "follower's gradient": torch.func.grad(follower, 1)(x1, x2).norm().item(),
        "total Hessian": math.nan,
        "follower's Hessian": eigenvalues.min().item(),
    }
    if eigenvalues.abs().min() > torch.finfo(x2.dtype).eps * eigenvalues.abs().max():
        mixed = torch.func.jacrev(torch.func.grad(follower, 1), 0)(x1, x2)
        response = -torch.linalg.solve(hessian, mixed)
        by_x1, by_x2 = torch.func.jacrev(lambda *x: total_gradient(leader, follower, *x), (0, 1))(x1, x2)
        total = by_x1 + by_x2 @ response
        conditions["total gradient"] = total_gradient(leader, follower, x1, x2).norm().item()
        conditions["total Hessian"] = torch.linalg.eigvalsh((total + total.T) / 2).min().item()
    return conditions


def is_equilibrium(conditions: dict[str, float], tolerance: float = 1e-2) -> bool:
    """Definition 1 to a tolerance: gradients at most that, eigenvalues more than that. nan fulfils nothing."""
    gradients = conditions["total gradient"] <= tolerance and conditions["follower's gradient"] <= tolerance
    return gradients and conditions["total Hessian"] > tolerance and conditions["follower's Hessian"] > tolerance


def toy_conditions(theta: float, w: float) -> dict[str, float]:
    """`equilibrium_conditions` of the example, whose leader minimises -J, at (theta, w)."""
    x1, x2 = (torch.tensor([x], dtype=torch.float64) for x in (theta, w))
    return equilibrium_conditions(lambda x, y: -(x * y).sum(), lambda x, y: ((y * x + A * x * x) ** 2).sum(), x1, x2)


# ---- Figures ---------------------------------------------------------------------------------------------------
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # individual, Stackelberg, regularised (Okabe and Ito)


def draw_field(axes, field: Callable, paths: list[np.ndarray], colour: str, title: str) -> None:
    """One panel: stream lines of field(x, y) -> (dx, dy) on [-1, 1]^2, and paths (n, 2); the first one is drawn boldly."""
    x, y = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41))
    axes.streamplot(x, y, *field(x, y), color="0.72", linewidth=0.6, arrowsize=0.6, density=1.1)
    for path in paths[:0:-1]:
        axes.plot(*path.T, color=colour, linewidth=0.4, alpha=0.25)
    axes.plot(*paths[0].T, color=colour, linewidth=1.6)
    axes.plot(*paths[0][0], "o", color=colour, markersize=5)
    axes.plot(0, 0, "k*", markersize=9)
    axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xlabel=r"$\theta$", ylabel="$w$", title=title, aspect="equal")


def draw_curves(axes, curves: dict[str, np.ndarray], ylabel: str, log: bool) -> None:
    """One panel: a value at each update, one line a name; of an array (n, seeds) the first seed, and the median and the
    quartiles of all."""
    for (name, values), colour in zip(curves.items(), COLOURS):
        if values.ndim == 2:
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=1)
            axes.fill_between(np.arange(len(values)), low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(middle, color=colour, linewidth=1.6, label=f"{name}, median and quartiles")
            values, name = values[:, 0], f"{name}, one seed"
            axes.plot(values, color=colour, linewidth=0.5, alpha=0.8, label=name)
        else:
            axes.plot(values, color=colour, linewidth=1.4, label=name)
    axes.set(xlabel="updates", ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def panels(number: int) -> tuple[Figure, list]:
    """A figure with `number` panels side by side."""
    figure = Figure(figsize=(3.6 * number, 3.5), dpi=110, layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def sac_field(stackelberg: bool, args: Args, averaged: int = 400) -> Callable:
    """The mean update of (mean, w) at std = 1: the average over `averaged` draws of sac_samples actions, as the paper's
    empirical mean (a single draw is too noisy for stream lines)."""

    def field(mean: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise, total = np.random.default_rng(args.seed), np.zeros((2, *mean.shape))
        for _ in range(averaged):
            drawn = noise.normal(size=(*mean.shape, args.sac_samples))
            d_mean, _, d_w = sac_directions(mean, np.ones_like(mean), w, drawn, args.ent_coef, stackelberg)
            total += d_mean, d_w
        return tuple(total / averaged)

    return field


def draw_figures(paths: dict[str, np.ndarray], dampings: dict[str, float], sac: dict[str, np.ndarray], args: Args) -> None:
    """Write figure_1.png, 2, 4, 5, 6 and 7, numbered as in the paper, from the paths by name."""
    errors = {name: distance(path) for name, path in paths.items()}
    returns = {name: reward(path[:5001, 0]) for name, path in paths.items()}

    def draw_example(axes, name: str, colour: str) -> None:
        def field(theta, w):
            return leader_direction(theta, w, dampings[name]), follower_direction(theta, w)

        draw_field(axes, field, [paths[name]], colour, name)

    drawn = {}
    drawn[1], axes = panels(3)
    for each, name, colour in zip(axes, list(paths)[:2], COLOURS):
        draw_example(each, name, colour)
    draw_curves(axes[2], errors, "error", log=True)
    drawn[4], axes = panels(3)
    for each, name, colour in zip(axes, paths, COLOURS):
        draw_example(each, name, colour)
    drawn[5], axes = panels(2)
    draw_curves(axes[0], errors, "error", log=True)
    draw_curves(axes[1], returns, r"return $R(\theta)$", log=False)

    for number, shown in ((2, 1), (6, args.sac_seeds)):
        drawn[number], axes = panels(2)
        for each, (name, path), colour in zip(axes, sac.items(), COLOURS):
            seeds = [path[:, i, ::2] for i in range(shown)]
            draw_field(each, sac_field(name != "SAC", args), seeds, colour, name)
            each.set_xlabel(r"$\theta$, the mean before the squashing")
    drawn[7], axes = panels(2)
    draw_curves(axes[0], {name: distance(path) for name, path in sac.items()}, "error", log=True)
    draw_curves(axes[1], {name: reward(path[..., 0]) for name, path in sac.items()}, r"return $R(\theta)$", log=False)
    for number, figure in drawn.items():
        figure.savefig(args.output_dir / f"figure_{number}.png", metadata={"Software": None})


# ---- Tables ----------------------------------------------------------------------------------------------------
class BadInput(Exception):
    """One sentence that names the argument, what is wrong and what would be right; printed, exit status 2."""


def check_ranges(args) -> None:
    """Raise BadInput for the first number of `args` outside the interval that its line in Args states."""
    body = ast.parse(textwrap.dedent(inspect.getsource(type(args)))).body[0].body
    for field, doc in zip(body, body[1:]):
        if not isinstance(field, ast.AnnAssign) or not isinstance(doc, ast.Expr):
            continue
        interval = re.search(r"in ([\[(])([^\s,]+), ([^\s,]+)([\])])", doc.value.value)
        value = getattr(args, field.target.id)
        if interval is None or value is None:
            continue
        left, low, high, right = interval.groups()
        above = value >= float(low) if left == "[" else value > float(low)
        below = value <= float(high) if right == "]" else value < float(high)
        if not (above and below):
            raise BadInput(f"--{field.target.id.replace('_', '-')} is {value}, it must be {interval.group()}")


def as_text(value) -> str:
    """A cell of a printed table."""
    if value is None:
        return "never"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(title: str, rows: list[dict]) -> None:
    """Print rows, dicts with the same keys, as a table that Markdown reads."""
    cells = [list(rows[0]), *([as_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    print(f"\n{title}\n", *lines, sep="\n")


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows, dicts with the same keys, as csv; None is an empty cell."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def provenance(args: Args) -> dict:
    """What made the results: arguments, commit, versions, machine."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    packages = ("numpy", "torch", "matplotlib")
    return {
        "script": Path(__file__).name,
        "args": {name: value for name, value in asdict(args).items() if name != "output_dir"},
        "commit": git("rev-parse", "HEAD"),
        "script_changed_since": bool(git("status", "--porcelain", Path(__file__).name)),
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "cpu": model.group(1) if model else platform.processor(),
    }


# ---- Entry point -----------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    """Run everything, print and write the tables, draw the figures. Raises BadInput before anything is written if an
    argument is wrong or the folder cannot be made."""
    check_ranges(args)
    dampings = {"individual": math.inf, "Stackelberg": 0.0, f"regularised {args.damping:g}": args.damping}
    paths = {name: simulate(damping, args.updates, args.step_size) for name, damping in dampings.items()}
    sweep = {damping: simulate(damping, args.updates, args.step_size) for damping in DAMPINGS}
    sac = {name: simulate_sac(stackelberg, args) for name, stackelberg in (("SAC", False), ("STSAC-AL", True))}

    table = [{"run": name} | summary(path) for name, path in paths.items()]
    sweep_table = [
        {"damping": damping, "settle 1e-1": settles_below(distance(path), 1e-1), "final error": float(distance(path)[-1])}
        for damping, path in sweep.items()
    ]
    sac_table = [{"run": name} | sac_summary(path) for name, path in sac.items()]
    equilibrium = []
    for name, path in paths.items():
        conditions = toy_conditions(*path[-1])
        row = {"run": name, "theta": float(path[-1, 0]), "w": float(path[-1, 1])} | conditions
        equilibrium.append(row | {"fulfilled": "yes" if is_equilibrium(conditions) else "no"})
    conditions = toy_conditions(0.0, 0.0)
    row = {"run": "the equilibrium itself", "theta": 0.0, "w": 0.0} | conditions
    equilibrium.append(row | {"fulfilled": "yes" if is_equilibrium(conditions) else "no"})

    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_table(args.output_dir / "table.csv", table)
        write_table(args.output_dir / "damping_sweep.csv", sweep_table)
        write_table(args.output_dir / "sac_table.csv", sac_table)
        write_table(args.output_dir / "equilibrium.csv", equilibrium)
        (args.output_dir / "provenance.json").write_text(json.dumps(provenance(args), indent=1) + "\n")
        draw_figures(paths, dampings, sac, args)
    except OSError as error:
        raise BadInput(f"--output-dir {args.output_dir} cannot be written: {error}; name another folder") from error
    print_table(f"The example, {args.updates:,} updates (settle: from that update on the error stays below)", table)
    print_table("Regularisation (inf: the individual gradient)", sweep_table)
    print_table(f"The SAC variant, {args.sac_seeds} seeds, {args.sac_updates:,} updates: medians", sac_table)
    print_table("Differential Stackelberg equilibrium: gradients at most 0.01, Hessians above 0.01", equilibrium)
    print(f"\nfigures and tables: {args.output_dir}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
