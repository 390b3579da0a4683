"""How fast the Atari scripts are (benchmark/studies/turns.py says how it is measured).

    python -m benchmark.studies.speed_atari                            ten minutes on two idle cores
    python -m benchmark.studies.speed_atari --followers last-two full
    python -m benchmark.studies.speed_atari --device cuda --games 8 32 128 --followers head last-two full

The games alone, PPO, a reference PPO loop with one torch thread and with one for each core, PPO with separate
trunks, and BLPO with and without the hypergradient. A turn is one rollout of 8 games x 128 steps with its
update, after one that does not count (on CUDA four of them, after two). The scripts use one torch thread for
each usable core, as by default, and EnvPool one for each as well; the reference gets the same EnvPool
threads. Threads that wait for others in a loop count as busy. On CUDA everything is in PyTorch's default
precision (convolutions in TF32, but for the follower full).
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Literal

import envpool
import numpy as np
import torch
import torch.nn as nn
from pydantic import Field

import ppo_atari as ppo
from benchmark.studies import study, turns
from benchmark.studies.reference_ppo import reference_loop

MORE = ""  # further words for every loop; the tests make the rollouts shorter


class Args(study.Args):
    """What is measured."""

    followers: tuple[Literal["head", "last-two", "full"], ...] = ("head",)
    """followers of BLPO"""
    games: Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], study.AT_LEAST_ONE] = (8,)
    """numbers of games that are played at once, of the games alone and of PPO"""
    env_id: str = "Breakout-v5"
    """the game"""
    rounds: study.Count = 5
    """turns of each competitor"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks live"""
    torch_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """PyTorch's threads in the scripts; 0: one for each usable core"""


def games_only(words: str, rollout_done: Callable[[turns.Numbers], None]) -> None:
    """The games alone, with random actions drawn beforehand: the limit of every loop on them."""
    args = ppo.parse_args(words.split())
    envs = ppo.make_envs(args, args.num_envs, args.seed)
    shape = args.num_steps, args.num_envs
    actions = np.random.default_rng(args.seed).integers(0, envs.action_space.n, shape)
    envs.reset()
    while True:
        start = time.perf_counter()
        for action in actions:
            envs.step(action)
        seconds = time.perf_counter() - start
        rollout_done({"env": seconds, "policy": 0.0, "update": 0.0, "steps": actions.size})


def reference(words: str, threads: int, rollout_done: Callable[[turns.Numbers], None]) -> None:
    """The manner of CleanRL's `ppo_atari_envpool`: images as floats in PyTorch's default memory order,
    divided by 255 in the network, and every row counts."""
    args = ppo.parse_args(words.split())
    torch.set_num_threads(threads)
    envs = envpool.make(
        args.env_id, env_type="gymnasium", num_envs=args.num_envs, num_threads=min(cores(), args.num_envs),
        episodic_life=True, reward_clip=True, seed=args.seed,
    )  # fmt: skip
    actor, critic = nn.Linear(512, int(envs.action_space.n)), nn.Linear(512, 1)
    network = nn.ModuleList([ppo.nature_cnn(), ppo.layer_init(actor, 0.01), ppo.layer_init(critic, 1.0)])
    trunk, actor, critic = network.to(args.device)

    def policy_and_value(images: torch.Tensor) -> tuple[torch.distributions.Categorical, torch.Tensor]:
        features = trunk(images / 255.0)
        return torch.distributions.Categorical(logits=actor(features)), critic(features).flatten()

    parameters = list(network.parameters())
    reference_loop(args, envs, envs.reset()[0], (), policy_and_value, parameters, rollout_done)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def measure(args: Args) -> Iterator[tuple[str, list[study.Row]]]:
    """A row for each loop."""
    words = f"--env-id {args.env_id} --device {args.device} --torch-threads {args.torch_threads} {MORE}"
    loops = {}
    for games in args.games:
        more, label = f"{words} --num-envs {games}", "" if games == 8 else f", {games} games"
        loops[f"games only{label}"] = partial(games_only, more)
        loops[f"PPO{label}"] = partial(turns.script_loop, "ppo_atari.py", more)
    references = {"PPO_separate": "PPO separate"}
    for count in sorted({1} if args.device == "cuda" else {1, args.torch_threads or cores()}):
        name = references[f"reference_{count}_threads"] = f"reference, {count} threads"
        loops[name] = partial(reference, words, count)
    loops["PPO separate"] = partial(turns.script_loop, "ppo_atari.py", f"{words} --separate-trunks")
    for follower, ihvp in itertools.product(args.followers, ("nystrom", "none")):
        more = f"{words} --follower {follower} --ihvp {ihvp}"
        loops[f"BLPO {follower}, {ihvp}"] = partial(turns.script_loop, "blpo_atari.py", more)
    samples = turns.loops_in_turns(loops, args.rounds, *((4, 2) if args.device == "cuda" else (1, 1)))
    yield "loops", turns.loop_rows(samples, lambda _: references, env_id=args.env_id)


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
