"""ppo_atari.py and blpo_atari.py as programs: what a row of a real game means, run folder, resume, bad input, shared blocks."""

import dataclasses
import functools
import inspect
import json
import math
import os
import re
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import after_iteration, load, read_csv, without_time
from test_command_line import assert_one_sentence, ends, flag, numbers
from test_shared_blocks import (
    blocks, differing, test_docstring_names_a_command_that_runs_this_script as check_command,
    test_every_public_function_and_class_has_a_docstring as check_docstrings, test_no_script_imports_another as check_imports,
)  # fmt: skip

import blpo_atari as blpo
import ppo_atari as ppo

SCRIPTS = ["ppo_atari.py", "blpo_atari.py"]
TINY = {
    "env_id": "Breakout-v5", "num_envs": 2, "num_steps": 16, "total_timesteps": 4 * 32, "num_minibatches": 2,
    "update_epochs": 2, "checkpoint_every": 1, "device": "cpu", "env_threads": 1, "torch_threads": 1,
}  # fmt: skip
TINY_BLPO = {"chunk_length": 8, "nystrom_rank": 3}


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
        argv += [flag(name) if value else flag(f"no_{name}")] if isinstance(value, bool) else [flag(name), str(value)]
    return argv


def train(script, **changes):
    """A tiny run in this process; returns its folder."""
    module = load(script)
    return module.train(module.parse_args(module.Args, words(script, **changes)))


def resume(script, folder, *words):
    module = load(script)
    return module.train(module.parse_args(module.Args, ["--resume", str(folder), *words]))


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logs_of(folder) -> list:
    return [without_time(read_csv(folder / name)) for name in ("metrics.csv", "episodes.csv")]


class Recorder:
    """Games whose rows are kept, and may be tampered with; `options` go to EnvPool as well."""

    def __init__(self, monkeypatch, script, tamper=lambda ended, row: None, **options):
        self.rows, self.actions, self.tamper = [], [], tamper
        original = load(script).make_envs
        monkeypatch.setattr(load(script), "make_envs", lambda *settings: self.wrap(*original(*settings, **options)))

    def wrap(self, envs, num_actions):
        self.envs, self.ended = envs, np.zeros(envs.num_envs if hasattr(envs, "num_envs") else TINY["num_envs"], bool)
        return self, num_actions

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
    envs, num_actions = ppo.make_envs("Breakout-v5", 4, 3)
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
    envs, num_actions = ppo.make_envs("SpaceInvaders-v5", 2, 1)
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
            recorder = Recorder(patch, script, max_episode_steps=10)
            folder = train(script, run_dir=tmp_path / str(bootstrap), env_id="Pong-v5", bootstrap_truncation=bootstrap)
        assert any(row["truncated"].any() for row in recorder.rows)
        assert {row["episodic_length"] for row in read_csv(folder / "episodes.csv")} == {"10"}
        found.append(weights_of(folder))
    assert not same(*found)


UNTAMPERED = {}  # (script, options): weights and logs, so that this run is made once


@pytest.mark.parametrize("what", ["reward", "points", "final image", "meaningful reward", "final image of a cut game"])
def test_reset_rows_influence_nothing(script, tmp_path, monkeypatch, what):
    """Reward and points of the row after an end, and the image that an ended life leaves (with it, the action and the
    log-probability that the policy gives there): no weight and no log changes. The last two show that others do."""

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

    options = {"max_episode_steps": 10} if "cut" in what else {}
    found = []
    for tampered in (False, True):
        if not tampered and (script, *options) in UNTAMPERED:
            found.append(UNTAMPERED[script, *options])
            continue
        with monkeypatch.context() as patch:
            recorder = Recorder(patch, script, *((tamper,) if tampered else ()), **options)
            folder = train(script, run_dir=tmp_path / str(tampered), num_steps=32, total_timesteps=3 * 64)
        assert sum(row["reset"].sum() for row in recorder.rows) >= 3
        found.append((weights_of(folder), logs_of(folder)))
        if not tampered:
            UNTAMPERED[script, *options] = found[0]
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
def test_rollout_keeps_the_values_and_logprobs_of_the_agent(separate):
    torch.manual_seed(0)
    agent = ppo.Agent(5, separate).to(memory_format=torch.channels_last)
    obs = torch.randint(0, 256, (7, 3, 84, 84, 4), dtype=torch.uint8)
    with torch.no_grad():
        agent.actor_head.weight.normal_()
        behaviour = ppo.BehaviourPolicy(agent, obs)
        behaviour.begin()
        sent = np.stack([behaviour.act(t) for t in range(6)])
        images = ppo.pixels(obs.flatten(0, 1))
        policy = torch.distributions.Categorical(logits=agent.actor_head(agent.actor_trunk(images[:-3])))
        values = agent.critic_head(agent.critic_trunk(images)).view(7, 3)
    assert np.array_equal(sent, behaviour.actions.numpy()) and len(np.unique(sent)) > 2
    assert torch.allclose(behaviour.logprobs().flatten(), policy.log_prob(behaviour.actions.flatten()), atol=1e-5)
    assert torch.allclose(behaviour.values(), values, atol=1e-5)
    assert separate != torch.equal(agent.actor_trunk(images), agent.critic_trunk(images))


def test_samples_logprobs_and_entropy_are_those_of_the_softmax():
    torch.manual_seed(0)
    agent, n = ppo.Agent(4, True), 20_000
    features = torch.randn(1, 6)
    with torch.no_grad():
        agent.actor_head.weight.normal_(std=0.5)
        policy = torch.distributions.Categorical(logits=agent.actor_head(features)[0])
        agent.actor_trunk.forward = lambda images: features.expand(len(images), -1)
        behaviour = ppo.BehaviourPolicy(agent, torch.zeros(2, n, 1, 1, 4, dtype=torch.uint8))
        behaviour.begin()
        found = np.bincount(behaviour.act(0), minlength=4) / n
        weights = torch.tensor([0.5, 0.2, 0.3])
        logprobs, entropy = agent.logprob_and_entropy(features.expand(3, -1), torch.tensor([0, 1, 3]), weights)
    expected = policy.probs.numpy()
    assert expected.max() - expected.min() > 0.1
    assert (np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / n)).all()
    assert torch.allclose(logprobs, policy.log_prob(torch.tensor([0, 1, 3]))) and torch.allclose(entropy, policy.entropy())


# ---- Runs ------------------------------------------------------------------------------------------------------
KINDS = [
    ("ppo_atari.py", {}), ("ppo_atari.py", {"separate_trunks": True, "critic_learning_rate": 1e-3}),
    *(("blpo_atari.py", {"follower": name, "ihvp": ihvp}) for name in ("head", "last-two", "full") for ihvp in ("exact", "none")),
    ("blpo_atari.py", {"ihvp": "nystrom"}), ("blpo_atari.py", {"ihvp": "cg", "follower": "full"}),
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
    module = load(kind)
    policy = module.load_policy(folder / "model.pt")
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), dtype=np.uint8)
    agent = module.Agent(4, kind == "blpo_atari.py" or "separate_trunks" in changes)
    agent.load_state_dict(weights_of(folder))
    with torch.no_grad():
        logits = agent.actor_head(agent.actor_trunk(torch.from_numpy(images) / 255))
    assert policy(images, greedy=True).tolist() == logits.argmax(-1).tolist()
    assert len(np.unique([policy(images) for _ in range(20)])) > 1  # drawn, not the most probable ones


def test_the_nested_control_is_a_correction_of_zero(tmp_path, monkeypatch):
    nested, bilevel = (train("blpo_atari.py", run_dir=tmp_path / name, ihvp=name) for name in ("none", "exact"))
    original = blpo.exact_ihvp
    monkeypatch.setattr(blpo, "exact_ihvp", lambda *system: tuple(0 * x for x in original(*system)))
    zero = train("blpo_atari.py", run_dir=tmp_path / "zero")
    assert same(weights_of(nested), weights_of(zero)) and not same(weights_of(nested), weights_of(bilevel))
    monkeypatch.setattr(blpo, "exact_ihvp", lambda *system: tuple(math.nan * x for x in original(*system)))
    broken = train("blpo_atari.py", run_dir=tmp_path / "broken")
    assert same(weights_of(nested), weights_of(broken))
    assert {float(row["bilevel/fallbacks"]) for row in read_csv(broken / "metrics.csv")} == {4.0}  # every minibatch


@pytest.mark.full
def test_each_argument_of_the_algorithm_matters(tmp_path):
    changes = [
        {}, {"follower": "last-two"}, {"follower": "full"}, {"damping": 1e-4}, {"nested_updates": 2}, {"norm_adv": False},
        {"trunk_learning_rate": 1e-3}, {"critic_learning_rate": 2e-3}, {"learning_rate": 1e-3}, {"chunk_length": 4},
        {"ihvp": "nystrom", "nystrom_rank": 1}, {"gamma": 0.9}, {"ent_coef": 0.1}, {"repeat_action_probability": 0.9},
        {"episodic_life": False},
    ]  # fmt: skip
    found = [
        weights_of(train("blpo_atari.py", run_dir=tmp_path / str(i), num_steps=32, total_timesteps=64, seed=5, **change))
        for i, change in enumerate(changes)
    ]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])


def test_a_run_repeats_bitwise_and_a_seed_matters(script, tmp_path):
    folders = [train(script, run_dir=tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert same(*map(weights_of, folders[:2])) and not same(weights_of(folders[0]), weights_of(folders[2]))
    assert logs_of(folders[0]) == logs_of(folders[1]) != logs_of(folders[2])


@pytest.mark.full
def test_evaluation_plays_whole_games_and_leaves_the_training_as_it_is(script, tmp_path, monkeypatch):
    plain = train(script, run_dir=tmp_path / "plain", total_timesteps=32)
    over = np.zeros(6, bool)

    def next_games_win(ended, row):
        """What is won after the first game of the evaluation is no part of its return."""
        if len(row["reward"]) == 6:
            row["info"]["reward"] = np.where(over, 1000.0, row["info"]["reward"])
            over[:] |= row["info"]["terminated"] != 0

    with monkeypatch.context() as patch:
        recorder = Recorder(patch, script, next_games_win)
        folder = train(script, run_dir=tmp_path / "evaluated", total_timesteps=32, eval_episodes=6)
    assert same(weights_of(plain), weights_of(folder)) and not (folder / "model.pt").exists()
    returns = json.loads((folder / "result.json").read_text())["eval_returns"]
    expected, running = np.zeros(6), np.ones(6, bool)
    for row in recorder.rows[16:]:
        for index in np.flatnonzero(running & (row["info"]["terminated"] != 0)):
            expected[index], running[index] = score_in_memory(row["info"]["ram"][index]), False
    assert returns == expected.tolist() and not running.any() and len(set(returns)) > 1


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
    monkeypatch.setattr(load(script), "make_envs", lambda *settings: (Still(), 4))
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
    assert torch.equal(first["rng"]["torch"], second["rng"]["torch"])


@pytest.mark.full
def test_two_resumes_agree_and_play_other_games_than_the_start(script, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("pulled the plug")

    for copy in ("first", "second"):
        with monkeypatch.context() as patch:
            after_iteration(patch, script, 3, fail)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                train(script, run_dir=tmp_path / copy)
    folders = [next((tmp_path / copy).iterdir()) for copy in ("first", "second")]
    assert json.loads((folders[0] / "result.json").read_text())["status"] == "failed"
    assert torch.load(folders[0] / "checkpoint.pt", weights_only=True)["global_step"] == 64
    seeds, original = [], load(script).make_envs
    monkeypatch.setattr(load(script), "make_envs", lambda *s: seeds.append(s[2]) or original(*s))
    for folder in folders:
        resume(script, folder)
        assert [int(row["global_step"]) for row in read_csv(folder / "metrics.csv")] == [32, 64, 96, 128]
        assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert same(*map(weights_of, folders)) and logs_of(folders[0]) == logs_of(folders[1])
    assert seeds[0] == seeds[1] != load(script).Args.seed
    with pytest.raises(load(script).BadInput, match="nothing left to do"):
        resume(script, folders[0])


# ---- Bad input -------------------------------------------------------------------------------------------------
def test_every_number_states_its_interval_and_is_refused_outside(script, monkeypatch):
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    module, found = load(script), numbers(script)
    module.check_ranges(module.Args())
    assert {"gamma", "torch_threads", "repeat_action_probability"} <= found.keys()
    for name, (annotation, interval) in found.items():
        assert interval is not None, name
        outside, inside = ends(annotation, interval)
        for value in [*outside, math.nan]:
            with pytest.raises(module.BadInput, match=re.escape(f"{flag(name)} is {value}, it must be in")):
                module.check_ranges(dataclasses.replace(module.Args(), **{name: value}))
        for value in inside:
            module.check_ranges(dataclasses.replace(module.Args(), **{name: value}))


BAD = [
    ({"env_id": "Pongg-v5"}, "Pong-v5"), ({"env_id": "ALE/Breakot-v5"}, "Breakout-v5"), ({"env_id": "Hopper-v4"}, "Hopper-v4"),
    ({"env_id": ""}, "--env-id"), ({"total_timesteps": 10}, "at least 32"), ({"num_minibatches": 7}, "--num-minibatches 7"),
    ({"bf16": True}, "--bf16"), ({"num_steps": 2**30, "total_timesteps": 2**40}, "--num-steps 1073741824"),
]  # fmt: skip
BAD_BLPO = [
    ({"damping": 0.0}, "--damping is 0.0"), ({"chunk_length": 5}, "--chunk-length 5"),
    ({"ihvp": "nystrom", "nystrom_rank": 8}, "8 is more than the 7 parameters"),
    ({"ihvp": "nystrom", "follower": "last-two", "nystrom_rank": 1484}, "1483 parameters"),
]  # fmt: skip


@pytest.mark.parametrize("script, changes, named", [(script, *bad) for script in SCRIPTS for bad in BAD]
                         + [("blpo_atari.py", *bad) for bad in BAD_BLPO])  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(script, capsys, tmp_path, changes, named):
    module = load(script)
    with pytest.raises(module.BadInput) as refusal:
        train(script, run_dir=tmp_path / "runs", **changes)
    assert_one_sentence(2, f"error: {refusal.value}\n", named)
    assert capsys.readouterr().err == "" and not (tmp_path / "runs").exists()


def test_bad_input_from_the_shell(command_line, script, tmp_path):
    status, _, err = command_line(script, *words(script, run_dir=tmp_path / "runs", env_id="Pongg-v5"))
    assert_one_sentence(status, err, "Pong-v5")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, named", [(["--follower", "tail"], "--follower"), (["--ihvp", "magic"], "--ihvp")])
def test_words_that_cannot_be_parsed(command_line, tmp_path, words, named):
    status, _, err = command_line("blpo_atari.py", "--run-dir", tmp_path / "runs", *words)
    assert status == 2 and named in err and "Traceback" not in err and not (tmp_path / "runs").exists()


def test_help_shows_every_argument_and_its_line(command_line, script):
    status, out, err = command_line(script, "--help")
    assert status in (0, None) and err == ""
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for field in dataclasses.fields(load(script).Args):
        assert re.search(rf"{flag(field.name)}\b", shown), field.name
    assert all(interval[0] in shown for _, interval in numbers(script).values())


def test_envpool_not_installed(script, monkeypatch):
    monkeypatch.setattr(load(script), "envpool", None)
    with pytest.raises(load(script).BadInput, match="needs EnvPool"):
        load(script).make_envs("Pong-v5", 1, 0)


def test_compile_without_a_compiler(script, monkeypatch):
    module = load(script)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(module.BadInput, match="--compile needs a C\\+\\+ compiler"):
        module.check_machine(dataclasses.replace(module.Args(), compile=True, device="cpu"))


# ---- Memory of the hypergradient -------------------------------------------------------------------------------
def test_memory_of_rank_q_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
    """12 bytes for each of q columns and each parameter; a head's columns fit where those of the full critic do not."""
    monkeypatch.undo()  # the real network
    monkeypatch.setattr(blpo, "available_memory", lambda device: 150_000_000)
    monkeypatch.setattr(blpo, "Run", lambda *arguments: pytest.fail("the run began"))
    changes = {"run_dir": tmp_path / "runs", "ihvp": "nystrom", "nystrom_rank": 10}
    with pytest.raises(blpo.BadInput) as refusal:
        train("blpo_atari.py", follower="full", **changes)
    message = str(refusal.value)
    assert "--nystrom-rank 10 with --follower full takes rank x 1684641 parameters x 12 bytes = 0.20 GB" in message
    assert "0.15 GB of memory are free" in message and "--follower head" in message
    assert not (tmp_path / "runs").exists()
    with pytest.raises(pytest.fail.Exception, match="the run began"):
        train("blpo_atari.py", follower="head", **changes)
    free = iter([150_000_000, 100])  # for the images, and then for the solve
    monkeypatch.setattr(blpo, "available_memory", lambda device: next(free))
    with pytest.raises(blpo.BadInput, match="0.00 GB for their kernel, but 0.00 GB of memory are free"):
        train("blpo_atari.py", follower="head", **changes | {"ihvp": "exact"})


def peak_bytes(call) -> int:
    """The most that `call` holds above what was held before, from the allocations that the profiler records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    sizes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(np.cumsum([event.nbytes() for event in sorted(sizes, key=lambda event: event.start_ns())]))


@pytest.mark.parametrize("name, rank", [("last-two", 20), ("full", 8), ("full", 0)])
def test_memory_that_is_stated_is_what_it_takes(name, rank, monkeypatch):
    """Within the networks' own activations, which are no part of it."""
    monkeypatch.undo()
    below, follower = blpo.split_critic(blpo.Agent(4, True), name)
    inputs = below(torch.rand(12, 4, 84, 84)).detach()
    u, generator = torch.randn(12), torch.Generator()

    def hypergradient():
        curvature = blpo.GaussNewton(blpo.CriticJacobian(follower, inputs), torch.full((12,), 1 / 12))
        if rank:
            blpo.nystrom_ihvp(curvature, u, 1.0, rank, generator)
        else:
            curvature.jacobian.gradients  # noqa: B018

    hypergradient()
    stated, activations = sum(blpo.hypergradient_memory(follower, 12, rank)), 12 * 4 * (2 * 12800 + 4 * 5184 + 4 * 3136)
    vectors = 12 * sum(parameter.numel() for parameter in follower.parameters()) if rank else 0  # b, v and a copy
    assert 0.7 * stated < peak_bytes(hypergradient) < 1.1 * stated + activations + vectors


# ---- Shared blocks ---------------------------------------------------------------------------------------------
def test_ppo_and_blpo_differ_in_these_blocks_and_no_other():
    assert differing(*SCRIPTS) == {
        "Docstring", "Arguments", "PPO's value loss", "Bilevel mathematics on Atari", "Batch shape",
        "Networks and optimisers", "Update",
    }  # fmt: skip
    first, second = ([name for name in blocks(each)] for each in SCRIPTS)
    assert [name for name in first if name in second] == [name for name in second if name in first]


def test_the_script_documents_itself_and_stands_alone(script):
    check_docstrings(script)
    check_command(script)
    check_imports(script)
