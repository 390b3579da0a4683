"""Which lambda the off-policy Stackelberg scripts need, on networks and minibatches of short real runs.

    python -m benchmark.studies.stackelberg_damping --results-dir benchmark/results/stackelberg_damping

Each run (actor-led, kernel, lambda = 1; a seed that no suite reports) ends after --steps steps; then
--batches minibatches are drawn from its replay, and each solve is made for each lambda at the same networks
and minibatches. A row of solves.csv: median and largest relative residual |(H + lambda I) x - b| / |b|;
medians of |total gradient| / |own gradient| of the leader and of the cosine between them, and of the mean
weight 2 z that the actor's backups get; the fractions of solves that the guard stopped and of those with
x = 0, which leave the leader's own gradient. The multiplier is empty where the actor is saturated and its own
gradient is 0.

The rule for the default of `--regularisation`: the smallest power of ten at which every residual of the
kernel is below 1e-3, the largest included.
"""

import itertools
import math
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import pandas as pd
import torch
from pydantic import Field

import stddpg
import stsac
from benchmark.studies import study

Script = Literal["stddpg.py", "stsac.py"]
SOLVES = [("actor, kernel", damping) for damping in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)]
SOLVES += [("actor, cg", damping) for damping in (0.0, 1.0, 10.0, 100.0, 500.0)]
SOLVES += [("critic, cg", damping) for damping in (0.0, 0.1, 1.0, 10.0, 100.0)]


class Args(study.Args):
    """The runs."""

    scripts: Annotated[tuple[Script, ...], study.AT_LEAST_ONE] = get_args(Script)
    """whose solves to study"""
    env_ids: Annotated[tuple[str, ...], study.AT_LEAST_ONE] = ("HalfCheetah-v4", "Hopper-v4")
    """environments of the runs"""
    steps: Annotated[int, Field(ge=1000, le=10**8)] = 6000
    """steps of each run; the first 3000 are random"""
    batches: study.Count = 20
    """minibatches of each run"""
    seed: study.Seed = 101
    """seed of the runs, which no suite reports"""


def solves(script, folder: Path, batches: int) -> list[dict]:
    """One row for each minibatch, solver and lambda."""
    args = script.parse_args(["--resume", str(folder)])
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    agent = script.Agent(*checkpoint["agent_sizes"])
    agent.load_state_dict(checkpoint["agent"])
    obs_dim, action_dim, *_ = checkpoint["agent_sizes"]
    sizes = args.total_timesteps, obs_dim, action_dim, args.buffer_size, checkpoint["replay_size"]
    replay = script.Replay(folder / "replay.bin", *sizes)
    thetas, rows = list(agent.actor.parameters()), []

    def gradient(objective: torch.Tensor) -> torch.Tensor:
        return script.flatten(torch.autograd.grad(objective, thetas, retain_graph=True))

    torch.manual_seed(0)
    for _ in range(batches):
        pairs, rewards, next_obs, terminated = (array[0] for array in replay.sample(1, args.batch_size))
        obs, (here, there) = pairs[:, :obs_dim], torch.randn(2, args.batch_size, agent.noise_dim)
        backups = script.backup(agent, rewards, args.gamma * (1 - terminated), next_obs, there)
        data = script.CriticJacobian(agent.critics, pairs)
        errors = data.values - backups.detach()
        actions, costs = agent.policy(agent.actor(obs), here)
        led = script.CriticJacobian(agent.critics, torch.cat([obs, actions.detach()], 1), least=True)
        loss = script.policy_loss(actions, costs, led.slopes[:, obs_dim:])
        own = {"actor": gradient(loss), "critic": data.vjp(2 / len(pairs) * errors)}
        critic_hessian = script.critic_hessian(agent, pairs, backups)
        actor_hessian = script.actor_hessian(agent, obs, here)
        b = gradient(-2 * (errors.sum(0) * backups).mean())
        for name, damping in SOLVES:
            if name == "actor, kernel":
                response, stopped = script.kernel_response(data, led, damping), False
                residual = partial(script.kernel_residual, response, data, led, damping)
            elif name == "actor, cg":
                response, stopped, residual = script.cg_response(data, led, critic_hessian, damping, 10)
            else:
                response, stopped, residual = script.guarded_solve(actor_hessian, b, damping, 10)
            leader, weight = name.split(", ")[0], math.nan
            if leader == "actor":
                total = gradient(loss + 2 * (response.sum(0) * backups).mean())
                weight = 2 * response.sum(0).mean().item()
            else:
                total = own[leader] - script.critic_correction(agent, obs, here, response)
            numbers = script.leader_diagnostics(own[leader], total)
            rows.append({
                "script": f"{script.__name__}.py", "env_id": args.env_id, "solve": name, "lambda": damping,
                "residual": residual().item(), "weight": weight, "cosine": numbers["bilevel/cosine"],
                "multiplier": numbers["bilevel/multiplier"] if own[leader].any() else math.nan,
                "stopped": float(stopped), "plain": float(not response.any()),
            })  # fmt: skip
    return rows


def measure(args: Args) -> Iterator[tuple[str, list[study.Row]]]:
    """One row for each script, environment, solver and lambda."""
    torch.set_num_threads(1)
    rows, words = [], f"--seed {args.seed} --device cpu --env-threads 1 --random-steps 3000 --eval-episodes 0"
    words += f" --regularisation 1 --total-timesteps {args.steps}"
    for name, env_id in itertools.product(args.scripts, args.env_ids):
        script = {"stddpg.py": stddpg, "stsac.py": stsac}[name]
        with tempfile.TemporaryDirectory() as run_dir:
            given = f"{words} --env-id {env_id} --run-dir {run_dir}".split()
            rows += solves(script, script.train(script.parse_args(given)), args.batches)
    columns = {column: (column, "median") for column in ("residual", "multiplier", "cosine", "weight")}
    columns |= {"largest": ("residual", "max"), "stopped": ("stopped", "mean"), "plain": ("plain", "mean")}
    groups = pd.DataFrame(rows).groupby(["script", "env_id", "solve", "lambda"], sort=False)
    yield "solves", groups.agg(**columns).reset_index().to_dict("records")


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
