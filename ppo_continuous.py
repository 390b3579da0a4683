"""PPO for continuous control (Schulman et al. 2017, arXiv:1707.06347), the baseline of `blpo_continuous.py`.

Actor theta and critic omega are improved at the same time on minibatches of the last rollout:

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
    A_t     = sum_{k >= t} (gamma lambda)^{k-t} delta_k      up to the end of the episode   GAE, eq. (11)   -> gae
    r_t     = pi_theta(a_t|s_t) / pi_old(a_t|s_t)
    J       = mean_t min(r_t A_t, clip(r_t, 1-eps, 1+eps) A_t)                               eq. (7)    -> clipped_surrogate
    L       = mean_t (G_t - V_omega(s_t))^2 / 2,  G_t = A_t + V_old(s_t)                     eq. (9)    -> value_loss
    theta, omega  <-  Adam on  -J + vf_coef L - ent_coef H

The details are those of CleanRL's `ppo_continuous_action` (numbered in docs/ppo.md), with four things put right:
the row that follows the end of an episode is a reset and no transition, so it is in no loss, statistic or normaliser;
a time limit is bootstrapped from the episode's final observation (`--no-bootstrap-truncation` treats it as a
termination, as most published numbers do); actions are clipped to the task's own box; the observation normaliser is
saved with the model. Environments step in EnvPool where it has them, else in Gymnasium.

    python ppo_continuous.py --env-id Hopper-v4
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
class Args(CheckedArgs):
    """The run, the task, then PPO."""

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
    """Adam step size of the actor"""
    critic_learning_rate: Positive = 2.8e-3
    """Adam step size of the critic"""
    anneal_lr: bool = True
    """lower both step sizes linearly to 0"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the advantages and of the critic's targets"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it counts as a termination"""
    num_minibatches: Count = 16
    """minibatches in an epoch"""
    update_epochs: Count = 4
    """passes over a rollout"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: Positive = 0.2
    """eps of the clipped ratio"""
    clip_vloss: bool = True
    """clip the change of the value as well"""
    ent_coef: NonNegative = 0.0
    """weight of the entropy bonus"""
    vf_coef: NonNegative = 0.5
    """weight of the value loss"""
    max_grad_norm: number(float, "FLOAT>0", gt=0, allow_inf_nan=True) = 0.5
    """largest norm of the joint gradient"""
    target_kl: Positive | None = None
    """stop the epochs of a rollout once the approximate KL divergence exceeds this; default: never"""
    actor_width: Width = 64
    """units in each of the actor's two hidden layers"""
    critic_width: Width = 64
    """units in each of the critic's two hidden layers"""

    @pydantic.model_validator(mode="after")
    def check_batch_shape(self):
        """Raise BadInput unless there is a whole rollout and the minibatches divide it."""
        batch_size = self.num_envs * self.num_steps
        if batch_size > 10_000_000:
            raise BadInput(f"--num-envs x --num-steps is {batch_size}, more than the 10,000,000 rows that a rollout may have")
        if self.total_timesteps < batch_size:
            raise BadInput(f"--total-timesteps {self.total_timesteps} is less than one rollout of num-envs x num-steps = {batch_size}")
        if batch_size % self.num_minibatches:
            raise BadInput(f"--num-minibatches {self.num_minibatches} must divide num-envs x num-steps = {batch_size}")
        return self


METRICS = (
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/value_loss",
    "losses/policy_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac",
    "losses/explained_variance", "charts/learning_rate", "time/env", "time/policy", "time/update",
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


# ---- PPO's value loss ------------------------------------------------------------------------------------------
def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the mean squared error of the values (n,); with clip_coef the larger of it and of the same error after
    the change from old_values has been clipped to +-clip_coef (OpenAI baselines)."""
    errors = (values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * errors.mean()


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
        parameters = [
            {"params": agent.actor_parameters(), "lr": args.learning_rate},
            {"params": agent.critic.parameters(), "lr": args.critic_learning_rate},
        ]
        optimisers = [torch.optim.Adam(parameters, eps=1e-5, fused=True)]

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
            rows = b_valid.flatten().nonzero().squeeze(-1)  # transitions; the row after an episode's end is none
            arrays = (b_obs[:-1], b_actions, logprobs, advantages, values[:-1], returns)
            transitions = [array.flatten(0, 1)[rows] for array in arrays]
            num_minibatches = max(1, min(args.num_minibatches, len(rows) // 2))
            for epoch in range(args.update_epochs):
                statistics = []  # of each minibatch of this epoch; read once, after the update
                order = torch.randperm(len(rows)).to(device)
                minibatches = zip(*(array[order].tensor_split(num_minibatches) for array in transitions))
                for mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_values, mb_returns in minibatches:
                    new_logprobs, entropies = agent.logprob_and_entropy(mb_obs, mb_actions)
                    logratio, entropy = new_logprobs - mb_logprobs, entropies.mean()
                    ratio = logratio.exp()
                    if args.norm_adv and len(mb_advantages) > 1:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    policy_loss = -clipped_surrogate(ratio, mb_advantages, args.clip_coef).mean()
                    vloss_clip = args.clip_coef if args.clip_vloss else None
                    critic_loss = value_loss(agent.critic(mb_obs).squeeze(-1), mb_values, mb_returns, vloss_clip)
                    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * critic_loss
                    optimisers[0].zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimisers[0].step()
                    if epoch == args.update_epochs - 1 or args.target_kl is not None:
                        with torch.no_grad():
                            clipped = ((ratio - 1).abs() > args.clip_coef).float().mean()
                            kl = ((ratio - 1) - logratio).mean()
                            statistics.append(torch.stack([critic_loss, policy_loss, entropy, -logratio.mean(), kl, clipped]))
                if args.target_kl is not None and torch.stack(statistics)[:, 4].mean() > args.target_kl:
                    break
            names = ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
            losses = dict(zip((f"losses/{name}" for name in names), torch.stack(statistics).mean(0).tolist()))

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
