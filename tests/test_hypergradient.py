"""The hypergradient: what `train` computes against autograd, and its parts against re-solved inner problems."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn as nn

import blpo_continuous as blpo
import blpo_continuous_ablations as laboratory
import blpo_discrete as discrete
from benchmark import ihvp_study

DOUBLE = torch.float64


# ---- What train computes on real minibatches -------------------------------------------------------------------
def minibatches_of(script, tmp_path, monkeypatch, *arguments):
    """The local variables of `train` at the last minibatch of each rollout, when its diagnostics are taken."""
    seen, original = [], script.leader_diagnostics

    def spy(theta, direct, correction, weights, z):
        names = inspect.currentframe().f_back.f_locals
        gradients = [torch.autograd.grad(x, theta, retain_graph=True) for x in (direct, correction)]
        kept = {k: x.detach().clone() if isinstance(x, torch.Tensor) else x for k, x in names.items() if k != "run"}
        critic = blpo.mlp(kept["obs_dim"], 64, 1, 1.0)
        critic.load_state_dict(names["agent"].critic.state_dict())
        kept["actor_weights"] = {k: x.clone() for k, x in names["agent"].state_dict().items()}
        seen.append(kept | {"critic": critic.double(), "gradients": [torch.cat([g.flatten() for g in x]) for x in gradients]})
        return original(theta, direct, correction, weights, z)

    monkeypatch.setattr(script, "leader_diagnostics", spy)
    words = ["--num-envs", "4", "--total-timesteps", "2048", "--run-dir", str(tmp_path)]
    words += [] if script is discrete else ["--env-id", "Hopper-v4"]
    script.train(script.parse_args(script.Args, [*words, *arguments]))
    assert seen, "train no longer calls leader_diagnostics"
    return seen


def recompute(seen, leader="lambda-return"):
    """J as a function of the critic's flat parameters, and the mixed term's surrogate as one of both players', from the
    recorded minibatch in float64 with plain autograd."""
    names = ("mb_obs", "mb_rewards", "mb_discounts", "weights", "mb_operator", "mb_logprobs", "mb_actions")
    chunks, rewards, discounts, weights, operator, old_logprobs, actions = (seen[name].double() for name in names)
    clip = seen["args"].clip_coef
    omega = torch.cat([parameter.detach().flatten() for parameter in seen["critic"].parameters()])

    def values(w):
        return laboratory.flat_call(seen["critic"], w, chunks.flatten(0, 1)).view(len(chunks), -1)

    def advantages(w):
        v = values(w)
        returns = v[:, :-1] + (operator @ (rewards + discounts * v[:, 1:] - v[:, :-1])[:, :, None])[:, :, 0]
        return returns - (v[:, :-1] if leader == "released" else values(omega)[:, :-1].detach())

    def ratio(theta):
        x, layers = chunks[:, :-1], [x for name, x in theta.items() if name != "actor_logstd"]
        for weight, bias in zip(layers[:-2:2], layers[1:-2:2]):
            x = torch.tanh(x @ weight.T + bias)
        outputs = x @ layers[-2].T + layers[-1]
        if "actor_logstd" not in theta:
            return torch.exp(torch.distributions.Categorical(logits=outputs).log_prob(actions) - old_logprobs)
        normal = torch.distributions.Normal(outputs, theta["actor_logstd"].exp())
        return torch.exp(normal.log_prob(actions).sum(-1) - old_logprobs)

    # in the order of `actor_parameters`: the layers, then the log standard deviation if there is one
    theta = {k: x.double() for k, x in seen["actor_weights"].items() if "actor" in k}
    theta |= {"actor_logstd": theta.pop("actor_logstd")} if "actor_logstd" in theta else {}

    def leader_objective(theta, w):
        a, r = advantages(w), ratio(theta)
        return (weights * torch.min(r * a, r.clamp(1 - clip, 1 + clip) * a)).sum()

    def inner_surrogate(theta, w):
        """sum_t 2 w_t s_t(theta) (G_t - V_omega): its theta-gradient stands for that of L (Prop. 1, each state its
        own start); advantages detached, normalised."""
        fixed = advantages(omega).detach()
        if seen["args"].norm_adv:
            mean = (weights * fixed).sum()
            fixed = (fixed - mean) / (weights * (fixed - mean) ** 2).sum().sqrt()
        r = ratio(theta)
        surrogate = torch.min(r * fixed, r.clamp(1 - clip, 1 + clip) * fixed)
        return (2 * weights * surrogate * (advantages(omega).detach() + values(omega)[:, :-1].detach() - values(w)[:, :-1])).sum()

    return theta, omega, values, leader_objective, inner_surrogate


def flat_gradient(gradients, theta):
    return torch.cat([gradients[name].flatten() for name in theta])


@pytest.mark.parametrize("script", [blpo, laboratory, discrete])
def test_train_takes_the_gradient_of_j_in_omega_and_the_mixed_term_of_algorithm_1(script, tmp_path, monkeypatch):
    arguments = ["--ihvp", "exact", "--damping", "1.0", "--no-norm-adv", "--ent-coef", "0"]
    for seen in minibatches_of(script, tmp_path, monkeypatch, *arguments):
        theta, omega, values, leader_objective, inner_surrogate = recompute(seen)
        b = torch.func.grad(lambda w: leader_objective(theta, w))(omega)
        assert torch.allclose(seen["b"].double(), b, rtol=0, atol=1e-4 * b.norm())

        weights = seen["weights"].double()
        jacobian = torch.func.jacrev(lambda w: values(w)[:, :-1].flatten())(omega)
        curvature = 2 * jacobian.T @ (weights.flatten()[:, None] * jacobian)
        v = torch.linalg.solve(curvature + torch.eye(len(b), dtype=DOUBLE), b)
        assert (seen["v"].double() - v).norm() < 1e-3 * v.norm()

        mixed = torch.func.jvp(lambda w: torch.func.grad(lambda t: inner_surrogate(t, w))(theta), (omega,), (v,))[1]
        correction = -flat_gradient(mixed, theta)  # Algorithm 1: minus the mixed term
        assert (seen["gradients"][1].double() - correction).norm() < 2e-3 * correction.norm()
        direct = flat_gradient(torch.func.grad(lambda t: leader_objective(t, omega))(theta), theta)
        assert (seen["gradients"][0].double() - direct).norm() < 1e-3 * direct.norm()


def test_normalised_advantages_scale_both_parts_alike(tmp_path, monkeypatch):
    """J / sigma has one factor 1 / sigma in its direct part and one in the product of the correction."""
    for seen in minibatches_of(blpo, tmp_path, monkeypatch, "--ihvp", "exact", "--damping", "1.0"):
        theta, omega, values, _, inner_surrogate = recompute(seen)
        v = seen["v"].double()
        mixed = torch.func.jvp(lambda w: torch.func.grad(lambda t: inner_surrogate(t, w))(theta), (omega,), (v,))[1]
        correction = -flat_gradient(mixed, theta)
        assert (seen["gradients"][1].double() - correction).norm() < 2e-3 * correction.norm()


@pytest.mark.parametrize("solver", ["nystrom", "cg", "exact"])
def test_infinite_damping_is_the_nested_control(solver, tmp_path, monkeypatch):
    for seen in minibatches_of(blpo, tmp_path, monkeypatch, "--ihvp", solver, "--damping", "1e12"):
        direct, correction = seen["gradients"]
        assert 0 < correction.norm() < 1e-6 * direct.norm()


@pytest.mark.parametrize("script", [blpo, discrete])
def test_a_correction_forced_to_zero_gives_the_weights_of_the_nested_control(script, tmp_path, monkeypatch):
    """Bitwise: the sketch draws from a generator of its own."""
    words = ["--num-envs", "4", "--total-timesteps", "4096", "--save-model", "--run-dir", str(tmp_path)]
    nested = script.train(script.parse_args(script.Args, [*words, "--ihvp", "none"]))
    bilevel = script.train(script.parse_args(script.Args, words))
    monkeypatch.setattr(script, "nystrom_ihvp", lambda *system: tuple(0 * x for x in _nystrom(*system)))
    zero = script.train(script.parse_args(script.Args, words))
    weights = [torch.load(run / "model.pt", weights_only=True)["agent"] for run in (nested, zero, bilevel)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


_nystrom = blpo.nystrom_ihvp


def test_a_non_finite_response_falls_back_to_the_direct_gradient_and_is_counted(tmp_path, monkeypatch):
    words = ["--num-envs", "4", "--total-timesteps", "2048", "--save-model", "--run-dir", str(tmp_path)]
    nested = blpo.train(blpo.parse_args(blpo.Args, [*words, "--ihvp", "none"]))
    monkeypatch.setattr(blpo, "nystrom_ihvp", lambda *system: tuple(math.nan * x for x in _nystrom(*system)))
    broken = blpo.train(blpo.parse_args(blpo.Args, words))
    weights = [torch.load(run / "model.pt", weights_only=True)["agent"] for run in (nested, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    header, *rows = [line.split(",") for line in (broken / "metrics.csv").read_text().splitlines()]
    per_rollout = blpo.Args.update_epochs * blpo.Args.num_minibatches
    assert [float(row[header.index("bilevel/fallbacks")]) for row in rows] == [per_rollout] * len(rows)


def test_the_laboratory_at_its_defaults_follows_the_method(tmp_path):
    words = ["--num-envs", "4", "--total-timesteps", "2048", "--ihvp", "exact", "--save-model", "--run-dir", str(tmp_path)]
    runs = [script.train(script.parse_args(script.Args, words)) for script in (blpo, laboratory)]
    first, second = (torch.load(run / "model.pt", weights_only=True)["agent"] for run in runs)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


# ---- A tabular MDP whose trajectories can be enumerated ----------------------------------------------------------
# State 0 starts; every episode ends within 4 steps, by termination. In each chunk the rows after the end are no
# transitions. Summing over all trajectories with their probabilities makes every expectation exact.
GAMMA = 0.9
NEXT = {0: {0: [(1, 0.6), (2, 0.4)], 1: [(2, 0.9), (3, 0.1)]}, 1: {0: [(3, 1.0)], 1: [(2, 0.5), (3, 0.5)]},
        2: {0: [(3, 0.7), (None, 0.3)], 1: [(None, 1.0)]}, 3: {0: [(None, 1.0)], 1: [(None, 1.0)]}}  # fmt: skip
REWARD = {(0, 0): 1.0, (0, 1): -0.5, (1, 0): 0.3, (1, 1): 2.0, (2, 0): -1.0, (2, 1): 0.7, (3, 0): 1.5, (3, 1): -0.2}


def trajectories():
    """All ((state, action) ..., end) of the MDP from state 0."""

    def extend(prefix, state):
        if state is None:
            yield prefix
            return
        for action in (0, 1):
            for following, _ in NEXT[state][action]:
                yield from extend([*prefix, (state, action, following)], following)

    return list(extend([], 0))


def policy(theta):
    """Softmax policy (4, 2) with logits theta (8,)."""
    return torch.softmax(theta.view(4, 2), -1)


def state_values(pi):
    """V^pi by backward substitution: the states are numbered in the order they are visited."""
    values = {}
    for s in reversed(range(4)):
        value = 0.0
        for a in (0, 1):
            future = sum(p * values[f] for f, p in NEXT[s][a] if f is not None)
            value = value + pi[s, a] * (REWARD[s, a] + GAMMA * future)
        values[s] = value
    return torch.stack([values[s] for s in range(4)])


def target_values(pi, after, lambda_):
    """Mean lambda-return of pi that bootstraps from the values `after`, held fixed: V^pi at lambda 1."""
    values = {}
    for s in reversed(range(4)):
        value = 0.0
        for a in (0, 1):
            future = sum(p * ((1 - lambda_) * after[f] + lambda_ * values[f]) for f, p in NEXT[s][a] if f is not None)
            value = value + pi[s, a] * (REWARD[s, a] + GAMMA * future)
        values[s] = value
    return torch.stack([values[s] for s in range(4)])


def first_step_values(pi, after):
    """V of: act once by pi, then by another policy with the values `after`."""
    return target_values(pi, after, 0.0)


class Enumerated:
    """Every trajectory as one chunk, its weights the probability under the policy at theta_0 (held fixed)."""

    def __init__(self, theta_0):
        self.theta_0, paths, length = theta_0, trajectories(), 4
        shape = (len(paths), length)
        self.states, self.actions = (torch.zeros(len(paths), length + 1, dtype=torch.long) for _ in range(2))
        self.rewards, self.terminated, self.valid = (torch.zeros(shape, dtype=DOUBLE) for _ in range(3))
        probability, pi = torch.ones(len(paths), dtype=DOUBLE), policy(theta_0)
        for c, path in enumerate(paths):
            for t, (state, action, following) in enumerate(path):
                self.states[c, t], self.actions[c, t], self.valid[c, t] = state, action, 1
                self.rewards[c, t], self.terminated[c, t] = REWARD[state, action], following is None
                probability[c] *= pi[state, action] * dict(NEXT[state][action])[following]
        assert abs(probability.sum() - 1) < 1e-12
        self.weights = probability[:, None] * self.valid
        self.weights /= self.weights.sum()
        self.distribution = torch.zeros(4, dtype=DOUBLE).index_add_(0, self.states[:, :-1].flatten(), self.weights.flatten())
        self.discounts = GAMMA * (1 - self.terminated)

    def ratio(self, theta):
        pi, old = policy(theta), policy(self.theta_0).detach()
        pairs = self.states[:, :-1], self.actions[:, :-1]
        return pi[pairs] / old[pairs]


def critic_features(kind, values):
    """One-hot features, or two features of which one is V^pi itself, so that the linear critic can be exact."""
    return torch.eye(4, dtype=DOUBLE) if kind == "tabular" else torch.stack([values, torch.tensor([1.0, -2.0, 0.5, 3.0]).double()], 1)


def linear_critic(features, targets, distribution):
    """A bias-free-like linear critic at the minimum of sum_s d(s) (target - V)^2."""
    root = distribution.sqrt()[:, None]
    weight = torch.linalg.lstsq(root * features, root * targets[:, None]).solution
    critic = nn.Sequential(nn.Linear(features.shape[1], 1)).double()
    with torch.no_grad():
        critic[0].weight.copy_(weight.T)
        critic[0].bias.zero_()
    return critic


@pytest.mark.parametrize("kind", ["tabular", "linear"])
@pytest.mark.parametrize("mixed_term", ["timestep", "trajectory, kappa = gamma lambda", "trajectory, kappa = gamma"])
@pytest.mark.parametrize("leader", ["lambda-return", "gae"])
@pytest.mark.parametrize("leader_lambda", [0.0, 0.5, 0.95])
def test_hypergradient_is_the_total_derivative_with_the_inner_problem_solved_again(leader_lambda, leader, mixed_term, kind):
    """F(theta) = J(theta, omega*(theta)) by central differences, where omega*(theta) minimises
    sum_s d(s) (target_theta(s) - V)^2 + damping / 2 |omega - omega_0|^2: damping is a proximal term of the follower.
    What the target is decides how far the mixed term looks. V of the policy: kappa = gamma. The mean lambda-return, which
    bootstraps from values that stand still, as the script's targets do: kappa = gamma lambda. 'Act once by the new policy,
    then by the old one': each state is its own start."""
    damping, torch_generator = 0.05, torch.Generator().manual_seed(0)
    theta_0 = 0.7 * torch.randn(8, generator=torch_generator, dtype=DOUBLE)
    data, old_values = Enumerated(theta_0), state_values(policy(theta_0))
    features = critic_features(kind, old_values)
    critic = linear_critic(features, old_values, data.distribution)
    obs = features[data.states.flatten()]
    obs = torch.where((nn.functional.pad(data.valid, (0, 1)).flatten() == 1)[:, None], obs, 7.0)  # rows without meaning

    # the method's functions, as train composes them
    theta = theta_0.clone().requires_grad_()
    operator = blpo.gae_operator(data.terminated, data.valid, GAMMA, leader_lambda)
    jacobian = blpo.CriticJacobian(critic, obs)
    new_values = jacobian.values.view(len(data.weights), -1)
    advantages = blpo.lambda_returns(new_values, data.rewards, data.discounts, operator) - new_values[:, :-1]
    ratio = data.ratio(theta)
    surrogate = blpo.clipped_surrogate(ratio, advantages, 0.2)
    slopes = data.weights * blpo.surrogate_slope(ratio.detach(), advantages, 0.2)
    u = blpo.lambda_returns_vjp(slopes, data.discounts, operator)
    if leader == "gae":  # the authors' leader: A = G - V with V(s_t) moving as well
        u[:, :-1] -= slopes
    curvature = blpo.GaussNewton(jacobian, nn.functional.pad(data.weights, (0, 1)).flatten())
    _, v = blpo.exact_ihvp(curvature, u.flatten(), damping)
    z = jacobian.jvp(v[None]).view(len(data.weights), -1)[:, :-1]
    target_lambda = {"timestep": 0.0, "trajectory, kappa = gamma lambda": 0.8, "trajectory, kappa = gamma": 1.0}[mixed_term]
    if mixed_term != "timestep":
        z = (z[:, None, :] @ blpo.gae_operator(data.terminated, data.valid, GAMMA * target_lambda, 1.0))[:, 0, :]
    correction = (data.weights * 2 * z * surrogate).sum()
    hypergradient = torch.autograd.grad((data.weights * surrogate).sum() + correction, theta)[0]

    # the inner problem solved again; the bias is a parameter too
    design = torch.cat([features, torch.ones(4, 1, dtype=DOUBLE)], 1)
    omega_0 = torch.cat([critic[0].weight.flatten(), critic[0].bias]).detach()
    matrix = 2 * design.T @ (data.distribution[:, None] * design) + damping * torch.eye(len(omega_0), dtype=DOUBLE)

    def total(theta):
        pi = policy(theta)
        targets = target_values(pi, old_values, target_lambda)
        right = 2 * design.T @ (data.distribution * targets) + damping * omega_0
        omega = torch.linalg.solve(matrix, right)
        values = (design @ omega)[data.states]
        returns = blpo.lambda_returns(values, data.rewards, data.discounts, operator)
        baseline = values[:, :-1] if leader == "gae" else new_values[:, :-1]
        return (data.weights * data.ratio(theta) * (returns - baseline)).sum()

    steps = 1e-5 * torch.eye(8, dtype=DOUBLE)
    expected = torch.stack([(total(theta_0 + step) - total(theta_0 - step)) / 2e-5 for step in steps])
    assert expected.norm() > 1e-2
    assert (hypergradient - expected).norm() < 1e-8 * max(1.0, expected.norm())
    direct = torch.autograd.grad((data.weights * blpo.clipped_surrogate(data.ratio(theta), advantages, 0.2)).sum(), theta)[0]
    assert (direct - expected).norm() > 1e-2 * expected.norm()  # the correction is not decoration
    reversed_sign = 2 * direct - hypergradient
    assert (reversed_sign - expected).norm() > 1e-2 * expected.norm()


def test_one_step_leader_with_the_trajectory_term_is_the_policy_gradient_of_the_fixed_distribution():
    """r + gamma V(s') alone is short-sighted; with the trajectory mixed term at discount gamma the hypergradient is
    sum_s d(s) grad V^pi(s), d the sampling distribution held fixed."""
    theta_0 = 0.7 * torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    data = Enumerated(theta_0)
    critic = linear_critic(torch.eye(4, dtype=DOUBLE), state_values(policy(theta_0)), data.distribution)
    obs = torch.eye(4, dtype=DOUBLE)[data.states.flatten()]
    theta = theta_0.clone().requires_grad_()
    operator = blpo.gae_operator(data.terminated, data.valid, GAMMA, 0.0)
    jacobian = blpo.CriticJacobian(critic, obs)
    new_values = jacobian.values.view(len(data.weights), -1)
    advantages = blpo.lambda_returns(new_values, data.rewards, data.discounts, operator) - new_values[:, :-1]
    surrogate = blpo.clipped_surrogate(data.ratio(theta), advantages, 0.2)
    u = blpo.lambda_returns_vjp(data.weights, data.discounts, operator).flatten()
    curvature = blpo.GaussNewton(jacobian, nn.functional.pad(data.weights, (0, 1)).flatten())
    z = jacobian.jvp(blpo.exact_ihvp(curvature, u, 1e-9)[1][None]).view(len(data.weights), -1)[:, :-1]
    z = (z[:, None, :] @ blpo.gae_operator(data.terminated, data.valid, GAMMA, 1.0))[:, 0, :]
    hypergradient = torch.autograd.grad((data.weights * (1 + 2 * z) * surrogate).sum(), theta)[0]
    expected = torch.autograd.grad((data.distribution * state_values(policy(theta))).sum(), theta)[0]
    assert (hypergradient - expected).norm() < 1e-6 * expected.norm()
    direct = torch.autograd.grad((data.weights * blpo.clipped_surrogate(data.ratio(theta), advantages, 0.2)).sum(), theta)[0]
    assert (direct - expected).norm() > 0.1 * expected.norm()


def test_the_mean_lambda_return_goes_from_one_step_to_the_value():
    pi, other = policy(torch.randn(8).double()), state_values(policy(torch.randn(8).double()))
    assert torch.allclose(target_values(pi, other, 1.0), state_values(pi), rtol=0, atol=1e-14)
    assert not torch.allclose(target_values(pi, other, 0.5), state_values(pi), rtol=0, atol=1e-3)
    own = state_values(pi)  # bootstrapping from its own values changes nothing
    assert torch.allclose(target_values(pi, own, 0.3), own, rtol=0, atol=1e-14)


def test_enumeration_covers_every_trajectory_once():
    paths = trajectories()
    assert len({tuple(path) for path in paths}) == len(paths) == len(list(itertools.chain(paths)))
    assert max(map(len, paths)) == 4 and min(map(len, paths)) == 2


# ---- The study of directions and damping -----------------------------------------------------------------------
def test_the_study_prints_its_table_and_writes_only_when_asked(tmp_path, monkeypatch, capsys):
    """On one small system; the exact solve leaves nothing."""
    torch.manual_seed(0)
    jacobian = blpo.CriticJacobian(blpo.mlp(3, 64, 1, 1.0), torch.randn(12, 3))
    system = 5, blpo.GaussNewton(jacobian, torch.full((12,), 1 / 12)), torch.randn(12) / 12
    monkeypatch.setattr(ihvp_study, "captured_systems", lambda *_: [system])
    monkeypatch.chdir(tmp_path)
    ihvp_study.main(ihvp_study.Args(env_ids=("Hopper-v4",)))
    printed = capsys.readouterr().out
    assert "| damping | exact |" in printed and not list(tmp_path.iterdir())
    ihvp_study.main(ihvp_study.Args(env_ids=("Hopper-v4",), results_dir=tmp_path / "study"))
    assert {path.name for path in (tmp_path / "study").iterdir()} == {"residuals.csv", "summary.md", "study.json"}
    assert (tmp_path / "study" / "summary.md").read_text() == capsys.readouterr().out == printed
    exact = [line.split("|")[2] for line in printed.splitlines()[4:]]
    assert len(exact) == len(ihvp_study.DAMPINGS) and all(float(cell) < 1e-3 for cell in exact)
