"""stac.py as a program: what a rollout means, AC as a special case, run folder, resume, bad input."""

import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import stac
import stac_ablations
import torch
from conftest import REPO, WALK, after_iteration, read_csv, without_time
from test_command_line import assert_one_sentence, ends, flag, numbers
from test_semantics import Tampered

SCRIPT = "stac.py"
TINY = {
    "env_id": WALK, "num_envs": 2, "num_steps": 32, "total_timesteps": 4 * 64, "critic_steps": 2, "first_width": 8,
    "second_width": 6, "checkpoint_every": 1, "device": "cpu", "learning_rate": 0.01, "critic_learning_rate": 1e-3,
}  # fmt: skip
DISCRETE = "toy/DiscreteActions-v0"


def words(**changes) -> list[str]:
    """The command line of a tiny run."""
    argv = []
    for name, value in (TINY | changes).items():
        argv += [flag(name) if value else flag(f"no_{name}")] if isinstance(value, bool) else [flag(name), str(value)]
    return argv


def train(module=stac, **changes):
    """A tiny run in this process; returns its folder."""
    return module.train(module.parse_args(module.Args, words(**changes)))


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- Runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id, backend", [("CartPole-v0", "envpool"), ("CartPole-v1", "gymnasium"), (WALK, "auto"),
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
    policy = stac.load_policy(folder / "model.pt")
    envs, observation_space, action_space = stac.make_envs(env_id, 1, 0, backend)
    action = policy(np.zeros(observation_space.shape, np.float32))
    assert action_space.contains(action)
    envs.close()


def test_infinite_regularisation_is_actor_critic(tmp_path):
    plain = train(run_dir=tmp_path / "ac", stackelberg=False)
    infinite = train(run_dir=tmp_path / "inf", regularisation=math.inf)
    stackelberg = train(run_dir=tmp_path / "stac", hessian="gauss-newton", regularisation=0.1)
    assert same(weights_of(plain), weights_of(infinite))
    assert not same(weights_of(plain), weights_of(stackelberg))


def test_a_run_repeats_bitwise_and_a_seed_matters(tmp_path):
    folders = [train(run_dir=tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert same(weights_of(folders[0]), weights_of(folders[1])) and not same(weights_of(folders[0]), weights_of(folders[2]))
    logs = [without_time(read_csv(folder / "metrics.csv")) for folder in folders]
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.full
def test_each_argument_of_the_algorithm_matters(tmp_path):
    base = {"hessian": "gauss-newton", "regularisation": 0.1}
    changes = [
        {}, {"hessian": "full"}, {"regularisation": 1.0}, {"cg_iterations": 1}, {"critic_steps": 3}, {"gamma": 0.9},
        {"gae_lambda": 0.5}, {"norm_adv": False}, {"discount_gradient": True}, {"bootstrap_truncation": False},
        {"learning_rate": 0.02}, {"critic_learning_rate": 2e-3}, {"stackelberg": False},
    ]  # fmt: skip
    found = [weights_of(train(run_dir=tmp_path / str(i), **base | change)) for i, change in enumerate(changes)]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])


@pytest.mark.parametrize("env_id", [WALK, DISCRETE])
def test_one_iteration_by_hand(toy_envs, tmp_path, monkeypatch, env_id):
    """Plain gradient steps: theta by learning_rate times the gradient of the weighted objective, omega m times downhill."""
    objectives, batches, losses = [], [], []

    def record(name, kept):
        original = getattr(stac, name)
        monkeypatch.setattr(stac, name, lambda *tensors: kept.append([x.detach().clone() for x in tensors]) or original(*tensors))

    def logprob(agent, obs, actions, original=stac.Agent.logprob):
        batches.append((obs.clone(), actions.clone()))
        return original(agent, obs, actions)

    record("policy_objective", objectives)
    record("value_loss", losses)
    monkeypatch.setattr(stac.Agent, "logprob", logprob)
    folder = train(env_id=env_id, run_dir=tmp_path, total_timesteps=64, hessian="gauss-newton", regularisation=0.5,
                   discount_gradient=True, critic_steps=3)  # fmt: skip
    monkeypatch.undo()
    obs, actions = batches[0]
    (_, advantages, base), (_, _, weights), *_ = objectives
    assert advantages.mean().abs() < 1e-6 and advantages.std().item() == pytest.approx(1, abs=1e-5)
    assert base.max() == 1 and base.min() < 0.98 and not torch.allclose(weights, base)

    torch.manual_seed(1)
    after = weights_of(folder)
    agent = stac.Agent(obs.shape[1], after["actor.4.bias"].shape[0], env_id == DISCRETE, 8, 6)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    theta = agent.actor_parameters()
    gradients = torch.autograd.grad((weights * advantages * agent.logprob(obs, actions)[0]).mean(), theta)
    for parameter, gradient in zip(theta, gradients):
        parameter.data += 0.01 * gradient
    for _ in range(3):
        loss = ((agent.critic(obs).squeeze(-1) - losses[-1][1]) ** 2).mean()
        for parameter, gradient in zip(agent.critic.parameters(), torch.autograd.grad(loss, list(agent.critic.parameters()))):
            parameter.data -= 1e-3 * gradient
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-7)


def test_episodes_are_those_that_really_ended(tmp_path):
    import toy_envs

    toy_envs.EPISODES.clear()
    folder = train(run_dir=tmp_path)
    rows = read_csv(folder / "episodes.csv")
    assert len(rows) > 20
    logged = [(float(row["episodic_return"]), int(row["episodic_length"])) for row in rows]
    real = [(value, length) for _, value, length, _ in toy_envs.EPISODES]
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
        folders.append(train(run_dir=tmp_path / str(i)))
    clean, reset, truncated = (weights_of(folder) for folder in folders)
    assert same(clean, reset)
    assert not same(clean, truncated)  # the final observation of a truncated episode is a bootstrap


def test_every_rollout_begins_with_new_episodes(tmp_path):
    """Proposition 1 weighs a trajectory by its initial state: none may begin in the middle of an episode."""
    import toy_envs

    resets, original = [], toy_envs.Walk.reset

    def reset(env, *, seed=None, options=None):
        resets.append(1)
        return original(env, seed=seed, options=options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_envs.Walk, "reset", reset)
        folder = train(run_dir=tmp_path / "counted")
    ended = len(read_csv(folder / "episodes.csv"))
    assert len(resets) >= 2 * (4 + 1)  # each environment when it is made, and before each of the four rollouts
    assert len(resets) <= ended + 2 * (4 + 1)  # and after an episode, unless the rollout ended with it


# ---- Folder and resume -----------------------------------------------------------------------------------------
def test_resume_continues_where_the_run_broke_off(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("pulled the plug")

    after_iteration(monkeypatch, SCRIPT, 3, fail)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(run_dir=tmp_path)
    monkeypatch.undo()
    folder = next(tmp_path.iterdir())
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    before = read_csv(folder / "metrics.csv")
    assert len(before) == 3 and torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == 128
    copy = shutil.copytree(folder, tmp_path / "copy")
    for each in (folder, copy):
        stac.train(stac.parse_args(stac.Args, ["--resume", str(each)]))
    rows = read_csv(folder / "metrics.csv")
    assert [int(row["global_step"]) for row in rows] == [64, 128, 192, 256]
    assert rows[:2] == before[:2] and without_time(rows) == without_time(read_csv(copy / "metrics.csv"))
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    with pytest.raises(stac.BadInput, match="nothing left to do"):
        stac.parse_args(stac.Args, ["--resume", str(folder)])


def test_resume_refuses_another_algorithm(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError

    after_iteration(monkeypatch, SCRIPT, 2, fail)
    with pytest.raises(RuntimeError):
        train(run_dir=tmp_path)
    folder = str(next(tmp_path.iterdir()))
    with pytest.raises(stac.BadInput, match="--regularisation is 2.0, but the run to --resume has 0.0"):
        stac.parse_args(stac.Args, ["--resume", folder, "--regularisation", "2"])


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    after_iteration(monkeypatch, SCRIPT, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train(run_dir=tmp_path, checkpoint_every=1000)
    folder = next(tmp_path.iterdir())
    assert stop.value.code == 128 + signal.SIGTERM
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == 128


# ---- Bad input -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stac", [stac, stac_ablations])
def test_every_number_states_its_interval_and_is_refused_outside(monkeypatch, stac):
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    found = numbers(stac.SCRIPT)
    stac.check_ranges(stac.Args())
    assert {"regularisation", "critic_steps", "cg_iterations", "gamma"} <= found.keys()
    for name, (annotation, interval) in found.items():
        assert interval is not None, name
        outside, inside = ends(annotation, interval)
        for value in [*outside, math.nan]:
            with pytest.raises(stac.BadInput, match=re.escape(f"{flag(name)} is {value}, it must be in")):
                stac.check_ranges(dataclasses.replace(stac.Args(), **{name: value}))
        for value in inside:
            stac.check_ranges(dataclasses.replace(stac.Args(), **{name: value}))


@pytest.mark.parametrize(
    "changes, named",
    [({"env_id": "CartPol-v0"}, "CartPole-v0"), ({"env_id": "toy/MultiDiscreteActions-v0"}, "MultiDiscrete"),
     ({"env_id": "toy/MatrixActions-v0"}, "action space"), ({"env_id": "toy/SequenceObs-v0"}, "--env-id"),
     ({"total_timesteps": 10}, "at least 64"), ({"env_backend": "envpool"}, "--env-backend envpool"),
     ({"regularisation": -1}, "--regularisation is -1.0"), ({"critic_steps": 0}, "--critic-steps is 0")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(command_line, toy_envs, tmp_path, changes, named):
    status, _, err = command_line(SCRIPT, *words(run_dir=tmp_path / "runs", **changes))
    assert_one_sentence(status, err, named)
    assert not (tmp_path / "runs").exists()


def test_discrete_actions_of_any_first_number(toy_envs, tmp_path):
    """A task whose actions are 5, 6, 7 gets those."""
    import gymnasium as gym

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


# ---- The laboratory --------------------------------------------------------------------------------------------
def test_the_laboratory_is_by_default_the_method(tmp_path):
    method, laboratory = train(run_dir=tmp_path / "1"), train(stac_ablations, run_dir=tmp_path / "2")
    assert same(weights_of(method), weights_of(laboratory))


def test_each_flag_of_the_laboratory_matters(tmp_path):
    base = {"regularisation": 0.1, "hessian": "gauss-newton"}
    changes = [
        {}, {"estimator": "released"}, {"estimator": "timestep"}, {"control": "step-length"}, {"control": "mean-multiplier"},
        {"gradient_noise": 0.05},
    ]  # fmt: skip
    folders = [train(stac_ablations, run_dir=tmp_path / str(i), **base | change) for i, change in enumerate(changes)]
    found = [weights_of(folder) for folder in folders]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])
    for row in read_csv(folders[1] / "metrics.csv"):  # the released step is parallel to AC's
        assert abs(float(row["bilevel/cosine"])) > 1 - 1e-6 and float(row["bilevel/weight_std"]) < 1e-6


def test_without_the_guard_an_indefinite_hessian_gives_another_run(tmp_path):
    folders = [train(stac_ablations, run_dir=tmp_path / str(guard), guard=guard) for guard in (True, False)]
    rows = [read_csv(folder / "metrics.csv") for folder in folders]
    assert any(float(row["bilevel/negative_curvature"]) for row in rows[0])
    assert not same(weights_of(folders[0]), weights_of(folders[1]))


def test_resume_keeps_the_mean_multiplier(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError

    after_iteration(monkeypatch, "stac_ablations.py", 3, fail)
    with pytest.raises(RuntimeError):
        train(stac_ablations, run_dir=tmp_path, control="mean-multiplier")
    monkeypatch.undo()
    folder = next(tmp_path.iterdir())
    stac_ablations.train(stac_ablations.parse_args(stac_ablations.Args, ["--resume", str(folder)]))
    rows = read_csv(folder / "metrics.csv")
    multipliers = [float(row["bilevel/multiplier"]) for row in rows]
    assert len(rows) == 4 and float(rows[-1]["bilevel/mean_multiplier"]) == pytest.approx(np.mean(multipliers), rel=1e-4)


# ---- Learning --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [["--stackelberg"], ["--no-stackelberg", "--learning-rate", "0.2"]])
def test_learns_to_balance_the_pole(tmp_path, algorithm):
    """A random policy has a return of 20. AC has twice the step size, about the multiplier of STAC."""
    words = ["--env-id", "CartPole-v0", "--critic-steps", "80", "--total-timesteps", "200000", "--device", "cpu"]
    folder = stac.train(stac.parse_args(stac.Args, [*words, "--run-dir", str(tmp_path), *algorithm]))
    assert json.loads((folder / "result.json").read_text())["final_return"] > 60


def test_the_script_is_where_the_tests_look():
    assert (REPO / SCRIPT).samefile(stac.__file__)


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_a_reset_right_after_an_episodes_end_leaves_no_second_one(backend):
    """A rollout may end with the end of an episode; the next rollout's first step must then be a transition."""
    envs, *_ = stac.make_envs("CartPole-v0", 1, 3, backend)
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
