"""benchmark/studies/gradient_quality.py: references, estimates and the rule, against loops and plain autograd."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPO

import blpo_continuous as blpo
import ppo_continuous
import ppo_discrete
from benchmark.studies import gradient_quality as study
from benchmark.studies.study import BadInput, run

GAMMA = 0.9


def fragment(steps=24, envs=8, seed=0, discrete=False):
    """Random steps with terminations, truncations and the resets after them."""
    generator = torch.Generator().manual_seed(seed)
    terminated, truncated = (torch.rand(steps, envs, generator=generator) < p for p in (0.1, 0.05))
    valid, t = torch.ones(steps, envs), torch.zeros(steps, envs)
    for k in range(1, steps):
        reset = (terminated | truncated)[k - 1] & (valid[k - 1] > 0)
        valid[k] = (~reset).float()
        t[k] = torch.where(reset | (valid[k - 1] == 0), 0, t[k - 1] + 1)
    ended = (terminated | truncated).float() * valid
    rewards = torch.randn(steps, envs, generator=generator) * valid
    discounts = GAMMA * (1 - terminated.double() * valid)
    obs = torch.randn(steps + 1, envs, 3, generator=generator)
    actions = torch.randn(steps, envs, 2, generator=generator)
    if discrete:
        actions = torch.randint(0, 2, (steps, envs), generator=generator)
    doubles = (x.double() for x in (rewards, discounts, ended, valid, t))
    return study.Fragment(obs.double(), actions if discrete else actions.double(), *doubles)


def agent_of(script):
    torch.manual_seed(1)
    agent = script.Agent(3, 2, 8, 4).double()
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


def gradient(agent, batch, slopes):
    """sum slopes log pi differentiated by autograd, parameter by parameter."""
    logprobs, _ = agent.logprob_and_entropy(batch.obs[:-1], batch.actions)
    theta = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    return torch.cat([g.flatten() for g in torch.autograd.grad((slopes * logprobs).sum(), theta)])


def episodes(batch):
    """(environment, its steps) of each stretch without a reset."""
    for n in range(batch.valid.shape[1]):
        steps = []
        for k in range(len(batch.valid)):
            if batch.valid[k, n] > 0:
                steps.append(k)
            if steps and (batch.ended[k, n] > 0 or k == len(batch.valid) - 1):
                yield n, steps
                steps = []


@pytest.mark.parametrize("script", [ppo_continuous, ppo_discrete])
def test_policy_gradients_are_those_of_autograd(script):
    agent, batch = agent_of(script), fragment(discrete=script is ppo_discrete)
    slopes = torch.randn(11, *batch.valid.shape, dtype=torch.float64)
    expected = torch.stack([gradient(agent, batch, each) for each in slopes])
    torch.testing.assert_close(study.policy_gradients(agent, batch, slopes), expected, rtol=1e-10, atol=1e-12)


def test_references_are_sums_over_episodes():
    agent, batch = agent_of(ppo_continuous), fragment()
    values = agent.critic(batch.obs).squeeze(-1).detach()
    slopes = torch.zeros(3, *batch.valid.shape, dtype=torch.float64)
    for n, steps in episodes(batch):
        for position, k in enumerate(steps):
            later = steps[position:]
            last = later[-1]
            earned = sum(GAMMA ** (j - k) * batch.rewards[j, n] for j in later)
            earned += GAMMA ** (last - k) * batch.discounts[last, n] * values[last + 1, n]
            advantage = earned - values[k, n]
            visits = sum(GAMMA**i for i in range(position + 1))
            slopes[:, k, n] = torch.stack([GAMMA**position * advantage, visits * advantage, advantage])
    found, errors = study.references(agent, batch, agent.critic, GAMMA)
    groups = []  # eight environments are eight groups
    for n in range(8):
        part = batch.part(slice(0, 24), slice(n, n + 1))
        total = batch.valid[:, n].sum()
        groups.append(torch.stack([gradient(agent, part, x[:, n : n + 1]) for x in slopes]) / total)
    groups = torch.stack(groups)
    torch.testing.assert_close(found, groups.mean(0), rtol=1e-9, atol=1e-12)
    spread = groups.var(0).sum(1).div(8).sqrt() / groups.mean(0).norm(dim=1)
    torch.testing.assert_close(errors, spread, rtol=1e-9, atol=0)


def operators(batch, decay):
    """W (N, T, T) of each environment: decay^(k-t) for k >= t within an episode."""
    found = torch.zeros(batch.valid.shape[1], len(batch.valid), len(batch.valid), dtype=torch.float64)
    for n, steps in episodes(batch):
        for t in steps:
            for k in (k for k in steps if k >= t):
                found[n, t, k] = decay ** (k - t)
    return found


def test_estimates_are_the_scripts_formulas():
    """Each arm against dense algebra: W as a matrix for each environment, the Jacobian row by row."""
    agent, batch = agent_of(ppo_continuous), fragment(seed=3)
    found, residual = study.estimates(agent, batch, agent.critic, GAMMA, torch.Generator().manual_seed(5))
    assert residual < 0.05
    weights = (batch.valid / batch.valid.sum()).T
    for (target, nested, leader, arm), estimate in found.items():
        advantages, returns = batch.advantages(agent.critic, target, GAMMA)
        critic = blpo.copy.deepcopy(agent.critic)
        optimiser = torch.optim.Adam(critic.parameters(), 2.8e-3, eps=1e-5, fused=True)
        for _ in range(nested):
            optimiser.zero_grad()
            errors = returns - critic(batch.obs[:-1]).squeeze(-1)
            (weights.T * errors**2).sum().backward()
            optimiser.step()
        operator = {x: operators(batch, GAMMA * x) for x in (leader, target, 0.0)}
        states = batch.obs.transpose(0, 1).reshape(-1, 3)  # environment by environment
        values = critic(states).view(8, 25).detach()
        deltas = (batch.rewards + batch.discounts * values[:, 1:].T - values[:, :-1].T).T
        direct = (operator[leader] @ deltas[:, :, None]).squeeze(-1)
        direct = direct - (weights * direct).sum()
        mixed = advantages.T - (weights * advantages.T).sum()
        parameters = [*critic.parameters()]
        dense = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(critic(row[None]).sum(), parameters)])
                for row in states
            ]
        )
        level = values.clone().requires_grad_()  # dG/dV by autograd
        deltas = batch.rewards.T + batch.discounts.T * level[:, 1:] - level[:, :-1]
        returns_of = level[:, :-1] + (operator[leader] @ deltas[:, :, None]).squeeze(-1)
        u = torch.autograd.grad((weights * returns_of).sum(), level)[0].flatten()
        root = torch.nn.functional.pad(2 * weights, (0, 1)).flatten().sqrt()[:, None] * dense
        v = torch.linalg.solve(root.T @ root + torch.eye(dense.shape[1]), dense.T @ u)
        z = (dense @ v).view(8, 25)[:, :-1]
        e = (operator[target].mT @ z[:, :, None]).squeeze(-1)
        trace = {
            "direct": 0 * e,
            "own start": batch.valid.T * z,
            "total": e,
            "constant": torch.full_like(e, float((weights * e).sum())),
        }
        std = (weights * direct**2).sum().sqrt() + 1e-8
        if arm == "permuted":
            continue
        expected = gradient(agent, batch, (weights * (direct + 2 * trace[arm] * mixed) / std).T)
        torch.testing.assert_close(estimate, expected, rtol=0.02, atol=0.02 * float(expected.norm()))
        if nested == 3 and arm == "total":  # the arms differ by more than the solver's tolerance
            assert (estimate - found[target, nested, leader, "direct"]).norm() > 0.1 * expected.norm()


def made_rows(total, direct, constant):
    """Rows of ten policies in one setting whose arms have these cosines, with a little noise of their own."""
    noise = 0.01 * np.random.default_rng(0).standard_normal((10, 5))
    base = {"direct": direct, "own start": 0.0, "total": total, "constant": constant, "permuted": 0.0}
    return [
        ["Hopper-v4", 701, stage, 64, 2048, 0.95, 3, 0.95, arm, "start", base[arm] + noise[stage, i], 0.0]
        for stage in range(10)
        for i, arm in enumerate(study.ARMS)
    ]


@pytest.mark.parametrize(
    "cosines, said",
    [((0.6, 0.5, 0.5), "yes"), ((0.6, 0.5, 0.6), "no"), ((0.6, 0.6, 0.5), "no"), ((0.4, 0.5, 0.5), "no")],
)
def test_it_matters_only_above_both(cosines, said):
    (row,) = study.verdicts(made_rows(*cosines))
    assert row["matters"] == said and row["policies"] == 10
    assert float(row["total"]) == pytest.approx(cosines[0], abs=0.01)


@pytest.mark.full
def test_a_small_study(tmp_path, capsys):
    words = {"tasks": ("CartPole-v1",), "stages": (1,), "seeds": (701,), "reference_steps": 10_000}
    args = study.Args(**words, run_dir=tmp_path / "runs", results_dir=tmp_path / "results")
    run(args, study.measure, study.__file__)
    names = {path.name for path in args.results_dir.iterdir()}
    tables = {f"{name}.{kind}" for name in ("policies", "verdicts", "answers") for kind in ("csv", "json")}
    assert names == tables | {"cosines.csv.gz", "gradient_quality.png"}
    assert "where the theory says" in capsys.readouterr().out
    first = (args.results_dir / "verdicts.csv").read_bytes()
    run(args, study.measure, study.__file__)  # nothing is made again
    assert (args.results_dir / "verdicts.csv").read_bytes() == first


def test_bad_input_is_one_sentence():
    for words, said in (({"stages": (11,)}, "--stages"), ({"tasks": ()}, "--tasks"), ({"reference_steps": 3}, "--reference-steps")):
        with pytest.raises(BadInput, match=said):
            study.Args(**words)


def test_committed_results_follow_the_rule():
    """The committed verdicts are those of the committed cosines."""
    folder = REPO / "benchmark" / "results" / "gradient_quality"
    if not folder.exists():
        pytest.skip("no results are committed yet")
    rows = pd.read_csv(folder / "cosines.csv.gz").itertuples(index=False, name=None)
    found, committed = pd.DataFrame(study.verdicts([*rows])), pd.read_csv(folder / "verdicts.csv")
    names = ["task", "reference", "leader", "targets", "K", "width", "batch", "policies", "matters"]
    assert found[names].astype(str).equals(committed[names].astype(str))
