"""Which lambda the off-policy Stackelberg scripts need, measured on networks and minibatches of real, short runs.

    python -m benchmark.stackelberg_damping                                                           prints the table
    python -m benchmark.stackelberg_damping --results-dir benchmark/results/stackelberg_damping        and writes it

Each run (actor-led, kernel, lambda = 1; a seed that no suite reports) is stopped after --steps steps; then
--batches minibatches are drawn from its replay, and each solve is made for each lambda at the same networks and minibatches.
A row: median (largest) relative residual |(H + lambda I) x - b| / |b|; medians of |total gradient| / |own gradient| of
the leader and of the cosine between them; the fractions of solves that the guard stopped and of those with x = 0, which
leave the leader's own gradient; the median of the mean weight 2 z that the actor's backups get. Multiplier and cosine
are nan where the actor is saturated and its own gradient is 0.

The rule for the default of `--regularisation`: the smallest power of ten at which every residual of the kernel is
below 1e-3, the largest included.
"""

import contextlib
import csv
import io
import json
import math
import os
import signal
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

import stddpg
import stsac
from benchmark.machine import provenance, write_atomically

SCRIPTS = {"stddpg.py": stddpg, "stsac.py": stsac}
LAMBDAS = {
    "actor, kernel": (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
    "actor, cg": (0.0, 1.0, 10.0, 100.0, 500.0),
    "critic, cg": (0.0, 0.1, 1.0, 10.0, 100.0),
}


@dataclass
class Args:
    scripts: tuple[str, ...] = ("stddpg.py", "stsac.py")
    """whose solves to study"""
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4")
    """environments of the runs"""
    steps: int = 6000
    """steps of each run, in [1000, inf); the first 3000 are random"""
    batches: int = 20
    """minibatches of each run, in [1, inf)"""
    seed: int = 101
    """seed of the runs, which no suite reports"""
    results_dir: Path | None = None
    """folder for the csv and json files; default: nothing is written"""


def interrupted_run(script, env_id: str, args: Args, run_dir: Path) -> Path:
    """The folder of a run with a checkpoint and its replay after args.steps steps."""
    log = script.Run.log

    def log_and_stop(run, global_step, *rest):
        log(run, global_step, *rest)
        if global_step >= args.steps and not run.stop_signal:
            os.kill(os.getpid(), signal.SIGTERM)

    words = f"--env-id {env_id} --seed {args.seed} --device cpu --env-threads 1 --random-steps 3000 --eval-episodes 0"
    words += " --regularisation 1"
    words += f" --total-timesteps {2 * args.steps} --run-dir {run_dir}"
    script.Run.log = log_and_stop
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        script.train(script.parse_args(words.split()))
    script.Run.log = log
    return next(run_dir.iterdir())


def solves(script, folder: Path, batches: int) -> list[dict]:
    """One row for each solver and lambda."""
    args = script.parse_args(["--resume", str(folder)])
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    agent = script.Agent(*checkpoint["agent_sizes"])
    agent.load_state_dict(checkpoint["agent"])
    obs_dim, action_dim, *_ = checkpoint["agent_sizes"]
    sizes = args.total_timesteps, obs_dim, action_dim, args.buffer_size, checkpoint["replay_size"]
    replay = script.Replay(folder / "replay.bin", *sizes)
    thetas, found = list(agent.actor.parameters()), {}
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

        def gradient(objective: torch.Tensor) -> torch.Tensor:
            return script.flatten(torch.autograd.grad(objective, thetas, retain_graph=True))

        own = {"actor": gradient(loss), "critic": data.vjp(2 / len(pairs) * errors)}
        critic_hessian = script.critic_hessian(agent, pairs, backups)
        actor_hessian = script.actor_hessian(agent, obs, here)
        b = gradient(-2 * (errors.sum(0) * backups).mean())
        for name, lambdas in LAMBDAS.items():
            leader = name.split(", ")[0]
            for damping in lambdas:
                if name == "actor, kernel":
                    response, stopped = script.kernel_response(data, led, damping), False
                    residual = partial(script.kernel_residual, response, data, led, damping)
                elif name == "actor, cg":
                    response, stopped, residual = script.cg_response(data, led, critic_hessian, damping, 10)
                else:
                    response, stopped, residual = script.guarded_solve(actor_hessian, b, damping, 10)
                if leader == "actor":
                    total = gradient(loss + 2 * (response.sum(0) * backups).mean())
                else:
                    total = own[leader] - script.critic_correction(agent, obs, here, response)
                numbers = script.leader_diagnostics(own[leader], total)
                weight = 2 * response.sum(0).mean().item() if leader == "actor" else math.nan
                multiplier = numbers["bilevel/multiplier"] if own[leader].any() else math.nan
                sample = (residual().item(), multiplier, numbers["bilevel/cosine"], weight)
                found.setdefault((name, damping), []).append((*sample, float(stopped), float(not response.any())))
    rows = []
    for (name, damping), samples in found.items():
        residuals, multipliers, cosines, weights, stopped, plain = zip(*samples)
        rows.append({
            "script": f"{script.__name__}.py", "env_id": args.env_id, "solve": name, "lambda": f"{damping:g}",
            "residual": f"{statistics.median(residuals):.1e}", "largest": f"{max(residuals):.1e}",
            "multiplier": f"{statistics.median(multipliers):.2f}", "cosine": f"{statistics.median(cosines):.3f}",
            "weight": f"{statistics.median(weights):.2f}",
            "stopped": f"{statistics.mean(stopped):.2f}", "plain": f"{statistics.mean(plain):.2f}",
        })  # fmt: skip
    return rows


def main(args: Args) -> None:
    """Run, measure, print, and write if asked."""
    torch.set_num_threads(1)
    rows = []
    for name in args.scripts:
        for env_id in args.env_ids:
            with tempfile.TemporaryDirectory() as run_dir:
                rows += solves(SCRIPTS[name], interrupted_run(SCRIPTS[name], env_id, args, Path(run_dir)), args.batches)
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        print("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip())
    if args.results_dir is not None:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        with open(args.results_dir / "solves.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        made = provenance() | {"command": " ".join(["python", "-m", "benchmark.stackelberg_damping", *sys.argv[1:]])}
        text = json.dumps(made, indent=1) + "\n"
        write_atomically(args.results_dir / "provenance.json", lambda new: new.write_text(text))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
