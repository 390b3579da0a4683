"""How fast `sobirl_rlhf.py` is against a soft actor-critic written in the manner of CleanRL's.

    python -m benchmark.speed_sobirl                                      some ten minutes on an idle core
    python -m benchmark.speed_sobirl --results-dir benchmark/results/speed_sobirl      and write the table there

How the numbers are taken. On the CPU, one torch thread, float32 at the highest precision, Hopper-v4, one environment, both
networks 256-256, batch 256, one update for each step. Competitors live in processes of their own and take turns A B C A B
C ..., an iteration of the script (2000 steps) each, so that a change of the machine's load meets all of them alike; a number
is the median over the turns with (lowest..highest), and a ratio is taken within a turn before its median. Before the first turn
100,000 random steps fill the replay, as in the middle of a run of 200,000. The queue has its 3000 pairs from the start, so an epoch
of the reward update is over all of them; an iteration asks for 10 more, as in a run of 500,000 steps, and the implicit term is theirs.
The load average is printed and kept, because a busy machine spoils times; so the same ratio is also given of the seconds that
the processes had a core (`cpu_vs_reference`), which do not count the waiting for one. The targets are for the first.

The reference does what CleanRL's `sac_continuous_action` does, without logging: a Gymnasium vector of one environment, replay
in five arrays, two critics one after the other, Adam's default implementation, two actor updates every second step through
critics that collect gradients as well, another sample of the policy for the temperature, targets parameter by parameter.
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

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor

import sobirl_rlhf
from benchmark.turns import Row, loops_in_turns, provenance_of, ratios, script_loop, show, with_processor_time, write_csv

STEPS = sobirl_rlhf.Args().num_steps  # of a turn: an iteration of the script with default arguments
RANDOM_TURNS = 50  # before the first
METHODS = {
    "ground-truth": "--reward-update ground-truth",
    "drlhf": "--reward-update drlhf",
    "sobirl": "--reward-update sobirl",
    "sobirl-queue": "--reward-update sobirl --implicit-pairs queue",
}
TARGETS = {"ground-truth": 1.3, "sobirl": 1.2}  # at least so many times the reference's steps per second


@dataclass
class Args:
    rounds: int = 3
    """turns of each competitor, in [1, inf)"""
    env_id: str = "Hopper-v4"
    """environment"""
    env_backend: str = "sync"
    """who steps the script's environment: auto, envpool, sync or async"""
    methods: tuple[Literal["ground-truth", "drlhf", "sobirl", "sobirl-queue"], ...] = tuple(METHODS)
    """which of ground-truth, drlhf, sobirl, sobirl-queue to measure"""
    results_dir: Path | None = None
    """folder for speed_sobirl.csv and speed_sobirl.json; default: print alone"""


# ---- The reference ---------------------------------------------------------------------------------------------
class ReferenceCritic(nn.Module):
    """One critic."""

    def __init__(self, inputs: int):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(inputs, 256), nn.Linear(256, 256), nn.Linear(256, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = F.relu(self.fc1(torch.cat([obs, actions], 1)))
        return self.fc3(F.relu(self.fc2(x)))


class ReferenceActor(nn.Module):
    """A squashed Gaussian on torch.distributions."""

    def __init__(self, obs_dim: int, space: gym.spaces.Box):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(obs_dim, 256), nn.Linear(256, 256)
        self.mean, self.logstd = nn.Linear(256, space.shape[0]), nn.Linear(256, space.shape[0])
        self.register_buffer("scale", torch.tensor((space.high - space.low) / 2))
        self.register_buffer("bias", torch.tensor((space.high + space.low) / 2))

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc2(F.relu(self.fc1(obs))))
        mean, logstd = self.mean(x), torch.tanh(self.logstd(x))
        normal = torch.distributions.Normal(mean, (-5 + 0.5 * 7 * (logstd + 1)).exp())
        u = normal.rsample()
        squashed = torch.tanh(u)
        logprob = normal.log_prob(u) - torch.log(self.scale * (1 - squashed.pow(2)) + 1e-6)
        return squashed * self.scale + self.bias, logprob.sum(1, keepdim=True)


def reference_loop(env_id: str, seed: int, rollout_done: Callable[[dict[str, float]], None]) -> None:
    """Soft actor-critic as most readers know it; `rollout_done` after each iteration."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))])
    (obs_dim,), (action_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    actor, critics = ReferenceActor(obs_dim, envs.single_action_space), []
    for _ in range(4):
        critics.append(ReferenceCritic(obs_dim + action_dim))
    qf1, qf2, target1, target2 = critics
    target1.load_state_dict(qf1.state_dict())
    target2.load_state_dict(qf2.state_dict())
    q_optimiser = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=1e-3)
    actor_optimiser = torch.optim.Adam(actor.parameters(), lr=3e-4)
    log_alpha = torch.zeros(1, requires_grad=True)
    alpha, alpha_optimiser = log_alpha.exp().item(), torch.optim.Adam([log_alpha], lr=1e-3)
    capacity = 1_000_000
    observations, next_observations = (np.zeros((capacity, 1, obs_dim), dtype=np.float32) for _ in range(2))
    stored_actions = np.zeros((capacity, 1, action_dim), dtype=np.float32)
    rewards, dones = (np.zeros((capacity, 1), dtype=np.float32) for _ in range(2))
    obs, _ = envs.reset(seed=seed)
    position, step, start, env_time = 0, 0, time.perf_counter(), 0.0
    while True:
        if step < RANDOM_TURNS * STEPS:
            actions = np.array([envs.single_action_space.sample()])
        else:
            actions = actor.sample(torch.Tensor(obs))[0].detach().numpy()
        env_start = time.perf_counter()
        next_obs, reward, terminated, truncated, _ = envs.step(actions)
        env_time += time.perf_counter() - env_start
        observations[position], next_observations[position] = obs, next_obs
        stored_actions[position], rewards[position], dones[position] = actions, reward, terminated
        position, obs, step = (position + 1) % capacity, next_obs, step + 1
        if step > RANDOM_TURNS * STEPS:
            index = np.random.randint(0, min(step, capacity), size=256)
            b_obs, b_next_obs, b_actions, b_rewards, b_dones = (
                torch.as_tensor(array[index, 0]) for array in (observations, next_observations, stored_actions, rewards, dones)
            )
            with torch.no_grad():
                next_actions, next_logprob = actor.sample(b_next_obs)
                following = torch.min(target1(b_next_obs, next_actions), target2(b_next_obs, next_actions))
                targets = b_rewards + (1 - b_dones) * 0.99 * (following - alpha * next_logprob).view(-1)
            q_loss = F.mse_loss(qf1(b_obs, b_actions).view(-1), targets) + F.mse_loss(qf2(b_obs, b_actions).view(-1), targets)
            q_optimiser.zero_grad()
            q_loss.backward()
            q_optimiser.step()
            if step % 2 == 0:
                for _ in range(2):
                    new_actions, logprob = actor.sample(b_obs)
                    value = torch.min(qf1(b_obs, new_actions), qf2(b_obs, new_actions))
                    actor_loss = ((alpha * logprob) - value).mean()
                    actor_optimiser.zero_grad()
                    actor_loss.backward()
                    actor_optimiser.step()
                    with torch.no_grad():
                        _, logprob = actor.sample(b_obs)
                    alpha_loss = (-log_alpha.exp() * (logprob - action_dim)).mean()
                    alpha_optimiser.zero_grad()
                    alpha_loss.backward()
                    alpha_optimiser.step()
                    alpha = log_alpha.exp().item()
            for source, target in ((qf1, target1), (qf2, target2)):
                for parameter, slow in zip(source.parameters(), target.parameters()):
                    slow.data.copy_(0.005 * parameter.data + 0.995 * slow.data)
        if step % STEPS == 0:
            seconds = time.perf_counter() - start
            rollout_done({"env": env_time, "policy": 0.0, "update": seconds - env_time})
            start, env_time = time.perf_counter(), 0.0


# ---- Measuring -------------------------------------------------------------------------------------------------
def measure(args: Args) -> list[Row]:
    """Steps per second of every competitor, and its ratio to the reference, turn by turn."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--env-id", args.env_id, "--env-backend", args.env_backend, "--device", "cpu", "--run-dir", folder]
        words += ["--num-steps", str(STEPS), "--checkpoint-every", "1000"]
        words += ["--learning-starts", str(RANDOM_TURNS * STEPS), "--warmup-pairs", "3000", "--warmup-epochs", "0"]
        words += ["--pairs-per-iteration", "10", "--label-budget", "1000000"]
        loops = {"reference SAC": partial(reference_loop, args.env_id, 1)}
        for method in args.methods:
            loops[method] = partial(script_loop, sobirl_rlhf, [*words, *METHODS[method].split()])
        samples = loops_in_turns({name: with_processor_time(loop) for name, loop in loops.items()}, args.rounds, 1, RANDOM_TURNS)
    reference = samples["reference SAC"]

    def faster(turns: list[dict[str, float]], name: str) -> list[float]:
        return ratios([turn[name] for turn in reference], [turn[name] for turn in turns])

    return [
        {
            "env_id": args.env_id,
            "loop": name,
            "steps_per_s": [STEPS / turn["rollout"] for turn in turns],
            "speed_vs_reference": faster(turns, "rollout"),
            "cpu_vs_reference": faster(turns, "cpu"),
            "target": str(TARGETS.get(name, "-")),
        }
        | {f"{part}_ms_per_step": [1e3 * turn[part] / STEPS for turn in turns] for part in ("env", "policy", "update")}
        for name, turns in samples.items()
    ]


def main(args: Args) -> None:
    if args.rounds < 1:
        sys.exit(f"error: --rounds is {args.rounds}, it must be at least 1")
    warnings.simplefilter("ignore")
    made_by = provenance_of("speed_sobirl")
    before, start = os.getloadavg(), time.perf_counter()
    rows = measure(args)
    load = {"before": before, "after": os.getloadavg(), "cores": os.cpu_count()}
    changes = " with changes" if made_by["dirty"] else ""
    print(f"{made_by['cpu']}, {os.cpu_count()} cores, commit {str(made_by['commit'])[:7]}{changes}: {made_by['command']}")
    print(f"load average {before[0]:.1f} before, {load['after'][0]:.1f} after; {time.perf_counter() - start:.0f} s")
    show("Steps per second, one torch thread; median (lowest..highest) of the turns", rows)
    if args.results_dir:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        write_csv(args.results_dir / "speed_sobirl.csv", rows)
        content = {"provenance": made_by | {"load_average": load}, "rows": rows}
        (args.results_dir / "speed_sobirl.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
