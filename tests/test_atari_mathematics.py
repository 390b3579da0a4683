"""blpo_atari.py: products with a convolutional critic's Jacobian, the solvers and the hypergradient against dense algebra, in
float64 on a tiny network, and one epoch of `train` by hand."""

import copy
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
ROWS = ("terminated", "truncated", "valid", "rewards")


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


def test_products_keep_no_graph():
    follower, inputs, dense = follower_at("full")
    jacobian = blpo.CriticJacobian(follower, inputs)
    products = jacobian.values, jacobian.jvp(dense[0]), jacobian.vjp(dense[:, :7].T)
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
    columns = torch.stack([curvature.product(row) for row in torch.eye(len(hessian), dtype=DOUBLE)])
    assert torch.allclose(columns, hessian, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FOLLOWERS)
def test_solvers_equal_the_dense_solve(name):
    """Conjugate gradients at damping 1: elsewhere more iterations than rows are of no use in finite precision. Nystrom where it
    has all directions, at any damping."""
    follower, inputs, dense = follower_at(name)
    weights, u = torch.rand(7, dtype=DOUBLE), torch.randn(7, dtype=DOUBLE)
    weights[2] = 0.0  # a row that is no transition
    curvature = blpo.GaussNewton(blpo.CriticJacobian(follower, inputs), weights)
    hessian, identity = 2 * dense.T @ (weights[:, None] * dense), torch.eye(dense.shape[1], dtype=DOUBLE)
    solved = [(1.0, blpo.cg_ihvp(curvature, u, 1.0, 60))]
    if name == "head":
        for damping in (1.0, 1e-3):
            solved.append((damping, blpo.nystrom_ihvp(curvature, u, damping, 7, torch.Generator().manual_seed(0))))
    for damping, (b, v) in solved:
        expected = torch.linalg.solve(hessian + damping * identity, dense.T @ u)
        assert torch.allclose(b, dense.T @ u, rtol=0, atol=1e-10)
        assert (v - expected).norm() < 1e-6 * expected.norm()


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


# ---- One epoch of train ----------------------------------------------------------------------------------------
def test_a_network_in_pieces_is_the_network():
    """On 128 rows at a time, and without a graph."""
    network, sizes = nn.Linear(3, 2), []
    network.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    obs = torch.randn(5, 300, 3)
    found = blpo.in_pieces(network, obs)
    assert sizes == 11 * [128] + [92] and not found.requires_grad
    assert torch.allclose(found, network(obs.flatten(0, 1)), rtol=0, atol=1e-6)


def last_epoch(tmp_path, monkeypatch, *arguments):
    """A run of two epochs of a real game: the agent, the states of its optimisers and of the random numbers at the start of the
    second one; the local variables of `train` when it takes its diagnostics; the agent that is saved."""
    seen, in_pieces, diagnostics = {}, blpo.in_pieces, blpo.leader_diagnostics

    def at_start(network, obs):
        local = inspect.currentframe().f_back.f_locals
        if local["epoch"] == 1 and not seen:
            seen.update(begun=copy.deepcopy(local["agent"]), random=torch.get_rng_state())
            seen["adams"] = [copy.deepcopy(each.state_dict()) for each in local["optimisers"]]
        return in_pieces(network, obs)

    def at_end(theta, direct, correction, e):
        local = inspect.currentframe().f_back.f_locals
        seen.update({k: x.detach().clone() if isinstance(x, torch.Tensor) else x for k, x in local.items() if k != "run"})
        seen["gradients"] = [flat(torch.autograd.grad(x, theta, retain_graph=True)) for x in (direct, correction)]
        return diagnostics(theta, direct, correction, e)

    monkeypatch.setattr(blpo, "in_pieces", at_start)
    monkeypatch.setattr(blpo, "leader_diagnostics", at_end)
    words = ["--num-envs", "2", "--num-steps", "32", "--total-timesteps", "64", "--update-epochs", "2", "--num-minibatches", "2"]
    words += ["--env-threads", "1", "--torch-threads", "1", "--device", "cpu", "--run-dir", str(tmp_path), "--checkpoint-every", "1"]
    words += ["--seed", "3", "--no-anneal-lr", "--learning-rate", "0.02", "--clip-coef", "0.01"]
    words += ["--env-kwargs", '{"max_episode_steps": 25}', *arguments]
    folder = blpo.train(blpo.parse_args(words))
    return SimpleNamespace(**seen, after=blpo.load_policy(folder / "checkpoint.pt"))


EXACT = "--nystrom-rank 7 --mixed-discount 0.5"  # all directions of the head, its 6 weights and its bias
CG = "--ihvp cg --cg-iterations 40"
CASES = [("head", EXACT), ("last-two", f"{CG} --no-norm-adv"), ("head", "--ihvp none")]
MORE_CASES = [("full", CG), ("full", "--ihvp none"), ("last-two", "--ihvp none")]


@pytest.mark.parametrize("name, words", [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE_CASES)])
def test_one_epoch_of_train_by_hand(name, words, tmp_path, monkeypatch):
    """In float64: K passes of the follower, its response from dense matrices and plain autograd, and the minibatches of the
    actor and of the layers below the follower."""
    seen = last_epoch(tmp_path, monkeypatch, "--follower", name, *words.split())
    agent, args = copy.deepcopy(seen.begun).double(), seen.args
    terminated, truncated, valid, rewards = (torch.tensor(getattr(seen, x)).double() for x in ROWS)
    assert terminated.any() and truncated.any() and not valid.all()
    ended, weights, rows = torch.max(terminated, truncated), valid / valid.sum(), valid.flatten().nonzero()[:, 0]
    targets, old_logprobs = seen.returns.double(), seen.logprobs.double()
    fixed = targets - seen.values[:-1].double()  # A' = G' - V'
    images = seen.obs.flatten(0, 1).double() / 255
    actor, (below, follower) = nn.Sequential(agent.actor_trunk, agent.actor_head), blpo.split_critic(agent, name)
    adams = []
    for part, state in zip((actor, follower, below), seen.adams):
        adams.append(torch.optim.Adam(part.parameters()))
        adams[-1].load_state_dict(state)
    assert len(adams) == (2 if name == "full" else 3)
    torch.set_rng_state(seen.random)

    def step(adam, loss):
        adam.zero_grad()
        loss.backward()
        adam.step()

    # The follower
    inputs = below(images).detach()
    for _ in range(args.nested_updates):
        losses = []
        for part in torch.randperm(len(rows)).tensor_split(2):
            losses.append(((follower(inputs[rows[part]])[:, 0] - targets.flatten()[rows[part]]) ** 2).mean())
            step(adams[1], losses[-1])
    assert float(seen.critic_loss) == pytest.approx(sum(losses).item() / 2, rel=1e-3)  # of the last pass
    omega, steps = omega_of(follower), range(args.num_steps)

    def values(w):
        return flat_call(follower, w, inputs).view(args.num_steps + 1, -1)

    def advantages(w):
        """G(w) - V(s) with the V(s) of now, the lambda-return G by its recursion."""
        v, returns = values(w), []
        for t in reversed(steps):
            following = v[t + 1]
            if returns:
                mixture = (1 - args.gae_lambda) * following + args.gae_lambda * returns[0]
                following = torch.where(ended[t] == 1, following, mixture)
            returns.insert(0, rewards[t] + args.gamma * (1 - terminated[t]) * following)
        return torch.stack(returns) - values(omega)[:-1].detach()

    def logprobs_of(part):
        return actor(images[part]).log_softmax(-1), seen.actions.flatten()[part][:, None]

    def surrogate(ratio, a):
        return torch.minimum(ratio * a, ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * a)

    # Its response
    refreshed, e = advantages(omega).detach(), torch.zeros_like(weights)
    assert torch.allclose(seen.refreshed.double(), refreshed, rtol=0, atol=1e-4)
    if args.ihvp != "none":
        logprobs, chosen = logprobs_of(slice(0, weights.numel()))
        ratio = (logprobs.gather(-1, chosen).view_as(weights) - old_logprobs).exp().detach()
        assert ((ratio - 1).abs() > args.clip_coef)[valid == 1].any()
        centre = (weights * refreshed).sum() if args.norm_adv else 0.0
        b = torch.func.grad(lambda w: (weights * surrogate(ratio, advantages(w) - centre)).sum())(omega)
        jacobian = torch.func.jacrev(lambda w: values(w)[:-1].flatten())(omega)
        hessian = 2 * jacobian.T @ (weights.flatten()[:, None] * jacobian)
        v = torch.linalg.solve(hessian + args.damping * torch.eye(len(b), dtype=DOUBLE), b)
        assert (seen.v.double() - v).norm() < 3e-4 * v.norm()
        kappa = args.gamma * args.gae_lambda if args.mixed_discount is None else args.mixed_discount
        z, before = (jacobian @ v).view_as(weights), torch.zeros(2, dtype=DOUBLE)
        for t in steps:
            e[t] = valid[t] * (z[t] + kappa * before)
            before = (1 - ended[t]) * e[t]
        assert e.std() > 0.01 * e.abs().max() > 0
    assert (seen.e.double() - e).norm() <= 1e-3 * e.norm()

    # The leader, and the layers below the follower
    for part in torch.randperm(len(rows)).tensor_split(2):
        part = rows[part]
        a, a_fixed = refreshed.flatten()[part], fixed.flatten()[part]
        if args.norm_adv:
            sigma = a.std() + 1e-8
            a, a_fixed = (a - a.mean()) / sigma, (a_fixed - a_fixed.mean()) / sigma
        logprobs, chosen = logprobs_of(part)
        ratio = (logprobs.gather(-1, chosen)[:, 0] - old_logprobs.flatten()[part]).exp()
        direct, correction = surrogate(ratio, a).mean(), (2 * e.flatten()[part] * surrogate(ratio, a_fixed)).mean()
        gradients = [flat(torch.autograd.grad(x, [*actor.parameters()], retain_graph=True)) for x in (direct, correction)]
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
        step(adams[0], -direct - correction - args.ent_coef * entropy)
        if name != "full":
            step(adams[2], ((follower(below(images[part]))[:, 0] - targets.flatten()[part]) ** 2).mean())
    assert torch.allclose(seen.entropy.double(), entropy, atol=1e-5)
    for found, expected in zip(seen.gradients, gradients):
        assert (found.double() - expected).norm() <= 2e-3 * expected.norm()
    assert gradients[1].norm() > 0.01 * gradients[0].norm() or args.ihvp == "none"
    for (key, expected), start, found in zip(agent.named_parameters(), seen.begun.parameters(), seen.after.parameters()):
        moved, error = expected - start, found - expected
        assert moved.norm() > 0, key
        assert error.norm() < 2e-3 * moved.norm(), (key, float(error.norm() / moved.norm()))
