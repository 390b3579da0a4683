"""blpo_atari.py: products with a convolutional critic's Jacobian, the solvers and the hypergradient against dense algebra, in
float64 on a tiny network, and one minibatch of `train` by hand."""

import functools
import inspect
import math

import pytest
import torch
import torch.nn as nn

import blpo_atari as blpo
import ppo_atari as ppo

DOUBLE = torch.float64
FOLLOWERS = ("head", "last-two", "full")
SHAPE = {"size": 44, "channels": (3, 4, 5), "width": 6}  # of the tiny network: images (n, 4, 44, 44)


@pytest.fixture(autouse=True)
def one_thread():
    """Every number of threads rounds in its own way."""
    torch.set_num_threads(1)


def tiny_agent(**changes):
    """A tiny agent in float64 whose biases are not zero, so that no term vanishes."""
    torch.manual_seed(0)
    agent = blpo.Agent(3, separate_trunks=True, **SHAPE | changes).double()
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return agent


def images(n, seed=1):
    return torch.rand(n, 4, 44, 44, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def flat_call(network, w, x):
    """The network with the flat parameters w, differentiable in w."""
    parameters, start = {}, 0
    for name, parameter in network.named_parameters():
        parameters[name], start = w[start : start + parameter.numel()].view(parameter.shape), start + parameter.numel()
    return torch.func.functional_call(network, parameters, (x,))


def omega_of(network):
    return flat(parameter.detach() for parameter in network.parameters())


def follower_at(name, n=7):
    """(follower, its inputs, J by torch.func) of a tiny critic."""
    agent = tiny_agent()
    below, follower = blpo.split_critic(agent, name)
    inputs = agent.encode(below, images(n)).detach()
    jacobian = torch.func.jacrev(lambda w: flat_call(follower, w, inputs).squeeze(-1))(omega_of(follower))
    return follower, inputs, jacobian


# ---- Networks --------------------------------------------------------------------------------------------------
def test_the_network_is_that_of_mnih_et_al():
    agent = ppo.Agent(4, separate_trunks=True)
    critic = sum(parameter.numel() for parameter in agent.critic_parameters())
    assert critic == 8_224 + 32_832 + 36_928 + 1_606_144 + 513
    assert sum(p.numel() for p in ppo.Agent(4, separate_trunks=False).parameters()) == critic + 4 * 513
    obs = torch.randint(0, 256, (2, 84, 84, 4), dtype=torch.uint8)
    assert torch.allclose(ppo.pixels(obs), obs.permute(0, 3, 1, 2) / 255)
    assert agent.actor_trunk(ppo.pixels(obs)).shape == (2, 512)
    for layer in agent.modules():  # orthogonal: its rows, or its columns if these are fewer
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            matrix = layer.weight.detach().flatten(1).double()
            gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
            gain = {agent.actor_head: 0.01, agent.critic_head: 1.0}.get(layer, math.sqrt(2))
            assert torch.allclose(gram, gain**2 * torch.eye(len(gram), dtype=DOUBLE), atol=1e-5)
            assert (layer.bias == 0).all()


@pytest.mark.parametrize("name", FOLLOWERS)
def test_follower_and_what_is_below_it_make_the_critic(name):
    agent = tiny_agent()
    below, follower = blpo.split_critic(agent, name)
    whole = agent.critic_head(agent.critic_trunk(images(3)))
    assert torch.equal(follower(below(images(3))), whole)
    parts = [*below.parameters(), *follower.parameters()]
    assert {id(p) for p in parts} == {id(p) for p in agent.critic_parameters()} and len(parts) == 10
    layers = [layer for layer in follower if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert len(layers) == {"head": 1, "last-two": 2, "full": 5}[name]


# ---- Products and solvers --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FOLLOWERS)
def test_products_with_the_jacobian_are_those_of_torch_func(name):
    follower, inputs, dense = follower_at(name)
    jacobian = blpo.CriticJacobian(follower, inputs)
    v, u = torch.randn(3, dense.shape[1], dtype=DOUBLE), torch.randn(3, 7, dtype=DOUBLE)
    assert dense.abs().max() > 0.1
    assert torch.allclose(jacobian.values, follower(inputs).squeeze(-1), rtol=0, atol=1e-12)
    assert torch.allclose(jacobian.jvp(v), v @ dense.T, rtol=0, atol=1e-11)
    assert torch.allclose(jacobian.vjp(u), u @ dense, rtol=0, atol=1e-11)
    assert torch.allclose(jacobian.kernel(), dense @ dense.T, rtol=0, atol=1e-11)


def test_products_keep_no_graph():
    follower, inputs, _ = follower_at("full")
    jacobian = blpo.CriticJacobian(follower, inputs.requires_grad_())
    products = [jacobian.values, jacobian.jvp(torch.randn(1, jacobian.vjp(torch.randn(1, 7).double()).shape[1]).double())]
    assert not any(x.requires_grad for x in [*products, jacobian.kernel()]) and inputs.grad is None
    assert all(parameter.grad is None for parameter in follower.parameters())


def test_curvature_of_the_head_is_the_hessian_of_its_loss():
    """V is linear in the head: Gauss-Newton leaves nothing out, whatever the residual."""
    follower, inputs, _ = follower_at("head")
    weights, targets = torch.rand(7, dtype=DOUBLE), torch.randn(7, dtype=DOUBLE)

    def loss(w):
        return (weights * (targets - flat_call(follower, w, inputs).squeeze(-1)) ** 2).sum()

    hessian = torch.func.hessian(loss)(omega_of(follower))
    curvature = blpo.GaussNewton(blpo.CriticJacobian(follower, inputs), weights)
    columns = torch.stack([curvature.product(row, 0.0) for row in torch.eye(len(hessian), dtype=DOUBLE)])
    assert torch.allclose(columns, hessian, rtol=0, atol=1e-12)


@pytest.mark.parametrize("damping", [1.0, 1e-3])
@pytest.mark.parametrize("name", FOLLOWERS)
def test_solvers_equal_the_dense_solve(name, damping):
    follower, inputs, dense = follower_at(name)
    weights, u = torch.rand(7, dtype=DOUBLE), torch.randn(7, dtype=DOUBLE)
    weights[2] = 0.0  # a row that is no transition
    curvature = blpo.GaussNewton(blpo.CriticJacobian(follower, inputs), weights)
    matrix = 2 * dense.T @ (weights[:, None] * dense) + damping * torch.eye(dense.shape[1], dtype=DOUBLE)
    expected = torch.linalg.solve(matrix, dense.T @ u)
    solved = {"exact": blpo.exact_ihvp(curvature, u, damping)}
    if damping == 1.0:  # elsewhere more iterations than rows are of no use in finite precision
        solved["cg"] = blpo.cg_ihvp(curvature, u, damping, 60)
    if name == "head":  # all its directions: the approximation is exact
        solved["nystrom"] = blpo.nystrom_ihvp(curvature, u, damping, 7, torch.Generator().manual_seed(0))
    for solver, (b, v) in solved.items():
        assert torch.allclose(b, dense.T @ u, rtol=0, atol=1e-10), solver
        assert (v - expected).norm() < 1e-6 * expected.norm(), solver


def test_nystrom_columns_of_the_full_critic_are_those_of_the_dense_curvature(monkeypatch):
    follower, inputs, dense = follower_at("full")
    weights, u, rank = torch.rand(7, dtype=DOUBLE), torch.randn(7, dtype=DOUBLE), 3
    curvature = blpo.GaussNewton(blpo.CriticJacobian(follower, inputs), weights)
    directions = blpo.feature_directions(curvature, rank, torch.Generator().manual_seed(5))
    in_all = torch.zeros(dense.shape[1], rank, dtype=DOUBLE)
    in_all[-7:] = directions  # the head's 6 weights and its bias come last
    hessian = 2 * dense.T @ (weights[:, None] * dense)
    seen, original = [], blpo.nystrom_solver
    monkeypatch.setattr(blpo, "nystrom_solver", lambda *system: seen.extend(system) or original(*system))
    _, v = blpo.nystrom_ihvp(curvature, u, 0.5, rank, torch.Generator().manual_seed(5))
    assert torch.allclose(seen[0], (hessian @ in_all).T, rtol=0, atol=1e-11)
    assert torch.allclose(seen[1], in_all.T @ hessian @ in_all, rtol=0, atol=1e-11)
    columns, core = hessian @ in_all, in_all.T @ hessian @ in_all
    approximation = columns @ torch.linalg.solve(core, columns.T) + 0.5 * torch.eye(dense.shape[1], dtype=DOUBLE)
    expected = torch.linalg.solve(approximation, dense.T @ u)
    assert (v - expected).norm() < 1e-8 * expected.norm()


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


# ---- The total derivative --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FOLLOWERS)
def test_hypergradient_is_the_total_derivative_with_the_follower_solved_again(name):
    """F(theta) = J(theta, omega*(theta)) by central differences on the MDP of test_hypergradient.py, its states shown as
    images: omega*(theta) minimises sum_s d(s) (target_theta(s) - V)^2 + damping / 2 |omega - omega_0|^2 over the
    follower's layers, the layers below it fixed. The critic is exact at theta_0, so Gauss-Newton is the Hessian."""
    damping, theta_0 = 0.05, 0.7 * torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    data, old_values, agent = Enumerated(theta_0), state_values(policy(theta_0)), tiny_agent(width=16)
    below, follower = blpo.split_critic(agent, name)
    with torch.no_grad():  # more features than states: the head can be exact
        states = agent.encode(below, images(4))
        last = agent.critic_trunk(images(4))
        agent.critic_head.bias.zero_()
        agent.critic_head.weight.copy_(torch.linalg.pinv(last) @ old_values)
    assert torch.allclose(follower(states).squeeze(-1), old_values, atol=1e-9)

    theta = theta_0.clone().requires_grad_()
    operator = blpo.gae_operator(data.terminated, data.valid, GAMMA, 0.95)
    inputs = states[data.states.flatten()]
    jacobian = blpo.CriticJacobian(follower, inputs)
    new_values = jacobian.values.view(len(data.weights), -1)
    advantages = blpo.lambda_returns(new_values, data.rewards, data.discounts, operator) - new_values[:, :-1]
    ratio = data.ratio(theta)
    surrogate = blpo.clipped_surrogate(ratio, advantages, 0.2)
    slopes = data.weights * blpo.surrogate_slope(ratio.detach(), advantages, 0.2)
    u = blpo.lambda_returns_vjp(slopes, data.discounts, operator).flatten()
    curvature = blpo.GaussNewton(jacobian, nn.functional.pad(data.weights, (0, 1)).flatten())
    _, v = blpo.exact_ihvp(curvature, u, damping)
    z = jacobian.jvp(v[None]).view(len(data.weights), -1)[:, :-1]
    hypergradient = torch.autograd.grad((data.weights * (1 + 2 * z) * surrogate).sum(), theta)[0]
    direct = torch.autograd.grad((data.weights * blpo.clipped_surrogate(data.ratio(theta), advantages, 0.2)).sum(), theta)[0]

    omega_0, root = omega_of(follower), torch.sqrt(2 * data.distribution)

    def follower_values(omega):
        return flat_call(follower, omega, states).squeeze(-1)

    def answer(targets):
        """The follower's minimum, by damped Gauss-Newton steps."""
        omega = omega_0
        for _ in range(4):
            rows = root[:, None] * torch.func.jacrev(follower_values)(omega)
            gradient = rows.T @ (root * (follower_values(omega) - targets)) + damping * (omega - omega_0)
            inner = torch.linalg.solve(damping * torch.eye(4, dtype=DOUBLE) + rows @ rows.T, rows @ gradient)
            omega = omega - (gradient - rows.T @ inner) / damping
        return omega

    def total(theta):
        pi = policy(theta)
        values = follower_values(answer(first_step_values(pi, old_values)))[data.states]
        returns = blpo.lambda_returns(values, data.rewards, data.discounts, operator)
        return (data.weights * data.ratio(theta) * (returns - new_values[:, :-1])).sum()

    steps = 1e-5 * torch.eye(8, dtype=DOUBLE)
    expected = torch.stack([(total(theta_0 + step) - total(theta_0 - step)) / 2e-5 for step in steps])
    assert (hypergradient - expected).norm() < 1e-7 * expected.norm()
    assert (direct - expected).norm() > 1e-2 * expected.norm()  # the correction is not decoration
    assert (2 * direct - hypergradient - expected).norm() > 1e-2 * expected.norm()  # nor is its sign


# ---- One minibatch of train ------------------------------------------------------------------------------------
def one_minibatch(tmp_path, monkeypatch, *arguments):
    """The local variables of `train` when it takes its diagnostics, in a run of one minibatch of a real game, on a
    network with few channels, and the agent's weights before and after."""
    small = functools.partial(blpo.nature_cnn, channels=(3, 4, 5), width=6)
    monkeypatch.setattr(blpo, "nature_cnn", small)
    seen, original = {}, blpo.leader_diagnostics

    def spy(theta, direct, correction, weights, z):
        names = inspect.currentframe().f_back.f_locals
        seen.update({k: x.detach().clone() if isinstance(x, torch.Tensor) else x for k, x in names.items() if k != "run"})
        seen["gradients"] = [flat(torch.autograd.grad(x, theta, retain_graph=True)) for x in (direct, correction)]
        return original(theta, direct, correction, weights, z)

    monkeypatch.setattr(blpo, "leader_diagnostics", spy)
    words = ["--num-envs", "2", "--num-steps", "32", "--chunk-length", "16", "--total-timesteps", "64", "--update-epochs", "1"]
    words += ["--num-minibatches", "1", "--env-threads", "1", "--torch-threads", "1", "--run-dir", str(tmp_path)]
    words += ["--no-anneal-lr", "--checkpoint-every", "1", "--seed", "3", "--device", "cpu", "--nystrom-rank", "3", *arguments]
    folder = blpo.train(blpo.parse_args(blpo.Args, words))
    torch.manual_seed(3)
    seen["before"] = blpo.Agent(4, separate_trunks=True)
    seen["after"] = blpo.Agent(4, separate_trunks=True)
    seen["after"].load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    return seen


@pytest.mark.parametrize("solver", ["exact", "none"])
@pytest.mark.parametrize("name", FOLLOWERS)
def test_one_minibatch_of_train_by_hand(name, solver, tmp_path, monkeypatch):
    """K Adam steps of the follower, one of the actor along the hypergradient of Algorithm 1 from dense matrices and second
    derivatives by torch.func, one of the layers below the follower on the critic's loss."""
    seen = one_minibatch(tmp_path, monkeypatch, "--follower", name, "--ihvp", solver)
    agent, args = seen["before"].double(), seen["args"]
    weights, rewards, discounts, operator, targets, old_logprobs = (
        seen[f"{key}"].double() for key in ("weights", "mb_rewards", "mb_discounts", "mb_operator", "mb_returns", "mb_logprobs")
    )
    rows = seen["mb_obs"].flatten(0, 1).permute(0, 3, 1, 2).double() / 255
    below, follower = blpo.split_critic(agent, name)

    def per_chunk(values):
        return values.view(len(weights), -1)[:, :-1]

    def critic_loss():
        return (weights * (per_chunk(follower(below(rows))) - targets) ** 2).sum()

    adam = torch.optim.Adam(follower.parameters(), lr=args.critic_learning_rate, eps=1e-5)
    for _ in range(3):
        errors = (per_chunk(follower(below(rows))) - targets).detach().flatten()
        adam.zero_grad()
        critic_loss().backward()
        adam.step()
    assert torch.allclose(seen["errors"].double(), errors, rtol=0, atol=1e-5 * errors.abs().max())
    assert torch.allclose(seen["new_values"].double(), follower(below(rows)).view(len(weights), -1), rtol=0, atol=1e-5)
    inputs, omega = below(rows).detach(), omega_of(follower)

    def values(w):
        return flat_call(follower, w, inputs).view(len(weights), -1)

    def advantages(w):
        v, base = values(w), values(omega)[:, :-1].detach()
        return v[:, :-1] + (operator @ (rewards + discounts * v[:, 1:] - v[:, :-1])[:, :, None])[:, :, 0] - base

    actor = nn.Sequential(*agent.actor_trunk, agent.actor_head)
    theta = {key: parameter.detach() for key, parameter in actor.named_parameters()}
    states = rows.view(len(weights), -1, *rows.shape[1:])[:, :-1].flatten(0, 1)

    def policy_of(theta):
        return torch.func.functional_call(actor, theta, (states,)).log_softmax(-1)

    def ratio(theta):
        chosen = policy_of(theta).gather(-1, seen["mb_actions"].view(-1, 1)).view_as(old_logprobs)
        return torch.exp(chosen - old_logprobs)

    def clipped(theta, a):
        return torch.min(ratio(theta) * a, ratio(theta).clamp(0.9, 1.1) * a)

    fixed = advantages(omega).detach()
    mean = (weights * fixed).sum()
    sigma = (weights * (fixed - mean) ** 2).sum().sqrt()
    normalised = (fixed - mean) / sigma

    def inner_surrogate(theta, w):
        """Its theta-gradient stands for that of L (Prop. 1, each state its own start)."""
        residual = fixed + values(omega)[:, :-1].detach() - values(w)[:, :-1]
        return (2 * weights * clipped(theta, normalised) * residual).sum()

    direct = flat(torch.func.grad(lambda t: (weights * clipped(t, normalised)).sum())(theta).values())
    correction = torch.zeros_like(direct)
    if solver == "exact":
        b = torch.func.grad(lambda w: (weights * clipped(theta, advantages(w))).sum())(omega)
        jacobian = torch.func.jacrev(lambda w: values(w)[:, :-1].flatten())(omega)
        v = torch.linalg.solve(
            2 * jacobian.T @ (weights.flatten()[:, None] * jacobian) + torch.eye(len(b), dtype=DOUBLE), b
        )
        mixed = torch.func.jvp(lambda w: torch.func.grad(lambda t: inner_surrogate(t, w))(theta), (omega,), (v,))[1]
        correction = -flat(mixed.values())
        assert (seen["v"].double() - v).norm() < 1e-3 * v.norm()
        assert (seen["gradients"][1].double() - correction).norm() < 2e-3 * correction.norm()
        assert correction.norm() > 0.01 * direct.norm()
    else:
        assert (seen["gradients"][1] == 0).all()
    assert (seen["gradients"][0].double() - direct).norm() < 1e-3 * direct.norm()

    logprobs = policy_of(theta)
    assert torch.allclose(seen["entropy"].double(), -(weights.flatten() * (logprobs.exp() * logprobs).sum(-1)).sum(), atol=1e-5)
    bonus = torch.func.grad(
        lambda t: -args.ent_coef * (weights.flatten() * (policy_of(t).exp() * policy_of(t)).sum(-1)).sum()
    )(theta)
    gradient, start = -(direct + correction) - flat(bonus.values()), 0
    actor_adam = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, eps=1e-5)
    for parameter in actor.parameters():
        parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()
    actor_adam.step()
    if name != "full":
        adam = torch.optim.Adam(below.parameters(), lr=args.trunk_learning_rate, eps=1e-5)
        for parameter, each in zip(below.parameters(), torch.autograd.grad(critic_loss(), list(below.parameters()))):
            parameter.grad = each
        adam.step()
    torch.manual_seed(3)
    initial = dict(blpo.Agent(4, separate_trunks=True).named_parameters())
    for (key, expected), found in zip(agent.named_parameters(), seen["after"].parameters()):
        moved, error = expected - initial[key], found - expected
        assert moved.norm() > 0, key  # a first step of Adam is a step size along the gradient's sign, of tiny ones less
        assert error.norm() < 2e-3 * moved.norm(), (key, float(error.norm() / moved.norm()))
