"""How fast `sobirl_rlhf.py` is against a soft actor-critic written in the manner of CleanRL's.

    python -m benchmark.studies.speed_sobirl      some ten minutes on an idle core

benchmark/studies/turns.py says how it is measured. On the CPU, one torch thread, one environment, both
networks 256-256, batch 256, one update for each step. A turn is an iteration of the script (2000 steps).
Before the first turn 100,000 random steps fill the replay, as in the middle of a run of 200,000. The queue
has its 3000 pairs from the start, so an epoch of the reward update is over all of them; an iteration asks
for 10 more.

The reference does what CleanRL's `sac_continuous_action` does, without logging: a Gymnasium vector of one
environment, replay in five arrays, two critics one after the other, Adam's default implementation, two actor
updates every second step through critics that collect gradients as well, another sample of the policy for the
temperature, targets parameter by parameter.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import sobirl_rlhf
from benchmark.studies import study, turns

STEPS = sobirl_rlhf.Args().num_steps  # of a turn: an iteration of the script with default arguments
RANDOM_TURNS = 50  # before the first
Method = Literal["ground-truth", "drlhf", "sobirl", "sobirl-queue"]


class Args(study.Args):
    """What is measured."""

    rounds: study.Count = 3
    """turns of each competitor"""
    env_id: str = "Hopper-v4"
    """environment"""
    env_backend: str = "sync"
    """who steps the script's environment: auto, envpool, sync or async"""
    methods: Annotated[tuple[Method, ...], study.AT_LEAST_ONE] = get_args(Method)
    """what to measure"""


class ReferenceActor(nn.Module):
    """A squashed Gaussian on torch.distributions."""

    def __init__(self, obs_dim: int, space: gym.spaces.Box):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.mean, self.logstd = nn.Linear(256, space.shape[0]), nn.Linear(256, space.shape[0])
        self.scale = torch.tensor((space.high - space.low) / 2)
        self.bias = torch.tensor((space.high + space.low) / 2)

    def sample(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.trunk(obs)
        mean, logstd = self.mean(x), torch.tanh(self.logstd(x))
        normal = torch.distributions.Normal(mean, (-5 + 0.5 * 7 * (logstd + 1)).exp())
        u = normal.rsample()
        squashed = torch.tanh(u)
        logprob = normal.log_prob(u) - torch.log(self.scale * (1 - squashed.pow(2)) + 1e-6)
        return squashed * self.scale + self.bias, logprob.sum(1, keepdim=True)


def reference_critic(inputs: int) -> nn.Module:
    """One critic."""
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))


def reference_loop(env_id: str, seed: int, rollout_done: Callable[[turns.Numbers], None]) -> None:
    """Soft actor-critic as most readers know it; `rollout_done` after each iteration."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))])
    (obs_dim,), (action_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    actor = ReferenceActor(obs_dim, envs.single_action_space)
    qf1, qf2, target1, target2 = (reference_critic(obs_dim + action_dim) for _ in range(4))
    target1.load_state_dict(qf1.state_dict())
    target2.load_state_dict(qf2.state_dict())
    q_optimiser = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=1e-3)
    actor_optimiser = torch.optim.Adam(actor.parameters(), lr=3e-4)
    log_alpha = torch.zeros(1, requires_grad=True)
    alpha, alpha_optimiser = log_alpha.exp().item(), torch.optim.Adam([log_alpha], lr=1e-3)
    capacity, sizes = 1_000_000, ((1, obs_dim), (1, obs_dim), (1, action_dim), (1,), (1,))
    replay = [np.zeros((capacity, *size), dtype=np.float32) for size in sizes]
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
        for array, new in zip(replay, (obs, next_obs, actions, reward, terminated)):
            array[position] = new
        position, obs, step = (position + 1) % capacity, next_obs, step + 1
        if step > RANDOM_TURNS * STEPS:
            index = np.random.randint(0, min(step, capacity), size=256)
            batch = [torch.as_tensor(array[index, 0]) for array in replay]
            b_obs, b_next_obs, b_actions, b_rewards, b_dones = batch
            with torch.no_grad():
                next_actions, next_logprob = actor.sample(b_next_obs)
                pairs = torch.cat([b_next_obs, next_actions], 1)
                following = torch.min(target1(pairs), target2(pairs))
                targets = b_rewards + (1 - b_dones) * 0.99 * (following - alpha * next_logprob).view(-1)
            pairs = torch.cat([b_obs, b_actions], 1)
            q_loss = F.mse_loss(qf1(pairs).view(-1), targets) + F.mse_loss(qf2(pairs).view(-1), targets)
            q_optimiser.zero_grad()
            q_loss.backward()
            q_optimiser.step()
            if step % 2 == 0:
                for _ in range(2):
                    new_actions, logprob = actor.sample(b_obs)
                    pairs = torch.cat([b_obs, new_actions], 1)
                    actor_loss = ((alpha * logprob) - torch.min(qf1(pairs), qf2(pairs))).mean()
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
            rollout_done({"env": env_time, "policy": 0.0, "update": seconds - env_time, "steps": STEPS})
            start, env_time = time.perf_counter(), 0.0


def measure(args: Args) -> Iterator[tuple[str, list[study.Row]]]:
    """A row for the reference and each method."""
    words = f"--env-id {args.env_id} --env-backend {args.env_backend} --device cpu --num-steps {STEPS}"
    words += f" --checkpoint-every 1000 --learning-starts {RANDOM_TURNS * STEPS} --warmup-pairs 3000"
    words += f" --warmup-epochs 0 --pairs-per-iteration 10 --label-budget {10**9}"
    words += f" --total-timesteps {max(500_000, (RANDOM_TURNS + args.rounds + 1) * STEPS)}"
    loops = {}
    for method in args.methods:
        chosen = f"--reward-update {method}".replace("-queue", " --implicit-pairs queue")
        loops[method] = partial(turns.script_loop, "sobirl_rlhf.py", f"{words} {chosen}")
    loops["reference SAC"] = partial(reference_loop, args.env_id, 1)  # the scripts refuse bad input first
    samples = turns.loops_in_turns(loops, args.rounds, warmup=RANDOM_TURNS)
    yield (
        "speed_sobirl",
        turns.loop_rows(samples, lambda _: {"reference": "reference SAC"}, env_id=args.env_id),
    )


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
