"""The motivating example of Stackelberg actor-critic: its table to the update, its derivatives, its equilibrium."""

import ast
import csv
import json
import math

import numpy as np
import pytest
import stackelberg_toy as toy
import torch
from conftest import REPO

RESULTS = REPO / "benchmark" / "results" / "stackelberg_toy"
UPDATES, STEP = 49_999, 0.01
SMALL = ["--updates", "300", "--sac-updates", "40", "--sac-seeds", "3"]


@pytest.fixture(scope="module")
def paths() -> dict[str, np.ndarray]:
    """The three runs of the table at the paper's settings."""
    return {name: toy.simulate(damping, UPDATES, STEP) for name, damping in DAMPINGS.items()}


DAMPINGS = {"individual": math.inf, "Stackelberg": 0.0, "regularised": 0.04}


# ---- The table -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, integers, rounded",
    [
        ("individual", (1175, 23958, 15925, None, 12), (0.0733, 5.87, 6.41, -0.0276)),
        ("Stackelberg", (4441, 4441, None, None, 0), (0.0316, 0.04, 1.69, -0.0057)),
        ("regularised", (1022, 4560, 46427, 46427, 1), (0.0078, 0.38, 1.96, -0.0023)),
    ],
)
def test_table_to_the_update(paths, name, integers, rounded):
    row = toy.summary(paths[name])
    names = ("first 1e-1", "settle 1e-1", "first 1e-2", "settle 1e-2", "sign changes of theta")
    assert tuple(row[each] for each in names) == integers
    assert (
        round(row["final error"], 4), round(row["revolutions"], 2), round(row["path length"], 2),
        round(row["lowest return after 1000"], 4),
    ) == rounded  # fmt: skip


def test_error_on_the_way(paths):
    at = [1_000, 5_000, 10_000, 20_000]
    for name, want in {
        "individual": [0.2230, 0.0610, 0.1620, 0.0499],
        "Stackelberg": [0.1925, 0.0948, 0.0688, 0.0495],
        "regularised": [0.1055, 0.0964, 0.0691, 0.0405],
    }.items():
        np.testing.assert_allclose(toy.distance(paths[name][at]), want, atol=5.1e-5, rtol=0)


@pytest.mark.parametrize(
    "damping, settles", [(0.001, 4159), (0.01, 1672), (0.1, 4693), (0.5, 6449), (1.0, 9433), (10.0, 21117)]
)
def test_settling_by_damping(damping, settles):
    assert toy.settles_below(toy.distance(toy.simulate(damping, UPDATES, STEP)), 1e-1) == settles


@pytest.mark.slow
@pytest.mark.parametrize("damping, settles", [(0.0, 508_751), (math.inf, 2_745_633)])
def test_settling_below_1e_2_takes_longer_than_the_paper_shows(damping, settles):
    assert toy.settles_below(toy.distance(toy.simulate(damping, 3_000_000, STEP)), 1e-2) == settles


def test_first_and_settled():
    error = np.array([3.0, 0.5, 2.0, 0.5, 0.1])
    assert toy.first_below(error, 1.0) == 1 and toy.settles_below(error, 1.0) == 3
    assert toy.first_below(error, 0.1) is None and toy.settles_below(error, 0.1) is None  # strictly below
    assert toy.first_below(error, 9.0) == 0 and toy.settles_below(error, 9.0) == 0
    assert toy.first_below(error[:3], 1.0) == 1 and toy.settles_below(error[:3], 1.0) is None


# ---- The dynamics ----------------------------------------------------------------------------------------------
def scalar_game(theta: float, w: float):
    leader, follower = lambda x, y: -(x * y).sum(), lambda x, y: ((y * x + toy.A * x * x) ** 2).sum()
    return leader, follower, torch.tensor([theta], dtype=torch.float64), torch.tensor([w], dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.04, 7.0])
@pytest.mark.parametrize("theta, w", [(-1.0, 1.0), (0.3, 0.8), (-0.05, -0.4)])
def test_directions_are_the_derivatives_of_the_game(theta, w, damping):
    game = scalar_game(theta, w)
    assert -toy.total_gradient(*game, damping).item() == pytest.approx(toy.leader_direction(theta, w, damping), rel=1e-12)
    assert -torch.func.grad(game[1], 1)(*game[2:]).item() == pytest.approx(toy.follower_direction(theta, w), rel=1e-12)
    assert -torch.func.grad(game[0])(*game[2:]).item() == toy.leader_direction(theta, w, math.inf)


def test_damping_leads_from_the_stackelberg_to_the_individual_gradient():
    """Proposition 2; the error falls in proportion to lambda at one end and to 1/lambda at the other."""
    total, individual = toy.leader_direction(0.7, -0.4, 0.0), toy.leader_direction(0.7, -0.4, math.inf)
    near = [toy.leader_direction(0.7, -0.4, damping) - total for damping in (1e-6, 1e-7)]
    far = [toy.leader_direction(0.7, -0.4, damping) - individual for damping in (1e6, 1e7)]
    assert near[0] / near[1] == pytest.approx(10, rel=1e-4) and abs(near[1]) < 1e-6
    assert far[0] / far[1] == pytest.approx(10, rel=1e-4) and abs(far[1]) < 1e-6


def test_on_the_best_response_the_total_derivative_is_that_of_the_reward():
    theta = 0.6
    assert toy.leader_direction(theta, -toy.A * theta, 0.0) == pytest.approx(-2 * toy.A * theta, rel=1e-12)
    assert toy.follower_direction(theta, -toy.A * theta) == 0


def test_stackelberg_decays_along_its_slow_curve(paths):
    """w = -3 a theta and theta' = -(4/3) theta^3, so |theta| = sqrt(3 / (8 t)): algebraic, not faster."""
    theta, w = paths["Stackelberg"][-1]
    assert w == pytest.approx(-3 * toy.A * theta, rel=2e-3)
    assert abs(theta) == pytest.approx(math.sqrt(3 / (8 * STEP * UPDATES)), rel=0.02)


# ---- The SAC variant -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stackelberg", [False, True])
def test_sac_directions_against_autograd(stackelberg):
    rng, ent_coef = np.random.default_rng(3), 0.2
    noise = rng.normal(size=(5, 4))
    mean, std, w = rng.normal(size=5), rng.uniform(0.3, 1.2, size=5), rng.normal(size=5)
    got = toy.sac_directions(mean, std, w, noise, ent_coef, stackelberg)
    for i in range(5):
        drawn = torch.from_numpy(noise[i])

        def action(x):
            return torch.tanh(x[0] + x[1] * drawn)

        def actor(x, y):
            normal = torch.distributions.Normal(x[0], x[1])
            logprob = normal.log_prob(x[0] + x[1] * drawn) - torch.log(1 - action(x) ** 2)
            return (ent_coef * logprob - y[0] * action(x)).mean()

        def critic(x, y):
            return ((y[0] * action(x) + action(x) ** 2) ** 2).mean()

        x, y = torch.tensor([mean[i], std[i]], dtype=torch.float64), torch.tensor([w[i]], dtype=torch.float64)
        leader = toy.total_gradient(actor, critic, x, y) if stackelberg else torch.func.grad(actor)(x, y)
        want = [*(-leader), *(-torch.func.grad(critic, 1)(x, y))]
        np.testing.assert_allclose([each[i] for each in got], torch.stack(want), rtol=1e-10)


def test_sac_over_64_seeds():
    """The claim that one seed cannot show: the Stackelberg actor ends with less error and less noise. With these seeds it is
    a little slower at first; with others the medians lie in the same brackets, in either order."""
    args = toy.Args()
    sac, stsac = (toy.sac_summary(toy.simulate_sac(stackelberg, args)) for stackelberg in (False, True))
    assert 330 < sac["first 1e-1"] < stsac["first 1e-1"] < 510
    assert stsac["settle 1e-1"] < sac["settle 1e-1"]
    assert 0.030 < sac["median error of the second half"] < 0.048
    assert 0.016 < stsac["median error of the second half"] < 0.028
    assert 0.75 < sac["median final std"] < 1.0 and 0.3 < stsac["median final std"] < 0.5


def test_a_seed_has_the_same_path_alone_as_among_others():
    few, many = toy.Args(sac_updates=30, sac_seeds=2, seed=5), toy.Args(sac_updates=30, sac_seeds=4, seed=4)
    np.testing.assert_array_equal(toy.simulate_sac(True, few), toy.simulate_sac(True, many)[:, 1:3])


# ---- Differential Stackelberg equilibrium ----------------------------------------------------------------------
def test_conditions_on_a_game_with_a_known_equilibrium():
    """f1 = |x1 - c|^2 / 2 + x1.B x2, f2 = |x2 - C x1|^2 has the response C x1, so f1 along it is quadratic. As a
    simultaneous game it has no equilibrium of this kind there: the partial gradient is not 0."""
    generator = torch.Generator().manual_seed(0)
    B, C, c = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 3), (3, 2), (2,)))
    H = torch.eye(2, dtype=torch.float64) + 0.1 * (B @ C + (B @ C).T)

    def leader(x, y):
        return 0.5 * ((x - c) ** 2).sum() + 0.1 * x @ B @ y

    def follower(x, y):
        return ((y - C @ x) ** 2).sum()

    x = torch.linalg.solve(H, c)
    found = toy.equilibrium_conditions(leader, follower, x, C @ x)
    assert found["total gradient"] < 1e-12 and found["follower's gradient"] < 1e-12
    assert found["total Hessian"] == pytest.approx(torch.linalg.eigvalsh(H).min().item(), rel=1e-10)
    assert found["follower's Hessian"] == pytest.approx(2.0, rel=1e-12)
    assert toy.is_equilibrium(found)
    assert torch.func.grad(leader)(x, C @ x).norm() > 0.01
    assert not toy.is_equilibrium(toy.equilibrium_conditions(leader, follower, x + 0.1, C @ (x + 0.1)))  # gradient
    assert not toy.is_equilibrium(toy.equilibrium_conditions(leader, follower, x, C @ x + 0.1))
    assert not toy.is_equilibrium(toy.equilibrium_conditions(leader, lambda x, y: -follower(x, y), x, C @ x))
    saddle = toy.equilibrium_conditions(lambda x, y: -leader(x, y), follower, x, C @ x)
    assert saddle["total gradient"] < 1e-12 and saddle["total Hessian"] < 0 and not toy.is_equilibrium(saddle)


def test_total_hessian_is_that_of_the_leader_along_the_best_response():
    """Of a game that is not quadratic: the follower's response is x2 = sin(x1)."""

    def leader(x, y):
        return (torch.exp(x) * y**2).sum() + (x * y).sum() ** 2

    def follower(x, y):
        return ((y - torch.sin(x)) ** 2).sum() + ((y - torch.sin(x)) ** 4).sum()

    x = torch.tensor([0.4, 1.1], dtype=torch.float64)
    found = toy.equilibrium_conditions(leader, follower, x, torch.sin(x))
    along = torch.func.hessian(lambda x: leader(x, torch.sin(x)))(x)
    assert found["total Hessian"] == pytest.approx(torch.linalg.eigvalsh(along).min().item(), rel=1e-10)


def test_the_example_fulfils_the_conditions_in_the_limit_only():
    for theta in (0.5, -1e-3):
        found = toy.toy_conditions(theta, -toy.A * theta)
        assert found["follower's gradient"] == 0
        assert found["total gradient"] == pytest.approx(2 * toy.A * abs(theta), rel=1e-9)
        assert found["total Hessian"] == pytest.approx(2 * toy.A, rel=1e-9)  # that of -R
        assert found["follower's Hessian"] == pytest.approx(2 * theta**2, rel=1e-9)
    found = toy.toy_conditions(0.0, 0.0)
    assert found["follower's Hessian"] == 0 and math.isnan(found["total Hessian"]) and not toy.is_equilibrium(found)


# ---- The command -----------------------------------------------------------------------------------------------
def test_the_command_draws_the_figures_and_writes_the_tables(command_line, tmp_path):
    status, out, err = command_line("stackelberg_toy.py", "--output-dir", tmp_path / "new" / "toy", *SMALL)
    assert status == 0 and err == ""
    folder = tmp_path / "new" / "toy"
    files = {path.name for path in folder.iterdir()}
    figures = {f"figure_{number}.png" for number in (1, 2, 4, 5, 6, 7)}
    tables = {"table.csv", "damping_sweep.csv", "sac_table.csv", "equilibrium.csv", "provenance.json"}
    assert files == figures | tables
    assert all((folder / name).stat().st_size > 5_000 for name in figures)
    with open(folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    want = toy.summary(toy.simulate(math.inf, 300, STEP))
    assert [row["run"] for row in rows] == ["individual", "Stackelberg", "regularised 0.04"]
    assert float(rows[0]["final error"]) == want["final error"] and rows[0]["lowest return after 1000"] == ""
    for title in ("The example, 300 updates", "The SAC variant, 3 seeds", "Differential Stackelberg equilibrium"):
        assert title in out
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command_line("stackelberg_toy.py", "--output-dir", folder, *SMALL)[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # a run repeats bitwise


def test_a_figure_that_cannot_be_written_leaves_the_old_one(command_line, tmp_path, monkeypatch):
    (tmp_path / "figure_1.png").write_bytes(b"old")

    def half(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy.Figure, "savefig", half)
    status, _, err = command_line("stackelberg_toy.py", "--output-dir", tmp_path, *SMALL)
    assert status == 2 and "--output-dir cannot be written" in err and "No space left" in err
    assert (tmp_path / "figure_1.png").read_bytes() == b"old" and not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize(
    "words, named",
    [(["--updates", "0"], "--updates is 0: "), (["--damping", "0"], "--damping is 0.0"),
     (["--damping", "nan"], "--damping is nan"), (["--seed", "-1"], "--seed is -1"), (["--step-size", "2"], "--step-size is 2.0"),
     (["--sac-seeds", "0"], "--sac-seeds is 0"), (["--step-size", "1", "--ent-coef", "1e300"], "diverge"),
     (["--output-dir", "{file}/toy"], "--output-dir")],
)  # fmt: skip
def test_bad_input_is_one_sentence(command_line, tmp_path, words, named):
    (tmp_path / "file").write_text("")
    words = [word.format(file=tmp_path / "file") for word in words]
    folder = tmp_path / "out"
    status, out, err = command_line("stackelberg_toy.py", "--output-dir", folder, *SMALL, *words)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert not folder.exists()


def test_words_that_cannot_be_parsed(command_line):
    for words in (["--updates", "many"], ["--update", "3"]):
        status, _, err = command_line("stackelberg_toy.py", *words)
        assert status == 2 and words[0] in err and "Traceback" not in err


def test_the_script_stands_alone_and_documents_itself():
    tree = ast.parse((REPO / "stackelberg_toy.py").read_text())
    own = {path.stem for path in REPO.glob("*.py")} | {"benchmark", "tests"}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "numpy" in names and not {name.split(".")[0] for name in names} & own
    definitions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(definitions) > 20 and all(ast.get_docstring(node) for node in definitions)


# ---- The committed results -------------------------------------------------------------------------------------
def test_committed_table_is_what_the_script_computes(paths):
    with open(RESULTS / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row, path in zip(rows, paths.values()):
        for name, value in toy.summary(path).items():
            if isinstance(value, float):
                assert float(row[name]) == pytest.approx(value, rel=1e-9)
            else:
                assert row[name] == ("" if value is None else str(value))
    made = json.loads((RESULTS / "provenance.json").read_text())
    assert made["args"]["updates"] == UPDATES and "dirty" not in made["commit"] and not made.get("script_changed_since")
