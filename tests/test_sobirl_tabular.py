"""SoBiRL on tabular MDPs: derivatives against finite differences, expectations against enumeration, samples against
expectations, fixed points, and the command line. All in float64; paper and equation numbers as in docs/sobirl.md."""

import inspect
import itertools
import json
import math
import os
import signal
import typing
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, another_is_faster, read_csv
from test_command_line import assert_one_sentence

import ppo_continuous
import sobirl_tabular as sobirl
from sobirl_tabular import PROBLEMS, Args, ContractDesign, Discriminating, GoalNavigation, PreferenceLearning, RewardShaping

SCRIPT = "sobirl_tabular.py"
SAMPLED = [name for name, problem in PROBLEMS.items() if problem.horizon]
TINY = ["--instances", "2", "--iterations", "4", "--tuples", "2", "--rollout-length", "2"]


def point(problem) -> torch.Tensor:
    """A place away from x_0 where every term of the hypergradient counts, and rewards are of the size of the temperature."""
    generator = torch.Generator().manual_seed(17)
    x = sobirl.normals(generator, 1, problem.x.shape[1]).expand_as(problem.x)
    if isinstance(problem, GoalNavigation):
        return torch.sigmoid(x)  # in the maze
    return (0.1 if isinstance(problem, PROBLEMS["synthetic"]) else 1.0) * x + 0.2


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of an entry, relative to the largest entry; refuses to compare with nothing but zeros."""
    assert expected.abs().max() > 1e-6
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def differences(problem_class, seed: int, function, step: float = 1e-4) -> torch.Tensor:
    """Derivative of function(problem, x) in x by central differences of fourth order: one copy of the instance for each
    shifted x, all evaluated at once. function -> (B, ...); returns (..., n)."""
    n = problem_class([seed]).x.shape[1]
    problem = problem_class([seed] * 4 * n)
    shifts = torch.cat([factor * step * torch.eye(n, dtype=torch.float64) for factor in (1, -1, 2, -2)])
    plus, minus, plus2, minus2 = function(problem, point(problem) + shifts).split(n)
    return ((8 * (plus - minus) - (plus2 - minus2)) / (12 * step)).movedim(0, -1)


def solved(problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """V*, Q*, pi* and grad r at x."""
    values = sobirl.optimal_soft_values(problem.reward(x), problem.transitions, problem.gamma, problem.tau)
    q = sobirl.q_values(values, problem.reward(x), problem.transitions, problem.gamma)
    return values, q, (q / problem.tau).softmax(-1), problem.reward_jacobian(x)


def iterates(problem, step):
    """Outer iterations of step(state) from x_0 on: x_k, h_k and pi_k."""
    state = sobirl.first_state(problem, [3] * len(problem.x))
    while True:
        direction, policy, after = step(state)
        yield SimpleNamespace(x=state["x"], direction=direction, policy=policy)
        state = after


def m_sobirl(problem, *arguments):
    return iterates(problem, lambda state: sobirl.m_sobirl(problem, state, *arguments))


def exact_sobirl(problem, *arguments):
    return iterates(problem, lambda state: sobirl.sobirl(problem, state, *arguments))


@pytest.fixture(params=PROBLEMS)
def problem_class(request):
    return PROBLEMS[request.param]


@pytest.fixture
def problem(problem_class):
    """One instance of each problem."""
    return problem_class([3])


# ---- The lower level -------------------------------------------------------------------------------------------
def test_transitions_are_distributions_and_instances_differ(problem_class):
    problem = problem_class([3, 4])
    assert torch.allclose(problem.transitions.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-14)
    assert (problem.transitions >= 0).all()
    assert not torch.equal(*problem.transitions)
    again = problem_class([4, 3])
    for name in vars(problem):
        if isinstance(getattr(problem, name), torch.Tensor):
            assert torch.equal(getattr(problem, name).flip(0), getattr(again, name)), name


def test_optimal_values_satisfy_the_consistency_conditions(problem):
    """Eq. (5) to (7), and V* is the value of pi*."""
    values, q, policy, _ = solved(problem, point(problem))
    rewards = problem.reward(point(problem))
    scale = values.abs().max()
    again = sobirl.soft_bellman(values, rewards, problem.transitions, problem.gamma, problem.tau)
    assert (again - values).abs().max() < 1e-13 * scale
    assert (((q - values.unsqueeze(-1)) / problem.tau).exp() - policy).abs().max() < 1e-12
    of_policy = sobirl.soft_policy_values(policy, rewards, problem.transitions, problem.gamma, problem.tau)
    assert (of_policy - values).abs().max() < 1e-12 * scale


def test_optimal_policy_has_the_largest_value_in_every_state(problem):
    values, _, policy, _ = solved(problem, point(problem))
    for seed in range(20):
        mixed = 0.9 * policy + 0.1 * sobirl.random_distributions(torch.Generator().manual_seed(seed), *policy.shape)
        other = sobirl.soft_policy_values(mixed, problem.reward(point(problem)), problem.transitions, problem.gamma, problem.tau)
        assert (other < values + 1e-13).all() and (other < values).any()


def test_optimal_values_by_newton_equal_those_by_iteration(problem):
    rewards = problem.reward(point(problem))
    values = torch.zeros_like(rewards[..., 0])
    for _ in range(400):
        values = sobirl.soft_bellman(values, rewards, problem.transitions, problem.gamma, problem.tau)
    assert relative_error(solved(problem, point(problem))[0], values) < 1e-13


def test_bellman_operator_is_safe_for_rewards_far_beyond_the_temperature():
    rewards = torch.tensor([[[2000.0, -2000.0], [0.0, 1.0]]], dtype=torch.float64)
    transitions = torch.full((1, 2, 2, 2), 0.5, dtype=torch.float64)
    values = sobirl.optimal_soft_values(rewards, transitions, 0.5, 1.0)
    assert values.isfinite().all() and values[0, 0] > 2000


def test_rewards_that_are_not_finite_are_an_error_not_a_loop():
    problem = Discriminating([1])
    rewards = torch.full((1, 10, 5), math.nan, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="not finite"):
        sobirl.optimal_soft_values(rewards, problem.transitions, 0.5, 1.0)
    with pytest.raises(FloatingPointError, match="not finite"):
        sobirl.mirror_descent(torch.full_like(rewards, 0.2), rewards, problem.transitions, 0.5, 1.0, 1e-6, 0.5)


@pytest.mark.parametrize("policy_error", [1e-1, 1e-4, 1e-8, 1e-14])
@pytest.mark.parametrize("step", [0.2, 1.0])
def test_mirror_descent_keeps_its_promise(problem, policy_error, step):
    x = point(problem)
    rewards = problem.reward(x)
    uniform = torch.full_like(rewards, 1 / rewards.shape[-1])
    rest = problem.transitions, problem.gamma, problem.tau
    found = sobirl.mirror_descent(uniform, rewards, *rest, policy_error, step)
    assert torch.allclose(found.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-14)
    assert ((found - solved(problem, x)[2]) ** 2).sum() <= policy_error


def test_a_mirror_descent_step_of_1_is_soft_policy_iteration():
    problem = Discriminating([5])
    rewards = problem.reward(point(problem))
    policy = torch.full_like(rewards, 0.2)
    rest = problem.transitions, problem.gamma, problem.tau
    found = sobirl.mirror_descent(policy, rewards, *rest, 1e-10, 1.0)
    for _ in range(20):
        values = sobirl.soft_policy_values(policy, rewards, *rest)
        policy = (sobirl.q_values(values, rewards, *rest[:2]) / problem.tau).softmax(-1)
        if torch.allclose(policy, found, rtol=0, atol=1e-14):
            return
    pytest.fail("not among the iterates of soft policy iteration")


# ---- Implicit derivatives against finite differences -----------------------------------------------------------
def test_reward_jacobian(problem_class):
    problem = problem_class([3])
    expected = differences(problem_class, 3, lambda copies, x: copies.reward(x))
    assert relative_error(problem.reward_jacobian(point(problem))[0], expected) < 1e-8


def test_derivative_of_the_bellman_operator_at_any_values(problem):
    """d phi / d v = gamma P^omega with the softmax policy omega of v, of norm gamma (Prop. 4.1)."""
    x = point(problem)
    states = problem.transitions.shape[1]
    values = sobirl.normals(torch.Generator().manual_seed(0), 1, states)
    rewards = problem.reward(x)
    rest = rewards, problem.transitions, problem.gamma, problem.tau
    step = 1e-5
    columns = [
        (sobirl.soft_bellman(values + step * e, *rest) - sobirl.soft_bellman(values - step * e, *rest))[0] / (2 * step)
        for e in torch.eye(states, dtype=torch.float64)
    ]
    omega = (sobirl.q_values(values, *rest[:3]) / problem.tau).softmax(-1)
    found = problem.gamma * sobirl.policy_transitions(omega, problem.transitions)[0]
    assert relative_error(found, torch.stack(columns, -1)) < 1e-7
    assert math.isclose(found.abs().sum(-1).max(), problem.gamma, rel_tol=1e-12)


def test_implicit_derivatives(problem_class):
    """grad V*, grad Q* (Prop. 5.1) and grad pi* (eq. 8) against the lower level solved again."""
    problem = problem_class([3])
    _, _, policy, jacobian = solved(problem, point(problem))
    grad_q, grad_v = sobirl.value_gradients(policy, jacobian, problem.transitions, problem.gamma)
    grad_pi = sobirl.policy_jacobian(policy, grad_q, grad_v, problem.tau)
    for i, found in enumerate((grad_v, grad_q, grad_pi)):
        expected = differences(problem_class, 3, lambda copies, x, i=i: solved(copies, x)[i])
        assert relative_error(found[0], expected) < 1e-7


def test_exact_hypergradient(problem_class):
    """Eq. (24) against differences of Phi."""
    problem = problem_class([3])
    exact = sobirl.exact_hypergradient(problem, point(problem))
    expected = differences(problem_class, 3, lambda copies, x: sobirl.exact_hypergradient(copies, x).objective)
    assert relative_error(exact.gradient[0], expected) < 1e-7


def test_upper_level_slopes(problem):
    """Partial derivatives of f in x and pi, one entry of pi at a time, off the simplex too."""
    x, policy = point(problem), solved(problem, point(problem))[2]
    value, x_slope, policy_slope = sobirl.objective_slopes(problem, x, policy)
    assert torch.equal(value, problem.objective(x, policy))
    step = 1e-5
    for index in [(0, 0, 0), (0, 1, 1), (0, policy.shape[1] - 1, policy.shape[2] - 1)]:
        shift = torch.zeros_like(policy)
        shift[index] = step
        slope = (problem.objective(x, policy + shift) - problem.objective(x, policy - shift)) / (2 * step)
        assert math.isclose(policy_slope[index], slope, rel_tol=1e-7, abs_tol=1e-9)
    shift = step * torch.ones_like(x)
    slope = (problem.objective(x + shift, policy) - problem.objective(x - shift, policy)) / (2 * step)
    assert math.isclose(x_slope.sum(), slope, rel_tol=1e-7, abs_tol=1e-9)


# ---- Algebra ---------------------------------------------------------------------------------------------------
def test_matrix_form_of_the_policy_derivative(problem):
    """Eq. (8): diag(pi*) (grad r - U grad V*) / tau with U written out, and Prop. 4.1 for grad V*."""
    _, _, policy, jacobian = solved(problem, point(problem))
    states, actions = policy.shape[1:]
    grad_q, grad_v = sobirl.value_gradients(policy, jacobian, problem.transitions, problem.gamma)
    transitions = problem.transitions[0].reshape(states * actions, states)
    u = torch.eye(states, dtype=torch.float64).repeat_interleave(actions, 0) - problem.gamma * transitions
    by_matrix = policy[0].flatten().diag() @ (jacobian[0].flatten(0, 1) - u @ grad_v[0]) / problem.tau
    found = sobirl.policy_jacobian(policy, grad_q, grad_v, problem.tau)[0].flatten(0, 1)
    assert relative_error(found, by_matrix) < 1e-12
    assert relative_error((policy.unsqueeze(-1) * grad_q).sum(2), grad_v) < 1e-12
    assert found.view(states, actions, -1).sum(1).abs().max() < 1e-12 * found.abs().max()  # the simplex is not left


def test_adjoint_and_forward_form_agree(problem):
    """Eq. (24) = grad_x f + (grad pi*)^T grad_pi f = (12) + (13)."""
    x = point(problem)
    exact = sobirl.exact_hypergradient(problem, x)
    _, x_slope, policy_slope = sobirl.objective_slopes(problem, x, exact.policy)
    gradients = sobirl.value_gradients(exact.policy, problem.reward_jacobian(x), problem.transitions, problem.gamma)
    forward = x_slope + torch.einsum("bsa,bsan->bn", policy_slope, sobirl.policy_jacobian(exact.policy, *gradients, problem.tau))
    assert relative_error(exact.gradient, forward) < 1e-12
    by_expectations = sobirl.sobirl_hypergradient(x_slope, policy_slope, exact.policy, *gradients, problem.tau)
    assert relative_error(by_expectations, forward) < 1e-12


def test_adjoint_right_hand_side_with_u_written_out(problem):
    x = point(problem)
    policy = solved(problem, x)[2]
    slope = sobirl.normals(torch.Generator().manual_seed(5), *policy.shape)
    states, actions = policy.shape[1:]
    transitions = problem.transitions[0].reshape(-1, states)
    u = torch.eye(states, dtype=torch.float64).repeat_interleave(actions, 0) - problem.gamma * transitions
    matrix, b = sobirl.adjoint_system(policy, slope, problem.transitions, problem.gamma)
    assert relative_error(b[0], u.T @ (policy * slope).flatten()) < 1e-12
    chain = torch.einsum("sa,sap->sp", policy[0], problem.transitions[0])
    assert relative_error(matrix[0], (torch.eye(states, dtype=torch.float64) - problem.gamma * chain).T) < 1e-12


def test_a_constant_in_a_state_does_not_change_the_hypergradient(problem):
    """Plain partial derivatives in pi suffice: what points out of the simplex drops out."""
    x = point(problem)
    exact = sobirl.exact_hypergradient(problem, x)
    _, x_slope, policy_slope = sobirl.objective_slopes(problem, x, exact.policy)
    shifted = policy_slope + sobirl.normals(torch.Generator().manual_seed(1), 1, policy_slope.shape[1], 1)
    matrix, b = sobirl.adjoint_system(exact.policy, shifted, problem.transitions, problem.gamma)
    w = torch.linalg.solve(matrix, b)
    found = sobirl.model_based_hypergradient(
        x_slope, shifted, exact.policy, exact.policy, w, problem.reward_jacobian(x), problem.tau
    )
    assert relative_error(found, exact.gradient) < 1e-12


def test_value_gradients_are_the_limit_of_the_truncated_ones(problem):
    """Prop. 5.1; what a sum of length T lacks is at most C gamma^T / (1 - gamma), C the largest entry of grad r."""
    _, _, policy, jacobian = solved(problem, point(problem))
    rest = policy, jacobian, problem.transitions, problem.gamma
    exact = sobirl.value_gradients(*rest)
    for found, expected in zip(sobirl.truncated_value_gradients(*rest, 500), exact):
        assert relative_error(found, expected) < 1e-12
    for length in (1, 2, 5, 20):
        bound = jacobian.abs().max() * problem.gamma**length / (1 - problem.gamma)
        for found, expected in zip(sobirl.truncated_value_gradients(*rest, length), exact):
            assert (found - expected).abs().max() <= bound * (1 + 1e-12) + 1e-13
    one_step = sobirl.truncated_value_gradients(*rest, 1)
    assert torch.equal(one_step[0], jacobian)
    assert torch.equal(one_step[1], (policy.unsqueeze(-1) * jacobian).sum(2))


# ---- Enumeration of trajectories -------------------------------------------------------------------------------
class ShortContract(ContractDesign):
    """Few enough trajectories to enumerate: (6 x 3)^3."""

    horizon = 3


class ShortNavigation(GoalNavigation):
    """(25 x 5)^2 trajectories."""

    horizon = 2


def test_enumeration_has_every_trajectory_once_and_its_probability():
    problem = PreferenceLearning([3])
    policy = solved(problem, point(problem))[2]
    states, actions = sobirl.enumerate_trajectories(4, 3, 3)
    assert len({(*s, *a) for s, a in zip(states.tolist(), actions.tolist())}) == len(states) == (4 * 3) ** 3
    found = sobirl.trajectory_probabilities(problem.start, policy, problem.transitions, states, actions)[0]
    assert math.isclose(found.sum(), 1, rel_tol=1e-12)
    for i in range(0, len(states), 97):
        s, a = states[i].tolist(), actions[i].tolist()
        expected = problem.start[0, s[0]]
        for h in range(3):
            expected = expected * policy[0, s[h], a[h]] * (problem.transitions[0, s[h], a[h], s[h + 1]] if h < 2 else 1)
        assert math.isclose(found[i], expected, rel_tol=1e-12)


def enumerated(problem, x, policy):
    """Probabilities (D,), losses (D,), grad_x l (D, n) and the visited states and actions of every tuple of trajectories;
    labels by their expectation, since the cross-entropy is linear in them."""
    states, actions = sobirl.enumerate_trajectories(*policy.shape[1:], problem.horizon)
    single = sobirl.trajectory_probabilities(problem.start, policy, problem.upper_transitions, states, actions)[0]
    index = torch.cartesian_prod(*[torch.arange(len(states))] * problem.trajectories).view(-1, problem.trajectories)
    states, actions, probabilities = states[index], actions[index], single[index].prod(-1)
    labels = problem.label_probabilities(states.unsqueeze(0), actions.unsqueeze(0))

    def losses(x_):
        return problem.loss(x_, states.unsqueeze(0), actions.unsqueeze(0), labels)[0]

    return probabilities, losses(x), torch.func.jacfwd(losses)(x)[:, 0], states, actions


@pytest.mark.parametrize("problem_class", [ShortContract, ShortNavigation, PreferenceLearning])
def test_model_free_hypergradient_by_enumeration(problem_class):
    """(12) + (13), every trajectory weighed by its probability, against (24); and f against the mean of l.
    The loss depends on x in all three; preferences have two trajectories in a tuple."""
    problem = problem_class([3])
    x = point(problem)
    exact = sobirl.exact_hypergradient(problem, x)
    probabilities, losses, explicit, states, actions = enumerated(problem, x, exact.policy)
    assert math.isclose(probabilities.sum(), 1, rel_tol=1e-12)
    assert math.isclose(probabilities @ losses, exact.objective, rel_tol=1e-12)
    grad_q, grad_v = sobirl.value_gradients(exact.policy, problem.reward_jacobian(x), problem.transitions, problem.gamma)
    score = (grad_q - grad_v.unsqueeze(2))[0, states, actions].sum((1, 2)) / problem.tau
    assert (probabilities @ score).abs().max() < 1e-12 * score.abs().max()  # a baseline of l does no harm
    found = probabilities @ explicit + (probabilities * losses) @ score
    assert relative_error(found.unsqueeze(0), exact.gradient) < 1e-12
    assert relative_error((probabilities @ explicit).unsqueeze(0), exact.gradient) > 1e-2  # (13) is not negligible


@pytest.mark.parametrize("problem_class", [ShortContract, PreferenceLearning])
def test_expectations_at_another_policy_than_the_optimal_one(problem_class):
    """Eq. (14), what Algorithm 1 computes, is (12) + (13) with every pi* replaced."""
    problem = problem_class([3])
    x = point(problem)
    policy = sobirl.random_distributions(torch.Generator().manual_seed(8), *problem.reward(x).shape)
    probabilities, losses, explicit, states, actions = enumerated(problem, x, policy)
    grad_q, grad_v = sobirl.value_gradients(policy, problem.reward_jacobian(x), problem.transitions, problem.gamma)
    score = (grad_q - grad_v.unsqueeze(2))[0, states, actions].sum((1, 2)) / problem.tau
    _, x_slope, policy_slope = sobirl.objective_slopes(problem, x, policy)
    found = sobirl.sobirl_hypergradient(x_slope, policy_slope, policy, grad_q, grad_v, problem.tau)
    assert relative_error(found[0], probabilities @ explicit + (probabilities * losses) @ score) < 1e-12


def test_infinite_horizon_objective_of_reward_shaping():
    problem = RewardShaping([3])
    x = point(problem)
    policy = solved(problem, x)[2]
    chain = sobirl.policy_transitions(policy, problem.upper_transitions)[0]
    distribution, total = problem.start[0], 0.0
    for h in range(300):
        total -= problem.upper_gamma**h * distribution[0]  # reward 1 in state 0
        distribution = distribution @ chain
    assert math.isclose(problem.objective(x, policy), total, rel_tol=1e-12)


def test_scores_of_preferences_by_enumeration():
    problem = PreferenceLearning([3])
    x = point(problem)
    _, _, policy, _ = solved(problem, x)
    states, actions = problem.paths
    p = sobirl.trajectory_probabilities(problem.start, policy, problem.transitions, states, actions)[0]
    true, model = (table[0, states, actions].sum(-1).tolist() for table in (problem.true_reward, problem.reward(x)))
    right = different = 0.0
    for i, j in itertools.product(range(len(p)), repeat=2):
        if true[i] != true[j]:
            different += p[i] * p[j]
            right += p[i] * p[j] * ((true[i] > true[j]) == (model[i] > model[j]))
    scores = problem.scores(x, policy)
    assert math.isclose(scores["accuracy"], right / different, rel_tol=1e-6)
    distribution, total = problem.start[0], 0.0
    for h in range(200):
        total += problem.gamma**h * (distribution @ (policy * problem.true_reward)[0].sum(-1))
        distribution = distribution @ sobirl.policy_transitions(policy, problem.transitions)[0]
    assert math.isclose(scores["true_return"], total, rel_tol=1e-12)


# ---- Fixed points and convergence ------------------------------------------------------------------------------
def last(found, count: int):
    return next(itertools.islice(found, count - 1, None))


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "goal-navigation"])
@pytest.mark.full
def test_m_sobirl_with_x_at_rest_finds_policy_adjoint_and_hypergradient(name):
    """All trackers converge: step size 0 for x, the direction becomes the exact hypergradient."""
    problem = PROBLEMS[name]([3])
    problem.x = point(problem)
    exact = sobirl.exact_hypergradient(problem, problem.x)
    found = last(m_sobirl(problem, 0.0, 0.4, 3), 2500)
    assert (found.policy - exact.policy).abs().max() < 1e-12
    assert relative_error(found.direction, exact.gradient) < 1e-9


@pytest.mark.full
def test_w_converges_at_the_rate_of_the_smallest_singular_value():
    """In the maze sigma_min is 0.03, and w needs tens of thousands of steps: its error shrinks by 1 - xi sigma_min^2."""
    problem = GoalNavigation([3])
    problem.x = point(problem)
    exact = sobirl.exact_hypergradient(problem, problem.x)
    late, later = (
        (each.direction - exact.gradient).norm() for each in itertools.islice(m_sobirl(problem, 0.0, 0.4, 3), 2000, 3001, 1000)
    )
    slowest = torch.linalg.svdvals(sobirl.resolvent_matrix(exact.policy, problem.transitions, problem.gamma)).min()
    assert math.isclose(later / late, (1 - 0.4 * slowest**2) ** 1000, rel_tol=0.02)


def test_first_iteration_of_m_sobirl_by_hand():
    """Uniform policy, one step on w, the new w in h: Algorithm 2, lines 4 to 6."""
    problem = Discriminating([3])
    first, second = itertools.islice(m_sobirl(problem, 0.3, 0.5, 2), 2)
    policy = torch.full((10, 5), 0.2, dtype=torch.float64)
    p, c, x, w = problem.transitions[0], problem.features[0], problem.x[0], problem.w[0]
    a = (torch.eye(10) - 0.5 * p.mean(1)).T
    flow = policy * (policy - problem.target[0])
    u = torch.eye(10, dtype=torch.float64).repeat_interleave(5, 0) - 0.5 * p.flatten(0, 1)
    w = w - 0.5 * a.T @ (a @ w - u.T @ flow.flatten())
    rewards = c @ x
    weights = (rewards + 0.5 * p @ torch.full((10,), math.log(5), dtype=torch.float64)).softmax(-1)
    h = 1e-3 * x + ((flow - weights * w.unsqueeze(-1)).unsqueeze(-1) * c).sum((0, 1))
    assert relative_error(first.direction[0], h) < 1e-12
    rewards = c @ (x - 0.3 * h)
    q = torch.zeros(10, 5, dtype=torch.float64)
    for _ in range(2):
        q = rewards + 0.5 * p @ q.logsumexp(-1)
    assert relative_error(second.policy[0], q.softmax(-1)) < 1e-12
    assert relative_error(second.x[0], x - 0.3 * h) < 1e-12


@pytest.mark.full
def test_m_sobirl_finds_a_stationary_point_and_the_control_does_not():
    problem = Discriminating([101, 102])
    start = sobirl.exact_hypergradient(problem, problem.x)
    full, control = (
        sobirl.exact_hypergradient(problem, last(m_sobirl(problem, 1.0, 0.5, 10, implicit), 2000).x)
        for implicit in (True, False)
    )
    assert (full.gradient.norm(dim=-1) < 0.05 * start.gradient.norm(dim=-1)).all()
    assert (full.objective < 0.5 * control.objective).all()


def test_synthetic_problem_reaches_its_known_minimum():
    problem = PROBLEMS["synthetic"]([101])
    minimum = sobirl.exact_hypergradient(problem, torch.zeros_like(problem.x))
    assert math.isclose(minimum.objective, 1, rel_tol=1e-12) and minimum.gradient.abs().max() < 1e-12
    found = last(m_sobirl(problem, problem.step_size, 0.5, 10), 1500)
    exact = sobirl.exact_hypergradient(problem, found.x)
    assert 1 <= exact.objective < 1 + 1e-5
    assert exact.gradient.norm() < 1e-2


def test_sobirl_follows_the_exact_hypergradient_within_its_policy_error(problem_class):
    """Prop. H.7: the error of h_k is bounded by a multiple of |pi_k - pi*|."""
    problem = problem_class([3])
    problem.x = point(problem)
    exact = sobirl.exact_hypergradient(problem, problem.x).gradient
    for policy_error in (1e-4, 1e-10, 1e-18):
        found = next(exact_sobirl(problem, 1.0, policy_error, 0.5)).direction
        assert relative_error(found, exact) < 100 * math.sqrt(policy_error) + 1e-12


# ---- Samples ---------------------------------------------------------------------------------------------------
def test_categorical_draws_by_inversion():
    cumulative = torch.tensor([0.25, 0.25, 0.75, 1 - 1e-16], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7, 0.75, 0.999999999999], dtype=torch.float64)
    assert sobirl.categorical(cumulative, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def sample_of(problem, policy, tuples, seed=0, rollouts=2, length=3):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(policy))]
    return sobirl.draw_sample(problem, policy, tuples, rollouts, length, generators)


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_have_the_law_of_the_trajectories(name):
    """First state, and the next step given a state and an action, in frequencies; |z| < 5 for the largest of the cells."""
    problem = PROBLEMS[name]([3])
    policy = solved(problem, point(problem))[2]
    sample = sample_of(problem, policy, 4000, length=1, rollouts=1)
    states, actions = (each.flatten(0, 2) for each in sample[:2])
    s, a, s2 = states[:, :-1].flatten(), actions[:, :-1].flatten(), states[:, 1:].flatten()

    def z(counts, expected, trials):
        return ((counts - expected).abs() / (expected * (1 - expected / trials)).clamp(min=1).sqrt()).max()

    first = torch.bincount(states[:, 0], minlength=policy.shape[1])
    assert z(first, problem.start[0] * len(states), len(states)) < 5
    visits = torch.bincount(s * policy.shape[2] + a, minlength=policy[0].numel()).view_as(policy[0]).double()
    assert z(visits, policy[0] * visits.sum(-1, keepdim=True), visits.sum(-1, keepdim=True).clamp(min=1)) < 5
    cells = torch.bincount((s * policy.shape[2] + a) * policy.shape[1] + s2, minlength=problem.transitions.numel())
    law = problem.upper_transitions[0]
    assert z(cells.view_as(law), law * visits.unsqueeze(-1), visits.unsqueeze(-1).clamp(min=1)) < 5


def test_an_instance_is_sampled_alike_whoever_its_neighbours_are():
    both, alone = PreferenceLearning([3, 4]), PreferenceLearning([4])
    policy = solved(both, point(both))[2]
    generators = [torch.Generator().manual_seed(seed) for seed in (30, 40, 40)]
    first = sobirl.draw_sample(both, policy, 5, 2, 3, generators[:2])
    second = sobirl.draw_sample(alone, policy[1:], 5, 2, 3, generators[2:])
    for a, b in zip(first, second):
        assert torch.equal(a[1:], b)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.full
def test_stochastic_hypergradient_is_unbiased_up_to_truncation(name, baseline):
    """The mean of 300 estimates against (14) with sums of the same length T, whose expectation is exact: |z| < 4."""
    problem = PROBLEMS[name]([3])
    x = point(problem)
    policy = sobirl.random_distributions(torch.Generator().manual_seed(8), *problem.reward(x).shape)  # any policy will do
    _, x_slope, policy_slope = sobirl.objective_slopes(problem, x, policy)
    length = 4
    gradients = sobirl.truncated_value_gradients(policy, problem.reward_jacobian(x), problem.transitions, problem.gamma, length)
    exact = sobirl.sobirl_hypergradient(x_slope, policy_slope, policy, *gradients, problem.tau)[0]
    generators = [torch.Generator().manual_seed(12)]
    estimates = torch.cat([
        sobirl.stochastic_hypergradient(problem, x, sobirl.draw_sample(problem, policy, 64, 2, length, generators), baseline)
        for _ in range(300)
    ])  # fmt: skip
    z = (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(len(estimates)))
    assert z.abs().max() < 4, z
    assert (estimates.mean(0) - exact).norm() < 0.25 * exact.norm()  # the test can tell: the noise is small enough


def test_baseline_lowers_the_variance():
    problem = ContractDesign([3])
    policy = solved(problem, point(problem))[2]
    spread = {}
    for baseline in (False, True):
        estimates = [
            sobirl.stochastic_hypergradient(problem, point(problem), sample_of(problem, policy, 16, seed), baseline)
            for seed in range(200)
        ]
        spread[baseline] = torch.cat(estimates).var(0).sum()
    assert spread[True] < 0.5 * spread[False]


def test_baseline_leaves_a_tuple_out_of_its_own():
    """Of two tuples each is compared with the other; the mean of both, their own included, would be biased."""
    problem = ContractDesign([3])
    x = point(problem)
    sample = sample_of(problem, solved(problem, x)[2], 2)
    first, second = problem.loss(x, sample.states, sample.actions, sample.labels)[0]
    assert first != second
    flow = (first - second) / 2 * (sample.visits[0, 0] - sample.visits[0, 1])
    implicit = (flow.unsqueeze(-1) * problem.reward_jacobian(x)[0]).sum((0, 1)) / problem.tau
    states = torch.nn.functional.one_hot(sample.states[0], 6).double().sum((1, 2)).mean(0)
    explicit = states * torch.sigmoid(x[0]) * torch.sigmoid(-x[0])  # d l / d x: what a payment in each visited state costs
    found = sobirl.stochastic_hypergradient(problem, x, sample, baseline=True)[0]
    assert relative_error(found, explicit + implicit) < 1e-12


def test_visits_are_the_difference_of_the_two_estimates():
    """`visits` times grad r, against the sums of eq. (79) written out for the same random numbers."""
    problem = PreferenceLearning([3])
    policy = solved(problem, point(problem))[2]
    tuples, rollouts, length = 3, 2, 4
    sample = sobirl.draw_sample(problem, policy, tuples, rollouts, length, [torch.Generator().manual_seed(7)])
    generator = torch.Generator().manual_seed(7)
    pairs = problem.trajectories * problem.horizon
    for shape in [(tuples * 2,), (tuples * 2, problem.horizon, 2), (tuples,)]:  # first states, trajectories, labels
        sobirl.uniforms(generator, *shape)
    jacobian, expected = problem.reward_jacobian(point(problem))[0], torch.zeros(tuples, problem.x.shape[1], dtype=torch.float64)
    for sign in (1, -1):
        numbers = sobirl.uniforms(generator, tuples * pairs * rollouts, length, 2)
        for i in range(len(numbers)):
            j, visit = divmod(i // rollouts, pairs)
            s, a = (each[0, j].flatten()[visit].item() for each in sample[:2])
            for t in range(length):
                if t > 0:
                    s = int((problem.transitions[0, s, a].cumsum(0) <= numbers[i, t, 0]).sum())
                if t > 0 or sign < 0:
                    a = int((policy[0, s].cumsum(0) <= numbers[i, t, 1]).sum())
                expected[j] += sign * problem.gamma**t * jacobian[s, a] / rollouts
    found = torch.einsum("jsa,san->jn", sample.visits[0], jacobian)
    assert relative_error(found, expected) < 1e-12


def test_momentum_is_that_of_eq_81(monkeypatch):
    """h_k from the recorded samples, and the steps beta_k = c (m + k)^(-1/3)."""
    problem, samples = ContractDesign([3]), []
    draw = sobirl.draw_sample
    monkeypatch.setattr(sobirl, "draw_sample", lambda *arguments: samples.append(draw(*arguments)) or samples[-1])
    args = Args(tuples=4, rollouts=1, rollout_length=3, stochastic_step_size=0.3, step_offset=5.0, momentum_coef=9.0)
    found = list(itertools.islice(iterates(problem, lambda state: sobirl.stoc_sobirl(problem, state, args)), 4))
    beta = [0.3 * (5 + k) ** (-1 / 3) for k in range(4)]
    h = sobirl.stochastic_hypergradient(problem, problem.x, samples[0])
    for k in range(1, 4):
        assert relative_error(found[k - 1].direction, h) < 1e-12
        x_before, x = found[k - 1].x, found[k].x
        assert relative_error(x, x_before - beta[k - 1] * h) < 1e-12
        eta = 9.0 * beta[k - 1] ** 2
        assert 0 < eta < 1
        now, before = (sobirl.stochastic_hypergradient(problem, each, samples[k]) for each in (x, x_before))
        h = now + (1 - eta) * (h - before)
    assert relative_error(found[3].direction, h) < 1e-12
    _, plain = itertools.islice(iterates(problem, lambda state: sobirl.stoc_sobirl(problem, state, args, False)), 2)
    assert torch.equal(plain.direction, sobirl.stochastic_hypergradient(problem, plain.x, samples[-1]))


# ---- The theorems' constants -----------------------------------------------------------------------------------
def row_distance(policy, other) -> torch.Tensor:
    """max_s |pi(s, .) - pi'(s, .)|_1 (B,), the distance in which the paper's app. H bounds what a policy changes."""
    return (policy - other).abs().sum(-1).amax(-1)


def test_soft_bellman_operator_is_a_contraction_of_factor_gamma(problem_class, record_property):
    """|phi(x, v) - phi(x, v')| <= gamma |v - v'| in the maximum norm; a constant difference attains gamma, so no smaller
    factor holds. So N sweeps leave at most gamma^N of the error (Algorithm 2)."""
    problem, gamma = problem_class(list(range(20))), problem_class.gamma
    rest = problem.reward(point(problem)), problem.transitions, gamma, problem.tau
    generator, factors = torch.Generator().manual_seed(2), []
    for size in (1e-6, 1e-2, 1.0, 100.0):
        values, change = (sobirl.normals(generator, *problem.w.shape) for _ in range(2))
        difference = sobirl.soft_bellman(values + size * change, *rest) - sobirl.soft_bellman(values, *rest)
        factors += (difference.abs().amax(-1) / (size * change).abs().amax(-1)).tolist()
    record_property("largest factor", max(factors) / gamma)
    assert max(factors) <= gamma * (1 + 1e-8)
    constant = sobirl.soft_bellman(values + 1, *rest) - sobirl.soft_bellman(values, *rest)
    assert torch.allclose(constant, torch.full_like(constant, gamma), rtol=1e-10)
    optimum, found = sobirl.optimal_soft_values(*rest), torch.zeros_like(values)
    for sweeps in range(1, 30):
        found = sobirl.soft_bellman(found, *rest)
        assert ((found - optimum).abs().amax(-1) <= gamma**sweeps * optimum.abs().amax(-1) * (1 + 1e-12) + 1e-12).all()


def test_implicit_fixed_point_operator_is_a_contraction_of_factor_gamma(problem_class, record_property):
    """G -> E_pi grad r + gamma P^pi G, whose fixed point is grad V* (Prop. 4.1): no error grows by more than gamma, and after
    many sweeps it shrinks by exactly that, since P^pi leaves constants as they are."""
    problem, gamma = problem_class(list(range(5))), problem_class.gamma
    policy, jacobian = solved(problem, point(problem))[2:]
    chain, expected = sobirl.policy_transitions(policy, problem.transitions), (policy.unsqueeze(-1) * jacobian).sum(-2)
    fixed_point = sobirl.value_gradients(policy, jacobian, problem.transitions, gamma)[1]
    iterate = sobirl.normals(torch.Generator().manual_seed(3), *fixed_point.shape)
    errors = []
    for _ in range(math.ceil(math.log(1e-9, gamma))):
        errors.append((iterate - fixed_point).abs().amax((1, 2)))
        iterate = expected + gamma * chain @ iterate
    factors = torch.stack(errors[1:]) / torch.stack(errors[:-1])
    record_property("largest factor", float(factors.max()) / gamma)
    record_property("last factor", float(factors[-1].min()) / gamma)
    assert factors.max() <= gamma * (1 + 1e-6)  # the error itself is rounded, and ends at 1e-9
    assert factors[-1].min() >= gamma * 0.99


class Constants(SimpleNamespace):
    """The bounds of Assumptions 7.2 and 7.3 on one instance at x, taken over all its tuples and all its states and actions:
    C_l of |l|, C_lx of |grad_x l|, C_rx of |grad r|; H I, the steps of a tuple; and the enumeration."""

    def __init__(self, problem, x):
        policy = torch.full_like(problem.transitions[..., 0], 1 / problem.transitions.shape[2])
        _, losses, explicit, states, actions = enumerated(problem, x, policy)
        self.c_l, self.c_lx = losses.abs().max(), explicit.norm(dim=-1).max()
        self.c_rx = problem.reward_jacobian(x).norm(dim=-1).max()
        self.steps, self.gamma, self.tau = problem.horizon * problem.trajectories, problem.gamma, problem.tau
        self.losses, self.explicit, self.states, self.actions = losses, explicit, states, actions

    def score(self) -> torch.Tensor:
        """Of |sum_h (grad Q - grad V)| / tau in a tuple, at any policy."""
        return 2 * self.steps * self.c_rx / ((1 - self.gamma) * self.tau)

    def bias(self) -> torch.Tensor:
        """Of |h(x, pi) - grad Phi(x)| / row distance (Prop. H.7)."""
        law = self.steps * (self.c_lx + self.c_l * self.score())
        return law + self.c_l * self.steps * (1 + self.gamma) * self.c_rx / ((1 - self.gamma) ** 2 * self.tau)


def mixtures(policy, other):
    """Policies on the way from one to the other, on a logarithmic scale."""
    return [(1 - t) * policy + t * other for t in (1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0)]


@pytest.mark.parametrize("problem_class", [ShortContract, PreferenceLearning])
def test_two_policies_make_laws_of_trajectories_that_differ_by_lemma_h_1(problem_class, record_property):
    """Total variation <= H I / 2 times the row distance; and for the mean of a bounded function twice that times its bound
    (Lemma H.2). Both for random pairs of policies at many distances, in three instances; neither bound is idle."""
    ratios = []
    for seed in (3, 4, 5):
        problem = problem_class([seed])
        constants = Constants(problem, point(problem))
        generator = torch.Generator().manual_seed(seed)
        first, second = (sobirl.random_distributions(generator, *problem.transitions.shape[:3]) for _ in range(2))
        p = enumerated(problem, point(problem), first)[0]
        for policy in mixtures(first, second):
            q = enumerated(problem, point(problem), policy)[0]
            bound = constants.steps / 2 * row_distance(first, policy)
            drift = (p - q).abs().sum() / 2
            assert drift <= bound and ((p - q) @ constants.explicit).norm() <= 2 * bound * constants.c_lx
            ratios.append(float(drift / bound))
    record_property("total variation over its bound", max(ratios))
    assert max(ratios) > 0.2


@pytest.mark.parametrize("problem_class", [ShortContract, ShortNavigation, PreferenceLearning])
def test_an_approximate_policy_biases_the_hypergradient_by_at_most_proposition_h_7(problem_class, record_property):
    """|h(x, pi) - grad Phi(x)| <= L |pi - pi*| with L from the MDP, on the way by Prop. H.4 for grad Q and grad V; and the
    error is of first order: its slope against the distance is 1."""
    ratios = []
    for seed in (3, 4, 5):
        problem = problem_class([seed])
        x = point(problem)
        constants, exact = Constants(problem, x), sobirl.exact_hypergradient(problem, x)
        rest = problem.reward_jacobian(x), problem.transitions, problem.gamma
        true_q, true_v = sobirl.value_gradients(exact.policy, *rest)
        other = sobirl.random_distributions(torch.Generator().manual_seed(seed), *exact.policy.shape)
        errors, distances = [], []
        for policy in mixtures(exact.policy, other):
            grad_q, grad_v = sobirl.value_gradients(policy, *rest)
            _, x_slope, pi_slope = sobirl.objective_slopes(problem, x, policy)
            h = sobirl.sobirl_hypergradient(x_slope, pi_slope, policy, grad_q, grad_v, problem.tau)
            distance = row_distance(policy, exact.policy)
            drift = constants.c_rx * distance / (1 - problem.gamma) ** 2
            assert ((grad_v - true_v).norm(dim=-1) <= drift).all()
            assert ((grad_q - true_q).norm(dim=-1) <= problem.gamma * drift * (1 + 1e-12)).all()
            errors.append(float((h - exact.gradient).norm()))
            distances.append(float(distance))
            assert errors[-1] <= constants.bias() * distances[-1]
            ratios.append(errors[-1] / float(constants.bias() * distances[-1]))
        slope = math.log(errors[2] / errors[0]) / math.log(distances[2] / distances[0])
        assert slope == pytest.approx(1, abs=0.02)
    record_property("bias over its bound", max(ratios))


@pytest.mark.parametrize("problem_class", [ShortContract, ShortNavigation, PreferenceLearning])
def test_cut_rollouts_bias_the_hypergradient_by_at_most_eq_83(problem_class, record_property):
    """What sums of length T leave out: 2 H I C_l C_rx gamma^T / ((1 - gamma) tau), at any policy; and no faster rate holds."""
    problem = problem_class([3])
    x = point(problem)
    constants = Constants(problem, x)
    policy = sobirl.random_distributions(torch.Generator().manual_seed(8), *problem.reward(x).shape)
    _, x_slope, pi_slope = sobirl.objective_slopes(problem, x, policy)
    rest = policy, problem.reward_jacobian(x), problem.transitions, problem.gamma
    exact = sobirl.sobirl_hypergradient(x_slope, pi_slope, policy, *sobirl.value_gradients(*rest), problem.tau)
    ratios = []
    for length in (1, 2, 4, 8, 16):
        gradients = sobirl.truncated_value_gradients(*rest, length)
        found = sobirl.sobirl_hypergradient(x_slope, pi_slope, policy, *gradients, problem.tau)
        bound = constants.c_l * constants.score() * problem.gamma**length
        ratios.append(float((found - exact).norm() / bound))
    record_property("bias over its bound", max(ratios))
    assert max(ratios) <= 1


@pytest.mark.parametrize("problem_class", [ShortContract, PreferenceLearning])
def test_variance_of_the_estimate_falls_as_1_over_the_number_of_tuples(problem_class, record_property):
    """Eq. (84). N = 2 to 64 tuples, 1000 estimates each, in ten groups: the log-log slopes of the groups have -1 in the 99 %
    interval of their mean, which is shorter than 0.15. And the variance is at most B^2 / N, B the bound of a tuple's term."""
    copies, groups, counts = 1000, 10, (2, 4, 8, 16, 32, 64)
    problem, single = problem_class([3] * copies), problem_class([3])
    x, constants = point(problem), Constants(single, point(single))
    policy = solved(single, point(single))[2].expand(copies, -1, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(copies)]
    variances = []
    for tuples in counts:
        estimates = sobirl.stochastic_hypergradient(problem, x, sobirl.draw_sample(problem, policy, tuples, 1, 3, generators))
        variances.append(estimates.view(groups, -1, estimates.shape[-1]).var(1).sum(-1))
        assert variances[-1].mean() <= (constants.c_lx + constants.c_l * constants.score()) ** 2 / tuples
    size = torch.tensor(counts, dtype=torch.float64).log()
    size = size - size.mean()
    slopes = size @ torch.stack(variances).log() / (size @ size)
    half = 3.25 * slopes.std() / math.sqrt(groups)  # t with 9 degrees of freedom
    record_property("slope", f"{slopes.mean():.3f} +- {half:.3f}")
    assert half < 0.075 and abs(slopes.mean() + 1) < half


# ---- Practical forms of the implicit term ----------------------------------------------------------------------
@pytest.mark.parametrize("problem_class", [ContractDesign, GoalNavigation])
def test_one_step_form_is_zero_where_the_reward_depends_on_the_state_alone(problem_class):
    """grad r - sum_a pi grad r cancels: the released form leaves nothing of a term that decides these problems."""
    problem = problem_class([3])
    x = point(problem)
    _, x_slope, _ = sobirl.objective_slopes(problem, x, solved(problem, x)[2])
    problem.x = x
    cut = next(exact_sobirl(problem, 1.0, 1e-20, 1.0, 1)).direction
    assert relative_error(cut, x_slope) < 1e-8
    assert relative_error(cut, sobirl.exact_hypergradient(problem, x).gradient) > 0.05


def test_bias_of_each_practical_form(record_property):
    """One-step (as released), independent rollouts and reward-to-go of the same fragment, on ten instances: rollouts lose
    their bias with T, one-step keeps one, and reward-to-go is the worst although its sums are longer."""
    seeds = list(range(201, 211))
    rows = sobirl.measure_bias(PreferenceLearning(seeds), seeds, (2, 5, 20, 200))
    mean = {
        form: sum(row["relative_error"] for row in rows if row["form"] == form) / 10 for form in {row["form"] for row in rows}
    }
    for form, value in mean.items():
        record_property(form, value)
    assert mean["none"] == pytest.approx(1, abs=1e-12)
    assert mean["rollouts-200"] < 1e-12
    assert mean["rollouts-200"] < mean["rollouts-20"] < mean["rollouts-5"] < mean["rollouts-2"]
    assert mean["rollouts-20"] < 0.05
    assert mean["one-step"] > 0.1
    assert mean["reward-to-go"] > 2 * mean["one-step"]


def test_bias_where_the_state_changes_slowly(record_property):
    """gamma = 0.99, as on MuJoCo, and a state that stays with probability 0.95 and more: then what comes later counts, and ten steps of a
    rollout, the default of `sobirl_rlhf.py`, are little better than the one-step form."""
    seeds = list(range(201, 211))
    problem = PreferenceLearning(seeds)
    states = problem.transitions.shape[-1]
    problem.transitions = 0.05 * problem.transitions + 0.95 * torch.eye(states)[:, None]
    problem.gamma = 0.99
    rows = sobirl.measure_bias(problem, seeds, (2, 10, 20, 100))
    forms = ("one-step", "rollouts-2", "rollouts-10", "rollouts-20", "rollouts-100")
    mean = {form: sum(row["relative_error"] for row in rows if row["form"] == form) / 10 for form in forms}
    for form, value in mean.items():
        record_property(form, value)
    assert sorted(forms, key=mean.get, reverse=True) == list(forms)
    assert mean["rollouts-10"] > 0.5 * mean["one-step"] > 0.05 and mean["rollouts-100"] < 0.002


def test_one_step_form_is_the_mean_of_the_released_expression():
    """sum over both fragments of r_theta(s, a) - sum_a pi r_theta(s, a), its gradient weighed by the cross-entropy and 1 / tau."""
    problem = PreferenceLearning([3])
    x = point(problem)
    policy = solved(problem, x)[2]
    probabilities, losses, _, states, actions = enumerated(problem, x, policy)

    def surrogate(x_):
        rewards = problem.reward(x_)[0]
        advantage = rewards[states, actions] - (policy[0] * rewards).sum(-1)[states]
        return (probabilities * losses * advantage.sum((1, 2))).sum() / problem.tau

    expected = torch.func.grad(surrogate)(x)
    assert relative_error(sobirl.implicit_terms(problem, x, ())["one-step"], expected) < 1e-12


def test_reward_to_go_form_by_enumeration():
    problem = PreferenceLearning([3])
    x = point(problem)
    policy = solved(problem, x)[2]
    probabilities, losses, _, states, actions = enumerated(problem, x, policy)
    g = problem.reward_jacobian(x)[0]
    v1 = (policy[0].unsqueeze(-1) * g).sum(1)
    v2 = (policy[0].unsqueeze(-1) * (g + 0.8 * problem.transitions[0] @ v1)).sum(1)
    g0, g1 = (g[states[:, :, h], actions[:, :, h]] for h in (0, 1))
    total = (g0 + 0.8 * g1 - v2[states[:, :, 0]] + g1 - v1[states[:, :, 1]]).sum(1) / problem.tau
    assert (probabilities @ total).abs().max() < 1e-12 * total.abs().max()
    found = sobirl.implicit_terms(problem, x, ())["reward-to-go"]
    assert relative_error(found[0], (probabilities * losses) @ total) < 1e-12


# ---- The script ------------------------------------------------------------------------------------------------
def run(tmp_path, *words: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sobirl, "draw_figure", lambda *arguments: None)  # which takes longer than all the rest
        return sobirl.train(sobirl.parse_args([*TINY, "--run-dir", str(tmp_path), *words]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny run of everything. Read only."""
    return sobirl.train(sobirl.parse_args([*TINY, "--run-dir", str(tmp_path_factory.mktemp("finished"))]))


@pytest.mark.parametrize("name", ["Diverged", "say", "parse_args", "write_atomically"])
def test_what_it_has_of_the_other_scripts_is_identical(name):
    """Beside its two shared blocks; the rest of theirs is about environments."""
    assert inspect.getsource(getattr(sobirl, name)) == inspect.getsource(getattr(ppo_continuous, name))


def test_the_names_that_arguments_allow_are_those_there_are():
    assert typing.get_args(sobirl.ProblemName) == tuple(PROBLEMS)
    assert len(sobirl.COLOURS) == len(sobirl.METHODS)


def test_a_run_writes_every_file(finished):
    names = {path.name for path in finished.iterdir()}
    assert names - {".lock"} == {
        "args.json", "checkpoint.pt", "curves.csv", "summary.csv", "bias.csv", "figure_4.png", "convergence.png", "result.json"
    }  # fmt: skip
    for picture in finished.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    rows = read_csv(finished / "curves.csv")
    pairs = [(p, m) for p in PROBLEMS for m in sobirl.METHODS if sobirl.applies(m, p)]
    assert len(pairs) == 6 * 4 + 4 * 3
    assert {(row["problem"], row["method"]) for row in rows} == set(pairs)
    for pair in pairs:
        mine = [row for row in rows if (row["problem"], row["method"]) == pair]
        assert [(row["seed"], row["iteration"]) for row in mine] == [(s, k) for k in "0123" for s in "12"]
    assert [(row["problem"], row["method"]) for row in read_csv(finished / "summary.csv")] == pairs
    saved = json.loads((finished / "args.json").read_text())
    assert saved["args"]["instances"] == 2 and saved["script"] == SCRIPT and set(saved["versions"]) == {"torch", "numpy", "python"}
    assert json.loads((finished / "result.json").read_text())["status"] == "finished"


def test_rows_say_what_is_true_at_x(finished):
    """The first rows against the functions themselves, and the running mean of squared norms."""
    problem = ContractDesign([1, 2])
    exact = sobirl.exact_hypergradient(problem, problem.x)
    rows = [row for row in read_csv(finished / "curves.csv") if (row["problem"], row["method"]) == ("contract-design", "sobirl")]
    for i in range(2):
        assert float(rows[i]["objective"]) == pytest.approx(float(exact.objective[i]), rel=1e-5)
        assert float(rows[i]["gradient_norm"]) == pytest.approx(float(exact.gradient[i].norm()), rel=1e-5)
        assert float(rows[i]["cosine"]) > 0.999 and float(rows[i]["policy_error"]) <= 1e-6
    norms = [float(row["gradient_norm"]) ** 2 for row in rows if row["seed"] == "1"]
    assert float(rows[-2]["average_squared_norm"]) == pytest.approx(sum(norms) / 4, rel=1e-4)


def test_summary_is_that_of_the_last_iteration(finished):
    rows = read_csv(finished / "curves.csv")
    for entry in read_csv(finished / "summary.csv"):
        finals = [
            float(row["objective"]) for row in rows
            if all(row[key] == entry[key] for key in ("problem", "method")) and row["iteration"] == "3"
        ]  # fmt: skip
        assert float(entry["objective_median"]) == pytest.approx(sum(finals) / 2, rel=1e-4)
        assert float(entry["objective_min"]) == pytest.approx(min(finals), rel=1e-5)
        assert entry["iterations"] == "4" and entry["instances"] == "2"


def test_logged_iterations_have_both_ends_and_do_not_depend_on_where_a_run_ends():
    for iterations in (1, 2, 50, 1000, 3000):
        logged = {k for k in range(iterations) if sobirl.is_logged(k, iterations)}
        assert min(logged) == 0 and max(logged) == iterations - 1 and len(logged) <= 75
        assert logged - {iterations - 1} <= {k for k in range(5000) if sobirl.is_logged(k, 5000)}


def test_divergence_is_reported_and_the_others_go_on(command_line, tmp_path):
    words = ["--problems", "synthetic", "--methods", "m-sobirl", "x-only", "--adjoint-step-size", "1e6", "--iterations", "90"]
    status, out, err = command_line(SCRIPT, *TINY, "--run-dir", tmp_path, *words)
    assert status == 1 and out == "" and "synthetic m-sobirl: Phi of iteration" in err and "Traceback" not in err
    (folder,) = tmp_path.iterdir()
    full, control = read_csv(folder / "summary.csv")
    assert "diverged" in full["note"] and full["method"] == "m-sobirl"
    assert control["note"] == "" and float(control["objective_median"]) > 0
    assert json.loads((folder / "result.json").read_text())["status"] == "diverged"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["states"]["synthetic m-sobirl"]
    assert state["x"].isfinite().all() and 0 < state["k"] < 90  # the last one that was finite


# ---- Continue, extend, replay ----------------------------------------------------------------------------------
SOME = ["--problems", "preference-learning", "contract-design", "--methods", "m-sobirl", "sobirl", "stoc-sobirl"]


def contents(folder) -> tuple:
    """The tables of a run and its final states, all that does not depend on the clock."""
    summary = [{name: cell for name, cell in row.items() if name != "seconds"} for row in read_csv(folder / "summary.csv")]
    states = torch.load(folder / "checkpoint.pt", weights_only=True)["states"]
    states = {key: {name: x for name, x in state.items() if name != "seconds"} for key, state in states.items()}
    return (folder / "curves.csv").read_bytes(), (folder / "bias.csv").read_bytes(), summary, states


def assert_same(folder, other) -> None:
    (*tables, states), (*other_tables, other_states) = contents(folder), contents(other)
    assert tables == other_tables and states.keys() == other_states.keys()
    for key, state in states.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other_states[key][name]), (key, name)
            elif name == "rng":
                assert all(map(torch.equal, value, other_states[key][name])), key
            else:
                assert value == other_states[key][name], (key, name)


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """A run of some methods with ten iterations, uninterrupted. Read only."""
    return run(tmp_path_factory.mktemp("ten"), *SOME, "--iterations", "10")


def test_a_run_repeats(ten, tmp_path):
    assert_same(run(tmp_path, *SOME, "--iterations", "10"), ten)
    other = run(tmp_path / "other", "--seed", "5", "--problems", "preference-learning", "--methods", "sobirl")
    assert read_csv(other / "curves.csv")[0]["objective"] != read_csv(ten / "curves.csv")[0]["objective"]


def broken_off(tmp_path, monkeypatch, iterations: int, act) -> None:
    """Start that run; in its `iterations`-th iteration, of all methods together, `act()` happens."""
    made, original = [], sobirl.run_method

    def run_method(*arguments):
        made.append(1)
        if len(made) == iterations:
            act()
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sobirl, "run_method", run_method)
        run(tmp_path, *SOME, "--iterations", "10", "--checkpoint-every", "4")


def test_a_folder_that_another_run_makes_first_is_left_to_it(tmp_path, monkeypatch):
    taken = another_is_faster(monkeypatch, tmp_path)
    folder = run(tmp_path, "--iterations", "2")
    assert folder.name == taken[0].name + "_" and [*taken[0].iterdir()] == []


@pytest.mark.parametrize("iterations", [7, 27, 58])
def test_a_resumed_run_equals_an_uninterrupted_one(ten, tmp_path, monkeypatch, iterations):
    """After a crash it goes on from the last checkpoint, bit for bit; what was written stays."""

    def crash():
        raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        broken_off(tmp_path, monkeypatch, iterations, crash)
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed" and "pulled the plug" in result["error"]
    assert iterations < 10 or len(read_csv(folder / "summary.csv")) == iterations // 10
    assert sobirl.train(sobirl.parse_args(["--resume", str(folder)])) == folder
    assert_same(folder, ten)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_and_it_goes_on_where_it_was(ten, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        broken_off(tmp_path, monkeypatch, 16, lambda: os.kill(os.getpid(), number))
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["states"]["preference-learning sobirl"]["k"] == 5
    sobirl.train(sobirl.parse_args(["--resume", str(folder)]))
    assert_same(folder, ten)


def test_a_finished_run_is_extended_and_replayed(ten, tmp_path, capsys):
    """To ten iterations and to more methods; without a change it writes the same again, and makes no iteration."""
    folder = run(tmp_path, *SOME[:-1], "--iterations", "7")
    again = sobirl.parse_args(["--resume", str(folder), "--iterations", "10", "--methods", *SOME[-3:]])
    assert "--iterations was 7 and is now 10" in capsys.readouterr().err
    sobirl.train(again)
    assert_same(folder, ten)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sobirl, "run_method", None)
        sobirl.train(sobirl.parse_args(["--resume", str(folder)]))
    assert_same(folder, ten)


def test_a_run_that_goes_on_with_one_method_keeps_the_rows_of_the_others(tmp_path):
    """Also if their iterations are more than those asked for now."""
    folder = run(tmp_path, *SOME[:-1], "--iterations", "7")
    before = read_csv(folder / "curves.csv")
    sobirl.train(sobirl.parse_args(["--resume", str(folder), "--iterations", "4", "--methods", "x-only"]))
    rows, summary = read_csv(folder / "curves.csv"), read_csv(folder / "summary.csv")
    assert rows[: len(before)] == before and {row["method"] for row in rows[len(before) :]} == {"x-only"}
    assert [(row["method"], row["iterations"]) for row in summary] == [("m-sobirl", "7"), ("sobirl", "7")] * 2 + [("x-only", "4")] * 2


# ---- Bad input -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, fragments",
    [(["--instances", "0"], ["--instances is 0", "greater than or equal to 1"]),
     (["--step-size", "nan"], ["--step-size is nan", "finite"]),
     (["--mirror-descent-step", "1.5"], ["--mirror-descent-step is 1.5", "less than or equal to 1"]),
     (["--methods", "sobirl", "stoc-sobirl", "--problems", "synthetic"], ["--methods stoc-sobirl", "contract-design"]),
     (["--seed", "2147483647", "--instances", "2"], ["--seed 2147483647", "--instances 2", "2147483646"]),
     (["--resume", "nowhere"], ["--resume nowhere"])],
)  # fmt: skip
def test_bad_input(command_line, tmp_path, words, fragments):
    status, out, err = command_line(SCRIPT, "--run-dir", tmp_path / "runs", *words)
    assert_one_sentence(status, err, *fragments)
    assert out == "" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, named", [(["--instances", "many"], "--instances"), (["--sead", "1"], "--sead"), (["--problems", "chess"], "synthetic")]
)
def test_words_that_cannot_be_parsed(command_line, tmp_path, words, named):
    status, _, err = command_line(SCRIPT, "--run-dir", tmp_path / "runs", *words)
    assert status == 2 and named in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_run_dir_below_a_regular_file(command_line, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = command_line(SCRIPT, "--run-dir", tmp_path / "file" / "runs")
    assert_one_sentence(status, err, "--run-dir", str(tmp_path / "file" / "runs"))
    assert (tmp_path / "file").read_text() == "mine"


def test_run_dir_is_a_link_to_nowhere(command_line, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    status, _, err = command_line(SCRIPT, *TINY, "--run-dir", tmp_path / "runs")
    assert_one_sentence(status, err, "--run-dir", str(tmp_path / "runs"))


def test_runs_that_cannot_be_resumed(command_line, ten, tmp_path):
    """With less iterations or other instances, while it runs, or from a damaged checkpoint; nothing changes."""
    folder = run(tmp_path, "--problems", "contract-design", "--methods", "x-only")
    before = (folder / "args.json").read_bytes(), (folder / "curves.csv").read_bytes()
    for words, fragment in [(["--iterations", "3"], "has made 4 iterations"), (["--seed", "4"], "other instances")]:
        status, _, err = command_line(SCRIPT, "--resume", folder, *words)
        assert status == 2 and fragment in err.splitlines()[-1]
    with sobirl.filelock.FileLock(folder / ".lock"):
        status, _, err = command_line(SCRIPT, "--resume", folder)
        assert_one_sentence(status, err, "--resume", "lock")
    (folder / "checkpoint.pt").write_bytes(b"half")
    status, _, err = command_line(SCRIPT, "--resume", folder)
    assert status == 2 and len(err.splitlines()) == 1 and "cannot be used" in err
    assert before == ((folder / "args.json").read_bytes(), (folder / "curves.csv").read_bytes())


def test_from_the_command_line(command_line, tmp_path):
    words = [*TINY, "--run-dir", tmp_path, "--problems", "goal-navigation", "--methods", "x-only"]
    status, out, err = command_line(SCRIPT, *words)
    assert status == 0 and out == "" and "goal-navigation" in err
    (folder,) = tmp_path.iterdir()
    assert str(folder) in err and REPO not in folder.parents
