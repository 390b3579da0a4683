"""The motivating example of Stackelberg actor-critic (Zheng et al. 2022, arXiv:2109.12286, section 3.2 and
appendix A). The two players are the actor theta (leader) and the critic w (follower) of one agent.

One step, one parameter each. The reward is R = -a theta^2 with a = 1/5, the critic is Q = w theta; the actor
maximises J = w theta, the critic minimises L = (w theta + a theta^2)^2:

    w     <- w - s d_w L,   d_w L = 2 theta^2 (w + a theta)                             -> follower_direction
    theta <- theta + s (d_theta J - (d_theta d_w L) (d_w^2 L + damping)^-1 d_w J)       -> leader_direction
           = theta + s ((damping - 2 theta^2) w - 6 a theta^3) / (2 theta^2 + damping)

The damping is the regularisation of the paper's Proposition 2: infinite, the individual gradient; 0, the
Stackelberg gradient; in between, the regularised one. Both players move at once. Along the critic's best
response w = -a theta the actor's objective is R; the equilibrium is (0, 0), where d_w^2 L = 2 theta^2
vanishes: it fulfils the conditions of a differential Stackelberg equilibrium (definition 1) in the limit
only, which the report at the end shows, and in the end every run decays like t^(-1/2).

The SAC variant squashes a Gaussian action, adds an entropy bonus and learns from samples (`sac_directions`).
One seed cannot order its two dynamics, so it is run over many.

Draws the paper's Figures 1, 2, 4, 5, 6 and 7, prints the tables and writes them as csv:

    python stackelberg_toy.py --output-dir runs/stackelberg_toy
"""

# ---- Imports -----------------------------------------------------------------------------------------
import csv
import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic
import torch
import tyro
from matplotlib.figure import Figure
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor


# ---- Checked arguments (shared) ----------------------------------------------------------------------
class BadInput(Exception):
    """One sentence that names the argument, what is wrong and what would be right; exit status 2."""


class CheckedArgs(pydantic.BaseModel, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="strings"):
    """Arguments whose ranges are checked whenever they are made, from a command line or in Python."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def one_sentence(cls, values, check):
        """Raise BadInput for the first argument that is out of its range."""
        try:
            return check(values)
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            name, message = str(wrong["loc"][0]).replace("_", "-"), wrong["msg"].removeprefix("Value error, ")
            raise BadInput(f"--{name} is {wrong['input']!r}: {message}") from None


# ---- Arguments ---------------------------------------------------------------------------------------
class Args(CheckedArgs):
    """The defaults are the paper's."""

    output_dir: Path = Path("runs/stackelberg_toy")
    """figures and tables are written here; files of an earlier run are replaced"""
    updates: Annotated[int, Field(ge=1, le=10_000_000)] = 49_999
    """updates of the example without noise"""
    step_size: Annotated[float, Field(gt=0, le=1)] = 0.01
    """step size s of both players"""
    damping: PositiveFloat = 0.04
    """damping of the regularised run"""
    sac_updates: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    """updates of the SAC variant"""
    sac_seeds: Annotated[int, Field(ge=1, le=10_000)] = 64
    """independent runs of the SAC variant"""
    sac_samples: Annotated[int, Field(ge=1, le=10_000)] = 3
    """actions sampled for one update"""
    ent_coef: NonNegativeFloat = 0.2
    """weight of the entropy bonus"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the first run of the SAC variant; the others follow it"""


# ---- The game ----------------------------------------------------------------------------------------
A = 1 / 5  # a of the reward R = -a theta^2; the text prints R = -15 theta^2 for the fraction 1/5
START = (-1.0, 1.0)  # theta, w
DAMPINGS = (0.0, 0.001, 0.01, 0.04, 0.1, 0.5, 1.0, 10.0, math.inf)  # of the sweep


def reward(theta):
    """R = -a theta^2 (section 3.2), of a number or an array."""
    return -A * theta * theta


def leader_direction(theta, w, damping: float):
    """The actor's ascent direction (Algorithm 2 with the actor as leader), of numbers or arrays theta and w.

    damping >= 0 is lambda of Proposition 2. At 0 the factor theta^2 of the mixed derivative and of the
    Hessian cancels: -(w + 3 a theta), finite at theta = 0 too. At infinity it is d_theta J = w, the
    individual gradient.
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


def simulate(damping: float, updates: int, step_size: float) -> np.ndarray:
    """The path of (theta, w) under simultaneous updates in float64: (updates + 1, 2), first row START.

    Like the authors' notebook it does not project onto the box [-1, 1]^2. Raises BadInput if it diverges.
    """
    path = np.empty((updates + 1, 2))
    path[0] = theta, w = START
    for k in range(1, updates + 1):
        leader, follower = leader_direction(theta, w, damping), follower_direction(theta, w)
        theta, w = theta + step_size * leader, w + step_size * follower
        path[k] = theta, w
    if not np.isfinite(path).all():
        run = f"the run with damping {damping:g}"
        raise BadInput(f"--step-size {step_size} makes {run} diverge; ask for a smaller one")
    return path


# ---- The SAC variant ---------------------------------------------------------------------------------
SAC_START = (-1.0, 1.0, 1.0)  # mean and standard deviation of the actor, weight of the critic


def sac_directions(mean, std, w, noise, ent_coef: float, stackelberg: bool) -> tuple:
    """Descent directions of (mean, std, w) in the SAC variant (appendix A, figures 2, 6 and 7).

    The action is y = tanh(mean + std noise), the reward -y^2 and Q = w y. Over the samples, the last axis of
    noise (..., n), the critic minimises L = mean (w y + y^2)^2 and the actor f = mean(ent_coef log pi(y) -
    w y), both through the sampled actions; mean, std and w are (...). With `stackelberg` the actor follows
    its total derivative d f - (d d_w L) (d_w^2 L)^-1 d_w f, all terms from the same samples.
    """
    y = np.tanh(mean[..., None] + std[..., None] * noise)
    slope = 1 - y * y  # dy/dmean; dy/dstd is slope * noise
    # log pi = -noise^2/2 - log std - log(1 - y^2) + constant
    partial = ent_coef * 2 * y - w[..., None] * slope
    d_mean, d_std = partial.mean(-1), (partial * noise).mean(-1) - ent_coef / std
    square = (y * y).mean(-1)
    if stackelberg:
        mixed = (4 * w[..., None] * y + 6 * y * y) * slope
        inverse_hessian_b = -y.mean(-1) / (2 * square)
        d_mean = d_mean - mixed.mean(-1) * inverse_hessian_b
        d_std = d_std - (mixed * noise).mean(-1) * inverse_hessian_b
    return -d_mean, -d_std, -2 * (w * square + (y * y * y).mean(-1))


def simulate_sac(stackelberg: bool, args: Args) -> np.ndarray:
    """The paths of (mean, std, w) of all seeds: (sac_updates + 1, sac_seeds, 3). A seed's noise is the same
    for both dynamics, so that they can be compared in pairs. Raises BadInput if a path diverges."""
    shape, seeds = (args.sac_updates, args.sac_samples), range(args.seed, args.seed + args.sac_seeds)
    noise = np.stack([np.random.default_rng(seed).normal(size=shape) for seed in seeds], 1)
    path = np.empty((args.sac_updates + 1, args.sac_seeds, 3))
    path[0] = SAC_START
    with np.errstate(all="ignore"):  # what overflows is reported below
        for k, drawn in enumerate(noise):
            directions = sac_directions(*path[k].T, drawn, args.ent_coef, stackelberg)
            path[k + 1] = path[k] + args.step_size * np.stack(directions, -1)
    if not np.isfinite(path).all():
        raise BadInput(f"--step-size {args.step_size} makes the SAC variant diverge; ask for a smaller one")
    return path


# ---- What a path tells -------------------------------------------------------------------------------
def distance(path: np.ndarray) -> np.ndarray:
    """Euclidean distance of (theta, w), the first and last column of path (..., 2 or 3), to the equilibrium
    (0, 0)."""
    return np.hypot(path[..., 0], path[..., -1])


def first_below(error: np.ndarray, level: float) -> int | None:
    """The first update with error < level (n,), None if there is none. It favours what oscillates: judge by
    `settles_below`."""
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
    """One row of the table of the SAC variant, for paths (n, seeds, 3): medians over the seeds that get
    there."""
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


# ---- Differential Stackelberg equilibrium ------------------------------------------------------------
def total_gradient(
    leader: Callable, follower: Callable, x1: Tensor, x2: Tensor, damping: float = 0.0
) -> Tensor:
    """The leader's total derivative d_1 f1 - (d_1 d_2 f2) (d_2^2 f2 + damping I)^-1 d_2 f1 (section 3.1).

    leader and follower map (x1, x2), of shapes (n,) and (m,), to the costs f1 and f2, scalars that they
    minimise. Returns (n,). Raises torch.linalg.LinAlgError if the matrix to invert is singular.
    """
    hessian = torch.func.hessian(follower, 1)(x1, x2) + damping * torch.eye(len(x2), dtype=x2.dtype)
    mixed = torch.func.jacrev(torch.func.grad(follower, 1), 0)(x1, x2)  # (m, n)
    first, second = torch.func.grad(leader, (0, 1))(x1, x2)
    return first - mixed.T @ torch.linalg.solve(hessian, second)


def equilibrium_conditions(leader: Callable, follower: Callable, x1: Tensor, x2: Tensor) -> dict[str, float]:
    """The four quantities of definition 1 at (x1, x2); leader and follower as in `total_gradient`.

    Norms of the total gradient of f1 and of d_2 f2, smallest eigenvalues of the total Hessian of f1 and of
    d_2^2 f2. The total Hessian is the derivative of the total gradient along the follower's response
    dx2/dx1 = -(d_2^2 f2)^-1 d_2 d_1 f2; on the best response it is the Hessian of f1(x1, x2*(x1)). Where
    d_2^2 f2 is singular, nothing total exists: nan.
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
    """Definition 1 to a tolerance: gradients at most that, eigenvalues above it. nan fulfils nothing."""
    gradients = [conditions["total gradient"], conditions["follower's gradient"]]
    hessians = [conditions["total Hessian"], conditions["follower's Hessian"]]
    return all(each <= tolerance for each in gradients) and all(each > tolerance for each in hessians)


def toy_conditions(theta: float, w: float) -> dict[str, float]:
    """`equilibrium_conditions` of the example, whose leader minimises -J, at (theta, w)."""
    x1, x2 = (torch.tensor([x], dtype=torch.float64) for x in (theta, w))

    def leader(theta: Tensor, w: Tensor) -> Tensor:
        return -(theta * w).sum()

    def follower(theta: Tensor, w: Tensor) -> Tensor:
        return ((w * theta + A * theta * theta) ** 2).sum()

    return equilibrium_conditions(leader, follower, x1, x2)


# ---- Figures -----------------------------------------------------------------------------------------
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # individual, Stackelberg, regularised (Okabe and Ito)


def draw_field(axes, field: Callable, paths: list[np.ndarray], colour: str, title: str) -> None:
    """One panel: stream lines of field(x, y) -> (dx, dy) on [-1, 1]^2, and paths (n, 2), the first one drawn
    boldly."""
    x, y = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41))
    axes.streamplot(x, y, *field(x, y), color="0.72", linewidth=0.6, arrowsize=0.6, density=1.1)
    for path in paths[:0:-1]:
        axes.plot(*path.T, color=colour, linewidth=0.4, alpha=0.25)
    axes.plot(*paths[0].T, color=colour, linewidth=1.6)
    axes.plot(*paths[0][0], "o", color=colour, markersize=5)
    axes.plot(0, 0, "k*", markersize=9)
    axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xlabel=r"$\theta$", ylabel="$w$")
    axes.set(title=title, aspect="equal")


def draw_curves(axes, curves: dict[str, np.ndarray], ylabel: str, log: bool) -> None:
    """One panel: a value at each update, one line a name; of an array (n, seeds) the first seed, and the
    median and the quartiles of all."""
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
    """The mean update of (mean, w) at std = 1: the average over `averaged` draws of sac_samples actions, as
    the paper's empirical mean (a single draw is too noisy for stream lines)."""

    def field(mean: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise, total = np.random.default_rng(args.seed), np.zeros((2, *mean.shape))
        for _ in range(averaged):
            drawn = noise.normal(size=(*mean.shape, args.sac_samples))
            d_mean, _, d_w = sac_directions(mean, np.ones_like(mean), w, drawn, args.ent_coef, stackelberg)
            total += d_mean, d_w
        return tuple(total / averaged)

    return field


def draw_figures(
    paths: dict[str, np.ndarray], dampings: dict[str, float], sac: dict[str, np.ndarray], args: Args
) -> None:
    """Write figure_1.png, 2, 4, 5, 6 and 7, numbered as in the paper, from the paths by name."""
    errors = {name: distance(path) for name, path in paths.items()}
    returns = {name: reward(path[:5001, 0]) for name, path in paths.items()}

    drawn = {}
    for number, shown in ((1, 2), (4, 3)):
        drawn[number], axes = panels(3)
        for each, name, colour in zip(axes[:shown], paths, COLOURS):

            def field(theta, w):
                return leader_direction(theta, w, dampings[name]), follower_direction(theta, w)

            draw_field(each, field, [paths[name]], colour, name)
        if number == 1:
            draw_curves(axes[2], errors, "error", log=True)
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
    sac_returns = {name: reward(path[..., 0]) for name, path in sac.items()}
    draw_curves(axes[1], sac_returns, r"return $R(\theta)$", log=False)
    for number, figure in drawn.items():
        draw = partial(figure.savefig, format="png", metadata={"Software": None})
        replace_file(args.output_dir / f"figure_{number}.png", draw)


# ---- Tables ------------------------------------------------------------------------------------------
def as_text(value) -> str:
    """A cell of a printed table."""
    if value is None:
        return "never"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(title: str, rows: list[dict]) -> None:
    """Print rows, dicts with the same keys, as a table that Markdown reads."""
    cells = [list(rows[0]), *([as_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    print(f"\n{title}\n", *lines, sep="\n")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write` makes beside it: after a crash the old or the new content is there."""
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows, dicts with the same keys, as csv; None is an empty cell."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def provenance(args: Args) -> dict:
    """What made the results: arguments, commit, versions."""
    words = "git describe --always --dirty --abbrev=40 --exclude=*"
    git = subprocess.run(words, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch", "matplotlib")}
    made = {"script": Path(__file__).name, "args": args.model_dump(mode="json", exclude={"output_dir"})}
    versions |= {"python": sys.version.split()[0]}
    return made | {"commit": git.stdout.strip() or None, "versions": versions}


# ---- Entry point -------------------------------------------------------------------------------------
def main(args: Args) -> None:
    """Run everything, print and write the tables, draw the figures. Raises BadInput before anything is
    written if a run diverges or the folder cannot be made."""
    dampings = {"individual": math.inf, "Stackelberg": 0.0, f"regularised {args.damping:g}": args.damping}
    paths = {name: simulate(damping, args.updates, args.step_size) for name, damping in dampings.items()}
    sac = {"SAC": simulate_sac(False, args), "STSAC-AL": simulate_sac(True, args)}

    table = [{"run": name} | summary(path) for name, path in paths.items()]
    sweep_table = []
    for damping in DAMPINGS:
        error = distance(simulate(damping, args.updates, args.step_size))
        row = {"damping": damping, "settle 1e-1": settles_below(error, 1e-1), "final error": float(error[-1])}
        sweep_table.append(row)
    sac_table = [{"run": name} | sac_summary(path) for name, path in sac.items()]
    ends = {name: path[-1].tolist() for name, path in paths.items()} | {"the equilibrium itself": [0.0, 0.0]}
    equilibrium = []
    for name, (theta, w) in ends.items():
        conditions = toy_conditions(theta, w)
        fulfilled = "yes" if is_equilibrium(conditions) else "no"
        equilibrium.append({"run": name, "theta": theta, "w": w} | conditions | {"fulfilled": fulfilled})
    steps = f"{args.updates:,} updates (settle: from that update on the error stays below)"
    seeds = f"{args.sac_seeds} seeds, {args.sac_updates:,} updates: medians"
    bounds = "gradients at most 0.01, Hessians above 0.01"
    tables = [
        ("table", f"The example, {steps}", table),
        ("damping_sweep", "Regularisation (inf: the individual gradient)", sweep_table),
        ("sac_table", f"The SAC variant, {seeds}", sac_table),
        ("equilibrium", f"Differential Stackelberg equilibrium: {bounds}", equilibrium),
    ]
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name, _, rows in tables:
            replace_file(args.output_dir / f"{name}.csv", partial(write_table, rows=rows))
        made = json.dumps(provenance(args), indent=1) + "\n"
        replace_file(args.output_dir / "provenance.json", lambda new: new.write_text(made))
        draw_figures(paths, dampings, sac, args)
    except OSError as error:
        raise BadInput(f"--output-dir cannot be written: {error}; name another folder") from error
    for _, title, rows in tables:
        print_table(title, rows)
    print(f"\nfigures and tables: {args.output_dir}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
