"""What a rollout means: resets, terminations and truncations, end to end through `train`."""

import numpy as np
import pytest
import torch
from conftest import DISCRETE_SCRIPTS, NUM_ENVS, SCRIPTS, load, pooled, read_csv, train


class Tampered:
    """Environments whose meaningless numbers are changed, and in which one meaningful number may be."""

    def __init__(self, envs, reset_reward=0.0, terminal_offset=0.0, truncated_offset=0.0, reward_offset=0.0):
        self.envs, self.ended = envs, None
        self.reset_reward, self.offsets, self.reward_offset = reset_reward, (terminal_offset, truncated_offset), reward_offset

    def reset(self):
        return self.envs.reset()

    def step(self, actions):
        obs, rewards, terminated, truncated, info = self.envs.step(actions)
        obs, rewards = obs.copy(), np.array(rewards, dtype=np.float64)
        if self.ended is not None:
            rewards[self.ended] += self.reset_reward  # the row after an episode's end
            rewards[~self.ended] += self.reward_offset
        obs[terminated] += self.offsets[0]  # its observation: changes its action and log-probability as well
        obs[truncated] += self.offsets[1]
        self.ended = terminated | truncated
        return obs, rewards, terminated, truncated, info

    def close(self):
        self.envs.close()


def run_with(script, tmp_path, *flags, **tampering):
    """Weights and normaliser, losses and episodes of a tiny run in tampered environments."""
    module = load(script)
    original = module.make_envs

    def make_envs(*arguments):
        envs, *spaces = original(*arguments)
        return Tampered(envs, **tampering), *spaces

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_envs", make_envs)
        folder = train(script, *flags, save_model=True, run_dir=tmp_path)
    model = torch.load(folder / "model.pt", weights_only=True)["agent"]
    losses = [{k: v for k, v in row.items() if k.startswith(("losses/", "bilevel/"))} for row in read_csv(folder / "metrics.csv")]
    episodes = [{k: v for k, v in row.items() if k != "wall_time_s"} for row in read_csv(folder / "episodes.csv")]
    return {name: tensor.tolist() for name, tensor in model.items()}, losses, episodes


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_row_after_an_episodes_end_influences_nothing(script, tmp_path):
    """Its reward, and after a termination its observation, action and log-probability: weights, statistics of the
    normalisers, losses and logged returns stay bitwise the same. Tampering with a row that counts shows."""
    clean = run_with(script, tmp_path)
    assert len(clean[2]) > 20
    assert clean == run_with(script, tmp_path, reset_reward=1e3)
    assert clean == run_with(script, tmp_path, terminal_offset=50.0)
    assert clean[0] != run_with(script, tmp_path, reward_offset=0.1)[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_final_observation_matters_only_as_the_bootstrap_of_a_truncated_row(script, tmp_path):
    clean, flag = run_with(script, tmp_path), "--no-bootstrap-truncation"
    assert clean != run_with(script, tmp_path, truncated_offset=50.0)
    unbootstrapped = run_with(script, tmp_path, flag)
    assert clean[0] != unbootstrapped[0] and clean[2][0] == unbootstrapped[2][0]
    assert unbootstrapped == run_with(script, tmp_path, flag, truncated_offset=50.0)


# ---- Backends --------------------------------------------------------------------------------------------------
def make(script, **changes):
    """The environments of `changes`, and the spaces of one."""
    return load(script).make_envs(load(script).Args(**changes), 5)


@pytest.mark.parametrize("threads", [1, 2])
def test_envpool_resets_on_the_next_step_as_the_loop_expects(threads):
    """At the end of an episode the true final observation; then a row that ignores its action, pays 0 and shows the
    first observation of the next episode."""
    envs, *_ = make("ppo_continuous.py", env_id="Hopper-v4", num_envs=4, env_backend="envpool", env_threads=threads)
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
    pool, observations, space = make("ppo_discrete.py", env_id=env_id, num_envs=1, env_backend="envpool")
    gymnasium, *_ = make("ppo_discrete.py", env_id=env_id, num_envs=1, env_backend="sync")
    agent = load("ppo_discrete.py").Agent(size, int(space.n))
    agent.set_action_space(space)
    obs, _ = pool.reset()
    gymnasium.reset(seed=5)
    inner, seen = gymnasium.envs[0].unwrapped, set()
    for step in range(15):
        x = obs[0].astype(np.float64)
        inner.state = x if size == 4 else np.array([np.arctan2(x[1], x[0]), np.arctan2(x[3], x[2]), x[4], x[5]])
        actions = agent.task_actions(torch.tensor([step % int(space.n)])).numpy()
        seen.add(int(actions[0]))
        (obs, reward, terminated, *_), other = pool.step(actions), gymnasium.step(actions)
        if terminated.any():
            break
        assert np.allclose(obs, other[0], atol=1e-4) and reward == other[1]
    assert seen == set(range(space.n)) and observations.shape == (size,)


def test_both_backends_are_the_same_task():
    """The same state and action give the same reward and next state, so one loop serves both."""
    pool, *pool_spaces = make("ppo_continuous.py", env_id="HalfCheetah-v4", num_envs=1, env_backend="envpool")
    gymnasium, *gymnasium_spaces = make("ppo_continuous.py", env_id="HalfCheetah-v4", num_envs=1, env_backend="sync")
    assert pool_spaces[0].shape == gymnasium_spaces[0].shape
    assert (pool_spaces[1].low == gymnasium_spaces[1].low).all() and (pool_spaces[1].high == gymnasium_spaces[1].high).all()
    pool.reset()
    gymnasium.reset(seed=5)
    inner = gymnasium.envs[0].unwrapped
    first, *_ = pool.step(np.zeros((1, 6), dtype=np.float32))
    inner.set_state(np.concatenate([[0.0], first[0, :8]]), first[0, 8:])
    action = np.full((1, 6), 0.3, dtype=np.float32)
    a, b = pool.step(action), gymnasium.step(action)
    assert np.allclose(a[0], b[0], atol=0.02) and abs(a[1] - b[1]) < 0.05


@pytest.mark.parametrize("script", ["ppo_continuous.py", "ppo_discrete.py"])
def test_episodes_of_envpool_agree_with_a_count_by_hand(script, tmp_path, monkeypatch):
    records, original = [], load(script).make_envs

    def recorded(*arguments):
        envs, *spaces = original(*arguments)
        step = envs.step

        def recorded_step(actions):
            result = step(actions)
            records.append((result[1].copy(), result[2] | result[3], actions.copy()))
            return result

        envs.step = recorded_step
        return envs, *spaces

    monkeypatch.setattr(load(script), "make_envs", recorded)
    folder = train(script, run_dir=tmp_path, **pooled(script))
    expected, rewards, fresh = [], [[] for _ in range(NUM_ENVS)], [False] * NUM_ENVS
    for t, (reward, ended, _) in enumerate(records):
        for index in range(NUM_ENVS):
            if not fresh[index]:  # else this step was the reset of an episode that ended
                rewards[index].append(float(reward[index]))
            fresh[index] = bool(ended[index])
            if ended[index]:
                expected.append(((t + 1) * NUM_ENVS, index, sum(rewards[index]), len(rewards[index])))
                rewards[index].clear()
    names = ("global_step", "env_index", "episodic_return", "episodic_length")
    assert [tuple(float(row[name]) for name in names) for row in read_csv(folder / "episodes.csv")] == expected
    assert len(expected) > 10


def test_actions_are_clipped_to_the_tasks_own_box(tmp_path, monkeypatch):
    """Humanoid's box is +-0.4; a cost on unclipped actions would show in the reward."""
    module, seen = load("ppo_continuous.py"), []
    original = module.make_envs

    def make_envs(*arguments):
        envs, *spaces = original(*arguments)
        step = envs.step
        envs.step = lambda actions: (seen.append(actions.copy()), step(actions))[1]
        return envs, *spaces

    monkeypatch.setattr(module, "make_envs", make_envs)
    train("ppo_continuous.py", env_id="Humanoid-v4", num_steps=16, total_timesteps=64, run_dir=tmp_path)
    actions = np.concatenate(seen)
    assert np.isclose([actions.min(), actions.max()], [-0.4, 0.4], rtol=0, atol=1e-7).all()


@pytest.mark.parametrize("backend", ["envpool", "sync"])
@pytest.mark.parametrize("env_id, episodes", [("Hopper-v4", True), ("Hopper-v5", True), ("CartPole-v1", True), ("Acrobot-v1", False)])
def test_tasks_run_on_both_backends(env_id, episodes, backend, tmp_path):
    """Also one whose episodes, of 500 steps, no rollout ends: what is missing is an empty cell, not an error."""
    script = "ppo_continuous.py" if "Hopper" in env_id else DISCRETE_SCRIPTS[0]
    folder = train(script, env_id=env_id, env_backend=backend, num_steps=64, run_dir=tmp_path)
    assert bool(read_csv(folder / "episodes.csv")) == episodes


@pytest.mark.parametrize(
    ("cores", "threads", "expected"), [({0, 1}, 2, 0), ({0, 1}, 1, -1), ({2, 3}, 0, 2), ({5}, 1, 5), ({0, 2}, 2, -1), ({0, 1}, 3, 0)]
)
def test_threads_are_pinned_only_where_they_fill_neighbouring_cores(monkeypatch, cores, threads, expected):
    """0 threads: one for each core."""
    import envpool

    class Made(Exception):
        pass

    def make_pool(env_id, **settings):
        raise Made(settings["thread_affinity_offset"], settings["num_threads"])

    monkeypatch.setattr(envpool, "make_gymnasium", make_pool)
    monkeypatch.setattr(load("ppo_continuous.py").os, "sched_getaffinity", lambda process: cores)
    with pytest.raises(load("ppo_continuous.py").BadInput) as stop:
        make("ppo_continuous.py", env_threads=threads)
    assert stop.value.__cause__.args == (expected, threads or len(cores))
