"""How fast the continuous scripts are, on the CPU with one torch thread.

    python -m benchmark.speed --against 8e19e7e      this tree against that commit: two minutes a turn on two idle cores
    python -m benchmark.speed                        the parts below
    python -m benchmark.speed --parts solvers        one of them

    training  whole training loops in turns: PPO, a reference PPO loop on Gymnasium, BLPO by solver
    solvers   time of each solver against the residual it leaves, on systems of a real run

`--against` runs PPO and BLPO as whole processes at both shapes, turn by turn in this tree and in a worktree of the commit
that exists as long as it measures, and reads their metrics.csv: of each process the medians over the rollouts after the
first two. benchmark/turns.py says how turns become numbers.

Each part writes {part}.csv, and {part}.json with all samples, command, commit, versions, machine and load.
"""

import contextlib
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor

import blpo_continuous as blpo
import ppo_continuous as ppo
from benchmark.ihvp_study import captured_systems, residual
from benchmark.suites import RESULTS, ROOT
from benchmark.turns import Loop, Row, loops_in_turns, milliseconds, provenance_of, ratios, script_loop, show, write_csv

SHAPES = {  # words, and rollouts of a process of `against` and of a turn of `training`
    "8 x 256": ("", 30, 4),
    "32 x 640": ("--num-envs 32 --num-steps 640 --update-epochs 4 --num-minibatches 32", 10, 1),
}


@dataclass
class Args:
    against: str | None = None
    """a commit to compare this tree with, in place of the parts"""
    parts: tuple[Literal["training", "solvers"], ...] = ("training", "solvers")
    """what to measure"""
    env_id: str = "Hopper-v4"
    """environment"""
    rounds: int = 5
    """turns of each competitor, in [1, inf)"""
    output: Path = RESULTS / "speed"
    """folder of the results"""


# ---- against: this tree and a commit ---------------------------------------------------------------------------
AIM, BLPO_AIM = 0.85, 1.5  # steps/s of this tree over the commit's at least; BLPO's time over PPO's at 32 x 640 at most
SCRIPTS = {
    "PPO": "ppo_continuous.py --critic-learning-rate 2.8e-3",
    "BLPO": "blpo_continuous.py --nystrom-rank 10",
}
SPLIT = ("env", "policy", "update", "nested_critic", "response")
HERE = "this tree"


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, for the length of the block; SIGTERM ends the process with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        done = subprocess.run(["git", "worktree", "add", "--detach", tree, commit], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: --against {commit}: {done.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True, capture_output=True)


def whole_process(tree: Path, words: list[str]) -> dict[str, float]:
    """Median seconds of a rollout of a script in a process of its own, in all and by the parts of SPLIT that it has."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, *words, "--run-dir", folder], cwd=tree, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: {' '.join(words)} in {tree}: {done.stderr.strip().splitlines()[-1]}")
        (path,) = Path(folder).glob("*/metrics.csv")
        with open(path) as file:
            rows = list(csv.DictReader(file))
    clock = [float(row["wall_time_s"]) for row in rows]
    split = [name for name in SPLIT if f"time/{name}" in rows[0]]
    seconds = {name: statistics.median(float(row[f"time/{name}"]) for row in rows[2:]) for name in split}
    return {"rollout": statistics.median(after - before for before, after in zip(clock[1:], clock[2:]))} | seconds


def measure_against(args: Args) -> list[Row]:
    """A row for each shape, script and tree."""
    samples: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with worktree(args.against) as other:
        trees = {args.against: other, HERE: ROOT}
        for turn in range(args.rounds):
            for shape, (words, rollouts, _) in SHAPES.items():
                steps = steps_of(shape) * rollouts
                common = f"--env-id {args.env_id} --device cpu --total-timesteps {steps} {words}".split()
                for script, command in SCRIPTS.items():
                    for name in list(trees)[:: 1 if turn % 2 else -1]:  # each is as often the first
                        seconds = whole_process(trees[name], [*command.split(), *common])
                        samples.setdefault((shape, script, name), []).append(seconds)
                        print(f"turn {turn + 1}, {shape}, {script}, {name}: {seconds['rollout']:.3f} s a rollout", flush=True)
    return [against_row(samples, shape, script, name, args.against) for shape in SHAPES for script in SCRIPTS for name in trees]


def against_row(samples: dict, shape: str, script: str, name: str, commit: str) -> Row:
    """What the turns of one script in one tree come to, and its ratios.

    The environments are the same code in both trees and most of the noise: a ratio `at_its_env` gives both the time in them
    that the commit's run took, or PPO's.
    """
    mine, its, of_ppo = (samples[key] for key in ((shape, script, name), (shape, script, commit), (shape, "PPO", name)))

    def seconds(turns: list[dict], env_of: list[dict]) -> list[float]:
        return [turn["rollout"] - turn["env"] + other["env"] for turn, other in zip(turns, env_of)]

    row: Row = {"shape": shape, "script": script, "tree": name}
    row["steps_per_s"] = [steps_of(shape) / each for each in seconds(mine, mine)]
    row |= {f"{part}_s": [turn[part] for turn in mine] if part in mine[0] else "" for part in SPLIT}
    row["speed_vs_commit"] = "" if name == commit else ratios(seconds(its, its), seconds(mine, mine))
    row["at_its_env"] = "" if name == commit else ratios(seconds(its, its), seconds(mine, its))
    row["time_vs_ppo"] = "" if script == "PPO" else ratios(seconds(mine, mine), seconds(of_ppo, of_ppo))
    row["at_ppos_env"] = "" if script == "PPO" else ratios(seconds(mine, of_ppo), seconds(of_ppo, of_ppo))
    return row


def show_against(rows: list[Row]) -> None:
    """The table, and the ratios of this tree beside what was aimed at."""
    show("Whole processes; seconds are of one rollout, nested_critic and response are parts of update", rows)
    print()
    for row in (row for row in rows if row["tree"] == HERE):
        speed, same_env = (statistics.median(row[name]) for name in ("speed_vs_commit", "at_its_env"))
        print(f"{row['script']}, {row['shape']}: {speed:.2f} of the commit's steps/s, {same_env:.2f} at its env time (aim: at least {AIM:g})")
        if row["script"] == "BLPO" and row["shape"] == "32 x 640":
            times, same_env = (statistics.median(row[name]) for name in ("time_vs_ppo", "at_ppos_env"))
            print(f"BLPO, 32 x 640: {times:.2f} times PPO's time, {same_env:.2f} at its env time (aim: at most {BLPO_AIM:g})")


def steps_of(shape: str) -> int:
    """Environment steps of a rollout."""
    num_envs, num_steps = shape.split(" x ")
    return int(num_envs) * int(num_steps)


# ---- training: whole loops -------------------------------------------------------------------------------------
def reference_loop(words: list[str], rollout_done: Callable[[dict[str, float]], None]) -> None:
    """PPO in the manner of CleanRL's `ppo_continuous_action`, the loop that most readers know; no logging.

    Gymnasium's synchronous environments with one stack of wrappers each, torch.distributions, values asked at every
    step, GAE as a loop over time, Adam's default implementation, and numbers read back in every minibatch.
    """
    args = ppo.parse_args(words)

    def make_env() -> gym.Env:
        env = gym.wrappers.FlattenObservation(gym.make(args.env_id))
        env = gym.wrappers.ClipAction(gym.wrappers.RecordEpisodeStatistics(env))
        env = gym.wrappers.NormalizeObservation(env)
        env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), env.observation_space)
        env = gym.wrappers.NormalizeReward(env, gamma=args.gamma)
        return gym.wrappers.TransformReward(env, lambda reward: np.clip(reward, -10, 10))

    torch.set_num_threads(1)
    envs = gym.vector.SyncVectorEnv([make_env] * args.num_envs)
    (obs_dim,), (action_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    agent = ppo.Agent(obs_dim, action_dim)
    optimiser = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    def distribution(obs: Tensor) -> torch.distributions.Normal:
        mean = agent.actor_mean(obs)
        return torch.distributions.Normal(mean, agent.actor_logstd.expand_as(mean).exp())

    shape, batch_size = (args.num_steps, args.num_envs), args.num_steps * args.num_envs
    obs, actions = torch.zeros(*shape, obs_dim), torch.zeros(*shape, action_dim)
    logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))
    next_obs, next_done = torch.Tensor(envs.reset(seed=args.seed)[0]), torch.zeros(args.num_envs)
    while True:
        rollout_start, env_time, episodes = time.perf_counter(), 0.0, []
        for t in range(args.num_steps):
            obs[t], dones[t] = next_obs, next_done
            with torch.no_grad():
                policy = distribution(next_obs)
                actions[t] = policy.sample()
                policy.entropy().sum(1)
                logprobs[t], values[t] = policy.log_prob(actions[t]).sum(1), agent.critic(next_obs).flatten()
            env_start = time.perf_counter()
            raw_obs, reward, terminated, truncated, info = envs.step(actions[t].numpy())
            env_time += time.perf_counter() - env_start
            rewards[t] = torch.tensor(reward).view(-1)
            next_obs, next_done = torch.Tensor(raw_obs), torch.Tensor(np.logical_or(terminated, truncated))
            if "episode" in info:
                episodes += info["episode"]["r"][info["_episode"]].tolist()
        update_start = time.perf_counter()
        with torch.no_grad():
            next_value, last = agent.critic(next_obs).view(1, -1), 0.0
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
                policy, new_values = distribution(b_obs), agent.critic(b_obs).view(-1)
                entropy = policy.entropy().sum(1)
                logratio = policy.log_prob(b_actions).sum(1) - b_logprobs
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
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimiser.step()
        now = time.perf_counter()
        policy_time = update_start - rollout_start - env_time
        rollout_done({"env": env_time, "policy": policy_time, "update": now - update_start})


BLPO_SOLVERS = {
    "BLPO none": "--ihvp none",
    "BLPO nystrom 10": "--ihvp nystrom --nystrom-rank 10",
    "BLPO cg 10": "--ihvp cg --cg-iterations 10",
    "BLPO cg 50": "--ihvp cg --cg-iterations 50",
    "BLPO exact": "--ihvp exact",
}


def measure_training(args: Args) -> list[Row]:
    """A row for each shape and loop."""
    rows: list[Row] = []
    for shape, (more, _, rollouts) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            words = f"--env-id {args.env_id} --device cpu --run-dir {folder} {more}".split()
            loops: dict[str, Loop] = {"PPO": partial(script_loop, ppo, words), "reference PPO": partial(reference_loop, words)}
            loops |= {name: partial(script_loop, blpo, words + extra.split()) for name, extra in BLPO_SOLVERS.items()}
            samples = loops_in_turns(loops, args.rounds, rollouts)
        of_ppo = [turn["rollout"] for turn in samples["PPO"]]
        for name, turns in samples.items():
            seconds = [turn["rollout"] for turn in turns]
            row: Row = {"env_id": args.env_id, "shape": shape, "loop": name}
            row |= {"steps_per_s": [steps_of(shape) / each for each in seconds], "time_vs_ppo": ratios(seconds, of_ppo)}
            rows.append(row | {f"{part}_s": [turn[part] for turn in turns] for part in ("env", "policy", "update")})
    return rows


# ---- solvers: what a solver's time buys ------------------------------------------------------------------------
SOLVERS = {
    **{f"nystrom {rank}": partial(blpo.nystrom_ihvp, rank=rank, generator=torch.Generator()) for rank in (1, 2, 5, 10, 20, 50)},
    **{f"cg {k}": partial(blpo.cg_ihvp, iterations=k) for k in (2, 5, 10, 20, 50)},
    "exact": blpo.exact_ihvp,
}
# Ten environments make minibatches of ten chunks of 64 steps, those of 32 x 640, from rollouts an eighth its size.
ROWS = {"128": "", "640": "--num-envs 10 --num-minibatches 4"}


def measure_solvers(args: Args) -> list[Row]:
    """A row for each size of minibatch, damping and solver: milliseconds for b and v, and the residual of v."""
    rows: list[Row] = []
    for size, more in ROWS.items():
        words = f"--env-id {args.env_id} --total-timesteps 25600 {more}".split()
        systems = [(curvature, u) for _, curvature, u in captured_systems(words, range(2, 11))]
        for damping in (blpo.Args().damping, blpo.Args().damping / 100):

            def solve_all(solve: Callable) -> list[tuple[Tensor, Tensor]]:
                return [solve(curvature, u, damping) for curvature, u in systems]

            samples = milliseconds({name: partial(solve_all, solve) for name, solve in SOLVERS.items()}, args.rounds)
            for name, solve in SOLVERS.items():
                left = [residual(curvature, *bv, damping) for (curvature, _), bv in zip(systems, solve_all(solve))]
                row: Row = {"env_id": args.env_id, "rows": size, "damping": damping, "solver": name}
                rows.append(row | {"ms": [each / len(systems) for each in samples[name]], "relative_residual": left})
    return rows


# ---- The command -----------------------------------------------------------------------------------------------
# In this order: torch forbids the forks of `training` once autograd has run here.
MEASURES = {"against": measure_against, "training": measure_training, "solvers": measure_solvers}
SHOWN = {
    "against": show_against,
    "training": partial(show, "Whole loops; seconds are of one rollout"),
    "solvers": partial(show, "b and v of one minibatch; the spread of ms is over turns, that of the residual over systems"),
}


def main(args: Args) -> None:
    """Measure, print and write."""
    if args.rounds < 1:
        sys.exit(f"error: --rounds is {args.rounds}, it must be at least 1")
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    made_by = provenance_of("speed")
    changes = " with changes" if made_by["dirty"] else ""
    print(f"{made_by['cpu']}, {os.cpu_count()} cores, commit {str(made_by['commit'])[:7]}{changes}: {made_by['command']}")
    for part in ("against",) if args.against else (part for part in MEASURES if part in args.parts):
        before, start = os.getloadavg(), time.perf_counter()
        rows = MEASURES[part](args)
        load, seconds = {"before": before, "after": os.getloadavg()}, round(time.perf_counter() - start)
        SHOWN[part](rows)
        print(f"\n{part}: {seconds} s; load average {before[0]:.1f} before, {load['after'][0]:.1f} after")
        write_csv(args.output / f"{part}.csv", rows)
        content = {"provenance": made_by | {"load_average": load, "seconds": seconds}, "rows": rows}
        (args.output / f"{part}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
