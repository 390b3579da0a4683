"""ppo_atari.py and blpo_atari.py as programs: what a row of a real game means, run folder, resume, bad input."""

import copy
import functools
import inspect
import json
import math
import os
import re
import signal
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import after_iteration, load, read_csv, without_time
from test_command_line import assert_one_sentence

import blpo_atari as blpo
import ppo_atari as ppo

SCRIPTS = ["ppo_atari.py", "blpo_atari.py"]
TINY = {
    "env_id": "Breakout-v5", "num_envs": 2, "num_steps": 16, "total_timesteps": 4 * 32, "num_minibatches": 2,
    "update_epochs": 2, "checkpoint_every": 1, "device": "cpu", "env_threads": 1, "torch_threads": 1,
}  # fmt: skip
TINY_BLPO = {"nystrom_rank": 3}


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn."""
    return request.param


@pytest.fixture(autouse=True)
def few_channels(monkeypatch):
    """The network with few channels, so that a run takes a second; its images are the real ones."""
    for module in (ppo, blpo):
        monkeypatch.setattr(module, "nature_cnn", functools.partial(module.nature_cnn, channels=(3, 4, 5), width=6))
    yield
    torch.set_num_threads(1)


def words(script, **changes) -> list[str]:
    """The command line of a tiny run."""
    argv = []
    for name, value in (TINY | (TINY_BLPO if script == "blpo_atari.py" else {}) | changes).items():
        flag = name.replace("_", "-")
        argv += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return argv


def train(script, **changes):
    """A tiny run in this process; returns its folder."""
    module = load(script)
    return module.train(module.parse_args(words(script, **changes)))


def resume(script, folder, *words):
    module = load(script)
    return module.train(module.parse_args(["--resume", str(folder), *words]))


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logs_of(folder) -> list:
    return [without_time(read_csv(folder / name)) for name in ("metrics.csv", "episodes.csv")]


class Recorder:
    """The games of the training, whose rows are kept and may be tampered with."""

    def __init__(self, monkeypatch, script, tamper=lambda ended, row: None):
        self.rows, self.actions, self.tamper = [], [], tamper
        original = load(script).make_envs
        monkeypatch.setattr(load(script), "make_envs", lambda *settings: self.wrap(original(*settings)))

    def wrap(self, envs):
        self.envs, self.action_space, self.ended = envs, envs.action_space, np.zeros(TINY["num_envs"], bool)
        return self

    def reset(self):
        return self.envs.reset()

    def step(self, actions):
        self.actions.append(np.array(actions))
        images, reward, terminated, truncated, info = self.envs.step(actions)
        row = dict(images=images.copy(), reward=reward.copy(), terminated=terminated, truncated=truncated, info=dict(info))
        self.tamper(self.ended, row)
        self.rows.append(row | {"reset": self.ended})
        self.ended = terminated | truncated
        return row["images"], row["reward"], terminated, truncated, row["info"]

    def close(self):
        self.envs.close()


# ---- What a row means ------------------------------------------------------------------------------------------
def score_in_memory(ram: np.ndarray) -> int:
    """Breakout's score as the game keeps it: binary-coded decimal, hundreds in byte 76, tens and units in byte 77."""
    return sum(int(f"{ram[byte]:x}") * factor for byte, factor in ((76, 100), (77, 1)))


def test_envpool_marks_lives_games_and_resets_as_the_loop_expects():
    envs, num_actions = ppo.make_envs(ppo.Args(), 4, 3), 4
    envs.reset()
    rng, ended, before, seen = np.random.default_rng(0), np.zeros(4, bool), None, {"life": 0, "game": 0, "reward": 0}
    for _ in range(600):
        images, reward, terminated, truncated, info = envs.step(rng.integers(0, num_actions, 4))
        assert images.shape == (4, 4, 84, 84) and images.dtype == np.uint8
        over = info["terminated"] != 0
        assert not truncated.any() and (terminated | ~over).all()  # a game's end is always a termination as well
        if before is not None:
            fewer = info["lives"] < before["lives"]
            assert (fewer[~ended] == terminated[~ended]).all()  # each lost life, and the last one
            assert ((info["lives"] == 0) == over).all()
            # A reset row: nothing is won, nothing ends; after a life the game's clock stands still, after a game it restarts.
            assert not (terminated | over | (reward != 0) | (info["reward"] != 0))[ended].any()
            after_life, after_game = ended & (before["terminated"] == 0), ended & (before["terminated"] != 0)
            assert (info["elapsed_step"] == before["elapsed_step"])[after_life].all()
            assert (info["lives"] == before["lives"])[after_life].all()
            assert (info["elapsed_step"][after_game] == 0).all() and (info["lives"][after_game] == 5).all()
            assert (info["elapsed_step"] == before["elapsed_step"] + 1)[~ended].all()
        seen["life"], seen["game"] = seen["life"] + (terminated & ~over).sum(), seen["game"] + over.sum()
        seen["reward"] += (reward != 0).sum()
        ended, before = terminated | truncated, {key: info[key].copy() for key in ("lives", "terminated", "elapsed_step")}
    envs.close()
    assert seen["life"] > 8 and seen["game"] > 2 and seen["reward"] > 3


def test_points_are_not_clipped_in_the_log_but_are_in_the_reward():
    envs, num_actions = ppo.make_envs(ppo.Args(env_id="SpaceInvaders-v5"), 2, 1), 6
    envs.reset()
    rewards, points, rng = [], [], np.random.default_rng(0)
    for _ in range(300):
        _, reward, _, _, info = envs.step(rng.integers(0, num_actions, 2))
        rewards += reward.tolist()
        points += info["reward"].tolist()
    assert max(points) >= 5 and set(rewards) == {0.0, 1.0} and rewards == np.sign(points).tolist()


def test_games_are_logged_whole_with_their_score(script, tmp_path, monkeypatch):
    """Returns against the score in the game's memory, lengths against EnvPool's own count of steps; a lost life is none.
    The rewards that are learned from are another matter: here they are all 0."""
    recorder = Recorder(monkeypatch, script, lambda ended, row: row["reward"].fill(0))
    folder = train(script, run_dir=tmp_path, num_steps=64, total_timesteps=6 * 128, update_epochs=1, seed=2)
    expected = []
    for t, row in enumerate(recorder.rows):
        for index in np.flatnonzero(row["info"]["terminated"]):
            ram, length = row["info"]["ram"][index], row["info"]["elapsed_step"][index]
            expected.append((2 * (t + 1), index, float(score_in_memory(ram)), int(length)))
    logged = [
        (int(row["global_step"]), int(row["env_index"]), float(row["episodic_return"]), int(row["episodic_length"]))
        for row in read_csv(folder / "episodes.csv")
    ]
    assert logged == expected
    assert len(logged) >= 2 and max(row[2] for row in logged) > 0
    assert sum(row["terminated"].sum() for row in recorder.rows) > 3 * len(logged)  # most ends are lives


def test_a_game_that_is_cut_off_is_logged_and_bootstrapped(script, tmp_path, monkeypatch):
    """After 10 steps here. Its end is no termination unless the user says so."""
    found = []
    for bootstrap in (True, False):
        with monkeypatch.context() as patch:
            recorder = Recorder(patch, script)
            changes = {"env_kwargs": '{"max_episode_steps": 10}', "bootstrap_truncation": bootstrap}
            folder = train(script, run_dir=tmp_path / str(bootstrap), env_id="Pong-v5", **changes)
        assert any(row["truncated"].any() for row in recorder.rows)
        assert {row["episodic_length"] for row in read_csv(folder / "episodes.csv")} == {"10"}
        found.append(weights_of(folder))
    assert not same(*found)


UNTAMPERED = {}  # (script, options): weights and logs, so that this run is made once


CONTROLS = [pytest.param(what, marks=pytest.mark.full) for what in ("points", "meaningful reward", "final image of a cut game")]


@pytest.mark.parametrize("what", ["reward", "final image", *CONTROLS])
def test_reset_rows_influence_nothing(script, tmp_path, monkeypatch, what):
    """Reward and points of the row after an end, and the image that an ended life leaves (with it, the action and the
    log-probability that the policy gives there): no weight and no log changes. Two others show what does."""

    def tamper(ended, row):
        if what == "reward":
            row["reward"][ended] += 1e6
        elif what == "points":
            row["info"]["reward"] = np.where(ended, 1e6, row["info"]["reward"])
        elif what == "final image":
            row["images"][row["terminated"]] ^= 0xFF
        elif what == "final image of a cut game":
            row["images"][row["truncated"]] ^= 0xFF
        else:
            row["reward"][~ended] += 1.0

    options = '{"max_episode_steps": 10}' if "cut" in what else "{}"
    found = []
    for tampered in (False, True):
        if not tampered and (script, options) in UNTAMPERED:
            found.append(UNTAMPERED[script, options])
            continue
        with monkeypatch.context() as patch:
            recorder = Recorder(patch, script, *((tamper,) if tampered else ()))
            changes = {"num_steps": 32, "total_timesteps": 3 * 64, "env_kwargs": options}
            folder = train(script, run_dir=tmp_path / str(tampered), **changes)
        assert sum(row["reset"].sum() for row in recorder.rows) >= 3
        found.append((weights_of(folder), logs_of(folder)))
        if not tampered:
            UNTAMPERED[script, options] = found[0]
    unchanged = what in ("reward", "points", "final image")
    assert same(found[0][0], found[1][0]) == unchanged
    assert (found[0][1] == found[1][1]) == unchanged


@pytest.mark.parametrize(
    "env_id, name",
    [("Pong-v5", "Pong-v5"), ("ALE/Pong-v5", "Pong-v5"), ("PongNoFrameskip-v4", "Pong-v5"), ("BeamRider-v4", "BeamRider-v5"),
     ("SpaceInvadersDeterministic-v0", "SpaceInvaders-v5"), ("Pong", "Pong")],
)  # fmt: skip
def test_names_of_games(env_id, name):
    assert ppo.game_name(env_id) == name


# ---- The policy ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("separate", [True, False])
def test_logits_and_values_are_those_of_the_heads_on_their_trunks(separate):
    agent = ppo.Agent(5, separate).to(memory_format=torch.channels_last)
    obs = torch.randint(0, 256, (7, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        logits, values = agent.logits_and_values(obs)
        assert torch.equal(logits, agent.logits(obs))
        assert torch.allclose(logits, agent.actor_head(agent.actor_trunk(obs / 255)), atol=1e-6)
        assert torch.allclose(values, agent.critic_head(agent.critic_trunk(obs / 255))[:, 0], atol=1e-5)
        assert separate != torch.equal(agent.actor_trunk(obs / 255), agent.critic_trunk(obs / 255))


def test_logprobs_entropy_and_played_actions_are_those_of_the_softmax():
    torch.manual_seed(0)
    agent, n = ppo.Agent(4).requires_grad_(False), 5_000
    agent.actor_head.weight.normal_(std=3)
    obs = torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8)
    policy = torch.distributions.Categorical(logits=agent.logits(obs)[0])
    agent.logits = lambda images: policy.logits.expand(len(images), -1)
    expected = policy.probs.numpy()
    assert expected.max() - expected.min() > 0.1
    flat = obs.flatten(1).expand(n, -1)
    found = np.bincount(agent(flat).numpy(), minlength=4) / n
    assert (np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / n)).all()
    assert agent(obs.numpy()[0]).shape == agent(flat.numpy()[0]).shape == () and agent(obs[None]).shape == (1, 1)
    logprobs, entropy = ppo.logprob_and_entropy(policy.logits.expand(3, -1), torch.tensor([0, 1, 3]))
    assert torch.allclose(logprobs, policy.log_prob(torch.tensor([0, 1, 3])))
    assert torch.allclose(entropy, policy.entropy().expand(3))


@pytest.mark.parametrize("separate", [True, False])
def test_the_rollout_is_drawn_from_the_policy_and_its_logprobs_and_values_are_kept(separate, tmp_path, monkeypatch):
    """What the update gets, of the agent as it was then; the actions are those that the games were sent."""
    seen, recorder = {}, Recorder(monkeypatch, "ppo_atari.py")

    def spy(rewards, values, *arguments):
        local = inspect.currentframe().f_back.f_locals
        seen.update({name: local[name].clone() for name in ("obs", "actions", "logprobs", "values")})
        seen["agent"] = copy.deepcopy(local["agent"]).requires_grad_(False)
        raise ppo.BadInput("enough")

    monkeypatch.setattr(ppo, "gae", spy)
    with pytest.raises(ppo.BadInput, match="enough"):
        train("ppo_atari.py", run_dir=tmp_path, separate_trunks=separate)
    logits, values = seen["agent"].logits_and_values(seen["obs"].flatten(0, 1))
    policy = torch.distributions.Categorical(logits=logits[:-2])
    assert np.array_equal(recorder.actions, seen["actions"].numpy()) and len(seen["actions"].unique()) > 2
    assert torch.allclose(seen["logprobs"].flatten(), policy.log_prob(seen["actions"].flatten()), atol=1e-5)
    assert torch.allclose(seen["values"].flatten(), values, atol=1e-5)
    images = [row["images"] for row in recorder.rows]
    assert np.array_equal(seen["obs"][1:].numpy(), images)


# ---- Runs ------------------------------------------------------------------------------------------------------
KINDS = [
    ("ppo_atari.py", {}), ("ppo_atari.py", {"separate_trunks": True, "critic_learning_rate": 1e-3}), ("blpo_atari.py", {}),
    ("blpo_atari.py", {"ihvp": "cg", "follower": "full"}),
    *(
        pytest.param("blpo_atari.py", {"follower": name, "ihvp": ihvp}, marks=pytest.mark.full)
        for name in ("head", "last-two", "full")
        for ihvp in ("none", "nystrom")
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes", KINDS)
def test_a_run_of_each_kind(tmp_path, kind, changes):
    folder = train(kind, run_dir=tmp_path, save_model=True, total_timesteps=64, **changes)
    rows = read_csv(folder / "metrics.csv")
    assert [int(row["global_step"]) for row in rows] == [32, 64]
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert json.loads((folder / "args.json").read_text())["args"]["torch_threads"] == 1
    for row in rows:
        assert all(math.isfinite(float(row[f"losses/{name}"])) for name in ("value_loss", "policy_loss", "approx_kl"))
    if kind == "blpo_atari.py":
        corrected = [float(row["bilevel/correction_norm"]) > 0 for row in rows]
        assert all(corrected) if changes.get("ihvp") != "none" else not any(corrected)
        assert all(float(row["bilevel/fallbacks"]) == 0 for row in rows)
    module, found = load(kind), []
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), dtype=np.uint8)
    for name in ("model.pt", "checkpoint.pt"):
        agent = module.load_policy(folder / name)
        torch.manual_seed(0)
        found.append(agent(images).tolist())
    assert found[0] == found[1] and len({str(agent(images)) for _ in range(20)}) > 1  # drawn, not the most probable ones


def test_a_policy_can_be_exported(tmp_path):
    agent = ppo.load_policy(train("ppo_atari.py", run_dir=tmp_path, total_timesteps=32) / "checkpoint.pt")
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(agent, (torch.zeros(2, 4, 84, 84, dtype=torch.uint8),), dynamic_shapes=dynamic)
    actions = program.module()(torch.zeros(50, 4, 84, 84, dtype=torch.uint8))
    assert actions.shape == (50,) and set(actions.tolist()) == {0, 1, 2, 3}


class Small(nn.Sequential):
    """Another trunk: other layers, another activation, another width, dropout."""

    def __init__(self):
        layers = [nn.Conv2d(4, 3, 16, stride=8), nn.SiLU(), nn.Flatten(), nn.Linear(243, 9), nn.LayerNorm(9), nn.Tanh()]
        super().__init__(*layers, nn.Linear(9, 5), nn.SiLU())


@pytest.mark.parametrize("follower", ["head", "last-two", "full"])
def test_another_network_trains(tmp_path, monkeypatch, follower):
    monkeypatch.setattr(blpo, "nature_cnn", Small)
    folder = train("blpo_atari.py", run_dir=tmp_path, follower=follower, ihvp="nystrom", total_timesteps=32)
    (row,) = read_csv(folder / "metrics.csv")
    assert float(row["bilevel/correction_norm"]) > 0 and row["bilevel/fallbacks"] == "0.0"


def test_a_critic_whose_derivatives_do_not_hold_is_refused(tmp_path, monkeypatch):
    twice = nn.Linear(4, 4)
    monkeypatch.setattr(blpo, "nature_cnn", lambda: nn.Sequential(nn.Flatten(), nn.Linear(28224, 4), twice, nn.Tanh(), twice))
    with pytest.raises(blpo.BadInput, match="the critic's derivatives do not hold"):
        train("blpo_atari.py", run_dir=tmp_path, follower="full")


def test_the_nested_control_is_a_correction_of_zero(tmp_path, monkeypatch):
    run = functools.partial(train, "blpo_atari.py", total_timesteps=64)
    nested, bilevel = (run(run_dir=tmp_path / name, ihvp=name) for name in ("none", "nystrom"))
    original = blpo.nystrom_ihvp
    monkeypatch.setattr(blpo, "nystrom_ihvp", lambda *system: tuple(0 * x for x in original(*system)))
    zero = run(run_dir=tmp_path / "zero")
    assert same(weights_of(nested), weights_of(zero)) and not same(weights_of(nested), weights_of(bilevel))
    monkeypatch.setattr(blpo, "nystrom_ihvp", lambda *system: tuple(math.nan * x for x in original(*system)))
    broken = run(run_dir=tmp_path / "broken")
    assert same(weights_of(nested), weights_of(broken))
    assert {float(row["bilevel/fallbacks"]) for row in read_csv(broken / "metrics.csv")} == {2.0}  # every epoch


@pytest.mark.full
def test_each_argument_of_the_algorithm_matters(tmp_path):
    changes = [
        {}, {"follower": "last-two"}, {"follower": "full"}, {"damping": 1e-4}, {"nested_updates": 2}, {"norm_adv": False},
        {"trunk_learning_rate": 1e-3}, {"critic_learning_rate": 2e-3}, {"learning_rate": 1e-3},
        {"nystrom_rank": 1}, {"gamma": 0.9}, {"ent_coef": 0.1}, {"repeat_action_probability": 0.9},
        {"episodic_life": False}, {"mixed_discount": 0.5}, {"ihvp": "cg", "cg_iterations": 1}, {"num_minibatches": 1},
    ]  # fmt: skip
    found = [
        weights_of(train("blpo_atari.py", run_dir=tmp_path / str(i), num_steps=32, total_timesteps=64, seed=5, **change))
        for i, change in enumerate(changes)
    ]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])


def test_a_run_repeats_bitwise_and_a_seed_matters(script, tmp_path):
    changes = {"total_timesteps": 64, "num_minibatches": 1}
    folders = [train(script, run_dir=tmp_path / str(i), seed=seed, **changes) for i, seed in enumerate((3, 3, 4))]
    assert same(*map(weights_of, folders[:2])) and not same(weights_of(folders[0]), weights_of(folders[2]))
    assert logs_of(folders[0]) == logs_of(folders[1]) != logs_of(folders[2])


class Fire(nn.Module):
    """Fires in every fourth step, and moves to the right in the others."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, obs):
        self.steps += 1
        return torch.tensor(1 if self.steps % 4 == 0 else 2)


def test_play_returns_the_points_of_whole_games():
    """Against the score in the game's memory when EnvPool says that the game is over, some lives later."""
    args, agent, scores, lives = ppo.Args(env_threads=1), Fire(), [], 0
    gym.registry[args.env_id] = gym.envs.registration.EnvSpec(args.env_id, functools.partial(ppo.Game, args))
    for episode in range(2):
        envs, over = ppo.make_envs(args, 1, ppo.derived_seed(args.seed, 2**40 + episode)), False
        envs.reset()
        while not over:
            _, _, terminated, _, info = envs.step(np.array([int(agent(None))]))
            over, lives = info["terminated"][0], lives + terminated[0]
        scores.append(float(score_in_memory(info["ram"][0])))
    assert lives == 10 and sum(scores) > 0
    assert ppo.play(Fire(), args, 2) == scores


@pytest.mark.full
def test_playing_leaves_the_training_as_it_is_and_a_game_can_be_filmed(script, tmp_path):
    plain = train(script, run_dir=tmp_path / "plain", total_timesteps=32)
    folder = train(script, run_dir=tmp_path / "played", total_timesteps=32, eval_episodes=1, capture_video=True)
    assert same(weights_of(plain), weights_of(folder)) and not (folder / "model.pt").exists()
    assert [path.suffix for path in (folder / "videos").iterdir()] == [".mp4"]


# ---- Folder and resume -----------------------------------------------------------------------------------------
class Still:
    """A game without a memory: the image never changes, nothing ends, and an action wins its number, less one."""

    action_space = gym.spaces.Discrete(4)

    def reset(self):
        return np.arange(2 * 4 * 84 * 84, dtype=np.uint64).astype(np.uint8).reshape(2, 4, 84, 84), {}

    def step(self, actions):
        never, reward = np.zeros(2, bool), (actions - 1.0).astype(np.float32)
        return self.reset()[0], reward, never, never, {"reward": reward, "terminated": np.zeros(2, np.int32)}

    def close(self):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_equals_a_run_without_interruption(script, tmp_path, monkeypatch, number):
    """Where the game has nothing to remember: everything that a run holds is in its checkpoint."""
    monkeypatch.setattr(load(script), "make_envs", lambda *settings: Still())
    whole = train(script, run_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        after_iteration(patch, script, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            train(script, run_dir=tmp_path / "parts", checkpoint_every=1000)
    assert stop.value.code == 128 + number
    folder = next((tmp_path / "parts").iterdir())
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    resume(script, folder, "--checkpoint-every", "1")
    assert logs_of(folder) == logs_of(whole) and len(logs_of(whole)[0]) == 4
    first, second = (torch.load(each / "checkpoint.pt", weights_only=True) for each in (whole, folder))
    assert same(first["agent"], second["agent"]) and first["global_step"] == second["global_step"] == 128
    assert torch.equal(first["rng"], second["rng"])


def test_a_finished_run_is_extended_and_replayed(script, tmp_path, capsys):
    folder = train(script, run_dir=tmp_path, total_timesteps=64, env_kwargs='{"max_episode_steps": 20}')
    assert resume(script, folder, "--total-timesteps", "96", "--eval-episodes", "1") == folder
    assert "--total-timesteps was 64 and is now 96" in capsys.readouterr().err
    assert [int(row["global_step"]) for row in read_csv(folder / "metrics.csv")] == [32, 64, 96]
    before = weights_of(folder)
    resume(script, folder, "--eval-episodes", "2")
    assert len(json.loads((folder / "result.json").read_text())["eval_returns"]) == 2 and same(before, weights_of(folder))
    content = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(load(script).BadInput, match="networks of another shape"):  # another game's actions
        resume(script, folder, "--env-id", "Pong-v5")
    assert content == {path: path.read_bytes() for path in folder.iterdir()}


def test_divergence_stops_the_run_with_one_sentence(script, tmp_path):
    module = load(script)
    with pytest.raises(module.Diverged, match="the (weights|losses) stopped being finite by step 32"):
        train(script, run_dir=tmp_path, learning_rate=1e38)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "diverged"
    assert not (folder / "checkpoint.pt").exists()  # only a good one is written


@pytest.mark.full
def test_two_resumes_agree_and_play_other_games_than_the_start(script, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("pulled the plug")

    for name in ("first", "second"):
        with monkeypatch.context() as patch:
            after_iteration(patch, script, 3, fail)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                train(script, run_dir=tmp_path / name)
    folders = [next((tmp_path / name).iterdir()) for name in ("first", "second")]
    assert json.loads((folders[0] / "result.json").read_text())["status"] == "failed"
    assert torch.load(folders[0] / "checkpoint.pt", weights_only=True)["global_step"] == 64
    seeds, original = [], load(script).make_envs
    monkeypatch.setattr(load(script), "make_envs", lambda *s: seeds.append(s[2]) or original(*s))
    for folder in folders:
        resume(script, folder)
        assert [int(row["global_step"]) for row in read_csv(folder / "metrics.csv")] == [32, 64, 96, 128]
        assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert same(*map(weights_of, folders)) and logs_of(folders[0]) == logs_of(folders[1])
    assert seeds[0] == seeds[1] != 1


# ---- Bad input -------------------------------------------------------------------------------------------------
BAD = [
    ({"env_id": "Pongg-v5"}, "--env-id 'Pongg-v5' cannot be made"), ({"env_id": "Hopper-v4"}, "Hopper-v4"), ({"env_id": ""}, "--env-id"),
    ({"env_kwargs": '{"what": 1}'}, "'what'"), ({"env_kwargs": '{"batch_size": 1}'}, "'batch_size'"), ({"env_kwargs": '{"stack_num": 3}'}, "this script needs (4, 84, 84)"),
    ({"env_kwargs": "[]"}, "--env-kwargs"), ({"total_timesteps": 10}, "less than one rollout of 32"),
    ({"num_minibatches": 7}, "--num-minibatches 7"), ({"num_steps": 2**30, "total_timesteps": 2**40}, "a rollout may have 500,000"),
    ({"repeat_action_probability": 1.5}, "--repeat-action-probability is"),
]  # fmt: skip
BAD_BLPO = [
    ({"damping": 0.0}, "--damping is"), ({"mixed_discount": 1.1}, "--mixed-discount is"), ({"nystrom_rank": 10_000}, "--nystrom-rank is"),
    ({"follower": "full", "num_steps": 10_001, "total_timesteps": 20_002}, "at most 20,000 rows"),
    ({"follower": "last-two", "num_steps": 16_384, "total_timesteps": 32_768, "nystrom_rank": 256}, "may be 2,000,000,000"),
]  # fmt: skip


@pytest.mark.parametrize("script, changes, named", [(script, *bad) for script in SCRIPTS for bad in BAD]
                         + [("blpo_atari.py", *bad) for bad in BAD_BLPO])  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(script, capsys, tmp_path, changes, named):
    module = load(script)
    with pytest.raises(module.BadInput) as refusal:
        train(script, run_dir=tmp_path / "runs", **changes)
    assert named in str(refusal.value) and "\n" not in str(refusal.value)
    assert capsys.readouterr().err == "" and not (tmp_path / "runs").exists()


def test_without_envpool_it_is_said_in_one_sentence(script, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(load(script).BadInput, match="cannot be made: ModuleNotFoundError: .*envpool"):
        train(script, run_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_bad_input_from_the_shell(command_line, script, tmp_path):
    status, _, err = command_line(script, *words(script, run_dir=tmp_path / "runs", num_minibatches=7))
    assert_one_sentence(status, err, "--num-minibatches 7")
    assert not (tmp_path / "runs").exists()


def test_help_shows_every_argument_in_80_columns(command_line, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = command_line(script, "--help")
    assert status in (0, None) and err == ""
    assert max(map(len, out.partition("--exp-name")[2].splitlines())) <= 80
    for name in load(script).Args.model_fields:
        assert re.search(rf"--{name.replace('_', '-')}\b", out), name
