"""What a rollout means: resets, terminations and truncations, end to end through `train`."""

import csv

import numpy as np
import pytest
import torch
from conftest import DISCRETE_SCRIPTS, SCRIPTS, load, train


class Tampered:
    """Environments whose meaningless numbers are changed, and in which one meaningful number may be."""

    def __init__(self, envs, reset_reward=0.0, terminal_offset=0.0, truncated_offset=0.0):
        self.envs, self.ended = envs, None
        self.reset_reward, self.offsets = reset_reward, (terminal_offset, truncated_offset)

    def reset(self):
        return self.envs.reset()

    def step(self, actions):
        obs, rewards, terminated, truncated, info = self.envs.step(actions)
        obs, rewards = obs.copy(), np.array(rewards, dtype=np.float64)
        if self.ended is not None:
            rewards[self.ended] += self.reset_reward  # the row after an episode's end
        obs[terminated] += self.offsets[0]  # its observation: changes its action and log-probability as well
        obs[truncated] += self.offsets[1]
        self.ended = terminated | truncated
        return obs, rewards, terminated, truncated, info

    def close(self):
        self.envs.close()


def run_with(script, tmp_path, monkeypatch, *, flags=(), **tampering):
    """The model and the csv rows of a tiny run in tampered environments."""
    module = load(script)
    original = module.make_envs

    def make_envs(*arguments):
        envs, *spaces = original(*arguments)
        return Tampered(envs, **tampering), *spaces

    monkeypatch.setattr(module, "make_envs", make_envs)
    folder = train(script, *flags, save_model=True, run_dir=tmp_path / str(len(list(tmp_path.iterdir()))))
    monkeypatch.undo()
    model = torch.load(folder / "model.pt", weights_only=True)
    tensors = model["agent"] | {"obs_mean": model["obs_mean"], "obs_std": model["obs_std"]}
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    with open(folder / "episodes.csv") as file:
        episodes = [(row["global_step"], row["episodic_return"], row["episodic_length"]) for row in csv.DictReader(file)]
    losses = [[value for name, value in row.items() if name.startswith(("losses/", "bilevel/"))] for row in rows]
    return tensors, losses, episodes


def same(first, second):
    return (
        all(torch.equal(first[0][name], second[0][name]) for name in first[0])
        and first[1] == second[1]
        and first[2] == second[2]
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_row_after_an_episodes_end_influences_nothing(script, tmp_path, monkeypatch):
    """Its reward, and after a termination its observation, action and log-probability: weights, statistics of the
    normalisers, losses and logged returns stay bitwise the same."""
    clean = run_with(script, tmp_path, monkeypatch)
    assert len(clean[2]) > 20
    assert same(clean, run_with(script, tmp_path, monkeypatch, reset_reward=1e3))
    assert same(clean, run_with(script, tmp_path, monkeypatch, terminal_offset=50.0))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_final_observation_matters_only_as_the_bootstrap_of_a_truncated_row(script, tmp_path, monkeypatch):
    clean = run_with(script, tmp_path, monkeypatch)
    moved = run_with(script, tmp_path, monkeypatch, truncated_offset=50.0)
    assert not same(clean, moved)
    flags = ("--no-bootstrap-truncation",)
    unbootstrapped = run_with(script, tmp_path, monkeypatch, flags=flags)
    assert not same(clean, unbootstrapped)
    assert same(unbootstrapped, run_with(script, tmp_path, monkeypatch, flags=flags, truncated_offset=50.0))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_reward_of_a_transition_matters(script, tmp_path, monkeypatch):
    """The tampering of the tests above would be seen if it fell on rows that count."""
    clean, module = run_with(script, tmp_path, monkeypatch), load(script)
    original = module.make_envs

    def make_envs(*arguments):
        envs, *spaces = original(*arguments)
        tampered = Tampered(envs)
        step = tampered.step

        def scaled(actions):
            obs, rewards, *rest = step(actions)
            return obs, 1.5 * rewards + 0.1, *rest

        tampered.step = scaled
        return tampered, *spaces

    monkeypatch.setattr(module, "make_envs", make_envs)
    folder = train(script, save_model=True, run_dir=tmp_path / "scaled")
    scaled = torch.load(folder / "model.pt", weights_only=True)["agent"]
    assert not all(torch.equal(clean[0][name], scaled[name]) for name in scaled)


@pytest.mark.parametrize("threads", [1, 2])
def test_envpool_resets_on_the_next_step_as_the_loop_expects(threads):
    """At the end of an episode the true final observation; then a row that ignores its action, pays 0 and shows the
    first observation of the next episode."""
    envs, _, space = load(SCRIPTS[0]).make_envs("Hopper-v4", 4, 3, "envpool", threads)
    generator, resets = np.random.default_rng(0), 0
    envs.reset()
    ended = np.zeros(4, dtype=bool)
    for _ in range(300):
        obs, rewards, terminated, truncated, _ = envs.step(generator.uniform(-1, 1, (4, 3)).astype(np.float32))
        assert not (terminated | truncated)[ended].any() and (rewards[ended] == 0).all()
        assert (np.abs(obs[ended, 0] - 1.25) < 0.01).all()  # Hopper starts at a height of 1.25
        resets += ended.sum()
        ended = terminated | truncated
        assert ((obs[terminated, 0] < 0.7) | (np.abs(obs[terminated, 1]) > 0.2)).all()  # and ends fallen or tilted
    assert resets > 20


@pytest.mark.parametrize("env_id, size", [("CartPole-v1", 4), ("Acrobot-v1", 6)])
def test_envpool_takes_the_actions_of_classic_control_as_gymnasium_does(env_id, size):
    """A state steps to the same next one in both, with the numbers of the actions as `train` sends them."""
    module, (generator, seen) = load("ppo_discrete.py"), (np.random.default_rng(0), set())
    pool, observations, space = module.make_envs(env_id, 1, 5, "envpool", 1)
    gymnasium, *_ = module.make_envs(env_id, 1, 5, "gymnasium", 1)
    assert observations.shape == (size,)
    obs, _ = pool.reset()
    gymnasium.reset(seed=5)
    inner = gymnasium.envs[0].unwrapped
    for _ in range(15):
        x = obs[0].astype(np.float64)
        inner.state = x if size == 4 else np.array([np.arctan2(x[1], x[0]), np.arctan2(x[3], x[2]), x[4], x[5]])
        actions = module.task_actions(generator.integers(0, space.n, 1), space)
        seen.add(int(actions[0]))
        (obs, reward, terminated, *_), other = pool.step(actions), gymnasium.step(actions)
        if terminated.any():
            break
        assert np.allclose(obs, other[0], atol=1e-4) and reward == other[1]
    assert seen == set(range(space.n))


def test_both_backends_are_the_same_task():
    """The same state and action give the same reward and next state, so one loop serves both."""
    module = load(SCRIPTS[0])
    pool, *pool_spaces = module.make_envs("HalfCheetah-v4", 1, 5, "envpool", 1)
    gymnasium, *gymnasium_spaces = module.make_envs("HalfCheetah-v4", 1, 5, "gymnasium", 1)
    assert pool_spaces[0].shape == gymnasium_spaces[0].shape
    assert (pool_spaces[1].low == gymnasium_spaces[1].low).all() and (pool_spaces[1].high == gymnasium_spaces[1].high).all()
    pool.reset()
    start, _ = gymnasium.reset(seed=5)
    inner = gymnasium.envs[0].unwrapped
    first, *_ = pool.step(np.zeros((1, 6), dtype=np.float32))
    inner.set_state(np.concatenate([[0.0], first[0, :8]]), first[0, 8:])
    action = np.full((1, 6), 0.3, dtype=np.float32)
    a, b = pool.step(action), gymnasium.step(action)
    assert np.allclose(a[0], b[0], atol=0.02) and abs(a[1] - b[1]) < 0.05


def test_actions_are_clipped_to_the_tasks_own_box(tmp_path, monkeypatch):
    """Humanoid's box is +-0.4; a cost on unclipped actions would show in the reward."""
    module, seen = load(SCRIPTS[0]), []
    original = module.make_envs

    def make_envs(*arguments):
        envs, *spaces = original(*arguments)
        step = envs.step
        envs.step = lambda actions: (seen.append(actions.copy()), step(actions))[1]
        return envs, *spaces

    monkeypatch.setattr(module, "make_envs", make_envs)
    train(SCRIPTS[0], env_id="Humanoid-v4", num_steps=16, total_timesteps=64, run_dir=tmp_path)
    actions = np.concatenate(seen)
    assert np.isclose([actions.min(), actions.max()], [-0.4, 0.4], rtol=0, atol=1e-7).all()


@pytest.mark.parametrize("script", DISCRETE_SCRIPTS)
@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_classic_control_runs_on_both_backends(script, backend, tmp_path):
    """Also a task whose episodes, of 500 steps, no rollout ends: what is missing is an empty cell, not an error."""
    for env_id, episodes in (("CartPole-v1", True), ("Acrobot-v1", False)):
        folder = train(script, env_id=env_id, env_backend=backend, run_dir=tmp_path)
        with open(folder / "episodes.csv") as file:
            assert bool(list(csv.DictReader(file))) == episodes


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_v4_and_v5_run_on_both_backends(env_id, backend, tmp_path):
    folder = train(SCRIPTS[0], env_id=env_id, env_backend=backend, num_steps=64, run_dir=tmp_path)
    with open(folder / "episodes.csv") as file:
        assert len(list(csv.DictReader(file))) > 2  # returns are logged with either


@pytest.mark.parametrize(
    ("cores", "threads", "expected"), [({0, 1}, 2, 0), ({0, 1}, 1, -1), ({2, 3}, 2, 2), ({5}, 1, 5), ({0, 2}, 2, -1), ({0, 1}, 3, 0)]
)
def test_threads_are_pinned_only_where_they_fill_neighbouring_cores(script, monkeypatch, cores, threads, expected):
    module = load(script)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: cores)
    assert module.first_core(threads) == expected
