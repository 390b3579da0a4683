"""The laboratory beside `blpo_continuous.py`: the same bilevel problem, whose two players are the actor theta (leader)
and the critic omega (follower) of one agent, and the same loop, with what is not the method, one flag each.

    --leader lambda-return     J = mean_t min(r_t A_t, clip(r_t) A_t), A = G(omega) - stopgrad V, as in the method;
                               --leader-lambda 0 makes G the one-step return r + gamma V(s')
    --leader released          the authors' released update: A = GAE(omega), where V(s_t) moves as well; the mixed
                               term of f2 = -2 sum_t min(r_t A_t, clip_F(r_t) A_t) (G'_t - V_t) with its sign, its sum
                               over time and A differentiated in omega; and the direction grad_theta f - s c with
                               f = -J, s = min(1, ihvp_bound |grad_theta f| / |c|)   -> released_mixed_weights, bounded
    --mixed-advantages ...     A' of the mixed term. targets: those of the targets G', as in the method. refreshed:
                               those of J, of the critic that has just answered. L's targets do not move with that
                               critic, so this is not its mixed term; with --mixed-discount 0 it is the update of this
                               project's first results (docs/blpo.md)
    --correction-control ...   permuted: e shuffled within the minibatch; constant: its mean; reversed: -e   -> controlled
    --ihvp pcg                 conjugate gradients preconditioned by the Nystrom inverse     -> preconditioned_cg_ihvp
    --columns ...              directions of the Nystrom approximation: coordinates (the paper), fixed (the same ones
                               each time, as released), last-layer (its coordinates), gaussian (J^T Omega), krylov
                               (b, H b, ...), features (the method's)                            -> nystrom_directions
    --core-ridge 1             the identity that the released code adds to H[Q, Q]
    --sketch-refresh epoch     columns from the first minibatch of an epoch serve for all of it
    --preset released-hopper   the authors' settings of a task, for whatever has its default value

The method's choices are the defaults: with them this is the run of `blpo_continuous.py` up to rounding. docs/blpo.md
has the signs, sums and settings of the released code beside the paper's (Prakash et al. 2025, arXiv:2505.11714).

    python blpo_continuous_ablations.py --preset released-hopper
"""

# ---- Imports (shared) ------------------------------------------------------------------------------------------
import contextlib
import copy
import csv
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import filelock
import gymnasium as gym
import numpy as np
import pydantic
import torch
import torch.nn as nn
import tyro
from gymnasium.utils.env_checker import check_env
from pydantic import Field
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ---- Ranges of arguments (shared) ------------------------------------------------------------------------------
def number(kind: type, words: str, **bounds: float) -> type:
    """The type of a number within bounds; `--help` shows the words."""
    return Annotated[kind, Field(**bounds), tyro.conf.arg(metavar=words)]


Count = number(int, "INT>0", gt=0)
Positive = number(float, "FLOAT>0", gt=0)
NonNegative = number(float, "FLOAT>=0", ge=0)
Width = number(int, "1..8192", ge=1, le=8192)
Fraction = number(float, "0..1", ge=0, le=1)


def json_object(text: str) -> str:
    """The text; raises ValueError unless it is a JSON object."""
    if not isinstance(json.loads(text), dict):
        raise ValueError("it must be a JSON object")
    return text


class BadInput(Exception):
    """One sentence that names the argument, what is wrong and what would be right; printed, exit status 2."""


class CheckedArgs(pydantic.BaseModel, extra="forbid", validate_default=True, allow_inf_nan=False, ser_json_inf_nan="strings"):
    """Arguments whose ranges are checked whenever they are made, from a command line or in Python."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def one_sentence(cls, values, check):
        """Raise BadInput for the first argument that is out of its range."""
        try:
            return check(values)
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            name = "--" + "-".join(str(part) for part in wrong["loc"][:1]).replace("_", "-")
            message = wrong["msg"].removeprefix("Value error, ")
            raise BadInput(f"{name} is {wrong['input']!r}: {message[0].lower()}{message[1:]}") from None


# ---- Arguments -------------------------------------------------------------------------------------------------
# The settings of the authors' released scripts (docs/blpo.md); their tasks are Brax's, ours MuJoCo's of the same name.
# Their 5 to 20 million steps are left out: a preset must not overrule a budget that was asked for.
RELEASED = {
    "leader": "released", "curvature": "hessian", "columns": "fixed", "nystrom_rank": 5, "damping": 50.0,
    "core_ridge": 1.0, "num_envs": 32, "num_steps": 640, "chunk_length": 640, "num_minibatches": 32,
    "update_epochs": 4, "learning_rate": 3e-4, "critic_learning_rate": 1.2e-3, "anneal_lr": False, "norm_adv": False,
}  # fmt: skip
TASKS = {
    "released-walker2d": {"env_id": "Walker2d-v4", "ihvp_bound": 0.8, "clip_f": 0.84},
    "released-hopper": {"env_id": "Hopper-v4", "ihvp_bound": 0.8, "clip_f": 0.84},
    "released-humanoid": {"env_id": "Humanoid-v4", "nested_updates": 5, "clip_f": 0.8},
    "released-halfcheetah": {"env_id": "HalfCheetah-v4", "nested_updates": 7, "ihvp_bound": 1.4, "clip_f": 0.7},
    "released-humanoidstandup": {"env_id": "HumanoidStandup-v4", "nested_updates": 5},
    "released-pusher": {"env_id": "Pusher-v4"},
    "released-inverted-double-pendulum": {"env_id": "InvertedDoublePendulum-v4"},
    "released-reacher": {"env_id": "Reacher-v4"},
    "released-inverted-pendulum": {"env_id": "InvertedPendulum-v4"},
}  # fmt: skip
PRESETS = {"none": {}} | {name: RELEASED | settings for name, settings in TASKS.items()}


class Args(CheckedArgs):
    """The run, the task, BLPO, then the laboratory."""

    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: Annotated[int, Field(ge=0, lt=2**31), tyro.conf.arg(metavar="0..2147483647")] = 1
    """seed of the environments, the initial weights, the actions and the minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto: cuda if there is one"""
    run_dir: Path = Path("runs")
    """the run's own folder is created in this one: {run_dir}/{env_id}__{exp_name}__{seed}__{time}"""
    resume: Path | None = None
    """continue, extend or replay the run in this folder, with its arguments; those given again win"""
    checkpoint_every: Count = 50
    """iterations between two checkpoints"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "bilevel-actor-critic"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team"""
    save_model: bool = False
    """write model.pt (the policy with its normaliser) at the end"""
    eval_episodes: number(int, "INT>=0", ge=0, le=10_000) = 0
    """episodes played with the mean action at the end, through Gymnasium"""
    capture_video: bool = False
    """film one such episode"""

    env_id: str = "Hopper-v4"
    """any task with a Box action space; also namespace/Name-v0 and module:Name-v0"""
    env_kwargs: Annotated[str, pydantic.AfterValidator(json_object)] = "{}"
    """keyword arguments of the task, as JSON: '{"terminate_when_unhealthy": false}'"""
    env_backend: Literal["auto", "envpool", "sync", "async"] = "auto"
    """who steps the environments: EnvPool, or Gymnasium in this process or in one for each; auto: EnvPool where it has the task, else sync"""
    env_threads: number(int, "INT>=0", ge=0, le=1024) = 0
    """EnvPool threads; 0: one for each usable core, at most num_envs"""
    total_timesteps: Count = 1_000_000
    """environment steps in all, rounded down to whole rollouts"""
    num_envs: number(int, "1..65536", ge=1, le=65536) = 8
    """parallel environments"""

    num_steps: number(int, "INT>1", ge=2) = 256
    """steps of each environment in a rollout"""
    learning_rate: Positive = 7e-4
    """Adam step size of the actor (leader)"""
    critic_learning_rate: Positive = 2.8e-3
    """Adam step size of the critic (follower)"""
    anneal_lr: bool = True
    """lower both step sizes linearly to 0"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the advantages and of the critic's targets"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it counts as a termination"""
    chunk_length: number(int, "INT>1", ge=2) = 64
    """consecutive steps of one environment that stay together; the lambda-return bootstraps at their end"""
    num_minibatches: Count = 16
    """minibatches of whole chunks in an epoch"""
    update_epochs: Count = 4
    """passes over a rollout"""
    nest: Literal["minibatch", "rollout"] = "minibatch"
    """what the follower answers: each minibatch of the actor, or the rollout, in shuffled minibatches before each epoch"""
    nested_updates: Count = 3
    """K, critic steps for each actor step"""
    ihvp: Literal["nystrom", "cg", "pcg", "exact", "none"] = "nystrom"
    """solver of the damped system; none: the nested control, without the hypergradient"""
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    """H: the Hessian of L without the term in its residuals, or the whole of it"""
    damping: Positive = 1.0
    """alpha, added to the curvature of the critic's loss"""
    nystrom_rank: Count = 10
    """q, directions in the Nystrom approximation; more than critic_width + 1 features add nothing"""
    cg_iterations: Count = 10
    """conjugate gradient steps"""
    mixed_discount: Fraction | None = None
    """kappa, how far an action answers for the targets of earlier states; default: gamma * gae_lambda, exact for them"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: Positive = 0.2
    """eps of the clipped ratio"""
    ent_coef: NonNegative = 0.0
    """weight of the entropy bonus"""
    actor_width: Width = 64
    """units in each of the actor's two hidden layers"""
    critic_width: Width = 64
    """units in each of the critic's two hidden layers"""

    preset: Literal[*PRESETS] = "none"
    """the authors' settings for a task, but for its steps; they fill whatever has its default value, given or not"""
    leader: Literal["lambda-return", "released"] = "lambda-return"
    """the leader's objective; released: the authors' released update as a whole"""
    leader_lambda: Fraction | None = None
    """lambda of the leader's return; 0: the one-step leader; default: gae_lambda"""
    ihvp_bound: NonNegative = 1.0
    """bound of the released correction in units of the direct gradient's norm"""
    clip_f: Positive = 0.5
    """clip range of the ratio in the released mixed term"""
    mixed_advantages: Literal["targets", "refreshed"] = "targets"
    """advantages of the mixed term: those of the critic's targets, or J's"""
    correction_control: Literal["none", "permuted", "constant", "reversed"] = "none"
    """what replaces the trace e"""
    columns: Literal["features", "last-layer", "coordinates", "fixed", "gaussian", "krylov"] = "features"
    """directions of the Nystrom approximation"""
    core_ridge: NonNegative = 0.0
    """added to the diagonal of H[Q, Q]; the released code adds 1"""
    sketch_refresh: Literal["minibatch", "epoch"] = "minibatch"
    """how long the columns serve"""

    @pydantic.model_validator(mode="before")
    @classmethod
    def fill_preset(cls, values: dict) -> dict:
        """Put the preset's settings where an argument is left out or has its default value."""
        preset = PRESETS.get(values.get("preset"), {})
        defaults = {name: cls.model_fields[name].default for name in preset}
        return values | {name: x for name, x in preset.items() if values.get(name, defaults[name]) == defaults[name]}

    @pydantic.model_validator(mode="after")
    def check_leader(self):
        """Raise BadInput for what the released leader cannot go with."""
        mixed_term = self.mixed_discount, self.mixed_advantages, self.correction_control
        if self.leader == "released" and mixed_term != (None, "targets", "none"):
            raise BadInput(
                "--leader released has a mixed term of its own; "
                "leave out --mixed-discount, --mixed-advantages and --correction-control"
            )
        if self.leader == "released" and self.norm_adv:
            raise BadInput("--leader released differentiates advantages that are not normalised; add --no-norm-adv")
        return self

    @pydantic.model_validator(mode="after")
    def check_batch_shape(self):
        """Raise BadInput unless there is a whole rollout, chunks divide it and minibatches divide the chunks."""
        batch_size = self.num_envs * self.num_steps
        if batch_size > 10_000_000:
            raise BadInput(f"--num-envs x --num-steps is {batch_size}, more than the 10,000,000 rows that a rollout may have")
        if self.total_timesteps < batch_size:
            raise BadInput(f"--total-timesteps {self.total_timesteps} is less than one rollout of num-envs x num-steps = {batch_size}")
        if self.num_steps % self.chunk_length:
            raise BadInput(f"--chunk-length {self.chunk_length} must divide num-steps = {self.num_steps}")
        if batch_size * self.chunk_length > 500_000_000:  # numbers in the matrices of all chunks
            raise BadInput(f"--chunk-length {self.chunk_length} is too long for a rollout of {batch_size}: their product may be 500,000,000")
        chunks = batch_size // self.chunk_length
        if chunks % self.num_minibatches:
            raise BadInput(f"--num-minibatches {self.num_minibatches} must divide the {chunks} chunks of a rollout")
        if self.ihvp == "exact" and self.curvature == "hessian":
            raise BadInput("--ihvp exact solves with --curvature gauss-newton alone; for the Hessian use --ihvp cg")
        return self


DIAGNOSTICS = (
    "direct_norm", "correction_norm", "norm_ratio", "cosine", "weight_mean", "weight_std", "ihvp_residual",
    "ihvp_cosine", "inner_gradient_norm_before", "inner_gradient_norm_after", "fallbacks",
)  # fmt: skip
METRICS = (
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/value_loss",
    "losses/policy_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac",
    *(f"bilevel/{name}" for name in DIAGNOSTICS), "time/nested_critic", "time/response", "losses/explained_variance",
    "charts/learning_rate", "time/env", "time/policy", "time/update",
)  # fmt: skip


# ---- Environments (shared) -------------------------------------------------------------------------------------
@contextlib.contextmanager
def task_errors(env_id: str):
    """Turn whatever a task raises while it is made into one sentence, with the line of the task's own code: BadInput."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
        own = [frame for frame in frames if not re.search("site-packages|importlib", frame.filename) and frame.filename != __file__]
        where = f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""
        if isinstance(error, ModuleNotFoundError):
            where += "; modules are found beside the script, in the working directory and on PYTHONPATH"
        text = " ".join(str(error).split()).rstrip(".")
        raise BadInput(f"--env-id {env_id!r} cannot be made: {type(error).__name__}: {text}{where}") from error


def leave_interrupts(env: gym.Env) -> gym.Env:
    """The environment; in a process of its own it ignores Ctrl-C, which is the training loop's to answer."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return env


def make_envs(args, seed: int) -> tuple[gym.vector.VectorEnv, gym.spaces.Box, gym.Space]:
    """The parallel environments of `args`, seeded, and the spaces of one: observations, a flat Box, and actions.

    They reset on the step after an episode's end (Gymnasium's NEXT_STEP mode), so that one loop serves all backends: at
    the end of an episode `step` returns its true final observation; the next `step` ignores the action and returns the
    first observation of the new episode with reward 0. Raises BadInput if the task is unknown or cannot be used.
    """
    try:
        import envpool
    except ImportError:  # no wheel for this platform: Gymnasium serves
        envpool = None
    has_envpool = envpool is not None and args.env_id in envpool.list_all_envs()
    if args.env_backend == "envpool" and not has_envpool:
        raise BadInput(f"--env-backend envpool: EnvPool is not installed or does not have {args.env_id!r}; use sync or async")
    kwargs = json.loads(args.env_kwargs)
    with task_errors(args.env_id), warnings.catch_warnings(action="ignore"):
        if has_envpool and args.env_backend in ("auto", "envpool"):
            cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
            threads = args.env_threads or min(len(cores), args.num_envs)
            # Pinned threads take a quarter to a third less time a step. They are pinned only where they fill all the cores
            # that this process may use, so that several small runs never crowd on the same ones.
            kwargs["thread_affinity_offset"] = cores[0] if threads >= len(cores) == cores[-1] - cores[0] + 1 else -1
            envs = envpool.make(
                args.env_id, env_type="gymnasium", num_envs=args.num_envs, seed=seed, num_threads=threads, **kwargs
            )
            observation_space, action_space = envs.observation_space, envs.action_space
        else:
            if not has_envpool:
                try:
                    check_env(gym.make(args.env_id, **kwargs).unwrapped, skip_render_check=True)
                except AssertionError as error:
                    say(f"note: Gymnasium's check of {args.env_id!r} says: {' '.join(str(error).split())}")
            mode = "async" if args.env_backend == "async" else "sync"
            envs = gym.make_vec(args.env_id, args.num_envs, mode, wrappers=[leave_interrupts], **kwargs)
            if len(envs.single_observation_space.shape or ()) != 1:
                envs = gym.wrappers.vector.FlattenObservation(envs)
            envs.reset(seed=seed)
            envs.step(envs.action_space.sample())  # what the task refuses shows here
            envs.reset(seed=seed)
            observation_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 1:
        raise BadInput(f"--env-id {args.env_id!r} has the observation space {observation_space}; this script needs a flat Box")
    check_action_space(args.env_id, action_space)
    return envs, observation_space, action_space


class RunningMeanStd:
    """Running mean and variance of rows in float64 (Chan et al. 1979), from mean 0, variance 1 and the weight of 1e-4 rows.

    Gymnasium's class of this name gives the same numbers and takes three times as long, a twentieth of a step.
    """

    def __init__(self, shape: tuple[int, ...] = ()):
        self.mean, self.squares, self.count = np.zeros(shape), np.full(shape, 1e-4), 1e-4

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


# ---- Gaussian policy (shared) ----------------------------------------------------------------------------------
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """The layer with orthogonal weights and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """A critic, and a Gaussian actor of its own with a state-independent log standard deviation (starts at 0).

    The networks may be any modules from observations (..., D) to one value (..., 1) and to the mean action (..., A).
    """

    def __init__(self, obs_dim: int, action_dim: int, actor_width: int = 64, critic_width: int = 64):
        super().__init__()
        self.critic = nn.Sequential(
            layer_init(nn.Linear(obs_dim, critic_width)),
            nn.Tanh(),
            layer_init(nn.Linear(critic_width, critic_width)),
            nn.Tanh(),
            layer_init(nn.Linear(critic_width, 1), gain=1.0),
        )
        self.actor_mean = nn.Sequential(
            layer_init(nn.Linear(obs_dim, actor_width)),
            nn.Tanh(),
            layer_init(nn.Linear(actor_width, actor_width)),
            nn.Tanh(),
            layer_init(nn.Linear(actor_width, action_dim), gain=0.01),
        )
        self.actor_logstd = nn.Parameter(torch.zeros(action_dim))
        # What playing needs besides the networks: the observations' statistics and the task's action box.
        self.register_buffer("obs_mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("obs_std", torch.ones(obs_dim, dtype=torch.float64))
        self.register_buffer("action_low", torch.full((action_dim,), -math.inf))
        self.register_buffer("action_high", torch.full((action_dim,), math.inf))

    def set_action_space(self, space: gym.spaces.Box) -> None:
        """Keep the task's action box."""
        self.action_low.copy_(torch.as_tensor(space.low))
        self.action_high.copy_(torch.as_tensor(space.high))

    def actor_parameters(self) -> list[nn.Parameter]:
        """theta: the weights of the mean and the log standard deviation."""
        return [*self.actor_mean.parameters(), self.actor_logstd]

    def noise(self, *shape: int) -> Tensor:
        """The noise (*shape, A) of the actions of a whole rollout."""
        return torch.randn(*shape, len(self.actor_logstd)) * self.actor_logstd.exp()

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Unclipped actions (..., A) at normalised observations (..., D) with that noise (..., A)."""
        return self.actor_mean(obs) + noise

    def logprob_and_entropy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) of unclipped actions (..., A) at observations (..., D) and the entropy in nats, both (...)."""
        noise = (actions - self.actor_mean(obs)) * torch.exp(-self.actor_logstd)
        logprob = -0.5 * (noise * noise).sum(-1) - (self.actor_logstd + 0.5 * math.log(2 * math.pi)).sum()
        entropy = (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return logprob, entropy.expand_as(logprob)

    def task_actions(self, actions: Tensor) -> Tensor:
        """The policy's actions (..., A) as the task takes them: clipped to its box."""
        return actions.clamp(self.action_low, self.action_high)

    def forward(self, raw_obs: Tensor) -> Tensor:
        """The policy as it is played: raw observations (..., D) -> mean actions, clipped to the box (..., A)."""
        obs = ((raw_obs.double() - self.obs_mean) / self.obs_std).clamp(-10, 10)
        return self.task_actions(self.actor_mean(obs.float()))


def check_action_space(env_id: str, space: gym.Space) -> None:
    """Raise BadInput unless the actions are vectors of numbers in a box that is not empty."""
    if isinstance(space, gym.spaces.Discrete):
        other = f"{Path(__file__).stem.split('_')[0]}_discrete.py"
        raise BadInput(f"--env-id {env_id!r} has discrete actions, this script needs a Box; use {other}")
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not (space.low < space.high).all() or space.dtype.kind != "f" or not space.shape[0]:
        raise BadInput(f"--env-id {env_id!r} has the action space {space}; this script needs a flat Box of floats with low < high")


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


def gae_operator(ended: Tensor, valid: Tensor, decay: float) -> Tensor:
    """The matrices W (C, L, L) of C chunks of L steps: with decay = gamma lambda, A = W delta is GAE.

    ended, valid (C, L) as 0/1 floats. W[t, k] = decay^(k-t) for k >= t in the same episode, else 0; the row and the
    column of a step that is no transition are 0, so nothing of it reaches another step.
    """
    step = torch.arange(ended.shape[-1], device=ended.device)
    powers = torch.tril(decay ** (step[:, None] - step[None, :]).clamp(min=0).to(ended.dtype)).T
    episode = torch.cumsum(ended, -1) - ended  # a step that ends an episode still belongs to it
    rows, columns = (torch.where(valid > 0, episode, nowhere) for nowhere in (-1.0, -2.0))
    return powers * (rows[:, :, None] == columns[:, None, :])


def lambda_returns(values: Tensor, rewards: Tensor, discounts: Tensor, operator: Tensor) -> Tensor:
    """G = V + W delta with delta_t = r_t + discount_t V_{t+1} - V_t: the lambda-return as an affine map of the values.

    values (C, L+1), rewards and discounts = gamma (1 - terminated) (C, L), operator (C, L, L) -> G (C, L).
    """
    delta = rewards + discounts * values[:, 1:] - values[:, :-1]
    return values[:, :-1] + (operator @ delta[:, :, None])[:, :, 0]


def transposed(operator: Tensor, x: Tensor) -> Tensor:
    """W^T x for each chunk: operator (C, L, L), x (C, L) -> (C, L)."""
    return (x[:, None, :] @ operator)[:, 0, :]


def lambda_returns_vjp(slopes: Tensor, discounts: Tensor, operator: Tensor) -> Tensor:
    """(dG/dV)^T slopes, the transpose of `lambda_returns`: slopes (C, L) -> u (C, L+1)."""
    through_delta = transposed(operator, slopes)
    return nn.functional.pad(slopes - through_delta, (0, 1)) + nn.functional.pad(discounts * through_delta, (1, 0))


class CriticJacobian:
    """J = dV / d omega (n, P) of any critic at n observations, as products with it.

    V is one number a row, so its gradient in the weights of a linear layer is the outer product of delta, the derivative
    of V by the layer's outputs, and the layer's inputs h. One torch.func.vjp by zeros that are added to the outputs of all
    layers gives every delta, whatever lies between the layers. Other parameters, such as those of a layer norm, have their
    Jacobian in full. Vectors in parameter space are flat, in the order of `critic.parameters()`; q of them are (q, P).
    """

    def __init__(self, critic: nn.Module, obs: Tensor):
        """Forward and backward pass at obs (n, D); keeps the values (n,) and the factors of J."""
        layers = [module for module in critic.modules() if type(module) is nn.Linear]

        def shifted_values(shifts: list[Tensor]) -> tuple[Tensor, dict[nn.Linear, Tensor]]:
            inputs = {}

            def shift(layer, arguments, outputs):
                inputs[layer] = arguments[0]
                return outputs + shifts[layers.index(layer)]

            with contextlib.ExitStack() as hooks:
                for layer in layers:
                    hooks.enter_context(layer.register_forward_hook(shift))
                return critic(obs).squeeze(-1), inputs

        with torch.no_grad():
            zeros = [obs.new_zeros(len(obs), layer.out_features) for layer in layers]
            self.values, slopes, inputs = torch.func.vjp(shifted_values, zeros, has_aux=True)
            (deltas,) = slopes(torch.ones_like(self.values))
        blocks = {}  # of each parameter: (delta, h) for weights, (J,) for all else
        for layer, delta in zip(layers, deltas):
            if layer in inputs:
                blocks |= {layer.weight: (delta, inputs[layer]), layer.bias: (delta,)}
        rest = {name: p.detach() for name, p in critic.named_parameters() if p not in blocks}
        if rest:
            value = torch.func.grad(lambda rest, row: torch.func.functional_call(critic, rest, (row[None],)).squeeze())
            with torch.no_grad():
                dense = torch.func.vmap(value, (None, 0))(rest, obs)
            blocks |= {p: (dense[name].flatten(1),) for name, p in critic.named_parameters() if name in rest}
        self.blocks = [blocks[p] for p in critic.parameters()]
        self.sizes = [p.numel() for p in critic.parameters()]
        self.last_inputs = [*inputs.values()][-1] if inputs else obs

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u for q vectors at once: (q, n) -> (q, P)."""
        parts, columns = [], u.T.contiguous()[:, :, None]
        for delta, *inputs in self.blocks:
            if not inputs:
                parts.append(u @ delta)
            elif delta.shape[1] <= inputs[0].shape[1]:  # u goes with the smaller factor
                parts.append(((columns * delta[:, None, :]).flatten(1).T @ inputs[0]).view(len(u), -1))
            else:
                outer = (columns * inputs[0][:, None, :]).flatten(1).T @ delta
                parts.append(outer.view(len(u), -1, delta.shape[1]).mT.flatten(1))
        return torch.cat(parts, 1)

    def jvp(self, v: Tensor) -> Tensor:
        """J v for a vector: (P,) -> (n,)."""
        result = torch.zeros_like(self.values)
        for (delta, *inputs), part in zip(self.blocks, v.split(self.sizes)):
            result += (inputs[0] @ part.view(delta.shape[1], -1).T * delta).sum(1) if inputs else delta @ part
        return result

    def kernel(self) -> Tensor:
        """J J^T (n, n), parameter by parameter."""
        return sum(math.prod(factor @ factor.T for factor in block) for block in self.blocks)


class GaussNewton:
    """H = 2 sum_t w_t grad V_t grad V_t^T = R^T R, the Gauss-Newton matrix of L = sum_t w_t (G_t - V_t)^2.

    R = diag(sqrt(2 w)) J with weights w (n,), 0 for rows that are not in L. It is the Hessian of L without the term
    in the residuals G - V: positive semidefinite, and equal to it for a critic that is linear in omega.
    """

    def __init__(self, jacobian: CriticJacobian, weights: Tensor):
        self.jacobian, self.root = jacobian, torch.sqrt(2 * weights)

    def product(self, v: Tensor) -> Tensor:
        """H v: (P,) -> (P,)."""
        return self.jacobian.vjp((self.jacobian.jvp(v) * self.root**2)[None])[0]

    def sketch(self, u: Tensor, directions: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """b = J^T u (P,), H P (q, P) and P^T H P (q, q) for directions P (F, q) in the last layer with features (n, F).

        R P = features P costs next to nothing, so one product with J^T for q + 1 vectors gives b and all of H P.
        """
        images = (features @ directions).T
        products = self.jacobian.vjp(torch.cat([u[None], images * self.root]))
        return products[0], products[1:], images @ images.T


class Hessian(GaussNewton):
    """H = grad^2_omega L of L = sum_t w_t (G_t - V_t)^2 in full, by torch.func.jvp of torch.func.grad; it can be indefinite."""

    def __init__(self, jacobian: CriticJacobian, weights: Tensor, critic: nn.Module, obs: Tensor, targets: Tensor):
        super().__init__(jacobian, weights)
        self.omega = {name: parameter.detach() for name, parameter in critic.named_parameters()}

        def loss(omega: dict[str, Tensor]) -> Tensor:
            return (weights * (targets - torch.func.functional_call(critic, omega, (obs,)).squeeze(-1)) ** 2).sum()

        self.gradient = torch.func.grad(loss)

    def product(self, v: Tensor) -> Tensor:
        """H v: (P,) -> (P,)."""
        parts = [part.view_as(p) for part, p in zip(v.split(self.jacobian.sizes), self.omega.values())]
        tangent = torch.func.jvp(self.gradient, (self.omega,), (dict(zip(self.omega, parts)),))[1]
        return torch.cat([part.flatten() for part in tangent.values()])

    def sketch(self, u: Tensor, directions: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """b, H P and P^T H P as in `GaussNewton.sketch`; the last layer's parameters are the last of omega."""
        padded = nn.functional.pad(directions.T, (sum(self.jacobian.sizes) - len(directions), 0))
        columns = torch.func.vmap(self.product)(padded)
        return self.jacobian.vjp(u[None])[0], columns, padded @ columns.T


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


def nystrom_ihvp(
    curvature: GaussNewton, u: Tensor, damping: float, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """b = J^T u and v = (H_q + damping I)^-1 b: u (n,) -> b, v (P,), for a critic whose last layer is linear.

    The directions P lie in that layer, along its leading features Phi (n, width + 1), its inputs and 1 scaled as R:
    P = orth(S^2 Omega) for S = Phi^T Phi and a Gaussian Omega, subspace iteration (Halko et al. 2011, alg. 4.4).
    """
    last = curvature.jacobian.last_inputs
    features = torch.cat([last, torch.ones_like(last[:, :1])], 1) * curvature.root[:, None]
    omega = torch.randn(rank, features.shape[1], generator=generator).to(features)
    for _ in range(2):
        omega = (omega @ features.T) @ features
    b, columns, core = curvature.sketch(u, torch.linalg.qr(omega.T)[0], features)
    return b, nystrom_solver(columns, core, damping)(b)


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
    """b = J^T u and v = (H + damping I)^-1 b by conjugate gradients: u (n,) -> b, v (P,)."""
    b = curvature.jacobian.vjp(u[None])[0]
    return b, conjugate_gradient(lambda v: curvature.product(v) + damping * v, b, iterations)


def exact_ihvp(curvature: GaussNewton, u: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """b = J^T u and v = (H + damping I)^-1 b exactly, in the space of the rows: u (n,) -> b, v (P,).

    v = (b - R^T (damping I + R R^T)^-1 R b) / damping: one n x n kernel and its Cholesky factor, in float64; n is the
    number of rows of the minibatch. R is a float32 number: where the damping is too small beside its rounding (below
    1e-6 of the largest eigenvalue or so) the factor may not exist, and v is nan.
    """
    jacobian, root = curvature.jacobian, curvature.root
    b = jacobian.vjp(u[None])[0]
    kernel = (jacobian.kernel() * root[:, None] * root).double()
    kernel.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(kernel)
    inner = torch.cholesky_solve((root * jacobian.jvp(b)).double()[:, None], factor)[:, 0]
    inner = torch.where(failed == 0, inner, math.nan).to(b.dtype)
    return b, (b - jacobian.vjp((root * inner)[None])[0]) / damping


def surrogate_slope(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """The derivative of `clipped_surrogate` by the advantages: the ratio of the branch that is the minimum."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.where(ratio * advantages <= clipped * advantages, ratio, clipped)


def follower_step(critic: nn.Module, optimiser: torch.optim.Optimizer, obs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """One step of the follower on L = sum_t w_t (G_t - V(s_t))^2; obs (n, D), targets and weights (n,). Returns L before it."""
    errors = critic(obs).squeeze(-1) - targets
    slopes = 2 * weights * errors.detach()  # dL / d errors
    optimiser.zero_grad()
    errors.backward(slopes)
    optimiser.step()
    return 0.5 * slopes @ errors.detach()


def inner_gradient_norm(critic: nn.Module, obs: Tensor, targets: Tensor) -> Tensor:
    """|grad_omega L| of L = mean_t (G_t - V(s_t))^2, 0 where the critic has answered in full: obs (n, D), targets (n,)."""
    loss = ((targets - critic(obs).squeeze(-1)) ** 2).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*critic.parameters()])]).norm()


def leader_diagnostics(
    theta: list[nn.Parameter], direct: Tensor, correction: Tensor, weights: Tensor, e: Tensor
) -> dict[str, Tensor]:
    """The gradients in theta of J and of the correction, and the row weights 1 + 2 e (C, L), in numbers."""

    def gradient(objective: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, theta, retain_graph=True)])

    direct, correction = gradient(direct), gradient(correction)
    mean = (weights * (1 + 2 * e)).sum()
    return {
        "direct_norm": direct.norm(),
        "correction_norm": correction.norm(),
        "norm_ratio": correction.norm() / direct.norm(),
        "cosine": torch.cosine_similarity(direct, correction, dim=0),
        "weight_mean": mean,
        "weight_std": (weights * (1 + 2 * e - mean) ** 2).sum().sqrt(),
    }


def check_critic(critic: nn.Module, obs_dim: int, needs_linear_output: bool) -> None:
    """Raise BadInput if `CriticJacobian` does not hold for this critic, as with a layer that is used twice, or, where the
    solver needs it, if its last layer is not nn.Linear(..., 1) with a bias."""
    critic, generator = copy.deepcopy(critic).cpu().double(), torch.Generator().manual_seed(0)
    for parameter in critic.parameters():  # a last layer of zeros would hide all others
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    obs = torch.randn(8, obs_dim, generator=generator).double()
    try:
        jacobian, values = CriticJacobian(critic, obs), critic(obs).squeeze(-1)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(values.square().sum(), [*critic.parameters()])])
        holds = torch.allclose(jacobian.vjp(2 * values.detach()[None])[0], expected, rtol=1e-6, atol=1e-9)
    except RuntimeError:  # torch.func does not take some layers, such as a batch norm
        holds = False
    if not holds:
        raise BadInput("the critic's derivatives do not hold: use each linear layer once, on rows (n, d) that do not depend on each other, without dropout")
    last = torch.cat([jacobian.last_inputs, torch.ones(8, 1)], 1)
    dense = jacobian.vjp(torch.eye(8).double())[:, -last.shape[1] :]
    if needs_linear_output and not (dense.shape == last.shape and torch.allclose(dense, last)):
        raise BadInput("--ihvp nystrom needs a critic whose last layer is nn.Linear(..., 1) with a bias; use --ihvp cg or exact")


# ---- Laboratory mathematics ------------------------------------------------------------------------------------
def nystrom_directions(
    columns: str, curvature: GaussNewton, b: Tensor, rank: int, generator: torch.Generator
) -> Tensor:
    """Directions P^T (q, P) of the Nystrom approximation, q <= rank; b = grad_omega J (P,).

    `features`, the choice of `nystrom_ihvp`, and `last-layer` need a critic whose last layer is linear.
    """
    jacobian, size = curvature.jacobian, len(b)
    features = nn.functional.pad(jacobian.last_inputs, (0, 1), value=1.0) * curvature.root[:, None]
    last = features.shape[1]  # parameters of the last layer
    if columns in ("coordinates", "fixed", "last-layer"):
        if columns == "fixed":
            generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(last if columns == "last-layer" else size, generator=generator)[:rank]
        return nn.functional.one_hot(size - 1 - chosen if columns == "last-layer" else chosen, size).to(b)
    if columns == "gaussian":
        return jacobian.vjp(torch.randn(rank, len(features), generator=generator).to(b) * curvature.root)
    if columns == "krylov":
        basis = [b / b.norm()]
        while len(basis) < rank:
            new = curvature.product(basis[-1])
            for _ in range(2):  # Gram-Schmidt twice: once is not enough in float32
                for old in basis:
                    new = new - (new @ old) * old
            basis.append(new / new.norm().clamp(min=torch.finfo(b.dtype).tiny))
        return torch.stack(basis)
    omega = torch.randn(rank, last, generator=generator).to(b)
    for _ in range(2):
        omega = (omega @ features.T) @ features
    return nn.functional.pad(torch.linalg.qr(omega.T)[0].T, (size - last, 0))


def curvature_products(curvature: GaussNewton, v: Tensor) -> Tensor:
    """H v for q vectors at once, (q, P) -> (q, P), with either curvature."""
    if isinstance(curvature, Hessian):
        return torch.func.vmap(curvature.product)(v)
    moved = torch.stack([curvature.jacobian.jvp(one) for one in v])
    return curvature.jacobian.vjp(moved * curvature.root**2)


def preconditioned_cg_ihvp(
    curvature: GaussNewton, b: Tensor, damping: float, iterations: int, columns: Tensor, core: Tensor
) -> Tensor:
    """(H + damping I)^-1 b by conjugate gradients with the Nystrom inverse as preconditioner (Frangella et al. 2023).

    b (P,), columns (q, P) and core (q, q) of `nystrom_solver` -> v (P,); guarded like `conjugate_gradient`.
    """
    precondition = nystrom_solver(columns, core, damping)
    v, residual, direction = torch.zeros_like(b), b, precondition(b)
    energy, stop = b @ direction, 1e-12 * (b @ b)
    going = torch.ones_like(energy, dtype=torch.bool)
    for _ in range(iterations):
        image = curvature.product(direction) + damping * direction
        bend = direction @ image
        going = going & (bend > 0) & (residual @ residual > stop)
        step = torch.where(going, energy / bend, 0.0)
        v, residual = v + step * direction, residual - step * image
        pulled = precondition(residual)
        new_energy = residual @ pulled
        direction = pulled + torch.where(going, new_energy / energy, 0.0) * direction
        energy = new_energy
    return v


def controlled(e: Tensor, weights: Tensor, control: str, generator: torch.Generator) -> Tensor:
    """The trace e (C, L) under a control that breaks or reverses its meaning and leaves the rest as it is.

    weights (C, L) are those of the mean over the transitions, 0 for other rows, which no control mixes in.
    """
    if control == "constant":
        return torch.where(weights > 0, (weights * e).sum(), 0.0)
    if control == "reversed":
        return -e
    if control == "permuted":
        e, rows = e.clone(), weights > 0
        e[rows] = e[rows][torch.randperm(int(rows.sum()), generator=generator).to(e.device)]
    return e


def released_mixed_weights(
    ratio: Tensor, advantages: Tensor, advantages_dot: Tensor, errors: Tensor, values_dot: Tensor, clip_f: float
) -> Tensor:
    """Row weights y with c = (grad_theta,omega f2) v = sum_t y_t grad_theta r_t for the released surrogate
    f2 = -2 sum_t min(r_t A_t, clip(r_t, 1-clip_f, 1+clip_f) A_t) (G'_t - V_t), A and V moving in omega along v.

    errors = G' - V, and advantages_dot and values_dot are the derivatives of A and V along v; all (C, L) and detached.
    """
    active = ratio * advantages <= ratio.clamp(1 - clip_f, 1 + clip_f) * advantages
    return -2 * active * (advantages_dot * errors - advantages * values_dot)


def bounded(direct: list[Tensor], correction: list[Tensor], bound: float) -> list[Tensor]:
    """The released direction direct - s correction with s = min(1, bound |direct| / (|correction| + 1e-8)).

    All three are lists of tensors, parameter by parameter; the norms are those of whole lists.
    """
    norms = [torch.cat([part.flatten() for part in vector]).norm() for vector in (direct, correction)]
    scale = (bound * norms[0] / (norms[1] + 1e-8)).clamp(max=1.0)
    return [d - scale * c for d, c in zip(direct, correction)]


# ---- The run: what is not the algorithm (shared) ---------------------------------------------------------------
EPISODES = ("global_step", "wall_time_s", "env_index", "episodic_return", "episodic_length")


class Diverged(Exception):
    """One sentence: which numbers stopped being finite, and when; printed, exit status 1."""


def say(text: str) -> None:
    """Print a line on stderr, above the progress bar. A reader that went away never changes what becomes of a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file=sys.stderr)


def resume_folder(resume: Path | None = None) -> Path | None:
    """The run folder to resume, of the words on a command line."""
    return resume


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line as Args; with --resume the arguments of that run, of which those given again win.

    Raises BadInput; tyro itself exits with status 2 on words it cannot parse.
    """
    folder, _ = tyro.cli(resume_folder, args=argv, return_unknown_args=True, add_help=False)
    saved = None
    if folder is not None:
        try:
            made = json.loads((folder / "args.json").read_text())
            if made["script"] != Path(__file__).name:
                raise ValueError(f"it was made by {made['script']}")
            saved = Args(**made["args"] | {"resume": folder})
        except (OSError, ValueError, KeyError, TypeError, BadInput) as error:
            raise BadInput(f"--resume {folder} is not a run folder of this script: {error}") from error
    args = tyro.cli(Args, args=argv, default=saved, description=sys.modules[Args.__module__].__doc__.split("\n\n")[0])
    for name, value in saved or ():
        if getattr(args, name) != value:
            say(f"--{name.replace('_', '-')} was {value} and is now {getattr(args, name)}")
    return args


def provenance() -> dict:
    """What makes a run: command, commit, versions."""
    packages = [name for name in ("torch", "numpy", "gymnasium", "envpool", "mujoco") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True) if shutil.which("git") else None
    commit = git.stdout.strip() or None if git else None
    return {"script": Path(__file__).name, "argv": sys.argv, "commit": commit, "versions": versions}


def derived_seed(seed: int, step: int) -> int:
    """A seed for environments that start at `step` of the run with `seed`; `seed` itself at step 0."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) % 2**31 if step else seed


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by what `write` puts into a new file: after a crash either the old or the new content is there."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # a full disk should not stay full of half a file


class Run:
    """The run folder (docs/run_folder.md): arguments, csv files, TensorBoard, W&B, checkpoints, signals, progress.

    A context manager: it holds the folder of a run to resume, and writes result.json at the end, whatever the end is.
    `open` writes to the folder for the first time. SIGINT and SIGTERM set `stop_signal`, which the loop reads at the end
    of its iteration; a second one, or one after training, stops at once.
    """

    def __init__(self, args: Args):
        self.args, self.folder, self.lock, self.checkpoint, self.wandb = args, args.resume, None, None, None
        self.global_step, self.wall_time, self.opened, self.returns, self.result = 0, 0.0, False, [], {}
        self.stop_signal, self.trained, self.handlers, self.files = 0, False, {}, []

    def __enter__(self):
        """Lock the folder of a run to resume, then read its checkpoint. Raises BadInput if that is not possible."""
        if self.folder is None:
            return self
        if not (self.folder / "checkpoint.pt").exists():
            raise BadInput(f"--resume {self.folder} has no checkpoint.pt yet; start a new run")
        try:
            self.lock = filelock.FileLock(self.folder / ".lock").acquire(timeout=0).lock
            self.checkpoint = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            self.global_step, self.wall_time = self.checkpoint["global_step"], self.checkpoint["wall_time"]
        except filelock.Timeout:
            raise BadInput(f"--resume {self.folder} is still running in another process; stop it first") from None
        except Exception as error:  # a damaged archive raises errors of many kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(f"--resume {self.folder}: checkpoint.pt cannot be used: {reason}; start a new run") from error
        return self

    def open(self) -> None:
        """Make the folder, or go on in it, and start all logs. Raises BadInput if it cannot be written or W&B refuses."""
        name = f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}__{int(time.time())}"
        try:
            if self.checkpoint is None:
                self.folder = self.args.run_dir / re.sub(r"[/:\\\s]", "_", name)
                while self.folder.exists():  # a run of the same second
                    self.folder = self.folder.with_name(self.folder.name + "_")
                self.folder.mkdir(parents=True)
                self.lock = filelock.FileLock(self.folder / ".lock").acquire(timeout=0).lock
            if self.args.track:
                self.start_wandb()
            path, args = self.folder / "args.json", json.loads(self.args.model_dump_json(exclude={"resume"}))
            self.write_json("args.json", (json.loads(path.read_text()) if self.checkpoint else provenance()) | {"args": args})
            self.metrics, self.episodes = self.open_csv("metrics.csv", METRICS), self.open_csv("episodes.csv", EPISODES)
            (self.folder / "result.json").unlink(missing_ok=True)  # of the part before
        except OSError as error:
            raise BadInput(f"the run folder cannot be written: {error}; name another --run-dir or make it writable") from error
        self.tensorboard = SummaryWriter(self.folder, purge_step=self.global_step + 1 if self.checkpoint else None)
        interval = 0.1 if sys.stderr.isatty() else 10  # seconds; with a delay the bar writes nothing here, where a reader may be gone
        bar = dict(unit="step", unit_scale=True, mininterval=interval, delay=0.1)
        self.bar = tqdm(total=self.args.total_timesteps, initial=self.global_step, **bar)
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self.opened, self.started = True, time.perf_counter() - self.wall_time

    def on_signal(self, number: int, frame) -> None:
        """Ask the loop to stop; at once if it was asked before or has ended."""
        at_once, self.stop_signal = self.stop_signal or self.trained, number
        if at_once:
            sys.exit(128 + number)

    def start_wandb(self) -> None:
        """Send what TensorBoard gets to W&B as well. Parts that are logged offline are runs of one group, since an id that
        is used twice offline overwrites the first part when it is synchronised."""
        part = f"-{self.global_step}" if self.checkpoint and os.environ.get("WANDB_MODE") == "offline" else ""
        try:
            import wandb

            self.wandb = wandb.init(
                project=self.args.wandb_project_name, entity=self.args.wandb_entity, name=self.folder.name,
                group=self.folder.name, id=re.sub(r"[^\w-]", "_", self.folder.name + part), resume="allow",
                config=self.args.model_dump(mode="json"), sync_tensorboard=True,
            )  # fmt: skip
        except Exception as error:
            if self.checkpoint is None:
                shutil.rmtree(self.folder)
            raise BadInput(f"--track: W&B does not start: {error}; log in, set WANDB_MODE=offline or leave it out") from error

    def open_csv(self, name: str, columns: tuple[str, ...]) -> csv.DictWriter:
        """The csv file of that name, to append to. In a resumed run it ends with the checkpoint: rows after it are dropped,
        and so is, with a message, what cannot be read."""
        path, kept, damaged = self.folder / name, [], 0
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                row = dict(zip(columns, [float(cell or "nan") for cell in line.split(",")], strict=True))
                kept += [(line, row)] if int(row["global_step"]) <= self.global_step else []
            except (ValueError, OverflowError):
                damaged += line != ",".join(columns)
        if damaged:
            say(f"{path}: {damaged} lines could not be read and are dropped")
        self.returns += [(row["global_step"], row["episodic_return"]) for _, row in kept if columns is EPISODES]
        text = "\r\n".join([",".join(columns), *(line for line, _ in kept), ""])
        write_atomically(path, lambda file: file.write(text.encode()))
        self.files.append(open(path, "a", newline=""))
        return csv.DictWriter(self.files[-1], columns)

    def write_json(self, name: str, content: dict) -> None:
        """Write or replace a json file of the folder; nan and inf, which strict JSON does not have, become null."""
        text = json.dumps(json.loads(json.dumps(content), parse_constant=lambda word: None), indent=1) + "\n"
        write_atomically(self.folder / name, lambda file: file.write(text.encode()))

    def log(self, global_step: int, metrics: dict[str, float | None], episodes: list[dict]) -> None:
        """One row of metrics.csv, the same scalars for TensorBoard, and the episodes that ended in this iteration; None is
        a number that does not exist."""
        self.global_step, self.wall_time = global_step, time.perf_counter() - self.started
        metrics |= {"global_step": global_step, "wall_time_s": self.wall_time, "charts/SPS": global_step / self.wall_time}
        for name in ("episodic_return", "episodic_length"):
            metrics[f"charts/{name}"] = float(np.mean([row[name] for row in episodes])) if episodes else None
        self.episodes.writerows(episodes)
        self.metrics.writerow(metrics)
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
        """Replace checkpoint.pt by `state`, the counters and torch's random state; the csv files reach the disk before."""
        for file in self.files:
            os.fsync(file.fileno())
        state |= {"global_step": self.global_step, "wall_time": self.wall_time, "rng": torch.get_rng_state()}
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))

    def __exit__(self, kind, error, trace) -> None:
        """Write result.json, last and atomically, and let go of everything."""
        if self.opened:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            stopped = SystemExit if self.stop_signal else KeyboardInterrupt  # a task of the user's own may exit as well
            ends = {type(None): "finished", stopped: "interrupted", KeyboardInterrupt: "interrupted", Diverged: "diverged"}
            status = ends.get(type(error), "failed")
            end = self.args.total_timesteps // (self.args.num_envs * self.args.num_steps) * self.args.num_envs * self.args.num_steps
            last = [value for step, value in self.returns if step > 0.9 * end]
            final = float(np.mean(last or math.nan))
            result = {"status": status, "global_step": self.global_step, "wall_time_s": self.wall_time, "final_return": final}
            result |= {"error": f"{kind.__name__}: {error}"} if status in ("failed", "diverged") else self.result
            for each in (self.bar, self.tensorboard, *self.files):
                with contextlib.suppress(OSError, ValueError):  # on a full disk or without a reader; the result may still fit
                    each.close()
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                self.write_json("result.json", result)
            say(f"{status} after {self.global_step:,} steps, final return {final:.1f}: {self.folder}")
            if status == "interrupted":
                say(f"continue with --resume {self.folder}")
            if self.wandb is not None:
                self.wandb.finish(exit_code=0 if error is None else 1)
        if self.lock is not None:
            self.lock.release()
        if self.opened and status == "failed" and isinstance(error, SystemExit):
            raise RuntimeError("the task tried to end the process") from error


def load_agent(path: str | Path) -> Agent:
    """The agent in a model.pt or a checkpoint.pt. Called with raw observations (..., D) it gives the actions that are played."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    agent = Agent(*saved["agent_sizes"])
    agent.load_state_dict(saved["agent"])
    return agent.eval()


def load_policy(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """The policy in a model.pt or a checkpoint.pt: raw observations (..., D) -> the most probable actions, as the task takes
    them."""
    return as_policy(load_agent(path))


def as_policy(agent: Agent) -> Callable[[np.ndarray], np.ndarray]:
    """The agent as a function of numpy arrays: raw observations (..., D) -> the actions that are played."""
    return torch.no_grad()(lambda obs: agent(torch.as_tensor(np.asarray(obs))).numpy())


def play(policy: Callable, args, episodes: int, film_folder: Path | None = None) -> list[float]:
    """Undiscounted returns of episodes in Gymnasium, on seeds unlike the training's; with a folder they are filmed.

    An episode ends at the latest with its 100,000th step, or with its 5,000th if it is filmed. Raises BadInput if Gymnasium
    cannot make the task; without episodes it only tries.
    """
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    with task_errors(args.env_id), warnings.catch_warnings(action="ignore"):
        drawn = {"render_mode": "rgb_array"} if film_folder else {}
        env = gym.make(args.env_id, **json.loads(args.env_kwargs) | drawn)
        if film_folder:
            env = gym.wrappers.RecordVideo(env, str(film_folder), episode_trigger=lambda episode: True)
        env, returns = gym.wrappers.FlattenObservation(env), [0.0] * episodes
    for episode in range(episodes):
        obs, _ = env.reset(seed=derived_seed(args.seed, 2**40 + episode))
        for _ in range(5_000 if film_folder else 100_000):
            obs, reward, terminated, truncated, _ = env.step(policy(obs)[()])
            returns[episode] += float(reward)
            if terminated or truncated:
                break
    env.close()
    return returns


# ---- Training: set-up (shared) ---------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train, play and return the run folder. Raises BadInput before anything is created, and Diverged."""
    with Run(args) as run:
        checkpoint, start = run.checkpoint, run.global_step
        if start % (args.num_envs * args.num_steps) or start > args.total_timesteps:
            raise BadInput(
                f"--resume {args.resume} has made {start} steps: --total-timesteps must be at least that, and "
                "--num-envs x --num-steps must divide it"
            )
        torch.manual_seed(args.seed)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)  # networks this small lose more to the hand-over between threads than they gain
        envs, observation_space, action_space = make_envs(args, derived_seed(args.seed, start))
        if args.eval_episodes or args.capture_video:
            play(None, args, episodes=0)
        obs_dim, action_dim = (gym.spaces.flatdim(space) for space in (observation_space, action_space))
        agent_sizes = obs_dim, action_dim, args.actor_width, args.critic_width
        agent = Agent(*agent_sizes)
        agent.set_action_space(action_space)
        agent.to(device).eval()  # acting and learning are one function of the weights: no dropout in either

        # ---- Optimisers ----------------------------------------------------------------------------------------
        of_last_layer = args.ihvp in ("nystrom", "pcg") and args.columns in ("features", "last-layer")
        check_critic(agent.critic, obs_dim, needs_linear_output=of_last_layer)
        actor_optimiser = torch.optim.Adam(agent.actor_parameters(), args.learning_rate, eps=1e-5, fused=True)
        critic_optimiser = torch.optim.Adam(agent.critic.parameters(), args.critic_learning_rate, eps=1e-5, fused=True)
        optimisers = [actor_optimiser, critic_optimiser]
        chunks = chunk_indices(args.num_steps, args.num_envs, args.chunk_length).to(device)
        kappa = args.gamma * args.gae_lambda if args.mixed_discount is None else args.mixed_discount
        leader_lambda = args.gae_lambda if args.leader_lambda is None else args.leader_lambda
        sketch_generator = torch.Generator()  # its own, so that the solver changes no other random number
        control_generator = torch.Generator()

        # ---- Training: buffers and the loop (shared) -----------------------------------------------------------
        step_sizes = [[group["lr"] for group in each.param_groups] for each in optimisers]
        trained = [id(weight) for each in optimisers for group in each.param_groups for weight in group["params"]]
        if sorted(trained) != sorted(id(weight) for weight in agent.parameters()):
            raise BadInput("every parameter of the agent must be one of the actor's or one of the critic's, and not of both")
        obs_stats, return_stats = RunningMeanStd((obs_dim,)), RunningMeanStd()
        if checkpoint:
            try:
                agent.load_state_dict(checkpoint["agent"])
                for each, state in zip(optimisers, checkpoint["optimisers"]):
                    each.load_state_dict(state)
                for stats, numbers in zip((obs_stats, return_stats), checkpoint["stats"]):
                    stats.mean, stats.squares, stats.count = (number.numpy() for number in numbers)
                torch.set_rng_state(checkpoint["rng"])  # all noise and all minibatches are drawn on the CPU
            except (RuntimeError, ValueError, KeyError) as error:
                raise BadInput(f"--resume {args.resume}: its networks have another shape; leave out the widths and the task") from error

        def normalise(raw: np.ndarray) -> np.ndarray:
            """Observations in units of their running standard deviation, clipped to +-10."""
            return np.minimum(np.maximum((raw - obs_stats.mean) / obs_stats.std, -10.0), 10.0)

        # The rollout: arrays (time, environment, ...); row num_steps of obs is the next rollout's first.
        batch_size, shape = args.num_envs * args.num_steps, (args.num_steps, args.num_envs)
        obs = np.zeros((args.num_steps + 1, args.num_envs, obs_dim), dtype=np.float32)
        rewards, terminated, truncated, valid = (np.zeros(shape, dtype=np.float32) for _ in range(4))
        ended = np.zeros(args.num_envs, dtype=bool)  # whether the last step ended an episode: the next row is its reset
        discounted_returns, episode_returns = np.zeros(args.num_envs), np.zeros(args.num_envs)
        episode_lengths = np.zeros(args.num_envs, dtype=np.int64)
        run.open()
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
            behaviour = copy.deepcopy(agent).cpu()  # pi_old; for the few rows of a step the CPU is faster than a GPU
            noise, actions = behaviour.noise(*shape).detach(), []
            for t in range(args.num_steps):
                with torch.no_grad():
                    actions.append(behaviour.sample(torch.from_numpy(obs[t]), noise[t]))
                    task_actions = behaviour.task_actions(actions[t]).numpy()
                env_start = time.perf_counter()
                raw_obs, reward, ends, cut, _ = envs.step(task_actions)
                env_time += time.perf_counter() - env_start
                transition, ended = ~ended, ends | cut
                terminated[t], truncated[t], valid[t] = ends, cut, transition
                reward = np.where(transition, reward, 0.0)
                episode_returns += reward
                episode_lengths += transition
                discounted_returns = args.gamma * discounted_returns + reward
                # A final observation is no input of the policy and a reset row earns no reward: neither is counted.
                obs_stats.update(raw_obs[~ended] if ended.any() else raw_obs)
                return_stats.update(discounted_returns[transition])
                obs[t + 1] = normalise(raw_obs)
                rewards[t] = np.minimum(np.maximum(reward / return_stats.std, -10.0), 10.0)
                for index in ended.nonzero()[0].tolist():
                    step, wall_time = (iteration - 1) * batch_size + (t + 1) * args.num_envs, time.perf_counter() - run.started
                    episode = (step, wall_time, index, float(episode_returns[index]), int(episode_lengths[index]))
                    episodes.append(dict(zip(EPISODES, episode)))
                    discounted_returns[index], episode_returns[index], episode_lengths[index] = 0.0, 0.0, 0

            # ---- Training: values, advantages and targets of the rollout (shared) ------------------------------
            update_start = time.perf_counter()
            b_obs, b_rewards, b_terminated, b_truncated, b_valid = (
                torch.from_numpy(array).to(device) for array in (obs, rewards, terminated, truncated, valid)
            )
            b_actions, b_ended = torch.stack(actions).to(device), torch.max(b_terminated, b_truncated)
            if not args.bootstrap_truncation:
                b_terminated = b_ended
            with torch.no_grad():
                values = agent.critic(b_obs.flatten(0, 1)).view(b_obs.shape[:2])
                logprobs, _ = agent.logprob_and_entropy(b_obs[:-1].flatten(0, 1), b_actions.flatten(0, 1))
                logprobs = logprobs.view(shape)
            advantages = gae(b_rewards, values, b_terminated, b_ended, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]

            # ---- Update ----------------------------------------------------------------------------------------
            sketch_generator.manual_seed(derived_seed(args.seed, iteration))
            control_generator.manual_seed(derived_seed(args.seed + 1, iteration))
            rows = b_valid.flatten().nonzero().squeeze(-1)  # transitions; the row after an episode's end is none
            b_states, b_targets = b_obs[:-1].flatten(0, 1)[rows], returns.flatten()[rows]
            gradient_norm_before = inner_gradient_norm(agent.critic, b_states, b_targets)
            c_ended, c_terminated, c_valid = (x.flatten()[chunks[:, :-1]] for x in (b_ended, b_terminated, b_valid))
            arrays = [
                b_obs.flatten(0, 1)[chunks],  # (C, L + 1, D), with the observation that a chunk bootstraps from
                *(x.flatten(0, 1)[chunks[:, :-1]] for x in (b_actions, logprobs, b_rewards, returns, advantages)),
                c_valid,
                args.gamma * (1 - c_terminated),
                gae_operator(c_ended, c_valid, args.gamma * leader_lambda),
                gae_operator(c_ended, c_valid, kappa),
            ]
            fallbacks, nested_time, response_time = torch.zeros((), device=device), 0.0, 0.0
            for epoch in range(args.update_epochs):
                statistics = []  # of each minibatch of this epoch; read once, after the update
                sketch = None
                nested_start = time.perf_counter()
                for _ in range(args.nested_updates if args.nest == "rollout" else 0):
                    for part in torch.randperm(len(rows)).to(device).tensor_split(args.num_minibatches):
                        mean = torch.full_like(b_targets[part], 1 / len(part))
                        critic_loss = follower_step(agent.critic, critic_optimiser, b_states[part], b_targets[part], mean)
                nested_time += time.perf_counter() - nested_start
                order = torch.randperm(len(chunks)).to(device)
                for minibatch in zip(*(array[order].chunk(args.num_minibatches) for array in arrays)):
                    mb_obs, mb_actions, mb_logprobs, mb_rewards, mb_returns, mb_advantages, mb_valid, *maps = minibatch
                    mb_discounts, mb_operator, mb_mixed_operator = maps
                    nested_start = time.perf_counter()
                    states, obs_rows = mb_obs[:, :-1].flatten(0, 1), mb_obs.flatten(0, 1)  # (C L, D), (C (L + 1), D)
                    weights = mb_valid / mb_valid.sum()  # mean over the transitions

                    # The follower: K steps on L = mean (G' - V)^2.
                    for _ in range(args.nested_updates if args.nest == "minibatch" else 0):
                        critic_loss = follower_step(
                            agent.critic, critic_optimiser, states, mb_returns.flatten(), weights.flatten()
                        )
                    leader_start = time.perf_counter()

                    # The leader, with the advantages of the critic that has just answered.
                    new_logprobs, entropies = agent.logprob_and_entropy(states, mb_actions.flatten(0, 1))
                    logratio, entropy = new_logprobs.view_as(weights) - mb_logprobs, weights.flatten() @ entropies
                    ratio = logratio.exp()
                    response_start = time.perf_counter()
                    jacobian = CriticJacobian(agent.critic, obs_rows)
                    new_values = jacobian.values.view(len(mb_obs), -1)
                    refreshed = lambda_returns(new_values, mb_rewards, mb_discounts, mb_operator) - new_values[:, :-1]
                    if args.norm_adv:
                        refreshed, mb_advantages = (x - (weights * x).sum() for x in (refreshed, mb_advantages))
                        std = (weights * refreshed**2).sum().sqrt() + 1e-8
                        refreshed, mb_advantages = refreshed / std, mb_advantages / std
                    if args.mixed_advantages == "refreshed":
                        mb_advantages = refreshed

                    # The follower's response to the leader: z = J_V (H + alpha I)^-1 grad_omega J, and its trace e = W^T z.
                    e = torch.zeros_like(weights)
                    if args.ihvp != "none":
                        slopes = weights * surrogate_slope(ratio.detach(), refreshed, args.clip_coef)
                        u = lambda_returns_vjp(slopes, mb_discounts, mb_operator)
                        if args.leader == "released":
                            u[:, :-1] -= slopes  # here V(s_t) of A = G - V moves as well
                        u = u.flatten()  # b = J_V^T u
                        row_weights = nn.functional.pad(weights, (0, 1)).flatten()
                        curvature = GaussNewton(jacobian, row_weights)
                        if args.curvature == "hessian":
                            row_targets = nn.functional.pad(mb_returns, (0, 1)).flatten()
                            curvature = Hessian(jacobian, row_weights, agent.critic, obs_rows, row_targets)
                        if args.ihvp in ("nystrom", "pcg"):
                            b = jacobian.vjp(u[None])[0]
                            if sketch is None or args.sketch_refresh == "minibatch":
                                p = nystrom_directions(args.columns, curvature, b, args.nystrom_rank, sketch_generator)
                                columns = curvature_products(curvature, p)
                                sketch = columns, p @ columns.T + args.core_ridge * torch.eye(len(p), device=device)
                        if args.ihvp == "nystrom":
                            v = nystrom_solver(*sketch, args.damping)(b)
                        elif args.ihvp == "pcg":
                            v = preconditioned_cg_ihvp(curvature, b, args.damping, args.cg_iterations, *sketch)
                        elif args.ihvp == "cg":
                            b, v = cg_ihvp(curvature, u, args.damping, args.cg_iterations)
                        else:
                            b, v = exact_ihvp(curvature, u, args.damping)
                        response = jacobian.jvp(v).view(len(mb_obs), -1)
                        finite = response.sum().isfinite()  # if not, this step falls back to the direct gradient
                        response = torch.where(finite, response, 0.0)
                        fallbacks += ~finite
                        if args.leader == "lambda-return":
                            e = transposed(mb_mixed_operator, response[:, :-1])
                            e = controlled(e, weights, args.correction_control, control_generator)
                    actor_start = time.perf_counter()

                    # The leader's step along the hypergradient: correction's gradient is -(grad_theta,omega L) v.
                    surrogates = clipped_surrogate(ratio, torch.stack([refreshed, mb_advantages]), args.clip_coef)
                    direct, correction = (torch.stack([weights, weights * 2 * e]) * surrogates).sum((1, 2))
                    loss = -(direct + correction) - args.ent_coef * entropy
                    if args.leader == "released" and args.ihvp != "none":
                        # The released code minimises f = -J, so its v is the negative of ours.
                        moved = lambda_returns(-response, torch.zeros_like(weights), mb_discounts, mb_operator)
                        row_slopes = released_mixed_weights(
                            ratio.detach(), refreshed, moved + response[:, :-1], mb_returns - new_values[:, :-1],
                            -response[:, :-1], args.clip_f,
                        )  # fmt: skip
                        correction = (mb_valid * row_slopes * ratio).sum()
                    if epoch == args.update_epochs - 1:
                        with torch.no_grad():
                            clipped = (weights * ((ratio - 1).abs() > args.clip_coef)).sum()
                            kl, old_kl = (weights * ((ratio - 1) - logratio)).sum(), -(weights * logratio).sum()
                            statistics.append(torch.stack([critic_loss, -direct, entropy, old_kl, kl, clipped]))
                        if len(statistics) == args.num_minibatches:  # the last minibatch of the rollout
                            diagnostics = leader_diagnostics(agent.actor_parameters(), direct, correction, weights, e)
                            if args.ihvp != "none":
                                residual = curvature.product(v) + args.damping * v - b
                                diagnostics["ihvp_residual"] = residual.norm() / b.norm()
                                diagnostics["ihvp_cosine"] = torch.cosine_similarity(v, b, dim=0)
                    actor_optimiser.zero_grad()
                    if args.leader == "released":
                        theta, objectives = agent.actor_parameters(), (-direct - args.ent_coef * entropy, correction)
                        parts = [torch.autograd.grad(each, theta, retain_graph=True) for each in objectives]
                        for parameter, gradient in zip(theta, bounded(*parts, args.ihvp_bound)):
                            parameter.grad = gradient
                    else:
                        loss.backward()
                    actor_optimiser.step()
                    nested_time += leader_start - nested_start
                    response_time += actor_start - response_start
            diagnostics["inner_gradient_norm_before"] = gradient_norm_before
            diagnostics["inner_gradient_norm_after"] = inner_gradient_norm(agent.critic, b_states, b_targets)
            names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
            losses = dict(zip((f"losses/{name}" for name in names), torch.stack(statistics).mean(0).tolist()))
            losses |= {f"bilevel/{name}": float(value) for name, value in diagnostics.items() if math.isfinite(value)}
            losses |= {"bilevel/fallbacks": float(fallbacks), "time/nested_critic": nested_time, "time/response": response_time}

            # ---- Training: log and checkpoint (shared) ---------------------------------------------------------
            targets, predictions = (x[b_valid.bool()] for x in (returns, values[:-1]))
            explained = float(1 - (targets - predictions).var() / targets.var())
            now = time.perf_counter()
            times = {
                "losses/explained_variance": explained if math.isfinite(explained) else None,
                "charts/learning_rate": optimisers[0].param_groups[0]["lr"],
                "time/env": env_time,
                "time/policy": update_start - rollout_start - env_time,
                "time/update": now - update_start,
            }
            run.log(iteration * batch_size, losses | times, episodes)
            weights = torch.cat([parameter.flatten() for parameter in agent.parameters()])
            watched = {"observations": b_obs, "rewards": b_rewards, "losses": torch.stack(statistics), "weights": weights}
            for name, numbers in watched.items():
                if not numbers.isfinite().all():
                    raise Diverged(f"the {name} stopped being finite by step {iteration * batch_size:,}")
            agent.obs_mean.copy_(torch.as_tensor(obs_stats.mean))
            agent.obs_std.copy_(torch.as_tensor(obs_stats.std))
            if iteration % args.checkpoint_every == 0 or iteration == num_iterations or run.stop_signal:
                numbers = [(each.mean, each.squares, each.count) for each in (obs_stats, return_stats)]
                stats = [[torch.as_tensor(x, dtype=torch.float64) for x in each] for each in numbers]
                state = {"agent_sizes": agent_sizes, "agent": agent.state_dict(), "stats": stats}
                run.save_checkpoint(state | {"optimisers": [each.state_dict() for each in optimisers]})
            if run.stop_signal:
                sys.exit(128 + run.stop_signal)

        # ---- Training: model, evaluation, film (shared) --------------------------------------------------------
        run.trained = True
        envs.close()
        agent.cpu()
        if args.save_model:
            model = {"script": Path(__file__).name, "env_id": args.env_id, "agent_sizes": agent_sizes, "agent": agent.state_dict()}
            write_atomically(run.folder / "model.pt", lambda file: torch.save(model, file))
        if args.capture_video:
            try:
                play(as_policy(agent), args, 1, run.folder / "videos")
            except Exception as error:  # as where nothing can draw
                say(f"there is no film: {error}; for MuJoCo set MUJOCO_GL to egl or osmesa; the run is complete without it")
        if args.eval_episodes:
            run.result["eval_returns"] = play(as_policy(agent), args, args.eval_episodes)
            say(f"mean return of {args.eval_episodes} episodes: {np.mean(run.result['eval_returns']):.1f}")
    return run.folder


# ---- Entry point (shared) --------------------------------------------------------------------------------------
if __name__ == "__main__":
    sys.path.append(os.getcwd())  # where a task of the user's own may lie
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if it is closed
    try:
        train(parse_args())
    except BadInput as error:
        say(f"error: {error}")
        sys.exit(2)
    except Diverged as error:
        say(f"error: {error}")
        sys.exit(1)
