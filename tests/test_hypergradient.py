"""The hypergradient: against a follower that is solved again for every theta, on a task whose chunks can be enumerated;
what `train` computes on real minibatches, against plain autograd."""

import copy
import csv
import importlib
import inspect
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import blpo_continuous as blpo
import blpo_discrete

DOUBLE = torch.float64
REFRESHED, TARGETS = "refreshed", "targets"  # whose advantages the mixed term has; the script's are those of the targets


def exact_solve(curvature, u, damping):
    """b = J^T u and v = (H + damping I)^-1 b by dense algebra; the Jacobian is that of `CriticJacobian`."""
    jacobian = curvature.jacobian
    dense = jacobian.vjp(torch.eye(len(jacobian.values), dtype=u.dtype))
    hessian = dense.T @ (curvature.root[:, None] ** 2 * dense)
    b = dense.T @ u
    return b, torch.linalg.solve(hessian + damping * torch.eye(len(b), dtype=u.dtype), b)


def composed(critic, batch, solve, clip_coef=0.2, norm_adv=False, mixed_advantages=TARGETS):
    """direct, correction and what leads to them: the script's functions as `train` calls them on a rollout.

    `batch` has obs (T + 1, N, D), ratio, advantages (of the targets), rewards, discounts, weights, valid and the two decays
    (T, N).
    """
    jacobian = blpo.CriticJacobian(critic, batch.obs.flatten(0, 1))
    values = jacobian.values.view(batch.obs.shape[:2])
    refreshed = blpo.gae(batch.rewards, values, batch.discounts, batch.decay)
    advantages = refreshed if mixed_advantages == REFRESHED else batch.advantages
    refreshed, advantages = refreshed * batch.valid, advantages * batch.valid
    if norm_adv:
        refreshed, advantages = (x - (batch.weights * x).sum() for x in (refreshed, advantages))
        std = (batch.weights * refreshed**2).sum().sqrt() + 1e-8
        refreshed, advantages = refreshed / std, advantages / std
    slopes = batch.weights * blpo.surrogate_slope(batch.ratio.detach(), refreshed, clip_coef)
    u = blpo.lambda_returns_vjp(slopes, batch.discounts, batch.decay).flatten()
    row_weights = torch.cat([batch.weights, 0 * batch.weights[:1]]).flatten()
    b, v = solve(blpo.GaussNewton(jacobian, row_weights), u)
    e = blpo.trace(batch.valid * jacobian.jvp(v).view(values.shape)[:-1], batch.mixed_decay)
    surrogates = blpo.clipped_surrogate(batch.ratio, torch.stack([refreshed, advantages]), clip_coef)
    direct, correction = (torch.stack([batch.weights, batch.weights * 2 * e]) * surrogates).sum((1, 2))
    return SimpleNamespace(direct=direct, correction=correction, b=b, v=v, e=e, std=std if norm_adv else 1.0)


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# ---- A task that can be enumerated -----------------------------------------------------------------------------
# Three states, two actions. Episodes start in state 0, end by termination (None) or are cut after three steps, and a reset
# row follows. A rollout is one environment's chunk of six rows: an episode, its reset row, the start of the next one.
GAMMA, LIMIT, LENGTH = 0.9, 3, 6
NEXT = {
    (0, 0): [(1, 1.0)], (0, 1): [(1, 0.4), (2, 0.6)], (1, 0): [(2, 1.0)], (1, 1): [(None, 1.0)],
    (2, 0): [(0, 1.0)], (2, 1): [(None, 1.0)],
}  # fmt: skip
REWARD = {(0, 0): 1.0, (0, 1): -0.5, (1, 0): 0.3, (1, 1): 2.0, (2, 0): -1.0, (2, 1): 0.7}
OLD_VALUES = np.array([0.6, -1.2, 2.1])  # of the critic that the targets bootstrap from: no policy has these values
FEATURES = {
    "tabular": torch.eye(3, dtype=DOUBLE),
    "linear": torch.tensor([[1.0, 0.3], [-2.0, 0.9], [0.5, -0.4]], dtype=DOUBLE),
    "tanh": torch.tensor([[0.4], [1.1], [-0.1]], dtype=DOUBLE),
}
THETA = 0.7 * np.random.default_rng(0).normal(size=6)


def softmax_policy(theta):
    """pi(a|s) (3, 2) of the logits theta (6,)."""
    weights = np.exp(np.reshape(theta, (3, 2)))
    return weights / weights.sum(1, keepdims=True)


def expected_return(first, then, values, lambda_, state, age, row, chunk=LENGTH):
    """The mean lambda-return of a row: its action by the policy `first`, all later ones by `then`. It bootstraps from
    `values` (3,), which stand still; `age` steps of the episode lie before."""
    total = 0.0
    for action in (0, 1):
        for following, probability in NEXT[state, action]:
            if following is None:
                later = 0.0
            elif age + 1 == LIMIT or (row + 1) % chunk == 0:  # cut, or the end of the chunk
                later = values[following]
            else:
                rest = expected_return(then, then, values, lambda_, following, age + 1, row + 1, chunk)
                later = (1 - lambda_) * values[following] + lambda_ * rest
            total += first[state, action] * probability * (REWARD[state, action] + GAMMA * later)
    return total


def visits(pi):
    """{(state, age, row): share of all transitions} under the policy."""
    mass = defaultdict(float) | {(0, 0, 0): 1.0}
    for row in range(LENGTH):
        for state, age, _ in [key for key in mass if key[2] == row]:
            for action in (0, 1):
                for following, probability in NEXT[state, action]:
                    ended = following is None or age + 1 == LIMIT
                    reached = (0, 0, row + 2) if ended else (following, age + 1, row + 1)
                    mass[reached] += mass[state, age, row] * pi[state, action] * probability
    mass = {key: value for key, value in mass.items() if key[2] < LENGTH}
    return {key: value / sum(mass.values()) for key, value in mass.items()}


def central_differences(function, theta, step=1e-5):
    """The derivatives of a function of theta (6,)."""
    steps = step * np.eye(len(theta))
    return torch.tensor(np.array([(function(theta + s) - function(theta - s)) / (2 * step) for s in steps]))


def enumerated(theta, lambda_, kappa, target_lambda):
    """Every rollout that can happen, weighed by its probability under the policy at theta, side by side as the environments
    of one rollout of the script. `theta` is the leaf that the ratio depends on. Rows without meaning hold large numbers."""
    pi, paths = softmax_policy(theta.detach().numpy()), []

    def extend(path, state, age, probability):
        if len(path) >= LENGTH:
            final = path[LENGTH] if len(path) > LENGTH else (state, age, 0, "")  # one more than LENGTH: a reset row
            paths.append(([*path[:LENGTH], final], probability))
            return
        for action in (0, 1):
            for following, chance in NEXT[state, action]:
                how = "terminated" if following is None else "cut" if age + 1 == LIMIT else ""
                after = [*path, (state, age, action, how)]
                if how:
                    extend([*after, (following, -1, 0, "reset")], 0, 0, probability * pi[state, action] * chance)
                else:
                    extend(after, following, age + 1, probability * pi[state, action] * chance)

    extend([], 0, 0, 1.0)
    chunks, probabilities = [path for path, _ in paths], torch.tensor([p for _, p in paths], dtype=DOUBLE)
    assert abs(probabilities.sum() - 1) < 1e-12
    # state -1, after a termination, stands for any observation
    states = torch.tensor([[-1 if state is None else state for state, *_ in path] for path in chunks]).T
    ages, actions = (torch.tensor([[row[i] for row in path] for path in chunks]).T for i in (1, 2))
    terminated, cut, reset = (
        torch.tensor([[row[3] == how for row in path[:-1]] for path in chunks]).double().T for how in ("terminated", "cut", "reset")
    )
    assert terminated.any() and cut.any() and reset.any()
    rewards = [[1e3 if how == "reset" else REWARD[s, a] for s, _, a, how in path[:-1]] for path in chunks]
    rewards, old = torch.tensor(rewards, dtype=DOUBLE).T, torch.tensor([*OLD_VALUES, 1e3])[states]
    ended, valid, actions = terminated + cut, 1 - reset, actions[:-1]
    logprobs = theta.view(3, 2).log_softmax(-1)[states[:-1], actions]
    weights, going = probabilities * valid, 1 - ended
    return SimpleNamespace(
        states=states, ages=ages, valid=valid, ended=ended, logprobs=logprobs, ratio=(logprobs - logprobs.detach()).exp(),
        rewards=rewards, discounts=GAMMA * (1 - terminated), weights=weights / weights.sum(),
        decay=GAMMA * lambda_ * going, mixed_decay=kappa * going,
        advantages=blpo.gae(rewards, old, GAMMA * (1 - terminated), GAMMA * target_lambda * going),
    )  # fmt: skip


def test_the_enumeration_and_the_recursion_visit_the_same_rows():
    """They share nothing but the task: the first is what is judged, the second judges."""
    batch, expected = enumerated(torch.tensor(THETA), 1.0, 0.0, 1.0), visits(softmax_policy(THETA))
    found = defaultdict(float)
    for row, chunk in batch.valid.nonzero().tolist():
        found[int(batch.states[row, chunk]), int(batch.ages[row, chunk]), row] += float(batch.weights[row, chunk])
    assert found.keys() == expected.keys() and all(abs(found[key] - expected[key]) < 1e-12 for key in found)
    assert {row for _, _, row in found} == set(range(LENGTH))


# ---- The gradients that the docstring states -------------------------------------------------------------------
@pytest.mark.parametrize("lambda_", [0.8, pytest.param(0.0, marks=pytest.mark.full), pytest.param(1.0, marks=pytest.mark.full)])
def test_an_action_earns_the_targets_of_all_rows_before_it(lambda_):
    """grad E[G'_t] = E[sum_{k >= t} kappa^(k-t) A'_k grad log pi_k], kappa = gamma lambda, for every state, age and row."""
    theta = torch.tensor(THETA, requires_grad=True)
    batch = enumerated(theta, lambda_, GAMMA * lambda_, lambda_)
    score = batch.valid * batch.advantages * batch.logprobs
    zero = torch.zeros_like(torch.cat([score, score[:1]]))
    earned = blpo.gae(score, zero, zero[1:], batch.mixed_decay)  # W of the scores
    for state, age, row in visits(softmax_policy(THETA)):
        here = (batch.states[row] == state) & (batch.ages[row] == age)
        shares = batch.weights[row, here] / batch.weights[row, here].sum()
        ours = torch.autograd.grad(shares @ earned[row, here], theta, retain_graph=True)[0]

        def target(theta):
            pi = softmax_policy(theta)
            return expected_return(pi, pi, OLD_VALUES, lambda_, state, age, row)

        assert (ours - central_differences(target, THETA)).norm() < 1e-9


@pytest.mark.parametrize("lambda_", [0.8, pytest.param(1.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_gradient_of_l_in_theta_and_the_mixed_term_at_any_critic(kind, lambda_):
    """grad_theta of sum d (E G' - V)^2 = 2 sum_k (W^T (E G' - V))_k A'_k grad log pi_k, and its derivative in omega along v
    = -2 sum_k (W^T z)_k A'_k grad log pi_k, at a critic that is at no minimum. The variance of G' does not depend on omega."""
    torch.manual_seed(1)
    features = FEATURES[kind]
    layers = [nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)] if kind == "tanh" else [nn.Linear(2, 1)]
    critic = nn.Sequential(*layers).double()
    theta, shares = torch.tensor(THETA, requires_grad=True), visits(softmax_policy(THETA))
    batch = enumerated(theta, lambda_, GAMMA * lambda_, lambda_)
    jacobian = blpo.CriticJacobian(critic, features)
    v = torch.randn(sum(jacobian.sizes), dtype=DOUBLE)
    slopes, values = jacobian.jvp(v), critic(features).squeeze(-1).detach()

    def targets(theta):
        pi = softmax_policy(theta)
        return {key: expected_return(pi, pi, OLD_VALUES, lambda_, *key) for key in shares}

    def loss(theta):
        return sum(shares[key] * (target - values[key[0]].item()) ** 2 for key, target in targets(theta).items())

    def slope_along_v(theta):
        return sum(-2 * shares[key] * (x - values[key[0]].item()) * slopes[key[0]].item() for key, x in targets(theta).items())

    errors = torch.zeros_like(batch.weights)
    for (state, age, row), target in targets(THETA).items():
        errors[row, (batch.states[row] == state) & (batch.ages[row] == age)] = target - values[state]
    for x, sign, oracle in ((errors, 2, loss), (slopes[batch.states[:-1]], -2, slope_along_v)):
        e = blpo.trace(batch.valid * x, batch.mixed_decay)
        ours = torch.autograd.grad(
            sign * (batch.weights * e * batch.advantages * batch.logprobs).sum(), theta, retain_graph=True
        )[0]
        assert relative_error(ours, central_differences(oracle, THETA)) < 1e-8


# ---- The total derivative, with the follower solved again ------------------------------------------------------
class Follower:
    """omega*(theta) of the inner problem that holds L's own targets: the minimiser of sum_rows d (target_theta - V_omega)^2
    + damping / 2 |omega - omega_0|^2. target_theta is the mean lambda'-return of the row under theta, bootstrapped from
    OLD_VALUES; omega_0 is the minimiser at THETA without damping, where the script is asked for its gradient."""

    def __init__(self, kind, target_lambda, damping=0.05, chunk=LENGTH):
        self.shares, self.target_lambda, self.damping = visits(softmax_policy(THETA)), target_lambda, damping
        self.chunk, self.features = chunk, FEATURES[kind]
        width = self.features.shape[1]
        layers = [nn.Linear(width, 1)]
        if kind == "tanh":
            layers = [nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)]
        self.critic = nn.Sequential(*layers).double()
        start = [1.0, 1.5] if kind == "tanh" else [0.0] * (width + 1)
        self.omega = self.minimum(THETA, torch.tensor(start, dtype=DOUBLE), damping=0.0)
        nn.utils.vector_to_parameters(self.omega, self.critic.parameters())

    def loss(self, omega, targets, damping, anchor):
        """L and the proximal term of the flat parameters; the critics are written out."""
        if self.critic[0] is self.critic[-1]:
            values = self.features @ omega[:-1] + omega[-1]
        else:
            values = omega[1] * torch.tanh(omega[0] * self.features[:, 0])
        shares, states = torch.tensor([*self.shares.values()]), [state for state, *_ in self.shares]
        return (shares * (targets - values[states]) ** 2).sum() + damping / 2 * (omega - anchor).square().sum()

    def minimum(self, theta, start, damping):
        """By Newton's method from `start`, the anchor of the damping, with Levenberg's where the Hessian is nearly singular."""
        pi = softmax_policy(theta)
        targets = [expected_return(pi, pi, OLD_VALUES, self.target_lambda, *key) for key in self.shares]
        omega, problem = start, (torch.tensor(targets, dtype=DOUBLE), damping, start)
        for _ in range(500):
            gradient = torch.func.grad(self.loss)(omega, *problem)
            if gradient.norm() < 1e-14:
                break
            hessian = torch.func.hessian(self.loss)(omega, *problem)
            if not damping:
                hessian += max(0.0, 0.1 - torch.linalg.eigvalsh(hessian)[0]) * torch.eye(len(omega))
            omega = omega - torch.linalg.solve(hessian, gradient)
        assert gradient.norm() < 1e-12, f"the follower is not at a minimum: {gradient.norm()}"
        return omega

    def leader_objective(self, theta, omega, lambda_):
        """J: a row's action by theta, what follows by the policy that sampled; its baseline has no derivative."""
        critic = copy.deepcopy(self.critic)
        nn.utils.vector_to_parameters(omega, critic.parameters())
        pi, old, values = softmax_policy(theta), softmax_policy(THETA), critic(self.features)[:, 0].detach().numpy()
        return sum(share * expected_return(pi, old, values, lambda_, *key, self.chunk) for key, share in self.shares.items())

    def total_derivative(self, lambda_):
        """d J(theta, omega*(theta)) / d theta by central differences."""
        return central_differences(
            lambda theta: self.leader_objective(theta, self.minimum(theta, self.omega, self.damping), lambda_), THETA
        )

    def exact(self, curvature, u):
        return exact_solve(curvature, u, self.damping)

    def judged(self, kappa, lambda_, solve=None, **how):
        """The script's hypergradient and its direct part."""
        theta = torch.tensor(THETA, requires_grad=True)
        batch = enumerated(theta, lambda_, kappa, self.target_lambda)
        batch.obs = torch.cat([self.features, torch.full_like(self.features[:1], 7.0)])[batch.states]
        parts = composed(self.critic, batch, solve or self.exact, **how)
        direct, correction = (
            torch.autograd.grad(x, theta, retain_graph=True)[0] * parts.std for x in (parts.direct, parts.correction)
        )
        return direct + correction, direct


@pytest.mark.parametrize("kind", ["tabular", "linear"])
@pytest.mark.parametrize(
    "lambda_, target_lambda",
    [(0.8, 0.8), (0.95, 0.3), *(pytest.param(*x, marks=pytest.mark.full) for x in ((0.0, 0.8), (1.0, 0.95), (0.8, 0.0)))],
)
def test_hypergradient_is_the_total_derivative_with_the_follower_solved_again(lambda_, target_lambda, kind):
    """By default, kappa = gamma lambda' and the targets' own advantages. Other readings miss the correction by far."""
    follower, kappa = Follower(kind, target_lambda), GAMMA * target_lambda
    expected = follower.total_derivative(lambda_)
    hypergradient, direct = follower.judged(kappa, lambda_)
    assert relative_error(hypergradient, expected) < 1e-8
    assert relative_error(follower.judged(kappa, lambda_, norm_adv=True)[0], expected) < 1e-7  # 1e-8 is added to the deviation
    wrong = {
        "refreshed advantages": follower.judged(kappa, lambda_, mixed_advantages=REFRESHED)[0],
        "kappa = gamma": follower.judged(GAMMA, lambda_)[0],
        "kappa = 0": follower.judged(0.0, lambda_)[0],
        "the other sign": 2 * direct - hypergradient,
        "the direct part alone": direct,
    }
    if target_lambda == 0:  # here each state is its own start
        assert relative_error(wrong.pop("kappa = 0"), expected) < 1e-8
    correction = (expected - direct).norm()
    assert correction > 0.05 * direct.norm()
    for name, gradient in wrong.items():
        assert (gradient - expected).norm() > (0.02 if name == "kappa = gamma" else 0.1) * correction, name


@pytest.mark.parametrize("kind", ["tabular", "linear"])
@pytest.mark.parametrize("lambda_", [0.95, pytest.param(0.0, marks=pytest.mark.full)])
def test_kappa_gamma_is_exact_for_monte_carlo_targets(lambda_, kind):
    follower = Follower(kind, target_lambda=1.0)
    expected = follower.total_derivative(lambda_)
    assert relative_error(follower.judged(GAMMA, lambda_)[0], expected) < 1e-8
    assert relative_error(follower.judged(GAMMA * 0.95, lambda_)[0], expected) > 1e-3


@pytest.mark.parametrize("solver, tolerance", [("nystrom", 1e-8), ("cg", 1e-6)])
def test_the_other_solvers_give_the_total_derivative_of_a_linear_critic_too(solver, tolerance):
    """Nystrom has all its directions, and conjugate gradients stop at 1e-6 of b."""
    follower, generator = Follower("linear", target_lambda=0.8), torch.Generator().manual_seed(0)
    how = {"nystrom": (10, generator), "cg": (10,)}[solver]
    solve = getattr(blpo, f"{solver}_ihvp")
    hypergradient, _ = follower.judged(GAMMA * 0.8, 0.8, lambda curvature, u: solve(curvature, u, follower.damping, *how))
    assert relative_error(hypergradient, follower.total_derivative(0.8)) < tolerance


def test_a_critic_with_errors_that_stay_needs_the_whole_hessian():
    """V = c tanh(a x) cannot fit the targets: the term in L's errors, which Gauss-Newton leaves out, is missed."""
    follower = Follower("tanh", target_lambda=0.8, damping=0.01)
    expected = follower.total_derivative(0.8)
    pi = softmax_policy(THETA)
    targets = [expected_return(pi, pi, OLD_VALUES, 0.8, *key) for key in follower.shares]
    problem = torch.tensor(targets, dtype=DOUBLE), 0.01, follower.omega
    hessian = torch.func.hessian(follower.loss)(follower.omega, *problem)  # its damping included

    def hessian_solve(curvature, u):
        b = curvature.jacobian.vjp(u[None])[0]
        return b, torch.linalg.solve(hessian, b)

    assert relative_error(follower.judged(GAMMA * 0.8, 0.8, hessian_solve)[0], expected) < 1e-6
    assert relative_error(follower.judged(GAMMA * 0.8, 0.8)[0], expected) > 1e-3


def test_with_a_one_step_leader_the_correction_is_the_credit_of_all_later_steps():
    """r + gamma V(s') alone is short-sighted. With Monte Carlo targets, kappa = gamma and one value for each row the
    hypergradient is sum d(s) grad V^pi(s), d the rows' distribution held fixed: the policy gradient of the mean value."""
    theta = torch.tensor(THETA, requires_grad=True)
    batch, shares = enumerated(theta, 0.0, GAMMA, 1.0), visits(softmax_policy(THETA))
    keys = {key: number for number, key in enumerate(shares)}
    pi = softmax_policy(THETA)
    values = [expected_return(pi, pi, OLD_VALUES, 1.0, *key) for key in keys]
    values = torch.tensor([*values, *OLD_VALUES, 1e3], dtype=DOUBLE)  # the observations that returns bootstrap from, by state
    index = torch.tensor([
        [keys.get((state, age, row), len(keys) + state % 4) for state, age in zip(*states_and_ages)]
        for row, states_and_ages in enumerate(zip(batch.states.tolist(), batch.ages.tolist()))
    ])  # fmt: skip
    critic = nn.Sequential(nn.Linear(len(values), 1, bias=False)).double()
    with torch.no_grad():
        critic[0].weight.copy_(values)
    batch.obs = torch.eye(len(values), dtype=DOUBLE)[index]
    parts = composed(critic, batch, lambda curvature, u: exact_solve(curvature, u, 1e-10))
    direct, hypergradient = (
        torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (parts.direct, parts.direct + parts.correction)
    )

    def mean_value(theta):
        pi = softmax_policy(theta)
        return sum(share * expected_return(pi, pi, OLD_VALUES, 1.0, *key) for key, share in shares.items())

    expected = central_differences(mean_value, THETA)
    assert relative_error(hypergradient, expected) < 1e-6
    assert relative_error(direct, expected) > 0.1


# ---- What train computes in real runs --------------------------------------------------------------------------
RUN = {
    "num_envs": 4, "num_steps": 64, "total_timesteps": 3 * 256, "num_minibatches": 4, "update_epochs": 2, "learning_rate": 1e-2,
    "actor_width": 8, "critic_width": 8, "device": "cpu",
}  # fmt: skip
CHUNKS = {"nest": "minibatch", "chunk_length": 16}  # the laboratory's other form


def run(script, tmp_path, monkeypatch, **changes):
    """A short run on a toy task whose episodes of 2 to 11 steps end either way; its folder. Nothing is played at the end."""
    task = "toy_envs:WalkDiscrete-v0" if "discrete" in script.__name__ else "toy_envs:Walk-v0"
    values = {"env_id": task, "run_dir": tmp_path / str(len([*tmp_path.iterdir()]))} | RUN | changes
    monkeypatch.setattr(script, "play", lambda *_: [])
    return script.train(script.Args(**{name: x for name, x in values.items() if name in script.Args.model_fields}))


def metrics_of(folder):
    """The rows of metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(cell or "nan") for name, cell in row.items()} for row in csv.DictReader(file)]


def weights_of(folder):
    return torch.load(folder / "model.pt", weights_only=True)["agent"]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def updates_of(script, tmp_path, monkeypatch, **changes):
    """The local variables of `train` at the last minibatch of each rollout, its agent in float64 as it is then and, as `start`, as
    it was when the response was computed; the gradients in theta of the direct part, the correction and the loss; the metrics."""
    seen, starts, original, vjp = [], [], script.leader_diagnostics, script.lambda_returns_vjp

    def response_spy(*inputs):
        starts.append(copy.deepcopy(inspect.currentframe().f_back.f_locals["agent"]).double())
        return vjp(*inputs)

    def spy(theta, direct, correction, e):
        local = inspect.currentframe().f_back.f_locals
        kept = {k: torch.as_tensor(x).detach().clone() if isinstance(x, (torch.Tensor, np.ndarray)) else x for k, x in local.items()}
        kept |= {"agent": copy.deepcopy(local["agent"]).double(), "start": starts[-1]}
        for name in ("direct", "correction", "loss"):
            gradient = torch.autograd.grad(local[name], theta, retain_graph=True)
            kept[f"{name}_gradient"] = torch.cat([g.flatten() for g in gradient]).double()
        seen.append(SimpleNamespace(**kept))
        return original(theta, direct, correction, e)

    with monkeypatch.context() as patch:
        patch.setattr(script, "leader_diagnostics", spy)
        patch.setattr(script, "lambda_returns_vjp", response_spy)
        rows = metrics_of(run(script, tmp_path, patch, **changes))
    assert len(seen) == len(rows) == 3
    for each, row in zip(seen, rows):
        each.metrics = {name.removeprefix("bilevel/"): x for name, x in row.items()}
    return seen


def double_batch(seen):
    """What the critic answered, in float64: the rollout or, in the laboratory's other form, the minibatch."""
    local = vars(seen)
    if "p_obs" in local:
        names = [f"p_{name}" for name in ("obs", "actions", "logprobs", "rewards", "returns", "advantages", "discounts", "ended")]
    else:
        names = ["b_obs", "b_actions", "logprobs", "b_rewards", "returns", "advantages", "b_discounts", "b_ended"]
    fields = "obs", "actions", "logprobs", "rewards", "returns", "advantages", "discounts", "ended", "valid"
    arrays = [local[name] for name in (*names, names[0][0] + "_valid")]
    batch = SimpleNamespace(**{name: x.double() if x.is_floating_point() else x for name, x in zip(fields, arrays)})
    args = seen.args
    batch.discounts = args.gamma * (batch.discounts > 0).double()  # without the rounding of float32
    batch.kappa = args.gamma * args.gae_lambda if args.mixed_discount is None else args.mixed_discount
    batch.weights, going = batch.valid / batch.valid.sum(), 1 - batch.ended
    batch.decay, batch.mixed_decay = args.gamma * args.gae_lambda * going, batch.kappa * going
    # the rows of the last minibatch of the actor
    batch.last = local["rows"][local["part"]]
    assert batch.ended.any() and (batch.discounts == 0).sum() < batch.ended.sum() and not batch.valid.all()
    return batch


def policy_of(agent, obs):
    """The policy at obs as torch.distributions has it, of whole actions."""
    if hasattr(agent, "actor_logits"):
        return torch.distributions.Categorical(logits=agent.actor_logits(obs))
    return torch.distributions.Independent(torch.distributions.Normal(agent.actor_mean(obs), agent.actor_logstd.exp()), 1)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def by_autograd(seen):
    """What the update should give, by recursions over its steps, torch.distributions and plain autograd in float64."""
    batch, args, critic = double_batch(seen), seen.args, seen.start.critic
    steps, clip = range(len(batch.valid)), args.clip_coef
    names, omega = zip(*((name, parameter.detach()) for name, parameter in critic.named_parameters()))

    def mean(x):
        return (batch.weights * x).sum()

    def values(omega):
        return torch.func.functional_call(critic, dict(zip(names, omega)), (batch.obs,)).squeeze(-1)

    def advantages(omega):
        """G(omega) - V(s) with the V(s) of now, the lambda-return G by its recursion."""
        v, returns, after = values(omega), [], None
        for t in reversed(steps):
            next_value = v[t + 1]
            if after is not None:
                mixture = (1 - args.gae_lambda) * next_value + args.gae_lambda * after
                next_value = torch.where(batch.ended[t] == 1, next_value, mixture)
            after = batch.rewards[t] + batch.discounts[t] * next_value
            returns.insert(0, after)
        return torch.stack(returns) - values(omega_now)[:-1]

    def surrogate(ratio, advantages):
        return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)

    def inner_loss(*omega):
        return mean((batch.returns - values(omega)[:-1]) ** 2)

    omega_now, every = omega, tuple(range(len(omega)))
    refreshed, fixed = advantages(omega), batch.advantages
    centre = mean(refreshed) if args.norm_adv else 0.0

    # b = grad_omega J with theta held where it was when the critic had answered
    theta = seen.start.actor_parameters()
    ratio = (policy_of(seen.start, batch.obs[:-1]).log_prob(batch.actions) - batch.logprobs).exp()
    held = ratio.detach()
    b = flat(torch.func.grad(lambda *omega: mean(surrogate(held, advantages(omega) - centre)), every)(*omega))
    jacobian = torch.func.jacrev(lambda *omega: values(omega)[:-1].flatten(), every)(*omega)
    jacobian = torch.cat([block.flatten(1) for block in jacobian], 1)
    curvature = 2 * jacobian.T @ (batch.weights.flatten()[:, None] * jacobian)
    if getattr(args, "curvature", "") == "hessian":
        blocks = torch.func.jacrev(torch.func.grad(inner_loss, every), every)(*omega)
        rows = [torch.cat([x.reshape(p.numel(), -1) for x in row], 1) for row, p in zip(blocks, omega)]
        curvature = torch.cat(rows)
    damped = curvature + args.damping * torch.eye(len(b), dtype=DOUBLE)
    v = torch.linalg.solve(damped, b) if args.ihvp != "nystrom" else seen.v.double()
    tangents = tuple(x.view_as(p) for x, p in zip(v.split([p.numel() for p in omega]), omega))
    values_along_v = torch.func.jvp(lambda *omega: values(omega), omega, tangents)[1][:-1]

    # e, the trace of z = J_V v: what an action answers for
    e, before = [], 0.0
    for t in steps:
        before = batch.valid[t] * (values_along_v[t] + batch.kappa * before)
        e.append(before)
        before = before * (1 - batch.ended[t])
    e = torch.stack(e)

    # (grad_theta,omega L) v on all rows: derivative along v of mean (G'(theta) - V(omega))^2, where G'_t(theta) has the gradient
    # of sum_{k >= t} kappa^(k-t) S(r_k, A'_k) and theta and omega are differentiated by autograd; it is -2 mean e S(r, A')
    earned, after, gains = [], 0.0, surrogate(ratio, fixed)
    for t in reversed(steps):
        after = batch.valid[t] * (gains[t] + batch.kappa * (1 - batch.ended[t]) * after)
        earned.insert(0, after)
    earned = torch.stack(earned)
    targets = batch.returns + earned - earned.detach()
    slope_along_v = mean(-2 * (targets - values(omega)[:-1]) * values_along_v)
    both = slope_along_v, mean(-2 * e * surrogate(ratio, fixed))
    mixed, rows = (flat(torch.autograd.grad(x, theta, retain_graph=True)) for x in both)
    assert relative_error(rows, mixed) < 1e-9

    # the last minibatch of the actor, where theta is by then
    agent, last = seen.agent, batch.last
    theta = agent.actor_parameters()
    policy = policy_of(agent, batch.obs[:-1].flatten(0, 1)[last])
    ratio = (policy.log_prob(batch.actions.flatten(0, 1)[last]) - batch.logprobs.flatten()[last]).exp()
    a, a_targets, e_last = (x.flatten()[last] for x in (refreshed, fixed, e))
    if args.norm_adv:
        a, a_targets = (a - a.mean()) / (a.std() + 1e-8), (a_targets - a_targets.mean()) / (a.std() + 1e-8)

    def gradient(x):
        return flat(torch.autograd.grad(x, theta, retain_graph=True, allow_unused=True, materialize_grads=True))

    direct = gradient(surrogate(ratio, a).mean())
    correction = gradient((2 * e_last * surrogate(ratio, a_targets)).mean())
    loss = -direct - correction - args.ent_coef * gradient(policy.entropy().mean())
    clipped = ((ratio - 1).abs() > clip).double().mean()
    return SimpleNamespace(
        b=b, v=v, e=e, e_last=e_last, damped=damped, direct=direct, correction=correction, loss=loss, clipped=clipped
    )


def check_against_autograd(seen):
    """Targets, gradients and diagnostics of a recorded update, to the accuracy of float32."""
    args, v, after, expected = seen.args, seen.values, 0.0, by_autograd(seen)
    for t in reversed(range(args.num_steps)):  # G' and A' of the whole rollout
        after = torch.where(
            (seen.b_ended[t] == 1) | (t == args.num_steps - 1),
            v[t + 1],
            (1 - args.gae_lambda) * v[t + 1] + args.gae_lambda * after,
        )
        after = seen.b_rewards[t] + args.gamma * (1 - seen.terminated[t]) * after
        valid = seen.b_valid[t] == 1
        assert torch.allclose(seen.returns[t][valid], after[valid], rtol=0, atol=1e-4)
        assert torch.allclose(seen.advantages[t][valid], (after - v[t])[valid], rtol=0, atol=1e-4)
    assert relative_error(seen.b.double(), expected.b) < 1e-4
    assert relative_error(seen.v.double(), expected.v) < 1e-3
    assert relative_error(seen.e.double(), expected.e) < 1e-3
    for name in ("direct", "correction", "loss"):
        assert relative_error(getattr(seen, f"{name}_gradient"), getattr(expected, name)) < 1e-3, name
    direct, correction, metrics, e = expected.direct, expected.correction, seen.metrics, expected.e_last
    diagnostics = {
        "direct_norm": direct.norm(), "correction_norm": correction.norm(), "norm_ratio": correction.norm() / direct.norm(),
        "cosine": torch.cosine_similarity(direct, correction, dim=0), "weight_mean": (1 + 2 * e).mean(),
        "weight_std": (2 * e - (2 * e).mean()).square().mean().sqrt(),
        "ihvp_cosine": torch.cosine_similarity(expected.b, expected.v, dim=0),
    }  # fmt: skip
    for name, value in diagnostics.items():
        assert metrics[name] == pytest.approx(float(value), rel=2e-3, abs=1e-5), name
    residual = (expected.damped @ seen.v.double() - expected.b).norm() / expected.b.norm()
    assert metrics["ihvp_residual"] == pytest.approx(float(residual), rel=1e-2, abs=1e-4)
    states, targets = seen.b_obs[:-1][seen.b_valid == 1].double(), seen.returns[seen.b_valid == 1].double()
    loss = ((seen.agent.critic(states).squeeze(-1) - targets) ** 2).mean()
    norm = flat(torch.autograd.grad(loss, [*seen.agent.critic.parameters()])).norm()
    assert metrics["inner_gradient_norm_after"] == pytest.approx(float(norm), rel=1e-3)
    return expected


HESSIAN = {"ihvp": "cg", "cg_iterations": 20, "curvature": "hessian", "damping": 5.0, "mixed_discount": 0.99}
CASES = [
    ("blpo_continuous", {"ihvp": "cg", "cg_iterations": 50, "norm_adv": False}),
    ("blpo_continuous", {"ihvp": "nystrom", "ent_coef": 0.1}),
    ("blpo_discrete", {"ihvp": "cg", "cg_iterations": 50, "ent_coef": 0.1}),
    ("blpo_continuous_ablations", {"ihvp": "exact"}),
    ("blpo_continuous_ablations", CHUNKS | {"ihvp": "exact"}),
    ("blpo_continuous_ablations", CHUNKS | HESSIAN),
]
for script in ("blpo_continuous", "blpo_discrete", "blpo_continuous_ablations"):
    for norm_adv in (True, False):
        for how in ({"ihvp": "cg", "cg_iterations": 50}, {"ihvp": "nystrom"}):
            how = how | {"norm_adv": norm_adv, "damping": 0.3, "seed": 2}
            CASES.append(pytest.param(script, how, marks=pytest.mark.full))
            if "ablations" in script:
                CASES.append(pytest.param(script, how | CHUNKS, marks=pytest.mark.full))


@pytest.mark.parametrize("script, how", CASES)
def test_train_takes_the_gradients_of_plain_autograd(script, how, tmp_path, monkeypatch):
    """b, v, e, the direct part, the correction, the loss and all diagnostics, in a real run."""
    clipped = 0
    for seen in updates_of(importlib.import_module(script), tmp_path, monkeypatch, **how):
        expected = check_against_autograd(seen)
        clipped += expected.clipped
        # The composition that the proofs above judge, in float64, is the one that train has.
        if getattr(seen.args, "curvature", "gauss-newton") == "gauss-newton" and seen.args.ihvp != "nystrom":
            batch, damping = double_batch(seen), seen.args.damping
            logprobs, _ = seen.start.logprob_and_entropy(batch.obs[:-1], batch.actions)
            batch.ratio = (logprobs - batch.logprobs).exp()
            parts = composed(
                seen.start.critic, batch, lambda curvature, u: exact_solve(curvature, u, damping), norm_adv=seen.args.norm_adv
            )
            for name in ("b", "v", "e"):
                assert relative_error(getattr(parts, name), getattr(expected, name)) < 1e-9, name
    assert clipped > 0  # the ratio's clipping was at work


@pytest.mark.parametrize("script", ["blpo_continuous", pytest.param("blpo_discrete", marks=pytest.mark.full)])
def test_mixed_discount_0_makes_each_state_its_own_start(script, tmp_path, monkeypatch):
    """e = z to the bit, 0 for rows that are no transition."""
    for seen in updates_of(importlib.import_module(script), tmp_path, monkeypatch, mixed_discount=0.0, ihvp="cg", cg_iterations=50):
        assert torch.equal(seen.e, seen.z) and not seen.z[seen.b_valid == 0].any() and seen.e.abs().max() > 0
        check_against_autograd(seen)


# ---- Controls --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ["nystrom", "cg"])
def test_infinite_damping_is_the_nested_control(solver, tmp_path, monkeypatch):
    for seen in updates_of(blpo, tmp_path, monkeypatch, ihvp=solver, damping=1e9):
        assert 0 < seen.correction_gradient.norm() < 1e-6 * seen.direct_gradient.norm()


@pytest.mark.parametrize("script", [blpo, blpo_discrete])
def test_a_correction_forced_to_zero_gives_the_weights_of_the_nested_control(script, tmp_path, monkeypatch):
    """Bitwise: the sketch draws from a generator of its own. A response that is not finite falls back to the same and is
    counted."""
    weights, original = {}, script.nystrom_ihvp
    how = {"nystrom_rank": 3, "save_model": True}
    weights["bilevel"] = weights_of(run(script, tmp_path, monkeypatch, **how))
    weights["nested"] = weights_of(run(script, tmp_path, monkeypatch, **how, ihvp="none"))
    for name, factor, fallbacks in (("zero", 0.0, 0), ("broken", math.nan, RUN["update_epochs"])):
        monkeypatch.setattr(script, "nystrom_ihvp", lambda *system: tuple(factor * x for x in original(*system)))
        folder = run(script, tmp_path, monkeypatch, **how)
        weights[name] = weights_of(folder)
        assert [row["bilevel/fallbacks"] for row in metrics_of(folder)] == [fallbacks] * 3
    assert same(weights["zero"], weights["nested"]) and same(weights["broken"], weights["nested"])
    assert not same(weights["bilevel"], weights["nested"])


def test_the_follower_makes_k_passes_over_the_rollout(tmp_path, monkeypatch):
    """On all transitions of the rollout, each once a pass, in an order of its own."""
    calls, original = [], blpo.follower_step

    def spy(critic, optimiser, obs, targets):
        local = inspect.currentframe().f_back.f_locals
        calls.append((local["iteration"], local["epoch"], obs.clone(), local["states"].clone()))
        return original(critic, optimiser, obs, targets)

    monkeypatch.setattr(blpo, "follower_step", spy)
    run(blpo, tmp_path, monkeypatch, nested_updates=5)
    assert len(calls) == 3 * RUN["update_epochs"] * RUN["num_minibatches"] * 5
    for start in range(0, len(calls), RUN["num_minibatches"]):
        one_pass = calls[start : start + RUN["num_minibatches"]]
        rows = torch.cat([call[2] for call in one_pass])
        assert len({call[:2] for call in one_pass}) == 1 and not torch.equal(rows, one_pass[0][3])
        assert sorted(rows.tolist()) == sorted(one_pass[0][3].tolist())


def test_the_laboratory_at_its_defaults_follows_the_method(tmp_path, monkeypatch):
    laboratory = importlib.import_module("blpo_continuous_ablations")
    for solver in ("nystrom", "cg"):
        first, second = (
            weights_of(run(script, tmp_path, monkeypatch, ihvp=solver, save_model=True)) for script in (blpo, laboratory)
        )
        assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_each_rollout_of_few_transitions_in_chunks_has_its_own_diagnostics(tmp_path, monkeypatch):
    """With resets among its 8 rows a rollout may have 3 minibatches of 4 chunks; each rollout's diagnostics are its own."""
    shape = {"num_steps": 2, "chunk_length": 2, "total_timesteps": 30 * 8, "nest": "minibatch"}
    laboratory = importlib.import_module("blpo_continuous_ablations")
    norms = [row["bilevel/direct_norm"] for row in metrics_of(run(laboratory, tmp_path, monkeypatch, **shape))]
    assert len(set(norms)) == len(norms) == 30
