"""The authors' released update against numbers computed without this repository's code.

tests/data/released_batch.json holds a small minibatch (one sequence with a termination, a truncation and a reset row),
networks, and the v, correction, scale and direction that `released_by_hand` gave for it: loops, plain double-backward
autograd, the released formula for v as it is written (docs/blpo.md, the column 'released code'), float64.
`python tests/test_released.py` writes it anew.
"""

import json
import math
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data" / "released_batch.json"
OBS, ACTIONS, WIDTH, LENGTH = 3, 2, 4, 12
GAMMA, LAMBDA, EPS, CLIP_F, BOUND, RHO, RIDGE = 0.99, 0.95, 0.2, 0.5, 0.8, 2.0, 1.0
COLUMNS = [3, 11, 20, 30, 36]


def make_batch(seed: int = 7):
    """Networks (weights and biases, layer by layer), one sequence of LENGTH steps, and flags."""
    torch.manual_seed(seed)

    def layers(outputs):
        sizes = [(WIDTH, OBS), (WIDTH, WIDTH), (outputs, WIDTH)]
        return [x for rows, columns in sizes for x in (torch.randn(rows, columns) * 0.7, torch.randn(rows) * 0.3)]

    flags = {name: torch.zeros(LENGTH) for name in ("terminated", "truncated")}
    flags["terminated"][3] = flags["truncated"][8] = 1
    valid = torch.ones(LENGTH)
    valid[4] = valid[9] = 0
    batch = {
        "critic": layers(1), "actor": layers(ACTIONS), "logstd": torch.randn(ACTIONS) * 0.2, "obs": torch.randn(LENGTH + 1, OBS),
        "actions": torch.randn(LENGTH, ACTIONS), "rewards": torch.randn(LENGTH) * valid, "targets": torch.randn(LENGTH) * 0.5,
        "old_logprobs": torch.randn(LENGTH) * 0.3 - 3.5, "valid": valid, **flags,
    }  # fmt: skip
    return {k: [x.double() for x in v] if isinstance(v, list) else v.double() for k, v in batch.items()}


def network(layers, x):
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2]):
        x = torch.tanh(x @ weight.T + bias)
    return x @ layers[-2].T + layers[-1]


def flat(tensors):
    return torch.cat([x.reshape(-1) for x in tensors])


def released_by_hand(batch):
    """v, correction, scale and direction of the released Nystrom update, written out step by step."""
    critic = [x.clone().requires_grad_() for x in batch["critic"]]
    actor = [x.clone().requires_grad_() for x in [*batch["actor"], batch["logstd"]]]
    valid, count = batch["valid"], batch["valid"].sum()
    values = network(critic, batch["obs"])[:, 0]
    advantages, last = [None] * LENGTH, 0.0
    for t in reversed(range(LENGTH)):
        if valid[t] == 0:  # a reset row: no transition
            advantages[t], last = torch.zeros(()).double(), 0.0
            continue
        ended = batch["terminated"][t] + batch["truncated"][t]
        delta = batch["rewards"][t] + GAMMA * (1 - batch["terminated"][t]) * values[t + 1] - values[t]
        last = delta + GAMMA * LAMBDA * (1 - ended) * last
        advantages[t] = last
    advantages = torch.stack(advantages)
    mean, logstd = network(actor[:-1], batch["obs"][:-1]), actor[-1]
    noise = (batch["actions"] - mean) / logstd.exp()
    logprobs = (-0.5 * noise**2 - logstd - 0.5 * math.log(2 * math.pi)).sum(-1)
    ratio = (logprobs - batch["old_logprobs"]).exp()

    f = -(valid * torch.minimum(ratio * advantages, ratio.clamp(1 - EPS, 1 + EPS) * advantages)).sum() / count
    inner = (valid * (batch["targets"] - values[:-1]) ** 2).sum() / count
    m = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_F, 1 + CLIP_F) * advantages)
    f2 = -2 * (valid * m * (batch["targets"] - values[:-1])).sum()

    grad = torch.autograd.grad
    gradient = flat(grad(inner, critic, create_graph=True))
    rows = torch.stack([flat(grad(gradient[i], critic, retain_graph=True, allow_unused=False)) for i in COLUMNS])
    b = flat(grad(f, critic, retain_graph=True))
    core = rows[:, COLUMNS] + RIDGE * torch.eye(len(COLUMNS)).double()
    v = b / RHO - rows.T @ torch.linalg.solve(core + rows @ rows.T / RHO, rows @ b) / RHO**2

    by_theta = flat(grad(f2, actor, create_graph=True))
    probe = torch.zeros_like(by_theta, requires_grad=True)  # d/d(probe) of d(by_theta . probe)/d(omega) . v is the JVP
    by_omega = flat(grad((by_theta * probe).sum(), critic, create_graph=True))
    correction = grad((by_omega * v.detach()).sum(), probe, retain_graph=True)[0]
    direct = flat(grad(f, actor))
    scale = torch.clamp(BOUND * direct.norm() / (correction.norm() + 1e-8), max=1.0)
    return {"v": v, "correction": correction, "scale": scale, "direction": direct - scale * correction}


def by_the_laboratory(batch):
    """The same four from the functions of blpo_continuous_ablations.py, composed as its update does."""
    import torch.nn as nn

    import blpo_continuous_ablations as laboratory

    critic = nn.Sequential(nn.Linear(OBS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()
    agent = laboratory.Agent(OBS, ACTIONS, WIDTH, WIDTH).double()
    agent.critic = critic
    with torch.no_grad():
        for parameter, value in zip(critic.parameters(), batch["critic"]):
            parameter.copy_(value)
        for parameter, value in zip(agent.actor_parameters(), [*batch["actor"], batch["logstd"]]):
            parameter.copy_(value)
    names = "valid", "terminated", "truncated", "rewards", "old_logprobs", "actions", "targets"
    valid, terminated, truncated, rewards, old, actions, targets = (batch[name][:, None] for name in names)  # (T, 1)
    obs, weights = batch["obs"], valid / valid.sum()
    decay, discounts = GAMMA * LAMBDA * (1 - terminated - truncated), GAMMA * (1 - terminated)

    jacobian = laboratory.CriticJacobian(critic, obs)
    values = jacobian.values[:, None]
    advantages = laboratory.gae(rewards, values, discounts, decay)
    logprobs, _ = agent.logprob_and_entropy(obs[:-1, None], actions)
    ratio = (logprobs - old).exp()
    slopes = weights * laboratory.surrogate_slope(ratio.detach(), advantages, EPS)
    u = laboratory.lambda_returns_vjp(slopes, discounts, decay)
    u[:-1] -= slopes
    b = jacobian.vjp(u.view(1, -1))[0]
    row_weights, row_targets = (nn.functional.pad(x.flatten(), (0, 1)) for x in (weights, targets))
    hessian = laboratory.Hessian(jacobian, row_weights, critic, obs, row_targets)
    directions = nn.functional.one_hot(torch.tensor(COLUMNS), len(b)).double()
    columns = laboratory.curvature_products(hessian, directions)
    core = directions @ columns.T + RIDGE * torch.eye(len(COLUMNS)).double()
    v = laboratory.nystrom_solve(columns, core, RHO, b)

    response = -jacobian.jvp(v)[:, None]  # the released code minimises f = -J
    advantages_dot = laboratory.gae(0 * weights, response, discounts, decay)
    rows = laboratory.released_mixed_weights(
        ratio.detach(), advantages, advantages_dot, targets - values[:-1], response[:-1], CLIP_F
    )
    theta = agent.actor_parameters()
    f = -(weights * laboratory.clipped_surrogate(ratio, advantages, EPS)).sum()
    direct, correction = (torch.autograd.grad(x, theta, retain_graph=True) for x in (f, (valid * rows * ratio).sum()))
    direction = laboratory.bounded(direct, correction, BOUND)
    scale = (flat(direct) - flat(direction)).norm() / flat(correction).norm()
    return {"v": -v, "correction": flat(correction), "scale": scale, "direction": flat(direction)}


def read():
    saved = json.loads(DATA.read_text())
    batch = {
        k: [torch.tensor(x, dtype=torch.float64) for x in v] if k in ("critic", "actor") else torch.tensor(v, dtype=torch.float64)
        for k, v in saved["batch"].items()
    }
    return batch, {k: torch.tensor(v, dtype=torch.float64) for k, v in saved["expected"].items()}


def assert_same(actual: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-7, atol=1e-9 * value.abs().max()), name


def test_released_update_on_the_committed_batch():
    batch, expected = read()
    assert_same(by_the_laboratory(batch), expected)
    assert expected["scale"] < 1  # the bound is active, as it always is in the released code


@pytest.mark.parametrize("seed", [8, 9])
def test_released_update_by_hand_on_other_batches(seed):
    batch = make_batch(seed)
    assert_same(by_the_laboratory(batch), {name: value.detach() for name, value in released_by_hand(batch).items()})


def correction_of_algorithm_1(batch, v):
    """What Algorithm 1 subtracts from grad_theta f: (grad_theta,omega L) v, from L itself by double backward.

    L = mean_t (G_t - V(s_t))^2, where G_t moves with theta as the clipped surrogate of its step does and not with omega.
    """
    critic = [x.clone().requires_grad_() for x in batch["critic"]]
    actor = [x.clone().requires_grad_() for x in [*batch["actor"], batch["logstd"]]]
    values, valid = network(critic, batch["obs"])[:-1, 0], batch["valid"]
    mean, logstd = network(actor[:-1], batch["obs"][:-1]), actor[-1]
    logprobs = torch.distributions.Normal(mean, logstd.exp()).log_prob(batch["actions"]).sum(-1)
    ratio, advantages = (logprobs - batch["old_logprobs"]).exp(), (batch["targets"] - values).detach()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_F, 1 + CLIP_F) * advantages)
    follower = (valid * (batch["targets"] + surrogate - surrogate.detach() - values) ** 2).sum() / valid.sum()
    by_omega = flat(torch.autograd.grad(follower, critic, create_graph=True))
    return flat(torch.autograd.grad(by_omega @ v, actor))


def test_the_released_correction_is_not_that_of_algorithm_1():
    """Sign and sum: the released step adds what Algorithm 1 subtracts, and a sum over the batch where that has a mean. Only
    roughly so, since its surrogate's advantages move with omega as well."""
    batch, expected = read()
    ours = correction_of_algorithm_1(batch, expected["v"])
    assert torch.cosine_similarity(expected["correction"], ours, dim=0) < -0.8
    assert 0.5 < expected["correction"].norm() / (batch["valid"].sum() * ours.norm()) < 2


def test_presets_fill_what_is_left_at_its_default():
    import blpo_continuous_ablations as laboratory

    args = laboratory.parse_args(["--preset", "released-halfcheetah", "--nested-updates", "5"])
    assert (args.env_id, args.leader, args.ihvp_bound, args.clip_f) == ("HalfCheetah-v4", "released", 1.4, 0.7)
    assert (args.nystrom_rank, args.damping, args.core_ridge, args.columns) == (5, 50.0, 1.0, "fixed")
    assert (args.num_envs, args.num_steps, args.chunk_length, args.num_minibatches) == (32, 640, 640, 32)
    assert args.nest == "minibatch"
    assert (args.learning_rate, args.critic_learning_rate) == (3e-4, 1.2e-3)
    assert args.nested_updates == 5 and not args.anneal_lr and not args.norm_adv
    assert laboratory.parse_args([]).leader == "lambda-return"
    for name, settings in laboratory.PRESETS.items():
        args = laboratory.Args(preset=name, total_timesteps=500_000)
        assert args.total_timesteps == 500_000 and {key: getattr(args, key) for key in settings} == settings
        assert laboratory.Args.model_validate_json(args.model_dump_json()) == args


@pytest.mark.parametrize("words", ["--correction-control permuted", "--mixed-discount 0", "--mixed-advantages refreshed", "--norm-adv"])
def test_the_released_leader_refuses_what_it_would_ignore(words):
    import blpo_continuous_ablations as laboratory

    leader = ["--leader", "released", "--nest", "minibatch", *([] if words == "--norm-adv" else ["--no-norm-adv"])]
    with pytest.raises(laboratory.BadInput, match=words.split()[0].replace("--norm", "--no-norm")):
        laboratory.parse_args([*leader, *words.split()])


if __name__ == "__main__":
    made = make_batch()
    numbers = {k: v.tolist() for k, v in released_by_hand(made).items()}
    content = {k: [x.tolist() for x in v] if isinstance(v, list) else v.tolist() for k, v in made.items()}
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps({"batch": content, "expected": numbers}) + "\n")
