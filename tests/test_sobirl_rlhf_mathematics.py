"""The mathematics of sobirl_rlhf.py in float64: the squashed Gaussian, targets, one update against a slow one, each reward
update against its formula, the practical forms of the implicit term on a tabular MDP, teacher, fragments, replay."""

import contextlib
import copy
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import sobirl_rlhf as rlhf
import torch
import torch.nn as nn
from conftest import Reads
from sobirl_tabular import PreferenceLearning, exact_hypergradient, implicit_terms, optimal_soft_values, q_values
from sobirl_tabular import soft_policy_values, trajectory_probabilities, truncated_value_gradients, value_gradients

OBS, ACTIONS = 5, 2


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(found, expected, tolerance=1e-12):
    """Equal relative to the largest entry; refuses to compare with nothing but zeros."""
    assert found.shape == expected.shape and expected.abs().max() > 1e-9
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- The squashed Gaussian -------------------------------------------------------------------------------------
def test_logprob_is_that_of_torch_distributions():
    output, noise = 0.5 * torch.randn(50, 2 * ACTIONS), torch.randn(50, ACTIONS)
    actions, logprobs = rlhf.squashed_sample(output, noise)
    mean, logstd = rlhf.gaussian_parameters(output)
    assert logstd.min() > -5 and logstd.max() < 2
    normal = torch.distributions.Normal(mean, logstd.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    close(actions, torch.tanh(mean + logstd.exp() * noise))
    close(logprobs, squashed.log_prob(actions).sum(-1), 1e-9)
    close(rlhf.squashed_logprob(output, actions), logprobs, 1e-9)


def test_density_integrates_to_one_and_matches_the_samples():
    output = torch.tensor([0.3, 0.3])
    u = torch.linspace(-12, 12, 200_001)
    actions = u.tanh()
    mean, logstd = rlhf.gaussian_parameters(output)
    found = rlhf.squashed_sample(output.expand(len(u), 2), ((u - mean) / logstd.exp()).unsqueeze(-1))[1].exp()
    middle = (actions[1:] - actions[:-1]) * (found[1:] + found[:-1]) / 2
    assert middle.sum().item() == pytest.approx(1, abs=1e-6)
    samples, _ = rlhf.squashed_sample(output.expand(100_000, 2), torch.randn(100_000, 1))
    below = middle[actions[:-1] < 0.5].sum()
    assert (samples < 0.5).double().mean().item() == pytest.approx(below.item(), abs=0.006)


def test_logprob_is_finite_where_tanh_is_one():
    _, logprobs = rlhf.squashed_sample(torch.tensor([[200.0, 0.0], [-200.0, 0.0]]), torch.zeros(2, 1))
    assert logprobs.isfinite().all()
    assert rlhf.squashed_logprob(torch.zeros(1, 2), torch.ones(1, 1)).isfinite().all()


def test_the_agent_acts_as_it_learns():
    agent, obs, noise = rlhf.Agent(OBS, ACTIONS, 16, 16), torch.randn(7, OBS), torch.randn(7, ACTIONS)
    close(agent.act(obs, noise), rlhf.squashed_sample(agent.actor(obs), noise)[0].detach())
    space = gym.spaces.Box(np.array([0.1, -1.0]), np.array([0.4, 2.0]), dtype=np.float64)
    agent.set_action_space(space)
    actions = agent.task_actions(torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]]))
    close(actions, torch.tensor([[0.1, -1.0], [0.25, 0.5], [0.4, 2.0]]))
    agent, obs = agent.float(), obs.float()
    expected = agent.task_actions(agent.act(obs, torch.zeros(7, ACTIONS, dtype=torch.float32)))
    close(agent(obs.double()).detach(), expected, 1e-6)  # any dtype is taken


# ---- Critics and targets ---------------------------------------------------------------------------------------
def test_twin_critics_are_two_networks():
    critics, inputs = rlhf.Agent(OBS, ACTIONS, 16, 16).critics, torch.randn(9, OBS + ACTIONS)
    values = rlhf.action_values(critics, inputs)
    assert values.shape == (2, 9) and not torch.allclose(values[0], values[1])
    for value, critic in zip(values, critics):
        close(value, critic(inputs).squeeze(-1))


def test_targets_bootstrap_unless_terminated():
    rewards, terminated = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    values, logprobs = torch.tensor([[3.0, 5.0], [4.0, 1.0]]), torch.tensor([0.5, 0.7])
    following = rlhf.soft_values(values, logprobs, torch.tensor(0.2))
    found = rlhf.critic_targets(rewards, terminated, following, 0.9)
    assert found.tolist() == pytest.approx([1 + 0.9 * (3 - 0.2 * 0.5), 2.0], rel=1e-12)


def test_temperature_loss():
    """Its derivative in log alpha is itself; nothing flows into the policy."""
    log_alpha, logprobs = torch.tensor(-0.7, requires_grad=True), torch.randn(8, requires_grad=True)
    loss = rlhf.temperature_loss(log_alpha, logprobs, -3.0)
    assert loss.item() == pytest.approx(-math.exp(-0.7) * (logprobs.mean().item() - 3.0), rel=1e-12)
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(loss.item(), rel=1e-12) and logprobs.grad is None


def random_batch(rows: int = 12) -> tuple[torch.Tensor, ...]:
    """Observations and actions, next observations, rewards, terminated."""
    return torch.randn(rows, OBS + ACTIONS), torch.randn(rows, OBS), torch.randn(rows), (torch.rand(rows) < 0.3).double()


def slow_update(agent: rlhf.Agent, args: rlhf.Args, batch: tuple[torch.Tensor, ...], noises) -> dict[str, torch.Tensor]:
    """One critic and one actor update, line by line, with torch.distributions, backward() and torch.optim.Adam."""
    agent, (inputs, next_obs, rewards, terminated) = copy.deepcopy(agent), batch
    obs = inputs[:, :OBS]
    alpha = agent.log_alpha.detach().exp()

    def sample(obs, noise):
        mean, raw = agent.actor(obs).chunk(2, -1)
        std = (-5 + 3.5 * (raw.tanh() + 1)).exp()
        u = mean + std * noise
        density = torch.distributions.Normal(mean, std).log_prob(u) - torch.log(1 - u.tanh() ** 2)
        return u.tanh(), density.sum(-1)

    with torch.no_grad():
        actions, logprobs = sample(next_obs, noises[0])
        following = [target(torch.cat([next_obs, actions], -1)).squeeze(-1) for target in agent.targets]
        going = 1 - terminated
        targets = rewards + args.gamma * going * (torch.minimum(*following) - alpha * logprobs)
    old = {name: value.clone() for name, value in agent.critics.state_dict().items()}
    optimiser = torch.optim.Adam(agent.critics.parameters(), args.critic_learning_rate)
    sum(nn.functional.mse_loss(critic(inputs).squeeze(-1), targets) for critic in agent.critics).backward()
    optimiser.step()
    for name, value in agent.targets.state_dict().items():
        value.copy_((1 - args.target_rate) * value + args.target_rate * agent.critics.state_dict()[name])
    assert any(not torch.equal(old[name], value) for name, value in agent.critics.state_dict().items())
    actions, logprobs = sample(obs, noises[1])
    values = [critic(torch.cat([obs, actions], -1)).squeeze(-1) for critic in agent.critics]
    optimiser = torch.optim.Adam(agent.actor.parameters(), args.learning_rate)
    (alpha * logprobs - torch.minimum(*values)).mean().backward()
    optimiser.step()
    optimiser = torch.optim.Adam([agent.log_alpha], args.critic_learning_rate)
    optimiser.zero_grad()
    (-agent.log_alpha.exp() * (logprobs.detach() - ACTIONS)).mean().backward()
    optimiser.step()
    return agent.state_dict()


def test_one_update_is_the_slow_one():
    agent, batch = rlhf.Agent(OBS, ACTIONS, 8, 8), random_batch()
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.7))
        for target in agent.targets.parameters():
            target += 0.1 * torch.randn_like(target)
    args, noises = rlhf.Args(learning_rate=1e-2, critic_learning_rate=2e-2, target_rate=0.1), torch.randn(2, 12, ACTIONS)
    expected = slow_update(agent, args, batch, noises)
    rlhf.update_agent(agent, rlhf.make_optimisers(agent, args), args, batch, noises)
    for name, value in agent.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-12), name


def test_an_update_can_be_a_cuda_graph():
    """All that it changes stays where it is, and it reads no number."""
    agent, batch, noise = rlhf.Agent(OBS, ACTIONS, 8, 8), random_batch(), torch.randn(2, 12, ACTIONS)
    optimisers, addresses = rlhf.make_optimisers(agent, rlhf.Args()), []
    with Reads() as reads:
        for _ in range(3):
            rlhf.update_agent(agent, optimisers, rlhf.Args(), batch, noise)
            states = [each for optimiser in optimisers for state in optimiser.state.values() for each in state.values()]
            addresses.append([tensor.data_ptr() for tensor in (*agent.parameters(), *states)])
    assert reads.count == 0 and addresses[0] == addresses[1] == addresses[2]


def test_a_fixed_temperature_stays():
    agent, args = rlhf.Agent(OBS, ACTIONS, 8, 8), rlhf.Args(autotune=False)
    rlhf.update_agent(agent, rlhf.make_optimisers(agent, args), args, random_batch(), torch.randn(2, 12, ACTIONS))
    assert agent.log_alpha.item() == 0


def test_the_extra_loss_moves_the_actor():
    first, second = (rlhf.Agent(OBS, ACTIONS, 8, 8) for _ in range(2))
    second.load_state_dict(first.state_dict())
    batch, noises, args = random_batch(), torch.randn(2, 12, ACTIONS), rlhf.Args()
    obs, actions = batch[0][:, :OBS], batch[0][:, OBS:].tanh()
    for agent, extra in ((first, None), (second, lambda actor: 5 * rlhf.squashed_logprob(actor(obs), actions).mean())):
        rlhf.update_agent(agent, rlhf.make_optimisers(agent, args), args, batch, noises, extra)
    assert not torch.allclose(first.actor[0].weight, second.actor[0].weight)


# ---- Reward updates on a tiny case -----------------------------------------------------------------------------
PAIRS, LENGTH = 4, 3


@pytest.fixture
def tiny():
    """A reward network, pairs (P, 2, L, D+A), labels, and r and grad r (n,) of any inputs, row by row."""

    class Tiny:
        model = rlhf.RewardNetwork(OBS + ACTIONS, 6).eval()
        inputs = torch.randn(PAIRS, 2, LENGTH, OBS + ACTIONS)
        labels = torch.tensor([1.0, 0.0, 0.5, 1.0])
        c = 3.0

        def gradient(self, loss):
            return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(self.model.parameters()))])

        def r(self, row):
            return self.model(row).item()

        def grad_r(self, row):
            return self.gradient(self.model(row))

        def l_and_gradient(self, pair):
            """The cross-entropy of a pair and its gradient from grad r, by hand."""
            total = [sum(self.r(row) for row in fragment) for fragment in self.inputs[pair]]
            p, y = 1 / (1 + math.exp(total[1] - total[0])), self.labels[pair].item()
            grads = [sum(self.grad_r(row) for row in fragment) for fragment in self.inputs[pair]]
            return -y * math.log(p) - (1 - y) * math.log(1 - p), (p - y) * (grads[0] - grads[1])

    return Tiny()


def test_cross_entropy_and_its_gradient(tiny):
    losses = rlhf.cross_entropies(tiny.model(tiny.inputs), tiny.labels)
    for pair in range(PAIRS):
        value, grad = tiny.l_and_gradient(pair)
        assert losses[pair].item() == pytest.approx(value, rel=1e-12)
        close(tiny.gradient(rlhf.cross_entropies(tiny.model(tiny.inputs), tiny.labels)[pair]), grad)
    huge = torch.tensor([[[500.0], [-500.0]], [[-500.0], [500.0]]])
    assert rlhf.cross_entropies(huge, torch.tensor([1.0, 1.0])).tolist() == pytest.approx([0.0, 1000.0])


def test_drlhf_follows_the_explicit_term_alone(tiny):
    loss = rlhf.cross_entropies(tiny.model(tiny.inputs), tiny.labels).mean()
    close(tiny.gradient(loss), sum(tiny.l_and_gradient(pair)[1] for pair in range(PAIRS)) / PAIRS)


def implicit_by_hand(tiny, advantage_gradient, baseline=False):
    """(12) + (13): mean grad l + c mean (l - b) sum_h advantage_gradient(pair, fragment, h)."""
    values = [tiny.l_and_gradient(pair)[0] for pair in range(PAIRS)]
    total = 0.0
    for pair in range(PAIRS):
        value = values[pair] - ((sum(values) - values[pair]) / (PAIRS - 1) if baseline else 0.0)
        score = sum(advantage_gradient(pair, j, h) for j in range(2) for h in range(LENGTH))
        total = total + tiny.l_and_gradient(pair)[1] + tiny.c * value * score
    return total / PAIRS


@pytest.mark.parametrize("baseline", [False, True])
def test_sobirl_one_step(tiny, baseline):
    resampled = torch.randn(PAIRS, 2, LENGTH, 4, OBS + ACTIONS)
    rewards = tiny.model(tiny.inputs)
    losses = rlhf.cross_entropies(rewards, tiny.labels)
    scores = rlhf.one_step_advantages(rewards, tiny.model(resampled)).sum((1, 2))
    found = tiny.gradient(losses.mean() + rlhf.implicit_term(losses, scores, tiny.c, baseline).mean())
    expected = implicit_by_hand(
        tiny,
        lambda i, j, h: tiny.grad_r(tiny.inputs[i, j, h]) - sum(tiny.grad_r(row) for row in resampled[i, j, h]) / 4,
        baseline,
    )
    close(found, expected)


def test_sobirl_rollouts(tiny):
    """Sums gamma^t grad r over M rollouts, which end where their weights do."""
    gamma, m, steps = 0.9, 2, 3
    paths = torch.randn(2, PAIRS, 2, LENGTH, m, steps, OBS + ACTIONS)
    weights = gamma ** torch.arange(steps) * (torch.rand(2, PAIRS, 2, LENGTH, m, 1) < 0.7).double()
    weights = weights * torch.ones(2, PAIRS, 2, LENGTH, m, steps)
    rewards = tiny.model(tiny.inputs)
    losses = rlhf.cross_entropies(rewards, tiny.labels)
    sums = (tiny.model(paths) * weights).sum(-1)
    scores = rlhf.rollout_advantages(*sums).sum((1, 2))
    found = tiny.gradient(losses.mean() + rlhf.implicit_term(losses, scores, tiny.c).mean())

    def advantage_gradient(i, j, h):
        total = 0.0
        for sign, path, weight in ((1, paths[0], weights[0]), (-1, paths[1], weights[1])):
            for k in range(m):
                for t in range(steps):
                    total = total + sign / m * weight[i, j, h, k, t] * tiny.grad_r(path[i, j, h, k, t])
        return total

    close(found, implicit_by_hand(tiny, advantage_gradient))


def test_the_cross_entropy_carries_no_gradient_in_the_implicit_term(tiny):
    rewards = tiny.model(tiny.inputs)
    losses = rlhf.cross_entropies(rewards, tiny.labels)
    found = tiny.gradient(rlhf.implicit_term(losses, rewards.sum((1, 2)), tiny.c).mean())
    expected = 0.0
    for pair in range(PAIRS):
        score = sum(tiny.grad_r(row) for row in tiny.inputs[pair].flatten(0, 1))
        expected = expected + tiny.c / PAIRS * tiny.l_and_gradient(pair)[0] * score
    close(found, expected)


def test_hpgd(tiny):
    """One step of each fragment stands for all of them."""
    from_actions, from_policy = torch.randn(2, PAIRS, 2, 1, 4, OBS + ACTIONS)
    weights = math.sqrt(0.9) ** torch.arange(4)
    losses = rlhf.cross_entropies(tiny.model(tiny.inputs), tiny.labels)
    sums = [(tiny.model(each) * weights).sum(-1) for each in (from_actions, from_policy)]
    found = tiny.gradient(losses.mean() + rlhf.implicit_term(losses, LENGTH * rlhf.rollout_advantages(*sums).sum(1), tiny.c).mean())
    expected = 0.0
    for pair in range(PAIRS):
        value, grad = tiny.l_and_gradient(pair)
        score = sum(
            weights[t] * (tiny.grad_r(from_actions[pair, j, 0, t]) - tiny.grad_r(from_policy[pair, j, 0, t]))
            for j in range(2) for t in range(4)
        )  # fmt: skip
        expected = expected + (grad + tiny.c * value * LENGTH * score) / PAIRS
    close(found, expected)


def test_geometric_lengths_make_discounted_sums_unbiased():
    gamma = 0.8
    lengths = rlhf.geometric_lengths(200_000, gamma)
    for t in (0, 1, 3, 8):
        expected = gamma ** (t / 2)
        z = ((lengths > t).double().mean() - expected) / math.sqrt(max(expected * (1 - expected), 1e-12) / 200_000)
        assert abs(z) < 4
    sums = (1 - math.sqrt(gamma) ** lengths) / (1 - math.sqrt(gamma))  # of gamma^(t/2) 1 over the rollout
    z = (sums.mean() - 1 / (1 - gamma)) / (sums.std() / math.sqrt(len(sums)))
    assert abs(z) < 4
    assert rlhf.geometric_lengths(3, 0.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("scale, limit, factor", [(1e-3, 2.0, 1.0), (1e3, 2.0, None), (1e3, math.inf, 1.0), (0.0, 2.0, 1.0)])
def test_limited_sum(scale, limit, factor):
    """The added gradient as it is while its norm is at most `limit` of the other's; beyond, its direction with that norm."""
    first, second = ([scale * torch.randn(3, 2), scale * torch.randn(4)] for scale in (1.0, scale))
    total, ratio, found = rlhf.limited_sum(first, second, limit)
    norms = [torch.cat([each.flatten() for each in gradients]).norm() for gradients in (first, second)]
    assert ratio.item() == pytest.approx((norms[1] / norms[0]).item(), rel=1e-12)
    expected = (limit * norms[0] / norms[1]).item() if factor is None else factor
    assert found.item() == pytest.approx(expected, rel=1e-12) and (factor or found < 0.01)
    for each, one, two in zip(total, first, second):
        assert torch.allclose(each, one + expected * two, rtol=1e-12, atol=0)


def test_nothing_is_added_to_no_gradient():
    """Where every reward of the queue is clipped, the limit is 0."""
    zeros, ones = [torch.zeros(3)], [torch.ones(3)]
    assert rlhf.limited_sum(zeros, ones, 10.0)[0][0].tolist() == [0, 0, 0]
    assert rlhf.limited_sum(zeros, zeros, 10.0)[0][0].tolist() == [0, 0, 0]


def test_pbrl_reward_and_policy_terms(tiny):
    gamma, penalty = 0.9, 0.5
    tracker, policy = torch.randn(2, 3, 4, OBS + ACTIONS)
    weights = gamma ** torch.arange(4)
    losses = rlhf.cross_entropies(tiny.model(tiny.inputs), tiny.labels)
    sums = [(tiny.model(each) * weights).sum(-1) for each in (tracker, policy)]
    found = tiny.gradient(losses.mean() + rlhf.pbrl_term(*sums, penalty))
    expected = sum(tiny.l_and_gradient(pair)[1] for pair in range(PAIRS)) / PAIRS
    for sign, paths in ((1, tracker), (-1, policy)):
        value = sum(weights[t] * tiny.grad_r(paths[k, t]) for k in range(3) for t in range(4)) / 3
        expected = expected + sign * penalty * value
    close(found, expected)

    actor, losses = rlhf.mlp(OBS, 6, 2 * ACTIONS), losses.detach()
    pairs = tiny.inputs.clone()
    pairs[..., OBS:] = pairs[..., OBS:].tanh()

    def score(pair):
        total = rlhf.squashed_logprob(actor(pairs[pair, ..., :OBS]), pairs[pair, ..., OBS:]).sum()
        return torch.cat([each.flatten() for each in torch.autograd.grad(total, list(actor.parameters()))])

    logprobs = rlhf.squashed_logprob(actor(pairs[..., :OBS]), pairs[..., OBS:])
    loss = rlhf.pbrl_policy_term(losses, logprobs, penalty, gamma)
    found = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(actor.parameters()))])
    others = (losses.sum() - losses) / (PAIRS - 1)
    expected = (1 - gamma) / penalty * sum((losses[i] - others[i]) * score(i) for i in range(PAIRS)) / PAIRS
    close(found, expected)


def test_pbrl_term_has_the_gradient_of_the_value_penalty():
    """lambda p, p = V^{pi*(r)} - V^{pi_y} >= 0 with soft values: by central differences in every reward of a tabular MDP, where the
    expectations of the two actors' discounted sums are exact. pi* answers r in p, and not in the term."""
    gamma, tau, penalty, states, actions = 0.9, 0.3, 0.7, 4, 3
    transitions, start = torch.rand(1, states, actions, states).softmax(-1), torch.rand(states).softmax(0)
    rewards, policy = torch.randn(1, states, actions), torch.randn(1, states, actions).softmax(-1)

    def value_penalty(rewards):
        best = optimal_soft_values(rewards, transitions, gamma, tau)
        return penalty * start @ (best - soft_policy_values(policy, rewards, transitions, gamma, tau))[0]

    best = optimal_soft_values(rewards, transitions, gamma, tau)
    answer = (q_values(best, rewards, transitions, gamma) / tau).softmax(-1)
    variable = rewards.clone().requires_grad_()
    sums = [start @ soft_policy_values(each, variable, transitions, gamma, 0.0)[0] for each in (answer, policy)]
    (found,) = torch.autograd.grad(rlhf.pbrl_term(*(each[None] for each in sums), penalty), variable)
    assert value_penalty(rewards) > 0.1
    expected = torch.zeros_like(rewards)
    for index in itertools.product([0], range(states), range(actions)):
        step = torch.zeros_like(rewards)
        step[index] = 1e-5
        expected[index] = (value_penalty(rewards + step) - value_penalty(rewards - step)) / 2e-5
    close(found, expected, 1e-7)


@pytest.mark.parametrize("bound", ["tanh", "clip"])
def test_gradient_is_that_of_the_bounded_reward(bound):
    """By central differences of the reward that the lower level sees; where it is clipped, there is none."""
    model = rlhf.RewardNetwork(OBS + ACTIONS, 6, bound=bound).eval()
    with torch.no_grad():
        model.network[-1].weight *= 20
    inputs = torch.randn(40, OBS + ACTIONS)
    rewards = model(inputs)
    assert rewards.abs().max() <= 1
    weight, step = model.network[0].weight, 1e-6
    (gradient,) = torch.autograd.grad(rewards.sum(), weight)
    clipped = rewards.detach().abs() == 1
    assert bool(clipped.any()) == (bound == "clip") and not clipped.all()
    for index in [(0, 0), (2, 3), (5, 6)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
                values.append(model(inputs).sum())
                weight[index] -= sign * step
        assert gradient[index].item() == pytest.approx(((values[0] - values[1]) / (2 * step)).item(), rel=1e-5, abs=1e-7)


def test_resampled_actions_are_the_policys_at_the_same_states():
    agent, inputs = rlhf.Agent(OBS, ACTIONS, 8, 8), torch.randn(3, 2, LENGTH, OBS + ACTIONS)
    torch.manual_seed(3)
    found = rlhf.resample_actions(agent, inputs, OBS, 7)
    assert found.shape == (3, 2, LENGTH, 7, OBS + ACTIONS) and not found.requires_grad
    assert torch.equal(found[..., :OBS], inputs[..., :OBS].unsqueeze(-2).expand(3, 2, LENGTH, 7, OBS))
    torch.manual_seed(3)
    close(found[..., OBS:], agent.act(found[..., :OBS], torch.randn(3, 2, LENGTH, 7, ACTIONS)))
    assert found[..., OBS:].std(-2).min() > 0.01  # a draw of its own for each


# ---- Bias on a tabular MDP -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tabular():
    """All pairs of trajectories of a preference problem at its pi*, their probabilities, and what is exact there."""

    class Tabular:
        def __init__(self):
            self.problem = PreferenceLearning([203])
            problem, x = self.problem, self.problem.x
            values = optimal_soft_values(problem.reward(x), problem.transitions, problem.gamma, problem.tau)
            q = q_values(values, problem.reward(x), problem.transitions, problem.gamma)
            self.policy, self.x = (q / problem.tau).softmax(-1), x.clone().requires_grad_()
            states, actions = problem.paths
            count = len(states)
            index = torch.cartesian_prod(torch.arange(count), torch.arange(count))
            self.weights = self.law(self.policy, index)
            self.index = index
            self.states, self.actions = states[index], actions[index]  # (P, 2, H)
            self.labels = problem.preferences[0].flatten()

        def law(self, policy, index):
            """The probabilities (P,) of the pairs under a policy."""
            problem = self.problem
            return trajectory_probabilities(problem.start, policy, problem.transitions, *problem.paths)[0][index].prod(-1)

        def rewards(self):
            return self.problem.reward(self.x)[0]

        def term(self, scores, losses, weights=None):
            """The mean of the script's implicit term, differentiated in x."""
            weights = self.weights if weights is None else weights
            total = (weights * rlhf.implicit_term(losses, scores, 1 / self.problem.tau)).sum()
            return torch.autograd.grad(total, self.x, retain_graph=True)[0][0]

        def losses(self):
            return rlhf.cross_entropies(self.rewards()[self.states, self.actions], self.labels)

        def advantages(self, length):
            """Q - V with sums of `length` terms (None: all), at every visited state and action, differentiable in x."""
            rewards = self.problem.reward(self.x).unsqueeze(-1)  # Prop. 5.1 with r in place of grad r
            rest = self.policy, rewards, self.problem.transitions, self.problem.gamma
            q, v = value_gradients(*rest) if length is None else truncated_value_gradients(*rest, length)
            visited_q, visited_v = q[0, self.states, self.actions, 0], v[0, self.states, 0]
            return rlhf.rollout_advantages(visited_q.unsqueeze(-1), visited_v.unsqueeze(-1))

    return Tabular()


def test_implicit_term_with_exact_advantages_is_exact(tabular):
    """(12) + (13) of the script, in expectation, is the hypergradient; rollouts of T steps are Stoc-SoBiRL's."""
    terms = implicit_terms(tabular.problem, tabular.problem.x, (2, 5))
    losses = tabular.losses()
    for name, length in (("exact", None), ("rollouts-2", 2), ("rollouts-5", 5)):
        close(tabular.term(tabular.advantages(length).sum((1, 2)), losses), terms[name][0], 1e-12)
    (explicit,) = torch.autograd.grad((tabular.weights * losses).sum(), tabular.x)
    total = explicit[0] + tabular.term(tabular.advantages(None).sum((1, 2)), losses.detach())
    close(total, exact_hypergradient(tabular.problem, tabular.problem.x).gradient[0], 1e-12)


def test_one_step_form_has_the_released_mean(tabular):
    rewards = tabular.rewards()
    expected_reward = (tabular.policy[0] * rewards).sum(-1)[tabular.states]
    scores = rlhf.one_step_advantages(rewards[tabular.states, tabular.actions], expected_reward.unsqueeze(-1)).sum((1, 2))
    found = tabular.term(scores, tabular.losses())
    close(found, implicit_terms(tabular.problem, tabular.problem.x, ())["one-step"][0], 1e-12)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("pairs", [2, 3, 4])
def test_permuted_cross_entropy_has_no_implicit_term_in_the_mean(pairs, baseline):
    """By enumeration of all draws of so many independent pairs from a law in which l and the score are correlated: with every
    shift the mean is 0; without one it is E[l score], with or without the baseline."""
    probabilities, losses = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.1, 0.7, 2.0])
    scores = torch.tensor([1.5, -2.0, 0.4])
    scores = scores - (probabilities * scores).sum()  # mean 0, as at pi*
    true = (probabilities * losses * scores).sum().item()
    assert abs(true) > 0.1
    for shift in range(pairs):
        mean = 0.0
        for draw in itertools.product(range(3), repeat=pairs):
            index = torch.tensor(draw)
            term = rlhf.implicit_term(losses[index], scores[index], 1.0, baseline, shift).mean()
            mean += probabilities[index].prod().item() * term.item()
        assert mean == pytest.approx(0.0 if shift else true, abs=1e-12), shift


@pytest.mark.parametrize("baseline", [False, True])
def test_a_shift_takes_the_cross_entropies_of_the_pairs_that_many_places_on(baseline):
    """Row i of the matrix that makes the l into the factors of the scores."""
    for pairs, shift in itertools.product((2, 3, 5), range(1, 5)):
        if shift >= pairs:
            continue
        rows = [rlhf.implicit_term(unit, torch.ones(pairs), 1.0, baseline, shift) for unit in torch.eye(pairs)]
        matrix = torch.stack(rows, 1)
        for i in range(pairs):
            taken = (i + shift) % pairs
            expected = [-1 / (pairs - 2) if baseline and pairs > 2 else 0.0] * pairs
            expected[i], expected[taken] = 0.0, 1.0
            assert matrix[i].tolist() == pytest.approx(expected, abs=1e-12)


def test_bias_of_the_forms(tabular, record_property):
    """One-step is further off than rollouts of five steps."""
    terms = implicit_terms(tabular.problem, tabular.problem.x, (5,))
    error = {name: float((terms[name][0] - terms["exact"][0]).norm() / terms["exact"][0].norm()) for name in ("one-step", "rollouts-5")}
    for name, value in error.items():
        record_property(name, value)
    assert error["rollouts-5"] < 0.02 < error["one-step"] < 0.3


def test_bias_of_pairs_of_an_older_policy(tabular, record_property):
    """A queue holds pairs of other policies, here of one a fraction f of the way from the uniform one to pi* (f = 1: pi*'s own). With the exact
    Q - V of pi*, as released without a baseline, the term is off by a multiple of itself, and the baseline takes most of that away."""
    exact = implicit_terms(tabular.problem, tabular.problem.x, ())["exact"][0]
    scores, losses, error = tabular.advantages(None).sum((1, 2)), tabular.losses().detach(), {}
    for f in (0.0, 0.5, 0.9, 1.0):
        older = (f * tabular.policy.log()).softmax(-1)
        law = tabular.law(older, tabular.index)
        for name, subtracted in (("none", 0.0), ("baseline", (law * losses).sum())):
            error[f, name] = float((tabular.term(scores, losses - subtracted, law) - exact).norm() / exact.norm())
            record_property(f"{f} {name}", error[f, name])
    assert error[1.0, "none"] < 1e-12 and error[1.0, "baseline"] < 1e-12
    for name in ("none", "baseline"):
        assert error[0.0, name] > error[0.5, name] > error[0.9, name] > 0.02
    assert all(error[f, "none"] > 20 * error[f, "baseline"] for f in (0.0, 0.5, 0.9)) and error[0.9, "none"] > 1 > error[0.0, "baseline"]


# ---- Preferences -----------------------------------------------------------------------------------------------
def test_fragment_windows_by_brute_force():
    torch.manual_seed(4)
    valid = (torch.rand(30, 3) < 0.85).float()
    for length in (1, 2, 5):
        found = {tuple(row) for row in rlhf.fragment_windows(valid, length).tolist()}
        expected = {(t, n) for n in range(3) for t in range(30 - length + 1) if valid[t : t + length, n].all()}
        assert found == expected and (length > 2 or len(found) > 5)


def test_pairs_are_two_different_windows_of_the_rollout():
    valid = torch.ones(12, 2)
    valid[5, 0] = 0
    steps = torch.arange(12.0).unsqueeze(1) + 100 * torch.arange(2.0)
    windows = rlhf.fragment_windows(valid, 4)
    pairs, again = rlhf.draw_pairs(windows, 300, 4, steps, steps.unsqueeze(-1))
    assert pairs.shape == (300, 2, 4) and torch.equal(pairs, again.squeeze(-1))
    assert ((pairs[..., 1:] - pairs[..., :-1]) == 1).all()
    starts = {(int(start % 100), int(start // 100)) for start in pairs[..., 0].flatten()}
    assert starts == {tuple(row) for row in windows.tolist()}
    assert (pairs[:, 0, 0] != pairs[:, 1, 0]).all()
    for few in (windows[:0], windows[:1]):
        assert len(rlhf.draw_pairs(few, 5, 4, steps)[0]) == 0


REWARDS = torch.tensor([[[1.0, 2.0], [2.0, 0.5]], [[0.0, 1.0], [4.0, 0.0]], [[1.0, 1.0], [2.0, 0.0]], [[0.1, 0.0], [0.0, 0.0]]])


def test_teacher_rules():
    """R: 3 against 2.5, 1 against 4, 2 against 2, 0.1 against 0; the mean of the eight is 1.825."""
    oracle, answered = rlhf.teacher_labels(REWARDS, "oracle")
    assert oracle.tolist() == [1, 0, 0.5, 1] and answered.all()
    labels, answered = rlhf.teacher_labels(REWARDS, "skip", threshold=0.6)  # 1.095: one of the second pair is above
    assert labels.tolist() == oracle.tolist() and answered.tolist() == [True, True, True, False]
    labels, answered = rlhf.teacher_labels(REWARDS, "equal", threshold=0.3)
    assert labels.tolist() == [0.5, 0, 0.5, 0.5] and answered.all()
    labels, _ = rlhf.teacher_labels(REWARDS, "myopic", gamma=0.5)  # 2.5 against 1.5, 1 against 2, 1.5 against 1, 0.05 against 0
    assert labels.tolist() == [1, 0, 1, 1]
    many = REWARDS.repeat(5000, 1, 1)
    wrong, _ = rlhf.teacher_labels(many, "mistake", error=0.2)
    flipped = (wrong.view(-1, 4) != oracle).double().mean(0)
    assert flipped[2] == 0 and ((flipped[[0, 1, 3]] - 0.2).abs() < 4 * math.sqrt(0.16 / 5000)).all()
    drawn, _ = rlhf.teacher_labels(many, "stochastic", temperature=0.5)
    expected = torch.sigmoid(torch.tensor([0.5, -3.0, 0.0, 0.1]) / 0.5)
    assert ((drawn.view(-1, 4).mean(0) - expected).abs() < 4 * (expected * (1 - expected) / 5000).sqrt()).all()
    assert set(drawn.tolist()) == {0.0, 1.0}


def test_teacher_of_no_pairs():
    for rule in ("oracle", "stochastic", "mistake", "skip", "equal", "myopic"):
        labels, answered = rlhf.teacher_labels(torch.zeros(0, 2, 3), rule)
        assert len(labels) == len(answered) == 0


def test_labels_last_to_the_end_of_the_run():
    """Some in every iteration, the last of the budget in the last one; a number of one's own, until the budget is spent."""
    args = rlhf.Args(label_budget=100, warmup_pairs=30)
    wanted = [rlhf.labels_wanted(args, i, 12, 3) for i in range(13)]
    assert wanted[:4] == [0, 10, 20, 30] and wanted[-1] == 100
    assert set(np.diff(wanted[3:])) == {7, 8}
    args = rlhf.Args(label_budget=100, warmup_pairs=30, pairs_per_iteration=15)
    assert [rlhf.labels_wanted(args, i, 12, 3) for i in (1, 3, 4, 7, 8, 12)] == [10, 30, 45, 90, 100, 100]
    for budget in (0, 20):  # less than the warm-up
        args = rlhf.Args(label_budget=budget, warmup_pairs=30)
        assert [rlhf.labels_wanted(args, i, 12, 3) for i in (3, 4, 12)] == [budget] * 3
    args = rlhf.Args(total_timesteps=500_000)  # the defaults: never without new labels
    wanted = [rlhf.labels_wanted(args, i, 250, 3) for i in range(251)]
    assert wanted[3] == 600 and wanted[-1] == 3000 and np.diff(wanted[3:]).min() == 9
    assert rlhf.labels_wanted(args, 3, 3, 3) == 600  # all of them random


def test_a_ring_keeps_the_newest():
    """Also of more than it has room for, added at once; as many as there are may then be drawn, and no other."""
    ring, rows, numbers = rlhf.Ring(5, (2, 3), ()), torch.randn(23, 2, 3), torch.arange(23.0)
    for start, end in ((0, 0), (0, 2), (2, 4), (4, 8), (8, 12), (12, 12), (12, 23)):
        ring.add(rows[start:end], numbers[start:end])
        assert len(ring) == min(end, 5) and ring.added == end
        if end:
            drawn, which = ring.sample(200)
            assert set(which.tolist()) == set(range(max(0, end - 5), end)) and torch.equal(drawn, rows[which.long()])
        newest = ring.rows(torch.arange(len(ring)))
        assert ring.columns[1][newest].tolist() == [*range(end - 1, end - 1 - len(ring), -1)]
    for size in (3, 5, 9):
        other = rlhf.Ring(size, (2, 3), ())
        other.load_state_dict(copy.deepcopy(ring.state_dict()))
        kept = min(size, 5)
        assert other.added == 23 and other.columns[1][other.rows(torch.arange(kept))].tolist() == [*range(22, 22 - kept, -1)]


def test_a_loaded_ring_draws_as_the_one_that_was_saved():
    ring, other = rlhf.Ring(5, ()), rlhf.Ring(5, ())
    ring.add(torch.arange(13.0))
    other.load_state_dict(ring.state_dict())
    drawn = []
    for each in (ring, other):
        torch.manual_seed(0)
        drawn.append(each.sample(20)[0])
        each.add(torch.tensor([13.0]))
        drawn.append(each.columns[0].clone())
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])


def test_accuracy():
    learned = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [1.0]], [[0.0], [1.0]]])
    truth = torch.tensor([[[5.0], [1.0]], [[5.0], [1.0]], [[5.0], [1.0]], [[2.0], [2.0]]])
    assert rlhf.accuracy(learned, truth).item() == pytest.approx((1 + 0 + 0.5) / 3)
    assert rlhf.accuracy(learned[3:], truth[3:]).isnan()


# ---- Room ------------------------------------------------------------------------------------------------------
def test_the_room_of_replay_and_queue(monkeypatch):
    """Rows of 2 D + A + 2 numbers of 4 bytes, and pairs of 2 L (D + A); and a copy."""
    args = rlhf.Args(buffer_size=100, num_steps=40, queue_size=10, total_timesteps=10_000, fragment_length=5)
    size = 2 * 4 * (100 * 14 + 10 * 10 * 7)
    for memory in (size - 1, size):
        monkeypatch.setattr(rlhf.os, "sysconf", lambda word: memory if word == "SC_PHYS_PAGES" else 1)
        with pytest.raises(rlhf.BadInput, match="--buffer-size: ") if memory < size else contextlib.nullcontext():
            rlhf.check_room(args, OBS, ACTIONS)


# ---- Simulator -------------------------------------------------------------------------------------------------
def simulator(env_id="Hopper-v4", settable=True, terminate=True):
    how = {"implicit": "rollouts"} if settable else {"reward_update": "pbrl-style"}
    return rlhf.Simulator(rlhf.Args(env_id=env_id, terminate=terminate, **how), 3)


def policy_for(obs_dim, action_dim, space=None):
    """A fresh agent; its actions are in [-1, 1] in the task as well unless there is a space."""
    agent = rlhf.Agent(obs_dim, action_dim, 8, 8)
    if space is not None:
        agent.set_action_space(space)
    return agent


@pytest.mark.parametrize(
    "env_id", ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4", "Swimmer-v4", "Ant-v4", "InvertedPendulum-v4"]
)
def test_a_task_put_into_a_state_goes_on_as_it_did(env_id):
    torch.set_default_dtype(torch.float32)
    sim = simulator(env_id)
    env = gym.make(env_id).unwrapped
    obs, _ = env.reset(seed=7)
    rng = np.random.default_rng(0)
    for _ in range(8):
        action = rng.uniform(-0.2, 0.2, env.action_space.shape).astype(np.float32)
        assert np.abs(obs).max() < 10  # beyond, Hopper and Walker2d clip velocities
        sim.set(obs)
        found = sim.env.step(action)
        obs, reward, terminated, *_ = env.step(action)
        np.testing.assert_allclose(found[0], obs, rtol=1e-5, atol=1e-6)
        assert found[2] == terminated
    env.close()


def test_rollouts_start_where_they_should_and_end_with_the_episode():
    torch.set_default_dtype(torch.float32)
    sim = simulator("InvertedPendulum-v4")
    policy = policy_for(4, 1, sim.env.action_space)
    obs = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.19, 0.0, 3.0]])  # upright; about to fall
    first = torch.tensor([[0.1], [0.2]])
    inputs, weights = sim.roll_out(policy, torch.tensor([5, 40]), 0.9, obs, first)
    assert torch.equal(inputs[:, 0, :4], obs) and torch.equal(inputs[:, 0, 4:], first)
    assert weights[0].tolist()[:5] == pytest.approx([1, 0.9, 0.81, 0.729, 0.6561], rel=1e-5) and not weights[0, 5:].any()
    steps = int((weights[1] > 0).sum())
    assert 1 <= steps < 40 
    again, _ = sim.roll_out(policy, torch.tensor([3, 3]), 0.9, obs)
    assert torch.equal(again[:, 0, :4], obs) and not torch.equal(again[:, 0, 4:], first)
    fresh, _ = sim.roll_out(policy, torch.tensor([3]), 0.9)
    assert fresh[0, 0, :4].abs().max() < 0.011  # a start state


def test_equal_policies_with_the_same_seed_have_the_same_rollouts():
    """So that PBRL's penalty on them is 0, whatever the number of rollouts and however early they end."""
    torch.set_default_dtype(torch.float32)
    sim, lengths = simulator(settable=False), torch.full((4,), 40)
    policy, other = (policy_for(11, 3) for _ in range(2))
    inputs, weights = sim.roll_out(policy, lengths, 0.9, seed=7)
    again, same_weights = sim.roll_out(copy.deepcopy(policy), lengths, 0.9, seed=7)
    assert torch.equal(inputs, again) and torch.equal(weights, same_weights)
    starts = sim.roll_out(other, lengths, 0.9, seed=7)[0][:, 0]
    assert torch.equal(starts[:, :11], inputs[:, 0, :11]) and not torch.equal(starts[:, 11:], inputs[:, 0, 11:])
    assert len(inputs[:, 0].unique(dim=0)) == 4  # a start of its own each
    assert not torch.equal(sim.roll_out(policy, lengths, 0.9, seed=8)[0][:, 0], inputs[:, 0])


def test_rollout_steps_follow_the_dynamics():
    torch.set_default_dtype(torch.float32)
    sim = simulator()
    start, _ = sim.env.reset(seed=5)
    inputs, _ = sim.roll_out(policy_for(11, 3), torch.tensor([4]), 1.0, torch.tensor(start[None]).float())
    sim.set(inputs[0, 0, :11].numpy())
    for t in range(3):
        obs, *_ = sim.env.step(inputs[0, t, 11:].numpy())
        np.testing.assert_allclose(inputs[0, t + 1, :11], obs, rtol=1e-4, atol=1e-4)


def test_a_state_that_was_set_goes_on_alike_whatever_came_before():
    """Bitwise, also on the ground, where MuJoCo's solver starts from its last solution."""
    sim = simulator(terminate=False)
    rng = np.random.default_rng(0)
    for _ in range(60):
        state, *_ = sim.env.step(rng.uniform(-1, 1, 3))
    found = []
    for _ in range(2):
        sim.set(state)
        sim.env.step(np.full(3, 0.3))
        found.append(np.concatenate([sim.env.data.qpos, sim.env.data.qvel]))
        for _ in range(20):
            sim.env.step(rng.uniform(-1, 1, 3))
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "InvertedDoublePendulum-v4", "MountainCarContinuous-v0", "Ant-v5"])
def test_tasks_that_cannot_be_set_are_refused(env_id):
    torch.set_default_dtype(torch.float32)
    with pytest.raises(rlhf.BadInput, match="--implicit rollouts needs a MuJoCo task whose state is its observation"):
        simulator(env_id)


def test_without_terminations_a_rollout_goes_on():
    torch.set_default_dtype(torch.float32)
    lengths = []
    for terminate in (True, False):
        _, weights = simulator(terminate=terminate).roll_out(policy_for(11, 3), torch.tensor([300]), 1.0)
        lengths.append(int(weights.sum()))
    assert lengths[0] < 300 == lengths[1]
