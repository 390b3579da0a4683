"""sobirl_rlhf_atari.py as a program: what pixels, lives and games mean, runs of every kind, games that can be copied, resume, bad
input. The networks have few channels, the games are the real ones."""

import functools
import inspect
import json
import math
import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from conftest import after_iteration, read_csv, without_time
from test_command_line import assert_one_sentence

import sobirl_rlhf_atari as rlhf

SCRIPT = "sobirl_rlhf_atari.py"
TINY = {
    "env_id": "SpaceInvaders-v5", "num_envs": 2, "num_steps": 40, "total_timesteps": 240, "learning_starts": 80,
    "batch_size": 6, "buffer_size": 150, "fragment_length": 4, "queue_size": 40, "warmup_pairs": 12, "warmup_epochs": 2,
    "pairs_per_iteration": 4, "reward_batch_size": 8, "heldout_pairs": 6, "checkpoint_every": 1, "target_frequency": 50,
    "train_frequency": 8, "device": "cpu", "torch_threads": 1, "env_threads": 1, "seed": 6,
}  # fmt: skip
GYMNASIUM = {"env_backend": "gymnasium", "num_envs": 1, "num_steps": 60, "total_timesteps": 180, "learning_starts": 60}
WAYS = {
    "sobirl": {},
    "sobirl queue": {"implicit_pairs": "queue", "baseline": False},
    "sobirl rollouts": GYMNASIUM | {"implicit": "rollouts", "rollouts": 2, "rollout_length": 3},
    "sobirl permuted": {"permute_cross_entropy": True},
    "drlhf": {"reward_update": "drlhf"},
    "pbrl": {"reward_update": "pbrl-style", "rollout_length": 5, "rollouts": 2},
    "hpgd": GYMNASIUM | {"reward_update": "hpgd-style", "gamma": 0.7},
    "ground-truth": {"reward_update": "ground-truth", "bf16": True},
    "constant": {"reward_update": "constant"},
    "frozen": {"reward_update": "frozen"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_channels(monkeypatch):
    """Networks with few channels, so that a run takes a second."""
    made = rlhf.RewardNetwork.__init__
    monkeypatch.setattr(rlhf, "nature_cnn", functools.partial(rlhf.nature_cnn, channels=(3, 4, 5), width=6))
    monkeypatch.setattr(rlhf.RewardNetwork, "__init__", functools.partialmethod(made, channels=2))
    yield
    torch.set_num_threads(1)


def words(**changes) -> list[str]:
    """The command line of a tiny run."""
    argv = []
    for name, value in (TINY | changes).items():
        flag = name.replace("_", "-")
        argv += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return argv


def train(**changes):
    """A tiny run in this process; returns its folder."""
    if changes.get("env_backend") == "gymnasium":
        pytest.importorskip("ale_py")
    return rlhf.train(rlhf.parse_args(words(**changes)))


def resume(folder, *more):
    return rlhf.train(rlhf.parse_args(["--resume", str(folder), *more]))


def flat(state) -> list[torch.Tensor]:
    """The tensors in nested dictionaries and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for part in parts for tensor in flat(part)]


def states_of(folder) -> list[dict]:
    """Agent, tracker, reward networks, replay and optimisers of the last checkpoint."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    names = ["agent", "tracker", "reward", "replay", *sorted(name for name in checkpoint if name.startswith("optimiser"))]
    return [checkpoint[name] for name in names]


def learned(folder) -> list[torch.Tensor]:
    """All networks of the last checkpoint, optimisers and replay."""
    return flat(states_of(folder))


def same(first, second) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


# ---- Runs of every kind ----------------------------------------------------------------------------------------
SLOW = ("sobirl queue", "sobirl permuted", "constant", "frozen", "hpgd")


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.full) if way in SLOW else way for way in WAYS])
def test_a_run_of_each_kind(tmp_path, way):
    changes = WAYS[way]
    folder = train(run_dir=tmp_path, **changes)
    rows = read_csv(folder / "metrics.csv")
    assert len(rows) == 3 and json.loads((folder / "result.json").read_text())["status"] == "finished"
    asks, learns = changes.get("reward_update", "sobirl") in rlhf.LEARNED, [False, True, True]
    assert [float(row["bilevel/labels"]) for row in rows] == ([12, 16, 20] if asks else [0] * 3)
    for name in ("qf_loss", "actor_loss", "entropy"):
        assert [row[f"losses/{name}"] != "" and math.isfinite(float(row[f"losses/{name}"])) for row in rows] == learns
    assert [row["losses/cross_entropy"] != "" for row in rows] == [asks] * 3
    adds = way.startswith(("sobirl", "hpgd", "pbrl"))
    assert [float(row["bilevel/implicit_weight"]) > 0 for row in rows] == [adds and each for each in learns]
    assert (float(rows[-1]["bilevel/simulator_steps"]) > 0) == ("rollouts" in way or way in ("hpgd", "pbrl"))
    opinion = way not in ("ground-truth", "constant")
    assert all((row["bilevel/heldout_cross_entropy"] != "") == opinion for row in rows)


@pytest.mark.parametrize("game", ["BeamRider-v5", "Seaquest-v5", "SpaceInvaders-v5"])
def test_a_short_run_on_each_game_of_the_paper(tmp_path, game):
    """Saved, played, and continued past its end."""
    folder = train(run_dir=tmp_path, env_id=game, total_timesteps=160, save_model=True)
    policy = rlhf.load_policy(folder / "model.pt")
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), dtype=np.uint8)
    actions = {"BeamRider-v5": 9, "Seaquest-v5": 18, "SpaceInvaders-v5": 6}[game]
    assert policy.actor(torch.zeros(1, 4, 84, 84)).shape == (1, actions) and policy(images).shape == (3,)
    assert len(read_csv(resume(folder, "--total-timesteps", "240") / "metrics.csv")) == 3


def test_the_kinds_differ_and_a_run_repeats_bitwise(tmp_path):
    ways = {way: WAYS[way] for way in ("sobirl", "drlhf", "frozen", "sobirl queue")} | {"again": {}}
    found = {way: learned(train(run_dir=tmp_path / way, **changes)) for way, changes in ways.items()}
    assert same(found.pop("again"), found["sobirl"])
    names = list(found)
    assert not any(same(found[a], found[b]) for i, a in enumerate(names) for b in names[:i])
    logs = [read_csv(next((tmp_path / way).iterdir()) / "metrics.csv") for way in ("sobirl", "again")]
    assert without_time(logs[0]) == without_time(logs[1])


@pytest.mark.full
def test_each_argument_of_the_algorithm_matters(tmp_path):
    changes = [
        {}, {"gamma": 0.9}, {"batch_size": 5}, {"learning_starts": 320}, {"learning_rate": 1e-3}, {"anneal_steps": 1000.0},
        {"train_frequency": 4}, {"target_frequency": 20}, {"autotune": False}, {"alpha": 0.5}, {"buffer_size": 161},
        {"target_entropy": 0.2}, {"reward_bound": "clip"}, {"reward_dropout": 0.1}, {"reward_learning_rate": 1e-2},
        {"reward_batch_size": 5}, {"reward_epochs": 2}, {"fragment_length": 3}, {"queue_size": 10}, {"warmup_pairs": 10},
        {"warmup_epochs": 1}, {"pairs_per_iteration": 3}, {"label_budget": 14}, {"implicit_starts": 320}, {"baseline": False},
        {"max_inverse_temperature": 0.5}, {"max_gradient_ratio": 1e-4}, {"implicit_pairs": "queue"}, {"episodic_life": False},
        {"repeat_action_probability": 0.9}, {"bf16": True},
    ]  # fmt: skip
    small = {"env_id": "Breakout-v5", "num_steps": 80, "total_timesteps": 480, "learning_starts": 160, "buffer_size": 300}
    found = [learned(train(run_dir=tmp_path / str(i), **small | change)) for i, change in enumerate(changes)]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])


# ---- Pixels ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("twice", [False, True])
def test_pixels_are_scaled_once_wherever_a_network_sees_them(tmp_path, monkeypatch, twice):
    """Actor, critics and target critics (10 inputs of a minibatch), and the reward network as it learns, as it is asked and in the
    implicit term: the brightest grey value of the game becomes itself / 255 everywhere. With a second division this fails."""
    brightest, seen = {}, {}
    original = rlhf.pixels

    def pixels(obs):
        assert obs.dtype == torch.uint8 and obs.shape[1:] == (4, 84, 84)
        images = original(obs) / (255 if twice else 1)
        brightest[images] = obs.max().item()
        return images

    def hook(module, inputs):
        who = module.kind, module.training, torch.is_grad_enabled()
        seen.setdefault(who, []).append((inputs[0].max() * 255 - brightest[inputs[0]]).abs().item())

    made = {"actor": rlhf.Agent, "reward": rlhf.RewardNetwork}
    for kind, owner in made.items():
        init = owner.__init__

        def hooked(self, *arguments, init=init, kind=kind, **changes):
            init(self, *arguments, **changes)
            parts = (
                [("actor", self.actor), *(("critic", each) for each in (*self.critics, *self.targets))]
                if kind == "actor"
                else [(kind, self)]
            )
            for name, module in parts:
                module.kind = name
                module.register_forward_pre_hook(hook)

        monkeypatch.setattr(owner, "__init__", hooked)
    monkeypatch.setattr(rlhf, "pixels", pixels)
    train(run_dir=tmp_path, total_timesteps=160)
    assert {who[0] for who in seen} == {"actor", "critic", "reward"}
    assert {who for who in seen if who[0] == "reward"} == {
        ("reward", True, True),
        ("reward", False, False),
        ("reward", False, True),
    }
    wrong = max(max(values) for values in seen.values())
    assert wrong > 100 if twice else wrong < 1e-3


# ---- Lives, games, rewards -------------------------------------------------------------------------------------
class Recorder:
    """The games of the training, whose rows are kept and may be tampered with."""

    def __init__(self, monkeypatch, tamper=lambda ended, row: None):
        self.rows, self.tamper, original = [], tamper, rlhf.make_envs
        monkeypatch.setattr(rlhf, "make_envs", lambda *settings: self.wrap(original(*settings)))

    def wrap(self, envs):
        self.envs, self.action_space, self.ended = envs, envs.action_space, np.zeros(2, bool)
        return self

    def reset(self):
        return self.envs.reset()

    def step(self, actions):
        images, reward, terminated, truncated, info = self.envs.step(actions)
        row = dict(images=images.copy(), reward=reward.copy(), terminated=terminated, truncated=truncated, info=dict(info))
        self.tamper(self.ended, row)
        self.rows.append(row | {"reset": self.ended})
        self.ended = terminated | truncated
        return row["images"], row["reward"], terminated, truncated, row["info"]

    def close(self):
        self.envs.close()


LONG = {
    "env_id": "Breakout-v5",
    "num_steps": 300,
    "total_timesteps": 1200,
    "learning_starts": 600,
    "buffer_size": 1200,
    "warmup_epochs": 1,
}


@pytest.mark.parametrize("lives", [True, False])
def test_a_lost_life_terminates_and_a_game_is_logged_whole(tmp_path, monkeypatch, lives):
    """Terminations in the replay against the games' own flags, returns against their points. Random play of Breakout loses a life
    in some 30 steps and a game in some 170."""
    recorder = Recorder(monkeypatch)
    folder = train(run_dir=tmp_path, episodic_life=lives, reward_update="ground-truth", **LONG)
    over = np.array([row["info"]["terminated"] != 0 for row in recorder.rows])
    ends = np.array([row["terminated"] for row in recorder.rows])
    assert over.sum() >= 1 and (ends.sum() > 3 * over.sum() if lives else (ends == over).all())
    replay = torch.load(folder / "checkpoint.pt", weights_only=True)["replay"]["columns"]
    assert np.array_equal(replay[4][1:601], ends)  # row 0 is no step
    assert np.array_equal(replay[5][1:601], [~row["reset"] for row in recorder.rows])
    expected, points, steps = [], np.zeros(2), np.zeros(2, int)
    for t, row in enumerate(recorder.rows):
        points, steps = points + row["info"]["reward"], steps + ~row["reset"]
        for n in np.flatnonzero(over[t]):
            expected.append((2 * (t + 1), n, float(points[n]), int(steps[n])))
            points[n] = steps[n] = 0
    logged = [
        tuple(float(row[name]) for name in rlhf.EPISODES if name != "wall_time_s") for row in read_csv(folder / "episodes.csv")
    ]
    assert logged == [tuple(map(float, row)) for row in expected] and max(row[2] for row in logged) > 0


@pytest.mark.parametrize("what", ["reset", "image of a cut game"])
def test_a_reset_influences_nothing_and_a_cut_is_bootstrapped(tmp_path, monkeypatch, what):
    """Reward and points of a reset change nothing, the last image of a game that is cut off does. Games are cut off after 12 steps
    here."""

    def tamper(ended, row):
        if what == "reset":
            row["reward"][ended] += 1e6
            row["info"]["reward"] = np.where(ended, 1e6, row["info"]["reward"])
        else:
            row["images"][row["truncated"]] ^= 0xFF

    found = []
    for tampered in (False, True):
        with monkeypatch.context() as patch:
            recorder = Recorder(patch, *((tamper,) if tampered else ()))
            kwargs = '{"max_episode_steps": 12}' if "cut" in what else "{}"
            changes = {"env_id": "Breakout-v5", "env_kwargs": kwargs, "reward_update": "ground-truth"}
            folder = train(run_dir=tmp_path / str(tampered), **changes)
        assert sum(row["reset"].sum() for row in recorder.rows) >= 2
        found.append(flat(states_of(folder)[0]))
    assert same(*found) == ("cut" not in what)


def test_the_true_reward_reaches_only_the_teacher_and_ground_truth(tmp_path, monkeypatch):
    """With labels that do not depend on it, a learned reward does not either."""

    def first_one(rewards, *rest):
        return torch.ones(len(rewards)), torch.ones(len(rewards), dtype=torch.bool)

    def shift(ended, row):
        row["reward"] += 3.0 * ~ended

    monkeypatch.setattr(rlhf, "teacher_labels", first_one)
    for method in ("sobirl", "ground-truth"):
        found = []
        for tampering in ((), (shift,)):
            with monkeypatch.context() as patch:
                Recorder(patch, *tampering)
                folder = train(run_dir=tmp_path / f"{method}{len(tampering)}", reward_update=method)
            found.append(flat(states_of(folder)[:3]))
        assert same(*found) == (method == "sobirl")


def test_targets_are_copied_updates_made_and_step_sizes_lowered_as_said(tmp_path, monkeypatch):
    counts, transitions, sample = [], [], rlhf.Replay.sample
    load = torch.nn.ModuleList.load_state_dict

    def spy(replay, count):
        transitions.append(replay.transitions)
        return sample(replay, count)

    def loaded(module, state, *rest):
        counts.append(inspect.currentframe().f_back.f_locals["replay"].transitions)
        return load(module, state, *rest)

    monkeypatch.setattr(rlhf.Replay, "sample", spy)
    monkeypatch.setattr(torch.nn.ModuleList, "load_state_dict", loaded)
    folder = train(run_dir=tmp_path, reward_update="ground-truth", anneal_steps=1000)
    states = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert states["optimiser_1"]["param_groups"][0]["lr"].item() == pytest.approx(1e-4 * (1 - 160 / 1000))  # the optimiser's own
    last = states["replay"]["counts"][1]
    assert len(transitions) == last // 8 - 80 // 8 and all(a <= b for a, b in zip(transitions, transitions[1:]))
    assert len(counts) == last // 50 - 80 // 50


# ---- Games that can be copied ----------------------------------------------------------------------------------
@pytest.fixture
def games():
    """Makes games by Gymnasium."""
    pytest.importorskip("ale_py")
    return lambda n=1, seed=0, **changes: rlhf.CloneableGames(
        rlhf.Args(**{"env_id": "Breakout-v5", "env_backend": "gymnasium"} | changes), n, seed
    )


@pytest.mark.parametrize("game", ["Breakout-v5", "Seaquest-v5", "BeamRider-v5", "SpaceInvaders-v5"])
def test_both_backends_show_the_same_images_rewards_and_ends(games, game):
    """From the first step on, with one frame without an action at the start and the same random memory when the console is switched
    on. A grey value may differ by the rounding of a mean, and the last image of a game, which nobody uses, is another."""
    import ale_py

    envs = rlhf.make_envs(rlhf.Args(env_id=game, env_threads=1), 1, 0, noop_max=1)
    others, rng, lives, rewards, over = games(env_id=game), np.random.default_rng(1), 0, 0, False
    others.random = type("Zero", (), {"integers": lambda self, bound: 0})()
    others.env.ale.setInt("random_seed", 0)
    others.env.ale.loadROM(ale_py.roms.get_rom_path(re.sub("(?<!^)(?=[A-Z])", "_", game[:-3]).lower()))
    others.games = [others.games[0]._replace(emulator=others.env.clone_state())]
    first, second = envs.reset()[0], others.reset()[0]
    for _ in range(300):
        assert np.abs(first.astype(int) - second)[:, : 3 if over else 4].max() <= 1
        actions = rng.integers(0, envs.action_space.n, 1)
        first, reward, ends, cut, info = envs.step(actions)
        second, *found = others.step(actions)
        assert [each.tolist() for each in found[:3]] == [reward.tolist(), ends.tolist(), cut.tolist()]
        assert found[3]["reward"] == info["reward"] and found[3]["terminated"] == info["terminated"]
        lives, rewards, over = lives + int(ends[0]), rewards + int(reward[0] != 0), info["terminated"][0] != 0
    envs.close()
    assert rewards > 0 and (lives > 0 or game == "BeamRider-v5")


def test_area_weights_are_means_of_the_covered_pixels():
    for size in (210, 160):
        weights = rlhf.area_weights(size)
        assert np.allclose(weights.sum(1), 1) and np.allclose(weights.sum(0), 84 / size)
        fine = np.repeat(np.eye(size), 84, axis=0).reshape(84, size, size).mean(1)  # 84 x finer pixels, exact for any ratio
        assert np.allclose(weights, fine)


def test_a_copied_game_goes_on_as_it_did(games):
    """Two games in one emulator do not disturb each other; a state that is put back goes on bit by bit, lives and ends included."""
    envs, rng = games(2, seed=4), np.random.default_rng(0)
    envs.reset()
    actions, kept, rows = rng.integers(0, 4, (120, 2)), None, []
    for t, each in enumerate(actions):
        if t == 40:
            kept = list(envs.games)
        rows.append(envs.step(each))
    assert sum(row[2].sum() for row in rows[:40]) > 0
    envs.games = kept[::-1]  # the other way round
    for t in range(40, 60):
        again = envs.step(actions[t][::-1])
        if rows[t - 1][2].any():  # a reset draws how long it waits
            break
        assert np.array_equal(again[0][::-1], rows[t][0]) and np.array_equal(again[1][::-1], rows[t][1])
    assert t > 45


def test_rollouts_start_where_they_should_and_end_with_the_life(games):
    torch.manual_seed(0)
    envs, agent = games(3, seed=2), rlhf.Agent(4)
    obs, _ = envs.reset()
    start, first = list(envs.games), torch.tensor([1, 2, 3])
    images, actions, weights = rlhf.roll_out(agent, envs, torch.tensor([1, 4, 400]), 0.9, obs, first)
    assert np.array_equal(images[:, 0], obs) and torch.equal(actions[:, 0], first)
    assert weights[0].tolist() == [1.0] + [0.0] * 399 and weights[1, :5].tolist() == pytest.approx([1, 0.9, 0.81, 0.729, 0])
    length = int((weights[2] > 0).sum())
    assert 5 < length < 200  # a life of Breakout without skill
    envs.games = start
    for t in range(length):
        *_, ends, cut, info = envs.step(actions[:, t].numpy())
        assert ends[2] == (t == length - 1)
    assert rlhf.roll_out(agent, envs, torch.tensor([2, 2, 2]), 0.9, obs)[0].shape == (3, 2, 4, 84, 84)


def test_the_rollouts_of_a_run_start_in_the_states_of_the_newest_pairs(tmp_path, monkeypatch):
    calls, original = [], rlhf.roll_out

    def spy(agent, envs, lengths, decay, obs, actions=None, generator=None):
        names = inspect.currentframe().f_back.f_back.f_locals
        calls.append((obs, actions, list(envs.games), names["frames"][names["answered"]], names["chosen"][names["answered"]]))
        return original(agent, envs, lengths, decay, obs, actions, generator)

    monkeypatch.setattr(rlhf, "roll_out", spy)
    train(run_dir=tmp_path, **WAYS["sobirl rollouts"])
    assert len(calls) == 4
    for obs, actions, states, frames, chosen in calls:
        expected = rlhf.stacks(frames).flatten(0, 2).repeat_interleave(2, 0)
        assert np.array_equal(obs, expected) and all(np.array_equal(state.images, image) for state, image in zip(states, obs))
        assert actions is None or torch.equal(actions, chosen.flatten().repeat_interleave(2))
    assert [call[1] is None for call in calls] == [False, True, False, True]


def test_equal_actors_have_no_penalty(tmp_path, monkeypatch):
    """pbrl-style's two sets have the same starts and the same noise."""
    found, original = [], rlhf.roll_out

    def spy(agent, envs, lengths, decay, obs, actions=None, generator=None):
        found.append(original(agent, envs, lengths, decay, obs, actions, generator))
        return found[-1]

    monkeypatch.setattr(rlhf, "roll_out", spy)
    monkeypatch.setattr(rlhf.Agent, "act", lambda agent, obs, noise: noise.argmax(-1))
    train(run_dir=tmp_path, total_timesteps=160, **WAYS["pbrl"])
    assert len(found) == 2 and same(*found) and found[0][0].shape == (2, 5, 4, 84, 84)


# ---- People ----------------------------------------------------------------------------------------------------
def answer(folder, stop, label=1.0):
    """Answer each pair that the run below this folder writes, as label_preferences.py does."""
    done = set()
    while not stop.is_set():
        for pair in sorted(folder.glob("*/preferences/*.pt")):
            if pair not in done:
                line = {"pair": int(pair.stem), "answer": "left", "label": label, "repeat": False}
                with open(pair.parent / "labels.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                done.add(pair)
        time.sleep(0.05)


def test_people_label_and_their_labels_and_the_network_serve_other_runs(tmp_path):
    stop = threading.Event()
    person = threading.Thread(target=answer, args=(tmp_path / "asked", stop))
    person.start()
    try:
        folder = train(run_dir=tmp_path / "asked", teacher="human")
    finally:
        stop.set()
        person.join()
    rows, checkpoint = read_csv(folder / "metrics.csv"), torch.load(folder / "checkpoint.pt", weights_only=True)
    assert [float(row["bilevel/labels"]) for row in rows] == [12, 16, 20] and checkpoint["taken"] == [*range(20)]
    queue = checkpoint["upper"][0]
    for number, (frames, actions, label) in enumerate(queue):
        pair = torch.load(folder / "preferences" / f"{number:07}.pt", weights_only=True)
        assert torch.equal(pair["frames"], frames) and torch.equal(pair["actions"], actions) and label == 1
        assert frames.shape == (2, 7, 84, 84) and frames.dtype == torch.uint8
    file = folder / "preferences" / "labels.jsonl"
    other = train(run_dir=tmp_path / "other", reward_update="drlhf", labels=file)
    checkpoint = torch.load(other / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["upper"][0]) == 18  # pairs 9 and 19 are held out
    rows = read_csv(other / "metrics.csv")
    assert all(0 <= float(row["bilevel/label_accuracy"]) <= 1 and float(row["bilevel/labels"]) == 0 for row in rows)
    for wrong in ({"env_id": "Breakout-v5"}, {"fragment_length": 5}):  # whose images are of the same shape
        with pytest.raises(rlhf.BadInput, match="--labels .*: of another game, sizes or version"):
            train(run_dir=tmp_path / "wrong", reward_update="drlhf", labels=file, **wrong)
    frozen = train(run_dir=tmp_path / "frozen", reward_update="frozen", reward_model=other / "checkpoint.pt", total_timesteps=160)
    assert same(*(flat(torch.load(each / "checkpoint.pt", weights_only=True)["reward"]) for each in (other, frozen)))
    for wrong in ({"reward_model": file}, {"reward_model": other / "checkpoint.pt", "env_id": "Breakout-v5"}, {"reward_model": other / "checkpoint.pt", "env_id": "Seaquest-v5"}):
        with pytest.raises(rlhf.BadInput, match="--reward-model .*: of another game, sizes or version, or damaged"):
            train(run_dir=tmp_path / "wrong", reward_update="frozen", **wrong)
    wrongs = {"is of SpaceInvaders-v5": {"env_id": "Pong-v5"}, "shape": {"fragment_length": 5}}
    wrongs |= {"no label": {"labels": tmp_path / "none.jsonl"}}
    for sentence, wrong in wrongs.items():
        with pytest.raises(rlhf.BadInput, match=f"--labels .*: of another game, sizes or version, or damaged: .*{sentence}"):
            train(run_dir=tmp_path / "wrong", reward_update="drlhf", **{"labels": file} | wrong)
    assert not (tmp_path / "wrong").exists()


def test_a_run_that_waits_goes_on_when_the_pairs_that_it_waits_for_are_deleted(tmp_path, monkeypatch):
    def delete_all(seconds):
        pairs = list(tmp_path.glob("*/preferences/*.pt"))
        assert pairs, "it waits for pairs that are gone"
        for pair in pairs:
            pair.unlink()

    monkeypatch.setattr(rlhf.time, "sleep", delete_all)
    folder = train(run_dir=tmp_path, teacher="human")
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"


def test_a_run_that_does_not_wait_goes_on_without_labels(tmp_path):
    folder = train(run_dir=tmp_path, teacher="human", wait_for_labels=False)
    assert len(list((folder / "preferences").glob("*.pt"))) == 20
    assert {row["bilevel/labels"] for row in read_csv(folder / "metrics.csv")} == {"0.0"}


def test_an_ensemble_asks_where_it_disagrees(tmp_path, monkeypatch):
    """Of five times as many pairs those on which the networks' probabilities differ most."""
    seen, original = [], rlhf.draw_pairs

    def spy(windows, count, *rest):
        seen.append(count)
        return original(windows, count, *rest)

    monkeypatch.setattr(rlhf, "draw_pairs", spy)
    folder = train(run_dir=tmp_path, reward_ensemble=3, reward_candidates=5)
    assert seen == [6, 12, 6, 20, 6, 20]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["upper"][0]) == 20
    first = [checkpoint["reward"][f"{k}.network.0.weight"] for k in range(3)]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_the_added_term_takes_no_more_pairs_than_a_minibatch(tmp_path, monkeypatch):
    """A short run spends its labels in few iterations, and all pairs of one would not fit into memory."""
    counts, original = [], rlhf.implicit_term

    def spy(losses, *rest):
        counts.append(len(losses))
        return original(losses, *rest)

    monkeypatch.setattr(rlhf, "implicit_term", spy)
    train(run_dir=tmp_path, pairs_per_iteration=20, reward_batch_size=6)
    assert counts == [6, 6]


# ---- Checkpoint and resume --------------------------------------------------------------------------------------
def copy_of(states):
    """Their tensors, but for the step sizes, which follow the arguments."""
    parts = [state.get("state", state) for state in states]
    return [tensor.clone() for tensor in flat(parts)]


@pytest.mark.parametrize("way", ["sobirl", "pbrl"])
def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, way):
    """What is loaded is what was saved; rows after the checkpoint are dropped; the games start anew, and the replay marks that."""

    def fail():
        raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        after_iteration(patch, SCRIPT, 3, fail)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(run_dir=tmp_path, checkpoint_every=2, **WAYS[way])
    (folder,) = tmp_path.iterdir()
    before, seen = copy_of(states_of(folder)), []
    opened = rlhf.Run.open

    def look(run):
        names = inspect.currentframe().f_back.f_locals
        seen.extend(copy_of([each.state_dict() for each in names["kept"].values()]))
        assert "state" not in names and "replay" not in run.checkpoint  # the replay is in memory once
        opened(run)

    monkeypatch.setattr(rlhf.Run, "open", look)
    resume(folder)
    assert same(seen, before) and len(before) > 50
    assert [int(row["global_step"]) for row in read_csv(folder / "metrics.csv")] == [80, 160, 240]
    replay = torch.load(folder / "checkpoint.pt", weights_only=True)["replay"]
    assert replay["counts"][0] == 3 * 40 + 2 and not replay["columns"][5][(2 * 40 + 1) % 79].any()
    assert len(torch.load(folder / "checkpoint.pt", weights_only=True)["upper"][0]) == 20


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    folder = train(run_dir=tmp_path, total_timesteps=160)
    kept = (folder / "metrics.csv").read_bytes()
    with pytest.raises(rlhf.BadInput, match="--resume .*: of another game, sizes or version"):
        resume(folder, "--env-id", "Seaquest-v5", "--total-timesteps", "240")
    for changes in (["--fragment-length", "5"], ["--num-envs", "1", "--num-steps", "80"]):
        with pytest.raises(rlhf.BadInput, match="--resume .*: of another game, sizes or version"):
            resume(folder, *changes, "--total-timesteps", "240")
    assert (folder / "metrics.csv").read_bytes() == kept
    folder = train(run_dir=tmp_path, total_timesteps=160, num_envs=1, num_steps=80)
    with pytest.raises(rlhf.BadInput, match="--resume .*: of another game, sizes or version"):
        resume(folder, "--num-envs", "2", "--num-steps", "40", "--total-timesteps", "240")
    shutil.rmtree(folder)


def test_numbers_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf, "critic_targets", lambda rewards, *rest: math.nan * rewards)
    with pytest.raises(rlhf.Diverged, match="the losses stopped being finite by step 160"):
        train(run_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "diverged"


# ---- Bad input -------------------------------------------------------------------------------------------------
BAD = [
    (["--num-steps", "100", "--total-timesteps", "50"], "--total-timesteps 50 must be at least 20100: 20000 random steps"),
    (["--buffer-size", "5000"], "--buffer-size 5000 is less than one iteration of 10000"),
    (["--total-timesteps", "20000"], "must be at least 30000: 20000 random steps and an iteration that learns"),
    (["--num-steps", "20", "--fragment-length", "21"], "--fragment-length 21 must be at most --num-steps"),
    (["--reward-update", "drlhf", "--permute-cross-entropy"], "--permute-cross-entropy is for sobirl and hpgd-style"),
    (["--reward-update", "drlhf", "--implicit-pairs", "queue"], "--implicit and --implicit-pairs queue are for sobirl, not for drlhf"),
    (["--reward-update", "hpgd-style"], "--env-backend envpool cannot copy a game"),
    (["--implicit", "rollouts"], "--env-backend envpool cannot copy a game"),
    (["--env-id", "Nothing-v5"], "--env-id 'Nothing-v5' cannot be made"),
    (["--env-backend", "gymnasium", "--env-kwargs", '{"max_episode_steps": 9}'], "--env-kwargs are EnvPool's"),
    (["--labels", "x.jsonl"], "--labels: a file has no newest pairs, as sobirl needs"),
    (["--teacher", "human", "--reward-update", "hpgd-style", "--env-backend", "gymnasium"], "--teacher human has no rollouts"),
    (["--reward-candidates", "5"], "--reward-candidates: one network cannot disagree"),
    (["--target-entropy", "1.5"], "--target-entropy is 1.5"),
]  # fmt: skip


@pytest.mark.parametrize("argv, sentence", BAD)
def test_bad_input_is_one_sentence(command_line, tmp_path, argv, sentence):
    status, out, err = command_line(SCRIPT, "--run-dir", tmp_path / "runs", *argv)
    assert not (tmp_path / "runs").exists()
    assert_one_sentence(status, err, sentence)
