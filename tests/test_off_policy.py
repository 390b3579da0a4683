"""stddpg.py and stsac.py as programs: what is stored, an update by hand, leaders and controls, run folder, bad input."""

import ast
import dataclasses
import errno
import functools
import importlib
import inspect
import json
import math
import os
import re
import signal
from collections import defaultdict
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import stddpg
import stsac
import torch
from conftest import REPO, WALK, Reads, after_iteration, load, read_csv, start, wait_for, without_time
from stackelberg_toy import total_gradient
from test_command_line import assert_one_sentence, ends, flag, numbers
from test_semantics import Tampered
from test_shared_blocks import (
    blocks, definitions,
    test_docstring_names_a_command_that_runs_this_script as docstring_names_a_command,
    test_every_public_function_and_class_has_a_docstring as every_definition_has_a_docstring,
    test_no_script_imports_another as stands_alone,
)  # fmt: skip
from torch.func import functional_call

SCRIPTS = ["stddpg.py", "stsac.py"]
LEADERS = ["actor", "critic", "none-simultaneous", "none-sequential"]
TINY = {
    "env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 16, "update_every": 4, "total_timesteps": 4 * 32, "batch_size": 8,
    "random_steps": 24, "learning_starts": 16, "actor_width": 8, "critic_width": 8, "checkpoint_every": 1, "eval_episodes": 0,
    "device": "cpu",
}  # fmt: skip
CLOCK = "toy_envs:toy/Clock-v0"


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    return request.param


def words(**changes) -> list[str]:
    """The command line of a tiny run."""
    return [word for name, value in (TINY | changes).items() for word in (flag(name), str(value))]


def train(script: str, **changes):
    """A tiny run in this process; returns its folder."""
    module = load(script)
    return module.train(module.parse_args(module.Args, words(**changes)))


def resume(script: str, folder, *more: str):
    module = load(script)
    return module.train(module.parse_args(module.Args, ["--resume", str(folder), *more]))


def checkpoint(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(first: dict, second: dict) -> bool:
    first, second = first["agent"], second["agent"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fail():
    raise RuntimeError("pulled the plug")


# ---- What is stored --------------------------------------------------------------------------------------------
@pytest.fixture
def stored(monkeypatch):
    """What the replay of the next runs is given: (obs, actions, rewards, next_obs, terminated) of each transition."""
    rows = []
    for module in (stddpg, stsac):
        original = module.Replay.add

        def add(replay, *columns, original=original):
            original(replay, *columns)
            rows.extend(zip(*(np.array(column) for column in columns)))

        monkeypatch.setattr(module.Replay, "add", add)
    return rows


def test_transitions_are_stored_and_resets_are_not(script, toy_envs, stored, tmp_path):
    toy_envs.STEPS.clear()
    toy_envs.EPISODES.clear()
    folder = train(script, env_id=WALK, run_dir=tmp_path, num_envs=1, num_steps=32, total_timesteps=160)
    steps, episodes = list(toy_envs.STEPS), list(toy_envs.EPISODES)
    obs, actions, rewards, next_obs, terminated = map(np.stack, zip(*stored))
    assert len(stored) == len(steps) < 160 and checkpoint(folder)["replay_size"] == len(stored)
    np.testing.assert_array_equal(obs, np.stack([seen for _, seen, _ in steps]))
    box = toy_envs.Walk.action_space
    assert (np.abs(actions) <= 1).all() and actions.min() < -0.5 and actions.max() > 0.5
    spread = box.low + (actions + 1) / 2 * (box.high - box.low)
    np.testing.assert_allclose(spread, np.stack([action for *_, action in steps]), rtol=1e-5, atol=1e-6)
    ends = np.cumsum([length for _, _, length, _ in episodes]) - 1  # the last row of each episode
    how = np.array([kind for *_, kind in episodes])
    assert len(set(how)) == 2
    assert terminated[ends].tolist() == (how == "terminated").tolist() and terminated.sum() == (how == "terminated").sum()
    inside = np.setdiff1d(np.arange(len(stored) - 1), ends)
    np.testing.assert_array_equal(next_obs[inside], obs[inside + 1])
    last = ends[ends + 1 < len(stored)]
    assert (next_obs[last] != obs[last + 1]).any(1).all()  # the final observation, not the first of the next episode
    sums = np.array([rewards[end + 1 - length : end + 1].sum() for end, (_, _, length, _) in zip(ends, episodes)])
    np.testing.assert_allclose(sums, [value for _, value, *_ in episodes], rtol=1e-5)
    logged = read_csv(folder / "episodes.csv")
    np.testing.assert_allclose([float(row["episodic_return"]) for row in logged], sums, rtol=1e-5)
    assert [int(row["episodic_length"]) for row in logged] == [length for _, _, length, _ in episodes]


@pytest.mark.parametrize("env_id, backend", [("InvertedPendulum-v4", "envpool"), (WALK, "gymnasium")])
def test_both_backends_store_chains_of_transitions(script, stored, tmp_path, env_id, backend):
    """Each next observation is the observation of the following row, unless an episode ended: buffers are not reused."""
    folder = train(script, env_id=env_id, env_backend=backend, run_dir=tmp_path, num_envs=1, num_steps=64, total_timesteps=192)
    obs, _, rewards, next_obs, terminated = map(np.stack, zip(*stored))
    episodes = read_csv(folder / "episodes.csv")
    ends = np.cumsum([int(row["episodic_length"]) for row in episodes]) - 1
    inside = np.setdiff1d(np.arange(len(obs) - 1), ends)
    np.testing.assert_array_equal(next_obs[inside], obs[inside + 1])
    assert (obs[inside] != next_obs[inside]).any(1).all()
    rows = np.cumsum([int(row["episodic_length"]) + 1 for row in episodes])  # of the rollout, each with its reset after it
    assert len(ends) > 2 and len(obs) == 192 - (rows <= 192).sum()
    if backend == "envpool":
        assert terminated[ends].all() and terminated.sum() == len(ends) and (rewards[:-1] > 0).all()


@pytest.mark.parametrize("tampering", [{"reset_reward": 1e3}, {"terminal_offset": 50.0}])
def test_the_row_after_an_episodes_end_influences_nothing(script, tmp_path, monkeypatch, tampering):
    """Nor does the final observation of a terminated episode; that of a truncated one is bootstrapped from."""
    module, found = load(script), []
    original = module.make_envs
    for i, changes in enumerate(({}, tampering, {"truncated_offset": 50.0})):

        def make_envs(*arguments, changes=changes):
            envs, *spaces = original(*arguments)
            return Tampered(envs, **changes), *spaces

        monkeypatch.setattr(module, "make_envs", make_envs)
        found.append(checkpoint(train(script, env_id=WALK, run_dir=tmp_path / str(i))))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_replay_draws_from_the_latest_rows_and_keeps_them_on_disk(script, tmp_path):
    module = load(script)
    replay = module.Replay(tmp_path / "replay", 100, 2, 1, window=10)
    assert (tmp_path / "replay" / "transitions.bin").stat().st_size == module.replay_bytes(100, 2, 1) == 100 * 7 * 4
    for i in range(25):
        terminated = np.array([False, i % 2 == 1])
        replay.add(np.full((2, 2), i), np.full((2, 1), 0.5), np.full(2, 10 * i), np.full((2, 2), i + 1), terminated)
    pairs, rewards, next_obs, terminated = replay.sample(4, 50)
    assert pairs.shape == (4, 50, 3) and rewards.shape == terminated.shape == (4, 50) and next_obs.shape == (4, 50, 2)
    assert set(pairs[..., 0].flatten().tolist()) == {20, 21, 22, 23, 24}  # 10 rows
    assert (pairs[..., 2] == 0.5).all() and torch.equal(rewards, 10 * pairs[..., 0])
    assert torch.equal(next_obs[..., 0], pairs[..., 0] + 1)
    assert set(terminated.flatten().tolist()) == {0.0, 1.0}
    replay.file.flush()
    again = module.Replay(tmp_path / "replay", 100, 2, 1, window=10, size=50)
    np.testing.assert_array_equal(again.rows, replay.rows)


# ---- One update by hand ----------------------------------------------------------------------------------------
CRITIC_RATE = 0.03  # large enough to tell the critics before a step from those after it


def one_update(script: str, tmp_path, monkeypatch, **changes) -> SimpleNamespace:
    """A run with a single update: what the players' optimisers were given, in which order, and the minibatch."""
    module, seen = load(script), SimpleNamespace(gradients=[], batches=[], noise=[])
    update, sample, backup = module.FlatAdam.update, module.Replay.sample, module.backup

    def record(optimiser):
        (vector,) = optimiser.param_groups[0]["params"]
        seen.gradients.append((vector.detach().clone(), vector.grad.clone()))
        update(optimiser)

    monkeypatch.setattr(module.FlatAdam, "update", record)
    monkeypatch.setattr(module.Replay, "sample", lambda *a: seen.batches.append(sample(*a)) or seen.batches[-1])
    monkeypatch.setattr(module, "backup", lambda agent, *a: seen.noise.append(a[-1]) or backup(agent, *a))
    here = []
    policy = module.Agent.policy
    monkeypatch.setattr(module.Agent, "policy", lambda agent, out, noise: here.append(noise) or policy(agent, out, noise))
    shape = {"num_envs": 1, "num_steps": 1, "update_every": 1, "total_timesteps": 30, "learning_starts": 29}
    seen.folder = train(script, run_dir=tmp_path, **shape | {"checkpoint_every": 30} | changes)
    monkeypatch.undo()
    seen.here = next(noise for noise in here if not any(noise is other for other in seen.noise))
    torch.manual_seed(1)
    seen.agent = module.Agent(3, 1, SimpleNamespace(**{"entropy_coef": 0.2, "exploration_noise": 0.1} | TINY)).double()
    return seen


def dense(module, seen, leader: str, ihvp: str, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of both players from the formulas of the paper alone, in float64 with dense Hessians."""
    agent = seen.agent
    ((pairs, rewards, next_obs, terminated),) = seen.batches
    pairs, rewards, next_obs, terminated = (x[0].double() for x in (pairs, rewards, next_obs, terminated))
    here, there, obs = seen.here.double(), seen.noise[0].double(), pairs[:, :3]
    theta, omega = (module.flatten(part.parameters()).detach() for part in (agent.actor, agent.critics))

    def actor(theta, rows):
        parts = module.unflatten(theta, agent.actor.parameters())
        return functional_call(agent.actor, dict(zip(dict(agent.actor.named_parameters()), parts)), (rows,))

    def critics(omega, rows):
        parts = dict(zip(dict(agent.critics.named_parameters()), module.unflatten(omega, agent.critics.parameters())))
        mine = [{name[2:]: part for name, part in parts.items() if name[0] == str(i)} for i in range(len(agent.critics))]
        return torch.stack([functional_call(critic, part, (rows,))[:, 0] for critic, part in zip(agent.critics, mine)])

    def f(theta, omega):
        actions, costs = agent.policy(actor(theta, obs), here)
        return (costs - critics(omega, torch.cat([obs, actions], 1)).amin(0)).mean()

    def errors(theta, omega):
        actions, costs = agent.policy(actor(theta, next_obs), there)
        rows = torch.cat([next_obs, actions], 1)
        values = torch.stack([target(rows)[:, 0] for target in agent.targets]).amin(0) - costs
        return critics(omega, pairs) - (rewards + 0.99 * (1 - terminated) * values)

    def L(theta, omega):
        return (errors(theta, omega) ** 2).mean(1).sum()

    def gauss_newton(theta, moving, fixed=omega):
        """L with the critics linearised where they are: its Hessian in omega is the Gauss-Newton matrix."""
        line = torch.func.jvp(lambda w: critics(w, pairs), (fixed,), (moving - fixed,))[1]
        return ((errors(theta, fixed) + line) ** 2).mean(1).sum()

    own = torch.func.grad(f)(theta, omega), torch.func.grad(L, 1)(theta, omega)
    if leader == "actor":
        return total_gradient(f, gauss_newton if ihvp == "kernel" else L, theta, omega, damping), own[1]
    if leader == "none-sequential":  # the actor's at the critics that Adam's first step leads to
        after = omega - CRITIC_RATE * own[1] / (own[1].abs() + 1e-8)
        return torch.func.grad(f)(theta, after), own[1]
    if leader == "critic":
        return own[0], total_gradient(lambda w, t: L(t, w), lambda w, t: f(t, w), omega, theta, damping)
    return own


@pytest.mark.parametrize("leader, ihvp, damping", [
    ("actor", "kernel", 0.5), ("actor", "cg", 300.0), ("critic", "cg", 2.0), ("none-simultaneous", "kernel", 1.0),
    ("none-sequential", "kernel", 1.0),
])  # fmt: skip
def test_one_update_by_hand(script, tmp_path, monkeypatch, leader, ihvp, damping):
    module = load(script)
    solve = {"ihvp": ihvp, "regularisation": damping, "cg_iterations": 50}
    seen = one_update(script, tmp_path, monkeypatch, leader=leader, critic_learning_rate=CRITIC_RATE, **solve)
    wanted = dense(module, seen, leader, ihvp, damping)
    own = dense(module, seen, "none-simultaneous", ihvp, damping)
    assert len(seen.gradients) == 2
    if leader == "none-sequential":  # the critics step first
        seen.gradients.reverse()
    for (vector, gradient), part, want, plain in zip(seen.gradients, (seen.agent.actor, seen.agent.critics), wanted, own):
        flat = module.flat_view(part.parameters())  # the layout of the script's vectors
        torch.testing.assert_close(vector.double(), flat.detach(), rtol=1e-6, atol=1e-7)
        for parameter, piece in zip(part.parameters(), module.unflatten(want, part.parameters())):
            parameter.grad.copy_(piece)
        assert (gradient - flat.grad).norm() < 2e-4 * flat.grad.norm()
        differs = part is {"actor": seen.agent.actor, "none-sequential": seen.agent.actor, "critic": seen.agent.critics}.get(leader)
        assert ((want - plain).norm() > 2e-3 * plain.norm()) == differs  # the implicit term, or the order, would be missed


def test_after_an_update_the_target_has_moved_by_a_half_percent(script, tmp_path, monkeypatch):
    seen = one_update(script, tmp_path, monkeypatch)
    after = checkpoint(seen.folder)["agent"]
    for name, before in seen.agent.targets.state_dict().items():
        wanted = 0.995 * before + 0.005 * after[f"critics.{name}"].double()
        torch.testing.assert_close(after[f"targets.{name}"].double(), wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(after[f"targets.{name}"], before.float())


# ---- Leaders ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("leader", LEADERS)
@pytest.mark.parametrize("env_id, backend", [("InvertedPendulum-v4", "envpool"), (WALK, "gymnasium")])
def test_a_run_of_each_leader(script, tmp_path, leader, env_id, backend):
    module = load(script)
    argv = words(run_dir=tmp_path, leader=leader, env_id=env_id, env_backend=backend, eval_every=64, eval_episodes=2)
    folder = module.train(module.parse_args(module.Args, [*argv, "--save-model"]))
    rows = read_csv(folder / "metrics.csv")
    assert [int(row["global_step"]) for row in rows] == [32, 64, 96, 128]
    assert [bool(row["charts/eval_return"]) for row in rows] == [False, True, False, True]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and len(result["eval_returns"]) == 2
    assert np.mean(result["eval_returns"]) == pytest.approx(float(rows[-1]["charts/eval_return"]), rel=1e-6)
    names = ["direct_norm", "correction_norm", "multiplier", "cosine", "ihvp_residual", "negative_curvature", "plain_fraction"]
    names += ["weight_mean", "weight_std"] if leader == "actor" else []
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values() if value)
        assert row["losses/qf_loss"] and row["losses/actor_gradient_norm"]
        assert row["bilevel/inner_gradient_norm_before"] and row["bilevel/inner_gradient_norm_after"]
        if leader.startswith("none"):
            assert not any(row[f"bilevel/{name}"] for name in names)
        elif env_id != WALK:  # whose observations in the thousands saturate the actor: gradients of 0, and no ratio of them
            assert all(row[f"bilevel/{name}"] for name in names)
        if leader == "actor":
            assert float(row["bilevel/plain_fraction"]) == 0
    policy = module.load_policy(folder / "model.pt")
    envs, space, actions = module.make_envs(env_id, 1, 0, backend)
    obs = np.random.default_rng(0).normal(size=(5, *space.shape)).astype(np.float32)
    assert all(actions.contains(each) for each in policy(obs)) and actions.contains(policy(obs[0]))
    envs.close()


def test_infinite_regularisation_is_simultaneous_play(script, tmp_path):
    """Bitwise."""
    simultaneous = checkpoint(train(script, run_dir=tmp_path / "0", leader="none-simultaneous"))
    for i, changes in enumerate(({"leader": "actor"}, {"leader": "actor", "ihvp": "cg"}, {"leader": "critic"}), 1):
        assert same(simultaneous, checkpoint(train(script, run_dir=tmp_path / str(i), regularisation="inf", **changes)))
    sequential = checkpoint(train(script, run_dir=tmp_path / "4", leader="none-sequential"))
    assert not same(simultaneous, sequential)


def test_in_a_run_the_implicit_term_is_not_zero(script, tmp_path):
    for i, changes in enumerate(({}, {"ihvp": "cg", "regularisation": 100}, {"leader": "critic", "regularisation": 1})):
        rows = read_csv(train(script, run_dir=tmp_path / str(i), **changes) / "metrics.csv")
        assert all(float(row["bilevel/correction_norm"]) > 1e-5 * float(row["bilevel/direct_norm"]) for row in rows)
        assert all(float(row["bilevel/cosine"]) < 1 - 1e-9 or float(row["bilevel/multiplier"]) != 1 for row in rows)


@pytest.mark.full
def test_each_argument_of_the_algorithm_matters(script, tmp_path):
    changes = [
        {}, {"leader": "critic"}, {"leader": "none-simultaneous"}, {"leader": "none-sequential"}, {"ihvp": "cg"},
        {"ihvp": "cg", "cg_iterations": 1}, {"regularisation": 0.1}, {"regularisation_decay": 50}, {"follower_steps": 2},
        {"follower_steps": 3}, {"leader": "critic", "follower_steps": 2}, {"learning_rate": 2e-3}, {"critic_learning_rate": 2e-3},
        {"gamma": 0.9}, {"polyak": 0.9}, {"batch_size": 9}, {"buffer_size": 20}, {"random_steps": 0}, {"learning_starts": 32},
        {"update_every": 8}, {"exploration_noise": 0.5},
    ]  # fmt: skip
    if script == "stsac.py":  # whose update is the same block of code
        changes = [{}, {"leader": "critic"}, {"ihvp": "cg"}, {"entropy_coef": 0.5}]
    changes = [{"total_timesteps": 64, "checkpoint_every": 2} | change for change in changes]
    found = [checkpoint(train(script, run_dir=tmp_path / str(i), **change)) for i, change in enumerate(changes)]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])


@pytest.mark.parametrize("leader, follower", [("actor", "critic"), ("critic", "actor"), ("none-sequential", "critic")])
def test_only_the_follower_is_unrolled(script, tmp_path, monkeypatch, leader, follower):
    """m steps of the follower for one of the leader: counted at their optimisers."""
    module, sizes = load(script), []
    update = module.FlatAdam.update


    def count(optimiser):
        sizes.append(optimiser.param_groups[0]["params"][0].numel())
        update(optimiser)

    monkeypatch.setattr(module.FlatAdam, "update", count)
    folder = train(script, run_dir=tmp_path, leader=leader, follower_steps=3)
    agent = checkpoint(folder)["agent"]
    size = {part: sum(value.numel() for name, value in agent.items() if name.startswith(part)) for part in ("actor", "critic")}
    assert size["actor"] != size["critic"]
    leading = "actor" if follower == "critic" else "critic"
    assert sizes.count(size[follower]) == 3 * sizes.count(size[leading]) > 0


def test_unrolled_steps_shrink_the_followers_gap(script, tmp_path):
    """Of many steps on one minibatch."""
    shape = {"num_steps": 4, "total_timesteps": 24, "learning_starts": 16}
    folder = train(script, run_dir=tmp_path, follower_steps=300, critic_learning_rate=3e-3, **shape)
    row = read_csv(folder / "metrics.csv")[-1]
    assert float(row["bilevel/inner_gradient_norm_after"]) < 0.5 * float(row["bilevel/inner_gradient_norm_before"])


def test_regularisation_decays_with_the_steps(script, tmp_path):
    rows = read_csv(train(script, run_dir=tmp_path, regularisation=10, regularisation_decay=100) / "metrics.csv")
    for row in rows:
        assert float(row["bilevel/regularisation"]) == pytest.approx(10 * math.exp(-int(row["global_step"]) / 100))


def test_a_run_repeats_bitwise_and_a_seed_matters(script, tmp_path):
    folders = [train(script, run_dir=tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert same(*map(checkpoint, folders[:2])) and not same(checkpoint(folders[0]), checkpoint(folders[2]))
    logs = [without_time(read_csv(folder / "metrics.csv")) for folder in folders]
    assert logs[0] == logs[1] != logs[2]


def test_evaluation_does_not_change_the_training(script, tmp_path):
    never, often = (train(script, run_dir=tmp_path / str(n), eval_every=32, eval_episodes=n) for n in (0, 2))
    assert same(checkpoint(never), checkpoint(often))
    assert all(row["charts/eval_return"] for row in read_csv(often / "metrics.csv"))
    assert not any(row["charts/eval_return"] for row in read_csv(never / "metrics.csv"))


# ---- Folder and resume -----------------------------------------------------------------------------------------
def test_files_of_a_finished_run(script, tmp_path):
    folder = train(script, run_dir=tmp_path)
    names = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    assert names == {"args.json", "episodes.csv", "metrics.csv", "checkpoint.pt", "result.json"}  # the replay is gone


def test_resume_equals_the_uninterrupted_run(script, toy_envs, tmp_path, monkeypatch):
    """Bitwise, on a task that is as it was after each iteration. The run breaks off after rows that its checkpoint does
    not count were written, and its window has slid over the first ones."""
    shape = {"env_id": CLOCK, "num_envs": 1, "num_steps": 32, "total_timesteps": 6 * 32, "checkpoint_every": 2, "buffer_size": 40,
             "eval_every": 64, "eval_episodes": 1}  # fmt: skip
    whole = train(script, run_dir=tmp_path / "whole", **shape)
    after_iteration(monkeypatch, script, 5, fail)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(script, run_dir=tmp_path / "part", **shape)
    monkeypatch.undo()
    (folder,) = (tmp_path / "part").iterdir()
    assert checkpoint(folder)["global_step"] == 4 * 32 and len(read_csv(folder / "metrics.csv")) == 5
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert resume(script, folder) == folder
    for name in ("metrics.csv", "episodes.csv"):
        assert without_time(read_csv(folder / name)) == without_time(read_csv(whole / name))
    assert same(checkpoint(folder), checkpoint(whole))
    assert checkpoint(folder)["replay_size"] == checkpoint(whole)["replay_size"]
    assert not (folder / "replay").exists()
    with pytest.raises(load(script).BadInput, match="nothing left to do"):
        resume(script, folder)


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.full
def test_a_run_killed_at_any_moment_resumes_as_if_uninterrupted(script, toy_envs, tmp_path):
    """SIGKILL, which no handler sees: the rows that the checkpoint counts are there."""
    shape = {"env_id": CLOCK, "num_envs": 1, "num_steps": 32, "total_timesteps": 20 * 32, "checkpoint_every": 1}
    process = start(script, words(**shape, run_dir=tmp_path / "runs"))
    try:
        metrics = wait_for(process, lambda: next(iter((tmp_path / "runs").glob("*/checkpoint.pt")), None))
        wait_for(process, lambda: len((metrics.parent / "metrics.csv").read_text().splitlines()) > 5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (folder,) = (tmp_path / "runs").iterdir()
    whole = train(script, **shape, run_dir=tmp_path / "whole")
    assert 0 < checkpoint(folder)["global_step"] < 20 * 32 and not (folder / "result.json").exists()
    resume(script, folder)
    assert same(checkpoint(folder), checkpoint(whole))
    assert without_time(read_csv(folder / "metrics.csv")) == without_time(read_csv(whole / "metrics.csv"))


def test_a_signal_ends_the_run_with_a_checkpoint_and_its_replay(script, tmp_path, monkeypatch):
    after_iteration(monkeypatch, script, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train(script, run_dir=tmp_path, checkpoint_every=1000)
    folder = next(tmp_path.iterdir())
    assert stop.value.code == 128 + signal.SIGTERM
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert checkpoint(folder)["global_step"] == 64 and (folder / "replay" / "transitions.bin").exists()
    assert resume(script, folder) == folder


@pytest.fixture
def broken_off(script, tmp_path, monkeypatch):
    """The folder of a run that failed after its third checkpoint."""
    after_iteration(monkeypatch, script, 4, fail)
    with pytest.raises(RuntimeError):
        train(script, run_dir=tmp_path / "broken")
    monkeypatch.undo()
    return next((tmp_path / "broken").iterdir())


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_resume_without_its_replay_is_refused_and_changes_nothing(script, broken_off, command_line, damage):
    path = broken_off / "replay" / "transitions.bin"
    path.unlink() if damage == "missing" else os.truncate(path, 100)
    before = {each: each.read_bytes() for each in broken_off.rglob("*") if each.is_file()}
    status, _, err = command_line(script, "--resume", broken_off)
    assert_one_sentence(status, err, "--resume", "transitions.bin is missing or damaged")
    assert {each: each.read_bytes() for each in broken_off.rglob("*") if each.is_file()} == before


@pytest.mark.parametrize(
    "name, value, old", [("leader", "critic", "actor"), ("regularisation", 2.0, 10.0), ("buffer_size", 5, 1000000)]
)
def test_resume_with_another_argument(script, broken_off, command_line, name, value, old):
    status, _, err = command_line(script, "--resume", broken_off, flag(name), str(value))
    assert_one_sentence(status, err, f"{flag(name)} is {value}", f"has {old}")


def test_a_full_disk_shows_before_the_training(script, tmp_path, monkeypatch, command_line):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "runs").mkdir()
    status, _, err = command_line(script, *words(run_dir=tmp_path / "runs"))
    assert_one_sentence(status, err, f"--run-dir {tmp_path / 'runs'}", "replay", "No space left on device")
    assert not any((tmp_path / "runs").iterdir())


# ---- Bad input -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(REPO.glob("*.py")), ids=lambda path: path.name)
def test_no_line_of_args_states_two_intervals(path):
    """The first one would be checked, whichever is meant."""
    args = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    lines = [n.value.value for n in args.body if isinstance(n, ast.Expr)]
    found = [len(re.findall(r"in [\[(][^\s,]+, [^\s,]+[\])]", line)) for line in lines]
    assert len(found) > 5 and set(found) <= {0, 1}, [line for line, n in zip(lines, found) if n > 1]


def test_exploration_noise_is_a_standard_deviation_of_any_size():
    module = load("stddpg.py")
    module.check_ranges(dataclasses.replace(module.Args(), exploration_noise=2.0))
    with pytest.raises(module.BadInput, match="exploration-noise is -1"):
        module.check_ranges(dataclasses.replace(module.Args(), exploration_noise=-1.0))


def test_every_number_states_its_interval_and_is_refused_outside(script, monkeypatch):
    module = load(script)
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    found = numbers(script)
    module.check_ranges(module.Args())
    declared = {field.name for field in dataclasses.fields(module.Args) if re.search("int|float", str(field.type))}
    assert found.keys() == declared >= {"regularisation", "follower_steps", "polyak", "buffer_size"}
    for name, (annotation, interval) in found.items():
        assert interval is not None, name
        outside, inside = ends(annotation, interval)
        for value in [*outside, math.nan]:
            with pytest.raises(module.BadInput, match=re.escape(f"{flag(name)} is {value}, it must be in")):
                module.check_ranges(dataclasses.replace(module.Args(), **{name: value}))
        for value in inside:
            module.check_ranges(dataclasses.replace(module.Args(), **{name: value}))


@pytest.mark.parametrize(
    "changes, named",
    [({"env_id": "Hoper-v4"}, "Hopper-v4"), ({"env_id": "CartPole-v1"}, "finite bounds"),
     ({"env_id": "toy/MatrixActions-v0"}, "action space"), ({"env_id": "toy/SequenceObs-v0"}, "--env-id"),
     ({"env_id": "toy/Unbounded-v0"}, "finite bounds"), ({"total_timesteps": 10}, "at least 32"),
     ({"env_id": WALK, "env_backend": "envpool"}, "--env-backend envpool"), ({"update_every": 5}, "4 or 8 would"),
     ({"regularisation": 0}, "--regularisation is 0.0"), ({"regularisation": -1}, "--regularisation is -1.0"),
     ({"device": "cuda"}, "--device cuda")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(
    script, command_line, toy_envs, tmp_path, monkeypatch, changes, named
):
    spaces = {"observation_space": toy_envs.BOX, "action_space": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gym.register("toy/Unbounded-v0", entry_point=toy_envs.Spaces, kwargs=spaces)
    status, _, err = command_line(script, *words(run_dir=tmp_path / "runs", **changes))
    gym.registry.pop("toy/Unbounded-v0")
    assert_one_sentence(status, err, named)
    assert not (tmp_path / "runs").exists()


def test_a_replay_that_no_disk_can_hold_is_one_sentence(script, command_line, tmp_path):
    for steps in (10**15, 10**18):
        status, _, err = command_line(script, *words(run_dir=tmp_path / "runs", total_timesteps=steps))
        assert_one_sentence(status, err, "cannot hold")
        assert not list((tmp_path / "runs").iterdir())


def test_an_update_after_every_step_has_none_for_a_reset(script, tmp_path):
    """An episode of 31 steps and its reset: with one environment the block of the reset has no new transition. It is the last of
    the fourth and of the eighth iteration, whose rows describe the update before."""
    shape = {"num_envs": 1, "num_steps": 8, "update_every": 1, "total_timesteps": 64, "learning_starts": 8, "random_steps": 8}
    folder = train(script, env_id=CLOCK, run_dir=tmp_path, **shape)
    rows = read_csv(folder / "metrics.csv")
    assert [row["losses/qf_loss"] != "" for row in rows] == [False] + [True] * 7
    assert checkpoint(folder)["replay_size"] == 62


def test_no_damping_is_allowed_where_the_solve_is_not_the_kernels(script, tmp_path):
    for i, changes in enumerate(({"ihvp": "cg"}, {"leader": "critic"}, {"leader": "none-sequential"})):
        assert train(script, run_dir=tmp_path / str(i), regularisation=0, total_timesteps=64, **changes).is_dir()


def test_help_shows_every_argument(script, command_line):
    status, out, err = command_line(script, "--help")
    assert status in (0, None) and err == ""
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for field in dataclasses.fields(load(script).Args):
        assert re.search(rf"{flag(field.name)}\b", shown), field.name


# ---- The files -------------------------------------------------------------------------------------------------
def test_the_two_scripts_differ_in_these_blocks_and_no_other():
    ddpg, sac = blocks("stddpg.py"), blocks("stsac.py")
    assert list(ddpg) == list(sac)
    assert {name for name in ddpg if ddpg[name] != sac[name]} == {"Docstring", "Arguments", "Policy"}
    one, other = definitions("stddpg.py"), definitions("stsac.py")
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == {"Args", "Agent"}
    ours, theirs = (list(load(name).Args.__annotations__) for name in SCRIPTS)
    assert [(a, b) for a, b in zip(ours, theirs) if a != b] == [("exploration_noise", "entropy_coef")]


@pytest.mark.parametrize("leader", ["actor", "none-simultaneous", "none-sequential"])
def test_an_update_can_be_a_cuda_graph(script, tmp_path, monkeypatch, leader):
    """All that it changes stays where it is, and without diagnostics it reads no number."""
    module, addresses = load(script), defaultdict(set)
    update, backup = module.FlatAdam.update, module.backup

    def seen_update(self):
        for vector in (vector for group in self.param_groups for vector in group["params"]):
            tensors = [vector, vector.grad, *self.state[vector].values()]
            addresses[id(self)].add(tuple(tensor.data_ptr() for tensor in tensors))
        update(self)

    def seen_backup(agent, *rest):
        addresses["agent"].add(tuple(parameter.data_ptr() for parameter in agent.parameters()))
        return backup(agent, *rest)

    monkeypatch.setattr(module.FlatAdam, "update", seen_update)
    monkeypatch.setattr(module, "backup", seen_backup)
    counts, updates = [], []
    for learning_starts in (0, 16):
        with Reads() as reads:
            folder = train(script, leader=leader, run_dir=tmp_path, learning_starts=learning_starts)
        counts.append(reads.count)
        updates.append(int(checkpoint(folder)["optimisers"][0]["state"][0]["step"]))
        assert len(addresses) == 2 + 1 and all(len(each) == 1 for each in addresses.values())
        addresses.clear()
    assert updates[0] > updates[1] + 10 and counts[0] == counts[1] > 0


def test_plain_fraction_counts_the_updates_without_a_correction(script, tmp_path, monkeypatch):
    monkeypatch.setattr(load(script), "kernel_response", lambda data, led, least, damping: torch.zeros_like(least))
    rows = read_csv(train(script, leader="actor", run_dir=tmp_path) / "metrics.csv")
    assert {row["bilevel/plain_fraction"] for row in rows if row["bilevel/plain_fraction"]} == {"1.0"}
    assert {float(row["bilevel/correction_norm"]) for row in rows if row["bilevel/correction_norm"]} == {0.0}


def test_what_they_have_in_common_with_the_other_scripts_is_the_same():
    mine, stac = definitions("stddpg.py"), definitions("stac.py")
    assert {"Run", "parse_args", "load_checkpoint", "evaluate", "film", "derived_seed"} <= mine.keys() & stac.keys()
    assert {name for name in mine.keys() & stac.keys() if mine[name] != stac[name]} == {
        "Args", "Agent", "make_envs", "mlp", "numpy_mlp", "load_policy", "train",
    }  # fmt: skip
    assert stac["conjugate_gradient"] == mine["conjugate_gradient"]
    assert blocks("sobirl_rlhf.py")["CUDA graph"] == blocks("stddpg.py")["CUDA graph"]


def test_the_scripts_document_themselves_and_stand_alone(script):
    every_definition_has_a_docstring(script)
    docstring_names_a_command(script)
    stands_alone(script)
    assert (REPO / script).samefile(load(script).__file__)


# ---- The measurements ------------------------------------------------------------------------------------------
def test_every_update_is_timed(tmp_path):
    speed = importlib.import_module("benchmark.speed_stackelberg")
    speed.main(speed.Args(scripts=("stddpg.py",), rounds=1, num_steps=5, results_dir=tmp_path))
    rows = read_csv(tmp_path / "speed_stackelberg.csv")
    assert [row["update"] for row in rows] == list(speed.COMPETITORS) and float(rows[0]["ratio"]) == 1
    assert all(float(row["ms"]) > 0 and float(row["loop"]) > 0 for row in rows)
    assert json.loads((tmp_path / "speed_stackelberg.json").read_text())["provenance"]["commit"]


def test_the_timed_solve_makes_all_its_iterations():
    """Also where the residual is already small."""
    speed, products = importlib.import_module("benchmark.speed_stackelberg"), []
    solver = SimpleNamespace(conjugate_gradient=stddpg.conjugate_gradient)
    speed.all_iterations(solver)

    def product(vector):
        products.append(vector)
        return vector * torch.linspace(1, 2, 50)

    counts = []
    for solve in (stddpg.conjugate_gradient, solver.conjugate_gradient):
        products.clear()
        solve(product, torch.ones(50), 10)
        counts.append(len(products))
    assert counts[0] < 10 == counts[1]


def test_the_study_of_lambda(tmp_path):
    study = importlib.import_module("benchmark.stackelberg_damping")
    study.main(study.Args(scripts=("stddpg.py",), env_ids=("Hopper-v4",), steps=1000, batches=2, results_dir=tmp_path))
    rows = {(row["solve"], float(row["lambda"])): row for row in read_csv(tmp_path / "solves.csv")}
    assert list(rows) == [(name, each) for name, grid in study.LAMBDAS.items() for each in grid]
    residuals = [float(rows["actor, kernel", each]["residual"]) for each in (1e-2, 1.0, 100.0)]
    assert 1 > residuals[0] > residuals[1] > residuals[2] > 0
    assert json.loads((tmp_path / "provenance.json").read_text())["commit"]


# ---- Learning --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("leader", ["actor", "none-sequential"])
def test_learns_to_swing_the_pendulum_up(script, tmp_path, leader):
    """A random policy has a return of about -1200, a solved task about -150."""
    shape = {"num_envs": 1, "num_steps": 250, "update_every": 50, "batch_size": 100, "actor_width": 64, "critic_width": 64}
    shape |= {"total_timesteps": 5000, "random_steps": 1000, "learning_starts": 500, "eval_every": 1000, "eval_episodes": 10}
    folder = train(script, env_id="Pendulum-v1", leader=leader, run_dir=tmp_path, **shape)
    returns = [row["charts/eval_return"] for row in read_csv(folder / "metrics.csv") if row["charts/eval_return"]]
    assert float(returns[0]) < -1000 and max(map(float, returns)) > -400
