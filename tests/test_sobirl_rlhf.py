"""sobirl_rlhf.py as a program: runs of every kind, what may influence them, run folder, replay file, resume, bad input."""

import copy
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
import sobirl_rlhf as rlhf
import test_shared_blocks as style
import torch
from conftest import REPO, WALK, after_iteration, environment, read_csv, start, wait_for, without_time
from test_command_line import assert_one_sentence, ends, flag, numbers
from test_semantics import Tampered

SCRIPT = "sobirl_rlhf.py"
TINY = {
    "env_id": WALK, "num_envs": 2, "num_steps": 32, "total_timesteps": 4 * 64, "learning_starts": 64, "batch_size": 8,
    "actor_width": 8, "critic_width": 8, "reward_width": 6, "fragment_length": 3, "queue_size": 40, "warmup_pairs": 12,
    "warmup_epochs": 2, "pairs_per_iteration": 4, "reward_batch_size": 8, "heldout_pairs": 8, "checkpoint_every": 1,
    "device": "cpu",
}  # fmt: skip
PENDULUM = "InvertedPendulum-v4"  # its simulator can be put into any state
SHORT = {"env_id": PENDULUM, "num_envs": 1, "num_steps": 64, "rollout_length": 3}
WAYS = {
    "sobirl": {},
    "sobirl queue": {"implicit_pairs": "queue", "baseline": False},
    "sobirl rollouts": SHORT | {"implicit": "rollouts", "rollouts": 2},
    "sobirl reward-to-go": {"implicit": "reward-to-go-style"},
    "sobirl permuted": {"permute_cross_entropy": True},
    "drlhf": {"reward_update": "drlhf"},
    "pbrl": {"reward_update": "pbrl-style", "rollout_length": 4, "rollouts": 2},
    "hpgd": SHORT | {"rollout_length": None, "gamma": 0.8, "reward_update": "hpgd-style", "rollouts": 2},
    "hpgd permuted": SHORT | {"rollout_length": None, "gamma": 0.8, "reward_update": "hpgd-style", "permute_cross_entropy": True},
    "ground-truth": {"reward_update": "ground-truth"},
    "constant": {"reward_update": "constant"},
    "frozen": {"reward_update": "frozen"},
}  # fmt: skip


def words(**changes) -> list[str]:
    """The command line of a tiny run."""
    argv = []
    for name, value in (TINY | changes).items():
        if isinstance(value, bool):
            argv.append(flag(name) if value else flag(f"no_{name}"))
        elif value is not None:
            argv += [flag(name), str(value)]
    return argv


def train(**changes):
    """A tiny run in this process; returns its folder."""
    return rlhf.train(rlhf.parse_args(rlhf.Args, words(**changes)))


def flat(state) -> list[torch.Tensor]:
    """The tensors in nested dictionaries and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for part in parts for tensor in flat(part)]


def learned(folder) -> list[torch.Tensor]:
    """All networks of the last checkpoint."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return flat([checkpoint["agents"], checkpoint["reward"]])


def same(first, second) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


# ---- Runs of every kind ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a tiny run of each kind. Read only."""
    return {way: train(run_dir=tmp_path_factory.mktemp("run"), **changes) for way, changes in WAYS.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_each_kind(runs, way):
    rows = read_csv(runs[way] / "metrics.csv")
    assert [int(row["global_step"]) for row in rows] == [64, 128, 192, 256]
    assert json.loads((runs[way] / "result.json").read_text())["status"] == "finished"
    assert not (runs[way] / "replay").exists()
    for row in rows:
        for name in ("losses/qf_loss", "losses/actor_loss", "losses/alpha", "losses/logprobs"):
            none_yet = row["global_step"] == "64" and name != "losses/alpha"
            assert row[name] == "" if none_yet else math.isfinite(float(row[name]))
    asks = WAYS[way].get("reward_update", "sobirl") in rlhf.LEARNED
    assert [float(row["bilevel/labels"]) for row in rows] == ([12, 16, 20, 24] if asks else [0] * 4)
    assert [row["losses/cross_entropy"] != "" for row in rows] == [asks] * 4
    opinions = [f"bilevel/{name}" for name in ("heldout_accuracy", "heldout_cross_entropy", "reward_correlation", "learned_reward")]
    for row in rows:
        if way in ("ground-truth", "constant"):  # nobody asks the network
            assert all(row[name] == "" for name in opinions)
            continue
        assert float(row["bilevel/heldout_cross_entropy"]) > 0 and abs(float(row["bilevel/learned_reward"])) <= 1
        if "env_id" in WAYS[way]:  # every reward of InvertedPendulum is 1: all pairs tie
            assert row["bilevel/heldout_accuracy"] == ""
        else:
            assert 0 <= float(row["bilevel/heldout_accuracy"]) <= 1 and abs(float(row["bilevel/reward_correlation"])) <= 1
    implicit, adds = way.startswith(("sobirl", "hpgd")), way.startswith(("sobirl", "hpgd", "pbrl"))
    assert [float(row["bilevel/implicit_weight"]) > 0 for row in rows] == [False] + [adds] * 3
    assert [row["bilevel/implicit_ratio"] != "" for row in rows] == [False] + [adds] * 3
    assert (float(rows[-1]["bilevel/simulator_steps"]) > 0) == ("rollouts" in way or way.startswith(("hpgd", "pbrl")))
    assert implicit or rows[-1]["bilevel/score_mean"] == ""


def test_the_kinds_differ(runs):
    """In what they learn; ground truth and the controls leave the reward network at rest."""
    on_walk = [way for way in WAYS if "env_id" not in WAYS[way]]
    for i, first in enumerate(on_walk):
        for second in on_walk[:i]:
            assert not same(learned(runs[first]), learned(runs[second])), (first, second)
    assert not same(learned(runs["sobirl rollouts"]), learned(runs["hpgd"]))
    assert not same(learned(runs["hpgd"]), learned(runs["hpgd permuted"]))
    ways = ("ground-truth", "constant", "frozen", "drlhf")
    rewards = [torch.load(runs[way] / "checkpoint.pt", weights_only=True)["reward"] for way in ways]
    assert same(flat(rewards[0]), flat(rewards[1])) and same(flat(rewards[1]), flat(rewards[2]))
    assert not same(flat(rewards[2]), flat(rewards[3]))


def test_a_run_repeats_bitwise_and_a_seed_matters(runs, tmp_path):
    for way in ("sobirl", "hpgd"):
        again = train(run_dir=tmp_path / way, **WAYS[way])
        assert same(learned(again), learned(runs[way]))
        assert without_time(read_csv(again / "metrics.csv")) == without_time(read_csv(runs[way] / "metrics.csv"))
    assert not same(learned(train(run_dir=tmp_path / "seed", seed=2)), learned(runs["sobirl"]))


@pytest.mark.full
def test_each_argument_of_the_algorithm_matters(tmp_path):
    changes = [
        {}, {"gamma": 0.9}, {"batch_size": 9}, {"learning_starts": 64}, {"learning_rate": 1e-3}, {"target_rate": 0.1},
        {"critic_learning_rate": 3e-3}, {"policy_frequency": 1}, {"autotune": False}, {"alpha": 0.5}, {"buffer_size": 40},
        {"reward_bound": "clip"}, {"reward_dropout": 0.5}, {"reward_learning_rate": 1e-2}, {"reward_batch_size": 5},
        {"reward_epochs": 2}, {"fragment_length": 2}, {"queue_size": 10}, {"label_budget": 14}, {"warmup_pairs": 10},
        {"warmup_epochs": 1}, {"pairs_per_iteration": 3}, {"teacher": "stochastic", "teacher_temperature": 20.0},
        {"teacher": "mistake", "teacher_error": 0.4},
        {"teacher": "equal", "teacher_threshold": 1.0}, {"teacher": "skip", "teacher_threshold": 1.0},
        {"teacher": "myopic", "teacher_gamma": 0.1}, {"implicit_actions": 3}, {"implicit_starts": 96},
        {"max_inverse_temperature": 0.5}, {"max_gradient_ratio": 0.01}, {"baseline": False}, {"implicit_pairs": "queue"}, {"permute_cross_entropy": True},
    ]  # fmt: skip
    small = {"num_steps": 16, "total_timesteps": 4 * 32, "learning_starts": 32, "buffer_size": 60}
    found = [learned(train(run_dir=tmp_path / str(i), **small | change)) for i, change in enumerate(changes)]
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            assert not same(first, second), (changes[i], changes[j])


def test_matmul_precision_is_that_of_the_run(tmp_path):
    """What it changes depends on the processor; that it is asked for does not, nor that it is asked for by this run alone."""
    for precision in ("medium", "highest"):
        train(run_dir=tmp_path, reward_update="ground-truth", matmul_precision=precision)
        assert torch.get_float32_matmul_precision() == precision
    assert rlhf.Args().matmul_precision == "highest"


def test_heldout_pairs_leave_the_number_of_labels_alone(tmp_path):
    rows = read_csv(train(run_dir=tmp_path, heldout_pairs=0) / "metrics.csv")
    assert all(row["bilevel/heldout_accuracy"] == "" for row in rows) and float(rows[-1]["bilevel/labels"]) == 24


def test_labels_last_to_the_end(tmp_path):
    """And with them the implicit term, which is of the newest alone."""
    rows = read_csv(train(run_dir=tmp_path / "1", pairs_per_iteration=None, label_budget=33) / "metrics.csv")
    assert [float(row["bilevel/labels"]) for row in rows] == [12, 19, 26, 33]
    rows = read_csv(train(run_dir=tmp_path / "2", label_budget=14) / "metrics.csv")
    assert [float(row["bilevel/implicit_weight"]) > 0 for row in rows] == [False, True, False, False]


def test_the_label_budget_is_kept(tmp_path):
    for way in ("sobirl", "hpgd", "pbrl"):
        rows = read_csv(train(run_dir=tmp_path / way, **WAYS[way] | {"label_budget": 14}) / "metrics.csv")
        assert [float(row["bilevel/labels"]) for row in rows] == [12, 14, 14, 14]


# ---- What the two levels see -----------------------------------------------------------------------------------
def test_episodes_are_those_that_really_ended(tmp_path):
    import toy_envs

    toy_envs.EPISODES.clear()
    rows = read_csv(train(run_dir=tmp_path) / "episodes.csv")
    assert len(rows) > 20
    logged = [(float(row["episodic_return"]), int(row["episodic_length"])) for row in rows]
    real = [(value, length) for _, value, length, _ in toy_envs.EPISODES]
    np.testing.assert_allclose(sorted(logged), sorted(real), rtol=1e-5)


def test_replay_holds_the_transitions_and_no_reset_row(tmp_path, monkeypatch):
    """Against what happened in the environments: actions in the box, true next observations, terminated alone."""
    import toy_envs

    kept = []
    original = rlhf.Replay.add

    def add(replay, *columns):
        kept.append([np.array(column) for column in columns])
        original(replay, *columns)

    monkeypatch.setattr(rlhf.Replay, "add", add)
    toy_envs.EPISODES.clear()
    toy_envs.STEPS.clear()
    folder = train(run_dir=tmp_path, reward_update="ground-truth")
    obs, actions, next_obs, rewards, ended = (np.concatenate(column) for column in zip(*kept))
    resets = 4 * 64 - len(obs)
    assert 0 <= len(read_csv(folder / "episodes.csv")) - resets <= 2
    real = {tuple(np.float32(o).tolist()): np.asarray(a) for _, o, a in toy_envs.STEPS}
    low, high = toy_envs.Walk.action_space.low, toy_envs.Walk.action_space.high
    for o, a in zip(obs, actions):
        np.testing.assert_allclose(low + (a + 1) / 2 * (high - low), real[tuple(o.tolist())], rtol=1e-5)
    how = [kind for *_, kind in toy_envs.EPISODES]
    assert ended.sum() == how.count("terminated") and how.count("truncated") > 3
    x = (next_obs[:, 0].astype(float) - 500) / 1000  # the reward is that of the position arrived at
    np.testing.assert_allclose(rewards, x - 0.1 * next_obs[:, 1] ** 2, atol=1e-3)


@pytest.mark.parametrize("tampering", [{"reset_reward": 1e3}, {"terminal_offset": 50.0}])
def test_resets_and_the_observation_of_a_termination_influence_nothing(toy_envs, tmp_path, monkeypatch, tampering):
    """A reset's reward and a termination's observation; the final observation of a truncated episode is bootstrapped."""
    original = rlhf.make_envs

    def tampered(**changes):
        def make_envs(*arguments):
            envs, *spaces = original(*arguments)
            return Tampered(envs, **changes), *spaces

        return make_envs

    folders = []
    for i, changes in enumerate(({}, tampering, {"truncated_offset": 50.0})):
        monkeypatch.setattr(rlhf, "make_envs", tampered(**changes))
        folders.append(train(run_dir=tmp_path / str(i), total_timesteps=3 * 64))
    clean, changed, truncated = (learned(folder) for folder in folders)
    assert same(clean, changed)
    assert not same(clean, truncated)  # the final observation of a truncated episode is a bootstrap


def test_the_true_reward_reaches_only_the_teacher_and_ground_truth(toy_envs, tmp_path, monkeypatch):
    """With labels that do not depend on it, a learned reward does not either."""
    original = toy_envs.Walk.step

    def shifted(env, action):
        obs, reward, *rest = original(env, action)
        return obs, -3 * reward, *rest

    def first_one(rewards, *rest):
        return torch.ones(len(rewards)), torch.ones(len(rewards), dtype=torch.bool)

    monkeypatch.setattr(rlhf, "teacher_labels", first_one)
    folders = {}
    for name, step in (("plain", original), ("shifted", shifted)):
        monkeypatch.setattr(toy_envs.Walk, "step", step)
        for method in ("sobirl", "pbrl-style", "constant", "ground-truth"):
            changes = {"run_dir": tmp_path / f"{method}{name}", "reward_update": method, "total_timesteps": 2 * 64}
            folders[method, name] = learned(train(**changes))
    for method in ("sobirl", "pbrl-style", "constant"):
        assert same(folders[method, "plain"], folders[method, "shifted"]), method
    assert not same(folders["ground-truth", "plain"], folders["ground-truth", "shifted"])


def test_the_reward_network_learns_in_training_mode_and_is_asked_in_evaluation_mode(tmp_path, monkeypatch):
    asked = []
    original = rlhf.RewardNetwork.forward

    def forward(network, inputs):
        asked.append((network.training, torch.is_grad_enabled()))
        return original(network, inputs)

    monkeypatch.setattr(rlhf.RewardNetwork, "forward", forward)
    train(run_dir=tmp_path, reward_dropout=0.5)
    added = (False, True)  # the implicit term is of the reward that the policy answers
    assert set(asked) == {(True, True), (False, False), added}


def test_the_lower_level_sees_the_network_of_now(tmp_path, monkeypatch):
    """Not that of an older theta, and where the ring has overwritten rows."""
    networks, apart, moved = [], [], set()
    init, update = rlhf.RewardNetwork.__init__, rlhf.SoftActorCritic.update_critics

    def made(network, *arguments, **changes):
        init(network, *arguments, **changes)
        networks.append(network)

    def update_critics(learner, batch, rewards, noise):
        with torch.no_grad():
            apart.append((rewards - networks[0](batch.inputs)).abs().max().item())
        moved.add(networks[0].network[0].bias[0].item())
        return update(learner, batch, rewards, noise)

    monkeypatch.setattr(rlhf.RewardNetwork, "__init__", made)
    monkeypatch.setattr(rlhf.SoftActorCritic, "update_critics", update_critics)
    train(run_dir=tmp_path, reward_learning_rate=1e-2, buffer_size=100, checkpoint_every=1)
    assert len(apart) > 100 and len(moved) > 2 and max(apart) < 1e-5


EVENTS = {
    "sobirl": {}, "sobirl rollouts": {}, "hpgd": {}, "pbrl": {}, "sobirl permuted": {}, "two epochs": {"reward_epochs": 2},
    "sobirl queue": {}, "drlhf": {},
}  # fmt: skip


@pytest.mark.parametrize("way", EVENTS)
@pytest.mark.full
def test_what_is_added_counts_once_for_each_theta_that_the_policy_answers(tmp_path, monkeypatch, way):
    """In the first of an iteration's steps, at the weights before it; on the queue, as released, in each of them. The policy
    stands still meanwhile, so a second time would be at a theta that it has not answered."""
    events, thetas = [], []
    original, step, log = rlhf.limited_sum, torch.optim.AdamW.step, rlhf.Run.log

    def limited_sum(gradients, added, limit):
        events.append("added")
        return original(gradients, added, limit)

    def stepped(optimiser, *arguments):
        if events[-1:] != ["added"]:
            events.append("alone")
        events[-1] = {"added": "with", "alone": "alone"}[events[-1]]
        return step(optimiser, *arguments)

    monkeypatch.setattr(rlhf, "limited_sum", limited_sum)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    monkeypatch.setattr(rlhf.Run, "log", lambda *arguments: events.append("log") or log(*arguments))
    train(run_dir=tmp_path, **WAYS.get(way, {}) | EVENTS[way])
    iterations = [each.split() for each in " ".join(events).split("log")][:-1]
    counts = [2 * 2] + [math.ceil(labels / 8) * EVENTS[way].get("reward_epochs", 1) for labels in (16, 20, 24)]  # of 12 pairs at first
    expected = [["alone"] * counts[0]]
    for count in counts[1:]:
        with_term = count if way == "sobirl queue" else 0 if way == "drlhf" else 1
        expected.append(["with"] * with_term + ["alone"] * (count - with_term))
    assert iterations == expected


def test_an_iteration_moves_theta_as_the_formulas_say(toy_envs, tmp_path, monkeypatch):
    """One reward update of sobirl again by hand: an epoch of AdamW on the cross-entropy, the implicit term of the newest pairs
    in its first minibatch, and nothing else."""
    records, original = [], rlhf.resample_actions

    def resample(actor, inputs, obs_dim, count):
        records.append([inputs.clone(), original(actor, inputs, obs_dim, count)])
        return records[-1][1]

    monkeypatch.setattr(rlhf, "resample_actions", resample)
    orders, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *arguments: orders.append(randperm(*arguments)) or orders[-1])
    states, save = [], rlhf.Run.save_checkpoint
    keep = ("reward", "optimisers", "queue", "agents")
    monkeypatch.setattr(
        rlhf.Run, "save_checkpoint", lambda run, state: states.append(copy.deepcopy({k: state[k] for k in keep})) or save(run, state)
    )
    free = {"max_gradient_ratio": math.inf, "max_inverse_temperature": math.inf, "reward_learning_rate": 1e-2}
    train(run_dir=tmp_path, env_id="toy/Clock-v0", **free)
    before, after = states[2], states[3]
    inputs, labels = after["queue"]["inputs"], after["queue"]["labels"]
    newest = torch.tensor([23, 22, 21, 20])
    assert torch.equal(records[-1][0], inputs[newest])

    def distance(carriers):
        """How far by-hand weights are from the script's, with the implicit term in so many minibatches."""
        model = rlhf.RewardNetwork(3, 6)
        model.load_state_dict(before["reward"])
        optimiser = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
        optimiser.load_state_dict(copy.deepcopy(before["optimisers"][-1]))
        for k, mb in enumerate(orders[-1].split(8)):
            loss = rlhf.cross_entropies(model(inputs[mb]), labels[mb]).mean()
            if k < carriers:
                rewards = model(inputs[newest])
                pair_losses = rlhf.cross_entropies(rewards, labels[newest]).detach()
                scores = (rewards - model(records[-1][1]).mean(-1)).sum((1, 2))
                others = (pair_losses.sum() - pair_losses) / 3
                loss = loss + ((pair_losses - others) * scores).mean() / after["agents"][0]["log_alpha"].exp()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return max((value - after["reward"][name]).abs().max().item() for name, value in model.state_dict().items())

    distances = [distance(carriers) for carriers in range(4)]
    assert distances[1] < 1e-6 and min(distances[0], *distances[2:]) > 1e-4, distances


def test_the_logged_cross_entropy_is_that_of_all_pairs_in_the_last_epoch(tmp_path, monkeypatch):
    seen, original = [], rlhf.drlhf_loss
    monkeypatch.setattr(rlhf, "drlhf_loss", lambda losses: seen.append(losses.detach()) or original(losses))
    rows = read_csv(train(run_dir=tmp_path, reward_update="drlhf", reward_epochs=2) / "metrics.csv")
    last = torch.cat(seen[-3:])  # 24 pairs in minibatches of 8
    assert len(last) == 24 and float(rows[-1]["losses/cross_entropy"]) == pytest.approx(last.mean().item(), rel=1e-6)
    last = torch.cat(seen[2:4])  # 12 pairs of the warm-up, its second epoch
    assert len(last) == 12 and float(rows[0]["losses/cross_entropy"]) == pytest.approx(last.mean().item(), rel=1e-6)


def test_pbrls_policy_term_is_of_the_policys_own_pairs(tmp_path, monkeypatch):
    """Not of those of the random steps, which it did not choose."""
    when, original = [], rlhf.pbrl_policy_term
    log = rlhf.Run.log
    monkeypatch.setattr(rlhf, "pbrl_policy_term", lambda *arguments: when.append("term") or original(*arguments))
    monkeypatch.setattr(rlhf.Run, "log", lambda *arguments: when.append("log") or log(*arguments))
    train(run_dir=tmp_path, **WAYS["pbrl"])
    found = ["term" in part for part in " ".join(when).split("log")][:4]
    assert found == [False, False, True, True]


def test_pbrl_rolls_both_actors_out_with_the_same_starts_and_noise(tmp_path, monkeypatch):
    calls, original = [], rlhf.Simulator.roll_out

    def roll_out(sim, obs, actions, lengths, decay, policy, seed=None):
        calls.append((lengths.tolist(), seed))
        return original(sim, obs, actions, lengths, decay, policy, seed)

    monkeypatch.setattr(rlhf.Simulator, "roll_out", roll_out)
    train(run_dir=tmp_path, reward_update="pbrl-style", rollout_length=3)
    assert calls[::2] == calls[1::2] and len({seed for _, seed in calls}) == 3  # three iterations learn
    assert all(lengths == [3] * 10 for lengths, _ in calls)


def test_constant_reward_is_that_number(tmp_path, monkeypatch):
    seen = []
    original = rlhf.critic_targets
    monkeypatch.setattr(rlhf, "critic_targets", lambda rewards, *rest: seen.append(rewards.clone()) or original(rewards, *rest))
    train(run_dir=tmp_path, reward_update="constant", constant_reward=-0.5)
    assert len(seen) > 100 and all((rewards == -0.5).all() for rewards in seen)


def test_one_update_for_each_transition_and_the_actor_as_often(tmp_path, monkeypatch):
    counts, refreshed = {"critics": 0, "actor": 0}, []
    for name in ("critics", "actor"):
        original = getattr(rlhf.SoftActorCritic, f"update_{name}")

        def counted(self, *arguments, name=name, original=original):
            counts[name] += 1
            return original(self, *arguments)

        monkeypatch.setattr(rlhf.SoftActorCritic, f"update_{name}", counted)
    monkeypatch.setattr(rlhf.NumpyActor, "refresh", lambda self: refreshed.append(counts["actor"]))
    folder = train(run_dir=tmp_path, reward_update="ground-truth")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert counts["critics"] < 3 * 64 and abs(counts["actor"] - counts["critics"]) <= 2
    assert counts["critics"] + 64 * 0.7 < checkpoint["replayed"] < counts["critics"] + 64
    assert refreshed == [*range(2, counts["actor"] + 1, 2)]  # whoever acts sees each of the actor's moves


@pytest.mark.parametrize("num_envs", [1, 3])
def test_no_terminate(tmp_path, num_envs):
    """Hopper falls over and goes on, in EnvPool as in Gymnasium."""
    changes = {"env_id": "Hopper-v4", "num_envs": num_envs, "num_steps": 150, "total_timesteps": 150 * num_envs}
    changes["reward_update"] = "ground-truth"
    assert len(read_csv(train(run_dir=tmp_path / "1", **changes) / "episodes.csv")) > 2
    assert read_csv(train(run_dir=tmp_path / "2", terminate=False, **changes) / "episodes.csv") == []


def test_evaluation_has_the_terminations_of_the_training(tmp_path, monkeypatch):
    """A random Hopper falls within 200 steps; where falls end nothing, the time limit of 1000 does."""
    changes = {"env_id": "Hopper-v4", "num_envs": 1, "num_steps": 64, "total_timesteps": 64, "eval_episodes": 2}
    steps, original = [], rlhf.task_actions
    for terminate in (True, False):
        monkeypatch.setattr(rlhf, "task_actions", lambda *arguments: steps.append(terminate) or original(*arguments))
        train(run_dir=tmp_path / str(terminate), reward_update="ground-truth", terminate=terminate, **changes)
    assert steps.count(True) < 64 + 500 and steps.count(False) == 64 + 1000


def test_saved_policy(tmp_path):
    folder = train(run_dir=tmp_path, save_model=True, eval_episodes=3)
    assert len(json.loads((folder / "result.json").read_text())["eval_returns"]) == 3
    policy, (_, observations, space) = rlhf.load_policy(folder / "model.pt"), rlhf.make_envs(WALK, 1, 0)
    obs = np.array([500.0, 0.3, -3.0], np.float32)
    assert space.contains(policy(obs)) and policy(np.stack([obs] * 4)).shape == (4, 2)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["agents"][0]
    actor = rlhf.relu_mlp(3, 8, 4)
    actor.load_state_dict({name.removeprefix("actor."): value for name, value in state.items() if name.startswith("actor.")})
    mean = actor(torch.from_numpy(obs))[:2].tanh().detach().numpy()
    np.testing.assert_allclose(policy(obs), space.low + (mean + 1) / 2 * (space.high - space.low), rtol=1e-5)


# ---- Folder and resume -----------------------------------------------------------------------------------------
def broken_off(run_dir, monkeypatch, iterations, **changes):
    """The folder of a run that failed right after so many iterations."""

    def fail():
        raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        after_iteration(patch, SCRIPT, iterations, fail)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(run_dir=run_dir, **changes)
    return next(run_dir.iterdir())


def resume(folder, *more):
    return rlhf.train(rlhf.parse_args(rlhf.Args, ["--resume", str(folder), *more]))


@pytest.mark.parametrize("way", ["sobirl", "pbrl", "ground-truth"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch, way):
    """On a task that after any 32 steps is as it was. The replay is a ring of 70 rows that has gone round, and what the
    broken-off run wrote after its checkpoint must not show."""
    changes = {"env_id": "toy/Clock-v0", "buffer_size": 70, "total_timesteps": 6 * 64, "checkpoint_every": 2}
    changes = WAYS[way] | changes | {"teacher": "mistake"}
    if way == "pbrl":  # its simulator is reset by a generator that cannot be saved; Clock has no randomness
        changes["rollout_length"] = 5
    whole = train(run_dir=tmp_path / "whole", **changes)
    folder = broken_off(tmp_path / "broken", monkeypatch, 5, **changes)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == 4 * 64
    assert resume(folder) == folder
    assert same(learned(whole), learned(folder))
    first, second = (without_time(read_csv(each / "metrics.csv")) for each in (whole, folder))
    assert first == second
    assert not (folder / "replay").exists()
    with pytest.raises(rlhf.BadInput, match="nothing left to do"):
        rlhf.parse_args(rlhf.Args, ["--resume", str(folder)])


def test_two_resumes_agree(tmp_path, monkeypatch):
    folder = broken_off(tmp_path, monkeypatch, 3, **WAYS["hpgd"])
    copies = [shutil.copytree(folder, tmp_path / name) for name in ("one", "two")]
    for copy in copies:
        resume(copy)
    assert same(*(learned(copy) for copy in copies))


def test_a_rarer_checkpoint_after_resume_still_comes_before_the_spare_rows_are_used(tmp_path, monkeypatch):
    changes = {"buffer_size": 70, "total_timesteps": 8 * 64, "checkpoint_every": 2, "reward_update": "frozen"}
    folder, saved = broken_off(tmp_path, monkeypatch, 3, **changes), []
    original = rlhf.Run.save_checkpoint
    monkeypatch.setattr(rlhf.Run, "save_checkpoint", lambda run, state: saved.append(run.global_step) or original(run, state))
    resume(folder, "--checkpoint-every", "1000")
    assert saved and max(np.diff([128, *saved])) <= 3 * 64 and max(saved) >= 6 * 64


def test_a_killed_process_can_be_resumed(tmp_path):
    process = start(SCRIPT, words(run_dir=tmp_path, total_timesteps=64 * 100_000, checkpoint_every=1))
    try:
        wait_for(process, lambda: next(iter(tmp_path.glob("*/checkpoint.pt")), None))
    finally:
        process.kill()
        process.wait()
    folder = next(tmp_path.iterdir())
    assert (folder / rlhf.REPLAY_FILE).exists()
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"]
    with pytest.MonkeyPatch.context() as patch:
        after_iteration(patch, SCRIPT, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            resume(folder)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == step + 64


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    after_iteration(monkeypatch, SCRIPT, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train(run_dir=tmp_path, checkpoint_every=1000)
    folder = next(tmp_path.iterdir())
    assert stop.value.code == 128 + signal.SIGTERM
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] == 128
    assert (folder / rlhf.REPLAY_FILE).exists()


def test_resume_refuses_another_algorithm_and_a_lost_replay(tmp_path, monkeypatch):
    folder = broken_off(tmp_path, monkeypatch, 2)
    with pytest.raises(rlhf.BadInput, match="--reward-update is drlhf, but the run to --resume has sobirl"):
        rlhf.parse_args(rlhf.Args, ["--resume", str(folder), "--reward-update", "drlhf"])
    path = folder / rlhf.REPLAY_FILE
    content = path.read_bytes()
    for damage in (content[:-4], content[:-28], content[: len(content) // 28 // 20 * 28], None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(rlhf.BadInput, match="replay/transitions.f32 is missing or damaged"):
            resume(folder)
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"


# ---- Bad input -------------------------------------------------------------------------------------------------
def test_every_number_states_its_interval_and_is_refused_outside(monkeypatch):
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    found = numbers(SCRIPT)
    rlhf.check_ranges(rlhf.Args())
    assert {"fragment_length", "gamma", "label_budget", "pbrl_penalty"} <= found.keys()
    for name, (annotation, interval) in found.items():
        assert interval is not None, name
        outside, inside = ends(annotation, interval)
        for value in [*outside, math.nan]:
            with pytest.raises(rlhf.BadInput, match=re.escape(f"{flag(name)} is {value}, it must be in")):
                rlhf.check_ranges(dataclasses.replace(rlhf.Args(), **{name: value}))
        for value in inside:
            rlhf.check_ranges(dataclasses.replace(rlhf.Args(), **{name: value}))


@pytest.mark.parametrize(
    "changes, named",
    [({"env_id": "Hoper-v4"}, "Hopper-v4"), ({"env_id": "toy/MatrixActions-v0"}, "action space"),
     ({"env_id": "toy/DiscreteActions-v0"}, "a flat, bounded Box"), ({"env_id": "toy/SequenceObs-v0"}, "--env-id"),
     ({"total_timesteps": 10}, "at least 64"), ({"env_backend": "envpool"}, "--env-backend envpool"),
     ({"fragment_length": 33}, "--fragment-length 33"), ({"gamma": 1}, "--gamma is 1.0"),
     ({"implicit": "rollouts", "implicit_pairs": "queue"}, "--implicit-pairs queue"),
     ({"implicit": "rollouts"}, "--implicit rollouts needs a MuJoCo task"),
     ({"reward_update": "hpgd-style"}, "--reward-update hpgd-style needs a MuJoCo task"),
     ({"reward_update": "drlhf", "permute_cross_entropy": True}, "--permute-cross-entropy"),
     ({"implicit_pairs": "queue", "permute_cross_entropy": True}, "--implicit-pairs queue must be left out"),
     ({"reward_update": "drlhf", "implicit": "rollouts"}, "--implicit and --implicit-pairs"),
     ({"reward_update": "pbrl-style", "implicit_pairs": "queue"}, "--implicit-pairs"), ({"terminate": False}, "--no-terminate"),
     ({"terminate": False, "env_id": PENDULUM, "num_envs": 2}, "--no-terminate"),
     ({"terminate": False, "env_id": PENDULUM, "num_envs": 1, "num_steps": 64}, "--no-terminate"),
     ({"buffer_size": 10**15, "total_timesteps": 10**15}, "--buffer-size needs")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(command_line, toy_envs, tmp_path, changes, named):
    status, _, err = command_line(SCRIPT, *words(run_dir=tmp_path / "runs", **changes))
    assert_one_sentence(status, err, named)
    assert not (tmp_path / "runs").exists()


def test_words_that_cannot_be_parsed(command_line, tmp_path):
    status, _, err = command_line(SCRIPT, "--run-dir", tmp_path / "runs", "--reward-update", "trex")
    assert status == 2 and "--reward-update" in err and "Traceback" not in err and not (tmp_path / "runs").exists()


def test_help_shows_every_argument_and_its_line(command_line):
    status, out, err = command_line(SCRIPT, "--help")
    assert status in (0, None) and err == ""
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for field in dataclasses.fields(rlhf.Args):
        assert re.search(rf"{flag(field.name)}\b", shown), field.name


# ---- Style -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("terminate", "settings"), [(True, {}), (False, {"terminate_when_unhealthy": False})])
def test_the_film_ends_where_the_training_episodes_did(tmp_path, monkeypatch, terminate, settings):
    def make(env_id, render_mode, **given):
        assert (env_id, render_mode, given) == ("Hopper-v4", "rgb_array", settings)
        raise StopIteration

    monkeypatch.setattr(rlhf.gym, "make", make)
    with pytest.raises(StopIteration):
        rlhf.film("Hopper-v4", tmp_path / "model.pt", tmp_path, 0, terminate)


def test_the_script_documents_itself_and_stands_alone():
    style.test_every_public_function_and_class_has_a_docstring(SCRIPT)
    style.test_docstring_names_a_command_that_runs_this_script(SCRIPT)
    style.test_no_script_imports_another(SCRIPT)
    assert (REPO / SCRIPT).samefile(rlhf.__file__)


# ---- Speed -----------------------------------------------------------------------------------------------------
def test_the_reference_of_the_speed_module_trains(monkeypatch):
    """Three turns of 30 steps, of which the first is random."""
    from benchmark import speed_sobirl

    monkeypatch.setattr(speed_sobirl, "STEPS", 30)
    monkeypatch.setattr(speed_sobirl, "RANDOM_TURNS", 1)
    turns = []

    def rollout_done(seconds):
        turns.append(seconds)
        if len(turns) == 3:
            raise StopIteration

    with pytest.raises(StopIteration):
        speed_sobirl.reference_loop("Hopper-v4", 1, rollout_done)
    assert all(each["env"] > 0 and each["update"] > 0 for each in turns)


# ---- Learning --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("method", ["ground-truth", "sobirl", "drlhf"])
def test_learns_to_balance_the_pendulum(tmp_path, method):
    """A random policy stays up for about 6 steps. The reward is 1 a step, so pairs of fragments tie: what a learned reward can
    know here is little, and only ground truth is held to a level."""
    argv = ["--env-id", "InvertedPendulum-v4", "--reward-update", method, "--total-timesteps", "12000", "--num-steps", "1000"]
    argv += ["--learning-starts", "1000", "--fragment-length", "4", "--device", "cpu", "--run-dir", str(tmp_path)]
    folder = rlhf.train(rlhf.parse_args(rlhf.Args, argv))
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and (result["final_return"] > 100 or method != "ground-truth")
