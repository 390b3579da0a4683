"""How fast the continuous scripts are, on the CPU with one torch thread (how: benchmark/studies/turns.py).

    python -m benchmark.studies.speed --against 8e19e7e    this tree against that commit
    python -m benchmark.studies.speed                      the parts below
    python -m benchmark.studies.speed --parts solvers      one of them

    training  whole training loops: PPO, a reference PPO loop on Gymnasium, BLPO by solver
    solvers   milliseconds of each solver against the residual it leaves, on systems of a real run

`--against` runs PPO and BLPO in this tree and in a worktree of the commit that exists as long as it measures.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field

import blpo_continuous as blpo
import ppo_continuous as ppo
from benchmark.studies import study, turns
from benchmark.studies.ihvp_study import captured_systems, residual
from benchmark.studies.reference_ppo import reference_loop
from benchmark.suites import ROOT

SHAPES = {  # words, and rollouts of a turn
    "8 x 256": ("", 4),
    "32 x 640": ("--num-envs 32 --num-steps 640 --update-epochs 4 --num-minibatches 32", 1),
}


class Args(study.Args):
    """What is measured."""

    against: Annotated[str, Field(pattern="^[0-9A-Za-z]")] | None = None
    """a commit to compare this tree with, in place of the parts"""
    parts: Annotated[tuple[Literal["training", "solvers"], ...], study.AT_LEAST_ONE] = ("training", "solvers")
    """what to measure"""
    env_id: str = "Hopper-v4"
    """environment"""
    rounds: study.Count = 5
    """turns of each competitor"""


# ---- against: this tree and a commit ---------------------------------------------------------------
SCRIPTS = {
    "PPO": ("ppo_continuous.py", "--critic-learning-rate 2.8e-3"),
    "BLPO": ("blpo_continuous.py", "--nystrom-rank 10"),
}


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, for the length of the block; SIGTERM ends the process with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        words = ["git", "worktree", "add", "--detach", tree, commit]
        try:
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            raise study.BadInput(f"--against {commit}: git is needed, and is not installed") from None
        if done.returncode != 0:
            raise study.BadInput(f"--against {commit}: {done.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            words = ["git", "worktree", "remove", "--force", tree]
            subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


def measure_against(args: Args) -> list[study.Row]:
    """A row for each shape, script and tree."""
    rows: list[study.Row] = []

    def references(name: str) -> dict[str, str]:
        script, tree = name.split(", ")
        return {"commit": f"{script}, {args.against}", "PPO": f"PPO, {tree}"}

    with worktree(args.against) as other:
        for shape, (more, rollouts) in SHAPES.items():
            words, loops = f"--env-id {args.env_id} --device cpu --total-timesteps 1000000000 {more}", {}
            for name, (script, own) in SCRIPTS.items():
                for tree, folder in ((args.against, other), ("this tree", ROOT)):
                    loop = partial(turns.script_loop, script, f"{words} {own}", tree=folder)
                    loops[f"{name}, {tree}"] = loop
            samples = turns.loops_in_turns(loops, args.rounds, rollouts, warmup=2)
            rows += turns.loop_rows(samples, references, env_id=args.env_id, shape=shape)
    return rows


# ---- training: whole loops -------------------------------------------------------------------------
def reference(words: str, rollout_done: Callable[[turns.Numbers], None]) -> None:
    """The manner of CleanRL's `ppo_continuous_action`: environments with one stack of wrappers each."""
    args = ppo.parse_args(words.split())

    def make_env() -> gym.Env:
        env = gym.wrappers.FlattenObservation(gym.make(args.env_id))
        env = gym.wrappers.ClipAction(gym.wrappers.RecordEpisodeStatistics(env))
        env = gym.wrappers.NormalizeObservation(env)
        env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), env.observation_space)
        env = gym.wrappers.NormalizeReward(env, gamma=args.gamma)
        return gym.wrappers.TransformReward(env, lambda reward: np.clip(reward, -10, 10))

    torch.set_num_threads(1)
    envs = gym.vector.SyncVectorEnv([make_env] * args.num_envs)
    action_shape = envs.single_action_space.shape
    agent = ppo.Agent(*envs.single_observation_space.shape, *action_shape)

    def policy_and_value(obs: torch.Tensor) -> tuple[torch.distributions.Normal, torch.Tensor]:
        mean = agent.actor_mean(obs)
        policy = torch.distributions.Normal(mean, agent.actor_logstd.expand_as(mean).exp())
        return policy, agent.critic(obs).flatten()

    first_obs, parameters = envs.reset(seed=args.seed)[0], list(agent.parameters())
    reference_loop(args, envs, first_obs, action_shape, policy_and_value, parameters, rollout_done)


BLPO_SOLVERS = ("none", "nystrom", "cg 10", "cg 50")


def measure_training(args: Args) -> list[study.Row]:
    """A row for each shape and loop."""
    rows: list[study.Row] = []
    for shape, (more, rollouts) in SHAPES.items():
        words = f"--env-id {args.env_id} --device cpu --total-timesteps 1000000000 {more}"
        loops = {"PPO": partial(turns.script_loop, "ppo_continuous.py", words)}
        loops["reference PPO"] = partial(reference, words)
        for solver in BLPO_SOLVERS:
            more = f"{words} --ihvp {solver} --nystrom-rank 10".replace("cg ", "cg --cg-iterations ")
            loops[f"BLPO {solver}"] = partial(turns.script_loop, "blpo_continuous.py", more)
        samples = turns.loops_in_turns(loops, args.rounds, rollouts)
        rows += turns.loop_rows(samples, lambda _: {"PPO": "PPO"}, env_id=args.env_id, shape=shape)
    return rows


# ---- solvers: what a solver's time buys ------------------------------------------------------------
RANKS, ITERATIONS = (1, 2, 5, 10, 20, 50), (2, 5, 10, 20, 50)
SOLVERS = {f"nystrom {k}": partial(blpo.nystrom_ihvp, rank=k, generator=torch.Generator()) for k in RANKS}
SOLVERS |= {f"cg {k}": partial(blpo.cg_ihvp, iterations=k) for k in ITERATIONS}
ROWS = {"2048": "", "20480": "--num-envs 32 --num-steps 640"}  # of a rollout, and what makes it


def measure_solvers(args: Args) -> list[study.Row]:
    """A row for each size of rollout, damping and solver: milliseconds for b and v, residual of v."""
    rows: list[study.Row] = []

    def milliseconds(solve: Callable, systems: list, damping: float) -> turns.Numbers:
        start, calls = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < 0.02:
            for system in systems:
                solve(*system, damping)
            calls += len(systems)
        return {"ms": 1e3 * seconds / calls}

    for size, more in ROWS.items():
        words = f"--env-id {args.env_id} --total-timesteps {4 * int(size)} {more}".split()
        systems = [(curvature, u) for _, curvature, u in captured_systems(words, range(2, 5))]
        for damping in (blpo.Args().damping, blpo.Args().damping / 100):
            calls = {name: partial(milliseconds, solve, systems, damping) for name, solve in SOLVERS.items()}
            turns.in_turns(calls, 1)  # does not count
            for name, samples in turns.in_turns(calls, args.rounds).items():
                solved = [SOLVERS[name](*system, damping) for system in systems]
                left = [residual(system[0], *bv, damping) for system, bv in zip(systems, solved)]
                row = {"env_id": args.env_id, "rows": size, "damping": damping, "solver": name}
                rows.append(row | samples | {"relative_residual": left})
    return rows


def measure(args: Args) -> Iterator[tuple[str, list[study.Row]]]:
    """The parts that are asked for, in this order: torch forbids forks once autograd has run in this
    process."""
    torch.set_num_threads(1)
    measures = {"against": measure_against, "training": measure_training, "solvers": measure_solvers}
    for part in (part for part in measures if part in (("against",) if args.against else args.parts)):
        yield part, measures[part](args)


if __name__ == "__main__":
    study.command(Args, measure, __file__, __doc__)
