"""How fast `sobirl_rlhf_atari.py` is against a discrete soft actor-critic written in the manner of CleanRL's `sac_atari`.

    python -m benchmark.studies.speed_sobirl_atari                                  some ten minutes on an idle core
    python -m benchmark.studies.speed_sobirl_atari --results-dir benchmark/results/speed_sobirl_atari

How the numbers are taken. On the CPU, one torch thread, one EnvPool game, batch 64, one update in four steps, Nature CNNs, replay of
bytes. Competitors live in processes of their own and take turns A B C A B C ..., `steps` steps each, so that a change of the
machine's load meets all of them alike; a number is the median over the turns with (lowest..highest), and a ratio is taken within a
turn before its median. The load average is printed and kept, because a busy machine spoils times; so the same ratio is also given of
the seconds that the processes had a core (`cpu_vs_reference`), which do not count the waiting for one.

`ground-truth` is the lower level alone, at the reference's settings. `frozen` asks the reward network in every update as well, but
does not train it. The reward updates, once in 10,000 steps by default, are not in these numbers.

The reference does what CleanRL's `sac_atari` does, without logging: observations and next observations stacked in two arrays, three
optimisers one after the other, critics that are called again for the actor's loss, the pixels divided in each network, Adam's
default implementation, one number read for the temperature. Its games are EnvPool's as well, so that the networks alone differ.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor

import sobirl_rlhf_atari as script
from benchmark.turns import (
    Row,
    loops_in_turns,
    provenance_of,
    ratios,
    script_loop,
    show,
    with_processor_time,
    write_csv,
)

TARGET = 1.3  # times the reference's steps per second


@dataclass
class Args:
    rounds: int = 3
    """turns of each competitor, in [1, inf)"""
    steps: int = 400
    """environment steps of a turn, a multiple of 4"""
    env_id: str = "BeamRider-v5"
    """game"""
    methods: tuple[Literal["ground-truth", "frozen"], ...] = ("ground-truth", "frozen")
    """which of them to measure"""
    results_dir: Path | None = None
    """folder for speed_sobirl_atari.csv and .json; default: print alone"""


# ---- The reference ---------------------------------------------------------------------------------------------
class ReferenceNetwork(nn.Module):
    """Convolutions, a hidden layer, one output for each action."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten()
        )  # fmt: skip
        self.hidden, self.out = nn.Linear(3136, 512), nn.Linear(512, num_actions)
        for layer in (*self.convolutions, self.hidden, self.out):
            if hasattr(layer, "weight"):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(F.relu(self.convolutions(obs / 255.0)))))


def reference_loop(args: Args, rollout_done: Callable[[dict[str, float]], None]) -> None:
    """Discrete soft actor-critic as most readers know it; `rollout_done` after each turn."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    envs = script.make_envs(script.Args(env_id=args.env_id, env_threads=1), 1, 1)
    num_actions = int(envs.action_space.n)
    actor, qf1, qf2, target1, target2 = (ReferenceNetwork(num_actions) for _ in range(5))
    target1.load_state_dict(qf1.state_dict())
    target2.load_state_dict(qf2.state_dict())
    q_optimiser = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=1e-4, eps=1e-4)
    actor_optimiser = torch.optim.Adam(actor.parameters(), lr=1e-4, eps=1e-4)
    target_entropy, log_alpha = 0.89 * np.log(num_actions), torch.zeros(1, requires_grad=True)
    alpha, alpha_optimiser = 1.0, torch.optim.Adam([log_alpha], lr=1e-4, eps=1e-4)

    def sample(obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = actor(obs)
        policy = torch.distributions.Categorical(logits=logits)
        return policy.sample(), F.log_softmax(logits, dim=1), policy.probs

    capacity = 20_000
    observations, next_observations = (np.zeros((capacity, 4, 84, 84), dtype=np.uint8) for _ in range(2))
    stored = np.zeros(capacity, dtype=np.int64)
    rewards, dones = (np.zeros(capacity, dtype=np.float32) for _ in range(2))
    obs, added, step, ended = envs.reset()[0].copy(), 0, 0, False
    start, env_time = time.perf_counter(), 0.0
    while True:
        if step < args.steps:
            actions = np.random.randint(num_actions, size=1)
        else:
            actions = sample(torch.Tensor(obs))[0].detach().numpy()
        env_start = time.perf_counter()
        images, reward, terminated, truncated, _ = envs.step(actions)
        env_time += time.perf_counter() - env_start
        if not ended:
            row = added % capacity
            observations[row], next_observations[row] = obs[0], images[0]
            stored[row], rewards[row], dones[row] = actions[0], reward[0], terminated[0]
            added += 1
        obs, ended, step = images.copy(), bool(terminated[0] or truncated[0]), step + 1
        if step > args.steps:
            if step % 4 == 0:
                rows = np.random.randint(0, min(added, capacity), size=64)
                b_obs, b_next_obs = torch.Tensor(observations[rows]), torch.Tensor(next_observations[rows])
                b_actions, b_rewards, b_dones = (
                    torch.as_tensor(array[rows]) for array in (stored, rewards, dones)
                )
                with torch.no_grad():
                    _, next_logprobs, next_probabilities = sample(b_next_obs)
                    following = torch.min(target1(b_next_obs), target2(b_next_obs))
                    following = (next_probabilities * (following - alpha * next_logprobs)).sum(1)
                    targets = b_rewards + (1 - b_dones) * 0.99 * following
                chosen = [qf(b_obs).gather(1, b_actions[:, None]).view(-1) for qf in (qf1, qf2)]
                q_loss = F.mse_loss(chosen[0], targets) + F.mse_loss(chosen[1], targets)
                q_optimiser.zero_grad()
                q_loss.backward()
                q_optimiser.step()
                _, logprobs, probabilities = sample(b_obs)
                with torch.no_grad():
                    smaller = torch.min(qf1(b_obs), qf2(b_obs))
                actor_loss = (probabilities * (alpha * logprobs - smaller)).mean()
                actor_optimiser.zero_grad()
                actor_loss.backward()
                actor_optimiser.step()
                excess = (logprobs + target_entropy).detach()
                alpha_loss = (probabilities.detach() * (-log_alpha.exp() * excess)).mean()
                alpha_optimiser.zero_grad()
                alpha_loss.backward()
                alpha_optimiser.step()
                alpha = log_alpha.exp().item()
            if step % 8000 == 0:
                for source, slow in ((qf1, target1), (qf2, target2)):
                    for parameter, copied in zip(source.parameters(), slow.parameters()):
                        copied.data.copy_(parameter.data)
        if step % args.steps == 0:
            seconds = time.perf_counter() - start
            rollout_done({"env": env_time, "policy": 0.0, "update": seconds - env_time})
            start, env_time = time.perf_counter(), 0.0


# ---- Measuring -------------------------------------------------------------------------------------------------
def measure(args: Args) -> list[Row]:
    """Steps per second of every competitor, and its ratio to the reference, turn by turn."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"--env-id {args.env_id} --device cpu --torch-threads 1 --env-threads 1 --run-dir {folder} --num-steps {args.steps}"
        words += (
            f" --learning-starts {args.steps} --buffer-size 20000 --heldout-pairs 1 --checkpoint-every 100000"
        )
        loops = {"reference SAC": partial(reference_loop, args)}
        for method in args.methods:
            loops[method] = partial(script_loop, script, [*words.split(), "--reward-update", method])
        samples = loops_in_turns(
            {name: with_processor_time(loop) for name, loop in loops.items()}, args.rounds, 1, 2
        )
    reference = samples["reference SAC"]

    def faster(turns: list[dict[str, float]], name: str) -> list[float]:
        return ratios([turn[name] for turn in reference], [turn[name] for turn in turns])

    return [
        {
            "env_id": args.env_id,
            "loop": name,
            "steps_per_s": [args.steps / turn["rollout"] for turn in turns],
            "speed_vs_reference": faster(turns, "rollout"),
            "cpu_vs_reference": faster(turns, "cpu"),
            "target": str(TARGET) if name == "ground-truth" else "-",
        }
        | {
            f"{part}_ms_per_step": [1e3 * turn[part] / args.steps for turn in turns]
            for part in ("env", "policy", "update")
        }
        for name, turns in samples.items()
    ]


def main(args: Args) -> None:
    if args.rounds < 1 or args.steps < 4 or args.steps % 4:
        sys.exit("error: --rounds must be at least 1 and --steps a multiple of 4")
    warnings.simplefilter("ignore")
    made_by = provenance_of("studies.speed_sobirl_atari") | {
        "script": "benchmark/studies/speed_sobirl_atari.py"
    }
    before, start = os.getloadavg(), time.perf_counter()
    rows = measure(args)
    load = {"before": before, "after": os.getloadavg(), "cores": os.cpu_count()}
    changes = " with changes" if made_by["dirty"] else ""
    print(
        f"{made_by['cpu']}, {os.cpu_count()} cores, commit {str(made_by['commit'])[:7]}{changes}: {made_by['command']}"
    )
    print(
        f"load average {before[0]:.1f} before, {load['after'][0]:.1f} after; {time.perf_counter() - start:.0f} s"
    )
    show("Steps per second, one torch thread; median (lowest..highest) of the turns", rows)
    if args.results_dir:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        write_csv(args.results_dir / "speed_sobirl_atari.csv", rows)
        content = {"provenance": made_by | {"load_average": load}, "rows": rows}
        (args.results_dir / "speed_sobirl_atari.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
