"""How long an update of `stddpg.py` and `stsac.py` takes, by leader and solver, against the same script's plain update.

    python -m benchmark.speed_stackelberg                                                 a few minutes on an idle core
    python -m benchmark.speed_stackelberg --results-dir benchmark/results/speed_stackelberg      and writes its files
    python -m benchmark.speed_stackelberg --device cuda                                   with the networks on a GPU

The reference is `--leader none-sequential` of the same script: DDPG or SAC as usual, with the same networks (256-256),
batch (100) and optimiser (Adam in one fused kernel on a flat vector). What is timed is the training as it is: the
column time/update of metrics.csv, minibatches, both players' steps, targets and diagnostics (one update of an iteration)
included, environments and evaluation not. The column `loop` has the whole iteration, environments and logging included.

How the numbers are taken. On the CPU with one torch thread. Every competitor trains in a process of its own that sleeps
when it is not its turn; they take turns of one iteration (--num-steps updates each), A B C A B C ..., after one that does
not count, so that a change of the machine's load meets all alike. A number is the median over the turns with
(lowest..highest), and a ratio is taken within a turn before its median. The load average is printed and kept, because a
busy machine spoils all of them; ratios suffer less than milliseconds. The rows "10 iterations" make exactly ten: no guard
and no tolerance ends the solve earlier (lambda = 500 keeps the matrix positive definite). The rows "lambda = 0" are the
paper's setting, in which the guard may end a solve earlier.

With `--device cuda` the environments stay on the CPU, and the updates are CUDA graphs but for those with conjugate gradients,
which cannot be captured, since their guard decides on the CPU. A second table has one update as a graph, its minibatch fixed,
without diagnostics, beside the same update launched kernel by kernel on both devices.

Writes speed_stackelberg.csv and speed_stackelberg.json (all samples, command, commit, versions, load).
"""

import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

import stddpg
import stsac
from benchmark.speed import Row, loops_in_turns, provenance, ratios, script_loop, show, write_csv

REFERENCE = "none-sequential"
COMPETITORS = {  # name -> (words, whether conjugate gradient makes all its iterations)
    REFERENCE: ("--leader none-sequential", False),
    "none-simultaneous": ("--leader none-simultaneous", False),
    "actor, kernel": ("--leader actor --ihvp kernel", False),
    "actor, cg, 10 iterations": ("--leader actor --ihvp cg --regularisation 500", True),
    "actor, cg, lambda = 0": ("--leader actor --ihvp cg --regularisation 0", False),
    "critic, cg, 10 iterations": ("--leader critic --regularisation 500", True),
    "critic, cg, lambda = 0": ("--leader critic --regularisation 0", False),
}
TARGETS = {  # ratio to the reference that is aimed at
    "stddpg.py": {"actor, kernel": 2.0, "actor, cg, 10 iterations": 7.5, "critic, cg, 10 iterations": 9.0},
    "stsac.py": {"actor, kernel": 2.0, "actor, cg, 10 iterations": 9.0, "critic, cg, 10 iterations": 9.0},
}


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    """environment; its episodes never end early, so each of its steps has one update"""
    scripts: tuple[str, ...] = ("stddpg.py", "stsac.py")
    """whose updates to measure"""
    rounds: int = 9
    """turns of each competitor, in [1, inf)"""
    num_steps: int = 250
    """updates in a turn, in [1, inf)"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks live"""
    results_dir: Path | None = None
    """folder for the csv and json files; default: nothing is written"""


def all_iterations(script) -> None:
    """Let the script's conjugate gradient make every iteration."""
    script.conjugate_gradient = partial(script.conjugate_gradient, tolerance=0.0)


def competitor(script, words: list[str], all_of_them: bool, rollout_done: Callable[[dict[str, float]], None]) -> None:
    """The training with these words, for `loops_in_turns`."""
    if all_of_them:
        all_iterations(script)
    script_loop(script, words, rollout_done)


def measure(script, args: Args) -> dict[str, list[dict[str, float]]]:
    """Seconds of an iteration of each competitor, for each turn."""
    with tempfile.TemporaryDirectory() as runs:
        common = f"--env-id {args.env_id} --device {args.device} --env-threads 1 --run-dir {runs} --eval-episodes 0"
        common += f" --num-steps {args.num_steps} --update-every {math.gcd(50, args.num_steps)}"
        common += f" --learning-starts 0 --total-timesteps {(args.rounds + 2) * args.num_steps}"
        loops = {
            name: partial(competitor, script, [*common.split(), *words.split()], all_of_them)
            for name, (words, all_of_them) in COMPETITORS.items()
        }
        return loops_in_turns(loops, args.rounds, 1)


# ---- One update as a CUDA graph --------------------------------------------------------------------------------
def one_update(script, leader: str, device: str) -> Callable[[], None]:
    """An update of the script as `train` makes it at its defaults, with one minibatch of noise and without diagnostics."""
    args = script.parse_args(script.Args, ["--env-id", "HalfCheetah-v4", "--device", device, "--leader", leader])
    obs_dim, action_dim, n = 17, 6, args.batch_size
    torch.manual_seed(0)
    agent = script.Agent(obs_dim, action_dim, args).to(device)
    theta, omega, target = (script.flat_view(part.parameters()) for part in (agent.actor, agent.critics, agent.targets))
    actor_optimiser = script.FlatAdam({"params": theta, "lr": args.learning_rate, "eps": 1e-8})
    critic_optimiser = script.FlatAdam({"params": omega, "lr": args.critic_learning_rate, "eps": 1e-8})
    thetas = list(agent.actor.parameters())
    theta_grads, omega_grads = ([each.grad for each in part.parameters()] for part in (agent.actor, agent.critics))
    pairs, b_next_obs = torch.randn(n, obs_dim + action_dim, device=device), torch.randn(n, obs_dim, device=device)
    b_rewards, discounts = torch.randn(n, device=device), torch.full((n,), args.gamma, device=device)
    here, there = torch.randn(2, n, agent.noise_dim, device=device)
    b_obs, leads = pairs[:, :obs_dim], leader == "actor"

    def update() -> None:
        with torch.set_grad_enabled(leads):
            backups = script.backup(agent, b_rewards, discounts, b_next_obs, there)
        data = script.stacks(agent.critics, pairs)
        errors = script.td_errors(data, backups)
        torch._foreach_copy_(omega_grads, script.critic_gradient(data, errors))
        if not leads:
            critic_optimiser.update()
        actions, costs = agent.policy(agent.actor(b_obs), here)
        led, least, slopes = script.led_critics(agent, b_obs, actions)
        loss = script.policy_loss(actions, costs, slopes)
        if leads:
            z = script.kernel_response(data, led, least, args.regularisation)
            loss = loss + (2 * z.sum(0) * backups).mean()
        torch._foreach_copy_(theta_grads, torch.autograd.grad(loss, thetas))
        actor_optimiser.update()
        if leads:
            critic_optimiser.update()
        with torch.no_grad():
            target.lerp_(omega, 1 - args.polyak)

    return update


def captured(update: Callable[[], None]) -> Callable[[], None]:
    """The update as a CUDA graph: what replays it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()

    def replay(kept: Callable[[], None] = update) -> None:  # the graph's addresses are those of the update's tensors
        graph.replay()

    return replay


def measure_graphs(args: Args) -> list[Row]:
    """Milliseconds of one update, by turns of `num_steps` of them; after the loops, since a process with CUDA cannot fork."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, leader in itertools.product(args.scripts, (REFERENCE, "actor")):
        script = {"stddpg.py": stddpg, "stsac.py": stsac}[name]
        calls = {f"{device}, launched": one_update(script, leader, device) for device in ("cpu", "cuda")}
        try:
            calls["cuda, graph"] = captured(one_update(script, leader, "cuda"))
        except RuntimeError as error:
            print(f"{name}, {leader}: no graph: {str(error).splitlines()[0]}")
        samples: dict[str, list[float]] = {key: [] for key in calls}
        for turn, (key, call) in itertools.product(range(args.rounds + 1), calls.items()):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(args.num_steps):
                call()
            torch.cuda.synchronize()
            if turn:
                samples[key].append(1e3 * (time.perf_counter() - start) / args.num_steps)
        launched = samples["cpu, launched"]
        leads = {REFERENCE: REFERENCE, "actor": "actor, kernel"}[leader]
        rows += [
            {"script": name, "update": leads, "how": key, "ms": times, "of_the_cpu": ratios(times, launched)}
            for key, times in samples.items()
        ]
    show(f"One update with a fixed minibatch, {args.rounds} turns of {args.num_steps}", rows)
    return rows


def main(args: Args) -> None:
    """Measure, print, and write if asked."""
    made_by, load, rows = provenance("speed_stackelberg"), [os.getloadavg()[0]], []
    if args.device == "cuda" and made_by["gpu"] is None:
        sys.exit("error: --device cuda: PyTorch finds no CUDA device here; use --device cpu")
    for name in args.scripts:
        seconds = measure({"stddpg.py": stddpg, "stsac.py": stsac}[name], args)
        load.append(os.getloadavg()[0])
        update, loop = ({key: [turn[part] for turn in turns] for key, turns in seconds.items()} for part in ("update", "rollout"))
        rows += [
            {
                "script": name,
                "update": key,
                "ms": [1e3 * each / args.num_steps for each in update[key]],
                "ratio": ratios(update[key], update[REFERENCE]),
                "target": str(TARGETS[name].get(key, "-")),
                "loop": ratios(loop[key], loop[REFERENCE]),
            }
            for key in seconds
        ]
    title = f"{args.env_id}, networks on {made_by['gpu'] if args.device == 'cuda' else 'the CPU'}, {args.rounds} turns of {args.num_steps} updates, load average {load[0]:.1f} to {load[-1]:.1f}"
    show(title, rows)
    graphs = measure_graphs(args) if args.device == "cuda" else []
    if args.results_dir is not None:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        write_csv(args.results_dir / "speed_stackelberg.csv", rows)
        if graphs:
            write_csv(args.results_dir / "graphs.csv", graphs)
        content = {"provenance": made_by | {"load_average": load}, "rows": rows} | ({"graphs": graphs} if graphs else {})
        (args.results_dir / "speed_stackelberg.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
