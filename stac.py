"""Stackelberg actor-critic, STAC (Zheng et al. 2022, arXiv:2109.12286), and AC, its baseline. The two players
are the actor theta (leader) and the critic omega (follower) of one agent, not two agents. Elsewhere the
letters STAC mean self-tuning actor-critic.

Three defaults are those of the authors' code and not of the paper. L is over all visited states, not over the
first ones. The actor's gradient has no gamma^t, which in a task of 3 steps with gamma = 0.9 moves the mixed
term by 0.11 of its norm away from Proposition 1; `--discount-gradient` puts gamma^t in. And J is the mean
value of all visited states, not of the second ones, which there moves the mixed term by 0.37 of its norm;
`--leader-states second` is the paper's. Both figures are those of `dice_step` in tests/test_stackelberg.py.

With the follower's loss L = mean_k (V_omega(s_k) - G_k)^2 and the leader's objective J, Algorithm 2 climbs
the total derivative of J:

    theta <- theta + lr (grad_theta J - (grad_theta,omega L) x)                  eq. (15)
    (grad^2_omega L + lambda I) x = b = grad_omega J                             Prop. 2
    omega <- omega - critic_lr grad_omega L,   m times                           -> value_loss

    grad_theta J = mean_{i,t} w_t A_it grad log pi(a_it|s_it), A by GAE          -> gae, policy_objective
        w_t = 1, or gamma^t with --discount-gradient                             -> discount_weights
    b = grad_omega of mean_k V(s_k), or of mean_i gamma (1 - terminated) V(s_i1) -> leader_states, mean_value
    grad^2_omega L in full, or Gauss-Newton: 2 mean_k grad V_k grad V_k^T        -> curvature
    x by conjugate gradients, stopped at negative curvature                      -> conjugate_gradient
    (grad_theta,omega L) x = -2 mean_{i,t} u_i w_t A_it grad log pi(a_it|s_it)   Prop. 1
        u_i = grad V(s_i0).x, s_i0 the first state of trajectory i               -> directional_derivative

So the step is the policy gradient with **each trajectory's advantages multiplied by 1 + 2 u_i**
(`trajectory_weights`): one forward-mode derivative of the critic, one backward pass of the actor, nothing of
second order in theta. `--no-stackelberg` is AC: all weights are 1.

Also as in the authors' code, advantages are standardised and both players take plain gradient steps
(`--optimizer adam`: Adam's, along the same gradients). Unlike there, the solve is guarded and each trajectory
has a weight of its own; the released step is a multiple of AC's. docs/stackelberg.md says what follows from
that, `stac_ablations.py` has the released update.

    python stac.py --env-id CartPole-v0 --critic-steps 80
"""

# ---- Imports -----------------------------------------------------------------------------------------
import argparse
import contextlib
import copy
import csv
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import filelock
import gymnasium as gym
import numpy as np
import pydantic
import torch
import torch.nn as nn
import tyro
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ---- Checked arguments (shared) ----------------------------------------------------------------------
class BadInput(Exception):
    """One sentence that names the argument, what is wrong and what would be right; exit status 2."""


class CheckedArgs(pydantic.BaseModel, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="strings"):
    """Arguments whose ranges are checked whenever they are made, from a command line or in Python."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def one_sentence(cls, values, check):
        """Raise BadInput for the first argument that is out of its range."""
        try:
            return check(values)
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            name, message = str(wrong["loc"][0]).replace("_", "-"), wrong["msg"].removeprefix("Value error, ")
            raise BadInput(f"--{name} is {wrong['input']!r}: {message}") from None


# ---- Argument types (shared) -------------------------------------------------------------------------
def json_object(text: str) -> str:
    """The text; raises ValueError unless it is a JSON object."""
    if not isinstance(json.loads(text), dict):
        raise ValueError("it must be a JSON object")
    return text


Fraction = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1, le=8192)]


# ---- Arguments ---------------------------------------------------------------------------------------
class Args(CheckedArgs):
    """The run, the task, then AC and STAC."""

    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the environments, the initial weights and the actions"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    run_dir: Path = Path("runs")
    """the run's own folder is made in this one: {run_dir}/{env_id}__{exp_name}__{seed}__{time}"""
    resume: Path | None = None
    """continue, extend or replay the run in this folder, with its arguments; those given again win"""
    checkpoint_every: PositiveInt = 50
    """iterations between two checkpoints"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "bilevel-actor-critic"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team"""
    save_model: bool = False
    """write model.pt (the policy) at the end"""
    eval_episodes: Annotated[int, Field(ge=0, le=10_000)] = 0
    """episodes played with the mean or most probable action at the end, through Gymnasium"""
    capture_video: bool = False
    """film one such episode"""

    env_id: str = "CartPole-v0"
    """any task with Discrete or Box actions; also namespace/Name-v0 and module:Name-v0"""
    env_kwargs: Annotated[str, pydantic.AfterValidator(json_object)] = "{}"
    """keyword arguments of the task, as JSON: '{"terminate_when_unhealthy": false}'"""
    env_backend: Literal["auto", "envpool", "sync", "async"] = "auto"
    """who steps the environments: EnvPool, or Gymnasium in this process or in one for each; auto: EnvPool
    where it has the task, else sync"""
    env_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """EnvPool threads; 0: one for each usable core, at most num_envs"""
    total_timesteps: PositiveInt = 800_000
    """environment steps in all, rounded down to whole rollouts"""
    num_envs: Annotated[int, Field(ge=1, le=65536)] = 4
    """parallel environments"""

    num_steps: Annotated[int, Field(ge=2)] = 1000
    """steps of each environment in a rollout; num_envs x num_steps = 4000 in the paper"""
    stackelberg: bool = True
    """STAC: the actor climbs its total derivative; otherwise AC: its partial derivative"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """what both players step with: plain gradient steps, as in the paper, or Adam along the same gradients"""
    learning_rate: PositiveFloat = 0.1
    """step size of the actor; the authors' for CartPole, the paper gives none"""
    critic_learning_rate: PositiveFloat = 0.01
    """step size of the critic; the authors' for CartPole"""
    critic_steps: PositiveInt = 1
    """m, critic steps after each actor step; the paper compares 1 and 80"""
    regularisation: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 0.0
    """lambda, added to the critic's Hessian; the paper: 0 for CartPole, 500 for continuous control; inf is
    AC"""
    hessian: Literal["full", "gauss-newton"] = "full"
    """the critic's Hessian as in the paper, or its positive semidefinite part"""
    cg_iterations: PositiveInt = 10
    """iterations of conjugate gradients; 10 in the paper"""
    leader_states: Literal["second", "all"] = "all"
    """states whose values b differentiates: the second of each trajectory, as in the paper, or all visited
    ones, as in its code"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.97
    """lambda of the advantages; the critic's targets are Monte Carlo returns (lambda = 1)"""
    norm_adv: bool = True
    """normalise the advantages over the rollout"""
    discount_gradient: bool = False
    """weigh step t of a trajectory by gamma^t, as in the paper's theorems; its code does not"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it is a termination, as below 1000 steps
    in the paper's code"""
    first_width: Width = 64
    """units in the first hidden layer of actor and critic"""
    second_width: Width = 32
    """units in the second hidden layer of actor and critic"""

    @pydantic.model_validator(mode="after")
    def check_shapes(self):
        """Raise BadInput unless there is a whole rollout."""
        rows = self.num_envs * self.num_steps
        if rows > 10_000_000:
            raise BadInput(f"--num-envs x --num-steps is {rows}, a rollout may have 10,000,000 rows")
        if self.total_timesteps < rows:
            raise BadInput(f"--total-timesteps {self.total_timesteps} is less than one rollout of {rows}")
        return self


METRICS = (
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS",
    "losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/approx_kl",
    "losses/explained_variance", "bilevel/ihvp_residual", "bilevel/ihvp_norm", "bilevel/negative_curvature",
    "bilevel/direct_norm", "bilevel/correction_norm", "bilevel/multiplier", "bilevel/cosine",
    "bilevel/weight_mean", "bilevel/weight_std", "bilevel/inner_gradient_norm_before",
    "bilevel/inner_gradient_norm_after", "time/env", "time/policy", "time/update",
)  # fmt: skip


# ---- Environments (shared) ---------------------------------------------------------------------------
@contextlib.contextmanager
def task_errors(env_id: str):
    """Turn whatever a task raises while it is made into one sentence that says where: BadInput."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = [f for f in frames if not re.search("-packages|importlib", f.filename)][-1]
        text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        where = f" in {last.filename}, line {last.lineno}" if last.filename != __file__ else ""
        raise BadInput(f"--env-id {env_id!r} cannot be made: {text}{where}") from error


def leave_interrupts(env: gym.Env) -> gym.Env:
    """The environment; in a process of its own it ignores Ctrl-C, which is the training loop's to answer."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return env


def make_envs(args, seed: int) -> tuple[gym.vector.VectorEnv, gym.spaces.Box, gym.Space]:
    """The parallel environments of `args`, and the spaces of one: observations, a flat Box, and actions.

    They reset on the step after an episode's end (Gymnasium's NEXT_STEP mode), so that one loop serves all
    backends: at the end of an episode `step` returns its true final observation; the next `step` ignores
    the action and returns the first observation of the new episode with reward 0. Raises BadInput if the
    task is unknown or cannot be used.
    """
    try:
        import envpool

        has_envpool = args.env_id in envpool.list_all_envs()
    except ImportError:  # no wheel for this platform: Gymnasium serves
        has_envpool = False
    if args.env_backend == "envpool" and not has_envpool:
        raise BadInput(f"--env-backend envpool does not have {args.env_id!r} here; use sync or async")
    kwargs = json.loads(args.env_kwargs)
    with task_errors(args.env_id), warnings.catch_warnings(action="ignore"):
        if has_envpool and args.env_backend in ("auto", "envpool"):
            cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else range(os.cpu_count())
            threads = args.env_threads or min(len(cores), args.num_envs)
            # Pinned threads take a quarter to a third less time a step. They are pinned only where they
            # fill all the cores of this process, so that several small runs never crowd on the same ones.
            pinned = threads >= len(cores) == cores[-1] - cores[0] + 1
            kwargs = {"num_threads": threads, "thread_affinity_offset": cores[0] if pinned else -1} | kwargs
            given = {"num_envs": args.num_envs, "batch_size": args.num_envs, "seed": seed}  # ours alone
            envs = envpool.make_gymnasium(args.env_id, **given, **kwargs)
            observation_space, action_space = envs.observation_space, envs.action_space
        else:
            mode = "async" if args.env_backend == "async" else "sync"
            envs = gym.make_vec(args.env_id, args.num_envs, mode, wrappers=[leave_interrupts], **kwargs)
            if len(envs.single_observation_space.shape or ()) != 1:
                envs = gym.wrappers.vector.FlattenObservation(envs)
            envs.reset(seed=seed)
            envs.step(envs.action_space.sample())  # what the task refuses shows here
            envs.reset(seed=seed)
            observation_space, action_space = envs.single_observation_space, envs.single_action_space
    flat = isinstance(observation_space, gym.spaces.Box) and len(observation_space.shape) == 1
    if not flat or not observation_space.shape[0]:
        observations = f"observation space {observation_space}; this script needs a flat Box"
        raise BadInput(f"--env-id {args.env_id!r} has the {observations}")
    check_action_space(args.env_id, action_space)
    return envs, observation_space, action_space


# ---- Policy and critic (shared) ----------------------------------------------------------------------
def mlp(inputs: int, first_width: int, second_width: int, outputs: int) -> nn.Sequential:
    """Two tanh layers with PyTorch's initial weights, as in Spinning Up, which the authors build on."""
    hidden = nn.Linear(inputs, first_width), nn.Tanh(), nn.Linear(first_width, second_width), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(second_width, outputs))


class Agent(nn.Module):
    """A critic, and an actor of its own: the softmax of its logits if the task is discrete, otherwise a
    Gaussian with a state-independent log standard deviation, at first -0.5.

    The networks may be any modules from observations (..., D) to one value (..., 1) and to the logits or the
    mean action (..., A). Called with observations, the agent is the policy as it is played.
    """

    def __init__(self, obs_dim: int, action_dim: int, discrete: bool, first_width: int, second_width: int):
        super().__init__()
        self.actor = mlp(obs_dim, first_width, second_width, action_dim)
        self.critic = mlp(obs_dim, first_width, second_width, 1)
        self.discrete, self.action_dim = discrete, action_dim
        # The number of the task's first action, or its action box.
        if discrete:
            self.register_buffer("first_action", torch.zeros((), dtype=torch.int64))
        else:
            self.actor_logstd = nn.Parameter(torch.full((action_dim,), -0.5))
            self.register_buffer("action_low", torch.full((action_dim,), -math.inf))
            self.register_buffer("action_high", torch.full((action_dim,), math.inf))

    def set_action_space(self, space: gym.spaces.Discrete | gym.spaces.Box) -> None:
        """Keep the number of the task's first action, or its action box."""
        if self.discrete:
            self.first_action.fill_(int(space.start))
        else:
            self.action_low.copy_(torch.as_tensor(space.low))
            self.action_high.copy_(torch.as_tensor(space.high))

    def actor_parameters(self) -> list[nn.Parameter]:
        """theta: the weights of the actor and the log standard deviation."""
        return [*self.actor.parameters(), *([] if self.discrete else [self.actor_logstd])]

    def noise(self, *shape: int) -> Tensor:
        """The noise (*shape, A) of the actions of a whole rollout: standard Gumbel, or Gaussian."""
        if self.discrete:
            return -torch.empty(*shape, self.action_dim).exponential_().log_()
        return torch.randn(*shape, self.action_dim) * self.actor_logstd.exp()

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions, numbered from 0 (...) or unclipped (..., A), at obs (..., D) with that noise (..., A). The
        largest sum of logit and Gumbel noise is a sample of the softmax (Maddison et al. 2014)."""
        noisy = self.actor(obs) + noise
        return noisy.argmax(-1) if self.discrete else noisy

    def logprob_and_entropy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) of actions as `sample` gives them at obs (..., D); the entropy in nats; both (...)."""
        if self.discrete:
            logprobs = self.actor(obs).log_softmax(-1)
            return logprobs.gather(-1, actions[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)
        noise = (actions - self.actor(obs)) * torch.exp(-self.actor_logstd)
        logprob = -0.5 * (noise * noise).sum(-1) - (self.actor_logstd + 0.5 * math.log(2 * math.pi)).sum()
        entropy = (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return logprob, entropy.expand_as(logprob)

    def task_actions(self, actions: Tensor) -> Tensor:
        """The policy's actions as the task takes them: counted from its first one, or clipped to its box."""
        if self.discrete:
            return actions + self.first_action
        return actions.clamp(self.action_low, self.action_high)

    def forward(self, obs: Tensor) -> Tensor:
        """The policy as it is played: observations (..., D) -> the task's most probable actions (...), or
        mean actions in its box (..., A)."""
        output = self.actor(torch.as_tensor(obs).float())
        return self.task_actions(output.argmax(-1) if self.discrete else output)


def check_action_space(env_id: str, space: gym.Space) -> None:
    """Raise BadInput unless the actions are numbered, or vectors of numbers in a box that is not empty."""
    box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    usable = box and space.shape[0] and (space.low < space.high).all()
    if not usable and not isinstance(space, gym.spaces.Discrete):
        needs = "this script needs a Discrete one or a flat Box of floats with low < high"
        raise BadInput(f"--env-id {env_id!r} has the action space {space}; {needs}")


# ---- Actor-critic mathematics (shared) ---------------------------------------------------------------
def gae(rewards: Tensor, values: Tensor, discounts: Tensor, decay: Tensor) -> Tensor:
    """Generalised advantage estimates A (T, N) of a rollout (Schulman et al. 2016, eq. 16).

    delta_t = r_t + discount_t V_{t+1} - V_t and A_t = delta_t + decay_t A_{t+1}, with rewards, discounts =
    gamma (1 - terminated) and decay = gamma lambda (1 - ended) (T, N), ended = terminated or truncated, and
    values (T+1, N). The row after an ended one is a reset: its own A means nothing, and no other A depends
    on it (but for V_{t+1} of a truncated row t).
    """
    advantages = rewards + discounts * values[1:] - values[:-1]
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """The follower's objective L = mean (V - G)^2: values, returns (n,). No factor 1/2, as in the paper."""
    return ((values - returns) ** 2).mean()


def policy_objective(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """mean_k w_k A_k log pi_k, all (n,): its gradient in theta is the policy gradient with the weights w.

    Those of `discount_weights` give grad_theta J, times those of `trajectory_weights` the total derivative.
    """
    return (weights * advantages * logprobs).mean()


# ---- STAC mathematics (shared) -----------------------------------------------------------------------
def episode_starts(valid: Tensor) -> Tensor:
    """The row of a rollout in which the trajectory of each row began: valid (T, N) as 0/1 floats -> (T, N).

    The row after an episode's end is no transition (valid 0); the row after that, like row 0, begins one.
    """
    step = torch.arange(len(valid), device=valid.device)[:, None].expand(valid.shape)
    begins = torch.ones_like(valid)
    begins[1:] = 1 - valid[:-1]
    return torch.where(begins.bool(), step, 0).cummax(0).values


def discount_weights(starts: Tensor, gamma: float) -> Tensor:
    """gamma^t with t the step within the trajectory, in float64 (Proposition 1): starts from `episode_starts`
    (T, N) -> (T, N)."""
    step = torch.arange(len(starts), device=starts.device)[:, None]
    return gamma ** (step - starts).double()


def critic_values(critic: nn.Module, omega: Tensor, obs: Tensor) -> Tensor:
    """V(s) of a critic with the parameters omega (P,), in the order of `parameters()`: obs (n, D) -> (n,)."""
    parameters = dict(critic.named_parameters())
    parts = omega.split([parameter.numel() for parameter in parameters.values()])
    moved = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts)}
    return torch.func.functional_call(critic, moved, (obs,)).squeeze(-1)


def leader_states(which: str, obs: Tensor, discounts: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The states (n, D) whose values are in the leader's objective, and the factors (n,) of these values.

    obs (T+1, N, D), discounts = gamma (1 - terminated) and valid (T, N). `second`, the paper's: J is the mean
    over trajectories of r_i0 + gamma V(s_i1), without V after a termination (its J does not show the gamma).
    `all`, its code's: the mean of V over all visited states.
    """
    rows = valid.bool()
    if which == "all":
        states = obs[:-1][rows]
        return states, torch.ones_like(states[:, 0])
    step = torch.arange(len(valid), device=valid.device)[:, None]
    first = rows & (episode_starts(valid) == step)
    return obs[1:][first], discounts[first]


def mean_value(critic: nn.Module, omega: Tensor, states: Tensor, factors: Tensor) -> Tensor:
    """The part of the leader's objective that depends on omega (P,), whose gradient is b: the mean of factors
    (n,) times the values of states (n, D), both from `leader_states`."""
    return (factors * critic_values(critic, omega, states)).mean()


def directional_derivative(critic: nn.Module, omega: Tensor, obs: Tensor, x: Tensor) -> Tensor:
    """grad_omega V(s).x at omega (P,) along x (P,), in forward mode: obs (n, D) -> (n,)."""
    return torch.func.jvp(lambda omega: critic_values(critic, omega, obs), (omega,), (x,))[1]


def curvature(
    critic: nn.Module, omega: Tensor, obs: Tensor, returns: Tensor, gauss_newton: bool
) -> Callable[[Tensor], Tensor]:
    """The map v -> H v, (P,) -> (P,), of H = 2 mean_k [grad V_k grad V_k^T + (V_k - G_k) grad^2 V_k], the
    Hessian of `value_loss` in omega (P,) at obs (n, D) and returns (n,), or of its first part alone, which is
    positive semidefinite. The full product is forward over reverse mode (Pearlmutter 1994).
    """

    def values(omega: Tensor) -> Tensor:
        return critic_values(critic, omega, obs)

    if not gauss_newton:
        gradient = torch.func.grad(lambda omega: value_loss(values(omega), returns))
        return lambda v: torch.func.jvp(gradient, (omega,), (v,))[1]
    _, vjp = torch.func.vjp(values, omega)
    return lambda v: vjp(2 / len(obs) * torch.func.jvp(values, (omega,), (v,))[1])[0]


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-6
) -> tuple[Tensor, bool]:
    """x with A x = b, approximately, for a symmetric A given by `product`, and whether the guard stopped it.

    b, x (P,). Hestenes and Stiefel 1952, from x = 0. The method needs a positive definite A, and the Hessian
    of a network is not: at a direction p of curvature p.Ap <= 0, to rounding relative to the largest one met,
    or that is not finite, it keeps the x that it has (0 in the first iteration, which makes the leader's step
    the individual gradient). Without the guard such a step may turn the actor's direction round. Also stops
    once |b - A x| <= tolerance |b|, thus at b = 0.
    """
    x, residual, p = torch.zeros_like(b), b, b
    squared, target, largest = b @ b, tolerance**2 * (b @ b), 0.0
    for _ in range(iterations):
        if squared <= target:
            break
        image = product(p)
        rayleigh = (p @ image / (p @ p)).item()
        largest = max(largest, rayleigh)
        if not torch.finfo(b.dtype).eps * largest < rayleigh < math.inf:
            return x, True
        step = squared / (p @ image)
        x, residual = x + step * p, residual - step * image
        before, squared = squared, residual @ residual
        p = residual + squared / before * p
    return x, False


def trajectory_weights(starts: Tensor, slopes: Tensor) -> Tensor:
    """1 + 2 u_i for each row of trajectory i (Proposition 1 in closed form).

    starts (T, N) from `episode_starts`; slopes (T, N) holds grad V(s).x, of which only the rows that begin a
    trajectory are read -> (T, N). The step grad_theta J - (grad_theta,omega L) x has these weights, since
    (grad_theta,omega L) x = -2 mean u_i A grad log pi.
    """
    return 1 + 2 * slopes.gather(0, starts)


# ---- The run: what is not the algorithm (shared) -----------------------------------------------------
EPISODES = ("global_step", "wall_time_s", "env_index", "episodic_return", "episodic_length")


class Diverged(Exception):
    """One sentence: which numbers stopped being finite, and when; exit status 1."""


def say(text: str) -> None:
    """Print a line on stderr, above the progress bar. A reader that went away never changes a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file=sys.stderr)


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line as Args; with --resume the arguments of that run, of which those given again win.

    Raises BadInput; tyro itself exits with status 2 on words that it cannot parse.
    """
    saved, parser = None, argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    folder = parser.parse_known_args(argv)[0].resume
    if folder:
        try:
            made = json.loads((folder / "args.json").read_text())
            if made["script"] != Path(__file__).name:
                raise ValueError(f"it was made by {made['script']}")
            saved = Args(**made["args"] | {"resume": folder})
        except (OSError, ValueError, KeyError, TypeError, BadInput) as error:
            raise BadInput(f"--resume {folder} is not a run folder of this script: {error}") from error
    args = tyro.cli(Args, args=argv, default=saved, description=__doc__.split("\n\n")[0])
    for name, value in saved or ():
        if getattr(args, name) != value:
            say(f"--{name.replace('_', '-')} was {value} and is now {getattr(args, name)}")
    return args


def provenance() -> dict:
    """What makes a run: command, commit, versions."""
    packages = [name for name in ("torch", "numpy", "gymnasium", "envpool", "mujoco") if find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    words = "git describe --always --dirty --abbrev=40 --exclude=*"
    git = subprocess.run(words, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    versions |= {"python": sys.version.split()[0]}
    script, commit = Path(__file__).name, git.stdout.strip() or None
    return {"script": script, "argv": sys.argv, "commit": commit, "versions": versions}


def derived_seed(seed: int, step: int) -> int:
    """A seed for environments that start at `step` of the run with `seed`; `seed` itself at step 0."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) % 2**31 if step else seed


def write_atomically(path: Path, content: bytes | dict) -> None:
    """Replace `path` by bytes or by what torch saves: after a crash the old or the new content is there."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # a full disk should not stay full of half a file


class Run:
    """The run folder (docs/run_folder.md): arguments, csv files, TensorBoard, W&B, checkpoints, signals.

    A context manager: it holds the folder of a run to resume, and writes result.json at the end, whatever
    the end is. `open` writes to the folder for the first time. SIGINT and SIGTERM set `stop_signal`, which
    the loop reads at the end of its iteration; a second one, or one after training, stops at once.
    """

    def __init__(self, args: Args):
        self.args, self.folder, self.lock, self.checkpoint, self.wandb = args, args.resume, None, None, None
        self.global_step, self.wall_time, self.opened, self.result = 0, 0.0, False, {}
        self.returns, self.csv_lengths = [], [0, 0]  # of episodes, at their steps; of the csv files, in bytes
        self.stop_signal, self.trained, self.handlers, self.files = 0, False, {}, []
        self.end = args.total_timesteps - args.total_timesteps % (args.num_envs * args.num_steps)

    def __enter__(self):
        """Lock the folder of a run to resume, then read its checkpoint. Raises BadInput if it cannot."""
        if self.folder is None:
            return self
        if not (self.folder / "checkpoint.pt").exists():
            raise BadInput(f"--resume {self.folder} has no checkpoint.pt yet; start a new run")
        try:
            self.lock = filelock.FileLock(self.folder / ".lock").acquire(timeout=0).lock
            self.checkpoint = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            for name in ("global_step", "wall_time", "returns", "csv_lengths"):
                setattr(self, name, self.checkpoint[name])
        except filelock.Timeout:
            raise BadInput(f"--resume {self.folder} is still running in another process") from None
        except Exception as error:  # a damaged archive raises errors of many kinds
            reason = f"checkpoint.pt cannot be used: {type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(f"--resume {self.folder}: {reason}; start a new run") from error
        return self

    def open(self) -> None:
        """Make the folder, or go on in it, and start all logs. Raises BadInput if that is not possible."""
        args, resumed = self.args, self.checkpoint is not None
        try:
            if not resumed:
                name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
                self.folder = args.run_dir / re.sub(r"[/:\\\s]", "_", name)
                while self.folder.exists():  # a run of the same second
                    self.folder = self.folder.with_name(self.folder.name + "_")
            if args.track:
                self.start_wandb()
            if not resumed:
                self.folder.mkdir(parents=True)
                self.lock = filelock.FileLock(self.folder / ".lock").acquire(timeout=0).lock
            made = json.loads((self.folder / "args.json").read_text()) if resumed else provenance()
            saved = json.loads(args.model_dump_json(exclude={"resume"}))  # infinity as a string
            self.write_json("args.json", made | {"args": saved})
            self.metrics = self.open_csv("metrics.csv", METRICS)
            self.episodes = self.open_csv("episodes.csv", EPISODES)
            (self.folder / "result.json").unlink(missing_ok=True)  # left by the part before
        except OSError as error:
            if isinstance(error, FileExistsError) and self.folder.exists():
                return self.open()  # another run of the same second was faster
            raise BadInput(f"--run-dir: {error}; name another or make it writable") from error
        self.tensorboard = SummaryWriter(self.folder, purge_step=self.global_step + 1 if resumed else None)
        bar = {"total": args.total_timesteps, "initial": self.global_step, "unit": "step", "unit_scale": True}
        seconds = 0.1 if sys.stderr.isatty() else 10
        self.bar = tqdm(**bar, mininterval=seconds, delay=0.1)  # delay: nothing is printed here
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.on_signal)
        self.opened, self.started = True, time.perf_counter() - self.wall_time

    def start_wandb(self) -> None:
        """Send what TensorBoard gets to W&B as well; the parts of a run that was continued are one group."""
        names = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
        group = os.environ.get("WANDB_RUN_GROUP", self.folder.name)  # benchmark/ sets it: one a suite
        names |= {"group": group, "name": f"{self.folder.name}-{self.global_step}"}
        try:
            import wandb

            self.wandb = wandb.init(**names, config=self.args.model_dump(mode="json"), sync_tensorboard=True)
        except Exception as error:
            raise BadInput(f"--track: {error}; log in, set WANDB_MODE=offline or leave it out") from error

    def on_signal(self, number: int, frame) -> None:
        """Ask the loop to stop; at once if it was asked before or has ended."""
        at_once, self.stop_signal = self.stop_signal or self.trained, number
        if at_once:
            sys.exit(128 + number)

    def open_csv(self, name: str, columns: tuple[str, ...]) -> csv.DictWriter:
        """The csv file of that name, to append to, cut back to what it held at the checkpoint."""
        file = open(self.folder / name, "a", newline="")
        file.truncate(min(file.tell(), self.csv_lengths[len(self.files)]))
        self.files.append(file)
        writer = csv.DictWriter(file, columns)
        if not os.fstat(file.fileno()).st_size:
            writer.writeheader()
            file.flush()
        return writer

    def write_json(self, name: str, content: dict) -> None:
        """Write or replace a json file of the folder; nan and inf, which strict JSON lacks, become null."""
        strict = json.loads(json.dumps(content), parse_constant=lambda word: None)
        write_atomically(self.folder / name, (json.dumps(strict, indent=1) + "\n").encode())

    def log(self, global_step: int, metrics: dict[str, float | None], episodes: list[dict]) -> None:
        """One row of metrics.csv, the same scalars for TensorBoard, and the episodes that ended in this
        iteration; None is a number that does not exist."""
        self.global_step, self.wall_time = global_step, time.perf_counter() - self.started
        metrics |= {"global_step": global_step, "wall_time_s": self.wall_time}
        metrics["charts/SPS"] = global_step / self.wall_time
        for name in ("episodic_return", "episodic_length"):
            metrics[f"charts/{name}"] = float(np.mean([row[name] for row in episodes])) if episodes else None
        self.metrics.writerow(metrics)
        self.episodes.writerows(episodes)
        for file in self.files:
            file.flush()
        for name in METRICS[2:]:
            if metrics.get(name) is not None:
                self.tensorboard.add_scalar(name, metrics[name], global_step)
        self.returns += [(row["global_step"], row["episodic_return"]) for row in episodes]
        with contextlib.suppress(OSError, ValueError):
            recent = np.mean([value for _, value in self.returns[-20:]] or math.nan)
            self.bar.set_postfix_str(f"return {recent:.1f}", refresh=False)
            self.bar.update(global_step - self.bar.n)

    def save_checkpoint(self, state: dict) -> None:
        """Replace checkpoint.pt by `state`, the counters and torch's random state; the csv files reach the
        disk before."""
        for file in self.files:
            os.fsync(file.fileno())
        state |= {"global_step": self.global_step, "wall_time": self.wall_time, "returns": self.returns}
        state["csv_lengths"] = [os.fstat(file.fileno()).st_size for file in self.files]
        state["rng"] = torch.get_rng_state()
        write_atomically(self.folder / "checkpoint.pt", state)

    def __exit__(self, kind, error, trace) -> None:
        """Write result.json, last and atomically, and let go of everything."""
        if self.opened:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            status = "finished" if error is None else "failed"
            if isinstance(error, Diverged):
                status = "diverged"
            elif isinstance(error, SystemExit if self.stop_signal else KeyboardInterrupt):
                status = "interrupted"
            last = [value for step, value in self.returns if step > 0.9 * self.end]
            result = {"status": status, "global_step": self.global_step, "wall_time_s": self.wall_time}
            result |= {"final_return": float(np.mean(last or math.nan))}
            failed = status in ("failed", "diverged")
            result |= {"error": f"{kind.__name__}: {error}"} if failed else self.result
            for each in (self.bar, self.tensorboard, *self.files):
                with contextlib.suppress(OSError, ValueError):  # on a full disk or without a reader
                    each.close()
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                self.write_json("result.json", result)
            say(f"{status} at step {self.global_step:,}, return {result['final_return']:.1f}: {self.folder}")
            if status == "interrupted" and (self.folder / "checkpoint.pt").exists():
                say(f"continue with --resume {self.folder}")
            if self.wandb is not None:
                self.wandb.finish(exit_code=0 if error is None else 1)
        if self.lock is not None:
            self.lock.release()
        if self.opened and status == "failed" and isinstance(error, SystemExit):
            raise RuntimeError("the task tried to end the process") from error


def load_policy(path: str | Path) -> Agent:
    """The agent in a model.pt or a checkpoint.pt: called with raw observations (..., D), it gives the
    actions that are played, as the task takes them."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    agent = Agent(*saved["agent_sizes"])
    agent.load_state_dict(saved["agent"])
    return agent.eval().requires_grad_(False)


def play(agent: Agent, args, episodes: int, film_folder: Path | None = None) -> list[float]:
    """Undiscounted returns of episodes in Gymnasium, on seeds unlike the training's, at most 100,000 steps
    long; with a folder they are filmed, up to step 5,000. Raises BadInput if Gymnasium cannot make the
    task; with episodes=0 it only checks that."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    with task_errors(args.env_id), warnings.catch_warnings(action="ignore"):
        drawn = {"render_mode": "rgb_array"} if film_folder else {}
        env = gym.make(args.env_id, **json.loads(args.env_kwargs) | drawn)
        if film_folder:
            env = gym.wrappers.RecordVideo(env, str(film_folder), episode_trigger=lambda episode: True)
        env = gym.wrappers.TimeLimit(gym.wrappers.FlattenObservation(env), 5_000 if film_folder else 100_000)
    returns = [0.0] * episodes
    for episode in range(episodes):
        obs, _ = env.reset(seed=derived_seed(args.seed, 2**40 + episode))
        ended = False
        while not ended:
            with torch.no_grad():
                action = agent(obs).numpy()[()]
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += float(reward)
            ended = terminated or truncated
    env.close()
    return returns


# ---- STAC training: set-up (shared) ------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train, play and return the run folder. Raises BadInput before anything is created, and Diverged."""
    with Run(args) as run:
        checkpoint, start, batch_size = run.checkpoint, run.global_step, args.num_envs * args.num_steps
        if start % batch_size or start > args.total_timesteps:
            needs = "--total-timesteps must be at least that, and --num-envs x --num-steps must divide it"
            raise BadInput(f"--resume {args.resume} has made {start} steps: {needs}")
        torch.manual_seed(args.seed)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)  # networks this small lose more to a hand-over than they gain
        envs, observation_space, action_space = make_envs(args, derived_seed(args.seed, start))
        if args.eval_episodes or args.capture_video:
            play(None, args, episodes=0)
        obs_dim, action_dim = (gym.spaces.flatdim(space) for space in (observation_space, action_space))
        discrete = isinstance(action_space, gym.spaces.Discrete)
        agent_sizes = obs_dim, action_dim, discrete, args.first_width, args.second_width
        agent = Agent(*agent_sizes)
        agent.to(device).eval()  # acting and learning are one function of the weights: no dropout in either
        theta, omega = agent.actor_parameters(), list(agent.critic.parameters())
        if len(theta) + len(omega) != len(list(agent.parameters())):
            raise BadInput("every parameter of the agent must be one of the actor's or one of the critic's")
        kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.SGD
        optimisers = kind(theta, args.learning_rate, maximize=True), kind(omega, args.critic_learning_rate)
        actor_optimiser, critic_optimiser = optimisers
        if checkpoint:
            try:
                agent.load_state_dict(checkpoint["agent"])
                for each, state in zip(optimisers, checkpoint["optimisers"]):
                    # Not the step size, which may have been given again.
                    each.load_state_dict(each.state_dict() | {"state": state["state"]})
                torch.set_rng_state(checkpoint["rng"])  # all noise is drawn on the CPU
            except (RuntimeError, ValueError, KeyError) as error:
                wrong = "another version made it, or networks of another shape; leave out widths and task"
                raise BadInput(f"--resume {args.resume}: {wrong}") from error
        agent.set_action_space(action_space)

        # The rollout: arrays (time, environment, ...); row num_steps of obs is the last one's successor.
        shape = (args.num_steps, args.num_envs)
        obs = np.zeros((args.num_steps + 1, args.num_envs, obs_dim), dtype=np.float32)
        rewards, terminated, truncated, valid = (np.zeros(shape, dtype=np.float32) for _ in range(4))

        # ---- STAC training: collect a rollout (shared) -----------------------------------------------
        run.open()
        num_iterations = args.total_timesteps // batch_size
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            rollout_start, env_time, episodes = time.perf_counter(), 0.0, []
            # Every rollout begins with new episodes, so that every trajectory begins in an initial state.
            obs[0] = envs.reset()[0]
            ended = np.zeros(args.num_envs, dtype=bool)  # in the last step; the row after it is a reset
            episode_returns, episode_lengths = np.zeros((2, args.num_envs))
            behaviour = copy.deepcopy(agent).cpu()  # a CPU is faster than a GPU for a few rows
            noise, actions = behaviour.noise(*shape).detach(), []
            for t in range(args.num_steps):
                with torch.no_grad():
                    actions.append(behaviour.sample(torch.from_numpy(obs[t]), noise[t]))
                    task_actions = behaviour.task_actions(actions[t]).numpy()
                env_start = time.perf_counter()
                obs[t + 1], reward, ends, cut, _ = envs.step(task_actions)
                env_time += time.perf_counter() - env_start
                transition, ended = ~ended, ends | cut
                terminated[t], truncated[t], valid[t] = ends, cut, transition
                reward = np.where(transition, reward, 0.0)
                rewards[t] = reward
                episode_returns += reward
                episode_lengths += transition
                for index in ended.nonzero()[0].tolist():
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    seconds, length = time.perf_counter() - run.started, int(episode_lengths[index])
                    episode = step, seconds, index, float(episode_returns[index]), length
                    episodes.append(dict(zip(EPISODES, episode)))
                    episode_returns[index] = episode_lengths[index] = 0

            # ---- STAC training: advantages and targets (shared) --------------------------------------
            update_start = time.perf_counter()
            ending = np.maximum(terminated, truncated)
            discounts = args.gamma * (1 - (terminated if args.bootstrap_truncation else ending))
            arrays = obs, rewards, discounts, ending, valid
            b_obs, b_rewards, b_discounts, b_ended, b_valid = (torch.tensor(x, device=device) for x in arrays)
            with torch.no_grad():
                values = agent.critic(b_obs).squeeze(-1)
            decay = args.gamma * (1 - b_ended)
            all_advantages = gae(b_rewards, values, b_discounts, args.gae_lambda * decay)
            all_returns = gae(b_rewards, values, b_discounts, decay) + values[:-1]  # Monte Carlo
            rows = b_valid.flatten().nonzero().squeeze(-1)  # transitions; a reset is none
            arrays = b_obs[:-1], torch.stack(actions).to(device), all_advantages, all_returns
            states, b_actions, advantages, returns = (array.flatten(0, 1)[rows] for array in arrays)
            if args.norm_adv and len(rows) > 1:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            starts = episode_starts(b_valid)
            gamma = args.gamma if args.discount_gradient else 1.0
            base = discount_weights(starts, gamma).float().flatten()[rows]

            # ---- Leader: the weight of each trajectory (Proposition 1) -------------------------------
            weights, bilevel = torch.ones_like(returns), {}
            if args.stackelberg and args.regularisation < math.inf:
                point = nn.utils.parameters_to_vector(omega).detach()
                leading = leader_states(args.leader_states, b_obs, b_discounts, b_valid)
                b = torch.func.grad(mean_value, argnums=1)(agent.critic, point, *leading)
                hessian = curvature(agent.critic, point, states, returns, args.hessian == "gauss-newton")

                def damped(v: Tensor) -> Tensor:
                    return hessian(v) + args.regularisation * v

                x, stopped = conjugate_gradient(damped, b, args.cg_iterations)
                slopes = directional_derivative(agent.critic, point, b_obs[:-1].flatten(0, 1), x).view(shape)
                weights = trajectory_weights(starts, slopes).flatten()[rows]
                if not weights.isfinite().all():  # this step falls back to AC's
                    weights, stopped = torch.ones_like(returns), True
                bilevel["ihvp_residual"] = (damped(x) - b).norm() / b.norm()
                bilevel["ihvp_norm"] = x.norm()
                bilevel["negative_curvature"] = float(stopped)

            # ---- Leader: one step --------------------------------------------------------------------
            logprobs, entropy = agent.logprob_and_entropy(states, b_actions)
            objective = policy_objective(logprobs, advantages, base)
            direct = torch.autograd.grad(objective, theta, retain_graph=True)
            total = torch.autograd.grad(policy_objective(logprobs, advantages, base * weights), theta)
            for parameter, gradient in zip(theta, total):
                parameter.grad = gradient
            actor_optimiser.step()
            with torch.no_grad():
                logratio = agent.logprob_and_entropy(states, b_actions)[0] - logprobs

            # ---- Follower: m steps -------------------------------------------------------------------
            for step in range(args.critic_steps):
                critic_loss = value_loss(agent.critic(states).squeeze(-1), returns)
                gradients = torch.autograd.grad(critic_loss, omega)
                if step == 0:
                    first_loss, first_gradients = critic_loss.detach(), gradients
                for parameter, gradient in zip(omega, gradients):
                    parameter.grad = gradient
                critic_optimiser.step()

            # ---- STAC training: log (shared) ---------------------------------------------------------
            last_loss = value_loss(agent.critic(states).squeeze(-1), returns)
            last_gradients = torch.autograd.grad(last_loss, omega)
            direct, total = (torch.cat([gradient.flatten() for gradient in each]) for each in (direct, total))
            bilevel |= {
                "direct_norm": direct.norm(),
                "correction_norm": (total - direct).norm(),
                "multiplier": total.norm() / direct.norm(),
                "cosine": torch.cosine_similarity(total, direct, 0),
                "weight_mean": weights.mean(),
                "weight_std": weights.std(),
                "inner_gradient_norm_before": nn.utils.get_total_norm(first_gradients),
                "inner_gradient_norm_after": nn.utils.get_total_norm(last_gradients),
            }
            predictions = values[:-1].flatten()[rows]
            explained = float(1 - (returns - predictions).var() / returns.var())
            now = time.perf_counter()
            losses = {
                "losses/value_loss": first_loss.item(),
                "losses/policy_loss": -objective.item(),
                "losses/entropy": entropy.mean().item(),
                "losses/approx_kl": (logratio.exp() - 1 - logratio).mean().item(),
                "losses/explained_variance": explained if math.isfinite(explained) else None,
                "time/env": env_time,
                "time/policy": update_start - rollout_start - env_time,
                "time/update": now - update_start,
            }
            for name, number in bilevel.items():
                losses[f"bilevel/{name}"] = float(number) if math.isfinite(number) else None
            run.log(iteration * batch_size, losses, episodes)
            watched = {"observations": b_obs, "rewards": b_rewards}
            watched["losses"] = torch.stack([first_loss, objective])
            watched["weights"] = nn.utils.parameters_to_vector(agent.parameters())
            for name, numbers in watched.items():
                if not numbers.isfinite().all():
                    raise Diverged(f"the {name} stopped being finite by step {iteration * batch_size:,}")

            # ---- Training: checkpoint ----------------------------------------------------------------
            if iteration % args.checkpoint_every == 0 or iteration == num_iterations or run.stop_signal:
                state = {"agent_sizes": agent_sizes, "agent": agent.state_dict()}
                state["optimisers"] = [each.state_dict() for each in optimisers]
                run.save_checkpoint(state)
            if run.stop_signal:
                sys.exit(128 + run.stop_signal)

        # ---- Training: model, evaluation, film (shared) ----------------------------------------------
        run.trained = True
        envs.close()
        agent.cpu()
        if args.save_model:
            model = {"script": Path(__file__).name, "env_id": args.env_id, "agent_sizes": agent_sizes}
            write_atomically(run.folder / "model.pt", model | {"agent": agent.state_dict()})
        if args.capture_video:
            try:
                play(agent, args, 1, run.folder / "videos")
            except Exception as error:  # as where nothing can draw
                say(f"no film, the run is complete: {error}; for MuJoCo set MUJOCO_GL to egl or osmesa")
        if args.eval_episodes:
            run.result["eval_returns"] = play(agent, args, args.eval_episodes)
            say(f"mean return of {args.eval_episodes} episodes: {np.mean(run.result['eval_returns']):.1f}")
    return run.folder


# ---- Entry point (shared) ----------------------------------------------------------------------------
if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where a task of the user's own may lie
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if it is closed
    try:
        train(parse_args())
    except (BadInput, Diverged) as error:
        say(f"error: {error}")
        sys.exit(2 if isinstance(error, BadInput) else 1)
