"""BLPO for Atari games from pixels: bilevel policy optimisation (Prakash et al. 2025, arXiv:2505.11714v1) with an exact
hypergradient. The follower omega is the last layers of the critic (`--follower`), the leader theta is the actor:

    maximise J(theta, omega*(theta))   subject to   omega*(theta) in argmin_omega L_theta(omega)               eq. (4)

Algorithm 1, on each minibatch of whole chunks of consecutive steps:

    K times   omega <- omega - eta_omega grad_omega L                                     the nested critic
    b = grad_omega J            = J_V^T u,  u = (dG/dV)^T slope             -> lambda_returns_vjp, CriticJacobian.vjp
    v = (H + alpha I)^-1 b        H ~ grad^2_omega L, damped                -> exact_ihvp | nystrom_ihvp | cg_ihvp
    g = grad_theta J - (grad_theta,omega L) v                               -> the weights 1 + 2 z, z = J_V v
    theta <- theta + eta_theta g                                                          the hypergradient step
    phi <- phi - eta_phi grad_phi L                                         the critic's layers below the follower

    J = mean_t min(r_t A_t, clip(r_t) A_t),  A_t = G_t(omega) - stopgrad V(s_t),  G the lambda-return: omega enters J
        through the values that G bootstraps from;
    L = mean_t (G_t - V_omega(s_t))^2 with the targets G fixed for a rollout. As in `blpo_continuous.py`, the mixed term
        is what a target owes to its first action: -2 mean_t z_t A_t grad log pi(a_t|s_t).

With `--follower head` V is linear in omega, the setting of the paper's theorem: H is the Hessian itself, and since phi is
fixed while omega answers, the convolutions are evaluated once for K steps, the solve and the step on phi. `--ihvp none`
(z = 0) is the nested control, `ppo_atari.py --separate-trunks` the baseline, which has shuffled transitions, one step size and
clipped gradients and values; this script has chunks, a larger step for the follower, refreshed advantages and no such clipping.
The paper has no Atari experiments: the split of the critic, its step sizes and the damping are this project's choice.

    python blpo_atari.py --env-id Breakout-v5
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
    """seed of the games, the initial weights, the actions and the minibatches, in [0, 2147483647]"""
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
    """games played with actions drawn from the policy after training, in [0, 10000]"""
    capture_video: bool = False
    """film one such game"""
    torch_threads: int = 0
    """PyTorch's threads on a CPU, in [0, 1024]; 0: one for each usable core, far too many where other programs keep these
    busy; the number changes rounding"""
    compile: bool = False
    """compile the convolutional networks with torch.compile (a minute at the start)"""
    bf16: bool = False
    """the convolutional networks compute in bfloat16 (autocast; CUDA only)"""

    # Algorithm
    env_id: str = "Breakout-v5"
    """an Atari game by its name in EnvPool; ALE/Breakout-v5 and BreakoutNoFrameskip-v4 mean the same game"""
    env_threads: int = 0
    """EnvPool threads, in [0, 1024]; 0: one for each usable core, at most num_envs"""
    episodic_life: bool = True
    """a lost life is a termination for the learner; logged returns are of whole games all the same"""
    clip_reward: bool = True
    """learn from the sign of the points; logged returns are points all the same"""
    repeat_action_probability: float = 0.0
    """probability that the game takes the last action again (sticky actions), in [0, 1)"""
    total_timesteps: int = 10000000
    """environment steps of 4 frames in all, in [1, inf); rounded down to whole rollouts"""
    num_envs: int = 8
    """parallel games, in [1, 65536]"""
    num_steps: int = 128
    """steps of each game in a rollout, in [2, inf)"""
    learning_rate: float = 2.5e-4
    """Adam step size of the actor (leader), in (0, inf)"""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic's last layers (follower), in (0, inf)"""
    trunk_learning_rate: float = 2.5e-4
    """Adam step size of the critic's layers below the follower, in (0, inf)"""
    anneal_lr: bool = True
    """lower the step sizes linearly to 0"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of the advantages and of the critic's targets, in [0, 1]"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it counts as a termination"""
    chunk_length: int = 64
    """consecutive steps of one game that stay together; the lambda-return bootstraps at their end, in [2, inf)"""
    num_minibatches: int = 4
    """minibatches of whole chunks in an epoch, in [1, inf)"""
    update_epochs: int = 4
    """passes over a rollout, in [1, inf)"""
    nested_updates: int = 3
    """K, critic steps before each actor step, in [1, inf)"""
    follower: Literal["head", "last-two", "full"] = "head"
    """the critic's layers that the leader counts on: the linear head, the last two layers or all; what is below them takes
    one step on the same loss"""
    ihvp: Literal["exact", "nystrom", "cg", "none"] = "exact"
    """solver of the damped system; none: the nested control, without the hypergradient"""
    damping: float = 1.0
    """alpha, added to the curvature of the critic's loss, in (0, inf)"""
    nystrom_rank: int = 10
    """q, directions in the Nystrom approximation, in [1, inf); 12 bytes each for every parameter of the follower; more than
    513 add nothing"""
    cg_iterations: int = 10
    """conjugate gradient steps, in [1, inf)"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: float = 0.1
    """eps of the clipped ratio, in (0, inf)"""
    ent_coef: float = 0.01
    """weight of the entropy bonus, in [0, inf)"""


# ---- Atari games (shared) --------------------------------------------------------------------------------------
def game_name(env_id: str) -> str:
    """The game's name in EnvPool: Pong-v5 for ALE/Pong-v5, PongNoFrameskip-v4, PongDeterministic-v0 and Pong-v4 as well."""
    old = re.fullmatch(r"(?:ALE/)?(\w+?)(?:NoFrameskip|Deterministic)?-v[0-5]", env_id)
    return f"{old.group(1)}-v5" if old else env_id


def make_envs(
    env_id: str, num_envs: int, seed: int, threads: int = 1, episodic_life: bool = True, clip_reward: bool = True,
    repeat_action_probability: float = 0.0, **options,
) -> tuple[gym.vector.VectorEnv, int]:  # fmt: skip
    """Parallel games, preprocessed by EnvPool: 1 to 30 frames without an action at the start, the last with FIRE in games that
    have it; an action lasts 4 frames, of the last two the brighter pixels count; 84 x 84 grey pixels; the last 4 images are
    an observation.

    They reset on the step after an end (Gymnasium's NEXT_STEP mode). What a row of `step` means, by its flags:
    terminated without info["terminated"]  a lost life (with episodic_life); the game goes on after its reset row
    terminated with info["terminated"]     the game is over
    truncated                              the game is cut off after 27,000 steps
    The row after any of these is a reset: its action is ignored, reward and info["reward"] (the points, not clipped) are 0.
    In the reset after a lost life the game goes on for 1 to 30 such frames.

    Returns the games, already seeded, and the number of actions. Raises BadInput if there is no such game.
    """
    if envpool is None:
        raise BadInput(f"--env-id {env_id!r} needs EnvPool, which is not installed: pip install envpool")
    name, specs = game_name(env_id), envpool.registration.registry.specs
    games = [each for each in envpool.list_all_envs() if specs[each][0] == "envpool.atari"]
    if name not in games:
        near = difflib.get_close_matches(name, games, n=3)
        hint = f"the nearest known names are {', '.join(near)}" if near else "one is Pong-v5"
        raise BadInput(f"--env-id {env_id!r} is no Atari game of EnvPool; {hint}")
    envs = envpool.make(
        name, env_type="gymnasium", num_envs=num_envs, seed=seed, num_threads=threads, episodic_life=episodic_life,
        reward_clip=clip_reward, repeat_action_probability=repeat_action_probability,
        thread_affinity_offset=first_core(threads), **options,
    )  # fmt: skip
    return envs, int(envs.action_space.n)


def first_core(threads: int) -> int:
    """The core of EnvPool's first thread, the others following; -1: the system moves them about.

    Pinned threads take a quarter to a third less time a step where PyTorch works between the steps. They are pinned only
    if they fill all the cores that this process may use, so that several small runs never crowd on the same ones.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return cores[0] if cores and threads >= len(cores) == cores[-1] - cores[0] + 1 else -1


# ---- Atari networks (shared) -----------------------------------------------------------------------------------
def pixels(obs: Tensor) -> Tensor:
    """Grey values 0..255 (n, H, W, frames) -> floats (n, frames, H, W) in [0, 1], channels last in memory: there the
    convolutions and their gradients take three quarters of the time."""
    return (obs * (1 / 255)).permute(0, 3, 1, 2)


def nature_cnn(size: int = 84, channels: tuple[int, int, int] = (32, 64, 64), width: int = 512) -> nn.Sequential:
    """The network of Mnih et al. 2015 up to its last hidden layer: images (n, 4, size, size) -> features (n, width).

    Orthogonal weights (gain sqrt 2), zero biases.
    """
    first, second, third = channels
    side = ((size - 8) // 4 + 1 - 4) // 2 + 1 - 2  # of the last image
    layers = [
        nn.Conv2d(4, first, 8, stride=4), nn.ReLU(),
        nn.Conv2d(first, second, 4, stride=2), nn.ReLU(),
        nn.Conv2d(second, third, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(third * side * side, width), nn.ReLU(),
    ]  # fmt: skip
    return nn.Sequential(*(orthogonal(layer, math.sqrt(2)) for layer in layers))


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    """The layer with orthogonal weights and zero biases, if it has any."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Categorical actor, the softmax of its logits, and critic: linear heads on one convolutional trunk or on two."""

    def __init__(self, num_actions: int, separate_trunks: bool, bf16: bool = False, **shape):
        """`shape` goes to `nature_cnn`."""
        super().__init__()
        self.bf16 = bf16
        self.actor_trunk = nature_cnn(**shape)
        self.critic_trunk = nature_cnn(**shape) if separate_trunks else self.actor_trunk
        width = self.actor_trunk[-2].out_features
        self.actor_head = orthogonal(nn.Linear(width, num_actions), 0.01)
        self.critic_head = orthogonal(nn.Linear(width, 1), 1.0)

    def actor_parameters(self) -> list[nn.Parameter]:
        """theta: the actor's trunk, which a critic may share, and its head."""
        return [*self.actor_trunk.parameters(), *self.actor_head.parameters()]

    def critic_parameters(self) -> list[nn.Parameter]:
        """omega: all that is not theta."""
        shared = self.critic_trunk is self.actor_trunk
        return [*(() if shared else self.critic_trunk.parameters()), *self.critic_head.parameters()]

    def encode(self, trunk: nn.Module, images: Tensor) -> Tensor:
        """The features (n, width) of images (n, 4, H, W), float32 also where the trunk computes in bfloat16."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = trunk(images)
        return features if features.dtype == images.dtype else features.to(images.dtype)

    def logprob_and_entropy(
        self, features: Tensor, actions: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log pi(a|s) (n,) of actions (n,) at the actor's features (n, width), and the mean entropy in nats (scalar)
        under weights (n,) that sum to 1; by default all rows weigh the same."""
        logprobs = self.actor_head(features).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        chosen = logprobs.gather(-1, actions[:, None]).squeeze(-1)
        return chosen, entropy.mean() if weights is None else (weights * entropy).sum()


class BehaviourPolicy:
    """pi_old, the agent's policy as it is while a rollout is collected; the noise of all its steps is drawn at once.

    The action with the largest sum of logit and Gumbel noise is a sample of the softmax (Gumbel-max trick,
    Maddison et al. 2014). Values of a trunk that actor and critic share are kept, so that no image is seen twice.
    On a CUDA device a step is a graph, captured once: one launch in place of some twenty small kernels.
    """

    def __init__(self, agent: Agent, obs: Tensor):
        """For rollouts whose observations are put into the buffer obs (steps + 1, games, H, W, 4)."""
        self.agent, self.obs, self.shared = agent, obs, agent.critic_trunk is agent.actor_trunk
        device, num_actions, shape = obs.device, agent.actor_head.out_features, (len(obs) - 1, obs.shape[1])
        self.noise = torch.zeros(*shape, num_actions, device=device)
        self.logits = torch.zeros_like(self.noise)
        self.actions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.known = torch.zeros(shape if self.shared else (0, shape[1]), device=device)
        self.graph, self.clock = None, torch.zeros(1, dtype=torch.int64, device=device)  # the step that the graph is at
        if device.type == "cuda":
            self.capture()

    def begin(self) -> None:
        """A new rollout: draw its noise, standard Gumbel, on the CPU, so that a seed means the same on every device."""
        self.noise.copy_(-torch.empty(self.noise.shape).exponential_().log_())
        self.clock.zero_()

    def step(self, t: int | Tensor) -> None:
        """Choose the actions of step t, a number or a tensor of one."""
        features = self.agent.encode(self.agent.actor_trunk, pixels(self.obs[t].view(self.obs.shape[1:])))
        logits = self.agent.actor_head(features)
        self.logits[t], self.actions[t] = logits, (logits + self.noise[t]).argmax(-1)
        if self.shared:
            self.known[t] = self.agent.critic_head(features).squeeze(-1)

    @torch.inference_mode()
    def capture(self) -> None:
        """Make the graph of one step. It reads the agent's parameters where they lie, so it stays right when they change."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate and choose kernels in the first calls, which no graph may hold
            for _ in range(3):
                self.step(self.clock)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(self.clock)
            self.clock += 1

    @torch.inference_mode()
    def act(self, t: int) -> np.ndarray:
        """The actions (N,) of step t; the steps of a rollout come in order, after `begin`."""
        if self.graph is None:
            self.step(t)
        else:
            self.graph.replay()
        return self.actions[t].cpu().numpy()

    def logprobs(self) -> Tensor:
        """log pi_old(a|s) of the rollout (T, N), from the logits that were kept."""
        return self.logits.log_softmax(-1).gather(-1, self.actions[..., None]).squeeze(-1)

    @torch.no_grad()
    def values(self) -> Tensor:
        """V_old (T + 1, N) at the rollout's observations."""
        rest, agent = self.obs[len(self.known) :], self.agent
        batches = [agent.encode(agent.critic_trunk, pixels(part)) for part in rest.flatten(0, 1).split(256)]
        values = torch.cat([agent.critic_head(features).squeeze(-1) for features in batches])
        return torch.cat([self.known, values.view(len(rest), -1)])


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


# ---- Bilevel mathematics on Atari ------------------------------------------------------------------------------
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


def split_critic(agent: Agent, follower: str) -> tuple[nn.Sequential, nn.Sequential]:
    """The critic's layers below the follower (none for "full") and the follower, both made of the agent's own layers."""
    layers = [*agent.critic_trunk, agent.critic_head]
    cut = {"head": -1, "last-two": -3, "full": 0}[follower]  # in between are the ReLUs
    return nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:])


class CriticJacobian:
    """J = d V / d omega (n, P) of a follower of Conv2d, Linear and ReLU layers at n rows, as products with it.

    V is one number a row, so its gradient in the weight matrix of a linear layer is the outer product of two vectors: the
    derivative of V by the layer's outputs (`deltas`) and the layer's inputs (`inputs`). In a convolution it is a sum of
    such products over the positions, and kept whole (`gradients`): of the full critic's 1.7 million parameters only 78
    thousand are in convolutions. All products with J, J^T and J J^T are matrix multiplications; tests/ holds the
    torch.func versions. Vectors in parameter space are flat, in the order of `follower.parameters()`; q of them are
    rows of (q, P).
    """

    def __init__(self, follower: nn.Sequential, inputs: Tensor):
        """One forward pass at the follower's inputs (n, ...); keeps the values (n,) and what each layer takes and gives."""
        self.layers, self.inputs, self.outputs, x = [], [], [], inputs.detach()
        with torch.enable_grad():
            for layer in follower:
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    self.layers.append(layer)
                    self.inputs.append(x.detach())
                    self.outputs.append(layer(x))
                    x = self.outputs[-1]
                else:
                    x = layer(x)
        self.values = x.detach().squeeze(-1)

    @functools.cached_property
    def deltas(self) -> list[Tensor]:
        """The derivative of V by the outputs of each layer (n, outputs, ...): one backward pass, rows being independent."""
        return list(torch.autograd.grad(self.outputs[-1].sum(), self.outputs))

    @functools.cached_property
    def gradients(self) -> list[tuple[Tensor, Tensor] | None]:
        """Each row's gradient in a convolution's weights (n, outputs * inputs * k * k) and biases (n, outputs); None for a
        linear layer."""
        found = []
        for layer, inputs, deltas in zip(self.layers, self.inputs, self.deltas):
            if isinstance(layer, nn.Linear):
                found.append(None)
            else:
                patches = nn.functional.unfold(inputs, layer.kernel_size, stride=layer.stride)  # (n, inputs * k * k, positions)
                found.append(((deltas.flatten(2) @ patches.mT).flatten(1), deltas.sum((2, 3))))
        return found

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u for q vectors at once: (q, n) -> (q, P)."""
        parts = []
        for inputs, deltas, gradients in zip(self.inputs, self.deltas, self.gradients):
            if gradients is None:
                parts += [((u[:, :, None] * deltas).mT @ inputs).flatten(1), u @ deltas]
            else:
                parts += [u @ gradient for gradient in gradients]
        return torch.cat(parts, 1)

    def jvp(self, v: Tensor) -> Tensor:
        """J v for q vectors: (q, P) -> (q, n)."""
        result, start = self.values.new_zeros(len(v), len(self.values)), 0
        for layer, inputs, deltas, gradients in zip(self.layers, self.inputs, self.deltas, self.gradients):
            sizes = layer.weight.numel(), layer.bias.numel()
            weight, bias = v[:, start : start + sum(sizes)].split(sizes, 1)
            if gradients is None:
                moved = weight.view(len(v), *layer.weight.shape) @ inputs.T + bias[:, :, None]  # (q, outputs, n)
                result += (moved * deltas.T).sum(1)
            else:
                result += weight @ gradients[0].T + bias @ gradients[1].T
            start += sum(sizes)
        return result

    def kernel(self) -> Tensor:
        """J J^T (n, n), layer by layer."""
        return sum(
            (inputs @ inputs.T + 1) * (deltas @ deltas.T)
            if gradients is None
            else sum(gradient @ gradient.T for gradient in gradients)
            for inputs, deltas, gradients in zip(self.inputs, self.deltas, self.gradients)
        )


def hypergradient_memory(follower: nn.Sequential, rows: int, rank: int, size: int = 84) -> tuple[int, int]:
    """Bytes that one hypergradient takes at most, for `rank` Nystrom columns and for the convolutions of `rows` rows.

    A column is one number a parameter, held in float32 and in float64 (`nystrom_solver`). A convolution keeps the
    gradient of every row and, while it is formed, the patches of the images (n, 4, size, size).
    """
    parameters, width = sum(parameter.numel() for parameter in follower.parameters()), follower[-1].in_features
    kept, patches = 0, [0]
    for layer in follower:
        if isinstance(layer, nn.Conv2d):
            kernel, size = layer.weight[0].numel(), (size - layer.kernel_size[0]) // layer.stride[0] + 1
            kept, patches = kept + layer.weight.numel(), [*patches, kernel * size * size]
    return 12 * min(rank, width + 1) * parameters, 4 * rows * (kept + max(patches))


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


# ---- The run of an Atari script: what is not the algorithm (shared) --------------------------------------------
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


def load_policy(path: str | Path) -> Callable[..., np.ndarray]:
    """The trained policy in a model.pt: observations of `make_envs` (n, 4, 84, 84) -> actions (n,), drawn from the
    policy, or with greedy=True the most probable ones (these can get stuck in a game that waits for FIRE)."""
    model = torch.load(path, weights_only=True)
    agent = Agent(model["num_actions"], model["separate_trunks"]).to(memory_format=torch.channels_last)
    agent.load_state_dict(model["agent"])

    @torch.inference_mode()
    def policy(obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        images = pixels(torch.from_numpy(obs).permute(0, 2, 3, 1))
        logits = agent.actor_head(agent.encode(agent.actor_trunk, images))
        noise = 0.0 if greedy else -torch.empty_like(logits).exponential_().log_()
        return (logits + noise).argmax(-1).numpy()

    return policy


def evaluate(policy: Callable[[np.ndarray], np.ndarray], args, episodes: int) -> list[float]:
    """Points of one game in each of `episodes` fresh environments (seeds unlike the training's), started as in training."""
    seed = derived_seed(args.seed, 2**40)
    envs, _ = make_envs(
        args.env_id, episodes, seed, args.env_threads, args.episodic_life, args.clip_reward, args.repeat_action_probability
    )
    obs, _ = envs.reset()
    points, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():  # a game is cut off after 27,000 steps
        obs, _, _, cut, info = envs.step(policy(obs))
        points += np.where(running, info["reward"], 0.0)
        running &= ~((info["terminated"] != 0) | cut)
    envs.close()
    return points.tolist()


def film(env_id: str, model: Path | None, folder: Path, seed: int) -> None:
    """Film one game into `folder`; without a model, only draw one frame. For a child process, as drawing may kill."""
    if model is None:  # the caller says in one sentence what failed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    envs, _ = make_envs(env_id, 1, seed, render_mode="rgb_array")
    obs, _ = envs.reset()
    frame = envs.render()[0]
    if model is None:
        os._exit(0)
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    folder.mkdir(exist_ok=True)
    policy, over = load_policy(model), False
    with FFMPEG_VideoWriter(str(folder / "game.mp4"), frame.shape[1::-1], fps=15) as video:  # 15 steps of 4 frames a second
        while not over:
            video.write_frame(np.ascontiguousarray(envs.render()[0]))
            obs, _, _, cut, info = envs.step(policy(obs))
            over = info["terminated"][0] != 0 or cut[0]
    envs.close()


def film_in_child(*arguments) -> bool:
    """Whether `film(*arguments)` ran to its end in a process of its own."""
    child = multiprocessing.get_context("spawn").Process(target=film, args=arguments)
    child.start()
    child.join()
    return child.exitcode == 0


def derived_seed(seed: int, step: int) -> int:
    """A seed for environments that start at `step` of the run with `seed`; `seed` itself at step 0."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) % 2**31 if step else seed


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had where the networks live; no limit where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text()).group(1)) if meminfo.exists() else sys.maxsize


def check_machine(args) -> None:
    """Raise BadInput for what this machine cannot do: bfloat16 without CUDA, compiling without a compiler, a rollout that
    is larger than its memory."""
    if args.bf16 and args.device != "cuda":
        raise BadInput("--bf16 speeds up CUDA devices alone, but the networks live on the CPU; leave it out")
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if args.compile and args.device == "cpu" and not any(map(shutil.which, compilers)):
        raise BadInput("--compile needs a C++ compiler, and there is none on the PATH; leave it out or install g++")
    size = 2 * (args.num_steps + 1) * args.num_envs * 84 * 84 * 4  # the update gathers them once more
    free = available_memory(torch.device(args.device))
    if size > free:
        raise BadInput(
            f"--num-steps {args.num_steps} of --num-envs {args.num_envs} are {size / 1e9:.1f} GB of images, but "
            f"{free / 1e9:.1f} GB of memory are free; ask for fewer"
        )


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


# ---- Training on Atari: set-up (shared) ------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train and return the run folder. Raises BadInput before anything is created."""
    batch_size = args.num_envs * args.num_steps
    if args.total_timesteps < batch_size:
        raise BadInput(
            f"--total-timesteps {args.total_timesteps} is less than one rollout of num-envs x num-steps = "
            f"{args.num_envs} x {args.num_steps} = {batch_size}; ask for at least {batch_size}"
        )
    check_batch_shape(args)
    check_machine(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device(args.device)
    if args.device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.torch_threads = args.torch_threads or cores
        torch.set_num_threads(args.torch_threads)
        keep_freed_memory()

    checkpoint = load_checkpoint(args.resume) if args.resume else None
    start = checkpoint["global_step"] if checkpoint else 0
    envs, num_actions = make_envs(
        args.env_id, args.num_envs, derived_seed(args.seed, start), args.env_threads, args.episodic_life,
        args.clip_reward, args.repeat_action_probability,
    )  # fmt: skip
    if args.capture_video and not film_in_child(args.env_id, None, args.run_dir, args.seed):
        raise BadInput(f"--capture-video: EnvPool cannot draw {args.env_id} here; leave it out")

    # ---- Networks and optimisers -------------------------------------------------------------------------------
    agent = Agent(num_actions, separate_trunks=True, bf16=args.bf16).to(device, memory_format=torch.channels_last)
    below, follower = split_critic(agent, args.follower)
    parameters = sum(parameter.numel() for parameter in follower.parameters())
    if args.ihvp == "nystrom" and args.nystrom_rank > parameters:
        raise BadInput(
            f"--nystrom-rank {args.nystrom_rank} is more than the {parameters} parameters of the follower; ask for at most that"
        )
    rows = batch_size // args.num_minibatches * (args.chunk_length + 1) // args.chunk_length
    columns, convolutions = hypergradient_memory(follower, rows, args.nystrom_rank if args.ihvp == "nystrom" else 0)
    kernel = 20 * rows**2 if args.ihvp == "exact" else 0  # one in float32, two in float64
    free = available_memory(device)
    if columns + convolutions + kernel > free:
        raise BadInput(
            f"--nystrom-rank {args.nystrom_rank} with --follower {args.follower} takes rank x {parameters} parameters x 12 "
            f"bytes = {columns / 1e9:.2f} GB, {convolutions / 1e9:.2f} GB for the convolutions of {rows} rows and "
            f"{kernel / 1e9:.2f} GB for their kernel, but {free / 1e9:.2f} GB of memory are free; lower the rank, raise "
            "num-minibatches or use --follower head"
        )
    if args.follower == "full":  # products with J need all of float32
        torch.backends.cudnn.allow_tf32 = False
    if args.compile:
        for trunk in (agent.actor_trunk, below):
            trunk.forward = torch.compile(trunk.forward)
    actor_optimiser = torch.optim.Adam(agent.actor_parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    critic_optimiser = torch.optim.Adam(follower.parameters(), lr=args.critic_learning_rate, eps=1e-5, fused=True)
    optimisers = [actor_optimiser, critic_optimiser]
    if args.follower != "full":
        below_optimiser = torch.optim.Adam(below.parameters(), lr=args.trunk_learning_rate, eps=1e-5, fused=True)
        optimisers.append(below_optimiser)
    chunks = chunk_indices(args.num_steps, args.num_envs, args.chunk_length).to(device)
    sketch_generator = torch.Generator()  # its own, so that the solver changes no other random number

    # ---- Training on Atari: buffers and the loop (shared) ------------------------------------------------------
    step_sizes = [[group["lr"] for group in each.param_groups] for each in optimisers]
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        for each, state in zip(optimisers, checkpoint["optimisers"]):
            each.load_state_dict(state)
        set_rng_state(checkpoint["rng"])

    # The images live in bytes, where the networks live: (time, game, height, width, frame). The rest is in numpy arrays.
    # Row num_steps of obs is the next rollout's first.
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(args.num_steps + 1, args.num_envs, 84, 84, 4, dtype=torch.uint8, device=device)
    behaviour = BehaviourPolicy(agent, obs)
    rewards, terminated, truncated, valid = (np.zeros(shape, dtype=np.float32) for _ in range(4))
    ended = np.zeros(args.num_envs, dtype=bool)  # whether the last step ended a life or a game: the next row is a reset
    game_points, game_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)

    with Run(args, checkpoint) as run:
        obs[-1] = torch.from_numpy(envs.reset()[0]).to(device).permute(0, 2, 3, 1)
        num_iterations = args.total_timesteps // batch_size
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            for each, sizes in zip(optimisers, step_sizes):
                for group, size in zip(each.param_groups, sizes):
                    group["lr"] = size * (1 - (iteration - 1) / num_iterations) if args.anneal_lr else size

            # ---- Training on Atari: collect a rollout (shared) -------------------------------------------------
            rollout_start, env_time, episodes = time.perf_counter(), 0.0, []
            obs[0] = obs[-1]
            behaviour.begin()
            for t in range(args.num_steps):
                actions = behaviour.act(t)
                env_start = time.perf_counter()
                images, reward, ends, cut, info = envs.step(actions)
                env_time += time.perf_counter() - env_start
                transition, ended = ~ended, ends | cut
                rewards[t], terminated[t], truncated[t], valid[t] = reward, ends, cut, transition
                obs[t + 1] = torch.from_numpy(images).to(device).permute(0, 2, 3, 1)
                game_points += np.where(transition, info["reward"], 0.0)
                game_lengths += transition
                over = (info["terminated"] != 0) | cut  # the game, not only a life
                if over.any():
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    wall_time = time.perf_counter() - run.started
                    for index in over.nonzero()[0].tolist():
                        episodes.append((step, wall_time, index, float(game_points[index]), int(game_lengths[index])))
                    game_points[over], game_lengths[over] = 0.0, 0

            # ---- Training on Atari: values, advantages and targets of the rollout (shared) ---------------------
            update_start = time.perf_counter()
            b_actions, logprobs, values = behaviour.actions, behaviour.logprobs(), behaviour.values()
            b_rewards, b_terminated, b_truncated, b_valid = (
                torch.from_numpy(array).to(device) for array in (rewards, terminated, truncated, valid)
            )
            b_ended = torch.max(b_terminated, b_truncated)
            if not args.bootstrap_truncation:
                b_terminated = b_ended
            advantages = gae(b_rewards, values, b_terminated, b_ended, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]

            # ---- Update ----------------------------------------------------------------------------------------
            sketch_generator.manual_seed(derived_seed(args.seed, iteration))
            rows = chunks[:, :-1]
            chunk_valid, chunk_ended, chunk_terminated = (x.flatten()[rows] for x in (b_valid, b_ended, b_terminated))
            arrays = [
                obs.flatten(0, 1).index_select(0, chunks.flatten()).view(*chunks.shape, *obs.shape[2:]),  # (C, L + 1, H, W, 4)
                *(x.flatten(0, 1)[rows] for x in (b_actions, logprobs, b_rewards, returns)),
                chunk_valid,
                args.gamma * (1 - chunk_terminated),
                gae_operator(chunk_ended, chunk_valid, args.gamma, args.gae_lambda),
            ]
            fallbacks, nested_time, response_time = torch.zeros((), device=device), 0.0, 0.0
            for epoch in range(args.update_epochs):
                statistics = []  # of each minibatch of this epoch; read once, after the update
                for indices in torch.randperm(len(chunks)).to(device).chunk(args.num_minibatches):
                    mb_obs, mb_actions, mb_logprobs, mb_rewards, mb_returns, mb_valid, mb_discounts, mb_operator = (
                        array.index_select(0, indices) for array in arrays
                    )
                    nested_start = time.perf_counter()
                    weights = mb_valid / mb_valid.sum()  # mean over the transitions
                    row_weights = nn.functional.pad(weights, (0, 1)).flatten()

                    # What the follower sees of all rows (C (L + 1), ...), with those that chunks bootstrap from: the layers
                    # below it are evaluated once, and the graph is kept for their own step.
                    inputs = agent.encode(below, pixels(mb_obs.flatten(0, 1)))
                    fixed = inputs.detach()
                    if epoch == args.update_epochs - 1 and len(statistics) == args.num_minibatches - 1:
                        gradient_norm_before = inner_gradient_norm(CriticJacobian(follower, fixed), weights, mb_returns)

                    # The follower: K steps on L = mean (G - V)^2.
                    targets, error_weights = mb_returns.flatten(), 2 * weights.flatten()
                    seen = fixed.unflatten(0, (len(mb_obs), -1))[:, :-1].flatten(0, 1)  # (C L, ...), chunk after chunk
                    for _ in range(args.nested_updates):
                        errors = follower(seen).squeeze(-1) - targets
                        critic_optimiser.zero_grad()
                        errors.backward(error_weights * errors.detach())  # dL / d errors
                        critic_optimiser.step()
                    leader_start = time.perf_counter()

                    # The leader's objective, with the advantages of the critic that has just answered.
                    features = agent.encode(agent.actor_trunk, pixels(mb_obs[:, :-1].flatten(0, 1)))
                    new_logprobs, entropy = agent.logprob_and_entropy(features, mb_actions.flatten(), weights.flatten())
                    logratio = new_logprobs.view_as(mb_logprobs) - mb_logprobs
                    ratio = logratio.exp()
                    response_start = time.perf_counter()
                    jacobian = CriticJacobian(follower, fixed)
                    new_values = jacobian.values.view(len(mb_obs), -1)
                    advantages = lambda_returns(new_values, mb_rewards, mb_discounts, mb_operator) - new_values[:, :-1]
                    if args.norm_adv:
                        advantages = normalised(advantages, weights)
                    surrogate = clipped_surrogate(ratio, advantages, args.clip_coef)

                    # The follower's response to the leader: z = J_V (H + alpha I)^-1 grad_omega J.
                    z = torch.zeros_like(weights)
                    if args.ihvp != "none":
                        slopes = weights * surrogate_slope(ratio.detach(), advantages, args.clip_coef)
                        u = lambda_returns_vjp(slopes, mb_discounts, mb_operator).flatten()  # b = J_V^T u
                        curvature = GaussNewton(jacobian, row_weights)
                        if args.ihvp == "nystrom":
                            b, v = nystrom_ihvp(curvature, u, args.damping, args.nystrom_rank, sketch_generator)
                        elif args.ihvp == "cg":
                            b, v = cg_ihvp(curvature, u, args.damping, args.cg_iterations)
                        else:
                            b, v = exact_ihvp(curvature, u, args.damping)
                        response = jacobian.jvp(v[None]).view(len(mb_obs), -1)
                        finite = response.sum().isfinite()  # if not, this step falls back to the direct gradient
                        z = torch.where(finite, response[:, :-1], 0.0)
                        fallbacks += ~finite
                    actor_start = time.perf_counter()

                    # The leader's step along the hypergradient.
                    loss = -(weights * (1 + 2 * z) * surrogate).sum() - args.ent_coef * entropy
                    if epoch == args.update_epochs - 1:
                        with torch.no_grad():
                            clipped = (weights * ((ratio - 1).abs() > args.clip_coef)).sum()
                            kl, old_kl = (weights * ((ratio - 1) - logratio)).sum(), -(weights * logratio).sum()
                            policy_loss, critic_loss = -(weights * surrogate).sum(), weights.flatten() @ errors**2
                            statistics.append(torch.stack([critic_loss, policy_loss, entropy, old_kl, kl, clipped]))
                        if len(statistics) == args.num_minibatches:  # the last minibatch of the rollout
                            direct = (weights * surrogate).sum()  # J
                            correction = (weights * 2 * z * surrogate).sum()  # its gradient: -(grad_theta,omega L) v
                            diagnostics = leader_diagnostics(agent.actor_parameters(), direct, correction, weights, z)
                            diagnostics["inner_gradient_norm_before"] = gradient_norm_before
                            diagnostics["inner_gradient_norm_after"] = inner_gradient_norm(jacobian, weights, mb_returns)
                            if args.ihvp != "none":
                                diagnostics |= solver_diagnostics(curvature, b, v, args.damping)
                    actor_optimiser.zero_grad()
                    loss.backward()
                    actor_optimiser.step()

                    # The critic's layers below the follower: one step on L, under the follower that has answered.
                    if args.follower != "full":
                        errors = follower(inputs.unflatten(0, (len(mb_obs), -1))[:, :-1].flatten(0, 1)).squeeze(-1) - targets
                        below_optimiser.zero_grad()
                        errors.backward(error_weights * errors.detach(), inputs=list(below.parameters()))
                        below_optimiser.step()
                    nested_time += leader_start - nested_start
                    response_time += actor_start - response_start
            names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
            losses = dict(zip((f"losses/{name}" for name in names), torch.stack(statistics).mean(0).tolist()))
            losses |= {f"bilevel/{name}": float(diagnostics.get(name, math.nan)) for name in DIAGNOSTICS}
            losses |= {"bilevel/fallbacks": float(fallbacks)}
            losses |= {"time/nested_critic": nested_time, "time/response": response_time}

            # ---- Training on Atari: log and checkpoint (shared) ------------------------------------------------
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
                run.save_checkpoint(state)
            if run.stop_signal:
                run.stop()

        # ---- Training on Atari: model, evaluation, video (shared) ----------------------------------------------
        run.end_training()
        envs.close()
        model = {
            "script": SCRIPT,
            "env_id": args.env_id,
            "num_actions": num_actions,
            "separate_trunks": agent.critic_trunk is not agent.actor_trunk,
            "agent": {name: tensor.cpu() for name, tensor in agent.state_dict().items()},
        }
        path = run.folder / "model.pt"
        if args.save_model or args.eval_episodes or args.capture_video:
            write_atomically(path, lambda new: torch.save(model, new))
        results = {}
        if args.eval_episodes:
            results["eval_returns"] = evaluate(load_policy(path), args, args.eval_episodes)
            print(f"mean return of {args.eval_episodes} evaluation games: {np.mean(results['eval_returns']):.1f}")
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
