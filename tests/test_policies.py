"""The policies: log-probabilities, entropies, samples and the actions of the task, against torch.distributions."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from test_hypergradient import policy_of

DOUBLE = torch.float64
SPACES = {
    "continuous": gym.spaces.Box(np.array([-0.5, -1.0, -9.0], np.float32), np.array([0.5, 0.2, 9.0], np.float32)),
    "discrete": gym.spaces.Discrete(4, start=-2),
}


def random_agent(kind):
    """An agent whose policy is neither uniform nor centred, with the action space of its task."""
    torch.manual_seed(0)
    agent = importlib.import_module(f"ppo_{kind}").Agent(5, gym.spaces.flatdim(SPACES[kind]), 16, 8)
    agent.set_action_space(SPACES[kind])
    with torch.no_grad():
        for parameter in agent.actor_parameters():
            parameter.normal_(std=0.4)
    return agent


@pytest.mark.parametrize("kind", SPACES)
def test_logprob_and_entropy_are_those_of_torch_distributions_and_so_are_their_gradients(kind):
    agent, obs = random_agent(kind).double(), torch.randn(7, 3, 5, dtype=DOUBLE)
    expected = policy_of(agent, obs)
    actions, cotangent = expected.sample(), torch.randn(7, 3, dtype=DOUBLE)
    pairs = zip(agent.logprob_and_entropy(obs, actions), (expected.log_prob(actions), expected.entropy()))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-12)
        how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        gradients = [torch.autograd.grad((cotangent * x).sum(), agent.actor_parameters(), **how) for x in (ours, theirs)]
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients))
        assert any(gradient.abs().max() > 0 for gradient in gradients[0])


def test_a_policy_that_is_all_but_certain_has_a_finite_entropy_and_gradient():
    agent, logits = random_agent("discrete"), torch.tensor([[0.0, 200.0, -1e4, -1e30]], requires_grad=True)
    agent.actor_logits = nn.Identity()
    logprobs, entropy = agent.logprob_and_entropy(logits, torch.tensor([2]))
    (logprobs + entropy).sum().backward()
    assert entropy == 0 and logprobs == -10_200 and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", SPACES)
def test_samples_follow_the_policy(kind):
    """20,000 of them: means within 4.5 standard errors, deviations within 5 %."""
    agent, n = random_agent(kind), 20_000
    obs = torch.randn(1, 5)
    with torch.no_grad():
        actions, policy = agent.sample(obs.expand(n, 5), agent.noise(n)), policy_of(agent, obs)
    if kind == "discrete":
        expected = policy.probs[0]
        found, spread = torch.bincount(actions, minlength=4) / n, (expected * (1 - expected)).sqrt()
        assert expected.min() > 0.02 and expected.max() - expected.min() > 0.1
    else:
        expected, spread = policy.mean[0], policy.stddev[0]
        found = actions.mean(0)
        assert torch.allclose(actions.std(0), spread, rtol=0.05, atol=0)
        assert abs(torch.corrcoef(actions.T) - torch.eye(3)).max() < 0.03  # no two actions share their noise
    assert ((found - expected).abs() < 4.5 * spread / n**0.5).all()


@pytest.mark.parametrize("kind", SPACES)
def test_each_step_and_environment_has_noise_of_its_own(kind):
    noise = random_agent(kind).noise(6, 3)
    assert noise.shape == (6, 3, gym.spaces.flatdim(SPACES[kind])) and len(noise.unique()) == noise.numel()


@pytest.mark.parametrize("kind", SPACES)
def test_the_task_gets_actions_of_its_own_space(kind):
    """Box actions are clipped to the box, and only there; numbered ones are counted from the first."""
    agent, space = random_agent(kind), SPACES[kind]
    with torch.no_grad():
        actions = agent.sample(torch.randn(200, 5), agent.noise(200))
        sent = agent.task_actions(actions).numpy()
    assert all(space.contains(action) for action in sent)
    expected = actions.numpy().clip(space.low, space.high) if kind == "continuous" else actions.numpy() - 2
    assert np.array_equal(sent, expected)
    assert (sent != actions.numpy()).any() and len(np.unique(sent, axis=0)) >= 4


@pytest.mark.parametrize("kind", SPACES)
def test_the_policy_that_is_played_is_the_mode_at_normalised_observations(kind):
    """Normalised in float64 as in training: far from 0 an observation in float32 has lost what the policy saw. A state dict
    carries all of it."""
    agent, mean, std = random_agent(kind), np.array([1e6, -3.0, 0.0, 2.0, 5.0]), np.array([0.1, 2.0, 1.0, 0.5, 1e-3])
    agent.obs_mean.copy_(torch.from_numpy(mean))
    agent.obs_std.copy_(torch.from_numpy(std))
    raw = mean + std * np.random.default_rng(0).normal(size=(50, 5)) * 6
    obs = np.minimum(np.maximum((raw - mean) / std, -10.0), 10.0).astype(np.float32)
    assert (abs(obs) == 10).any()
    expected = agent.task_actions(policy_of(agent, torch.from_numpy(obs)).mode)
    other = importlib.import_module(f"ppo_{kind}").Agent(5, gym.spaces.flatdim(SPACES[kind]), 16, 8)
    other.load_state_dict(agent.state_dict())
    for each in (agent, other):
        assert torch.equal(each(torch.from_numpy(raw)), expected)
        assert torch.allclose(each(torch.from_numpy(raw[3])), expected[3], rtol=0, atol=1e-6)  # one row alone
    assert len(expected.unique(dim=0)) >= 3


@pytest.mark.parametrize("name", ["ppo_continuous", "ppo_discrete", "blpo_continuous", "blpo_discrete"])
def test_a_fresh_agent_starts_as_the_field_has_it(name):
    """Orthogonal weights with gain sqrt 2, 1 for the value and .01 for the policy, biases 0, deviation 1."""
    agent = importlib.import_module(name).Agent(6, 3, 8, 10)
    networks = agent.critic, getattr(agent, "actor_logits" if "discrete" in name else "actor_mean")
    for network, last_gain in zip(networks, (1.0, 0.01)):
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
            weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            assert torch.allclose(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=0, atol=1e-5 * gain**2)
            assert not layer.bias.any()
    assert {p.shape for p in agent.actor_parameters()} != {p.shape for p in agent.critic.parameters()}
    assert len(agent.actor_parameters()) + len([*agent.critic.parameters()]) == len([*agent.parameters()])
    if "continuous" in name:
        assert torch.equal(agent.actor_logstd, torch.zeros(3))
