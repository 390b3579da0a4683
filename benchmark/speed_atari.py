"""How fast the Atari scripts are: whole training loops, and one hypergradient by follower and solver.

    python -m benchmark.speed_atari                                              about twenty minutes on two idle cores
    python -m benchmark.speed_atari --quick                                      one turn of each, for a look only
    python -m benchmark.speed_atari --results-dir benchmark/results/speed_atari  keeps the numbers
    python -m benchmark.speed_atari --parts cuda                                 on a machine with a CUDA device

    loops    the games alone, PPO, a reference PPO loop with one torch thread and with one for each core, PPO with separate
             trunks, BLPO with the head as its follower, and without the hypergradient
    followers  BLPO with the followers last-two and full, against PPO with separate trunks
    layers   processor milliseconds and GFLOPS of each layer of the network, against a matrix product: what limits the scripts
    solvers  milliseconds of one PPO minibatch and of one hypergradient
    cuda     the loops with the networks on a CUDA device, in PyTorch's default precision (convolutions in TF32, but for the follower
             full), with more games, with every follower; each of the 14 processes takes seconds to begin

How the numbers are taken: as in benchmark/turns.py, on the CPU but for the last part. Competitors take turns, A B C A B C ..., each in a process of
its own that sleeps meanwhile; a turn is one rollout of 8 games x 128 steps with its update, after one that does not count
(on CUDA four of them, after two). A number is the median over the turns with (lowest..highest), and a
ratio is taken within a turn before its median. The
scripts use one torch thread for each usable core, as by default (--torch-threads), and EnvPool one for each as well; the
reference gets the same EnvPool threads, and the better of one torch thread and as many as the scripts have is what PPO is
compared with. In `layers` and `solvers` there is one torch thread. The load average is printed and kept, because a busy machine spoils all
of them, those with several threads most. Columns with `cpu` are seconds of processor time of all threads, which a busy
machine changes less; threads that wait for others in a loop count as busy.

Without --results-dir nothing is written. With it: {part}.csv and speed_atari.json (all samples, command, commit, machine, load).
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import envpool
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor

import blpo_atari as blpo
import ppo_atari as ppo
from benchmark.turns import (
    Loop, Row, loops_in_turns, milliseconds, provenance_of, ratios, script_loop, show, with_processor_time, write_csv
)  # fmt: skip

CPU_PARTS = ("loops", "followers", "layers", "solvers")
PARTS = ("loops", "followers", "cuda", "layers", "solvers")  # torch forbids forks once autograd has run here


@dataclass
class Args:
    quick: bool = False
    """one turn of each competitor: shows that everything runs, measures little"""
    parts: tuple[Literal["loops", "followers", "layers", "solvers", "cuda"], ...] = CPU_PARTS
    """what to measure; cuda needs a CUDA device"""
    env_id: str = "Breakout-v5"
    """the game"""
    rounds: int = 5
    """turns of each competitor, in [1, inf)"""
    torch_threads: int = 0
    """PyTorch's threads in the scripts, in [0, inf); 0: one for each usable core"""
    results_dir: Path | None = None
    """folder of the results; default: nothing is written"""


# ---- Whole loops -----------------------------------------------------------------------------------------------
def games_loop(words: list[str], rollout_done: Callable[[dict[str, float]], None]) -> None:
    """The games alone, with random actions drawn beforehand: the limit of every loop on them."""
    args = ppo.parse_args(words)
    envs = ppo.make_envs(args, args.num_envs, args.seed)
    actions = np.random.default_rng(args.seed).integers(0, envs.action_space.n, (args.num_steps, args.num_envs))
    envs.reset()
    while True:
        start = time.perf_counter()
        for action in actions:
            envs.step(action)
        rollout_done({"env": time.perf_counter() - start, "policy": 0.0, "update": 0.0})


def reference_loop(words: list[str], threads: int, rollout_done: Callable[[dict[str, float]], None]) -> None:
    """PPO in the manner of CleanRL's `ppo_atari_envpool`, the loop that most readers know; no logging. Everything lives on
    the device that the words name.

    Images as floats in PyTorch's default memory order, divided by 255 in the network, torch.distributions, GAE as a loop
    over time, Adam's default implementation, numbers read back in every minibatch, and every row counts.
    """
    args = ppo.parse_args(words)
    torch.set_num_threads(threads)
    envs = envpool.make(
        args.env_id, env_type="gymnasium", num_envs=args.num_envs, num_threads=min(cores(), args.num_envs), episodic_life=True,
        reward_clip=True, seed=args.seed,
    )  # fmt: skip
    device = torch.device(args.device)
    trunk, heads = ppo.nature_cnn().to(device), (nn.Linear(512, int(envs.action_space.n)), nn.Linear(512, 1))
    actor, critic = (ppo.layer_init(head, gain).to(device) for head, gain in zip(heads, (0.01, 1.0)))
    parameters = [*trunk.parameters(), *actor.parameters(), *critic.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5)

    def policy_and_value(images: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        features = trunk(images / 255.0)
        return torch.distributions.Categorical(logits=actor(features)), critic(features).flatten()

    shape, batch_size = (args.num_steps, args.num_envs), args.num_steps * args.num_envs
    obs, actions = torch.zeros(*shape, 4, 84, 84, device=device), torch.zeros(shape, device=device)
    logprobs, rewards, dones, values = (torch.zeros(shape, device=device) for _ in range(4))
    next_obs, next_done = torch.Tensor(envs.reset()[0]).to(device), torch.zeros(args.num_envs, device=device)
    points, finished = np.zeros(args.num_envs), []
    while True:
        rollout_start, env_time = time.perf_counter(), 0.0
        for t in range(args.num_steps):
            obs[t], dones[t] = next_obs, next_done
            with torch.no_grad():
                policy, values[t] = policy_and_value(next_obs)
                action = policy.sample()
                policy.entropy()
                actions[t], logprobs[t] = action, policy.log_prob(action)
            env_start = time.perf_counter()
            images, reward, terminated, truncated, info = envs.step(action.cpu().numpy())
            env_time += time.perf_counter() - env_start
            rewards[t] = torch.tensor(reward).to(device).view(-1)
            next_obs, next_done = (torch.Tensor(x).to(device) for x in (images, np.logical_or(terminated, truncated)))
            points += info["reward"]
            for index in np.flatnonzero(info["lives"] == 0):
                finished.append(points[index])
                points[index] = 0.0
        update_start = time.perf_counter()
        with torch.no_grad():
            next_value, last = policy_and_value(next_obs)[1], 0.0
            advantages = torch.zeros_like(rewards)
            for t in reversed(range(args.num_steps)):
                going = 1.0 - (next_done if t == args.num_steps - 1 else dones[t + 1])
                following = next_value if t == args.num_steps - 1 else values[t + 1]
                delta = rewards[t] + args.gamma * following * going - values[t]
                advantages[t] = last = delta + args.gamma * args.gae_lambda * going * last
            returns = advantages + values
        flat = [x.reshape(batch_size, *x.shape[2:]) for x in (obs, actions, logprobs, advantages, returns, values)]
        order, clip_fractions = np.arange(batch_size), []
        for _ in range(args.update_epochs):
            np.random.shuffle(order)
            for batch in np.split(order, args.num_minibatches):
                b_obs, b_actions, b_logprobs, b_advantages, b_returns, b_values = (x[batch] for x in flat)
                policy, new_values = policy_and_value(b_obs)
                entropy = policy.entropy()
                logratio = policy.log_prob(b_actions) - b_logprobs
                ratio = logratio.exp()
                with torch.no_grad():
                    (-logratio).mean()
                    ((ratio - 1) - logratio).mean()
                    clip_fractions.append(((ratio - 1.0).abs() > args.clip_coef).float().mean().item())
                b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
                clipped_ratio = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = torch.max(-b_advantages * ratio, -b_advantages * clipped_ratio).mean()
                change = torch.clamp(new_values - b_values, -args.clip_coef, args.clip_coef)
                errors = torch.max((new_values - b_returns) ** 2, (b_values + change - b_returns) ** 2)
                loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * 0.5 * errors.mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimiser.step()
        now = time.perf_counter()
        policy_time = update_start - rollout_start - env_time
        rollout_done({"env": env_time, "policy": policy_time, "update": now - update_start})


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def take_turns(
    args: Args,
    title: str,
    loops: Callable[[list[str]], dict[str, Loop]],
    against: tuple[str, ...],
    device: str = "cpu",
    rollouts: int = 1,
    warmup: int = 1,
    num_envs: dict[str, int] | None = None,
) -> list[Row]:
    """The rows of loops that took turns of some `rollouts`, after `warmup` of them that do not count; `against` names those
    that ratios of time are taken with, the fastest of them. `num_envs` of a loop, if not 8."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--env-id", args.env_id, "--run-dir", folder, "--device", device, "--torch-threads", str(args.torch_threads)]
        competitors = {name: with_processor_time(loop) for name, loop in loops(words).items()}
        samples = loops_in_turns(competitors, args.rounds, rollouts, warmup)
        num_steps, usual = ppo.Args().num_steps, ppo.Args().num_envs
    rows_of = {name: num_steps * (num_envs or {}).get(name, usual) for name in samples}
    seconds, cpu = ({name: [turn[key] for turn in turns] for name, turns in samples.items()} for key in ("rollout", "cpu"))
    best = min((name for name in against), key=lambda name: statistics.median(seconds[name]))
    rows: list[Row] = [
        {
            "env_id": args.env_id,
            "loop": name,
            "steps_per_s": [rows_of[name] / each for each in seconds[name]],
            f"speed_over_{best.replace(' ', '_')}": ratios(seconds[best], seconds[name]),
            "time_over_PPO_separate": ratios(seconds[name], seconds["PPO separate"]),
            "cpu_over_PPO_separate": ratios(cpu[name], cpu["PPO separate"]),
            "cpu_of_best_over_own": ratios(cpu[best], cpu[name]),
        }
        | {f"{part}_s": [turn[part] for turn in turns] for part in ("env", "policy", "update", "cpu")}
        for name, turns in samples.items()
    ]
    show(f"{title}: {args.env_id}, {usual} x {num_steps}; seconds are of one rollout", rows)
    return rows


def measure_loops(args: Args) -> list[Row]:
    counts = sorted({1, args.torch_threads or cores()})

    def loops(words: list[str]) -> dict[str, Loop]:
        return (
            {"games only": partial(games_loop, words), "PPO": partial(script_loop, ppo, words)}
            | {f"reference {count} threads": partial(reference_loop, words, count) for count in counts}
            | {
                "PPO separate": partial(script_loop, ppo, [*words, "--separate-trunks"]),
                "BLPO head": partial(script_loop, blpo, words),
                "BLPO head, none": partial(script_loop, blpo, [*words, "--ihvp", "none"]),
            }
        )

    return take_turns(args, "Loops", loops, tuple(f"reference {count} threads" for count in counts))


def measure_followers(args: Args) -> list[Row]:
    def loops(words: list[str]) -> dict[str, Loop]:
        return {"PPO separate": partial(script_loop, ppo, [*words, "--separate-trunks"])} | {
            f"BLPO {follower}, {ihvp}": partial(script_loop, blpo, [*words, "--follower", follower, "--ihvp", ihvp])
            for follower, ihvp in itertools.product(("last-two", "full"), ("none", "exact"))
        }

    return take_turns(args, "Followers", loops, ("PPO separate",))


def measure_cuda(args: Args) -> list[Row]:
    """Ratios of time say little for the loops with more games, whose rollouts are longer: compare their steps/s."""
    more = {"PPO, 32 games": 32, "PPO, 128 games": 128, "games only, 32": 32, "games only, 128": 128}

    def loops(words: list[str]) -> dict[str, Loop]:
        games = {name: [*words, "--num-envs", str(number)] for name, number in more.items()}
        return (
            {"games only": partial(games_loop, words), "reference": partial(reference_loop, words, 1)}
            | {"PPO": partial(script_loop, ppo, words)}
            | {"PPO separate": partial(script_loop, ppo, [*words, "--separate-trunks"])}
            | {
                f"BLPO {follower}, {ihvp}": partial(script_loop, blpo, [*words, "--follower", follower, "--ihvp", ihvp])
                for follower, ihvp in itertools.product(("head", "last-two", "full"), ("none", "exact"))
            }
            | {name: partial(games_loop if "only" in name else partial(script_loop, ppo), words) for name, words in games.items()}
        )

    return take_turns(args, "CUDA", loops, ("reference",), "cuda", 4, 2, more)


# ---- One layer -------------------------------------------------------------------------------------------------
def measure_layers(args: Args) -> list[Row]:
    """Of 256 images: each layer forwards and backwards (in its weights, and but for the first one in its inputs)."""
    torch.set_num_threads(1)
    x = blpo.pixels(torch.randint(0, 256, (256, 4, 84, 84), dtype=torch.uint8))
    square = torch.randn(2048, 2048)
    calls: dict[str, tuple[Callable[[], object], float]] = {"2048 x 2048 matrix product": (lambda: square @ square, 2 * 2048**3)}
    for index, layer in enumerate(blpo.nature_cnn().to(memory_format=torch.channels_last)):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            inputs = x.detach().requires_grad_(index > 0)
            slope = torch.randn_like(layer(inputs))
            products = slope.numel() * layer.weight[0].numel()
            calls[str(layer).split("(")[0] + f" {tuple(layer.weight.shape)}"] = (
                lambda layer=layer, inputs=inputs, slope=slope: layer(inputs).backward(slope), (6 if index else 4) * products
            )  # fmt: skip
        x = layer(x)
    rows: list[Row] = []
    for name, (call, operations) in calls.items():
        times = []
        for _ in range(args.rounds + 1):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        times = times[1:]
        rows.append({"layer": name, "cpu_ms": [1e3 * t for t in times], "GFLOPS": [1e-9 * operations / t for t in times]})
    show("Layers: 256 images, one torch thread", rows)
    return rows


# ---- One hypergradient -----------------------------------------------------------------------------------------
def measure_solvers(args: Args) -> list[Row]:
    """On 4 chunks of 64 steps of random images: the gradient of a PPO minibatch with separate trunks, and z by each solver."""
    torch.set_num_threads(1)
    agent = blpo.Agent(4, separate_trunks=True).to(memory_format=torch.channels_last)
    obs = torch.randint(0, 256, (4 * 65, 4, 84, 84), dtype=torch.uint8)
    weights, discounts = torch.full((4, 64), 1 / 256), torch.full((4, 64), 0.99)
    row_weights = nn.functional.pad(weights, (0, 1)).flatten()
    operator = blpo.gae_operator(torch.zeros(4, 64), torch.ones(4, 64), 0.99 * 0.95)
    u, generator = blpo.lambda_returns_vjp(weights, discounts, operator).flatten(), torch.Generator()

    def ppo_gradient() -> None:
        logits, values = agent.logits_and_values(obs)
        (logits.log_softmax(-1).sum() + values.sum()).backward()

    solvers = {
        "exact": lambda curvature: blpo.exact_ihvp(curvature, u, 1.0),
        "nystrom 10": lambda curvature: blpo.nystrom_ihvp(curvature, u, 1.0, 10, generator),
        "cg 10": lambda curvature: blpo.cg_ihvp(curvature, u, 1.0, 10),
    }

    def hypergradient(follower: nn.Sequential, inputs: Tensor, solve: Callable) -> None:
        jacobian = blpo.CriticJacobian(follower, inputs)
        jacobian.jvp(solve(blpo.GaussNewton(jacobian, row_weights))[1])

    calls: dict[str, Callable] = {"PPO minibatch, separate trunks": ppo_gradient}
    for name in ("head", "last-two", "full"):
        below, follower = blpo.split_critic(agent, name)
        inputs = below(blpo.pixels(obs)).detach()
        calls |= {f"{name}, {solver}": partial(hypergradient, follower, inputs, solve) for solver, solve in solvers.items()}
    samples = milliseconds(calls, args.rounds)
    reference = samples["PPO minibatch, separate trunks"]
    rows: list[Row] = [
        {"part": name, "ms": times, "of_a_PPO_minibatch": ratios(times, reference)} for name, times in samples.items()
    ]
    show("One hypergradient from the follower's inputs to z, 260 rows, one torch thread", rows)
    return rows


def main(args: Args) -> None:
    if args.rounds < 1 or args.torch_threads < 0:
        sys.exit("error: --rounds must be at least 1 and --torch-threads at least 0")
    args.rounds = 1 if args.quick else args.rounds
    made_by = provenance_of("speed_atari")
    if "cuda" in args.parts and made_by["gpu"] is None:
        sys.exit("error: --parts cuda needs a CUDA device, and PyTorch finds none here; leave it out")
    commit = f"commit {str(made_by['commit'])[:7]}{' with changes' if made_by['dirty'] else ''}"
    print(f"{made_by['cpu']}, {os.cpu_count()} cores, {cores()} usable, {commit}")
    print(f"{made_by['command']}: GPU {made_by['gpu']}; median (lowest..highest) of the turns")
    measures = {"loops": measure_loops, "followers": measure_followers, "layers": measure_layers}
    measures |= {"solvers": measure_solvers, "cuda": measure_cuda}
    everything: dict[str, dict] = {}
    if args.results_dir is not None:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        path = args.results_dir / "speed_atari.json"
        everything = json.loads(path.read_text()) if path.exists() else {}
    for part in (part for part in PARTS if part in args.parts):
        before, start = os.getloadavg(), time.perf_counter()
        rows = measures[part](args)
        load, seconds = {"before": before, "after": os.getloadavg()}, round(time.perf_counter() - start)
        print(f"\n{part}: {seconds} s; load average {before[0]:.1f} before, {load['after'][0]:.1f} after")
        if args.results_dir is not None:
            write_csv(args.results_dir / f"{part}.csv", rows)
            everything[part] = {"provenance": made_by | {"load_average": load, "seconds": seconds}, "rows": rows}
            path.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
