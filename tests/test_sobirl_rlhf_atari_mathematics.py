"""The mathematics of sobirl_rlhf_atari.py in float64: discrete SAC against sums over actions, (12) + (13) against the gradients of
single rewards, one update and one reward update of a run against slow ones, replay and fragments against the games' images."""

import contextlib
import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from test_sobirl_rlhf_atari import few_channels, train  # noqa: F401

import sobirl_rlhf_atari as rlhf

ACTIONS = 3


@pytest.fixture
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(found, expected, tolerance=1e-12):
    """Equal relative to the largest entry; refuses to compare with nothing but zeros."""
    assert found.shape == expected.shape and expected.abs().max() > 1e-9
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- Discrete SAC ----------------------------------------------------------------------------------------------
def dense_values(values, logits, alpha):
    """V(s) by the definition: probabilities from exponentials, state by state, action by action."""
    found = []
    for b in range(logits.shape[0]):
        weights = [math.exp(x) for x in logits[b].tolist()]
        probabilities = [w / sum(weights) for w in weights]
        total = 0.0
        for a, p in enumerate(probabilities):
            total += p * (min(values[0, b, a].item(), values[1, b, a].item()) - alpha * math.log(p))
        found.append(total)
    return found


def test_soft_values_and_targets(float64):
    values, logits, alpha = torch.randn(2, 4, ACTIONS), torch.randn(4, ACTIONS), torch.tensor(0.3)
    dense = dense_values(values, logits, 0.3)
    assert rlhf.soft_values(values, logits, alpha).tolist() == pytest.approx(dense, rel=1e-12)
    rewards, terminated = torch.randn(4), torch.tensor([0.0, 1.0, 0.0, 1.0])
    found = rlhf.critic_targets(rewards, terminated, torch.tensor(dense), 0.9)
    expected = [r + (0.0 if end else 0.9 * v) for r, end, v in zip(rewards.tolist(), terminated.tolist(), dense)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_soft_values_are_largest_at_the_softmax_of_the_smaller_values(float64):
    """There V = alpha log sum exp(Q / alpha) (eq. 7); any other policy has less."""
    values, alpha = torch.randn(2, 5, ACTIONS), torch.tensor(0.7)
    smaller = torch.minimum(*values)
    best = rlhf.soft_values(values, smaller / alpha, alpha)
    close(best, alpha * (smaller / alpha).logsumexp(-1))
    assert (rlhf.soft_values(values, smaller / alpha + 0.3 * torch.randn(5, ACTIONS), alpha) < best).all()


def test_losses(float64):
    values, logits = torch.randn(2, 4, ACTIONS, requires_grad=True), torch.randn(4, ACTIONS, requires_grad=True)
    actions, targets, alpha = torch.tensor([0, 2, 1, 1]), torch.randn(4), torch.tensor(0.3)
    errors = [[(values[j, b, a].item() - targets[b].item()) ** 2 for b, a in enumerate(actions.tolist())] for j in range(2)]
    assert rlhf.critic_loss(values, actions, targets).item() == pytest.approx(sum(map(sum, errors)) / 4, rel=1e-12)
    loss = rlhf.actor_loss(values, logits, alpha)
    assert loss.item() == pytest.approx(-sum(dense_values(values, logits, 0.3)) / 4 / ACTIONS, rel=1e-12)
    gradients = torch.autograd.grad(loss, [values, logits], allow_unused=True)
    assert gradients[0] is None  # through the policy alone
    step = 1e-6 * torch.randn(4, ACTIONS)
    change = [-sum(dense_values(values, logits + sign * step, 0.3)) / 4 / ACTIONS for sign in (1, -1)]
    assert (gradients[1] * step).sum().item() == pytest.approx((change[0] - change[1]) / 2, rel=1e-6)


def test_temperature_loss(float64):
    """Its derivative has the sign of the entropy's excess over the target; nothing flows into the policy."""
    log_alpha, entropies = torch.tensor(-0.7, requires_grad=True), torch.rand(6, requires_grad=True)
    loss = rlhf.temperature_loss(log_alpha, entropies, 0.89, ACTIONS)
    expected = math.exp(-0.7) * (sum(entropies.tolist()) / 6 - 0.89 * math.log(3)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(expected, rel=1e-12) and entropies.grad is None


class Fixed(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_an_action_is_a_draw_of_the_softmax():
    torch.manual_seed(0)
    agent, n, obs = rlhf.Agent(4).requires_grad_(False), 800, torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8)
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    agent.actor = Fixed(logits)
    for drawn in (agent.act(obs.expand(n, -1, -1, -1), rlhf.gumbel(n, 4)), agent(obs.flatten(1).expand(n, -1))):
        found, expected = drawn.bincount(minlength=4) / n, logits.softmax(-1)
        assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / n).sqrt()).all()
    assert agent(obs[0]).shape == agent(obs[0].flatten()).shape == ()


def test_one_update_is_the_slow_one(few_channels, tmp_path, monkeypatch):  # noqa: F811
    """Line by line: log of softmax, a loop over the critics, Adam without fusing. The minibatch has terminations."""
    seen, sample = [], rlhf.Replay.sample

    def spy(replay, count):
        names = inspect.currentframe().f_back.f_locals
        batch = sample(replay, count)
        batch[3][::2] = 1.0
        if len(seen) < 2:
            seen.append((*(copy.deepcopy(names[name]) for name in ("agent", "model")), [each.clone() for each in batch]))
        return batch

    monkeypatch.setattr(rlhf.Replay, "sample", spy)
    train(run_dir=tmp_path, reward_update="frozen", alpha=0.7, learning_rate=1e-3, anneal_steps=math.inf, target_frequency=10**6)
    (agent, model, (frames, actions, _, terminated)), (after, *_) = seen[:2]
    with torch.no_grad():
        for target in agent.targets.parameters():
            target.copy_(target)
        obs, following = frames[:, :4] / 255, frames[:, 1:] / 255
        rewards = torch.stack([model(image[None])[0, a] for image, a in zip(obs, actions)])
        policy = torch.softmax(agent.actor(following), -1)
        values = torch.minimum(agent.targets[0](following), agent.targets[1](following))
        ahead = (policy * (values - 0.7 * torch.log(policy))).sum(1)
        targets = rewards + 0.99 * (1 - terminated) * ahead
    rows, loss = torch.arange(len(actions)), 0.0
    for critic in agent.critics:
        loss = loss + nn.functional.mse_loss(critic(obs)[rows, actions], targets)
    policy = torch.softmax(agent.actor(obs), -1)
    smaller = torch.minimum(agent.critics[0](obs), agent.critics[1](obs)).detach()
    loss = loss + (policy * (0.7 * torch.log(policy) - smaller)).mean()
    target = 0.89 * math.log(policy.shape[1])
    loss = loss + (policy.detach() * -agent.log_alpha.exp() * (torch.log(policy) + target).detach()).mean()
    parameters = [*agent.actor.parameters(), *agent.critics.parameters(), agent.log_alpha]
    before = [each.detach().clone() for each in parameters]
    optimiser = torch.optim.Adam(parameters, 1e-3, eps=1e-4)
    loss.backward()
    optimiser.step()
    found = [*after.actor.parameters(), *after.critics.parameters(), after.log_alpha]
    for was, expected, new in zip(before, parameters, found):
        assert torch.allclose(new, expected, atol=2e-6)
        assert (expected - was).abs().max() > 1e-4  # it moves


# ---- Reward updates --------------------------------------------------------------------------------------------
PAIRS, LENGTH = 3, 2


@pytest.fixture
def tiny(float64):
    """A tiny reward CNN, pairs of fragments, labels, policy, and r and grad r (n,) of any image and action, one by one."""

    class Tiny:
        model = rlhf.RewardNetwork(ACTIONS, channels=2).eval()
        frames = torch.randint(0, 256, (PAIRS, 2, LENGTH + 3, 84, 84), dtype=torch.uint8)
        actions = torch.randint(ACTIONS, (PAIRS, 2, LENGTH))
        logits, labels, c = torch.randn(PAIRS, 2, LENGTH, ACTIONS), torch.tensor([1.0, 0.0, 0.5]), 3.0
        parameters = list(model.parameters())

        def gradient(self, loss):
            return torch.cat([each.flatten() for each in torch.autograd.grad(loss, self.parameters, allow_unused=False)])

        def r(self, i, j, t, a):
            return self.model(self.frames[i, j, t : t + 4][None] / 255)[0, a]

        def l_and_gradient(self, i):
            steps = [[self.r(i, j, t, self.actions[i, j, t]) for t in range(LENGTH)] for j in range(2)]
            p, y = 1 / (1 + math.exp((sum(steps[1]) - sum(steps[0])).item())), self.labels[i].item()
            grads = [sum(self.gradient(r) for r in fragment) for fragment in steps]
            return -y * math.log(p) - (1 - y) * math.log(1 - p), (p - y) * (grads[0] - grads[1])

        def advantage_gradient(self, i, j, t):
            """grad r(s, a) - sum_b pi(b|s) grad r(s, b)."""
            policy = self.logits[i, j, t].exp() / self.logits[i, j, t].exp().sum()
            average = sum(policy[b] * self.gradient(self.r(i, j, t, b)) for b in range(ACTIONS))
            return self.gradient(self.r(i, j, t, self.actions[i, j, t])) - average

    with torch.no_grad():  # statistics that are not those of a fresh network
        tiny = Tiny()
        tiny.model.train()(tiny.frames[:, 0, :4] / 255)
        tiny.model.eval()
    return tiny


@pytest.mark.parametrize("baseline", [False, True])
def test_sobirl_follows_both_terms(tiny, baseline):
    rewards = rlhf.outputs(tiny.model, rlhf.stacks(tiny.frames))
    losses = rlhf.cross_entropies(rlhf.taken(rewards, tiny.actions), tiny.labels)
    scores = rlhf.one_step_advantages(rewards, tiny.actions, tiny.logits).sum((1, 2))
    found = tiny.gradient(losses.mean() + rlhf.implicit_term(losses, scores, tiny.c, baseline).mean())
    by_hand = [tiny.l_and_gradient(i) for i in range(PAIRS)]
    expected = 0.0
    for i, (value, gradient) in enumerate(by_hand):
        others = sum(other for k, (other, _) in enumerate(by_hand) if k != i) / (PAIRS - 1) if baseline else 0.0
        score = sum(tiny.advantage_gradient(i, j, t) for j, t in itertools.product(range(2), range(LENGTH)))
        expected = expected + (gradient + tiny.c * (value - others) * score) / PAIRS
    close(found, expected)
    explicit = sum(gradient for _, gradient in by_hand) / PAIRS
    rewards = rlhf.outputs(tiny.model, rlhf.stacks(tiny.frames))
    close(tiny.gradient(rlhf.cross_entropies(rlhf.taken(rewards, tiny.actions), tiny.labels).mean()), explicit)
    assert (expected - explicit).norm() > 0.05 * explicit.norm()  # (13) is not negligible


def test_one_step_advantages_have_mean_zero_under_the_policy(float64):
    rewards, logits = torch.randn(5, ACTIONS), torch.randn(5, ACTIONS)
    each = torch.stack([rlhf.one_step_advantages(rewards, torch.full((5,), a), logits) for a in range(ACTIONS)], -1)
    assert ((each * logits.softmax(-1)).sum(-1).abs() < 1e-14).all() and each.abs().max() > 0.1
    same = torch.randn(5, 1).expand(5, ACTIONS)
    assert rlhf.one_step_advantages(same, torch.zeros(5, dtype=torch.long), logits).abs().max() < 1e-14


@pytest.mark.parametrize("pairs, times", [("newest", 2), ("newest-every-step", 2 + 3)])
def test_an_iteration_adds_the_term_of_the_newest_pairs(few_channels, tmp_path, monkeypatch, pairs, times):  # noqa: F811
    """The gradient that a run adds in its first minibatch, or in every one, against (13) of the pairs of that iteration, by the
    network in evaluation mode; the one that it is added to, against the cross-entropy in training mode."""
    seen, original = [], rlhf.limited_sum

    def spy(gradients, added, limit):
        names = inspect.currentframe().f_back.f_locals
        kept = {name: copy.deepcopy(names[name]) for name in ("agent", "model", "queue", "fresh", "mb", "weight")}
        seen.append((kept, gradients, added))
        return original(gradients, added, limit)

    monkeypatch.setattr(rlhf, "limited_sum", spy)
    train(run_dir=tmp_path, reward_dropout=0.0, alpha=0.5, implicit_pairs=pairs)
    assert len(seen) == times  # of two iterations that learn, from 16 and 20 pairs in minibatches of 8
    kept, gradients, added = seen[-1]
    agent, model, weight = kept["agent"], kept["model"], kept["weight"]
    assert weight == pytest.approx(1 / agent.log_alpha.exp().item(), rel=1e-6)
    assert kept["fresh"] == 4 and len(kept["queue"]) == 20

    def columns(pairs):
        frames, actions, labels = (torch.stack(column) for column in zip(*pairs))
        obs = torch.stack([frames[:, :, t : t + 4] for t in range(actions.shape[-1])], 2) / 255
        return obs, actions, labels

    def sums(network, obs, actions):
        out = network(obs.flatten(0, 2)).view(*actions.shape, -1)
        return out, out.gather(-1, actions[..., None])[..., 0]

    obs, actions, labels = columns(kept["queue"][16:])
    rewards, chosen = sums(model.eval(), obs, actions)
    p = torch.sigmoid(chosen[:, 0].sum(-1) - chosen[:, 1].sum(-1))
    losses = nn.functional.binary_cross_entropy(p, labels, reduction="none").detach()
    baseline = (losses.sum() - losses) / 3
    with torch.no_grad():
        policy = sums(agent.actor, obs, actions)[0].softmax(-1)
    scores = (chosen - (policy * rewards).sum(-1)).sum((1, 2))
    term = (weight * (losses - baseline) * scores).mean()
    for found, expected in zip(added, torch.autograd.grad(term, list(model.parameters()))):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert max(each.abs().max() for each in added) > 1e-4
    obs, actions, labels = columns(kept["mb"])
    _, chosen = sums(model.train(), obs, actions)
    p = torch.sigmoid(chosen[:, 0].sum(-1) - chosen[:, 1].sum(-1))
    loss = nn.functional.binary_cross_entropy(p, labels)
    for found, expected in zip(gradients, torch.autograd.grad(loss, list(model.parameters()))):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


# ---- Replay and fragments --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def played():
    """400 random steps of two games of Seaquest, rows as the games gave them: observation, action, reward, terminated, next
    observation, valid; and a replay of 150 steps of them, which has gone round."""
    args = rlhf.Args(env_id="Seaquest-v5", env_threads=1)
    envs, rng, rows = rlhf.make_envs(args, 2, 3), np.random.default_rng(0), []
    obs, none = envs.reset()[0].copy(), np.zeros(2)
    replay, ended, over = rlhf.Replay(150, 2), np.zeros(2, bool), np.zeros(2, bool)
    replay.add(none, none, none, none, obs, ~ended)
    for _ in range(400):
        actions = rng.integers(0, 18, 2)
        images, reward, ends, cut, info = envs.step(actions)
        reward = reward + rng.normal(size=2)  # so that rows differ
        replay.add(actions, reward, ends, ~ended, images, over)
        rows.append((obs, actions, reward, ends, images.copy(), ~ended))
        obs, ended, over = images.copy(), ends | cut, (info["terminated"] != 0) | cut
    envs.close()
    return replay, rows


def test_minibatches_are_transitions_of_the_games(played):
    """Observation and next observation pixel by pixel, across lost lives and new games; no reset, nothing overwritten."""
    replay, rows = played
    valid = np.array([row[5] for row in rows])
    assert replay.transitions == valid.sum() and (~valid).sum() > 3
    expected = {}
    for obs, actions, reward, ends, following, transition in rows[-150:]:
        for n in np.flatnonzero(transition):
            expected[np.float32(reward[n]).item()] = obs[n], actions[n], ends[n], following[n]
    torch.manual_seed(0)
    frames, actions, rewards, terminated = replay.sample(4000)
    assert set(rewards.tolist()) == set(expected)  # all of them and no other
    for frame, action, reward, end in list(zip(frames, actions, rewards, terminated))[:600]:
        obs, real_action, real_end, following = expected[reward.item()]
        assert np.array_equal(frame[:4], obs) and np.array_equal(frame[1:], following)
        assert action == real_action and end == real_end
    assert 0 < terminated.sum() < 4000 and frames.dtype == torch.uint8


def test_fragments_are_the_observations_of_consecutive_steps(played):
    replay, rows = played
    first = replay.added - 140
    valid = replay.valid[torch.arange(first, replay.added) % replay.size]
    windows = rlhf.fragment_windows(valid.float(), 6)
    assert len(windows) > 200
    games = set()
    for t, n in windows.tolist()[::3]:
        stack = rlhf.stacks(replay.history(torch.tensor(first + t), torch.tensor(n), 9))
        for k in range(6):
            assert np.array_equal(stack[k], rows[first + t + k - 1][0][n])  # row 0 of the replay is no step
        games.add(int(replay.ages[(first + t) % replay.size, n]))
    assert 3 in games


def test_a_loaded_replay_is_the_one_that_was_saved(played):
    """Also in a ring of another size, as far as it has room."""
    replay, _ = played
    drawn = []
    for size in (150, 170, 90):
        other = rlhf.Replay(size, 2)
        other.load_state_dict(copy.deepcopy(replay.state_dict()))
        assert other.added == replay.added and other.transitions == replay.transitions
        torch.manual_seed(0)
        drawn.append(other.sample(50))
    torch.manual_seed(0)
    expected = replay.sample(50)
    assert all(torch.equal(*pair) for pair in zip(drawn[0], expected))
    known = set(replay.sample(3000)[2].tolist())
    assert all(set(each[2].tolist()) <= known for each in drawn)
    young = rlhf.Replay(150, 2)  # not yet full: its file has no empty rows
    young.add(*[np.zeros(2)] * 4, np.zeros((2, 4, 84, 84), np.uint8), np.ones(2, bool))
    state = young.state_dict()
    assert len(state["columns"][0]) == 2 and state["columns"][0].untyped_storage().nbytes() == 2 * 2 * 84 * 84


def test_the_room_that_is_stated_is_taken(capsys, tmp_path):
    """A million transitions below 8 GB, said before they are allocated."""
    args = rlhf.Args(run_dir=tmp_path, buffer_size=3000, num_steps=100, queue_size=50)
    replay = rlhf.Replay(3000, 1)
    real = sum(column.numel() * column.element_size() for column in replay.columns)
    assert abs(real / (3004 * (84 * 84 + 8)) - 1) < 1e-3
    rlhf.check_room(args)
    assert "memory: 0.0 GB for the replay, up to 0.0 GB" in capsys.readouterr().err
    million = 1_000_004 * real / 3004
    assert 7.0e9 < million < 8e9


def test_the_room_is_said_or_refused(capsys, monkeypatch):
    args = rlhf.Args()
    needed = 1_000_004 * (84 * 84 + 8) + 3000 * 2 * 28 * 84 * 84
    for memory in (needed - 1, needed):
        monkeypatch.setattr(rlhf.os, "sysconf", lambda word: memory if word == "SC_PHYS_PAGES" else 1)
        with pytest.raises(rlhf.BadInput, match="--buffer-size: ") if memory < needed else contextlib.nullcontext():
            rlhf.check_room(args)
        assert "7.1 GB for the replay, up to 1.2 GB for labelled pairs" in capsys.readouterr().err
