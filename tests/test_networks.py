"""Networks of another form, each put in by changing one line: the factors of the critic's Jacobian, and that the module
which acts is the one that learns."""

import copy
import importlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import toy_envs
from test_hypergradient import RUN, check_against_autograd, double_batch, updates_of, policy_of, relative_error, run

import blpo_continuous as blpo
import blpo_continuous_ablations as laboratory

DOUBLE = torch.float64


class Residual(nn.Module):
    """x + f(x), with a layer norm in f."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.layer(self.norm(x)))


class Scaled(nn.Module):
    """A layer with a parameter that is no layer's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer, self.scale = nn.Linear(inputs, outputs), nn.Parameter(torch.full((outputs,), 1.5))

    def forward(self, x):
        return self.layer(torch.sin(x) * 0.5) * self.scale


def stack(inputs, outputs, *widths, activation=nn.Tanh, bias=True):
    """Linear layers with an activation between them."""
    layers = []
    for width in widths:
        layers += [nn.Linear(inputs, width, bias=bias), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def layer_norm(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 7), nn.LayerNorm(7), nn.SiLU(), nn.Linear(7, outputs)
    )


NETWORKS = {
    "linear": lambda inputs, outputs: stack(inputs, outputs),
    "tanh": lambda inputs, outputs: stack(inputs, outputs, 12, 7),
    "relu": lambda inputs, outputs: stack(inputs, outputs, 12, 7, activation=nn.ReLU),
    "silu": lambda inputs, outputs: stack(inputs, outputs, 12, 7, activation=nn.SiLU),
    "three layers": lambda inputs, outputs: stack(inputs, outputs, 24, 24, 24),
    "layer norm": layer_norm,
    "no bias": lambda inputs, outputs: stack(inputs, outputs, 12, 7, bias=False),
    "residual": lambda inputs, outputs: nn.Sequential(nn.Linear(inputs, 9), Residual(9), Residual(9), nn.Linear(9, outputs)),
    "nested": lambda inputs, outputs: nn.Sequential(stack(inputs, 5, 9), nn.Sequential(nn.ELU(), stack(5, outputs, 8))),
    "own parameter": lambda inputs, outputs: nn.Sequential(nn.Linear(inputs, 9), Scaled(9, 6), nn.Linear(6, outputs)),
}
CHANGES = ["relu", "silu", "three layers", "layer norm"]  # what a copier is likely to put in


def some_critic(form, obs_dim=5):
    """A critic in float64 none of whose parameters is 0, so that no term vanishes."""
    torch.manual_seed(0)
    critic = NETWORKS[form](obs_dim, 1).double()
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.6)
    return critic


def swapped(module, form):
    """The module's Agent with the networks of that form."""

    class Swapped(module.Agent):
        def __init__(self, obs_dim, actions, *widths):
            super().__init__(obs_dim, actions, *widths)
            self.critic = NETWORKS[form](obs_dim, 1)
            name = "actor_logits" if "discrete" in module.__name__ else "actor_mean"
            setattr(self, name, NETWORKS[form](obs_dim, actions))

    return Swapped


def dense_jacobian(critic, obs):
    """d V / d omega (n, P) by torch.func, row by row: the oracle of CriticJacobian."""
    omega = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    value = torch.func.grad(lambda omega, row: torch.func.functional_call(critic, omega, (row,)).squeeze())
    parts = torch.func.vmap(value, (None, 0))(omega, obs)
    return torch.cat([part.flatten(1) for part in parts.values()], 1)


# ---- The factors of the Jacobian -------------------------------------------------------------------------------
@pytest.mark.parametrize("form", NETWORKS)
def test_products_with_the_jacobian_are_those_of_the_dense_one(form):
    critic, obs = some_critic(form), torch.randn(11, 5, dtype=DOUBLE)
    dense, jacobian = dense_jacobian(critic, obs), blpo.CriticJacobian(critic, obs)
    v, u = torch.randn(dense.shape[1], dtype=DOUBLE), torch.randn(3, 11, dtype=DOUBLE)
    assert (dense.norm(dim=0) > 0).double().mean() > 0.6  # a unit of ReLU may be dead
    for ours, expected in (
        (jacobian.values, critic(obs).squeeze(-1).detach()), (jacobian.jvp(v), dense @ v), (jacobian.vjp(u), u @ dense),
        (laboratory.kernel(jacobian), dense @ dense.T),
    ):  # fmt: skip
        assert ours.shape == expected.shape and not ours.requires_grad
        assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12 * float(expected.norm()))
    assert not any(module._forward_hooks for module in critic.modules())  # nothing is left behind


def curvatures(form):
    """Both curvatures of a critic, each with its dense matrix. Some rows have weight 0."""
    critic, obs, targets = some_critic(form), torch.randn(25, 5, dtype=DOUBLE), torch.randn(25, dtype=DOUBLE)
    weights = torch.rand(25, dtype=DOUBLE)
    weights[::7] = 0.0
    weights /= weights.sum()
    jacobian, dense = blpo.CriticJacobian(critic, obs), dense_jacobian(critic, obs)
    names, parameters = zip(*((name, parameter.detach()) for name, parameter in critic.named_parameters()))

    def loss(*omega):
        return (weights * (targets - torch.func.functional_call(critic, dict(zip(names, omega)), (obs,)).squeeze(-1)) ** 2).sum()

    # Reverse over reverse: forward over reverse, torch.func.hessian, is wrong for a layer norm in PyTorch 2.13.
    every = tuple(range(len(names)))
    blocks = torch.func.jacrev(torch.func.grad(loss, every), every)(*parameters)
    size = [p.numel() for p in parameters]
    full = torch.cat([torch.cat([b.reshape(n, m) for b, m in zip(row, size)], 1) for row, n in zip(blocks, size)])
    gauss_newton = blpo.GaussNewton(jacobian, weights), 2 * dense.T @ (weights[:, None] * dense)
    return {"gauss-newton": gauss_newton, "hessian": (laboratory.Hessian(jacobian, weights, critic, obs, targets), full)}, dense


CURVED = ["tanh", "layer norm"]
CURVED += [pytest.param(name, marks=pytest.mark.full) for name in NETWORKS if name not in ("tanh", "layer norm", "three layers")]


@pytest.mark.parametrize("form", CURVED)  # the matrix of "three layers" would have 5,041 rows
def test_curvatures_and_solvers_are_those_of_dense_matrices(form):
    both, dense = curvatures(form)
    u, damping = torch.randn(25, dtype=DOUBLE), 0.3
    b, identity = u @ dense, torch.eye(dense.shape[1], dtype=DOUBLE)
    for kind, (curvature, matrix) in both.items():
        columns = torch.stack([curvature.product(column) for column in identity])
        assert (columns - matrix).norm() < 1e-12 * matrix.norm()
        if kind == "hessian":  # Nystrom's own sketch is Gauss-Newton's
            continue
        # The directions of Nystrom lie in the last layer, the last of omega; a sketch is H on them.
        last = torch.cat([curvature.jacobian.last_inputs, torch.ones(25, 1, dtype=DOUBLE)], 1)
        directions = torch.linalg.qr(torch.randn(last.shape[1], 3, dtype=DOUBLE))[0]
        p = nn.functional.pad(directions.T, (len(b) - last.shape[1], 0))
        expected = b, p @ matrix, p @ matrix @ p.T
        for ours, theirs in zip(curvature.sketch(u, directions, last * curvature.root[:, None]), expected):
            assert (ours - theirs).norm() < 1e-12 * theirs.norm()
        right, v = blpo.nystrom_ihvp(curvature, u, damping, 3, torch.Generator().manual_seed(3))
        assert torch.allclose(right, b, rtol=0, atol=1e-12) and 0 < v @ b < b @ b / damping
    curvature, matrix = both["gauss-newton"]
    expected = torch.linalg.solve(matrix + damping * identity, b)
    solutions = (laboratory.exact_ihvp(curvature, u, damping), 1e-11), (blpo.cg_ihvp(curvature, u, damping, 300), 1e-5)
    for (right, v), tolerance in solutions:
        assert torch.allclose(right, b, rtol=0, atol=1e-12)
        assert (v - expected).norm() < tolerance * expected.norm()


class Twice(nn.Module):
    """One layer used twice, in the middle; the last layer may start at zero."""

    def __init__(self, zero=False):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 1)
        if zero:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, obs):
        h = torch.tanh(self.shared(torch.tanh(self.first(obs))))
        return self.last(torch.tanh(self.shared(h)))


def tied():
    critic = stack(5, 1, 7, 7, 7)
    critic[4].weight = critic[2].weight
    return critic


REFUSED = {
    "a layer used twice": Twice, "a layer used twice, the last layer zeros": lambda: Twice(zero=True),
    "weights that two layers share": tied,
    "dropout": lambda: nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 1)),
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)),
    "values that depend on other rows": lambda: nn.Sequential(nn.Linear(5, 7), nn.Softmax(0), nn.Linear(7, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_critic_whose_derivatives_do_not_hold_is_refused(case):
    torch.manual_seed(0)
    with pytest.raises(blpo.BadInput, match="^the critic's derivatives do not hold: use each linear layer once, [^\n]+$"):
        blpo.check_critic(REFUSED[case](), 5, needs_linear_output=False)


LAST_LAYERS = {
    "an activation": [nn.Linear(7, 1), nn.Tanh()], "no bias": [nn.Linear(7, 1, bias=False)], "a scale": [Scaled(7, 1)],
    "the mean of seven outputs": [nn.Linear(7, 7), nn.AvgPool1d(7)],
}  # fmt: skip


@pytest.mark.parametrize("case", LAST_LAYERS)
def test_nystrom_needs_a_linear_last_layer_with_one_output_and_the_others_do_not(case):
    critic = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), *LAST_LAYERS[case])
    blpo.check_critic(critic, 5, needs_linear_output=False)
    with pytest.raises(blpo.BadInput, match=r"^--ihvp nystrom needs .* nn.Linear\(..., 1\) with a bias; use --ihvp cg$"):
        blpo.check_critic(critic, 5, needs_linear_output=True)


@pytest.mark.parametrize("form", NETWORKS)
def test_these_networks_are_accepted_and_the_check_changes_nothing(form):
    critic = NETWORKS[form](5, 1)
    before, random_state = copy.deepcopy(critic.state_dict()), torch.get_rng_state()
    blpo.check_critic(critic, 5, needs_linear_output=True)
    assert all(torch.equal(x, before[name]) for name, x in critic.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state) and all(p.grad is None for p in critic.parameters())


# ---- A copier's change -----------------------------------------------------------------------------------------
SWAPS = [
    ("ppo_continuous", "silu"),
    ("ppo_discrete", "three layers"),
    ("blpo_continuous", "layer norm"),
    ("blpo_discrete", "relu"),
]
SWAPS += [
    pytest.param(script, change, marks=pytest.mark.full)
    for script in ("ppo_continuous", "ppo_discrete", "blpo_continuous", "blpo_discrete", "blpo_continuous_ablations")
    for change in CHANGES if (script, change) not in SWAPS
]  # fmt: skip


@pytest.mark.parametrize("script", ["ppo_continuous", "ppo_discrete", "blpo_continuous", "blpo_discrete", "blpo_continuous_ablations"])
def test_with_width_0_the_critic_is_linear_and_learns(script, tmp_path, monkeypatch):
    """V = w . obs + c in every script; with more directions than weights (the default 10 of 4) Nystrom is the dense solve."""
    script = importlib.import_module(script)
    folder = run(script, tmp_path, monkeypatch, critic_width=0, save_model=True)
    agent, obs = script.load_policy(folder / "model.pt"), torch.randn(20, 3)
    weight, bias = agent.critic.parameters()
    assert weight.shape == (1, 3) and bias.shape == (1,) and bias.abs() > 1e-6
    assert torch.allclose(agent.critic(obs)[:, 0], obs @ weight[0] + bias, rtol=1e-5, atol=1e-6)
    if hasattr(script, "nystrom_ihvp"):
        rows, generator = torch.randn(30, 3, dtype=DOUBLE), torch.Generator().manual_seed(1)
        u, weights, critic = torch.randn(30, dtype=DOUBLE), torch.rand(30, dtype=DOUBLE), agent.critic.double()
        curvature = script.GaussNewton(script.CriticJacobian(critic, rows), weights)
        b, v = script.nystrom_ihvp(curvature, u, 0.5, 10, generator)
        features = torch.cat([rows, torch.ones(30, 1, dtype=DOUBLE)], 1)
        matrix = 2 * features.T @ (weights[:, None] * features) + 0.5 * torch.eye(4, dtype=DOUBLE)
        assert relative_error(b, features.T @ u) < 1e-12 and relative_error(v, torch.linalg.solve(matrix, features.T @ u)) < 1e-10


@pytest.mark.parametrize("script, change", SWAPS)
def test_the_module_that_acts_is_the_one_that_learns(script, change, tmp_path, monkeypatch):
    """In each rollout actions, log-probabilities and values are those of the agent that is about to learn, by its modules and
    torch.distributions; the first ratios are 1. The task got these actions; in the end this module is what is played."""
    script, seen = importlib.import_module(script), []
    monkeypatch.setattr(script, "Agent", swapped(script, change))
    gae, surrogate = script.gae, script.clipped_surrogate

    def before_the_update(*arguments):
        local = inspect.currentframe().f_back.f_locals
        if local["iteration"] == len(seen):  # the advantages of an epoch, after the critic's answer
            return gae(*arguments)
        kept = {name: local[name].clone() for name in ("b_obs", "b_actions", "b_valid", "logprobs", "noise", "values")}
        seen.append(SimpleNamespace(**kept, agent=copy.deepcopy(local["agent"]), ratio=None))
        return gae(*arguments)

    def in_each_minibatch(ratio, *arguments):
        seen[-1].ratio = ratio.detach().clone() if seen[-1].ratio is None else seen[-1].ratio
        return surrogate(ratio, *arguments)

    monkeypatch.setattr(script, "gae", before_the_update)
    monkeypatch.setattr(script, "clipped_surrogate", in_each_minibatch)
    toy_envs.STEPS.clear()
    folder = run(script, tmp_path, monkeypatch, ihvp="nystrom", save_model=True)
    sent = {}
    for environment, _, action in toy_envs.STEPS:
        sent.setdefault(environment, []).append(action)
    sent = [np.array(actions) for _, actions in sorted(sent.items()) if len(actions) > 100]  # the others were for a check
    assert len(seen) == 3 and len(sent) == RUN["num_envs"]
    with torch.no_grad():
        for each in seen:
            obs, agent = each.b_obs[:-1], each.agent
            assert torch.allclose(each.b_actions, agent.sample(obs, each.noise), rtol=0, atol=1e-5)
            assert torch.allclose(each.logprobs, policy_of(agent, obs).log_prob(each.b_actions), rtol=0, atol=1e-5)
            assert (each.ratio - 1).abs().max() < 1e-5
            assert torch.allclose(each.values, agent.critic(each.b_obs).squeeze(-1), rtol=0, atol=1e-5)
        for environment, actions in enumerate(sent):
            expected = torch.cat([
                each.agent.task_actions(each.b_actions)[each.b_valid[:, environment] == 1, environment] for each in seen
            ])  # fmt: skip
            assert np.array_equal(actions[-len(expected) :], expected.numpy())
    first, last = (each.agent.state_dict() for each in (seen[0], seen[-1]))
    moved = {name for name, x in first.items() if not torch.equal(x, last[name])}
    assert moved >= {name for name, _ in seen[0].agent.named_parameters()}  # every parameter learns
    agent, raw = script.load_policy(folder / "model.pt"), 30 * torch.randn(20, 3, dtype=DOUBLE)
    obs = ((raw - agent.obs_mean) / agent.obs_std).clip(-10, 10).float()
    expected = agent.task_actions(policy_of(agent, obs).mode).detach().numpy()
    assert np.array_equal(script.load_policy(folder / "model.pt")(raw.numpy()).numpy(), expected)
    assert type(agent).__name__ == "Swapped" and agent.obs_std.min() > 0 and not torch.equal(agent.obs_mean, torch.zeros(3))


@pytest.mark.parametrize(
    "change", ["relu", "layer norm", *(pytest.param(x, marks=pytest.mark.full) for x in ("silu", "three layers"))]
)
@pytest.mark.parametrize("script", ["blpo_continuous", pytest.param("blpo_discrete", marks=pytest.mark.full)])
def test_with_other_networks_the_gradients_are_finite_differences(script, change, tmp_path, monkeypatch):
    """Of J in omega (b), of the values (z), and of the leader's loss in theta, written with the module's forward pass."""
    script = importlib.import_module(script)
    monkeypatch.setattr(script, "Agent", swapped(script, change))
    for seen in updates_of(script, tmp_path, monkeypatch, ihvp="cg", cg_iterations=50, ent_coef=0.1, norm_adv=False):
        check_against_autograd(seen)
        batch, agent, start, clip = double_batch(seen), seen.agent, seen.start, seen.args.clip_coef
        theta, omega = agent.actor_parameters(), [*start.critic.parameters()]
        states, actions, logprobs, targets, e = (
            x.flatten(0, 1)[batch.last]
            for x in (batch.obs[:-1], batch.actions, batch.logprobs, batch.advantages, seen.e)
        )

        def values():
            return start.critic(batch.obs).squeeze(-1)

        def refreshed():
            return script.gae(batch.rewards, values(), batch.discounts, batch.decay)

        def surrogate(ratio, advantages):
            return torch.minimum(ratio * advantages, ratio.clip(1 - clip, 1 + clip) * advantages)

        held = (policy_of(start, batch.obs[:-1]).log_prob(batch.actions) - batch.logprobs).exp().detach()
        now, direct = values().detach()[:-1], refreshed().detach().flatten()[batch.last]

        def leader_objective():
            return (batch.weights * surrogate(held, refreshed() + values()[:-1] - now)).sum()

        def leader_loss():
            ratio = (policy_of(agent, states).log_prob(actions) - logprobs).exp()
            rows = surrogate(ratio, direct) + 2 * e * surrogate(ratio, targets)
            return -(rows + 0.1 * policy_of(agent, states).entropy()).mean()

        @torch.no_grad()
        def slope(function, parameters, direction, step=1e-6):
            """The derivative of the function along a direction, by central differences."""
            start = nn.utils.parameters_to_vector(parameters).clone()
            sides = []
            for sign in (1, -1):
                nn.utils.vector_to_parameters(start + sign * step * direction, parameters)
                sides.append(function())
            nn.utils.vector_to_parameters(start, parameters)
            return (sides[0] - sides[1]) / (2 * step)

        b, v, loss_gradient = seen.b.double(), seen.v.double(), seen.loss_gradient
        for ours, function, parameters in ((b, leader_objective, omega), (loss_gradient, leader_loss, theta)):
            for direction in (ours / ours.norm(), torch.randn_like(ours)):
                assert abs(slope(function, parameters, direction) - ours @ direction) < 1e-4 * ours.norm()
        assert relative_error(seen.z, slope(values, omega, v)[:-1] * batch.valid) < 1e-4


@pytest.mark.parametrize("script", ["ppo_continuous", "blpo_continuous"])
@pytest.mark.parametrize("form", ["a trunk of both players", "a parameter of neither"])
def test_the_parameters_are_the_actors_or_the_critics(script, form, tmp_path, monkeypatch):
    """Otherwise theta and omega are not apart, or something is never trained, without a word."""
    script = importlib.import_module(script)

    class Odd(script.Agent):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            if form == "a trunk of both players":
                self.actor_mean[0] = self.critic[0]
            else:
                self.encoder = nn.Linear(3, 3)

    monkeypatch.setattr(script, "Agent", Odd)
    with pytest.raises((script.BadInput, ValueError), match="parameter"):  # ValueError: Adam's own, where it sees both
        run(script, tmp_path, monkeypatch)
    assert [*tmp_path.iterdir()] == []


def test_dropout_in_the_actor_changes_nothing(tmp_path, monkeypatch):
    """Acting and learning are one function of the weights, so it is off in both."""
    script, folders = importlib.import_module("ppo_continuous"), []
    for rate in (0.0, 0.5):
        with monkeypatch.context() as patch:

            class Dropped(script.Agent):
                def __init__(self, *sizes):
                    super().__init__(*sizes)
                    self.actor_mean.insert(2, nn.Dropout(rate))

            patch.setattr(script, "Agent", Dropped)
            folders.append(run(script, tmp_path, patch, save_model=True))
    first, second = (torch.load(folder / "model.pt", weights_only=True)["agent"] for folder in folders)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
