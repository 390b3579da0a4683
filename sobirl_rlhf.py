"""SoBiRL (Yang et al. 2025, arXiv:2405.19697, Alg. 5): a reward from comparisons.

There are two levels. Upper level: theta, the weights of a reward network r, which is fitted to a teacher's
choices between pairs of fragments. Lower level: the policy pi*(theta) that soft actor-critic (SAC) fits to
that reward. The policy changes with theta, and theta's gradient counts that in:

    min_theta E[l(d_1, d_2; theta)],  d_1, d_2 ~ pi*(theta)
    l = -y log p - (1 - y) log(1 - p),  p = sigma(R(d_1) - R(d_2)),  R(d) = sum_h r(s_h, a_h)
                                                   eq. (11), (101)     -> cross_entropies
    grad = E[grad l]                               eq. (12), explicit
         + E[l sum_h (grad Q* - grad V*)(s_h, a_h)] / alpha            eq. (13) -> implicit_term
    grad Q*(s, a), grad V*(s) = E_pi*[sum_t gamma^t grad r(s_t, a_t)]  Prop. 5.1, from (s, a), from s

with SAC's temperature alpha. `--reward-update` names the method. drlhf (Christiano et al. 2017) has (12)
alone; the next three add to it. sobirl adds (13); hpgd-style (Thoma et al. 2024) adds (13) from rollouts of
geometric length; pbrl-style (Shen et al. 2024) adds a value penalty and has a second actor. ground-truth is
SAC on the true reward. Controls are constant, frozen (a random network) and --permute-cross-entropy.
`--implicit` names the estimate of Prop. 5.1: one-step, as released -> one_step_advantages; rollouts, those
of Stoc-SoBiRL (79), where MuJoCo can be put into a fragment's states -> rollout_advantages. SAC is CleanRL's.

Departures from the released code, which has no MuJoCo: (13) is over the policy's own newest pairs, with a
baseline; it is in one reward step for each theta that the policy answers, and in all of them, as in the
paper, with --implicit-pairs newest-every-step; 1 / alpha and the norm of (13)'s gradient are limited; both
levels see the same bounded reward; accuracy is measured on pairs that nobody labels. docs/sobirl.md numbers
the details.

    python sobirl_rlhf.py --env-id Hopper-v4 --reward-update sobirl
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
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
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
AtLeastTwo = Annotated[int, Field(ge=2)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveOrInf = Annotated[float, Field(gt=0, allow_inf_nan=True)]
ADDS = ("sobirl", "hpgd-style", "pbrl-style")  # values of --reward-update that add to the cross-entropy
LEARNED = ("drlhf", *ADDS)  # those that ask the teacher


class Args(CheckedArgs):
    """The run, the task, the lower level, then the upper level."""

    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the environments, the initial weights, the actions, the minibatches and the teacher"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    cuda_graphs: bool = True
    """launch an update on CUDA as one graph; otherwise kernel by kernel, for debugging"""
    run_dir: Path = Path("runs")
    """the run's own folder is made in this one: {run_dir}/{env_id}__{exp_name}__{seed}__{time}"""
    resume: Path | None = None
    """continue, extend or replay the run in this folder, with its arguments; those given again win"""
    checkpoint_every: PositiveInt = 10
    """iterations between two checkpoints, which hold the replay as well"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "bilevel-actor-critic"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team"""
    save_model: bool = False
    """write model.pt (the policy) at the end; the reward network is in checkpoint.pt"""
    eval_episodes: Annotated[int, Field(ge=0, le=10_000)] = 0
    """episodes played with the mean action at the end, through Gymnasium"""
    capture_video: bool = False
    """film one such episode"""

    env_id: str = "Hopper-v4"
    """any task with a bounded Box action space; also namespace/Name-v0 and module:Name-v0"""
    env_kwargs: Annotated[str, pydantic.AfterValidator(json_object)] = "{}"
    """keyword arguments of the task, as JSON: '{"terminate_when_unhealthy": false}'"""
    terminate: bool = True
    """--no-terminate: a fall does not end an episode; for tasks with Gymnasium's terminate_when_unhealthy"""
    env_backend: Literal["auto", "envpool", "sync", "async"] = "sync"
    """who steps the environments: EnvPool, or Gymnasium in this process or in one for each; auto: EnvPool
    where it has the task, else sync"""
    env_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """EnvPool threads; 0: one for each usable core, at most num_envs"""
    total_timesteps: PositiveInt = 500_000
    """environment steps in all, rounded down to whole iterations; 500,000 is the paper's for Hopper"""
    num_envs: Annotated[int, Field(ge=1, le=65536)] = 1
    """parallel environments"""
    num_steps: AtLeastTwo = 2000
    """steps of each environment between two reward updates (our choice; the paper's are 10,000 on Atari)"""

    gamma: BelowOne = 0.99
    """discount factor"""
    buffer_size: PositiveInt = 1_000_000
    """transitions kept for replay"""
    batch_size: PositiveInt = 256
    """transitions in a minibatch; one update for each transition"""
    learning_starts: NonNegativeInt = 5000
    """uniformly random steps at first, rounded up to whole iterations, at least one"""
    learning_rate: PositiveFloat = 3e-4
    """Adam step size of the actor"""
    critic_learning_rate: PositiveFloat = 1e-3
    """Adam step size of the critics and of the temperature"""
    policy_frequency: PositiveInt = 2
    """update the actor every so many critic updates, and then so many times"""
    target_rate: Annotated[float, Field(gt=0, le=1)] = 0.005
    """how far the target critics move towards the critics in an update"""
    autotune: bool = True
    """adapt the temperature: the entropy is to be minus the number of actions (Haarnoja et al. 2018b)"""
    alpha: Annotated[float, Field(ge=1e-30, le=1e30)] = 1.0
    """temperature at first, or throughout with --no-autotune"""
    actor_width: Width = 256
    """units in each of the actor's two hidden layers"""
    critic_width: Width = 256
    """units in each of a critic's two hidden layers"""

    reward_update: Literal[*LEARNED, "ground-truth", "constant", "frozen"] = "sobirl"
    """how the reward is learned; or the true one; or a control: 1 everywhere, a random network"""
    permute_cross_entropy: bool = False
    """a control for sobirl and hpgd-style: the implicit term gets another pair's cross-entropy"""
    reward_bound: Literal["tanh", "clip"] = "tanh"
    """what keeps the reward in [-1, 1] at both levels: clip as released; tanh is smooth (Assumption 7.3)"""
    reward_width: Width = 128
    """units in each of the reward network's two hidden layers"""
    reward_ensemble: PositiveInt = 1
    """reward networks; the reward is their mean"""
    reward_candidates: PositiveInt = 1
    """pairs drawn for each that is asked; of all drawn, those are asked on which the networks disagree most
    (10 in B-Pref)"""
    reward_model: Path | None = None
    """checkpoint.pt whose reward network is the initial one; --reward-update frozen keeps it"""
    reward_dropout: BelowOne = 0.0
    """dropout rate after these layers while the reward learns"""
    reward_learning_rate: PositiveFloat = 3e-4
    """AdamW step size of the reward network"""
    reward_batch_size: AtLeastTwo = 64
    """pairs in a minibatch of the reward update"""
    reward_epochs: PositiveInt = 1
    """passes over the queue in a reward update"""
    fragment_length: PositiveInt = 25
    """steps of a fragment (app. J.2)"""
    queue_size: AtLeastTwo = 3000
    """labelled pairs kept, the newest"""
    label_budget: NonNegativeInt = 3000
    """labels in all; 3,000 comparisons are the paper's"""
    warmup_pairs: NonNegativeInt = 600
    """pairs labelled in the random steps"""
    warmup_epochs: NonNegativeInt = 50
    """passes over them by the cross-entropy alone (512 with dropout as released)"""
    pairs_per_iteration: NonNegativeInt | None = None
    """labels of an iteration after that; default: what is left of the budget, evenly over the run"""
    heldout_pairs: NonNegativeInt = 64
    """unlabelled pairs of an iteration for the logged accuracy and cross-entropy"""
    teacher: Literal["oracle", "stochastic", "mistake", "skip", "equal", "myopic", "human"] = "oracle"
    """who labels (Lee et al. 2021, B-Pref); oracle: the higher true return wins, the paper's rule;
    stochastic as released; human: people, through label_preferences.py"""
    teacher_temperature: PositiveFloat = 1.0
    """true return that makes odds of e for the stochastic teacher"""
    wait_for_labels: bool = True
    """wait until people have answered all of an iteration's pairs; else go on with what is there"""
    labels: Path | None = None
    """labels.jsonl of people: the queue starts with its pairs, but each tenth is held out to measure the
    accuracy; only --teacher human is asked for more"""

    implicit: Literal["one-step", "rollouts"] = "one-step"
    """how sobirl estimates grad Q and grad V: as released, or by Stoc-SoBiRL's rollouts"""
    implicit_pairs: Literal["newest", "newest-every-step", "queue"] = "newest"
    """pairs of what is added: the newest, in the first reward step of an iteration; the newest, in every
    step, as in the paper; for sobirl also those of each step's own minibatch, as released"""
    implicit_actions: PositiveInt = 2
    """actions drawn for the one-step grad V"""
    implicit_starts: NonNegativeInt = 0
    """environment steps before the implicit term counts (100,000 as released)"""
    max_inverse_temperature: PositiveOrInf = 10.0
    """largest 1 / alpha in the implicit term (inf as released)"""
    max_gradient_ratio: PositiveOrInf = 10.0
    """largest norm of the added gradient, in norms of the cross-entropy's (inf as released)"""
    baseline: bool = True
    """in the implicit term, take the mean of the other pairs off each cross-entropy (not in the paper)"""
    rollouts: PositiveInt | None = None
    """M, rollouts for each estimate; for pbrl-style of each actor; default: 1, for pbrl-style 10"""
    rollout_length: PositiveInt | None = None
    """T, steps of a rollout; default: 10 for sobirl, 200 for pbrl-style; hpgd-style draws it"""
    pbrl_penalty: PositiveFloat = 1.0
    """lambda, weight of PBRL's value penalty; 1 is our choice"""

    @pydantic.model_validator(mode="after")
    def check_shapes(self):
        """Raise BadInput unless the sizes fit together, and the flags of one method stand with it."""
        method, rows = self.reward_update, self.num_envs * self.num_steps
        random = max(1, math.ceil(self.learning_starts / rows)) * rows
        if self.total_timesteps < random + rows:
            needs = f"must be at least {random + rows}: {random} random steps and an iteration that learns"
            raise BadInput(f"--total-timesteps {self.total_timesteps} {needs}")
        if self.fragment_length > self.num_steps:
            raise BadInput(f"--fragment-length {self.fragment_length} must be at most --num-steps")
        if self.permute_cross_entropy and method not in ("sobirl", "hpgd-style"):
            raise BadInput(f"--permute-cross-entropy is for sobirl and hpgd-style, not for {method}")
        if (self.implicit != "one-step" or self.implicit_pairs == "queue") and method != "sobirl":
            raise BadInput(f"--implicit and --implicit-pairs queue are for sobirl, not for {method}")
        if self.implicit_pairs != "newest" and method not in ADDS:
            raise BadInput(f"--implicit-pairs is for {', '.join(ADDS)}, not for {method}")
        if self.implicit_pairs == "queue" and (self.implicit == "rollouts" or self.permute_cross_entropy):
            raise BadInput("--implicit-pairs queue has no rollouts and no --permute-cross-entropy")
        if self.labels and self.teacher != "human" and method in ADDS:
            raise BadInput(
                f"--labels: a file has no newest pairs, as {method} needs; use drlhf or a human teacher"
            )
        if self.reward_candidates > self.reward_ensemble == 1:
            raise BadInput("--reward-candidates: one network cannot disagree; raise --reward-ensemble")
        kwargs = json.loads(self.env_kwargs)
        if not self.terminate:
            self.env_kwargs = json.dumps(kwargs | {"terminate_when_unhealthy": False})
        elif kwargs.get("terminate_when_unhealthy") is False:  # also of a run with --no-terminate
            raise BadInput("--env-kwargs has terminate_when_unhealthy false: remove it or use --no-terminate")
        return self


METRICS = (
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS",
    "losses/qf_loss", "losses/qf_values", "losses/actor_loss", "losses/logprobs", "losses/alpha",
    "losses/cross_entropy", "bilevel/labels", "bilevel/true_reward", "bilevel/implicit_weight",
    "bilevel/implicit_ratio", "bilevel/score_mean", "bilevel/simulator_steps", "bilevel/heldout_accuracy",
    "bilevel/heldout_cross_entropy", "bilevel/reward_correlation", "bilevel/learned_reward",
    "bilevel/label_accuracy", "time/env", "time/policy", "time/update", "time/reward",
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


# ---- Agent and reward network ------------------------------------------------------------------------
LOGSTD_MIN, LOGSTD_MAX = -5.0, 2.0  # as in CleanRL


def check_action_space(env_id: str, space: gym.Space) -> None:
    """Raise BadInput unless the actions are vectors of numbers whose box has a finite width everywhere."""
    box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    with np.errstate(over="ignore", invalid="ignore"):
        width = np.float32(space.high) - np.float32(space.low) if box else np.zeros(0)
    if not width.size or not (np.isfinite(width) & (width > 0)).all():
        needs = "this script needs a flat Box of floats with low < high and a finite high - low"
        raise BadInput(f"--env-id {env_id!r} has the action space {space}; {needs}")


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden ReLU layers with PyTorch's own initial weights, as in CleanRL."""
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class Agent(nn.Module):
    """SAC's networks: a squashed Gaussian actor, two critics, their slow copies, the log temperature.

    The actor may be any module from observations (..., D) to (..., 2A), see `gaussian_parameters`, a critic
    any from observation and action (..., D+A) to one value (..., 1). Actions are in [-1, 1] everywhere but in
    the task. Called with raw observations, the agent is the policy as it is played.
    """

    def __init__(self, obs_dim: int, action_dim: int, actor_width: int = 256, critic_width: int = 256):
        super().__init__()
        self.actor = mlp(obs_dim, actor_width, 2 * action_dim)
        self.critics = nn.ModuleList(mlp(obs_dim + action_dim, critic_width, 1) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.register_buffer("action_low", -torch.ones(action_dim))
        self.register_buffer("action_high", torch.ones(action_dim))

    def set_action_space(self, space: gym.spaces.Box) -> None:
        """Keep the task's action box."""
        self.action_low.copy_(torch.as_tensor(space.low))
        self.action_high.copy_(torch.as_tensor(space.high))

    def task_actions(self, actions: Tensor) -> Tensor:
        """Actions (..., A) in [-1, 1] as the task takes them: in its box."""
        spread = self.action_low + 0.5 * (actions + 1) * (self.action_high - self.action_low)
        return spread.clamp(self.action_low, self.action_high)

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions (..., A) in [-1, 1] at observations (..., D) with standard normal noise (..., A)."""
        mean, logstd = gaussian_parameters(self.actor(obs))
        return (mean + logstd.exp() * noise).tanh()

    def forward(self, raw_obs: Tensor) -> Tensor:
        """The policy as it is played: raw observations (..., D) -> mean actions in the box (..., A)."""
        mean, _ = gaussian_parameters(self.actor(torch.as_tensor(raw_obs).float()))
        return self.task_actions(mean.tanh())


class RewardNetwork(nn.Module):
    """r_theta(s, a) in [-1, 1], the reward that both levels see: two hidden leaky ReLU layers, with dropout
    while it learns."""

    def __init__(self, inputs: int, width: int, dropout: float = 0.0, bound: str = "tanh"):
        super().__init__()
        hidden = [nn.Linear(inputs, width), nn.LeakyReLU(), nn.Dropout(dropout)]
        hidden += [nn.Linear(width, width), nn.LeakyReLU(), nn.Dropout(dropout)]
        self.network, self.bound = nn.Sequential(*hidden, nn.Linear(width, 1)), bound

    def forward(self, inputs: Tensor) -> Tensor:
        """Observations and actions side by side (..., D+A) -> rewards (...)."""
        raw = self.network(inputs).squeeze(-1)
        return raw.tanh() if self.bound == "tanh" else raw.clamp(-1, 1)


class RewardEnsemble(nn.ModuleList):
    """Reward networks with initial weights of their own, which learn from the same minibatches, each by its
    own cross-entropy."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The mean of their rewards."""
        return torch.stack([member(inputs) for member in self]).mean(0)


def body_positions(envs: gym.vector.VectorEnv) -> Tensor:
    """MuJoCo's qpos (N, nq) of the environments, from which people's clips are drawn. Raises BadInput."""
    try:
        return torch.tensor(np.stack([each.unwrapped.data.qpos for each in envs.unwrapped.envs]))
    except AttributeError:
        raise BadInput("--teacher human needs a MuJoCo task and --env-backend sync, to draw clips") from None


# ---- Lower level: soft actor-critic ------------------------------------------------------------------
def gaussian_parameters(output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation (..., A) from the actor's output (..., 2A); tanh bounds the latter."""
    mean, raw = output.chunk(2, -1)
    return mean, LOGSTD_MIN + 0.5 * (LOGSTD_MAX - LOGSTD_MIN) * (raw.tanh() + 1)


def squashed_sample(output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions a = tanh(u) (..., A), u = mean + std noise, and log pi(a|s) (...) from the actor's output.

    log pi(a) = log N(u) - sum log(1 - tanh(u)^2) (Haarnoja et al. 2018a, app. C), the second in a form that
    never is log 0: log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)).
    """
    mean, logstd = gaussian_parameters(output)
    u = mean + logstd.exp() * noise
    logprob = -0.5 * noise * noise - logstd - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return u.tanh(), logprob.sum(-1) - 0.5 * math.log(2 * math.pi) * noise.shape[-1]


def squashed_logprob(output: Tensor, actions: Tensor) -> Tensor:
    """log pi(a|s) (...) of given actions (..., A) in [-1, 1], which are moved at least 1e-6 inside."""
    u = actions.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    mean, logstd = gaussian_parameters(output)
    return squashed_sample(output, (u - mean) * (-logstd).exp())[1]


def action_values(critics: nn.ModuleList, inputs: Tensor) -> Tensor:
    """Q_j(s, a) of both critics (2, ...): observations and actions side by side (..., D+A)."""
    return torch.stack([critic(inputs).squeeze(-1) for critic in critics])


def soft_values(values: Tensor, logprobs: Tensor, alpha: Tensor) -> Tensor:
    """min_j Q_j(s, a) - alpha log pi(a|s) (B,), a ~ pi, whose mean is V(s): values (2, B), logprobs (B,)."""
    return values.amin(0) - alpha * logprobs


def critic_targets(rewards: Tensor, terminated: Tensor, next_soft_values: Tensor, gamma: float) -> Tensor:
    """r + gamma (1 - terminated) V(s') (B,). A time limit is no termination (Haarnoja et al. 2018b, eq. 5
    and 6)."""
    return rewards + gamma * (1 - terminated) * next_soft_values


def critic_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Sum over both critics of the mean squared error: values (2, B), targets (B,)."""
    return ((values - targets) ** 2).mean(1).sum()


def actor_loss(values: Tensor, logprobs: Tensor, alpha: Tensor) -> Tensor:
    """Mean of alpha log pi(a|s) - min_j Q_j(s, a), a ~ pi (Haarnoja et al. 2018b, eq. 9): values (2, B)."""
    return -soft_values(values, logprobs, alpha).mean()


def temperature_loss(log_alpha: Tensor, logprobs: Tensor, target_entropy: float) -> Tensor:
    """-alpha mean(log pi + target entropy) (Haarnoja et al. 2018b, eq. 18); logprobs carry no gradient."""
    return -log_alpha.exp() * (logprobs.detach().mean() + target_entropy)


def descend(optimiser: torch.optim.Optimizer, gradients: tuple[Tensor, ...]) -> None:
    """One step of the optimiser, with these gradients of its parameters."""
    for parameter, gradient in zip(optimiser.param_groups[0]["params"], gradients):
        parameter.grad = gradient
    optimiser.step()


def make_optimisers(agent: Agent, args: Args) -> list[torch.optim.Optimizer]:
    """Adam of the actor, of both critics, of the temperature; capturable: a CUDA graph may hold its steps."""
    parts = agent.actor.parameters(), agent.critics.parameters(), [agent.log_alpha]
    sizes = args.learning_rate, args.critic_learning_rate, args.critic_learning_rate
    return [torch.optim.Adam(part, size, fused=True, capturable=True) for part, size in zip(parts, sizes)]


def update_agent(
    agent: Agent, optimisers: list, args: Args, minibatch: list[Tensor], noises: Tensor, extra_loss=None
) -> dict[str, Tensor]:
    """One step of both critics, one of the target critics towards them, then one of the actor and of the
    temperature for each set of noise but the first. Each gradient is that of its own parameters alone: the
    actor's passes through the critics.

    minibatch: inputs (B, D+A), next_obs (B, D), rewards and terminated (B,); standard normal noises
    (1 + actor steps, B, A), the first for the next actions. `extra_loss(actor)` is added to the actor's loss.
    Returns what is logged.
    """
    inputs, next_obs, rewards, terminated = minibatch
    obs, critics = inputs[:, : next_obs.shape[1]], list(agent.critics.parameters())
    with torch.no_grad():
        next_actions, next_logprobs = squashed_sample(agent.actor(next_obs), noises[0])
        next_values = action_values(agent.targets, torch.cat([next_obs, next_actions], -1))
        following = soft_values(next_values, next_logprobs, agent.log_alpha.exp())
        targets = critic_targets(rewards, terminated, following, args.gamma)
    values = action_values(agent.critics, inputs)
    errors = critic_loss(values, targets)
    descend(optimisers[1], torch.autograd.grad(errors, critics))
    with torch.no_grad():
        for target, parameter in zip(agent.targets.parameters(), critics):
            target.lerp_(parameter, args.target_rate)
    found = {"qf_loss": errors, "qf_values": values}
    for noise in noises[1:]:
        actions, logprobs = squashed_sample(agent.actor(obs), noise)
        values = action_values(agent.critics, torch.cat([obs, actions], -1))
        loss = actor_loss(values, logprobs, agent.log_alpha.detach().exp())
        total = loss + extra_loss(agent.actor) if extra_loss else loss
        descend(optimisers[0], torch.autograd.grad(total, list(agent.actor.parameters())))
        if args.autotune:
            own = temperature_loss(agent.log_alpha, logprobs, -float(noise.shape[-1]))
            descend(optimisers[2], torch.autograd.grad(own, [agent.log_alpha]))
        found |= {"actor_loss": loss, "logprobs": logprobs}
    return {f"losses/{name}": value.detach() for name, value in found.items()}


# ---- CUDA graph (shared) -----------------------------------------------------------------------------
class GraphedUpdate:
    """`update(*inputs)` on a CUDA device by one launch in place of one for each of its hundred and more
    small kernels. The first three calls launch every kernel, the fourth captures the graph.

    A graph repeats kernels at fixed addresses. So `update` must change what it changes in place, and must not
    wait for the device; its inputs are copied into buffers of the graph's own, and the next call overwrites
    the tensors that it returns.
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
        if self.calls <= 3:  # libraries allocate and choose kernels at first, which no graph may hold
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


# ---- Replay and preference queue ---------------------------------------------------------------------
class Ring:
    """The newest `size` rows of some columns, tensors (size, ...): the replay, and the labelled pairs."""

    def __init__(self, size: int, *shapes: tuple[int, ...]):
        self.columns = [torch.zeros(size, *shape) for shape in shapes]
        self.size, self.added = size, 0

    def __len__(self) -> int:
        return min(self.added, self.size)

    def add(self, *columns: Tensor) -> None:
        """Add n rows, (n, ...) of each column; the oldest make room."""
        rows = torch.arange(self.added, self.added + len(columns[0]))[-self.size :] % self.size
        for column, new in zip(self.columns, columns):
            column[rows] = new[-self.size :]
        self.added += len(columns[0])

    def rows(self, ages: Tensor) -> Tensor:
        """Where the rows are that were added so many rows ago, the newest 0."""
        return (self.added - 1 - ages) % self.size

    def sample(self, count: int) -> list[Tensor]:
        """`count` rows of each column, drawn with replacement."""
        rows = self.rows(torch.randint(len(self), (count,)))
        return [column[rows] for column in self.columns]

    def state_dict(self) -> dict:
        """How many rows were added, and those that are there, the oldest first."""
        rows = self.rows(torch.arange(len(self)).flip(0))
        return {"added": self.added, "columns": [column[rows] for column in self.columns]}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`; the size may have changed."""
        self.added = state["added"] - len(state["columns"][0])
        self.add(*state["columns"])


def check_room(args: Args, obs_dim: int, action_dim: int) -> None:
    """Raise BadInput unless the memory can hold replay and queue, and a copy while one is saved."""
    numbers = min(args.buffer_size, args.total_timesteps) * (2 * obs_dim + action_dim + 2)
    numbers += args.queue_size * 2 * args.fragment_length * (obs_dim + action_dim)
    memory = math.inf
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 8 * numbers > memory:
        needs = f"replay and labelled pairs take {8e-9 * numbers:,.1f} GB with their checkpoint"
        raise BadInput(f"--buffer-size: {needs}, more than the memory; make it or --queue-size smaller")


# ---- Fragments (shared) ------------------------------------------------------------------------------
def fragment_windows(valid: Tensor, length: int) -> Tensor:
    """First step and environment (K, 2) of all fragments of `length` transitions within one episode.

    valid (T, N) is 1 for a transition, 0 for the reset that follows each episode's end: a window with no
    reset in it crosses no end.
    """
    counted = nn.functional.pad(valid.cumsum(0), (0, 0, 1, 0))
    return (counted[length:] - counted[:-length] == length).nonzero()


def draw_pairs(windows: Tensor, count: int, length: int, *arrays: Tensor) -> list[Tensor]:
    """`count` pairs of two different fragments, drawn uniformly from windows (K, 2): of each array
    (T, N, ...) the part (count, 2, length, ...). No pair if there are fewer than two windows."""
    count = count if len(windows) > 1 else 0
    first = torch.randint(max(1, len(windows)), (count,))
    second = (first + torch.randint(1, max(2, len(windows)), (count,))) % max(1, len(windows))
    starts, envs = windows[torch.stack([first, second], 1)].unbind(-1)
    steps = starts.unsqueeze(-1) + torch.arange(length)
    return [array[steps, envs.unsqueeze(-1)] for array in arrays]


# ---- Preferences (shared) ----------------------------------------------------------------------------
def teacher_labels(
    rewards: Tensor, rule: str, temperature=1.0, error=0.1, threshold=0.1, gamma=0.9
) -> tuple[Tensor, Tensor]:
    """Labels y (P,), the probability with which the teacher puts the first fragment first, and who was
    answered (P,).

    rewards (P, 2, L), the true ones; R their undiscounted sums. The rules are B-Pref's (Lee et al. 2021):
    oracle      y = 1 if R_1 > R_2, 0 if R_1 < R_2, 1/2 if equal: the paper's
    stochastic  y ~ Bernoulli(sigma((R_1 - R_2) / temperature)): Bradley and Terry's
    mistake     the oracle's, turned round with probability `error`
    skip        the oracle's, but no answer if both R are below threshold times |mean R of those shown|
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
        labels = (torch.rand_like(labels) < torch.sigmoid(difference / temperature)).to(labels)
    elif rule == "mistake":
        labels = torch.where(torch.rand_like(labels) < error, 1 - labels, labels)
    elif rule == "skip":
        answered = returns.amax(1) >= little
    elif rule == "equal":
        labels = torch.where(difference.abs() < little, 0.5, labels)
    return labels, answered


def labels_wanted(args: Args, iteration: int, iterations: int, warmup_iterations: int) -> int:
    """How many labels there are to be after an iteration (from 1) of so many, of which the first are random.

    The warm-up's, evenly over its iterations; then `pairs_per_iteration`, or so that the last iteration
    spends the last of the budget: the implicit term lives on labels of the policy's newest pairs.
    """
    warmup_pairs, learning = min(args.warmup_pairs, args.label_budget), iteration - warmup_iterations
    if learning <= 0:
        return warmup_pairs * iteration // warmup_iterations
    if args.pairs_per_iteration is None:
        left = args.label_budget - warmup_pairs
        return warmup_pairs + left * learning // (iterations - warmup_iterations)
    return min(args.label_budget, warmup_pairs + args.pairs_per_iteration * learning)


def accuracy(rewards: Tensor, truth: Tensor) -> Tensor:
    """How often the sums of learned rewards (P, 2, L) order the fragments as those of the true ones do.

    Pairs of equal true return do not count, a tie of the learned ones counts one half. NaN without pairs.
    """
    learned, true = (each.sum(-1)[:, 0] - each.sum(-1)[:, 1] for each in (rewards, truth))
    return (0.5 * (learned.sign() * true.sign() + 1))[true != 0].mean()


def disagreement(returns: list[Tensor]) -> Tensor:
    """Standard deviation (P,) over the networks of sigma(R_1 - R_2), from the R (P, 2) of each (B-Pref)."""
    return torch.sigmoid(torch.stack(returns).diff(dim=-1).squeeze(-1)).std(0)


# ---- Labels by people (shared) -----------------------------------------------------------------------
def ask_people(folder: Path, args: Args, **columns: Tensor) -> None:
    """Write pairs, columns (P, 2, ...), where label_preferences.py finds them: what the reward network gets,
    and to be drawn `states` (P, 2, L, nq), MuJoCo's positions, or `frames` (P, 2, L + 3, 84, 84), uint8."""
    folder.mkdir(exist_ok=True)
    used = [*pairs_asked(folder), *read_labels(folder / "labels.jsonl")]
    for number, pair in enumerate(zip(*columns.values()), max(used, default=-1) + 1):
        saved = {"pair": number, "env_id": args.env_id, "env_kwargs": args.env_kwargs}
        saved |= {name: each.clone() for name, each in zip(columns, pair)}  # a view is saved as a whole
        write_atomically(folder / f"{number:07}.pt", saved)


def pairs_asked(folder: Path) -> list[int]:
    """The numbers of the pairs that `ask_people` has written to the folder and that are there, in order."""
    return sorted(int(file.stem) for file in folder.glob("*.pt"))


def read_labels(file: Path) -> dict[int, float | None]:
    """Label y of each pair that people have answered, by its number; None: they could not tell.

    A line of labels.jsonl is an answer, and the last one to a pair counts. Not so those to a pair that was
    shown again, which measure agreement, and a line without an end, as while it is written or after a crash.
    Raises BadInput if another line is no answer.
    """
    labels = {}
    for line in file.read_text(errors="replace").split("\n")[:-1] if file.exists() else ():
        try:
            row = json.loads(line)
            if not row["repeat"]:
                labels.pop(row["pair"], None)
                labels |= {} if row["answer"] == "undo" else {row["pair"]: row["label"]}
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{file} is damaged: {line[:80]!r} is no answer; mend or remove it") from error
    return labels


def labelled_pairs(file: Path, taken: set[int]) -> tuple[list[dict], Tensor]:
    """The pairs (P,) that people have labelled, as `ask_people` wrote them beside this file, and their labels
    (P,); but for deleted ones and those whose numbers are in `taken`, to which these are added."""
    new = {*pairs_asked(file.parent)} - taken
    labels = {n: y for n, y in read_labels(file).items() if y is not None and n in new}
    taken.update(labels)
    pairs = [torch.load(file.parent / f"{n:07}.pt", weights_only=True) for n in labels]
    return pairs, torch.tensor(list(labels.values())).float()


# ---- Upper level: reward updates (shared) ------------------------------------------------------------
def cross_entropies(rewards: Tensor, labels: Tensor) -> Tensor:
    """l (P,) in nats of each pair: rewards (P, 2, L), labels (P,). Its mean is DRLHF's loss, (12) alone.

    p = sigma(z), z = R_1 - R_2 with sums R (eq. 101); l = -y log p - (1 - y) log(1 - p) = softplus(z) - y z.
    """
    returns = rewards.sum(-1)
    logits = returns[:, 0] - returns[:, 1]
    return nn.functional.softplus(logits) - labels * logits


def implicit_term(losses: Tensor, scores: Tensor, weight: float, baseline=False, shift: int = 0) -> Tensor:
    """What has the gradient l sum_h (grad Q - grad V)(s_h, a_h) / alpha (eq. 13) for each pair (P,). SoBiRL
    and HPGD add its mean to that of the cross-entropies, so that the gradient is (14).

    losses (P,) are the l, through which no gradient flows; scores (P,) the sums over both fragments of
    Q - V, linear in r, so that their derivative is the sum of grad Q - grad V; weight is 1 / alpha. With
    `baseline`, l minus the mean of the others' l: at pi* the scores' gradient has mean 0, and the expectation
    stays as it is. With a `shift` in [1, P - 1], a control: pair i gets the l of pair i + shift, and the
    baseline leaves out both. No pair meets its own l, so with independent pairs the expectation at pi* is 0.
    One pair, or two with a shift, leave none for the baseline, and there is none.
    """
    losses = losses.detach()
    taken, left, others = losses.roll(-shift), losses.sum() - losses, len(losses) - 1
    if shift:
        left, others = left - taken, others - 1
    if baseline and others > 0:
        taken = taken - left / others
    return weight * taken * scores


def rollout_advantages(from_actions: Tensor, from_policy: Tensor) -> Tensor:
    """Q - V (...) by M rollouts each (eq. 79): discounted sums of r (..., M), from the visited action and
    from the policy's own."""
    return from_actions.mean(-1) - from_policy.mean(-1)


def geometric_lengths(count: int, gamma: float) -> Tensor:
    """Numbers of steps (count,) >= 1 with P(at least t + 1) = gamma^(t/2), by inversion.

    HPGD (Thoma et al. 2024): with weights gamma^(t/2), sums over rollouts of these lengths are unbiased:
    E[sum_{t < T} gamma^(t/2) g_t] = sum_t gamma^t g_t.
    """
    uniform = torch.rand(count, dtype=torch.float64).clamp(min=1e-300)
    return 1 + (uniform.log() / (0.5 * math.log(max(gamma, 1e-300)))).long()


def pbrl_term(tracker_returns: Tensor, policy_returns: Tensor, penalty: float) -> Tensor:
    """What PBRL (Shen et al. 2024) adds to the mean cross-entropy: the value penalty lambda p,
    p = V^{pi*} - V^{pi_y} >= 0, with the gradient lambda (E_{pi*}[sum_t gamma^t grad r] - E_{pi_y}[...]).

    Discounted sums of r from the start states: tracker_returns (M,) of the tracker of pi*, policy_returns
    (M,) of pi_y.
    """
    return penalty * (tracker_returns.mean() - policy_returns.mean())


def pbrl_policy_term(losses: Tensor, logprobs: Tensor, penalty: float, gamma: float) -> Tensor:
    """What PBRL adds to the actor loss of pi_y, which descends f + lambda p too: the score form of
    grad f / lambda.

    losses (P,) of pi_y's pairs, logprobs (P, 2, L) of their actions. SAC's loss is minus the value for one
    step of the discounted visits, (1 - gamma) V, so the term is (1 - gamma) / lambda mean((l - b) sum
    log pi); the baseline b is the mean of the others' l.
    """
    return (1 - gamma) * implicit_term(losses, logprobs.sum((1, 2)), 1 / penalty, baseline=True).mean()


def limited_sum(gradients: tuple, added: tuple, limit: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """gradients + f added, f = min(1, limit |gradients| / |added|), with the norm over all tensors.

    Returns the sum, |added| / |gradients| and f. An estimate from a handful of pairs can be a thousand times
    the cross-entropy's gradient, and one such enters AdamW's second moments for a thousand steps.
    """
    norm, other = (torch.stack(torch._foreach_norm(each)).norm() for each in (gradients, added))
    factor = (limit * norm / other).nan_to_num(1.0).clamp(max=1.0)
    return [each + factor * more for each, more in zip(gradients, added)], other / norm, factor


# ---- Upper level: advantages without a simulator -----------------------------------------------------
def one_step_advantages(rewards: Tensor, resampled: Tensor) -> Tensor:
    """Q - V (...) with Prop. 5.1's sums cut after one term, as released: r(s, a) - mean r(s, a'), a' ~ pi(s).

    rewards (...), resampled (..., m). It is 0 where r does not depend on the action.
    """
    return rewards - resampled.mean(-1)


@torch.no_grad()
def resample_actions(agent: Agent, inputs: Tensor, obs_dim: int, count: int) -> Tensor:
    """The states of inputs (..., D+A) with `count` actions of the policy's own each: (..., count, D+A)."""
    shape, action_dim = (*inputs.shape[:-1], count), inputs.shape[-1] - obs_dim
    obs = inputs[..., None, :obs_dim].expand(*shape, obs_dim)
    return torch.cat([obs, agent.act(obs, torch.randn(*shape, action_dim).to(inputs))], -1)


# ---- Upper level: rollouts in a simulator ------------------------------------------------------------
class Simulator:
    """The task once more, for rollouts. For all methods but pbrl-style it can be put into the state of an
    observation: it is the generative model of Algorithm 3.

    An observation of those MuJoCo tasks is (qpos without its first 0, 1 or 2 numbers, qvel). What it leaves
    out is where the robot is in the plane, on which neither dynamics nor reward depend. (Hopper and Walker2d
    clip qvel to +-10.) Raises BadInput if the task is none of these.
    """

    def __init__(self, args: Args, seed: int):
        with task_errors(args.env_id), warnings.catch_warnings(action="ignore"):
            env = gym.make(args.env_id, disable_env_checker=True, **json.loads(args.env_kwargs))
        self.env = gym.wrappers.FlattenObservation(env)
        self.env.reset(seed=seed)
        if args.reward_update == "pbrl-style":  # from start states
            return
        self.env = env.unwrapped  # no time limit
        try:
            obs, *_ = self.env.step(np.zeros(env.action_space.shape, np.float32))
            self.hidden = self.env.model.nq + self.env.model.nv - len(obs)
            self.set(obs)
            known = 0 <= self.hidden <= 2 and np.allclose(self.env._get_obs(), obs, atol=1e-8)
        except (AttributeError, IndexError, TypeError, ValueError, AssertionError):
            known = False
        if not known:
            way = "--reward-update hpgd-style" if args.implicit == "one-step" else "--implicit rollouts"
            needs = "needs a MuJoCo task whose state is its observation, such as Hopper-v4"
            raise BadInput(f"{way} {needs}, which --env-id {args.env_id!r} is not")

    def set(self, obs: np.ndarray) -> np.ndarray:
        """Put the task into the state of an observation (D,), which is returned."""
        seen = self.env.model.nq - self.hidden
        qpos = np.concatenate([np.zeros(self.hidden), obs[:seen]])
        self.env.set_state(qpos, np.asarray(obs[seen:], dtype=np.float64))
        return obs

    def roll_out(
        self, policy: Agent, lengths: Tensor, decay: float, obs=None, actions=None, seed: int | None = None
    ) -> list[Tensor]:
        """Independent rollouts (eq. 78) of `lengths` (R,) steps, or to an episode's end: from observations
        (R, D), or from start states; with first actions (R, A), or with the policy's own. With a `seed`,
        start states and noise are those of any other call with it.

        Returns the inputs of the reward (R, T, D+A) and their weights (R, T): decay^t, 0 after the end.
        """
        paths, weights = [], []
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        noises = torch.randn(int(lengths.sum()), *self.env.action_space.shape, generator=generator)
        for i, noise in enumerate(noises.split(lengths.tolist())):
            start = None if seed is None else seed + i
            state = self.env.reset(seed=start)[0] if obs is None else self.set(obs[i].numpy())
            path: list[Tensor] = []
            for t in range(len(noise)):
                state = torch.from_numpy(state).float()
                action = policy.act(state, noise[t]) if t or actions is None else actions[i]
                path.append(torch.cat([state, action]))
                state, _, terminated, truncated, _ = self.env.step(policy.task_actions(action).numpy())
                if terminated or truncated:
                    break
            paths.append(torch.stack(path))
            weights.append(decay ** torch.arange(len(path)))
        return [nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (paths, weights)]


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


# ---- Training: set-up --------------------------------------------------------------------------------
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
        check_room(args, obs_dim, action_dim)
        simulator, pbrl = None, args.reward_update == "pbrl-style"
        if pbrl or args.implicit == "rollouts" or args.reward_update == "hpgd-style":
            simulator = Simulator(args, derived_seed(args.seed, 2**41 + start))

        # ---- Training: agents, reward, replay --------------------------------------------------------
        agent_sizes = obs_dim, action_dim, args.actor_width, args.critic_width
        agents = [Agent(*agent_sizes).to(device).eval() for _ in range(2 if pbrl else 1)]
        agent = agents[0]  # the second one tracks pi*
        reward_sizes = obs_dim + action_dim, args.reward_width, args.reward_dropout, args.reward_bound
        model = RewardEnsemble(RewardNetwork(*reward_sizes) for _ in range(args.reward_ensemble))
        model.to(device).eval()
        optimisers = [torch.optim.AdamW(model.parameters(), args.reward_learning_rate, fused=True)]
        for each in agents:
            optimisers += make_optimisers(each, args)
        capacity, inputs_dim = min(args.buffer_size, args.total_timesteps), obs_dim + action_dim
        replay = Ring(capacity, (inputs_dim,), (obs_dim,), (), ())
        queue = Ring(args.queue_size, (2, args.fragment_length, inputs_dim), ())
        kept = {"agent": agent, "tracker": agents[-1], "reward": model, "replay": replay, "queue": queue}
        kept |= {f"optimiser_{k}": each for k, each in enumerate(optimisers)}
        newest = torch.arange(0)  # rows of the queue: the last iteration's pairs, if they are the policy's
        simulated, given, taken_up = 0, [], set()  # rollouts' steps; people's: held out; those in the queue
        try:
            if args.reward_model and not checkpoint:
                saved = torch.load(args.reward_model, map_location="cpu", weights_only=True)
                if saved["env_id"] != args.env_id:
                    raise ValueError(f"the network is of {saved['env_id']}")
                model.load_state_dict(saved["reward"])
            if args.labels:
                pairs, labels = labelled_pairs(args.labels, set())
                found = {(each["env_id"], *each["inputs"].shape) for each in pairs}
                if found != {(args.env_id, *queue.columns[0].shape[1:])}:  # a shape alone tells no task
                    raise ValueError(f"pairs of {found or 'nothing'}")
                inputs = torch.stack([each["inputs"] for each in pairs])
                out = torch.tensor([each["pair"] % 10 == 9 for each in pairs])
                queue.add(inputs[~out], labels[~out])
                given = inputs[out], labels[out]
            if checkpoint:
                for name, each in kept.items():
                    each.load_state_dict(checkpoint.pop(name))
                simulated, taken_up = checkpoint["simulated"], set(checkpoint["taken"])
                torch.set_rng_state(checkpoint["rng"])  # all that is random is drawn on the CPU
                newest = queue.rows(torch.arange(min(checkpoint["newest"], len(queue))))
        except Exception as error:  # a damaged archive raises errors of many kinds
            given_files = {"labels": args.labels, "reward-model": args.reward_model, "resume": args.resume}
            files = " or ".join(f"--{name} {path}" for name, path in given_files.items() if path)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(f"{files}: of another task, sizes or version, or damaged: {reason}") from error
        for each in optimisers:
            each.param_groups[0]["lr"] = each.defaults["lr"]  # it may have been given again
        for each in agents:
            each.set_action_space(action_space)
            if not (checkpoint and args.autotune):
                nn.init.constant_(each.log_alpha, math.log(args.alpha))

        # ---- Training: the updates -------------------------------------------------------------------
        def update_lower(*columns: Tensor) -> dict[str, Tensor]:
            """Update each agent's critics by a minibatch, then its actor as often as there is noise for.

            The columns are those of `Ring.sample`, and noises (1 + times, agents, B, A), the first for the
            critics. Returns what is logged of the agent that acts.
            """
            inputs, next_obs, rewards, terminated, noises = (column.to(device) for column in columns)
            if args.reward_update == "constant":
                rewards = torch.ones_like(rewards)
            elif args.reward_update != "ground-truth":
                with torch.no_grad():
                    rewards = model(inputs)  # by the newest theta, without dropout
            minibatch, found = [inputs, next_obs, rewards, terminated], []
            for k, each in enumerate(agents):
                extra = policy_term if pbrl and len(newest) and each is agent else None
                own = optimisers[1 + 3 * k : 4 + 3 * k]
                found.append(update_agent(each, own, args, minibatch, noises[:, k], extra))
            return found[0]

        def policy_term(actor: nn.Module) -> Tensor:
            """What pbrl-style adds to the acting policy's loss, from the pairs of the last iteration."""
            pairs, labels = (column[newest].to(device) for column in queue.columns)
            with torch.no_grad():
                losses = cross_entropies(model(pairs), labels)
            logprobs = squashed_logprob(actor(pairs[..., :obs_dim]), pairs[..., obs_dim:])
            return pbrl_policy_term(losses, logprobs, args.pbrl_penalty, args.gamma)

        def make_rollouts(pairs: Tensor) -> list[list[Tensor]]:
            """The two sets of rollouts of the added term: pbrl-style's of both actors from start states, the
            others' from the states of these pairs, first with the visited actions, then with the policy's."""
            policy, gamma = copy.deepcopy(agent).cpu(), args.gamma  # a CPU is faster for one row
            if pbrl:  # same starts and noise: equal actors have no penalty
                lengths = torch.full((args.rollouts or 10,), args.rollout_length or 200)
                seed, tracker = derived_seed(args.seed, 2**42 + global_step), copy.deepcopy(agents[1]).cpu()
                return [simulator.roll_out(each, lengths, gamma, seed=seed) for each in (tracker, policy)]
            visited, geometric = queue.columns[0][pairs], args.reward_update == "hpgd-style"
            if geometric:  # one step of each fragment
                steps = torch.randint(args.fragment_length, visited.shape[:2])
                visited = visited.gather(2, steps[..., None, None].expand(-1, -1, 1, visited.shape[-1]))
            visited, found = visited.flatten(0, 2).repeat_interleave(args.rollouts or 1, 0), []
            for actions in (visited[:, obs_dim:], None):
                lengths, decay = torch.full((len(visited),), args.rollout_length or 10), gamma
                if geometric:
                    lengths, decay = geometric_lengths(len(visited), gamma), math.sqrt(gamma)
                found.append(simulator.roll_out(policy, lengths, decay, visited[:, :obs_dim], actions))
            return found

        def added_term(pairs: Tensor, rollouts: list[list[Tensor]], shift: int) -> tuple[Tensor, Tensor]:
            """What sobirl, hpgd-style or pbrl-style add to the mean cross-entropy, from these pairs of the
            queue and these rollouts; and the mean of the pairs' scores."""
            sums = [(model(path.to(device)) * each.to(device)).sum(-1) for path, each in rollouts]
            if pbrl:
                return pbrl_term(*sums, weight), torch.tensor(math.nan)
            inputs, labels = (column[pairs].to(device) for column in queue.columns)
            rewards = model(inputs)
            if rollouts:
                shape = len(pairs), 2, -1, args.rollouts or 1
                advantages = rollout_advantages(*(each.view(shape) for each in sums))
            else:
                resampled = resample_actions(agent, inputs, obs_dim, args.implicit_actions)
                advantages = one_step_advantages(rewards, model(resampled))
            # The sum over both fragments; hpgd-style has one step of each, which stands for all.
            scores = 2 * args.fragment_length * advantages.mean((1, 2))
            losses = cross_entropies(rewards, labels)
            return implicit_term(losses, scores, weight, args.baseline, shift).mean(), scores.detach().mean()

        # By how often the actor is updated in it. The number of pbrl-style's pairs varies, and no graph can.
        update_of: dict[int, Callable] = dict.fromkeys((0, args.policy_frequency), update_lower)
        if device.type == "cuda" and args.cuda_graphs and not pbrl:
            update_of = {times: GraphedUpdate(update_lower) for times in update_of}
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")

        # ---- Training: buffers and the loop ----------------------------------------------------------
        # An iteration: arrays (time, environment, ...), from which fragments are cut.
        shape = (args.num_steps, args.num_envs)
        inputs = torch.zeros(*shape, obs_dim + action_dim)
        true_rewards, valid = (torch.zeros(shape) for _ in range(2))
        uses_labels = args.reward_update in LEARNED
        has_network = uses_labels or args.reward_update == "frozen"
        human = uses_labels and args.teacher == "human"
        states = torch.zeros(*shape, *body_positions(envs).shape[1:] if human else ())
        ended = np.zeros(args.num_envs, dtype=bool)  # in the last step; the row after it is a reset
        episode_returns, episode_lengths = np.zeros((2, args.num_envs))
        num_iterations = args.total_timesteps // batch_size
        warmup_iterations = max(1, math.ceil(args.learning_starts / batch_size))
        run.open()
        people = run.folder / "preferences"
        if human:
            say(f"label with: python label_preferences.py {run.folder}")
        obs = torch.tensor(envs.reset()[0]).float()
        logged: dict[str, Tensor] = {}
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            iteration_start, env_time, update_time, episodes = time.perf_counter(), 0.0, 0.0, []
            learning, global_step = iteration > warmup_iterations, iteration * batch_size
            noise = (torch.randn if learning else torch.rand)(*shape, action_dim).to(device)
            for t in range(args.num_steps):
                # ---- Training: one step of the environments ------------------------------------------
                actions = agent.act(obs.to(device), noise[t]) if learning else 2 * noise[t] - 1
                task_actions = agent.task_actions(actions).cpu().numpy()
                if human:
                    states[t] = body_positions(envs)
                env_start = time.perf_counter()
                raw_obs, reward, ends, cut, _ = envs.step(task_actions)
                env_time += time.perf_counter() - env_start
                transition, ended = ~ended, ends | cut
                next_obs, reward = torch.tensor(raw_obs).float(), np.where(transition, reward, 0.0)
                inputs[t] = torch.cat([obs, actions.cpu()], -1)
                true_rewards[t], valid[t] = torch.from_numpy(reward), torch.from_numpy(transition)
                columns = inputs[t], next_obs, true_rewards[t], torch.from_numpy(ends).float()
                replay.add(*(column[transition] for column in columns))
                obs = next_obs
                episode_returns += reward
                episode_lengths += transition
                for index in ended.nonzero()[0].tolist():
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    seconds, length = time.perf_counter() - run.started, int(episode_lengths[index])
                    episode = step, seconds, index, float(episode_returns[index]), length
                    episodes.append(dict(zip(EPISODES, episode)))
                    episode_returns[index] = episode_lengths[index] = 0

                # ---- Lower level: one update for each transition -------------------------------------
                update_start = time.perf_counter()
                first = replay.added - int(transition.sum()) + 1
                for count in range(first, replay.added + 1) if learning else ():
                    times = args.policy_frequency if count % args.policy_frequency == 0 else 0
                    minibatch = replay.sample(args.batch_size)
                    noises = torch.randn(1 + times, len(agents), args.batch_size, action_dim)
                    logged |= update_of[times](*minibatch, noises)
                update_time += time.perf_counter() - update_start

            if iteration == 1 and args.reward_update != "ground-truth" and replay.columns[3].any():
                compare = "compare with --reward-update constant and frozen, or use --no-terminate"
                say(f"episodes end early here, so their length leaks the true reward: {compare}")

            # ---- Upper level: ask the teacher --------------------------------------------------------
            reward_start = time.perf_counter()
            windows = fragment_windows(valid, args.fragment_length)
            iteration_data = args.fragment_length, inputs, true_rewards, states
            # Measured on pairs that nobody labels, before the network has seen any of this iteration.
            heldout, heldout_rewards, _ = draw_pairs(windows, args.heldout_pairs, *iteration_data)
            rows = valid.bool()
            with torch.no_grad():
                guess, learned_rewards = (model(each.to(device)).cpu() for each in (heldout, inputs[rows]))
            wanted = labels_wanted(args, iteration, num_iterations, warmup_iterations)
            due = max(0, wanted - (len(pairs_asked(people)) if human else queue.added))
            due = due if uses_labels and (human or not args.labels) else 0
            drawn = draw_pairs(windows, due * args.reward_candidates, *iteration_data)
            if args.reward_candidates > 1:
                with torch.no_grad():
                    returns = [member(drawn[0].to(device)).sum(-1) for member in model]
                disagreements = disagreement(returns).cpu()
                drawn = [each[disagreements.topk(min(due, len(disagreements))).indices] for each in drawn]
            pairs, pair_rewards, pair_states = drawn
            if human:
                ask_people(people, args, inputs=pairs, states=pair_states)
                file, waits = people / "labels.jsonl", args.wait_for_labels
                while waits and not run.stop_signal and {*pairs_asked(people)} - read_labels(file).keys():
                    time.sleep(0.2)
                answers, labels = labelled_pairs(file, taken_up)
                pairs = torch.stack([each["inputs"] for each in answers]) if answers else pairs[:0]
            else:
                labels, answered = teacher_labels(pair_rewards, args.teacher, args.teacher_temperature)
                pairs, labels = pairs[answered], labels[answered]
            queue.add(pairs, labels)
            newest = queue.rows(torch.arange(min(len(pairs), args.queue_size)))
            judged, their_labels = given if args.labels else (pairs, labels)  # not learned from so far
            with torch.no_grad():
                judgements = model(judged.to(device)).cpu()
            preferred = torch.stack([their_labels, 1 - their_labels], 1).unsqueeze(-1)
            label_accuracy = accuracy(judgements, preferred)

            # ---- Upper level: reward update ----------------------------------------------------------
            # The cross-entropy takes epochs. The policy has answered one theta, that of the first minibatch,
            # so what is added counts there alone; or, as in the paper, in every one; or, as released, in
            # every one with its own pairs.
            alpha = float(agent.log_alpha.detach().exp())
            weight = args.pbrl_penalty if pbrl else min(1 / alpha, args.max_inverse_temperature)
            adds = learning and args.reward_update in ADDS
            if not pbrl:  # the permuted control needs a second pair
                enough = len(newest) > int(args.permute_cross_entropy)
                adds = adds and enough and global_step > args.implicit_starts
            rollouts = make_rollouts(newest) if adds and simulator else []
            simulated += sum(int((weights > 0).sum()) for _, weights in rollouts)
            epochs = args.reward_epochs if learning else args.warmup_epochs
            epochs *= uses_labels and len(queue) > 0 and iteration >= warmup_iterations
            orders = [torch.randperm(len(queue)) for _ in range(epochs)]
            minibatches = [mb for order in orders for mb in order.split(args.reward_batch_size)]
            steps = {"newest": [newest], "newest-every-step": [newest] * len(minibatches)}
            added_pairs = (steps | {"queue": minibatches})[args.implicit_pairs] if adds else []
            shift = int(torch.randint(1, len(newest), ())) if adds and args.permute_cross_entropy else 0
            epoch_losses, terms = [], []
            model.train()
            for k, mb in enumerate(minibatches):
                fragments, mb_labels = (column[mb].to(device) for column in queue.columns)
                losses = torch.stack([cross_entropies(each(fragments), mb_labels) for each in model]).mean(0)
                epoch_losses.append(losses.detach())
                gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
                if k < len(added_pairs):
                    model.eval()  # the policy answers the reward without dropout
                    term, score = added_term(added_pairs[k], rollouts, shift)
                    model.train()
                    added = torch.autograd.grad(term, list(model.parameters()))
                    gradients, ratio, factor = limited_sum(gradients, added, args.max_gradient_ratio)
                    terms.append(torch.tensor([ratio, factor, score]))
                descend(optimisers[0], gradients)
            model.eval()

            # ---- Training: log and checkpoint --------------------------------------------------------
            now = time.perf_counter()
            metrics = {name: float(each.mean()) for name, each in logged.items()}
            logged = {}  # an iteration without an update of the actor has none
            if epoch_losses:
                metrics["losses/cross_entropy"] = float(torch.cat(epoch_losses)[-len(queue) :].mean())
            ratio, factor, score = torch.stack(terms).nanmean(0).tolist() if terms else (math.nan,) * 3
            bilevel = {"labels": queue.added, "simulator_steps": simulated, "implicit_ratio": ratio}
            bilevel |= {"implicit_weight": weight * factor if terms else 0.0, "score_mean": score}
            bilevel["true_reward"] = true_rewards[rows].mean()
            if has_network:
                oracle, _ = teacher_labels(heldout_rewards, "oracle")
                bilevel["heldout_accuracy"] = accuracy(guess, heldout_rewards)
                bilevel["heldout_cross_entropy"] = cross_entropies(guess, oracle).mean()
                both = torch.stack([learned_rewards, true_rewards[rows]])
                bilevel["reward_correlation"] = torch.corrcoef(both)[0, 1]
                bilevel |= {"learned_reward": learned_rewards.mean(), "label_accuracy": label_accuracy}
            metrics |= {f"bilevel/{name}": None if math.isnan(x) else float(x) for name, x in bilevel.items()}
            metrics |= {"losses/alpha": alpha, "time/env": env_time, "time/reward": now - reward_start}
            metrics["time/policy"] = reward_start - iteration_start - env_time - update_time
            metrics["time/update"] = now - reward_start + update_time
            run.log(global_step, metrics, episodes)
            losses = [value for name, value in metrics.items() if name.startswith("losses/")]
            weights = torch.stack([weight.sum() for each in (*agents, model) for weight in each.parameters()])
            watched = {"observations": inputs[..., :obs_dim], "rewards": true_rewards}
            watched |= {"losses": torch.tensor(losses), "weights": weights}
            for name, numbers in watched.items():
                if not numbers.isfinite().all():
                    raise Diverged(f"the {name} stopped being finite by step {global_step:,}")
            newest = newest if learning else newest[:0]
            if iteration % args.checkpoint_every == 0 or iteration == num_iterations or run.stop_signal:
                state = {"env_id": args.env_id, "agent_sizes": agent_sizes, "newest": len(newest)}
                state |= {"simulated": simulated, "taken": sorted(taken_up)}
                run.save_checkpoint(state | {name: each.state_dict() for name, each in kept.items()})
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
