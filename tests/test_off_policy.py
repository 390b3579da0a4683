"""stddpg.py and stsac.py as programs: what is stored, an update by hand, leaders and controls, run folder, bad input."""

import errno
import json
import math
import os
import re
import shutil
import signal
from collections import defaultdict
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import stddpg
import stsac
import torch
from conftest import WALK, Reads, after_iteration, load, read_csv, resume, start, wait_for, without_time
from stackelberg_toy import total_gradient
from test_command_line import assert_one_line, assert_one_sentence
from test_semantics import Tampered
from torch import nn
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
    """Each script; where all that is tested is a block that both share, one of them stands for both."""
    return request.param


@pytest.fixture(autouse=True)
def no_provenance():
    """A third of the time of a tiny run goes into the versions of all packages."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SCRIPTS:
            patch.setattr(load(name), "provenance", lambda name=name: {"script": name})
        yield


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def words(**changes) -> list[str]:
    """The command line of a tiny run. True: --flag, False: --no-flag."""
    argv = []
    for name, value in (TINY | changes).items():
        if isinstance(value, bool):
            argv.append(flag(name if value else f"no-{name}"))
        else:
            argv += [flag(name), str(value)]
    return argv


def train(script: str, **changes):
    """A tiny run in this process; returns its folder."""
    module = load(script)
    return module.train(module.parse_args(words(**changes)))


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


def test_transitions_are_stored_and_resets_are_not(script, toy_envs, stored, tmp_path, monkeypatch):
    opened = load(script).Run.open

    def open_and_forget(run):  # what the task did while it was tried
        opened(run)
        toy_envs.STEPS.clear()
        toy_envs.EPISODES.clear()

    monkeypatch.setattr(load(script).Run, "open", open_and_forget)
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


@pytest.mark.parametrize("script", ["stsac.py"])
@pytest.mark.parametrize("env_id, backend", [("InvertedPendulum-v4", "envpool"), (WALK, "sync")])
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


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_replay_draws_from_the_latest_rows_and_keeps_them_on_disk(script, tmp_path):
    module = load(script)
    replay = module.Replay(tmp_path / "replay.bin", 100, 2, 1, window=10)
    assert (tmp_path / "replay.bin").stat().st_size == 100 * 7 * 4
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
    again = module.Replay(tmp_path / "replay.bin", 120, 2, 1, window=10, size=50)  # with space for more
    np.testing.assert_array_equal(again.rows[:50], replay.rows[:50])
    assert len(again.rows) == 120


# ---- One update by hand ----------------------------------------------------------------------------------------
CRITIC_RATE = 0.03  # large enough to tell the critics before a step from those after it


def one_update(script: str, tmp_path, monkeypatch, **changes) -> SimpleNamespace:
    """A run in float64 with a single update: what the players' optimisers were given, in which order, and the minibatch."""
    module, seen = load(script), SimpleNamespace(gradients=[], batches=[], noise=[])
    sample, backup = module.Replay.sample, module.backup

    class Adam(torch.optim.Adam):
        """Remembers the weights and the gradients of each step."""

        def step(self):
            parameters = self.param_groups[0]["params"]
            weights, gradients = ([x.detach().clone() for x in each] for each in (parameters, [p.grad for p in parameters]))
            seen.gradients.append((module.flatten(weights), module.flatten(gradients)))
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(module.Agent, "to", lambda agent, device: agent.double())

    def double_sample(*words):
        seen.batches.append([array.double() for array in sample(*words)])
        return seen.batches[-1]

    monkeypatch.setattr(module.Replay, "sample", double_sample)
    monkeypatch.setattr(module, "backup", lambda agent, *a: seen.noise.append(a[-1]) or backup(agent, *a))
    here = []
    policy = module.Agent.policy
    monkeypatch.setattr(module.Agent, "policy", lambda agent, out, noise: here.append(noise) or policy(agent, out, noise))
    shape = {"num_envs": 1, "num_steps": 1, "update_every": 1, "total_timesteps": 30, "learning_starts": 29, "random_steps": 30}
    seen.folder = train(script, run_dir=tmp_path, **shape | {"checkpoint_every": 30} | changes)
    monkeypatch.undo()
    seen.here = next(noise for noise in here if not any(noise is other for other in seen.noise))
    torch.manual_seed(1)
    seen.agent = module.Agent(3, 1, 8, 8, 0.2 if script == "stsac.py" else 0.1).double()
    return seen


def dense(module, seen, leader: str, ihvp: str, damping: float, control: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of both players from the formulas of the paper alone, in float64 with dense Hessians; with a control
    the actor's from the weights of its backups, one by one."""
    agent = seen.agent
    ((pairs, rewards, next_obs, terminated),) = seen.batches
    pairs, rewards, next_obs, terminated = (x[0].double() for x in (pairs, rewards, next_obs, terminated))
    here, there, obs = seen.here.double(), seen.noise[0].double(), pairs[:, :3]
    theta, omega = (module.flatten(part.parameters()).detach() for part in (agent.actor, agent.critics))

    def actor(theta, rows):
        parts = module.unflatten(theta, [*agent.actor.parameters()])
        return functional_call(agent.actor, dict(zip(dict(agent.actor.named_parameters()), parts)), (rows,))

    def critics(omega, rows):
        parts = dict(zip(dict(agent.critics.named_parameters()), module.unflatten(omega, [*agent.critics.parameters()])))
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
    if control != "none":
        H = torch.func.hessian(gauss_newton if ihvp == "kernel" else L, 1)(theta, omega)
        x = torch.linalg.solve(H + damping * torch.eye(len(omega)), torch.func.grad(f, 1)(theta, omega))
        weights = 2 * (torch.func.jacrev(lambda w: critics(w, pairs).sum(0))(omega) @ x)
        rows = -torch.func.jacrev(lambda t: errors(t, omega)[0])(theta)  # d_theta y (n, P)
        seen.weights = weights = -torch.ones(len(rows)) if control == "constant" else weights[[-1, *range(len(rows) - 1)]]
        return own[0] + sum(weight * row for weight, row in zip(weights, rows)) / len(rows), own[1]
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
    solve = {"ihvp": ihvp, "regularisation": damping, "cg_iterations": 300}
    seen = one_update(script, tmp_path, monkeypatch, leader=leader, critic_learning_rate=CRITIC_RATE, **solve)
    wanted = dense(module, seen, leader, ihvp, damping)
    own = dense(module, seen, "none-simultaneous", ihvp, damping)
    assert len(seen.gradients) == 2
    if leader == "none-sequential":  # the critics step first
        seen.gradients.reverse()
    for (vector, gradient), part, want, plain in zip(seen.gradients, (seen.agent.actor, seen.agent.critics), wanted, own):
        torch.testing.assert_close(vector.double(), module.flatten(part.parameters()), rtol=1e-6, atol=1e-7)
        assert (gradient - want).norm() < 1e-9 * want.norm()
        differs = part is {"actor": seen.agent.actor, "none-sequential": seen.agent.actor, "critic": seen.agent.critics}.get(leader)
        assert ((want - plain).norm() > 2e-3 * plain.norm()) == differs  # the implicit term, or the order, would be missed


@pytest.mark.parametrize("ihvp, damping", [("kernel", 0.5), ("cg", 300.0)])
def test_controls_of_the_solve_by_hand(script, tmp_path, monkeypatch, ihvp, damping):
    """The weights of the backups are -1, or each row's is that of another; all else is as when the actor leads."""
    module, solve, rows = load(script), {"ihvp": ihvp, "regularisation": damping, "cg_iterations": 300}, {}
    for control in ("none", "constant", "permuted"):
        seen = one_update(script, tmp_path / control, monkeypatch, control=control, **solve)
        (_, actors), (_, critics) = seen.gradients
        wanted = dense(module, seen, "actor", ihvp, damping, control)
        for gradient, want in zip((actors, critics), wanted):
            assert (gradient - want).norm() < 1e-9 * want.norm()
        rows[control] = read_csv(seen.folder / "metrics.csv")[-1]
        if control != "none":
            solved = dense(module, seen, "actor", ihvp, damping)[0]
            assert (solved - wanted[0]).norm() > 1e-5 * solved.norm()  # the control would be missed
            assert float(rows[control]["bilevel/weight_mean"]) == pytest.approx(seen.weights.mean().item(), rel=1e-6)
    assert float(rows["constant"]["bilevel/weight_std"]) == 0 and not rows["constant"]["bilevel/ihvp_residual"]
    for name in ("weight_mean", "weight_std", "ihvp_residual"):  # the weights are the same numbers
        first, second = (float(rows[control][f"bilevel/{name}"]) for control in ("none", "permuted"))
        assert first == pytest.approx(second, rel=1e-9)


@pytest.mark.parametrize("script", ["stsac.py"])
def test_after_an_update_the_target_has_moved_by_a_half_percent(script, tmp_path, monkeypatch):
    seen = one_update(script, tmp_path, monkeypatch)
    after = checkpoint(seen.folder)["agent"]
    for name, before in seen.agent.targets.state_dict().items():
        wanted = 0.995 * before + 0.005 * after[f"critics.{name}"].double()
        torch.testing.assert_close(after[f"targets.{name}"].double(), wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(after[f"targets.{name}"], before.float())


# ---- Leaders ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "leader, env_id, backend", [*((leader, "InvertedPendulum-v4", "envpool") for leader in LEADERS), ("actor", WALK, "sync")]
)
def test_a_run_of_each_leader(script, tmp_path, leader, env_id, backend):
    module, task = load(script), {"env_id": env_id, "env_backend": backend}
    folder = train(script, run_dir=tmp_path, leader=leader, eval_every=64, eval_episodes=2, save_model=True, **task)
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
    env = gym.make(env_id)
    for name in ("model.pt", "checkpoint.pt"):
        policy = module.load_policy(folder / name)
        obs = torch.randn(5, *env.observation_space.shape)
        assert all(env.action_space.contains(each.numpy()) for each in [*policy(obs), policy(obs[0])])
    exported = torch.export.export(policy, (obs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    torch.testing.assert_close(exported(obs[:3]), policy(obs[:3]))


@pytest.mark.parametrize("script", ["stsac.py"])
def test_infinite_regularisation_is_simultaneous_play(script, tmp_path):
    """Bitwise."""
    short = {"total_timesteps": 64}
    simultaneous = checkpoint(train(script, run_dir=tmp_path / "0", leader="none-simultaneous", **short))
    for i, changes in enumerate(({"leader": "actor"}, {"leader": "actor", "ihvp": "cg"}, {"leader": "critic"}), 1):
        changes |= short | {"regularisation": "inf", "run_dir": tmp_path / str(i)}
        assert same(simultaneous, checkpoint(train(script, **changes)))
    sequential = checkpoint(train(script, run_dir=tmp_path / "4", leader="none-sequential", **short))
    assert not same(simultaneous, sequential)


def test_in_a_run_the_implicit_term_is_not_zero(script, tmp_path):
    for i, changes in enumerate(({}, {"ihvp": "cg", "regularisation": 100}, {"leader": "critic", "regularisation": 1})):
        rows = read_csv(train(script, run_dir=tmp_path / str(i), total_timesteps=64, **changes) / "metrics.csv")
        assert all(float(row["bilevel/correction_norm"]) > 1e-5 * float(row["bilevel/direct_norm"]) for row in rows)
        assert all(float(row["bilevel/cosine"]) < 1 - 1e-9 or float(row["bilevel/multiplier"]) != 1 for row in rows)


@pytest.mark.full
def test_each_argument_of_the_algorithm_matters(script, tmp_path):
    changes = [
        {}, {"leader": "critic"}, {"leader": "none-simultaneous"}, {"leader": "none-sequential"}, {"ihvp": "cg"},
        {"ihvp": "cg", "cg_iterations": 1}, {"regularisation": 0.1}, {"regularisation_decay": 50}, {"follower_steps": 2},
        {"follower_steps": 3}, {"leader": "critic", "follower_steps": 2}, {"learning_rate": 2e-3}, {"critic_learning_rate": 2e-3},
        {"gamma": 0.9}, {"polyak": 0.9}, {"batch_size": 9}, {"buffer_size": 20}, {"random_steps": 0}, {"learning_starts": 32},
        {"update_every": 8}, {"exploration_noise": 0.5}, {"control": "constant"}, {"control": "permuted"},
    ]  # fmt: skip
    if script == "stsac.py":  # whose update is the same block of code
        changes = [{}, {"leader": "critic"}, {"ihvp": "cg"}, {"entropy_coef": 0.5}]
    changes = [{"total_timesteps": 64, "checkpoint_every": 2} | change for change in changes]
    found = [checkpoint(train(script, run_dir=tmp_path / str(i), **change)) for i, change in enumerate(changes)]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])


@pytest.mark.parametrize("script", ["stddpg.py"])
@pytest.mark.parametrize("leader, follower", [("actor", "critic"), ("critic", "actor"), ("none-sequential", "critic")])
def test_only_the_follower_is_unrolled(script, tmp_path, monkeypatch, leader, follower):
    """m steps of the follower for one of the leader: counted at their optimisers."""
    sizes = []

    class Adam(torch.optim.Adam):
        def step(self):
            sizes.append(sum(parameter.numel() for parameter in self.param_groups[0]["params"]))
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    folder = train(script, run_dir=tmp_path, leader=leader, follower_steps=3)
    agent = checkpoint(folder)["agent"]
    size = {part: sum(value.numel() for name, value in agent.items() if name.startswith(part)) for part in ("actor.", "critics.")}
    size = {"actor": size["actor."], "critic": size["critics."]}
    assert size["actor"] != size["critic"]
    leading = "actor" if follower == "critic" else "critic"
    assert sizes.count(size[follower]) == 3 * sizes.count(size[leading]) > 0


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_unrolled_steps_shrink_the_followers_gap(script, tmp_path):
    """Of many steps on one minibatch."""
    shape = {"num_steps": 4, "total_timesteps": 24, "learning_starts": 16}
    folder = train(script, run_dir=tmp_path, follower_steps=200, critic_learning_rate=5e-3, **shape)
    row = read_csv(folder / "metrics.csv")[-1]
    assert float(row["bilevel/inner_gradient_norm_after"]) < 0.5 * float(row["bilevel/inner_gradient_norm_before"])


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_regularisation_decays_with_the_steps(script, tmp_path):
    rows = read_csv(train(script, run_dir=tmp_path, regularisation=10, regularisation_decay=100) / "metrics.csv")
    for row in rows:
        assert float(row["bilevel/regularisation"]) == pytest.approx(10 * math.exp(-int(row["global_step"]) / 100))


@pytest.mark.parametrize("script", ["stsac.py"])
@pytest.mark.parametrize("control", ["none", "permuted"])
def test_a_run_repeats_bitwise_and_a_seed_matters(script, tmp_path, control):
    folders = [train(script, run_dir=tmp_path / str(i), seed=seed, control=control) for i, seed in enumerate((3, 3, 4))]
    assert same(*map(checkpoint, folders[:2])) and not same(checkpoint(folders[0]), checkpoint(folders[2]))
    logs = [without_time(read_csv(folder / "metrics.csv")) for folder in folders]
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_evaluation_does_not_change_the_training(script, tmp_path):
    never, often = (train(script, run_dir=tmp_path / str(n), eval_every=32, eval_episodes=n) for n in (0, 2))
    assert same(checkpoint(never), checkpoint(often))
    assert all(row["charts/eval_return"] for row in read_csv(often / "metrics.csv"))
    assert not any(row["charts/eval_return"] for row in read_csv(never / "metrics.csv"))


# ---- Folder and resume -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["stddpg.py"])
def test_files_of_a_finished_run(script, tmp_path):
    folder = train(script, run_dir=tmp_path)
    names = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    assert names - {".lock"} == {"args.json", "episodes.csv", "metrics.csv", "checkpoint.pt", "result.json", "replay.bin"}


SHAPE = {"env_id": CLOCK, "num_envs": 1, "num_steps": 32, "checkpoint_every": 2, "buffer_size": 40,
         "eval_every": 64, "eval_episodes": 1}  # fmt: skip


def assert_same_run(folder, whole) -> None:
    for name in ("metrics.csv", "episodes.csv"):
        assert without_time(read_csv(folder / name)) == without_time(read_csv(whole / name))
    assert same(checkpoint(folder), checkpoint(whole))
    assert checkpoint(folder)["replay_size"] == checkpoint(whole)["replay_size"]


@pytest.mark.parametrize("script, control", [("stsac.py", "none"), ("stsac.py", "permuted"), ("stddpg.py", "constant")])
def test_resume_equals_the_uninterrupted_run(script, control, toy_envs, tmp_path, monkeypatch):
    """Bitwise, on a task that is as it was after each iteration. The run breaks off after rows that its checkpoint does
    not count were written, and its window has slid over the first ones."""
    shape = SHAPE | {"control": control, "total_timesteps": 6 * 32}
    whole = train(script, run_dir=tmp_path / "whole", **shape)
    after_iteration(monkeypatch, script, 5, fail)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(script, run_dir=tmp_path / "part", **shape)
    monkeypatch.undo()
    (folder,) = (tmp_path / "part").iterdir()
    assert checkpoint(folder)["global_step"] == 4 * 32 and len(read_csv(folder / "metrics.csv")) == 5
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert resume(script, folder) == folder
    assert_same_run(folder, whole)


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_a_finished_run_is_extended_with_its_replay(script, toy_envs, tmp_path):
    whole = train(script, run_dir=tmp_path / "whole", total_timesteps=6 * 32, **SHAPE)
    folder = train(script, run_dir=tmp_path / "part", total_timesteps=4 * 32, **SHAPE)
    resume(script, folder, "--total-timesteps", 6 * 32)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_a_finished_run_is_replayed_without_its_replay(script, tmp_path):
    folder = train(script, env_id="InvertedPendulum-v4", run_dir=tmp_path)
    before = (folder / "checkpoint.pt").read_bytes(), (folder / "metrics.csv").read_bytes()
    (folder / "replay.bin").unlink()
    resume(script, folder, "--eval-episodes", 2)
    assert before == ((folder / "checkpoint.pt").read_bytes(), (folder / "metrics.csv").read_bytes())
    result = json.loads((folder / "result.json").read_text())
    module, returns = load(script), []
    policy, env = module.load_policy(folder / "checkpoint.pt"), gym.make("InvertedPendulum-v4")
    for episode in range(2):
        obs, ended = env.reset(seed=module.derived_seed(1, 2**40 + episode))[0], False
        returns.append(0.0)
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(policy(obs).numpy())
            returns[-1] += reward
            ended = terminated or truncated
    assert result["eval_returns"] == pytest.approx(returns) and min(returns) > 1


@pytest.mark.parametrize("script", ["stsac.py"])
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
    assert_same_run(folder, whole)


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_a_signal_ends_the_run_with_a_checkpoint_and_its_replay(script, tmp_path, monkeypatch):
    after_iteration(monkeypatch, script, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train(script, run_dir=tmp_path, checkpoint_every=1000)
    folder = next(tmp_path.iterdir())
    assert stop.value.code == 128 + signal.SIGTERM
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert checkpoint(folder)["global_step"] == 64 and (folder / "replay.bin").exists()
    assert resume(script, folder) == folder


@pytest.fixture
def broken_off(script, tmp_path, monkeypatch):
    """The folder of a run that failed after its third checkpoint."""
    after_iteration(monkeypatch, script, 4, fail)
    with pytest.raises(RuntimeError):
        train(script, run_dir=tmp_path / "broken")
    monkeypatch.undo()
    return next((tmp_path / "broken").iterdir())


@pytest.mark.parametrize("script", ["stddpg.py"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_resume_without_its_replay_is_refused_and_changes_nothing(script, broken_off, command_line, damage):
    path = broken_off / "replay.bin"
    path.unlink() if damage == "missing" else os.truncate(path, 100)
    before = {each: each.read_bytes() for each in broken_off.rglob("*") if each.is_file()}
    status, _, err = command_line(script, "--resume", broken_off)
    assert_one_sentence(status, err, "--resume", "replay.bin is missing or damaged")
    assert {each: each.read_bytes() for each in broken_off.rglob("*") if each.is_file()} == before


@pytest.mark.parametrize("script", ["stsac.py"])
def test_resume_with_other_networks_is_refused_and_with_another_step_size_it_has_that(script, broken_off, command_line, capsys):
    status, _, err = command_line(script, "--resume", broken_off, "--critic-width", "9")
    assert status == 2 and "networks of another shape" in err
    resume(script, broken_off, "--learning-rate", "0.5")
    assert "--learning-rate was 0.001 and is now 0.5" in capsys.readouterr().err
    rates = [state["param_groups"][0]["lr"] for state in checkpoint(broken_off)["optimisers"]]
    assert rates == [0.5, 1e-3]


# ---- Divergence ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["stddpg.py"])
@pytest.mark.parametrize("spoiled", ["observations", "rewards", "weights"])
def test_divergence_stops_a_run_with_one_sentence(script, toy_envs, command_line, tmp_path, monkeypatch, spoiled):
    """Exit status 1; the checkpoint of the iteration before stays, and it plays."""
    steps, step_of = [], toy_envs.Clock.step

    def step(clock, action):
        obs, reward, *rest = step_of(clock, action)
        steps.append(action)
        if len(steps) > 100 and spoiled != "weights":
            return (obs * np.float32("nan"), reward, *rest) if spoiled == "observations" else (obs, math.nan, *rest)
        return obs, reward, *rest

    monkeypatch.setattr(toy_envs.Clock, "step", step)
    changes = {"learning_rate": 1e38, "critic_learning_rate": 1e38, "learning_starts": 64} if spoiled == "weights" else {}
    status, _, err = command_line(script, *words(run_dir=tmp_path, env_id=CLOCK, num_envs=1, num_steps=32, **changes))
    (folder,) = tmp_path.iterdir()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    named = "losses|weights" if spoiled == "weights" else spoiled
    assert status == 1 and re.fullmatch(rf"error: the ({named}) stopped being finite by step \d+", line)
    assert json.loads((folder / "result.json").read_text())["status"] == "diverged"
    assert 0 < checkpoint(folder)["global_step"] < 128
    assert all(tensor.isfinite().all() for tensor in checkpoint(folder)["agent"].values())
    assert load(script).load_policy(folder / "checkpoint.pt")(torch.zeros(2)).isfinite().all()


# ---- Bad input -------------------------------------------------------------------------------------------------
WIDE, EMPTY = gym.spaces.Box(-3e38, 3e38, (2,), np.float32), gym.spaces.Box(np.float32([0, 1]), np.float32([1, 1]))
UNBOUNDED = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


@pytest.mark.parametrize(
    "changes, named",
    [({"env_id": "Hoper-v4"}, "--env-id 'Hoper-v4'"), ({"env_id": "CartPole-v1"}, "a flat Box of floats"),
     ({"env_id": "toy/MatrixActions-v0"}, "action space"), ({"env_id": "toy/SequenceObs-v0"}, "--env-id"),
     ({"env_id": "toy/Unbounded-v0"}, "high - low finite"), ({"env_id": "toy/Wide-v0"}, "high - low finite"),
     ({"env_id": "toy/Empty-v0"}, "low < high"), ({"total_timesteps": 10}, "less than one iteration of 32"),
     ({"env_id": WALK, "env_backend": "envpool"}, "--env-backend envpool"), ({"update_every": 5}, "must divide --num-steps 16"),
     ({"regularisation": 0}, "--regularisation is 0"), ({"regularisation": -1}, "--regularisation is"),
     ({"regularisation": "nan"}, "--regularisation is"), ({"regularisation_decay": 0}, "--regularisation-decay is"),
     ({"exploration_noise": -1}, "--exploration-noise is"), ({"device": "cuda"}, "--device cuda"),
     ({"control": "constant", "leader": "critic"}, "--control is 'constant'"),
     ({"control": "permuted", "leader": "none-simultaneous"}, "--control is 'permuted'"),
     ({"control": "constant", "regularisation": "inf"}, "a finite --regularisation")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(
    script, command_line, toy_envs, tmp_path, monkeypatch, changes, named
):
    if script == "stsac.py" and "exploration_noise" in changes:
        changes, named = {"entropy_coef": -1}, "--entropy-coef is"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    boxes = {"toy/Unbounded-v0": UNBOUNDED, "toy/Wide-v0": WIDE, "toy/Empty-v0": EMPTY}
    for name, box in boxes.items():
        gym.register(name, toy_envs.Spaces, kwargs={"observation_space": toy_envs.BOX, "action_space": box})
    status, _, err = command_line(script, *words(run_dir=tmp_path / "runs", **changes))
    for name in boxes:
        gym.registry.pop(name)
    assert_one_line(status, err, named)
    assert not (tmp_path / "runs").exists()


class Images(gym.Env):
    """Images that an MLP would take flat."""

    observation_space, action_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_a_replay_that_no_disk_can_hold_is_refused_with_its_size_before_anything_is_made(
    script, command_line, tmp_path, monkeypatch
):
    disk = SimpleNamespace(free=100e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: disk)
    gym.register("toy/Images-v0", Images)
    images = {"env_id": "toy/Images-v0", "run_dir": tmp_path / "some" / "runs"}
    for steps, size in ((500_000, "110.6 GB"), (10**18, "221,196,000,000,000.0 GB")):
        status, _, err = command_line(script, *words(total_timesteps=steps, **images))
        assert_one_sentence(status, err, f"--total-timesteps {steps}", size, "of 27,648 numbers", "100.0 GB are free")
        assert not (tmp_path / "some").exists()
    gym.registry.pop("toy/Images-v0")
    disk.free = 1e4
    folder = train(script, run_dir=tmp_path)  # the same rule for what is added to a run
    status, _, err = command_line(script, "--resume", folder, "--total-timesteps", 10_000)
    assert status == 2 and "takes 0.0 GB" in err and (folder / "result.json").exists()


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_a_quota_that_ends_where_the_disk_does_not_is_one_sentence(script, tmp_path, monkeypatch, command_line):
    def full(descriptor, offset, size):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", full)
    status, _, err = command_line(script, *words(run_dir=tmp_path / "runs"))
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and "cannot hold the replay" in line and "Disk quota exceeded" in line


@pytest.mark.parametrize("script, form", [("stddpg.py", "tanh"), ("stsac.py", "silu"), ("stddpg.py", "layer norm")])
def test_a_copier_may_change_the_networks(script, tmp_path, monkeypatch, command_line, form):
    """And is told where the derivatives would not hold."""
    module = load(script)
    between = {"tanh": nn.Tanh, "silu": nn.SiLU, "layer norm": lambda: nn.LayerNorm(8)}[form]

    def mlp(inputs, width, outputs):
        return nn.Sequential(nn.Linear(inputs, 8), between(), nn.Linear(8, 8), between(), nn.Linear(8, outputs))

    monkeypatch.setattr(module, "mlp", mlp)
    for leader, ihvp in (("actor", "kernel"), ("actor", "cg"), ("critic", "cg")):
        if form == "layer norm":
            with pytest.raises(module.BadInput, match="the critic's derivatives do not hold"):
                train(script, run_dir=tmp_path / "runs", leader=leader, ihvp=ihvp)
            assert not (tmp_path / "runs").exists()
        else:
            folder = train(script, run_dir=tmp_path / (leader + ihvp), leader=leader, ihvp=ihvp, total_timesteps=64)
            assert json.loads((folder / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("script", ["stsac.py"])
def test_an_update_after_every_step_has_none_for_a_reset(script, tmp_path):
    """An episode of 31 steps and its reset: with one environment the block of the reset has no new transition. It is the last of
    the fourth and of the eighth iteration, whose rows describe the update before."""
    shape = {"num_envs": 1, "num_steps": 8, "update_every": 1, "total_timesteps": 64, "learning_starts": 8, "random_steps": 8}
    folder = train(script, env_id=CLOCK, run_dir=tmp_path, **shape)
    rows = read_csv(folder / "metrics.csv")
    assert [row["losses/qf_loss"] != "" for row in rows] == [False] + [True] * 7
    assert checkpoint(folder)["replay_size"] == 62


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_no_damping_is_allowed_where_the_solve_is_not_the_kernels(script, tmp_path):
    for i, changes in enumerate(({"ihvp": "cg"}, {"leader": "critic"}, {"leader": "none-sequential"})):
        assert train(script, run_dir=tmp_path / str(i), regularisation=0, total_timesteps=64, **changes).is_dir()


def test_help_shows_every_argument_in_80_columns(script, command_line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = command_line(script, "--help")
    assert status in (0, None) and err == "" and max(map(len, out.partition("--exp-name")[2].splitlines())) <= 80
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for name in load(script).Args.model_fields:
        assert re.search(rf"{flag(name)}\b", shown), name


# ---- CUDA graphs -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["stsac.py"])
@pytest.mark.parametrize("leader, control", [("actor", "none"), ("actor", "constant"), ("actor", "permuted"), ("none-sequential", "none")])
def test_an_update_can_be_a_cuda_graph(script, tmp_path, monkeypatch, leader, control):
    """All that it changes stays where it is, and without diagnostics it reads no number."""
    module, addresses, backup = load(script), defaultdict(set), load(script).backup

    class Adam(torch.optim.Adam):
        def step(self):
            super().step()
            parameters = self.param_groups[0]["params"]
            states = [tensor for parameter in parameters for tensor in self.state[parameter].values()]
            addresses[id(self)].add(tuple(tensor.data_ptr() for tensor in [*parameters, *states]))

    def seen_backup(agent, *rest):
        addresses["agent"].add(tuple(parameter.data_ptr() for parameter in agent.parameters()))
        return backup(agent, *rest)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(module, "backup", seen_backup)
    counts, updates = [], []
    for learning_starts in (0, 16):
        with Reads() as reads:
            changes = {"leader": leader, "control": control, "learning_starts": learning_starts, "total_timesteps": 96}
            folder = train(script, run_dir=tmp_path, **changes)
        counts.append(reads.count)
        updates.append(int(checkpoint(folder)["optimisers"][0]["state"][0]["step"]))
        assert len(addresses) == 2 + 1 and all(len(each) == 1 for each in addresses.values())
        addresses.clear()
    assert updates[0] > updates[1] + 10 and counts[0] == counts[1] > 0


@pytest.mark.parametrize("script", ["stddpg.py"])
@pytest.mark.parametrize("wanted", [True, False])
def test_cuda_graphs_can_be_switched_off(script, tmp_path, monkeypatch, wanted):
    """Where there is no CUDA device nothing is captured in any case."""
    module, made = load(script), []
    monkeypatch.setattr(module, "GraphedUpdate", lambda update: made.append(update) or update)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    train(script, run_dir=tmp_path / "cpu", cuda_graphs=wanted, total_timesteps=64)
    assert not made

    class Cuda:  # a device of that name, on which tensors live on the CPU
        type = "cuda"

    device, to = torch.device, {"tensor": torch.Tensor.to, "module": nn.Module.to}
    monkeypatch.setattr(torch, "device", lambda name: Cuda())
    monkeypatch.setattr(torch.Tensor, "to", lambda x, where, *more: x if isinstance(where, Cuda) else to["tensor"](x, where, *more))
    monkeypatch.setattr(nn.Module, "to", lambda x, where: x if isinstance(where, Cuda) else to["module"](x, where))
    for name in ("zeros", "arange"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            torch, name,
            lambda *a, device=None, original=original, **k: original(*a, device=None if isinstance(device, Cuda) else device, **k),
        )
    train(script, run_dir=tmp_path / "cuda", cuda_graphs=wanted, total_timesteps=64)
    assert len(made) == wanted and device is not torch.device


@pytest.mark.parametrize("script", ["stddpg.py"])
def test_plain_fraction_counts_the_updates_without_a_correction(script, tmp_path, monkeypatch):
    monkeypatch.setattr(load(script), "kernel_response", lambda data, led, damping: torch.zeros_like(data.values))
    rows = read_csv(train(script, leader="actor", run_dir=tmp_path) / "metrics.csv")
    assert {row["bilevel/plain_fraction"] for row in rows if row["bilevel/plain_fraction"]} == {"1.0"}
    assert {float(row["bilevel/correction_norm"]) for row in rows if row["bilevel/correction_norm"]} == {0.0}


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
