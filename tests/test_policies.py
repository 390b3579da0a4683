"""The policies: log-probabilities, entropies, samples and the numbers of actions, against torch.distributions."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load

import ppo_continuous as continuous
import ppo_discrete as discrete

DOUBLE = torch.float64
SPACES = {
    "continuous": gym.spaces.Box(np.array([-0.5, -1.0, -9.0], np.float32), np.array([0.5, 0.2, 9.0], np.float32)),
    "discrete": gym.spaces.Discrete(4, start=-2),
}


def random_agent(kind):
    """An agent whose policy is neither uniform nor centred."""
    torch.manual_seed(0)
    agent = load(f"ppo_{kind}.py").Agent(5, gym.spaces.flatdim(SPACES[kind]), 16, 8)
    with torch.no_grad():
        for parameter in agent.actor_parameters():
            parameter.normal_(std=0.4)
    return agent


def distribution(agent, obs):
    """The policy at obs as torch.distributions has it, of whole actions."""
    if isinstance(agent, discrete.Agent):
        return torch.distributions.Categorical(logits=agent.actor_logits(obs))
    normal = torch.distributions.Normal(agent.actor_mean(obs), agent.actor_logstd.exp())
    return torch.distributions.Independent(normal, 1)


@pytest.mark.parametrize("kind", SPACES)
def test_logprob_and_entropy_are_those_of_torch_distributions_and_so_are_their_gradients(kind):
    agent, obs, weights = random_agent(kind).double(), torch.randn(7, 5, dtype=DOUBLE), torch.rand(7, dtype=DOUBLE)
    weights /= weights.sum()
    expected = distribution(agent, obs)
    actions = expected.sample()
    logprobs, entropy = agent.logprob_and_entropy(obs, actions, weights)
    pairs = [(logprobs.sum(), expected.log_prob(actions).sum()), (entropy, (weights * expected.entropy()).sum())]
    pairs.append((agent.logprob_and_entropy(obs, actions)[1], expected.entropy().mean()))
    assert torch.allclose(logprobs, expected.log_prob(actions), rtol=0, atol=1e-12)
    for ours, theirs in pairs:
        gradients = [
            torch.autograd.grad(x, agent.actor_parameters(), retain_graph=True, allow_unused=True, materialize_grads=True)
            for x in (ours, theirs)
        ]
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients))
    assert torch.equal(agent.mode(obs), expected.mode)


def test_a_policy_that_is_all_but_certain_has_a_finite_entropy_and_gradient():
    logits = torch.tensor([[0.0, 200.0, -1e4]], requires_grad=True)
    logprobs = logits.log_softmax(-1)
    entropy = discrete.categorical_entropy(logprobs).sum()
    (entropy + discrete.categorical_logprob(logprobs, torch.tensor([2])).sum()).backward()
    assert entropy == 0 and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", SPACES)
def test_logprobs_of_a_rollout_are_those_of_the_agent(kind):
    """Kept or known from the noise, without asking the network again; of the actions that `actions` keeps."""
    agent, obs = random_agent(kind), np.random.default_rng(0).normal(size=(6, 3, 5)).astype(np.float32)
    behaviour = load(f"ppo_{kind}.py").BehaviourPolicy(agent, SPACES[kind], (6, 3))
    sent = np.stack([behaviour.act(t, obs[t]) for t in range(6)])
    with torch.no_grad():
        expected, _ = agent.logprob_and_entropy(torch.from_numpy(obs), torch.from_numpy(behaviour.actions))
    assert behaviour.logprobs().shape == (6, 3)
    assert torch.allclose(behaviour.logprobs(), expected, rtol=0, atol=1e-5)
    if kind == "continuous":
        assert np.array_equal(sent, behaviour.actions.clip(SPACES[kind].low, SPACES[kind].high))
        assert (sent != behaviour.actions).any()
    else:
        assert np.array_equal(sent, behaviour.actions - 2)
    assert all(SPACES[kind].contains(action) for action in sent.reshape(-1, *SPACES[kind].shape))


@pytest.mark.parametrize("kind", SPACES)
def test_samples_follow_the_policy(kind):
    """20,000 of them: means within 4.5 standard errors."""
    agent, n = random_agent(kind), 20_000
    obs = torch.randn(1, 5)
    behaviour = load(f"ppo_{kind}.py").BehaviourPolicy(agent, SPACES[kind], (1, n))
    behaviour.act(0, obs.expand(n, 5).numpy())
    actions, policy = behaviour.actions[0], distribution(agent, obs)
    if kind == "discrete":
        expected = policy.probs[0].detach().numpy()
        found, spread = np.bincount(actions, minlength=4) / n, np.sqrt(expected * (1 - expected))
        assert expected.min() > 0.02 and expected.max() - expected.min() > 0.1
    else:
        expected, spread = (x[0].detach().numpy() for x in (policy.mean, policy.stddev))
        found = actions.mean(0)
        assert np.allclose(actions.std(0), spread, rtol=0.05)
    assert (np.abs(found - expected) < 4.5 * spread / np.sqrt(n)).all()
    steps = load(f"ppo_{kind}.py").BehaviourPolicy(agent, SPACES[kind], (n, 1))
    drawn = np.array([steps.act(t, obs.numpy())[0] for t in range(200)])
    assert len(np.unique(drawn, axis=0)) > 2  # each step has noise of its own


@pytest.mark.parametrize("space", [*SPACES.values(), gym.spaces.Discrete(2)])
def test_a_saved_action_space_is_the_same_again(space, tmp_path):
    module = continuous if isinstance(space, gym.spaces.Box) else discrete
    torch.save(module.save_action_space(space), tmp_path / "model.pt")
    assert module.load_action_space(torch.load(tmp_path / "model.pt", weights_only=True)) == space
