"""sobirl_rlhf.py: a given reward network, ensembles and the choice of pairs by their disagreement, episodes that end early."""

import json
import shutil
from pathlib import Path

import pytest
import sobirl_rlhf as rlhf
import torch
from test_command_line import assert_one_sentence
from test_sobirl_rlhf import SCRIPT, flat, same, train, words

SMOOTH = {"env_id": "InvertedPendulum-v4", "num_envs": 1, "num_steps": 64}  # the numbers of Walk saturate tanh


def reward_of(folder) -> dict:
    """The reward network of the last checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["reward"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a run of drlhf. Read only."""
    return train(run_dir=tmp_path_factory.mktemp("run"), reward_update="drlhf")


def test_a_given_reward_network_stays_and_is_what_the_policy_is_paid_by(learned, tmp_path):
    model = learned / "checkpoint.pt"
    folder = train(run_dir=tmp_path, reward_update="frozen", reward_model=model, seed=7)
    assert same(flat(reward_of(folder)), flat(reward_of(learned)))
    other = train(run_dir=tmp_path, reward_update="frozen", seed=7)
    agents = [flat(torch.load(each / "checkpoint.pt", weights_only=True)["agent"]) for each in (folder, other)]
    assert not same(*agents)


def test_a_given_reward_network_is_where_learning_starts(learned, tmp_path):
    changes = {"run_dir": tmp_path, "reward_update": "drlhf", "reward_model": learned / "checkpoint.pt", "seed": 7}
    still = train(**changes, reward_learning_rate=1e-12)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(flat(reward_of(still)), flat(reward_of(learned))))
    assert not same(flat(reward_of(train(**changes))), flat(reward_of(learned)))


def test_a_reward_network_of_another_task_is_refused(learned, tmp_path):
    """Walk's and Clock's networks have one shape."""
    changes = {"reward_update": "frozen", "reward_model": learned / "checkpoint.pt", "env_id": "toy_envs:toy/Clock-v0"}
    with pytest.raises(rlhf.BadInput, match="--reward-model .*the network is of"):
        train(run_dir=tmp_path / "runs", **changes)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_resumed_without_the_reward_network_that_it_started_from(learned, tmp_path):
    model = shutil.copy(learned / "checkpoint.pt", tmp_path / "model.pt")
    folder = train(run_dir=tmp_path / "runs", reward_update="drlhf", reward_model=Path(model))
    Path(model).unlink()
    steps = 2 * json.loads((folder / "result.json").read_text())["global_step"]
    rlhf.train(rlhf.parse_args(["--resume", str(folder), "--total-timesteps", str(steps)]))
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and result["global_step"] == steps


def test_the_reward_of_an_ensemble_is_the_mean_and_its_disagreement_the_spread_of_the_probabilities():
    torch.manual_seed(1)
    members = [rlhf.RewardNetwork(5, 4).double() for _ in range(3)]
    pairs = torch.randn(7, 2, 6, 5, dtype=torch.float64)
    rewards = [member(pairs) for member in members]
    assert torch.allclose(rlhf.RewardEnsemble(members)(pairs), sum(rewards) / 3)
    for p in range(7):
        chances = [1 / (1 + torch.exp(each[p, 1].sum() - each[p, 0].sum())) for each in rewards]
        mean = sum(chances) / 3
        spread = (sum((each - mean) ** 2 for each in chances) / 2) ** 0.5
        assert rlhf.disagreement([each.sum(-1) for each in rewards])[p].item() == pytest.approx(spread.item(), rel=1e-12)


def test_each_member_of_an_ensemble_learns_from_its_own_cross_entropy(tmp_path, monkeypatch):
    """Not from that of the mean, with which one member would stop when the other is right."""
    learned_from, original = [], rlhf.cross_entropies

    def record(rewards, labels):
        if rewards.requires_grad:
            learned_from.append(rewards.detach().clone())
        return original(rewards, labels)

    monkeypatch.setattr(rlhf, "cross_entropies", record)
    folder = train(run_dir=tmp_path, reward_update="drlhf", reward_ensemble=2, total_timesteps=128, warmup_epochs=2, **SMOOTH)
    assert len(learned_from) == 2 * 2 * 2 + 2 * 2  # 12 pairs in minibatches of 8, two passes, two members; then 16 once
    assert all(not torch.allclose(a, b) for a, b in zip(learned_from[::2], learned_from[1::2]))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    inputs = checkpoint["queue"]["columns"][0]
    members = [rlhf.RewardNetwork(inputs.shape[-1], 6) for _ in range(2)]
    rlhf.RewardEnsemble(members).load_state_dict(checkpoint["reward"])
    assert abs(members[0](inputs) - members[1](inputs)).max() > 0.01


def test_the_teacher_is_asked_about_the_pairs_on_which_the_members_disagree_most(tmp_path, monkeypatch):
    drawn, asked, original = [], [], rlhf.draw_pairs

    def draw(windows, count, *rest):
        drawn.append((count, original(windows, count, *rest)))
        return drawn[-1][1]

    monkeypatch.setattr(rlhf, "draw_pairs", draw)
    measure, add = rlhf.disagreement, rlhf.Ring.add

    def record(ring, *columns):
        if columns[0].dim() == 4:
            asked.append(columns[0])
        add(ring, *columns)

    doubts = []
    monkeypatch.setattr(rlhf, "disagreement", lambda *each: doubts.append(measure(*each)) or doubts[-1])
    monkeypatch.setattr(rlhf.Ring, "add", record)
    train(run_dir=tmp_path, reward_update="drlhf", reward_ensemble=2, reward_candidates=3, **SMOOTH)
    candidates = [found for count, found in drawn[1::2]]
    assert [count for count, _ in drawn[1::2]] == [3 * 12, 3 * 4, 3 * 4, 3 * 4] and len(asked) == 4
    for found, pairs, spread in zip(candidates, asked, doubts, strict=True):
        best = spread.argsort(descending=True)[: len(pairs)]
        assert len(pairs) * 3 == len(spread) and torch.equal(pairs, found[0][best])


@pytest.mark.parametrize("update, warns", [("drlhf", True), ("constant", True), ("ground-truth", False)])
def test_a_task_whose_episodes_end_early_is_warned_of(command_line, tmp_path, update, warns):
    changes = {"env_id": "Hopper-v4", "total_timesteps": 128, "reward_update": update, "run_dir": tmp_path}
    _, _, err = command_line(SCRIPT, *words(**changes))
    assert err.count("episodes end early here") == warns and ("--no-terminate" in err) == warns


def test_no_terminate_lets_falls_go_on(command_line, tmp_path):
    changes = {"env_id": "Hopper-v4", "total_timesteps": 128, "reward_update": "drlhf", "run_dir": tmp_path}
    _, _, err = command_line(SCRIPT, *words(**changes, terminate=False, env_kwargs='{"ctrl_cost_weight": 1.0}'))
    assert "end early" not in err
    (folder,) = tmp_path.iterdir()
    kwargs = json.loads(json.loads((folder / "args.json").read_text())["args"]["env_kwargs"])
    assert kwargs == {"ctrl_cost_weight": 1.0, "terminate_when_unhealthy": False}
    assert not torch.load(folder / "checkpoint.pt", weights_only=True)["replay"]["columns"][3].any()
    status, _, err = command_line(SCRIPT, "--resume", folder, "--terminate")
    assert status == 2 and "--env-kwargs has terminate_when_unhealthy false: remove it" in err
    status, _, err = command_line(SCRIPT, "--resume", folder, "--terminate", "--env-kwargs", "{}", "--total-timesteps", 256)
    assert status == 0 and "--terminate was False and is now True" in err
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["replay"]["columns"][3].any()


@pytest.mark.parametrize(
    "changes, named",
    [({"labels": "labels.jsonl"}, "--labels: a file has no newest pairs, as sobirl needs"),
     ({"labels": "none/labels.jsonl", "reward_update": "drlhf"}, "--labels none/labels.jsonl"),
     ({"reward_model": "none.pt", "reward_update": "frozen"}, "--reward-model none.pt"),
     ({"reward_candidates": 2}, "--reward-candidates: one network cannot disagree"), ({"reward_ensemble": 0}, "--reward-ensemble is"),
     ({"teacher": "human"}, "--teacher human needs a MuJoCo task"), ({"terminate": False}, "terminate_when_unhealthy")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(command_line, toy_envs, tmp_path, changes, named):
    status, _, err = command_line(SCRIPT, *words(run_dir=tmp_path / "runs", **changes))
    assert_one_sentence(status, err, named)
    assert not (tmp_path / "runs").exists()
