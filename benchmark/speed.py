"""How fast the continuous scripts are, and what each part of a BLPO minibatch costs.

    python -m benchmark.speed                            every part: about ten minutes on two idle cores
    python -m benchmark.speed --quick                    every part with tiny budgets: under a minute, for a look only
    python -m benchmark.speed --parts loops residual     some of them

    loops     whole training loops: environment alone, PPO, a reference PPO loop on Gymnasium, BLPO by solver
    parts     milliseconds of each part of one minibatch
    residual  time of each solver against the residual it leaves, on systems of a real run
    scaling   time and memory of one hypergradient against rank, critic width and rows
    launch    seconds of a process that makes one rollout and one update

How the numbers are taken. All on the CPU with one torch thread (the networks may live elsewhere, these times do not
speak of it). Nystrom takes no more directions than the critic's last layer has inputs and a bias, so at width 64 a rank
of 100 is 65. Competitors take turns, A B C A B C ..., so that a change of the machine's load meets all of them alike;
a number is the median over the turns with (lowest..highest), and a ratio is taken within a turn before its median.
Absolute times belong to the machine named in speed.json; ratios and the milliseconds that a part adds to a minibatch
carry over better. The load average is printed and kept, because a busy machine spoils all of them.

Each part writes {part}.csv and its entry of speed.json (all samples, command, commit, versions, machine, load).
"""

import contextlib
import copy
import csv
import importlib.util
import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import matplotlib
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor

import blpo_continuous as blpo
import ppo_continuous as ppo

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler announces every start and stop

if importlib.util.find_spec("blpo_continuous_ablations"):
    import blpo_continuous_ablations as ablations
else:
    ablations = None

ROOT = Path(__file__).parent.parent
PARTS = ("loops", "parts", "residual", "scaling", "launch")
DEFAULT_SHAPE: list[str] = []
LARGE_SHAPE = "--num-envs 32 --num-steps 640 --update-epochs 4 --num-minibatches 32".split()
# Ten environments make minibatches of ten chunks of 64 steps, the large shape's, from rollouts an eighth its size.
CAPTURE_SHAPE = "--num-envs 10 --num-steps 256 --num-minibatches 4 --chunk-length 64".split()


@dataclass
class Args:
    quick: bool = False
    """tiny budgets, one environment, one shape: shows that everything runs, measures little"""
    parts: tuple[Literal["loops", "parts", "residual", "scaling", "launch"], ...] = PARTS
    """what to measure"""
    env_ids: tuple[str, ...] = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
    """environments of the part loops; the first one serves parts, residual and launch"""
    rounds: int = 5
    """turns of each competitor in loops and launch, in [1, inf)"""
    micro_rounds: int = 15
    """turns of each competitor in the other parts, in [1, inf)"""
    output: Path | None = None
    """folder of the results; default: benchmark/results/speed, with --quick runs/speed"""


# A table is a list of rows; a row maps column names to a word, a number, or the list of one number's samples.
Row = dict[str, str | float | list[float]]


# ---- Taking turns ----------------------------------------------------------------------------------------------
def milliseconds(competitors: dict[str, Callable[[], object]], rounds: int, turn: float = 0.02) -> dict[str, list[float]]:
    """Milliseconds of one call of each competitor, for each of `rounds` turns.

    A turn repeats the call for about `turn` seconds; the first call, which sets the number of repetitions, is not timed.
    """
    repeats = {}
    for name, call in competitors.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(turn / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, call in competitors.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return samples


def ratios(samples: list[float], reference: list[float]) -> list[float]:
    """Turn by turn, samples over reference."""
    return [sample / other for sample, other in zip(samples, reference, strict=True)]


# ---- loops: whole training loops -------------------------------------------------------------------------------
# A loop is a function of `rollout_done`, which it calls after each rollout with its seconds of env, policy and update.
Loop = Callable[[Callable[[dict[str, float]], None]], None]


def loops_in_turns(
    loops: dict[str, Loop], rounds: int, rollouts: int, warmup: int = 1
) -> dict[str, list[dict[str, float]]]:
    """Mean seconds of a rollout of each loop, for each of `rounds` turns of `rollouts` rollouts.

    Every loop lives in a process of its own that sleeps when it is not its turn, so each is set up and warmed up
    (`warmup` rollouts that do not count) only once, and the turns are as short as a rollout.
    """
    context = multiprocessing.get_context("fork")
    processes, pipes, samples = [], {}, {name: [] for name in loops}
    for name, loop in loops.items():
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=serve_turns, args=(loop, end), daemon=True))
        processes[-1].start()
        end.close()
    for turn in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(rollouts if turn else warmup)
            seconds = pipe.recv()
            if turn:
                samples[name].append(seconds)
    for process, pipe in zip(processes, pipes.values()):
        pipe.send(0)
        process.join()
    return samples


def serve_turns(loop: Loop, pipe) -> None:
    """Run `loop` by turns: for each number of rollouts received, send their mean seconds; 0 ends it."""
    os.chdir(tempfile.gettempdir())  # MuJoCo writes its log where it is
    parent = os.getppid()

    def next_turn() -> int:
        while not pipe.poll(1.0):
            if os.getppid() != parent:  # it was killed; its end of the pipe lives on in the other loops' processes
                return 0
        return pipe.recv()

    todo, start, done = next_turn(), time.perf_counter(), []
    if todo == 0:
        return

    def rollout_done(seconds: dict[str, float]) -> None:
        nonlocal todo, start
        done.append(seconds | {"rollout": time.perf_counter() - start})
        if len(done) == todo:
            pipe.send({name: statistics.mean(each[name] for each in done) for name in done[0]})
            done.clear()
            todo = next_turn()
            if todo == 0:
                sys.exit()
        start = time.perf_counter()

    warnings.simplefilter("ignore")  # Gymnasium deprecates the v4 tasks
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        loop(rollout_done)


def script_loop(script, words: list[str], rollout_done: Callable[[dict[str, float]], None]) -> None:
    """The training of one of the scripts, as it is, logging included: its log entry marks the end of a rollout."""
    log = script.Run.log

    def log_and_tell(run, global_step, metrics, *rest):
        log(run, global_step, metrics, *rest)
        rollout_done({name: metrics[f"time/{name}"] for name in ("env", "policy", "update")})

    script.Run.log = log_and_tell
    script.train(script.parse_args(script.Args, words))


def with_processor_time(loop: Loop) -> Loop:
    """The loop, whose rollouts tell their processor time as well."""

    def run(rollout_done: Callable[[dict[str, float]], None]) -> None:
        start = time.process_time()

        def done(seconds: dict[str, float]) -> None:
            nonlocal start
            rollout_done(seconds | {"cpu": time.process_time() - start})
            start = time.process_time()

        loop(done)

    return run


class Recorder:
    """Environments that keep the actions they were sent in the list `sent`."""

    def __init__(self, envs, sent: list[np.ndarray]):
        self.envs, self.sent = envs, sent

    def __getattr__(self, name: str):
        return getattr(self.envs, name)

    def step(self, actions: np.ndarray):
        self.sent.append(actions.copy())
        return self.envs.step(actions)


class Enough(Exception):
    """Ends a training run."""


def actions_of_ppo(words: list[str], rollouts: int) -> list[np.ndarray]:
    """The actions (N, A) of every step of PPO's first rollouts with these words: a CPU run repeats bitwise."""
    sent, make_envs, done = [], ppo.make_envs, []

    def make_recorder(*settings):
        envs, *spaces = make_envs(*settings)
        return Recorder(envs, sent), *spaces

    def rollout_done(seconds):
        done.append(seconds)
        if len(done) == rollouts:
            raise Enough

    ppo.make_envs = make_recorder
    with contextlib.suppress(Enough):
        script_loop(ppo, words, rollout_done)
    ppo.make_envs = make_envs
    return sent


def environment_loop(words: list[str], rollouts: int | None, rollout_done: Callable[[dict[str, float]], None]) -> None:
    """The environments alone, with actions drawn and clipped beforehand: the limit of every loop on them.

    What a step costs depends on the state (contacts, resets). So there are two limits: with random actions, and with
    the actions of PPO's first `rollouts` rollouts, whose environments then go through the very states of the PPO loop.
    """
    args = ppo.parse_args(ppo.Args, words)
    envs, _, space = ppo.make_envs(args.env_id, args.num_envs, args.seed, args.env_backend, args.env_threads)
    if rollouts is None:
        actions = np.random.default_rng(args.seed).standard_normal((args.num_steps, args.num_envs, *space.shape))
        actions = list(actions.clip(space.low, space.high).astype(np.float32))
    else:
        actions = actions_of_ppo(words, rollouts)
    envs.reset()
    for first in itertools.cycle(range(0, len(actions), args.num_steps)):
        start = time.perf_counter()
        for action in actions[first : first + args.num_steps]:
            envs.step(action)
        rollout_done({"env": time.perf_counter() - start, "policy": 0.0, "update": 0.0})


def reference_loop(args, rollout_done: Callable[[dict[str, float]], None]) -> None:
    """PPO in the manner of CleanRL's `ppo_continuous_action`, the loop that most readers know; no logging.

    Gymnasium's synchronous environments with one stack of wrappers each, torch.distributions, values asked at every
    step, GAE as a loop over time, Adam's default implementation, and numbers read back in every minibatch.
    """

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
    "BLPO cg 20": "--ihvp cg --cg-iterations 20",
    "BLPO cg 50": "--ihvp cg --cg-iterations 50",
    "BLPO exact": "--ihvp exact",
}


def measure_loops(args: Args) -> dict[str, list[Row]]:
    rows: list[Row] = []
    for env_id in args.env_ids[:1] if args.quick else args.env_ids:
        for shape in (DEFAULT_SHAPE,) if args.quick else (DEFAULT_SHAPE, LARGE_SHAPE):
            with tempfile.TemporaryDirectory() as folder:
                words = ["--env-id", env_id, "--run-dir", folder, "--device", "cpu", *shape]
                parsed = ppo.parse_args(ppo.Args, words)
                # A rollout of the default shape takes a fraction of a second: four of them make a turn.
                rollouts = 4 if shape is DEFAULT_SHAPE and not args.quick else 1
                loops: dict[str, Loop] = {
                    "environment only, random actions": partial(environment_loop, words, None),
                    "environment only, PPO's actions": partial(environment_loop, words, 1 + rollouts * args.rounds),
                    "PPO": partial(script_loop, ppo, words),
                    "reference PPO": partial(reference_loop, parsed),
                }
                loops |= {name: partial(script_loop, blpo, words + extra.split()) for name, extra in BLPO_SOLVERS.items()}
                samples = loops_in_turns(loops, args.rounds, rollouts)
            steps = parsed.num_envs * parsed.num_steps
            seconds = {name: [turn["rollout"] for turn in turns] for name, turns in samples.items()}
            for name, turns in samples.items():
                # What BLPO's ratio would be if its policy had led the environments through PPO's states.
                pairs = zip(turns, samples["PPO"])
                same_env = [turn["rollout"] - turn["env"] + of_ppo["env"] for turn, of_ppo in pairs]
                same_env = ratios(same_env, seconds["PPO"]) if name.startswith("BLPO") else ""
                rows.append(
                    {
                        "env_id": env_id,
                        "shape": f"{parsed.num_envs} x {parsed.num_steps}",
                        "env_threads": parsed.env_threads,
                        "loop": name,
                        "steps_per_s": [steps / each for each in seconds[name]],
                        "of_environment_only": ratios(seconds["environment only, PPO's actions"], seconds[name]),
                        "time_vs_ppo": ratios(seconds[name], seconds["PPO"]),
                        "time_vs_ppo_at_its_env_time": same_env,
                    }
                    | {f"{part}_s": [turn[part] for turn in turns] for part in ("env", "policy", "update")}
                )
            title = f"Loops: {env_id}, {parsed.num_envs} x {parsed.num_steps}; seconds are of one rollout"
            show(title, rows[-len(samples) :])
    return {"loops": rows}


# ---- Solvers and the systems they solve ------------------------------------------------------------------------
Solver = Callable[[blpo.GaussNewton, Tensor, float], tuple[Tensor, Tensor]]


def solvers(ranks: tuple[int, ...], iterations: tuple[int, ...]) -> dict[tuple[str, int], Solver]:
    """Every solver of the scripts by (family, its number): (curvature, u, damping) to b = J^T u, (H + damping I)^-1 b."""
    generator = torch.Generator().manual_seed(0)
    table: dict[tuple[str, int], Solver] = {}
    for rank in ranks:
        table["nystrom", rank] = partial(blpo.nystrom_ihvp, rank=rank, generator=generator)
    for k in iterations:
        table["cg", k] = partial(blpo.cg_ihvp, iterations=k)
    for k in iterations if ablations is not None else ():
        table["pcg", k] = partial(pcg_ihvp, rank=10, iterations=k, generator=generator)
    return table | {("exact", 0): blpo.exact_ihvp}


def pcg_ihvp(
    curvature: blpo.GaussNewton, u: Tensor, damping: float, rank: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The laboratory's preconditioned conjugate gradients, its Nystrom sketch (the same as nystrom_ihvp's) included."""
    images = blpo.feature_directions(curvature, rank, generator).T @ curvature.features.T
    b, *columns = curvature.jacobian.vjp(torch.cat([u[None], images * curvature.root]))
    sketch = torch.stack(columns), images @ images.T
    return b, ablations.preconditioned_cg_ihvp(curvature, b, damping, iterations, *sketch)


def solver_name(family: str, number: int) -> str:
    return f"{family} {number}" if number else family


def capture_systems(env_id: str, iterations: int) -> list[tuple[blpo.GaussNewton, Tensor]]:
    """(curvature, u) of the last minibatch of every rollout of a short run with the exact solver, without the first."""
    systems, original = [], blpo.exact_ihvp

    def keep(curvature, u, damping):
        systems.append((curvature, u))
        return original(curvature, u, damping)

    blpo.exact_ihvp = keep
    try:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
            words = ["--env-id", env_id, "--run-dir", folder, "--device", "cpu", "--ihvp", "exact", *CAPTURE_SHAPE]
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                blpo.train(blpo.parse_args(blpo.Args, [*words, "--total-timesteps", str(2560 * iterations)]))
    finally:
        blpo.exact_ihvp = original
    per_rollout = blpo.Args.update_epochs * int(CAPTURE_SHAPE[CAPTURE_SHAPE.index("--num-minibatches") + 1])
    return systems[2 * per_rollout - 1 :: per_rollout]


def relative_residual(curvature: blpo.GaussNewton, b: Tensor, v: Tensor, damping: float) -> float:
    """|(H + damping I) v - b| / |b| in float64, with H of the float32 factors that the solver was given."""
    precise = copy.copy(curvature)
    precise.jacobian, precise.root = copy.copy(curvature.jacobian), curvature.root.double()
    for name in ("inputs", "deltas"):
        setattr(precise.jacobian, name, [factor.double() for factor in getattr(curvature.jacobian, name)])
    return float((precise.product(v.double(), damping) - b.double()).norm() / b.double().norm())


# ---- parts: one minibatch, part by part ------------------------------------------------------------------------
def minibatch_parts(obs: Tensor, action_dim: int, damping: float) -> dict[str, Callable[[], object]]:
    """The parts of a PPO and of a BLPO minibatch, as the scripts compute them, at normalised observations (C, L+1, D).

    Actions, rewards and targets are random and the step sizes 0, so that every call computes the same.
    """
    chunks, length, obs_dim = len(obs), obs.shape[1] - 1, obs.shape[2]
    ppo_args, blpo_args = ppo.Args(), blpo.Args()
    agent = blpo.Agent(obs_dim, action_dim)
    actions, rewards = torch.randn(chunks, length, action_dim), torch.randn(chunks, length)
    with torch.no_grad():
        logprobs = agent.logprob_and_entropy(obs[:, :-1], actions)[0] + 0.1 * torch.randn(chunks, length)
    weights = torch.full((chunks, length), 1 / (chunks * length))
    row_weights, targets = nn.functional.pad(weights, (0, 1)).flatten(), torch.randn(chunks * length)
    error_weights = 2 * weights.flatten()
    no_ends, all_valid = torch.zeros(chunks, length), torch.ones(chunks, length)
    operator = blpo.gae_operator(no_ends, all_valid, blpo_args.gamma, blpo_args.gae_lambda)
    discounts = torch.full((chunks, length), blpo_args.gamma)
    states, obs_rows = obs[:, :-1].flatten(0, 1), obs.flatten(0, 1)
    baseline = copy.deepcopy(agent)
    theta, omega = blpo.flat_view(agent.actor_parameters()), blpo.flat_view(agent.critic.parameters())
    baseline_parameters = [blpo.flat_view(each) for each in (baseline.actor_parameters(), baseline.critic.parameters())]
    joint, actor, critic = (
        blpo.FlatAdam({"params": vectors, "lr": 0.0}) for vectors in (baseline_parameters, theta, omega)
    )

    flat = obs[:, :-1].flatten(0, 1), actions.flatten(0, 1), logprobs.flatten(), rewards.flatten()
    batch = torch.randperm(chunks * length)

    def ppo_update() -> None:
        flat_obs, flat_actions, flat_logprobs, flat_advantages = (x[batch] for x in flat)
        old_values, returns = flat[2][batch], flat[3][batch]
        new_logprobs, entropy = baseline.logprob_and_entropy(flat_obs, flat_actions)
        ratio = (new_logprobs - flat_logprobs).exp()
        advantages = (flat_advantages - flat_advantages.mean()) / (flat_advantages.std() + 1e-8)
        loss = -ppo.clipped_surrogate(ratio, advantages, ppo_args.clip_coef).mean()
        values = baseline.critic(flat_obs).squeeze(-1)
        loss = loss - ppo_args.ent_coef * entropy
        loss = loss + ppo_args.vf_coef * ppo.value_loss(values, old_values, returns, ppo_args.clip_coef)
        for vector in baseline_parameters:
            vector.grad.zero_()
        loss.backward()
        nn.utils.clip_grad_norm_(baseline_parameters, ppo_args.max_grad_norm)
        joint.update()

    def critic_step() -> None:
        errors = agent.critic(states).squeeze(-1) - targets
        omega.grad.zero_()
        errors.backward(error_weights * errors.detach())
        critic.update()

    def nested_critic() -> None:
        for _ in range(blpo_args.nested_updates):
            critic_step()

    jacobian = blpo.CriticJacobian(agent.critic, obs_rows)

    def slopes_of_the_values() -> Tensor:
        values = jacobian.values.view(chunks, -1)
        advantages = blpo.lambda_returns(values, rewards, discounts, operator) - values[:, :-1]
        advantages = blpo.normalised(advantages, weights)
        slopes = weights * blpo.surrogate_slope(all_valid, advantages, blpo_args.clip_coef)  # a ratio of 1 throughout
        return blpo.lambda_returns_vjp(slopes, discounts, operator).flatten()

    u = slopes_of_the_values()
    v = torch.randn(1, omega.numel())

    def actor_step() -> None:
        new_logprobs, _ = agent.logprob_and_entropy(states, actions.flatten(0, 1))
        ratio = (new_logprobs.view_as(logprobs) - logprobs).exp()
        loss = -(weights * blpo.clipped_surrogate(ratio, rewards, blpo_args.clip_coef)).sum()
        theta.grad.zero_()
        loss.backward()
        actor.update()

    parts: dict[str, Callable[[], object]] = {
        "PPO update": ppo_update,
        "critic step": critic_step,
        f"nested critic, K = {blpo_args.nested_updates}": nested_critic,
        "CriticJacobian": lambda: blpo.CriticJacobian(agent.critic, obs_rows).deltas,
        "lambda-returns and u": slopes_of_the_values,
    }
    for (family, number), solve in solvers((1, 10, 100), (10, 20, 50)).items():
        parts[f"b and v by {solver_name(family, number)}"] = partial(
            lambda solve: solve(blpo.GaussNewton(jacobian, row_weights), u, damping), solve
        )
    return parts | {"z = J v": lambda: jacobian.jvp(v), "actor step": actor_step}


def measure_parts(args: Args) -> dict[str, list[Row]]:
    env_id, damping = args.env_ids[0], blpo.Args().damping
    curvature, _ = capture_systems(env_id, 3)[-1]
    envs, _, action_space = blpo.make_envs(env_id, 1, 0)
    envs.close()
    obs = curvature.jacobian.inputs[0]
    obs = obs.view(-1, 65, obs.shape[1])
    rows: list[Row] = []
    for chunks in (2, 10):
        samples = milliseconds(minibatch_parts(obs[:chunks], *action_space.shape, damping), args.micro_rounds)
        nested = next(name for name in samples if name.startswith("nested"))
        whole = [nested, "CriticJacobian", "lambda-returns and u", "b and v by nystrom 10", "z = J v", "actor step"]
        samples["BLPO minibatch with nystrom 10 (sum)"] = [sum(turn) for turn in zip(*(samples[name] for name in whole))]
        for name, times in samples.items():
            rows.append(
                {
                    "env_id": env_id,
                    "minibatch": f"{chunks} x 64",
                    "part": name,
                    "ms": times,
                    "vs_ppo_update": ratios(times, samples["PPO update"]),
                }
            )
        show(f"Parts of one minibatch of {chunks} chunks of 64 steps, {env_id}", rows[-len(samples) :])
    return {"parts": rows}


# ---- residual: what a solver's time buys -----------------------------------------------------------------------
def measure_residual(args: Args) -> dict[str, list[Row]]:
    systems = capture_systems(args.env_ids[0], 3 if args.quick else 9)
    numbers = (1, 5, 20) if args.quick else (1, 2, 5, 10, 20, 50)
    rows: list[Row] = []
    for damping in (blpo.Args().damping, blpo.Args().damping / 100):
        table = solvers(numbers if args.quick else (*numbers, 100), numbers)

        def solve_all(solve: Solver) -> list[tuple[Tensor, Tensor]]:
            return [solve(curvature, u, damping) for curvature, u in systems]

        samples = milliseconds({key: partial(solve_all, solve) for key, solve in table.items()}, args.micro_rounds)
        for (family, number), solve in table.items():
            left = [relative_residual(curvature, *bv, damping) for (curvature, _), bv in zip(systems, solve_all(solve))]
            times = [each / len(systems) for each in samples[family, number]]
            row: Row = {"env_id": args.env_ids[0], "damping": damping, "solver": family, "number": number}
            rows.append(row | {"ms": times, "relative_residual": left})
        title = f"Residual at damping {damping:g}, {args.env_ids[0]}"
        title += f"; spread of ms over turns, of the residual over {len(systems)} systems"
        show(title, [row for row in rows if row["damping"] == damping])
    return {"residual": rows}


# Colours of Okabe and Ito, told apart with any colour vision; every family has a marker of its own as well.
STYLES = {
    "nystrom": {"color": "#0072B2", "marker": "o"},
    "cg": {"color": "#D55E00", "marker": "s"},
    "pcg": {"color": "#009E73", "marker": "^"},
    "exact": {"color": "#000000", "marker": "*"},
}


def plot_residual(rows: list[Row]) -> plt.Figure:
    labels = {"nystrom": "Nyström, rank", "cg": "CG, iterations", "pcg": "CG preconditioned by Nyström 10"}
    dampings = sorted({row["damping"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(dampings), figsize=(6 * len(dampings), 4.5), sharey=True, squeeze=False)
    for axis, damping in zip(axes[0], dampings):
        for family, style in STYLES.items():
            points = [row for row in rows if row["damping"] == damping and row["solver"] == family]
            if not points:
                continue
            ms, residual = ([statistics.median(row[name]) for row in points] for name in ("ms", "relative_residual"))
            size = 9 if family == "exact" else 5
            axis.loglog(ms, residual, linewidth=1, markersize=size, label=labels.get(family, family), **style)
            for row, x, y in zip(points, ms, residual):
                text = row["number"] or "exact"
                axis.annotate(str(text), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=style["color"])
        axis.set(xlabel="milliseconds of one solve (CPU, one thread)", title=f"{rows[0]['env_id']}, damping {damping:g}")
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("|(H + damping I) v - b| / |b|")
    axes[0][0].legend(frameon=False)
    return figure


# ---- scaling: rank, width, rows --------------------------------------------------------------------------------
def one_hypergradient(solve: Solver, rows: int, width: int, damping: float) -> Callable[[], Tensor]:
    """z for a critic of that width at random observations: Jacobian, b, solve and J v, on chunks of 64 rows."""
    chunks, length, obs_dim = rows // 64, 64, 11
    critic, obs = blpo.mlp(obs_dim, width, 1, gain=1.0), torch.randn(chunks * (length + 1), obs_dim)
    weights, discounts = torch.full((chunks, length), 1 / rows), torch.full((chunks, length), 0.99)
    row_weights = nn.functional.pad(weights, (0, 1)).flatten()
    operator = blpo.gae_operator(torch.zeros(chunks, length), torch.ones(chunks, length), 0.99, 0.95)

    def compute() -> Tensor:
        jacobian = blpo.CriticJacobian(critic, obs)
        u = blpo.lambda_returns_vjp(weights, discounts, operator).flatten()
        return jacobian.jvp(solve(blpo.GaussNewton(jacobian, row_weights), u, damping)[1][None])

    return compute


def peak_megabytes(call: Callable[[], object]) -> float:
    """The most memory that `call` holds above what was held before, from the allocations the profiler records.

    A count by hand of the tensors alive in nystrom 10 at 640 rows and width 64 gave the same.
    """
    blpo.workspace.cache_clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    allocations = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(np.cumsum([size for _, size in allocations])) / 1e6


def measure_scaling(args: Args) -> dict[str, list[Row]]:
    table = solvers((1, 2, 5, 10, 20, 50, 100), (10,))
    widths, row_counts = (64, 128, 256, 512), (256, 512, 1024, 2048, 4096)
    if args.quick:
        widths, row_counts = widths[:3], row_counts[:3]
    representative = [key for key in table if key in {("nystrom", 10), ("cg", 10), ("pcg", 10), ("exact", 0)}]
    sweeps = {("nystrom", "rank"): {rank: (("nystrom", rank), 640, 64) for family, rank in table if family == "nystrom"}}
    for key in representative:
        name = solver_name(*key)
        sweeps[name, "critic width"] = {width: (key, 640, width) for width in widths}
        sweeps[name, "rows"] = {count: (key, count, 64) for count in row_counts}
    rows: list[Row] = []
    exponents: list[Row] = []
    for (name, quantity), settings in sweeps.items():
        calls = {
            x: one_hypergradient(table[key], count, width, blpo.Args().damping)
            for x, (key, count, width) in settings.items()
        }
        samples = milliseconds(calls, args.micro_rounds if args.quick else max(3, args.micro_rounds // 3))
        for x, call in calls.items():
            row: Row = {"solver": name, "quantity": quantity, "value": x}
            rows.append(row | {"ms": samples[x], "peak_mb": peak_megabytes(call)})
        swept = rows[-len(calls) :]
        logs = [np.log([statistics.median(row["ms"]) for row in swept]), np.log([row["peak_mb"] for row in swept])]
        slopes = [float(np.polyfit(np.log(list(calls)), each, 1)[0]) for each in logs]
        exponents.append({"solver": name, "quantity": quantity, "time_exponent": slopes[0], "memory_exponent": slopes[1]})
    show("Scaling of one hypergradient (random observations of 11 numbers; 640 rows, width 64, unless swept)", rows)
    show("Fitted exponents: cost ~ quantity ^ exponent, least squares in the logarithms over the range measured", exponents)
    return {"scaling": rows, "scaling_exponents": exponents}


def plot_scaling(rows: list[Row]) -> plt.Figure:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex="col", sharey="row")
    for column, quantity in zip(axes.T, ("rank", "critic width", "rows")):
        for axis, measure in zip(column, ("ms", "peak_mb")):
            for name in dict.fromkeys(row["solver"] for row in rows if row["quantity"] == quantity):
                points = [row for row in rows if row["quantity"] == quantity and row["solver"] == name]
                y = [statistics.median(row[measure]) if measure == "ms" else row[measure] for row in points]
                axis.loglog([row["value"] for row in points], y, label=name, **STYLES[name.rstrip(" 0123456789")])
            axis.grid(True, which="major", alpha=0.3)
        values = sorted({row["value"] for row in rows if row["quantity"] == quantity})
        column[1].set_xticks(values, [str(value) for value in values])
        column[1].minorticks_off()
        column[1].set_xlabel({"rank": "Nyström rank"}.get(quantity, quantity))
        column[0].legend(frameon=False)
    axes[0][0].set_ylabel("milliseconds (CPU, one thread)")
    axes[1][0].set_ylabel("peak extra memory, MB")
    return figure


# ---- launch ----------------------------------------------------------------------------------------------------
def measure_launch(args: Args) -> dict[str, list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        steps = ppo.Args().num_envs * ppo.Args().num_steps
        run = ["--env-id", args.env_ids[0], "--total-timesteps", str(steps), "--run-dir", folder, "--device", "cpu"]
        commands = {
            "imports only": ["-c", "import ppo_continuous"],
            "PPO, one rollout and update": ["ppo_continuous.py", *run],
            "BLPO, one rollout and update": ["blpo_continuous.py", *run],
        }
        samples: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(1 if args.quick else args.rounds):
            for name, words in commands.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
                samples[name].append(time.perf_counter() - start)
    rows: list[Row] = [{"process": name, "seconds": times} for name, times in samples.items()]
    show("Launch: from the start of the process to its end, default arguments", rows)
    return {"launch": rows}


# ---- Results ---------------------------------------------------------------------------------------------------
def cell(value: str | float | list[float]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1:
        return cell(value[0])
    if isinstance(value, list):
        return f"{cell(statistics.median(value))} ({cell(min(value))}..{cell(max(value))})"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def show(title: str, rows: list[Row]) -> None:
    """Print a Markdown table: samples as median (lowest..highest)."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    print(f"\n**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", flush=True)


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row: samples as their median, with columns _min and _max beside it."""
    lines = []
    for row in rows:
        line: dict[str, str | float] = {}
        for name, value in row.items():
            samples = value if isinstance(value, list) else None
            line[name] = value if samples is None else statistics.median(samples)
            line |= {} if samples is None else {f"{name}_min": min(samples), f"{name}_max": max(samples)}
        lines.append({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in line.items()})
    with open(path, "w", newline="") as file:
        names = dict.fromkeys(name for line in lines for name in line)  # some columns are empty in some rows
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(lines)


def provenance(module: str) -> dict:
    """What made the numbers of benchmark.`module`: command, commit, versions, machine, date; not the threads of this process,
    since those that are measured have their own. A child looks: a process that has asked for a CUDA device can fork none
    that uses it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        seen = child.submit(ppo.provenance).result()
    made_by = seen | {
        "script": f"benchmark/{module}.py",
        "command": shlex.join(["python", "-m", f"benchmark.{module}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    del made_by["argv"], made_by["threads"]
    return made_by


def main(args: Args) -> None:
    if min(args.rounds, args.micro_rounds) < 1:
        sys.exit("error: --rounds and --micro-rounds must be at least 1")
    torch.set_num_threads(1)
    blpo.keep_freed_memory()  # as `train` does
    output = args.output or (ROOT / "runs/speed" if args.quick else ROOT / "benchmark/results/speed")
    output.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.rounds, args.micro_rounds = 1, 2
    made_by = provenance("speed")
    machine = f"{made_by['cpu']}, {os.cpu_count()} cores"
    commit = f"commit {str(made_by['commit'])[:7]}{' with changes' if made_by['dirty'] else ''}"
    print(f"{machine}, {commit}")
    print(f"{made_by['command']}: times on the CPU, one torch thread; median (lowest..highest) of the turns")
    measures = {
        "loops": measure_loops,  # first: its processes are forked, which torch forbids once autograd has run here
        "parts": measure_parts,
        "residual": measure_residual,
        "scaling": measure_scaling,
        "launch": measure_launch,
    }
    plots = {"residual": plot_residual, "scaling": plot_scaling}
    path = output / "speed.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    for part in (part for part in PARTS if part in args.parts):
        before, start = os.getloadavg(), time.perf_counter()
        tables = measures[part](args)
        load = {"before": before, "after": os.getloadavg(), "cores": os.cpu_count()}
        load_in_words = f"load average {before[0]:.1f} before, {load['after'][0]:.1f} after"
        seconds = round(time.perf_counter() - start)
        print(f"\n{part}: {seconds} s; {load_in_words}, {load['cores']} cores")
        for name, rows in tables.items():
            write_csv(output / f"{name}.csv", rows)
            everything[name] = {"provenance": made_by | {"load_average": load, "seconds": seconds}, "rows": rows}
            if name in plots:
                figure = plots[name](rows)
                figure.tight_layout(rect=(0, 0.04, 1, 1))
                caption = f"{made_by['command']}; {commit}, {machine}, {load_in_words}"
                figure.text(0.01, 0.01, caption, fontsize=7)
                figure.savefig(output / f"{name}.png", dpi=150)
                plt.close(figure)
        path.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
