"""The laboratory beside `blpo_continuous.py`: the same training loop with what is not the method, one flag each.

    --leader lambda-return     J = mean min(r_t A_t, clip(r_t) A_t), A = G_lambda(omega) - stopgrad V, as in the method;
                               --leader-lambda 0 is the one-step leader r + gamma V(s')
    --leader released          the authors' released update: A = GAE(omega) with V(s_t) not detached, the mixed term
                               f2 = -2 sum_t min(r_t A_t, clip_F(r_t) A_t) (G_t - V_t) with its sign, its sum over time
                               and A differentiated in omega, and the bound |s c| <= ihvp_bound |grad_theta J|
    --mixed-term timestep      what a target owes to its first action alone: weights 1 + 2 z, as in the method
    --mixed-term trajectory    Zheng et al. 2022, Prop. 1: an action answers for the targets of all earlier states, weights
                               1 + 2 sum_{k <= t} kappa^(t-k) z_k, kappa = --mixed-discount: gamma lambda, the default, for
                               lambda-returns whose bootstraps stand still; gamma, as in the paper, for V of the policy
    --curvature hessian        the full Hessian of L in place of its Gauss-Newton part
    --ihvp pcg                 conjugate gradients preconditioned by the Nystrom approximation
    --columns ...              the directions of the Nystrom approximation: coordinates (the paper), fixed (the same ones
                               every time, as released), last-layer (its coordinates), gaussian (J^T Omega), krylov,
                               features (the method's)
    --core-ridge 1             the identity that the released code adds to H[Q, Q]
    --sketch-refresh epoch     columns from the first minibatch of an epoch serve for all of it
    --correction-control ...   permuted: z shuffled within the minibatch; constant: z replaced by its mean; reversed: -z
    --preset released-hopper   the authors' settings of a task, for whatever is left at its default

The method's own choices are the defaults, and with them this file makes the same run as `blpo_continuous.py` up to
rounding. The signs, sums and settings of the released code are documented in docs/blpo.md.

    python blpo_continuous_ablations.py --preset released-hopper
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
    """seed of the environments, the initial weights, the actions and the minibatches, in [0, 2147483647]"""
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
    """write model.pt (weights and observation normaliser) at the end"""
    eval_episodes: int = 0
    """episodes played with the mean action after training, in [0, 10000]"""
    capture_video: bool = False
    """film one such episode through Gymnasium (MuJoCo needs EGL, or MUJOCO_GL=osmesa)"""

    # Algorithm
    env_id: str = "Hopper-v4"
    """any task with a Box action space; also namespace/Name-v0 and module:Name-v0"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """who steps the environments; auto: EnvPool where it has the task"""
    env_threads: int = 0
    """EnvPool threads, in [0, 1024]; 0: one for each usable core, at most num_envs"""
    total_timesteps: int = 1000000
    """environment steps in all, in [1, inf); rounded down to whole rollouts"""
    num_envs: int = 8
    """parallel environments, in [1, 65536]"""
    num_steps: int = 256
    """steps of each environment in a rollout, in [2, inf)"""
    learning_rate: float = 7e-4
    """Adam step size of the actor (leader), in (0, inf)"""
    critic_learning_rate: float = 2.8e-3
    """Adam step size of the critic (follower), in (0, inf)"""
    anneal_lr: bool = True
    """lower both step sizes linearly to 0"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of the advantages and of the critic's targets, in [0, 1]"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it counts as a termination"""
    chunk_length: int = 64
    """consecutive steps of one environment that stay together; the lambda-return bootstraps at their end, in [2, inf)"""
    num_minibatches: int = 16
    """minibatches of whole chunks in an epoch, in [1, inf)"""
    update_epochs: int = 4
    """passes over a rollout, in [1, inf)"""
    nested_updates: int = 3
    """K, critic steps before each actor step, in [1, inf)"""
    ihvp: Literal["nystrom", "cg", "pcg", "exact", "none"] = "nystrom"
    """solver of the damped system; none: the nested control, without the hypergradient"""
    damping: float = 1.0
    """alpha, added to the curvature of the critic's loss, in (0, inf)"""
    nystrom_rank: int = 10
    """q, directions in the Nystrom approximation, in [1, inf); more than critic_width + 1 add nothing"""
    cg_iterations: int = 10
    """conjugate gradient steps, in [1, inf)"""
    leader: Literal["lambda-return", "released"] = "lambda-return"
    """the leader's objective; released: the authors' released update as a whole"""
    leader_lambda: float | None = None
    """lambda of the leader's return, in [0, 1]; 0: the one-step leader; default: gae_lambda"""
    mixed_term: Literal["timestep", "trajectory"] = "timestep"
    """whether a state answers for itself alone or for all earlier states of its chunk"""
    mixed_discount: float | None = None
    """kappa of the trajectory mixed term, in [0, 1]; default: gamma * gae_lambda"""
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    """the critic's curvature"""
    columns: Literal["features", "last-layer", "coordinates", "fixed", "gaussian", "krylov"] = "features"
    """directions of the Nystrom approximation"""
    core_ridge: float = 0.0
    """added to the diagonal of H[Q, Q], in [0, inf); the released code adds 1"""
    sketch_refresh: Literal["minibatch", "epoch"] = "minibatch"
    """how long the columns serve"""
    correction_control: Literal["none", "permuted", "constant", "reversed"] = "none"
    """what replaces the weights z"""
    ihvp_bound: float = 1.0
    """bound of the released correction in units of the direct gradient's norm, in [0, inf)"""
    clip_f: float = 0.5
    """clip range of the ratio in the released mixed term, in (0, inf)"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: float = 0.2
    """eps of the clipped ratio, in (0, inf)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, in [0, inf)"""
    actor_width: int = 64
    """units in each of the actor's two hidden layers, in [1, 65536]"""
    critic_width: int = 64
    """units in each of the critic's two hidden layers, in [1, 65536]"""

    preset: Literal[
        "none", "released-walker2d", "released-hopper", "released-humanoid", "released-halfcheetah",
        "released-humanoidstandup", "released-pusher", "released-inverted-double-pendulum", "released-reacher",
        "released-inverted-pendulum",
    ] = "none"  # fmt: skip
    """the authors' settings for a task, but for its steps; they fill whatever has its default value, given or not"""

    def __post_init__(self):
        for name, value in (RELEASED | PRESETS[self.preset] if self.preset != "none" else {}).items():
            default = next(field.default for field in fields(self) if field.name == name)
            if getattr(self, name) == default:
                setattr(self, name, value)


# The settings of the authors' released scripts (docs/blpo.md); their tasks are Brax's, ours MuJoCo's of the same name.
# Their 5 to 20 million steps are left out: a preset must not overrule a budget that was asked for.
RELEASED = {
    "leader": "released", "curvature": "hessian", "columns": "fixed", "nystrom_rank": 5, "damping": 50.0, "core_ridge": 1.0,
    "num_envs": 32, "num_steps": 640, "chunk_length": 640, "num_minibatches": 32, "update_epochs": 4,
    "learning_rate": 3e-4, "critic_learning_rate": 1.2e-3, "anneal_lr": False, "norm_adv": False,
}  # fmt: skip
PRESETS = {
    "released-walker2d": {"env_id": "Walker2d-v4", "ihvp_bound": 0.8, "clip_f": 0.84},
    "released-hopper": {"env_id": "Hopper-v4", "ihvp_bound": 0.8, "clip_f": 0.84},
    "released-humanoid": {"env_id": "Humanoid-v4", "nested_updates": 5, "clip_f": 0.8},
    "released-halfcheetah": {
        "env_id": "HalfCheetah-v4", "nested_updates": 7, "ihvp_bound": 1.4, "clip_f": 0.7,
    },
    "released-humanoidstandup": {"env_id": "HumanoidStandup-v4", "nested_updates": 5},
    "released-pusher": {"env_id": "Pusher-v4"},
    "released-inverted-double-pendulum": {"env_id": "InvertedDoublePendulum-v4"},
    "released-reacher": {"env_id": "Reacher-v4"},
    "released-inverted-pendulum": {"env_id": "InvertedPendulum-v4"},
}  # fmt: skip


# ---- Environments (shared) -------------------------------------------------------------------------------------
def make_envs(
    env_id: str, num_envs: int, seed: int, backend: str = "auto", threads: int = 1
) -> tuple[gym.vector.VectorEnv, gym.spaces.Box, gym.spaces.Space]:
    """Parallel environments that reset on the step after an episode's end (Gymnasium's NEXT_STEP mode).

    That mode lets one loop serve both backends: at the end of an episode `step` returns its true final observation;
    the next `step` ignores the action and returns the first observation of the new episode with reward 0.

    Returns the environments, already seeded, and the spaces of a single one: observations, a flat Box, and actions.
    Raises BadInput if the task is unknown, cannot be made, or has spaces that this script cannot use.
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
    check_action_space(env_id, action_space)
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


class RunningNormaliser:
    """Running mean and variance of rows, in float64 (Chan et al. 1979), as in Gymnasium's normalising wrappers.

    It starts with mean 0, variance 1 and the weight of 1e-4 rows.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.mean = np.zeros(shape)
        self.squares = np.full(shape, 1e-4)  # sum of squared deviations from the mean
        self.count = 1e-4

    def update(self, rows: np.ndarray) -> None:
        """Add rows (n, *shape)."""
        self.count += len(rows)
        deviation = rows - self.mean
        shift = deviation.sum(0) / self.count
        self.mean = self.mean + shift
        self.squares = self.squares + (deviation * deviation).sum(0) - self.count * shift * shift

    @property
    def std(self) -> np.ndarray:
        """Standard deviation (*shape), kept away from 0 by 1e-8 under the root."""
        return np.sqrt(self.squares / self.count + 1e-8)

    def state_dict(self) -> dict[str, Tensor]:
        """Mean, sum of squares and count as float64 tensors."""
        return {name: torch.as_tensor(getattr(self, name), dtype=torch.float64) for name in ("mean", "squares", "count")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.mean, self.squares, self.count = (state[name].numpy() for name in ("mean", "squares", "count"))


# ---- Networks (shared) -----------------------------------------------------------------------------------------
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


def mlp(inputs: int, width: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden tanh layers; orthogonal weights (gain sqrt 2, `gain` at the output), zero biases."""
    layers = [nn.Linear(inputs, width), Tanh(), nn.Linear(width, width), Tanh(), nn.Linear(width, outputs)]
    for layer, layer_gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), gain)):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


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


def flat_view(parameters: Iterable[nn.Parameter]) -> nn.Parameter:
    """One vector (P,) that the parameters, and their gradients, become views of: theta or omega as the paper has it.

    An optimiser then steps one tensor instead of six, a fifth of the time. A weight lies in memory with its longer side
    contiguous: for 11 observations the gradient of the first layer takes a third of the time that way. So the order of
    its elements is not that of `torch.nn.utils.parameters_to_vector`: add no vector to it that was made otherwise. Gradients
    accumulate in place: zero them with `.grad.zero_()`, never by setting them to None.
    """
    parameters = list(parameters)
    flat, start = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters])), 0
    flat.grad = torch.zeros_like(flat)
    for parameter in parameters:
        end = start + parameter.numel()
        data, grad = (vector[start:end].view(sorted(parameter.shape)) for vector in (flat.data, flat.grad))
        if data.shape != parameter.shape:
            data, grad = data.T, grad.T
        parameter.data, parameter.grad, start = data.copy_(parameter.data), grad, end
    return flat


class FlatAdam(torch.optim.Adam):
    """torch.optim.Adam on flat vectors. `update` runs PyTorch's fused kernel and nothing else; what `step` does around
    it takes six times as long as the kernel. Give it parameter groups with `params`, a flat vector, and `lr`."""

    def __init__(self, *groups: dict):
        super().__init__(groups, eps=1e-5, fused=True)
        for group in self.param_groups:
            for vector in group["params"]:
                zeros = {name: torch.zeros_like(vector) for name in ("exp_avg", "exp_avg_sq")}
                self.state[vector] = {"step": torch.zeros((), device=vector.device)} | zeros

    @torch.no_grad()
    def update(self) -> None:
        """One step along the vectors' gradients (Kingma and Ba 2015, alg. 1), bitwise that of `step`."""
        for group in self.param_groups:
            vectors, (beta1, beta2) = group["params"], group["betas"]
            grads, states = [vector.grad for vector in vectors], [self.state[vector] for vector in vectors]
            means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                vectors, grads, means, squares, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                weight_decay=0.0, amsgrad=False, maximize=False,
            )  # fmt: skip


# ---- Gaussian policy (shared) ----------------------------------------------------------------------------------
class Agent(nn.Module):
    """Gaussian actor with a state-independent log standard deviation (starts at 0), and a critic of its own."""

    def __init__(self, obs_dim: int, action_dim: int, actor_width: int = 64, critic_width: int = 64):
        super().__init__()
        self.critic = mlp(obs_dim, critic_width, 1, gain=1.0)
        self.actor_mean = mlp(obs_dim, actor_width, action_dim, gain=0.01)
        self.actor_logstd = nn.Parameter(torch.zeros(action_dim))

    def actor_parameters(self) -> list[nn.Parameter]:
        """theta: the weights of the mean and the log standard deviation."""
        return [*self.actor_mean.parameters(), self.actor_logstd]

    def logprob_and_entropy(self, obs: Tensor, actions: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log pi(a|s) (...) of unclipped actions (..., A) at observations (..., D), and the mean entropy in nats (scalar).

        The entropy is the same in every state, so the weights (...) of that mean change nothing.
        """
        noise = (actions - self.actor_mean(obs)) * torch.exp(-self.actor_logstd)
        return gaussian_logprob(noise, self.actor_logstd), gaussian_entropy(self.actor_logstd)

    def mode(self, obs: Tensor) -> Tensor:
        """The most probable actions, the means, unclipped: (..., D) -> (..., A)."""
        return self.actor_mean(obs)


class BehaviourPolicy:
    """pi_old, the agent's policy as it is now, for one rollout: in numpy, with the noise of all steps drawn at once."""

    def __init__(self, agent: Agent, action_space: gym.spaces.Box, shape: tuple[int, int]):
        """For a rollout of shape (steps, environments)."""
        self.logstd, self.action_space = agent.actor_logstd.detach(), action_space
        self.noise = torch.randn(*shape, len(self.logstd)).to(self.logstd.device)
        self.deviations = (self.noise * self.logstd.exp()).cpu().numpy()
        self.mean = numpy_mlp(agent.actor_mean)
        self.actions = np.zeros(self.deviations.shape, dtype=np.float32)

    def act(self, t: int, obs: np.ndarray) -> np.ndarray:
        """The actions (N, A) of step t at observations (N, D), clipped to the box; `actions` keeps them unclipped."""
        self.actions[t] = self.mean(obs) + self.deviations[t]
        return task_actions(self.actions[t], self.action_space)

    def logprobs(self) -> Tensor:
        """log pi_old(a|s) of the rollout (T, N). The noise is known, so no network is asked."""
        return gaussian_logprob(self.noise, self.logstd)


def gaussian_logprob(noise: Tensor, logstd: Tensor) -> Tensor:
    """log N(mean + std * noise; mean, std) of a diagonal Gaussian: noise (..., A), logstd (A,) -> (...)."""
    return -0.5 * (noise * noise).sum(-1) - (logstd + 0.5 * math.log(2 * math.pi)).sum()


def gaussian_entropy(logstd: Tensor) -> Tensor:
    """Entropy in nats of a diagonal Gaussian: logstd (A,) -> scalar."""
    return (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()


def check_action_space(env_id: str, space: gym.spaces.Space) -> None:
    """Raise BadInput unless the actions are vectors of numbers."""
    if isinstance(space, gym.spaces.Discrete):
        other = f"{SCRIPT.split('_')[0]}_discrete.py"
        raise BadInput(f"--env-id {env_id!r} has discrete actions, this script needs a Box; use {other}")
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise BadInput(f"--env-id {env_id!r} has the action space {space}; this script needs a flat Box")


def task_actions(actions: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """The policy's actions (..., A) as the task takes them: clipped to its box."""
    return np.minimum(np.maximum(actions, space.low), space.high)


def save_action_space(space: gym.spaces.Box) -> dict[str, Tensor]:
    """What model.pt keeps of the action space: the bounds (A,) of the box."""
    bounds = {"action_low": space.low, "action_high": space.high}
    return {name: torch.as_tensor(bound, dtype=torch.float32) for name, bound in bounds.items()}


def load_action_space(model: dict) -> gym.spaces.Box:
    """The inverse of `save_action_space`."""
    return gym.spaces.Box(model["action_low"].numpy(), model["action_high"].numpy())


# ---- PPO mathematics (shared) ----------------------------------------------------------------------------------
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


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO's min(r A, clip(r, 1-eps, 1+eps) A) row by row (PPO eq. 7); the unclipped branch wins ties."""
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


# ---- Bilevel mathematics (shared) ------------------------------------------------------------------------------
def chunk_indices(num_steps: int, num_envs: int, chunk_length: int) -> Tensor:
    """Rows of a flattened rollout (num_steps + 1, num_envs, ...) that make its chunks of consecutive steps.

    Returns (chunks, chunk_length + 1); the last column is the observation a chunk bootstraps from.
    """
    starts = torch.arange(0, num_steps, chunk_length)[None, :] * num_envs + torch.arange(num_envs)[:, None]
    return starts.reshape(-1, 1) + torch.arange(chunk_length + 1) * num_envs


def gae_operator(ended: Tensor, valid: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """The matrices W (C, L, L) with A = W delta for C chunks of L steps: GAE as a linear operator.

    ended, valid (C, L) as 0/1 floats. W[t, k] = (gamma lambda)^(k-t) for k >= t in the same episode, else 0; the row
    and the column of a step that is no transition are 0, so nothing of it reaches another step.
    """
    length = ended.shape[-1]
    step = torch.arange(length, device=ended.device)
    powers = torch.tril((gamma * gae_lambda) ** (step[:, None] - step[None, :]).clamp(min=0).to(ended.dtype)).T
    episode = torch.cumsum(ended, -1) - ended  # a step that ends an episode still belongs to it
    rows, columns = (torch.where(valid > 0, episode, nowhere) for nowhere in (-1.0, -2.0))
    return powers * (rows[:, :, None] == columns[:, None, :])


def lambda_returns(values: Tensor, rewards: Tensor, discounts: Tensor, operator: Tensor) -> Tensor:
    """G = V + W delta with delta_t = r_t + discount_t V_{t+1} - V_t: the lambda-return as an affine map of the values.

    values (C, L+1), rewards and discounts = gamma (1 - terminated) (C, L), operator (C, L, L) -> G (C, L).
    """
    delta = rewards + discounts * values[:, 1:] - values[:, :-1]
    return values[:, :-1] + (operator @ delta[:, :, None])[:, :, 0]


def lambda_returns_vjp(slopes: Tensor, discounts: Tensor, operator: Tensor) -> Tensor:
    """(dG/dV)^T slopes, the transpose of `lambda_returns`: slopes (C, L) -> u (C, L+1)."""
    through_delta = (slopes[:, None, :] @ operator)[:, 0, :]
    u = torch.zeros(len(slopes), slopes.shape[1] + 1, dtype=slopes.dtype, device=slopes.device)
    u[:, :-1] = slopes - through_delta
    u[:, 1:] += discounts * through_delta
    return u


@functools.lru_cache(maxsize=8)
def workspace(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, the same one for the same arguments: allocated anew, a large intermediate result would lie
    elsewhere in memory each time, out of the cache."""
    return torch.empty(shape, dtype=dtype, device=device)


class CriticJacobian:
    """J = d V / d omega (n, P) of a Linear / tanh stack at n observations, as products with it.

    V is one number a row, so its gradient in the weight matrix of a layer is the outer product of two vectors: the
    derivative of V by the layer's outputs (`deltas`) and the layer's inputs (`inputs`). All products with J, J^T and
    J J^T follow from these factors by matrix multiplication; tests/ holds the torch.func versions.
    Vectors in parameter space are flat, in the order of `critic.parameters()`; q of them are rows of (q, P).
    """

    def __init__(self, critic: nn.Sequential, obs: Tensor):
        """One forward pass at obs (n, D); keeps the values (n,) and the inputs of each layer (n, inputs)."""
        self.linears, self.inputs, tanh = [layer for layer in critic if isinstance(layer, nn.Linear)], [obs], Tanh()
        with torch.no_grad():
            for linear in self.linears[:-1]:
                self.inputs.append(tanh(linear(self.inputs[-1])))
            self.values = self.linears[-1](self.inputs[-1]).squeeze(-1)

    @functools.cached_property
    def deltas(self) -> list[Tensor]:
        """The derivative of V by the outputs of each layer (n, outputs): one backward pass."""
        deltas = [torch.ones_like(self.values)[:, None]]
        for linear, hidden in zip(self.linears[:0:-1], self.inputs[:0:-1]):
            slope = deltas[0] @ linear.weight.detach()
            deltas.insert(0, torch.ops.aten.tanh_backward(slope, hidden))  # slope * (1 - hidden^2)
        return deltas

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u for q vectors at once: (q, n) -> (q, P)."""
        parts, columns = [], u.T.contiguous()[:, :, None]
        for inputs, deltas in zip(self.inputs, self.deltas):
            small = deltas if deltas.shape[1] <= inputs.shape[1] else inputs  # u goes with the smaller factor
            buffer = workspace(len(small), len(u), small.shape[1], dtype=u.dtype, device=u.device)
            scaled = torch.mul(columns, small[:, None, :], out=buffer).flatten(1)  # (n, q * outputs) or (n, q * inputs)
            if small is deltas:
                weight = (scaled.T @ inputs).view(len(u), -1)
            else:
                weight = (scaled.T @ deltas).view(len(u), inputs.shape[1], -1).mT.flatten(1)
            parts += [weight, u @ deltas]
        return torch.cat(parts, 1)

    def jvp(self, v: Tensor) -> Tensor:
        """J v for q vectors, one after the other: (q, P) -> (q, n)."""
        result = self.values.new_zeros(len(v), len(self.values))
        for vector, moved in zip(v, result):
            start = 0
            for inputs, deltas in zip(self.inputs, self.deltas):
                outputs, width = deltas.shape[1], inputs.shape[1]
                end = start + outputs * width
                weight, bias = vector[start:end].view(outputs, width), vector[end : end + outputs]
                moved += (torch.addmm(bias, inputs, weight.T) * deltas).sum(1)
                start = end + outputs
        return result

    def kernel(self) -> Tensor:
        """J J^T (n, n), layer by layer."""
        return sum((inputs @ inputs.T + 1) * (deltas @ deltas.T) for inputs, deltas in zip(self.inputs, self.deltas))


class GaussNewton:
    """H = 2 sum_t w_t grad V_t grad V_t^T = R^T R, the Gauss-Newton matrix of L = sum_t w_t (G_t - V_t)^2.

    R = diag(sqrt(2 w)) J with weights w (n,), 0 for rows that are not in L. It is the Hessian of L without the term
    in the residuals G - V: positive semidefinite, and equal to it for a critic that is linear in omega.
    """

    def __init__(self, jacobian: CriticJacobian, weights: Tensor):
        self.jacobian, self.root = jacobian, torch.sqrt(2 * weights)

    @functools.cached_property
    def features(self) -> Tensor:
        """The columns of R that belong to the last layer (n, width + 1): its inputs and 1, scaled."""
        last = self.jacobian.inputs[-1]
        return torch.cat([last, torch.ones_like(last[:, :1])], 1) * self.root[:, None]

    def down(self, v: Tensor) -> Tensor:
        """R v: (q, P) -> (q, n)."""
        return self.jacobian.jvp(v) * self.root

    def up(self, u: Tensor) -> Tensor:
        """R^T u: (q, n) -> (q, P)."""
        return self.jacobian.vjp(u * self.root)

    def product(self, v: Tensor, damping: float) -> Tensor:
        """(H + damping I) v for a vector (P,)."""
        return self.up(self.down(v[None]))[0] + damping * v


def nystrom_solver(columns: Tensor, core: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """b -> (H_q + damping I)^-1 b with the Nystrom approximation H_q = C M^+ C^T (poster of Prakash et al. 2025).

    columns C^T = (H P)^T (q, n_params) and core M = P^T H P (q, q) for directions P; P = some columns of the identity
    gives the poster's C = H[:, Q] and M = H[Q, Q]. The poster's Woodbury formula
        v = b / alpha - C (M + C^T C / alpha)^-1 C^T b / alpha^2
    breaks down where M is singular or slightly indefinite, so M is symmetrised and its eigenvalues below 1e-8 (in
    float32: 1e-6) of the largest are dropped: H_q = F F^T with F = C E D^-1/2, and
        v = (b - F (alpha I + F^T F)^-1 F^T b) / alpha,   0 < v.b <= |b|^2 / alpha.
    The small system is solved in float64. v is nan where anything in the system is not finite.
    """
    floor = max(1e-8, 10 * torch.finfo(core.dtype).eps)
    try:
        eigenvalues, vectors = torch.linalg.eigh((core + core.T).double() / 2)
    except torch.linalg.LinAlgError:  # M is not finite
        return lambda b: b * math.nan
    smallest = floor * eigenvalues[-1].clamp(min=torch.finfo(torch.float64).tiny)
    basis = vectors * torch.where(eigenvalues <= smallest, math.inf, eigenvalues).rsqrt()  # E D^-1/2, 0 where dropped
    columns = columns.double()
    inner = basis.T @ (columns @ columns.T) @ basis  # F^T F
    inner.diagonal().add_(damping)
    cholesky = torch.linalg.cholesky_ex(inner)[0]

    def solve(b: Tensor) -> Tensor:
        right = b.double()
        small = basis @ torch.cholesky_solve(basis.T @ (columns @ right)[:, None], cholesky)
        return torch.addmv(right, columns.T, small[:, 0], alpha=-1).div_(damping).to(b.dtype)

    return solve


def feature_directions(curvature: GaussNewton, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal directions (width + 1, q) in the weights of the critic's last layer, along its leading features.

    With the features Phi (n, width + 1) of that layer (hidden units and 1), scaled as R, they are orth(S^2 Omega) for
    S = Phi^T Phi, the curvature in the last layer, and a Gaussian Omega (width + 1, rank): subspace iteration (Halko
    et al. 2011, alg. 4.4). q is rank, or width + 1 if that is less.
    """
    features = curvature.features
    gaussian = torch.randn(rank, features.shape[1], generator=generator).to(features)
    for _ in range(2):
        gaussian = (gaussian @ features.T) @ features
    return torch.linalg.qr(gaussian.T)[0]


def nystrom_ihvp(
    curvature: GaussNewton, u: Tensor, damping: float, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """b = J^T u and v = (H_q + damping I)^-1 b on the directions P of `feature_directions`: u (n,) -> b, v (P,).

    R P = Phi P costs next to nothing, so one backward pass for rank + 1 vectors gives b and all columns H P = R^T (R P).
    """
    images = feature_directions(curvature, rank, generator).T @ curvature.features.T
    products = curvature.jacobian.vjp(torch.cat([u[None], images * curvature.root]))
    return products[0], nystrom_solver(products[1:], images @ images.T, damping)(products[0])


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve A x = b for a symmetric A given as `product`, from x = 0 (Hestenes and Stiefel 1952): b (P,) -> x (P,).

    Guarded: it stops improving x for good where p.A p <= 0 (A is not positive definite there) or where the residual
    has fallen to 1e-6 of b, below which float32 directions are noise. No value is read back to Python.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    energy = b @ b
    stop = 1e-12 * energy
    going = torch.ones_like(energy, dtype=torch.bool)
    for _ in range(iterations):
        image = product(direction)
        bend = direction @ image
        going = going & (bend > 0) & (energy > stop)
        step = torch.where(going, energy / bend, 0.0)
        x = x + step * direction
        residual = residual - step * image
        new_energy = residual @ residual
        direction = residual + torch.where(going, new_energy / energy, 0.0) * direction
        energy = new_energy
    return x


def cg_ihvp(curvature: GaussNewton, u: Tensor, damping: float, iterations: int) -> tuple[Tensor, Tensor]:
    """b = J^T u and v = (H + damping I)^-1 b by conjugate gradients: u (n,) -> b, v (P,), one JVP and one VJP an iteration."""
    b = curvature.jacobian.vjp(u[None])[0]
    return b, conjugate_gradient(lambda v: curvature.product(v, damping), b, iterations)


def exact_ihvp(curvature: GaussNewton, u: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """b = J^T u and v = (H + damping I)^-1 b exactly, in the space of the rows: u (n,) -> b, v (P,).

    v = (b - R^T (damping I + R R^T)^-1 R b) / damping: one n x n kernel and its Cholesky factor, in float64; n is the
    number of rows of the minibatch. R is a float32 number: where the damping is too small beside its rounding (below
    1e-6 of the largest eigenvalue or so) the factor may not exist, and v is nan.
    """
    b = curvature.jacobian.vjp(u[None])[0]
    kernel = (curvature.jacobian.kernel() * curvature.root[:, None] * curvature.root).double()
    kernel.diagonal().add_(damping)
    right = curvature.down(b[None]).double()
    factor, failed = torch.linalg.cholesky_ex(kernel)
    inner = torch.where(failed == 0, torch.cholesky_solve(right.T, factor).T, math.nan)
    return b, (b - curvature.up(inner.to(b.dtype))[0]) / damping


def surrogate_slope(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """The derivative of `clipped_surrogate` by the advantages: the ratio of the branch that is the minimum."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.where(ratio * advantages <= clipped * advantages, ratio, clipped)


def normalised(x: Tensor, weights: Tensor) -> Tensor:
    """x minus its mean, over its standard deviation, both under weights that sum to 1."""
    centred = x - (weights * x).sum()
    return centred / ((weights * centred * centred).sum().sqrt() + 1e-8)


DIAGNOSTICS = (
    "direct_norm", "correction_norm", "norm_ratio", "cosine", "weight_mean", "weight_std", "ihvp_residual",
    "ihvp_cosine", "inner_gradient_norm_before", "inner_gradient_norm_after",
)  # fmt: skip


def leader_diagnostics(
    theta: list[nn.Parameter], direct: Tensor, correction: Tensor, weights: Tensor, z: Tensor
) -> dict[str, Tensor]:
    """The gradients in theta of J and of the correction, and the weights 1 + 2 z (C, L), in numbers."""

    def gradient(objective: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, theta, retain_graph=True)])

    direct, correction = gradient(direct), gradient(correction)
    mean = (weights * (1 + 2 * z)).sum()
    return {
        "direct_norm": direct.norm(),
        "correction_norm": correction.norm(),
        "norm_ratio": correction.norm() / direct.norm(),
        "cosine": torch.cosine_similarity(direct, correction, dim=0),
        "weight_mean": mean,
        "weight_std": (weights * (1 + 2 * z - mean) ** 2).sum().sqrt(),
    }


def solver_diagnostics(curvature: GaussNewton, b: Tensor, v: Tensor, damping: float) -> dict[str, Tensor]:
    """|(H + damping I) v - b| / |b|, where v = 0 scores 1, and the cosine of v and b."""
    residual = (curvature.product(v, damping) - b).norm() / b.norm()
    return {"ihvp_residual": residual, "ihvp_cosine": torch.cosine_similarity(v, b, dim=0)}


def inner_gradient_norm(jacobian: CriticJacobian, weights: Tensor, targets: Tensor) -> Tensor:
    """|grad_omega L|, 0 where the critic has answered in full: weights, targets (C, L), jacobian at (C, L + 1) rows."""
    errors = jacobian.values.view(len(weights), -1)[:, :-1] - targets
    return jacobian.vjp(nn.functional.pad(2 * weights * errors, (0, 1)).view(1, -1)).norm()


# ---- The run: what is not the algorithm (shared) ---------------------------------------------------------------
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


def nearest_divisors(number: int, near: int) -> str:
    """The divisors of `number` on both sides of `near`, in words."""
    divisors = {d for i in range(1, math.isqrt(number) + 1) if number % i == 0 for d in (i, number // i)}
    below, above = max(d for d in divisors if d <= near), min(d for d in divisors if d >= min(near, number))
    return " or ".join(str(d) for d in sorted({below, above}))


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
    """The trained policy in a model.pt: raw observations (..., D) -> the most probable actions, as the task takes them."""
    model = torch.load(path, weights_only=True)
    action_space = load_action_space(model)
    sizes = len(model["obs_mean"]), gym.spaces.flatdim(action_space), model["actor_width"], model["critic_width"]
    agent = Agent(*sizes)
    agent.load_state_dict(model["agent"])

    def policy(obs: np.ndarray) -> np.ndarray:
        normalised = ((torch.as_tensor(obs).double() - model["obs_mean"]) / model["obs_std"]).clamp(-10, 10)
        with torch.no_grad():
            return task_actions(agent.mode(normalised.float()).numpy(), action_space)

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


# ---- Laboratory mathematics ------------------------------------------------------------------------------------
def flat_call(critic: nn.Sequential, flat: Tensor, obs: Tensor) -> Tensor:
    """Values (n,) of the critic with the flat parameter vector (P,), in the order of `critic.parameters()`."""
    parameters, start = {}, 0
    for name, parameter in critic.named_parameters():
        parameters[name] = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return torch.func.functional_call(critic, parameters, (obs,)).squeeze(-1)


class Hessian(GaussNewton):
    """The full Hessian of L = sum_t w_t (G_t - V_t)^2 in omega, by forward-over-reverse; it can be indefinite."""

    def __init__(self, jacobian: CriticJacobian, weights: Tensor, critic: nn.Sequential, targets: Tensor):
        super().__init__(jacobian, weights)
        self.flat = torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])

        def loss(flat: Tensor) -> Tensor:
            return (weights * (flat_call(critic, flat, jacobian.inputs[0]) - targets) ** 2).sum()

        self.gradient = torch.func.grad(loss)

    def products(self, v: Tensor) -> Tensor:
        """H v for q vectors at once: (q, P) -> (q, P)."""
        return torch.func.vmap(lambda one: torch.func.jvp(self.gradient, (self.flat,), (one,))[1])(v)

    def product(self, v: Tensor, damping: float) -> Tensor:
        """(H + damping I) v for a vector (P,)."""
        return self.products(v[None])[0] + damping * v


def curvature_products(curvature: GaussNewton, v: Tensor) -> Tensor:
    """H v for q vectors at once, (q, P) -> (q, P), with either curvature."""
    return curvature.products(v) if isinstance(curvature, Hessian) else curvature.up(curvature.down(v))


def nystrom_directions(
    columns: str, curvature: GaussNewton, b: Tensor, rank: int, generator: torch.Generator
) -> Tensor:
    """Directions P^T (q, P) whose columns H P make the Nystrom approximation; q <= rank."""
    n, size, last = len(curvature.root), len(b), curvature.jacobian.inputs[-1].shape[1] + 1

    def coordinates(chosen: Tensor) -> Tensor:
        return nn.functional.one_hot(chosen, size).to(b)

    if columns == "coordinates":
        return coordinates(torch.randperm(size, generator=generator)[:rank])
    if columns == "fixed":
        return coordinates(torch.randperm(size, generator=torch.Generator().manual_seed(0))[:rank])
    if columns == "last-layer":
        return coordinates(size - 1 - torch.randperm(last, generator=generator)[:rank])
    if columns == "gaussian":
        return curvature.up(torch.randn(rank, n, generator=generator).to(b))
    if columns == "krylov":
        basis = [b / b.norm()]
        while len(basis) < rank:
            new = curvature.product(basis[-1], 0.0)
            for _ in range(2):  # Gram-Schmidt twice: once is not enough in float32
                for old in basis:
                    new = new - (new @ old) * old
            basis.append(new / new.norm().clamp(min=torch.finfo(b.dtype).tiny))
        return torch.stack(basis)
    directions = feature_directions(curvature, rank, generator)
    return nn.functional.pad(directions.T, (size - last, 0))


def preconditioned_cg_ihvp(
    curvature: GaussNewton, b: Tensor, damping: float, iterations: int, columns: Tensor, core: Tensor
) -> Tensor:
    """(H + damping I)^-1 b by conjugate gradients with the Nystrom inverse as preconditioner, guarded like
    `conjugate_gradient`: b (P,), columns (q, P) and core (q, q) of `nystrom_solver` -> v (P,)."""
    precondition = nystrom_solver(columns, core, damping)
    v, residual = torch.zeros_like(b), b
    direction = precondition(b)
    energy, stop = b @ direction, 1e-12 * (b @ b)
    going = torch.ones_like(energy, dtype=torch.bool)
    for _ in range(iterations):
        image = curvature.product(direction, damping)
        bend = direction @ image
        going = going & (bend > 0) & (residual @ residual > stop)
        step = torch.where(going, energy / bend, 0.0)
        v, residual = v + step * direction, residual - step * image
        pulled = precondition(residual)
        new_energy = residual @ pulled
        direction = pulled + torch.where(going, new_energy / energy, 0.0) * direction
        energy = new_energy
    return v


def released_mixed_weights(
    ratio: Tensor, advantages: Tensor, advantages_dot: Tensor, errors: Tensor, values_dot: Tensor, clip_f: float
) -> Tensor:
    """Row weights y with c = (grad_theta,omega f2) v = sum_t y_t grad_theta r_t for the released surrogate
    f2 = -2 sum_t min(r_t A_t, clip(r_t, 1-clip_f, 1+clip_f) A_t) (G_t - V_t), A and V moving in omega along v.

    errors = G - V; all arrays (C, L) and detached.
    """
    active = ratio * advantages <= ratio.clamp(1 - clip_f, 1 + clip_f) * advantages
    return -2 * active * (advantages_dot * errors - advantages * values_dot)


def bounded(direct: list[Tensor], correction: list[Tensor], bound: float) -> list[Tensor]:
    """The released direction direct - s correction with s = min(1, bound |direct| / (|correction| + 1e-8))."""
    norms = [torch.sqrt(sum((part * part).sum() for part in vector)) for vector in (direct, correction)]
    scale = (bound * norms[0] / (norms[1] + 1e-8)).clamp(max=1.0)
    return [d - scale * c for d, c in zip(direct, correction)]


def controlled(z: Tensor, weights: Tensor, control: str, generator: torch.Generator) -> Tensor:
    """z (C, L) under a control that breaks or reverses its meaning and leaves the rest of the update as it is."""
    if control == "constant":
        return torch.where(weights > 0, (weights * z).sum(), 0.0)
    if control == "reversed":
        return -z
    if control == "permuted":
        z, rows = z.clone(), weights > 0
        z[rows] = z[rows][torch.randperm(int(rows.sum()), generator=generator).to(z.device)]
    return z


# ---- Batch shape -----------------------------------------------------------------------------------------------
def check_batch_shape(args: Args) -> None:
    """Raise BadInput unless chunks divide a rollout and minibatches divide the chunks."""
    if args.num_steps % args.chunk_length:
        raise BadInput(
            f"--chunk-length {args.chunk_length} does not divide num-steps = {args.num_steps}; "
            f"{nearest_divisors(args.num_steps, args.chunk_length)} would"
        )
    chunks = args.num_envs * args.num_steps // args.chunk_length
    if chunks % args.num_minibatches:
        raise BadInput(
            f"--num-minibatches {args.num_minibatches} does not divide the {chunks} chunks of a rollout "
            f"(num-envs x num-steps / chunk-length); {nearest_divisors(chunks, args.num_minibatches)} would"
        )


# ---- Training: set-up (shared) ---------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train and return the run folder. Raises BadInput before anything is created."""
    batch_size = args.num_envs * args.num_steps
    if args.total_timesteps < batch_size:
        raise BadInput(
            f"--total-timesteps {args.total_timesteps} is less than one rollout of num-envs x num-steps = "
            f"{args.num_envs} x {args.num_steps} = {batch_size}; ask for at least {batch_size}"
        )
    check_batch_shape(args)
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
    obs_dim, action_dim = (gym.spaces.flatdim(space) for space in (observation_space, action_space))
    agent = Agent(obs_dim, action_dim, args.actor_width, args.critic_width).to(device)

    # ---- Optimisers --------------------------------------------------------------------------------------------
    theta, omega = flat_view(agent.actor_parameters()), flat_view(agent.critic.parameters())
    if args.ihvp in ("nystrom", "pcg") and args.nystrom_rank > omega.numel():
        raise BadInput(
            f"--nystrom-rank {args.nystrom_rank} is more than the {omega.numel()} parameters of the critic; "
            "ask for at most that"
        )
    if args.ihvp == "exact" and args.curvature == "hessian":
        raise BadInput("--ihvp exact solves with --curvature gauss-newton alone; for the Hessian use --ihvp cg")
    if args.leader == "released" and (args.mixed_term, args.correction_control) != ("timestep", "none"):
        raise BadInput("--leader released has a mixed term of its own; leave out --mixed-term and --correction-control")
    if args.leader == "released" and args.norm_adv:
        raise BadInput("--leader released differentiates its advantages, which are not normalised; add --no-norm-adv")
    leader_lambda = args.gae_lambda if args.leader_lambda is None else args.leader_lambda
    mixed_discount = args.gamma * args.gae_lambda if args.mixed_discount is None else args.mixed_discount
    actor_optimiser = FlatAdam({"params": theta, "lr": args.learning_rate})
    critic_optimiser = FlatAdam({"params": omega, "lr": args.critic_learning_rate})
    optimisers = [actor_optimiser, critic_optimiser]
    chunks = chunk_indices(args.num_steps, args.num_envs, args.chunk_length).to(device)
    sketch_generator = torch.Generator()  # its own, so that the solver changes no other random number
    control_generator = torch.Generator()

    # ---- Training: buffers and the loop (shared) ---------------------------------------------------------------
    step_sizes = [[group["lr"] for group in each.param_groups] for each in optimisers]
    obs_stats, return_stats = RunningNormaliser((obs_dim,)), RunningNormaliser(())
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        for each, state in zip(optimisers, checkpoint["optimisers"]):
            each.load_state_dict(state)
        obs_stats.load_state_dict(checkpoint["obs_stats"])
        return_stats.load_state_dict(checkpoint["return_stats"])
        set_rng_state(checkpoint["rng"])

    def normalise(raw: np.ndarray) -> np.ndarray:
        """Observations in units of their running standard deviation, clipped to +-10."""
        return np.minimum(np.maximum((raw - obs_stats.mean) / obs_stats.std, -10.0), 10.0)

    # The rollout lives in numpy arrays (time, environment, ...); row num_steps of obs is the next rollout's first.
    shape = (args.num_steps, args.num_envs)
    obs = np.zeros((args.num_steps + 1, args.num_envs, obs_dim), dtype=np.float32)
    rewards, terminated, truncated, valid = (np.zeros(shape, dtype=np.float32) for _ in range(4))
    ended = np.zeros(args.num_envs, dtype=bool)  # whether the last step ended an episode: the next row is its reset
    discounted_returns, episode_returns = np.zeros(args.num_envs), np.zeros(args.num_envs)
    episode_lengths = np.zeros(args.num_envs, dtype=np.int64)

    with Run(args, checkpoint) as run:
        raw_obs, _ = envs.reset()
        if not checkpoint:
            obs_stats.update(raw_obs)
        obs[-1] = normalise(raw_obs)
        num_iterations = args.total_timesteps // batch_size
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            for each, sizes in zip(optimisers, step_sizes):
                for group, size in zip(each.param_groups, sizes):
                    group["lr"] = size * (1 - (iteration - 1) / num_iterations) if args.anneal_lr else size

            # ---- Training: collect a rollout (shared) ----------------------------------------------------------
            rollout_start, env_time, episodes = time.perf_counter(), 0.0, []
            obs[0] = obs[-1]
            behaviour = BehaviourPolicy(agent, action_space, shape)
            for t in range(args.num_steps):
                actions = behaviour.act(t, obs[t])
                env_start = time.perf_counter()
                raw_obs, reward, ends, cut, _ = envs.step(actions)
                env_time += time.perf_counter() - env_start
                transition, ended = ~ended, ends | cut
                terminated[t], truncated[t], valid[t] = ends, cut, transition
                reward = np.where(transition, reward, 0.0)
                episode_returns += reward
                episode_lengths += transition
                # A final observation is no input of the policy and a reset row earns no reward: neither is counted.
                obs_stats.update(raw_obs[~ended] if ended.any() else raw_obs)
                obs[t + 1] = normalise(raw_obs)
                discounted_returns = args.gamma * discounted_returns + reward
                return_stats.update(discounted_returns[transition])
                rewards[t] = np.minimum(np.maximum(reward / return_stats.std, -10.0), 10.0)
                if ended.any():
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    wall_time = time.perf_counter() - run.started
                    for index in ended.nonzero()[0].tolist():
                        episodes.append((step, wall_time, index, float(episode_returns[index]), int(episode_lengths[index])))
                    discounted_returns[ended], episode_returns[ended], episode_lengths[ended] = 0.0, 0.0, 0

            # ---- Training: values, advantages and targets of the rollout (shared) ------------------------------
            update_start = time.perf_counter()
            logprobs, arrays = behaviour.logprobs(), (obs, behaviour.actions, rewards, terminated, truncated, valid)
            b_obs, b_actions, b_rewards, b_terminated, b_truncated, b_valid = (
                torch.from_numpy(array).to(device) for array in arrays
            )
            b_ended = torch.max(b_terminated, b_truncated)
            if not args.bootstrap_truncation:
                b_terminated = b_ended
            with torch.no_grad():
                values = agent.critic(b_obs).squeeze(-1)
            advantages = gae(b_rewards, values, b_terminated, b_ended, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]

            # ---- Update ----------------------------------------------------------------------------------------
            sketch_generator.manual_seed(derived_seed(args.seed, iteration))
            control_generator.manual_seed(derived_seed(args.seed + 1, iteration))
            rows = chunks[:, :-1]
            chunk_valid, chunk_ended, chunk_terminated = (x.flatten()[rows] for x in (b_valid, b_ended, b_terminated))
            arrays = [
                b_obs.flatten(0, 1)[chunks],  # (C, L + 1, D), with the observation that a chunk bootstraps from
                *(x.flatten(0, 1)[rows] for x in (b_actions, logprobs, b_rewards, returns)),
                chunk_valid,
                args.gamma * (1 - chunk_terminated),
                gae_operator(chunk_ended, chunk_valid, args.gamma, leader_lambda),
                gae_operator(chunk_ended, chunk_valid, mixed_discount, 1.0),
            ]
            fallbacks, nested_time, response_time = torch.zeros((), device=device), 0.0, 0.0
            for epoch in range(args.update_epochs):
                sketch = None
                statistics = []  # of each minibatch of this epoch; read once, after the update
                order = torch.randperm(len(chunks)).to(device)
                minibatches = zip(*(array[order].chunk(args.num_minibatches) for array in arrays))
                for minibatch in minibatches:
                    mb_obs, mb_actions, mb_logprobs, mb_rewards, mb_returns, mb_valid, mb_discounts, *operators = minibatch
                    mb_operator, mb_mixed_operator = operators
                    nested_start = time.perf_counter()
                    states = mb_obs[:, :-1].flatten(0, 1)  # (C L, D), chunk after chunk
                    obs_rows = mb_obs.flatten(0, 1)  # (C (L + 1), D), with the rows that chunks bootstrap from
                    weights = mb_valid / mb_valid.sum()  # mean over the transitions
                    row_weights = nn.functional.pad(weights, (0, 1)).flatten()

                    if epoch == args.update_epochs - 1 and len(statistics) == args.num_minibatches - 1:
                        before = CriticJacobian(agent.critic, obs_rows)
                        gradient_norm_before = inner_gradient_norm(before, weights, mb_returns)

                    # The follower: K steps on L = mean (G - V)^2.
                    targets, error_weights = mb_returns.flatten(), 2 * weights.flatten()
                    for _ in range(args.nested_updates):
                        errors = agent.critic(states).squeeze(-1) - targets
                        omega.grad.zero_()
                        errors.backward(error_weights * errors.detach())  # dL / d errors
                        critic_optimiser.update()
                    leader_start = time.perf_counter()

                    # The leader's objective, with the advantages of the critic that has just answered.
                    new_logprobs, entropy = agent.logprob_and_entropy(states, mb_actions.flatten(0, 1), weights.flatten())
                    logratio = new_logprobs.view_as(mb_logprobs) - mb_logprobs
                    ratio = logratio.exp()
                    response_start = time.perf_counter()
                    jacobian = CriticJacobian(agent.critic, obs_rows)
                    new_values = jacobian.values.view(len(mb_obs), -1)
                    advantages = lambda_returns(new_values, mb_rewards, mb_discounts, mb_operator) - new_values[:, :-1]
                    if args.norm_adv:
                        advantages = normalised(advantages, weights)
                    surrogate = clipped_surrogate(ratio, advantages, args.clip_coef)

                    # The follower's response to the leader: z = J_V (H + alpha I)^-1 grad_omega J.
                    z = torch.zeros_like(weights)
                    if args.ihvp != "none":
                        slopes = weights * surrogate_slope(ratio.detach(), advantages, args.clip_coef)
                        u = lambda_returns_vjp(slopes, mb_discounts, mb_operator)
                        if args.leader == "released":
                            u[:, :-1] -= slopes  # here V(s_t) of A = G - V moves as well
                        u = u.flatten()
                        b = jacobian.vjp(u[None])[0]
                        curvature = (
                            Hessian(jacobian, row_weights, agent.critic, nn.functional.pad(mb_returns, (0, 1)).flatten())
                            if args.curvature == "hessian"
                            else GaussNewton(jacobian, row_weights)
                        )
                        if args.ihvp in ("nystrom", "pcg") and (sketch is None or args.sketch_refresh == "minibatch"):
                            directions = nystrom_directions(args.columns, curvature, b, args.nystrom_rank, sketch_generator)
                            columns = curvature_products(curvature, directions)
                            ridge = args.core_ridge * torch.eye(len(columns), device=device)
                            sketch = columns, directions @ columns.T + ridge
                        if args.ihvp == "nystrom":
                            v = nystrom_solver(*sketch, args.damping)(b)
                        elif args.ihvp == "cg":
                            b, v = cg_ihvp(curvature, u, args.damping, args.cg_iterations)
                        elif args.ihvp == "pcg":
                            v = preconditioned_cg_ihvp(curvature, b, args.damping, args.cg_iterations, *sketch)
                        else:
                            b, v = exact_ihvp(curvature, u, args.damping)
                        response = jacobian.jvp(v[None]).view(len(mb_obs), -1)
                        finite = response.sum().isfinite()  # if not, this step falls back to the direct gradient
                        z = torch.where(finite, response[:, :-1], 0.0)
                        fallbacks += ~finite
                        if args.mixed_term == "trajectory":
                            z = (z[:, None, :] @ mb_mixed_operator)[:, 0, :]
                        z = controlled(z, weights, args.correction_control, control_generator)
                    actor_start = time.perf_counter()

                    # The leader's step along the hypergradient.
                    direct = (weights * surrogate).sum()
                    correction = (weights * 2 * z * surrogate).sum()
                    if args.leader == "released" and args.ihvp != "none":
                        response = -torch.where(finite, response, 0.0)  # the released code minimises f = -J
                        returns_dot = lambda_returns(response, torch.zeros_like(weights), mb_discounts, mb_operator)
                        row_slopes = released_mixed_weights(
                            ratio.detach(), advantages, returns_dot - response[:, :-1],
                            mb_returns - new_values[:, :-1], response[:, :-1], args.clip_f,
                        )  # fmt: skip
                        correction = (mb_valid * row_slopes * ratio).sum()
                    loss = -(weights * (1 + 2 * z) * surrogate).sum() - args.ent_coef * entropy
                    if epoch == args.update_epochs - 1:
                        with torch.no_grad():
                            clipped = (weights * ((ratio - 1).abs() > args.clip_coef)).sum()
                            kl, old_kl = (weights * ((ratio - 1) - logratio)).sum(), -(weights * logratio).sum()
                            policy_loss, critic_loss = -(weights * surrogate).sum(), weights.flatten() @ errors**2
                            statistics.append(torch.stack([critic_loss, policy_loss, entropy, old_kl, kl, clipped]))
                        if len(statistics) == args.num_minibatches:  # the last minibatch of the rollout
                            diagnostics = leader_diagnostics(agent.actor_parameters(), direct, correction, weights, z)
                            diagnostics["inner_gradient_norm_before"] = gradient_norm_before
                            diagnostics["inner_gradient_norm_after"] = inner_gradient_norm(jacobian, weights, mb_returns)
                            if args.ihvp != "none":
                                diagnostics |= solver_diagnostics(curvature, b, v, args.damping)
                    theta.grad.zero_()
                    if args.leader == "released":
                        parameters = agent.actor_parameters()
                        parts = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (-direct - args.ent_coef * entropy, correction))
                        for parameter, gradient in zip(parameters, bounded(*parts, args.ihvp_bound)):
                            parameter.grad.copy_(gradient)
                    else:
                        loss.backward()
                    actor_optimiser.update()
                    nested_time += leader_start - nested_start
                    response_time += actor_start - response_start
            names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
            losses = dict(zip((f"losses/{name}" for name in names), torch.stack(statistics).mean(0).tolist()))
            losses |= {f"bilevel/{name}": float(diagnostics.get(name, math.nan)) for name in DIAGNOSTICS}
            losses |= {"bilevel/fallbacks": float(fallbacks)}
            losses |= {"time/nested_critic": nested_time, "time/response": response_time}

            # ---- Training: log and checkpoint (shared) ---------------------------------------------------------
            targets, predictions = (x[b_valid.bool()] for x in (returns, values[:-1]))
            losses["losses/explained_variance"] = float(1 - (targets - predictions).var() / targets.var())
            now = time.perf_counter()
            times = {
                "charts/learning_rate": optimisers[0].param_groups[0]["lr"],
                "time/env": env_time,
                "time/policy": update_start - rollout_start - env_time,
                "time/update": now - update_start,
            }
            run.log(iteration * batch_size, losses | times, episodes)
            if iteration % args.checkpoint_every == 0 or iteration == num_iterations or run.stop_signal:
                state = {"agent": agent.state_dict(), "optimisers": [each.state_dict() for each in optimisers]}
                stats = {"obs_stats": obs_stats.state_dict(), "return_stats": return_stats.state_dict()}
                run.save_checkpoint(state | stats)
            if run.stop_signal:
                run.stop()

        # ---- Training: model, evaluation, video (shared) -------------------------------------------------------
        run.end_training()
        envs.close()
        model = {
            "script": SCRIPT,
            "env_id": args.env_id,
            "agent": agent.cpu().state_dict(),
            "actor_width": args.actor_width,
            "critic_width": args.critic_width,
            "obs_mean": torch.as_tensor(obs_stats.mean),
            "obs_std": torch.as_tensor(obs_stats.std),
            **save_action_space(action_space),
        }
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
