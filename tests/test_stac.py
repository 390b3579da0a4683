"""stac.py and stac_ablations.py as programs: what a rollout means, AC as a special case, resume, divergence, bad input.

What the run folder, the command line and the environments promise is tested in the blocks that these scripts share with the
on-policy ones; their mathematics is in test_stackelberg.py.
"""

import json
import math
import os
import shutil
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import REPO, WALK, after_iteration, read_csv, without_time
from test_semantics import Tampered
from torch import nn

import stac
import stac_ablations

SCRIPT = "stac.py"
TINY = {
    "env_id": WALK, "num_envs": 2, "num_steps": 32, "total_timesteps": 4 * 64, "critic_steps": 2, "first_width": 8,
    "second_width": 6, "checkpoint_every": 1, "device": "cpu", "learning_rate": 0.01, "critic_learning_rate": 1e-3,
}  # fmt: skip
DISCRETE, CLOCK = "toy/DiscreteActions-v0", "toy_envs:toy/Clock-v0"
POSITIVE = {"hessian": "gauss-newton", "regularisation": 0.1}


def words(**changes) -> list[str]:
    """The command line of a tiny run."""
    argv = []
    for name, value in (TINY | changes).items():
        flag = name.replace("_", "-")
        argv += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return argv


def train(module=stac, **changes):
    """A tiny run in this process; returns its folder."""
    return module.train(module.parse_args(words(**changes)))


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_all_differ(module, tmp_path, base: dict, changes: list[dict]) -> list:
    """The folders of tiny runs with these changes, no two of which have the same weights."""
    folders = [train(module, run_dir=tmp_path / str(i), **base | change) for i, change in enumerate(changes)]
    found = [weights_of(folder) for folder in folders]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])
    return folders


# ---- Runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id, backend", [("CartPole-v0", "envpool"), ("CartPole-v1", "sync"), (WALK, "auto"),
                                             ("Pendulum-v1", "envpool")])  # fmt: skip
@pytest.mark.parametrize("stackelberg", [True, False])
def test_a_run_of_each_kind(tmp_path, env_id, backend, stackelberg):
    folder = train(
        env_id=env_id, env_backend=backend, run_dir=tmp_path, stackelberg=stackelberg, eval_episodes=2, save_model=True
    )
    rows = read_csv(folder / "metrics.csv")
    assert [int(row["global_step"]) for row in rows] == [64, 128, 192, 256]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and len(result["eval_returns"]) == 2
    assert all(math.isfinite(float(row["losses/value_loss"])) for row in rows)
    if stackelberg:
        assert all(float(row["bilevel/correction_norm"]) > 0 or float(row["bilevel/negative_curvature"]) for row in rows)
    else:
        assert all(float(row["bilevel/multiplier"]) == 1 and float(row["bilevel/correction_norm"]) == 0 for row in rows)
        assert all(row["bilevel/ihvp_residual"] == "" for row in rows)
    env = gym.make(env_id)
    obs = torch.as_tensor(env.observation_space.sample() if env_id != WALK else np.ones(3, np.float32))
    played = [stac.load_policy(folder / name) for name in ("model.pt", "checkpoint.pt")]
    actions = [policy(obs) for policy in played]
    assert env.action_space.contains(actions[0].numpy()[()]) and torch.equal(*actions)
    if stackelberg:
        exported = torch.export.export(played[0], (obs,)).module()
        torch.testing.assert_close(exported(obs), actions[0])


def test_infinite_regularisation_is_actor_critic(tmp_path):
    plain = train(run_dir=tmp_path / "ac", stackelberg=False)
    infinite = train(run_dir=tmp_path / "inf", regularisation=math.inf)
    stackelberg = train(run_dir=tmp_path / "stac", **POSITIVE)
    assert same(weights_of(plain), weights_of(infinite))
    assert not same(weights_of(plain), weights_of(stackelberg))


def test_weights_that_are_not_finite_make_the_step_actor_critics(tmp_path, monkeypatch):
    plain = train(run_dir=tmp_path / "ac", stackelberg=False)
    monkeypatch.setattr(stac, "directional_derivative", lambda critic, omega, obs, x: x.new_full((len(obs),), math.nan))
    fallen = train(run_dir=tmp_path / "fallen", **POSITIVE)
    assert same(weights_of(plain), weights_of(fallen))
    assert {row["bilevel/negative_curvature"] for row in read_csv(fallen / "metrics.csv")} == {"1.0"}


def test_a_run_repeats_bitwise_and_a_seed_matters(tmp_path):
    folders = [train(run_dir=tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert same(weights_of(folders[0]), weights_of(folders[1])) and not same(weights_of(folders[0]), weights_of(folders[2]))
    logs = [without_time(read_csv(folder / "metrics.csv")) for folder in folders]
    assert logs[0] == logs[1] != logs[2]


def test_the_states_of_the_leader_and_the_discount_matter(tmp_path):
    assert_all_differ(stac, tmp_path, POSITIVE, [{}, {"leader_states": "second"}, {"discount_gradient": True}, {"optimizer": "adam"}])


@pytest.mark.full
def test_each_argument_of_the_algorithm_matters(tmp_path):
    changes = [
        {}, {"hessian": "full"}, {"regularisation": 1.0}, {"cg_iterations": 1}, {"critic_steps": 3}, {"gamma": 0.9},
        {"gae_lambda": 0.5}, {"norm_adv": False}, {"discount_gradient": True}, {"bootstrap_truncation": False},
        {"learning_rate": 0.02}, {"critic_learning_rate": 2e-3}, {"stackelberg": False}, {"leader_states": "second"},
        {"optimizer": "adam"}, {"optimizer": "adam", "stackelberg": False},
    ]  # fmt: skip
    assert_all_differ(stac, tmp_path, POSITIVE, changes)


def recorded_calls(monkeypatch, names) -> dict[str, list]:
    """The arguments of the calls of these functions of stac.py from now on, tensors as copies."""
    kept = {name: [] for name in names}

    def wrap(name, original):
        def call(*arguments):
            kept[name].append([x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments])
            return original(*arguments)

        return call

    for name in names:
        owner = stac.Agent if hasattr(stac.Agent, name) else stac
        monkeypatch.setattr(owner, name, wrap(name, getattr(owner, name)))
    return kept


def adam_step(gradients, memory: list) -> list[torch.Tensor]:
    """Kingma and Ba 2015, algorithm 1, without the step size; memory holds the gradients of the steps so far."""
    memory.append([gradient.double() for gradient in gradients])
    steps, count = [], len(memory)
    for past in zip(*memory):
        m = sum(0.1 * 0.9 ** (count - 1 - i) * g for i, g in enumerate(past)) / (1 - 0.9**count)
        v = sum(0.001 * 0.999 ** (count - 1 - i) * g * g for i, g in enumerate(past)) / (1 - 0.999**count)
        steps.append((m / (v.sqrt() + 1e-8)).float())
    return steps


@pytest.mark.parametrize("env_id, which, optimizer", [
    (WALK, "all", "sgd"), (WALK, "second", "sgd"), (WALK, "all", "adam"), (DISCRETE, "second", "sgd"), (DISCRETE, "all", "adam"),
])  # fmt: skip
def test_one_iteration_by_hand(toy_envs, tmp_path, monkeypatch, env_id, which, optimizer):
    """The weights of each trajectory from a loop and a dense Hessian; then plain gradient steps: theta by learning_rate times
    the gradient of the weighted objective, omega m times downhill; or Adam's steps along these gradients."""
    calls = recorded_calls(monkeypatch, ["leader_states", "policy_objective", "value_loss", "logprob_and_entropy"])
    folder = train(env_id=env_id, run_dir=tmp_path, total_timesteps=64, hessian="gauss-newton", regularisation=0.5,
                   discount_gradient=True, critic_steps=3, leader_states=which, optimizer=optimizer)  # fmt: skip
    monkeypatch.undo()
    (_, advantages, base), (_, _, weights) = calls["policy_objective"]
    _, rollout, discounts, valid = calls["leader_states"][0]
    _, obs, actions = calls["logprob_and_entropy"][0]
    targets = calls["value_loss"][-1][1]
    assert discounts.unique().tolist() == pytest.approx([0, 0.99])  # gamma (1 - terminated)
    assert advantages.mean().abs() < 1e-6 and advantages.std().item() == pytest.approx(1, abs=1e-5)

    torch.manual_seed(1)
    after = weights_of(folder)
    agent = stac.Agent(obs.shape[1], after["actor.4.bias"].shape[0], env_id == DISCRETE, 8, 6)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    theta, omega = agent.actor_parameters(), list(agent.critic.parameters())

    def slopes(states) -> torch.Tensor:
        """grad V (n, P)."""
        gradients = [torch.autograd.grad(agent.critic(state), omega) for state in states]
        return torch.stack([torch.cat([each.flatten() for each in one]) for one in gradients]).double()

    trajectories = []  # their rows
    for column in range(2):
        for t in range(32):
            if t == 0 or not valid[t - 1, column]:
                trajectories.append([])
            if valid[t, column]:
                trajectories[-1].append((t, column))
    visited = slopes(rollout[:-1][valid.bool()])
    b = visited.mean(0)
    if which == "second":
        seconds = slopes(rollout[rows[0][0] + 1, rows[0][1]] for rows in trajectories)
        b = (torch.stack([discounts[rows[0]] for rows in trajectories])[:, None] * seconds).mean(0)
    x = torch.linalg.solve(2 / len(visited) * visited.T @ visited + 0.5 * torch.eye(len(b), dtype=torch.float64), b)
    expected = torch.zeros(32, 2)
    for rows in trajectories:
        for t, column in rows:
            u = slopes([rollout[rows[0]]])[0] @ x
            expected[t, column] = 0.99 ** (t - rows[0][0]) * (1 + 2 * u)
    torch.testing.assert_close(weights, expected[valid.bool()], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(weights, base, atol=0.1)

    gradients = torch.autograd.grad((weights * advantages * agent.logprob_and_entropy(obs, actions)[0]).mean(), theta)
    for parameter, step in zip(theta, adam_step(gradients, []) if optimizer == "adam" else gradients):
        parameter.data += 0.01 * step
    memory = []
    for _ in range(3):
        loss = ((agent.critic(obs).squeeze(-1) - targets) ** 2).mean()
        gradients = torch.autograd.grad(loss, omega)
        for parameter, step in zip(omega, adam_step(gradients, memory) if optimizer == "adam" else gradients):
            parameter.data -= 1e-3 * step
    for name, parameter in agent.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-4, atol=1e-7)


def test_other_networks_need_no_other_line(tmp_path, monkeypatch):
    """Acting, learning, the critic's derivatives, saving and playing all call the modules."""

    def network(inputs, first_width, second_width, outputs):
        layers = [nn.Linear(inputs, 7), nn.SiLU(), nn.LayerNorm(7), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(4, outputs))

    monkeypatch.setattr(stac, "mlp", network)
    folder = train(run_dir=tmp_path, save_model=True, hessian="full", regularisation=500)
    rows = read_csv(folder / "metrics.csv")
    assert all(float(row["bilevel/correction_norm"]) > 0 and float(row["bilevel/ihvp_residual"]) < 1e-3 for row in rows)
    agent = stac.load_policy(folder / "model.pt")
    obs = torch.randn(5, 3)
    torch.testing.assert_close(agent(obs), agent.actor(obs).clamp(agent.action_low, agent.action_high))
    noise = agent.noise(5).detach()
    logprobs, _ = agent.logprob_and_entropy(obs, agent.sample(obs, noise))
    normal = torch.distributions.Normal(0, agent.actor_logstd.exp())
    torch.testing.assert_close(logprobs, normal.log_prob(noise).sum(-1))


# ---- The rollout -----------------------------------------------------------------------------------------------
@pytest.fixture
def from_the_start(toy_envs, monkeypatch):
    """The records of the toy tasks begin with the run, after the task was tried."""
    opened = stac.Run.open

    def open_and_forget(run):
        opened(run)
        toy_envs.EPISODES.clear()

    monkeypatch.setattr(stac.Run, "open", open_and_forget)
    return toy_envs


def test_episodes_are_those_that_really_ended(from_the_start, tmp_path):
    folder = train(run_dir=tmp_path)
    rows = read_csv(folder / "episodes.csv")
    assert len(rows) > 20
    logged = [(float(row["episodic_return"]), int(row["episodic_length"])) for row in rows]
    real = [(value, length) for _, value, length, _ in from_the_start.EPISODES]
    assert len(logged) == len(real)
    np.testing.assert_allclose(sorted(logged), sorted(real), rtol=1e-5)


@pytest.mark.parametrize("tampering", [{"reset_reward": 1e3}, {"terminal_offset": 50.0}])
def test_the_row_after_an_episodes_end_influences_nothing(tmp_path, monkeypatch, tampering):
    original = stac.make_envs

    class TamperedAndReset(Tampered):
        def reset(self):  # of every rollout: the first row after it is no reset row
            self.ended = None
            return super().reset()

    def tampered(**changes):
        def make_envs(*arguments):
            envs, *spaces = original(*arguments)
            return TamperedAndReset(envs, **changes), *spaces

        return make_envs

    folders = []
    for i, changes in enumerate(({}, tampering, {"truncated_offset": 50.0})):
        monkeypatch.setattr(stac, "make_envs", tampered(**changes))
        folders.append(train(run_dir=tmp_path / str(i), leader_states="second"))
    clean, reset, truncated = (weights_of(folder) for folder in folders)
    assert same(clean, reset)
    returns = [[row["episodic_return"] for row in read_csv(folder / "episodes.csv")] for folder in folders]
    assert returns[0] == returns[1]
    assert not same(clean, truncated)  # the final observation of a truncated episode is a bootstrap


def test_every_rollout_begins_with_new_episodes(from_the_start, tmp_path, monkeypatch):
    """Proposition 1 weighs a trajectory by its initial state: none may begin in the middle of an episode."""
    resets, original = [], from_the_start.Walk.reset

    def reset(env, *, seed=None, options=None):
        resets.append(seed)
        return original(env, seed=seed, options=options)

    monkeypatch.setattr(from_the_start.Walk, "reset", reset)
    folder = train(run_dir=tmp_path / "counted")
    ended, resets = len(read_csv(folder / "episodes.csv")), len([seed for seed in resets if seed is None])
    assert 2 * 4 < resets <= ended + 2 * 4  # before each of four rollouts, and after an episode unless the rollout ended


@pytest.mark.parametrize("backend", ["envpool", "sync"])
def test_a_reset_right_after_an_episodes_end_leaves_no_second_one(backend):
    """A rollout may end with the end of an episode; the next rollout's first step must then be a transition."""
    envs, *_ = stac.make_envs(stac.Args(num_envs=1, env_backend=backend), 3)
    envs.reset()
    ended = np.array([False])
    while not ended[0]:
        _, _, terminated, truncated, _ = envs.step(np.array([1]))
        ended = terminated | truncated
    first, _ = envs.reset()
    first = np.array(first)
    second, reward, *_ = envs.step(np.array([1]))
    assert reward[0] == 1
    np.testing.assert_allclose(second[0, 0], first[0, 0] + 0.02 * first[0, 1], rtol=1e-4, atol=1e-6)  # x + dt v
    envs.close()


def test_discrete_actions_of_any_first_number(toy_envs, tmp_path):
    """A task whose actions are 5, 6, 7 gets those."""
    seen = []

    class Shifted(toy_envs.Spaces):
        def step(self, action):
            seen.append(int(action))
            return super().step(action)

    spaces = {"observation_space": toy_envs.BOX, "action_space": gym.spaces.Discrete(3, start=5)}
    gym.register("toy/Shifted-v0", entry_point=Shifted, kwargs=spaces)
    folder = train(env_id="toy/Shifted-v0", run_dir=tmp_path, eval_episodes=1, save_model=True)
    assert set(seen) == {5, 6, 7}
    assert stac.load_policy(folder / "model.pt")(np.zeros((4, 2), np.float32)).min() >= 5
    gym.registry.pop("toy/Shifted-v0")


# ---- Resume, divergence, bad input -----------------------------------------------------------------------------
@pytest.mark.parametrize("module, optimizer", [(stac, "sgd"), (stac, "adam"), (stac_ablations, "sgd"), (stac_ablations, "adam")])
def test_a_resumed_run_is_the_one_left_alone(toy_envs, tmp_path, monkeypatch, module, optimizer):
    """Also one that is extended, and played. In this task every rollout begins alike, whatever the seed."""
    changes = {"env_id": CLOCK, "save_model": True, "optimizer": optimizer}
    changes |= {} if module is stac else {"control": "mean-multiplier", "gradient_noise": 0.01, **POSITIVE}
    alone = train(module, run_dir=tmp_path / "alone", **changes)

    def fail():
        raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        after_iteration(patch, f"{module.__name__}.py", 3, fail)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(module, run_dir=tmp_path / "broken", **changes)
    (folder,) = (tmp_path / "broken").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == 128
    module.train(module.parse_args(["--resume", str(folder)]))
    short = train(module, run_dir=tmp_path / "short", **changes, total_timesteps=128)
    module.train(module.parse_args(["--resume", str(short), "--total-timesteps", "256"]))
    for other in (folder, short):
        assert same(weights_of(alone), weights_of(other))
        assert without_time(read_csv(alone / "metrics.csv")) == without_time(read_csv(other / "metrics.csv"))
        assert json.loads((other / "result.json").read_text())["status"] == "finished"
    module.train(module.parse_args(["--resume", str(short), "--eval-episodes", "2"]))
    assert len(json.loads((short / "result.json").read_text())["eval_returns"]) == 2
    assert same(weights_of(alone), weights_of(short))


def test_resume_with_other_networks_is_refused(toy_envs, tmp_path):
    folder = train(run_dir=tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(stac.BadInput, match="another version made it, or networks of another shape"):
        stac.train(stac.parse_args(["--resume", str(copy), "--first-width", "9", "--total-timesteps", "512"]))
    assert same(weights_of(folder), weights_of(copy))
    checkpoint = torch.load(copy / "checkpoint.pt", weights_only=True)
    torch.save({name: value for name, value in checkpoint.items() if name != "optimisers"}, copy / "checkpoint.pt")
    with pytest.raises(stac.BadInput, match="another version made it"):
        stac.train(stac.parse_args(["--resume", str(copy), "--total-timesteps", "512"]))


@pytest.mark.parametrize("first, second", [("sgd", "adam"), ("adam", "sgd"), ("adam", "adam")])
def test_a_step_size_or_optimiser_given_again_holds(toy_envs, tmp_path, first, second):
    """Adam, given again, begins anew; its memory stays otherwise."""
    folder = train(run_dir=tmp_path, optimizer=first)
    again = ["--optimizer", second, "--learning-rate", "0.005", "--total-timesteps", "512"]
    stac.train(stac.parse_args(["--resume", str(folder), *again]))
    actor, critic = torch.load(folder / "checkpoint.pt", weights_only=True)["optimisers"]
    assert [each["param_groups"][0]["lr"] for each in (actor, critic)] == [0.005, 1e-3]
    assert [each["param_groups"][0]["maximize"] for each in (actor, critic)] == [True, False]
    if second == "adam":
        assert actor["state"][0]["step"] == (8 if first == "adam" else 4)


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    after_iteration(monkeypatch, SCRIPT, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train(run_dir=tmp_path, checkpoint_every=1000)
    folder = next(tmp_path.iterdir())
    assert stop.value.code == 128 + signal.SIGTERM
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == 128


@pytest.mark.parametrize(
    "size, what, step", [({"critic_learning_rate": 1e30}, "weights", 64), ({"learning_rate": 1e38}, "losses", 128)]
)
def test_a_run_that_diverges_stops_with_one_sentence(command_line, tmp_path, size, what, step):
    """What is not finite is logged and in no checkpoint."""
    status, _, err = command_line(SCRIPT, *words(run_dir=tmp_path, **size))
    assert status == 1 and err.endswith(f"error: the {what} stopped being finite by step {step}\n")
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "diverged"
    assert len(read_csv(folder / "metrics.csv")) == step / 64
    if step > 64:
        assert all(x.isfinite().all() for x in weights_of(folder).values())
    else:
        assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "changes, named",
    [({"env_id": "CartPol-v0"}, "CartPol"), ({"env_id": "toy/MultiDiscreteActions-v0"}, "MultiDiscrete"),
     ({"env_id": "toy/MatrixActions-v0"}, "action space"), ({"total_timesteps": 10}, "less than one rollout of 64"),
     ({"regularisation": -1}, "--regularisation is"), ({"regularisation": math.nan}, "--regularisation is"),
     ({"critic_steps": 0}, "--critic-steps is"), ({"leader_states": "third"}, "--leader-states")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(command_line, toy_envs, tmp_path, changes, named):
    status, _, err = command_line(SCRIPT, *words(run_dir=tmp_path / "runs", **changes))
    assert status == 2 and named in err and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1 or "leader_states" in changes  # tyro's own frame
    assert not (tmp_path / "runs").exists()


# ---- The laboratory --------------------------------------------------------------------------------------------
def test_the_laboratory_is_by_default_the_method(tmp_path):
    method, laboratory = train(run_dir=tmp_path / "1"), train(stac_ablations, run_dir=tmp_path / "2")
    assert same(weights_of(method), weights_of(laboratory))
    names = [list(module.Args.model_fields) for module in (stac, stac_ablations)]
    assert names[1][: len(names[0])] == names[0] and set(stac.METRICS) < set(stac_ablations.METRICS)


def test_each_flag_of_the_laboratory_matters(tmp_path):
    changes = [
        {}, {"estimator": "released"}, {"estimator": "timestep"}, {"control": "step-length"}, {"control": "mean-multiplier"},
        {"gradient_noise": 0.05},
    ]  # fmt: skip
    folders = assert_all_differ(stac_ablations, tmp_path, POSITIVE, changes)
    for row in read_csv(folders[1] / "metrics.csv"):  # the released step is parallel to AC's
        assert abs(float(row["bilevel/cosine"])) > 1 - 1e-6 and float(row["bilevel/weight_std"]) < 1e-6


def test_without_the_guard_an_indefinite_hessian_gives_another_run(tmp_path):
    folders = [train(stac_ablations, run_dir=tmp_path / str(guard), guard=guard) for guard in (True, False)]
    rows = [read_csv(folder / "metrics.csv") for folder in folders]
    assert any(float(row["bilevel/negative_curvature"]) for row in rows[0])
    assert not same(weights_of(folders[0]), weights_of(folders[1]))


# ---- Learning --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [["--stackelberg"], ["--no-stackelberg", "--learning-rate", "0.2"]])
def test_learns_to_balance_the_pole(tmp_path, algorithm):
    """A random policy has a return of 20. AC has twice the step size, about the multiplier of STAC."""
    argv = ["--env-id", "CartPole-v0", "--critic-steps", "80", "--total-timesteps", "200000", "--device", "cpu"]
    folder = stac.train(stac.parse_args([*argv, "--run-dir", str(tmp_path), *algorithm]))
    assert json.loads((folder / "result.json").read_text())["final_return"] > 60


def test_the_script_is_where_the_tests_look():
    assert (REPO / SCRIPT).samefile(stac.__file__)
