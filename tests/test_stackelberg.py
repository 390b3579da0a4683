"""The mathematics of Stackelberg actor-critic in float64: total derivatives against re-solved followers, the paper's
theorems by enumeration of all trajectories, the Hessian products against dense ones, the solver's guard."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacrev

import stac
import stac_ablations
from stackelberg_toy import equilibrium_conditions, is_equilibrium, total_gradient

F64 = torch.float64


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def central_differences(function, x: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """The gradient of function(x), a scalar, in x (n,)."""
    units = step * torch.eye(len(x), dtype=F64)
    return torch.stack([(function(x + unit) - function(x - unit)) / (2 * step) for unit in units])


def solved_iteratively(leader, follower, x1, x2) -> torch.Tensor:
    """The total gradient as the scripts form it: Hessian-vector products and conjugate gradient, then one VJP."""
    first, b = grad(leader, (0, 1))(x1, x2)
    x, stopped = stac.conjugate_gradient(
        lambda v: torch.func.jvp(lambda y: grad(follower, 1)(x1, y), (x2,), (v,))[1], b, 4 * len(b), tolerance=1e-14
    )
    assert not stopped
    return first - grad(lambda z: grad(follower, 1)(z, x2) @ x)(x1)


# ---- Check A: a one-step task, actor leads (eq. 15) ------------------------------------------------------------
def one_step_task():
    """4 states, 3 actions, a critic with 5 features: J, L, the response of the critic, theta."""
    features, rewards, start = randn(4, 3, 5, seed=1), randn(4, 3, seed=2), torch.softmax(randn(4, seed=3), 0)

    def visits(theta):
        return start[:, None] * torch.softmax(theta.view(4, 3), 1)

    def J(theta, w):
        return (visits(theta) * (features @ w)).sum()

    def L(theta, w):
        return (visits(theta) * (features @ w - rewards) ** 2).sum()

    def response(theta):
        weighted = visits(theta)[:, :, None] * features
        return torch.linalg.solve(torch.einsum("saf,sag->fg", weighted, features), torch.einsum("saf,sa->f", weighted, rewards))

    return J, L, response, randn(12, seed=4)


def test_total_derivative_of_a_one_step_task():
    J, L, response, theta = one_step_task()
    w = response(theta)
    assert grad(L, 1)(theta, w).norm() < 1e-12
    truth = central_differences(lambda theta: J(theta, response(theta)), theta)
    got = -total_gradient(lambda theta, w: -J(theta, w), L, theta, w)  # the leader minimises -J
    assert relative(got, truth) < 1e-8
    assert relative(solved_iteratively(J, L, theta, w), truth) < 1e-8
    assert relative(grad(J)(theta, w), truth) > 0.1  # the individual gradient is another direction


def gaussian_one_step_task():
    """s ~ N(0, 1), a ~ N(k s + c, exp(logstd)^2), theta = (k, c, logstd), expectations by 24 x 24 Gauss-Hermite nodes: the
    mean of any f(s, a) under theta, the critic's features, J, L, the response of the critic, theta."""
    nodes, masses = (torch.tensor(each, dtype=F64) for each in np.polynomial.hermite_e.hermegauss(24))
    s, noise = torch.meshgrid(nodes, nodes, indexing="ij")
    masses = masses[:, None] * masses / masses.sum() ** 2

    def actions(theta):
        return theta[0] * s + theta[1] + theta[2].exp() * noise

    def features(a):
        return torch.stack([torch.ones_like(a), s, a], -1)

    def mean(f, theta):
        return (masses * f(s, actions(theta))).sum()

    def rewards(a):
        return torch.sin(1.5 * a + s) + s * a * a / 4

    def J(theta, w):
        return mean(lambda s, a: features(a) @ w, theta)

    def L(theta, w):
        return mean(lambda s, a: (features(a) @ w - rewards(a)) ** 2, theta)

    def response(theta):
        a = actions(theta)
        weighted = masses[:, :, None] * features(a)
        left = torch.einsum("saf,sag->fg", weighted, features(a))
        return torch.linalg.solve(left, torch.einsum("saf,sa->f", weighted, rewards(a)))

    return mean, features, J, L, response, torch.tensor([0.4, -0.3, -0.5], dtype=F64)


def test_total_derivative_of_a_one_step_task_with_a_gaussian_policy():
    """Its standard deviation is learnt, so the response depends on it as well."""
    mean, features, J, L, response, theta = gaussian_one_step_task()
    w = response(theta)
    assert grad(L, 1)(theta, w).norm() < 1e-12
    truth = central_differences(lambda theta: J(theta, response(theta)), theta)
    got = -total_gradient(lambda theta, w: -J(theta, w), L, theta, w)
    assert relative(got, truth) < 1e-8
    assert relative(solved_iteratively(J, L, theta, w), truth) < 1e-8
    assert relative(grad(J)(theta, w), truth) > 0.1

    def score(theta, fixed):  # E [Q d log pi] with the actions of a fixed policy, as the scripts estimate d_theta J
        def surrogate(s, a):
            normal = torch.distributions.Normal(theta[0] * s + theta[1], theta[2].exp())
            return (features(a) @ w) * normal.log_prob(a)

        return mean(surrogate, fixed)

    assert relative(grad(score)(theta, theta), grad(J)(theta, w)) < 1e-12


def test_damping_leads_to_the_individual_gradient_like_one_over_lambda():
    """Proposition 2."""
    J, L, response, theta = one_step_task()
    w = response(theta)
    total, individual = total_gradient(J, L, theta, w), grad(J)(theta, w)
    far = [(total_gradient(J, L, theta, w, damping) - individual).norm().item() for damping in (1e6, 1e7)]
    near = [(total_gradient(J, L, theta, w, damping) - total).norm().item() for damping in (1e-6, 1e-7)]
    assert far[0] / far[1] == pytest.approx(10, rel=1e-4)
    assert near[0] / near[1] == pytest.approx(10, rel=1e-3)


# ---- Check B: off-policy samples, either player leads (eq. 15 and 16) ------------------------------------------
def off_policy_task(n: int = 40, gamma: float = 0.99):
    """f_A = -mean Q_w(s, mu(s)) and L = mean (Q_w(s, a) - y)^2 of n transitions, with a frozen target critic, Q quadratic
    in (s, a) and linear in w, mu linear in s; the responses of both players, theta and w. Q is concave in a."""
    s, a, r, following = (randn(n, seed=seed) for seed in (11, 12, 13, 14))
    going_on, target = (randn(n, seed=15) > -1).to(F64), randn(6, seed=16)

    def quadratic(s, a):
        return torch.stack([torch.ones_like(s), s, a, s * a, s * s, a * a], -1)

    def mu(theta, s):
        return theta[0] + theta[1] * s

    def f_A(theta, w):
        return -(quadratic(s, mu(theta, s)) @ w).mean()

    def targets(theta):
        return r + gamma * going_on * (quadratic(following, mu(theta, following)) @ target)

    def L(theta, w):
        return ((quadratic(s, a) @ w - targets(theta)) ** 2).mean()

    def critic_response(theta):
        return torch.linalg.lstsq(quadratic(s, a), targets(theta)[:, None]).solution[:, 0]

    def actor_response(w):  # f_A is quadratic in theta: one Newton step is exact
        zero = torch.zeros(2, dtype=F64)
        return -torch.linalg.solve(hessian(f_A)(zero, w), grad(f_A)(zero, w))

    concave = randn(6, seed=18)
    concave[5] = -0.7
    return f_A, L, critic_response, actor_response, randn(2, seed=17), concave


def test_total_derivative_off_policy_when_the_actor_leads():
    f_A, L, critic_response, _, theta, _ = off_policy_task()
    w = critic_response(theta)
    truth = central_differences(lambda theta: f_A(theta, critic_response(theta)), theta)
    assert relative(total_gradient(f_A, L, theta, w), truth) < 1e-8
    assert relative(solved_iteratively(f_A, L, theta, w), truth) < 1e-8
    assert relative(grad(f_A)(theta, w), truth) > 0.1


def test_total_derivative_off_policy_when_the_critic_leads():
    f_A, L, _, actor_response, _, w = off_policy_task()
    theta = actor_response(w)
    assert grad(f_A)(theta, w).norm() < 1e-12 and torch.linalg.eigvalsh(hessian(f_A)(theta, w)).min() > 0

    def leader(w, theta):
        return L(theta, w)

    def follower(w, theta):
        return f_A(theta, w)

    truth = central_differences(lambda w: L(actor_response(w), w), w)
    assert relative(total_gradient(leader, follower, w, theta), truth) < 1e-8
    assert relative(solved_iteratively(leader, follower, w, theta), truth) < 1e-8
    assert relative(grad(leader)(w, theta), truth) > 0.1


def test_damping_must_go_on_the_hessian_of_what_the_follower_minimises():
    """Algorithm 2 adds lambda to the Hessian of J, which is maximised: at lambda near its eigenvalues the printed form
    explodes, while the Hessian of -J damps."""
    f_A, L, _, actor_response, _, w = off_policy_task()
    theta = actor_response(w)
    full = total_gradient(lambda w, theta: L(theta, w), lambda w, theta: f_A(theta, w), w, theta)
    damping = 1.001 * torch.linalg.eigvalsh(hessian(f_A)(theta, w)).min().item()
    right = total_gradient(lambda w, theta: L(theta, w), lambda w, theta: f_A(theta, w), w, theta, damping)
    printed = total_gradient(lambda w, theta: L(theta, w), lambda w, theta: -f_A(theta, w), w, theta, damping)
    assert relative(right, full) < 1 < 10 < relative(printed, full)


# ---- Check D: a tabular critic, and its equilibrium ------------------------------------------------------------
class Task:
    """A random MDP with 3 states, 2 actions and 3 steps, whose 216 trajectories can be enumerated."""

    S, ACTIONS, T, GAMMA = 3, 2, 3, 0.9

    def __init__(self):
        self.start = torch.softmax(randn(self.S, seed=21), 0)
        self.transition = torch.softmax(2 * randn(self.S, self.ACTIONS, self.S, seed=22), -1)
        self.rewards = randn(self.S, self.ACTIONS, seed=23)
        self.obs = randn(self.S, 4, seed=24)
        grid = torch.cartesian_prod(*[torch.arange(n) for n in (self.S, self.ACTIONS) * self.T])
        self.states, self.actions = grid[:, ::2].T, grid[:, 1::2].T  # (T, M)

    def policy(self, theta):
        return torch.softmax(theta.view(self.S, self.ACTIONS), 1)

    def action_values(self, theta) -> list[torch.Tensor]:
        """Q^pi of each step, (S, A), by backward induction."""
        q = [self.rewards]
        for _ in range(self.T - 1):
            value = (self.policy(theta) * q[0]).sum(1)
            q.insert(0, self.rewards + self.GAMMA * self.transition @ value)
        return q

    def values(self, theta) -> torch.Tensor:
        """V^pi of the first step (S,)."""
        return (self.policy(theta) * self.action_values(theta)[0]).sum(1)

    def probabilities(self, theta) -> torch.Tensor:
        """Of all trajectories (M,)."""
        moved = self.transition[self.states[:-1], self.actions[:-1], self.states[1:]].prod(0)
        return self.start[self.states[0]] * moved * self.logprobs(theta).exp().prod(0)

    def logprobs(self, theta) -> torch.Tensor:
        """log pi of each step of each trajectory (T, M)."""
        return self.policy(theta).log()[self.states, self.actions]

    def expectation_of_scores(self, theta, coefficients) -> torch.Tensor:
        """E sum_t coefficient_t d_theta log pi(a_t|s_t), by enumeration; coefficients (T, M)."""
        probability = self.probabilities(theta)
        return grad(lambda theta: (probability * coefficients * self.logprobs(theta)).sum())(theta)

    @property
    def discounts(self):
        return (self.GAMMA ** torch.arange(self.T, dtype=F64))[:, None]


@pytest.fixture
def task() -> Task:
    return Task()


@pytest.fixture
def theta() -> torch.Tensor:
    return randn(6, seed=31)


def test_enumeration_is_complete(task, theta):
    assert task.probabilities(theta).sum().item() == pytest.approx(1, abs=1e-12)
    returns = (task.discounts * task.rewards[task.states, task.actions]).sum(0)
    assert (task.probabilities(theta) @ returns).item() == pytest.approx((task.start @ task.values(theta)).item(), abs=1e-12)


def stationary_task(task):
    """One-step J, tabular critic w, L over all states, of the discounted task: J, L, V^pi."""

    def values(theta):
        policy = task.policy(theta)
        matrix = torch.eye(task.S, dtype=F64) - task.GAMMA * torch.einsum("sa,sat->st", policy, task.transition)
        return torch.linalg.solve(matrix, (policy * task.rewards).sum(1))

    def J(theta, w):
        return task.start @ (task.policy(theta) * (task.rewards + task.GAMMA * task.transition @ w)).sum(1)

    def L(theta, w):
        return (torch.tensor([0.2, 0.3, 0.5], dtype=F64) * (w - values(theta)) ** 2).sum()

    return J, L, values


def test_total_derivative_with_a_tabular_critic_is_the_exact_policy_gradient(task, theta):
    J, L, values = stationary_task(task)
    truth = grad(lambda theta: task.start @ values(theta))(theta)
    w = values(theta)
    assert relative(total_gradient(J, L, theta, w), truth) < 1e-12
    assert relative(grad(J)(theta, w), truth) > 0.1


def test_a_tabular_game_reaches_a_differential_stackelberg_equilibrium(task, theta):
    """Definition 1 at the optimum of an entropy-regularised leader, which is strict; the dynamics lead there from theta."""
    J, L, values = stationary_task(task)

    def leader(theta, w):
        return -J(theta, w) + 0.5 * (theta**2).sum()

    w = values(theta)
    assert not is_equilibrium(equilibrium_conditions(leader, L, theta, w))
    for _ in range(400):
        leads, follows = total_gradient(leader, L, theta, w), grad(L, 1)(theta, w)
        theta, w = theta - 0.2 * leads, w - 1.0 * follows
    found = equilibrium_conditions(leader, L, theta, w)
    assert is_equilibrium(found, tolerance=1e-6), found


# ---- Check C: the theorems by enumeration ----------------------------------------------------------------------
def test_theorem_1_needs_a_factor_2(task, theta):
    """The gradient of L = E (Q_w - Q^pi)^2 at the first step. As stated, without the 2, it is wrong."""
    q_w = randn(task.S, task.ACTIONS, seed=33)

    def L(theta):
        return (task.start[:, None] * task.policy(theta) * (q_w - task.action_values(theta)[0]) ** 2).sum()

    q = torch.stack([q[s, a] for q, s, a in zip(task.action_values(theta), task.states, task.actions)])
    residual = q[0] - q_w[task.states[0], task.actions[0]]

    def theorem(factor):
        coefficients = factor * task.discounts * residual * q
        coefficients[0] = residual**2
        return task.expectation_of_scores(theta, coefficients)

    assert relative(theorem(2), grad(L)(theta)) < 1e-12
    assert relative(theorem(1), grad(L)(theta)) > 0.1


def test_theorem_1_with_sampled_returns_has_an_unbiased_mixed_derivative(task, theta):
    """The critic enters the estimate as (Q_w - G_0)^2 and (Q_w - G_0) G_t; its derivative in w is linear in the returns, so that sampled
    ones, with a baseline of the state, serve, though they bias the estimate itself."""
    q_w, x, baseline = randn(task.S, task.ACTIONS, seed=33), randn(task.S, task.ACTIONS, seed=34), randn(task.S, seed=35)

    def L(theta, q_w):
        return (task.start[:, None] * task.policy(theta) * (q_w - task.action_values(theta)[0]) ** 2).sum()

    mixed = grad(lambda theta: (grad(L, 1)(theta, q_w) * x).sum())(theta)
    first, to_go = (task.states[0], task.actions[0]), rewards_to_go(task)
    coefficients = -2 * task.discounts * (to_go - baseline[task.states]) * x[first]
    coefficients[0] = 2 * (q_w[first] - to_go[0]) * x[first]
    assert mixed.norm() > 1e-3 and relative(task.expectation_of_scores(theta, coefficients), mixed) < 1e-12
    sampled = 2 * task.discounts * (to_go[0] - q_w[first]) * (to_go - baseline[task.states])
    sampled[0] = (to_go[0] - q_w[first]) ** 2
    assert relative(task.expectation_of_scores(theta, sampled), grad(L)(theta, q_w)) > 0.1


def start_loss(task, critic):
    """L(theta, omega) = E_s0 (V_omega(s0) - V^pi(s0))^2, exactly."""
    return lambda theta, omega: task.start @ (stac.critic_values(critic, omega, task.obs) - task.values(theta)) ** 2


def float64_critic(seed: int, obs_dim: int = 4):
    torch.manual_seed(seed)
    critic = stac.mlp(obs_dim, 5, 3, 1).double()
    return critic, torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])


def test_proposition_1_and_that_sampled_returns_bias_it(task, theta):
    critic, omega = float64_critic(0)
    residual = (task.values(theta) - stac.critic_values(critic, omega, task.obs))[task.states[0]]
    q = torch.stack([q[s, a] for q, s, a in zip(task.action_values(theta), task.states, task.actions)])
    truth = grad(start_loss(task, critic))(theta, omega)
    assert relative(task.expectation_of_scores(theta, 2 * task.discounts * residual * q), truth) < 1e-12
    to_go = rewards_to_go(task)
    sampled = to_go[0] - stac.critic_values(critic, omega, task.obs)[task.states[0]]
    assert relative(task.expectation_of_scores(theta, 2 * task.discounts * sampled * to_go), truth) > 0.1


def rewards_to_go(task) -> torch.Tensor:
    """The sampled discounted rewards from each step on (T, M)."""
    to_go = [task.rewards[task.states[-1], task.actions[-1]]]
    for t in reversed(range(task.T - 1)):
        to_go.insert(0, task.rewards[task.states[t], task.actions[t]] + task.GAMMA * to_go[0])
    return torch.stack(to_go)


def test_trajectory_weights_are_an_unbiased_estimate_of_the_mixed_term(task, theta):
    """E of the step with weights 1 + 2 u minus the step without is -(d_theta d_omega L) x, over T: with sampled returns, a
    state baseline, and a critic that is a network. Formed by the functions of the script."""
    critic, omega = float64_critic(0)
    x = randn(len(omega), seed=34)
    mixed = grad(lambda theta: grad(start_loss(task, critic), 1)(theta, omega) @ x)(theta)
    assert mixed.norm() > 1e-3

    probability, valid = task.probabilities(theta), torch.ones(task.T, task.states.shape[1], dtype=F64)
    obs = task.obs[task.states]
    baseline = stac.critic_values(critic, omega, obs.flatten(0, 1)).view(valid.shape)
    advantages = (rewards_to_go(task) - baseline) * probability * len(probability)  # the mean over rows is E / T
    starts = stac.episode_starts(valid)
    slopes = stac.directional_derivative(critic, omega, obs.flatten(0, 1), x).view(valid.shape)
    base, weights = stac.discount_weights(starts, task.GAMMA), stac.trajectory_weights(starts, slopes)

    def step(weights):
        return grad(lambda theta: stac.policy_objective(task.logprobs(theta), advantages, base * weights))(theta)

    correction = task.T * (step(weights) - step(torch.ones_like(weights)))
    assert relative(correction, -mixed) < 1e-12
    policy_gradient = grad(lambda theta: task.start @ task.values(theta))(theta)
    assert relative(task.T * step(torch.ones_like(weights)), policy_gradient) < 1e-12


def test_timestep_weights_are_an_unbiased_estimate_of_their_mixed_term(task, theta):
    """E of the step with weights 1 + 2 z_k minus the step without is -(d_theta d_omega F) x, over T, for
    F = E sum_k (V(s_k) - V^pi_k(s_k))^2 with the law of the visited states held fixed; formed by the functions of the laboratory."""
    critic, omega = float64_critic(0)
    x, law = randn(len(omega), seed=34), task.probabilities(theta).detach()

    def loss(theta, omega):
        values = torch.stack([(task.policy(theta) * q).sum(1) for q in task.action_values(theta)])  # (T, S)
        squared = (stac.critic_values(critic, omega, task.obs) - values) ** 2
        return sum(law @ each[states] for each, states in zip(squared, task.states))

    mixed = grad(lambda theta: grad(loss, 1)(theta, omega) @ x)(theta)
    assert mixed.norm() > 1e-3
    valid, obs = torch.ones(task.T, task.states.shape[1], dtype=F64), task.obs[task.states]
    baseline = stac.critic_values(critic, omega, obs.flatten(0, 1)).view(valid.shape)
    advantages = (rewards_to_go(task) - baseline) * law * len(law)  # the mean over rows is E / T
    slopes = stac_ablations.directional_derivative(critic, omega, obs.flatten(0, 1), x).view(valid.shape)
    weights = stac_ablations.timestep_weights(stac_ablations.episode_starts(valid), slopes, task.GAMMA)

    def step(weights):
        return grad(lambda theta: stac.policy_objective(task.logprobs(theta), advantages, weights))(theta)

    correction = task.T * (step(weights) - step(torch.ones_like(weights)))
    assert relative(correction, -mixed) < 1e-12


# ---- The step of a batch against its double-backward form ------------------------------------------------------
TRAJECTORIES = [(0, 2, 0), (4, 8, 0), (10, 11, 0), (0, 11, 1), (0, 5, 2), (7, 11, 2)]  # first row, last row, environment


def batch(discrete: bool):
    """A rollout of 3 environments and 12 steps with resets, in float64, and an agent."""
    torch.manual_seed(3)
    agent = stac.Agent(4, 2, discrete, 6, 5).double()
    valid = torch.ones(12, 3, dtype=F64)
    valid[3, 0] = valid[9, 0] = valid[6, 2] = 0
    obs, n = torch.randn(36, 4, dtype=F64), 36
    actions = torch.randint(2, (n,)) if discrete else torch.randn(n, 2, dtype=F64)
    advantages, returns = torch.randn(n, dtype=F64), torch.randn(n, dtype=F64)
    omega = torch.cat([parameter.detach().flatten() for parameter in agent.critic.parameters()])
    return agent, valid, obs, actions, advantages, returns, omega, torch.randn(len(omega), dtype=F64)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("discrete", [True, False])
def test_the_step_is_that_of_the_double_backward_form(discrete, gamma):
    agent, valid, obs, actions, advantages, returns, omega, x = batch(discrete)
    rows = valid.flatten().nonzero().squeeze(-1)
    theta = agent.actor_parameters()
    starts = stac.episode_starts(valid)
    slopes = torch.full((36,), math.nan, dtype=F64)
    slopes[rows] = stac.directional_derivative(agent.critic, omega, obs[rows], x)
    base = stac.discount_weights(starts, gamma).flatten()[rows]
    weights = stac.trajectory_weights(starts, slopes.view(12, 3)).flatten()[rows]
    logprobs, _ = agent.logprob_and_entropy(obs[rows], actions[rows])
    direct, total = (
        flat(torch.autograd.grad(stac.policy_objective(logprobs, advantages[rows], w), theta, retain_graph=True))
        for w in (base, base * weights)
    )

    # g = (2/B) sum_i (G_i0 - V(s_i0)) sum_t gamma^t log pi_it A_it, trajectory by trajectory
    variable, surrogate = omega.clone().requires_grad_(), 0.0
    for first, last, column in TRAJECTORIES:
        index = torch.arange(first, last + 1) * 3 + column
        scores, _ = agent.logprob_and_entropy(obs[index], actions[index])
        residual = returns[index[:1]] - stac.critic_values(agent.critic, variable, obs[index[:1]])
        surrogate = surrogate + 2 * residual * (gamma ** torch.arange(len(index), dtype=F64) * scores * advantages[index]).sum()
    by_omega = torch.autograd.grad(surrogate.squeeze() / len(rows), variable, create_graph=True)[0]
    mixed = flat(torch.autograd.grad(by_omega @ x, theta))
    assert mixed.norm() > 1e-3
    assert relative(total, direct - mixed) < 1e-12


def test_the_released_step_is_a_multiple_of_the_plain_one_and_this_step_is_not():
    """Check E. The authors' surrogate takes the residual of the first sample of the batch for all trajectories, so the
    mixed term factors: whatever the solve gives, only the length of the step changes."""
    agent, valid, obs, actions, advantages, returns, omega, _ = batch(True)
    theta = agent.actor_parameters()
    b = grad(stac.mean_value, argnums=1)(agent.critic, omega, obs, torch.ones(36, dtype=F64))
    product = stac.curvature(agent.critic, omega, obs, returns, gauss_newton=True)
    x, _ = stac.conjugate_gradient(lambda v: product(v) + 0.1 * v, b, 10)
    logprobs, _ = agent.logprob_and_entropy(obs, actions)
    objective = stac.policy_objective(logprobs, advantages, torch.ones_like(advantages))
    direct = flat(torch.autograd.grad(objective, theta, retain_graph=True))
    variable = omega.clone().requires_grad_()
    surrogate = 2 * objective * (returns[0] - stac.critic_values(agent.critic, variable, obs[:1])[0])
    by_omega = torch.autograd.grad(surrogate, variable, create_graph=True)[0]
    released = direct - flat(torch.autograd.grad(by_omega @ x, theta, retain_graph=True))
    multiplier = 1 + 2 * stac.directional_derivative(agent.critic, omega, obs[:1], x)
    everywhere = stac.directional_derivative(agent.critic, omega, obs, x).view(12, 3)
    assert torch.equal(stac_ablations.released_weights(everywhere), multiplier.expand(12, 3))
    assert abs(torch.cosine_similarity(released, direct, 0)) > 1 - 1e-6
    assert relative(released, multiplier * direct) < 1e-12 and abs(multiplier - 1) > 0.1

    starts = stac.episode_starts(valid)
    slopes = stac.directional_derivative(agent.critic, omega, obs, x).view(12, 3)
    weights = stac.trajectory_weights(starts, slopes).flatten()
    own = flat(torch.autograd.grad(stac.policy_objective(logprobs, advantages, weights), theta))
    assert abs(torch.cosine_similarity(own, direct, 0)) < 1 - 1e-5


def test_timestep_weights_give_the_step_of_their_surrogate():
    """g = (2/B) sum_k log pi_k A_k e_k with e_k = sum_{t <= k} gamma^(k-t) (G_t - V(s_t)) within a trajectory."""
    gamma = 0.8
    agent, valid, obs, actions, advantages, returns, omega, x = batch(True)
    rows, theta = valid.flatten().nonzero().squeeze(-1), agent.actor_parameters()
    slopes = torch.zeros(36, dtype=F64)
    slopes[rows] = stac_ablations.directional_derivative(agent.critic, omega, obs[rows], x)
    starts = stac_ablations.episode_starts(valid)
    weights = stac_ablations.timestep_weights(starts, slopes.view(12, 3), gamma).flatten()[rows]
    logprobs, _ = agent.logprob_and_entropy(obs[rows], actions[rows])
    direct, total = (
        flat(torch.autograd.grad(stac.policy_objective(logprobs, advantages[rows], w), theta, retain_graph=True))
        for w in (torch.ones_like(weights), weights)
    )
    variable, surrogate = omega.clone().requires_grad_(), 0.0
    for first, last, column in TRAJECTORIES:
        index = torch.arange(first, last + 1) * 3 + column
        residual = returns[index] - stac.critic_values(agent.critic, variable, obs[index])
        for k in range(len(index)):
            e = sum(gamma ** (k - t) * residual[t] for t in range(k + 1))
            score, _ = agent.logprob_and_entropy(obs[index[k : k + 1]], actions[index[k : k + 1]])
            surrogate = surrogate + 2 * score[0] * advantages[index[k]] * e
    by_omega = torch.autograd.grad(surrogate / len(rows), variable, create_graph=True)[0]
    mixed = flat(torch.autograd.grad(by_omega @ x, theta))
    assert relative(total, direct - mixed) < 1e-12
    assert relative(total, direct) > 0.1


def test_controls_keep_the_plain_direction():
    total, direct = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])], [torch.tensor([0.0, 1.0]), torch.tensor([0.0])]
    multipliers = [1.0]
    assert stac_ablations.controlled(total, direct, "none", multipliers) == total and multipliers == [1.0, 5.0]
    got = stac_ablations.controlled(total, direct, "step-length", multipliers)
    assert [each.tolist() for each in got] == [[0.0, 5.0], [0.0]]
    got = stac_ablations.controlled(total, direct, "mean-multiplier", multipliers)
    assert [each.tolist() for each in got] == [[0.0, 4.0], [0.0]]  # the mean of 1, 5, 5, 5


def test_episode_starts_and_discounts():
    valid = torch.tensor([[1, 1], [1, 1], [0, 1], [1, 0], [1, 1], [0, 1]], dtype=F64)
    starts = stac.episode_starts(valid)
    assert starts.T.tolist() == [[0, 0, 0, 3, 3, 3], [0, 0, 0, 0, 4, 4]]
    got = stac.discount_weights(starts, 0.5)
    assert got.T.tolist() == [[1, 0.5, 0.25, 1, 0.5, 0.25], [1, 0.5, 0.25, 0.125, 1, 0.5]]


# ---- The whole step against an oracle that knows the task ------------------------------------------------------
class Dice:
    """A task of at most 3 steps whose every chance is a die: the 2048 equally likely throws make a rollout in which each
    trajectory has exactly its probability. Two states, two actions, and an end (state 2) that may come early."""

    T, GAMMA = 3, 0.9
    START = torch.tensor([0.5, 0.5], dtype=F64)
    POLICY = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=F64)
    SUCCESSORS = torch.tensor([[[0, 0, 1, 2], [1, 1, 0, 2]], [[0, 1, 1, 2], [0, 0, 0, 1]]])  # of each face of a die

    def __init__(self):
        self.obs, self.rewards = randn(3, 4, seed=61), randn(2, 2, seed=62)
        self.transition = torch.stack([(self.SUCCESSORS == s).to(F64).mean(-1) for s in (0, 1)], -1)  # (S, A, S)
        self.theta = self.POLICY.log().flatten()
        throws = torch.cartesian_prod(torch.arange(2), *[torch.arange(4)] * 5).T
        self.states, self.actions = [throws[0]], []
        for action_die, state_die in ((1, 2), (3, 4), (5, 5)):  # what follows the last step does not matter
            s = self.states[-1].clamp(max=1)
            a = (throws[action_die] >= 4 * self.POLICY[s, 0]).long()
            after = torch.where(self.states[-1] == 2, 2, self.SUCCESSORS[s, a, throws[state_die]])
            self.actions.append(a)
            self.states.append(after)
        self.states, self.actions = torch.stack(self.states), torch.stack(self.actions)
        self.valid = (self.states[:-1] < 2).to(F64)

    def policy(self, theta):
        return torch.softmax(theta.view(2, 2), 1)

    def values(self, theta) -> list[torch.Tensor]:
        """V^pi (S,) of each step."""
        value, values = torch.zeros(2, dtype=F64), []
        for _ in range(self.T):
            value = (self.policy(theta) * (self.rewards + self.GAMMA * self.transition @ value)).sum(1)
            values.insert(0, value)
        return values

    def law(self) -> list[torch.Tensor]:
        """The probability (S,) of being in each state at each step."""
        laws = [self.START]
        for _ in range(self.T - 1):
            laws.append(torch.einsum("s,sa,sat->t", laws[-1], self.POLICY, self.transition))
        return laws

    def leader(self, which: str, values: torch.Tensor) -> torch.Tensor:
        """J, up to what does not depend on the critic's values (3,) of the states."""
        if which == "second":
            return self.GAMMA * torch.einsum("s,sa,sat,t->", self.START, self.POLICY, self.transition, values[:2])
        laws = torch.stack(self.law())
        return (laws @ values[:2]).sum() / laws.sum()


@functools.cache
def dice_step(which: str, discounted: bool, damping: float = 1.0):
    """The mixed term's part, and all, of the leader's step on the rollout of `Dice`, as `stac.train` composes it (without
    standardised advantages), times B / N; and by the oracle: finite differences of functions of the task's own laws."""
    task, (critic, _) = Dice(), float64_critic(3)
    laws, targets = torch.stack(task.law()), torch.stack(task.values(task.theta))
    optimiser = torch.optim.Adam(critic.parameters(), lr=0.02)
    for _ in range(300):  # near its answer, where the Hessian is nearly positive semidefinite
        optimiser.zero_grad()
        (laws * (critic(task.obs[:2]).squeeze(-1) - targets) ** 2).sum().backward()
        optimiser.step()
    omega = torch.nn.utils.parameters_to_vector(critic.parameters()).detach()

    def values_at(omega):
        moved = copy.deepcopy(critic)
        torch.nn.utils.vector_to_parameters(omega, moved.parameters())
        return moved(task.obs).squeeze(-1)

    # The script, with Monte Carlo advantages.
    obs, valid = task.obs[task.states], task.valid
    terminated = torch.cat([(task.states[1:-1] == 2).to(F64), torch.ones(1, 2048, dtype=F64)])
    discounts, rewards = task.GAMMA * (1 - terminated), task.rewards[task.states[:-1].clamp(max=1), task.actions]
    values = critic(obs).squeeze(-1).detach()
    advantages = stac.gae(rewards, values, discounts, discounts)
    rows, starts = valid.bool(), stac.episode_starts(valid)
    returns = (advantages + values[:-1])[rows]
    b = grad(stac.mean_value, argnums=1)(critic, omega, *stac.leader_states(which, obs, discounts, valid))
    hessian_product = stac.curvature(critic, omega, obs[:-1][rows], returns, False)
    x, stopped = stac.conjugate_gradient(lambda v: hessian_product(v) + damping * v, b, 200, tolerance=1e-14)
    assert not stopped
    slopes = stac.directional_derivative(critic, omega, obs[:-1].flatten(0, 1), x).view(valid.shape)
    weights = stac.trajectory_weights(starts, slopes)[rows]
    base = stac.discount_weights(starts, task.GAMMA if discounted else 1.0)[rows]

    def step(weights):
        def objective(theta):
            logprobs = task.policy(theta).log()[task.states[:-1].clamp(max=1), task.actions]
            return stac.policy_objective(logprobs[rows], advantages[rows], weights)

        return grad(objective)(task.theta) * len(returns) / 2048

    total = step(base * weights)
    mixed = step(base) - total

    # The oracle.
    def loss_gradient(omega):
        point = omega.clone().requires_grad_()
        loss = (laws * (stac.critic_values(critic, point, task.obs)[:2] - targets) ** 2).sum() / laws.sum()
        return torch.autograd.grad(loss, point)[0]

    units = 1e-5 * torch.eye(len(omega), dtype=F64)
    H = torch.stack([(loss_gradient(omega + unit) - loss_gradient(omega - unit)) / 2e-5 for unit in units])
    with torch.no_grad():
        right = central_differences(lambda omega: task.leader(which, values_at(omega)), omega)
        solved = torch.linalg.solve(H + damping * torch.eye(len(omega), dtype=F64), right)
        moved = [values_at(omega + sign * 1e-4 * solved)[:2] for sign in (1, -1)]

        def slope_of_loss(theta):  # along x, of E_s0 (V(s0) - V^pi(s0))^2
            ahead, behind = (task.START @ (values - task.values(theta)[0]) ** 2 for values in moved)
            return (ahead - behind) / 2e-4

        true_mixed = central_differences(slope_of_loss, task.theta)
        individual = central_differences(lambda theta: task.START @ task.values(theta)[0], task.theta)
    assert relative(b, right) < 1e-8 and relative(x, solved) < 1e-6
    return mixed, total, true_mixed, individual - true_mixed


@pytest.mark.parametrize("which", ["second", "all"])
def test_the_step_is_the_total_derivative_of_the_task(which):
    mixed, total, true_mixed, true_total = dice_step(which, discounted=True)
    assert relative(true_total, true_total + true_mixed) > 0.1  # the correction matters
    assert relative(mixed, true_mixed) < 1e-6 and relative(total, true_total) < 1e-6


def test_what_the_defaults_change_in_the_task():
    """The figures of the first lines of stac.py: no gamma^t, and b of all visited states instead of the second ones."""
    second, every = (dice_step(which, discounted=True)[0] for which in ("second", "all"))
    without, _, true_mixed, _ = dice_step("all", discounted=False)
    assert relative(without, true_mixed) == pytest.approx(0.108, abs=1e-3)
    assert relative(every, second) == pytest.approx(0.368, abs=1e-3)
    assert "0.11 of its norm" in " ".join(stac.__doc__.split()) and "0.37 of its norm" in " ".join(stac.__doc__.split())


def test_leader_states():
    """A trajectory's second state is the row after its first, also where that is the last one of the rollout; a reset row
    begins none."""
    valid = torch.tensor([[1, 1], [1, 1], [0, 1], [1, 0], [1, 1], [0, 1]], dtype=F64)
    obs, discounts = torch.arange(14.0).view(7, 2, 1), torch.arange(12.0).view(6, 2)
    states, factors = stac.leader_states("second", obs, discounts, valid)
    assert sorted(zip(states.flatten().tolist(), factors.tolist())) == [(2, 0), (3, 1), (8, 6), (11, 9)]
    states, factors = stac.leader_states("all", obs, discounts, valid)
    assert states.flatten().tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 11] and factors.tolist() == [1] * 9


# ---- The Hessian -----------------------------------------------------------------------------------------------
def test_products_with_the_hessian_against_dense_ones():
    critic, omega = float64_critic(5)
    obs, returns = randn(20, 4, seed=41), 3 * randn(20, seed=42)
    dense = hessian(lambda omega: stac.value_loss(stac.critic_values(critic, omega, obs), returns))(omega)
    jacobian = jacrev(lambda omega: stac.critic_values(critic, omega, obs))(omega)
    v = randn(len(omega), seed=43)
    assert relative(stac.curvature(critic, omega, obs, returns, gauss_newton=False)(v), dense @ v) < 1e-12
    gauss_newton = 2 / 20 * jacobian.T @ jacobian
    assert relative(stac.curvature(critic, omega, obs, returns, gauss_newton=True)(v), gauss_newton @ v) < 1e-12
    assert torch.linalg.eigvalsh(dense).min() < -1e-3 < -1e-10 < torch.linalg.eigvalsh(gauss_newton).min()
    assert relative(stac.directional_derivative(critic, omega, obs, v), jacobian @ v) < 1e-12
    b = grad(stac.mean_value, argnums=1)(critic, omega, obs, returns)
    assert relative(b, returns @ jacobian / 20) < 1e-12


def test_the_two_hessians_agree_where_the_residual_is_zero():
    critic, omega = float64_critic(5)
    obs, v = randn(20, 4, seed=41), randn(len(omega), seed=43)
    returns = stac.critic_values(critic, omega, obs)
    full, part = (stac.curvature(critic, omega, obs, returns, gauss_newton)(v) for gauss_newton in (False, True))
    assert relative(full, part) < 1e-12


def test_critic_values_read_omega_in_the_order_of_the_parameters():
    critic, omega = float64_critic(7)
    obs = randn(9, 4, seed=44)
    torch.testing.assert_close(stac.critic_values(critic, omega, obs), critic(obs).squeeze(-1), rtol=1e-14, atol=0)
    moved = omega.clone()
    moved[-1] += 1  # the bias of the output
    torch.testing.assert_close(stac.critic_values(critic, moved, obs), critic(obs).squeeze(-1) + 1, rtol=1e-14, atol=0)


# ---- The solver ------------------------------------------------------------------------------------------------
def symmetric(eigenvalues, seed: int = 51) -> torch.Tensor:
    q, _ = torch.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ q.T


def test_conjugate_gradient_solves_in_as_many_steps_as_there_are_eigenvalues():
    A, b = symmetric([1.0, 1.0, 4.0, 4.0, 9.0, 9.0]), randn(6, seed=52)
    x, stopped = stac.conjugate_gradient(A.__matmul__, b, 3)
    assert not stopped and relative(x, torch.linalg.solve(A, b)) < 1e-12
    x, _ = stac.conjugate_gradient(A.__matmul__, b, 2)
    assert relative(x, torch.linalg.solve(A, b)) > 1e-4


def test_conjugate_gradient_stops_at_the_tolerance_and_at_a_zero_right_hand_side():
    A, b, calls = symmetric([1.0, 2.0, 3.0, 4.0, 5.0]), randn(5, seed=53), []

    def product(v):
        calls.append(1)
        return A @ v

    x, _ = stac.conjugate_gradient(product, b, 100, tolerance=1e-10)
    assert (A @ x - b).norm() <= 1e-10 * b.norm() and len(calls) <= 6
    x, stopped = stac.conjugate_gradient(product, torch.zeros_like(b), 10)
    assert not x.any() and not stopped


def test_guard_stops_at_once_where_the_first_direction_has_negative_curvature():
    """Check F: x = 0, so the leader's step is the individual gradient."""
    A = symmetric([-4.0, 1.0, 2.0])
    b = torch.linalg.eigh(A).eigenvectors[:, 0]
    x, stopped = stac.conjugate_gradient(A.__matmul__, b, 10)
    assert stopped and not x.any()


def test_guard_keeps_the_iterate_before_the_direction_of_negative_curvature():
    """The first direction has positive curvature, a later one has not: what is kept is one steepest-descent step; without
    a guard the method would go on to the saddle point, where x.b < 0."""
    A, b = torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=F64)), torch.tensor([1.0, 1.0, 1.0], dtype=F64)
    x, stopped = stac.conjugate_gradient(A.__matmul__, b, 10)
    assert stopped
    torch.testing.assert_close(x, (b @ b) / (b @ A @ b) * b, rtol=1e-12, atol=0)
    assert x @ b > 0 > torch.linalg.solve(A, b) @ b


def test_without_its_guard_the_solver_goes_on_to_the_saddle_point():
    A, b = torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=F64)), torch.tensor([1.0, 1.0, 1.0], dtype=F64)
    x, met = stac_ablations.unguarded_conjugate_gradient(A.__matmul__, b, 10)
    assert met and relative(x, torch.linalg.solve(A, b)) < 1e-12
    x, met = stac_ablations.unguarded_conjugate_gradient(A.abs().__matmul__, b, 10)
    assert not met and relative(x, torch.linalg.solve(A.abs(), b)) < 1e-12
    assert relative(x, stac.conjugate_gradient(A.abs().__matmul__, b, 10)[0]) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guard_stops_at_what_is_not_finite(bad):
    x, stopped = stac.conjugate_gradient(lambda v: bad * v, randn(4, seed=54), 10)
    assert stopped and not x.any()


def test_guard_does_not_depend_on_the_scale_of_the_matrix():
    A, b = symmetric([1.0, 2.0, 3.0]), randn(3, seed=55)
    for scale in (1e-12, 1e12):
        x, stopped = stac.conjugate_gradient((scale * A).__matmul__, b, 10)
        assert not stopped and relative(x, torch.linalg.solve(scale * A, b)) < 1e-6


# ---- The policy ------------------------------------------------------------------------------------------------
def test_categorical_policy_samples_what_it_says():
    torch.manual_seed(0)
    agent = stac.Agent(3, 4, True, 5, 5)
    obs = torch.randn(1, 3)
    actions = agent.sample(obs, agent.noise(40_000))
    logprobs, entropy = agent.logprob_and_entropy(obs.expand(4, 3), torch.arange(4))
    frequencies = torch.bincount(actions, minlength=4) / 40_000
    assert (frequencies - logprobs.detach().exp()).abs().max() < 0.01
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert entropy[0].item() == pytest.approx(-(logprobs.exp() @ logprobs).item(), rel=1e-5)


def test_gaussian_policy_samples_what_it_says():
    torch.manual_seed(0)
    agent = stac.Agent(3, 2, False, 5, 5)
    assert agent.actor_logstd.tolist() == [-0.5, -0.5]
    obs = torch.randn(1, 3)
    actions = agent.sample(obs, agent.noise(40_000)).detach()
    normal = torch.distributions.Normal(agent.actor(obs)[0], agent.actor_logstd.exp())
    logprobs, entropy = agent.logprob_and_entropy(obs.expand(40_000, 3), actions)
    torch.testing.assert_close(logprobs, normal.log_prob(actions).sum(-1), rtol=1e-4, atol=1e-5)
    assert entropy[0].item() == pytest.approx(normal.entropy().sum().item(), rel=1e-6)
    assert (actions.mean(0) - normal.mean).abs().max() < 0.02 and (actions.std(0) - normal.stddev).abs().max() < 0.02
