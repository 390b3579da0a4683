"""BLPO where everything is exact: tabular policies, linear critics, and what the hypergradient is worth.

Two players, the actor theta (leader) and the critic omega (follower) of one agent (Prakash et al. 2025,
arXiv:2505.11714v1), on a finite MDP, with pi = softmax(theta) and V_omega = Phi omega:

    maximise J(theta, omega*(theta))  subject to  omega*(theta) = argmin_omega L(theta, omega)

    G(theta, V; l) = (I - gamma l P_pi)^-1 (r_pi + gamma (1 - l) P_pi V)            -> lambda_return
    J = sum_s nu(s) G(theta, V_omega; leader_lambda)(s)                             -> leader_objective
    L = sum_s mu(s) (G(theta, V_old; target_lambda)(s) - V_omega(s))^2              -> follower_loss

By default the leader looks one step ahead (lambda 0) and L's targets are V^pi (lambda 1, Monte Carlo). The
hypergradient is the gradient of J(theta, omega*(theta)):

    grad_theta J - (grad_theta grad_omega L) v,   (H + damping I) v = grad_omega J,   H = grad^2_omega L

**Where it matters.** With one constant feature the critic knows nothing of the states: V_omega is the mean of
V^pi. The partial gradient grad_theta J takes that number for given, so it sees no future and climbs the next
reward. But the number depends on theta, and J at the best response, the mean of r_pi plus gamma times the
mean of V^pi, is nearly the return itself: the total derivative needs no good critic. With as many features as
states V_omega = V^pi, the partial gradient is a policy gradient already, and nothing is left to add. What is
added is a policy gradient with the true Q^pi, weighed state by state; the controls ask if the weights matter.

A strong Stackelberg equilibrium is a theta that maximises J where the follower gives the best response that
the leader likes most (here there is one). Local necessary conditions: the hypergradient and grad_omega L are
0, H is positive definite, and the Hessian of J(theta, omega*(theta)) is positive nowhere.

    python blpo_tabular.py        # all figures and tables, in minutes; docs/blpo.md shows them
"""

# ---- Imports -----------------------------------------------------------------------------------------
import csv
import importlib.metadata
import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
import pydantic
import torch
import tyro
from matplotlib.figure import Figure
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.func import grad, hessian, vmap
from tqdm import tqdm


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
FigureName = Literal["critics", "solvers", "theorem", "price"]


class Args(CheckedArgs):
    """What is drawn, and how long it takes."""

    output_dir: Path = Path("runs/blpo_tabular")
    """figures and tables are written here; files of an earlier run are replaced"""
    figures: Annotated[tuple[FigureName, ...], Field(min_length=1)] = get_args(FigureName)
    """which figures"""
    seeds: Annotated[int, Field(ge=2)] = 50
    """MDPs and features of each kind"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the first; the others follow it"""
    updates: PositiveInt = 500
    """steps of the leader"""
    learning_rate: PositiveFloat = 0.05
    """Adam step size of the leader"""
    processes: PositiveInt = 2
    """processes, each with one thread"""


# ---- Games -------------------------------------------------------------------------------------------
GAMMA = 0.95
RIDGE = 1e-9  # in L; it makes features that are 0 harmless, so that critics of all sizes are one batch
FEATURES = {"chain": (1, 2, 3, 5, 10), "garnet": (1, 2, 3, 5, 10, 20)}


class Game(NamedTuple):
    """An MDP with S states and A actions, and the two players' objectives on it; all float64. A batch of
    games has one dimension more in front."""

    transitions: Tensor  # (S, A, S)
    rewards: Tensor  # (S, A)
    start: Tensor  # nu (S,): the states whose return the leader earns
    states: Tensor  # mu (S,): the states whose values the follower is asked for
    features: Tensor  # Phi (S, d)
    old_values: Tensor  # (S,): what the targets of L bootstrap from
    leader_lambda: Tensor  # (): lambda of J; 0 looks one step ahead
    target_lambda: Tensor  # (): lambda of L's targets; 1 makes them V^pi


def chain(length: int = 10) -> tuple[Tensor, Tensor]:
    """Transitions (S, 2, S) and rewards (S, 2) of a chain: action 0 goes back to the start and earns 0.02,
    action 1 goes on; at the end it stays and earns 1."""
    transitions, rewards = torch.zeros(length, 2, length), torch.tensor([0.02, 0.0]).repeat(length, 1)
    place = torch.arange(length)
    transitions[:, 0, 0] = transitions[place, 1, (place + 1).clamp(max=length - 1)] = 1
    rewards[-1, 1] = 1
    return transitions.double(), rewards.double()


def garnet(generator: torch.Generator, states: int = 20, actions: int = 4, successors: int = 3):
    """Transitions (S, A, S) and rewards (S, A) of a random MDP (Archibald et al. 1995): `successors` random
    next states with random probabilities; one action in ten earns a reward, uniform in [0, 1]."""
    chosen = torch.rand(states, actions, states, generator=generator).argsort(-1)[..., :successors]
    cuts = torch.rand(states, actions, successors - 1, generator=generator).double().sort(-1).values
    ends = torch.zeros(states, actions, 1).double()
    shares = torch.cat([ends, cuts, ends + 1], -1).diff(dim=-1)
    transitions = torch.zeros(states, actions, states).double().scatter(-1, chosen, shares)
    rewards = torch.rand(states, actions, generator=generator).double()
    return transitions, rewards * (torch.rand(states, actions, generator=generator) < 0.1)


def make_game(kind: str, seed: int, num_features: int) -> Game:
    """The game of that kind and seed: nu and mu uniform, a leader that looks one step ahead, Monte Carlo
    targets. The features are a constant and Gaussian ones, then 0."""
    generator = torch.Generator().manual_seed(seed)
    transitions, rewards = chain() if kind == "chain" else garnet(generator)
    features = torch.randn(len(rewards), len(rewards), generator=generator).double()
    features[:, 0], features[:, num_features:] = 1, 0
    uniform, zero = torch.full_like(features[0], 1 / len(rewards)), torch.zeros(()).double()
    return Game(transitions, rewards, uniform, uniform, features, 0 * uniform, zero, zero + 1)


def make_games(kind: str, sizes: tuple[int, ...], seeds: range) -> Game:
    """A batch of games, the seeds of the first number of features first."""
    games = [make_game(kind, seed, size) for size in sizes for seed in seeds]
    return Game(*(torch.stack(field) for field in zip(*games)))


def optimal_return(games: Game) -> Tensor:
    """The largest E_nu V^pi of each game (B,), by value iteration."""
    values = torch.zeros_like(games.start)
    for _ in range(int(math.log(1e-12) / math.log(GAMMA))):
        ahead = (games.transitions @ values[:, None, :, None]).squeeze(-1)
        values = (games.rewards + GAMMA * ahead).max(-1).values
    return (games.start * values).sum(-1)


# ---- The two players ---------------------------------------------------------------------------------
def induced(theta: Tensor, game: Game) -> tuple[Tensor, Tensor]:
    """P_pi (S, S) and r_pi (S,) of pi = softmax(theta), theta (S, A)."""
    pi = theta.softmax(-1)
    return torch.einsum("sa,sat->st", pi, game.transitions), (pi * game.rewards).sum(-1)


def lambda_return(theta: Tensor, values: Tensor, lambda_: Tensor, game: Game) -> Tensor:
    """G = r_pi + gamma P_pi ((1 - lambda) V + lambda G) for values V (S,): 0 is one step ahead, 1 is V^pi."""
    transitions, rewards = induced(theta, game)
    identity = torch.eye(len(rewards), dtype=rewards.dtype)
    ahead = rewards + GAMMA * (1 - lambda_) * transitions @ values
    return torch.linalg.solve(identity - GAMMA * lambda_ * transitions, ahead)


def leader_objective(theta: Tensor, omega: Tensor, game: Game) -> Tensor:
    """J = E_nu of the lambda-return that bootstraps from the critic."""
    return game.start @ lambda_return(theta, game.features @ omega, game.leader_lambda, game)


def follower_loss(theta: Tensor, omega: Tensor, game: Game) -> Tensor:
    """L = E_mu (G - V_omega)^2 + ridge |omega|^2 / 2 for the targets G, lambda-returns of the old critic."""
    targets = lambda_return(theta, game.old_values, game.target_lambda, game)
    return game.states @ (targets - game.features @ omega) ** 2 + 0.5 * RIDGE * omega @ omega


def true_return(theta: Tensor, game: Game) -> Tensor:
    """E_nu V^pi."""
    return game.start @ lambda_return(theta, game.old_values, 1.0, game)


def best_response(theta: Tensor, game: Game) -> Tensor:
    """omega*(theta) (d,): L is quadratic in omega, so one Newton step from 0."""
    zero = torch.zeros_like(game.features[0])
    curvature, slope = (d(follower_loss, 1)(theta, zero, game) for d in (hessian, grad))
    return -torch.linalg.solve(curvature, slope)


def total_objective(theta: Tensor, game: Game) -> Tensor:
    """J(theta, omega*(theta)), differentiable through the best response."""
    return leader_objective(theta, best_response(theta, game), game)


# ---- The hypergradient -------------------------------------------------------------------------------
class Settings(NamedTuple):
    """How theta is moved. The methods: policy gradient, of E_nu V^pi; simultaneous, the critic makes one step
    of gradient descent while the actor makes its own; nested, the partial gradient at the follower's answer;
    BLPO, the total one; constant and permuted, BLPO whose trace e has lost its meaning."""

    method: str = "BLPO"
    inner_steps: int | None = None  # K steps of gradient descent in place of the best response
    solver: Literal["exact", "nystrom", "cg"] = "exact"
    rank: int = 0  # directions of nystrom, iterations of cg
    damping: float = 0.0
    trajectories: int | None = None  # of an update, in place of the exact gradients


def solve(curvature: Tensor, b: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """v = (H + damping I)^-1 b of a batch, H (B, d, d) and b (B, d) -> (B, d), exactly or to a rank."""
    damped = curvature + settings.damping * torch.eye(b.shape[-1], dtype=b.dtype)
    if settings.solver == "nystrom":  # H_q = C M^+ C^T for C = H P, M = P^T H P
        directions = torch.randn(*b.shape, settings.rank, generator=generator, dtype=b.dtype)
        columns = curvature @ directions
        inverse = torch.linalg.pinv(directions.mT @ columns, hermitian=True, rtol=1e-10)
        damped = damped - curvature + columns @ inverse @ columns.mT
    if settings.solver == "cg":
        v, residual, direction = torch.zeros_like(b), b, b
        energy = (b * b).sum(-1, keepdim=True)
        for _ in range(settings.rank):
            image = (damped @ direction[..., None]).squeeze(-1)
            step = energy / (direction * image).sum(-1, keepdim=True).clamp(min=1e-300)
            v, residual = v + step * direction, residual - step * image
            new_energy = (residual * residual).sum(-1, keepdim=True)
            direction = residual + new_energy / energy.clamp(min=1e-300) * direction
            energy = new_energy
        return v
    return torch.linalg.solve(damped, b)


def mixed_term(theta: Tensor, omega: Tensor, v: Tensor, game: Game) -> Tensor:
    """(grad_theta grad_omega L) v, (S, A)."""
    return grad(lambda theta: grad(follower_loss, 1)(theta, omega, game) @ v)(theta)


def trace(theta: Tensor, v: Tensor, game: Game) -> Tensor:
    """e = W^T (mu z) (S,), z = Phi v and W = (I - gamma lambda P_pi)^-1 with the targets' lambda: how much of
    all targets an action in a state earns, weighed by z. -(grad_theta grad_omega L) v is the policy gradient
    with the row weights 2 e; blpo_continuous.py has it from samples."""
    transitions, _ = induced(theta, game)
    identity = torch.eye(len(transitions), dtype=theta.dtype)
    operator = identity - GAMMA * game.target_lambda * transitions
    return torch.linalg.solve(operator.mT, game.states * (game.features @ v))


def weighed_policy_gradient(theta: Tensor, weights: Tensor, game: Game) -> Tensor:
    """sum_s weights(s) sum_a grad pi(a|s) Q(s, a), weights (S,) -> (S, A), with the Q of L's targets."""
    lambda_ = game.target_lambda
    targets = lambda_return(theta, game.old_values, lambda_, game)
    gains = game.rewards + GAMMA * game.transitions @ ((1 - lambda_) * game.old_values + lambda_ * targets)
    return grad(lambda theta: weights @ (theta.softmax(-1) * gains).sum(-1))(theta)


def curvatures(games: Game) -> Tensor:
    """H = grad^2_omega L (B, d, d) of a batch of games; L is quadratic, so H moves with nothing."""
    return vmap(hessian(follower_loss, 1))(0 * games.rewards, 0 * games.features[:, 0], games)


def ascent_direction(
    theta: Tensor, omega: Tensor, games: Game, h: Tensor, settings: Settings, generator: torch.Generator
) -> Tensor:
    """The direction (B, S, A) of a method for a batch of theta (B, S, A), omega (B, d) and games with their
    curvatures H."""
    if settings.method == "policy gradient":
        return vmap(grad(true_return))(theta, games)
    direct, b = vmap(grad(leader_objective, (0, 1)))(theta, omega, games)
    if settings.method in ("nested", "simultaneous"):
        return direct
    v = solve(h, b, settings, generator)
    if settings.method == "BLPO":
        return direct - vmap(mixed_term)(theta, omega, v, games)
    e = vmap(trace)(theta, v, games)
    if settings.method == "constant":  # nu is uniform, so one weight for all states
        e = e.mean(-1, keepdim=True).expand_as(e)
    else:
        e = e.gather(-1, torch.rand(e.shape, generator=generator).argsort(-1))
    return direct + 2 * vmap(weighed_policy_gradient)(theta, e, games)


# ---- From samples ------------------------------------------------------------------------------------
HORIZON = 80  # steps of a trajectory: gamma^80 is 0.017


def rollouts(theta: Tensor, games: Game, number: int, generator) -> tuple[Tensor, Tensor, Tensor]:
    """States (B, N, T + 1), actions and rewards (B, N, T) of N trajectories from nu in each game."""

    def draw(cumulated: Tensor) -> Tensor:
        uniform = torch.rand(*cumulated.shape[:-1], 1, generator=generator, dtype=torch.float64)
        return (uniform > cumulated).sum(-1).clamp(max=cumulated.shape[-1] - 1)

    batch, policy = torch.arange(len(theta))[:, None], theta.softmax(-1).cumsum(-1)
    transitions = games.transitions.cumsum(-1)
    states, actions, rewards = [draw(games.start.cumsum(-1)[:, None].expand(-1, number, -1))], [], []
    for _ in range(HORIZON):
        actions.append(draw(policy[batch, states[-1]]))
        rewards.append(games.rewards[batch, states[-1], actions[-1]])
        states.append(draw(transitions[batch, states[-1], actions[-1]]))
    return torch.stack(states, -1), torch.stack(actions, -1), torch.stack(rewards, -1)


def discounted_sums(x: Tensor, decay: float) -> Tensor:
    """sum_{k >= t} decay^(k-t) x_k along the last dimension."""
    sums = x.clone()
    for t in reversed(range(x.shape[-1] - 1)):
        sums[..., t] += decay * sums[..., t + 1]
    return sums


def sampled_direction(theta: Tensor, games: Game, settings: Settings, generator: torch.Generator) -> Tensor:
    """An estimate (B, S, A) of a method's gradient from trajectories, all with the critic that fits the
    returns from nu. BLPO is that of blpo_continuous.py with Monte Carlo targets, kappa = gamma and a leader
    that looks one step ahead; "GAE 0.95" the policy gradient of E_nu V^pi with advantages of that lambda."""
    number = settings.trajectories
    states, actions, rewards = rollouts(theta, games, number, generator)
    returns, batch = discounted_sums(rewards, GAMMA), torch.arange(len(theta))[:, None]
    first, second = (games.features[batch, states[:, :, t]] for t in (0, 1))  # (B, N, d)
    ridge = 0.01 * torch.eye(first.shape[-1], dtype=theta.dtype)  # few starts may not span the features
    curvature = 2 * first.mT @ first / number + ridge
    omega = torch.linalg.solve(curvature, 2 * (first.mT @ returns[:, :, :1]).squeeze(-1) / number)
    batch = batch[:, :, None]
    values = (games.features @ omega[:, :, None]).squeeze(-1)[batch, states]
    deltas = rewards + GAMMA * values[..., 1:] - values[..., :-1]
    discounts = GAMMA ** torch.arange(HORIZON, dtype=theta.dtype)
    if settings.method == "BLPO":
        b = GAMMA * second.mean(1)  # of J = mean (r + gamma V(s'))
        z = (first @ solve(curvature, b, settings, generator)[..., None]).squeeze(-1)
        gains = 2 * z[..., None] * discounts * (returns - values[..., :-1])
        gains[..., 0] += deltas[..., 0]
    else:
        lambda_ = float(settings.method.removeprefix("GAE "))
        gains = discounts * discounted_sums(deltas, GAMMA * lambda_)
    scores = torch.zeros_like(theta)
    scores.index_put_((batch.expand_as(actions), states[..., :-1], actions), gains / number, accumulate=True)
    return scores - theta.softmax(-1) * scores.sum(-1, keepdim=True)  # sum of gains grad log pi, softmax


# ---- Training ----------------------------------------------------------------------------------------
def descend(theta: Tensor, omega: Tensor, games: Game, h: Tensor, steps: int | None) -> Tensor:
    """omega (B, d) after that many steps of gradient descent on L, of length 1 / its largest curvature; with
    None, its best response. H omega + constant is all of L's gradient."""
    slope = vmap(grad(follower_loss, 1))(theta, omega, games)
    if steps is None:
        return omega - torch.linalg.solve(h, slope)
    length = 1 / torch.linalg.eigvalsh(h)[:, -1:]
    for _ in range(steps):
        omega, slope = omega - length * slope, slope - length * (h @ slope[..., None]).squeeze(-1)
    return omega


def train(
    games: Game, settings: Settings, updates: int, step_size: float, kind=torch.optim.Adam
) -> tuple[Tensor, Tensor]:
    """Train on a batch of games from the uniform policy, by an optimiser of that kind and step size. Returns
    theta (B, S, A) and the norm of the direction at each update (updates, B)."""
    generator = torch.Generator().manual_seed(0)
    theta, omega, norms = torch.zeros_like(games.rewards), torch.zeros_like(games.features[:, 0]), []
    optimiser, h = kind([theta], lr=step_size, maximize=True), curvatures(games)
    for _ in range(updates):
        if settings.trajectories is not None:
            theta.grad = sampled_direction(theta, games, settings, generator)
        else:
            games = games._replace(old_values=(games.features @ omega[..., None]).squeeze(-1))
            steps = 1 if settings.method == "simultaneous" else settings.inner_steps
            answer = descend(theta, omega, games, h, steps)
            at = omega if settings.method == "simultaneous" else answer
            theta.grad, omega = ascent_direction(theta, at, games, h, settings, generator), answer
        norms.append(theta.grad.flatten(1).norm(dim=1))
        optimiser.step()
    return theta, torch.stack(norms)


def fraction_of_optimum(theta: Tensor, games: Game) -> Tensor:
    """E_nu V^pi over its largest value, (B,)."""
    return vmap(true_return)(theta, games) / optimal_return(games)


# ---- Experiments: rows of a table, one job after the other -------------------------------------------
METHODS = ("policy gradient", "BLPO", "constant", "permuted", "nested", "simultaneous")
ESTIMATORS = ("BLPO", "GAE 0", "GAE 0.5", "GAE 0.95", "GAE 1")
EPSILONS = tuple(10 ** (-k / 4) for k in range(4, 13))  # of the largest norm of a run: 0.1 to 0.001
VARIANTS = {  # of the figure "solvers": what is on its axis, and the settings
    "K, gradient steps of the follower": {k: {"inner_steps": k} for k in (1, 3, 10, 30, 100)},
    "damping": {x: {"damping": x} for x in (0.0, 0.01, 0.1, 1.0, 10.0)},
    "rank of the Nystrom solve": {q: {"solver": "nystrom", "rank": q, "damping": 1e-3} for q in (1, 2, 3)},
    "iterations of conjugate gradients": {k: {"solver": "cg", "rank": k} for k in (1, 2, 3)},
    "trajectories of an update": {n: {"trajectories": n} for n in (4, 16, 64)},
}
GAMES = {  # the same for what belongs to the game: the field, and its values
    "lambda of the leader": ("leader_lambda", (0.0, 0.5, 0.9, 0.95, 1.0)),
    "lambda of the targets": ("target_lambda", (0.0, 0.5, 0.9, 0.95, 1.0)),
    "mu, the states of L": ("states", ("uniform", "one state", "visited")),
}
Row = dict[str, str | float]


def rows_of(figure: str, values: Tensor, **columns) -> list[Row]:
    """A row for each seed of values (seeds,)."""
    return [{"figure": figure, **columns, "seed": i, "value": float(x)} for i, x in enumerate(values)]


def critics(args: Args, kind: str, method: str) -> list[Row]:
    """Fraction of the optimal return by the number of the critic's features."""
    games = make_games(kind, FEATURES[kind], range(args.seed, args.seed + args.seeds))
    theta, _ = train(games, Settings(method), args.updates, args.learning_rate)
    fractions = fraction_of_optimum(theta, games).view(len(FEATURES[kind]), -1)
    found = zip(FEATURES[kind], fractions)
    return [row for d, x in found for row in rows_of("critics", x, panel=kind, series=method, x=d)]


def follower_states(games: Game, name: str) -> Tensor:
    """mu (B, S): all states alike, the first one alone, or as the uniform policy visits them from there,
    discounted."""
    mu = torch.zeros_like(games.start)
    mu[:, 0] = 1
    if name == "visited":
        transitions, _ = vmap(induced)(torch.zeros_like(games.rewards), games)
        operator = torch.eye(mu.shape[1], dtype=mu.dtype) - GAMMA * transitions.mT
        mu = (1 - GAMMA) * torch.linalg.solve(operator, mu)
    return games.start if name == "uniform" else mu


def solvers(args: Args, name: str, method: str) -> list[Row]:
    """Fraction of the optimal return on Garnet MDPs with 3 features, by one choice."""
    games = make_games("garnet", (3,), range(args.seed, args.seed + args.seeds))
    if name in GAMES:
        field, values = GAMES[name]
        given = [
            follower_states(games, x) if field == "states" else 0 * games.leader_lambda + x for x in values
        ]
        games = Game(*(torch.cat([each] * len(values)) for each in games))._replace(
            **{field: torch.cat(given)}
        )
        theta, _ = train(games, Settings(method), args.updates, args.learning_rate)
        found = [*zip(values, fraction_of_optimum(theta, games).view(len(values), -1))]
    else:
        found = []
        for x, choice in VARIANTS[name].items():
            theta, _ = train(games, Settings(method, **choice), args.updates, args.learning_rate)
            found.append((x, fraction_of_optimum(theta, games)))
    return [row for x, y in found for row in rows_of("solvers", y, panel=name, series=method, x=x)]


def conditions(theta: Tensor, game: Game) -> dict[str, Tensor]:
    """The necessary conditions of a local strong Stackelberg equilibrium, at the best response."""
    omega = best_response(theta, game)
    curvature = hessian(total_objective)(theta, game).reshape(theta.numel(), theta.numel())
    features = game.features[:, game.features.abs().sum(0) > 0]
    return {
        "|hypergradient|": grad(total_objective)(theta, game).norm(),
        "|grad_omega L|": grad(follower_loss, 1)(theta, omega, game).norm(),
        "smallest eigenvalue of L's Hessian": torch.linalg.eigvalsh(2 * features.T * game.states @ features)[
            0
        ],
        "largest eigenvalue of J's Hessian": torch.linalg.eigvalsh(curvature)[-1],
    }


def theorem(args: Args, part: str, trajectories: int) -> list[Row]:
    """Garnet MDPs, 3 features. exact: plain gradient ascent, updates until the hypergradient is below
    epsilon, and the conditions at the end. sampled: the fraction of 100 runs on one MDP that end below."""
    if part == "exact":
        games = make_games("garnet", (3,), range(args.seed, args.seed + args.seeds))
        theta, norms = train(games, Settings(), 10 * args.updates, 10.0, torch.optim.SGD)
        rows = []
        for epsilon in EPSILONS:
            updates = 1 + (norms > epsilon * norms.max(0).values).int().cumprod(0).sum(0).double()
            updates[updates > len(norms)] = math.nan  # not reached
            rows += rows_of("theorem", updates, panel="updates to epsilon", series="exact", x=epsilon)
        found = [conditions(theta[i], Game(*(field[i] for field in games))) for i in range(args.seeds)]
        for name in found[0]:
            numbers = torch.stack([each[name] for each in found])
            rows += rows_of("theorem", numbers, panel="conditions", series=name, x=0)
        return rows
    games = Game(*(field.expand(100, *field.shape) for field in make_game("garnet", args.seed, 3)))
    settings = Settings(trajectories=trajectories)
    theta, _ = train(games, settings, args.updates, args.learning_rate)
    norms = [vmap(grad(total_objective))(at, games).flatten(1).norm(dim=1) for at in (theta, 0 * theta)]
    rows = []
    for epsilon in (0.3, 0.1, 0.03):
        within = (norms[0] <= epsilon * norms[1]).double()
        name = f"|hypergradient| within {epsilon} of its first"
        rows += rows_of("theorem", within, panel="fraction of runs", series=name, x=trajectories)
    return rows


def price(args: Args, method: str, part: str) -> list[Row]:
    """Estimates from 16 trajectories on Garnet MDPs: at the uniform policy, bias and standard deviation
    against the gradient of E_nu V^pi, over its length; or the fraction of the optimal return they reach."""
    sizes, rows = (1, 3, 10, 20), []
    games = make_games("garnet", sizes, range(args.seed, args.seed + args.seeds))
    settings, generator = Settings(method, trajectories=16), torch.Generator().manual_seed(args.seed)
    if part == "return":
        theta, _ = train(games, settings, max(1, args.updates // 2), args.learning_rate)
        panels = {"fraction of the optimal return": fraction_of_optimum(theta, games)}
    else:
        theta, repeats = torch.zeros_like(games.rewards), 100
        truth = vmap(grad(true_return))(theta, games)
        samples = torch.stack([sampled_direction(theta, games, settings, generator) for _ in range(repeats)])
        length, spread = truth.flatten(1).norm(dim=1), samples.var(0).flatten(1).sum(1)
        square = (samples.mean(0) - truth).square().flatten(1).sum(1) - spread / repeats  # without the noise
        panels = {"bias": square.clamp(min=0).sqrt() / length, "standard deviation": spread.sqrt() / length}
    for panel, values in panels.items():
        for d, x in zip(sizes, values.view(len(sizes), -1)):
            rows += rows_of("price", x, panel=panel, series=method, x=d)
    return rows


def jobs(args: Args) -> list[tuple]:
    """(function, its arguments) of everything that is to be computed, the longest first."""
    found = {
        "critics": [(critics, args, kind, method) for kind in ("garnet", "chain") for method in METHODS],
        "price": [(price, args, method, part) for part in ("return", "estimate") for method in ESTIMATORS],
        "theorem": [(theorem, args, "exact", 0), *((theorem, args, "sampled", n) for n in (64, 16, 4, 1))],
        "solvers": [(solvers, args, name, "BLPO") for name in (*VARIANTS, *GAMES)]
        + [(solvers, args, name, "nested") for name in GAMES],
    }
    return [job for name in found if name in args.figures for job in found[name]]


def run_job(job: tuple) -> list[Row]:
    """The rows of a job, in a process with one thread."""
    torch.set_num_threads(1)
    function, *arguments = job
    return function(*arguments)


# ---- Figures -----------------------------------------------------------------------------------------
LOGARITHMIC = {"updates to epsilon", "bias", "standard deviation"}  # panels
AXES = {  # of figures whose panels agree in them
    "critics": ("features of the critic", "fraction of the optimal return"),
    "solvers": ("", "fraction of the optimal return"),
    "price": ("features of the critic", ""),
}
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean and half a 95 % confidence interval, over the seeds that have a value."""
    x = np.array(values)[np.isfinite(values)]
    return (x.mean(), 1.96 * x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else (math.nan, math.nan)


def draw(path: Path, rows: list[Row]) -> None:
    """A figure with a panel for each name, a line for each series: mean over the seeds and its interval."""
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    size = 3.4 * min(len(panels), 4), 3.0 * math.ceil(len(panels) / 4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    across, up = AXES.get(path.stem, ("", ""))
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(up, fontsize=9)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / 4), min(len(panels), 4), number + 1)
        mine = [row for row in rows if row["panel"] == panel]
        drawn = False  # a logarithmic axis needs a number
        places = {x: i for i, x in enumerate(dict.fromkeys(row["x"] for row in mine))}
        for colour, series in zip(COLOURS, dict.fromkeys(row["series"] for row in mine)):
            at = [x for x in places if any(row["x"] == x and row["series"] == series for row in mine)]
            groups = [[row["value"] for row in mine if row["x"] == x and row["series"] == series] for x in at]
            mean, half = np.array([mean_and_interval(group) for group in groups]).T
            spots, drawn = [places[x] for x in at], drawn or np.isfinite(mean).any()
            axes.plot(spots, mean, "o-", color=colour, label=series, markersize=3, linewidth=1.4)
            axes.fill_between(spots, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        axes.set_xticks(
            list(places.values()), [x if isinstance(x, str) else f"{x:.3g}" for x in places], fontsize=7
        )
        logarithmic = panel in LOGARITHMIC and drawn
        axes.set(title=panel, **({"yscale": "log"} if logarithmic else {"ylim": (0, 1.05)}))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    new = path.with_suffix(".new")  # replaces the old one when it is complete
    figure.savefig(new, format="png")
    new.replace(path)


# ---- Entry point -------------------------------------------------------------------------------------
def slopes(rows: list[Row]) -> list[float]:
    """For each seed the slope of log(updates) against log(1 / epsilon), over the epsilons reached."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        points = [
            (row["x"], row["value"]) for row in rows if row["seed"] == seed and math.isfinite(row["value"])
        ]
        if len(points) > 1:
            x, y = np.log(points).T
            found.append(float(np.polyfit(-x, y, 1)[0]))
    return found


def main(args: Args) -> None:
    """Compute all rows, in processes; write table.csv, figures and provenance.json, and print the numbers."""
    table = args.output_dir / "table.csv.new"  # replaces the old one when it is complete
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        table.touch()
    except OSError as error:
        raise BadInput(f"--output-dir: {error}; name another or make it writable") from error
    todo, rows = jobs(args), []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for found in tqdm(pool.imap(run_job, todo), total=len(todo)):
            rows += found
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, ["figure", "panel", "series", "x", "seed", "value"])
        writer.writeheader()
        writer.writerows(rows)
    table.replace(args.output_dir / "table.csv")
    git = "git describe --always --dirty --abbrev=40 --exclude=*"
    commit = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    made = {"argv": sys.argv, "commit": commit.strip() or None, "versions": versions}
    made["args"] = args.model_dump(mode="json")
    (args.output_dir / "provenance.json").write_text(json.dumps(made, indent=1) + "\n")
    for figure in args.figures:
        mine = [row for row in rows if row["figure"] == figure]
        draw(args.output_dir / f"{figure}.png", [row for row in mine if row["panel"] != "conditions"])
        for key in dict.fromkeys((row["panel"], row["series"], row["x"]) for row in mine):
            same = [row["value"] for row in mine if (row["panel"], row["series"], row["x"]) == key]
            mean, half = mean_and_interval(same)
            print(figure, *key, f"{mean:.4g} +- {half:.2g}, {min(same):.3g} to {max(same):.3g}", sep=" | ")
    exact = [row for row in rows if row["panel"] == "updates to epsilon"]
    if exact:
        mean, half = mean_and_interval(slopes(exact))
        print(f"theorem | slope of log(updates) against log(1 / epsilon): {mean:.2f} +- {half:.2f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
