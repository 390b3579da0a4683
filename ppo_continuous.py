"""PPO for continuous control (Schulman et al. 2017, arXiv:1707.06347), the baseline of `blpo_continuous.py`.

Actor theta and critic omega are improved at the same time on minibatches of the last rollout:

    delta_t = reward_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)           eq. (12)
    A_t     = sum_{k >= t} (gamma lambda)^{k-t} delta_k   to the episode's end  eq. (11) -> gae
    ratio_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t)
    J       = mean_t min(ratio_t A_t, clip(ratio_t, 1-eps, 1+eps) A_t)          eq. (7) -> clipped_surrogate
    L       = mean_t (G_t - V_omega(s_t))^2 / 2,  G_t = A_t + V_old(s_t)        -> value_loss
    theta, omega  <-  Adam on  -J + vf_coef L - ent_coef H                      eq. (9)

A is normalised in each minibatch, and L is the larger of this error and the same after the values' change has
been clipped. The details are those of CleanRL's `ppo_continuous_action` (numbered in docs/ppo.md), but for
batch shape, schedule and step sizes, and with four things put right: the row that follows the end of an
episode is a reset and no transition, so it is in no loss, statistic or normaliser; a time limit is
bootstrapped from the episode's final observation (`--no-bootstrap-truncation` treats it as a termination, as
most published numbers do); actions are clipped to the task's own box; the observation normaliser is saved
with the model. Environments step in EnvPool where it has them, else in Gymnasium.

    python ppo_continuous.py --env-id Hopper-v4
"""

# ---- Imports (shared) --------------------------------------------------------------------------------
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
from gymnasium.wrappers.utils import RunningMeanStd
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
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
    """The run, the task, then PPO."""

    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """seed of the environments, the initial weights, the actions and the minibatches"""
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
    """write model.pt (the policy with its normaliser) at the end"""
    eval_episodes: Annotated[int, Field(ge=0, le=10_000)] = 0
    """episodes played with the mean action at the end, through Gymnasium"""
    capture_video: bool = False
    """film one such episode"""

    env_id: str = "Hopper-v4"
    """any task with a Box action space; also namespace/Name-v0 and module:Name-v0"""
    env_kwargs: Annotated[str, pydantic.AfterValidator(json_object)] = "{}"
    """keyword arguments of the task, as JSON: '{"terminate_when_unhealthy": false}'"""
    env_backend: Literal["auto", "envpool", "sync", "async"] = "auto"
    """who steps the environments: EnvPool, or Gymnasium in this process or in one for each; auto: EnvPool
    where it has the task, else sync"""
    env_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """EnvPool threads; 0: one for each usable core, at most num_envs"""
    total_timesteps: PositiveInt = 1_000_000
    """environment steps in all, rounded down to whole rollouts"""
    num_envs: Annotated[int, Field(ge=1, le=65536)] = 8
    """parallel environments"""

    num_steps: Annotated[int, Field(ge=2)] = 256
    """steps of each environment in a rollout"""
    learning_rate: PositiveFloat = 7e-4
    """Adam step size of the actor"""
    critic_learning_rate: PositiveFloat = 2.8e-3
    """Adam step size of the critic"""
    anneal_lr: bool = True
    """lower both step sizes linearly to 0"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the advantages and of the critic's targets"""
    bootstrap_truncation: bool = True
    """a time limit bootstraps from the final observation; otherwise it counts as a termination"""
    num_minibatches: PositiveInt = 16
    """minibatches in an epoch"""
    update_epochs: PositiveInt = 4
    """passes over a rollout"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: PositiveFloat = 0.2
    """eps of the clipped ratio"""
    clip_vloss: bool = True
    """clip the change of the value as well"""
    ent_coef: NonNegativeFloat = 0.0
    """weight of the entropy bonus"""
    vf_coef: NonNegativeFloat = 0.5
    """weight of the value loss"""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 0.5
    """largest norm of the joint gradient"""
    target_kl: PositiveFloat | None = None
    """stop the epochs of a rollout once the approximate KL divergence exceeds this; default: never"""
    actor_width: Width = 64
    """units in each of the actor's two hidden layers"""
    critic_width: Annotated[int, Field(ge=0, le=8192)] = 64
    """units in each of the critic's two hidden layers; 0: a linear critic"""

    @pydantic.model_validator(mode="after")
    def check_shapes(self):
        """Raise BadInput unless there is a whole rollout and the minibatches divide it."""
        rows = self.num_envs * self.num_steps
        if rows > 10_000_000:
            raise BadInput(f"--num-envs x --num-steps is {rows}, a rollout may have 10,000,000 rows")
        if self.total_timesteps < rows:
            raise BadInput(f"--total-timesteps {self.total_timesteps} is less than one rollout of {rows}")
        if rows % self.num_minibatches:
            raise BadInput(f"--num-minibatches {self.num_minibatches} must divide a rollout of {rows}")
        return self


METRICS = (
    "global_step", "wall_time_s", "charts/episodic_return", "charts/episodic_length", "charts/SPS",
    "losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl",
    "losses/clipfrac", "losses/explained_variance", "charts/learning_rate", "time/env", "time/policy",
    "time/update",
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


# ---- Gaussian policy (shared) ------------------------------------------------------------------------
def layer_init(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """The layer with orthogonal weights and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """A critic, and a separate Gaussian actor with a state-independent log standard deviation, at first 0.

    The networks may be any modules from observations (..., D) to one value (..., 1) and to the mean action
    (..., A). Called with raw observations, the agent is the policy as it is played.
    """

    def __init__(self, obs_dim: int, action_dim: int, actor_width: int = 64, critic_width: int = 64):
        super().__init__()
        hidden = [
            layer_init(nn.Linear(obs_dim, critic_width)),
            nn.Tanh(),
            layer_init(nn.Linear(critic_width, critic_width)),
            nn.Tanh(),
        ] if critic_width else []  # fmt: skip
        self.critic = nn.Sequential(*hidden, layer_init(nn.Linear(critic_width or obs_dim, 1), gain=1.0))
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
        """log pi(a|s) of unclipped actions (..., A) at obs (..., D); the entropy in nats; both (...)."""
        noise = (actions - self.actor_mean(obs)) * torch.exp(-self.actor_logstd)
        logprob = -0.5 * (noise * noise).sum(-1) - (self.actor_logstd + 0.5 * math.log(2 * math.pi)).sum()
        entropy = (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return logprob, entropy.expand_as(logprob)

    def task_actions(self, actions: Tensor) -> Tensor:
        """The policy's actions (..., A) as the task takes them: clipped to its box."""
        return actions.clamp(self.action_low, self.action_high)

    def forward(self, raw_obs: Tensor) -> Tensor:
        """The policy as it is played: raw observations (..., D) -> mean actions in the box (..., A)."""
        obs = ((torch.as_tensor(raw_obs).double() - self.obs_mean) / self.obs_std).clamp(-10, 10)
        return self.task_actions(self.actor_mean(obs.float()))


def check_action_space(env_id: str, space: gym.Space) -> None:
    """Raise BadInput unless the actions are vectors of numbers in a box that is not empty."""
    box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    if not box or not space.shape[0] or not (space.low < space.high).all():
        other = Path(__file__).stem.split("_")[0] + "_discrete.py"
        needs = f"this script needs a flat Box of floats with low < high; for discrete actions use {other}"
        raise BadInput(f"--env-id {env_id!r} has the action space {space}; {needs}")


# ---- PPO mathematics (shared) ------------------------------------------------------------------------
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


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO's min(ratio A, clip(ratio, 1-eps, 1+eps) A) (PPO eq. 7), element by element, of any shape."""
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


# ---- PPO's value loss --------------------------------------------------------------------------------
def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the mean squared error of the values (n,); with clip_coef the larger of it and of the same error
    after the change from old_values has been clipped to +-clip_coef (OpenAI baselines)."""
    errors = (values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * errors.mean()


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


# ---- Training: set-up (shared) -----------------------------------------------------------------------
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
        agent_sizes = obs_dim, action_dim, args.actor_width, args.critic_width
        agent = Agent(*agent_sizes)
        agent.to(device).eval()  # acting and learning are one function of the weights: no dropout in either

        # ---- Optimisers ------------------------------------------------------------------------------
        options = {"eps": 1e-5, "fused": True}
        actor_optimiser = torch.optim.Adam(agent.actor_parameters(), args.learning_rate, **options)
        critic_optimiser = torch.optim.Adam(agent.critic.parameters(), args.critic_learning_rate, **options)
        optimisers = [actor_optimiser, critic_optimiser]

        # ---- Training: buffers and the loop (shared) -------------------------------------------------
        step_sizes = [group["lr"] for each in optimisers for group in each.param_groups]
        obs_stats, return_stats = RunningMeanStd(shape=(obs_dim,)), RunningMeanStd()
        if checkpoint:
            try:
                agent.load_state_dict(checkpoint["agent"])
                for each, state in zip(optimisers, checkpoint["optimisers"]):
                    each.load_state_dict(state)
                for each, state in zip((obs_stats, return_stats), checkpoint["normalisers"]):
                    each.mean, each.var, each.count = (number.numpy() for number in state)
                torch.set_rng_state(checkpoint["rng"])  # all noise and all minibatches are drawn on the CPU
            except (RuntimeError, ValueError, KeyError) as error:
                wrong = "another version made it, or networks of another shape; leave out widths and task"
                raise BadInput(f"--resume {args.resume}: {wrong}") from error
        groups = [group for each in optimisers for group in each.param_groups]
        trained = sorted(id(weight) for group in groups for weight in group["params"])
        if trained != sorted(id(weight) for weight in agent.parameters()):
            raise BadInput("every parameter of the agent must be one of the actor's or one of the critic's")
        agent.set_action_space(action_space)

        def normalise(raw: np.ndarray) -> np.ndarray:
            """Observations in units of their running standard deviation, clipped to +-10."""
            return ((raw - obs_stats.mean) / np.sqrt(obs_stats.var + 1e-8)).clip(-10, 10)

        # The rollout: arrays (time, environment, ...); row num_steps of obs is the next rollout's first.
        shape = (args.num_steps, args.num_envs)
        obs = np.zeros((args.num_steps + 1, args.num_envs, obs_dim), dtype=np.float32)
        rewards, terminated, truncated, valid = (np.zeros(shape, dtype=np.float32) for _ in range(4))
        ended = np.zeros(args.num_envs, dtype=bool)  # in the last step; the row after it is a reset
        discounted_returns, episode_returns, episode_lengths = np.zeros((3, args.num_envs))
        run.open()
        raw_obs = envs.reset()[0].astype(np.float64)
        if not checkpoint:
            obs_stats.update(raw_obs)
        obs[-1] = normalise(raw_obs)
        num_iterations = args.total_timesteps // batch_size
        for iteration in range(start // batch_size + 1, num_iterations + 1):
            for group, size in zip(groups, step_sizes):
                group["lr"] = size * (1 - (iteration - 1) / num_iterations) if args.anneal_lr else size

            # ---- Training: collect a rollout (shared) ------------------------------------------------
            rollout_start, env_time, episodes = time.perf_counter(), 0.0, []
            obs[0] = obs[-1]
            behaviour = copy.deepcopy(agent).cpu()  # pi_old; a CPU is faster than a GPU for a few rows
            noise, actions = behaviour.noise(*shape).detach(), []
            for t in range(args.num_steps):
                with torch.no_grad():
                    actions.append(behaviour.sample(torch.from_numpy(obs[t]), noise[t]))
                    task_actions = behaviour.task_actions(actions[t]).numpy()
                env_start = time.perf_counter()
                raw_obs, reward, ends, cut, _ = envs.step(task_actions)
                env_time += time.perf_counter() - env_start
                raw_obs = raw_obs.astype(np.float64)
                transition, ended = ~ended, ends | cut
                terminated[t], truncated[t], valid[t] = ends, cut, transition
                reward = np.where(transition, reward, 0.0)
                episode_returns += reward
                episode_lengths += transition
                discounted_returns = args.gamma * discounted_returns + reward
                # A final observation is no input of the policy and a reset row earns no reward.
                if not ended.all():
                    obs_stats.update(raw_obs[~ended])
                if transition.any():
                    return_stats.update(discounted_returns[transition])
                obs[t + 1] = normalise(raw_obs)
                rewards[t] = (reward / np.sqrt(return_stats.var + 1e-8)).clip(-10, 10)
                for index in ended.nonzero()[0].tolist():
                    step = (iteration - 1) * batch_size + (t + 1) * args.num_envs
                    seconds, length = time.perf_counter() - run.started, int(episode_lengths[index])
                    episode = step, seconds, index, float(episode_returns[index]), length
                    episodes.append(dict(zip(EPISODES, episode)))
                    discounted_returns[index] = episode_returns[index] = episode_lengths[index] = 0

            # ---- Training: values, advantages and targets of the rollout (shared) --------------------
            update_start = time.perf_counter()
            ending = np.maximum(terminated, truncated)
            discounts = args.gamma * (1 - (terminated if args.bootstrap_truncation else ending))
            arrays = obs, rewards, discounts, ending, valid
            b_obs, b_rewards, b_discounts, b_ended, b_valid = (torch.tensor(x, device=device) for x in arrays)
            b_actions = torch.stack(actions).to(device)
            with torch.no_grad():
                values = agent.critic(b_obs.flatten(0, 1)).view(b_obs.shape[:2])
                logprobs, _ = agent.logprob_and_entropy(b_obs[:-1].flatten(0, 1), b_actions.flatten(0, 1))
                logprobs = logprobs.view(shape)
            advantages = gae(b_rewards, values, b_discounts, args.gamma * args.gae_lambda * (1 - b_ended))
            returns = advantages + values[:-1]

            # ---- Update ------------------------------------------------------------------------------
            rows = b_valid.flatten().nonzero().squeeze(-1)  # transitions; a reset is none
            arrays = b_obs[:-1], b_actions, logprobs, advantages, values[:-1], returns
            transitions = [array.flatten(0, 1)[rows] for array in arrays]
            num_minibatches = max(1, min(args.num_minibatches, len(rows) // 2))
            for epoch in range(args.update_epochs):
                statistics = []  # of each minibatch of this epoch; read once, after the update
                for part in torch.randperm(len(rows)).to(device).tensor_split(num_minibatches):
                    minibatch = (array[part] for array in transitions)
                    mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_values, mb_returns = minibatch
                    new_logprobs, entropies = agent.logprob_and_entropy(mb_obs, mb_actions)
                    logratio, entropy = new_logprobs - mb_logprobs, entropies.mean()
                    ratio = logratio.exp()
                    if args.norm_adv and len(mb_advantages) > 1:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    policy_loss = -clipped_surrogate(ratio, mb_advantages, args.clip_coef).mean()
                    value_clip = args.clip_coef if args.clip_vloss else None
                    new_values = agent.critic(mb_obs).squeeze(-1)
                    critic_loss = value_loss(new_values, mb_values, mb_returns, value_clip)
                    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * critic_loss
                    agent.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    actor_optimiser.step()
                    critic_optimiser.step()
                    if epoch == args.update_epochs - 1 or args.target_kl is not None:
                        with torch.no_grad():
                            clipped = ((ratio - 1).abs() > args.clip_coef).float().mean()
                            old_kl, kl = -logratio.mean(), ((ratio - 1) - logratio).mean()
                            numbers = critic_loss, policy_loss, entropy, old_kl, kl, clipped
                            statistics.append(torch.stack(numbers))
                if args.target_kl is not None and torch.stack(statistics)[:, 4].mean() > args.target_kl:
                    break
            names = "value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"
            losses = dict(zip((f"losses/{name}" for name in names), torch.stack(statistics).mean(0).tolist()))

            # ---- Training: log and checkpoint (shared) -----------------------------------------------
            targets, predictions = (x[b_valid.bool()] for x in (returns, values[:-1]))
            explained = float(1 - (targets - predictions).var() / targets.var())
            now = time.perf_counter()
            losses |= {
                "losses/explained_variance": explained if math.isfinite(explained) else None,
                "charts/learning_rate": groups[0]["lr"],
                "time/env": env_time,
                "time/policy": update_start - rollout_start - env_time,
                "time/update": now - update_start,
            }
            run.log(iteration * batch_size, losses, episodes)
            weights = nn.utils.parameters_to_vector(agent.parameters())
            last_losses = torch.stack(statistics)
            watched = {"observations": b_obs, "rewards": b_rewards, "losses": last_losses, "weights": weights}
            for name, numbers in watched.items():
                if not numbers.isfinite().all():
                    raise Diverged(f"the {name} stopped being finite by step {iteration * batch_size:,}")
            agent.obs_mean.copy_(torch.as_tensor(obs_stats.mean))
            agent.obs_std.copy_(torch.as_tensor(np.sqrt(obs_stats.var + 1e-8)))
            if iteration % args.checkpoint_every == 0 or iteration == num_iterations or run.stop_signal:
                state = {"agent_sizes": agent_sizes, "agent": agent.state_dict()}
                state["optimisers"] = [each.state_dict() for each in optimisers]
                stats = [(each.mean, each.var, each.count) for each in (obs_stats, return_stats)]
                state["normalisers"] = [[torch.as_tensor(np.float64(x)) for x in each] for each in stats]
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
