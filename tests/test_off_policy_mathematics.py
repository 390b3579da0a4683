"""The mathematics of stddpg.py and stsac.py in float64: derivatives against dense ones, for networks of several forms, solves
against dense ones, the leader's gradient against the dense total derivative and against a follower that is solved again."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import stddpg
import stsac
import torch
import torch.nn as nn
from stackelberg_toy import total_gradient
from torch.func import functional_call, grad, hessian, jacrev

F64, N, D, A = torch.float64, 14, 3, 2
NUMBER = {stddpg: 0.1, stsac: 0.2}  # of the exploration noise; of the entropy


def new_agent(script):
    """A small agent in float64."""
    return script.Agent(D, A, 6, 7, NUMBER[script]).double()


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.sin(self.layer(x))


def stack(activation, inputs: int, outputs: int, *between):
    return nn.Sequential(nn.Linear(inputs, 6), activation(), *between, nn.Linear(6, 5), activation(), nn.Linear(5, outputs))


FORMS = {  # networks that a copier may put in
    "relu": lambda inputs, outputs: stddpg.mlp(inputs, 6, outputs),
    "tanh": lambda inputs, outputs: stack(nn.Tanh, inputs, outputs),
    "silu": lambda inputs, outputs: stack(nn.SiLU, inputs, outputs),
    "linear": lambda inputs, outputs: nn.Sequential(nn.Linear(inputs, outputs)),
    "three layers": lambda inputs, outputs: stack(nn.ELU, inputs, outputs, nn.Linear(6, 6), nn.Tanh()),
    "residual, normalised": lambda inputs, outputs: nn.Sequential(
        nn.Linear(inputs, 8), nn.LayerNorm(8, elementwise_affine=False), nn.SiLU(), Residual(8), nn.Linear(8, outputs)
    ),
}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.fixture(params=[stddpg, stsac], ids=["stddpg", "stsac"])
def script(request):
    return request.param


def problem(script, n: int = N, form: str | None = None, actor: str | None = None) -> SimpleNamespace:
    """An agent and a minibatch in float64, f and L as functions of flat theta and omega, made from the paper's formulas
    alone (no function of the script but the policy), and what the scripts make of the batch. form: of the critics;
    actor: of the actor."""
    torch.manual_seed(5)
    agent = new_agent(script)
    if form:
        agent.critics = nn.ModuleList([FORMS[form](D + A, 1) for _ in agent.critics]).double()
    if actor:
        agent.actor = FORMS[actor](D, A if script is stddpg else 2 * A).double()
    for target in agent.targets:  # unlike the critics
        for parameter in target.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    obs, actions, next_obs = torch.randn(n, D, dtype=F64), torch.rand(n, A, dtype=F64) * 2 - 1, torch.randn(n, D, dtype=F64)
    rewards, discounts = 3 * torch.randn(n, dtype=F64), 0.99 * (torch.rand(n) > 0.2).double()
    here, there = torch.randn(2, n, agent.noise_dim, dtype=F64)
    if len(agent.critics) == 2:  # each is the least in half of the rows
        with torch.no_grad():
            rows = torch.cat([obs, agent.policy(agent.actor(obs), here)[0]], 1)
            [*agent.critics[1].parameters()][-1].add_((agent.critics[0](rows) - agent.critics[1](rows)).quantile(0.5))
    names, shapes = zip(*[(name, each.shape) for name, each in agent.actor.named_parameters()])
    critic_names = [[(name, each.shape) for name, each in critic.named_parameters()] for critic in agent.critics]
    theta, omega = flat(agent.actor.parameters()).detach(), flat(agent.critics.parameters()).detach()

    def take(vector, shapes):
        return [part.view(shape) for part, shape in zip(vector.split([math.prod(shape) for shape in shapes]), shapes)]

    def actor(theta, rows):
        return functional_call(agent.actor, dict(zip(names, take(theta, shapes))), (rows,))

    def critics(omega, rows):
        parts, values = omega.split(len(omega) // len(agent.critics)), []
        for critic, known, part in zip(agent.critics, critic_names, parts):
            parameters = dict(zip([name for name, _ in known], take(part, [shape for _, shape in known])))
            values.append(functional_call(critic, parameters, (rows,))[:, 0])
        return torch.stack(values)

    def f(theta, omega):
        chosen, costs = agent.policy(actor(theta, obs), here)
        return (costs - critics(omega, torch.cat([obs, chosen], 1)).amin(0)).mean()

    def y(theta):
        chosen, costs = agent.policy(actor(theta, next_obs), there)
        rows = torch.cat([next_obs, chosen], 1)
        return rewards + discounts * (torch.stack([target(rows)[:, 0] for target in agent.targets]).amin(0) - costs)

    pairs = torch.cat([obs, actions], 1)

    def L(theta, omega):
        return ((critics(omega, pairs) - y(theta)) ** 2).mean(1).sum()

    backups = script.backup(agent, rewards, discounts, next_obs, there)
    data = script.CriticJacobian(agent.critics, pairs)
    errors = data.values - backups.detach()
    chosen, costs = agent.policy(agent.actor(obs), here)
    led_pairs = torch.cat([obs, chosen.detach()], 1)
    led = script.CriticJacobian(agent.critics, led_pairs, least=True)
    slopes = led.slopes[:, D:]
    return SimpleNamespace(**locals())


def cg_response(script, p, damping, iterations=200):
    """z by conjugate gradients, whether the guard stopped them, and the residual."""
    return script.cg_response(p.data, p.led, script.critic_hessian(p.agent, p.pairs, p.backups), damping, iterations)


def actor_gradient(script, p, damping, ihvp="kernel", iterations=200, backups=None) -> torch.Tensor:
    """The gradient in theta that the script forms when the actor leads."""
    if ihvp == "kernel":
        z = script.kernel_response(p.data, p.led, damping)
    else:
        z, _, _ = cg_response(script, p, damping, iterations)
    backups = p.backups if backups is None else backups
    loss = script.policy_loss(p.chosen, p.costs, p.slopes) + 2 * (z.sum(0) * backups).mean()
    return flat(torch.autograd.grad(loss, list(p.agent.actor.parameters()), retain_graph=True))


def critic_gradient(script, p, damping, iterations=200) -> torch.Tensor:
    """The gradient in omega that the script forms when the critic leads."""
    thetas = list(p.agent.actor.parameters())
    b = flat(torch.autograd.grad(-2 * (p.errors.sum(0) * p.backups).mean(), thetas, retain_graph=True))
    x, _, _ = script.guarded_solve(script.actor_hessian(p.agent, p.obs, p.here), b, damping, iterations)
    return p.data.vjp(2 / N * p.errors) - script.critic_correction(p.agent, p.obs, p.here, x)


# ---- Derivatives, whatever the network ---------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_first_derivatives_of_the_critics(script, form):
    p = problem(script, form=form)
    count = len(p.agent.critics)
    jacobian = jacrev(lambda omega: p.critics(omega, p.pairs))(p.omega)  # (E, n, P)
    u, v = torch.randn(count, N, dtype=F64), torch.randn(len(p.omega), dtype=F64)
    assert relative(p.data.values, torch.cat([critic(p.pairs) for critic in p.agent.critics], 1).T) < 1e-13
    assert relative(p.data.vjp(u), torch.einsum("en,enp->p", u, jacobian)) < 1e-12
    assert relative(p.data.jvp(v), jacobian @ v) < 1e-12
    assert relative(p.data.kernel(p.data), jacobian @ jacobian.mT) < 1e-12
    least = jacrev(lambda omega: p.critics(omega, p.led_pairs).amin(0))(p.omega)  # (n, P), each row of one critic
    assert relative(p.led.slopes, grad(lambda rows: p.critics(p.omega, rows).amin(0).sum())(p.led_pairs)) < 1e-12
    assert relative(p.led.vjp(torch.ones(count, N, dtype=F64)), least.sum(0)) < 1e-12
    assert relative(p.data.kernel(p.led), jacobian @ least.T) < 1e-12
    if count == 2:
        assert p.led.values.argmin(0).sum() == N // 2
    script.check_critics(p.agent.critics, D + A)


def test_vectors_of_parameters(script):
    agent, rows = new_agent(script), torch.randn(4, D, dtype=F64)
    parameters = list(agent.actor.parameters())
    theta = script.flatten(parameters)
    assert all(torch.equal(a, b) for a, b in zip(script.unflatten(theta, parameters), parameters))
    assert torch.equal(script.call(agent.actor, theta, rows), agent.actor(rows))
    moved = theta.clone()
    moved[-1] += 1  # the bias of the last output
    assert relative(script.call(agent.actor, moved, rows)[:, -1], agent.actor(rows)[:, -1] + 1) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_own_gradients_of_both_players(script, form):
    p = problem(script, form=form, actor="silu")
    assert relative(p.data.vjp(2 / N * p.errors), grad(p.L, 1)(p.theta, p.omega)) < 1e-12
    loss = script.policy_loss(p.chosen, p.costs, p.slopes)
    own = flat(torch.autograd.grad(loss, list(p.agent.actor.parameters()), retain_graph=True))
    assert relative(own, grad(p.f)(p.theta, p.omega)) < 1e-12
    assert relative(script.actor_objective(p.agent, p.theta, p.omega, p.obs, p.here), p.f(p.theta, p.omega)) < 1e-12
    assert relative(script.critic_objective(p.agent, p.omega, p.pairs, p.backups), p.L(p.theta, p.omega)) < 1e-12
    following = p.rewards, p.discounts, p.next_obs, p.there
    for follower, want in (("critic", grad(p.L, 1)(p.theta, p.omega)), ("actor", own)):
        assert relative(script.follower_gradient(p.agent, follower, p.pairs, p.obs, p.here, following), want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_hessians_against_dense_ones(script, form):
    """The actor's also through critics that are curved in the action."""
    p = problem(script, form=form, actor="tanh")
    for product, dense in (
        (script.critic_hessian(p.agent, p.pairs, p.backups), hessian(p.L, 1)(p.theta, p.omega)),
        (script.actor_hessian(p.agent, p.obs, p.here), hessian(p.f)(p.theta, p.omega)),
    ):
        for v in torch.randn(2, len(dense), dtype=F64):
            assert relative(product(v), dense @ v) < 1e-12
        if form == "relu":
            eigenvalues = torch.linalg.eigvalsh(dense)
            assert eigenvalues[0] < -1e-3 < 1e-3 < eigenvalues[-1]  # indefinite, both


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(D + A, D + A), nn.Linear(D + A, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Unused(Twice):
    """A layer of which nothing comes."""

    def forward(self, x):
        return self.last(x)


class RowsMixed(Twice):
    """Each row has what is in the others."""

    def forward(self, x):
        hidden = torch.tanh(self.layer(x))
        return self.last(hidden - hidden.mean(0))


WRONG = {
    "a layer used twice": Twice,
    "an unused layer": Unused,
    "rows that depend on each other": RowsMixed,
    "batch norm": lambda: nn.Sequential(nn.Linear(D + A, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    "a parameter of another layer": lambda: nn.Sequential(nn.Linear(D + A, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1)),
    "no bias": lambda: nn.Sequential(nn.Linear(D + A, 4), nn.ReLU(), nn.Linear(4, 1, bias=False)),
    "dropout that is on": lambda: nn.Sequential(nn.Linear(D + A, 9), nn.Dropout(0.5), nn.Linear(9, 1)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_critic_whose_derivatives_do_not_hold_is_refused(script, wrong):
    with pytest.raises(script.BadInput, match="the critic's derivatives do not hold"):
        script.check_critics(nn.ModuleList([WRONG[wrong](), WRONG[wrong]()]), D + A)


@pytest.mark.parametrize("script", [stddpg, stsac], ids=["stddpg", "stsac"])
def test_critics_of_different_sizes_are_refused(script):
    with pytest.raises(script.BadInput, match="critics of one size"):
        script.check_critics(nn.ModuleList([script.mlp(D + A, 6, 1), script.mlp(D + A, 7, 1)]), D + A)


# ---- Solves ----------------------------------------------------------------------------------------------------
def gauss_newton(p) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """J of all rows and critics (E n, P), H = 2/n J^T J, and b = d_omega f."""
    jacobian = jacrev(lambda omega: p.critics(omega, p.pairs).flatten())(p.omega)
    return jacobian, 2 / N * jacobian.T @ jacobian, grad(p.f, 1)(p.theta, p.omega)


@pytest.mark.parametrize("damping", [1e-2, 1.0, 1e3])
def test_kernel_solve_against_a_dense_one(script, damping):
    p = problem(script)
    jacobian, H, b = gauss_newton(p)
    want = jacobian @ torch.linalg.solve(H + damping * torch.eye(len(b), dtype=F64), b)
    z = script.kernel_response(p.data, p.led, damping)
    assert relative(z.flatten(), want) < 1e-10
    assert script.kernel_residual(z, p.data, p.led, damping) < 1e-10
    assert script.kernel_residual(1.01 * z, p.data, p.led, damping) > 1e-5  # it is no constant


def test_kernel_residual_is_that_of_the_full_system(script):
    p = problem(script)
    jacobian, H, b = gauss_newton(p)
    z = torch.randn(len(p.agent.critics), N, dtype=F64)
    x = (b - 2 / N * jacobian.T @ z.flatten()) / 0.5
    want = (H @ x + 0.5 * x - b).norm() / b.norm()
    assert script.kernel_residual(z, p.data, p.led, 0.5).item() == pytest.approx(want.item(), rel=1e-10)


def test_kernel_gives_the_individual_gradient_where_its_system_is_not_finite(script):
    p = problem(script)
    assert not script.kernel_response(p.data, p.led, math.nan).any()


def test_conjugate_gradient_response_against_a_dense_solve(script):
    p = problem(script)
    jacobian, _, b = gauss_newton(p)
    H = hessian(p.L, 1)(p.theta, p.omega)
    damping = 1 - 2 * torch.linalg.eigvalsh(H)[0].item()
    want = jacobian @ torch.linalg.solve(H + damping * torch.eye(len(b), dtype=F64), b)
    z, stopped, residual = cg_response(script, p, damping)
    assert relative(z.flatten(), want) < 1e-5 and not stopped and residual() < 1e-5


def test_the_guard_stops_at_a_constructed_indefinite_matrix(script):
    """Check F: at once, with x = 0, the individual gradient; or later, with what it has."""
    A = torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=F64))
    b = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    x, stopped, residual = script.guarded_solve(A.__matmul__, b, 0.0, 10)
    assert stopped and not x.any() and residual() == 1
    b = torch.ones(3, dtype=F64)
    x, stopped, _ = script.guarded_solve(A.__matmul__, b, 0.0, 10)
    assert stopped and x.any() and x @ b > 0
    x, stopped, _ = script.guarded_solve(A.__matmul__, b, 1.0, 10)  # damping goes on with a plus
    assert not stopped and relative(x, torch.linalg.solve(A + torch.eye(3, dtype=F64), b)) < 1e-8


# ---- Total derivatives -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["relu", "tanh", "silu"])
def test_the_mixed_products_against_double_backward(script, form):
    """(d_theta d_omega L) x = -2 mean z d_theta y for any x, without a double backward, and (d_omega d_theta f) x."""
    p = problem(script, form=form)
    x = torch.randn(len(p.omega), dtype=F64)
    want = grad(lambda theta: grad(p.L, 1)(theta, p.omega) @ x)(p.theta)
    z = (jacrev(lambda omega: p.critics(omega, p.pairs))(p.omega) @ x).sum(0)
    got = -2 * flat(torch.autograd.grad((z * p.backups).mean(), list(p.agent.actor.parameters()), retain_graph=True))
    assert want.norm() > 1e-3 and relative(got, want) < 1e-12
    x = torch.randn(len(p.theta), dtype=F64)
    want = grad(lambda omega: grad(p.f)(p.theta, omega) @ x)(p.omega)
    got = script.critic_correction(p.agent, p.obs, p.here, x)
    assert want.norm() > 1e-3 and relative(got, want) < 1e-12


@pytest.mark.parametrize("form", ["relu", "tanh", "silu"])
def test_leaders_gradients_are_the_dense_total_derivatives(script, form):
    """Eq. (15) and (16) with damping, full Hessians, from the definition; for the kernel with critics linearised where they
    are. The damping is on what the follower minimises: with the other sign all would fail."""
    p = problem(script, form=form)

    def gauss_newton_loss(theta, moving):
        line = torch.func.jvp(lambda omega: p.critics(omega, p.pairs), (p.omega,), (moving - p.omega,))[1]
        return ((p.critics(p.omega, p.pairs) + line - p.y(theta)) ** 2).mean(1).sum()

    want = total_gradient(p.f, gauss_newton_loss, p.theta, p.omega, 0.3)
    assert relative(actor_gradient(script, p, 0.3), want) < 1e-8
    damping = 1 - 2 * torch.linalg.eigvalsh(hessian(p.L, 1)(p.theta, p.omega))[0].item()
    want = total_gradient(p.f, p.L, p.theta, p.omega, damping)
    assert relative(actor_gradient(script, p, damping, "cg"), want) < 1e-6
    assert relative(grad(p.f)(p.theta, p.omega), want) > 1e-3
    damping = 0.1 - 2 * torch.linalg.eigvalsh(hessian(p.f)(p.theta, p.omega))[0].item()
    want = total_gradient(lambda w, theta: p.L(theta, w), lambda w, theta: p.f(theta, w), p.omega, p.theta, damping)
    assert relative(critic_gradient(script, p, damping), want) < 1e-6
    assert relative(grad(p.L, 1)(p.theta, p.omega), want) > 1e-3


def test_the_actors_total_derivative_is_that_of_a_critic_solved_again(script):
    """Check B with the script's own solves: linear critics, at their optimum, undamped."""
    p = problem(script, n=30, form="linear")
    pairs = torch.cat([p.pairs, torch.ones(30, 1, dtype=F64)], 1)

    def response(theta):
        solution = torch.linalg.lstsq(pairs, p.y(theta)[:, None]).solution[:, 0]
        return solution.repeat(len(p.agent.critics))

    with torch.no_grad():
        parameters = list(p.agent.critics.parameters())
        for parameter, value in zip(parameters, script.unflatten(response(p.theta), parameters)):
            parameter.copy_(value)
        if len(p.agent.critics) == 2:  # a tie of equal critics has no derivative
            p.agent.critics[1][0].bias += 1.0
    p.data = script.CriticJacobian(p.agent.critics, p.pairs)
    p.errors = p.data.values - p.backups.detach()
    p.led = script.CriticJacobian(p.agent.critics, p.led_pairs, least=True)
    p.slopes = p.led.slopes[:, D:]
    assert p.data.vjp(p.errors).chunk(len(p.agent.critics))[0].norm() < 1e-10
    offset = flat(p.agent.critics.parameters()).detach() - response(p.theta)
    truth = grad(lambda theta: p.f(theta, response(theta) + offset))(p.theta)
    assert relative(actor_gradient(script, p, 0.0, "cg"), truth) < 1e-8
    assert relative(actor_gradient(script, p, 1e-8), truth) < 1e-6  # linear: Gauss-Newton is the Hessian
    units = 1e-5 * torch.eye(len(p.theta), dtype=F64)[:5]

    def led(theta):
        return p.f(theta, response(theta) + offset)

    differences = torch.stack([(led(p.theta + unit) - led(p.theta - unit)) / 2e-5 for unit in units])
    assert relative(differences, truth[:5]) < 1e-6
    assert relative(grad(p.f)(p.theta, flat(p.agent.critics.parameters()).detach()), truth) > 0.1


def test_where_the_actor_still_plays_the_stored_actions_the_response_is_minus_one_half():
    """Then b = -J^T 1 / n and K^-1 J b = -1/2 in every row: undamped, the actor climbs Q(s, mu(s)) + gamma Q'(s', mu(s'))."""
    p = problem(stddpg)
    z = stddpg.kernel_response(p.data, p.data, 1e-10)
    torch.testing.assert_close(z, torch.full((1, N), -0.5, dtype=F64), rtol=0, atol=1e-6)


def test_the_correction_falls_like_one_over_lambda(script):
    """Proposition 2, for both leaders and both solves."""
    p = problem(script)
    own = grad(p.f)(p.theta, p.omega)
    for ihvp in ("kernel", "cg"):
        norms = [(actor_gradient(script, p, damping, ihvp) - own).norm().item() for damping in (1e7, 1e8)]
        assert norms[0] > 0 and norms[0] / norms[1] == pytest.approx(10, rel=1e-4)
    own = grad(p.L, 1)(p.theta, p.omega)
    norms = [(critic_gradient(script, p, damping) - own).norm().item() for damping in (1e6, 1e7)]
    assert norms[0] > 0 and norms[0] / norms[1] == pytest.approx(10, rel=1e-4)


def test_the_leader_in_numbers(script):
    own, total = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])
    found = script.leader_diagnostics(own, total)
    assert found == pytest.approx(
        {"bilevel/direct_norm": 3, "bilevel/correction_norm": 4, "bilevel/multiplier": 5 / 3, "bilevel/cosine": 0.6}
    )
    assert not math.isfinite(script.leader_diagnostics(torch.zeros(2), total)["bilevel/multiplier"])


def test_a_detached_backup_removes_the_correction(script):
    p = problem(script)
    own = grad(p.f)(p.theta, p.omega)
    assert relative(actor_gradient(script, p, 1.0, backups=p.backups.detach()), own) < 1e-12
    assert relative(actor_gradient(script, p, 1.0), own) > 1e-2
    with torch.no_grad():
        detached = script.backup(p.agent, p.rewards, p.discounts, p.next_obs, p.there)
    assert torch.equal(detached, p.backups.detach()) and not detached.requires_grad
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in p.agent.targets.parameters())


def test_a_termination_cuts_the_backup(script):
    p = problem(script)
    assert (p.discounts == 0).any()
    assert torch.equal(p.backups[p.discounts == 0], p.rewards[p.discounts == 0])
    assert (p.backups != p.rewards)[p.discounts > 0].all()


# ---- The squashed Gaussian -------------------------------------------------------------------------------------
def test_squashed_gaussian_has_its_own_density():
    torch.manual_seed(0)
    agent = new_agent(stsac)
    outputs, noise = 0.5 * torch.randn(50, 2 * A, dtype=F64), torch.randn(50, A, dtype=F64)
    actions, costs = agent.policy(outputs, noise)
    base = torch.distributions.Normal(outputs[:, :A], outputs[:, A:].exp())
    density = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform(cache_size=1))
    torch.testing.assert_close(costs, 0.2 * density.log_prob(actions).sum(-1), rtol=1e-8, atol=1e-8)
    agent.actor = nn.Identity()
    assert torch.equal(agent.explore(outputs, noise), actions)
    agent.set_action_space(gym.spaces.Box(-1, 1, (A,)))
    torch.testing.assert_close(agent.double()(outputs.float()), torch.tanh(outputs[:, :A]), rtol=0, atol=1e-6, check_dtype=False)
    _, far = agent.policy(torch.tensor([[30.0, 30.0, 99.0, -99.0]], dtype=F64), torch.zeros(1, A, dtype=F64))
    assert far.isfinite().all()


def test_deterministic_actor_explores_within_the_box():
    agent, outputs, noise = new_agent(stddpg).float(), torch.randn(500, A), torch.randn(500, A)
    agent.actor = nn.Identity()
    actions = agent.explore(outputs, noise)
    assert actions.abs().max() == 1
    inside = actions.abs() < 1
    assert abs((actions - torch.tanh(outputs)) / 0.1 - noise)[inside].max() < 1e-4
    chosen, costs = agent.policy(outputs, torch.empty(500, 0))
    agent.set_action_space(gym.spaces.Box(-1, 1, (A,)))
    torch.testing.assert_close(agent(outputs), chosen)
    assert not costs.any()


def test_actions_are_spread_over_the_box_of_the_task(script):
    """Also over a box as wide as float32 allows, and one at its far end."""
    agent = new_agent(script).float()
    for low, high in (([0.1, -1.0], [0.4, 2.0]), ([-1.7e38, 1e30], [1.7e38, 2e30])):
        space = gym.spaces.Box(np.float32(low), np.float32(high))
        script.check_action_space("Some-v0", space)
        agent.set_action_space(space)
        for action, wanted in ((-1.0, low), (1.0, high), (0.0, np.mean([low, high], 0))):
            got = agent.task_actions(torch.full((3, A), action))
            torch.testing.assert_close(got, torch.tensor(wanted).float().expand(3, A), rtol=1e-6, atol=1e32)
            assert all(space.contains(each.numpy()) for each in got)


BOXES = {
    "float32 that overflows": gym.spaces.Box(-3e38, 3e38, (2,), np.float32),
    "float64 that overflows": gym.spaces.Box(-1.7e308, 1.7e308, (2,), np.float64),
    "too wide for float32": gym.spaces.Box(-1e300, 1e300, (2,), np.float64),
    "empty in one number": gym.spaces.Box(np.float32([0, 1]), np.float32([1, 1])),
    "equal in float32": gym.spaces.Box(np.float64([0, 1]), np.float64([1, 1 + 1e-12]), dtype=np.float64),
    "unbounded": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "half bounded": gym.spaces.Box(0, np.inf, (2,), np.float32),
    "integers": gym.spaces.Box(0, 5, (2,), np.int64),
    "a matrix": gym.spaces.Box(-1, 1, (2, 2), np.float32),
    "no number": gym.spaces.Box(-1, 1, (0,), np.float32),
    "discrete": gym.spaces.Discrete(3),
}


@pytest.mark.parametrize("name", BOXES)
def test_action_spaces_that_cannot_be_spread_over_are_refused(script, name):
    with pytest.raises(script.BadInput, match="Some-v0' has the action space .*needs a flat Box of floats with low < high"):
        script.check_action_space("Some-v0", BOXES[name])
