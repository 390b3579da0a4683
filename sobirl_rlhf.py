"""SoBiRL for preferences (Yang, Gao, Yuan 2025, arXiv:2405.19697, Algorithm 5): a reward learned from comparisons, on MuJoCo.

The leader's theta is a reward network r, the follower answers with the soft actor-critic policy for it, temperature alpha:

    min_theta E[l(d_1, d_2; theta)],  d_1, d_2 ~ pi*(theta),  l = -y log p - (1 - y) log(1 - p),
    p = sigma(R(d_1) - R(d_2)),  R(d) = sum_h r(s_h, a_h)        eq. (11), (101)       -> cross_entropies
    grad = E[grad l] + E[l sum_h (grad Q* - grad V*)(s_h, a_h)] / alpha
                                                                 eq. (12), (13)        -> implicit_term
    grad Q*(s, a), grad V*(s) = E_pi*[sum_t gamma^t grad r(s_t, a_t)], from (s, a), from s    Prop. 5.1

`--reward-update` names who moves theta: drlhf (Christiano et al. 2017), (12) alone -> drlhf_loss; others add to it: sobirl (13)
-> sobirl_term; hpgd-style (Thoma et al. 2024), (13) from rollouts of geometric length -> hpgd_term; pbrl-style (Shen et al. 2024),
a value penalty, and a second actor -> pbrl_term, pbrl_policy_term; ground-truth is SAC on the true reward. Controls: constant,
frozen, --permute-cross-entropy, --no-terminate. `--implicit` names how Prop. 5.1 is cut: one-step, as released ->
one_step_advantages; rollouts, Stoc-SoBiRL's (79), where MuJoCo can be put into a fragment's states -> rollout_advantages;
reward-to-go-style, a biased heuristic -> reward_to_go_advantages. SAC is CleanRL's, with both critics in one batched product.

Departures from the released code, which has no MuJoCo: (13) is over the policy's own newest pairs, with a baseline; it is taken
once for each theta that the policy answers, not in every minibatch; 1/alpha and its gradient's norm are limited; both levels
see the same bounded reward; accuracy is measured on pairs that nobody labels. docs/sobirl.md numbers details and traps.

    python sobirl_rlhf.py --env-id Hopper-v4 --reward-update sobirl
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
    """seed of the environments, the initial weights, the actions, the minibatches and the teacher, in [0, 2147483647]"""
    torch_deterministic: bool = True
    """ask cuDNN for deterministic kernels (on a CPU a run repeats bitwise, on CPUs of the same kind)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """of float32 products, as torch.set_float32_matmul_precision has it: high is TF32 on a GPU, medium bfloat16 on a CPU that has it"""
    run_dir: Path = Path("runs")
    """the run's own folder is created in this one: {run_dir}/{env_id}__{exp_name}__{seed}__{time}"""
    resume: Path | None = None
    """continue the run in this folder, with its arguments, from its last checkpoint"""
    checkpoint_every: int = 10
    """iterations between two checkpoints, in [1, inf)"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "bilevel-actor-critic"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team"""
    save_model: bool = False
    """write model.pt (actor and reward network) at the end"""
    eval_episodes: int = 0
    """episodes played with the mean action after training, in [0, 10000]"""
    capture_video: bool = False
    """film one such episode through Gymnasium (MuJoCo needs EGL, or MUJOCO_GL=osmesa)"""

    # Environment
    env_id: str = "Hopper-v4"
    """any task with a bounded Box action space; also namespace/Name-v0 and module:Name-v0"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """who steps the environments; auto: Gymnasium for one, which needs no other thread, else EnvPool where it has the task"""
    env_threads: int = 0
    """EnvPool threads, in [0, 1024]; 0: one for each usable core, at most num_envs"""
    terminate: bool = True
    """--no-terminate, a control: unhealthy states do not end an episode, so that its length tells nothing"""
    total_timesteps: int = 500000
    """environment steps in all, in [1, inf); rounded down to whole iterations; 500,000 is the paper's for Hopper"""
    num_envs: int = 1
    """parallel environments, in [1, 65536]"""
    num_steps: int = 2000
    """steps of each environment between two reward updates, in [2, inf) (our choice; the paper has 10,000 on Atari)"""

    # Lower level: soft actor-critic
    gamma: float = 0.99
    """discount factor, in [0, 1)"""
    buffer_size: int = 1000000
    """transitions kept for replay, in [1, inf)"""
    batch_size: int = 256
    """transitions in a minibatch, in [1, inf); one update for each transition"""
    learning_starts: int = 5000
    """uniformly random steps at first, rounded up to whole iterations, at least one, in [0, inf)"""
    learning_rate: float = 3e-4
    """Adam step size of the actor, in (0, inf)"""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critics and of the temperature, in (0, inf)"""
    policy_frequency: int = 2
    """update the actor every so many critic updates, and then so many times, in [1, inf)"""
    target_rate: float = 0.005
    """how far the target critics move towards the critics in an update, in (0, 1]"""
    autotune: bool = True
    """adapt the temperature so that the entropy is minus the number of actions (Haarnoja et al. 2018b)"""
    alpha: float = 1.0
    """temperature at first, or throughout with --no-autotune, in [1e-30, 1e30]"""
    actor_width: int = 256
    """units in each of the actor's two hidden layers, in [1, 65536]"""
    critic_width: int = 256
    """units in each of a critic's two hidden layers, in [1, 65536]"""

    # Upper level: the reward
    reward_update: Literal["sobirl", "drlhf", "pbrl-style", "hpgd-style", "ground-truth", "constant", "frozen"] = "sobirl"
    """how the reward is learned; or the true one; or a control: the same everywhere, a random network at rest"""
    permute_cross_entropy: bool = False
    """a control for sobirl and hpgd-style: the implicit term gets another pair's cross-entropy"""
    constant_reward: float = 1.0
    """the reward of --reward-update constant, in [-1, 1]"""
    reward_bound: Literal["tanh", "clip"] = "tanh"
    """how the reward is kept between -1 and 1, at both levels; clip as released, tanh is smooth as Assumption 7.3 asks"""
    reward_width: int = 128
    """units in each of the reward network's two hidden layers, in [1, 65536]"""
    reward_dropout: float = 0.0
    """dropout rate after these layers while the reward learns, in [0, 1)"""
    reward_learning_rate: float = 3e-4
    """AdamW step size of the reward network, in (0, inf)"""
    reward_batch_size: int = 64
    """pairs in a minibatch of the reward update, in [2, inf)"""
    reward_epochs: int = 1
    """passes over the queue in a reward update, in [1, inf)"""
    fragment_length: int = 25
    """steps of a fragment, in [1, inf) (app. J.2)"""
    queue_size: int = 3000
    """labelled pairs kept, in [2, inf), the newest"""
    label_budget: int = 3000
    """labels in all, in [0, inf); 3,000 comparisons are the paper's"""
    warmup_pairs: int = 600
    """pairs labelled in the random steps, in [0, inf)"""
    warmup_epochs: int = 50
    """passes over them by the cross-entropy alone, in [0, inf) (512 with dropout as released)"""
    pairs_per_iteration: int | None = None
    """labels of an iteration after that, in [0, inf); default: what is left of the budget, evenly over the run"""
    heldout_pairs: int = 64
    """unlabelled pairs of an iteration for the logged accuracy and cross-entropy, in [0, inf)"""
    teacher: Literal["oracle", "stochastic", "mistake", "skip", "equal", "myopic"] = "oracle"
    """who labels (Lee et al. 2021, B-Pref); oracle: the higher true return wins, the paper's rule; see teacher_labels"""
    teacher_temperature: float = 1.0
    """true return that makes odds of e for the stochastic teacher, in (0, inf)"""
    teacher_error: float = 0.1
    """how often the teacher of --teacher mistake errs, in [0, 0.5]"""
    teacher_threshold: float = 0.1
    """what skip and equal call little, as a fraction of the shown fragments' mean return, in [0, inf)"""
    teacher_gamma: float = 0.9
    """discount of the myopic teacher, away from a fragment's end, in [0, 1]"""

    # Upper level: the implicit term
    implicit: Literal["one-step", "rollouts", "reward-to-go-style"] = "one-step"
    """how sobirl estimates grad Q and grad V: as released, Stoc-SoBiRL's rollouts, or a biased heuristic"""
    implicit_pairs: Literal["newest", "queue"] = "newest"
    """what carries sobirl's implicit term: the policy's newest pairs, once an iteration; or every minibatch's, as released"""
    implicit_actions: int = 2
    """actions drawn for the one-step grad V, in [1, 1024]"""
    implicit_starts: int = 0
    """environment steps before the implicit term counts, in [0, inf) (100,000 as released)"""
    max_inverse_temperature: float = 10.0
    """largest 1 / alpha in the implicit term, in (0, inf] (inf as released)"""
    max_gradient_ratio: float = 10.0
    """largest norm of the gradient that sobirl, hpgd-style or pbrl-style add, over the cross-entropy's, in (0, inf] (inf as released)"""
    baseline: bool = True
    """in the implicit term, take the mean of the other pairs off each cross-entropy (not in the paper)"""
    rollouts: int | None = None
    """M, rollouts for each estimate of sobirl and hpgd-style, for pbrl-style of each actor, in [1, 1024]; default: 1, for pbrl-style 10"""
    rollout_length: int | None = None
    """T, steps of a rollout, in [1, 100000]; default: 10 for sobirl, 200 for pbrl-style; hpgd-style draws it"""
    pbrl_penalty: float = 1.0
    """lambda, weight of PBRL's value penalty, in (0, inf); 1 is our choice"""


# ---- Environments ----------------------------------------------------------------------------------------------
def make_envs(
    env_id: str, num_envs: int, seed: int, backend: str = "auto", threads: int = 1, terminate: bool = True
) -> tuple[gym.vector.VectorEnv, gym.spaces.Box, gym.spaces.Box]:
    """Parallel environments that reset on the step after an episode's end (Gymnasium's NEXT_STEP mode).

    That mode lets one loop serve both backends: at the end of an episode `step` returns its true final observation;
    the next `step` ignores the action and returns the first observation of the new episode with reward 0.
    Without `terminate`, the states that MuJoCo's tasks call unhealthy do not end an episode.

    Returns the environments, already seeded, and the spaces of a single one: observations, a flat Box, and actions.
    Raises BadInput if the task is unknown, cannot be made, or has spaces that this script cannot use.
    """
    settings = {} if terminate else {"terminate_when_unhealthy": False}
    has_envpool = envpool is not None and env_id in envpool.list_all_envs()
    if backend == "envpool" and not has_envpool:
        reason = "is not installed" if envpool is None else f"does not have {env_id!r}"
        raise BadInput(f"--env-backend envpool: EnvPool {reason}; use --env-backend gymnasium")
    if has_envpool and (backend == "envpool" or (backend == "auto" and num_envs > 1)):
        with warnings.catch_warnings():  # of float64 boxes that become float32
            warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)
            try:
                envs = envpool.make(
                    env_id, env_type="gymnasium", num_envs=num_envs, seed=seed, num_threads=threads,
                    thread_affinity_offset=first_core(threads), **settings,
                )  # fmt: skip
            except (TypeError, ValueError) as error:
                raise no_terminate_refused(env_id) if settings else error from error
            observation_space, action_space = envs.observation_space, envs.action_space
    else:
        try:
            with warnings.catch_warnings():  # the v4 tasks are out of date
                warnings.simplefilter("ignore", DeprecationWarning)
                envs = gym.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync", **settings)
        except (gym.error.Error, ImportError, ValueError, TypeError, AttributeError, OSError) as error:
            if settings and isinstance(error, TypeError):
                raise no_terminate_refused(env_id) from error
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


def no_terminate_refused(env_id: str) -> Exception:
    """The BadInput for a task whose terminations cannot be switched off."""
    return BadInput(f"--no-terminate: {env_id!r} has no terminations that can be switched off; leave it out")


def first_core(threads: int) -> int:
    """The core of EnvPool's first thread, the others following; -1: the system moves them about.

    Pinned threads take a quarter to a third less time a step where PyTorch works between the steps. They are pinned only
    if they fill all the cores that this process may use, so that several small runs never crowd on the same ones.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return cores[0] if cores and threads >= len(cores) == cores[-1] - cores[0] + 1 else -1


def check_action_space(env_id: str, space: gym.spaces.Space) -> None:
    """Raise BadInput unless the actions are vectors of bounded numbers."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
        raise BadInput(f"--env-id {env_id!r} has the action space {space}; this script needs a flat, bounded Box")


def task_actions(actions: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """Actions in [-1, 1] (..., A), which is how networks and replay have them, as the task takes them: in its box."""
    return space.low + (0.5 * (actions + 1)).astype(np.float32) * (space.high - space.low)


class Simulator:
    """One MuJoCo task that can be put into the state of an observation: the generative model of Algorithm 3.

    An observation of these tasks is (qpos without its first 0, 1 or 2 numbers, qvel). What it leaves out is where the
    robot is in the plane, on which neither dynamics nor reward depend. (Hopper and Walker2d clip qvel to +-10.)
    Raises BadInput if the task is none of these and `settable` is asked for.
    """

    def __init__(self, env_id: str, seed: int, action_space: gym.spaces.Box, terminate: bool, settable: bool, flag: str):
        settings = {} if terminate else {"terminate_when_unhealthy": False}
        with warnings.catch_warnings():  # Gymnasium deprecates the v4 tasks
            warnings.simplefilter("ignore")
            try:
                self.env = gym.make(env_id, disable_env_checker=True, **settings)
            except Exception as error:
                reason = first_sentence(error)
                raise BadInput(f"{flag} needs {env_id!r} in Gymnasium, which cannot make it: {reason}") from error
        self.env = self.env.unwrapped if settable else gym.wrappers.FlattenObservation(self.env)
        self.action_space, self.steps = action_space, 0
        obs, _ = self.env.reset(seed=seed)
        if settable:
            model = getattr(self.env, "model", None)
            self.hidden = model.nq + model.nv - len(obs) if hasattr(model, "nq") else -1
            try:
                obs, *_ = self.env.step(np.zeros(action_space.shape, np.float32))
                self.set(obs)
                found = self.env._get_obs() if 0 <= self.hidden <= 2 else np.full_like(obs, np.nan)
            except (AttributeError, IndexError, TypeError, ValueError, AssertionError):
                found = np.full_like(obs, np.nan)
            if not np.allclose(found, obs, atol=1e-8):
                raise BadInput(
                    f"{flag} needs a MuJoCo task whose state is its observation, such as Hopper-v4, which {env_id!r} is not"
                )

    def set(self, obs: np.ndarray) -> None:
        """Put the task into the state of an observation (D,)."""
        qpos = np.concatenate([np.zeros(self.hidden), obs[: self.env.model.nq - self.hidden]])
        self.env.set_state(qpos, np.asarray(obs[self.env.model.nq - self.hidden :], dtype=np.float64))

    def roll_out(
        self, obs: Tensor | None, actions: Tensor | None, lengths: Tensor, decay: float, policy: "NumpyActor",
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Independent rollouts (eq. 78): from observations (R, D), or from start states if None; with first actions (R, A),
        or with the policy's own if None; of `lengths` (R,) steps, or to a termination. With a `seed`, start states and
        noise are those of any other call with it.

        Returns the inputs of the reward (R, T, D+A) and their weights (R, T): decay^t, 0 after the end.
        """
        rows: list[list[np.ndarray]] = []
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        noises = torch.randn(int(lengths.sum()), *self.action_space.shape, generator=generator).split(lengths.tolist())
        for i, noise in enumerate(noises):
            if obs is None:
                state, _ = self.env.reset(seed=None if seed is None else seed + i)
            else:
                state = obs[i].numpy()
                self.set(state)
            rows.append([])
            for t, step_noise in enumerate(noise.numpy()):
                state = state.astype(np.float32)
                action = actions[i].numpy() if t == 0 and actions is not None else policy(state[None], step_noise[None])[0]
                rows[-1].append(np.concatenate([state, action]))
                state, _, terminated, truncated, _ = self.env.step(task_actions(action, self.action_space))
                if terminated or truncated:
                    break
        self.steps += sum(map(len, rows))
        longest = max(map(len, rows))
        inputs, weights = torch.zeros(len(rows), longest, len(rows[0][0])), torch.zeros(len(rows), longest)
        for i, path in enumerate(rows):
            inputs[i, : len(path)] = torch.from_numpy(np.stack(path))
            weights[i, : len(path)] = decay ** torch.arange(len(path))
        return inputs, weights


# ---- Networks --------------------------------------------------------------------------------------------------
def relu_mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden ReLU layers with PyTorch's own initial weights, as in CleanRL."""
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)]
    return nn.Sequential(*layers)


class TwinCritics(nn.Module):
    """Q_1 and Q_2, two hidden ReLU layers each, computed side by side by batched products. Initial weights as nn.Linear's."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        sizes = list(itertools.pairwise([inputs, width, width, 1]))
        bounds = [1 / math.sqrt(rows) for rows, _ in sizes]
        self.weights = nn.ParameterList(torch.empty(2, *size).uniform_(-b, b) for size, b in zip(sizes, bounds))
        self.biases = nn.ParameterList(torch.empty(2, 1, n).uniform_(-b, b) for (_, n), b in zip(sizes, bounds))

    def forward(self, inputs: Tensor) -> Tensor:
        """Observations and actions side by side (B, D+A) -> the values (2, B)."""
        x = inputs.expand(2, -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = torch.baddbmm(bias, x, weight).relu_()
        # A batched product with one column takes four times as long as this, and its gradient three times.
        return (x * self.weights[-1].mT).sum(-1) + self.biases[-1][..., 0]


class Agent(nn.Module):
    """The follower: squashed Gaussian actor, twin critics and their slow copies, log temperature."""

    def __init__(self, obs_dim: int, action_dim: int, actor_width: int, critic_width: int, alpha: float = 1.0):
        super().__init__()
        self.actor = relu_mlp(obs_dim, actor_width, 2 * action_dim)
        self.critics = TwinCritics(obs_dim + action_dim, critic_width)
        self.targets = TwinCritics(obs_dim + action_dim, critic_width)
        self.targets.load_state_dict(self.critics.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))


class NumpyActor:
    """The actor as it was at the last `refresh`, in numpy: for the one row of a step PyTorch takes several times as long.
    On a CPU the numbers are the actor's own memory, always current; there `refresh` has nothing to do."""

    def __init__(self, actor: nn.Sequential):
        self.parameters = [parameter.detach() for parameter in actor.parameters()]
        self.copies = [each.cpu().pin_memory() if each.is_cuda else each for each in self.parameters]
        arrays = [copy.numpy() for copy in self.copies]
        self.layers = [*zip(arrays[::2], arrays[1::2])]

    def refresh(self) -> None:
        """Take over what the actor has become."""
        if self.parameters[0].is_cuda:
            for copy, parameter in zip(self.copies, self.parameters):
                copy.copy_(parameter, non_blocking=True)
            torch.cuda.current_stream().synchronize()

    def __call__(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions (N, A) in [-1, 1] at observations (N, D) with standard normal noise (N, A)."""
        x = obs
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight.T + bias, 0)
        weight, bias = self.layers[-1]
        mean, raw = np.split(x @ weight.T + bias, 2, -1)
        return np.tanh(mean + np.exp(LOGSTD_MIN + 0.5 * (LOGSTD_MAX - LOGSTD_MIN) * (np.tanh(raw) + 1)) * noise)


class RewardNetwork(nn.Module):
    """r_theta(s, a) in [-1, 1], the reward that both levels see: two hidden leaky ReLU layers, dropout while it learns."""

    def __init__(self, inputs: int, width: int, dropout: float = 0.0, bound: str = "tanh"):
        super().__init__()
        hidden = [nn.Linear(inputs, width), nn.LeakyReLU(), nn.Dropout(dropout)]
        hidden += [nn.Linear(width, width), nn.LeakyReLU(), nn.Dropout(dropout)]
        self.network, self.bound = nn.Sequential(*hidden, nn.Linear(width, 1)), bound

    def forward(self, inputs: Tensor) -> Tensor:
        """Observations and actions side by side (..., D+A) -> rewards (...)."""
        raw = self.network(inputs).squeeze(-1)
        return raw.tanh() if self.bound == "tanh" else raw.clamp(-1, 1)


class FusedAdam(torch.optim.Adam):
    """torch.optim.Adam whose `update` runs PyTorch's fused kernel and nothing else: what `step` does around it takes
    longer than the kernel."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        super().__init__(parameters, lr=lr, fused=True)
        self.tensors = self.param_groups[0]["params"]
        for tensor in self.tensors:
            zeros = {name: torch.zeros_like(tensor) for name in ("exp_avg", "exp_avg_sq")}
            self.state[tensor] = {"step": torch.zeros((), device=tensor.device)} | zeros

    @torch.no_grad()
    def update(self, gradients: Iterable[Tensor]) -> None:
        """One step along minus the gradients (Kingma and Ba 2015, alg. 1), bitwise that of `step`."""
        group, states = self.param_groups[0], [self.state[tensor] for tensor in self.tensors]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            self.tensors, list(gradients), means, squares, [], steps, lr=group["lr"], beta1=group["betas"][0],
            beta2=group["betas"][1], eps=group["eps"], weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip


# ---- Soft actor-critic -----------------------------------------------------------------------------------------
LOGSTD_MIN, LOGSTD_MAX = -5.0, 2.0  # as in CleanRL


def gaussian_parameters(output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation (..., A) from the actor's output (..., 2A); tanh keeps the latter in its range."""
    mean, raw = output.chunk(2, -1)
    return mean, LOGSTD_MIN + 0.5 * (LOGSTD_MAX - LOGSTD_MIN) * (raw.tanh() + 1)


def squashed_sample(output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions a = tanh(u) (..., A), u = mean + std noise, and log pi(a|s) (...) from the actor's output (..., 2A).

    log pi(a) = log N(u) - sum log(1 - tanh(u)^2) (Haarnoja et al. 2018a, app. C), the second in a form that never is log 0:
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)).
    """
    mean, logstd = gaussian_parameters(output)
    u = mean + logstd.exp() * noise
    logprob = -0.5 * noise * noise - logstd - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return u.tanh(), logprob.sum(-1) - 0.5 * math.log(2 * math.pi) * noise.shape[-1]


def squashed_logprob(output: Tensor, actions: Tensor) -> Tensor:
    """log pi(a|s) (...) of given actions (..., A) in [-1, 1]; they are taken to be at least 1e-6 inside."""
    u = actions.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    mean, logstd = gaussian_parameters(output)
    return squashed_sample(output, (u - mean) * (-logstd).exp())[1]


def critic_targets(
    rewards: Tensor, terminated: Tensor, next_values: Tensor, next_logprobs: Tensor, alpha: Tensor, gamma: float
) -> Tensor:
    """r + gamma (1 - terminated) (min_j Q_j(s', a') - alpha log pi(a'|s')) (B,), a' ~ pi; next_values (2, B).

    A time limit is no termination: there the value of s' counts (Haarnoja et al. 2018b, eq. 5 and 6)."""
    return rewards + gamma * (1 - terminated) * (next_values.amin(0) - alpha * next_logprobs)


def critic_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Sum over both critics of the mean squared error: values (2, B), targets (B,)."""
    return ((values - targets) ** 2).mean(1).sum()


def actor_loss(values: Tensor, logprobs: Tensor, alpha: Tensor) -> Tensor:
    """Mean of alpha log pi(a|s) - min_j Q_j(s, a), a ~ pi (Haarnoja et al. 2018b, eq. 9): values (2, B), logprobs (B,)."""
    return (alpha * logprobs - values.amin(0)).mean()


def temperature_gradient(log_alpha: Tensor, logprobs: Tensor, target_entropy: float) -> Tensor:
    """Derivative in log alpha of -alpha mean(log pi + target entropy) (Haarnoja et al. 2018b, eq. 18), a scalar."""
    return -log_alpha.exp() * (logprobs.mean() + target_entropy)


class SoftActorCritic:
    """One agent's updates: the optimisers, and the lines that put the functions above together."""

    def __init__(self, agent: Agent, args: Args, action_dim: int):
        self.agent, self.args, self.action_dim = agent, args, action_dim
        self.actor = FusedAdam(agent.actor.parameters(), args.learning_rate)
        self.critics = FusedAdam(agent.critics.parameters(), args.critic_learning_rate)
        self.temperature = FusedAdam([agent.log_alpha], args.critic_learning_rate)
        self.optimisers, self.targets = [self.actor, self.critics, self.temperature], list(agent.targets.parameters())

    def update_critics(self, batch: "Batch", rewards: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One step of both critics towards their targets, and of the target critics towards them; noise (B, A), standard
        normal, of the actions in the next states. Returns what is logged."""
        agent, args = self.agent, self.args
        with torch.no_grad():
            output = agent.actor(batch.next_obs)
            next_actions, next_logprobs = squashed_sample(output, noise)
            next_values = agent.targets(torch.cat([batch.next_obs, next_actions], -1))
            targets = critic_targets(
                rewards, batch.terminated, next_values, next_logprobs, agent.log_alpha.exp(), args.gamma
            )
        values = agent.critics(batch.inputs)
        loss = critic_loss(values, targets)
        self.critics.update(torch.autograd.grad(loss, self.critics.tensors))
        with torch.no_grad():
            torch._foreach_lerp_(self.targets, self.critics.tensors, args.target_rate)
        return {"losses/qf_loss": loss.detach(), "losses/qf_values": values.detach()}

    def update_actor(self, batch: "Batch", noise: Tensor, extra_loss: Tensor | float = 0.0) -> dict[str, Tensor]:
        """One step of the actor, and of the temperature; noise (B, A), standard normal, of the actions; `extra_loss` is added
        to the actor's. Only the actor's gradient is taken: the critics are passed through. Returns what is logged."""
        agent, alpha = self.agent, self.agent.log_alpha.detach().exp()
        output = agent.actor(batch.obs)
        actions, logprobs = squashed_sample(output, noise)
        loss = actor_loss(agent.critics(torch.cat([batch.obs, actions], -1)), logprobs, alpha)
        self.actor.update(torch.autograd.grad(loss + extra_loss, self.actor.tensors))
        logprobs = logprobs.detach()
        if self.args.autotune:
            self.temperature.update([temperature_gradient(agent.log_alpha.detach(), logprobs, -float(self.action_dim))])
        return {"losses/actor_loss": loss.detach(), "losses/logprobs": logprobs}


# ---- Preferences -----------------------------------------------------------------------------------------------
def fragment_windows(valid: Tensor, length: int) -> Tensor:
    """First step and environment (K, 2) of all fragments of `length` transitions within one episode: valid (T, N), 1 for
    a transition, 0 for the reset that follows each episode's end. A window with no reset in it crosses no end."""
    counted = nn.functional.pad(valid.cumsum(0), (0, 0, 1, 0))
    return (counted[length:] - counted[:-length] == length).nonzero()


def draw_pairs(windows: Tensor, count: int, length: int, *arrays: Tensor) -> list[Tensor]:
    """`count` pairs of two different fragments, drawn uniformly from windows (K, 2): each array (T, N, ...) -> (count, 2,
    length, ...). No pair if there are fewer than two windows."""
    count = count if len(windows) > 1 else 0
    first = torch.randint(max(1, len(windows)), (count,))
    second = (first + torch.randint(1, max(2, len(windows)), (count,))) % max(1, len(windows))
    starts, envs = windows[torch.stack([first, second], 1)].unbind(-1)
    steps = starts.unsqueeze(-1) + torch.arange(length)
    return [array[steps, envs.unsqueeze(-1)] for array in arrays]


def teacher_labels(
    rewards: Tensor, rule: str, temperature: float = 1.0, error: float = 0.1, threshold: float = 0.1, gamma: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Labels y (P,), the probability with which the teacher puts the first fragment first, and who was answered (P,).

    rewards (P, 2, L), the true ones; R their undiscounted sums. The rules are those of B-Pref (Lee et al. 2021):
    oracle      y = 1 if R_1 > R_2, 0 if R_1 < R_2, 1/2 if equal: the paper's
    stochastic  y ~ Bernoulli(sigma((R_1 - R_2) / temperature)): Bradley and Terry's
    mistake     the oracle's, turned round with probability `error`
    skip        the oracle's, but no answer if both R are below threshold * |mean R of the fragments shown|
    equal       1/2 if |R_1 - R_2| is below that, else the oracle's
    myopic      the oracle's for sum_t gamma^(L-1-t) r_t, which forgets how a fragment began
    """
    length = rewards.shape[-1]
    weights = gamma ** torch.arange(length - 1, -1, -1) if rule == "myopic" else torch.ones(length)
    returns = (rewards * weights).sum(-1)
    difference, answered = returns[:, 0] - returns[:, 1], torch.ones(len(returns), dtype=torch.bool)
    labels = 0.5 * (difference.sign() + 1)
    little = threshold * returns.mean().abs()
    if rule == "stochastic":
        labels = torch.bernoulli(torch.sigmoid(difference / temperature))
    elif rule == "mistake":
        labels = torch.where(torch.rand_like(labels) < error, 1 - labels, labels)
    elif rule == "skip":
        answered = returns.amax(1) >= little
    elif rule == "equal":
        labels = torch.where(difference.abs() < little, 0.5, labels)
    return labels, answered


def labels_wanted(args: Args, iteration: int, iterations: int, warmup_iterations: int) -> int:
    """How many labels there are to be after an iteration (from 1) of so many, of which the first are random.

    The warm-up's, evenly over its iterations; then `pairs_per_iteration`, or so that the last iteration spends the last of
    the budget: the implicit term lives on labels of the policy's newest pairs to the end."""
    warmup_pairs, learning = min(args.warmup_pairs, args.label_budget), iteration - warmup_iterations
    if learning <= 0:
        return warmup_pairs * iteration // warmup_iterations
    if args.pairs_per_iteration is None:
        return warmup_pairs + (args.label_budget - warmup_pairs) * learning // (iterations - warmup_iterations)
    return min(args.label_budget, warmup_pairs + args.pairs_per_iteration * learning)


class PreferenceQueue:
    """The newest `size` labelled pairs: inputs of the reward network (size, 2, L, D+A) and labels (size,)."""

    def __init__(self, size: int, length: int, inputs: int):
        self.inputs, self.labels, self.added = torch.zeros(size, 2, length, inputs), torch.zeros(size), 0

    def __len__(self) -> int:
        return min(self.added, len(self.labels))

    def push(self, inputs: Tensor, labels: Tensor) -> None:
        """Add pairs (P, 2, L, D+A) with labels (P,); the oldest make room."""
        for pair, label in zip(inputs, labels):
            self.inputs[self.added % len(self.labels)], self.labels[self.added % len(self.labels)] = pair, label
            self.added += 1

    def state_dict(self) -> dict:
        """The pairs held and the count."""
        return {"inputs": self.inputs[: len(self)], "labels": self.labels[: len(self)], "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.added = state["added"]
        self.inputs[: len(self)], self.labels[: len(self)] = state["inputs"], state["labels"]


def accuracy(rewards: Tensor, truth: Tensor) -> Tensor:
    """How often the sums of learned rewards (P, 2, L) order the fragments as those of the true ones do; pairs of equal
    true return do not count, a tie of the learned ones counts one half. NaN if no pair counts."""
    learned, true = (each.sum(-1)[:, 0] - each.sum(-1)[:, 1] for each in (rewards, truth))
    return (0.5 * (learned.sign() * true.sign() + 1))[true != 0].mean()


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of two vectors; NaN if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.norm() * y.norm())


# ---- Reward updates --------------------------------------------------------------------------------------------
def cross_entropies(rewards: Tensor, labels: Tensor) -> Tensor:
    """l (P,) in nats of each pair: rewards (P, 2, L), labels (P,).

    p = sigma(R_1 - R_2) with sums R (eq. 101), l = -y log p - (1 - y) log(1 - p) = softplus(z) - y z at z = R_1 - R_2.
    """
    returns = rewards.sum(-1)
    logits = returns[:, 0] - returns[:, 1]
    return nn.functional.softplus(logits) - labels * logits


def implicit_term(
    losses: Tensor, scores: Tensor, inverse_temperature: float, baseline: bool = False, shift: int = 0
) -> Tensor:
    """What has the gradient l sum_h (grad Q - grad V)(s_h, a_h) / alpha (eq. 13) for each pair (P,).

    losses (P,) are the l, through which no gradient flows; scores (P,) the sums over both fragments of Q - V, linear in r,
    so that their derivative is the sum of grad Q - grad V. With `baseline`, l minus the mean of the others' l: at pi* the
    scores' gradient has mean 0, and the expectation stays as it is.
    With a `shift` in [1, P - 1], a control: pair i gets the l of pair i + shift, and the baseline leaves out both. No pair
    meets its own l, so with independent pairs the expectation at pi* is 0.
    """
    losses = losses.detach()
    taken, left = losses.roll(-shift), losses.sum() - losses
    others = len(losses) - 1
    if shift:
        left, others = left - taken, others - 1
    if baseline and others > 0:
        taken = taken - left / others
    return inverse_temperature * taken * scores


def one_step_advantages(rewards: Tensor, resampled: Tensor) -> Tensor:
    """Q - V (...) with Prop. 5.1's sums cut after one term, as released: r(s, a) - mean of r(s, a'), a' ~ pi(s).

    rewards (...), resampled (..., m). It is 0 where r does not depend on the action."""
    return rewards - resampled.mean(-1)


@torch.no_grad()
def resample_actions(actor: nn.Module, inputs: Tensor, obs_dim: int, count: int) -> Tensor:
    """The states of inputs (..., D+A) with `count` actions of the policy's own each: (..., count, D+A)."""
    output = actor(inputs[..., :obs_dim]).unsqueeze(-2).expand(*inputs.shape[:-1], count, -1)
    noise = torch.randn(*output.shape[:-1], inputs.shape[-1] - obs_dim).to(output.device)
    actions, _ = squashed_sample(output, noise)
    return torch.cat([inputs[..., :obs_dim].unsqueeze(-2).expand(*actions.shape[:-1], -1), actions], -1)


def rollout_advantages(from_actions: Tensor, from_policy: Tensor) -> Tensor:
    """Q - V (R,) by M rollouts each (eq. 79): discounted sums of r (R, M) from the visited action and the policy's."""
    return from_actions.mean(-1) - from_policy.mean(-1)


def reward_to_go_advantages(rewards: Tensor, gamma: float) -> Tensor:
    """Q - V (P, 2, L) by the rest of the same fragment, minus its mean over the pairs: a heuristic, no estimate of (13), for
    the later steps are those that l scores. rewards (P, 2, L)."""
    length = rewards.shape[-1]
    powers = torch.arange(length).unsqueeze(1) - torch.arange(length)  # t - h
    discounts = torch.where(powers >= 0, gamma ** powers.clamp(min=0).to(rewards.dtype), 0.0)
    to_go = rewards @ discounts.to(rewards)  # sum_{t >= h} gamma^(t-h) r_t
    return to_go - to_go.mean((0, 1))


def drlhf_loss(losses: Tensor) -> Tensor:
    """Deep RL from human feedback (Christiano et al. 2017): the mean cross-entropy, whose gradient is (12) alone."""
    return losses.mean()


def sobirl_term(
    losses: Tensor, scores: Tensor, inverse_temperature: float, baseline: bool = False, shift: int = 0
) -> Tensor:
    """What SoBiRL adds to `drlhf_loss` (Algorithm 5, line 5), so that the gradient is (14): mean grad l (12) +
    mean l sum_h (grad Q - grad V)(s_h, a_h) / alpha (13). losses and scores (P,), see `implicit_term`."""
    return implicit_term(losses, scores, inverse_temperature, baseline, shift).mean()


def hpgd_term(
    losses: Tensor, advantages: Tensor, length: int, inverse_temperature: float, baseline: bool = False, shift: int = 0
) -> Tensor:
    """What HPGD (Thoma et al. 2024) adds to `drlhf_loss`: (13) on the policy's own pairs, with unbiased rollouts.

    losses (P,); advantages (P, 2), Q - V at one step of each fragment, drawn uniformly, which stands for all `length` of
    them. Rollouts have geometric length, P(T >= t) = gamma^(t/2), and weights gamma^(t/2): E[sum_{t <= T} gamma^(t/2) g_t] =
    sum_t gamma^t g_t.
    """
    return implicit_term(losses, length * advantages.sum(1), inverse_temperature, baseline, shift).mean()


def geometric_lengths(count: int, gamma: float) -> Tensor:
    """Numbers of steps (count,) >= 1 with P(at least t + 1) = gamma^(t/2), by inversion."""
    if gamma == 0:
        return torch.ones(count, dtype=torch.long)
    return 1 + (torch.rand(count, dtype=torch.float64).clamp(min=1e-300).log() / (0.5 * math.log(gamma))).long()


def pbrl_term(tracker_returns: Tensor, policy_returns: Tensor, penalty: float) -> Tensor:
    """What PBRL (Shen et al. 2024) adds to `drlhf_loss`: the value penalty lambda p, p = V^{pi*} - V^{pi_y} >= 0, whose
    gradient is lambda (E_{pi*}[sum_t gamma^t grad r] - E_{pi_y}[sum_t gamma^t grad r]).

    Discounted sums of r from the start states: tracker_returns (M,) of the tracker of pi*, policy_returns (M,) of pi_y.
    """
    return penalty * (tracker_returns.mean() - policy_returns.mean())


def pbrl_policy_term(losses: Tensor, logprobs: Tensor, penalty: float, gamma: float) -> Tensor:
    """What PBRL adds to the actor loss of pi_y, which descends f + lambda p too: the score form of grad f / lambda.

    losses (P,) of pi_y's pairs, logprobs (P, 2, L) of their actions. SAC's loss is minus the value for one step of the
    discounted visits, (1 - gamma) V, so the term is (1 - gamma) / lambda mean((l - mean l) sum log pi); the mean of the
    others' l is a baseline.
    """
    return (1 - gamma) * implicit_term(losses, logprobs.sum((1, 2)), 1 / penalty, baseline=True).mean()


def limited_sum(gradients: list[Tensor], added: list[Tensor], limit: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """gradients + f added, f = min(1, limit |gradients| / |added|), with the norm over all tensors.

    Returns the sum, |added| / |gradients| and f. An estimate from a handful of pairs can be a thousand times the
    cross-entropy's gradient, and one such enters AdamW's second moments for a thousand steps.
    """
    norm, other = (torch.stack(torch._foreach_norm(each)).norm() for each in (gradients, added))
    factor = (limit * norm / other).nan_to_num(1.0).clamp(max=1.0)
    return [each + factor * more for each, more in zip(gradients, added)], other / norm, factor


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
@dataclass
class Batch:
    """A minibatch: observations (B, D), observations and actions (B, D+A), next observations, rewards and terminated (B,)."""

    obs: Tensor
    inputs: Tensor
    next_obs: Tensor
    rewards: Tensor
    terminated: Tensor


class Replay:
    """Transitions as rows (obs, action, next obs, reward, terminated) of one memory-mapped file of float32.

    The file is a ring of capacity + spare rows, of which the newest `capacity` are drawn from. So the rows that a
    checkpoint needs stay as they are until `spare` more have come, and a kill in between loses nothing; the next
    checkpoint must be written by then (`spare_left`). The file takes its whole size on the disk when it is made.
    """

    def __init__(self, path: Path, capacity: int, obs_dim: int, action_dim: int, added: int = 0):
        """Open a file of `create` in which `added` transitions are. Raises OSError or ValueError if it is no such file."""
        self.path, self.capacity, self.obs_dim, self.action_dim = path, capacity, obs_dim, action_dim
        self.file = np.memmap(path, dtype=np.float32, mode="r+").reshape(-1, 2 * obs_dim + action_dim + 2)
        self.rows, self.spare = np.asarray(self.file), len(self.file) - capacity
        self.tensor, self.added, self.saved = torch.from_numpy(self.rows), added, added
        if self.spare < 1:
            raise ValueError(f"{len(self.file)} rows are too few to draw from {capacity}")

    @staticmethod
    def create(path: Path, rows: int, obs_dim: int, action_dim: int) -> None:
        """Make the file, in its whole size, so that a full disk shows now. Raises OSError."""
        path.parent.mkdir()
        with open(path, "wb") as file:
            size = 4 * rows * (2 * obs_dim + action_dim + 2)
            os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def spare_left(self) -> int:
        """How many transitions may still come before the next checkpoint."""
        return self.spare - (self.added - self.saved)

    def add(
        self, obs: np.ndarray, actions: np.ndarray, next_obs: np.ndarray, rewards: np.ndarray, terminated: np.ndarray
    ) -> None:
        """Add n transitions: (n, D), (n, A), (n, D), (n,), (n,)."""
        for i in range(len(obs)):
            row, d = self.rows[self.added % len(self.rows)], self.obs_dim
            row[:d], row[d : d + self.action_dim], row[d + self.action_dim : -2] = obs[i], actions[i], next_obs[i]
            row[-2:] = rewards[i], terminated[i]
            self.added += 1

    def sample(self, count: int) -> Tensor:
        """`count` of the newest `capacity` transitions, drawn with replacement, as rows of the file."""
        return self.tensor[(self.added - 1 - torch.randint(len(self), (count,))) % len(self.rows)]

    def batch(self, rows: Tensor) -> Batch:
        """What is in such rows."""
        d = self.obs_dim
        return Batch(rows[:, :d], rows[:, : d + self.action_dim], rows[:, d + self.action_dim : -2], rows[:, -2], rows[:, -1])

    def save(self) -> int:
        """Write what is in memory to the disk; returns the count, to be kept in the checkpoint that follows."""
        self.file.flush()
        self.saved = self.added
        return self.added

    def delete(self) -> None:
        """Remove the file and its folder."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


def check_disk(folder: Path, size: int) -> None:
    """Raise BadInput if the disk of `folder`, which need not exist yet, has less than `size` bytes left."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        there = f"--run-dir {folder}, where {free / 1e6:,.0f} MB are free"
        raise BadInput(f"--buffer-size needs {size / 1e6:,.0f} MB in {there}; make it smaller")


# ---- The run: what is not the algorithm ------------------------------------------------------------------------
SCRIPT = Path(__file__).name
REPLAY_FILE = "replay/transitions.f32"  # in the run folder, until the run has finished
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
    """The trained policy in a model.pt: raw observations (..., D) -> the mean actions (..., A), in the task's box."""
    model = torch.load(path, weights_only=True)
    obs_dim, action_dim, width = model["sizes"]
    action_space = gym.spaces.Box(model["action_low"].numpy(), model["action_high"].numpy())
    actor = relu_mlp(obs_dim, width, 2 * action_dim)
    actor.load_state_dict(model["actor"])

    def policy(obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            output = actor(torch.as_tensor(obs, dtype=torch.float32))
        return task_actions(output.chunk(2, -1)[0].tanh().numpy(), action_space)

    return policy


def evaluate(policy: Callable[[np.ndarray], np.ndarray], args, episodes: int) -> list[float]:
    """Undiscounted returns of one episode in each of `episodes` fresh environments (seeds unlike the training's).
    Where a task has no time limit, an episode counts up to its 100,000th step."""
    seed = derived_seed(args.seed, 2**40)
    envs, *_ = make_envs(args.env_id, episodes, seed, args.env_backend, args.env_threads, args.terminate)
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


def film(env_id: str, model: Path | None, folder: Path, seed: int, terminate: bool = True) -> None:
    """Film one episode, up to its 5,000th step, into `folder`; without a model, only draw one frame. For a child
    process: where no GL is, rendering may raise or kill. `terminate` as in make_envs."""
    settings = {} if terminate else {"terminate_when_unhealthy": False}
    if sys.platform == "linux":  # MuJoCo draws without a screen through EGL; elsewhere it refuses that word
        os.environ.setdefault("MUJOCO_GL", "egl")
    if model is None:  # the caller says in one sentence what failed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    env = gym.wrappers.FlattenObservation(gym.make(env_id, render_mode="rgb_array", **settings))
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


# ---- Which arguments go together -------------------------------------------------------------------------------
LEARNED = ("sobirl", "drlhf", "pbrl-style", "hpgd-style")  # values of --reward-update that ask the teacher


def check_batch_shape(args: Args) -> None:
    """Raise BadInput unless the sizes fit together, and the flags of one method stand with it."""
    batch_size = args.num_envs * args.num_steps
    if args.total_timesteps < batch_size:
        raise BadInput(
            f"--total-timesteps {args.total_timesteps} is less than one iteration of num-envs x num-steps = "
            f"{args.num_envs} x {args.num_steps} = {batch_size}; ask for at least {batch_size}"
        )
    if args.fragment_length > args.num_steps:
        raise BadInput(f"--fragment-length {args.fragment_length} is longer than an iteration; it must be at most num-steps")
    if args.implicit_pairs == "queue" and args.implicit == "rollouts":
        raise BadInput("--implicit rollouts starts from the newest pairs' states; --implicit-pairs queue must be left out")
    if args.permute_cross_entropy and args.reward_update not in ("sobirl", "hpgd-style"):
        raise BadInput(f"--permute-cross-entropy is for sobirl and hpgd-style, not for {args.reward_update}; leave it out")
    if args.permute_cross_entropy and args.implicit_pairs == "queue":
        raise BadInput("--permute-cross-entropy is for the newest pairs; --implicit-pairs queue must be left out")
    if (args.implicit != "one-step" or args.implicit_pairs != "newest") and args.reward_update != "sobirl":
        raise BadInput(f"--implicit and --implicit-pairs are for sobirl, not for {args.reward_update}; leave them out")


# ---- Training: set-up ------------------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train and return the run folder. Raises BadInput before anything is created."""
    check_batch_shape(args)
    batch_size = args.num_envs * args.num_steps
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision(args.matmul_precision)
    device = torch.device(args.device)
    torch.set_num_threads(1)  # networks this small lose more to the hand-over between threads than they gain
    threadpoolctl.threadpool_limits(1, "blas")  # and so does numpy, which acts also where the networks live on a GPU
    keep_freed_memory()

    checkpoint = load_checkpoint(args.resume) if args.resume else None
    start = checkpoint["global_step"] if checkpoint else 0
    envs, observation_space, action_space = make_envs(
        args.env_id, args.num_envs, derived_seed(args.seed, start), args.env_backend, args.env_threads, args.terminate
    )
    if args.capture_video and not film_in_child(args.env_id, None, args.run_dir, args.seed):
        raise BadInput(
            f"--capture-video: Gymnasium cannot draw {args.env_id} here; MuJoCo needs EGL, or the library OSMesa and the "
            "environment variable MUJOCO_GL=osmesa; or leave --capture-video out"
        )
    obs_dim, action_dim = (gym.spaces.flatdim(space) for space in (observation_space, action_space))
    simulator = None
    flag = "--implicit rollouts" if args.implicit == "rollouts" else f"--reward-update {args.reward_update}"
    if args.implicit == "rollouts" or args.reward_update in ("hpgd-style", "pbrl-style"):
        seed = derived_seed(args.seed, 2**41 + start)
        simulator = Simulator(args.env_id, seed, action_space, args.terminate, args.reward_update != "pbrl-style", flag)
        simulator.steps = checkpoint["simulator_steps"] if checkpoint else 0

    # ---- Training: agents, reward, replay ----------------------------------------------------------------------
    sizes = obs_dim, action_dim, args.actor_width, args.critic_width, args.alpha
    agents = [Agent(*sizes).to(device)]  # the first one acts
    if args.reward_update == "pbrl-style":
        agents.append(Agent(*sizes).to(device))  # the tracker of pi*
    learners = [SoftActorCritic(agent, args, action_dim) for agent in agents]
    agent = agents[0]
    model = RewardNetwork(obs_dim + action_dim, args.reward_width, args.reward_dropout, args.reward_bound).to(device).eval()
    reward_parameters = list(model.parameters())
    reward_optimiser = torch.optim.AdamW(reward_parameters, args.reward_learning_rate, fused=True)
    optimisers = [each for learner in learners for each in learner.optimisers] + [reward_optimiser]
    queue = PreferenceQueue(args.queue_size, args.fragment_length, obs_dim + action_dim)
    num_iterations = args.total_timesteps // batch_size
    capacity, spare = min(args.buffer_size, args.total_timesteps), min(args.checkpoint_every, num_iterations) * batch_size
    pair_inputs = pair_losses = None  # the newest labelled pairs, for PBRL's policy term
    if checkpoint:
        for each, state in zip(agents, checkpoint["agents"]):
            each.load_state_dict(state)
        for each, state in zip(optimisers, checkpoint["optimisers"]):
            each.load_state_dict(state)
        model.load_state_dict(checkpoint["reward"])
        queue.load_state_dict(checkpoint["queue"])
        set_rng_state(checkpoint["rng"])
        if checkpoint["policy_pairs"]:
            pair_inputs, pair_losses = (each.to(device) for each in checkpoint["policy_pairs"])
        replay_file = args.resume / REPLAY_FILE
        try:
            replay = Replay(replay_file, capacity, obs_dim, action_dim, checkpoint["replayed"])
            if len(replay.rows) != checkpoint["replay_rows"]:
                raise ValueError(f"{len(replay.rows)} rows instead of {checkpoint['replay_rows']}")
        except (OSError, ValueError) as error:
            raise BadInput(f"--resume {args.resume}: its {REPLAY_FILE} is missing or damaged, so it cannot continue") from error
    else:
        check_disk(args.run_dir, 4 * (2 * obs_dim + action_dim + 2) * (capacity + spare))

    # ---- Training: buffers and the loop ------------------------------------------------------------------------
    # An iteration lives in numpy arrays (time, environment, ...); fragments are cut from it.
    shape = (args.num_steps, args.num_envs)
    inputs = np.zeros((*shape, obs_dim + action_dim), dtype=np.float32)
    true_rewards, valid = (np.zeros(shape, dtype=np.float32) for _ in range(2))
    ended = np.zeros(args.num_envs, dtype=bool)  # whether the last step ended an episode: the next row is its reset
    episode_returns, episode_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)
    warmup_iterations = max(1, math.ceil(args.learning_starts / batch_size))

    def added_term(pairs: Tensor, rollouts: list[tuple[Tensor, Tensor]], weight: float) -> tuple[Tensor, Tensor]:
        """What sobirl, hpgd-style or pbrl-style add to the mean cross-entropy, from these pairs of the queue and these rollouts, and
        the pairs' scores."""
        sums = [(model(each) * weights).sum(-1) for each, weights in rollouts]  # discounted, of each rollout
        if args.reward_update == "pbrl-style":
            return pbrl_term(sums[1], sums[0], weight), torch.full((1,), math.nan)
        pair_inputs = queue.inputs[pairs].to(device)
        rewards = model(pair_inputs)
        losses = cross_entropies(rewards, queue.labels[pairs].to(device))
        shift = int(torch.randint(1, len(pairs), ())) if args.permute_cross_entropy else 0
        if args.reward_update == "hpgd-style":
            advantages = rollout_advantages(*(each.view(len(pairs), 2, -1) for each in sums))
            return hpgd_term(losses, advantages, args.fragment_length, weight, args.baseline, shift), advantages.sum(1)
        if args.implicit == "one-step":
            resampled = resample_actions(agent.actor, pair_inputs, obs_dim, args.implicit_actions)
            advantages = one_step_advantages(rewards, model(resampled))
        elif args.implicit == "rollouts":
            advantages = rollout_advantages(*(each.view(*rewards.shape, -1) for each in sums))
        else:
            advantages = reward_to_go_advantages(rewards, args.gamma)
        scores = advantages.sum((1, 2))
        return sobirl_term(losses, scores, weight, args.baseline, shift), scores

    def lower_reward(batch: Batch) -> Tensor:
        """The reward (B,) that the lower level sees; the network is in evaluation mode."""
        if args.reward_update == "ground-truth":
            return batch.rewards
        if args.reward_update == "constant":
            return torch.full_like(batch.rewards, args.constant_reward)
        with torch.no_grad():
            return model(batch.inputs)

    def update_follower(rows: Tensor, noises: Tensor) -> dict[str, Tensor]:
        """Update each agent's critics by the rows of `Replay.sample` (B, W), then its actor by the same rows as often as there
        is noise for: (1 + times, agents, B, A), the first for the critics. Returns what is logged of the agent that acts."""
        batch, found = replay.batch(rows.to(device)), {}
        critic_noise, *actor_noises = noises.to(device)
        rewards = lower_reward(batch)
        for learner, noise in zip(learners, critic_noise):
            statistics = learner.update_critics(batch, rewards, noise)
            found |= statistics if learner.agent is agent else {}
        for actor_noise in actor_noises:
            for learner, noise in zip(learners, actor_noise):
                policy_term: Tensor | float = 0.0
                if learner.agent is agent and pair_losses is not None:
                    output = agent.actor(pair_inputs[..., :obs_dim])
                    logprobs = squashed_logprob(output, pair_inputs[..., obs_dim:])
                    policy_term = pbrl_policy_term(pair_losses, logprobs, args.pbrl_penalty, args.gamma)
                statistics = learner.update_actor(batch, noise, policy_term)
                found |= statistics if learner.agent is agent else {}
        return found

    update_of: dict[int, Callable] = dict.fromkeys((0, args.policy_frequency), update_follower)  # by the actor's updates in it
    if args.device == "cuda" and args.reward_update != "pbrl-style":  # its policy term has pairs of any number
        update_of = {times: GraphedUpdate(update_follower) for times in update_of}
    acting, logged = NumpyActor(agent.actor), dict[str, Tensor]()

    run = Run(args, checkpoint)
    if not checkpoint:
        try:
            Replay.create(run.folder / REPLAY_FILE, capacity + spare, obs_dim, action_dim)
        except OSError as error:
            shutil.rmtree(run.folder)
            raise BadInput(f"--run-dir {args.run_dir} cannot hold the replay: {error.strerror}; name another folder") from error
        replay = Replay(run.folder / REPLAY_FILE, capacity, obs_dim, action_dim)

    with run:
        obs = envs.reset()[0].astype(np.float32)
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            iteration_start, env_time, update_time, episodes = time.perf_counter(), 0.0, 0.0, []
            learning = iteration > warmup_iterations
            noise = (torch.randn if learning else torch.rand)(*shape, action_dim).numpy()
            for t in range(args.num_steps):
                # ---- Training: one step of the environments ----------------------------------------------------
                actions = acting(obs, noise[t]) if learning else 2 * noise[t] - 1
                env_start = time.perf_counter()
                next_obs, reward, ends, cut, _ = envs.step(task_actions(actions, action_space))
                env_time += time.perf_counter() - env_start
                next_obs, transition, ended = next_obs.astype(np.float32), ~ended, ends | cut
                inputs[t, :, :obs_dim], inputs[t, :, obs_dim:] = obs, actions
                true_rewards[t], valid[t] = np.where(transition, reward, 0.0), transition
                columns = obs, actions, next_obs, reward, ends
                replay.add(*(columns if transition.all() else (column[transition] for column in columns)))
                obs = next_obs
                episode_returns += true_rewards[t]
                episode_lengths += transition
                if ended.any():
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    wall_time = time.perf_counter() - run.started
                    for index in ended.nonzero()[0].tolist():
                        episodes.append((step, wall_time, index, float(episode_returns[index]), int(episode_lengths[index])))
                    episode_returns[ended], episode_lengths[ended] = 0.0, 0

                # ---- Lower level: one update for each transition -----------------------------------------------
                update_start = time.perf_counter()
                for count in range(replay.added - int(transition.sum()) + 1, replay.added + 1) if learning else ():
                    times = args.policy_frequency if count % args.policy_frequency == 0 else 0
                    rows = replay.sample(args.batch_size)
                    logged |= update_of[times](rows, torch.randn(1 + times, len(agents), args.batch_size, action_dim))
                    if times:
                        acting.refresh()
                update_time += time.perf_counter() - update_start

            # ---- Upper level: ask the teacher ------------------------------------------------------------------
            reward_start = time.perf_counter()
            rollout_inputs, rollout_rewards = torch.from_numpy(inputs), torch.from_numpy(true_rewards)
            windows = fragment_windows(torch.from_numpy(valid), args.fragment_length)
            # Measured on pairs that nobody labels, before the network has seen a transition of this iteration.
            heldout, heldout_rewards = draw_pairs(
                windows, args.heldout_pairs, args.fragment_length, rollout_inputs, rollout_rewards
            )
            heldout_labels, _ = teacher_labels(heldout_rewards, "oracle")
            rows = torch.from_numpy(valid).bool()
            with torch.no_grad():
                heldout_guess = model(heldout.to(device)).cpu()
                learned_rewards = model(rollout_inputs[rows].to(device)).cpu()
            due = max(0, labels_wanted(args, iteration, num_iterations, warmup_iterations) - queue.added)
            due = due if args.reward_update in LEARNED else 0
            pairs, pair_rewards = draw_pairs(windows, due, args.fragment_length, rollout_inputs, rollout_rewards)
            labels, answered = teacher_labels(
                pair_rewards, args.teacher, args.teacher_temperature, args.teacher_error, args.teacher_threshold,
                args.teacher_gamma,
            )  # fmt: skip
            queue.push(pairs[answered], labels[answered])
            newest = (queue.added - 1 - torch.arange(min(int(answered.sum()), args.queue_size))) % args.queue_size

            # ---- Upper level: rollouts for the term that is added to the cross-entropy --------------------------
            global_step, alpha = iteration * batch_size, float(agent.log_alpha.detach().exp())
            weight = args.pbrl_penalty if args.reward_update == "pbrl-style" else min(1 / alpha, args.max_inverse_temperature)
            adds = learning and args.reward_update in ("sobirl", "hpgd-style", "pbrl-style")
            if args.reward_update != "pbrl-style":  # the permuted control needs a second pair
                adds = adds and global_step > args.implicit_starts and len(newest) > int(args.permute_cross_entropy)
            rollouts: list[tuple[Tensor, Tensor]] = []
            if adds and args.reward_update == "pbrl-style":  # both actors with the same starts and noise: equal ones have no penalty
                lengths = torch.full((args.rollouts or 10,), args.rollout_length or 200)
                seed = derived_seed(args.seed, 2**42 + global_step)
                policies = [acting, *(NumpyActor(each.actor) for each in agents[1:])]
                rollouts = [simulator.roll_out(None, None, lengths, args.gamma, policy, seed) for policy in policies]
            elif adds and simulator is not None:
                visited = queue.inputs[newest]
                if args.reward_update == "hpgd-style":  # one step of each fragment
                    steps = torch.randint(args.fragment_length, visited.shape[:2])
                    visited = visited.gather(2, steps[..., None, None].expand(-1, -1, 1, visited.shape[-1]))
                visited = visited.flatten(0, 2).repeat_interleave(args.rollouts or 1, 0)
                for first_actions in (visited[:, obs_dim:], None):
                    lengths, decay = torch.full((len(visited),), args.rollout_length or 10), args.gamma
                    if args.reward_update == "hpgd-style":
                        lengths, decay = geometric_lengths(len(visited), args.gamma), math.sqrt(args.gamma)
                    rollouts.append(simulator.roll_out(visited[:, :obs_dim], first_actions, lengths, decay, acting))
            rollouts = [(each.to(device), weights.to(device)) for each, weights in rollouts]

            # ---- Upper level: move theta -----------------------------------------------------------------------
            # The cross-entropy takes epochs. The policy has answered one theta, that of the first minibatch, so what is added
            # counts there and nowhere else; as released, it counts in every minibatch, with that one's pairs.
            epochs = args.reward_epochs if learning else args.warmup_epochs if iteration == warmup_iterations else 0
            epochs = epochs if len(queue) and args.reward_update in LEARNED else 0
            minibatches = [mb for _ in range(epochs) for mb in torch.randperm(len(queue)).split(args.reward_batch_size)]
            carriers = (minibatches if args.implicit_pairs == "queue" else [newest]) if adds else []
            epoch_losses, scores, ratios, factors = [], [], [], []
            model.train()
            for k, mb in enumerate(minibatches):
                losses = cross_entropies(model(queue.inputs[mb].to(device)), queue.labels[mb].to(device))
                gradients = torch.autograd.grad(drlhf_loss(losses), reward_parameters)
                if k < len(carriers):
                    model.eval()  # the policy answers the reward without dropout
                    term, pair_scores = added_term(carriers[k], rollouts, weight)
                    model.train()
                    added = torch.autograd.grad(term, reward_parameters)
                    gradients, ratio, factor = limited_sum(gradients, added, args.max_gradient_ratio)
                    for values, value in ((scores, pair_scores.detach()), (ratios, ratio), (factors, factor)):
                        values.append(value)
                for parameter, gradient in zip(reward_parameters, gradients):
                    parameter.grad = gradient
                reward_optimiser.step()
                epoch_losses.append(losses.detach())
            model.eval()
            pair_inputs = pair_losses = None
            if args.reward_update == "pbrl-style" and learning and len(newest):
                pair_inputs, pair_labels = queue.inputs[newest].to(device), queue.labels[newest].to(device)
                with torch.no_grad():
                    pair_losses = cross_entropies(model(pair_inputs), pair_labels)

            # ---- Training: log and checkpoint ------------------------------------------------------------------
            now = time.perf_counter()
            opinions = {
                "bilevel/heldout_accuracy": accuracy(heldout_guess, heldout_rewards),
                "bilevel/heldout_cross_entropy": cross_entropies(heldout_guess, heldout_labels).mean(),
                "bilevel/reward_correlation": correlation(learned_rewards, rollout_rewards[rows]),
                "bilevel/learned_reward": learned_rewards.mean(),
            }
            if args.reward_update in ("ground-truth", "constant"):  # nobody asks the network
                opinions = dict.fromkeys(opinions, math.nan)
            names = ("losses/qf_loss", "losses/qf_values", "losses/actor_loss", "losses/logprobs")
            metrics = {name: float(logged.get(name, torch.tensor(math.nan)).mean()) for name in names}
            metrics |= {
                "losses/alpha": alpha,
                "losses/cross_entropy": float(torch.cat(epoch_losses)[-len(queue) :].mean()) if epoch_losses else math.nan,
                "bilevel/labels": float(queue.added),
                "bilevel/true_reward": float(rollout_rewards[rows].mean()),
                "bilevel/implicit_weight": weight * float(torch.stack(factors).mean()) if factors else 0.0,
                "bilevel/gradient_factor": float(torch.stack(factors).mean()) if factors else math.nan,
                "bilevel/implicit_ratio": float(torch.stack(ratios).nanmean()) if ratios else math.nan,
                "bilevel/score_mean": float(torch.cat(scores).mean()) if scores else math.nan,
                "bilevel/simulator_steps": float(simulator.steps if simulator else 0),
                "time/env": env_time,
                "time/policy": reward_start - iteration_start - env_time - update_time,
                "time/update": now - reward_start + update_time,
                "time/reward": now - reward_start,
            }
            run.log(global_step, metrics | {name: float(value) for name, value in opinions.items()}, episodes)
            due = iteration % args.checkpoint_every == 0 or iteration == num_iterations or replay.spare_left < batch_size
            if due or run.stop_signal:
                state = {
                    "replayed": replay.save(),
                    "replay_rows": len(replay.rows),
                    "agents": [each.state_dict() for each in agents],
                    "reward": model.state_dict(),
                    "optimisers": [each.state_dict() for each in optimisers],
                    "queue": queue.state_dict(),
                    "policy_pairs": [] if pair_losses is None else [pair_inputs, pair_losses],
                    "simulator_steps": simulator.steps if simulator else 0,
                }
                run.save_checkpoint(state)
            if run.stop_signal:
                run.stop()

        # ---- Training: model, evaluation, video ----------------------------------------------------------------
        run.end_training()
        envs.close()
        model_file = {
            "script": SCRIPT,
            "env_id": args.env_id,
            "actor": agent.actor.cpu().state_dict(),
            "reward": model.cpu().state_dict(),
            "sizes": [obs_dim, action_dim, args.actor_width],
            "action_low": torch.as_tensor(action_space.low, dtype=torch.float32),
            "action_high": torch.as_tensor(action_space.high, dtype=torch.float32),
        }
        path = run.folder / "model.pt"
        if args.save_model or args.eval_episodes or args.capture_video:
            write_atomically(path, lambda new: torch.save(model_file, new))
        results = {}
        if args.eval_episodes:
            results["eval_returns"] = evaluate(load_policy(path), args, args.eval_episodes)
            print(f"mean return of {args.eval_episodes} evaluation episodes: {np.mean(results['eval_returns']):.1f}")
        if args.capture_video and not film_in_child(args.env_id, path, run.folder / "videos", args.seed, args.terminate):
            print("the video could not be made; the run is complete without it", file=sys.stderr)
        if not args.save_model:
            path.unlink(missing_ok=True)
        run.close("finished", **results)
        replay.delete()
    return run.folder


# ---- Entry point (shared) --------------------------------------------------------------------------------------
if __name__ == "__main__":
    try:
        train(parse_args(Args))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
