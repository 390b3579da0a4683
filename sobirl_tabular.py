"""SoBiRL on tabular MDPs (Yang, Gao, Yuan 2025, arXiv:2405.19697): the hypergradient of bilevel reinforcement learning, exact.

The leader's x shapes the reward r_x of an entropy-regularised MDP, the follower answers with its one optimal policy:

    min_x Phi(x) = f(x, pi*(x)),   pi*(x) = argmax_pi V^pi      eq. (4)     -> optimal_soft_values, Problem.objective
    V* = phi(x, V*),  phi(x, v)(s) = tau log sum_a exp((r_x(s,a) + gamma (Pv)(s,a)) / tau)         -> soft_bellman
    grad V* = (I - gamma P^pi)^-1 E_pi grad r,  grad Q* = grad r + gamma P grad V*   Prop. 4.1, 5.1 -> value_gradients
    grad pi* = pi* (grad Q* - grad V*) / tau                     eq. (8)     -> policy_jacobian
    grad Phi = grad_x f + grad r^T (pi o grad_pi f - pi o w) / tau,
               (I - gamma P^pi)^T w = U^T (pi o grad_pi f)       eq. (24)    -> adjoint_system, model_based_hypergradient
             = E[grad_x l] + E[l sum_h (grad Q* - grad V*)(s_h, a_h)] / tau
                                                                 eq. (12, 13) -> sobirl_hypergradient

    M-SoBiRL (Algorithm 2): one gradient step on w, one on x, N sweeps of the soft Bellman operator    -> m_sobirl
    SoBiRL (Algorithm 1): pi_k by mirror descent, the two expectations exact                           -> sobirl
    Stoc-SoBiRL (Algorithms 3, 4): both from samples, with momentum            -> stochastic_hypergradient, stoc_sobirl

Six families of random instances, all of which have a computable Phi: the paper's synthetic problem, a variant of it on
which the implicit term decides, reward shaping, preference learning, contract design, goal navigation. Controls: `x-only`
drops the implicit term (for preferences it is the rule of DRLHF), `one-step` keeps only its first reward, as the released
code does. A leading dimension B of every tensor counts instances. docs/sobirl.md numbers the details and differences.

    python sobirl_tabular.py
"""

# ---- Imports ---------------------------------------------------------------------------------------------------
import ast
import csv
import difflib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor
from torch.nn.functional import softplus


# ---- Arguments -------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """Every number must lie in the interval that its line states."""

    problems: tuple[str, ...] = ()
    """any of: synthetic, discriminating, reward-shaping, preference-learning, contract-design, goal-navigation; default: all"""
    methods: tuple[str, ...] = ()
    """any of: m-sobirl, sobirl, one-step, x-only, stoc-sobirl, stoc-sobirl-baseline, stoc-sgd; default: all that apply"""
    seed: int = 1
    """seed of the first instance, in [0, 2147483647]; the others follow"""
    instances: int = 10
    """instances of each problem, in [1, 1000]"""
    run_dir: Path = Path("runs")
    """the run's own folder is created in this one: {run_dir}/sobirl_tabular__{seed}__{time}"""

    iterations: int | None = None
    """outer iterations K, in [1, inf); default: the problem's own"""
    step_size: float | None = None
    """beta, step size of x in SoBiRL and the controls, in (0, inf); default: the problem's own"""
    tracking_step_size: float | None = None
    """beta of M-SoBiRL, where w and Q have to keep up with x, in (0, inf); default: the problem's own"""
    adjoint_step_size: float = 0.5
    """xi, step size of w in M-SoBiRL, in (0, inf); stable below 2 / sigma_max(I - gamma P)^2"""
    inner_sweeps: int = 10
    """N, sweeps of the soft Bellman operator in M-SoBiRL, in [1, inf)"""
    policy_error: float = 1e-6
    """epsilon, largest |pi_k - pi*|^2 of SoBiRL and Stoc-SoBiRL, in [1e-20, inf)"""
    mirror_descent_step: float = 0.5
    """step of the mirror descent on the policy, in (0, 1]; 1 is soft policy iteration"""
    tuples: int = 16
    """sampled tuples of trajectories in one stochastic hypergradient, in [2, inf)"""
    rollouts: int = 2
    """M, rollouts from each visited state and action, in [1, inf)"""
    rollout_length: int = 20
    """T, steps of such a rollout, in [1, inf)"""
    stochastic_step_size: float | None = None
    """c of Stoc-SoBiRL's step sizes beta_k = c (m + k)^(-1/3), in (0, inf); default: the problem's own"""
    step_offset: float = 8.0
    """m of these step sizes, in [1, inf)"""
    momentum_coef: float | None = None
    """eta_k = min(1, momentum_coef beta_(k-1)^2), in (0, inf); default: what makes eta 1/2 after the first step"""


# ---- Entropy-regularised MDP -----------------------------------------------------------------------------------
def q_values(values: Tensor, rewards: Tensor, transitions: Tensor, gamma: float) -> Tensor:
    """Q = r + gamma P V (eq. 3): values (B, S), rewards (B, S, A), transitions (B, S, A, S) -> (B, S, A)."""
    return rewards + gamma * (transitions @ values[:, None, :, None]).squeeze(-1)


def log_sum_exp(q: Tensor, tau: float) -> Tensor:
    """tau log sum_a exp(Q / tau) (eq. 7): (B, S, A) -> (B, S), in units of reward; safe for any size of Q / tau."""
    return tau * torch.logsumexp(q / tau, -1)


def soft_bellman(values: Tensor, rewards: Tensor, transitions: Tensor, gamma: float, tau: float) -> Tensor:
    """phi(x, v) of eq. (6), a gamma-contraction in the maximum norm: values (B, S) -> (B, S)."""
    return log_sum_exp(q_values(values, rewards, transitions, gamma), tau)


def policy_transitions(policy: Tensor, transitions: Tensor) -> Tensor:
    """P^pi(s, s') = sum_a pi(s, a) P(s, a, s'): (B, S, A), (B, S, A, S) -> (B, S, S)."""
    return (policy.unsqueeze(-2) @ transitions).squeeze(-2)


def resolvent_matrix(policy: Tensor, transitions: Tensor, gamma: float) -> Tensor:
    """I - gamma P^pi (B, S, S): its inverse turns rewards of a step into discounted sums (Prop. 4.1)."""
    return torch.eye(policy.shape[1], dtype=policy.dtype) - gamma * policy_transitions(policy, transitions)


def soft_policy_values(policy: Tensor, rewards: Tensor, transitions: Tensor, gamma: float, tau: float) -> Tensor:
    """V^pi (B, S) of any policy (B, S, A): discounted reward plus tau times the entropy in nats (sec. 3.1)."""
    gains = (policy * rewards).sum(-1) + tau * torch.special.entr(policy).sum(-1)
    return torch.linalg.solve(resolvent_matrix(policy, transitions, gamma), gains)


def optimal_soft_values(
    rewards: Tensor, transitions: Tensor, gamma: float, tau: float, values: Tensor | None = None
) -> Tensor:
    """V* (B, S), the fixed point of `soft_bellman`, to rounding; `values` (B, S) is a first guess.

    Newton's method on v - phi(v): its derivative is I - gamma P^pi with the softmax policy of v (Prop. 4.1), so a step is
    soft policy iteration; phi is convex, so the steps ascend to V* from the second on. Raises FloatingPointError for
    rewards that are not finite, or too large for float64 to tell V* from its neighbours.
    """
    values = torch.zeros_like(rewards[..., 0]) if values is None else values
    for _ in range(100 if rewards.isfinite().all() else 0):
        q = q_values(values, rewards, transitions, gamma)
        residual = log_sum_exp(q, tau) - values
        if (residual.abs().amax(-1) <= 1e-14 * (1 + q.abs().amax((-2, -1)))).all():
            return values + residual
        values = values + torch.linalg.solve(resolvent_matrix((q / tau).softmax(-1), transitions, gamma), residual)
    raise FloatingPointError("the soft Bellman equation has no solution in float64: its rewards are not finite or too large")


def mirror_descent(
    policy: Tensor, rewards: Tensor, transitions: Tensor, gamma: float, tau: float, policy_error: float, step: float
) -> Tensor:
    """A policy (B, S, A) with |pi - pi*|^2 <= policy_error (Frobenius), from `policy` on: line 2 of Algorithm 1.

    Mirror descent with the Kullback-Leibler divergence (Lan 2023; Zhan et al. 2023): log pi <- (1 - step) log pi +
    step Q^pi / tau, normalised. It needs no pi* to stop: with the Bellman gap d = max_s (phi(V^pi) - V^pi), Q^pi is
    within gamma d / (1 - gamma) of Q*, and softmax, from the maximum norm to the 1-norm, is 1-Lipschitz, so the rows of
    softmax(Q^pi / tau), which is returned, are within gamma d / ((1 - gamma) tau) of those of pi*. Raises
    FloatingPointError if that bound cannot be met in 10,000 steps.
    """
    log_policy = policy.clamp(min=torch.finfo(policy.dtype).tiny).log()  # an entry that underflowed may come back
    for _ in range(10_000 if rewards.isfinite().all() else 0):
        values = soft_policy_values(log_policy.exp(), rewards, transitions, gamma, tau)
        q = q_values(values, rewards, transitions, gamma)
        gap = (log_sum_exp(q, tau) - values).amax(-1)
        if (policy.shape[1] * (gamma * gap / ((1 - gamma) * tau)) ** 2 <= policy_error).all():
            return (q / tau).softmax(-1)
        log_policy = ((1 - step) * log_policy + step * q / tau).log_softmax(-1)
    raise FloatingPointError("mirror descent does not reach the policy error: the rewards are not finite or too large for it")


# ---- Implicit differentiation ----------------------------------------------------------------------------------
def value_gradients(policy: Tensor, reward_jacobian: Tensor, transitions: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """grad Q (B, S, A, n) and grad V (B, S, n) of Prop. 5.1: values of the policy for the n rewards grad r.

    policy (B, S, A), reward_jacobian (B, S, A, n), transitions (B, S, A, S). At pi* they are the derivatives of Q* and
    V* (the same as Prop. 4.1); at another policy the approximations that Algorithm 1 uses.
    """
    grad_v = torch.linalg.solve(
        resolvent_matrix(policy, transitions, gamma), (policy.unsqueeze(-1) * reward_jacobian).sum(-2)
    )
    return reward_jacobian + gamma * transitions @ grad_v.unsqueeze(1), grad_v


def truncated_value_gradients(
    policy: Tensor, reward_jacobian: Tensor, transitions: Tensor, gamma: float, length: int
) -> tuple[Tensor, Tensor]:
    """`value_gradients` with only the first `length` >= 1 terms of the sums: what rollouts of that length have as mean.
    Length 1 is what the released code uses: grad r(s, a) and sum_a pi(s, a) grad r(s, a)."""
    grad_q = reward_jacobian
    for _ in range(length - 1):
        grad_v = (policy.unsqueeze(-1) * grad_q).sum(-2)
        grad_q = reward_jacobian + gamma * transitions @ grad_v.unsqueeze(1)
    return grad_q, (policy.unsqueeze(-1) * grad_q).sum(-2)


def policy_jacobian(policy: Tensor, grad_q: Tensor, grad_v: Tensor, tau: float) -> Tensor:
    """grad pi* (B, S, A, n) = pi* (grad Q* - grad V*) / tau, eq. (8)."""
    return policy.unsqueeze(-1) * (grad_q - grad_v.unsqueeze(2)) / tau


def adjoint_system(policy: Tensor, policy_slope: Tensor, transitions: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """A = (I - gamma P^pi)^T (B, S, S) and b = U^T (pi o grad_pi f) (B, S), the system A w = b of eq. (24).

    policy, policy_slope = grad_pi f (B, S, A). U_{(s,a),s'} = 1[s = s'] - gamma P(s, a, s') takes V to Q's implicit part.
    """
    flow = policy * policy_slope
    b = flow.sum(-1) - gamma * (flow.flatten(1).unsqueeze(1) @ transitions.flatten(1, 2)).squeeze(1)
    return resolvent_matrix(policy, transitions, gamma).mT, b


def model_based_hypergradient(
    x_slope: Tensor, policy_slope: Tensor, policy: Tensor, weights: Tensor, w: Tensor, reward_jacobian: Tensor, tau: float
) -> Tensor:
    """grad_x f + grad r^T (pi o grad_pi f - weights o w) / tau (B, n), eq. (24).

    x_slope (B, n); policy_slope, policy (B, S, A); w (B, S) solves the adjoint system; `weights` (B, S, A) are those of
    phi's derivative, d phi / dx = sum_a weights grad r: softmax((r_x + gamma P v) / tau), at the solution pi* itself.
    """
    flow = policy * policy_slope - weights * w.unsqueeze(-1)
    return x_slope + (flow.unsqueeze(-1) * reward_jacobian).sum((1, 2)) / tau


def sobirl_hypergradient(
    x_slope: Tensor, policy_slope: Tensor, policy: Tensor, grad_q: Tensor, grad_v: Tensor, tau: float
) -> Tensor:
    """(12) + (13), or (14) at another policy than pi*, with both expectations exact (B, n).

    An expectation over trajectories is a polynomial in the policy's entries, in which pi(s, a) stands once for each visit;
    so E[l sum_h g(s_h, a_h)] = sum_{s,a} pi(s, a) (df/dpi)(s, a) g(s, a) for every g, and E[grad_x l] = grad_x f.
    """
    return x_slope + (policy_slope.unsqueeze(-1) * policy_jacobian(policy, grad_q, grad_v, tau)).sum((1, 2))


def gradient(y: Tensor, x: Tensor) -> Tensor:
    """dy/dx for y of shape (B,), whose entry b depends on x[b] only; zeros if it does not depend on x at all."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y.sum(), x, retain_graph=True, materialize_grads=True)[0]


def objective_slopes(problem: "Problem", x: Tensor, policy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(x, pi) (B,), grad_x f (B, n) and grad_pi f (B, S, A), plain partial derivatives, by automatic differentiation."""
    x, policy = x.detach().requires_grad_(), policy.detach().requires_grad_()
    value = problem.objective(x, policy)
    return value.detach(), gradient(value, x), gradient(value, policy)


class Exact(NamedTuple):
    """What is true at x: Phi (B,), its gradient (B, n), pi* (B, S, A), V* (B, S) and the adjoint w (B, S)."""

    objective: Tensor
    gradient: Tensor
    policy: Tensor
    values: Tensor
    w: Tensor


def exact_hypergradient(problem: "Problem", x: Tensor, values: Tensor | None = None) -> Exact:
    """Phi and its gradient at x (B, n) by eq. (24), the lower level and the adjoint system solved to rounding."""
    rewards = problem.reward(x)
    values = optimal_soft_values(rewards, problem.transitions, problem.gamma, problem.tau, values)
    policy = (q_values(values, rewards, problem.transitions, problem.gamma) / problem.tau).softmax(-1)
    objective, x_slope, policy_slope = objective_slopes(problem, x, policy)
    matrix, b = adjoint_system(policy, policy_slope, problem.transitions, problem.gamma)
    w = torch.linalg.solve(matrix, b)
    jacobian = problem.reward_jacobian(x)
    grad = model_based_hypergradient(x_slope, policy_slope, policy, policy, w, jacobian, problem.tau)
    return Exact(objective, grad, policy, values, w)


# ---- Upper levels ----------------------------------------------------------------------------------------------
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


def finite_horizon_sum(start: Tensor, policy: Tensor, transitions: Tensor, rewards: Tensor, horizon: int) -> Tensor:
    """E[sum_{h < horizon} r(s_h, a_h)], undiscounted: start (B, S), policy and rewards (B, S, A) -> (B,)."""
    total, distribution, chain = 0.0, start.unsqueeze(1), policy_transitions(policy, transitions)
    for _ in range(horizon):
        total = total + (distribution.squeeze(1) * (policy * rewards).sum(-1)).sum(-1)
        distribution = distribution @ chain
    return total


def enumerate_trajectories(states: int, actions: int, horizon: int) -> tuple[Tensor, Tensor]:
    """All (S A)^H trajectories s_0, a_0, ..., s_{H-1}, a_{H-1}: their states and their actions, each (D, H)."""
    pairs = torch.cartesian_prod(*[torch.arange(states * actions)] * horizon).view(-1, horizon)
    return pairs // actions, pairs % actions


def trajectory_probabilities(start: Tensor, policy: Tensor, transitions: Tensor, states: Tensor, actions: Tensor) -> Tensor:
    """rho(d; pi) = start(s_0) prod_h pi(s_h, a_h) prod_h P(s_h, a_h, s_{h+1}) (B, D) of trajectories (D, H) (sec. 3.3)."""
    probabilities = start[:, states[:, 0]] * policy[:, states, actions].prod(-1)
    return probabilities * transitions[:, states[:, :-1], actions[:, :-1], states[:, 1:]].prod(-1)


class Problem:
    """B instances of a bilevel problem: the lower MDP (transitions, gamma, tau, r_x) and the upper level f.

    `draw` makes one instance from a random generator: a dictionary of tensors that becomes, stacked over the seeds, the
    attributes of the problem; `x` (n,) and `w` (S,) are the first iterates, `transitions` (S, A, S) the lower dynamics.
    Where f is an expectation over trajectories (eq. 11), `loss` is its l, `start` (S,) and `upper_transitions` (S, A, S)
    the upper MDP, `horizon` the length H of a trajectory and `trajectories` their number I in a tuple.
    """

    gamma: float
    tau: float
    iterations: int
    step_size: float
    tracking_step_size: float
    stochastic_step_size: float | None = None
    horizon: int = 0
    trajectories: int = 1
    start: Tensor
    upper_transitions: Tensor
    x: Tensor
    w: Tensor
    transitions: Tensor

    def __init__(self, seeds: list[int]):
        instances = [self.draw(torch.Generator().manual_seed(seed)) for seed in seeds]
        for name in instances[0]:
            setattr(self, name, torch.stack([instance[name] for instance in instances]))

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors of one instance."""
        raise NotImplementedError

    def reward(self, x: Tensor) -> Tensor:
        """r_x (B, S, A) at x (B, n), differentiable."""
        raise NotImplementedError

    def reward_jacobian(self, x: Tensor) -> Tensor:
        """grad r_x (B, S, A, n) in closed form."""
        raise NotImplementedError

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """f(x, pi) (B,) at x (B, n) and policy (B, S, A), differentiable in both."""
        raise NotImplementedError

    def loss(self, x: Tensor, states: Tensor, actions: Tensor, labels: Tensor) -> Tensor:
        """l(d_1..d_I; x) (B, N): states and actions (B, N, I, H), labels (B, N); differentiable in x."""
        raise NotImplementedError

    def label_probabilities(self, states: Tensor, actions: Tensor) -> Tensor:
        """Probability (B, N) that the label of a tuple is 1; 0 where the problem has no labels."""
        return torch.zeros(states.shape[:2], dtype=torch.float64)

    def scores(self, x: Tensor, policy: Tensor) -> dict[str, Tensor]:
        """Further numbers (B,) to be logged at x and its pi*."""
        return {}


class Synthetic(Problem):
    """The paper's synthetic problem (app. J.3): f = |x|^2 / 2 + |pi|^2 / 2, r_x(s, a) = c_{sa} x^T M x.

    Its minimum is known: at x = 0 the reward is 0 and pi* uniform, Phi = S / (2 A) = 1. What the text leaves out (law of c and
    M, temperature, step sizes) follows the released code.
    """

    states, actions, dimension = 10, 5, 100
    gamma, tau, iterations, step_size, tracking_step_size = 0.5, 1.0, 3000, 8e-3, 8e-3

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Sparse P; c a product of two uniform numbers, M and x_0 standard normal."""
        return {
            "transitions": sparse_distributions(generator, self.states, self.actions),
            "scale": uniforms(generator, self.states, self.actions) * uniforms(generator, self.states, self.actions),
            "form": normals(generator, self.dimension, self.dimension),
            "x": normals(generator, self.dimension),
            "w": normals(generator, self.states),
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
    """The synthetic problem changed so that the implicit term decides: r_x = C x, f = 1e-3 |x|^2 / 2 + |pi - pi_0|^2 / 2.

    pi_0 is a random policy that the leader wants the follower to adopt. Here grad r is bounded, as Assumption 7.3 asks.
    """

    states, actions, dimension, ridge = 10, 5, 100, 1e-3
    gamma, tau, iterations, step_size, tracking_step_size = 0.5, 1.0, 3000, 1.0, 1.0

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Dense P and pi_0 with Dirichlet(1) rows, C normal with variance 1 / n."""
        return {
            "transitions": random_distributions(generator, self.states, self.actions, self.states),
            "features": normals(generator, self.states, self.actions, self.dimension) / math.sqrt(self.dimension),
            "target": random_distributions(generator, self.states, self.actions),
            "x": normals(generator, self.dimension),
            "w": normals(generator, self.states),
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

    Upper: reward 1 in one goal state, discount 0.8, no entropy, H infinite: l = -sum_h 0.8^h r(s_h, a_h). Lower: discount 0.5,
    r_x = sparse reward + 2 tanh(x_{sa}). Sampled trajectories are cut after 20 steps, which leaves out 0.8^20 = 1 % of the
    largest return. f does not contain x, so `x-only` never moves.
    """

    states, actions, bound, upper_gamma, horizon = 8, 3, 2.0, 0.8, 20
    gamma, tau, iterations = 0.5, 0.5, 600
    step_size, tracking_step_size, stochastic_step_size = 0.3, 0.3, 0.4

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Sparse P, the same at both levels; the goal is state 0, the start uniform over the others."""
        transitions = sparse_distributions(generator, self.states, self.actions)
        sparse_reward = torch.zeros(self.states, self.actions, dtype=torch.float64)
        sparse_reward[0] = 1.0
        start = torch.full((self.states,), 1 / (self.states - 1), dtype=torch.float64)
        start[0] = 0.0
        return {
            "transitions": transitions,
            "upper_transitions": transitions,
            "sparse_reward": sparse_reward,
            "start": start,
            "x": 0.1 * normals(generator, self.states * self.actions),
            "w": normals(generator, self.states),
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
    """Reinforcement learning from preferences (sec. 3.3, eq. 101): the leader fits r_x to labels of the follower's own pairs.

    Two trajectories of H = 2 steps; the teacher prefers the first with probability sigma(R(d_1) - R(d_2)) of the true
    return, the model says sigma(R_x(d_1) - R_x(d_2)); l is the cross-entropy of a label. r_x = 2 tanh of 6 features for 12
    state-action pairs, so the true reward is in general out of reach and it matters on which pairs the fit is good.
    """

    states, actions, dimension, bound, horizon, trajectories = 4, 3, 6, 2.0, 2, 2
    gamma, tau, iterations = 0.8, 0.5, 600
    step_size, tracking_step_size, stochastic_step_size = 0.3, 0.03, 0.3

    def __init__(self, seeds: list[int]):
        super().__init__(seeds)
        self.paths = enumerate_trajectories(self.states, self.actions, self.horizon)
        self.preferences = torch.sigmoid(self.return_differences(self.true_reward))

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Dense P, the same at both levels; normal true rewards and features."""
        transitions = random_distributions(generator, self.states, self.actions, self.states)
        return {
            "transitions": transitions,
            "upper_transitions": transitions,
            "true_reward": normals(generator, self.states, self.actions),
            "features": normals(generator, self.states, self.actions, self.dimension) / math.sqrt(self.dimension),
            "start": random_distributions(generator, self.states),
            "x": 0.1 * normals(generator, self.dimension),
            "w": normals(generator, self.states),
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
        """Expected cross-entropy (B, D, D) in nats of the label of each pair: softplus(z) - p z at the logit z."""
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
        """`true_return`: discounted true reward of pi*(x), no entropy. `accuracy`: how often, on pairs of pi*(x) of
        different true return, r_x prefers the one that has more of it (a tie of r_x counts one half)."""
        values = soft_policy_values(policy, self.true_reward, self.transitions, self.gamma, 0.0)
        truth, model = self.preferences - 0.5, self.return_differences(self.reward(x))
        right = self.pair_mean(policy, ((truth * model).sign() + 1) / 2 * (truth != 0))
        different = self.pair_mean(policy, (truth != 0).double())
        return {"true_return": (self.start * values).sum(-1), "accuracy": right / different}


class ContractDesign(Problem):
    """Contract design (app. K): a principal pays b_x(s) = sigma(x_s) in each state, the agent bears the costs c(s, a).

    Lower: r_x(s, a) = b_x(s) - c(s, a). Upper: l = -sum_{h < 8} (income(s_h) - b_x(s_h)), which needs the states alone. For
    a fixed policy it is best to pay nothing, which is where `x-only` goes.
    """

    states, actions, horizon = 6, 3, 8
    gamma, tau, iterations = 0.8, 0.1, 600
    step_size, tracking_step_size, stochastic_step_size = 0.3, 0.01, 0.2

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Sparse P, the same at both levels; costs uniform in [0, 0.3); incomes 3 u^2 with u uniform: few states pay well."""
        transitions = sparse_distributions(generator, self.states, self.actions)
        return {
            "transitions": transitions,
            "upper_transitions": transitions,
            "costs": 0.3 * uniforms(generator, self.states, self.actions),
            "income": 3 * uniforms(generator, self.states) ** 2,
            "start": random_distributions(generator, self.states),
            "x": 0.1 * normals(generator, self.states),
            "w": normals(generator, self.states),
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
    """Efficient robot navigation (app. K; Chakraborty et al. 2024): the designer moves the goal x in R^2 of a robot in a maze.

    5 x 5 cells with centres in [0, 1]^2, a fifth of them walls; actions stay, up, down, left, right; one move in ten is random.
    Lower: r_x(s) = exp(-|s - x|^2 / (2 0.3^2)). Upper: l = 0.5 |x - destination|^2 - mean_{h < 10} r_x(s_h): a goal near the
    destination that the robot can reach in time.
    """

    size, actions, width, weight, slip, horizon = 5, 5, 0.3, 0.5, 0.1, 10
    gamma, tau, iterations = 0.9, 0.2, 600
    step_size, tracking_step_size, stochastic_step_size = 0.03, 0.003, 0.01

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Walls at random; the robot starts in one corner, the destination, x_0, is the opposite one."""
        size, cells = self.size, self.size**2
        walls = uniforms(generator, cells) < 0.2
        walls[[0, -1]] = False
        rows, columns = torch.arange(cells) // size, torch.arange(cells) % size
        moves = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
        targets = (rows[:, None] + moves[:, 0]).clamp(0, size - 1) * size + (columns[:, None] + moves[:, 1]).clamp(0, size - 1)
        targets = torch.where(walls[targets], torch.arange(cells)[:, None], targets)
        meant = torch.nn.functional.one_hot(targets, cells).double()
        transitions = (1 - self.slip) * meant + self.slip * meant.mean(1, keepdim=True)
        return {
            "transitions": transitions,
            "upper_transitions": transitions,
            "positions": torch.stack([rows, columns], -1) / (size - 1.0),
            "start": torch.nn.functional.one_hot(torch.tensor(0), cells).double(),
            "destination": torch.ones(2, dtype=torch.float64),
            "x": torch.ones(2, dtype=torch.float64),
            "w": normals(generator, cells),
        }

    def reward(self, x: Tensor) -> Tensor:
        """A bump of width 0.3 around x, the same for every action."""
        squares = ((self.positions - x.unsqueeze(1)) ** 2).sum(-1)
        return torch.exp(-squares / (2 * self.width**2)).unsqueeze(-1).expand(-1, -1, self.actions)

    def reward_jacobian(self, x: Tensor) -> Tensor:
        """The bump times (position - x) / 0.3^2."""
        return self.reward(x).unsqueeze(-1) * ((self.positions - x.unsqueeze(1)) / self.width**2).unsqueeze(2)

    def objective(self, x: Tensor, policy: Tensor) -> Tensor:
        """Deviation from the destination minus the mean reward of 10 steps."""
        total = finite_horizon_sum(self.start, policy, self.upper_transitions, self.reward(x), self.horizon)
        return self.weight * ((x - self.destination) ** 2).sum(-1) - total / self.horizon

    def loss(self, x: Tensor, states: Tensor, actions: Tensor, labels: Tensor) -> Tensor:
        """Deviation from the destination minus the mean reward along the one trajectory."""
        deviation = self.weight * ((x - self.destination) ** 2).sum(-1, keepdim=True)
        return deviation - at(self.reward(x), states, actions).mean((-2, -1))


PROBLEMS = {
    "synthetic": Synthetic,
    "discriminating": Discriminating,
    "reward-shaping": RewardShaping,
    "preference-learning": PreferenceLearning,
    "contract-design": ContractDesign,
    "goal-navigation": GoalNavigation,
}


# ---- Algorithms 2 and 1 ----------------------------------------------------------------------------------------
class Iterate(NamedTuple):
    """One outer iteration: x_k and the direction h_k (B, n), the policy (B, S, A) that it was made with."""

    x: Tensor
    direction: Tensor
    policy: Tensor


def m_sobirl(
    problem: Problem, step_size: float, adjoint_step_size: float, inner_sweeps: int, implicit: bool = True
) -> Iterator[Iterate]:
    """M-SoBiRL, Algorithm 2, from Q_0 = 0; without `implicit` the control that follows grad_x f alone. Endless."""
    transitions, gamma, tau = problem.transitions, problem.gamma, problem.tau
    x, w, rewards = problem.x, problem.w, problem.reward(problem.x)
    q = torch.zeros_like(rewards)
    while True:
        policy, values = (q / tau).softmax(-1), log_sum_exp(q, tau)  # values: eq. (9)
        _, x_slope, policy_slope = objective_slopes(problem, x, policy)
        matrix, b = adjoint_system(policy, policy_slope, transitions, gamma)
        residual = matrix @ w.unsqueeze(-1) - b.unsqueeze(-1)
        w = w - adjoint_step_size * (matrix.mT @ residual).squeeze(-1)  # one step on |A w - b|^2 / 2
        weights = (q_values(values, rewards, transitions, gamma) / tau).softmax(-1)
        direction = x_slope
        if implicit:
            jacobian = problem.reward_jacobian(x)
            direction = model_based_hypergradient(x_slope, policy_slope, policy, weights, w, jacobian, tau)
        yield Iterate(x, direction, policy)
        x = x - step_size * direction
        rewards = problem.reward(x)
        for _ in range(inner_sweeps):  # the soft Bellman operator on Q, from the last Q on
            q = q_values(log_sum_exp(q, tau), rewards, transitions, gamma)


def sobirl(
    problem: Problem, step_size: float, policy_error: float, mirror_descent_step: float, length: int | None = None
) -> Iterator[Iterate]:
    """SoBiRL, Algorithm 1, with the expectations of (14) exact; `length` cuts the sums of Prop. 5.1. Endless."""
    transitions, gamma, tau = problem.transitions, problem.gamma, problem.tau
    x, policy = problem.x, torch.full_like(problem.transitions[..., 0], 1 / problem.transitions.shape[2])
    while True:
        policy = mirror_descent(policy, problem.reward(x), transitions, gamma, tau, policy_error, mirror_descent_step)
        _, x_slope, policy_slope = objective_slopes(problem, x, policy)
        jacobian = problem.reward_jacobian(x)
        if length is None:
            gradients = value_gradients(policy, jacobian, transitions, gamma)
        else:
            gradients = truncated_value_gradients(policy, jacobian, transitions, gamma, length)
        direction = sobirl_hypergradient(x_slope, policy_slope, policy, *gradients, tau)
        yield Iterate(x, direction, policy)
        x = x - step_size * direction


# ---- Algorithms 3 and 4 ----------------------------------------------------------------------------------------
class Sample(NamedTuple):
    """zeta of Algorithm 3, N tuples in each of B instances: states and actions (B, N, I, H), long; labels (B, N);
    `visits` (B, N, S, A), so that the sum over a tuple's steps of the estimates (grad Q - grad V) is sum_{sa} visits grad r."""

    states: Tensor
    actions: Tensor
    labels: Tensor
    visits: Tensor


def categorical(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Indices (...) drawn by inversion: cumulative probabilities (..., m), uniform numbers (...)."""
    return (cumulative[..., :-1] <= uniform.unsqueeze(-1)).sum(-1)  # without the last, which rounding may leave below 1


def roll_out(
    states: Tensor, actions: Tensor | None, policy: Tensor, transitions: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Trajectories (B, R, T) of states and of actions from first states (B, R), and first actions unless None.

    policy (B, S, A), transitions (B, S, A, S); uniform (B, R, T, 2) in [0, 1) are the random numbers (eq. 78).
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
    return tuple(torch.stack(column, -1) for column in zip(*path))


def draw_sample(
    problem: Problem, policy: Tensor, tuples: int, rollouts: int, length: int, generators: list[torch.Generator]
) -> Sample:
    """Algorithm 3: N tuples of upper trajectories, and from each of their steps M + M lower rollouts of length T.

    The rollouts of grad Q start with the visited action, those of grad V, independent of them, with one of the policy's own.
    There is one generator for each instance, so that an instance's numbers do not depend on its neighbours.
    """
    count, (states, actions) = len(generators), policy.shape[1:]

    def random(*shape: int) -> Tensor:
        return torch.stack([uniforms(generator, *shape) for generator in generators])

    first = categorical(problem.start.cumsum(-1).unsqueeze(1), random(tuples * problem.trajectories))
    numbers = random(tuples * problem.trajectories, problem.horizon, 2)
    shape = (count, tuples, problem.trajectories, problem.horizon)
    path = [each.view(shape) for each in roll_out(first, None, policy, problem.upper_transitions, numbers)]
    labels = (random(tuples) < problem.label_probabilities(*path)).double()

    from_states, from_actions = (each.flatten(1).repeat_interleave(rollouts, 1) for each in path)
    steps = torch.arange(length, dtype=torch.float64)
    owner = torch.arange(tuples).repeat_interleave(problem.trajectories * problem.horizon * rollouts).unsqueeze(-1)
    visits = torch.zeros(count, tuples * states * actions, dtype=torch.float64)
    for sign, first_actions in ((1.0, from_actions), (-1.0, None)):
        numbers = random(from_states.shape[1], length, 2)
        s, a = roll_out(from_states, first_actions, policy, problem.transitions, numbers)
        cells = ((owner * states + s) * actions + a).flatten(1)
        visits.scatter_add_(1, cells, (sign / rollouts * problem.gamma**steps).expand(s.shape).flatten(1))
    return Sample(*path, labels, visits.view(count, tuples, states, actions))


def stochastic_hypergradient(problem: Problem, x: Tensor, sample: Sample, baseline: bool = False) -> Tensor:
    """Eq. (80) (B, n): mean over the tuples of grad_x l + l sum_h (grad Q - grad V) / tau at x (B, n).

    With `baseline`, l in the second term is relative to the mean of the other tuples' l. That leaves the mean of the
    estimate as it is, since each tuple's sum has mean 0 and is independent of the others' l.
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
    problem: Problem, args: Args, seeds: list[int], momentum: bool = True, baseline: bool = False
) -> Iterator[Iterate]:
    """Stoc-SoBiRL, Algorithm 4: h_k = g(x_k; zeta_k) + (1 - eta_k) (h_{k-1} - g(x_{k-1}; zeta_k)) (eq. 81), step sizes
    beta_k = c (m + k)^(-1/3), eta_k in proportion to beta_{k-1}^2 (eq. 93); without momentum eta = 1. Endless."""
    generators = [torch.Generator().manual_seed(2**31 + seed) for seed in seeds]  # unlike those of the instances
    scale = args.stochastic_step_size or problem.stochastic_step_size
    momentum_coef = args.momentum_coef or 0.5 / (scale * args.step_offset ** (-1 / 3)) ** 2
    x, policy = problem.x, torch.full_like(problem.transitions[..., 0], 1 / problem.transitions.shape[2])
    for k in itertools.count():
        policy = mirror_descent(
            policy, problem.reward(x), problem.transitions, problem.gamma, problem.tau, args.policy_error,
            args.mirror_descent_step,
        )  # fmt: skip
        sample = draw_sample(problem, policy, args.tuples, args.rollouts, args.rollout_length, generators)
        direction = stochastic_hypergradient(problem, x, sample, baseline)
        if k > 0 and momentum:
            eta = min(1.0, momentum_coef * step_size**2)
            direction = direction + (1 - eta) * (last_direction - stochastic_hypergradient(problem, last_x, sample, baseline))
        yield Iterate(x, direction, policy)
        step_size = scale * (args.step_offset + k) ** (-1 / 3)
        last_x, last_direction = x, direction
        x = x - step_size * direction


# ---- Practical forms of the implicit term ----------------------------------------------------------------------
def reward_to_go_term(problem: PreferenceLearning, x: Tensor, policy: Tensor) -> Tensor:
    """Mean (B, n) of l sum_h (G_h - E[G_h | s_h]) / tau, G_h = sum_{t >= h} gamma^{t-h} grad r(s_t, a_t) of the same fragment.

    It looks like (13) with cut sums, but G_h contains the later steps that l scores too, so it is no estimate of (13).
    """
    states, actions = problem.paths
    jacobian, gamma = problem.reward_jacobian(x), problem.gamma
    steps = jacobian[:, states, actions]  # (B, D, H, n)
    total, to_go = 0.0, 0.0
    for h in reversed(range(problem.horizon)):
        to_go = steps[:, :, h] + gamma * to_go
        _, grad_v = truncated_value_gradients(policy, jacobian, problem.upper_transitions, gamma, problem.horizon - h)
        total = total + to_go - grad_v[:, states[:, h]]
    probabilities = trajectory_probabilities(problem.start, policy, problem.upper_transitions, states, actions)
    losses = problem.cross_entropies(x)
    weights = probabilities * (
        (losses @ probabilities.unsqueeze(2)).squeeze(2) + (probabilities.unsqueeze(1) @ losses).squeeze(1)
    )
    return (weights.unsqueeze(-1) * total).sum(1) / problem.tau


def implicit_terms(problem: PreferenceLearning, x: Tensor, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """The mean (B, n) of each practical form of the implicit term (13) at x and pi*(x); "exact" is the term itself.

    "one-step" is what the released code has, "rollouts-T" independent rollouts of T steps, "reward-to-go" that of the fragment.
    """
    policy = exact_hypergradient(problem, x).policy
    _, x_slope, policy_slope = objective_slopes(problem, x, policy)
    jacobian, zero = problem.reward_jacobian(x), torch.zeros_like(x_slope)

    def term(gradients: tuple[Tensor, Tensor]) -> Tensor:
        return sobirl_hypergradient(zero, policy_slope, policy, *gradients, problem.tau)

    def cut(length: int) -> Tensor:
        return term(truncated_value_gradients(policy, jacobian, problem.transitions, problem.gamma, length))

    return {
        "exact": term(value_gradients(policy, jacobian, problem.transitions, problem.gamma)),
        "one-step": cut(1),
        **{f"rollouts-{length}": cut(length) for length in lengths},
        "reward-to-go": reward_to_go_term(problem, x, policy),
    }


# ---- The run: what is not the algorithm ------------------------------------------------------------------------
SCRIPT = Path(__file__).name


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


def check_names(flag: str, names: tuple[str, ...], known: list[str]) -> None:
    """Raise BadInput for the first name that is unknown or stands twice."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}" if near else f"there are {', '.join(known)}"
            raise BadInput(f"{flag} names {name!r}, which does not exist; {hint}")
        if names.count(name) > 1:
            raise BadInput(f"{flag} names {name} twice; once is enough")


def parse_args(cls, argv: list[str] | None = None) -> Args:
    """The command line as an instance of `cls`, checked. Raises BadInput; tyro itself exits with status 2 on words it
    cannot parse."""
    args = tyro.cli(cls, args=argv, description=__doc__)
    check_ranges(args)
    check_names("--problems", args.problems, list(PROBLEMS))
    check_names("--methods", args.methods, list(METHODS))
    if args.seed + args.instances - 1 > 2**31 - 1:
        raise BadInput(
            f"--seed {args.seed} leaves no room for --instances {args.instances}; it must be at most {2**31 - args.instances}"
        )
    for problem in args.problems:
        for method in args.methods:
            if not applies(method, PROBLEMS[problem]):
                usable = [name for name, each in PROBLEMS.items() if applies(method, each)]
                raise BadInput(
                    f"--methods {method} samples trajectories, which --problems {problem} has none of; "
                    f"it works on {', '.join(usable)}"
                )
    args.problems = args.problems or tuple(PROBLEMS)
    args.methods = args.methods or tuple(METHODS)
    if not any(applies(method, PROBLEMS[problem]) for method in args.methods for problem in args.problems):
        raise BadInput(f"--methods {' '.join(args.methods)}: none of them works on {', '.join(args.problems)}")
    return args


def provenance() -> dict:
    """What made a run: command, commit, versions, machine."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        commit, dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "*.py"))
    except OSError:  # no git on this machine
        commit, dirty = None, None
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return {
        "script": SCRIPT,
        "argv": sys.argv,
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        "cpu": model.group(1) if model else platform.processor(),
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
    }


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write` puts into a new file: after a crash either the old or the new content is there."""
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:  # a full disk should not stay full of half a file
        new.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> Path:
    """Create `path`, or path_1, path_2, ... if it is taken: mkdir is atomic, so two runs never share a folder."""
    for copy in itertools.count():
        folder = path if copy == 0 else path.with_name(f"{path.name}_{copy}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def write_json(path: Path, content: dict) -> None:
    """Write or replace a json file."""
    write_atomically(path, lambda new: new.write_text(json.dumps(content, indent=1, default=str) + "\n"))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write or replace a csv file; the header is the union of the rows' keys, a missing or undefined number is empty."""

    def write(new: Path) -> None:
        with open(new, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            for row in rows:
                writer.writerow({name: cell(value) for name, value in row.items()})

    def cell(value):
        return value if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.6g}"

    write_atomically(path, write)


# ---- Figures ---------------------------------------------------------------------------------------------------
COLOURS = {
    "m-sobirl": "#0072B2", "sobirl": "#009E73", "one-step": "#E69F00", "x-only": "#000000", "stoc-sobirl": "#D55E00",
    "stoc-sobirl-baseline": "#CC79A7", "stoc-sgd": "#56B4E9",
}  # fmt: skip  # Okabe and Ito's, which the colour-blind can tell apart


def draw_curve(axes, rows: list[dict], method: str, column: str, single: bool) -> None:
    """The median over instances of a column against k, in the method's colour, with every instance's own line
    (`single`) or the range of all of them as a band."""
    curves: dict[int, list[float]] = {}
    for row in rows:
        curves.setdefault(row["iteration"], []).append(row[column])
    steps, values = list(curves), torch.tensor(list(curves.values()))
    if single:
        axes.plot(steps, values, color=COLOURS[method], alpha=0.25, linewidth=0.7)
    else:
        axes.fill_between(steps, values.amin(1), values.amax(1), color=COLOURS[method], alpha=0.12, linewidth=0)
    axes.plot(steps, values.quantile(0.5, dim=1), color=COLOURS[method], linewidth=1.5, label=method)


def draw_figures(folder: Path, rows: list[dict]) -> None:
    """figure_4.png (the paper's Figure 4: the synthetic problem) and convergence.png, from the rows of curves.csv."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    def of(problem: str, method: str) -> list[dict]:
        return [row for row in rows if row["problem"] == problem and row["method"] == method]

    methods, problems = ([*dict.fromkeys(row[name] for row in rows)] for name in ("method", "problem"))
    if of("synthetic", "m-sobirl"):
        figure, panels = plt.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
        for axes, column, label in zip(
            panels, ("estimate_norm", "upper_value"), ("|h|, estimated", "upper-level value")
        ):
            for method in ("m-sobirl", "x-only"):
                if of("synthetic", method):
                    draw_curve(axes, of("synthetic", method), method, column, single=True)
            axes.set(xlabel="outer iteration", ylabel=label, yscale="log")
            axes.legend(frameon=False)
        write_atomically(folder / "figure_4.png", lambda new: figure.savefig(new, dpi=120, format="png"))
        plt.close(figure)
    figure, grid = plt.subplots(
        2, len(problems), figsize=(3.1 * len(problems) + 0.6, 5.4), squeeze=False, constrained_layout=True
    )
    for problem, (upper, lower) in zip(problems, grid.T):
        for method in methods:
            if of(problem, method):
                draw_curve(upper, of(problem, method), method, "gradient_norm", single=False)
                draw_curve(lower, of(problem, method), method, "objective", single=False)
        upper.set(title=problem, xscale="log", yscale="log")
        lower.set(xlabel="outer iteration", xscale="log")
    grid[0, 0].set_ylabel("exact |grad Phi|")
    grid[1, 0].set_ylabel("exact Phi")
    handles = {label: line for axes in grid[0] for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    write_atomically(folder / "convergence.png", lambda new: figure.savefig(new, dpi=100, format="png"))
    plt.close(figure)


# ---- Comparing methods -----------------------------------------------------------------------------------------
METHODS: dict[str, Callable[[Problem, Args, list[int]], Iterator[Iterate]]] = {
    "m-sobirl": lambda problem, args, seeds: m_sobirl(
        problem, args.tracking_step_size or problem.tracking_step_size, args.adjoint_step_size, args.inner_sweeps
    ),
    "sobirl": lambda problem, args, seeds: sobirl(
        problem, args.step_size or problem.step_size, args.policy_error, args.mirror_descent_step
    ),
    "one-step": lambda problem, args, seeds: sobirl(
        problem, args.step_size or problem.step_size, args.policy_error, args.mirror_descent_step, length=1
    ),
    "x-only": lambda problem, args, seeds: m_sobirl(
        problem, args.step_size or problem.step_size, args.adjoint_step_size, args.inner_sweeps, implicit=False
    ),
    "stoc-sobirl": lambda problem, args, seeds: stoc_sobirl(problem, args, seeds),
    "stoc-sobirl-baseline": lambda problem, args, seeds: stoc_sobirl(problem, args, seeds, baseline=True),
    "stoc-sgd": lambda problem, args, seeds: stoc_sobirl(problem, args, seeds, momentum=False),
}


def applies(method: str, problem: type[Problem]) -> bool:
    """Whether the method can run on the problem: sampling needs an upper level over trajectories."""
    return problem.horizon > 0 or not method.startswith("stoc")


def logged_iterations(iterations: int) -> set[int]:
    """About 50 of the iterations 0..K-1, evenly spaced on a logarithmic scale, with the first and the last."""
    return {round(iterations ** (i / 59)) - 1 for i in range(60)}


def follow(problem: Problem, iterates: Iterator[Iterate], iterations: int, seeds: list[int]) -> list[dict]:
    """Rows of curves.csv: the first `iterations` iterates, measured against Phi and its gradient at x_k.

    `average_squared_norm` is the mean of |grad Phi(x_j)|^2 over all j <= k, the quantity of the paper's theorems;
    `policy_error` is |pi_k - pi*(x_k)|^2. Raises FloatingPointError, naming k, if an iterate is not finite.
    """
    rows, values, squares, logged = [], None, 0.0, logged_iterations(iterations)
    for k, iterate in enumerate(itertools.islice(iterates, iterations)):
        if not iterate.direction.isfinite().all():
            raise FloatingPointError(f"the hypergradient of iteration {k} is not finite; try a smaller step size")
        exact = exact_hypergradient(problem, iterate.x, values)
        values, norm = exact.values, exact.gradient.norm(dim=-1)
        squares = squares + norm**2
        if k in logged:
            estimate = iterate.direction.norm(dim=-1)
            columns = {
                "objective": exact.objective,
                "gradient_norm": norm,
                "average_squared_norm": squares / (k + 1),
                "estimate_norm": estimate,
                "cosine": (iterate.direction * exact.gradient).sum(-1) / (estimate * norm),
                "upper_value": problem.objective(iterate.x, iterate.policy),
                "policy_error": ((iterate.policy - exact.policy) ** 2).sum((1, 2)),
            } | problem.scores(iterate.x, exact.policy)
            lists = {name: column.tolist() for name, column in columns.items()}
            for i, seed in enumerate(seeds):
                rows.append({"seed": seed, "iteration": k} | {name: values_[i] for name, values_ in lists.items()})
    return rows


def summarise(rows: list[dict]) -> dict[str, float]:
    """Median, smallest and largest over instances of what the last iteration reached: one row of summary.csv."""
    last = max(row["iteration"] for row in rows)
    final = [row for row in rows if row["iteration"] == last]
    summary = {"iterations": last + 1, "instances": len(final)}
    for name in final[0]:
        if name not in ("problem", "method", "seed", "iteration", "cosine", "upper_value"):
            column = sorted(row[name] for row in final)
            middle = (column[(len(column) - 1) // 2] + column[len(column) // 2]) / 2
            summary |= {f"{name}_median": middle, f"{name}_min": column[0], f"{name}_max": column[-1]}
    return summary


def measure_bias(problem: PreferenceLearning, seeds: list[int], lengths: tuple[int, ...] = (2, 5, 20)) -> list[dict]:
    """Rows of bias.csv: for each practical form of the implicit term, at x_0 of each instance, the relative error of its
    mean, the cosine with the exact term, and the relative error of the whole hypergradient that has it."""
    terms = implicit_terms(problem, problem.x, lengths)
    exact, total, rows = terms.pop("exact"), exact_hypergradient(problem, problem.x).gradient, []
    for form, term in {"none": torch.zeros_like(exact), **terms}.items():
        error = (term - exact).norm(dim=-1)
        cosine = (term * exact).sum(-1) / (term.norm(dim=-1) * exact.norm(dim=-1))
        for i, seed in enumerate(seeds):
            rows.append({
                "form": form, "seed": seed, "relative_error": float(error[i] / exact[i].norm()),
                "cosine": float(cosine[i]), "relative_error_of_total": float(error[i] / total[i].norm()),
            })  # fmt: skip
    return rows


def train(args: Args) -> Path:
    """Run every method on every problem and return the run folder. Raises BadInput before anything is created."""
    torch.set_num_threads(1)  # matrices of ten rows gain nothing from more
    seeds = list(range(args.seed, args.seed + args.instances))
    try:
        args.run_dir.mkdir(parents=True, exist_ok=True)
        folder = make_folder(args.run_dir / f"{Path(SCRIPT).stem}__{args.seed}__{int(time.time())}")
        write_json(folder / "args.json", {"args": asdict(args)} | provenance())
    except OSError as error:
        raise BadInput(f"--run-dir {args.run_dir} cannot be written: {error}; name another folder") from error
    started, rows, summaries, status, failure = time.perf_counter(), [], [], "failed", None
    try:
        for name in args.problems:
            problem = PROBLEMS[name](seeds)
            if isinstance(problem, PreferenceLearning):
                write_csv(folder / "bias.csv", measure_bias(problem, seeds))
            for method in args.methods:
                if not applies(method, PROBLEMS[name]):
                    continue
                begun, iterations = time.perf_counter(), args.iterations or problem.iterations
                label = {"problem": name, "method": method}
                try:
                    found = follow(problem, METHODS[method](problem, args, seeds), iterations, seeds)
                except FloatingPointError as error:
                    summaries.append(label | {"note": f"diverged: {error}"})
                    print(f"{name:20} {method:21} diverged: {error}", flush=True)
                else:
                    rows += [label | row for row in found]
                    summaries.append(label | {"seconds": time.perf_counter() - begun} | summarise(found))
                    print(
                        f"{name:20} {method:21} Phi {summaries[-1]['objective_median']:9.5f}   "
                        f"|grad Phi| {summaries[-1]['gradient_norm_median']:8.2e}   {summaries[-1]['seconds']:6.1f} s",
                        flush=True,
                    )
                    write_csv(folder / "curves.csv", rows)
                write_csv(folder / "summary.csv", summaries)
        if rows:
            draw_figures(folder, rows)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise SystemExit(130) from None
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        content = {"status": status, "wall_time_s": time.perf_counter() - started}
        write_json(folder / "result.json", content | ({"error": failure} if failure else {}))
        print(f"{status}: {folder}", flush=True)
    return folder


# ---- Entry point -----------------------------------------------------------------------------------------------
if __name__ == "__main__":
    try:
        train(parse_args(Args))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
