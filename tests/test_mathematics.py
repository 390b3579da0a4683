"""The pure functions against closed forms, dense matrices and loops, in float64."""

import importlib

import pytest
import torch
import torch.nn as nn
from test_networks import dense_jacobian, some_critic

import blpo_continuous as blpo
import ppo_continuous as ppo

DOUBLE = torch.float64


def random_rollout(steps=23, envs=3, seed=0, p_end=0.25):
    """Rewards, values and consistent flags (T, N) / (T+1, N): a row that follows an ended one is a reset."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(n, envs, generator=generator, dtype=DOUBLE) for n in (steps, steps + 1))
    terminated, truncated, valid = torch.zeros(steps, envs), torch.zeros(steps, envs), torch.ones(steps, envs)
    for n in range(envs):
        for t in range(steps):
            if t > 0 and (terminated[t - 1, n] or truncated[t - 1, n]):
                valid[t, n] = 0
            elif torch.rand((), generator=generator) < p_end:
                (terminated if torch.rand((), generator=generator) < 0.5 else truncated)[t, n] = 1
    assert terminated.sum() > 2 and truncated.sum() > 2
    return rewards, values, terminated.double(), truncated.double(), valid.double()


def gae_by_loop(rewards, values, terminated, ended, gamma, gae_lambda):
    """The recursion of Schulman et al. 2016, eq. 16, one step at a time."""
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * (1 - terminated[t]) * values[t + 1] - values[t]
        last = delta + gamma * gae_lambda * (1 - ended[t]) * last
        advantages[t] = last
    return advantages


@pytest.fixture(scope="module")
def laboratory():
    """The laboratory, imported by the tests that need it alone."""
    return importlib.import_module("blpo_continuous_ablations")


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 23])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_equals_the_loop_step_by_step(steps, gae_lambda):
    rewards, values, terminated, truncated, valid = (x[:steps] for x in random_rollout())
    values = random_rollout()[1][: steps + 1]
    ended = terminated + truncated
    expected = gae_by_loop(rewards, values, terminated, ended, 0.99, gae_lambda)
    actual = ppo.gae(rewards, values, 0.99 * (1 - terminated), 0.99 * gae_lambda * (1 - ended))
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)


def test_gae_does_not_change_its_inputs():
    rewards, values, terminated, truncated, _ = random_rollout()
    inputs = rewards, values, 0.99 * (1 - terminated), 0.94 * (1 - terminated - truncated)
    copies = [x.clone() for x in inputs]
    ppo.gae(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(copies, inputs))


def test_the_laboratorys_chunks_are_consecutive_steps_of_one_environment(laboratory):
    grid = torch.arange(9)[:, None] * 100 + torch.arange(4)  # time * 100 + environment, (T + 1, N)
    chunks, inner = laboratory.chunked(grid, 4, after=1), laboratory.chunked(grid[:-1], 4)
    assert chunks.shape == (5, 8) and torch.equal(chunks[:-1], inner)
    assert (chunks % 100 == chunks[:1] % 100).all() and (chunks.diff(dim=0) == 100).all()
    assert sorted(inner.flatten().tolist()) == sorted(grid[:-1].flatten().tolist())


@pytest.mark.parametrize("decay", [0.0, 0.94, 1.0])
def test_the_trace_sums_within_an_episode_and_is_the_transpose_of_gae(decay):
    """W x = sum_{k >= t} decay^(k-t) x_k, its transpose the trace sum_{t <= k} decay^(k-t) x_t, both over the transitions
    of one episode."""
    _, _, terminated, truncated, valid = random_rollout()
    ended, (x, y) = terminated + truncated, valid * torch.randn(2, 23, 3, dtype=DOUBLE)
    expected = torch.zeros_like(x)
    for n in range(3):
        for t in range(23):
            for k in range(t, 23):
                if valid[t : k + 1, n].all() and not ended[t:k, n].any():
                    expected[k, n] += decay ** (k - t) * x[t, n]
    before, decays = x.clone(), decay * (1 - ended)
    trace = blpo.trace(x, decays)
    assert torch.allclose(trace, expected, rtol=0, atol=1e-12) and torch.equal(x, before)
    if decay == 0:
        assert torch.equal(trace, x)
    zero = torch.zeros(24, 3, dtype=DOUBLE)
    forward = valid * blpo.gae(y, zero, zero[1:], decays)
    assert torch.allclose((trace * y).sum(), (x * forward).sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95])
def test_lambda_returns_vjp_is_the_transpose(gae_lambda):
    rewards, values, terminated, truncated, valid = random_rollout()
    decay, discounts = 0.99 * gae_lambda * (1 - terminated - truncated), 0.99 * (1 - terminated)
    slopes = valid * torch.randn_like(rewards)
    values.requires_grad_()
    (slopes * (ppo.gae(rewards, values, discounts, decay) + values[:-1])).sum().backward()
    assert torch.allclose(blpo.lambda_returns_vjp(slopes, discounts, decay), values.grad, rtol=0, atol=1e-12)


def test_a_reset_row_reaches_no_return_and_no_gradient():
    rewards, values, terminated, truncated, valid = random_rollout()
    decay, discounts, reset = 0.99 * 0.95 * (1 - terminated - truncated), 0.99 * (1 - terminated), valid == 0

    def returns(values, rewards):
        return ppo.gae(rewards, values, discounts, decay) + values[:-1]

    changed_rewards = torch.where(reset, 1e6, rewards)
    after_termination, after_truncation = (
        torch.cat([torch.zeros(1, 3, dtype=torch.bool), x.bool()]) for x in (terminated, truncated)
    )
    changed_values = torch.where(after_termination, -1e6, values)  # the final observation of a terminated episode
    now = returns(values, rewards)
    assert torch.allclose(now[~reset], returns(changed_values, changed_rewards)[~reset], rtol=0, atol=1e-12)
    bootstrapped = returns(torch.where(after_truncation, -1e6, values), rewards)
    assert (now != bootstrapped)[truncated.bool()].all()  # each truncated row bootstraps from its final observation
    slopes = valid * torch.randn_like(rewards)
    u = blpo.lambda_returns_vjp(slopes, discounts, decay)
    assert (u[after_termination] == 0).all()


@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_a_truncated_stream_of_ones_is_worth_one_over_one_minus_gamma(gamma):
    """Constant reward 1, cut every 10 steps: the value 1 / (1 - gamma) is a fixed point only if cuts bootstrap."""
    steps = 40
    rewards = torch.ones(steps, 1, dtype=DOUBLE)
    cut = torch.zeros(steps, 1, dtype=DOUBLE)
    cut[9::11] = 1  # each cut is followed by a reset row
    valid = torch.ones_like(cut)
    valid[10::11], rewards[10::11] = 0, 0.0
    values = torch.full((steps + 1, 1), 1 / (1 - gamma), dtype=DOUBLE)
    decay = gamma * 0.95 * (1 - cut)
    truncated = ppo.gae(rewards, values, torch.full_like(cut, gamma), decay)[valid == 1]
    terminated = ppo.gae(rewards, values, gamma * (1 - cut), decay)[valid == 1]
    assert truncated.abs().max() < 1e-10
    assert terminated.min() < -1.0


def test_ppo_surrogate_and_its_slope():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 0.5, 0.9, 1.0, 1.1, 1.5], dtype=DOUBLE)
    advantages = torch.tensor([2.0] * 5 + [-2.0] * 5, dtype=DOUBLE, requires_grad=True)
    surrogate = ppo.clipped_surrogate(ratio, advantages, 0.2)
    expected = torch.tensor([1.0, 1.8, 2.0, 2.2, 2.4, -1.6, -1.8, -2.0, -2.2, -3.0], dtype=DOUBLE)
    assert torch.allclose(surrogate, expected, atol=1e-15)
    surrogate.sum().backward()
    assert torch.allclose(blpo.surrogate_slope(ratio, advantages.detach(), 0.2), advantages.grad, atol=1e-15)


def test_surrogate_takes_the_unclipped_branch_at_ratio_one():
    """At the first minibatch all ratios are 1: the gradient must flow through r in every row."""
    ratio = torch.ones(4, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 3.0, 0.5])
    ppo.clipped_surrogate(ratio, advantages, 0.2).sum().backward()
    assert torch.equal(ratio.grad, advantages)


def test_value_loss_clips_as_openai_baselines_do():
    values, old, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9]), torch.tensor([2.0, 0.0])
    assert ppo.value_loss(values, old, returns, None) == pytest.approx(0.5 * (1 + 1) / 2)
    assert ppo.value_loss(values, old, returns, 0.2) == pytest.approx(0.5 * (1.8**2 + 1) / 2)


def system(n=30):
    """Gauss-Newton's curvature with unequal and zero weights, its dense matrix, b = J^T u and u."""
    critic, obs, weights = some_critic("tanh"), torch.randn(n, 5, dtype=DOUBLE), torch.rand(n, dtype=DOUBLE)
    weights[::7] = 0.0
    weights /= weights.sum()
    u, dense = torch.randn(n, dtype=DOUBLE), dense_jacobian(critic, obs)
    return blpo.GaussNewton(blpo.CriticJacobian(critic, obs), weights), 2 * dense.T @ (weights[:, None] * dense), u @ dense, u


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_exact_and_cg_solve_the_damped_system(damping, laboratory):
    curvature, matrix, b, u = system()
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(b), dtype=DOUBLE), b)
    for (right, v), tolerance in (
        (laboratory.exact_ihvp(curvature, u, damping), 1e-9),
        (blpo.cg_ihvp(curvature, u, damping, 200), 1e-4),
    ):
        assert torch.allclose(right, b, rtol=1e-12, atol=1e-12)
        assert torch.allclose(v, expected, rtol=tolerance, atol=tolerance * expected.norm())


def test_an_exact_solve_that_rounding_has_made_indefinite_is_nan(laboratory, monkeypatch):
    """So that the step falls back to the direct gradient and is counted, instead of a finite number without meaning."""
    curvature, _, b, u = system()
    kernel = laboratory.kernel(curvature.jacobian)
    monkeypatch.setattr(laboratory, "kernel", lambda _: kernel - 5 * torch.eye(len(u), dtype=DOUBLE))
    assert laboratory.exact_ihvp(curvature, u, 1.0)[1].isfinite().all()
    right, v = laboratory.exact_ihvp(curvature, u, 1e-6)
    assert torch.allclose(right, b) and v.isnan().all()


@pytest.mark.parametrize("damping", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_the_mean_weight_is_how_much_the_returns_move_with_the_critics_level(gae_lambda, damping, laboratory):
    """beta, the output's bias, moves all values alike: row beta of (H + alpha I) v = b says mean 2z + alpha v_beta =
    d/dc mean ratio G(V + c), whatever the critic, its data and alpha are (docs/blpo_history.md)."""
    rewards, values, terminated, truncated, valid = random_rollout()
    obs = torch.randn(values.numel(), 5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    weights, discounts = valid / valid.sum(), 0.99 * (1 - terminated)
    decay = 0.99 * gae_lambda * (1 - terminated - truncated)
    slopes = weights * torch.rand(valid.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)  # ratios away from 1
    critic = some_critic("tanh")
    jacobian = blpo.CriticJacobian(critic, obs)
    curvature = blpo.GaussNewton(jacobian, torch.cat([weights, 0 * weights[:1]]).flatten())
    u = blpo.lambda_returns_vjp(slopes, discounts, decay).flatten()
    b, v = laboratory.exact_ihvp(curvature, u, damping)
    z = jacobian.jvp(v).view(values.shape)[:-1]
    moved, still = ((slopes * (ppo.gae(rewards, x, discounts, decay) + x[:-1])).sum() for x in (values + 1, values))
    assert torch.allclose((weights * 2 * z).sum() + damping * v[-1], moved - still, rtol=0, atol=1e-8)


@pytest.mark.parametrize("length", [64, 256])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.9, 0.95, 1.0])
def test_how_much_the_returns_of_a_whole_rollout_move_with_the_critics_level(gae_lambda, length):
    """The closed form of docs/blpo_history.md for rollouts or chunks in which nothing ends: with m steps to the end,
    gamma (1 - lambda)(1 - x^m) / (1 - x) + gamma x^m, x = gamma lambda, on average over m = 0 .. length - 1."""
    gamma = 0.99
    expected = {
        64: {0.0: 0.99, 0.5: 0.9805, 0.9: 0.9200, 0.95: 0.8726, 1.0: 0.7338},
        256: {0.0: 0.99, 0.5: 0.9803, 0.9: 0.9112, 0.95: 0.8423, 1.0: 0.3572},
    }[length][gae_lambda]
    x, m = gamma * gae_lambda, torch.arange(length, dtype=DOUBLE)
    closed = (gamma * (1 - gae_lambda) * (1 - x**m) / (1 - x) + gamma * x**m).mean()
    every = torch.ones(length, 1, dtype=DOUBLE)
    u = blpo.lambda_returns_vjp(every / length, gamma * every, x * every)
    assert torch.allclose(u.sum(), closed, rtol=0, atol=1e-12) and abs(closed - expected) < 5e-5
    if gae_lambda == 0:  # every row but the first moves gamma of one return: 2z = gamma there, the same for all
        assert u[0] == 0 and torch.allclose(u[1:], gamma / length * every, rtol=0, atol=1e-15)


def psd(n=60, rank=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, rank, generator=generator, dtype=DOUBLE)
    return factor @ factor.T / n, torch.randn(n, generator=generator, dtype=DOUBLE)


@pytest.mark.parametrize("damping", [50.0, 1.0, 0.1, 1e-3])
@pytest.mark.parametrize("case", ["full rank", "rank deficient", "dead coordinate"])
def test_nystrom_is_the_dense_inverse_of_its_approximation(case, damping):
    matrix, b = psd(rank=3 if case == "rank deficient" else 60)
    chosen = torch.tensor([4, 8, 15, 16, 23])
    if case == "dead coordinate":  # an input that is always 0, a unit that is dead
        matrix[8, :], matrix[:, 8] = 0.0, 0.0
    core = matrix[chosen][:, chosen]
    approximation = matrix[:, chosen] @ torch.linalg.pinv(core, hermitian=True) @ matrix[chosen]
    expected = torch.linalg.solve(approximation + damping * torch.eye(60, dtype=DOUBLE), b)
    actual = blpo.nystrom_solve(matrix[chosen], core, damping, b)
    assert torch.allclose(actual, expected, rtol=1e-8, atol=1e-8 * expected.norm())
    assert 0 < actual @ b <= b @ b / damping
    if case == "full rank":  # here the poster's formula is safe, and the same
        c = matrix[:, chosen]
        poster = b / damping - c @ torch.linalg.solve(core + c.T @ c / damping, c.T @ b) / damping**2
        assert torch.allclose(actual, poster, rtol=1e-8, atol=1e-8 * expected.norm())


def test_nystrom_of_all_coordinates_is_the_damped_inverse():
    matrix, b = psd()
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(60, dtype=DOUBLE), b)
    assert torch.allclose(blpo.nystrom_solve(matrix, matrix, 0.1, b), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-6, 0.1, 1.0, 1.5])
def test_nystrom_stays_positive_on_an_indefinite_matrix(damping):
    """The poster's formula has a pole at damping = -eigenvalue of H_q; the eigenvalue floor removes it."""
    matrix, b = psd()
    matrix = matrix - 0.8 * torch.eye(60, dtype=DOUBLE)
    chosen = torch.arange(5)
    assert torch.linalg.eigvalsh(matrix[chosen][:, chosen])[0] < 0
    v = blpo.nystrom_solve(matrix[chosen], matrix[chosen][:, chosen], damping, b)
    assert torch.isfinite(v).all() and 0 < v @ b <= b @ b / damping * (1 + 1e-12)


def test_nystrom_without_curvature_divides_by_the_damping():
    b = torch.randn(9, dtype=DOUBLE)
    zeros = torch.zeros(3, 9, dtype=DOUBLE)
    assert torch.allclose(blpo.nystrom_solve(zeros, torch.zeros(3, 3, dtype=DOUBLE), 4.0, b), b / 4, atol=1e-15)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_system_that_is_not_finite_gives_nan_and_no_error(broken):
    matrix, b = psd()
    columns, core = matrix[:5].clone(), matrix[:5, :5].clone()
    core[2, 2] = broken
    assert torch.isnan(blpo.nystrom_solve(columns, core, 1.0, b)).all()
    columns[1, 7] = broken
    assert torch.isnan(blpo.nystrom_solve(columns, matrix[:5, :5], 1.0, b)).all()


def test_an_identity_on_the_core_is_the_released_formula():
    """b/rho - C^T (M + I + C C^T / rho)^-1 C b / rho^2 with C the rows: the released code, float32 in the original."""
    matrix, b = psd()
    rows, rho = matrix[:5], 50.0
    core = matrix[:5, :5] + torch.eye(5, dtype=DOUBLE)
    released = b / rho - rows.T @ torch.linalg.solve(core + rows @ rows.T / rho, rows @ b) / rho**2
    assert torch.allclose(blpo.nystrom_solve(rows, core, rho, b), released, rtol=1e-10, atol=1e-12)


def test_nystrom_ihvp_is_the_dense_formula_on_its_directions():
    """Subspace iteration in the last layer; its Phi are the columns of the Jacobian that belong to that layer, times R."""
    curvature, matrix, b, u = system()
    jacobian, random = curvature.jacobian.vjp(torch.eye(30, dtype=DOUBLE)), torch.Generator().manual_seed(3)
    features = jacobian[:, -8:] * curvature.root[:, None]  # seven units and the bias
    powers = torch.linalg.matrix_power(features.T @ features, 2) @ torch.randn(4, 8, generator=random).double().T
    p = nn.functional.pad(torch.linalg.qr(powers)[0].T, (len(b) - 8, 0)).T
    approximation = matrix @ p @ torch.linalg.solve(p.T @ matrix @ p, p.T @ matrix)
    expected = torch.linalg.solve(approximation + 0.1 * torch.eye(len(b), dtype=DOUBLE), b)
    right, actual = blpo.nystrom_ihvp(curvature, u, 0.1, 4, torch.Generator().manual_seed(3))
    assert torch.allclose(right, b, rtol=1e-12, atol=1e-12)
    assert torch.allclose(actual, expected, rtol=1e-7, atol=1e-7 * expected.norm())


def test_more_directions_than_the_last_layer_has_add_nothing():
    curvature, _, _, u = system()
    found = [blpo.nystrom_ihvp(curvature, u, 0.1, rank, torch.Generator().manual_seed(0))[1] for rank in (8, 12)]
    assert torch.allclose(*found, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(found[0], blpo.nystrom_ihvp(curvature, u, 0.1, 4, torch.Generator().manual_seed(0))[1], rtol=1e-3)


@pytest.mark.parametrize("columns", ["features", "last-layer", "coordinates", "fixed", "gaussian", "krylov"])
def test_laboratory_columns_give_the_nystrom_inverse_of_their_span(laboratory, columns):
    curvature, matrix, b, _ = system()
    p = laboratory.nystrom_directions(columns, curvature, b, 4, torch.Generator().manual_seed(3))
    assert p.shape == (4, len(b))
    products = laboratory.curvature_products(curvature, p)
    assert torch.allclose(products, p @ matrix, atol=1e-11)
    approximation = products.T @ torch.linalg.pinv(p @ products.T, hermitian=True) @ products
    expected = torch.linalg.solve(approximation + 0.1 * torch.eye(len(b), dtype=DOUBLE), b)
    actual = blpo.nystrom_solve(products, p @ products.T, 0.1, b)
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6 * expected.norm())


def test_laboratory_features_are_the_methods_own(laboratory):
    curvature, matrix, b, u = system()
    p = laboratory.nystrom_directions("features", curvature, b, 4, torch.Generator().manual_seed(3))
    products = laboratory.curvature_products(curvature, p)
    _, mine = blpo.nystrom_ihvp(curvature, u, 0.1, 4, torch.Generator().manual_seed(3))
    assert torch.allclose(blpo.nystrom_solve(products, p @ products.T, 0.1, b), mine, rtol=1e-8, atol=1e-10)


def test_fixed_columns_are_the_same_whatever_the_generator(laboratory):
    curvature, _, b, _ = system()
    first, second = (
        laboratory.nystrom_directions("fixed", curvature, b, 4, torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_preconditioned_cg_against_a_direct_solve_and_faster_than_cg(laboratory, damping):
    curvature, matrix, b, u = system()
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(b), dtype=DOUBLE), b)
    p = laboratory.nystrom_directions("gaussian", curvature, b, 15, torch.Generator().manual_seed(0))
    columns = laboratory.curvature_products(curvature, p)
    sketch = columns, p @ columns.T
    solved = laboratory.preconditioned_cg_ihvp(curvature, b, damping, 100, *sketch)
    assert (solved - expected).norm() < 1e-4 * expected.norm()
    few = laboratory.preconditioned_cg_ihvp(curvature, b, damping, 6, *sketch)
    _, plain = blpo.cg_ihvp(curvature, u, damping, 6)
    energy = matrix + damping * torch.eye(len(b), dtype=DOUBLE)
    assert (few - expected) @ energy @ (few - expected) < (plain - expected) @ energy @ (plain - expected)


def test_conjugate_gradient_reaches_the_solution_in_n_steps():
    matrix, b = psd(n=8, rank=8)
    matrix = matrix + 0.5 * torch.eye(8, dtype=DOUBLE)
    expected = torch.linalg.solve(matrix, b)
    assert torch.allclose(blpo.conjugate_gradient(lambda v: matrix @ v, b, 8), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(blpo.conjugate_gradient(lambda v: matrix @ v, b, 3), expected, rtol=1e-3)


def test_conjugate_gradient_stops_at_non_positive_curvature():
    matrix = torch.diag(torch.tensor([2.0, 1.0, -3.0], dtype=DOUBLE))
    b = torch.tensor([1.0, 1.0, 0.9], dtype=DOUBLE)
    x = blpo.conjugate_gradient(lambda v: matrix @ v, b, 50)
    assert torch.isfinite(x).all()
    assert torch.equal(blpo.conjugate_gradient(lambda v: -v, b, 5), torch.zeros(3, dtype=DOUBLE))
    assert torch.equal(blpo.conjugate_gradient(lambda v: v, 0 * b, 5), torch.zeros(3, dtype=DOUBLE))


def test_a_step_of_the_follower_is_that_of_autograd():
    critic, obs, targets = some_critic("layer norm"), torch.randn(12, 5, dtype=DOUBLE), torch.randn(12, dtype=DOUBLE)
    loss = ((targets - critic(obs).squeeze(-1)) ** 2).mean()
    gradients = torch.autograd.grad(loss, [*critic.parameters()])
    before = [parameter.detach().clone() for parameter in critic.parameters()]
    optimiser = torch.optim.SGD(critic.parameters(), lr=0.1)
    for parameter in critic.parameters():
        parameter.grad = torch.ones_like(parameter)  # what was there before is forgotten
    assert torch.allclose(blpo.follower_step(critic, optimiser, obs, targets), loss, rtol=1e-12)
    for parameter, start, gradient in zip(critic.parameters(), before, gradients):
        assert torch.allclose(parameter, start - 0.1 * gradient, rtol=0, atol=1e-12)


def test_the_inner_gradient_vanishes_where_the_critic_has_answered():
    critic, obs, targets = some_critic("linear"), torch.randn(12, 5, dtype=DOUBLE), torch.randn(12, dtype=DOUBLE)
    dense = dense_jacobian(critic, obs)
    expected = 2 / 12 * dense.T @ (critic(obs).squeeze(-1) - targets)
    assert torch.allclose(blpo.inner_gradient_norm(critic, obs, targets), expected.norm(), rtol=1e-12)
    answer = torch.linalg.lstsq(dense, targets[:, None]).solution.flatten()
    nn.utils.vector_to_parameters(answer, critic.parameters())
    assert blpo.inner_gradient_norm(critic, obs, targets) < 1e-12


@pytest.mark.parametrize("length, expected", [(64, 0.24), (256, 0.06)])
def test_how_much_of_the_trace_a_start_cuts_off(length, expected):
    """On average over so many steps in which nothing ends, with z the same in all states: (x / n) (1 - x^n) / (1 - x),
    x = 0.99 * 0.95 (docs/blpo.md): a rollout of 256 steps, a chunk of 64."""
    x, ones = 0.99 * 0.95, torch.ones(length, 1, dtype=DOUBLE)
    missing = 1 - blpo.trace(ones, x * ones).mean() * (1 - x)  # of 1 / (1 - x), the trace that never began
    assert missing == pytest.approx(x / length * (1 - x**length) / (1 - x), abs=1e-12)
    assert missing == pytest.approx(expected, abs=0.005)


def test_laboratory_controls(laboratory):
    e, valid, ended = torch.arange(12.0).view(2, 6).T.contiguous(), torch.ones(6, 2), torch.zeros(6, 2)
    ended[2, 0] = 1.0
    valid[3, 0] = e[3, 0] = 0.0
    generator, kept = torch.Generator().manual_seed(0), valid > 0
    permuted = laboratory.controlled(e, valid, ended, "permuted", generator)
    assert sorted(permuted[kept].tolist()) == sorted(e[kept].tolist()) and not torch.equal(permuted, e)
    assert permuted[3, 0] == 0 and e[0, 1] == 6  # what came in stays as it was
    assert torch.equal(laboratory.controlled(e, valid, ended, "reversed", generator), -e)
    constant = laboratory.controlled(e, valid, ended, "constant", generator)
    assert torch.allclose(constant[kept], e[kept].mean()) and constant[3, 0] == 0
    assert torch.equal(laboratory.controlled(e, valid, ended, "none", generator), e)
    # An episode of three steps, its reset row and the first two of the next one, beside six steps of another episode.
    of_age = laboratory.controlled(e, valid, ended, "age", generator)
    first, second, third = (0 + 4 + 6) / 3, (1 + 5 + 7) / 3, (2 + 8) / 2
    expected = [[first, second, third, 0, first, second], [first, second, third, 9, 10, 11]]
    assert torch.allclose(of_age, torch.tensor(expected).T)
