"""SoBiRL on tabular MDPs (Yang, Gao, Yuan 2025, arXiv:2405.19697): bilevel RL with an exact hypergradient.

The leader's x shapes the reward r_x of an entropy-regularised MDP; the follower answers with its one optimal
policy. Below, o is the entrywise product, l the loss of trajectories d, and w the adjoint.

    min_x Phi(x) = f(x, pi*(x)),  pi*(x) = argmax_pi V^pi            eq. (4)       -> exact_hypergradient
    V* = phi(x, V*),  phi(x, v)(s) = tau log sum_a exp((r_x + gamma P v)(s, a) / tau)    -> soft_bellman
    grad V* = (I - gamma P^pi)^-1 E_pi grad r                        Prop. 4.1     -> value_gradients
    grad Q* = grad r + gamma P grad V*                               Prop. 5.1     -> value_gradients
    grad pi* = pi* (grad Q* - grad V*) / tau                         eq. (8)       -> policy_jacobian
    (I - gamma P^pi)^T w = U^T (pi o grad_pi f)                                    -> adjoint_system
    grad Phi = grad_x f + grad r^T (pi o grad_pi f - pi o w) / tau  eq. (24)     -> model_based_hypergradient
             = E[grad_x l] + E[l sum_h (grad Q* - grad V*)(s_h, a_h)] / tau
                                                                     eq. (12, 13)  -> sobirl_hypergradient

    M-SoBiRL     Algorithm 2     one step on w, one on x, N sweeps of the soft Bellman operator  -> m_sobirl
    SoBiRL       Algorithm 1     pi_k by mirror descent, the two expectations exact              -> sobirl
    Stoc-SoBiRL  Algorithm 3, 4  both from samples, with momentum            -> draw_sample, stoc_sobirl

Six families of random instances, all with a computable Phi: the paper's synthetic problem, a variant of it
on which the implicit term decides, reward shaping, preference learning, contract design, goal navigation.
Controls: `x-only` drops the implicit term (for preferences it is the rule of DRLHF), `one-step` keeps only
its first reward, as the released code does. A leading dimension B of every tensor counts instances.
docs/sobirl.md numbers the details and differences.

    python sobirl_tabular.py
"""

# ---- Imports -----------------------------------------------------------------------------------------
import argparse
import contextlib
import csv
import importlib.metadata
import io
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import filelock
import pydantic
import torch
import tyro
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import one_hot, softplus
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
ProblemName = Literal[
    "synthetic", "discriminating", "reward-shaping", "preference-learning", "contract-design",
    "goal-navigation",
]  # fmt: skip
MethodName = Literal[
    "m-sobirl", "sobirl", "one-step", "x-only", "stoc-sobirl", "stoc-sobirl-baseline", "stoc-sgd"
]  # fmt: skip
METHODS = get_args(MethodName)


class Args(CheckedArgs):
    """What is compared, the run, then the three algorithms."""

    problems: tuple[ProblemName, ...] = ()
    """families of instances; default: all"""
    methods: tuple[MethodName, ...] = ()
    """algorithms and controls; default: all that apply"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the first instance; the others follow"""
    instances: Annotated[int, Field(ge=1, le=1000)] = 10
    """instances of each problem"""
    run_dir: Path = Path("runs")
    """the run's own folder is made in this one: {run_dir}/sobirl_tabular__{seed}__{time}"""
    resume: Path | None = None
    """continue, extend or replay the run in this folder, with its arguments; those given again win"""
    checkpoint_every: PositiveInt = 500
    """iterations of a method between two checkpoints"""

    iterations: PositiveInt | None = None
    """outer iterations K; default: the problem's own"""
    step_size: PositiveFloat | None = None
    """beta, step size of x in SoBiRL and the controls; default: the problem's own"""
    tracking_step_size: PositiveFloat | None = None
    """beta of M-SoBiRL, where w and Q have to keep up with x; default: the problem's own"""
    adjoint_step_size: PositiveFloat = 0.5
    """xi, step size of w in M-SoBiRL; stable below 2 / sigma_max(I - gamma P)^2"""
    inner_sweeps: PositiveInt = 10
    """N, sweeps of the soft Bellman operator in M-SoBiRL"""
    policy_error: Annotated[float, Field(ge=1e-20)] = 1e-6
    """epsilon, largest |pi_k - pi*|^2 of SoBiRL and Stoc-SoBiRL"""
    mirror_descent_step: Annotated[float, Field(gt=0, le=1)] = 0.5
    """step of the mirror descent on the policy; 1 is soft policy iteration"""
    tuples: Annotated[int, Field(ge=2)] = 16
    """sampled tuples of trajectories in one stochastic hypergradient"""
    rollouts: PositiveInt = 2
    """M, rollouts from each visited state and action"""
    rollout_length: PositiveInt = 20
    """T, steps of such a rollout"""
    stochastic_step_size: PositiveFloat | None = None
    """c of Stoc-SoBiRL's step sizes beta_k = c (m + k)^(-1/3); default: the problem's own"""
    step_offset: Annotated[float, Field(ge=1)] = 8.0
    """m of these step sizes"""
    momentum_coef: PositiveFloat | None = None
    """eta_k = min(1, momentum_coef beta_(k-1)^2); default: what makes eta 1/2 after the first step"""

    @pydantic.model_validator(mode="after")
    def check_pairs(self):
        """Raise BadInput unless all seeds are valid and all named methods apply to all named problems."""
        if self.seed + self.instances > 2**31:
            room = f"it must be at most {2**31 - self.instances}"
            raise BadInput(f"--seed {self.seed} leaves no room for --instances {self.instances}; {room}")
        for problem in self.problems:
            for method in self.methods:
                if not applies(method, problem):
                    usable = ", ".join(name for name in PROBLEMS if applies(method, name))
                    reason = f"samples trajectories, which --problems {problem} has none of"
                    raise BadInput(f"--methods {method} {reason}; it works on {usable}")
        return self


# ---- Entropy-regularised MDP -------------------------------------------------------------------------
def q_values(values: Tensor, rewards: Tensor, transitions: Tensor, gamma: float) -> Tensor:
    """Q = r + gamma P V (eq. 3): values (B, S), rewards (B, S, A), transitions (B, S, A, S) -> (B, S, A)."""
    return rewards + gamma * (transitions @ values[:, None, :, None]).squeeze(-1)


def log_sum_exp(q: Tensor, tau: float) -> Tensor:
    """tau log sum_a exp(Q / tau) (eq. 7): (B, S, A) -> (B, S), in units of reward; safe for any Q / tau."""
    return tau * torch.logsumexp(q / tau, -1)


def soft_bellman(values: Tensor, rewards: Tensor, transitions: Tensor, gamma: float, tau: float) -> Tensor:
    """phi(x, v) of eq. (6), a gamma-contraction in the maximum norm: values (B, S) -> (B, S)."""
    return log_sum_exp(q_values(values, rewards, transitions, gamma), tau)


def policy_transitions(policy: Tensor, transitions: Tensor) -> Tensor:
    """P^pi(s, s') = sum_a pi(s, a) P(s, a, s'): (B, S, A), (B, S, A, S) -> (B, S, S)."""
    return (policy.unsqueeze(-2) @ transitions).squeeze(-2)


def resolvent_matrix(policy: Tensor, transitions: Tensor, gamma: float) -> Tensor:
    """I - gamma P^pi (B, S, S): its inverse turns rewards of a step into discounted sums (Prop. 4.1)."""
    identity = torch.eye(policy.shape[1], dtype=policy.dtype)
    return identity - gamma * policy_transitions(policy, transitions)


def soft_policy_values(
    policy: Tensor, rewards: Tensor, transitions: Tensor, gamma: float, tau: float
) -> Tensor:
    """V^pi (B, S) of any policy (B, S, A): discounted reward plus tau times the entropy in nats."""
    gains = (policy * rewards).sum(-1) + tau * torch.special.entr(policy).sum(-1)
    return torch.linalg.solve(resolvent_matrix(policy, transitions, gamma), gains)


def optimal_soft_values(
    rewards: Tensor, transitions: Tensor, gamma: float, tau: float, values: Tensor | None = None
) -> Tensor:
    """V* (B, S), the fixed point of `soft_bellman`, to rounding; `values` (B, S) is a first guess.

    Newton's method on v - phi(v): its derivative is I - gamma P^pi with the softmax policy of v (Prop. 4.1),
    so a step is soft policy iteration; phi is convex, so the steps ascend to V* from the second on. Raises
    FloatingPointError for rewards that are not finite, or too large for float64 to tell V* from its
    neighbours.
    """
    values = torch.zeros_like(rewards[..., 0]) if values is None else values
    for _ in range(100 if rewards.isfinite().all() else 0):
        q = q_values(values, rewards, transitions, gamma)
        residual = log_sum_exp(q, tau) - values
        if (residual.abs().amax(-1) <= 1e-14 * (1 + q.abs().amax((-2, -1)))).all():
            return values + residual
        matrix = resolvent_matrix((q / tau).softmax(-1), transitions, gamma)
        values = values + torch.linalg.solve(matrix, residual)
    raise FloatingPointError("the lower level has no solution in float64: r_x is not finite or too large")


def mirror_descent(
    policy: Tensor, rewards: Tensor, transitions: Tensor, gamma: float, tau: float, error: float, step: float
) -> Tensor:
    """A policy (B, S, A) with |pi - pi*|^2 <= error (Frobenius), from `policy` on: line 2 of Algorithm 1.

    Mirror descent with the Kullback-Leibler divergence (Lan 2023; Zhan et al. 2023): log pi <- (1 - step) log
    pi + step Q^pi / tau, normalised. It needs no pi* to stop: with the Bellman gap d = max_s (phi(V^pi) -
    V^pi), Q^pi is within gamma d / (1 - gamma) of Q*, and softmax, from the maximum norm to the 1-norm, is
    1-Lipschitz, so the rows of softmax(Q^pi / tau), which is returned, are within gamma d / ((1 - gamma) tau)
    of those of pi*. Raises FloatingPointError if that bound cannot be met in 10,000 steps.
    """
    log_policy = policy.clamp(min=torch.finfo(policy.dtype).tiny).log()  # what underflowed may come back
    for _ in range(10_000 if rewards.isfinite().all() else 0):
        values = soft_policy_values(log_policy.exp(), rewards, transitions, gamma, tau)
        q = q_values(values, rewards, transitions, gamma)
        gap = (log_sum_exp(q, tau) - values).amax(-1)
        if (policy.shape[1] * (gamma * gap / ((1 - gamma) * tau)) ** 2 <= error).all():
            return (q / tau).softmax(-1)
        log_policy = ((1 - step) * log_policy + step * q / tau).log_softmax(-1)
    raise FloatingPointError("mirror descent does not reach the policy error: r_x is not finite or too large")


# ---- Implicit differentiation ------------------------------------------------------------------------
def value_gradients(
    policy: Tensor, reward_jacobian: Tensor, transitions: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """grad Q (B, S, A, n) and grad V (B, S, n) of Prop. 5.1: values of the policy for the n rewards grad r.

    policy (B, S, A), reward_jacobian (B, S, A, n), transitions (B, S, A, S). At pi* they are the derivatives
    of Q* and V* (the same as Prop. 4.1); at another policy the approximations that Algorithm 1 uses.
    """
    expected = (policy.unsqueeze(-1) * reward_jacobian).sum(-2)
    grad_v = torch.linalg.solve(resolvent_matrix(policy, transitions, gamma), expected)
    return reward_jacobian + gamma * transitions @ grad_v.unsqueeze(1), grad_v


def truncated_value_gradients(
    policy: Tensor, reward_jacobian: Tensor, transitions: Tensor, gamma: float, length: int
) -> tuple[Tensor, Tensor]:
    """`value_gradients` with only the first `length` >= 1 terms of the sums: the mean of rollouts that long.

    Length 1 is what the released code uses: grad r(s, a) and sum_a pi(s, a) grad r(s, a).
    """
    grad_q = reward_jacobian
    for _ in range(length - 1):
        grad_v = (policy.unsqueeze(-1) * grad_q).sum(-2)
        grad_q = reward_jacobian + gamma * transitions @ grad_v.unsqueeze(1)
    return grad_q, (policy.unsqueeze(-1) * grad_q).sum(-2)


def policy_jacobian(policy: Tensor, grad_q: Tensor, grad_v: Tensor, tau: float) -> Tensor:
    """grad pi* (B, S, A, n) = pi* (grad Q* - grad V*) / tau, eq. (8)."""
    return policy.unsqueeze(-1) * (grad_q - grad_v.unsqueeze(2)) / tau


def adjoint_system(
    policy: Tensor, pi_slope: Tensor, transitions: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """A = (I - gamma P^pi)^T (B, S, S) and b = U^T (pi o grad_pi f) (B, S), the system A w = b of eq. (24).

    policy, pi_slope = grad_pi f (B, S, A). U_{(s,a),s'} = 1[s = s'] - gamma P(s, a, s') takes V to Q's
    implicit part.
    """
    flow = policy * pi_slope
    inflow = (flow.flatten(1).unsqueeze(1) @ transitions.flatten(1, 2)).squeeze(1)
    return resolvent_matrix(policy, transitions, gamma).mT, flow.sum(-1) - gamma * inflow


def model_based_hypergradient(
    x_slope: Tensor, pi_slope: Tensor, policy: Tensor, omega: Tensor, w: Tensor, jacobian: Tensor, tau: float
) -> Tensor:
    """grad_x f + grad r^T (pi o grad_pi f - omega o w) / tau (B, n), eq. (24).

    x_slope (B, n); pi_slope, policy (B, S, A); w (B, S) solves the adjoint system; jacobian (B, S, A, n) is
    grad r. omega (B, S, A) are the weights of phi's derivative, d phi / dx = sum_a omega grad r:
    softmax((r_x + gamma P v) / tau), at the solution pi* itself.
    """
    flow = policy * pi_slope - omega * w.unsqueeze(-1)
    return x_slope + (flow.unsqueeze(-1) * jacobian).sum((1, 2)) / tau


def sobirl_hypergradient(
    x_slope: Tensor, pi_slope: Tensor, policy: Tensor, grad_q: Tensor, grad_v: Tensor, tau: float
) -> Tensor:
    """(12) + (13), or (14) at another policy than pi*, with both expectations exact (B, n).

    An expectation over trajectories is a polynomial in the policy's entries, in which pi(s, a) stands once
    for each visit; so E[l sum_h g(s_h, a_h)] = sum_{s,a} pi(s, a) (df/dpi)(s, a) g(s, a) for every g, and
    E[grad_x l] = grad_x f. For any other f it is the chain rule, grad_x f + (grad pi*)^T grad_pi f.
    """
    jacobian = policy_jacobian(policy, grad_q, grad_v, tau)
    return x_slope + (pi_slope.unsqueeze(-1) * jacobian).sum((1, 2))


def gradient(y: Tensor, x: Tensor) -> Tensor:
    """dy/dx for y (B,), whose entry b depends on x[b] only; zeros if it does not depend on x at all."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y.sum(), x, retain_graph=True, materialize_grads=True)[0]


def objective_slopes(problem: "Problem", x: Tensor, policy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(x, pi) (B,), grad_x f (B, n) and grad_pi f (B, S, A): partial derivatives, by autograd."""
    x, policy = x.detach().requires_grad_(), policy.detach().requires_grad_()
    value = problem.objective(x, policy)
    return value.detach(), gradient(value, x), gradient(value, policy)


class Exact(NamedTuple):
    """What is true at x: Phi (B,), its gradient (B, n), pi* (B, S, A) and V* (B, S)."""

    objective: Tensor
    gradient: Tensor
    policy: Tensor
    values: Tensor


def exact_hypergradient(problem: "Problem", x: Tensor, values: Tensor | None = None) -> Exact:
    """Phi and its gradient at x (B, n) by eq. (24), the lower level and the adjoint solved to rounding."""
    rewards, transitions = problem.reward(x), problem.transitions
    values = optimal_soft_values(rewards, transitions, problem.gamma, problem.tau, values)
    policy = (q_values(values, rewards, transitions, problem.gamma) / problem.tau).softmax(-1)
    objective, x_slope, pi_slope = objective_slopes(problem, x, policy)
    w = torch.linalg.solve(*adjoint_system(policy, pi_slope, transitions, problem.gamma))
    jacobian = problem.reward_jacobian(x)
    grad = model_based_hypergradient(x_slope, pi_slope, policy, policy, w, jacobian, problem.tau)
    return Exact(objective, grad, policy, values)


# ---- Random numbers, trajectories --------------------------------------------------------------------
def uniforms(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform random numbers in [0, 1), float64."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def normals(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal random numbers, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_distributions(generator: torch.Generator, *shape: int) -> Tensor:
    """Distributions over the last dimension, uniform on the simplex, which is Dirichlet(1)."""
    weights = -torch.log1p(-uniforms(generator, *shape))
    return weights / weights.sum(-1, keepdim=True)


def sparse_distributions(generator: torch.Generator, states: int, actions: int) -> Tensor:
    """P (S, A, S) of the paper's synthetic problem: 1 to S-1 successors, normalised uniform weights."""
    ranks = uniforms(generator, states, actions, states).argsort(-1).argsort(-1)
    successors = torch.randint(1, states, (states, actions, 1), generator=generator)
    weights = (1 - uniforms(generator, states, actions, states)) * (ranks < successors)
    return weights / weights.sum(-1, keepdim=True)


def at(table: Tensor, states: Tensor, actions: Tensor) -> Tensor:
    """Entries of a table (B, S, A) at states and actions (B, ...), long: shape (B, ...)."""
    return table.flatten(1).gather(1, (states * table.shape[2] + actions).flatten(1)).view(states.shape)


def finite_horizon_sum(
    start: Tensor, policy: Tensor, transitions: Tensor, rewards: Tensor, horizon: int
) -> Tensor:
    """E[sum_{h < horizon} r(s_h, a_h)], undiscounted: start (B, S), policy, rewards (B, S, A) -> (B,)."""
    total, distribution, chain = 0.0, start.unsqueeze(1), policy_transitions(policy, transitions)
    for _ in range(horizon):
        total = total + (distribution.squeeze(1) * (policy * rewards).sum(-1)).sum(-1)
        distribution = distribution @ chain
    return total


def enumerate_trajectories(states: int, actions: int, horizon: int) -> tuple[Tensor, Tensor]:
    """All D = (S A)^H trajectories s_0, a_0, ..., s_{H-1}, a_{H-1}: states (D, H) and actions (D, H)."""
    pairs = torch.cartesian_prod(*[torch.arange(states * actions)] * horizon).view(-1, horizon)
    return pairs // actions, pairs % actions


def trajectory_probabilities(
    start: Tensor, policy: Tensor, transitions: Tensor, states: Tensor, actions: Tensor
) -> Tensor:
    """rho(d; pi) = start(s_0) prod_h pi(s_h, a_h) P(s_h, a_h, s_{h+1}) (B, D) of trajectories (D, H)."""
    probabilities = start[:, states[:, 0]] * policy[:, states, actions].prod(-1)
    return probabilities * transitions[:, states[:, :-1], actions[:, :-1], states[:, 1:]].prod(-1)


# ---- Problems ----------------------------------------------------------------------------------------
class Problem:
    """B instances of a bilevel problem: the lower MDP (transitions, gamma, tau, r_x) and the upper level f.

    A problem defines
      draw(generator)         one instance: a dictionary of tensors that becomes, stacked over the seeds, the
                              attributes of the problem; it has x (n,), the first iterate, and the lower
                              dynamics, transitions (S, A, S)
      reward(x)               r_x (B, S, A) at x (B, n), differentiable
      reward_jacobian(x)      grad r_x (B, S, A, n), in closed form
      objective(x, policy)    f(x, pi) (B,), differentiable in x (B, n) and policy (B, S, A)
      gamma, tau, iterations, step_size, tracking_step_size
                              of the lower MDP, and the defaults of Args
    and, where f is the mean of a loss l of I trajectories of H steps (eq. 11), so that it can be sampled,
      horizon, trajectories   H and I
      start                   (S,), the law of s_0; the upper dynamics are upper_transitions
      stochastic_step_size    a default of Args
      loss(x, states, actions, labels)
                              l (B, N) of N tuples: states and actions (B, N, I, H), labels (B, N);
                              differentiable in x
    """

    horizon, trajectories = 0, 1

    def __init__(self, seeds: Sequence[int]):
        instances = []
        for generator in (torch.Generator().manual_seed(seed) for seed in seeds):
            instance = self.draw(generator)
            instances.append(instance | {"w": normals(generator, len(instance["transitions"]))})
        for name in instances[0]:
            setattr(self, name, torch.stack([instance[name] for instance in instances]))
        self.upper_transitions = self.transitions

    def label_probabilities(self, states: Tensor, actions: Tensor) -> Tensor:
        """Probability (B, N) that the label of a tuple is 1; 0 where the problem has no labels."""
        return torch.zeros(states.shape[:2], dtype=torch.float64)

    def scores(self, x: Tensor, policy: Tensor) -> dict[str, Tensor]:
        """Further numbers (B,) to be logged at x and its pi*."""
        return {}


class Synthetic(Problem):
    """The paper's synthetic problem (app. J.3): f = |x|^2 / 2 + |pi|^2 / 2, r_x(s, a) = c_{sa} x^T M x.

    Its minimum is known: at x = 0 the reward is 0 and pi* uniform, Phi = S / (2 A) = 1. What the text leaves
    out (law of c and M, temperature, step sizes) follows the released code.
    """

    states, actions, dimension = 10, 5, 100
    gamma, tau, iterations, step_size, tracking_step_size = 0.5, 1.0, 3000, 8e-3, 8e-3

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Sparse P; c a product of two uniform numbers, M and x_0 standard normal."""
        shape = self.states, self.actions
        return {
            "transitions": sparse_distributions(generator, *shape),
            "scale": uniforms(generator, *shape) * uniforms(generator, *shape),
            "form": normals(generator, self.dimension, self.dimension),
            "x": normals(generator, self.dimension),
        }

    def reward(self, x: Tensor) -> Tensor:
        """c_{sa} x^T M x."""
        return self.scale * (x.unsqueeze(1) @ self.form @ x.unsqueeze(2))

    def reward_jacobian(self, x: Tensor) -> Tensor:
        """c_{sa} (M + M^T) x."""
        return self.scale.unsqueeze(-1) * ((self.form + self.form.mT) @ x.unsqueeze(2)).mT.unsqueeze(1)

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """|x|^2 / 2 + |pi|^2 / 2."""
        return (x * x).sum(-1) / 2 + (policy * policy).sum((1, 2)) / 2


class Discriminating(Problem):
    """The synthetic problem changed so that the implicit term decides.

    r_x = C x and f = 1e-3 |x|^2 / 2 + |pi - pi_0|^2 / 2, with a random policy pi_0 that the leader wants the
    follower to adopt. Here grad r is bounded, as Assumption 7.3 asks.
    """

    states, actions, dimension, ridge = 10, 5, 100, 1e-3
    gamma, tau, iterations, step_size, tracking_step_size = 0.5, 1.0, 3000, 1.0, 1.0

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Dense P and pi_0 with Dirichlet(1) rows, C normal with variance 1 / n."""
        shape = self.states, self.actions
        return {
            "transitions": random_distributions(generator, *shape, self.states),
            "features": normals(generator, *shape, self.dimension) / math.sqrt(self.dimension),
            "target": random_distributions(generator, *shape),
            "x": normals(generator, self.dimension),
        }

    def reward(self, x: Tensor) -> Tensor:
        """C x."""
        return (self.features @ x[:, None, :, None]).squeeze(-1)

    def reward_jacobian(self, x: Tensor) -> Tensor:
        """C."""
        return self.features

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """1e-3 |x|^2 / 2 + |pi - pi_0|^2 / 2."""
        return self.ridge * (x * x).sum(-1) / 2 + ((policy - self.target) ** 2).sum((1, 2)) / 2


class RewardShaping(Problem):
    """Reward shaping (sec. 3.3, app. K): an impatient follower is taught a sparse, long-sighted task.

    Upper: reward 1 in one goal state, discount 0.8, no entropy, H infinite: l = -sum_h 0.8^h r(s_h, a_h).
    Lower: discount 0.5, r_x = sparse reward + 2 tanh(x_{sa}). Sampled trajectories are cut after 20 steps,
    which leaves out 0.8^20 = 1 % of the largest return. f does not contain x, so `x-only` never moves.
    """

    states, actions, bound, upper_gamma, horizon = 8, 3, 2.0, 0.8, 20
    gamma, tau, iterations = 0.5, 0.5, 600
    step_size, tracking_step_size, stochastic_step_size = 0.3, 0.3, 0.4

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Sparse P; the goal is state 0, the start uniform over the others."""
        goal = one_hot(torch.tensor(0), self.states).double()
        return {
            "transitions": sparse_distributions(generator, self.states, self.actions),
            "sparse_reward": goal.unsqueeze(-1).expand(-1, self.actions),
            "start": (1 - goal) / (self.states - 1),
            "x": 0.1 * normals(generator, self.states * self.actions),
        }

    def reward(self, x: Tensor) -> Tensor:
        """Sparse reward plus 2 tanh(x), one x for each state and action."""
        return self.sparse_reward + self.bound * x.tanh().view_as(self.sparse_reward)

    def reward_jacobian(self, x: Tensor) -> Tensor:
        """2 (1 - tanh(x)^2) for the own x, 0 for the others."""
        slopes = self.bound * (1 - x.tanh() ** 2)
        return torch.diag_embed(slopes).view(len(x), self.states, self.actions, -1)

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """Minus the expected discounted sparse reward."""
        matrix = resolvent_matrix(policy, self.upper_transitions, self.upper_gamma)
        values = torch.linalg.solve(matrix, (policy * self.sparse_reward).sum(-1))
        return -(self.start * values).sum(-1)

    def loss(self, x: Tensor, states: Tensor, actions: Tensor, labels: Tensor) -> Tensor:
        """Minus the discounted sparse reward of the one trajectory."""
        discounts = self.upper_gamma ** torch.arange(states.shape[-1], dtype=torch.float64)
        return -(at(self.sparse_reward, states, actions) * discounts).sum((-2, -1))


class PreferenceLearning(Problem):
    """Learning from preferences (sec. 3.3, eq. 101): the leader fits r_x to labels of the follower's pairs.

    Two trajectories of H = 2 steps; the teacher prefers the first with probability sigma(R(d_1) - R(d_2)) of
    the true return, the model says sigma(R_x(d_1) - R_x(d_2)); l is the cross-entropy of a label. r_x = 2
    tanh of 6 features for 12 state-action pairs, so the true reward is in general out of reach and it matters
    on which pairs the fit is good.
    """

    states, actions, dimension, bound, horizon, trajectories = 4, 3, 6, 2.0, 2, 2
    gamma, tau, iterations = 0.8, 0.5, 600
    step_size, tracking_step_size, stochastic_step_size = 0.3, 0.03, 0.3

    def __init__(self, seeds: Sequence[int]):
        super().__init__(seeds)
        self.paths = enumerate_trajectories(self.states, self.actions, self.horizon)
        self.preferences = torch.sigmoid(self.return_differences(self.true_reward))

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Dense P; normal true rewards and features."""
        shape = self.states, self.actions
        return {
            "transitions": random_distributions(generator, *shape, self.states),
            "true_reward": normals(generator, *shape),
            "features": normals(generator, *shape, self.dimension) / math.sqrt(self.dimension),
            "start": random_distributions(generator, self.states),
            "x": 0.1 * normals(generator, self.dimension),
        }

    def reward(self, x: Tensor) -> Tensor:
        """2 tanh(F x)."""
        return self.bound * (self.features @ x[:, None, :, None]).squeeze(-1).tanh()

    def reward_jacobian(self, x: Tensor) -> Tensor:
        """2 (1 - tanh(F x)^2) F."""
        slopes = self.bound * (1 - (self.reward(x) / self.bound) ** 2)
        return slopes.unsqueeze(-1) * self.features

    def return_differences(self, rewards: Tensor) -> Tensor:
        """R(d_1) - R(d_2) (B, D, D), undiscounted, of all pairs of trajectories; rewards (B, S, A)."""
        returns = rewards[:, self.paths[0], self.paths[1]].sum(-1)
        return returns.unsqueeze(2) - returns.unsqueeze(1)

    def cross_entropies(self, x: Tensor) -> Tensor:
        """Expected cross-entropy (B, D, D) in nats of each pair's label: softplus(z) - p z at the logit z."""
        logits = self.return_differences(self.reward(x))
        return softplus(logits) - self.preferences * logits

    def pair_mean(self, policy: Tensor, pairs: Tensor) -> Tensor:
        """Mean (B,) of a quantity of pairs (B, D, D) over two independent trajectories of the policy."""
        probabilities = trajectory_probabilities(self.start, policy, self.upper_transitions, *self.paths)
        return (probabilities.unsqueeze(1) @ pairs @ probabilities.unsqueeze(2)).flatten()

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """Expected cross-entropy in nats, over the enumerated pairs."""
        return self.pair_mean(policy, self.cross_entropies(x))

    def loss(self, x: Tensor, states: Tensor, actions: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the label, 1 if the first trajectory is preferred."""
        returns = at(self.reward(x), states, actions).sum(-1)
        logits = returns[..., 0] - returns[..., 1]
        return softplus(logits) - labels * logits

    def label_probabilities(self, states: Tensor, actions: Tensor) -> Tensor:
        """Bradley-Terry with the true reward."""
        returns = at(self.true_reward, states, actions).sum(-1)
        return torch.sigmoid(returns[..., 0] - returns[..., 1])

    def scores(self, x: Tensor, policy: Tensor) -> dict[str, Tensor]:
        """`true_return`: discounted true reward of pi*(x), no entropy. `accuracy`: how often, on pairs of
        pi*(x) of different true return, r_x prefers the one that has more of it (a tie of r_x counts one
        half)."""
        values = soft_policy_values(policy, self.true_reward, self.transitions, self.gamma, 0.0)
        truth, model = self.preferences - 0.5, self.return_differences(self.reward(x))
        right = self.pair_mean(policy, ((truth * model).sign() + 1) / 2 * (truth != 0))
        different = self.pair_mean(policy, (truth != 0).double())
        return {"true_return": (self.start * values).sum(-1), "accuracy": right / different}


class ContractDesign(Problem):
    """Contract design (app. K): a principal pays b_x(s) = sigma(x_s) in each state, the agent bears c(s, a).

    Lower: r_x(s, a) = b_x(s) - c(s, a). Upper: l = -sum_{h < 8} (income(s_h) - b_x(s_h)), which needs the
    states alone. For a fixed policy it is best to pay nothing, which is where `x-only` goes.
    """

    states, actions, horizon = 6, 3, 8
    gamma, tau, iterations = 0.8, 0.1, 600
    step_size, tracking_step_size, stochastic_step_size = 0.3, 0.01, 0.2

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Sparse P; costs uniform in [0, 0.3); incomes 3 u^2 with u uniform: few states pay well."""
        return {
            "transitions": sparse_distributions(generator, self.states, self.actions),
            "costs": 0.3 * uniforms(generator, self.states, self.actions),
            "income": 3 * uniforms(generator, self.states) ** 2,
            "start": random_distributions(generator, self.states),
            "x": 0.1 * normals(generator, self.states),
        }

    def reward(self, x: Tensor) -> Tensor:
        """Payment minus cost."""
        return torch.sigmoid(x).unsqueeze(-1) - self.costs

    def reward_jacobian(self, x: Tensor) -> Tensor:
        """The slope of the own state's payment, for every action."""
        slopes = torch.sigmoid(x) * torch.sigmoid(-x)
        return torch.diag_embed(slopes).unsqueeze(2).expand(-1, -1, self.actions, -1)

    def profit(self, x: Tensor) -> Tensor:
        """Income minus payment (B, S, A), the same for every action."""
        return (self.income - torch.sigmoid(x)).unsqueeze(-1).expand_as(self.costs)

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """Minus the principal's expected profit over 8 steps."""
        return -finite_horizon_sum(self.start, policy, self.upper_transitions, self.profit(x), self.horizon)

    def loss(self, x: Tensor, states: Tensor, actions: Tensor, labels: Tensor) -> Tensor:
        """Minus the profit along the one trajectory."""
        return -at(self.profit(x), states, actions).sum((-2, -1))


class GoalNavigation(Problem):
    """Robot navigation (app. K; Chakraborty et al. 2024): the designer moves a robot's goal x in a maze.

    5 x 5 cells with centres in [0, 1]^2, a fifth of them walls; actions stay, up, down, left, right; one move
    in ten is random. Lower: r_x(s) = exp(-|s - x|^2 / (2 0.3^2)). Upper: l = 0.5 |x - destination|^2 -
    mean_{h < 10} r_x(s_h): a goal near the destination that the robot can reach in time.
    """

    size, actions, width, weight, slip, horizon = 5, 5, 0.3, 0.5, 0.1, 10
    gamma, tau, iterations = 0.9, 0.2, 600
    step_size, tracking_step_size, stochastic_step_size = 0.03, 0.003, 0.01

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Walls at random; the robot starts in one corner, the destination, x_0, is the opposite one."""
        cells = self.size**2
        walls = uniforms(generator, cells) < 0.2
        walls[[0, -1]] = False
        positions = torch.cartesian_prod(torch.arange(self.size), torch.arange(self.size))
        moves = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
        row, column = (positions.unsqueeze(1) + moves).clamp(0, self.size - 1).unbind(-1)
        targets = row * self.size + column
        targets = torch.where(walls[targets], torch.arange(cells)[:, None], targets)
        meant = one_hot(targets, cells).double()
        return {
            "transitions": (1 - self.slip) * meant + self.slip * meant.mean(1, keepdim=True),
            "positions": positions / (self.size - 1.0),
            "start": one_hot(torch.tensor(0), cells).double(),
            "destination": torch.ones(2, dtype=torch.float64),
            "x": torch.ones(2, dtype=torch.float64),
        }

    def reward(self, x: Tensor) -> Tensor:
        """A bump of width 0.3 around x, the same for every action."""
        squares = ((self.positions - x.unsqueeze(1)) ** 2).sum(-1)
        return torch.exp(-squares / (2 * self.width**2)).unsqueeze(-1).expand(-1, -1, self.actions)

    def reward_jacobian(self, x: Tensor) -> Tensor:
        """The bump times (position - x) / 0.3^2."""
        return self.reward(x).unsqueeze(-1) * ((self.positions - x.unsqueeze(1)) / self.width**2).unsqueeze(2)

    def deviation(self, x: Tensor) -> Tensor:
        """Half the squared distance (B,) of the goal from the destination."""
        return self.weight * ((x - self.destination) ** 2).sum(-1)

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """Deviation from the destination minus the mean reward of 10 steps."""
        rest = self.upper_transitions, self.reward(x), self.horizon
        return self.deviation(x) - finite_horizon_sum(self.start, policy, *rest) / self.horizon

    def loss(self, x: Tensor, states: Tensor, actions: Tensor, labels: Tensor) -> Tensor:
        """Deviation from the destination minus the mean reward along the one trajectory."""
        return self.deviation(x).unsqueeze(-1) - at(self.reward(x), states, actions).mean((-2, -1))


PROBLEMS: dict[str, type[Problem]] = {
    "synthetic": Synthetic,
    "discriminating": Discriminating,
    "reward-shaping": RewardShaping,
    "preference-learning": PreferenceLearning,
    "contract-design": ContractDesign,
    "goal-navigation": GoalNavigation,
}


# ---- Algorithms 2 and 1 ------------------------------------------------------------------------------
def first_state(problem: Problem, seeds: Sequence[int]) -> dict:
    """What goes from one outer iteration to the next, before the first: k, x_0, w_0, Q_0 = 0, the uniform
    policy, the state of each instance's random generator; then what `follow` keeps of its measurements."""
    generators = [torch.Generator().manual_seed(2**31 + seed) for seed in seeds]  # unlike the instances' own
    table = torch.zeros_like(problem.transitions[..., 0])
    return {
        "k": 0,
        "x": problem.x,
        "w": problem.w,
        "q": table,
        "policy": torch.full_like(table, 1 / table.shape[-1]),
        "rng": [generator.get_state() for generator in generators],
        "values": table[..., 0],
        "squares": table[:, 0, 0],
        "seconds": 0.0,
        "rows": [],
    }


def m_sobirl(
    problem: Problem, state: dict, step_size: float, w_step_size: float, sweeps: int, implicit: bool = True
) -> tuple[Tensor, Tensor, dict]:
    """One iteration of M-SoBiRL, Algorithm 2: h_k (B, n), pi_k (B, S, A) and the next state.

    Without `implicit` the control that follows grad_x f alone.
    """
    transitions, gamma, tau = problem.transitions, problem.gamma, problem.tau
    x, q = state["x"], state["q"]
    policy, values = (q / tau).softmax(-1), log_sum_exp(q, tau)  # values: eq. (9)
    _, x_slope, pi_slope = objective_slopes(problem, x, policy)
    matrix, b = adjoint_system(policy, pi_slope, transitions, gamma)
    residual = matrix @ state["w"].unsqueeze(-1) - b.unsqueeze(-1)
    w = state["w"] - w_step_size * (matrix.mT @ residual).squeeze(-1)  # one step on |A w - b|^2 / 2
    direction = x_slope
    if implicit:
        omega = (q_values(values, problem.reward(x), transitions, gamma) / tau).softmax(-1)
        jacobian = problem.reward_jacobian(x)
        direction = model_based_hypergradient(x_slope, pi_slope, policy, omega, w, jacobian, tau)
    x = x - step_size * direction
    rewards = problem.reward(x)
    for _ in range(sweeps):  # the soft Bellman operator on Q, from the last Q on
        q = q_values(log_sum_exp(q, tau), rewards, transitions, gamma)
    return direction, policy, state | {"k": state["k"] + 1, "x": x, "w": w, "q": q}


def sobirl(
    problem: Problem, state: dict, step_size: float, error: float, mirror: float, length: int | None = None
) -> tuple[Tensor, Tensor, dict]:
    """One iteration of SoBiRL, Algorithm 1, with the expectations of (14) exact: h_k (B, n), pi_k (B, S, A),
    the next state.

    The policy error and the step of mirror descent are those of Args; `length` cuts the sums of Prop. 5.1.
    """
    transitions, gamma, tau, x = problem.transitions, problem.gamma, problem.tau, state["x"]
    policy = mirror_descent(state["policy"], problem.reward(x), transitions, gamma, tau, error, mirror)
    _, x_slope, pi_slope = objective_slopes(problem, x, policy)
    rest = policy, problem.reward_jacobian(x), transitions, gamma
    gradients = truncated_value_gradients(*rest, length) if length else value_gradients(*rest)
    direction = sobirl_hypergradient(x_slope, pi_slope, policy, *gradients, tau)
    return direction, policy, state | {"k": state["k"] + 1, "x": x - step_size * direction, "policy": policy}


# ---- Algorithms 3 and 4 ------------------------------------------------------------------------------
class Sample(NamedTuple):
    """zeta of Algorithm 3: N tuples in each of B instances.

    states and actions (B, N, I, H), long; labels (B, N); visits (B, N, S, A), so that the sum over a tuple's
    steps of the estimates (grad Q - grad V) is sum_{sa} visits grad r.
    """

    states: Tensor
    actions: Tensor
    labels: Tensor
    visits: Tensor


def categorical(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Indices (...) drawn by inversion: cumulative probabilities (..., m), uniform numbers (...)."""
    return (cumulative[..., :-1] <= uniform.unsqueeze(-1)).sum(-1)  # the last is 1, but for rounding


def roll_out(
    states: Tensor, actions: Tensor | None, policy: Tensor, transitions: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Trajectories (B, R, T) of states and actions (eq. 78) from first states, and actions unless None, (B,
    R).

    policy (B, S, A), transitions (B, S, A, S); uniform (B, R, T, 2) in [0, 1) are the random numbers.
    """
    instance = torch.arange(len(states)).unsqueeze(1)
    choices, successors = policy.cumsum(-1), transitions.cumsum(-1)
    path = []
    for t in range(uniform.shape[2]):
        if t > 0:
            states = categorical(successors[instance, states, actions], uniform[:, :, t, 0])
        if t > 0 or actions is None:
            actions = categorical(choices[instance, states], uniform[:, :, t, 1])
        path.append((states, actions))
    return tuple(torch.stack(column, -1) for column in zip(*path, strict=True))


def draw_sample(
    problem: Problem, policy: Tensor, tuples: int, rollouts: int, length: int, rng: list[torch.Generator]
) -> Sample:
    """Algorithm 3: N tuples of upper trajectories, and M + M lower rollouts, T long, from each of their
    steps.

    The rollouts of grad Q start with the visited action, those of grad V, independent of them, with one of
    the policy's own. rng holds one generator for each instance, whose numbers then do not depend on its
    neighbours.
    """
    count, (states, actions) = len(rng), policy.shape[1:]

    def random(*shape: int) -> Tensor:
        return torch.stack([uniforms(generator, *shape) for generator in rng])

    first = categorical(problem.start.cumsum(-1).unsqueeze(1), random(tuples * problem.trajectories))
    numbers = random(tuples * problem.trajectories, problem.horizon, 2)
    shape = count, tuples, problem.trajectories, problem.horizon
    path = [each.view(shape) for each in roll_out(first, None, policy, problem.upper_transitions, numbers)]
    labels = (random(tuples) < problem.label_probabilities(*path)).double()

    from_states, from_actions = (each.flatten(1).repeat_interleave(rollouts, 1) for each in path)
    discounts = problem.gamma ** torch.arange(length, dtype=torch.float64)
    steps = problem.trajectories * problem.horizon * rollouts
    owner = torch.arange(tuples).repeat_interleave(steps).unsqueeze(-1)
    visits = torch.zeros(count, tuples * states * actions, dtype=torch.float64)
    for sign, first_actions in ((1.0, from_actions), (-1.0, None)):
        numbers = random(from_states.shape[1], length, 2)
        s, a = roll_out(from_states, first_actions, policy, problem.transitions, numbers)
        cells = ((owner * states + s) * actions + a).flatten(1)
        visits.scatter_add_(1, cells, (sign / rollouts * discounts).expand(s.shape).flatten(1))
    return Sample(*path, labels, visits.view(count, tuples, states, actions))


def stochastic_hypergradient(problem: Problem, x: Tensor, sample: Sample, baseline: bool = False) -> Tensor:
    """Eq. (80) (B, n): mean over the tuples of grad_x l + l sum_h (grad Q - grad V) / tau at x (B, n).

    With `baseline`, l in the second term is relative to the mean of the other tuples' l. That leaves the mean
    of the estimate as it is, since each tuple's sum has mean 0 and is independent of the others' l.
    """
    x = x.detach().requires_grad_()
    losses = problem.loss(x, sample.states, sample.actions, sample.labels)
    explicit = gradient(losses.mean(1), x)
    losses, tuples = losses.detach(), losses.shape[1]
    if baseline:
        losses = losses - (losses.sum(1, keepdim=True) - losses) / (tuples - 1)
    flow = (losses[:, :, None, None] * sample.visits).mean(1)
    return explicit + (flow.unsqueeze(-1) * problem.reward_jacobian(x.detach())).sum((1, 2)) / problem.tau


def stoc_sobirl(
    problem: Problem, state: dict, args: Args, momentum: bool = True, baseline: bool = False
) -> tuple[Tensor, Tensor, dict]:
    """One iteration of Stoc-SoBiRL, Algorithm 4: h_k (B, n), pi_k (B, S, A) and the next state.

    h_k = g(x_k; zeta_k) + (1 - eta_k) (h_{k-1} - g(x_{k-1}; zeta_k)) (eq. 81), step sizes
    beta_k = c (m + k)^(-1/3), eta_k in proportion to beta_{k-1}^2 (eq. 93); without momentum eta = 1.
    """
    generators = [torch.Generator() for _ in state["rng"]]
    for generator, numbers in zip(generators, state["rng"]):
        generator.set_state(numbers)
    x, k, transitions, gamma, tau = state["x"], state["k"], problem.transitions, problem.gamma, problem.tau
    rest = transitions, gamma, tau, args.policy_error, args.mirror_descent_step
    policy = mirror_descent(state["policy"], problem.reward(x), *rest)
    sample = draw_sample(problem, policy, args.tuples, args.rollouts, args.rollout_length, generators)
    direction = stochastic_hypergradient(problem, x, sample, baseline)
    scale = args.stochastic_step_size or problem.stochastic_step_size
    if k > 0 and momentum:
        coefficient = args.momentum_coef or 0.5 / (scale * args.step_offset ** (-1 / 3)) ** 2
        eta = min(1.0, coefficient * (scale * (args.step_offset + k - 1) ** (-1 / 3)) ** 2)
        before = stochastic_hypergradient(problem, state["last_x"], sample, baseline)
        direction = direction + (1 - eta) * (state["last_direction"] - before)
    next_x = x - scale * (args.step_offset + k) ** (-1 / 3) * direction
    rng = [generator.get_state() for generator in generators]
    state = state | {"k": k + 1, "x": next_x, "policy": policy, "rng": rng}
    return direction, policy, state | {"last_x": x, "last_direction": direction}


# ---- Practical forms of the implicit term ------------------------------------------------------------
def reward_to_go_term(problem: PreferenceLearning, x: Tensor, policy: Tensor) -> Tensor:
    """Mean (B, n) of l sum_h (G_h - E[G_h | s_h]) / tau with G_h from the same fragment.

    G_h = sum_{t >= h} gamma^{t-h} grad r(s_t, a_t). It looks like (13) with cut sums, but G_h contains the
    later steps that l scores too, so it is no estimate of (13)."""
    states, actions = problem.paths
    jacobian, gamma = problem.reward_jacobian(x), problem.gamma
    total, to_go, steps = 0.0, 0.0, jacobian[:, states, actions]  # steps (B, D, H, n)
    for h in reversed(range(problem.horizon)):
        to_go = steps[:, :, h] + gamma * to_go
        rest = problem.upper_transitions, gamma, problem.horizon - h
        _, grad_v = truncated_value_gradients(policy, jacobian, *rest)
        total = total + to_go - grad_v[:, states[:, h]]
    p = trajectory_probabilities(problem.start, policy, problem.upper_transitions, states, actions)
    losses = problem.cross_entropies(x)
    weights = p * ((losses @ p.unsqueeze(2)).squeeze(2) + (p.unsqueeze(1) @ losses).squeeze(1))
    return (weights.unsqueeze(-1) * total).sum(1) / problem.tau


def implicit_terms(problem: PreferenceLearning, x: Tensor, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """The mean (B, n) of each practical form of the implicit term (13) at x and pi*(x); "exact" is the term.

    "one-step" is what the released code has, "rollouts-T" independent rollouts of T steps, "reward-to-go"
    that of the fragment.
    """
    policy = exact_hypergradient(problem, x).policy
    _, x_slope, pi_slope = objective_slopes(problem, x, policy)
    rest = policy, problem.reward_jacobian(x), problem.transitions, problem.gamma

    def term(gradients: tuple[Tensor, Tensor]) -> Tensor:
        return sobirl_hypergradient(torch.zeros_like(x_slope), pi_slope, policy, *gradients, problem.tau)

    terms = {"exact": term(value_gradients(*rest)), "one-step": term(truncated_value_gradients(*rest, 1))}
    for length in lengths:
        terms[f"rollouts-{length}"] = term(truncated_value_gradients(*rest, length))
    return terms | {"reward-to-go": reward_to_go_term(problem, x, policy)}


def measure_bias(
    problem: PreferenceLearning, seeds: Sequence[int], lengths: tuple[int, ...] = (2, 5, 20)
) -> list[dict]:
    """Rows of bias.csv, for each practical form of the implicit term at x_0: the relative error of its mean,
    the cosine with the exact term, and the relative error of the whole hypergradient that has it."""
    terms = implicit_terms(problem, problem.x, lengths)
    exact, total, rows = terms.pop("exact"), exact_hypergradient(problem, problem.x).gradient, []
    for form, term in {"none": torch.zeros_like(exact), **terms}.items():
        error = (term - exact).norm(dim=-1)
        columns = {
            "relative_error": error / exact.norm(dim=-1),
            "cosine": (term * exact).sum(-1) / (term.norm(dim=-1) * exact.norm(dim=-1)),
            "relative_error_of_total": error / total.norm(dim=-1),
        }
        rows += instance_rows({"form": form}, seeds, columns)
    return rows


# ---- Comparing methods -------------------------------------------------------------------------------
def run_method(method: MethodName, problem: Problem, args: Args, state: dict) -> tuple[Tensor, Tensor, dict]:
    """One outer iteration of the method: h_k (B, n), pi_k (B, S, A) and the next state."""
    step_size = args.step_size or problem.step_size
    if method == "m-sobirl":
        tracking = args.tracking_step_size or problem.tracking_step_size
        return m_sobirl(problem, state, tracking, args.adjoint_step_size, args.inner_sweeps)
    if method == "x-only":
        return m_sobirl(problem, state, step_size, args.adjoint_step_size, args.inner_sweeps, implicit=False)
    if method in ("sobirl", "one-step"):
        length = 1 if method == "one-step" else None
        return sobirl(problem, state, step_size, args.policy_error, args.mirror_descent_step, length)
    return stoc_sobirl(problem, state, args, method != "stoc-sgd", method == "stoc-sobirl-baseline")


def applies(method: MethodName, problem: ProblemName) -> bool:
    """Whether the method can run on the problem: sampling needs an upper level over trajectories."""
    return PROBLEMS[problem].horizon > 0 or not method.startswith("stoc")


def chosen_pairs(args: Args) -> dict[str, tuple[ProblemName, MethodName]]:
    """The problems and methods that a run compares, by their keys in the checkpoint."""
    pairs = itertools.product(args.problems or PROBLEMS, args.methods or METHODS)
    return {f"{name} {method}": (name, method) for name, method in pairs if applies(method, name)}


# Six iterations in a doubling.
LOGGED = {round(2 ** (i / 6)) for i in range(200)}


def is_logged(k: int, iterations: int) -> bool:
    """Whether iteration k has rows in curves.csv."""
    return k + 1 == iterations or k + 1 in LOGGED


def instance_rows(label: dict, seeds: Sequence[int], columns: dict[str, Tensor]) -> list[dict]:
    """One row of a csv file for each instance; columns (B,)."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [label | {"seed": seed} | dict(zip(columns, row)) for seed, row in zip(seeds, rows, strict=True)]


def follow(name: ProblemName, method: MethodName, args: Args, state: dict | None) -> Iterator[dict]:
    """The state of a method on a problem after each outer iteration, from `state` or the start to the end.

    state["rows"] are those of curves.csv, measured at x_k. `average_squared_norm` is the mean of
    |grad Phi(x_j)|^2 over all j <= k, the quantity of the paper's theorems; `policy_error` is
    |pi_k - pi*(x_k)|^2. Raises FloatingPointError, naming k, if an iterate is not finite.
    """
    seeds = range(args.seed, args.seed + args.instances)
    problem = PROBLEMS[name](seeds)
    state, iterations = state or first_state(problem, seeds), args.iterations or problem.iterations
    state = state | {"rows": [row for row in state["rows"] if is_logged(row["iteration"], iterations)]}
    for k in range(state["k"], iterations):
        begun, x = time.perf_counter(), state["x"]
        direction, policy, after = run_method(method, problem, args, state)
        if not direction.isfinite().all():
            raise FloatingPointError(f"h of iteration {k} is not finite; try a smaller step size")
        exact = exact_hypergradient(problem, x, state["values"])
        norm, estimate = exact.gradient.norm(dim=-1), direction.norm(dim=-1)
        rows, squares = state["rows"], state["squares"] + norm**2
        if not (exact.objective.isfinite() & squares.isfinite() & estimate.isfinite()).all():
            raise FloatingPointError(f"Phi of iteration {k} is not finite; try a smaller step size")
        if is_logged(k, iterations):
            columns = {
                "iteration": torch.full_like(norm, k, dtype=torch.long),
                "objective": exact.objective,
                "gradient_norm": norm,
                "average_squared_norm": squares / (k + 1),
                "estimate_norm": estimate,
                "cosine": (direction * exact.gradient).sum(-1) / (estimate * norm),
                "upper_value": problem.objective(x, policy),
                "policy_error": ((policy - exact.policy) ** 2).sum((1, 2)),
            } | problem.scores(x, exact.policy)
            rows = rows + instance_rows({"problem": name, "method": method}, seeds, columns)
        seconds = state["seconds"] + time.perf_counter() - begun
        state = after | {"values": exact.values, "squares": squares, "rows": rows, "seconds": seconds}
        yield state


def summarise(state: dict) -> dict:
    """A row of summary.csv: median, smallest and largest over the instances at the last iteration."""
    *_, last = state["rows"]
    final = [row for row in state["rows"] if row["iteration"] == last["iteration"]]
    summary = {"problem": last["problem"], "method": last["method"], "seconds": state["seconds"]}
    summary |= {"iterations": last["iteration"] + 1, "instances": len(final)}
    for name in list(last)[4:]:
        if name not in ("cosine", "upper_value"):
            column = sorted(row[name] for row in final)
            median = statistics.median(column)
            summary |= {f"{name}_median": median, f"{name}_min": column[0], f"{name}_max": column[-1]}
    return summary


# Okabe and Ito's colours, which the colour-blind can tell apart, for METHODS.
COLOURS = "#0072B2", "#009E73", "#E69F00", "#000000", "#D55E00", "#CC79A7", "#56B4E9"


def draw_figure(path: Path, rows: list[dict], *columns: str) -> None:
    """Columns of curves.csv against the iteration, for each problem: median and range over instances."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(row["problem"] for row in rows))
    size = 3.1 * len(problems) + 0.6, 2.7 * len(columns)
    figure, handles = Figure(figsize=size, layout="constrained"), {}
    grid = figure.subplots(len(columns), len(problems), squeeze=False)
    for problem, method in dict.fromkeys((row["problem"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
        steps = sorted({row["iteration"] + 1 for row in mine})
        for panel, column in zip(grid[:, problems.index(problem)], columns):
            values = torch.tensor([row[column] for row in mine], dtype=torch.float64).view(len(steps), -1)
            colour, scale = COLOURS[METHODS.index(method)], "linear" if column == "objective" else "log"
            panel.fill_between(steps, values.amin(1), values.amax(1), color=colour, alpha=0.12, linewidth=0)
            (handles[method],) = panel.plot(steps, values.quantile(0.5, dim=1), color=colour)
            panel.set(title=problem, xlabel="outer iterations", ylabel=column, xscale="log", yscale=scale)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    write_atomically(path, picture.getvalue())


# ---- The run: what is not the algorithm --------------------------------------------------------------
class Diverged(Exception):
    """One sentence: which numbers stopped being finite, and when; exit status 1."""


def say(text: str) -> None:
    """Print a line on stderr, above the progress bar. A reader that went away never changes a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file=sys.stderr)


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line as Args; with --resume the arguments of that run, of which those given again win.

    Raises BadInput; tyro itself exits with status 2 on words that it cannot parse.
    """
    saved, parser = None, argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    folder = parser.parse_known_args(argv)[0].resume
    if folder:
        try:
            made = json.loads((folder / "args.json").read_text())
            if made["script"] != Path(__file__).name:
                raise ValueError(f"it was made by {made['script']}")
            saved = Args(**made["args"] | {"resume": folder})
        except (OSError, ValueError, KeyError, TypeError, BadInput) as error:
            raise BadInput(f"--resume {folder} is not a run folder of this script: {error}") from error
    args = tyro.cli(Args, args=argv, default=saved, description=__doc__.split("\n\n")[0])
    for name, value in saved or ():
        if getattr(args, name) != value:
            say(f"--{name.replace('_', '-')} was {value} and is now {getattr(args, name)}")
    return args


def provenance() -> dict:
    """What makes a run: command, commit, versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    words = "git describe --always --dirty --abbrev=40 --exclude=*"
    git = subprocess.run(words, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    versions |= {"python": sys.version.split()[0]}
    script, commit = Path(__file__).name, git.stdout.strip() or None
    return {"script": script, "argv": sys.argv, "commit": commit, "versions": versions}


def write_atomically(path: Path, content: bytes | dict) -> None:
    """Replace `path` by bytes or by what torch saves: after a crash the old or the new content is there."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # a full disk should not stay full of half a file


def write_json(path: Path, content: dict) -> None:
    """Write or replace a json file."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write or replace a csv file; the header is the union of the rows' keys, a missing cell is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
    write_atomically(path, text.getvalue().encode())


def open_folder(args: Args) -> tuple[Path, filelock.BaseFileLock, dict]:
    """The folder of a new run or of the one to resume, its lock, and its checkpoint. Raises BadInput."""
    folder, resumed = args.resume, args.resume is not None
    saved = {"instances": [args.seed, args.instances], "states": {}, "wall_time": 0.0}
    if not resumed:
        folder = args.run_dir / f"{Path(__file__).stem}__{args.seed}__{int(time.time())}"
        while folder.exists():  # a run of the same second
            folder = folder.with_name(folder.name + "_")
    try:
        made = json.loads((folder / "args.json").read_text()) if resumed else provenance()
        folder.mkdir(parents=True, exist_ok=resumed)
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0).lock
        if resumed:
            checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
            saved = {name: checkpoint[name] for name in saved}
    except Exception as error:  # no permission, a run that goes on, a damaged archive, ...
        if isinstance(error, FileExistsError) and folder.exists():
            return open_folder(args)  # another run of the same second was faster
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"--{'resume' if resumed else 'run-dir'} {folder} cannot be used: {reason}") from error
    if saved["instances"] != [args.seed, args.instances]:
        raise BadInput(f"--resume {folder} has other instances; leave out --seed and --instances")
    for key, (name, _) in chosen_pairs(args).items():
        state, end = saved["states"].get(key), args.iterations or PROBLEMS[name].iterations
        if state and (state["k"] > end or state["k"] == end != state["rows"][-1]["iteration"] + 1):
            raise BadInput(f"--resume {folder} has made {state['k']} iterations; --iterations must be more")
    write_json(folder / "args.json", made | {"args": args.model_dump(mode="json", exclude={"resume"})})
    (folder / "result.json").unlink(missing_ok=True)  # of the part before
    return folder, lock, saved


def train(args: Args) -> Path:
    """Run every method on every problem and return the run folder.

    Raises BadInput before anything is created, and at the end Diverged if a method did not stay finite.
    SIGINT and SIGTERM end the run; with --resume it goes on from there.
    """
    torch.set_num_threads(1)  # matrices of ten rows gain nothing from more
    folder, lock, checkpoint = open_folder(args)
    states, begun = checkpoint["states"], time.perf_counter() - checkpoint["wall_time"]
    pairs, diverged, result = chosen_pairs(args), [], {"status": "finished"}
    others = [state for key, state in states.items() if key not in pairs]  # of a run that was resumed
    rows, summary = [row for state in others for row in state["rows"]], [*map(summarise, others)]

    def save() -> None:
        checkpoint["wall_time"] = time.perf_counter() - begun
        write_atomically(folder / "checkpoint.pt", checkpoint)

    caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in caught]
    try:
        for key, (name, method) in pairs.items():
            try:
                for state in follow(name, method, args, states.get(key)):
                    states[key] = state
                    if state["k"] % args.checkpoint_every == 0:
                        save()
            except FloatingPointError as error:
                diverged.append(f"{key}: {error}")
                summary.append({"problem": name, "method": method, "note": f"diverged: {error}"})
            else:
                rows += states[key]["rows"]
                summary.append(summarise(states[key]))
                reached = (
                    "Phi {objective_median:9.5f}  |grad Phi| {gradient_norm_median:8.2e}  {seconds:6.1f} s"
                )
                say(f"{name:20} {method:21} {reached.format(**summary[-1])}")
            save()
            write_csv(folder / "curves.csv", rows)
            write_csv(folder / "summary.csv", summary)
        if "preference-learning" in (args.problems or PROBLEMS):
            seeds = range(args.seed, args.seed + args.instances)
            write_csv(folder / "bias.csv", measure_bias(PreferenceLearning(seeds), seeds))
        synthetic = [row for row in rows if row["problem"] == "synthetic"]
        if rows:
            draw_figure(folder / "convergence.png", rows, "gradient_norm", "objective")
        if synthetic:
            draw_figure(folder / "figure_4.png", synthetic, "estimate_norm", "upper_value")
        if diverged:
            raise Diverged("; ".join(diverged))
    except BaseException as error:
        kinds = {SystemExit: "interrupted", Diverged: "diverged"}
        result = {"status": kinds.get(type(error), "failed")}
        if isinstance(error, SystemExit):
            save()
            say(f"continue with --resume {folder}")
        else:
            result["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        for number, handler in zip(caught, handlers):
            signal.signal(number, handler)
        write_json(folder / "result.json", result | {"wall_time_s": time.perf_counter() - begun})
        say(f"{result['status']}: {folder}")
        lock.release()
    return folder


# ---- Entry point (shared) ----------------------------------------------------------------------------
if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where a task of the user's own may lie
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if it is closed
    try:
        train(parse_args())
    except (BadInput, Diverged) as error:
        say(f"error: {error}")
        sys.exit(2 if isinstance(error, BadInput) else 1)
