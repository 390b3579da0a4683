"""AC and STAC: Stackelberg actor-critic (Zheng et al. 2022, arXiv:2109.12286), on-policy, the actor leads.

(Not self-tuning actor-critic, Zahavy et al. 2020, which has the same four letters.)

The actor theta anticipates how the critic omega responds to it. With the follower's loss L = mean_k (V_omega(s_k) - G_k)^2
and the leader's objective J, Algorithm 2 climbs the total derivative of J:

    theta  <-  theta + lr (d_theta J - (d_theta d_omega L) x),     (d2_omega L + lambda I) x = d_omega J     eq. (15), Prop. 2
    omega  <-  omega - critic_lr d_omega L,   m times                                                      -> value_loss

    d_theta J            = d_theta mean_{i,t} A_it log pi(a_it|s_it),  A by GAE                            -> gae
    b = d_omega J        = d_omega mean_k V_omega(s_k)                                                     -> mean_value
    H v                    full, or Gauss-Newton: 2 mean_k dV_k dV_k^T v                                   -> curvature
    x                      by conjugate gradient, stopped at negative curvature                            -> conjugate_gradient
    (d_theta d_omega L) x  = -2 mean_{i,t} (dV(s_i0).x) A_it d_theta log pi(a_it|s_it)                     Proposition 1

In Proposition 1 the critic enters through V_omega(s_i0) alone, s_i0 the first state of trajectory i. So the step is the
policy gradient with **each trajectory's advantages multiplied by 1 + 2 u_i, u_i = dV(s_i0).x**  -> trajectory_weights,
policy_objective: one forward-mode derivative of the critic, one backward pass of the actor, nothing of second order in theta.
`--no-stackelberg` is AC, the baseline: all weights are 1.

Where the paper leaves something open, the authors' code decides: b and H over all visited states, no gamma^t in the actor's
gradient (`--discount-gradient` puts it in), standardised advantages. Unlike theirs, the solve is guarded and each
trajectory has a weight of its own; the released step is a multiple of AC's. docs/stackelberg.md says what follows from that.

    python stac.py --env-id CartPole-v0 --critic-steps 80
"""

# ---- Imports (shared) ------------------------------------------------------------------------------------------
import ast
import contextlib
import csv
import ctypes
import difflib
import functools
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import threadpoolctl
import torch
import torch.nn as nn
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import envpool
except ImportError:  # no wheel for this platform: Gymnasium serves
    envpool = None


# ---- Arguments -------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """Every number must lie in the interval that its line states."""

    exp_name: str | None = None
    """name of the experiment; default: the name of this file"""
    seed: int = 1
    """seed of the environments, the initial weights and the actions, in [0, 2147483647]"""
    torch_deterministic: bool = True
    """ask cuDNN for deterministic kernels (on a CPU a run repeats bitwise, on CPUs of the same kind)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    run_dir: Path = Path("runs")
    """the run's own folder is created in this one: {run_dir}/{env_id}__{exp_name}__{seed}__{time}"""
    resume: Path | None = None
    """continue the run in this folder, with its arguments, from its last checkpoint"""
    checkpoint_every: int = 50
    """iterations between two checkpoints, in [1, inf)"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "bilevel-actor-critic"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team"""
    save_model: bool = False
    """write model.pt (weights) at the end"""
    eval_episodes: int = 0
    """episodes played with the mean or likeliest action after training, in [0, 10000]"""
    capture_video: bool = False
    """film one such episode through Gymnasium (MuJoCo needs EGL, or MUJOCO_GL=osmesa)"""

    # Algorithm
    env_id: str = "CartPole-v0"
    """any task with Discrete or Box actions; also namespace/Name-v0 and module:Name-v0"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """who steps the environments; auto: EnvPool where it has the task"""
    env_threads: int = 0
    """EnvPool threads, in [0, 1024]; 0: one for each usable core, at most num_envs"""
    total_timesteps: int = 800000
    """environment steps in all, in [1, inf); rounded down to whole rollouts"""
    num_envs: int = 4
    """parallel environments, in [1, 65536]"""
    num_steps: int = 1000
    """steps of each environment in a rollout, in [2, inf); num_envs x num_steps = 4000 in the paper"""
    stackelberg: bool = True
    """STAC: the actor climbs its total derivative; otherwise AC: its partial derivative"""
    learning_rate: float = 0.1
    """step size of the actor's plain gradient steps, in (0, inf); the paper gives none, this is the authors' for CartPole"""
    critic_learning_rate: float = 0.01
    """step size of the critic's plain gradient steps, in (0, inf); the authors' for CartPole"""
    critic_steps: int = 1
    """m, critic steps after each actor step, in [1, 1000000]; the paper compares 1 and 80"""
    regularisation: float = 0.0
    """lambda, added to the critic's Hessian, in [0, inf]; the paper: 0 for CartPole, 500 for continuous control; inf: AC"""
    hessian: Literal["full", "gauss-newton"] = "full"
    """the critic's Hessian as in the paper, or its positive semidefinite part"""
    cg_iterations: int = 10
    """iterations of conjugate gradient, in [1, 10000]; 10 in the paper"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.97
    """lambda of the advantages, in [0, 1]; the critic's targets are Monte Carlo returns (lambda = 1)"""
    norm_adv: bool = True
    """normalise the advantages over the rollout"""
    discount_gradient: bool = False
    """weigh step t of a trajectory by gamma^t, as in the paper's theorems; its code does not"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it is a termination, as below 1000 steps in the paper's code"""
    first_width: int = 64
    """units in the first hidden layer of actor and critic, in [1, 65536]"""
    second_width: int = 32
    """units in the second hidden layer of actor and critic, in [1, 65536]"""


# ---- Environments ----------------------------------------------------------------------------------------------
def make_envs(
    env_id: str, num_envs: int, seed: int, backend: str = "auto", threads: int = 1
) -> tuple[gym.vector.VectorEnv, gym.spaces.Box, gym.spaces.Box | gym.spaces.Discrete]:
    """Parallel environments that reset on the step after an episode's end (Gymnasium's NEXT_STEP mode).

    That mode lets one loop serve both backends: at the end of an episode `step` returns its true final observation;
    the next `step` ignores the action and returns the first observation of the new episode with reward 0.

    Returns the environments, already seeded, and the observation and action space of a single one: a flat Box,
    and a flat Box or Discrete. Raises BadInput if the task is unknown, cannot be made, or has other actions.
    """
    has_envpool = envpool is not None and env_id in envpool.list_all_envs()
    if backend == "envpool" and not has_envpool:
        reason = "is not installed" if envpool is None else f"does not have {env_id!r}"
        raise BadInput(f"--env-backend envpool: EnvPool {reason}; use --env-backend gymnasium")
    if backend != "gymnasium" and has_envpool:
        with warnings.catch_warnings():  # of float64 boxes that become float32
            warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)
            envs = envpool.make(
                env_id, env_type="gymnasium", num_envs=num_envs, seed=seed, num_threads=threads,
                thread_affinity_offset=first_core(threads),
            )  # fmt: skip
            observation_space, action_space = envs.observation_space, envs.action_space
    else:
        try:
            envs = gym.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync")
        except (gym.error.Error, ImportError, ValueError, TypeError, AttributeError, OSError) as error:
            known = sorted({*gym.registry, *(envpool.list_all_envs() if envpool is not None else [])} - {env_id})
            near = difflib.get_close_matches(env_id, known, n=3)
            hint = f"; the nearest known names are {', '.join(near)}" if near else ""
            if ":" in env_id and isinstance(error, ImportError):
                hint = f"; a module must lie beside {SCRIPT} or in a folder of PYTHONPATH"
            raise BadInput(f"--env-id {env_id!r} cannot be made: {first_sentence(error)}{hint}") from error
        if not isinstance(envs.single_observation_space, gym.spaces.Box) or len(envs.single_observation_space.shape) != 1:
            envs = gym.wrappers.vector.FlattenObservation(envs)
        envs.reset(seed=seed)
        observation_space, action_space = envs.single_observation_space, envs.single_action_space
    flat_box = isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1
    if not (flat_box or isinstance(action_space, gym.spaces.Discrete)):
        raise BadInput(f"--env-id {env_id!r} has the action space {action_space}; this script needs Discrete or a flat Box")
    if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 1:
        raise BadInput(f"--env-id {env_id!r} has the observation space {observation_space}; this script needs a flat Box")
    return envs, observation_space, action_space


def first_core(threads: int) -> int:
    """The core of EnvPool's first thread, the others following; -1: the system moves them about.

    Pinned threads take a quarter to a third less time a step where PyTorch works between the steps. They are pinned only
    if they fill all the cores that this process may use, so that several small runs never crowd on the same ones.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return cores[0] if cores and threads >= len(cores) == cores[-1] - cores[0] + 1 else -1


# ---- Networks --------------------------------------------------------------------------------------------------
class NumpyTanh(torch.autograd.Function):
    """tanh by numpy's vectorised kernel: torch.tanh takes five times as long, longer than a layer's matrix product.

    The backward pass is torch.tanh's own.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """x of any shape -> tanh(x), in the memory of x."""
        np.tanh(x.numpy(), out=x.numpy())
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        """The slope times 1 - tanh(x)^2."""
        return torch.ops.aten.tanh_backward(slope, *ctx.saved_tensors)


class Tanh(nn.Module):
    """tanh, element by element: `NumpyTanh` on the CPU, torch.tanh elsewhere and under the transforms of torch.func."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> tanh(x); on the CPU x is overwritten, so nothing else may use it afterwards."""
        in_numpy = x.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
        return NumpyTanh.apply(x) if in_numpy else torch.tanh(x)


def mlp(inputs: int, widths: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Hidden tanh layers of these widths with PyTorch's initial weights, as in Spinning Up, which the paper builds on."""
    sizes, layers = (inputs, *widths), []
    for size, width in zip(sizes, widths):
        layers += [nn.Linear(size, width), Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def numpy_mlp(network: nn.Sequential) -> Callable[[np.ndarray], np.ndarray]:
    """The network as it is now, in numpy: x (n, inputs) -> (n, outputs). For the few rows of a step, PyTorch takes four
    times as long, and a GPU longer still."""
    parameters = [parameter.detach().cpu().numpy() for parameter in network.parameters()]
    *hidden, output = zip(parameters[::2], parameters[1::2])

    def forward(x: np.ndarray) -> np.ndarray:
        for weight, bias in hidden:
            x = np.tanh(x @ weight.T + bias)
        return x @ output[0].T + output[1]

    return forward


class Agent(nn.Module):
    """An actor, categorical or Gaussian with a state-independent log standard deviation (starts at -0.5), and a critic.

    action_dim: the number of Discrete actions, or the length of a Box action.
    """

    def __init__(self, obs_dim: int, action_dim: int, discrete: bool, first_width: int = 64, second_width: int = 32):
        super().__init__()
        self.discrete = discrete
        self.actor = mlp(obs_dim, (first_width, second_width), action_dim)  # logits, or the mean
        self.critic = mlp(obs_dim, (first_width, second_width), 1)
        if not discrete:
            self.actor_logstd = nn.Parameter(torch.full((action_dim,), -0.5))

    def actor_parameters(self) -> list[nn.Parameter]:
        """theta: the weights of the actor and, for Box actions, the log standard deviation."""
        return [*self.actor.parameters(), *([] if self.discrete else [self.actor_logstd])]

    def draw_noise(self, *shape: int) -> np.ndarray:
        """What `act` adds for `shape` actions (*shape, action_dim): Gumbel noise, or Gaussian noise with the actor's std."""
        if self.discrete:
            size = (*shape, self.actor[-1].out_features)
            return -torch.log(torch.empty(size).exponential_()).numpy()
        std = self.actor_logstd.detach().exp().cpu()
        return (torch.randn(*shape, len(std)) * std).numpy()

    def act(self, output: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions sampled from the actor's output (..., action_dim) by noise of that shape: indices (...) or (..., A).
        The largest of the logits plus Gumbel noise is a sample of the categorical distribution."""
        return (output + noise).argmax(-1) if self.discrete else output + noise

    def logprob(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) of actions (n,) or unclipped (n, A) at observations (n, D), and the entropy in nats: both (n,)."""
        output = self.actor(obs)
        if self.discrete:
            logprobs = output.log_softmax(-1)
            entropy = -(logprobs * logprobs.exp()).sum(-1)
            return logprobs.gather(-1, actions[:, None]).squeeze(-1), entropy
        noise = (actions - output) * torch.exp(-self.actor_logstd)
        return gaussian_logprob(noise, self.actor_logstd), gaussian_entropy(self.actor_logstd).expand(len(obs))


def gaussian_logprob(noise: Tensor, logstd: Tensor) -> Tensor:
    """log N(mean + std * noise; mean, std) of a diagonal Gaussian: noise (..., A), logstd (A,) -> (...)."""
    return -0.5 * (noise * noise).sum(-1) - (logstd + 0.5 * math.log(2 * math.pi)).sum()


def gaussian_entropy(logstd: Tensor) -> Tensor:
    """Entropy in nats of a diagonal Gaussian: logstd (A,) -> scalar."""
    return (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()


# ---- Actor-critic mathematics ----------------------------------------------------------------------------------
def gae(rewards: Tensor, values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16) of a rollout.

    rewards, terminated, ended (T, N) with flags as 0/1 floats, ended = terminated or truncated; values (T+1, N).
    delta_t = r_t + gamma (1 - terminated_t) V_{t+1} - V_t and A_t = delta_t + gamma lambda (1 - ended_t) A_{t+1}.
    Returns A (T, N). The row after an ended one is a reset: its own A means nothing, and no other A depends on it
    (but for V_{t+1} of a truncated row t).

    The recursion is solved by doubling: after pass i, A_t holds its first 2^i terms. log2(T) tensor operations
    replace a loop of T.
    """
    advantages = rewards + gamma * (1 - terminated) * values[1:] - values[:-1]
    decay = gamma * gae_lambda * (1 - ended)
    span = 1
    while span < len(rewards):
        advantages[:-span] += decay[:-span] * advantages[span:]
        decay = decay[:-span] * decay[span:]
        span *= 2
        decay = torch.cat([decay, decay.new_zeros(len(rewards) - len(decay), *decay.shape[1:])])
    return advantages


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """The follower's objective L = mean (V - G)^2: values, returns (n,) -> scalar. No factor 1/2, as in the paper."""
    return ((values - returns) ** 2).mean()


def policy_objective(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """mean_k w_k A_k log pi_k, all (n,) -> scalar. Its gradient in theta is the policy gradient with weights w: those of
    `discount_weights` give d_theta J, times those of `trajectory_weights` the total derivative."""
    return (weights * advantages * logprobs).mean()


# ---- Stackelberg mathematics -----------------------------------------------------------------------------------
def episode_starts(valid: Tensor) -> Tensor:
    """The row of a rollout in which the trajectory of each row began: valid (T, N) as 0/1 floats -> (T, N) long.

    The row after an episode's end is no transition (valid 0); the row after that, like row 0, begins a trajectory.
    """
    step = torch.arange(len(valid), device=valid.device)[:, None].expand(valid.shape)
    begins = torch.ones_like(valid)
    begins[1:] = 1 - valid[:-1]
    return torch.where(begins.bool(), step, 0).cummax(0).values


def discount_weights(starts: Tensor, gamma: float) -> Tensor:
    """gamma^t with t the step within the trajectory, in float64, from `episode_starts` (T, N) -> (T, N). Proposition 1."""
    step = torch.arange(len(starts), device=starts.device)[:, None]
    return gamma ** (step - starts).double()


def critic_values(critic: nn.Module, omega: Tensor, obs: Tensor) -> Tensor:
    """V(s) of a critic with the flat parameters omega (P,), in the order of `parameters()`: obs (n, D) -> (n,)."""
    parameters, start = {}, 0
    for name, parameter in critic.named_parameters():
        end = start + parameter.numel()
        parameters[name], start = omega[start:end].view_as(parameter), end
    return torch.func.functional_call(critic, parameters, (obs,)).squeeze(-1)


def mean_value(critic: nn.Module, omega: Tensor, obs: Tensor) -> Tensor:
    """The part of the leader's objective that depends on omega (P,), the mean value of obs (n, D): scalar. b is its
    gradient. The paper takes the second states of the trajectories, its code all visited states; this is the code's."""
    return critic_values(critic, omega, obs).mean()


def directional_derivative(critic: nn.Module, omega: Tensor, obs: Tensor, x: Tensor) -> Tensor:
    """dV(s).x, the derivative of the values in omega (P,) along x (P,), in forward mode: obs (n, D) -> (n,)."""
    return torch.func.jvp(lambda omega: critic_values(critic, omega, obs), (omega,), (x,))[1]


def curvature(
    critic: nn.Module, omega: Tensor, obs: Tensor, returns: Tensor, gauss_newton: bool
) -> Callable[[Tensor], Tensor]:
    """The map v -> H v, (P,) -> (P,), with H = 2 mean_k [dV_k dV_k^T + (V_k - G_k) d2V_k], the Hessian of `value_loss` in
    omega (P,) at obs (n, D) and returns (n,), or its first, positive semidefinite part.

    The full product is forward over reverse mode (Pearlmutter 1994); H is never formed.
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

    b, x (P,). Hestenes and Stiefel 1952, from x = 0. The method needs a positive definite A, and the Hessian of a network
    is not: at a direction p of curvature p.Ap <= 0, to rounding relative to the largest one met, or that is not finite, it
    keeps the x that it has (0 in the first iteration, which makes the leader's step the individual gradient). Without
    the guard such a step may turn the actor's direction round. Also stops once |b - A x| <= tolerance |b|, thus at b = 0.
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

    starts (T, N) from `episode_starts`; slopes (T, N) holds dV(s).x, of which only the rows that begin a trajectory are
    read -> (T, N). From (d_theta d_omega L) x = -2 mean u_i A d_theta log pi and the step d_theta J - (d_theta d_omega L) x.
    """
    return 1 + 2 * slopes.gather(0, starts)


# ---- The run: what is not the algorithm ------------------------------------------------------------------------
SCRIPT = Path(__file__).name
ANY_TIME = {"resume", "track", "wandb_project_name", "wandb_entity", "save_model", "eval_episodes", "capture_video"}
ANY_TIME |= {"checkpoint_every", "env_threads"}  # arguments that --resume may change: they leave the result as it is


class BadInput(Exception):
    """One sentence that names the argument, what is wrong and what would be right; printed, exit status 2."""


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's text, without its full stop."""
    return re.split(r"[.?!]\s|\n", str(error))[0].rstrip(".")


def check_ranges(args) -> None:
    """Raise BadInput for the first number of `args` outside the interval that its line in Args states."""
    body = ast.parse(textwrap.dedent(inspect.getsource(type(args)))).body[0].body
    for field, doc in zip(body, body[1:]):
        if not isinstance(field, ast.AnnAssign) or not isinstance(doc, ast.Expr):
            continue
        interval = re.search(r"in ([\[(])([^\s,]+), ([^\s,]+)([\])])", doc.value.value)
        value = getattr(args, field.target.id)
        if interval is None or value is None:
            continue
        left, low, high, right = interval.groups()
        above = value >= float(low) if left == "[" else value > float(low)
        below = value <= float(high) if right == "]" else value < float(high)
        if not (above and below):
            raise BadInput(f"--{field.target.id.replace('_', '-')} is {value}, it must be {interval.group()}")


def parse_args(cls, argv: list[str] | None = None):
    """The command line as an instance of `cls`, checked. With --resume, the arguments of that run; one given again
    must agree unless it is in ANY_TIME. Raises BadInput; tyro itself exits with status 2 on words it cannot parse."""
    args = tyro.cli(cls, args=argv, description=inspect.getmodule(cls).__doc__)
    if args.resume is not None:
        try:
            saved = json.loads((args.resume / "args.json").read_text())
            result = args.resume / "result.json"
            finished = result.exists() and json.loads(result.read_text())["status"] == "finished"
            made_by, old = saved["script"], dict(saved["args"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"--resume {args.resume} is not a run folder: {error}") from error
        if made_by != SCRIPT:
            raise BadInput(f"--resume {args.resume} is a run of {made_by}, not of {SCRIPT}")
        if finished:
            raise BadInput(f"--resume {args.resume} has nothing left to do: that run has finished")
        known = {field.name: field.type for field in fields(cls)}
        old = {name: value for name, value in old.items() if name in known}
        old |= {name: Path(value) for name, value in old.items() if "Path" in str(known[name]) and value is not None}
        args = tyro.cli(cls, args=argv, default=cls(**old | {"resume": None}))
        if args.device == "auto":
            args.device = old.get("device", "auto")
        for name in known.keys() - ANY_TIME - {"run_dir", "device"}:
            if getattr(args, name) != old.get(name, getattr(args, name)):
                raise BadInput(
                    f"--{name.replace('_', '-')} is {getattr(args, name)}, but the run to --resume has {old[name]}; "
                    "leave it out or start a new run"
                )
    check_ranges(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise BadInput("--track needs the package wandb: pip install wandb")
    args.exp_name = args.exp_name or Path(SCRIPT).stem
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.env_threads == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.env_threads = min(cores, args.num_envs)
    return args


def provenance() -> dict:
    """What made a run: command, commit, versions, machine."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        commit, dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "*.py"))
    except OSError:  # no git on this machine
        commit, dirty = None, None
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return {
        "script": SCRIPT,
        "argv": sys.argv,
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "gymnasium", "envpool", "mujoco")},
        "cpu": model.group(1) if model else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
    }


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write` puts into a new file: after a crash either the old or the new content is there."""
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:  # a full disk should not stay full of half a file
        new.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> Path:
    """Create `path`, or path_1, path_2, ... if it is taken: mkdir is atomic, so two runs never share a folder."""
    for copy in itertools.count():
        folder = path if copy == 0 else path.with_name(f"{path.name}_{copy}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def lock_folder(folder: Path) -> int | None:
    """Hold the run folder until this process ends or closes the descriptor that is returned; None where a file cannot be
    locked. Raises BadInput if another process holds it: two runs would cut and write the same files."""
    if importlib.util.find_spec("fcntl") is None:  # as on Windows
        return None
    fcntl, descriptor = importlib.import_module("fcntl"), os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except BlockingIOError as error:
        os.close(descriptor)
        raise BadInput(f"--resume {folder} is still running in another process; wait for it or stop it first") from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free. By default glibc gives blocks above 128 KiB back to the system, and
    the next minibatch pays page faults to get them again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def rng_state() -> dict:
    """The states of the random generators of python, numpy and torch, as tensors and numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """The inverse of `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(cuda_state, device)


def load_checkpoint(folder: Path) -> dict:
    """The checkpoint.pt of a run folder. Raises BadInput if it is missing, damaged or of another script."""
    try:
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise BadInput(f"--resume {folder}: its checkpoint.pt is one of {checkpoint['script']}, not of {SCRIPT}")
    except FileNotFoundError as error:
        raise BadInput(f"--resume {folder} has no checkpoint.pt yet, so it cannot continue; start a new run") from error
    except (BadInput, KeyboardInterrupt):
        raise
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise BadInput(f"--resume {folder}: its checkpoint.pt is truncated or damaged, so it cannot continue") from error
    return checkpoint


class Run:
    """The run folder (docs/run_folder.md): arguments, csv files, TensorBoard, W&B, checkpoints, signals, progress.

    A context manager: an exception inside is recorded in result.json as a failure. SIGINT and SIGTERM ask the loop to
    stop at the end of its iteration through `stop_signal`; a second one stops at once, as does the first after training.
    Raises BadInput if the folder cannot be written or another process writes it.
    """

    def __init__(self, args, checkpoint: dict | None):
        self.args, self.stop_signal, self.last_print, self.episodes = args, 0, 0.0, []
        self.trained, self.closed = False, False
        self.global_step = checkpoint["global_step"] if checkpoint else 0
        self.wall_time = checkpoint["wall_time"] if checkpoint else 0.0
        if checkpoint is None:
            name = re.sub(r"[/:\\\s]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
            try:
                args.run_dir.mkdir(parents=True, exist_ok=True)
                self.folder = make_folder(args.run_dir / name)
                saved = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
                self.write_json("args.json", {"args": saved} | provenance())
            except OSError as error:
                raise BadInput(f"--run-dir {args.run_dir} cannot be written: {error}; name another folder") from error
        else:
            self.folder = args.resume
        self.lock = lock_folder(self.folder)
        if checkpoint is not None:
            try:
                (self.folder / "result.json").unlink(missing_ok=True)  # of the part before
                for csv_name in ("metrics.csv", "episodes.csv"):
                    self.cut_csv(csv_name, self.global_step)
            except OSError as error:
                raise BadInput(f"--resume {args.resume} cannot be written: {error}; make it writable") from error
        self.wandb = None
        if args.track:
            import wandb

            try:  # W&B links the event file into its own folder; inside run_dir TensorBoard and W&B would read it again
                self.wandb = wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=self.folder.name,
                    dir=os.environ.get("WANDB_DIR") or self.folder.resolve().parent.parent,
                    id=re.sub(r"[^\w-]", "_", self.folder.name), resume="allow", config=asdict(args), sync_tensorboard=True,
                )  # fmt: skip
            except Exception as error:
                if checkpoint is None:
                    shutil.rmtree(self.folder)
                reason = first_sentence(error)
                raise BadInput(f"--track: W&B does not start: {reason}; log in, set WANDB_MODE=offline or leave it out") from error
        self.tensorboard = SummaryWriter(self.folder, purge_step=self.global_step + 1 if checkpoint else None)
        self.csv_files = {name: open(self.folder / name, "a", newline="") for name in ("metrics.csv", "episodes.csv")}
        if self.csv_files["episodes.csv"].tell() == 0:
            self.write_rows(
                "episodes.csv", [("global_step", "wall_time_s", "env_index", "episodic_return", "episodic_length")]
            )
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=args.total_timesteps, initial=self.global_step, unit="step", unit_scale=True)

    def __enter__(self):
        def ask_to_stop(number, frame):
            if self.stop_signal:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.stop_signal = number
            if self.trained and not self.closed:
                self.stop()

        self.handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.started = time.perf_counter() - self.wall_time
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error is not None and not isinstance(error, SystemExit):
            with contextlib.suppress(OSError):  # on a full disk the error itself is what counts
                self.close("failed", error=f"{kind.__name__}: {error}")
        if self.lock is not None:
            os.close(self.lock)

    def end_training(self) -> None:
        """The last checkpoint is that of the end: from here on a signal stops at once, and a resumed run goes on from here."""
        self.trained = True
        if self.stop_signal:
            self.stop()

    def stop(self) -> None:
        """End the program as the signal asks: interrupted, exit status 128 plus its number."""
        self.close("interrupted", signal=self.stop_signal)
        sys.exit(128 + self.stop_signal)

    def write_json(self, name: str, content: dict) -> None:
        """Write or replace a json file of the folder."""
        write_atomically(self.folder / name, lambda new: new.write_text(json.dumps(content, indent=1, default=str) + "\n"))

    def write_rows(self, name: str, rows: list) -> None:
        """Append rows to a csv file of the folder, past Python's buffer."""
        csv.writer(self.csv_files[name]).writerows(rows)
        self.csv_files[name].flush()

    def cut_csv(self, name: str, last_step: int) -> None:
        """Drop the rows after `last_step`, and a last line that a kill cut short."""
        path = self.folder / name
        header, *rows = [*csv.reader(path.read_text().splitlines() if path.exists() else [])] or [[]]
        rows = [row for row in rows if len(row) == len(header) and int(row[0]) <= last_step]
        if name == "episodes.csv":
            self.episodes = [(int(row[0]), float(row[3])) for row in rows]
        text = "".join(",".join(row) + "\r\n" for row in [header, *rows] if row)
        write_atomically(path, lambda new: new.write_text(text, newline=""))

    def log(self, global_step: int, metrics: dict[str, float], episodes: list[tuple]) -> None:
        """One row of metrics.csv, the same scalars for TensorBoard, and the episodes that ended in this iteration:
        (global_step, wall_time_s, env_index, return, length)."""
        self.global_step, self.wall_time = global_step, time.perf_counter() - self.started
        self.episodes += [(row[0], row[3]) for row in episodes]
        if episodes:
            self.write_rows("episodes.csv", episodes)
        returns, lengths = [row[3] for row in episodes], [row[4] for row in episodes]
        metrics = {
            "charts/episodic_return": float(np.mean(returns)) if returns else math.nan,
            "charts/episodic_length": float(np.mean(lengths)) if lengths else math.nan,
            "charts/SPS": global_step / self.wall_time,
        } | metrics
        if self.csv_files["metrics.csv"].tell() == 0:
            self.write_rows("metrics.csv", [("global_step", "wall_time_s", *metrics)])
        row = ["" if math.isnan(value) else value for value in metrics.values()]
        self.write_rows("metrics.csv", [(global_step, self.wall_time, *row)])
        for name, value in metrics.items():
            if not math.isnan(value):
                self.tensorboard.add_scalar(name, value, global_step)
        recent = np.mean([episode[1] for episode in self.episodes[-20:]]) if self.episodes else math.nan
        if self.bar is not None:
            self.bar.set_postfix_str(f"return {recent:.1f}", refresh=False)
            self.bar.update(global_step - self.bar.n)
        elif self.wall_time - self.last_print > 10:
            self.last_print = self.wall_time
            speed = metrics["charts/SPS"]
            print(f"{global_step:>10,} steps  return {recent:8.1f}  {speed:8,.0f} steps/s  {self.folder}", flush=True)

    def save_checkpoint(self, state: dict) -> None:
        """Replace checkpoint.pt by `state`, the counters and all random states; loads with weights_only=True."""
        self.tensorboard.flush()
        state |= {"script": SCRIPT, "global_step": self.global_step, "wall_time": self.wall_time, "rng": rng_state()}
        write_atomically(self.folder / "checkpoint.pt", lambda new: torch.save(state, new))

    def close(self, status: str, **extra) -> None:
        """Write result.json, last and atomically."""
        self.closed = True
        batch_size = self.args.num_envs * self.args.num_steps
        end = self.args.total_timesteps // batch_size * batch_size
        last = [value for step, value in self.episodes if step > 0.9 * end]
        for file in (*self.csv_files.values(), self.tensorboard):
            with contextlib.suppress(OSError):  # what a full disk has refused is refused again; the result may still fit
                file.close()
        if self.bar is not None:
            self.bar.close()
        result = {
            "status": status,
            "global_step": self.global_step,
            "wall_time_s": self.wall_time,
            "final_return": float(np.mean(last)) if last else None,
        }
        self.write_json("result.json", result | extra)
        mean = "" if result["final_return"] is None else f", final return {result['final_return']:.1f}"
        print(f"{status} after {self.global_step:,} steps{mean}: {self.folder}", flush=True)
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if status == "finished" else 1)


def load_policy(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """The trained policy in a model.pt: raw observations (..., D) -> the likeliest Discrete actions (...), or the mean Box
    actions (..., A), clipped to the action box."""
    model = torch.load(path, weights_only=True)
    agent = Agent(**model["shape"])
    agent.load_state_dict(model["agent"])

    def policy(obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            output = agent.actor(torch.as_tensor(obs, dtype=torch.float32))
        if agent.discrete:
            return output.numpy().argmax(-1) + model["action_start"]
        return output.clamp(model["action_low"], model["action_high"]).numpy()

    return policy


def evaluate(policy: Callable[[np.ndarray], np.ndarray], args, episodes: int) -> list[float]:
    """Undiscounted returns of one episode in each of `episodes` fresh environments (seeds unlike the training's).
    Where a task has no time limit, an episode counts up to its 100,000th step."""
    envs, *_ = make_envs(args.env_id, episodes, derived_seed(args.seed, 2**40), args.env_backend, args.env_threads)
    obs, _ = envs.reset()
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    for _ in range(100_000):
        if not running.any():
            break
        obs, rewards, terminated, truncated, _ = envs.step(policy(obs.astype(np.float32)))
        returns += np.where(running, rewards, 0.0)
        running &= ~(terminated | truncated)
    envs.close()
    return returns.tolist()


def film(env_id: str, model: Path | None, folder: Path, seed: int) -> None:
    """Film one episode, up to its 5,000th step, into `folder`; without a model, only draw one frame. For a child
    process: where no GL is, rendering may raise or kill."""
    if sys.platform == "linux":  # MuJoCo draws without a screen through EGL; elsewhere it refuses that word
        os.environ.setdefault("MUJOCO_GL", "egl")
    if model is None:  # the caller says in one sentence what failed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    env = gym.wrappers.FlattenObservation(gym.make(env_id, render_mode="rgb_array"))
    if model is not None:
        env = gym.wrappers.RecordVideo(env, str(folder), episode_trigger=lambda episode: True)
    obs, _ = env.reset(seed=seed)
    if model is None:
        env.render()
        os._exit(0)  # drivers may crash when they are unloaded
    policy = load_policy(model)
    for _ in range(5_000):
        obs, _, terminated, truncated, _ = env.step(policy(np.asarray(obs, dtype=np.float32)))
        if terminated or truncated:
            break
    env.close()


def film_in_child(*arguments) -> bool:
    """Whether `film(*arguments)` ran to its end in a process of its own."""
    child = multiprocessing.get_context("spawn").Process(target=film, args=arguments)
    child.start()
    child.join()
    return child.exitcode == 0


def derived_seed(seed: int, step: int) -> int:
    """A seed for environments that start at `step` of the run with `seed`; `seed` itself at step 0."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) % 2**31 if step else seed


# ---- Training: set-up ------------------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train and return the run folder. Raises BadInput before anything is created."""
    batch_size = args.num_envs * args.num_steps
    if args.total_timesteps < batch_size:
        raise BadInput(
            f"--total-timesteps {args.total_timesteps} is less than one rollout of num-envs x num-steps = "
            f"{args.num_envs} x {args.num_steps} = {batch_size}; ask for at least {batch_size}"
        )
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device(args.device)
    if args.device == "cpu":
        torch.set_num_threads(1)  # networks this small lose more to the hand-over between threads than they gain
        threadpoolctl.threadpool_limits(1, "blas")  # and so does numpy
        keep_freed_memory()

    checkpoint = load_checkpoint(args.resume) if args.resume else None
    start = checkpoint["global_step"] if checkpoint else 0
    envs, observation_space, action_space = make_envs(
        args.env_id, args.num_envs, derived_seed(args.seed, start), args.env_backend, args.env_threads
    )
    if args.capture_video and not film_in_child(args.env_id, None, args.run_dir, args.seed):
        raise BadInput(
            f"--capture-video: Gymnasium cannot draw {args.env_id} here; MuJoCo needs EGL, or the library OSMesa and the "
            "environment variable MUJOCO_GL=osmesa; or leave --capture-video out"
        )
    discrete = isinstance(action_space, gym.spaces.Discrete)
    shape_of_agent = {
        "obs_dim": observation_space.shape[0],
        "action_dim": int(action_space.n) if discrete else action_space.shape[0],
        "discrete": discrete,
        "first_width": args.first_width,
        "second_width": args.second_width,
    }
    agent = Agent(**shape_of_agent).to(device)
    theta, omega = agent.actor_parameters(), list(agent.critic.parameters())
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        set_rng_state(checkpoint["rng"])

    # ---- Training: buffers and the loop ------------------------------------------------------------------------
    # The rollout lives in numpy arrays (time, environment, ...); row num_steps of obs is the last one's successor.
    shape = (args.num_steps, args.num_envs)
    obs = np.zeros((args.num_steps + 1, args.num_envs, shape_of_agent["obs_dim"]), dtype=np.float32)
    actions = np.zeros(shape, dtype=np.int64) if discrete else np.zeros((*shape, shape_of_agent["action_dim"]), np.float32)
    rewards, terminated, truncated, valid = (np.zeros(shape, dtype=np.float32) for _ in range(4))

    def to_env(chosen: np.ndarray) -> np.ndarray:
        """Actions as the task wants them: counted from its own first one, or clipped to its box."""
        if discrete:
            return (chosen + action_space.start).astype(action_space.dtype)
        return np.minimum(np.maximum(chosen, action_space.low), action_space.high)

    with Run(args, checkpoint) as run:
        num_iterations = args.total_timesteps // batch_size
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            # ---- Training: collect a rollout -------------------------------------------------------------------
            rollout_start, env_time, episodes = time.perf_counter(), 0.0, []
            # Every rollout begins with new episodes, so that every trajectory begins in an initial state (Prop. 1).
            obs[0], _ = envs.reset()
            ended = np.zeros(args.num_envs, dtype=bool)  # whether the last step ended an episode: the next row is its reset
            episode_returns, episode_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)
            noise, actor = agent.draw_noise(*shape), numpy_mlp(agent.actor)
            for t in range(args.num_steps):
                actions[t] = agent.act(actor(obs[t]), noise[t])
                env_start = time.perf_counter()
                obs[t + 1], reward, ends, cut, _ = envs.step(to_env(actions[t]))
                env_time += time.perf_counter() - env_start
                transition, ended = ~ended, ends | cut
                terminated[t], truncated[t], valid[t] = ends, cut, transition
                rewards[t] = np.where(transition, reward, 0.0)
                episode_returns += rewards[t]
                episode_lengths += transition
                if ended.any():
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    wall_time = time.perf_counter() - run.started
                    for index in ended.nonzero()[0].tolist():
                        episodes.append((step, wall_time, index, float(episode_returns[index]), int(episode_lengths[index])))
                    episode_returns[ended], episode_lengths[ended] = 0.0, 0

            # ---- Training: advantages and targets --------------------------------------------------------------
            update_start = time.perf_counter()
            b_obs, b_actions, b_rewards, b_terminated, b_truncated, b_valid = (
                torch.from_numpy(array).to(device) for array in (obs, actions, rewards, terminated, truncated, valid)
            )
            b_ended = torch.max(b_terminated, b_truncated)
            if not args.bootstrap_truncation:
                b_terminated = b_ended
            with torch.no_grad():
                values = agent.critic(b_obs).squeeze(-1)
            advantages = gae(b_rewards, values, b_terminated, b_ended, args.gamma, args.gae_lambda)
            returns = gae(b_rewards, values, b_terminated, b_ended, args.gamma, 1.0) + values[:-1]  # Monte Carlo
            rows = b_valid.flatten().nonzero().squeeze(-1)  # transitions; the row after an episode's end is none
            b_obs, b_actions, advantages, returns = (
                array.flatten(0, 1)[rows] for array in (b_obs[:-1], b_actions, advantages, returns)
            )
            if args.norm_adv and len(rows) > 1:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

            # ---- Leader: the weight of each trajectory (Proposition 1) -----------------------------------------
            starts = episode_starts(b_valid)
            base = discount_weights(starts, args.gamma) if args.discount_gradient else torch.ones_like(b_valid)
            base, weights = base.float().flatten()[rows], torch.ones_like(returns)
            bilevel = {}
            if args.stackelberg and args.regularisation < math.inf:
                flat = torch.cat([parameter.detach().flatten() for parameter in omega])
                b = torch.func.grad(mean_value, argnums=1)(agent.critic, flat, b_obs)
                hessian = curvature(agent.critic, flat, b_obs, returns, args.hessian == "gauss-newton")

                def damped(v: Tensor) -> Tensor:
                    return hessian(v) + args.regularisation * v

                x, stopped = conjugate_gradient(damped, b, args.cg_iterations)
                slopes = torch.zeros(b_valid.numel(), device=device)
                slopes[rows] = directional_derivative(agent.critic, flat, b_obs, x)
                weights = trajectory_weights(starts, slopes.view(b_valid.shape)).flatten()[rows]
                if not weights.isfinite().all():
                    weights, stopped = torch.ones_like(returns), True
                bilevel["bilevel/ihvp_residual"] = ((damped(x) - b).norm() / b.norm()).item()
                bilevel["bilevel/ihvp_norm"] = x.norm().item()
                bilevel["bilevel/negative_curvature"] = float(stopped)

            # ---- Leader: one plain gradient step ---------------------------------------------------------------
            logprobs, entropy = agent.logprob(b_obs, b_actions)
            direct = torch.autograd.grad(policy_objective(logprobs, advantages, base), theta, retain_graph=True)
            total = direct  # AC
            if bilevel:
                total = torch.autograd.grad(policy_objective(logprobs, advantages, base * weights), theta)
            with torch.no_grad():
                torch._foreach_add_(theta, total, alpha=args.learning_rate)
                logratio = agent.logprob(b_obs, b_actions)[0] - logprobs

            # ---- Follower: m plain gradient steps --------------------------------------------------------------
            for step in range(args.critic_steps):
                critic_loss = value_loss(agent.critic(b_obs).squeeze(-1), returns)
                gradients = torch.autograd.grad(critic_loss, omega)
                if step == 0:
                    first_loss, first_gradients = critic_loss.item(), gradients
                with torch.no_grad():
                    torch._foreach_add_(omega, gradients, alpha=-args.critic_learning_rate)
            gradients = torch.autograd.grad(value_loss(agent.critic(b_obs).squeeze(-1), returns), omega)  # what is left of it

            # ---- Training: log and checkpoint ------------------------------------------------------------------
            direct, total, before, after = (
                torch.cat([gradient.flatten() for gradient in each]) for each in (direct, total, first_gradients, gradients)
            )
            bilevel |= {
                "bilevel/direct_norm": direct.norm().item(),
                "bilevel/correction_norm": (total - direct).norm().item(),
                "bilevel/multiplier": (total.norm() / direct.norm()).item(),
                "bilevel/cosine": torch.cosine_similarity(total, direct, 0).item(),
                "bilevel/weight_mean": weights.mean().item(),
                "bilevel/weight_std": weights.std().item(),
                "bilevel/inner_gradient_norm_before": before.norm().item(),
                "bilevel/inner_gradient_norm_after": after.norm().item(),
            }
            predictions = values[:-1].flatten()[rows]
            losses = {
                "losses/value_loss": first_loss,
                "losses/policy_loss": -policy_objective(logprobs, advantages, base).item(),
                "losses/entropy": entropy.mean().item(),
                "losses/approx_kl": (logratio.exp() - 1 - logratio).mean().item(),
                "losses/explained_variance": float(1 - (returns - predictions).var() / returns.var()),
            }
            now = time.perf_counter()
            times = {
                "time/env": env_time,
                "time/policy": update_start - rollout_start - env_time,
                "time/update": now - update_start,
            }
            run.log(iteration * batch_size, losses | bilevel | times, episodes)
            if iteration % args.checkpoint_every == 0 or iteration == num_iterations or run.stop_signal:
                run.save_checkpoint({"agent": agent.state_dict()})
            if run.stop_signal:
                run.stop()

        # ---- Training: model, evaluation, video ----------------------------------------------------------------
        run.end_training()
        envs.close()
        model = {"script": SCRIPT, "env_id": args.env_id, "agent": agent.cpu().state_dict(), "shape": shape_of_agent}
        if discrete:
            model["action_start"] = int(action_space.start)
        else:
            low, high = action_space.low, action_space.high
            model |= {"action_low": torch.as_tensor(low).float(), "action_high": torch.as_tensor(high).float()}
        path = run.folder / "model.pt"
        if args.save_model or args.eval_episodes or args.capture_video:
            write_atomically(path, lambda new: torch.save(model, new))
        results = {}
        if args.eval_episodes:
            results["eval_returns"] = evaluate(load_policy(path), args, args.eval_episodes)
            print(f"mean return of {args.eval_episodes} evaluation episodes: {np.mean(results['eval_returns']):.1f}")
        if args.capture_video and not film_in_child(args.env_id, path, run.folder / "videos", args.seed):
            print("the video could not be made; the run is complete without it", file=sys.stderr)
        if not args.save_model:
            path.unlink(missing_ok=True)
        run.close("finished", **results)
    return run.folder


# ---- Entry point (shared) --------------------------------------------------------------------------------------
if __name__ == "__main__":
    try:
        train(parse_args(Args))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
