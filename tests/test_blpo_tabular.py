"""blpo_tabular.py: every derivative against finite differences of the problem solved again in numpy, its limits, its samples."""

import csv
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, environment
from torch.func import grad, hessian, vmap

import blpo_tabular as tabular
from blpo_tabular import GAMMA, Game, Settings

GENERATOR = torch.Generator().manual_seed(0)


def random_game(seed: int = 0, states: int = 6, actions: int = 3, num_features: int = 3, **changes) -> Game:
    """No field is uniform, so that none can stand for another."""
    generator = torch.Generator().manual_seed(seed)
    transitions, rewards = tabular.garnet(generator, states, actions, 2)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    number = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    game = Game(transitions, rewards + normal(states, actions), normal(states).softmax(0), normal(states).softmax(0),
                normal(states, num_features), normal(states), number(0.3), number(0.8))  # fmt: skip
    return game._replace(**{name: number(x) if isinstance(x, float) else x for name, x in changes.items()})


def some_theta(game: Game, seed: int = 1) -> torch.Tensor:
    return torch.randn(game.rewards.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- The oracle: numpy, no shared line ---------------------------------------------------------------------------
def returns_by_recursion(theta: np.ndarray, game: Game, values: np.ndarray, lambda_: float) -> np.ndarray:
    """The lambda-return of each state, summed up step by step until nothing is left."""
    exp = np.exp(theta - theta.max(1, keepdims=True))
    pi = exp / exp.sum(1, keepdims=True)
    p, r = game.transitions.numpy(), game.rewards.numpy()
    found = np.zeros(len(pi))
    for _ in range(900):
        found = (pi * (r + GAMMA * p @ ((1 - lambda_) * values + lambda_ * found))).sum(1)
    return found


def solved_again(theta: np.ndarray, game: Game) -> float:
    """J at the critic that least squares gives for this theta."""
    targets = returns_by_recursion(theta, game, game.old_values.numpy(), float(game.target_lambda))
    root = np.sqrt(game.states.numpy())
    omega = np.linalg.lstsq(root[:, None] * game.features.numpy(), root * targets, rcond=None)[0]
    return float(
        game.start.numpy() @ returns_by_recursion(theta, game, game.features.numpy() @ omega, float(game.leader_lambda))
    )


def differences(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of function(x), entry by entry."""
    slopes = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        slopes[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return slopes


def direction(theta, omega, game, settings=Settings()):
    """`ascent_direction` of one game."""
    batch = Game(*(field[None] for field in game))
    rest = tabular.curvatures(batch), settings, torch.Generator().manual_seed(0)
    return tabular.ascent_direction(theta[None], omega[None], batch, *rest)[0]


def error(found, expected) -> float:
    """Relative, in norm."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


CASES = [(0.0, 1.0), (0.0, 0.8), (0.95, 0.95), (0.3, 0.0)]


@pytest.mark.parametrize("leader_lambda, target_lambda", CASES)
def test_the_hypergradient_is_the_derivative_of_the_problem_solved_again(leader_lambda, target_lambda):
    game = random_game(leader_lambda=leader_lambda, target_lambda=target_lambda)
    theta = some_theta(game)
    expected = differences(lambda x: solved_again(x, game), theta.numpy())
    omega = tabular.best_response(theta, game)
    assert error(direction(theta, omega, game), expected) < 1e-7
    assert error(grad(tabular.total_objective)(theta, game), expected) < 1e-7
    assert float(tabular.total_objective(theta, game)) == pytest.approx(solved_again(theta.numpy(), game), rel=1e-8)
    assert error(direction(theta, omega, game, Settings("nested")), expected) > 0.05  # the partial one is another


@pytest.mark.parametrize("leader_lambda, target_lambda", CASES)
def test_partial_derivatives_at_any_critic(leader_lambda, target_lambda):
    game = random_game(leader_lambda=leader_lambda, target_lambda=target_lambda)
    theta, omega, v = some_theta(game), torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 0.3, -0.7]).double()

    def j(x, w):
        return float(game.start.numpy() @ returns_by_recursion(x, game, game.features.numpy() @ w, leader_lambda))

    def loss(x, w):
        targets = returns_by_recursion(x, game, game.old_values.numpy(), target_lambda)
        return float(game.states.numpy() @ (targets - game.features.numpy() @ w) ** 2)

    x, w = theta.numpy(), omega.numpy()
    assert error(grad(tabular.leader_objective)(theta, omega, game), differences(lambda x: j(x, w), x)) < 1e-8
    assert error(grad(tabular.leader_objective, 1)(theta, omega, game), differences(lambda w: j(x, w), w)) < 1e-8
    assert error(grad(tabular.follower_loss, 1)(theta, omega, game), differences(lambda w: loss(x, w), w)) < 1e-8
    along = lambda x: (loss(x, w + 1e-3 * v.numpy()) - loss(x, w - 1e-3 * v.numpy())) / 2e-3  # noqa: E731  exact: quadratic
    assert error(tabular.mixed_term(theta, omega, v, game), differences(along, x, 1e-4)) < 1e-6


@pytest.mark.parametrize("target_lambda", [0.0, 0.8, 1.0])
def test_the_mixed_term_is_a_policy_gradient_with_the_row_weights_of_the_trace(target_lambda):
    game, v = random_game(target_lambda=target_lambda), torch.tensor([1.0, 0.3, -0.7]).double()
    theta, omega = some_theta(game), torch.zeros(3).double()
    weights = 2 * tabular.trace(theta, v, game)
    found = tabular.weighed_policy_gradient(theta, weights, game)
    assert error(found, -tabular.mixed_term(theta, omega, v, game)) < 1e-12


# ---- Limits ----------------------------------------------------------------------------------------------------
def test_with_complete_features_the_total_gradient_is_that_of_the_return_and_the_partial_one_a_policy_gradient():
    game = random_game(num_features=6, leader_lambda=0.0, target_lambda=1.0)
    theta, x = some_theta(game), some_theta(game).numpy()
    omega = tabular.best_response(theta, game)
    values = returns_by_recursion(x, game, np.zeros(6), 1.0)
    assert np.allclose(game.features @ omega, values, atol=1e-6)
    of_return = differences(lambda x: float(game.start.numpy() @ returns_by_recursion(x, game, np.zeros(6), 1.0)), x)
    assert error(direction(theta, omega, game), of_return) < 1e-5  # the ridge
    assert error(grad(tabular.true_return)(theta, game), of_return) < 1e-8
    pi = theta.softmax(-1).numpy()
    gains = game.rewards.numpy() + GAMMA * game.transitions.numpy() @ values  # Q^pi
    expected = game.start.numpy()[:, None] * pi * (gains - (pi * gains).sum(1, keepdims=True))
    assert error(direction(theta, omega, game, Settings("nested")), expected) < 1e-5
    # where nu is the discounted visitation of rho, that is (1 - gamma) times the gradient of E_rho V^pi
    rho = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]).double()
    transitions, _ = tabular.induced(theta, game)
    visits = (1 - GAMMA) * torch.linalg.solve((torch.eye(6).double() - GAMMA * transitions).T, rho)
    partial = direction(theta, omega, game._replace(start=visits), Settings("nested"))
    of_rho = differences(lambda x: float(rho.numpy() @ returns_by_recursion(x, game, np.zeros(6), 1.0)), x)
    assert error(partial, (1 - GAMMA) * of_rho) < 1e-5


def test_with_a_constant_feature_the_leaders_objective_is_the_next_reward_and_the_mean_value():
    game = random_game(leader_lambda=0.0, target_lambda=1.0)._replace(features=torch.ones(6, 1).double())
    theta = some_theta(game)
    values, (_, rewards) = returns_by_recursion(theta.numpy(), game, np.zeros(6), 1.0), tabular.induced(theta, game)
    expected = game.start @ rewards + GAMMA * float(game.states.numpy() @ values)
    assert float(tabular.total_objective(theta, game)) == pytest.approx(float(expected), rel=1e-7)


def test_infinite_damping_leaves_the_partial_gradient():
    game = random_game()
    theta = some_theta(game)
    omega = tabular.best_response(theta, game)
    partial = direction(theta, omega, game, Settings("nested"))
    gaps = [error(direction(theta, omega, game, Settings(damping=x)), partial) for x in (1.0, 1e3, 1e6, 1e12)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-10 and gaps[0] > 0.01


@pytest.mark.parametrize("settings", [Settings(solver="nystrom", rank=3), Settings(solver="cg", rank=3)])
def test_solvers_of_full_rank_are_exact_and_of_rank_one_are_not(settings):
    game = random_game()
    theta = some_theta(game)
    omega = tabular.best_response(theta, game)
    exact = direction(theta, omega, game, Settings(damping=0.1))
    assert error(direction(theta, omega, game, settings._replace(damping=0.1)), exact) < 1e-8
    assert error(direction(theta, omega, game, settings._replace(damping=0.1, rank=1)), exact) > 1e-3


def test_the_nystrom_solve_is_that_of_its_approximation_in_the_span():
    """Rank 2 of 3, against the projection formula H_q = H^1/2 (projector on H^1/2 P) H^1/2."""
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    b = torch.tensor([1.0, 2.0, 3.0]).double()
    settings = Settings(solver="nystrom", rank=2, damping=0.5)
    found = tabular.solve((root.T @ root)[None], b[None], settings, torch.Generator().manual_seed(7))[0]
    p = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[0]
    basis = torch.linalg.qr(root @ p)[0]
    expected = torch.linalg.solve(root.T @ basis @ basis.T @ root + 0.5 * torch.eye(3).double(), b)
    assert error(found, expected) < 1e-8


def test_gradient_descent_goes_to_the_best_response():
    game = random_game(target_lambda=1.0)
    theta = some_theta(game)
    batch, start = Game(*(field[None] for field in game)), torch.zeros(1, 3).double()
    expected = tabular.best_response(theta, game)
    gaps = [
        error(tabular.descend(theta[None], start, batch, tabular.curvatures(batch), k)[0], expected)
        for k in (1, 10, 100, 3000)
    ]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-6
    answer = tabular.descend(theta[None], start + 3, batch, tabular.curvatures(batch), None)
    assert error(answer[0], expected) < 1e-9


def test_the_follower_is_asked_for_the_states_that_are_visited():
    games = tabular.make_games("garnet", (3,), range(2))
    one, visited = (tabular.follower_states(games, name) for name in ("one state", "visited"))
    for b in range(2):  # occupancy by summing over time
        transitions = games.transitions[b].mean(1)
        now, total = one[b], torch.zeros(20).double()
        for t in range(1000):
            total += (1 - tabular.GAMMA) * tabular.GAMMA**t * now
            now = now @ transitions
        assert error(visited[b], total) < 1e-9
    assert one.sum(1).tolist() == [1, 1] and torch.equal(tabular.follower_states(games, "uniform"), games.start)


# ---- Controls, MDPs --------------------------------------------------------------------------------------------
def test_controls_keep_the_sum_of_the_trace_and_break_its_place():
    games = tabular.make_games("garnet", (2,), range(3))
    theta = some_theta(tabular.make_game("garnet", 0, 2))[None].expand(3, -1, -1)
    omega = vmap(tabular.best_response)(theta, games)
    found = {
        name: tabular.ascent_direction(
            theta, omega, games, tabular.curvatures(games), Settings(name), torch.Generator().manual_seed(0)
        )
        - tabular.ascent_direction(theta, omega, games, tabular.curvatures(games), Settings("nested"), GENERATOR)
        for name in ("BLPO", "constant", "permuted")
    }
    curvature = vmap(hessian(tabular.follower_loss, 1))(theta, omega, games)
    v = torch.linalg.solve(curvature, vmap(grad(tabular.leader_objective, 1))(theta, omega, games))
    e = vmap(tabular.trace)(theta, v, games)
    policy = vmap(tabular.weighed_policy_gradient)(theta, torch.ones_like(e), games)  # of weights 1, state by state
    weights = {name: (x / policy).mean(-1) for name, x in found.items()}
    assert torch.allclose(weights["BLPO"], 2 * e, rtol=1e-6)
    assert torch.allclose(weights["constant"], 2 * e.mean(-1, keepdim=True).expand_as(e), rtol=1e-6)
    assert torch.allclose(weights["permuted"].sort(-1).values, (2 * e).sort(-1).values, rtol=1e-6)
    assert not torch.allclose(weights["permuted"], 2 * e, rtol=1e-2)


def test_garnet_mdps():
    transitions, rewards = tabular.garnet(torch.Generator().manual_seed(3))
    assert torch.allclose(transitions.sum(-1), torch.ones(20, 4).double()) and (transitions >= 0).all()
    assert ((transitions > 0).sum(-1) == 3).all() and 0 < (rewards > 0).sum() < 25
    assert not torch.equal(transitions, tabular.garnet(torch.Generator().manual_seed(4))[0])


def test_the_optimal_return_is_that_of_the_best_deterministic_policy():
    game = random_game(states=4, actions=2)
    found = [
        float(game.start.numpy() @ returns_by_recursion(50.0 * np.eye(2)[list(policy)], game, np.zeros(4), 1.0))
        for policy in itertools.product(range(2), repeat=4)
    ]
    assert float(tabular.optimal_return(Game(*(field[None] for field in game)))) == pytest.approx(max(found), rel=1e-8)


def test_the_chain():
    """Going on for ever from the start is worth gamma^9 / (1 - gamma); going back at once 0.02 / (1 - gamma)."""
    game = tabular.make_game("chain", 1, 1)
    for action, worth in ((1, GAMMA**9), (0, 0.02)):
        theta = np.full((10, 2), -50.0)
        theta[:, action] = 50.0
        assert returns_by_recursion(theta, game, np.zeros(10), 1.0)[0] == pytest.approx(worth / (1 - GAMMA), rel=1e-6)


# ---- Samples ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", tabular.ESTIMATORS)
def test_sampled_gradients_are_right_on_average(method):
    """BLPO: that of the exact hypergradient; GAE 1: that of the return; other lambdas: with the advantages that they
    have on average. 40,000 trajectories in 40 batches, five standard errors, and what the horizon cuts off."""
    game = tabular.make_game("garnet", 5, 3)
    games = Game(*(field[None] for field in game))
    theta, generator = 0.5 * some_theta(game)[None], torch.Generator().manual_seed(0)
    samples = [
        tabular.sampled_direction(theta, games, Settings(method, trajectories=1000), generator)[0] for _ in range(40)
    ]
    samples = torch.stack(samples)
    ridge = torch.linalg.solve(  # the critic of the samples has a ridge of 0.01
        2 * game.features.T @ (game.states[:, None] * game.features) + 0.01 * torch.eye(20).double(),
        2 * game.features.T @ (game.states * tabular.lambda_return(theta[0], game.start, 1.0, game)),
    )
    if method == "BLPO":
        batch = tabular.ascent_direction(
            theta, ridge[None], games, tabular.curvatures(games), Settings(damping=0.01), GENERATOR
        )
        expected = batch[0]
    else:
        lambda_, values = float(method.removeprefix("GAE ")), game.features @ ridge
        transitions, _ = tabular.induced(theta[0], game)
        visits = torch.linalg.solve((torch.eye(20).double() - GAMMA * transitions).T, game.start)
        ahead = tabular.lambda_return(theta[0], values, lambda_, game)
        gains = game.rewards + GAMMA * game.transitions @ ((1 - lambda_) * values + lambda_ * ahead)
        expected = (
            visits[:, None] * theta[0].softmax(-1) * (gains - (theta[0].softmax(-1) * gains).sum(-1, keepdim=True))
        )
    noise = samples.std(0) / 40**0.5
    assert ((samples.mean(0) - expected).abs() < 5 * noise + 0.02 * expected.abs().max()).all()
    assert noise.norm() < 0.1 * expected.norm()  # so that a wrong factor would show


# ---- Training and the command line -----------------------------------------------------------------------------
def test_with_a_constant_feature_blpo_learns_and_the_partial_gradient_does_not():
    games = tabular.make_games("garnet", (1,), range(1, 6))
    found = {}
    for method in ("BLPO", "nested", "policy gradient"):
        theta, norms = tabular.train(games, Settings(method), 150, 0.05)
        found[method] = tabular.fraction_of_optimum(theta, games).mean()
        assert norms.shape == (150, 5)
    assert found["BLPO"] > 0.95 and found["policy gradient"] > 0.95 and found["nested"] < 0.85


def test_conditions_are_those_of_finite_differences():
    game = tabular.make_game("garnet", 3, 3)
    theta = 0.3 * some_theta(game)
    found = tabular.conditions(theta, game)
    slope = lambda x: float(grad(tabular.total_objective)(torch.tensor(x), game).flatten()[0])  # noqa: E731
    row = differences(slope, theta.numpy(), 1e-4).flatten()
    curvature = hessian(tabular.total_objective)(theta, game).reshape(80, 80)
    assert error(curvature[0], row) < 1e-6
    assert float(found["largest eigenvalue of J's Hessian"]) == pytest.approx(
        float(torch.linalg.eigvalsh(curvature)[-1])
    )
    assert float(found["|grad_omega L|"]) < 1e-10
    smallest = torch.linalg.eigvalsh(2 / 20 * game.features[:, :3].T @ game.features[:, :3])[0]
    assert float(found["smallest eigenvalue of L's Hessian"]) == pytest.approx(float(smallest))


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, REPO / "blpo_tabular.py", *words], env=environment(), capture_output=True, text=True
    )


def test_one_command_writes_the_figures_and_their_table(tmp_path):
    done = run("--output-dir", str(tmp_path), "--seeds", "2", "--updates", "3", "--figures", "critics", "theorem")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["figure"] for row in rows} == {"critics", "theorem"}
    found = [row for row in rows if row["panel"] == "garnet" and row["series"] == "BLPO" and row["x"] == "5"]
    assert len(found) == 2 and all(0 < float(row["value"]) < 1 for row in found)
    assert (tmp_path / "critics.png").stat().st_size > 10_000 and (tmp_path / "theorem.png").exists()
    assert json.loads((tmp_path / "provenance.json").read_text())["args"]["seeds"] == 2
    assert "critics | garnet | BLPO | 5 | " in done.stdout


def test_an_output_folder_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(tabular.BadInput, match="--output-dir: .*File exists.*; name another or make it writable"):
        tabular.main(tabular.Args(output_dir=tmp_path / "file"))
    with pytest.raises(tabular.BadInput, match="--figures is"):
        tabular.Args(figures=())


def test_a_figure_without_a_number_is_drawn(tmp_path):
    row = {
        "figure": "theorem",
        "panel": "updates to epsilon",
        "series": "exact",
        "x": 0.1,
        "seed": 0,
        "value": float("nan"),
    }
    tabular.draw(tmp_path / "theorem.png", [row, row | {"seed": 1}])
    assert (tmp_path / "theorem.png").exists()


@pytest.mark.parametrize(
    "words, named", [(["--seeds", "1"], "--seeds is 1"), (["--learning-rate", "nan"], "--learning-rate is nan")]
)
def test_bad_input_is_one_sentence(tmp_path, words, named):
    done = run("--output-dir", str(tmp_path / "out"), *words)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {named}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
