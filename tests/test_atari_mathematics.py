"""blpo_atari.py: products with a convolutional critic's Jacobian, the solvers and the hypergradient against dense algebra, in
float64 on a tiny network, and one minibatch of `train` by hand."""

import functools
import inspect
import math
from types import SimpleNamespace

import pytest
import test_hypergradient as enumeration
import torch
import torch.nn as nn

import blpo_atari as blpo
import ppo_atari as ppo

DOUBLE = torch.float64
FOLLOWERS = ("head", "last-two", "full")


@pytest.fixture(autouse=True)
def few_channels(monkeypatch):
    """A network with few channels, and one thread: every number of threads rounds in its own way."""
    torch.set_num_threads(1)
    for module in (blpo, ppo):
        monkeypatch.setattr(module, "nature_cnn", functools.partial(module.nature_cnn, channels=(3, 4, 5), width=6))


def tiny_agent():
    """A tiny agent in float64 whose biases are not zero, so that no term vanishes."""
    torch.manual_seed(0)
    agent = blpo.Agent(3, separate_trunks=True).double()
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return agent


def images(n, seed=1):
    return torch.rand(n, 4, 84, 84, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


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
    below, follower = blpo.split_critic(tiny_agent(), name)
    inputs = below(images(n)).detach()
    jacobian = torch.func.jacrev(lambda w: flat_call(follower, w, inputs).squeeze(-1))(omega_of(follower))
    return follower, inputs, jacobian


# ---- Networks --------------------------------------------------------------------------------------------------
def test_the_network_is_that_of_mnih_et_al(monkeypatch):
    monkeypatch.undo()  # the real network
    agent = ppo.Agent(4, separate_trunks=True)
    critic = sum(parameter.numel() for parameter in agent.critic_parameters())
    assert critic == 8_224 + 32_832 + 36_928 + 1_606_144 + 513
    assert sum(p.numel() for p in ppo.Agent(4, separate_trunks=False).parameters()) == critic + 4 * 513
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    assert torch.allclose(ppo.pixels(obs), obs / 255)
    assert ppo.pixels(obs).is_contiguous(memory_format=torch.channels_last)
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
    v, u = torch.randn(dense.shape[1], dtype=DOUBLE), torch.randn(3, 7, dtype=DOUBLE)
    assert dense.abs().max() > 0.1
    assert torch.allclose(jacobian.values, follower(inputs).squeeze(-1), rtol=0, atol=1e-12)
    assert torch.allclose(jacobian.jvp(v), dense @ v, rtol=0, atol=1e-11)
    assert torch.allclose(jacobian.vjp(u), u @ dense, rtol=0, atol=1e-11)
    assert torch.allclose(jacobian.kernel(), dense @ dense.T, rtol=0, atol=1e-11)


def test_products_keep_no_graph():
    follower, inputs, dense = follower_at("full")
    jacobian = blpo.CriticJacobian(follower, inputs)
    products = jacobian.values, jacobian.jvp(dense[0]), jacobian.vjp(dense[:, :7].T), jacobian.kernel()
    assert not any(x.requires_grad for x in products)
    assert all(parameter.grad is None for parameter in follower.parameters())


def test_curvature_of_the_head_is_the_hessian_of_its_loss():
    """V is linear in the head: Gauss-Newton leaves nothing out, whatever the residual."""
    follower, inputs, _ = follower_at("head")
    weights, targets = torch.rand(7, dtype=DOUBLE), torch.randn(7, dtype=DOUBLE)

    def loss(w):
        return (weights * (targets - flat_call(follower, w, inputs).squeeze(-1)) ** 2).sum()

    hessian = torch.func.hessian(loss)(omega_of(follower))
    curvature = blpo.GaussNewton(blpo.CriticJacobian(follower, inputs), weights)
    whole = blpo.Hessian(curvature.jacobian, weights, follower, inputs, targets)
    for each in (curvature, whole):
        columns = torch.stack([each.product(row) for row in torch.eye(len(hessian), dtype=DOUBLE)])
        assert torch.allclose(columns, hessian, rtol=0, atol=1e-12)


def test_the_hessian_of_the_full_critic_is_that_of_plain_autograd():
    follower, inputs, _ = follower_at("full", n=3)
    weights, targets, omega = torch.rand(3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE), omega_of(follower)
    hessian = blpo.Hessian(blpo.CriticJacobian(follower, inputs), weights, follower, inputs, targets)
    loss = (weights * (targets - follower(inputs).squeeze(-1)) ** 2).sum()
    gradient = torch.autograd.grad(loss, [*follower.parameters()], create_graph=True)
    v = torch.randn(len(omega), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    expected = flat(torch.autograd.grad(flat(gradient) @ v, [*follower.parameters()]))
    assert (hessian.product(v) - expected).norm() < 1e-10 * expected.norm()


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
    weights, u = torch.rand(7, dtype=DOUBLE), torch.randn(7, dtype=DOUBLE)
    curvature = blpo.GaussNewton(blpo.CriticJacobian(follower, inputs), weights)
    hessian, seen = 2 * dense.T @ (weights[:, None] * dense), []
    solve, sketch = blpo.nystrom_solve, blpo.GaussNewton.sketch
    monkeypatch.setattr(blpo, "nystrom_solve", lambda *system: seen.extend(system) or solve(*system))
    monkeypatch.setattr(blpo.GaussNewton, "sketch", lambda *system: seen.append(system[2]) or sketch(*system))
    _, v = blpo.nystrom_ihvp(curvature, u, 0.5, 3, torch.Generator().manual_seed(5))
    directions, columns, core, *_ = seen
    in_all = nn.functional.pad(directions, (0, 0, dense.shape[1] - 7, 0))  # the head's 6 weights and its bias come last
    assert torch.allclose(columns, (hessian @ in_all).T, rtol=0, atol=1e-11)
    assert torch.allclose(core, in_all.T @ hessian @ in_all, rtol=0, atol=1e-11)
    approximation = columns.T @ torch.linalg.solve(core, columns) + 0.5 * torch.eye(dense.shape[1], dtype=DOUBLE)
    expected = torch.linalg.solve(approximation, dense.T @ u)
    assert (v - expected).norm() < 1e-8 * expected.norm()


# ---- The total derivative --------------------------------------------------------------------------------------
class ConvolutionalFollower(enumeration.Follower):
    """omega*(theta) of the task that tests/test_hypergradient.py enumerates, its three states shown as images of 7 x 7: the
    last layers of a tiny convolutional critic, the layers below fixed. At omega_0 the critic answers the targets in the mean
    of each state, so that Gauss-Newton is the Hessian."""

    def __init__(self, name, target_lambda, damping=0.05):
        self.shares, self.chunk = enumeration.visits(enumeration.softmax_policy(enumeration.THETA)), enumeration.LENGTH
        self.target_lambda, self.damping = target_lambda, damping
        torch.manual_seed(2)
        trunk = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 5), nn.ReLU()).double()
        agent = SimpleNamespace(critic_trunk=trunk, critic_head=nn.Linear(5, 1).double())
        states = 3 * torch.rand(3, 1, 7, 7, dtype=DOUBLE)
        below, self.critic = blpo.split_critic(agent, name)
        self.features = below(states).detach()
        pi = enumeration.softmax_policy(enumeration.THETA)
        mass, means = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
        for key, share in self.shares.items():
            target = enumeration.expected_return(pi, pi, enumeration.OLD_VALUES, target_lambda, *key)
            mass[key[0]], means[key[0]] = mass[key[0]] + share, means[key[0]] + share * target
        with torch.no_grad():
            last = trunk(states)
            assert torch.linalg.svdvals(last)[-1] > 1e-2  # more features than states: the head can be exact
            agent.critic_head.bias.zero_()
            agent.critic_head.weight.copy_(torch.linalg.pinv(last) @ (means / mass))
        self.omega = omega_of(self.critic)

    def minimum(self, theta, start, damping):
        """By Newton's method, near the minimum from the start."""
        pi, omega = enumeration.softmax_policy(theta), start
        targets = [
            enumeration.expected_return(pi, pi, enumeration.OLD_VALUES, self.target_lambda, *key) for key in self.shares
        ]
        problem = torch.tensor(targets, dtype=DOUBLE), damping, start
        for _ in range(4):
            gradient, hessian = (f(self.loss)(omega, *problem) for f in (torch.func.grad, torch.func.hessian))
            omega = omega - torch.linalg.solve(hessian, gradient)
        assert torch.func.grad(self.loss)(omega, *problem).norm() < 1e-12
        return omega

    def loss(self, omega, targets, damping, anchor):
        values = flat_call(self.critic, omega, self.features)[:, 0]
        shares, states = torch.tensor([*self.shares.values()]), [state for state, *_ in self.shares]
        return (shares * (targets - values[states]) ** 2).sum() + damping / 2 * (omega - anchor).square().sum()


@pytest.mark.parametrize("name", FOLLOWERS)
def test_hypergradient_is_the_total_derivative_with_the_follower_solved_again(name, monkeypatch):
    """d J(theta, omega*(theta)) / d theta by central differences, with the functions of this script in the place of those of
    blpo_continuous.py. Other readings of the mixed term miss the correction by far."""
    monkeypatch.setattr(enumeration, "blpo", blpo)
    follower, kappa = ConvolutionalFollower(name, target_lambda=0.7), enumeration.GAMMA * 0.7
    expected = follower.total_derivative(0.8)
    hypergradient, direct = follower.judged(kappa, 0.8)
    correction = (expected - direct).norm()
    assert (hypergradient - expected).norm() < 1e-7 * expected.norm() and correction > 0.05 * direct.norm()
    for how in ({"kappa": 0.0}, {"kappa": kappa, "mixed_advantages": enumeration.REFRESHED}):
        wrong, _ = follower.judged(lambda_=0.8, **how)
        assert (wrong - expected).norm() > 0.1 * correction, how
    assert (2 * direct - hypergradient - expected).norm() > 0.1 * correction  # the other sign


# ---- One minibatch of train ------------------------------------------------------------------------------------
def one_minibatch(tmp_path, monkeypatch, *arguments):
    """The local variables of `train` when it takes its diagnostics, in a run of one minibatch of a real game, and the agent
    before and after it."""
    seen, original = {}, blpo.leader_diagnostics

    def spy(theta, direct, correction, weights, e):
        names = inspect.currentframe().f_back.f_locals
        seen.update({k: x.detach().clone() if isinstance(x, torch.Tensor) else x for k, x in names.items() if k != "run"})
        seen["gradients"] = [flat(torch.autograd.grad(x, theta, retain_graph=True)) for x in (direct, correction)]
        return original(theta, direct, correction, weights, e)

    monkeypatch.setattr(blpo, "leader_diagnostics", spy)
    words = ["--num-envs", "2", "--num-steps", "32", "--chunk-length", "16", "--total-timesteps", "64", "--update-epochs", "1"]
    words += ["--num-minibatches", "1", "--env-threads", "1", "--torch-threads", "1", "--run-dir", str(tmp_path)]
    words += ["--no-anneal-lr", "--checkpoint-every", "1", "--seed", "3", "--device", "cpu", "--nystrom-rank", "3", *arguments]
    folder = blpo.train(blpo.parse_args(words))
    torch.manual_seed(3)
    seen["before"] = blpo.Agent(4, separate_trunks=True)
    seen["after"] = blpo.load_policy(folder / "checkpoint.pt")
    return SimpleNamespace(**seen)


HESSIAN = "--ihvp cg --cg-iterations 25 --curvature hessian --damping 5 --mixed-discount 0.5"
CASES = [("head", "--ihvp exact"), ("last-two", "--ihvp exact --no-norm-adv")]
MORE_CASES = [(name, "--ihvp none") for name in FOLLOWERS] + [("full", "--ihvp exact"), ("full", HESSIAN)]


@pytest.mark.parametrize("name, words", [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE_CASES)])
def test_one_minibatch_of_train_by_hand(name, words, tmp_path, monkeypatch):
    """K Adam steps of the follower, one of the actor along the hypergradient of Algorithm 1 from dense matrices and second
    derivatives by torch.func, one of the layers below the follower on the critic's loss."""
    seen = one_minibatch(tmp_path, monkeypatch, "--follower", name, *words.split())
    agent, args, rows = seen.before.double(), seen.args, seen.chunks[seen.part]
    kappa = args.gamma * args.gae_lambda if args.mixed_discount is None else args.mixed_discount

    def of_chunks(x):
        """A tensor of the rollout at the minibatch's steps (C, L)."""
        return torch.as_tensor(x).flatten(0, 1)[rows[:, :-1]].double()

    valid, terminated, old_logprobs = of_chunks(seen.valid), of_chunks(seen.terminated), of_chunks(seen.logprobs)
    rewards, targets, old_values = of_chunks(seen.rewards), of_chunks(seen.returns), of_chunks(seen.values[:-1])
    ended = torch.max(terminated, of_chunks(seen.truncated))
    weights, fixed, steps = valid / valid.sum(), targets - old_values, range(valid.shape[1])  # A' = G' - V'
    assert ended.any() and not valid.all()
    images = seen.obs.flatten(0, 1)[rows].flatten(0, 1).double() / 255
    below, follower = blpo.split_critic(agent, name)

    def mean(x):
        return (weights * x).sum()

    def per_chunk(values):
        return values.view(len(weights), -1)[:, :-1]

    def critic_loss():
        return mean((per_chunk(follower(below(images))) - targets) ** 2)

    adam = torch.optim.Adam(follower.parameters(), lr=args.critic_learning_rate, eps=1e-5)
    for _ in range(3):
        last_loss = critic_loss()
        adam.zero_grad()
        last_loss.backward()
        adam.step()
    assert float(seen.critic_loss) == pytest.approx(last_loss.item(), rel=1e-4)
    inputs, omega = below(images).detach(), omega_of(follower)

    def values(w):
        return flat_call(follower, w, inputs).view(len(weights), -1)

    assert torch.allclose(seen.new_values.double(), values(omega), rtol=0, atol=1e-5)

    def advantages(w):
        """G(w) - V(s) with the V(s) of now, the lambda-return G by its recursion."""
        v, returns, after = values(w), [], None
        for t in reversed(steps):
            following = v[:, t + 1]
            if after is not None:
                mixture = (1 - args.gae_lambda) * following + args.gae_lambda * after
                following = torch.where(ended[:, t] == 1, following, mixture)
            after = rewards[:, t] + args.gamma * (1 - terminated[:, t]) * following
            returns.insert(0, after)
        return torch.stack(returns, 1) - values(omega)[:, :-1].detach()

    actor = nn.Sequential(*agent.actor_trunk, agent.actor_head)
    theta = {key: parameter.detach() for key, parameter in actor.named_parameters()}
    states = images.view(len(weights), -1, *images.shape[1:])[:, :-1].flatten(0, 1)
    chosen = of_chunks(seen.actions).long().view(-1, 1)

    def logprobs_of(theta):
        return torch.func.functional_call(actor, theta, (states,)).log_softmax(-1)

    def surrogate(theta, a):
        ratio = torch.exp(logprobs_of(theta).gather(-1, chosen).view_as(weights) - old_logprobs)
        return torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a)

    refreshed, centre, centre_fixed, sigma = advantages(omega).detach(), 0.0, 0.0, 1.0
    if args.norm_adv:
        centre, centre_fixed = mean(refreshed), mean(fixed)
        sigma = mean((refreshed - centre) ** 2).sqrt() + 1e-8

    def inner_loss(theta, w):
        """L; an action earns all targets of the rows before it, grad_theta G'_t = sum_{k >= t} kappa^(k-t) grad S(r_k, A'_k)."""
        gains, earned, after = surrogate(theta, (fixed - centre_fixed) / sigma), [], 0.0
        for t in reversed(steps):
            after = valid[:, t] * (gains[:, t] + kappa * (1 - ended[:, t]) * after)
            earned.insert(0, after)
        earned = torch.stack(earned, 1)
        return mean((targets + earned - earned.detach() - values(w)[:, :-1]) ** 2)

    direct = flat(torch.func.grad(lambda t: mean(surrogate(t, (refreshed - centre) / sigma)))(theta).values())
    correction = torch.zeros_like(direct)
    if args.ihvp != "none":
        b = torch.func.grad(lambda w: sigma * mean(surrogate(theta, (advantages(w) - centre) / sigma)))(omega)
        jacobian = torch.func.jacrev(lambda w: per_chunk(values(w)).flatten())(omega)
        curvature = 2 * jacobian.T @ (weights.flatten()[:, None] * jacobian)
        v = torch.linalg.solve(curvature + args.damping * torch.eye(len(b), dtype=DOUBLE), b)
        if args.curvature == "hessian":  # as a matrix it would take 40 GB on the way
            gradient = torch.func.grad(lambda w: mean((targets - values(w)[:, :-1]) ** 2))
            gauss_newton, v = v, seen.v.double()
            product = torch.func.jvp(gradient, (omega,), (v,))[1]
            assert (product + args.damping * v - b).norm() < 1e-4 * b.norm() < (gauss_newton - v).norm()
        mixed = torch.func.jvp(lambda w: torch.func.grad(inner_loss)(theta, w), (omega,), (v,))[1]
        correction = -flat(mixed.values())
        assert (seen.v.double() - v).norm() < 1e-3 * v.norm()
        assert (seen.gradients[1].double() - correction).norm() < 2e-3 * correction.norm()
        assert correction.norm() > 0.01 * direct.norm()
    else:
        assert (seen.gradients[1] == 0).all()
    assert (seen.gradients[0].double() - direct).norm() < 1e-3 * direct.norm()

    def entropy(theta):
        logprobs = logprobs_of(theta)
        return -(weights.flatten() * (logprobs.exp() * logprobs).sum(-1)).sum()

    assert torch.allclose(seen.entropy.double(), entropy(theta), atol=1e-5)
    gradient, start = -(direct + correction) - args.ent_coef * flat(torch.func.grad(entropy)(theta).values()), 0
    adam = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, eps=1e-5)
    for parameter in actor.parameters():
        parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()
    adam.step()
    if name != "full":
        adam = torch.optim.Adam(below.parameters(), lr=args.trunk_learning_rate, eps=1e-5)
        for parameter, each in zip(below.parameters(), torch.autograd.grad(critic_loss(), list(below.parameters()))):
            parameter.grad = each
        adam.step()
    torch.manual_seed(3)
    initial = dict(blpo.Agent(4, separate_trunks=True).named_parameters())
    for (key, expected), found in zip(agent.named_parameters(), seen.after.parameters()):
        moved, error = expected - initial[key], found - expected
        assert moved.norm() > 0, key  # a first step of Adam is a step size along the gradient's sign, of tiny ones less
        assert error.norm() < 2e-3 * moved.norm(), (key, float(error.norm() / moved.norm()))
