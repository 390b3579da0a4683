"""SAC and STSAC: Stackelberg soft actor-critic (Zheng et al. 2022, arXiv:2109.12286), off-policy.

`stddpg.py` with a stochastic actor a = tanh(mean + std noise), two critics and an entropy term of the fixed weight eta:

    f(theta, omega) = mean (eta log pi(a|s) - min_i Q_i(s, a)),  a ~ pi_theta(.|s)           eq. (9)  -> policy_loss
    L(theta, omega) = sum_i mean (Q_i(s, a) - y)^2                                               (10)  -> critic_gradient
    y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - eta log pi(a'|s')),  a' ~ pi_theta(.|s')      -> backup

One leads, `--leader`: it descends its total derivative, the other its own gradient, both at the old point (Algorithm 1).

    actor   g = d_theta f - (d_theta d_omega L) x,    (d2_omega L + lambda I) x = d_omega f      eq. (15), Prop. 2
    critic  g = d_omega L - (d_omega d_theta f) x,    (d2_theta f + lambda I) x = d_theta L      eq. (16)

theta reaches L through y alone, so (d_theta d_omega L) x = -2 mean z d_theta y with z = sum_i d_omega Q_i(s, a).x_i, and
**the actor descends f + 2 mean z y**. d2_omega L has a block for each critic, and d_omega f touches critic i only where
it is the least. `--ihvp kernel`, the Gauss-Newton part, needs the rows alone: z_i = (lambda I + K_i)^-1 J_i b_i with
K_i = 2/n J_i J_i^T -> kernel_response. `--ihvp cg` is the paper's solve with the full, indefinite Hessian and a guard
-> critic_hessian, actor_hessian, conjugate_gradient, critic_correction.

Controls: `--leader none-simultaneous` drops the implicit term and nothing else; `none-sequential` is SAC as usual, the actor
after the critics. docs/stackelberg.md lists what differs from the paper.

    python stsac.py --env-id HalfCheetah-v4
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
    """write model.pt (weights) at the end"""
    eval_every: int = 10000
    """environment steps between two evaluations, in [1, inf)"""
    eval_episodes: int = 10
    """episodes of an evaluation, without exploration, in [0, 10000]; 0: never"""
    capture_video: bool = False
    """film one such episode after training through Gymnasium (MuJoCo needs EGL, or MUJOCO_GL=osmesa)"""

    # Algorithm
    env_id: str = "HalfCheetah-v4"
    """any task with a bounded Box action space; also namespace/Name-v0 and module:Name-v0"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """who steps the environments; auto: EnvPool where it has the task"""
    env_threads: int = 0
    """EnvPool threads, in [0, 1024]; 0: one for each usable core, at most num_envs"""
    total_timesteps: int = 400000
    """environment steps in all, in [1, inf); rounded down to whole iterations; 400000 in the paper's figures"""
    num_envs: int = 1
    """parallel environments, in [1, 65536]"""
    num_steps: int = 250
    """steps of each environment in an iteration, which ends with a row of metrics.csv, in [1, inf)"""
    leader: Literal["actor", "critic", "none-simultaneous", "none-sequential"] = "actor"
    """who follows its total derivative; none-simultaneous: nobody; none-sequential: nobody, the actor steps after the critic"""
    ihvp: Literal["kernel", "cg"] = "kernel"
    """solve if the actor leads: kernel, exact with the Gauss-Newton Hessian, or cg, the paper's; a leading critic has cg"""
    regularisation: float = 10.0
    """lambda, added to the follower's Hessian, in [0, inf]; inf: none-simultaneous; the paper has 500, its code 0"""
    regularisation_decay: float = math.inf
    """environment steps in which lambda falls by the factor e, in (0, inf]; 100000 in the paper's code"""
    cg_iterations: int = 10
    """iterations of conjugate gradient, in [1, 10000]; 10 in the paper"""
    follower_steps: int = 1
    """m, steps of the follower for one of the leader, in [1, 1000000]; 1 in the paper; the critic follows if nobody leads"""
    learning_rate: float = 1e-3
    """Adam step size of the actor, in (0, inf)"""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic, in (0, inf)"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    polyak: float = 0.995
    """what the target keeps of itself in an update, in [0, 1]"""
    batch_size: int = 100
    """transitions in a minibatch, in [1, inf)"""
    buffer_size: int = 1000000
    """latest transitions that minibatches are drawn from, in [1, inf)"""
    random_steps: int = 10000
    """environment steps with uniformly random actions, in [0, inf)"""
    learning_starts: int = 1000
    """environment steps before the first update, in [0, inf)"""
    update_every: int = 50
    """steps of each environment between two blocks of updates, in [1, inf); a block has one update for each new transition"""
    entropy_coef: float = 0.2
    """eta, the fixed weight of the entropy, in [0, inf)"""
    actor_width: int = 256
    """units in each of the actor's two hidden layers, in [1, 65536]"""
    critic_width: int = 256
    """units in each of the critic's two hidden layers, in [1, 65536]"""


# ---- Environments ----------------------------------------------------------------------------------------------
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


# ---- Networks --------------------------------------------------------------------------------------------------
def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden ReLU layers with PyTorch's initial weights, as in Spinning Up, which the paper builds on."""
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def numpy_mlp(network: nn.Sequential) -> Callable[[np.ndarray], np.ndarray]:
    """The network as it is now, in numpy: x (n, inputs) -> (n, outputs). For the few rows of a step, PyTorch takes four
    times as long, and a GPU longer still."""
    parameters = [parameter.detach().cpu().numpy() for parameter in network.parameters()]
    *hidden, output = zip(parameters[::2], parameters[1::2])

    def forward(x: np.ndarray) -> np.ndarray:
        for weight, bias in hidden:
            x = np.maximum(x @ weight.T + bias, 0.0)
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


# ---- Policy ----------------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """A squashed Gaussian actor, two critics Q(s, a) and their targets. The actions lie in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args):
        super().__init__()
        self.entropy_coef, self.noise_dim = args.entropy_coef, action_dim
        self.actor = mlp(obs_dim, args.actor_width, 2 * action_dim)
        self.critics = nn.ModuleList([mlp(obs_dim + action_dim, args.critic_width, 1) for _ in range(2)])
        self.targets = nn.ModuleList([mlp(obs_dim + action_dim, args.critic_width, 1) for _ in range(2)])
        self.targets.requires_grad_(False)
        self.targets.load_state_dict(self.critics.state_dict())

    def policy(self, outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (n, A) for the actor's outputs (n, 2A), means and log standard deviations, and standard normal noise
        (n, A); and what each costs besides its value (n,), eta log pi(a|s).

        log pi has the term -sum log(1 - tanh(u)^2) of the squashing (Haarnoja et al. 2018, appendix C), in the form
        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) that does not underflow.
        """
        mean, logstd = outputs.chunk(2, -1)
        logstd = logstd.clamp(-20, 2)
        u = mean + logstd.exp() * noise
        gaussian = -0.5 * noise * noise - logstd - 0.5 * math.log(2 * math.pi)
        squashing = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return torch.tanh(u), self.entropy_coef * (gaussian - squashing).sum(-1)

    def act(self, outputs: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """Sampled actions (N, A) for the actor's outputs (N, 2A) and standard normal noise (N, A); 0: the squashed means."""
        mean, logstd = np.split(outputs, 2, -1)
        return np.tanh(mean + np.exp(np.clip(logstd, -20, 2)) * noise)


def check_action_space(env_id: str, space: gym.spaces.Space) -> None:
    """Raise BadInput unless the actions are vectors of numbers between bounds."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
        raise BadInput(f"--env-id {env_id!r} has the action space {space}; this script needs a flat Box with finite bounds")


def task_actions(actions: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """Actions (..., A) in [-1, 1] as the task takes them: spread over its box."""
    spread = space.low + 0.5 * (actions + 1.0) * (space.high - space.low)
    return np.clip(spread, space.low, space.high).astype(space.dtype)


# ---- Derivatives of a ReLU stack -------------------------------------------------------------------------------
class ReluStack:
    """A Linear / ReLU stack at n rows, with its derivatives as products; tests/ holds the torch.func versions.

    The gradient of an output in a layer's weights is the outer product of two vectors: its derivative by the layer's
    outputs (`deltas`) and the layer's inputs (`inputs`). Second derivatives take the slope of ReLU as constant, which it
    is but for a set of measure zero. Parameters are lists in the order of `parameters()`.
    """

    def __init__(self, network: nn.Sequential, rows: Tensor):
        """One forward pass at rows (n, D), without a graph; keeps the outputs (n, O) and the inputs of each layer."""
        self.linears, self.inputs = [layer for layer in network if isinstance(layer, nn.Linear)], [rows]
        with torch.no_grad():
            for linear in self.linears[:-1]:
                self.inputs.append(torch.relu_(linear(self.inputs[-1])))
            self.outputs = self.linears[-1](self.inputs[-1])

    def parameters(self) -> list[Tensor]:
        """Weight and bias of each layer."""
        return [parameter for linear in self.linears for parameter in (linear.weight, linear.bias)]

    @torch.no_grad()
    def deltas(self, slopes: Tensor) -> list[Tensor]:
        """The derivative of sum_k slopes_k.outputs_k by the outputs of each layer (n, width): slopes (n, O)."""
        deltas = [slopes]
        for linear, hidden in zip(self.linears[:0:-1], self.inputs[:0:-1]):
            deltas.insert(0, threshold_backward(deltas[0] @ linear.weight, hidden, 0))
        return deltas

    @functools.cached_property
    def unit(self) -> list[Tensor]:
        """`deltas` of the sum of a scalar output: one backward pass, of which J and its products are made."""
        return self.deltas(torch.ones_like(self.outputs))

    @torch.no_grad()
    def vjp(self, u: Tensor) -> list[Tensor]:
        """J^T u for the Jacobian J of a scalar output in the parameters: u (n,)."""
        parts = []
        for inputs, delta in zip(self.inputs, self.unit):
            delta = delta * u[:, None]
            parts += [delta.T @ inputs, delta.sum(0)]
        return parts

    @torch.no_grad()
    def jvp(self, v: list[Tensor]) -> Tensor:
        """J v (n,)."""
        layers = zip(v[::2], v[1::2], self.inputs, self.unit)
        return sum((torch.addmm(bias, inputs, weight.T) * delta).sum(1) for weight, bias, inputs, delta in layers)

    @torch.no_grad()
    def kernel(self, other: "ReluStack") -> Tensor:
        """J J_other^T (n, m) of one critic at two sets of rows, layer by layer."""
        layers = zip(self.inputs, self.unit, other.inputs, other.unit)
        return sum((a @ b.T + 1) * (c @ d.T) for a, c, b, d in layers)

    @torch.no_grad()
    def move(self, v: list[Tensor]) -> list[Tensor]:
        """How the inputs of the later layers, and the outputs, move with the parameters along v (forward mode)."""
        moved = []
        for k, (linear, weight, bias) in enumerate(zip(self.linears, v[::2], v[1::2])):
            image = torch.addmm(bias, self.inputs[k], weight.T)
            if k:
                image.addmm_(moved[-1], linear.weight.T)
            moved.append(threshold_backward(image, self.inputs[k + 1], 0) if k + 1 < len(self.linears) else image)
        return moved

    @torch.no_grad()
    def hessian_product(self, deltas: list[Tensor], bend: Callable[[Tensor], Tensor], v: list[Tensor]) -> list[Tensor]:
        """H v for the Hessian H in the parameters of a loss of the outputs (Pearlmutter 1994): the gradient's own
        forward-mode derivative. deltas: of the loss's slopes; bend: the product with its Hessian in the outputs (n, O)."""
        *moved, image = self.move(v)
        turned, parts = bend(image), []
        for k in reversed(range(len(self.linears))):
            weight = turned.T @ self.inputs[k]
            if k:
                weight.addmm_(deltas[k].T, moved[k - 1])
            parts = [weight, turned.sum(0), *parts]
            if k:
                turned = torch.addmm(deltas[k] @ v[2 * k], turned, self.linears[k].weight)
                turned = threshold_backward(turned, self.inputs[k], 0)
        return parts

    @torch.no_grad()
    def slope_gradient(self, u: Tensor, direction: Tensor) -> list[Tensor]:
        """The gradient in the parameters of sum_k u_k d output_k / d row_k . direction_k: u (n,), direction (n, D)."""
        parts = []
        for k, (linear, delta) in enumerate(zip(self.linears, self.unit)):
            parts += [(delta * u[:, None]).T @ direction, torch.zeros_like(linear.bias)]
            if k + 1 < len(self.linears):
                direction = threshold_backward(direction @ linear.weight.T, self.inputs[k + 1], 0)
        return parts


threshold_backward = torch.ops.aten.threshold_backward  # slope where the hidden unit is above 0, else 0


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One vector (P,) of the numbers of all tensors."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def unflatten(vector: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: views of a vector (P,) in the shapes of the parameters."""
    parameters = list(parameters)
    return [part.view(each.shape) for part, each in zip(vector.split([each.numel() for each in parameters]), parameters)]


# ---- The two players' objectives -------------------------------------------------------------------------------
def backup(agent: Agent, rewards: Tensor, discounts: Tensor, next_obs: Tensor, noise: Tensor) -> Tensor:
    """y (n,), differentiable in theta: rewards, discounts = gamma (1 - terminated) (n,), next_obs (n, D).

    The targets' parameters carry no graph, their action input does. Were y detached, d_theta d_omega L would be 0.
    """
    actions, costs = agent.policy(agent.actor(next_obs), noise)
    rows = torch.cat([next_obs, actions], 1)
    values = torch.cat([target(rows) for target in agent.targets], 1).amin(1)
    return rewards + discounts * (values - costs)


def stacks(critics: Iterable[nn.Sequential], rows: Tensor) -> list[ReluStack]:
    """Each critic at the rows (n, D + A) of observations and actions."""
    return [ReluStack(critic, rows) for critic in critics]


def td_errors(data: list[ReluStack], backups: Tensor) -> Tensor:
    """Q_i(s, a) - y (E, n) of E critics."""
    return torch.cat([critic.outputs for critic in data], 1).T - backups.detach()


def critic_gradient(data: list[ReluStack], errors: Tensor) -> list[Tensor]:
    """d_omega L, L = sum_i mean (Q_i(s, a) - y)^2: errors (E, n)."""
    return [part for critic, error in zip(data, errors) for part in critic.vjp(2 / len(error) * error)]


def led_critics(agent: Agent, obs: Tensor, actions: Tensor) -> tuple[list[ReluStack], Tensor, Tensor]:
    """The critics at the actor's own actions (n, A); which of them is the least, as 0/1 (E, n); and d_a min_i Q_i (n, A)."""
    led = stacks(agent.critics, torch.cat([obs, actions.detach()], 1))
    values = torch.cat([critic.outputs for critic in led], 1)
    least = (torch.arange(len(led), device=obs.device)[:, None] == values.argmin(1)).to(values)
    with torch.no_grad():
        weights = [critic.linears[0].weight[:, obs.shape[1] :] for critic in led]
        slopes = sum((critic.unit[0] @ weight) * mask[:, None] for critic, weight, mask in zip(led, weights, least))
    return led, least, slopes


def least_values(critics: list[ReluStack]) -> Tensor:
    """min_i Q_i (n,)."""
    return torch.cat([critic.outputs for critic in critics], 1).amin(1)


def policy_loss(actions: Tensor, costs: Tensor, slopes: Tensor) -> Tensor:
    """A scalar with the gradient d_theta f, f = mean (costs - min_i Q_i(s, a)): actions, slopes = d_a min_i Q_i (n, A).
    The deterministic policy gradient (Silver et al. 2014): a critic's own graph is not needed."""
    return (costs - (slopes * actions).sum(1)).mean()


def follower_gradient(
    agent: Agent, follower: str, pairs: Tensor, obs: Tensor, noise: Tensor, following: tuple[Tensor, ...]
) -> list[Tensor]:
    """The gradient of the follower's own objective where both players are now: d_omega L, or d_theta f of the actor.
    pairs (n, D + A) of observations and actions; obs (n, D), noise for the actor's own; following: of `backup`."""
    if follower == "critic":
        with torch.no_grad():
            backups = backup(agent, *following)
        data = stacks(agent.critics, pairs)
        return critic_gradient(data, td_errors(data, backups))
    actions, costs = agent.policy(agent.actor(obs), noise)
    loss = policy_loss(actions, costs, led_critics(agent, obs, actions)[2])
    return list(torch.autograd.grad(loss, list(agent.actor.parameters())))


# ---- Stackelberg mathematics -----------------------------------------------------------------------------------
@dataclass
class Solve:
    """How (H + lambda I) x = b was solved."""

    stopped: bool  # by the guard, at negative curvature
    plain: bool | Tensor  # x = 0: the leader's step is the individual gradient
    residual: Callable[[], Tensor]  # |(H + lambda I) x - b| / |b|, computed when it is asked for


def critic_response(
    data: list[ReluStack], errors: Tensor, led: list[ReluStack], least: Tensor, damping: float | Tensor, ihvp: str,
    iterations: int,
) -> tuple[Tensor, Solve]:
    """z = d_omega Q_i(s, a).x of each critic (E, n), where (d2_omega L + damping I) x = b = d_omega f, by `ihvp`.

    (d_theta d_omega L) x = -2 mean sum_i z_i d_theta y: the actor that leads descends f + 2 mean (sum_i z_i) y.
    """
    if ihvp == "kernel":
        z = kernel_response(data, led, least, damping)
        return z, Solve(False, ~z.any(), lambda: kernel_residual(data, led, least, z, damping))
    b = flatten(part for critic, mask in zip(led, least) for part in critic.vjp(-mask / len(mask)))
    x, solve = guarded_solve(critic_hessian(data, errors), b, damping, iterations)
    each_x = x.view(len(data), -1)
    return torch.stack([critic.jvp(unflatten(own, critic.parameters())) for critic, own in zip(data, each_x)]), solve


def kernel_response(data: list[ReluStack], led: list[ReluStack], least: Tensor, damping: float | Tensor) -> Tensor:
    """z of `critic_response` (E, n) exactly, for the Gauss-Newton H = 2/n J^T J and b = -1/n sum_k least_k dQ(s_k, mu(s_k)).

    J (H + damping I)^-1 = (K + damping I)^-1 J with K = 2/n J J^T (n, n), so x is never formed: the kernels J J^T and
    J J_led^T of n x n numbers, and a Cholesky factor in float64, are all there is. H is positive semidefinite, so any
    damping > 0 makes the solve safe; z is 0, the individual gradient, where the system is not finite.
    """
    n, right, systems = least.shape[1], [], []
    for critic, other, mask in zip(data, led, least):
        right.append(-(critic.kernel(other) @ mask) / n)
        systems.append(critic.kernel(critic) * (2 / n))
    systems, right = torch.stack(systems).double(), torch.stack(right).double()[..., None]
    systems.diagonal(dim1=1, dim2=2).add_(damping)
    factors, failed = torch.linalg.cholesky_ex(systems)
    # Two triangular solves: cholesky_solve of two critics' systems cannot be captured in a CUDA graph.
    half = torch.linalg.solve_triangular(factors, right, upper=False)
    z = torch.linalg.solve_triangular(factors.mT, half, upper=True)[..., 0].to(least)
    return torch.where((failed == 0)[:, None] & z.isfinite(), z, 0.0)


def kernel_residual(
    data: list[ReluStack], led: list[ReluStack], least: Tensor, z: Tensor, damping: float | Tensor
) -> Tensor:
    """|(H + damping I) x - b| / |b| in the space of the parameters, for the x = (b - 2/n J^T z) / damping that belongs to
    the z (E, n) of `kernel_response`; it is |2/n J^T (J x - z)| / |b|."""
    n, residual, right = least.shape[1], [], []
    for critic, other, mask, each in zip(data, led, least, z):
        b, response = other.vjp(-mask / n), critic.vjp(2 / n * each)
        x = [(first - second) / damping for first, second in zip(b, response)]
        residual += critic.vjp(2 / n * (critic.jvp(x) - each))
        right += b
    return flatten(residual).norm() / flatten(right).norm()


def critic_hessian(data: list[ReluStack], errors: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> d2_omega L v, (P,) -> (P,): H = 2/n sum_k [dQ dQ^T + (Q - y) d2Q], a block for each critic. Indefinite."""
    n = errors.shape[1]
    deltas = [[delta * (2 / n * error)[:, None] for delta in critic.unit] for critic, error in zip(data, errors)]

    def product(v: Tensor) -> Tensor:
        products = []
        for critic, delta, own in zip(data, deltas, v.view(len(data), -1)):
            products += critic.hessian_product(delta, lambda image: 2 / n * image, unflatten(own, critic.parameters()))
        return flatten(products)

    return product


def actor_response(
    agent: Agent, obs: Tensor, noise: Tensor, slopes: Tensor, b: Tensor, damping: float | Tensor, iterations: int
) -> tuple[Tensor, Solve]:
    """x (P,) with (d2_theta f + damping I) x = b = d_theta L, for the critic that leads: slopes = d_a min_i Q_i (n, A)."""
    return guarded_solve(actor_hessian(agent, obs, noise, slopes), b, damping, iterations)


def actor_hessian(agent: Agent, obs: Tensor, noise: Tensor, slopes: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> d2_theta f v, (P,) -> (P,), at obs (n, D): the Hessian of `policy_loss` with fixed slopes (n, A).

    A ReLU critic is piecewise linear in the action, so its slopes do not change and the curvature is the actor's alone.
    Indefinite as well, and f may have no minimum: here lambda is needed. f is what the actor minimises; on the Hessian
    of -f, as Algorithm 2 has it, lambda would make the matrix singular.
    """
    actor = ReluStack(agent.actor, obs)
    outputs, parameters = actor.outputs.requires_grad_(), list(agent.actor.parameters())
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(policy_loss(*agent.policy(outputs, noise), slopes), outputs, create_graph=True)
    deltas = actor.deltas(slope.detach())

    def bend(image: Tensor) -> Tensor:
        return torch.autograd.grad(slope, outputs, image, retain_graph=True)[0]

    return lambda v: flatten(actor.hessian_product(deltas, bend, unflatten(v, parameters)))


def critic_correction(
    agent: Agent, obs: Tensor, noise: Tensor, led: list[ReluStack], least: Tensor, x: Tensor
) -> list[Tensor]:
    """(d_omega d_theta f) x for x (P,) in the space of theta. Along x the actions move by t, and omega is in f only as
    -mean min_i Q_i(s, mu(s)): it is the gradient in omega of -mean d_a min_i Q_i . t. Two forward modes, no graph."""
    actor = ReluStack(agent.actor, obs)
    image = actor.move(unflatten(x, agent.actor.parameters()))[-1]
    moved = torch.func.jvp(lambda outputs: agent.policy(outputs, noise)[0], (actor.outputs,), (image,))[1]
    direction = torch.cat([torch.zeros_like(obs), moved], 1)
    return [part for critic, mask in zip(led, least) for part in critic.slope_gradient(-mask / len(mask), direction)]


def guarded_solve(
    product: Callable[[Tensor], Tensor], b: Tensor, damping: float | Tensor, iterations: int
) -> tuple[Tensor, Solve]:
    """x (P,) with (H + damping I) x = b by `conjugate_gradient`, H given by its `product`."""

    def damped(v: Tensor) -> Tensor:
        return product(v) + damping * v

    x, stopped = conjugate_gradient(damped, b, iterations)
    return x, Solve(stopped, not x.any(), lambda: (damped(x) - b).norm() / b.norm())


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


def leader_diagnostics(own: Tensor, total: Tensor) -> dict[str, float]:
    """The leader's own gradient (P,) and its total one in numbers; no multiplier where the own one is 0."""
    return {
        "bilevel/direct_norm": own.norm().item(),
        "bilevel/correction_norm": (total - own).norm().item(),
        "bilevel/multiplier": (total.norm() / own.norm()).item() if own.any() else math.nan,
        "bilevel/cosine": torch.cosine_similarity(total, own, 0).item(),
    }


# ---- CUDA graph ------------------------------------------------------------------------------------------------
class GraphedUpdate:
    """`update(*inputs)` on a CUDA device by one launch in place of one for each of its hundred and more small kernels. The
    first three calls launch every kernel, the fourth captures the graph.

    A graph repeats kernels at fixed addresses. So `update` must change what it changes in place, and must not wait for the
    device; its inputs are copied into buffers of the graph's own, and the next call overwrites the tensors that it returns.
    """

    def __init__(self, update: Callable):
        self.update, self.inputs, self.calls = update, [], 0
        self.stream, self.graph, self.result = torch.cuda.Stream(), None, None

    def __call__(self, *inputs: Tensor):
        """What `update` returns for these inputs, whose shapes must always be the same."""
        if not self.inputs:
            self.inputs = [torch.zeros(each.shape, dtype=each.dtype, device="cuda") for each in inputs]
        torch._foreach_copy_(self.inputs, inputs)
        self.calls += 1
        if self.calls <= 3:  # libraries allocate and choose kernels in the first calls, which no graph may hold
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.result = self.update(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.update(*self.inputs)
        self.graph.replay()
        return self.result


# ---- Replay ----------------------------------------------------------------------------------------------------
class Replay:
    """All transitions of a run in a memory-mapped file, of which the last `window` serve. A row: observation, action,
    reward, next observation, terminated, in float32.

    The file is only appended to, so the rows that a checkpoint counts are never written again: a kill at any moment
    leaves them whole, and a resumed run overwrites what came after. Its space is taken at once: a full disk shows
    before the training, not as a crash in its midst.
    """

    def __init__(self, folder: Path, capacity: int, obs_dim: int, action_dim: int, window: int, size: int = 0):
        """For `capacity` rows in folder/transitions.bin, the first `size` of which are there. Raises OSError."""
        self.widths, self.window, self.size = [obs_dim + action_dim, 1, obs_dim, 1], window, size
        folder.mkdir(exist_ok=True)
        path, shape = folder / "transitions.bin", (capacity, sum(self.widths))
        with open(path, "ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            else:
                file.truncate(4 * math.prod(shape))
        self.file = np.memmap(path, dtype=np.float32, mode="r+", shape=shape)
        self.rows = np.asarray(self.file)

    def add(self, *columns: np.ndarray) -> None:
        """Append n transitions: obs (n, D), actions (n, A), rewards (n,), next_obs (n, D), terminated (n,)."""
        rows = np.column_stack(columns)
        self.rows[self.size : self.size + len(rows)] = rows
        self.size += len(rows)

    def sample(self, count: int, batch_size: int) -> tuple[Tensor, ...]:
        """`count` minibatches, drawn with replacement: observations with actions (count, batch_size, D + A), rewards
        (count, batch_size), next observations (count, batch_size, D), terminated (count, batch_size)."""
        index = torch.randint(max(0, self.size - self.window), self.size, (count * batch_size,)).numpy()
        rows = torch.from_numpy(self.rows.take(index, 0)).view(count, batch_size, sum(self.widths))
        pairs, rewards, next_obs, terminated = rows.split(self.widths, -1)
        return pairs, rewards.squeeze(-1), next_obs, terminated.squeeze(-1)


def replay_bytes(capacity: int, obs_dim: int, action_dim: int) -> int:
    """The size of the file of a `Replay`."""
    return 4 * capacity * (2 * obs_dim + action_dim + 2)


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
    """The trained policy in a model.pt: observations (..., D) -> its actions without exploration, as the task takes them."""
    model = torch.load(path, weights_only=True)
    space = gym.spaces.Box(model["action_low"].numpy(), model["action_high"].numpy())
    agent = Agent(model["obs_dim"], len(space.low), Args(**model["widths"]))
    agent.load_state_dict(model["agent"])
    actor = numpy_mlp(agent.actor)
    return lambda obs: task_actions(agent.act(actor(np.asarray(obs, dtype=np.float32)), 0.0), space)


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


# ---- Batch shape -----------------------------------------------------------------------------------------------
def check_batch_shape(args: Args) -> None:
    """Raise BadInput unless an iteration holds whole blocks and the chosen solve is defined."""
    if args.num_steps % args.update_every:
        raise BadInput(
            f"--update-every {args.update_every} does not divide num-steps = {args.num_steps}; "
            f"{nearest_divisors(args.num_steps, args.update_every)} would"
        )
    if args.leader == "actor" and args.ihvp == "kernel" and args.regularisation == 0:
        raise BadInput("--regularisation is 0.0, with --ihvp kernel it must be in (0, inf]: the Gauss-Newton Hessian is singular")


# ---- Training: set-up ------------------------------------------------------------------------------------------
METRICS = (
    "losses/qf_loss", "losses/q_values", "losses/actor_loss", "losses/actor_gradient_norm", "bilevel/direct_norm",
    "bilevel/correction_norm", "bilevel/multiplier", "bilevel/cosine", "bilevel/ihvp_residual",
    "bilevel/negative_curvature", "bilevel/plain_fraction", "bilevel/weight_mean", "bilevel/weight_std",
    "bilevel/regularisation", "bilevel/inner_gradient_norm_before", "bilevel/inner_gradient_norm_after",
)  # fmt: skip


def train(args: Args) -> Path:
    """Train and return the run folder. Raises BadInput before anything is created."""
    batch_size = args.num_envs * args.num_steps  # steps in an iteration
    if args.total_timesteps < batch_size:
        raise BadInput(
            f"--total-timesteps {args.total_timesteps} is less than one iteration of num-envs x num-steps = "
            f"{args.num_envs} x {args.num_steps} = {batch_size}; ask for at least {batch_size}"
        )
    check_batch_shape(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device(args.device)
    torch.set_num_threads(1)  # networks this small lose more to the hand-over between threads than they gain
    threadpoolctl.threadpool_limits(1, "blas")  # and so does numpy, which acts also where the networks live on a GPU
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
    obs_dim, action_dim = observation_space.shape[0], action_space.shape[0]
    capacity = args.total_timesteps // batch_size * batch_size
    if checkpoint:
        path, size = args.resume / "replay" / "transitions.bin", replay_bytes(capacity, obs_dim, action_dim)
        if not path.exists() or path.stat().st_size != size:
            raise BadInput(f"--resume {args.resume}: its {path.name} is missing or damaged, so it cannot continue")

    # ---- Training: networks and optimisers ---------------------------------------------------------------------
    agent = Agent(obs_dim, action_dim, args).to(device)
    theta, omega, target = (flat_view(part.parameters()) for part in (agent.actor, agent.critics, agent.targets))
    actor_optimiser = FlatAdam({"params": theta, "lr": args.learning_rate, "eps": 1e-8})
    critic_optimiser = FlatAdam({"params": omega, "lr": args.critic_learning_rate, "eps": 1e-8})
    thetas, omegas = list(agent.actor.parameters()), list(agent.critics.parameters())
    theta_grads, omega_grads = ([parameter.grad for parameter in each] for each in (thetas, omegas))
    follower = "actor" if args.leader == "critic" else "critic"
    follower_optimiser = actor_optimiser if follower == "actor" else critic_optimiser
    follower_grads = theta_grads if follower == "actor" else omega_grads
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        for optimiser, state in zip((actor_optimiser, critic_optimiser), checkpoint["optimisers"]):
            optimiser.load_state_dict(state)
        set_rng_state(checkpoint["rng"])
    leads = args.leader in ("actor", "critic") and args.regularisation < math.inf  # whether there is an implicit term
    damping = torch.zeros((), dtype=torch.float64, device=device)  # lambda
    stops, plain = torch.zeros(2, dtype=torch.int64, device=device)  # updates whose solve the guard stopped; without correction

    # ---- Training: one update ----------------------------------------------------------------------------------
    def update(
        pairs: Tensor, b_rewards: Tensor, b_next_obs: Tensor, b_terminated: Tensor, here: Tensor, there: Tensor,
        metrics: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Step both players, and the targets, by a minibatch of `Replay.sample` and the policy's noise in s and in s';
        with `metrics`, to put the diagnostics into."""
        b_obs, following = pairs[:, :obs_dim], (b_rewards, args.gamma * (1 - b_terminated), b_next_obs, there)

        # ---- Both players: their own gradients ------------------------------------------------------------------
        with torch.set_grad_enabled(leads):
            backups = backup(agent, *following)
        data = stacks(agent.critics, pairs)
        errors = td_errors(data, backups)
        torch._foreach_copy_(omega_grads, critic_gradient(data, errors))
        if args.leader == "none-sequential":
            critic_optimiser.update()
        actions, costs = agent.policy(agent.actor(b_obs), here)
        led, least, slopes = led_critics(agent, b_obs, actions)
        actor_loss = policy_loss(actions, costs, slopes)

        # ---- Leader: the implicit term --------------------------------------------------------------------------
        if metrics is not None:
            own = {"actor": flatten(torch.autograd.grad(actor_loss, thetas, retain_graph=True))}
            own["critic"] = flatten(omega_grads)
        if leads and args.leader == "actor":
            z, solve = critic_response(data, errors, led, least, damping, args.ihvp, args.cg_iterations)
            weights = 2 * z.sum(0)  # of the backups
            actor_loss = actor_loss + (weights * backups).mean()
        elif leads:
            b = flatten(torch.autograd.grad(-2 * (errors.sum(0) * backups).mean(), thetas))  # d_theta L
            x, solve = actor_response(agent, b_obs, here, slopes, b, damping, args.cg_iterations)
            torch._foreach_sub_(omega_grads, critic_correction(agent, b_obs, here, led, least, x))
        torch._foreach_copy_(theta_grads, torch.autograd.grad(actor_loss, thetas))
        if leads:
            stops.add_(solve.stopped)
            plain.add_(solve.plain)
        if metrics is not None:
            metrics["losses/qf_loss"] = (errors * errors).mean(1).sum().item()
            metrics["losses/q_values"] = data[0].outputs.mean().item()
            metrics["losses/actor_loss"] = (costs - least_values(led)).mean().item()
            metrics["losses/actor_gradient_norm"] = own["actor"].norm().item()
            metrics["bilevel/inner_gradient_norm_before"] = own[follower].norm().item()
        if metrics is not None and leads:
            total = flatten(theta_grads if args.leader == "actor" else omega_grads)
            metrics |= leader_diagnostics(own[args.leader], total)
            metrics["bilevel/ihvp_residual"] = solve.residual().item()
        if metrics is not None and leads and args.leader == "actor":
            metrics["bilevel/weight_mean"] = weights.mean().item()
            metrics["bilevel/weight_std"] = weights.std(correction=0).item()

        # ---- Steps: both players, then the follower alone, then the target --------------------------------------
        actor_optimiser.update()
        if args.leader != "none-sequential":
            critic_optimiser.update()
        for _ in range(args.follower_steps - 1):
            gradient = follower_gradient(agent, follower, pairs, b_obs, here, following)
            torch._foreach_copy_(follower_grads, gradient)
            follower_optimiser.update()
        if metrics is not None:
            gradient = follower_gradient(agent, follower, pairs, b_obs, here, following)
            metrics["bilevel/inner_gradient_norm_after"] = flatten(gradient).norm().item()
        with torch.no_grad():
            target.lerp_(omega, 1 - args.polyak)

    uses_cg = leads and (args.leader == "critic" or args.ihvp == "cg")  # its guard reads numbers back, which no graph may do
    undiagnosed_update = GraphedUpdate(update) if args.device == "cuda" and not uses_cg else update

    run, stored = Run(args, checkpoint), checkpoint["replay_size"] if checkpoint else 0
    try:
        replay = Replay(run.folder / "replay", capacity, obs_dim, action_dim, args.buffer_size, stored)
    except (OSError, OverflowError) as error:
        if not checkpoint:
            shutil.rmtree(run.folder)
        needed = replay_bytes(capacity, obs_dim, action_dim) / 2**20
        reason = error.strerror if isinstance(error, OSError) else "no file can be that large"
        raise BadInput(
            f"--run-dir {args.run_dir} cannot hold {needed:,.0f} MiB of replay: {reason}; name another folder"
        ) from error

    with run:
        obs, _ = envs.reset()
        ended = np.zeros(args.num_envs, dtype=bool)  # whether the last step ended an episode: the next row is its reset
        episode_returns, episode_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)
        num_iterations = args.total_timesteps // batch_size
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            env_time, policy_time, update_time, episodes = 0.0, 0.0, 0.0, []
            metrics, updates = dict.fromkeys(METRICS, math.nan), 0
            stops.zero_()
            plain.zero_()
            noise = torch.randn(args.num_steps, args.num_envs, action_dim).numpy()
            uniform = 2 * torch.rand(noise.shape).numpy() - 1
            for first in range(0, args.num_steps, args.update_every):
                # ---- Training: collect a block of transitions --------------------------------------------------
                block_start, block_env_time, size_before = time.perf_counter(), env_time, replay.size
                actor = numpy_mlp(agent.actor)
                for t in range(first, first + args.update_every):
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs  # with this one
                    actions = agent.act(actor(obs.astype(np.float32)), noise[t]) if step > args.random_steps else uniform[t]
                    env_start = time.perf_counter()
                    next_obs, reward, ends, cut, _ = envs.step(task_actions(actions, action_space))
                    env_time += time.perf_counter() - env_start
                    transition = ~ended
                    ended = ends | cut
                    # A reset row is no transition; a time limit is no end: its final observation is bootstrapped from.
                    columns = (obs, actions, reward, next_obs, ends)
                    replay.add(*columns if transition.all() else [column[transition] for column in columns])
                    episode_returns += np.where(transition, reward, 0.0)
                    episode_lengths += transition
                    obs = next_obs
                    if ended.any():
                        wall_time = time.perf_counter() - run.started
                        for index in ended.nonzero()[0].tolist():
                            mine = float(episode_returns[index]), int(episode_lengths[index])
                            episodes.append((step, wall_time, index, *mine))
                        episode_returns[ended], episode_lengths[ended] = 0.0, 0
                update_start = time.perf_counter()
                policy_time += update_start - block_start - (env_time - block_env_time)
                if step <= args.learning_starts:
                    continue

                # ---- Update ------------------------------------------------------------------------------------
                count = replay.size - size_before  # one update for each new transition; a row of resets is none
                arrays = [array.to(device) for array in replay.sample(count, args.batch_size)]
                arrays += torch.randn(2, count, args.batch_size, agent.noise_dim).to(device)  # of the policy in s and in s'
                if leads:
                    damping.fill_(args.regularisation * math.exp(-step / args.regularisation_decay))
                for index, minibatch in enumerate(zip(*arrays)):
                    # In an iteration's last update: of the last block, or of the one before if that is a row of resets.
                    if index == count - 1 and first >= args.num_steps - max(2, args.update_every):
                        update(*minibatch, metrics)
                    else:
                        undiagnosed_update(*minibatch)
                updates += count
                if args.device == "cuda":  # so that update_time holds the device's work; the next step waits for it in any case
                    torch.cuda.synchronize()
                update_time += time.perf_counter() - update_start

            # ---- Training: evaluate, log and checkpoint --------------------------------------------------------
            step, eval_start = iteration * batch_size, time.perf_counter()
            metrics["charts/eval_return"] = math.nan
            if args.eval_episodes and step // args.eval_every > (step - batch_size) // args.eval_every:
                actor = numpy_mlp(agent.actor)

                def policy(obs: np.ndarray) -> np.ndarray:
                    return task_actions(agent.act(actor(obs), 0.0), action_space)

                metrics["charts/eval_return"] = float(np.mean(evaluate(policy, args, args.eval_episodes)))
            if leads and updates:
                metrics["bilevel/negative_curvature"] = stops.item() / updates
                metrics["bilevel/plain_fraction"] = plain.item() / updates
                metrics["bilevel/regularisation"] = damping.item()
            metrics |= {
                "time/env": env_time,
                "time/policy": policy_time,
                "time/update": update_time,
                "time/evaluation": time.perf_counter() - eval_start,
            }
            run.log(step, metrics, episodes)
            if iteration % args.checkpoint_every == 0 or iteration == num_iterations or run.stop_signal:
                replay.file.flush()
                optimisers = [each.state_dict() for each in (actor_optimiser, critic_optimiser)]
                run.save_checkpoint({"agent": agent.state_dict(), "optimisers": optimisers, "replay_size": replay.size})
            if run.stop_signal:
                run.stop()

        # ---- Training: model, evaluation, video ----------------------------------------------------------------
        run.end_training()
        envs.close()
        model = {
            "script": SCRIPT,
            "env_id": args.env_id,
            "agent": agent.cpu().state_dict(),
            "obs_dim": obs_dim,
            "widths": {"actor_width": args.actor_width, "critic_width": args.critic_width},
            "action_low": torch.as_tensor(action_space.low).float(),
            "action_high": torch.as_tensor(action_space.high).float(),
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
        shutil.rmtree(run.folder / "replay", ignore_errors=True)
    return run.folder


# ---- Entry point (shared) --------------------------------------------------------------------------------------
if __name__ == "__main__":
    try:
        train(parse_args(Args))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
