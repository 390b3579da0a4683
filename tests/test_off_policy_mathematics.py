"""The mathematics of stddpg.py and stsac.py in float64: derivatives of ReLU stacks against torch.func, solves against dense
ones, the leader's gradient against the dense total derivative and against a follower that is solved again."""

import math
from types import SimpleNamespace

import pytest
import stddpg
import stsac
import torch
from stackelberg_toy import total_gradient
from torch.func import functional_call, grad, hessian, jacrev

F64, N, D, A = torch.float64, 14, 3, 2
SIZES = {"actor_width": 6, "critic_width": 7, "exploration_noise": 0.1, "entropy_coef": 0.2}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.fixture(params=[stddpg, stsac], ids=["stddpg", "stsac"])
def script(request):
    return request.param


def problem(script, linear: bool = False, n: int = N) -> SimpleNamespace:
    """An agent and a minibatch in float64, f and L as functions of flat theta and omega, made from the paper's formulas
    alone (no function of the script but the policy), and what the scripts make of the batch."""
    torch.manual_seed(5)
    agent = script.Agent(D, A, SimpleNamespace(**SIZES)).double()
    if linear:  # critics that are linear in omega
        agent.critics = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(D + A, 1)) for _ in agent.critics]).double()
    for target in agent.targets:  # unlike the critics
        for parameter in target.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    obs, actions, next_obs = torch.randn(n, D, dtype=F64), torch.rand(n, A, dtype=F64) * 2 - 1, torch.randn(n, D, dtype=F64)
    rewards, discounts = 3 * torch.randn(n, dtype=F64), 0.99 * (torch.rand(n) > 0.2).double()
    here, there = torch.randn(2, n, agent.noise_dim, dtype=F64)
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
    data = script.stacks(agent.critics, pairs)
    errors = script.td_errors(data, backups)
    chosen, costs = agent.policy(agent.actor(obs), here)
    led, least, slopes = script.led_critics(agent, obs, chosen)
    return SimpleNamespace(**locals())


def actor_gradient(script, p, damping, ihvp="kernel", iterations=200, backups=None) -> torch.Tensor:
    """The gradient in theta that the script forms when the actor leads."""
    z, _ = script.critic_response(p.data, p.errors, p.led, p.least, damping, ihvp, iterations)
    backups = p.backups if backups is None else backups
    loss = script.policy_loss(p.chosen, p.costs, p.slopes) + 2 * (z.sum(0) * backups).mean()
    return flat(torch.autograd.grad(loss, list(p.agent.actor.parameters()), retain_graph=True))


def critic_gradient(script, p, damping, iterations=200) -> torch.Tensor:
    """The gradient in omega that the script forms when the critic leads."""
    thetas = list(p.agent.actor.parameters())
    b = flat(torch.autograd.grad(-2 * (p.errors.sum(0) * p.backups).mean(), thetas, retain_graph=True))
    x, _ = script.actor_response(p.agent, p.obs, p.here, p.slopes, b, damping, iterations)
    correction = script.critic_correction(p.agent, p.obs, p.here, p.led, p.least, x)
    return flat(script.critic_gradient(p.data, p.errors)) - flat(correction)


# ---- ReLU stacks -----------------------------------------------------------------------------------------------
def test_first_derivatives_of_a_stack(script):
    p = problem(script)
    critic, stack, count = p.agent.critics[0], p.data[0], len(flat(p.agent.critics[0].parameters()))
    own = p.omega[:count]
    jacobian = jacrev(lambda omega: p.critics(torch.cat([omega, p.omega[count:]]), p.pairs)[0])(own)
    u, v = torch.randn(N, dtype=F64), torch.randn(count, dtype=F64)
    assert relative(stack.outputs[:, 0], critic(p.pairs)[:, 0]) < 1e-13
    assert relative(flat(stack.vjp(u)), jacobian.T @ u) < 1e-12
    parts = script.unflatten(v, critic.parameters())
    assert torch.equal(script.flatten(parts), v)
    assert relative(stack.jvp(parts), jacobian @ v) < 1e-12
    assert relative(stack.move(parts)[-1][:, 0], jacobian @ v) < 1e-12
    assert relative(stack.kernel(stack), jacobian @ jacobian.T) < 1e-12
    rows = torch.cat([p.obs, p.chosen.detach()], 1)
    other = jacrev(lambda omega: p.critics(torch.cat([omega, p.omega[count:]]), rows)[0])(own)
    assert relative(stack.kernel(p.led[0]), jacobian @ other.T) < 1e-12


def test_slope_gradient_of_a_stack(script):
    p = problem(script)
    count = len(p.omega) // len(p.agent.critics)
    u, direction = torch.randn(N, dtype=F64), torch.randn(N, D + A, dtype=F64)

    def directional(omega):
        def values(rows):
            return p.critics(torch.cat([omega, p.omega[count:]]), rows)[0]

        return u @ torch.func.jvp(values, (p.pairs,), (direction,))[1]

    assert relative(flat(p.data[0].slope_gradient(u, direction)), grad(directional)(p.omega[:count])) < 1e-12


def test_own_gradients_of_both_players(script):
    p = problem(script)
    assert relative(flat(script.critic_gradient(p.data, p.errors)), grad(p.L, 1)(p.theta, p.omega)) < 1e-12
    loss = script.policy_loss(p.chosen, p.costs, p.slopes)
    own = flat(torch.autograd.grad(loss, list(p.agent.actor.parameters()), retain_graph=True))
    assert relative(own, grad(p.f)(p.theta, p.omega)) < 1e-12
    following = p.rewards, p.discounts, p.next_obs, p.there
    for follower, want in (("critic", grad(p.L, 1)(p.theta, p.omega)), ("actor", own)):
        got = script.follower_gradient(p.agent, follower, p.pairs, p.obs, p.here, following)
        assert relative(flat(got), want) < 1e-12


def test_hessians_against_dense_ones(script):
    """The actor's also through the critics, which are piecewise linear in the action: nothing of theirs is missing."""
    p = problem(script)
    for product, dense in (
        (script.critic_hessian(p.data, p.errors), hessian(p.L, 1)(p.theta, p.omega)),
        (script.actor_hessian(p.agent, p.obs, p.here, p.slopes), hessian(p.f)(p.theta, p.omega)),
    ):
        v = torch.randn(len(dense), dtype=F64)
        assert relative(product(v), dense @ v) < 1e-12
        eigenvalues = torch.linalg.eigvalsh(dense)
        assert eigenvalues[0] < -1e-3 < 1e-3 < eigenvalues[-1]  # indefinite, both


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
    z, solve = script.critic_response(p.data, p.errors, p.led, p.least, damping, "kernel", 0)
    assert relative(z.flatten(), want) < 1e-10 and not solve.plain and not solve.stopped
    assert solve.residual() < 1e-10
    assert script.kernel_residual(p.data, p.led, p.least, 1.01 * z, damping) > 1e-5  # it is no constant


def test_kernel_residual_is_that_of_the_full_system(script):
    p = problem(script)
    jacobian, H, b = gauss_newton(p)
    z = torch.randn(len(p.agent.critics), N, dtype=F64)
    x = (b - 2 / N * jacobian.T @ z.flatten()) / 0.5
    want = (H @ x + 0.5 * x - b).norm() / b.norm()
    assert script.kernel_residual(p.data, p.led, p.least, z, 0.5).item() == pytest.approx(want.item(), rel=1e-10)


def test_kernel_gives_the_individual_gradient_where_its_system_is_not_finite(script):
    p = problem(script)
    z, solve = script.critic_response(p.data, p.errors, p.led, p.least, math.nan, "kernel", 0)
    assert not z.any() and solve.plain


def test_conjugate_gradient_response_against_a_dense_solve(script):
    p = problem(script)
    jacobian, _, b = gauss_newton(p)
    H = hessian(p.L, 1)(p.theta, p.omega)
    damping = 1 - 2 * torch.linalg.eigvalsh(H)[0].item()
    want = jacobian @ torch.linalg.solve(H + damping * torch.eye(len(b), dtype=F64), b)
    z, solve = script.critic_response(p.data, p.errors, p.led, p.least, damping, "cg", 200)
    assert relative(z.flatten(), want) < 1e-5 and not solve.stopped and not solve.plain
    assert solve.residual() < 1e-5


def test_the_guard_stops_at_a_constructed_indefinite_matrix(script):
    """Check F: at once, with x = 0, the individual gradient; or later, with what it has."""
    A = torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=F64))
    b = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    x, solve = script.guarded_solve(A.__matmul__, b, 0.0, 10)
    assert solve.stopped and solve.plain and not x.any() and solve.residual() == 1
    b = torch.ones(3, dtype=F64)
    x, solve = script.guarded_solve(A.__matmul__, b, 0.0, 10)
    assert solve.stopped and not solve.plain and x @ b > 0
    x, solve = script.guarded_solve(A.__matmul__, b, 1.0, 10)  # damping goes on with a plus
    assert not solve.stopped and relative(x, torch.linalg.solve(A + torch.eye(3, dtype=F64), b)) < 1e-8


# ---- Total derivatives -----------------------------------------------------------------------------------------
def test_the_mixed_products_against_double_backward(script):
    """(d_theta d_omega L) x = -2 mean z d_theta y for any x, and (d_omega d_theta f) x, each without a double backward."""
    p = problem(script)
    x = torch.randn(len(p.omega), dtype=F64)
    want = grad(lambda theta: grad(p.L, 1)(theta, p.omega) @ x)(p.theta)
    z = (jacrev(lambda omega: p.critics(omega, p.pairs))(p.omega) @ x).sum(0)
    got = -2 * flat(torch.autograd.grad((z * p.backups).mean(), list(p.agent.actor.parameters()), retain_graph=True))
    assert want.norm() > 1e-3 and relative(got, want) < 1e-12
    x = torch.randn(len(p.theta), dtype=F64)
    want = grad(lambda omega: grad(p.f)(p.theta, omega) @ x)(p.omega)
    got = flat(script.critic_correction(p.agent, p.obs, p.here, p.led, p.least, x))
    assert want.norm() > 1e-3 and relative(got, want) < 1e-12


def test_leaders_gradients_are_the_dense_total_derivatives(script):
    """Eq. (15) and (16) with damping, full Hessians, from the definition. The damping is on what the follower minimises:
    with the other sign both would fail."""
    p = problem(script)
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
    p = problem(script, linear=True, n=30)
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
    p.data = script.stacks(p.agent.critics, p.pairs)
    p.errors = script.td_errors(p.data, p.backups)
    p.led, p.least, p.slopes = script.led_critics(p.agent, p.obs, p.chosen)
    assert flat(script.critic_gradient(p.data[:1], p.errors[:1])).norm() < 1e-10
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
    led = stddpg.stacks(p.agent.critics, p.pairs)
    z = stddpg.kernel_response(p.data, led, torch.ones(1, N, dtype=F64), 1e-10)
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
    assert math.isnan(script.leader_diagnostics(torch.zeros(2), total)["bilevel/multiplier"])


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
    agent = stsac.Agent(D, A, SimpleNamespace(**SIZES)).double()
    outputs, noise = 0.5 * torch.randn(50, 2 * A, dtype=F64), torch.randn(50, A, dtype=F64)
    actions, costs = agent.policy(outputs, noise)
    base = torch.distributions.Normal(outputs[:, :A], outputs[:, A:].exp())
    density = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform(cache_size=1))
    torch.testing.assert_close(costs, 0.2 * density.log_prob(actions).sum(-1), rtol=1e-8, atol=1e-8)
    assert abs(torch.from_numpy(agent.act(outputs.numpy(), noise.numpy())) - actions).max() < 1e-12
    assert abs(torch.from_numpy(agent.act(outputs.numpy(), 0.0)) - torch.tanh(outputs[:, :A])).max() < 1e-12
    _, far = agent.policy(torch.tensor([[30.0, 30.0, 99.0, -99.0]], dtype=F64), torch.zeros(1, A, dtype=F64))
    assert far.isfinite().all()


def test_deterministic_actor_explores_within_the_box():
    agent = stddpg.Agent(D, A, SimpleNamespace(**SIZES))
    outputs, noise = torch.randn(500, A).numpy(), torch.randn(500, A).numpy()
    actions = agent.act(outputs, noise)
    assert abs(actions).max() == 1
    inside = abs(actions) < 1
    assert abs((actions - torch.tanh(torch.from_numpy(outputs)).numpy()) / 0.1 - noise)[inside].max() < 1e-4
    chosen, costs = agent.policy(torch.from_numpy(outputs), torch.empty(500, 0))
    assert abs(torch.from_numpy(agent.act(outputs, 0.0)) - chosen).max() < 1e-6 and not costs.any()
